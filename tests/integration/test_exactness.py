# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Every kind of target at every boundary of a long life lands on the row that an independent oracle has predicted.

Few of the cases run by default: a sample in which each event, each target, each backup and each timeline occurs. Its
seed is in the header of the run, and PGDRILL_TEST_EXACT_SEED repeats it; ``make exactness`` runs them all.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils.plan import RefusedError
from ansible_collections.pgdrill.pitr.plugins.module_utils.recovery import contradiction
from ansible_collections.pgdrill.pitr.plugins.module_utils.target import format_time, parse_time
from ansible_collections.pgdrill.pitr.plugins.module_utils.wal import Lsn
from ansible_collections.pgdrill.pitr.tests.integration.exact_life import (
    BACKUP_KINDS,
    POINTS,
    SCRIPT,
    TWICE,
    History,
    Life,
    kinds,
    label_of,
)
from ansible_collections.pgdrill.pitr.tests.integration.exact_oracle import (
    TOO_EARLY,
    Event,
    Record,
    Refused,
    Stop,
    World,
)
from ansible_collections.pgdrill.pitr.tests.integration.support import Restored, Server

ALL = os.environ.get("PGDRILL_TEST_EXACT") == "all"
# tests/integration/conftest.py has set it, for all workers the same.
SEED = os.environ.get("PGDRILL_TEST_EXACT_SEED", "0")
MAJOR = int(os.environ.get("PGDRILL_TEST_PG") or 18)
TICK = datetime.timedelta(microseconds=1)
EXCLUSIVE = {"recovery_target_inclusive": False}

Options = dict[str, Any]
Make = Callable[[History], Options]


# --- targets


def _xid(event: Event, _next: Record) -> Options:
    return {"recovery_target_xid": str(event.record.ended or event.record.xid)}


def _time(shift: datetime.timedelta) -> Callable[[Event, Record], Options]:
    def make(event: Event, _next: Record) -> Options:
        assert event.record.time is not None
        return {"recovery_target_time": format_time(event.record.time + shift)}

    return make


def _lsn(value: int) -> Options:
    return {"recovery_target_lsn": str(Lsn(value))}


# What can be asked for at an event's record; ``_next`` is the record behind it.
AT_RECORD: dict[str, Callable[[Event, Record], Options]] = {
    "lsn of its record": lambda event, _next: _lsn(event.record.lsn),
    "lsn within its record": lambda event, _next: _lsn(event.record.lsn + 1),
    "lsn just before the next record": lambda _event, after: _lsn(after.lsn - 1),
    "lsn of the next record": lambda _event, after: _lsn(after.lsn),
}
AT_TRANSACTION: dict[str, Callable[[Event, Record], Options]] = {
    "xid": _xid,
    "time of its end": _time(datetime.timedelta(0)),
    "time just before": _time(-TICK),
    "time just after": _time(TICK),
}


@dataclass(frozen=True)
class Case:
    """One restore. ``make`` gives the target's options, ``facets`` are what a sample has to cover."""

    name: str
    make: Make
    timeline: str
    backup: str
    facets: frozenset[str]


def _case(what: str, make: Make, timeline: str, backup: str, *facets: str) -> Case:
    name = f"{what}, timeline {timeline}, backup {backup}"
    return Case(name, make, timeline, backup, frozenset({*facets, f"timeline {timeline}", f"backup {backup}"}))


def _at(name: str, recipe: Callable[[Event, Record], Options], more: Options) -> Make:
    def make(history: History) -> Options:
        event = history.events[name]
        path = history.oracle.records[event.record.timeline]
        return {**recipe(event, path[path.index(event.record) + 1]), **more}

    return make


def _fixed(options: Options) -> Make:
    return lambda history: dict(options)


def _labels() -> list[str]:
    return [label_of(point, kind) for point in POINTS for kind in kinds(MAJOR)]


def _targets_of(timeline: int, name: str, kind: str) -> list[tuple[str, Make]]:
    recipes = {**AT_RECORD, **(AT_TRANSACTION if kind != "mark" else {})}
    if kind == "prepare":
        # PREPARE ends nothing; its transaction may be ended elsewhere, or never.
        recipes = {**AT_RECORD, "xid": _xid}
    targets = []
    for what, recipe in recipes.items():
        targets.append((f"{what}, inclusive", _at(name, recipe, {})))
        targets.append((f"{what}, exclusive", _at(name, recipe, EXCLUSIVE)))
    if kind == "step":
        targets.append(("name", _fixed({"recovery_target_name": f"after {name}"})))
    return targets


