# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Finding commits and restore points in the archived WAL with pg_waldump, a few segments at a time.

pg_waldump wants plain segment files in one directory. A window of segments is unpacked, read, and removed again, so
that disk and memory stay flat however long the archive is. Windows overlap by one segment, because a record may begin
in one segment and end in the next.
"""

from __future__ import annotations

import datetime
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import IO, cast

from . import codec
from .errors import PitrError
from .index import ArchiveIndex
from .plan import Location
from .postgres import binary
from .repository import Chapter, ClusterFolder
from .tail import Tail, copy
from .timeline import Span
from .wal import Lsn, SegmentHeader, WalFile

WINDOW = 16

_RECORD = re.compile(r"rmgr: (\S+)\s.*?, tx:\s*(\d+), lsn: ([0-9A-F]+/[0-9A-F]+), prev \S+ desc: (.*)\Z")
_TIME = re.compile(r"(?:COMMIT|ABORT)(?:_PREPARED)?(?: \d+:)? (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(?:\.\d+)?) UTC")
_SUBXACTS = re.compile(r"; subxacts: ([0-9 ]+)")
_GID = re.compile(r"PREPARE gid (.*?): \d{4}-\d\d-\d\d ")
_ERROR_AT = re.compile(r"error in WAL record at [0-9A-F]+/[0-9A-F]+")
_POSITION = re.compile(r"(?:at|LSN) ([0-9A-F]+/[0-9A-F]+)")


@dataclass(frozen=True)
class Record:
    """One line of pg_waldump. ``lsn`` is the start of the record."""

    rmgr: str
    xid: int
    lsn: Lsn
    timeline: int
    description: str

    @property
    def time(self) -> datetime.datetime | None:
        """When the transaction ended, for commit and abort records."""
        match = _TIME.match(self.description)
        if match is None:
            return None
        return datetime.datetime.fromisoformat(f"{match.group(1):.26}").replace(tzinfo=datetime.timezone.utc)

    @property
    def ended_xid(self) -> int:
        """The transaction that a commit or abort record ends; a prepared one is named in the description."""
        match = re.match(r"(?:COMMIT|ABORT)_PREPARED (\d+)", self.description)
        return int(match.group(1)) if match else self.xid

    @property
    def subtransactions(self) -> list[int]:
        """Ids of the committed subtransactions that a commit record lists."""
        match = _SUBXACTS.search(self.description)
        return [int(xid) for xid in match.group(1).split()] if match else []

    @property
    def prepared(self) -> str | None:
        """The name of the transaction that this record prepares (PREPARE TRANSACTION), None for other records."""
        match = _GID.match(self.description) if self.rmgr == "Transaction" else None
        return match.group(1) if match else None

    @property
    def restore_point(self) -> str | None:
        """The name of the restore point that this record is, None for other records."""
        head = "RESTORE_POINT "
        is_one = self.rmgr == "XLOG" and self.description.startswith(head)
        return self.description[len(head) :] if is_one else None

    @property
    def is_commit(self) -> bool:
        """Whether it commits."""
        return self.rmgr == "Transaction" and self.description.startswith("COMMIT")


class WalScanner:
    """Reads records of chosen resource managers from an archive."""

    def __init__(
        self, folder: ClusterFolder, chapter: Chapter, index: ArchiveIndex, bin_dir: str, tail: Tail | None = None
    ) -> None:
        """``tail``: segments that are not archived yet, but in the index."""
        self._tail = tail
        self._said = ""
        self._folder = folder
        self._chapter = chapter
        self._index = index
        self._bin_dir = bin_dir

    def records(self, spans: list[Span], last: int, rmgrs: tuple[str, ...]) -> Iterator[Record]:
        """Records along ``spans`` up to segment number ``last``, in order. Raises PitrError when WAL cannot be read."""
        size = self._index.segment_size
        # One mark for all spans: a timeline's first segment begins with a copy of its parent's last one, which a parent
        # that has died did not archive.
        seen = Lsn(max(int(spans[0].begin) - 1, 0))
        for span in spans:
            first = span.begin.segment_number(size)
            end = last if span.end is None else min(last, span.end.segment_number(size))
            while first <= end and self._index.has(span.timeline, first):
                until = min(first + WINDOW - 1, end, self._index.run_end(span.timeline, first) or first)
                for record in self._window(span.timeline, first, until, rmgrs, until == end):
                    if record.lsn > seen and (span.end is None or record.lsn < span.end):
                        seen = record.lsn
                        yield record
                if until == end or until == self._index.run_end(span.timeline, first):
                    break
                first = until

    def last_transaction(self, spans: list[Span], last: int) -> Record | None:
        """The newest commit or abort along ``spans`` up to segment number ``last``, looking from the end backwards."""
        size = self._index.segment_size
        for span in reversed(spans):
            end = last if span.end is None else min(last, span.end.segment_number(size))
            for number in range(end, span.begin.segment_number(size) - 1, -1):
                if not self._index.has(span.timeline, number):
                    continue
                found = None
                for record in self._window(span.timeline, number, number, ("Transaction",), True):
                    if record.time is not None and (span.end is None or record.lsn < span.end):
                        found = record
                if found is not None:
                    return found
        return None

    def last_record(self, spans: list[Span], last: int, local: str = "") -> Record | None:
        """The last whole record along ``spans`` up to segment number ``last``.

        ``local``: a directory with plain segments that are looked at instead of those of the tail.
        """
        size = self._index.segment_size
        for span in reversed(spans):
            end = last if span.end is None else min(last, span.end.segment_number(size))
            for number in range(end, span.begin.segment_number(size) - 1, -1):
                if self._index.has(span.timeline, number):
                    found = None
                    for record in self._window(span.timeline, number, number, (), True, local):
                        if span.end is None or record.lsn < span.end:
                            found = record
                    if found is not None:
                        return found
        return None

    def unbroken(self, timeline: int, first: int, last: int) -> tuple[int, Lsn | None]:
        """Up to which segment, of those from ``first`` to ``last``, one record follows the other.

        Returns also the start of the last record of them, None when the last one ends with its segment. The segment
        before ``first`` is returned when not even its first record is right.
        """
        size = self._index.segment_size
        at = first
        while True:
            until = min(at + WINDOW - 1, last)
            for _record in self._run(timeline, at, until, ("XLOG",)):
                pass
            positions = _positions(self._said)
            if positions is not None:
                good, bad = positions
                number = bad.segment_number(size)
                if number < until or until == last:
                    # Right behind the header of a segment nothing of it belongs to the record before.
                    empty = int(bad) % size <= SegmentHeader.SIZE
                    return min(number - 1 if empty else number, last), good
            if until == last:
                return last, None
            at = until

    def find_xid(
        self, spans: list[Span], last: int, xid: int, watch: Callable[[Record], None] | None = None
    ) -> Location | None:
        """Where transaction ``xid`` (its low 32 bits count) committed or aborted. ``watch`` sees what comes before."""
        for record in self.records(spans, last, ("Transaction",)):
            if watch is not None:
                watch(record)
            if record.time is not None and record.ended_xid == xid & 0xFFFFFFFF:
                return Location(record.lsn, record.timeline, record.time, record.is_commit)
        return None

    def find_name(
        self, spans: list[Span], last: int, name: str, watch: Callable[[Record], None] | None = None
    ) -> Location | None:
        """Where the first restore point of this name lies. ``watch`` sees what comes before."""
        for record in self.records(spans, last, ("XLOG",)):
            if watch is not None:
                watch(record)
            if record.restore_point == name:
                return Location(record.lsn, record.timeline)
        return None

    def _window(
        self, timeline: int, first: int, until: int, rmgrs: tuple[str, ...], final: bool, local: str = ""
    ) -> Iterator[Record]:
        """Records of these segments. Raises PitrError when they end before the last of the segments."""
        yield from self._run(timeline, first, until, rmgrs, local)
        self._check_end(self._said, timeline, until, final)

    def _run(self, timeline: int, first: int, until: int, rmgrs: tuple[str, ...], local: str = "") -> Iterator[Record]:
        """Records of these segments as far as they can be read; ``_said`` is what the program complains of then."""
        size = self._index.segment_size
        with tempfile.TemporaryDirectory(prefix="pitr-waldump-") as directory:
            for number in range(first, until + 1):
                name = self._index.name(timeline, number)
                self._unpack(name, os.path.join(directory, name), local)
            # Without an end it would look for the next segment for five seconds (WALDumpOpenSegment).
            begin, end = Lsn(first * size), Lsn((until + 1) * size)
            argv = [binary(self._bin_dir, "pg_waldump"), f"--path={directory}", f"--timeline={timeline}"]
            argv += [f"--start={begin}", f"--end={end}"]
            argv += [f"--rmgr={rmgr}" for rmgr in rmgrs]
            with tempfile.TemporaryFile() as complaints:
                process = subprocess.Popen(
                    argv,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=complaints,
                    env={"PATH": os.environ.get("PATH", ""), "LC_ALL": "C", "TZ": "UTC"},
                )
                output = cast(IO[bytes], process.stdout)
                try:
                    yield from _records(filter(self._wanted, output), timeline)
                finally:
                    output.close()
                    process.kill()
                    process.wait()
                complaints.seek(0)
                self._said = complaints.read(4000).decode(errors="replace").strip()

    def _wanted(self, line: bytes) -> bool:
        """Whether a line is worth taking apart; for scanners that read what a busy server writes most of."""
        return True

    def _check_end(self, said: str, timeline: int, until: int, final: bool) -> None:
        """pg_waldump always ends by running out of WAL; anywhere but in the window's last segment that is damage."""
        positions = _positions(said)
        if positions is None:
            return
        lsn = positions[1]
        number = lsn.segment_number(self._index.segment_size)
        tail_ends = self._tail is not None and self._tail.names[-1:] == (self._index.name(timeline, until),)
        if final and tail_ends and number == until - 1:
            # A record may go on into a segment that is not written to its end.
            return
        if number < until:
            name = self._index.name(timeline, number)
            raise PitrError(f"The archived WAL cannot be read at {lsn}, in {name}: {said}")

    def _unpack(self, name: str, target: str, local: str = "") -> None:
        if self._tail is not None and name in self._tail.names:
            own = self._tail.local.get(name)
            if own and not local:
                # Nobody writes to it any more, and it may be one of thousands.
                os.symlink(own, target)
                return
            if local and os.path.exists(os.path.join(local, name)):
                shutil.copyfile(os.path.join(local, name), target)
                return
            if copy(self._folder, self._chapter, self._tail, name, target):
                return
        stored = self._folder.wal_path(WalFile.parse(name), self._chapter)
        with codec.open_reader(stored, self._folder.tree) as reader, open(target, "wb") as stream:
            while True:
                data = reader.read(codec.CHUNK)
                if not data:
                    break
                stream.write(data)


