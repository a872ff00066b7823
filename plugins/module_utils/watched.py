# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What monitoring knows of a cluster at one moment, and the limits that it is held against. Pure.

Ages and spans are in seconds, sizes in bytes. None is "not known", and never "nothing".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Optional

from .errors import PitrError
from .retention import parse_window
from .wal import Lsn

DAY = 86400.0


@dataclass(frozen=True)
class Slot:
    """A replication slot. ``retained``: WAL that it keeps."""

    name: str
    kind: str
    active: bool
    wal_status: str
    retained: Optional[int]


@dataclass(frozen=True)
class Sender:
    """A connection that streams WAL. ``lag``: written by the server and not flushed by the other side."""

    application_name: str
    state: str
    sync_state: str
    lag: Optional[int]


@dataclass(frozen=True)
class Server:
    """What the primary said of itself. Ages are by its own clock."""

    system_identifier: str
    in_recovery: bool
    accepted: bool
    timeline: Optional[int]
    lsn: Lsn
    archive_mode: str
    has_command: bool
    archive_timeout: int
    max_slot_keep: int
    archived_count: int
    failed_count: int
    last_archived_age: Optional[float]
    last_failed_age: Optional[float]
    last_failed_wal: str
    slots: tuple[Slot, ...] = ()
    senders: tuple[Sender, ...] = ()
    ready: Optional[int] = None
    oldest_ready: str = ""
    oldest_ready_age: Optional[float] = None
    wal_bytes: Optional[int] = None
    # What the role may not look at.
    refused: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stored:
    """A backup in the repository. ``age`` counts from its end; ``problem`` is why it could not be restored now."""

    label: str
    type: str
    age: float
    problem: str = ""
    to_lsn: str = ""
    stored_bytes: int = 0
    # Missing WAL behind its end; it can be restored up to there.
    hole: str = ""


@dataclass(frozen=True)
class Hole:
    """Missing segments of a timeline. ``age``: since when the segment behind them is there."""

    timeline: int
    first: str
    last: str
    segments: int
    age: float
    # Whether it lies on the way of a backup that is there, and of the newest one that can be restored.
    needed: bool = True
    current: bool = True


@dataclass(frozen=True)
class Receiver:
    """What the receiver of the repository host last said."""

    application_name: str
    running: bool
    state: str
    last_error: str
    received_lsn: Optional[Lsn]
    # Finished segments that it could not put into the archive.
    not_archived: int = 0


@dataclass(frozen=True)
class Archive:
    """The WAL of the newest chapter. ``end`` is where it ends on the primary's timeline, None when it does not."""

    system_identifier: str
    segments: int
    timelines: tuple[int, ...]
    histories: tuple[int, ...]
    last_segment: str
    last_segment_age: Optional[float]
    end: Optional[Lsn]
    holes: tuple[Hole, ...] = ()


@dataclass(frozen=True)
class Room:
    """The repository's filesystem, and what this cluster stores there. ``growth``: bytes a day over ``growth_span``."""

    free: int
    size: int
    stored: int
    growth: Optional[float] = None
    growth_span: float = 0

    @property
    def days_left(self) -> Optional[float]:
        """Until it is full when it goes on like this: an estimate. None when it does not grow, or not known."""
        return self.free / self.growth if self.growth is not None and self.growth > 0 else None

    @property
    def free_percent(self) -> float:
        """Part of the filesystem that is free."""
        return 100.0 * self.free / self.size if self.size else 0.0


@dataclass(frozen=True)
class Storage:
    """What the repository told."""

    archive: Archive
    backups: tuple[Stored, ...]
    room: Room
    receiver: Optional[Receiver] = None
    # Age of the newest verification that found everything whole, and its level.
    verify_age: Optional[float] = None
    verify_level: str = ""
    # Labels of backups that are there, and were last found damaged.
    damaged: tuple[str, ...] = ()
    drill_age: Optional[float] = None
    drill_failed: bool = False
    # The last one was held by the clock, on the repository host.
    drill_by_clock: bool = False

    @property
    def restorable(self) -> tuple[Stored, ...]:
        """Backups that can be restored, oldest first."""
        return tuple(backup for backup in self.backups if not backup.problem)


