# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Evidence of a drill: what was measured, and the verdict that follows from it. Pure, but for :func:`write`.

A scenario passes only when every proof is there; what was not measured counts as failed, by name.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Mapping
from typing import Any

from .repository import write_atomic

FORMAT = 1
_STEPS = (
    ("stop", "stop"),
    ("restore", "restore"),
    ("start", "start"),
    ("recovery", "replay"),
    ("check", "check"),
    ("dump", "compare"),
    ("accept", "accept"),
)


def _seconds(step: Mapping[str, Any]) -> float:
    return round(float(step.get("seconds") or 0), 3)


def _ran(raw: Mapping[str, Any], key: str) -> bool:
    """Whether this task ran; a skipped one leaves a result too."""
    return bool(raw.get(key)) and "skipped" not in raw[key]


def _at(step: Mapping[str, Any], key: str) -> datetime.datetime | None:
    return datetime.datetime.fromisoformat(step[key]) if step.get(key) else None


def failures(raw: Mapping[str, Any]) -> list[str]:
    """Everything that speaks against a scenario, in words; empty when it is proven."""
    found = []
    if raw.get("error"):
        found.append(f"{raw.get('failed_task') or 'a task'}: {raw['error']}")
        return found
    restore, recovery, check, dump = (raw.get(key) or {} for key in ("restore", "recovery", "check", "dump"))
    if not restore.get("plan"):
        found.append("nothing was restored")
    if not recovery.get("reached"):
        found.append("it is not known where the recovery stopped")
    expected, status = raw.get("expected") or {}, check.get("status") or {}
    if not expected or not status:
        found.append("the status row was not compared")
    elif expected != status:
        found.append(f"the status row is {status}, expected was {expected}")
    amcheck = check.get("amcheck")
    if raw.get("amcheck_wanted", True):
        if not amcheck:
            found.append("pg_amcheck did not run")
        elif not amcheck.get("ok"):
            found.append(f"pg_amcheck found corruption: {amcheck.get('findings')}")
    if raw.get("name") == "latest":
        if "identical" not in dump:
            found.append("the dumps were not compared")
        elif not dump["identical"]:
            found.append(f"the restored cluster differs from the original in {dump.get('difference_count')} objects")
    return found


def scenario(raw: Mapping[str, Any]) -> dict[str, Any]:
    """One scenario of the evidence, from the results of the drill's tasks."""
    reasons = failures(raw)
    plan = (raw.get("restore") or {}).get("plan") or {}
    recovery, check, dump = (raw.get(key) or {} for key in ("recovery", "check", "dump"))
    killed, usable = _at(raw.get("stop") or {}, "started_at"), _at(recovery, "finished_at")
    expected, status = raw.get("expected") or {}, check.get("status") or {}
    lost = None
    if "sequence" in expected and "sequence" in status:
        lost = max(0, int(expected["sequence"]) - int(status["sequence"]))
    return {
        "name": raw.get("name"),
        "verdict": "failed" if reasons else "passed",
        "failures": reasons,
        "target": plan.get("target") or raw.get("target"),
        "backup": plan.get("backup"),
        "timeline": recovery.get("timeline"),
        "reached": recovery.get("reached"),
        "wal": {key: plan.get(key) for key in ("first_segment", "last_segment", "segments", "wal_bytes")},
        "rto_seconds": round((usable - killed).total_seconds(), 3) if killed and usable else None,
        # Transactions of the drill's own ledger, committed before the target and missing after the restore.
        "rpo": {"transactions": lost, "seconds": 0.0 if lost == 0 else None},
        "phases": [{"name": name, "seconds": _seconds(raw[key])} for key, name in _STEPS if _ran(raw, key)],
        "status": {"expected": expected, "found": status},
        "amcheck": check.get("amcheck"),
        "fingerprint": dump.get("fingerprint"),
        "differences": dump.get("differences") or [],
        "explained": dump.get("explained") or [],
        "refusals": raw.get("refusals") or [],
    }


