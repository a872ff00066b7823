# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""push and get: done means stored, absent means proven, and everything else is an error that changes nothing."""

from __future__ import annotations

import errno
import gzip
import multiprocessing
import os
import random
import resource
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils import archive, codec
from ansible_collections.pgdrill.pitr.plugins.module_utils import tree as trees
from ansible_collections.pgdrill.pitr.plugins.module_utils.archive import Absent, get, push
from ansible_collections.pgdrill.pitr.plugins.module_utils.codec import detect, which
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.plugins.module_utils.repository import MARKER, Chapter, ClusterFolder
from ansible_collections.pgdrill.pitr.plugins.module_utils.wal import WalFile
from ansible_collections.pgdrill.pitr.tests.unit.support import (
    CLUSTER,
    MIB,
    SYSTEM,
    history,
    make_repository,
    put,
    segment,
    tree,
    wal_name,
)

CODECS = ["none", "gzip", *(name for name in ("lz4", "zstd") if which(name))]


class Site:
    """One server's pg_wal, the repository, and a directory into which files are fetched."""

    def __init__(self, root: Path) -> None:
        self.pg_wal = root / "pg_wal"
        self.pg_wal.mkdir()
        self.fetched = root / "fetched"
        self.fetched.mkdir()
        self.repository = root / "repository"
        self.folder = make_repository(self.repository)

    @property
    def archive(self) -> Path:
        return Path(self.folder.archive_path())

    def write(self, name: str, content: bytes | str) -> str:
        return put(self.pg_wal, name, content)

    def push(self, path: str, compression: str = "none") -> str:
        return push(path, str(self.repository), CLUSTER, compression)

    def store(self, *numbers: int, timeline: int = 1, compression: str = "none") -> None:
        """Push good segments."""
        for number in numbers:
            self.push(self.write(wal_name(timeline, number), segment(timeline, number)), compression)

    def stored(self, name: str) -> Path:
        return Path(self.folder.wal_path(WalFile.parse(name)))

    def get(self, name: str, system: str | None = None) -> bytes:
        target = self.fetched / "RECOVERYXLOG"
        get(name, str(target), str(self.repository), CLUSTER, system)
        assert os.listdir(self.fetched) == ["RECOVERYXLOG"]
        content = target.read_bytes()
        target.unlink()
        return content

    def refuses_to_get(self, name: str, why: str) -> PitrError:
        with pytest.raises(PitrError, match=why) as caught:
            get(name, str(self.fetched / "RECOVERYXLOG"), str(self.repository), CLUSTER)
        assert os.listdir(self.fetched) == []
        return caught.value

    def refuses_to_push(self, path: str, why: str) -> PitrError:
        before = tree(self.repository)
        with pytest.raises(PitrError, match=why) as caught:
            self.push(path)
        assert tree(self.repository) == before
        return caught.value


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hole in an archive that was written a moment ago is one at once."""
    monkeypatch.setattr(archive, "HOLE_PATIENCE", 0)


# --- push: what is taken


@pytest.mark.parametrize("compression", CODECS)
def test_pushed_segment_comes_back_byte_for_byte(site: Site, compression: str) -> None:
    name, content = wal_name(1, 3), segment(1, 3)
    assert site.push(site.write(name, content), compression) == f"{name} archived"
    assert site.get(name) == content
    stored = site.stored(name).read_bytes()
    # Everything has a checksum of its content, what is not compressed too.
    assert detect(stored[:8]) == {"none": "gzip"}.get(compression, compression)
    assert (len(stored) > MIB) == (compression == "none")
    assert site.stored(name).stat().st_mode & 0o777 == 0o600


def test_all_kinds_of_files_are_archived_and_come_back(site: Site) -> None:
    files = {
        f"{wal_name(1, 3)}.partial": segment(1, 3),
        f"{wal_name(1, 3)}.00000028.backup": b"START WAL LOCATION: 0/300028\n",
        "00000002.history": history((1, "0/350000")).encode(),
    }
    for name, content in files.items():
        site.push(site.write(name, content), "gzip")
    assert {name: site.get(name) for name in files} == files
    # Small files are readable on any host, whatever the compression of segments.
    for name in (f"{wal_name(1, 3)}.00000028.backup", "00000002.history"):
        assert gzip.decompress(site.stored(name).read_bytes()) == files[name]
        assert files[name] in site.stored(name).read_bytes()


@pytest.mark.parametrize("name", [wal_name(1, 3), f"{wal_name(1, 3)}.partial", "00000002.history"])
def test_plain_files_of_an_older_version_stay_readable_and_are_duplicates(site: Site, name: str) -> None:
    content = history((1, "0/350000")).encode() if name.endswith("history") else segment(1, 3)
    put(site.stored(name).parent, name, content)
    before = tree(site.repository)
    assert site.get(name) == content
    assert "was already in the archive" in site.push(site.write(name, content))
    assert tree(site.repository) == before


@pytest.mark.parametrize("name", ["00000002.history", f"{wal_name(1, 3)}.00000028.backup"])
@pytest.mark.parametrize("at", [15, 30, -1, -5])
def test_flipped_bit_in_a_stored_small_file_is_an_error(site: Site, name: str, at: int) -> None:
    site.push(site.write(name, history((1, "0/350000"))))
    content = bytearray(site.stored(name).read_bytes())
    content[at] ^= 1
    site.stored(name).write_bytes(content)
    site.refuses_to_get(name, "is damaged")


def test_segment_that_changes_while_it_is_read_is_not_archived(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    path = site.write(wal_name(1, 3), segment(1, 3))
    real = codec.Storing.finish

    def finish(storing: codec.Storing) -> None:
        real(storing)
        put(site.pg_wal, wal_name(1, 3), segment(1, 3, seed=1))

    monkeypatch.setattr(codec.Storing, "finish", finish)
    with pytest.raises(PitrError, match="was changed while it was read"):
        site.push(path)
    assert os.listdir(site.stored(wal_name(1, 3)).parent) == []


def test_identical_duplicate_succeeds_and_leaves_the_stored_file_untouched(site: Site) -> None:
    path = site.write(wal_name(1, 3), segment(1, 3))
    site.push(path)
    before = tree(site.repository)
    assert "was already in the archive" in site.push(path)
    assert tree(site.repository) == before


@pytest.mark.parametrize("first", CODECS)
@pytest.mark.parametrize("second", CODECS)
def test_identical_duplicate_succeeds_after_a_change_of_compression(site: Site, first: str, second: str) -> None:
    path = site.write(wal_name(1, 3), segment(1, 3))
    site.push(path, first)
    before = tree(site.repository)
    assert "was already in the archive" in site.push(path, second)
    assert tree(site.repository) == before


def test_change_of_compression_leaves_older_segments_readable(site: Site) -> None:
    for number, compression in enumerate(CODECS * 2, 3):
        site.store(number, compression=compression)
    for number in range(3, 3 + 2 * len(CODECS)):
        assert site.get(wal_name(1, number)) == segment(1, number)


def test_duplicate_is_on_stable_storage_before_success_is_said(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first push may have died between the link and the sync of its directory."""
    path = site.write(wal_name(1, 3), segment(1, 3))
    site.push(path)
    synced: list[str] = []
    monkeypatch.setattr(trees, "fsync_directory", synced.append)
    site.push(path)
    assert synced == [str(site.stored(wal_name(1, 3)).parent)]


