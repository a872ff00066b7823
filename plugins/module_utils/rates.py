# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""How fast restores and recoveries of a cluster were, to tell how long the next one will take.

Kept in ``rates.json`` in the cluster's folder, where this host can write there; every restore and every drill adds to
it. Nothing depends on it: what cannot be read or written is not known.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
from collections.abc import Mapping
from typing import Any

from .catalog import Backup
from .errors import PitrError
from .repository import ClusterFolder, write_json
from .timeline import parse_history
from .wal import Lsn, history_name

FILE = "rates.json"
KINDS = ("copy", "replay")
# Measurements that are kept of each kind.
KEEP = 10
# Less than this many bytes tell how long it takes to begin, not how fast it is.
WORTH = 1 << 20
# Where no recovery was measured: replay is slower than copying by about this factor.
REPLAY_SLOWER = 4


def path_of(folder: ClusterFolder) -> str:
    """Where they are kept; empty for a repository on another host, which nothing but files of an archive is sent to."""
    return os.path.join(folder.path, FILE) if os.path.isdir(folder.path) else ""


def read(path: str) -> dict[str, list[dict[str, Any]]]:
    """The measurements by kind, oldest first; without those that cannot be understood."""
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        with open(path, encoding="utf-8") as stream:
            stored = json.load(stream)
        for kind in KINDS:
            for item in stored.get(kind, []):
                if int(item["bytes"]) > 0 and float(item["seconds"]) > 0:
                    found[kind].append(item)
    return found


def add(path: str, kind: str, count: int, seconds: float) -> None:
    """Remember that ``count`` bytes took so long. Best effort: a repository may be read-only, or far away."""
    if not path or count < WORTH or seconds <= 0:
        return
    found = read(path)
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    found[kind].append({"bytes": count, "seconds": round(seconds, 3), "at": now})
    with contextlib.suppress(OSError, PitrError):
        write_json(path, {"format": 1, **{each: items[-KEEP:] for each, items in found.items()}})


def add_replay(planned: Mapping[str, Any], pgdata: str) -> None:
    """Remember how long a recovery took that has ended with a promotion. Best effort.

    From the start of the postmaster to the history file of the new timeline, which is written at the end of recovery
    whether or not somebody was waiting for it.
    """
    with contextlib.suppress(OSError, ValueError, KeyError, IndexError, PitrError):
        path = str(planned.get("rates") or "")
        with open(os.path.join(pgdata, "postmaster.pid"), encoding="ascii", errors="replace") as stream:
            started = int(stream.read().split("\n")[2])
        histories = [name for name in os.listdir(os.path.join(pgdata, "pg_wal")) if name.endswith(".history")]
        newest = max(int(name[:8], 16) for name in histories)
        place = os.path.join(pgdata, "pg_wal", history_name(newest))
        with open(place, encoding="utf-8", errors="replace") as stream:
            end = parse_history(newest, stream.read())[-1].lsn
        # The postmaster's start is told in whole seconds.
        add(path, "replay", end - Lsn.parse(str(planned["start_lsn"])), os.stat(place).st_mtime - started)


def estimate(path: str, backup: Backup, wal_bytes: int) -> dict[str, Any]:
    """Seconds that copying the backup and replaying this much WAL will take, and what that is based on."""
    measured = read(path) if path else {kind: [] for kind in KINDS}
    copy = _rate(measured["copy"])
    replay = _rate(measured["replay"])
    copy_basis = f"{len(measured['copy'])} restores of this cluster"
    replay_basis = f"{len(measured['replay'])} recoveries of this cluster"
    if copy is None:
        copy = backup.database_bytes / max(backup.seconds, 0.1)
        copy_basis = "the time it took to take this backup; no restore was measured yet"
    if replay is None:
        replay = copy / REPLAY_SLOWER
        replay_basis = "a guess from the time of the copy; no recovery was measured yet"
    return {
        "copy_seconds": round(backup.directory_bytes / copy, 1) if copy else 0.0,
        "copy_basis": copy_basis,
        "replay_seconds": round(wal_bytes / replay, 1) if replay else 0.0,
        "replay_basis": replay_basis,
    }


def _rate(measured: list[dict[str, Any]]) -> float | None:
    """Bytes a second; large ones count for more."""
    seconds = sum(float(item["seconds"]) for item in measured)
    return sum(int(item["bytes"]) for item in measured) / seconds if seconds else None