def _records(output: Iterable[bytes], timeline: int) -> Iterator[Record]:
    """The records among pg_waldump's lines.

    The name of a restore point is shown as it is, so that one with a line break goes on in the next line; and it is
    bytes in the encoding of its database, of which nothing may be replaced before they are compared.
    """
    waiting: Record | None = None
    for line in output:
        text = line.decode("utf-8", "surrogateescape").rstrip("\n")
        record = _parse(text, timeline)
        if record is not None:
            if waiting is not None:
                yield waiting
            waiting = None
            if record.restore_point is None:
                yield record
            else:
                waiting = record
        elif waiting is not None:
            waiting = replace(waiting, description=f"{waiting.description}\n{text}")
    if waiting is not None:
        yield waiting


def _positions(said: str) -> tuple[Lsn, Lsn] | None:
    """The last record that pg_waldump has read and where the next one should be; None when it complains of nothing."""
    match = _ERROR_AT.search(said)
    if match is None:
        return None
    positions = [Lsn.parse(position) for position in _POSITION.findall(said[match.start() :])]
    return positions[0], max(positions)


def _parse(line: str, timeline: int) -> Record | None:
    match = _RECORD.match(line)
    if match is None:
        return None
    return Record(match.group(1), int(match.group(2)), Lsn.parse(match.group(3)), timeline, match.group(4))
