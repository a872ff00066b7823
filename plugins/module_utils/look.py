# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Looking at a cluster for monitoring: the primary over the ordinary protocol, the repository on this host.

A server that does not answer, and a repository that cannot be read, are facts and no failures. The archive is read by
names alone: no segment is opened, however many there are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import time
from collections.abc import Sequence
from typing import Any, Optional

from . import activity, seen
from .catalog import broken_chains
from .errors import PitrError
from .index import ArchiveIndex, scan
from .info import window
from .judge import IDLE_BYTES
from .postgres import Login, query
from .receiver import holders, lock_path, read_status
from .repository import Chapter, ClusterFolder, require_directory
from .retention import needed_from
from .sizes import folder_bytes
from .stored import damaged_backups, stored_backups
from .upstream import settings_path
from .wal import Lsn, WalFile
from .watched import Archive, Facts, Hole, Receiver, Room, Sender, Server, Slot, Storage, Stored

# Milliseconds for one question. What is asked is answered from memory, or from one directory.
STATEMENT_TIMEOUT = 20000
MAX_HOLES = 100

_SERVER = """
SELECT (SELECT system_identifier::text FROM pg_control_system()),
       pg_is_in_recovery(),
       coalesce(current_setting('pgdrill.accepted', true), ''),
       CASE WHEN pg_is_in_recovery() THEN NULL ELSE pg_walfile_name(pg_current_wal_flush_lsn()) END,
       (CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_flush_lsn() END)::text,
       current_setting('archive_mode'),
       current_setting('archive_command') NOT IN ('', '(disabled)') OR current_setting('archive_library') <> '',
       (SELECT setting::int FROM pg_settings WHERE name = 'archive_timeout'),
       (SELECT setting::bigint FROM pg_settings WHERE name = 'max_slot_wal_keep_size'),
       a.archived_count, a.failed_count, coalesce(a.last_failed_wal, ''),
       extract(epoch FROM clock_timestamp() - a.last_archived_time)::float8,
       extract(epoch FROM clock_timestamp() - a.last_failed_time)::float8
FROM pg_stat_archiver a"""
_SLOTS = """
SELECT slot_name::text, slot_type, active, coalesce(wal_status, ''), pg_wal_lsn_diff(%s::pg_lsn, restart_lsn)::bigint
FROM pg_replication_slots WHERE NOT temporary ORDER BY slot_name"""
_SENDERS = """
SELECT application_name, coalesce(state, ''), coalesce(sync_state, ''), pg_wal_lsn_diff(%s::pg_lsn, flush_lsn)::bigint
FROM pg_stat_replication WHERE state IS DISTINCT FROM 'backup' ORDER BY application_name"""
_READY = """
SELECT count(*), coalesce(min(name), ''), max(extract(epoch FROM clock_timestamp() - modification))::float8
FROM pg_ls_archive_statusdir() WHERE name LIKE '%.ready'"""
_WAL = "SELECT coalesce(sum(size), 0)::bigint FROM pg_ls_waldir()"
_MAY = "SELECT pg_has_role(current_user, 'pg_monitor', 'USAGE')"


def server_facts(login: Login) -> Server:
    """What the server says of itself; of several hosts with commas between them the primary. Raises PitrError when it
    does not answer."""
    if "," in login.host:
        os.environ["PGTARGETSESSIONATTRS"] = "primary"
    with contextlib.closing(login.connect(application_name="pitr-status")) as connection:
        query(connection, f"SET statement_timeout = {STATEMENT_TIMEOUT}")
        row = query(connection, _SERVER)[0]
        (identifier, in_recovery, accepted, segment, lsn, mode, command, timeout, keep) = row[:9]
        (archived, failed, failed_wal, archived_age, failed_age) = row[9:]
        # Without pg_monitor the directories are refused, and pg_stat_replication shows nothing but names.
        may = bool(query(connection, _MAY)[0][0])
        ready: tuple[Any, ...] = (None, "", None)
        wal_bytes = None
        if may:
            ready = query(connection, _READY)[0]
            wal_bytes = query(connection, _WAL)[0][0]
        return Server(
            system_identifier=identifier,
            in_recovery=in_recovery,
            accepted=accepted != "off",
            timeline=int(segment[:8], 16) if segment else None,
            lsn=Lsn.parse(lsn or "0/0"),
            archive_mode=mode,
            has_command=command,
            archive_timeout=timeout,
            # In megabytes; -1 is no limit.
            max_slot_keep=keep << 20 if keep >= 0 else -1,
            archived_count=archived,
            failed_count=failed,
            last_archived_age=archived_age,
            last_failed_age=failed_age,
            last_failed_wal=failed_wal,
            slots=tuple(Slot(*found) for found in query(connection, _SLOTS, (lsn,))),
            senders=tuple(Sender(*found) for found in query(connection, _SENDERS, (lsn,))),
            ready=ready[0],
            oldest_ready=ready[1],
            oldest_ready_age=ready[2],
            wal_bytes=wal_bytes,
            refused=() if may else ("archive_status", "pg_wal", "pg_stat_replication"),
        )


