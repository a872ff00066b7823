# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Can a backup be restored here? The data directory that may be in the way, the programs, the places, the room."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from . import combine, delta, inplace, keep_out, places
from .catalog import Backup
from .errors import PitrError
from .facts import host_glibc, library_notes
from .plan import Refusal, RestorePlan
from .postgres import (
    binary,
    binary_version,
    control_data,
    data_version,
    effective_setting,
    run,
    running_pid,
)
from .repository import Chapter
from .request import Request
from .space import MIB, Filesystem, below, existing, filesystems, needs, tablespace_bytes
from .unfinished import foreign_content, half_done_delta, left_behind, unaccepted


def check_directory(request: Request, chapter: Chapter, cluster: str) -> Iterator[Refusal]:
    """May the data directory be replaced? At most one reason why not."""
    pgdata = request.pgdata
    try:
        found = os.listdir(pgdata)
    except FileNotFoundError:
        return
    except OSError as error:
        yield Refusal("directory_unreadable", f"{pgdata} cannot be read: {error.strerror}.")
        return
    pid = running_pid(pgdata)
    if pid is not None:
        message = f"A server is running in {pgdata} (process {pid})."
        yield Refusal("server_running", message, "Stop it first: pg_ctl stop -D, or its service.")
        return
    if not found:
        return
    killed = left_behind(pgdata, chapter.system_identifier)
    if killed is not None:
        if combine.is_busy(pgdata):
            message = f"A restore into {pgdata} still combines backups: another one, or what a killed one has left."
            yield Refusal("restore_running", message, "Wait until pg_combinebackup has ended.")
        if half_done_delta(killed) and not (request.delta or request.force):
            message = f"{pgdata} is what a delta restore of this cluster has left half-way; no server can start."
            yield Refusal("directory_not_empty", message, "Repeat it with delta; with force it is moved aside.")
        return
    if "PG_VERSION" not in found or data_version(pgdata) is None:
        message = f"{pgdata} is not empty and not a data directory. It will not be touched."
        yield Refusal("directory_foreign", message)
        return
    try:
        identifier = control_data(request.bin_dir, pgdata).system_identifier
    except PitrError as error:
        message = f"{pgdata} is not empty, and it cannot be told which cluster it is: {error.message}"
        yield Refusal("directory_foreign", message, "Move it away yourself.")
        return
    if identifier != chapter.system_identifier:
        message = (
            f"{pgdata} is the cluster with system identifier {identifier}, the repository's cluster"
            f" '{cluster}' is {chapter.system_identifier}."
        )
        yield Refusal("directory_foreign", message, "force does not change that; restore to another directory.")
    elif not request.force:
        message = f"{pgdata} is not empty: it is this cluster's own data directory."
        aside = "With force it is moved aside, not removed."
        in_place = "With force and delta it is changed in place, and what it is now is lost."
        yield Refusal("directory_not_empty", message, in_place if request.delta else aside)
    elif os.path.ismount(pgdata) and not request.delta:
        message = f"{pgdata} is a mount point and cannot be moved aside."
        yield Refusal(
            "directory_mount_point",
            message,
            "Move its content away yourself and restore into the empty directory, or restore in place with delta.",
        )


