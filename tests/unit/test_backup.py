# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Base backups: visible when they are complete, their WAL included, and not before. pg_basebackup is played."""

from __future__ import annotations

import datetime
import errno
import fcntl
import hashlib
import io
import json
import os
import shlex
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils import backup as module
from ansible_collections.pgdrill.pitr.plugins.module_utils import codec
from ansible_collections.pgdrill.pitr.plugins.module_utils.backup import BaseBackup
from ansible_collections.pgdrill.pitr.plugins.module_utils.catalog import StoredFile, Tablespace
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.plugins.module_utils.facts import Facts
from ansible_collections.pgdrill.pitr.plugins.module_utils.manifest import read_summary
from ansible_collections.pgdrill.pitr.plugins.module_utils.postgres import Login
from ansible_collections.pgdrill.pitr.plugins.module_utils.repository import (
    BACKUP_FILE,
    Chapter,
    ClusterFolder,
    write_json,
)
from ansible_collections.pgdrill.pitr.plugins.module_utils.stored import (
    MANIFEST,
    damaged_backups,
    open_tar,
    parse_tablespace_map,
    sha256,
    stored_backups,
)
from ansible_collections.pgdrill.pitr.tests.unit.support import (
    EPOCH,
    MIB,
    SYSTEM,
    make_backup,
    make_repository,
    put,
    tree,
    wal_name,
)

MAP = b"16385 /ts one\n16386 /ts\\\\two\n"
FILES = {"backup_label": b"label", "tablespace_map": MAP, "PG_VERSION": b"18\n", "base/1/1259": b"x" * 9000}
TABLESPACE = {"PG_18_202506291/5/16387": b"y" * 500}


def manifest(files: dict[str, bytes], start: str = "0/200028", stop: str = "0/300100", timeline: int = 1) -> bytes:
    """As basebackup writes it: one file a line."""
    lines = [f'{{ "Path": {json.dumps(name)}, "Size": {len(data)}, "Checksum": "00" }}' for name, data in files.items()]
    lines.insert(
        1, f'{{ "Encoded-Path": "ff", "Size": {len(TABLESPACE["PG_18_202506291/5/16387"])}, "Checksum": "00" }}'
    )
    return (
        '{ "PostgreSQL-Backup-Manifest-Version": 2,\n"Files": [\n' + ",\n".join(lines) + '\n],\n"WAL-Ranges": [\n'
        f'{{ "Timeline": {timeline}, "Start-LSN": "{start}", "End-LSN": "{stop}" }}\n],\n"Manifest-Checksum": "00"}}\n'
    ).encode()


def tar_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name.rstrip("/"))
            info.size = len(data)
            info.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


