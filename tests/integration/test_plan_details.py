# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a plan tells beside its decision: the server that was backed up, this host, room, times; and targets that WAL
knows under another name than the one that was asked for.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils import rates
from ansible_collections.pgdrill.pitr.plugins.module_utils.facts import host_glibc
from ansible_collections.pgdrill.pitr.plugins.module_utils.plan import RefusedError
from ansible_collections.pgdrill.pitr.plugins.module_utils.plantext import lines
from ansible_collections.pgdrill.pitr.plugins.module_utils.postgres import query
from ansible_collections.pgdrill.pitr.tests.integration.smalldisk import SmallDisk, small_disk
from ansible_collections.pgdrill.pitr.tests.integration.support import (
    SEGMENT_SIZE,
    Restored,
    Sandbox,
    Storage,
    fingerprint,
)

if TYPE_CHECKING:
    from ansible_collections.pgdrill.pitr.tests.integration.conftest import History

Restore = Callable[..., Restored]
MIB = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "small") as made:
        yield made


@pytest.fixture
def changed(history: History, tmp_path: Path) -> Callable[..., Storage]:
    """A copy of the shared repository in which the facts of the newest backup are others."""

    def make(**facts: Any) -> Storage:
        storage = history.storage.copy(tmp_path / "changed")
        path = storage.backups / "third" / "backup.json"
        document = json.loads(path.read_text(encoding="utf-8"))
        document["facts"] = {**document["facts"], **facts} if facts else None
        path.write_text(json.dumps(document), encoding="utf-8")
        return storage

    return make


# --- the server that was backed up


def test_backup_remembers_what_the_server_was(history: History, major: int) -> None:
    facts = history.backups["third"].facts
    assert facts is not None
    assert facts.server_version.startswith(f"{major}.") and facts.data_checksums is True
    assert facts.floors["max_connections"] == 20 and facts.floors["max_wal_senders"] == 4
    assert facts.max_wal_size == 64 * MIB and "libc" in facts.providers
    assert history.storage.folder and facts.tablespace_bytes == {}


def test_plan_tells_floors_checksums_and_versions(history: History, tmp_path: Path) -> None:
    shown = history.storage.plan(tmp_path / "data").to_dict()
    assert shown["floors"]["max_connections"] == 20 and shown["data_checksums"] is True
    assert shown["server_version"]["backup"].split()[0] == shown["server_version"]["host"].split()[0]
    assert shown["moved_aside"] == [] and shown["notes"] == []


def test_document_of_before_the_facts_is_restored_like_any_other(
    changed: Callable[..., Storage], tmp_path: Path, restored: Restore
) -> None:
    storage = changed()
    path = storage.backups / "third" / "backup.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    del document["facts"]
    path.write_text(json.dumps(document), encoding="utf-8")
    result = restored(storage)
    shown = result.plan.to_dict()
    assert shown["backup"] == "third" and shown["floors"] == {} and shown["data_checksums"] is None
    assert "checksums" not in " ".join(lines(shown))
    assert result.run().phase == "end"


@pytest.mark.parametrize("facts", [5, [], {"floors": 3, "glibc": 7, "providers": None, "tablespace_bytes": {"a": "b"}}])
def test_facts_that_make_no_sense_are_not_known(changed: Callable[..., Storage], tmp_path: Path, facts: Any) -> None:
    storage = changed()
    path = storage.backups / "third" / "backup.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    document["facts"] = facts
    path.write_text(json.dumps(document), encoding="utf-8")
    assert storage.plan(tmp_path / "data").to_dict()["floors"] == {}


def test_another_glibc_is_a_danger_that_is_told(changed: Callable[..., Storage], tmp_path: Path) -> None:
    storage = changed(glibc="2.17", providers=["libc"])
    plan = storage.plan(tmp_path / "data")
    if not host_glibc():
        pytest.skip("this host has no GNU C library")
    (note,) = plan.notes
    assert "2.17" in note and host_glibc() in note and "REINDEX" in note


