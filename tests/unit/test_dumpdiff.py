# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What counts as a difference between a truth and a restored cluster, and what is explained."""

from __future__ import annotations

from pathlib import Path

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils.dumpdiff import Comparison, compare
from ansible_collections.pgdrill.pitr.plugins.module_utils.dumpindex import CLUSTER
from ansible_collections.pgdrill.pitr.plugins.module_utils.dumpparse import index_of
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from hypothesis import given
from hypothesis import strategies as st

TRUTH = (Path(__file__).parent / "fixtures" / "cluster-dump-18.sql").read_bytes()
RECOVERY = (b'-- META "in_recovery" false', b'-- META "in_recovery" true')


def changed(*replacements: tuple[bytes, bytes], dump: bytes = TRUTH) -> bytes:
    for old, new in replacements:
        assert dump.count(old) == 1, f"{dump.count(old)} of {old!r}"
        dump = dump.replace(old, new)
    return dump


def cut_out(start: bytes, end: bytes, dump: bytes = TRUTH) -> bytes:
    """The dump without what begins with ``start`` and ends before ``end``."""
    at = dump.index(start)
    return dump[:at] + dump[dump.index(end, at + 1) :]


def compared(restored: bytes, truth: bytes = TRUTH) -> Comparison:
    return compare(index_of([truth]), index_of([restored]))


def told(comparison: Comparison) -> list[tuple[str, str, str]]:
    return [(finding.either.database, finding.kind, finding.label) for finding in comparison.findings]


def setval(value: int, called: str, name: str = "s") -> bytes:
    return f'SELECT pg_catalog.setval(\'"public"."{name}"\', {value}, {called});'.encode()


def test_the_same_dump_is_identical() -> None:
    comparison = compared(TRUTH)
    assert comparison.identical and not comparison.explained


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (b"2\ttab\\there", b"2\ttab\\tHere", ("d1", "changed", "TABLE DATA public.t")),
        (b"5\t\\N\n", b"5\t\n", ("d1", "changed", "TABLE DATA public.t")),
        (b"6\tx\\n\\\\.\\ny\n", b"", ("d1", "changed", "TABLE DATA public.t")),
        (b"c2VydmVy", b"b3RoZXI=", (CLUSTER, "changed", "ROLE ATTRIBUTES app")),
        (b"\"work_mem\" TO '8MB'", b"\"work_mem\" TO '7MB'", (CLUSTER, "changed", "ROLE SETTING app work_mem")),
        (b"\"work_mem\" TO '9MB'", b"\"work_mem\" TO '7MB'", ("d1", "changed", "DATABASE PROPERTIES d1")),
        (b'"shared_buffers" "128MB"', b'"shared_buffers" "1GB"', (CLUSTER, "changed", "SETTING shared_buffers")),
        (b'-- SETTING "max_wal_size" "1GB"\n', b"", (CLUSTER, "missing", "SETTING max_wal_size")),
        (
            b'-- SETTING "max_wal_size"',
            b'-- SETTING "work_mem" "1GB"\n-- SETTING "max_wal_size"',
            (CLUSTER, "extra", "SETTING work_mem"),
        ),
        (b'-- ROLE SETTING "ALL geqo" "off"\n', b"", (CLUSTER, "missing", "ROLE SETTING ALL geqo")),
        (b'-- CLOSED DATABASE "closed" {"owner": "postgres"}\n', b"", (CLUSTER, "missing", "CLOSED DATABASE closed")),
        (b"INCREMENT BY 5", b"INCREMENT BY 6", ("d1", "changed", "SEQUENCE public.s")),
        (b"\\x00112233", b"\\x00112234", ("d1", "changed", "BLOBS 4242")),
        (b"fakefn", b"faked", ("d1", "changed", "FUNCTION public.f()")),
        (b"'db comment'", b"'DB comment'", ("d1", "changed", 'COMMENT DATABASE "d1"')),
    ],
)
def test_one_difference_is_one_finding(old: bytes, new: bytes, expected: tuple[str, str, str]) -> None:
    comparison = compared(changed((old, new)))
    assert told(comparison) == [expected]
    assert not comparison.explained


def test_a_dropped_index_is_missing() -> None:
    restored = cut_out(b"--\n-- Name: t_v_idx; Type: INDEX", b"--\n-- Name: ")
    assert told(compared(restored)) == [("d1", "missing", "INDEX public.t_v_idx")]
    assert told(compared(TRUTH, truth=restored)) == [("d1", "extra", "INDEX public.t_v_idx")]


