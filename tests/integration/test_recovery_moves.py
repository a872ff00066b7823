# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A recovery pauses, is looked at, and goes on: to a later target, to the end, to be promoted. Never back."""

from __future__ import annotations

import datetime
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils import recovery_conf
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.plugins.module_utils.moves import Move, Moved, Request, stop
from ansible_collections.pgdrill.pitr.plugins.module_utils.plan import RefusedError
from ansible_collections.pgdrill.pitr.plugins.module_utils.target import format_time
from ansible_collections.pgdrill.pitr.plugins.module_utils.wal import Lsn
from ansible_collections.pgdrill.pitr.tests.integration.support import (
    CLUSTER,
    PATIENCE,
    Restored,
    Sandbox,
    Storage,
    fingerprint,
    until,
)

if TYPE_CHECKING:
    from ansible_collections.pgdrill.pitr.tests.integration.conftest import History

Restore = Callable[..., Restored]
TICK = datetime.timedelta(microseconds=1)
PAUSE = {"recovery_target_action": "pause"}
EXCLUSIVE = {"recovery_target_inclusive": False}


def request(cluster: Restored, storage: Storage | None = None, **options: Any) -> Request:
    return Request(
        login=cluster.server.login,
        pgdata=str(cluster.server.data),
        bin_dir=cluster.storage.bin_dir,
        repository=str((storage or cluster.storage).repository),
        cluster=CLUSTER,
        config_dir=cluster.request.config_dir,
        log_file=str(cluster.server.log),
        target_options=options,
    )


def move(cluster: Restored, **options: Any) -> Moved:
    """Write the new target, and do what the role does: start the server again, and wait."""
    moved = Move(request(cluster, **options)).perform()
    cluster.server.stop()
    cluster.run()
    return moved


def refused(cluster: Restored, storage: Storage | None = None, **options: Any) -> RefusedError:
    """The refusal; nothing of the configuration has changed, and the server has not moved."""
    files = [Path(recovery_conf.include_path(str(cluster.server.data))), cluster.server.data / "postgresql.auto.conf"]

    def stands() -> tuple[str, str]:
        progress = cluster.recovery.progress()
        # A promoted server writes WAL of its own.
        return progress.state, "" if progress.state == "promoted" else progress.lsn

    before = fingerprint(*files), stands()
    with pytest.raises(RefusedError) as caught:
        Move(request(cluster, storage, **options)).perform()
    assert (fingerprint(*files), stands()) == before
    assert caught.value.message.startswith("The move is refused; nothing was changed")
    return caught.value


def codes(error: RefusedError) -> list[str]:
    return [refusal.code for refusal in error.refusals]


def paused(history: History, restored: Restore, phase: str, **more: Any) -> Restored:
    options = {"recovery_target_xid": str(history.commit(phase).xid), **PAUSE, **more}
    return restored(history.storage, options).run()


# Every kind of target, in any order of kinds: what to ask for, and the row to land on.
MOVES: dict[str, tuple[Callable[[History], dict[str, Any]], str]] = {
    "xid": (lambda h: {"recovery_target_xid": str(h.commit("second 3").xid)}, "second 3"),
    "xid, exclusive": (lambda h: {"recovery_target_xid": str(h.commit("second 3").xid), **EXCLUSIVE}, "second 2"),
    "time": (lambda h: {"recovery_target_time": h.commit("third 1").time_text}, "third 1"),
    "time, exclusive": (lambda h: {"recovery_target_time": h.commit("third 1").time_text, **EXCLUSIVE}, "second 3"),
    "lsn": (lambda h: {"recovery_target_lsn": str(h.commit("third 2").start)}, "third 2"),
    "lsn, exclusive": (lambda h: {"recovery_target_lsn": str(h.commit("third 2").end), **EXCLUSIVE}, "third 2"),
    "name": (lambda h: {"recovery_target_name": h.points["third"]}, "third 2"),
}


