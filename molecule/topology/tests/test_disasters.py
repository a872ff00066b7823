# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Disasters, one after the other on the same hosts, each ended by what an operator types. Clients commit meanwhile, and
write down what was acknowledged to them.

The order matters: a test begins with what the one before it has left.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.pgdrill.pitr.molecule.shared.hosts import (
    CLUSTER,
    FOLDER,
    container,
    host,
    service,
    sql,
)
from ansible_collections.pgdrill.pitr.molecule.topology.scene import (
    Ledger,
    look_at_archive,
    operator,
    put,
    until,
)
from ansible_collections.pgdrill.pitr.tests.unit.support import Authority

RECEIVER = f"pitr_{CLUSTER}"


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ledger]:
    with Ledger(tmp_path_factory.mktemp("ledger")) as clients:
        yield clients


@pytest.fixture(scope="module")
def backup() -> Any:
    return host("backup")


def synchronous(primary: str) -> str:
    """Who the primary's commits wait for."""
    return sql(host(primary), "SELECT application_name FROM pg_stat_replication WHERE sync_state = 'sync'")


def backlog(primary: str) -> int:
    """Segments that wait to be archived."""
    return int(sql(host(primary), "SELECT count(*) FROM pg_ls_archive_statusdir() WHERE name LIKE '%.ready'"))


def archived_without_a_gap(primary: str) -> None:
    """The archive has the way to the primary's present timeline, and no hole in it."""
    last = sql(host(primary), "SELECT pg_walfile_name(pg_switch_wal())")
    until("everything is archived", lambda: backlog(primary) == 0)
    found = look_at_archive()
    assert found["gaps"] == [], found["gaps"]
    # Not the archive's last segment: a standby that was promoted by accident has a later timeline.
    (present,) = [entry for entry in found["timelines"] if entry["timeline"] == int(last[:8], 16)]
    assert present["ranges"][-1][1] >= last, (present, last)


def follows(standby: str, primary: str) -> None:
    """The standby streams from the primary and has what it has."""

    def caught_up() -> bool:
        end = sql(host(primary), "SELECT pg_current_wal_flush_lsn()")
        streams = "SELECT count(*) FROM pg_stat_wal_receiver WHERE status = 'streaming'"
        return sql(host(standby), f"{streams} AND pg_last_wal_replay_lsn() >= '{end}'") == "1"

    until(f"{standby} follows {primary}", caught_up)


def test_second_run_of_site_changes_nothing_and_is_quick() -> None:
    begun = time.monotonic()
    shown = operator("db1", "site")
    seconds = time.monotonic() - begun
    assert set(re.findall(r" changed=(\d+)", shown)) == {"0"}
    # A minute is what it should take; how long it takes says as much of what else the machine does.
    print(f"second run of site: {seconds:.0f} s")
    assert seconds < 180


def test_dropped_table_comes_back_by_a_restore_in_place_and_the_standby_follows(ledger: Ledger) -> None:
    primary = host("db1")
    since = sql(primary, "SELECT to_json(now())").strip('"')
    sql(primary, "CREATE TABLE orders AS SELECT generate_series(1, 1000) AS n")
    ledger.begin("db1")
    ledger.work(2)
    sql(primary, "DROP TABLE orders")
    ledger.work(1)
    ledger.end("db1")
    sql(primary, "SELECT pg_switch_wal()")
    until("it is archived", lambda: backlog("db1") == 0)
    found = operator("db1", "find_target", "-e", '{"find_kinds": ["drop"]}', "-e", f"find_since={since}")
    words = re.findall(r"restore_with: ((?:-e \S+\s+)+)", found)
    assert len(words) == 1, found

    primary.check_output("systemctl stop %s", service(primary))
    typed = ("restore_confirm=shop", "restore_force=true", "restore_accept=true", "restore_rebuild_standbys=rewind")
    operator("db1", "restore", *(word for pair in typed for word in ("-e", pair)), *words[0].split())

    assert sql(primary, "SELECT count(*) FROM orders") == "1000"
    follows("db2", "db1")
    assert sql(host("db2"), "SELECT count(*) FROM orders") == "1000"
    until("commits wait for the receiver", lambda: synchronous("db1") == RECEIVER)
    archived_without_a_gap("db1")
    ledger.forget_after("db1")
    assert ledger.missing("db1") == set()


