# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The plan: examples of every refusal, and random worlds against a simulation of what PostgreSQL would read.

The simulation goes through the archive segment by segment as xlogrecovery.c does and knows nothing of the plan's code.
It takes every position for the beginning of a record, and a transaction's end for a position with a time.
"""

from __future__ import annotations

import dataclasses
import datetime

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils.catalog import Backup
from ansible_collections.pgdrill.pitr.plugins.module_utils.index import ArchiveIndex
from ansible_collections.pgdrill.pitr.plugins.module_utils.plan import Location, RefusedError, RestorePlan, plan
from ansible_collections.pgdrill.pitr.plugins.module_utils.target import RecoveryTarget
from ansible_collections.pgdrill.pitr.plugins.module_utils.timeline import parse_history
from ansible_collections.pgdrill.pitr.plugins.module_utils.wal import Lsn
from ansible_collections.pgdrill.pitr.tests.unit.support import EPOCH, MIB, history, make_backup, wal_name
from hypothesis import event, given, settings
from hypothesis import strategies as st

# Positions of the random worlds are quarters of a segment.
QUARTER = MIB // 4
LAST = 40


def archive(segments: dict[int, list[int]], histories: dict[int, str] | None = None) -> ArchiveIndex:
    index = ArchiveIndex(MIB)
    for timeline, numbers in segments.items():
        for number in sorted(numbers):
            index.add(timeline, number)
    for timeline, text in (histories or {}).items():
        index.add_history(timeline, parse_history(timeline, text))
    return index


def target(**options: object) -> RecoveryTarget:
    return RecoveryTarget.from_options({f"recovery_{name}": value for name, value in options.items()})


def refused(*arguments: object, **options: object) -> RefusedError:
    with pytest.raises(RefusedError) as caught:
        plan(*arguments, **options)  # type: ignore[arg-type]
    error = caught.value
    assert error.message.startswith("The restore is refused; nothing was touched.")
    for refusal in error.refusals:
        assert f"[{refusal.code}] {refusal.message} {refusal.nearest}".rstrip() in error.message
    assert not error.message.endswith(" ")
    assert error.detail == {"refusals": [refusal.to_dict() for refusal in error.refusals]}
    return error


def refusal(*arguments: object, **options: object) -> tuple[str, str]:
    """(code, message and what is nearest) of the only refusal."""
    (found,) = refused(*arguments, **options).refusals
    return found.code, f"{found.message} {found.nearest}"


# Backup b1 ends in segment 2, b2 in segment 6; 2 to 9 are archived.
B1 = make_backup("b1", minute=0)
B2 = make_backup("b2", start=6 * MIB + 40, stop=6 * MIB + 256, minute=10)
WHOLE = archive({1: list(range(2, 10))})


# --- Which backup


def test_end_of_the_archive_begins_with_the_newest_backup() -> None:
    found = plan([B1, B2], WHOLE, target())
    assert found.backup == B2
    assert (found.first_segment, found.last_segment, found.segments) == (wal_name(1, 6), wal_name(1, 9), 4)
    assert found.wal_bytes == 4 * MIB and found.end_lsn == 10 * MIB


def test_order_of_the_backups_does_not_matter() -> None:
    assert plan([B2, B1], WHOLE, target()).backup == B2


@pytest.mark.parametrize(
    ("lsn", "label"),
    [
        (6 * MIB + 257, "b2"),
        (6 * MIB + 256, "b2"),
        (6 * MIB + 255, "b1"),
        (6 * MIB + 40, "b1"),
        (2 * MIB + 256, "b1"),
    ],
)
def test_backup_is_chosen_by_its_stop_and_not_by_its_start(lsn: int, label: str) -> None:
    assert plan([B1, B2], WHOLE, target(target_lsn=str(Lsn(lsn)))).backup.label == label


@pytest.mark.parametrize(("seconds", "label"), [(1, "b2"), (0, "b2"), (-1, "b1"), (-29, "b1"), (-300, "b1")])
def test_backup_of_a_time_target_had_stopped_before_it(seconds: int, label: str) -> None:
    time = B2.stopped_at + datetime.timedelta(seconds=seconds)
    late = B2.stopped_at + datetime.timedelta(hours=1)
    assert plan([B1, B2], WHOLE, target(target_time=time.isoformat()), last_commit=late).backup.label == label


@pytest.mark.parametrize("option", ["target_xid", "target_name"])
@pytest.mark.parametrize(("lsn", "label"), [(6 * MIB + 256, "b2"), (6 * MIB + 255, "b1")])
def test_backup_of_a_transaction_or_name_stopped_before_its_record(option: str, lsn: int, label: str) -> None:
    found = plan([B1, B2], WHOLE, target(**{option: "745"}), location=Location(Lsn(lsn), 1))
    assert found.backup.label == label and found.last_segment == wal_name(1, 6)


def test_immediate_needs_the_wal_of_the_backup_only() -> None:
    index = archive({1: [2, 3, 6]})
    found = plan([B1, B2], index, target(target="immediate"))
    assert (found.backup, found.segments, found.last_segment) == (B2, 1, wal_name(1, 6))


def test_backup_that_stops_on_a_border_needs_nothing_beyond_it() -> None:
    backup = make_backup("b", start=6 * MIB + 40, stop=7 * MIB)
    assert plan([backup], archive({1: [6]}), target(target="immediate")).segments == 1


def test_damaged_backup_is_passed_over_and_noted() -> None:
    found = plan([B1, B2], WHOLE, target(), damaged={"b2": "base.tar is cut"})
    assert found.backup == B1 and found.segments == 8
    assert found.notes == ("backup b2 is passed over: base.tar is cut",)


def test_backup_that_was_named_is_taken_although_a_newer_one_fits() -> None:
    assert plan([B1, B2], WHOLE, target(), choice="b1").backup == B1
    assert plan([B1, B2], WHOLE, target(), choice="latest").backup == B2


def test_gap_before_the_newest_backup_does_not_matter() -> None:
    assert plan([B1, B2], archive({1: [2, 3, 5, 6, 7]}), target()).backup == B2


def test_gap_behind_the_target_does_not_matter() -> None:
    index = archive({1: [2, 3, 4, 7, 8]})
    assert plan([B1], index, target(target_lsn=str(Lsn(4 * MIB + 5)))).last_segment == wal_name(1, 4)
    assert plan([B1], index, target(target_xid="745"), location=Location(Lsn(4 * MIB), 1)).segments == 3


def test_time_that_is_reached_before_a_gap_is_planned() -> None:
    """The last transaction before the gap ended later than the target, so the recovery stops before it gets there."""
    index = archive({1: [2, 3, 4, 7, 8]})
    commit = EPOCH + datetime.timedelta(minutes=5)
    early = target(target_time=(commit - datetime.timedelta(seconds=1)).isoformat())
    found = plan([B1], index, early, last_commit=commit)
    assert found.backup == B1 and found.last_segment == wal_name(1, 4)
    late = target(target_time=(commit + datetime.timedelta(seconds=1)).isoformat())
    code, text = refusal([B1], index, late, last_commit=commit)
    assert code == "archive_gap" and wal_name(1, 5) in text


def test_backup_that_was_taken_meanwhile_and_needs_less_wal_is_found() -> None:
    """Two at a time: the one that ended last began before the hole."""
    long = make_backup("long", start=3 * MIB, stop=7 * MIB + 256, minute=20)
    short = make_backup("short", start=6 * MIB, stop=6 * MIB + 256, minute=15)
    index = archive({1: [2, 3, 5, 6, 7, 8]})
    found = plan([B1, long, short], index, target(target_lsn=str(Lsn(8 * MIB))))
    assert found.backup == short and any("long is passed over" in note for note in found.notes)
    assert plan([long, short], index, target()).backup == short
    # The newest has to be made consistent itself where any end would do.
    assert refusal([long, short], archive({1: [2, 3, 5, 6]}), target())[0] == "archive_gap"
    assert refusal([long, short], index, target(target="immediate"))[0] == "archive_gap"


def test_all_that_is_wrong_with_a_target_is_told() -> None:
    codes = [item.code for item in refused([B1], archive({1: [2, 4]}), target(target_lsn=str(Lsn(9 * MIB)))).refusals]
    assert codes == ["archive_gap", "target_beyond_archive"]
    error = refused([B1], WHOLE, target(target_lsn=str(Lsn(50 * MIB))), choice="mine")
    assert [item.code for item in error.refusals] == ["backup_not_found", "target_beyond_archive"]
    error = refused([B1], WHOLE, target(target_timeline="7"), choice="mine")
    assert [item.code for item in error.refusals] == ["backup_not_found", "timeline_unknown"]


def test_timelines_that_backups_lead_to_are_told() -> None:
    late = make_backup("late", start=7 * MIB, stop=7 * MIB + 9)
    index = archive({1: list(range(2, 10)), 2: [6, 7]}, {2: history((1, str(Lsn(6 * MIB + 40))))})
    assert "backups lead to 1." in refusal([late], index, target())[1]


def test_plan_is_told_in_full() -> None:
    shown = plan([B1], WHOLE, target(target_lsn="0/300010", target_inclusive=False, target_action="pause")).to_dict()
    assert shown == {
        "backup": "b1",
        "chain": ["b1"],
        "backup_timeline": 1,
        "start_lsn": str(B1.start_lsn),
        "consistent_lsn": str(B1.stop_lsn),
        "target": "lsn 0/300010 (exclusive)",
        "target_kind": "lsn",
        "target_value": "0/300010",
        "target_inclusive": False,
        "target_action": "pause",
        "timeline": 1,
        "timeline_path": [{"timeline": 1, "from": str(B1.start_lsn), "to": None}],
        "first_segment": wal_name(1, 2),
        "last_segment": wal_name(1, 3),
        "segments": 2,
        "wal_bytes": 2 * MIB,
        "end_lsn": "0/300010",
        "backup_bytes": 1000,
        "in_place": False,
        "notes": [],
        "from_receiver": [],
        "from_pg_wal": [],
        "at_least": None,
        "target_lsn": "0/300010",
    }


# --- Refusals


def test_no_backup_is_refused() -> None:
    assert refusal([], WHOLE, target())[0] == "no_backup"


def test_backups_that_are_all_damaged_are_refused_with_what_is_wrong_with_them() -> None:
    code, text = refusal([B1, B2], WHOLE, target(), damaged={"b1": "base.tar is cut", "b2": "no manifest"})
    assert code == "backup_damaged" and "b1: base.tar is cut" in text and "b2: no manifest" in text
    assert refusal([B1, B2], WHOLE, target(), choice="b1", damaged={"b1": "cut"})[0] == "backup_damaged"
    assert refusal([B1, B2], WHOLE, target(), choice="latest", damaged={"b2": "cut"})[0] == "backup_damaged"


def test_unknown_backup_is_refused_with_those_that_are_there() -> None:
    code, text = refusal([B1, B2], WHOLE, target(), choice="b3")
    assert code == "backup_not_found" and "There are: b1, b2." in text


@pytest.mark.parametrize(
    "option",
    [
        {"target_lsn": str(Lsn(2 * MIB + 255))},
        {"target_time": (B1.stopped_at - datetime.timedelta(microseconds=1)).isoformat()},
    ],
)
def test_target_before_the_end_of_the_first_backup_is_refused_with_the_earliest_point(option: dict[str, str]) -> None:
    code, text = refusal([B2, B1], WHOLE, target(**option), last_commit=EPOCH + datetime.timedelta(hours=1))
    assert code == "target_before_first_backup" and "oldest usable backup (b1)" in text
    assert "2026-03-01 12:00:00.000000+00:00" in text and str(B1.stop_lsn) in text


@pytest.mark.parametrize("choice", ["b2", "latest"])
def test_target_before_the_end_of_the_named_backup_is_refused_although_another_fits(choice: str) -> None:
    code, text = refusal([B1, B2], WHOLE, target(target_lsn="0/300000"), choice=choice)
    assert code == "target_before_backup" and "chosen backup (b2)" in text and str(B2.stop_lsn) in text


@pytest.mark.parametrize(
    ("option", "word"), [({"target_xid": "745"}, "transaction 745"), ({"target_name": "p"}, "restore point 'p'")]
)
def test_target_that_was_not_found_is_refused_with_what_can_be_restored(option: dict[str, str], word: str) -> None:
    code, text = refusal([B1, B2], WHOLE, target(**option))
    assert code == "target_not_in_archive" and word in text
    assert f"LSN {B1.stop_lsn}, to LSN {Lsn(10 * MIB)}" in text


@pytest.mark.parametrize(
    ("numbers", "names"),
    [
        ([2, 3, 5, 6], [4]),
        ([2, 3, 6], [4, 5]),
        ([3, 4], [2]),
        ([], [2]),
        ([2, 8], [3, 4, 5, 6, 7]),
        ([2, 20], [3, 4, 5, 6, 7]),
    ],
)
def test_gap_in_the_way_is_refused_with_the_names_that_are_missing(numbers: list[int], names: list[int]) -> None:
    code, text = refusal([B1], archive({1: numbers}), target())
    assert code == "archive_gap"
    for number in range(1, 25):
        assert (wal_name(1, number) in text) == (number in names)
    assert (" and more" in text) == (len(numbers) == 2 and numbers[1] == 20)


def test_gap_is_refused_with_the_point_up_to_which_all_is_well() -> None:
    assert f"WAL is whole up to LSN {Lsn(4 * MIB)}." in refusal([B1], archive({1: [2, 3, 5]}), target())[1]
    assert "cannot be made consistent" in refusal([B1], archive({1: [3]}), target())[1]
    border = make_backup("b", start=2 * MIB + 40, stop=3 * MIB)
    assert f"WAL is whole up to LSN {Lsn(3 * MIB)}." in refusal([border], archive({1: [2, 4]}), target())[1]


@pytest.mark.parametrize("lsn", [10 * MIB, 10 * MIB + 1, 50 * MIB])
def test_lsn_behind_the_end_of_the_archive_is_refused_with_the_end(lsn: int) -> None:
    code, text = refusal([B1], WHOLE, target(target_lsn=str(Lsn(lsn))))
    assert code == "target_beyond_archive" and f"to LSN {Lsn(10 * MIB)}" in text
    plan([B1], WHOLE, target(target_lsn=str(Lsn(10 * MIB - 1))))
    text = refusal([B1], WHOLE, target(target_lsn=str(Lsn(lsn))), last_commit=EPOCH)[1]
    assert "last transaction 2026-03-01 12:00:00.000000+00:00" in text


@pytest.mark.parametrize(
    ("microseconds", "inclusive", "fits"),
    [(-1, True, True), (0, True, False), (1, True, False), (-1, False, True), (0, False, True), (1, False, False)],
)
def test_time_needs_a_later_transaction_in_the_archive(microseconds: int, inclusive: bool, fits: bool) -> None:
    commit = EPOCH + datetime.timedelta(minutes=5)
    asked = target(
        target_time=(commit + datetime.timedelta(microseconds=microseconds)).isoformat(), target_inclusive=inclusive
    )
    if fits:
        assert plan([B1], WHOLE, asked, last_commit=commit).backup == B1
    else:
        code, text = refusal([B1], WHOLE, asked, last_commit=commit)
        assert code == "target_beyond_archive" and "2026-03-01 12:05:00.000000+00:00" in text


# --- Timelines

# 2 left 1 in the middle of segment 6; timeline 1 went on to 9.
SWITCH = 6 * MIB + 2 * QUARTER
HISTORIES = {2: history((1, str(Lsn(SWITCH))))}
BRANCHED = archive({1: list(range(2, 10)), 2: [6, 7, 8]}, HISTORIES)
PARENT_ONLY = archive({1: list(range(2, 10))}, HISTORIES)


def test_latest_follows_the_newest_timeline_across_the_switch() -> None:
    found = plan([B1], BRANCHED, target())
    assert (found.timeline, found.segments, found.last_segment) == (2, 7, wal_name(2, 8))
    assert [(span.timeline, span.begin, span.end) for span in found.spans] == [
        (1, B1.start_lsn, SWITCH),
        (2, SWITCH, None),
    ]
    assert found.to_dict()["timeline_path"] == [
        {"timeline": 1, "from": str(B1.start_lsn), "to": str(Lsn(SWITCH))},
        {"timeline": 2, "from": str(Lsn(SWITCH)), "to": None},
    ]


def test_older_timeline_is_followed_when_it_is_named() -> None:
    found = plan([B1], BRANCHED, target(target_timeline="1"))
    assert (found.timeline, found.last_segment) == (1, wal_name(1, 9))
    assert plan([B1], BRANCHED, target(target_timeline="current")).timeline == 1


def test_current_is_the_timeline_of_the_backup_that_was_named() -> None:
    late = make_backup("late", timeline=2, start=7 * MIB, stop=7 * MIB + 9, minute=20)
    assert plan([B1, late], BRANCHED, target(target_timeline="current")).timeline == 2
    assert plan([B1, late], BRANCHED, target(target_timeline="current"), choice="b1").timeline == 1


def test_backup_of_an_abandoned_branch_is_not_taken() -> None:
    stray = make_backup("stray", start=7 * MIB + 40, stop=7 * MIB + 256, minute=30)
    assert plan([B1, stray], BRANCHED, target()).backup == B1
    assert plan([B1, stray], BRANCHED, target(target_timeline="1")).backup == stray
    code, text = refusal([stray], BRANCHED, target())
    assert code == "no_backup_on_timeline" and "stray on timeline 1" in text
    assert refusal([B1, stray], BRANCHED, target(), choice="stray")[0] == "no_backup_on_timeline"


@pytest.mark.parametrize("stop", [SWITCH - 1, SWITCH])
def test_backup_that_stopped_at_or_before_the_switch_leads_to_the_new_timeline(stop: int) -> None:
    assert plan([make_backup("b", start=6 * MIB, stop=stop)], BRANCHED, target()).timeline == 2


def test_backup_that_stopped_behind_the_switch_does_not() -> None:
    late = make_backup("b", start=6 * MIB, stop=SWITCH + 1)
    assert refusal([late], BRANCHED, target())[0] == "no_backup_on_timeline"


def test_timeline_without_history_is_refused_by_its_number() -> None:
    code, text = refusal([B1], BRANCHED, target(target_timeline="3"))
    assert code == "timeline_unknown" and "no 00000003.history" in text and "1, 2" in text


def test_latest_does_not_fall_back_when_the_newest_history_is_missing() -> None:
    index = archive({1: [2, 3], 2: [3, 4]})
    code, text = refusal([B1], index, target())
    assert code == "timeline_unknown" and "no 00000002.history" in text
    assert plan([B1], index, target(target_timeline="1")).last_segment == wal_name(1, 3)


def test_timeline_of_a_backup_without_history_is_refused_by_name() -> None:
    backup = make_backup("b", timeline=2)
    code, text = refusal(
        [B1, dataclasses.replace(backup, stopped_at=EPOCH + datetime.timedelta(hours=1))],
        archive({1: [2, 3]}),
        target(target_timeline="current"),
    )
    assert code == "timeline_unknown" and "no 00000002.history" in text


def test_switch_segment_is_wanted_from_the_new_timeline_when_it_has_later_ones() -> None:
    """`get` would say that there is a hole, and the recovery would end."""
    index = archive({1: list(range(2, 10)), 2: [7, 8]}, HISTORIES)
    code, text = refusal([B1], index, target())
    assert code == "archive_gap" and wal_name(2, 6) in text


@pytest.mark.parametrize(
    "options",
    [
        {"target": target()},
        {"target": target(target_lsn=str(Lsn(SWITCH + 1)), target_inclusive=False)},
        {"target": target(target_lsn=str(Lsn(SWITCH)))},
        {"target": target(target_xid="745"), "location": Location(Lsn(SWITCH), 2)},
        {"target": target(target_time=(EPOCH + datetime.timedelta(minutes=5)).isoformat())},
    ],
    ids=["latest", "lsn", "lsn-inclusive", "xid", "time"],
)
def test_parents_copy_of_the_switch_segment_is_refused_for_what_may_lie_behind_the_switch(
    options: dict[str, object],
) -> None:
    """PostgreSQL reads the parent's segment to its end and goes on with the parent's next one: the wrong branch."""
    code, text = refusal([B1], PARENT_ONLY, **options)
    assert code == "timeline_not_archived"
    assert str(Lsn(SWITCH)) in text and "recovery_target_timeline: 1" in text


@pytest.mark.parametrize(
    "options",
    [
        {"target": target(target_lsn=str(Lsn(SWITCH)), target_inclusive=False)},
        {"target": target(target_lsn=str(Lsn(6 * MIB - 1)))},
        {"target": target(target_xid="745"), "location": Location(Lsn(SWITCH - 1), 1)},
        {
            "target": target(target_time=(EPOCH + datetime.timedelta(minutes=5)).isoformat()),
            "last_commit": EPOCH + datetime.timedelta(minutes=6),
        },
        {"target": target(target="immediate")},
    ],
    ids=["lsn-exclusive", "lsn-before", "xid", "time", "immediate"],
)
def test_parents_copy_of_the_switch_segment_will_do_for_what_stops_before_the_switch(
    options: dict[str, object],
) -> None:
    found = plan([B1], PARENT_ONLY, **options)  # type: ignore[arg-type]
    assert found.timeline == 2
    assert found.last_segment.startswith("00000001")


def test_backup_that_stops_in_the_parents_copy_can_be_made_consistent_from_it() -> None:
    backup = make_backup("b", start=6 * MIB, stop=SWITCH - 1)
    assert plan([backup], PARENT_ONLY, target(target="immediate")).last_segment == wal_name(1, 6)
    assert refusal([backup], PARENT_ONLY, target())[0] == "timeline_not_archived"


def test_grandparents_copy_does_not_stand_in_for_the_parents_segment() -> None:
    """3 left 2 in segment 7. Without 2's segment 6, PostgreSQL would replay 1's to its end, and fail in segment 7."""
    pasts = {**HISTORIES, 3: history((1, str(Lsn(SWITCH))), (2, str(Lsn(7 * MIB + QUARTER))))}
    whole = archive({1: list(range(2, 10)), 2: [6], 3: [7, 8]}, pasts)
    assert plan([B1], whole, target()).last_segment == wal_name(3, 8)
    young = archive({1: list(range(2, 10)), 2: [6, 7]}, pasts)
    assert plan([B1], young, target(target_lsn=str(Lsn(4 * MIB)))).last_segment == wal_name(1, 4)
    assert plan([B1], young, target(target_lsn=str(Lsn(7 * MIB)), target_inclusive=False)).last_segment == wal_name(
        2, 7
    )
    code, text = refusal([B1], archive({1: list(range(2, 10)), 3: [7, 8]}, pasts), target())
    assert code == "archive_gap" and wal_name(2, 6) in text


def test_last_commit_says_nothing_of_targets_that_are_no_time() -> None:
    for asked in (target(target_lsn=str(Lsn(9 * MIB))), target(target="immediate"), target()):
        assert plan([B1], WHOLE, asked, last_commit=EPOCH).backup == B1
    assert refusal([B1], archive({1: [2, 3, 5]}), target(), last_commit=EPOCH)[0] == "archive_gap"


def test_switch_on_a_border_needs_the_new_timelines_own_segment() -> None:
    border = {2: history((1, str(Lsn(6 * MIB))))}
    assert plan([B1], archive({1: [2, 3, 4, 5], 2: [6]}, border), target()).last_segment == wal_name(2, 6)
    assert refusal([B1], archive({1: [2, 3, 4, 5]}, border), target())[0] == "timeline_not_archived"


# --- Random worlds


def clock(timeline: int, position: int) -> datetime.datetime:
    """When a position was written: later along every path, and later on a child than on its parent."""
    return EPOCH + datetime.timedelta(minutes=position + 1000 * timeline)


@dataclasses.dataclass
class World:
    """Positions in quarters of a segment. ``switches``: child → (parent, position)."""

    switches: dict[int, tuple[int, int]]
    segments: dict[int, set[int]]
    backups: list[Backup]
    commits: list[tuple[int, int]]
    damaged: dict[str, str]

    def ancestors(self, timeline: int) -> list[tuple[int, int]]:
        """The history file: (timeline, where it was left), oldest first."""
        if timeline == 1:
            return []
        parent, position = self.switches[timeline]
        return [*self.ancestors(parent), (parent, position)]

    def owner(self, timeline: int, position: int) -> int:
        """On which timeline a position of this one's past was written (tliOfPointInHistory, newest first)."""
        begin = self.switches[timeline][1] if timeline > 1 else 0
        if position >= begin:
            return timeline
        return self.owner(self.switches[timeline][0], position)

    def index(self) -> ArchiveIndex:
        texts = {
            child: history(*((parent, str(Lsn(at * QUARTER))) for parent, at in self.ancestors(child)))
            for child in self.switches
        }
        return archive({timeline: sorted(numbers) for timeline, numbers in self.segments.items()}, texts)


