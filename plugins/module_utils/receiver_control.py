# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Installing, starting and ending the receiver of a cluster (``pitr-wal receive``), and its slot's end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from typing import Any

from .errors import PitrError
from .install import COMMAND
from .receiver import holders, lock_path, read_status, try_lock
from .repository import ClusterFolder, write_atomic
from .serverlog import tail as log_tail
from .tree import fsync_directory
from .upstream import Primary, Settings, read_settings, settings_path

# Seconds for a killed process to let go of its files.
DYING_SECONDS = 3.0


@dataclass(frozen=True)
class Request:
    """Which receiver. ``directory`` is that of ``pitr-wal``; ``password`` may be empty; ``timeout`` is in seconds."""

    repository: str
    cluster: str
    directory: str
    settings: Settings
    password: str = ""
    log_file: str = ""
    timeout: float = 60


class Control:
    """The receiver of one cluster on this host."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._folder = ClusterFolder.open(request.repository, request.cluster)
        self._lock = lock_path(self._folder)
        self._settings_path = settings_path(request.directory, request.cluster)
        self._passfile = os.path.join(os.path.dirname(self._settings_path), f"{request.cluster}.pgpass")
        self.log_file = request.log_file or os.path.join(os.path.dirname(self._settings_path), f"{request.cluster}.log")

    # --- looking

    def pid(self) -> int:
        """Process id of the running receiver, 0 when there is none.

        Raises PitrError when one is running that this user and host cannot reach.
        """
        if not os.path.exists(self._lock):
            return 0
        lock = None
        deadline = time.monotonic() + DYING_SECONDS
        while lock is None:
            found = holders(self._lock)
            if found:
                return found[0]
            lock = try_lock(self._lock)
            if lock is not None:
                break
            if time.monotonic() < deadline:
                # A process that is ending shows no open files any more, and has not let go of them yet.
                time.sleep(0.02)
                continue
            where = read_status(self._folder).get("host") or "another host"
            raise PitrError(
                f"A receiver of the cluster '{self._request.cluster}' runs as another user or on {where}."
                " Nothing was changed."
            )
        os.close(lock)
        return 0

    def status(self) -> dict[str, Any]:
        """What the receiver says of itself, and whether it runs."""
        pid = self.pid()
        status = read_status(self._folder)
        if status and (not pid or status.get("pid") != pid):
            # Of a life that has ended: what it was doing then is not so any more.
            status.update(state="starting" if pid else "stopped", connected_since=None)
        return {"running": bool(pid), "status": status}

    # --- changing

    def configure(self, check: bool) -> tuple[bool, str, str]:
        """Write settings and passfile. Returns (changed, before, after) of the settings; passwords are never shown.

        A receiver that runs needs a restart for other settings only: the passfile is read for each connection. Raises
        PitrError when the server does not take a new password; the old one then stays.
        """
        request = self._request
        wanted = Settings(**{**request.settings.to_dict(), "passfile": self._passfile if request.password else ""})  # type: ignore[arg-type]
        text = json.dumps(wanted.to_dict(), indent=2, sort_keys=True) + "\n"
        escaped = request.password.replace("\\", "\\\\").replace(":", "\\:")
        secret = f"*:*:*:*:{escaped}\n" if request.password else ""
        before, old_secret = _read(self._settings_path), _read(self._passfile)
        changed = text != before or secret != old_secret
        if changed and not check:
            os.makedirs(os.path.dirname(self._settings_path), mode=0o700, exist_ok=True)
            if secret and old_secret and text == before:
                self._try_password(wanted, secret)
            if secret:
                write_atomic(self._passfile, secret.encode())
            else:
                _remove(self._passfile)
            write_atomic(self._settings_path, text.encode())
        return changed, before, text

    def _try_password(self, settings: Settings, secret: str) -> None:
        """A connection that is open does not tell whether the next one will be let in."""
        path = f"{self._passfile}.new"
        write_atomic(path, secret.encode())
        try:
            Primary(Settings(**{**settings.to_dict(), "passfile": path})).identify()  # type: ignore[arg-type]
        except PitrError as error:
            raise PitrError(f"{error.message} The receiver's password was not changed.") from None
        finally:
            _remove(path)

    def ensure_running(self, reconfigured: bool, check: bool) -> bool:
        """Run it with the settings that are there now, and wait until it receives. Returns whether that is a change."""
        running = bool(self.pid())
        changed = reconfigured or not running
        if check:
            return changed
        if running and reconfigured:
            self.stop()
        if changed:
            self.start()
        self.wait()
        return changed

    def start(self) -> None:
        """Start it in the background, with a session of its own."""
        command = os.path.join(self._request.directory, COMMAND)
        if not os.access(command, os.X_OK):
            raise PitrError(f"{command} is not an executable file. The module pgdrill.pitr.wal_command installs it.")
        with open(self.log_file, "ab") as log:
            subprocess.Popen(
                [command, "receive", self._request.cluster],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                start_new_session=True,
            )

    def wait(self, end_refused: bool = True) -> dict[str, Any]:
        """Until it receives what the server writes now. Raises PitrError with its own words when it does not.

        ``end_refused``: end one that is refused, which a service manager would only start again.
        """
        deadline = time.monotonic() + self._request.timeout
        seen = False
        while True:
            found = self.status()
            status, seen = found["status"], seen or found["running"]
            state = status.get("state")
            if found["running"] and state == "streaming":
                return found
            if found["running"] and state == "refused":
                if end_refused:
                    self.stop()
                raise PitrError(f"The receiver was refused: {status.get('last_error')}")
            late = time.monotonic() > deadline
            if not found["running"] and (seen or late):
                raise PitrError(f"The receiver has ended. Last lines of {self.log_file}:\n{log_tail(self.log_file)}")
            if late:
                why = status.get("last_error") or state
                raise PitrError(
                    f"The receiver does not receive after {self._request.timeout:g} seconds; it goes on trying: {why}"
                )
            time.sleep(0.05)

    def stop(self) -> bool:
        """End it with what it has received on disk. Returns whether it was running."""
        pid = self.pid()
        if not pid:
            return False
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + self._request.timeout
        while pid in holders(self._lock):
            if time.monotonic() > deadline:
                raise PitrError(f"The receiver (process {pid}) has not ended within {self._request.timeout:g} seconds.")
            time.sleep(0.02)
        return True

    def remove(self, check: bool) -> bool:
        """Drop the slot on the server, then forget the settings. Returns whether there was anything.

        The spool stays: a partial segment in it may have WAL that is nowhere else. Raises PitrError when the server
        cannot be asked, because a slot that stays makes it keep WAL.
        """
        stored = os.path.exists(self._settings_path)
        settings = read_settings(self._request.directory, self._request.cluster) if stored else self._request.settings
        changed = stored or os.path.exists(self._passfile)
        with contextlib.ExitStack() as stack:
            if not stored and self._request.password:
                passfile = stack.enter_context(tempfile.NamedTemporaryFile("w", prefix="pitr-passfile-"))
                escaped = self._request.password.replace("\\", "\\\\").replace(":", "\\:")
                passfile.write(f"*:*:*:*:{escaped}\n")
                passfile.flush()
                settings = Settings(**{**settings.to_dict(), "passfile": passfile.name})  # type: ignore[arg-type]
            primary = Primary(settings)
            try:
                facts = primary.identify()
                # A foreign server's slot of the same name is none of ours.
                self._folder.require(facts.system_identifier)
                if primary.slot() is not None:
                    changed = True
                    if not check:
                        primary.drop_slot()
            except PitrError as error:
                raise PitrError(
                    f"The replication slot {settings.slot} could not be dropped: {error.message} Until it is gone, the"
                    " server keeps WAL for it, at most max_slot_wal_keep_size. The receiver is stopped."
                ) from None
        if not check:
            for path in (self._settings_path, self._passfile):
                _remove(path)
        return changed


def _read(path: str) -> str:
    with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8") as stream:
        return stream.read()
    return ""


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
        fsync_directory(os.path.dirname(path))
