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
        lambda: hosts[standby].value("SELECT to_regclass('status') IS NOT NULL")
        and hosts[standby].value("SELECT number FROM status") == number,
        "the standby",
    )


def test_site_makes_a_standby_and_leaves_it_alone_afterwards(hosts: Topology) -> None:
    hosts.succeed("site", "--check")
    hosts.succeed("site")
    follows(hosts, "db2", "db1")
    assert set(_changed(hosts.succeed("site")).values()) == {0}
    assert set(_changed(hosts.succeed("site", "--check")).values()) == {0}