class Fatal(Exception):
    """restore_command has said that something is wrong, or the server finds its target impossible."""


@dataclasses.dataclass
class Outcome:
    """What a recovery came to. ``read``: the timeline that each segment was read from, up to the one it stopped in."""

    end: int
    exact: bool
    read: dict[int, int]
    borrowed: bool


def recover(world: World, backup: Backup, timeline: int, asked: RecoveryTarget, location: Location | None) -> Outcome:
    """What PostgreSQL does. Raises Fatal where it gives up."""
    ancestors = world.ancestors(timeline)
    entries = [(timeline, ancestors[-1][1] if ancestors else 0)]
    for place in range(len(ancestors) - 1, -1, -1):
        entries.append((ancestors[place][0], ancestors[place - 1][1] if place else 0))

    def fetch(tli: int, number: int) -> bool:
        """The answer of pitr-wal get."""
        there = world.segments.get(tli, set())
        if number in there:
            return True
        if any(other > number for other in there):
            raise Fatal(f"hole at {tli}/{number}")
        return False

    def read_any(number: int, current: int) -> int:
        """XLogFileReadAnyTLI: newest first, never back behind the timeline of the segment before; 0 at the end."""
        for tli, begin in entries:
            if tli < current:
                break
            if number < begin // 4:
                continue
            if fetch(tli, number):
                return tli
        return 0

    position, stop = backup.start_lsn // QUARTER, backup.stop_lsn // QUARTER
    current, exact, borrowed = 0, True, False
    read: dict[int, int] = {}

    def done(end: int, applied: int) -> Outcome:
        """``applied``: first position that was not replayed."""
        if end < stop and applied <= stop - 1:
            raise Fatal("the target lies before the consistent point")
        return Outcome(applied, exact, read, borrowed)

    while True:
        number = position // 4
        current = read_any(number, current)
        if not current:
            if asked.kind != "latest":
                raise Fatal("recovery ended before the target was reached")
            if position < stop:
                raise Fatal("WAL ends before the end of the backup")
            exact = exact and world.owner(timeline, position) == timeline and position > entries[0][1]
            return Outcome(position, exact or (timeline == backup.timeline and exact), read, borrowed)
        read[number] = current
        expected = next(tli for tli, begin in entries if number >= begin // 4)
        borrowed = borrowed or current != expected
        while position < (number + 1) * 4:
            written_on = world.owner(current, position)
            right = written_on == world.owner(timeline, position)
            if asked.kind == "immediate" and position >= stop:
                return done(position, position)
            if asked.lsn is not None and position * QUARTER >= asked.lsn:
                if asked.inclusive:
                    exact = exact and right
                return done(position, position)
            if location is not None and (written_on, position) == (location.timeline, location.lsn // QUARTER):
                return done(position, position)
            if asked.time is not None and (written_on, position) in world.commits:
                time = clock(written_on, position)
                if time > asked.time or (time == asked.time and not asked.inclusive):
                    return done(position, position)
            exact = exact and right
            position += 1
        if asked.kind == "immediate" and position >= stop:
            return done(position, position)


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """Up to four timelines; holes, backups anywhere, archives that end early or go on behind a switch."""
    switches: dict[int, tuple[int, int]] = {}
    segments: dict[int, set[int]] = {1: set(range(1, draw(st.integers(2, 11))))}
    for timeline in range(2, draw(st.integers(1, 4)) + 1):
        parent = draw(st.integers(1, timeline - 1))
        at = draw(st.integers(6, LAST))
        switches[timeline] = (parent, at)
        segments[timeline] = set(range(at // 4, draw(st.integers(at // 4, at // 4 + 4))))
    for numbers in segments.values():
        if draw(st.booleans()) and numbers:
            numbers.discard(draw(st.sampled_from(sorted(numbers))))
    backups: list[Backup] = []
    for place in range(draw(st.integers(1, 4))):
        timeline = draw(st.integers(1, len(switches) + 1))
        start = max(draw(st.integers(4, LAST)), switches[timeline][1] if timeline > 1 else 0)
        stop = start + draw(st.integers(1, 6))
        while any(backup.stop_lsn == stop * QUARTER for backup in backups):
            stop += 1
        minutes = (clock(timeline, stop) - EPOCH).total_seconds() / 60
        backups.append(make_backup(f"b{place}", timeline, start * QUARTER, stop * QUARTER, minutes))
    places = st.tuples(st.integers(1, len(switches) + 1), st.integers(4, LAST + 8))
    commits = [
        (timeline, at)
        for timeline, at in draw(st.lists(places, min_size=4, max_size=20, unique=True))
        if timeline == 1 or at >= switches[timeline][1]
    ]
    labels = [backup.label for backup in backups]
    damaged = dict.fromkeys(draw(st.lists(st.sampled_from(labels), max_size=1)), "is cut")
    return World(switches, segments, backups, commits, damaged)


@st.composite
def questions(draw: st.DrawFn) -> tuple[World, RecoveryTarget, Location | None]:
    world = draw(worlds())
    newest = max(world.switches, default=1)
    options: dict[str, object] = {
        "target_inclusive": draw(st.booleans()),
        "target_timeline": draw(st.sampled_from(["latest", "current", *map(str, range(1, newest + 1))])),
    }
    kind = draw(st.sampled_from(["latest", "immediate", "lsn", "time", "xid"]))
    location = None
    if kind == "immediate":
        options["target"] = "immediate"
    elif kind == "lsn":
        options["target_lsn"] = str(Lsn(draw(st.integers(4, LAST + 8)) * QUARTER))
    elif kind == "time":
        base = clock(draw(st.integers(1, newest)), draw(st.integers(4, LAST + 8)))
        options["target_time"] = (base + datetime.timedelta(seconds=draw(st.sampled_from([-30, 0, 30])))).isoformat()
    elif kind == "xid":
        options["target_xid"] = "745"
        # It is looked for in archived segments only.
        found = [(t, at) for t, at in world.commits if at // 4 in world.segments.get(t, ())]
        if found:
            timeline, at = draw(st.sampled_from(found))
            location = Location(Lsn(at * QUARTER), timeline, clock(timeline, at))
    return world, target(**options), location


def timeline_of(world: World, asked: RecoveryTarget) -> int:
    if asked.timeline == "latest":
        return max(world.switches, default=1)
    if asked.timeline == "current":
        return max(world.backups, key=lambda backup: backup.stopped_at).timeline
    return int(asked.timeline)


def eligible(world: World, timeline: int, asked: RecoveryTarget, location: Location | None) -> list[Backup]:
    """Whole backups of the timeline's past that stopped before the target, newest first."""
    found = []
    for backup in world.backups:
        stop = backup.stop_lsn // QUARTER
        # A backup's last byte is the one before its stop.
        if backup.label in world.damaged or world.owner(timeline, stop - 1) != backup.timeline:
            continue
        before = True
        if asked.time is not None:
            before = backup.stopped_at <= asked.time
        elif asked.lsn is not None:
            before = backup.stop_lsn <= asked.lsn
        elif location is not None:
            before = backup.stop_lsn <= location.lsn
        if before:
            found.append(backup)
    return sorted(found, key=lambda backup: backup.stop_lsn, reverse=True)


def last_replayable(world: World, backup: Backup, timeline: int) -> datetime.datetime:
    """The time of the last transaction of the timeline's past that the archive holds without a hole from this backup.

    Without any, a time before all that this backup can be used for.
    """
    best = backup.stopped_at - datetime.timedelta(microseconds=1)
    number = backup.start_lsn // MIB
    while True:
        writers = [world.owner(timeline, position) for position in range(number * 4, number * 4 + 4)]
        own = number in world.segments.get(writers[-1], ())
        # The parent's copy ends it, and with something later on the new timeline it is a hole.
        later = any(other > number for other in world.segments.get(writers[-1], ()))
        readable = (
            set(writers) if own else {tli for tli in writers if not later and number in world.segments.get(tli, ())}
        )
        for tli, at in world.commits:
            if at // 4 == number and at >= backup.start_lsn // QUARTER and writers[at % 4] == tli and tli in readable:
                best = max(best, clock(tli, at))
        if not own:
            return best
        number += 1


@settings(deadline=None, max_examples=700)
@given(questions())
def test_plan_agrees_with_what_postgresql_would_do(question: tuple[World, RecoveryTarget, Location | None]) -> None:
    world, asked, location = question
    timeline = timeline_of(world, asked)
    if location is not None and world.owner(timeline, location.lsn // QUARTER) != location.timeline:
        location = None  # it lies on another branch, where nobody looks
    fitting = eligible(world, timeline, asked, location)
    last_commit = last_replayable(world, fitting[0], timeline) if asked.kind == "time" and fitting else None
    try:
        found: RestorePlan | None = plan(
            world.backups,
            world.index(),
            asked,
            damaged=world.damaged,
            location=location,
            last_commit=last_commit,
        )
        code = "planned"
    except RefusedError as error:
        found, code = None, error.refusals[0].code
    event(f"{asked.kind}: {code}")
    if found is None:
        if asked.kind == "xid" and location is None:
            assert code in ("target_not_in_archive", "no_backup_on_timeline", "backup_damaged")
            return
        # A backup that began earlier needs the same WAL to come to the same target; one that began later and ended
        # earlier was taken meanwhile, and can be named. Where any end will do, an older one could end before what the
        # newest lacks, and then it is right to say so instead of restoring less.
        older = [backup for backup in fitting if backup.start_lsn <= fitting[0].start_lsn]
        for backup in older[:1] if asked.kind in ("latest", "immediate") else older:
            try:
                outcome = recover(world, backup, timeline, asked, location)
            except Fatal:
                continue
            # A parent's copy of the switch segment may be refused although it would have done.
            assert not outcome.exact or outcome.borrowed, f"{code}, but {backup.label} would do: {outcome}"
        return
    assert found.timeline == timeline
    assert found.backup in fitting, "not whole, not of the timeline's past, or it stops behind the target"
    assert found.backup.stop_lsn == fitting[0].stop_lsn, "a newer one would do"
    outcome = recover(world, found.backup, timeline, asked, location)
    assert outcome.exact, "another branch would be replayed"
    last = found.backup.start_lsn // MIB + found.segments - 1
    if asked.kind == "time":
        # Where it stops is known to be before the end of what can be read, no more.
        assert max(outcome.read) <= last
    else:
        assert max(outcome.read) == last
    numbers = range(found.backup.start_lsn // MIB, max(outcome.read) + 1)
    assert set(outcome.read) == set(numbers), "segments are missing"
    assert found.first_segment == wal_name(found.backup.timeline, numbers[0])
    if asked.kind != "time" and not outcome.borrowed:
        assert found.last_segment == wal_name(outcome.read[last], last)
