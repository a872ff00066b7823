# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A restore, question by question: what is there (look), may it be done and from where (plan), do it (execute).

Until :meth:`Restore.execute` nothing is changed anywhere. A failed execution puts the old directory back; a killed
one leaves the old directory beside the new one, and a directory that no server can start from, which the next try
recognises.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from . import extract, locks, recovery_conf, tail
from .backup import damaged_backups, stored_backups
from .catalog import Backup
from .encryption import LockedError, by_recipients, check_identity, recipients_id, try_identity
from .errors import PitrError
from .index import ArchiveIndex, scan
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
from .postgres import binary, binary_version, control_data, data_version, run, running_pid, shell_command
from .receiver import ACCEPTED
from .repository import BEING_REMOVED, ClusterFolder, write_json
from .tail import Tail
from .target import RecoveryTarget
from .timeline import Span
from .tree import fsync_directory
from .wal import Lsn, WalFile
from .waldump import WalScanner

ARCHIVE_AFTER = ("off", "same", "none-until-promoted")
IN_PROGRESS = "pitr-restoring.json"
# Refusals that WAL beyond the archive's end may turn into a plan.
_FOR_WANT_OF_WAL = ("target_beyond_archive", "target_not_in_archive", "timeline_not_archived", "archive_gap")


@dataclass(frozen=True)
class Request:
    """What was asked. Paths are absolute; ``wal_command`` is the installed ``pitr-wal``."""

    repository: str
    cluster: str
    pgdata: str
    bin_dir: str
    wal_command: str
    target_options: Mapping[str, Any] = field(default_factory=dict)
    backup: str = "auto"
    config_dir: str = ""
    tablespace_mapping: Mapping[str, str] = field(default_factory=dict)
    force: bool = False
    keep_unaccepted: bool = True
    archive_after: str = "none-until-promoted"
    verify: bool = True
    # Path of the file with age identities that open what is encrypted, empty for none.
    identity: str = ""
    use_partial: bool = False
    # How a repository on another host is reached: the settings of remote.SshTree.
    ssh: Mapping[str, str] = field(default_factory=dict)
    # Number of the chapter to restore from; the newest one when None.
    chapter: int | None = None

    def __post_init__(self) -> None:
        # The roles always say where the configuration is; in the data directory it comes with the backup.
        if self.config_dir and os.path.abspath(self.config_dir) == os.path.abspath(self.pgdata):
            object.__setattr__(self, "config_dir", "")

    @property
    def configuration(self) -> str:
        """Directory of postgresql.conf."""
        return self.config_dir or self.pgdata


@dataclass(frozen=True)
class Result:
    """What was done. ``moved_aside`` is where the old directory is now, or empty. ``seconds`` of the copy."""

    plan: RestorePlan
    moved_aside: str
    seconds: float


class _Marker:
    """Says in the directory that it is not complete, of which cluster it is, and how much of it is there.

    The next try after a kill reads from it where the old directory is and which tablespace directories it may clear.
    """

    def __init__(self, path: str, backup: Backup, moved_aside: str, locations: Mapping[int, str]) -> None:
        self._path = path
        self._facts = {"format": 1, "system_identifier": backup.system_identifier, "backup": backup.label}
        self._left = {"moved_aside": moved_aside, "locations": sorted(locations.values())}
        self._total = backup.database_bytes
        self._done = 0
        self.write()

    def add(self, count: int) -> None:
        """Count bytes; write the sum down once a second."""
        self._done += count
        if time.monotonic() - self._written_at >= 1:
            self.write()

    def write(self) -> None:
        """Write the marker anew, on stable storage."""
        write_json(self._path, {**self._facts, **self._left, "bytes": self._done, "total_bytes": self._total})
        self._written_at = time.monotonic()


