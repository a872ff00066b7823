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
from collections.abc import Callable, Mapping, Sequence

from . import codec
from .errors import PitrError
from .repository import Chapter, ClusterFolder, archived_logs
from .timeline import ancestry, parse_history
from .tree import Tree
from .wal import SegmentHeader, WalFile, history_name


class Absent(Exception):
    """The file is not in an archive that was reachable, and nothing later of its timeline is."""


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
    if codec.is_encrypted(stored, tree):
        from .crypt import content_digest, verify_stored

        # This host cannot decrypt it. Its first line tells the content, and that what follows is whole.
        header = verify_stored(tree, stored)
        return (header.content, header.size) == content_digest(source)
    os.lseek(source, 0, os.SEEK_SET)
    with codec.open_reader(stored, tree) as reader:
        while True:
            ours = os.read(source, codec.CHUNK)
            theirs = reader.read(len(ours) or 1)
            if ours != theirs:
                return False
            if not ours:
                return True


def _already_stored(stored: str, tree: Tree, source: int, path: str) -> str:
    try:
        same = same_content(stored, tree, source)
    except PitrError as error:
        raise PitrError(f"{path} was not archived: the archive already has it, but {error.message}") from None
    if not same:
        raise PitrError(
            f"{path} was not archived: {stored} exists with other content, unchanged. Two servers may be archiving"
            " into the same place. Find out which one owns it before doing anything else."
        )
    # Whoever stored it may have died, or not yet come, to this point; success promises stable storage.
    tree.settle(stored)
    return f"{os.path.basename(path)} was already in the archive, with the same content"


def push(
    path: str, repository: str, cluster: str, compression: str = "auto", access: Mapping[str, str] | None = None
) -> str:
    """Archive one file of pg_wal. Returns what was done; returning means it is on stable storage.

    Pushing the same file again succeeds and changes nothing. Raises PitrError or OSError when it is not archived.
    """
    wal_file = WalFile.parse(os.path.basename(path))
    pg_wal = os.path.dirname(path) or "."
    folder = ClusterFolder.open(repository, cluster, access)
    chapter = folder.chapter
    try:
        source = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise PitrError(f"{path} cannot be read: {error.strerror}.") from None
    try:
        if wal_file.kind in ("segment", "partial"):
            size = os.fstat(source).st_size
            if size != chapter.wal_segment_size:
                raise PitrError(
                    f"{path} has {size} bytes, a segment of this cluster {chapter.wal_segment_size}. Refused."
                )
            head = os.pread(source, SegmentHeader.SIZE, 0)
            check_segment(head, wal_file, chapter, path, lambda: _history_text(wal_file, folder, chapter, pg_wal))
        stored = folder.wal_path(wal_file, chapter)
        if folder.tree.exists(stored):
            return _already_stored(stored, folder.tree, source, path)
        # Timelines must be known to hosts that have no key: what there is, and what to keep, depends on them.
        recipients = () if wal_file.kind == "history" else folder.recipients
        return _store(source, path, stored, folder.tree, kept_as(wal_file, compression), recipients)
    finally:
        os.close(source)


def kept_as(wal_file: WalFile, compression: str) -> tuple[str, int]:
    """Codec and level for a file of the archive.

    Everything has a checksum of its content. So what is not compressed is put into a gzip file all the same, and so
    are the small files, which must stay readable on any host.
    """
    name, level = codec.parse(compression) if wal_file.kind in ("segment", "partial") else ("none", 0)
    return ("gzip", 0) if name == "none" else (name, level)


def _store(
    source: int, path: str, stored: str, tree: Tree, kept: tuple[str, int], recipients: Sequence[str] = ()
) -> str:
    """Temporary file, write, fsync, link without replacing, fsync of the directory."""
    before = os.fstat(source)
    try:
        with tree.adding(stored) as temporary:
            os.lseek(source, 0, os.SEEK_SET)
            codec.store(source, temporary, kept, before.st_size, recipients)
            after = os.fstat(source)
            if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
                raise PitrError(f"{path} was changed while it was read. It was not archived; nothing was changed.")
    except FileExistsError:
        return _already_stored(stored, tree, source, path)
    return f"{os.path.basename(path)} archived"


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

    ``system_identifier`` selects the chapter; without it, the newest. ``identity``: path of the file with the keys to
    what is encrypted. ``lease`` is renewed (see locks.py). Raises Absent when the file is proven not to be there,
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
    try:
        fetch(wal_file, chapter, folder, temporary, os.path.dirname(target) or ".")
    except FileNotFoundError:
        if folder.tree.exists(stored):
            raise
        _prove_absent(wal_file, archive, folder.tree)
        raise Absent(f"{name} is not in the archive") from None
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
    except BaseException:
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
        raise PitrError(
            f"{wal_file.name} is missing from {archive}, but {later} is there: the archive has a hole."
            " Recovery cannot go past it. Find the segment, or restore to a target before it."
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
