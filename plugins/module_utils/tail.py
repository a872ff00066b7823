# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The end of WAL that the archive does not have yet: what a receiver's spool, or the pg_wal of a server that is dead,
holds beyond it.

A file belongs to it only when it continues the archive without a hole, on the timeline that is asked for, and its first
page says that it is this cluster's WAL of that position. A restore that uses it copies the files into ``pg_wal`` under
the names of whole segments; PostgreSQL asks the archive first and then looks there (XLogFileReadAnyTLI). What they are
copied from is never changed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from . import codec
from .archive import check_segment
from .errors import PitrError
from .index import ArchiveIndex
from .repository import Chapter, ClusterFolder
from .spool import SpoolFile, segments, spool_path
from .tree import LOCAL, Tree, fsync_directory
from .wal import SegmentHeader, WalFile, history_name


@dataclass(frozen=True)
class Tail:
    """Names of whole segments, in order, of ``timeline``; the last one may be half written.

    ``problem`` tells why a file that might have belonged to it does not. ``local``: where those lie that are in a
    pg_wal of this host; the others are in the spool.
    """

    timeline: int
    folder: str
    names: tuple[str, ...] = ()
    problem: str = ""
    local: Mapping[str, str] = field(default_factory=dict)

    def paths(self, name: str) -> tuple[str, str]:
        """Where a segment lies in the spool: being written, or finished meanwhile."""
        return os.path.join(self.folder, f"{name}.partial"), os.path.join(self.folder, name)

    def cut(self, count: int, problem: str = "") -> Tail:
        """The first so many segments of it."""
        names = self.names[:count]
        local = {name: path for name, path in self.local.items() if name in names}
        return replace(self, names=names, local=local, problem=problem or self.problem)

    def moved(self, old: str, new: str) -> Tail:
        """The same after a directory was renamed."""
        local = {
            name: new + path[len(old) :] if path.startswith(f"{old}/") else path for name, path in self.local.items()
        }
        return replace(self, local=local)


def first_number(chapter: Chapter, index: ArchiveIndex, timeline: int) -> int | None:
    """Number of the segment that would continue the archive on this timeline; None when nothing leads to it."""
    last = index.last(timeline)
    if last is not None:
        return last + 1
    # Nothing of it is archived yet: it begins where its parent was left.
    parent = index.tree.parent(timeline)
    return None if parent is None else parent.lsn.segment_number(chapter.wal_segment_size)


def look(folder: ClusterFolder, chapter: Chapter, index: ArchiveIndex, timeline: int) -> Tail:
    """What the spool has behind the last archived segment of this timeline."""
    place = spool_path(folder, chapter)
    try:
        names = folder.tree.names(place)
    except FileNotFoundError:
        return Tail(timeline, place)
    files = segments(names, chapter.wal_segment_size)
    found, problem = _follow(
        files,
        timeline,
        first_number(chapter, index, timeline),
        lambda file: _check(folder, chapter, place, file.name, folder.tree),
    )
    return Tail(timeline, place, tuple(found), problem)


def look_into_pg_wal(folder: ClusterFolder, chapter: Chapter, index: ArchiveIndex, timeline: int, pg_wal: str) -> Tail:
    """What a server's own pg_wal has behind the last archived segment of this timeline. No server may run on it.

    Segments of the future are there as well: recycled files, which have a name to come and old content (InstallXLogFile
    Segment of xlog.c). The address in the first page tells them.
    """
    place = spool_path(folder, chapter)
    # A .partial is the end of a timeline that this server has left itself.
    files = [file for file in segments(os.listdir(pg_wal), chapter.wal_segment_size) if not file.partial]

    def check(file: SpoolFile) -> None:
        with open(os.path.join(pg_wal, file.name), "rb") as stream:
            head = stream.read(SegmentHeader.SIZE)
        with contextlib.suppress(PitrError):
            if int(SegmentHeader(head).page_address) != file.number * chapter.wal_segment_size:
                raise FileNotFoundError(file.name)
        _check(folder, chapter, pg_wal, file.name, LOCAL)

    found, problem = _follow(files, timeline, first_number(chapter, index, timeline), check)
    return Tail(timeline, place, tuple(found), problem, {name: os.path.join(pg_wal, name) for name in found})


