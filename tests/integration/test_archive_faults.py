# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What breaks while a server archives, and while one fetches.

Each fault ends in the same way: the message names what to mend, nothing half-done looks done, and when the fault is
gone a restore has everything. docs/faults.md lists them all, with the names of the tests.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils import codec
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.plugins.module_utils.info import archive_info, backup_info
from ansible_collections.pgdrill.pitr.plugins.module_utils.install import install
from ansible_collections.pgdrill.pitr.tests.integration.smalldisk import SmallDisk, small_disk
from ansible_collections.pgdrill.pitr.tests.integration.support import (
    CLUSTER,
    SEGMENT_SIZE,
    Restored,
    Sandbox,
    Server,
    Storage,
    cut,
    fingerprint,
    flip,
    pitr_wal,
    until,
)

if TYPE_CHECKING:
    from ansible_collections.pgdrill.pitr.tests.integration.conftest import History

Restore = Callable[..., Restored]
MakeSandbox = Callable[..., Sandbox]

CODECS = ("zstd", "gzip", "lz4")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "small") as disk:
        yield disk


@pytest.fixture
def broken(history: History, tmp_path: Path) -> Storage:
    """A copy of the shared repository to break."""
    return history.storage.copy(tmp_path / "broken")


def _failures(server: Server) -> int:
    return int(server.value("SELECT failed_count FROM pg_stat_archiver"))


def _backlog(server: Server) -> list[str]:
    folder = server.data / "pg_wal" / "archive_status"
    return sorted(path.name.removesuffix(".ready") for path in folder.glob("*.ready"))


def _files(primary: Storage) -> set[str]:
    """Names of everything in the archive, half-written files too."""
    return {path.name for path in primary.archive.rglob("*") if not path.is_dir()}


def _fails(server: Server, count: int = 1) -> None:
    before = _failures(server)
    until(lambda: _failures(server) >= before + count, "a failure that pg_stat_archiver counts")


def _goes_on(primary: Sandbox, restored: Restore, phase: str) -> None:
    """The fault is gone: everything that was held back arrives, and a restore has all of it."""
    primary.commit(phase)
    primary.probe()
    until(lambda: _backlog(primary.server) == [], "an empty backlog")
    assert archive_info(primary.folder)["gaps"] == []
    assert not [name for name in _files(primary) if name.startswith(".")]
    # Every failure was one that PostgreSQL counts: the archiver process was never brought down.
    assert "archiver process" not in primary.server.log_text()
    primary.server.stop()
    assert restored(primary).run().phase == phase


# --- no room


def test_full_archive_keeps_everything_on_the_server_and_goes_on_when_there_is_room(
    sandbox: MakeSandbox, restored: Restore, disk: SmallDisk
) -> None:
    primary = sandbox(repository=disk.path / "repository")
    primary.backup("only")
    primary.probe()
    before = _files(primary)
    disk.fill()
    # Commands write the file themselves, or we do.
    for compression in ("zstd", "gzip"):
        settings = {"repository": str(primary.repository), "compression": compression}
        install(str(Path(primary.wal_command).parent), CLUSTER, settings)
        logged = len(primary.server.log_text())
        primary.commit(f"no room for {compression}")
        primary.fill(2)
        _fails(primary.server)
        lines = primary.server.log_text()[logged:].splitlines()
        said = [line for line in lines if line.startswith("pitr-wal push: ")]
        assert said and all(str(primary.archive) in line and "No space left on device" in line for line in said), said
        assert {name for name in _files(primary) if not name.startswith(".")} == before
    assert len(_backlog(primary.server)) >= 4
    disk.free()
    _goes_on(primary, restored, "room again")


