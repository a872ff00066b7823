# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A restored cluster's configuration and archiving: during the recovery, until somebody accepts it, and afterwards."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.plugins.module_utils.recovery_conf import INCLUDE_LINE
from ansible_collections.pgdrill.pitr.plugins.module_utils.restore import Restore as Engine
from ansible_collections.pgdrill.pitr.plugins.module_utils.restore import settle, undo
from ansible_collections.pgdrill.pitr.tests.integration.support import Restored, Sandbox, Server, fingerprint, until

if TYPE_CHECKING:
    from ansible_collections.pgdrill.pitr.tests.integration.conftest import History

Restore = Callable[..., Restored]
MakeSandbox = Callable[..., Sandbox]


def _archived(sandbox: Sandbox) -> list[str]:
    return sorted(path.name for path in sandbox.archive.rglob("*") if path.is_file())


def _write(server: Server, phase: str) -> None:
    server.sql("UPDATE status SET phase = %s", phase)
    server.sql("SELECT pg_switch_wal()")


def _lived(make: MakeSandbox, **options: Any) -> Sandbox:
    """A primary with a backup and one phase after it, stopped."""
    sandbox = make(**options)
    sandbox.backup("only")
    sandbox.commit("before")
    sandbox.probe()
    sandbox.server.stop()
    return sandbox


# --- archiving


def test_restored_cluster_archives_nothing_until_it_is_accepted_and_then_everything(
    sandbox: MakeSandbox, restored: Restore
) -> None:
    primary = _lived(sandbox)
    before = _archived(primary)
    cluster = restored(primary, archive_after="none-until-promoted").run()
    _write(cluster.server, "after")
    # The archiver tries, and is told to wait.
    until(lambda: cluster.server.value("SELECT failed_count FROM pg_stat_archiver") > 0, "the archiver's first try")
    assert _archived(primary) == before
    ready = sorted(path.name for path in (cluster.server.data / "pg_wal" / "archive_status").glob("*.ready"))
    assert "00000002.history.ready" in ready
    changed, pending = cluster.recovery.accept()
    assert changed
    assert pending == []
    assert cluster.server.show("archive_command") == primary.archive_command
    primary.server = cluster.server
    primary.probe()
    added = set(_archived(primary)) - set(before)
    assert {name.removesuffix(".ready") for name in ready} <= added
    # A second time there is nothing to accept.
    assert cluster.recovery.accept() == (False, [])
    # Nothing is missing: the archive leads on over the branch.
    cluster.server.stop()
    assert restored(primary).run().phase == "after"


def test_clone_never_archives(sandbox: MakeSandbox, restored: Restore) -> None:
    primary = _lived(sandbox)
    before = fingerprint(primary.archive, primary.backups)
    cluster = restored(primary, archive_after="off").run()
    assert cluster.server.show("archive_mode") == "off"
    _write(cluster.server, "clone")
    time.sleep(0.5)
    assert fingerprint(primary.archive, primary.backups) == before
    assert not list((cluster.server.data / "pg_wal" / "archive_status").glob("*.ready"))


def test_archiving_may_go_on_at_once(sandbox: MakeSandbox, restored: Restore) -> None:
    primary = _lived(sandbox)
    cluster = restored(primary, archive_after="same").run()
    assert cluster.server.show("archive_command") == primary.archive_command
    until(lambda: "00000002.history" in _archived(primary), "the history file in the archive")


# --- configuration


def test_recovery_settings_are_gone_when_the_cluster_is_accepted(sandbox: MakeSandbox, restored: Restore) -> None:
    primary = sandbox()
    primary.backup("only")
    commit = primary.commit("target")
    primary.commit("later")
    primary.probe()
    primary.server.stop()
    cluster = restored(primary, {"recovery_target_xid": str(commit.xid)}, archive_after="same").run()
    data = cluster.server.data
    assert cluster.recovery.planned()["backup"] == "only"
    cluster.recovery.accept()
    assert cluster.recovery.planned() == {}
    assert sorted(path.name for path in (data / "conf.d").iterdir()) == ["50-tests.conf"]
    assert not list(data.glob("*.signal"))
    cluster.server.restart()
    changed = cluster.server.sql(
        "SELECT name FROM pg_settings WHERE (name LIKE 'recovery_target%%' OR name = 'restore_command')"
        " AND setting <> boot_val"
    )
    assert changed == []
    assert cluster.server.sql("SELECT name FROM pg_settings WHERE pending_restart") == []
    assert cluster.phase == "target"


