# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A backup manifest as the server writes it, for backups that are copied here.

Source: chapter "Backup Manifest Format" and backup_manifest.c. Checksums are SHA-256: CRC-32C, the server's default, is
not in Python's library.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from types import TracebackType
from typing import BinaryIO

from .wal import Lsn

ALGORITHM = "SHA256"


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
