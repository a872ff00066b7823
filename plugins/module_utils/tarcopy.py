# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A data directory and its tablespaces into the tar files of a base backup, while a server may be writing them.

The files have the names and the form that pg_basebackup gives them. Memory stays flat: a piece of a file at a time.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import sys
import tarfile
import time
from collections.abc import Collection, Iterator
from types import TracebackType

from . import codec
from .contents import PG_CONTROL, PG_WAL, Item, walk
from .errors import PitrError
from .manifest import Manifest

SUFFIX = {"none": "", "gzip": ".gz", "lz4": ".lz4", "zstd": ".zst"}
# A name is at most 99 bytes long, as in the server's tar files (tarCreateHeader).
_MAX_NAME = 99
_BLOCK = 512
_MODE = 0o600
_RATES = {"": 1024, "k": 1024, "M": 1024 * 1024}


def parse_rate(text: str) -> int:
    """Bytes a second of what ``pg_basebackup --max-rate`` takes; 0 for no limit. Raises PitrError."""
    if not text:
        return 0
    match = re.fullmatch(r"(\d+)([kM]?)", text)
    rate = int(match.group(1)) * _RATES[match.group(2)] if match else 0
    if not 32 * 1024 <= rate <= 1024**3:
        raise PitrError(f"max_rate '{text}' is not a rate from 32k to 1024M. No backup was taken.")
    return rate


class Throttle:
    """Keeps the average below a number of bytes a second; 0 for no limit."""

    def __init__(self, rate: int) -> None:
        self._rate = rate
        self._begun = time.monotonic()
        self._done = 0

    def add(self, count: int) -> None:
        """After so many bytes, wait for as long as it takes."""
        self._done += count
        if self._rate:
            ahead = self._done / self._rate - (time.monotonic() - self._begun)
            if ahead > 0:
                time.sleep(ahead)


def _read(source: int, size: int, path: str) -> bytes:
    try:
        return os.read(source, size)
    except OSError as error:
        # read(2) knows only the descriptor, and a disk that fails has to be told by the file.
        error.filename = path
        raise


class Tarball:
    """One tar file. ``place`` is where its content lies in the data directory: empty, or ``pg_tblspc/<oid>/``."""

    def __init__(self, writer: codec.Writer, manifest: Manifest, throttle: Throttle, place: str = "") -> None:
        self._writer = writer
        self._manifest = manifest
        self._throttle = throttle
        self._place = place

    def _header(self, name: str, kind: bytes, size: int, mode: int, mtime: float) -> None:
        if len(os.fsencode(name)) > _MAX_NAME:
            raise PitrError(
                f"The name {self._place}{name} is longer than {_MAX_NAME} bytes, which no tar file of PostgreSQL holds."
                " Move that file out of the data directory. No backup was taken."
            )
        info = tarfile.TarInfo(name)
        info.type = kind
        info.size = size
        info.mode = mode & 0o7777
        info.mtime = int(mtime)
        info.uid, info.gid = os.geteuid(), os.getegid()
        self._writer.write(info.tobuf(tarfile.GNU_FORMAT, sys.getfilesystemencoding(), "surrogateescape"))

    def _pad(self, size: int) -> None:
        self._writer.write(bytes(-size % _BLOCK))

    def directory(self, name: str, path: str) -> None:
        """An entry that keeps the permissions; nothing when it is gone."""
        with contextlib.suppress(FileNotFoundError):
            status = os.stat(path)
            self._header(name, tarfile.DIRTYPE, 0, status.st_mode, status.st_mtime)

    def content(self, name: str, data: bytes, listed: bool = True) -> None:
        """A file that is made here. ``listed``: in the manifest, where WAL is not."""
        when = time.time()
        self._header(name, tarfile.REGTYPE, len(data), _MODE, when)
        self._writer.write(data)
        self._pad(len(data))
        if listed:
            self._manifest.add(os.fsencode(self._place + name), len(data), when, hashlib.sha256(data).hexdigest())

    def segment(self, name: str, path: str, used: int, size: int) -> None:
        """A segment of WAL of ``size`` bytes, of which the first ``used`` are copied; zeros follow.

        Segments are used again and again, and what it was before is of no use to anybody. Not in the manifest.
        """
        self._header(name, tarfile.REGTYPE, size, _MODE, time.time())
        with open(path, "rb") as source:
            left = size
            while left:
                data = source.read(min(used, codec.CHUNK))
                used -= len(data)
                data = data or bytes(min(left, codec.CHUNK))
                self._writer.write(data)
                left -= len(data)

    def file(self, name: str, path: str) -> bool:
        """A file as it is now. Returns False when it has vanished.

        It has the size that it had when it was opened: what is missing by then is zeros, what was added is left out.
        WAL brings both back (sendFile of basebackup.c).
        """
        try:
            source = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return False
        try:
            status = os.fstat(source)
            self._header(name, tarfile.REGTYPE, status.st_size, status.st_mode, status.st_mtime)
            digest = hashlib.sha256()
            left = status.st_size
            while left:
                data = _read(source, min(left, codec.CHUNK), path) or bytes(min(left, codec.CHUNK))
                digest.update(data)
                self._writer.write(data)
                self._throttle.add(len(data))
                left -= len(data)
        finally:
            os.close(source)
        self._pad(status.st_size)
        self._manifest.add(os.fsencode(self._place + name), status.st_size, status.st_mtime, digest.hexdigest())
        return True

    def end(self) -> None:
        """Two empty blocks."""
        self._writer.write(bytes(2 * _BLOCK))


