# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Taking base backups over the replication protocol.

A backup is written into a hidden directory beside its final place and becomes visible by one rename, after its WAL
has been seen in this repository's archive. pg_basebackup does the copying. Other ways to copy are lowlevel.py and
offline.py, which do the rest as it is done here.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from . import codec, encryption, locks
from .catalog import Backup, StoredFile, Tablespace
from .errors import PitrError
from .facts import Facts, gather
from .following import Follower, count_stored
from .manifest import Summary, read_summary
from .postgres import Login, binary, binary_version, query, run
from .repository import (
    BACKUP_FILE,
    ClusterFolder,
    write_atomic,
    write_json,
)
from .stored import MANIFEST, parse_tablespace_map, sha256
from .timeline import parse_history
from .tree import fsync_directory, make_directory, temporary_name
from .wal import Lsn, WalFile, history_name, segment_name

if TYPE_CHECKING:
    from .incremental import Basis

# From this version on pg_verifybackup reads tars.
_VERIFIES_TAR = 18
# What the server says when it cannot tell what has changed (basebackup_incremental.c, walsummarizer.c).
_NO_SUMMARIES = ("WAL summaries are required", "WAL summarization is not progressing", "unless WAL summarization is")


class BasisError(PitrError):
    """No incremental backup can be taken now; a full one can. The message is a reason, and says no more."""


