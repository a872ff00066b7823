# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Where a target lies in the archived WAL: a transaction's end, a restore point, the last transaction before a time.

PostgreSQL stops at the *first* record that matches behind the start of the backup (recoveryStopsBefore and
recoveryStopsAfter of xlogrecovery.c), so what is looked for here is the first one for the backup that will be chosen.
"""

from __future__ import annotations

import datetime
import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from .catalog import Backup
from .index import ArchiveIndex
from .plan import Location
from .reach import needed_spans, reachable_end
from .target import RecoveryTarget, format_time
from .waldump import Record, WalScanner

# Names and transactions that are told.
MAX_TOLD = 5
# Segments behind a restore point that are looked through for another one of its name.
LOOK_ON = 64


@dataclass
class Found:
    """What was found. ``commits``: by label, the last transaction that can be replayed from that backup."""

    location: Location | None = None
    commits: dict[str, datetime.datetime] = field(default_factory=dict)
    nearby: str = ""
    notes: list[str] = field(default_factory=list)


def full_xid(xid: int, near: int) -> int:
    """The 64-bit id with the low 32 bits of ``xid`` that lies nearest to ``near`` (FullTransactionIdFromXidAndCtx)."""
    distance = (xid - near + (1 << 31)) % (1 << 32) - (1 << 31)
    return max(near + distance, xid & 0xFFFFFFFF)


class _Transactions:
    """What is met on the way to one, to tell it when that is not found."""

    def __init__(self, xid: int) -> None:
        self.xid = xid
        self.low = xid & 0xFFFFFFFF
        # 64-bit id of a transaction of the same time, to tell which turn of the 32-bit counter a record belongs to.
        self.near: int | None = None
        self.other_turn: int | None = None
        self.parent: Record | None = None
        self.prepared: Record | None = None
        self._below: tuple[int, Record] | None = None
        self._above: tuple[int, Record] | None = None

    def watch(self, record: Record) -> None:
        if record.prepared is not None and record.xid == self.low:
            self.prepared = record
        if record.time is None or record.prepared is not None:
            return
        if self.low in record.subtransactions:
            self.parent = record
        if self.near is not None:
            self.near = max(self.near, full_xid(record.ended_xid, self.near))
        distance = (record.ended_xid - self.low + (1 << 31)) % (1 << 32) - (1 << 31)
        if distance < 0 and (self._below is None or distance > self._below[0]):
            self._below = distance, record
        if distance > 0 and (self._above is None or distance < self._above[0]):
            self._above = distance, record

    def is_it(self) -> bool:
        """Whether the record just seen with our low 32 bits is of our turn of the counter, as far as that is known."""
        if self.xid < 1 << 32 or self.near is None:
            return True
        turn = full_xid(self.low, self.near)
        if turn != self.xid:
            self.other_turn = turn
        return turn == self.xid

    def nearby(self) -> str:
        told = []
        if self.parent is not None:
            told.append(
                f"{self.xid} is a subtransaction of {self.parent.ended_xid}, whose end is the only one that WAL tells:"
                f" ask for {self.parent.ended_xid} ({_ended(self.parent)})."
            )
        if self.prepared is not None:
            told.append(
                f"It was prepared at LSN {self.prepared.lsn} as '{self.prepared.prepared}', and neither committed nor"
                " rolled back since then."
            )
        if self.other_turn is not None:
            told.append(f"The transaction with the same lower 32 bits there is {self.other_turn}.")
        near = [item[1] for item in (self._below, self._above) if item is not None]
        if near and not told:
            told.append(f"The nearest there: {'; '.join(f'{r.ended_xid} ({_ended(r)})' for r in near)}.")
        return " ".join(told)


def _ended(record: Record) -> str:
    what = "committed" if record.is_commit else "rolled back"
    when = f" {format_time(record.time)}" if record.time is not None else ""
    return f"{what}{when}, LSN {record.lsn}"


class _Names:
    """The restore points that are met on the way to one."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._names: dict[str, Record] = {}

    def watch(self, record: Record) -> None:
        if record.restore_point is not None:
            self._names.setdefault(record.restore_point, record)

    def nearby(self) -> str:
        if not self._names:
            return "There is no restore point at all."
        close = difflib.get_close_matches(self._name, self._names, MAX_TOLD, 0.5)
        last = sorted(self._names, key=lambda name: self._names[name].lsn)[-MAX_TOLD:]
        told = close or last
        more = len(self._names) - len(told)
        listed = ", ".join(f"{name!r} (LSN {self._names[name].lsn})" for name in told)
        return f"There are: {listed}" + (f", and {more} more." if more else ".")


