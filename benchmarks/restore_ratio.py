# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Backup and restore of a cluster of a gigabyte and more, beside pgBackRest, in the same run and in turn.

Both compress with lz4 (or zstd, --compression) level 1 and use two processes (``process-max``).
benchmarks/README.md says what else is the same.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from wal_load import CLUSTER, ENGINE, PORT, Cluster, Failed, as_server_user, run

PROCESSES = 2
_COPY = "full, not read back"
PGBACKREST = """\
[global]
repo1-path={home}/pgbackrest
spool-path={home}/pgbackrest-spool
lock-path={home}/pgbackrest-lock
log-level-file=off
log-level-console=warn
log-level-stderr=off
compress-type={compress}
compress-level=1
process-max={processes}
start-fast=y
repo1-retention-full=99
repo1-bundle={bundle}

[{cluster}]
pg1-path={data}
pg1-socket-path={home}
pg1-port={port}
pg1-user=postgres
"""
# What a module's main() does, without Ansible around it, as pgBackRest has none around it.
BACKUP = """
import json, sys
sys.path.insert(0, sys.argv[1])
from {engine}.backup import BaseBackup
from {engine}.postgres import Login
from {engine}.repository import ClusterFolder
asked = json.loads(sys.argv[2])
folder = ClusterFolder.open(asked["repository"], asked["cluster"])
login = Login(unix_socket=asked["socket"], port=asked["port"])
print(BaseBackup(folder, login, asked["bin_dir"], label=asked["label"], **asked["options"]).take().label)
"""
RESTORE = """
import json, sys
sys.path.insert(0, sys.argv[1])
from {engine}.request import Request
from {engine}.restore import Restore
restore = Restore(Request(**json.loads(sys.argv[2])))
restore.execute(restore.plan())
"""


