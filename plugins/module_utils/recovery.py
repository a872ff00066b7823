# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A recovery while it runs and when it has reached its target.

Where a recovery stopped is read from what PostgreSQL itself writes down: the last line of the new timeline's history
file tells the switch point and the reason (getRecoveryStopReason of xlogrecovery.c), whatever the logging settings
are.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from . import places, recovery_conf, settings
from .errors import PitrError
from .postgres import FLOORS, Login, control_data, postmaster_status, query, running_pid
from .target import parse_time
from .timeline import parse_history
from .wal import Lsn, WalFile, history_name

_XID = re.compile(r"(before|after) transaction (\d+)\Z")
_TIME = re.compile(r"(before|after) (\d{4}-\d\d-\d\d .+)\Z")
_LSN = re.compile(r"(before|after) LSN ([0-9A-F]+/[0-9A-F]+)\Z")
_NAME = re.compile(r'at restore point "(.*)"\Z')
# The same in the server's log (recoveryStopsBefore and recoveryStopsAfter of xlogrecovery.c), which tells more.
_STARTED = "starting PostgreSQL "
_STOPPING = re.compile(r"recovery stopping (.*)")
_LOG_TRANSACTION = re.compile(r"(before|after) (?:commit|abort) of transaction (\d+), time (.+)\Z")
_LOG_LSN = re.compile(r'(before|after) WAL location \(LSN\) "([0-9A-F]+/[0-9A-F]+)"\Z')
_LOG_NAME = re.compile(r'(at restore point ".*"), time .+\Z')
LOG_TAIL_BYTES = 64 * 1024
LOG_TAIL_LINES = 15
# Seconds between two looks at postmaster.pid.
LOOK = 0.01


@dataclass(frozen=True)
class Reached:
    """Where a recovery stopped. ``lsn`` is the end of the last replayed record; ``reason`` is PostgreSQL's wording."""

    lsn: str
    reason: str
    xid: str = ""
    time: str = ""
    name: str = ""
    last_transaction_time: str = ""

    def to_dict(self) -> dict[str, str]:
        """For a module's result."""
        return dict(self.__dict__)


def parse_reason(lsn: str, reason: str, last_transaction_time: str = "") -> Reached:
    """Take the reason of a history file's line apart."""
    fields: dict[str, str] = {}
    for pattern, key in ((_XID, "xid"), (_LSN, "stop"), (_TIME, "time")):
        match = pattern.match(reason)
        if match:
            fields[key] = match.group(2)
            break
    match = _NAME.match(reason)
    if match:
        fields["name"] = match.group(1)
    fields.pop("stop", None)
    return Reached(lsn=lsn, reason=reason, last_transaction_time=last_transaction_time, **fields)


def contradiction(planned: Mapping[str, Any], reached: Reached) -> str:
    """Why ``reached`` is not what was planned, or the empty text. Never assume that a target was met; compare."""
    kind, value = str(planned.get("target_kind", "latest")), str(planned.get("target_value", ""))
    inclusive = bool(planned.get("target_inclusive", True))
    reason = reached.reason
    if kind == "xid":
        fits = reached.xid == str(int(value) & 0xFFFFFFFF) and reason.startswith("after" if inclusive else "before")
    elif kind == "name":
        fits = reached.name == value
    elif kind == "lsn":
        match = _LSN.match(reason)
        fits = match is not None and Lsn.parse(match.group(2)) >= Lsn.parse(value)
    elif kind == "time":
        # Stopped before the first transaction that ended later than the target (or at it, when exclusive).
        stopped = parse_time(reached.time) if reached.time else None
        asked = parse_time(value)
        fits = stopped is not None and (stopped > asked or (stopped == asked and not inclusive))
    elif kind == "immediate":
        fits = reason == "reached consistency"
    else:
        fits = reason == "no recovery target specified"
        begin = Lsn.parse(str(planned["at_least"])) if planned.get("at_least") else _last_segment(planned)
        if fits and begin is not None and Lsn.parse(reached.lsn) <= begin:
            # PostgreSQL takes a damaged record for the end of WAL, and promotes.
            return f"the archive reaches beyond {begin}, but WAL could be read only up to {reached.lsn}"
    return "" if fits else f"asked for {kind} {value}".rstrip() + f", but PostgreSQL stopped: {reason}"