class Restore:
    """One restore of one cluster into one data directory."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._refusals: list[Refusal] = []

    def plan(self) -> RestorePlan:
        """Decide without touching anything. Raises RefusedError with every reason that can be known now."""
        target = self._target()
        try:
            access = {**self._request.ssh, "identity": self._request.identity}
            folder = ClusterFolder.open(self._request.repository, self._request.cluster, access)
            self._chapter = folder.select(self._request.chapter)
        except PitrError as error:
            raise RefusedError([*self._refusals, Refusal("repository", error.message)]) from None
        self._folder = folder
        self._check_directory(folder)
        backups = [b for b in stored_backups(folder) if b.system_identifier == self._chapter.system_identifier]
        result = None
        self._tail: Tail | None = None
        if target is not None:
            try:
                index = scan(folder, self._chapter)
                damaged = damaged_backups(folder, backups)
                self._look_at_tail(target, backups, index)
                location, last_commit = self._locate(target, backups, index, damaged)
                result = plan(backups, index, target, self._request.backup, damaged, location, last_commit)
                result = self._with_tail(result, index)
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
        if not found or self._left_behind(folder) is not None:
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
        if identifier != self._chapter.system_identifier:
            message = (
                f"{pgdata} is the cluster with system identifier {identifier}, the repository's cluster"
                f" '{folder.name}' is {self._chapter.system_identifier}."
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

    def _left_behind(self, folder: ClusterFolder) -> dict[str, Any] | None:
        """What a killed restore of the same cluster says of itself, None when this directory is something else.

        It has the marker, and no pg_control yet. Empty when it was killed before it had written the marker.
        """
        pgdata = self._request.pgdata
        if os.path.lexists(os.path.join(pgdata, extract.PG_CONTROL)):
            return None
        with contextlib.suppress(OSError, ValueError):
            names = os.listdir(pgdata)
            if names and all(name.startswith(f".{IN_PROGRESS}.") for name in names):
                return {}
            with open(os.path.join(pgdata, IN_PROGRESS), encoding="utf-8") as stream:
                found = json.load(stream)
            if isinstance(found, dict) and found.get("system_identifier") == self._chapter.system_identifier:
                return found
        return None

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
        return WalScanner(self._folder, self._chapter, index, self._request.bin_dir, self._tail)

    def _look_at_tail(self, target: RecoveryTarget, backups: list[Any], index: ArchiveIndex) -> None:
        """What a receiver has beyond the archive's end; with ``use_partial`` it counts as archived from here on."""
        if not backups or target.kind == "immediate":
            return
        timeline = target_timeline(target, index.tree, backups, self._request.backup)
        self._tail = tail.look(self._folder, self._chapter, index, timeline)
        if self._request.use_partial:
            self._add_tail(index)

    def _add_tail(self, index: ArchiveIndex) -> None:
        for name in self._tail.names if self._tail else ():
            wal_file = WalFile.parse(name)
            index.add(wal_file.timeline, wal_file.number(index.segment_size))

    def _tail_reach(self, index: ArchiveIndex, local: str = "") -> Lsn | None:
        """Start of the last whole record in the receiver's segments, which are in ``index``."""
        if self._tail is None or not self._tail.names:
            return None
        size = index.segment_size
        first, last = (WalFile.parse(self._tail.names[at]).number(size) for at in (0, -1))
        span = Span(self._tail.timeline, Lsn(first * size), None)
        record = self._scanner(index).last_record([span], last, local)
        return record.lsn if record is not None else None

    def _with_tail(self, result: RestorePlan, index: ArchiveIndex) -> RestorePlan:
        """Say what comes from the receiver, or what could."""
        found = self._tail
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
        reach = self._tail_reach(index)
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
        names = self._tail.names if self._tail else ()
        return (
            f"the receiver's spool holds WAL that is not archived yet: {', '.join(names)}, its last record begins at"
            f" LSN {self._tail_reach(index)}; use_partial (restore_use_partial) would replay it"
        )

    def _hint(self, refusal: Refusal, index: ArchiveIndex) -> Refusal:
        """A refusal that may be due to WAL which only the receiver has says so."""
        offered = self._tail is not None and self._tail.names and not self._request.use_partial
        if not offered or refusal.code not in _FOR_WANT_OF_WAL:
            return refusal
        names = ", ".join(self._tail.names) if self._tail else ""
        hint = f"The receiver's spool has {names}, not archived yet; use_partial (restore_use_partial) would replay it."
        return replace(refusal, nearest=f"{refusal.nearest} {hint}".strip())

    def _bring_tail(self, result: RestorePlan) -> None:
        """Copy what the receiver has into pg_wal, and look again how far it reaches."""
        if not result.from_receiver or self._tail is None:
            return
        pg_wal = os.path.join(self._request.pgdata, "pg_wal")
        os.makedirs(pg_wal, mode=0o700, exist_ok=True)
        chapter = self._chapter
        for name in result.from_receiver:
            tail.copy(self._folder, chapter, self._tail, name, os.path.join(pg_wal, name))
        index = scan(self._folder, chapter)
        for name in result.from_receiver:
            wal_file = WalFile.parse(name)
            number = wal_file.number(index.segment_size)
            if not index.has(wal_file.timeline, number):
                index.add(wal_file.timeline, number)
        reach = self._tail_reach(index, pg_wal)
        if result.at_least is not None and (reach is None or reach < result.at_least):
            raise PitrError(
                f"The receiver's segments have changed since the plan was made: {', '.join(result.from_receiver)} had a"
                f" record at LSN {result.at_least}, and reach to {reach} now. Plan again."
            )

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
        left_behind = (self._left_behind(self._folder) or {}).get("locations", [])
        for location in self.locations(result).values():
            if os.path.isdir(location) and _foreign_content(location, location in left_behind):
                message = f"The tablespace directory {location} is not empty."
                self._refuse("tablespace_not_empty", message, "Map it to an empty one with tablespace_mapping.")
        if request.config_dir and not os.path.exists(os.path.join(request.config_dir, "postgresql.conf")):
            self._refuse("config_dir", f"{request.config_dir} holds no postgresql.conf.")

    def _check_keys(self, result: RestorePlan, index: ArchiveIndex) -> None:
        """Can everything that is needed be decrypted here?

        Tried on the backup's manifest, and on one segment of each set of recipients among those that are needed.
        """
        tree = self._folder.tree
        if tree.identity:
            self._try("backup_damaged", lambda: check_identity(tree.identity))
            if f"{os.path.realpath(tree.identity)}/".startswith(f"{os.path.realpath(self._request.pgdata)}/"):
                message = f"The identity file {tree.identity} lies in the data directory, which is moved aside."
                self._refuse("identity_unusable", message, "Keep it elsewhere.")
        if self._refusals:
            return
        if result.backup.encryption:
            stored = os.path.join(self._folder.backups_path, result.backup.label)
            self._try(
                "backup_damaged",
                lambda: try_identity(tree, extract.check_manifest(result.backup, stored, tree)),
                result.backup.encryption,
            )
        if not (self._folder.recipients or self._folder.former_recipients):
            # None of the WAL can be encrypted.
            return
        chapter = self._folder.require(result.backup.system_identifier)
        names = [name for name in segment_names(result, index) if name not in result.from_receiver]
        paths = [self._folder.wal_path(WalFile.parse(name), chapter) for name in names]
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
        for recipients in (self._folder.recipients, *self._folder.former_recipients):
            if identifier and identifier == recipients_id(recipients):
                return f"The identity (path) of one of these is needed: {', '.join(recipients)}."
        return ""

    def locations(self, result: RestorePlan) -> dict[int, str]:
        """Where each tablespace of the planned backup goes."""
        mapping = self._request.tablespace_mapping
        return {item.oid: mapping.get(item.location, item.location) for item in result.backup.tablespaces}

    def execute(self, result: RestorePlan) -> Result:
        """Perform the plan. Raises PitrError; then the old directory is where it was."""
        lease = self._claim(result.backup.label)
        try:
            with locks.reading(self._folder, result.backup.label):
                stored = os.path.join(self._folder.backups_path, result.backup.label)
                if not self._folder.tree.exists(stored):
                    raise PitrError(
                        f"{stored} was removed by an expire since the plan was made. Nothing was touched; plan again."
                    )
                return self._execute(result, lease)
        except BaseException:
            locks.release(self._folder, lease)
            raise

    def _claim(self, label: str) -> str:
        """A lease on the backup and the WAL behind it, until a recovery asks for no more WAL."""
        lease = locks.new_lease(label)
        self._claimed_at = time.monotonic()
        # A repository that this host may only read is restored from all the same; docs/retention.md tells what follows.
        try:
            self._folder.touch_lease(lease)
        except OSError:
            pass
        except PitrError as error:
            if BEING_REMOVED in error.message:
                raise PitrError(f"{error.message} Nothing was touched; plan again.") from None
        return lease

    def _execute(self, result: RestorePlan, lease: str) -> Result:
        started = time.monotonic()
        pgdata = self._request.pgdata
        was_there = os.path.isdir(pgdata)
        moved_aside = self._clear()
        moved_aside = self._move_aside() or moved_aside
        locations = self.locations(result)
        progress = None
        try:
            os.makedirs(pgdata, mode=0o700, exist_ok=True)
            os.chmod(pgdata, 0o700)
            progress = _Marker(os.path.join(pgdata, IN_PROGRESS), result.backup, moved_aside, locations)
            stored = os.path.join(self._folder.backups_path, result.backup.label)
            extract.extract(
                result.backup, stored, pgdata, locations, self._renewing(progress, lease), self._folder.tree
            )
            if self._request.verify:
                extract.verify(result.backup, stored, pgdata, self._request.bin_dir, self._folder.tree)
            extract.rewrite_tablespace_map(pgdata, result.backup.tablespaces, locations)
            self._bring_tail(result)
            recovery_conf.write(
                self._request.configuration,
                pgdata,
                self._settings(result, lease),
                {**result.to_dict(), "started_at": time.time()},
            )
            self._place_control(pgdata)
            self._check_effective(result, lease)
        except BaseException:
            self._put_back(moved_aside, locations, progress, was_there)
            raise
        return Result(result, moved_aside, round(time.monotonic() - started, 3))

    def _renewing(self, progress: _Marker, lease: str) -> Callable[[int], None]:
        """Counts bytes, and renews the lease every minute of a long copy."""

        def add(count: int) -> None:
            progress.add(count)
            if time.monotonic() - self._claimed_at > 60:
                self._claimed_at = time.monotonic()
                with contextlib.suppress(OSError, PitrError):
                    self._folder.touch_lease(lease)

        return add

    def _clear(self) -> str:
        """Remove what a killed restore, or one that nobody wants to keep, has left.

        Returns where the killed one had put the old directory.
        """
        pgdata = self._request.pgdata
        left_behind = self._left_behind(self._folder)
        if left_behind is None:
            if not self._request.keep_unaccepted and _unaccepted(self._request):
                shutil.rmtree(pgdata)
            return ""
        for location in left_behind.get("locations", []):
            _empty(location)
        _remove(pgdata)
        old = str(left_behind.get("moved_aside") or "")
        return old if os.path.isdir(old) else ""

    def _move_aside(self) -> str:
        pgdata = self._request.pgdata
        if not os.path.isdir(pgdata) or not os.listdir(pgdata):
            return ""
        stamp = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%S")
        aside = f"{pgdata}.old-{stamp}"
        while os.path.lexists(aside):
            aside += "x"
        os.rename(pgdata, aside)
        fsync_directory(os.path.dirname(pgdata))
        return aside

    def _put_back(
        self, moved_aside: str, locations: Mapping[int, str], progress: _Marker | None, was_there: bool
    ) -> None:
        """After a failure: remove what this try has written and give the old directory its name back."""
        pgdata = self._request.pgdata
        if progress is not None:
            # A kill from here on leaves a directory that the next try recognises.
            with contextlib.suppress(OSError):
                progress.write()
        with contextlib.suppress(OSError):
            os.unlink(os.path.join(pgdata, extract.PG_CONTROL))
        for location in locations.values():
            # They were empty before (see _check_host), so whatever is in them came from this try.
            _empty(location)
        recovery_conf.discard(self._request.configuration)
        _remove(pgdata)
        if moved_aside:
            os.rename(moved_aside, pgdata)
        elif was_there and not os.path.exists(pgdata):
            os.makedirs(pgdata, mode=0o700)

    def _settings(self, result: RestorePlan, lease: str) -> dict[str, str]:
        """The content of the include file."""
        request = self._request
        fetch = [request.wal_command, "get", f"--system-identifier={result.backup.system_identifier}"]
        if request.identity:
            fetch.append(f"--identity={request.identity}")
        fetch += [f"--lease={lease}", request.cluster]
        settings = {
            **result.target.settings(result.timeline),
            "restore_command": shell_command(fetch, ["%f", "%p"]),
            "hot_standby": "on",
            # Where a recovery is paused or shut down is told by the log alone, and it must be understood.
            "lc_messages": "C",
        }
        if request.archive_after != "same":
            # Receivers keep away (receiver.py), so that nothing of an unaccepted cluster enters the archive; and no
            # commit waits for them.
            settings[ACCEPTED] = "off"
            settings["synchronous_standby_names"] = ""
        if request.archive_after == "off":
            settings["archive_mode"] = "off"
        elif request.archive_after == "none-until-promoted":
            # Segments wait in pg_wal until the cluster is accepted; then nothing is missing, the history file neither.
            settings["archive_mode"] = "on"
            settings["archive_library"] = ""
            settings["archive_command"] = shell_command([request.wal_command, "hold", request.cluster], ["%p"])
        return settings

    def _place_control(self, pgdata: str) -> None:
        """The last step: only now can a server start here."""
        os.rename(os.path.join(pgdata, extract.HELD_BACK), os.path.join(pgdata, extract.PG_CONTROL))
        fsync_directory(os.path.join(pgdata, "global"))
        os.unlink(os.path.join(pgdata, IN_PROGRESS))
        fsync_directory(pgdata)

    def _check_effective(self, result: RestorePlan, lease: str) -> None:
        """Ask the server's own parser what it would use; raise floors that pg_control demands (design rule 7)."""
        request = self._request
        floors = control_data(request.bin_dir, request.pgdata).floors
        raised = {}
        for name, floor in floors.items():
            if int(self._effective(name)) < floor:
                raised[name] = str(floor)
        expected = self._settings(result, lease)
        if raised:
            recovery_conf.write(
                request.configuration,
                request.pgdata,
                {**expected, **raised},
                {**result.to_dict(), "started_at": time.time(), "raised": raised},
            )
        for name in ("restore_command", "recovery_target_timeline", "archive_mode", *raised):
            value = self._effective(name)
            if name in expected and value != expected[name]:
                raise PitrError(
                    f"The recovery's setting of {name} has no effect: the server would use '{value}'. Something in"
                    f" {request.configuration} is read later than {recovery_conf.FILE}. Remove it there."
                )

    def _effective(self, name: str) -> str:
        argv = [binary(self._request.bin_dir, "postgres"), "-D", self._request.configuration, "-C", name]
        try:
            return run(argv).rstrip("\n")
        except PitrError as error:
            raise PitrError(
                f"The configuration in {self._request.configuration} cannot be used: {error.message}"
            ) from None


