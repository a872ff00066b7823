# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""How far the archive's WAL leads from a backup along a timeline. Pure; the rules are xlogrecovery.c's."""

from __future__ import annotations

from .catalog import Backup
from .index import ArchiveIndex
from .timeline import Span, TimelineTree
from .wal import Lsn

MAX_NAMED = 5


def needed_spans(backup: Backup, tree: TimelineTree, timeline: int) -> list[Span]:
    """The spans from the backup's start to the end of ``timeline``."""
    return spans_from(backup.start_lsn, tree, timeline)


def spans_from(start: Lsn, tree: TimelineTree, timeline: int) -> list[Span]:
    """The spans from this position to the end of ``timeline``. Raises PitrError when its history file is missing."""
    spans = [span for span in tree.path(timeline) if span.end is None or span.end > start]
    first = spans[0]
    return [Span(first.timeline, start, first.end), *spans[1:]]


def reachable_end(backup: Backup, index: ArchiveIndex, timeline: int) -> tuple[int, int, list[tuple[int, int]]]:
    """How far the archive's WAL reaches without a hole from this backup along ``timeline``.

    Returns the number of the last segment, how many segments there are, and the missing ones as (timeline, number), at
    most MAX_NAMED + 1 of them. At a switch the segment is wanted from the new timeline, or from the old when the new
    one has archived nothing, which is how XLogFileReadAnyTLI looks for it; _passes_switch tells when that will do.
    """
    size = index.segment_size
    missing: list[tuple[int, int]] = []
    number = backup.start_lsn.segment_number(size)
    first = number
    spans = needed_spans(backup, index.tree, timeline)
    for position, span in enumerate(spans):
        if span.end is not None:
            last_of_span = span.end.segment_number(size) - 1
        else:
            last_of_span = max(index.last(span.timeline) or 0, backup.stop_lsn.previous_segment_number(size))
            begin = span.begin.segment_number(size)
            if position and index.has(spans[position - 1].timeline, begin):
                # Promoted, but nothing archived yet on the new timeline: the parent's segment has all up to the switch.
                last_of_span = max(last_of_span, begin)
        while number <= last_of_span and len(missing) <= MAX_NAMED:
            end = index.run_end(span.timeline, number)
            at_switch = position > 0 and number == span.begin.segment_number(size)
            # The parent's will do only while the new timeline has nothing later: that would be a hole.
            if end is None and at_switch and span.end is None and (index.last(span.timeline) or 0) < number:
                end = number if index.has(spans[position - 1].timeline, number) else None
            if end is None and carries(backup, index, span.timeline, number):
                end = number
            if end is None:
                missing.append((span.timeline, number))
                end = number
            number = min(end, last_of_span) + 1
    reached = number - 1
    return reached, reached - first + 1, missing


def carries(backup: Backup, index: ArchiveIndex, timeline: int, number: int) -> bool:
    """Whether an offline backup's own copy of a segment will do, which the archive does not have (offline.py).

    It ends with the shutdown. When the archive has anything later, what the server wrote into it afterwards is missing.
    """
    return index.name(timeline, number) in backup.own_wal and (index.last(timeline) or 0) < number
