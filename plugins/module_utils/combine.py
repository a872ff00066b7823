# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A chain of backups becomes one data directory: every link is unpacked and verified, then pg_combinebackup.

All of that happens in a scratch directory inside of the data directory, and for a tablespace inside of its own: always
on the filesystem that it is for, and gone with whatever removes an unfinished restore. The result is moved up from
there by renames, without pg_control (extract.HELD_BACK).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

from . import codec, extract, locks
from .catalog import Backup
from .errors import PitrError
from .postgres import binary, run
from .stored import MANIFEST
from .tree import LOCAL, Tree, fsync_directory

SCRATCH = "pitr-combining"
# In a tablespace's directory; what begins like this is what an unfinished restore may clear (unfinished.empty).
TABLESPACE_SCRATCH = f"PG_{SCRATCH}"
_RESULT = "result"
# The first version of pg_combinebackup with --link.
_LINK_SINCE = 18
_FICLONE = 0x40049409  # linux/fs.h
_UNSUPPORTED = "not supported on this platform"


# --- how much room, and how to copy


def needed_bytes(chain: Sequence[Backup], directory: str) -> int:
    """Room that a restore of this chain takes at most, in a directory of this filesystem (nothing is left there).

    All links unpacked, and the result beside them: whole, or where files can be shared only what may have changed.
    """
    last = chain[-1]
    if len(chain) == 1:
        return last.database_bytes
    unpacked = sum(link.database_bytes for link in chain)
    if not _can_share(directory, last.postgresql_version):
        return unpacked + last.directory_bytes
    return unpacked + min(last.directory_bytes, sum(link.changed_bytes for link in chain))


def _can_share(directory: str, version: int) -> bool:
    """Whether a copy of a file can take no room here, as far as can be told without leaving a trace."""
    if _clones(directory):
        return True
    try:
        return version >= _LINK_SINCE and os.pathconf(directory, "PC_LINK_MAX") > 1
    except OSError:
        return False


@contextlib.contextmanager
def _unnamed(directory: str) -> Iterator[tuple[int, int]]:
    """A file of 64 KiB and an empty one that have no names in the directory."""
    with contextlib.ExitStack() as stack:
        pair = []
        for _number in range(2):
            pair.append(os.open(directory, os.O_TMPFILE | os.O_RDWR, 0o600))
            stack.callback(os.close, pair[-1])
        os.write(pair[0], bytes(65536))
        yield pair[0], pair[1]


def _clones(directory: str) -> bool:
    """Whether this filesystem shares blocks between files (FICLONE)."""
    try:
        with _unnamed(directory) as (source, target):
            fcntl.ioctl(target, _FICLONE, source)
    except OSError:
        return False
    return True


def _copies_in_kernel(directory: str) -> bool:
    """Whether copy_file_range works here."""
    try:
        with _unnamed(directory) as (source, target):
            return os.copy_file_range(source, target, 65536, 0) == 65536
    except (OSError, AttributeError):
        return False


def _links(directory: str) -> bool:
    """Whether this filesystem has hard links."""
    with tempfile.NamedTemporaryFile(dir=directory) as stream:
        try:
            os.link(stream.name, f"{stream.name}.link")
        except OSError:
            return False
        os.unlink(f"{stream.name}.link")
        return True


def methods(directories: Sequence[str], version: int) -> list[str]:
    """Options of pg_combinebackup, the cheapest first, that all these directories' filesystems can do.

    A reflink and a hard link cost no room. A hard link shares the file with the input, and that is only safe because
    the inputs are ours, and removed. What the platform that PostgreSQL was built on lacked is told by the program.
    """
    ways: list[tuple[str, Callable[[str], bool]]] = [("--clone", _clones)]
    if version >= _LINK_SINCE:
        ways.append(("--link", _links))
    ways.append(("--copy-file-range", _copies_in_kernel))
    return [*(option for option, works in ways if all(works(each) for each in directories)), "--copy"]


# --- combining


