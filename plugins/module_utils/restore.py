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
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from . import combine, extract, keep_out, locks, places, rates, recovery_conf, tail
from .deadwal import REMEMBERED, dead_pgdata
from .delta import Delta, Summary, exclusive, noted, recalled
from .errors import PitrError
from .extract import IN_PROGRESS
from .index import scan
from .plan import RestorePlan
from .planning import Planner
from .postgres import control_data, effective_setting, running_pid, shell_command
from .repository import BEING_REMOVED
from .request import Request
from .tree import fsync_directory
from .unfinished import (
    Marker,
    clear_incomplete,
    empty,
    exchange,
    half_done_delta,
    has_content,
    is_vacant,
    left_behind,
    made,
    remove_incomplete,
    remove_tree,
    unaccepted,
    waiting,
)
from .upstream import ACCEPTED
from .wal import WalFile


@dataclass(frozen=True)
class Result:
    """What was done. ``moved_aside`` is where the old directory is now, or empty. ``seconds`` of the copy.

    ``delta`` tells how much was kept when a directory was changed in place.
    """

    plan: RestorePlan
    moved_aside: str
    seconds: float
    delta: Summary | None = None


class Restore:
    """One restore of one cluster into one data directory."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._planner = Planner(request)
        self._hba_file = ""
        # Where the server has died whose pg_wal is used (deadwal.py), also by a later restore in place of this one.
        self._dead = ""
        # What tells files of this backup apart where its manifest does not (delta.noted).
        self._noted: dict[str, Any] = {}
        # Name of the lease on the backup, once there is one; see locks.py.
        self.lease = ""

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
                return self._execute_delta(result, lease) if result.in_place else self._execute(result, lease)
        except BaseException:
            locks.release(self._planner.folder, lease)
            raise

    def _claim(self, label: str) -> str:
        """A lease on the backup and the WAL behind it, until a recovery asks for no more WAL."""
        lease = self.lease = locks.new_lease(label)
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
        self._dead = dead_pgdata(self._request, self._planner.chapter.system_identifier)
        moved_aside = self._clear(result)
        locations = self._request.locations(result.backup)
        wal = self._planner.wal_directory
        total = sum(link.database_bytes for link in result.chain)
        moved_aside = self._move_aside(result, total) or moved_aside
        progress = None
        try:
            with made(pgdata):
                path = os.path.join(pgdata, IN_PROGRESS)
                progress = Marker(path, result.backup, moved_aside, locations, total, wal, dead_pgdata=self._dead)
            places.link_wal(pgdata, wal)
            self._bring_files(result, locations, self._renewing(progress, lease))
            self._complete(result, locations, lease, moved_aside, lambda: extract.settle(pgdata, *locations.values()))
        except BaseException:
            self._put_back(moved_aside, locations, progress, was_there)
            if progress is not None:
                places.clear_wal(wal)
            raise
        seconds = time.monotonic() - started
        rates.add(rates.path_of(self._planner.folder), "copy", result.backup.directory_bytes, seconds)
        return Result(result, moved_aside, round(seconds, 3))

    def _bring_files(self, result: RestorePlan, locations: dict[int, str], add: Callable[[int], None]) -> None:
        """The backup, or what its chain comes to, with pg_control held back; verified when that is wanted."""
        request = self._request
        folder = self._planner.folder
        if len(result.chain) > 1:
            combination = combine.Combination(
                result.chain, folder.backups_path, request.pgdata, locations, request.bin_dir, add, folder.tree
            )
            combination.perform(request.verify)
            return
        stored = os.path.join(folder.backups_path, result.backup.label)
        extract.extract(result.backup, stored, request.pgdata, locations, add, folder.tree)
        if request.verify:
            with extract.settling(request.pgdata, *locations.values()):
                extract.verify(result.backup, stored, request.pgdata, request.bin_dir, folder.tree)

    def _complete(
        self,
        result: RestorePlan,
        locations: Mapping[int, str],
        lease: str,
        moved_aside: str,
        settle: Callable[[], None],
    ) -> None:
        """All files of the backup are there: what the recovery needs beside them, and pg_control last.

        ``settle`` puts the files on stable storage.
        """
        pgdata = self._request.pgdata
        extract.rewrite_tablespace_map(pgdata, result.backup.tablespaces, dict(locations))
        places.check_links(pgdata, locations, self._planner.wal_directory)
        self._bring_tail(result, moved_aside)
        if len(result.chain) == 1:
            self._noted = noted(result.backup, pgdata)
        self._write_settings(result, lease)
        self._keep_out(result, lease)
        settle()
        self._place_control(pgdata)
        self._check_effective(result, lease)

    def _execute_delta(self, result: RestorePlan, lease: str) -> Result:
        """Change the directory in place. What fails, or is killed, half-way is for the next delta restore."""
        started = time.monotonic()
        pgdata = self._request.pgdata
        locations = self._request.locations(result.backup)
        stored = os.path.join(self._planner.folder.backups_path, result.backup.label)
        tree = self._planner.folder.tree
        told = recalled(result.backup, recovery_conf.planned(self._request.configuration))
        work = Delta(result.backup, stored, pgdata, locations, self._request.bin_dir, tree, told)
        with exclusive(pgdata):
            killed = left_behind(pgdata, self._planner.chapter.system_identifier)
            comparison = work.compare(lambda: self._renew(lease))
            pid = running_pid(pgdata)
            if pid is not None:
                raise PitrError(
                    f"A server was started in {pgdata} (process {pid}) since the plan was made. Nothing was touched."
                )
            moved_aside = str((killed or {}).get("moved_aside") or "")
            path = os.path.join(pgdata, IN_PROGRESS)
            progress = Marker(path, result.backup, moved_aside, locations, delta=True)
            try:
                work.hold(comparison)
                os.chmod(pgdata, 0o700)
                work.clear(comparison)
                work.write(comparison, self._renewing(progress, lease))
                summary = work.verify(comparison, self._request.verify)
                self._complete(result, locations, lease, "", lambda: work.settle(comparison))
            except BaseException as error:
                # No server may start from this; and the next try must know it.
                with contextlib.suppress(OSError):
                    progress.write()
                if os.path.exists(path):
                    with contextlib.suppress(OSError):
                        os.unlink(os.path.join(pgdata, extract.PG_CONTROL))
                recovery_conf.discard(self._request.configuration)
                if isinstance(error, (PitrError, OSError)):
                    raise self._half_done(error) from error
                raise
        return Result(result, moved_aside, round(time.monotonic() - started, 3), summary)

    def _half_done(self, error: PitrError | OSError) -> PitrError:
        said = error.message if isinstance(error, PitrError) else f"{error.filename or 'The system'}: {error.strerror}."
        detail = error.detail if isinstance(error, PitrError) else {}
        return PitrError(
            f"{said} {self._request.pgdata} was being changed in place: it is half done, and no server can start from"
            " it. Mend the cause and repeat the restore with delta, or restore with force and without delta, which"
            " moves it aside.",
            **detail,
        )

    def _renewing(self, progress: Marker, lease: str) -> Callable[[int], None]:
        """Counts bytes, and renews the lease every minute of a long copy."""

        def add(count: int) -> None:
            progress.add(count)
            self._renew(lease)

        return add

    def _renew(self, lease: str) -> None:
        if time.monotonic() - self._claimed_at > 60:
            self._claimed_at = time.monotonic()
            with contextlib.suppress(OSError, PitrError):
                self._planner.folder.touch_lease(lease)

    def _clear(self, result: RestorePlan) -> str:
        """Remove what a killed restore, or one that nobody wants to keep, has left; all but the marker.

        Returns where the killed one had put the old directory.
        """
        pgdata = self._request.pgdata
        killed = left_behind(pgdata, self._planner.chapter.system_identifier)
        if killed is None or half_done_delta(killed):
            # What a delta restore has left is somebody's data directory; it is moved aside like any other.
            if killed is None and not self._request.keep_unaccepted and unaccepted(self._request):
                wal = _made_wal(self._request)
                # From here on a kill leaves a killed restore, which remembers what this one did.
                Marker(os.path.join(pgdata, IN_PROGRESS), result.backup, "", {}, pg_wal=wal, dead_pgdata=self._dead)
                os.unlink(os.path.join(pgdata, extract.PG_CONTROL))
                clear_incomplete(pgdata)
                places.clear_wal(wal)
            return ""
        if is_vacant(pgdata):
            # It was killed between its two renames.
            os.rename(waiting(pgdata), pgdata)
        for location in killed.get("locations", []):
            empty(location)
        places.clear_wal(killed.get("pg_wal", ""))
        clear_incomplete(pgdata)
        old = str(killed.get("moved_aside") or "")
        return old if os.path.isdir(old) else ""

    def _move_aside(self, result: RestorePlan, total: int) -> str:
        pgdata = self._request.pgdata

        def mark(path: str, aside: str) -> None:
            if self._dead == pgdata:
                self._dead = aside
            Marker(path, result.backup, aside, {}, total, dead_pgdata=self._dead)

        return exchange(pgdata, mark)

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
        if moved_aside:
            clear_incomplete(pgdata)
            os.rename(pgdata, waiting(pgdata))
            os.rename(moved_aside, pgdata)
            remove_incomplete(waiting(pgdata))
            return
        remove_incomplete(pgdata)
        if was_there and not os.path.exists(pgdata):
            os.makedirs(pgdata, mode=0o700)

    def _settings(self, result: RestorePlan, lease: str) -> dict[str, str]:
        """The content of the include file."""
        request = self._request
        fetch = [request.wal_command, "get", f"--system-identifier={result.backup.system_identifier}"]
        if request.identity:
            fetch.append(f"--identity={request.identity}")
        fetch += [f"--lease={lease}", request.cluster]
        command = shell_command(fetch, ["%f", "%p"])
        targets = result.target.settings(result.timeline)
        if _is_its_own_end(result):
            # Only history files, which it needs for the number of its new timeline.
            command = f'case "%f" in *.history) {command} ;; *) exit 1 ;; esac'
            del targets["recovery_target"]
        settings = {
            **targets,
            "restore_command": command,
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

    def _recorded(self, result: RestorePlan) -> dict[str, Any]:
        """What the recovery is to be compared with."""
        locations = self._request.locations(result.backup)
        recorded = {**result.to_dict(), "started_at": time.time(), "pg_wal": self._planner.wal_directory}
        recorded["noted"] = self._noted
        recorded[REMEMBERED] = self._dead
        recorded["rates"] = rates.path_of(self._planner.folder)
        recorded["tablespaces"] = {str(oid): location for oid, location in locations.items()}
        if _is_its_own_end(result):
            recorded["target_kind"] = "latest"
        return recorded

    def _write_settings(self, result: RestorePlan, lease: str, raised: Mapping[str, str] | None = None) -> None:
        """The include file, with the plan and what is needed to undo it."""
        if self._request.standby:
            # Its settings are those of any standby (standby_make.py); where no server has run yet, none are needed.
            recovery_conf.stand_by(self._request.configuration, self._request.pgdata)
            return
        document = self._recorded(result)
        if self._hba_file:
            document["hba_file"] = self._hba_file
        if raised:
            document["raised"] = dict(raised)
        settings = {**self._settings(result, lease), **(raised or {})}
        recovery_conf.write(self._request.configuration, self._request.pgdata, settings, document)

    def _keep_out(self, result: RestorePlan, lease: str) -> None:
        """Ordinary users stay out until the cluster is accepted. Before a server can start, so that none is let in."""
        request = self._request
        if not request.keep_out:
            return
        hba_file = self._effective("hba_file")
        why = keep_out.problem(hba_file, [request.pgdata, request.configuration])
        if why:
            raise PitrError(f"Ordinary users cannot be kept out of the restored cluster: {why}. {keep_out.INSTEAD}")
        # Written down first: whatever happens from here on, undoing knows what to put back.
        self._hba_file = hba_file
        self._write_settings(result, lease)
        keep_out.shut(hba_file, request.inspect_user, request.inspect_hba)

    def _place_control(self, pgdata: str) -> None:
        """The last step: only now can a server start here."""
        os.rename(os.path.join(pgdata, extract.HELD_BACK), os.path.join(pgdata, extract.PG_CONTROL))
        fsync_directory(os.path.join(pgdata, "global"))
        os.unlink(os.path.join(pgdata, IN_PROGRESS))
        fsync_directory(pgdata)

    def _check_effective(self, result: RestorePlan, lease: str) -> None:
        """Ask the server's own parser what it would use; raise floors that pg_control demands (design rule 7)."""
        request = self._request
        if request.standby:
            return
        floors = control_data(request.bin_dir, request.pgdata).floors
        checked = ("restore_command", "recovery_target_timeline", "archive_mode")
        # Each answer is a start of the server's program.
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            effective = dict(zip((*floors, *checked), pool.map(self._effective, (*floors, *checked))))
        raised = {}
        for name, floor in floors.items():
            if int(effective[name]) < floor:
                raised[name] = str(floor)
        expected = self._settings(result, lease)
        if raised:
            self._write_settings(result, lease, raised)
        effective.update({name: self._effective(name) for name in raised})
        for name in (*checked, *raised):
            value = effective[name]
            if name in expected and value != expected[name]:
                raise PitrError(
                    f"The recovery's setting of {name} has no effect: the server would use '{value}'. Something in"
                    f" {request.configuration} is read later than {recovery_conf.FILE}. Remove it there."
                )

    def _effective(self, name: str) -> str:
        return effective_setting(self._request.bin_dir, self._request.configuration, name)