def test_repository_host_that_hangs_under_load_stops_no_commit_and_the_backlog_drains(
    ledger: Ledger, backup: Any
) -> None:
    ledger.begin("db1")
    subprocess.run(["podman", "pause", container("backup")], check=True)
    try:
        until("commits wait for the standby instead", lambda: synchronous("db1") == "db2", 30)
        # The standby reports when it has something new, else after wal_receiver_status_interval (10 s).
        until("commits are acknowledged again", lambda: ledger.work(1) > 0, 30)
        for _segment in range(4):
            sql(host("db1"), "SELECT pg_switch_wal()")
            assert ledger.work(1) > 0
        assert backlog("db1") >= 4
    finally:
        subprocess.run(["podman", "unpause", container("backup")], check=True)
    until("the backlog is archived", lambda: backlog("db1") == 0, 120)
    until("commits wait for the receiver again", lambda: synchronous("db1") == RECEIVER, 120)
    ledger.end("db1")
    archived_without_a_gap("db1")
    assert ledger.missing("db1") == set()


def test_switchover_loses_nothing_and_the_archive_follows(ledger: Ledger) -> None:
    ledger.begin("db1")
    ledger.work(2)
    operator("db1", "switchover", "-e", "switchover_confirm=shop")
    ledger.wait()

    assert ledger.missing("db2") == set()
    follows("db1", "db2")
    until("commits wait for the receiver", lambda: synchronous("db2") == RECEIVER)
    archived_without_a_gap("db2")


def test_failover_from_a_server_that_died_and_its_return_as_a_standby(ledger: Ledger) -> None:
    ledger.begin("db2")
    ledger.work(2)
    # Commits wait for the receiver and not for the standby, which may be a moment behind it.
    ledger.end("db2")
    follows("db1", "db2")
    dead = host("db2")
    dead.check_output("systemctl kill --kill-whom=all --signal=KILL %s", service(dead))
    operator("db2", "promote", "-e", "promote_confirm=shop")

    assert ledger.missing("db1") == set()
    operator("db1", "site", "-e", "standby_rebuild=rewind")
    follows("db2", "db1")
    until("commits wait for the receiver", lambda: synchronous("db1") == RECEIVER)
    archived_without_a_gap("db1")
    ledger.begin("db1")
    assert ledger.work(1) > 0
    ledger.end("db1")


def test_lost_host_of_the_primary_is_restored_on_the_spare_and_no_acknowledged_commit_is_lost(ledger: Ledger) -> None:
    ledger.begin("db1")
    ledger.work(3)
    subprocess.run(["podman", "kill", container("db1")], check=True, capture_output=True)
    subprocess.run(["podman", "rm", "--force", "--volumes", container("db1")], check=True, capture_output=True)
    ledger.wait()

    typed = ("-e", "restore_confirm=shop", "-e", "restore_use_partial=true", "-e", "restore_accept=true")
    operator("db3", "restore", *typed, "-e", "restore_rebuild_standbys=rewind")
    assert ledger.missing("db3") == set()
    operator("db3", "site")
    until("commits wait for the receiver", lambda: synchronous("db3") == RECEIVER)
    follows("db2", "db3")
    assert ledger.missing("db2") == set()
    archived_without_a_gap("db3")
    assert host("db3").service("postgresql").is_enabled
    # They work on, against the new primary.
    ledger.begin("db3")
    assert ledger.work(1) > 0
    ledger.end("db3")


def test_standby_that_was_promoted_by_accident_is_refused_and_then_rewound(ledger: Ledger) -> None:
    ledger.begin("db3")
    accident = host("db2")
    accident.check_output("su postgres -c %s", "psql -qAtX -c 'SELECT pg_promote()'")
    # pg_promote() waits for a minute, and then says f.
    until("it is promoted", lambda: sql(accident, "SELECT pg_is_in_recovery()") == "f", 120)
    sql(accident, "CREATE TABLE written_by_mistake ()")
    assert ledger.work(1) > 0
    refused = operator("db3", "standby", fails=True)
    assert "standby_rebuild=rewind" in refused and sql(accident, "SELECT pg_is_in_recovery()") == "f"
    operator("db3", "standby", "-e", "standby_rebuild=rewind")
    follows("db2", "db3")
    ledger.end("db3")
    assert sql(accident, "SELECT to_regclass('written_by_mistake') IS NULL") == "t"
    assert ledger.missing("db2") == set()


