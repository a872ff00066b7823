# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the disasters need: an operator who types, clients who remember what was acknowledged to them, and patience."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from ansible_collections.pgdrill.pitr.molecule.shared.hosts import (
    ADDRESSES,
    CHECKOUT,
    CLUSTER,
    PLAIN,
    container,
    host,
    playbook,
    sql,
)

CLIENTS = 4

# Runs on the database host. A number is printed once its commit was acknowledged.
_CLIENT = """
import sys, psycopg2
client = int(sys.argv[1])
connection = psycopg2.connect("dbname=postgres")
cursor = connection.cursor()
cursor.execute("SELECT coalesce(max(number), 0) FROM ledger WHERE client = %s", (client,))
number = cursor.fetchone()[0]
while True:
    number += 1
    cursor.execute("INSERT INTO ledger VALUES (%s, %s)", (client, number))
    connection.commit()
    print(number, flush=True)
"""


def operator(situation: str, name: str, *arguments: str, fails: bool = False) -> str:
    """The operator runs a playbook with the inventory of a situation, and it succeeds, or is refused (``fails``).
    Returns what it printed."""
    begun = time.monotonic()
    inventory = (ADDRESSES, str(CHECKOUT / "molecule/topology/inventories" / f"{situation}.yml"))
    answer = playbook(name, *arguments, inventory=inventory)
    print(f"{name} {' '.join(arguments)}: {time.monotonic() - begun:.1f} s, exit {answer.returncode}")
    assert (answer.returncode != 0) == fails, answer.stdout[-6000:] + answer.stderr[-2000:]
    return answer.stdout + answer.stderr


def look_at_archive() -> dict[str, Any]:
    """What the module archive_info says on the repository host."""
    bin_dir = host("backup").check_output("ls -d /usr/lib/postgresql/*/bin").strip()
    argv = ["ansible", "-i", ADDRESSES, "-i", str(CHECKOUT / "molecule/topology/inventories/db1.yml"), "backup"]
    argv += ["-m", "pgdrill.pitr.archive_info", "-a", f"repository=/srv/pitr cluster={CLUSTER} bin_dir={bin_dir}"]
    plain = {**os.environ, "ANSIBLE_CALLBACK_RESULT_FORMAT": "json", **PLAIN}
    answer = subprocess.run(argv, env=plain, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return dict(json.loads(answer.stdout.partition("=>")[2]))


def put(name: str, source: Path, path: str, owner: str, mode: str) -> None:
    """A file on a host, moved into place when it is whole, its directory with it."""
    script = 'mkdir -p "$(dirname "$1")"; umask 077; cat > "$1.new"'
    script += '; chown "$2" "$1.new"; chmod "$3" "$1.new"; mv "$1.new" "$1"'
    argv = ["podman", "exec", "-i", container(name), "sh", "-ec", script, "sh", path, owner, mode]
    subprocess.run(argv, input=source.read_bytes(), check=True)


def until(what: str, condition: Callable[[], Any], seconds: float = 60) -> Any:
    """Wait until something is true, and return it; fail with its name when it does not come true."""
    end = time.monotonic() + seconds
    while True:
        result = condition()
        if result:
            return result
        assert time.monotonic() < end, f"not within {seconds} seconds: {what}"
        time.sleep(0.5)


class Ledger:
    """Clients that commit on a database host, one row after the other. What was acknowledged to them is kept here,
    outside of the database and its host, and is what :meth:`missing` asks a cluster for."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._clients: list[subprocess.Popen[bytes]] = []

    def begin(self, name: str) -> None:
        """Start the clients on the host of the primary; those that a failed test has left there go."""
        host(name).run("pkill -f 'INSERT INTO ledger'")
        sql(
            host(name),
            "CREATE TABLE IF NOT EXISTS ledger (client int, number int, at timestamptz DEFAULT clock_timestamp(),"
            " PRIMARY KEY (client, number))",
        )
        for client in range(CLIENTS):
            argv = ["podman", "exec", "--user=postgres", container(name), "python3", "-c", _CLIENT, str(client)]
            with open(self._directory / str(client), "ab") as acknowledged:
                process = subprocess.Popen(
                    argv, stdin=subprocess.DEVNULL, stdout=acknowledged, stderr=subprocess.DEVNULL
                )
            self._clients.append(process)
        until("the first commits are acknowledged", lambda: len(self.acknowledged()) > CLIENTS)

    def work(self, seconds: float) -> int:
        """Let the clients work; returns how many commits were acknowledged meanwhile."""
        before = len(self.acknowledged())
        time.sleep(seconds)
        return len(self.acknowledged()) - before

    def end(self, name: str) -> None:
        """Stop the clients. What the last commit of each was told is lost, which the comparison allows."""
        host(name).run("pkill -f 'INSERT INTO ledger'")
        self.wait()

    def wait(self) -> None:
        """The clients have ended by themselves, as their server is gone."""
        for process in self._clients:
            process.wait(60)
        self._clients = []

    def acknowledged(self) -> set[tuple[int, int]]:
        """(client, number) of every commit that a client was told of."""
        found = set()
        for client in range(CLIENTS):
            path = self._directory / str(client)
            text = path.read_text(encoding="ascii") if path.exists() else ""
            found |= {(client, int(line)) for line in text.splitlines(keepends=True) if line.endswith("\n")}
        return found

    def missing(self, name: str) -> set[tuple[int, int]]:
        """What was acknowledged and is not in the cluster of a host."""
        rows = sql(host(name), "SELECT client, number FROM ledger").splitlines()
        there = {(int(client), int(number)) for client, number in (row.split("|") for row in rows)}
        return self.acknowledged() - there

    def forget_after(self, name: str) -> None:
        """After a restore to a point before the end: what is in the cluster now is what counts."""
        rows = sql(host(name), "SELECT client, max(number) FROM ledger GROUP BY client").splitlines()
        last = {int(client): int(number) for client, number in (row.split("|") for row in rows)}
        for client in range(CLIENTS):
            kept = sorted(
                number for known, number in self.acknowledged() if known == client and number <= last.get(client, 0)
            )
            (self._directory / str(client)).write_text("".join(f"{number}\n" for number in kept), encoding="ascii")

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._clients:
            process.kill()
            process.wait()