def test_steps_of_a_push_are_write_sync_link_sync(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.store(3)
    steps: list[str] = []
    real_fsync, real_link = os.fsync, os.link

    def fsync(descriptor: int) -> None:
        is_directory = os.path.isdir(f"/proc/self/fd/{descriptor}")
        steps.append("sync directory" if is_directory else f"sync {os.fstat(descriptor).st_size}")
        real_fsync(descriptor)

    def link(source: str, target: str) -> None:
        assert os.path.basename(source).startswith(".") and os.path.dirname(source) == os.path.dirname(target)
        steps.append("link")
        real_link(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "link", link)
    site.store(4)
    assert steps == [f"sync {site.stored(wal_name(1, 4)).stat().st_size}", "link", "sync directory"]


@pytest.mark.parametrize(
    "name", ["with space", "qu'ote\"s", "per%cent %f", "$HOME;`x`", "ümläut-数据", "-dash", "new\nline"]
)
def test_repository_and_pg_wal_may_have_any_path(tmp_path: Path, name: str) -> None:
    root = tmp_path / name
    root.mkdir()
    site = Site(root)
    site.store(3, compression="gzip")
    assert site.get(wal_name(1, 3)) == segment(1, 3)


@pytest.mark.parametrize("size", [2 * MIB, 16 * MIB])
def test_segments_of_other_sizes_come_back(tmp_path: Path, size: int) -> None:
    make_repository(tmp_path / "r", size=size)
    content = segment(1, 3, size=size)
    path = put(tmp_path / "pg_wal", wal_name(1, 3, size), content)
    push(path, str(tmp_path / "r"), CLUSTER, "gzip")
    get(wal_name(1, 3, size), str(tmp_path / "target"), str(tmp_path / "r"), CLUSTER)
    assert (tmp_path / "target").read_bytes() == content


def test_nothing_stays_open(site: Site) -> None:
    site.store(3, compression="gzip")
    before = len(os.listdir("/proc/self/fd"))
    site.store(3, 4, compression="gzip")
    site.get(wal_name(1, 3))
    site.refuses_to_get(wal_name(1, 2), "hole")
    site.refuses_to_push(site.write(wal_name(1, 4), segment(1, 4, seed=1)), "other content")
    assert len(os.listdir("/proc/self/fd")) == before


def test_relative_path_of_the_server_is_taken(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.write(wal_name(1, 3), segment(1, 3))
    monkeypatch.chdir(site.pg_wal.parent)
    site.push(f"pg_wal/{wal_name(1, 3)}")
    monkeypatch.chdir(site.pg_wal)
    assert "was already" in site.push(wal_name(1, 3))


# --- push: what is refused


def test_different_duplicate_is_refused_and_nothing_changes(site: Site) -> None:
    site.store(3)
    error = site.refuses_to_push(site.write(wal_name(1, 3), segment(1, 3, seed=1)), "exists with other content")
    assert str(site.stored(wal_name(1, 3))) in error.message
    assert site.get(wal_name(1, 3)) == segment(1, 3)


@pytest.mark.parametrize("at", [40, MIB // 2, MIB - 1])
def test_duplicate_that_differs_in_one_byte_is_refused(site: Site, at: int) -> None:
    site.store(3, compression="gzip")
    content = bytearray(segment(1, 3))
    content[at] ^= 1
    site.refuses_to_push(site.write(wal_name(1, 3), bytes(content)), "exists with other content")


@pytest.mark.parametrize("name", [f"{wal_name(1, 3)}.00000028.backup", "00000002.history"])
def test_different_duplicate_of_a_small_file_is_refused(site: Site, name: str) -> None:
    site.push(site.write(name, history((1, "0/350000"))))
    site.refuses_to_push(site.write(name, history((1, "0/350001"))), "exists with other content")
    site.refuses_to_push(site.write(name, history((1, "0/350000"))[:-1]), "exists with other content")


@pytest.mark.parametrize("left", [0, 10_000, MIB - 1])
def test_duplicate_of_a_cut_plain_segment_is_refused_as_damaged_and_not_as_anothers(site: Site, left: int) -> None:
    path = site.write(wal_name(1, 3), segment(1, 3))
    stored = site.stored(wal_name(1, 3))
    put(stored.parent, stored.name, segment(1, 3)[:left])
    error = site.refuses_to_push(path, f"is damaged: it holds {left} bytes instead of {MIB}")
    assert str(stored) in error.message and "Two servers" not in error.message


def test_stored_segment_that_cannot_be_read_is_named_by_both(site: Site) -> None:
    path = site.write(wal_name(1, 3), segment(1, 3))
    stored = site.stored(wal_name(1, 3))
    stored.mkdir(parents=True)
    with pytest.raises(OSError, match="Is a directory") as caught:
        site.push(path)
    assert caught.value.filename == str(stored)
    with pytest.raises(OSError, match="Is a directory"):
        site.get(wal_name(1, 3))


def test_duplicate_of_a_damaged_stored_segment_is_refused_and_names_it(site: Site) -> None:
    site.store(3, compression="gzip")
    stored = site.stored(wal_name(1, 3))
    stored.write_bytes(stored.read_bytes()[:5000])
    error = site.refuses_to_push(str(site.pg_wal / wal_name(1, 3)), "was not archived.*is damaged")
    assert str(stored) in error.message


def test_segment_of_another_cluster_is_refused(site: Site) -> None:
    path = site.write(wal_name(1, 3), segment(1, 3, system=SYSTEM + 1))
    error = site.refuses_to_push(path, "Refused; nothing was changed")
    assert str(SYSTEM) in error.message and str(SYSTEM + 1) in error.message and path in error.message


def test_segment_of_an_older_chapter_is_refused(site: Site) -> None:
    site.folder.chapters.append(Chapter(2, str(SYSTEM + 1), MIB, 19, ""))
    site.folder.save()
    Path(site.folder.archive_path()).mkdir()
    site.refuses_to_push(site.write(wal_name(1, 3), segment(1, 3)), "Refused")


@pytest.mark.parametrize("address", [4 * MIB, 0, 3 * MIB + 8192, (1 << 32) + 3 * MIB])
def test_segment_from_another_position_than_its_name_is_refused(site: Site, address: int) -> None:
    path = site.write(wal_name(1, 3), segment(1, 3, address=address))
    site.refuses_to_push(path, "which is not what its name says")


@pytest.mark.parametrize("partial", ["", ".partial"])
def test_segment_of_another_timeline_than_its_name_is_refused(site: Site, partial: str) -> None:
    path = site.write(wal_name(2, 3) + partial, segment(2, 3, written_on=1))
    site.refuses_to_push(path, r"written on timeline 1, but its name says 2, and there is no 00000002\.history")


@pytest.mark.parametrize("lsn", ["0/300001", "0/350000", "0/3FFFFF"])
@pytest.mark.parametrize("where", ["pg_wal", "archive"])
def test_first_segment_of_a_new_timeline_may_be_a_copy_of_its_parents(site: Site, where: str, lsn: str) -> None:
    past = site.write("00000002.history", history((1, lsn)))
    if where == "archive":
        site.push(past)
        os.unlink(past)
    path = site.write(wal_name(2, 3), segment(2, 3, written_on=1))
    site.push(path)
    if where == "pg_wal":
        site.refuses_to_get(wal_name(2, 3), r"there is no 00000002\.history to explain it")
        site.push(past)
    assert site.get(wal_name(2, 3)) == Path(path).read_bytes()


def test_history_beside_the_target_explains_a_copied_segment(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server has fetched it into pg_wal, where the segment goes too."""
    past = site.write("00000002.history", history((1, "0/350000")))
    site.push(site.write(wal_name(2, 3), segment(2, 3, written_on=1)))
    monkeypatch.chdir(site.fetched)
    for target in (str(site.fetched / "RECOVERYXLOG"), "RECOVERYXLOG"):
        with pytest.raises(PitrError, match="there is no"):
            get(wal_name(2, 3), target, str(site.repository), CLUSTER)
        os.rename(past, site.fetched / "00000002.history")
        get(wal_name(2, 3), target, str(site.repository), CLUSTER)
        os.rename(site.fetched / "00000002.history", past)


def test_two_switches_within_one_segment_leave_the_grandparents_number(site: Site) -> None:
    site.write("00000003.history", history((1, "0/310000"), (2, "0/320000")))
    site.push(site.write(wal_name(3, 3), segment(3, 3, written_on=1)))


@pytest.mark.parametrize(
    ("timeline", "past", "number", "written_on"),
    [
        (2, [(1, "0/250000")], 3, 1),
        (2, [(1, "0/400000")], 3, 1),
        (3, [(1, "0/350000")], 3, 2),
        (3, [(1, "0/250000"), (2, "0/350000")], 3, 1),
        (2, [(1, "0/350000")], 3, 3),
    ],
    ids=["switched-before", "switched-after", "not-an-ancestor", "ancestor-ended-before", "descendant"],
)
def test_header_timeline_that_the_history_does_not_explain_is_refused(
    site: Site, timeline: int, past: list[tuple[int, str]], number: int, written_on: int
) -> None:
    site.write(f"{timeline:08X}.history", history(*past))
    path = site.write(wal_name(timeline, number), segment(timeline, number, written_on=written_on))
    error = site.refuses_to_push(path, f"written on timeline {written_on}, but its name says {timeline}")
    assert "there is no" not in error.message


def test_history_with_a_name_that_is_not_utf8_does_not_stop_archiving(site: Site) -> None:
    """The reason may hold the name of a restore point, in whatever encoding its database had."""
    past = site.write("00000002.history", b'1\t0/350000\tat restore point "caf\xe9 \x85"\n')
    site.push(site.write(wal_name(2, 3), segment(2, 3, written_on=1)))
    site.push(past)
    os.unlink(past)
    site.push(site.write(wal_name(2, 4), segment(2, 4)))
    assert site.get("00000002.history").startswith(b"1\t0/350000")
    assert site.get(wal_name(2, 3)) == segment(2, 3, written_on=1)


@pytest.mark.parametrize("size", [0, 39, 8192, MIB - 1, MIB + 1, 16 * MIB])
def test_segment_of_the_wrong_size_is_refused(site: Site, size: int) -> None:
    content = segment(1, 3)[:size].ljust(size, b"\0")
    site.refuses_to_push(site.write(wal_name(1, 3), content), f"has {size} bytes, a segment of this cluster {MIB}")


def test_segment_that_tells_another_segment_size_is_refused(site: Site) -> None:
    content = bytearray(segment(1, 3))
    content[32:36] = (16 * MIB).to_bytes(4, "little")
    site.refuses_to_push(site.write(wal_name(1, 3), bytes(content)), "byte segments, the archive 1048576")


@pytest.mark.parametrize("content", [bytes(MIB), b"x" * MIB], ids=["zeros", "text"])
def test_file_that_is_no_wal_is_refused(site: Site, content: bytes) -> None:
    site.refuses_to_push(site.write(wal_name(1, 3), content), "is not a WAL segment")


@pytest.mark.parametrize("name", ["00000002.history", f"{wal_name(1, 3)}.00000028.backup"])
def test_file_of_another_clusters_pg_wal_is_refused(site: Site, name: str) -> None:
    """It does not tell whose it is, and would send recoveries along a timeline that is not theirs."""
    control = site.pg_wal.parent / "global" / "pg_control"
    control.parent.mkdir()
    path = site.write(name, history((1, "0/350000")).encode())
    control.write_bytes(struct.pack("=Q", SYSTEM + 1) + bytes(100))
    site.refuses_to_push(path, f"belongs to the cluster with system identifier {SYSTEM + 1}")
    control.write_bytes(struct.pack("=Q", SYSTEM) + bytes(100))
    site.push(path)


@pytest.mark.parametrize(
    "content",
    [b"", bytes(40), b"2\t0/350000\n", gzip.compress(history((1, "0/350000")).encode(), mtime=0)],
    ids=["empty", "zeros", "not-an-ancestor", "compressed"],
)
def test_file_that_is_no_history_is_refused(site: Site, content: bytes) -> None:
    site.refuses_to_push(site.write("00000002.history", content), "is no timeline history file. Refused")


@pytest.mark.parametrize(
    "name", ["postgresql.conf", "archive_status", wal_name(1, 3).lower() + "g", wal_name(1, 3) + ".gz"]
)
def test_name_that_is_no_wal_file_is_refused(site: Site, name: str) -> None:
    site.refuses_to_push(site.write(name, segment(1, 3)), "is not the name of")


def test_source_that_is_not_there_is_an_error(site: Site) -> None:
    site.refuses_to_push(str(site.pg_wal / wal_name(1, 3)), "cannot be read: No such file")


def test_repository_that_is_not_mounted_is_an_error_for_both(site: Site) -> None:
    site.store(3)
    aside = site.repository.with_name("elsewhere")
    site.repository.rename(aside)
    for there in (False, True):
        if there:
            site.repository.mkdir()
        with pytest.raises(PitrError, match="Is its filesystem mounted"):
            site.push(str(site.pg_wal / wal_name(1, 3)))
        site.refuses_to_get(wal_name(1, 3), "Is its filesystem mounted")
        site.refuses_to_get(wal_name(1, 4), "Is its filesystem mounted")
    assert list(site.repository.iterdir()) == []


def test_repository_without_marker_is_an_error_and_never_absent(site: Site) -> None:
    site.store(3)
    (site.repository / MARKER).unlink()
    site.refuses_to_get(wal_name(1, 4), "is not a repository")
    site.refuses_to_push(str(site.pg_wal / wal_name(1, 3)), "is not a repository")


# --- get


def test_segment_behind_the_end_is_absent(site: Site) -> None:
    site.store(3, 4)
    with pytest.raises(Absent):
        site.get(wal_name(1, 5))
    assert os.listdir(site.fetched) == []


@pytest.mark.parametrize("name", [wal_name(1, 1), "00000002.history", "00000001.history", f"{wal_name(1, 1)}.partial"])
def test_everything_is_absent_in_an_empty_archive(site: Site, name: str) -> None:
    with pytest.raises(Absent):
        site.get(name)


def test_hole_in_the_middle_is_an_error_and_names_the_later_segment(site: Site) -> None:
    site.store(3, 5)
    error = site.refuses_to_get(wal_name(1, 4), "the archive has a hole")
    assert wal_name(1, 4) in error.message and wal_name(1, 5) in error.message


@pytest.mark.parametrize("number", [4, 5])
def test_segment_that_comes_in_after_its_successor_is_waited_for(
    site: Site, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Several are pushed at once: the later one may be there first."""
    monkeypatch.setattr(archive, "HOLE_PATIENCE", 30)
    site.store(3, 6)
    late = threading.Timer(0.3, site.store, [number])
    late.start()
    assert site.get(wal_name(1, number)) == segment(1, number)
    late.join()


def test_segment_that_comes_in_while_it_is_proven_absent_is_fetched(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.store(3, 5)
    exists = site.folder.tree.exists

    def now_it_comes(path: str) -> bool:
        if path == str(site.stored(wal_name(1, 4))):
            monkeypatch.setattr(trees.LOCAL, "exists", exists)
            site.store(4)
        return exists(path)

    monkeypatch.setattr(trees.LOCAL, "exists", now_it_comes)
    assert site.get(wal_name(1, 4)) == segment(1, 4)


@pytest.mark.parametrize("age", [-1_000_000, 120, 1_000_000_000])
def test_old_hole_is_not_waited_for(site: Site, monkeypatch: pytest.MonkeyPatch, age: int) -> None:
    monkeypatch.setattr(archive, "HOLE_PATIENCE", 1e9)
    monkeypatch.setattr(archive.time, "sleep", lambda _seconds: pytest.fail("waited"))
    site.store(3, 5)
    when = site.stored(wal_name(1, 5)).stat().st_mtime - age
    os.utime(site.stored(wal_name(1, 5)), (when, when))
    site.refuses_to_get(wal_name(1, 4), "the archive has a hole")


@pytest.mark.parametrize("later", [0x1001, 0x5003])
def test_hole_is_noticed_across_4_gb_folders(site: Site, later: int) -> None:
    site.store(3, later)
    site.refuses_to_get(wal_name(1, 4), wal_name(1, later))


def test_compressed_segment_behind_a_hole_counts(site: Site) -> None:
    site.store(5, compression="gzip")
    site.refuses_to_get(wal_name(1, 4), "hole")


def test_end_at_a_4_gb_border_is_absent(site: Site) -> None:
    site.store(0xFFF)
    with pytest.raises(Absent):
        site.get(wal_name(1, 0x1000))


@pytest.mark.parametrize(
    "name",
    [
        f".{wal_name(1, 5)}.123.abcdef01.tmp",
        f"{wal_name(1, 5)}.partial",
        f"{wal_name(1, 5)}.00000028.backup",
        wal_name(1, 3),
        "README",
    ],
)
def test_file_that_proves_no_later_wal_makes_no_hole(site: Site, name: str) -> None:
    put(site.archive / wal_name(1, 3)[:16], name, b"x")
    with pytest.raises(Absent):
        site.get(wal_name(1, 4))


@pytest.mark.parametrize("name", [f"{wal_name(1, 4)}.partial", f"{wal_name(1, 4)}.00000028.backup"])
def test_file_that_not_every_segment_has_is_absent_among_later_segments(site: Site, name: str) -> None:
    site.store(3, 5)
    with pytest.raises(Absent):
        site.get(name)


def test_later_segment_of_another_timeline_makes_no_hole(site: Site) -> None:
    site.store(3)
    site.write("00000002.history", history((1, "0/350000")))
    site.push(str(site.pg_wal / "00000002.history"))
    site.store(4, 5, timeline=2)
    with pytest.raises(Absent):
        site.get(wal_name(1, 4))


def test_history_of_timeline_1_is_absent_although_it_has_segments(site: Site) -> None:
    site.store(3)
    with pytest.raises(Absent):
        site.get("00000001.history")


def test_missing_history_is_an_error_while_segments_of_its_timeline_are_there(site: Site) -> None:
    put(site.archive / wal_name(2, 3)[:16], wal_name(2, 3), segment(2, 3))
    site.refuses_to_get("00000002.history", r"00000002\.history is missing.*segments of timeline 2 are there")
    with pytest.raises(Absent):
        site.get("00000003.history")


def test_history_is_absent_beside_the_history_of_another_timeline(site: Site) -> None:
    """Names of 16 characters are folders of segments, or history files, which prove nothing about others."""
    put(site.archive, "00000003.history", history((1, "0/350000")))
    with pytest.raises(Absent):
        site.get("00000002.history")


def test_archive_folder_that_is_gone_is_an_error(site: Site) -> None:
    site.archive.rmdir()
    site.refuses_to_get(wal_name(1, 3), "so nothing can be said about")


@pytest.mark.parametrize("name", [wal_name(1, 3), "00000002.history"])
def test_empty_archive_beside_a_backup_is_an_error(site: Site, name: str) -> None:
    """A filesystem of its own, mounted below the repository's marker, is not there."""
    Path(site.folder.backups_path, ".begun.partial").mkdir()
    with pytest.raises(Absent):
        site.get(name)
    Path(site.folder.backups_path, "b1").mkdir()
    site.refuses_to_get(name, "is empty, but there are backups in .*Is its filesystem mounted")
    # The archive of a new chapter may be empty for a while.
    site.folder.chapters.append(Chapter(2, str(SYSTEM + 1), MIB, 19, ""))
    site.folder.save()
    Path(site.folder.archive_path()).mkdir()
    with pytest.raises(Absent):
        site.get(name)


def test_cluster_that_is_gone_is_an_error(site: Site) -> None:
    (Path(site.folder.path) / "cluster.json").unlink()
    site.refuses_to_get(wal_name(1, 3), "has no cluster")


@pytest.mark.parametrize("compression", CODECS)
@pytest.mark.parametrize("left", [0, 3, 40, 5000, -1], ids=lambda left: f"left{left}")
def test_truncated_stored_segment_is_an_error_and_nothing_is_delivered(site: Site, compression: str, left: int) -> None:
    site.store(3, compression=compression)
    stored = site.stored(wal_name(1, 3))
    stored.write_bytes(stored.read_bytes()[:left])
    error = site.refuses_to_get(wal_name(1, 3), "is damaged")
    assert str(stored) in error.message


@pytest.mark.parametrize("compression", CODECS)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_flipped_bit_in_a_stored_segment_is_an_error(site: Site, compression: str, share: float) -> None:
    site.store(3, compression=compression)
    stored = site.stored(wal_name(1, 3))
    content = bytearray(stored.read_bytes())
    content[int(len(content) * share)] ^= 4
    stored.write_bytes(content)
    error = site.refuses_to_get(wal_name(1, 3), "is damaged")
    assert str(stored) in error.message


@pytest.mark.parametrize("content", [b"x" * (MIB + 1), segment(1, 3) + b"\0"], ids=["text", "one-byte-more"])
def test_stored_segment_that_is_too_long_is_an_error(site: Site, content: bytes) -> None:
    put(site.archive / wal_name(1, 3)[:16], wal_name(1, 3), content)
    site.refuses_to_get(wal_name(1, 3), f"holds {MIB + 1} bytes instead of {MIB}")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (segment(1, 3, system=SYSTEM + 1), "was written by the cluster"),
        (segment(1, 4), "is not what its name says"),
        (segment(2, 3), "was written on timeline 2"),
        (bytes(MIB), "is not a WAL segment"),
    ],
    ids=["foreign", "renamed", "timeline", "zeros"],
)
def test_stored_segment_that_is_not_what_its_name_says_is_not_delivered(site: Site, content: bytes, why: str) -> None:
    put(site.archive / wal_name(1, 3)[:16], wal_name(1, 3), content)
    error = site.refuses_to_get(wal_name(1, 3), why)
    assert str(site.stored(wal_name(1, 3))) in error.message


@pytest.mark.parametrize("content", [b"", b"\0" * 20, b"2\t0/350000\n", b"1\t0/3"[:3]])
def test_damaged_history_is_not_delivered(site: Site, content: bytes) -> None:
    put(site.archive, "00000002.history", content)
    site.refuses_to_get("00000002.history", r"00000002\.history")


def test_get_replaces_what_an_earlier_try_has_left(site: Site) -> None:
    site.store(3)
    put(site.fetched, "RECOVERYXLOG", b"old")
    put(site.fetched, "RECOVERYXLOG.pitr", b"half")
    assert site.get(wal_name(1, 3)) == segment(1, 3)


def test_failed_get_leaves_the_older_target_alone(site: Site) -> None:
    site.store(3, 5)
    put(site.fetched, "RECOVERYXLOG", b"old")
    with pytest.raises(PitrError):
        get(wal_name(1, 4), str(site.fetched / "RECOVERYXLOG"), str(site.repository), CLUSTER)
    assert (site.fetched / "RECOVERYXLOG").read_bytes() == b"old"


def test_target_directory_that_is_not_there_is_an_error_and_never_absent(site: Site) -> None:
    site.store(3)
    with pytest.raises(FileNotFoundError):
        get(wal_name(1, 3), str(site.fetched / "gone" / "RECOVERYXLOG"), str(site.repository), CLUSTER)


def test_get_reads_the_chapter_of_the_system_identifier(site: Site) -> None:
    site.store(3)
    site.folder.chapters.append(Chapter(2, str(SYSTEM + 1), MIB, 19, ""))
    site.folder.save()
    Path(site.folder.archive_path()).mkdir()
    with pytest.raises(Absent):
        site.get(wal_name(1, 3))
    assert site.get(wal_name(1, 3), str(SYSTEM)) == segment(1, 3)
    with pytest.raises(PitrError, match="but this one is 42"):
        site.get(wal_name(1, 3), "42")


def test_name_that_no_server_asks_for_is_an_error(site: Site) -> None:
    site.refuses_to_get("RECOVERYXLOG", "is not the name of")
    site.refuses_to_get("../../../etc/passwd", "is not the name of")


# --- several at once


def outcome(function: Callable[[], object]) -> str:
    try:
        function()
    except PitrError as error:
        return error.message
    return ""


def push_when_told(start: object, results: object, path: str, repository: str, compression: str) -> None:
    start.wait()  # type: ignore[attr-defined]
    results.put((path, outcome(lambda: push(path, repository, CLUSTER, compression))))  # type: ignore[attr-defined]


def push_together(site: Site, jobs: list[tuple[str, str]]) -> dict[str, str]:
    """Push every (path, compression) at the same moment, each in a process of its own. What each said, by path."""
    context = multiprocessing.get_context("fork")
    start, results = context.Barrier(len(jobs)), context.SimpleQueue()
    processes = [
        context.Process(target=push_when_told, args=(start, results, path, str(site.repository), compression))
        for path, compression in jobs
    ]
    for process in processes:
        process.start()
    said = dict(results.get() for _process in processes)
    for process in processes:
        process.join()
    return said


@pytest.mark.parametrize("attempt", range(3))
def test_same_segment_pushed_by_several_at_once_is_stored_once_and_all_succeed(site: Site, attempt: int) -> None:
    content = segment(1, 3, seed=attempt)
    jobs = []
    for number in range(6):
        folder = site.pg_wal / str(number)
        jobs.append((put(folder, wal_name(1, 3), content), CODECS[number % len(CODECS)]))
    assert set(push_together(site, jobs).values()) == {""}
    assert os.listdir(site.stored(wal_name(1, 3)).parent) == [wal_name(1, 3)]
    assert site.get(wal_name(1, 3)) == content


@pytest.mark.parametrize("attempt", range(3))
def test_of_different_contents_pushed_at_once_exactly_one_wins(site: Site, attempt: int) -> None:
    contents = {
        put(site.pg_wal / str(n), wal_name(1, 3), segment(1, 3, seed=n)): segment(1, 3, seed=n) for n in range(6)
    }
    said = push_together(site, [(path, CODECS[attempt % len(CODECS)]) for path in contents])
    winners = [path for path, message in said.items() if not message]
    assert len(winners) == 1
    assert all("exists with other content" in message for message in said.values() if message)
    assert site.get(wal_name(1, 3)) == contents[winners[0]]
    assert os.listdir(site.stored(wal_name(1, 3)).parent) == [wal_name(1, 3)]


def test_temporary_files_of_others_are_untouched(site: Site) -> None:
    folder = site.archive / wal_name(1, 3)[:16]
    other = Path(put(folder, f".{wal_name(1, 3)}.999.00000000.tmp", b"of another process"))
    before = other.stat()
    site.store(3)
    site.store(3)
    site.refuses_to_push(site.write(wal_name(1, 3), segment(1, 3, seed=1)), "other content")
    assert other.read_bytes() == b"of another process"
    assert (other.stat().st_ino, other.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


# --- full disks


def in_a_small_filesystem(function: Callable[[], object]) -> str:
    """Run ``function`` in a child whose files may not grow beyond 300 kB; returns what it raised."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
            function()
            os.write(write, b"nothing")
        except BaseException as error:
            os.write(write, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(pid, 0)
    with os.fdopen(read) as stream:
        return stream.read()


@pytest.mark.parametrize("compression", CODECS)
def test_full_archive_leaves_nothing_that_looks_stored(site: Site, compression: str) -> None:
    path = site.write(wal_name(1, 3), segment(1, 3)[:40] + random.Random(1).randbytes(MIB - 40))
    said = in_a_small_filesystem(lambda: site.push(path, compression))
    assert "too large" in said or "Write error" in said, said
    assert os.listdir(site.stored(wal_name(1, 3)).parent) == []
    site.push(path, compression)
    assert site.get(wal_name(1, 3)) == Path(path).read_bytes()


@pytest.mark.parametrize("compression", CODECS)
def test_full_data_directory_leaves_nothing_that_looks_fetched(site: Site, compression: str) -> None:
    site.store(3, compression=compression)
    said = in_a_small_filesystem(lambda: site.get(wal_name(1, 3)))
    assert said.startswith(("OSError: [Errno 27]", "PitrError: ")) and "Absent" not in said, said
    assert os.listdir(site.fetched) == []


def test_link_that_fails_leaves_no_temporary_file(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    path = site.write(wal_name(1, 3), segment(1, 3))
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", fail)
        with pytest.raises(OSError, match="No space"):
            site.push(path)
    assert os.listdir(site.stored(wal_name(1, 3)).parent) == []


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_filesystem_without_hard_links_is_refused_by_name(
    site: Site, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(*_arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", fail)
    with pytest.raises(PitrError, match="has no hard links"):
        site.push(site.write(wal_name(1, 3), segment(1, 3)))
    assert os.listdir(site.stored(wal_name(1, 3)).parent) == []


@pytest.mark.parametrize("step", ["write", "fsync"])
def test_failure_of_the_disk_names_the_file_and_leaves_nothing_that_looks_stored(
    site: Site, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fail(*_arguments: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    path = site.write(wal_name(1, 3), segment(1, 3))
    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        with pytest.raises(OSError, match="Input/output error") as caught:
            site.push(path)
    assert caught.value.filename == f"{path} to {site.stored(wal_name(1, 3))}"
    assert os.listdir(site.stored(wal_name(1, 3)).parent) == []
    site.push(path)


def test_directory_that_cannot_be_synced_is_no_success_until_it_can(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.store(2)
    path = site.write(wal_name(1, 3), segment(1, 3))

    def fail(_path: str) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(trees, "fsync_directory", fail)
        for _attempt in range(2):
            with pytest.raises(OSError, match="Input/output error"):
                site.push(path)
    assert "was already in the archive" in site.push(path)


def test_folder_that_somebody_made_and_did_not_sync_is_synced_before_its_first_file(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A push that was killed between mkdir and fsync: the next one's segment would not survive a power failure."""
    folder = site.stored(wal_name(1, 3)).parent
    folder.mkdir()
    put(folder, f".{wal_name(1, 3)}.1.00000000.tmp", b"half")
    synced: list[str] = []
    monkeypatch.setattr(trees, "fsync_directory", synced.append)
    site.store(3)
    assert synced == [str(site.archive), str(folder)]
    site.store(4)
    assert synced[2:] == [str(folder)]


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077, 0o027])
def test_stored_and_fetched_files_are_private_whatever_the_umask(site: Site, mask: int) -> None:
    before = os.umask(mask)
    try:
        site.store(3, compression="gzip")
        get(wal_name(1, 3), str(site.fetched / "RECOVERYXLOG"), str(site.repository), CLUSTER)
    finally:
        os.umask(before)
    assert site.stored(wal_name(1, 3)).stat().st_mode & 0o777 == 0o600
    assert site.stored(wal_name(1, 3)).parent.stat().st_mode & 0o777 == 0o700
    assert (site.fetched / "RECOVERYXLOG").stat().st_mode & 0o777 == 0o600


def test_cluster_folder_is_reopened_every_time(site: Site) -> None:
    """A repository that went away between two segments is noticed at the second."""
    site.store(3)
    assert ClusterFolder.open(str(site.repository), CLUSTER).path == site.folder.path
    (site.repository / MARKER).unlink()
    with pytest.raises(PitrError, match="is not a repository"):
        site.store(4)
