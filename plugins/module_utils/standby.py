# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What is to be done with a directory, so that a standby of the primary runs on it. Decided here, and nothing else.

A standby may go on when the point that it has come to is part of the primary's past; what the primary's timelines are
is told by its history file. Everything else is a refusal, unless ``rebuild`` allows more. Source of the rules: the
sections "Log-Shipping Standby Servers" and "pg_rewind", and readTimeLineHistory and rescanLatestTimeLine of
xlogrecovery.c.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from .plan import Refusal
from .postgres import ControlData
from .timeline import Switch, ancestry
from .wal import Lsn

REBUILD = ("never", "rewind", "clone")
# FirstNormalObjectId of access/transam.h. A server gives out the first one of these before it makes its first object
# of any kind, a role and a database included (GetNewObjectId), and before that it has none that initdb has not made.
_FIRST_OBJECT = 16384
# States of pg_control (DBState) in which the last checkpoint is the end of everything.
_STOPPED = "shut down"
_STANDBY_STATES = ("shut down in recovery", "in archive recovery")
INTRO = "No standby was set up; nothing was touched."


@dataclass(frozen=True)
class Upstream:
    """The primary as it tells of itself. ``slot`` is none, free, active or lost; ``itself``: it is the local server."""

    system_identifier: str
    timeline: int
    lsn: Lsn
    major: int
    history: tuple[Switch, ...] = ()
    in_recovery: bool = False
    accepted: bool = True
    floors: Mapping[str, int] = field(default_factory=dict)
    tablespaces: tuple[str, ...] = ()
    slot: str = "free"
    itself: bool = False

    def knows(self, timeline: int, lsn: Lsn, begins: bool) -> bool:
        """Whether this point is part of its past. ``begins``: a record begins there, else one ends."""
        for span in ancestry(self.timeline, list(self.history)):
            if span.timeline == timeline and span.begin <= lsn:
                return span.end is None or (lsn < span.end if begins else lsn <= span.end)
        return False


@dataclass(frozen=True)
class Local:
    """The directory and the server on it.

    ``kind``: missing (or empty), unfinished (a clone or restore of this cluster that was killed), foreign (something
    that is no cluster), other_major, cluster. ``timeline`` and ``lsn`` are how far it has come; ``begins`` as in
    Upstream.knows; ``proven`` is False when more than that may have been written.
    """

    kind: str
    why: str = ""
    system_identifier: str = ""
    state: str = ""
    running: bool = False
    in_recovery: bool = False
    signal: str = ""
    timeline: int = 0
    lsn: Lsn = field(default_factory=Lsn)
    begins: bool = False
    proven: bool = True
    empty_cluster: bool = False
    rewindable: bool = False
    mount_point: bool = False
    left_rewind: str = ""


@dataclass(frozen=True)
class Decision:
    """``action``: none, clone, rewind, follow (a directory that is good becomes, or goes on as, a standby).

    ``stop``: the server in the directory has to be stopped first. ``aside``: the directory is moved aside first.
    """

    action: str
    why: str
    stop: bool = False
    aside: bool = False
    notes: tuple[str, ...] = ()


class Position:
    """How far a stopped cluster has come, by pg_control."""

    def __init__(self, control: ControlData, signal: str, has_label: bool) -> None:
        checkpoint = (control.timeline, control.checkpoint_lsn)
        minimum = Lsn.parse(control.text("Minimum recovery ending location"))
        self.timeline, self.lsn = checkpoint
        self.begins, self.proven = True, True
        if control.state in _STANDBY_STATES and int(minimum):
            self.timeline, self.lsn = int(control.text("Min recovery ending loc's timeline")), minimum
            self.begins = False
        elif control.state not in (_STOPPED, *_STANDBY_STATES):
            # A copy that was never started is as its backup_label says: pg_control is that of the running original.
            self.proven = has_label and signal == "standby"


def made_nothing_yet(control: ControlData) -> bool:
    """Whether this is a cluster in which nothing was made since initdb, as packages leave behind, by its pg_control.

    False for one whose server has run for long enough to gather statistics, as large ones take numbers, too
    (toast_save_datum). Only the running server can tell then.
    """
    return control.state == _STOPPED and int(control.text("Latest checkpoint's NextOID")) < _FIRST_OBJECT


def can_be_rewound(control: ControlData) -> bool:
    """What pg_rewind wants of the target: wal_log_hints or data checksums."""
    return (
        control.text("wal_log_hints setting") == "on" or int(control.text("Data page checksum version").split()[0]) > 0
    )


def check_upstream(upstream: Upstream, local: Local, major: int) -> Refusal | None:
    """May a standby be attached to this server at all?"""
    if upstream.itself:
        return Refusal(
            "is_the_primary",
            "The server in this directory is the very server that the standby would follow.",
            "Correct standby_primary_address, or the groups of the inventory.",
        )
    if upstream.in_recovery:
        return Refusal(
            "primary_is_standby",
            "The server that the standby would follow is a standby itself.",
            "standby_primary_address must lead to the primary.",
        )
    if not upstream.accepted:
        return Refusal(
            "primary_not_accepted",
            "The primary is a restored cluster that nobody has accepted yet; a standby of it would be one of a copy.",
            "Accept it first: the playbook recovery with restore_state=accepted.",
        )
    if upstream.major != major:
        return Refusal(
            "version",
            f"The primary is PostgreSQL {upstream.major}, the programs here are {major}.",
            "A standby must have the same major version.",
        )
    if upstream.slot == "active" and not local.running:
        return Refusal(
            "slot_in_use",
            "The primary's slot for this standby is used by another server, and none runs here.",
            "Two standbys must not share a slot: set standby_slot.",
        )
    return None


