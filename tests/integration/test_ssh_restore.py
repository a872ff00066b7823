# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A real server whose repository is behind a real sshd: archiving, the plan, the restore, the faults."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils.boundary import open_cluster
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.plugins.module_utils.info import archive_info, backup_info
from ansible_collections.pgdrill.pitr.plugins.module_utils.plan import RefusedError
from ansible_collections.pgdrill.pitr.plugins.module_utils.postgres import shell_command
from ansible_collections.pgdrill.pitr.plugins.module_utils.probe import Probe
from ansible_collections.pgdrill.pitr.plugins.module_utils.repository import ClusterFolder
from ansible_collections.pgdrill.pitr.tests.integration.ssh_support import Access, Sshd, private_place
from ansible_collections.pgdrill.pitr.tests.integration.support import (
    CLUSTER,
    PATIENCE,
    Restored,
    Sandbox,
    Server,
    fingerprint,
    until,
)


@pytest.fixture
def remote(
    sandbox: Callable[..., Sandbox], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Sandbox, Access]]:
    """A running primary that archives over ssh, and how its repository is reached."""
    primary = sandbox(start=False)
    with private_place(monkeypatch):
        access = Access(Sshd(tmp_path / "sshd"), primary.repository, tmp_path)
        access.sshd.start()
        command = shell_command([str(access.client / "pitr-wal"), "push", CLUSTER], ["%p"])
        primary.configure({"archive_command": command})
        primary.server.start()
        yield primary, access
        access.sshd.stop()


def far(access: Access, **more: Any) -> dict[str, Any]:
    """What a restore is told when the repository is on another host."""
    return {
        "repository": access.url(),
        "wal_command": str(access.client / "pitr-wal"),
        "ssh": {name: value for name, value in access.ssh().items() if name.startswith("ssh_")},
        **more,
    }


def dump(server: Server) -> str:
    """Everything that the cluster holds."""
    made = server.program("pg_dumpall", "-h", server.socket, "-p", str(server.PORT), "-U", "postgres")
    assert made.returncode == 0, made.stderr
    return "".join(line for line in made.stdout.splitlines(True) if not line.startswith(("\\restrict", "\\unrestrict")))


def test_cluster_is_archived_and_restored_identically_over_ssh(
    remote: tuple[Sandbox, Access], restored: Callable[..., Restored]
) -> None:
    primary, access = remote
    primary.backup("b1")
    primary.server.sql("CREATE TABLE numbers AS SELECT n, md5(n::text) FROM generate_series(1, 20000) n")
    primary.fill(6)
    primary.commit("last")
    folder = ClusterFolder.open(access.url(), CLUSTER, access.ssh(access.writer))
    probed = Probe(primary.server.login, folder, PATIENCE).switch_and_wait()
    assert probed.compared
    truth = dump(primary.server)
    copy = restored(primary, **far(access)).run()
    assert copy.phase == "last" and dump(copy.server) == truth
    # One for each key and each process that outlives a connection, not one for each segment.
    assert access.sshd.logins <= 4 < len(primary.segments())


def test_modules_see_over_ssh_what_they_see_in_the_directory(remote: tuple[Sandbox, Access]) -> None:
    primary, access = remote
    primary.backup("b1")
    primary.fill(2)
    primary.probe()
    far_away = open_cluster({"repository": access.url(), "cluster": CLUSTER, **access.ssh()})
    here = primary.folder
    assert backup_info(far_away) == backup_info(here)
    # How large a million files are is not asked for over a network.
    assert archive_info(far_away, primary.bin_dir) == archive_info(here, primary.bin_dir, sizes=False)


def test_repository_host_that_is_gone_ends_recovery_without_promotion_and_it_goes_on_later(
    remote: tuple[Sandbox, Access], restored: Callable[..., Restored]
) -> None:
    primary, access = remote
    primary.backup("b1")
    primary.fill(4)
    primary.commit("last")
    primary.probe()
    copy = restored(primary, **far(access))
    access.sshd.stop()
    copy.server.start(wait=False)
    until(lambda: not copy.server.is_running, "the server has given up")
    log = copy.server.log_text()
    assert "cannot be reached" in log and "selected new timeline" not in log
    assert "database system is ready to accept connections" not in log
    access.sshd.start()
    assert copy.run().phase == "last"


def test_repository_host_that_is_gone_delays_archiving_and_loses_nothing(remote: tuple[Sandbox, Access]) -> None:
    primary, access = remote
    primary.probe()
    archiver = primary.server.value("SELECT pid FROM pg_stat_activity WHERE backend_type = 'archiver'")
    access.sshd.stop()
    primary.fill(1)
    until(lambda: primary.server.value("SELECT failed_count FROM pg_stat_archiver") > 0, "archiving has failed")
    assert "cannot be reached" in primary.server.log_text()
    assert primary.server.value("SELECT pid FROM pg_stat_activity WHERE backend_type = 'archiver'") == archiver
    access.sshd.start()
    primary.probe()


def test_restore_with_a_wrong_key_is_refused_in_the_plan(remote: tuple[Sandbox, Access], tmp_path: Path) -> None:
    primary, access = remote
    primary.backup("b1")
    data = tmp_path / "restored"
    data.mkdir()
    before = fingerprint(data)
    for key, says in ((access.writer, "only adds WAL"), (access.sshd.key("stranger"), "does not accept our key")):
        with pytest.raises((RefusedError, PitrError), match=says):
            primary.plan(data, **far(access, ssh=access.ssh(key)))
    assert fingerprint(data) == before


def test_old_primary_that_is_restored_over_ssh_archives_again_when_it_is_accepted(
    remote: tuple[Sandbox, Access], restored: Callable[..., Restored]
) -> None:
    primary, access = remote
    primary.backup("b1")
    primary.commit("last")
    primary.probe()
    primary.server.stop()
    shutil.rmtree(primary.server.data)
    copy = restored(primary, **far(access, archive_after="none-until-promoted")).run()
    assert copy.phase == "last"
    copy.recovery.accept()
    until(lambda: any(primary.archive.glob("00000002*/" + "?" * 24)) or switched(copy.server), "the new timeline")
    assert (primary.archive / "00000002.history").exists()


def switched(server: Server) -> bool:
    """Give the archiver something to do; never a reason to stop waiting."""
    server.sql("SELECT pg_logical_emit_message(true, 'tests', 'x')")
    server.sql("SELECT pg_switch_wal()")
    return False
