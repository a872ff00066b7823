# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A receiver for the integration tests: the installed command in a process of its own."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import Any

from ansible_collections.pgdrill.pitr.plugins.module_utils import codec
from ansible_collections.pgdrill.pitr.plugins.module_utils.postgres import query
from ansible_collections.pgdrill.pitr.plugins.module_utils.receiver import STREAM_LOCK_FILE, holders, lock_path
from ansible_collections.pgdrill.pitr.plugins.module_utils.receiver_control import Control, Request
from ansible_collections.pgdrill.pitr.plugins.module_utils.spool import spool_path
from ansible_collections.pgdrill.pitr.plugins.module_utils.upstream import Settings
from ansible_collections.pgdrill.pitr.plugins.module_utils.wal import Lsn
from ansible_collections.pgdrill.pitr.tests.integration.support import (
    CLUSTER,
    PATIENCE,
    SEGMENT_SIZE,
    Server,
    Storage,
    until,
)

SLOT = "receiver"
APPLICATION = "the receiver"


class Receiving:
    """The receiver of a repository's cluster."""

    def __init__(self, storage: Storage, server: Server, synchronous: bool = False, host: str = "") -> None:
        self.storage = storage
        settings = Settings(
            bin_dir=storage.bin_dir,
            host=host or server.socket,
            port=server.PORT,
            user="postgres",
            slot=SLOT,
            application_name=APPLICATION,
            synchronous=synchronous,
        )
        directory = str(Path(storage.wal_command).parent)
        self.control = Control(Request(str(storage.repository), CLUSTER, directory, settings, timeout=PATIENCE))
        self.control.configure(check=False)

    @property
    def spool(self) -> Path:
        return Path(spool_path(self.storage.folder, self.storage.folder.chapter))

    @property
    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = self.control.status()["status"]
        return found

    @property
    def log(self) -> str:
        path = Path(self.control.log_file)
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def start(self) -> Receiving:
        """Start and wait until it receives."""
        self.control.start()
        self.control.wait()
        return self

    def launch(self) -> Receiving:
        """Start, whatever comes of it."""
        self.control.start()
        until(self.control.pid, "the receiver's process")
        return self

    def stop(self) -> None:
        self.control.stop()

    def kill(self, also_stream: bool = True) -> None:
        """SIGKILL, as a crash would; ``also_stream``: pg_receivewal, too."""
        for pid in [*([self.control.pid()] if self.control.pid() else []), *(self.streams if also_stream else [])]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        until(lambda: not self.control.pid(), "the receiver's end")

    @property
    def streams(self) -> list[int]:
        """Processes of pg_receivewal."""
        path = lock_path(self.storage.folder, STREAM_LOCK_FILE)
        found = holders(path) if os.path.exists(path) else []
        return [pid for pid in found if _name(pid) == "pg_receivewal"]

    @property
    def partial(self) -> Path | None:
        """The segment that is being written."""
        found = sorted(self.spool.glob("*.partial"))
        return found[-1] if found else None

    def has(self, lsn: Lsn) -> bool:
        """Whether everything up to this position has been received."""
        text = self.status.get("received_lsn")
        return bool(text) and Lsn.parse(str(text)) >= lsn

    def wait_for(self, server: Server) -> Lsn:
        """Until all that the server has written now has come, finished segments into the archive."""
        lsn = mark(server)
        until(lambda: self.has(lsn), f"WAL up to {lsn}, status {self.status}")
        return lsn

    def close(self) -> None:
        self.kill()


def mark(server: Server) -> Lsn:
    """Write something and commit; a position in the commit's record, which may end in zeros, with none behind it."""
    with server.connection() as connection:
        query(connection, "SELECT pg_logical_emit_message(true, 'tests', 'mark')")
        end = Lsn.parse(query(connection, "SELECT pg_current_wal_flush_lsn()::text")[0][0])
    return Lsn(end - 16)


def armed(server: Server) -> bool:
    """Whether commits wait for a synchronous receiver."""
    return bool(server.value("SELECT count(*) > 0 FROM pg_stat_replication WHERE sync_state = 'sync'"))


def _name(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text(encoding="ascii").strip()
    return ""


def content(path: Path) -> bytes:
    """What a stored file holds."""
    with codec.open_reader(str(path)) as reader:
        return reader.read()


def unbroken(storage: Storage, timeline: int = 1) -> list[str]:
    """Names of the archived segments of a timeline; fails when one is missing between them."""
    names = [path.name for path in storage.segments(timeline)]
    per_id = 0x100000000 // SEGMENT_SIZE
    numbers = [int(name[8:16], 16) * per_id + int(name[16:], 16) for name in names]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers))), names
    return names
