# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Whether stored backups, and the WAL that makes them consistent, are still what was stored.

Two levels. ``stored``: the files have the size and digest that were written down, and the WAL is there; no key is
needed for it. ``content``: everything is decompressed, every file in it has the checksum that PostgreSQL wrote into its
manifest, and pg_waldump reads the WAL from the backup's start to its stop.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from . import codec, encryption
from .catalog import Backup, ChainError, chain
from .errors import PitrError
from .index import ArchiveIndex
from .manifest import entry_name, read_manifest
from .postgres import binary, binary_version, run
from .reach import spans_from
from .repository import BACKUP_FILE, Chapter, ClusterFolder
from .retention import missing_wal, wal_timeline
from .stored import KEEP_FILE, MANIFEST, open_tar, sha256
from .wal import Lsn, SegmentHeader, WalFile

STORED, CONTENT = LEVELS = ("stored", "content")
# Of an encrypted file of a backup; what is in front of it is the name of what was encrypted.
ENCRYPTED = ".age"
# Files are handed to pg_verifybackup in batches of this many bytes or files, so that the space needed is bounded.
BATCH_BYTES = 256 * 1024 * 1024
BATCH_FILES = 2000
MAX_NAMED = 1000
_MISMATCH = re.compile(r'error: (.*"(.+?)".*)')


@dataclass(frozen=True)
class Damage:
    """One thing that is not as it was stored. ``stored`` and ``found`` are for a comparison, empty where unknown."""

    backup: str
    path: str
    problem: str
    stored: str = ""
    found: str = ""


@dataclass(frozen=True)
class Report:
    """What is known of one backup. ``level`` is what was reached of what was asked for, ``notes`` says why not more."""

    backup: str
    level: str
    files: int
    segments: int
    damage: tuple[Damage, ...] = ()
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For a module's result."""
        return {
            "backup": self.backup,
            "level": self.level,
            "whole": not self.damage,
            "files": self.files,
            "segments": self.segments,
            "notes": list(self.notes),
        }