class BaseBackup:
    """One base backup, from the first question to the server to the rename that makes it visible.

    ``warnings``, after :meth:`take`: what the operator should know of a backup that is good all the same.
    """

    method = "stream"

    def __init__(
        self,
        folder: ClusterFolder,
        login: Login,
        bin_dir: str,
        compression: str = "auto",
        checkpoint: str = "fast",
        max_rate: str = "",
        verify: bool = True,
        label: str = "",
        archive_timeout: float = 600,
        basis: Basis | None = None,
    ) -> None:
        """``archive_timeout``: seconds to wait for the backup's WAL in the archive.

        ``max_rate`` as pg_basebackup takes it. ``basis``: what it may build upon; without one it is full. After
        ``check`` and ``take``, ``parent`` is the backup that was chosen, and ``reason`` why.
        """
        self._folder = folder
        self._login = login
        self._bin_dir = bin_dir
        self._compression = compression
        self._checkpoint = checkpoint
        self._max_rate = max_rate
        self._verify = verify
        self._label = label
        self._archive_timeout = archive_timeout
        self._basis = basis
        self.parent: Backup | None = None
        self.reason = ""
        self.warnings: list[str] = []
        # Tars that were read back while they were written: number and bytes of their files.
        self._counts: dict[str, tuple[int, int]] = {}

    def check(self, connection: Any) -> dict[str, Any]:
        """Everything that can be refused before the copy begins. Returns facts of the server."""
        row = query(
            connection,
            "SELECT (SELECT system_identifier::text FROM pg_control_system()),"
            " current_setting('server_version_num')::int / 10000, current_setting('archive_mode'),"
            " (SELECT setting::bigint FROM pg_settings WHERE name = 'wal_segment_size'),"
            " (SELECT enumvals FROM pg_settings WHERE name = 'wal_compression'), pg_is_in_recovery(),"
            " clock_timestamp(), current_setting('summarize_wal', true)",
        )[0]
        names = ["system_identifier", "version", "archive_mode", "wal_segment_size", "compressions", "standby", "now"]
        facts = dict(zip([*names, "summarize_wal"], row))
        self._check_folder(str(self._login), facts["system_identifier"])
        if facts["archive_mode"] == "off" and not facts["standby"]:
            raise PitrError(
                f"{self._login} has archive_mode = off. A base backup without archived WAL cannot be restored;"
                " set up archiving first (role pgdrill.pitr.primary). No backup was taken."
            )
        version = binary_version(self._bin_dir)
        if version < facts["version"]:
            raise PitrError(
                f"{self._bin_dir} is PostgreSQL {version}, the server {facts['version']}. Use its own programs."
            )
        if self._basis is not None:
            choice = self._basis.choose(connection, facts)
            self.parent, self.reason = choice.parent, choice.reason
        return facts

    def _check_folder(self, whose: str, system_identifier: str) -> None:
        """May a backup of this cluster and of this label be stored here?"""
        if self._folder.recipients:
            encryption.encrypt_argv(self._folder.recipients)
        if self._folder.require(system_identifier) is not self._folder.chapter:
            raise PitrError(f"{whose} is the cluster of an older chapter of {self._folder.path}; nothing was written.")
        if self._label and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", self._label):
            raise PitrError(f"'{self._label}' cannot be a label: use letters, digits, dots, dashes and underscores.")
        if self._label and os.path.exists(os.path.join(self._folder.backups_path, self._label)):
            raise PitrError(f"There is a backup '{self._label}' already. No backup was taken.")

    def take(self) -> Backup:
        """Take the backup. Raises PitrError; then no backup is visible and the hidden directory is gone."""
        with contextlib.closing(self._login.connect()) as connection:
            facts = self.check(connection)
            try:
                return self._take(connection, facts)
            except BasisError as error:
                if self._basis is None or not self._basis.may_be_full:
                    raise PitrError(f"{error.message} No backup was taken.") from None
                self.parent, self.reason = None, error.message
                return self._take(connection, facts)

    def dry_run(self) -> None:
        """Ask everything, and take none. Raises PitrError as :meth:`take` would before the copy."""
        with contextlib.closing(self._login.connect()) as connection:
            self.check(connection)

    def _take(self, connection: Any, facts: dict[str, Any]) -> Backup:
        """``connection`` is None where there is no server."""
        started_at: datetime.datetime = facts["now"]
        if self._folder.recipients:
            sweep(self._folder)
        with contextlib.ExitStack() as stack:
            if self.parent is not None and self._basis is not None:
                stack.enter_context(self._basis.parent_held(self.parent))
            label, partial, lock = self._claim(started_at)
            final = os.path.join(self._folder.backups_path, label)
            try:
                # The backup will need WAL from here on; an expire must leave it.
                stack.enter_context(locks.taking(self._folder, label, *self._begin(connection, facts)))
                self._copy(connection, partial, label, facts, lock)
                if connection is not None:
                    facts["told"] = gather(connection)
                stopped_at, next_xid = self._end(connection, facts)
                backup = self._describe(partial, label, facts, started_at, stopped_at, next_xid, lock)
                self._await_wal(connection, backup, facts)
                self._keep_history(backup.timeline)
                write_json(os.path.join(partial, BACKUP_FILE), backup.to_dict())
                os.rename(partial, final)
                fsync_directory(self._folder.backups_path)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
            finally:
                os.close(lock)
        return backup

    def _begin(self, connection: Any, facts: dict[str, Any]) -> tuple[int, Lsn]:
        """Timeline and position from which on the backup will need WAL.

        On a standby a backup begins with its last restartpoint, which may be long ago (do_pg_backup_start).
        """
        position = "redo_lsn" if facts["standby"] else "pg_current_wal_lsn()"
        row = query(connection, f"SELECT timeline_id, {position}::text FROM pg_control_checkpoint()")[0]
        return int(row[0]), Lsn.parse(row[1])

    def _end(self, connection: Any, facts: dict[str, Any]) -> tuple[datetime.datetime, int]:
        """When it ended, not before its last WAL was written, and the first transaction that cannot be in it.

        A standby's clock may be behind that of the primary, whose commits carry the primary's time.
        """
        now = (
            "greatest(clock_timestamp(), pg_last_xact_replay_timestamp())" if facts["standby"] else "clock_timestamp()"
        )
        stopped_at, next_xid = query(
            connection, f"SELECT {now}, pg_snapshot_xmax(pg_current_snapshot())::text::bigint"
        )[0]
        return stopped_at, next_xid

    def _claim(self, started_at: datetime.datetime) -> tuple[str, str, int]:
        """A label that is nobody else's, its hidden directory, and the lock that makes it ours.

        The lock is shared with pg_basebackup, which outlives a kill of this process. What is there without a lock was
        left behind, and is replaced.
        """
        suffix = "full" if self.parent is None else "incr"
        base = self._label or started_at.astimezone(datetime.timezone.utc).strftime(f"%Y%m%dT%H%M%SZ-{suffix}")
        label = base
        while True:
            partial = os.path.join(self._folder.backups_path, f".{label}.partial")
            lock = _lock(partial)
            if lock is not None and not os.path.exists(os.path.join(self._folder.backups_path, label)):
                return label, partial, lock
            if lock is not None:
                shutil.rmtree(partial, ignore_errors=True)
                os.close(lock)
            if self._label:
                raise PitrError(f"A backup '{label}' is being taken, or was just now. No other was taken.")
            label = f"{base}-{os.urandom(2).hex()}"

    def _compressed_with(self, facts: dict[str, Any]) -> str:
        """Name of the compression."""
        return self._zip(facts).partition(":")[0].replace("server-", "")

    def _zip(self, facts: dict[str, Any]) -> str:
        """The -Z option: compression on the server, which also saves the network."""
        name, _colon, level = self._compression.partition(":")
        if name == "auto":
            # The server's gzip takes five times the processor time of the other two.
            usable = [one for one in ("zstd", "lz4") if one in (facts["compressions"] or "") and codec.which(one)]
            name = usable[0] if usable else "gzip"
        if name == "none":
            return "none"
        detail = f"level={level or 1}"
        if name == "zstd":
            detail += f",workers={min(4, os.cpu_count() or 1)}"
        return f"server-{name}:{detail}"

    def _copy(self, connection: Any, target: str, label: str, facts: dict[str, Any], lock: int) -> None:
        argv = [binary(self._bin_dir, "pg_basebackup"), "-D", target, "-F", "tar", "-X", "none", "--no-password"]
        argv += ["-c", self._checkpoint, "-l", label, "-Z", self._zip(facts)]
        if self._max_rate:
            argv += ["-r", self._max_rate]
        application = f"pgdrill {label}"[:63]
        with contextlib.ExitStack() as stack:
            environment = stack.enter_context(self._login.environment())
            complaints = stack.enter_context(tempfile.TemporaryFile())
            shared = [lock]
            if self.parent is not None and self._basis is not None:
                manifest = stack.enter_context(self._basis.manifest(self.parent))
                argv.append(f"--incremental=/dev/fd/{manifest}")
                shared.append(manifest)
            environment["PGAPPNAME"] = application
            follower = None
            if self._verify and binary_version(self._bin_dir) < _VERIFIES_TAR:
                follower = Follower(target)
                stack.callback(follower.finish)
            process = subprocess.Popen(
                argv,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=complaints,
                pass_fds=shared,
            )
            try:
                self._watch(connection, process, application)
            except BaseException:
                process.terminate()
                process.wait()
                raise
            complaints.seek(0)
            said = complaints.read(4000).decode(errors="replace").strip()
            if follower is not None:
                self._counts = follower.finish()
        if process.returncode != 0:
            if self.parent is not None and any(words in said for words in _NO_SUMMARIES):
                raise BasisError(
                    f"The WAL summaries of {self._login} are not enough to build upon {self.parent.label}, which began"
                    f" at LSN {self.parent.start_lsn}; a full backup needs none: {_server_words(said)}"
                )
            raise PitrError(f"pg_basebackup from {self._login} failed: {said}")

    def _watch(self, connection: Any, process: subprocess.Popen[bytes], application: str) -> None:
        """Wait for pg_basebackup, but not for an archiver that is stuck: the server would wait for ever."""
        pause = 0.02
        waiting_since = 0.0
        while True:
            try:
                process.wait(timeout=pause)
                return
            except subprocess.TimeoutExpired:
                pause = min(pause * 1.5, 1.0)
            phase = query(
                connection,
                "SELECT p.phase FROM pg_stat_progress_basebackup p JOIN pg_stat_activity a USING (pid)"
                " WHERE a.application_name = %s",
                (application,),
            )
            if not phase or phase[0][0] != "waiting for wal archiving to finish":
                waiting_since = 0.0
                continue
            now = time.monotonic()
            waiting_since = waiting_since or now
            if now - waiting_since > self._archive_timeout:
                row = query(connection, "SELECT last_failed_wal, last_failed_time, failed_count FROM pg_stat_archiver")[
                    0
                ]
                raise PitrError(
                    f"The files are copied, but {self._login} has not archived the backup's WAL within"
                    f" {self._archive_timeout:g} seconds. Last failure: {row[0]} at {row[1]}, {row[2]} failures in all;"
                    " the server's log has archive_command's words. The backup was removed again."
                )

    def _describe(
        self,
        directory: str,
        label: str,
        facts: dict[str, Any],
        started_at: datetime.datetime,
        stopped_at: datetime.datetime,
        next_xid: int,
        lock: int,
    ) -> Backup:
        summary = read_summary(os.path.join(directory, MANIFEST))
        if len(summary.timelines) > 1:
            # It has no place in a catalog of one timeline each.
            raise PitrError(
                f"{self._login} has gone from timeline {summary.timelines[0]} to {summary.timelines[-1]} since its last"
                " restartpoint. The backup was removed again. Run CHECKPOINT on the primary and take another."
            )
        told: Facts | None = facts.get("told")
        names = sorted(os.listdir(directory))
        base = [name for name in names if name.startswith("base.tar")]
        if len(base) != 1:
            raise PitrError(f"pg_basebackup left no base.tar in {directory}.")
        verified = "no"
        if self._verify:
            verified = self._check_content(directory, names, summary)
        tablespaces = self._tablespaces(os.path.join(directory, base[0]))
        restored = changed = 0
        if self.parent is not None and self._basis is not None:
            tars = [os.path.join(directory, name) for name in names if name != MANIFEST]
            restored, changed = self._basis.combined_bytes(tars)
        recipients = self._folder.recipients
        if recipients:
            names = [_encrypt(directory, name, recipients, lock) for name in names]
        return Backup(
            label=label,
            type="full" if self.parent is None else "incremental",
            system_identifier=facts["system_identifier"],
            postgresql_version=facts["version"],
            wal_segment_size=facts["wal_segment_size"],
            timeline=summary.timelines[-1],
            start_lsn=summary.start_lsn,
            stop_lsn=summary.stop_lsn,
            started_at=started_at.astimezone(datetime.timezone.utc),
            stopped_at=stopped_at.astimezone(datetime.timezone.utc),
            database_bytes=summary.bytes,
            compression=self._compressed_with(facts),
            verified=verified,
            files=tuple(
                StoredFile(name, os.stat(path).st_size, sha256(path))
                for name, path in ((name, os.path.join(directory, name)) for name in names)
            ),
            tablespaces=tablespaces,
            next_xid=next_xid,
            encryption=encryption.recipients_id(recipients),
            parent=self.parent.label if self.parent is not None else None,
            restored_bytes=restored,
            changed_bytes=changed,
            method=self.method,
            own_wal=self._own_wal(),
            facts=replace(told, tablespace_bytes=summary.tablespace_bytes) if told is not None else None,
        )

    def _own_wal(self) -> tuple[str, ...]:
        """Names of the segments that are in the backup itself."""
        return ()

    def _tablespaces(self, base_tar: str) -> tuple[Tablespace, ...]:
        return _tablespaces(base_tar)

    def _check_content(self, directory: str, names: list[str], summary: Summary) -> str:
        """Read the backup back. Returns ``checksums`` or ``sizes``, the level that was reached.

        pg_verifybackup reads tar files from PostgreSQL 18; before, the walk proves the compression's checksum, the tar
        structure, and that number and size of the files are the manifest's. A restore checks every file in any case.
        """
        if binary_version(self._bin_dir) >= _VERIFIES_TAR:
            run([binary(self._bin_dir, "pg_verifybackup"), "--no-parse-wal", "--quiet", directory])
            return "checksums"
        found = found_bytes = 0
        for name in names:
            if not name.endswith(MANIFEST):
                files, size = self._counts.get(name) or count_stored(os.path.join(directory, name))
                found += files
                found_bytes += size
        if (found, found_bytes) != (summary.files, summary.bytes):
            raise PitrError(
                f"The backup has {found} files with {found_bytes} bytes, the manifest {summary.files} with"
                f" {summary.bytes}."
                " The backup was removed again."
            )
        return "sizes"

    def _await_wal(self, connection: Any, backup: Backup, facts: dict[str, Any]) -> None:
        """See that the backup's WAL is archived *here*, whatever the server says."""
        size = backup.wal_segment_size
        numbers = range(backup.start_lsn.segment_number(size), backup.stop_lsn.previous_segment_number(size) + 1)
        missing = [segment_name(backup.timeline, number, size) for number in numbers]
        missing = [name for name in missing if name not in backup.own_wal]
        deadline = time.monotonic() + self._patience(facts)
        while True:
            # What was seen stays: nothing of a backup that is being taken is removed.
            missing = [name for name in missing if not self._is_archived(name)]
            if not missing:
                return
            if time.monotonic() > deadline:
                named = ", ".join(missing[:5]) + (" and more" if missing[5:] else "")
                raise PitrError(f"{self._unarchived(connection, named, facts)} The backup was removed again.")
            time.sleep(0.2)

    def _patience(self, facts: dict[str, Any]) -> float:
        """Seconds to wait for WAL: a primary has said that it is archived, a standby leaves that to its primary."""
        return self._archive_timeout if facts["standby"] else min(self._archive_timeout, 30)

    def _unarchived(self, connection: Any, missing: str, facts: dict[str, Any]) -> str:
        """Why the backup is refused when these segments have not come."""
        place = self._folder.archive_path()
        if facts["standby"]:
            return (
                f"{self._login} is a standby, and {missing} has not come to {place} within {self._archive_timeout:g}"
                " seconds. Its primary archives that, once the segment is full: run pg_switch_wal() on the primary"
                " while the backup waits, or set archive_timeout there below this module's."
            )
        return (
            f"{self._login} says that the backup's WAL is archived, but {missing} is not in {place}. It archives"
            " somewhere else."
        )

    def _is_archived(self, name: str) -> bool:
        return self._folder.tree.exists(self._folder.wal_path(WalFile.parse(name)))

    def _keep_history(self, timeline: int) -> None:
        """Get the history file of the backup's timeline into the archive.

        It is not there when the server came to its timeline before it archived here, and nothing could be restored
        without it. The replication protocol hands it out (TIMELINE_HISTORY).
        """
        if timeline == 1 or os.path.exists(os.path.join(self._folder.archive_path(), history_name(timeline))):
            return
        with contextlib.closing(self._login.connect(replication=True)) as connection:
            content = query(connection, f"TIMELINE_HISTORY {int(timeline)}")[0][1]
        store_history(self._folder, timeline, content.encode() if isinstance(content, str) else bytes(content))


