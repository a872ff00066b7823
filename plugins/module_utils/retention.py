# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What may be removed, and why the rest stays. Pure; nothing is read or removed here.

A backup goes when the policy does not need it, and WAL goes when no backup that stays needs it. In doubt everything
stays: a policy that is empty, a clock that was set back, a history file that is missing never make anything go.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .catalog import Backup, broken_chains
from .errors import PitrError
from .index import ArchiveIndex
from .reach import MAX_NAMED, carries, spans_from
from .target import format_time
from .timeline import TimelineTree
from .wal import Lsn, history_name

_UNITS = {
    "minutes": ("min", "mins", "minute", "minutes"),
    "hours": ("h", "hour", "hours"),
    "days": ("d", "day", "days"),
    "weeks": ("w", "week", "weeks"),
}
_PART = re.compile(r"\s*(\d+)\s*([a-z]+)\s*")
# A backup may be this much ahead of this host's clock; more is a clock that was set back.
CLOCK_SLACK = datetime.timedelta(minutes=5)


def parse_window(
    text: str, option: str = "recovery_window", untouched: str = "Nothing was removed."
) -> datetime.timedelta:
    """Read a span of time such as ``7 days`` or ``1 day 12 h``. Raises PitrError without units, or for nothing.

    ``option`` and ``untouched`` are what a message says of it.
    """
    total = datetime.timedelta()
    position = 0
    lowered = text.lower()
    while position < len(lowered):
        match = _PART.match(lowered, position)
        unit = next((name for name, words in _UNITS.items() if match and match.group(2) in words), None)
        if match is None or unit is None:
            raise PitrError(
                f"{option} '{text}' is not a span of time. Write it with units, like '7 days', '12 h' or"
                f" '1 day 12 h' (min, h, days, weeks). {untouched}"
            )
        try:
            total += datetime.timedelta(**{unit: int(match.group(1))})
        except OverflowError:
            raise PitrError(f"{option} '{text}' is too long. {untouched}") from None
        position = match.end()
    if not total:
        raise PitrError(f"{option} '{text}' is no time at all. {untouched}")
    return total


@dataclass(frozen=True)
class Policy:
    """What must stay restorable: the newest ``keep_full`` full backups, every point of the last ``window``, or both."""

    keep_full: int | None = None
    window: datetime.timedelta | None = None

    @classmethod
    def from_options(cls, keep_full: int | None, recovery_window: str | None) -> Policy:
        """Read the options of the module. Raises PitrError for values that would keep nothing."""
        if keep_full is not None and keep_full < 1:
            raise PitrError(f"keep_full is {keep_full}; at least 1 backup has to stay. Nothing was removed.")
        return cls(keep_full, parse_window(recovery_window) if recovery_window else None)

    @property
    def is_empty(self) -> bool:
        """Whether nothing was asked for; then nothing goes."""
        return self.keep_full is None and self.window is None


@dataclass(frozen=True)
class Floor:
    """A backup that is being taken: WAL from this position on is needed, and of every timeline that leads on."""

    timeline: int
    lsn: Lsn
    label: str = ""


@dataclass(frozen=True)
class Circumstances:
    """What else decides.

    ``damaged``: label to what is wrong with its stored files. ``held``: label to who or what holds it (a mark, a
    restore, a recovery). ``floors``: backups being taken. ``written``: when the last segment of a timeline was stored.
    ``doubts``: reasons why no WAL may go this time.
    """

    damaged: Mapping[str, str] = field(default_factory=dict)
    held: Mapping[str, str] = field(default_factory=dict)
    floors: Sequence[Floor] = ()
    written: Mapping[int, datetime.datetime] = field(default_factory=dict)
    doubts: Sequence[str] = ()


@dataclass(frozen=True)
class WalRange:
    """Segments of a timeline, numbers inclusive; ``segments`` is how many of them are there."""

    timeline: int
    first: int
    last: int
    segments: int


