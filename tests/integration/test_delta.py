# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Delta restore: what differs from the backup is written, by content; the rest of the directory stays, and nothing
outside of it is touched."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils import delta
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.plugins.module_utils.plan import RefusedError
from ansible_collections.pgdrill.pitr.plugins.module_utils.restore import Restore as Engine
from ansible_collections.pgdrill.pitr.tests.integration.support import (
    Restored,
    Sandbox,
    Server,
    Storage,
    fingerprint,
    flip,
    in_child,
    refuses_to_start,
)

if TYPE_CHECKING:
    from ansible_collections.pgdrill.pitr.tests.integration.conftest import History

Restore = Callable[..., Restored]
MakeSandbox = Callable[..., Sandbox]
IN_PLACE = {"delta": True, "force": True}
MARKER = "pitr-restoring.json"


@pytest.fixture
def broken(history: History, tmp_path: Path) -> Storage:
    """A copy of the shared repository to break."""
    return history.storage.copy(tmp_path / "broken")


def _files(data: Path) -> dict[str, str]:
    """Files and links of a data directory, without what is of one restore alone."""
    found = fingerprint(data)
    return {
        path[len(str(data)) :]: what
        for path, what in found.items()
        if not what.startswith("directory") and not path.endswith("99-pitr-recovery.conf")
    }


def _refused(storage: Storage, data: Path, *codes: str, **more: Any) -> str:
    """The plan is refused with exactly these codes, and the directory is as it was."""
    before = fingerprint(data.parent)
    with pytest.raises(RefusedError) as caught:
        storage.plan(data, **{**IN_PLACE, **more})
    assert [item.code for item in caught.value.refusals] == list(codes), caught.value.message
    assert fingerprint(data.parent) == before
    return str(caught.value.message)


def _base_tar(storage: Storage, label: str) -> Path:
    return next((storage.backups / label).glob("base.tar*"))


# --- what is written, and what stays


def test_directory_of_the_server_becomes_that_of_the_backup_and_recovers(
    history: History, own_data: Path, restored: Restore
) -> None:
    (own_data / "thesis.odt").write_text("not in the backup", encoding="utf-8")
    (own_data / "base" / "99999").mkdir()
    (own_data / "base" / "99999" / "1259").write_bytes(b"a database that was created later")
    (own_data / "pg_replslot" / "gone").mkdir()
    (own_data / "pg_replslot" / "gone" / "state").write_bytes(b"a slot")
    fresh = restored(history.storage, backup="second", keep_out=False)
    inodes = {path: path.stat().st_ino for path in own_data.rglob("*") if path.is_file()}
    changed = restored(history.storage, data=own_data, backup="second", keep_out=False, **IN_PLACE)
    assert changed.plan.in_place
    assert changed.result.moved_aside == ""
    assert list(own_data.parent.iterdir()) == [own_data]
    assert _files(own_data) == _files(fresh.server.data)
    assert not (own_data / "base" / "99999").exists()
    assert not (own_data / "pg_replslot" / "gone").exists()
    kept = [path for path, inode in inodes.items() if path.exists() and path.stat().st_ino == inode]
    summary = changed.result.delta
    assert summary is not None
    assert summary.kept > 0.8 * (summary.kept + summary.written)
    assert len(kept) >= summary.kept
    assert summary.removed >= 3
    assert changed.run().phase == "end"


