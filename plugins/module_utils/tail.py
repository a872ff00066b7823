# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The end of WAL that the archive does not have yet: what a receiver's spool holds beyond it.

A file belongs to it only when it continues the archive without a hole, on the timeline that is asked for, and its first
page says that it is this cluster's WAL of that position. A restore that uses it copies the files into ``pg_wal`` under
the names of whole segments; PostgreSQL asks the archive first and then looks there (XLogFileReadAnyTLI).
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass

from . import codec
from .archive import check_segment
from .errors import PitrError
from .index import ArchiveIndex
from .repository import Chapter, ClusterFolder
from .spool import segments, spool_path
from .tree import fsync_directory
from .wal import WalFile, history_name


@dataclass(frozen=True)
class Tail:
    """Names of whole segments, in order, of ``timeline``; the last one may be half written.

    ``problem`` tells why a file of the spool that might have belonged to it does not.
    """

    timeline: int
    folder: str
    names: tuple[str, ...] = ()
    problem: str = ""

    def paths(self, name: str) -> tuple[str, str]:
        """Where a segment lies in the spool: being written, or finished meanwhile."""
        return os.path.join(self.folder, f"{name}.partial"), os.path.join(self.folder, name)


def look(folder: ClusterFolder, chapter: Chapter, index: ArchiveIndex, timeline: int) -> Tail:
    """What the spool has behind the last archived segment of this timeline."""
    place = spool_path(folder, chapter)
    try:
        names = folder.tree.names(place)
    except FileNotFoundError:
        return Tail(timeline, place)
    files = [file for file in segments(names, chapter.wal_segment_size) if file.timeline == timeline]
    last = index.last(timeline)
    if last is not None:
        number = last + 1
    else:
        # Nothing of it is archived yet: it begins where its parent was left.
        parent = index.tree.parent(timeline)
        if parent is None:
            return Tail(timeline, place)
        number = parent.lsn.segment_number(chapter.wal_segment_size)
    found: list[str] = []
    problem = ""
    while not problem:
        here = [file for file in files if file.number == number]
        if not here:
            break
        name = here[-1].segment
        try:
            _check(folder, chapter, place, here[-1].name)
            found.append(name)
        except FileNotFoundError:
            # Nothing in it yet, or finished and archived while we looked.
            break
        except PitrError as error:
            problem = error.message
        if here[-1].partial:
            break
        number += 1
    return Tail(timeline, place, tuple(found), problem)


def _check(folder: ClusterFolder, chapter: Chapter, place: str, name: str) -> None:
    path = os.path.join(place, name)
    size = folder.tree.stat(path).size
    if size != chapter.wal_segment_size:
        raise PitrError(f"{path} has {size} bytes instead of {chapter.wal_segment_size}; it is not used.")
    with codec.open_reader(path, folder.tree) as reader:
        head = reader.read(512)
    if not head.strip(b"\0"):
        # Made in its full size; the first byte of WAL has not come.
        raise FileNotFoundError(path)
    segment = WalFile.parse(WalFile.parse(name).segment)
    check_segment(head, segment, chapter, path, lambda: _history(folder, chapter, place, segment.timeline))


def _history(folder: ClusterFolder, chapter: Chapter, place: str, timeline: int) -> str | None:
    name = history_name(timeline)
    for path in (os.path.join(place, name), folder.wal_path(WalFile.parse(name), chapter)):
        with contextlib.suppress(FileNotFoundError), codec.open_reader(path, folder.tree) as reader:
            return reader.read().decode(errors="replace")
    return None


def copy(folder: ClusterFolder, chapter: Chapter, tail: Tail, name: str, target: str) -> bool:
    """Copy one segment to ``target``, which must not exist; False when the archive has it by now.

    The receiver may be at work: the file is opened once, under whichever name it has, and what was copied is checked
    again. Raises PitrError, and leaves nothing, when it is not what was planned.
    """
    stored = folder.wal_path(WalFile.parse(name), chapter)
    for path in (*tail.paths(name), *tail.paths(name)):
        if folder.tree.exists(stored):
            return False
        with contextlib.suppress(FileNotFoundError):
            _copy(folder, chapter, path, name, target)
            return True
    if folder.tree.exists(stored):
        return False
    raise PitrError(f"{tail.paths(name)[0]} has vanished, and {stored} is not there. Plan again.")


def _copy(folder: ClusterFolder, chapter: Chapter, path: str, name: str, target: str) -> None:
    with codec.open_reader(path, folder.tree) as reader:
        descriptor = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            size = 0
            while True:
                data = reader.read(codec.CHUNK)
                if not data:
                    break
                size += os.write(descriptor, data)
            if size != chapter.wal_segment_size:
                raise PitrError(f"{path} has {size} bytes instead of {chapter.wal_segment_size}; it is not used.")
            segment = WalFile.parse(name)
            place = os.path.dirname(path)
            head = os.pread(descriptor, 512, 0)
            check_segment(head, segment, chapter, path, lambda: _history(folder, chapter, place, segment.timeline))
            os.fsync(descriptor)
        except BaseException:
            os.unlink(target)
            raise
        finally:
            os.close(descriptor)
    fsync_directory(os.path.dirname(target))