def test_settings_of_alter_system_neither_steer_the_recovery_nor_get_lost(
    sandbox: MakeSandbox, restored: Restore
) -> None:
    primary = sandbox()
    elsewhere = primary.archive_command + " "
    for name, value in {
        "archive_command": elsewhere,
        "archive_mode": "on",
        "work_mem": "7MB",
        "restore_command": "false",
        "recovery_target_name": "long ago",
        "recovery_target_timeline": "1",
        "recovery_target_inclusive": "off",
        "recovery_target_action": "shutdown",
    }.items():
        primary.server.sql(f"ALTER SYSTEM SET {name} = '{value}'")
    primary.server.sql("SELECT pg_reload_conf()")
    # A leftover that would turn the recovery into an endless one.
    (primary.server.data / "standby.signal").touch()
    primary.backup("only")
    commit = primary.commit("target")
    primary.commit("later")
    primary.probe()
    primary.server.stop()
    cluster = restored(primary, {"recovery_target_xid": str(commit.xid)}, archive_after="none-until-promoted")
    assert [path.name for path in cluster.server.data.glob("*.signal")] == ["recovery.signal"]
    cluster.run()
    assert cluster.phase == "target"
    assert "hold" in cluster.server.show("archive_command")
    assert cluster.server.show("work_mem") == "7MB"
    cluster.recovery.accept()
    assert cluster.server.show("archive_command") == elsewhere
    auto = (cluster.server.data / "postgresql.auto.conf").read_text(encoding="utf-8")
    assert "recovery_target" not in auto and "restore_command" not in auto
    assert "work_mem" in auto and "archive_mode" in auto


def test_setting_that_is_set_anew_during_the_recovery_is_kept(sandbox: MakeSandbox, restored: Restore) -> None:
    primary = sandbox()
    primary.server.sql(f"ALTER SYSTEM SET archive_command = '{primary.archive_command}'")
    primary.server.sql("SELECT pg_reload_conf()")
    _lived(lambda: primary)
    cluster = restored(primary, archive_after="none-until-promoted").run()
    cluster.server.sql("ALTER SYSTEM SET archive_command = 'true'")
    cluster.recovery.accept()
    assert cluster.server.show("archive_command") == "true"


def test_settings_lower_than_the_primarys_are_raised_for_the_recovery(sandbox: MakeSandbox, restored: Restore) -> None:
    primary = sandbox(start=False)
    # Given on the command line, so that the configuration in the backup is the lower one.
    higher = {"max_connections": "33", "max_worker_processes": "11", "max_prepared_transactions": "5"}
    primary.server.start(options=" ".join(f"-c {name}={value}" for name, value in higher.items()))
    primary.backup("only")
    primary.commit("before")
    primary.probe()
    primary.server.stop()
    cluster = restored(primary).run()
    assert {name: cluster.server.show(name) for name in higher} == higher
    assert cluster.phase == "before"
    assert cluster.recovery.planned()["raised"] == higher
    cluster.recovery.accept()
    cluster.server.restart()
    assert cluster.server.show("max_connections") == "20"


def test_settings_that_the_primary_raised_after_the_backup_stop_the_recovery_by_name(
    sandbox: MakeSandbox, restored: Restore
) -> None:
    primary = sandbox()
    primary.backup("only")
    primary.commit("before")
    primary.configure({"max_connections": 44})
    primary.server.restart()
    primary.commit("after")
    primary.probe()
    primary.server.stop()
    cluster = restored(primary)
    cluster.server.start(wait=False)
    # A paused server is not one that has reached its target.
    with pytest.raises(PitrError, match="max_connections must be at least 44, it is 20"):
        cluster.wait()
    cluster.server.stop()
    (cluster.server.data / "conf.d" / "60-raised.conf").write_text("max_connections = 44\n", encoding="utf-8")
    cluster.run()
    assert cluster.phase == "after"


