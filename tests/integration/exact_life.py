# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The life that the exactness suite restores: three timelines, a PITR of a PITR, backups between and during the phases.

::

    timeline 1   … one … two (under load) … fork 1 | abandoned 1 … stale … end of 1
    timeline 2                                     | … three … fork 2 | … end of 2
    timeline 3                                                        | … four … end of 3

``SCRIPT`` tells the events of each timeline before anything has happened, so that pytest can name its tests; the life
that is lived must be the one that was told.
"""

from __future__ import annotations

import os
import pickle
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ansible_collections.pgdrill.pitr.plugins.module_utils.backup import BaseBackup
from ansible_collections.pgdrill.pitr.plugins.module_utils.catalog import Backup
from ansible_collections.pgdrill.pitr.plugins.module_utils.incremental import Basis
from ansible_collections.pgdrill.pitr.plugins.module_utils.methods import make_backup
from ansible_collections.pgdrill.pitr.plugins.module_utils.postgres import query
from ansible_collections.pgdrill.pitr.tests.integration.exact_oracle import Event, Oracle, Record, World, parse_record
from ansible_collections.pgdrill.pitr.tests.integration.support import (
    SEGMENT_SIZE,
    Restored,
    Sandbox,
    Storage,
    fingerprint,
    until,
)

# What an event's record is, by the kind that SCRIPT gives it.
KINDS_OF_RECORD = {
    "commit": r"Transaction COMMIT",
    "abort": r"Transaction ABORT",
    "prepare": r"Transaction PREPARE",
    # DROP DATABASE marks the database before it removes the files; both come before its commit.
    "mark": r"Heap2? INPLACE",
}
# "step" is a commit that rewrites the status row; a restore point "after …" follows it.
SCRIPT: dict[int, dict[str, str]] = {
    1: {
        "born": "step", "object": "step",
        "plain": "step", "undone within": "abort", "subtransactions": "step",
        "tick 1": "commit", "tick 2": "commit", "ticks": "step",
        "rolled back": "abort", "other zone": "step",
        "database": "commit", "tablespace": "commit", "far table": "step", "unlogged table": "step",
        "pending prepared": "prepare", "doomed prepared": "prepare", "prepared": "step",
        "during 1": "step", "during 2": "step", "during 3": "step",
        "objects": "step", "fork 1": "step",
        "abandoned 1": "step", "pending committed on 1": "commit", "abandoned 2": "step",
        "database marked on 1": "mark", "database dropped on 1": "commit", "end of 1": "step",
    },
    2: {
        "second life": "step", "doomed rolled back": "abort", "copied database": "commit", "logged table": "step",
        "before three": "step", "after three": "step", "pending committed": "commit", "fork 2": "step",
        "abandoned 3": "step", "copy marked on 2": "mark", "copy dropped on 2": "commit", "end of 2": "step",
    },
    3: {
        "third life": "step", "far table dropped": "commit", "tablespace dropped": "commit",
        "database marked": "mark", "database dropped": "commit", "object removed": "step",
        "late prepared": "prepare", "before four": "step", "after four": "step",
        "only subtransactions": "step", "end of 3": "step",
    },
}  # fmt: skip
# Where backups are taken, each with the one before it in the same past.
POINTS = {"one": "", "two": "one", "stale": "two", "three": "two", "four": "three"}
# A restore point whose name is used again.
TWICE = "used twice"


@dataclass(frozen=True)
class BackupKind:
    """A kind of backup, since ``oldest``. ``take(sandbox, label, parent)`` takes one.

    ``parent`` is the label of the backup of this kind at the point before, at the first point that of the full one.
    """

    take: Callable[[Sandbox, str, str], Backup]
    oldest: int = 15
    settings: tuple[tuple[str, str], ...] = ()


def _incremental(sandbox: Sandbox, label: str, parent: str) -> Backup:
    folder, login = sandbox.folder, sandbox.server.login
    basis = Basis(folder, login, parent=parent)
    return BaseBackup(folder, login, sandbox.bin_dir, label=label, archive_timeout=30, basis=basis).take()


def _low_level(sandbox: Sandbox, label: str, _parent: str) -> Backup:
    folder, login = sandbox.folder, sandbox.server.login
    return make_backup("low_level", folder, login, sandbox.bin_dir, label=label, archive_timeout=30).take()


# One of each kind is taken at each of POINTS, the full one first. A further kind is one more line here.
BACKUP_KINDS: dict[str, BackupKind] = {
    "full": BackupKind(lambda sandbox, label, parent: sandbox.backup(label)),
    "incremental": BackupKind(_incremental, 17, (("summarize_wal", "on"),)),
    "low_level": BackupKind(_low_level),
}


def kinds(major: int) -> dict[str, BackupKind]:
    """Those that this version has."""
    return {name: kind for name, kind in BACKUP_KINDS.items() if major >= kind.oldest}


def label_of(point: str, kind: str) -> str:
    """A backup's label."""
    return point if kind == "full" else f"{point}-{kind}"