class Copy:
    """The files of one backup in ``directory``: ``<oid>.tar``, ``base.tar`` and the manifest's list of them.

    As a context it is complete when it was left without an exception. ``passed_over`` names what is neither file nor
    directory, which no backup has.
    """

    def __init__(self, directory: str, compression: str, manifest: Manifest, max_rate: str = "") -> None:
        """``compression`` as codec.parse takes it. Raises PitrError for one that cannot be had."""
        self._directory = directory
        self._codec = codec.parse(compression)
        self._manifest = manifest
        self._throttle = Throttle(parse_rate(max_rate))
        self._stack = contextlib.ExitStack()
        self.passed_over: list[str] = []

    def __enter__(self) -> Copy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    @contextlib.contextmanager
    def _tar(self, name: str, place: str = "") -> Iterator[Tarball]:
        path = os.path.join(self._directory, f"{name}.tar{SUFFIX[self._codec[0]]}")
        with codec.open_writer(path, self._codec) as writer:
            tarball = Tarball(writer, self._manifest, self._throttle, place)
            yield tarball
            tarball.end()

    def tablespace(self, oid: int, location: str) -> None:
        """One tablespace: the directories in it that a server has made, of this version."""
        with self._tar(str(oid), f"pg_tblspc/{oid}/") as tarball:
            self._items(tarball, walk(location))

    def base(self, root: str, skip: Collection[str] = (), unlogged: bool = False) -> None:
        """The data directory without pg_control and without the content of pg_wal; :meth:`finish` completes it."""
        self._base = self._stack.enter_context(self._tar("base"))
        self._items(self._base, walk(root, skip=skip, unlogged=unlogged))

    def _items(self, tarball: Tarball, items: Iterator[Item]) -> None:
        for item in items:
            if item.special:
                self.passed_over.append(item.path)
            elif item.is_directory:
                tarball.directory(item.name, item.path)
                if item.name == PG_WAL:
                    for name in ("archive_status", "summaries"):
                        tarball.directory(f"{PG_WAL}/{name}", os.path.join(item.path, name))
            else:
                tarball.file(item.name, item.path)

    def add_segment(self, path: str, used: int, size: int) -> None:
        """A segment that the backup has in itself; see Tarball.segment."""
        self._base.segment(f"{PG_WAL}/{os.path.basename(path)}", path, used, size)

    def add_history(self, name: str, data: bytes) -> None:
        """A history file beside it. The manifest lists neither."""
        self._base.content(f"{PG_WAL}/{name}", data, listed=False)

    def add(self, name: str, data: bytes) -> None:
        """A file that is made for the backup."""
        self._base.content(name, data)

    def finish(self, control: bytes) -> None:
        """pg_control, which is the last file of every backup."""
        self._base.content(PG_CONTROL, control)
