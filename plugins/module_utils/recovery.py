# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A recovery while it runs and when it has reached its target.

Where a recovery stopped is read from what PostgreSQL itself writes down: the last line of the new timeline's history
file tells the switch point and the reason (getRecoveryStopReason of xlogrecovery.c), whatever the logging settings
are. A pause or a shutdown at the target leaves no such line; the server's log tells it, or the position (reached.py).
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from . import keep_out, places, recovery_conf, serverlog, settings
from .errors import PitrError
from .postgres import FLOORS, LOOK, Login, control_data, postmaster_status, query, running_pid
from .reached import Reached, contradiction, logged_reason, parse_reason, proven_by_position
from .timeline import parse_history
from .wal import Lsn, WalFile, history_name

SIGNALS = ("recovery.signal", "standby.signal")
# Settings of the include file that a reload takes away; the others keep their source until the server is started anew.
_RELOADED = " AND context <> 'postmaster'"
# Settings of a target that have a value without one, too.
_ALWAYS = ("recovery_target_action", "recovery_target_inclusive", "recovery_target_timeline")
_OURS = (f"%/{recovery_conf.FILE}",)
_NOT_RESTARTED = (
    "The target of the recovery in {pgdata} was moved to {target}, and the server still stands at its old one. Start it"
    " again."
)
# What a server that is up says to whom it does not let in; anything else may pass.
_REJECTED = re.compile(r'pg_hba\.conf|authentication failed|no password supplied|role "[^"]*" does not exist')


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

    ``state`` is restoring, starting, replaying, paused, promoted or stopped. ``distance_bytes`` to ``end_lsn``, where
    the target is, or at the latest will have been. ``bytes_per_second`` since the server was started.
    """

    state: str
    lsn: str = ""
    end_lsn: str = ""
    percent: float | None = None
    remaining_seconds: float | None = None
    timeline: int | None = None
    distance_bytes: int | None = None
    bytes_per_second: int | None = None
    last_transaction_time: str = ""
    target: str = ""

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


def _started_at(pgdata: str) -> float:
    """When the running server was started, in seconds of the epoch (LOCK_FILE_LINE_START_TIME); 0 when unknown."""
    try:
        with open(os.path.join(pgdata, "postmaster.pid"), encoding="utf-8", errors="replace") as stream:
            return float(stream.read().split("\n")[2])
    except (OSError, IndexError, ValueError):
        return 0.0


def replayed_timeline(planned: Mapping[str, Any], lsn: Lsn) -> int | None:
    """The timeline that the WAL before this position is of, along the plan's way; None without a plan."""
    found = None
    for span in planned.get("timeline_path") or []:
        if found is None or Lsn.parse(span["from"]) < lsn:
            found = int(span["timeline"])
    return found


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
        # Why the last look was not let in, empty when it was.
        self._rejected = ""

    def planned(self) -> dict[str, Any]:
        """What the restore wrote down; empty when no managed recovery is under way."""
        return recovery_conf.planned(self._config_dir) or {}

    def progress(self) -> Progress:
        """One look, which never fails for a server that is not there yet."""
        self._rejected = ""
        pid = running_pid(self._pgdata)
        if pid is None:
            return self._restoring() or Progress("stopped", target=str(self.planned().get("target", "")))
        lsn, state, when, timeline = "", "starting", "", None
        try:
            with contextlib.closing(self._login.connect()) as connection:
                row = query(
                    connection,
                    "SELECT pg_is_in_recovery(), CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn()::text"
                    " ELSE pg_current_wal_lsn()::text END,"
                    " CASE WHEN pg_is_in_recovery() THEN pg_get_wal_replay_pause_state() ELSE '' END,"
                    " pg_last_xact_replay_timestamp(),"
                    " CASE WHEN pg_is_in_recovery() THEN NULL ELSE pg_walfile_name(pg_current_wal_lsn()) END",
                )[0]
            lsn, when = row[1] or "", _utc(row[3])
            state = ("paused" if row[2] == "paused" else "replaying") if row[0] else "promoted"
            timeline = WalFile.parse(row[4]).timeline if row[4] else None
        except PitrError as error:
            if postmaster_status(self._pgdata) in ("ready", "standby") and _REJECTED.search(error.message):
                self._rejected = error.message
        if state == "starting":
            segment = replayed_segment(pid)
            if segment:
                state = "replaying"
                size = control_data(self._bin_dir, self._pgdata).wal_segment_size
                timeline = WalFile.parse(segment).timeline
                lsn = str(Lsn(WalFile.parse(segment).number(size) * size))
        return self._estimate(Progress(state, lsn, timeline=timeline, last_transaction_time=when), self.planned())

    def _restoring(self) -> Progress | None:
        """How much of a base backup a running restore has unpacked."""
        try:
            with open(os.path.join(self._pgdata, "pitr-restoring.json"), encoding="utf-8") as stream:
                marker = json.load(stream)
            done, total = int(marker["bytes"]), int(marker["total_bytes"])
        except (OSError, ValueError, KeyError):
            return None
        return Progress("restoring", percent=round(100 * done / total, 1) if total else None)

    def _estimate(self, seen: Progress, planned: Mapping[str, Any]) -> Progress:
        """What was seen, measured by the plan."""
        seen = replace(seen, target=str(planned.get("target", "")))
        if seen.state not in ("replaying", "paused") or not seen.lsn or "end_lsn" not in planned:
            return seen
        start, now = Lsn.parse(planned["start_lsn"]), Lsn.parse(seen.lsn)
        end = Lsn.parse(str(planned.get("target_lsn") or planned["end_lsn"]))
        seen = replace(
            seen,
            end_lsn=str(end),
            timeline=seen.timeline or replayed_timeline(planned, now),
            distance_bytes=max(end - now, 0),
        )
        if end <= start:
            return seen
        done = min(max((now - start) / (end - start), 0.0), 1.0)
        seen = replace(seen, percent=round(done * 100, 1))
        begun = max(float(planned.get("started_at") or 0), _started_at(self._pgdata))
        elapsed = time.time() - begun
        if not begun or elapsed <= 0 or done <= 0.02 or seen.state != "replaying":
            return seen
        rate = int((now - start) / elapsed)
        return replace(seen, bytes_per_second=rate, remaining_seconds=round(elapsed * (1 - done) / done, 1))

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
            if progress.state in ("promoted", "paused"):
                self._check_kept_out()
                return self._promoted() if progress.state == "promoted" else self._paused(), progress
            if self._rejected:
                raise PitrError(
                    f"The server in {self._pgdata} is up and does not let this task in, so that nothing is known of it:"
                    f" {self._rejected}. During a recovery only inspect_user comes in, over the unix socket, and whom"
                    " inspect_hba names (restore_inspect_hba). The recovery goes on."
                )
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
        logs = serverlog.readable(self._pgdata, self._log_file)
        # The collector may have come to nothing yet.
        path = next((log for log in [*logs, self._log_file] if log and serverlog.tail(log)), "")
        hint = f" Last lines of {path}:\n{serverlog.tail(path)}" if path else " Look into the server's log."
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
        if self.behind():
            raise PitrError(_NOT_RESTARTED.format(pgdata=self._pgdata, target=self.planned().get("target")))
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
        """A pause or a shutdown at the target, told from one that somebody asked for before it."""
        planned = self.planned()
        said = serverlog.last_stop(self._pgdata, self._log_file)
        reason = logged_reason([said] if said else [], str(planned.get("target_kind", "")))
        reached = parse_reason(lsn, reason, when)
        wrong = contradiction(planned, reached) if planned and reason else ""
        if wrong and planned.get("moved_from") == lsn:
            raise PitrError(_NOT_RESTARTED.format(pgdata=self._pgdata, target=planned.get("target")))
        if wrong:
            raise PitrError(f"The recovery of {self._pgdata} did not do what was planned: {wrong}.")
        if not reason and planned:
            reason = proven_by_position(planned, lsn)
            reached = Reached(lsn, reason, last_transaction_time=when)
        if not reason or planned.get("target_action") == "promote":
            raise PitrError(
                f"The recovery of {self._pgdata} {state} at {lsn}, and it is not proven that its target was reached:"
                f" {self._silent_log()} of it. If somebody has done that before the target, resume it or start the"
                " server again."
            )
        return reached

    def _silent_log(self) -> str:
        """Why no log is proof."""
        given = [paths[0] for _kind, paths in serverlog.sources(self._pgdata, self._log_file)]
        if not given:
            return "no log was given (log_file) to tell"
        readable = serverlog.readable(self._pgdata, self._log_file)
        return f"nothing in {', '.join(readable)} tells" if readable else f"{', '.join(given)} cannot be read to tell"

    def _check_kept_out(self) -> None:
        """Whether ordinary users are really kept out, where that was planned."""
        planned = self.planned().get("hba_file")
        if not planned:
            return
        with contextlib.closing(self._login.connect()) as connection:
            used = str(query(connection, "SELECT current_setting('hba_file')")[0][0])
        if os.path.realpath(used) == os.path.realpath(planned) and keep_out.kept_file(planned):
            return
        why = f"{planned} was replaced since" if used == planned else f"the server reads {used}, not {planned}"
        raise PitrError(
            f"Ordinary users are not kept out of the restored cluster in {self._pgdata}: {why}. They may have changed"
            " it, or have seen what is not final. Keep them out, or restore with keep_out: false."
        )

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

    def behind(self) -> bool:
        """Whether the running server has another target than the one that is written down for its next start."""
        with contextlib.closing(self._login.connect()) as connection:
            rows = query(connection, "SELECT name, setting FROM pg_settings WHERE name LIKE 'recovery\\_target%%'", ())
        planned = recovery_conf.settings(self._config_dir)
        return bool(planned) and any(
            planned.get(name, value if name in _ALWAYS else "") != value for name, value in rows
        )

    def go_on(self, timeout: float) -> str:
        """Resume a paused recovery and tell what that did: empty (it was not paused), ``continued`` or ``promoted``.

        Resumed at its target PostgreSQL ends the recovery and promotes (PerformWalRecovery); before it, replay just
        goes on. Raises PitrError when it was at the target and is not promoted within ``timeout`` seconds.
        """
        if self.progress().state != "paused":
            return ""
        try:
            self._paused()
            at_target = True
        except PitrError:
            # Not proven: what it does next tells.
            at_target = False
        before = self.progress().lsn
        if not self.resume():
            return ""
        deadline = time.monotonic() + (timeout if at_target else min(timeout, 5))
        while time.monotonic() < deadline:
            progress = self.progress()
            if progress.state in ("promoted", "stopped"):
                return progress.state
            if progress.state == "replaying" and progress.lsn != before and not at_target:
                break
            time.sleep(LOOK)
        if at_target:
            raise PitrError(f"{self._login} was resumed at its target, and not promoted within {timeout:g} seconds.")
        return "continued"

    def accept(self) -> tuple[bool, list[str]]:
        """Make the recovered cluster an ordinary one again: recovery settings away, everybody let in.

        Returns whether something was changed, and the settings that a restart has still to bring into force. Raises
        PitrError when something of the recovery is left. May be repeated, whenever it was killed.
        """
        with contextlib.closing(self._login.connect()) as connection:
            hba_file = str(query(connection, "SELECT current_setting('hba_file')")[0][0])
            let_in = keep_out.let_in(hba_file)
            wrong = query(
                connection, "SELECT line_number, error FROM pg_hba_file_rules WHERE error IS NOT NULL LIMIT 1"
            )
            if wrong:
                raise PitrError(
                    f"{hba_file}, line {wrong[0][0]}: {wrong[0][1]}. The cluster is not accepted, and ordinary users"
                    " are still out, since the server has not read the file. Correct it, and accept the cluster again."
                )
            # Killed between the files and the server: there is nothing left to do but to let it read them.
            loaded = query(connection, "SELECT count(*) FROM pg_settings WHERE sourcefile LIKE %s" + _RELOADED, _OURS)
        if not recovery_conf.finish(self._config_dir, self._pgdata) and not let_in and not loaded[0][0]:
            return False, []
        pending = settings.apply(self._login, reload=True)
        self._check_ordinary()
        return True, pending

    def _check_ordinary(self) -> None:
        """Nothing of the recovery is left: no settings, no signal file, nobody kept out."""
        with contextlib.closing(self._login.connect()) as connection:
            left = query(connection, "SELECT name FROM pg_settings WHERE sourcefile LIKE %s" + _RELOADED, _OURS)
            hba_file = str(query(connection, "SELECT current_setting('hba_file')")[0][0])
        found = [row[0] for row in left]
        found += [name for name in SIGNALS if os.path.lexists(os.path.join(self._pgdata, name))]
        found += [hba_file] if keep_out.kept_file(hba_file) else []
        if found:
            raise PitrError(
                f"The cluster in {self._pgdata} is accepted, and not rid of its recovery: {', '.join(sorted(found))}. A"
                " signal file would make its next start a recovery; remove it. Then accept again."
            )


def _utc(value: datetime.datetime | None) -> str:
    return "" if value is None else value.astimezone(datetime.timezone.utc).isoformat()
