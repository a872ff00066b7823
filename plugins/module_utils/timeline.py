# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Timelines: history files and the tree they form.

Source of the rules: ``src/backend/access/transam/timeline.c`` and the section "Timelines" of the chapter
"Continuous Archiving and Point-in-Time Recovery".
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from .errors import PitrError
from .wal import Lsn, history_name

_LINE = re.compile(r"\s*(\d+)\s+([0-9A-Fa-f]{1,8}/[0-9A-Fa-f]{1,8})(?:\s+(.*))?\Z")


class Switch:
    """One line of a history file: ``timeline`` ended at ``lsn``, for ``reason``."""

    __slots__ = ("lsn", "reason", "timeline")

    def __init__(self, timeline: int, lsn: Lsn, reason: str) -> None:
        self.timeline = timeline
        self.lsn = lsn
        self.reason = reason

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Switch) and (self.timeline, self.lsn) == (other.timeline, other.lsn)

    def __hash__(self) -> int:
        return hash((self.timeline, self.lsn))

    def __repr__(self) -> str:
        return f"Switch({self.timeline}, {self.lsn})"


def parse_history(timeline: int, text: str) -> list[Switch]:
    """Ancestors of ``timeline``, oldest first, as its history file tells them.

    Raises PitrError when the file is not one: a wrong answer here would replay another branch of the past.
    """
    name = history_name(timeline)
    switches: list[Switch] = []
    # Only a line feed ends a line; splitlines() would also cut at characters that a restore point's name may hold.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _LINE.match(line)
        if match is None:
            raise PitrError(f"{name}, line {number}: '{line[:80]}' is not a line of a timeline history file.")
        switch = Switch(int(match.group(1)), Lsn.parse(match.group(2)), (match.group(3) or "").strip())
        if switch.timeline < 1:
            raise PitrError(f"{name}, line {number}: there is no timeline {switch.timeline}.")
        if switch.timeline >= timeline:
            raise PitrError(f"{name}, line {number}: parent timeline {switch.timeline} is not older than {timeline}.")
        if switches and switch.timeline <= switches[-1].timeline:
            raise PitrError(f"{name}, line {number}: timelines must ascend.")
        switches.append(switch)
    if timeline > 1 and not switches:
        raise PitrError(f"{name} names no parent timeline.")
    return switches


class Span:
    """The part ``[begin, end)`` of a timeline on the way to another one; ``end`` is None for the last."""

    __slots__ = ("begin", "end", "timeline")

    def __init__(self, timeline: int, begin: Lsn, end: Lsn | None) -> None:
        self.timeline = timeline
        self.begin = begin
        self.end = end

    def __repr__(self) -> str:
        return f"Span({self.timeline}, {self.begin}, {self.end})"


def ancestry(timeline: int, switches: list[Switch]) -> list[Span]:
    """The way from the beginning of WAL to the end of ``timeline``.

    Positions in a history file need not ascend. A recovery along timeline 3 that stops before the point where 3 began
    leaves 3 as the parent of the new timeline, with a position that lies on 2 (writeTimeLineHistory is given the target
    timeline). The server looks a position up from the newest timeline backwards (tliOfPointInHistory), so that
    a later entry ends all earlier ones; those of which nothing is left are no part of the way.
    """
    spans = [Span(timeline, switches[-1].lsn if switches else Lsn(0), None)]
    for position in range(len(switches) - 1, -1, -1):
        begin = switches[position - 1].lsn if position else Lsn(0)
        end = min(switches[position].lsn, spans[0].begin)
        if begin < end:
            spans.insert(0, Span(switches[position].timeline, begin, end))
    return spans


class TimelineTree:
    """All timelines an archive knows, each with its ancestry. Timeline 1 has no history file."""

    def __init__(self, histories: Mapping[int, list[Switch]], known: frozenset[int] = frozenset()) -> None:
        """``histories``: parsed history files. ``known``: timelines of which segments or backups exist."""
        self._histories = dict(histories)
        self._known = frozenset(known) | frozenset(histories)

    @property
    def timelines(self) -> list[int]:
        """Every timeline of which anything is known, ascending."""
        return sorted(self._known)

    @property
    def histories(self) -> list[int]:
        """Timelines whose history file is there, ascending."""
        return sorted(self._histories)

    @property
    def newest(self) -> int:
        """What ``recovery_target_timeline = 'latest'`` means: the highest timeline with a history file, else 1.

        PostgreSQL probes history files upwards from the backup's timeline (findNewestTimeLine).
        """
        return max(self._histories, default=1)

    def switches(self, timeline: int) -> list[Switch]:
        """Ancestors, oldest first. Raises PitrError when the history file is missing."""
        if timeline == 1:
            return []
        if timeline not in self._histories:
            raise PitrError(
                f"Timeline {timeline} is not known: the archive has no {history_name(timeline)}."
                f" Known timelines: {', '.join(map(str, sorted({1} | set(self._histories))))}."
            )
        return self._histories[timeline]

    def path(self, timeline: int) -> list[Span]:
        """The way from the beginning of WAL to the end of ``timeline``."""
        return ancestry(timeline, self.switches(timeline))

    def contains(self, timeline: int, point_timeline: int, lsn: Lsn) -> bool:
        """True when the point ``lsn`` written on ``point_timeline`` is part of the past of ``timeline``."""
        return any(
            span.timeline == point_timeline and span.begin <= lsn and (span.end is None or lsn <= span.end)
            for span in self.path(timeline)
        )

    def parent(self, timeline: int) -> Switch | None:
        """The last ancestor, or None for a root."""
        switches = self._histories.get(timeline, [])
        return switches[-1] if switches else None
