# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""When backups were last verified and when a drill was last held, for monitoring to read.

Kept in ``activity.json`` in the cluster's folder, where this host can write there. No restore, backup or expire depends
on it: what cannot be read was never done, which is what monitoring then says.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from .errors import PitrError
from .repository import ClusterFolder, write_json

FILE = "activity.json"
VERIFY, DRILL = KINDS = ("verify", "drill")
# Who held a drill, when nobody did; see rehearsal.py.
CLOCK = "clock"
# Entries that are kept of each kind.
KEEP = 30


def path_of(folder: ClusterFolder) -> str:
    """Where it is kept; empty for a repository on another host, which nothing but files of an archive is sent to."""
    return os.path.join(folder.path, FILE) if os.path.isdir(folder.path) else ""


def read(path: str) -> dict[str, list[dict[str, Any]]]:
    """What was done, by kind, oldest first; without what cannot be understood. ``at`` of each is ISO 8601, UTC."""
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        with open(path, encoding="utf-8") as stream:
            stored = json.load(stream)
        for kind in KINDS:
            for item in stored.get(kind, []):
                with contextlib.suppress(KeyError, TypeError, ValueError):
                    if datetime.datetime.fromisoformat(item["at"]).tzinfo is not None:
                        found[kind].append(dict(item))
    return found


def add(path: str, kind: str, entry: Mapping[str, Any]) -> bool:
    """Remember something that was done now. Returns whether it was written; the repository may be read-only."""
    if not path:
        return False
    found = read(path)
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    found[kind].append({**entry, "at": now})
    with contextlib.suppress(OSError, PitrError):
        write_json(path, {"format": 1, **{each: items[-KEEP:] for each, items in found.items()}})
        return True
    return False


def add_verified(folder: ClusterFolder, reports: Sequence[Mapping[str, Any]]) -> bool:
    """Remember a verification; ``reports`` are verify.Report.to_dict()."""
    entry = {
        "whole": {str(report["backup"]): report["level"] for report in reports if report["whole"]},
        "damaged": [report["backup"] for report in reports if not report["whole"]],
    }
    return add(path_of(folder), VERIFY, entry)
