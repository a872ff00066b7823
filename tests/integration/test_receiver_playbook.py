# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The role receiver in site.yml, as a user runs it."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils.receiver import (
    LOCK_FILE,
    STREAM_LOCK_FILE,
    holders,
    lock_path,
)
from ansible_collections.pgdrill.pitr.plugins.module_utils.repository import ClusterFolder
from ansible_collections.pgdrill.pitr.tests.integration.test_playbooks import Site, _changed

pytestmark = pytest.mark.once

SYNC = "SELECT coalesce(max(sync_state), 'none') FROM pg_stat_replication WHERE application_name = 'pitr_main'"


@pytest.fixture
def fresh(bin_dir: str, major: int, tmp_path: Path) -> Iterator[Site]:
    """A sandbox in which nothing has been done yet; its receiver ends with the test."""
    site = Site(bin_dir, major, tmp_path)
    try:
        yield site
    finally:
        for pid in _processes(site):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        site.close()


def _processes(site: Site) -> list[int]:
    if not (site.repository / "main").exists():
        return []
    folder = ClusterFolder.open(str(site.repository), "main")
    return [pid for name in (LOCK_FILE, STREAM_LOCK_FILE) for pid in holders(lock_path(folder, name))]


def test_receiver_of_the_site_is_made_synchronous_asynchronous_and_removed_again(fresh: Site) -> None:
    synchronous = {"receiver_state": "started", "receiver_synchronous": True}
    fresh.succeed("site", "--check", **synchronous)
    fresh.succeed("site", **synchronous)
    assert fresh.server.value(SYNC) == "sync"
    assert fresh.server.show("max_slot_wal_keep_size") == "10GB"
    fresh.server.sql("CREATE TABLE acknowledged ()")
    processes = _processes(fresh)
    assert set(_changed(fresh.succeed("site", **synchronous)).values()) == {0}
    assert _processes(fresh) == processes
    assert "streaming" in fresh.succeed("status")
    # Commits stop to wait before the receiver stops to tell.
    assert "receiver_synchronous" in fresh.fail("site", receiver_state="stopped", receiver_synchronous=True)
    fresh.succeed("site", receiver_state="started")
    assert fresh.server.value(SYNC) == "async" and fresh.server.show("synchronous_standby_names") == ""
    fresh.succeed("site", receiver_state="absent")
    assert _processes(fresh) == []
    assert fresh.server.value("SELECT count(*) FROM pg_replication_slots") == 0
    assert set(_changed(fresh.succeed("site", receiver_state="absent")).values()) == {0}
