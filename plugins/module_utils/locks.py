# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Who uses what of a repository, so that nothing is removed under somebody's hands.

Locks are flock(2) on files in ``<cluster>/locks/`` and die with their holder, however it ends. A recovery is no process
of ours; for it there is a lease, a file whose time every ``get`` renews.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator

from .errors import PitrError
from .repository import LEASE, USE, ClusterFolder
from .tree import make_directory
from .wal import Lsn

# Seconds after which a lease that nobody has renewed holds nothing any more.
LEASE_SECONDS = 3600
# Seconds to wait for a lock that somebody tries for a moment only.
PATIENCE = 10
EXPIRE = "expire"
_TAKE = "take-"


class InUseError(PitrError):
    """Somebody else holds the lock."""


def acquire(path: str, shared: bool = False) -> int:
    """A descriptor that holds the lock. Raises InUseError, or OSError where locks cannot be had."""
    while True:
        make_directory(os.path.dirname(path))
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            # Its last holder may have removed the file between our two calls; then it is no longer the lock.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise InUseError(f"{path} is held by another process.") from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def hold_directory(path: str) -> int:
    """A descriptor that holds a lock of a directory itself, until every process that has it has closed it (flock(2)).

    Raises InUseError when somebody else has it, OSError where there is no such directory or locks cannot be had.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise InUseError(f"{path} is held by another process.") from None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextlib.contextmanager
def held(folder: ClusterFolder, name: str, shared: bool = False) -> Iterator[int]:
    """Hold a lock of the cluster. An exclusive one is removed afterwards.

    Raises InUseError when somebody else has it, OSError where locks cannot be had.
    """
    path = os.path.join(folder.locks_path, name)
    descriptor = acquire(path, shared)
    try:
        yield descriptor
    finally:
        if not shared:
            with contextlib.suppress(OSError):
                os.unlink(path)
        os.close(descriptor)


def exclusive_use(folder: ClusterFolder, label: str) -> contextlib.AbstractContextManager[int]:
    """Nobody reads this backup, and nobody begins to. Raises InUseError when somebody does."""
    return held(folder, USE + label)


def probe_use(folder: ClusterFolder, label: str) -> None:
    """Raise InUseError when somebody reads this backup now. Holds and creates nothing."""
    path = os.path.join(folder.locks_path, USE + label)
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InUseError(f"{path} is held by another process.") from None
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def reading(folder: ClusterFolder, label: str) -> Iterator[None]:
    """This backup is being read and stays as long. Raises InUseError when it is being removed.

    Where this host cannot lock (a repository that it may only read, or reaches over the network) the lease alone
    protects the backup.
    """
    with contextlib.ExitStack() as stack:
        if os.path.isdir(folder.path):
            with contextlib.suppress(OSError):
                stack.enter_context(held(folder, USE + label, shared=True))
        yield


@contextlib.contextmanager
def taking(folder: ClusterFolder, label: str, timeline: int, lsn: Lsn) -> Iterator[None]:
    """A backup is being taken that will need WAL from ``lsn`` on."""
    deadline = time.monotonic() + PATIENCE
    with contextlib.ExitStack() as stack:
        while True:
            try:
                descriptor = stack.enter_context(held(folder, _TAKE + label))
                break
            except InUseError:
                # An expire looks whether it is held, for a moment.
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
            except OSError:
                # A filesystem without locks: an expire refuses to run there.
                descriptor = -1
                break
        if descriptor >= 0:
            os.pwrite(descriptor, json.dumps({"timeline": timeline, "lsn": str(lsn)}).encode(), 0)
        yield


def taken(folder: ClusterFolder) -> Iterator[tuple[str, str | None]]:
    """Labels of backups that are being taken now, each with what :func:`taking` wrote; None when it cannot be read."""
    for name in _names(folder, _TAKE):
        try:
            with held(folder, name):
                continue
        except InUseError:
            pass
        try:
            with open(os.path.join(folder.locks_path, name), encoding="ascii") as stream:
                yield name[len(_TAKE) :], stream.read()
        except FileNotFoundError:
            continue
        except (OSError, ValueError):
            yield name[len(_TAKE) :], None


def new_lease(label: str) -> str:
    """Name of a lease on this backup, as ``pitr-wal get --lease=`` takes it."""
    return f"{label}-{os.urandom(4).hex()}"


def release(folder: ClusterFolder, lease: str) -> None:
    """Forget a lease that was of no use, where this host can; elsewhere it ends by itself."""
    with contextlib.suppress(OSError):
        os.unlink(os.path.join(folder.locks_path, LEASE + lease))


def leases(folder: ClusterFolder, now: float | None = None) -> dict[str, str]:
    """Labels that recoveries hold now, with the name of a lease. Leases of the future count: clocks are set back."""
    now = time.time() if now is None else now
    found: dict[str, str] = {}
    for name in _names(folder, LEASE):
        with contextlib.suppress(FileNotFoundError):
            if now - os.stat(os.path.join(folder.locks_path, name)).st_mtime < LEASE_SECONDS:
                found[name[len(LEASE) :].rpartition("-")[0]] = name
    return found


def forget_stale_leases(folder: ClusterFolder, now: float | None = None) -> None:
    """Remove leases that nobody has renewed for a day."""
    now = time.time() if now is None else now
    for name in _names(folder, LEASE):
        path = os.path.join(folder.locks_path, name)
        with contextlib.suppress(OSError):
            if now - os.stat(path).st_mtime > 24 * LEASE_SECONDS:
                os.unlink(path)


def _names(folder: ClusterFolder, prefix: str) -> list[str]:
    try:
        return sorted(name for name in os.listdir(folder.locks_path) if name.startswith(prefix))
    except FileNotFoundError:
        return []
