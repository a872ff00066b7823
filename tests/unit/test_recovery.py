# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Where a recovery has stopped, and whether that is what was asked."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils import recovery, recovery_conf, serverlog, settings
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.plugins.module_utils.postgres import FLOORS, ControlData, Login
from ansible_collections.pgdrill.pitr.plugins.module_utils.reached import (
    Reached,
    contradiction,
    logged_reason,
    parse_reason,
)
from ansible_collections.pgdrill.pitr.plugins.module_utils.recovery import Progress, Recovery
from ansible_collections.pgdrill.pitr.plugins.module_utils.serverlog import tail as log_tail

XID = "after transaction 745"
TIME = "before 2026-03-01 14:30:00.5+01"
LSN = "before LSN 0/3000060"
NAME = 'at restore point "before ""upgrade"""'
IMMEDIATE = "reached consistency"
LATEST = "no recovery target specified"


@pytest.mark.parametrize(
    ("reason", "field", "value"),
    [
        (XID, "xid", "745"),
        ("before transaction 745", "xid", "745"),
        (TIME, "time", "2026-03-01 14:30:00.5+01"),
        ("after 2026-03-01 14:30:00+05:45", "time", "2026-03-01 14:30:00+05:45"),
        ('at restore point "a b"', "name", "a b"),
        (NAME, "name", 'before ""upgrade""'),
        ('at restore point "after transaction 7"', "name", "after transaction 7"),
        (LSN, "", ""),
        (IMMEDIATE, "", ""),
        (LATEST, "", ""),
        ("something new in PostgreSQL 19", "", ""),
        ("", "", ""),
    ],
)
def test_reason_of_a_history_file_is_taken_apart(reason: str, field: str, value: str) -> None:
    reached = parse_reason("0/5000000", reason, "2026-03-01T13:30:00+00:00")
    values = reached.to_dict()
    assert values.pop("lsn") == "0/5000000"
    assert values.pop("reason") == reason
    assert values.pop("last_transaction_time") == "2026-03-01T13:30:00+00:00"
    assert values.pop(field, value) == value
    assert set(values.values()) <= {""}


PLANNED = {
    "xid": {"target_kind": "xid", "target_value": "745"},
    "time": {"target_kind": "time", "target_value": "2026-03-01 13:30:00.000000+00:00"},
    "lsn": {"target_kind": "lsn", "target_value": "0/3000060"},
    "name": {"target_kind": "name", "target_value": "a b"},
    "immediate": {"target_kind": "immediate", "target_value": ""},
    "latest": {"target_kind": "latest", "target_value": ""},
}
REASONS = {
    "xid": XID,
    "time": TIME,
    "lsn": "after LSN 0/3000060",
    "name": 'at restore point "a b"',
    "immediate": IMMEDIATE,
    "latest": LATEST,
}


@pytest.mark.parametrize("asked", PLANNED)
@pytest.mark.parametrize("stopped", REASONS)
def test_only_the_reason_of_the_kind_that_was_asked_fits(asked: str, stopped: str) -> None:
    said = contradiction(PLANNED[asked], parse_reason("0/5000000", REASONS[stopped]))
    if asked == stopped:
        assert said == ""
    else:
        assert said.startswith(f"asked for {asked}") and said.endswith(f"PostgreSQL stopped: {REASONS[stopped]}")


