# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a repository holds, for people and for monitoring: archive, backups, and what can be restored from them."""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping
from typing import Any

from .catalog import Backup, broken_chains
from .encryption import LockedError
from .index import ArchiveIndex, scan
from .reach import reachable_end
from .repository import Chapter, ClusterFolder
from .retention import WalRange, missing_wal, needed_from, unneeded
from .sizes import Sizes, folder_bytes
from .stored import damaged_backups, keep_mark, stored_backups
from .timeline import Span
from .wal import Lsn, WalFile, is_log
from .waldump import WalScanner

MAX_GAPS = 100
MAX_NAMES = 100


def archive_info(
    folder: ClusterFolder, bin_dir: str = "", chapter: Chapter | None = None, sizes: bool = True
) -> dict[str, Any]:
    """Timelines, ranges, holes, ages, and the WAL that backups need, in one walk over the names.

    With ``bin_dir`` also the last commit (pg_waldump); with ``sizes`` the stored bytes, which costs a look at each
    file and is only done where the repository is a directory of this host.
    """
    chapter = chapter or folder.chapter
    archive = folder.archive_path(chapter)
    counted = None
    if sizes and os.path.isdir(archive):
        counted = Sizes(archive, [name for name in folder.tree.names(archive) if is_log(name)])
    try:
        index = scan(folder, chapter)
    finally:
        stored = counted.result() if counted is not None else None
    gaps = _gaps(index)
    result: dict[str, Any] = {
        "chapter": chapter.to_dict(),
        "timelines": [_timeline(index, timeline, stored) for timeline in index.timelines],
        "gaps": gaps[:MAX_GAPS],
        "missing_segments": sum(gap["segments"] for gap in gaps),
        "segments": index.segments,
        "stored_bytes": None if stored is None else sum(stored.values()),
        "unknown_files": index.unknown[:MAX_GAPS],
        "first_segment": None,
        "first_segment_archived_at": None,
        "last_segment": None,
        "last_segment_archived_at": None,
        "last_commit_time": None,
        "last_commit_lsn": None,
        "notes": [],
        **_needs(folder, chapter, index, stored),
    }
    with_segments = [timeline for timeline in index.timelines if index.last(timeline) is not None]
    if with_segments:
        timeline = with_segments[-1]
        oldest = min(with_segments, key=lambda each: (index.ranges(each)[0][0], each))
        first = index.name(oldest, index.ranges(oldest)[0][0])
        last = index.last(timeline) or 0
        name = index.name(timeline, last)
        result.update(first_segment=first, first_segment_archived_at=_stored_at(folder, chapter, first))
        result.update(last_segment=name, last_segment_archived_at=_stored_at(folder, chapter, name))
        if bin_dir:
            span = Span(timeline, Lsn(index.ranges(timeline)[-1][0] * index.segment_size), None)
            record = None
            try:
                record = WalScanner(folder, chapter, index, bin_dir).last_transaction([span], last)
            except LockedError as error:
                # A host that holds no key still tells everything else. One that was given a key wants an answer.
                if folder.tree.identity:
                    raise
                result["notes"].append(f"The last commit is not known: {error.message}")
            if record is not None and record.time is not None:
                result.update(last_commit_time=record.time.isoformat(), last_commit_lsn=str(record.lsn))
    return result


def _stored_at(folder: ClusterFolder, chapter: Chapter, segment: str) -> str:
    written = folder.tree.stat(folder.wal_path(WalFile.parse(segment), chapter)).mtime
    return datetime.datetime.fromtimestamp(written, datetime.timezone.utc).isoformat(timespec="seconds")


def _timeline(index: ArchiveIndex, timeline: int, stored: Mapping[str, int] | None) -> dict[str, Any]:
    """One timeline: where it came from, and what is there of it."""
    tree = index.tree
    parent = tree.parent(timeline)
    ranges = index.ranges(timeline)
    history: list[dict[str, Any]] | None = None
    if timeline == 1 or timeline in tree.histories:
        spans = tree.path(timeline)
        history = [{"timeline": span.timeline, "until_lsn": str(span.end)} for span in spans[:-1]]
    return {
        "timeline": timeline,
        "parent": parent.timeline if parent else None,
        "switch_lsn": str(parent.lsn) if parent else None,
        "reason": parent.reason if parent else None,
        "history": history,
        "segments": sum(last - first + 1 for first, last in ranges),
        "stored_bytes": None
        if stored is None
        else sum(size for log, size in stored.items() if log.startswith(f"{timeline:08X}")),
        "ranges": [[index.name(timeline, first), index.name(timeline, last)] for first, last in ranges[-MAX_GAPS:]],
    }


def _gaps(index: ArchiveIndex) -> list[dict[str, Any]]:
    """Runs of missing segments; their names, up to MAX_NAMES in all."""
    result = []
    left = MAX_NAMES
    for timeline, first, last in index.holes():
        names = [index.name(timeline, number) for number in range(first, min(last + 1, first + left))]
        left -= len(names)
        ends = {"first": index.name(timeline, first), "last": index.name(timeline, last)}
        result.append({"timeline": timeline, "segments": last - first + 1, **ends, "names": names})
    return result


def _needs(
    folder: ClusterFolder, chapter: Chapter, index: ArchiveIndex, stored: Mapping[str, int] | None
) -> dict[str, Any]:
    """What backups need and is not there, and what is there and no backup needs."""
    backups = [backup for backup in stored_backups(folder) if backup.system_identifier == chapter.system_identifier]
    missing = []
    for backup in backups:
        names = missing_wal(backup, index, MAX_NAMES)
        if names:
            missing.append({"backup": backup.label, "segments": len(names), "names": names[:MAX_NAMES]})
    points = [(backup.timeline, backup.start_lsn, backup.stop_lsn) for backup in backups]
    ranges = unneeded(index, needed_from(points, index))
    return {
        "missing_for_backups": missing,
        "unneeded": [
            {
                "timeline": item.timeline,
                "first": index.name(item.timeline, item.first),
                "last": index.name(item.timeline, item.last),
                "segments": item.segments,
            }
            for item in ranges
        ],
        "unneeded_segments": sum(item.segments for item in ranges),
        "unneeded_bytes": None
        if stored is None
        else sum(range_bytes(folder.archive_path(chapter), index, item, stored) for item in ranges),
    }


def range_bytes(archive: str, index: ArchiveIndex, item: WalRange, stored: Mapping[str, int]) -> int:
    """Stored bytes of a timeline's files up to the end of ``item``, which begins with the timeline's first."""
    border = index.name(item.timeline, item.last + 1)
    total = sum(size for log, size in stored.items() if log[:8] == border[:8] and log < border[:16])
    return total + folder_bytes(os.path.join(archive, border[:16]), border)


def backup_info(folder: ClusterFolder, chapter: Chapter | None = None) -> dict[str, Any]:
    """Backups of all chapters and, for those of one, the span of points that can be restored from each (its window)."""
    chapter = chapter or folder.chapter
    backups = stored_backups(folder)
    damaged = broken_chains(backups, damaged_backups(folder, backups))
    index = scan(folder, chapter)
    numbers = {each.system_identifier: each.number for each in folder.chapters}
    windows = [
        window(backup, index, damaged.get(backup.label, ""))
        for backup in backups
        if backup.system_identifier == chapter.system_identifier
    ]
    told = [
        {**b.to_dict(), "chapter": numbers.get(b.system_identifier), "keep": keep_mark(folder, b.label)}
        for b in backups
    ]
    return {"backups": told, "recovery_windows": windows}


def window(backup: Backup, index: ArchiveIndex, damage: str) -> dict[str, Any]:
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
