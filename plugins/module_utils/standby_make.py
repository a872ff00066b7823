# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A standby is made: cloned from the primary or from the repository, rewound, or a directory that is good is taken.

No server can start on a directory before it is one of a standby: a clone has no ``pg_control`` until all else is there,
``standby.signal`` included, and a directory that is being rewound has another name meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from . import combine, extract, locks, places, recovery_conf
from .errors import PitrError
from .extract import IN_PROGRESS
from .plan import Refusal, RefusedError
from .postgres import (
    Login,
    binary,
    binary_version,
    control_data,
    effective_setting,
    run,
    running_pid,
    shell_command,
)
from .repository import ClusterFolder, write_atomic, write_json
from .request import Request as RestoreRequest
from .restore import Restore
from .settings import render, write
from .standby import INTRO, Decision, Local, Upstream, check_slot, decide, floors
from .standby_look import RECOVERY_SIGNAL, REWINDING, STANDBY_SIGNAL, look_local, look_upstream
from .stored import MANIFEST
from .tree import fsync_directory
from .unfinished import empty, exchange, has_content, is_vacant, left_behind, remove_incomplete, waiting
from .upstream import Primary
from .upstream import Settings as ConnectionSettings
from .wal import WalFile, history_name

# Settings that are the standby's alone and lie in its one file; what ALTER SYSTEM says of them would win.
OWN = (
    "primary_conninfo",
    "primary_slot_name",
    "restore_command",
    "archive_cleanup_command",
    "hot_standby",
)


@dataclass(frozen=True)
class Request:
    """What was asked. ``settings``: what the standby's file is to say besides what is decided here.

    ``upstream`` is the primary, as the role that replicates; ``login`` the server in ``pgdata``, over its socket.
    """

    pgdata: str
    bin_dir: str
    login: Login
    upstream: Login
    slot: str
    application_name: str
    passfile: str
    wal_command: str
    repository: str
    cluster: str
    config_dir: str = ""
    file: str = "50-pitr.conf"
    settings: Mapping[str, Any] = field(default_factory=dict)
    clone_from: str = "primary"
    rebuild: str = "never"
    replace_empty: bool = False
    # System identifier of a cluster that was found empty while its server ran.
    empty_cluster: str = ""
    tablespace_mapping: Mapping[str, str] = field(default_factory=dict)
    identity: str = ""
    ssh: Mapping[str, str] = field(default_factory=dict)
    verify: bool = True
    require_slot: bool = True

    @property
    def configuration(self) -> str:
        """Directory of postgresql.conf."""
        return self.config_dir or self.pgdata


@dataclass(frozen=True)
class Result:
    """What was done: ``moved_aside`` is where the old directory is now, or empty. ``changes`` are for a person."""

    changed: bool
    moved_aside: str
    changes: tuple[str, ...]


