# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The indexer on dumps of PostgreSQL 15 and 18 that were recorded from servers full of odd names and look-alikes."""

from __future__ import annotations

from pathlib import Path

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils.dumpindex import (
    CLUSTER,
    FRAME,
    DumpIndex,
    DumpObject,
    SequenceDefinition,
    SequencePosition,
    TableRows,
    UnloggedTable,
    statement_label,
)
from ansible_collections.pgdrill.pitr.plugins.module_utils.dumpparse import COMPLETE, Indexer, index_of, is_noise
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

FIXTURES = {
    version: (Path(__file__).parent / "fixtures" / f"cluster-dump-{version}.sql").read_bytes() for version in (15, 18)
}
DUMP = FIXTURES[18]

both_versions = pytest.mark.parametrize("dump", FIXTURES.values(), ids=[f"pg{version}" for version in FIXTURES])


def with_body(body: bytes) -> bytes:
    """A whole dump of one database with these objects."""
    return (
        b"--\n-- PostgreSQL database cluster dump\n--\n\n"
        b'--\n-- Database "d" dump\n--\n\n--\n-- PostgreSQL database dump\n--\n\n'
        + body
        + b"\n--\n"
        + COMPLETE
        + b"--\n\n"
    )


def toc(name: str, kind: str, body: bytes) -> bytes:
    prefix = "Data for " if kind == "TABLE DATA" else ""
    return f"--\n-- {prefix}Name: {name}; Type: {kind}; Schema: s; Owner: o\n--\n\n".encode() + body + b"\n\n"


def find(index: DumpIndex, label: str) -> DumpObject:
    (found,) = (item for item in index.objects if item.label == label)
    return found


def labels(dump: bytes) -> list[str]:
    return [item.label for item in index_of([dump]).objects if item.type != FRAME]


@both_versions
def test_every_byte_and_line_belongs_to_exactly_one_object(dump: bytes) -> None:
    index = index_of([dump])
    offset, line = 0, 1
    for item in index.objects:
        assert (item.offset, item.line) == (offset, line), item.label
        assert dump.count(b"\n", offset, offset + item.size) == item.lines, item.label
        offset += item.size
        line += item.lines
    assert offset == len(dump) == index.size
    assert line - 1 == dump.count(b"\n") == index.lines


@both_versions
def test_objects_are_known_by_database_type_and_name(dump: bytes) -> None:
    index = index_of([dump])
    assert index.databases == ["template1", "d1", "postgres", 'we ird " db']
    found = {(item.database, item.label) for item in index.objects}
    assert {
        (CLUSTER, "SETTING max_connections"),
        (CLUSTER, "HBA RULE local all all trust"),
        (CLUSTER, "CLOSED DATABASE closed"),
        (CLUSTER, "ROLE app"),
        (CLUSTER, "ROLE ATTRIBUTES app"),
        (CLUSTER, 'ROLE ATTRIBUTES odd " role\nline two'),
        (CLUSTER, "ROLE SETTING app work_mem"),
        (CLUSTER, "ROLE SETTING ALL geqo"),
        (CLUSTER, "COMMENT ON ROLE app"),
        (CLUSTER, "CREATE TABLESPACE ts"),
        (CLUSTER, 'GRANT SET ON PARAMETER "work_mem" TO "app"'),
        ("d1", "DATABASE d1"),
        ("d1", "DATABASE PROPERTIES d1"),
        ("d1", "TABLE public.t"),
        ("d1", "TABLE DATA public.t"),
        ("d1", "TABLE public.odd name; Type: VIEW"),
        ("d1", "INDEX public.t_v_idx"),
        ("d1", "FUNCTION public.atomic(integer)"),
        ('we ird " db', 'DATABASE we ird " db'),
    } <= found
    assert index.meta["in_recovery"] is False


@both_versions
def test_look_alikes_inside_of_quotes_are_text(dump: bytes) -> None:
    index = index_of([dump])
    assert not [item.label for item in index.objects if "fake" in item.label]
    body = dump[find(index, "FUNCTION public.f()").offset :][: find(index, "FUNCTION public.f()").size]
    assert b"COPY" in body and b"ALTER FUNCTION" in body


@both_versions
def test_facts_that_the_comparison_needs(dump: bytes) -> None:
    facts = {item.label: item.fact for item in index_of([dump]).objects if item.database == "d1"}
    assert facts["TABLE public.u"] == UnloggedTable('"public"."u"')
    assert facts["TABLE public.t"] is None
    rows = {name: fact.rows for name, fact in facts.items() if isinstance(fact, TableRows)}
    assert rows["TABLE DATA public.t"] == 6
    assert rows["TABLE DATA public.empty"] == 0
    assert rows["TABLE DATA public.nocol"] == 1, "one row of no columns is an empty line"
    odd = facts["TABLE DATA public.odd name; Type: VIEW"]
    assert isinstance(odd, TableRows) and odd.relation == '"public"."odd\nname; Type: VIEW"'
    assert facts["SEQUENCE public.s"] == SequenceDefinition('"public"."s"', 1, 5, False, "")
    assert facts["SEQUENCE public.sd"] == SequenceDefinition('"public"."sd"', 900, -3, False, "")
    assert facts["SEQUENCE public.u_id_seq"] == SequenceDefinition('"public"."u_id_seq"', 1, 1, True, "")
    assert facts["SEQUENCE public.uid_i_seq"] == SequenceDefinition(
        '"public"."uid_i_seq"', 1, 1, None, '"public"."uid"'
    )
    position = facts["SEQUENCE SET public.sd"]
    assert isinstance(position, SequencePosition)
    assert (position.relation, position.value, position.called) == ('"public"."sd"', 900, True)
    assert isinstance(facts["SEQUENCE SET public.snew"], SequencePosition)


