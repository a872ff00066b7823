# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A cluster that no service manager owns: initdb, start, stop, status (pg_ctl)."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass

from .errors import PitrError
from .postgres import LOOK, binary, control_data, data_version, run, running_pid
from .serverlog import tail as log_tail


@dataclass(frozen=True)
class Status:
    """``port`` as the running server has written it down, else 0. ``data_checksums``: whether pages have checksums,
    None where there is no cluster. ``standby``: it is, or will come up as, a standby."""

    exists: bool
    running: bool
    pid: int
    port: int
    system_identifier: str
    data_checksums: bool | None = None
    standby: bool = False


class Instance:
    """One data directory and the server on it."""

    def __init__(
        self, bin_dir: str, pgdata: str, log_file: str = "", timeout: float = 60, config_dir: str = ""
    ) -> None:
        """``timeout``: seconds to wait for a start or a stop. ``config_dir``: of a postgresql.conf elsewhere."""
        self._bin_dir = bin_dir
        self._pgdata = pgdata
        self._log_file = log_file or os.path.join(os.path.dirname(pgdata), os.path.basename(pgdata) + ".log")
        self._timeout = timeout
        self._config_dir = config_dir or pgdata

    def status(self) -> Status:
        """What is there now."""
        pid = running_pid(self._pgdata) or 0
        exists = data_version(self._pgdata) is not None
        port = 0
        if pid:
            with open(os.path.join(self._pgdata, "postmaster.pid"), encoding="utf-8", errors="replace") as stream:
                lines = stream.read().splitlines()
            port = int(lines[3]) if len(lines) > 3 and lines[3].isdigit() else 0
        identifier, checksums = "", None
        if exists and os.path.exists(os.path.join(self._pgdata, "global", "pg_control")):
            control = control_data(self._bin_dir, self._pgdata)
            identifier, checksums = control.system_identifier, control.data_checksums
        standby = exists and os.path.exists(os.path.join(self._pgdata, "standby.signal"))
        return Status(exists, bool(pid), pid, port, identifier, checksums, standby)

    def initialize(self, options: Sequence[str]) -> None:
        """Run initdb. Raises PitrError when it fails; initdb then removes what it made."""
        run([binary(self._bin_dir, "initdb"), "-D", self._pgdata, *options])

    def start(self, wait: bool) -> None:
        """Start the server. Without ``wait`` return as soon as it owns the directory: recovery may take hours."""
        argv = [binary(self._bin_dir, "pg_ctl"), "start", "-D", self._config_dir, "-l", self._log_file, "-s"]
        argv += ["-w", "-t", str(int(self._timeout))] if wait else ["-W"]
        try:
            run(argv)
        except PitrError as error:
            raise PitrError(f"{error.message}\nLast lines of {self._log_file}:\n{log_tail(self._log_file)}") from None
        deadline = time.monotonic() + 10
        while running_pid(self._pgdata) is None:
            if time.monotonic() > deadline:
                tail = log_tail(self._log_file)
                raise PitrError(f"The server in {self._pgdata} did not start. Last lines of {self._log_file}:\n{tail}")
            time.sleep(LOOK)

    def stop(self, mode: str) -> None:
        """Stop the server: smart, fast or immediate. Raises PitrError when it is still there after the timeout."""
        # pg_ctl would look ten times a second.
        run([binary(self._bin_dir, "pg_ctl"), "stop", "-D", self._pgdata, "-m", mode, "-W", "-s"])
        if not self._gone():
            raise PitrError(f"The server in {self._pgdata} did not stop within {self._timeout:g} seconds.")

    def kill(self) -> None:
        """SIGKILL the postmaster, as a crash of the machine would; its children notice and leave."""
        pid = running_pid(self._pgdata)
        if pid is None:
            return
        os.kill(pid, signal.SIGKILL)
        if not self._gone():
            raise PitrError(f"Process {pid} survived SIGKILL for {self._timeout:g} seconds.")

    def _gone(self) -> bool:
        """Wait until no server owns the directory; whether that was within the timeout."""
        deadline = time.monotonic() + self._timeout
        while running_pid(self._pgdata) is not None:
            if time.monotonic() > deadline:
                return False
            time.sleep(LOOK)
        return True
