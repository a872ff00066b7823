# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Facts become findings: every check has a verdict, worse is never milder, and nothing unknown looks content."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.plugins.module_utils.judge import (
    CRITICAL,
    IDLE_BYTES,
    OK,
    UNKNOWN,
    WARNING,
    Finding,
    judge,
    worst,
)
from ansible_collections.pgdrill.pitr.plugins.module_utils.wal import Lsn
from ansible_collections.pgdrill.pitr.plugins.module_utils.watched import (
    DAY,
    Archive,
    Facts,
    Hole,
    Limit,
    Limits,
    Receiver,
    Room,
    Sender,
    Server,
    Slot,
    Storage,
    Stored,
)
from hypothesis import given
from hypothesis import strategies as st

GB = 1 << 30
RANK = {OK: 0, UNKNOWN: 1, WARNING: 2, CRITICAL: 3}
SERVER = Server(
    system_identifier="7",
    in_recovery=False,
    accepted=True,
    timeline=1,
    lsn=Lsn(10 * GB),
    archive_mode="on",
    has_command=True,
    archive_timeout=60,
    max_slot_keep=-1,
    archived_count=640,
    failed_count=0,
    last_archived_age=20.0,
    last_failed_age=None,
    last_failed_wal="",
    ready=0,
)
ARCHIVE = Archive("7", 640, (1,), (), "0000000100000002000000FF", 20.0, Lsn(10 * GB))
FULL = Stored("b1", "full", 3600.0, to_lsn="2/80000000", stored_bytes=GB)
ROOM = Room(free=80 * GB, size=100 * GB, stored=5 * GB, growth=0.0, growth_span=DAY)
STORAGE = Storage(ARCHIVE, (FULL,), ROOM, verify_age=DAY, verify_level="content")
FACTS = Facts("main", 1e9, server=SERVER, server_name="db1", storage=STORAGE, new_failures=0)


def facts(server: Any = None, storage: Any = None, archive: Any = None, room: Any = None, **more: Any) -> Facts:
    """The healthy cluster with these differences."""
    stored = dataclasses.replace(
        STORAGE,
        archive=dataclasses.replace(ARCHIVE, **(archive or {})),
        room=dataclasses.replace(ROOM, **(room or {})),
        **(storage or {}),
    )
    return dataclasses.replace(
        FACTS, **{"server": dataclasses.replace(SERVER, **(server or {})), "storage": stored, **more}
    )


def found(given: Facts, check: str, limits: Limits | None = None) -> Finding:
    return {finding.check: finding for finding in judge(given, limits)}[check]


def test_healthy_cluster_has_nothing_but_ok() -> None:
    assert [finding for finding in judge(FACTS) if finding.level != OK] == []


