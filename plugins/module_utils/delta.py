# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A restore into a data directory of the same cluster: only what differs from the backup is written.

What is kept is decided by content, never by time: every file of the backup's size is read and compared with the
checksum in the backup's manifest. What PostgreSQL does not copy into a backup (contents of pg_wal, pg_replslot and so
on, "Making a Base Backup Using the Low Level API") is not in the manifest, and so goes like every other file that the
backup does not have.

From the first change to the last there is a marker in the directory and no pg_control, so that no server starts from
it, and whatever a kill leaves can be given to the next delta restore. Files are unlinked and made anew, never written
to: a copy of the directory that was made with hard links stays as it is.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from . import checksums, codec, extract, keep_out, locks, places
from .catalog import Backup
from .errors import PitrError
from .extract import IN_PROGRESS
from .manifest import read_manifest
from .stored import MANIFEST, sha256
from .tree import LOCAL, Tree, fsync_directory

TABLESPACES = "pg_tblspc"
# What initdb makes (its array subdirs); all of them are in every backup, full or empty.
STANDARD = (
    "base",
    "global",
    "pg_commit_ts",
    "pg_dynshmem",
    "pg_logical",
    "pg_logical/mappings",
    "pg_logical/snapshots",
    "pg_multixact",
    "pg_multixact/members",
    "pg_multixact/offsets",
    "pg_notify",
    "pg_replslot",
    "pg_serial",
    "pg_snapshots",
    "pg_stat",
    "pg_stat_tmp",
    "pg_subtrans",
    TABLESPACES,
    "pg_twophase",
    "pg_wal",
    "pg_wal/archive_status",
    "pg_xact",
)
# Directories that are no directory of the restored cluster once they hold no file of it: those of a database, of a
# replication slot, of temporary files. An empty one of somebody else does no harm, and may be one of the backup.
_GOES_EMPTY = re.compile(
    r"(base/\d+|pg_tblspc/\d+/PG_[^/]+/\d+|(pg_replslot|pg_dynshmem|pg_notify|pg_serial|pg_snapshots|pg_stat_tmp|"
    r"pg_subtrans)/.+|(.*/)?pgsql_tmp.*)"
)
_SUMMARIES_SINCE = 17
_HBA = "pg_hba.conf"
# Files that are synced one by one.
FEW = 64


def version_directory(major: int) -> re.Pattern[str]:
    """What a server of this major version calls its directory in a tablespace (TABLESPACE_VERSION_DIRECTORY)."""
    return re.compile(rf"PG_{major}_\d+")


@dataclass(frozen=True)
class Comparison:
    """What is to be done. Names are those of the manifest; ``extra`` are paths of files and links that go."""

    kept: frozenset[str]
    needed: frozenset[str]
    extra: tuple[str, ...]
    kept_bytes: int
    needed_bytes: int


@dataclass
class Found:
    """What lies in the directory and in its tablespaces, by the names that the manifest would give it."""

    files: dict[str, os.stat_result] = field(default_factory=dict)
    others: set[str] = field(default_factory=set)
    directories: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Summary:
    """What was done, for a module's result."""

    kept: int
    kept_bytes: int
    written: int
    written_bytes: int
    removed: int

    def to_dict(self) -> dict[str, int]:
        """As a module returns it."""
        return asdict(self)