def decide(
    local: Local, upstream: Upstream, rebuild: str, pgdata: str, major: int, replace_empty: bool = False
) -> Decision | Refusal:
    """What to do, or why not."""
    refusal = check_upstream(upstream, local, major)
    if refusal is not None:
        return refusal
    if local.kind in ("missing", "unfinished"):
        return _decide_missing(local, rebuild, pgdata)
    if local.kind != "cluster":
        return Refusal("directory_foreign", f"{pgdata} {local.why}. It will not be touched.", "Move it away yourself.")
    if local.system_identifier != upstream.system_identifier:
        if replace_empty and local.empty_cluster:
            why = "the packages have made an empty cluster here, in which nothing was ever made"
            return Decision("clone", why, stop=local.running, aside=True)
        return Refusal(
            "directory_foreign",
            f"{pgdata} is the cluster with system identifier {local.system_identifier}, the primary is"
            f" {upstream.system_identifier}.",
            "standby_rebuild does not change that. Wrong host or path? Otherwise move the directory away yourself.",
        )
    return _decide_own(local, upstream, rebuild, pgdata)


def _decide_missing(local: Local, rebuild: str, pgdata: str) -> Decision | Refusal:
    if local.left_rewind:
        if rebuild != "clone":
            return Refusal(
                "rewind_interrupted",
                f"A pg_rewind of {pgdata} has failed or was killed half-way; what it was working on is kept as"
                f" {local.left_rewind}, and nothing can be started from it.",
                f"Clone anew with standby_rebuild=clone; {local.left_rewind} stays, remove it yourself.",
            )
        note = f"{local.left_rewind}, which a pg_rewind has left half-way, stays where it is: remove it yourself"
        return Decision("clone", "a pg_rewind was interrupted", notes=(note,))
    if local.kind == "unfinished":
        return Decision("clone", "a clone was killed half-way; it is repeated")
    return Decision("clone", "there is no data directory")


def _decide_own(local: Local, upstream: Upstream, rebuild: str, pgdata: str) -> Decision | Refusal:
    """The directory is one of this cluster."""
    where = f"timeline {local.timeline}, LSN {local.lsn}"
    if local.running and not local.in_recovery:
        code, why = "is_primary", f"A server runs in {pgdata} that is a primary itself (timeline {local.timeline})"
    elif local.signal == "recovery":
        code, why = "recovery_under_way", f"{pgdata} is being recovered to a target, or waits to be accepted"
    elif not local.proven:
        code = "diverged"
        why = (
            f"The server in {pgdata} has ended in the state '{local.state}', so that it cannot be told whether all that"
            " it wrote is part of the primary's past"
        )
    elif not upstream.knows(local.timeline, local.lsn, local.begins):
        code = "diverged"
        why = (
            f"{pgdata} has come to {where}, which is no part of the primary's past"
            f" ({_told(upstream)}): the two have diverged"
        )
    elif local.running:
        return Decision("none", f"it follows the primary ({where})")
    else:
        return Decision("follow", f"its {where} is part of the primary's past")
    return _rebuilt(local, rebuild, pgdata, code, why)


def _rebuilt(local: Local, rebuild: str, pgdata: str, code: str, why: str) -> Decision | Refusal:
    """Refused, unless ``rebuild`` allows more."""
    if rebuild == "never":
        return Refusal(
            code,
            f"{why}.",
            "What it has and the primary has not would be lost. If that is meant: standby_rebuild=rewind (pg_rewind;"
            " copies what differs) or standby_rebuild=clone (the directory is moved aside, not removed).",
        )
    if local.mount_point:
        return Refusal(
            "directory_mount_point",
            f"{why}. {pgdata} is a mount point and cannot be renamed.",
            "Stop the server, move the content away yourself, and let the standby be cloned into the empty directory.",
        )
    if rebuild == "clone":
        return Decision("clone", why, stop=local.running, aside=True)
    if not local.rewindable:
        return Refusal(
            "rewind_impossible",
            f"{why}. pg_rewind wants data checksums or wal_log_hints, and {pgdata} has neither.",
            "standby_rebuild=clone works.",
        )
    return Decision("rewind", why, stop=local.running)


def _told(upstream: Upstream) -> str:
    """Its timelines with where each ended."""
    spans = ancestry(upstream.timeline, list(upstream.history))
    told = [f"timeline {span.timeline} to {span.end}" for span in spans[:-1]]
    return ", ".join([*told, f"timeline {upstream.timeline}, now at {upstream.lsn}"])


def check_slot(upstream: Upstream, decision: Decision, slot: str) -> Refusal | None:
    """Whether the slot is there that a standby needs which is yet to be made."""
    if decision.action == "none" or upstream.slot in ("free", "active"):
        return None
    what = "has no replication slot" if upstream.slot == "none" else "has lost the WAL of the replication slot"
    return Refusal(
        "slot_missing",
        f"The primary {what} '{slot}' of this standby.",
        "The playbooks site and standby make it on the primary.",
    )


def floors(wanted: Mapping[str, object], *least: Mapping[str, int]) -> dict[str, int]:
    """Settings that must be at least as high as the primary's (CheckRequiredParameterValues), where they are not.

    ``wanted``: what the configuration will say. Those that it does not name are taken from the primary, too.
    """
    result: dict[str, int] = {}
    for demands in least:
        for name, value in demands.items():
            result[name] = max(result.get(name, 0), value)
    return {name: value for name, value in result.items() if _number(wanted.get(name)) < value}


def _number(value: object) -> int:
    text = str(value).strip()
    return int(text) if re.fullmatch(r"\d+", text) else -1


def slot_name(host: str) -> str:
    """The slot of a host when none is named: its name with what PostgreSQL does not take replaced."""
    return re.sub(r"[^a-z0-9_]", "_", host.lower())[:63]
