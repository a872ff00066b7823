# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The heart: from backups, archive and target to a restore plan, or to every reason why not. Pure; nothing is read
here.

Rules: a restore begins with the newest backup whose *stop* point lies before the target, on the ancestry of the target
timeline, and needs every segment from the backup's start to the target. Source: "Recovering Using a Continuous Archive
Backup", and the checks of ``xlogrecovery.c`` that would otherwise stop the server half-way.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .catalog import Backup, broken_chains, chain
from .errors import PitrError
from .index import ArchiveIndex
from .nearest import Nearest, timelines_with_backups
from .reach import MAX_NAMED, carries, needed_spans, reachable_end
from .target import RecoveryTarget, format_time
from .timeline import Span, TimelineTree
from .wal import Lsn, history_name


@dataclass(frozen=True)
class Refusal:
    """Why a restore will not be tried. ``code`` is stable; ``nearest`` is what would work, or empty."""

    code: str
    message: str
    nearest: str = ""

    def to_dict(self) -> dict[str, str]:
        """For a module's result."""
        return {"code": self.code, "message": self.message, "nearest": self.nearest}


class RefusedError(PitrError):
    """A restore was refused before anything was touched; ``refusals`` has every reason, ``intro`` says what is so."""

    def __init__(
        self, refusals: Sequence[Refusal], intro: str = "The restore is refused; nothing was touched."
    ) -> None:
        self.refusals = tuple(refusals)
        lines = [
            f"[{item.code}] {item.message}" + (f" {item.nearest}" if item.nearest else "") for item in self.refusals
        ]
        super().__init__(
            f"{intro} " + " ".join(lines),
            refusals=[item.to_dict() for item in self.refusals],
        )


@dataclass(frozen=True)
class Location:
    """Where a transaction's end or a restore point lies in the WAL. ``lsn`` is the start of its record."""

    lsn: Lsn
    timeline: int
    time: datetime.datetime | None = None
    committed: bool = True


@dataclass(frozen=True)
class RestorePlan:
    """What a restore would do. Segment numbers are inclusive; ``wal_bytes`` counts whole segments.

    ``from_receiver`` and ``from_pg_wal``: segments that come from a receiver's spool, or from the pg_wal of the server
    that has died, because the archive does not have them yet; ``at_least``: the start of the last record in them, which
    a recovery to the end has to come to. ``looked``: what this host, and the server that was backed up, add to it.
    """

    backup: Backup
    target: RecoveryTarget
    timeline: int
    spans: tuple[Span, ...]
    first_segment: str
    last_segment: str
    segments: int
    wal_bytes: int
    end_lsn: Lsn
    notes: tuple[str, ...] = ()
    from_receiver: tuple[str, ...] = ()
    from_pg_wal: tuple[str, ...] = ()
    at_least: Lsn | None = None
    # Where the target is in the WAL, when that is known: the LSN itself, or the start of the transaction's end or the
    # restore point.
    target_lsn: Lsn | None = None
    # What the restored directory is made of: the full backup first, ``backup`` last.
    chain: tuple[Backup, ...] = ()
    # Whether the directory that is there is changed in place (delta.py) instead of being moved aside.
    in_place: bool = False
    looked: Mapping[str, Any] = field(default_factory=dict)

    @property
    def from_elsewhere(self) -> tuple[str, ...]:
        """Segments that are not archived, in order."""
        return tuple(sorted((*self.from_receiver, *self.from_pg_wal)))

    def to_dict(self) -> dict[str, Any]:
        """For a module's result."""
        return {
            "backup": self.backup.label,
            "chain": [link.label for link in self.chain],
            "backup_timeline": self.backup.timeline,
            "start_lsn": str(self.backup.start_lsn),
            "consistent_lsn": str(self.backup.stop_lsn),
            "target": str(self.target),
            "target_kind": self.target.kind,
            "target_value": self.target.value,
            "target_inclusive": self.target.inclusive,
            "target_action": self.target.action,
            "timeline": self.timeline,
            "timeline_path": [
                {
                    "timeline": span.timeline,
                    "from": str(span.begin),
                    "to": str(span.end) if span.end is not None else None,
                }
                for span in self.spans
            ],
            "first_segment": self.first_segment,
            "last_segment": self.last_segment,
            "segments": self.segments,
            "wal_bytes": self.wal_bytes,
            "end_lsn": str(self.end_lsn),
            "backup_bytes": self.backup.directory_bytes,
            "in_place": self.in_place,
            "from_receiver": list(self.from_receiver),
            "from_pg_wal": list(self.from_pg_wal),
            "at_least": str(self.at_least) if self.at_least is not None else None,
            "target_lsn": str(self.target_lsn) if self.target_lsn is not None else None,
            "notes": list(self.notes),
            **self.looked,
        }


