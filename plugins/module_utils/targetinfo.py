# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Which transaction destroyed something, and how to restore to the moment before it. Reads; changes nothing.

Just before a transaction is just before its commit record: ``recovery_target_xid`` or the record's LSN, not inclusive
(recoveryStopsBefore of xlogrecovery.c). A time is no such target, as two transactions may have the same one. DROP
DATABASE and DROP TABLESPACE are done when their own records are replayed, whatever becomes of the transaction; their
target is an LSN before the first thing that no rollback takes back.
"""

from __future__ import annotations

import datetime
import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .catalog import Backup, broken_chains
from .errors import PitrError
from .findscan import FindScanner, Path, Search
from .findtarget import COUNTED, KINDS, LOSSES, Ended, Touched, Verdict, judge
from .index import ArchiveIndex, scan
from .plan import Location, RefusedError, plan, target_timeline
from .postgres import Login
from .relnames import Names, Relation, Wanted, parse_relation
from .repository import Chapter, ClusterFolder
from .statements import LogReader, Statement, Zone
from .stored import damaged_backups, stored_backups
from .target import RecoveryTarget, format_time, parse_timeline
from .wal import Lsn

# Transactions that are kept while the rest is read; the names of their relations are asked for afterwards.
POOL = 2000
# A statement's transaction is looked for within this time after it, when the log does not tell its id.
WINDOW = datetime.timedelta(minutes=10)
MAX_RELATIONS = 50
_WEIGHTS = {"drop_database": 3, "drop": 2, "truncate": 2, "drop_tablespace": 1}


@dataclass(frozen=True)
class Question:
    """What is looked for. Times are in UTC; ``timeline`` is latest or a number; ``min_rows`` is for kinds with rows."""

    relation: str = ""
    database: str = ""
    since: datetime.datetime | None = None
    until: datetime.datetime | None = None
    kinds: tuple[str, ...] = LOSSES
    min_rows: int = 1
    timeline: str = "latest"
    limit: int = 10
    log_files: tuple[str, ...] = ()
    log_timezone: str = ""
    log_line_prefix: str = ""

    def __post_init__(self) -> None:
        if self.since is not None and self.until is not None and self.until < self.since:
            raise PitrError(f"until ({format_time(self.until)}) is before since ({format_time(self.since)}).")
        unknown = set(self.kinds) - set(KINDS)
        if unknown or not self.kinds:
            raise PitrError(f"kinds: {', '.join(sorted(unknown)) or 'nothing'} is not among {', '.join(KINDS)}.")


@dataclass
class Found:
    """One transaction that may be the one. ``match``: yes, or possible when its relations have no names."""

    ended: Ended
    verdict: Verdict
    match: str = "yes"
    log: list[tuple[Statement, str]] = field(default_factory=list)

    @property
    def rank(self) -> tuple[int, ...]:
        """What is more likely is higher."""
        verdict = self.verdict
        weight = max((_WEIGHTS.get(kind, 0) for kind in verdict.kinds), default=0)
        rows = verdict.rows("delete") + verdict.rows("update")
        return (
            self.match == "yes", bool(self.log), verdict.certain, weight, rows, verdict.rows("insert"),
            -int(self.ended.lsn),
        )  # fmt: skip


class TargetInfo:
    """A search in one chapter of a cluster's archive."""

    def __init__(
        self, folder: ClusterFolder, chapter: Chapter, bin_dir: str, question: Question, login: Login | None = None
    ) -> None:
        """Raises PitrError when the server that ``login`` leads to is not of this cluster."""
        self._folder = folder
        self._chapter = chapter
        self._question = question
        self._notes: list[str] = []
        self._index: ArchiveIndex = scan(folder, chapter)
        self._names = Names(login, chapter)
        self._wanted: Wanted = parse_relation(question.relation)
        self._database = self._names.database_oid(question.database)
        self._wanted = self._names.resolve(self._wanted, self._database)
        self._backups: list[Backup] = [
            backup for backup in stored_backups(folder) if backup.system_identifier == chapter.system_identifier
        ]
        timeline = target_timeline(
            RecoveryTarget(timeline=parse_timeline(question.timeline)), self._index.tree, self._backups, "auto"
        )
        self._path = Path(self._index, timeline)
        if not len(self._path):
            raise PitrError(f"The archive holds no WAL of timeline {timeline} or what led to it. Nothing can be found.")
        self._scanner = FindScanner(folder, chapter, self._index, bin_dir)
        self._scanner.inserts = "insert" in question.kinds
        self._search = Search(self._scanner, self._path)
        self._statements: list[Statement] = []
        self._met = 0

    def run(self) -> dict[str, Any]:
        """Search, and return what the module returns."""
        question = self._question
        self._read_logs()
        begin = self._search.begin(question.since)
        pool = self._collect(begin)
        ended_at = self._search.last_time
        read = self._search.segments_read
        self._complain(begin, ended_at)
        self._name(pool)
        pool = [found for found in map(self._matched, pool) if found is not None]
        used = self._combine(pool)
        pool.sort(key=lambda found: found.rank, reverse=True)
        best = pool[: question.limit]
        best = self._complete(best, begin)
        if len(pool) > len(best):
            more = f"{len(pool)} transactions fit, the {len(best)} most likely ones are shown"
            self._notes.append(f"{more}; narrow since and until, name the relation, or raise min_rows or limit")
        return {
            "candidates": [self._candidate(found) for found in best],
            "matches": len(pool),
            "transactions": self._met,
            "timeline": self._path.timeline,
            "first_segment": self._path.name(begin),
            "segments_read": read,
            "read_until": format_time(ended_at) if ended_at else None,
            "log_statements": [
                {**statement.to_dict(), "kinds": list(statement.kinds)}
                for statement in self._statements
                if id(statement) not in used
            ][: 5 * question.limit],
            "notes": self._notes,
        }

    def _read_logs(self) -> None:
        question = self._question
        if not question.log_files:
            return
        reader = LogReader(
            Zone(question.log_timezone or self._names.log_timezone),
            question.log_line_prefix or self._names.log_line_prefix,
            question.since - WINDOW if question.since else None,
            question.until,
            self._wanted.name,
        )
        self._statements = [
            statement
            for statement in reader.statements(question.log_files)
            if set(statement.kinds) & set(question.kinds) and self._is_database(statement)
        ]
        if reader.left_out:
            self._notes.append(f"the logs have {reader.left_out} more such statements, which were left out")
        if not self._statements:
            self._notes.append(
                f"no such statement in {len(reader.files)} log file(s), {reader.lines} entries; log_statement = ddl"
                " logs DROP and TRUNCATE, mod also DELETE and UPDATE"
            )

    def _is_database(self, statement: Statement) -> bool:
        name = self._names.database(self._database) if self._database else ""
        return not (name and statement.database) or statement.database == name or "drop_database" in statement.kinds

    def _collect(self, begin: int) -> list[Found]:
        """The transactions that fit, best POOL of them; everything else is forgotten at once."""
        question = self._question
        named = {statement.xid & 0xFFFFFFFF for statement in self._statements if statement.xid}
        heap: list[tuple[tuple[int, ...], Found]] = []
        kept: list[Found] = []
        for ended in self._search.ended(begin, question.until):
            if question.since is not None and ended.time < question.since:
                continue
            if question.until is not None and ended.time > question.until:
                continue
            self._met += 1
            found = Found(ended, judge(ended))
            if not self._fits(found):
                continue
            if ended.xid in named and len(kept) < POOL:
                kept.append(found)
            elif len(heap) < POOL:
                heapq.heappush(heap, (found.rank, found))
            else:
                heapq.heappushpop(heap, (found.rank, found))
        return kept + [found for _rank, found in heap]

    def _fits(self, found: Found) -> bool:
        """Whether a transaction is of a kind, a size, a database and a relation that is looked for."""
        question, verdict = self._question, found.verdict
        kinds = [
            kind
            for kind in verdict.kinds
            if kind in question.kinds and (kind not in COUNTED or verdict.rows(kind) >= question.min_rows)
        ]
        touched = [item for item in verdict.touched if item.kind in kinds]
        if self._database is not None:
            touched = [
                item for item in touched if item.database in (self._database, 0) or item.kind == "drop_tablespace"
            ]
            if not touched:
                return False
        if not kinds:
            return False
        wanted = self._wanted
        if wanted.numbers or wanted.file:
            return any(_is_numbered(item, wanted) for item in touched)
        return True

    def _complain(self, begin: int, ended_at: datetime.datetime | None) -> None:
        question = self._question
        for hole in self._path.holes(begin):
            self._notes.append(f"WAL is missing, and nothing is known of what is in it: {hole}")
        if self._search.forgotten:
            self._notes.append(f"{self._search.forgotten} records of too many open transactions were not counted")
        first = self._path.name(0)
        if question.since is not None and begin == 0:
            self._notes.append(f"the archive begins with {first}; what ended before that is not known")
        if ended_at is None:
            self._notes.append("no transaction ended in the WAL that was read")
        wanted = question.until or question.since
        if wanted is not None and (ended_at is None or ended_at < wanted):
            last = f"at {format_time(ended_at)}" if ended_at else "before that"
            self._notes.append(
                f"the last transaction in the archive ended {last}; if what you look for is later, archive it first"
                " (SELECT pg_switch_wal()) and wait until it is there"
            )

    def _name(self, pool: Iterable[Found]) -> None:
        """Ask the server for all names at once, a database at a time."""
        oids: dict[int, set[int]] = {}
        files: dict[int, set[int]] = {}
        for found in pool:
            for item in found.verdict.touched[: 4 * MAX_RELATIONS]:
                if item.oid is not None:
                    oids.setdefault(item.database, set()).add(item.oid)
                elif item.file is not None:
                    files.setdefault(item.database, set()).add(item.file.number)
        for database in {*oids, *files}:
            if database:
                self._names.learn(database, oids.get(database, ()), files.get(database, ()))

    def _relation(self, item: Touched) -> Relation | None:
        return self._names.of(item.database, item.oid, item.file)

    def _matched(self, found: Found) -> Found | None:
        """Compare with the relation's name, as far as that can be told."""
        name = self._wanted.name
        if not name:
            return found
        unknown = False
        for item in found.verdict.touched:
            if item.kind not in self._question.kinds:
                continue
            number = item.file.number if item.file is not None else item.oid
            numbers = {(item.database, number), (item.database, item.oid)} - {(item.database, None)}
            if item.kind == "drop_database" or numbers & self._wanted.by_server:
                return found
            relation = self._relation(item)
            if relation is None:
                unknown = True
            elif name in (relation.name, relation.name.partition(".")[2], relation.toast_of):
                return found
        if not unknown:
            return None
        found.match = "possible"
        return found

    def _combine(self, pool: list[Found]) -> set[int]:
        """Give each statement of the logs to its transaction: by its id, else to the next one that it can be."""
        used: set[int] = set()
        by_xid: dict[int, list[Found]] = {}
        for found in pool:
            for xid in (found.ended.xid, *found.ended.subxids):
                by_xid.setdefault(xid, []).append(found)
        by_time = sorted(pool, key=lambda found: found.ended.time)
        for statement in self._statements:
            # An id comes back after 2^32 others: the first commit after the statement is meant.
            same = [
                found
                for found in by_xid.get(statement.xid & 0xFFFFFFFF, ())
                if statement.xid and found.ended.time >= statement.time
            ]
            how = "its transaction id"
            if not same and not statement.xid:
                same = [found for found in by_time if self._may_be(statement, found)]
                how = "the time: it is the next such transaction to commit after the statement"
            if same:
                found = min(same, key=lambda each: each.ended.time)
                found.log.append((statement, how))
                if self._wanted.name and statement.xid:
                    found.match = "yes"
                used.add(id(statement))
        for found in pool:
            found.log.sort(key=lambda entry: entry[0].time, reverse=True)
        return used

    def _may_be(self, statement: Statement, found: Found) -> bool:
        ended = found.ended
        if not statement.time <= ended.time <= statement.time + WINDOW:
            return False
        database = statement.database
        names = {self._names.database(item.database) for item in found.verdict.touched} - {""}
        if database and names and database not in names and "drop_database" not in statement.kinds:
            return False
        return bool(set(statement.kinds) & set(found.verdict.kinds))

    def _complete(self, best: list[Found], begin: int) -> list[Found]:
        """Read again, from further back, what may have begun before the WAL that was read."""
        partial = [found for found in best if found.ended.began_before]
        if not partial or begin == 0:
            return best
        xids = [xid for found in partial for xid in (found.ended.xid, *found.ended.subxids)]
        oldest = min(xids, key=lambda xid: (xid - partial[0].ended.xid + 0x80000000) & 0xFFFFFFFF)
        earlier = self._search.before(begin, oldest)
        if earlier is None:
            return best
        last = max(found.ended.time for found in partial)
        again = {ended.lsn: ended for ended in self._search.ended(earlier, last, xids)}
        result = []
        for found in best:
            ended = again.get(found.ended.lsn)
            if ended is not None:
                found = Found(ended, judge(ended), found.match, found.log)
                if not self._fits(found):
                    continue
            result.append(found)
        self._name(result)
        return sorted(result, key=lambda found: found.rank, reverse=True)

    def _candidate(self, found: Found) -> dict[str, Any]:
        ended, verdict = found.ended, found.verdict
        databases = [database for database in dict.fromkeys(item.database for item in verdict.touched) if database]
        settings, notes = self._settings(ended, verdict)
        relations = self._relations(verdict)
        return {
            "xid": ended.xid,
            "commit_time": format_time(ended.time),
            "lsn": str(ended.lsn),
            "timeline": ended.timeline,
            "kinds": list(verdict.kinds),
            "certain": verdict.certain and found.match == "yes",
            "database": databases[0] if databases else None,
            "database_name": self._names.database(databases[0]) if databases else "",
            "relations": relations[:MAX_RELATIONS],
            "relations_in_all": len(relations),
            "deleted_rows": verdict.rows("delete"),
            "updated_rows": verdict.rows("update"),
            "inserted_rows": verdict.rows("insert") if self._scanner.inserts else None,
            "removed_files": len(ended.removed),
            "subtransactions": len(ended.subxids),
            "complete": not ended.began_before,
            "prepared_as": ended.account.gid or None,
            "log": [{**statement.to_dict(), "matched_by": how} for statement, how in found.log],
            **settings,
            **self._plan(ended, settings["settings"]),
            "notes": [*self._doubts(found), *verdict.notes, *notes],
        }

    def _doubts(self, found: Found) -> list[str]:
        notes = []
        if found.match == "possible":
            notes.append(f"that it is about {self._wanted.name} is only possible: see why its relations have no names")
        if found.ended.began_before:
            notes.append("its first records are not in the WAL that was read; it has touched at least what is shown")
        return notes

    def _relations(self, verdict: Verdict) -> list[dict[str, Any]]:
        result: list[dict[str, Any]] = []
        for item in verdict.touched:
            relation = self._relation(item)
            if relation is not None and item.kind == "truncate" and not relation.is_table:
                # Indexes and the TOAST table go with their table.
                continue
            name = relation.name if relation is not None else ""
            if item.kind == "drop_database":
                name = self._names.database(item.database)
            oid = item.oid if item.oid is not None or relation is None else relation.oid
            entry: dict[str, Any] = {
                "kind": item.kind,
                "oid": oid,
                "file": str(item.file) if item.file is not None else None,
                "rows": item.rows,
                "name": name or None,
                "toast_of": (relation.toast_of or None) if relation is not None else None,
                "named_by": self._names.source if name else None,
                "unnamed_because": None if name else self._names.reason(item.database, item.oid),
            }
            if oid is None or not any(other["oid"] == oid and other["kind"] == item.kind for other in result):
                result.append(entry)
        return result

    def _settings(self, ended: Ended, verdict: Verdict) -> tuple[dict[str, Any], list[str]]:
        """The recovery settings that stop just before it, and what is to be known about them."""
        timeline = str(self._path.timeline)
        common = {"recovery_target_inclusive": False, "recovery_target_timeline": timeline}
        by_xid = {"recovery_target_xid": str(ended.xid), **common}
        point = _point(ended, verdict)
        by_lsn = {"recovery_target_lsn": str(point), **common}
        if point == ended.lsn:
            notes = []
            first = ended.account.first_lsn
            paused = None if ended.began_before else by_lsn
            if set(verdict.kinds) & {"drop", "truncate", "rewrite"} and paused is not None:
                # A standby holds the exclusive locks that it has met in WAL until it meets the transaction's end
                # (StandbyAcquireAccessExclusiveLock). Nobody else can have changed the relation meanwhile.
                paused = {"recovery_target_lsn": str(first), **common}
                notes.append(
                    "a server that is paused just before the commit holds the transaction's locks, and its relations"
                    " cannot be read there; promote it, or pause before its first record (settings_paused)"
                )
            found = {"settings": by_xid, "settings_lsn": by_lsn, "settings_paused": paused}
            return {**found, "variables": _variables(by_xid)}, notes
        note = (
            "what it dropped is gone when that is replayed, before the commit: recovery has to stop at an LSN before"
            f" that; recovery_target_xid {ended.xid} would be too late"
        )
        found = {"settings": by_lsn, "settings_lsn": by_lsn, "settings_paused": by_lsn}
        return {**found, "variables": _variables(by_lsn)}, [note]

    def _plan(self, ended: Ended, settings: dict[str, Any]) -> dict[str, Any]:
        """What a restore to just before it would begin with, or why there is none."""
        target = RecoveryTarget.from_options(settings)
        location = Location(ended.lsn, ended.timeline, ended.time) if target.kind == "xid" else None
        damaged = broken_chains(self._backups, damaged_backups(self._folder, self._backups))
        try:
            planned = plan(self._backups, self._index, target, "auto", damaged, location, None)
        except RefusedError as error:
            return {"backup": None, "plan": None, "refusals": [refusal.to_dict() for refusal in error.refusals]}
        return {"backup": planned.backup.label, "plan": planned.to_dict(), "refusals": []}


def _is_numbered(item: Touched, wanted: Wanted) -> bool:
    if wanted.file is not None:
        return item.file == wanted.file
    return item.oid in wanted.numbers or (item.file is not None and item.file.number in wanted.numbers)


def _point(ended: Ended, verdict: Verdict) -> Lsn:
    """Where the last record that may be replayed ends."""
    final = "drop_database" in verdict.kinds or "drop_tablespace" in verdict.kinds
    before = ended.account.point_of_no_return
    return before if final and before is not None else ended.lsn


def _variables(settings: dict[str, Any]) -> str:
    """The role's variables for these settings, as ansible-playbook takes them."""
    words: Sequence[str] = [
        f"-e {name.replace('recovery_target_', 'restore_target_')}={str(value).lower() if value is False else value}"
        for name, value in settings.items()
    ]
    return " ".join(words)
