# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Finding what destroyed something in the WAL of a real server, and restoring to just before it.

Around each incident the table ``status`` gets a new phase. A restore with the settings of a candidate must show the
phase before the incident, not the one before that and not the incident.
"""

from __future__ import annotations

import datetime
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils import findscan
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.plugins.module_utils.findtarget import KINDS
from ansible_collections.pgdrill.pitr.plugins.module_utils.postgres import Login, query
from ansible_collections.pgdrill.pitr.plugins.module_utils.targetinfo import Question, TargetInfo
from ansible_collections.pgdrill.pitr.tests.integration.support import Restored, Sandbox, Storage, fingerprint

LOGGING = {
    "logging_collector": True,
    "log_destination": "stderr,csvlog,jsonlog",
    "log_directory": "log",
    "log_filename": "server.log",
    "log_statement": "mod",
    "log_timezone": "Asia/Kolkata",
    "log_line_prefix": "%m [%p] %q%u@%d/%a %v %x ",
    "max_prepared_transactions": 5,
    "wal_level": "replica",
}


def look(storage: Storage, login: Login | None = None, **question: Any) -> dict[str, Any]:
    """What the module returns."""
    folder = storage.folder
    result = TargetInfo(folder, folder.chapter, storage.bin_dir, Question(**question), login).run()
    json.dumps(result)
    return result


class Incidents:
    """The life of one primary in which everything happens; ``xids`` and ``phases`` by the name of the incident."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.sandbox = sandbox
        self.xids: dict[str, int] = {}
        self.phases: dict[str, str] = {}
        server = sandbox.server
        server.sql("CREATE EXTENSION IF NOT EXISTS plpgsql")
        for name in ("dropped", "emptied", "thinned", "changed", "nested", "prepared", "quick", "kept", "several"):
            server.sql(f"CREATE TABLE {name} (id int PRIMARY KEY, v text)")
            server.sql(f"INSERT INTO {name} SELECT i, 'good' FROM generate_series(1, 100) i")
        server.sql("CREATE TABLE parts (id int, v text) PARTITION BY RANGE (id)")
        server.sql("CREATE TABLE parts_low PARTITION OF parts FOR VALUES FROM (0) TO (50)")
        server.sql("CREATE TABLE parts_high PARTITION OF parts FOR VALUES FROM (50) TO (101)")
        server.sql("INSERT INTO parts SELECT i, 'good' FROM generate_series(1, 100) i")
        server.sql("CREATE TABLE counter AS SELECT 0 AS n")
        server.sql("CREATE TABLE wide (id int, v text)")
        server.sql("ALTER TABLE wide ALTER v SET STORAGE EXTERNAL")
        server.sql("INSERT INTO wide SELECT i, repeat('x', 5000) FROM generate_series(1, 10) i")
        server.sql("CREATE DATABASE doomed TEMPLATE postgres")
        self.oids = dict(server.sql("SELECT relname::text, oid::int FROM pg_class WHERE oid >= 16384"))
        self.doomed = server.value("SELECT oid::int FROM pg_database WHERE datname = 'doomed'")
        self.postgres = server.value("SELECT oid::int FROM pg_database WHERE datname = 'postgres'")
        sandbox.backup("only")
        server.sql("CHECKPOINT")
        self._happen()
        sandbox.probe()
        self.logs = server.data / "log"

    def incident(self, name: str, *statements: str, finish: str = "COMMIT") -> None:
        """One transaction, with a phase before it and one after."""
        self.phases[name] = f"before {name}"
        self.sandbox.commit(self.phases[name])
        with self.sandbox.server.connection() as connection:
            query(connection, "BEGIN")
            self.xids[name] = int(query(connection, "SELECT pg_current_xact_id()::text")[0][0])
            for statement in statements:
                query(connection, statement)
            query(connection, finish)

    def single(self, name: str, statement: str) -> None:
        """One statement that begins its own transaction; its id is the next one."""
        self.phases[name] = f"before {name}"
        self.xids[name] = self.sandbox.commit(self.phases[name]).xid + 1
        self.sandbox.server.sql(statement)

    def _happen(self) -> None:
        self.incident("drop", "DROP TABLE dropped")
        self.incident("truncate", "TRUNCATE emptied")
        self.incident("delete", "DELETE FROM thinned WHERE id > 20")
        self.incident("update", "UPDATE changed SET v = 'bad' WHERE id <= 70")
        self.incident(
            "nested",
            "INSERT INTO kept VALUES (200, 'more')",
            "SAVEPOINT a",
            "DELETE FROM nested WHERE id <= 30",
            "SAVEPOINT b",
            "DELETE FROM nested WHERE id <= 90",
            "ROLLBACK TO b",
            "SAVEPOINT c",
            "DROP TABLE nested",
            "RELEASE c",
        )
        self.incident("aborted delete", "DELETE FROM kept", finish="ROLLBACK")
        self.incident("aborted drop", "DROP TABLE kept", finish="ROLLBACK")
        self.single("vacuum full", "VACUUM FULL wide")
        self.single("reindex", "REINDEX TABLE kept")
        self.single("cluster", "CLUSTER kept USING kept_pkey")
        self.incident("alter type", "ALTER TABLE kept ALTER id TYPE bigint")
        self.incident("alter toast away", "ALTER TABLE wide ALTER v TYPE int USING length(v)")
        self.incident("restart sequence", "CREATE SEQUENCE sq", "ALTER SEQUENCE sq RESTART 5")
        self.incident("hash index", "CREATE INDEX kept_hash ON kept USING hash (v)")
        self.incident("brin index", "CREATE INDEX kept_brin ON kept USING brin (id)")
        self.incident("reindex hash", "REINDEX INDEX kept_hash")
        self.incident("reindex brin", "REINDEX INDEX kept_brin")
        self.incident("drop index", "DROP INDEX kept_hash")
        self.incident("drop sequence", "DROP SEQUENCE sq")
        self.incident("temporary", "CREATE TEMP TABLE t ON COMMIT DROP AS SELECT 1")
        self.incident("replaced", "CREATE TABLE replacement (id int)", "DROP TABLE several")
        self.phases["prepared"] = "before prepared"
        self.sandbox.commit("before prepared")
        with self.sandbox.server.connection() as connection:
            query(connection, "BEGIN")
            self.xids["prepared"] = int(query(connection, "SELECT pg_current_xact_id()::text")[0][0])
            query(connection, "DELETE FROM prepared WHERE id <= 40")
            query(connection, "PREPARE TRANSACTION 'the ''gid'': 2026-01-01 00:00:00 UTC; rels: base/5/16385'")
        self.phases["prepared"] = "between prepare and commit"
        self.sandbox.commit("between prepare and commit")
        self.sandbox.server.sql("COMMIT PREPARED 'the ''gid'': 2026-01-01 00:00:00 UTC; rels: base/5/16385'")
        self.incident("drop partition", "DROP TABLE parts_low")
        self.incident("move rows", "UPDATE parts SET v = 'moved' WHERE id > 60")
        self.phases["quick"] = "before quick"
        self.sandbox.commit("before quick")
        # Commits within microseconds of each other: no time could tell the one that matters.
        self.sandbox.server.sql(
            "DO $$ BEGIN FOR i IN 1..60 LOOP UPDATE counter SET n = i;"
            " IF i = 30 THEN DELETE FROM quick; END IF; COMMIT; END LOOP; END $$"
        )
        self.sandbox.commit("before drop database")
        self.phases["drop database"] = "before drop database"
        self.sandbox.server.sql("DROP DATABASE doomed")
        self.incident("toast", "CREATE TABLE wide2 (id int, v text)")
        self.sandbox.commit("end")


