# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The playbook ``recovery`` as a user runs it: pause, look, move on, promote, accept; or put the old directory back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.plugins.module_utils.postgres import Login
from ansible_collections.pgdrill.pitr.tests.integration.support import fingerprint
from ansible_collections.pgdrill.pitr.tests.integration.test_playbooks import Site, _changed

pytestmark = pytest.mark.once

PASSWORD = "not a secret"


@pytest.fixture
def site(bin_dir: str, major: int, tmp_path: Path) -> Iterator[Site]:
    """A sandbox after site.yml."""
    made = Site(bin_dir, major, tmp_path)
    try:
        made.succeed("site")
        yield made
    finally:
        made.close()


def comes_in(site: Site) -> bool:
    """Whether an ordinary user does, with a password over TCP."""
    try:
        Login(host="127.0.0.1", port=site.port, user="app", password=PASSWORD).connect().close()
    except PitrError as error:
        assert "pg_hba.conf rejects" in error.message
        return False
    return True


def backups(site: Site) -> int:
    return len(list(site.repository.glob("main/backups/*/backup.json")))


def test_pause_look_move_promote_accept(site: Site) -> None:
    server = site.server
    server.sql(f"CREATE ROLE app LOGIN PASSWORD '{PASSWORD}'")
    server.sql("CREATE TABLE status AS SELECT 'zero'::text AS phase")
    for phase in ("one", "two", "three"):
        server.sql("UPDATE status SET phase = %s", phase)
        server.sql("SELECT pg_create_restore_point(%s)", phase)
    server.sql("SELECT pg_switch_wal()")
    assert comes_in(site)
    server.stop()
    confirmed = {"restore_confirm": "main"}
    options = {"restore_force": True, "restore_target_action": "pause", "restore_target_name": "one"}
    assert "kept out until" in site.succeed("restore", **options, **confirmed)
    assert server.phase == "one" and not comes_in(site)
    identity = site.identity
    assert "paused" in site.succeed("recovery")
    # What cannot be taken back wants the name; a target behind is refused; check mode and a refusal touch nothing.
    for state in ("moved", "promoted", "resumed", "accepted", "undone"):
        assert "restore_confirm=main" in site.fail("recovery", restore_state=state)
    assert "target_not_in_archive" in site.fail("recovery", restore_state="moved", restore_target_name="never")
    shown = site.succeed("recovery", "--check", restore_state="moved", restore_target_name="two")
    assert "moved_from" in shown
    assert site.identity == identity and server.phase == "one"
    output = site.succeed("recovery", restore_state="moved", restore_target_name="two")
    assert "at restore point" in output and server.phase == "two" and not comes_in(site)
    assert server.value("SELECT pg_is_in_recovery()")
    assert "not promoted" in site.fail("recovery", restore_state="accepted", **confirmed)
    site.succeed("recovery", restore_state="promoted", **confirmed)
    assert server.phase == "two" and not server.value("SELECT pg_is_in_recovery()") and not comes_in(site)
    before = backups(site)
    slots = {"restore_physical_slots": ["standby_1"]}
    site.succeed("recovery", restore_state="accepted", **confirmed, **slots)
    assert comes_in(site)
    assert server.sql("SELECT slot_name, restart_lsn IS NOT NULL FROM pg_replication_slots") == [("standby_1", True)]
    assert list(site.repository.glob("main/archive/*/00000002.history"))
    assert backups(site) == before + 1
    # A second time there is nothing to do, and no backup is taken.
    assert not _changed(site.succeed("recovery", restore_state="accepted", **confirmed, **slots)).get("repository")
    assert backups(site) == before + 1
    assert set(_changed(site.succeed("site")).values()) == {0}


def test_old_directory_is_put_back(site: Site) -> None:
    server = site.server
    server.sql("CREATE TABLE status AS SELECT 'old'::text AS phase")
    server.sql("SELECT pg_create_restore_point('here')")
    server.sql("UPDATE status SET phase = 'newest'")
    server.sql("SELECT pg_switch_wal()")
    server.stop()
    hba = fingerprint(server.data / "pg_hba.conf")
    options = {"restore_force": True, "restore_target_action": "pause", "restore_target_name": "here"}
    site.succeed("restore", restore_confirm="main", **options)
    assert server.phase == "old"
    (aside,) = server.data.parent.glob("data.old-*")
    undo = {"restore_state": "undone", "restore_moved_aside": str(aside), "restore_confirm": "main"}
    site.succeed("recovery", **undo)
    assert server.phase == "newest" and fingerprint(server.data / "pg_hba.conf") == hba
    assert not server.value("SELECT pg_is_in_recovery()")
