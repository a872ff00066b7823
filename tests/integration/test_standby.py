# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The role standby and the playbooks standby, switchover and promote, as a user runs them."""

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
from ansible_collections.pgdrill.pitr.tests.integration.support import until
from ansible_collections.pgdrill.pitr.tests.integration.test_playbooks import _changed
from ansible_collections.pgdrill.pitr.tests.integration.topology import Topology

pytestmark = pytest.mark.once


@pytest.fixture
def hosts(bin_dir: str, major: int, tmp_path: Path) -> Iterator[Topology]:
    """Nothing has been done yet."""
    made = Topology(bin_dir, major, tmp_path)
    try:
        yield made
    finally:
        if (made.repository / "main").exists():
            folder = ClusterFolder.open(str(made.repository), "main")
            for pid in [pid for name in (LOCK_FILE, STREAM_LOCK_FILE) for pid in holders(lock_path(folder, name))]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        made.close()


def follows(hosts: Topology, standby: str, primary: str) -> None:
    """What is committed on the primary arrives."""
    hosts[primary].sql("CREATE TABLE IF NOT EXISTS status AS SELECT 0 AS number")
    hosts[primary].sql("UPDATE status SET number = number + 1")
    number = hosts[primary].value("SELECT number FROM status")
    until(
        lambda: (
            hosts[standby].value("SELECT to_regclass('status') IS NOT NULL")
            and hosts[standby].value("SELECT number FROM status") == number
        ),
        "the standby",
    )


def test_site_makes_a_standby_and_leaves_it_alone_afterwards(hosts: Topology) -> None:
    hosts.succeed("site", "--check")
    assert "Zq7kx2" not in hosts.succeed("site", "-vvv")
    follows(hosts, "db2", "db1")
    passfile = hosts.run_dir / "db2" / "pitr" / "standby" / "main.pgpass"
    assert "Zq7kx2" in passfile.read_text(encoding="utf-8") and passfile.stat().st_mode & 0o777 == 0o600
    assert "Zq7kx2" not in hosts["db2"].show("primary_conninfo")
    for log in (hosts["db1"].log_text(), hosts["db2"].log_text()):
        assert "Zq7kx2" not in log
    role = "SELECT rolreplication, rolsuper, rolcreaterole, rolcreatedb, rolbypassrls FROM pg_roles WHERE rolname = %s"
    assert hosts["db1"].sql(role, "pitr_standby") == [(True, False, False, False, False)]
    reads = "SELECT has_function_privilege('pitr_standby', 'pg_read_binary_file(text)', 'EXECUTE')"
    assert not hosts["db1"].value(reads)
    assert set(_changed(hosts.succeed("site")).values()) == {0}
    assert set(_changed(hosts.succeed("site", "--check")).values()) == {0}


def test_switchover_and_back_with_the_inventory_following(hosts: Topology) -> None:
    hosts.succeed("site")
    follows(hosts, "db2", "db1")
    assert "switchover_confirm=main" in hosts.fail("switchover")
    identity = hosts["db1"].value("SELECT pg_postmaster_start_time()")
    hosts.succeed("switchover", "--check")
    assert hosts["db1"].value("SELECT pg_postmaster_start_time()") == identity
    # What cannot be finished is undone: the standby's command has lost its settings, so that it is not promoted.
    settings = hosts.run_dir / "db2" / "pitr" / "main.json"
    settings.rename(settings.with_suffix(".away"))
    output = hosts.fail("switchover", switchover_confirm="main")
    assert "was started again and is the primary as before" in output
    settings.with_suffix(".away").rename(settings)
    follows(hosts, "db2", "db1")
    output = hosts.succeed("switchover", switchover_confirm="main")
    assert "postgresql_primary:  db2" in output
    follows(hosts, "db1", "db2")
    # The inventory of before: nothing is done to whom it takes for the primary.
    assert "is a standby" in hosts.fail("site")
    hosts.primary = "db2"
    hosts.write_inventory()
    hosts.succeed("site")
    follows(hosts, "db1", "db2")
    assert set(_changed(hosts.succeed("site")).values()) == {0}


def test_failover_and_the_old_primary_comes_back_rewound(hosts: Topology) -> None:
    hosts.succeed("site")
    follows(hosts, "db2", "db1")
    confirmed = {"promote_confirm": "main"}
    assert "primary_answers" in hosts.fail("promote", **confirmed)
    hosts["db1"].stop("immediate")
    assert "promote_confirm=main" in hosts.fail("promote")
    output = hosts.succeed("promote", **confirmed)
    assert "is stopped, and can only come up as a standby" in output
    hosts["db2"].sql("UPDATE status SET number = 100")
    hosts.primary = "db2"
    hosts.write_inventory()
    assert "diverged" in hosts.fail("standby")
    hosts.succeed("standby", standby_rebuild="rewind")
    follows(hosts, "db1", "db2")
    hosts.succeed("site")
    assert set(_changed(hosts.succeed("site")).values()) == {0}


def test_synchronous_receiver_goes_along_with_the_switchover(hosts: Topology) -> None:
    receiving = {"receiver_state": "started", "receiver_synchronous": True}
    hosts.write_inventory(**receiving, standby_clone_from="repository", standby_archive_mode="always")
    hosts.succeed("site")
    follows(hosts, "db2", "db1")
    assert hosts["db2"].show("archive_mode") == "always"
    hosts.succeed("switchover", switchover_confirm="main")
    sync = "SELECT coalesce(max(sync_state), 'none') FROM pg_stat_replication WHERE application_name = 'pitr_main'"
    assert hosts["db2"].value(sync) == "sync"
    follows(hosts, "db1", "db2")
    # The slot of the receiver, too, is where it is used and nowhere else.
    slots = "SELECT array_agg(slot_name::text ORDER BY 1) FROM pg_replication_slots"
    assert hosts["db2"].value(slots) == ["db1", "pitr_main"]
    assert hosts["db1"].value(slots) is None
    hosts.primary = "db2"
    hosts.write_inventory(**receiving, standby_clone_from="repository", standby_archive_mode="always")
    hosts.succeed("site")
    assert set(_changed(hosts.succeed("site")).values()) == {0}
    assert hosts["db2"].value(sync) == "sync"


@pytest.mark.parametrize("rebuild", ["", "rewind"])
def test_restore_of_the_primary_takes_its_standby_along(hosts: Topology, rebuild: str) -> None:
    hosts.succeed("site")
    follows(hosts, "db2", "db1")
    hosts["db1"].sql("SELECT pg_create_restore_point('here')")
    hosts["db1"].sql("UPDATE status SET number = -1")
    hosts["db1"].sql("SELECT pg_switch_wal()")
    until(lambda: hosts["db2"].value("SELECT number FROM status") == -1, "the mistake arrives")
    hosts["db1"].stop()
    options = {"restore_force": True, "restore_target_name": "here", "restore_accept": True, "restore_confirm": "main"}
    output = hosts.succeed("restore", **options, restore_rebuild_standbys=rebuild)
    if not rebuild:
        assert "-e standby_rebuild=rewind" in output
        assert "diverged" in hosts.fail("standby")
        assert hosts["db2"].value("SELECT number FROM status") == -1
        hosts.succeed("standby", standby_rebuild="clone")
        assert list(hosts["db2"].data.parent.glob("data.old-*"))
    follows(hosts, "db2", "db1")
    assert hosts["db2"].value("SELECT number FROM status") > 0
    assert set(_changed(hosts.succeed("site")).values()) == {0}
