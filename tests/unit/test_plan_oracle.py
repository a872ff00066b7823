# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Search and plan together, in random worlds, against an oracle that tries every backup.

The oracle knows what every segment file holds and replays it record by record, as a server would that was given one
backup and the target. It shares no code with what it judges. Three things must hold: a plan comes to its target, a
refusal means that no backup would, and the chosen backup is the newest that does.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterator
from typing import Any

from ansible_collections.pgdrill.pitr.plugins.module_utils.catalog import Backup
from ansible_collections.pgdrill.pitr.plugins.module_utils.index import ArchiveIndex
from ansible_collections.pgdrill.pitr.plugins.module_utils.locate import Found, Locator
from ansible_collections.pgdrill.pitr.plugins.module_utils.plan import (
    RefusedError,
    RestorePlan,
    candidates,
    plan,
    target_timeline,
)
from ansible_collections.pgdrill.pitr.plugins.module_utils.target import RecoveryTarget
from ansible_collections.pgdrill.pitr.plugins.module_utils.timeline import parse_history
from ansible_collections.pgdrill.pitr.plugins.module_utils.wal import Lsn
from ansible_collections.pgdrill.pitr.plugins.module_utils.waldump import Record, WalScanner
from ansible_collections.pgdrill.pitr.tests.unit.support import EPOCH, MIB, history, make_backup
from hypothesis import event, given, settings
from hypothesis import strategies as st

# Places are eighths of a segment; a record begins at each of them.
PER = 8
PLACE = MIB // PER
END = 9 * PER
# The counter of transactions turns over in the middle of these worlds.
FIRST_XID = 2**32 - 6


@dataclasses.dataclass(frozen=True)
class Written:
    """A record that somebody may look for. ``xid`` is the whole 64-bit id; ``name`` that of a restore point."""

    timeline: int
    place: int
    xid: int = 0
    name: str = ""
    subxacts: tuple[int, ...] = ()

    @property
    def time(self) -> datetime.datetime:
        return clock(self.timeline, self.place)


def clock(timeline: int, place: int) -> datetime.datetime:
    return EPOCH + datetime.timedelta(minutes=place + 500 * timeline)


@dataclasses.dataclass
class World:
    parents: dict[int, tuple[int, int]]
    files: dict[int, set[int]]
    written: list[Written]
    backups: list[Backup]
    damaged: dict[str, str]

    def writer(self, timeline: int, place: int) -> int:
        """Who wrote this place of a timeline's past."""
        while timeline > 1 and place < self.parents[timeline][1]:
            timeline = self.parents[timeline][0]
        return timeline

    def line(self, timeline: int) -> list[tuple[int, int]]:
        """(ancestor, where it was left), oldest first."""
        found: list[tuple[int, int]] = []
        while timeline > 1:
            found.insert(0, self.parents[timeline])
            timeline = self.parents[timeline][0]
        return found

    def content(self, timeline: int, number: int) -> dict[int, Written | None]:
        """What the file holds: every place with the record there, the beginning of a timeline's first file copied."""
        places: dict[int, Written | None] = {}
        for place in range(number * PER, (number + 1) * PER):
            who = self.writer(timeline, place)
            places[place] = next((r for r in self.written if (r.timeline, r.place) == (who, place)), None)
        return places

    def index(self) -> ArchiveIndex:
        found = ArchiveIndex(MIB)
        for timeline, numbers in self.files.items():
            for number in sorted(numbers):
                found.add(timeline, number)
        for timeline in self.parents:
            text = history(*((parent, str(Lsn(at * PLACE))) for parent, at in self.line(timeline)))
            found.add_history(timeline, parse_history(timeline, text))
        return found


