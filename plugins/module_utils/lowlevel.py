# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Base backups with the low-level API: pg_backup_start, a copy of the files made here, pg_backup_stop.

Source: section "Making a Base Backup Using the Low Level API", and do_pg_backup_start and do_pg_backup_stop of xlog.c.
Runs on the database host, as a user that can read the data directory.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import time
from collections.abc import Mapping
from typing import Any

from . import contents, readback
from .backup import BaseBackup, store_history
from .catalog import Tablespace
from .codec import parse
from .errors import PitrError
from .manifest import Manifest, Summary
from .postgres import binary_version, control_data, query
from .repository import ClusterFolder
from .snapshot import Snapshot
from .stored import MANIFEST, parse_tablespace_map
from .tarcopy import Copy, parse_rate
from .wal import Lsn, history_name

_START = re.compile(rb"^START WAL LOCATION: ([0-9A-F]+/[0-9A-F]+) ", re.MULTILINE)
_CHECKPOINT = re.compile(rb"^CHECKPOINT LOCATION: ([0-9A-F]+/[0-9A-F]+)$", re.MULTILINE)
_TIMELINE = re.compile(rb"^START TIMELINE: (\d+)$", re.MULTILINE)
# Seconds between the moment that postmaster.pid tells and pg_postmaster_start_time(): shared memory is made meanwhile.
_STARTING = 120


def escape_location(location: str) -> str:
    """A path in tablespace_map (do_pg_backup_start)."""
    return re.sub(r"([\n\r\\])", r"\\\1", location)


def read_control(bin_dir: str, pgdata: str, seconds: float = 5) -> bytes:
    """pg_control as it is, read again until its checksum is right: a server may be writing it.

    Raises PitrError when that does not come true within so many seconds.
    """
    deadline = time.monotonic() + seconds
    while True:
        with open(os.path.join(pgdata, contents.PG_CONTROL), "rb") as stream:
            data = stream.read()
        with tempfile.TemporaryDirectory(prefix="pitr-control-") as directory:
            os.mkdir(os.path.join(directory, "global"))
            with open(os.path.join(directory, contents.PG_CONTROL), "wb") as copy:
                copy.write(data)
            try:
                control_data(bin_dir, directory)
                return data
            except PitrError as error:
                if time.monotonic() > deadline:
                    raise PitrError(f"{pgdata}/{contents.PG_CONTROL}: {error.message}") from None
        time.sleep(0.05)


def check_readable(pgdata: str) -> None:
    """Refuse a data directory that is not here or cannot be read. Raises PitrError."""
    try:
        for name in ("PG_VERSION", contents.PG_CONTROL):
            with open(os.path.join(pgdata, name), "rb"):
                pass
        os.listdir(os.path.join(pgdata, "base"))
    except OSError as error:
        raise PitrError(
            f"{error.filename}: {error.strerror}. This method copies the files itself: run it on the database host, as"
            " the owner of the data directory. No backup was taken."
        ) from None