def test_archive_without_a_free_inode_for_the_link_keeps_everything_on_the_server(
    sandbox: MakeSandbox, restored: Restore, disk: SmallDisk
) -> None:
    primary = sandbox(repository=disk.path / "repository")
    primary.backup("only")
    primary.probe()
    before = _files(primary)
    # The temporary file takes the last one; the link to the segment's name finds none.
    disk.fill_names(leave=1)
    primary.commit("no names")
    primary.fill(2)
    _fails(primary.server)
    assert "No space left on device" in primary.server.log_text()
    assert {name for name in _files(primary) if not name.startswith(".")} == before
    disk.free()
    _goes_on(primary, restored, "names again")


def test_full_archive_stops_a_backup_by_name_and_leaves_none_that_looks_done(
    sandbox: MakeSandbox, restored: Restore, disk: SmallDisk
) -> None:
    primary = sandbox(repository=disk.path / "repository")
    primary.backup("first")
    disk.fill(leave=200_000)
    with pytest.raises(PitrError, match="No space left on device"):
        primary.backup("second")
    assert sorted(os.listdir(primary.backups)) == ["first"]
    assert [item["label"] for item in backup_info(primary.folder)["backups"]] == ["first"]
    disk.free()
    primary.backup("third")
    _goes_on(primary, restored, "room again")


