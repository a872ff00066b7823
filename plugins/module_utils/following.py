# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The tars of a backup read back while they are being written.

While a server compresses, the host that stores has little to do, and reading afterwards takes half as long as the
backup did. What is read is what the file holds.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable

from . import codec
from .codec import CHUNK
from .errors import PitrError
from .tarstream import TarStream, open_stream
from .tree import LOCAL, Source, Tree

# Seconds until a file that has not grown is looked at again.
_PAUSE = 0.02


def count(tar: TarStream) -> tuple[int, int]:
    """Number and bytes of the files of a tar, read to its proven end. Raises as the tar does."""
    files = size = 0
    for member in tar:
        # WAL that is in the backup itself is no part of the manifest.
        if member.kind == "file" and not member.name.startswith("pg_wal/"):
            files += 1
            size += member.size
    return files, size


def count_stored(path: str, tree: Tree = LOCAL) -> tuple[int, int]:
    """The same, of a stored tar that nobody writes any more."""
    with open_stream(path, tree) as tar:
        return count(tar)


class _Growing(Source):
    """A file that another process is still writing, until ``is_done`` says that it does not any more."""

    def __init__(self, path: str, is_done: Callable[[], bool]) -> None:
        self._is_done = is_done
        self._file = os.open(path, os.O_RDONLY)
        source, self._pipe = os.pipe()
        super().__init__(source, path)
        self._thread = threading.Thread(target=self._pump, daemon=True)
        self._thread.start()

    def peek(self, size: int = 8) -> bytes:
        while True:
            done = self._is_done()
            data = os.pread(self._file, size, 0)
            if done or len(data) == size:
                return data
            time.sleep(_PAUSE)

    def _pump(self) -> None:
        space = memoryview(bytearray(CHUNK))
        try:
            while True:
                # Asked before the read, so that nothing that is written in between is missed.
                done = self._is_done()
                data = space[: os.readv(self._file, [space])]
                if not data and done:
                    return
                if not data:
                    time.sleep(_PAUSE)
                while data:
                    data = data[os.write(self._pipe, data) :]
        except BrokenPipeError:
            # Whoever reads has seen enough.
            return
        finally:
            os.close(self._pipe)

    def close(self) -> None:
        super().close()
        self._thread.join()
        os.close(self._file)


class Follower:
    """Counts the files in the tars that pg_basebackup puts into a directory, one tar after the other."""

    def __init__(self, directory: str) -> None:
        """Begins at once, in a thread. ``directory`` need not be there yet."""
        self._directory = directory
        self._ended = threading.Event()
        self._counts: dict[str, tuple[int, int]] = {}
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def finish(self) -> dict[str, tuple[int, int]]:
        """Nobody writes any more: number and bytes of the files of each tar, by its name.

        One that could not be read to its end is not among them; who reads it again learns why.
        """
        self._ended.set()
        self._thread.join()
        return self._counts

    def _names(self) -> set[str]:
        with contextlib.suppress(FileNotFoundError):
            return {name for name in os.listdir(self._directory) if ".tar" in name}
        return set()

    def _follow(self) -> None:
        seen: set[str] = set()
        while True:
            ended = self._ended.is_set()
            names = self._names()
            if names - seen:
                name = min(names - seen)
                seen.add(name)
                self._read(name, names)
            elif ended:
                return
            else:
                time.sleep(_PAUSE)

    def _read(self, name: str, known: set[str]) -> None:
        def is_done() -> bool:
            # The next one is begun when this one is written.
            return self._ended.is_set() or not self._names() <= known

        path = os.path.join(self._directory, name)
        with contextlib.suppress(OSError, PitrError):
            source = _Growing(path, is_done)
            try:
                reader = codec.Reader(source)
                try:
                    self._counts[name] = count(TarStream(reader, path))
                finally:
                    reader.close()
            finally:
                source.close()
