# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Data directories of restores that are not complete, or complete and not accepted: how they are told from others."""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from . import extract, recovery_conf
from .catalog import Backup
from .errors import PitrError
from .extract import IN_PROGRESS
from .repository import write_json
from .request import Request
from .tree import fsync_directory


class Marker:
    """Says in the directory that it is not complete, of which cluster it is, and how much of it is there.

    The next try after a kill reads from it where the old directory is and which tablespace directories it may clear.
    Those of a delta restore are not to be cleared: what lies in them belongs to the cluster, and to others.
    """

    def __init__(
        self,
        path: str,
        backup: Backup,
        moved_aside: str,
        locations: Mapping[int, str],
        total: int = 0,
        pg_wal: str = "",
        delta: bool = False,
        dead_pgdata: str = "",
    ) -> None:
        """``total``: bytes that will be counted, when they are not the backup's own.

        ``dead_pgdata``: where the server has died, see deadwal.py.
        """
        self._path = path
        self._facts = {"format": 1, "system_identifier": backup.system_identifier, "backup": backup.label}
        places = sorted(locations.values())
        self._left: dict[str, Any] = {"moved_aside": moved_aside, "locations": [] if delta else places}
        self._left["pg_wal"] = pg_wal
        self._left["dead_pgdata"] = dead_pgdata
        if delta:
            self._left["delta"] = {"locations": places}
        self._total = total or backup.database_bytes
        self._done = 0
        self.write()

    def add(self, count: int) -> None:
        """Count bytes; write the sum down once a second."""
        self._done += count
        if time.monotonic() - self._written_at >= 1:
            self.write()

    def write(self) -> None:
        """Write the marker anew, on stable storage."""
        write_json(self._path, {**self._facts, **self._left, "bytes": self._done, "total_bytes": self._total})
        self._written_at = time.monotonic()


def waiting(pgdata: str) -> str:
    """Where the new directory waits, with nothing but its marker in it, while the old one is moved aside.

    So there is no moment in which nothing tells where the old one has gone.
    """
    return f"{pgdata}.restoring"


def is_vacant(directory: str) -> bool:
    """Whether there is no such directory, or nothing in it."""
    try:
        return not os.listdir(directory)
    except FileNotFoundError:
        return True
    except OSError:
        return False


def has_content(directory: str) -> bool:
    """Whether it is a directory that holds anything but what tells of an unfinished restore."""
    try:
        return any(not _is_marker(name) for name in os.listdir(directory))
    except FileNotFoundError:
        return False


def _is_marker(name: str) -> bool:
    return name == IN_PROGRESS or name.startswith(f".{IN_PROGRESS}.")


def left_behind(pgdata: str, system_identifier: str) -> dict[str, Any] | None:
    """What a killed restore of this cluster says of itself, None when the directory is something else.

    It has the marker, and no pg_control yet. Empty when it was killed before it had written the marker. It may not have
    come to its place yet (:func:`waiting`).
    """
    if is_vacant(pgdata):
        pgdata = waiting(pgdata)
    if os.path.lexists(os.path.join(pgdata, extract.PG_CONTROL)):
        return None
    with contextlib.suppress(OSError, ValueError):
        names = os.listdir(pgdata)
        if names and IN_PROGRESS not in names and all(map(_is_marker, names)):
            return {}
        with open(os.path.join(pgdata, IN_PROGRESS), encoding="utf-8") as stream:
            found = json.load(stream)
        if isinstance(found, dict) and found.get("system_identifier") == system_identifier:
            return found
    return None


def half_done_delta(found: Mapping[str, Any] | None) -> bool:
    """Whether what ``left_behind`` has found is a data directory that a delta restore was changing in place."""
    return found is not None and "delta" in found


def unaccepted(request: Request) -> bool:
    """Whether this is a restored cluster that nobody has accepted: its recovery settings are still there.

    The settings may lie outside the data directory. That they belong to it is told by the backup's label in it.
    """
    planned = recovery_conf.planned(request.configuration)
    if planned is None:
        return False
    for name in ("backup_label", "backup_label.old"):
        with contextlib.suppress(OSError), open(os.path.join(request.pgdata, name), "rb") as stream:
            if f"LABEL: {planned.get('backup')}".encode() in stream.read().splitlines():
                return True
    return False


def foreign_content(location: str, left_behind: bool) -> bool:
    """Whether a tablespace directory holds something that no restore has put there.

    A server, and so a restore, makes one directory in it (GetTablespaceVersionDirectory).
    """
    names = os.listdir(location)
    return any(not name.startswith("PG_") for name in names) if left_behind else bool(names)


def empty(location: str) -> None:
    """Remove what a restore has put into a tablespace directory."""
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(location):
            if name.startswith("PG_"):
                shutil.rmtree(os.path.join(location, name), ignore_errors=True)


def exchange(pgdata: str, mark: Callable[[str, str], object]) -> str:
    """Move a data directory aside, and put one with nothing but a marker in its place. Returns where the old one is.

    ``mark(path, aside)`` writes the marker. It should not tell yet what the next try would clear: by then that may be
    somebody else's. A kill at any moment leaves the old directory in its place, or a marker that tells where it is.
    Empty, and nothing done, when there was no old one. Raises PitrError when something else is where it would wait.
    """
    if not has_content(pgdata):
        return ""
    place, parent, aside = waiting(pgdata), os.path.dirname(pgdata), _free_name(pgdata)
    if has_content(place):
        raise PitrError(f"{place} is in the way of a new {pgdata}. Move it away; nothing was touched.")
    # It may be there from a try that was killed before its first rename.
    remove_incomplete(place)
    with made(place):
        mark(os.path.join(place, IN_PROGRESS), aside)
    fsync_directory(parent)
    os.rename(pgdata, aside)
    os.rename(place, pgdata)
    fsync_directory(parent)
    return aside


@contextlib.contextmanager
def made(directory: str) -> Iterator[None]:
    """A data directory is there; one that was made for a block that fails is gone again."""
    was_there = os.path.isdir(directory)
    os.makedirs(directory, mode=0o700, exist_ok=True)
    os.chmod(directory, 0o700)
    try:
        yield
    except BaseException:
        if not was_there:
            with contextlib.suppress(OSError):
                os.rmdir(directory)
        raise


def _free_name(pgdata: str) -> str:
    """Where a data directory is moved aside to."""
    stamp = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%S")
    aside = f"{pgdata}.old-{stamp}"
    while os.path.lexists(aside):
        aside += "x"
    return aside


def clear_incomplete(directory: str) -> None:
    """Remove all but the marker from a directory that is not complete."""
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(directory):
            path = os.path.join(directory, name)
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path, ignore_errors=True)
            elif name != IN_PROGRESS:
                with contextlib.suppress(OSError):
                    os.unlink(path)


def remove_tree(path: str, patience: float = 10) -> None:
    """Remove a directory with all that is in it, while somebody else may be clearing away there, too: the process that
    has fetched WAL ahead for a server notices by itself that the server was stopped.

    Raises OSError, also when it is not gone after ``patience`` seconds.
    """
    deadline = time.monotonic() + patience
    while os.path.lexists(path):
        try:
            shutil.rmtree(path)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def remove_incomplete(directory: str) -> None:
    """Remove a directory that is not complete, its marker last: a kill in between leaves what the next try knows."""
    clear_incomplete(directory)
    shutil.rmtree(directory, ignore_errors=True)