def plan(
    backups: Sequence[Backup],
    index: ArchiveIndex,
    target: RecoveryTarget,
    choice: str = "auto",
    damaged: Mapping[str, str] | None = None,
    location: Location | None = None,
    last_commit: datetime.datetime | Mapping[str, datetime.datetime] | None = None,
    nearby: str = "",
) -> RestorePlan:
    """Decide. ``choice`` is auto, latest or a label; ``damaged`` maps labels to what is wrong with them.

    ``location`` is where an xid or name target was found; when it was not, ``nearby`` is what there is of its kind.
    ``last_commit`` is the time of the last transaction that can be replayed, without a hole, from the newest backup
    that stopped before a time target, or such times by the backups' labels; None when it is not known. Raises
    RefusedError with every reason.
    """
    damaged = damaged or {}
    tree = index.tree
    if not backups:
        raise RefusedError(
            [Refusal("no_backup", "The repository holds no base backup of this cluster.", "Take one first.")]
        )
    refusals: list[Refusal] = []
    try:
        chosen(backups, choice)
    except RefusedError as error:
        # What else is wrong is told of the backup that would be chosen without that.
        refusals += error.refusals
        choice = "auto"
    try:
        timeline = target_timeline(target, tree, backups, choice)
        related = candidates(backups, tree, timeline, choice)
    except RefusedError as error:
        raise RefusedError([*refusals, *error.refusals]) from None
    damaged = broken_chains(backups, damaged)
    whole = [backup for backup in related if backup.label not in damaged]
    if not whole:
        named = "; ".join(f"{backup.label}: {damaged[backup.label]}" for backup in related)
        others = [each.label for each in backups if each.label not in damaged and each not in related]
        nearest = f"Whole are: {', '.join(others[-MAX_NAMED:])}." if others else ""
        refusals.append(Refusal("backup_damaged", f"No whole backup is left to begin with: {named}.", nearest))
        raise RefusedError(refusals)
    fitting = [backup for backup in whole if _ends_before(backup, target, location)]
    fitting.sort(key=lambda item: (item.stop_lsn, item.started_at), reverse=True)
    commits: Mapping[str, datetime.datetime]
    if isinstance(last_commit, Mapping):
        commits = last_commit
    else:
        commits = {each.label: last_commit for each in fitting} if last_commit is not None else {}
    points = Nearest(whole, index, timeline, commits)
    if location is None and target.kind in ("xid", "name"):
        kind = "transaction" if target.kind == "xid" else "restore point"
        value = target.xid if target.kind == "xid" else f"'{target.name}'"
        code = "target_not_in_archive"
        message = f"The {kind} {value} is not in the archived WAL of timeline {timeline} after the oldest whole backup."
        raise RefusedError([*refusals, Refusal(code, message, f"{nearby} {points.window()}".strip())])
    if not fitting:
        code = "target_before_first_backup" if choice == "auto" else "target_before_backup"
        oldest = min(whole, key=lambda backup: backup.stop_lsn)
        message = (
            f"The target {target} lies before the end of the {'oldest usable' if choice == 'auto' else 'chosen'} backup"
        )
        nearest = points.first(whole)
        if choice != "auto":
            usable = [each for each in candidates(backups, tree, timeline, "auto") if each.label not in damaged]
            earlier = sorted((b for b in usable if _ends_before(b, target, location)), key=lambda b: b.stop_lsn)
            nearest = f"{nearest} {Nearest(usable, index, timeline, {}).without_choice(earlier)}".strip()
        raise RefusedError([*refusals, Refusal(code, message + f" ({oldest.label}).", nearest)])
    try:
        result = _first_that_works(fitting, index, target, timeline, location, commits, damaged, points)
    except RefusedError as error:
        raise RefusedError([*refusals, *error.refusals]) from None
    if refusals:
        raise RefusedError(refusals)
    return replace(result, chain=chain(result.backup, {each.label: each for each in backups}))


def _first_that_works(
    fitting: Sequence[Backup],
    index: ArchiveIndex,
    target: RecoveryTarget,
    timeline: int,
    location: Location | None,
    commits: Mapping[str, datetime.datetime],
    damaged: Mapping[str, str],
    points: Nearest,
) -> RestorePlan:
    """The plan of the newest of these backups (newest first) whose WAL is there. Raises the newest one's refusals.

    A backup that began later than the newest ended can be: two were taken at a time. It needs less WAL, and where the
    target is a point in time that all of them come to, it will do as well.
    """
    first: RefusedError | None = None
    for backup in fitting:
        if first is not None and (target.kind == "immediate" or backup.start_lsn <= fitting[0].start_lsn):
            # It would need what is missing, too; or be another point.
            continue
        try:
            result = _with_wal(backup, index, target, timeline, location, commits.get(backup.label), damaged, points)
        except RefusedError as error:
            first = first or error
            continue
        if first is not None and target.kind == "latest" and result.end_lsn < fitting[0].stop_lsn:
            # Less than the newest one has itself is not the latest.
            continue
        if first is not None:
            note = f"backup {fitting[0].label} is passed over: {first.refusals[0].message}"
            result = replace(result, notes=(*result.notes, note))
        return result
    if first is None:
        raise ValueError("no backup was given")
    raise first