class Delta:
    """One backup onto one directory. The methods are called in the order in which they stand here."""

    def __init__(
        self,
        backup: Backup,
        stored: str,
        pgdata: str,
        locations: Mapping[int, str],
        bin_dir: str,
        tree: Tree = LOCAL,
        noted: Mapping[str, str] | None = None,
    ) -> None:
        """``noted``: name to SHA-256 of files of this very backup, for those that its manifest does not tell apart.

        ``stored``: the backup's folder in the repository. ``locations``: tablespace OID to its directory.

        """
        self._backup = backup
        self._stored = stored
        self._pgdata = pgdata
        self._locations = dict(locations)
        self._bin_dir = bin_dir
        self._tree = tree
        self._noted = noted or {}
        self._version = version_directory(backup.postgresql_version)
        self._entries: dict[str, dict[str, Any]] = {}
        # Name of the cluster's own pg_hba.conf while an earlier restore keeps ordinary users out with another.
        self._kept_hba = ""

    def compare(self, tick: Callable[[], None] = lambda: None) -> Comparison:
        """Read everything and change nothing. ``tick`` is called every few seconds."""
        path = extract.check_manifest(self._backup, self._stored, self._tree)
        with codec.open_reader(path, self._tree) as reader:
            self._entries = {name: json.loads(line) for name, line in read_manifest(reader).items()}
        self._entries.pop(IN_PROGRESS, None)
        self._kept_hba = os.path.basename(keep_out.kept_file(os.path.join(self._pgdata, _HBA)))
        sizes = {name: int(entry["Size"]) for name, entry in self._entries.items()}
        found = self._find()
        candidates, same = {}, set()
        for name, size in sizes.items():
            seen, path = self._seen(found, name)
            if seen is None or seen.st_size != size:
                continue
            if checksums.tells_apart(name, self._entries[name]):
                candidates[name] = path
            elif name in self._noted and sha256(path) == self._noted[name]:
                same.add(name)
        differing = checksums.differing(self._bin_dir, candidates, self._entries, tick)
        kept = (frozenset(candidates) - differing) | same
        known = {extract.HELD_BACK if name == extract.PG_CONTROL and name in kept else name for name in kept}
        if _HBA in kept and self._kept_hba:
            known.add(self._kept_hba)
        extra = [
            name
            for name in [*found.files, *found.others]
            if name not in known and name not in (IN_PROGRESS, extract.PG_CONTROL)
        ]
        needed = frozenset(sizes) - kept
        return Comparison(
            kept, needed, tuple(sorted(extra)), sum(sizes[n] for n in kept), sum(sizes[n] for n in needed)
        )

    def hold(self, comparison: Comparison) -> None:
        """Take pg_control away, durably, before anything else changes. The marker has to be there already."""
        control = os.path.join(self._pgdata, extract.PG_CONTROL)
        held = os.path.join(self._pgdata, extract.HELD_BACK)
        if os.path.lexists(control):
            if extract.PG_CONTROL in comparison.kept:
                os.rename(control, held)
            else:
                os.unlink(control)
        with contextlib.suppress(FileNotFoundError):
            fsync_directory(os.path.dirname(control))
        if _HBA in comparison.kept and self._kept_hba:
            keep_out.let_in(os.path.join(self._pgdata, _HBA))
            self._kept_hba = ""

    def clear(self, comparison: Comparison) -> None:
        """Remove what the backup does not have, or has with other content."""
        for name in comparison.extra:
            os.unlink(self._path(name))
        for name in sorted(self._find().directories, key=len, reverse=True):
            if name in self._entries:
                # All files in it are gone.
                shutil.rmtree(self._path(name))
            elif _GOES_EMPTY.fullmatch(name):
                with contextlib.suppress(OSError):
                    os.rmdir(self._path(name))
        self._clear_links()
        for name in STANDARD:
            os.makedirs(os.path.join(self._pgdata, name), mode=0o700, exist_ok=True)
        if self._backup.postgresql_version >= _SUMMARIES_SINCE:
            os.makedirs(os.path.join(self._pgdata, "pg_wal", "summaries"), mode=0o700, exist_ok=True)

    def _clear_links(self) -> None:
        """Links of tablespaces that the backup does not have go, and before them what the server has put there.

        Left alone, a tablespace that is created again by the replay would find the files of the future.
        """
        for oid, link, target in links(self._pgdata):
            if self._locations.get(oid) == target:
                continue
            if oid >= 0 and oid not in self._locations:
                for name in version_directories(target, self._version):
                    shutil.rmtree(os.path.join(target, name))
            os.unlink(link)

    def write(self, comparison: Comparison, progress: Callable[[int], None]) -> None:
        """Unpack what is needed; a stored tar of which nothing is needed is not read."""
        progress(comparison.kept_bytes)
        needed = comparison.needed
        # Files of tablespaces that have no tar of their own (in place) are in base.tar.
        separate = tuple(f"{TABLESPACES}/{oid}/" for oid in self._locations)
        base = {name for name in needed if not name.startswith(separate)}
        if base:
            extract.extract_tar(self._tar("base"), self._pgdata, progress, self._tree, base)
        for oid, location in self._locations.items():
            prefix = f"{TABLESPACES}/{oid}/"
            own = {name[len(prefix) :] for name in needed if name.startswith(prefix)}
            os.makedirs(location, mode=0o700, exist_ok=True)
            if own or not version_directories(location, self._version):
                extract.extract_tar(self._tar(str(oid)), location, progress, self._tree, own)
            link = os.path.join(self._pgdata, TABLESPACES, str(oid))
            if not os.path.islink(link):
                os.symlink(location, link)

    def settle(self, comparison: Comparison) -> None:
        """Put what was changed on stable storage: file by file when it is little, else all of the filesystem."""
        changed = [name for name in comparison.needed if name != extract.PG_CONTROL]
        if len(changed) > FEW:
            extract.settle(self._pgdata, *self._locations.values())
            return
        paths = [self._path(name) for name in [*changed, extract.HELD_BACK]]
        folders = {os.path.dirname(path) for path in [*paths, *map(self._path, comparison.extra)]}
        for path in [*paths, *folders]:
            with contextlib.suppress(FileNotFoundError):
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)

    def verify(self, comparison: Comparison, content: bool = True) -> Summary:
        """All files of the backup are there and no others, and what was written has the manifest's checksum.

        What was kept had it when it was compared. Without ``content`` only names and sizes are looked at.
        """
        found = self._find()
        wrong = []
        written = {}
        for name, entry in self._entries.items():
            seen, path = self._seen(found, name)
            if seen is None:
                wrong.append(f"{path} is missing")
            elif seen.st_size != int(entry["Size"]):
                wrong.append(f"{path} has {seen.st_size} bytes")
            elif name in comparison.needed:
                written[name] = path
        ours = {*self._entries, IN_PROGRESS, extract.HELD_BACK}
        wrong += [
            f"{self._path(name)} is not in the backup" for name in [*found.files, *found.others] if name not in ours
        ]
        if content and not wrong:
            differing = checksums.differing(self._bin_dir, written, self._entries)
            wrong = [f"{written[name]} has another checksum" for name in sorted(differing)]
        if wrong:
            raise PitrError(
                f"The restored files are not those of the backup {self._backup.label}: {'; '.join(wrong[:5])}"
                + (f" (and {len(wrong) - 5} more)." if len(wrong) > 5 else ".")
            )
        return Summary(
            len(comparison.kept),
            comparison.kept_bytes,
            len(comparison.needed),
            comparison.needed_bytes,
            len([name for name in comparison.extra if name not in self._entries]),
        )

    # --- what lies where

    def _tar(self, name: str) -> str:
        stored = [file.name for file in self._backup.files if file.name.startswith(f"{name}.tar")]
        if not stored:
            raise PitrError(f"The backup {self._backup.label} has no file {name}.tar.")
        return os.path.join(self._stored, stored[0])

    def _path(self, name: str) -> str:
        """Where a file of the manifest lies. Raises PitrError for a name that leads elsewhere."""
        top, _slash, rest = name.partition("/")
        if top == TABLESPACES:
            oid, _slash, inside = rest.partition("/")
            if inside and oid.isdecimal() and int(oid) in self._locations:
                return extract.safe_path(self._locations[int(oid)], inside, self._stored)
        return extract.safe_path(self._pgdata, name, self._stored)

    def _seen(self, found: Found, name: str) -> tuple[os.stat_result | None, str]:
        """A regular file under this name; pg_control and pg_hba.conf may wait under their other ones."""
        if name == _HBA and self._kept_hba in found.files:
            return found.files[self._kept_hba], self._path(self._kept_hba)
        seen = found.files.get(name)
        if name == extract.PG_CONTROL and seen is None and extract.HELD_BACK in found.files:
            return found.files[extract.HELD_BACK], self._path(extract.HELD_BACK)
        return seen, self._path(name)

    def _find(self) -> Found:
        """Everything in the directory and in the tablespaces' version directories. No link is followed."""
        found = Found()
        self._walk(self._pgdata, "", found)
        for oid, location in self._locations.items():
            for name in version_directories(location, self._version):
                full = f"{TABLESPACES}/{oid}/{name}"
                found.directories.append(full)
                self._walk(os.path.join(location, name), full, found)
        return found

    def _walk(self, directory: str, prefix: str, found: Found, only: re.Pattern[str] | None = None) -> None:
        try:
            with os.scandir(directory) as entries:
                for entry in entries:
                    name = f"{prefix}/{entry.name}" if prefix else entry.name
                    if only is not None and not only.match(entry.name):
                        continue
                    status = entry.stat(follow_symlinks=False)
                    if stat.S_ISDIR(status.st_mode):
                        if prefix == TABLESPACES and entry.name in map(str, self._locations):
                            raise PitrError(
                                f"{entry.path} is a directory, and the backup has a link to a tablespace there."
                                " Move it away, or restore without delta."
                            )
                        found.directories.append(name)
                        self._walk(entry.path, name, found)
                    elif name == places.PG_WAL and stat.S_ISLNK(status.st_mode):
                        # It stays a link, and what is PostgreSQL's there goes like in a directory.
                        found.directories.append(name)
                        # Somebody else's is left alone, such as lost+found of a filesystem. No server takes it for WAL.
                        self._walk(os.path.realpath(entry.path), name, found, places.WAL_NAME)
                    elif stat.S_ISREG(status.st_mode):
                        found.files[name] = status
                    elif not (prefix == TABLESPACES and stat.S_ISLNK(status.st_mode)):
                        # Links of tablespaces have rules of their own.
                        found.others.add(name)
        except PermissionError as error:
            raise PitrError(f"{error.filename or directory} cannot be read: {error.strerror}.") from None


