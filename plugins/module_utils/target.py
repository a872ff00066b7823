# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Recovery targets: what was asked, checked and in PostgreSQL's own words.

Source of the rules: section "Recovery Target" of the chapter "Server Configuration".
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping
from dataclasses import dataclass

from .errors import PitrError
from .wal import Lsn

KINDS = ("latest", "immediate", "time", "xid", "lsn", "name")
ACTIONS = ("promote", "pause", "shutdown")
# MAXFNAMELEN - 1 of xlog_internal.h: longer names are refused by the server.
MAX_NAME_BYTES = 63

_TIME = re.compile(
    r"(\d{4}-\d{2}-\d{2})[ T](\d{2}:\d{2}(?::\d{2}(?:\.\d{1,6})?)?)\s*(Z|UTC|[+-]\d{2}(?::?\d{2})?)?\Z", re.IGNORECASE
)


def parse_time(text: str) -> datetime.datetime:
    """Read an ISO 8601 time with an offset, to the microsecond, and return it in UTC.

    Raises PitrError without an offset: guessing the zone of a recovery target restores the wrong hour.
    """
    match = _TIME.match(text.strip())
    if match is None:
        raise PitrError(f"'{text}' is not a time. Write it like 2026-03-01 14:29:59.123456+01:00.")
    date, clock, offset = match.groups()
    if offset is None:
        raise PitrError(
            f"The time '{text}' has no offset from UTC, and a guessed time zone restores the wrong moment."
            f" Write {date} {clock}+00:00 for UTC, or with your own offset."
        )
    if offset.upper() in ("Z", "UTC"):
        offset = "+00:00"
    elif len(offset) == 3:
        offset += ":00"
    elif len(offset) == 5:
        offset = offset[:3] + ":" + offset[3:]
    if "." in clock:
        whole, fraction = clock.split(".")
        clock = f"{whole}.{fraction:0<6}"
    try:
        return datetime.datetime.fromisoformat(f"{date}T{clock}{offset}").astimezone(datetime.timezone.utc)
    except (ValueError, OverflowError) as error:
        raise PitrError(f"'{text}' is not a time: {error}.") from None


def format_time(value: datetime.datetime) -> str:
    """ISO 8601 in UTC with microseconds; PostgreSQL reads it whatever its own time zone is."""
    return value.astimezone(datetime.timezone.utc).isoformat(" ", "microseconds")


