# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a plan does with WAL beyond the archive's end: what is used of it, and what is only told of.

The pg_wal of the server that died is used for a restore of everything, which is what PostgreSQL's own procedure does;
the receiver's spool when somebody says so. For another target both are offered with the refusal of what lies beyond the
archive: a point that was meant to be in the archive, and is not, may be a mistake.
"""

from __future__ import annotations

import copy
import os
import re
from dataclasses import replace
from typing import Any

from . import deadwal, tail
from .encryption import LockedError
from .errors import PitrError
from .index import ArchiveIndex
from .plan import Refusal, RefusedError, RestorePlan
from .repository import Chapter, ClusterFolder
from .request import Request
from .tail import Tail
from .target import RecoveryTarget
from .timeline import Span
from .wal import Lsn, SegmentHeader, WalFile
from .waldump import WalScanner

# Refusals that WAL beyond the archive's end may turn into a plan.
_FOR_WANT_OF_WAL = ("target_beyond_archive", "target_not_in_archive", "timeline_not_archived", "archive_gap")
RECEIVER = "receiver"
PG_WAL = "pg_wal"


class Beyond:
    """One restore's view of it. ``used`` is what counts as archived, None before :meth:`look`."""

    def __init__(self, request: Request, folder: ClusterFolder, chapter: Chapter) -> None:
        self._request = request
        self._folder = folder
        self._chapter = chapter
        self._place = deadwal.Place()
        self._spool: Tail | None = None
        self._own: Tail | None = None
        self._spool_is_used = False
        self._own_is_used = False
        self.used: Tail | None = None
        # Start of the last record that follows the one before, as far as it is known.
        self._last: Lsn | None = None

    def look(self, target: RecoveryTarget, timeline: int, index: ArchiveIndex) -> None:
        """Look at both sources; what is used is in ``index`` from here on. Raises RefusedError for a wrong pg_wal."""
        self._spool = tail.look(self._folder, self._chapter, index, timeline)
        self._place = deadwal.find(self._request, self._chapter, timeline)
        if self._place.asked and self._place.problem:
            raise RefusedError([Refusal("dead_pg_wal", self._place.problem, "Without it: dead_pg_wal: none.")])
        self._own = Tail(timeline, self._spool.folder)
        if self._place.pg_wal:
            self._own = tail.look_into_pg_wal(self._folder, self._chapter, index, timeline, self._place.pg_wal)
        self._spool_is_used = self._request.use_partial
        self._own_is_used = self._place.asked or target.kind == "latest"
        nothing = Tail(timeline, self._spool.folder)
        used = tail.join(
            self._spool if self._spool_is_used else nothing,
            self._own if self._own_is_used else nothing,
            lambda _name: self._reach(self._own, index) > self._reach(self._spool, index),
        )
        self.used = self._unbroken(used, index)
        self._archived = copy.deepcopy(index)
        _add(self.used, index)

    def scanner(self, index: ArchiveIndex) -> WalScanner:
        """Reads the archive and, behind it, what is used."""
        return WalScanner(self._folder, self._chapter, index, self._request.bin_dir, self.used)

    def moved(self, old: str, new: str) -> None:
        """The old data directory has another name now."""
        if self.used is not None:
            self.used = self.used.moved(old, new)

    def reach(self, index: ArchiveIndex, local: str = "") -> Lsn | None:
        """Start of the last whole record in what is used, which is in ``index``.

        ``local``: a directory with copies, which are looked at instead.
        """
        found = self._last_record(self.used, index, local)
        return found if self._last is None or found is None else min(found, self._last)

    def _last_record(self, found: Tail | None, index: ArchiveIndex, local: str = "") -> Lsn | None:
        if found is None or not found.names:
            return None
        size = index.segment_size
        first, last = (WalFile.parse(found.names[at]).number(size) for at in (0, -1))
        scanner = WalScanner(self._folder, self._chapter, index, self._request.bin_dir, found)
        record = scanner.last_record([Span(found.timeline, Lsn(first * size), None)], last, local)
        return record.lsn if record is not None else None

    def _reach(self, found: Tail | None, index: ArchiveIndex) -> Lsn:
        """As :meth:`reach` of one source, which is not in ``index``; 0 without a record."""
        if found is None:
            return Lsn(0)
        other = copy.deepcopy(index)
        _add(found, other)
        return self._last_record(found, other) or Lsn(0)

    def _unbroken(self, found: Tail, index: ArchiveIndex) -> Tail:
        """The part of it in which one record follows the other, and the first one the archive's last."""
        if not found.names:
            return found
        other = copy.deepcopy(index)
        _add(found, other)
        size = index.segment_size
        first, last = (WalFile.parse(found.names[at]).number(size) for at in (0, -1))
        scanner = WalScanner(self._folder, self._chapter, other, self._request.bin_dir, found)
        ends: tuple[int, Lsn | None] | None = None
        if other.has(found.timeline, first - 1):
            try:
                ends = scanner.unbroken(found.timeline, first - 1, last)
            except LockedError:
                raise
            except PitrError:
                # The archive's own damage is told of by those who need that segment.
                ends = None
        number, self._last = ends or scanner.unbroken(found.timeline, first, last)
        if number >= last:
            return found
        name = other.name(found.timeline, max(number, first))
        return found.cut(
            max(number - first + 1, 0),
            f"records break off in {name}; what follows there is not used",
        )

    def complete(self, result: RestorePlan, index: ArchiveIndex) -> RestorePlan:
        """Say in the plan what comes from where, or could.

        Raises RefusedError for a position that lies behind the last record there is.
        """
        used = self.used
        if used is None or self._spool is None or self._own is None:
            return result
        notes = []
        if self._spool.problem:
            notes.append(f"the receiver's spool: {self._spool.problem}")
        if used.problem and used.problem not in (self._spool.problem, self._own.problem):
            notes.append(f"WAL beyond the archive: {used.problem}")
        if result.target.kind == "latest":
            notes += [
                f"pg_wal of the old server is not used: {p}" for p in (self._place.problem, self._own.problem) if p
            ]
            notes += self._offers()
        size = index.segment_size
        last = WalFile.parse(result.last_segment).number(size)
        here = tuple(name for name in used.names if WalFile.parse(name).number(size) <= last)
        if result.timeline != used.timeline:
            here = ()
        own = tuple(name for name in here if name in used.local)
        spool = tuple(name for name in here if name not in used.local)
        sources = [_source("archive", result.segments - len(here), Lsn((last + 1 - len(here)) * size))]
        at_least = None
        if here:
            reach = self.reach(index)
            lsn = result.target.lsn
            if lsn is not None and (reach is None or reach < lsn):
                who = " and ".join(["the receiver"] * bool(spool) + [f"{self._place.pg_wal}"] * bool(own))
                message = f"The target {result.target} lies after the last record that {who} has."
                nearest = f"That one begins at LSN {reach}." if reach is not None else "There is no whole record in it."
                raise RefusedError([Refusal("target_beyond_archive", message, nearest)])
            for name, names, where in ((RECEIVER, spool, "the receiver's spool"), (PG_WAL, own, self._place.pg_wal)):
                if names:
                    ends = reach if names[-1] == used.names[-1] else None
                    end = ends or Lsn((WalFile.parse(names[-1]).number(size) + 1) * size)
                    sources.append({**_source(name, len(names), end), "place": where})
                    notes.append(
                        f"{_listed(names)} from {where}, not archived yet"
                        + (f"; the last record there begins at LSN {ends}" if ends else "")
                    )
            at_least = reach if result.target.kind == "latest" else None
        return replace(
            result,
            notes=(*result.notes, *notes),
            from_receiver=spool,
            from_pg_wal=own,
            at_least=at_least,
            looked={**result.looked, "sources": sources},
        )

    def _offers(self) -> list[str]:
        """What has more than is used, and how to say that it shall be."""
        if self._spool is None or self._spool_is_used or not self._spool.names:
            return []
        reach = self._reach(self._spool, self._archived)
        if self.used is not None and self.used.names and reach <= self._reach(self.used, self._archived):
            return []
        return [
            f"the receiver's spool holds WAL that is not archived yet: {_listed(self._spool.names)}, its last record"
            f" begins at LSN {reach}; use_partial (restore_use_partial) would replay it"
        ]

    def hint(self, refusal: Refusal, index: ArchiveIndex) -> Refusal:
        """A refusal that may be due to WAL which lies elsewhere says so."""
        if refusal.code not in _FOR_WANT_OF_WAL:
            return refusal
        hints = []
        if self._spool is not None and self._spool.names and not self._spool_is_used:
            hints.append(
                f"The receiver's spool has {_listed(self._spool.names)}, not archived yet; use_partial"
                " (restore_use_partial) would replay it."
            )
        if self._own is not None and self._own.names and not self._own_is_used:
            hints.append(
                f"{self._place.pg_wal} has {_listed(self._own.names)}, not archived; dead_pg_wal"
                f" (restore_dead_pg_wal): {self._place.pg_wal} would replay it."
            )
        elif refusal.code == "archive_gap":
            hints += self._fills(refusal, index)
        return replace(refusal, nearest=" ".join(filter(None, [refusal.nearest, *hints])))

    def _fills(self, refusal: Refusal, index: ArchiveIndex) -> list[str]:
        """Whether the old server's pg_wal has segments that the archive lacks."""
        found = []
        for name in re.findall(r"\b[0-9A-F]{24}\b", refusal.message) if self._place.pg_wal else []:
            path = os.path.join(self._place.pg_wal, name)
            try:
                with open(path, "rb") as stream:
                    header = SegmentHeader(stream.read(SegmentHeader.SIZE))
            except (OSError, PitrError):
                continue
            begin = WalFile.parse(name).number(index.segment_size) * index.segment_size
            if header.system_identifier == self._chapter.system_identifier and int(header.page_address) == begin:
                found.append(name)
        if not found:
            return []
        return [
            f"{self._place.pg_wal} has {_listed(tuple(found))}: archive it with 'pitr-wal push {self._request.cluster}"
            f" {os.path.join(self._place.pg_wal, found[0])}'."
        ]


def _add(found: Tail, index: ArchiveIndex) -> None:
    for name in found.names:
        wal_file = WalFile.parse(name)
        index.add(wal_file.timeline, wal_file.number(index.segment_size))


def _source(name: str, segments: int, lsn: Lsn) -> dict[str, Any]:
    return {"name": name, "segments": segments, "last_lsn": str(lsn)}


def _listed(names: tuple[str, ...]) -> str:
    """Few are named, of many the first and the last."""
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} to {names[-1]} ({len(names)} segments)"
