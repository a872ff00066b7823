# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A running standby: does it follow, could it take over, and does it. And an old primary that must not come back.

What is waited for is told by positions, never by time: a standby has everything of a primary that was stopped when it
has replayed the primary's shutdown checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .errors import PitrError
from .plan import Refusal, RefusedError
from .postgres import ControlData, Login, binary, control_data, data_version, query, run, running_pid
from .repository import write_atomic
from .serverlog import tail as log_tail
from .standby_look import RECOVERY_SIGNAL, STANDBY_SIGNAL
from .wal import Lsn, history_name

LOOK_SECONDS = 0.1


@dataclass(frozen=True)
class State:
    """A server as it is now. LSNs are texts, empty where there is none; ``control_*`` are of pg_control.

    ``delay``: recovery_min_apply_delay in milliseconds.
    """

    exists: bool = False
    running: bool = False
    in_recovery: bool = False
    system_identifier: str = ""
    control_state: str = ""
    timeline: int = 0
    checkpoint_lsn: str = ""
    received_lsn: str = ""
    replayed_lsn: str = ""
    known_lsn: str = ""
    receiver: str = ""
    delay: int = 0
    archive_mode: str = ""
    paused: bool = False
    signal: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For a module's result."""
        return asdict(self)


def _number(lsn: str) -> int:
    return int(Lsn.parse(lsn)) if lsn else 0


@dataclass(frozen=True)
class Bear:
    """What somebody bears in a failover: the primary answers, the standby replays late, another one has more."""

    answers: bool = False
    delayed: bool = False
    behind: bool = False


