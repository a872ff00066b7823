# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Base backups: refused when they could not be restored, invisible until they are complete, restorable in every
compression."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils.codec import which
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.plugins.module_utils.info import backup_info
from ansible_collections.pgdrill.pitr.plugins.module_utils.stored import stored_backups
from ansible_collections.pgdrill.pitr.tests.integration.support import (
    CLUSTER,
    Restored,
    Sandbox,
    Storage,
    fingerprint,
    until,
)

if TYPE_CHECKING:
    from ansible_collections.pgdrill.pitr.tests.integration.conftest import History

Restore = Callable[..., Restored]
MakeSandbox = Callable[..., Sandbox]


def _visible(storage: Storage) -> list[str]:
    return [backup.label for backup in stored_backups(storage.folder)]


def _refused(primary: Sandbox, match: str, **options: Any) -> None:
    before = fingerprint(primary.backups)
    with pytest.raises(PitrError, match=match):
        primary.backup(**options)
    assert fingerprint(primary.backups) == before


@pytest.mark.parametrize("compression", ["none", "gzip", "gzip:9", "lz4", "zstd", "zstd:3", "auto"])
def test_backup_of_every_compression_can_be_restored(sandbox: MakeSandbox, restored: Restore, compression: str) -> None:
    primary = sandbox()
    name = compression.partition(":")[0]
    offered = primary.server.value("SELECT enumvals::text FROM pg_settings WHERE name = 'wal_compression'")
    if name in ("lz4", "zstd") and (name not in offered or not which(name)):
        pytest.skip(f"this server is built without {name}")
    primary.commit("in it")
    backup = primary.backup("only", compression=compression)
    assert compression == "auto" or backup.compression == name
    assert backup.verified in ("checksums", "sizes")
    assert backup.stored_bytes == sum(path.stat().st_size for path in (primary.backups / "only").iterdir()) - (
        (primary.backups / "only" / "backup.json").stat().st_size
    )
    primary.probe()
    primary.server.stop()
    assert restored(primary, {"recovery_target": "immediate"}).run().phase == "in it"


def test_backup_says_what_it_is(history: History, major: int) -> None:
    backups = stored_backups(history.storage.folder)
    assert [backup.label for backup in backups] == ["first", "second", "third"]
    for backup in backups:
        assert backup == history.backups[backup.label]
        assert backup.postgresql_version == major
        assert backup.start_lsn < backup.stop_lsn
        assert backup.started_at < backup.stopped_at
    # The end of a backup lies before everything that was written after it, and its next xid too.
    for label in ("first", "second", "third"):
        backup, commit = history.backups[label], history.commit(f"{label} 1")
        assert backup.stopped_at < commit.time
        assert backup.stop_lsn < commit.start
        assert backup.next_xid is not None and backup.next_xid <= commit.xid


def test_archive_mode_off_is_refused(sandbox: MakeSandbox) -> None:
    primary = sandbox(settings={"archive_mode": "off"})
    _refused(primary, "archive_mode = off")


def test_other_cluster_is_refused(sandbox: MakeSandbox, stranger: Path, bin_dir: str, tmp_path: Path) -> None:
    primary = sandbox(start=False)
    other = Sandbox(bin_dir, tmp_path / "other", stranger)
    try:
        other.server.start()
        other.repository = primary.repository
        _refused(other, "belongs to the cluster with system identifier")
    finally:
        other.server.close()


def test_programs_older_than_the_server_are_refused(sandbox: MakeSandbox, other_bin_dir: str, major: int) -> None:
    primary = sandbox()
    if int(Path(other_bin_dir).parent.name) > major:
        pytest.skip("the other PostgreSQL is newer")
    primary.bin_dir = other_bin_dir
    _refused(primary, "Use its own programs")


@pytest.mark.parametrize("label", ["../escape", ".hidden", "a/b", "", "ü"])
def test_label_that_is_no_name_of_a_directory_is_refused(sandbox: MakeSandbox, label: str) -> None:
    primary = sandbox()
    if not label:
        # Without a label the backup is called after its start.
        assert primary.backup(label).label.endswith("-full")
        return
    _refused(primary, "cannot be a label", label=label)


def test_label_that_exists_is_refused(sandbox: MakeSandbox) -> None:
    primary = sandbox()
    primary.backup("only")
    _refused(primary, "There is a backup 'only' already", label="only")


def test_two_backups_in_one_second_have_two_names(sandbox: MakeSandbox) -> None:
    primary = sandbox()
    labels: list[str] = []
    threads = [threading.Thread(target=lambda: labels.append(primary.backup().label)) for _number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(labels)) == 2
    assert sorted(_visible(primary)) == sorted(labels)