def test_change_that_neither_size_nor_time_tells_is_found(history: History, own_data: Path, restored: Restore) -> None:
    restored(history.storage, data=own_data, backup="third", **IN_PLACE)
    whole = _files(own_data)
    victims = sorted((own_data / "base").rglob("[0-9]*"), key=lambda path: path.stat().st_size)[-2:]
    victims.append(own_data / "pg_hba.conf.pitr-kept")
    for victim in victims:
        flip(victim, victim.stat().st_size // 2)
    assert _files(own_data) != whole
    again = restored(history.storage, data=own_data, backup="third", **IN_PLACE)
    assert _files(own_data) == whole
    assert again.result.delta is not None
    assert again.result.delta.written == len(victims)
    assert again.run().phase == "end"


def test_files_that_have_the_same_crc_whatever_they_hold_are_told_apart(
    sandbox: MakeSandbox, restored: Restore, tmp_path: Path
) -> None:
    primary = sandbox()
    primary.backup("only")
    # pg_class gets another file, and the map, which ends with its own CRC32C, another content of the same size.
    primary.server.sql("VACUUM FULL pg_class")
    primary.server.sql("VACUUM FULL pg_database")
    primary.commit("after")
    primary.probe()
    primary.server.stop()
    data = primary.server.data
    fresh = restored(primary, backup="only")
    changed = restored(primary, data=data, backup="only", **IN_PLACE)
    assert changed.result.delta is not None
    for path in [*fresh.server.data.rglob("pg_filenode.map"), fresh.server.data / "global" / "pg_control"]:
        assert (data / path.relative_to(fresh.server.data)).read_bytes() == path.read_bytes(), path
    assert changed.run().phase == "after"
    # What was noted down is of that backup, and no proof for files that have changed since.
    changed.server.sql("VACUUM FULL pg_class")
    changed.server.stop()
    again = restored(primary, data=data, backup="only", **IN_PLACE)
    for path in [*fresh.server.data.rglob("pg_filenode.map"), fresh.server.data / "global" / "pg_control"]:
        assert (data / path.relative_to(fresh.server.data)).read_bytes() == path.read_bytes(), path
    assert again.run().phase == "after"


@pytest.mark.parametrize("keep_out", [False, True])
def test_nothing_of_the_stored_files_is_read_when_nothing_has_changed(
    history: History, broken: Storage, own_data: Path, restored: Restore, keep_out: bool
) -> None:
    # Who keeps users out has pg_hba.conf under another name beside its own.
    restored(broken, data=own_data, backup="third", keep_out=keep_out, **IN_PLACE)
    rules = (own_data / ("pg_hba.conf.pitr-kept" if keep_out else "pg_hba.conf")).read_text(encoding="utf-8")
    stored = _base_tar(broken, "third")
    stored.write_bytes(bytes(stored.stat().st_size))
    again = restored(broken, data=own_data, backup="third", keep_out=False, **IN_PLACE)
    assert again.result.delta is not None
    assert again.result.delta.written == 0
    assert (own_data / "pg_hba.conf").read_text(encoding="utf-8") == rules
    assert not list(own_data.glob("*pitr-kept*"))
    assert again.run().phase == "end"


def test_what_lies_outside_is_not_followed_nor_written_to(
    history: History, own_data: Path, restored: Restore, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x", encoding="utf-8")
    # A copy that was made with hard links, a link to a file, one to a directory, one in place of a file.
    shutil.copytree(own_data, tmp_path / "hard", copy_function=os.link)
    (own_data / "stray").symlink_to(outside / "precious")
    (own_data / "strays").symlink_to(outside)
    shutil.move(own_data / "pg_hba.conf", outside / "pg_hba.conf")
    (own_data / "pg_hba.conf").symlink_to(outside / "pg_hba.conf")
    shutil.move(own_data / "pg_xact", outside / "pg_xact")
    (own_data / "pg_xact").symlink_to(outside / "pg_xact")
    before = fingerprint(outside, tmp_path / "hard")
    changed = restored(history.storage, data=own_data, backup="first", keep_out=False, **IN_PLACE)
    assert fingerprint(outside, tmp_path / "hard") == before
    fresh = restored(history.storage, backup="first", keep_out=False)
    assert _files(own_data) == _files(fresh.server.data)
    assert changed.run().phase == "end"


def test_wal_on_a_filesystem_of_its_own_stays_there(
    history: History, own_data: Path, restored: Restore, tmp_path: Path
) -> None:
    wal = tmp_path / "wal"
    shutil.move(own_data / "pg_wal", wal)
    (own_data / "pg_wal").symlink_to(wal)
    (wal / "lost+found").mkdir()
    (wal / "notes.txt").write_text("somebody's", encoding="utf-8")
    assert list(wal.glob("0*"))
    changed = restored(history.storage, data=own_data, backup="first", **IN_PLACE)
    assert (own_data / "pg_wal").readlink() == wal
    assert sorted(path.name for path in wal.iterdir() if path.is_file()) == ["notes.txt"]
    assert (wal / "lost+found").is_dir() and (wal / "archive_status").is_dir()
    assert changed.run().phase == "end" and list(wal.glob("0*"))
    _refused(history.storage, own_data, "server_running", pg_wal_directory=str(tmp_path / "elsewhere"))
    changed.server.stop()
    _refused(history.storage, own_data, "delta_pg_wal", pg_wal_directory=str(tmp_path / "elsewhere"))


def test_empty_directory_is_a_fresh_restore(history: History, restored: Restore, tmp_path: Path) -> None:
    data = tmp_path / "new" / "data"
    cluster = restored(history.storage, data=data, delta=True)
    assert any("everything is written" in note for note in cluster.plan.notes)
    assert not cluster.plan.in_place
    assert cluster.result.delta is None
    assert cluster.run().phase == "end"


def test_mount_point_can_be_changed_in_place(history: History, own_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == str(own_data))
    with pytest.raises(RefusedError, match="in place with delta"):
        history.storage.plan(own_data, force=True)
    assert history.storage.plan(own_data, **IN_PLACE).in_place


# --- what is refused


def test_plan_says_what_is_lost(history: History, own_data: Path) -> None:
    (own_data / "pg_wal" / "archive_status" / "000000010000000000000099.ready").touch()
    (own_data / "pg_tblspc" / "4711").symlink_to("/nowhere")
    notes = " ".join(history.storage.plan(own_data, **IN_PLACE).notes)
    assert "there is no undo" in notes
    assert "1 segments in its pg_wal are finished and not archived" in notes
    assert "the tablespace in /nowhere is not in the backup" in notes


def test_own_directory_without_force_is_refused(history: History, own_data: Path) -> None:
    message = _refused(history.storage, own_data, "directory_not_empty", force=False)
    assert "changed in place" in message


def test_foreign_directory_is_refused(history: History, stranger: Path, tmp_path: Path) -> None:
    data = tmp_path / "stranger" / "data"
    shutil.copytree(stranger, data)
    _refused(history.storage, data, "directory_foreign")
    # Neither does a marker make it ours, nor one of another cluster's restore.
    (data / MARKER).write_text('{"delta": {}, "system_identifier": "1"}', encoding="ascii")
    _refused(history.storage, data, "directory_foreign")
    (data / "global" / "pg_control").unlink()
    _refused(history.storage, data, "directory_foreign")


def test_running_server_is_refused(history: History, own_data: Path, server: Callable[[Path], Server]) -> None:
    running = server(own_data)
    running.start()
    with pytest.raises(RefusedError, match="server is running"):
        history.storage.plan(own_data, **IN_PLACE)
    assert running.phase == "end"


def test_server_that_starts_after_the_plan_is_refused(
    history: History, own_data: Path, server: Callable[[Path], Server]
) -> None:
    engine = Engine(history.storage.request(own_data, **IN_PLACE))
    plan = engine.plan()
    running = server(own_data)
    running.start()
    with pytest.raises(PitrError, match=r"was started .* Nothing was touched"):
        engine.execute(plan)
    running.stop()
    running.start()
    assert running.phase == "end"


def test_two_at_a_time_are_refused(history: History, own_data: Path) -> None:
    engine = Engine(history.storage.request(own_data, **IN_PLACE))
    plan = engine.plan()
    before = fingerprint(own_data)
    with delta.exclusive(str(own_data)), pytest.raises(PitrError, match="Another restore"):
        engine.execute(plan)
    assert fingerprint(own_data) == before


def test_incremental_backup_is_refused(history: History, broken: Storage, own_data: Path) -> None:
    path = broken.backups / "third" / "backup.json"
    description = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**description, "type": "incremental", "parent": "second"}), encoding="utf-8")
    message = _refused(broken, own_data, "delta_incremental", backup="third")
    assert "begin with the full backup second" in message


