# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""``pitr-wal serve``: the repository host's side of ``ssh://``, a forced command in authorized_keys.

Everything is enforced here, for the host at the other end may be anybody's by now: one cluster's folder and nothing
beside it; a writer's key adds WAL under its own name, whole and of this cluster, and reads only what adding needs; a
reader's key reads, and renews the leases of its recoveries (empty files). There is no request that overwrites, renames
or removes.

On the path of ``pitr-wal``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import stat
import sys
from types import FrameType

from . import codec, locks
from .archive import check_segment
from .errors import PitrError
from .repository import (
    BACKUP_FILE,
    BEING_REMOVED,
    CLUSTER_FILE,
    LEASE,
    MARKER,
    Chapter,
    ClusterFolder,
    require_directory,
)
from .timeline import parse_history
from .tree import LOCAL
from .wal import SegmentHeader, WalFile, history_name
from .wire import ANSWER, DATA, END, FAILURE, HELLO, PROTOCOL, REQUEST, WORD, Lost, Wire, document, write_all

# Seconds without a word: between two requests, and in the middle of a transfer.
IDLE = 3600.0
STALLED = 300.0
# Bytes of one frame from the client, and of a stored history or backup file.
LIMIT = 512 * 1024
SMALL = 1024 * 1024
MOST_LEASES = 100