def target_timeline(target: RecoveryTarget, tree: TimelineTree, backups: Sequence[Backup], choice: str) -> int:
    """Number of the timeline to recover along."""
    if target.timeline == "latest":
        newest = tree.newest
        if tree.timelines and tree.timelines[-1] > newest:
            # Without its history file a timeline cannot be followed, and an older one is not what "latest" means.
            lost = tree.timelines[-1]
            message = f"The archive has segments of timeline {lost}, but no {history_name(lost)}."
            nearest = f"Copy it back from a server's pg_wal, or ask for timeline {newest} by its number."
            raise RefusedError([Refusal("timeline_unknown", message, nearest)])
        return newest
    if target.timeline == "current":
        chosen = [backup for backup in backups if backup.label == choice] or list(backups)
        number = max(chosen, key=lambda backup: backup.stopped_at).timeline
    else:
        number = int(target.timeline)
    try:
        tree.switches(number)
    except PitrError as error:
        raise RefusedError([Refusal("timeline_unknown", error.message)]) from None
    return number


def chosen(backups: Sequence[Backup], choice: str) -> Sequence[Backup]:
    """The backups that were asked for. Raises RefusedError when there is none of that label."""
    if choice not in ("auto", "latest"):
        named = [backup for backup in backups if backup.label == choice]
        if not named:
            labels = ", ".join(sorted(backup.label for backup in backups))
            raise RefusedError(
                [Refusal("backup_not_found", f"There is no backup '{choice}'.", f"There are: {labels}.")]
            )
        return named
    return [max(backups, key=lambda backup: backup.stopped_at)] if choice == "latest" else backups


def candidates(backups: Sequence[Backup], tree: TimelineTree, timeline: int, choice: str) -> list[Backup]:
    """Backups that are part of the timeline's past, narrowed to what was asked for."""
    everything = backups
    backups = chosen(backups, choice)
    related = [backup for backup in backups if tree.contains(timeline, backup.timeline, backup.stop_lsn)]
    if not related:
        where = ", ".join(f"{backup.label} on timeline {backup.timeline}" for backup in backups[-MAX_NAMED:])
        message = f"No base backup leads to timeline {timeline}. The backups are: {where}."
        leads_to = timelines_with_backups(everything, tree)
        nearest = "Name another recovery_target_timeline"
        nearest += f": backups lead to {', '.join(map(str, leads_to))}." if leads_to else "."
        raise RefusedError([Refusal("no_backup_on_timeline", message, nearest)])
    return related


def _ends_before(backup: Backup, target: RecoveryTarget, location: Location | None) -> bool:
    """Whether the backup is consistent before the target is reached: its stop point, not its start."""
    if target.time is not None:
        return backup.stopped_at <= target.time
    if target.lsn is not None:
        return backup.stop_lsn <= target.lsn
    if location is not None:
        return backup.stop_lsn <= location.lsn
    return True


def segment_names(result: RestorePlan, index: ArchiveIndex) -> Iterator[str]:
    """Names of the segments that a plan needs, in the order of recovery, each from the timeline that has it."""
    size = index.segment_size
    first = result.backup.start_lsn.segment_number(size)
    position = 0
    for number in range(first, first + result.segments):
        while position + 1 < len(result.spans):
            end = result.spans[position].end
            if end is None or number < end.segment_number(size):
                break
            position += 1
        for span in reversed(result.spans[: position + 1]):
            if index.has(span.timeline, number):
                yield index.name(span.timeline, number)
                break


def _passes_switch(
    target: RecoveryTarget, location: Location | None, last_commit: datetime.datetime | None, switch: Lsn
) -> bool:
    """Whether a recovery may go on behind the position where the target's timeline began.

    When that timeline has archived nothing, PostgreSQL reads its first segment from the parent, does not stop at the
    switch, and goes on along the parent: another branch of the past, under a history that denies it.
    """
    if target.lsn is not None:
        # Inclusive applies the first record from there on, which may be the parent's first one behind the switch.
        return target.lsn > switch or target.inclusive
    if location is not None:
        return location.lsn >= switch
    if target.time is not None:
        # The last transaction that can be replayed lies before the switch then.
        return not target.stops_before(last_commit)
    return target.kind == "latest"