def store_history(folder: ClusterFolder, timeline: int, data: bytes) -> None:
    """Put a history file into the archive; one that is there is never replaced. Raises PitrError when it is none."""
    parse_history(timeline, data.decode(errors="replace"))
    stored = os.path.join(folder.archive_path(), history_name(timeline))
    temporary = temporary_name(stored)
    write_atomic(temporary, data)
    # The archiver may have brought it meanwhile.
    with contextlib.suppress(FileExistsError):
        os.link(temporary, stored)
    os.unlink(temporary)
    fsync_directory(os.path.dirname(stored))


def _server_words(said: str) -> str:
    """What the server said, on one line, without what pg_basebackup says around it."""
    lines = said.partition("ERROR:  ")[2].split("\n")
    return ". ".join(line.partition(":  ")[2] or line for line in lines if "pg_basebackup: " not in line)


def _lock(directory: str) -> int | None:
    """Create a directory and lock it, or empty one that nobody holds a lock of. None when somebody does.

    Returns a descriptor; the lock lasts until every process that has it has closed it (flock(2)).
    """
    created = make_directory(directory)
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        # A filesystem without locks: only a directory that we have made is ours.
        if created:
            return descriptor
        os.close(descriptor)
        return None
    try:
        if not os.path.samestat(os.fstat(descriptor), os.stat(directory)):
            raise FileNotFoundError
    except FileNotFoundError:
        # Its owner has removed or renamed it between the two calls.
        os.close(descriptor)
        return None
    for name in os.listdir(directory):
        os.unlink(os.path.join(directory, name))
    return descriptor