@dataclass(frozen=True)
class Facts:
    """Everything about one cluster. Of ``server`` and ``storage`` one is None where its problem is told instead."""

    cluster: str
    at: float
    server: Optional[Server] = None
    server_problem: str = ""
    server_name: str = ""
    storage: Optional[Storage] = None
    storage_problem: str = ""
    # Failures of archive_command since an earlier look, and how long ago that was; None without one.
    new_failures: Optional[int] = None
    failures_span: float = 0
    # For how long WAL has been waiting for the archive, at least.
    archive_lag_age: float = 0
    seconds: float = 0
    notes: tuple[str, ...] = ()

    @property
    def archive_lag(self) -> Optional[int]:
        """WAL that the primary has written and the archive does not have."""
        if self.server is None or self.storage is None or self.storage.archive.end is None:
            return None
        return max(0, self.server.lsn - self.storage.archive.end)

    @property
    def receiver_lag(self) -> Optional[int]:
        """WAL that the primary has written and the receiver has not flushed, by what the primary knows."""
        receiver = self.storage.receiver if self.storage is not None else None
        if self.server is None or receiver is None:
            return None
        told = [sender.lag for sender in self.server.senders if sender.application_name == receiver.application_name]
        return told[0] if told else None


@dataclass(frozen=True)
class Limit:
    """From ``warning`` on it is a WARNING, from ``critical`` on CRITICAL; 0 is never."""

    warning: float
    critical: float


@dataclass(frozen=True)
class Limits:
    """All limits, by the names that ``monitoring_limits`` has. docs/monitoring.md tells what each is for."""

    full_age: Limit = Limit(8 * DAY, 15 * DAY)
    backup_age: Limit = Limit(26 * 3600.0, 50 * 3600.0)
    verify_age: Limit = Limit(8 * DAY, 15 * DAY)
    drill_age: Limit = Limit(0, 0)
    archive_lag: Limit = Limit(300.0, 1800.0)
    archive_lag_bytes: Limit = Limit(1 << 30, 10 << 30)
    receiver_lag_bytes: Limit = Limit(256 << 20, 2 << 30)
    slot_bytes: Limit = Limit(2 << 30, 8 << 30)
    idle_slot_bytes: Limit = Limit(128 << 20, 4 << 30)
    free_percent: Limit = Limit(20, 10)
    days_left: Limit = Limit(14, 3)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Limits:
        """Pairs [warning, critical] by name over the defaults. Raises PitrError for what is not understood."""
        known = [item.name for item in fields(cls)]
        values: dict[str, Limit] = {}
        for name, pair in options.items():
            if name not in known:
                raise PitrError(f"There is no limit '{name}'. Limits: {', '.join(known)}. Nothing was changed.")
            if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                raise PitrError(f"The limit {name} is not a list of two, [warning, critical]. Nothing was changed.")
            limit = Limit(*(_number(name, value) for value in pair))
            if limit.warning and limit.critical:
                falling = name in FALLING
                if (limit.critical > limit.warning) if falling else (limit.critical < limit.warning):
                    raise PitrError(f"The limit {name} would be critical before it warns. Nothing was changed.")
            values[name] = limit
        return cls(**values)


# Worse the lower they are; plain numbers. Others are sizes in bytes by their name, or else spans of time.
FALLING = ("free_percent", "days_left")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(B|kB|MB|GB|TB)\Z")
_FACTOR = {"B": 1, "kB": 1 << 10, "MB": 1 << 20, "GB": 1 << 30, "TB": 1 << 40}


def _number(name: str, value: Any) -> float:
    text = str(value).strip()
    if text in ("", "0"):
        return 0.0
    if name.endswith("_bytes"):
        match = _SIZE.match(text)
        if match is None:
            raise PitrError(f"The limit {name}, '{text}', is not a size such as 512MB or 2GB. Nothing was changed.")
        return float(match.group(1)) * _FACTOR[match.group(2)]
    if name not in FALLING:
        return parse_window(text, f"The limit {name}", "Nothing was changed.").total_seconds()
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < 1e9:
        raise PitrError(f"The limit {name}, '{text}', is not a number. Nothing was changed.")
    return number
