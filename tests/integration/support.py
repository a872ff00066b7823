# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Real servers for the integration tests: a cluster, an archived primary, a restored copy.

One row of one table, ``status``, is rewritten in every phase of a primary's life. Which phase a restore has landed on
is then one word, and a target is exact or it is not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ansible_collections.pgdrill.pitr.plugins.module_utils import encryption, fast, rates, settings
from ansible_collections.pgdrill.pitr.plugins.module_utils import repository as repositories
from ansible_collections.pgdrill.pitr.plugins.module_utils.backup import BaseBackup
from ansible_collections.pgdrill.pitr.plugins.module_utils.catalog import Backup
from ansible_collections.pgdrill.pitr.plugins.module_utils.install import COMMAND, install
from ansible_collections.pgdrill.pitr.plugins.module_utils.plan import RestorePlan
from ansible_collections.pgdrill.pitr.plugins.module_utils.postgres import (
    Login,
    binary_version,
    control_data,
    query,
    running_pid,
    shell_command,
)
from ansible_collections.pgdrill.pitr.plugins.module_utils.probe import Archived, Probe
from ansible_collections.pgdrill.pitr.plugins.module_utils.reached import Reached
from ansible_collections.pgdrill.pitr.plugins.module_utils.recovery import Recovery
from ansible_collections.pgdrill.pitr.plugins.module_utils.repository import Chapter, ClusterFolder
from ansible_collections.pgdrill.pitr.plugins.module_utils.request import Request
from ansible_collections.pgdrill.pitr.plugins.module_utils.restore import Restore, Result
from ansible_collections.pgdrill.pitr.plugins.module_utils.target import format_time
from ansible_collections.pgdrill.pitr.plugins.module_utils.wal import Lsn

CLUSTER = "main"
SEGMENT_SIZE = 1024 * 1024
# Seconds for anything a healthy server does here in less than two; never the measure of a test.
PATIENCE = float(os.environ.get("PGDRILL_TEST_PATIENCE") or 60)

# The server's files are as safe as the test needs them; everything else is a primary's ordinary configuration.
TEMPLATE_SETTINGS = """
listen_addresses = ''
fsync = off
autovacuum = off
shared_buffers = 16MB
max_connections = 20
max_wal_senders = 4
max_replication_slots = 4
max_wal_size = 64MB
min_wal_size = 2MB
track_commit_timestamp = on
log_min_messages = log
log_line_prefix = '%m [%p] '
"""


class Identity:
    """A new age identity in a file, and its public key. ``path`` may come to hold further identities."""

    def __init__(self, path: Path, *others: Identity) -> None:
        subprocess.run(["age-keygen", "-o", str(path)], check=True, capture_output=True)
        self.path = path
        derived = subprocess.run(["age-keygen", "-y", str(path)], check=True, capture_output=True, text=True)
        self.public = derived.stdout.strip()
        with open(path, "a", encoding="ascii") as stream:
            stream.write("".join(other.path.read_text(encoding="ascii") for other in others))

    @property
    def secrets(self) -> list[bytes]:
        """What must be nowhere but in the file."""
        return [line for line in self.path.read_bytes().split(b"\n") if line.startswith(b"AGE-SECRET-KEY-")]


