# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Stored backups of real servers, whole and damaged in every place: each damage is named, and nothing is changed."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils import codec, verify
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.plugins.module_utils.index import scan
from ansible_collections.pgdrill.pitr.plugins.module_utils.repository import ClusterFolder
from ansible_collections.pgdrill.pitr.plugins.module_utils.stored import sha256, stored_backups
from ansible_collections.pgdrill.pitr.plugins.module_utils.verify import Report, Verification, choose
from ansible_collections.pgdrill.pitr.plugins.modules import backup_verify
from ansible_collections.pgdrill.pitr.tests.integration.support import (
    CLUSTER,
    Identity,
    Sandbox,
    Storage,
    cut,
    fingerprint,
    flip,
)

if TYPE_CHECKING:
    from ansible_collections.pgdrill.pitr.tests.integration.conftest import History


@pytest.fixture
def own(history: History, tmp_path: Path) -> Storage:
    """A copy of the shared repository to break."""
    return history.storage.copy(tmp_path / "own")


def look(storage: Storage, choice: str = "latest", level: str = "content", identity: str = "") -> list[Report]:
    folder = ClusterFolder.open(str(storage.repository), CLUSTER, {"identity": identity})
    backups = stored_backups(folder)
    before = fingerprint(storage.archive, storage.backups)
    work = Verification(folder, folder.chapter, backups, scan(folder), storage.bin_dir, level)
    reports = [work.verify(backup) for backup in choose(backups, choice)]
    assert fingerprint(storage.archive, storage.backups) == before
    return reports


def damage(report: Report) -> list[tuple[str, str]]:
    return [(os.path.basename(item.path), item.problem) for item in report.damage]


@pytest.mark.parametrize("level", ["content", "stored"])
def test_whole_backups_are_verified_at_the_level_that_was_asked_for(history: History, level: str) -> None:
    reports = look(history.storage, "all", level)
    assert [report.backup for report in reports] == ["first", "second", "third"]
    for report in reports:
        assert (report.level, report.damage, report.notes) == (level, (), ())
        assert report.files == 2 and report.segments >= 1


def test_every_file_is_compared_whatever_the_size_of_a_batch(history: History, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "BATCH_FILES", 100)
    monkeypatch.setattr(verify, "BATCH_BYTES", 100_000)
    assert look(history.storage)[0].damage == ()


def _base(storage: Storage, label: str = "third") -> Path:
    return next((storage.backups / label).glob("base.tar*"))


@pytest.mark.parametrize("level", ["content", "stored"])
def test_changed_cut_and_missing_files_are_all_named(own: Storage, level: str) -> None:
    flip(_base(own), 10_000)
    cut(_base(own, "second"))
    (own.backups / "first" / "backup_manifest").unlink()
    first, second, third = look(own, "all", level)
    assert damage(third) == [(_base(own).name, "has other content than was stored")]
    assert third.damage[0].stored.partition(",")[0] == third.damage[0].found.partition(",")[0]
    ((name, problem),) = damage(second)
    assert name == _base(own).name and "were stored" in problem
    assert damage(first) == [("backup_manifest", "No such file or directory")]
    assert {first.level, second.level, third.level} == {"stored"}


def _describe_as_found(storage: Storage, label: str) -> None:
    """Write the digests of what is there into the description: only the manifest still knows better."""
    path = storage.backups / label / "backup.json"
    description = json.loads(path.read_text(encoding="utf-8"))
    for file in description["files"]:
        stored = storage.backups / label / file["name"]
        file.update(size=stored.stat().st_size, sha256=sha256(str(stored)))
    path.write_text(json.dumps(description), encoding="utf-8")


def test_content_that_only_the_manifest_knows_is_compared(own: Storage) -> None:
    shutil.copyfile(_base(own, "first"), _base(own, "third"))
    _describe_as_found(own, "third")
    assert look(own, level="stored")[0].damage == ()
    (report,) = look(own)
    problems = " ".join(problem for _name, problem in damage(report))
    assert report.level == "content" and "mismatch" in problems and "base/" in problems
    assert all(name == _base(own).name for name, _problem in damage(report))