class Turn:
    """The server in one directory."""

    def __init__(self, login: Login, pgdata: str, bin_dir: str, log_file: str = "", timeout: float = 60) -> None:
        """``timeout``: seconds to wait for anything."""
        self._login = login
        self._pgdata = pgdata
        self._bin_dir = bin_dir
        self._log_file = log_file
        self._timeout = timeout

    def state(self) -> State:
        """Look. Raises PitrError when a server runs that does not answer."""
        if data_version(self._pgdata) is None:
            return State()
        control = self._control()
        facts: dict[str, Any] = {"exists": True, "signal": self._signal()}
        if control is not None:
            facts["system_identifier"] = control.system_identifier
            facts["control_state"] = control.state
            facts["timeline"] = control.timeline
            facts["checkpoint_lsn"] = str(control.checkpoint_lsn)
        if running_pid(self._pgdata) is None:
            return State(**facts)
        with contextlib.closing(self._login.connect()) as connection:
            row = query(
                connection,
                "SELECT pg_is_in_recovery(), coalesce(pg_last_wal_receive_lsn()::text, ''),"
                " coalesce(pg_last_wal_replay_lsn()::text, ''),"
                " coalesce((SELECT status FROM pg_stat_wal_receiver), ''),"
                " (SELECT setting::int FROM pg_settings WHERE name = 'recovery_min_apply_delay'),"
                " current_setting('archive_mode'),"
                " CASE WHEN pg_is_in_recovery() THEN pg_is_wal_replay_paused() ELSE false END",
            )[0]
        names = ("in_recovery", "received_lsn", "replayed_lsn", "receiver", "delay", "archive_mode", "paused")
        facts.update(zip(names, row))
        facts["known_lsn"] = max((facts["received_lsn"], facts["replayed_lsn"]), key=_number)
        return State(running=True, **facts)

    def _control(self) -> ControlData | None:
        if not os.path.exists(os.path.join(self._pgdata, "global", "pg_control")):
            return None
        return control_data(self._bin_dir, self._pgdata)

    def _signal(self) -> str:
        for name in (STANDBY_SIGNAL, RECOVERY_SIGNAL):
            if os.path.exists(os.path.join(self._pgdata, name)):
                return name.partition(".")[0]
        return ""

    def wait_attached(self) -> State:
        """Until it streams from its primary. Raises PitrError with the server's own words when it does not."""
        deadline = time.monotonic() + self._timeout
        said = ""
        while time.monotonic() < deadline:
            if running_pid(self._pgdata) is None:
                raise PitrError(f"The standby in {self._pgdata} is not running.{self._log()}")
            try:
                state = self.state()
            except PitrError as error:
                # It comes up: until it is consistent nobody gets in.
                said = f" {error.message}"
            else:
                if not state.in_recovery:
                    raise PitrError(f"The server in {self._pgdata} is a primary, not a standby.")
                if state.receiver == "streaming":
                    return state
                said = f" It has replayed to {state.replayed_lsn or 'nothing yet'}."
            time.sleep(LOOK_SECONDS)
        raise PitrError(
            f"The standby in {self._pgdata} does not stream from its primary after {self._timeout:g} seconds; it goes"
            f" on trying.{said} When the log says that WAL was removed, and the archive has it not either, stop it,"
            f" move its directory away, and let it be cloned anew.{self._log()}"
        )

    def check_ready(self, upstream: Login, max_lag: int) -> State:
        """May the primary be stopped for this standby to take over? Raises RefusedError with every reason why not.

        ``max_lag``: bytes that it may be behind the primary now.
        """
        state = self.state()
        refusals = list(self._not_ready(state))
        if not refusals:
            with contextlib.closing(upstream.connect(replication=True)) as connection:
                identifier, _timeline, lsn = query(connection, "IDENTIFY_SYSTEM")[0][:3]
            behind = int(Lsn.parse(lsn)) - int(Lsn.parse(state.replayed_lsn))
            if str(identifier) != state.system_identifier:
                refusals.append(Refusal("other_cluster", f"{upstream} is the primary of another cluster."))
            elif behind > max_lag:
                message = f"It has replayed to {state.replayed_lsn}, the primary is at {lsn}: {behind} bytes behind."
                refusals.append(Refusal("lags", message, "Wait until it has caught up, or let it be further behind."))
        if refusals:
            raise RefusedError(refusals, f"The standby in {self._pgdata} cannot take over now; nothing was touched.")
        return state

    def _not_ready(self, state: State) -> Sequence[Refusal]:
        if not state.running or not state.in_recovery:
            what = "not running" if not state.running else "a primary already"
            return [Refusal("not_a_standby", f"The server in {self._pgdata} is {what}.")]
        found = []
        if state.receiver != "streaming":
            message = f"It does not stream from the primary (the WAL receiver is {state.receiver or 'not there'})."
            found.append(Refusal("not_attached", message, "The playbook standby attaches it, or tells what is wrong."))
        found += self._held_back(state)
        if state.archive_mode == "off":
            message = "It would not archive as a primary: archive_mode is off."
            found.append(Refusal("not_archiving", message, "The playbook standby sets that."))
        return found

    def _held_back(self, state: State) -> Sequence[Refusal]:
        found = []
        if state.delay > 0:
            message = f"It replays {state.delay / 1000:g} s late on purpose (recovery_min_apply_delay)."
            found.append(Refusal("delayed", message, "Take another standby, or set standby_apply_delay to 0 first."))
        if state.paused:
            found.append(Refusal("paused", "Its replay is paused.", "SELECT pg_wal_replay_resume()"))
        return found

    def check_failover(self, upstream: Login, others: Mapping[str, str], bear: Bear) -> State:
        """May this standby become the primary although nobody has stopped the old one for it?

        ``others``: how far each other one is that could be promoted or restored from, by name. Raises RefusedError.
        """
        state = self.state()
        refusals: list[Refusal] = []
        if not state.running or not state.in_recovery:
            what = "not running" if not state.running else "a primary already"
            refusals.append(Refusal("not_a_standby", f"The server in {self._pgdata} is {what}."))
        else:
            refusals += [each for each in self._held_back(state) if not (bear.delayed and each.code == "delayed")]
            ahead = {name: lsn for name, lsn in others.items() if _number(lsn) > _number(state.known_lsn)}
            if ahead and not bear.behind:
                told = ", ".join(f"{name} ({lsn})" for name, lsn in sorted(ahead.items()))
                refusals.append(
                    Refusal(
                        "behind",
                        f"It has WAL to {state.known_lsn or 'nowhere'}, and there is more with {told}.",
                        "Promote the standby that has most. What only the receiver has, a restore brings back"
                        " (restore_use_partial). Or bear the loss: promote_although_behind.",
                    )
                )
        if not bear.answers and self._answers(upstream):
            refusals.append(
                Refusal(
                    "primary_answers",
                    f"The primary {upstream.host or upstream.unix_socket}:{upstream.port} still answers. Two servers"
                    " that take writes cannot be put together again.",
                    "If it lives, use the playbook switchover. Otherwise stop it for good first, or set"
                    " promote_although_primary_answers.",
                )
            )
        if refusals:
            raise RefusedError(refusals, f"The standby in {self._pgdata} was not promoted; nothing was touched.")
        return state

    def _answers(self, upstream: Login) -> bool:
        """Whether anything listens there as PostgreSQL does; a refused login is an answer, too (pg_isready)."""
        argv = [binary(self._bin_dir, "pg_isready"), "-q", "-t", "5", "-p", str(upstream.port)]
        argv += ["-h", upstream.host or upstream.unix_socket]
        try:
            run(argv, timeout=30)
        except PitrError as error:
            # 1: it rejects connections (it starts or stops), 2: no response (pg_isready.c).
            return error.detail.get("rc") != 2
        return True

    def promote(self, shutdown_lsn: str, restore_command: Sequence[str], although_no_archive: bool) -> tuple[bool, int]:
        """Promote it, and return (whether that was a change, its timeline).

        Raises PitrError; it is a standby still when its detail says ``still_standby``, and may be none otherwise.

        ``shutdown_lsn``: position of the old primary's shutdown checkpoint, which has to be replayed first; empty for
        everything that can be had. ``restore_command``: an argv of pitr-wal get, to which a name and a path are added.
        """
        state = self.state()
        if state.running and not state.in_recovery:
            return False, self._timeline()
        try:
            if not state.running:
                raise PitrError(f"The standby in {self._pgdata} is not running, so that it cannot be promoted.")
            if shutdown_lsn:
                self._wait_replayed(Lsn.parse(shutdown_lsn))
            if restore_command and not although_no_archive:
                self._check_archive(restore_command, state.timeline)
        except PitrError as error:
            # Told explicitly: from here on it may have been promoted, whatever fails.
            raise PitrError(error.message, still_standby=True) from None
        with contextlib.closing(self._login.connect()) as connection:
            done = query(connection, "SELECT pg_promote(true, %s)", (max(int(self._timeout), 1),))[0][0]
        if not done:
            raise PitrError(
                f"The standby in {self._pgdata} has not ended its recovery within {self._timeout:g} seconds; it"
                f" goes on. Run it again.{self._log()}"
            )
        return True, self._timeline()

    def _wait_replayed(self, checkpoint: Lsn) -> None:
        deadline = time.monotonic() + self._timeout
        while True:
            replayed = self.state().replayed_lsn
            # The checkpoint's record begins there, and what is replayed ends behind it.
            if replayed and Lsn.parse(replayed) > checkpoint:
                return
            if time.monotonic() > deadline:
                raise PitrError(
                    f"The standby in {self._pgdata} has replayed to {replayed or 'nothing'}, and the primary's shutdown"
                    f" checkpoint at {checkpoint} has not come within {self._timeout:g} seconds. It was not promoted."
                )
            time.sleep(LOOK_SECONDS)

    def _check_archive(self, restore_command: Sequence[str], timeline: int) -> None:
        """The archive can be asked: without an answer a promoted standby could take a timeline that others have."""
        path = os.path.join(self._pgdata, "pg_wal", "RECOVERYHISTORY.pitr")
        try:
            run([*restore_command, history_name(timeline + 1), path])
        except PitrError as error:
            if error.detail.get("rc") != 1:
                raise PitrError(
                    f"The archive cannot be asked which timelines there are: {error.message} The standby in"
                    f" {self._pgdata} was not promoted. Mend that, or set promote_without_archive."
                ) from None
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    def _timeline(self) -> int:
        """Of a primary. Its pg_control has it only after a checkpoint."""
        with contextlib.closing(self._login.connect()) as connection:
            name = query(connection, "SELECT pg_walfile_name(pg_current_wal_insert_lsn())")[0][0]
        return int(name[:8], 16)

    def fence(self, check: bool) -> bool:
        """Let a stopped server come up as a standby at most. Returns whether that is a change.

        Raises PitrError when it is running.
        """
        state = self.state()
        if not state.exists or state.signal == "standby":
            return False
        if state.running:
            raise PitrError(f"A server is running in {self._pgdata}. Stop it first; it was not fenced.")
        if not check:
            write_atomic(os.path.join(self._pgdata, STANDBY_SIGNAL), b"")
        return True

    def drop_slots(self, names: Sequence[str], check: bool) -> list[str]:
        """Drop physical slots of these names that nobody uses: on a standby they would keep WAL for ever."""
        if not names:
            return []
        with contextlib.closing(self._login.connect()) as connection:
            found = query(
                connection,
                "SELECT slot_name FROM pg_replication_slots WHERE slot_type = 'physical' AND NOT active"
                " AND slot_name = ANY(%s) ORDER BY 1",
                (list(names),),
            )
            for row in found if not check else []:
                query(connection, "SELECT pg_drop_replication_slot(%s)", row)
        return [str(row[0]) for row in found]

    def _log(self) -> str:
        return f"\nLast lines of {self._log_file}:\n{log_tail(self._log_file)}" if self._log_file else ""
