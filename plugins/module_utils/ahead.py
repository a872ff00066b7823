# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Work before it is asked for: archiving the next segments that are ready, fetching the next ones of a recovery.

PostgreSQL calls ``pitr-wal`` once for each segment and waits. Most of what a call takes is its start, and one processor
works while the others wait. So a call does more than it was asked for, and leaves a note of it in the spool directory;
fast.py tells when a later call may believe one. Nothing of this decides anything: without spool, notes or processes
every call does the full work itself.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time

from . import archive, fast
from .errors import PitrError
from .repository import ClusterFolder
from .tree import temporary_name
from .wal import WalFile, segment_name

TYPE_CHECKING = False  # typing's own would cost more than most of what this imports
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

PUSH_AHEAD = 32  # files
PREFETCH = 8  # segments
# Seconds after which no more files are begun that were not asked for.
PUSH_SECONDS = 30.0
# Segments that are under way at the same time, at most: one for each processor, and one that is being synced.
PUSH_WIDTH = 5
# A file that was changed within the resolution of its times (a tick of the kernel's clock, at most 10 ms) may change
# once more without showing it.
SETTLED_SECONDS = 0.05
# What is fetched ahead takes room in pg_wal: bytes at most, and this many segments' room is left to the server.
PREFETCH_BYTES = 256 * 1024 * 1024
ROOM_LEFT = 8
# Seconds between two looks whether the server has taken a segment, and without one until a process ends.
LOOK_SECONDS = 0.03
IDLE_SECONDS = 10.0

_POSITION, _FETCHING = "position", "fetching"


class Context:
    """Whose call it is: the cluster, its settings (``raw``: their bytes), and how the repository is reached."""

    __slots__ = ("access", "cluster", "raw", "repository", "settings")

    def __init__(self, cluster: str, raw: bytes, settings: dict[str, Any], access: dict[str, str]) -> None:
        self.cluster = cluster
        self.raw = raw
        self.settings = settings
        self.access = access
        self.repository: str = settings["repository"]

    def open(self) -> ClusterFolder:
        """The cluster's folder in the repository, looked at anew. Raises PitrError."""
        return ClusterFolder.open(self.repository, self.cluster, self.access)

    def number(self, name: str, default: int) -> int:
        """A count in the settings. Raises PitrError when it is none."""
        return _number(self.settings, name, default)


def check_numbers(settings: dict[str, Any]) -> None:
    """Raises PitrError when one of the counts is none."""
    _number(settings, "push_ahead", PUSH_AHEAD)
    _number(settings, "prefetch", PREFETCH)


def _number(settings: dict[str, Any], name: str, default: int) -> int:
    value = settings.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise PitrError(f"The setting {name} is {value!r}; it must be a number, 0 to switch it off.")
    return value


def make_spool(directory: str) -> bool:
    """Create the spool directory, 0700. False, with a line in the server's log, when it cannot be used."""
    try:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        if fast.is_private(os.lstat(directory)):
            return True
        why = "it belongs to another user, or others may write to it"
    except OSError as error:
        why = str(error.strerror)
    sys.stderr.write(
        f"pitr-wal: the spool directory {directory} cannot be used: {why}. Each file is handled on its own, which is"
        " slower, and right.\n"
    )
    return False


def _write_note(path: str, facts: fast.Facts) -> None:
    temporary = temporary_name(path)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        # Not synced: what a crash leaves of it is no whole note, or a true one.
        os.write(descriptor, fast.note(facts, time.time()))
    finally:
        os.close(descriptor)
    os.rename(temporary, path)


def _remove(directory: str, keep: set[str]) -> None:
    """Remove everything from a spool directory but these names."""
    with contextlib.suppress(OSError):
        for name in os.listdir(directory):
            if name not in keep:
                with contextlib.suppress(OSError):
                    os.unlink(os.path.join(directory, name))


# --- push


class _Item:
    """One file that is archived without having been asked for."""

    def __init__(self, path: str, folder: ClusterFolder, push: _Push) -> None:
        self._push = push
        self._folder = folder
        self._name = os.path.basename(path)
        self._settle(path)
        self.pushing = archive.Pushing(path, folder, push.compression)
        self._facts = push.context_facts(self._name, self.pushing.source)

    @staticmethod
    def _settle(path: str) -> None:
        age = time.time() - os.stat(path).st_ctime
        if age < 0:
            raise PitrError(f"{path} was changed in the future.")
        time.sleep(max(0.0, SETTLED_SECONDS - age))

    def finish(self) -> None:
        """Archive it, and leave a note that this very file, which nobody has changed meanwhile, is archived."""
        push, path = self._push, self.pushing.path
        self.pushing.finish()
        source = os.open(path, os.O_RDONLY)
        try:
            facts = push.context_facts(self._name, source)
        finally:
            os.close(source)
        if facts != self._facts:
            raise PitrError(f"{path} was changed while it was read.")
        look = fast.look_in(self._folder.tree, push.context.repository)
        facts.update(fast.stored_facts(push.context.repository, push.context.cluster, self.pushing.stored, look))
        _write_note(os.path.join(push.directory, self._name), facts)


