# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Backups back into directories: the stored tars, read forward once and written file by file."""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import shutil
import tempfile
import threading
from collections.abc import Callable, Container, Iterator
from types import TracebackType

from . import codec
from .catalog import Backup, Tablespace
from .codec import CHUNK
from .encryption import SUFFIX
from .errors import PitrError
from .postgres import binary, run
from .repository import write_atomic
from .stored import MANIFEST, sha256
from .tarstream import Member, TarStream, open_stream
from .tree import LOCAL, Tree

PG_CONTROL = "global/pg_control"
# pg_control waits under this name until everything else is in place: without it no server starts from the directory.
HELD_BACK = "global/pg_control.pitr-restoring"
# Says that a directory is not complete (unfinished.py).
IN_PROGRESS = "pitr-restoring.json"


def safe_path(root: str, name: str, where: str) -> str:
    """Path of a tar member below ``root``. Raises PitrError for a name that leads out of it."""
    parts = name.rstrip("/").split("/")
    if name.startswith("/") or ".." in parts:
        raise PitrError(f"{where} is damaged: it holds the name '{name}'.")
    return os.path.join(root, *[part for part in parts if part not in ("", ".")])


class _Hands:
    """Creates small files beside the reading of the tar.

    A data directory has a thousand files and more that are a few pages long, and creating one costs the kernel more
    than writing it. It does that for one file of a directory at a time, so that each directory belongs to one thread.
    Leaving the block waits for all of them and raises what the first failure was.
    """

    SMALL = 64 * 1024  # bytes
    WAITING = 512  # files of one thread: with SMALL what memory may hold

    def __init__(self) -> None:
        self._failure: BaseException | None = None
        self._owners: dict[str, int] = {}
        count = min(4, os.cpu_count() or 1)
        self._queues: list[queue.Queue[tuple[str, int, bytes] | None]] = [
            queue.Queue(self.WAITING) for _number in range(count)
        ]
        self._threads = [threading.Thread(target=self._work, args=(each,), daemon=True) for each in self._queues]

    def __enter__(self) -> _Hands:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self._failure is None:
            self._failure = error
        for each in self._queues:
            each.put(None)
        for thread in self._threads:
            thread.join()
        if error is None:
            self.check()

    def check(self) -> None:
        """Raise what a thread has failed with."""
        if self._failure is not None:
            raise self._failure

    def create(self, target: str, mode: int, content: bytes) -> None:
        """Create this file with this content, soon."""
        self.check()
        owner = self._owners.setdefault(os.path.dirname(target), len(self._owners) % len(self._queues))
        self._queues[owner].put((target, mode, content))

    def _work(self, waiting: queue.Queue[tuple[str, int, bytes] | None]) -> None:
        while True:
            item = waiting.get()
            if item is None:
                return
            if self._failure is not None:
                continue
            target, mode, content = item
            try:
                descriptor = _create(target, mode)
                try:
                    _write_all(descriptor, content)
                finally:
                    os.close(descriptor)
            except BaseException as error:
                self._failure = self._failure or error


def extract_tar(
    path: str,
    root: str,
    progress: Callable[[int], None],
    tree: Tree = LOCAL,
    wanted: Container[str] | None = None,
) -> None:
    """Unpack one stored tar below ``root``, calling ``progress`` with the bytes of every file.

    With ``wanted`` (names in the tar) only these files, and every directory. Existing files are never overwritten.
    Raises PitrError or OSError.
    """
    with open_stream(path, tree) as tar, _Hands() as hands:
        for member in tar:
            # Not lstrip: ".hidden" is a name, too.
            plain = member.name[2:] if member.name.startswith("./") else member.name
            name = HELD_BACK if plain == PG_CONTROL else member.name
            target = safe_path(root, name, path)
            if member.kind == "directory":
                os.makedirs(target, mode=0o700, exist_ok=True)
                os.chmod(target, member.mode)
            elif member.kind != "file":
                raise PitrError(f"{path} is damaged: '{member.name}' is neither a file nor a directory.")
            elif plain == IN_PROGRESS:
                # Of a restore that was killed before it had changed anything, on the server that the backup is of.
                continue
            elif wanted is None or plain in wanted:
                _write(tar, member, target, hands)
                progress(member.size)


def _create(target: str, mode: int) -> int:
    return os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)


