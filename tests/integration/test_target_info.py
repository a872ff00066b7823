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
        # Not in the backup: what is restored from it logs where the tests look.
        sandbox.configure(LOGGING)
        server.restart()
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
    sandbox = Sandbox(
        bin_dir, tmp_path_factory.mktemp("incidents"), template, settings={"max_prepared_transactions": 5}
    )
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


def test_rows_are_counted_with_those_of_subtransactions_and_without_those_taken_back(
    incidents: Incidents, everything: dict[int, dict[str, Any]]
) -> None:
    def rows(name: str) -> tuple[int, int, int]:
        candidate = everything[incidents.xids[name]]
        return candidate["deleted_rows"], candidate["updated_rows"], candidate["inserted_rows"]

    assert rows("delete") == (80, 0, 0)
    assert rows("update") == (0, 70, 0)
    assert rows("nested") == (30, 0, 1)
    assert rows("prepared") == (40, 0, 0)
    assert rows("move rows") == (0, 40, 0)
    assert everything[incidents.xids["nested"]]["subtransactions"] == 3
    quick = [each for each in everything.values() if each["deleted_rows"] == 100]
    assert len(quick) == 1 and quick[0]["updated_rows"] == 1


@pytest.mark.parametrize(
    ("name", "relations"),
    [
        ("drop", {"dropped", "dropped_pkey"}),
        ("nested", {"nested", "nested_pkey"}),
        ("replaced", {"several", "several_pkey"}),
        ("drop partition", {"parts_low"}),
    ],
)
def test_dropped_relations_are_told_by_their_oids_the_table_first(
    incidents: Incidents, everything: dict[int, dict[str, Any]], name: str, relations: set[str]
) -> None:
    dropped = [each["oid"] for each in everything[incidents.xids[name]]["relations"] if each["kind"] == "drop"]
    table = min(relations, key=len)
    assert dropped[0] == incidents.oids[table]
    # A TOAST table and its index are among them.
    assert {incidents.oids[relation] for relation in relations} <= set(dropped) <= set(incidents.oids.values())


def test_server_tells_the_names_that_it_knows_and_the_reason_for_others(incidents: Incidents) -> None:
    found = look(incidents.sandbox, incidents.sandbox.server.login, limit=100)
    by_xid = {candidate["xid"]: candidate for candidate in found["candidates"]}

    def names(incident: str) -> list[str]:
        return [each["name"] for each in by_xid[incidents.xids[incident]]["relations"]]

    assert names("truncate") == ["public.emptied"]
    assert names("delete") == ["public.thinned"]
    assert by_xid[incidents.xids["delete"]]["database_name"] == "postgres"
    assert set(names("drop")) == {None}
    reason = by_xid[incidents.xids["drop"]]["relations"][0]["unnamed_because"]
    assert "the running server at" in reason and "it was dropped" in reason
    without = look(incidents.sandbox, limit=100)
    assert {each["name"] for candidate in without["candidates"] for each in candidate["relations"]} == {None}
    assert "login_*" in without["candidates"][0]["relations"][0]["unnamed_because"]


def test_relation_by_name_number_or_file_finds_its_own_transactions_only(incidents: Incidents) -> None:
    def xids(login: bool = False, **question: Any) -> list[int]:
        found = look(incidents.sandbox, incidents.sandbox.server.login if login else None, limit=100, **question)
        return [candidate["xid"] for candidate in found["candidates"]]

    oid = incidents.oids["thinned"]
    assert xids(relation=str(oid)) == [incidents.xids["delete"]]
    assert xids(relation=f"1663/{incidents.postgres}/{oid}") == [incidents.xids["delete"]]
    assert xids(relation=str(incidents.oids["dropped"])) == [incidents.xids["drop"]]
    assert xids(relation="1663/1/1", kinds=KINDS) == []
    certain = list(xids(True, relation="public.thinned", kinds=("delete",)))
    assert certain[0] == incidents.xids["delete"]
    # Partitions are their table's.
    assert xids(True, relation="parts", kinds=("update",)) == [incidents.xids["move rows"]]
    # Of a table that is gone the running server has no number: every drop may be it, and says so.
    found = look(incidents.sandbox, incidents.sandbox.server.login, relation="public.dropped", kinds=("drop",))
    possible = {candidate["xid"]: candidate for candidate in found["candidates"]}
    assert incidents.xids["drop"] in possible
    assert not any(candidate["certain"] for candidate in possible.values())
    assert "only possible" in possible[incidents.xids["drop"]]["notes"][0]
    # What the server knows to be another relation's is not shown.
    assert incidents.xids["update"] not in xids(True, relation="public.thinned")