class Server:
    """A cluster in ``data``. It listens on a socket in a directory of its own, so that its port is nobody else's."""

    PORT = 5432

    def __init__(self, bin_dir: str, data: Path) -> None:
        self.bin_dir = bin_dir
        self.data = data
        # Where postgresql.conf is, when it is not in the data directory.
        self.config: Path | None = None
        self.log = data.parent / (data.name + ".log")
        # The path of a socket has at most 107 bytes.
        place = tempfile.gettempdir()
        self.socket = tempfile.mkdtemp(prefix="s", dir=place if len(place) < 60 else "/tmp")

    @property
    def login(self) -> Login:
        return Login(unix_socket=self.socket, port=self.PORT)

    def program(self, name: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run one of PostgreSQL's programs, whatever its exit code."""
        argv = [os.path.join(self.bin_dir, name), *arguments]
        return subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=120, **options
        )

    def start(self, wait: bool = True, options: str = "") -> None:
        place = str(self.config or self.data)
        argv = [os.path.join(self.bin_dir, "pg_ctl"), "start", "-s", "-D", place, "-l", str(self.log)]
        argv += ["-o", f"-k {self.socket} -p {self.PORT} {options}", "-w" if wait else "-W"]
        logged = len(self.log_text())
        # Not captured: the server would hold the pipe open for as long as it lives.
        code = subprocess.run(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False
        ).returncode
        assert code == 0, f"{self.data} does not start:\n{self.log_text()[-3000:]}"
        # Without -w pg_ctl returns before the server has taken the directory.
        until(
            # With a logging collector the line goes elsewhere.
            lambda: wait or "starting PostgreSQL" in self.log_text()[logged:] or running_pid(str(self.data)),
            "the server",
        )

    def stop(self, mode: str = "fast") -> None:
        if (self.data / "postmaster.pid").exists():
            self.program("pg_ctl", "stop", "-w", "-s", "-D", str(self.data), "-m", mode)
            # Whoever fetched WAL ahead for it clears away when it notices; until then the directory changes.
            deadline = time.monotonic() + 10
            while self._is_fetching() and time.monotonic() < deadline:
                time.sleep(0.01)

    def _is_fetching(self) -> bool:
        spool = self.data / "pg_wal" / fast.FETCHED
        try:
            return fast.is_locked(str(spool))
        except OSError:
            # Its lock is gone already, and the directory is about to.
            return spool.exists()

    def restart(self) -> None:
        self.stop()
        self.start()

    def close(self) -> None:
        self.stop("immediate")
        shutil.rmtree(self.socket, ignore_errors=True)

    def log_text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    @contextlib.contextmanager
    def connection(self) -> Iterator[Any]:
        with contextlib.closing(self.login.connect()) as connection:
            yield connection

    def sql(self, statement: str, *parameters: object) -> list[tuple[Any, ...]]:
        with self.connection() as connection:
            return query(connection, statement, parameters or None)

    def value(self, statement: str, *parameters: object) -> Any:
        return self.sql(statement, *parameters)[0][0]

    def show(self, setting: str) -> str:
        return str(self.value("SELECT current_setting(%s)", setting))

    @property
    def phase(self) -> str:
        """The one word that tells how far this cluster has come."""
        return str(self.value("SELECT phase FROM status"))

    @property
    def is_running(self) -> bool:
        return self.program("pg_ctl", "status", "-D", str(self.data)).returncode == 0

    @property
    def system_identifier(self) -> str:
        return control_data(self.bin_dir, str(self.data)).system_identifier


