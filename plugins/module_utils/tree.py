# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""How a repository's files are reached: the few operations that everything else is made of.

A path is the repository as it was configured, a slash, and the place in it (``/srv/pitr/main/archive/…``,
``ssh://…/main/archive/…``), so that what a message shows is what the operator has written. Stored files are read, and
added; nothing here replaces or removes one. What only ever happens on the repository host itself (taking a backup,
expiring one) uses the filesystem directly.

On the path of ``pitr-wal``.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Mapping

from .errors import PitrError

PEEK = 512
CHUNK = 1024 * 1024

# What link(2) answers where there are none: EPERM by its manual, the others by network and user-space filesystems.
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)


def fsync_directory(path: str) -> None:
    """Make a new or removed name in this directory survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: str) -> bool:
    """Create one directory, 0700, durably. Returns False when it was there."""
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        if not os.path.isdir(path):
            raise PitrError(f"{path} is in the way: it is not a directory. Nothing was changed.") from None
        return False
    fsync_directory(os.path.dirname(path))
    return True


def temporary_name(path: str) -> str:
    """A name beside ``path`` that no reader takes for a finished file."""
    folder, name = os.path.split(path)
    return os.path.join(folder, f".{name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")


class Proof:
    """Compares content, piece by piece, with what was written down when it was stored."""

    def update(self, data: bytes) -> None:
        """The next piece."""

    def read(self, descriptor: int, at: int = 0) -> None:
        """An open file from this position on, all of it; the descriptor's own position does not move."""
        while True:
            data = os.pread(descriptor, CHUNK, at)
            if not data:
                return
            self.update(data)
            at += len(data)

    def check(self) -> None:
        """After the last one. Raises PitrError when the content is another."""


class Source:
    """The stored bytes of one file, read forward from a descriptor.

    A process that is given ``descriptor`` as its standard input reads from the position where we stand.
    """

    def __init__(self, descriptor: int, name: str) -> None:
        """``name`` is what errors call the file."""
        self.descriptor = descriptor
        self.name = name

    def peek(self, size: int = PEEK) -> bytes:
        """The first bytes, without moving on. At most PEEK."""
        return os.pread(self.descriptor, size, 0)

    def skip(self, size: int) -> None:
        """Go to this position, counted from the beginning. Only before anything was read."""
        os.lseek(self.descriptor, size, os.SEEK_SET)

    def check(self) -> None:
        """After the end, or instead of blaming the file: raise PitrError when it was not transferred whole."""

    def proof(self) -> Proof | None:
        """What the content has to be, where the stored bytes tell it; to be given all of it, and asked at the end."""
        return None

    def close(self) -> None:
        """Let go, also in the middle."""
        os.close(self.descriptor)


class Entry:
    """Size in bytes and time of the last change (seconds since 1970) of one stored file."""

    __slots__ = ("mtime", "size")

    def __init__(self, size: int, mtime: float) -> None:
        self.size = size
        self.mtime = mtime


class Tree:
    """A repository in a directory of this host. Other ways to reach one have the same methods.

    Every method raises FileNotFoundError only when the file is *known* not to be there; a repository that cannot be
    reached is a PitrError or another OSError.
    """

    # Whether opening a file takes long, so that one does not look into each of thousands.
    is_far = False

    def __init__(self, identity: str = "") -> None:
        """``identity``: path of the file with age identities that open what is encrypted, empty for none."""
        self.identity = identity

    def open(self, path: str) -> Source:
        """The stored bytes of a file."""
        return Source(os.open(path, os.O_RDONLY), path)

    def read(self, path: str) -> bytes:
        """All stored bytes of a small file."""
        with open(path, "rb") as stream:
            return stream.read()

    def stat(self, path: str) -> Entry:
        """Size and time."""
        status = os.stat(path)
        return Entry(status.st_size, status.st_mtime)

    def exists(self, path: str) -> bool:
        """Whether there is such a file or directory. Unlike os.path.exists, an error is not a no."""
        try:
            self.stat(path)
        except FileNotFoundError:
            return False
        return True

    def names(self, path: str) -> list[str]:
        """Names in a directory, sorted."""
        return sorted(os.listdir(path))

    @contextlib.contextmanager
    def adding(self, path: str) -> Iterator[str]:
        """Where to write what shall be stored as ``path``: a local name that does not exist yet.

        The caller creates that file, writes, fsyncs; leaving the block gives it its name durably, replacing nothing.
        Raises FileExistsError when ``path`` is there by then. The temporary file is gone in any case.
        """
        make_directory_of(path)
        temporary = temporary_name(path)
        try:
            yield temporary
            try:
                os.link(temporary, path)
            except OSError as error:
                if error.errno in _NO_LINKS:
                    raise PitrError(
                        f"The filesystem of {path} has no hard links ({error.strerror}); a repository needs them, so"
                        " that nothing in it is ever replaced. Nothing was stored. Move it to another filesystem."
                    ) from None
                raise
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
        fsync_directory(os.path.dirname(path))

    def close(self, wait: bool = True) -> None:
        """End what is kept open for later requests; here there is nothing."""

    def touch_lease(self, path: str) -> None:
        """Give a lease (``locks/lease-…``) the present time, creating it when it is not there.

        Apart from ``adding`` the only change; it is made for readers, too. ClusterFolder.touch_lease checks the name.
        """
        try:
            os.utime(path)
        except FileNotFoundError:
            make_directory_of(path)
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))

    def settle(self, path: str) -> None:
        """Make sure that a stored file that is there survives a power failure."""
        fsync_directory(os.path.dirname(path))


def make_directory_of(path: str) -> None:
    """Create the folder that a stored file lies in; the one above it has to be there (is it mounted?).

    The folder's own name is durable before the first file in it is.
    """
    directory = os.path.dirname(path)
    if not os.path.isdir(directory) and make_directory(directory):
        return
    with os.scandir(directory) as entries:
        if any(not entry.name.startswith(".") for entry in entries):
            return
    # Whoever made it may have died, or not yet come, to the sync of its name.
    fsync_directory(os.path.dirname(directory))


LOCAL = Tree()


def tree_for(repository: str, access: Mapping[str, str] | None = None) -> Tree:
    """The way to reach this repository, and to read it.

    ``access``: ``identity`` as for Tree, and the settings of remote.SshTree for ``ssh://…``.
    """
    if repository.startswith("ssh://"):
        # Who has a directory does not pay for this.
        from .remote import ssh_tree

        return ssh_tree(repository, access)
    identity = (access or {}).get("identity", "")
    return Tree(identity) if identity else LOCAL