def test_database_and_least_number_of_rows_narrow_the_search(incidents: Incidents) -> None:
    found = look(incidents.sandbox, kinds=("delete", "update"), min_rows=75)
    assert {candidate["xid"] for candidate in found["candidates"]} >= {incidents.xids["delete"]}
    assert all(max(each["deleted_rows"], each["updated_rows"]) >= 75 for each in found["candidates"])
    assert look(incidents.sandbox, database=str(incidents.doomed), kinds=("drop", "delete"))["candidates"] == []
    dropped = look(incidents.sandbox, database=str(incidents.doomed))["candidates"]
    assert [candidate["kinds"] for candidate in dropped] == [["drop_database"]]
    with pytest.raises(PitrError, match="WAL knows databases by their OIDs"):
        look(incidents.sandbox, database="postgres")
    with pytest.raises(PitrError, match="has no database 'nowhere'"):
        look(incidents.sandbox, incidents.sandbox.server.login, database="nowhere")


def test_limit_keeps_the_most_likely_and_tells_that_there_are_more(incidents: Incidents) -> None:
    found = look(incidents.sandbox, limit=2)
    assert found["candidates"][0]["kinds"] == ["drop_database"] and len(found["candidates"]) == 2
    assert found["matches"] > 60
    assert any("the 2 most likely ones are shown" in note for note in found["notes"])


LOGS = pytest.mark.parametrize("ending", [".csv", ".json", ".log"])


@LOGS
def test_log_tells_who_did_it_with_which_statement(incidents: Incidents, ending: str) -> None:
    log = str(incidents.logs / f"server{ending}")
    more = {"log_line_prefix": LOGGING["log_line_prefix"]} if ending == ".log" else {}
    found = look(
        incidents.sandbox,
        log_files=(log,),
        log_timezone="Asia/Kolkata",
        relation="public.dropped",
        kinds=("drop",),
        **more,
    )
    candidate = next(each for each in found["candidates"] if each["xid"] == incidents.xids["drop"])
    assert found["candidates"][0] is candidate, "what the log names comes first"
    entry = candidate["log"][0]
    assert (entry["statement"], entry["user"], entry["database"]) == ("DROP TABLE dropped", "postgres", "postgres")
    assert entry["xid"] == incidents.xids["drop"] and entry["matched_by"] == "its transaction id"
    assert entry["place"].startswith(log)
    # Half an hour of Kolkata's zone would be noticed here.
    commit = datetime.datetime.fromisoformat(candidate["commit_time"])
    assert (
        datetime.timedelta(0) <= commit - datetime.datetime.fromisoformat(entry["time"]) < datetime.timedelta(minutes=1)
    )
    assert candidate["certain"]
    # The statement that was rolled back names no transaction that committed.
    back = look(
        incidents.sandbox, log_files=(log,), log_timezone="Asia/Kolkata", relation="kept", kinds=("drop",), **more
    )
    assert [each["statement"] for each in back["log_statements"]] == ["DROP TABLE kept"]


def test_statement_without_a_transaction_id_is_matched_by_time(incidents: Incidents) -> None:
    log = str(incidents.logs / "server.csv")
    found = look(incidents.sandbox, log_files=(log,), log_timezone="Asia/Kolkata", kinds=("drop_database",))
    entry = found["candidates"][0]["log"][0]
    assert entry["statement"] == "DROP DATABASE doomed" and entry["xid"] is None
    assert entry["matched_by"].startswith("the time")


def test_zone_of_a_log_is_asked_for_rather_than_guessed(incidents: Incidents) -> None:
    log = str(incidents.logs / "server.csv")
    with pytest.raises(PitrError, match=r"'IST' does not tell an offset from UTC.*log_timezone"):
        look(incidents.sandbox, log_files=(log,))
    with pytest.raises(PitrError, match=r"Europe/Berlin has no time .* IST"):
        look(incidents.sandbox, log_files=(log,), log_timezone="Europe/Berlin")
    # The server knows its own.
    found = look(incidents.sandbox, incidents.sandbox.server.login, log_files=(log,), kinds=("drop_database",))
    assert found["candidates"][0]["log"]


