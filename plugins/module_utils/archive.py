# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""WAL into the archive and out of it: what ``archive_command`` and ``restore_command`` do.

The two rules that nothing may break: ``push`` says done only when the segment lies in the archive on stable storage,
whole and ours; ``get`` says "not there" only when it is proven not to be there. PostgreSQL reads the second answer as
the end of the archive, and promotes.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping

from . import codec
from .errors import PitrError
from .repository import Chapter, ClusterFolder, archived_logs
from .timeline import ancestry, parse_history
from .tree import Tree
from .wal import SegmentHeader, WalFile, history_name

# Seconds that a missing segment is waited for while its successors are being archived: of several that are pushed at
# once, a later one may come first. An older hole (seconds) is one at once.
HOLE_PATIENCE = 3.0
HOLE_FRESH = 60.0


class Absent(Exception):
    """The file is not in an archive that was reachable, and nothing later of its timeline is."""


class _Hole(PitrError):
    """A segment is missing, and ``later`` is the path of one behind it."""

    def __init__(self, message: str, later: str) -> None:
        super().__init__(message)
        self.later = later


def check_segment(
    data: bytes, wal_file: WalFile, chapter: Chapter, where: str, find_history: Callable[[], str | None]
) -> None:
    """Compare a segment's first page with its name and with the archive's cluster. Raises PitrError when they disagree.

    ``find_history``: looks for the text of the history file of the segment's timeline. The first segment of a timeline
    begins as a copy of its parent's segment (XLogInitNewTimeline), so its first page may carry the parent's number.
    """
    try:
        header = SegmentHeader(data)
    except PitrError as error:
        raise PitrError(f"{where} is not a WAL segment: {error.message}. Nothing was changed.") from None
    if header.system_identifier != chapter.system_identifier:
        raise PitrError(
            f"{where} was written by the cluster with system identifier {header.system_identifier}; the archive belongs"
            f" to {chapter.system_identifier}. Refused; nothing was changed."
        )
    if header.segment_size != chapter.wal_segment_size:
        raise PitrError(
            f"{where} has {header.segment_size} byte segments, the archive {chapter.wal_segment_size}. Refused."
        )
    number = wal_file.number(header.segment_size)
    if int(header.page_address) != number * header.segment_size:
        raise PitrError(f"{where} holds WAL from {header.page_address}, which is not what its name says. Refused.")
    if header.timeline == wal_file.timeline:
        return
    history = find_history()
    if history is not None:
        *ancestors, own = ancestry(wal_file.timeline, parse_history(wal_file.timeline, history))
        begin = header.page_address
        writer = [span.timeline for span in ancestors if span.end is not None and span.begin <= begin < span.end]
        if writer == [header.timeline] and begin < own.begin < begin + header.segment_size:
            return
    raise PitrError(
        f"{where} was written on timeline {header.timeline}, but its name says {wal_file.timeline}"
        + ("" if history is not None else f", and there is no {history_name(wal_file.timeline)} to explain it")
        + ". Refused; nothing was changed."
    )


def _history_text(wal_file: WalFile, folder: ClusterFolder, chapter: Chapter, pg_wal: str) -> str | None:
    name = history_name(wal_file.timeline)
    with contextlib.suppress(OSError), open(os.path.join(pg_wal, name), "rb") as stream:
        return stream.read().decode(errors="replace")
    stored = folder.wal_path(WalFile.parse(name), chapter)
    with contextlib.suppress(OSError), codec.open_reader(stored, folder.tree) as reader:
        return reader.read().decode(errors="replace")
    return None


def same_content(stored: str, tree: Tree, source: int) -> bool:
    """Whether a stored file has the content of this open one. Raises PitrError when it is damaged."""
    held = tree.open(stored)
    try:
        if codec.is_encrypted(held):
            from .encryption import check_stored, content_digest

            # This host cannot decrypt it. Its first line tells the content, and that what follows is whole.
            header = check_stored(held)
            return (header.content, header.size) == content_digest(source)
        os.lseek(source, 0, os.SEEK_SET)
        reader = codec.Reader(held)
        try:
            while True:
                ours = os.read(source, codec.CHUNK)
                theirs = reader.read(len(ours) or 1)
                if ours != theirs:
                    return False
                if not ours:
                    return True
        finally:
            reader.close()
    finally:
        held.close()


