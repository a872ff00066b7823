# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A tar read forward once, its content handed on as it came out of the decompressor.

Python's tarfile copies every byte three times on that way, which is half of a restore's processor time. What a server
writes is plain ustar with base-256 numbers for large files (tarCreateHeader of src/port/tar.c); the long names of GNU
and pax, which other writers use, are understood, too.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

from . import codec
from .errors import PitrError
from .tree import LOCAL, Tree

BLOCK = 512
_KINDS = {b"0": "file", b"\0": "file", b"7": "file", b"5": "directory"}
# A header of an extension holds a path and a few numbers; more is damage.
_LONGEST_EXTENSION = 1024 * 1024


@dataclass(frozen=True)
class Member:
    """One entry. ``kind`` is file, directory or other; ``size`` in bytes; ``mode`` the permission bits."""

    name: str
    kind: str
    size: int
    mode: int


class TarStream:
    """The members of a tar, in order. Raises PitrError, naming the file, for everything that is no whole tar."""

    def __init__(self, reader: codec.Reader, path: str) -> None:
        self._reader = reader
        self._path = path
        self._piece = memoryview(b"")
        self._left = 0  # bytes of the current member that nobody has taken
        self._padding = 0

    def __iter__(self) -> Iterator[Member]:
        """Walk to the proven end of the stored file; content that is not taken is passed over."""
        name, size = "", -1
        while True:
            self._pass_over()
            header = self._take(BLOCK)
            if not any(header):
                break
            flag = header[156:157]
            own = self._begin(header, size if flag not in (b"x", b"g", b"L", b"K") else -1)
            if flag == b"L":
                name = os.fsdecode(self._extension(own).rstrip(b"\0"))
            elif flag == b"x":
                records = self._pax(self._extension(own))
                name = os.fsdecode(records[b"path"]) if b"path" in records else name
                size = int(records.get(b"size", size))
            elif flag not in (b"g", b"K"):
                mode = self._number(header[100:108]) & 0o777
                yield Member(name or self._name(header), _KINDS.get(flag, "other"), own, mode)
                name, size = "", -1
        # Only the read that returns nothing has checked the checksum of the stream.
        while self._reader.piece():
            pass

    def pieces(self) -> Iterator[memoryview]:
        """What is left of the current member's content; each piece is good until the next one is asked for."""
        while self._left:
            if not self._piece:
                self._fill()
            piece = self._piece[: self._left]
            self._piece = self._piece[len(piece) :]
            self._left -= len(piece)
            yield piece

    def content(self) -> bytes:
        """The same, all at once."""
        left, self._left = self._left, 0
        return self._take(left)

    def _damaged(self, why: str) -> PitrError:
        return PitrError(f"{self._path} is damaged: {why}.", path=self._path)

    def _fill(self) -> None:
        self._piece = memoryview(self._reader.piece())
        if not self._piece:
            raise self._damaged("it ends before its tar archive does")

    def _take(self, count: int) -> bytes:
        parts = []
        while count:
            if not self._piece:
                self._fill()
            part = self._piece[:count]
            self._piece = self._piece[len(part) :]
            count -= len(part)
            # A copy: the next piece comes into the same memory.
            parts.append(bytes(part))
        return b"".join(parts)

    def _pass_over(self) -> None:
        left = self._left + self._padding
        self._left = self._padding = 0
        while left:
            if not self._piece:
                self._fill()
            step = min(left, len(self._piece))
            self._piece = self._piece[step:]
            left -= step

    def _begin(self, header: bytes, size: int) -> int:
        """Check a header; from here on its content is read. Returns how long that is."""
        told = self._number(header[148:156])
        # The checksum is of the header with blanks in its place.
        if told != sum(header) - sum(header[148:156]) + 8 * 32:
            raise self._damaged("a tar header has a wrong checksum")
        if size < 0:
            size = self._number(header[124:136])
        if _KINDS.get(header[156:157]) == "directory":
            size = 0
        self._left = size
        self._padding = -size % BLOCK
        return size

    def _number(self, field: bytes) -> int:
        if field[0] & 0x80:
            return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
        try:
            return int(field.rstrip(b" \0").lstrip(b" ") or b"0", 8)
        except ValueError:
            raise self._damaged("a tar header has no numbers where they belong") from None

    @staticmethod
    def _name(header: bytes) -> str:
        name = header[:100].partition(b"\0")[0]
        prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
        return os.fsdecode(prefix + b"/" + name if prefix else name)

    def _extension(self, size: int) -> bytes:
        if size > _LONGEST_EXTENSION:
            raise self._damaged("a tar header is longer than any path")
        return self.content()

    def _pax(self, content: bytes) -> dict[bytes, bytes]:
        records = {}
        try:
            while content:
                length = int(content.partition(b" ")[0])
                key, _equals, value = content[:length].partition(b" ")[2].rstrip(b"\n").partition(b"=")
                records[key] = value
                content = content[length:] if length > 0 else b""
        except ValueError:
            raise self._damaged("a pax header cannot be read") from None
        return records


@contextlib.contextmanager
def open_stream(path: str, tree: Tree = LOCAL) -> Iterator[TarStream]:
    """Walk a stored tar once, whatever it is compressed with. Raises as codec.open_reader does."""
    with codec.open_reader(path, tree) as reader:
        yield TarStream(reader, path)
