# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Tablespaces that were created after the backup: recovery creates them where they were, whatever is mapped.

The path stands in the WAL (xl_tblspc_create_rec). Replay takes a directory that is there as it is, with whatever is in
it, and ends with FATAL when there is none (create_tablespace_directories of tablespace.c). On the host of a living
server that has the tablespace, it would write into that server's files.

The search reads the WAL that will be replayed, so it is only made where a cluster on this host has a tablespace that
the backup does not have. Elsewhere the worst is the FATAL, which names the directory.
"""

from __future__ import annotations

import os
import re

from . import delta
from .index import ArchiveIndex
from .plan import Refusal, RestorePlan
from .request import Request
from .wal import WalFile
from .waldump import Record, WalScanner

# Bytes of WAL that are searched: pg_waldump reads some hundred megabytes a second, and a plan should not take minutes.
SEARCHED = 2 << 30
_CREATE = re.compile(r'CREATE (\d+) "(.+)"\Z')


def _is_worth_it(request: Request, result: RestorePlan) -> bool:
    """Whether the directory that is replaced, or a server that runs here, has a tablespace that the backup lacks."""
    known = {os.path.realpath(item.location) for item in result.backup.tablespaces}
    known |= {os.path.realpath(place) for place in request.locations(result.backup).values()}
    directories = {request.pgdata, *delta.server_directories()}
    found = {os.path.realpath(target) for each in directories for _oid, _link, target in delta.links(each)}
    return bool(found - known)


def check_created(
    request: Request, result: RestorePlan, index: ArchiveIndex, scanner: WalScanner, in_place: bool
) -> tuple[list[Refusal], list[str]]:
    """Refusals for places that recovery could not, or must not, create a tablespace in; and notes.

    Raises PitrError when WAL cannot be read.
    """
    if not _is_worth_it(request, result):
        return [], []
    # A delta restore removes the files of tablespaces that the backup lacks.
    cleared = {os.path.realpath(target) for _oid, _link, target in delta.links(request.pgdata)} if in_place else set()
    size = index.segment_size
    first, last = (WalFile.parse(name).number(size) for name in (result.first_segment, result.last_segment))
    searched = min(last, first + max(SEARCHED // size, 1) - 1)
    refusals: dict[str, Refusal] = {}
    for record in scanner.records(list(result.spans), searched, ("Tablespace", "Transaction", "XLOG")):
        if _is_behind(record, result):
            break
        match = _CREATE.match(record.description) if record.rmgr == "Tablespace" else None
        if match is None:
            continue
        place = match.group(2)
        what = f"Tablespace {match.group(1)} was created after backup {result.backup.label}, at LSN {record.lsn}:"
        if not os.path.isdir(place):
            message = f"{what} recovery will want the directory {place}, and it is not there."
            refusals[place] = Refusal("tablespace_in_wal", message, "Create it, empty, owned by the server's user.")
        elif os.path.realpath(place) not in cleared and _is_occupied(place):
            message = f"{what} recovery will write to {place}, which no mapping changes, and it is not empty."
            nearest = (
                "Move its content away if no server uses it; else restore on another host, or from a backup that has"
                " the tablespace."
            )
            refusals[place] = Refusal("tablespace_in_wal", message, nearest)
    notes = []
    if searched < last:
        behind = index.name(WalFile.parse(result.last_segment).timeline, searched)
        notes.append(
            f"WAL behind {behind} was not searched for CREATE TABLESPACE, which recovery repeats at the original place;"
            " do not restore beside a server that has made a tablespace since"
        )
    return list(refusals.values()), notes


def _is_behind(record: Record, result: RestorePlan) -> bool:
    """Whether recovery has stopped before this record, or at it: neither creates a tablespace any more."""
    target = result.target
    if target.kind == "immediate":
        return record.lsn >= result.backup.stop_lsn
    if target.lsn is not None:
        return record.lsn > target.lsn
    if target.name is not None:
        return record.description == f"RESTORE_POINT {target.name}"
    if record.time is None:
        return False
    if target.xid is not None:
        return record.ended_xid == target.xid & 0xFFFFFFFF
    return target.stops_before(record.time)


def _is_occupied(place: str) -> bool:
    try:
        return bool(os.listdir(place))
    except OSError:
        # It cannot be told.
        return True
