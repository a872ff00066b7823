# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""remove.yml takes away what site.yml has set, and nothing else."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
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
from ansible_collections.pgdrill.pitr.tests.integration.support import fingerprint, until
from ansible_collections.pgdrill.pitr.tests.integration.test_playbooks import Site, _changed

pytestmark = pytest.mark.once

ROLES = {"receiver_state": "started", "receiver_synchronous": True, "primary_wal_level": "logical"}
CONFIRMED = {"remove_confirm": "main", **ROLES}


@pytest.fixture
def fresh(bin_dir: str, major: int, tmp_path: Path) -> Iterator[Site]:
    """A sandbox in which nothing has been done yet; its receiver ends with the test."""
    site = Site(bin_dir, major, tmp_path)
    try:
        yield site
    finally:
        for name in (LOCK_FILE, STREAM_LOCK_FILE):
            with contextlib.suppress(Exception):
                for pid in holders(lock_path(ClusterFolder.open(str(site.repository), "main"), name)):
                    os.kill(pid, signal.SIGKILL)
        site.close()


@contextlib.contextmanager
def following(site: Site, directory: Path) -> Iterator[None]:
    """Somebody receives as the role of standbys."""
    argv = [
        f"{site.server.bin_dir}/pg_receivewal",
        "-D",
        str(directory),
        "-U",
        "pitr_standby",
        "-h",
        site.server.socket,
    ]
    process = subprocess.Popen([*argv, "-p", str(site.port)], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    connected = "SELECT 1 FROM pg_stat_replication WHERE usename = 'pitr_standby'"
    try:
        until(lambda: site.server.sql(connected), "the standby")
        yield
    finally:
        process.terminate()
        process.wait()
    until(lambda: not site.server.sql(connected), "the standby to go")


def managed(site: Site) -> dict[str, str]:
    """What the roles have written on the primary. The receiver writes its own log."""
    data = site.server.data
    found = fingerprint(data / "conf.d", data / "pg_hba.conf", data.parent / "pitr")
    return {path: what for path, what in found.items() if not path.endswith(".log")}


def test_site_is_removed_and_what_others_have_set_stays(fresh: Site, tmp_path: Path) -> None:
    also = ("-i", str(tmp_path / "standbys.yml"))
    (tmp_path / "standbys.yml").write_text("postgresql_standby: {hosts: {Standby-1: }}\n", encoding="ascii")
    data = fresh.server.data
    fresh.succeed("site", **ROLES)
    # What an operator has set beside us. The sandbox gives port and socket to the role; here they are to outlive it.
    with open(data / "postgresql.conf", "a", encoding="utf-8") as conf:
        conf.write(f"port = {fresh.port}\nunix_socket_directories = '{fresh.server.socket}'\n")
    (data / "conf.d" / "10-mine.conf").write_text("work_mem = '8MB'\n", encoding="ascii")
    with open(data / "pg_hba.conf", "a", encoding="utf-8") as rules:
        rules.write("\nhost\tmain\tpitr_backup_too\t192.0.2.0/24\tscram-sha-256\n")
    fresh.server.sql("CREATE TABLE precious AS SELECT 42 AS n")
    command = data.parent / "pitr" / "pitr-wal"

    # Not unasked, and not while something else needs it.
    before = fresh.identity, managed(fresh)
    assert "remove_confirm=main" in fresh.fail("remove", **ROLES)
    fresh.server.sql(f"ALTER SYSTEM SET restore_command = '{command} get main %%f %%p'")
    assert "restore_command in" in fresh.fail("remove", **CONFIRMED)
    fresh.server.sql("ALTER SYSTEM RESET restore_command")
    fresh.server.sql("SELECT pg_create_logical_replication_slot('theirs', 'pgoutput')")
    assert "theirs need wal_level" in " ".join(fresh.fail("remove", **CONFIRMED).split())
    fresh.server.sql("SELECT pg_drop_replication_slot('theirs')")
    fresh.server.sql("CREATE ROLE pitr_standby LOGIN REPLICATION")
    fresh.server.sql("SELECT pg_create_physical_replication_slot('standby_1')")
    fresh.server.sql("GRANT EXECUTE ON FUNCTION pg_read_binary_file(text) TO pitr_standby")
    with following(fresh, tmp_path):
        assert "still follow this primary" in " ".join(fresh.fail("remove", *also, **CONFIRMED).split())
    assert sum(_changed(fresh.succeed("remove", "--check", *also, **ROLES)).values()) > 4
    assert "sets the cluster main up" in " ".join(fresh.fail("site", pitr_state="absent", **CONFIRMED).split())
    assert before == (fresh.identity, managed(fresh))

    kept = [path for path in fresh.repository.rglob("*") if path.is_file() and "receiver" not in path.parts]
    repository = fingerprint(*kept)
    fresh.succeed("remove", *also, **CONFIRMED)
    assert fingerprint(*kept) == repository
    assert fresh.server.value("SELECT n FROM precious") == 42
    assert [fresh.server.show(name) for name in ("archive_mode", "archive_command", "work_mem")] == [
        "off",
        "(disabled)",
        "8MB",
    ]
    assert fresh.server.show("synchronous_standby_names") == ""
    assert fresh.server.value("SELECT count(*) FROM pg_replication_slots") == 0
    assert fresh.server.value("SELECT count(*) FROM pg_roles WHERE rolname ~ '^pitr_'") == 0
    rules = (data / "pg_hba.conf").read_text(encoding="utf-8")
    assert "pitr_backup_too" in rules and "pitr_backup\t" not in rules
    assert [path.name for path in (data / "conf.d").iterdir()] == ["10-mine.conf"]
    left = data.parent / "pitr"
    assert not left.exists() or list(left.iterdir()) == []
    assert set(_changed(fresh.succeed("remove", *also, **CONFIRMED)).values()) == {0}
    # And back again.
    fresh.succeed("site", **ROLES)
    assert fresh.server.show("archive_mode") == "on"