def check_host(
    request: Request, links: Sequence[Backup], chapter: Chapter, wal_directory: str, in_place: bool
) -> Iterator[Refusal]:
    """Can this host run what would be restored? The room is :func:`check_space`.

    ``links``: the chain of backups. ``wal_directory``: where pg_wal goes, empty for a plain directory in PGDATA.
    """
    backup = links[-1]
    try:
        version = binary_version(request.bin_dir)
    except PitrError as error:
        yield Refusal("version", error.message, f"The backup is of PostgreSQL {backup.postgresql_version}.")
    else:
        if version != backup.postgresql_version:
            message = f"The backup is of PostgreSQL {backup.postgresql_version}, {request.bin_dir} is {version}."
            yield Refusal("version", message, "Point bin_dir at the same major version.")
    if not os.access(request.wal_command, os.X_OK):
        message = f"{request.wal_command} is not an executable file, so WAL could not be fetched."
        yield Refusal("wal_command", message, "The module pgdrill.pitr.wal_command installs it.")
    place = existing(os.path.dirname(request.pgdata))
    if not os.access(place, os.W_OK):
        message = f"{place} cannot be written by this user, so {request.pgdata} cannot be created."
        yield Refusal("not_writable", message)
    unknown = set(request.tablespace_mapping) - {t.location for t in backup.tablespaces}
    if unknown:
        known = ", ".join(t.location for t in backup.tablespaces) or "none"
        message = f"tablespace_mapping names {', '.join(sorted(unknown))}; the backup's tablespaces are: {known}."
        yield Refusal("tablespace_unknown", message)
    marker = left_behind(request.pgdata, chapter.system_identifier) or {}
    killed = marker.get("locations", [])
    locations = request.locations(backup)
    yield from places.check_tablespaces(request, locations)
    yield from places.check_wal_directory(request, wal_directory, locations, marker.get("pg_wal", ""))
    own: set[str] = set()
    if in_place:
        found, own = inplace.check(request, links, marker)
        yield from found
    for location in sorted(set(locations.values()) - own):
        if os.path.isdir(location) and foreign_content(location, location in killed):
            message = f"The tablespace directory {location} is not empty."
            yield Refusal("tablespace_not_empty", message, "Map it to an empty one with tablespace_mapping.")
    if request.config_dir and not os.path.exists(os.path.join(request.config_dir, "postgresql.conf")):
        yield Refusal("config_dir", f"{request.config_dir} holds no postgresql.conf.")
    elif request.keep_out:
        yield from _check_keep_out(request)


def _check_keep_out(request: Request) -> Iterator[Refusal]:
    """Can ordinary users be kept out? Of a file in the data directory only the place counts: the backup has it."""
    try:
        keep_out.rules("", request.inspect_user, request.inspect_hba)
    except PitrError as error:
        yield Refusal("keep_out", error.message)
    if not os.path.exists(os.path.join(request.configuration, "postgresql.conf")):
        return
    try:
        hba_file = effective_setting(request.bin_dir, request.configuration, "hba_file")
    except PitrError:
        # Of the old directory it does not matter; of another one the restore says so, and puts everything back.
        return
    why = keep_out.problem(hba_file, [request.pgdata, request.configuration])
    if why and not places.within(hba_file, request.pgdata):
        message = f"Ordinary users cannot be kept out of the restored cluster: {why}."
        yield Refusal("keep_out", message, keep_out.INSTEAD)


def room(
    request: Request, links: Sequence[Backup], wal_bytes: int, tail_bytes: int, wal_directory: str
) -> list[Filesystem]:
    """What the restore needs, and what there is, by filesystem."""
    place = existing(os.path.dirname(request.pgdata))
    # A chain is unpacked link by link before it is combined.
    factor = combine.needed_bytes(links, place) / (links[-1].database_bytes or 1)
    found = needs(
        links[-1],
        request.pgdata,
        request.locations(links[-1]),
        request.config_dir,
        wal_bytes,
        tail_bytes,
        pg_wal=wal_directory or os.path.join(request.pgdata, "pg_wal"),
        factor=factor,
    )
    return filesystems(found, request.pgdata)


def check_space(request: Request, chapter: Chapter, found: list[Filesystem], in_place: bool) -> Iterator[Refusal]:
    """Is there room for all of it? On every filesystem that is too small, what is needed and for what."""
    for filesystem in found:
        free = filesystem.free
        if free < filesystem.needed:
            free += _will_be_freed(request, chapter, filesystem, in_place)
        if free >= filesystem.needed:
            continue
        what = ", ".join(f"{need.what} {-(-need.needed // MIB)} MiB" for need in filesystem.needs)
        message = (
            f"{filesystem.path} has {free // MIB} MiB free, the restore needs {-(-filesystem.needed // MIB)} MiB"
            f" there: {what}."
        )
        nearest = "The old directory is kept beside the new one until you remove it."
        if in_place:
            nearest = "What the old directory takes is counted in; make room for the rest."
        if len(filesystem.needs) > 1 and any(need.what.startswith("tablespace") for need in filesystem.needs):
            nearest += " tablespace_mapping puts tablespaces elsewhere."
        roomy = [other.path for other in found if other.free - other.needed >= filesystem.needed]
        if roomy:
            nearest += f" There would be room on the filesystem of {roomy[0]}."
        yield Refusal("space", message, nearest)