def test_logs_that_cannot_be_read_are_named(incidents: Incidents, tmp_path: Path) -> None:
    with pytest.raises(PitrError, match=r"nothing matches .*none\*"):
        look(incidents.sandbox, log_files=(str(tmp_path / "none*"),))
    plain = str(incidents.logs / "server.log")
    with pytest.raises(PitrError, match="Say how its lines begin with log_line_prefix"):
        look(incidents.sandbox, log_files=(plain,), log_timezone="Asia/Kolkata")
    with pytest.raises(PitrError, match=r"No line of .* begins like"):
        look(incidents.sandbox, log_files=(plain,), log_timezone="Asia/Kolkata", log_line_prefix="%t nonsense ")
    with pytest.raises(PitrError, match="has no time"):
        look(incidents.sandbox, log_files=(plain,), log_timezone="Asia/Kolkata", log_line_prefix="[%p] ")


def test_server_of_another_cluster_is_refused(
    incidents: Incidents, stranger: Path, server: Callable[[Path], Any], tmp_path: Path
) -> None:
    import shutil

    shutil.copytree(stranger, tmp_path / "stranger")
    other = server(tmp_path / "stranger")
    other.start()
    with pytest.raises(PitrError, match=f"system identifier {other.system_identifier}.*its relations are others"):
        look(incidents.sandbox, other.login)


def candidate_of(incidents: Incidents, everything: dict[int, dict[str, Any]], name: str) -> dict[str, Any]:
    if name == "quick":
        return next(each for each in everything.values() if each["deleted_rows"] == 100)
    if name == "drop database":
        # Making the template has dropped databases, too.
        return next(each for each in everything.values() if each["database"] == incidents.doomed)
    return everything[incidents.xids[name]]


RESTORED = {
    "drop": "SELECT count(*) FROM dropped",
    "truncate": "SELECT count(*) FROM emptied",
    "delete": "SELECT count(*) FROM thinned",
    "update": "SELECT count(*) FROM changed WHERE v = 'good'",
    "nested": "SELECT count(*) FROM nested",
    "prepared": "SELECT count(*) FROM prepared",
    "quick": "SELECT count(*) FROM quick",
    "drop partition": "SELECT count(*) FROM parts",
}


@pytest.mark.parametrize("settings", ["settings", "settings_lsn"])
@pytest.mark.parametrize("name", RESTORED)
def test_settings_restore_to_just_before_it(
    incidents: Incidents,
    everything: dict[int, dict[str, Any]],
    restored: Callable[..., Restored],
    name: str,
    settings: str,
) -> None:
    candidate = candidate_of(incidents, everything, name)
    cluster = restored(incidents.sandbox, candidate[settings])
    assert cluster.plan.backup.label == candidate["backup"]
    cluster.run()
    assert cluster.phase == incidents.phases[name]
    assert cluster.server.value(RESTORED[name]) == 100
    if name == "quick":
        assert cluster.server.value("SELECT n FROM counter") == 29
    if name == "prepared":
        # As the notes say: the transaction is there, and holds its locks.
        gid = cluster.server.value("SELECT gid FROM pg_prepared_xacts")
        assert gid == candidate["prepared_as"] and any("ROLLBACK PREPARED" in note for note in candidate["notes"])


def test_dropped_database_is_restored_by_an_lsn_before_its_directory_is_gone(
    incidents: Incidents, everything: dict[int, dict[str, Any]], restored: Callable[..., Restored]
) -> None:
    candidate = candidate_of(incidents, everything, "drop database")
    assert candidate["settings"] == candidate["settings_lsn"] and "recovery_target_lsn" in candidate["settings"]
    assert any("would be too late" in note for note in candidate["notes"])
    cluster = restored(incidents.sandbox, candidate["settings"]).run()
    assert cluster.phase == incidents.phases["drop database"]
    with cluster.server.login.connect(db="doomed") as connection:
        assert query(connection, "SELECT phase FROM status")
    # And why the transaction is no target for it.
    late = restored(
        incidents.sandbox,
        {"recovery_target_xid": str(candidate["xid"]), "recovery_target_inclusive": False},
    ).run()
    with pytest.raises(PitrError, match="doomed"):
        late.server.login.connect(db="doomed")


