# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a plan has to refuse and to say when a directory is to be changed in place (delta.py does it)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from . import delta, places
from .catalog import Backup
from .plan import Refusal
from .request import Request
from .unfinished import left_behind


def applies(request: Request, system_identifier: str) -> bool:
    """Whether there is a directory that a delta restore would change. Only of one that may be replaced (hostcheck)."""
    pgdata = request.pgdata
    if not request.delta or not os.path.isdir(pgdata) or not os.listdir(pgdata):
        return False
    killed = left_behind(pgdata, system_identifier)
    return killed is None or bool(killed)


def without_dead_wal(request: Request) -> Request:
    """The request, without the WAL of the directory that is changed; notes() tells what is lost by that."""
    return replace(request, dead_pg_wal="none") if request.dead_pg_wal == "auto" else request


def check(request: Request, chain: Sequence[Backup], marker: Mapping[str, Any]) -> tuple[list[Refusal], set[str]]:
    """Why the directory cannot be changed where it is, and the tablespaces' directories that are its own.

    ``marker``: what a killed restore says of itself (unfinished.left_behind), or empty.
    """
    found = []
    pgdata, backup = request.pgdata, chain[-1]
    if len(chain) > 1:
        message = f"{backup.label} is an incremental backup, which a delta restore cannot begin with."
        nearest = f"Restore without delta, or begin with the full backup {chain[0].label}."
        found.append(Refusal("delta_incremental", message, nearest))
    if backup.own_wal:
        message = f"{backup.label} was taken offline and brings WAL of its own, which a delta restore does not."
        found.append(Refusal("delta_offline", message, "Restore without delta, or begin with another backup."))
    if request.pg_wal_directory and not places.leads_to(pgdata, request.pg_wal_directory):
        message = f"A delta restore leaves pg_wal where it is, and {request.pg_wal_directory} is not there."
        found.append(Refusal("delta_pg_wal", message, "Leave out pg_wal_directory, or delta."))
    own_wal = os.path.realpath(os.path.join(pgdata, places.PG_WAL))
    if os.path.realpath(request.dead_pg_wal) == own_wal:
        message = f"{request.dead_pg_wal} is the pg_wal of the directory that a delta restore changes in place."
        found.append(Refusal("dead_pg_wal", message, "Copy it elsewhere and name the copy, or restore without delta."))
    locations = request.locations(backup)
    linked = {oid: target for oid, _link, target in delta.links(pgdata)}
    own = {location for oid, location in locations.items() if linked.get(oid) == location}
    known = [*marker.get("locations", []), *marker.get("delta", {}).get("locations", [])]
    own |= {location for location in locations.values() if location in known}
    used = delta.used_by_a_server(own | set(linked.values()), pgdata)
    if used is not None:
        message = f"The tablespace directory {used[0]} is in use by the server on {used[1]}."
        nearest = f"{pgdata} is a copy of that directory. Restore without delta, and map the tablespaces elsewhere."
        found.append(Refusal("tablespace_in_use", message, nearest))
    return found, own


def notes(request: Request, backup: Backup, is_in_place: bool) -> list[str]:
    """What is lost, for it cannot be undone."""
    pgdata = request.pgdata
    if not is_in_place:
        return [f"delta: {pgdata} is empty, so that everything is written"]
    result = [
        f"delta: {pgdata} is changed in place and not moved aside; there is no undo. Files that the backup does"
        " not have, such as server logs in it, are removed"
    ]
    waiting = delta.unarchived(pgdata)
    if waiting:
        result.append(
            f"delta: {waiting} segments in its pg_wal are finished and not archived; they are lost."
            " Without delta, a restore to latest replays them"
        )
    locations = request.locations(backup)
    for oid, _link, target in delta.links(pgdata):
        if oid not in locations:
            result.append(f"delta: the tablespace in {target} is not in the backup; its files are removed")
        elif locations[oid] != target:
            result.append(f"delta: the tablespace in {target} goes to {locations[oid]}; the old files stay")
    return result
