# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""An incremental backup after one percent of the rows has changed beside a full one, and their restores.

The rows lie together, as those of today do in a table that grows. Backups are taken, verified and made visible as the
module does it; the restore of the chain ends with a directory that a server can start from.
"""

from __future__ import annotations

import argparse
import importlib
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from wal_load import CLUSTER, ENGINE, PORT, SEGMENT, SETTINGS, Failed, as_server_user, run


def engine(name: str) -> Any:
    """A module of the engine, from the copy that the server's user can read."""
    return importlib.import_module(f"{ENGINE}.{name}")


class Bench:
    """A primary that archives into a repository, both made here."""

    def __init__(self, bin_dir: Path, home: Path, scale: int, major: int) -> None:
        self._bin_dir = str(bin_dir)
        self._home = home
        self._data = home / "data"
        self._env = {"PATH": "/usr/bin:/bin", "PGHOST": str(home), "PGPORT": str(PORT), "PGUSER": "postgres"}
        self._program("initdb", "-D", self._data, "-U", "postgres", "-A", "trust", "--locale=C", "-N", "-k")
        identifier = engine("postgres").control_data(self._bin_dir, str(self._data)).system_identifier
        repository, install = engine("repository"), engine("install")
        chapter = repository.Chapter(1, identifier, SEGMENT, major, "2026-01-01T00:00:00+00:00")
        repository.create(str(home / "repository"), CLUSTER, chapter)
        self.folder = repository.ClusterFolder.open(str(home / "repository"), CLUSTER)
        install.install(str(home / "pitr"), CLUSTER, {"repository": str(home / "repository"), "compression": "auto"})
        self._command = str(home / "pitr" / install.COMMAND)
        archive = engine("postgres").shell_command([self._command, "push", CLUSTER], ["%p"])
        more = {"archive_mode": "on", "archive_command": archive, "wal_keep_size": "0", "summarize_wal": "on"}
        with open(self._data / "postgresql.conf", "a", encoding="utf-8") as file:
            for name, value in {**SETTINGS, **more, "unix_socket_directories": str(home)}.items():
                file.write(f"{name} = {engine('postgres').conf_literal(value)}\n")
        self._program("pg_ctl", "start", "-s", "-w", "-D", self._data, "-l", home / "log", quiet=True)
        self._program("pgbench", "-i", "-q", "-s", scale, "postgres")
        self.login = engine("postgres").Login(unix_socket=str(home), port=PORT)

    def _program(self, name: str, *arguments: object, quiet: bool = False) -> None:
        words = [f"{self._bin_dir}/{name}", *map(str, arguments)]
        run(["/bin/sh", "-c", '"$@" >/dev/null 2>&1', "sh", *words] if quiet else words, env=self._env)

    def sql(self, text: str) -> None:
        self._program("psql", "-X", "-q", "-d", "postgres", "-c", text)

    def stop(self) -> None:
        self._program("pg_ctl", "stop", "-s", "-D", self._data, "-m", "immediate")

    def backup(self, kind: str) -> tuple[Any, float]:
        started = time.monotonic()
        basis = engine("incremental").Basis(self.folder, self.login, kind)
        taken = engine("backup").BaseBackup(self.folder, self.login, self._bin_dir, basis=basis).take()
        return taken, time.monotonic() - started

    def restore(self, label: str) -> float:
        target = self._home / "restored"
        request = engine("request").Request(
            repository=str(self._home / "repository"), cluster=CLUSTER, pgdata=str(target), bin_dir=self._bin_dir,
            wal_command=self._command, target_options={"recovery_target": "immediate"}, backup=label,
            archive_after="off",
        )  # fmt: skip
        started = time.monotonic()
        restore = engine("restore").Restore(request)
        restore.execute(restore.plan())
        seconds = time.monotonic() - started
        shutil.rmtree(target)
        return seconds


def measure(bin_dir: Path, home: Path, options: argparse.Namespace) -> None:
    bench = Bench(bin_dir, home, options.scale, options.pg)
    figures: dict[str, list[float]] = {"full": [], "incremental": []}
    try:
        rows = options.scale * 100000
        for number in range(options.rounds):
            labels = {}
            for kind in ("full", "incremental"):
                if kind == "incremental":
                    first = number * rows // 100
                    bench.sql(
                        "UPDATE pgbench_accounts SET abalance = abalance + 1"
                        f" WHERE aid > {first} AND aid <= {first + rows // 100}"
                    )
                taken, seconds = bench.backup(kind)
                labels[kind] = taken.label
                figures[kind].append(seconds)
                print(
                    f"round {number + 1}: {kind:<11} {seconds:6.2f} s, {taken.database_bytes / 2**20:7.1f} MiB of the"
                    f" cluster, {taken.stored_bytes / 2**20:6.1f} MiB stored",
                    flush=True,
                )
            for kind, label in labels.items():
                print(f"round {number + 1}: restore of the {kind} one {bench.restore(label):6.2f} s", flush=True)
    finally:
        bench.stop()
    medians = {kind: statistics.median(seconds) for kind, seconds in figures.items()}
    ratio = medians["incremental"] / medians["full"]
    print(f"median: full {medians['full']:.2f} s, incremental {medians['incremental']:.2f} s; ratio {ratio:.2f}")
    if ratio > options.limit:
        raise Failed(f"the ratio is above {options.limit}")


def main() -> int:
    """Returns 0 when the ratio is what it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pg", type=int, default=18, help="PostgreSQL's major version (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="how often both are taken (%(default)s)")
    parser.add_argument("--scale", type=int, default=75, help="scale of pgbench, 15 MB each (%(default)s)")
    parser.add_argument("--limit", type=float, default=0.3, help="the ratio that is wanted (%(default)s)")
    options = parser.parse_args()
    return as_server_user(options.pg, lambda bin_dir, home: measure(bin_dir, home, options), None)


if __name__ == "__main__":
    sys.exit(main())
