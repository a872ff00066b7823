# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""How the status of clusters is shown: a table, one line for Nagios, a document, and metrics for Prometheus."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional

from .judge import CODES, CRITICAL, OK, UNKNOWN, WARNING, Finding, size, span, worst
from .watched import Facts


@dataclass(frozen=True)
class Status:
    """One cluster: what is known of it and what that comes to."""

    facts: Facts
    findings: tuple[Finding, ...]

    @property
    def level(self) -> str:
        """The worst of its findings."""
        return worst(self.findings)

    def to_dict(self) -> dict[str, Any]:
        """For a module's result and for JSON."""
        return {
            "cluster": self.facts.cluster,
            "level": self.level,
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
            "facts": _plain({**dataclasses.asdict(self.facts), "archive_lag": self.facts.archive_lag}),
        }


def _plain(value: Any) -> Any:
    """Numbers and texts only. An LSN is one; what no JSON number can be is null."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    # An Lsn, whose number nobody reads.
    return str(value) if isinstance(value, int) and type(value) not in (int, bool) else value


def overall(statuses: Iterable[Status]) -> str:
    """The worst of all clusters."""
    return worst(finding for status in statuses for finding in status.findings)


# --- for people

_ORDER = {CRITICAL: 0, WARNING: 1, UNKNOWN: 2, OK: 3}


def table(status: Status) -> list[str]:
    """Lines about one cluster, what is wrong first."""
    facts = status.facts
    lines = [f"{facts.cluster}: {status.level}"]
    width = max(len(finding.check) for finding in status.findings)
    for finding in sorted(status.findings, key=lambda each: _ORDER[each.level]):
        lines.append(f"  {finding.level:<8}  {finding.check:<{width}}  {finding.says}")
        if finding.do:
            lines.append(f"  {'':<8}  {'':<{width}}  -> {finding.do}")
    return lines + [f"  note: {note}" for note in facts.notes]


FLEET = ("cluster", "status", "full", "backup", "verify", "drill", "lag", "restorable to", "free", "worst finding")
_WIDTHS = (14, 8, 9, 9, 9, 9, 9, 13, 6)


def _row(cells: Sequence[str]) -> str:
    return "  ".join([*(f"{cell:<{width}}" for cell, width in zip(cells, _WIDTHS)), cells[-1]])


def fleet_header() -> str:
    """The first line of the fleet's table."""
    return _row(FLEET)


def fleet_row(status: Status) -> str:
    """One cluster as one line of the fleet's table. All lines have the same columns, whatever host they come from."""
    facts, storage = status.facts, status.facts.storage

    def age(value: Optional[float]) -> str:
        return "-" if value is None else span(value)

    bad = sorted((finding for finding in status.findings if finding.level != OK), key=lambda each: _ORDER[each.level])
    good = storage.restorable if storage is not None else ()
    full = [backup.age for backup in good if backup.type == "full"]
    cells = [
        facts.cluster,
        status.level,
        age(min(full, default=None)),
        age(min((backup.age for backup in good), default=None)),
        age(storage.verify_age if storage is not None else None),
        age(storage.drill_age if storage is not None else None),
        "-" if facts.archive_lag is None else size(facts.archive_lag),
        (good[-1].to_lsn if good else "") or "-",
        f"{storage.room.free_percent:.0f} %" if storage is not None else "-",
        f"{bad[0].check}: {bad[0].says}" if bad else "",
    ]
    return _row(cells).rstrip()