def test_a_database_that_only_one_side_has_is_told_once() -> None:
    restored = cut_out(b'--\n-- Database "d1" dump\n', b'--\n-- Database "postgres" dump\n')
    assert told(compared(restored)) == [("d1", "missing", "DATABASE d1")]
    assert told(compared(TRUTH, truth=restored)) == [("d1", "extra", "DATABASE d1")]


def test_a_table_in_another_tablespace_is_told_by_the_text_before_it() -> None:
    restored = changed((b'SET default_tablespace = "ts";\n\n', b""))
    assert told(compared(restored)) == [("d1", "missing", "text before TABLE public.in_ts")]
    assert told(compared(TRUTH, truth=restored)) == [("d1", "extra", "text before TABLE public.in_ts")]
    moved = changed((b'SET default_tablespace = "ts";', b'SET default_tablespace = "t2";'))
    assert told(compared(moved)) == [("d1", "changed", "text before TABLE public.in_ts")]


def test_a_tablespace_that_reaches_one_table_further_is_found() -> None:
    # The same objects and the same frames in the same order; only their places among each other differ.
    start = TRUTH.index(b"--\n-- Name: in_ts; Type: TABLE;")
    table = TRUTH[start : TRUTH.index(b"SET default_tablespace = '';", start)]
    frame = b'SET default_tablespace = "ts";\n\n'
    restored = changed((frame + table, table + frame))
    assert told(compared(restored)) == [("d1", "missing", "text before TABLE public.in_ts")]


def test_text_between_objects_is_not_told_beside_a_real_difference() -> None:
    restored = changed((b'SET default_tablespace = "ts";\n\n', b""), (b"2\ttab", b"2\tTAB"))
    assert told(compared(restored)) == [("d1", "changed", "TABLE DATA public.t")]


def test_text_between_objects_is_told_beside_explained_differences() -> None:
    restored = changed((b'SET default_tablespace = "ts";\n\n', b""), (setval(1, "true"), setval(6, "true")))
    comparison = compared(restored)
    assert told(comparison) == [("d1", "missing", "text before TABLE public.in_ts")]
    assert len(comparison.explained) == 1


def test_another_order_of_objects_is_a_difference() -> None:
    rules = [line for line in TRUTH.split(b"\n") if line.startswith(b"-- HBA RULE")]
    restored = changed((b"\n".join(rules[:2]), b"\n".join(rules[1::-1])))
    assert told(compared(restored)) == [(CLUSTER, "order", "HBA RULE local all all trust")]


def operator(argument: str) -> bytes:
    header = "--\n-- Name: <->; Type: OPERATOR; Schema: public; Owner: postgres\n--\n\n"
    return f"{header}CREATE OPERATOR <-> ({argument});\n\n\n".encode()


def with_operators(*arguments: str) -> bytes:
    anchor = b"--\n-- Name: ===; Type: OPERATOR"
    return changed((anchor, b"".join(map(operator, arguments)) + anchor))


def test_objects_of_one_name_are_matched_by_their_content() -> None:
    truth = with_operators("a", "b", "c")
    assert told(compared(with_operators("b", "c"), truth)) == [("d1", "missing", "OPERATOR public.<->")]
    comparison = compared(with_operators("b", "x", "c"), truth)
    assert told(comparison) == [("d1", "changed", "OPERATOR public.<->")]
    assert told(compared(with_operators("a", "c", "b"), truth)) == [("d1", "order", "OPERATOR public.<->")]
    assert told(compared(with_operators("a", "b", "c", "c"), truth)) == [("d1", "extra", "OPERATOR public.<->")]


# --- sequences -------------------------------------------------------------------------------------------------------


@given(ahead=st.integers(-100, 100))
def test_a_sequence_may_be_ahead_by_up_to_32_increments(ahead: int) -> None:
    for name, increment, start in (("s", 5, 1), ("sd", -3, 900)):
        restored = changed((setval(start, "true", name), setval(start + ahead * increment, "true", name)))
        comparison = compared(restored)
        assert comparison.identical == (0 <= ahead <= 32)
        assert len(comparison.explained) == (1 if 0 < ahead <= 32 else 0)


