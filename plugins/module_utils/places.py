# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Where the parts of a restored cluster go that lie outside of its data directory: tablespaces, and pg_wal by a link.

What is there and belongs to somebody else is neither used nor touched. Paths are compared by their parts and with all
links resolved, never by their beginnings.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Mapping
from typing import Any

from .catalog import Backup
from .errors import PitrError
from .plan import Refusal
from .postgres import query
from .request import Request
from .tree import fsync_directory

PG_WAL = "pg_wal"
# What a server, pg_basebackup or a recovery puts into pg_wal; nothing else is removed there.
WAL_NAME = re.compile(
    r"([0-9A-F]{24}(\.partial|\.[0-9A-F]{8}\.backup)?|[0-9A-F]{8}\.history|RECOVERY(XLOG|HISTORY)|xlogtemp\.\d+"
    r"|archive_status|summaries)\Z"
)
_VERSION_DIRECTORY = re.compile(r"PG_\d+_\d+\Z")
_RESTORED = re.compile(r"\.restored-[A-Za-z0-9._-]+\Z")
# A path of a file below it must be shorter than MAXPGPATH (1024); see CreateTableSpace of tablespace.c.
_MAX_LOCATION = 900


def within(path: str, directory: str) -> bool:
    """Whether ``path`` is ``directory`` or lies in it. Both need not exist."""
    path, directory = os.path.realpath(path), os.path.realpath(directory)
    return os.path.commonpath((path, directory)) == directory


def _overlap(one: str, other: str) -> bool:
    return within(one, other) or within(other, one)


def _owner(path: str) -> str:
    """The directory above ``path`` that belongs to a cluster, and what it is; empty when there is none."""
    above = os.path.dirname(os.path.realpath(path))
    while True:
        with contextlib.suppress(OSError):
            names = os.listdir(above)
            if "PG_VERSION" in names and "global" in names:
                return f"the data directory {above}"
            if any(_VERSION_DIRECTORY.match(name) for name in names):
                return f"{above}, which is a tablespace of a cluster"
        if above == os.path.dirname(above):
            return ""
        above = os.path.dirname(above)


def _not_makeable(path: str) -> str:
    """Why a directory cannot be made or written there, or the empty text."""
    existing = path
    while not os.path.lexists(existing):
        existing = os.path.dirname(existing)
    if not os.path.isdir(existing):
        return f"{existing} is not a directory"
    return "" if os.access(existing, os.W_OK | os.X_OK) else f"{existing} cannot be written by this user"


def wal_directory(request: Request, backup: Backup) -> str:
    """Where the restored cluster's pg_wal goes; empty when it is a plain directory in the data directory.

    One that is a link now gets a new directory beside the present one, on the same filesystem.
    """
    if request.pg_wal_directory:
        return request.pg_wal_directory
    link = os.path.join(request.pgdata, PG_WAL)
    if not os.path.islink(link):
        return ""
    place = f"{_RESTORED.sub('', os.path.realpath(link))}.restored-{backup.label}"
    while os.path.lexists(place):
        place += "x"
    return place


def check_tablespaces(request: Request, locations: Mapping[int, str]) -> list[Refusal]:
    """Why tablespaces cannot go to these places."""
    found = []
    hint = "Map it elsewhere with tablespace_mapping, or all of them with tablespace_prefix."
    for oid, location in sorted(locations.items()):
        others = [path for other, path in sorted(locations.items()) if other > oid]
        message = ""
        code = "tablespace_place"
        if not os.path.isabs(location) or "\0" in location:
            message = f"The tablespace directory '{location}' is not an absolute path."
        elif len(os.fsencode(location)) > _MAX_LOCATION:
            message = f"The tablespace directory {location} has more than {_MAX_LOCATION} bytes."
        elif _overlap(location, request.pgdata):
            code = "tablespace_in_pgdata"
            message = f"The tablespace directory {location} and the data directory {request.pgdata} lie in each other."
        elif any(os.path.isabs(path) and _overlap(location, path) for path in others):
            code = "tablespace_overlap"
            other = next(path for path in others if os.path.isabs(path) and _overlap(location, path))
            message = (
                f"Two tablespaces would go to {location} and {other}, which is the same place or one in the other."
            )
        elif _owner(location):
            code = "tablespace_in_cluster"
            message = f"The tablespace directory {location} lies in {_owner(location)}."
        elif _not_makeable(location):
            message = f"The tablespace directory {location} cannot be used: {_not_makeable(location)}."
        if message:
            found.append(Refusal(code, message, hint))
    return found