def _of_events() -> Iterator[Case]:
    """Every target at every event: on its own timeline, on the newest, and from the backups in turn."""
    turn = 0
    for number, names in SCRIPT.items():
        for name, kind in names.items():
            if name in ("born", "object"):
                # Nothing was backed up yet.
                continue
            targets = _targets_of(number, name, kind)
            for what, make in targets:
                for timeline in (str(number), "latest") if number < max(SCRIPT) else ("latest",):
                    yield _case(f"{name}: {what}", make, timeline, "auto", name, what)
            for label in _labels():
                turn += 1
                what, make = targets[turn % len(targets)]
                yield _case(f"{name}: {what}", make, str(number), label, name, what)
                what, make = targets[(turn + 3) % len(targets)]
                yield _case(f"{name}: {what}", make, ("latest", "2", "current")[turn % 3], label, name, what)


def _switch(number: int, shift: int, more: Options) -> Make:
    return lambda history: {**_lsn(history.oracle.switches[number][1] + shift), **more}


def _end(number: int, shift: int, more: Options) -> Make:
    """At the last archived record of a timeline."""
    return lambda history: {**_lsn(history.oracle.records[number][-1].lsn + shift), **more}


def _bound(label: str, what: str, shift: int, more: Options) -> Make:
    """At the begin or the end of a backup, in bytes or microseconds from there."""

    def make(history: History) -> Options:
        backup = history.backups[label]
        value = getattr(backup, what) if what != "end record" else Lsn(history.oracle.end_of(backup).lsn)
        if isinstance(value, datetime.datetime):
            return {"recovery_target_time": format_time(value + shift * TICK), **more}
        return {**_lsn(value + shift), **more}

    return make


def _special() -> Iterator[Case]:
    """Targets that are no event: the ends of WAL, switches, backups, and what is not there."""
    for side, more in (("inclusive", {}), ("exclusive", EXCLUSIVE)):
        for number in (2, 3):
            for shift in (-1, 0, 1):
                for timeline in ("1", "2", "3", "latest"):
                    what = f"{shift:+d} at the switch to {number}, {side}"
                    yield _case(
                        what, _switch(number, shift, more), timeline, "auto", f"switch {shift:+d}", f"switch {side}"
                    )
        for number in SCRIPT:
            for shift in (0, 1):
                what = f"{shift:+d} at the last record of {number}, {side}"
                yield _case(what, _end(number, shift, more), str(number), "auto", f"last record {shift:+d}")
    for label in _labels():
        for what in ("start_lsn", "end record", "stop_lsn", "started_at", "stopped_at"):
            for shift in (-1, 0):
                for side, more in (("inclusive", {}), ("exclusive", EXCLUSIVE)):
                    for backup in (label, "auto"):
                        make = _bound(label, what, shift, more)
                        timeline = "current" if backup == label else "latest" if label != "stale" else "1"
                        name = f"{shift:+d} at {what} of {label}, {side}"
                        yield _case(name, make, timeline, backup, f"bound {what}")
    for label in (*_labels(), "auto"):
        for timeline in ("1", "2", "3", "latest", "current"):
            if (label, timeline) == ("auto", "current"):
                # That would be the oracle's guess of which backup is meant; the restore's documentation tells it.
                continue
            immediate = _fixed({"recovery_target": "immediate"})
            yield _case("immediate", immediate, timeline, label, "immediate", f"immediate from {label}")
            yield _case(
                "latest", _fixed({}), timeline, label, "latest", f"latest from {label}", f"latest of {timeline}"
            )
            yield _case("name used twice", _fixed({"recovery_target_name": TWICE}), timeline, label, "name used twice")
    for timeline in ("1", "2", "latest"):
        only = _fixed({"recovery_target_name": "only on 1"})
        yield _case("name of an abandoned branch", only, timeline, "auto", "name of an abandoned branch")
        nobody = _fixed({"recovery_target_xid": "900000"})
        yield _case("xid that nobody had", nobody, timeline, "auto", "xid that nobody had")
        yield _case("xid of a subtransaction", _subtransaction, timeline, "auto", "xid of a subtransaction")
        before = _fixed({"recovery_target_time": "2001-01-01 00:00:00+05:45"})
        yield _case("time before everything", before, timeline, "auto", "time before everything")
        after = _fixed({"recovery_target_time": "2101-01-01 00:00:00-03:30"})
        yield _case("time after everything", after, timeline, "auto", "time after everything")


