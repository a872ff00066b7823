# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""WAL positions, segment names and segment headers.

Nothing else in the collection slices a segment name or shifts an LSN. Sources of the rules:
``src/include/access/xlog_internal.h`` (names, page headers) and ``src/include/access/xlogdefs.h`` (LSN).

This file is on the path of ``pitr-wal``, which PostgreSQL starts once per segment, so it imports next to nothing.
"""

from __future__ import annotations

import re
import struct

from .errors import PitrError

_LSN = re.compile(r"([0-9A-Fa-f]{1,8})/([0-9A-Fa-f]{1,8})\Z")
_SEGMENT = re.compile(r"([0-9A-F]{8})([0-9A-F]{8})([0-9A-F]{8})\Z")
_HISTORY = re.compile(r"([0-9A-F]{8})\.history\Z")
_BACKUP = re.compile(r"([0-9A-F]{24})\.([0-9A-F]{8})\.backup\Z")
_PARTIAL = re.compile(r"([0-9A-F]{24})\.partial\Z")

MIN_SEGMENT_SIZE = 1024 * 1024
MAX_SEGMENT_SIZE = 1024 * 1024 * 1024
DEFAULT_SEGMENT_SIZE = 16 * 1024 * 1024

# XLP_LONG_HEADER of xlog_internal.h: the first page of every segment file carries it.
_LONG_HEADER_FLAG = 0x0002
# magic, info, tli, pageaddr, rem_len, (pad), sysid, seg_size, xlog_blcksz
_LONG_HEADER = struct.Struct("=HHIQI4xQII")

# XLOG_PAGE_MAGIC of each major version's xlog_internal.h.
PAGE_MAGIC = {0xD110: 15, 0xD113: 16, 0xD116: 17, 0xD118: 18}


class Lsn(int):
    """A byte position in the WAL. An integer inside, printed as PostgreSQL prints it: ``0/3000060``."""

    @classmethod
    def parse(cls, text: str) -> Lsn:
        """Read ``X/Y``. Raises PitrError for anything else."""
        match = _LSN.match(text.strip()) if isinstance(text, str) else None
        if match is None:
            raise PitrError(f"'{text}' is not an LSN. Expected two hexadecimal numbers such as 0/3000060.")
        return cls((int(match.group(1), 16) << 32) | int(match.group(2), 16))

    def __str__(self) -> str:
        return f"{int(self) >> 32:X}/{int(self) & 0xFFFFFFFF:X}"

    def __repr__(self) -> str:
        return f"Lsn({self!s})"

    def segment_number(self, segment_size: int) -> int:
        """Number of the segment that holds the byte at this position."""
        return int(self) // segment_size

    def previous_segment_number(self, segment_size: int) -> int:
        """Number of the segment that holds the byte before this position (for end pointers: XLByteToPrevSeg)."""
        return (int(self) - 1) // segment_size


def valid_segment_size(size: int) -> bool:
    """A power of two from 1 MB to 1 GB (IsValidWalSegSize)."""
    return MIN_SEGMENT_SIZE <= size <= MAX_SEGMENT_SIZE and size & (size - 1) == 0


def segment_name(timeline: int, number: int, segment_size: int) -> str:
    """File name of a segment (XLogFileName)."""
    per_id = 0x100000000 // segment_size
    return f"{timeline:08X}{number // per_id:08X}{number % per_id:08X}"


def history_name(timeline: int) -> str:
    """File name of a timeline history file (TLHistoryFileName)."""
    return f"{timeline:08X}.history"


class WalFile:
    """A name that the archiver or a restore can ask for.

    ``kind`` is ``segment``, ``partial``, ``history`` or ``backup``; ``segment`` is the 24 character name that the file
    belongs to (empty for history files).
    """

    __slots__ = ("kind", "name", "segment", "timeline")

    def __init__(self, kind: str, name: str, timeline: int, segment: str) -> None:
        self.kind = kind
        self.name = name
        self.timeline = timeline
        self.segment = segment

    @classmethod
    def parse(cls, name: str) -> WalFile:
        """Recognise a file name. Raises PitrError for names PostgreSQL never hands to an archive command."""
        if _SEGMENT.match(name):
            return cls("segment", name, int(name[:8], 16), name)
        match = _HISTORY.match(name)
        if match:
            return cls("history", name, int(match.group(1), 16), "")
        match = _BACKUP.match(name) or _PARTIAL.match(name)
        if match:
            kind = "partial" if name.endswith(".partial") else "backup"
            return cls(kind, name, int(name[:8], 16), match.group(1))
        raise PitrError(f"'{name}' is not the name of a WAL segment, a backup history file or a timeline history file.")

    @property
    def log(self) -> str:
        """First 16 characters of the segment name: the folder it lies in, 4 GB of WAL."""
        return self.segment[:16]

    def number(self, segment_size: int) -> int:
        """Number of the segment, counted from the beginning of the WAL (XLogFromFileName)."""
        per_id = 0x100000000 // segment_size
        low = int(self.segment[16:], 16)
        if low >= per_id:
            raise PitrError(f"'{self.name}' cannot be a segment of a cluster with {segment_size} byte segments.")
        return int(self.segment[8:16], 16) * per_id + low


class FolderNames:
    """Recognises the names in the 4 GB folders of an archive, for a million of them without parsing each one."""

    def __init__(self, segment_size: int) -> None:
        self._per_id = 0x100000000 // segment_size
        self._low = {f"{low:08X}": low for low in range(self._per_id)}

    def sort(self, log: str, names: list[str]) -> tuple[int, list[int], list[str]]:
        """Timeline, segment numbers (in the order of the names), and the names that are no segment of this folder.

        ``log`` is the folder's name, which the caller has recognised with :func:`is_log`.
        """
        low = self._low
        base = int(log[8:], 16) * self._per_id
        numbers = [base + low[name[16:]] for name in names if name[16:] in low and name[:16] == log]
        others = []
        if len(numbers) != len(names):
            others = [name for name in names if name[16:] not in low or name[:16] != log]
        return int(log[:8], 16), numbers, others


def is_log(name: str) -> bool:
    """Whether this is the name of a 4 GB folder: the first 16 characters of a segment's name."""
    return len(name) == 16 and _SEGMENT.match(name + "00000000") is not None


class SegmentHeader:
    """What the first page of a segment says of itself (XLogLongPageHeaderData)."""

    __slots__ = ("block_size", "magic", "page_address", "segment_size", "system_identifier", "timeline")

    SIZE = _LONG_HEADER.size

    def __init__(self, data: bytes) -> None:
        """Decode. Raises PitrError when these bytes do not begin a WAL segment of a supported PostgreSQL version."""
        if len(data) < _LONG_HEADER.size:
            raise PitrError(f"only {len(data)} bytes, too short for a WAL segment")
        magic, info, timeline, address, _rem, system_identifier, segment_size, block_size = _LONG_HEADER.unpack_from(
            data
        )
        if not info & _LONG_HEADER_FLAG or not valid_segment_size(segment_size) or magic >> 8 != 0xD1:
            raise PitrError("its first page is not the beginning of a WAL segment")
        self.magic = magic
        self.timeline = timeline
        self.page_address = Lsn(address)
        self.system_identifier = str(system_identifier)
        self.segment_size = segment_size
        self.block_size = block_size