def check_wal_directory(request: Request, place: str, locations: Mapping[int, str], killed: str) -> list[Refusal]:
    """Why pg_wal cannot go to ``place``. ``killed``: where a killed restore has put it."""
    if not place:
        return []
    link = os.path.join(request.pgdata, PG_WAL)
    code, hint = "pg_wal_directory", "Name an empty directory with pg_wal_directory."
    present = os.path.realpath(link)
    left = os.path.realpath(killed) if killed else ""
    if not os.path.isabs(place) or "\0" in place:
        message = f"The directory '{place}' for pg_wal is not an absolute path."
    elif not request.pg_wal_directory and os.path.ismount(present):
        message = (
            f"pg_wal is a link to {present}, which is a mount point, so that a directory beside it would be on another"
            " filesystem."
        )
        hint = "Name an empty directory on the filesystem you want with pg_wal_directory."
    elif _overlap(place, request.pgdata):
        message = f"The directory {place} for pg_wal and the data directory {request.pgdata} lie in each other."
    elif os.path.islink(link) and present != left and _overlap(place, present):
        message = f"The directory {place} for pg_wal holds, or lies in, the WAL of the present cluster, {present}."
    elif any(os.path.isabs(path) and _overlap(place, path) for path in locations.values()):
        message = f"The directory {place} for pg_wal is, or lies in, the place of a tablespace, or the reverse."
    elif _owner(place):
        message = f"The directory {place} for pg_wal lies in {_owner(place)}."
    elif _not_makeable(place):
        message = f"The directory {place} for pg_wal cannot be used: {_not_makeable(place)}."
    elif os.path.isdir(place) and _is_used(place, os.path.realpath(place) == left):
        message = f"The directory {place} for pg_wal is not empty."
    else:
        return []
    return [Refusal(code, message, hint)]


def _is_used(place: str, left_behind: bool) -> bool:
    """Whether there is anything in it, or, when a killed restore has left it behind, anything that is no WAL."""
    names = os.listdir(place)
    return any(not WAL_NAME.match(name) for name in names) if left_behind else bool(names)


def leads_to(pgdata: str, place: str) -> bool:
    """Whether pg_wal of this data directory is a link to that place."""
    link = os.path.join(pgdata, PG_WAL)
    return os.path.islink(link) and os.path.realpath(link) == os.path.realpath(place)


def link_wal(pgdata: str, place: str) -> None:
    """Make pg_wal of a new data directory a link to ``place``; nothing when that is empty."""
    if place:
        os.makedirs(place, mode=0o700, exist_ok=True)
        os.chmod(place, 0o700)
        fsync_directory(os.path.dirname(os.path.abspath(place)))
        os.symlink(place, os.path.join(pgdata, PG_WAL))


def clear_wal(place: str) -> None:
    """Remove what :func:`link_wal` has made: what belongs into pg_wal, and the directory when it is empty then."""
    if not place or not os.path.isdir(place):
        return
    for name in os.listdir(place):
        path = os.path.join(place, name)
        if WAL_NAME.match(name):
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    os.unlink(path)
    with contextlib.suppress(OSError):
        os.rmdir(place)


def check_links(pgdata: str, locations: Mapping[int, str], wal: str) -> None:
    """Every link of a restored directory leads where it was planned, and there is no other. Raises PitrError."""
    directory = os.path.join(pgdata, "pg_tblspc")
    paths = {str(oid): location for oid, location in locations.items()}
    found = {name: os.path.join(directory, name) for name in os.listdir(directory)}
    links = {name: os.readlink(path) for name, path in found.items() if os.path.islink(path)}
    if wal:
        links[PG_WAL], paths[PG_WAL] = os.readlink(os.path.join(pgdata, PG_WAL)), wal
    if links != paths:
        wrong = sorted(name for name in {*links, *paths} if links.get(name) != paths.get(name))
        raise PitrError(
            "The restored links are not those of the plan: "
            + ", ".join(f"{name} leads to {links.get(name)} instead of {paths.get(name)}" for name in wrong)
        )


def check_server(connection: Any, planned: Mapping[str, Any]) -> None:
    """The running server has its tablespaces where the restore has put them. Raises PitrError.

    One that WAL has dropped since the backup is in no list; one that WAL has made lies where it says.
    """
    expected = planned.get("tablespaces") or {}
    if not expected:
        return
    # A server that is paused before the commit of a DROP TABLESPACE has no link any more of what it still lists.
    rows = query(
        connection,
        "SELECT oid::text, pg_tablespace_location(oid) FROM pg_tablespace"
        " WHERE oid::text IN (SELECT name FROM pg_ls_dir('pg_tblspc') AS entries (name))",
    )
    wrong = [f"{oid} in {place} instead of {expected[oid]}" for oid, place in rows if expected.get(oid, place) != place]
    if wrong:
        raise PitrError(
            f"The restored server has tablespaces elsewhere than planned: {', '.join(wrong)}. Stop it; it may be"
            " writing another cluster's files."
        )