@pytest.mark.parametrize("case", MOVES)
def test_paused_recovery_is_moved_on_to_exactly_the_new_target(history: History, restored: Restore, case: str) -> None:
    options, phase = MOVES[case]
    cluster = paused(history, restored, "second 1")
    assert cluster.phase == "second 1"
    stood = cluster.reached.lsn
    moved = move(cluster, **options(history))
    assert moved.changed and moved.restart and moved.position == stood
    assert cluster.phase == phase
    assert cluster.server.value("SELECT pg_is_in_recovery()")
    planned = cluster.recovery.planned()
    assert planned["moved_from"] == stood and planned["target"] != cluster.plan.target
    assert [item["target"] for item in planned["moves"]] == [str(cluster.plan.target)]
    # From the first restore, and no more than that: nothing of it was copied again.
    assert planned["backup"] == "second"


def test_pause_look_move_look_move_to_the_end_of_the_archive(history: History, restored: Restore) -> None:
    cluster = paused(history, restored, "first 1")
    identity = cluster.server.system_identifier
    for phase in ("first 3", "second 2"):
        move(cluster, recovery_target_xid=str(history.commit(phase).xid))
        assert cluster.phase == phase and cluster.recovery.progress().state == "paused"
    # A third time, to where nothing more is archived: PostgreSQL promotes at the end, whatever the action.
    move(cluster)
    assert cluster.phase == "end" and cluster.reached.reason == "no recovery target specified"
    assert cluster.recovery.timeline() == 2 and cluster.server.system_identifier == identity
    assert cluster.recovery.accept()[0]
    assert cluster.recovery.planned() == {}
    assert not list(cluster.server.data.glob("*.signal"))


def test_moved_recovery_is_promoted_where_it_was_moved_to(history: History, restored: Restore) -> None:
    cluster = paused(history, restored, "second 1")
    move(cluster, recovery_target_xid=str(history.commit("second 3").xid))
    assert cluster.recovery.promote(PATIENCE)
    reached = cluster.wait()
    assert (reached.xid, cluster.phase) == (str(history.commit("second 3").xid), "second 3")
    assert cluster.recovery.timeline() == 2


BEHIND: dict[str, Callable[[History], dict[str, Any]]] = {
    "xid": lambda h: {"recovery_target_xid": str(h.commit("second 1").xid)},
    "xid before the restartpoint": lambda h: {"recovery_target_xid": str(h.commit("first 2").xid)},
    "time": lambda h: {"recovery_target_time": format_time(h.commit("second 2").time - TICK)},
    "lsn": lambda h: {"recovery_target_lsn": str(h.commit("second 2").start)},
    "lsn that is the position, exclusive": lambda h: {
        "recovery_target_lsn": str(h.commit("second 2").end), **EXCLUSIVE
    },
    "immediate": lambda h: {"recovery_target": "immediate"},
}  # fmt: skip


@pytest.mark.parametrize("case", BEHIND)
def test_target_behind_the_recovery_is_refused_with_its_position(
    history: History, restored: Restore, case: str
) -> None:
    cluster = paused(history, restored, "second 2")
    error = refused(cluster, **BEHIND[case](history))
    assert codes(error) == ["target_not_in_archive" if "restartpoint" in case else "target_passed"]
    assert "restore again with this target" in error.message
    if codes(error) == ["target_passed"]:
        assert cluster.reached.lsn in error.message
    assert cluster.phase == "second 2"


def test_restore_point_of_the_same_name_before_the_position_is_refused(
    sandbox: Callable[..., Sandbox], restored: Restore
) -> None:
    """PostgreSQL would stop at the first one it meets when it begins again, and could not be consistent there."""
    primary = sandbox()
    primary.backup("only")
    commits = []
    for phase in ("one", "two", "three"):
        commits.append(primary.commit(phase))
        primary.server.sql("SELECT pg_create_restore_point('twice')")
    primary.probe()
    primary.server.stop()
    cluster = restored(primary, {"recovery_target_xid": str(commits[1].xid), **PAUSE}).run()
    assert codes(refused(cluster, recovery_target_name="twice")) == ["target_passed"]
    move(cluster, recovery_target_xid=str(commits[2].xid))
    assert cluster.phase == "three"


