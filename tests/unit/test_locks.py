# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Locks that die with their holder, and leases that age."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils import locks
from ansible_collections.pgdrill.pitr.plugins.module_utils.archive import Absent, get
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.plugins.module_utils.expire import floors
from ansible_collections.pgdrill.pitr.plugins.module_utils.repository import ClusterFolder
from ansible_collections.pgdrill.pitr.plugins.module_utils.retention import Floor
from ansible_collections.pgdrill.pitr.plugins.module_utils.wal import Lsn
from ansible_collections.pgdrill.pitr.tests.unit.support import CLUSTER, make_repository, wal_name

_HOLDER = """
import sys
from ansible_collections.pgdrill.pitr.plugins.module_utils import locks
from ansible_collections.pgdrill.pitr.plugins.module_utils.repository import ClusterFolder
with locks.{lock}:
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(folder: ClusterFolder, lock: str) -> subprocess.Popen[bytes]:
    """A process that holds a lock until it is killed."""
    opened = f"ClusterFolder.open({folder.repository!r}, {folder.name!r})"
    argv = [sys.executable, "-c", _HOLDER.format(lock=lock.replace("FOLDER", opened))]
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    return process


def kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()


@pytest.fixture
def folder(tmp_path: Path) -> ClusterFolder:
    return make_repository(tmp_path / "a repository")


def test_backup_that_is_read_cannot_be_removed_until_its_reader_dies(folder: ClusterFolder) -> None:
    readers = [holder(folder, "reading(FOLDER, 'b1')") for _number in range(2)]
    for reader in readers:
        with pytest.raises(locks.InUseError), locks.exclusive_use(folder, "b1"):
            pass
        kill(reader)
    with locks.exclusive_use(folder, "b1"):
        with pytest.raises(locks.InUseError), locks.reading(folder, "b1"):
            pass
        with locks.reading(folder, "b2"):
            pass
    with locks.reading(folder, "b1"):
        pass


def test_backup_that_is_being_taken_tells_what_it_needs_until_it_dies(folder: ClusterFolder) -> None:
    assert floors(folder) == ([], [])
    taker = holder(folder, "taking(FOLDER, 'b1', 3, locks.Lsn(4711))")
    assert floors(folder) == ([Floor(3, Lsn(4711), "b1")], [])
    kill(taker)
    assert floors(folder) == ([], [])
    assert os.listdir(folder.locks_path) == []


def test_backup_that_does_not_tell_what_it_needs_is_named(folder: ClusterFolder) -> None:
    with locks.held(folder, "take-b7"):
        assert floors(folder) == ([], ["b7"])


def test_lock_file_that_its_holder_has_removed_meanwhile_is_no_lock(folder: ClusterFolder) -> None:
    with locks.held(folder, locks.EXPIRE):
        os.unlink(Path(folder.locks_path) / locks.EXPIRE)
        with locks.held(folder, locks.EXPIRE) as descriptor:
            assert os.fstat(descriptor).st_nlink == 1


def test_lease_holds_for_an_hour_and_one_of_the_future_as_well(folder: ClusterFolder) -> None:
    lease = locks.new_lease("my-own.label")
    folder.touch_lease(lease)
    path = Path(folder.locks_path) / f"lease-{lease}"
    now = path.stat().st_mtime
    for later, expected in ((0, True), (3590, True), (3610, False), (-86400 * 365, True)):
        assert ("my-own.label" in locks.leases(folder, now + later)) is expected
    os.utime(path, (now - 7200, now - 7200))
    folder.touch_lease(lease)
    assert locks.leases(folder)["my-own.label"] == path.name
    locks.forget_stale_leases(folder, time.time() + 7200)
    assert path.exists()
    locks.forget_stale_leases(folder, time.time() + 86500)
    assert not path.exists()


@pytest.mark.parametrize(
    "lease", ["", "x", "../cluster.json-01234567", "a/b-01234567", ".hidden-01234567", "b-0123456G"]
)
def test_lease_with_another_name_is_refused(folder: ClusterFolder, lease: str) -> None:
    with pytest.raises(PitrError, match="not the name of a lease"):
        folder.touch_lease(lease)
    assert not os.path.exists(folder.locks_path)


def test_get_renews_its_lease_and_does_without_where_it_cannot(folder: ClusterFolder, tmp_path: Path) -> None:
    lease = locks.new_lease("b1")
    wanted = (wal_name(1, 3), str(tmp_path / "target"), folder.repository, CLUSTER)
    with pytest.raises(Absent):
        get(*wanted, lease=lease)
    assert "b1" in locks.leases(folder)
    os.unlink(Path(folder.locks_path) / f"lease-{lease}")
    os.rmdir(folder.locks_path)
    Path(folder.locks_path).write_bytes(b"in the way")
    with pytest.raises(Absent):
        get(*wanted, lease=lease)
    with pytest.raises(Absent):
        get(*wanted, lease="no lease at all")