class Verification:
    """Verifies the backups of one chapter."""

    def __init__(
        self,
        folder: ClusterFolder,
        chapter: Chapter,
        backups: Sequence[Backup],
        index: ArchiveIndex,
        bin_dir: str,
        level: str = CONTENT,
    ) -> None:
        """``backups``: all of the chapter, for the parents of incremental ones."""
        self._folder = folder
        self._chapter = chapter
        self._by_label = {backup.label: backup for backup in backups}
        self._index = index
        self._bin_dir = bin_dir
        self._level = level

    def verify(self, backup: Backup) -> Report:
        """Read everything that restoring this backup to its end would need. Raises OSError when nothing can be read."""
        damage: list[Damage] = []
        notes: list[str] = []
        damage += self._parents(backup)
        whole = True
        for file in backup.files:
            found = self._stored_file(backup, file.name, file.size, file.sha256)
            whole = whole and not found
            damage += found
        notes += self._strange(backup)
        level = self._level
        if level == CONTENT and backup.encryption and not self._folder.tree.identity:
            level = STORED
            notes.append("it is encrypted and no identity was given, so that its content was not read")
        wal, segments, locked = self._wal(backup, level)
        damage += wal
        if locked and level == CONTENT:
            level = STORED
            notes.append("its WAL is encrypted and the identity for it was not given, so that its content was not read")
        if level == CONTENT and whole:
            try:
                damage += self._content(backup)
            except encryption.LockedError as error:
                level = STORED
                notes.append(f"its content was not read: {error.message}")
        elif level == CONTENT:
            level = STORED
            notes.append("its stored files are damaged, so that what is in them was not looked at")
        return Report(backup.label, level, len(backup.files), segments, tuple(damage[:MAX_NAMED]), tuple(notes))

    # --- stored objects

    def _path(self, backup: Backup, name: str) -> str:
        return os.path.join(self._folder.backups_path, backup.label, name)

    def _stored_file(self, backup: Backup, name: str, size: int, digest: str) -> list[Damage]:
        path = self._path(backup, name)
        expected = f"{size} bytes, sha256 {digest}"
        try:
            there = self._folder.tree.stat(path).size
        except OSError as error:
            return [Damage(backup.label, path, str(error.strerror), expected)]
        if there != size:
            return [Damage(backup.label, path, f"has {there} bytes, {size} were stored", expected, f"{there} bytes")]
        try:
            found = sha256(path, self._folder.tree)
        except OSError as error:
            return [Damage(backup.label, path, f"cannot be read: {error.strerror}", expected)]
        if found != digest:
            now = f"{there} bytes, sha256 {found}"
            return [Damage(backup.label, path, "has other content than was stored", expected, now)]
        return []

    def _strange(self, backup: Backup) -> list[str]:
        ours = {BACKUP_FILE, KEEP_FILE, *(file.name for file in backup.files)}
        names = self._folder.tree.names(self._path(backup, "").rstrip("/"))
        return [f"{self._path(backup, name)} is not of the backup" for name in names if name not in ours]

    def _parents(self, backup: Backup) -> list[Damage]:
        """The backups that an incremental one builds upon are there; they are verified on their own."""
        try:
            chain(backup, self._by_label)
        except ChainError as error:
            return [Damage(backup.label, self._path(error.at, BACKUP_FILE), error.message)]
        return []

    # --- WAL

    def _wal(self, backup: Backup, level: str) -> tuple[list[Damage], int, bool]:
        """Damage, number of segments, and whether some could not be read without a key."""
        damage = []
        archive = self._folder.archive_path(self._chapter)
        for name in missing_wal(backup, self._index, MAX_NAMED):
            path = self._folder.wal_path(WalFile.parse(name), self._chapter)
            damage.append(Damage(backup.label, path, "is missing"))
        if backup.timeline != 1 and backup.timeline not in self._index.tree.histories:
            return damage, 0, False
        size = self._index.segment_size
        last = backup.stop_lsn.previous_segment_number(size)
        count = 0
        locked = False
        with tempfile.TemporaryDirectory(prefix="pitr-verify-") as directory:
            way = wal_timeline(backup, self._index)
            for span in spans_from(backup.start_lsn, self._index.tree, way):
                until = last if span.end is None else min(last, span.end.segment_number(size) - 1)
                unpacked = []
                for number in range(span.begin.segment_number(size), until + 1):
                    if not self._index.has(span.timeline, number):
                        continue
                    name = self._index.name(span.timeline, number)
                    count += 1
                    problem, opaque = self._segment(name, number, os.path.join(directory, name))
                    locked = locked or opaque
                    if problem:
                        path = self._folder.wal_path(WalFile.parse(name), self._chapter)
                        damage.append(Damage(backup.label, path, problem))
                    elif not opaque:
                        unpacked.append(name)
                # A backup is taken on one timeline, so that there is a span before the last only in odd repositories.
                readable = level == CONTENT and not damage and not locked and unpacked
                if readable and span.end is None and span.begin < backup.stop_lsn:
                    problem = self._dump(directory, span.timeline, span.begin, backup.stop_lsn)
                    if problem:
                        damage.append(Damage(backup.label, archive, problem))
                for name in unpacked:
                    os.unlink(os.path.join(directory, name))
        return damage, count, locked

    def _segment(self, name: str, number: int, target: str) -> tuple[str, bool]:
        """Unpack a segment. Returns what is wrong with it, and whether it is encrypted and there is no key."""
        path = self._folder.wal_path(WalFile.parse(name), self._chapter)
        tree = self._folder.tree
        try:
            with contextlib.closing(tree.open(path)) as source:
                head = source.peek()
                if head.startswith(encryption.PREFIX):
                    digest = hashlib.sha256()
                    source.skip(encryption.LENGTH)
                    while data := os.read(source.descriptor, codec.CHUNK):
                        digest.update(data)
                    source.check()
                    if digest.hexdigest() != encryption.parse_header(head, path).stored:
                        return "has other content than was stored", False
                    if not tree.identity:
                        return "", True
            size = 0
            head = b""
            with codec.open_reader(path, tree) as reader, open(target, "wb") as stream:
                while data := reader.read(codec.CHUNK):
                    head = head or data
                    size += stream.write(data)
        except FileNotFoundError:
            return "is missing", False
        except encryption.LockedError:
            # Not the file's fault; what has no key of its own was looked at above.
            return "", True
        except PitrError as error:
            return error.message, False
        return self._header(head, size, name, number), False

    def _header(self, head: bytes, size: int, name: str, number: int) -> str:
        chapter = self._chapter
        if size != chapter.wal_segment_size:
            return f"holds {size} bytes instead of {chapter.wal_segment_size}"
        try:
            header = SegmentHeader(head)
        except PitrError as error:
            return error.message
        if header.system_identifier != chapter.system_identifier:
            return f"was written by the cluster with system identifier {header.system_identifier}"
        # The first segment of a timeline may begin with a page of its parent.
        if header.page_address != number * size or header.timeline > WalFile.parse(name).timeline:
            return (
                f"holds WAL from {header.page_address} of timeline {header.timeline}, which is not what its name says"
            )
        return ""

    def _dump(self, directory: str, timeline: int, start: Lsn, end: Lsn) -> str:
        """What pg_waldump says against this WAL, read as pg_verifybackup would let it be read."""
        argv = [binary(self._bin_dir, "pg_waldump"), "--quiet", f"--path={directory}", f"--timeline={timeline}"]
        try:
            run([*argv, f"--start={start}", f"--end={end}"])
        except PitrError as error:
            return f"its WAL from {start} to {end} of timeline {timeline} cannot be read: {error.message}"
        return ""

    # --- content

    def _content(self, backup: Backup) -> list[Damage]:
        """Every file of the manifest is in the tars with its checksum, and nothing else is."""
        stored = [file.name for file in backup.files if _plain(file.name).startswith(MANIFEST)]
        if len(stored) != 1:
            return [Damage(backup.label, self._path(backup, MANIFEST), "the backup lists no manifest")]
        path = self._path(backup, stored[0])
        try:
            with codec.open_reader(path, self._folder.tree) as reader:
                expected = read_manifest(reader)
        except encryption.LockedError:
            raise
        except PitrError as error:
            return [Damage(backup.label, path, error.message)]
        damage: list[Damage] = []
        for file in backup.files:
            name = _plain(file.name)
            if name.startswith(MANIFEST):
                continue
            prefix = "" if name.startswith("base.tar") else f"pg_tblspc/{name.partition('.')[0]}/"
            path = self._path(backup, file.name)
            try:
                for problem in self._tar(path, prefix, expected):
                    damage.append(Damage(backup.label, path, problem))
            except encryption.LockedError:
                raise
            except PitrError as error:
                damage.append(Damage(backup.label, path, error.message))
                return damage
        for name in list(expected)[:MAX_NAMED]:
            damage.append(Damage(backup.label, path, f'"{name}" of the manifest is in no stored file'))
        return damage

    def _tar(self, path: str, prefix: str, expected: dict[str, str]) -> Iterator[str]:
        """What is wrong with the files in one tar. Takes those that it finds out of ``expected``."""
        with open_tar(path, self._folder.tree) as tar, _Batches(self._bin_dir) as batches:
            for member in tar:
                name = prefix + member.name.removeprefix("./")
                # WAL that an offline backup has in itself is in no manifest.
                if not member.isfile() or name.startswith("pg_wal/"):
                    continue
                entry = expected.pop(name, None)
                if entry is None:
                    yield f'"{name}" is not in the manifest, or twice in the tar'
                    continue
                yield from batches.add(tar, member, entry)
            yield from batches.flush()