def test_target_beyond_the_archive_or_behind_a_hole_is_refused(
    history: History, restored: Restore, tmp_path: Path
) -> None:
    cluster = paused(history, restored, "second 1")
    end = history.commit("end")
    assert codes(refused(cluster, recovery_target_lsn=str(Lsn(end.end + (64 << 20))))) == ["target_beyond_archive"]
    late = format_time(end.time + datetime.timedelta(hours=1))
    assert codes(refused(cluster, recovery_target_time=late)) == ["target_beyond_archive"]
    assert codes(refused(cluster, recovery_target_xid=str(end.xid + 100))) == ["target_not_in_archive"]
    assert codes(refused(cluster, recovery_target_name="never made")) == ["target_not_in_archive"]
    assert codes(refused(cluster, recovery_target_time="2026-01-01 00:00:00")) == ["target"]
    assert codes(refused(cluster, recovery_target_timeline="7")) == ["timeline_unknown"]
    broken = history.storage.copy(tmp_path)
    broken.segment(history.commit("third 2").start).unlink()
    error = refused(cluster, broken, recovery_target_lsn=str(end.end), **EXCLUSIVE)
    assert codes(error) == ["archive_gap"] and broken.segment is not None
    shutil.rmtree(broken.repository)
    assert codes(refused(cluster, broken, recovery_target_lsn=str(end.end))) == ["repository"]


def test_only_a_recovery_that_stands_still_is_moved(history: History, restored: Restore) -> None:
    target = {"recovery_target_xid": str(history.commit("end").xid)}
    cluster = paused(history, restored, "second 1")
    assert cluster.recovery.promote(PATIENCE)
    assert codes(refused(cluster, **target)) == ["promoted"]
    cluster.recovery.accept()
    with pytest.raises(PitrError, match="No recovery of this collection is under way"):
        Move(request(cluster, **target)).perform()
    never = restored(history.storage, {"recovery_target_xid": str(history.commit("second 1").xid), **PAUSE})
    assert codes(refused(never, **target)) == ["not_in_recovery"]
    (never.server.data / "conf.d" / "zz-slow.conf").write_text("recovery_min_apply_delay = '10d'\n", encoding="utf-8")
    never.server.start(wait=False)
    until(lambda: never.recovery.progress().state == "replaying" and never.recovery.progress().lsn, "hot standby")
    assert codes(refused(never, **target)) == ["not_paused"]


def test_check_mode_shows_the_plan_and_writes_nothing(history: History, restored: Restore) -> None:
    cluster = paused(history, restored, "second 1")
    before = fingerprint(Path(recovery_conf.include_path(str(cluster.server.data))))
    moved = Move(request(cluster, recovery_target_xid=str(history.commit("third 1").xid))).perform(check=True)
    assert moved.changed and moved.plan["target"].startswith("xid ") and moved.plan["segments"] > 1
    assert fingerprint(Path(recovery_conf.include_path(str(cluster.server.data)))) == before


def test_server_that_was_not_started_again_is_not_taken_for_one_at_its_new_target(
    history: History, restored: Restore
) -> None:
    cluster = paused(history, restored, "second 1")
    # The same place, and another action: that is nothing the place could tell.
    same = {"recovery_target_xid": str(history.commit("second 1").xid), "recovery_target_action": "shutdown"}
    assert Move(request(cluster, **same)).perform().restart
    with pytest.raises(PitrError, match="still stands at its old one"):
        cluster.wait()
    options = {"recovery_target_xid": str(history.commit("second 3").xid), **PAUSE}
    assert Move(request(cluster, **options)).perform().restart
    with pytest.raises(PitrError, match="still stands at its old one"):
        cluster.wait()
    # Repeating says the same, and changes nothing.
    again = Move(request(cluster, **options)).perform()
    assert not again.changed and again.restart
    cluster.server.stop()
    # A stopped one is moved as well; it has to be started.
    third = Move(request(cluster, recovery_target_xid=str(history.commit("third 1").xid), **PAUSE)).perform()
    assert third.changed and not third.restart
    assert cluster.run().phase == "third 1"


