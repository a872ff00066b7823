# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The repository: created once, bound to one cluster, never half-written, never mistaken for an empty one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils import repository
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.plugins.module_utils.repository import (
    CLUSTER_FILE,
    MARKER,
    Chapter,
    ClusterFolder,
    archived_logs,
    check_cluster_name,
    clusters,
    create,
    make_directory,
    read_json,
    write_atomic,
    write_json,
)
from ansible_collections.pgdrill.pitr.plugins.module_utils.wal import WalFile
from ansible_collections.pgdrill.pitr.tests.unit.support import CLUSTER, MIB, SYSTEM, make_repository, tree


def chapter(system: int = SYSTEM) -> Chapter:
    return Chapter(1, str(system), MIB, 18, "2026-03-01T12:00:00+00:00")


def test_new_repository_is_laid_out_and_private(tmp_path: Path) -> None:
    path = tmp_path / "a" / "r"
    folder, created = create(str(path), CLUSTER, chapter())
    assert created == [
        str(path / MARKER),
        str(path / CLUSTER),
        str(path / CLUSTER / "archive"),
        str(path / CLUSTER / "archive" / "18-1"),
        str(path / CLUSTER / "backups"),
    ]
    assert all(os.path.exists(item) for item in created)
    assert read_json(str(path / MARKER)) == {"format": 1}
    for directory in (path, *(Path(item) for item in created[1:])):
        assert directory.stat().st_mode & 0o777 == 0o700
    assert folder.archive_path() == created[3] and folder.backups_path == created[4]
    opened = ClusterFolder.open(str(path), CLUSTER)
    assert [item.to_dict() for item in opened.chapters] == [chapter().to_dict()]


def test_second_creation_changes_nothing(tmp_path: Path) -> None:
    make_repository(tmp_path / "r")
    before = tree(tmp_path)
    _folder, created = create(str(tmp_path / "r"), CLUSTER, chapter())
    assert created == [] and tree(tmp_path) == before


def test_check_mode_tells_the_same_and_writes_nothing(tmp_path: Path) -> None:
    _folder, announced = create(str(tmp_path / "r"), CLUSTER, chapter(), check=True)
    assert list(tmp_path.iterdir()) == []
    _folder, created = create(str(tmp_path / "r"), CLUSTER, chapter())
    assert announced == created


def test_second_cluster_gets_a_folder_of_its_own(tmp_path: Path) -> None:
    make_repository(tmp_path / "r")
    _folder, created = create(str(tmp_path / "r"), "other", chapter(SYSTEM + 1))
    assert str(tmp_path / "r" / MARKER) not in created
    assert clusters(str(tmp_path / "r")) == [CLUSTER, "other"]


def test_folder_of_another_cluster_is_refused_and_unchanged(tmp_path: Path) -> None:
    make_repository(tmp_path / "r")
    before = tree(tmp_path)
    with pytest.raises(PitrError, match=f"{SYSTEM}, but this one is {SYSTEM + 1}") as caught:
        create(str(tmp_path / "r"), CLUSTER, chapter(SYSTEM + 1))
    assert caught.value.detail == {"expected": str(SYSTEM), "found": str(SYSTEM + 1)}
    assert tree(tmp_path) == before


def test_directory_with_other_things_does_not_become_a_repository(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("precious")
    with pytest.raises(PitrError, match="neither empty nor a repository"):
        create(str(tmp_path), CLUSTER, chapter())
    assert sorted(os.listdir(tmp_path)) == ["data"]


def test_new_filesystem_with_lost_found_becomes_a_repository(tmp_path: Path) -> None:
    (tmp_path / "lost+found").mkdir()
    create(str(tmp_path), CLUSTER, chapter())
    assert clusters(str(tmp_path)) == [CLUSTER]


def test_creation_that_was_interrupted_is_not_open_and_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: str) -> bool:
        if path.endswith("backups"):
            raise OSError(28, "No space left on device", path)
        return make_directory(path)

    with monkeypatch.context() as patch:
        patch.setattr(repository, "make_directory", fail)
        with pytest.raises(OSError, match="No space"):
            create(str(tmp_path / "r"), CLUSTER, chapter())
    with pytest.raises(PitrError, match=f"has no cluster '{CLUSTER}'"):
        ClusterFolder.open(str(tmp_path / "r"), CLUSTER)
    create(str(tmp_path / "r"), CLUSTER, chapter())
    assert ClusterFolder.open(str(tmp_path / "r"), CLUSTER).chapter.system_identifier == str(SYSTEM)


def test_unmounted_repository_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PitrError, match=r"is not a repository.*Is its filesystem mounted"):
        ClusterFolder.open(str(tmp_path), CLUSTER)
    with pytest.raises(PitrError, match="is not a repository"):
        ClusterFolder.open(str(tmp_path / "nowhere"), CLUSTER)


def test_repository_below_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PitrError, match="cannot be read: Not a directory"):
        ClusterFolder.open(str(tmp_path / "file"), CLUSTER)