class Usage:
    """Seconds on the clock, and of all processors: of our children, and of the server's, which compress a backup."""

    def __init__(self, data: Path) -> None:
        self._server = int((data / "postmaster.pid").read_text(encoding="utf-8").split()[0])
        self._wall = time.monotonic()
        self._cpu = self._used()
        self.wall = self.cpu = 0.0

    def stop(self) -> None:
        self.wall = time.monotonic() - self._wall
        # The server counts the time of a process when it has ended.
        time.sleep(0.3)
        # pgBackRest leaves its workers to whoever adopts them, which is us (as_server_user). So is the server, which
        # stays.
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
        self.cpu = self._used() - self._cpu

    def _used(self) -> float:
        ours = resource.getrusage(resource.RUSAGE_CHILDREN)
        fields = Path(f"/proc/{self._server}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        # cutime and cstime of proc_pid_stat(5)
        return ours.ru_utime + ours.ru_stime + (int(fields[13]) + int(fields[14])) / os.sysconf("SC_CLK_TCK")


class Ours:
    """base_backup and restore."""

    name = "pgdrill"

    def __init__(self, cluster: Cluster, options: argparse.Namespace) -> None:
        self._cluster = cluster
        self._options = options
        self._repository = cluster.home / "repository"
        self.target = cluster.home / "restored-pgdrill"
        self._command = ""
        self._count = 0
        self.label = ""

    def prepare(self) -> str:
        """Make the repository anew; returns the archive_command."""
        shutil.rmtree(self._repository, ignore_errors=True)
        self._cluster.make_repository(self._repository, self._options.pg)
        self._command = self._cluster.install(self._cluster.home / "pitr", self._repository)
        return f'{self._command} push {CLUSTER} "%p"'

    def _python(self, script: str, asked: dict[str, Any]) -> str:
        home = self._cluster.home / "engine"
        return run([sys.executable, "-c", script.format(engine=ENGINE), home, json.dumps(asked)])

    def backup(self, **options: Any) -> None:
        self._count += 1
        asked = {
            "repository": str(self._repository),
            "cluster": CLUSTER,
            "socket": str(self._cluster.home),
            "port": PORT,
            "bin_dir": str(self._cluster.bin_dir),
            "label": f"bench{self._count}",
            "options": {"compression": self._options.compression, **options},
        }
        self.label = self._python(BACKUP, asked).strip()

    def restore(self, delta: bool = False) -> None:
        asked = {
            "repository": str(self._repository),
            "cluster": CLUSTER,
            "pgdata": str(self.target),
            "bin_dir": str(self._cluster.bin_dir),
            "wal_command": self._command,
            "target_options": {"recovery_target": "immediate"},
            "backup": self.label,
            "archive_after": "off",
        }
        if delta:
            asked.update(delta=True, force=True)
        self._python(RESTORE, asked)

    @property
    def stored(self) -> int:
        return _bytes(self._repository / CLUSTER / "backups" / self.label)


class PgBackRest:
    """pgbackrest backup and restore."""

    name = "pgbackrest"

    def __init__(self, cluster: Cluster, options: argparse.Namespace) -> None:
        self._cluster = cluster
        self._options = options
        self._config = cluster.home / "pgbackrest.conf"
        self.target = cluster.home / "restored-pgbackrest"

    def _run(self, *arguments: str) -> str:
        return run(["pgbackrest", f"--config={self._config}", f"--stanza={CLUSTER}", *arguments])

    def prepare(self) -> str:
        """Make the repository anew; returns the archive_command."""
        for name in ("pgbackrest", "pgbackrest-spool", "pgbackrest-lock"):
            shutil.rmtree(self._cluster.home / name, ignore_errors=True)
            (self._cluster.home / name).mkdir()
        text = PGBACKREST.format(
            home=self._cluster.home, data=self._cluster.data, cluster=CLUSTER, port=PORT, processes=PROCESSES,
            bundle="y" if self._options.bundle else "n",
            compress={"zstd": "zst"}.get(self._options.compression, self._options.compression),
        )  # fmt: skip
        self._config.write_text(text, encoding="utf-8")
        self._run("--no-online", "stanza-create")
        return f'pgbackrest --config={self._config} --stanza={CLUSTER} archive-push "%p"'

    def backup(self) -> None:
        self._run("--type=full", "backup")

    def restore(self, delta: bool = False) -> None:
        self.target.mkdir(mode=0o700, exist_ok=True)
        self._run(*(["--delta"] if delta else []), "--type=immediate", f"--pg1-path={self.target}", "restore")

    @property
    def stored(self) -> int:
        newest = max((self._cluster.home / "pgbackrest" / "backup" / CLUSTER).glob("*F"))
        return _bytes(newest)


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


class Contest:
    """Takes the figures, side by side."""

    def __init__(self, cluster: Cluster, options: argparse.Namespace) -> None:
        self._cluster = cluster
        self._ours = Ours(cluster, options)
        self._sides: dict[str, Ours | PgBackRest] = {self._ours.name: self._ours}
        if shutil.which("pgbackrest"):
            self._sides[PgBackRest.name] = PgBackRest(cluster, options)
        else:
            print("pgbackrest is not installed: only ours is measured, there is nothing to compare it with")
        self._commands = {name: side.prepare() for name, side in self._sides.items()}
        self.figures: dict[tuple[str, str], list[Usage]] = {}

    def _timed(self, what: str, name: str, work: Callable[[], None], number: int) -> None:
        os.sync()
        load = os.getloadavg()[0]
        usage = Usage(self._cluster.data)
        work()
        usage.stop()
        self.figures.setdefault((what, name), []).append(usage)
        print(
            f"round {number + 1}: {what:<20} {name:<11} {usage.wall:6.2f} s, processors {usage.cpu:6.2f} s,"
            f" load before it {load:.2f}",
            flush=True,
        )

    def _archive_with(self, name: str) -> None:
        command = self._commands[name].replace("'", "''")
        self._sql(f"ALTER SYSTEM SET archive_command = '{command}'")
        self._sql("SELECT pg_reload_conf()")
        time.sleep(0.5)

    def _sql(self, text: str) -> None:
        self._cluster.program("psql", "-X", "-q", "-d", "postgres", "-c", text)

    def round(self, number: int) -> None:
        """Everything once, by both."""
        order = list(self._sides) if number % 2 == 0 else list(reversed(self._sides))
        for name in order:
            self._archive_with(name)
            self._timed("full backup", name, self._sides[name].backup, number)
            if name == self._ours.name:
                # Which is what pgBackRest does: it does not read back what it has stored.
                self._timed(_COPY, name, lambda: self._ours.backup(verify=False), number)
        for name in order:
            side = self._sides[name]
            shutil.rmtree(side.target, ignore_errors=True)
            self._timed("fresh restore", name, side.restore, number)
            _compare(self._cluster.data, side.target)
        for name in order:
            side = self._sides[name]
            self._timed("delta, no change", name, lambda side=side: side.restore(delta=True), number)  # type: ignore[misc]
            _compare(self._cluster.data, side.target)
        if number == 0:
            for name in order:
                print(f"{name}: {self._sides[name].stored >> 20} MB stored")

    def tell(self) -> None:
        """Medians and ratios."""
        medians = {
            key: (statistics.median(item.wall for item in items), statistics.median(item.cpu for item in items))
            for key, items in self.figures.items()
        }
        for (what, name), (wall, cpu) in medians.items():
            print(f"{what:<20} {name:<11} median {wall:6.2f} s, processors {cpu:6.2f} s")
        for what in dict.fromkeys(what for what, _name in medians):
            ours = medians[what, self._ours.name]
            theirs = medians.get((what, PgBackRest.name))
            beside = PgBackRest.name
            if what == _COPY:
                theirs = medians["full backup", PgBackRest.name]
            if theirs is not None:
                pairs = zip(
                    self.figures[what, self._ours.name],
                    self.figures[what if what != _COPY else "full backup", PgBackRest.name],
                    strict=True,
                )
                rounds = ", ".join(f"{one.wall / other.wall:.2f}" for one, other in pairs)
                print(
                    f"ratio of {what} to {beside}: {ours[0] / theirs[0]:.2f} on the clock (rounds {rounds}),"
                    f" {ours[1] / theirs[1]:.2f} of the processors"
                )


def _compare(data: Path, restored: Path) -> None:
    """The largest files are there with their size; pg_control is in place. Raises Failed."""
    if not (restored / "global" / "pg_control").exists():
        raise Failed(f"{restored} has no pg_control")
    for path in sorted((data / "base").rglob("*"), key=lambda path: path.stat().st_size)[-20:]:
        other = restored / path.relative_to(data)
        if other.stat().st_size != path.stat().st_size:
            raise Failed(f"{other} has not the size of {path}")


def measure(bin_dir: Path, home: Path, options: argparse.Namespace) -> None:
    cluster = Cluster(bin_dir, home, options.scale, 0)
    (cluster.data / "conf.d").mkdir(exist_ok=True)
    with open(cluster.data / "postgresql.conf", "a", encoding="utf-8") as file:
        file.write("archive_mode = on\nwal_keep_size = 0\nmax_wal_size = 1GB\nautovacuum = off\n")
        if options.pg >= 17:
            file.write("summarize_wal = on\n")
        # As the role primary has it, and last; without it a restore would have to add it.
        file.write("include_dir = 'conf.d'\n")
    cluster.start(cluster.data)
    try:
        size = _bytes(cluster.data / "base")
        print(f"PostgreSQL {options.pg}, {size >> 20} MB of databases, {os.cpu_count()} processors", flush=True)
        contest = Contest(cluster, options)
        for number in range(options.rounds):
            contest.round(number)
        contest.tell()
    finally:
        cluster.stop(cluster.data)


def main() -> int:
    """Returns 0 when everything worked, whatever the figures are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pg", type=int, default=15, help="PostgreSQL's major version (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="how often both run (%(default)s)")
    parser.add_argument("--scale", type=int, default=75, help="scale of pgbench (%(default)s)")
    parser.add_argument("--compression", choices=("lz4", "zstd", "gzip"), default="lz4", help="of both (%(default)s)")
    parser.add_argument("--bundle", action="store_true", help="pgBackRest bundles small files (repo-bundle)")
    parser.add_argument("--keep", type=Path, help="directory for the cluster, used again if it is there")
    options = parser.parse_args()
    compare: Callable[[Path, Path], None] = lambda bin_dir, home: measure(bin_dir, home, options)  # noqa: E731
    return as_server_user(options.pg, compare, options.keep)


if __name__ == "__main__":
    sys.exit(main())