def _unaccepted(request: Request) -> bool:
    """Whether this is a restored cluster that nobody has accepted: its recovery settings are still there.

    The settings may lie outside the data directory. That they belong to it is told by the backup's label in it.
    """
    planned = recovery_conf.planned(request.configuration)
    if planned is None:
        return False
    for name in ("backup_label", "backup_label.old"):
        with contextlib.suppress(OSError), open(os.path.join(request.pgdata, name), "rb") as stream:
            if f"LABEL: {planned.get('backup')}".encode() in stream.read().splitlines():
                return True
    return False


def _foreign_content(location: str, left_behind: bool) -> bool:
    """Whether a tablespace directory holds something that no restore has put there.

    A server, and so a restore, makes one directory in it (GetTablespaceVersionDirectory).
    """
    names = os.listdir(location)
    return any(not name.startswith("PG_") for name in names) if left_behind else bool(names)


def _empty(location: str) -> None:
    """Remove what a restore has put into a tablespace directory."""
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(location):
            if name.startswith("PG_"):
                shutil.rmtree(os.path.join(location, name), ignore_errors=True)


def _remove(directory: str) -> None:
    """Remove a directory that is not complete, its marker last: a kill in between leaves what the next try knows."""
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(directory):
            path = os.path.join(directory, name)
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path, ignore_errors=True)
            elif name != IN_PROGRESS:
                with contextlib.suppress(OSError):
                    os.unlink(path)
    shutil.rmtree(directory, ignore_errors=True)


