# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A drill that destroys nothing, for the clock: what a repository holds becomes a server in a scratch directory.

The newest backup and all archived WAL are restored there with what any restore uses, replayed to the end, compared with
the plan, and read by pg_amcheck. Then the directory is removed.

The copy acts on nobody. It has a configuration of its own, so that it listens on no port, loads no libraries (a job
scheduler would run its jobs), archives nothing, and starts no subscription: a promoted copy would go on with those of
the original (section "Logical Replication"). It has no way in but a socket in a directory of this user.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

from . import activity, locks, places, recovery_conf, settings
from .collations import mismatches
from .errors import PitrError
from .instance import Instance
from .load import amcheck
from .maintenance_settings import Settings
from .plan import RefusedError, RestorePlan
from .postgres import Login, binary_version, running_pid
from .reached import Reached
from .recovery import Recovery
from .repository import ClusterFolder, check_cluster_name, write_atomic
from .request import Request
from .restore import Restore
from .space import MIB
from .tree import make_directory
from .unfinished import remove_tree

# Its directory has this name, so that nobody's data directory is ever in the way; and this file in it from its first
# moment to its last.
PREFIX = "pitr-drill-"
MARKER = "pitr-drill.json"
PORT = 5432
# Seconds between two looks whether this shall end, and between two words of how far it is.
SLICE, TELL = 1.0, 60.0
# What a drill leaves of the repository's filesystem: a full one would stop the archiving of the primary.
RESERVE, RESERVE_BYTES = 0.1, 20 << 30
# Event triggers can be turned off from this version on; one on login would keep us out.
EVENT_TRIGGERS = 17


@dataclass(frozen=True)
class Proof:
    """What was seen. ``seconds`` of each step; ``last_transaction_time`` is ISO 8601, UTC, or empty."""

    backup: str
    segments: int
    lsn: str
    timeline: int
    last_transaction_time: str
    databases: tuple[str, ...]
    seconds: Mapping[str, float]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        when = f", last transaction {self.last_transaction_time}" if self.last_transaction_time else ""
        took = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.seconds.items())
        checked = f"\npg_amcheck found nothing in {', '.join(self.databases)}" if self.databases else ""
        notes = "".join(f"\nnote: {note}" for note in self.notes)
        return (
            f"restored {self.backup} and {self.segments} segments of WAL, to LSN {self.lsn} on timeline"
            f" {self.timeline}{when}{checked}\nseconds: {took}{notes}"
        )


