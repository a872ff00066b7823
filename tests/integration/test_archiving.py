# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The real archiver with the really installed ``pitr-wal``, and what the repository then tells of itself."""

from __future__ import annotations

import datetime
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils import codec
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.plugins.module_utils.info import archive_info, backup_info
from ansible_collections.pgdrill.pitr.plugins.module_utils.repository import Chapter, create
from ansible_collections.pgdrill.pitr.tests.integration.support import (
    CLUSTER,
    SEGMENT_SIZE,
    Restored,
    Sandbox,
    Server,
    cut,
    fingerprint,
    pitr_wal,
    until,
)

if TYPE_CHECKING:
    from ansible_collections.pgdrill.pitr.tests.integration.conftest import History

Restore = Callable[..., Restored]
MakeSandbox = Callable[..., Sandbox]


def _failures(primary: Sandbox) -> int:
    return int(primary.server.value("SELECT failed_count FROM pg_stat_archiver"))


def _backlog(primary: Sandbox) -> int:
    return len(list((primary.server.data / "pg_wal" / "archive_status").glob("*.ready")))


# --- the archiver


@pytest.mark.parametrize("compression", ["none", "gzip", "lz4", "zstd"])
def test_archived_segments_are_the_servers_own(sandbox: MakeSandbox, restored: Restore, compression: str) -> None:
    if compression in ("lz4", "zstd") and not codec.which(compression):
        pytest.skip(f"this host has no {compression}")
    primary = sandbox(compression=compression)
    primary.backup("only")
    primary.fill(2)
    archived = primary.probe()
    assert archived.compared
    for stored in primary.segments():
        original = primary.server.data / "pg_wal" / stored.name
        assert codec.detect(stored.read_bytes()[:8]) == {"none": "gzip"}.get(compression, compression)
        with codec.open_reader(str(stored)) as reader:
            content = reader.read()
        assert len(content) == SEGMENT_SIZE
        # The server recycles segments, so that old ones are not there any more.
        assert not original.exists() or content == original.read_bytes()
        assert stored.stat().st_mode & 0o077 == 0
    assert not list(primary.archive.rglob("*.tmp"))
    assert (min(path.stat().st_size for path in primary.segments()) > SEGMENT_SIZE) == (compression == "none")
    primary.server.stop()
    assert restored(primary).run().phase == "template"


def test_change_of_compression_leaves_older_segments_restorable(sandbox: MakeSandbox, restored: Restore) -> None:
    from ansible_collections.pgdrill.pitr.plugins.module_utils.install import install

    primary = sandbox(compression="none")
    primary.backup("only")
    primary.commit("uncompressed")
    primary.fill(1)
    primary.probe()
    # What a version that stored files as they are has left.
    for path in primary.segments():
        with codec.open_reader(str(path)) as reader:
            path.write_bytes(reader.read())
    settings = {"repository": str(primary.repository), "compression": "gzip"}
    install(str(Path(primary.wal_command).parent), CLUSTER, settings)
    primary.commit("compressed")
    primary.fill(1)
    primary.probe()
    assert {codec.detect(path.read_bytes()[:8]) for path in primary.segments()} == {"none", "gzip"}
    primary.server.stop()
    assert restored(primary).run().phase == "compressed"


def test_repository_that_is_away_for_a_while_loses_nothing(sandbox: MakeSandbox, restored: Restore) -> None:
    primary = sandbox()
    primary.backup("only")
    away = primary.repository.with_name("away")
    primary.repository.rename(away)
    # What an unmounted filesystem leaves behind must not be taken for an empty repository.
    primary.repository.mkdir()
    before = _failures(primary)
    for number in range(6):
        primary.commit(f"away {number}")
        primary.fill(1)
    until(lambda: _failures(primary) > before, "failures of the archiver")
    assert list(primary.repository.iterdir()) == []
    assert _backlog(primary) >= 6
    assert "is not a repository" in primary.server.log_text()
    primary.repository.rmdir()
    away.rename(primary.repository)
    primary.commit("back")
    primary.probe()
    until(lambda: _backlog(primary) == 0, "an empty backlog")
    assert archive_info(primary.folder)["gaps"] == []
    primary.server.stop()
    assert restored(primary).run().phase == "back"


def test_failure_of_pitr_wal_is_seen_in_pg_stat_archiver(sandbox: MakeSandbox) -> None:
    """PostgreSQL counts only exit codes up to 125; above that the archiver ends and nothing is counted."""
    primary = sandbox()
    library = Path(primary.wal_command).parent / "lib"
    library.rename(library.with_name("away"))
    primary.fill(1)
    until(lambda: _failures(primary) > 0, "a counted failure")
    assert "archiver process" not in primary.server.log_text()
    library.with_name("away").rename(library)
    primary.probe()


