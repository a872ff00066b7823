# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Which segments an archive holds: per timeline a list of unbroken ranges, so that a million segments stay small."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator

from . import codec
from .errors import PitrError
from .repository import Chapter, ClusterFolder, archived_logs
from .timeline import Switch, TimelineTree, parse_history
from .wal import WalFile, segment_name


class ArchiveIndex:
    """Segments and timelines of one chapter's archive. Built once, then only read."""

    def __init__(self, segment_size: int) -> None:
        self.segment_size = segment_size
        self.stored_bytes = 0
        self.segments = 0
        self._ranges: dict[int, list[tuple[int, int]]] = {}
        self._histories: dict[int, list[Switch]] = {}
        self.unknown: list[str] = []

    def add(self, timeline: int, number: int) -> None:
        """Add a segment; within a timeline in ascending order."""
        ranges = self._ranges.setdefault(timeline, [])
        self.segments += 1
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1] = (ranges[-1][0], number)
        elif ranges and ranges[-1][1] >= number:
            raise ValueError("segments must be added in ascending order")
        else:
            ranges.append((number, number))

    def add_history(self, timeline: int, switches: list[Switch]) -> None:
        """Add a parsed history file."""
        self._histories[timeline] = switches

    @property
    def timelines(self) -> list[int]:
        """Timelines that have segments or a history file."""
        return sorted(set(self._ranges) | set(self._histories))

    @property
    def tree(self) -> TimelineTree:
        """The timelines of the archive as a tree."""
        return TimelineTree(self._histories, frozenset(self._ranges))

    def ranges(self, timeline: int) -> list[tuple[int, int]]:
        """Unbroken runs of segment numbers (first, last), ascending."""
        return list(self._ranges.get(timeline, []))

    def has(self, timeline: int, number: int) -> bool:
        """Whether the segment is there."""
        return self.run_end(timeline, number) is not None

    def run_end(self, timeline: int, number: int) -> int | None:
        """Last number of the unbroken run that holds ``number``, None when it is missing."""
        ranges = self._ranges.get(timeline, [])
        at = bisect_right(ranges, (number, 1 << 62)) - 1
        return ranges[at][1] if at >= 0 and ranges[at][0] <= number <= ranges[at][1] else None

    def last(self, timeline: int) -> int | None:
        """Highest segment number of a timeline."""
        ranges = self._ranges.get(timeline)
        return ranges[-1][1] if ranges else None

    def gaps(self, timeline: int) -> list[tuple[int, int]]:
        """Runs of missing numbers between the first and the last segment of a timeline."""
        ranges = self._ranges.get(timeline, [])
        return [(left[1] + 1, right[0] - 1) for left, right in zip(ranges, ranges[1:])]

    def missing(self, timeline: int, first: int, last: int) -> Iterator[int]:
        """Numbers from ``first`` to ``last`` that are not there."""
        number = first
        while number <= last:
            end = self.run_end(timeline, number)
            if end is None:
                yield number
                number += 1
            else:
                number = end + 1

    def name(self, timeline: int, number: int) -> str:
        """File name of a segment."""
        return segment_name(timeline, number, self.segment_size)


def build(names: Iterable[str], segment_size: int) -> ArchiveIndex:
    """An index of these segment names, which must be sorted. For tests and tools that have no directory."""
    index = ArchiveIndex(segment_size)
    for name in names:
        wal_file = WalFile.parse(name)
        index.add(wal_file.timeline, wal_file.number(segment_size))
    return index


def scan(folder: ClusterFolder, chapter: Chapter | None = None) -> ArchiveIndex:
    """Walk an archive, one 4 GB folder at a time. Raises PitrError when a history file is damaged."""
    chapter = chapter or folder.chapter
    archive = folder.archive_path(chapter)
    index = ArchiveIndex(chapter.wal_segment_size)
    try:
        files = folder.tree.names(archive)
    except FileNotFoundError:
        raise PitrError(f"{archive} does not exist. Is the repository mounted?") from None
    for log in archived_logs(archive, None, folder.tree):
        for name in folder.tree.names(os.path.join(archive, log)):
            if name.startswith("."):
                continue
            try:
                wal_file = WalFile.parse(name)
            except PitrError:
                index.unknown.append(os.path.join(log, name))
                continue
            if wal_file.kind == "segment":
                index.add(wal_file.timeline, wal_file.number(index.segment_size))
    for name in files:
        if name.endswith(".history") and not name.startswith("."):
            try:
                wal_file = WalFile.parse(name)
            except PitrError:
                index.unknown.append(name)
                continue
            with codec.open_reader(os.path.join(archive, name), folder.tree) as reader:
                text = reader.read().decode(errors="replace")
            index.add_history(wal_file.timeline, parse_history(wal_file.timeline, text))
    return index