@dataclass(frozen=True)
class ExpirePlan:
    """``remove`` in the order of removal: what builds upon a backup goes before it. ``reasons`` has every label."""

    keep: tuple[Backup, ...]
    remove: tuple[Backup, ...]
    reasons: Mapping[str, tuple[str, ...]]
    wal: tuple[WalRange, ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For a module's result."""
        return {
            "kept_backups": [{"backup": b.label, "reasons": list(self.reasons[b.label])} for b in self.keep],
            "expired_backups": [
                {"backup": b.label, "bytes": b.stored_bytes, "reasons": list(self.reasons[b.label])}
                for b in self.remove
            ],
            "notes": list(self.notes),
        }


def why_not_restorable(backups: Sequence[Backup], index: ArchiveIndex, damaged: Mapping[str, str]) -> dict[str, str]:
    """Label to reason, for every backup that could not be restored to its own end.

    A damaged file, a hole in the WAL from its start to its stop, a missing history file, or a parent with a damaged
    file. What is built upon a parent needs its files, and not the WAL that would make it consistent by itself.
    """
    result = broken_chains(backups, damaged)
    for backup in backups:
        names = missing_wal(backup, index)
        if names and backup.label not in result:
            lost = f"{', '.join(names[:MAX_NAMED])}{' and more' if len(names) > MAX_NAMED else ''}"
            result[backup.label] = f"missing WAL: {lost}"
    return result


def wal_timeline(backup: Backup, index: ArchiveIndex) -> int:
    """The timeline along which a backup's WAL from start to stop is whole: its own, when none is.

    A timeline that began in one of these segments has a copy of what its parent had in it until then, and the server
    takes that one (XLogFileReadAnyTLI), so that a backup can be whole along it alone.
    """
    tree = index.tree
    if _missing_along(backup.timeline, backup, index, 0):
        for timeline in tree.histories:
            if timeline != backup.timeline and tree.contains(timeline, backup.timeline, backup.stop_lsn):
                if not _missing_along(timeline, backup, index, 0):
                    return timeline
    return backup.timeline


def missing_wal(backup: Backup, index: ArchiveIndex, most: int = MAX_NAMED) -> list[str]:
    """Names of the segments from the backup's start to its stop that are not there, at most one more than ``most``.

    When the history file of its timeline is missing that is the one name.
    """
    return _missing_along(wal_timeline(backup, index), backup, index, most)


def _missing_along(timeline: int, backup: Backup, index: ArchiveIndex, most: int) -> list[str]:
    if timeline != 1 and timeline not in index.tree.histories:
        return [history_name(timeline)]
    size = index.segment_size
    until = backup.stop_lsn.previous_segment_number(size)
    names: list[str] = []
    for span in spans_from(backup.start_lsn, index.tree, timeline):
        last = until if span.end is None else min(until, span.end.segment_number(size) - 1)
        for number in index.missing(span.timeline, span.begin.segment_number(size), last):
            if carries(backup, index, span.timeline, number):
                continue
            names.append(index.name(span.timeline, number))
            if len(names) > most:
                return names
    return names


def needed_from(points: Iterable[tuple[int, Lsn, Lsn]], index: ArchiveIndex) -> dict[int, int]:
    """The first segment number that is needed of each timeline; a timeline that is not named is needed by none.

    ``points``: (timeline, start, stop) of backups. From its start on everything on its way to the end of every timeline
    that leads on from its stop is needed. That is always the rest of a timeline, as a backup's own one leads on, too.
    What cannot be known because a history file is missing counts as needed.
    """
    tree = index.tree
    size = index.segment_size
    known = [timeline for timeline in tree.timelines if timeline == 1 or timeline in tree.histories]
    result = {timeline: 0 for timeline in tree.timelines if timeline not in known}
    for timeline, start, stop in points:
        if timeline != 1 and timeline not in tree.histories:
            return {each: 0 for each in tree.timelines}
        for leading in {*known, timeline}:
            if tree.contains(leading, timeline, stop):
                for span in spans_from(start, tree, leading):
                    number = span.begin.segment_number(size)
                    result[span.timeline] = min(number, result.get(span.timeline, number))
    return result


def unneeded(index: ArchiveIndex, needed: Mapping[int, int]) -> tuple[WalRange, ...]:
    """What is there and lies before what is needed."""
    highest: dict[int, int] = {}
    lowest: dict[int, int] = {}
    for timeline in index.timelines:
        ranges = index.ranges(timeline)
        if ranges:
            lowest[timeline], highest[timeline] = ranges[0][0], ranges[-1][1]
    for attached in index.attached:
        highest[attached.timeline] = max(attached.number, highest.get(attached.timeline, attached.number))
        lowest[attached.timeline] = min(attached.number, lowest.get(attached.timeline, attached.number))
    result = []
    for timeline in sorted(highest):
        last = min(highest[timeline], needed[timeline] - 1) if timeline in needed else highest[timeline]
        if lowest[timeline] <= last:
            ranges = index.ranges(timeline)
            count = sum(min(end, last) - begin + 1 for begin, end in ranges if begin <= last)
            result.append(WalRange(timeline, lowest[timeline], last, count))
    return tuple(result)


def plan(
    backups: Sequence[Backup],
    index: ArchiveIndex,
    policy: Policy,
    now: datetime.datetime,
    circumstances: Circumstances | None = None,
) -> ExpirePlan:
    """Decide about all ``backups`` of one chapter and its archive. ``now`` is aware of its zone."""
    return _Decision(backups, index, policy, now, circumstances or Circumstances()).plan()


class _Decision:
    def __init__(
        self,
        backups: Sequence[Backup],
        index: ArchiveIndex,
        policy: Policy,
        now: datetime.datetime,
        circumstances: Circumstances,
    ) -> None:
        self._backups = sorted(backups, key=lambda backup: (backup.stopped_at, backup.label))
        self._index = index
        self._tree: TimelineTree = index.tree
        self._policy = policy
        self._now = now
        self._circumstances = circumstances
        self._keep: dict[str, list[str]] = {}
        self._notes: list[str] = []
        self._unusable = why_not_restorable(self._backups, index, circumstances.damaged)
        self._restorable = [backup for backup in self._backups if backup.label not in self._unusable]
        self._by_label = {backup.label: backup for backup in self._backups}

    def plan(self) -> ExpirePlan:
        """What goes and what stays."""
        if self._policy.is_empty:
            return self._nothing("no policy")
        if not self._restorable:
            return self._nothing("no backup here could be restored" if self._backups else "there is no backup")
        for label, who in self._circumstances.held.items():
            if label in self._by_label:
                self._stay([self._by_label[label]], who)
        odd = self._odd_clock()
        if odd:
            self._notes.append(f"{odd} Nothing is removed because of its age.")
        if self._policy.keep_full is not None:
            self._count(self._policy.keep_full, bool(odd))
        if self._policy.window is not None:
            self._window(self._policy.window, bool(odd))
        self._last_ones()
        self._unusable_ones(bool(odd))
        self._chains()
        keep = tuple(backup for backup in self._backups if backup.label in self._keep)
        remove = [backup for backup in self._backups if backup.label not in self._keep]
        reasons = {label: tuple(why) for label, why in self._keep.items()}
        for backup in remove:
            why = "the policy does not need it"
            reasons[backup.label] = (self._unusable.get(backup.label, why),)
        return ExpirePlan(keep, self._in_order(remove), reasons, self._wal(keep), tuple(self._notes))

    def _nothing(self, why: str) -> ExpirePlan:
        reasons = {backup.label: (why,) for backup in self._backups}
        return ExpirePlan(tuple(self._backups), (), reasons, (), (f"Nothing is removed: {why}.",))

    def _stay(self, backups: Iterable[Backup], why: str) -> None:
        for backup in backups:
            reasons = self._keep.setdefault(backup.label, [])
            if why not in reasons:
                reasons.append(why)

    def _leading_to(self, timeline: int) -> list[Backup]:
        """Restorable backups that are part of a timeline's past, oldest first by their place in the WAL."""
        try:
            found = [b for b in self._restorable if self._tree.contains(timeline, b.timeline, b.stop_lsn)]
        except PitrError:
            return []
        return sorted(found, key=lambda backup: (backup.stop_lsn, backup.started_at))

    def _odd_clock(self) -> str:
        """What shows that a clock was set back; empty when nothing does."""
        ahead = [backup for backup in self._backups if backup.stopped_at > self._now + CLOCK_SLACK]
        if ahead:
            return (
                f"Backup {ahead[-1].label} ended at {format_time(ahead[-1].stopped_at)}, and here it is"
                f" {format_time(self._now)}: a clock was set back."
            )
        for timeline in self._timelines():
            found = self._leading_to(timeline)
            for earlier, later in zip(found, found[1:]):
                if later.stopped_at < earlier.stopped_at:
                    return f"Backup {later.label} has an earlier time than {earlier.label} before it in the WAL."
        return ""

    def _timelines(self) -> list[int]:
        return [each for each in self._tree.timelines if each == 1 or each in self._tree.histories]

    def _count(self, number: int, odd: bool) -> None:
        """The newest full backups: of those that lead to the newest timeline, and of all, by their time."""
        why = f"one of the newest {number} full backups"
        fulls = [backup for backup in self._restorable if backup.type == "full"]
        leading = [backup for backup in self._leading_to(self._tree.newest) if backup.type == "full"]
        self._stay(leading[-number:], why)
        self._stay(fulls[-number:], why)
        if odd:
            self._stay((b for b in fulls if b not in leading), "of another timeline, and the clock is in doubt")

    def _window(self, window: datetime.timedelta, odd: bool) -> None:
        """On every timeline that was written to in the window: the newest backup from before it, and all later ones."""
        begin = self._now - window if not odd else datetime.datetime.min.replace(tzinfo=datetime.timezone.utc)
        for timeline in self._timelines():
            written = self._circumstances.written.get(timeline)
            alive = timeline == self._tree.newest or (written is None or written >= begin)
            leading = self._leading_to(timeline)
            # The archive's files are what a host with a writer's key says; the backups are ours.
            alive = alive or any(backup.stopped_at >= begin for backup in leading)
            if not alive or (self._index.last(timeline) is None and timeline != self._tree.newest):
                continue
            before = [position for position, backup in enumerate(leading) if backup.stopped_at <= begin]
            self._stay(leading[before[-1] + 1 if before else 0 :], "within the recovery window")
            if before:
                self._stay([leading[before[-1]]], "the recovery window begins with it")

    def _last_ones(self) -> None:
        """The last restorable backup never goes, that of the newest timeline neither."""
        why = "the last restorable backup"
        for group in (self._restorable, self._leading_to(self._tree.newest)):
            if group and not any(backup.label in self._keep for backup in group):
                self._stay(group[-1:], why)

    def _unusable_ones(self, odd: bool) -> None:
        """A backup that cannot be restored stays while it is newer than one that can: somebody may mend it."""
        oldest = min(b.stopped_at for b in self._restorable if b.label in self._keep)
        for backup in self._backups:
            why = self._unusable.get(backup.label)
            if why and (odd or backup.stopped_at >= oldest):
                self._stay([backup], f"cannot be restored ({why}); not older than what stays, so look at it first")

    def _root(self, backup: Backup) -> str:
        """What a chain is known by: the label of its full backup, or of the first parent that is missing."""
        label = backup.label
        seen = {label}
        while label in self._by_label and self._by_label[label].parent is not None:
            label = str(self._by_label[label].parent)
            if label in seen:
                return min(seen)
            seen.add(label)
        return label

    def _chains(self) -> None:
        """Whole or gone."""
        wanted = {self._root(self._by_label[label]): label for label in sorted(self._keep)}
        for backup in self._backups:
            root = self._root(backup)
            if backup.label not in self._keep and root in wanted:
                self._stay([backup], f"in one chain with {wanted[root]}")

    def _in_order(self, remove: list[Backup]) -> tuple[Backup, ...]:
        def depth(backup: Backup) -> int:
            steps = 0
            at: Backup | None = backup
            while at is not None and at.parent is not None and steps <= len(self._backups):
                steps += 1
                at = self._by_label.get(at.parent)
            return steps

        return tuple(sorted(remove, key=lambda backup: (-depth(backup), backup.stopped_at, backup.label)))

    def _wal(self, keep: Sequence[Backup]) -> tuple[WalRange, ...]:
        """What no backup that stays, and none that is being taken, needs."""
        doubts = list(self._circumstances.doubts)
        if doubts:
            self._notes += [f"No WAL is removed: {doubt}." for doubt in doubts]
            return ()
        points = [(backup.timeline, backup.start_lsn, backup.stop_lsn) for backup in keep]
        points += [(floor.timeline, floor.lsn, floor.lsn) for floor in self._circumstances.floors]
        lost = [t for t in self._tree.timelines if t != 1 and t not in self._tree.histories]
        if lost:
            names = ", ".join(map(str, lost))
            self._notes.append(f"The history file of timeline {names} is missing; its WAL stays.")
        return unneeded(self._index, needed_from(points, self._index))