def _subtransaction(history: History) -> Options:
    return {"recovery_target_xid": str(history.subtransaction)}


def _sample(cases: list[Case]) -> list[Case]:
    """So few that everything occurs: of the cases in random order those that show most that is new."""
    chosen: list[Case] = []
    rest = list(cases)
    random.Random(SEED).shuffle(rest)
    missing = frozenset().union(*(case.facets for case in cases))
    while missing:
        best = max(rest, key=lambda case: len(case.facets & missing))
        chosen.append(best)
        missing -= best.facets
    return chosen


EVERYTHING = [*_of_events(), *_special()]
CASES = EVERYTHING if ALL else _sample(EVERYTHING)


# --- the history, lived by the first worker that comes


@pytest.fixture(scope="module")
def lived(bin_dir: str, major: int, template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[History]:
    """Shared by all workers of a run, read-only."""
    base = tmp_path_factory.getbasetemp()
    directory = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "exactness"
    directory.mkdir(exist_ok=True)
    with _locked(directory / "lock"):
        if not (directory / "history.pickle").exists():
            # What a worker that failed here has left would be in the way of the next one.
            shutil.rmtree(directory / "life", ignore_errors=True)
            Life(bin_dir, major, directory, template).live()
    history = History(bin_dir, directory)
    before = history.fingerprint()
    yield history
    assert history.fingerprint() == before, "a test has written to what all share"


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "a", encoding="ascii") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _far_away(history: History, case: Case, predicted: Stop | Refused) -> Iterator[None]:
    """Where CREATE TABLESPACE is replayed, its directory is one for all restores."""
    replayed: list[Record] = []
    if isinstance(predicted, Stop):
        begin, end = history.backups[predicted.backup].start_lsn, predicted.replayed.lsn
        path = history.oracle.path(history.oracle.number(case.timeline, case.backup))
        replayed = [record for record in path if begin <= record.lsn <= end]
    if not any(record.kind == "Tablespace" and record.text.startswith("CREATE") for record in replayed):
        yield
        return
    with _locked(history.far.with_name("far.lock")):
        try:
            yield
        finally:
            shutil.rmtree(history.far)
            history.far.mkdir(mode=0o700)


# --- what a restored cluster holds

OBSERVE = """
SELECT json_build_object(
    'phase', (SELECT phase FROM status),
    'trail', (SELECT json_agg(phase) FROM trail),
    'databases', (SELECT json_object_agg(datname, datconnlimit) FROM pg_database),
    'tablespaces', (SELECT coalesce(json_agg(spcname), '[]') FROM pg_tablespace WHERE oid >= 16384),
    'prepared', (SELECT coalesce(json_agg(gid), '[]') FROM pg_prepared_xacts),
    'objects', (SELECT coalesce(json_object_agg(loid, content), '{}') FROM
                (SELECT loid, convert_from(string_agg(data, '' ORDER BY pageno), 'UTF8') AS content
                 FROM pg_largeobject GROUP BY loid) AS object))
"""


def _count(server: Server, table: str) -> int:
    if server.value("SELECT to_regclass(%s)", table) is None:
        return -1
    return int(server.value(f"SELECT count(*) FROM {table}"))


def observe(server: Server) -> tuple[World, set[str]]:
    """What there is, and where the tablespaces are.

    DROP TABLESPACE removes the link before it commits, so the server cannot always be asked for the latter.
    """
    found = server.value(OBSERVE)
    found = json.loads(found) if isinstance(found, str) else found
    databases = {}
    for name, limit in found["databases"].items():
        if limit != -2:
            with contextlib.closing(server.login.connect(name)) as connection, connection.cursor() as cursor:
                cursor.execute("SELECT phase FROM status")
                databases[name] = "" if name == "postgres" else cursor.fetchone()[0]
    locations = {os.readlink(link) for link in (server.data / "pg_tblspc").iterdir()}
    world = World(
        phase=found["phase"],
        trail=frozenset(found["trail"]),
        databases=databases,
        invalid=frozenset(name for name, limit in found["databases"].items() if limit == -2),
        tablespaces=frozenset(found["tablespaces"]),
        far_rows=_count(server, "far_rows"),
        prepared=frozenset(found["prepared"]),
        objects={int(number): content for number, content in found["objects"].items()},
        scratch=_count(server, "scratch"),
    )
    return world, locations


