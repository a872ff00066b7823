# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a restore refuses: by name, all of it at once, and before a byte of data directory or repository changes."""

from __future__ import annotations

import datetime
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils import codec
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.plugins.module_utils.plan import RefusedError
from ansible_collections.pgdrill.pitr.plugins.module_utils.postgres import running_pid
from ansible_collections.pgdrill.pitr.plugins.module_utils.target import format_time
from ansible_collections.pgdrill.pitr.plugins.module_utils.wal import Lsn
from ansible_collections.pgdrill.pitr.tests.integration.support import (
    SEGMENT_SIZE,
    Restored,
    Server,
    Storage,
    cut,
    fingerprint,
    flip,
)

if TYPE_CHECKING:
    from ansible_collections.pgdrill.pitr.tests.integration.conftest import History

SECOND = datetime.timedelta(seconds=1)


@contextmanager
def refused(data: Path, storage: Storage, *codes: str) -> Iterator[list[str]]:
    """The block ends in a refusal with exactly these codes, and nothing has changed. Yields the messages."""
    before = fingerprint(data.parent, storage.repository)
    messages: list[str] = []
    with pytest.raises(RefusedError) as caught:
        yield messages
    messages += [f"{item.message} {item.nearest}".strip() for item in caught.value.refusals]
    assert sorted(item.code for item in caught.value.refusals) == sorted(codes), caught.value.message
    assert all(message in caught.value.message for message in messages)
    assert caught.value.detail["refusals"]
    assert fingerprint(data.parent, storage.repository) == before


@pytest.fixture
def nowhere(tmp_path: Path) -> Path:
    """A data directory that does not exist; its parent does."""
    (tmp_path / "nowhere").mkdir()
    return tmp_path / "nowhere" / "data"


@pytest.fixture
def broken(history: History, tmp_path: Path) -> Storage:
    """A copy of the shared repository to break."""
    return history.storage.copy(tmp_path / "broken")


# --- the directory


def test_running_server_is_refused_even_with_force(
    history: History, own_data: Path, server: Callable[[Path], Server]
) -> None:
    running = server(own_data)
    running.start()
    pid = running_pid(str(own_data))
    for force in (False, True):
        # A running server writes; the rows and the process are what must be untouched.
        with pytest.raises(RefusedError, match="server is running") as caught:
            history.storage.plan(own_data, force=force)
        assert [item.code for item in caught.value.refusals] == ["server_running"]
        assert str(pid) in caught.value.message
    assert running.phase == "end"
    assert running_pid(str(own_data)) == pid


def test_directory_that_is_not_empty_is_refused_without_force(history: History, own_data: Path) -> None:
    with refused(own_data, history.storage, "directory_not_empty") as messages:
        history.storage.plan(own_data)
    assert "force" in messages[0]


@pytest.mark.parametrize("force", [False, True])
def test_directory_of_another_cluster_is_refused(
    history: History, stranger: Path, tmp_path: Path, force: bool, bin_dir: str
) -> None:
    data = tmp_path / "stranger" / "data"
    shutil.copytree(stranger, data)
    with refused(data, history.storage, "directory_foreign") as messages:
        history.storage.plan(data, force=force)
    assert history.storage.folder.chapter.system_identifier in messages[0]


def test_mount_point_is_refused(history: History, own_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == str(own_data))
    with refused(own_data, history.storage, "directory_mount_point"):
        history.storage.plan(own_data, force=True)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("kind", ["a file", "a directory without pg_control", "a marker of another cluster's restore"])
def test_directory_with_something_else_in_it_is_refused(
    history: History, nowhere: Path, force: bool, kind: str
) -> None:
    nowhere.mkdir()
    if kind == "a file":
        (nowhere / "thesis.odt").write_text("the only copy", encoding="utf-8")
    elif kind == "a directory without pg_control":
        (nowhere / "PG_VERSION").write_text("18\n", encoding="ascii")
    else:
        (nowhere / "pitr-restoring.json").write_text('{"system_identifier": "1"}', encoding="ascii")
    with refused(nowhere, history.storage, "directory_foreign") as messages:
        history.storage.plan(nowhere, force=force)
    assert ("not a data directory" in messages[0]) == (kind != "a directory without pg_control")


def test_directory_that_cannot_be_read_is_refused(history: History, nowhere: Path) -> None:
    nowhere.mkdir(mode=0o000)
    try:
        with pytest.raises(RefusedError, match="cannot be read"):
            history.storage.plan(nowhere, force=True)
    finally:
        nowhere.chmod(0o700)


def test_place_that_cannot_be_written_is_refused(history: History, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0o500)
    try:
        with refused(closed / "data", history.storage, "not_writable"):
            history.storage.plan(closed / "data")
    finally:
        closed.chmod(0o700)