def test_same_glibc_or_no_use_of_it_is_no_news(changed: Callable[..., Storage], tmp_path: Path) -> None:
    assert changed(glibc=host_glibc(), providers=["libc"]).plan(tmp_path / "data").notes == ()
    shutil.rmtree(tmp_path / "changed")
    assert changed(glibc="2.17", providers=["builtin"]).plan(tmp_path / "data").notes == ()


def test_use_of_icu_is_told(changed: Callable[..., Storage], tmp_path: Path) -> None:
    (note,) = changed(icu="153.14", providers=["icu", "libc"], glibc="").plan(tmp_path / "data").notes
    assert "153.14" in note and "collversion" in note


def test_older_programs_than_the_backups_are_told(changed: Callable[..., Storage], tmp_path: Path, major: int) -> None:
    (note,) = changed(server_version=f"{major}.99").plan(tmp_path / "data").notes
    assert f"{major}.99" in note and "older" in note


# --- times


def test_estimate_is_measured_by_restores_and_recoveries(history: History, tmp_path: Path, restored: Restore) -> None:
    storage = history.storage.copy(tmp_path / "copy")
    before = storage.plan(tmp_path / "data").to_dict()["estimate"]
    assert "no restore was measured" in before["copy_basis"] and "guess" in before["replay_basis"]
    result = restored(storage).run()
    rates.add_replay(result.recovery.planned(), str(result.server.data))
    path = storage.repository / "main" / rates.FILE
    kept = json.loads(path.read_text(encoding="utf-8"))
    assert kept["copy"][0]["bytes"] == result.plan.backup.database_bytes
    after = storage.plan(tmp_path / "data").to_dict()["estimate"]
    assert after["copy_basis"] == "1 restores of this cluster" and after["copy_seconds"] > 0
    if kept["replay"]:
        assert "1 recoveries" in after["replay_basis"]


def test_repository_that_cannot_be_written_is_restored_from_without_measuring(
    history: History, tmp_path: Path, restored: Restore
) -> None:
    storage = history.storage.copy(tmp_path / "copy")
    (storage.repository / "main").chmod(0o500)
    try:
        assert restored(storage).run().phase == "end"
    finally:
        (storage.repository / "main").chmod(0o700)
    assert not (storage.repository / "main" / rates.FILE).exists()


def test_measurements_that_are_damaged_are_no_measurements(history: History, tmp_path: Path) -> None:
    storage = history.storage.copy(tmp_path / "copy")
    for text in ("", "[]", '{"copy": 3}', '{"copy": [{"bytes": "x", "seconds": 1}, {"bytes": 0, "seconds": 0}]}'):
        (storage.repository / "main" / rates.FILE).write_text(text, encoding="ascii")
        assert "no restore was measured" in storage.plan(tmp_path / "data").to_dict()["estimate"]["copy_basis"]


# --- room


