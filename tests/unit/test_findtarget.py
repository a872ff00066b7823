# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a transaction did, told from lines that pg_waldump of each major version has written.

``fixtures/waldump-<major>.txt`` were recorded from servers that ran the same statements; a line ``# name`` begins each
incident. Records of no interest were left out, and invalidation messages cut short.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils import findtarget
from ansible_collections.pgdrill.pitr.plugins.module_utils.findtarget import (
    Ended,
    Ledger,
    RelFile,
    is_wanted,
    judge,
    parse_path,
    precedes,
)
from ansible_collections.pgdrill.pitr.plugins.module_utils.wal import Lsn
from ansible_collections.pgdrill.pitr.plugins.module_utils.waldump import Record, _parse

FIXTURES = Path(__file__).parent / "fixtures"
MAJORS = (15, 16, 17, 18)
EVERY = pytest.mark.parametrize("major", MAJORS)


def recorded(major: int) -> dict[str, list[str]]:
    """Lines by incident."""
    result: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in (FIXTURES / f"waldump-{major}.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            lines = result.setdefault(line[2:], [])
        else:
            lines.append(line)
    return result


def replay(lines: list[str], ledger: Ledger | None = None, inserts: bool = False) -> list[Ended]:
    """The transactions that these lines commit; what a scanner would pass over is passed over."""
    ledger = ledger or known()
    found = []
    for line in lines:
        if not is_wanted(line.encode() + b"\n", inserts):
            continue
        record = _parse(line, 1)
        assert record is not None, line
        ended = ledger.feed(record)
        if ended is not None:
            found.append(ended)
    return found


def known() -> Ledger:
    """A ledger that has met a first list of running transactions."""
    ledger = Ledger()
    text = "RUNNING_XACTS nextXid 3 latestCompletedXid 2 oldestRunningXid 3"
    ledger.feed(Record("Standby", 0, Lsn(1), 1, text))
    return ledger


# Incident, and kinds of each of its transactions in turn.
EXPECTED: dict[str, list[list[str]]] = {
    "update 20": [["update"]],
    "delete 30": [["delete"]],
    "truncate": [["truncate"], []],
    "truncate same txn creation": [[]],
    "vacuum full": [["rewrite"]],
    "reindex": [["rewrite"]],
    "cluster": [["rewrite"]],
    "alter type": [["rewrite"]],
    "alter type rewrite": [["rewrite"]],
    "subxact drop": [["drop"]],
    "subxact delete": [["delete"]],
    "aborted delete": [],
    "aborted drop": [],
    "prepared": [],
    "temp": [[], [], [], ["drop_unstored"]],
    "partition drop": [["drop"]],
    "partition drop all": [["drop"]],
    "drop matview": [["drop"]],
    "schema": [[], [], [], [], ["drop"]],
    "drop index": [[], ["drop_index"]],
    "drop sequence": [[], ["drop_sequence"]],
    "dropdb": [["drop_database"]],
    "set tablespace": [[], ["rewrite"], ["rewrite"], ["drop_tablespace"]],
    "alter unlogged": [["rewrite"], ["rewrite"]],
    "toast": [[], [], [], ["delete"]],
    "truncate restart ident": [[], [], ["truncate"]],
    "multi": [[], ["delete", "drop"]],
}


@EVERY
@pytest.mark.parametrize("incident", EXPECTED)
def test_incident_is_told_by_its_kinds_in_every_version(major: int, incident: str) -> None:
    verdicts = [judge(ended) for ended in replay(recorded(major)[incident])]
    assert [list(verdict.kinds) for verdict in verdicts] == EXPECTED[incident]
    assert all(verdict.certain for verdict in verdicts)


@EVERY
def test_rows_are_counted_and_those_of_an_aborted_subtransaction_are_not(major: int) -> None:
    lines = recorded(major)
    assert judge(replay(lines["update 20"])[0]).rows("update") == 5
    assert judge(replay(lines["delete 30"])[0]).rows("delete") == 5
    ended = replay(lines["subxact delete"])[0]
    assert judge(ended).rows("delete") == 10 and len(ended.subxids) == 3
    assert judge(replay(lines["subxact delete"], inserts=True)[0]).rows("insert") == 1


@EVERY
def test_prepared_transaction_is_found_by_its_own_id_with_what_it_did_before(major: int) -> None:
    lines = recorded(major)
    ended = replay(lines["prepared"] + lines["commit prepared"])
    assert len(ended) == 1
    verdict = judge(ended[0])
    assert verdict.kinds == ("delete", "drop") and verdict.rows("delete") == 1
    assert ended[0].account.gid == "pp" and "ROLLBACK PREPARED 'pp'" in verdict.notes[-1]


@EVERY
def test_dropped_database_has_a_point_before_its_row_was_made_invalid(major: int) -> None:
    ended = replay(recorded(major)["dropdb"])[0]
    before = ended.account.point_of_no_return
    in_place = next(line for line in recorded(major)["dropdb"] if "INPLACE" in line)
    record = _parse(in_place, 1)
    assert record is not None and record.xid == 0
    assert before == record.lsn and before < ended.account.first_lsn < ended.lsn


@EVERY
def test_drop_names_the_table_first_and_all_that_belongs_to_it(major: int) -> None:
    verdict = judge(replay(recorded(major)["partition drop all"])[0])
    oids = [item.oid for item in verdict.touched]
    assert len(oids) == 4 and oids[0] == min(oid for oid in oids if oid is not None)


@EVERY
def test_transaction_whose_beginning_was_not_read_is_not_certain(major: int) -> None:
    ended = replay(recorded(major)["vacuum full"][-1:], Ledger())[0]
    assert ended.began_before
    verdict = judge(ended)
    # Without its beginning it looks like a drop. Nobody may take that for a fact.
    assert "drop" in verdict.kinds and not verdict.certain
    assert any("may have rewritten" in note for note in verdict.notes)


@EVERY
def test_drop_beside_a_rewrite_in_one_transaction_is_told(major: int) -> None:
    lines = recorded(major)
    rewrite, drop = lines["alter type rewrite"], lines["subxact drop"]
    xids = {parsed.xid for parsed in (_parse(line, 1) for line in drop[:-1]) if parsed}
    own = next(parsed.xid for parsed in (_parse(line, 1) for line in rewrite) if parsed and parsed.xid)
    moved = [line for line in drop if " desc: COMMIT" not in line and "Heap " in line and "rel 1663" in line]
    for xid in xids:
        moved = [line.replace(f"tx: {xid:10}", f"tx: {own:10}") for line in moved]
    dropped = next(line for line in drop if " desc: COMMIT" in line)
    oid = dropped.partition("dropped stats: ")[2].partition(";")[0].split()[0]
    both = [line.replace("; dropped stats: ", f"; dropped stats: {oid} ") for line in rewrite]
    assert judge(replay(moved + both)[0]).kinds == ("rewrite", "drop")
    assert judge(replay(both)[0]).kinds == ("rewrite",)


def test_only_lines_of_interest_are_taken_apart() -> None:
    head = b"rmgr: Heap        len (rec/tot):     54/    54, tx:        734, lsn: 0/005D95A8, prev 0/005D9568, desc: "
    rel = b", blkref #0: rel 1663/5/16385 blk 0\n"
    assert is_wanted(head + b"DELETE off 21 flags 0x01 KEYS_UPDATED " + rel)
    assert not is_wanted(head + b"INSERT off 4 flags 0x01" + rel)
    assert is_wanted(head + b"INSERT off 4 flags 0x01" + rel, inserts=True)
    assert not is_wanted(head + b"LOCK off 4: xid 734" + rel)
    assert not is_wanted(head + b"INPLACE off 4" + rel)
    assert is_wanted(head + b"INPLACE off 4, blkref #0: rel 1664/0/1262 blk 0\n")
    index = head.replace(b"Heap ", b"Btree")
    assert not is_wanted(index + b"INSERT_LEAF off 317" + rel, inserts=True)
    image = head.replace(b"Heap", b"XLOG")
    assert is_wanted(image + b"FPI " + rel) and not is_wanted(image + b"FPI_FOR_HINT " + rel)
    assert not is_wanted(image.replace(b"       734", b"         0") + b"FPI " + rel)
    assert not is_wanted(b"") and not is_wanted(b"pg_waldump: first record is after 0/1\n")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("base/5/16385", (RelFile(1663, 5, 16385), "")),
        ("base/5/16385_init", (RelFile(1663, 5, 16385), "init")),
        ("global/1262", (RelFile(1664, 0, 1262), "")),
        ("pg_tblspc/16480/PG_18_202506291/5/16483_vm", (RelFile(16480, 5, 16483), "vm")),
        ("base/5/t3_16385", None),
        ("base/5", None),
        ("", None),
    ],
)
def test_path_of_a_relation_is_read(text: str, expected: object) -> None:
    assert parse_path(text) == expected