def test_unknown_cluster_is_refused_with_those_that_are_there(tmp_path: Path) -> None:
    make_repository(tmp_path / "r")
    with pytest.raises(PitrError, match=f"has no cluster 'other'. Clusters there: {CLUSTER}"):
        ClusterFolder.open(str(tmp_path / "r"), "other")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "is damaged"),
        ("{", "is damaged"),
        ("\0\0\0\0", "is damaged"),
        ("[]", "has no format number"),
        ("{}", "has no format number"),
        ('{"format": "1"}', "has no format number"),
        ('{"format": 3}', "this version reads up to 2"),
    ],
)
@pytest.mark.parametrize("name", [MARKER, f"{CLUSTER}/{CLUSTER_FILE}"])
def test_damaged_document_is_named(tmp_path: Path, name: str, content: str, why: str) -> None:
    make_repository(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(PitrError, match=why) as caught:
        ClusterFolder.open(str(tmp_path), CLUSTER)
    assert str(tmp_path / name) in caught.value.message


@pytest.mark.parametrize(
    "chapters", [None, [], {}, "18-1", [{}], [{"number": 1}], [1], [{**chapter().to_dict(), "extra": 1}]]
)
def test_cluster_document_without_usable_chapters_is_named(tmp_path: Path, chapters: object) -> None:
    make_repository(tmp_path)
    path = tmp_path / CLUSTER / CLUSTER_FILE
    path.write_text(json.dumps({"format": 1, "name": CLUSTER, "chapters": chapters}))
    with pytest.raises(PitrError, match="is damaged") as caught:
        ClusterFolder.open(str(tmp_path), CLUSTER)
    assert str(path) in caught.value.message


@pytest.mark.parametrize("name", ["main", "m", "M-1_2.3", "x" * 63])
def test_cluster_names_of_letters_digits_dots_dashes_underscores_are_taken(name: str) -> None:
    check_cluster_name(name)


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "../a", "a b", "ä", "-a", "x" * 64, "a\n", "a\0"])
def test_cluster_name_that_would_not_be_one_folder_is_refused(name: str) -> None:
    with pytest.raises(PitrError, match="cannot name a cluster"):
        ClusterFolder("/nowhere", name)


def test_wal_files_lie_below_their_4_gb_of_wal(tmp_path: Path) -> None:
    folder = make_repository(tmp_path)
    archive = folder.archive_path()
    for name in (
        "000000010000000A00000001",
        "000000010000000A00000001.partial",
        "000000010000000A00000001.00000028.backup",
    ):
        assert folder.wal_path(WalFile.parse(name)) == f"{archive}/000000010000000A/{name}"
    assert folder.wal_path(WalFile.parse("00000002.history")) == f"{archive}/00000002.history"


def test_chapters_are_found_by_system_identifier(tmp_path: Path) -> None:
    folder = make_repository(tmp_path)
    folder.chapters.append(Chapter(2, str(SYSTEM + 1), MIB, 19, ""))
    folder.save()
    opened = ClusterFolder.open(str(tmp_path), CLUSTER)
    assert opened.chapter.number == 2 and opened.archive_path().endswith("/19-2")
    assert opened.require(str(SYSTEM)).number == 1
    assert opened.archive_path(opened.require(str(SYSTEM))).endswith("/18-1")
    with pytest.raises(PitrError, match="Give this cluster a folder of its own"):
        opened.require("42")


def test_atomic_write_replaces_as_a_whole_with_the_asked_mode(tmp_path: Path) -> None:
    path = tmp_path / "f"
    write_atomic(str(path), b"one")
    assert path.stat().st_mode & 0o777 == 0o600
    first = path.stat().st_ino
    write_atomic(str(path), b"two", 0o640)
    assert path.read_bytes() == b"two" and path.stat().st_ino != first
    assert path.stat().st_mode & 0o777 == 0o640
    assert os.listdir(tmp_path) == ["f"]


@pytest.mark.parametrize("step", ["fsync", "rename"])
def test_atomic_write_that_fails_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"old")

    def fail(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        with pytest.raises(OSError, match="No space"):
            write_atomic(str(path), b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["f"]


def test_atomic_write_is_on_stable_storage_before_its_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(descriptor: int) -> None:
        is_directory = os.path.isdir(f"/proc/self/fd/{descriptor}")
        steps.append("fsync directory" if is_directory else f"fsync {os.fstat(descriptor).st_size} bytes")
        real_fsync(descriptor)

    def rename(source: str, target: str) -> None:
        steps.append("rename")
        real_rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    write_atomic(str(tmp_path / "f"), b"four")
    assert steps == ["fsync 4 bytes", "rename", "fsync directory"]
    steps.clear()
    make_directory(str(tmp_path / "d"))
    make_directory(str(tmp_path / "d"))
    assert steps == ["fsync directory"]


def test_document_round_trips(tmp_path: Path) -> None:
    write_json(str(tmp_path / "d.json"), {"format": 1, "b": ["ä"]})
    assert read_json(str(tmp_path / "d.json")) == {"format": 1, "b": ["ä"]}


def test_directory_is_made_once(tmp_path: Path) -> None:
    assert make_directory(str(tmp_path / "d")) is True
    assert make_directory(str(tmp_path / "d")) is False
    (tmp_path / "f").write_text("")
    with pytest.raises(PitrError, match="it is not a directory"):
        make_directory(str(tmp_path / "f"))


def test_archived_logs_are_those_of_the_timeline(tmp_path: Path) -> None:
    for name in ("0000000100000000", "0000000100000001", "0000000200000001", "notes"):
        (tmp_path / name).mkdir()
    (tmp_path / "00000002.history").write_text("")
    assert sorted(archived_logs(str(tmp_path), 1)) == ["0000000100000000", "0000000100000001"]
    assert sorted(archived_logs(str(tmp_path), 2)) == ["0000000200000001"]
    assert len(list(archived_logs(str(tmp_path)))) == 3


def test_clusters_of_a_directory_that_is_none_are_none(tmp_path: Path) -> None:
    assert clusters(str(tmp_path / "nowhere")) == []
    (tmp_path / "folder").mkdir()
    assert clusters(str(tmp_path)) == []
