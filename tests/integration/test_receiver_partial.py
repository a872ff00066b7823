# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A restore that goes on with the receiver's partial segment: only when asked to, and only with the right one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils.archive import push
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.plugins.module_utils.plan import RefusedError
from ansible_collections.pgdrill.pitr.plugins.module_utils.restore import Restore as RestoreWork
from ansible_collections.pgdrill.pitr.plugins.module_utils.spool import spool_path
from ansible_collections.pgdrill.pitr.plugins.module_utils.wal import Lsn
from ansible_collections.pgdrill.pitr.tests.integration.receiving import Receiving
from ansible_collections.pgdrill.pitr.tests.integration.support import (
    CLUSTER,
    SEGMENT_SIZE,
    Commit,
    Restored,
    Sandbox,
    Storage,
    fingerprint,
)

Restore = Callable[..., Restored]


class Burnt:
    """A primary that is gone; its last commits are in the receiver's partial segment and nowhere else."""

    def __init__(self, primary: Sandbox) -> None:
        self.storage: Storage = primary
        primary.backup("only")
        self.archived = primary.commit("archived")
        primary.probe()
        receiving = Receiving(primary, primary.server).start()
        try:
            self.received = primary.commit("received")
            self.later = primary.commit("received later")
            receiving.wait_for(primary.server)
            primary.server.stop("immediate")
        finally:
            receiving.close()
        assert receiving.partial is not None
        self.name = receiving.partial.name[:24]


@pytest.fixture(scope="module")
def burnt(bin_dir: str, template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Burnt]:
    """Shared, read-only."""
    sandbox = Sandbox(bin_dir, tmp_path_factory.mktemp("burnt"), template)
    try:
        sandbox.server.start()
        made = Burnt(sandbox)
        # But for leases, which every restore takes.
        shared = [sandbox.repository / "main" / name for name in ("archive", "backups", "receiver")]
        before = fingerprint(*shared)
        yield made
        assert fingerprint(*shared) == before, "a test has written to what all share"
    finally:
        sandbox.server.close()


@pytest.fixture
def copied(burnt: Burnt, tmp_path: Path) -> Storage:
    """The repository of the burnt primary, for tests that break something."""
    return burnt.storage.copy(tmp_path / "copy")


def spool(storage: Storage) -> Path:
    return Path(spool_path(storage.folder, storage.folder.chapter))


def target(commit: Commit, **more: Any) -> dict[str, Any]:
    return {"recovery_target_time": commit.time_text, **more}


def test_partial_is_replayed_when_asked_for(burnt: Burnt, restored: Restore) -> None:
    result = restored(burnt.storage, use_partial=True)
    assert result.plan.from_receiver == (burnt.name,)
    assert any(burnt.name in note and "receiver" in note for note in result.plan.notes)
    copy = result.server.data / "pg_wal" / burnt.name
    assert copy.read_bytes() == (spool(burnt.storage) / f"{burnt.name}.partial").read_bytes()
    assert copy.stat().st_mode & 0o077 == 0
    result.run()
    assert result.phase == burnt.later.phase
    assert result.plan.at_least is not None and Lsn.parse(result.reached.lsn) > result.plan.at_least


def test_partial_is_only_told_of_when_not_asked_for(burnt: Burnt, restored: Restore) -> None:
    result = restored(burnt.storage)
    assert result.plan.from_receiver == ()
    (note,) = [note for note in result.plan.notes if "receiver" in note]
    assert burnt.name in note and "use_partial" in note
    # How far it reaches: the last record begins behind the last commit.
    assert Lsn.parse(note.split("begins at LSN ")[1].split(";")[0]) > burnt.later.start
    assert not list((result.server.data / "pg_wal").glob("0*"))
    assert result.run().phase == burnt.archived.phase


def test_targets_in_the_partial_are_reached_exactly(burnt: Burnt, restored: Restore) -> None:
    time = restored(burnt.storage, target(burnt.received), use_partial=True)
    assert time.plan.from_receiver == (burnt.name,)
    assert time.run().phase == burnt.received.phase
    lsn = {"recovery_target_lsn": str(burnt.later.start), "recovery_target_inclusive": False}
    assert restored(burnt.storage, lsn, use_partial=True).run().phase == burnt.received.phase
    xid = restored(burnt.storage, {"recovery_target_xid": str(burnt.later.xid)}, use_partial=True)
    assert xid.run().phase == burnt.later.phase


@pytest.mark.parametrize("kind", ["recovery_target_lsn", "recovery_target_xid", "recovery_target_time"])
def test_refused_target_says_that_the_receiver_has_more(burnt: Burnt, tmp_path: Path, kind: str) -> None:
    value = {
        "recovery_target_lsn": str(burnt.later.start),
        "recovery_target_xid": str(burnt.later.xid),
        "recovery_target_time": burnt.received.time_text,
    }[kind]
    with pytest.raises(RefusedError) as caught:
        burnt.storage.plan(tmp_path / "data", {kind: value})
    assert burnt.name in caught.value.refusals[0].nearest and "use_partial" in caught.value.refusals[0].nearest


def test_target_behind_the_partials_last_record_is_refused(burnt: Burnt, tmp_path: Path) -> None:
    number = burnt.later.start.segment_number(SEGMENT_SIZE)
    options = {"recovery_target_lsn": str(Lsn((number + 1) * SEGMENT_SIZE - 8192))}
    with pytest.raises(RefusedError) as caught:
        burnt.storage.plan(tmp_path / "data", options, use_partial=True)
    assert [item.code for item in caught.value.refusals] == ["target_beyond_archive"]
    assert "the receiver" in caught.value.refusals[0].message
    assert not (tmp_path / "data").exists()


