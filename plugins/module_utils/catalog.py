# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a stored base backup is. The document ``backup.json`` is one :class:`Backup`."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .errors import PitrError
from .facts import Facts
from .wal import Lsn

FORMAT = 1
# An older version would take the encrypted files for damaged ones.
FORMAT_ENCRYPTED = 2


@dataclass(frozen=True)
class StoredFile:
    """One file of a backup as it lies in the repository. ``size`` in bytes, ``sha256`` of the stored bytes, in hex."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Tablespace:
    """A tablespace at the time of the backup; ``location`` is the directory on the server it was taken from."""

    oid: int
    location: str


@dataclass(frozen=True)
class Backup:
    """A complete base backup.

    Times are UTC; ``stopped_at`` is not before the moment its last WAL record was written.
    """

    label: str
    type: str
    system_identifier: str
    postgresql_version: int
    wal_segment_size: int
    timeline: int
    start_lsn: Lsn
    stop_lsn: Lsn
    started_at: datetime.datetime
    stopped_at: datetime.datetime
    database_bytes: int
    compression: str
    verified: str
    files: tuple[StoredFile, ...]
    tablespaces: tuple[Tablespace, ...] = ()
    # 64-bit id of the next transaction when the backup had ended: later ones are certainly not in it.
    next_xid: int | None = None
    # Id of the recipients that its files are encrypted to (encryption.recipients_id), empty when they are not.
    encryption: str = ""
    # Label of the backup that an incremental one builds upon; None for a full one.
    parent: str | None = None
    # Of an incremental one: size of the data directory that its chain becomes, and of the files in it that are not
    # whole in an older link. Bytes; 0 for a full one.
    restored_bytes: int = 0
    changed_bytes: int = 0
    # How it was taken: stream, low_level or offline.
    method: str = "stream"
    # Segments that lie in base.tar, for an offline backup: its WAL from start to stop, and nothing behind that.
    own_wal: tuple[str, ...] = ()
    # What the server said of itself, None in documents of before it was asked.
    facts: Facts | None = None

    @property
    def directory_bytes(self) -> int:
        """Size of the data directory that a restore writes."""
        return self.restored_bytes or self.database_bytes

    @property
    def stored_bytes(self) -> int:
        """Size in the repository."""
        return sum(file.size for file in self.files)

    @property
    def seconds(self) -> float:
        """How long it took."""
        return (self.stopped_at - self.started_at).total_seconds()

    def to_dict(self) -> dict[str, Any]:
        """As stored, and as modules return it: LSNs and times as text."""
        result = asdict(self)
        result.update(
            format=FORMAT_ENCRYPTED if self.encryption else FORMAT,
            start_lsn=str(self.start_lsn),
            stop_lsn=str(self.stop_lsn),
            started_at=self.started_at.isoformat(),
            stopped_at=self.stopped_at.isoformat(),
            stored_bytes=self.stored_bytes,
            seconds=round(self.seconds, 3),
            files=[asdict(file) for file in self.files],
            tablespaces=[asdict(tablespace) for tablespace in self.tablespaces],
            own_wal=list(self.own_wal),
            facts=self.facts.to_dict() if self.facts is not None else None,
        )
        return result

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Backup:
        """Read back. Raises PitrError when something is missing; unknown keys of the same format are ignored."""
        try:
            return cls(
                label=value["label"],
                type=value["type"],
                system_identifier=value["system_identifier"],
                postgresql_version=value["postgresql_version"],
                wal_segment_size=value["wal_segment_size"],
                timeline=value["timeline"],
                start_lsn=Lsn.parse(value["start_lsn"]),
                stop_lsn=Lsn.parse(value["stop_lsn"]),
                started_at=datetime.datetime.fromisoformat(value["started_at"]),
                stopped_at=datetime.datetime.fromisoformat(value["stopped_at"]),
                database_bytes=value["database_bytes"],
                compression=value["compression"],
                verified=value["verified"],
                files=tuple(StoredFile(file["name"], file["size"], file["sha256"]) for file in value["files"]),
                tablespaces=tuple(Tablespace(item["oid"], item["location"]) for item in value["tablespaces"]),
                next_xid=value.get("next_xid"),
                encryption=value.get("encryption", ""),
                parent=value.get("parent"),
                restored_bytes=value.get("restored_bytes", 0),
                changed_bytes=value.get("changed_bytes", 0),
                method=value.get("method", "stream"),
                own_wal=tuple(value.get("own_wal", ())),
                facts=Facts.from_dict(value.get("facts")),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise PitrError(f"a backup's description is damaged: {type(error).__name__} {error}") from None


class ChainError(PitrError):
    """A backup's chain is broken. ``at`` is the backup whose parent is not there."""

    def __init__(self, at: Backup, message: str) -> None:
        self.at = at
        super().__init__(message)


def chain(backup: Backup, by_label: Mapping[str, Backup]) -> tuple[Backup, ...]:
    """The backups that a restore of this one combines: the full one first, this one last.

    Raises ChainError when a link is missing ("Incremental Backup" of the PostgreSQL documentation: it is for the user
    to keep track of which backups others need).
    """
    links = [backup]
    while links[-1].type != "full" or links[-1].parent is not None:
        at = links[-1]
        if at.parent is None:
            raise ChainError(at, f"{at.label} is not full, and names no parent")
        if at.parent in {link.label for link in links}:
            raise ChainError(at, f"the parents of {at.label} are a circle")
        parent = by_label.get(at.parent)
        if parent is None:
            raise ChainError(at, f"the parent {at.parent} of {at.label} is missing")
        links.append(parent)
    return tuple(reversed(links))


def broken_chains(backups: Sequence[Backup], damaged: Mapping[str, str]) -> dict[str, str]:
    """Label to reason, for every backup of which a link is missing or, by ``damaged`` (label to reason), damaged."""
    by_label = {backup.label: backup for backup in backups}
    result = {}
    for backup in backups:
        try:
            links = chain(backup, by_label)
        except ChainError as error:
            result[backup.label] = damaged.get(backup.label) or error.message
            continue
        for link in reversed(links):
            if link.label in damaged:
                why = damaged[link.label]
                result[backup.label] = why if link is backup else f"{link.label}, which it builds upon: {why}"
                break
    return result
