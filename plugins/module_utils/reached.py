# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Where a recovery has stopped, in PostgreSQL's words, and whether that is what was planned. Pure.

The words are those of getRecoveryStopReason of xlogrecovery.c, which the server writes into the history file of a new
timeline; its log says the same in others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .target import parse_time
from .wal import Lsn

# Bytes of a page of WAL (XLOG_BLCKSZ).
PAGE = 8192
_XID = re.compile(r"(before|after) transaction (\d+)\Z")
_TIME = re.compile(r"(before|after) (\d{4}-\d\d-\d\d .+)\Z")
_LSN = re.compile(r"(before|after) LSN ([0-9A-F]+/[0-9A-F]+)\Z")
_NAME = re.compile(r'at restore point "(.*)"\Z')
# The same in the server's log (recoveryStopsBefore and recoveryStopsAfter of xlogrecovery.c), which tells more.
_STARTED = "starting PostgreSQL "
_STOPPING = re.compile(r"recovery stopping (.*)")
_LOG_TRANSACTION = re.compile(r"(before|after) (?:commit|abort) of transaction (\d+), time (.+)\Z")
_LOG_LSN = re.compile(r'(before|after) WAL location \(LSN\) "([0-9A-F]+/[0-9A-F]+)"\Z')
_LOG_NAME = re.compile(r'(at restore point ".*"), time .+\Z')


@dataclass(frozen=True)
class Reached:
    """Where a recovery stopped. ``lsn`` is the end of the last replayed record; ``reason`` is PostgreSQL's wording."""

    lsn: str
    reason: str
    xid: str = ""
    time: str = ""
    name: str = ""
    last_transaction_time: str = ""

    def to_dict(self) -> dict[str, str]:
        """For a module's result."""
        return dict(self.__dict__)


def parse_reason(lsn: str, reason: str, last_transaction_time: str = "") -> Reached:
    """Take the reason of a history file's line apart."""
    fields: dict[str, str] = {}
    for pattern, key in ((_XID, "xid"), (_LSN, "stop"), (_TIME, "time")):
        match = pattern.match(reason)
        if match:
            fields[key] = match.group(2)
            break
    match = _NAME.match(reason)
    if match:
        fields["name"] = match.group(1)
    fields.pop("stop", None)
    return Reached(lsn=lsn, reason=reason, last_transaction_time=last_transaction_time, **fields)


def contradiction(planned: Mapping[str, Any], reached: Reached) -> str:
    """Why ``reached`` is not what was planned, or the empty text. Never assume that a target was met; compare."""
    kind, value = str(planned.get("target_kind", "latest")), str(planned.get("target_value", ""))
    inclusive = bool(planned.get("target_inclusive", True))
    reason = reached.reason
    if kind == "xid":
        fits = reached.xid == str(int(value) & 0xFFFFFFFF) and reason.startswith("after" if inclusive else "before")
    elif kind == "name":
        fits = reached.name == value
    elif kind == "lsn":
        match = _LSN.match(reason)
        fits = match is not None and Lsn.parse(match.group(2)) >= Lsn.parse(value)
    elif kind == "time":
        # Stopped before the first transaction that ended later than the target (or at it, when exclusive).
        stopped = parse_time(reached.time) if reached.time else None
        asked = parse_time(value)
        fits = stopped is not None and (stopped > asked or (stopped == asked and not inclusive))
    elif kind == "immediate":
        fits = reason == "reached consistency"
    else:
        fits = reason == "no recovery target specified"
        begin = Lsn.parse(str(planned["at_least"])) if planned.get("at_least") else _last_segment(planned)
        if fits and begin is not None and Lsn.parse(reached.lsn) <= begin:
            # PostgreSQL takes a damaged record for the end of WAL, and promotes.
            return f"the archive reaches beyond {begin}, but WAL could be read only up to {reached.lsn}"
    return "" if fits else f"asked for {kind} {value}".rstrip() + f", but PostgreSQL stopped: {reason}"


def _last_segment(planned: Mapping[str, Any]) -> Lsn | None:
    """Where the last planned segment begins; a recovery to the end of the archive ends behind that."""
    if not planned.get("segments") or "end_lsn" not in planned:
        return None
    return Lsn(Lsn.parse(planned["end_lsn"]) - int(planned["wal_bytes"]) // int(planned["segments"]))


def logged_reason(lines: list[str], kind: str) -> str:
    """Why the last recovery in these lines of a server's log stopped, in the words of a history file.

    ``kind`` is the target's. Empty when the last start of the server has not come to a target.
    """
    reason = ""
    for line in lines:
        match = _STOPPING.search(line)
        if match:
            reason = match.group(1).strip()
        elif _STARTED in line:
            reason = ""
    match = _LOG_TRANSACTION.match(reason)
    if match:
        side, xid, when = match.groups()
        return f"{side} {when}" if kind == "time" else f"{side} transaction {xid}"
    match = _LOG_LSN.match(reason)
    if match:
        return f"{match.group(1)} LSN {match.group(2)}"
    match = _LOG_NAME.match(reason)
    if match:
        return match.group(1)
    return "reached consistency" if reason == "after reaching consistency" else reason


def proven_by_position(planned: Mapping[str, Any], lsn: str) -> str:
    """What ``lsn``, the end of the last replayed record, proves of the plan's target; empty when it proves nothing.

    A recovery never goes beyond its target. So it is there once the target's record is replayed, or, where that one is
    not to be, once everything before it is. ``target_lsn`` is where that record begins, when the plan has found it.
    """
    kind, inclusive = str(planned.get("target_kind", "latest")), bool(planned.get("target_inclusive", True))
    position = Lsn.parse(lsn)
    found = Lsn.parse(str(planned["target_lsn"])) if planned.get("target_lsn") else None
    told = f"(told by the position of the target {planned.get('target')})"
    if kind == "immediate":
        # Nobody can look before that, and it stops there.
        proven = "consistent_lsn" in planned and position >= Lsn.parse(str(planned["consistent_lsn"]))
        return "reached consistency" if proven else ""
    if kind == "lsn" and not inclusive:
        return f"before LSN {lsn} {told}" if position >= Lsn.parse(str(planned["target_value"])) else ""
    if found is None or kind == "lsn":
        return ""
    if kind == "name" or (kind == "xid" and inclusive):
        return f"after the record at LSN {found} {told}" if position > found else ""
    # A page begins with a header of 24 bytes, a segment with one of 40, which no record is part of.
    headers = (0, 24, 40) if position % PAGE == 0 else (0,)
    return f"before the record at LSN {found} {told}" if any(position + size == found for size in headers) else ""
