# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What is decided about a standby's directory, for every kind of directory and primary."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils.plan import Refusal
from ansible_collections.pgdrill.pitr.plugins.module_utils.postgres import ControlData
from ansible_collections.pgdrill.pitr.plugins.module_utils.standby import (
    Decision,
    Local,
    Position,
    Upstream,
    can_be_rewound,
    check_slot,
    decide,
    floors,
    made_nothing_yet,
)
from ansible_collections.pgdrill.pitr.plugins.module_utils.timeline import Switch
from ansible_collections.pgdrill.pitr.plugins.module_utils.wal import Lsn

# The primary was promoted at 0/500 of timeline 1, and is on timeline 2 now.
PRIMARY = Upstream("1", 2, Lsn.parse("0/900"), 18, (Switch(1, Lsn.parse("0/500"), ""),))
STANDBY = Local("cluster", system_identifier="1", signal="standby", timeline=2, lsn=Lsn.parse("0/600"), rewindable=True)


def decided(local: Local, upstream: Upstream = PRIMARY, rebuild: str = "never", **options: Any) -> str:
    """The action, or the code of the refusal."""
    found = decide(local, upstream, rebuild, "/data", 18, **options)
    return found.code if isinstance(found, Refusal) else found.action


def at(timeline: int, lsn: str, **facts: Any) -> Local:
    return replace(STANDBY, timeline=timeline, lsn=Lsn.parse(lsn), **facts)


def test_standby_goes_on_when_its_position_is_in_the_primarys_past() -> None:
    assert decided(at(2, "0/600")) == "follow"
    assert decided(at(2, "0/600", running=True, in_recovery=True)) == "none"
    # It need not have come to the switch yet, and may stand right at it.
    assert decided(at(1, "0/400")) == "follow"
    assert decided(at(1, "0/500")) == "follow"
    assert decided(at(1, "0/501")) == "diverged"
    assert decided(at(2, "0/4FF")) == "diverged"
    assert decided(at(3, "0/600")) == "diverged"


def test_record_that_begins_where_a_timeline_ends_is_not_of_its_past() -> None:
    """An old primary's shutdown checkpoint: it has to be replayed, not only to begin, before the switch."""
    assert decided(at(1, "0/4FF", begins=True)) == "follow"
    assert decided(at(1, "0/500", begins=True)) == "diverged"


@pytest.mark.parametrize(
    ("local", "code"),
    [
        (at(1, "0/501"), "diverged"),
        (at(2, "0/600", proven=False, state="in production"), "diverged"),
        (at(2, "0/600", running=True), "is_primary"),
        (at(2, "0/600", signal="recovery"), "recovery_under_way"),
    ],
)
def test_what_is_no_standby_of_this_primary_is_rebuilt_only_when_that_is_allowed(local: Local, code: str) -> None:
    assert decided(local) == code
    assert decided(local, rebuild="rewind") == "rewind"
    assert decided(local, rebuild="clone") == "clone"
    found = decide(local, PRIMARY, "clone", "/data", 18)
    assert isinstance(found, Decision) and found.aside and found.stop == local.running
    assert decided(replace(local, rewindable=False), rebuild="rewind") == "rewind_impossible"
    assert decided(replace(local, mount_point=True), rebuild="clone") == "directory_mount_point"


def test_permission_to_rebuild_is_no_order_to() -> None:
    for rebuild in ("rewind", "clone"):
        assert decided(STANDBY, rebuild=rebuild) == "follow"
        assert decided(replace(STANDBY, running=True, in_recovery=True), rebuild=rebuild) == "none"


def test_directories_of_others_stay_whatever_is_allowed() -> None:
    for rebuild in ("never", "rewind", "clone"):
        found = decide(Local("foreign", "is full of pictures"), PRIMARY, rebuild, "/data", 18)
        assert isinstance(found, Refusal) and found.message.startswith("/data is full of pictures.")
        assert decided(replace(STANDBY, system_identifier="2"), rebuild=rebuild) == "directory_foreign"
    empty = replace(STANDBY, system_identifier="2", empty_cluster=True)
    assert decided(empty) == "directory_foreign"
    assert decided(empty, replace_empty=True) == "clone"
    assert decided(replace(empty, empty_cluster=False), replace_empty=True) == "directory_foreign"