def test_transaction_ids_are_compared_around_their_end() -> None:
    assert precedes(3, 4) and not precedes(4, 3) and not precedes(4, 4)
    assert precedes(2**32 - 5, 3) and not precedes(3, 2**32 - 5)


def delete(xid: int, lsn: int, file: int = 20000, flags: str = "0x00") -> Record:
    text = f"DELETE xmax: {xid}, off: 1, infobits: [], flags: {flags}, blkref #0: rel 1663/5/{file} blk 0"
    return Record("Heap", xid, Lsn(lsn), 1, text)


def commit(xid: int, lsn: int, more: str = "") -> Record:
    return Record("Transaction", xid, Lsn(lsn), 1, f"COMMIT 2026-03-01 12:00:00.5 UTC{more}")


def test_speculative_insertion_taken_back_is_no_delete_and_a_moved_row_is_an_update() -> None:
    ledger = known()
    for flags in ("0x08", "0x10", "0x00"):
        ledger.feed(delete(700, 10, flags=flags))
    ended = ledger.feed(commit(700, 20))
    assert ended is not None
    assert (judge(ended).rows("delete"), judge(ended).rows("update")) == (1, 1)


def test_transactions_that_a_crash_has_ended_are_forgotten() -> None:
    ledger = known()
    ledger.feed(delete(700, 10))
    ledger.feed(delete(705, 11))
    running = "RUNNING_XACTS nextXid 706 latestCompletedXid 704 oldestRunningXid 705; 1 xacts: 705"
    ledger.feed(Record("Standby", 0, Lsn(12), 1, running))
    assert list(ledger._open) == [705]
    ledger.feed(
        Record("XLOG", 0, Lsn(13), 1, "CHECKPOINT_SHUTDOWN redo 0/D; tli 1; fpw true; xid 0:706; oid 1; shutdown")
    )
    assert not ledger._open