def test_identity_sequence_with_a_persistence_of_its_own() -> None:
    definition = find(index_of([DUMP]), "SEQUENCE public.lg_i_seq").fact
    assert definition == SequenceDefinition('"public"."lg_i_seq"', 5, 7, True, '"public"."lg"')


@both_versions
def test_the_stored_index_is_the_same_index(dump: bytes) -> None:
    index = index_of([dump])
    assert DumpIndex.from_json(index.to_json(), "i") == index


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 1}', "not json"])
def test_a_damaged_index_is_refused(text: str) -> None:
    with pytest.raises(PitrError, match="some-file is damaged"):
        DumpIndex.from_json(text, "some-file")


def test_an_index_of_another_format_is_refused() -> None:
    text = index_of([DUMP]).to_json().replace('"format": 1', '"format": 2')
    with pytest.raises(PitrError, match="format 2, not 1"):
        DumpIndex.from_json(text, "i")


@given(cuts=st.lists(st.integers(0, len(DUMP)), max_size=60))
@settings(max_examples=150, deadline=None)
def test_the_index_does_not_depend_on_where_the_stream_is_cut(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(DUMP)]
    assert index_of(DUMP[a:b] for a, b in zip(edges, edges[1:])) == index_of([DUMP])


@both_versions
@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 64, 4096])
def test_the_index_does_not_depend_on_the_size_of_the_pieces(dump: bytes, size: int) -> None:
    assert index_of(dump[at : at + size] for at in range(0, len(dump), size)) == index_of([dump])


# Rows as COPY writes them: a backslash is doubled, a line feed is \n, NULL is \N.
cells = st.one_of(
    st.just(b"\\N"), st.sampled_from([b"", b"\\\\.", b"\\\\N", b"\\n\\\\.\\n", b"--", b"COPY x FROM stdin;"])
)
rows = st.lists(st.lists(cells, min_size=1, max_size=3).map(b"\t".join), max_size=8)


@given(rows=rows, cuts=st.lists(st.integers(0, 400), max_size=8))
@settings(max_examples=200, deadline=None)
@example(rows=[], cuts=[])
@example(rows=[b""], cuts=[])
@example(rows=[b"", b"", b"\\\\."], cuts=[])
def test_rows_end_where_copy_says(rows: list[bytes], cuts: list[int]) -> None:
    copy = b'COPY "s"."t" ("a") FROM stdin;\n' + b"".join(row + b"\n" for row in rows) + b"\\.\n"
    dump = with_body(toc("t", "TABLE DATA", copy) + toc("i", "INDEX", b'CREATE INDEX "i" ON "s"."t" ("a");'))
    edges = [0, *sorted(min(cut, len(dump)) for cut in cuts), len(dump)]
    index = index_of(dump[a:b] for a, b in zip(edges, edges[1:]))
    data = find(index, "TABLE DATA s.t")
    assert isinstance(data.fact, TableRows) and data.fact.rows == len(rows)
    assert find(index, "INDEX s.i").lines == 7


def is_in_noise(dump: bytes, position: int) -> bool:
    start = dump.rfind(b"\n", 0, position) + 1
    line = dump[start : dump.index(b"\n", start) + 1]
    return line != b"\n" and is_noise(line)


@given(position=st.integers(0, len(DUMP) - 1), value=st.integers(0, 255))
@settings(max_examples=400, deadline=None)
def test_any_changed_byte_changes_the_fingerprint(position: int, value: int) -> None:
    assume(DUMP[position] != value and not is_in_noise(DUMP, position))
    changed = DUMP[:position] + bytes([value]) + DUMP[position + 1 :]
    try:
        fingerprint = index_of([changed]).fingerprint
    except PitrError:
        return
    assert fingerprint != index_of([DUMP]).fingerprint


@given(position=st.integers(0, DUMP.index(COMPLETE) + len(COMPLETE) - 1))
@settings(max_examples=200, deadline=None)
def test_a_dump_that_was_cut_off_is_refused(position: int) -> None:
    with pytest.raises(PitrError, match="not complete"):
        index_of([DUMP[:position]])


def test_more_statements_behind_the_closing_words_are_refused() -> None:
    with pytest.raises(PitrError, match="not complete"):
        index_of([DUMP + b'CREATE ROLE "x";\n'])