def _content_size(stored: str, tree: Tree) -> int:
    size = 0
    with codec.open_reader(stored, tree) as reader:
        while data := reader.read(codec.CHUNK):
            size += len(data)
    return size


def _already_stored(stored: str, tree: Tree, source: int, path: str) -> str:
    try:
        same = same_content(stored, tree, source)
    except PitrError as error:
        raise PitrError(f"{path} was not archived: the archive already has it, but {error.message}") from None
    except OSError as error:
        error.filename = error.filename or stored
        raise
    if not same:
        own = os.fstat(source).st_size
        held = own if codec.is_stored_encrypted(stored, tree) else _content_size(stored, tree)
        if held != own and WalFile.parse(os.path.basename(path)).kind in ("segment", "partial"):
            raise PitrError(
                f"{path} was not archived: the archive already has it, but {stored} is damaged: it holds {held} bytes"
                f" instead of {own}. Move that file aside, and this one is archived at the next try."
            )
        raise PitrError(
            f"{path} was not archived: {stored} exists with other content, unchanged. Two servers may be archiving"
            " into the same place. Find out which one owns it before doing anything else."
        )
    # Whoever stored it may have died, or not yet come, to this point; success promises stable storage.
    tree.settle(stored)
    return f"{os.path.basename(path)} was already in the archive, with the same content"