def archived_end(index: ArchiveIndex, timeline: int) -> Optional[Lsn]:
    """Where the archive ends on the way to this timeline; None when nothing of that way is there, or not known.

    A timeline of which nothing is archived yet ends where it has left its parent, if the parent's WAL comes so far.
    """
    end: Optional[Lsn] = None
    tree = index.tree
    if timeline != 1 and timeline not in tree.histories:
        last = index.last(timeline)
        return None if last is None else Lsn((last + 1) * index.segment_size)
    for part in tree.path(timeline):
        last = index.last(part.timeline)
        if last is None:
            continue
        reached = Lsn((last + 1) * index.segment_size)
        end = reached if part.end is None else min(reached, part.end)
    return end


class Look:
    """One look at a cluster's folder. ``now`` in seconds since 1970; ``directory`` has the receiver's settings."""

    def __init__(self, folder: ClusterFolder, memory: seen.Seen, now: float, directory: str = "") -> None:
        self._folder = folder
        self._chapter: Chapter = folder.chapter
        self._memory = memory
        self._now = now
        self._directory = directory

    def storage(self, timeline: Optional[int]) -> Storage:
        """What the repository tells; ``timeline`` is the primary's, None for the newest that is there.

        Raises PitrError, OSError.
        """
        folder, chapter = self._folder, self._chapter
        index = scan(folder, chapter)
        everything = stored_backups(folder)
        backups = [backup for backup in everything if backup.system_identifier == chapter.system_identifier]
        damage = broken_chains(backups, damaged_backups(folder, backups))
        stored = tuple(self._stored(window(b, index, damage.get(b.label, "")), b) for b in backups)
        good = {item.label for item in stored if not item.problem}
        points = {b.label: (b.timeline, b.start_lsn, b.stop_lsn) for b in backups}
        needed = needed_from(points.values(), index)
        current = needed_from([points[b.label] for b in backups if b.label in good][-1:], index)
        with_segments = [each for each in index.timelines if index.last(each) is not None]
        last = index.name(with_segments[-1], index.last(with_segments[-1]) or 0) if with_segments else ""
        archive = Archive(
            system_identifier=chapter.system_identifier,
            segments=index.segments,
            timelines=tuple(index.timelines),
            histories=tuple(index.tree.histories),
            last_segment=last,
            last_segment_age=self._segment_age(last) if last else None,
            end=archived_end(index, timeline or max(with_segments, default=1)),
            holes=tuple(self._hole(index, needed, current, *run) for run in index.holes()[-MAX_HOLES:]),
        )
        done = activity.read(activity.path_of(folder))
        verify_age, verify_level, damaged = self._verified(done[activity.VERIFY], {b.label for b in backups})
        passed = [item for item in done[activity.DRILL] if item.get("verdict") == "passed"]
        return Storage(
            archive=archive,
            backups=stored,
            room=self._room(index, sum(backup.stored_bytes for backup in everything)),
            receiver=self._receiver(),
            verify_age=verify_age,
            verify_level=verify_level,
            damaged=damaged,
            drill_age=self._age(passed[-1]["at"]) if passed else None,
            drill_failed=bool(done[activity.DRILL]) and done[activity.DRILL][-1].get("verdict") != "passed",
            drill_by_clock=bool(done[activity.DRILL]) and done[activity.DRILL][-1].get("by") == activity.CLOCK,
        )

    def _age(self, at: str) -> float:
        return max(0.0, self._now - datetime.datetime.fromisoformat(at).timestamp())

    def _stored(self, told: dict[str, Any], backup: Any) -> Stored:
        return Stored(
            label=backup.label,
            type=backup.type,
            age=max(0.0, self._now - backup.stopped_at.timestamp()),
            problem="" if told["restorable"] else told["problem"] or "its WAL is not in the archive",
            hole=told["problem"] if told["restorable"] else "",
            to_lsn=told["to_lsn"] or "",
            stored_bytes=backup.stored_bytes,
        )

    def _segment_age(self, name: str) -> Optional[float]:
        with contextlib.suppress(OSError):
            written = self._folder.tree.stat(self._folder.wal_path(WalFile.parse(name), self._chapter)).mtime
            return max(0.0, self._now - written)
        return None

    def _hole(
        self, index: ArchiveIndex, needed: dict[int, int], current: dict[int, int], timeline: int, first: int, last: int
    ) -> Hole:
        # What follows on the next timeline has no name of its own that would tell; it counts as old.
        age = self._segment_age(index.name(timeline, last + 1)) if index.has(timeline, last + 1) else None
        return Hole(
            timeline=timeline,
            first=index.name(timeline, first),
            last=index.name(timeline, last),
            segments=last - first + 1,
            age=float("inf") if age is None else age,
            needed=timeline in needed and last >= needed[timeline],
            current=timeline in current and last >= current[timeline],
        )

    def _verified(
        self, done: Sequence[dict[str, Any]], labels: set[str]
    ) -> tuple[Optional[float], str, tuple[str, ...]]:
        """Age and level of the newest verification that found no damage, and what of ``labels`` was last damaged."""
        age, level = None, ""
        damaged: set[str] = set()
        for item in done:
            whole, bad = item.get("whole"), item.get("damaged")
            if not isinstance(whole, dict) or not isinstance(bad, list):
                continue
            damaged = (damaged - set(whole)) | {str(label) for label in bad}
            if whole and not bad:
                age, level = self._age(item["at"]), min(map(str, whole.values()))
        return age, level, tuple(sorted(damaged & labels))

    def _room(self, index: ArchiveIndex, backups: int) -> Room:
        space = os.statvfs(self._folder.path)
        stored = backups + self._archive_bytes(index)
        growth, span = self._memory.growth(stored, self._now)
        return Room(
            free=space.f_bavail * space.f_frsize,
            size=space.f_blocks * space.f_frsize,
            stored=stored,
            growth=growth,
            growth_span=span,
        )

    def _archive_bytes(self, index: ArchiveIndex) -> int:
        """Stored WAL of the newest chapter. A folder that has not changed since an earlier look is not read again."""
        archive = self._folder.archive_path(self._chapter)
        known = self._memory.folders
        found: dict[str, tuple[int, int]] = {}
        for log in index.logs:
            path = os.path.join(archive, log)
            key = f"{self._chapter.folder}/{log}"
            try:
                changed = os.stat(path).st_mtime_ns
                found[key] = known[key] if known.get(key, (0, 0))[0] == changed else (changed, folder_bytes(path))
            except FileNotFoundError:
                continue
        self._memory.folders = found
        return sum(count for _changed, count in found.values())

    def _receiver(self) -> Optional[Receiver]:
        # One that was taken away has no settings any more; what it last said stays.
        if not os.path.exists(settings_path(self._directory, self._folder.name)):
            return None
        status = read_status(self._folder)
        lsn = status.get("received_lsn")
        return Receiver(
            application_name=str(status.get("application_name") or ""),
            running=bool(holders(lock_path(self._folder))),
            state=str(status.get("state") or "not started yet"),
            last_error=str(status.get("last_error") or ""),
            received_lsn=Lsn.parse(str(lsn)) if lsn else None,
            not_archived=len(status.get("not_archived") or ()),
        )


