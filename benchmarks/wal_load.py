# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the two archive benchmarks share: a cluster with real WAL of pgbench, and counting of time and processors."""

from __future__ import annotations

import ctypes
import importlib
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(CHECKOUT / "tools"))
sys.path.insert(0, str(CHECKOUT))

from sandboxlib import cli  # noqa: E402  the path is set above
from sandboxlib import layout as layouts  # noqa: E402

from plugins.module_utils import archive, postgres, repository  # noqa: E402

SEGMENT = 16 * 1024 * 1024
CLUSTER = "bench"
ENGINE = "pgdrill_engine"
PORT = 20998
PR_SET_CHILD_SUBREAPER = 36

SETTINGS = {
    "listen_addresses": "",
    "port": str(PORT),
    "shared_buffers": "256MB",
    "wal_level": "replica",
    "wal_compression": "on",  # as the role primary sets it
    "max_wal_size": "4GB",
    "wal_keep_size": "16GB",
    "synchronous_commit": "off",  # otherwise the load takes longer; the WAL is the same
    "archive_mode": "off",
}


class Failed(Exception):
    """Something did not work, so that there is nothing to compare."""


class Usage:
    """Seconds on the clock, and of all processors, by what was started meanwhile, background processes included."""

    def __init__(self) -> None:
        reap()
        self._wall = time.monotonic()
        self._cpu = _children_cpu()
        self.wall = self.cpu = 0.0

    def stop(self) -> None:
        """The clock stops here; what still works in the background is waited for and its processor time counted."""
        self.wall = time.monotonic() - self._wall
        reap()
        self.cpu = _children_cpu() - self._cpu


def reap() -> None:
    """Wait for every process that we or our descendants have started. Raises Failed when one does not end."""
    deadline = time.monotonic() + 120
    while True:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.01)
        except ChildProcessError:
            return
        if time.monotonic() > deadline:
            raise Failed("a background process does not end")