@pytest.fixture(scope="module")
def spread(bin_dir: str, template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """A backup with two tablespaces, of about eight MiB and one."""
    place = tmp_path_factory.mktemp("spread")
    primary = Sandbox(bin_dir, place / "sandbox", template)
    try:
        primary.server.start()
        for name, rows in (("large", 4400), ("small", 600)):
            (place / name).mkdir()
            with primary.server.connection() as connection:
                query(connection, f"CREATE TABLESPACE {name} LOCATION '{place / name}'")
                query(connection, f"CREATE TABLE in_{name} (filler text) TABLESPACE {name}")
                query(connection, "ALTER TABLE in_%s ALTER filler SET STORAGE PLAIN" % name)
                query(connection, f"INSERT INTO in_{name} SELECT repeat('x', 2000) FROM generate_series(1, {rows})")
        primary.backup("only")
        primary.commit("after")
        primary.probe()
        primary.server.stop()
        yield primary
    finally:
        primary.server.close()


def places(spread: Sandbox, large: Path, small: Path) -> dict[str, str]:
    by_name = {Path(item.location).name: item.location for item in _backup(spread).tablespaces}
    return {by_name["large"]: str(large), by_name["small"]: str(small)}


def _backup(spread: Sandbox) -> Any:
    from ansible_collections.pgdrill.pitr.plugins.module_utils.stored import stored_backups

    return stored_backups(spread.folder)[-1]


def test_sizes_of_tablespaces_are_known(spread: Sandbox, tmp_path: Path) -> None:
    backup = _backup(spread)
    sizes = {Path(item.location).name: backup.facts.tablespace_bytes[item.oid] for item in backup.tablespaces}
    assert 8 * MIB < sizes["large"] < 12 * MIB and MIB < sizes["small"] < 2 * MIB
    plan = spread.plan(tmp_path / "data", tablespace_mapping=places(spread, tmp_path / "l", tmp_path / "s"))
    told = {Path(item["location"]).name: item for item in plan.to_dict()["tablespaces"]}
    assert told["large"]["bytes"] == sizes["large"] and told["large"]["target"] == str(tmp_path / "l")
    (filesystem,) = plan.to_dict()["space"]
    assert filesystem["needed_bytes"] == backup.database_bytes + 4 * SEGMENT_SIZE


def test_each_filesystem_is_asked_for_its_own(spread: Sandbox, tmp_path: Path, disk: SmallDisk) -> None:
    """The large tablespace does not fit on a filesystem that has room for the small one and for everything else."""
    backup = _backup(spread)
    disk.fill(leave=5 * MIB)
    before = fingerprint(tmp_path / "target")
    fits = places(spread, tmp_path / "l", disk.path / "small")
    spread.plan(tmp_path / "target" / "data", tablespace_mapping=fits)
    with pytest.raises(RefusedError) as caught:
        swapped = places(spread, disk.path / "large", tmp_path / "s")
        spread.plan(tmp_path / "target" / "data", tablespace_mapping=swapped)
    (refusal,) = caught.value.refusals
    assert refusal.code == "space" and "tablespace" in refusal.message and "room on the filesystem" in refusal.nearest
    assert fingerprint(tmp_path / "target") == before
    assert backup.database_bytes > 5 * MIB


def test_two_things_on_one_filesystem_are_added_up(spread: Sandbox, tmp_path: Path, disk: SmallDisk) -> None:
    """Either would fit alone."""
    backup = _backup(spread)
    large = max(backup.facts.tablespace_bytes.values())
    rest = backup.database_bytes - sum(backup.facts.tablespace_bytes.values()) + 4 * SEGMENT_SIZE
    disk.fill(leave=max(large, rest) + 2 * MIB)
    spread.plan(disk.path / "data", tablespace_mapping=places(spread, tmp_path / "l", tmp_path / "s"))
    spread.plan(tmp_path / "data", tablespace_mapping=places(spread, disk.path / "large", tmp_path / "s"))
    with pytest.raises(RefusedError) as caught:
        both = places(spread, disk.path / "large", tmp_path / "s")
        spread.plan(disk.path / "data", tablespace_mapping=both)
    assert [item.code for item in caught.value.refusals] == ["space"]
    assert "data directory" in caught.value.refusals[0].message and "tablespace" in caught.value.refusals[0].message


def test_filesystem_of_an_empty_mount_point_is_the_one_that_counts(
    history: History, disk: SmallDisk, tmp_path: Path
) -> None:
    """The data directory is a filesystem of its own; there may be any room beside it."""
    disk.fill(leave=MIB)
    mount = disk.path.resolve()
    if not os.path.ismount(mount):
        pytest.skip("the small filesystem is not seen as a mount point here")
    ballast = [path.name for path in mount.iterdir()]
    assert ballast
    with pytest.raises(RefusedError) as caught:
        history.storage.plan(mount / "data")
    assert "space" in [item.code for item in caught.value.refusals]


# --- everything at once


def test_target_directory_host_and_room_are_told_at_once(spread: Sandbox, tmp_path: Path, disk: SmallDisk) -> None:
    disk.fill(leave=MIB)
    options = {"recovery_target_lsn": "0/28"}
    with pytest.raises(RefusedError) as caught:
        spread.plan(disk.path / "data", options, backup="mine", wal_command="/nowhere", config_dir=str(tmp_path))
    codes = [item.code for item in caught.value.refusals]
    assert codes[:2] == ["backup_not_found", "target_before_first_backup"]
    assert {"wal_command", "space", "config_dir", "tablespace_not_empty"} <= set(codes)
    assert not (disk.path / "data").exists()


def test_nearest_points_around_a_hole_are_told(history: History, tmp_path: Path) -> None:
    broken = history.storage.copy(tmp_path / "broken")
    broken.segment(history.commit("second 1").start).unlink()
    with pytest.raises(RefusedError) as caught:
        broken.plan(tmp_path / "data", {"recovery_target_lsn": str(history.commit("second 3").start)})
    (refusal,) = caught.value.refusals
    assert refusal.code == "archive_gap"
    assert "Behind the hole backup third can be restored" in refusal.nearest
    third = history.backups["third"]
    broken.segment(third.start_lsn).unlink()
    with pytest.raises(RefusedError) as caught:
        broken.plan(tmp_path / "data", {"recovery_target": "immediate"})
    assert "Backup second can, at" in caught.value.refusals[0].nearest


def test_chosen_backup_that_is_too_new_names_the_one_that_fits(history: History, tmp_path: Path) -> None:
    with pytest.raises(RefusedError) as caught:
        options = {"recovery_target_lsn": str(history.commit("second 3").start)}
        history.storage.plan(tmp_path / "data", options, backup="third")
    assert "Backup second ends before the target" in caught.value.refusals[0].nearest


# --- targets


class Busy:
    """A primary with transactions and restore points of every kind."""

    def __init__(self, primary: Sandbox) -> None:
        self.primary = primary
        server = primary.server
        primary.backup("first")
        self.before = primary.commit("before")
        with server.connection() as connection:
            query(connection, "BEGIN")
            self.parent = int(query(connection, "SELECT pg_current_xact_id()::text")[0][0])
            query(connection, "SAVEPOINT inside")
            query(connection, "UPDATE status SET phase = 'by a subtransaction'")
            self.child = int(query(connection, "SELECT xmin::text FROM status")[0][0])
            query(connection, "RELEASE inside")
            query(connection, "COMMIT")
        assert self.child != self.parent
        self.prepared = self._prepare("it's the one", "UPDATE status SET phase = 'prepared'")
        server.sql("COMMIT PREPARED 'it''s the one'")
        self.after = primary.commit("after")
        self.pending = self._prepare("never ended", "CREATE TABLE never ()")
        for name in ("twice", 'odd "name" %p \\ $(x) ; é', "line\nbreak"):
            server.sql("SELECT pg_create_restore_point(%s)", name)
        self.between = primary.commit("between")
        server.sql("SELECT pg_create_restore_point('twice')")
        with server.connection() as connection:
            query(connection, "BEGIN")
            query(connection, "UPDATE status SET phase = 'rolled back'")
            self.aborted = int(query(connection, "SELECT pg_current_xact_id()::text")[0][0])
            query(connection, "ROLLBACK")
        self.end = primary.commit("end")
        primary.probe()
        server.stop("immediate")

    def _prepare(self, name: str, statement: str) -> int:
        with self.primary.server.connection() as connection:
            query(connection, "BEGIN")
            query(connection, statement)
            xid = int(query(connection, "SELECT pg_current_xact_id()::text")[0][0])
            query(connection, "PREPARE TRANSACTION %s", (name,))
        return xid


@pytest.fixture(scope="module")
def busy(bin_dir: str, template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Busy]:
    """Shared, read-only."""
    settings = {"max_prepared_transactions": 4}
    primary = Sandbox(bin_dir, tmp_path_factory.mktemp("busy"), template, settings=settings)
    try:
        primary.server.start()
        yield Busy(primary)
    finally:
        primary.server.close()


def refused(busy: Busy, tmp_path: Path, options: dict[str, Any]) -> str:
    with pytest.raises(RefusedError) as caught:
        busy.primary.plan(tmp_path / "data", options)
    (refusal,) = caught.value.refusals
    assert refusal.code == "target_not_in_archive"
    return refusal.nearest


def test_subtransaction_is_refused_with_the_transaction_it_belongs_to(busy: Busy, tmp_path: Path) -> None:
    nearest = refused(busy, tmp_path, {"recovery_target_xid": str(busy.child)})
    assert f"{busy.child} is a subtransaction of {busy.parent}" in nearest and "committed" in nearest


def test_prepared_transaction_is_found_where_it_was_committed(busy: Busy, restored: Restore) -> None:
    result = restored(busy.primary, {"recovery_target_xid": str(busy.prepared)}).run()
    assert result.phase == "prepared"
    exclusive = {"recovery_target_xid": str(busy.prepared), "recovery_target_inclusive": False}
    assert restored(busy.primary, exclusive).run().phase == "by a subtransaction"


def test_prepared_transaction_that_never_ended_is_refused_by_its_name(busy: Busy, tmp_path: Path) -> None:
    nearest = refused(busy, tmp_path, {"recovery_target_xid": str(busy.pending)})
    assert "prepared" in nearest and "'never ended'" in nearest


def test_rolled_back_transaction_is_a_target_and_the_plan_says_so(busy: Busy, restored: Restore) -> None:
    result = restored(busy.primary, {"recovery_target_xid": str(busy.aborted)})
    assert any("rolled back" in note for note in result.plan.notes)
    assert result.run().phase == "between"


def test_transaction_that_is_not_there_is_refused_with_its_neighbours(busy: Busy, tmp_path: Path) -> None:
    nearest = refused(busy, tmp_path, {"recovery_target_xid": str(busy.end.xid + 1000)})
    assert f"{busy.end.xid} (committed" in nearest


def test_transaction_of_another_turn_of_the_counter_is_not_taken_for_it(busy: Busy, tmp_path: Path) -> None:
    asked = busy.before.xid + 2**32
    nearest = refused(busy, tmp_path, {"recovery_target_xid": str(asked)})
    assert nearest.startswith("Restorable is from") or str(busy.before.xid) in nearest


def test_first_of_two_restore_points_of_one_name_is_the_target_and_the_other_is_told(
    busy: Busy, restored: Restore
) -> None:
    result = restored(busy.primary, {"recovery_target_name": "twice"})
    assert any("2 restore points are called 'twice'" in note for note in result.plan.notes)
    assert result.run().phase == "after"


def test_name_with_odd_characters_is_found_and_reached(busy: Busy, restored: Restore) -> None:
    name = 'odd "name" %p \\ $(x) ; é'
    result = restored(busy.primary, {"recovery_target_name": name}).run()
    assert result.phase == "after" and result.reached.name == name


def test_beginning_of_a_name_with_a_line_break_is_another_name(busy: Busy, tmp_path: Path) -> None:
    nearest = refused(busy, tmp_path, {"recovery_target_name": "line"})
    assert "'line\\nbreak'" in nearest
    with pytest.raises(RefusedError) as caught:
        busy.primary.plan(tmp_path / "data", {"recovery_target_name": "line\nbreak"})
    assert [item.code for item in caught.value.refusals] == ["target"]


def test_name_that_is_nearly_right_is_refused_with_the_right_one(busy: Busy, tmp_path: Path) -> None:
    assert "'twice'" in refused(busy, tmp_path, {"recovery_target_name": "twcie"})