class _Push:
    """The call for one file, which carries off the next ones too."""

    def __init__(self, context: Context, path: str) -> None:
        self.context = context
        self.path = path
        self.compression: str = context.settings.get("compression", "auto")
        self.directory = fast.pushed_spool(context.raw, context.cluster, path)
        # A process that outlives its call is adopted by process 1.
        self._count = 0 if fast.server_is_init() else context.number("push_ahead", PUSH_AHEAD)
        self._has_server = os.path.exists("postmaster.pid")

    def context_facts(self, name: str, source: int) -> fast.Facts:
        """What is known of a file of pg_wal."""
        return fast.source_facts(self.context.raw, self.context.cluster, name, source)

    def _ready(self) -> list[str]:
        """What the archiver will ask for next, in its order (pgarch_readyXlog): history files first, then by name."""
        status = os.path.join(os.path.dirname(self.path) or ".", "archive_status")
        try:
            names = {name[:-6] for name in os.listdir(status) if name.endswith(".ready")}
        except OSError:
            return []
        asked = os.path.basename(self.path)
        if asked not in names:
            # Nobody's archiver: a call by hand.
            return []
        ready = []
        for name in sorted(names - {asked}, key=lambda name: (not name.endswith(".history"), name)):
            try:
                WalFile.parse(name)
            except PitrError:
                break
            ready.append(name)
        return ready

    def next(self) -> list[str]:
        """Paths of those that shall be archived ahead."""
        ready = self._ready() if self._count else []
        if not ready or not make_spool(self.directory):
            return []
        _remove(self.directory, {fast.LOCK, *ready})
        return [os.path.join(os.path.dirname(self.path), name) for name in ready[: self._count]]

    def claim(self, paths: list[str]) -> int:
        """Be the one that archives these ahead: the lock, which tells their names. -1 when somebody else is."""
        lock = os.open(os.path.join(self.directory, fast.LOCK), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.lockf(lock, os.F_TLOCK, 0)
            os.ftruncate(lock, 0)
            os.pwrite(lock, "\n".join(map(os.path.basename, paths)).encode("ascii"), 0)
        except OSError:
            os.close(lock)
            return -1
        return lock

    def missing(self, paths: list[str]) -> list[str]:
        """Those of them that no note acknowledges."""
        context = self.context
        return [path for path in paths if not fast.is_acknowledged(context.raw, context.cluster, path, self.directory)]

    def run(self, paths: list[str], done: Callable[[], None]) -> None:
        """Archive the file, call ``done``, then archive ``paths``.

        Raises PitrError or OSError when the file is not archived, whatever happens to the others.
        """
        folder = self.context.open()
        deadline = time.monotonic() + PUSH_SECONDS
        width = min((os.cpu_count() or 1) + 1, PUSH_WIDTH)
        asked = archive.Pushing(self.path, folder, self.compression)
        under_way: list[_Item] = []
        try:
            # While the first one is being compressed.
            self._fill(under_way, paths, width - 1, folder)
            asked.finish()
            done()
            # The others in the server's order, and never past one that failed: a copy of the cluster, which is refused
            # at the first segment that differs, must not leave the one after it in the owner's archive. Whatever it is
            # that fails here, its own call will tell.
            with contextlib.suppress(PitrError, OSError):
                while under_way or paths:
                    if time.monotonic() > deadline or (self._has_server and not os.path.exists("postmaster.pid")):
                        paths.clear()
                    self._fill(under_way, paths, width, folder)
                    if under_way:
                        under_way[0].finish()
                        under_way.pop(0)
        finally:
            asked.close()
            for item in under_way:
                item.pushing.close()
            folder.tree.close(wait=False)

    def _fill(self, under_way: list[_Item], paths: list[str], width: int, folder: ClusterFolder) -> None:
        while paths and len(under_way) < width:
            try:
                under_way.append(_Item(paths.pop(0), folder, self))
            except (PitrError, OSError):
                paths.clear()


def in_background(work: Callable[[Callable[[], None]], None]) -> None:
    """Run ``work`` in a process of its own until it calls what it is given; it goes on while we return.

    What it raises before that is raised here.
    """
    reader, writer = os.pipe()
    if os.fork() == 0:
        try:
            os.close(reader)
            _report(work, writer)
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        said = stream.read().decode(errors="surrogateescape")
    if said == "done":
        return
    kind, _colon, rest = said.partition(":")
    if kind == "os":
        number, filename = rest.split(":", 1)
        raise OSError(int(number), os.strerror(int(number)), filename or None)
    raise PitrError(rest if kind == "pitr" else "The process that archived it has ended. It is not known to be stored.")


def _report(work: Callable[[Callable[[], None]], None], writer: int) -> None:
    is_done = False

    def done() -> None:
        nonlocal is_done
        is_done = True
        os.write(writer, b"done")
        os.close(writer)
        # Whoever reads what the caller says must not wait for us.
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)

    try:
        work(done)
    except PitrError as error:
        said = f"pitr:{error.message}"
    except OSError as error:
        said = f"os:{error.errno}:{error.filename or ''}"
    else:
        return
    if not is_done:
        os.write(writer, said.encode(errors="surrogateescape"))


