# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Base backups of a server that is shut down.

There is no backup_label: without an end-of-backup record in WAL a server would never take such a copy for consistent
(``backupStartPoint`` of xlogrecovery.c). It begins with the shutdown checkpoint that pg_control tells, and enters
archive recovery at once because pg_control says "shut down" (InitWalRecovery). That checkpoint lies in a segment which
the server has not archived: with archiving it switches before it (ShutdownXLOG). So the backup has that segment in it.
"""

from __future__ import annotations

import datetime
import os
import re
from typing import Any

from . import contents, readback
from .backup import BaseBackup
from .catalog import Backup, Tablespace
from .codec import parse
from .errors import PitrError
from .lowlevel import check_readable, escape_location, keep_history
from .manifest import Manifest, Summary
from .postgres import ControlData, binary, binary_version, control_data, data_version, run, running_pid
from .repository import archived_logs
from .stored import MANIFEST
from .tarcopy import Copy, parse_rate
from .wal import Lsn, history_name, segment_name

SHUT_DOWN = "shut down"
# The server makes nothing of a file of this name; unfinished.py tells by it which backup a directory came from.
LABEL_FILE = "backup_label.old"
_LENGTH = re.compile(r"^rmgr: XLOG\s+len \(rec/tot\):\s*\d+/\s*(\d+),.* desc: CHECKPOINT_SHUTDOWN\b", re.MULTILINE)
_ALIGNMENT = 8
_SHORT_HEADER = 24
# Bytes that a checkpoint's record certainly does not have.
_NEAR = 8192
_LONG_HEADER = 40


def record_end(start: Lsn, length: int, block: int, segment: int) -> Lsn:
    """Where a record ends that begins at ``start`` and is ``length`` bytes long.

    Each further page that it lies on begins with a header (xlog_internal.h). ``block``: size of a page of WAL.
    """
    left = -(-length // _ALIGNMENT) * _ALIGNMENT
    position = int(start)
    while True:
        room = block - position % block
        if left <= room:
            return Lsn(position + left)
        left -= room
        position += room
        position += _LONG_HEADER if position % segment == 0 else _SHORT_HEADER


def label_file(control: ControlData, label: str, started_at: datetime.datetime) -> str:
    """What a backup_label would say, for people and for :data:`LABEL_FILE`."""
    lsn = control.checkpoint_lsn
    name = segment_name(control.timeline, lsn.segment_number(control.wal_segment_size), control.wal_segment_size)
    return (
        f"START WAL LOCATION: {lsn} (file {name})\nCHECKPOINT LOCATION: {lsn}\nBACKUP METHOD: offline\n"
        f"BACKUP FROM: primary\nSTART TIME: {started_at:%Y-%m-%d %H:%M:%S UTC}\nLABEL: {label}\n"
        f"START TIMELINE: {control.timeline}\n"
    )


class OfflineBackup(BaseBackup):
    """One base backup of a data directory on which no server runs."""

    method = "offline"

    def __init__(self, *arguments: Any, pgdata: str, **options: Any) -> None:
        """``pgdata``: the data directory. Everything else as for BaseBackup; the login is not used."""
        super().__init__(*arguments, **options)
        self._pgdata = pgdata
        self._found: tuple[Tablespace, ...] = ()
        self._wal: tuple[str, ...] = ()

    def take(self) -> Backup:
        """Take the backup. Raises PitrError; then no backup is visible and the hidden directory is gone."""
        return self._take(None, self.check(None))

    def dry_run(self) -> None:
        """Ask everything, and take none."""
        self.check(None)

    def check(self, connection: Any) -> dict[str, Any]:
        """Everything that can be refused before the copy begins. ``connection`` is not used."""
        parse_rate(self._max_rate)
        parse(self._compression)
        check_readable(self._pgdata)
        self._is_shut_down()
        version = data_version(self._pgdata)
        if binary_version(self._bin_dir) != version:
            raise PitrError(f"{self._bin_dir} is another major version than {self._pgdata}, {version}.")
        control = control_data(self._bin_dir, self._pgdata)
        self._check_folder(self._pgdata, control.system_identifier)
        if control.text("wal_level setting") == "minimal":
            raise PitrError(
                f"{self._pgdata} was run with wal_level = minimal, and no recovery begins with that. No backup was"
                " taken. Start the server with wal_level = replica and shut it down again."
            )
        self._checkpoint_end(control)
        if not any(archived_logs(self._folder.archive_path(), None, self._folder.tree)):
            # A recovery would take it for an archive that is not mounted (_prove_mounted of archive.py).
            raise PitrError(
                f"Nothing was ever archived in {self._folder.archive_path()}. No backup was taken. Is its filesystem"
                " mounted? If archiving is new, start the server, archive a segment (module archive_probe), and shut it"
                " down again."
            )
        return {
            "system_identifier": control.system_identifier,
            "version": version,
            "wal_segment_size": control.wal_segment_size,
            "standby": False,
            "now": datetime.datetime.now(datetime.timezone.utc),
        }

    def _is_shut_down(self) -> None:
        pid = running_pid(self._pgdata)
        if pid is not None:
            raise PitrError(
                f"A server is running in {self._pgdata} (process {pid}). No backup was taken. Shut it down, or take the"
                " backup while it runs: method stream or low_level."
            )
        state = control_data(self._bin_dir, self._pgdata).state
        if state == "shut down in recovery":
            raise PitrError(
                f"{self._pgdata} is a standby that was shut down. No backup was taken. Take it from the running"
                " standby, or offline from the primary."
            )
        if state != SHUT_DOWN:
            raise PitrError(
                f"{self._pgdata} was not shut down cleanly: pg_control says '{state}'. No backup was taken. Start the"
                " server and shut it down with mode fast or smart."
            )

    def _checkpoint_end(self, control: ControlData) -> Lsn:
        """Where the shutdown checkpoint ends. Raises PitrError when pg_wal does not have it."""
        start, size = control.checkpoint_lsn, control.wal_segment_size
        argv = [binary(self._bin_dir, "pg_waldump"), f"--path={os.path.join(self._pgdata, contents.PG_WAL)}"]
        argv += [f"--start={start}", f"--end={Lsn(start + _NEAR)}", "--limit=1"]
        # By its name: else the size of a segment is read from any file there, and one that is made for later is empty.
        argv.append(segment_name(control.timeline, start.segment_number(size), size))
        try:
            match = _LENGTH.search(run(argv))
            reason = "" if match else "there is another record"
        except PitrError as error:
            match, reason = None, error.message
        if match is None:
            raise PitrError(
                f"{self._pgdata}/{contents.PG_WAL} does not have the shutdown checkpoint at {control.checkpoint_lsn}:"
                f" {reason} No backup was taken."
            )
        block = int(control.text("WAL block size"))
        return record_end(control.checkpoint_lsn, int(match.group(1)), block, control.wal_segment_size)

    def _begin(self, connection: Any, facts: dict[str, Any]) -> tuple[int, Lsn]:
        control = control_data(self._bin_dir, self._pgdata)
        return control.timeline, control.checkpoint_lsn

    def _end(self, connection: Any, facts: dict[str, Any]) -> tuple[datetime.datetime, int]:
        epoch, _colon, xid = (
            control_data(self._bin_dir, self._pgdata).text("Latest checkpoint's NextXID").partition(":")
        )
        return datetime.datetime.now(datetime.timezone.utc), int(epoch) << 32 | int(xid)

    def _compressed_with(self, facts: dict[str, Any]) -> str:
        return parse(self._compression)[0]

    def _copy(self, connection: Any, target: str, label: str, facts: dict[str, Any], lock: int) -> None:
        before = self._control_bytes()
        control = control_data(self._bin_dir, self._pgdata)
        start, stop = control.checkpoint_lsn, self._checkpoint_end(control)
        places = contents.tablespaces(self._pgdata)
        path = os.path.join(target, MANIFEST)
        with Manifest(path, facts["version"], facts["system_identifier"]) as manifest:
            with Copy(target, self._compression, manifest, self._max_rate) as copy:
                for oid, location in sorted(places.items()):
                    copy.tablespace(oid, location)
                inside = [os.path.relpath(os.path.realpath(p), os.path.realpath(self._pgdata)) for p in places.values()]
                # With unlogged tables, so that the copy is whole for a server that starts without a recovery, too.
                skip = [place for place in inside if not place.startswith("..")]
                copy.base(self._pgdata, skip=[*skip, LABEL_FILE], unlogged=True)
                self._add_wal(copy, control, stop)
                copy.add(LABEL_FILE, label_file(control, label, facts["now"]).encode())
                text = "".join(f"{oid} {escape_location(place)}\n" for oid, place in sorted(places.items()))
                if text:
                    copy.add("tablespace_map", text.encode("utf-8", "surrogateescape"))
                copy.finish(before)
            manifest.finish(control.timeline, start, stop)
        if running_pid(self._pgdata) is not None or self._control_bytes() != before:
            raise PitrError(
                f"A server was started in {self._pgdata} during the copy, which is of no use. The backup was removed"
                " again."
            )
        self._found = tuple(Tablespace(oid, place) for oid, place in sorted(places.items()))
        if copy.passed_over:
            self.warnings.append(
                "No backup holds what is neither a file nor a directory; these were passed over: "
                + ", ".join(copy.passed_over[:10])
            )

    def _control_bytes(self) -> bytes:
        with open(os.path.join(self._pgdata, contents.PG_CONTROL), "rb") as stream:
            return stream.read()

    def _add_wal(self, copy: Copy, control: ControlData, stop: Lsn) -> None:
        """The segments from the checkpoint's start to its end, and the history of the timeline."""
        size = control.wal_segment_size
        pg_wal = os.path.join(self._pgdata, contents.PG_WAL)
        names = []
        for number in range(control.checkpoint_lsn.segment_number(size), stop.previous_segment_number(size) + 1):
            name = segment_name(control.timeline, number, size)
            copy.add_segment(os.path.join(pg_wal, name), min(size, stop - number * size), size)
            names.append(name)
        self._wal = tuple(names)
        history = os.path.join(pg_wal, history_name(control.timeline))
        if os.path.exists(history):
            with open(history, "rb") as stream:
                copy.add_history(history_name(control.timeline), stream.read())

    def _own_wal(self) -> tuple[str, ...]:
        return self._wal

    def _check_content(self, directory: str, names: list[str], summary: Summary) -> str:
        readback.check(directory, names)
        return "checksums"

    def _tablespaces(self, base_tar: str) -> tuple[Tablespace, ...]:
        return self._found

    def _keep_history(self, timeline: int) -> None:
        keep_history(self._folder, self._pgdata, timeline)
