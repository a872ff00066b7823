# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The lines that differ: found in step, cut to what fits, and without passwords."""

from __future__ import annotations

import io
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils import dumpshow
from ansible_collections.pgdrill.pitr.plugins.module_utils.dumpdiff import compare
from ansible_collections.pgdrill.pitr.plugins.module_utils.dumpindex import CLUSTER, DumpObject
from ansible_collections.pgdrill.pitr.plugins.module_utils.dumpparse import index_of
from ansible_collections.pgdrill.pitr.plugins.module_utils.dumpshow import (
    Difference,
    first_difference,
    illustrate,
    show,
)
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from hypothesis import given, settings
from hypothesis import strategies as st

TRUTH = (Path(__file__).parent / "fixtures" / "cluster-dump-18.sql").read_bytes()


def opener(dump: bytes) -> AbstractContextManager[io.BytesIO]:
    return nullcontext(io.BytesIO(dump))


def illustrated(restored: bytes, truth: bytes = TRUTH, limit: int = 20) -> list[Difference]:
    comparison = compare(index_of([truth]), index_of([restored]))
    return illustrate(comparison.findings, lambda: opener(truth), lambda: opener(restored), limit)


def line_number(dump: bytes, text: bytes) -> int:
    return dump.count(b"\n", 0, dump.index(text)) + 1


def item(kind: str, database: str = "d") -> DumpObject:
    return DumpObject(database, kind, "s", "n", "", 1, 1, 0, 1, None)


def test_a_changed_row_is_shown_with_its_lines() -> None:
    restored = TRUTH.replace(b"2\ttab\\there", b"2\ttab\\tHere")
    (difference,) = illustrated(restored)
    assert (difference.database, difference.object, difference.kind) == ("d1", "TABLE DATA public.t", "changed")
    assert difference.line == difference.restored_line == line_number(TRUTH, b"2\ttab")
    assert difference.object_line == 7, "five lines of comment and COPY, one row"
    assert (difference.truth, difference.restored) == ("2\ttab\\there\\nnl", "2\ttab\\tHere\\nnl")


def test_lines_are_counted_in_each_dump() -> None:
    restored = TRUTH.replace(b'-- ROLE SETTING "ALL geqo" "off"\n', b"").replace(b"2\ttab", b"2\tTAB")
    gone, row = illustrated(restored)
    assert gone.line == line_number(TRUTH, b"-- ROLE SETTING") and gone.restored_line is None
    assert gone.truth == '-- ROLE SETTING "ALL geqo" "off"' and gone.restored == ""
    assert row.line is not None and row.restored_line == row.line - 1 == line_number(restored, b"2\tTAB")


def test_a_row_at_the_end_is_shown_against_the_end() -> None:
    (difference,) = illustrated(TRUTH.replace(b"6\tx\\n\\\\.\\ny\n", b""))
    assert (difference.truth, difference.restored) == ("6\tx\\n\\\\.\\ny", "\\.")


def test_missing_and_extra_objects_are_shown_by_their_statement() -> None:
    start = TRUTH.index(b"--\n-- Name: t_v_idx; Type: INDEX")
    restored = TRUTH[:start] + TRUTH[TRUTH.index(b"--\n-- Name: ", start + 1) :]
    statement = 'CREATE INDEX "t_v_idx" ON "public"."t" USING "btree" ("v");'
    (missing,) = illustrated(restored)
    assert (missing.kind, missing.truth, missing.restored) == ("missing", statement, "")
    assert missing.line == line_number(TRUTH, b"CREATE INDEX") and missing.restored_line is None
    (extra,) = illustrated(TRUTH, truth=restored)
    assert (extra.kind, extra.truth, extra.restored) == ("extra", "", statement)
    assert extra.restored_line == line_number(TRUTH, b"CREATE INDEX") and extra.line is None


def test_a_whole_database_has_no_text() -> None:
    start = TRUTH.index(b'--\n-- Database "d1" dump\n')
    restored = TRUTH[:start] + TRUTH[TRUTH.index(b'--\n-- Database "postgres" dump\n') :]
    (missing,) = illustrated(restored)
    assert (missing.object, missing.truth, missing.line) == (
        "DATABASE d1",
        "",
        line_number(TRUTH, b'-- Database "d1"') - 1,
    )


