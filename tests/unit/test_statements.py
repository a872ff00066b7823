# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Reading times, prefixes and statements of server logs."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils import statements
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.plugins.module_utils.statements import LogReader, Prefix, Zone, kinds_of, mentions


@pytest.mark.parametrize(
    ("zone", "text", "expected"),
    [
        ("", "2026-03-01 14:30:00.123 UTC", "2026-03-01T14:30:00.123000+00:00"),
        ("", "2026-03-01 14:30:00 GMT", "2026-03-01T14:30:00+00:00"),
        ("", "2026-03-01 14:30:00.5 +0530", "2026-03-01T09:00:00.500000+00:00"),
        # What zones without letters print (tzdata), with the sign of ISO 8601.
        ("", "2026-03-01 14:30:00.123 -03", "2026-03-01T17:30:00.123000+00:00"),
        ("Europe/Berlin", "2026-03-01 14:30:00.123 CET", "2026-03-01T13:30:00.123000+00:00"),
        ("Europe/Berlin", "2026-07-01 14:30:00.123 CEST", "2026-07-01T12:30:00.123000+00:00"),
        # The hour that is repeated in autumn is told by its abbreviation.
        ("Europe/Berlin", "2026-10-25 02:30:00.000 CEST", "2026-10-25T00:30:00+00:00"),
        ("Europe/Berlin", "2026-10-25 02:30:00.000 CET", "2026-10-25T01:30:00+00:00"),
        ("Asia/Kolkata", "2026-03-01 14:30:00.000 IST", "2026-03-01T09:00:00+00:00"),
        ("UTC", "2026-03-01 14:30:00.000 UTC", "2026-03-01T14:30:00+00:00"),
    ],
)
def test_time_is_read_in_utc(zone: str, text: str, expected: str) -> None:
    assert Zone(zone).read(text, "log").isoformat() == expected


@pytest.mark.parametrize("text", ["2026-03-01 14:30:00.123 IST", "2026-03-01 14:30:00 CET", "2026-03-01 14:30:00"])
def test_abbreviation_is_not_guessed(text: str) -> None:
    with pytest.raises(PitrError, match="log_timezone"):
        Zone().read(text, "server.csv:7")


@pytest.mark.parametrize(
    ("zone", "text"), [("Europe/Berlin", "2026-03-01 14:30:00 IST"), ("Europe/Berlin", "2026-07-01 14:30:00 CET")]
)
def test_wrong_zone_is_noticed_by_the_abbreviation(zone: str, text: str) -> None:
    with pytest.raises(PitrError, match="Is log_timezone right"):
        Zone(zone).read(text, "server.csv:7")


def test_unknown_zone_and_unreadable_time_are_errors() -> None:
    with pytest.raises(PitrError, match="does not know the time zone 'Middle/Earth'"):
        Zone("Middle/Earth")
    with pytest.raises(PitrError, match="not a time of a server log"):
        Zone("UTC").read("yesterday", "server.csv:7")


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("DROP TABLE t", ("drop",)),
        ("/* why */ drop\n  schema s cascade", ("drop",)),
        ("DROP DATABASE d", ("drop_database",)),
        ("TRUNCATE t", ("truncate",)),
        ("WITH gone AS (DELETE FROM t RETURNING *) INSERT INTO a SELECT * FROM gone", ("delete",)),
        ("UPDATE t SET a = 1", ("update",)),
        ("INSERT INTO t VALUES (1) ON CONFLICT (a) DO UPDATE SET a = 2", ("update",)),
        ("MERGE INTO t USING s ON true WHEN MATCHED THEN DELETE", ("delete", "update")),
        ("SELECT 1", ()),
        ("DROP INDEX i", ()),
        ("INSERT INTO log VALUES ('please do not DROP TABLE t') -- nor TRUNCATE t", ()),
        ("DO $$ BEGIN EXECUTE 'DROP TABLE t'; END $$", ("drop",)),
    ],
)
def test_statement_is_told_by_what_it_may_destroy(text: str, kinds: tuple[str, ...]) -> None:
    assert kinds_of(text) == kinds


@pytest.mark.parametrize(
    ("text", "relation", "expected"),
    [
        ("DROP TABLE orders", "public.orders", True),
        ('DROP TABLE "orders"', "orders", True),
        ("drop table Public . Orders", "public.orders", True),
        ('DELETE FROM public."orders" WHERE 1=1', "public.orders", True),
        ("DROP TABLE orders_old", "orders", False),
        ("DROP TABLE old_orders", "orders", False),
        ("DROP TABLE other.orders", "public.orders", False),
        ("DROP TABLE orders$1", "orders", False),
    ],
)
def test_relation_is_found_by_its_whole_name(text: str, relation: str, expected: bool) -> None:
    assert mentions(text, relation) is expected


