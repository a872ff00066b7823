# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The drill's load and its marks, with pgbench and the server played."""

from __future__ import annotations

import contextlib
import datetime
import time
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils import load
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.plugins.module_utils.load import COMMENT, SCENARIOS, STATUS, Load, Mark, check
from ansible_collections.pgdrill.pitr.plugins.module_utils.postgres import Login
from ansible_collections.pgdrill.pitr.plugins.module_utils.target import RecoveryTarget

NOW = datetime.datetime(2026, 3, 1, 12, 0, 0, 5, tzinfo=datetime.timezone.utc)


class Session:
    def __init__(self, database: str) -> None:
        self.database = database

    def close(self) -> None:
        pass


class Server:
    """Plays the server: keeps the status row, counts transactions, remembers every statement."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.xid = 2**32 + 700
        self.row: tuple[int, str] | None = (0, "base")
        self.history: list[tuple[str, object]] = []
        self.comment: str | None = None
        self.exists = False
        monkeypatch.setattr(load, "query", self.query)
        monkeypatch.setattr(Login, "connect", lambda _self, database="": Session(database))

    def query(self, session: Session, sql: str, parameters: Any = None) -> list[tuple[Any, ...]]:
        self.history.append((sql, parameters))
        if sql.startswith(f"UPDATE {STATUS}"):
            self.xid += 1
            self.row = parameters
            return [(self.xid,)]
        if sql.startswith(f"SELECT sequence, phase FROM {STATUS}"):
            return [self.row] if self.row else []
        if sql == "SELECT clock_timestamp()":
            return [(NOW,)]
        if "pg_current_wal_insert_lsn" in sql:
            return [("0/3000060",)]
        if sql.startswith("SELECT shobj_description"):
            return [(self.comment,)] if self.exists else []
        if sql.startswith("SELECT datname"):
            return [("postgres",), ("drill",)]
        return []

    def statements(self) -> list[str]:
        return [sql.split("(")[0].strip() for sql, _parameters in self.history]

    def phases(self) -> list[str]:
        return [parameters[1] for sql, parameters in self.history if sql.startswith("UPDATE")]  # type: ignore[index]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    return Server(monkeypatch)


def program(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def bin_dir(tmp_path: Path) -> Path:
    program(tmp_path, "pgbench", f'printf "%s\\n" "$*" >> {tmp_path}/calls')
    return tmp_path


def marks(bin_dir: Path, *scenarios: str) -> dict[str, Mark]:
    found = Load(Login(), str(bin_dir), "drill").run(scenarios, 10, 4, 2, 200, "a point")
    return {mark.scenario: mark for mark in found}


def test_every_scenario_gets_a_mark_with_the_row_written_just_before(server: Server, bin_dir: Path) -> None:
    found = marks(bin_dir, *SCENARIOS)
    assert list(found) == list(SCENARIOS)
    assert server.phases() == [
        "load",
        *(f"{side} {scenario}" for scenario in ("time", "xid", "lsn", "name") for side in ("before", "after")),
        "end",
    ]
    expected = {scenario: mark.to_dict()["expected"] for scenario, mark in found.items()}
    assert expected == {
        "time": {"sequence": 2, "phase": "before time"},
        "xid": {"sequence": 4, "phase": "before xid"},
        "lsn": {"sequence": 6, "phase": "before lsn"},
        "name": {"sequence": 8, "phase": "before name"},
        "immediate": {"sequence": 0, "phase": "base"},
        "latest": {"sequence": 10, "phase": "end"},
    }


def test_options_of_every_mark_are_one_target_each(server: Server, bin_dir: Path) -> None:
    found = marks(bin_dir, *SCENARIOS)
    for scenario, mark in found.items():
        assert RecoveryTarget.from_options(mark.options).kind == scenario
    assert found["time"].options == {"recovery_target_time": "2026-03-01 12:00:00.000005+00:00"}
    # The row "before xid" is the fourth transaction.
    assert found["xid"].options == {"recovery_target_xid": str(2**32 + 704)}
    assert found["lsn"].options == {"recovery_target_lsn": "0/3000060", "recovery_target_inclusive": False}
    assert found["name"].options == {"recovery_target_name": "a point"}


def test_target_lies_between_the_two_writings_of_the_row(server: Server, bin_dir: Path) -> None:
    marks(bin_dir, "time", "lsn", "name")
    order = server.statements()
    update = f"UPDATE {STATUS} SET sequence = %s, phase = %s WHERE id = 1 RETURNING pg_current_xact_id"
    assert order == [
        update,
        update,
        "SELECT clock_timestamp",
        update,
        update,
        "SELECT pg_current_wal_insert_lsn",
        update,
        update,
        "SELECT pg_create_restore_point",
        update,
        update,
    ]


def test_clock_of_a_time_target_ticks_on_both_sides(
    server: Server, bin_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit's time has microseconds; the target must not be at, but between, the two."""
    monkeypatch.setattr(time, "sleep", lambda seconds: server.history.append((f"sleep {seconds}", ())))
    marks(bin_dir, "time")
    order = [statement.partition(" ")[0] for statement in server.statements()]
    assert order == ["UPDATE", "UPDATE", "sleep", "SELECT", "sleep", "UPDATE", "UPDATE"]


