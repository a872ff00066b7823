# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The index of an archive, against a set of numbers, and against directories."""

from __future__ import annotations

from pathlib import Path

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.plugins.module_utils.index import ArchiveIndex, build, scan
from ansible_collections.pgdrill.pitr.plugins.module_utils.repository import Chapter
from ansible_collections.pgdrill.pitr.plugins.module_utils.timeline import parse_history
from ansible_collections.pgdrill.pitr.tests.unit.support import MIB, SYSTEM, history, make_repository, put, wal_name
from hypothesis import given
from hypothesis import strategies as st

numbers = st.frozensets(st.integers(0, 40), max_size=30)


def index_of(found: dict[int, frozenset[int]]) -> ArchiveIndex:
    index = ArchiveIndex(MIB)
    for timeline, members in found.items():
        for number in sorted(members):
            index.add(timeline, number)
    return index


@given(numbers, numbers, st.integers(0, 41))
def test_index_knows_exactly_what_was_added(first: frozenset[int], second: frozenset[int], number: int) -> None:
    index = index_of({1: first, 2: second})
    assert index.segments == len(first) + len(second)
    for timeline, members in ((1, first), (2, second), (3, frozenset())):
        assert index.has(timeline, number) == (number in members)
        assert index.last(timeline) == max(members, default=None)
        end = index.run_end(timeline, number)
        if number in members:
            assert end is not None and all(between in members for between in range(number, end + 1))
            assert end + 1 not in members
        else:
            assert end is None
        assert {n for low, high in index.ranges(timeline) for n in range(low, high + 1)} == members
        lost = set(range(min(members), max(members))) - members if members else set()
        assert {n for low, high in index.gaps(timeline) for n in range(low, high + 1)} == lost
        assert all(low <= high for low, high in index.gaps(timeline) + index.ranges(timeline))


@given(numbers, st.integers(0, 41), st.integers(0, 41))
def test_missing_numbers_are_named_in_order(members: frozenset[int], first: int, last: int) -> None:
    expected = [number for number in range(first, last + 1) if number not in members]
    assert list(index_of({1: members}).missing(1, first, last)) == expected


def test_ranges_of_an_unbroken_archive_are_one() -> None:
    index = build([wal_name(1, number) for number in range(5000)], MIB)
    assert index.ranges(1) == [(0, 4999)]
    assert index.name(1, 4999) == wal_name(1, 4999)


@pytest.mark.parametrize("second", [4, 5, 3])
def test_segment_out_of_order_is_a_mistake_of_the_caller(second: int) -> None:
    index = index_of({1: frozenset({3, 4, 5})})
    with pytest.raises(ValueError, match="ascending"):
        index.add(1, second)


def test_archive_is_scanned_across_folders_and_timelines(tmp_path: Path) -> None:
    folder = make_repository(tmp_path / "r")
    archive = Path(folder.archive_path())
    # 4095 and 4096 lie in two folders of 4 GB and are one run.
    for timeline, number in ((1, 3), (1, 4), (1, 4095), (1, 4096), (2, 4), (2, 5)):
        put(archive / wal_name(timeline, number)[:16], wal_name(timeline, number), b"")
    put(archive, "00000002.history", history((1, "0/450000")))
    index = scan(folder)
    assert index.ranges(1) == [(3, 4), (4095, 4096)]
    assert index.ranges(2) == [(4, 5)]
    assert index.timelines == [1, 2] and index.tree.newest == 2
    assert index.tree.path(2)[0].end == 0x450000
    assert index.unknown == []


def test_what_is_no_segment_is_not_indexed_as_one(tmp_path: Path) -> None:
    folder = make_repository(tmp_path / "r")
    archive = Path(folder.archive_path())
    log = archive / wal_name(1, 3)[:16]
    put(log, wal_name(1, 3), b"")
    put(log, f".{wal_name(1, 4)}.123.abcd.tmp", b"")
    put(log, f"{wal_name(1, 5)}.partial", b"")
    put(log, f"{wal_name(1, 3)}.00000028.backup", b"")
    put(log, "notes.txt", b"")
    put(log, f"{wal_name(1, 6)}.gz", b"")
    put(archive, ".00000002.history.123.abcd.tmp", b"")
    put(archive, ".nfs0000.history", b"")
    put(archive, "README", b"")
    put(archive, "old.history", b"rubbish")
    index = scan(folder)
    assert index.ranges(1) == [(3, 3)] and index.timelines == [1]
    unknown = [f"{log.name}/{wal_name(1, 6)}.gz", f"{log.name}/notes.txt", "README", "old.history"]
    assert sorted(index.unknown) == unknown
    assert [(attached.timeline, attached.number) for attached in index.attached] == [(1, 3), (1, 5)]