class Locator:
    """Looks for one target along one timeline."""

    def __init__(self, scanner: WalScanner, index: ArchiveIndex, timeline: int, whole: Sequence[Backup]) -> None:
        """``whole``: backups that lead to the timeline and are not damaged."""
        self._scanner = scanner
        self._index = index
        self._timeline = timeline
        self._backups = sorted(whole, key=lambda backup: (backup.stop_lsn, backup.start_lsn), reverse=True)

    def find(self, target: RecoveryTarget) -> Found:
        """Look. Raises PitrError when WAL cannot be read."""
        if target.time is not None:
            return self._last_commits(target.time)
        if target.xid is not None:
            return self._transaction(target.xid)
        if target.name is not None:
            return self._restore_point(target.name)
        return Found()

    def _reach(self, backup: Backup) -> int:
        """Number of the last segment that can be replayed from this backup: what lies behind a hole cannot."""
        last, _count, missing = reachable_end(backup, self._index, self._timeline)
        return min(number for _tli, number in missing) - 1 if missing else last

    def _last_commits(self, time: datetime.datetime) -> Found:
        found = Found()
        newest: Backup | None = None
        for backup in self._backups:
            if backup.stopped_at > time or (newest is not None and backup.start_lsn <= newest.start_lsn):
                # The plan will begin with another one, and what that one reaches is the question.
                continue
            newest = newest or backup
            spans = needed_spans(backup, self._index.tree, self._timeline)
            record = self._scanner.last_transaction(spans, self._reach(backup))
            # Without any, none is later than (or, for an exclusive target, at) a time this backup can be used for.
            none = backup.stopped_at - datetime.timedelta(microseconds=1)
            found.commits[backup.label] = record.time if record is not None and record.time is not None else none
        return found

    def _transaction(self, xid: int) -> Found:
        seen = _Transactions(xid)
        pending: Location | None = None
        for backup, end in self._pieces(xid):
            spans = needed_spans(backup, self._index.tree, self._timeline)
            seen.near = backup.next_xid
            here = self._scanner.find_xid(spans, end, xid, seen.watch)
            if here is None or not seen.is_it():
                continue
            if here.lsn >= backup.stop_lsn:
                return Found(location=here, notes=self._end_of(xid, here))
            # It ended while this backup was taken: an older one has to be used.
            pending = here
        return Found(location=pending, nearby="" if pending else seen.nearby())

    def _pieces(self, xid: int) -> Iterator[tuple[Backup, int]]:
        """Where to look for a transaction: from the start of these backups up to these segments, in this order."""
        newest = max((backup.next_xid for backup in self._backups if backup.next_xid is not None), default=None)
        wanted = xid if newest is None or xid >= 1 << 32 else full_xid(xid, newest)
        for position, backup in enumerate(self._backups):
            if backup.next_xid is not None and backup.next_xid <= wanted:
                # It began after this backup had ended, and most transactions end soon: forwards from here.
                looked: set[int] = set()
                for later in self._backups[position::-1]:
                    reach = self._reach(later)
                    if reach not in looked:
                        yield later, reach
                    looked.add(reach)
                return
        until: int | None = None
        for backup in self._backups:
            reach = self._reach(backup)
            yield backup, reach if until is None else min(reach, until)
            until = backup.start_lsn.segment_number(self._index.segment_size)

    def _end_of(self, xid: int, location: Location) -> list[str]:
        when = f", {format_time(location.time)}" if location.time is not None else ""
        # One that was rolled back is a target like any other, and hardly what somebody wants.
        verb = "committed" if location.committed else "was rolled back"
        return [f"transaction {xid} {verb} at LSN {location.lsn}{when}"]

    def _restore_point(self, name: str) -> Found:
        names = _Names(name)
        pending: Location | None = None
        until: int | None = None
        for backup in self._backups:
            reach = self._reach(backup)
            end = reach if until is None else min(reach, until)
            spans = needed_spans(backup, self._index.tree, self._timeline)
            here = self._scanner.find_name(spans, end, name, names.watch)
            here = here or pending
            if here is not None and here.lsn >= backup.stop_lsn:
                notes = [f"restore point {name!r} lies at LSN {here.lsn}", *self._others(backup, here, name, reach)]
                return Found(location=here, notes=notes)
            pending = here
            until = backup.start_lsn.segment_number(self._index.segment_size)
        return Found(location=pending, nearby="" if pending else names.nearby())

    def _others(self, backup: Backup, here: Location, name: str, reach: int) -> list[str]:
        """Whether another restore point of this name follows; PostgreSQL stops at the first."""
        number = here.lsn.segment_number(self._index.segment_size)
        spans = [
            span
            for span in needed_spans(backup, self._index.tree, self._timeline)
            if span.end is None or span.end > here.lsn
        ]
        spans[0] = type(spans[0])(spans[0].timeline, here.lsn, spans[0].end)
        others = [
            record.lsn
            for record in self._scanner.records(spans, min(reach, number + LOOK_ON), ("XLOG",))
            if record.restore_point == name and record.lsn > here.lsn
        ]
        if not others:
            return []
        return [
            f"{len(others) + 1} restore points are called {name!r}: recovery stops at the first one behind the backup,"
            f" LSN {here.lsn}; the others lie at {', '.join(map(str, others[:MAX_TOLD]))}, and can be named by that"
            " (recovery_target_lsn)"
        ]
