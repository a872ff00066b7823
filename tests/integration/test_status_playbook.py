# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The role monitoring in site.yml, and the table of the playbook status.yml, as a user runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from ansible_collections.pgdrill.pitr.tests.integration.test_playbooks import Site, _changed

pytestmark = pytest.mark.once

# What the machine of the tests has of room is not the matter.
LIMITS = {"free_percent": [0, 0], "days_left": [0, 0], "drill_age": ["30 days", "90 days"]}
MAY = "SELECT pg_has_role('pitr_backup', 'pg_monitor', 'member')"


@pytest.fixture
def fresh(bin_dir: str, major: int, tmp_path: Path) -> Iterator[Site]:
    """A sandbox in which nothing has been done yet."""
    site = Site(bin_dir, major, tmp_path)
    try:
        yield site
    finally:
        site.close()


def test_site_is_watched_shown_and_no_longer_watched(fresh: Site) -> None:
    watched = {"monitoring_state": "present", "monitoring_limits": LIMITS}
    place = fresh.run_dir / "primary" / "pitr"
    fresh.succeed("site", "--check", **watched)
    assert not place.exists()
    assert "no limit 'full'" in fresh.fail("site", monitoring_state="present", monitoring_limits={"full": [1, 2]})
    fresh.succeed("site", **watched)
    assert set(_changed(fresh.succeed("site", **watched)).values()) == {0}
    assert set(_changed(fresh.succeed("site", "--check", **watched)).values()) == {0}
    assert fresh.server.value(MAY) is True

    def asked() -> tuple[int, dict[str, str]]:
        argv = [str(place / "pitr-status"), "main", "--json"]
        answer = subprocess.run(argv, capture_output=True, text=True, check=False)
        (cluster,) = json.loads(answer.stdout)["clusters"]
        return answer.returncode, {each["check"]: each["level"] for each in cluster["findings"]}

    code, levels = asked()
    assert (code, {check for check, level in levels.items() if level != "OK"}) == (1, {"drill"})
    shown = fresh.succeed("status", **watched)
    # The table comes first.
    assert shown.index("worst finding") < shown.index("drill: no drill is known") < shown.index("recovery_windows")
    assert not any(_changed(shown).values())
    # Another cluster of the inventory is in the same table, even when nothing is to be had of it.
    machine = yaml.safe_load((fresh.directory / "sandbox.yml").read_text(encoding="utf-8"))
    variables = {"pitr_cluster": "another", "sandbox": machine, "ansible_python_interpreter": sys.executable}
    inventory = fresh.directory / "another.yml"
    inventory.write_text(json.dumps({"pitr_repository": {"hosts": {"another": variables}}}), encoding="utf-8")
    shown = fresh.fail("status", "-i", str(inventory), **watched)
    rows = shown[shown.index("worst finding") :].partition("TASK [")[0].splitlines()[1:]
    assert [row.split()[:2] for row in rows if row.strip()] == [["another", "CRITICAL"], ["main", "WARNING"]], shown
    assert "repository: " in shown and "has no cluster 'another'" in shown
    fresh.succeed("drill", drill_scenarios=["latest"], **watched)
    # The restored primary is watched like the one before. Its archive_command failed on purpose until it was accepted.
    _code, levels = asked()
    assert {check: level for check, level in levels.items() if level != "OK"} in ({}, {"archiving": "WARNING"})
    fresh.server.stop()
    # What the table has of a primary that is down is not lost with what cannot be asked.
    assert "primary: No connection" in fresh.succeed("status", **watched)
    fresh.server.start()
    fresh.succeed("site", monitoring_state="absent")
    assert fresh.server.value(MAY) is False
    assert [path.name for path in place.rglob("*") if path.suffix == ".pgpass" or "state" in path.suffixes] == []
    assert not (place / "monitoring" / "main.json").exists()
    assert not any(_changed(fresh.succeed("site", monitoring_state="absent")).values())