def _is_its_own_end(result: RestorePlan) -> bool:
    """Whether an offline backup is restored as it is.

    It is consistent from its first moment. But PostgreSQL stops *before* a record, and a server that was never started
    again has written none; so there is no target, and no WAL but the backup's own.
    """
    return (result.backup.method, result.target.kind, result.target.action) == ("offline", "immediate", "promote")


def _made_wal(request: Request) -> str:
    """The directory that a restore has made for pg_wal of the cluster in the request's PGDATA, empty when none."""
    made = str((recovery_conf.planned(request.configuration) or {}).get("pg_wal") or "")
    link = os.path.join(request.pgdata, places.PG_WAL)
    return made if made and os.path.islink(link) and os.readlink(link) == made else ""


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
        remove_tree(moved_aside)
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
    wal = _made_wal(request)
    if request.config_dir:
        recovery_conf.discard(request.config_dir)
    if in_the_way and request.keep_unaccepted:
        kept = moved_aside.replace(".old-", ".failed-") if ".old-" in moved_aside else f"{pgdata}.failed"
        os.rename(pgdata, kept)
    elif os.path.isdir(pgdata):
        remove_tree(pgdata)
        places.clear_wal(wal)
    os.rename(moved_aside, pgdata)
    if not has_content(waiting(pgdata)):
        remove_incomplete(waiting(pgdata))
    fsync_directory(os.path.dirname(pgdata))
    return kept
