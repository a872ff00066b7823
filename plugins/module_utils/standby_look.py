# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a standby's directory, the server on it, and the primary look like now (the facts of standby.py)."""

from __future__ import annotations

import contextlib
import os
import secrets
from typing import Any

from . import combine, extract
from .errors import PitrError
from .postgres import FLOORS, Login, control_data, data_version, query, running_pid
from .standby import Local, Position, Upstream, can_be_rewound, made_nothing_yet
from .timeline import Switch, parse_history
from .unfinished import left_behind
from .upstream import ACCEPTED
from .wal import Lsn

STANDBY_SIGNAL, RECOVERY_SIGNAL = "standby.signal", "recovery.signal"
# Where a directory is while pg_rewind works on it: no server is started there by its service.
REWINDING = ".rewinding"


def look_upstream(login: Login, slot: str, local: Login | None = None) -> Upstream:
    """Ask the primary, as the role that the standby will connect as. ``local``: the server that runs here, if one does.

    Raises PitrError when the primary cannot be reached.
    """
    name = f"pitr-standby-{secrets.token_hex(8)}"
    with contextlib.ExitStack() as stack:
        replication = stack.enter_context(contextlib.closing(login.connect(application_name=name, replication=True)))
        identifier, timeline, lsn = query(replication, "IDENTIFY_SYSTEM")[0][:3]
        history: list[Switch] = []
        if int(timeline) > 1:
            content = query(replication, f"TIMELINE_HISTORY {int(timeline)}")[0][1]
            history = parse_history(
                int(timeline), content if isinstance(content, str) else bytes(content).decode(errors="replace")
            )
        connection = stack.enter_context(contextlib.closing(login.connect()))
        (in_recovery, accepted, major), *_none = query(
            connection,
            "SELECT pg_is_in_recovery(), coalesce(current_setting(%s, true), 'on') <> 'off',"
            " current_setting('server_version_num')::int / 10000",
            (ACCEPTED,),
        )
        settings = query(connection, "SELECT name, setting FROM pg_settings WHERE name = ANY(%s)", (list(FLOORS),))
        spaces = query(
            connection,
            "SELECT pg_tablespace_location(oid) FROM pg_tablespace WHERE pg_tablespace_location(oid) <> '' ORDER BY 1",
        )
        slots = query(
            connection,
            "SELECT active, coalesce(wal_status, '') = 'lost' FROM pg_replication_slots WHERE slot_name = %s",
            (slot,),
        )
        itself = local is not None and _sees(local, name)
    state = "none" if not slots else "active" if slots[0][0] else "lost" if slots[0][1] else "free"
    return Upstream(
        system_identifier=str(identifier),
        timeline=int(timeline),
        lsn=Lsn.parse(lsn),
        major=int(major),
        history=tuple(history),
        in_recovery=bool(in_recovery),
        accepted=bool(accepted),
        floors={setting: int(value) for setting, value in settings},
        tablespaces=tuple(row[0] for row in spaces),
        slot=state,
        itself=itself,
    )


def _sees(local: Login, name: str) -> bool:
    """Whether a connection of this name is one to the local server."""
    with contextlib.closing(local.connect()) as connection:
        return bool(query(connection, "SELECT 1 FROM pg_stat_activity WHERE application_name = %s", (name,)))


def look_local(pgdata: str, bin_dir: str, login: Login, upstream: Upstream) -> Local:
    """Look at the directory, and ask the server that runs on it.

    Raises PitrError when a clone is under way, or when a server runs that does not answer.
    """
    interrupted = pgdata + REWINDING
    left_rewind = interrupted if os.path.isdir(interrupted) else ""
    try:
        names = os.listdir(pgdata)
    except FileNotFoundError:
        return Local("missing", left_rewind=left_rewind)
    if not names:
        return Local("missing", left_rewind=left_rewind)
    if combine.is_busy(pgdata):
        raise PitrError(
            f"Something still writes into {pgdata}: a clone or a restore that runs, or what a killed one has left."
            " Nothing was changed; wait until it has ended, and repeat."
        )
    if left_behind(pgdata, upstream.system_identifier) is not None:
        return Local("unfinished", left_rewind=left_rewind)
    try:
        major = data_version(pgdata)
        if major is None or not os.path.exists(os.path.join(pgdata, extract.PG_CONTROL)):
            return Local("foreign", "is not empty and not a data directory")
        control = control_data(bin_dir, pgdata)
    except PitrError as error:
        return Local("foreign", f"is not empty, and it cannot be told which cluster it is: {error.message}")
    signal = _signal(pgdata)
    position = Position(control, signal, os.path.exists(os.path.join(pgdata, "backup_label")))
    facts: dict[str, Any] = {
        "system_identifier": control.system_identifier,
        "state": control.state,
        "signal": signal,
        "timeline": position.timeline,
        "lsn": position.lsn,
        "begins": position.begins,
        "proven": position.proven,
        "empty_cluster": made_nothing_yet(control),
        "rewindable": can_be_rewound(control),
        "mount_point": os.path.ismount(pgdata),
    }
    if running_pid(pgdata) is not None:
        facts.update(_ask(login, pgdata, upstream.timeline))
    return Local("cluster", **facts)


def _signal(pgdata: str) -> str:
    for name in (STANDBY_SIGNAL, RECOVERY_SIGNAL):
        # With both there standby.signal wins (readRecoverySignalFile).
        if os.path.exists(os.path.join(pgdata, name)):
            return name.partition(".")[0]
    return ""


def _ask(login: Login, pgdata: str, current: int) -> dict[str, Any]:
    """What only the running server can tell."""
    try:
        with contextlib.closing(login.connect()) as connection:
            (in_recovery, made, timeline, lsn), *_none = query(
                connection,
                "SELECT pg_is_in_recovery(),"
                " (SELECT count(*) FROM pg_database WHERE oid >= 16384)"
                " + (SELECT count(*) FROM pg_authid WHERE oid >= 16384)"
                " + (SELECT count(*) FROM pg_class WHERE oid >= 16384),"
                " timeline_id, checkpoint_lsn::text FROM pg_control_checkpoint()",
            )
            facts = {"running": True, "in_recovery": bool(in_recovery), "proven": True, "empty_cluster": int(made) == 0}
            if not in_recovery:
                return {**facts, "timeline": int(timeline), "lsn": Lsn.parse(lsn), "begins": True}
            return {**facts, **_replayed(connection, current)}
    except PitrError as error:
        raise PitrError(
            f"A server runs in {pgdata} and does not answer, so that nothing is known of it: {error.message} Nothing"
            " was changed."
        ) from None


def _replayed(connection: Any, current: int) -> dict[str, Any]:
    """The point that a standby has replayed to, on which timeline; ``current`` is the primary's.

    The server tells the position, but the timeline only of what it has written to pg_control: a restartpoint writes
    that, and a second one without a new checkpoint before it writes nothing else (CreateRestartPoint).
    """
    sql = (
        "SELECT min_recovery_end_timeline, min_recovery_end_lsn::text, coalesce(pg_last_wal_replay_lsn(), '0/0')::text"
        " FROM pg_control_recovery()"
    )
    timeline, minimum, replayed = query(connection, sql)[0]
    if int(timeline) != current:
        query(connection, "CHECKPOINT")
        query(connection, "CHECKPOINT")
        timeline, minimum, replayed = query(connection, sql)[0]
    return {"timeline": int(timeline), "lsn": max(Lsn.parse(minimum), Lsn.parse(replayed)), "begins": False}
