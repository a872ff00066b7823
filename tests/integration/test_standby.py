# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The role standby and the playbooks standby, switchover and promote, as a user runs them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from ansible_collections.pgdrill.pitr.tests.integration.support import until
from ansible_collections.pgdrill.pitr.tests.integration.test_playbooks import _changed
from ansible_collections.pgdrill.pitr.tests.integration.topology import Topology


@pytest.fixture
def hosts(bin_dir: str, major: int, tmp_path: Path) -> Iterator[Topology]:
    """Nothing has been done yet."""
    made = Topology(bin_dir, major, tmp_path)
    try:
        yield made
    finally:
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
    hosts.succeed("site")
    follows(hosts, "db2", "db1")
    assert set(_changed(hosts.succeed("site")).values()) == {0}
    assert set(_changed(hosts.succeed("site", "--check")).values()) == {0}


def test_switchover_and_back_with_the_inventory_following(hosts: Topology) -> None:
    hosts.succeed("site")
    follows(hosts, "db2", "db1")
    assert "switchover_confirm=main" in hosts.fail("switchover")
    hosts.succeed("switchover", "--check")
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