def test_target_before_the_partial_does_not_use_it(burnt: Burnt, restored: Restore) -> None:
    for options in ({"recovery_target": "immediate"}, {"recovery_target_xid": str(burnt.archived.xid)}):
        result = restored(burnt.storage, options, use_partial=True)
        assert result.plan.from_receiver == ()
        assert not list((result.server.data / "pg_wal").glob("0*"))


def _patch(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as stream:
        stream.seek(offset)
        stream.write(data)


def _of_another_timeline(storage: Storage, partial: Path) -> None:
    partial.rename(partial.with_name("00000002" + partial.name[8:]))


def _not_the_next_one(storage: Storage, partial: Path) -> None:
    last = storage.segments()[-1]
    last.unlink()
    (partial.parent / last.name).unlink()


def _of_another_cluster(storage: Storage, partial: Path) -> None:
    _patch(partial, 24, b"\x01\x02\x03\x04\x05\x06\x07\x08")


def _of_another_position(storage: Storage, partial: Path) -> None:
    _patch(partial, 8, bytes(8))


def _written_on_another_timeline(storage: Storage, partial: Path) -> None:
    _patch(partial, 4, b"\x07\0\0\0")


def _torn(storage: Storage, partial: Path) -> None:
    os.truncate(partial, SEGMENT_SIZE - 8192)


def _without_a_first_page(storage: Storage, partial: Path) -> None:
    _patch(partial, 0, b"\xff" * 8192)


def _empty(storage: Storage, partial: Path) -> None:
    os.truncate(partial, 0)
    os.truncate(partial, SEGMENT_SIZE)


def _archived_meanwhile(storage: Storage, partial: Path) -> None:
    whole = partial.with_name(partial.name[:24])
    shutil.copyfile(partial, whole)
    push(str(whole), str(storage.repository), CLUSTER)
    whole.unlink()


WRONG = [
    _of_another_timeline,
    _not_the_next_one,
    _of_another_cluster,
    _of_another_position,
    _written_on_another_timeline,
    _torn,
    _without_a_first_page,
    _empty,
    _archived_meanwhile,
]


@pytest.mark.parametrize("break_it", WRONG, ids=lambda item: item.__name__)
def test_wrong_partial_is_never_used(
    burnt: Burnt, copied: Storage, restored: Restore, break_it: Callable[[Storage, Path], None]
) -> None:
    break_it(copied, spool(copied) / f"{burnt.name}.partial")
    result = restored(copied, use_partial=True)
    assert result.plan.from_receiver == ()
    assert not list((result.server.data / "pg_wal").glob("0*"))
    if break_it in (_of_another_cluster, _of_another_position, _written_on_another_timeline, _torn):
        assert any("the receiver's spool" in note for note in result.plan.notes)


def test_finished_segment_that_is_not_archived_yet_and_the_partial_behind_it_are_both_used(
    burnt: Burnt, copied: Storage, restored: Restore
) -> None:
    last = copied.segments()[-1]
    finished = spool(copied) / last.name
    assert finished.exists(), "the newest finished one is kept"
    last.unlink()
    result = restored(copied, use_partial=True)
    assert result.plan.from_receiver == (last.name, burnt.name)
    assert result.run().phase == burnt.later.phase


def test_partial_that_is_finished_and_archived_between_plan_and_copy_comes_from_the_archive(
    burnt: Burnt, copied: Storage, tmp_path: Path, restored: Restore
) -> None:
    work = RestoreWork(copied.request(tmp_path / "data", use_partial=True))
    plan = work.plan()
    partial = spool(copied) / f"{burnt.name}.partial"
    whole = partial.rename(partial.with_name(burnt.name))
    push(str(whole), str(copied.repository), CLUSTER)
    work.execute(plan)
    assert plan.from_receiver == (burnt.name,)
    assert not (tmp_path / "data" / "pg_wal" / burnt.name).exists()


def test_partial_that_is_finished_between_plan_and_copy_is_still_used(
    burnt: Burnt, copied: Storage, tmp_path: Path
) -> None:
    work = RestoreWork(copied.request(tmp_path / "data", use_partial=True))
    plan = work.plan()
    partial = spool(copied) / f"{burnt.name}.partial"
    partial.rename(partial.with_name(burnt.name))
    work.execute(plan)
    assert (tmp_path / "data" / "pg_wal" / burnt.name).exists()


@pytest.mark.parametrize("what", ["gone", "torn", "foreign", "shorter"])
def test_partial_that_changes_between_plan_and_copy_fails_and_the_old_directory_stays(
    burnt: Burnt, copied: Storage, own_copy: Path, what: str
) -> None:
    work = RestoreWork(copied.request(own_copy, use_partial=True, force=True))
    plan = work.plan()
    partial = spool(copied) / f"{burnt.name}.partial"
    if what == "gone":
        partial.unlink()
    elif what == "torn":
        os.truncate(partial, 8192)
    elif what == "foreign":
        _of_another_cluster(copied, partial)
    else:
        # Zeros from before the last commit on: a valid beginning that reaches less far than was planned.
        offset = burnt.received.start % SEGMENT_SIZE
        _patch(partial, offset, bytes(SEGMENT_SIZE - offset))
    before = fingerprint(own_copy)
    with pytest.raises(PitrError):
        work.execute(plan)
    assert fingerprint(own_copy) == before


@pytest.fixture
def own_copy(burnt: Burnt, tmp_path: Path) -> Path:
    """The burnt primary's data directory, as if its disk had survived."""
    data = tmp_path / "own" / "data"
    data.parent.mkdir()
    shutil.copytree(burnt.storage.server.data, data)  # type: ignore[attr-defined]
    (data / "postmaster.pid").unlink(missing_ok=True)
    return data