def settle(request: Request, moved_aside: str, check: bool = False) -> bool:
    """Remove the directory that a restore has moved aside, once the restored cluster was accepted.

    Returns whether there was one. Raises PitrError when the restored cluster is not accepted, or ``moved_aside`` is not
    what a restore has moved there.
    """
    pgdata = request.pgdata
    if not os.path.lexists(moved_aside):
        return False
    # Recovery settings anywhere are enough here: what is in doubt is not accepted.
    if recovery_conf.planned(request.configuration) or os.path.exists(os.path.join(pgdata, IN_PROGRESS)):
        raise PitrError(f"The restored cluster in {pgdata} is not accepted yet; {moved_aside} stays.")
    if not moved_aside.startswith(f"{pgdata}.old-") or os.path.dirname(moved_aside) != os.path.dirname(pgdata):
        raise PitrError(f"{moved_aside} is not what a restore of {pgdata} has moved aside. It stays.")
    ours = control_data(request.bin_dir, pgdata).system_identifier
    if control_data(request.bin_dir, moved_aside).system_identifier != ours or running_pid(moved_aside) is not None:
        raise PitrError(f"{moved_aside} is another cluster, or a server is running on it. It stays.")
    if not check:
        shutil.rmtree(moved_aside)
        fsync_directory(os.path.dirname(pgdata))
    return True


