# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A cluster dump as a list of objects with digests: the values, and how they are stored.

An object is what a table-of-contents comment of pg_dump introduces (``-- Name: t; Type: TABLE; ...``), one statement of
the cluster-wide part, one line of the preamble that :mod:`.dump` writes, or a *frame*: what stands between them
(headings, ``\\connect``, the SETs at the head of a database, ``SET default_tablespace``).

Facts are what the comparison must know of an object beyond its digest.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, fields
from sys import intern
from typing import Any, Optional, Union

from .errors import PitrError

FORMAT = 1
CLUSTER = "(cluster)"  # the pseudo database of everything that belongs to no database
FRAME = "(frame)"  # type of the text between objects

_IDENTIFIER = rb'"(?:[^"]|"")+"'
_RELATION = _IDENTIFIER + rb"\." + _IDENTIFIER


_ROLE_SETTING = re.compile(rb"ALTER ROLE (%b|ALL) (?:IN DATABASE %b )?SET (%b) " % ((_IDENTIFIER,) * 3))
_ROLE_STATEMENT = re.compile(rb"(CREATE|ALTER) ROLE (%b)" % _IDENTIFIER)
_STATEMENT = re.compile(rb"([A-Z]+(?: [A-Z]+)*) (%b)" % _IDENTIFIER)
_UNLOGGED_TABLE = re.compile(rb"CREATE UNLOGGED TABLE (%b) " % _RELATION)
_COPY = re.compile(rb"COPY (%b) " % _RELATION)
_SEQUENCE = re.compile(
    rb"(?:CREATE (UNLOGGED )?SEQUENCE (%b)"
    rb"|ALTER TABLE (?:ONLY )?(%b) ALTER COLUMN %b ADD GENERATED (?:ALWAYS|BY DEFAULT) AS IDENTITY \(\n"
    rb"    SEQUENCE NAME (%b)(?:\n    (LOGGED|UNLOGGED))?)\n"
    rb"(?:    AS \w+\n)?    START WITH (-?\d+)\n    INCREMENT BY (-?\d+)\n"
    % (_RELATION, _RELATION, _IDENTIFIER, _RELATION)
)
_SETVAL = re.compile(rb"SELECT pg_catalog\.setval\('((?:[^']|'')+)', (-?\d+), (true|false)\);\n+")


@dataclass(frozen=True)
class UnloggedTable:
    """CREATE UNLOGGED TABLE. ``relation`` is the qualified name as the dump quotes it."""

    relation: str


@dataclass(frozen=True)
class TableRows:
    """COPY of a table. ``frame`` is the digest of the object without its rows."""

    relation: str
    rows: int
    frame: str


@dataclass(frozen=True)
class SequenceDefinition:
    """CREATE SEQUENCE, or ADD GENERATED AS IDENTITY of ``table``. ``unlogged`` is None where the table decides."""

    relation: str
    start: int
    increment: int
    unlogged: Optional[bool]
    table: str


@dataclass(frozen=True)
class SequencePosition:
    """setval() of a sequence. ``frame`` is the digest of the object without value and is_called."""

    relation: str
    value: int
    called: bool
    frame: str


Fact = Union[UnloggedTable, TableRows, SequenceDefinition, SequencePosition]
_FACTS = {cls.__name__: cls for cls in (UnloggedTable, TableRows, SequenceDefinition, SequencePosition)}


