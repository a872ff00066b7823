# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Positions, names and headers of WAL, against what PostgreSQL's own macros say."""

from __future__ import annotations

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.plugins.module_utils.wal import (
    Lsn,
    SegmentHeader,
    WalFile,
    history_name,
    segment_name,
    valid_segment_size,
)
from ansible_collections.pgdrill.pitr.tests.unit.support import MIB, SYSTEM, header, wal_name
from hypothesis import given
from hypothesis import strategies as st

SIZES = [MIB << shift for shift in range(11)]
sizes = st.sampled_from(SIZES)
timelines = st.integers(1, 2**32 - 1)


@st.composite
def positions(draw: st.DrawFn) -> tuple[int, int]:
    """(segment size, segment number); every number that fits a 64-bit LSN."""
    size = draw(sizes)
    return size, draw(st.integers(0, 2**64 // size - 1))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0/0", 0),
        ("0/3000060", 0x3000060),
        ("16/B374D848", 0x16B374D848),
        ("FFFFFFFF/FFFFFFFF", 2**64 - 1),
        ("00000001/00000002", (1 << 32) + 2),
        ("0/abcdef", 0xABCDEF),
        (" 0/10\n", 16),
    ],
)
def test_lsn_text_is_read(text: str, value: int) -> None:
    assert Lsn.parse(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/",
        "0",
        "0/",
        "/0",
        "0/G",
        "0/123456789",
        "123456789/0",
        "0-0",
        "0/0/0",
        "-1/0",
        "0/ 1",
        "0x1/2",
        "0/1 extra",
    ],
)
def test_malformed_lsn_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(PitrError, match=r"is not an LSN\. Expected .*0/3000060"):
        Lsn.parse(text)


def test_lsn_that_is_no_text_is_refused() -> None:
    with pytest.raises(PitrError, match="is not an LSN"):
        Lsn.parse(50331744)  # type: ignore[arg-type]


@given(st.integers(0, 2**64 - 1))
def test_lsn_round_trips_as_text(value: int) -> None:
    text = str(Lsn(value))
    assert Lsn.parse(text) == value
    high, _slash, low = text.partition("/")
    assert text == text.upper()
    assert (int(high, 16), int(low, 16)) == divmod(value, 2**32)
    assert repr(Lsn(value)) == f"Lsn({text})"


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_lsns_order_by_position_not_by_text(left: int, right: int) -> None:
    assert (Lsn(left) < Lsn(right)) == (left < right)


def test_lsn_nine_is_before_ten_although_its_text_is_not() -> None:
    assert Lsn.parse("9/0") < Lsn.parse("10/0")


@given(positions(), st.data())
def test_segment_of_a_position_holds_it(position: tuple[int, int], data: st.DataObject) -> None:
    size, number = position
    offset = data.draw(st.integers(0, size - 1))
    assert Lsn(number * size + offset).segment_number(size) == number


@pytest.mark.parametrize("size", SIZES)
def test_end_pointer_on_a_border_belongs_to_the_segment_before(size: int) -> None:
    assert Lsn(5 * size).segment_number(size) == 5
    assert Lsn(5 * size).previous_segment_number(size) == 4
    assert Lsn(5 * size + 1).previous_segment_number(size) == 5
    assert Lsn(5 * size - 1).previous_segment_number(size) == 4


@pytest.mark.parametrize(
    ("size", "number", "name"),
    [
        (16 * MIB, 1, "000000010000000000000001"),
        (16 * MIB, 255, "0000000100000000000000FF"),
        (16 * MIB, 256, "000000010000000100000000"),
        (1024 * MIB, 3, "000000010000000000000003"),
        (1024 * MIB, 4, "000000010000000100000000"),
        (MIB, 0xFFF, "000000010000000000000FFF"),
        (MIB, 0x1000, "000000010000000100000000"),
    ],
)
def test_segment_names_are_those_of_the_server(size: int, number: int, name: str) -> None:
    assert segment_name(1, number, size) == name
    assert WalFile.parse(name).number(size) == number


@given(positions(), timelines)
def test_segment_name_round_trips_for_every_segment_size(position: tuple[int, int], timeline: int) -> None:
    size, number = position
    name = segment_name(timeline, number, size)
    assert name == wal_name(timeline, number, size)
    wal_file = WalFile.parse(name)
    assert (wal_file.kind, wal_file.name, wal_file.timeline) == ("segment", name, timeline)
    assert wal_file.number(size) == number
    assert wal_file.segment == name and wal_file.log == name[:16]