class Standby:
    """The standby in one data directory."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self.upstream: Upstream
        self.local: Local
        self._stray: bool | None = None

    # --- looking

    def look(self) -> Decision:
        """Decide without touching anything. Raises RefusedError, or PitrError when the primary cannot be reached."""
        request = self._request
        running = running_pid(request.pgdata) is not None
        self.upstream = look_upstream(request.upstream, request.slot, request.login if running else None)
        self.local = look_local(request.pgdata, request.bin_dir, request.login, self.upstream)
        if self.local.system_identifier and self.local.system_identifier == request.empty_cluster and not running:
            self.local = replace(self.local, empty_cluster=True)
        major = binary_version(request.bin_dir)
        found = decide(self.local, self.upstream, request.rebuild, request.pgdata, major, request.replace_empty)
        if isinstance(found, Decision) and request.require_slot:
            found = check_slot(self.upstream, found, request.slot) or found
        if isinstance(found, Refusal):
            raise RefusedError([found], INTRO)
        return found

    def settings(self) -> dict[str, Any]:
        """All that the standby's file is to say. Call after ``look``."""
        request = self._request
        wanted = {**request.settings, **self._own_settings()}
        least = [self.upstream.floors]
        with contextlib.suppress(PitrError):
            least.append(control_data(request.bin_dir, request.pgdata).floors)
        return {**wanted, **floors(wanted, *least)}

    def _own_settings(self) -> dict[str, Any]:
        request = self._request
        fetch = [request.wal_command, "get", f"--system-identifier={self.upstream.system_identifier}"]
        if request.identity:
            fetch.append(f"--identity={request.identity}")
        fetch += ["--lenient", request.cluster]
        return {
            "primary_conninfo": self._conninfo(),
            "primary_slot_name": request.slot,
            "restore_command": shell_command(fetch, ["%f", "%p"]),
            "recovery_target_timeline": self._timeline(),
            "hot_standby": "on",
        }

    def _timeline(self) -> str:
        """``latest``, or the primary's by its number where the archive has one that ``latest`` would take instead.

        Such a one is left by a standby that was promoted by accident: the server looks for history files upwards from
        the timeline that it is on (findNewestTimeLine), and would follow that one, away from the primary.
        """
        if self._stray is None:
            request = self._request
            self._stray = False
            # An archive that does not answer now is no reason to touch a standby that follows.
            with contextlib.suppress(PitrError, OSError):
                folder = ClusterFolder.open(request.repository, request.cluster, request.ssh)
                chapter = folder.require(self.upstream.system_identifier)
                path = folder.wal_path(WalFile.parse(history_name(self.upstream.timeline + 1)), chapter)
                self._stray = folder.tree.exists(path)
        return str(self.upstream.timeline) if self._stray else "latest"

    def _conninfo(self) -> str:
        """How the standby connects. The password is in the passfile."""
        request = self._request
        settings = ConnectionSettings(
            bin_dir=request.bin_dir,
            host=request.upstream.host or request.upstream.unix_socket,
            port=request.upstream.port,
            user=request.upstream.user,
            slot=request.slot,
            application_name=request.application_name,
            passfile=request.passfile if request.upstream.password else "",
            # What libpq does by itself is not written down.
            sslmode=request.upstream.ssl_mode if request.upstream.ssl_mode != "prefer" else "",
            sslrootcert=request.upstream.ca_cert,
        )
        return Primary(settings).conninfo()

    # --- changing

    def write_passfile(self, check: bool) -> bool:
        """The password where only the server's user can read it. Returns whether that is a change."""
        request = self._request
        if not request.upstream.password:
            return False
        escaped = request.upstream.password.replace("\\", "\\\\").replace(":", "\\:")
        text = f"*:*:*:*:{escaped}\n".encode()
        with contextlib.suppress(OSError), open(request.passfile, "rb") as stream:
            if stream.read() == text and os.stat(request.passfile).st_mode & 0o777 == 0o600:
                return False
        if not check:
            os.makedirs(os.path.dirname(request.passfile), mode=0o700, exist_ok=True)
            write_atomic(request.passfile, text)
        return True

    def perform(self, decision: Decision, check: bool = False) -> Result:
        """Do what was decided. Raises PitrError; what is left then is told in its message."""
        request = self._request
        changes = ["password file written"] if self.write_passfile(check) else []
        if decision.action != "none":
            changes.insert(0, f"{decision.action}: {decision.why}")
        moved_aside = ""
        if not check and decision.action != "none":
            if running_pid(request.pgdata) is not None:
                raise PitrError(f"A server is running in {request.pgdata}. Stop it first; nothing was changed.")
            if decision.action == "clone":
                moved_aside = self._clone(decision)
            elif decision.action == "rewind":
                self._rewind()
        if decision.action in ("none", "follow") or not check:
            changes += recovery_conf.stand_by(request.configuration, request.pgdata, OWN, check)
        if decision.action != "none" and not check:
            # Before its server starts for the first time: with the configuration of the primary it would use the
            # primary's port, and know no primary.
            text = render(self.settings(), "Managed by pgdrill.pitr; changes are overwritten.")
            write(request.configuration, request.file, text, check=False)
            self._check_effective()
        return Result(bool(changes), moved_aside, tuple(changes))

    def _check_effective(self) -> None:
        """Ask the server's own parser what it would use."""
        request = self._request
        expected = self.settings()
        for name in ("primary_conninfo", "restore_command"):
            used = effective_setting(request.bin_dir, request.configuration, name)
            if used != expected[name]:
                raise PitrError(
                    f"The standby's setting of {name} has no effect: the server would use '{used}'. Something in"
                    f" {request.configuration} is read later than {request.file}. Remove it there; nothing was started."
                )

    # --- clone

    def _clone(self, decision: Decision) -> str:
        if self._request.clone_from == "repository":
            return self._clone_from_repository(decision)
        return self._clone_from_primary(decision)

    def _clone_from_repository(self, decision: Decision) -> str:
        """A restore of everything, which ends as a standby."""
        request = self._request
        moved_aside = ""
        if decision.aside and self.local.system_identifier != self.upstream.system_identifier:
            # A restore moves aside what is of its own cluster only.
            moved_aside = self._move_aside()
        asked = RestoreRequest(
            repository=request.repository,
            cluster=request.cluster,
            pgdata=request.pgdata,
            bin_dir=request.bin_dir,
            wal_command=request.wal_command,
            config_dir=request.config_dir,
            target_options={"recovery_target_timeline": str(self.upstream.timeline)},
            tablespace_mapping=request.tablespace_mapping,
            force=decision.aside,
            archive_after="same",
            verify=request.verify,
            identity=request.identity,
            keep_out=False,
            dead_pg_wal="none",
            ssh=request.ssh,
            standby=True,
        )
        try:
            restore = Restore(asked)
            plan = restore.plan()
            if plan.backup.system_identifier != self.upstream.system_identifier:
                raise PitrError(
                    f"The repository's cluster '{request.cluster}' is {plan.backup.system_identifier}, the primary is"
                    f" {self.upstream.system_identifier}. Nothing was cloned."
                )
            return restore.execute(plan).moved_aside or moved_aside
        except BaseException:
            self._put_back(moved_aside)
            raise

    def _clone_from_primary(self, decision: Decision) -> str:
        """pg_basebackup into the directory, where it is not seen before it is whole."""
        request = self._request
        pgdata = request.pgdata
        killed = left_behind(pgdata, self.upstream.system_identifier) or {}
        moved_aside = str(killed.get("moved_aside") or "")
        self._clear(killed)
        if decision.aside:
            moved_aside = self._move_aside()
        was_there = os.path.isdir(pgdata)
        locations = [str(request.tablespace_mapping.get(each, each)) for each in self.upstream.tablespaces]
        try:
            for location in locations:
                if os.path.isdir(location) and os.listdir(location):
                    raise PitrError(f"The tablespace directory {location} is not empty. It was not touched.")
            os.makedirs(pgdata, mode=0o700, exist_ok=True)
            os.chmod(pgdata, 0o700)
            self._mark(os.path.join(pgdata, IN_PROGRESS), moved_aside, locations)
        except BaseException:
            self._forget(moved_aside, was_there)
            raise
        try:
            scratch = os.path.join(pgdata, combine.SCRATCH)
            os.mkdir(scratch, 0o700)
            copy = os.path.join(scratch, "data")
            self._base_backup(copy, scratch)
            self._move_up(copy, scratch)
        except BaseException:
            for location in locations:
                empty(location)
            self._forget(moved_aside, was_there)
            raise
        return moved_aside

    def _clear(self, killed: Mapping[str, Any]) -> None:
        """What a killed clone has left."""
        if not killed and not os.path.isdir(self._request.pgdata):
            return
        if left_behind(self._request.pgdata, self.upstream.system_identifier) is None:
            return
        for location in killed.get("locations", []):
            empty(location)
        places.clear_wal(str(killed.get("pg_wal") or ""))
        # Where it has stopped between two renames, all there is of it waits beside.
        vacant = is_vacant(self._request.pgdata)
        remove_incomplete(waiting(self._request.pgdata) if vacant else self._request.pgdata)

    def _move_aside(self) -> str:
        return exchange(self._request.pgdata, lambda path, aside: self._mark(path, aside, []))

    def _mark(self, path: str, moved_aside: str, locations: Sequence[str]) -> None:
        """What a restore writes, so that whoever comes next knows a killed clone (unfinished.py)."""
        marker = {"format": 1, "system_identifier": self.upstream.system_identifier, "backup": "pg_basebackup"}
        marker.update(moved_aside=moved_aside, locations=list(locations), pg_wal="", dead_pgdata="")
        write_json(path, marker)

    def _put_back(self, moved_aside: str) -> None:
        pgdata = self._request.pgdata
        if moved_aside and not has_content(pgdata):
            remove_incomplete(pgdata)
            os.rename(moved_aside, pgdata)

    def _forget(self, moved_aside: str, was_there: bool) -> None:
        """After a failure: what this try has made goes, the old directory gets its name back."""
        pgdata = self._request.pgdata
        remove_incomplete(pgdata)
        if moved_aside:
            self._put_back(moved_aside)
        elif was_there and not os.path.exists(pgdata):
            os.makedirs(pgdata, mode=0o700)

    def _base_backup(self, copy: str, scratch: str) -> None:
        request = self._request
        argv = [binary(request.bin_dir, "pg_basebackup"), "--no-password", "-D", copy, "-X", "stream", "-c", "fast"]
        argv += ["-S", request.slot, "-l", f"pgdrill.pitr standby {request.application_name}"]
        for old, new in sorted(request.tablespace_mapping.items()):
            argv += ["-T", f"{_escaped(old)}={_escaped(new)}"]
        with request.upstream.environment() as environment:
            lock = locks.hold_directory(scratch)
            try:
                # It has the lock, too: when this process is killed, the next try sees that somebody still writes.
                _run_holding(argv, {**environment, "PGAPPNAME": request.application_name}, lock)
            finally:
                os.close(lock)
        if request.verify:
            run([binary(request.bin_dir, "pg_verifybackup"), "--quiet", copy])

    def _move_up(self, copy: str, scratch: str) -> None:
        """By renames only, pg_control last."""
        pgdata = self._request.pgdata
        os.rename(os.path.join(copy, extract.PG_CONTROL), os.path.join(copy, extract.HELD_BACK))
        write_atomic(os.path.join(copy, STANDBY_SIGNAL), b"")
        os.unlink(os.path.join(copy, MANIFEST))
        for name in os.listdir(copy):
            os.rename(os.path.join(copy, name), os.path.join(pgdata, name))
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(pgdata, RECOVERY_SIGNAL))
        shutil.rmtree(scratch)
        fsync_directory(pgdata)
        os.rename(os.path.join(pgdata, extract.HELD_BACK), os.path.join(pgdata, extract.PG_CONTROL))
        fsync_directory(os.path.join(pgdata, "global"))
        os.unlink(os.path.join(pgdata, IN_PROGRESS))
        fsync_directory(pgdata)

    # --- rewind

    def _rewind(self) -> None:
        """pg_rewind with WAL of the archive where the directory's own does not reach back (--restore-target-wal).

        The directory has another name meanwhile; it gets its own back only when it is whole, and a standby's.
        """
        request = self._request
        pgdata, working = request.pgdata, request.pgdata + REWINDING
        signals = [name for name in (STANDBY_SIGNAL, RECOVERY_SIGNAL) if os.path.exists(os.path.join(pgdata, name))]
        with tempfile.TemporaryDirectory(prefix="pitr-rewind-") as directory:
            config = self._rewind_config(directory)
            os.rename(pgdata, working)
            fsync_directory(os.path.dirname(pgdata))
            argv = [binary(request.bin_dir, "pg_rewind"), "-D", working, "--restore-target-wal", "--no-ensure-shutdown"]
            argv += [f"--config-file={config}", "--source-server", self._source()]
            with request.upstream.environment() as environment:
                try:
                    self._end_cleanly(working, config, signals)
                    run([*argv, "--dry-run"], environment)
                except BaseException as error:
                    # Nothing but the end of a crash recovery has been written.
                    for name in signals:
                        write_atomic(os.path.join(working, name), b"")
                    os.rename(working, pgdata)
                    if isinstance(error, PitrError):
                        raise PitrError(f"{error.message} {pgdata} was not rewound, and is stopped.") from None
                    raise
                try:
                    run(argv, environment)
                except PitrError as error:
                    raise PitrError(
                        f"{error.message} The directory is half rewound and kept as {working}; no server can start from"
                        " it. Clone anew with standby_rebuild=clone."
                    ) from None
        write_atomic(os.path.join(working, STANDBY_SIGNAL), b"")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(working, RECOVERY_SIGNAL))
        fsync_directory(working)
        os.rename(working, pgdata)
        fsync_directory(os.path.dirname(pgdata))

    def _source(self) -> str:
        """The primary for pg_rewind, which wants an ordinary connection; the password is in the environment's file."""
        login = self._request.upstream
        values = {"host": login.host or login.unix_socket, "port": str(login.port), "user": login.user}
        values.update(dbname="postgres", application_name=self._request.application_name)
        quoted = {name: value.replace("\\", "\\\\").replace("'", "\\'") for name, value in values.items() if value}
        return " ".join(f"{name}='{value}'" for name, value in quoted.items())

    def _rewind_config(self, directory: str) -> str:
        """A configuration of pg_rewind's own: how to fetch WAL, room for what is recovered, nothing that leads away."""
        path = os.path.join(directory, "postgresql.conf")
        command = str(self._own_settings()["restore_command"]).replace(" --lenient", "")
        least = control_data(self._request.bin_dir, self._request.pgdata).floors
        text = render({"restore_command": command, "archive_mode": "off", **least}, "For one pg_rewind.")
        write_atomic(path, text.encode())
        return path

    def _end_cleanly(self, working: str, config: str, signals: Sequence[str]) -> None:
        """What pg_rewind would do itself after a crash: a stand-alone backend, and its end."""
        if control_data(self._request.bin_dir, working).state in ("shut down", "shut down in recovery"):
            return
        for name in signals:
            os.unlink(os.path.join(working, name))
        argv = [binary(self._request.bin_dir, "postgres"), "--single", "-F", "-D", working]
        try:
            run([*argv, "-c", f"config_file={config}", "template1"])
        except PitrError:
            # It has recovered before it looks for the database, which somebody may have dropped.
            if control_data(self._request.bin_dir, working).state != "shut down":
                raise


def _escaped(path: str) -> str:
    """An equals sign in a path, for --tablespace-mapping."""
    return path.replace("=", "\\=")


def _run_holding(argv: Sequence[str], environment: Mapping[str, str], lock: int) -> None:
    """Run a program that inherits this descriptor. Raises PitrError with what it says."""
    with tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(
            argv, env=dict(environment), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=complaints,
            pass_fds=(lock,),
        )  # fmt: skip
        try:
            process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise
        complaints.seek(0)
        said = complaints.read(4000).decode(errors="replace").strip()
    if process.returncode != 0:
        raise PitrError(f"{os.path.basename(argv[0])} failed with exit code {process.returncode}: {said}")
