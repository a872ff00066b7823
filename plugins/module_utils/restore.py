# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A restore is done: planned (planning.py), executed, and later settled or undone.

Until :meth:`Restore.execute` nothing is changed anywhere. A failed execution puts the old directory back; a killed
one leaves the old directory beside the new one, and a directory that no server can start from, which the next try
recognises (unfinished.py).
"""

from __future__ import annotations

import contextlib
import datetime
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from . import extract, locks, rates, recovery_conf, tail
from .deadwal import REMEMBERED, dead_pgdata
from .errors import PitrError
from .index import scan
from .plan import RestorePlan
from .planning import Planner
from .postgres import binary, control_data, run, running_pid, shell_command
from .receiver import ACCEPTED
from .repository import BEING_REMOVED
from .request import Request
from .tree import fsync_directory
from .unfinished import IN_PROGRESS, Marker, empty, left_behind, remove_incomplete, unaccepted
from .wal import WalFile


@dataclass(frozen=True)
class Result:
    """What was done. ``moved_aside`` is where the old directory is now, or empty. ``seconds`` of the copy."""

    plan: RestorePlan
    moved_aside: str
    seconds: float


class Restore:
    """One restore of one cluster into one data directory."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._planner = Planner(request)

    def plan(self) -> RestorePlan:
        """Decide without touching anything. Raises RefusedError with every reason that can be known now."""
        return self._planner.plan()

    def _bring_tail(self, result: RestorePlan, moved_aside: str) -> None:
        """Copy what is not archived yet into pg_wal, and look again how far it reaches."""
        beyond = self._planner.beyond
        if moved_aside:
            beyond.moved(self._request.pgdata, moved_aside)
        if not result.from_elsewhere or beyond.used is None:
            return
        pg_wal = os.path.join(self._request.pgdata, "pg_wal")
        os.makedirs(pg_wal, mode=0o700, exist_ok=True)
        chapter = self._planner.chapter
        for name in result.from_elsewhere:
            tail.copy(self._planner.folder, chapter, beyond.used, name, os.path.join(pg_wal, name))
        index = scan(self._planner.folder, chapter)
        for name in result.from_elsewhere:
            wal_file = WalFile.parse(name)
            number = wal_file.number(index.segment_size)
            if not index.has(wal_file.timeline, number):
                index.add(wal_file.timeline, number)
        reach = beyond.reach(index, pg_wal)
        if result.at_least is not None and (reach is None or reach < result.at_least):
            raise PitrError(
                f"Segments have changed since the plan was made: {', '.join(result.from_elsewhere)} had a"
                f" record at LSN {result.at_least}, and reach to {reach} now. Plan again."
            )

    def execute(self, result: RestorePlan) -> Result:
        """Perform the plan. Raises PitrError; then the old directory is where it was."""
        lease = self._claim(result.backup.label)
        try:
            with contextlib.ExitStack() as stack:
                for link in result.chain:
                    stack.enter_context(locks.reading(self._planner.folder, link.label))
                    stored = os.path.join(self._planner.folder.backups_path, link.label)
                    if not self._planner.folder.tree.exists(stored):
                        raise PitrError(
                            f"{stored} was removed by an expire since the plan was made. Nothing was touched; plan"
                            " again."
                        )
                return self._execute(result, lease)
        except BaseException:
            locks.release(self._planner.folder, lease)
            raise

    def _claim(self, label: str) -> str:
        """A lease on the backup and the WAL behind it, until a recovery asks for no more WAL."""
        lease = locks.new_lease(label)
        self._claimed_at = time.monotonic()
        # A repository that this host may only read is restored from all the same; docs/retention.md tells what follows.
        try:
            self._planner.folder.touch_lease(lease)
        except OSError:
            pass
        except PitrError as error:
            if BEING_REMOVED in error.message:
                raise PitrError(f"{error.message} Nothing was touched; plan again.") from None
        return lease

    def _execute(self, result: RestorePlan, lease: str) -> Result:
        started = time.monotonic()
        pgdata = self._request.pgdata
        was_there = os.path.isdir(pgdata)
        dead = dead_pgdata(self._request, self._planner.chapter.system_identifier)
        moved_aside = self._clear()
        moved_aside = self._move_aside() or moved_aside
        locations = self._request.locations(result.backup)
        self._noted = {
            **result.to_dict(),
            REMEMBERED: moved_aside if dead == pgdata else dead,
            "rates": rates.path_of(self._planner.folder),
        }
        progress = None
        try:
            os.makedirs(pgdata, mode=0o700, exist_ok=True)
            os.chmod(pgdata, 0o700)
            progress = Marker(
                os.path.join(pgdata, IN_PROGRESS), result.backup, moved_aside, locations, self._noted[REMEMBERED]
            )
            stored = os.path.join(self._planner.folder.backups_path, result.backup.label)
            extract.extract(
                result.backup, stored, pgdata, locations, self._renewing(progress, lease), self._planner.folder.tree
            )
            if self._request.verify:
                extract.verify(result.backup, stored, pgdata, self._request.bin_dir, self._planner.folder.tree)
            extract.rewrite_tablespace_map(pgdata, result.backup.tablespaces, locations)
            self._bring_tail(result, moved_aside)
            recovery_conf.write(
                self._request.configuration,
                pgdata,
                self._settings(result, lease),
                {**self._noted, "started_at": time.time()},
            )
            self._place_control(pgdata)
            self._check_effective(result, lease)
        except BaseException:
            self._put_back(moved_aside, locations, progress, was_there)
            raise
        seconds = time.monotonic() - started
        rates.add(self._noted["rates"], "copy", result.backup.database_bytes, seconds)
        return Result(result, moved_aside, round(seconds, 3))

    def _renewing(self, progress: Marker, lease: str) -> Callable[[int], None]:
        """Counts bytes, and renews the lease every minute of a long copy."""

        def add(count: int) -> None:
            progress.add(count)
            if time.monotonic() - self._claimed_at > 60:
                self._claimed_at = time.monotonic()
                with contextlib.suppress(OSError, PitrError):
                    self._planner.folder.touch_lease(lease)

        return add

    def _clear(self) -> str:
        """Remove what a killed restore, or one that nobody wants to keep, has left.

        Returns where the killed one had put the old directory.
        """
        pgdata = self._request.pgdata
        killed = left_behind(pgdata, self._planner.chapter.system_identifier)
        if killed is None:
            if not self._request.keep_unaccepted and unaccepted(self._request):
                shutil.rmtree(pgdata)
            return ""
        for location in killed.get("locations", []):
            empty(location)
        remove_incomplete(pgdata)
        old = str(killed.get("moved_aside") or "")
        return old if os.path.isdir(old) else ""

    def _move_aside(self) -> str:
        pgdata = self._request.pgdata
        if not os.path.isdir(pgdata) or not os.listdir(pgdata):
            return ""
        stamp = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%S")
        aside = f"{pgdata}.old-{stamp}"
        while os.path.lexists(aside):
            aside += "x"
        os.rename(pgdata, aside)
        fsync_directory(os.path.dirname(pgdata))
        return aside

    def _put_back(
        self, moved_aside: str, locations: Mapping[int, str], progress: Marker | None, was_there: bool
    ) -> None:
        """After a failure: remove what this try has written and give the old directory its name back."""
        pgdata = self._request.pgdata
        if progress is not None:
            # A kill from here on leaves a directory that the next try recognises.
            with contextlib.suppress(OSError):
                progress.write()
        with contextlib.suppress(OSError):
            os.unlink(os.path.join(pgdata, extract.PG_CONTROL))
        for location in locations.values():
            # They were empty before (see _check_host), so whatever is in them came from this try.
            empty(location)
        recovery_conf.discard(self._request.configuration)
        remove_incomplete(pgdata)
        if moved_aside:
            os.rename(moved_aside, pgdata)
        elif was_there and not os.path.exists(pgdata):
            os.makedirs(pgdata, mode=0o700)

    def _settings(self, result: RestorePlan, lease: str) -> dict[str, str]:
        """The content of the include file."""
        request = self._request
        fetch = [request.wal_command, "get", f"--system-identifier={result.backup.system_identifier}"]
        if request.identity:
            fetch.append(f"--identity={request.identity}")
        fetch += [f"--lease={lease}", request.cluster]
        settings = {
            **result.target.settings(result.timeline),
            "restore_command": shell_command(fetch, ["%f", "%p"]),
            "hot_standby": "on",
            # Where a recovery is paused or shut down is told by the log alone, and it must be understood.
            "lc_messages": "C",
        }
        if request.archive_after != "same":
            # Receivers keep away (receiver.py), so that nothing of an unaccepted cluster enters the archive; and no
            # commit waits for them.
            settings[ACCEPTED] = "off"
            settings["synchronous_standby_names"] = ""
        if request.archive_after == "off":
            settings["archive_mode"] = "off"
        elif request.archive_after == "none-until-promoted":
            # Segments wait in pg_wal until the cluster is accepted; then nothing is missing, the history file neither.
            settings["archive_mode"] = "on"
            settings["archive_library"] = ""
            settings["archive_command"] = shell_command([request.wal_command, "hold", request.cluster], ["%p"])
        return settings

    def _place_control(self, pgdata: str) -> None:
        """The last step: only now can a server start here."""
        os.rename(os.path.join(pgdata, extract.HELD_BACK), os.path.join(pgdata, extract.PG_CONTROL))
        fsync_directory(os.path.join(pgdata, "global"))
        os.unlink(os.path.join(pgdata, IN_PROGRESS))
        fsync_directory(pgdata)

    def _check_effective(self, result: RestorePlan, lease: str) -> None:
        """Ask the server's own parser what it would use; raise floors that pg_control demands (design rule 7)."""
        request = self._request
        floors = control_data(request.bin_dir, request.pgdata).floors
        raised = {}
        for name, floor in floors.items():
            if int(self._effective(name)) < floor:
                raised[name] = str(floor)
        expected = self._settings(result, lease)
        if raised:
            recovery_conf.write(
                request.configuration,
                request.pgdata,
                {**expected, **raised},
                {**self._noted, "started_at": time.time(), "raised": raised},
            )
        for name in ("restore_command", "recovery_target_timeline", "archive_mode", *raised):
            value = self._effective(name)
            if name in expected and value != expected[name]:
                raise PitrError(
                    f"The recovery's setting of {name} has no effect: the server would use '{value}'. Something in"
                    f" {request.configuration} is read later than {recovery_conf.FILE}. Remove it there."
                )

    def _effective(self, name: str) -> str:
        argv = [binary(self._request.bin_dir, "postgres"), "-D", self._request.configuration, "-C", name]
        try:
            return run(argv).rstrip("\n")
        except PitrError as error:
            raise PitrError(
                f"The configuration in {self._request.configuration} cannot be used: {error.message}"
            ) from None