def test_restored_server_tells_the_name_of_a_dropped_table(
    incidents: Incidents, everything: dict[int, dict[str, Any]], restored: Callable[..., Restored]
) -> None:
    candidate = candidate_of(incidents, everything, "drop")
    side = restored(incidents.sandbox, {**candidate["settings"], "recovery_target_action": "pause"}).run()
    found = look(incidents.sandbox, side.server.login, relation="public.dropped", kinds=("drop",))
    assert [each["xid"] for each in found["candidates"]] == [incidents.xids["drop"]]
    relation = found["candidates"][0]["relations"][0]
    assert relation["name"] == "public.dropped" and "restored server" in relation["named_by"]
    assert found["candidates"][0]["certain"]


def test_paused_server_can_be_read_before_the_first_lock_of_the_transaction(
    incidents: Incidents, everything: dict[int, dict[str, Any]], restored: Callable[..., Restored]
) -> None:
    candidate = candidate_of(incidents, everything, "drop")
    assert any("settings_paused" in note for note in candidate["notes"])
    reading = "SET statement_timeout = '2s'; SELECT count(*) FROM dropped"
    locked = restored(incidents.sandbox, {**candidate["settings"], "recovery_target_action": "pause"}).run()
    with pytest.raises(PitrError, match="timeout"):
        locked.server.sql(reading)
    paused = restored(incidents.sandbox, {**candidate["settings_paused"], "recovery_target_action": "pause"}).run()
    assert paused.phase == incidents.phases["drop"]
    assert paused.server.value(reading) == 100


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test's commits are all of one minute."""
    monkeypatch.setattr(findscan, "SLACK", datetime.timedelta(0))


def test_of_many_segments_only_those_of_the_time_are_read(sandbox: Callable[..., Any], exact: None) -> None:
    primary = sandbox()
    primary.server.sql("CREATE TABLE t AS SELECT i FROM generate_series(1, 50) i")
    primary.backup("only")
    primary.fill(40)
    before = primary.commit("before")
    primary.server.sql("DELETE FROM t")
    after = primary.commit("after")
    primary.fill(40)
    primary.probe()
    found = look(primary, since=before.time, until=after.time)
    assert [candidate["deleted_rows"] for candidate in found["candidates"]] == [50, 0, 0]
    assert found["segments_read"] <= 4
    assert len(primary.segments()) > 80
    wanted = primary.segment(before.start).name
    assert abs(int(found["first_segment"][8:], 16) - int(wanted[8:], 16)) <= 2
    # The edges belong to it.
    assert look(primary, since=before.time, until=before.time)["matches"] == 1
    assert look(primary, since=after.time + datetime.timedelta(microseconds=1), kinds=("delete",))["matches"] == 0
    # A window before everything, and one after it: both say what is known.
    early = look(primary, until=before.time - datetime.timedelta(days=1))
    assert early["candidates"] == [] and early["notes"] == []
    late = look(primary, since=after.time + datetime.timedelta(days=1))
    assert late["candidates"] == [] and any("pg_switch_wal" in note for note in late["notes"])


def test_transaction_that_began_long_before_is_counted_whole(sandbox: Callable[..., Any], exact: None) -> None:
    primary = sandbox()
    server = primary.server
    server.sql("CREATE TABLE t AS SELECT i FROM generate_series(1, 50) i")
    primary.backup("only")
    with server.connection() as connection:
        query(connection, "BEGIN")
        query(connection, "DELETE FROM t WHERE i <= 20")
        primary.fill(30)
        # WAL tells once more what runs.
        server.sql("CHECKPOINT")
        late = primary.commit("late")
        query(connection, "DELETE FROM t WHERE i <= 30")
        query(connection, "COMMIT")
    primary.fill(2)
    primary.probe()
    found = look(primary, since=late.time, kinds=("delete",))
    candidate = found["candidates"][0]
    assert (candidate["deleted_rows"], candidate["complete"], candidate["certain"]) == (30, True, True)
    # Where the archive does not reach back to its beginning, that is told.
    gone = [path for path in primary.segments() if path < primary.segment(late.start)][:-1]
    for path in gone:
        path.unlink()
    found = look(primary, since=late.time, kinds=("delete",))
    candidate = found["candidates"][0]
    assert candidate["deleted_rows"] == 10 and not candidate["complete"]
    assert any("has touched at least what is shown" in note for note in candidate["notes"])
    # Without its WAL the backup is of no use, and that is told as well.
    assert candidate["backup"] is None and candidate["refusals"][0]["code"] == "archive_gap"