def _write_all(descriptor: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _write(tar: TarStream, member: Member, target: str, hands: _Hands) -> None:
    if member.size <= hands.SMALL:
        hands.create(target, member.mode, tar.content())
        return
    descriptor = _create(target, member.mode)
    try:
        for piece in tar.pieces():
            _write_all(descriptor, piece)
    finally:
        os.close(descriptor)


def extract(
    backup: Backup,
    folder: str,
    pgdata: str,
    locations: dict[int, str],
    progress: Callable[[int], None],
    tree: Tree = LOCAL,
) -> None:
    """Unpack a full backup. ``locations`` maps tablespace OIDs to the directories they go to, which must be empty.

    Afterwards the directory is complete but for pg_control, which lies under :data:`HELD_BACK`.
    """
    base = [file.name for file in backup.files if file.name.startswith("base.tar")]
    extract_tar(os.path.join(folder, base[0]), pgdata, progress, tree)
    for tablespace in backup.tablespaces:
        location = locations[tablespace.oid]
        os.makedirs(location, mode=0o700, exist_ok=True)
        stored = [file.name for file in backup.files if file.name.startswith(f"{tablespace.oid}.tar")]
        if not stored:
            raise PitrError(f"The backup {backup.label} has no file for the tablespace {tablespace.oid}.")
        extract_tar(os.path.join(folder, stored[0]), location, progress, tree)
        os.symlink(location, os.path.join(pgdata, "pg_tblspc", str(tablespace.oid)))


def check_manifest(backup: Backup, folder: str, tree: Tree = LOCAL) -> str:
    """Path of the stored manifest. Raises PitrError when it is not the one that was stored with the backup."""
    name = MANIFEST + (SUFFIX if backup.encryption else "")
    stored = os.path.join(folder, name)
    if sha256(stored, tree) != {file.name: file.sha256 for file in backup.files}[name]:
        raise PitrError(f"{stored} is not the file that was stored with the backup.", path=stored)
    return stored


def verify(backup: Backup, folder: str, pgdata: str, bin_dir: str, tree: Tree = LOCAL) -> None:
    """Compare every restored file with the backup's manifest (pg_verifybackup). Raises PitrError naming the files."""
    stored = check_manifest(backup, folder, tree)
    with tempfile.TemporaryDirectory(prefix="pitr-manifest-") as directory:
        manifest = os.path.join(directory, MANIFEST)
        with codec.open_reader(stored, tree) as reader, open(manifest, "wb") as copy:
            shutil.copyfileobj(reader, copy, CHUNK)
        argv = [binary(bin_dir, "pg_verifybackup"), "--no-parse-wal", "--quiet", f"--manifest-path={manifest}"]
        # Both names, because one of them is the other; pg_control proves itself by its own checksum.
        argv += [f"--ignore={PG_CONTROL}", f"--ignore={HELD_BACK}", f"--ignore={IN_PROGRESS}", pgdata]
        try:
            run(argv)
        except PitrError as error:
            # zstd as the server writes it has no checksum of its own, so that damage shows only here.
            files = [(os.path.join(folder, file.name), file.sha256) for file in backup.files]
            changed = ", ".join(path for path, digest in files if sha256(path, tree) != digest)
            kept = "the stored files are as they were stored"
            reason = f"{changed} has changed since it was stored" if changed else kept
            raise PitrError(
                f"The restored files are not those of the backup {backup.label}: {reason}. {error.message}",
                path=changed,
            ) from None


@contextlib.contextmanager
def settling(*paths: str) -> Iterator[None]:
    """Put what was written on stable storage beside the work in the block. Raises what :func:`settle` raises."""
    failures: list[OSError] = []

    def work() -> None:
        try:
            settle(*paths)
        except OSError as error:
            # The kernel tells it once only: a later call would not hear of it.
            failures.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join()
    if failures:
        raise failures[0]


def rewrite_tablespace_map(pgdata: str, tablespaces: tuple[Tablespace, ...], locations: dict[int, str]) -> None:
    """Let the server make its links to the new directories, not to those of the server the backup came from."""
    if not tablespaces:
        return
    lines = []
    for tablespace in tablespaces:
        path = locations[tablespace.oid].replace("\\", "\\\\").replace("\n", "\\\n").replace("\r", "\\\r")
        lines.append(f"{tablespace.oid} {path}\n")
    write_atomic(os.path.join(pgdata, "tablespace_map"), "".join(lines).encode("utf-8", "surrogateescape"))


def settle(*paths: str) -> None:
    """Put everything that was written on the filesystems of these paths on stable storage.

    The server does it, too, when it starts from a backup (SyncDataDirectory of fd.c), but not from the copy of a
    cluster that was shut down, and not before.
    """
    devices = {}
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            devices[os.stat(path).st_dev] = path
    for path in devices.values():
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            syncfs = getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None)
            if syncfs is None:
                os.sync()
            elif syncfs(descriptor) != 0:
                code = ctypes.get_errno()
                raise OSError(code, os.strerror(code), path)
        finally:
            os.close(descriptor)
