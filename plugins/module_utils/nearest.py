# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Beside a refusal: the nearest points that can be restored. Pure."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence

from .catalog import Backup
from .index import ArchiveIndex
from .reach import reachable_end
from .target import RecoveryTarget, format_time
from .timeline import TimelineTree
from .wal import Lsn


class Nearest:
    """What can be restored along one timeline from backups that are whole."""

    def __init__(
        self,
        backups: Sequence[Backup],
        index: ArchiveIndex,
        timeline: int,
        commits: Mapping[str, datetime.datetime],
    ) -> None:
        """``commits``: label to the time of the last transaction that can be replayed from that backup, where known."""
        self._backups = sorted(backups, key=lambda backup: (backup.stop_lsn, backup.label))
        self._index = index
        self._timeline = timeline
        self._commits = commits

    def window(self) -> str:
        """From where to where, from the oldest backup."""
        oldest = self._backups[0]
        last, _count, _missing = reachable_end(oldest, self._index, self._timeline)
        until = f"LSN {Lsn((last + 1) * self._index.segment_size)}"
        if self._commits:
            until += f", last transaction {format_time(max(self._commits.values()))}"
        return f"Restorable is from {format_time(oldest.stopped_at)}, LSN {oldest.stop_lsn}, to {until}."

    def first(self, backups: Sequence[Backup]) -> str:
        """The earliest point at all; where that is not one of these backups', theirs as well."""
        oldest = min(backups, key=lambda backup: backup.stop_lsn)
        return f"The earliest restorable point is {format_time(oldest.stopped_at)}, LSN {oldest.stop_lsn}."

    def without_choice(self, fitting: Sequence[Backup]) -> str:
        """What another choice of the backup would do."""
        usable = [backup for backup in fitting if self._whole(backup)]
        return f"Backup {usable[-1].label} ends before the target, and so will 'auto' choose." if usable else ""

    def before_hole(self, backup: Backup, hole: int, target: RecoveryTarget) -> str:
        """How far WAL is whole from this backup, before segment number ``hole``, in the words of the target."""
        end = Lsn(hole * self._index.segment_size)
        if end < backup.stop_lsn:
            return "This backup cannot be made consistent."
        commit = self._commits.get(backup.label)
        text = f"WAL is whole up to LSN {end}."
        if target.time is not None and commit is not None and commit > backup.stopped_at:
            text += f" The latest restorable time before the hole is just before {format_time(commit)}."
        return text

    def behind_hole(self, hole: int) -> str:
        """The first point that can be restored again behind segment number ``hole``; empty when there is none."""
        begin = Lsn((hole + 1) * self._index.segment_size)
        for backup in self._backups:
            if backup.start_lsn >= begin and self._whole(backup):
                return (
                    f"Behind the hole backup {backup.label} can be restored from {format_time(backup.stopped_at)}, LSN"
                    f" {backup.stop_lsn}, on."
                )
        return ""

    def consistent_elsewhere(self, without: Backup) -> str:
        """For a backup that cannot be made consistent: the newest other one that can."""
        usable = [backup for backup in self._backups if backup is not without and self._whole(backup)]
        if not usable:
            return ""
        best = usable[-1]
        return f"Backup {best.label} can, at {format_time(best.stopped_at)}, LSN {best.stop_lsn}."

    def _whole(self, backup: Backup) -> bool:
        """Whether the WAL is there that makes it consistent."""
        _last, _count, missing = reachable_end(backup, self._index, self._timeline)
        stop = backup.stop_lsn.previous_segment_number(self._index.segment_size)
        return not any(number <= stop for _timeline, number in missing)


def timelines_with_backups(backups: Sequence[Backup], tree: TimelineTree) -> list[int]:
    """Timelines that can be followed, and that one of these backups leads to."""
    return [
        timeline
        for timeline in sorted({1, *tree.histories})
        if any(tree.contains(timeline, backup.timeline, backup.stop_lsn) for backup in backups)
    ]
