# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""History files, and the tree that they form."""

from __future__ import annotations

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.plugins.module_utils.timeline import Span, Switch, TimelineTree, parse_history
from ansible_collections.pgdrill.pitr.plugins.module_utils.wal import Lsn
from hypothesis import given
from hypothesis import strategies as st

# As PostgreSQL 18 writes it; the reason of an LSN or a time ends with a line feed of its own.
WRITTEN = "1\t0/3001EC0\tbefore LSN 0/3001EC0\n\n\n2\t0/5000000\tno recovery target specified\n"


@st.composite
def ancestries(draw: st.DrawFn) -> list[tuple[int, int]]:
    """Ascending (timeline, LSN) of a history file."""
    timelines = draw(st.lists(st.integers(1, 2**31), min_size=1, max_size=6, unique=True).map(sorted))
    lsns = draw(st.lists(st.integers(0, 2**64 - 1), min_size=len(timelines), max_size=len(timelines)).map(sorted))
    return list(zip(timelines, lsns, strict=True))


def test_history_file_of_a_server_is_read() -> None:
    first, second = parse_history(3, WRITTEN)
    assert (first.timeline, first.lsn, first.reason) == (1, Lsn.parse("0/3001EC0"), "before LSN 0/3001EC0")
    assert (second.timeline, second.lsn, second.reason) == (2, Lsn.parse("0/5000000"), "no recovery target specified")


def test_comments_empty_lines_spaces_and_missing_reasons_are_read() -> None:
    text = '# by hand\n\n  1   0/100\n\t# more\n2 A/200   at restore point "a b"  \r\n'
    assert parse_history(3, text) == [Switch(1, Lsn(0x100), ""), Switch(2, Lsn.parse("A/200"), "")]
    assert parse_history(3, text)[1].reason == 'at restore point "a b"'


@pytest.mark.parametrize("character", ["\x0b", "\x0c", "\x1c", "\x85", "\u2028", "�"])
def test_reason_with_a_character_that_only_python_takes_for_a_line_break_stays_one_line(character: str) -> None:
    (switch,) = parse_history(2, f'1\t0/100\tat restore point "a{character}b"\n')
    assert switch.reason == f'at restore point "a{character}b"'


@pytest.mark.parametrize(
    ("timeline", "text", "why"),
    [
        (2, "", "names no parent"),
        (2, "\n# nothing\n", "names no parent"),
        (2, "1", "line 1"),
        (2, "1\t0", "line 1"),
        (2, "1\t0/XYZ\treason", "line 1"),
        (2, "one\t0/100\treason", "line 1"),
        (2, "1\t0/100\treason\nrubbish", "line 2"),
        (2, "-1\t0/100", "line 1"),
        (2, "0\t0/100", "line 1"),
        (2, "\x00\x00\x00", "line 1"),
        (2, "2\t0/100", "parent timeline 2 is not older than 2"),
        (2, "3\t0/100", "parent timeline 3 is not older than 2"),
        (1, "1\t0/100", "parent timeline 1 is not older than 1"),
        (4, "2\t0/100\n1\t0/200", "must ascend"),
        (4, "1\t0/100\n1\t0/200", "must ascend"),
    ],
)
def test_malformed_history_is_refused_with_its_name_and_line(timeline: int, text: str, why: str) -> None:
    with pytest.raises(PitrError) as caught:
        parse_history(timeline, text)
    assert f"{timeline:08X}.history" in caught.value.message
    assert why in caught.value.message


def test_timeline_1_has_no_parent_and_needs_none() -> None:
    assert parse_history(1, "") == []
    with pytest.raises(PitrError, match=r"00000002\.history names no parent"):
        parse_history(2, "")


def test_switches_are_equal_when_timeline_and_position_are() -> None:
    switch = Switch(1, Lsn(0x100), "why")
    assert switch == Switch(1, Lsn(0x100), "whatever") and hash(switch) == hash(Switch(1, Lsn(0x100), ""))
    assert switch not in (Switch(2, Lsn(0x100), "why"), Switch(1, Lsn(0x101), "why"), (1, 0x100))


def test_two_switches_at_the_same_position_are_read() -> None:
    assert len(parse_history(3, "1\t0/100\n2\t0/100")) == 2


@given(
    ancestries(), st.sampled_from(["\n", "\n\n", "\r\n"]), st.text(st.characters(codec="ascii", categories=["L", "N"]))
)
def test_every_ascending_history_round_trips(ancestry: list[tuple[int, int]], end: str, reason: str) -> None:
    text = "".join(f"{timeline}\t{Lsn(lsn)}\t{reason}{end}" for timeline, lsn in ancestry)
    found = parse_history(ancestry[-1][0] + 1, text)
    assert [(switch.timeline, switch.lsn, switch.reason) for switch in found] == [(t, x, reason) for t, x in ancestry]