def noted(backup: Backup, pgdata: str) -> dict[str, Any]:
    """What a restore notes down of the files that it has just made, for the next delta restore of the same backup.

    It goes into the recovery's include file, and is gone when the cluster is accepted: by then they have changed.
    """
    paths = {extract.PG_CONTROL: os.path.join(pgdata, extract.HELD_BACK)}
    for top in ("global", "base", "pg_twophase", "pg_logical", TABLESPACES):
        for directory, _names, files in os.walk(os.path.join(pgdata, top), followlinks=top == TABLESPACES):
            relative = os.path.relpath(directory, pgdata)
            paths.update((f"{relative}/{name}", os.path.join(directory, name)) for name in files)
    return {"manifest": _manifest_digest(backup), "files": checksums.noted(paths)}


def recalled(backup: Backup, planned: Mapping[str, Any] | None) -> dict[str, str]:
    """What an earlier restore has noted down, if it was of this very backup."""
    facts = (planned or {}).get("noted") or {}
    if facts.get("manifest") != _manifest_digest(backup):
        return {}
    return {str(name): str(digest) for name, digest in facts.get("files", {}).items()}


def _manifest_digest(backup: Backup) -> str:
    return next((file.sha256 for file in backup.files if file.name.startswith(MANIFEST)), "")