def test_second_cluster_in_the_same_folder_is_refused(
    sandbox: MakeSandbox, stranger: Path, bin_dir: str, tmp_path: Path, restored: Restore
) -> None:
    primary = sandbox()
    primary.backup("only")
    other = Sandbox(bin_dir, tmp_path / "other", stranger, settings={"archive_command": primary.archive_command})
    try:
        other.server.start()
        before = fingerprint(primary.repository)
        other.fill(2)
        until(lambda: _failures(other) > 0, "a refusal")
        assert fingerprint(primary.repository) == before
        assert "belongs to" in other.server.log_text() or "system identifier" in other.server.log_text()
        chapter = Chapter(1, other.server.system_identifier, SEGMENT_SIZE, 18, "2026-01-01T00:00:00+00:00")
        with pytest.raises(PitrError, match="system identifier"):
            create(str(primary.repository), CLUSTER, chapter)
        assert fingerprint(primary.repository) == before
    finally:
        other.server.close()
    primary.commit("still fine")
    primary.probe()
    primary.server.stop()
    assert restored(primary).run().phase == "still fine"


def test_copy_of_a_cluster_that_archives_into_the_same_folder_is_found_out(
    sandbox: MakeSandbox, server: Callable[[Path], Server], tmp_path: Path
) -> None:
    """The system identifiers are the same; the first segment of both names that differs is refused."""
    primary = sandbox()
    primary.fill(1)
    primary.probe()
    primary.server.stop()
    shutil.copytree(primary.server.data, tmp_path / "copy")
    copy = server(tmp_path / "copy")
    primary.server.start()
    copy.start()
    primary.commit("original")
    primary.probe()
    kept = fingerprint(primary.archive)
    copy.sql("UPDATE status SET phase = 'copy'")
    copy.sql("SELECT pg_switch_wal()")
    until(lambda: copy.value("SELECT failed_count FROM pg_stat_archiver") > 0, "a refusal")
    assert "exists with other content" in copy.log_text()
    assert fingerprint(primary.archive) == kept


def test_exit_codes_of_the_installed_command(history: History, tmp_path: Path) -> None:
    storage = history.storage.copy(tmp_path / "copy")
    wal = tmp_path / "pg_wal"
    wal.mkdir()
    segments = storage.segments()
    target = str(wal / "RECOVERYXLOG")
    # There, and not there.
    assert pitr_wal(storage, "get", CLUSTER, segments[0].name, target).returncode == 0
    (wal / segments[0].name).write_bytes((wal / "RECOVERYXLOG").read_bytes())
    assert pitr_wal(storage, "get", CLUSTER, "0000000100000000000000FF", target).returncode == 1
    assert pitr_wal(storage, "get", CLUSTER, "00000002.history", target).returncode == 1
    assert pitr_wal(storage, "get", CLUSTER, "00000001.history", target).returncode == 1
    # The same again is archived; another content is not, and the archive is unchanged.
    assert pitr_wal(storage, "push", CLUSTER, str(wal / segments[0].name)).returncode == 0
    changed = bytearray((wal / segments[0].name).read_bytes())
    changed[-1] ^= 1
    (wal / segments[0].name).write_bytes(bytes(changed))
    before = fingerprint(storage.repository)
    assert 1 <= pitr_wal(storage, "push", CLUSTER, str(wal / segments[0].name)).returncode <= 125
    assert fingerprint(storage.repository) == before
    # Everything else ends recovery, whatever it is.
    failures: list[Callable[[], Any]] = [
        segments[2].unlink,
        lambda: cut(segments[3]),
        (storage.repository / "pitr-repository.json").unlink,
        lambda: shutil.rmtree(storage.repository),
        (Path(storage.wal_command).parent / f"{CLUSTER}.json").unlink,
        lambda: shutil.rmtree(Path(storage.wal_command).parent / "lib"),
    ]
    names = [segments[2].name, segments[3].name, *["0000000100000000000000FF"] * 4]
    for damage, name in zip(failures, names, strict=True):
        damage()
        result = pitr_wal(storage, "get", CLUSTER, name, target)
        assert result.returncode > 125, (name, result)
        assert result.stderr
    for arguments in ((), ("get",), ("get", CLUSTER), ("get", "nobody", "x", target), ("get", CLUSTER, "../x", target)):
        assert pitr_wal(storage, *arguments).returncode not in (0, 1) or not arguments
    for arguments in (("push",), ("push", CLUSTER), ("push", CLUSTER, str(wal / "nowhere")), ("hold", CLUSTER, "x")):
        assert 1 <= pitr_wal(storage, *arguments).returncode <= 125