def _follow(
    files: Iterable[SpoolFile], timeline: int, number: int | None, check: Callable[[SpoolFile], None]
) -> tuple[list[str], str]:
    """Names of the segments of a timeline from ``number`` on that ``check`` does not object to, and its objection."""
    by_number: dict[int, SpoolFile] = {file.number: file for file in files if file.timeline == timeline}
    found: list[str] = []
    while number is not None and number in by_number:
        file = by_number[number]
        try:
            check(file)
            found.append(file.segment)
        except FileNotFoundError:
            # Nothing in it yet, or finished and archived while we looked.
            break
        except PitrError as error:
            return found, error.message
        if file.partial:
            break
        number += 1
    return found, ""


def join(spool: Tail, own: Tail, further: Callable[[str], bool]) -> Tail:
    """The most that both have together. They begin at the same segment.

    ``further(name)``: whether pg_wal has more of a segment than the spool, asked where both have it as their last.
    """
    if not own.names or not spool.names:
        return own if own.names else replace(spool, problem=spool.problem or own.problem)
    longer = own if len(own.names) > len(spool.names) else spool
    shared = min(len(own.names), len(spool.names))
    local = dict(own.local)
    for position, name in enumerate(longer.names):
        # Only the last one of each may be half written.
        if position >= len(own.names):
            local.pop(name, None)
        elif position == shared - 1 == len(own.names) - 1:
            if len(spool.names) > shared or not further(name):
                local.pop(name)
    return Tail(own.timeline, spool.folder, longer.names, spool.problem or own.problem, local)


def _check(folder: ClusterFolder, chapter: Chapter, place: str, name: str, tree: Tree) -> None:
    path = os.path.join(place, name)
    size = tree.stat(path).size
    if size != chapter.wal_segment_size:
        raise PitrError(f"{path} has {size} bytes instead of {chapter.wal_segment_size}; it is not used.")
    with codec.open_reader(path, tree) as reader:
        head = reader.read(512)
    if not head.strip(b"\0"):
        # Made in its full size; the first byte of WAL has not come.
        raise FileNotFoundError(path)
    segment = WalFile.parse(WalFile.parse(name).segment)
    check_segment(head, segment, chapter, path, lambda: _history(folder, chapter, place, segment.timeline, tree))


def _history(folder: ClusterFolder, chapter: Chapter, place: str, timeline: int, tree: Tree) -> str | None:
    name = history_name(timeline)
    for path, where in (
        (os.path.join(place, name), tree),
        (folder.wal_path(WalFile.parse(name), chapter), folder.tree),
    ):
        with contextlib.suppress(FileNotFoundError), codec.open_reader(path, where) as reader:
            return reader.read().decode(errors="replace")
    return None


def copy(folder: ClusterFolder, chapter: Chapter, tail: Tail, name: str, target: str) -> bool:
    """Copy one segment to ``target``, which must not exist; False when the archive has it by now.

    The receiver may be at work: the file is opened once, under whichever name it has, and what was copied is checked
    again. Raises PitrError, and leaves nothing, when it is not what was planned.
    """
    stored = folder.wal_path(WalFile.parse(name), chapter)
    own = tail.local.get(name)
    for path in (own,) if own else (*tail.paths(name), *tail.paths(name)):
        if folder.tree.exists(stored):
            return False
        with contextlib.suppress(FileNotFoundError):
            _copy(folder, chapter, path, name, target, LOCAL if own else folder.tree)
            return True
    if folder.tree.exists(stored):
        return False
    raise PitrError(f"{own or tail.paths(name)[0]} has vanished, and {stored} is not there. Plan again.")


def _copy(folder: ClusterFolder, chapter: Chapter, path: str, name: str, target: str, tree: Tree) -> None:
    with codec.open_reader(path, tree) as reader:
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
            check_segment(
                head, segment, chapter, path, lambda: _history(folder, chapter, place, segment.timeline, tree)
            )
            os.fsync(descriptor)
        except BaseException:
            os.unlink(target)
            raise
        finally:
            os.close(descriptor)
    fsync_directory(os.path.dirname(target))