FAULTS: dict[str, tuple[Facts, str, str, str]] = {
    "standby": (facts(server={"in_recovery": True, "timeline": None}), "primary", CRITICAL, "in recovery"),
    "copy": (facts(server={"accepted": False}), "primary", CRITICAL, "nobody has accepted"),
    "role": (facts(server={"refused": ("archive_status",)}), "primary", UNKNOWN, "may not read archive_status"),
    "wrong cluster": (facts(server={"system_identifier": "8"}), "identity", CRITICAL, "WRONG CLUSTER"),
    "archive_mode": (facts(server={"archive_mode": "off"}), "archiving", CRITICAL, "archive_mode is off"),
    "no command": (facts(server={"has_command": False}), "archiving", CRITICAL, "archive_command is empty"),
    "fails": (facts(server={"failed_count": 3, "last_failed_age": 5.0}), "archiving", WARNING, "archive_command fails"),
    "never archived": (
        facts(server={"failed_count": 3, "last_failed_age": 5.0, "last_archived_age": None}),
        "archiving",
        WARNING,
        "fails",
    ),
    "fails long": (
        facts(server={"failed_count": 9, "last_failed_age": 5.0, "ready": 4, "oldest_ready_age": 7200.0}),
        "archiving",
        CRITICAL,
        "4 segments wait",
    ),
    "failed": (
        facts(server={"failed_count": 3, "last_failed_age": 50.0}, new_failures=3, failures_span=300.0),
        "archiving",
        WARNING,
        "failed 3 times",
    ),
    "silent": (facts(server={"ready": 2, "oldest_ready_age": 600.0}), "archiving", WARNING, "silent"),
    "very silent": (facts(server={"ready": 2, "oldest_ready_age": 1800.0}), "archiving", CRITICAL, "silent"),
    "lag": (facts(archive={"end": Lsn(8 * GB)}), "archive_lag", WARNING, "2.0 GB behind"),
    "old lag": (
        facts(archive={"end": Lsn(10 * GB - 20000)}, archive_lag_age=1800.0),
        "archive_lag",
        CRITICAL,
        "30 min",
    ),
    "no way": (facts(server={"timeline": 3}, archive={"end": None}), "archive_lag", CRITICAL, "nothing of timeline 3"),
    "receiver down": (
        facts(storage={"receiver": Receiver("r", False, "stopped", "", None)}),
        "receiver",
        CRITICAL,
        "does not run",
    ),
    "receiver refused": (
        facts(storage={"receiver": Receiver("r", True, "refused", "wrong server", None)}),
        "receiver",
        CRITICAL,
        "wrong server",
    ),
    "receiver lag": (
        facts(
            server={"senders": (Sender("r", "streaming", "async", 3 * GB),)},
            storage={"receiver": Receiver("r", True, "streaming", "", None)},
        ),
        "receiver",
        CRITICAL,
        "3.0 GB behind",
    ),
    "receiver cannot archive": (
        facts(
            server={"senders": (Sender("r", "streaming", "async", 0),)},
            storage={"receiver": Receiver("r", True, "streaming", "no space", None, not_archived=2)},
        ),
        "receiver",
        WARNING,
        "2 received segments cannot be archived",
    ),
    "slot": (
        facts(server={"slots": (Slot("s", "physical", False, "reserved", GB),)}),
        "slots",
        WARNING,
        "nobody uses it",
    ),
    "lost slot": (
        facts(server={"slots": (Slot("s", "physical", False, "lost", None),)}),
        "slots",
        CRITICAL,
        "has lost WAL",
    ),
    "unreserved": (
        facts(server={"slots": (Slot("s", "logical", True, "unreserved", 10),)}),
        "slots",
        CRITICAL,
        "next checkpoint",
    ),
    "slot at its limit": (
        facts(server={"max_slot_keep": GB, "slots": (Slot("s", "physical", True, "extended", GB - 5),)}),
        "slots",
        CRITICAL,
        "max_slot_wal_keep_size",
    ),
    "other timeline": (facts(archive={"timelines": (1, 2), "histories": (2,)}), "timeline", CRITICAL, "another server"),
    "no history": (facts(server={"timeline": 2}, archive={"timelines": (1, 2)}), "timeline", CRITICAL, "history file"),
    "gap": (facts(archive={"holes": (Hole(1, "A", "B", 2, 3600.0),)}), "gaps", CRITICAL, "2 segments are missing"),
    "fresh gap": (facts(archive={"holes": (Hole(1, "A", "B", 2, 10.0),)}), "gaps", WARNING, "A to B"),
    "older gap": (
        facts(archive={"holes": (Hole(1, "A", "B", 2, 3600.0, current=False),)}),
        "gaps",
        WARNING,
        "restores from older backups end at A",
    ),
    "old gap": (facts(archive={"holes": (Hole(1, "A", "B", 2, 3600.0, False),)}), "gaps", OK, "before the oldest"),
    "no backup": (facts(storage={"backups": ()}), "window", CRITICAL, "there is no backup"),
    "no good backup": (
        facts(storage={"backups": (dataclasses.replace(FULL, problem="missing WAL: X"),)}),
        "window",
        CRITICAL,
        "nothing can be restored",
    ),
    "newest is bad": (
        facts(storage={"backups": (FULL, dataclasses.replace(FULL, label="b2", problem="damaged"))}),
        "window",
        CRITICAL,
        "b2 cannot be restored",
    ),
    "older is bad": (
        facts(storage={"backups": (dataclasses.replace(FULL, label="b0", problem="damaged"), FULL)}),
        "window",
        WARNING,
        "b0: damaged",
    ),
    "window ends": (
        facts(storage={"backups": (dataclasses.replace(FULL, hole="missing WAL: X"),)}),
        "window",
        CRITICAL,
        "a hole",
    ),
    "bad backups do not count": (
        facts(storage={"backups": (dataclasses.replace(FULL, problem="damaged"),)}),
        "full_backup",
        CRITICAL,
        "no full backup that can be restored",
    ),
    "old full": (
        facts(storage={"backups": (dataclasses.replace(FULL, age=9 * DAY),)}),
        "full_backup",
        WARNING,
        "9.0 days",
    ),
    "only incremental": (
        facts(storage={"backups": (dataclasses.replace(FULL, type="incremental"),)}),
        "full_backup",
        CRITICAL,
        "no full",
    ),
    "old backup": (
        facts(storage={"backups": (dataclasses.replace(FULL, age=3 * DAY),)}),
        "backup",
        CRITICAL,
        "3.0 days",
    ),
    "damage": (facts(storage={"damaged": ("b1",)}), "verify", CRITICAL, "found damaged: b1"),
    "old verify": (facts(storage={"verify_age": 9 * DAY}), "verify", WARNING, "9.0 days ago"),
    "never verified": (
        facts(storage={"verify_age": None, "backups": (dataclasses.replace(FULL, age=9 * DAY),)}),
        "verify",
        WARNING,
        "no backup was verified",
    ),
    "drill failed": (facts(storage={"drill_failed": True}), "drill", WARNING, "failed"),
    "nearly full": (facts(room={"free": 5 * GB}), "space", CRITICAL, "5 %"),
    "will be full": (facts(room={"growth": 8.0 * GB}), "space", WARNING, "about 10 days (an estimate"),
    "no room": (
        facts(storage={"backups": (dataclasses.replace(FULL, stored_bytes=90 * GB),)}),
        "space",
        CRITICAL,
        "no room",
    ),
}