def test_command_does_not_read_the_environment_of_the_server(history: History, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    trap.mkdir()
    for name in ("json", "zlib", "errors", "sitecustomize"):
        (trap / f"{name}.py").write_text("raise SystemExit(1)\n", encoding="ascii")
    target = str(tmp_path / "RECOVERYXLOG")
    name = history.storage.segments()[0].name
    storage = history.storage
    result = pitr_wal(storage, "get", CLUSTER, name, target, PYTHONPATH=str(trap), PYTHONHOME=str(trap))
    assert result.returncode == 0, result.stderr


# --- probe and restore point


def test_probe_shows_the_archive_command_that_does_not_work(sandbox: MakeSandbox) -> None:
    primary = sandbox(settings={"archive_command": "test -d /nowhere && cp %p /nowhere/%f"})
    with pytest.raises(PitrError, match="did not arrive") as caught:
        primary.probe(timeout=2)
    assert "test -d /nowhere && cp %p /nowhere/%f" in caught.value.message
    until(lambda: _failures(primary) > 0, "a counted failure")
    with pytest.raises(PitrError, match="last failure: 0000000"):
        primary.probe(timeout=0.1)


def test_probe_is_not_content_with_an_archive_command_that_does_nothing(sandbox: MakeSandbox) -> None:
    primary = sandbox(settings={"archive_command": "true"})
    with pytest.raises(PitrError, match="did not arrive"):
        primary.probe(timeout=1)


def test_probe_refuses_a_server_that_does_not_archive(sandbox: MakeSandbox) -> None:
    primary = sandbox(settings={"archive_mode": "off"})
    with pytest.raises(PitrError, match="archive_mode = off"):
        primary.probe(timeout=1)


def test_probe_compares_the_content(sandbox: MakeSandbox, tmp_path: Path) -> None:
    # Something on the way writes zeros: everybody is content but the probe.
    primary = sandbox(start=False)
    folder = primary.archive
    script = f'd="{folder}/$(echo %f | cut -c1-16)"; mkdir -p "$d" && head -c {SEGMENT_SIZE} /dev/zero > "$d/%f"'
    primary.configure({"archive_command": script})
    primary.server.start()
    with pytest.raises(PitrError, match="has other content than"):
        primary.probe()


def test_restore_point_returns_when_it_is_archived(sandbox: MakeSandbox, restored: Restore) -> None:
    primary = sandbox()
    primary.backup("only")
    primary.commit("before")
    lsn = primary.restore_point("release 1.2")
    # Nothing more is needed: the server may die now.
    primary.server.stop("immediate")
    cluster = restored(primary, {"recovery_target_name": "release 1.2"}).run()
    assert cluster.phase == "before"
    assert cluster.reached.name == "release 1.2"
    assert cluster.reached.lsn == lsn


# --- what the repository tells


def test_archive_info_knows_the_last_commit(sandbox: MakeSandbox) -> None:
    primary = sandbox()
    primary.backup("only")
    commits = [primary.commit(f"phase {number}") for number in range(3)]
    primary.probe()
    info = archive_info(primary.folder, primary.bin_dir)
    assert datetime.datetime.fromisoformat(info["last_commit_time"]) == commits[-1].time
    assert info["last_commit_lsn"] == str(commits[-1].start)
    assert info["last_segment"] == primary.segments()[-1].name
    assert info["segments"] == len(primary.segments())
    assert [item["timeline"] for item in info["timelines"]] == [1]
    assert info["gaps"] == [] and info["unknown_files"] == []


def test_archive_info_lists_holes_and_strange_files(history: History, tmp_path: Path) -> None:
    storage = history.storage.copy(tmp_path / "copy")
    segments = storage.segments()
    for path in segments[3:5]:
        path.unlink()
    (segments[0].parent / "notes.txt").touch()
    info = archive_info(storage.folder)
    names = [segments[3].name, segments[4].name]
    assert info["gaps"] == [{"timeline": 1, "segments": 2, "first": names[0], "last": names[1], "names": names}]
    assert info["timelines"][0]["ranges"] == [
        [segments[0].name, segments[2].name],
        [segments[5].name, segments[-1].name],
    ]
    assert [os.path.basename(path) for path in info["unknown_files"]] == ["notes.txt"]


def test_recovery_windows_tell_what_a_restore_would_do(history: History, tmp_path: Path) -> None:
    storage = history.storage.copy(tmp_path / "copy")
    windows = backup_info(storage.folder)["recovery_windows"]
    assert [(item["backup"], item["restorable"], item["problem"]) for item in windows] == [
        (label, True, "") for label in ("first", "second", "third")
    ]
    for item in windows:
        assert item["from_lsn"] == str(history.backups[item["backup"]].stop_lsn)
        # The two ends of the window are targets that a plan accepts.
        for lsn in (item["from_lsn"],):
            target = {"recovery_target_lsn": lsn, "recovery_target_inclusive": False}
            assert storage.plan(tmp_path / "none", target, backup=item["backup"]).backup.label == item["backup"]
    missing = storage.segment(history.commit("second 2").start)
    missing.unlink()
    cut(next((storage.backups / "third").glob("base.tar*")))
    first, second, third = backup_info(storage.folder)["recovery_windows"]
    assert first["restorable"] and second["restorable"] and not third["restorable"]
    assert missing.name in first["problem"] and missing.name in second["problem"]
    assert "base.tar" in third["problem"]
    assert first["to_lsn"] == second["to_lsn"]
