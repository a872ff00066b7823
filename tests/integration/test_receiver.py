# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The receiver against real servers: what it received is the server's WAL, whole, whatever dies meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from ansible_collections.pgdrill.pitr.tests.integration.receiving import SLOT, Receiving, content, unbroken
from ansible_collections.pgdrill.pitr.tests.integration.support import Restored, Sandbox, Storage, until

Restore = Callable[..., Restored]
MakeSandbox = Callable[..., Sandbox]
MakeReceiver = Callable[..., Receiving]
# An archive_command that archives nothing: everything that is in the archive came from the receiver.
ALONE = {"archive_command": "true"}


@pytest.fixture
def receiver() -> Iterator[MakeReceiver]:
    """Makes a receiver that ends with the test: ``receiver(primary, synchronous=True)``."""
    made: list[Receiving] = []

    def make(storage: Storage, **options: Any) -> Receiving:
        server = options.pop("server", None) or storage.server  # type: ignore[attr-defined]
        made.append(Receiving(storage, server, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_received_segments_are_the_servers_own(sandbox: MakeSandbox, receiver: MakeReceiver) -> None:
    primary = sandbox(settings=ALONE)
    receiving = receiver(primary).start()
    primary.fill(3)
    receiving.wait_for(primary.server)
    names = unbroken(primary)
    assert len(names) >= 3
    for stored in primary.segments():
        original = primary.server.data / "pg_wal" / stored.name
        assert content(stored) == original.read_bytes()
    # The newest finished one stays, so that pg_receivewal knows where to go on.
    until(lambda: [path.name for path in receiving.spool.iterdir() if len(path.name) == 24] == names[-1:], "a tidy spool")
    assert primary.server.value("SELECT active FROM pg_replication_slots WHERE slot_name = %s", SLOT)
    receiving.stop()
    assert receiving.streams == []
    assert receiving.status["state"] == "stopped"
