# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What retention removes: rules by example, and random worlds in which the restore plan says what is still restorable.

A world is timelines with segments, some of them lost, and backups, some of them damaged or incremental. Positions are
quarters of a segment; a minute passes with every segment.
"""

from __future__ import annotations

import dataclasses
import datetime
from dataclasses import dataclass, field

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils.catalog import Backup
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.plugins.module_utils.index import ArchiveIndex, Attached
from ansible_collections.pgdrill.pitr.plugins.module_utils.plan import RefusedError
from ansible_collections.pgdrill.pitr.plugins.module_utils.plan import plan as plan_restore
from ansible_collections.pgdrill.pitr.plugins.module_utils.retention import (
    Circumstances,
    ExpirePlan,
    Floor,
    Policy,
    WalRange,
    parse_window,
    plan,
    why_not_restorable,
)
from ansible_collections.pgdrill.pitr.plugins.module_utils.target import RecoveryTarget
from ansible_collections.pgdrill.pitr.plugins.module_utils.timeline import Switch
from ansible_collections.pgdrill.pitr.plugins.module_utils.wal import Lsn
from ansible_collections.pgdrill.pitr.tests.unit.support import EPOCH, MIB, make_backup
from hypothesis import event, given, settings
from hypothesis import strategies as st

QUARTER = MIB // 4
MINUTE = datetime.timedelta(minutes=1)


# --- by example


def at(minute: float) -> datetime.datetime:
    return EPOCH + minute * MINUTE


def archive(segments: dict[int, list[int]], histories: dict[int, list[Switch]] | None = None) -> ArchiveIndex:
    index = ArchiveIndex(MIB)
    for timeline, numbers in segments.items():
        for number in sorted(numbers):
            index.add(timeline, number)
    for timeline, switches in (histories or {}).items():
        index.add_history(timeline, switches)
    return index


def backup(label: str, number: int, timeline: int = 1, minute: float | None = None, parent: str = "") -> Backup:
    """A backup within this segment, at the minute of the same number."""
    made = make_backup(
        label, timeline, number * MIB + 40, number * MIB + 256, minute=number if minute is None else minute
    )
    return dataclasses.replace(made, type="incremental", parent=parent) if parent else made


WHOLE = archive({1: list(range(1, 40))})
B = [backup(f"b{number}", number) for number in (2, 10, 20, 30)]


def going(found: ExpirePlan) -> list[str]:
    return [item.label for item in found.remove]


def test_newest_full_backups_stay_and_wal_before_the_oldest_of_them_goes() -> None:
    found = plan(B, WHOLE, Policy(keep_full=2), at(40))
    assert going(found) == ["b2", "b10"]
    assert found.wal == (WalRange(1, 1, 19, 19),)


def test_window_begins_with_the_newest_backup_from_before_it() -> None:
    # The window begins at minute 15; the points between 15 and 20 need the backup of minute 10.
    found = plan(B, WHOLE, Policy(window=25 * MINUTE), at(40))
    assert going(found) == ["b2"]
    assert found.wal == (WalRange(1, 1, 9, 9),)
    assert found.reasons["b10"] == ("the recovery window begins with it",)


def test_backup_that_ends_just_when_the_window_begins_is_enough() -> None:
    assert going(plan(B, WHOLE, Policy(window=20 * MINUTE), at(40))) == ["b2", "b10"]


@pytest.mark.parametrize(("keep_full", "minutes", "gone"), [(3, 5, ["b2"]), (1, 25, ["b2"]), (4, 5, []), (1, 90, [])])
def test_both_policies_keep_what_one_of_them_needs(keep_full: int, minutes: int, gone: list[str]) -> None:
    assert going(plan(B, WHOLE, Policy(keep_full, minutes * MINUTE), at(40))) == gone


def test_without_a_policy_nothing_goes() -> None:
    found = plan(B, WHOLE, Policy(), at(4000))
    assert (found.remove, found.wal) == ((), ())


def test_policy_larger_than_what_there_is_removes_no_backup() -> None:
    found = plan(B, WHOLE, Policy(keep_full=99), at(40))
    assert found.remove == () and found.wal == (WalRange(1, 1, 1, 1),)


def test_last_restorable_backup_stays_when_newer_ones_are_damaged() -> None:
    damaged = Circumstances(damaged={"b20": "cut off", "b30": "cut off"})
    found = plan(B, WHOLE, Policy(keep_full=1), at(40), damaged)
    assert going(found) == ["b2"]
    assert "cannot be restored (cut off)" in found.reasons["b30"][0]


def test_backup_with_a_hole_in_its_own_wal_does_not_count() -> None:
    index = archive({1: [number for number in range(1, 40) if number != 30]})
    assert going(plan(B, index, Policy(keep_full=1), at(40))) == ["b2", "b10"]


def test_damaged_backup_older_than_what_stays_goes() -> None:
    found = plan(B, WHOLE, Policy(keep_full=1), at(40), Circumstances(damaged={"b2": "cut off"}))
    assert going(found) == ["b2", "b10", "b20"] and found.reasons["b2"] == ("cut off",)


def test_nothing_goes_when_no_backup_can_be_restored() -> None:
    damaged = {each.label: "cut off" for each in B}
    found = plan(B, WHOLE, Policy(keep_full=1), at(40), Circumstances(damaged=damaged))
    assert (found.remove, found.wal) == ((), ())
    assert plan([], WHOLE, Policy(keep_full=1), at(40)).wal == ()


def test_clock_that_was_set_back_removes_nothing_because_of_age() -> None:
    for now in (at(24), at(0)):
        found = plan(B, WHOLE, Policy(window=2 * MINUTE), now)
        assert found.remove == () and "set back" in found.notes[0]
    # Set back while the second was taken: it has an earlier time than the first, and nobody knows which is true.
    odd = [backup("first", 2, minute=35), *B[1:]]
    assert plan(odd, WHOLE, Policy(window=2 * MINUTE), at(60)).remove == ()


def test_number_of_backups_does_not_depend_on_the_clock() -> None:
    assert going(plan(B, WHOLE, Policy(keep_full=2), at(0))) == ["b2", "b10"]


def test_held_backup_and_its_wal_stay() -> None:
    found = plan(B, WHOLE, Policy(keep_full=1), at(40), Circumstances(held={"b10": "keep mark: audit"}))
    assert going(found) == ["b2", "b20"]
    assert found.wal == (WalRange(1, 1, 9, 9),)
    assert found.reasons["b10"] == ("keep mark: audit",)


def test_wal_that_a_running_backup_will_need_stays() -> None:
    # Nothing else on timeline 2 needs any.
    histories = {2: [Switch(1, Lsn(5 * MIB), "")]}
    index = archive({1: list(range(1, 40)), 2: list(range(5, 9))}, histories)
    floors = Circumstances(floors=(Floor(2, Lsn(7 * MIB + 9)),))
    backups = [backup("a", 20), backup("b", 30)]
    wal = plan(backups, index, Policy(keep_full=1), at(40), floors).wal
    assert wal == (WalRange(1, 1, 29, 29), WalRange(2, 5, 6, 2))


def test_doubts_keep_all_wal() -> None:
    found = plan(B, WHOLE, Policy(keep_full=1), at(40), Circumstances(doubts=("somebody",)))
    assert going(found) == ["b2", "b10", "b20"] and found.wal == ()
    assert found.notes == ("No WAL is removed: somebody.",)


# Timeline 2 began in segment 15 of timeline 1, which went on for a while.
BRANCH = {2: [Switch(1, Lsn(15 * MIB + 500), "")]}
BRANCHED = archive({1: list(range(1, 40)), 2: list(range(15, 25))}, BRANCH)


def test_last_backup_of_the_newest_timeline_stays_behind_newer_ones_of_another() -> None:
    found = plan(B, BRANCHED, Policy(keep_full=1), at(40))
    assert going(found) == ["b2", "b20"]
    assert found.wal == (WalRange(1, 1, 9, 9),)


def test_wal_of_a_timeline_that_branches_off_later_stays() -> None:
    found = plan([B[0], B[1]], BRANCHED, Policy(keep_full=1), at(40))
    assert going(found) == ["b2"] and [item.timeline for item in found.wal] == [1]


def test_wal_of_a_branch_that_no_backup_leads_to_goes() -> None:
    backups = [backup("old", 10), backup("new", 20, timeline=2, minute=50)]
    found = plan(backups, BRANCHED, Policy(keep_full=1), at(60))
    assert going(found) == ["old"]
    assert found.wal == (WalRange(1, 1, 39, 39), WalRange(2, 15, 19, 5))


def test_window_reaches_to_a_branch_that_was_left_within_it_and_not_to_one_that_was_left_before() -> None:
    # The window is from minute 51 to 60, and timeline 2 is restorable in it from the backup of minute 50.
    backups = [backup("old", 10), backup("new", 20, timeline=2, minute=50)]
    for minute, gone in ((55, []), (45, ["old"])):
        circumstances = Circumstances(written={1: at(minute), 2: at(60)})
        assert going(plan(backups, BRANCHED, Policy(window=9 * MINUTE), at(60), circumstances)) == gone


def test_window_does_not_depend_on_what_a_writer_says_of_the_archive() -> None:
    """A segment far ahead makes a timeline look left long ago, a history file makes it look followed by another."""
    backups = [backup(f"b{day}", day, minute=day) for day in range(1, 60, 10)]
    index = archive({1: [*range(1, 70), 1000]}, {9: [Switch(1, Lsn(1), "")]})
    found = plan(backups, index, Policy(window=30 * MINUTE), at(60), Circumstances(written={1: at(1)}))
    assert going(found) == ["b1", "b11"]


def test_incremental_backup_needs_its_parents_files_and_not_the_parents_wal() -> None:
    chain = [backup("f1", 2), backup("i1", 8, parent="f1")]
    index = archive({1: [1, *range(4, 40)]})
    assert list(why_not_restorable(chain, index, {})) == ["f1"]
    assert list(why_not_restorable(chain, index, {"f1": "cut off"})) == ["f1", "i1"]


def test_wal_of_a_timeline_without_history_file_stays() -> None:
    index = archive({1: list(range(1, 40)), 3: [7, 8]})
    found = plan(B, index, Policy(keep_full=1), at(40))
    assert found.wal == (WalRange(1, 1, 29, 29),)
    assert "history file of timeline 3 is missing" in found.notes[0]


def test_chain_is_kept_whole_for_one_of_it() -> None:
    chain = [backup("f1", 2), backup("i1", 5, parent="f1"), backup("i2", 8, parent="i1"), backup("f2", 20)]
    found = plan(chain, WHOLE, Policy(keep_full=1), at(40), Circumstances(held={"i1": "mark"}))
    assert found.remove == ()


def test_chain_goes_whole_and_from_its_end() -> None:
    chain = [backup("f1", 2), backup("i1", 5, parent="f1"), backup("i2", 8, parent="i1"), backup("f2", 20)]
    assert going(plan(chain, WHOLE, Policy(keep_full=1), at(40))) == ["i2", "i1", "f1"]


def test_window_that_begins_with_an_incremental_backup_keeps_what_it_builds_upon() -> None:
    chain = [backup("f1", 2), backup("i1", 10, parent="f1"), backup("f2", 20)]
    assert plan(chain, WHOLE, Policy(window=25 * MINUTE), at(40)).remove == ()


@pytest.mark.parametrize("parent", ["nowhere", "i1"])
def test_incremental_backup_without_its_parent_is_not_restorable(parent: str) -> None:
    chain = [backup("f1", 2), backup("i1", 10, parent=parent), backup("f2", 20)]
    assert set(why_not_restorable(chain, WHOLE, {})) == {"i1"}
    damaged = why_not_restorable([B[0], backup("i", 10, parent="b2")], WHOLE, {"b2": "cut off"})
    assert damaged == {"b2": "cut off", "i": "b2, which it builds upon: cut off"}


def test_attached_files_go_with_their_segments() -> None:
    index = archive({1: list(range(5, 40)), 2: []}, {2: [Switch(1, Lsn(3 * MIB), "")]})
    index.attached.append(Attached(1, 3, "x/y.partial"))
    found = plan(B, index, Policy(keep_full=1), at(40))
    assert found.wal == (WalRange(1, 3, 29, 25),)


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("7 days", 10080), ("1day", 1440), ("12h", 720), ("90 min", 90), ("2 weeks", 20160), ("1 day 12 h", 2160)],
)
def test_windows_are_read(text: str, minutes: int) -> None:
    assert parse_window(text) == parse_window(text.upper()) == minutes * MINUTE


@pytest.mark.parametrize(
    "text", ["7", "7 m", "days", "-7 days", "0 days", "7 days or so", "1.5 h", " ", "9" * 20 + " days"]
)
def test_windows_without_a_clear_unit_are_refused(text: str) -> None:
    with pytest.raises(PitrError, match="Nothing was removed"):
        parse_window(text)


@pytest.mark.parametrize("number", [0, -1])
def test_keeping_no_backup_is_refused(number: int) -> None:
    with pytest.raises(PitrError, match=r"at least 1 backup has to stay. Nothing was removed"):
        Policy.from_options(number, None)
    assert Policy.from_options(None, "").is_empty and Policy.from_options(None, None).is_empty


# --- random worlds


@dataclass
class World:
    """``begin``: of each timeline (parent, position in quarters, minute); ``ends``: last segment number."""

    begin: dict[int, tuple[int, int, float]] = field(default_factory=dict)
    ends: dict[int, int] = field(default_factory=dict)
    lost: frozenset[tuple[int, int]] = frozenset()
    backups: list[Backup] = field(default_factory=list)
    damaged: dict[str, str] = field(default_factory=dict)

    def minute(self, timeline: int, quarter: int) -> float:
        _parent, position, minute = self.begin[timeline]
        return minute + (quarter - position) / 4

    def switches(self, timeline: int) -> list[Switch]:
        parent, position, _minute = self.begin[timeline]
        return [] if timeline == 1 else [*self.switches(parent), Switch(parent, Lsn(position * QUARTER), "")]

    def index(self, gone: tuple[WalRange, ...] = ()) -> ArchiveIndex:
        index = ArchiveIndex(MIB)
        for timeline, (_parent, position, _minute) in self.begin.items():
            for number in range(position // 4, self.ends[timeline] + 1):
                removed = any(item.timeline == timeline and item.first <= number <= item.last for item in gone)
                if (timeline, number) not in self.lost and not removed:
                    index.add(timeline, number)
            if timeline > 1:
                index.add_history(timeline, self.switches(timeline))
        return index

    @property
    def written(self) -> dict[int, datetime.datetime]:
        index = self.index()
        return {
            timeline: at(self.minute(timeline, (index.last(timeline) or 0) * 4 + 4))
            for timeline in self.begin
            if index.last(timeline) is not None
        }

    @property
    def end(self) -> float:
        return max(self.minute(timeline, number * 4 + 4) for timeline, number in self.ends.items())


@st.composite
def worlds(draw: st.DrawFn) -> World:
    world = World({1: (0, 4, 0.0)}, {1: draw(st.integers(3, 24))})
    for timeline in range(2, 2 + draw(st.integers(0, 2))):
        parent = draw(st.sampled_from(sorted(world.begin)))
        first = world.begin[parent][1]
        position = draw(st.integers(min(first + 1, world.ends[parent] * 4 + 3), world.ends[parent] * 4 + 3))
        # Whoever was promoted had nobody beside it: the new timeline begins after everything else was written.
        world.begin[timeline] = (parent, position, world.end + draw(st.integers(0, 10)))
        world.ends[timeline] = position // 4 + draw(st.integers(0, 12))
    for number in range(draw(st.integers(0, 6))):
        timeline = draw(st.sampled_from(sorted(world.begin)))
        begin, end = world.begin[timeline][1] + 1, world.ends[timeline] * 4 + 2
        if begin > end:
            continue
        start = draw(st.integers(begin, end))
        stop = draw(st.integers(start, min(start + 6, end)))
        made = make_backup(
            f"b{number}", timeline, start * QUARTER, stop * QUARTER + 1, minute=world.minute(timeline, stop + 1)
        )
        if any((each.timeline, each.stop_lsn) == (timeline, made.stop_lsn) for each in world.backups):
            # Which one of two equals is chosen does not matter.
            continue
        fulls = [each.label for each in world.backups if each.timeline == timeline and each.stop_lsn < made.start_lsn]
        if fulls and draw(st.integers(0, 2)) == 0:
            made = dataclasses.replace(made, type="incremental", parent=draw(st.sampled_from(fulls)))
        world.backups.append(made)
    if draw(st.booleans()):
        segments = [
            (t, n) for t, (_p, position, _m) in world.begin.items() for n in range(position // 4, world.ends[t] + 1)
        ]
        world.lost = frozenset(draw(st.lists(st.sampled_from(segments), max_size=3)))
        labels = [each.label for each in world.backups]
        if labels:
            world.damaged = {label: "cut off" for label in draw(st.lists(st.sampled_from(labels), max_size=2))}
    return world


policies = st.builds(
    lambda keep, minutes: Policy(keep, None if minutes is None else minutes * MINUTE),
    st.none() | st.integers(1, 3),
    st.none() | st.integers(1, 60),
)


def restores(
    world: World, backups: list[Backup], index: ArchiveIndex, choice: str = "auto", **options: object
) -> str | None:
    """Label of the backup that a restore would begin with, None when it is refused."""
    target = RecoveryTarget.from_options({f"recovery_{name}": value for name, value in options.items()})
    damaged = {**world.damaged, **_broken_chains(world, backups)}
    try:
        return plan_restore(backups, index, target, choice, damaged).backup.label
    except RefusedError:
        return None


def _broken_chains(world: World, backups: list[Backup]) -> dict[str, str]:
    """Incremental backups that cannot be put together; what a plan of restores would be told of."""
    whole = {each.label for each in backups if each.label not in world.damaged}
    result: dict[str, str] = {}
    for _round in backups:
        for each in backups:
            if each.parent and (each.parent not in whole or each.parent in result):
                result[each.label] = "chain"
    return result


@settings(max_examples=400, deadline=None)
@given(worlds(), policies, st.integers(0, 20))
def test_every_point_that_the_policy_promises_is_still_restorable(world: World, policy: Policy, later: int) -> None:
    before = world.index()
    now = world.end + later
    circumstances = Circumstances(world.damaged, written=world.written)
    found = plan(world.backups, before, policy, at(now), circumstances)
    after = world.index(found.wal)
    kept = list(found.keep)
    event(f"removed {min(len(found.remove), 3)}, WAL {bool(found.wal)}, timelines {len(world.begin)}")
    assert sorted(each.label for each in (*found.keep, *found.remove)) == sorted(b.label for b in world.backups)
    # Chains are whole.
    labels = {each.label for each in kept}
    known = {each.label for each in world.backups}
    assert all(each.parent is None or each.parent in labels for each in kept if each.parent in known)
    # Whatever could be restored from a backup that stays can be, along every timeline.
    for each in kept:
        for timeline in world.begin:
            options = {"target_timeline": str(timeline)}
            if restores(world, world.backups, before, each.label, **options):
                assert restores(world, kept, after, each.label, **options) == each.label
    # Every point of the window.
    if policy.window is not None:
        first = now - policy.window / MINUTE
        for timeline, (_parent, position, _minute) in world.begin.items():
            for quarter in range(position, world.ends[timeline] * 4 + 4):
                if world.minute(timeline, quarter) < first:
                    continue
                options = {"target_lsn": str(Lsn(quarter * QUARTER + 2)), "target_timeline": str(timeline)}
                chosen = restores(world, world.backups, before, **options)
                if chosen:
                    assert restores(world, kept, after, **options) == chosen, (timeline, quarter)
    # The newest full backups, and the end of the newest timeline.
    bad = why_not_restorable(world.backups, before, world.damaged)
    good = [each for each in sorted(world.backups, key=lambda b: b.stopped_at) if each.label not in bad]
    if policy.keep_full is not None:
        wanted = [each.label for each in good if each.type == "full"][-policy.keep_full :]
        assert set(wanted) <= labels
    chosen = restores(world, world.backups, before)
    if chosen:
        assert restores(world, kept, after)
    # The last one never goes.
    assert not good or labels & {each.label for each in good}


@settings(max_examples=200, deadline=None)
@given(worlds(), policies)
def test_second_run_finds_nothing_to_do(world: World, policy: Policy) -> None:
    now = at(world.end)
    written = world.written
    first = plan(world.backups, world.index(), policy, now, Circumstances(world.damaged, written=written))
    again = plan(first.keep, world.index(first.wal), policy, now, Circumstances(world.damaged, written=written))
    assert again.remove == ()
    assert again.wal == ()


@settings(max_examples=200, deadline=None)
@given(st.integers(3, 40), st.lists(st.integers(8, 150), min_size=1, max_size=5, unique=True), policies)
def test_no_more_wal_stays_than_is_needed(last: int, quarters: list[int], policy: Policy) -> None:
    world = World({1: (0, 4, 0.0)}, {1: max(last, max(quarters) // 4 + 1)})
    for quarter in sorted(quarters):
        made = make_backup(
            f"b{quarter}", 1, quarter * QUARTER, quarter * QUARTER + 9, minute=world.minute(1, quarter + 1)
        )
        world.backups.append(made)
    found = plan(world.backups, world.index(), policy, at(world.end))
    after = world.index(found.wal)
    if not policy.is_empty:
        assert after.ranges(1)[0][0] == min(each.start_lsn for each in found.keep) // MIB
