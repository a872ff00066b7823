# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The spool: where pg_receivewal goes on, where it has to after a switch of timelines, how far a file is written."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils.spool import (
    Start,
    behind,
    in_front,
    next_start,
    seed_name,
    segments,
    written,
)
from ansible_collections.pgdrill.pitr.plugins.module_utils.timeline import Span, Switch, ancestry
from ansible_collections.pgdrill.pitr.plugins.module_utils.wal import Lsn
from ansible_collections.pgdrill.pitr.tests.unit.support import MIB, header, wal_name


def way(timeline: int, *switches: tuple[int, int]) -> list[Span]:
    """The way to a timeline whose history names these (timeline, byte)."""
    return ancestry(timeline, [Switch(parent, Lsn(at), "") for parent, at in switches])


def test_files_are_in_pg_receivewals_order_and_others_are_left_out() -> None:
    names = [
        wal_name(1, 4) + ".partial", wal_name(2, 3), wal_name(1, 3), wal_name(1, 3) + ".partial",
        "status.json", "left", "00000002.history", wal_name(1, 2) + ".gz", "0" * 23 + "x", f".{wal_name(1, 9)}.tmp",
    ]  # fmt: skip
    found = [file.name for file in segments(names, MIB)]
    assert found == [wal_name(1, 3) + ".partial", wal_name(1, 3), wal_name(2, 3), wal_name(1, 4) + ".partial"]


def test_spool_ends_behind_a_finished_segment_and_at_a_partial_one() -> None:
    assert behind([]) is None
    assert behind(segments([wal_name(1, 3)], MIB)) == Start(1, 4)
    assert behind(segments([wal_name(1, 3), wal_name(1, 4) + ".partial"], MIB)) == Start(1, 4)


def test_spool_ends_on_its_newest_timeline_though_an_older_one_reaches_further() -> None:
    names = [wal_name(1, 9), wal_name(1, 10) + ".partial", wal_name(2, 4) + ".partial"]
    assert behind(segments(names, MIB)) == Start(2, 4)


@pytest.mark.parametrize(
    ("here", "ours", "theirs", "expected"),
    [
        # The server is where we are.
        (Start(1, 5), way(1), way(1), Start(1, 5)),
        # Promoted behind us, and exactly at our position: pg_receivewal follows by itself.
        (Start(1, 5), way(1), way(2, (1, 5 * MIB + 7)), Start(1, 5)),
        (Start(1, 5), way(1), way(2, (1, 5 * MIB)), Start(1, 5)),
        (Start(1, 5), way(1), way(3, (1, 5 * MIB + 7), (2, 8 * MIB)), Start(1, 5)),
        # Promoted before us: back to the segment of the switch, on the new timeline.
        (Start(1, 5), way(1), way(2, (1, 4 * MIB + 7)), Start(2, 4)),
        (Start(1, 5), way(1), way(2, (1, 4 * MIB)), Start(2, 4)),
        # In the first segment of a timeline, which begins before the timeline does.
        (Start(2, 4), way(2, (1, 4 * MIB + 7)), way(3, (1, 4 * MIB + 7), (2, 6 * MIB + 1)), Start(2, 4)),
        (Start(2, 7), way(2, (1, 4 * MIB + 7)), way(3, (1, 4 * MIB + 7), (2, 6 * MIB + 1)), Start(3, 6)),
        # A sibling: our timeline is no part of the server's past.
        (Start(2, 6), way(2, (1, 4 * MIB + 7)), way(3, (1, 4 * MIB + 7)), Start(3, 4)),
        (Start(2, 6), way(2, (1, 4 * MIB + 7)), way(3, (1, 3 * MIB + 9)), Start(3, 3)),
        # The sibling left our common past later: what lies between is on the parent.
        (Start(2, 6), way(2, (1, 4 * MIB + 7)), way(3, (1, 8 * MIB + 1)), Start(1, 4)),
        (Start(2, 6), way(2, (1, 4 * MIB + 7)), way(4, (1, 5 * MIB), (3, 9 * MIB)), Start(1, 4)),
    ],
)
def test_receiving_goes_on_where_the_servers_past_leaves_ours(
    here: Start, ours: list[Span], theirs: list[Span], expected: Start
) -> None:
    assert next_start(here, ours, theirs, MIB) == expected


def test_files_that_would_win_over_the_seed_have_to_go() -> None:
    names = [wal_name(1, 3), wal_name(1, 4), wal_name(1, 4) + ".partial", wal_name(2, 4), wal_name(1, 5) + ".partial"]
    start = Start(2, 4)
    assert [file.name for file in in_front(segments(names, MIB), start)] == [
        wal_name(2, 4),
        wal_name(1, 5) + ".partial",
    ]
    assert seed_name(start, MIB) == wal_name(2, 4) + ".partial"
    seeded = segments([*names[:3], seed_name(start, MIB)], MIB)
    assert behind(seeded) == start and seeded[-1].name == seed_name(start, MIB)


def reader(data: bytes) -> Callable[[int, int], bytes]:
    return lambda size, offset: data[offset : offset + size]


def pages(number: int, count: int, tail: bytes = b"") -> bytes:
    """A segment with this many whole pages of WAL and the beginning of another one."""
    whole = b""
    for page in range(count):
        whole += header(1, number * MIB + page * 8192).ljust(8192, b"x")
    if tail:
        whole += header(1, number * MIB + count * 8192)[:24] + tail
    return whole.ljust(MIB, b"\0")


@pytest.mark.parametrize("count", [1, 2, 3, 64, 127, 128])
def test_written_part_of_a_segment_is_found(count: int) -> None:
    name = wal_name(1, 7) + ".partial"
    assert written(reader(pages(7, count)), name, MIB) == Lsn(7 * MIB + count * 8192)
    if count < 128:
        assert written(reader(pages(7, count, b"abc\0\0")), name, MIB) == Lsn(7 * MIB + count * 8192 + 27)


def test_nothing_is_written_in_a_file_of_zeros_or_of_another_position() -> None:
    name = wal_name(1, 7) + ".partial"
    assert written(reader(bytes(MIB)), name, MIB) is None
    assert written(reader(b""), name, MIB) is None
    assert written(reader(pages(8, 3)), name, MIB) is None
