# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Expire on directories: what goes is gone, what stays is untouched, and a kill or a failure harms nothing."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils import expire, locks
from ansible_collections.pgdrill.pitr.plugins.module_utils.catalog import StoredFile
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.plugins.module_utils.expire import Expiry, as_diff, set_mark
from ansible_collections.pgdrill.pitr.plugins.module_utils.index import scan
from ansible_collections.pgdrill.pitr.plugins.module_utils.info import archive_info
from ansible_collections.pgdrill.pitr.plugins.module_utils.repository import Chapter, ClusterFolder, create
from ansible_collections.pgdrill.pitr.plugins.module_utils.retention import Policy, why_not_restorable
from ansible_collections.pgdrill.pitr.plugins.module_utils.sizes import Sizes
from ansible_collections.pgdrill.pitr.plugins.module_utils.stored import keep_mark, stored_backups
from ansible_collections.pgdrill.pitr.tests.unit.support import (
    EPOCH,
    MIB,
    SYSTEM,
    history,
    make_backup,
    make_repository,
    put,
    tree,
    wal_name,
)

NOW = EPOCH + datetime.timedelta(hours=1)
KEEP_ONE = Policy(keep_full=1)


def add_backup(folder: ClusterFolder, label: str, number: int, system: int = SYSTEM) -> None:
    content = f"content of {label}".encode()
    files = (StoredFile("backup_manifest", len(content), ""), StoredFile("base.tar", len(content), ""))
    made = make_backup(label, start=number * MIB + 40, stop=number * MIB + 256, minute=number, files=files)
    made = dataclasses.replace(made, system_identifier=str(system))
    place = Path(folder.backups_path, label)
    for file in files:
        put(place, file.name, content)
    put(place, "backup.json", json.dumps(made.to_dict()))


def add_wal(folder: ClusterFolder, timeline: int, first: int, last: int, chapter: Chapter | None = None) -> None:
    archive = Path(folder.archive_path(chapter))
    for number in range(first, last + 1):
        name = wal_name(timeline, number)
        put(archive / name[:16], name, b"x" * 10)


@pytest.fixture
def folder(tmp_path: Path) -> ClusterFolder:
    """Segments 4090 to 4110, over the border of two folders; backups in 4092, 4095 and 4105; a younger timeline."""
    folder = make_repository(tmp_path / "a repository")
    add_wal(folder, 1, 4090, 4110)
    archive = Path(folder.archive_path())
    add_wal(folder, 2, 4109, 4112)
    put(archive, "00000002.history", history((1, f"1/00D{0:05X}")))
    for number in (4092, 4095, 4105):
        add_backup(folder, f"b{number}", number)
        put(archive / wal_name(1, number)[:16], f"{wal_name(1, number)}.00000028.backup", b"")
    put(archive / wal_name(1, 4091)[:16], f"{wal_name(1, 4091)}.partial", b"")
    put(archive / wal_name(1, 4091)[:16], "notes.txt", b"mine")
    put(archive, "README", b"mine")
    return folder


def expiry(folder: ClusterFolder, policy: Policy = KEEP_ONE) -> Expiry:
    return Expiry(folder, policy, now=EPOCH + datetime.timedelta(days=10))


def labels(folder: ClusterFolder) -> list[str]:
    return [backup.label for backup in stored_backups(folder)]