class Server:
    """One connection of one key."""

    def __init__(self, wire: Wire, access: str, cluster: str, repository: str) -> None:
        """``access``: ``read`` or ``write``. Raises PitrError when the cluster's folder cannot be opened."""
        self._wire = wire
        self._writes = access == "write"
        self._repository = repository
        self._folder = ClusterFolder.open(repository, cluster)

    # --- what a key may name

    def _located(self, place: object) -> str:
        """The path of a place in the repository, when it is this cluster's. Raises PitrError."""
        if not isinstance(place, str):
            raise PitrError("The request names no file.")
        path = os.path.join(self._repository, place)
        root = os.path.realpath(self._folder.path)
        if place == MARKER:
            root = os.path.join(os.path.realpath(self._repository), MARKER)
        elif place.split("/")[0] != self._folder.name or not _is_plain(place):
            raise PitrError(
                f"This key is for the cluster '{self._folder.name}' of {self._repository}; it may not name '{place}'."
            )
        # Links inside the folder that lead out of it would be a way around.
        real = os.path.realpath(path)
        if real != root and not real.startswith(root + "/"):
            raise PitrError(f"{path} is a link that leads out of the cluster's folder, so it is not served.")
        return path

    def _wal(self, place: object) -> tuple[str, WalFile, Chapter]:
        """Path, file and chapter of a place in the archive. Raises PitrError for every other place."""
        path = self._located(place)
        wal_file = WalFile.parse(os.path.basename(path))
        if wal_file.segment:
            # Raises for a name that this cluster has no segment of.
            wal_file.number(self._folder.chapter.wal_segment_size)
        for chapter in self._folder.chapters:
            if path == self._folder.wal_path(wal_file, chapter):
                return path, wal_file, chapter
        raise PitrError(f"{wal_file.name} does not belong to {path}. Refused.")

    def _readable(self, place: object) -> str:
        """A path that this key may read. Raises PitrError."""
        path = self._located(place)
        if self._writes and place not in (MARKER, f"{self._folder.name}/{CLUSTER_FILE}"):
            try:
                self._wal(place)
            except PitrError:
                raise PitrError(f"The key of this connection only adds WAL; it may not read '{place}'.") from None
        return path

    # --- requests

    def perform(self, request: dict[str, object]) -> None:
        """Do what one request says, and answer. Raises PitrError, OSError, or Lost."""
        operation = request.get("do")
        if operation == "open":
            self._open(request.get("place"))
        elif operation == "stat":
            status = os.stat(self._readable(request.get("place")))
            self._wire.say(ANSWER, {"size": status.st_size, "mtime": status.st_mtime})
        elif operation == "names":
            if self._writes:
                raise PitrError("The key of this connection only adds WAL; it may not list directories.")
            names = LOCAL.names(self._located(request.get("place")))
            self._wire.say(ANSWER, {"names": [name for name in names if _is_plain(name)]})
        elif operation == "lease":
            if self._writes:
                raise PitrError("The key of this connection only adds WAL; it holds no lease.")
            self._lease(request.get("place"))
            self._wire.say(ANSWER, {})
        elif operation in ("add", "settle"):
            if not self._writes:
                raise PitrError("The key of this connection only reads; nothing was added.")
            if operation == "add":
                self._add(request)
            else:
                LOCAL.settle(self._wal(request.get("place"))[0])
                self._wire.say(ANSWER, {})
        else:
            raise PitrError(f"The request '{operation}' is not known here. Is the other host's version newer?")

    def _lease(self, place: object) -> None:
        """Renew a lease: all that a reader's key may change. Its file stays empty; ClusterFolder checks its name."""
        path = self._located(place)
        name = os.path.basename(path)
        if path != os.path.join(self._folder.locks_path, name) or not name.startswith(LEASE):
            raise PitrError(f"'{place}' is not a lease. Refused.")
        label = name[len(LEASE) :].rpartition("-")[0]
        if not os.path.exists(os.path.join(self._folder.backups_path, label, BACKUP_FILE)):
            # Nor could any number of leases be made for backups that never were.
            raise PitrError(f"There is no backup '{label}', or it {BEING_REMOVED}.")
        if not os.path.exists(path) and _count(self._folder.locks_path, LEASE) >= MOST_LEASES:
            raise PitrError(f"{self._folder.locks_path} has {MOST_LEASES} leases already. Refused.")
        self._folder.touch_lease(name[len(LEASE) :])
        # Whoever removes it looked at the leases before he took this lock.
        try:
            with locks.reading(self._folder, label):
                pass
        except locks.InUseError:
            raise PitrError(f"The backup {label} {BEING_REMOVED}.") from None

    def _open(self, place: object) -> None:
        path = self._readable(place)
        # A pipe or a device would let us wait for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise PitrError(f"{path} is not a file.")
            self._wire.say(ANSWER, {"size": status.st_size, "mtime": status.st_mtime})
            self._wire.send_file(descriptor)
        finally:
            os.close(descriptor)

    def _add(self, request: dict[str, object]) -> None:
        # Chapters and recipients may have changed since the connection began.
        self._folder = ClusterFolder.open(self._repository, self._folder.name)
        path, wal_file, chapter = self._wal(request.get("place"))
        size = request.get("size")
        # What cannot be compressed grows a little; nothing of PostgreSQL's is larger than this.
        most = chapter.wal_segment_size + SMALL if wal_file.kind in ("segment", "partial") else SMALL
        if not isinstance(size, int) or not 0 <= size <= most:
            raise PitrError(f"{wal_file.name} would have {size} bytes in the archive, at most {most} can be right.")
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
        is_new = not os.path.isdir(os.path.dirname(path))
        try:
            self._add_file(path, size, wal_file, chapter)
        except BaseException:
            if is_new:
                # A refused file leaves no folder; one that somebody else uses by now is not empty.
                with contextlib.suppress(OSError):
                    os.rmdir(os.path.dirname(path))
            raise
        self._wire.say(ANSWER, {})

    def _add_file(self, path: str, size: int, wal_file: WalFile, chapter: Chapter) -> None:
        with LOCAL.adding(path) as temporary:
            descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                self._wire.say(ANSWER, {})
                self._receive(descriptor, size)
                os.fsync(descriptor)
                try:
                    if self._is_encrypted(temporary, wal_file):
                        self._check_encrypted(temporary, wal_file, chapter)
                    else:
                        self._check(temporary, wal_file, chapter)
                except PitrError as error:
                    raise PitrError(error.message.replace(temporary, path)) from None
            finally:
                os.close(descriptor)

    def _receive(self, descriptor: int, size: int) -> None:
        """Write what the client sends. Raises OSError (the disk is full) only after everything has come."""
        problem: OSError | None = None
        received = 0
        self._wire.patience = STALLED
        while True:
            kind, payload = self._wire.receive()
            if kind == END:
                break
            received += len(payload)
            if kind != DATA or received > size:
                raise Lost("the client sends more than it has announced")
            try:
                if problem is None:
                    write_all(descriptor, payload)
            except OSError as error:
                problem = error
        self._wire.patience = IDLE
        if problem is not None:
            raise problem
        if received != size or document(payload).get("size") != size:
            raise Lost("the client sends less than it has announced")

    def _is_encrypted(self, path: str, wal_file: WalFile) -> bool:
        """Whether this is for the cluster's recipients. Raises PitrError when it is not and should be, or the reverse.

        History files are never encrypted: timelines are known to hosts without a key.
        """
        encrypted = codec.is_stored_encrypted(path)
        expected = bool(self._folder.recipients) and wal_file.kind != "history"
        if encrypted != expected:
            what = "is encrypted, and this cluster is not" if encrypted else "is not encrypted, and this cluster is"
            raise PitrError(f"{path} {what}. Refused; nothing was changed.")
        return encrypted

    def _check_encrypted(self, path: str, wal_file: WalFile, chapter: Chapter) -> None:
        """Whether it came whole, for whom it is, and how large it says to be. More cannot be seen without a key."""
        from .encryption import AGE, LENGTH, recipients_id, verify_stored

        header = verify_stored(LOCAL, path)
        with open(path, "rb") as stream:
            if stream.read(LENGTH + len(AGE))[LENGTH:] != AGE:
                raise PitrError(f"{path} says that it is encrypted, and is not. Refused; nothing was changed.")
        if header.recipients != recipients_id(self._folder.recipients):
            raise PitrError(f"{path} is encrypted for other recipients than the cluster's. Refused.")
        if wal_file.kind in ("segment", "partial") and header.size != chapter.wal_segment_size:
            raise PitrError(f"{path} would hold {header.size} bytes; {chapter.wal_segment_size} can be right. Refused.")

    def _check(self, path: str, wal_file: WalFile, chapter: Chapter) -> None:
        """Whether this is what its name says, whole. Raises PitrError."""
        is_segment = wal_file.kind in ("segment", "partial")
        most = chapter.wal_segment_size if is_segment else SMALL
        with codec.open_reader(path) as reader:
            head = data = reader.read(codec.CHUNK)
            size = len(data)
            # A few bytes can be made to unpack to any number of them.
            while data and size <= most:
                data = reader.read(codec.CHUNK)
                size += len(data)
        if size > most or (is_segment and size != most):
            raise PitrError(f"{path} would hold {size} bytes; {most} can be right. Refused; nothing was changed.")
        if is_segment:
            check_segment(head[: SegmentHeader.SIZE], wal_file, chapter, path, lambda: self._history(wal_file, chapter))
        elif wal_file.kind == "history":
            parse_history(wal_file.timeline, head.decode(errors="replace"))

    def _history(self, wal_file: WalFile, chapter: Chapter) -> str | None:
        """Text of the history file of this file's timeline, which PostgreSQL archives before its segments."""
        stored = self._folder.wal_path(WalFile.parse(history_name(wal_file.timeline)), chapter)
        try:
            with codec.open_reader(stored) as reader:
                return reader.read(SMALL).decode(errors="replace")
        except FileNotFoundError:
            return None