def test_a_password_is_shown_to_differ_and_nothing_more() -> None:
    (difference,) = illustrated(TRUTH.replace(b"c2VydmVy", b"b3RoZXI="))
    assert difference.object == "ROLE ATTRIBUTES app"
    assert difference.truth.endswith("NOBYPASSRLS PASSWORD '(redacted)';")
    assert difference.restored.endswith("NOBYPASSRLS PASSWORD '(redacted, differs)';")
    assert "SCRAM" not in str(difference)


def test_the_text_between_objects_is_shown_without_its_noise() -> None:
    truth = TRUTH.replace(b"Dumped from database version 18.6", b"Dumped from database version 18.5")
    restored = TRUTH.replace(
        b'\\connect "d1"\n\\restrict 0\n\nSET statement_timeout = 0', b'\\connect "d1"\n\nSET statement_timeout = 1'
    )
    differences = illustrated(restored, truth)
    assert [difference.object for difference in differences] == ['text before COMMENT DATABASE "d1"']
    assert differences[0].truth == "SET statement_timeout = 0;"
    assert differences[0].restored == "SET statement_timeout = 1;"
    assert differences[0].line == line_number(truth, b'\\connect "d1"\n') + 3
    assert differences[0].restored_line == line_number(restored, b'\\connect "d1"\n') + 2


def test_no_more_than_the_limit_is_shown() -> None:
    restored = TRUTH.replace(b"2\ttab", b"2\tTAB").replace(b"1\tk\n", b"1\tl\n").replace(b"'8MB", b"'7MB")
    assert len(illustrated(restored)) == 3
    assert len(illustrated(restored, limit=2)) == 2
    assert illustrated(restored, limit=0) == []


def test_order_is_shown_by_what_comes() -> None:
    rules = [line for line in TRUTH.split(b"\n") if line.startswith(b"-- HBA RULE")]
    (difference,) = illustrated(TRUTH.replace(b"\n".join(rules[:2]), b"\n".join(rules[1::-1])))
    assert difference.kind == "order" and difference.line == difference.restored_line
    assert difference.truth == "here comes HBA RULE local all all trust"
    assert difference.restored == "here comes HBA RULE host all all 127.0.0.1 trust"


def test_a_dump_that_was_changed_afterwards_is_refused() -> None:
    restored = TRUTH.replace(b"2\ttab", b"2\tTAB")
    comparison = compare(index_of([TRUTH]), index_of([restored]))
    with pytest.raises(PitrError, match="do not differ in TABLE DATA"):
        illustrate(comparison.findings, lambda: opener(TRUTH), lambda: opener(TRUTH), 20)
    with pytest.raises(PitrError, match="shorter than its index"):
        illustrate(comparison.findings, lambda: opener(TRUTH), lambda: opener(restored[:9000]), 20)


# --- first_difference ------------------------------------------------------------------------------------------------

texts = st.lists(st.sampled_from([b"a", b"b", b"\n", b"\n\n", b"abc" * 5]), max_size=30).map(b"".join)


@given(left=texts, right=texts, size=st.integers(1, 40))
@settings(max_examples=400, deadline=None)
def test_the_first_difference_is_the_one_of_a_simple_reader(left: bytes, right: bytes, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dumpshow, "_CHUNK", size)
        found = first_difference(io.BytesIO(left), io.BytesIO(right))
    ours, theirs = left.split(b"\n"), right.split(b"\n")
    if left == right:
        assert found is None
        return
    number = next(
        (n for n, pair in enumerate(zip(ours, theirs)) if pair[0] != pair[1]), min(len(ours), len(theirs)) - 1
    )
    assert found is not None
    if ours[number] == theirs[number]:  # one text ends here, the other goes on with a line feed
        assert found[0] == number and found[2] == found[3]
    else:
        assert found == (number, 0, ours[number], theirs[number])


class Endless:
    """Many equal bytes and then a few; remembers the largest piece that was asked for."""

    def __init__(self, size: int, end: bytes) -> None:
        self.left, self.end, self.largest = size, end, 0

    def read(self, size: int) -> bytes:
        self.largest = max(self.largest, size)
        count = min(size, self.left)
        self.left -= count
        if count < size and self.end:
            end, self.end = self.end[: size - count], self.end[size - count :]
            return b"x" * count + end
        return b"x" * count


def test_a_very_long_line_is_read_in_pieces() -> None:
    left, right = Endless(50_000_000, b"A\n"), Endless(50_000_000, b"B\n")
    found = first_difference(left, right)
    assert found is not None
    number, before, line, other = found
    assert (number, len(line), len(other)) == (0, 4097, 4097)
    assert before == 50_000_001 - 4097
    assert max(left.largest, right.largest) <= 1024 * 1024


