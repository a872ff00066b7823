# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Finding records along timelines, with pg_waldump played by a table of records."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils import waldump
from ansible_collections.pgdrill.pitr.plugins.module_utils.archive import push
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.plugins.module_utils.index import ArchiveIndex, scan
from ansible_collections.pgdrill.pitr.plugins.module_utils.plan import Location
from ansible_collections.pgdrill.pitr.plugins.module_utils.timeline import Span
from ansible_collections.pgdrill.pitr.plugins.module_utils.wal import Lsn, WalFile
from ansible_collections.pgdrill.pitr.plugins.module_utils.waldump import Record, WalScanner, _parse
from ansible_collections.pgdrill.pitr.tests.unit.support import (
    CLUSTER,
    MIB,
    make_repository,
    put,
    segment,
    wal_name,
)

# Timeline 2 left 1 in the middle of segment 4; 1 went on, in vain.
SWITCH = Lsn(4 * MIB + MIB // 2)
SPANS = [Span(1, Lsn(2 * MIB + 40), SWITCH), Span(2, SWITCH, None)]


def at(segment: float) -> Lsn:
    return Lsn(int(segment * MIB))


def commit(segment: float, xid: int) -> tuple[Lsn, str, int, str]:
    return at(segment), "Transaction", xid, f"COMMIT 2026-03-01 12:{xid % 60:02}:00.5 UTC"


# By timeline: what was written on it, with its copy of the parent's part of the switch segment.
SHARED = [commit(4.1, 704), (at(4.2), "XLOG", 0, "RESTORE_POINT shared")]
WRITTEN = {
    1: [
        commit(2.00001, 701),
        commit(2.5, 702),
        commit(3.5, 703),
        *SHARED,
        commit(4.8, 790),
        (at(5.1), "XLOG", 0, "RESTORE_POINT stray"),
        commit(5.5, 791),
    ],
    2: [*SHARED, commit(4.9, 705), (at(5.2), "XLOG", 0, "RESTORE_POINT own"), commit(5.6, 706), commit(6.5, 707)],
}


class Player(WalScanner):
    """The scanner over an archive that holds these segments; each is read as pg_waldump would."""

    def __init__(self, segments: dict[int, list[int]]) -> None:
        index = ArchiveIndex(MIB)
        for timeline, numbers in segments.items():
            for number in numbers:
                index.add(timeline, number)
        nothing: Any = None
        super().__init__(nothing, nothing, index, "/bin")
        self.windows: list[tuple[int, int, int]] = []

    def _window(self, timeline: int, first: int, until: int, rmgrs: tuple[str, ...], final: bool) -> Iterator[Record]:
        self.windows.append((timeline, first, until))
        assert all(self._index.has(timeline, number) for number in range(first, until + 1))
        for lsn, rmgr, xid, text in WRITTEN[timeline]:
            if first * MIB <= lsn < (until + 1) * MIB and rmgr in rmgrs:
                yield Record(rmgr, xid, lsn, timeline, text)


FULL = {1: [2, 3, 4, 5], 2: [4, 5, 6]}
# The usual failover: the old primary died before its last segment was full.
DIED = {1: [2, 3], 2: [4, 5, 6]}


@pytest.mark.parametrize("segments", [FULL, DIED], ids=["parent-went-on", "parent-died"])
def test_records_of_the_path_are_found_once_and_in_order(segments: dict[int, list[int]]) -> None:
    found = [record.xid for record in Player(segments).records(SPANS, 6, ("Transaction",))]
    assert found == [702, 703, 704, 705, 706, 707]


@pytest.mark.parametrize("segments", [FULL, DIED], ids=["parent-went-on", "parent-died"])
@pytest.mark.parametrize("xid", [702, 704, 705, 707, 2**32 + 704])
def test_transaction_is_found_on_either_side_of_the_switch(segments: dict[int, list[int]], xid: int) -> None:
    found = Player(segments).find_xid(SPANS, 6, xid)
    assert found is not None and found.time is not None and found.time.minute == xid % 2**32 % 60
    assert found.lsn in [lsn for lsn, _rmgr, number, _text in WRITTEN[1] + WRITTEN[2] if number == xid % 2**32]


@pytest.mark.parametrize("xid", [701, 790, 791, 999])
def test_transaction_before_the_backup_or_on_another_branch_is_not_found(xid: int) -> None:
    assert Player(FULL).find_xid(SPANS, 6, xid) is None


@pytest.mark.parametrize("segments", [FULL, DIED], ids=["parent-went-on", "parent-died"])
def test_restore_point_is_found_by_its_whole_name(segments: dict[int, list[int]]) -> None:
    player = Player(segments)
    own = player.find_name(SPANS, 6, "own")
    assert own == Location(at(5.2), 2)
    shared = player.find_name(SPANS, 6, "shared")
    assert shared is not None and shared.lsn == at(4.2)
    assert player.find_name(SPANS, 6, "stray") is None
    assert player.find_name(SPANS, 6, "ow") is None
    assert player.find_name(SPANS, 5, "own") == own and player.find_name(SPANS, 4, "own") is None


@pytest.mark.parametrize(
    ("segments", "last", "xid"),
    [(FULL, 6, 707), (FULL, 5, 706), (FULL, 4, 705), (DIED, 4, 705), (DIED, 3, 703), ({1: [2, 3, 4]}, 4, 704)],
)
def test_last_transaction_is_looked_for_from_the_end(segments: dict[int, list[int]], last: int, xid: int) -> None:
    found = Player(segments).last_transaction(SPANS, last)
    assert found is not None and found.xid == xid


def test_archive_without_transactions_has_no_last_one() -> None:
    assert Player({2: [8]}).last_transaction(SPANS, 8) is None


def test_long_run_is_read_in_windows_that_overlap_by_one_segment() -> None:
    player = Player({1: list(range(2, 50))})
    assert [record.xid for record in player.records([Span(1, Lsn(2 * MIB), None)], 49, ("Transaction",))] == [
        xid for _lsn, rmgr, xid, _text in WRITTEN[1] if rmgr == "Transaction"
    ]
    assert player.windows[0] == (1, 2, 2 + waldump.WINDOW - 1)
    assert all(left[2] == right[1] for left, right in zip(player.windows, player.windows[1:], strict=False))
    assert player.windows[-1][2] == 49


@pytest.mark.parametrize(
    ("line", "xid", "time", "is_commit"),
    [
        (
            "rmgr: Transaction len (rec/tot):     34/    34, tx:        745, lsn: 0/030001C8, prev 0/03000188,"
            " desc: COMMIT 2026-03-01 12:00:00.123456 UTC",
            745,
            "2026-03-01T12:00:00.123456+00:00",
            True,
        ),
        (
            "rmgr: Transaction len (rec/tot):     34/    34, tx:        746, lsn: 0/030001C8, prev 0/03000188,"
            " desc: ABORT 2026-03-01 12:00:00.5 UTC",
            746,
            "2026-03-01T12:00:00.500000+00:00",
            False,
        ),
        (
            "rmgr: Transaction len (rec/tot):     64/    64, tx:          0, lsn: 0/030001C8, prev 0/03000188,"
            " desc: COMMIT_PREPARED 747: 2026-03-01 12:00:00 UTC",
            747,
            "2026-03-01T12:00:00+00:00",
            True,
        ),
    ],
)
def test_line_of_pg_waldump_is_read(line: str, xid: int, time: str, is_commit: bool) -> None:
    record = _parse(line, 3)
    assert record is not None
    assert (record.ended_xid, record.lsn, record.timeline, record.is_commit) == (xid, 0x30001C8, 3, is_commit)
    assert record.time == datetime.datetime.fromisoformat(time)


@pytest.mark.parametrize(
    "line", ["", "pg_waldump: error: error in WAL record at 0/3000060", "first record is after 0/3"]
)
def test_other_lines_are_no_records(line: str) -> None:
    assert _parse(line, 1) is None


class Archive:
    """A real archive of good segments, and a program in the place of pg_waldump."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = make_repository(root / "repository")
        for number in range(2, 6):
            path = put(root / "pg_wal", wal_name(1, number), segment(1, number))
            push(path, self.folder.repository, CLUSTER, "gzip" if number % 2 else "none")
        self.play("")

    def play(self, script: str) -> None:
        lines = f'printf "%s\\n" "$@" "$TZ$LC_ALL" > {self.root}/argv\nls "${{1#--path=}}" > {self.root}/files\n'
        (self.root / "pg_waldump").write_text(f"#!/bin/sh\n{lines}{script}\n")
        (self.root / "pg_waldump").chmod(0o755)

    def records(self, first: int, last: int) -> Iterator[Record]:
        scanner = WalScanner(self.folder, self.folder.chapter, scan(self.folder), str(self.root))
        return scanner.records([Span(1, Lsn(first * MIB), None)], last, ("Transaction", "XLOG"))

    def line(self, lsn: Lsn, xid: int = 745) -> str:
        return (
            f"echo 'rmgr: Transaction len (rec/tot):     34/    34, tx:        {xid}, lsn: {lsn}, prev 0/1,"
            " desc: COMMIT 2026-03-01 12:00:00 UTC'\n"
        )


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    return Archive(tmp_path)


def test_program_gets_plain_segments_and_where_to_begin_and_end(archive: Archive) -> None:
    archive.play(
        f"cmp -s ${{1#--path=}}/{wal_name(1, 3)} {archive.root}/pg_wal/{wal_name(1, 3)} && {archive.line(at(3.5))}"
    )
    assert [record.xid for record in archive.records(2, 4)] == [745]
    assert (archive.root / "files").read_text().split() == [wal_name(1, number) for number in (2, 3, 4)]
    path, *rest = (archive.root / "argv").read_text().splitlines()
    assert not os.path.exists(path.removeprefix("--path="))
    assert rest == [
        "--timeline=1",
        f"--start={Lsn(2 * MIB)}",
        f"--end={Lsn(5 * MIB)}",
        "--rmgr=Transaction",
        "--rmgr=XLOG",
        "UTCC",
    ]


@pytest.mark.parametrize("number", [2, 3])
def test_wal_that_cannot_be_read_before_the_end_is_an_error_that_names_the_segment(
    archive: Archive, number: int
) -> None:
    where = Lsn(number * MIB + 96)
    archive.play(f"{archive.line(at(2.5))}echo 'pg_waldump: error: error in WAL record at {where}: bad' >&2; exit 1")
    with pytest.raises(PitrError, match=f"cannot be read at {where}, in {wal_name(1, number)}"):
        list(archive.records(2, 4))


@pytest.mark.parametrize("said", ["", f"pg_waldump: error: error in WAL record at {Lsn(4 * MIB + 96)}: zeros"])
def test_end_of_the_last_segment_is_no_error(archive: Archive, said: str) -> None:
    archive.play(f"{archive.line(at(2.5))}echo '{said}' >&2; exit 1")
    assert len(list(archive.records(2, 4))) == 1


@pytest.mark.timeout(20)
def test_search_that_ends_early_leaves_no_process_and_no_directory(archive: Archive) -> None:
    archive.play(f"{archive.line(at(2.5))}echo $$ > {archive.root}/pid; exec sleep 60")
    records = archive.records(2, 4)
    assert next(records).xid == 745
    path = (archive.root / "argv").read_text().splitlines()[0].removeprefix("--path=")
    assert os.path.exists(path)
    while not (archive.root / "pid").exists() or not (archive.root / "pid").read_text():
        pass
    records.close()  # type: ignore[attr-defined]
    assert not os.path.exists(f"/proc/{(archive.root / 'pid').read_text().strip()}")
    assert not os.path.exists(path)


def test_damaged_segment_is_named_before_the_program_runs(archive: Archive) -> None:
    stored = Path(archive.folder.wal_path(WalFile.parse(wal_name(1, 3))))
    stored.write_bytes(stored.read_bytes()[:1000])
    with pytest.raises(PitrError, match="is damaged") as caught:
        list(archive.records(2, 4))
    assert str(stored) in caught.value.message and not (archive.root / "argv").exists()


def test_record_without_an_end_has_no_time() -> None:
    record = Record("Transaction", 5, Lsn(1), 1, "ASSIGNMENT xtop 5: subxacts: 6")
    assert record.time is None and not record.is_commit
    assert not Record("XLOG", 0, Lsn(1), 1, "COMMIT of something else").is_commit
