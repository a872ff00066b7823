# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A restore that goes on with the pg_wal of the server that died: all of it that is this past, and nothing else."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.plugins.module_utils.plan import RefusedError
from ansible_collections.pgdrill.pitr.plugins.module_utils.restore import Restore as RestoreWork
from ansible_collections.pgdrill.pitr.plugins.module_utils.wal import Lsn, SegmentHeader, WalFile, segment_name
from ansible_collections.pgdrill.pitr.tests.integration.receiving import Receiving
from ansible_collections.pgdrill.pitr.tests.integration.support import (
    SEGMENT_SIZE,
    Commit,
    Restored,
    Sandbox,
    Server,
    Storage,
    fingerprint,
    in_child,
    until,
)

Restore = Callable[..., Restored]


class Dead:
    """A primary that was killed; two whole segments and the beginning of a third were never archived."""

    def __init__(self, primary: Sandbox) -> None:
        self.storage: Storage = primary
        self.server = primary.server
        primary.backup("only")
        self.archived = primary.commit("archived")
        primary.probe()
        stop_archiving(primary)
        self.first = primary.commit("not archived")
        primary.fill(1)
        self.middle = primary.commit("not archived either")
        primary.fill(1)
        self.last = primary.commit("the last one")
        primary.server.stop("immediate")
        self.data = primary.server.data

    @property
    def names(self) -> list[str]:
        """The segments that only pg_wal has, the last one half written."""
        first, last = (commit.start.segment_number(SEGMENT_SIZE) for commit in (self.first, self.last))
        return [segment_name(1, number, SEGMENT_SIZE) for number in range(first, last + 1)]


def stop_archiving(primary: Sandbox) -> None:
    primary.configure({"archive_command": "false"})
    primary.server.sql("SELECT pg_reload_conf()")
    until(lambda: primary.server.show("archive_command") == "false", "the reload")


@pytest.fixture(scope="module")
def original(bin_dir: str, template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dead]:
    """Shared, read-only."""
    sandbox = Sandbox(bin_dir, tmp_path_factory.mktemp("dead"), template)
    try:
        sandbox.server.start()
        made = Dead(sandbox)
        assert len(made.names) == 3
        shared = [sandbox.repository / "main" / name for name in ("archive", "backups")] + [made.data]
        before = fingerprint(*shared)
        yield made
        assert fingerprint(*shared) == before, "a test has written to what all share"
    finally:
        sandbox.server.close()


class Case:
    """A copy of the dead primary to restore over, and of the repository when the test breaks it."""

    def __init__(self, dead: Dead, place: Path) -> None:
        self.dead = dead
        self.storage = dead.storage
        self.data = place / "data"
        place.mkdir()
        shutil.copytree(dead.data, self.data, symlinks=True)
        (self.data / "postmaster.pid").unlink(missing_ok=True)
        self.names = dead.names

    @property
    def pg_wal(self) -> Path:
        return self.data / "pg_wal"

    def plan(self, options: dict[str, Any] | None = None, **more: Any) -> Any:
        return self.storage.plan(self.data, options, **{"force": True, **more})


@pytest.fixture
def case(original: Dead, tmp_path: Path) -> Case:
    return Case(original, tmp_path / "case")


def target(commit: Commit, **more: Any) -> dict[str, Any]:
    return {"recovery_target_time": commit.time_text, **more}


def copies(data: Path) -> list[str]:
    return sorted(path.name for path in (data / "pg_wal").glob("0*") if len(path.name) == 24)


# --- what is used


def test_everything_that_the_dead_server_had_is_restored(case: Case, restored: Restore) -> None:
    before = fingerprint(case.data)
    result = restored(case.storage, data=case.data, force=True)
    assert list(result.plan.from_pg_wal) == case.names and not result.plan.from_receiver
    # It was copied; the old directory is what it was, under its new name.
    aside = Path(result.result.moved_aside)
    after = {name.replace(str(aside), str(case.data)): value for name, value in fingerprint(aside).items()}
    assert after == before
    assert copies(case.data) == case.names
    assert all((case.pg_wal / name).stat().st_mode & 0o077 == 0 for name in case.names)
    result.run()
    assert result.phase == case.dead.last.phase
    assert result.plan.at_least is not None and Lsn.parse(result.reached.lsn) > result.plan.at_least