def push(context: Context, path: str) -> None:
    """What ``archive_command`` does when no note answers it: archive ``path``, and what is ready after it.

    Returning means that ``path`` is on stable storage; the others may still be on their way, in a process that ends
    with them. Raises PitrError or OSError.
    """
    # Refused before the repository is looked at: a name that no server hands out is the caller's fault.
    WalFile.parse(os.path.basename(path))
    call = _Push(context, path)
    paths = call.next()

    def work(done: Callable[[], None]) -> None:
        # Taken in the process that goes on: a lock of fcntl(2) is not inherited.
        missing = call.missing(paths)
        lock = call.claim(missing)
        try:
            call.run(missing if lock >= 0 else [], done)
        finally:
            if lock >= 0:
                os.close(lock)

    if paths:
        in_background(work)
    else:
        call.run([], lambda: None)
    if not fast.is_in_recovery():
        discard(fast.fetched_spool(path))


# --- get


def discard(directory: str) -> None:
    """Remove what was fetched ahead for a recovery that is over, unless a process is at it."""
    try:
        lock = os.open(os.path.join(directory, fast.LOCK), os.O_RDWR)
    except OSError:
        return
    try:
        os.lockf(lock, os.F_TLOCK, 0)
        _remove(directory, set())
        os.rmdir(directory)
    except OSError:
        return
    finally:
        os.close(lock)


def follow(folder: str, context: Context, options: dict[str, str], name: str, target: str) -> None:
    """After a file was fetched directly: see to it that the segments after it will be there."""
    if len(name) != 24 or not context.number("prefetch", PREFETCH) or not fast.is_in_recovery():
        return
    if "system-identifier" not in options and not fast.is_local(context.repository):
        # The newest chapter may have become another one, and a note does not ask a repository far away.
        return
    directory = fast.fetched_spool(target)
    if not make_spool(directory):
        return
    with contextlib.suppress(OSError):
        temporary = temporary_name(os.path.join(directory, _POSITION))
        with open(temporary, "w", encoding="ascii") as stream:
            stream.write(name)
        os.rename(temporary, os.path.join(directory, _POSITION))
        fast.follow(folder, context.cluster, options, name, directory)


def fetch_ahead(folder: str, cluster: str, options: dict[str, str], name: str, directory: str) -> None:
    """The process that is left behind: it keeps the segments after ``name`` ready until nobody takes them any more."""
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.closerange(3, 1024)
    remote = sys.modules.get(f"{__package__}.remote")
    if remote is not None:
        # Its sessions are our parent's; their descriptors are closed here, and the numbers will be other files.
        remote.forget_sessions()
    # The recovery, which one processor has to itself at best, goes first.
    os.nice(5)
    lock = os.open(os.path.join(directory, fast.LOCK), os.O_RDWR)
    try:
        os.lockf(lock, os.F_TLOCK, 0)
    except OSError:
        return
    try:
        with contextlib.suppress(PitrError, OSError, ValueError):
            Prefetch(folder, cluster, options, name, directory).run()
    finally:
        if not _server_recovers():
            _remove(directory, set())
            with contextlib.suppress(OSError):
                os.rmdir(directory)


def _server_recovers() -> bool:
    """Whether the server whose data directory we are in still runs its recovery."""
    return fast.is_in_recovery() and os.path.exists("postmaster.pid")


