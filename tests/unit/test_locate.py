# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Where a target is looked for, and which of several records is the one that PostgreSQL stops at."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils.catalog import Backup
from ansible_collections.pgdrill.pitr.plugins.module_utils.index import ArchiveIndex
from ansible_collections.pgdrill.pitr.plugins.module_utils.locate import Found, Locator, full_xid
from ansible_collections.pgdrill.pitr.plugins.module_utils.target import RecoveryTarget
from ansible_collections.pgdrill.pitr.plugins.module_utils.wal import Lsn
from ansible_collections.pgdrill.pitr.plugins.module_utils.waldump import Record, WalScanner, _records
from ansible_collections.pgdrill.pitr.tests.unit.support import MIB, make_backup

Content = list[tuple[float, str, int, str]]


class Table(WalScanner):
    """An archive of timeline 1 with these records: (position in segments, resource manager, xid, description)."""

    def __init__(self, content: Content, numbers: list[int]) -> None:
        index = ArchiveIndex(MIB)
        for number in numbers:
            index.add(1, number)
        nothing: Any = None
        super().__init__(nothing, nothing, index, "/bin")
        self.index = index
        self._content = content
        self.read: list[int] = []

    def _run(self, timeline: int, first: int, until: int, rmgrs: tuple[str, ...], local: str = "") -> Iterator[Record]:
        self.read += range(first, until + 1)
        for place, rmgr, xid, text in self._content:
            if first <= place < until + 1 and rmgr in rmgrs:
                yield Record(rmgr, xid, Lsn(int(place * MIB)), timeline, text)


def backup(label: str, start: float, stop: float, next_xid: int | None = None) -> Backup:
    made = make_backup(label, start=int(start * MIB), stop=int(stop * MIB), minute=stop)
    return dataclasses.replace(made, next_xid=next_xid)


def commit(place: float, xid: int, more: str = "") -> tuple[float, str, int, str]:
    return place, "Transaction", xid, f"COMMIT 2026-03-01 12:00:00 UTC{more}"


def point(place: float, name: str) -> tuple[float, str, int, str]:
    return place, "XLOG", 0, f"RESTORE_POINT {name}"


def find(table: Table, backups: list[Backup], **target: str) -> Found:
    asked = RecoveryTarget.from_options({f"recovery_target_{kind}": value for kind, value in target.items()})
    return Locator(table, table.index, 1, backups).find(asked)


ALL = list(range(2, 40))


def test_search_begins_behind_the_newest_backup_that_ended_before_the_transaction() -> None:
    table = Table([commit(25.5, 750)], ALL)
    backups = [backup("a", 2.1, 2.5, 700), backup("b", 20.1, 20.5, 740), backup("c", 30.1, 30.5, 760)]
    found = find(table, backups, xid="750")
    assert found.location is not None and found.location.lsn == int(25.5 * MIB)
    assert min(table.read) == 20, "what is older cannot hold it"


def test_transaction_that_lasted_longer_than_a_backup_is_found_behind_it() -> None:
    backups = [backup("a", 2.1, 2.5, 700), backup("c", 30.1, 30.5, 760)]
    found = find(Table([commit(35.5, 750)], ALL), backups, xid="750")
    assert found.location is not None and found.location.lsn == int(35.5 * MIB)


def test_transaction_behind_a_hole_is_found_from_the_backup_behind_it() -> None:
    numbers = [number for number in ALL if number != 28]
    backups = [backup("a", 2.1, 2.5, 700), backup("c", 30.1, 30.5, 760)]
    found = find(Table([commit(35.5, 750)], numbers), backups, xid="750")
    assert found.location is not None and found.location.lsn == int(35.5 * MIB)


def test_backups_that_do_not_tell_their_next_transaction_are_searched_all() -> None:
    table = Table([commit(3.5, 750)], ALL)
    found = find(table, [backup("a", 2.1, 2.5), backup("b", 20.1, 20.5)], xid="750")
    assert found.location is not None and found.location.lsn == int(3.5 * MIB)