def _with_wal(
    backup: Backup,
    index: ArchiveIndex,
    target: RecoveryTarget,
    timeline: int,
    location: Location | None,
    last_commit: datetime.datetime | None,
    damaged: Mapping[str, str],
    points: Nearest,
) -> RestorePlan:
    """Check the WAL that the chosen backup needs and complete the plan."""
    size = index.segment_size
    last_there, _count, missing = reachable_end(backup, index, timeline)
    last = last_there
    if target.kind == "immediate":
        last = backup.stop_lsn.previous_segment_number(size)
    elif target.lsn is not None:
        last = target.lsn.segment_number(size)
    elif location is not None:
        last = location.lsn.segment_number(size)
    elif missing and target.stops_before(last_commit):
        # The recovery does not come to the hole.
        last = min(number for _timeline, number in missing) - 1
    spans = needed_spans(backup, index.tree, timeline)
    switch = spans[-1].begin
    borrowed = len(spans) > 1 and not index.has(timeline, switch.segment_number(size))
    comes_to_switch = last >= switch.segment_number(size) or target.kind == "latest"
    refusals = []
    in_the_way = [(tli, number) for tli, number in missing if number <= last]
    if in_the_way:
        names = [index.name(tli, number) for tli, number in in_the_way[:MAX_NAMED]]
        more = " and more" if len(in_the_way) > MAX_NAMED else ""
        hole = in_the_way[0][1]
        inside = hole * size < backup.stop_lsn
        other = points.consistent_elsewhere(backup) if inside else points.behind_hole(hole)
        message = f"The archive has a hole: {', '.join(names)}{more} missing, needed after backup {backup.label}."
        nearest = f"{points.before_hole(backup, hole, target)} {other}".strip()
        refusals.append(Refusal("archive_gap", message, nearest))
    if last > last_there and not (in_the_way and len(missing) > MAX_NAMED):
        message = f"The target {target} lies after the end of the archive."
        refusals.append(Refusal("target_beyond_archive", message, points.window()))
    elif target.lsn is not None and not in_the_way and carries(backup, index, timeline, last):
        # PostgreSQL stops at a record from there on, and there is none.
        message = f"The target {target} lies after the end of the archive: it has no WAL since the offline backup."
        nearest = (
            f"The backup {backup.label} itself ends at LSN {backup.stop_lsn}; 'immediate' and 'latest' restore it."
        )
        refusals.append(Refusal("target_beyond_archive", message, nearest))
    elif target.kind == "immediate" and target.action != "promote" and carries(backup, index, timeline, last):
        message = (
            f"The server cannot {target.action} at the end of the offline backup {backup.label}: PostgreSQL stops"
            " before a record, and there is no WAL since then."
        )
        refusals.append(Refusal("target_beyond_archive", message, "With recovery_target_action: promote it works."))
    if target.time is not None and not in_the_way and last_commit and not target.stops_before(last_commit):
        message = f"The target {target} is not before the last transaction in the archive."
        nearest = f"The latest restorable time is just before {format_time(last_commit)}; 'latest' restores everything."
        refusals.append(Refusal("target_beyond_archive", message, nearest))
    elif borrowed and not refusals and comes_to_switch and _passes_switch(target, location, last_commit, switch):
        parent = spans[-2].timeline
        message = (
            f"Timeline {timeline} began at LSN {switch} and has archived no WAL yet; PostgreSQL would go on with WAL of"
            f" timeline {parent} that is not part of its past."
        )
        nearest = (
            f"Archive a segment of timeline {timeline} first (pg_switch_wal() on its server), or ask for"
            f" recovery_target_timeline: {parent}."
        )
        refusals.append(Refusal("timeline_not_archived", message, nearest))
    if refusals:
        raise RefusedError(refusals)
    first = backup.start_lsn.segment_number(size)
    last_timeline = next(span.timeline for span in spans if span.end is None or last < span.end.segment_number(size))
    if borrowed and last_timeline == timeline:
        last_timeline = spans[-2].timeline
    notes = [f"backup {label} is passed over: {why}" for label, why in damaged.items()]
    return RestorePlan(
        backup=backup,
        target=target,
        timeline=timeline,
        spans=tuple(spans),
        first_segment=index.name(backup.timeline, first),
        last_segment=index.name(last_timeline, last),
        segments=last - first + 1,
        wal_bytes=(last - first + 1) * size,
        end_lsn=target.lsn if target.lsn is not None else Lsn((last + 1) * size),
        target_lsn=target.lsn if location is None else location.lsn,
        notes=tuple(notes),
    )
