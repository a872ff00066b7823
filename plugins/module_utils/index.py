# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Which segments an archive holds: per timeline a list of unbroken ranges, so that a million segments stay small."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from . import codec
from .errors import PitrError
from .repository import Chapter, ClusterFolder
from .timeline import Switch, TimelineTree, parse_history
from .wal import FolderNames, WalFile, is_log, segment_name


class Attached(NamedTuple):
    """A ``.partial`` or ``.backup`` file; ``number`` is that of the segment it belongs to."""

    timeline: int
    number: int
    place: str


class ArchiveIndex:
    """Segments and timelines of one chapter's archive. Built once, then only read."""

    def __init__(self, segment_size: int) -> None:
        self.segment_size = segment_size
        self.segments = 0
        self._ranges: dict[int, list[tuple[int, int]]] = {}
        self._histories: dict[int, list[Switch]] = {}
        # Places in the archive: what is no WAL, and .partial and .backup files, which belong to a segment.
        self.unknown: list[str] = []
        self.attached: list[Attached] = []
        # The 4 GB folders, ascending.
        self.logs: list[str] = []

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

    def add_run(self, timeline: int, first: int, last: int) -> None:
        """Add the unbroken run from ``first`` to ``last``; within a timeline in ascending order."""
        self.add(timeline, first)
        if last > first:
            ranges = self._ranges[timeline]
            ranges[-1] = (ranges[-1][0], last)
            self.segments += last - first

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

    def holes(self) -> list[tuple[int, int, int]]:
        """Runs (timeline, first, last) of missing numbers, wherever WAL is there before and after, ascending.

        Within a timeline, and where one leads on to another: the way of each timeline has to be whole from the first
        segment on it that is there.
        """
        found = [(timeline, *gap) for timeline in self._ranges for gap in self.gaps(timeline)]
        tree = self.tree
        size = self.segment_size
        for timeline in self._ranges:
            begun = False
            for span in tree.path(timeline) if timeline in tree.histories else ():
                first = span.begin.segment_number(size)
                last = span.end.segment_number(size) - 1 if span.end is not None else self.last(timeline) or 0
                runs = self._missing_runs(span.timeline, first, last)
                if not begun and runs and runs[0] == (first, last):
                    continue
                if not begun and runs and runs[0][0] == first:
                    del runs[0]
                begun = True
                found += [(span.timeline, *run) for run in runs]
        merged: list[tuple[int, int, int]] = []
        for run in sorted(found):
            if merged and merged[-1][0] == run[0] and run[1] <= merged[-1][2] + 1:
                merged[-1] = (run[0], merged[-1][1], max(merged[-1][2], run[2]))
            else:
                merged.append(run)
        return merged

    def _missing_runs(self, timeline: int, first: int, last: int) -> list[tuple[int, int]]:
        """Runs of missing numbers from ``first`` to ``last``."""
        ranges = self._ranges.get(timeline, [])
        result = []
        at = max(bisect_right(ranges, (first, 1 << 62)) - 1, 0)
        number = first
        while number <= last:
            if at >= len(ranges) or ranges[at][0] > last:
                result.append((number, last))
                break
            if ranges[at][0] > number:
                result.append((number, ranges[at][0] - 1))
            number = max(number, ranges[at][1] + 1)
            at += 1
        return result

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
    recognise = FolderNames(index.segment_size)
    for log in files:
        if not is_log(log):
            continue
        try:
            names = folder.tree.names(os.path.join(archive, log))
        except NotADirectoryError:
            index.unknown.append(log)
            continue
        except FileNotFoundError:
            # Emptied and removed by an expire since the names were read.
            continue
        index.logs.append(log)
        timeline, numbers, others = recognise.sort(log, names)
        if numbers and numbers[-1] - numbers[0] + 1 == len(numbers):
            index.add_run(timeline, numbers[0], numbers[-1])
        else:
            for number in numbers:
                index.add(timeline, number)
        for name in others:
            _add_other(index, log, name)
    for name in files:
        if name.startswith(".") or is_log(name):
            continue
        if not _is_history(name):
            index.unknown.append(name)
            continue
        timeline = WalFile.parse(name).timeline
        with codec.open_reader(os.path.join(archive, name), folder.tree) as reader:
            text = reader.read().decode(errors="replace")
        index.add_history(timeline, parse_history(timeline, text))
    return index


def _add_other(index: ArchiveIndex, log: str, name: str) -> None:
    """A name in a folder that is no segment: a file that belongs to one, or one that is not ours."""
    if name.startswith("."):
        return
    place = os.path.join(log, name)
    try:
        wal_file = WalFile.parse(name)
        number = wal_file.number(index.segment_size)
    except (PitrError, ValueError):
        index.unknown.append(place)
        return
    if wal_file.kind in ("partial", "backup") and wal_file.log == log:
        index.attached.append(Attached(wal_file.timeline, number, place))
    else:
        index.unknown.append(place)


def _is_history(name: str) -> bool:
    try:
        return WalFile.parse(name).kind == "history"
    except PitrError:
        return False