# --- the repository


def test_empty_repository_is_refused(broken: Storage, nowhere: Path) -> None:
    shutil.rmtree(broken.backups)
    broken.backups.mkdir()
    with refused(nowhere, broken, "no_backup"):
        broken.plan(nowhere)


def test_directory_without_the_marker_is_no_repository(broken: Storage, nowhere: Path) -> None:
    (broken.repository / "pitr-repository.json").unlink()
    with refused(nowhere, broken, "repository") as messages:
        broken.plan(nowhere)
    assert "mounted" in messages[0]


def test_unknown_cluster_is_refused_and_the_known_ones_are_named(history: History, nowhere: Path) -> None:
    with refused(nowhere, history.storage, "repository") as messages:
        history.storage.plan(nowhere, cluster="mian")
    assert "main" in messages[0]


def test_backup_that_is_cut_is_passed_over_and_named(broken: Storage, nowhere: Path) -> None:
    stored = next((broken.backups / "third").glob("base.tar*"))
    cut(stored)
    plan = broken.plan(nowhere)
    assert plan.backup.label == "second"
    assert any(str(stored) in note for note in plan.notes)


def test_no_whole_backup_left_is_refused_and_every_damaged_file_is_named(broken: Storage, nowhere: Path) -> None:
    stored = [next((broken.backups / label).glob("base.tar*")) for label in ("first", "second", "third")]
    cut(stored[0])
    stored[1].unlink()
    cut(stored[2], 0)
    with refused(nowhere, broken, "backup_damaged") as messages:
        broken.plan(nowhere)
    assert all(str(path) in messages[0] for path in stored)