def settle(request: Request, moved_aside: str, check: bool = False) -> bool:
    """Remove the directory that a restore has moved aside, once the restored cluster was accepted.

    Returns whether there was one. Raises PitrError when the restored cluster is not accepted, or ``moved_aside`` is not
    what a restore has moved there.
    """
    pgdata = request.pgdata
    if not os.path.lexists(moved_aside):
        return False
    # Recovery settings anywhere are enough here: what is in doubt is not accepted.
    if recovery_conf.planned(request.configuration) or os.path.exists(os.path.join(pgdata, IN_PROGRESS)):
        raise PitrError(f"The restored cluster in {pgdata} is not accepted yet; {moved_aside} stays.")
    if not moved_aside.startswith(f"{pgdata}.old-") or os.path.dirname(moved_aside) != os.path.dirname(pgdata):
        raise PitrError(f"{moved_aside} is not what a restore of {pgdata} has moved aside. It stays.")
    ours = control_data(request.bin_dir, pgdata).system_identifier
    if control_data(request.bin_dir, moved_aside).system_identifier != ours or running_pid(moved_aside) is not None:
        raise PitrError(f"{moved_aside} is another cluster, or a server is running on it. It stays.")
    if not check:
        shutil.rmtree(moved_aside)
        fsync_directory(os.path.dirname(pgdata))
    return True