def test_setting_that_would_win_over_the_recoverys_is_refused_and_the_old_directory_is_back(
    history: History, own_data: Path
) -> None:
    # Read later than conf.d, as a file of the host's configuration management may be.
    storage = history.storage
    config = own_data.parent / "config"
    _external(own_data, config)
    with open(config / "postgresql.conf", "a", encoding="utf-8") as stream:
        stream.write("include_dir = 'conf.d'\nrestore_command = 'false'\n")
    before = fingerprint(own_data.parent)
    engine = Engine(storage.request(own_data, force=True, config_dir=str(config)))
    plan = engine.plan()
    with pytest.raises(PitrError, match="restore_command has no effect"):
        engine.execute(plan)
    assert fingerprint(own_data.parent) == before


# --- configuration outside the data directory


def _external(data: Path, config: Path) -> None:
    """Move the configuration out of the data directory, as Debian has it."""
    config.mkdir()
    (config / "conf.d").mkdir()
    for name in ("postgresql.conf", "pg_hba.conf", "pg_ident.conf"):
        shutil.copyfile(data / name, config / name)
    text = (config / "postgresql.conf").read_text(encoding="utf-8").replace(INCLUDE_LINE, "")
    text += f"data_directory = '{data}'\nhba_file = '{config}/pg_hba.conf'\nident_file = '{config}/pg_ident.conf'\n"
    (config / "postgresql.conf").write_text(text, encoding="utf-8")


def test_restore_with_the_configuration_elsewhere(history: History, own_data: Path, restored: Restore) -> None:
    config = own_data.parent / "config"
    _external(own_data, config)
    cluster = restored(history.storage, data=own_data, force=True, config_dir=str(config))
    cluster.run()
    assert cluster.phase == "end"
    assert (config / "conf.d" / "99-pitr-recovery.conf").exists()
    cluster.recovery.accept()
    assert not (config / "conf.d" / "99-pitr-recovery.conf").exists()


def test_undo_takes_the_recoverys_settings_away_from_the_configuration_elsewhere(
    history: History, own_data: Path, restored: Restore, server: Callable[[Path], Server]
) -> None:
    config = own_data.parent / "config"
    _external(own_data, config)
    options = {"recovery_target_xid": str(history.commit("third 2").xid)}
    cluster = restored(history.storage, options, data=own_data, force=True, config_dir=str(config)).run()
    cluster.server.stop()
    undo(cluster.request, cluster.result.moved_aside)
    assert list((config / "conf.d").iterdir()) == []
    old = server(own_data)
    old.config = config
    old.start()
    assert old.phase == "end"


# --- the old directory


def test_old_directory_is_moved_aside_whole_and_starts(
    history: History, own_data: Path, restored: Restore, server: Callable[[Path], Server]
) -> None:
    before = {name.removeprefix(str(own_data)): value for name, value in fingerprint(own_data).items()}
    options = {"recovery_target_xid": str(history.commit("third 2").xid)}
    cluster = restored(history.storage, options, data=own_data, force=True).run()
    aside = Path(cluster.result.moved_aside)
    assert {name.removeprefix(str(aside)): value for name, value in fingerprint(aside).items()} == before
    old = server(aside)
    old.start()
    assert (cluster.phase, old.phase) == ("third 2", "end")


def test_restored_directory_is_complete_and_private(history: History, restored: Restore) -> None:
    data = restored(history.storage).server.data
    assert data.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in data.glob("*.signal")] == ["recovery.signal"]
    assert not [path for path in data.rglob("*") if "restoring" in path.name]
    assert (data / "conf.d" / "99-pitr-recovery.conf").stat().st_mode & 0o077 == 0


def test_undo_puts_the_old_directory_back_and_keeps_the_restored_one(
    history: History, own_data: Path, restored: Restore, server: Callable[[Path], Server]
) -> None:
    before = fingerprint(own_data)
    options = {"recovery_target_xid": str(history.commit("third 2").xid)}
    cluster = restored(history.storage, options, data=own_data, force=True).run()
    with pytest.raises(PitrError, match="server is running"):
        undo(cluster.request, cluster.result.moved_aside)
    cluster.server.stop()
    now = fingerprint(own_data.parent)
    undo(cluster.request, cluster.result.moved_aside, check=True)
    assert fingerprint(own_data.parent) == now
    kept = undo(cluster.request, cluster.result.moved_aside)
    assert fingerprint(own_data) == before
    restored_one, old = server(Path(kept)), server(own_data)
    restored_one.start()
    old.start()
    assert (restored_one.phase, old.phase) == ("third 2", "end")