class LowLevelBackup(BaseBackup):
    """One base backup whose files are copied here, from the data directory or from a snapshot of it."""

    method = "low_level"

    def __init__(self, *arguments: Any, pgdata: str = "", snapshot: Snapshot | None = None, **options: Any) -> None:
        """``pgdata``: by default what the server says. Everything else as for BaseBackup."""
        super().__init__(*arguments, **options)
        self._pgdata = pgdata
        self._snapshot = snapshot
        self._found: tuple[Tablespace, ...] = ()

    def check(self, connection: Any) -> dict[str, Any]:
        """As for BaseBackup, and whether these are the server's files and can be read."""
        facts = super().check(connection)
        parse_rate(self._max_rate)
        parse(self._compression)
        row = query(
            connection,
            "SELECT has_function_privilege('pg_backup_start(text, boolean)', 'EXECUTE')"
            " AND has_function_privilege('pg_backup_stop(boolean)', 'EXECUTE'),"
            " (SELECT setting FROM pg_settings WHERE name = 'data_directory'),"
            " current_setting('port'), extract(epoch FROM pg_postmaster_start_time())::bigint, pg_backend_pid()",
        )[0]
        allowed, directory, port, started, backend = row
        if not allowed:
            raise PitrError(
                f"{self._login} may not call pg_backup_start and pg_backup_stop. GRANT EXECUTE ON FUNCTION"
                " pg_backup_start, pg_backup_stop TO the role; no backup was taken."
            )
        self._pgdata = self._pgdata or directory or ""
        if not self._pgdata:
            raise PitrError(
                f"{self._login} may not see data_directory. Give pgdata, or GRANT pg_read_all_settings TO the role; no"
                " backup was taken."
            )
        check_readable(self._pgdata)
        if binary_version(self._bin_dir) != facts["version"]:
            raise PitrError(f"{self._bin_dir} is another major version than the server, {facts['version']}.")
        identifier = control_data(self._bin_dir, self._pgdata).system_identifier
        if identifier != facts["system_identifier"] or not self._is_servers(str(port), int(started), int(backend)):
            raise PitrError(
                f"{self._pgdata} is not the data directory of {self._login}: it is another cluster's, or of another"
                " server of the same cluster. Run this on the host of that server, with its pgdata. No backup was"
                " taken."
            )
        if self._snapshot is not None:
            self._snapshot.check(contents.tablespaces(self._pgdata))
        return facts

    def _is_servers(self, port: str, started: int, backend: int) -> bool:
        """Whether the server that we talk to runs in this directory, by its postmaster.pid (pidfile.h).

        A standby on the same host has the same system identifier, and may have the same port on another address. Where
        the server's processes can be seen, ours is a child of the one that works in this directory.
        """
        with contextlib.suppress(OSError, ValueError, IndexError):
            with open(os.path.join(self._pgdata, "postmaster.pid"), encoding="utf-8", errors="replace") as stream:
                lines = stream.read().split("\n")
            if lines[3].strip() != port or abs(int(lines[2]) - started) > _STARTING:
                return False
            with contextlib.suppress(OSError):
                if os.path.samefile(f"/proc/{lines[0]}/cwd", self._pgdata):
                    with open(f"/proc/{backend}/stat", encoding="ascii", errors="replace") as stat:
                        return stat.read().rpartition(")")[2].split()[1] == lines[0]
            return True
        return False

    def _compressed_with(self, facts: dict[str, Any]) -> str:
        return parse(self._compression)[0]

    def _copy(self, connection: Any, target: str, label: str, facts: dict[str, Any], lock: int) -> None:
        with contextlib.ExitStack() as stack:
            # The server ends the backup when the session that began it ends, however that comes.
            session = stack.enter_context(contextlib.closing(self._login.connect(application_name=f"pgdrill {label}")))
            self._begin_backup(session, label)
            manifest = stack.enter_context(
                Manifest(os.path.join(target, MANIFEST), facts["version"], facts["system_identifier"])
            )
            if self._snapshot is not None:
                stack.callback(self._remove_snapshot)
                self._snapshot.take()
                control = read_control(self._bin_dir, self._pgdata)
                stopped = self._stop_backup(session, facts)
                frozen = control_data(self._bin_dir, self._snapshot.path)
                self._check_age(frozen.checkpoint_lsn, stopped[1], self._snapshot.path)
                with Copy(target, self._compression, manifest, self._max_rate) as copy:
                    places = contents.tablespaces(self._snapshot.path)
                    self._copy_files(copy, self._snapshot.path, places, self._snapshot.tablespaces)
                    self._complete(copy, control, stopped, places)
            else:
                with Copy(target, self._compression, manifest, self._max_rate) as copy:
                    places = contents.tablespaces(self._pgdata)
                    self._copy_files(copy, self._pgdata, places, {})
                    # After everything else: on a standby it tells how far a recovery has to come at least.
                    control = read_control(self._bin_dir, self._pgdata)
                    stopped = self._stop_backup(session, facts)
                    self._complete(copy, control, stopped, places)
            lsn, backup_label, _map = stopped
            start, timeline = _START.search(backup_label), _TIMELINE.search(backup_label)
            if start is None or timeline is None:
                raise PitrError(f"{self._login} has made a backup_label that cannot be read: {backup_label!r}.")
            manifest.finish(int(timeline.group(1)), Lsn.parse(start.group(1).decode()), lsn)
        if copy.passed_over:
            self.warnings.append(
                "No backup holds what is neither a file nor a directory; these were passed over: "
                + ", ".join(copy.passed_over[:10])
            )

    def _remove_snapshot(self) -> None:
        said = self._snapshot.remove() if self._snapshot is not None else ""
        if said:
            self.warnings.append(said)

    def _begin_backup(self, session: Any, label: str) -> None:
        # Nothing may end the session but us, and paths come as the bytes that they are.
        for setting in ("statement_timeout", "idle_session_timeout", "lock_timeout"):
            query(session, f"SET {setting} = 0")
        query(session, "SET client_encoding = 'SQL_ASCII'")
        query(session, "SELECT pg_backup_start(label => %s, fast => %s)", (label, self._checkpoint == "fast"))

    def _stop_backup(self, session: Any, facts: dict[str, Any]) -> tuple[Lsn, bytes, bytes]:
        """Stop position, backup_label and tablespace_map. The archive is waited for later, and in the repository."""
        row = query(
            session,
            "SELECT lsn::text, textsend(labelfile), textsend(coalesce(spcmapfile, ''))"
            " FROM pg_backup_stop(wait_for_archive => false)",
        )[0]
        stopped = Lsn.parse(row[0]), bytes(row[1]), bytes(row[2])
        if facts["standby"]:
            timeline = _TIMELINE.search(stopped[1])
            now = query(session, "SELECT min_recovery_end_timeline FROM pg_control_recovery()")[0][0]
            if timeline is None or int(timeline.group(1)) != now:
                raise PitrError(
                    f"{self._login} has gone to timeline {now} since its last restartpoint. The backup was removed"
                    " again. Run CHECKPOINT on the primary and take another."
                )
        live = control_data(self._bin_dir, self._pgdata)
        self._check_age(live.checkpoint_lsn, stopped[1], self._pgdata)
        return stopped

    def _check_age(self, checkpoint: Lsn, backup_label: bytes, place: str) -> None:
        """Files that were copied after pg_backup_start know its checkpoint; older ones would be a damaged cluster."""
        match = _CHECKPOINT.search(backup_label)
        if match is None or checkpoint < Lsn.parse(match.group(1).decode()):
            raise PitrError(
                f"{place} is older than the start of the backup: its last checkpoint is at {checkpoint}. The backup was"
                " removed again."
            )

    def _copy_files(self, copy: Copy, root: str, places: Mapping[int, str], elsewhere: Mapping[str, str]) -> None:
        """Tablespaces, and then the data directory. ``elsewhere``: where the frozen copy of a tablespace is."""
        for oid, location in sorted(places.items()):
            if elsewhere and location not in elsewhere:
                raise PitrError(f"The snapshot has a tablespace in {location} that snapshot_tablespaces does not tell.")
            copy.tablespace(oid, elsewhere.get(location, location))
        # One that somebody has put into the data directory is not copied twice.
        inside = [os.path.relpath(os.path.realpath(path), os.path.realpath(root)) for path in places.values()]
        copy.base(root, skip=[path for path in inside if not path.startswith("..")])

    def _complete(
        self, copy: Copy, control: bytes, stopped: tuple[Lsn, bytes, bytes], places: Mapping[int, str]
    ) -> None:
        """What is known only at the end."""
        _lsn, backup_label, spcmap = stopped
        text = spcmap.decode("utf-8", "surrogateescape")
        told = {item.oid for item in parse_tablespace_map(text)}
        for oid in sorted(told - set(places)):
            # Gone between the start and our look: WAL drops it.
            copy.tablespace(oid, os.path.join(self._pgdata, contents.PG_TBLSPC, str(oid)))
        for oid in sorted(set(places) - told):
            # Made between the start and our look: WAL makes it once more.
            text += f"{oid} {escape_location(places[oid])}\n"
        self._found = parse_tablespace_map(text)
        copy.add("backup_label", backup_label)
        if text:
            copy.add("tablespace_map", text.encode("utf-8", "surrogateescape"))
        copy.finish(control)

    def _check_content(self, directory: str, names: list[str], summary: Summary) -> str:
        readback.check(directory, names)
        return "checksums"

    def _tablespaces(self, base_tar: str) -> tuple[Tablespace, ...]:
        return self._found

    def _patience(self, facts: dict[str, Any]) -> float:
        return self._archive_timeout

    def _unarchived(self, connection: Any, missing: str, facts: dict[str, Any]) -> str:
        if facts["standby"]:
            return super()._unarchived(connection, missing, facts)
        sql = "SELECT last_failed_wal, last_failed_time, failed_count, last_archived_wal FROM pg_stat_archiver"
        row = query(connection, sql)[0]
        return (
            f"The files are copied, but {missing} has not come to {self._folder.archive_path()} within"
            f" {self._archive_timeout:g} seconds. {self._login} has archived {row[3]} last, somewhere; last failure:"
            f" {row[0]} at {row[1]}, {row[2]} failures in all. The server's log has archive_command's words."
        )

    def _keep_history(self, timeline: int) -> None:
        keep_history(self._folder, self._pgdata, timeline)


def keep_history(folder: ClusterFolder, pgdata: str, timeline: int) -> None:
    """Get the history file of a timeline from pg_wal into the archive, where it is not there. Raises PitrError."""
    name = history_name(timeline)
    if timeline == 1 or os.path.exists(os.path.join(folder.archive_path(), name)):
        return
    try:
        with open(os.path.join(pgdata, contents.PG_WAL, name), "rb") as stream:
            data = stream.read()
    except FileNotFoundError:
        raise PitrError(
            f"Neither {folder.archive_path()} nor {pgdata}/{contents.PG_WAL} has {name}, and nothing on timeline"
            f" {timeline} can be restored without it. The backup was removed again."
        ) from None
    store_history(folder, timeline, data)