@given(ancestries(), st.data())
def test_cut_history_never_tells_another_past(ancestry: list[tuple[int, int]], data: st.DataObject) -> None:
    """A truncated file is refused, or it tells a beginning of the truth with at most its last position shortened."""
    text = "".join(f"{timeline}\t{Lsn(lsn)}\treason\n" for timeline, lsn in ancestry)
    cut = data.draw(st.integers(0, len(text)))
    try:
        found = parse_history(ancestry[-1][0] + 1, text[:cut])
    except PitrError:
        return
    assert [switch.timeline for switch in found] == [timeline for timeline, _lsn in ancestry[: len(found)]]


# 1 ──┬── 2 ──── 4      2 leaves 1 at 0x300, 3 leaves 1 at 0x500, 4 leaves 2 at 0x400
#     └── 3
TREE = TimelineTree(
    {
        2: [Switch(1, Lsn(0x300), "")],
        3: [Switch(1, Lsn(0x500), "")],
        4: [Switch(1, Lsn(0x300), ""), Switch(2, Lsn(0x400), "")],
    },
    frozenset({1, 2, 7}),
)


def spans(path: list[Span]) -> list[tuple[int, int, int | None]]:
    return [(span.timeline, int(span.begin), None if span.end is None else int(span.end)) for span in path]


def test_path_goes_from_the_beginning_of_wal_to_the_timeline() -> None:
    assert spans(TREE.path(1)) == [(1, 0, None)]
    assert spans(TREE.path(3)) == [(1, 0, 0x500), (3, 0x500, None)]
    assert spans(TREE.path(4)) == [(1, 0, 0x300), (2, 0x300, 0x400), (4, 0x400, None)]


def test_path_of_a_timeline_without_history_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(PitrError, match=r"no 00000007\.history.*Known timelines: 1, 2, 3, 4\."):
        TREE.path(7)


@pytest.mark.parametrize(
    ("timeline", "point", "lsn", "part"),
    [
        (1, 1, 0x999, True),
        (2, 1, 0x2FF, True),
        (2, 1, 0x300, True),
        (2, 1, 0x301, False),
        (2, 2, 0x2FF, False),
        (2, 2, 0x300, True),
        (2, 2, 0x999, True),
        (2, 3, 0x600, False),
        (3, 1, 0x301, True),
        (4, 1, 0x300, True),
        (4, 1, 0x301, False),
        (4, 2, 0x400, True),
        (4, 2, 0x401, False),
        (4, 3, 0x400, False),
        (1, 2, 0x999, False),
    ],
)
def test_point_is_part_of_the_past_only_up_to_the_switch(timeline: int, point: int, lsn: int, part: bool) -> None:
    assert TREE.contains(timeline, point, Lsn(lsn)) is part


def test_newest_timeline_is_the_highest_with_a_history() -> None:
    assert TREE.newest == 4
    assert TimelineTree({}).newest == 1
    assert TimelineTree({}, frozenset({1, 2})).newest == 1


def test_known_timelines_and_histories_are_told_apart() -> None:
    assert TREE.timelines == [1, 2, 3, 4, 7]
    assert TREE.histories == [2, 3, 4]


def test_parent_is_the_last_ancestor() -> None:
    parent = TREE.parent(4)
    assert parent is not None and (parent.timeline, parent.lsn) == (2, 0x400)
    assert TREE.parent(1) is None
    assert TREE.parent(7) is None


@given(ancestries())
def test_path_is_unbroken_and_open_only_at_its_end(ancestry: list[tuple[int, int]]) -> None:
    timeline = ancestry[-1][0] + 1
    path = TimelineTree({timeline: [Switch(t, Lsn(lsn), "") for t, lsn in ancestry]}).path(timeline)
    assert path[0].begin == 0 and path[-1].timeline == timeline and path[-1].end is None
    assert all(left.end == right.begin for left, right in zip(path, path[1:], strict=False))
    assert all(span.end is None or span.begin < span.end for span in path)
    assert {span.timeline for span in path} <= {t for t, _lsn in ancestry} | {timeline}


def test_path_leaves_out_a_timeline_that_the_recovery_never_came_to() -> None:
    """Timeline 3 was restored to 0/150 along timeline 2, which began at 0/200: the positions descend."""
    path = TimelineTree({3: parse_history(3, "1\t0/200\tafter transaction 9\n2\t0/150\tafter transaction 7\n")}).path(3)
    assert [(span.timeline, span.begin, span.end) for span in path] == [(1, 0, 0x150), (3, 0x150, None)]