class _Batches:
    """Lets pg_verifybackup compare files with their checksums, some at a time.

    It reads a directory and a manifest; each batch gets a manifest of its own with the entries of the backup's. So
    every algorithm and every version is served by PostgreSQL's own code, in little space.
    """

    def __init__(self, bin_dir: str) -> None:
        self._argv = [binary(bin_dir, "pg_verifybackup"), "--no-parse-wal"]
        if binary_version(bin_dir) >= 18:
            # It would look for PG_VERSION or base.tar to tell the format.
            self._argv.append("--format=plain")
        self._entries: list[str] = []
        self._bytes = 0

    def __enter__(self) -> _Batches:
        self._place = tempfile.TemporaryDirectory(prefix="pitr-verify-")
        return self

    def __exit__(self, *_exception: object) -> None:
        self._place.cleanup()

    def add(self, tar: tarfile.TarFile, member: tarfile.TarInfo, entry: str) -> Iterator[str]:
        """Take one file; ``entry`` is its line in the manifest. Yields what is wrong when that completes a batch."""
        space = os.statvfs(self._place.name)
        if space.f_bavail * space.f_frsize < member.size + codec.CHUNK:
            yield from self.flush()
            space = os.statvfs(self._place.name)
            if space.f_bavail * space.f_frsize < member.size + codec.CHUNK:
                raise PitrError(
                    f"{tempfile.gettempdir()} has no room for a file of {member.size} bytes, so that its checksum"
                    " cannot be compared. Make room, or set TMPDIR to a larger filesystem."
                )
        # Numbered, so that no name in a tar decides where something is written.
        name = f"f{len(self._entries)}"
        stream = tar.extractfile(member)
        with open(os.path.join(self._place.name, name), "wb") as target:
            while stream is not None and (data := stream.read(codec.CHUNK)):
                self._bytes += target.write(data)
        self._entries.append(entry)
        if self._bytes >= BATCH_BYTES or len(self._entries) >= BATCH_FILES:
            yield from self.flush()

    def flush(self) -> Iterator[str]:
        """Compare what was taken. Yields what is wrong, with the files' own names."""
        if not self._entries:
            return
        entries = [json.loads(entry) for entry in self._entries]
        names = {}
        for number, entry in enumerate(entries):
            names[f"f{number}"] = entry_name(entry)
            entry.pop("Encoded-Path", None)
            entry["Path"] = f"f{number}"
        # Version 1 has no system identifier, which would have to be that of a pg_control; every version reads it.
        lines = '{ "PostgreSQL-Backup-Manifest-Version": 1,\n"Files": [\n'
        lines += ",\n".join(json.dumps(entry) for entry in entries) + '\n],\n"WAL-Ranges": [],\n'
        digest = hashlib.sha256(lines.encode()).hexdigest()
        manifest = os.path.join(self._place.name, MANIFEST)
        with open(manifest, "w", encoding="utf-8") as stream:
            stream.write(f'{lines}"Manifest-Checksum": "{digest}"}}\n')
        argv = [*self._argv, self._place.name]
        environment = {**os.environ, "LC_ALL": "C"}
        done = subprocess.run(argv, env=environment, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        if done.returncode != 0:
            said = done.stderr.decode(errors="replace").strip()
            found = [match for match in map(_MISMATCH.search, said.splitlines()) if match]
            if not found:
                raise PitrError(f"pg_verifybackup failed with exit code {done.returncode}: {said[-2000:]}")
            for match in found:
                yield match.group(1).replace(f'"{match.group(2)}"', f'"{names.get(match.group(2), match.group(2))}"')
        for name in [*names, MANIFEST]:
            os.unlink(os.path.join(self._place.name, name))
        self._entries = []
        self._bytes = 0


def _plain(name: str) -> str:
    """The name that a stored file had before it was encrypted."""
    return name[: -len(ENCRYPTED)] if name.endswith(ENCRYPTED) else name


def choose(backups: Sequence[Backup], choice: str) -> list[Backup]:
    """The backups that ``all``, ``latest`` or a label means; of an incremental one all that it builds upon, too.

    Raises PitrError when there is none.
    """
    if not backups:
        raise PitrError("There is no backup to verify.")
    if choice == "all":
        return list(backups)
    named = [backup for backup in backups if backup.label == choice] if choice != "latest" else [backups[-1]]
    if not named:
        labels = ", ".join(backup.label for backup in backups)
        raise PitrError(f"There is no backup '{choice}'. There are: {labels}.")
    try:
        return list(chain(named[0], {backup.label: backup for backup in backups}))
    except ChainError:
        # Its own verification tells which link is missing.
        return named


def as_result(reports: Sequence[Report], diff: bool = False) -> dict[str, Any]:
    """For the module."""
    damaged = [asdict(item) for report in reports for item in report.damage]
    result: dict[str, Any] = {"changed": False, "verified": [report.to_dict() for report in reports]}
    result["damaged"] = damaged
    if diff:
        result["diff"] = {
            "before_header": "as stored",
            "after_header": "as found",
            "before": "".join(f"{item['path']}: {item['stored'] or 'whole'}\n" for item in damaged),
            "after": "".join(f"{item['path']}: {item['found'] or item['problem']}\n" for item in damaged),
        }
    return result