def test_backup_with_wal_of_its_own_is_refused(history: History, broken: Storage, own_data: Path) -> None:
    path = broken.backups / "third" / "backup.json"
    description = json.loads(path.read_text(encoding="utf-8"))
    name = broken.segments()[-1].name
    path.write_text(json.dumps({**description, "method": "offline", "own_wal": [name]}), encoding="utf-8")
    assert "taken offline" in _refused(broken, own_data, "delta_offline", backup="third")


def test_pg_wal_that_is_changed_is_no_source_of_wal(history: History, own_data: Path, restored: Restore) -> None:
    """It is emptied before its segments would be copied."""
    message = _refused(history.storage, own_data, "dead_pg_wal", dead_pg_wal=str(own_data / "pg_wal"))
    assert "changes in place" in message
    plan = history.storage.plan(own_data, **{**IN_PLACE, "dead_pg_wal": "auto"})
    assert plan.from_pg_wal == () and plan.in_place


def test_damaged_manifest_is_refused_before_anything_is_touched(
    history: History, broken: Storage, own_data: Path
) -> None:
    path = broken.backups / "third" / "backup_manifest"
    flip(path, path.stat().st_size // 2)
    before = fingerprint(own_data)
    engine = Engine(broken.request(own_data, **IN_PLACE))
    plan = engine.plan()
    with pytest.raises(PitrError, match="backup_manifest is not the file"):
        engine.execute(plan)
    assert fingerprint(own_data) == before


# --- what fails or is killed half-way


def test_failed_delta_cannot_start_and_can_be_repeated(
    history: History, broken: Storage, own_data: Path, restored: Restore, bin_dir: str
) -> None:
    stored = _base_tar(broken, "first")
    whole = stored.read_bytes()
    stored.write_bytes(bytes(len(whole)))
    engine = Engine(broken.request(own_data, backup="first", **IN_PLACE))
    plan = engine.plan()
    with pytest.raises(PitrError, match="half done, and no server can start"):
        engine.execute(plan)
    assert (own_data / MARKER).exists()
    assert not (own_data / "global" / "pg_control").exists()
    assert refuses_to_start(bin_dir, own_data)
    # Without delta it is somebody's directory, and not to be removed.
    before = fingerprint(own_data)
    with pytest.raises(RefusedError, match="has left half-way") as caught:
        broken.plan(own_data, backup="first")
    assert [item.code for item in caught.value.refusals] == ["directory_not_empty"]
    assert fingerprint(own_data) == before
    stored.write_bytes(whole)
    # The marker is enough; force was given when it began.
    assert restored(broken, data=own_data, backup="first", delta=True).run().phase == "end"


def test_half_done_directory_is_moved_aside_without_delta(
    history: History, own_data: Path, restored: Restore, bin_dir: str
) -> None:
    request = history.storage.request(own_data, backup="first", **IN_PLACE)
    assert in_child(request, below=f"{own_data}/global/pg_control.pitr").returncode == -signal.SIGKILL
    assert (own_data / MARKER).exists()
    assert not (own_data / "global" / "pg_control").exists()
    assert refuses_to_start(bin_dir, own_data)
    before = _files(own_data)
    cluster = restored(history.storage, data=own_data, force=True)
    aside = Path(cluster.result.moved_aside)
    assert _files(aside) == before
    assert cluster.run().phase == "end"


def test_killed_fresh_restore_is_continued(history: History, own_data: Path, restored: Restore) -> None:
    request = history.storage.request(own_data, force=True)
    assert in_child(request, at=150).returncode == -signal.SIGKILL
    there = [path for path in (own_data / "base").rglob("*") if path.is_file()]
    assert there
    cluster = restored(history.storage, data=own_data, delta=True)
    assert cluster.result.delta is not None
    assert cluster.result.delta.kept > 0
    # The old directory is still known.
    assert (Path(cluster.result.moved_aside) / "PG_VERSION").exists()
    assert cluster.run().phase == "end"


def test_settings_that_have_no_effect_leave_a_directory_that_does_not_start(
    history: History, own_data: Path, tmp_path: Path, bin_dir: str, restored: Restore
) -> None:
    config = tmp_path / "etc"
    config.mkdir()
    shutil.copy(own_data / "postgresql.conf", config / "postgresql.conf")
    with open(config / "postgresql.conf", "a", encoding="utf-8") as stream:
        stream.write(f"data_directory = '{own_data}'\ninclude_dir = 'conf.d'\nrestore_command = 'false'\n")
    engine = Engine(history.storage.request(own_data, config_dir=str(config), keep_out=False, **IN_PLACE))
    plan = engine.plan()
    with pytest.raises(PitrError, match="restore_command has no effect"):
        engine.execute(plan)
    assert (own_data / MARKER).exists()
    assert refuses_to_start(bin_dir, own_data)
    assert not (config / "conf.d" / "99-pitr-recovery.conf").exists()
    assert restored(history.storage, data=own_data, delta=True).run().phase == "end"


# --- tablespaces


def _with_tablespaces(make: MakeSandbox, place: Path) -> Sandbox:
    """A stopped primary with the tablespace ``far``, a backup ``only``, and then ``later``, archived."""
    primary = make()
    for name in ("far", "later"):
        (place / name).mkdir(parents=True, mode=0o700)
    primary.server.sql(f"CREATE TABLESPACE far LOCATION '{place / 'far'}'")
    primary.server.sql("CREATE TABLE far TABLESPACE far AS SELECT 1 AS v")
    primary.backup("only")
    primary.server.sql("INSERT INTO far VALUES (2)")
    primary.server.sql("CREATE TABLE far2 TABLESPACE far AS SELECT 3 AS v")
    before = primary.commit("after")
    primary.server.sql(f"CREATE TABLESPACE later LOCATION '{place / 'later'}'")
    primary.server.sql("CREATE TABLE late TABLESPACE later AS SELECT generate_series(1, 5000) AS v")
    primary.commit("too late")
    primary.probe()
    primary.server.stop()
    primary.until = before  # type: ignore[attr-defined]
    return primary


def test_tablespaces_are_changed_in_place(sandbox: MakeSandbox, restored: Restore, tmp_path: Path) -> None:
    place = tmp_path / "places"
    primary = _with_tablespaces(sandbox, place)
    data = primary.server.data
    # What others have there: another version's server, a file of somebody, a directory with almost the name.
    (place / "far" / "PG_9_1").mkdir()
    (place / "far" / "PG_9_1" / "theirs").touch()
    (place / "far" / "thesis.odt").touch()
    (place / "later" / "thesis.odt").touch()
    version = next(path for path in (place / "far").iterdir() if re.fullmatch(r"PG_1\d_\d+", path.name))
    table = max(version.rglob("[0-9]*"), key=lambda path: path.is_file() and path.stat().st_mtime_ns)
    (version / "4711").mkdir()
    (version / "4711" / "1").write_bytes(b"of a database that is not in the backup")
    target = {"recovery_target_xid": str(primary.until.xid)}  # type: ignore[attr-defined]
    cluster = restored(primary, target, data=data, **IN_PLACE)
    assert any("later is not in the backup" in note for note in cluster.plan.notes)
    assert (place / "far" / "PG_9_1" / "theirs").exists()
    assert (place / "far" / "thesis.odt").exists()
    assert [path.name for path in (place / "later").iterdir()] == ["thesis.odt"]
    assert not (version / "4711").exists()
    assert table.parent.parent == version or table.parent == version
    assert [os.readlink(link) for link in (data / "pg_tblspc").iterdir()] == [str(place / "far")]
    cluster.run()
    assert cluster.phase == "after"
    assert [row[0] for row in cluster.server.sql("SELECT v FROM far ORDER BY v")] == [1, 2]
    assert cluster.server.value("SELECT v FROM far2") == 3


def test_tablespace_that_a_running_server_uses_is_refused(
    sandbox: MakeSandbox, tmp_path: Path, server: Callable[[Path], Server]
) -> None:
    place = tmp_path / "places"
    primary = _with_tablespaces(sandbox, place)
    copy = tmp_path / "copy" / "data"
    shutil.copytree(primary.server.data, copy, symlinks=True)
    original = server(primary.server.data)
    original.start()
    with pytest.raises(RefusedError) as caught:
        primary.plan(copy, **IN_PLACE)
    assert [item.code for item in caught.value.refusals] == ["tablespace_in_use"]
    assert str(primary.server.data) in caught.value.message
    assert original.value("SELECT count(*) FROM far") == 2
    original.stop()
    assert primary.plan(copy, **IN_PLACE).in_place


def test_tablespace_that_moves_keeps_its_old_files_and_wants_an_empty_place(
    sandbox: MakeSandbox, restored: Restore, tmp_path: Path
) -> None:
    place = tmp_path / "places"
    primary = _with_tablespaces(sandbox, place)
    data = primary.server.data
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.odt").touch()
    mapping = {str(place / "far"): str(other)}
    _refused(primary, data, "tablespace_not_empty", tablespace_mapping=mapping)
    (other / "thesis.odt").unlink()
    before = fingerprint(place / "far")
    target = {"recovery_target_xid": str(primary.until.xid)}  # type: ignore[attr-defined]
    cluster = restored(primary, target, data=data, tablespace_mapping=mapping, **IN_PLACE).run()
    assert fingerprint(place / "far") == before
    assert [row[0] for row in cluster.server.sql("SELECT v FROM far ORDER BY v")] == [1, 2]
