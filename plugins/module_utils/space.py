# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""How much room a restore needs, and how much there is, on every filesystem that it writes to."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .catalog import Backup

MIB = 1 << 20
# Include file, signal file, what postgresql.auto.conf becomes.
CONFIGURATION_BYTES = 64 * 1024
# Segments that a server keeps ready in pg_wal however little it replays.
SEGMENTS_READY = 4
# The default of max_wal_size, for backups that do not tell theirs.
DEFAULT_MAX_WAL_SIZE = 1 << 30


@dataclass(frozen=True)
class Need:
    """``needed`` bytes below ``path`` for ``what``; ``wanted`` more may be used while the server recovers."""

    path: str
    what: str
    needed: int
    wanted: int = 0


@dataclass(frozen=True)
class Filesystem:
    """One filesystem and all that is needed on it, in bytes. ``path`` is an existing directory on it."""

    path: str
    needs: tuple[Need, ...]
    free: int

    @property
    def needed(self) -> int:
        """Without this much the restore is refused."""
        return sum(need.needed for need in self.needs)

    @property
    def wanted(self) -> int:
        """With less, the recovery may run out of room."""
        return self.needed + sum(need.wanted for need in self.needs)

    def to_dict(self) -> dict[str, Any]:
        """For a module's result."""
        return {
            "filesystem": self.path,
            "for": [{"what": need.what, "path": need.path, "bytes": need.needed} for need in self.needs],
            "needed_bytes": self.needed,
            "recovery_bytes": self.wanted - self.needed,
            "free_bytes": self.free,
        }


def tablespace_bytes(backup: Backup) -> tuple[dict[int, int], bool]:
    """Bytes of each tablespace, and whether they are known exactly.

    Where the backup does not tell them, its bytes are divided as those of its stored files are.
    """
    if not backup.tablespaces:
        return {}, True
    known = backup.facts.tablespace_bytes if backup.facts is not None else {}
    if known:
        return {item.oid: known.get(item.oid, 0) for item in backup.tablespaces}, True
    stored = {item.oid: 0 for item in backup.tablespaces}
    for file in backup.files:
        oid = file.name.partition(".")[0]
        if oid.isdigit() and int(oid) in stored:
            stored[int(oid)] += file.size
    total = backup.stored_bytes or 1
    return {oid: backup.database_bytes * size // total for oid, size in stored.items()}, False


def needs(
    backup: Backup,
    pgdata: str,
    locations: Mapping[int, str],
    config_dir: str,
    wal_bytes: int,
    tail_bytes: int,
    pg_wal: str = "",
    factor: float = 1.0,
) -> list[Need]:
    """What a restore of this backup writes, and where.

    ``wal_bytes`` of WAL are replayed; ``tail_bytes`` of it are copied into ``pg_wal`` before. ``factor``: how much of
    the backup's size is written for it in all, more than 1 for a chain.
    """
    sizes, exact = tablespace_bytes(backup)
    about = "" if exact and factor == 1 else " (estimated)"
    pg_wal = pg_wal or os.path.join(pgdata, "pg_wal")
    sizes = {oid: int(size * factor) for oid, size in sizes.items()}
    ready = SEGMENTS_READY * backup.wal_segment_size
    limit = (backup.facts.max_wal_size if backup.facts is not None else None) or DEFAULT_MAX_WAL_SIZE
    # Replayed segments stay until the next restartpoint ("WAL Configuration").
    found = [
        Need(pgdata, f"data directory{about}", max(int(backup.database_bytes * factor) - sum(sizes.values()), 0)),
        Need(pg_wal, "pg_wal", ready + tail_bytes, max(min(wal_bytes, limit) - ready, 0)),
    ]
    for item in backup.tablespaces:
        found.append(Need(locations[item.oid], f"tablespace {item.oid}{about}", sizes[item.oid]))
    if config_dir:
        found.append(Need(config_dir, "configuration", CONFIGURATION_BYTES))
    return found


def existing(path: str) -> str:
    """The directory itself, or the nearest one above it that is there."""
    # What is not absolute is refused elsewhere (places.py).
    path = os.path.abspath(path)
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    return path


def filesystems(found: Iterable[Need], pgdata: str) -> list[Filesystem]:
    """The needs by filesystem, so that two things on one are added up.

    The data directory will be a new one beside the old, on the filesystem of its parent. Raises OSError.
    """
    by_device: dict[int, list[Need]] = {}
    places: dict[int, str] = {}
    for need in found:
        inside = need.path == pgdata or need.path.startswith(f"{pgdata}/")
        place = existing(os.path.dirname(pgdata) if inside and not os.path.ismount(pgdata) else need.path)
        device = os.stat(place).st_dev
        by_device.setdefault(device, []).append(need)
        places.setdefault(device, place)
    result = []
    for device, here in by_device.items():
        status = os.statvfs(places[device])
        result.append(Filesystem(places[device], tuple(here), status.f_bavail * status.f_frsize))
    return result


def below(path: str) -> int:
    """Bytes that removing this directory would free."""
    total = 0
    for folder, _folders, names in os.walk(path):
        for name in names:
            with contextlib.suppress(OSError):
                status = os.lstat(os.path.join(folder, name))
                total += status.st_blocks * 512 if status.st_nlink == 1 else 0
    return total