def undo(request: Request, moved_aside: str, check: bool = False) -> str:
    """Put the directory ``moved_aside`` back in place of a restored cluster that was not accepted.

    Returns where the restored one is kept, or the empty text when it was removed. Raises PitrError when a server is
    running, or when what lies in the way is an accepted cluster or another one.
    """
    pgdata = request.pgdata
    if not os.path.isdir(moved_aside):
        raise PitrError(f"{moved_aside} does not exist, so there is nothing to put back. {pgdata} is as it was.")
    pid = running_pid(pgdata)
    if pid is not None:
        raise PitrError(f"A server is running in {pgdata} (process {pid}). Stop it first; nothing was changed.")
    in_the_way = os.path.isdir(pgdata) and bool(os.listdir(pgdata))
    half_done = os.path.exists(os.path.join(pgdata, IN_PROGRESS))
    ours = control_data(request.bin_dir, moved_aside).system_identifier
    if in_the_way and not half_done:
        if not _unaccepted(request) or control_data(request.bin_dir, pgdata).system_identifier != ours:
            raise PitrError(f"{pgdata} is not a restored cluster that waits to be accepted. It was not touched.")
    kept = ""
    if check:
        return kept
    if request.config_dir:
        recovery_conf.discard(request.config_dir)
    if in_the_way and request.keep_unaccepted:
        kept = moved_aside.replace(".old-", ".failed-") if ".old-" in moved_aside else f"{pgdata}.failed"
        os.rename(pgdata, kept)
    elif os.path.isdir(pgdata):
        shutil.rmtree(pgdata)
    os.rename(moved_aside, pgdata)
    fsync_directory(os.path.dirname(pgdata))
    return kept
