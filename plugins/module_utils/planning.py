# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""From a request to a plan: what is there is looked at, and nothing is changed anywhere.

The decision itself is the pure function of plan.py; what it cannot know of this host, of the keys, and of the WAL
beyond the archive's end is asked here.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from . import extract, tail
from .backup import damaged_backups, stored_backups
from .catalog import broken_chains
from .createdspaces import check_created
from .encryption import LockedError, by_recipients, check_identity, recipients_id, try_identity
from .errors import PitrError
from .index import ArchiveIndex, scan
from .lastrecord import check_lsn
from .plan import (
    Location,
    Refusal,
    RefusedError,
    RestorePlan,
    candidates,
    needed_spans,
    plan,
    reachable_end,
    segment_names,
    target_timeline,
)
from .postgres import binary_version, control_data, data_version, running_pid
from .repository import ClusterFolder
from .request import Request
from .tail import Tail
from .target import RecoveryTarget
from .timeline import Span
from .unfinished import foreign_content, left_behind
from .wal import Lsn, WalFile
from .waldump import WalScanner

# Refusals that WAL beyond the archive's end may turn into a plan.
_FOR_WANT_OF_WAL = ("target_beyond_archive", "target_not_in_archive", "timeline_not_archived", "archive_gap")


class Planner:
    """One request, looked at.

    After :meth:`plan`, ``folder`` is the opened folder of the cluster, ``chapter`` the chapter that is restored from,
    and ``tail`` what a receiver has beyond the archive's end.
    """

    def __init__(self, request: Request) -> None:
        self._request = request
        self._refusals: list[Refusal] = []

    def plan(self) -> RestorePlan:
        """Decide without touching anything. Raises RefusedError with every reason that can be known now."""
        target = self._target()
        try:
            access = {**self._request.ssh, "identity": self._request.identity}
            folder = ClusterFolder.open(self._request.repository, self._request.cluster, access)
            self.chapter = folder.select(self._request.chapter)
        except PitrError as error:
            raise RefusedError([*self._refusals, Refusal("repository", error.message)]) from None
        self.folder = folder
        self._check_directory(folder)
        backups = [b for b in stored_backups(folder) if b.system_identifier == self.chapter.system_identifier]
        result = None
        self.tail: Tail | None = None
        if target is not None:
            try:
                index = scan(folder, self.chapter)
                damaged = broken_chains(backups, damaged_backups(folder, backups))
                self._look_at_tail(target, backups, index)
                location, last_commit = self._locate(target, backups, index, damaged)
                result = plan(backups, index, target, self._request.backup, damaged, location, last_commit)
                result = self._with_tail(result, index)
                check_lsn(result, index, self._scanner(index))
                refusals, notes = check_created(result, index, self._scanner(index))
                self._refusals += refusals
                result = replace(result, notes=(*result.notes, *notes))
                self._check_host(result)
                self._check_keys(result, index)
            except RefusedError as error:
                self._refusals += [self._hint(refusal, index) for refusal in error.refusals]
            except LockedError as error:
                self._refuse(error.code, error.message, self._whose(error.detail.get("recipients")))
        if self._refusals or result is None:
            raise RefusedError(self._refusals)
        pg_wal = os.path.join(self._request.pgdata, "pg_wal")
        if os.path.islink(pg_wal):
            note = (
                f"pg_wal is a link to {os.path.realpath(pg_wal)} now; it will be a plain directory, the old one stays"
            )
            result = replace(result, notes=(*result.notes, note))
        return result

    def _refuse(self, code: str, message: str, nearest: str = "") -> None:
        self._refusals.append(Refusal(code, message, nearest))

    def _target(self) -> RecoveryTarget | None:
        try:
            return RecoveryTarget.from_options(self._request.target_options)
        except PitrError as error:
            self._refuse("target", error.message)
            return None

    def _check_directory(self, folder: ClusterFolder) -> None:
        """May this directory be replaced?"""
        pgdata = self._request.pgdata
        try:
            found = os.listdir(pgdata)
        except FileNotFoundError:
            return
        except OSError as error:
            self._refuse("directory_unreadable", f"{pgdata} cannot be read: {error.strerror}.")
            return
        pid = running_pid(pgdata)
        if pid is not None:
            message = f"A server is running in {pgdata} (process {pid})."
            self._refuse("server_running", message, "Stop it first: pg_ctl stop -D, or its service.")
            return
        if not found or left_behind(pgdata, self.chapter.system_identifier) is not None:
            return
        if "PG_VERSION" not in found or data_version(pgdata) is None:
            self._refuse(
                "directory_foreign", f"{pgdata} is not empty and not a data directory. It will not be touched."
            )
            return
        try:
            identifier = control_data(self._request.bin_dir, pgdata).system_identifier
        except PitrError as error:
            message = f"{pgdata} is not empty, and it cannot be told which cluster it is: {error.message}"
            self._refuse("directory_foreign", message, "Move it away yourself.")
            return
        if identifier != self.chapter.system_identifier:
            message = (
                f"{pgdata} is the cluster with system identifier {identifier}, the repository's cluster"
                f" '{folder.name}' is {self.chapter.system_identifier}."
            )
            self._refuse("directory_foreign", message, "force does not change that; restore to another directory.")
        elif not self._request.force:
            message = f"{pgdata} is not empty: it is this cluster's own data directory."
            self._refuse("directory_not_empty", message, "With force it is moved aside, not removed.")
        elif os.path.ismount(pgdata):
            message = f"{pgdata} is a mount point and cannot be moved aside."
            self._refuse(
                "directory_mount_point", message, "Move its content away yourself and restore into the empty directory."
            )

    def _locate(
        self, target: RecoveryTarget, backups: list[Any], index: ArchiveIndex, damaged: Mapping[str, str]
    ) -> tuple[Location | None, datetime.datetime | None]:
        """Look into the WAL for what the catalog cannot tell: where an xid or a name is, when the last commit was."""
        if not backups or target.kind not in ("time", "xid", "name"):
            return None, None
        timeline = target_timeline(target, index.tree, backups, self._request.backup)
        related = candidates(backups, index.tree, timeline, self._request.backup)
        whole = sorted((b for b in related if b.label not in damaged), key=lambda b: b.stop_lsn, reverse=True)
        scanner = self._scanner(index)
        until: int | None = None
        for backup in whole:
            if target.time is not None and backup.stopped_at > target.time:
                # The plan will begin with an older one, and what that one reaches is the question.
                continue
            spans = needed_spans(backup, index.tree, timeline)
            last, _count, missing = reachable_end(backup, index, timeline)
            if missing:
                # What lies behind a hole cannot be reached from this backup.
                last = min(number for _tli, number in missing) - 1
            if target.kind == "time":
                record = scanner.last_transaction(spans, last)
                # Without any, none is later than (or, for an exclusive target, at) a time this backup can be used for.
                none = backup.stopped_at - datetime.timedelta(microseconds=1)
                return None, record.time if record else none
            end = last if until is None else min(last, until)
            if target.xid is not None:
                found = scanner.find_xid(spans, end, target.xid)
            else:
                found = scanner.find_name(spans, end, target.name or "")
            if found is not None:
                return found, None
            until = backup.stop_lsn.segment_number(index.segment_size)
        return None, None

    def _scanner(self, index: ArchiveIndex) -> WalScanner:
        return WalScanner(self.folder, self.chapter, index, self._request.bin_dir, self.tail)

    def _look_at_tail(self, target: RecoveryTarget, backups: list[Any], index: ArchiveIndex) -> None:
        """What a receiver has beyond the archive's end; with ``use_partial`` it counts as archived from here on."""
        if not backups or target.kind == "immediate":
            return
        timeline = target_timeline(target, index.tree, backups, self._request.backup)
        self.tail = tail.look(self.folder, self.chapter, index, timeline)
        if self._request.use_partial:
            self._add_tail(index)

    def _add_tail(self, index: ArchiveIndex) -> None:
        for name in self.tail.names if self.tail else ():
            wal_file = WalFile.parse(name)
            index.add(wal_file.timeline, wal_file.number(index.segment_size))

    def tail_reach(self, index: ArchiveIndex, local: str = "") -> Lsn | None:
        """Start of the last whole record in the receiver's segments, which are in ``index``."""
        if self.tail is None or not self.tail.names:
            return None
        size = index.segment_size
        first, last = (WalFile.parse(self.tail.names[at]).number(size) for at in (0, -1))
        span = Span(self.tail.timeline, Lsn(first * size), None)
        record = self._scanner(index).last_record([span], last, local)
        return record.lsn if record is not None else None

    def _with_tail(self, result: RestorePlan, index: ArchiveIndex) -> RestorePlan:
        """Say what comes from the receiver, or what could."""
        found = self.tail
        if found is None:
            return result
        notes = [f"the receiver's spool: {found.problem}"] if found.problem else []
        if found.names and not self._request.use_partial and result.target.kind == "latest":
            notes.append(self._offer(index))
        size = index.segment_size
        last = WalFile.parse(result.last_segment).number(size)
        used = tuple(name for name in found.names if WalFile.parse(name).number(size) <= last)
        if not self._request.use_partial or not used or result.timeline != found.timeline:
            return replace(result, notes=(*result.notes, *notes))
        reach = self.tail_reach(index)
        lsn = result.target.lsn
        if lsn is not None and (reach is None or reach < lsn):
            message = f"The target {result.target} lies after the last record that the receiver has."
            nearest = f"That one begins at LSN {reach}." if reach is not None else "There is no whole record in it."
            raise RefusedError([Refusal("target_beyond_archive", message, nearest)])
        notes.append(
            f"{', '.join(used)} from the receiver's spool, not archived yet; the last record there begins at LSN"
            f" {reach}"
        )
        at_least = reach if result.target.kind == "latest" else None
        return replace(result, notes=(*result.notes, *notes), from_receiver=used, at_least=at_least)

    def _offer(self, index: ArchiveIndex) -> str:
        """What ``use_partial`` would add. ``index`` is not used any more afterwards."""
        self._add_tail(index)
        names = self.tail.names if self.tail else ()
        return (
            f"the receiver's spool holds WAL that is not archived yet: {', '.join(names)}, its last record begins at"
            f" LSN {self.tail_reach(index)}; use_partial (restore_use_partial) would replay it"
        )

    def _hint(self, refusal: Refusal, index: ArchiveIndex) -> Refusal:
        """A refusal that may be due to WAL which only the receiver has says so."""
        offered = self.tail is not None and self.tail.names and not self._request.use_partial
        if not offered or refusal.code not in _FOR_WANT_OF_WAL:
            return refusal
        names = ", ".join(self.tail.names) if self.tail else ""
        hint = f"The receiver's spool has {names}, not archived yet; use_partial (restore_use_partial) would replay it."
        return replace(refusal, nearest=f"{refusal.nearest} {hint}".strip())

    def _check_host(self, result: RestorePlan) -> None:
        """Can this host run what would be restored?"""
        request = self._request
        version = binary_version(request.bin_dir)
        if version != result.backup.postgresql_version:
            message = f"The backup is of PostgreSQL {result.backup.postgresql_version}, {request.bin_dir} is {version}."
            self._refuse("version", message, "Point bin_dir at the same major version.")
        if not os.access(request.wal_command, os.X_OK):
            message = f"{request.wal_command} is not an executable file, so WAL could not be fetched."
            self._refuse("wal_command", message, "The module pgdrill.pitr.wal_command installs it.")
        existing = os.path.dirname(request.pgdata)
        while not os.path.isdir(existing):
            existing = os.path.dirname(existing)
        if not os.access(existing, os.W_OK):
            self._refuse(
                "not_writable", f"{existing} cannot be written by this user, so {request.pgdata} cannot be created."
            )
        space = os.statvfs(existing)
        free = space.f_bavail * space.f_frsize
        needed = result.backup.database_bytes + 4 * result.backup.wal_segment_size
        if free < needed:
            message = f"{existing} has {free // 2**20} MiB free, the restore needs {needed // 2**20} MiB."
            self._refuse("space", message, "The old directory is kept beside the new one until you remove it.")
        unknown = set(request.tablespace_mapping) - {t.location for t in result.backup.tablespaces}
        if unknown:
            known = ", ".join(t.location for t in result.backup.tablespaces) or "none"
            message = f"tablespace_mapping names {', '.join(sorted(unknown))}; the backup's tablespaces are: {known}."
            self._refuse("tablespace_unknown", message)
        killed = (left_behind(request.pgdata, self.chapter.system_identifier) or {}).get("locations", [])
        for location in request.locations(result.backup).values():
            if os.path.isdir(location) and foreign_content(location, location in killed):
                message = f"The tablespace directory {location} is not empty."
                self._refuse("tablespace_not_empty", message, "Map it to an empty one with tablespace_mapping.")
        if request.config_dir and not os.path.exists(os.path.join(request.config_dir, "postgresql.conf")):
            self._refuse("config_dir", f"{request.config_dir} holds no postgresql.conf.")

    def _check_keys(self, result: RestorePlan, index: ArchiveIndex) -> None:
        """Can everything that is needed be decrypted here?

        Tried on the backup's manifest, and on one segment of each set of recipients among those that are needed.
        """
        tree = self.folder.tree
        if tree.identity:
            self._try("backup_damaged", lambda: check_identity(tree.identity))
            if f"{os.path.realpath(tree.identity)}/".startswith(f"{os.path.realpath(self._request.pgdata)}/"):
                message = f"The identity file {tree.identity} lies in the data directory, which is moved aside."
                self._refuse("identity_unusable", message, "Keep it elsewhere.")
        if self._refusals:
            return
        if result.backup.encryption:
            stored = os.path.join(self.folder.backups_path, result.backup.label)
            self._try(
                "backup_damaged",
                lambda: try_identity(tree, extract.check_manifest(result.backup, stored, tree)),
                result.backup.encryption,
            )
        if not (self.folder.recipients or self.folder.former_recipients):
            # None of the WAL can be encrypted.
            return
        chapter = self.folder.require(result.backup.system_identifier)
        names = [name for name in segment_names(result, index) if name not in result.from_receiver]
        paths = [self.folder.wal_path(WalFile.parse(name), chapter) for name in names]
        try:
            found = by_recipients(tree, paths)
        except PitrError as error:
            self._refuse("archive_damaged", error.message)
            return
        for recipients, path in found.items():
            self._try("archive_damaged", partial(try_identity, tree, path), recipients)

    def _try(self, code: str, action: Callable[[], None], recipients: str = "") -> None:
        """Refuse with the reason of what fails, or with ``code`` when no key is to blame."""
        try:
            action()
        except LockedError as error:
            self._refuse(error.code, error.message, self._whose(recipients))
        except PitrError as error:
            self._refuse(code, error.message)

    def _whose(self, identifier: object) -> str:
        """Who the recipients with this id are, where cluster.json remembers them."""
        for recipients in (self.folder.recipients, *self.folder.former_recipients):
            if identifier and identifier == recipients_id(recipients):
                return f"The identity (path) of one of these is needed: {', '.join(recipients)}."
        return ""