@given(sizes, timelines, st.data())
def test_segment_names_of_a_timeline_sort_like_their_numbers(size: int, timeline: int, data: st.DataObject) -> None:
    numbers = st.integers(0, 2**64 // size - 1)
    left, right = data.draw(numbers), data.draw(numbers)
    assert (segment_name(timeline, left, size) < segment_name(timeline, right, size)) == (left < right)


@given(st.integers(0, 2**31))
def test_only_powers_of_two_from_1_mb_to_1_gb_are_segment_sizes(size: int) -> None:
    assert valid_segment_size(size) == (size in SIZES)


def test_all_segment_sizes_of_initdb_are_valid() -> None:
    assert all(valid_segment_size(size) for size in SIZES)
    assert not valid_segment_size(SIZES[0] // 2) and not valid_segment_size(SIZES[-1] * 2)


def test_names_of_the_archiver_are_told_apart() -> None:
    name = "00000002000000A1000000FF"
    partial = WalFile.parse(f"{name}.partial")
    assert (partial.kind, partial.timeline, partial.segment, partial.log) == ("partial", 2, name, name[:16])
    backup = WalFile.parse(f"{name}.00000028.backup")
    assert (backup.kind, backup.timeline, backup.segment, backup.log) == ("backup", 2, name, name[:16])
    assert backup.number(16 * MIB) == 0xA1 * 256 + 0xFF
    past = WalFile.parse("0000000A.history")
    assert (past.kind, past.timeline, past.segment, past.log) == ("history", 10, "", "")
    assert history_name(10) == "0000000A.history"


@pytest.mark.parametrize(
    "name",
    [
        "",
        "00000001000000000000000",
        "0000000100000000000000011",
        "00000001000000000000000g",
        "0000000a0000000000000001",
        "000000010000000000000001\n",
        " 000000010000000000000001",
        "pg_wal/000000010000000000000001",
        "../000000010000000000000001",
        "000000010000000000000001.gz",
        "000000010000000000000001.partial.partial",
        "000000010000000000000001.28.backup",
        ".history",
        "1.history",
        "0000000A.history.tmp",
        "RECOVERYXLOG",
        "archive_status",
        "..",
    ],
)
def test_name_that_no_server_archives_is_refused(name: str) -> None:
    with pytest.raises(PitrError, match="is not the name of"):
        WalFile.parse(name)


def test_segment_number_that_does_not_fit_the_segment_size_is_refused() -> None:
    wal_file = WalFile.parse("000000010000000000000100")
    assert wal_file.number(MIB) == 256
    with pytest.raises(PitrError, match="cannot be a segment of a cluster with 16777216 byte segments"):
        wal_file.number(16 * MIB)


@given(positions(), timelines, st.integers(0, 2**64 - 1), st.sampled_from([0xD110, 0xD113, 0xD116, 0xD118]))
def test_header_tells_what_the_server_wrote(position: tuple[int, int], timeline: int, system: int, magic: int) -> None:
    size, number = position
    found = SegmentHeader(header(timeline, number * size, system, size, magic) + b"more")
    assert found.timeline == timeline
    assert found.page_address == number * size and isinstance(found.page_address, Lsn)
    assert found.system_identifier == str(system)
    assert (found.segment_size, found.block_size, found.magic) == (size, 8192, magic)


def test_header_has_40_bytes() -> None:
    assert SegmentHeader.SIZE == len(header()) == 40


@pytest.mark.parametrize("length", [0, 1, 24, 39])
def test_header_that_is_cut_is_refused(length: int) -> None:
    with pytest.raises(PitrError, match=f"only {length} bytes"):
        SegmentHeader(header()[:length])


@pytest.mark.parametrize(
    "data",
    [
        bytes(40),
        header(info=0),
        header(info=0x0001),
        header(magic=0x5353),
        header(size=0),
        header(size=3 * MIB),
        header(size=2048 * MIB),
        b"SELECT pg_catalog.set_config('search_path', '', false);",
    ],
    ids=["zeros", "short-header", "continuation", "magic", "size-0", "size-3MB", "size-2GB", "text"],
)
def test_bytes_that_begin_no_segment_are_refused(data: bytes) -> None:
    with pytest.raises(PitrError, match="is not the beginning of a WAL segment"):
        SegmentHeader(data)


def test_header_with_info_bits_beside_the_long_one_is_read() -> None:
    assert SegmentHeader(header(info=0x0007)).system_identifier == str(SYSTEM)