def look(
    repository: str, cluster: str, login: Login, memory: seen.Seen, directory: str = "", now: Optional[float] = None
) -> Facts:
    """Look at the primary and at the repository, and remember in ``memory`` what the next look will want to know.

    ``directory`` is that of ``pitr-wal``, where a receiver has its settings.
    """
    began = time.monotonic()
    at = time.time() if now is None else now
    facts = Facts(cluster=cluster, at=at, server_name=str(login))
    try:
        facts = dataclasses.replace(facts, server=server_facts(login))
    except PitrError as error:
        facts = dataclasses.replace(facts, server_problem=" ".join(error.message.split()))
    server = facts.server
    try:
        require_directory(repository)
        folder = ClusterFolder.open(repository, cluster)
        storage = Look(folder, memory, at, directory).storage(server.timeline if server is not None else None)
        facts = dataclasses.replace(facts, storage=storage)
    except PitrError as error:
        facts = dataclasses.replace(facts, storage_problem=" ".join(error.message.split()))
    except OSError as error:
        facts = dataclasses.replace(facts, storage_problem=f"{error.filename or repository}: {error.strerror or error}")
    facts = _with_memory(facts, memory)
    return dataclasses.replace(facts, seconds=time.monotonic() - began)


def _with_memory(facts: Facts, memory: seen.Seen) -> Facts:
    server, storage, now = facts.server, facts.storage, facts.at
    if server is not None:
        new, span = memory.new_failures(server.failed_count, now)
        facts = dataclasses.replace(facts, new_failures=new, failures_span=span)
    if server is not None and storage is not None and storage.archive.end is not None:
        waiting = memory.waiting(server.timeline, storage.archive.end, IDLE_BYTES, now)
        # A segment that is .ready has been waiting since it was finished, whether or not somebody looked.
        waiting = max(waiting, server.oldest_ready_age or 0.0)
        facts = dataclasses.replace(facts, archive_lag_age=waiting)
    if storage is not None:
        sample = seen.Sample(
            at=now,
            stored=storage.room.stored,
            failed=server.failed_count if server is not None else None,
            lsn=int(server.lsn) if server is not None else None,
            timeline=server.timeline if server is not None else None,
        )
        memory.samples = seen.thin([*memory.samples, sample], now)
    return facts
