# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What is wrong with a cluster, by what is known of it: facts become findings. Pure.

Every check gives exactly one finding, whatever is known: one that could not be made says so by UNKNOWN, because a check
that is silent looks like one that is content. More lag, more age or less room never gives a milder finding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Optional

from .watched import DAY, Facts, Limit, Limits, Receiver, Server, Slot, Storage, Stored

OK, WARNING, CRITICAL, UNKNOWN = LEVELS = ("OK", "WARNING", "CRITICAL", "UNKNOWN")
# The exit codes of Nagios plugins.
CODES = {OK: 0, WARNING: 1, CRITICAL: 2, UNKNOWN: 3}
# What is not known is worse than nothing, and better than what is known to be wrong.
_RANK = {OK: 0, UNKNOWN: 1, WARNING: 2, CRITICAL: 3}
# This much behind the last switch may be written by a server that has nothing to do, and waits for the next switch.
IDLE_BYTES = 16384
# Segments get into the archive side by side. A hole of less than this many seconds may just be one on its way.
HOLE_GRACE = 300.0


@dataclass(frozen=True)
class Finding:
    """One check's verdict in one line, and the command to type first where it is not OK."""

    check: str
    level: str
    says: str
    do: str = ""


def worst(findings: Iterable[Finding]) -> str:
    """The level of all together; nothing is UNKNOWN."""
    return max((finding.level for finding in findings), key=lambda level: _RANK[level], default=UNKNOWN)


def span(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    if seconds < 2 * DAY:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / DAY:.1f} days"


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TB"


def over(value: float, limit: Limit) -> str:
    """The level of a value that is worse the higher it is."""
    if limit.critical and value >= limit.critical:
        return CRITICAL
    return WARNING if limit.warning and value >= limit.warning else OK


def under(value: float, limit: Limit) -> str:
    """The level of a value that is worse the lower it is."""
    if limit.critical and value < limit.critical:
        return CRITICAL
    return WARNING if limit.warning and value < limit.warning else OK


def _worse(*levels: str) -> str:
    return max(levels, key=lambda level: _RANK[level])


