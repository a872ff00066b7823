# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Names for what WAL only has numbers for: OIDs and files of relations, asked of a server that has them.

That server is the live one, which knows everything but what was dropped, or one that was restored to a moment before,
which knows that as well. A file's number changes when its relation is rewritten or truncated, an OID never does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from .errors import PitrError
from .findtarget import FIRST_NORMAL_OID, RelFile
from .postgres import Login, query
from .repository import Chapter

# Databases that are asked at most, one connection each.
MAX_DATABASES = 50

_SELECT = """
SELECT c.oid, n.nspname, c.relname, c.relkind::text, coalesce(pg_relation_filenode(c.oid), 0)::bigint,
       coalesce(nullif(c.reltablespace, 0), d.dattablespace)::bigint, c.relpersistence::text,
       coalesce(tn.nspname || '.' || t.relname, '')
  FROM pg_class c
  JOIN pg_namespace n ON n.oid = c.relnamespace
  JOIN pg_database d ON d.datname = current_database()
  LEFT JOIN pg_index i ON i.indexrelid = c.oid
  LEFT JOIN pg_class t ON t.reltoastrelid = coalesce(i.indrelid, c.oid)
  LEFT JOIN pg_namespace tn ON tn.oid = t.relnamespace
 WHERE {}
"""


@dataclass(frozen=True)
class Relation:
    """A relation as a server knows it. ``file`` is 0 for one without storage; ``toast_of`` is its table's name."""

    oid: int
    name: str
    kind: str
    file: int
    tablespace: int
    persistence: str
    toast_of: str = ""

    @property
    def is_table(self) -> bool:
        """Table, partitioned table or materialized view."""
        return self.kind in ("r", "p", "m")


@dataclass(frozen=True)
class Wanted:
    """The relation that is looked for: a name as it was given, and the numbers that are known of it.

    ``numbers`` are OIDs or files, whichever they are; ``by_server`` are (database, OID) and (database, file).
    """

    name: str = ""
    numbers: frozenset[int] = frozenset()
    file: RelFile | None = None
    by_server: frozenset[tuple[int, int]] = frozenset()

    @property
    def any(self) -> bool:
        """Whether a relation was asked for at all."""
        return bool(self.name or self.numbers or self.file)


def parse_relation(text: str) -> Wanted:
    """``schema.table``, ``table``, an OID or a file's number, or a file as WAL has it (``1663/5/16385``)."""
    text = text.strip()
    if not text:
        return Wanted()
    if text.isdigit():
        return Wanted(numbers=frozenset({int(text)}))
    if re.fullmatch(r"\d+/\d+/\d+", text):
        return Wanted(file=RelFile(*map(int, text.split("/"))))
    if re.fullmatch(r'(?:[^".]+|"[^"]+")(?:\.(?:[^".]+|"[^"]+"))?', text) is None:
        raise PitrError(f"relation '{text}' is not schema.table, a table, an OID, or a file such as 1663/5/16385.")
    return Wanted(name=text.replace('"', ""))