def _will_be_freed(request: Request, chapter: Chapter, filesystem: Filesystem, in_place: bool) -> int:
    """Bytes that the restore frees before it begins: what a killed one, or one that nobody wants to keep, has left."""
    pgdata = request.pgdata
    killed = left_behind(pgdata, chapter.system_identifier)
    going = []
    if in_place:
        # Files of it are kept, or replaced one by one.
        going = [pgdata, *(target for _oid, _link, target in delta.links(pgdata))]
    elif killed is not None:
        going = [pgdata, *map(str, killed.get("locations", []))]
    elif not request.keep_unaccepted and unaccepted(request):
        going = [pgdata]
    device = os.stat(filesystem.path).st_dev
    return sum(below(place) for place in going if os.path.isdir(place) and os.stat(place).st_dev == device)


def server_version(bin_dir: str) -> str:
    """Version of the programs in ``bin_dir`` as the server would tell it, such as ``18.1 (Debian 18.1-1)``."""
    match = re.search(r"\) (.+)", run([binary(bin_dir, "postgres"), "--version"]))
    return match.group(1).strip() if match else ""


def told(
    request: Request, result: RestorePlan, found: list[Filesystem], wal_directory: str
) -> tuple[dict[str, Any], list[str]]:
    """What the plan says of this host and of the server that was backed up, and what somebody should think about."""
    backup, facts = result.backup, result.backup.facts
    notes = []
    here = server_version(request.bin_dir)
    there = facts.server_version if facts is not None else ""
    if there and here.split()[:1] != there.split()[:1]:
        older = _numbers(here) < _numbers(there)
        notes.append(
            f"the backup is of PostgreSQL {there.split()[0]}, the programs here are {here.split()[0]}"
            + (": older ones; bugs that were mended meanwhile are back, install the newer" if older else "")
        )
    glibc = host_glibc()
    notes += library_notes(facts, glibc)
    for filesystem in found:
        if filesystem.needed <= filesystem.free < filesystem.wanted:
            notes.append(
                f"{filesystem.path} has {filesystem.free // MIB} MiB free: enough for the copy, but the recovery may"
                f" want {(filesystem.wanted - filesystem.needed) // MIB} MiB more for pg_wal"
            )
    sizes, exact = tablespace_bytes(backup)
    locations = request.locations(backup)
    if request.delta:
        notes += inplace.notes(request, backup, result.in_place)
    if wal_directory:
        pg_wal = os.path.join(request.pgdata, places.PG_WAL)
        stays = f"; {os.path.realpath(pg_wal)}, where it leads now, stays as it is" if os.path.islink(pg_wal) else ""
        notes.append(f"pg_wal will be a link to the new directory {wal_directory}{stays}")
    facts_of_host: dict[str, Any] = {
        "space": [filesystem.to_dict() for filesystem in found],
        "tablespaces": [
            {
                "oid": item.oid,
                "location": item.location,
                "target": locations[item.oid],
                "bytes": sizes[item.oid],
                "exact": exact,
            }
            for item in backup.tablespaces
        ],
        "server_version": {"backup": there, "host": here},
        "data_checksums": facts.data_checksums if facts is not None else None,
        "floors": dict(facts.floors) if facts is not None else {},
        "collation": {
            "providers": list(facts.providers) if facts is not None else [],
            "backup_glibc": facts.glibc if facts is not None else "",
            "host_glibc": glibc,
            "backup_icu": facts.icu if facts is not None else "",
        },
        "moved_aside": _moves(request, result),
    }
    return facts_of_host, notes


def _moves(request: Request, result: RestorePlan) -> list[dict[str, str]]:
    """What happens to the directory that is in the way."""
    pgdata = request.pgdata
    if result.in_place or not os.path.isdir(pgdata) or not os.listdir(pgdata):
        return []
    killed = left_behind(pgdata, result.backup.system_identifier)
    if (killed is not None and not half_done_delta(killed)) or (not request.keep_unaccepted and unaccepted(request)):
        return [{"from": pgdata, "to": ""}]
    return [{"from": pgdata, "to": f"{pgdata}.old-<UTC time>"}]


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version.split()[0])] if version else []