def test_two_backups_of_one_label_at_once_do_not_harm_each_other(sandbox: MakeSandbox, restored: Restore) -> None:
    primary = sandbox()
    errors: list[str] = []

    def take() -> None:
        try:
            primary.backup("same", compression="gzip")
        except PitrError as error:
            errors.append(error.message)

    threads = [threading.Thread(target=take) for _number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 1
    assert _visible(primary) == ["same"]
    primary.server.stop()
    restored(primary, {"recovery_target": "immediate"}).run()


def test_archiver_that_is_stuck_ends_the_backup_by_name(sandbox: MakeSandbox) -> None:
    primary = sandbox(settings={"archive_command": "echo the disk is on fire >&2; false"})
    before = fingerprint(primary.backups)
    started = time.monotonic()
    from ansible_collections.pgdrill.pitr.plugins.module_utils.backup import BaseBackup

    with pytest.raises(PitrError, match="has not archived the backup's WAL within 2 seconds"):
        BaseBackup(primary.folder, primary.server.login, primary.bin_dir, archive_timeout=2).take()
    assert time.monotonic() - started < 25
    assert fingerprint(primary.backups) == before
    # The server is not left in a backup either.
    until(lambda: not primary.server.sql("SELECT 1 FROM pg_stat_progress_basebackup"), "the end of the backup")


def test_server_that_archives_elsewhere_is_found_out(sandbox: MakeSandbox) -> None:
    primary = sandbox(settings={"archive_command": "true"})
    before = fingerprint(primary.backups)
    from ansible_collections.pgdrill.pitr.plugins.module_utils.backup import BaseBackup

    with pytest.raises(PitrError, match="archives somewhere else"):
        BaseBackup(primary.folder, primary.server.login, primary.bin_dir, archive_timeout=1).take()
    assert fingerprint(primary.backups) == before


_CHILD = """
import sys
from ansible_collections.pgdrill.pitr.plugins.module_utils.backup import BaseBackup
from ansible_collections.pgdrill.pitr.plugins.module_utils.postgres import Login
from ansible_collections.pgdrill.pitr.plugins.module_utils.repository import ClusterFolder
repository, cluster, socket, bin_dir = sys.argv[1:]
login = Login(unix_socket=socket, port=5432)
BaseBackup(ClusterFolder.open(repository, cluster), login, bin_dir, label="killed", max_rate="1M").take()
"""


def test_killed_backup_is_never_visible_and_its_name_can_be_used_again(sandbox: MakeSandbox, restored: Restore) -> None:
    primary = sandbox()
    argv = [sys.executable, "-c", _CHILD, str(primary.repository), CLUSTER, primary.server.socket, primary.bin_dir]
    # A session of its own, so that what the kill leaves behind can be found and ended.
    child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        until(lambda: any(path.stat().st_size for path in primary.backups.glob(".*/base.tar*")), "the copy")
        child.kill()
        child.wait()
        assert _visible(primary) == []
        assert backup_info(primary.folder)["backups"] == []
        with pytest.raises(PitrError, match="no base backup"):
            primary.plan(primary.directory / "none")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
    until(lambda: not primary.server.sql("SELECT 1 FROM pg_stat_replication"), "the end of the copy")
    primary.commit("in it")
    primary.backup("killed")
    assert _visible(primary) == ["killed"]
    primary.server.stop()
    assert restored(primary, {"recovery_target": "immediate"}).run().phase == "in it"


def test_server_that_dies_meanwhile_leaves_no_backup(sandbox: MakeSandbox) -> None:
    primary = sandbox()
    before = fingerprint(primary.backups)
    errors: list[Exception] = []

    def take() -> None:
        try:
            primary.backup(max_rate="1M")
        except PitrError as error:
            errors.append(error)

    thread = threading.Thread(target=take)
    thread.start()
    until(lambda: list(primary.backups.glob(".*/base.tar*")), "the copy")
    primary.server.stop("immediate")
    thread.join(timeout=60)
    assert len(errors) == 1, errors
    assert fingerprint(primary.backups) == before


def test_cluster_that_was_promoted_before_it_archived_here_can_be_restored(
    sandbox: MakeSandbox, restored: Restore
) -> None:
    """Its archiver will never hand over the history file, and without it no server follows the timeline."""
    primary = sandbox(start=False)
    # Promoted elsewhere, long ago.
    primary.configure({"archive_mode": "off"})
    (primary.server.data / "standby.signal").touch()
    primary.server.start()
    assert primary.server.value("SELECT pg_promote()")
    primary.configure({"archive_mode": "on"})
    primary.server.restart()
    backup = primary.backup("only")
    assert backup.timeline == 2
    assert not list((primary.server.data / "pg_wal" / "archive_status").glob("00000002.history*"))
    own = (primary.server.data / "pg_wal" / "00000002.history").read_bytes()
    assert (primary.archive / "00000002.history").read_bytes() == own
    primary.commit("after")
    primary.probe()
    primary.server.stop()
    cluster = restored(primary).run()
    assert cluster.plan.timeline == 2
    assert cluster.phase == "after"
