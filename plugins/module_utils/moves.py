# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The target of a recovery under way is moved on: no new base backup, only the WAL in between.

PostgreSQL allows that (``recovery_target_action`` in the section "Recovery Target"): shut down, change the target to a
later one, start again. It goes back to its last restartpoint, replays what it had replayed, and must be consistent
again before it meets the target; a target before that is a FATAL "requested recovery stop point is before consistent
recovery point". So a target may only lie where the recovery has not been yet, and the WAL that counts begins at the
restartpoint.
"""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from . import recovery_conf
from .catalog import Backup
from .errors import PitrError
from .index import ArchiveIndex, scan
from .instance import Instance
from .locate import Locator
from .plan import Location, Refusal, RefusedError, plan, target_timeline
from .postgres import ControlData, Login, control_data, effective_setting
from .reach import reachable_end, spans_from
from .recovery import Progress, Recovery, replayed_timeline
from .repository import ClusterFolder
from .target import RecoveryTarget
from .timeline import Span
from .wal import Lsn
from .waldump import WalScanner

UNTOUCHED = "The move is refused; nothing was changed, and the recovery stands where it stood."
AGAIN = "A recovery only goes forward; restore again with this target."


@dataclass(frozen=True)
class Request:
    """What is wanted. ``target_options`` with PostgreSQL's names; those left out stay as they were planned."""

    login: Login
    pgdata: str
    bin_dir: str
    repository: str
    cluster: str
    config_dir: str = ""
    log_file: str = ""
    identity: str = ""
    ssh: Mapping[str, str] = field(default_factory=dict)
    target_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def configuration(self) -> str:
        """Directory of postgresql.conf."""
        return self.config_dir or self.pgdata


@dataclass(frozen=True)
class Moved:
    """``plan`` is the new document; ``position`` where the recovery stands; ``restart``: the server still has to."""

    plan: dict[str, Any]
    position: str
    changed: bool
    restart: bool