def test_restrict_keys_and_minor_releases_do_not_count() -> None:
    other = DUMP.replace(b"\\restrict 0\n", b"\\restrict kEy\n").replace(b"\\unrestrict 0\n", b"\\unrestrict kEy\n")
    older = DUMP.replace(b"\\restrict 0\n\n", b"").replace(b"\\restrict 0\n", b"").replace(b"\\unrestrict 0\n", b"")
    minor = DUMP.replace(b"version 18.6", b"version 18.7")
    assert len({DUMP, other, older, minor}) == 4
    assert len({index_of([dump]).fingerprint for dump in (DUMP, other, older, minor)}) == 1


def test_where_a_dump_was_taken_does_not_count() -> None:
    elsewhere = DUMP.replace(b'-- META "in_recovery" false', b'-- META "in_recovery" true')
    index = index_of([elsewhere])
    assert index.in_recovery
    assert index.fingerprint == index_of([DUMP]).fingerprint


@pytest.mark.parametrize(
    "literal",
    [
        b"'it''s'",
        b"E'it\\'s;\n--\n'",
        b"E'\\\\'",
        b"E'a''\\';\n--\n'",
        b"'back\\'",
        b"';\n--\n-- Name: fake; Type: TABLE; Schema: s; Owner: o\n--\n;\n'",
        b"$$;\n--\n-- Name: fake; Type: TABLE; Schema: s; Owner: o\n--\n'$$",
        b"$_X$ $$ ' $_$ ;\n--\n-- Name: fake; Type: T; Schema: s; Owner: o\n--\n$_X$",
        b'"odd;\n--\n-- Name: fake; Type: T; Schema: s; Owner: o\n--\n"""',
        b"\"a$$b\" a$b$c $1 'x'",
        b'\';\nCOPY "s"."t" ("a") FROM stdin;\n1\n\'',
        b"U&'\\0041' B'1' X'ff'",
    ],
)
def test_quotes_are_followed(literal: bytes) -> None:
    body = toc("f", "FUNCTION", b"SELECT " + literal + b";") + toc("v", "VIEW", b'CREATE VIEW "v";')
    assert labels(with_body(body)) == ["FUNCTION s.f", "VIEW s.v"]


def test_without_standard_conforming_strings_a_backslash_escapes() -> None:
    body = toc("f", "FUNCTION", b"SELECT 'a\\';\n--\n-- Name: fake; Type: T; Schema: s; Owner: o\n--\n';")
    assert labels(with_body(b"SET standard_conforming_strings = off;\n\n" + body)) == ["FUNCTION s.f"]


def test_body_in_standard_sql_is_one_object() -> None:
    body = b"CREATE FUNCTION f() BEGIN ATOMIC\n SELECT 1;\n SELECT 2;\nEND;\n\n\nALTER FUNCTION f() OWNER TO o;"
    assert labels(with_body(toc("f()", "FUNCTION", body))) == ["FUNCTION s.f()"]


def test_grants_of_another_grantor_stay_in_their_object() -> None:
    body = b'GRANT 1;\nSET SESSION AUTHORIZATION "joe";\nGRANT 2;\nRESET SESSION AUTHORIZATION;'
    assert labels(with_body(toc("t", "ACL", body))) == ["ACL s.t"]


def test_tablespaces_are_set_between_objects() -> None:
    index = index_of([DUMP])
    frames = [DUMP[item.offset : item.offset + item.size] for item in index.objects if item.type == FRAME]
    assert b'SET default_tablespace = "ts";\n\n' in frames


def test_very_long_lines_are_not_copied_again_and_again() -> None:
    line = b'COMMENT ON TABLE "t" IS \'' + b"x" * 20_000_000 + b"';"
    dump = with_body(toc("t", "COMMENT", line))
    indexer = Indexer()
    for at in range(0, len(dump), 65536):
        indexer.feed(dump[at : at + 65536])
    assert find(indexer.finish(), "COMMENT s.t").size > 20_000_000


@pytest.mark.parametrize(
    ("statement", "label"),
    [
        (b'CREATE ROLE "a ""b""";\n', ("ROLE", 'a "b"')),
        (b"ALTER ROLE \"a\" WITH LOGIN PASSWORD 'x';\n", ("ROLE ATTRIBUTES", "a")),
        (b'ALTER ROLE "a" SET "work_mem" TO \'1MB\';\n', ("ROLE SETTING", "a work_mem")),
        (b"COMMENT ON ROLE \"a\" IS 'secret';\n", ("COMMENT ON ROLE", "a")),
        (b'GRANT "a" TO "b" GRANTED BY "c";\n', ("GRANT", '"a" TO "b" GRANTED BY "c"')),
        (b'CREATE TABLESPACE "t" OWNER "o" LOCATION \'/x\';\n', ("CREATE TABLESPACE", "t")),
        (b"SELECT something('x');\n", ("STATEMENT", "SELECT something('x');")),
    ],
)
def test_statements_are_known_by_what_they_are_about(statement: bytes, label: tuple[str, str]) -> None:
    assert statement_label(statement) == label