@dataclass
class _Noted:
    """An event between two positions, whose record is looked for when the life is over."""

    name: str
    timeline: int
    pattern: str
    begin: int
    end: int
    world: World


class History:
    """What remains of the life: a repository, and the oracle. Shared by all workers, read-only."""

    def __init__(self, bin_dir: str, directory: Path) -> None:
        with open(directory / "history.pickle", "rb") as stream:
            kept = pickle.load(stream)
        self.storage = Storage(bin_dir, directory / "life", directory / "life" / "repository")
        self.oracle: Oracle = kept["oracle"]
        self.events: dict[str, Event] = kept["events"]
        self.backups: dict[str, Backup] = kept["backups"]
        self.subtransaction: int = kept["subtransaction"]
        # Where CREATE TABLESPACE is replayed to, which no mapping changes.
        self.far = Path(kept["far"])

    def fingerprint(self) -> dict[str, str]:
        return fingerprint(self.storage.archive, self.storage.backups)


class Life:
    """Lives it, in ``directory``, and writes ``history.pickle`` there."""

    def __init__(self, bin_dir: str, major: int, directory: Path, template: Path) -> None:
        self._directory = directory
        self._kinds = kinds(major)
        self._bin_dir = bin_dir
        settings = {"max_prepared_transactions": "5", "wal_keep_size": "1GB", "max_replication_slots": "4"}
        for kind in self._kinds.values():
            settings.update(kind.settings)
        self._sandbox = Sandbox(bin_dir, directory / "life", template, settings=settings)
        self._world = World(databases={"postgres": ""})
        self._timeline = 1
        self._noted: list[_Noted] = []
        self._records: dict[int, list[Record]] = {}
        self._switches: dict[int, tuple[int, int]] = {}
        self._backups: dict[str, Backup] = {}
        self._servers = [self._sandbox.server]
        self._far = directory / "life" / "far"
        self._far.mkdir(mode=0o700)

    def live(self) -> None:
        try:
            self._sandbox.server.start()
            self._first()
            self._over(1)
            # The place of the tablespace is free for those who replay its creation.
            self._far.rename(self._far.with_name("far of 1"))
            self._far.mkdir(mode=0o700)
            xid = self._event("fork 1").xid
            self._branch({"recovery_target_xid": str(xid)}, "fork 1", "two")
            self._second()
            self._over(2)
            self._branch({"recovery_target_name": "after fork 2"}, "fork 2", "three")
            self._third()
            self._over(3)
        finally:
            for server in self._servers:
                server.close()
        # Neither is needed any more, and a tablespace's own place has to be free.
        for place in (self._directory / "life").glob("far?*"):
            shutil.rmtree(place)
        self._keep()

    # --- the phases

    def _first(self) -> None:
        sql = self._sandbox.server.sql
        sql("CREATE EXTENSION amcheck")
        sql("CREATE TABLE trail (phase text PRIMARY KEY)")
        self._step("born")
        self._step("object", "SELECT lo_from_bytea(700001, 'one')", objects={700001: "one"})
        self._backup("one")
        self._step("plain")
        self._point(TWICE)
        inner = "INSERT INTO trail VALUES ('{}')"
        self._step(
            "subtransactions",
            "SAVEPOINT a", inner.format("kept"), "RELEASE SAVEPOINT a",
            "SAVEPOINT b", inner.format("undone"), "ROLLBACK TO SAVEPOINT b",
            within=("undone within",),
            trail=self._world.trail | {"kept"},
        )  # fmt: skip
        self._subtransaction = int(sql("SELECT xmin::text FROM trail WHERE phase = 'kept'")[0][0])
        self._ticks()
        self._step("ticks")
        self._run([("rolled back", "abort", {})], "BEGIN", inner.format("rolled back"), "ROLLBACK")
        # From here on the server writes and reads its times in another zone.
        sql("ALTER SYSTEM SET timezone = 'Asia/Kathmandu'")
        sql("ALTER SYSTEM SET log_timezone = 'America/St_Johns'")
        sql("SELECT pg_reload_conf()")
        self._step("other zone", "SET LOCAL TIME ZONE 'Pacific/Chatham'")
        databases = {**self._world.databases, "reports": "other zone"}
        self._run([("database", "commit", {"databases": databases})], "CREATE DATABASE reports TEMPLATE postgres")
        made = {"tablespaces": frozenset({"far"})}
        self._run([("tablespace", "commit", made)], f"CREATE TABLESPACE far LOCATION '{self._far}'")
        rows = "CREATE TABLE far_rows TABLESPACE far AS SELECT generate_series(1, 100) AS v"
        self._step("far table", rows, "CREATE INDEX far_index ON far_rows (v) TABLESPACE far", far_rows=100)
        scratch = "CREATE UNLOGGED TABLE scratch AS SELECT generate_series(1, 100) AS v"
        self._step("unlogged table", scratch, "CREATE INDEX ON scratch (v)", scratch=0)
        for gid in ("pending", "doomed"):
            prepared = {"prepared": self._world.prepared | {gid}}
            event = (f"{gid} prepared", "prepare", prepared)
            self._run([event], "BEGIN", inner.format(gid), f"PREPARE TRANSACTION '{gid}'")
        self._step("prepared")
        self._backup("two", ("during 1", "during 2", "during 3"))
        self._point(TWICE)
        put = "SELECT lo_put(700001, 0, 'two')"
        self._step("objects", put, "SELECT lo_from_bytea(700002, 'new')", objects={700001: "two", 700002: "new"})
        self._step("fork 1")
        self._step("abandoned 1")
        self._committed("pending committed on 1")
        self._backup("stale")
        self._step("abandoned 2")
        self._dropped("reports", "database marked on 1", "database dropped on 1")
        self._point("only on 1")
        self._step("end of 1")

    def _second(self) -> None:
        self._step("second life")
        prepared = {"prepared": self._world.prepared - {"doomed"}}
        self._run([("doomed rolled back", "abort", prepared)], "ROLLBACK PREPARED 'doomed'")
        databases = {**self._world.databases, "copy": "other zone"}
        create = "CREATE DATABASE copy TEMPLATE reports STRATEGY file_copy"
        self._run([("copied database", "commit", {"databases": databases})], create)
        # Nothing of it has survived the recovery; from here on it does.
        self._step("logged table", "INSERT INTO scratch VALUES (1), (2)", "ALTER TABLE scratch SET LOGGED", scratch=2)
        self._step("before three")
        self._backup("three")
        self._point(TWICE)
        self._step("after three")
        self._committed("pending committed")
        self._step("fork 2")
        self._step("abandoned 3")
        self._dropped("copy", "copy marked on 2", "copy dropped on 2")
        self._step("end of 2")

    def _third(self) -> None:
        self._step("third life")
        self._run([("far table dropped", "commit", {"far_rows": -1})], "DROP TABLE far_rows")
        self._run([("tablespace dropped", "commit", {"tablespaces": frozenset()})], "DROP TABLESPACE far")
        self._dropped("reports", "database marked", "database dropped")
        self._step("object removed", "SELECT lo_unlink(700001)", objects={700002: "new"})
        late = {"prepared": self._world.prepared | {"late"}}
        insert = "INSERT INTO trail VALUES ('late')"
        self._run([("late prepared", "prepare", late)], "BEGIN", insert, "PREPARE TRANSACTION 'late'")
        self._step("before four")
        self._backup("four")
        self._step("after four")
        self._step("only subtransactions", status="SAVEPOINT a")
        self._step("end of 3")

    # --- what they are made of

    def _position(self, connection: Any) -> int:
        return int(query(connection, "SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn")[0][0])

    def _run(self, events: Sequence[tuple[str, str, Mapping[str, Any]]], *statements: str) -> None:
        """Run statements in one session and note the (name, kind, change of the world) that they bring about."""
        with self._sandbox.server.connection() as connection:
            begin = self._position(connection)
            for statement in statements:
                query(connection, statement)
            end = self._position(connection)
        for name, kind, change in events:
            self._world = replace(self._world, **change)
            pattern = KINDS_OF_RECORD[kind]
            self._noted.append(_Noted(name, self._timeline, pattern, begin, end, self._world))

    def _step(self, name: str, *statements: str, status: str = "", **change: Any) -> None:
        """A transaction that rewrites the status row, and a restore point behind it. ``status`` comes before.

        ``within``: aborts of subtransactions, which are records of their own and change nothing yet.
        """
        earlier: Sequence[str] = change.pop("within", ())
        trail = change.pop("trail", self._world.trail) | {name}
        work = ["BEGIN", *statements]
        work += [status] if status else []
        work += [f"UPDATE status SET phase = '{name}'", f"INSERT INTO trail VALUES ('{name}')", "COMMIT"]
        aborts = [(one, "abort", {}) for one in earlier]
        self._run([*aborts, (name, "commit", {**change, "phase": name, "trail": trail})], *work)
        self._point(f"after {name}")

    def _ticks(self) -> None:
        """Two commits within one millisecond."""
        both = "; ".join(
            f"UPDATE status SET phase = 'tick {number}'; INSERT INTO trail VALUES ('tick {number}'); COMMIT"
            for number in (1, 2)
        )
        first = {"phase": "tick 1", "trail": self._world.trail | {"tick 1"}}
        second = {"phase": "tick 2", "trail": first["trail"] | {"tick 2"}}
        self._run([("tick 1", "commit", first), ("tick 2", "commit", second)], f"DO $$ BEGIN {both}; END $$")

    def _committed(self, name: str) -> None:
        change = {"prepared": self._world.prepared - {"pending"}, "trail": self._world.trail | {"pending"}}
        self._run([(name, "commit", change)], "COMMIT PREPARED 'pending'")

    def _dropped(self, database: str, marked: str, dropped: str) -> None:
        rest = {name: phase for name, phase in self._world.databases.items() if name != database}
        mark = {"databases": rest, "invalid": frozenset({database})}
        self._run([(marked, "mark", mark), (dropped, "commit", {"invalid": frozenset()})], f"DROP DATABASE {database}")

    def _point(self, name: str) -> None:
        self._sandbox.server.sql("SELECT pg_create_restore_point(%s)", name)

    def _backup(self, point: str, during: Sequence[str] = ()) -> None:
        """One of each kind, the full one under the load of the phases ``during``."""
        for name, kind in self._kinds.items():
            label = label_of(point, name)
            parent = label_of(POINTS[point], name) if POINTS[point] else point
            loaded = during and name == "full"
            self._backups[label] = (
                self._under_load(label, during) if loaded else kind.take(self._sandbox, label, parent)
            )

    def _under_load(self, label: str, during: Sequence[str]) -> Backup:
        problems: list[BaseException] = []

        def load() -> None:
            try:
                copying = "SELECT count(*) FROM pg_stat_progress_basebackup WHERE phase LIKE 'streaming%%'"
                until(lambda: self._sandbox.server.value(copying), "the backup's copy")
                for name in during:
                    self._step(name)
            except BaseException as error:
                problems.append(error)

        thread = threading.Thread(target=load)
        thread.start()
        # Slow enough for three transactions.
        backup = self._sandbox.backup(label, max_rate="1M")
        thread.join()
        if problems:
            raise problems[0]
        last = self._noted[-1]
        assert backup.start_lsn < last.begin and last.end < backup.stop_lsn, "the load was not within the backup"
        return backup

    # --- timelines

    def _branch(self, options: dict[str, Any], phase: str, backup: str) -> None:
        """The next life begins at this target."""
        data = self._directory / "life" / f"data{self._timeline + 1}"
        mapping = {item.location: f"{self._far}{self._timeline + 1}" for item in self._backups[backup].tablespaces}
        more = {"archive_after": "none-until-promoted", "tablespace_mapping": mapping, "backup": backup}
        cluster = Restored(self._sandbox, data, options, **more)
        self._servers.append(cluster.server)
        cluster.run()
        assert cluster.phase == phase
        cluster.recovery.accept()
        parent, self._timeline = self._timeline, self._timeline + 1
        name = f"{self._timeline:08X}.history"
        last = (data / "pg_wal" / name).read_text(encoding="utf-8").splitlines()[-1].split("\t")
        high, low = last[1].split("/")
        assert int(last[0]) == parent
        self._switches[self._timeline] = (parent, int(high, 16) << 32 | int(low, 16))
        self._sandbox.server = cluster.server
        self._world = next(noted.world for noted in self._noted if noted.name == phase)

    def _over(self, timeline: int) -> None:
        """Archive everything, stop, and read what was written."""
        self._sandbox.probe()
        server = self._sandbox.server
        server.stop()
        last = self._sandbox.segments(timeline)[-1].name[:24]
        # Of segments of 1 MB there are 4096 to each step of the middle part.
        end = (int(last[8:16], 16) << 32) + (int(last[16:], 16) + 1) * SEGMENT_SIZE
        pg_wal = server.data / "pg_wal"
        begin = self._switches.get(timeline, (0, int(self._backups["one"].start_lsn)))[1]
        argv = [f"--path={pg_wal}", f"--timeline={timeline}", f"--start={_lsn(begin)}", f"--end={_lsn(end)}"]
        shown = subprocess.run(
            [os.path.join(self._bin_dir, "pg_waldump"), *argv], capture_output=True, text=True, check=False,
            env={"PATH": "/usr/bin:/bin", "TZ": "UTC", "LC_ALL": "C"},
        )  # fmt: skip
        found = [parse_record(line, timeline) for line in shown.stdout.splitlines()]
        self._records[timeline] = [record for record in found if record is not None and begin <= record.lsn < end]
        assert self._records[timeline], shown.stderr

    def _event(self, name: str) -> Record:
        return next(event.record for event in self._events() if event.name == name)

    def _events(self) -> list[Event]:
        """The events of the timelines that are over, each with its record; those before the first backup have none."""
        events: list[Event] = []
        taken: set[Record] = set()
        for noted in self._noted:
            if noted.timeline not in self._records or noted.end <= self._records[1][0].lsn:
                continue
            record = next(
                (
                    record
                    for record in self._records[noted.timeline]
                    if noted.begin <= record.lsn < noted.end
                    and record not in taken
                    and re.match(noted.pattern, f"{record.kind} {record.text}")
                ),
                None,
            )
            assert record is not None, f"there is no record of '{noted.name}'"
            taken.add(record)
            events.append(Event(noted.name, record, noted.world))
        return events

    def _keep(self) -> None:
        told = [(timeline, name) for timeline, names in SCRIPT.items() for name in names]
        assert [(noted.timeline, noted.name) for noted in self._noted] == told
        events = self._events()
        known = {event.record for event in events}
        commits = [r for records in self._records.values() for r in records if r.ended is not None]
        unknown = [record for record in commits if record not in known]
        assert not unknown, f"the oracle must know every transaction: {unknown}"
        first, second = (event.record for event in events if event.name in ("tick 1", "tick 2"))
        assert first.time and second.time and 0 < (second.time - first.time).total_seconds() < 0.001
        # The world that the first backup finds.
        born = next(noted for noted in self._noted if noted.name == "object")
        start = self._records[1][0]
        oracle = Oracle(self._records, self._switches, [Event("object", start, born.world), *events], self._backups)
        kept = {
            "oracle": oracle,
            "events": {event.name: event for event in events},
            "backups": self._backups,
            "subtransaction": self._subtransaction,
            "far": str(self._far),
        }
        temporary = self._directory / "history.tmp"
        temporary.write_bytes(pickle.dumps(kept))
        temporary.rename(self._directory / "history.pickle")


def _lsn(value: int) -> str:
    return f"{value >> 32:X}/{value & 0xFFFFFFFF:X}"
