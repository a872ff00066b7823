# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Where PostgreSQL stops for a target, told from every record of the WAL, and what a cluster holds there.

This is the suite's own reading of recoveryStopsBefore and recoveryStopsAfter (xlogrecovery.c). It asks neither the plan
nor anything else of the engine: the records are what pg_waldump shows of the primaries' own pg_wal, and the worlds are
what the test itself has written.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ansible_collections.pgdrill.pitr.plugins.module_utils.catalog import Backup

_LINE = re.compile(r"rmgr: (\S+)\s.*?, tx:\s*(\d+), lsn: ([0-9A-F]+)/([0-9A-F]+), prev \S+ desc: (.*)")
_ENDED = re.compile(r"(?:COMMIT|ABORT)(?:_PREPARED (\d+):)? (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(?:\.\d+)?) UTC")


@dataclass(frozen=True)
class Record:
    """A record of the WAL. ``ended``: the transaction that it commits or aborts; ``time``: when, in UTC."""

    lsn: int
    timeline: int
    kind: str
    xid: int
    text: str
    ended: int | None = None
    time: datetime.datetime | None = None


def parse_record(line: str, timeline: int) -> Record | None:
    """One line of pg_waldump, which was run with TZ=UTC."""
    match = _LINE.match(line)
    if match is None:
        return None
    kind, xid, high, low, text = match.groups()
    ended = when = None
    end = _ENDED.match(text) if kind == "Transaction" else None
    if end is not None:
        ended = int(end.group(1) or xid)
        when = datetime.datetime.fromisoformat(f"{end.group(2):.26}").replace(tzinfo=datetime.timezone.utc)
    return Record(int(high, 16) << 32 | int(low, 16), timeline, kind, int(xid), text, ended, when)


@dataclass(frozen=True)
class World:
    """What a cluster holds. ``databases``: name to the phase in which it was copied; ``invalid``: those that a DROP
    DATABASE has begun with. ``scratch``: rows of a table that is unlogged at first (none survive a recovery);
    ``far_rows``: those of a table in the tablespace; -1 when the table is not there.
    """

    phase: str = ""
    trail: frozenset[str] = frozenset()
    databases: Mapping[str, str] = field(default_factory=dict)
    invalid: frozenset[str] = frozenset()
    tablespaces: frozenset[str] = frozenset()
    far_rows: int = -1
    prepared: frozenset[str] = frozenset()
    objects: Mapping[int, str] = field(default_factory=dict)
    scratch: int = -1


@dataclass(frozen=True)
class Event:
    """A change of the world, with the record that brings it about."""

    name: str
    record: Record
    world: World


@dataclass(frozen=True)
class Stop:
    """``record``: the one at which replay stops, None at the end of WAL; ``applied``: whether it is replayed.

    ``backup``: the label it begins with. ``may_refuse``: a careful engine may say that this backup is too young, though
    PostgreSQL would do it.
    """

    backup: str
    record: Record | None
    applied: bool
    world: World
    replayed: Record
    reason: str
    may_refuse: bool = False


@dataclass(frozen=True)
class Refused:
    """No recovery can do that. ``codes``: the refusals that tell why."""

    codes: frozenset[str]


TOO_EARLY = Refused(frozenset({"target_before_backup", "target_before_first_backup"}))
TOO_LATE = Refused(frozenset({"target_beyond_archive"}))
NOT_THERE = Refused(frozenset({"target_not_in_archive"}))
NO_BACKUP = Refused(frozenset({"no_backup_on_timeline"}))