def test_manifest_with_a_wrong_checksum_of_its_own_is_named(own: Storage) -> None:
    path = own.backups / "third" / "backup_manifest"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace('"PG_VERSION", "Size": 3', '"PG_VERSION", "Size": 4'), encoding="utf-8")
    assert path.read_text(encoding="utf-8") != text
    _describe_as_found(own, "third")
    assert damage(look(own)[0]) == [("backup_manifest", "its own checksum is wrong")]
    path.write_text(text[: len(text) // 2], encoding="utf-8")
    _describe_as_found(own, "third")
    assert damage(look(own)[0]) == [("backup_manifest", "it ends before its checksum")]


def test_tar_that_is_cut_short_is_named(own: Storage) -> None:
    cut(_base(own))
    _describe_as_found(own, "third")
    ((name, problem),) = damage(look(own)[0])
    assert name == _base(own).name and "damaged" in problem


def _segments(history: History, own: Storage) -> Path:
    return own.segment(history.backups["third"].start_lsn)


@pytest.mark.parametrize("level", ["content", "stored"])
def test_missing_wal_is_named(own: Storage, history: History, level: str) -> None:
    path = _segments(history, own)
    path.unlink()
    assert (path.name, "is missing") in damage(look(own, level=level)[0])
    assert look(own, "second", level)[0].damage == ()


def test_damaged_wal_is_named(own: Storage, history: History) -> None:
    path = _segments(history, own)
    flip(path, path.stat().st_size // 2)
    ((name, problem),) = damage(look(own)[0])
    assert name == path.name and "damaged" in problem


def test_wal_of_another_position_is_named(own: Storage, history: History) -> None:
    path = _segments(history, own)
    shutil.copyfile(own.segment(history.backups["first"].start_lsn), path)
    ((name, problem),) = damage(look(own)[0])
    assert name == path.name and "not what its name says" in problem


def test_wal_whose_records_are_damaged_is_found_by_reading_them(own: Storage, history: History, tmp_path: Path) -> None:
    """A whole gzip file with a right first page, and a record in it that is none."""
    path = _segments(history, own)
    with codec.open_reader(str(path)) as reader:
        content = bytearray(reader.read())
    at = int(history.backups["third"].start_lsn) % len(content)
    content[at + 4 : at + 24] = b"\xff" * 20
    path.unlink()
    with codec.open_writer(str(path), "gzip") as writer:
        writer.write(bytes(content))
    ((_name, problem),) = damage(look(own)[0])
    assert "cannot be read" in problem and str(history.backups["third"].start_lsn) in problem


def test_unknown_file_beside_a_backup_is_a_note(own: Storage) -> None:
    (own.backups / "third" / "notes.txt").write_text("mine", encoding="ascii")
    (report,) = look(own)
    assert report.damage == () and "notes.txt is not of the backup" in report.notes[0]


def test_parent_of_an_incremental_backup_has_to_be_there(own: Storage) -> None:
    folder = own.folder
    backups = stored_backups(folder)
    grandchild = dataclasses.replace(backups[2], type="incremental", parent="second")
    child = dataclasses.replace(backups[1], type="incremental", parent="first")
    for there, expected in (((backups[0], child), []), ((child,), ["the parent first of second is missing"])):
        everything = [*there, grandchild]
        work = Verification(folder, folder.chapter, everything, scan(folder), own.bin_dir, "stored")
        assert [problem for _name, problem in damage(work.verify(grandchild))] == expected


def test_tablespaces_are_verified(sandbox: Callable[..., Sandbox], tmp_path: Path) -> None:
    primary = sandbox()
    place = tmp_path / "a tablespace"
    place.mkdir()
    primary.server.sql(f"CREATE TABLESPACE far LOCATION '{place}'")
    primary.server.sql("CREATE TABLE rows TABLESPACE far AS SELECT generate_series(1, 1000) AS n")
    taken = primary.backup("spread")
    (report,) = look(primary)
    assert (report.level, report.damage, report.files) == ("content", (), 3)
    # Another content of the same size and place in the tar, with its digests written down anew.
    tar = next((primary.backups / "spread").glob(f"{taken.tablespaces[0].oid}.tar*"))
    flip(tar, tar.stat().st_size // 2)
    _describe_as_found(primary, "spread")
    (report,) = look(primary)
    assert report.damage and all(item.path == str(tar) for item in report.damage)


def test_encrypted_backup_is_verified_as_far_as_there_is_a_key(sandbox: Callable[..., Sandbox], tmp_path: Path) -> None:
    key, other = Identity(tmp_path / "key"), Identity(tmp_path / "other")
    primary = sandbox(start=False)
    primary.encrypt_to(key.public)
    primary.server.start()
    primary.backup("secret")
    for identity in ("", str(other.path)):
        (report,) = look(primary, identity=identity)
        assert (report.level, report.damage) == ("stored", ()) and report.notes
    (report,) = look(primary, identity=str(key.path))
    assert (report.level, report.damage, report.notes) == ("content", (), ())
    segment = primary.segment(stored_backups(primary.folder)[0].start_lsn)
    flip(segment, segment.stat().st_size // 2)
    for identity in ("", str(key.path)):
        assert damage(look(primary, identity=identity)[0]) == [(segment.name, "has other content than was stored")]


class _Invocation:
    check_mode = True

    def __init__(self, diff: bool, **params: Any) -> None:
        self._diff = diff
        self.params = params


def test_module_fails_with_every_damaged_file_and_shows_the_difference(own: Storage) -> None:
    flip(_base(own), 10_000)
    options = {name: option.get("default") for name, option in backup_verify.ARGUMENT_SPEC.items()}
    options.update(repository=str(own.repository), cluster=CLUSTER, bin_dir=own.bin_dir, backup="all")
    with pytest.raises(
        PitrError, match=r"base\.tar.*: has other content than was stored\. Nothing was changed"
    ) as caught:
        backup_verify.run(_Invocation(True, **options))  # type: ignore[arg-type]
    assert len(caught.value.detail["damaged"]) == 1  # type: ignore[arg-type]
    told = backup_verify.run(_Invocation(True, **{**options, "fail_on_damage": False}))  # type: ignore[arg-type]
    assert not told["changed"] and [item["whole"] for item in told["verified"]] == [True, True, False]
    assert "sha256" in told["diff"]["before"] and told["diff"]["before"] != told["diff"]["after"]
    with pytest.raises(PitrError, match=r"There is no backup 'b9'. There are: first, second, third"):
        backup_verify.run(_Invocation(False, **{**options, "backup": "b9"}))  # type: ignore[arg-type]