def test_scenarios_that_were_not_asked_for_leave_no_mark(server: Server, bin_dir: Path) -> None:
    assert list(marks(bin_dir, "latest")) == ["latest"]
    assert server.phases() == ["load", "end"]
    assert list(marks(bin_dir, "xid")) == ["xid"]


def test_pgbench_gets_the_figures(server: Server, bin_dir: Path) -> None:
    marks(bin_dir, "latest")
    assert (bin_dir / "calls").read_text().splitlines() == ["-i -q -s 10 drill", "-n -c 4 -j 2 -t 200 drill"]


def test_unknown_scenario_is_refused_before_anything_is_done(server: Server, bin_dir: Path) -> None:
    with pytest.raises(PitrError, match=r"Unknown scenario newest, wrong\. There are time, xid"):
        marks(bin_dir, "latest", "wrong", "newest")
    assert server.history == [] and not (bin_dir / "calls").exists()


def test_pgbench_that_fails_is_an_error_with_its_words(server: Server, bin_dir: Path) -> None:
    program(bin_dir, "pgbench", '[ "$1" = -i ] || { echo "FATAL: too many clients"; exit 2; }')
    with pytest.raises(PitrError, match="pgbench failed with exit code 2: FATAL: too many clients"):
        marks(bin_dir, "latest")
    assert "end" not in server.phases()


def test_pgbench_that_cannot_initialise_is_an_error(server: Server, bin_dir: Path) -> None:
    program(bin_dir, "pgbench", "echo 'no space' >&2; exit 1")
    with pytest.raises(PitrError, match="no space"):
        marks(bin_dir, "latest")


