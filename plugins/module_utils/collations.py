# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Collations whose order may have changed between the host of a backup and this one, and the indexes to build anew.

An index that was sorted by another version of the C library or of ICU does not find rows that are there, and no
checksum tells. The server remembers the version that an object was made with (the notes of ALTER COLLATION say what to
do) and warns once a session; nobody reads that on the day of a restore. All of it can be asked while the recovery is
paused.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

from .errors import PitrError
from .postgres import Login, query

_DATABASES = """
SELECT datname, oid, datcollversion, pg_database_collation_actual_version(oid)
FROM pg_database WHERE datallowconn ORDER BY datname
"""
_COLLATIONS = """
SELECT c.oid, quote_ident(n.nspname) || '.' || quote_ident(c.collname), c.collversion,
       pg_collation_actual_version(c.oid)
FROM pg_collation c JOIN pg_namespace n ON n.oid = c.collnamespace
WHERE c.collversion IS DISTINCT FROM pg_collation_actual_version(c.oid) AND c.collversion IS NOT NULL
ORDER BY 2
"""
# The collations of an index's columns, and those that its expressions or its predicate name. What a partitioned index
# consists of is listed by itself. An exclusion constraint's index cannot be built concurrently (ReindexIndex).
_INDEXES = """
SELECT DISTINCT quote_ident(n.nspname) || '.' || quote_ident(c.relname), i.indisexclusion
FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind = 'i' AND (
    %(oid)s::oid = ANY (i.indcollation::oid[])
    OR EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid
               AND d.refclassid = 'pg_collation'::regclass AND d.refobjid = %(oid)s::oid)
) ORDER BY 1
"""
# DEFAULT_COLLATION_OID of pg_collation.dat: the one of the database.
_DEFAULT = 100


@dataclass(frozen=True)
class Mismatch:
    """One collation. ``collation`` is ``default`` for the database's own; ``actual`` is empty when it has none here.

    ``reindex`` are the statements that make the database whole again, in order, the refreshed version last;
    ``problem`` tells why the database could not be looked into.
    """

    database: str
    collation: str = ""
    recorded: str = ""
    actual: str = ""
    reindex: tuple[str, ...] = ()
    problem: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For a module's result."""
        return {**self.__dict__, "reindex": list(self.reindex)}


def mismatches(login: Login) -> list[Mismatch]:
    """Every mismatch of every database that allows connections. Reads only; works in a hot standby."""
    found: list[Mismatch] = []
    with contextlib.closing(login.connect()) as connection:
        databases = query(connection, _DATABASES)
    for name, _oid, recorded, actual in databases:
        try:
            with contextlib.closing(login.connect(name)) as connection:
                found += _of_database(connection, name, recorded, actual)
        except PitrError as error:
            found.append(Mismatch(name, problem=error.message))
    return found


def _of_database(connection: Any, name: str, recorded: str | None, actual: str | None) -> list[Mismatch]:
    found = []
    if recorded is not None and recorded != actual:
        quoted = query(connection, "SELECT quote_ident(%s)", (name,))[0][0]
        refresh = f"ALTER DATABASE {quoted} REFRESH COLLATION VERSION"
        found.append(_mismatch(connection, name, "default", (_DEFAULT, recorded, actual), refresh))
    for oid, collation, made_with, now in query(connection, _COLLATIONS):
        refresh = f"ALTER COLLATION {collation} REFRESH VERSION"
        found.append(_mismatch(connection, name, collation, (oid, made_with, now), refresh))
    return found


def _mismatch(
    connection: Any, database: str, collation: str, versions: tuple[int, str, str | None], refresh: str
) -> Mismatch:
    oid, recorded, actual = versions
    commands = [
        f"REINDEX INDEX {'' if exclusion else 'CONCURRENTLY '}{index}"
        for index, exclusion in query(connection, _INDEXES, {"oid": oid})
    ]
    # Where there is no version now, the server refuses to record one (AlterCollation, AlterDatabaseRefreshColl).
    if actual is not None:
        commands.append(refresh)
    return Mismatch(database, collation, recorded, actual or "", tuple(commands))