def sweep(folder: ClusterFolder) -> list[str]:
    """Remove what backups that were killed have left, and return it: it is not encrypted. Nobody holds a lock of it."""
    removed = []
    for name in sorted(os.listdir(folder.backups_path)):
        path = os.path.join(folder.backups_path, name)
        if not (name.startswith(".") and name.endswith(".partial")):
            continue
        try:
            held = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            # It has just been finished, or is not a directory of ours.
            continue
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(held), os.stat(path)):
                shutil.rmtree(path)
                removed.append(path)
        except (BlockingIOError, FileNotFoundError):
            pass
        finally:
            os.close(held)
    return removed


def _encrypt(directory: str, name: str, recipients: Sequence[str], lock: int) -> str:
    """Put an encrypted file in place of a plain one; returns its name. The lock is shared as with pg_basebackup."""
    plain = os.path.join(directory, name)
    with open(plain, "rb") as source, open(plain + encryption.SUFFIX, "xb") as target:
        done = subprocess.run(
            encryption.encrypt_argv(recipients),
            stdin=source,
            stdout=target,
            stderr=subprocess.PIPE,
            pass_fds=(lock,),
            check=False,
        )
        if done.returncode != 0:
            said = done.stderr.decode(errors="replace").strip()
            raise PitrError(f"age could not encrypt {name}: {said} The backup was removed again.")
        os.fsync(target.fileno())
    os.unlink(plain)
    return name + encryption.SUFFIX


def _tablespaces(base_tar: str) -> tuple[Tablespace, ...]:
    """From tablespace_map, which pg_basebackup puts at the beginning of base.tar, right after backup_label."""
    try:
        with codec.open_reader(base_tar) as reader:
            with tarfile.open(fileobj=reader, mode="r|", bufsize=codec.CHUNK) as tar:  # type: ignore[call-overload]
                for position, member in enumerate(tar):
                    if member.name == "tablespace_map":
                        stream = tar.extractfile(member)
                        text = stream.read() if stream else b""
                        return parse_tablespace_map(text.decode("utf-8", "surrogateescape"))
                    if position > 3:
                        break
    except tarfile.TarError as error:
        raise PitrError(f"{base_tar} is damaged: {error}.", path=base_tar) from None
    return ()