@pytest.mark.parametrize("damage", ["not JSON", "a field is missing", "a newer format"])
def test_damaged_description_of_a_backup_is_named(broken: Storage, nowhere: Path, damage: str) -> None:
    path = broken.backups / "second" / "backup.json"
    text = path.read_text(encoding="utf-8")
    changed = {
        "not JSON": text[: len(text) // 2],
        "a field is missing": text.replace('"stop_lsn"', '"stopp_lsn"'),
        "a newer format": text.replace('"format": 1', '"format": 99'),
    }[damage]
    path.write_text(changed, encoding="utf-8")
    before = fingerprint(nowhere.parent, broken.repository)
    with pytest.raises(PitrError, match=r"backup\.json"):
        broken.plan(nowhere)
    assert fingerprint(nowhere.parent, broken.repository) == before


# --- the target


def test_target_before_the_end_of_the_first_backup_is_refused(history: History, nowhere: Path) -> None:
    first = history.backups["first"]
    for options in (
        {"recovery_target_time": format_time(first.stopped_at - datetime.timedelta(microseconds=1))},
        {"recovery_target_time": format_time(first.started_at)},
        {"recovery_target_lsn": str(Lsn(first.stop_lsn - 1))},
        {"recovery_target_lsn": str(first.start_lsn)},
    ):
        with refused(nowhere, history.storage, "target_before_first_backup") as messages:
            history.storage.plan(nowhere, options)
        # The nearest point that would work.
        assert format_time(first.stopped_at) in messages[0]
        assert str(first.stop_lsn) in messages[0]


def test_target_before_the_end_of_the_chosen_backup_is_refused(history: History, nowhere: Path) -> None:
    options = {"recovery_target_lsn": str(history.commit("second 1").end)}
    with refused(nowhere, history.storage, "target_before_backup") as messages:
        history.storage.plan(nowhere, options, backup="third")
    assert "third" in messages[0]


def test_time_without_an_offset_is_refused(history: History, nowhere: Path) -> None:
    text = history.commit("second 2").time.strftime("%Y-%m-%d %H:%M:%S.%f")
    with refused(nowhere, history.storage, "target") as messages:
        history.storage.plan(nowhere, {"recovery_target_time": text})
    assert "offset" in messages[0] and f"{text}+00:00" in messages[0]


def test_two_targets_are_refused_and_both_named(history: History, nowhere: Path) -> None:
    options = {"recovery_target_xid": "800", "recovery_target_name": "before the update"}
    with refused(nowhere, history.storage, "target") as messages:
        history.storage.plan(nowhere, options)
    assert "800" in messages[0] and "before the update" in messages[0]


@pytest.mark.parametrize(
    "options",
    [
        {"recovery_target_lsn": "0/3000060 or so"},
        {"recovery_target_lsn": "16777216"},
        {"recovery_target_lsn": "0/1FFFFFFFF"},
        {"recovery_target_xid": "-3"},
        {"recovery_target_xid": "2"},
        {"recovery_target_xid": "0x300"},
        {"recovery_target_xid": "18446744073709551616"},
        {"recovery_target_time": "yesterday"},
        {"recovery_target_time": "2026-02-30 12:00:00+00"},
        {"recovery_target_name": "n" * 64},
        {"recovery_target": "consistent"},
        {"recovery_target_timeline": "newest"},
        {"recovery_target_timeline": "0"},
        {"recovery_target_timeline": "-1"},
        {"recovery_target_timeline": "4294967296"},
        {"recovery_target_action": "stop"},
    ],
    ids=lambda options: " ".join(map(str, next(iter(options.items()))))[:40],
)
def test_malformed_target_is_refused(history: History, nowhere: Path, options: dict[str, Any]) -> None:
    with refused(nowhere, history.storage, "target") as messages:
        history.storage.plan(nowhere, options)
    assert str(next(iter(options.values()))) in messages[0]


def test_unknown_timeline_is_refused_and_the_known_ones_are_named(history: History, nowhere: Path) -> None:
    with refused(nowhere, history.storage, "timeline_unknown") as messages:
        history.storage.plan(nowhere, {"recovery_target_timeline": "7"})
    assert "00000007.history" in messages[0] and "1" in messages[0]


def test_unknown_backup_is_refused_and_the_known_ones_are_named(history: History, nowhere: Path) -> None:
    with refused(nowhere, history.storage, "backup_not_found") as messages:
        history.storage.plan(nowhere, backup="fourth")
    assert "first, second, third" in messages[0]


def test_target_beyond_the_archive_is_refused(history: History, nowhere: Path) -> None:
    last = history.commits[-1]
    end = history.storage.segments()[-1]
    number = int(end.name[8:16], 16) * 4096 + int(end.name[16:], 16)
    for options in (
        {"recovery_target_time": format_time(last.time + SECOND)},
        # PostgreSQL stops before the first commit *later* than the target, so the last one is no target itself.
        {"recovery_target_time": format_time(last.time)},
        {"recovery_target_lsn": str(Lsn((number + 1) * SEGMENT_SIZE))},
    ):
        with refused(nowhere, history.storage, "target_beyond_archive") as messages:
            history.storage.plan(nowhere, options)
        assert "estorable" in messages[0]
    # An exclusive stop before the last commit is possible.
    exclusive = {"recovery_target_time": format_time(last.time), "recovery_target_inclusive": False}
    assert history.storage.plan(nowhere, exclusive).backup.label == "third"


def test_lsn_behind_the_last_record_of_the_archive_is_refused(
    history: History, restored: Callable[..., Restored], nowhere: Path, tmp_path: Path
) -> None:
    # Behind the record that has switched WAL nothing begins, though the segment goes on.
    stored = next(path for path in reversed(history.storage.segments()) if len(path.name) == 24)
    segment = tmp_path / stored.name
    with codec.open_reader(str(stored)) as reader:
        segment.write_bytes(reader.read())
    shown = history.sandbox.server.program("pg_waldump", str(segment)).stdout.splitlines()
    last = Lsn.parse(shown[-1].split("lsn: ")[1].split(",")[0])
    for more in ({}, {"recovery_target_inclusive": False}):
        with refused(nowhere, history.storage, "target_beyond_archive") as messages:
            history.storage.plan(nowhere, {"recovery_target_lsn": str(Lsn(last + 1)), **more})
        assert f"up to LSN {last}" in messages[0]
    # That record itself can be waited for.
    for more in ({}, {"recovery_target_inclusive": False}):
        assert restored(history.storage, {"recovery_target_lsn": str(last), **more}).run().phase == "end"


def test_transaction_that_is_not_in_the_archive_is_refused(history: History, nowhere: Path) -> None:
    for xid in (history.commits[-1].xid + 1000, history.commit("born").xid):
        with refused(nowhere, history.storage, "target_not_in_archive") as messages:
            history.storage.plan(nowhere, {"recovery_target_xid": str(xid)})
        assert str(xid) in messages[0]


def test_restore_point_that_is_not_in_the_archive_is_refused(history: History, nowhere: Path) -> None:
    for name in ("never made", "point after second", "point after second 2 "):
        with refused(nowhere, history.storage, "target_not_in_archive") as messages:
            history.storage.plan(nowhere, {"recovery_target_name": name})
        assert name in messages[0]


# --- the archive


def test_hole_in_the_archive_is_refused_and_the_missing_segments_are_named(
    history: History, broken: Storage, nowhere: Path
) -> None:
    missing = [broken.segment(history.commit(phase).start) for phase in ("third 1", "third 2")]
    for path in missing:
        path.unlink()
    with refused(nowhere, broken, "archive_gap") as messages:
        broken.plan(nowhere)
    assert all(path.name in messages[0] for path in missing)
    # What lies before the hole can still be had.
    earlier = {"recovery_target_lsn": str(history.commit("second 3").start)}
    assert broken.plan(nowhere, earlier).backup.label == "second"
    with refused(nowhere, broken, "archive_gap"):
        broken.plan(nowhere, {"recovery_target_lsn": str(history.commit("third 3").start)})


def test_backup_without_its_own_wal_is_refused(history: History, broken: Storage, nowhere: Path) -> None:
    missing = broken.segment(history.backups["third"].start_lsn)
    missing.unlink()
    with refused(nowhere, broken, "archive_gap") as messages:
        broken.plan(nowhere, {"recovery_target": "immediate"})
    assert missing.name in messages[0] and "cannot be made consistent" in messages[0]


def test_tail_that_is_missing_makes_targets_in_it_unreachable(history: History, broken: Storage, nowhere: Path) -> None:
    first = broken.segment(history.commit("third 2").start).name
    for path in broken.segments():
        if path.name >= first:
            path.unlink()
    commit = history.commit("third 3")
    for options, code in (
        ({"recovery_target_lsn": str(commit.start)}, "target_beyond_archive"),
        ({"recovery_target_time": format_time(commit.time)}, "target_beyond_archive"),
        ({"recovery_target_xid": str(commit.xid)}, "target_not_in_archive"),
    ):
        with refused(nowhere, broken, code):
            broken.plan(nowhere, options)
    assert broken.plan(nowhere, {"recovery_target_lsn": str(history.commit("third 1").start)}).backup.label == "third"


def test_damaged_segment_is_named_when_a_target_is_looked_for_in_it(
    history: History, broken: Storage, nowhere: Path
) -> None:
    damaged = broken.segment(history.commit("third 2").start)
    cut(damaged)
    before = fingerprint(nowhere.parent, broken.repository)
    with pytest.raises(PitrError, match=damaged.name):
        broken.plan(nowhere, {"recovery_target_xid": str(history.commit("third 3").xid)})
    assert fingerprint(nowhere.parent, broken.repository) == before


# --- the host


def test_programs_of_another_major_version_are_refused(
    history: History, other_bin_dir: str, nowhere: Path, major: int
) -> None:
    with refused(nowhere, history.storage, "version") as messages:
        history.storage.plan(nowhere, bin_dir=other_bin_dir)
    assert str(major) in messages[0]


def test_missing_pitr_wal_is_refused(history: History, nowhere: Path) -> None:
    with refused(nowhere, history.storage, "wal_command") as messages:
        history.storage.plan(nowhere, wal_command="/nowhere/pitr-wal")
    assert "/nowhere/pitr-wal" in messages[0]


def test_configuration_directory_without_a_configuration_is_refused(
    history: History, nowhere: Path, tmp_path: Path
) -> None:
    with refused(nowhere, history.storage, "config_dir"):
        history.storage.plan(nowhere, config_dir=str(tmp_path))


def test_mapping_of_a_tablespace_that_is_not_in_the_backup_is_refused(history: History, nowhere: Path) -> None:
    with refused(nowhere, history.storage, "tablespace_unknown") as messages:
        history.storage.plan(nowhere, tablespace_mapping={"/srv/fast": "/srv/slow"})
    assert "/srv/fast" in messages[0]


def test_everything_that_is_wrong_is_told_at_once(
    history: History, own_data: Path, server: Callable[[Path], Server]
) -> None:
    running = server(own_data)
    running.start()
    with pytest.raises(RefusedError) as caught:
        history.storage.plan(own_data, {"recovery_target_time": "2026-01-01 00:00:00"})
    assert [item.code for item in caught.value.refusals] == ["target", "server_running"]
    with pytest.raises(RefusedError) as caught:
        history.storage.plan(own_data, {"recovery_target_lsn": "0/28"})
    assert [item.code for item in caught.value.refusals] == ["server_running", "target_before_first_backup"]
    running.stop()
    with refused(own_data, history.storage, "directory_not_empty", "wal_command", "tablespace_unknown"):
        history.storage.plan(own_data, wal_command="/nowhere", tablespace_mapping={"/a": "/b"})
    with pytest.raises(RefusedError) as caught:
        history.storage.plan(own_data, {"recovery_target_xid": "x"}, repository=os.path.dirname(own_data))
    assert [item.code for item in caught.value.refusals] == ["target", "repository"]


def test_byte_flipped_in_the_newest_backup_is_not_told_by_its_size(broken: Storage, nowhere: Path) -> None:
    # The plan only compares sizes; the restore itself compares checksums (test_restore_faults.py).
    stored = next((broken.backups / "third").glob("base.tar*"))
    flip(stored, stored.stat().st_size // 2)
    assert broken.plan(nowhere).backup.label == "third"