def test_prepared_transaction_outlives_a_shutdown() -> None:
    ledger = known()
    ledger.feed(delete(700, 10))
    ledger.feed(
        Record("Transaction", 700, Lsn(11), 1, "PREPARE gid a: b: 2026-03-01 12:00:00 UTC; rels(commit): base/5/9")
    )
    ledger.feed(Record("XLOG", 0, Lsn(13), 1, "CHECKPOINT_SHUTDOWN redo 0/D; tli 1; xid 0:706; oid 1; shutdown"))
    ended = ledger.feed(Record("Transaction", 0, Lsn(20), 1, "COMMIT_PREPARED 700: 2026-03-01 12:00:00 UTC"))
    assert ended is not None and ended.account.gid == "a: b" and judge(ended).rows("delete") == 1


def test_memory_stays_flat_however_many_files_and_transactions_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(findtarget, "MAX_FILES", 3)
    monkeypatch.setattr(findtarget, "MAX_OPEN", 2)
    ledger = known()
    for number in range(10):
        ledger.feed(delete(700, 10 + number, 20000 + number))
    ledger.feed(delete(701, 30))
    ledger.feed(delete(702, 31))
    assert ledger.dropped_accounts == 1
    ended = ledger.feed(commit(700, 40))
    assert ended is not None
    verdict = judge(ended)
    assert verdict.rows("delete") == 10 and len(verdict.touched) == 4
    assert "more than 3 files" in verdict.notes[0]


def test_catalog_that_has_moved_makes_a_drop_uncertain() -> None:
    ledger = known()
    # After VACUUM FULL pg_class and pg_type are in files of other numbers.
    ledger.feed(delete(700, 10, 30000))
    ended = ledger.feed(commit(700, 20, "; rels: base/5/20001; dropped stats: 2/5/20001"))
    assert ended is not None
    verdict = judge(ended)
    assert "drop" in verdict.kinds and not verdict.certain
    assert any("system catalogs have moved" in note for note in verdict.notes)


def test_gap_forgets_what_was_open_and_what_was_known() -> None:
    ledger = known()
    ledger.feed(delete(700, 10))
    ledger.gap()
    ended = ledger.feed(commit(700, 20))
    assert ended is not None and ended.began_before and judge(ended).rows("delete") == 0
