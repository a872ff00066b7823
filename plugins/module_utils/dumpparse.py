# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Reads a cluster dump as a stream and makes its index. Pure: bytes in, index out.

The text is what ``pg_dumpall --quote-all-identifiers`` writes, behind a preamble of comments. Every byte belongs to
exactly one object, and whether two dumps are equal depends on digests alone. Labels come from pg_dump's comments.
Quotes are followed as psql's lexer does (psqlscan.l), so that a comment inside a function body is not taken for one of
pg_dump's. Rows of COPY are only searched for their end, never touched one by one; memory grows with the number of
objects.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from sys import intern
from typing import Any

from .dumpindex import CLUSTER, FORMAT, FRAME, DumpIndex, DumpObject, fact_of, statement_label, text_of
from .errors import PitrError

COMPLETE = b"-- PostgreSQL database cluster dump complete\n"
PREAMBLE = b"-- pgdrill.pitr cluster dump, format %d\n" % FORMAT
_HEAD = 4096  # bytes of an object that are kept until its end; names are at most 63 bytes
_TOC = re.compile(rb"-- (?:Data for |Statistics for )?Name: (.*); Type: (.*?); Schema: (.*?); Owner: .*\n")
_DATABASE = re.compile(rb'-- Database "(.*)" dump\n')
_CONNECT = re.compile(rb"\\connect (?:-reuse-previous=on \"dbname='(.*)'\"|\"(.*)\"|(\S+))\n")
_PREAMBLE_LINE = re.compile(rb'-- ([A-Z][A-Z ]*) ("(?:[^"\\]|\\.)*") (.*)\n')
_DUMPED = re.compile(rb"-- Dumped (from database|by pg_dump) version (\d+)")
_QUOTE = re.compile(rb"""'|"|\$(?:[A-Za-z_\x80-\xff][A-Za-z0-9_\x80-\xff]*)?\$""")
_ESCAPED_END = re.compile(rb"\\|'")
_WORD = re.compile(rb"[A-Za-z0-9_$\x80-\xff]")