@pytest.mark.timeout(20)
def test_pgbench_does_not_outlive_a_mark_that_fails(
    server: Server, bin_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(bin_dir, "pgbench", f'[ "$1" = -i ] || {{ echo $$ > {bin_dir}/pid; exec sleep 60; }}')

    def fail(_session: Session, sql: str, parameters: Any = None) -> list[tuple[Any, ...]]:
        if "before xid" in (parameters or ()):
            while not (bin_dir / "pid").exists() or not (bin_dir / "pid").read_text():
                pass
            raise PitrError("connection lost")
        return [(1,)]

    monkeypatch.setattr(load, "query", fail)
    with pytest.raises(PitrError, match="connection lost"):
        marks(bin_dir, "xid")
    with contextlib.suppress(FileNotFoundError):
        assert Path(f"/proc/{(bin_dir / 'pid').read_text().strip()}/stat").read_text().split()[2] == "Z"


def test_new_database_is_made_with_the_comment_and_the_base_row(server: Server) -> None:
    Load(Login(), "/bin", 'dr"ill').prepare()
    statements = [sql for sql, _parameters in server.history]
    assert 'CREATE DATABASE "dr""ill"' in statements
    assert ('COMMENT ON DATABASE "dr""ill" IS %s', (COMMENT,)) in server.history
    assert statements[-2].startswith(f"CREATE TABLE {STATUS} (id int PRIMARY KEY, sequence bigint")
    assert statements[-1] == f"INSERT INTO {STATUS} VALUES (1, 0, 'base')"
    assert not any(sql.startswith("DROP") for sql in statements)


def test_database_of_an_earlier_drill_is_replaced(server: Server) -> None:
    server.exists, server.comment = True, COMMENT
    Load(Login(), "/bin", "drill").prepare()
    statements = server.statements()
    assert statements.index('DROP DATABASE "drill"') < statements.index('CREATE DATABASE "drill"')


@pytest.mark.parametrize("comment", [None, "", "production"])
def test_database_that_no_drill_has_made_is_never_dropped(server: Server, comment: str | None) -> None:
    server.exists, server.comment = True, comment
    with pytest.raises(PitrError, match=r"was not made by a drill\. Nothing was changed"):
        Load(Login(), "/bin", "drill").prepare()
    assert len(server.history) == 1


def test_check_returns_the_row_and_a_clean_amcheck(server: Server, bin_dir: Path) -> None:
    program(bin_dir, "pg_amcheck", f'echo "$@" > {bin_dir}/calls; [ -z "$PGDATABASE" ]')
    server.row = (7, "end")
    result = check(Login(), str(bin_dir), "drill", True, 2)
    assert result == {
        "status": {"sequence": 7, "phase": "end"},
        "amcheck": {"ok": True, "databases": ["postgres", "drill"], "findings": ""},
    }
    assert (bin_dir / "calls").read_text().split() == ["--all", "--heapallindexed", "--install-missing", "--jobs=2"]


def test_check_without_amcheck_says_nothing_of_it(server: Server) -> None:
    assert check(Login(), "/nowhere", "drill", False, 2) == {"status": {"sequence": 0, "phase": "base"}}


def test_missing_row_is_an_empty_status(server: Server) -> None:
    server.row = None
    assert check(Login(), "/nowhere", "drill", False, 2) == {"status": {}}


@pytest.mark.parametrize(
    ("script", "findings"),
    [
        ("echo 'index i: item order invariant violated'; exit 2", "index i: item order invariant violated"),
        ("echo 'only on stderr' >&2; exit 2", "only on stderr"),
        ("exit 2", "corruption was reported without a description"),
    ],
)
def test_corruption_is_found_even_without_a_description(
    server: Server, bin_dir: Path, script: str, findings: str
) -> None:
    program(bin_dir, "pg_amcheck", script)
    amcheck = check(Login(), str(bin_dir), "drill", True, 1)["amcheck"]
    assert amcheck["ok"] is False and amcheck["findings"] == findings


@pytest.mark.parametrize("code", [1, 3, 127])
def test_amcheck_that_could_not_do_its_work_is_an_error(server: Server, bin_dir: Path, code: int) -> None:
    program(bin_dir, "pg_amcheck", f"echo 'could not connect' >&2; exit {code}")
    with pytest.raises(PitrError, match=f"pg_amcheck failed with exit code {code}: could not connect"):
        check(Login(), str(bin_dir), "drill", True, 1)


def test_amcheck_that_fails_with_words_on_standard_output_only_is_quoted(server: Server, bin_dir: Path) -> None:
    program(bin_dir, "pg_amcheck", "echo 'no such extension'; exit 1")
    with pytest.raises(PitrError, match="exit code 1: no such extension"):
        check(Login(), str(bin_dir), "drill", True, 1)


def test_amcheck_that_is_not_installed_is_an_error(server: Server, bin_dir: Path) -> None:
    with pytest.raises(PitrError, match="pg_amcheck does not exist"):
        check(Login(), str(bin_dir), "drill", True, 1)