class Site:
    """A repository, a server that answers from a table, and programs of a PostgreSQL that copies prepared files."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = make_repository(root / "repository")
        self.backups = Path(self.folder.backups_path)
        self.bin = root / "bin"
        self.bin.mkdir()
        self.prepared = root / "prepared"
        put(self.prepared, "base.tar", tar_of({**FILES, "pg_wal/": b""}))
        put(self.prepared, "16385.tar", tar_of(TABLESPACE))
        put(self.prepared, MANIFEST, manifest(FILES))
        self.program("postgres", "echo 'postgres (PostgreSQL) 17.5'")
        self.program("pg_basebackup", self.copying())
        self.archive(2, 3)
        self.facts: dict[str, Any] = {
            "system_identifier": str(SYSTEM),
            "version": 17,
            "archive_mode": "on",
            "wal_segment_size": MIB,
            "compressions": "{pglz,lz4,zstd}",
            "standby": False,
            "now": EPOCH,
        }
        self.phase = "streaming database files"
        monkeypatch.setattr(module, "query", self.query)
        monkeypatch.setattr(module, "gather", lambda _connection: Facts(data_checksums=True))
        self.history: object = b"1\t0/100000\tno recovery target specified\n"
        self.replication = 0
        monkeypatch.setattr(Login, "connect", self.connect)

    def connect(self, replication: bool = False) -> Site:
        self.replication += replication
        return self

    def close(self) -> None:
        pass

    def query(self, _connection: object, sql: str, _parameters: object = None) -> list[tuple[Any, ...]]:
        if sql.startswith("SELECT (SELECT system_identifier"):
            return [tuple(self.facts.values())]
        if sql.startswith("SELECT clock_timestamp(), pg_snapshot_xmax"):
            return [(EPOCH + datetime.timedelta(seconds=9), 750)]
        if sql.startswith("SELECT timeline_id, pg_current_wal_lsn"):
            return [(1, "0/200028")]
        if sql.startswith("SELECT p.phase"):
            return [(self.phase,)] if self.phase else []
        if sql.startswith("SELECT last_failed_wal"):
            return [("000000010000000000000003", EPOCH, 7)]
        if sql == "TIMELINE_HISTORY 2" and self.replication:
            return [("00000002.history", self.history)]
        raise AssertionError(sql)

    def program(self, name: str, script: str) -> None:
        (self.bin / name).write_text(f"#!/bin/sh\n{script}\n")
        (self.bin / name).chmod(0o755)

    def copying(self, then: str = "") -> str:
        calls = shlex.quote(str(self.bin.parent / "calls"))
        return f'printf "%s\\n" "$*" >> {calls}\ncp {shlex.quote(str(self.prepared))}/* "$2/"\n{then}'

    def archive(self, *numbers: int, timeline: int = 1) -> None:
        for number in numbers:
            name = wal_name(timeline, number)
            put(Path(self.folder.archive_path()) / name[:16], name, b"")

    def promoted(self) -> Path:
        """The server is on timeline 2; returns where the archive keeps the history."""
        put(self.prepared, MANIFEST, manifest(FILES, timeline=2))
        self.archive(2, 3, timeline=2)
        return Path(self.folder.archive_path()) / "00000002.history"

    def work(self, **options: Any) -> BaseBackup:
        return BaseBackup(self.folder, Login("db", 5433, "backup"), str(self.bin), **{"compression": "none", **options})

    def nothing_is_left(self) -> None:
        assert os.listdir(self.backups) == []
        assert stored_backups(self.folder) == []


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    return Site(tmp_path, monkeypatch)


# --- Taking one


def test_backup_becomes_visible_with_everything_that_is_known_of_it(site: Site) -> None:
    taken = site.work().take()
    assert stored_backups(site.folder) == [taken]
    assert taken.label == "20260301T120000Z-full" and os.listdir(site.backups) == [taken.label]
    assert (taken.timeline, taken.start_lsn, taken.stop_lsn) == (1, 0x200028, 0x300100)
    assert (taken.started_at, taken.stopped_at, taken.next_xid) == (EPOCH, EPOCH + datetime.timedelta(seconds=9), 750)
    assert (taken.type, taken.system_identifier, taken.postgresql_version) == ("full", str(SYSTEM), 17)
    assert taken.database_bytes == sum(map(len, [*FILES.values(), *TABLESPACE.values()]))
    assert taken.tablespaces == (Tablespace(16385, "/ts one"), Tablespace(16386, "/ts\\two"))
    assert taken.verified == "sizes" and taken.compression == "none"
    stored = {file.name: file for file in taken.files}
    assert sorted(stored) == ["16385.tar", MANIFEST, "base.tar"]
    for name, file in stored.items():
        data = (site.prepared / name).read_bytes()
        assert (file.size, file.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert damaged_backups(site.folder, [taken]) == {}


def test_programs_argument_vector_follows_the_options(site: Site, tmp_path: Path) -> None:
    site.work(checkpoint="spread", max_rate="10M", label="mine").take()
    (call,) = (tmp_path / "calls").read_text().splitlines()
    assert call.split()[2:] == "-F tar -X none --no-password -c spread -l mine -Z none -r 10M".split()
    assert os.path.basename(call.split()[1]) == ".mine.partial"
    site.work(label="other").take()
    call = (tmp_path / "calls").read_text().splitlines()[1]
    assert call.split()[2:] == "-F tar -X none --no-password -c fast -l other -Z none".split()


@pytest.mark.parametrize(
    ("compression", "server", "expected"),
    [
        ("none", "{pglz,lz4,zstd}", "none"),
        ("gzip", "{pglz}", "server-gzip:level=1"),
        ("gzip:6", "{pglz}", "server-gzip:level=6"),
        ("lz4", "{pglz,lz4}", "server-lz4:level=1"),
        ("auto", "{pglz}", "server-gzip:level=1"),
        ("auto", None, "server-gzip:level=1"),
        ("auto", "{pglz,lz4,zstd}", "server-zstd:level=1,workers=2"),
        ("zstd:3", "{pglz,lz4,zstd}", "server-zstd:level=3,workers=2"),
    ],
)
def test_compression_is_done_by_the_server_where_it_can(
    site: Site, monkeypatch: pytest.MonkeyPatch, compression: str, server: str | None, expected: str
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(codec, "which", lambda command: f"/usr/bin/{command}")
    assert site.work(compression=compression)._zip({"compressions": server}) == expected


def test_compression_that_this_host_cannot_read_is_not_chosen(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "which", lambda _command: None)
    assert site.work(compression="auto")._zip({"compressions": "{zstd}"}).startswith("server-gzip")


# --- What is refused before the copy


@pytest.mark.parametrize(
    ("fact", "value", "why"),
    [
        ("archive_mode", "off", "has archive_mode = off"),
        ("version", 18, "is PostgreSQL 17, the server 18"),
        ("system_identifier", str(SYSTEM + 1), f"{SYSTEM}, but this one is {SYSTEM + 1}"),
    ],
)
def test_server_that_cannot_be_backed_up_is_refused(site: Site, fact: str, value: object, why: str) -> None:
    site.facts[fact] = value
    with pytest.raises(PitrError, match=why):
        site.work().take()
    site.nothing_is_left()


def test_cluster_of_an_older_chapter_is_refused(site: Site) -> None:
    site.folder.chapters.append(Chapter(2, str(SYSTEM + 1), MIB, 18, ""))
    with pytest.raises(PitrError, match="older chapter"):
        site.work().take()
    site.nothing_is_left()


@pytest.mark.parametrize("label", ["..", "a/b", ".hidden", "a b", "ä", "-x", "x" * 101, "a\n"])
def test_label_that_would_be_no_plain_folder_is_refused(site: Site, label: str) -> None:
    with pytest.raises(PitrError, match="cannot be a label"):
        site.work(label=label).take()
    site.nothing_is_left()


def test_label_that_is_taken_is_refused_and_the_backup_stays(site: Site) -> None:
    site.work(label="mine").take()
    before = tree(site.backups)
    with pytest.raises(PitrError, match="There is a backup 'mine' already"):
        site.work(label="mine").take()
    assert tree(site.backups) == before


def test_second_backup_of_the_same_second_gets_another_label(site: Site) -> None:
    labels = {site.work().take().label for _again in range(3)}
    assert len(labels) == 3 and len(stored_backups(site.folder)) == 3
    assert set(os.listdir(site.backups)) == labels


def test_history_of_the_backups_timeline_is_brought_into_the_archive(site: Site) -> None:
    """A server that was promoted before it archived here has it, and nothing could be restored without it."""
    stored = site.promoted()
    assert site.work().take().timeline == 2
    assert stored.read_bytes() == site.history and site.replication == 1
    assert [path.name for path in stored.parent.iterdir() if path.is_file()] == ["00000002.history"]
    before = tree(stored.parent)
    site.work().take()
    assert tree(stored.parent) == before and site.replication == 1


def test_history_that_is_text_for_the_driver_is_stored_as_it_is(site: Site) -> None:
    stored = site.promoted()
    site.history = '1\t0/100000\tat restore point "é"\n'
    site.work().take()
    assert stored.read_text() == site.history


def test_damaged_history_makes_no_backup(site: Site) -> None:
    stored = site.promoted()
    site.history = b"rubbish"
    with pytest.raises(PitrError, match=r"00000002\.history, line 1"):
        site.work().take()
    site.nothing_is_left()
    assert not stored.exists()


def test_history_that_the_archiver_brings_meanwhile_is_not_replaced(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = site.promoted()
    real = os.link

    def link(source: str, target: str) -> None:
        stored.write_bytes(b"by the archiver")
        real(source, target)

    monkeypatch.setattr(os, "link", link)
    site.work().take()
    assert stored.read_bytes() == b"by the archiver"
    assert [path.name for path in stored.parent.iterdir() if path.is_file()] == ["00000002.history"]


def test_backup_is_on_stable_storage_before_it_is_reported(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    before = len(os.listdir("/proc/self/fd"))
    steps: list[str] = []
    real = os.rename

    def rename(source: str, target: str) -> None:
        steps.append(f"rename to {os.path.basename(target)}")
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(module, "fsync_directory", lambda path: steps.append(f"sync {os.path.basename(path)}"))
    site.work(label="mine").take()
    assert steps == [f"rename to {BACKUP_FILE}", "rename to mine", "sync backups"]
    assert len(os.listdir("/proc/self/fd")) == before


# --- What goes wrong in between: nothing is visible, nothing is left


def drop_the_manifest(site: Site) -> None:
    (site.prepared / MANIFEST).unlink()


def cut_the_manifest(site: Site) -> None:
    path = site.prepared / MANIFEST
    path.write_bytes(path.read_bytes().partition(b'"WAL-Ranges"')[0])


def drop_the_base(site: Site) -> None:
    (site.prepared / "base.tar").unlink()


def drop_a_tablespace(site: Site) -> None:
    (site.prepared / "16385.tar").unlink()


def cut_the_base(site: Site) -> None:
    path = site.prepared / "base.tar"
    path.write_bytes(path.read_bytes()[:5000])


def cut_the_base_between_members(site: Site) -> None:
    put(site.prepared, "base.tar", tar_of({name: FILES[name] for name in list(FILES)[:3]}))


def shorten_a_file(site: Site) -> None:
    put(site.prepared, "base.tar", tar_of({**FILES, "base/1/1259": b"x" * 8999}))


def fail(site: Site) -> None:
    site.program("pg_basebackup", site.copying("echo 'could not receive data' >&2; exit 1"))


def be_killed(site: Site) -> None:
    site.program("pg_basebackup", site.copying("kill -9 $$"))


def archive_elsewhere(site: Site) -> None:
    for path in Path(site.folder.archive_path()).rglob(wal_name(1, 3)):
        path.unlink()


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        (drop_the_manifest, MANIFEST),
        (cut_the_manifest, "tells no WAL range"),
        (drop_the_base, r"left no base\.tar"),
        (drop_a_tablespace, "has 4 files with 9037 bytes, the manifest 5 with 9537"),
        (cut_the_base, r"base\.tar is damaged"),
        (cut_the_base_between_members, "has 4 files with 537 bytes, the manifest 5 with 9537"),
        (shorten_a_file, "has 5 files with 9536 bytes, the manifest 5 with 9537"),
        (fail, "failed: could not receive data"),
        (be_killed, "pg_basebackup from"),
        (archive_elsewhere, f"{wal_name(1, 3)} is not in"),
    ],
    ids=lambda item: getattr(item, "__name__", ""),
)
def test_backup_that_is_not_proven_whole_leaves_nothing(site: Site, fault: Callable[[Site], None], why: str) -> None:
    fault(site)
    with pytest.raises((PitrError, OSError), match=why):
        site.work(archive_timeout=0.1).take()
    site.nothing_is_left()


def test_interruption_leaves_nothing(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(BaseBackup, "_await_wal", interrupt)
    with pytest.raises(KeyboardInterrupt):
        site.work().take()
    site.nothing_is_left()


@pytest.mark.parametrize(
    ("phase", "archive_timeout"),
    [("streaming database files", 0.01), ("", 0.01), ("waiting for wal archiving to finish", 30)],
)
def test_copy_may_take_its_time_and_so_may_the_archiver(site: Site, phase: str, archive_timeout: float) -> None:
    site.program("pg_basebackup", site.copying("sleep 0.2"))
    site.phase = phase
    assert site.work(archive_timeout=archive_timeout).take() in stored_backups(site.folder)


@pytest.mark.timeout(20)
def test_archiver_that_is_stuck_is_told_and_the_program_ended(site: Site, tmp_path: Path) -> None:
    site.program("pg_basebackup", site.copying(f"echo $$ > {shlex.quote(str(tmp_path / 'pid'))}; exec sleep 60"))
    site.phase = "waiting for wal archiving to finish"
    with pytest.raises(PitrError, match=r"has not archived the backup's WAL within 0\.2 seconds.*7 failures in all"):
        site.work(archive_timeout=0.2).take()
    site.nothing_is_left()
    pid = (tmp_path / "pid").read_text().strip()
    assert not os.path.exists(f"/proc/{pid}")


def test_backup_on_two_timelines_is_refused(site: Site) -> None:
    """A standby may follow its primary to another one between its restartpoint and the end of the backup."""
    text = manifest(FILES).decode()
    first = '{ "Timeline": 2, "Start-LSN": "0/280000", "End-LSN": "0/300100" },\n{ "Timeline": 1,'
    put(site.prepared, MANIFEST, text.replace('{ "Timeline": 1,', first).encode())
    with pytest.raises(PitrError, match="from timeline 1 to 2 since its last restartpoint"):
        site.work().take()
    site.nothing_is_left()


def test_backup_is_invisible_until_its_description_is_written(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[list[str], int]] = []

    def look(_self: BaseBackup, *_facts: object) -> None:
        seen.append((os.listdir(site.backups), len(stored_backups(site.folder))))

    monkeypatch.setattr(BaseBackup, "_await_wal", look)
    site.work(label="mine").take()
    assert seen == [([".mine.partial"], 0)]
    assert os.listdir(site.backups) == ["mine"]


def test_verification_of_version_18_reads_every_checksum(site: Site, tmp_path: Path) -> None:
    site.program("postgres", "echo 'postgres (PostgreSQL) 18.6'")
    site.program("pg_verifybackup", f"printf '%s\\n' \"$@\" > {shlex.quote(str(tmp_path / 'verified'))}")
    assert site.work(label="mine").take().verified == "checksums"
    assert (tmp_path / "verified").read_text().splitlines()[-1].endswith(".mine.partial")
    site.program("pg_verifybackup", "echo 'checksum mismatch for file \"base/1/1259\"' >&2; exit 1")
    with pytest.raises(PitrError, match="checksum mismatch"):
        site.work(label="other").take()
    assert os.listdir(site.backups) == ["mine"]


def test_base_that_is_no_tar_is_named_even_without_verification(site: Site) -> None:
    put(site.prepared, "base.tar", b"no tar at all " * 100)
    with pytest.raises(PitrError, match=r"base\.tar is damaged"):
        site.work(verify=False).take()
    site.nothing_is_left()


def test_tablespace_whose_path_is_not_utf8_is_kept_as_it_is(site: Site) -> None:
    put(site.prepared, "base.tar", tar_of({**FILES, "tablespace_map": b"16385 /caf\xe9\n"}))
    (taken,) = [site.work(verify=False).take()]
    assert os.fsencode(taken.tablespaces[0].location) == b"/caf\xe9"
    assert stored_backups(site.folder) == [taken]


def test_verification_can_be_left_out_and_is_not_claimed_then(site: Site) -> None:
    assert site.work(verify=False).take().verified == "no"


def test_wal_that_comes_late_is_waited_for(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    archive_elsewhere(site)
    looks = 0
    look = module.BaseBackup._is_archived

    def looking(work: module.BaseBackup, name: str) -> bool:
        nonlocal looks
        looks += 1
        if looks == 3:
            site.archive(3)
        return look(work, name)

    monkeypatch.setattr(module.BaseBackup, "_is_archived", looking)
    assert site.work().take() in stored_backups(site.folder)
    assert looks == 3


def test_filesystem_without_locks_trusts_only_a_directory_of_its_own(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(_descriptor: int, _operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    before = len(os.listdir("/proc/self/fd"))
    assert site.work(label="mine").take().label == "mine"
    put(site.backups / ".other.partial", "base.tar", b"perhaps of another process")
    with pytest.raises(PitrError, match="'other' is being taken"):
        site.work(label="other").take()
    assert (site.backups / ".other.partial" / "base.tar").exists()
    assert len(os.listdir("/proc/self/fd")) == before


def test_directory_that_its_owner_renames_while_it_is_locked_is_not_ours(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fcntl.flock
    moved: list[Path] = []

    def flock(descriptor: int, operation: int) -> None:
        if not moved:
            (partial,) = site.backups.iterdir()
            moved.append(partial.rename(site.backups / "finished"))
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    before = len(os.listdir("/proc/self/fd"))
    taken = site.work().take()
    assert taken.label.startswith("20260301T120000Z-full-")
    assert sorted(os.listdir(site.backups)) == sorted(["finished", taken.label])
    assert list(moved[0].iterdir()) == [] and len(os.listdir("/proc/self/fd")) == before


def test_label_that_another_process_is_writing_is_refused_and_left_alone(site: Site) -> None:
    partial = site.backups / ".mine.partial"
    put(partial, "base.tar", b"of another process")
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(PitrError, match="'mine' is being taken"):
            site.work(label="mine").take()
        assert (partial / "base.tar").read_bytes() == b"of another process"
    finally:
        os.close(descriptor)


def test_what_a_killed_backup_has_left_is_replaced(site: Site) -> None:
    put(site.backups / ".mine.partial", "old.tar", b"left behind")
    taken = site.work(label="mine").take()
    assert [file.name for file in taken.files] == ["16385.tar", MANIFEST, "base.tar"]
    assert os.listdir(site.backups) == ["mine"]


# --- What is stored


def write_backup(folder: ClusterFolder, label: str, minute: float = 0, **content: bytes) -> None:
    directory = Path(folder.backups_path) / label
    files = []
    for name, data in content.items():
        put(directory, name, data)
        files.append(StoredFile(name, len(data), hashlib.sha256(data).hexdigest()))
    directory.mkdir(exist_ok=True)
    write_json(str(directory / BACKUP_FILE), make_backup(label, minute=minute, files=tuple(files)).to_dict())


def test_backups_are_listed_oldest_first_and_only_complete_ones(site: Site) -> None:
    write_backup(site.folder, "b", 2)
    write_backup(site.folder, "c", 1)
    write_backup(site.folder, ".hidden.partial", 0)
    (site.backups / "without-description").mkdir()
    put(site.backups, "notes.txt", b"")
    assert [backup.label for backup in stored_backups(site.folder)] == ["c", "b"]


def test_damaged_description_is_named(site: Site) -> None:
    write_backup(site.folder, "b")
    path = site.backups / "b" / BACKUP_FILE
    for content in ("", '{"format": 1}', '{"format": 9}'):
        path.write_text(content)
        with pytest.raises(PitrError) as caught:
            stored_backups(site.folder)
        assert str(path) in caught.value.message


def test_backups_folder_that_is_gone_is_an_error_and_not_empty(site: Site) -> None:
    site.backups.rmdir()
    with pytest.raises(PitrError, match="Is the repository mounted"):
        stored_backups(site.folder)


def test_stored_file_that_is_missing_or_cut_is_damage(site: Site) -> None:
    for label in ("whole", "cut", "longer", "gone"):
        write_backup(site.folder, label, base=b"x" * 100, manifest=b"y")
    (site.backups / "cut" / "base").write_bytes(b"x" * 99)
    (site.backups / "longer" / "base").write_bytes(b"x" * 101)
    (site.backups / "gone" / "manifest").unlink()
    found = damaged_backups(site.folder, stored_backups(site.folder))
    assert found == {
        "cut": f"{site.backups}/cut/base has 99 bytes, 100 were stored",
        "longer": f"{site.backups}/longer/base has 101 bytes, 100 were stored",
        "gone": f"{site.backups}/gone/manifest: No such file or directory",
    }


def test_manifest_is_summed_up(tmp_path: Path) -> None:
    path = put(tmp_path, MANIFEST, manifest(FILES, "1/200028", "A/300100"))
    found = read_summary(path)
    assert (found.timelines, found.start_lsn, found.stop_lsn) == ((1,), 0x100200028, 0xA00300100)
    assert (found.files, found.bytes) == (5, sum(map(len, FILES.values())) + 500)


def test_bytes_of_each_tablespace_are_in_the_manifest(tmp_path: Path) -> None:
    files = {"base/1/2": b"1", "pg_tblspc/16385/PG_18/1/2": b"12345", "pg_tblspc/16385/PG_18/1/3": b"1"}
    found = read_summary(put(tmp_path, MANIFEST, manifest(files)))
    assert found.tablespace_bytes == {16385: 6}


@pytest.mark.parametrize("name", ['quo"te", "Size": 7, "x', "back\\slash", "a, b", "{ }", "ä"])
def test_manifest_with_odd_names_is_summed_up(tmp_path: Path, name: str) -> None:
    path = put(tmp_path, MANIFEST, manifest({"first": b"1", name: b"12345"}))
    found = read_summary(path)
    assert (found.files, found.bytes) == (3, 506)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ()),
        ("16385 /ts\n", (Tablespace(16385, "/ts"),)),
        ("1 /a b\n2 /c\\\nd\n3 /e\\\\f\n4 /g\\\rh\n", ((1, "/a b"), (2, "/c\nd"), (3, "/e\\f"), (4, "/g\rh"))),
    ],
)
def test_tablespace_map_is_read_as_the_server_reads_it(text: str, expected: tuple[Any, ...]) -> None:
    assert parse_tablespace_map(text) == tuple(
        item if isinstance(item, Tablespace) else Tablespace(*item) for item in expected
    )


def test_digest_is_that_of_the_stored_bytes(tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    assert sha256(put(tmp_path, "f", data)) == hashlib.sha256(data).hexdigest()


def test_tar_is_walked_to_its_end_even_when_its_reader_stops_early(tmp_path: Path) -> None:
    """Damage behind the last member that was asked for is damage all the same."""
    with codec.open_writer(str(tmp_path / "t"), "gzip") as writer:
        writer.write(tar_of({"a": b"1", "b": os.urandom(100_000)}))
    whole = (tmp_path / "t").read_bytes()
    (tmp_path / "t").write_bytes(whole[:-6] + b"\0\0" + whole[-4:])
    with pytest.raises(PitrError, match="is damaged"), open_tar(str(tmp_path / "t")) as tar:
        tar.next()
