# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A backlog of real 16 MB segments, archived as PostgreSQL's archiver does it: one call after another.

Beside pgBackRest's asynchronous archive-push where that is installed, in the same run and in turn. Both compress with
zstd level 1 and end with every segment on stable storage. benchmarks/README.md says what else is the same.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from wal_load import CLUSTER, Cluster, Failed, Usage, as_server_user, check_stored, run, segment_paths

PGBACKREST = """\
[global]
repo1-path={home}/pgbackrest
spool-path={home}/pgbackrest-spool
lock-path={home}/pgbackrest-lock
log-level-file=off
log-level-console=off
log-level-stderr=off
archive-async=y
compress-type=zst
compress-level=1
process-max=2

[{cluster}]
pg1-path={data}
pg1-socket-path={home}
"""


class Archiver:
    """What pgarch.c does: the oldest .ready, one call, .done."""

    def __init__(self, cluster: Cluster, segments: int) -> None:
        self._cluster = cluster
        self.names = cluster.segments[-segments:]
        self._status = cluster.wal / "archive_status"

    def make_ready(self) -> None:
        for path in self._status.iterdir():
            path.unlink()
        for name in self.names:
            (self._status / f"{name}.ready").touch()

    def work_off(self, command: str) -> tuple[Usage, list[float]]:
        """All of them. What it took, and the seconds of each call."""
        usage = Usage()
        calls = []
        while True:
            ready = min((name for name in os.listdir(self._status) if name.endswith(".ready")), default="")
            if not ready:
                break
            name = ready.removesuffix(".ready")
            started = time.monotonic()
            line = command.replace("%p", f"pg_wal/{name}").replace("%f", name)
            code = subprocess.call(["/bin/sh", "-c", line], cwd=self._cluster.data, stdin=subprocess.DEVNULL)
            if code != 0:
                raise Failed(f"{line} ended with {code}")
            calls.append(time.monotonic() - started)
            os.rename(self._status / ready, self._status / f"{name}.done")
        usage.stop()
        return usage, calls


class Ours:
    """pitr-wal push."""

    def __init__(self, cluster: Cluster, major: int, options: argparse.Namespace) -> None:
        self._cluster, self._major, self._options = cluster, major, options
        self._repository = cluster.home / "repository"

    def prepare(self) -> str:
        shutil.rmtree(self._repository, ignore_errors=True)
        shutil.rmtree(self._cluster.wal / ".pitr-push", ignore_errors=True)
        self._cluster.make_repository(self._repository, self._major)
        ahead = {} if self._options.push_ahead is None else {"push_ahead": self._options.push_ahead}
        command = self._cluster.install(self._cluster.home / "pitr", self._repository, **ahead)
        return f'{command} push {CLUSTER} "%p"'

    def check(self, names: list[str]) -> int:
        check_stored(self._cluster, self._repository, names, self._cluster.home / "scratch")
        return sum(path.stat().st_size for path in segment_paths(self._repository))


class PgBackRest:
    """pgbackrest archive-push, asynchronous."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._config = cluster.home / "pgbackrest.conf"

    def _run(self, *arguments: str) -> str:
        return run(["pgbackrest", f"--config={self._config}", f"--stanza={CLUSTER}", *arguments])

    def prepare(self) -> str:
        for name in ("pgbackrest", "pgbackrest-spool", "pgbackrest-lock"):
            shutil.rmtree(self._cluster.home / name, ignore_errors=True)
            (self._cluster.home / name).mkdir()
        text = PGBACKREST.format(home=self._cluster.home, data=self._cluster.data, cluster=CLUSTER)
        self._config.write_text(text, encoding="utf-8")
        self._run("--no-online", "stanza-create")
        return f'pgbackrest --config={self._config} --stanza={CLUSTER} archive-push "%p"'

    def check(self, names: list[str]) -> int:
        stored = list((self._cluster.home / "pgbackrest").rglob("*.zst"))
        if {path.name[:24] for path in stored} != set(names):
            raise Failed("pgBackRest has not stored every segment")
        return sum(path.stat().st_size for path in stored)


def measure(bin_dir: Path, home: Path, options: argparse.Namespace) -> None:
    cluster = Cluster(bin_dir, home, options.scale, options.segments)
    archiver = Archiver(cluster, options.segments)
    sides: dict[str, Ours | PgBackRest] = {"pitr-wal": Ours(cluster, options.pg, options)}
    if shutil.which("pgbackrest"):
        sides["pgbackrest"] = PgBackRest(cluster)
    else:
        print("pgbackrest is not installed: only pitr-wal is measured, there is nothing to compare it with")
    figures: dict[str, list[Usage]] = {name: [] for name in sides}
    for number in range(options.rounds):
        order = list(sides) if number % 2 == 0 else list(reversed(sides))
        for name in order:
            command = sides[name].prepare()
            archiver.make_ready()
            os.sync()
            load = os.getloadavg()[0]
            usage, calls = archiver.work_off(command)
            stored = sides[name].check(archiver.names)
            figures[name].append(usage)
            slow = [seconds for seconds in calls if seconds > 0.1]
            print(
                f"round {number + 1}: {name:<11} {usage.wall:6.2f} s, processors {usage.cpu:6.2f} s,"
                f" {len(calls)} calls, {len(slow)} of them over 0.1 s, median {1000 * statistics.median(calls):.1f} ms,"
                f" {stored >> 20} MB stored, load before it {load:.2f}",
                flush=True,
            )
    _compare(figures)


def _compare(figures: dict[str, list[Usage]]) -> None:
    medians = {
        name: (statistics.median(item.wall for item in items), statistics.median(item.cpu for item in items))
        for name, items in figures.items()
    }
    for name, (wall, cpu) in medians.items():
        print(f"{name}: median {wall:.2f} s, processors {cpu:.2f} s")
    if len(medians) == 2:
        ours, theirs = medians["pitr-wal"], medians["pgbackrest"]
        print(f"ratio: {ours[0] / theirs[0]:.2f} on the clock, {ours[1] / theirs[1]:.2f} of the processors")


def main() -> int:
    """Returns 0 when everything worked, whatever the figures are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pg", type=int, default=15, help="PostgreSQL's major version (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="how often both run (%(default)s)")
    parser.add_argument("--segments", type=int, default=64, help="segments of 16 MB (%(default)s)")
    parser.add_argument("--scale", type=int, default=50, help="scale of pgbench (%(default)s)")
    parser.add_argument("--push-ahead", type=int, help="the setting push_ahead; without it, its default")
    parser.add_argument("--keep", type=Path, help="directory for the cluster and its WAL, used again if it is there")
    options = parser.parse_args()
    compare: Callable[[Path, Path], None] = lambda bin_dir, home: measure(bin_dir, home, options)  # noqa: E731
    return as_server_user(options.pg, compare, options.keep)


if __name__ == "__main__":
    sys.exit(main())