class Indexer:
    """Takes a dump in pieces of any size and makes its index."""

    def __init__(self) -> None:
        self._objects: list[DumpObject] = []
        self._meta: dict[str, Any] = {}
        self._fingerprint = hashlib.sha256()
        # What is before _mark in the current buffer has been hashed; _base is the buffer's offset in the stream.
        self._pending: list[bytes] = []
        self._base = 0
        self._mark = 0
        self._line = 1
        # Lexer: the quote that is open, whether a statement may begin, whether a COPY waits for its rows.
        self._quote = b""
        self._escapes = False
        self._idle = True
        self._copy_statement = False
        self._in_rows = False
        # The object that is being read.
        self._database = CLUSTER
        self._in_preamble = False
        self._header_open = False
        self._complete = False
        self._begin(FRAME, "", "", 0)

    # --- objects -----------------------------------------------------------------------------------------------------

    def _begin(self, kind: str, schema: str, name: str, offset: int) -> None:
        self._type, self._schema, self._name = kind, schema, name
        self._hash = hashlib.sha256()
        self._frame_hash = hashlib.sha256()
        self._empty = True
        self._head = b""
        self._header_size = 0
        self._rows = -1
        self._object_offset, self._object_line = offset, self._line

    def _start(
        self, buffer: bytes, position: int, kind: str, schema: str = "", name: str = "", database: str | None = None
    ) -> None:
        """End the current object before ``position`` and begin the next there; it stays in the database by default."""
        self._flush(buffer, position)
        self._end(self._base + position)
        if database is not None:
            self._database = database
        self._begin(kind, schema, name, self._base + position)

    def _end(self, offset: int) -> None:
        size = offset - self._object_offset
        if size == 0:
            return
        if self._type == "":  # a statement of the cluster-wide part is known by its text
            self._type, self._name = statement_label(self._head)
        digest = self._hash.hexdigest()[:32]
        # A frame of nothing but blank lines and \restrict is no content: older minor releases write none.
        if self._type == FRAME and self._empty:
            digest = ""
        header, body = self._head[: self._header_size], self._head[self._header_size :].lstrip(b"\n")
        frame = self._frame_hash.hexdigest()[:32] if self._type == "TABLE DATA" else ""
        fact = None
        if self._type != "SEQUENCE SET" or size <= _HEAD:
            fact = fact_of(self._type, header, body, self._rows, frame)
        self._objects.append(
            DumpObject(
                intern(self._database),
                intern(self._type),
                intern(self._schema),
                self._name,
                digest,
                self._object_line,
                self._line - self._object_line,
                self._object_offset,
                size,
                fact,
            )
        )
        self._fingerprint.update(digest.encode())

    def _flush(self, buffer: bytes, position: int, rows: bool = False) -> None:
        """Hash the buffer up to ``position``."""
        if position <= self._mark:
            return
        with memoryview(buffer)[self._mark : position] as piece:
            self._hash.update(piece)
            self._empty = False
            if not rows:
                if self._type == "TABLE DATA":
                    self._frame_hash.update(piece)
                if len(self._head) < _HEAD:
                    self._head += bytes(piece[: _HEAD - len(self._head)])
        self._mark = position

    def _skip(self, buffer: bytes, position: int, end: int) -> None:
        """Leave these bytes out of every digest; they still count for sizes."""
        self._flush(buffer, position)
        self._mark = end

    # --- the stream --------------------------------------------------------------------------------------------------

    def feed(self, data: bytes) -> None:
        """Take the next piece."""
        # A very long line would otherwise be copied again with every piece.
        if not self._in_rows and b"\n" not in data:
            if data:
                self._pending.append(data)
            return
        self._pending.append(data)
        buffer = b"".join(self._pending) if len(self._pending) > 1 else data
        position, self._mark = 0, 0
        while True:
            before = position
            position = self._read_rows(buffer, position) if self._in_rows else self._read_lines(buffer, position)
            if position == before or position == len(buffer):
                break
        self._flush(buffer, position, rows=self._in_rows)
        self._base += position
        self._pending = [buffer[position:]] if position < len(buffer) else []

    def finish(self) -> DumpIndex:
        """The index of everything that was fed. Raises PitrError when the dump does not end as pg_dumpall ends one."""
        if self._pending or self._quote or self._in_rows or not self._idle or not self._complete:
            raise PitrError(
                f"The dump is not complete: it ends at line {self._line}, without the closing words of pg_dumpall."
                " Take it again."
            )
        self._end(self._base)
        return DumpIndex(self._fingerprint.hexdigest(), self._base, self._line - 1, self._meta, tuple(self._objects))

    def _read_rows(self, buffer: bytes, position: int) -> int:
        """Rows of COPY; ``position`` is at the line feed before the first of them, or further on."""
        found = buffer.find(b"\n\\.\n", position)
        end = found if found >= 0 else max(position, len(buffer) - 3)
        lines = buffer.count(b"\n", position, end)
        self._rows += lines
        self._line += lines
        self._flush(buffer, end, rows=True)
        if found < 0:
            return end
        self._in_rows = False
        self._line += 2
        return found + 4

    def _read_lines(self, buffer: bytes, position: int) -> int:
        """Whole lines outside of COPY. Returns how far it came: to the end, to rows, or to what needs another line."""
        while True:
            end = buffer.find(b"\n", position) + 1
            if end == 0:
                return position
            line = buffer[position:end]
            if self._idle:
                if line == b"--\n" and not self._header_open:
                    second = buffer.find(b"\n", end) + 1
                    if second == 0:
                        return position
                    self._header(buffer, position, end, buffer[end:second])
                    self._header_open = True
                    self._line += 2
                    position = second
                    continue
                if self._between(buffer, position, end, line):
                    self._line += 1
                    position = end
                    continue
            if self._lex(line):
                # The line feed stays unread: it makes the end of no rows look like the end of many.
                self._in_rows = True
                self._rows = 0
                self._flush(buffer, end - 1)
                return end - 1
            self._line += 1
            position = end

    def _header(self, buffer: bytes, position: int, second: int, line: bytes) -> None:
        """A comment of three lines at ``position``; ``line`` is its middle one."""
        self._in_preamble = False
        self._complete = line == COMPLETE
        toc = _TOC.fullmatch(line)
        if toc and self._database != CLUSTER:
            name, kind, schema = (text_of(group) for group in toc.groups())
            self._start(buffer, position, kind, schema, name)
            self._header_size = second - position + len(line) + 3
            return
        database = _DATABASE.fullmatch(line)
        if database or self._complete:
            self._start(buffer, position, FRAME, database=text_of(database.group(1)) if database else CLUSTER)
        elif self._type != FRAME:
            self._start(buffer, position, FRAME)

    def _between(self, buffer: bytes, position: int, end: int, line: bytes) -> bool:
        """A line where a statement may begin. True when it is dealt with, False when it must be lexed."""
        if line == b"--\n":
            self._header_open = False
            return True
        if line == b"\n":
            if self._database == CLUSTER and self._type != FRAME:
                self._start(buffer, position, FRAME)
            # pg_dump writes one or two of them behind an object, depending on what comes next.
            self._skip(buffer, position, end)
            return True
        if line.startswith(b"--"):
            return self._comment(buffer, position, end, line)
        if line.startswith(b"\\"):
            if self._type != FRAME:
                self._start(buffer, position, FRAME)
            connect = _CONNECT.fullmatch(line)
            if connect and self._database == CLUSTER:
                quoted, plain, bare = connect.groups()
                self._start(buffer, position, FRAME, database=text_of(quoted or plain or bare))
            if is_noise(line):
                self._skip(buffer, position, end)
            return True
        self._complete = False
        if self._database == CLUSTER:
            kind = FRAME if line.startswith(b"SET ") else ""
            if not (kind == FRAME and self._type == FRAME):
                self._start(buffer, position, kind)
        elif line.startswith(b"SET default_") and self._type != FRAME:
            self._start(buffer, position, FRAME)
        if self._type == FRAME and line.startswith(b"SET standard_conforming_strings = "):
            self._escapes = line.endswith(b" off;\n")
        return False

    def _comment(self, buffer: bytes, position: int, end: int, line: bytes) -> bool:
        if self._base + position == 0 and line == PREAMBLE:
            self._in_preamble = True
            return True
        described = _PREAMBLE_LINE.fullmatch(line) if self._in_preamble else None
        if described:
            kind = text_of(described.group(1))
            try:
                name, value = (json.loads(group.decode("utf-8")) for group in described.group(2, 3))
            except ValueError:
                raise PitrError(f"Line {self._line} of the dump is damaged. Take it again.") from None
            if kind == "META":
                self._meta[name] = value
                self._skip(buffer, position, end)
            else:
                self._start(buffer, position, kind, "", name)
            return True
        if self._type == FRAME:
            dumped = _DUMPED.match(line)
            if dumped:
                program = "server" if dumped.group(1) == b"from database" else "pg_dump"
                self._meta.setdefault(program, int(dumped.group(2)))
                self._skip(buffer, position, end)
        if self._database == CLUSTER and self._type != FRAME:
            self._start(buffer, position, FRAME)
        return True

    def _lex(self, line: bytes) -> bool:
        """Follow the quotes of one line. True when it is the end of a COPY statement whose rows come next."""
        if self._idle:
            self._copy_statement = line.startswith(b"COPY ")
        position = 0
        while True:
            if not self._quote:
                found = _QUOTE.search(line, position)
                if found is None:
                    break
                start, position = found.span()
                mark = found.group()
                if mark == b"'" and (self._escapes or _is_escape_string(line, start)):
                    mark = b"E"
                elif mark.startswith(b"$") and start and _WORD.match(line, start - 1):
                    position = start + 1  # a dollar inside an identifier
                    continue
                self._quote = mark
            elif self._quote == b"E":
                found = _ESCAPED_END.search(line, position)
                if found is None:
                    break
                position = found.end()
                if found.group() == b"\\" or line[position : position + 1] == b"'":
                    position += 1
                else:
                    self._quote = b""
            else:  # a doubled quote ends one string and begins another, which comes to the same
                at = line.find(self._quote, position)
                if at < 0:
                    break
                position = at + len(self._quote)
                self._quote = b""
        self._idle = not self._quote and line.endswith(b";\n")
        return self._idle and self._copy_statement and line.endswith(b" FROM stdin;\n")


def is_noise(line: bytes) -> bool:
    """Lines between statements that are no content: psql's restricted mode, minor releases, blank lines."""
    return line in (b"", b"\n") or line.startswith((b"\\restrict ", b"\\unrestrict ", b"-- META ", b"-- Dumped "))


def _is_escape_string(line: bytes, quote: int) -> bool:
    return quote > 0 and line[quote - 1 : quote] in (b"E", b"e") and not (quote > 1 and _WORD.match(line, quote - 2))


def index_of(pieces: Iterable[bytes]) -> DumpIndex:
    """The index of a whole dump. Raises PitrError when it is not complete."""
    indexer = Indexer()
    for piece in pieces:
        indexer.feed(piece)
    return indexer.finish()