class Dump(WalScanner):
    """Reads the files of a world as pg_waldump reads those of an archive."""

    def __init__(self, world: World, index: ArchiveIndex) -> None:
        nothing: Any = None
        super().__init__(nothing, nothing, index, "/bin")
        self._world = world

    def _run(self, timeline: int, first: int, until: int, rmgrs: tuple[str, ...], local: str = "") -> Iterator[Record]:
        for number in range(first, until + 1):
            assert number in self._world.files[timeline], "a file that is not there is read"
            for place, found in self._world.content(timeline, number).items():
                if found is None:
                    continue
                lsn, low = Lsn(place * PLACE), found.xid % 2**32
                if found.name and "XLOG" in rmgrs:
                    yield Record("XLOG", 0, lsn, timeline, f"RESTORE_POINT {found.name}")
                elif found.xid and "Transaction" in rmgrs:
                    more = f"; subxacts: {' '.join(str(x % 2**32) for x in found.subxacts)}" if found.subxacts else ""
                    yield Record(
                        "Transaction", low, lsn, timeline, f"COMMIT {found.time:%Y-%m-%d %H:%M:%S.%f} UTC{more}"
                    )


# --- the oracle


@dataclasses.dataclass(frozen=True)
class End:
    """Where a server stops: before or behind a place, at a record or at the end of WAL. ``strayed``: it has replayed
    what is not this past; ``borrowed``: it has read the parent's copy of a segment.
    """

    place: int
    record: Written | None
    strayed: bool
    borrowed: bool