class Pushing:
    """One file of pg_wal on its way into the archive.

    What can be refused is refused when the object is made, and compressing begins; ``finish`` stores. Several can be
    under way, but they must be finished in the order of the server: a segment whose predecessor was refused may belong
    to a copy of the cluster, and must not be there before that of the owner.
    """

    def __init__(self, path: str, folder: ClusterFolder, compression: str) -> None:
        """Raises PitrError or OSError when it is refused. Afterwards ``finish`` or ``close`` has to be called."""
        self.path = path
        self._tree = folder.tree
        self._storing: codec.Storing | None = None
        self._adding = contextlib.ExitStack()
        wal_file = WalFile.parse(os.path.basename(path))
        self.stored = folder.wal_path(wal_file, folder.chapter)
        try:
            self.source = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise PitrError(f"{path} cannot be read: {error.strerror}.") from None
        try:
            self._before = os.fstat(self.source)
            if wal_file.kind in ("segment", "partial"):
                self._check(wal_file, folder, folder.chapter)
            else:
                self._check_server(folder.chapter)
            if wal_file.kind == "history":
                self._check_history(wal_file)
            if not self._tree.exists(self.stored):
                # Timelines must be known to hosts that have no key: what there is, and what to keep, depends on them.
                recipients = () if wal_file.kind == "history" else folder.recipients
                with self._telling():
                    temporary = self._adding.enter_context(self._tree.adding(self.stored))
                    self._storing = codec.Storing(
                        self.source, temporary, kept_as(wal_file, compression), self._before.st_size, recipients
                    )
        except BaseException:
            self.close()
            raise

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """Errors of storing tell which file did not get where."""
        try:
            yield
        except FileExistsError:
            raise
        except OSError as error:
            # Writing to a descriptor and syncing it name no file.
            error.filename = error.filename or f"{self.path} to {self.stored}"
            raise
        except PitrError as error:
            # The same error, which may be of a kind of its own.
            error.message = f"{self.path} was not archived: {self.stored}: {error.message}"
            error.args = (error.message,)
            raise

    def _check_server(self, chapter: Chapter) -> None:
        """A file that does not tell its cluster must not come from another one's pg_wal.

        The system identifier is the first field of pg_control (ControlFileData); without that file it is not known.
        """
        pg_wal = os.path.dirname(self.path) or "."
        control = os.path.join(os.path.dirname(os.path.abspath(pg_wal)), "global", "pg_control")
        try:
            with open(control, "rb") as stream:
                found = str(int.from_bytes(stream.read(8), sys.byteorder))
        except OSError:
            return
        if found != chapter.system_identifier:
            raise PitrError(
                f"{self.path} belongs to the cluster with system identifier {found}; the archive belongs to"
                f" {chapter.system_identifier}. Refused; nothing was changed."
            )

    def _check_history(self, wal_file: WalFile) -> None:
        """Not one that is none, such as a stored one, which is compressed, copied back by hand.

        Nobody could restore past it.
        """
        text = os.pread(self.source, self._before.st_size, 0)
        try:
            parse_history(wal_file.timeline, text.decode(errors="replace"))
        except PitrError as error:
            raise PitrError(f"{self.path} is no timeline history file. Refused; {error.message}") from None

    def _check(self, wal_file: WalFile, folder: ClusterFolder, chapter: Chapter) -> None:
        size = self._before.st_size
        if size != chapter.wal_segment_size:
            raise PitrError(
                f"{self.path} has {size} bytes, a segment of this cluster {chapter.wal_segment_size}. Refused."
            )
        pg_wal = os.path.dirname(self.path) or "."
        head = os.pread(self.source, SegmentHeader.SIZE, 0)
        check_segment(head, wal_file, chapter, self.path, lambda: _history_text(wal_file, folder, chapter, pg_wal))

    def finish(self) -> str:
        """Returns what was done; returning means it is on stable storage. Raises PitrError or OSError when not."""
        try:
            if self._storing is None:
                return _already_stored(self.stored, self._tree, self.source, self.path)
            try:
                # Temporary file, write, fsync; leaving: link without replacing, fsync of the directory.
                with self._telling(), self._adding:
                    storing, self._storing = self._storing, None
                    storing.finish()
                    after = os.fstat(self.source)
                    if (self._before.st_size, self._before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
                        raise PitrError(
                            f"{self.path} was changed while it was read. It was not archived; nothing was changed."
                        )
            except FileExistsError:
                return _already_stored(self.stored, self._tree, self.source, self.path)
            return f"{os.path.basename(self.path)} archived"
        finally:
            self.close()

    def close(self) -> None:
        """Let go, also in the middle; then nothing was stored."""
        storing, self._storing = self._storing, None
        if storing is not None:
            storing.abort()
        with contextlib.suppress(_Abandoned), self._adding:
            raise _Abandoned
        if self.source >= 0:
            os.close(self.source)
            self.source = -1


class _Abandoned(Exception):
    """Leaves a block without what its end would do."""


def push(
    path: str, repository: str, cluster: str, compression: str = "auto", access: Mapping[str, str] | None = None
) -> str:
    """Archive one file of pg_wal. Returns what was done; returning means it is on stable storage.

    Pushing the same file again succeeds and changes nothing. Raises PitrError or OSError when it is not archived.
    """
    # Refused before the repository is looked at: a name that no server hands out is nobody's fault but the caller's.
    WalFile.parse(os.path.basename(path))
    return Pushing(path, ClusterFolder.open(repository, cluster, access), compression).finish()


def kept_as(wal_file: WalFile, compression: str) -> tuple[str, int]:
    """Codec and level for a file of the archive.

    Everything has a checksum of its content. So what is not compressed is put into a gzip file all the same, and so
    are the small files, which must stay readable on any host.
    """
    name, level = codec.parse(compression) if wal_file.kind in ("segment", "partial") else ("none", 0)
    return ("gzip", 0) if name == "none" else (name, level)


def get(
    name: str,
    target: str,
    repository: str,
    cluster: str,
    system_identifier: str | None = None,
    access: Mapping[str, str] | None = None,
    lease: str | None = None,
) -> None:
    """Fetch one file of the archive to ``target`` (PostgreSQL's %p), whole and checked, or not at all.

    ``system_identifier`` selects the chapter; without it, the newest. ``access`` as for tree_for; its ``identity``
    opens what is encrypted. ``lease`` is renewed (see locks.py). Raises Absent when the file is proven not to be there,
    PitrError or OSError for everything else.
    """
    wal_file = WalFile.parse(name)
    folder = ClusterFolder.open(repository, cluster, access)
    chapter = folder.require(system_identifier) if system_identifier else folder.chapter
    if lease:
        # A repository that may only be read, or whose host is older, is no reason to stop a recovery.
        with contextlib.suppress(OSError, PitrError):
            folder.touch_lease(lease)
    archive = folder.archive_path(chapter)
    if not folder.tree.exists(archive):
        raise PitrError(f"{archive} does not exist, so nothing can be said about {name}. Is the repository mounted?")
    stored = folder.wal_path(wal_file, chapter)
    temporary = target + ".pitr"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    deadline = time.monotonic() + HOLE_PATIENCE
    came = False
    while True:
        try:
            fetch(wal_file, chapter, folder, temporary, os.path.dirname(target) or ".")
            break
        except FileNotFoundError:
            if folder.tree.exists(stored):
                # Archived just now; if not, it is the target's directory that is missing.
                if came:
                    raise
                came = True
                continue
        try:
            _prove_absent(wal_file, archive, folder.tree)
        except _Hole as hole:
            if time.monotonic() > deadline or abs(time.time() - folder.tree.stat(hole.later).mtime) > HOLE_FRESH:
                raise
            time.sleep(0.05)
            continue
        _prove_mounted(folder, archive, name)
        raise Absent(f"{name} is not in the archive")
    os.rename(temporary, target)


def fetch(wal_file: WalFile, chapter: Chapter, folder: ClusterFolder, target: str, pg_wal: str) -> None:
    """Create ``target`` (must not exist) with the content of one file of the archive, checked.

    ``pg_wal``: where the server keeps its history files. Raises FileNotFoundError when the stored file or the target's
    directory is not there, PitrError or OSError for everything else; then there is no target.
    """
    stored = folder.wal_path(wal_file, chapter)
    descriptor = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        codec.extract(stored, descriptor, target, folder.tree)
        size = os.fstat(descriptor).st_size
        if wal_file.kind in ("segment", "partial"):
            if size != chapter.wal_segment_size:
                raise PitrError(f"{stored} is damaged: it holds {size} bytes instead of {chapter.wal_segment_size}.")
            head = os.pread(descriptor, SegmentHeader.SIZE, 0)
            check_segment(head, wal_file, chapter, stored, lambda: _history_text(wal_file, folder, chapter, pg_wal))
        elif wal_file.kind == "history":
            text = os.pread(descriptor, size, 0)
            parse_history(wal_file.timeline, text.decode(errors="replace"))
        elif not os.pread(descriptor, 20, 0).startswith(b"START WAL LOCATION: "):
            raise PitrError(f"{stored} is damaged: it is not what PostgreSQL writes about a backup.")
    except BaseException as error:
        if isinstance(error, OSError):
            error.filename = error.filename or f"{stored} to {target}"
        with contextlib.suppress(OSError):
            os.unlink(target)
        raise
    finally:
        os.close(descriptor)


def _prove_absent(wal_file: WalFile, archive: str, tree: Tree) -> None:
    """Raise PitrError when the archive holds something that an absent file contradicts."""
    if wal_file.kind == "history":
        # Timeline 1 never has one, and the server asks for it all the same.
        if wal_file.timeline > 1 and any(archived_logs(archive, wal_file.timeline, tree)):
            raise PitrError(
                f"{wal_file.name} is missing from {archive}, but segments of timeline {wal_file.timeline} are there."
                " Copy it back from a server's pg_wal; recovery would otherwise take another branch."
            )
        return
    if wal_file.kind != "segment":
        return
    later = first_later(archive, wal_file, tree)
    if later is not None:
        raise _Hole(
            f"{wal_file.name} is missing from {archive}, but {later} is there: the archive has a hole."
            " Recovery cannot go past it. Find the segment, or restore to a target before it.",
            os.path.join(archive, later[:16], later),
        )


def _prove_mounted(folder: ClusterFolder, archive: str, name: str) -> None:
    """Raise PitrError when the archive is empty and cannot be: no backup is complete without WAL in it.

    The repository's marker proves that the repository is mounted, but not a filesystem below it. A second chapter may
    be empty beside the backups of the first.
    """
    if len(folder.chapters) > 1 or any(archived_logs(archive, None, folder.tree)):
        return
    with contextlib.suppress(FileNotFoundError):
        if any(not label.startswith(".") for label in folder.tree.names(folder.backups_path)):
            raise PitrError(
                f"{archive} is empty, but there are backups in {folder.backups_path}, so nothing can be said about"
                f" {name}. Is its filesystem mounted?"
            )


def first_later(archive: str, wal_file: WalFile, tree: Tree) -> str | None:
    """Name of a segment of the same timeline that is later than this one, or None."""
    for log in archived_logs(archive, wal_file.timeline, tree):
        if log < wal_file.log:
            continue
        for name in tree.names(os.path.join(archive, log)):
            # Plain names only: .partial and .backup files and temporary ones prove nothing about later WAL.
            if len(name) == 24 and name > wal_file.name:
                return name
    return None
