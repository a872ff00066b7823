# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The receiver's spool: what lies in the directory that pg_receivewal writes to, and where it goes on from there.

Pure but for :func:`written`, which looks at pages. Sources of the rules: ``FindStreamingStart`` of pg_receivewal.c (it
goes on behind the newest file of its directory), ``open_walfile`` of receivelog.c (a ``.partial`` is made in its full
size before the first byte of WAL is in it), ``StartReplication`` of walsender.c (which positions of an older timeline
a server gives out). On the path of ``pitr-wal``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence

from .errors import PitrError
from .repository import Chapter, ClusterFolder
from .timeline import Span
from .wal import Lsn, SegmentHeader, WalFile, segment_name

SPOOL = "receiver"
# Partial files of branches that the server has left.
LEFT = "left"
STATUS_FILE = "status.json"


def spool_path(folder: ClusterFolder, chapter: Chapter) -> str:
    """The directory that pg_receivewal writes to: one for each chapter."""
    return os.path.join(folder.path, SPOOL, chapter.folder)


class SpoolFile:
    """A segment in the spool, finished or being written."""

    __slots__ = ("name", "number", "partial", "segment", "timeline")

    def __init__(self, name: str, segment_size: int) -> None:
        """Raises PitrError for another name."""
        wal_file = WalFile.parse(name)
        if wal_file.kind not in ("segment", "partial"):
            raise PitrError(f"'{name}' is not a segment.")
        self.name = name
        self.segment = wal_file.segment
        self.timeline = wal_file.timeline
        self.number = wal_file.number(segment_size)
        self.partial = wal_file.kind == "partial"

    @property
    def rank(self) -> tuple[int, int, bool]:
        """What FindStreamingStart orders by: position, timeline, finished before partial."""
        return self.number, self.timeline, not self.partial

    def __repr__(self) -> str:
        return f"SpoolFile({self.name})"


def segments(names: Iterable[str], segment_size: int) -> list[SpoolFile]:
    """The segments among these names, in the order of pg_receivewal; the last one is where it goes on."""
    found = []
    for name in names:
        if len(name) in (24, 32) and not name.startswith("."):
            try:
                found.append(SpoolFile(name, segment_size))
            except PitrError:
                continue
    return sorted(found, key=lambda file: file.rank)


class Start:
    """Where to go on: ``number`` is of a segment, whose beginning is asked for on ``timeline``."""

    __slots__ = ("number", "timeline")

    def __init__(self, timeline: int, number: int) -> None:
        self.timeline = timeline
        self.number = number

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Start) and (self.timeline, self.number) == (other.timeline, other.number)

    def __hash__(self) -> int:
        return hash((self.timeline, self.number))

    def __repr__(self) -> str:
        return f"Start({self.timeline}, {self.number})"


def behind(files: Sequence[SpoolFile]) -> Start | None:
    """Where the spool ends: on its newest timeline, behind the last finished segment or at the partial one."""
    if not files:
        return None
    newest = max(files, key=lambda file: (file.timeline, file.rank))
    return Start(newest.timeline, newest.number if newest.partial else newest.number + 1)


def next_start(here: Start, ours: Sequence[Span], theirs: Sequence[Span], segment_size: int) -> Start:
    """Where to go on so that nothing of the server's past is left out.

    ``ours`` is the way to the timeline of ``here``, ``theirs`` the way to the timeline of the server, as
    :func:`timeline.ancestry` tells them. Where the server's past holds the position ``here``, that is it;
    pg_receivewal follows switches by itself from there. Otherwise the server has left our branch before that: back to
    the segment in which it did.
    """
    position = Lsn(here.number * segment_size)
    for span in theirs:
        # The first segment of a timeline begins before the timeline does.
        begun = span.begin.segment_number(segment_size) <= here.number
        if span.timeline == here.timeline and begun and (span.end is None or position <= span.end):
            return here
    left = Lsn(0)
    for own, other in zip(ours, theirs):
        if own.timeline != other.timeline:
            break
        ends = [end for end in (own.end, other.end) if end is not None]
        left = min(ends) if ends else position
        if own.end != other.end:
            break
    # A segment that the branches share up to the middle is read from where the server's way leads through it.
    timeline = next(span.timeline for span in theirs if span.end is None or left < span.end)
    return Start(timeline, left.segment_number(segment_size))


def written(read: Callable[[int, int], bytes], name: str, segment_size: int) -> Lsn | None:
    """How far a segment file has been written, None when there is nothing in it. ``read(size, offset)`` like os.pread.

    Pages are written in order into a file of zeros, so the last one that tells its own position is looked for by
    halving; in it the last byte that is not zero. WAL may end in zeros, so this is the least that has come.
    """
    file = SpoolFile(name, segment_size)
    begin = file.number * segment_size
    try:
        header = SegmentHeader(read(SegmentHeader.SIZE, 0))
    except PitrError:
        return None
    if int(header.page_address) != begin:
        return None
    size = header.block_size

    def is_there(page: int) -> bool:
        head = read(16, page * size)
        return len(head) == 16 and int.from_bytes(head[8:16], sys.byteorder) == begin + page * size

    low, high = 0, segment_size // size
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if is_there(middle) else (low, middle)
    content = read(size, low * size).rstrip(b"\0")
    return Lsn(begin + low * size + len(content))


def seed_name(start: Start, segment_size: int) -> str:
    """Name of an empty file that makes pg_receivewal begin there, when it is the newest one of the directory."""
    return segment_name(start.timeline, start.number, segment_size) + ".partial"


def in_front(files: Iterable[SpoolFile], start: Start) -> list[SpoolFile]:
    """Files that would make pg_receivewal begin elsewhere than at ``start``: they have to go before."""
    seed = (start.number, start.timeline, False)
    return [file for file in files if file.rank > seed]
