# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Expire beside backups, restores and recoveries of real servers: what stays can be restored, what is used stays."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils import extract, locks
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.plugins.module_utils.expire import Expiry, floors
from ansible_collections.pgdrill.pitr.plugins.module_utils.index import scan
from ansible_collections.pgdrill.pitr.plugins.module_utils.restore import Restore as Engine
from ansible_collections.pgdrill.pitr.plugins.module_utils.retention import Policy
from ansible_collections.pgdrill.pitr.plugins.module_utils.stored import stored_backups
from ansible_collections.pgdrill.pitr.tests.integration.support import (
    SEGMENT_SIZE,
    Restored,
    Sandbox,
    Storage,
    cut,
    fingerprint,
)

if TYPE_CHECKING:
    from ansible_collections.pgdrill.pitr.tests.integration.conftest import History

Restore = Callable[..., Restored]
KEEP_ONE = Policy(keep_full=1)


@pytest.fixture
def own(history: History, tmp_path: Path) -> Storage:
    """A copy of the shared repository to expire, without the claims of other tests' recoveries."""
    storage = history.storage.copy(tmp_path / "own")
    for lease in Path(storage.folder.locks_path).glob("lease-*"):
        lease.unlink()
    return storage


def labels(storage: Storage) -> list[str]:
    return [backup.label for backup in stored_backups(storage.folder)]


def expire(storage: Storage, policy: Policy = KEEP_ONE) -> dict[str, Any]:
    return Expiry(storage.folder, policy).run()


def first_segment(storage: Storage) -> int:
    return scan(storage.folder).ranges(1)[0][0]


def test_kept_backup_restores_to_every_target_and_expired_wal_is_gone(
    own: Storage, history: History, restored: Restore
) -> None:
    result = expire(own, Policy(keep_full=2))
    assert labels(own) == ["second", "third"]
    assert first_segment(own) == history.backups["second"].start_lsn // SEGMENT_SIZE
    assert result["expired_segments"]["count"] > 0
    commit = history.commit("second 2")
    target = {"recovery_target_lsn": str(commit.end), "recovery_target_inclusive": False}
    cluster = restored(own, target).run()
    assert cluster.plan.backup.label == "second" and cluster.phase == "second 2"
    assert restored(own).run().phase == "end"


