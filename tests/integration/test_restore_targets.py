# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Every recovery target lands on exactly the predicted row, from the right one of three backups."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.plugins.module_utils.target import format_time
from ansible_collections.pgdrill.pitr.tests.integration.support import Restored, until

if TYPE_CHECKING:
    from ansible_collections.pgdrill.pitr.tests.integration.conftest import History

Restore = Callable[..., Restored]
TICK = datetime.timedelta(microseconds=1)
NONE = datetime.timedelta(0)
# Makes the target from the history, whose figures are known only when it has been lived.
Target = Callable[["History"], dict[str, Any]]


def _time(phase: str, shift: datetime.timedelta = NONE, **more: Any) -> Target:
    return lambda history: {"recovery_target_time": format_time(history.commit(phase).time + shift), **more}


def _xid(phase: str, **more: Any) -> Target:
    return lambda history: {"recovery_target_xid": str(history.commit(phase).xid), **more}


def _start(phase: str, **more: Any) -> Target:
    return lambda history: {"recovery_target_lsn": str(history.commit(phase).start), **more}


def _end(phase: str, **more: Any) -> Target:
    return lambda history: {"recovery_target_lsn": str(history.commit(phase).end), **more}


EXCLUSIVE = {"recovery_target_inclusive": False}

# Target, the backup it must be restored from, the row it must land on, and PostgreSQL's word for where it stopped.
TARGETS = {
    "time of a commit, inclusive": (_time("first 2"), "first", "first 2", "before 2"),
    "time of a commit, exclusive": (_time("second 2", **EXCLUSIVE), "second", "second 1", "before 2"),
    "time one microsecond before a commit": (_time("third 2", -TICK), "third", "third 1", "before 2"),
    "xid, inclusive": (_xid("second 3"), "second", "second 3", "after transaction"),
    "xid, exclusive": (_xid("second 3", **EXCLUSIVE), "second", "second 2", "before transaction"),
    "lsn where a commit record begins, inclusive": (_start("first 3"), "first", "first 3", "after LSN"),
    "lsn where a commit record begins, exclusive": (_start("first 3", **EXCLUSIVE), "first", "first 2", "before LSN"),
    "lsn where a commit record ends, exclusive": (_end("third 1", **EXCLUSIVE), "third", "third 1", "before LSN"),
    "name": (lambda h: {"recovery_target_name": h.points["second"]}, "second", "second 2", "at restore point"),
    "immediate": (lambda h: {"recovery_target": "immediate"}, "third", "second 3", "reached consistency"),
    "latest": (lambda h: {}, "third", "end", "no recovery target specified"),
}


@pytest.mark.parametrize("case", TARGETS)
def test_target_lands_on_the_predicted_row(history: History, restored: Restore, case: str) -> None:
    options, label, phase, reason = TARGETS[case]
    cluster = restored(history.storage, options(history)).run()
    assert cluster.plan.backup.label == label
    assert cluster.phase == phase
    assert cluster.reached.reason.startswith(reason)
    assert not cluster.server.value("SELECT pg_is_in_recovery()")
    assert cluster.recovery.timeline() == 2


@pytest.mark.parametrize("label", ["first", "second", "third"])
def test_backup_chosen_for_every_kind_of_target_is_the_newest_that_ends_before_it(
    history: History, tmp_path: Path, label: str
) -> None:
    for options in (
        _time(f"{label} 1")(history),
        _xid(f"{label} 1")(history),
        _start(f"{label} 1")(history),
        {"recovery_target_name": history.points[label]},
    ):
        assert history.storage.plan(tmp_path / "none", options).backup.label == label


def test_backup_whose_end_is_exactly_the_target_is_chosen(history: History, restored: Restore, tmp_path: Path) -> None:
    backup = history.backups["second"]
    by_time = history.storage.plan(tmp_path / "none", {"recovery_target_time": format_time(backup.stopped_at)})
    assert by_time.backup.label == "second"
    just_before = {"recovery_target_time": format_time(backup.stopped_at - TICK)}
    assert history.storage.plan(tmp_path / "none", just_before).backup.label == "first"
    cluster = restored(history.storage, {"recovery_target_lsn": str(backup.stop_lsn), **EXCLUSIVE})
    assert cluster.plan.backup.label == "second"
    assert cluster.run().phase == "first 3"


def test_older_backup_can_be_asked_for_by_its_label(history: History, restored: Restore) -> None:
    cluster = restored(history.storage, _xid("third 1")(history), backup="first").run()
    assert cluster.plan.backup.label == "first"
    assert cluster.phase == "third 1"