def _last_segment(planned: Mapping[str, Any]) -> Lsn | None:
    """Where the last planned segment begins; a recovery to the end of the archive ends behind that."""
    if not planned.get("segments") or "end_lsn" not in planned:
        return None
    return Lsn(Lsn.parse(planned["end_lsn"]) - int(planned["wal_bytes"]) // int(planned["segments"]))


def logged_reason(lines: list[str], kind: str) -> str:
    """Why the last recovery in these lines of a server's log stopped, in the words of a history file.

    ``kind`` is the target's. Empty when the last start of the server has not come to a target.
    """
    reason = ""
    for line in lines:
        match = _STOPPING.search(line)
        if match:
            reason = match.group(1).strip()
        elif _STARTED in line:
            reason = ""
    match = _LOG_TRANSACTION.match(reason)
    if match:
        side, xid, when = match.groups()
        return f"{side} {when}" if kind == "time" else f"{side} transaction {xid}"
    match = _LOG_LSN.match(reason)
    if match:
        return f"{match.group(1)} LSN {match.group(2)}"
    match = _LOG_NAME.match(reason)
    if match:
        return match.group(1)
    return "reached consistency" if reason == "after reaching consistency" else reason


def _log_lines(log_file: str) -> list[str]:
    """The last lines of a server's log; none when it cannot be read."""
    try:
        with open(log_file, "rb") as stream:
            stream.seek(0, os.SEEK_END)
            stream.seek(max(0, stream.tell() - LOG_TAIL_BYTES))
            return stream.read().decode(errors="replace").splitlines()
    except OSError:
        return []


def log_tail(log_file: str) -> str:
    """The last lines of a server log that are worth showing, or the empty text."""
    return "\n".join(_log_lines(log_file)[-LOG_TAIL_LINES:])


def replayed_segment(postmaster: int) -> str:
    """Name of the segment that the startup process works on, from its process title; empty when it cannot be seen."""
    with contextlib.suppress(OSError):
        for entry in os.listdir("/proc"):
            if not entry.isdigit():
                continue
            with contextlib.suppress(OSError, IndexError):
                with open(f"/proc/{entry}/stat", encoding="ascii", errors="replace") as stream:
                    parent = int(stream.read().rpartition(")")[2].split()[1])
                if parent != postmaster:
                    continue
                with open(f"/proc/{entry}/cmdline", "rb") as title:
                    match = re.search(rb"startup.* recovering ([0-9A-F]{24})", title.read())
                if match:
                    return match.group(1).decode()
    return ""


@dataclass(frozen=True)
class Progress:
    """How far a recovery is. ``percent`` of the planned WAL; ``remaining_seconds`` is an estimate, None when unknown.

    ``state`` is restoring, starting, replaying, paused, promoted or stopped.
    """

    state: str
    lsn: str = ""
    end_lsn: str = ""
    percent: float | None = None
    remaining_seconds: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """For a module's result."""
        return dict(self.__dict__)

    def __str__(self) -> str:
        text = self.state
        if self.lsn:
            text += f" {self.lsn}"
        if self.percent is not None:
            text += f" of {self.end_lsn} ({self.percent:.0f} %)" if self.end_lsn else f" {self.percent:.0f} %"
        if self.remaining_seconds is not None:
            text += f", about {self.remaining_seconds:.0f} s left"
        return text


class Recovery:
    """The recovery of one server."""

    def __init__(self, login: Login, pgdata: str, bin_dir: str, config_dir: str = "", log_file: str = "") -> None:
        """``log_file``: the server's log, shown when it dies.

        ``config_dir``: where postgresql.conf is, default PGDATA.
        """
        self._login = login
        self._pgdata = pgdata
        self._bin_dir = bin_dir
        self._config_dir = config_dir or pgdata
        self._log_file = log_file

    def planned(self) -> dict[str, Any]:
        """What the restore wrote down; empty when no managed recovery is under way."""
        return recovery_conf.planned(self._config_dir) or {}

    def progress(self) -> Progress:
        """One look, which never fails for a server that is not there yet."""
        pid = running_pid(self._pgdata)
        if pid is None:
            return self._restoring() or Progress("stopped")
        lsn, state = "", "starting"
        with contextlib.suppress(PitrError), contextlib.closing(self._login.connect()) as connection:
            row = query(
                connection,
                "SELECT pg_is_in_recovery(), CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn()::text"
                " ELSE pg_current_wal_lsn()::text END,"
                " CASE WHEN pg_is_in_recovery() THEN pg_get_wal_replay_pause_state() ELSE '' END",
            )[0]
            lsn = row[1] or ""
            state = ("paused" if row[2] == "paused" else "replaying") if row[0] else "promoted"
        planned = self.planned()
        if state == "starting":
            segment = replayed_segment(pid)
            if segment:
                state = "replaying"
                size = control_data(self._bin_dir, self._pgdata).wal_segment_size
                lsn = str(Lsn(WalFile.parse(segment).number(size) * size))
        return self._estimate(state, lsn, planned)

    def _restoring(self) -> Progress | None:
        """How much of a base backup a running restore has unpacked."""
        try:
            with open(os.path.join(self._pgdata, "pitr-restoring.json"), encoding="utf-8") as stream:
                marker = json.load(stream)
            done, total = int(marker["bytes"]), int(marker["total_bytes"])
        except (OSError, ValueError, KeyError):
            return None
        return Progress("restoring", percent=round(100 * done / total, 1) if total else None)

    def _estimate(self, state: str, lsn: str, planned: Mapping[str, Any]) -> Progress:
        if state not in ("replaying", "paused") or not lsn or "end_lsn" not in planned:
            return Progress(state, lsn)
        start, end, now = Lsn.parse(planned["start_lsn"]), Lsn.parse(planned["end_lsn"]), Lsn.parse(lsn)
        if end <= start:
            return Progress(state, lsn, str(end))
        done = min(max((now - start) / (end - start), 0.0), 1.0)
        elapsed = time.time() - float(planned.get("started_at") or time.time())
        remaining = elapsed * (1 - done) / done if done > 0.02 and elapsed > 0 and state == "replaying" else None
        return Progress(state, lsn, str(end), round(done * 100, 1), remaining)

    def wait(self, timeout: float) -> tuple[Reached | None, Progress]:
        """Wait until the target is reached: promoted, paused there, or shut down there, as the plan's action says.

        Returns (None, progress) when ``timeout`` seconds were not enough. Raises PitrError when the server died, when
        it ended recovery elsewhere than asked, or when it is not recovering at all.
        """
        action = self.planned().get("target_action", "promote")
        started = time.monotonic()
        deadline = started + timeout
        pause = 0.05
        while True:
            progress = self.progress()
            if progress.state == "stopped":
                return self._stopped(action), progress
            if progress.state == "promoted":
                return self._promoted(), progress
            if progress.state == "paused":
                return self._paused(), progress
            if time.monotonic() >= deadline:
                return None, progress
            self._pause(min(pause, deadline - time.monotonic()))
            # A pause at the target is not written down, so a short recovery is asked more often than a long one.
            pause = min(pause * 1.3, 0.2 if time.monotonic() - started < 10 else 1.0)

    def _pause(self, seconds: float) -> None:
        """Wait this long, or until the server has come up or is gone: a short recovery is noticed at once.

        The server writes down that it takes connections; asking it so often would cost it a process each time.
        """
        end = time.monotonic() + seconds
        before = postmaster_status(self._pgdata)
        while time.monotonic() < end:
            time.sleep(LOOK)
            if postmaster_status(self._pgdata) != before:
                return

    def _died(self, why: str) -> PitrError:
        tail = log_tail(self._log_file) if self._log_file else ""
        hint = f" Last lines of {self._log_file}:\n{tail}" if tail else " Look into the server's log."
        return PitrError(f"The server in {self._pgdata} {why}. It has not been promoted; nothing was lost.{hint}")

    def _stopped(self, action: str) -> Reached:
        data = control_data(self._bin_dir, self._pgdata)
        if action == "shutdown" and data.state == "shut down in recovery":
            return self._at_target(data.text("Minimum recovery ending location"), "", "was shut down")
        raise self._died("is not running: recovery ended before the target was reached")

    def _paused(self) -> Reached:
        with contextlib.closing(self._login.connect()) as connection:
            lsn, when = query(connection, "SELECT pg_last_wal_replay_lsn()::text, pg_last_xact_replay_timestamp()")[0]
            places.check_server(connection, self.planned())
            names = tuple(FLOORS)
            rows = query(connection, "SELECT name, setting::int FROM pg_settings WHERE name IN %s", (names,))
        # Replay raises pg_control's values with those of the primary and pauses when the server's own are lower.
        floors = control_data(self._bin_dir, self._pgdata).floors
        low = [f"{name} must be at least {floors[name]}, it is {value}" for name, value in rows if value < floors[name]]
        if low:
            raise PitrError(
                f"The recovery of {self._pgdata} is paused at {lsn}, before its target: the primary had raised"
                f" settings. {'; '.join(sorted(low))}. Raise them and start this server again; it goes on where it is."
            )
        return self._at_target(lsn, _utc(when), "is paused")

    def _at_target(self, lsn: str, when: str, state: str) -> Reached:
        """Only the log tells a pause or a shutdown at the target from one that somebody asked for before it."""
        planned = self.planned()
        reason = logged_reason(_log_lines(self._log_file), str(planned.get("target_kind", "")))
        reached = parse_reason(lsn, reason, when)
        wrong = contradiction(planned, reached) if planned and reason else ""
        if wrong:
            raise PitrError(f"The recovery of {self._pgdata} did not do what was planned: {wrong}.")
        if not reason or planned.get("target_action") == "promote":
            where = f"nothing in {self._log_file} tells" if self._log_file else "no log was given (log_file) to tell"
            raise PitrError(
                f"The recovery of {self._pgdata} {state} at {lsn}, and it is not proven that its target was reached:"
                f" {where} of it. If somebody has done that before the target, resume it or start the server again."
            )
        return reached

    def timeline(self) -> int:
        """The timeline that the server writes (promoted) or replays."""
        with contextlib.closing(self._login.connect()) as connection:
            row = query(
                connection,
                "SELECT CASE WHEN pg_is_in_recovery() THEN NULL ELSE pg_walfile_name(pg_current_wal_lsn()) END,"
                " (SELECT timeline_id FROM pg_control_checkpoint())",
            )[0]
        # pg_control shows the new timeline only after the first checkpoint; the file being written shows it at once.
        return WalFile.parse(row[0]).timeline if row[0] else int(row[1])

    def _promoted(self) -> Reached:
        timeline = self.timeline()
        path = os.path.join(self._pgdata, "pg_wal", history_name(timeline))
        try:
            with open(path, encoding="utf-8", errors="replace") as stream:
                last = parse_history(timeline, stream.read())[-1]
        except (OSError, IndexError):
            raise PitrError(
                f"The server in {self._pgdata} runs on timeline {timeline} and has no {path}: it was not recovered to a"
                " target, or its history file is gone. Nothing is proven about its content."
            ) from None
        with contextlib.closing(self._login.connect()) as connection:
            when = query(connection, "SELECT pg_last_xact_replay_timestamp()")[0][0]
            places.check_server(connection, self.planned())
        reached = parse_reason(str(last.lsn), last.reason, _utc(when))
        planned = self.planned()
        wrong = contradiction(planned, reached) if planned else ""
        if wrong:
            raise PitrError(
                f"The recovery of {self._pgdata} did not do what was planned: {wrong}. Do not use this cluster."
            )
        return reached

    def promote(self, timeout: float) -> bool:
        """Promote a server that is still recovering.

        Returns whether it was. Raises PitrError after ``timeout`` seconds.
        """
        with contextlib.closing(self._login.connect()) as connection:
            if not query(connection, "SELECT pg_is_in_recovery()")[0][0]:
                return False
            if not query(connection, "SELECT pg_promote(true, %s)", (max(1, int(timeout)),))[0][0]:
                raise PitrError(f"{self._login} was not promoted within {timeout:g} seconds.")
        return True

    def resume(self) -> bool:
        """Let a paused recovery go on (pg_wal_replay_resume). Returns whether it was paused."""
        with contextlib.closing(self._login.connect()) as connection:
            row = query(connection, "SELECT pg_is_in_recovery() AND pg_is_wal_replay_paused()")[0]
            if not row[0]:
                return False
            query(connection, "SELECT pg_wal_replay_resume()")
        return True

    def accept(self) -> tuple[bool, list[str]]:
        """Make the recovered cluster an ordinary one again: recovery settings away, configuration read again.

        Returns whether something was changed, and the settings that a restart has still to bring into force.
        """
        if not recovery_conf.finish(self._config_dir, self._pgdata):
            return False, []
        return True, settings.apply(self._login, reload=True)


def _utc(value: datetime.datetime | None) -> str:
    return "" if value is None else value.astimezone(datetime.timezone.utc).isoformat()
