# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""No acknowledged commit is lost: clients write down what was acknowledged to them, the primary burns, and the restored
cluster is asked for every line of the ledger.

``make ledger`` shows the figures. ``PGDRILL_LEDGER_SECONDS`` is how long the clients work (default 3).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils.postgres import running_pid
from ansible_collections.pgdrill.pitr.tests.integration.receiving import APPLICATION, Receiving, armed
from ansible_collections.pgdrill.pitr.tests.integration.support import Restored, Sandbox, Server, until

Restore = Callable[..., Restored]
MakeSandbox = Callable[..., Sandbox]

CLIENTS = 8
SECONDS = float(os.environ.get("PGDRILL_LEDGER_SECONDS") or 3)
# What pgbench does, and one row that the ledger can be compared with.
SETUP = (
    "CREATE TABLE accounts (aid int PRIMARY KEY, balance int NOT NULL)",
    "INSERT INTO accounts SELECT generate_series(1, 1000), 0",
    "CREATE TABLE history (client int NOT NULL, number int NOT NULL, delta int NOT NULL, PRIMARY KEY (client, number))",
)


class Ledger:
    """What was acknowledged, one file for each client, on disk before the client goes on."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self._files = [directory / str(client) for client in range(CLIENTS)]
        self.attempts = [0] * CLIENTS

    def work(self, login: Any, client: int) -> None:
        """Commit and write down, until the server is gone."""
        descriptor = os.open(self._files[client], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            with contextlib.closing(login.connect()) as connection, contextlib.suppress(psycopg2.Error):
                connection.autocommit = False
                with connection.cursor() as cursor:
                    number = 0
                    while True:
                        number += 1
                        self.attempts[client] = number
                        account = (client * 7919 + number * 104729) % 1000 + 1
                        cursor.execute("UPDATE accounts SET balance = balance + 1 WHERE aid = %s", (account,))
                        cursor.execute("INSERT INTO history VALUES (%s, %s, 1)", (client, number))
                        connection.commit()
                        os.write(descriptor, f"{number}\n".encode())
                        os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def acknowledged(self) -> set[tuple[int, int]]:
        """(client, number) of every commit that a client was told of."""
        return {
            (client, int(line))
            for client, path in enumerate(self._files)
            for line in path.read_text(encoding="ascii").splitlines()
        }


def burn(server: Server) -> None:
    """SIGKILL the postmaster and all its children at once, and remove the directory, pg_wal included."""
    postmaster = running_pid(str(server.data)) or 0
    assert postmaster
    family = [postmaster, *_children(postmaster)]
    for pid in family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    until(lambda: not any(_is_there(pid) for pid in family), "the end of all processes")
    shutil.rmtree(server.data)


def _children(parent: int) -> list[int]:
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                stat = Path(f"/proc/{entry}/stat").read_text(encoding="ascii", errors="replace")
                if int(stat.rpartition(")")[2].split()[1]) == parent:
                    found.append(int(entry))
    return found


def _is_there(pid: int) -> bool:
    with contextlib.suppress(OSError):
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
        return stat.rpartition(")")[2].split()[0] != "Z"
    return False


class Fire:
    """One run: eight clients, then the primary burns. ``lost`` is what was acknowledged and is not restored."""

    def __init__(self, primary: Sandbox, directory: Path) -> None:
        for statement in SETUP:
            primary.server.sql(statement)
        primary.backup("before-the-fire")
        self.primary = primary
        self.ledger = Ledger(directory / "ledger")
        self.seconds = 0.0

    def rage(self) -> None:
        began = time.monotonic()
        threads = [
            threading.Thread(target=self.ledger.work, args=(self.primary.server.login, client))
            for client in range(CLIENTS)
        ]
        for thread in threads:
            thread.start()
        until(lambda: time.monotonic() - began > SECONDS and min(self.ledger.attempts) > 20, "some work")
        burn(self.primary.server)
        for thread in threads:
            thread.join(30)
        assert not any(thread.is_alive() for thread in threads)
        self.seconds = time.monotonic() - began

    def told(self, name: str, server: Server) -> set[tuple[int, int]]:
        """Compare, print the figures, return what is lost."""
        acknowledged = self.ledger.acknowledged()
        restored = {(int(row[0]), int(row[1])) for row in server.sql("SELECT client, number FROM history")}
        # Committed and not acknowledged is allowed, once for each client: the answer was on its way.
        assert len(restored - acknowledged) <= CLIENTS
        assert server.value("SELECT sum(balance) FROM accounts") == len(restored)
        lost = acknowledged - restored
        print(
            f"\nledger: {name}: {len(acknowledged)} acknowledged by {CLIENTS} clients in {self.seconds:.1f} s,"
            f" {len(acknowledged & restored)} of them restored, {len(lost)} lost"
        )
        return lost


@pytest.fixture
def closing() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


def test_synchronous_receiver_loses_no_acknowledged_commit(
    sandbox: MakeSandbox, restored: Restore, tmp_path: Path, closing: contextlib.ExitStack
) -> None:
    primary = sandbox()
    fire = Fire(primary, tmp_path)
    receiving = Receiving(primary, primary.server, synchronous=True)
    closing.callback(receiving.close)
    receiving.start()
    primary.configure({"synchronous_standby_names": f'"{APPLICATION}"'})
    primary.server.sql("SELECT pg_reload_conf()")
    until(lambda: armed(primary.server), "a synchronous receiver")
    fire.rage()
    result = restored(primary, use_partial=True)
    assert result.plan.from_receiver
    result.run()
    lost = fire.told("synchronous receiver", result.server)
    assert not lost, sorted(lost)[:20]


def test_asynchronous_receiver_loses_little_and_the_number_is_told(
    sandbox: MakeSandbox, restored: Restore, tmp_path: Path, closing: contextlib.ExitStack
) -> None:
    primary = sandbox()
    fire = Fire(primary, tmp_path)
    receiving = Receiving(primary, primary.server)
    closing.callback(receiving.close)
    receiving.start()
    fire.rage()
    result = restored(primary, use_partial=True).run()
    fire.told("asynchronous receiver", result.server)


def test_archive_command_alone_loses_up_to_a_segment_and_the_number_is_told(
    sandbox: MakeSandbox, restored: Restore, tmp_path: Path
) -> None:
    primary = sandbox()
    fire = Fire(primary, tmp_path)
    fire.rage()
    result = restored(primary).run()
    fire.told("archive_command alone", result.server)