def make_template(bin_dir: str, data: Path) -> None:
    """A small initialised cluster with the table ``status``, stopped, to be copied."""
    server = Server(bin_dir, data)
    arguments = ["-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "-N", "-k", "--wal-segsize=1"]
    made = server.program("initdb", "-D", str(data), *arguments)
    assert made.returncode == 0, made.stderr
    with open(data / "postgresql.conf", "a", encoding="utf-8") as stream:
        stream.write(TEMPLATE_SETTINGS)
    try:
        server.start()
        # Two of three databases less: every backup and restore of the tests is three times as fast.
        server.sql("UPDATE pg_database SET datistemplate = false")
        server.sql("DROP DATABASE template0")
        server.sql("DROP DATABASE template1")
        server.sql("CREATE TABLE status (phase text NOT NULL)")
        server.sql("INSERT INTO status VALUES ('template')")
        server.stop()
    finally:
        server.close()


@dataclass(frozen=True)
class Commit:
    """The transaction that wrote ``phase``. ``start`` is where its commit record begins, ``end`` where it ends."""

    phase: str
    xid: int
    time: datetime.datetime
    start: Lsn
    end: Lsn

    @property
    def time_text(self) -> str:
        return format_time(self.time)


class Storage:
    """A repository with the cluster ``main`` and an installed ``pitr-wal`` that knows it."""

    def __init__(self, bin_dir: str, directory: Path, repository: Path, compression: str = "auto") -> None:
        self.bin_dir = bin_dir
        self.directory = directory
        self.repository = repository
        self.wal_command = str(directory / "pitr" / COMMAND)
        install(str(directory / "pitr"), CLUSTER, {"repository": str(repository), "compression": compression})

    @property
    def folder(self) -> ClusterFolder:
        return ClusterFolder.open(str(self.repository), CLUSTER)

    def encrypt_to(self, *recipients: str) -> None:
        """What is stored from now on."""
        folder = self.folder
        changed = encryption.check_recipients(recipients)
        repositories.create(str(self.repository), CLUSTER, folder.chapter, recipients=changed)

    @property
    def archive(self) -> Path:
        return Path(self.folder.archive_path())

    @property
    def backups(self) -> Path:
        return Path(self.folder.backups_path)

    @property
    def archive_command(self) -> str:
        return shell_command([self.wal_command, "push", CLUSTER], ["%p"])

    def segments(self, timeline: int = 1) -> list[Path]:
        """Archived segments of a timeline, in order."""
        return sorted(self.archive.glob(f"{timeline:08X}*/{'?' * 24}"))

    def segment(self, lsn: Lsn, timeline: int = 1) -> Path:
        """Where the segment that holds ``lsn`` is archived."""
        names = {path.name: path for path in self.segments(timeline)}
        per_id = 0x100000000 // SEGMENT_SIZE
        number = lsn.segment_number(SEGMENT_SIZE)
        return names[f"{timeline:08X}{number // per_id:08X}{number % per_id:08X}"]

    def copy(self, directory: Path) -> Storage:
        """The same content elsewhere, for tests that break something."""
        # Without what the original's restores left: leases of recoveries, measurements.
        left = shutil.ignore_patterns("lease-*", rates.FILE)
        shutil.copytree(self.repository, directory / "repository", ignore=left)
        return Storage(self.bin_dir, directory, directory / "repository")

    def request(self, data: Path, options: Mapping[str, Any] | None = None, **more: Any) -> Request:
        """A restore of this cluster into ``data``; ``options`` is the recovery target."""
        fields: dict[str, Any] = {
            "repository": str(self.repository),
            "cluster": CLUSTER,
            "pgdata": str(data),
            "bin_dir": self.bin_dir,
            "wal_command": self.wal_command,
            "target_options": dict(options or {}),
            # A test that wants its restored cluster to archive says so.
            "archive_after": "off",
        }
        return Request(**{**fields, **more})

    def plan(self, data: Path, options: Mapping[str, Any] | None = None, **more: Any) -> RestorePlan:
        return Restore(self.request(data, options, **more)).plan()


def pitr_wal(storage: Storage, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the installed command as a server would: with hardly an environment, and without input."""
    return subprocess.run(
        [storage.wal_command, *arguments],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=120,
        env={"PATH": "/usr/bin:/bin", **environment},
    )  # fmt: skip


class Restored:
    """A restored cluster, not started yet."""

    def __init__(self, storage: Storage, data: Path, options: Mapping[str, Any] | None = None, **more: Any) -> None:
        self.storage = storage
        self.request = storage.request(data, options, **more)
        restore = Restore(self.request)
        self.plan = restore.plan()
        self.result: Result = restore.execute(self.plan)
        self.server = Server(storage.bin_dir, data)
        self.server.config = Path(self.request.config_dir) if self.request.config_dir else None
        self.recovery = Recovery(
            self.server.login, str(data), storage.bin_dir, self.request.config_dir, str(self.server.log)
        )

    def wait(self, timeout: float = PATIENCE) -> Reached:
        """Until the target is reached. Raises what the module would report."""
        reached, progress = self.recovery.wait(timeout)
        assert reached is not None, f"not reached within {timeout} s: {progress}"
        return reached

    def run(self) -> Restored:
        """Start and wait."""
        self.server.start(wait=False)
        self.reached = self.wait()
        return self

    @property
    def phase(self) -> str:
        return self.server.phase


class Sandbox(Storage):
    """A primary that archives into a repository of its own."""

    def __init__(self, bin_dir: str, directory: Path, template: Path, **options: Any) -> None:
        """``options``: ``repository`` (path), ``compression`` of the archive, ``data`` (path), ``settings``."""
        directory.mkdir(parents=True, exist_ok=True)
        data = options.get("data") or directory / "primary"
        data.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(template, data)
        self.server = Server(bin_dir, data)
        identifier = self.server.system_identifier
        repository = options.get("repository") or directory / "repository"
        repository.parent.mkdir(parents=True, exist_ok=True)
        chapter = Chapter(1, identifier, SEGMENT_SIZE, binary_version(bin_dir), "2026-01-01T00:00:00+00:00")
        repositories.create(str(repository), CLUSTER, chapter)
        super().__init__(bin_dir, directory, repository, options.get("compression", "auto"))
        self.configure({"archive_mode": "on", "archive_command": self.archive_command, **options.get("settings", {})})

    def configure(self, values: Mapping[str, Any]) -> None:
        """Add to the managed settings of the primary; takes effect at its next start or reload."""
        self._settings: dict[str, Any] = {**getattr(self, "_settings", {}), **values}
        text = settings.render(self._settings, "tests")
        settings.write(str(self.server.data), "50-tests.conf", text, check=False)

    def commit(self, phase: str) -> Commit:
        """Write the next phase."""
        with self.server.connection() as connection:
            query(connection, "BEGIN")
            query(connection, "UPDATE status SET phase = %s", (phase,))
            xid = int(query(connection, "SELECT pg_current_xact_id()::text")[0][0])
            start = Lsn.parse(query(connection, "SELECT pg_current_wal_insert_lsn()::text")[0][0])
            query(connection, "COMMIT")
            when, end = query(
                connection,
                "SELECT pg_xact_commit_timestamp(%s::text::xid), pg_current_wal_insert_lsn()::text",
                (str(xid),),
            )[0]
        return Commit(phase, xid, when, start, Lsn.parse(end))

    def backup(self, label: str = "", **options: Any) -> Backup:
        work = BaseBackup(self.folder, self.server.login, self.bin_dir, label=label, archive_timeout=30, **options)
        return work.take()

    def probe(self, timeout: float = PATIENCE) -> Archived:
        """Everything written until now is archived when this returns."""
        return Probe(self.server.login, self.folder, timeout).switch_and_wait()

    def restore_point(self, name: str) -> str:
        return Probe(self.server.login, self.folder, PATIENCE).restore_point(name)[0]

    def fill(self, segments: int) -> None:
        """Write and switch until so many more segments are complete."""
        with self.server.connection() as connection:
            for _number in range(segments):
                query(connection, "SELECT pg_logical_emit_message(true, 'tests', repeat('x', 1000))")
                query(connection, "SELECT pg_switch_wal()")


def fingerprint(*paths: Path) -> dict[str, str]:
    """What lies below these paths: every name with its kind, mode and content."""
    result = {}
    for top in paths:
        for path in [top, *sorted(top.rglob("*"))] if top.is_dir() and not top.is_symlink() else [top]:
            if path.is_symlink():
                result[str(path)] = f"link to {os.readlink(path)}"
            elif path.is_dir():
                result[str(path)] = f"directory {path.stat().st_mode:o}"
            elif path.exists():
                digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "special"
                result[str(path)] = f"{path.stat().st_mode:o} {digest}"
            else:
                result[str(path)] = "absent"
    return result


def refuses_to_start(bin_dir: str, data: Path) -> bool:
    """Whether no server comes up on this directory. A stand-alone backend makes the same checks as the server."""
    argv = [os.path.join(bin_dir, "postgres"), "--single", "-D", str(data), "postgres"]
    return subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=60).returncode != 0


def until(condition: Any, what: str, seconds: float = PATIENCE) -> None:
    """Wait for a condition. Fails, by name, when it does not come true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:g} s in vain for: {what}"
        time.sleep(0.02)


def flip(path: Path, offset: int) -> None:
    """Change one byte; size and times of the file stay as they were."""
    status = path.stat()
    with open(path, "r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)[0]
        stream.seek(offset)
        stream.write(bytes([byte ^ 0xFF]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def cut(path: Path, keep: float = 0.5) -> None:
    """Truncate a file to this part of its size."""
    os.truncate(path, int(path.stat().st_size * keep))


_CHILD = """
import json, os, signal, sys
from ansible_collections.pgdrill.pitr.plugins.module_utils.request import Request
from ansible_collections.pgdrill.pitr.plugins.module_utils.restore import Restore
{prelude}
restore = Restore(Request(**json.loads(sys.argv[1])))
plan = restore.plan()
at, below, count = int(sys.argv[2]), sys.argv[3], 0
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.chmod", "os.link", "subprocess.Popen")

def hook(event, arguments):
    global count
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    if event in CHANGES or writes:
        count += 1
        if count == at or below and isinstance(arguments[0], str) and arguments[0].startswith(below):
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(hook)
restore.execute(plan)
print(count)
"""


def in_child(request: Request, prelude: str = "", at: int = 0, below: str = "") -> subprocess.CompletedProcess[str]:
    """Restore in a process of its own.

    It kills itself before its ``at``-th change of the filesystem, or before the first one below this path.
    """
    argv = [sys.executable, "-c", _CHILD.format(prelude=prelude), json.dumps(dataclasses.asdict(request)), str(at)]
    argv.append(below)
    return subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=120)
