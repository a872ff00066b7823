# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Backup manifests: summed up, read, and written as the server does it, for backups that are copied here.

Source: chapter "Backup Manifest Format" and backup_manifest.c. Checksums that are written here are SHA-256: CRC-32C,
the server's default, is not in Python's library.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, BinaryIO

from . import codec
from .errors import PitrError
from .wal import Lsn

ALGORITHM = "SHA256"
_RANGE = re.compile(rb'\{ "Timeline": (\d+), "Start-LSN": "([0-9A-F/]+)", "End-LSN": "([0-9A-F/]+)" \}')
_SIZE = re.compile(rb'^\{ "(?:Encoded-)?Path": (?:"pg_tblspc/(\d+)/)?.*?, "Size": (\d+),')


@dataclass(frozen=True)
class Summary:
    """What a manifest says of the whole. ``timelines`` of the WAL that the backup needs, in order; ``bytes`` of files.

    ``tablespace_bytes``: those of them in each tablespace, by oid.
    """

    timelines: tuple[int, ...]
    start_lsn: Lsn
    stop_lsn: Lsn
    files: int
    bytes: int
    tablespace_bytes: Mapping[int, int]


def read_summary(path: str) -> Summary:
    """Sum a plain manifest up, line by line. Raises PitrError when it tells no WAL range."""
    files = total = 0
    spaces: dict[int, int] = {}
    ranges: list[tuple[int, Lsn, Lsn]] = []
    with open(path, "rb") as stream:
        for line in stream:
            match = _SIZE.match(line)
            if match:
                files += 1
                total += int(match.group(2))
                if match.group(1):
                    oid = int(match.group(1))
                    spaces[oid] = spaces.get(oid, 0) + int(match.group(2))
                continue
            ranges += [(int(tli), Lsn.parse(a.decode()), Lsn.parse(b.decode())) for tli, a, b in _RANGE.findall(line)]
    if not ranges:
        raise PitrError(f"{path} is damaged: it tells no WAL range.")
    timelines = tuple(sorted({timeline for timeline, _start, _stop in ranges}))
    start, stop = min(each[1] for each in ranges), max(each[2] for each in ranges)
    return Summary(timelines, start, stop, files, total, spaces)


def entry_name(entry: dict[str, Any]) -> str:
    """Path of one file, relative to the data directory."""
    if "Encoded-Path" in entry:
        return bytes.fromhex(entry["Encoded-Path"]).decode("utf-8", "surrogateescape")
    return str(entry["Path"])


def read_manifest(reader: codec.Reader) -> dict[str, str]:
    """Name to entry (a line of JSON) of a backup manifest. Raises PitrError when it is damaged.

    The manifest ends with a checksum of all that is before its last line (sendManifest of backup_manifest.c), and has
    one line for each file.
    """
    expected: dict[str, str] = {}
    digest = hashlib.sha256()
    rest = b""
    told = None
    while True:
        data = reader.read(codec.CHUNK)
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b'"Manifest-Checksum"'):
                told = line.partition(b": ")[2].strip(b'"} ').decode(errors="replace")
                continue
            if told is not None:
                raise PitrError("there is something after the manifest's checksum")
            digest.update(line + b"\n")
            if line.startswith((b'{ "Path"', b'{ "Encoded-Path"')):
                try:
                    text = line.rstrip(b",").decode()
                    expected[entry_name(json.loads(text))] = text
                except (ValueError, KeyError) as error:
                    raise PitrError(f"it has a line that cannot be read: {error}") from None
        if not data:
            break
    if told is None:
        raise PitrError("it ends before its checksum")
    if digest.hexdigest() != told:
        raise PitrError("its own checksum is wrong")
    return expected


def version_for(major: int) -> int:
    """Version of the manifest that this major version of PostgreSQL writes; 2 names the cluster."""
    return 2 if major >= 17 else 1


def entry(path: bytes, size: int, mtime: float, digest: str) -> str:
    """One file. ``path`` relative to the data directory; not UTF-8, it is written in hex (AddFileToBackupManifest)."""
    try:
        named = f'"Path": {json.dumps(path.decode("utf-8"), ensure_ascii=False)}'
    except UnicodeDecodeError:
        named = f'"Encoded-Path": "{path.hex()}"'
    when = time.strftime("%Y-%m-%d %H:%M:%S GMT", time.gmtime(mtime))
    checksum = f'"Checksum-Algorithm": "{ALGORITHM}", "Checksum": "{digest}"'
    return f'{{ {named}, "Size": {size}, "Last-Modified": "{when}", {checksum} }}'


class Manifest:
    """Writes one, file by file. Without ``finish`` it is not one."""

    def __init__(self, path: str, major: int, system_identifier: str) -> None:
        """``path`` must not exist yet."""
        self._digest = hashlib.sha256()
        self._stream: BinaryIO = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")
        self._first = True
        version = version_for(major)
        self._put(f'{{ "PostgreSQL-Backup-Manifest-Version": {version},\n')
        if version > 1:
            self._put(f'"System-Identifier": {system_identifier},\n')
        self._put('"Files": [')

    def __enter__(self) -> Manifest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()

    def _put(self, text: str) -> None:
        data = text.encode("utf-8")
        self._digest.update(data)
        self._stream.write(data)

    def add(self, path: bytes, size: int, mtime: float, digest: str) -> None:
        """A file of the backup; ``digest`` is the SHA-256 of its content in hex."""
        self._put("\n" if self._first else ",\n")
        self._first = False
        self._put(entry(path, size, mtime, digest))

    def finish(self, timeline: int, start: Lsn, stop: Lsn) -> None:
        """The WAL that the backup needs, on one timeline, and the manifest's own checksum."""
        self._put('\n],\n"WAL-Ranges": [\n')
        self._put(f'{{ "Timeline": {timeline}, "Start-LSN": "{start}", "End-LSN": "{stop}" }}')
        self._put("\n],\n")
        # The checksum is that of everything before this line.
        self._stream.write(f'"Manifest-Checksum": "{self._digest.hexdigest()}"}}\n'.encode("ascii"))
        self._stream.flush()
        os.fsync(self._stream.fileno())