def amcheck(server: Server) -> None:
    """Every heap and every index of every database."""
    options = ["--all", "--heapallindexed", "-h", server.socket, "-p", str(server.PORT), "-U", "postgres"]
    done = server.program("pg_amcheck", *options)
    assert done.returncode == 0, done.stdout + done.stderr


def check_reached(history: History, cluster: Restored, number: int, stop: Stop) -> None:
    """PostgreSQL says that it stopped where the oracle says, and the engine agrees with that."""
    reached = cluster.reached
    assert contradiction(cluster.recovery.planned(), reached) == ""
    assert reached.reason.startswith(stop.reason), (reached, stop)
    if stop.reason.startswith("before 2"):
        assert stop.record is not None and parse_time(reached.time) == stop.record.time
    path = history.oracle.path(number)
    after = path.index(stop.replayed) + 1
    assert stop.replayed.lsn < Lsn.parse(reached.lsn), (reached, stop)
    # A record begins where the one before it has ended, or behind the header of the next page or segment.
    assert after == len(path) or Lsn.parse(reached.lsn) <= path[after].lsn, (reached, stop)


def check_accepted(cluster: Restored) -> None:
    """Nothing of the recovery is left behind."""
    changed, _pending = cluster.recovery.accept()
    assert changed and cluster.recovery.planned() == {}
    data = cluster.server.data
    assert [path.name for path in (data / "conf.d").iterdir()] == ["50-tests.conf"]
    assert not list(data.glob("*.signal"))
    assert "recovery_target" not in (data / "postgresql.auto.conf").read_text(encoding="utf-8")
    assert cluster.server.show("restore_command") == ""


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
def test_exactly_what_was_asked_for(lived: History, tmp_path: Path, case: Case) -> None:
    options = case.make(lived)
    predicted = lived.oracle.predict(options, case.timeline, case.backup)
    asked = {**options, "recovery_target_timeline": case.timeline}
    data = tmp_path / "restored" / "data"
    data.parent.mkdir()
    tablespaces = lived.backups[predicted.backup].tablespaces if isinstance(predicted, Stop) else ()
    mapping = {item.location: str(tmp_path / f"space {item.oid}") for item in tablespaces}
    with _far_away(lived, case, predicted):
        try:
            cluster = Restored(lived.storage, data, asked, backup=case.backup, tablespace_mapping=mapping)
        except RefusedError as error:
            assert not data.exists() and not list(tmp_path.glob("space*"))
            refused = predicted if isinstance(predicted, Refused) else TOO_EARLY
            assert isinstance(predicted, Refused) or predicted.may_refuse, (error, predicted)
            # The host is looked at for the newest backup then, whose tablespaces are other ones.
            codes = {refusal.code for refusal in error.refusals} - {"tablespace_unknown", "tablespace_not_empty"}
            assert codes and codes <= refused.codes, (error, predicted)
            return
        try:
            assert isinstance(predicted, Stop), f"asked for {asked}, planned {cluster.plan}"
            assert cluster.plan.backup.label == predicted.backup
            cluster.run()
            world, locations = observe(cluster.server)
            assert world == predicted.world
            assert locations <= {*mapping.values(), str(lived.far)}
            assert cluster.recovery.timeline() == lived.oracle.newest + 1
            check_reached(lived, cluster, lived.oracle.number(case.timeline, case.backup), predicted)
            amcheck(cluster.server)
            check_accepted(cluster)
        finally:
            cluster.server.close()
    shutil.rmtree(tmp_path)


def test_the_life_is_as_rich_as_it_should_be() -> None:
    steps = [name for names in SCRIPT.values() for name, kind in names.items() if kind == "step"]
    assert len(steps) >= 12 and len(set(steps)) == len(steps)
    assert set(kinds(MAJOR)) <= set(BACKUP_KINDS)