# --- what may be shown -----------------------------------------------------------------------------------------------


def test_long_lines_are_cut_around_the_difference() -> None:
    line = b"a" * 1000 + b"B" + b"c" * 1000
    truth, restored = show(item("TABLE DATA"), line, line.replace(b"B", b"D"))
    assert truth == "…" + "a" * 100 + "B" + "c" * 99 + "…"
    assert restored == truth.replace("B", "D")
    assert show(item("TABLE DATA"), b"x" * 200, b"y") == ("x" * 200, "y")
    assert show(item("TABLE DATA"), b"x" * 201, b"y")[0] == "x" * 200 + "…"


def test_bytes_of_another_encoding_stay_distinguishable() -> None:
    assert show(item("TABLE DATA"), b"caf\xe9", "café".encode()) == ("caf\\xe9", "café")


@pytest.mark.parametrize(
    "line",
    [
        b"ALTER ROLE \"a\" WITH LOGIN PASSWORD 'geh''eim' VALID UNTIL 'infinity';",
        b'ALTER ROLE "a" WITH LOGIN password \'geheim',
        b"-- Name: f\n SELECT dblink('host=a password=geheim user=b')",
        b" SELECT dblink('host=a password=''geheim'' user=b')",
        b'CREATE VIEW "v" AS SELECT 1 AS "password" \'geheim\'',
        b"passwd: geheim",
        b"PASSWORD   'geheim'",
    ],
)
def test_passwords_are_redacted(line: bytes) -> None:
    truth, restored = show(item("FUNCTION"), line, line.replace(b"geh", b"gehx"))
    assert "geh" not in truth + restored and "eim" not in truth + restored
    assert "(redacted)" in truth and "(redacted, differs)" in restored


def test_a_difference_beside_a_password_is_shown() -> None:
    line = b"ALTER ROLE \"a\" WITH LOGIN PASSWORD 'geheim';"
    truth, restored = show(item("ROLE ATTRIBUTES", CLUSTER), line, line.replace(b"LOGIN", b"NOLOGIN"))
    assert truth == "ALTER ROLE \"a\" WITH LOGIN PASSWORD '(redacted)';"
    assert restored == "ALTER ROLE \"a\" WITH NOLOGIN PASSWORD '(redacted)';"


def test_words_that_are_no_passwords_are_shown() -> None:
    line = b'    "password" "text" NOT NULL, -- passwords'
    assert show(item("TABLE"), line, line + b"x")[0] == line.decode()


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("USER MAPPING", b"    \"user\" 'geheim'"),
        ("SUBSCRIPTION", b"CREATE SUBSCRIPTION s CONNECTION 'geheim'"),
        ("SERVER", b"    geheim'"),
        ("FOREIGN DATA WRAPPER", b"geheim"),
        ("SETTING", b'-- SETTING "ssl_passphrase_command" "geheim"'),
        ("SETTING", b'-- SETTING "my.token" "geheim"'),
        ("ROLE SETTING", b'ALTER ROLE "a" SET "app.jwt_secret" TO \'geheim\';'),
        ("DATABASE PROPERTIES", b'ALTER DATABASE "a" SET "app.api_key" TO \'geheim\';'),
        ("HBA RULE", b'-- HBA RULE "x" {"options": ["ldapbindpasswd=geheim geheim"]}'),
        ("HBA RULE", b'-- HBA RULE "x" {"options": ["radiussecrets=geheim"]}'),
    ],
)
def test_what_may_hold_credentials_is_not_shown(kind: str, line: bytes) -> None:
    for pair in ((line, b""), (b"", line), (line, line + b"x")):
        assert "geheim" not in "".join(show(item(kind, CLUSTER), *pair))


def test_the_middle_of_a_long_statement_is_not_shown_but_the_middle_of_a_row_is() -> None:
    assert "geheim" not in "".join(show(item("FUNCTION"), b"geheim", b"geheim2", before=10))
    assert show(item("TABLE DATA"), b"one", b"two", before=10) == ("…one", "…two")


def test_the_middle_of_a_long_line_says_that_it_is() -> None:
    changed_item = replace(item("VIEW"), size=9)
    assert "bytes into a long line" in show(changed_item, b"a", b"b", before=5000)[0]