def _children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def run(argv: Sequence[object], cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str:
    """One program; its output. Raises Failed."""
    words = [str(word) for word in argv]
    result = subprocess.run(
        words, cwd=cwd, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
    )
    if result.returncode != 0:
        raise Failed(f"{' '.join(words)} failed with {result.returncode}:\n{(result.stdout + result.stderr)[-2000:]}")
    return result.stdout


class Cluster:
    """A stopped cluster: how it was before pgbench (``before``), and its WAL since then (``segments`` in ``wal``)."""

    def __init__(self, bin_dir: Path, home: Path, scale: int, segments: int) -> None:
        self.bin_dir = bin_dir
        self.home = home
        self.data = home / "data"
        self.before = home / "before"
        self._env = {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "PGHOST": str(home), "PGPORT": str(PORT)}
        self._env["PGUSER"] = "postgres"
        if not (home / "made").exists():
            self._make(scale, segments)
            (home / "made").touch()
        self.segments = self._written()

    @property
    def wal(self) -> Path:
        return self.data / "pg_wal"

    @property
    def system_identifier(self) -> str:
        return postgres.control_data(str(self.bin_dir), str(self.data)).system_identifier

    def program(self, name: str, *arguments: object) -> str:
        return run([self.bin_dir / name, *arguments], env=self._env)

    def start(self, data: Path, wait: bool = True) -> None:
        argv = [self.bin_dir / "pg_ctl", "start", "-s", "-D", data, "-l", f"{data}.log", "-w" if wait else "-W"]
        argv += ["-t", 600]
        # Not captured: the server would hold the pipe open for as long as it lives.
        code = subprocess.call([str(word) for word in argv], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        if code != 0:
            raise Failed(f"{data} does not start:\n{Path(f'{data}.log').read_text(encoding='utf-8')[-2000:]}")

    def stop(self, data: Path, mode: str = "fast") -> None:
        self.program("pg_ctl", "stop", "-s", "-w", "-t", 600, "-D", data, "-m", mode)

    def _make(self, scale: int, segments: int) -> None:
        argv = ["-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "-N", "-k"]
        self.program("initdb", "-D", self.data, *argv)
        with open(self.data / "postgresql.conf", "a", encoding="utf-8") as file:
            file.writelines(f"{name} = '{value}'\n" for name, value in SETTINGS.items())
            file.write(f"unix_socket_directories = '{self.home}'\n")
        self.start(self.data)
        self.program("pgbench", "-i", "-q", "-s", scale, "postgres")
        self.stop(self.data)
        shutil.copytree(self.data, self.before)
        self.start(self.data)
        first = self._checkpoint(self.before)
        # Segments ahead of the current one are there too, under the names of the future.
        while self._count(first, self._current()) < segments + 2:
            self.program("pgbench", "-n", "-c", 8, "-j", 2, "-T", 10, "postgres")
        self.program("psql", "-X", "-q", "-d", "postgres", "-c", "SELECT pg_switch_wal()")
        self.stop(self.data)

    def _written(self) -> list[str]:
        """Segments from the checkpoint of the copy up to the newest checkpoint: all of them are complete."""
        first, last = self._checkpoint(self.before), self._checkpoint(self.data)
        return sorted(path.name for path in self.wal.iterdir() if len(path.name) == 24 and first <= path.name < last)

    def _current(self) -> str:
        sql = "SELECT pg_walfile_name(pg_current_wal_lsn())"
        return self.program("psql", "-X", "-A", "-t", "-d", "postgres", "-c", sql).strip()

    def _count(self, first: str, last: str) -> int:
        return len([path for path in self.wal.iterdir() if len(path.name) == 24 and first <= path.name < last])

    def _checkpoint(self, data: Path) -> str:
        control = self.program("pg_controldata", "-D", data)
        return next(line.split()[-1] for line in control.splitlines() if "REDO WAL file" in line)

    def make_repository(self, path: Path, major: int) -> None:
        """An empty repository for this cluster."""
        chapter = repository.Chapter(1, self.system_identifier, SEGMENT, major, "2026-01-01T00:00:00+00:00")
        repository.create(str(path), CLUSTER, chapter)

    def install(self, directory: Path, path: Path, **settings: object) -> str:
        """The command pitr-wal for that repository; its path."""
        values = {"repository": str(path), "compression": "zstd:1", **settings}
        shutil.rmtree(directory, ignore_errors=True)
        # From a copy: this user may not be allowed to read the checkout.
        install = importlib.import_module(f"{ENGINE}.install")
        install.install(str(directory), CLUSTER, values)
        return str(directory / install.COMMAND)


def segment_paths(folder: Path, cluster: str = CLUSTER) -> list[Path]:
    """Stored segments of a repository."""
    return sorted((folder / cluster / "archive").glob("*/*/" + "?" * 24))


def check_stored(cluster: Cluster, folder: Path, names: Sequence[str], scratch: Path) -> None:
    """Every segment is in the archive with the content of pg_wal. Raises Failed."""
    for name in names:
        archive.get(name, str(scratch), str(folder), CLUSTER)
        if scratch.read_bytes() != (cluster.wal / name).read_bytes():
            raise Failed(f"{name} is stored with other content")
        scratch.unlink()


def as_server_user(major: int, measure: Callable[[Path, Path], None], kept: Path | None) -> int:
    """Call ``measure`` (PostgreSQL's programs, an empty directory) as the sandbox's user; returns an exit code.

    ``kept``: a directory that stays, with the cluster and its WAL, for the next time.

    In a process that adopts whatever its descendants leave behind, so that nothing of theirs goes uncounted.
    """
    base = layouts.locate()
    cli.setup(base, [major], with_tests=False)
    if kept:
        kept.mkdir(mode=0o700, exist_ok=True)
    home = kept or Path(tempfile.mkdtemp(prefix="pgdrill-bench-", dir="/var/tmp"))
    base.account.own(home)
    shutil.rmtree(home / "engine", ignore_errors=True)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(CHECKOUT / "plugins" / "module_utils", home / "engine" / ENGINE, ignore=ignored)
    run(["chmod", "-R", "a+rX", home / "engine"])
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            if base.account.is_other:
                os.setgroups([])
                os.setgid(base.account.gid)
                os.setuid(base.account.uid)
            if ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
                raise Failed("prctl(PR_SET_CHILD_SUBREAPER) failed")
            os.chdir(home)
            sys.path.insert(0, str(home / "engine"))
            measure(base.bin_dir(major), home)
            code = 0
        except Failed as error:
            print(f"{Path(sys.argv[0]).stem}: {error}", file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    try:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    finally:
        if not kept:
            shutil.rmtree(home, ignore_errors=True)