class Judge:
    """Judges one set of facts. ``directory`` is where the commands lie, for what to type."""

    def __init__(self, facts: Facts, limits: Limits, directory: str = "/usr/local/lib/pgdrill") -> None:
        self._facts = facts
        self._limits = limits
        self._pitr = f"{directory}/pitr"
        self._cluster = facts.cluster

    def findings(self) -> list[Finding]:
        """One finding a check, in the order in which somebody would look."""
        checks: dict[str, Callable[[], tuple[str, str, str]]] = {
            "primary": self._primary,
            "identity": self._with_both(self._identity),
            "repository": self._repository,
            "archiving": self._with_server(self._archiving),
            "archive_lag": self._with_both(self._archive_lag),
            "receiver": self._with_storage(self._receiver),
            "slots": self._with_server(self._slots),
            "timeline": self._with_both(self._timeline),
            "gaps": self._with_storage(self._gaps),
            "window": self._with_storage(self._window),
            "full_backup": self._with_storage(self._full_backup),
            "backup": self._with_storage(self._backup),
            "verify": self._with_storage(self._verify),
            "drill": self._with_storage(self._drill),
            "space": self._with_storage(self._space),
        }
        return [Finding(name, *check()) for name, check in checks.items()]

    # --- what is not known

    def _with_server(self, check: Callable[[Server], tuple[str, str, str]]) -> Callable[[], tuple[str, str, str]]:
        server = self._facts.server
        if server is None:
            return lambda: (UNKNOWN, "not known: the primary does not answer", "")
        return lambda: check(server)

    def _with_storage(self, check: Callable[[Storage], tuple[str, str, str]]) -> Callable[[], tuple[str, str, str]]:
        storage = self._facts.storage
        if storage is None:
            return lambda: (UNKNOWN, "not known: the repository cannot be read", "")
        return lambda: check(storage)

    def _with_both(
        self, check: Callable[[Server, Storage], tuple[str, str, str]]
    ) -> Callable[[], tuple[str, str, str]]:
        return self._with_server(lambda server: self._with_storage(lambda storage: check(server, storage))())

    # --- the primary

    def _primary(self) -> tuple[str, str, str]:
        facts = self._facts
        if facts.server is None:
            return CRITICAL, facts.server_problem or "does not answer", "on the primary: systemctl status 'postgresql*'"
        server = facts.server
        if server.in_recovery:
            return (
                CRITICAL,
                f"{facts.server_name} is in recovery: a standby, or a restore that has not ended",
                "psql -c 'SELECT pg_is_in_recovery()' on each host, then set pitr_primary_address to the primary",
            )
        if not server.accepted:
            return (
                CRITICAL,
                f"{facts.server_name} is a restored copy that nobody has accepted: it archives nothing",
                "ansible-playbook pgdrill.pitr.recovery -e recovery_state=accepted, once it is the primary on purpose",
            )
        if server.refused:
            return (
                UNKNOWN,
                f"the backup role may not read {', '.join(server.refused)}",
                "as superuser: GRANT pg_monitor TO the backup role (site.yml does it)",
            )
        return OK, f"{facts.server_name} answers, at {server.lsn} of timeline {server.timeline}", ""

    def _identity(self, server: Server, storage: Storage) -> tuple[str, str, str]:
        expected = storage.archive.system_identifier
        if server.system_identifier != expected:
            return (
                CRITICAL,
                f"WRONG CLUSTER: the primary is {server.system_identifier}, the repository's is {expected};"
                " nothing of this server is backed up here",
                f"cat <repository>/{self._cluster}/cluster.json; mind pitr_primary_address; pg_upgrade: a new chapter",
            )
        return OK, f"system identifier {expected}", ""

    def _archiving(self, server: Server) -> tuple[str, str, str]:
        receiver = self._facts.storage.receiver if self._facts.storage is not None else None
        log = "on the primary: the end of the server's log, lines of pitr-wal (site.yml: pitr_log_file)"
        if server.archive_mode == "off" or not server.has_command:
            why = "archive_mode is off" if server.archive_mode == "off" else "archive_command is empty"
            if receiver is not None and self._receives(receiver):
                return OK, f"{why}; the receiver archives", ""
            return CRITICAL, f"{why}, and no receiver runs: no WAL is archived", "ansible-playbook pgdrill.pitr.site"
        failing = server.last_failed_age is not None and (
            server.last_archived_age is None or server.last_failed_age <= server.last_archived_age
        )
        waiting = server.oldest_ready_age or 0.0
        level = over(waiting, self._lag_limit(server)) if server.ready else OK
        ready = f"{server.ready} segments wait, the oldest for {span(waiting)}" if server.ready else ""
        new = self._facts.new_failures or 0
        if failing:
            last = f"last {span(server.last_failed_age or 0)} ago for {server.last_failed_wal}"
            says = f"archive_command fails: {server.failed_count} times in all, {last}"
            return _worse(WARNING, level), says + (f"; {ready}" if ready else ""), log
        if level != OK:
            return (
                level,
                f"the archiver is silent: {ready}, and archive_command neither succeeds nor fails",
                "on the primary: ps -ef | grep -e archiver -e pitr-wal",
            )
        if new > 0:
            since = span(self._facts.failures_span)
            return WARNING, f"archive_command failed {new} times within {since}, and works again", log
        return OK, f"{server.archived_count} segments archived" + (f"; {ready}" if ready else ""), ""

    def _lag_limit(self, server: Server) -> Limit:
        """Nothing is late before the server itself would have switched to the next segment, twice."""
        limit = self._limits.archive_lag
        least = 2.0 * server.archive_timeout
        return Limit(limit.warning and max(limit.warning, least), limit.critical and max(limit.critical, least))

    def _archive_lag(self, server: Server, storage: Storage) -> tuple[str, str, str]:
        lag = self._facts.archive_lag
        if lag is None:
            return (
                CRITICAL,
                f"nothing of timeline {server.timeline} is in the archive, and no history file that leads there",
                f"ls <repository>/{self._cluster}/archive/*; on the primary: ls pg_wal/archive_status/*.ready",
            )
        age = self._facts.archive_lag_age
        level = over(lag, self._limits.archive_lag_bytes)
        if lag > IDLE_BYTES:
            level = _worse(level, over(age, self._lag_limit(server)))
        says = f"{size(lag)} behind the primary" + (f", for {span(age)} or longer" if age and lag > IDLE_BYTES else "")
        return level, says, "" if level == OK else f"{self._pitr}-status {self._cluster}; then see 'archiving'"

    def _receives(self, receiver: Receiver) -> bool:
        server = self._facts.server
        if server is not None and not server.refused:
            states = {s.state for s in server.senders if s.application_name == receiver.application_name}
            return bool(states & {"streaming", "catchup"})
        return receiver.running and receiver.state == "streaming"

    def _receiver(self, storage: Storage) -> tuple[str, str, str]:
        receiver = storage.receiver
        if receiver is None:
            return OK, "there is none", ""
        look = f"systemctl status pitr-receiver@{self._cluster}; journalctl -u pitr-receiver@{self._cluster}"
        if not self._receives(receiver):
            what = receiver.last_error or (
                "it does not run" if not receiver.running else f"its state is {receiver.state}"
            )
            return CRITICAL, f"does not receive: {what}", look
        if receiver.not_archived:
            return WARNING, f"{receiver.not_archived} received segments cannot be archived: {receiver.last_error}", look
        lag = self._facts.receiver_lag
        if lag is None:
            return OK, "streams; its lag is not known", ""
        level = over(lag, self._limits.receiver_lag_bytes)
        return level, f"{size(lag)} behind the primary", "" if level == OK else look

    def _slots(self, server: Server) -> tuple[str, str, str]:
        judged = [(self._slot(slot, server.max_slot_keep), slot) for slot in server.slots]
        if not judged:
            return OK, "there are none", ""
        level = _worse(*(level for (level, _says), _slot in judged))
        if level == OK:
            most = max((slot.retained or 0 for slot in server.slots), default=0)
            return OK, f"{len(judged)} slots, at most {size(most)} kept", ""
        (_level, says), slot = next(item for item in judged if item[0][0] == level)
        others = sum(item[0][0] != OK for item in judged) - 1
        more = f"; {others} more" if others else ""
        drop = f"if nobody will come back for it: SELECT pg_drop_replication_slot('{slot.name}')"
        return level, says + more, drop if not slot.active else "SELECT * FROM pg_replication_slots, on the primary"

    def _slot(self, slot: Slot, most: int) -> tuple[str, str]:
        what = f"slot {slot.name}"
        if slot.wal_status == "lost":
            return CRITICAL, f"{what} has lost WAL that it needs; whoever uses it has to begin anew"
        kept = slot.retained or 0
        says = f"{what} keeps {size(kept)} of WAL"
        if not slot.active:
            says += " and nobody uses it"
        level = over(kept, self._limits.slot_bytes)
        if not slot.active:
            level = _worse(level, over(kept, self._limits.idle_slot_bytes))
        if most > 0 and kept >= 0.9 * most:
            level, says = CRITICAL, f"{says}, of {size(most)} that max_slot_wal_keep_size lets it"
        if slot.wal_status == "unreserved":
            level, says = CRITICAL, f"{says}; the next checkpoint may remove what it needs"
        return level, says

    def _timeline(self, server: Server, storage: Storage) -> tuple[str, str, str]:
        archive = storage.archive
        current = server.timeline
        if current is None:
            return UNKNOWN, "not known of a server in recovery", ""
        newest = max(archive.timelines, default=current)
        if newest > current:
            return (
                CRITICAL,
                f"the archive has timeline {newest}, the primary is on {current}: another server was promoted and"
                " archives here",
                "find the server that writes the newer timeline, and stop it or make it the primary",
            )
        if current != 1 and current not in archive.histories:
            return (
                CRITICAL,
                f"the history file of timeline {current} is not in the archive: no restore can go there",
                f"on the primary: pitr-wal push {self._cluster} <data directory>/pg_wal/{current:08X}.history",
            )
        return OK, f"timeline {current}", ""

    # --- the repository

    def _repository(self) -> tuple[str, str, str]:
        facts = self._facts
        if facts.storage is None:
            return CRITICAL, facts.storage_problem or "cannot be read", "findmnt -T <repository>; ls -l <repository>"
        return OK, f"{facts.storage.archive.segments} segments, {len(facts.storage.backups)} backups", ""

    def _gaps(self, storage: Storage) -> tuple[str, str, str]:
        holes = storage.archive.holes
        needed = [hole for hole in holes if hole.needed]
        if not needed:
            before = f"; {len(holes)} before the oldest backup" if holes else ""
            return OK, f"no segment is missing{before}", ""
        oldest = max(needed, key=lambda hole: (hole.current, hole.age))
        if not oldest.current:
            return (
                WARNING,
                f"restores from older backups end at {oldest.first}, which is missing; not of the newest one",
                f"expire takes them away in time: {self._pitr} expire {self._cluster}",
            )
        count = sum(hole.segments for hole in needed)
        names = oldest.first if oldest.first == oldest.last else f"{oldest.first} to {oldest.last}"
        return (
            self._hole_level(storage),
            f"{count} segments are missing, with WAL behind them: {names}",
            f"on the primary: ls -l pg_wal/{oldest.first}; if it is there, pitr-wal push {self._cluster} it;"
            f" if not, {self._pitr} backup {self._cluster}",
        )

    def _hole_level(self, storage: Storage) -> str:
        """CRITICAL, but for holes that are so new that what belongs there may be on its way."""
        needed = [hole.age for hole in storage.archive.holes if hole.needed and hole.current]
        return WARNING if needed and max(needed) < HOLE_GRACE else CRITICAL

    def _take(self) -> str:
        return f"{self._pitr} backup {self._cluster}"

    def _window(self, storage: Storage) -> tuple[str, str, str]:
        if not storage.backups:
            return CRITICAL, "nothing can be restored: there is no backup", self._take()
        good = storage.restorable
        newest = storage.backups[-1]
        if not good:
            return CRITICAL, f"nothing can be restored: {newest.label}: {newest.problem}", self._take()
        says = f"from {span(good[0].age)} ago ({good[0].label}) to LSN {good[-1].to_lsn}"
        if storage.archive.last_segment_age is not None:
            says += f", archived {span(storage.archive.last_segment_age)} ago"
        bad = [backup for backup in storage.backups if backup.problem]
        if newest.problem:
            return (
                CRITICAL,
                f"the newest backup {newest.label} cannot be restored: {newest.problem}; {says}",
                self._take(),
            )
        if good[-1].hole:
            return self._hole_level(storage), f"ends at a hole, {good[-1].hole}; {says}", self._take()
        if bad:
            return (
                WARNING,
                f"{len(bad)} backups cannot be restored, {bad[-1].label}: {bad[-1].problem}; {says}",
                f"{self._pitr} verify {self._cluster} {bad[-1].label}",
            )
        return OK, says, ""

    def _aged(self, backups: tuple[Stored, ...], what: str, limit: Limit) -> tuple[str, str, str]:
        if not backups:
            return CRITICAL, f"there is no {what} that can be restored", self._take()
        newest = min(backups, key=lambda backup: backup.age)
        level = over(newest.age, limit)
        return level, f"{newest.label}, {span(newest.age)} old", "" if level == OK else self._journal()

    def _journal(self) -> str:
        return f"journalctl -u pitr-backup@{self._cluster}; {self._take()}"

    def _full_backup(self, storage: Storage) -> tuple[str, str, str]:
        full = tuple(backup for backup in storage.restorable if backup.type == "full")
        return self._aged(full, "full backup", self._limits.full_age)

    def _backup(self, storage: Storage) -> tuple[str, str, str]:
        return self._aged(storage.restorable, "backup", self._limits.backup_age)

    def _verify(self, storage: Storage) -> tuple[str, str, str]:
        run = f"{self._pitr} verify {self._cluster} all"
        if storage.damaged:
            return CRITICAL, f"was found damaged: {', '.join(storage.damaged[:5])}", run
        limit = self._limits.verify_age
        if storage.verify_age is None:
            # What is younger than the limit could not have been verified yet.
            level = over(max((backup.age for backup in storage.backups), default=0.0), limit)
            return level, "no backup was verified yet", "" if level == OK else run
        level = over(storage.verify_age, limit)
        return level, f"whole ({storage.verify_level}) {span(storage.verify_age)} ago", "" if level == OK else run

    def _drill(self, storage: Storage) -> tuple[str, str, str]:
        run = f"pitr drill {self._cluster}"
        limit = self._limits.drill_age
        if storage.drill_failed and storage.drill_by_clock:
            return WARNING, "the last drill failed", f"journalctl -u pitr-drill@{self._cluster}"
        if storage.drill_failed:
            return WARNING, "the last drill failed", "open evidence/latest/evidence.json"
        if storage.drill_age is None:
            level = WARNING if limit.warning or limit.critical else OK
            return level, "no drill is known", "" if level == OK else run
        level = over(storage.drill_age, limit)
        return level, f"passed {span(storage.drill_age)} ago", "" if level == OK else run

    def _space(self, storage: Storage) -> tuple[str, str, str]:
        room = storage.room
        level = under(room.free_percent, self._limits.free_percent)
        says = f"{size(room.free)} free of {size(room.size)} ({room.free_percent:.0f} %)"
        days = room.days_left
        if days is not None:
            level = _worse(level, under(days, self._limits.days_left))
            says += f", full in about {days:.0f} days (an estimate from the last {span(room.growth_span)})"
        elif room.growth is None:
            says += "; how fast it fills is not known yet"
        largest = max((backup.stored_bytes for backup in storage.backups if backup.type == "full"), default=0)
        if largest and room.free < largest:
            level, says = CRITICAL, f"{says}: no room for another full backup ({size(largest)})"
        return level, says, "" if level == OK else f"{self._pitr} expire {self._cluster}; df -h <repository>"


def judge(facts: Facts, limits: Optional[Limits] = None, directory: str = "/usr/local/lib/pgdrill") -> list[Finding]:
    """One finding a check."""
    return Judge(facts, limits or Limits(), directory).findings()