def test_plan_tells_how_far_each_source_leads(case: Case) -> None:
    plan = case.plan()
    archive, own = plan.to_dict()["sources"]
    first = WalFile.parse(case.names[0]).number(SEGMENT_SIZE)
    assert archive["name"] == "archive" and Lsn.parse(archive["last_lsn"]) == first * SEGMENT_SIZE
    assert (own["name"], own["segments"], own["place"]) == ("pg_wal", 3, str(case.pg_wal))
    assert Lsn.parse(own["last_lsn"]) >= case.dead.last.start
    assert archive["segments"] + own["segments"] == plan.segments
    assert any(str(case.pg_wal) in note and case.names[0] in note for note in plan.notes)


def test_none_restores_what_is_archived(case: Case, restored: Restore) -> None:
    result = restored(case.storage, data=case.data, force=True, dead_pg_wal="none")
    assert not result.plan.from_elsewhere and not copies(case.data)
    assert result.run().phase == case.dead.archived.phase


def test_targets_in_pg_wal_are_reached_exactly_when_it_is_named(case: Case, restored: Restore, tmp_path: Path) -> None:
    dead = case.dead
    more: dict[str, Any] = {"dead_pg_wal": str(case.pg_wal)}
    assert restored(case.storage, target(dead.middle), **more).run().phase == dead.middle.phase
    assert restored(case.storage, {"recovery_target_xid": str(dead.first.xid)}, **more).run().phase == dead.first.phase
    lsn = {"recovery_target_lsn": str(dead.last.start), "recovery_target_inclusive": False}
    assert restored(case.storage, lsn, **more).run().phase == dead.middle.phase


@pytest.mark.parametrize("kind", ["recovery_target_lsn", "recovery_target_xid", "recovery_target_time"])
def test_target_beyond_the_archive_is_refused_with_the_pg_wal_that_has_it(case: Case, kind: str) -> None:
    middle = case.dead.middle
    value = {
        "recovery_target_lsn": str(middle.start),
        "recovery_target_xid": str(middle.xid),
        "recovery_target_time": middle.time_text,
    }[kind]
    before = fingerprint(case.data)
    with pytest.raises(RefusedError) as caught:
        case.plan({kind: value})
    nearest = caught.value.refusals[0].nearest
    assert f"dead_pg_wal (restore_dead_pg_wal): {case.pg_wal} would replay it" in nearest and case.names[0] in nearest
    assert fingerprint(case.data) == before


def test_target_in_the_archive_does_not_use_it(case: Case, restored: Restore) -> None:
    for options in ({"recovery_target": "immediate"}, {"recovery_target_xid": str(case.dead.archived.xid)}):
        result = restored(case.storage, options, dead_pg_wal=str(case.pg_wal))
        assert not result.plan.from_pg_wal and not copies(result.server.data)


def test_lsn_behind_the_last_record_is_refused(case: Case) -> None:
    number = case.dead.last.start.segment_number(SEGMENT_SIZE)
    options = {"recovery_target_lsn": str(Lsn((number + 1) * SEGMENT_SIZE - 8192))}
    with pytest.raises(RefusedError) as caught:
        case.plan(options, dead_pg_wal=str(case.pg_wal))
    assert [item.code for item in caught.value.refusals] == ["target_beyond_archive"]
    assert str(case.pg_wal) in caught.value.refusals[0].message


def test_copy_of_the_directory_alone_will_do(case: Case, tmp_path: Path, restored: Restore) -> None:
    saved = tmp_path / "saved"
    shutil.copytree(case.pg_wal, saved)
    result = restored(case.storage, dead_pg_wal=str(saved))
    assert list(result.plan.from_pg_wal) == case.names
    assert result.run().phase == case.dead.last.phase


def test_pg_wal_on_another_filesystem_is_followed(case: Case, tmp_path: Path, restored: Restore) -> None:
    elsewhere = tmp_path / "wal"
    case.pg_wal.rename(elsewhere)
    case.pg_wal.symlink_to(elsewhere)
    before = fingerprint(elsewhere)
    result = restored(case.storage, data=case.data, force=True).run()
    assert result.phase == case.dead.last.phase
    # The restored one is on the same filesystem, in a directory of its own.
    assert case.pg_wal.is_symlink() and case.pg_wal.resolve().parent == elsewhere.parent
    assert case.pg_wal.resolve() != elsewhere and fingerprint(elsewhere) == before


# --- what is never used