def test_undo_refuses_what_would_lose_data(history: History, own_data: Path, restored: Restore, stranger: Path) -> None:
    cluster = restored(history.storage, data=own_data, force=True).run()
    aside = Path(cluster.result.moved_aside)
    cluster.recovery.accept()
    cluster.server.stop()
    before = fingerprint(own_data.parent)
    with pytest.raises(PitrError, match="not a restored cluster that waits to be accepted"):
        undo(cluster.request, str(aside))
    with pytest.raises(PitrError, match="does not exist"):
        undo(cluster.request, str(aside) + "x")
    with pytest.raises(PitrError, match="pg_controldata"):
        undo(cluster.request, str(aside / "pg_wal"))
    assert fingerprint(own_data.parent) == before


def test_undo_refuses_another_clusters_directory(
    history: History, own_data: Path, restored: Restore, stranger: Path, tmp_path: Path
) -> None:
    cluster = restored(history.storage, data=own_data, force=True)
    shutil.copytree(stranger, tmp_path / "data.old-stranger")
    before = fingerprint(own_data.parent)
    with pytest.raises(PitrError, match="not touched"):
        undo(cluster.request, str(tmp_path / "data.old-stranger"))
    assert fingerprint(own_data.parent) == before


def test_unaccepted_cluster_is_replaced_only_when_that_was_said(
    history: History, own_data: Path, restored: Restore
) -> None:
    first = restored(history.storage, data=own_data, force=True)
    kept = restored(history.storage, data=own_data, force=True)
    assert (Path(kept.result.moved_aside) / "recovery.signal").exists()
    replaced = restored(history.storage, data=own_data, force=True, keep_unaccepted=False)
    assert replaced.result.moved_aside == ""
    assert Path(first.result.moved_aside).exists()


def test_original_is_never_taken_for_an_unaccepted_cluster(history: History, own_data: Path, restored: Restore) -> None:
    """Settings of an earlier recovery outside the data directory do not make it a restored one."""
    config = own_data.parent / "config"
    _external(own_data, config)
    cluster = restored(history.storage, data=own_data, force=True, config_dir=str(config))
    # Somebody has put the old directory back by hand.
    shutil.rmtree(own_data)
    Path(cluster.result.moved_aside).rename(own_data)
    before = {name.removeprefix(str(own_data)): value for name, value in fingerprint(own_data).items()}
    again = restored(history.storage, data=own_data, force=True, config_dir=str(config), keep_unaccepted=False)
    aside = again.result.moved_aside
    assert {name.removeprefix(aside): value for name, value in fingerprint(Path(aside)).items()} == before


def test_old_directory_is_removed_only_when_the_new_one_is_accepted(
    history: History, own_data: Path, restored: Restore, stranger: Path
) -> None:
    cluster = restored(history.storage, data=own_data, force=True).run()
    aside = Path(cluster.result.moved_aside)
    before = fingerprint(aside)
    with pytest.raises(PitrError, match="not accepted yet"):
        settle(cluster.request, str(aside))
    cluster.recovery.accept()
    for name, match in (("data.old", "not what a restore"), ("elsewhere/data.old-1", "not what a restore")):
        other = own_data.parent / name
        shutil.copytree(aside, other)
        with pytest.raises(PitrError, match=match):
            settle(cluster.request, str(other))
        assert (other / "PG_VERSION").exists()
    shutil.copytree(stranger, own_data.parent / "data.old-stranger")
    with pytest.raises(PitrError, match="another cluster"):
        settle(cluster.request, str(own_data.parent / "data.old-stranger"))
    with pytest.raises(PitrError):
        settle(cluster.request, str(own_data))
    assert fingerprint(aside) == before
    assert settle(cluster.request, str(aside), check=True)
    assert aside.exists()
    assert settle(cluster.request, str(aside))
    assert not aside.exists()
    assert not settle(cluster.request, str(aside))
    assert cluster.phase == "end"
