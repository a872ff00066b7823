# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Replay of a pgbench load through pitr-wal get beside the replay of the same WAL that is in pg_wal already.

And beside the least that a restore_command can do, ``cp`` of a plain file on the same filesystem. All start from the
same copy of the cluster, replay every segment, and promote; they run in turn. What is compared is what the server's log
tells: from "redo starts" to "redo done".
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from wal_load import CLUSTER, Cluster, Failed, Usage, archive, as_server_user

DONE = re.compile(r"redo done at \S+ system usage: CPU: user: ([0-9.]+) s, system: ([0-9.]+) s, elapsed: ([0-9.]+) s")


class Replay:
    """One recovery of the copy."""

    def __init__(self, cluster: Cluster, name: str, restore_command: str, is_local: bool) -> None:
        self._cluster = cluster
        self.name = name
        self._command = restore_command
        self._is_local = is_local
        self._data = cluster.home / f"replay-{name}"
        self.busy = self.queued = 0.0

    def run(self) -> tuple[float, Usage]:
        """Seconds of redo, and what all processes used."""
        shutil.rmtree(self._data, ignore_errors=True)
        shutil.copytree(self._cluster.before, self._data)
        if self._is_local:
            for name in self._cluster.segments:
                shutil.copy2(self._cluster.wal / name, self._data / "pg_wal" / name)
        else:
            for path in (self._data / "pg_wal").iterdir():
                if path.is_file():
                    path.unlink()
        with open(self._data / "postgresql.conf", "a", encoding="utf-8") as file:
            file.write(f"restore_command = '{self._command}'\nrecovery_target_timeline = 'current'\n")
        (self._data / "recovery.signal").touch()
        log = Path(f"{self._data}.log")
        log.unlink(missing_ok=True)
        os.sync()
        usage = Usage()
        self._cluster.start(self._data, wait=False)
        deadline = time.monotonic() + 3600
        while "ready to accept connections" not in (text := log.read_text(encoding="utf-8") if log.exists() else ""):
            if time.monotonic() > deadline or "FATAL" in text:
                raise Failed(f"{self.name} does not come up:\n{text[-2000:]}")
            self._watch()
            time.sleep(0.1)
        self._check(text)
        self._cluster.stop(self._data, "immediate")
        usage.stop()
        shutil.rmtree(self._data)
        found = DONE.search(text)
        if found is None:
            raise Failed(f"the log of {self.name} does not tell how long redo took:\n{text[-2000:]}")
        self.busy = float(found.group(1)) + float(found.group(2))
        return float(found.group(3)), usage

    def _watch(self) -> None:
        """How long the process that replays has waited for a processor: what else the machine does shows here."""
        with contextlib.suppress(OSError, ValueError, IndexError):
            postmaster = (self._data / "postmaster.pid").read_text(encoding="ascii").split("\n")[0]
            for child in Path(f"/proc/{postmaster}/task/{postmaster}/children").read_text(encoding="ascii").split():
                if b"startup" in Path(f"/proc/{child}/cmdline").read_bytes():
                    # proc(5): nanoseconds at work, nanoseconds of waiting while it could have run, slices.
                    times = Path(f"/proc/{child}/schedstat").read_text(encoding="ascii")
                    self.queued = int(times.split()[1]) / 1e9

    def _check(self, text: str) -> None:
        """All of it was replayed, from where it should come."""
        last = self._cluster.segments[-1]
        restored = text.count("restored log file")
        if not self._is_local and (restored < len(self._cluster.segments) or f'"{last}"' not in text):
            raise Failed(f"only {restored} segments were fetched")
        if self._is_local and restored:
            raise Failed("segments were fetched although all are in pg_wal")


def measure(bin_dir: Path, home: Path, options: argparse.Namespace) -> None:
    cluster = Cluster(bin_dir, home, options.scale, options.segments)
    folder = home / "repository"
    if not (home / "archived").exists():
        shutil.rmtree(folder, ignore_errors=True)
        cluster.make_repository(folder, options.pg)
        for name in cluster.segments:
            archive.push(str(cluster.wal / name), str(folder), CLUSTER, "zstd:1")
        (home / "archived").touch()
    ahead = {} if options.prefetch is None else {"prefetch": options.prefetch}
    command = cluster.install(home / "pitr", folder, **ahead)
    fetch = f'{command} get --system-identifier={cluster.system_identifier} {CLUSTER} "%f" "%p"'
    copy = f'cp "{cluster.wal}/%f" "%p"'
    sides = [
        Replay(cluster, "local", "false", True),
        Replay(cluster, "get", fetch, False),
        Replay(cluster, "cp", copy, False),
    ]
    figures: dict[str, list[tuple[float, float]]] = {side.name: [] for side in sides}
    print(f"{len(cluster.segments)} segments of 16 MB")
    for number in range(options.rounds):
        for side in sides if number % 2 == 0 else reversed(sides):
            load = os.getloadavg()[0]
            seconds, usage = side.run()
            figures[side.name].append((seconds, seconds - side.queued))
            print(
                f"round {number + 1}: {side.name:<6} redo {seconds:6.2f} s, of them {side.busy:6.2f} s at work,"
                f" {side.queued:5.2f} s waiting for a processor, start to promotion {usage.wall:6.2f} s,"
                f" all processors {usage.cpu:6.2f} s, load before it {load:.2f}",
                flush=True,
            )
    for number, what in enumerate(("redo", "redo without the waiting for a processor")):
        medians = {name: statistics.median(item[number] for item in items) for name, items in figures.items()}
        for name in ("get", "cp"):
            ratios = [one[number] / local[number] for one, local in zip(figures[name], figures["local"], strict=True)]
            rounds = ", ".join(f"{ratio:.3f}" for ratio in ratios)
            print(
                f"{what}, median: local {medians['local']:.2f} s, {name} {medians[name]:.2f} s; ratio"
                f" {medians[name] / medians['local']:.3f}, of the rounds {rounds}"
            )


def main() -> int:
    """Returns 0 when everything worked, whatever the figures are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pg", type=int, default=18, help="PostgreSQL's major version (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="how often both run (%(default)s)")
    parser.add_argument("--segments", type=int, default=90, help="segments of 16 MB, at least (%(default)s)")
    parser.add_argument("--scale", type=int, default=50, help="scale of pgbench (%(default)s)")
    parser.add_argument("--prefetch", type=int, help="the setting prefetch; without it, its default")
    parser.add_argument("--keep", type=Path, help="directory for the cluster and its WAL, used again if it is there")
    options = parser.parse_args()
    compare: Callable[[Path, Path], None] = lambda bin_dir, home: measure(bin_dir, home, options)  # noqa: E731
    return as_server_user(options.pg, compare, options.keep)


if __name__ == "__main__":
    sys.exit(main())