def test_an_explained_sequence_says_both_values() -> None:
    (explained,) = compared(changed((setval(6, "true", "t_id_seq"), setval(38, "true", "t_id_seq")))).explained
    assert (explained.database, explained.object) == ("d1", "SEQUENCE SET public.t_id_seq")
    assert (explained.truth, explained.restored) == ("6", "38")
    assert "32 values ahead" in explained.reason


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (setval(1, "true"), setval(2, "true")),  # not a multiple of the increment
        (setval(1, "true"), setval(0, "true")),
        (setval(1, "true"), setval(-4, "true")),  # behind
        (setval(1, "true"), setval(6, "false")),
        (setval(1, "false", "snew"), setval(1, "true", "snew")),
        (setval(1, "false", "snew"), setval(2, "false", "snew")),
        (setval(1, "false", "snew"), setval(33, "true", "snew")),
        (setval(1, "true"), setval(6, "true") + b"\nSELECT 1;"),
        (setval(1, "true"), setval(6, "true") + b"-- x"),
    ],
)
def test_any_other_position_of_a_sequence_is_a_difference(old: bytes, new: bytes) -> None:
    comparison = compared(changed((old, new)))
    assert comparison.findings and not comparison.explained


def test_the_increment_is_the_one_of_the_truth() -> None:
    restored = changed((b"INCREMENT BY 5", b"INCREMENT BY 1"), (setval(1, "true"), setval(2, "true")))
    assert [label for _database, _kind, label in told(compared(restored))] == [
        "SEQUENCE public.s",
        "SEQUENCE SET public.s",
    ]


def test_a_sequence_of_another_owner_is_not_explained() -> None:
    at = TRUTH.index(b"-- Name: s; Type: SEQUENCE SET;")
    old = TRUTH[at : TRUTH.index(b"true", at)]
    new = old.replace(b"Owner: postgres", b"Owner: app").replace(b", 1, ", b", 6, ")
    assert told(compared(changed((old, new)))) == [("d1", "changed", "SEQUENCE SET public.s")]


def test_what_only_looks_like_a_sequence_is_not_explained() -> None:
    fake = b"\n;\n--\n-- Name: s; Type: SEQUENCE SET; Schema: public; Owner: postgres\n--\n\n"
    truth = changed((b"\nselect 'x\n", fake + setval(1, "true") + b"\nselect 'x\n"))
    restored = changed((b"\nselect 'x\n", fake + setval(6, "true") + b"\nselect 'x\n"))
    assert told(compared(restored, truth)) == [("d1", "changed", "FUNCTION public.f()")]


# --- unlogged relations ----------------------------------------------------------------------------------------------

UNLOGGED_ROWS = (
    b'COPY "public"."u" ("id", "v") FROM stdin;\n1\t1\n2\t2\n',
    b'COPY "public"."u" ("id", "v") FROM stdin;\n',
)


def test_an_unlogged_table_may_be_empty_after_a_restore() -> None:
    comparison = compared(changed(UNLOGGED_ROWS))
    assert comparison.identical
    (explained,) = comparison.explained
    assert (explained.object, explained.truth, explained.restored) == ("TABLE DATA public.u", "2 rows", "0 rows")


def test_an_unlogged_table_with_other_rows_is_a_difference() -> None:
    assert told(compared(changed((b"2\t2\n", b"2\t3\n")))) == [("d1", "changed", "TABLE DATA public.u")]
    assert told(compared(changed((b"2\t2\n", b"")))) == [("d1", "changed", "TABLE DATA public.u")]


def test_rows_that_only_the_restored_unlogged_table_has_are_a_difference() -> None:
    assert told(compared(TRUTH, truth=changed(UNLOGGED_ROWS))) == [("d1", "changed", "TABLE DATA public.u")]


def test_an_empty_table_that_is_logged_in_the_truth_is_a_difference() -> None:
    rows = (b'COPY "public"."part1" ("a", "b") FROM stdin;\n1\tk\n', b'COPY "public"."part1" ("a", "b") FROM stdin;\n')
    assert told(compared(changed(rows))) == [("d1", "changed", "TABLE DATA public.part1")]
    unlogged = changed(rows, (b'CREATE TABLE "public"."part1"', b'CREATE UNLOGGED TABLE "public"."part1"'))
    assert ("d1", "changed", "TABLE DATA public.part1") in told(compared(unlogged))