@pytest.mark.parametrize("case", FAULTS.values(), ids=FAULTS)
def test_fault_has_its_verdict_its_words_and_something_to_do(case: tuple[Facts, str, str, str]) -> None:
    given, check, level, words = case
    finding = found(given, check)
    assert (finding.level, words in finding.says) == (level, True), finding
    assert bool(finding.do) == (level != OK), finding


def test_primary_that_is_silent_is_critical_and_the_repository_is_still_told() -> None:
    down = facts(server_problem="connection refused", new_failures=None)
    down = dataclasses.replace(down, server=None)
    levels = {finding.check: finding.level for finding in judge(down)}
    assert levels["primary"] == CRITICAL and "connection refused" in found(down, "primary").says
    assert levels["archiving"] == levels["archive_lag"] == levels["slots"] == levels["identity"] == UNKNOWN
    assert {levels[check] for check in ("repository", "gaps", "window", "full_backup", "verify", "space")} == {OK}


def test_repository_that_cannot_be_read_is_critical_and_the_primary_is_still_told() -> None:
    gone = dataclasses.replace(FACTS, storage=None, storage_problem="not mounted")
    levels = {finding.check: finding.level for finding in judge(gone)}
    assert levels["repository"] == CRITICAL and levels["window"] == levels["backup"] == UNKNOWN
    assert levels["primary"] == levels["archiving"] == levels["slots"] == OK


def test_nothing_known_is_never_ok() -> None:
    findings = judge(Facts("main", 0.0))
    assert {finding.level for finding in findings} == {CRITICAL, UNKNOWN} and worst(findings) == CRITICAL
    assert worst([]) == UNKNOWN


def test_idle_server_is_not_behind() -> None:
    idle = facts(archive={"end": Lsn(10 * GB - IDLE_BYTES)}, archive_lag_age=9 * DAY)
    assert found(idle, "archive_lag").level == OK


def test_receiver_archives_where_archive_mode_is_off() -> None:
    server = {"archive_mode": "off", "senders": (Sender("r", "streaming", "sync", 0),)}
    streaming = facts(server=server, storage={"receiver": Receiver("r", True, "streaming", "", None)})
    assert found(streaming, "archiving").level == found(streaming, "receiver").level == OK


def test_receiver_that_catches_up_receives() -> None:
    server = {"senders": (Sender("r", "catchup", "async", 5),)}
    catching_up = facts(server=server, storage={"receiver": Receiver("r", True, "catching up", "", None)})
    assert found(catching_up, "receiver").level == OK


def test_long_archive_timeout_is_not_late() -> None:
    slow = facts(server={"archive_timeout": 3600, "ready": 1, "oldest_ready_age": 1900.0})
    assert found(slow, "archiving").level == OK


# --- what is worse is never milder

AMOUNT = st.integers(0, 1 << 45)
AGE = st.floats(0, 1e8)


def harder(check: str, less: Facts, more: Facts) -> None:
    assert RANK[found(less, check).level] <= RANK[found(more, check).level]