def test_full_pg_wal_stops_the_recovery_and_it_goes_on_when_there_is_room(
    history: History, restored: Restore, disk: SmallDisk
) -> None:
    cluster = restored(history.storage, backup="first")
    pg_wal = cluster.server.data / "pg_wal"
    shutil.move(pg_wal, disk.path / "pg_wal")
    pg_wal.symlink_to(disk.path / "pg_wal")
    # Room for a few segments: the recovery keeps what it has replayed until its next restartpoint.
    disk.fill(leave=5 * 1024 * 1024 // 2)
    cluster.server.start(wait=False)
    with pytest.raises(PitrError, match="not been promoted") as caught:
        cluster.wait()
    assert "pitr-wal get: " in caught.value.message and "RECOVERYXLOG" in caught.value.message
    assert "No space left on device" in caught.value.message or "Is the filesystem full?" in caught.value.message
    assert "selected new timeline ID" not in cluster.server.log_text()
    disk.free()
    cluster.run()
    assert cluster.phase == "end"


# --- the archive cannot be written, or is something else


def _no_permission(primary: Sandbox, _disk: SmallDisk) -> Callable[[], None]:
    folders = [path for path in (primary.archive, *primary.archive.iterdir()) if path.is_dir()]
    for path in folders:
        path.chmod(0o500)
    return lambda: [path.chmod(0o700) for path in folders] and None


def _mounted_read_only(primary: Sandbox, disk: SmallDisk) -> Callable[[], None]:
    writable = os.readlink(primary.repository)

    def mount(target: Path | str) -> None:
        primary.repository.unlink()
        primary.repository.symlink_to(target)

    mount(disk.read_only / "repository")
    return lambda: mount(writable)


def _file_instead_of(find: Callable[[Sandbox], Path]) -> Callable[[Sandbox, SmallDisk], Callable[[], None]]:
    def replace(primary: Sandbox, _disk: SmallDisk) -> Callable[[], None]:
        path = find(primary)
        aside = path.with_name(f".aside-{path.name}")
        path.rename(aside)
        path.write_text("not a directory\n", encoding="ascii")

        def back() -> None:
            path.unlink()
            aside.rename(path)

        return back

    return replace


def _not_mounted(primary: Sandbox, _disk: SmallDisk) -> Callable[[], None]:
    """Only the cluster's folder is gone: one that is mounted below the repository."""
    cluster = primary.repository / CLUSTER
    aside = primary.repository / "aside"
    cluster.rename(aside)
    cluster.mkdir()

    def back() -> None:
        cluster.rmdir()
        aside.rename(cluster)

    return back


PLACES = {
    "no permission": (_no_permission, "Permission denied"),
    "read-only filesystem": (_mounted_read_only, "Read-only file system"),
    "cluster not mounted": (_not_mounted, "has no cluster 'main'"),
    "file instead of the repository": (_file_instead_of(lambda primary: primary.repository), "Not a directory"),
    "file instead of the archive": (_file_instead_of(lambda primary: primary.archive), "Not a directory"),
    "file instead of a folder": (
        _file_instead_of(lambda primary: next(path for path in primary.archive.iterdir() if path.is_dir())),
        "Not a directory",
    ),
}


def test_archive_that_cannot_be_written_or_is_something_else_loses_nothing(
    sandbox: MakeSandbox, restored: Restore, disk: SmallDisk, tmp_path: Path
) -> None:
    (disk.path / "repository").mkdir()
    repository = tmp_path / "mounted"
    repository.symlink_to(disk.path / "repository")
    primary = sandbox(repository=repository)
    primary.backup("only")
    for place, (fault, message) in PLACES.items():
        primary.commit(f"before {place}")
        primary.probe()
        newest = primary.segments()[-1].name
        logged = len(primary.server.log_text())
        repair = fault(primary, disk)
        before = fingerprint(disk.path / "repository")
        primary.commit(f"during {place}")
        primary.fill(1)
        _fails(primary.server)
        said = [line for line in primary.server.log_text()[logged:].splitlines() if line.startswith("pitr-wal push: ")]
        assert said and all(message in line for line in said), (place, said)
        # What can be read is read; of what cannot, nobody says that it is not there.
        readable = place in ("read-only filesystem", "no permission")
        got = pitr_wal(primary, "get", CLUSTER, newest, str(tmp_path / "RECOVERYXLOG"))
        assert got.returncode == 0 if readable else got.returncode > 125, (place, got)
        if not readable:
            assert message in got.stderr or "Is its filesystem mounted?" in got.stderr, (place, got)
            got = pitr_wal(primary, "get", CLUSTER, "0000000100000000000000FF", str(tmp_path / "RECOVERYXLOG"))
            assert got.returncode > 125, (place, got)
        assert fingerprint(disk.path / "repository") == before, place
        repair()
    _goes_on(primary, restored, "afterwards")


def test_archive_whose_own_filesystem_is_not_mounted_is_no_empty_archive(
    broken: Storage, restored: Restore, tmp_path: Path
) -> None:
    """The repository's marker is there; what is missing is mounted below it."""
    cluster = restored(broken)
    aside = tmp_path / "aside"
    archive = broken.archive
    shutil.move(archive, aside)
    archive.mkdir()
    cluster.server.start(wait=False)
    with pytest.raises(PitrError, match="is empty, but there are backups") as caught:
        cluster.wait()
    assert "not been promoted" in caught.value.message
    archive.rmdir()
    shutil.move(aside, archive)
    cluster.run()
    assert cluster.phase == "end"


# --- two of them


def test_several_archivers_of_the_same_segments_at_once_all_succeed_and_store_each_once(
    sandbox: MakeSandbox, restored: Restore, tmp_path: Path
) -> None:
    primary = sandbox()
    primary.backup("only")
    # The server's own archiver comes last.
    library = Path(primary.wal_command).parent / f"{CLUSTER}.json"
    library.rename(library.with_name("away"))
    primary.commit("by many")
    primary.fill(4)
    waiting = [name for name in _backlog(primary.server) if len(name) == 24]
    assert len(waiting) >= 4
    codes: list[int] = []
    library.with_name("away").rename(library)

    def archive(names: list[str]) -> None:
        for name in names:
            codes.append(pitr_wal(primary, "push", CLUSTER, str(primary.server.data / "pg_wal" / name)).returncode)

    others = [threading.Thread(target=archive, args=(order,)) for order in (waiting, waiting[::-1], waiting)]
    for thread in others:
        thread.start()
    primary.fill(1)
    for thread in others:
        thread.join()
    assert codes == [0] * (3 * len(waiting))
    _goes_on(primary, restored, "by many")


def test_history_file_with_other_content_is_refused_and_the_first_branch_can_be_restored(
    sandbox: MakeSandbox, restored: Restore
) -> None:
    """Two restored copies of one cluster are accepted: both believe to be timeline 2."""
    primary = sandbox()
    primary.backup("only")
    early = primary.commit("early")
    primary.fill(1)
    late = primary.commit("late")
    primary.probe()
    primary.server.stop()
    first, second = (
        restored(primary, {"recovery_target_xid": str(commit.xid)}, archive_after="none-until-promoted").run()
        for commit in (late, early)
    )
    first.recovery.accept()
    first.server.sql("UPDATE status SET phase = 'first branch'")
    first.server.sql("SELECT pg_switch_wal()")
    until(lambda: _backlog(first.server) == [], "the first branch's WAL in the archive")
    before = fingerprint(primary.repository)
    with contextlib.suppress(PitrError):
        second.recovery.accept()
    second.server.sql("UPDATE status SET phase = 'second branch'")
    second.server.sql("SELECT pg_switch_wal()")
    _fails(second.server)
    log = second.server.log_text()
    assert f"{primary.archive}/00000002.history exists with other content, unchanged" in log
    assert "Find out which one owns it" in log
    assert fingerprint(primary.repository) == before
    assert "00000002.history" in _backlog(second.server)
    first.server.stop()
    second.server.stop()
    assert restored(primary).run().phase == "first branch"


def test_foreign_cluster_with_names_of_its_own_is_refused(
    sandbox: MakeSandbox, bin_dir: str, stranger: Path, tmp_path: Path, restored: Restore
) -> None:
    """Nothing collides, so that only the system identifier in the segments tells them apart."""
    primary = sandbox()
    primary.backup("only")
    primary.commit("ours")
    primary.probe()
    other = Sandbox(bin_dir, tmp_path / "other", stranger, settings={"archive_command": primary.archive_command})
    done = other.server.program("pg_resetwal", "-l", "0000000100000005000000A0", "-D", str(other.server.data))
    assert done.returncode == 0, done.stderr
    before = fingerprint(primary.repository)
    try:
        other.server.start()
        other.fill(2)
        _fails(other.server)
        assert "0000000100000005000000A" in " ".join(_backlog(other.server))
        log = other.server.log_text()
        assert f"was written by the cluster with system identifier {other.server.system_identifier}" in log
        assert f"the archive belongs to {primary.server.system_identifier}" in log
        with pytest.raises(PitrError, match="belongs to the cluster with system identifier"):
            other_backup = Storage(bin_dir, tmp_path / "theirs", primary.repository)
            other_backup.folder.require(other.server.system_identifier)
    finally:
        other.server.close()
    assert fingerprint(primary.repository) == before
    _goes_on(primary, restored, "still ours")


# --- what is stored is damaged


def _content(path: Path) -> bytes:
    with codec.open_reader(str(path)) as reader:
        return reader.read()


def _store(path: Path, content: bytes, compression: str) -> None:
    """Write a segment anew, with another compression."""
    path.unlink()
    with codec.open_writer(str(path), compression) as writer:
        writer.write(content)


def _trailer(path: Path) -> None:
    """The checksum of the content: the last 4 bytes of zstd and lz4, of gzip those before its size."""
    gzip = path.read_bytes()[:2] == b"\x1f\x8b"
    flip(path, path.stat().st_size - (6 if gzip else 2))


def _length(path: Path) -> None:
    """gzip tells the size of the content in its last 4 bytes."""
    flip(path, path.stat().st_size - 2)


def _middle(path: Path) -> None:
    flip(path, path.stat().st_size // 2)


def _no_trailer(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 4)


def _more(path: Path) -> None:
    with open(path, "ab") as stream:
        stream.write(b"more than there was")


DAMAGES: dict[str, Callable[[Path], None]] = {
    "bad checksum": _trailer,
    "bad length": _length,
    "flipped bit": _middle,
    "no trailer": _no_trailer,
    "more bytes": _more,
    "half": cut,
    "three bytes": lambda path: os.truncate(path, 3),
    "zero length": lambda path: cut(path, 0),
}


@pytest.mark.parametrize("compression", CODECS)
def test_damaged_stored_segment_is_named_is_never_delivered_and_never_taken_for_archived(
    history: History, broken: Storage, tmp_path: Path, compression: str
) -> None:
    segment = broken.segments()[2]
    # Noise behind the first page: where everything is zero, another distance in a gzip stream means the same bytes.
    content = _content(segment)[:8192] + random.Random(1).randbytes(SEGMENT_SIZE - 8192)
    original = tmp_path / "pg_wal" / segment.name
    original.parent.mkdir()
    original.write_bytes(content)
    target = tmp_path / "RECOVERYXLOG"
    for name, damage in DAMAGES.items():
        _store(segment, content, compression)
        damage(segment)
        before = fingerprint(broken.repository)
        got = pitr_wal(broken, "get", CLUSTER, segment.name, str(target))
        assert got.returncode > 125, (name, got)
        assert str(segment) in got.stderr and "is damaged" in got.stderr, (name, got)
        assert not target.exists() and not list(tmp_path.glob("RECOVERYXLOG*")), name
        pushed = pitr_wal(broken, "push", CLUSTER, str(original))
        assert 1 <= pushed.returncode <= 125, (name, pushed)
        assert "is damaged" in pushed.stderr and str(segment) in pushed.stderr, (name, pushed)
        assert "Two servers" not in pushed.stderr, (name, pushed)
        assert fingerprint(broken.repository) == before, name
    _store(segment, content, compression)
    assert pitr_wal(broken, "get", CLUSTER, segment.name, str(target)).returncode == 0
    assert target.read_bytes() == content
    assert pitr_wal(broken, "push", CLUSTER, str(original)).returncode == 0


@pytest.mark.parametrize("compression", CODECS)
def test_bad_checksum_of_a_segment_stops_the_recovery(
    history: History, broken: Storage, restored: Restore, compression: str
) -> None:
    cluster = restored(broken)
    segment = broken.segment(history.commit("third 2").start)
    content = _content(segment)
    _store(segment, content, compression)
    _trailer(segment)
    cluster.server.start(wait=False)
    with pytest.raises(PitrError, match=segment.name) as caught:
        cluster.wait()
    assert "is damaged" in caught.value.message and "not been promoted" in caught.value.message
    assert "selected new timeline ID" not in cluster.server.log_text()
    _store(segment, content, compression)
    cluster.run()
    assert cluster.phase == "end"


# --- what is stored is not there


def test_missing_history_file_stops_the_recovery_of_its_timeline(sandbox: MakeSandbox, restored: Restore) -> None:
    primary = sandbox()
    primary.backup("only")
    primary.commit("one")
    primary.probe()
    primary.server.stop()
    branch = restored(primary, archive_after="same").run()
    branch.recovery.accept()
    primary.server = branch.server
    primary.commit("two")
    primary.probe()
    primary.server.stop()
    cluster = restored(primary)
    assert cluster.plan.timeline == 2
    (primary.archive / "00000002.history").unlink()
    kept = primary.server.data / "pg_wal" / "00000002.history"
    cluster.server.start(wait=False)
    with pytest.raises(PitrError, match=r"00000002\.history is missing from") as caught:
        cluster.wait()
    assert "Copy it back from a server's pg_wal" in caught.value.message
    # Without the refusal it would have followed timeline 1 and lost "two" in silence.
    assert "selected new timeline ID" not in cluster.server.log_text()
    done = pitr_wal(primary, "push", CLUSTER, str(kept))
    assert done.returncode == 0, done.stderr
    cluster.run()
    assert cluster.phase == "two"


def test_end_of_the_archive_is_an_end_and_a_gap_is_none(
    history: History, broken: Storage, restored: Restore, tmp_path: Path
) -> None:
    last = broken.segment(history.commit("end").start)
    for path in broken.segments():
        if path.name >= last.name:
            path.unlink()
    gap = broken.segment(history.commit("third 2").start)
    content = gap.read_bytes()
    # At the end: absent, and a recovery is complete with what is there.
    assert pitr_wal(broken, "get", CLUSTER, last.name, str(tmp_path / "x")).returncode == 1
    cluster = restored(broken).run()
    assert cluster.phase == history.before("end")
    assert "selected new timeline ID" in cluster.server.log_text()
    # In the middle: an error that names both sides, of the command, of the plan, and of a recovery under way.
    stopped = restored(broken)
    gap.unlink()
    got = pitr_wal(broken, "get", CLUSTER, gap.name, str(tmp_path / "x"))
    assert got.returncode > 125 and gap.name in got.stderr and "the archive has a hole" in got.stderr
    with pytest.raises(PitrError, match=gap.name):
        broken.plan(tmp_path / "none")
    stopped.server.start(wait=False)
    with pytest.raises(PitrError, match=f"{gap.name} is missing from .*the archive has a hole"):
        stopped.wait()
    gap.write_bytes(content)
    assert stopped.run().phase == history.before("end")


# --- what others have left


def test_stale_temporary_files_harm_nobody_and_are_taken_for_nothing(
    history: History, broken: Storage, restored: Restore, tmp_path: Path
) -> None:
    segment = broken.segments()[3]
    half = segment.read_bytes()[:1000]
    stale = [
        segment.with_name(f".{segment.name}.4242.deadbeef.tmp"),
        segment.with_name(f".{segment.name[:-2]}FF.4242.deadbeef.tmp"),
        broken.archive / ".00000009.history.4242.deadbeef.tmp",
        broken.repository / CLUSTER / ".cluster.json.4242.deadbeef.tmp",
    ]
    for path in stale:
        path.write_bytes(half)
    # A backup that was complete but for the rename: not yet one, and not to be seen.
    shutil.copytree(broken.backups / "third", broken.backups / ".fourth.partial")
    before = fingerprint(*stale)
    assert [item["label"] for item in backup_info(broken.folder)["backups"]] == ["first", "second", "third"]
    info = archive_info(broken.folder)
    assert info["last_segment"] == broken.segments()[-1].name and info["gaps"] == []
    assert [item["timeline"] for item in info["timelines"]] == [1]
    # What nobody has stored stays absent, whatever lies beside it.
    assert pitr_wal(broken, "get", CLUSTER, f"{segment.name[:-2]}FF", str(tmp_path / "x")).returncode == 1
    assert pitr_wal(broken, "get", CLUSTER, "00000009.history", str(tmp_path / "x")).returncode == 1
    cluster = restored(broken)
    # Of a fetch that was killed: longer than what comes after it.
    (cluster.server.data / "pg_wal" / "RECOVERYXLOG.pitr").write_bytes(bytes(3_000_000))
    (cluster.server.data / "pg_wal" / "RECOVERYXLOG").write_bytes(bytes(3_000_000))
    cluster.run()
    assert cluster.phase == "end"
    assert not (cluster.server.data / "pg_wal" / "RECOVERYXLOG.pitr").exists()
    assert fingerprint(*stale) == before


# --- clocks


def test_times_of_stored_files_mean_nothing(history: History, broken: Storage, restored: Restore) -> None:
    """A clock that was set back, a copy that has not kept the times: positions decide, not times."""
    for number, path in enumerate(sorted(broken.repository.rglob("*"), reverse=True)):
        when = (0, 4_000_000_000, 1_000_000_000 - number)[number % 3]
        os.utime(path, (when, when))
    target = {"recovery_target_xid": str(history.commit("third 2").xid)}
    assert restored(broken, target).run().phase == "third 2"
    assert restored(broken).run().phase == "end"
    assert [item["restorable"] for item in backup_info(broken.folder)["recovery_windows"]] == [True] * 3
    assert archive_info(broken.folder)["gaps"] == []


def test_backup_taken_after_the_clock_was_set_back_is_still_the_newest(
    history: History, broken: Storage, restored: Restore
) -> None:
    document = broken.backups / "third" / "backup.json"
    description = json.loads(document.read_text(encoding="utf-8"))
    description["started_at"], description["stopped_at"] = "2001-01-01T00:00:00+00:00", "2001-01-01T00:00:01+00:00"
    document.write_text(json.dumps(description), encoding="utf-8")
    cluster = restored(broken).run()
    assert cluster.plan.backup.label == "third"
    assert cluster.phase == "end"
    early = restored(broken, {"recovery_target_xid": str(history.commit("first 2").xid)})
    assert early.plan.backup.label == "first"
    assert early.run().phase == "first 2"


# --- the caller


def test_fast_shutdown_with_a_backlog_and_a_slow_archive_loses_nothing(sandbox: MakeSandbox, restored: Restore) -> None:
    """A shutdown lets the archiver finish, or ends it in the middle; both leave what the next start needs."""
    primary = sandbox()
    primary.backup("only")
    for number, mode in enumerate(("fast", "immediate", "fast", "immediate")):
        primary.commit(f"before {mode} {number}")
        primary.fill(3)
        primary.server.stop(mode)
        before = _files(primary)
        assert all(_content(path) for path in primary.segments())
        primary.server.start()
        assert before - _files(primary) <= {name for name in before if name.startswith(".")}
    for path in primary.archive.rglob(".*.tmp"):
        path.unlink()
    primary.commit("after all")
    primary.probe()
    until(lambda: _backlog(primary.server) == [], "an empty backlog")
    assert archive_info(primary.folder)["gaps"] == []
    primary.server.stop()
    assert restored(primary).run().phase == "after all"


def test_host_without_a_free_process_is_no_end_of_the_archive(
    history: History, broken: Storage, tmp_path: Path
) -> None:
    """Shells end with 2 when they cannot fork, which PostgreSQL would take for the end of the archive."""
    segment = broken.segments()[2]
    (tmp_path / segment.name).write_bytes(_content(segment))
    for arguments, low, high in (
        (("get", CLUSTER, segment.name, str(tmp_path / "RECOVERYXLOG")), 126, 255),
        (("push", CLUSTER, str(tmp_path / segment.name)), 1, 125),
    ):
        done = subprocess.run(
            [broken.wal_command, *arguments],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NPROC, (1, 1)),
        )  # fmt: skip
        assert low <= done.returncode <= high, (arguments, done)
        assert "fork" in done.stderr
    assert not (tmp_path / "RECOVERYXLOG").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_signal_ends_get_above_125_and_push_below_126(
    history: History, broken: Storage, tmp_path: Path, number: signal.Signals
) -> None:
    """Somebody ends the interpreter, but not the launcher: the exit codes stay those that PostgreSQL reads right."""
    segment = broken.segments()[2]
    original = tmp_path / segment.name
    original.write_bytes(_content(segment))
    segment.unlink()
    # A named pipe is a file that never comes to its end.
    os.mkfifo(segment)
    os.mkfifo(tmp_path / "pg_wal")
    slow = {
        "get": [broken.wal_command, "get", CLUSTER, segment.name, str(tmp_path / "RECOVERYXLOG")],
        "push": [broken.wal_command, "push", CLUSTER, str(original)],
    }
    for verb, argv in slow.items():
        # Who runs the tests in the background of a shell lets SIGINT be ignored by all that they start.
        heed = (lambda: signal.signal(number, signal.SIG_DFL)) if number != signal.SIGKILL else None
        with subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            preexec_fn=heed,  # type: ignore[arg-type]
        ) as launcher:
            children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
            until(lambda: "python" in _command_line(children), "the interpreter")  # noqa: B023
            os.kill(int(children.read_text().split()[0]), number)
            launcher.communicate(timeout=30)
        if verb == "get":
            assert launcher.returncode > 125
        else:
            assert 1 <= launcher.returncode <= 125
    # What a kill has left under another name the next call removes.
    assert not (tmp_path / "RECOVERYXLOG").exists()


def _command_line(children: Path) -> str:
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{children.read_text().split()[0]}/cmdline").read_text(encoding="utf-8", errors="replace")
    return ""