def test_an_unlogged_table_of_another_database_explains_nothing() -> None:
    logged = changed((b'CREATE UNLOGGED TABLE "public"."u"', b'CREATE TABLE "public"."u"'))
    elsewhere = (
        b'--\n-- Name: u; Type: TABLE; Schema: public; Owner: o\n--\n\nCREATE UNLOGGED TABLE "public"."u" (\n);\n\n\n'
    )
    end = b'--\n-- PostgreSQL database dump complete\n--\n\n\\unrestrict 0\n\n--\n-- Database "we ird " db" dump'
    truth = changed((end, elsewhere + end), dump=logged)
    assert told(compared(changed(UNLOGGED_ROWS, dump=truth), truth)) == [("d1", "changed", "TABLE DATA public.u")]


def test_other_columns_of_an_empty_unlogged_table_are_a_difference() -> None:
    other = (UNLOGGED_ROWS[0], b'COPY "public"."u" ("id", "w") FROM stdin;\n')
    assert told(compared(changed(other))) == [("d1", "changed", "TABLE DATA public.u")]


@pytest.mark.parametrize(
    ("value", "called", "identical"),
    [(1, "false", True), (1, "true", False), (3, "true", False), (34, "true", False), (2, "false", False)],
)
def test_an_unlogged_sequence_may_be_at_its_start_only(value: int, called: str, identical: bool) -> None:
    old = setval(2, "true", "u_id_seq")
    assert compared(changed((old, setval(value, called, "u_id_seq")))).identical is identical


def test_the_identity_of_an_unlogged_table_is_unlogged_too() -> None:
    truth = changed((setval(1, "false", "uid_i_seq"), setval(9, "true", "uid_i_seq")))
    comparison = compared(TRUTH, truth)
    assert comparison.identical and len(comparison.explained) == 1
    logged = changed((setval(6, "true", "t_id_seq"), setval(1, "false", "t_id_seq")))
    assert told(compared(logged)) == [("d1", "changed", "SEQUENCE SET public.t_id_seq")]


def without_unlogged(dump: bytes) -> bytes:
    """What pg_dump writes for a server in recovery."""
    for name, kind in (("u", "TABLE DATA"), ("uid", "TABLE DATA")):
        dump = cut_out(f"--\n-- Data for Name: {name}; Type: {kind}".encode(), b"--\n-- ", dump)
    for name in ("lg_i_seq", "u_id_seq", "uid_i_seq"):
        dump = cut_out(f"--\n-- Name: {name}; Type: SEQUENCE SET".encode(), b"--\n-- ", dump)
    return dump


def test_a_truth_from_a_standby_lacks_what_is_unlogged() -> None:
    truth = changed(RECOVERY, dump=without_unlogged(TRUTH))
    reset = changed(UNLOGGED_ROWS, (setval(2, "true", "u_id_seq"), setval(1, "false", "u_id_seq")))
    comparison = compared(reset, truth)
    assert comparison.identical and len(comparison.explained) == 5
    written = compared(TRUTH, truth)
    assert [label for _database, _kind, label in told(written)] == [
        "TABLE DATA public.u",
        "SEQUENCE SET public.u_id_seq",
    ]


def test_a_restored_cluster_in_recovery_lacks_what_is_unlogged() -> None:
    comparison = compared(changed(RECOVERY, dump=without_unlogged(TRUTH)))
    assert comparison.identical and len(comparison.explained) == 5


def test_without_recovery_nothing_unlogged_may_be_missing() -> None:
    assert len(compared(without_unlogged(TRUTH)).findings) == 5
    assert len(compared(changed(UNLOGGED_ROWS), without_unlogged(TRUTH)).findings) == 5


def test_logged_rows_are_never_missing_for_recovery() -> None:
    restored = cut_out(b"--\n-- Data for Name: t; Type: TABLE DATA", b"--\n-- ", changed(RECOVERY))
    assert told(compared(restored)) == [("d1", "missing", "TABLE DATA public.t")]
    restored = cut_out(b"--\n-- Name: s; Type: SEQUENCE SET", b"--\n-- ", changed(RECOVERY))
    assert told(compared(restored)) == [("d1", "missing", "SEQUENCE SET public.s")]


# --- what cannot be compared -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", [b"Dumped from database", b"Dumped by pg_dump"])
def test_major_versions_that_differ_are_refused(program: bytes) -> None:
    with pytest.raises(PitrError, match="cannot be compared"):
        compared(TRUTH.replace(program + b" version 18.6", program + b" version 17.11"))