def test_latest_backup_can_be_asked_for(history: History, tmp_path: Path) -> None:
    assert history.storage.plan(tmp_path / "none", backup="latest").backup.label == "third"


def test_pause_shows_the_row_and_resume_promotes(history: History, restored: Restore) -> None:
    options = _xid("second 2", recovery_target_action="pause")(history)
    cluster = restored(history.storage, options).run()
    assert cluster.phase == "second 2"
    assert cluster.server.value("SELECT pg_is_in_recovery()")
    assert cluster.recovery.progress().state == "paused"
    assert cluster.recovery.resume()
    until(lambda: not cluster.server.value("SELECT pg_is_in_recovery()"), "promotion")
    assert cluster.wait().reason == f"after transaction {history.commit('second 2').xid}"
    assert cluster.phase == "second 2"
    assert not cluster.recovery.resume()


def test_promote_ends_a_pause(history: History, restored: Restore) -> None:
    cluster = restored(history.storage, _end("first 2", recovery_target_action="pause", **EXCLUSIVE)(history)).run()
    assert cluster.recovery.promote(60)
    assert not cluster.recovery.promote(60)
    assert cluster.phase == "first 2"


def test_shutdown_at_the_target_counts_as_reached(history: History, restored: Restore) -> None:
    cluster = restored(history.storage, _xid("third 2", recovery_target_action="shutdown")(history)).run()
    assert not cluster.server.is_running
    assert f"transaction {history.commit('third 2').xid}" in cluster.reached.reason


def _slow(cluster: Restored) -> None:
    """Let the recovery stand still at the first commit after the backup, without having reached anything."""
    (cluster.server.data / "conf.d" / "zz-slow.conf").write_text("recovery_min_apply_delay = '10d'\n", encoding="utf-8")
    cluster.server.start(wait=False)
    until(lambda: cluster.recovery.progress().state == "replaying" and cluster.recovery.progress().lsn, "hot standby")


def test_recovery_under_way_is_not_taken_for_reached(history: History, restored: Restore) -> None:
    cluster = restored(history.storage, _xid("third 2")(history))
    _slow(cluster)
    reached, progress = cluster.recovery.wait(0.3)
    assert reached is None
    assert progress.state == "replaying"
    assert progress.percent is not None and progress.percent < 100


def test_shutdown_by_somebody_before_the_target_is_no_success(history: History, restored: Restore) -> None:
    cluster = restored(history.storage, _xid("third 2", recovery_target_action="shutdown")(history))
    _slow(cluster)
    cluster.server.stop()
    with pytest.raises(PitrError, match="not proven that its target was reached"):
        cluster.wait()


@pytest.mark.parametrize("action", ["promote", "pause"])
def test_pause_by_somebody_before_the_target_is_no_success(history: History, restored: Restore, action: str) -> None:
    cluster = restored(history.storage, _xid("third 2", recovery_target_action=action)(history))
    _slow(cluster)
    cluster.server.sql("SELECT pg_wal_replay_pause()")
    # The startup process looks at the request when it wakes up from the delay, or gets to the next record.
    (cluster.server.data / "conf.d" / "zz-slow.conf").unlink()
    cluster.server.sql("SELECT pg_reload_conf()")
    until(lambda: cluster.recovery.progress().state == "paused", "pause")
    try:
        reached, _progress = cluster.recovery.wait(0.3)
    except PitrError as error:
        assert "paused" in str(error)
    else:
        assert reached is None


def test_promotion_asked_for_before_the_target_does_not_cut_the_recovery_short(
    history: History, restored: Restore
) -> None:
    cluster = restored(history.storage, _xid("third 2")(history))
    _slow(cluster)
    cluster.server.sql("SELECT pg_promote()")
    assert cluster.wait().xid == str(history.commit("third 2").xid)
    assert cluster.phase == "third 2"


def test_first_of_two_restore_points_of_one_name_is_not_silently_passed(
    history: History, sandbox: Callable[..., Any], restored: Restore
) -> None:
    primary = sandbox()
    primary.backup("only")
    for phase in ("one", "two"):
        primary.commit(phase)
        primary.server.sql("SELECT pg_create_restore_point('twice')")
        time.sleep(0.01)
    primary.commit("three")
    primary.probe()
    primary.server.stop()
    # PostgreSQL stops at the first one that it meets.
    assert restored(primary, {"recovery_target_name": "twice"}).run().phase == "one"