def test_server_that_shut_down_at_its_target_pauses_there_and_goes_on(history: History, restored: Restore) -> None:
    options = {"recovery_target_xid": str(history.commit("second 2").xid)}
    cluster = restored(history.storage, {**options, "recovery_target_action": "shutdown"}).run()
    assert not cluster.server.is_running
    moved = Move(request(cluster, **options, **PAUSE)).perform()
    assert moved.changed and not moved.restart
    assert cluster.run().phase == "second 2"
    assert cluster.recovery.progress().state == "paused"
    move(cluster, recovery_target_xid=str(history.commit("second 3").xid))
    assert cluster.phase == "second 3"


def test_recovery_that_was_killed_is_moved_on(history: History, restored: Restore) -> None:
    cluster = paused(history, restored, "second 2")
    cluster.server.stop("immediate")
    assert Move(request(cluster, recovery_target_xid=str(history.commit("third 1").xid))).perform().changed
    assert cluster.run().phase == "third 1"


def test_settings_that_the_primary_has_raised_are_raised_with_the_move(
    sandbox: Callable[..., Sandbox], restored: Restore
) -> None:
    primary = sandbox()
    primary.backup("only")
    first = primary.commit("first")
    primary.configure({"max_connections": 44})
    primary.server.restart()
    second = primary.commit("second")
    third = primary.commit("third")
    primary.probe()
    primary.server.stop()
    cluster = restored(primary, {"recovery_target_xid": str(first.xid), **PAUSE}).run()
    cluster.server.stop()
    Move(request(cluster, recovery_target_xid=str(second.xid))).perform()
    cluster.server.start(wait=False)
    with pytest.raises(PitrError, match="max_connections must be at least 44"):
        cluster.wait()
    move(cluster, recovery_target_xid=str(third.xid))
    assert cluster.phase == "third" and cluster.server.show("max_connections") == "44"


def test_recovery_moves_to_a_later_timeline_that_leads_on_from_where_it_stands_and_to_no_other(
    sandbox: Callable[..., Sandbox], restored: Restore
) -> None:
    primary = sandbox()
    primary.backup("only")
    first = primary.commit("first")
    fork = primary.commit("fork")
    primary.commit("lost")
    primary.probe()
    primary.server.stop()
    branch = restored(primary, {"recovery_target_xid": str(fork.xid)}, archive_after="none-until-promoted").run()
    branch.recovery.accept()
    primary.server = branch.server
    on_branch = primary.commit("branch")
    primary.commit("branch later")
    primary.probe()
    branch.server.stop()
    along = {"recovery_target_timeline": "1"}
    cluster = restored(primary, {"recovery_target_xid": str(first.xid), **PAUSE, **along}).run()
    assert codes(refused(cluster, recovery_target_xid=str(on_branch.xid) + "00")) == ["target_not_in_archive"]
    move(cluster, recovery_target_lsn=str(on_branch.end), recovery_target_timeline="latest", **EXCLUSIVE)
    assert cluster.phase == "branch" and cluster.recovery.planned()["timeline"] == 2
    # Standing on timeline 2, timeline 1 is another future.
    error = refused(cluster, recovery_target_timeline="1")
    assert codes(error) == ["timeline_other"]


# --- resume, promote, stop


