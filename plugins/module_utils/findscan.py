# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Reading the archive between two times: where to begin is searched for, and everything from there on is streamed.

A segment is not stamped with a time, but its commits are. The first commit of a segment is found by reading its
beginning, so that a search by halves needs some twenty segments of a million.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .findtarget import RMGRS, Ended, Ledger, is_wanted, precedes
from .index import ArchiveIndex
from .timeline import Span
from .wal import Lsn
from .waldump import Record, WalScanner

# Commit records are not in the order of their times: a backend takes the time before it gets its place in WAL, and a
# clock may be set back. So much earlier and later is looked, too.
SLACK = datetime.timedelta(minutes=1)
# Segments; how far back the beginning of a transaction is looked for at most.
MAX_BACK = 4096
FIRST_STEP = 8


class FindScanner(WalScanner):
    """A scanner that passes over lines which a ledger would not look at, before they are taken apart."""

    inserts = False

    def _wanted(self, line: bytes) -> bool:
        return is_wanted(line, self.inserts)


@dataclass(frozen=True)
class Run:
    """An unbroken run of segments ``first`` to ``last`` along ``span``."""

    span: Span
    first: int
    last: int


class Path:
    """The archived segments on the way to a timeline, in the order of WAL; holes are where two runs do not meet."""

    def __init__(self, index: ArchiveIndex, timeline: int) -> None:
        """Raises PitrError when the timeline's history file is missing."""
        size = index.segment_size
        self.index = index
        self.timeline = timeline
        self.runs: list[Run] = []
        for span in index.tree.path(timeline):
            begin = span.begin.segment_number(size)
            end = None if span.end is None else span.end.segment_number(size)
            for first, last in index.ranges(span.timeline):
                first, last = max(first, begin), last if end is None else min(last, end)
                if first <= last:
                    self.runs.append(Run(span, first, last))

    def __len__(self) -> int:
        return sum(run.last - run.first + 1 for run in self.runs)

    def at(self, position: int) -> tuple[Span, int]:
        """The segment at this position, counted from the oldest one."""
        for run in self.runs:
            if position <= run.last - run.first:
                return run.span, run.first + position
            position -= run.last - run.first + 1
        raise IndexError(position)

    def name(self, position: int) -> str:
        """Its file name."""
        span, number = self.at(position)
        return self.index.name(span.timeline, number)

    def since(self, position: int) -> Iterator[Run]:
        """The runs from this position on."""
        for run in self.runs:
            length = run.last - run.first + 1
            if position < length:
                yield Run(run.span, run.first + max(position, 0), run.last)
            position -= length

    def holes(self, position: int) -> list[str]:
        """First and last name of what is missing between the runs from this position on."""
        found = []
        runs = list(self.since(position))
        for one, other in zip(runs, runs[1:]):
            # The first segment of a timeline holds its parent's part of it as well.
            if other.first > one.last + 1:
                timeline = other.span.timeline if other.span.timeline == one.span.timeline else one.span.timeline
                names = (self.index.name(timeline, number) for number in (one.last + 1, other.first - 1))
                found.append(" to ".join(dict.fromkeys(names)))
        return found


class Search:
    """One path, read between two times."""

    def __init__(self, scanner: FindScanner, path: Path) -> None:
        self._scanner = scanner
        self._path = path
        self.read_from = 0
        self.segments_read = 0
        self.last_time: datetime.datetime | None = None
        self.forgotten = 0

    def begin(self, since: datetime.datetime | None) -> int:
        """The position to read from, so that every commit from ``since`` on is met."""
        if since is None:
            return 0
        wanted = since - SLACK
        low, high = 0, len(self._path)
        while low < high:
            middle = (low + high) // 2
            position, time = self._first_commit(middle, high)
            if time is None or time >= wanted:
                high = middle
            else:
                low = position + 1
        # The last segment that begins before that time; its first commit need not be its last one.
        return max(low - 1, 0)

    def _first_commit(self, position: int, end: int) -> tuple[int, datetime.datetime | None]:
        """The first commit in the segments from ``position`` on, and the segment it is in."""
        while position < end:
            span, number = self._path.at(position)
            for record in self._records(span, number, number, ("Transaction",)):
                if record.time is not None:
                    return position, record.time
            position += 1
        return end, None

    def _records(self, span: Span, first: int, last: int, rmgrs: tuple[str, ...], after: int = -1) -> Iterator[Record]:
        begin = Lsn(max(first * self._path.index.segment_size, after + 1))
        return self._scanner.records([Span(span.timeline, begin, span.end)], last, rmgrs)

    def ended(
        self, position: int, until: datetime.datetime | None, only: Iterable[int] | None = None
    ) -> Iterator[Ended]:
        """Every transaction that commits from this position on, in the order of WAL, until ``until`` is well over."""
        ledger = Ledger(only)
        size = self._path.index.segment_size
        rmgrs = (*RMGRS, "Heap2") if self._scanner.inserts else RMGRS
        self.read_from = position
        self.segments_read = 0
        self.last_time = None
        previous: Run | None = None
        seen = -1
        for run in self._path.since(position):
            if previous is not None and run.first > previous.last + 1:
                ledger.gap()
            for record in self._records(run.span, run.first, run.last, rmgrs, seen):
                seen = int(record.lsn)
                time = record.time if record.rmgr == "Transaction" else None
                if time is not None:
                    self.last_time = time
                    if until is not None and time > until + SLACK:
                        self.segments_read += record.lsn.segment_number(size) - run.first + 1
                        self.forgotten = ledger.dropped_accounts
                        return
                ended = ledger.feed(record)
                if ended is not None:
                    yield ended
            self.segments_read += run.last - run.first + 1
            previous = run
        self.forgotten = ledger.dropped_accounts

    def before(self, position: int, xid: int) -> int | None:
        """A position from which on everything of this transaction is met; None when the archive does not reach back.

        WAL tells from time to time which transaction id comes next (RUNNING_XACTS); from there on all its records
        follow. It is looked for backwards, in steps that double.
        """
        step = FIRST_STEP
        while position > 0 and step <= MAX_BACK:
            start = max(position - step, 0)
            for at in range(start, position):
                following = self._next_xid(at)
                if following is not None:
                    if not precedes(xid, following):
                        return at
                    break
            position, step = start, step * 2
        return None

    def _next_xid(self, position: int) -> int | None:
        span, number = self._path.at(position)
        for record in self._records(span, number, number, ("Standby",)):
            match = record.description.startswith("RUNNING_XACTS nextXid")
            if match:
                return int(record.description.split()[2])
        return None
