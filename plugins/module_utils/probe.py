# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""End to end: something written on the server now is found in the repository, with the same content."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from typing import Any

from .archive import same_content
from .errors import PitrError
from .postgres import Login, query
from .repository import ClusterFolder
from .wal import Lsn, WalFile, segment_name


@dataclass(frozen=True)
class Archived:
    """A segment that was seen in the repository. ``seconds`` from the switch until then. ``compared``: content too."""

    segment: str
    lsn: str
    seconds: float
    compared: bool

    def to_dict(self) -> dict[str, Any]:
        """For a module's result."""
        return dict(self.__dict__)


class Probe:
    """Switches WAL on a server and waits for the segment in the repository."""

    def __init__(self, login: Login, folder: ClusterFolder, timeout: float) -> None:
        """``timeout``: seconds to wait for the archiver."""
        self._login = login
        self._folder = folder
        self._timeout = timeout

    def switch_and_wait(self) -> Archived:
        """Write a record, switch, wait. Raises PitrError with the archiver's last failure when nothing arrives."""
        with contextlib.closing(self._login.connect()) as connection:
            # Without a record in the segment a switch does nothing, and an old segment would be taken for a new one.
            query(connection, "SELECT pg_logical_emit_message(false, 'pgdrill.pitr', 'probe')")
            return self._wait(connection)

    def restore_point(self, name: str) -> tuple[str, Archived]:
        """Create a named restore point and wait until it is archived.

        Returns its LSN (end of its record) and the segment.
        """
        with contextlib.closing(self._login.connect()) as connection:
            lsn = str(query(connection, "SELECT pg_create_restore_point(%s)::text", (name,))[0][0])
            return lsn, self._wait(connection)

    def _wait(self, connection: Any) -> Archived:
        started = time.monotonic()
        identifier, timeline_file, switch, data_directory, mode = query(
            connection,
            "SELECT (SELECT system_identifier::text FROM pg_control_system()), pg_walfile_name(pg_current_wal_lsn()),"
            " pg_switch_wal()::text, current_setting('data_directory'), current_setting('archive_mode')",
        )[0]
        chapter = self._folder.require(identifier)
        if mode == "off":
            raise PitrError(f"{self._login} has archive_mode = off: nothing is archived.")
        lsn = Lsn.parse(switch)
        timeline = WalFile.parse(timeline_file).timeline
        number = lsn.previous_segment_number(chapter.wal_segment_size)
        name = segment_name(timeline, number, chapter.wal_segment_size)
        stored = self._folder.wal_path(WalFile.parse(name), chapter)
        pause = 0.01
        while not self._folder.tree.exists(stored):
            if time.monotonic() - started > self._timeout:
                raise PitrError(self._failure(connection, name))
            time.sleep(pause)
            pause = min(pause * 1.2, 0.5)
        compared = self._compare(stored, os.path.join(data_directory, "pg_wal", name))
        return Archived(name, switch, round(time.monotonic() - started, 3), compared)

    def _compare(self, stored: str, original: str) -> bool:
        """Compare with the server's own file where this host has it. Raises PitrError when they differ.

        What is encrypted is compared by the digest of its content, which is as good.
        """
        try:
            source = open(original, "rb")
        except OSError:
            return False
        with source:
            if not same_content(stored, self._folder.tree, source.fileno()):
                raise PitrError(f"{stored} has other content than {original}. Do not rely on this archive.")
        return True

    def _failure(self, connection: Any, name: str) -> str:
        row = query(
            connection,
            "SELECT last_archived_wal, last_failed_wal, last_failed_time, failed_count FROM pg_stat_archiver",
        )[0]
        command = query(connection, "SELECT current_setting('archive_command')")[0][0]
        failed = f"last failure: {row[1]} at {row[2]}, {row[3]} in all" if row[1] else "no failure is recorded"
        return (
            f"{name} did not arrive in {self._folder.archive_path()} within {self._timeout:g} seconds. Last archived:"
            f" {row[0] or 'nothing'}; {failed}. The server's log has the words of archive_command: {command}"
        )