class Move:
    """One move of one recovery."""

    def __init__(self, request: Request) -> None:
        self._request = request
        recovery = Recovery(request.login, request.pgdata, request.bin_dir, request.config_dir, request.log_file)
        self._recovery = recovery
        self._planned = recovery.planned()

    def perform(self, check: bool = False) -> Moved:
        """Write the new target. Raises RefusedError, or PitrError when there is no recovery of ours.

        The server has to be started again by whoever owns it; until then it stands at its old target.
        """
        if not self._planned:
            raise PitrError(
                f"No recovery of this collection is under way in {self._request.pgdata}: it was accepted, or it was"
                " restored by other means. There is no target to move."
            )
        progress = self._recovery.progress()
        control = control_data(self._request.bin_dir, self._request.pgdata)
        position = self._position(progress, control)
        target = self._target()
        document = self._document(target, position, control)
        settings = self._settings(target, int(document["timeline"]))
        running = progress.state != "stopped"
        if settings == recovery_conf.settings(self._request.configuration):
            return Moved(self._planned, str(position), False, running and self._recovery.behind())
        if not check:
            raised = self._raised(control)
            if raised:
                document["raised"] = {**document.get("raised", {}), **raised}
            recovery_conf.write(self._request.configuration, self._request.pgdata, {**settings, **raised}, document)
        return Moved(document, str(position), True, running)

    def _refuse(self, code: str, message: str, nearest: str = "") -> RefusedError:
        return RefusedError([Refusal(code, message, nearest)], UNTOUCHED)

    def _position(self, progress: Progress, control: ControlData) -> Lsn:
        """The end of what was replayed: nothing before it can be a target any more."""
        pgdata = self._request.pgdata
        if progress.state == "paused":
            return Lsn.parse(progress.lsn)
        if progress.state == "promoted":
            raise self._refuse("promoted", f"The server in {pgdata} is promoted; its recovery is over.", AGAIN)
        if progress.state != "stopped":
            message = f"The server in {pgdata} is not paused but {progress}, and would have gone on meanwhile."
            raise self._refuse("not_paused", message, "SELECT pg_wal_replay_pause(), or stop it first.")
        if control.state not in ("in archive recovery", "shut down in recovery"):
            message = f"{pgdata} is not in recovery: pg_control says '{control.state}'."
            raise self._refuse("not_in_recovery", message, "Start it, so that its recovery begins, or restore again.")
        # Whatever was replayed beyond that is not on disk, and will be replayed anew.
        least = Lsn.parse(control.text("Minimum recovery ending location"))
        return max(least, Lsn.parse(str(self._planned["consistent_lsn"])))

    def _target(self) -> RecoveryTarget:
        """What is asked for, with the planned action and timeline where none was given."""
        options = {
            "recovery_target_action": self._planned.get("target_action"),
            "recovery_target_timeline": str(self._planned["timeline"]),
        }
        options.update({name: value for name, value in self._request.target_options.items() if value is not None})
        try:
            return RecoveryTarget.from_options(options)
        except PitrError as error:
            raise self._refuse("target", error.message) from None

    def _document(self, target: RecoveryTarget, position: Lsn, control: ControlData) -> dict[str, Any]:
        """The plan of the rest of the way."""
        planned = self._planned
        asked = (target.kind, target.value, target.inclusive, target.timeline)
        old = (*(planned[f"target_{name}"] for name in ("kind", "value", "inclusive")), str(planned["timeline"]))
        if asked == old:
            # The place is the same, and what happens there is another question.
            return {**planned, "target_action": target.action}
        if target.kind == "immediate":
            message = f"The recovery is consistent since LSN {planned['consistent_lsn']} and stands at {position}."
            raise self._refuse("target_passed", message, AGAIN)
        try:
            access = {**self._request.ssh, "identity": self._request.identity}
            folder = ClusterFolder.open(self._request.repository, self._request.cluster, access)
            chapter = folder.require(control.system_identifier)
            index = scan(folder, chapter)
            here = self._here(target, position, control)
            timeline = target_timeline(replace(target, timeline=self._number(target)), index.tree, [here], "auto")
            if not index.tree.contains(timeline, here.timeline, position):
                message = (
                    f"The recovery stands at LSN {position} of timeline {here.timeline}, which is not part of the past"
                    f" of timeline {timeline}."
                )
                raise self._refuse("timeline_other", message, AGAIN)
            scanner = WalScanner(folder, chapter, index, self._request.bin_dir)
            location, last_commit = self._locate(target, scanner, index, here, timeline)
            if location is not None:
                self._check_forward(target, location.lsn, position)
            elif target.lsn is not None:
                self._check_forward(target, target.lsn, position)
            numbered = replace(target, timeline=str(timeline))
            result = plan([here], index, numbered, "auto", {}, location, last_commit)
        except RefusedError as error:
            raise RefusedError(error.refusals, UNTOUCHED) from None
        except PitrError as error:
            raise self._refuse("repository", error.message) from None
        stop = location.lsn if location is not None else target.lsn
        kept = ("backup", "chain", "backup_timeline", "backup_bytes", "consistent_lsn")
        return {
            **planned,
            **{name: value for name, value in result.to_dict().items() if name not in kept},
            "target_lsn": str(stop) if stop is not None else None,
            "moved_from": str(position),
            "moves": [*planned.get("moves", []), {"target": planned.get("target"), "lsn": str(position)}],
            "started_at": time.time(),
        }

    def _number(self, target: RecoveryTarget) -> str:
        return str(self._planned["timeline"]) if target.timeline == "current" else target.timeline

    def _here(self, target: RecoveryTarget, position: Lsn, control: ControlData) -> Backup:
        """Where the way begins, as if a backup had ended here: the rest of it is planned like a restore."""
        redo = Lsn.parse(control.text("Latest checkpoint's REDO location"))
        now = datetime.datetime.now(datetime.timezone.utc)
        return Backup(
            label=str(self._planned["backup"]),
            type="full",
            system_identifier=control.system_identifier,
            postgresql_version=0,
            wal_segment_size=control.wal_segment_size,
            timeline=replayed_timeline(self._planned, position) or control.timeline,
            start_lsn=redo,
            stop_lsn=position,
            started_at=now,
            # Whether a time lies before is told by where it is in the WAL, not by clocks.
            stopped_at=target.time or now,
            database_bytes=int(self._planned.get("backup_bytes") or 0),
            compression="",
            verified="",
            files=(),
        )

    def _locate(
        self, target: RecoveryTarget, scanner: WalScanner, index: ArchiveIndex, here: Backup, timeline: int
    ) -> tuple[Location | None, datetime.datetime | None]:
        """Where PostgreSQL would stop, from the restartpoint on; for a time also the last transaction's."""
        if target.kind in ("latest", "lsn"):
            return None, None
        if target.time is None:
            found = Locator(scanner, index, timeline, [here]).find(target)
            if found.location is None:
                message = f"The target {target} is not in the archived WAL of timeline {timeline} from LSN"
                message += f" {here.start_lsn} on, where this recovery would begin again."
                nearest = f"{found.nearby} If it is older: {AGAIN[0].lower()}{AGAIN[1:]}".strip()
                raise self._refuse("target_not_in_archive", message, nearest)
            return found.location, None
        spans: list[Span] = spans_from(here.start_lsn, index.tree, timeline)
        last, _count, missing = reachable_end(here, index, timeline)
        if missing:
            last = min(number for _timeline, number in missing) - 1
        latest = None
        for record in scanner.records(spans, last, ("Transaction",)):
            if record.time is None:
                continue
            if target.stops_before(record.time):
                return Location(record.lsn, record.timeline, record.time), record.time
            latest = record.time
        return None, latest or target.time - datetime.timedelta(microseconds=1)

    def _check_forward(self, target: RecoveryTarget, lsn: Lsn, position: Lsn) -> None:
        """A target lies where the recovery has not been. An exclusive LSN that is the position would be no move."""
        if lsn > position or (lsn == position and not (target.kind == "lsn" and not target.inclusive)):
            return
        message = f"The target {target} lies at LSN {lsn}, and the recovery stands at {position}, behind it."
        raise self._refuse("target_passed", message, AGAIN)

    def _settings(self, target: RecoveryTarget, timeline: int) -> dict[str, str]:
        """The include file's settings with the new target in place of the old one."""
        old = recovery_conf.settings(self._request.configuration)
        kept = {name: value for name, value in old.items() if not name.startswith("recovery_target")}
        return {**kept, **target.settings(timeline)}

    def _raised(self, control: ControlData) -> dict[str, str]:
        """Settings that the primary has raised in the WAL that was replayed; the next start demands them."""
        request = self._request
        return {
            name: str(floor)
            for name, floor in control.floors.items()
            if int(effective_setting(request.bin_dir, request.configuration, name)) < floor
        }


def stop(recovery: Recovery, pgdata: str, bin_dir: str, timeout: float) -> bool:
    """Shut a recovering server down, so that it can be started again and goes on. Returns whether it was running.

    Raises PitrError when it is promoted, or does not stop cleanly within ``timeout`` seconds.
    """
    state = recovery.progress().state
    if state == "promoted":
        raise PitrError(f"The server in {pgdata} is promoted; there is no recovery to stop. It was left alone.")
    if state != "stopped":
        Instance(bin_dir, pgdata, "", timeout).stop("fast")
    after = control_data(bin_dir, pgdata).state
    if after != "shut down in recovery" or not os.path.exists(os.path.join(pgdata, "recovery.signal")):
        raise PitrError(
            f"{pgdata} was not shut down in recovery: pg_control says '{after}'. Start it again, and look into its log."
        )
    return state != "stopped"