@pytest.mark.parametrize("asked", [2**32 + 750, 750])
def test_transaction_is_looked_for_in_its_turn_of_the_counter(asked: int) -> None:
    backups = [backup("a", 2.1, 2.5, 2**32 + 700)]
    found = find(Table([commit(5.5, 750)], ALL), backups, xid=str(asked))
    assert found.location is not None
    other = find(Table([commit(5.5, 750)], ALL), backups, xid=str(2 * 2**32 + 750))
    assert other.location is None and str(2**32 + 750) in other.nearby


@pytest.mark.parametrize(
    ("xid", "near", "full"),
    [
        (5, 2**32 - 3, 2**32 + 5),
        (2**32 - 3, 2**32 + 5, 2**32 - 3),
        (745, 740, 745),
        (740, 745, 740),
        (745, 3 * 2**32 + 740, 3 * 2**32 + 745),
        (2**32 - 1, 5, 2**32 - 1),
    ],
)
def test_whole_id_is_the_nearest_one(xid: int, near: int, full: int) -> None:
    assert full_xid(xid, near) == full


def test_subtransaction_is_told_with_its_parent() -> None:
    found = find(Table([commit(5.5, 750, "; subxacts: 751 752")], ALL), [backup("a", 2.1, 2.5)], xid="752")
    assert found.location is None and "752 is a subtransaction of 750" in found.nearby


def test_restore_point_of_while_the_newest_backup_was_taken_needs_an_older_one() -> None:
    """From the older backup the first of that name comes earlier, and that is where PostgreSQL stops."""
    backups = [backup("a", 2.1, 2.5), backup("b", 20.1, 22.5)]
    late = find(Table([point(21.5, "x")], ALL), backups, name="x")
    assert late.location is not None and late.location.lsn == int(21.5 * MIB)
    both = find(Table([point(5.5, "x"), point(21.5, "x")], ALL), backups, name="x")
    assert both.location is not None and both.location.lsn == int(5.5 * MIB)


def test_newest_backup_with_the_restore_point_behind_it_decides() -> None:
    backups = [backup("a", 2.1, 2.5), backup("b", 20.1, 20.5)]
    found = find(Table([point(5.5, "x"), point(25.5, "x"), point(27.5, "x")], ALL), backups, name="x")
    assert found.location is not None and found.location.lsn == int(25.5 * MIB)
    assert any(str(Lsn(int(27.5 * MIB))) in note for note in found.notes)


def test_nearly_right_names_are_told_first() -> None:
    content = [point(5.5 + number, f"deploy {number}") for number in range(10)] + [point(16.5, "before the release")]
    found = find(Table(content, ALL), [backup("a", 2.1, 2.5)], name="before the relase")
    assert found.location is None and "'before the release'" in found.nearby
    assert "deploy 9" in find(Table(content, ALL), [backup("a", 2.1, 2.5)], name="zzz").nearby
    assert "no restore point at all" in find(Table([], ALL), [backup("a", 2.1, 2.5)], name="zzz").nearby


def line(description: bytes, lsn: int = 0x3000060) -> bytes:
    return (
        b"rmgr: XLOG        len (rec/tot):     98/    98, tx:          0, lsn: %X/%08X, prev 0/03000028, desc: %s\n"
        % (lsn >> 32, lsn & 0xFFFFFFFF, description)
    )


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("two\nlines", b"two\nlines"),
        ("a\n\nb", b"a\n\nb"),
        (" spaces at both ends ", b" spaces at both ends "),
        ("é \u20ac", "é \u20ac".encode()),
        ("RESTORE_POINT x", b"RESTORE_POINT x"),
    ],
)
def test_name_is_taken_byte_for_byte(name: str, shown: bytes) -> None:
    output = (line(b"RESTORE_POINT " + shown, 0x3000060) + line(b"NEXTOID 5", 0x3000100)).splitlines(keepends=True)
    first, second = _records(output, 1)
    assert first.restore_point == name and second.restore_point is None


def test_name_in_another_encoding_is_not_taken_for_one_with_replacements() -> None:
    (record,) = _records([line(b"RESTORE_POINT caf\xe9")], 1)
    assert record.restore_point not in ("caf\ufffd", "café", "caf")