class Combination:
    """One chain on its way into one data directory, which holds nothing but the marker of an unfinished restore."""

    def __init__(
        self,
        chain: Sequence[Backup],
        backups_path: str,
        pgdata: str,
        locations: Mapping[int, str],
        bin_dir: str,
        progress: Callable[[int], None],
        tree: Tree = LOCAL,
    ) -> None:
        """``locations``: where each tablespace of the last link goes. ``progress`` is given bytes, also 0."""
        self._chain = chain
        self._stored = backups_path
        self._pgdata = pgdata
        self._locations = locations
        self._bin_dir = bin_dir
        self._progress = progress
        self._tree = tree
        self._scratch = os.path.join(pgdata, SCRATCH)

    def perform(self, verify: bool = True) -> None:
        """Afterwards the directory is complete but for pg_control, as extract.extract leaves it.

        Raises PitrError or OSError, and leaves what there is to whoever cleans up after a restore.
        """
        for place in (self._scratch, *self._locations.values()):
            os.makedirs(place, mode=0o700, exist_ok=True)
        lock = _lock(self._scratch)
        try:
            directories = self._unpack(verify)
            self._combine(directories, lock)
            if verify:
                self._verify_result()
            self._move_up()
            shutil.rmtree(self._scratch)
            for location in self._locations.values():
                shutil.rmtree(os.path.join(location, TABLESPACE_SCRATCH))
        finally:
            os.close(lock)

    def _place(self, oid: int, name: str) -> str:
        """Where a tablespace of one link, or of the result, is unpacked; one that was dropped later goes nowhere."""
        if oid in self._locations:
            return os.path.join(self._locations[oid], TABLESPACE_SCRATCH, name)
        return os.path.join(self._scratch, f"{name}-{oid}")

    def _unpack(self, verify: bool) -> list[str]:
        """Every link into a directory of its own. One is verified while the next one is unpacked."""
        directories = []
        waiting: list[Future[None]] = []
        with ThreadPoolExecutor(1) as beside:
            try:
                for number, link in enumerate(self._chain):
                    directory = os.path.join(self._scratch, str(number))
                    stored = os.path.join(self._stored, link.label)
                    places = {item.oid: self._place(item.oid, str(number)) for item in link.tablespaces}
                    os.mkdir(directory, 0o700)
                    extract.extract(link, stored, directory, places, self._progress, self._tree)
                    if verify:
                        waiting.append(
                            beside.submit(extract.verify, link, stored, directory, self._bin_dir, self._tree)
                        )
                    directories.append(directory)
                while waiting:
                    self._wait(waiting.pop(0))
            finally:
                for each in waiting:
                    each.cancel()
        for link, directory in zip(self._chain, directories):
            self._complete(link, directory)
        return directories

    def _wait(self, future: Future[None]) -> None:
        while not wait([future], timeout=1).done:
            self._progress(0)
        future.result()

    def _complete(self, link: Backup, directory: str) -> None:
        """pg_combinebackup wants pg_control, and takes checksums from the manifest."""
        os.rename(os.path.join(directory, extract.HELD_BACK), os.path.join(directory, extract.PG_CONTROL))
        stored = extract.check_manifest(link, os.path.join(self._stored, link.label), self._tree)
        with codec.open_reader(stored, self._tree) as reader, open(os.path.join(directory, MANIFEST), "xb") as copy:
            shutil.copyfileobj(reader, copy, codec.CHUNK)

    def _combine(self, directories: Sequence[str], lock: int) -> None:
        last = self._chain[-1]
        argv = [binary(self._bin_dir, "pg_combinebackup"), "--no-sync", "--output", self._result()]
        places = []
        for item in last.tablespaces:
            source = self._place(item.oid, str(len(self._chain) - 1))
            places.append(os.path.dirname(source))
            argv.append(f"--tablespace-mapping={_escaped(source)}={_escaped(self._place(item.oid, _RESULT))}")
        said = ""
        for method in methods([self._scratch, *places], last.postgresql_version):
            said = self._run([*argv, method, *directories], lock)
            if _UNSUPPORTED not in said:
                break
        if said:
            labels = ", ".join(link.label for link in self._chain)
            raise PitrError(f"pg_combinebackup could not combine {labels}: {said}")

    def _run(self, argv: Sequence[str], lock: int) -> str:
        """What the program says when it fails, empty when it does not.

        It has the lock, too: when this process is killed, the next try can see that somebody still writes.
        """
        with tempfile.TemporaryFile() as complaints:
            process = subprocess.Popen(
                argv,
                env={**os.environ, "LC_ALL": "C"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=complaints,
                pass_fds=(lock,),
            )
            try:
                while process.poll() is None:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(timeout=1)
                    self._progress(0)
            except BaseException:
                process.kill()
                process.wait()
                raise
            complaints.seek(0)
            said = complaints.read(4000).decode(errors="replace").strip()
        return (said or f"exit code {process.returncode}") if process.returncode else ""

    def _result(self) -> str:
        return os.path.join(self._scratch, _RESULT)

    def _verify_result(self) -> None:
        """pg_combinebackup has written a manifest of what it meant to write."""
        argv = [binary(self._bin_dir, "pg_verifybackup"), "--no-parse-wal", "--quiet", self._result()]
        with ThreadPoolExecutor(1) as beside:
            try:
                self._wait(beside.submit(_discard, argv))
            except PitrError as error:
                labels = ", ".join(link.label for link in self._chain)
                raise PitrError(f"What pg_combinebackup has made of {labels} is not whole: {error.message}") from None

    def _move_up(self) -> None:
        """By renames only: the result where it belongs, pg_control under the name that no server looks at."""
        result = self._result()
        os.rename(os.path.join(result, extract.PG_CONTROL), os.path.join(result, extract.HELD_BACK))
        os.unlink(os.path.join(result, MANIFEST))
        for oid, location in self._locations.items():
            place = self._place(oid, _RESULT)
            for name in os.listdir(place):
                os.rename(os.path.join(place, name), os.path.join(location, name))
            link = os.path.join(result, "pg_tblspc", str(oid))
            os.unlink(link)
            os.symlink(location, link)
        for name in os.listdir(result):
            target = os.path.join(self._pgdata, name)
            if os.path.islink(target):
                # pg_wal on a filesystem of its own; what the backup has in it is empty directories.
                for each in os.listdir(os.path.join(result, name)):
                    shutil.move(os.path.join(result, name, each), os.path.join(target, each))
                continue
            os.rename(os.path.join(result, name), target)
        fsync_directory(self._pgdata)


def _discard(argv: Sequence[str]) -> None:
    run(argv)


def _escaped(path: str) -> str:
    """An equals sign in a path, for --tablespace-mapping."""
    return path.replace("=", "\\=")


def _lock(directory: str) -> int:
    """A descriptor that holds a lock of this directory, where locks can be had."""
    try:
        return locks.hold_directory(directory)
    except (locks.InUseError, OSError):
        return os.open(directory, os.O_RDONLY | os.O_DIRECTORY)


def is_busy(pgdata: str) -> bool:
    """Whether somebody still combines backups here, such as the pg_combinebackup of a restore that was killed."""
    try:
        os.close(locks.hold_directory(os.path.join(pgdata, SCRATCH)))
    except locks.InUseError:
        return True
    except OSError:
        return False
    return False