@dataclass(frozen=True)
class RecoveryTarget:
    """One recovery target.

    ``time`` is in UTC, ``xid`` may be the 64-bit form, ``timeline`` is latest, current or a number.
    """

    kind: str = "latest"
    time: datetime.datetime | None = None
    xid: int | None = None
    lsn: Lsn | None = None
    name: str | None = None
    inclusive: bool = True
    timeline: str = "latest"
    action: str = "promote"

    def stops_before(self, ended: datetime.datetime | None) -> bool:
        """Whether a recovery to a time ends before a transaction that ended then (recoveryStopsBefore).

        PostgreSQL stops before the first one that ended later, or, exclusive, not earlier; without one it does not
        promote. False for every other target, and for a time that is not known.
        """
        if self.time is None or ended is None:
            return False
        return ended > self.time or (ended == self.time and not self.inclusive)

    @classmethod
    def from_options(cls, options: Mapping[str, object]) -> RecoveryTarget:
        """Build from options with PostgreSQL's names (``recovery_target_time`` and so on).

        Raises PitrError for more than one target, a malformed value, or a time without an offset.
        """
        given = {
            kind: options.get(option)
            for kind, option in (
                ("immediate", "recovery_target"),
                ("time", "recovery_target_time"),
                ("xid", "recovery_target_xid"),
                ("lsn", "recovery_target_lsn"),
                ("name", "recovery_target_name"),
            )
            if options.get(option) not in (None, "")
        }
        if len(given) > 1:
            named = ", ".join(f"{kind} ({value})" for kind, value in given.items())
            raise PitrError(
                f"More than one recovery target was given: {named}. PostgreSQL takes one; keep the one you mean."
            )
        inclusive = options.get("recovery_target_inclusive")
        action = str(options.get("recovery_target_action") or "promote")
        if action not in ACTIONS:
            raise PitrError(f"recovery_target_action '{action}' is not one of {', '.join(ACTIONS)}.")
        common = {
            "inclusive": True if inclusive is None else bool(inclusive),
            "timeline": parse_timeline(options.get("recovery_target_timeline")),
            "action": action,
        }
        if not given:
            return cls(**common)  # type: ignore[arg-type]
        kind, value = next(iter(given.items()))
        text = str(value)
        if kind == "immediate":
            if text != "immediate":
                raise PitrError(f"recovery_target '{text}': PostgreSQL knows only 'immediate'.")
            return cls(kind=kind, **common)  # type: ignore[arg-type]
        if kind == "time":
            return cls(kind=kind, time=parse_time(text), **common)  # type: ignore[arg-type]
        if kind == "xid":
            return cls(kind=kind, xid=parse_xid(text), **common)  # type: ignore[arg-type]
        if kind == "lsn":
            return cls(kind=kind, lsn=Lsn.parse(text), **common)  # type: ignore[arg-type]
        if "\n" in text or "\0" in text:
            # It would be the reason in the new timeline's history file, and break its line (writeTimeLineHistory).
            raise PitrError(
                f"The restore point name {text!r} has a line break. A server that stops at it writes a history file"
                " that no server can read. Restore to the restore point's LSN instead."
            )
        if len(text.encode("utf-8", "surrogateescape")) > MAX_NAME_BYTES:
            raise PitrError(
                f"The restore point name '{text}' is longer than {MAX_NAME_BYTES} bytes; no server has made it."
            )
        return cls(kind=kind, name=text, **common)  # type: ignore[arg-type]

    @property
    def value(self) -> str:
        """The time, xid, LSN or name as text; empty for latest and immediate."""
        if self.time is not None:
            return format_time(self.time)
        return next((str(item) for item in (self.xid, self.lsn, self.name) if item is not None), "")

    def __str__(self) -> str:
        if not self.value:
            return self.kind
        return f"{self.kind} {self.value}" + ("" if self.inclusive or self.kind == "name" else " (exclusive)")

    def settings(self, timeline: int) -> dict[str, str]:
        """The ``recovery_target*`` settings of this target, with ``timeline`` as its number.

        The planned number is written rather than ``latest``, so that a timeline which appears between the plan and the
        recovery cannot change what was decided. Other targets are left out, not set empty: the server takes an empty
        second target for a conflict (assign_recovery_target_* of xlogrecovery.c).
        """
        result = {
            "recovery_target_inclusive": "on" if self.inclusive else "off",
            "recovery_target_timeline": str(timeline),
            "recovery_target_action": self.action,
        }
        if self.kind == "immediate":
            result["recovery_target"] = "immediate"
        elif self.time is not None:
            result["recovery_target_time"] = format_time(self.time)
        elif self.xid is not None:
            # Compared with 32-bit transaction ids; the epoch is dropped as the server does.
            result["recovery_target_xid"] = str(self.xid & 0xFFFFFFFF)
        elif self.lsn is not None:
            result["recovery_target_lsn"] = str(self.lsn)
        elif self.name is not None:
            result["recovery_target_name"] = self.name
        return result


def parse_timeline(value: object) -> str:
    """``latest``, ``current`` or the decimal number of a timeline.

    Hexadecimal needs the prefix 0x, as in PostgreSQL.
    """
    text = "latest" if value in (None, "") else str(value).strip()
    if text in ("latest", "current"):
        return text
    number = 0
    if re.fullmatch(r"[0-9]+|0[xX][0-9A-Fa-f]+", text):
        number = int(text, 16 if text[:2] in ("0x", "0X") else 10)
    if not 1 <= number <= 0xFFFFFFFF:
        raise PitrError(f"recovery_target_timeline '{text}' is not latest, current or the number of a timeline.")
    return str(number)


def parse_xid(text: str) -> int:
    """A transaction id, 32 or 64 bits. Ids below 3 are reserved (FirstNormalTransactionId of transam.h)."""
    if not re.fullmatch(r"[0-9]{1,20}", text.strip()) or not 3 <= int(text) < 2**64:
        raise PitrError(f"'{text}' is not a transaction id. Expected a decimal number from 3 up, such as 745.")
    return int(text)