class Rehearsal:
    """One drill of one cluster."""

    def __init__(
        self,
        wanted: Settings,
        cluster: str,
        wal_command: str,
        keep: bool = False,
        say: Callable[[str], None] = lambda _text: None,
    ) -> None:
        """``wal_command``: the installed ``pitr-wal``. ``keep``: leave the copy there, stopped, until the next drill.

        ``say`` is told every minute how far a long replay is. Raises PitrError when the directory cannot be used.
        """
        check_cluster_name(cluster)
        directory = wanted.drill_directory
        if not os.path.isabs(directory):
            raise PitrError(
                f"The directory for drills is '{directory}'; it has to be an absolute path"
                " (backup_drill_directory). Nothing was done."
            )
        if places.within(directory, wanted.repository):
            raise PitrError(
                f"The directory for drills, {directory}, lies in the repository {wanted.repository}. Keep it"
                " elsewhere (backup_drill_directory). Nothing was done."
            )
        self._wanted = wanted
        self._cluster = cluster
        self._wal_command = wal_command
        self._keep = keep
        self.place = os.path.join(directory, PREFIX + cluster)
        self._data = os.path.join(self.place, "data")
        self._config = os.path.join(self.place, "conf")
        self._log = os.path.join(self.place, "server.log")
        self._socket = ""
        self._lease = ""
        self._say = say
        self._ended = False
        self._is_ours = False

    def run(self) -> Proof:
        """Hold it. Raises PitrError when it fails or cannot be held; the repository remembers which it was.

        Whatever happens, no server stays, and without ``keep`` no directory either. What a kill has left, the next
        drill removes.
        """
        wanted = self._wanted
        # Not remembered as a drill: a repository that cannot be opened has nowhere to.
        folder = ClusterFolder.open(wanted.repository, self._cluster, {"identity": wanted.identity})
        with self._alone():
            try:
                proof = self._hold(folder)
            except (PitrError, OSError) as error:
                if self._ended:
                    # What has failed was ended on the way to our end.
                    self.end()
                self._remember(folder, "failed", error=_said(error))
                raise
            finally:
                self._end(folder)
        self._remember(folder, "passed", **asdict(proof))
        return proof

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        make_directory(self._wanted.drill_directory)
        try:
            lock = locks.acquire(f"{self.place}.lock")
        except locks.InUseError:
            raise PitrError(f"Another drill is being held in {self.place}. Nothing was done.") from None
        try:
            yield
        finally:
            os.close(lock)

    def _remember(self, folder: ClusterFolder, verdict: str, **more: Any) -> None:
        entry = {"verdict": verdict, "scenarios": ["latest"], "by": activity.CLOCK, **more}
        activity.add(activity.path_of(folder), activity.DRILL, entry)

    def _hold(self, folder: ClusterFolder) -> Proof:
        wanted = self._wanted
        self.clear()
        self._make_place()
        restore = Restore(self._request())
        seconds = {}
        started = time.monotonic()
        try:
            plan = restore.plan()
        except RefusedError as error:
            raise PitrError(f"What the repository holds cannot be restored. {error.message}", **error.detail) from None
        self._check_reserve(plan)
        restore.execute(plan)
        self._lease = restore.lease
        recovery_conf.clear_auto_conf(self._data)
        seconds["restore"], started = _since(started)
        self._start()
        login = Login(unix_socket=self._socket, port=PORT, user=wanted.drill_user)
        recovery = Recovery(login, self._data, wanted.bin_dir, self._config, self._log)
        reached = self._replay(recovery)
        timeline = recovery.timeline()
        seconds["replay"], started = _since(started)
        collations = [
            f"database {item.database}, collation {item.collation or '(unknown)'}: "
            + (item.problem or f"made with version {item.recorded}, this host has {item.actual or 'none'}")
            for item in mismatches(login)
        ]
        databases: tuple[str, ...] = ()
        if wanted.drill_amcheck:
            found = amcheck(login, wanted.bin_dir, wanted.drill_jobs)
            databases = tuple(found["databases"])
            if not found["ok"]:
                doubt = "\nIndexes on text may be innocent: " + "; ".join(collations) if collations else ""
                raise PitrError(f"pg_amcheck found damage in the restored copy:\n{found['findings']}{doubt}")
            seconds["check"], started = _since(started)
        return Proof(
            plan.backup.label,
            plan.segments,
            reached.lsn,
            timeline,
            reached.last_transaction_time,
            databases,
            seconds,
            (*plan.notes, *collations),
        )

    def end(self) -> NoReturn:
        """For the handler of a signal: stop where it is, and clear away. No drill has failed then."""
        self._ended = True
        raise SystemExit(128 + signal.SIGTERM)

    def _replay(self, recovery: Recovery) -> Reached:
        timeout = self._wanted.drill_timeout
        deadline = time.monotonic() + timeout
        told = time.monotonic()
        while True:
            reached, progress = recovery.wait(max(0.0, min(SLICE, deadline - time.monotonic())))
            if reached is not None:
                return reached
            if self._ended:
                # psycopg2 swallows what a handler raises while it makes an error of its own.
                self.end()
            if time.monotonic() >= deadline:
                raise PitrError(f"The end of WAL was not reached within {timeout:g} seconds: {progress}.")
            if time.monotonic() - told >= TELL:
                told = time.monotonic()
                self._say(str(progress))

    def _request(self) -> Request:
        wanted = self._wanted
        return Request(
            repository=wanted.repository,
            cluster=self._cluster,
            pgdata=self._data,
            bin_dir=wanted.bin_dir,
            wal_command=self._wal_command,
            # A restore passes over a newest backup that it cannot use, and says so; for a drill that is no success.
            backup="latest",
            config_dir=self._config,
            tablespace_prefix=os.path.join(self.place, "tablespaces"),
            archive_after="off",
            identity=wanted.identity,
            # Our own pg_hba.conf lets in nobody else.
            keep_out=False,
            # A drill proves what the repository is worth.
            dead_pg_wal="none",
        )

    def _make_place(self) -> None:
        wanted = self._wanted
        os.mkdir(self.place, 0o700)
        self._is_ours = True
        # Short, whatever the directory's name is: the path of a socket has at most 107 bytes.
        self._socket = tempfile.mkdtemp(prefix=PREFIX)
        write_atomic(os.path.join(self.place, MARKER), json.dumps({"socket": self._socket}).encode())
        os.mkdir(self._config, 0o700)
        values: dict[str, Any] = {
            "data_directory": self._data,
            "hba_file": os.path.join(self._config, "pg_hba.conf"),
            "ident_file": os.path.join(self._config, "pg_ident.conf"),
            "listen_addresses": "",
            "unix_socket_directories": self._quoted_socket(),
            "port": PORT,
            "cluster_name": f"drill of {self._cluster}"[:60],
            "max_logical_replication_workers": 0,
            "max_wal_senders": 0,
            "autovacuum": False,
            "jit": False,
            # Nobody will miss it.
            "fsync": False,
            "full_page_writes": False,
            "log_line_prefix": "%m [%p] ",
        }
        if binary_version(wanted.bin_dir) >= EVENT_TRIGGERS:
            values["event_triggers"] = False
        values.update(wanted.drill_settings)
        text = settings.render(values, "Written by pgdrill.pitr for one drill.")
        write_atomic(os.path.join(self._config, "postgresql.conf"), text.encode())
        write_atomic(os.path.join(self._config, "pg_hba.conf"), b"local all all trust\n")
        write_atomic(os.path.join(self._config, "pg_ident.conf"), b"")

    def _quoted_socket(self) -> str:
        """A name in a list of names."""
        return '"' + self._socket.replace('"', '""') + '"'

    def _check_reserve(self, plan: RestorePlan) -> None:
        """Archiving goes on: what is left of the repository's filesystem is not the drill's to fill."""
        repository = self._wanted.repository
        device, status = os.stat(repository).st_dev, os.statvfs(repository)
        reserve = min(int(status.f_blocks * status.f_frsize * RESERVE), RESERVE_BYTES)
        for place in plan.looked["space"]:
            needed = place["needed_bytes"] + place["recovery_bytes"]
            if os.stat(place["filesystem"]).st_dev == device and place["free_bytes"] - needed < reserve:
                raise PitrError(
                    f"The drill needs {-(-needed // MIB)} MiB on the filesystem of the repository, which has"
                    f" {place['free_bytes'] // MIB} MiB free, and leaves {reserve // MIB} MiB to the archive. Drill on"
                    " another filesystem (backup_drill_directory), or make room."
                )

    def _start(self) -> None:
        Instance(self._wanted.bin_dir, self._data, self._log, config_dir=self._config).start(wait=False)

    def _end(self, folder: ClusterFolder) -> None:
        if not self._is_ours:
            return
        self._stop()
        # Nobody asks for WAL by this name any more.
        if self._lease:
            locks.release(folder, self._lease)
        if not self._keep:
            self.clear()

    def _stop(self) -> None:
        if running_pid(self._data) is not None:
            Instance(self._wanted.bin_dir, self._data, self._log, timeout=60).stop("immediate")

    def clear(self) -> None:
        """Remove the scratch directory and the server in it. Raises PitrError when no drill has made it."""
        if not os.path.lexists(self.place):
            return
        path = os.path.join(self.place, MARKER)
        try:
            with open(path, encoding="utf-8") as stream:
                socket = str(json.load(stream)["socket"])
        except FileNotFoundError:
            # Killed before its first file, or after its last.
            with contextlib.suppress(OSError):
                os.rmdir(self.place)
                return
            raise PitrError(f"{self.place} is in the way; no drill has made it, {MARKER} is not in it.") from None
        except (ValueError, KeyError, TypeError):
            raise PitrError(f"{path} is damaged. Look at {self.place}, and remove it by hand.") from None
        self._stop()
        if os.path.basename(socket).startswith(PREFIX):
            shutil.rmtree(socket, ignore_errors=True)
        for entry in os.scandir(self.place):
            if entry.is_dir(follow_symlinks=False):
                remove_tree(entry.path)
            elif entry.name != MARKER:
                os.unlink(entry.path)
        os.unlink(path)
        os.rmdir(self.place)

    def kept(self) -> str:
        """How to look at the copy, for whoever has kept it; empty when it is gone."""
        if not os.path.isdir(self._config):
            return ""
        start = shlex.join([os.path.join(self._wanted.bin_dir, "pg_ctl"), "start", "-D", self._config, "-l", self._log])
        look = shlex.join(["psql", "-h", self._socket, "-p", str(PORT), "-U", self._wanted.drill_user, "postgres"])
        return f"\nThe copy is in {self.place} until the next drill:\n  {start}\n  {look}"


def _since(started: float) -> tuple[float, float]:
    now = time.monotonic()
    return round(now - started, 3), now


def _said(error: PitrError | OSError) -> str:
    return (error.message if isinstance(error, PitrError) else str(error))[:2000]