def test_names_that_only_look_like_segments_are_reported_and_not_counted(tmp_path: Path) -> None:
    folder = make_repository(tmp_path / "r")
    archive = Path(folder.archive_path())
    log = archive / wal_name(1, 3)[:16]
    put(log, wal_name(1, 3), b"")
    # 1 MB segments end at 00000FFF; another folder's segment; letters that PostgreSQL does not write.
    odd = [log.name + "00001000", wal_name(1, 4096), wal_name(2, 5), log.name + "0000000a", log.name + " 000000A"]
    for name in odd:
        put(log, name, b"")
    put(archive, "000000010000000g", b"")
    put(archive, "0000000300000000", b"a file where a folder belongs")
    index = scan(folder)
    assert index.ranges(1) == [(3, 3)] and index.timelines == [1] and index.segments == 1
    lost = [f"{log.name}/{name}" for name in odd] + ["000000010000000g", "0000000300000000"]
    assert sorted(index.unknown) == sorted(lost)


def test_holes_are_found_where_one_timeline_leads_on_to_another() -> None:
    # Timeline 2 begins in segment 5, timeline 3 in segment 9 of it.
    index = index_of({1: frozenset({1, 2}), 2: frozenset({6, 7, 9}), 3: frozenset({11})})
    index.add_history(2, parse_history(2, history((1, "0/580000"))))
    index.add_history(3, parse_history(3, history((1, "0/580000"), (2, "0/980000"))))
    assert index.holes() == [(1, 3, 4), (2, 5, 5), (2, 8, 8), (3, 9, 10)]


def test_wal_that_was_expired_is_no_hole() -> None:
    index = index_of({2: frozenset({7, 8}), 3: frozenset({9})})
    index.add_history(2, parse_history(2, history((1, "0/580000"))))
    index.add_history(3, parse_history(3, history((1, "0/580000"), (2, "0/980000"))))
    assert index.holes() == []


def test_branch_that_has_archived_nothing_is_no_hole() -> None:
    index = index_of({1: frozenset({4, 5})})
    index.add_history(2, parse_history(2, history((1, "0/580000"))))
    assert index.holes() == []


def test_archive_that_is_not_there_is_an_error_and_not_empty(tmp_path: Path) -> None:
    folder = make_repository(tmp_path / "r")
    Path(folder.archive_path()).rmdir()
    with pytest.raises(PitrError, match=r"does not exist\. Is the repository mounted"):
        scan(folder)


def test_damaged_history_file_is_named(tmp_path: Path) -> None:
    folder = make_repository(tmp_path / "r")
    put(Path(folder.archive_path()), "00000002.history", b"\0\0\0\0")
    with pytest.raises(PitrError, match=r"00000002\.history, line 1"):
        scan(folder)


def test_history_with_bytes_that_are_not_utf8_is_read(tmp_path: Path) -> None:
    folder = make_repository(tmp_path / "r")
    put(Path(folder.archive_path()), "00000002.history", b'1\t0/450000\tat restore point "caf\xe9"\n')
    assert scan(folder).tree.newest == 2


def test_chapters_are_scanned_apart(tmp_path: Path) -> None:
    folder = make_repository(tmp_path / "r")
    old = folder.chapter
    put(Path(folder.archive_path()) / wal_name(1, 3)[:16], wal_name(1, 3), b"")
    new = Chapter(2, str(SYSTEM + 1), 16 * MIB, 18, "")
    folder.chapters.append(new)
    Path(folder.archive_path(new)).mkdir()
    assert scan(folder).segments == 0
    assert scan(folder).segment_size == 16 * MIB
    assert scan(folder, old).segments == 1


def test_file_with_a_number_that_cannot_be_is_reported_and_not_counted(tmp_path: Path) -> None:
    folder = make_repository(tmp_path / "r", size=16 * MIB)
    name = wal_name(1, 300)
    put(Path(folder.archive_path()) / name[:16], name, b"")
    index = scan(folder)
    assert index.segments == 0 and index.unknown == [f"{name[:16]}/{name}"]
