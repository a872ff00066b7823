# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What breaks while a restore or a recovery is under way.

Nothing is lost, nothing half-done looks done, and the file that is to blame is named.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils import codec
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.plugins.module_utils.postgres import control_data
from ansible_collections.pgdrill.pitr.plugins.module_utils.request import Request
from ansible_collections.pgdrill.pitr.plugins.module_utils.restore import Restore as Engine
from ansible_collections.pgdrill.pitr.tests.integration.support import (
    SEGMENT_SIZE,
    Restored,
    Sandbox,
    Server,
    Storage,
    cut,
    fingerprint,
    flip,
    in_child,
    refuses_to_start,
    until,
)

if TYPE_CHECKING:
    from ansible_collections.pgdrill.pitr.tests.integration.conftest import History

Restore = Callable[..., Restored]


@pytest.fixture
def broken(history: History, tmp_path: Path) -> Storage:
    """A copy of the shared repository to break."""
    return history.storage.copy(tmp_path / "broken")


def _execute(request: Request) -> None:
    engine = Engine(request)
    engine.execute(engine.plan())


# --- the backup is damaged


def _base(storage: Storage, label: str) -> Path:
    return next((storage.backups / label).glob("base.tar*"))


def _damage_base(storage: Storage) -> str:
    path = _base(storage, "third")
    flip(path, path.stat().st_size // 2)
    return path.name


def _damage_manifest(storage: Storage) -> str:
    path = storage.backups / "third" / "backup_manifest"
    flip(path, path.stat().st_size // 2)
    return path.name


def _swap(storage: Storage, *names: str) -> None:
    """Put another backup's files in place, with the description changed to fit as far as a look at sizes goes."""
    path = storage.backups / "third" / "backup.json"
    description = json.loads(path.read_text(encoding="utf-8"))
    for file in description["files"]:
        if file["name"].startswith(names):
            shutil.copyfile(storage.backups / "first" / file["name"], storage.backups / "third" / file["name"])
            file["size"] = (storage.backups / "third" / file["name"]).stat().st_size
    path.write_text(json.dumps(description), encoding="utf-8")


def _swap_base(storage: Storage) -> str:
    _swap(storage, "base.tar")
    return "checksum mismatch"


def _swap_all(storage: Storage) -> str:
    """These fit together; only that they are not the ones that were stored can be noticed."""
    _swap(storage, "base.tar", "backup_manifest")
    return "backup_manifest is not the file that was stored"


@pytest.mark.parametrize("damage", [_damage_base, _damage_manifest, _swap_base, _swap_all])
def test_damaged_backup_is_noticed_and_the_old_directory_is_back_and_starts(
    broken: Storage, own_data: Path, server: Callable[[Path], Server], damage: Callable[[Storage], str]
) -> None:
    named = damage(broken)
    before = fingerprint(own_data.parent)
    with pytest.raises(PitrError) as caught:
        _execute(broken.request(own_data, force=True))
    assert named in caught.value.message
    assert fingerprint(own_data.parent) == before
    old = server(own_data)
    old.start()
    assert old.phase == "end"


@pytest.mark.parametrize("there", [False, True])
def test_damaged_backup_leaves_nothing_where_nothing_was(broken: Storage, tmp_path: Path, there: bool) -> None:
    _damage_base(broken)
    data = tmp_path / "new" / "data"
    data.parent.mkdir()
    if there:
        data.mkdir(mode=0o700)
    before = fingerprint(data.parent)
    with pytest.raises(PitrError):
        _execute(broken.request(data))
    assert fingerprint(data.parent) == before


def test_byte_flipped_in_an_uncompressed_backup_is_noticed_by_its_checksum(
    sandbox: Callable[..., Sandbox], tmp_path: Path
) -> None:
    primary = sandbox()
    marker = "tests-" + "needle" * 20
    primary.server.sql(f"CREATE TABLE precious AS SELECT '{marker}'::text AS v")
    primary.backup("plain", compression="none")
    primary.server.stop()
    path = _base(primary, "plain")
    flip(path, path.read_bytes().index(marker.encode()))
    with pytest.raises(PitrError, match="checksum mismatch"):
        _execute(primary.request(tmp_path / "new"))
    # Without the check the damage would have been restored: it is this check that has found it.
    _execute(primary.request(tmp_path / "new", verify=False))


def test_full_disk_leaves_the_old_directory_in_its_place(history: History, own_data: Path) -> None:
    before = fingerprint(own_data.parent)
    # A limit of the size of a file is what a test can have without a filesystem of its own.
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"
    done = in_child(history.storage.request(own_data, force=True), limit)
    assert done.returncode != 0
    assert "too large" in done.stderr, done.stderr
    assert fingerprint(own_data.parent) == before


# --- killed


def _below(top: Path) -> dict[str, str]:
    """The fingerprint of a directory, wherever it is."""
    return {name.removeprefix(str(top)): value for name, value in fingerprint(top).items()}


def _kill_points(total: int, part: str) -> list[int]:
    if part == "beginning":
        return list(range(1, 9))
    if part == "end":
        return list(range(total - 11, total + 1))
    chosen = random.Random(7).sample(range(9, total - 11), 6)
    return sorted(chosen)


@pytest.mark.parametrize("part", ["beginning", "middle", "end"])
def test_killed_restore_loses_nothing_and_can_be_repeated(history: History, tmp_path: Path, part: str) -> None:
    bin_dir = history.storage.bin_dir

    def directory(name: str) -> Path:
        data = tmp_path / name / "data"
        data.parent.mkdir()
        shutil.copytree(history.data, data)
        return data

    counted = in_child(history.storage.request(directory("counted"), force=True))
    assert counted.returncode == 0, counted.stderr
    untouched = _below(history.data)
    for at in _kill_points(int(counted.stdout), part):
        data = directory(f"killed{at}")
        request = history.storage.request(data, force=True)
        killed = in_child(request, at=at)
        assert killed.returncode == -signal.SIGKILL, (at, killed.stderr)
        aside = list(data.parent.glob("data.old-*"))
        original = aside[0] if aside else data
        assert _below(original) == untouched, at
        complete = (data / "recovery.signal").exists() and (data / "global" / "pg_control").exists()
        if aside and data.exists() and not complete:
            assert refuses_to_start(bin_dir, data), at
        # The repetition knows what it finds, and what it has replaced is still there afterwards.
        _execute(request)
        assert control_data(bin_dir, str(data)).system_identifier
        assert (data / "recovery.signal").exists()
        assert not list(data.parent.glob("data/pitr-restoring.json"))
        kept = list(data.parent.glob("data.old-*"))
        assert any(not (path / "recovery.signal").exists() and (path / "PG_VERSION").exists() for path in kept), at
        shutil.rmtree(data.parent)


def test_restore_killed_again_while_it_clears_up_can_still_be_repeated(history: History, tmp_path: Path) -> None:
    # Directories have no order; in this one the marker, by which the next try knows what it finds, comes first.
    order = (
        "l = os.listdir; os.listdir = lambda path='.': sorted(l(path), key=lambda name: name != 'pitr-restoring.json')"
    )
    for at in (3, 30, 120):
        data = tmp_path / f"killed{at}" / "data"
        data.parent.mkdir()
        request = history.storage.request(data)
        assert in_child(request, at=300).returncode == -signal.SIGKILL
        assert (data / "pitr-restoring.json").exists()
        assert in_child(request, order, at=at).returncode == -signal.SIGKILL
        assert data.exists()
        _execute(request)
        assert not (data / "pitr-restoring.json").exists()


def test_repeated_restore_still_knows_the_old_directory(
    history: History, own_data: Path, server: Callable[[Path], Server]
) -> None:
    request = history.storage.request(own_data, force=True)
    assert in_child(request, at=200).returncode == -signal.SIGKILL
    assert not (own_data / "global" / "pg_control").exists()
    engine = Engine(request)
    moved_aside = engine.execute(engine.plan()).moved_aside
    old = server(Path(moved_aside))
    old.start()
    assert old.phase == "end"


# --- the archive is damaged while the server replays it


def _flip_middle(path: Path, _storage: Storage) -> None:
    flip(path, path.stat().st_size // 2)


def _cut(path: Path, _storage: Storage) -> None:
    cut(path)


def _empty(path: Path, _storage: Storage) -> None:
    cut(path, 0)


def _delete(path: Path, _storage: Storage) -> None:
    path.unlink()


def _other_position(path: Path, storage: Storage) -> None:
    """A whole segment of the same cluster under the wrong name."""
    shutil.copyfile(storage.segments()[0], path)


def _other_cluster(path: Path, _storage: Storage) -> None:
    with codec.open_reader(str(path)) as reader:
        content = bytearray(reader.read())
    # System identifier of the long page header (XLogLongPageHeaderData): 24 bytes from the beginning.
    content[24:32] = (12345).to_bytes(8, "little")
    path.write_bytes(bytes(content))


def _unreadable(path: Path, _storage: Storage) -> None:
    path.chmod(0)


DAMAGES = [_flip_middle, _cut, _empty, _delete, _other_position, _other_cluster, _unreadable]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_segment_stops_the_recovery_and_a_whole_one_lets_it_go_on(
    history: History, broken: Storage, restored: Restore, damage: Callable[[Path, Storage], None]
) -> None:
    cluster = restored(broken)
    segment = broken.segment(history.commit("third 2").start)
    whole = segment.read_bytes()
    damage(segment, broken)
    cluster.server.start(wait=False)
    with pytest.raises(PitrError, match=segment.name) as caught:
        cluster.wait()
    assert "not been promoted" in caught.value.message
    assert not cluster.server.is_running
    assert "FATAL" in cluster.server.log_text()
    assert "selected new timeline ID" not in cluster.server.log_text()
    # Nothing is lost: with the segment back in its place the same server goes on to the end.
    segment.unlink(missing_ok=True)
    segment.write_bytes(whole)
    cluster.run()
    assert cluster.phase == "end"


def test_repository_that_goes_away_is_no_end_of_the_archive(
    history: History, broken: Storage, restored: Restore
) -> None:
    cluster = restored(broken)
    away = broken.repository.with_name("away")
    broken.repository.rename(away)
    # An unmounted filesystem leaves an empty directory behind.
    broken.repository.mkdir()
    cluster.server.start(wait=False)
    with pytest.raises(PitrError, match="is not a repository"):
        cluster.wait()
    broken.repository.rmdir()
    away.rename(broken.repository)
    cluster.run()
    assert cluster.phase == "end"


def _held(cluster: Restored) -> Path:
    """Start a recovery that stands still at the first commit after the backup; removing this file lets it go on."""
    hold = cluster.server.data / "conf.d" / "zz-slow.conf"
    hold.write_text("recovery_min_apply_delay = '10d'\n", encoding="utf-8")
    cluster.server.start(wait=False)
    until(lambda: cluster.recovery.progress().state == "replaying" and cluster.recovery.progress().lsn, "hot standby")
    return hold


def test_broken_interpreter_of_pitr_wal_is_no_end_of_the_archive(
    history: History, broken: Storage, restored: Restore
) -> None:
    cluster = restored(broken, backup="first")
    hold = _held(cluster)
    library = Path(broken.wal_command).parent / "lib"
    library.rename(library.with_name("away"))
    hold.unlink()
    cluster.server.sql("SELECT pg_reload_conf()")
    # Python itself exits 1 or 2 then, which PostgreSQL would take for the end of the archive.
    with pytest.raises(PitrError, match="not been promoted"):
        cluster.wait()
    assert "selected new timeline ID" not in cluster.server.log_text()


def test_archive_that_ends_before_the_target_is_named_by_the_recovery(
    history: History, broken: Storage, restored: Restore
) -> None:
    cluster = restored(broken, {"recovery_target_xid": str(history.commit("third 3").xid)})
    first = broken.segment(history.commit("third 2").start).name
    for path in broken.segments():
        if path.name >= first:
            path.unlink()
    cluster.server.start(wait=False)
    with pytest.raises(PitrError, match="before configured recovery target was reached"):
        cluster.wait()


def test_killed_server_in_the_middle_of_the_replay_goes_on_where_it_was(
    history: History, broken: Storage, restored: Restore
) -> None:
    cluster = restored(broken)
    hold = _held(cluster)
    pid = int((cluster.server.data / "postmaster.pid").read_text(encoding="utf-8").split()[0])
    os.kill(pid, signal.SIGKILL)
    until(lambda: not cluster.server.is_running, "the end of the server")
    hold.unlink()
    cluster.run()
    assert cluster.phase == "end"


def test_segments_have_the_size_that_these_tests_assume(history: History) -> None:
    assert history.storage.folder.chapter.wal_segment_size == SEGMENT_SIZE