class Oracle:
    """``records`` by timeline, ascending; ``switches``: of each timeline its parent and the position of the switch."""

    def __init__(
        self,
        records: Mapping[int, Sequence[Record]],
        switches: Mapping[int, tuple[int, int]],
        events: Sequence[Event],
        backups: Mapping[str, Backup],
    ) -> None:
        self.records = records
        self.switches = switches
        self.events = {event.record: event for event in events}
        self.backups = backups

    @property
    def newest(self) -> int:
        return max(self.records)

    def path(self, timeline: int) -> list[Record]:
        """The records of a timeline's past and of itself."""
        below: list[Record] = []
        if timeline in self.switches:
            parent, switch = self.switches[timeline]
            below = [record for record in self.path(parent) if record.lsn < switch]
        return below + list(self.records[timeline])

    def end_of(self, backup: Backup) -> Record:
        """The record that ends this backup; replay is consistent when it is replayed."""
        start = f"{backup.start_lsn >> 32:X}/{backup.start_lsn & 0xFFFFFFFF:X}"
        for record in self.records[backup.timeline]:
            match = re.match(r"BACKUP_END ([0-9A-F]+)/0*([0-9A-F]+)$", record.text) if record.kind == "XLOG" else None
            if match is not None and f"{match.group(1)}/{match.group(2)}" == start:
                return record
        raise AssertionError(f"the WAL has no end of backup {backup.label}")

    def number(self, timeline: str, backup: str) -> int:
        """What ``latest``, ``current`` or a number means to a restore from this backup."""
        if timeline == "latest":
            return self.newest
        return self.backups[backup].timeline if timeline == "current" else int(timeline)

    def predict(self, options: Mapping[str, Any], timeline: str, backup: str) -> Stop | Refused:
        """Where a restore from this backup (a label, or ``auto``) stops."""
        number = self.number(timeline, backup)
        if backup != "auto":
            return self._from(self.backups[backup], options, number)
        newest_first = sorted(self.backups.values(), key=lambda item: item.stopped_at, reverse=True)
        outcomes = [self._from(candidate, options, number) for candidate in newest_first]
        stops = [outcome for outcome in outcomes if isinstance(outcome, Stop)]
        if stops:
            # The newest that will do without doubt; if there is none, a careful engine may refuse.
            return next((stop for stop in stops if not stop.may_refuse), stops[0])
        # The oldest one has the most to say.
        told = [outcome for outcome in outcomes if isinstance(outcome, Refused) and outcome is not NO_BACKUP]
        return told[-1] if told else NO_BACKUP

    def _from(self, backup: Backup, options: Mapping[str, Any], timeline: int) -> Stop | Refused:
        path, end = self.path(timeline), self.end_of(backup)
        if end not in path:
            return NO_BACKUP
        records = [record for record in path if record.lsn >= backup.start_lsn]
        found = _stop(records, options, end)
        if isinstance(found, Refused):
            return found
        at, applied, reason = found
        replayed = records[-1] if at is None else at if applied else records[max(records.index(at) - 1, 0)]
        if replayed.lsn < end.lsn:
            return TOO_EARLY
        when, lsn = options.get("recovery_target_time"), options.get("recovery_target_lsn")
        careful = when is not None and datetime.datetime.fromisoformat(when) < backup.stopped_at
        careful = careful or (lsn is not None and _parse_lsn(lsn) < backup.stop_lsn)
        return Stop(backup.label, at, applied, self.world(path, replayed), replayed, reason, careful)

    def world(self, path: Sequence[Record], replayed: Record) -> World:
        """What is there when the last replayed record is this one."""
        result = World()
        for record in path:
            if record in self.events:
                result = self.events[record].world
            if record == replayed:
                return result
        raise AssertionError(f"{replayed} is not on the path")


def _parse_lsn(text: str) -> int:
    high, low = text.split("/")
    return int(high, 16) << 32 | int(low, 16)


def _stop(
    records: Sequence[Record], options: Mapping[str, Any], end: Record
) -> tuple[Record | None, bool, str] | Refused:
    """The record at which recovery stops, whether it is replayed, and the beginning of PostgreSQL's reason."""
    inclusive = options.get("recovery_target_inclusive", True)
    side = "after" if inclusive else "before"
    if "recovery_target" in options:
        return end, True, "reached consistency"
    if "recovery_target_xid" in options:
        xid = int(options["recovery_target_xid"])
        found = next((record for record in records if record.ended == xid), None)
        return (found, inclusive, f"{side} transaction {xid}") if found else NOT_THERE
    if "recovery_target_name" in options:
        name = options["recovery_target_name"]
        found = next((r for r in records if r.kind == "XLOG" and r.text == f"RESTORE_POINT {name}"), None)
        return (found, True, f'at restore point "{name}"') if found else NOT_THERE
    if "recovery_target_lsn" in options:
        lsn = _parse_lsn(options["recovery_target_lsn"])
        found = next((record for record in records if record.lsn >= lsn), None)
        if found is None:
            return TOO_LATE
        return found, inclusive, f"{side} LSN {found.lsn >> 32:X}/{found.lsn & 0xFFFFFFFF:X}"
    if "recovery_target_time" in options:
        when = datetime.datetime.fromisoformat(options["recovery_target_time"])
        for record in records:
            if record.time is not None and (record.time > when or (record.time == when and not inclusive)):
                return record, False, "before 2"
        return TOO_LATE
    return None, True, "no recovery target specified"