def test_missing_segment_is_told_and_what_follows_is_found(sandbox: Callable[..., Any]) -> None:
    primary = sandbox()
    primary.server.sql("CREATE TABLE t AS SELECT i FROM generate_series(1, 50) i")
    primary.backup("only")
    lost = primary.commit("lost")
    primary.fill(3)
    primary.server.sql("CHECKPOINT")
    primary.server.sql("DELETE FROM t")
    primary.probe()
    path = primary.segment(lost.start)
    path.unlink()
    found = look(primary, kinds=("delete",))
    assert found["candidates"][0]["deleted_rows"] == 50
    assert any("WAL is missing" in note and path.name in note for note in found["notes"])
    assert found["candidates"][0]["refusals"][0]["code"] == "archive_gap"


def test_other_timeline_is_followed_when_it_is_asked_for(
    sandbox: Callable[..., Any], restored: Callable[..., Restored]
) -> None:
    primary = sandbox()
    primary.server.sql("CREATE TABLE t AS SELECT i FROM generate_series(1, 50) i")
    primary.backup("only")
    primary.commit("before")
    primary.server.sql("DELETE FROM t")
    primary.commit("after")
    primary.probe()
    first = look(primary, kinds=("delete",))["candidates"][0]
    primary.server.stop()
    # Restored to just before it, accepted, and then somebody does it again.
    again = restored(primary, first["settings"], archive_after="same").run()
    again.server.sql("DELETE FROM t WHERE i <= 7")
    again.server.sql("SELECT pg_switch_wal()")
    from ansible_collections.pgdrill.pitr.plugins.module_utils.probe import Probe

    Probe(again.server.login, primary.folder, 60).switch_and_wait()
    newest = look(primary, kinds=("delete",))
    assert [candidate["deleted_rows"] for candidate in newest["candidates"]] == [7]
    assert newest["timeline"] == 2 and newest["candidates"][0]["timeline"] == 2
    old = look(primary, kinds=("delete",), timeline="1")
    assert [candidate["deleted_rows"] for candidate in old["candidates"]] == [50]
    for found in (newest, old):
        cluster = restored(primary, found["candidates"][0]["settings"]).run()
        assert cluster.server.value("SELECT count(*) FROM t") == 50
        cluster.server.stop()


def test_logical_wal_names_what_was_truncated(sandbox: Callable[..., Any]) -> None:
    primary = sandbox(settings={"wal_level": "logical"})
    server = primary.server
    server.sql("CREATE TABLE a (i int PRIMARY KEY, v text)")
    server.sql("CREATE TABLE b (i int)")
    oids = dict(server.sql("SELECT relname::text, oid::int FROM pg_class WHERE relname IN ('a', 'b')"))
    primary.backup("only")
    server.sql("TRUNCATE a, b")
    primary.probe()
    candidate = look(primary, kinds=("truncate",))["candidates"][0]
    assert [each["oid"] for each in candidate["relations"]] == [oids["a"], oids["b"]]


def test_concurrent_transactions_are_kept_apart(sandbox: Callable[..., Any]) -> None:
    primary = sandbox()
    server = primary.server
    server.sql("CREATE TABLE t AS SELECT i, i % 4 AS part FROM generate_series(1, 400) i")
    primary.backup("only")
    barrier = threading.Barrier(4)

    def work(part: int) -> None:
        connection = psycopg2.connect(host=server.socket, port=server.PORT, user="postgres", dbname="postgres")
        with connection.cursor() as cursor:
            for number in range(1, 21):
                cursor.execute("DELETE FROM t WHERE part = %s AND i <= %s", (part, 20 * number))
                barrier.wait(60)
            cursor.execute("DELETE FROM t WHERE part = %s", (part,))
        connection.rollback() if part == 3 else connection.commit()
        connection.close()

    threads = [threading.Thread(target=work, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    primary.probe()
    found = look(primary, kinds=("delete",))
    assert [candidate["deleted_rows"] for candidate in found["candidates"]] == [100, 100, 100]


def test_question_that_makes_no_sense_is_refused(incidents: Incidents) -> None:
    now = datetime.datetime.now(datetime.timezone.utc)
    with pytest.raises(PitrError, match="is before since"):
        look(incidents.sandbox, since=now, until=now - datetime.timedelta(seconds=1))
    with pytest.raises(PitrError, match="kinds: lost is not among"):
        look(incidents.sandbox, kinds=("lost",))
    with pytest.raises(PitrError, match=r"is not schema\.table"):
        look(incidents.sandbox, relation="a.b.c.d")
    with pytest.raises(PitrError, match="Timeline 9 is not known"):
        look(incidents.sandbox, timeline="9")