def replay(world: World, backup: Backup, timeline: int, asked: RecoveryTarget) -> End | None:
    """Start a server from this backup. None when it ends with an error instead of at its target."""
    start, stop = backup.start_lsn // PLACE, backup.stop_lsn // PLACE
    line = [*world.line(timeline), (timeline, 10**9)]
    begins = {tli: (line[at - 1][1] if at else 0) for at, (tli, _left) in enumerate(line)}
    current, strayed, borrowed, place = 0, False, False, start
    while True:
        number = place // PER
        choice = 0
        for tli in sorted(begins, reverse=True):
            if tli < current or begins[tli] // PER > number:
                continue
            there = world.files.get(tli, set())
            if number in there:
                choice = tli
                break
            if any(other > number for other in there):
                return None  # pitr-wal get: a hole
        if not choice:
            at_end = asked.kind == "latest" and place >= stop
            # The end is the end of the timeline that was asked for only if that one was read.
            right = current == timeline or (not begins[timeline] and timeline == 1)
            return End(place, None, strayed or not right, borrowed) if at_end else None
        current = choice
        right_one = max(tli for tli, begin in begins.items() if begin // PER <= number)
        borrowed = borrowed or choice != right_one
        for place, record in world.content(choice, number).items():
            if place < start:
                continue
            wrong = world.writer(choice, place) != world.writer(timeline, place)
            hit = matches(asked, place, record)
            if hit is not None:
                # Inclusive: the record itself is replayed. Before the consistent point it is FATAL.
                last = place if hit else place - 1
                if last < stop - 1:
                    return None
                return End(place, record, strayed or (wrong and hit), borrowed)
            strayed = strayed or wrong
            if asked.kind == "immediate" and place + 1 >= stop:
                # Consistency is looked at when a record has been replayed.
                return End(place + 1, None, strayed, borrowed)
        place = (number + 1) * PER


def matches(asked: RecoveryTarget, place: int, record: Written | None) -> bool | None:
    """None: replay goes on; True: it stops behind this record, False: before it."""
    if asked.lsn is not None:
        return asked.inclusive if place * PLACE >= asked.lsn else None
    if record is None:
        return None
    if asked.name is not None:
        return True if record.name == asked.name else None
    if not record.xid:
        return None
    if asked.xid is not None:
        return asked.inclusive if record.xid % 2**32 == asked.xid % 2**32 else None
    if asked.time is not None:
        late = record.time > asked.time or (record.time == asked.time and not asked.inclusive)
        return False if late else None
    return None


def comes_to(world: World, backup: Backup, timeline: int, asked: RecoveryTarget) -> End | None:
    """As :func:`replay`; None also when it has come elsewhere than was meant."""
    stop = backup.stop_lsn // PLACE
    if world.writer(timeline, stop - 1) != backup.timeline or backup.label in world.damaged:
        return None
    if asked.time is not None and backup.stopped_at > asked.time:
        return None
    if asked.lsn is not None and backup.stop_lsn > asked.lsn:
        return None
    end = replay(world, backup, timeline, asked)
    if end is None or end.strayed:
        return None
    if asked.xid is not None and asked.xid >= 2**32 and (end.record is None or end.record.xid != asked.xid):
        return None
    if end.record is not None and (asked.xid is not None or asked.name is not None) and end.place < stop:
        return None
    return end


# --- the worlds


@st.composite
def worlds(draw: st.DrawFn) -> World:
    parents: dict[int, tuple[int, int]] = {}
    files: dict[int, set[int]] = {1: set(range(1, draw(st.integers(3, 10))))}
    for timeline in range(2, draw(st.integers(1, 3)) + 1):
        at = draw(st.integers(2 * PER, END))
        parents[timeline] = (draw(st.integers(1, timeline - 1)), at)
        files[timeline] = set(range(at // PER, at // PER + draw(st.integers(0, 4))))
    for numbers in files.values():
        for number in draw(st.lists(st.sampled_from(sorted(numbers)), max_size=2)) if numbers else []:
            numbers.discard(number)
    spots = st.tuples(st.integers(1, len(parents) + 1), st.integers(PER, END))
    chosen = [
        (timeline, place)
        for timeline, place in draw(st.lists(spots, min_size=4, max_size=16, unique=True))
        if timeline == 1 or place >= parents[timeline][1]
    ]
    # Transactions begin in the order of their ids, and end when they like, the same on every branch.
    written: list[Written] = []
    begun: dict[int, int] = {}
    xid = FIRST_XID
    for timeline, place in sorted(chosen, key=lambda item: (item[0], item[1])):
        if draw(st.integers(0, 3)) == 0:
            written.append(Written(timeline, place, name=draw(st.sampled_from(["a", "b", "before"]))))
            continue
        while xid % 2**32 < 3:
            xid += 1
        begin = parents[timeline][1] if timeline > 1 else PER
        begun[xid] = max(place - draw(st.sampled_from([1, 1, 1, 20])), begin)
        subs: tuple[int, ...] = ()
        if draw(st.integers(0, 3)) == 0:
            subs = (xid + 1,)
        written.append(Written(timeline, place, xid=xid, subxacts=subs))
        xid += 1 + len(subs)
    backups: list[Backup] = []
    for number in range(draw(st.integers(1, 4))):
        timeline = draw(st.integers(1, len(parents) + 1))
        start = max(draw(st.integers(PER, END)), parents[timeline][1] if timeline > 1 else 0)
        stop = start + draw(st.integers(1, 12))
        while any(backup.stop_lsn == stop * PLACE for backup in backups):
            stop += 1
        minutes = (clock(timeline, stop) - EPOCH).total_seconds() / 60
        made = make_backup(f"b{number}", timeline, start * PLACE, stop * PLACE, minutes)
        world = World(parents, files, written, [], {})
        known = [
            r.xid for r in written if r.xid and begun[r.xid] < stop and world.writer(timeline, r.place) == r.timeline
        ]
        # Some descriptions are of before it was asked.
        told = draw(st.integers(0, 3)) > 0
        backups.append(dataclasses.replace(made, next_xid=max(known, default=FIRST_XID - 1) + 1 if told else None))
    labels = [backup.label for backup in backups]
    damaged = dict.fromkeys(draw(st.lists(st.sampled_from(labels), max_size=1)), "is cut")
    return World(parents, files, written, backups, damaged)


@st.composite
def questions(draw: st.DrawFn) -> tuple[World, RecoveryTarget]:
    world = draw(worlds())
    newest = max(world.parents, default=1)
    options: dict[str, object] = {
        "inclusive": draw(st.booleans()),
        "timeline": draw(st.sampled_from(["latest", "current", *map(str, range(1, newest + 1))])),
        "action": draw(st.sampled_from(["promote", "pause", "shutdown"])),
    }
    kind = draw(st.sampled_from(["latest", "immediate", "lsn", "time", "xid", "name"]))
    if kind == "lsn":
        options[kind] = str(Lsn(draw(st.integers(PER, END + PER)) * PLACE))
    elif kind == "time":
        base = clock(draw(st.integers(1, newest)), draw(st.integers(PER, END + PER)))
        options[kind] = (base + datetime.timedelta(seconds=draw(st.sampled_from([-30, 0, 30])))).isoformat()
    elif kind == "xid":
        xids = [r.xid for r in world.written if r.xid] or [FIRST_XID]
        xid = draw(st.sampled_from(xids)) + draw(st.sampled_from([0, 0, 0, 1, 2**32]))
        options[kind] = str(xid if draw(st.booleans()) or xid % 2**32 < 3 else xid % 2**32)
    elif kind == "name":
        options[kind] = draw(st.sampled_from(["a", "b", "before", "never"]))
    names = {f"recovery_target_{name}": value for name, value in options.items()}
    if kind == "immediate":
        names["recovery_target"] = "immediate"
    return world, RecoveryTarget.from_options(names)


def ask(world: World, asked: RecoveryTarget) -> tuple[int, RestorePlan | None, str, Found]:
    """What the planner does, without a host: timeline, plan or refusal's code, what was found."""
    index = world.index()
    timeline = target_timeline(asked, index.tree, world.backups, "auto")
    found = Found()
    try:
        related = candidates(world.backups, index.tree, timeline, "auto")
        whole = [backup for backup in related if backup.label not in world.damaged]
        found = Locator(Dump(world, index), index, timeline, whole).find(asked)
    except RefusedError:
        pass
    try:
        done = plan(world.backups, index, asked, "auto", world.damaged, found.location, found.commits, found.nearby)
    except RefusedError as error:
        assert all(item.message for item in error.refusals)
        return timeline, None, error.refusals[0].code, found
    return timeline, done, "planned", found


@settings(deadline=None, max_examples=500)
@given(questions())
def test_plan_is_what_trying_every_backup_would_find(question: tuple[World, RecoveryTarget]) -> None:
    world, asked = question
    timeline, done, code, found = ask(world, asked)
    event(f"{asked.kind}: {code}")
    newest_first = sorted(world.backups, key=lambda backup: backup.stop_lsn, reverse=True)
    ends = {backup.label: comes_to(world, backup, timeline, asked) for backup in newest_first}
    working = [backup for backup in newest_first if ends[backup.label] is not None]
    if asked.kind in ("latest", "immediate"):
        # Another backup would be another point, or less than the newest has itself.
        usable = [
            backup
            for backup in newest_first
            if backup.label not in world.damaged
            and world.writer(timeline, backup.stop_lsn // PLACE - 1) == backup.timeline
        ]
        working = [
            b for b in working if b is usable[0] or (asked.kind == "latest" and b.start_lsn > usable[0].start_lsn)
        ]
        if asked.kind == "latest":
            working = [
                b for b in working if (ends[b.label] or End(0, None, True, True)).place >= usable[0].stop_lsn // PLACE
            ]
    if done is None:
        # The parent's copy of a switch segment may be refused although it would have done.
        left = [backup.label for backup in working if not (ends[backup.label] or End(0, None, True, True)).borrowed]
        assert not left, f"{code}, but {left} would do"
        return
    end = ends[done.backup.label]
    assert end is not None, "the recovery would not come to the target"
    assert done.backup is working[0], f"{working[0].label} is newer and would do"
    if found.location is not None:
        assert (found.location.lsn // PLACE) == end.place, "it stops at another record than was found"
    # Every segment up to the one where it stops is in the plan, and there.
    last = done.backup.start_lsn // MIB + done.segments - 1
    assert (end.place if end.record or asked.lsn is not None else end.place - 1) // PER <= last