def test_backup_that_is_being_restored_stays_until_it_is_read(
    own: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = own.request(tmp_path / "new", backup="first")
    engine = Engine(request)
    plan = engine.plan()
    verify = extract.verify
    seen: list[list[str]] = []

    def while_reading(*arguments: Any) -> None:
        # The lease alone would do; the lock has to do without it, too.
        for lease in Path(own.folder.locks_path).glob("lease-*"):
            lease.unlink()
        expire(own)
        seen.append(labels(own))
        verify(*arguments)

    monkeypatch.setattr(extract, "verify", while_reading)
    engine.execute(plan)
    assert seen == [["first", "third"]]
    assert first_segment(own) == plan.backup.start_lsn // SEGMENT_SIZE


def test_recovery_that_replays_keeps_its_backup_and_its_wal(own: Storage, restored: Restore) -> None:
    cluster = restored(own, backup="first")
    (lease,) = Path(own.folder.locks_path).glob("lease-first-*")
    expire(own)
    assert labels(own) == ["first", "third"]
    # As good as over: every call of get renews it.
    old = time.time() - locks.LEASE_SECONDS + 60
    os.utime(lease, (old, old))
    assert cluster.run().phase == "end"
    assert lease.stat().st_mtime > old + 30
    expire(own)
    assert labels(own) == ["first", "third"]
    os.utime(lease, (old - 120, old - 120))
    expire(own)
    assert labels(own) == ["third"]


def test_failed_restore_leaves_no_lease(own: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: Any) -> None:
        raise PitrError("no")

    monkeypatch.setattr(extract, "verify", fail)
    engine = Engine(own.request(tmp_path / "new"))
    plan = engine.plan()
    with pytest.raises(PitrError, match="no"):
        engine.execute(plan)
    assert locks.leases(own.folder) == {}


def test_restore_of_a_backup_that_was_expired_since_its_plan_touches_nothing(own: Storage, tmp_path: Path) -> None:
    engine = Engine(own.request(tmp_path / "new", backup="first"))
    plan = engine.plan()
    expire(own)
    with pytest.raises(PitrError, match=r"first was removed by an expire.*Nothing was touched"):
        engine.execute(plan)
    assert not (tmp_path / "new").exists()


def test_repository_that_may_only_be_read_is_restored_from(own: Storage, restored: Restore) -> None:
    shutil.rmtree(own.folder.locks_path)
    os.chmod(own.folder.path, 0o500)
    try:
        assert restored(own).run().phase == "end"
    finally:
        os.chmod(own.folder.path, 0o700)
    assert not os.path.exists(own.folder.locks_path)


def test_backup_that_is_being_taken_is_not_harmed(sandbox: Callable[..., Sandbox], restored: Restore) -> None:
    primary = sandbox()
    for number in (1, 2):
        primary.commit(f"phase {number}")
        primary.backup(f"b{number}")
        primary.fill(2)
    failures: list[BaseException] = []

    def take() -> None:
        try:
            primary.backup("slow", max_rate="4M")
        except BaseException as error:
            failures.append(error)

    worker = threading.Thread(target=take)
    worker.start()
    runs = during = 0
    while worker.is_alive():
        during += bool(floors(primary.folder)[0])
        expire(primary)
        runs += 1
        primary.fill(1)
    worker.join()
    assert not failures and runs >= 2 and during >= 1
    assert labels(primary)[-1] == "slow"
    expire(primary)
    assert labels(primary) == ["slow"]
    primary.commit("after")
    primary.probe()
    primary.server.stop()
    assert restored(primary).run().phase == "after"


def test_backup_that_cannot_be_removed_stops_the_removal_of_wal(own: Storage) -> None:
    stuck = own.backups / "first"
    os.chmod(stuck, 0o500)
    wal = fingerprint(own.archive)
    with pytest.raises(PitrError, match=r"Permission denied.*No WAL was removed") as caught:
        expire(own)
    assert caught.value.detail["removed"] == ["second"]
    assert fingerprint(own.archive) == wal and labels(own) == ["third"]
    os.chmod(own.backups / ".first.expired", 0o700)
    assert expire(own)["leftovers"] == [".first.expired"]
    assert fingerprint(own.archive) != wal


def test_last_restorable_backup_stays_when_the_newest_is_damaged(own: Storage, restored: Restore) -> None:
    for label in ("second", "third"):
        cut(next((own.backups / label).glob("base.tar*")))
    expire(own)
    assert labels(own) == ["first", "second", "third"]
    cluster = restored(own).run()
    assert cluster.plan.backup.label == "first" and cluster.phase == "end"


_KILLED = """
import os, signal, sys
from ansible_collections.pgdrill.pitr.plugins.module_utils.expire import Expiry
from ansible_collections.pgdrill.pitr.plugins.module_utils.repository import ClusterFolder
from ansible_collections.pgdrill.pitr.plugins.module_utils.retention import Policy
count, last = 0, int(sys.argv[2])

def hook(event, arguments):
    global count
    if event in ("os.rename", "os.remove", "os.rmdir"):
        count += 1
        if count == last:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(hook)
Expiry(ClusterFolder.open(sys.argv[1], "main"), Policy(keep_full=2)).run()
"""


def test_every_backup_that_is_visible_after_a_kill_restores(
    history: History, tmp_path: Path, restored: Restore
) -> None:
    code = -signal.SIGKILL
    # The rename, one file each, between backup and WAL, in the WAL: a moment of each kind, and beyond the end.
    for last in (1, 2, 4, 6, 7, 9, 99):
        own = history.storage.copy(tmp_path / f"own{last}")
        argv = [sys.executable, "-c", _KILLED, str(own.repository), str(last)]
        code = subprocess.run(argv, stdin=subprocess.DEVNULL, check=False).returncode
        assert code == (0 if last == 99 else -signal.SIGKILL)
        visible = labels(own)
        assert visible[-2:] == ["second", "third"]
        cluster = restored(own, {"recovery_target": "immediate"}, backup=visible[0], data=tmp_path / f"data{last}")
        cluster.run()
        cluster.server.stop("immediate")
        expire(own, Policy(keep_full=2))
    assert code == 0