def nagios(statuses: Sequence[Status]) -> str:
    """One line, as the Monitoring Plugins want it: the verdict, what is wrong, and figures behind a bar.

    What is not known is told only where nothing is known to be wrong, which it mostly comes from.
    """
    wrong = [
        f"{status.facts.cluster} {finding.check}: {finding.says}"
        for status in statuses
        for finding in sorted(status.findings, key=lambda each: _ORDER[each.level])
        if finding.level not in (OK, UNKNOWN) or status.level == UNKNOWN == finding.level
    ]
    says = "; ".join(wrong) or f"{', '.join(status.facts.cluster for status in statuses) or 'no cluster'}"
    figures = []
    for status in statuses:
        facts = status.facts
        if facts.archive_lag is not None:
            figures.append(f"'{facts.cluster}_archive_lag'={facts.archive_lag}B")
        if facts.storage is not None:
            figures.append(f"'{facts.cluster}_free'={facts.storage.room.free}B")
    # The bar and line breaks have a meaning of their own.
    line = f"PITR {overall(statuses)} - {says}".replace("|", "/")
    return " ".join(line.split()) + (f" | {' '.join(figures)}" if figures else "")


# --- for Prometheus

GAUGE, COUNTER = "gauge", "counter"
METRICS: dict[str, tuple[str, str]] = {
    "pitr_status": (GAUGE, "Worst finding: 0 OK, 1 WARNING, 2 CRITICAL, 3 UNKNOWN."),
    "pitr_status_timestamp_seconds": (GAUGE, "When this was written."),
    "pitr_status_duration_seconds": (GAUGE, "How long the look took."),
    "pitr_finding": (GAUGE, "Finding of each check: 0 OK, 1 WARNING, 2 CRITICAL, 3 UNKNOWN."),
    "pitr_primary_up": (GAUGE, "Whether the primary answered."),
    "pitr_primary_wal_bytes": (GAUGE, "Size of pg_wal on the primary."),
    "pitr_timeline": (GAUGE, "Timeline of the primary, and the newest one in the archive."),
    "pitr_archived_total": (COUNTER, "Segments that archive_command has archived."),
    "pitr_archive_failures_total": (COUNTER, "Failures of archive_command."),
    "pitr_archive_ready_segments": (GAUGE, "Files that wait to be archived."),
    "pitr_archive_oldest_ready_seconds": (GAUGE, "For how long the oldest of them has been waiting; 0 without one."),
    "pitr_archive_lag_bytes": (GAUGE, "WAL that the primary has written and the archive does not have."),
    "pitr_archive_lag_seconds": (GAUGE, "For how long WAL has been waiting for the archive, at least."),
    "pitr_archive_segments": (GAUGE, "Segments in the archive."),
    "pitr_archive_last_segment_timestamp_seconds": (GAUGE, "When the newest segment was stored."),
    "pitr_archive_missing_segments": (GAUGE, "Segments that are missing and needed."),
    "pitr_receiver_up": (GAUGE, "Whether the receiver streams."),
    "pitr_receiver_lag_bytes": (GAUGE, "WAL that the primary has written and the receiver has not flushed."),
    "pitr_slot_retained_bytes": (GAUGE, "WAL that a replication slot keeps on the primary."),
    "pitr_slot_active": (GAUGE, "Whether somebody uses the slot."),
    "pitr_backups": (GAUGE, "Backups that can be restored, by type."),
    "pitr_backups_not_restorable": (GAUGE, "Backups that cannot be restored."),
    "pitr_last_backup_timestamp_seconds": (GAUGE, "When the newest restorable backup had ended, by type; any is all."),
    "pitr_last_verify_timestamp_seconds": (GAUGE, "When backups were last verified and found whole."),
    "pitr_last_drill_timestamp_seconds": (GAUGE, "When a drill last passed."),
    "pitr_recovery_window_start_timestamp_seconds": (GAUGE, "The earliest point that can be restored."),
    "pitr_repository_free_bytes": (GAUGE, "Free space of the repository's filesystem."),
    "pitr_repository_size_bytes": (GAUGE, "Size of the repository's filesystem."),
    "pitr_stored_bytes": (GAUGE, "What is stored of the cluster."),
    "pitr_stored_growth_bytes_per_day": (GAUGE, "How fast that grows, from the last days."),
    "pitr_repository_days_until_full": (GAUGE, "An estimate; absent when it does not grow, or not known."),
}
Samples = list[tuple[str, dict[str, str], float]]