@pytest.mark.parametrize(
    ("kind", "value", "inclusive", "reason", "fits"),
    [
        ("xid", "745", True, "after transaction 745", True),
        ("xid", "745", True, "before transaction 745", False),
        ("xid", "745", False, "before transaction 745", True),
        ("xid", "745", False, "after transaction 745", False),
        ("xid", "745", True, "after transaction 7450", False),
        ("xid", "745", True, "after transaction 746", False),
        ("xid", str(2**32 + 745), True, "after transaction 745", True),
        ("lsn", "0/3000060", True, "after LSN 0/3000060", True),
        ("lsn", "0/3000060", True, "after LSN 0/3000088", True),
        ("lsn", "0/3000060", True, "after LSN 0/3000058", False),
        ("lsn", "0/3000060", False, "before LSN 0/3000060", True),
        ("lsn", "9/0", True, "after LSN 10/0", True),
        ("lsn", "10/0", True, "after LSN 9/0", False),
        ("time", "2026-03-01 14:30:00+01:00", True, "before 2026-03-01 13:30:00.000001+00", True),
        ("time", "2026-03-01 14:30:00+01:00", True, "before 2026-03-01 13:30:00+00", False),
        ("time", "2026-03-01 14:30:00+01:00", False, "before 2026-03-01 13:30:00+00", True),
        ("time", "2026-03-01 14:30:00+01:00", True, "before 2026-03-01 13:29:59.999999+00", False),
        ("time", "2026-03-01 14:30:00+01:00", True, "before 2026-03-01 14:00:00+01", False),
        ("time", "2026-03-01 14:30:00+01:00", False, "before 2026-03-01 13:29:59.999999+00", False),
        ("name", "a", True, 'at restore point "a"', True),
        ("name", "a", True, 'at restore point "ab"', False),
        ("name", "a", True, 'at restore point "A"', False),
        ("name", "a", False, 'at restore point "a"', True),
        ("latest", "", True, "", False),
        ("immediate", "", True, "", False),
    ],
)
def test_value_and_side_of_the_stop_are_compared(
    kind: str, value: str, inclusive: bool, reason: str, fits: bool
) -> None:
    plan = {"target_kind": kind, "target_value": value, "target_inclusive": inclusive}
    assert (contradiction(plan, parse_reason("0/5000000", reason)) == "") is fits


@pytest.mark.parametrize(
    ("lsn", "fits"),
    [("0/4000000", True), ("0/3F00028", True), ("0/3F00001", True), ("0/3F00000", False), ("0/2C79B30", False)],
)
def test_end_of_the_archive_is_reached_only_in_its_last_segment(lsn: str, fits: bool) -> None:
    """A damaged record ends the WAL for PostgreSQL: it promotes, and says what it says at the real end."""
    plan = {**PLANNED["latest"], "end_lsn": "0/4000000", "wal_bytes": 5 * 2**20, "segments": 5}
    said = contradiction(plan, parse_reason(lsn, LATEST))
    assert (said == "") is fits
    assert fits or said == f"the archive reaches beyond 0/3F00000, but WAL could be read only up to {lsn}"


def test_recovery_that_ends_before_the_receivers_last_record_is_no_success() -> None:
    """The plan's last segment is half written, so that its beginning proves little."""
    plan = {"target_kind": "latest", "end_lsn": "0/600000", "segments": 2, "wal_bytes": 2 << 20, "at_least": "0/580000"}
    assert "0/580000" in contradiction(plan, parse_reason("0/570000", LATEST))
    assert contradiction(plan, parse_reason("0/580100", LATEST)) == ""


START = "2026-03-01 12:00:00 UTC [1] LOG:  starting PostgreSQL 18.6 on x86_64"
LOG = "2026-03-01 12:00:01 UTC [2] LOG:  recovery stopping "


@pytest.mark.parametrize(
    ("kind", "line", "reason"),
    [
        ("xid", "after commit of transaction 745, time 2026-03-01 12:00:00.5+00", "after transaction 745"),
        ("xid", "before abort of transaction 745, time 2026-03-01 12:00:00.5+00", "before transaction 745"),
        ("time", "before commit of transaction 745, time 2026-03-01 12:00:00.5+00", "before 2026-03-01 12:00:00.5+00"),
        ("lsn", 'before WAL location (LSN) "0/3000060"', "before LSN 0/3000060"),
        ("lsn", 'after WAL location (LSN) "A/3000060"', "after LSN A/3000060"),
        ("name", 'at restore point "a b", time 2026-03-01 12:00:00.5+00', 'at restore point "a b"'),
        ("name", 'at restore point "x", time 1", time 2026-03-01 12:00:00+00', 'at restore point "x", time 1"'),
        ("immediate", "after reaching consistency", "reached consistency"),
        ("lsn", "for a reason of PostgreSQL 19", "for a reason of PostgreSQL 19"),
    ],
)
def test_log_tells_the_same_reason_as_a_history_file(kind: str, line: str, reason: str) -> None:
    assert logged_reason([START, LOG + line, "LOG:  pausing at the end of recovery"], kind) == reason


def test_log_of_an_earlier_start_proves_nothing() -> None:
    assert logged_reason([START, LOG + "after reaching consistency", START], "immediate") == ""
    assert logged_reason([], "immediate") == ""


def test_log_tail_is_short_and_never_fails(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"first\n" + b"x" * 100_000 + b"\n" + b"\n".join(b"line %d \xff" % n for n in range(40)))
    tail = log_tail(str(log)).splitlines()
    assert len(tail) == serverlog.TAIL_LINES and tail[-1] == "line 39 �"
    assert log_tail(str(tmp_path / "none")) == "" == log_tail(str(tmp_path))