def _is_plain(place: str) -> bool:
    """Whether no part of it is empty, leads upwards, or is hidden: what is hidden may not be encrypted yet."""
    return "\0" not in place and all(part and not part.startswith(".") for part in place.split("/"))


def _count(directory: str, prefix: str) -> int:
    try:
        return sum(name.startswith(prefix) for name in os.listdir(directory))
    except FileNotFoundError:
        return 0


def _failure(error: PitrError | OSError) -> dict[str, object]:
    if isinstance(error, PitrError):
        return {"kind": "refused", "message": error.message}
    if isinstance(error, (FileNotFoundError, FileExistsError)):
        return {"kind": "absent" if isinstance(error, FileNotFoundError) else "exists"}
    return {"kind": "error", "errno": error.errno or errno.EIO}


def _opened(wire: Wire, access: str, cluster: str, repository: str) -> Server:
    """Exchange greetings. Raises PitrError when the client wants another repository than this key's."""
    require_directory(repository)
    wire.say(HELLO, {"protocol": PROTOCOL, "access": access, "cluster": cluster})
    kind, payload = wire.receive()
    hello = document(payload)
    if kind != HELLO or hello.get("protocol") != PROTOCOL:
        raise PitrError(
            f"The repository host speaks version {PROTOCOL}, this one {hello.get('protocol')}. Update the older one."
        )
    wanted = hello.get("repository")
    if not isinstance(wanted, str) or os.path.realpath(wanted) != os.path.realpath(repository):
        raise PitrError(f"This key is for the repository {repository}, not for {wanted}. Correct the path.")
    return Server(wire, access, cluster, repository)


def _end(_number: int, _frame: FrameType | None) -> None:
    raise SystemExit(1)


def serve(access: str, cluster: str, repository: str, source: int = 0, target: int = 1) -> int:
    """Answer one connection until it ends. Returns the exit code."""
    asked = os.environ.get("SSH_ORIGINAL_COMMAND", "")
    if asked != WORD:
        sys.stderr.write(
            "pitr-wal serve: this key gives pitr-wal access to a repository of PostgreSQL backups, and nothing else.\n"
        )
        return 1
    for number in (signal.SIGTERM, signal.SIGHUP):
        # A transfer that is cut off takes its temporary file along.
        signal.signal(number, _end)
    wire = Wire(source, target, STALLED, LIMIT)
    try:
        try:
            server = _opened(wire, access, cluster, repository)
        except (PitrError, OSError) as error:
            wire.say(FAILURE, _failure(error))
            return 1
        wire.say(ANSWER, {})
        wire.patience = IDLE
        while True:
            kind, payload = wire.receive()
            if kind != REQUEST:
                return 1
            try:
                server.perform(document(payload))
            except (PitrError, OSError) as error:
                wire.say(FAILURE, _failure(error))
    except Lost:
        # The other side is gone, which is how every conversation ends.
        return 0