def metrics(statuses: Sequence[Status]) -> str:
    """All of METRICS that are known, in Prometheus' text format. What is not known is left out, and never 0."""
    samples = [sample for status in statuses for sample in _samples(status)]
    lines = []
    for name, (kind, says) in METRICS.items():
        of_name = [(labels, value) for each, labels, value in samples if each == name]
        if of_name:
            lines += [f"# HELP {name} {says}", f"# TYPE {name} {kind}"]
            lines += [f"{name}{_labels(labels)} {_value(value)}" for labels, value in of_name]
    return "".join(f"{line}\n" for line in lines)


def _value(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(round(float(value), 3))


def _labels(labels: Mapping[str, str]) -> str:
    def escaped(text: str) -> str:
        return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")

    return "{" + ",".join(f'{name}="{escaped(value)}"' for name, value in labels.items()) + "}"


def _samples(status: Status) -> Samples:
    facts = status.facts
    cluster = {"cluster": facts.cluster}
    found: Samples = []

    def add(name: str, value: Optional[float], **labels: str) -> None:
        if value is not None and math.isfinite(value):
            found.append((name, {**cluster, **labels}, value))

    def since(name: str, age: Optional[float], **labels: str) -> None:
        add(name, None if age is None else facts.at - age, **labels)

    add("pitr_status", CODES[status.level])
    add("pitr_status_timestamp_seconds", facts.at)
    add("pitr_status_duration_seconds", facts.seconds)
    for finding in status.findings:
        add("pitr_finding", CODES[finding.level], check=finding.check)
    server, storage = facts.server, facts.storage
    add("pitr_primary_up", server is not None)
    if server is not None:
        add("pitr_primary_wal_bytes", server.wal_bytes)
        add("pitr_timeline", server.timeline, of="primary")
        add("pitr_archived_total", server.archived_count)
        add("pitr_archive_failures_total", server.failed_count)
        add("pitr_archive_ready_segments", server.ready)
        add("pitr_archive_oldest_ready_seconds", None if server.ready is None else server.oldest_ready_age or 0)
        for slot in server.slots:
            add("pitr_slot_retained_bytes", slot.retained, slot=slot.name)
            add("pitr_slot_active", slot.active, slot=slot.name)
    if storage is not None:
        archive, room, good = storage.archive, storage.room, storage.restorable
        add("pitr_timeline", max(archive.timelines, default=None), of="archive")
        add("pitr_archive_segments", archive.segments)
        since("pitr_archive_last_segment_timestamp_seconds", archive.last_segment_age)
        add("pitr_archive_missing_segments", sum(hole.segments for hole in archive.holes if hole.needed))
        for kind in ("full", "incremental"):
            of_kind = [backup.age for backup in good if backup.type == kind]
            add("pitr_backups", len(of_kind), type=kind)
            since("pitr_last_backup_timestamp_seconds", min(of_kind, default=None), type=kind)
        since("pitr_last_backup_timestamp_seconds", min((backup.age for backup in good), default=None), type="any")
        add("pitr_backups_not_restorable", len(storage.backups) - len(good))
        since("pitr_last_verify_timestamp_seconds", storage.verify_age)
        since("pitr_last_drill_timestamp_seconds", storage.drill_age)
        since("pitr_recovery_window_start_timestamp_seconds", good[0].age if good else None)
        add("pitr_repository_free_bytes", room.free)
        add("pitr_repository_size_bytes", room.size)
        add("pitr_stored_bytes", room.stored)
        add("pitr_stored_growth_bytes_per_day", room.growth)
        add("pitr_repository_days_until_full", room.days_left)
        if storage.receiver is not None:
            receiver = next((finding for finding in status.findings if finding.check == "receiver"), None)
            add("pitr_receiver_up", receiver is not None and receiver.level != CRITICAL)
    add("pitr_archive_lag_bytes", facts.archive_lag)
    add("pitr_archive_lag_seconds", None if facts.archive_lag is None else facts.archive_lag_age)
    add("pitr_receiver_lag_bytes", facts.receiver_lag)
    return found
