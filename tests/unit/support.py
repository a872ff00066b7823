# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What several unit tests make by hand: WAL segments, history files, a repository, a backup's description.

Segment names and headers are written here without the engine's own wal.py, so that a mistake there cannot hide itself.
"""

from __future__ import annotations

import datetime
import os
import random
import struct
import subprocess
from pathlib import Path

from ansible_collections.pgdrill.pitr.plugins.module_utils import install, repository
from ansible_collections.pgdrill.pitr.plugins.module_utils.catalog import Backup, StoredFile
from ansible_collections.pgdrill.pitr.plugins.module_utils.repository import Chapter, ClusterFolder
from ansible_collections.pgdrill.pitr.plugins.module_utils.wal import Lsn

MIB = 1024 * 1024
SYSTEM = 7300000000000000001
CLUSTER = "main"
EPOCH = datetime.datetime(2026, 3, 1, 12, 0, tzinfo=datetime.timezone.utc)


def wal_name(timeline: int, number: int, size: int = MIB) -> str:
    """XLogFileName of xlog_internal.h."""
    per_id = 2**32 // size
    return "%08X%08X%08X" % (timeline, number // per_id, number % per_id)


def header(
    timeline: int = 1,
    address: int = 0,
    system: int = SYSTEM,
    size: int = MIB,
    magic: int = 0xD118,
    info: int = 0x0002,
) -> bytes:
    """XLogLongPageHeaderData: magic, info, timeline, address, rem_len, padding, system identifier, sizes."""
    return struct.pack("=HHIQI4xQII", magic, info, timeline, address, 0, system, size, 8192)


def segment(
    timeline: int,
    number: int,
    seed: int = 0,
    size: int = MIB,
    written_on: int = 0,
    system: int = SYSTEM,
    address: int | None = None,
) -> bytes:
    """A whole segment: a right header, half a segment of noise (the same for the same seed), then zeros.

    ``written_on``: the timeline that the header tells, when it is not the name's.
    """
    first = header(written_on or timeline, number * size if address is None else address, system, size)
    noise = random.Random(seed).randbytes(size // 2)
    return (first + noise).ljust(size, b"\0")


def history(*switches: tuple[int, str]) -> str:
    """Text of a history file with these (timeline, LSN), as writeTimeLineHistory of timeline.c writes it."""
    return "\n\n".join(f"{timeline}\t{lsn}\tno recovery target specified" for timeline, lsn in switches) + "\n"


def make_repository(path: Path, cluster: str = CLUSTER, size: int = MIB) -> ClusterFolder:
    """A new repository with one empty cluster."""
    folder, _created = repository.create(str(path), cluster, Chapter(1, str(SYSTEM), size, 18, EPOCH.isoformat()))
    return folder


def put(directory: Path, name: str, content: bytes | str) -> str:
    """Write a file, as the server would into pg_wal; returns its path."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def tree(path: Path | str) -> dict[str, tuple[int, int, bytes]]:
    """Every file below a directory with inode, time of change and content: equal means untouched."""
    result = {}
    for folder, _folders, names in os.walk(path):
        for name in names:
            file = os.path.join(folder, name)
            status = os.stat(file)
            with open(file, "rb") as stream:
                result[os.path.relpath(file, path)] = (status.st_ino, status.st_mtime_ns, stream.read())
    return result


def make_backup(
    label: str = "b1",
    timeline: int = 1,
    start: int = 2 * MIB + 40,
    stop: int = 2 * MIB + 256,
    minute: float = 0,
    files: tuple[StoredFile, ...] = (),
    size: int = MIB,
) -> Backup:
    """A backup's description. ``minute``: when it stopped, after EPOCH."""
    stopped_at = EPOCH + datetime.timedelta(minutes=minute)
    return Backup(
        label=label,
        type="full",
        system_identifier=str(SYSTEM),
        postgresql_version=18,
        wal_segment_size=size,
        timeline=timeline,
        start_lsn=Lsn(start),
        stop_lsn=Lsn(stop),
        started_at=stopped_at - datetime.timedelta(seconds=30),
        stopped_at=stopped_at,
        database_bytes=1000,
        compression="none",
        verified="checksums",
        files=files,
    )


def interpreters() -> list[str]:
    """Pythons on this host that the installed command may meet: the running one, the system's, the oldest
    supported.

    Version managers keep theirs below a directory of the user; what cannot be executed is left out.
    """
    candidates = [install.interpreter(), "/usr/bin/python3"]
    candidates += sorted(map(str, Path("~").expanduser().glob(".pyenv/versions/3.9.*/bin/python3.9")))[-1:]
    found: dict[str, str] = {}
    for candidate in candidates:
        if os.access(candidate, os.X_OK):
            found.setdefault(os.path.realpath(candidate), candidate)
    return list(found.values())


class Authority:
    """A certificate authority of its own, with openssl. ``certificate`` is what clients trust."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self.certificate, self._key = directory / "ca.crt", directory / "ca.key"
        self._openssl(
            "req", "-x509", "-subj", f"/CN=authority {directory.name}", "-days", "30", "-out", str(self.certificate),
            "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", str(self._key),
        )  # fmt: skip

    def issue(self, directory: Path, name: str, *names: str) -> tuple[Path, Path]:
        """A server's certificate for these names (else the local address), and its key, as ``<name>.crt`` and
        ``<name>.key``."""
        alternatives = ",".join(f"DNS:{item}" for item in names) or "IP:127.0.0.1"
        certificate, key, request = (directory / f"{name}.{ending}" for ending in ("crt", "key", "csr"))
        self._openssl(
            "req", "-new", "-subj", f"/CN={name}", "-addext", f"subjectAltName={alternatives}", "-out", str(request),
            "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", str(key),
        )  # fmt: skip
        self._openssl(
            "x509", "-req", "-in", str(request), "-CA", str(self.certificate), "-CAkey", str(self._key), "-days", "30",
            "-CAcreateserial", "-copy_extensions", "copy", "-out", str(certificate),
        )  # fmt: skip
        key.chmod(0o600)
        return certificate, key

    @staticmethod
    def _openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], check=True, capture_output=True)