def test_resuming_tells_whether_it_ended_the_recovery(history: History, restored: Restore) -> None:
    at_target = paused(history, restored, "second 2")
    assert at_target.recovery.go_on(PATIENCE) == "promoted"
    assert at_target.recovery.timeline() == 2 and at_target.phase == "second 2"
    assert at_target.recovery.go_on(PATIENCE) == ""
    before = restored(history.storage, {"recovery_target_xid": str(history.commit("third 2").xid), **PAUSE})
    slow = before.server.data / "conf.d" / "zz-slow.conf"
    slow.write_text("recovery_min_apply_delay = '10d'\n", encoding="utf-8")
    before.server.start(wait=False)
    until(lambda: before.recovery.progress().state == "replaying" and before.recovery.progress().lsn, "hot standby")
    before.server.sql("SELECT pg_wal_replay_pause()")
    slow.unlink()
    before.server.sql("SELECT pg_reload_conf()")
    until(lambda: before.recovery.progress().state == "paused", "pause")
    stood = before.recovery.progress().lsn
    assert before.recovery.go_on(PATIENCE) == "continued"
    # On to the target, and there it pauses once more.
    assert before.wait().xid == str(history.commit("third 2").xid)
    assert Lsn.parse(before.recovery.progress().lsn) > Lsn.parse(stood) and before.phase == "third 2"


def test_stopped_recovery_goes_on_where_it_was(history: History, restored: Restore) -> None:
    cluster = paused(history, restored, "second 2")
    arguments = (cluster.recovery, str(cluster.server.data), cluster.storage.bin_dir, PATIENCE)
    assert stop(*arguments)
    assert not cluster.server.is_running
    assert not stop(*arguments)
    assert cluster.run().phase == "second 2"
    cluster.recovery.promote(PATIENCE)
    with pytest.raises(PitrError, match="there is no recovery to stop"):
        stop(*arguments)
    assert cluster.server.is_running


# --- proof that a server has paused at its target, wherever its log is


@pytest.fixture
def collected(history: History, restored: Restore) -> Iterator[Callable[..., Restored]]:
    """A cluster whose log is written by the logging collector: ``collected(settings, target)``."""

    def make(settings: dict[str, str], options: dict[str, Any], **more: Any) -> Restored:
        cluster = restored(history.storage, options, **more)
        lines = [f"{name} = '{value}'" for name, value in settings.items()]
        (cluster.server.data / "conf.d" / "60-log.conf").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return cluster

    yield make


LOGS = {
    "stderr": {"log_destination": "stderr"},
    "stderr, another prefix": {"log_destination": "stderr", "log_line_prefix": "LOG: <%q%u> %e %n "},
    "stderr elsewhere": {"log_destination": "stderr", "log_directory": "{place}/logs", "log_filename": "%H-%M.txt"},
    "csvlog": {"log_destination": "csvlog"},
    "jsonlog": {"log_destination": "jsonlog"},
    "all of them": {"log_destination": "stderr,csvlog,jsonlog"},
}


@pytest.mark.parametrize("case", LOGS)
@pytest.mark.parametrize("action", ["pause", "shutdown"])
def test_target_is_proven_by_the_collectors_log(
    history: History, collected: Callable[..., Restored], tmp_path: Path, case: str, action: str
) -> None:
    settings = {name: value.format(place=tmp_path) for name, value in LOGS[case].items()}
    (tmp_path / "logs").mkdir()
    # A time: its position is not in the plan, so that only the log is proof.
    options = {"recovery_target_time": history.commit("second 2").time_text, "recovery_target_action": action}
    cluster = collected({"logging_collector": "on", **settings}, options).run()
    assert cluster.reached.reason.startswith("before 2")
    # And once it is rotated away, and much was logged since.
    if action == "pause" and "elsewhere" not in case:
        for _number in range(300):
            cluster.server.sql("SELECT pg_log_backend_memory_contexts(pg_backend_pid())")
        cluster.server.sql("SELECT pg_rotate_logfile()")
        assert cluster.wait() == cluster.reached