def evidence(raw: Mapping[str, Any], finished_at: datetime.datetime) -> dict[str, Any]:
    """The whole document. The drill passed when every scenario that was asked for is there and passed."""
    scenarios = [scenario(item) for item in raw.get("scenarios") or []]
    asked = list(raw.get("requested") or [])
    there = [item["name"] for item in scenarios]
    reasons = [f"{item['name']}: {reason}" for item in scenarios for reason in item["failures"]]
    reasons += [f"{name}: did not run" for name in asked if name not in there]
    if raw.get("error") and not any(item.get("error") == raw["error"] for item in raw.get("scenarios") or []):
        reasons.insert(0, f"{raw.get('failed_task') or 'the drill'}: {raw['error']}")
    if not asked:
        reasons.append("no scenario was asked for")
    return {
        "format": FORMAT,
        "verdict": "failed" if reasons else "passed",
        "failures": reasons,
        "cluster": raw.get("cluster"),
        "system_identifier": raw.get("system_identifier"),
        "postgresql_version": raw.get("postgresql_version"),
        "started_at": raw.get("started_at"),
        "finished_at": finished_at.astimezone(datetime.timezone.utc).isoformat(timespec="milliseconds"),
        "load": raw.get("load") or {},
        "phases": [
            {"name": item["name"], "seconds": _seconds(item)}
            for item in raw.get("phases") or []
            if item.get("seconds") is not None
        ],
        "scenarios": scenarios,
        "old_pgdata": raw.get("old_pgdata") or "",
        "advice": raw.get("advice") or "",
    }


def _mib(count: object) -> str:
    return f"{int(str(count)) / 2**20:.0f} MiB" if count else "-"


def summary(document: Mapping[str, Any], directory: str) -> list[str]:
    """What the terminal shows at the end."""
    lines = ["", f"  Drill of cluster {document['cluster']}, PostgreSQL {document['postgresql_version']}", ""]
    for item in document["scenarios"]:
        reached = item["reached"] or {}
        lines.append(f"  {item['name']:<10} {item['verdict'].upper()}")
        lines.append(f"    asked      {item['target'] or '-'}")
        where = f"LSN {reached.get('lsn', '-')}, timeline {item['timeline'] or '-'}"
        lines.append(f"    reached    {reached.get('reason', '-')}, {where}")
        wal = item["wal"]
        lines.append(
            f"    from       {item['backup'] or '-'}, {wal['segments'] or 0} segments of WAL ({_mib(wal['wal_bytes'])})"
        )
        status = item["status"]
        lines.append(
            f"    status row {status['found'].get('phase', '-')!r}, expected {status['expected'].get('phase', '-')!r}"
        )
        phases = "  ".join(f"{phase['name']} {phase['seconds']:.1f}" for phase in item["phases"])
        usable = "-" if item["rto_seconds"] is None else f"{item['rto_seconds']:.1f}"
        lines.append(f"    seconds    {phases}  | usable again after {usable}")
        for explained in item["explained"]:
            lines.append(
                f"    tolerated  {explained.get('database')}: {explained.get('object')}: {explained.get('reason')}"
            )
        for difference in item["differences"][:5]:
            where = f"{difference.get('database')}: {difference.get('object')}"
            line = f", line {difference['line']}" if difference.get("line") else ""
            lines.append(f"    DIFFERENT  {where}: {difference.get('kind')}{line}")
            for side in ("truth", "restored"):
                if difference.get(side):
                    lines.append(f"      {side:<9}{difference[side]}")
        lines.append("")
    phases = "  ".join(f"{phase['name']} {phase['seconds']:.1f}" for phase in document["phases"])
    lines.append(f"  before the disaster, seconds: {phases}")
    for reason in document["failures"]:
        lines.append(f"  FAILED     {reason}")
    if document["old_pgdata"]:
        lines.append(f"  The old data directory: {document['old_pgdata']}")
    if document["advice"]:
        lines.append(f"  {document['advice']}")
    lines.append(f"  Evidence: {os.path.join(directory, 'evidence.json')}")
    lines += ["", f"  {document['verdict'].upper()}", ""]
    return lines


def write(document: Mapping[str, Any], directory: str) -> dict[str, str]:
    """Write ``evidence.json`` into ``directory`` and point the link ``latest`` beside it there. Returns the paths."""
    os.makedirs(directory, exist_ok=True)
    path = os.path.join(directory, "evidence.json")
    write_atomic(path, (json.dumps(document, indent=2, sort_keys=False) + "\n").encode(), 0o644)
    latest = os.path.join(os.path.dirname(os.path.abspath(directory)), "latest")
    if not os.path.lexists(latest) or os.path.islink(latest):
        temporary = f"{latest}.{os.getpid()}"
        os.symlink(os.path.basename(os.path.abspath(directory)), temporary)
        os.replace(temporary, latest)
    return {"json": path, "latest": latest}