@pytest.fixture(scope="module")
def incidents(bin_dir: str, template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Incidents]:
    """Shared, read-only; the server runs on."""
    sandbox = Sandbox(bin_dir, tmp_path_factory.mktemp("incidents"), template, settings=LOGGING)
    try:
        sandbox.server.start()
        made = Incidents(sandbox)
        before = fingerprint(sandbox.archive, sandbox.backups)
        yield made
        assert fingerprint(sandbox.archive, sandbox.backups) == before, "a test has written to what all share"
    finally:
        sandbox.server.close()


@pytest.fixture(scope="module")
def everything(incidents: Incidents) -> dict[int, dict[str, Any]]:
    """Every transaction that is of any kind, by its id."""
    found = look(incidents.sandbox, kinds=KINDS, limit=1000)
    assert found["matches"] == len(found["candidates"])
    return {candidate["xid"]: candidate for candidate in found["candidates"]}


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("drop", ["drop"]),
        ("truncate", ["truncate"]),
        ("delete", ["delete"]),
        ("update", ["update"]),
        ("nested", ["delete", "insert", "drop"]),
        ("vacuum full", ["rewrite"]),
        ("cluster", ["rewrite"]),
        ("alter type", ["rewrite"]),
        ("alter toast away", ["rewrite"]),
        ("reindex hash", ["rewrite"]),
        ("reindex brin", ["rewrite"]),
        ("drop index", ["drop_index"]),
        ("drop sequence", ["drop_sequence"]),
        ("temporary", ["drop_unstored"]),
        ("replaced", ["drop"]),
        ("prepared", ["delete"]),
        ("drop partition", ["drop"]),
        ("move rows", ["update"]),
    ],
)
def test_each_incident_is_told_by_its_kind(
    incidents: Incidents, everything: dict[int, dict[str, Any]], name: str, kinds: list[str]
) -> None:
    candidate = everything[incidents.xids[name]]
    assert candidate["kinds"] == kinds, candidate
    assert candidate["certain"], candidate


@pytest.mark.parametrize("name", ["aborted delete", "aborted drop", "hash index", "brin index", "restart sequence"])
def test_what_was_taken_back_or_only_made_something_is_no_candidate(
    incidents: Incidents, everything: dict[int, dict[str, Any]], name: str
) -> None:
    assert incidents.xids[name] not in everything, everything.get(incidents.xids[name])
