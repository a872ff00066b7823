# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a repository holds, for people and for monitoring: archive, backups, and what can be restored from them."""

from __future__ import annotations

import datetime
from typing import Any

from .backup import damaged_backups, stored_backups
from .catalog import Backup
from .crypt import LockedError
from .index import ArchiveIndex, scan
from .plan import reachable_end
from .repository import ClusterFolder
from .timeline import Span
from .wal import Lsn, WalFile
from .waldump import WalScanner

MAX_GAPS = 100


def archive_info(folder: ClusterFolder, bin_dir: str = "") -> dict[str, Any]:
    """Timelines, ranges, gaps, and the age of the newest segment.

    With ``bin_dir`` also the last commit (pg_waldump).
    """
    index = scan(folder)
    tree = index.tree
    timelines = []
    gaps: list[dict[str, Any]] = []
    for timeline in index.timelines:
        parent = tree.parent(timeline)
        ranges = index.ranges(timeline)
        timelines.append(
            {
                "timeline": timeline,
                "parent": parent.timeline if parent else None,
                "switch_lsn": str(parent.lsn) if parent else None,
                "reason": parent.reason if parent else None,
                "segments": sum(last - first + 1 for first, last in ranges),
                "ranges": [
                    [index.name(timeline, first), index.name(timeline, last)] for first, last in ranges[-MAX_GAPS:]
                ],
            }
        )
        for first, last in index.gaps(timeline)[:MAX_GAPS]:
            names = {"first": index.name(timeline, first), "last": index.name(timeline, last)}
            gaps.append({"timeline": timeline, "segments": last - first + 1, **names})
    result: dict[str, Any] = {
        "timelines": timelines,
        "gaps": gaps,
        "segments": index.segments,
        "unknown_files": index.unknown[:MAX_GAPS],
        "last_segment": None,
        "last_segment_archived_at": None,
        "last_commit_time": None,
        "last_commit_lsn": None,
        "notes": [],
    }
    newest = [timeline for timeline in index.timelines if index.last(timeline) is not None]
    if newest:
        timeline = newest[-1]
        last = index.last(timeline) or 0
        name = index.name(timeline, last)
        written = folder.tree.stat(folder.wal_path(WalFile.parse(name))).mtime
        archived_at = datetime.datetime.fromtimestamp(written, datetime.timezone.utc)
        result.update(last_segment=name, last_segment_archived_at=archived_at.isoformat(timespec="seconds"))
        if bin_dir:
            first = index.ranges(timeline)[-1][0]
            span = Span(timeline, Lsn(first * index.segment_size), None)
            record = None
            try:
                record = WalScanner(folder, folder.chapter, index, bin_dir).last_transaction([span], last)
            except LockedError as error:
                # A host that holds no key still tells everything else. One that was given a key wants an answer.
                if folder.tree.identity:
                    raise
                result["notes"].append(f"The last commit is not known: {error.message}")
            if record is not None and record.time is not None:
                result.update(last_commit_time=record.time.isoformat(), last_commit_lsn=str(record.lsn))
    return result


def backup_info(folder: ClusterFolder) -> dict[str, Any]:
    """Backups and, for each, the span of points that can be restored from it (its recovery window)."""
    backups = stored_backups(folder)
    damaged = damaged_backups(folder, backups)
    index = scan(folder)
    current = folder.chapter.system_identifier
    windows = [
        _window(backup, index, damaged.get(backup.label, ""))
        for backup in backups
        if backup.system_identifier == current
    ]
    return {"backups": [backup.to_dict() for backup in backups], "recovery_windows": windows}


def _window(backup: Backup, index: ArchiveIndex, damage: str) -> dict[str, Any]:
    """The window of one backup along the newest timeline that it leads to."""
    tree = index.tree
    leads_to = [
        timeline
        for timeline in tree.timelines
        if (timeline == 1 or timeline in tree.histories) and tree.contains(timeline, backup.timeline, backup.stop_lsn)
    ]
    timeline = max(leads_to, default=backup.timeline)
    result: dict[str, Any] = {
        "backup": backup.label,
        "from_time": backup.stopped_at.isoformat(),
        "from_lsn": str(backup.stop_lsn),
        "timeline": timeline,
        "restorable": False,
        "to_lsn": None,
        "problem": damage,
    }
    if damage or not leads_to:
        result["problem"] = damage or f"the history of timeline {backup.timeline} is missing"
        return result
    last, _count, missing = reachable_end(backup, index, timeline)
    needed = backup.stop_lsn.previous_segment_number(index.segment_size)
    if missing:
        last = min(number for _timeline, number in missing) - 1
        result["problem"] = "missing WAL: " + ", ".join(index.name(tli, number) for tli, number in missing)
    if last >= needed:
        result.update(restorable=True, to_lsn=str(Lsn((last + 1) * index.segment_size)))
    result["segments"] = max(0, last - backup.start_lsn.segment_number(index.segment_size) + 1)
    return result