def test_nothing_there_is_cloned_and_a_rewind_that_was_interrupted_is_told() -> None:
    assert decided(Local("missing")) == "clone"
    assert decided(Local("unfinished")) == "clone"
    interrupted = Local("missing", left_rewind="/data.rewinding")
    assert decided(interrupted) == "rewind_interrupted"
    assert decided(interrupted, rebuild="rewind") == "rewind_interrupted"
    found = decide(interrupted, PRIMARY, "clone", "/data", 18)
    assert isinstance(found, Decision) and "/data.rewinding" in found.notes[0]


@pytest.mark.parametrize(
    ("facts", "code"),
    [
        ({"itself": True}, "is_the_primary"),
        ({"in_recovery": True}, "primary_is_standby"),
        ({"accepted": False}, "primary_not_accepted"),
        ({"major": 17}, "version"),
        ({"slot": "active"}, "slot_in_use"),
    ],
)
def test_servers_that_are_not_followed(facts: dict[str, Any], code: str) -> None:
    for local in (STANDBY, Local("missing")):
        for rebuild in ("never", "rewind", "clone"):
            assert decided(local, replace(PRIMARY, **facts), rebuild) == code


def test_slot_is_wanted_for_what_is_made_and_not_for_what_runs() -> None:
    for state in ("none", "lost"):
        upstream = replace(PRIMARY, slot=state)
        refusal = check_slot(upstream, Decision("clone", ""), "ours")
        assert refusal is not None and refusal.code == "slot_missing"
        assert check_slot(upstream, Decision("none", ""), "ours") is None
    assert check_slot(PRIMARY, Decision("follow", ""), "ours") is None


def control(**values: str) -> ControlData:
    found = {
        "Database cluster state": "shut down",
        "Latest checkpoint's TimeLineID": "1",
        "Latest checkpoint location": "0/400",
        "Minimum recovery ending location": "0/0",
        "Min recovery ending loc's timeline": "0",
        "Latest checkpoint's NextOID": "12784",
        "wal_log_hints setting": "off",
        "Data page checksum version": "0",
    }
    return ControlData({**found, **values})


def test_position_is_the_minimum_recovery_point_of_a_standby_and_the_checkpoint_of_a_primary() -> None:
    stopped = Position(control(), "", False)
    assert (stopped.timeline, stopped.lsn, stopped.begins, stopped.proven) == (1, 0x400, True, True)
    values = {
        "Database cluster state": "shut down in recovery",
        "Minimum recovery ending location": "0/700",
        "Min recovery ending loc's timeline": "2",
    }
    standby = Position(control(**values), "standby", False)
    assert (standby.timeline, standby.lsn, standby.begins, standby.proven) == (2, 0x700, False, True)


def test_position_of_a_crashed_primary_is_not_known_and_that_of_a_fresh_clone_is() -> None:
    crashed = control(**{"Database cluster state": "in production"})
    assert not Position(crashed, "", False).proven
    assert not Position(crashed, "standby", False).proven
    assert not Position(crashed, "", True).proven
    assert Position(crashed, "standby", True).proven


def test_empty_cluster_is_told_by_the_first_oid_that_was_not_given_out() -> None:
    assert made_nothing_yet(control())
    assert not made_nothing_yet(control(**{"Latest checkpoint's NextOID": "16384"}))
    assert not made_nothing_yet(control(**{"Database cluster state": "in production"}))


def test_rewinding_wants_checksums_or_hints() -> None:
    assert not can_be_rewound(control())
    assert can_be_rewound(control(**{"wal_log_hints setting": "on"}))
    assert can_be_rewound(control(**{"Data page checksum version": "1"}))


def test_limits_are_those_of_the_primary_unless_higher_ones_are_wanted() -> None:
    least = {"max_connections": 100, "max_worker_processes": 8}
    assert floors({"max_connections": 200, "max_worker_processes": "4"}, least) == {"max_worker_processes": 8}
    assert floors({}, least, {"max_connections": 120}) == {"max_connections": 120, "max_worker_processes": 8}
    assert floors({"max_connections": "many"}, least)["max_connections"] == 100
