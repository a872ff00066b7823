# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A filesystem that can be filled to the last byte, to the last name, and that can be seen read-only.

As root the front door mounts one and names it in PGDRILL_TEST_SMALL_FS: a directory with ``rw`` and ``ro``. Anybody
else makes one in a user namespace. The servers stay outside, because PostgreSQL would find itself to be root in there;
they reach it through ``/proc/<process>/root``, where the kernel shows the mounts of a process to its owner.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

# The sizes of tools/sandboxlib/smallfs.py.
SIZE = "96m"
NAMES = 4000
SMALL = 512 * 1024 * 1024

HELP = """\
A small filesystem is needed to test full disks, and neither root's `make test` nor a user namespace has made one.
Mount it by hand, and name it:
  mkdir -p /tmp/small/rw /tmp/small/ro
  sudo mount -t tmpfs -o size=96m,nr_inodes=4000,uid=$(id -u),mode=700 tmpfs /tmp/small/rw
  sudo mount --bind /tmp/small/rw /tmp/small/ro && sudo mount -o remount,bind,ro /tmp/small/ro
  PGDRILL_TEST_SMALL_FS=/tmp/small make test
"""

_MOUNT = f"""\
mount -t tmpfs -o size={SIZE},nr_inodes={NAMES},mode=700 pgdrill "$0/rw" &&
mount --bind "$0/rw" "$0/ro" && mount -o remount,bind,ro "$0/ro" && echo ready && exec cat
"""


class SmallDisk:
    """``path`` is the filesystem's top, ``read_only`` the same files where nobody may write."""

    def __init__(self, path: Path, read_only: Path) -> None:
        self.path = path
        self.read_only = read_only
        self._ballast = path / "ballast"
        status = os.statvfs(path)
        assert status.f_blocks * status.f_frsize < SMALL, f"{path} is not small; nobody wants it filled"

    def fill(self, leave: int = 0) -> None:
        """Take all room but so many bytes."""
        with open(self._ballast, "ab", buffering=0) as stream:
            for size in (1 << 20, 1 << 12):
                with contextlib.suppress(OSError):
                    while os.write(stream.fileno(), bytes(size)) == size:
                        pass
            os.truncate(self._ballast, os.fstat(stream.fileno()).st_size - leave)

    def fill_names(self, leave: int = 0) -> None:
        """Take all inodes but so many; tmpfs counts links as well."""
        folder = self.path / "names"
        folder.mkdir()
        made = []
        try:
            while True:
                made.append(folder / str(len(made)))
                made[-1].touch()
        except OSError as error:
            assert error.errno == errno.ENOSPC
        for path in made[:-1][-leave:] if leave else []:
            path.unlink()

    def free(self) -> None:
        """Give the room back."""
        self._ballast.unlink(missing_ok=True)
        shutil.rmtree(self.path / "names", ignore_errors=True)


@contextlib.contextmanager
def _mounted_by_root(place: Path) -> Iterator[SmallDisk]:
    # One for all tests: they take turns, and find it empty.
    with _locked(place / "rw"):
        for left in (place / "rw").iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        yield SmallDisk(place / "rw", place / "ro")


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _in_a_namespace(directory: Path) -> Iterator[SmallDisk]:
    for name in ("rw", "ro"):
        (directory / name).mkdir(parents=True)
    # It ends when its input does, however we end, and the filesystem with it.
    with subprocess.Popen(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", _MOUNT, str(directory)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as keeper:  # fmt: skip
        assert keeper.stdin and keeper.stdout and keeper.stderr
        try:
            if keeper.stdout.readline() != "ready\n":
                pytest.fail(f"{HELP}\nunshare says: {keeper.stderr.read()}")
            inside = Path(f"/proc/{keeper.pid}/root{directory}")
            yield SmallDisk(inside / "rw", inside / "ro")
        finally:
            keeper.stdin.close()
            keeper.wait()


@contextlib.contextmanager
def small_disk(directory: Path) -> Iterator[SmallDisk]:
    """``directory``: where to put what is needed for it."""
    given = os.environ.get("PGDRILL_TEST_SMALL_FS")
    with _mounted_by_root(Path(given)) if given else _in_a_namespace(directory) as disk:
        # A short name of its own, which is the same in every message.
        for link, target in (("disk", disk.path), ("read-only", disk.read_only)):
            (directory / link).parent.mkdir(parents=True, exist_ok=True)
            (directory / link).symlink_to(target)
        yield SmallDisk(directory / "disk", directory / "read-only")
