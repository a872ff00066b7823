# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""How many bytes an archive's folders hold.

Names are read a folder at a time, sizes a file at a time: two microseconds each, which is two seconds of a million. So
many folders are shared out to processes that do nothing else.
"""

from __future__ import annotations

import contextlib
import os
from array import array

# Below this many folders a second process costs more than it saves.
WORTH_A_PROCESS = 64
MAX_PROCESSES = 4


def folder_bytes(path: str, below: str = "") -> int:
    """Stored bytes of the WAL in one folder; with ``below`` only of names that sort before it.

    Raises OSError when the folder cannot be read; one that is gone has no bytes.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return 0
    total = 0
    stat = os.stat
    try:
        log = os.path.basename(path)
        names = [name for name in os.listdir(descriptor) if name[:16] == log and (not below or name < below)]
        try:
            return sum([stat(name, dir_fd=descriptor, follow_symlinks=False).st_size for name in names])
        except FileNotFoundError:
            # Something is being removed meanwhile.
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    total += stat(name, dir_fd=descriptor, follow_symlinks=False).st_size
        return total
    finally:
        os.close(descriptor)


class Sizes:
    """Stored bytes of some folders of an archive on this host, added up while the caller does something else."""

    def __init__(self, archive: str, logs: list[str]) -> None:
        """Many folders are shared out to processes that begin at once; few are read by :meth:`result`."""
        self._archive = archive
        self._logs = logs
        self._shares: list[list[str]] = []
        self._children: list[tuple[int, int]] = []
        if len(logs) >= WORTH_A_PROCESS:
            workers = min(MAX_PROCESSES, os.cpu_count() or 1)
            self._shares = [logs[start::workers] for start in range(workers)]
            self._children = [_start(archive, share) for share in self._shares]

    def result(self) -> dict[str, int]:
        """Bytes by folder. Raises OSError when a folder cannot be read."""
        result: dict[str, int] = {}
        for share, (pid, source) in zip(self._shares, self._children):
            with os.fdopen(source, "rb") as stream:
                said = stream.read()
            os.waitpid(pid, 0)
            sizes = array("Q")
            if len(said) == sizes.itemsize * len(share):
                sizes.frombytes(said)
                result.update(zip(share, sizes))
        # Few of them, or a process has died or could not read something: whatever that is, it is told from here.
        for log in self._logs:
            if log not in result:
                result[log] = folder_bytes(os.path.join(self._archive, log))
        return result


def _start(archive: str, share: list[str]) -> tuple[int, int]:
    """A process that adds up these folders. Returns its id and where it writes what it found."""
    source, target = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(source)
            # Short names are found faster, and the parent's own directory stays what it is.
            os.chdir(archive)
            sizes = array("Q", [_share_bytes(log) for log in share])
            with os.fdopen(target, "wb") as stream:
                stream.write(sizes.tobytes())
            code = 0
        finally:
            # Not sys.exit: what is to be cleaned up is the parent's.
            os._exit(code)
    os.close(target)
    return pid, source


def _share_bytes(log: str) -> int:
    """As :func:`folder_bytes`, faster, for a process whose directory is the archive."""
    os.chdir(log)
    try:
        stat = os.lstat
        return sum([stat(name).st_size for name in os.listdir() if name[:16] == log])
    finally:
        os.chdir("..")