@given(AMOUNT, AMOUNT, AGE, AGE)
def test_more_archive_lag_is_never_milder(a: int, b: int, age: float, other: float) -> None:
    def lag(count: int, since: float) -> Facts:
        return facts(server={"lsn": Lsn(1 << 50)}, archive={"end": Lsn((1 << 50) - count)}, archive_lag_age=since)

    harder("archive_lag", lag(min(a, b), age), lag(max(a, b), age))
    harder("archive_lag", lag(a, min(age, other)), lag(a, max(age, other)))


@given(AMOUNT, AMOUNT, st.booleans(), st.sampled_from([-1, 1 << 30, 1 << 40]))
def test_more_that_a_slot_keeps_is_never_milder(a: int, b: int, active: bool, most: int) -> None:
    def kept(count: int, used: bool) -> Facts:
        return facts(server={"max_slot_keep": most, "slots": (Slot("s", "physical", used, "extended", count),)})

    harder("slots", kept(min(a, b), active), kept(max(a, b), active))
    harder("slots", kept(a, True), kept(a, False))


@given(AGE, AGE, st.booleans(), st.integers(0, 9))
def test_longer_waiting_is_never_milder(a: float, b: float, failing: bool, new: int) -> None:
    def waiting(age: float) -> Facts:
        server = {"ready": 1, "oldest_ready_age": age, "last_failed_age": 1.0 if failing else None}
        return facts(server=server, new_failures=new)

    harder("archiving", waiting(min(a, b)), waiting(max(a, b)))


@given(AGE, AGE)
def test_older_is_never_milder(a: float, b: float) -> None:
    limits = Limits.from_options({"drill_age": ["30 days", "90 days"]})
    for check, aged in {
        "backup": lambda age: facts(storage={"backups": (dataclasses.replace(FULL, age=age),)}),
        "full_backup": lambda age: facts(storage={"backups": (dataclasses.replace(FULL, age=age),)}),
        "verify": lambda age: facts(storage={"verify_age": age}),
        "drill": lambda age: facts(storage={"drill_age": age}),
        "gaps": lambda age: facts(archive={"holes": (Hole(1, "A", "A", 1, age),)}),
    }.items():
        levels = [RANK[found(aged(age), check, limits).level] for age in sorted((a, b))]
        assert levels == sorted(levels), check


@given(st.integers(0, 100 * GB), st.integers(0, 100 * GB), st.one_of(st.none(), st.floats(-1e12, 1e12)))
def test_less_room_is_never_milder(a: int, b: int, growth: float | None) -> None:
    def room(free: int) -> Facts:
        return facts(room={"free": free, "growth": growth})

    harder("space", room(max(a, b)), room(min(a, b)))


# --- limits


def test_limits_are_read_with_their_units() -> None:
    limits = Limits.from_options(
        {"backup_age": ["26 h", "50 h"], "slot_bytes": ["512MB", "2GB"], "days_left": [14, 3.5], "full_age": [0, ""]}
    )
    assert limits.backup_age == Limit(26 * 3600, 50 * 3600) and limits.slot_bytes == Limit(512 << 20, 2 << 30)
    assert limits.days_left == Limit(14, 3.5) and limits.full_age == Limit(0, 0)
    assert limits.verify_age == Limits().verify_age


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"backups_age": ["1 h", "2 h"]}, "no limit 'backups_age'"),
        ({"backup_age": "26 h"}, "list of two"),
        ({"backup_age": ["26", "50"]}, "backup_age '26'"),
        ({"backup_age": ["50 h", "26 h"]}, "critical before it warns"),
        ({"free_percent": [10, 20]}, "critical before it warns"),
        ({"slot_bytes": ["2 gigs", 0]}, "not a size"),
        ({"days_left": ["many", 3]}, "not a number"),
        ({"days_left": ["nan", 3]}, "not a number"),
    ],
)
def test_limit_that_cannot_be_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(PitrError, match="Nothing was changed") as caught:
        Limits.from_options(options)
    assert words in caught.value.message


def test_limit_of_zero_is_never() -> None:
    old = facts(storage={"backups": (dataclasses.replace(FULL, age=900 * DAY),), "verify_age": None})
    limits = Limits.from_options({"full_age": [0, 0], "backup_age": [0, 0], "verify_age": [0, 0]})
    assert worst(judge(old, limits)) == OK