def _patch(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as stream:
        stream.seek(offset)
        stream.write(data)


def _recycled(case: Case) -> int:
    """Old content under the name that comes next, as a checkpoint leaves it, and nothing of the present one."""
    shutil.copyfile(case.pg_wal / case.names[0], case.pg_wal / case.names[1])
    return 1


def _recycled_at_the_end(case: Case) -> int:
    for ahead in (1, 2):
        number = WalFile.parse(case.names[-1]).number(SEGMENT_SIZE) + ahead
        shutil.copyfile(case.pg_wal / case.names[0], case.pg_wal / segment_name(1, number, SEGMENT_SIZE))
    return 3


def _preallocated(case: Case) -> int:
    os.truncate(case.pg_wal / case.names[1], 0)
    os.truncate(case.pg_wal / case.names[1], SEGMENT_SIZE)
    return 1


def _hole(case: Case) -> int:
    (case.pg_wal / case.names[1]).unlink()
    return 1


def _not_the_next_one(case: Case) -> int:
    (case.pg_wal / case.names[0]).unlink()
    return 0


def _of_another_cluster(case: Case) -> int:
    _patch(case.pg_wal / case.names[1], 24, b"\x01\x02\x03\x04\x05\x06\x07\x08")
    return 1


def _written_on_another_timeline(case: Case) -> int:
    _patch(case.pg_wal / case.names[1], 4, b"\x07\0\0\0")
    return 1


def _cut_short(case: Case) -> int:
    os.truncate(case.pg_wal / case.names[1], SEGMENT_SIZE - 8192)
    return 1


def _damaged_in_the_middle(case: Case) -> int:
    """A record that is not what its checksum says; what follows it cannot be reached."""
    offset = case.dead.middle.start % SEGMENT_SIZE
    _patch(case.pg_wal / case.names[1], offset + 20, b"\xff\xff\xff\xff")
    return 2


def _of_another_past(case: Case) -> int:
    """Right names, right addresses, but the first record does not follow the archive's last one."""
    path = case.pg_wal / case.names[0]
    head = path.read_bytes()[:8192]
    first = (SegmentHeader.SIZE + 7) // 8 * 8
    # The first record's xl_prev (XLogRecord: total length, xid, prev).
    _patch(path, first + 8, bytes([head[first + 8] ^ 0x40]))
    return 0


WRONG = [
    _recycled,
    _recycled_at_the_end,
    _preallocated,
    _hole,
    _not_the_next_one,
    _of_another_cluster,
    _written_on_another_timeline,
    _cut_short,
    _damaged_in_the_middle,
    _of_another_past,
]


@pytest.mark.parametrize("break_it", WRONG, ids=lambda item: item.__name__)
def test_only_what_continues_the_archive_is_used(
    case: Case, restored: Restore, break_it: Callable[[Case], int]
) -> None:
    count = break_it(case)
    result = restored(case.storage, data=case.data, force=True)
    assert list(result.plan.from_pg_wal) == case.names[:count] == copies(case.data)
    expected = [case.dead.archived, case.dead.first, case.dead.first, case.dead.last][count].phase
    if break_it is _damaged_in_the_middle:
        assert any("records break off" in note for note in result.plan.notes)
    elif break_it in (_of_another_cluster, _written_on_another_timeline, _cut_short):
        assert any(case.names[1] in note for note in result.plan.notes)
    assert result.run().phase == expected


def test_recycled_segments_are_no_news(case: Case) -> None:
    """Every server has some, and nobody has to look at a note about them."""
    _recycled_at_the_end(case)
    assert not any("Refused" in note or "not used" in note for note in case.plan().notes)


def test_server_that_has_gone_on_to_another_timeline_is_not_used(
    bin_dir: str, case: Case, server: Callable[[Path], Server]
) -> None:
    promoted = server(case.data)
    (case.data / "conf.d" / "90-copy.conf").write_text("archive_mode = off\nrestore_command = 'false'\n")
    (case.data / "recovery.signal").touch()
    promoted.start()
    until(lambda: promoted.value("SELECT NOT pg_is_in_recovery()"), "the promotion")
    promoted.stop("immediate")
    plan = case.plan()
    assert not plan.from_pg_wal
    assert any("timeline 2" in note and "pitr-wal push" in note for note in plan.notes)
    with pytest.raises(RefusedError) as caught:
        case.plan(dead_pg_wal=str(case.pg_wal))
    assert [item.code for item in caught.value.refusals] == ["dead_pg_wal"]


def test_directory_of_a_running_server_is_refused(case: Case, server: Callable[[Path], Server], tmp_path: Path) -> None:
    (case.data / "conf.d" / "90-copy.conf").write_text("archive_mode = off\n")
    running = server(case.data)
    running.start()
    with pytest.raises(RefusedError) as caught:
        case.storage.plan(tmp_path / "elsewhere", dead_pg_wal=str(case.pg_wal))
    assert [item.code for item in caught.value.refusals] == ["dead_pg_wal"]
    assert "running" in caught.value.refusals[0].message
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("what", ["another cluster's", "nothing", "relative"])
def test_wrong_directory_is_refused(case: Case, stranger: Path, tmp_path: Path, what: str) -> None:
    place = {"another cluster's": str(stranger / "pg_wal"), "nothing": str(tmp_path / "no"), "relative": "pg_wal"}[what]
    with pytest.raises(RefusedError) as caught:
        case.storage.plan(tmp_path / "elsewhere", dead_pg_wal=place)
    assert [item.code for item in caught.value.refusals] == ["dead_pg_wal"]
    assert place in caught.value.refusals[0].message


# --- the directory that counts


def test_restored_cluster_that_was_not_accepted_is_not_the_dead_server(case: Case, restored: Restore) -> None:
    """Restored once to an earlier point: the second restore still has all that the dead server had."""
    dead = case.dead
    first = restored(case.storage, {"recovery_target_xid": str(dead.archived.xid)}, data=case.data, force=True).run()
    aside = first.result.moved_aside
    first.server.stop()
    second = restored(case.storage, data=case.data, force=True)
    assert list(second.plan.from_pg_wal) == case.names
    assert second.plan.to_dict()["sources"][-1]["place"] == f"{aside}/pg_wal"
    assert second.run().phase == dead.last.phase
    # And a third, after one that had copied it.
    second.server.stop()
    third = restored(case.storage, data=case.data, force=True, keep_unaccepted=False)
    assert third.plan.to_dict()["sources"][-1]["place"] == f"{aside}/pg_wal"
    assert third.run().phase == dead.last.phase


def test_restore_that_was_killed_leaves_what_the_next_one_needs(case: Case, restored: Restore) -> None:
    request = case.storage.request(case.data, force=True)
    killed = in_child(request, at=12)
    assert killed.returncode != 0 and (case.data / "pitr-restoring.json").exists(), killed.stderr
    result = restored(case.storage, data=case.data, force=True)
    assert list(result.plan.from_pg_wal) == case.names
    assert result.run().phase == case.dead.last.phase


def test_failed_restore_puts_the_old_directory_back_untouched(case: Case) -> None:
    before = fingerprint(case.data)
    work = RestoreWork(case.storage.request(case.data, force=True))
    plan = work.plan()
    shutil.move(case.pg_wal / case.names[2], case.data / "hidden")
    with pytest.raises(PitrError, match="has vanished"):
        work.execute(plan)
    shutil.move(case.data / "hidden", case.pg_wal / case.names[2])
    assert fingerprint(case.data) == before


# --- together with a receiver


def test_receiver_and_pg_wal_go_on_from_each_other(
    sandbox: Callable[..., Sandbox], restored: Restore, tmp_path: Path
) -> None:
    """The receiver died before the server; a segment of pg_wal is gone that the receiver has."""
    primary = sandbox()
    primary.backup("only")
    primary.commit("archived")
    primary.probe()
    stop_archiving(primary)
    receiving = Receiving(primary, primary.server).start()
    try:
        primary.commit("received")
        receiving.wait_for(primary.server)
    finally:
        receiving.close()
    assert receiving.partial is not None
    name = receiving.partial.name[:24]
    last = primary.commit("in pg_wal alone")
    primary.server.stop("immediate")
    data = primary.server.data
    plan = primary.plan(data, force=True, use_partial=True)
    assert name in plan.from_pg_wal and not plan.from_receiver
    # Without it the receiver's is used, and the other way round.
    reached = []
    for more in ({"dead_pg_wal": "none", "use_partial": True}, {"use_partial": False}, {"use_partial": True}):
        place = tmp_path / f"place{len(reached)}"
        shutil.copytree(data, place)
        (place / "postmaster.pid").unlink(missing_ok=True)
        result = restored(primary, data=place, force=True, **more)
        reached.append(result.run().phase)
    assert reached == ["received", last.phase, last.phase]
