# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Which files of a data directory belong into a base backup.

The rules are the server's own, so that a backup has the same content whichever way it was taken. Sources: section
"Backing Up the Data Directory" of "Making a Base Backup Using the Low Level API", and ``excludeFiles``,
``excludeDirContents`` and ``sendDir`` of basebackup.c.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from typing import NamedTuple

PG_CONTROL = "global/pg_control"
PG_WAL = "pg_wal"
PG_TBLSPC = "pg_tblspc"
# Emptied or written anew whenever a server starts; an empty directory keeps their permissions.
EMPTIED = frozenset(
    ("pg_stat_tmp", "pg_replslot", "pg_dynshmem", "pg_notify", "pg_serial", "pg_snapshots", "pg_subtrans")
)
LEFT_OUT = frozenset(
    (
        "postgresql.auto.conf.tmp",
        "current_logfiles.tmp",
        "postmaster.pid",
        "postmaster.opts",
        # Of the backup that this server was once restored from. Those of the new one are put in separately.
        "backup_label",
        "tablespace_map",
        "backup_manifest",
        ".DS_Store",
        # Of a restore of ours (unfinished.py, extract.py).
        "pitr-restoring.json",
        "pg_control.pitr-restoring",
    )
)
_LEFT_OUT_PREFIXES = ("pgsql_tmp", "pg_internal.init")

_RELATION = re.compile(r"(\d+)(?:_(fsm|vm|init))?(?:\.\d+)?\Z")
_TEMPORARY = re.compile(r"t\d+_\d+(?:_(?:fsm|vm|init))?(?:\.\d+)?\Z")
_DATABASE = re.compile(r"(?:base|PG_\d+_\d+)/\d+\Z")


class Item(NamedTuple):
    """A file or directory: its name in the backup, where it lies, and whether it is a directory.

    ``special``: neither of both, which no backup has.
    """

    name: str
    path: str
    is_directory: bool
    special: bool = False


def is_left_out(name: str) -> bool:
    """Whether a file or directory of this name (without its folder) is no part of a backup."""
    return name in LEFT_OUT or name.startswith(_LEFT_OUT_PREFIXES)


def relations(folder: str, names: Collection[str], unlogged: bool = False) -> set[str]:
    """Those of the files in a folder (``base/5``, ``PG_18_202506291/5``) that a backup leaves out as relations.

    Temporary ones, and with ``unlogged`` false what a recovery makes anew from the init fork.
    """
    if not _DATABASE.search(folder):
        return set()
    found = {name: _RELATION.match(name) for name in names}
    reset = {match.group(1) for match in found.values() if match and match.group(2) == "init"}
    result = {name for name in names if _TEMPORARY.match(name)}
    if not unlogged:
        result |= {n for n, match in found.items() if match and match.group(2) != "init" and match.group(1) in reset}
    return result


def walk(root: str, start: str = "", skip: Collection[str] = (), unlogged: bool = False) -> Iterator[Item]:
    """Everything below ``root``/``start`` that belongs into a backup, each directory before what is in it.

    Names are relative to ``root``. ``skip``: names of files, and of directories whose content lies elsewhere in the
    backup. What vanishes meanwhile is no error: WAL brings back what matters. pg_control is left to the caller, who
    copies it last, and so is the content of pg_wal.
    """
    try:
        with os.scandir(os.path.join(root, start)) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except FileNotFoundError:
        return
    gone = relations(start, [entry.name for entry in found], unlogged)
    for entry in found:
        name = f"{start}/{entry.name}" if start else entry.name
        if is_left_out(entry.name) or entry.name in gone or name == PG_CONTROL:
            continue
        if entry.name in EMPTIED or name == PG_WAL:
            # A link to a directory, too (convert_link_to_directory).
            if entry.is_dir():
                yield Item(name, entry.path, True)
        elif entry.is_dir(follow_symlinks=False):
            yield Item(name, entry.path, True)
            if name not in skip:
                yield from walk(root, name, skip, unlogged)
        elif name in skip:
            continue
        elif entry.is_file(follow_symlinks=False):
            yield Item(name, entry.path, False)
        elif not (start == PG_TBLSPC and entry.is_symlink()):
            yield Item(name, entry.path, False, True)


def tablespaces(pgdata: str) -> dict[int, str]:
    """The links of pg_tblspc: OID to the directory. A directory there (allow_in_place_tablespaces) is none."""
    result = {}
    with os.scandir(os.path.join(pgdata, PG_TBLSPC)) as entries:
        for entry in entries:
            if entry.is_symlink() and entry.name.isdecimal():
                result[int(entry.name)] = os.readlink(entry.path)
    return result