class Names:
    """A server that is asked for names; without one nothing has a name, and the reason is told."""

    def __init__(self, login: Login | None, chapter: Chapter) -> None:
        """Raises PitrError when the server is not of this cluster: its numbers would name other relations."""
        self._login = login
        self._databases: dict[int, str] = {}
        self._of_file: dict[tuple[int, int], Relation] = {}
        self._of_oid: dict[tuple[int, int], Relation] = {}
        self._asked: set[int] = set()
        self.in_recovery = False
        self.log_timezone = ""
        self.log_line_prefix = ""
        if login is None:
            return
        with closing(login.connect()) as connection:
            system = str(query(connection, "SELECT system_identifier FROM pg_control_system()")[0][0])
            if system != chapter.system_identifier:
                raise PitrError(
                    f"The server at {login} has system identifier {system}, the archive is of"
                    f" {chapter.system_identifier}: its relations are others. Connect to a server of this cluster, or"
                    " to one restored from it."
                )
            self._databases = {
                int(oid): name for oid, name in query(connection, "SELECT oid::bigint, datname::text FROM pg_database")
            }
            rows = query(
                connection,
                "SELECT pg_is_in_recovery(), current_setting('log_timezone'), current_setting('log_line_prefix')",
            )
            self.in_recovery, self.log_timezone, self.log_line_prefix = rows[0]

    @property
    def known(self) -> bool:
        """Whether there is a server to ask."""
        return self._login is not None

    @property
    def source(self) -> str:
        """Which server tells, in words."""
        return f"the {'restored' if self.in_recovery else 'running'} server at {self._login}"

    def database(self, oid: int) -> str:
        """Name of a database, empty when it is not known."""
        return self._databases.get(oid, "")

    def database_oid(self, text: str) -> int | None:
        """OID of a database that was given by name or OID. Raises PitrError when there is no telling."""
        if not text:
            return None
        if text.isdigit():
            return int(text)
        for oid, name in self._databases.items():
            if name == text:
                return oid
        if not self.known:
            raise PitrError(f"WAL knows databases by their OIDs: give that of '{text}', or login_* of a server.")
        raise PitrError(
            f"{self.source} has no database '{text}'; it has {', '.join(sorted(self._databases.values()))}."
        )

    def resolve(self, wanted: Wanted, database: int | None) -> Wanted:
        """Add what the server knows of the name. In every database unless one is given."""
        if not wanted.name or not self.known:
            return wanted
        schema, _dot, table = wanted.name.rpartition(".")
        found: set[tuple[int, int]] = set()
        for oid in [database] if database else list(self._databases)[:MAX_DATABASES]:
            condition = "c.relname = %s AND c.relkind IN ('r', 'p', 'm')" + (" AND n.nspname = %s" if schema else "")
            for relation in self._ask(oid, condition, (table, schema) if schema else (table,)):
                # A partitioned table's rows are its partitions'.
                tree = "c.oid IN (SELECT relid FROM pg_partition_tree(%s)) OR c.oid = %s"
                for part in self._ask(oid, tree, (relation.oid, relation.oid)):
                    found |= {(oid, part.oid), (oid, part.file or part.oid)}
        return Wanted(wanted.name, wanted.numbers, wanted.file, frozenset(found))

    def learn(self, database: int, oids: Iterable[int], files: Iterable[int]) -> None:
        """Ask for these at once."""
        wanted = sorted({oid for oid in oids if (database, oid) not in self._of_oid})
        numbers = sorted({file for file in files if (database, file) not in self._of_file})
        if self.known and (wanted or numbers):
            condition = "c.oid = ANY(%s::oid[]) OR pg_relation_filenode(c.oid) = ANY(%s::oid[])"
            self._ask(database, condition, (wanted, numbers))

    def _ask(self, database: int, condition: str, parameters: tuple[object, ...]) -> list[Relation]:
        name = self._databases.get(database)
        if self._login is None or name is None:
            return []
        if database not in self._asked and len(self._asked) >= MAX_DATABASES:
            return []
        self._asked.add(database)
        try:
            connection = self._login.connect(db=name)
        except PitrError:
            # template0, and databases that this role may not connect to.
            return []
        with closing(connection):
            rows: list[Any] = query(connection, _SELECT.format(condition), parameters)
        found = []
        for oid, schema, table, kind, file, tablespace, persistence, toast_of in rows:
            relation = Relation(int(oid), f"{schema}.{table}", kind, int(file), int(tablespace), persistence, toast_of)
            found.append(relation)
            self._of_oid[database, relation.oid] = relation
            if relation.file:
                self._of_file[database, relation.file] = relation
        return found

    def of(self, database: int, oid: int | None, file: RelFile | None) -> Relation | None:
        """What :meth:`learn` has found."""
        if oid is not None:
            return self._of_oid.get((database, oid))
        return self._of_file.get((database, file.number)) if file is not None else None

    def reason(self, database: int, oid: int | None) -> str:
        """Why there is no name."""
        if not self.known:
            return "WAL has numbers only; login_* of the running or a restored server would tell the name"
        if database not in self._databases:
            return f"{self.source} has no database {database}"
        if database not in self._asked:
            return f"{self.source} was not asked about more than {MAX_DATABASES} databases"
        if oid is not None:
            return f"{self.source} has no relation {oid}: it was dropped, or is not there yet"
        return f"no relation of {self.source} is in this file: dropped, truncated or rewritten since, or not there yet"


def is_system(number: int) -> bool:
    """Whether a relation belongs to the system."""
    return number < FIRST_NORMAL_OID