def undo(request: Request, moved_aside: str, check: bool = False) -> str:
    """Put the directory ``moved_aside`` back in place of a restored cluster that was not accepted.

    Returns where the restored one is kept, or the empty text when it was removed. Raises PitrError when a server is
    running, or when what lies in the way is an accepted cluster or another one.
    """
    pgdata = request.pgdata
    if not os.path.isdir(moved_aside):
        raise PitrError(f"{moved_aside} does not exist, so there is nothing to put back. {pgdata} is as it was.")
    pid = running_pid(pgdata)
    if pid is not None:
        raise PitrError(f"A server is running in {pgdata} (process {pid}). Stop it first; nothing was changed.")
    in_the_way = os.path.isdir(pgdata) and bool(os.listdir(pgdata))
    half_done = os.path.exists(os.path.join(pgdata, IN_PROGRESS))
    ours = control_data(request.bin_dir, moved_aside).system_identifier
    if in_the_way and not half_done:
        if not unaccepted(request) or control_data(request.bin_dir, pgdata).system_identifier != ours:
            raise PitrError(f"{pgdata} is not a restored cluster that waits to be accepted. It was not touched.")
    kept = ""
    if check:
        return kept
    if request.config_dir:
        recovery_conf.discard(request.config_dir)
    if in_the_way and request.keep_unaccepted:
        kept = moved_aside.replace(".old-", ".failed-") if ".old-" in moved_aside else f"{pgdata}.failed"
        os.rename(pgdata, kept)
    elif os.path.isdir(pgdata):
        shutil.rmtree(pgdata)
    os.rename(moved_aside, pgdata)
    fsync_directory(os.path.dirname(pgdata))
    return kept