def test_prefix_gives_its_fields() -> None:
    fields = Prefix("%m [%p] %q%u@%d/%a %v %x ").match(
        "2026-03-01 14:30:00.123 CET [42] alice@shop/psql 3/17 745 LOG:  statement: DROP TABLE t"
    )
    assert fields is not None
    assert (fields["user"], fields["database"], fields["application"]) == ("alice", "shop", "psql")
    assert (fields["vxid"], fields["xid"], fields["severity"]) == ("3/17", "745", "LOG")
    assert (fields["time"], fields["message"]) == ("2026-03-01 14:30:00.123 CET", "statement: DROP TABLE t")
    background = Prefix("%m [%p] %q%u@%d ").match("2026-03-01 14:30:00.123 CET [42] LOG:  checkpoint starting: time")
    assert background is not None and background["user"] == ""
    assert (
        Prefix("%n %-10u|%d ")
        .match("1772371800.123 alice     |shop LOG:  x")["time"]
        .startswith(  # type: ignore[index]
            "2026-03-01 13:30:00.123"
        )
    )
    assert Prefix("%m ").match("continued") is None
    with pytest.raises(PitrError, match="has no time"):
        Prefix("[%p] %u@%d ")


def lines(path: Path, *text: str) -> str:
    path.write_text("".join(f"{line}\n" for line in text), encoding="utf-8")
    return str(path)


PREFIX = "%m [%p] %c %v %x %u@%d "


def line(clock: str, message: str, vxid: str = "3/1", xid: int = 0, severity: str = "LOG") -> str:
    return f"2026-03-01 14:{clock} UTC [42] 65e1.2a {vxid} {xid} alice@shop {severity}:  {message}"


def test_id_is_taken_from_a_later_line_of_the_same_transaction(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "a.log",
        line("30:00.000", "statement: BEGIN; DELETE FROM t"),
        line("30:01.000", "duration: 12.5 ms", xid=745),
        line("31:00.000", "statement: DROP TABLE t", "3/2"),
    )
    found = LogReader(Zone(), PREFIX).statements([path])
    assert [(item.xid, item.kinds) for item in found] == [(745, ("delete",)), (0, ("drop",))]


def test_statement_that_failed_is_left_out(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "a.log",
        line("30:00.000", "statement: DROP TABLE nothing"),
        line("30:00.001", 'table "nothing" does not exist', severity="ERROR"),
        line("30:00.001", "DROP TABLE nothing", severity="STATEMENT"),
        line("30:02.000", "statement: DROP TABLE t", "3/2"),
    )
    assert [item.text for item in LogReader(Zone(), PREFIX).statements([path])] == ["DROP TABLE t"]


def test_statement_of_several_lines_is_one_and_a_duration_is_taken_off(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "a.log",
        line("30:10.000", "duration: 4000.000 ms  statement: DELETE"),
        "\t  FROM t",
        "\t  WHERE true",
    )
    found = LogReader(Zone(), PREFIX).statements([path])
    assert [(item.text, item.time.second) for item in found] == [("DELETE FROM t WHERE true", 6)]
    assert found[0].place == f"{path}:1"


def test_packed_logs_patterns_and_a_half_written_end_are_read(tmp_path: Path) -> None:
    row = "2026-03-01 14:30:00.000 UTC,alice,shop,42,,65e1.2a,1,DROP TABLE,2026-03-01 14:00:00 UTC,3/1,745,LOG,00000"
    row += ',"statement: DROP TABLE t",,,,,,,,,psql,client backend,,0\n'
    with gzip.open(tmp_path / "one.csv.gz", "wt", encoding="utf-8") as stream:
        stream.write(row)
    (tmp_path / "two.csv").write_text(row + row[:60], encoding="utf-8")
    found = LogReader(Zone()).statements([str(tmp_path / "*.csv*")])
    assert [item.xid for item in found] == [745, 745]
    (tmp_path / "three.csv").write_text("a,b\n", encoding="utf-8")
    with pytest.raises(PitrError, match="a csvlog has"):
        LogReader(Zone()).statements([str(tmp_path / "three.csv")])
    (tmp_path / "four.json").write_text("plain text\n", encoding="utf-8")
    with pytest.raises(PitrError, match="no line of a jsonlog"):
        LogReader(Zone()).statements([str(tmp_path / "four.json")])


def test_many_statements_are_left_out_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statements, "MAX_STATEMENTS", 3)
    path = lines(tmp_path / "a.log", *(line(f"30:0{number}.000", "statement: DELETE FROM t") for number in range(5)))
    reader = LogReader(Zone(), PREFIX)
    assert len(reader.statements([path])) == 3 and reader.left_out == 2