def test_certificates_and_passwords_are_exchanged_under_load_and_nobody_waits(
    ledger: Ledger, backup: Any, tmp_path: Path
) -> None:
    """Neither server restarts, no connection ends, and what connects afterwards does so with what is new."""
    primary, servers = host("db3"), ("db2", "db3")
    authority = Authority(tmp_path / "ca")
    place = "/etc/pgdrill/tls"

    def install(name: str) -> str:
        """A certificate on both servers, the authority's everywhere; returns the one that is to be served."""
        certificate, key = authority.issue(tmp_path, name, "db2.test", "db3.test")
        for server in servers:
            put(server, certificate, f"{place}/server.crt", "postgres", "0644")
            put(server, key, f"{place}/server.key", "postgres", "0600")
        for machine in (*servers, "backup"):
            put(machine, authority.certificate, f"{place}/ca.crt", "root", "0644")
        return pem(certificate.read_text(encoding="ascii"))

    def served(name: str) -> str:
        return pem(primary.run(f"openssl s_client -starttls postgres -connect {name}.test:5432 < /dev/null").stdout)

    def pem(text: str) -> str:
        return re.findall("-----BEGIN CERT.*?-----END", text, re.DOTALL)[0]

    def senders() -> dict[str, tuple[str, bool]]:
        """Of who is streamed to: the process, and whether the connection is encrypted."""
        rows = sql(
            primary,
            "SELECT application_name, pid, ssl FROM pg_stat_replication JOIN pg_stat_ssl USING (pid)"
            " WHERE state = 'streaming'",
        )
        return {name: (pid, ssl == "t") for name, pid, ssl in (row.split("|") for row in rows.splitlines())}

    def begun() -> list[str]:
        return [sql(host(name), "SELECT pg_postmaster_start_time()") for name in servers]

    def lets_in(password: str) -> bool:
        command = "PGPASSWORD=%s psql 'host=db3.test user=pitr_backup dbname=postgres' -qAtX -c 'SELECT 1'"
        return bool(backup.run(command, password).rc == 0)

    tls: dict[str, Any] = {
        "primary_ssl_cert_file": f"{place}/server.crt",
        "primary_ssl_key_file": f"{place}/server.key",
        "pitr_sslrootcert": f"{place}/ca.crt",
        # db1 is gone, and no name of it is in the certificate.
        "receiver_primary_address": "db2.test,db3.test",
    }
    both = {RECEIVER, "db2"}
    start = begun()
    ledger.begin("db3")
    first = install("first")
    operator("db3", "site", "-e", json.dumps(tls))
    until("both stream, encrypted", lambda: {name for name, (_pid, ssl) in senders().items() if ssl} == both)
    assert [served(name) for name in servers] == [first, first]
    standby = host("db2")
    assert "sslmode=verify-full" in sql(standby, "SELECT conninfo FROM pg_stat_wal_receiver")
    rules = "SELECT DISTINCT type FROM pg_hba_file_rules WHERE user_name && '{pitr_backup,pitr_standby}'"
    assert [sql(host(name), rules) for name in servers] == ["hostssl", "hostssl"]

    streams = senders()
    since = sql(primary, "SELECT clock_timestamp()")
    second = install("second")
    new = {"pitr_backup_password": "an other: pass\\word", "standby_password": "and: an\\other"}
    shown = operator("db3", "site", "-e", json.dumps({**tls, **new}))
    assert [served(name) for name in servers] == [second, second] and first != second
    assert senders() == streams and begun() == start
    pauses = "SELECT at - lag(at) OVER (ORDER BY at) AS pause FROM ledger WHERE at > '{}'"
    longest = sql(primary, f"SELECT extract(epoch FROM max(pause)) FROM ({pauses.format(since)}) AS pauses")
    print(f"longest pause between two commits while both were exchanged: {longest} s")
    assert float(longest) < 5
    assert lets_in(new["pitr_backup_password"]) and not lets_in("backups:of\\the shop")

    sql(primary, "SELECT pg_terminate_backend(pid) FROM pg_stat_replication")
    until("both are back with the new passwords", lambda: set(senders()) == both and senders() != streams)
    assert all(ssl for _pid, ssl in senders().values())
    operator("db3", "backup", "-e", json.dumps({**tls, **new}))
    ledger.end("db3")
    follows("db2", "db3")
    archived_without_a_gap("db3")
    assert ledger.missing("db3") == set() == ledger.missing("db2")
    for secret in new.values():
        assert secret not in shown and secret.replace("\\", "\\\\") not in shown
        for name in (*servers, "backup"):
            assert secret not in host(name).check_output("journalctl --no-pager -a")
            assert host(name).run("grep -rlF %s /var/log", secret).stdout == ""


def test_lost_repository_is_made_anew_and_its_window_begins_with_its_first_backup(ledger: Ledger, backup: Any) -> None:
    ledger.begin("db3")
    before = backup.check_output(f"ls {FOLDER}/backups").split()
    backup.check_output("rm -rf /srv/pitr/* /srv/pitr/.[!.]*")
    operator("db3", "site")
    until("commits wait for the receiver", lambda: synchronous("db3") == RECEIVER)
    until("commits are acknowledged", lambda: ledger.work(1) > 0, 30)
    ledger.end("db3")
    after = backup.check_output(f"ls {FOLDER}/backups").split()
    assert len(after) == 1 and not set(after) & set(before)
    archived_without_a_gap("db3")
    shown = json.loads(backup.check_output(f"cat {FOLDER}/backups/{after[0]}/backup.json"))
    assert shown
    assert ledger.missing("db3") == set()
