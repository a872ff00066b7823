# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A plan as lines to read before it is confirmed. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def amount(count: float) -> str:
    """Bytes with a unit that leaves few digits."""
    unit = 0
    while count >= 10 * 1024 and unit < len(_UNITS) - 1:
        count /= 1024
        unit += 1
    return f"{count:.0f} {_UNITS[unit]}"


def duration(seconds: float) -> str:
    """Seconds as somebody would say them."""
    if seconds < 1:
        return "less than a second"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def lines(plan: Mapping[str, Any]) -> list[str]:
    """``plan`` as RestorePlan.to_dict gives it; what it does not tell is left out."""
    found: list[tuple[str, str]] = []

    def say(title: str, text: str) -> None:
        found.append(("" if found and title == _last_title(found) else title, text))

    side = "" if plan["target_inclusive"] or not plan["target_value"] else ", exclusive"
    value = f"{plan['target_kind']} {plan['target_value']}".strip()
    say("target", f"{value}{side}, then {plan['target_action']}")
    chain: Sequence[str] = plan["chain"]
    say("backup", f"{plan['backup']}, {amount(plan['backup_bytes'])}" + (
        f", combined from {' + '.join(chain)}" if len(chain) > 1 else ""
    ))  # fmt: skip
    for span in plan["timeline_path"]:
        say("timeline", f"{span['timeline']} from {span['from']}" + (f" to {span['to']}" if span["to"] else ""))
    say("consistent", f"at {plan['consistent_lsn']}; before that there is no usable state")
    say(
        "WAL",
        f"{plan['first_segment']} to {plan['last_segment']}, {plan['segments']} segments, {amount(plan['wal_bytes'])}",
    )
    for source in plan.get("sources", []) if len(plan.get("sources", [])) > 1 else []:
        place = f" ({source['place']})" if source.get("place") else ""
        say("from", f"{source['name']}{place}: {source['segments']} segments, up to {source['last_lsn']}")
    estimate = plan.get("estimate")
    if estimate:
        say("copy", f"{duration(estimate['copy_seconds'])}, by {estimate['copy_basis']}")
        say("replay", f"{duration(estimate['replay_seconds'])}, by {estimate['replay_basis']}")
    for moved in plan.get("moved_aside", []):
        say("moved", f"{moved['from']} to {moved['to']}" if moved["to"] else f"{moved['from']} is removed")
    for item in plan.get("tablespaces", []):
        about = "" if item["exact"] else "about "
        to = f" to {item['target']}" if item["target"] != item["location"] else ""
        say("tablespace", f"{item['location']}{to}, {about}{amount(item['bytes'])}")
    for filesystem in plan.get("space", []):
        what = ", ".join(need["what"] for need in filesystem["for"])
        more = f", up to {amount(filesystem['recovery_bytes'])} more while it recovers"
        say(
            "room",
            f"{filesystem['filesystem']}: {amount(filesystem['needed_bytes'])} needed"
            f"{more if filesystem['recovery_bytes'] else ''}, {amount(filesystem['free_bytes'])} free ({what})",
        )
    version = plan.get("server_version")
    if version and version["backup"]:
        say("PostgreSQL", f"backup of {version['backup']}, here {version['host']}")
    if plan.get("data_checksums") is not None:
        say("checksums", "on" if plan["data_checksums"] else "off: damage in data files may go unnoticed")
    if plan.get("floors"):
        say("at least", ", ".join(f"{name} = {value}" for name, value in sorted(plan["floors"].items())))
    for note in plan["notes"]:
        say("note", note)
    width = max(len(title) for title, _text in found)
    return [f"{title:{width}}  {text}" for title, text in found]


def _last_title(found: Sequence[tuple[str, str]]) -> str:
    return next((title for title, _text in reversed(found) if title), "")