def test_what_the_policy_does_not_need_goes_and_nothing_else(folder: ClusterFolder) -> None:
    before = tree(folder.path)
    result = expiry(folder).run()
    after = tree(folder.path)
    assert result["changed"] and labels(folder) == ["b4105"]
    index = scan(folder)
    assert index.ranges(1) == [(4105, 4110)] and index.ranges(2) == [(4109, 4112)]
    gone = sorted(set(before) - set(after))
    assert [name for name in gone if name.startswith("backups/")] == [
        f"backups/{label}/{name}"
        for label in ("b4092", "b4095")
        for name in ("backup.json", "backup_manifest", "base.tar")
    ]
    segments = result["expired_segments"]
    assert segments["count"] == 15 and segments["bytes"] == 150
    assert segments["ranges"][0]["first"] == wal_name(1, 4090) and segments["ranges"][0]["last"] == wal_name(1, 4104)
    assert segments["attached"] == [
        f"{wal_name(1, 4091)}.partial", f"{wal_name(1, 4092)}.00000028.backup", f"{wal_name(1, 4095)}.00000028.backup",
    ]  # fmt: skip
    assert len(gone) == 6 + 15 + 3
    # What is left is the same inode, time and content as before.
    assert all(after[name] == before[name] for name in after)
    assert sorted(result["unknown_files"]) == [f"{wal_name(1, 4090)[:16]}/notes.txt", "README"]


def test_second_run_changes_nothing(folder: ClusterFolder) -> None:
    expiry(folder).run()
    before = tree(folder.path)
    again = expiry(folder).run()
    assert not again["changed"] and tree(folder.path) == before


def test_check_lists_what_goes_and_touches_nothing(folder: ClusterFolder) -> None:
    before = tree(folder.path)
    told = expiry(folder).run(check=True)
    assert tree(folder.path) == before
    done = expiry(folder).run()
    assert told == done
    diff = as_diff(told)
    assert "backup b4092\n" in diff["before"] and "b4092" not in diff["after"] and "backup b4105\n" in diff["after"]
    assert f"WAL {wal_name(1, 4090)} to {wal_name(1, 4104)}, 15 segments, 150 bytes\n" in diff["before"]


def test_check_sees_who_reads_a_backup(folder: ClusterFolder) -> None:
    label = expiry(folder).run(check=True)["expired_backups"][0]["backup"]
    with locks.reading(folder, label):
        told = expiry(folder).run(check=True)
    assert label not in [item["backup"] for item in told["expired_backups"]]