@pytest.mark.parametrize(
    ("progress", "text"),
    [
        (Progress("starting"), "starting"),
        (Progress("replaying", "0/2", "0/4", 50.0, 12.3), "replaying 0/2 of 0/4 (50 %), about 12 s left"),
        (Progress("restoring", percent=40.0), "restoring 40 %"),
        (Progress("promoted", "0/4"), "promoted 0/4"),
    ],
)
def test_progress_is_one_line(progress: Progress, text: str) -> None:
    assert str(progress) == text


real_replayed_segment = recovery.replayed_segment


class Server:
    """Plays the server: answers by the beginning of the statement, with files where PostgreSQL has them."""

    def __init__(self, pgdata: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pgdata = pgdata
        self.running = True
        self.answers: dict[str, list[tuple[Any, ...]]] = {}
        self.asked: list[str] = []
        self.control = {label: "100" for label in FLOORS.values()}
        (pgdata / "pg_wal").mkdir()
        (pgdata / "postgresql.conf").write_text("")
        monkeypatch.setattr(recovery, "running_pid", lambda _pgdata: 4242 if self.running else None)
        monkeypatch.setattr(recovery, "query", self.query)
        monkeypatch.setattr(recovery, "control_data", lambda _bin, _pgdata: ControlData(self.control))
        monkeypatch.setattr(recovery, "replayed_segment", lambda _pid: "")
        monkeypatch.setattr(Login, "connect", lambda _self: self)

    def close(self) -> None:
        pass

    def query(self, _connection: object, sql: str, _parameters: object = None) -> list[tuple[Any, ...]]:
        self.asked.append(sql)
        for beginning, rows in self.answers.items():
            if sql.startswith(beginning):
                return rows
        raise AssertionError(f"unexpected: {sql}")

    def plan(self, **values: object) -> None:
        plan = {"target_action": "promote", "start_lsn": "0/2000000", "end_lsn": "0/4000000", **values}
        recovery_conf.write(str(self.pgdata), str(self.pgdata), {"restore_command": "x"}, plan)

    def promote(self, timeline: int, history: str) -> None:
        self.answers["SELECT pg_is_in_recovery(), CASE"] = [
            (False, "0/5000000", "", None, f"{timeline:08X}0000000000000005")
        ]
        self.answers["SELECT CASE WHEN pg_is_in_recovery() THEN NULL"] = [(f"{timeline:08X}0000000000000005", 1)]
        self.answers["SELECT pg_last_xact_replay_timestamp()"] = [
            (datetime.datetime(2026, 3, 1, 12, tzinfo=datetime.timezone.utc),)
        ]
        if history:
            (self.pgdata / "pg_wal" / f"{timeline:08X}.history").write_text(history)

    def pause(self, lsn: str, floors: int = 100) -> None:
        self.answers["SELECT pg_is_in_recovery(), CASE"] = [(True, lsn, "paused", None, None)]
        self.answers["SELECT pg_last_wal_replay_lsn()"] = [(lsn, None)]
        self.answers["SELECT name, setting::int"] = [(name, floors) for name in FLOORS]
        self.answers["SELECT name, setting FROM"] = []


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    yield Server(tmp_path, monkeypatch)


def recovery_of(server: Server, log: str = "") -> Recovery:
    path = ""
    if log:
        path = str(server.pgdata / "log")
        Path(path).write_text(log)
    return Recovery(Login(), str(server.pgdata), "/bin", log_file=path)


def test_promotion_at_the_target_is_reached(server: Server) -> None:
    server.plan(**PLANNED["xid"])
    server.promote(2, f"1\t0/4000100\t{XID}\n")
    reached, progress = recovery_of(server).wait(5)
    assert reached == Reached("0/4000100", XID, xid="745", last_transaction_time="2026-03-01T12:00:00+00:00")
    assert progress == Progress("promoted", "0/5000000", timeline=2)


@pytest.mark.parametrize("asked", [kind for kind in PLANNED if kind != "latest"])
def test_promotion_at_the_end_of_the_archive_instead_of_the_target_is_an_error(server: Server, asked: str) -> None:
    server.plan(**PLANNED[asked])
    server.promote(2, f"1\t0/4000100\t{LATEST}\n")
    with pytest.raises(PitrError, match=r"did not do what was planned.*Do not use this cluster"):
        recovery_of(server).wait(5)


def test_last_line_of_the_history_is_the_one_that_counts(server: Server) -> None:
    server.plan(**PLANNED["xid"])
    server.promote(3, f"1\t0/3000000\t{LATEST}\n2\t0/4000100\t{XID}\n")
    reached, _progress = recovery_of(server).wait(5)
    assert reached is not None and reached.lsn == "0/4000100"


def test_server_without_history_file_proves_nothing(server: Server) -> None:
    server.promote(2, "")
    with pytest.raises(PitrError, match=r"has no .*00000002\.history.*Nothing is proven"):
        recovery_of(server).wait(5)
    server.promote(1, "")
    with pytest.raises(PitrError, match="Nothing is proven"):
        recovery_of(server).wait(5)


def test_damaged_history_proves_nothing(server: Server) -> None:
    server.promote(2, "rubbish")
    with pytest.raises(PitrError, match=r"00000002\.history, line 1"):
        recovery_of(server).wait(5)


def test_server_that_died_is_an_error_with_its_last_words(server: Server) -> None:
    server.running = False
    server.control["Database cluster state"] = "in archive recovery"
    server.plan(**PLANNED["time"])
    log = "FATAL:  recovery ended before configured recovery target was reached"
    with pytest.raises(PitrError, match="recovery ended before configured recovery target") as caught:
        recovery_of(server, log).wait(5)
    assert "is not running" in caught.value.message and "has not been promoted" in caught.value.message
    with pytest.raises(PitrError, match="Look into the server's log") as caught:
        recovery_of(server).wait(5)
    assert "Last lines" not in caught.value.message


def test_shutdown_at_the_target_is_reached_only_when_it_was_asked_for(server: Server) -> None:
    server.running = False
    server.control["Database cluster state"] = "shut down in recovery"
    server.control["Minimum recovery ending location"] = "0/4000100"
    log = f"{START}\n{LOG}after commit of transaction 745, time 2026-03-01 12:00:00+00\n"
    server.plan(target_action="shutdown", **PLANNED["xid"])
    reached, _progress = recovery_of(server, log).wait(5)
    assert reached is not None and (reached.lsn, reached.xid) == ("0/4000100", "745")
    for other in (START, f"{START}\n{LOG}after commit of transaction 746, time 2026-03-01 12:00:00+00\n", ""):
        with pytest.raises(PitrError):
            recovery_of(server, other).wait(5)
    server.control["Database cluster state"] = "in archive recovery"
    with pytest.raises(PitrError, match="is not running"):
        recovery_of(server, log).wait(5)
    server.control["Database cluster state"] = "shut down in recovery"
    server.plan(target_action="promote", **PLANNED["xid"])
    with pytest.raises(PitrError, match="is not running"):
        recovery_of(server, log).wait(5)


def test_pause_is_reached_only_when_the_log_proves_the_target(server: Server) -> None:
    server.plan(target_action="pause", **PLANNED["lsn"])
    server.pause("0/3000060")
    proof = f'{START}\n{LOG}before WAL location (LSN) "0/3000060"\n'
    reached, progress = recovery_of(server, proof).wait(5)
    assert reached is not None and reached.reason == "before LSN 0/3000060" and progress.state == "paused"
    for log in ("", START, proof + START):
        with pytest.raises(PitrError, match="it is not proven that its target was reached") as caught:
            recovery_of(server, log).wait(5)
        assert (f"nothing in {server.pgdata}/log tells" in caught.value.message) == bool(log)
        assert ("no log was given" in caught.value.message) != bool(log)
    with pytest.raises(PitrError, match="did not do what was planned"):
        recovery_of(server, proof.replace("0/3000060", "0/3000000")).wait(5)


def test_pause_of_a_recovery_that_should_promote_is_not_its_end(server: Server) -> None:
    server.plan(target_action="promote", **PLANNED["lsn"])
    server.pause("0/3000060")
    with pytest.raises(PitrError, match="it is not proven"):
        recovery_of(server, f'{START}\n{LOG}before WAL location (LSN) "0/3000060"\n').wait(5)


def test_pause_for_raised_settings_of_the_primary_is_named(server: Server) -> None:
    server.plan(target_action="pause", **PLANNED["lsn"])
    server.pause("0/3000000", floors=99)
    with pytest.raises(PitrError, match="max_connections must be at least 100, it is 99"):
        recovery_of(server, START).wait(5)


def test_waiting_goes_on_until_the_target_is_reached(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.plan(**PLANNED["xid"])
    looks = iter([Progress("starting"), Progress("replaying", "0/3000000"), Progress("promoted", "0/5000000")])
    monkeypatch.setattr(Recovery, "progress", lambda _self: next(looks))
    server.promote(2, f"1\t0/4000100\t{XID}\n")
    reached, progress = recovery_of(server).wait(30)
    assert reached is not None and reached.xid == "745" and progress.state == "promoted"


def test_server_that_was_promoted_without_a_plan_tells_where_it_stopped(server: Server) -> None:
    server.promote(2, f"1\t0/4000100\t{XID}\n")
    reached, _progress = recovery_of(server).wait(5)
    assert reached is not None and reached.reason == XID


def test_server_that_paused_without_a_plan_tells_what_its_log_says(server: Server) -> None:
    server.pause("0/3000060")
    reached, _progress = recovery_of(server, f"{START}\n{LOG}after reaching consistency\n").wait(5)
    assert reached is not None and reached.reason == IMMEDIATE


@pytest.mark.parametrize(("row", "timeline"), [((None, 3), 3), (("000000020000000000000005", 1), 2)])
def test_timeline_is_that_of_the_file_being_written_else_of_the_last_checkpoint(
    server: Server, row: tuple[Any, ...], timeline: int
) -> None:
    server.answers["SELECT CASE WHEN pg_is_in_recovery() THEN NULL"] = [row]
    assert recovery_of(server).timeline() == timeline


def test_waiting_ends_after_the_timeout_with_the_progress(server: Server) -> None:
    server.plan(started_at=time.time() - 60)
    server.answers["SELECT pg_is_in_recovery(), CASE"] = [(True, "0/3000000", "not paused", None, None)]
    reached, progress = recovery_of(server).wait(0)
    assert reached is None
    assert (progress.state, progress.lsn, progress.end_lsn, progress.percent) == (
        "replaying",
        "0/3000000",
        "0/4000000",
        50.0,
    )
    assert progress.remaining_seconds is not None and 55 < progress.remaining_seconds < 70


def test_progress_of_a_server_that_does_not_answer_comes_from_its_process_title(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_connection: object, _sql: str, _parameters: object = None) -> list[tuple[Any, ...]]:
        raise PitrError("the database system is starting up")

    server.plan()
    monkeypatch.setattr(recovery, "query", refuse)
    assert recovery_of(server).progress() == Progress("starting")
    server.control["Bytes per WAL segment"] = str(1024 * 1024)
    monkeypatch.setattr(recovery, "replayed_segment", lambda _pid: "000000010000000000000028")
    progress = recovery_of(server).progress()
    assert (progress.state, progress.lsn, progress.percent) == ("replaying", "0/2800000", 25.0)


def replaying(server: Server, lsn: str | None, state: str = "not paused", **plan: object) -> Progress:
    if plan:
        server.plan(**plan)
    server.answers["SELECT pg_is_in_recovery(), CASE"] = [(True, lsn, state, None, None)]
    return recovery_of(server).progress()


def test_answer_of_the_server_counts_more_than_its_process_title(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "replayed_segment", lambda _pid: "000000010000000000000028")
    assert replaying(server, "0/3000000").lsn == "0/3000000"


def test_recovery_without_a_plan_has_no_percent(server: Server) -> None:
    assert replaying(server, "0/3000000") == Progress("replaying", "0/3000000")
    assert replaying(server, None) == Progress("replaying")


def test_recovery_with_nothing_to_replay_has_no_percent(server: Server) -> None:
    nothing = Progress("replaying", "0/2000000", "0/2000000", distance_bytes=0)
    assert replaying(server, "0/2000000", end_lsn="0/2000000") == nothing
    assert replaying(server, None, end_lsn="0/4000000") == Progress("replaying")


@pytest.mark.parametrize(
    ("lsn", "state", "ago"),
    [("0/3000000", "paused", 60), ("0/2000001", "not paused", 60), ("0/3000000", "not paused", -60)],
)
def test_rest_is_not_estimated_without_a_basis(server: Server, lsn: str, state: str, ago: float) -> None:
    progress = replaying(server, lsn, state, started_at=time.time() - ago)
    assert progress.percent is not None and progress.remaining_seconds is None


def test_rest_is_not_estimated_when_the_start_is_not_known(server: Server) -> None:
    progress = replaying(server, "0/3000000", started_at=0)
    assert progress.percent == 50.0 and (progress.remaining_seconds or 0) < 1


def test_configuration_outside_of_the_data_directory_holds_the_plan(server: Server, tmp_path: Path) -> None:
    config = tmp_path / "etc"
    config.mkdir()
    (config / "postgresql.conf").write_text("")
    recovery_conf.write(str(config), str(server.pgdata), {"restore_command": "x"}, {"target": "here"})
    assert Recovery(Login(), str(server.pgdata), "/bin", str(config)).planned() == {"target": "here"}
    assert Recovery(Login(), str(server.pgdata), "/bin").planned() == {}


@pytest.mark.timeout(30)
def test_segment_that_is_replayed_is_read_from_the_process_title() -> None:
    title = "postgres: startup   recovering 0000000100000000000000A3"
    with subprocess.Popen([title, "60"], executable="/bin/sleep") as process:
        try:
            while real_replayed_segment(os.getpid()) == "":
                time.sleep(0.01)
            assert real_replayed_segment(os.getpid()) == "0000000100000000000000A3"
            assert real_replayed_segment(process.pid) == ""
        finally:
            process.kill()
    assert real_replayed_segment(os.getpid()) == ""


def test_progress_of_a_running_restore_is_its_share_of_bytes(server: Server) -> None:
    server.running = False
    marker = server.pgdata / "pitr-restoring.json"
    for content, expected in (
        (json.dumps({"bytes": 50, "total_bytes": 200}), Progress("restoring", percent=25.0)),
        (json.dumps({"bytes": 0, "total_bytes": 0}), Progress("restoring")),
        ("{", Progress("stopped")),
        ("{}", Progress("stopped")),
    ):
        marker.write_text(content)
        assert recovery_of(server).progress() == expected


@pytest.mark.parametrize(("in_recovery", "lsn", "percent"), [("0/1000000", "0/1000000", 0.0), ("1/0", "1/0", 100.0)])
def test_percent_stays_between_0_and_100(server: Server, in_recovery: str, lsn: str, percent: float) -> None:
    server.plan()
    server.answers["SELECT pg_is_in_recovery(), CASE"] = [(True, in_recovery, "not paused", None, None)]
    progress = recovery_of(server).progress()
    assert (progress.lsn, progress.percent) == (lsn, percent)


def test_resume_and_promote_do_nothing_for_a_server_that_is_not_recovering(server: Server) -> None:
    server.answers["SELECT pg_is_in_recovery()"] = [(False,)]
    assert recovery_of(server).promote(5) is False
    assert recovery_of(server).resume() is False
    assert not any("pg_promote" in sql or "pg_wal_replay_resume" in sql for sql in server.asked)


def test_promotion_that_does_not_come_is_an_error(server: Server) -> None:
    server.answers["SELECT pg_is_in_recovery()"] = [(True,)]
    server.answers["SELECT pg_promote"] = [(False,)]
    with pytest.raises(PitrError, match="was not promoted within 5 seconds"):
        recovery_of(server).promote(5)
    server.answers["SELECT pg_promote"] = [(True,)]
    assert recovery_of(server).promote(5) is True


def test_paused_recovery_is_resumed(server: Server) -> None:
    server.answers["SELECT pg_is_in_recovery() AND pg_is_wal_replay_paused()"] = [(True,)]
    server.answers["SELECT pg_wal_replay_resume()"] = [(None,)]
    assert recovery_of(server).resume() is True
    assert server.asked[-1] == "SELECT pg_wal_replay_resume()"


def test_accepting_removes_the_recovery_settings_once(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.plan()
    server.answers["SELECT current_setting('hba_file')"] = [(str(server.pgdata / "pg_hba.conf"),)]
    server.answers["SELECT line_number, error FROM pg_hba_file_rules"] = []
    server.answers["SELECT count(*) FROM pg_settings WHERE sourcefile"] = [(0,)]
    server.answers["SELECT name FROM pg_settings WHERE sourcefile"] = []
    (server.pgdata / "recovery.signal").unlink()
    monkeypatch.setattr(settings, "apply", lambda _login, reload: ["max_connections"] if reload else [])
    assert recovery_of(server).accept() == (True, ["max_connections"])
    assert recovery_conf.planned(str(server.pgdata)) is None
    assert recovery_of(server).accept() == (False, [])