@dataclass(frozen=True)
class DumpObject:
    """One piece of a dump. ``line`` (from 1) and ``offset`` tell where it begins, ``size`` is in bytes."""

    database: str
    type: str
    schema: str
    name: str
    digest: str
    line: int
    lines: int
    offset: int
    size: int
    fact: Optional[Fact]

    __slots__ = ("database", "digest", "fact", "line", "lines", "name", "offset", "schema", "size", "type")

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What the object is called. Not unique: operators of one name differ in their arguments only."""
        return self.database, self.type, self.schema, self.name

    @property
    def label(self) -> str:
        """Type and name as a reader knows them."""
        name = self.name if self.schema in ("", "-") else f"{self.schema}.{self.name}"
        return f"{self.type} {name}".strip()


@dataclass(frozen=True)
class DumpIndex:
    """All of a dump but its text. ``meta`` tells where it was taken; it is no part of the fingerprint."""

    fingerprint: str
    size: int
    lines: int
    meta: dict[str, Any]
    objects: tuple[DumpObject, ...]

    @property
    def databases(self) -> list[str]:
        """The databases that were dumped, in order."""
        return list(dict.fromkeys(item.database for item in self.objects if item.database != CLUSTER))

    @property
    def in_recovery(self) -> bool:
        """Taken from a server in recovery, where unlogged relations cannot be read."""
        return bool(self.meta.get("in_recovery"))

    def to_json(self) -> str:
        """The stored form: one object a line."""
        lines = ",\n".join(json.dumps(_row(item)) for item in self.objects)
        head = {name: getattr(self, name) for name in ("fingerprint", "size", "lines", "meta")}
        head["format"] = FORMAT
        return json.dumps(head)[:-1] + ', "objects": [\n' + lines + "\n]}\n"

    @classmethod
    def from_json(cls, text: str, name: str) -> DumpIndex:
        """Read the stored form; ``name`` is what errors call it.

        Raises PitrError when it is damaged or of another format.
        """
        try:
            data = json.loads(text)
            if data["format"] != FORMAT:
                raise PitrError(f"{name} has format {data['format']}, not {FORMAT}. Take the dump again.")
            objects = tuple(_object(row) for row in data["objects"])
            return cls(str(data["fingerprint"]), int(data["size"]), int(data["lines"]), dict(data["meta"]), objects)
        except (ValueError, KeyError, TypeError) as error:
            raise PitrError(f"{name} is damaged: {error!r}. Remove it, it is made again from the dump.") from None


_COLUMNS = tuple(field.name for field in fields(DumpObject) if field.name != "fact")


def _row(item: DumpObject) -> list[Any]:
    fact = None if item.fact is None else [type(item.fact).__name__, asdict(item.fact)]
    return [*(getattr(item, name) for name in _COLUMNS), fact]


def _object(row: list[Any]) -> DumpObject:
    database, kind, schema, name, digest, line, lines, offset, size, fact = row
    value = None if fact is None else _FACTS[fact[0]](**fact[1])
    return DumpObject(intern(database), intern(kind), intern(schema), name, digest, line, lines, offset, size, value)


def text_of(data: bytes) -> str:
    """Bytes of a dump for people; what is not UTF-8 (databases have encodings) stays distinguishable."""
    return data.decode("utf-8", "backslashreplace")


def _unquote(identifier: bytes) -> str:
    return text_of(identifier[1:-1].replace(b'""', b'"') if identifier.startswith(b'"') else identifier)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def statement_label(statement: bytes) -> tuple[str, str]:
    """Type and name of a statement of the cluster-wide part. Never contains a password: that is no identifier."""
    setting = _ROLE_SETTING.match(statement)
    if setting:
        return "ROLE SETTING", f"{_unquote(setting.group(1))} {_unquote(setting.group(2))}"
    role = _ROLE_STATEMENT.match(statement)
    if role:
        return "ROLE" if role.group(1) == b"CREATE" else "ROLE ATTRIBUTES", _unquote(role.group(2))
    if statement.startswith(b"GRANT "):
        return "GRANT", " ".join(text_of(statement[6:300]).rstrip(";\n ").split())
    other = _STATEMENT.match(statement)
    if other:
        return text_of(other.group(1)), _unquote(other.group(2))
    return "STATEMENT", text_of(b" ".join(statement.split()[:2]))


def fact_of(kind: str, header: bytes, body: bytes, rows: int, frame: str) -> Fact | None:
    """What the comparison must know of an object beyond its digest.

    ``header`` is the TOC comment, ``body`` what follows it (cut when it is long), ``frame`` the digest without rows.
    """
    if kind == "TABLE":
        table = _UNLOGGED_TABLE.match(body)
        return UnloggedTable(text_of(table.group(1))) if table else None
    if kind == "TABLE DATA":
        copy = _COPY.match(body)
        return TableRows(text_of(copy.group(1)), rows, frame) if copy and rows >= 0 else None
    if kind == "SEQUENCE":
        found = _SEQUENCE.match(body)
        if not found:
            return None
        unlogged, relation, table_name, identity, persistence, start, increment = found.groups()
        if relation is None:
            explicit = None if persistence is None else persistence == b"UNLOGGED"
            return SequenceDefinition(text_of(identity), int(start), int(increment), explicit, text_of(table_name))
        return SequenceDefinition(text_of(relation), int(start), int(increment), unlogged is not None, "")
    if kind == "SEQUENCE SET":
        # Nothing but the one statement, or it is not what the tolerance is meant for.
        position = _SETVAL.fullmatch(body)
        if position:
            relation, value, called = position.groups()
            rest = header + relation + body[position.end(3) :]
            name = text_of(relation.replace(b"''", b"'"))
            return SequencePosition(name, int(value), called == b"true", _digest(rest))
    return None