def test_nobody_is_refused_because_somebody_looks(folder: ClusterFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []

    class Looking(Sizes):
        """Comes last in a look, when everything that would be locked is."""

        def __init__(self, archive: str, logs: list[str]) -> None:
            for label in labels(folder):
                with locks.reading(folder, label):
                    read.append(label)
            super().__init__(archive, logs)

    monkeypatch.setattr(expire, "Sizes", Looking)
    expiry(folder).run(check=True)
    assert read == labels(folder)


def test_archive_info_tells_beforehand_what_no_backup_needs(folder: ClusterFolder) -> None:
    info = archive_info(folder)
    assert info["unneeded_segments"] == 2 and info["unneeded"][0]["last"] == wal_name(1, 4091)
    assert info["unneeded_bytes"] == 20
    assert info["stored_bytes"] == 25 * 10
    assert info["missing_for_backups"] == [] and info["gaps"] == [] and info["missing_segments"] == 0


def test_archive_info_names_what_is_missing_and_which_backup_lacks_it(folder: ClusterFolder) -> None:
    for number in (4095, 4097, 4098, 4105):
        os.unlink(Path(folder.archive_path()) / wal_name(1, number)[:16] / wal_name(1, number))
    info = archive_info(folder, sizes=False)
    names = [[wal_name(1, 4095)], [wal_name(1, 4097), wal_name(1, 4098)], [wal_name(1, 4105)]]
    assert [gap["names"] for gap in info["gaps"]] == names and info["missing_segments"] == 4
    lacking = [{"backup": f"b{n}", "segments": 1, "names": [wal_name(1, n)]} for n in (4095, 4105)]
    assert info["missing_for_backups"] == lacking
    assert info["stored_bytes"] is None


def test_without_policy_nothing_is_removed(folder: ClusterFolder) -> None:
    put(Path(folder.backups_path, ".old.expired"), "base.tar", b"")
    before = tree(folder.path)
    result = expiry(folder, Policy()).run()
    assert not result["changed"] and tree(folder.path) == before


def test_backup_with_keep_mark_stays_until_the_mark_is_taken_away(folder: ClusterFolder) -> None:
    assert set_mark(folder, "b4092", "for the auditors", check=True) and keep_mark(folder, "b4092") is None
    assert set_mark(folder, "b4092", "for the auditors") and not set_mark(folder, "b4092", "for the auditors")
    result = expiry(folder).run()
    assert labels(folder) == ["b4092", "b4105"]
    assert scan(folder).ranges(1) == [(4092, 4110)]
    assert {"backup": "b4092", "reasons": ["keep mark: for the auditors"]} in result["kept_backups"]
    assert set_mark(folder, "b4092", None) and not set_mark(folder, "b4092", None)
    expiry(folder).run()
    assert labels(folder) == ["b4105"]


def test_mark_that_cannot_be_read_counts(folder: ClusterFolder) -> None:
    put(Path(folder.backups_path, "b4092"), "keep.json", b"\0")
    expiry(folder).run()
    assert "b4092" in labels(folder)


def test_mark_of_a_backup_that_is_not_there_is_refused(folder: ClusterFolder) -> None:
    with pytest.raises(PitrError, match=r"no backup 'b1'. There are: b4092, b4095, b4105. Nothing was changed"):
        set_mark(folder, "b1", "kept")


def test_backup_that_a_restore_reads_stays_with_its_wal(folder: ClusterFolder) -> None:
    with locks.reading(folder, "b4095"):
        result = expiry(folder).run()
    assert labels(folder) == ["b4095", "b4105"] and scan(folder).ranges(1) == [(4095, 4110)]
    assert {"backup": "b4095", "reasons": ["a restore, or a backup that will build upon it, is reading it"]} in result[
        "kept_backups"
    ]


def test_backup_that_a_recovery_replays_from_stays_with_its_wal(folder: ClusterFolder) -> None:
    lease = locks.new_lease("b4095")
    folder.touch_lease(lease)
    expiry(folder).run()
    assert labels(folder) == ["b4095", "b4105"] and scan(folder).ranges(1) == [(4095, 4110)]
    old = EPOCH.timestamp()
    os.utime(Path(folder.locks_path) / f"lease-{lease}", (old, old))
    expiry(folder).run()
    assert labels(folder) == ["b4105"]


def test_recovery_from_a_backup_that_is_gone_keeps_all_wal(folder: ClusterFolder) -> None:
    folder.touch_lease(locks.new_lease("b3"))
    result = expiry(folder).run()
    assert labels(folder) == ["b4105"] and scan(folder).ranges(1) == [(4090, 4110)]
    assert any("b3" in note for note in result["notes"])


def test_backup_being_taken_that_tells_nothing_keeps_all_wal(folder: ClusterFolder) -> None:
    with locks.held(folder, "take-b9"):
        expiry(folder).run()
    assert scan(folder).ranges(1) == [(4090, 4110)]


def test_two_at_once_are_one(folder: ClusterFolder) -> None:
    before = tree(folder.backups_path)
    with locks.held(folder, locks.EXPIRE), pytest.raises(PitrError, match=r"Another expire of .* is running"):
        expiry(folder).run()
    assert tree(folder.backups_path) == before


def test_backup_with_somebody_elses_files_stays(folder: ClusterFolder) -> None:
    put(Path(folder.backups_path, "b4092"), "notes.txt", b"mine")
    result = expiry(folder).run()
    assert labels(folder) == ["b4092", "b4105"]
    assert "files that are not of the backup: notes.txt" in result["kept_backups"][0]["reasons"][0]


def test_backup_that_cannot_be_removed_stops_the_removal_of_wal(folder: ClusterFolder) -> None:
    # A directory where a file belongs cannot be unlinked, by nobody.
    os.unlink(Path(folder.backups_path, "b4092", "base.tar"))
    Path(folder.backups_path, "b4092", "base.tar").mkdir()
    os.truncate(Path(folder.backups_path, "b4095", "base.tar"), 17)
    archive = tree(folder.archive_path())
    with pytest.raises(PitrError, match=r"base.tar.* No WAL was removed") as caught:
        expiry(folder).run()
    assert caught.value.detail["removed"] == ["b4095"]
    assert tree(folder.archive_path()) == archive
    assert labels(folder) == ["b4105"]
    # Still in the way at the next run, and mended at the one after.
    with pytest.raises(PitrError, match="No WAL was removed"):
        expiry(folder).run()
    Path(folder.backups_path, ".b4092.expired", "base.tar").rmdir()
    assert expiry(folder).run()["leftovers"] == [".b4092.expired"]
    assert scan(folder).ranges(1) == [(4105, 4110)]


_KILLED = """
import datetime, os, signal, sys
from ansible_collections.pgdrill.pitr.plugins.module_utils.expire import Expiry
from ansible_collections.pgdrill.pitr.plugins.module_utils.repository import ClusterFolder
from ansible_collections.pgdrill.pitr.plugins.module_utils.retention import Policy
count, last = 0, int(sys.argv[2])

def hook(event, arguments):
    global count
    if event in ("os.rename", "os.remove", "os.rmdir"):
        count += 1
        if count == last:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(hook)
folder = ClusterFolder.open(sys.argv[1], "main")
Expiry(folder, Policy(keep_full=1), now=datetime.datetime.fromisoformat(sys.argv[3])).run()
"""


def test_kill_before_any_change_leaves_what_can_be_restored_and_the_next_run_finishes(
    folder: ClusterFolder, tmp_path: Path
) -> None:
    now = (EPOCH + datetime.timedelta(days=10)).isoformat()
    for last in range(1, 200):
        copy = tmp_path / f"copy{last}"
        shutil.copytree(folder.repository, copy)
        ours = ClusterFolder.open(str(copy), folder.name)
        argv = [sys.executable, "-c", _KILLED, str(copy), str(last), now]
        code = subprocess.run(argv, stdin=subprocess.DEVNULL, check=False).returncode
        index = scan(ours)
        assert why_not_restorable(stored_backups(ours), index, {}) == {}
        assert index.holes() == [] and "b4105" in labels(ours)
        if index.ranges(1)[0][0] > 4090:
            # WAL goes after the backups that need it.
            assert labels(ours) == ["b4105"]
        if code == 0:
            break
        assert code == -signal.SIGKILL
        expiry(ours).run()
        assert labels(ours) == ["b4105"] and scan(ours).ranges(1) == [(4105, 4110)]
        assert [name for name in os.listdir(ours.backups_path) if name.startswith(".")] == []
    assert code == 0 and last > 25


def test_other_chapter_is_left_alone(tmp_path: Path) -> None:
    folder = make_repository(tmp_path / "r")
    add_wal(folder, 1, 1, 9)
    for number in (2, 4, 6):
        add_backup(folder, f"old{number}", number)
    folder, _created = create(
        folder.repository, folder.name, Chapter(0, str(SYSTEM + 1), MIB, 18, EPOCH.isoformat()), new_chapter=True
    )
    add_wal(folder, 1, 1, 9)
    for number in (3, 5):
        add_backup(folder, f"new{number}", number, SYSTEM + 1)
    before = tree(folder.archive_path(folder.select(1)))
    expiry(folder).run()
    assert labels(folder) == ["old2", "old4", "new5", "old6"]
    assert tree(folder.archive_path(folder.select(1))) == before
    Expiry(folder, KEEP_ONE, folder.select(1), EPOCH + datetime.timedelta(days=10)).run()
    assert labels(folder) == ["new5", "old6"]
    assert scan(folder, folder.select(1)).ranges(1) == [(6, 9)] and scan(folder).ranges(1) == [(5, 9)]


def test_repository_that_is_not_mounted_is_no_empty_one(folder: ClusterFolder) -> None:
    os.rename(folder.backups_path, folder.backups_path + ".away")
    with pytest.raises(PitrError, match=r"does not exist\. Is the repository mounted\? Nothing was removed"):
        expiry(folder).run()