def test_words_of_a_statement_in_the_log_are_no_proof(history: History, collected: Callable[..., Restored]) -> None:
    options = {"recovery_target_time": history.commit("third 2").time_text, **PAUSE}
    slow = {"recovery_min_apply_delay": "10d", "log_statement": "all"}
    cluster = collected(slow, options)
    cluster.server.start(wait=False)
    until(lambda: cluster.recovery.progress().state == "replaying" and cluster.recovery.progress().lsn, "hot standby")
    when = format_time(history.commit("third 3").time)
    words = f"recovery stopping before commit of transaction 7, time {when}"
    cluster.server.sql(f"SELECT '{words}', '\nLOG:  {words}\n'")
    cluster.server.sql("SELECT pg_wal_replay_pause()")
    (cluster.server.data / "conf.d" / "60-log.conf").unlink()
    cluster.server.sql("SELECT pg_reload_conf()")
    until(lambda: cluster.recovery.progress().state == "paused", "pause")
    with pytest.raises(PitrError, match="it is not proven that its target was reached"):
        cluster.wait()


POSITIONS: dict[str, Callable[[History], dict[str, Any]]] = {
    "xid": lambda h: {"recovery_target_xid": str(h.commit("second 3").xid)},
    "xid, exclusive": lambda h: {"recovery_target_xid": str(h.commit("second 3").xid), **EXCLUSIVE},
    "lsn, exclusive": lambda h: {"recovery_target_lsn": str(h.commit("second 3").end), **EXCLUSIVE},
    "name": lambda h: {"recovery_target_name": h.points["second"]},
    "immediate": lambda h: {"recovery_target": "immediate"},
}


@pytest.mark.parametrize("case", POSITIONS)
def test_without_a_log_the_position_is_proof(history: History, collected: Callable[..., Restored], case: str) -> None:
    cluster = collected({"log_min_messages": "panic"}, {**POSITIONS[case](history), **PAUSE}).run()
    assert "recovery stopping" not in cluster.server.log_text()
    assert cluster.reached.reason
    assert cluster.phase == {"name": "second 2", "xid, exclusive": "second 2"}.get(case, "second 3")


def test_without_a_log_and_a_position_nothing_is_proven(history: History, collected: Callable[..., Restored]) -> None:
    options = {"recovery_target_time": history.commit("second 2").time_text, **PAUSE}
    cluster = collected({"log_min_messages": "panic"}, options)
    cluster.server.start(wait=False)
    with pytest.raises(PitrError, match="it is not proven that its target was reached"):
        cluster.wait()
    # One that was moved to knows where it has to stop.
    move(cluster, recovery_target_time=history.commit("second 3").time_text)
    assert cluster.phase == "second 3" and "told by the position" in cluster.reached.reason


def test_somebodys_pause_before_the_target_is_not_proven_by_its_position(
    history: History, collected: Callable[..., Restored]
) -> None:
    options = {"recovery_target_xid": str(history.commit("third 2").xid), **PAUSE}
    cluster = collected({"recovery_min_apply_delay": "10d", "log_min_messages": "panic"}, options)
    cluster.server.start(wait=False)
    until(lambda: cluster.recovery.progress().state == "replaying" and cluster.recovery.progress().lsn, "hot standby")
    cluster.server.sql("SELECT pg_wal_replay_pause()")
    (cluster.server.data / "conf.d" / "60-log.conf").write_text("log_min_messages = panic\n", encoding="utf-8")
    cluster.server.sql("SELECT pg_reload_conf()")
    until(lambda: cluster.recovery.progress().state == "paused", "pause")
    with pytest.raises(PitrError, match="it is not proven that its target was reached"):
        cluster.wait()


# --- progress


def test_progress_tells_target_distance_timeline_and_last_transaction(history: History, restored: Restore) -> None:
    cluster = paused(history, restored, "second 2")
    progress = cluster.recovery.progress()
    assert progress.state == "paused" and progress.target == str(cluster.plan.target)
    assert progress.percent == 100 and progress.distance_bytes == 0 and progress.timeline == 1
    seen = datetime.datetime.fromisoformat(progress.last_transaction_time)
    assert seen == history.commit("second 2").time
    Move(request(cluster, recovery_target_xid=str(history.commit("end").xid))).perform()
    ahead = cluster.recovery.progress()
    assert ahead.distance_bytes is not None and ahead.distance_bytes > 1 << 20
    assert ahead.percent is not None and ahead.percent < 100
    cluster.server.stop()
    assert cluster.recovery.progress().state == "stopped"