class Prefetch:
    """Segments of one recovery, from the one that it has taken last."""

    def __init__(self, folder: str, cluster: str, options: dict[str, str], name: str, directory: str) -> None:
        from .cli import configured, reader_access

        settings, raw = configured(folder, cluster)
        self._settings_path = fast.settings_path(folder, cluster)
        self._options = options
        self._directory = directory
        self._context = Context(cluster, raw, settings, reader_access(settings, options.get("identity", "")))
        # Before the documents are read: when they are replaced afterwards, no note will fit.
        self._around = self._surroundings()
        self._folder = self._context.open()
        identifier = options.get("system-identifier")
        self._chapter = self._folder.require(identifier) if identifier else self._folder.chapter
        size = self._chapter.wal_segment_size
        self._count = min(self._context.number("prefetch", PREFETCH), max(1, PREFETCH_BYTES // size))
        self._last = name
        self._ready: list[str] = []
        self._is_at_end = False

    @property
    def _look(self) -> fast.Look | None:
        return fast.look_local if fast.is_local(self._context.repository) else None

    def _surroundings(self) -> fast.Facts:
        context = self._context
        return fast.repository_facts(context.repository, context.cluster, self._look) if self._look else {}

    def _stored(self, stored: str) -> fast.Facts:
        return fast.stored_facts(self._context.repository, self._context.cluster, stored, self._look)

    def _path(self, name: str) -> str:
        return os.path.join(self._directory, name)

    def run(self) -> None:
        """Until the recovery is over, or has taken nothing for a while."""
        self._adopt()
        idle_since = time.monotonic()
        while _server_recovers() and time.monotonic() - idle_since < IDLE_SECONDS:
            if self._advance():
                self._is_at_end = False
                idle_since = time.monotonic()
            if len(self._ready) < self._count and not self._is_at_end:
                self._is_at_end = not self._fetch_next()
                idle_since = time.monotonic()
            else:
                time.sleep(LOOK_SECONDS)

    def _following(self, name: str) -> str:
        size = self._chapter.wal_segment_size
        wal_file = WalFile.parse(name)
        return segment_name(wal_file.timeline, wal_file.number(size) + 1, size)

    def _adopt(self) -> None:
        """Keep what an earlier process has left, as far as it fits on where we are; throw away the rest."""
        name = self._following(self._last)
        while len(self._ready) < self._count and fast.is_fetched(
            self._context.raw, self._context.cluster, self._options, name, self._directory
        ):
            self._ready.append(name)
            name = self._following(name)
        _remove(self._directory, {fast.LOCK, *self._ready, *(f"{name}.note" for name in self._ready)})

    def _advance(self) -> bool:
        """Notice what the server has taken, or where else it has gone on. True when there is something new."""
        is_new = False
        while self._ready and not os.path.exists(self._path(self._ready[0])):
            self._last = self._ready.pop(0)
            is_new = True
        try:
            position = fast.read(self._path(_POSITION)).decode("ascii")
            os.unlink(self._path(_POSITION))
        except FileNotFoundError:
            return is_new
        self._last = position
        self._ready = []
        self._adopt()
        return True

    def _fetch_next(self) -> bool:
        """Fetch one more segment. False when there is none, or no room: absence is not written down anywhere."""
        name = self._following(self._ready[-1] if self._ready else self._last)
        size = self._chapter.wal_segment_size
        room = os.statvfs(self._directory)
        if room.f_bavail * room.f_frsize < (ROOM_LEFT + 1) * size:
            return False
        if fast.read(self._settings_path) != self._context.raw or self._surroundings() != self._around:
            raise PitrError("The settings or the repository have changed.")
        lease = self._options.get("lease")
        if lease:
            # A call that is answered by a note opens no repository, so that it is done here.
            with contextlib.suppress(OSError, PitrError):
                self._folder.touch_lease(lease)
        wal_file = WalFile.parse(name)
        stored = self._folder.wal_path(wal_file, self._chapter)
        temporary, path = self._path(_FETCHING), self._path(name)
        try:
            before = self._stored(stored)
            archive.fetch(wal_file, self._chapter, self._folder, temporary, "pg_wal")
        except FileNotFoundError:
            return False
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            # The server syncs it when it takes it (durable_rename), and waits less when that is done.
            os.fdatasync(descriptor)
            os.rename(temporary, path)
            facts = fast.fetched_facts(self._context.raw, self._context.cluster, self._options, name, descriptor)
        finally:
            os.close(descriptor)
        facts.update(self._stored(stored))
        if {key: facts[key] for key in before} != before:
            raise PitrError(f"{stored} has changed.")
        _write_note(f"{path}.note", facts)
        self._ready.append(name)
        return True