@contextlib.contextmanager
def exclusive(pgdata: str) -> Iterator[None]:
    """Keep other delta restores away from a directory, for as long as this process lives. Raises PitrError."""
    with contextlib.ExitStack() as stack:
        try:
            stack.callback(os.close, locks.hold_directory(pgdata))
        except locks.InUseError:
            raise PitrError(f"Another restore is writing to {pgdata}. Nothing was touched by this one.") from None
        except OSError:
            # A filesystem without locks.
            pass
        yield


def links(pgdata: str) -> Iterator[tuple[int, str, str]]:
    """OID, link and target of every tablespace that a data directory links to."""
    directory = os.path.join(pgdata, TABLESPACES)
    with contextlib.suppress(OSError):
        for name in sorted(os.listdir(directory)):
            link = os.path.join(directory, name)
            if os.path.islink(link):
                yield int(name) if name.isdecimal() else -1, link, os.readlink(link)


def version_directories(location: str, pattern: re.Pattern[str]) -> list[str]:
    """Directories of this major version in a tablespace's place."""
    try:
        names = os.listdir(location)
    except (FileNotFoundError, NotADirectoryError):
        return []
    paths = ((name, os.path.join(location, name)) for name in sorted(names) if pattern.fullmatch(name))
    return [name for name, path in paths if os.path.isdir(path) and not os.path.islink(path)]


def server_directories() -> set[str]:
    """Working directories of processes that this user can see, the data directories of running servers among them.

    A server's working directory is its data directory (checkDataDir and ChangeToDataDir of the postmaster).
    """
    found = set()
    with contextlib.suppress(OSError):
        for name in os.listdir("/proc"):
            if name.isdecimal():
                with contextlib.suppress(OSError):
                    found.add(os.readlink(f"/proc/{name}/cwd"))
    return found


def used_by_a_server(locations: set[str], pgdata: str) -> tuple[str, str] | None:
    """A tablespace's directory that a running server on another data directory uses, and that directory.

    The copy of a data directory links to the tablespaces of the original.
    """
    real = {os.path.realpath(location): location for location in locations}
    for directory in sorted(server_directories() - {os.path.realpath(pgdata)}):
        for _oid, _link, target in links(directory):
            location = real.get(os.path.realpath(target))
            if location is not None:
                return location, directory
    return None


def unarchived(pgdata: str) -> int:
    """Finished segments in pg_wal that the server has not archived yet."""
    try:
        return len([n for n in os.listdir(os.path.join(pgdata, "pg_wal", "archive_status")) if n.endswith(".ready")])
    except OSError:
        return 0


def reusable_bytes(pgdata: str, locations: Mapping[int, str], major: int) -> int:
    """Room that the directory's own files take, and give back when they are replaced; hard-linked ones give none."""
    places = [pgdata]
    for location in locations.values():
        places += [os.path.join(location, name) for name in version_directories(location, version_directory(major))]
    total = 0
    for place in places:
        for directory, _names, files in os.walk(place):
            for name in files:
                with contextlib.suppress(OSError):
                    status = os.lstat(os.path.join(directory, name))
                    if stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
                        total += min(status.st_size, status.st_blocks * 512)
    return total
