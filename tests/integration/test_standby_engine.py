# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Standbys are cloned, refused, rewound and promoted: the engine behind the module standby, on real servers."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils import combine, locks, recovery_conf, settings
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.plugins.module_utils.extract import IN_PROGRESS, PG_CONTROL
from ansible_collections.pgdrill.pitr.plugins.module_utils.postgres import Login, control_data
from ansible_collections.pgdrill.pitr.plugins.module_utils.standby import Decision
from ansible_collections.pgdrill.pitr.plugins.module_utils.standby_look import REWINDING
from ansible_collections.pgdrill.pitr.plugins.module_utils.standby_make import Request, Result, Standby
from ansible_collections.pgdrill.pitr.plugins.module_utils.standby_turn import Bear, Turn
from ansible_collections.pgdrill.pitr.tests.integration.support import (
    CLUSTER,
    Sandbox,
    Server,
    fingerprint,
    refuses_to_start,
    until,
)

SLOT = "standby_1"
PASSWORD = "a:secret\\ it's"


class Pair:
    """An archived primary, and a directory beside it that is to be its standby."""

    def __init__(self, primary: Sandbox, **options: Any) -> None:
        self.primary = primary
        self.server = Server(primary.bin_dir, primary.directory / "standby" / "data")
        self.server.data.parent.mkdir()
        self.options: dict[str, Any] = options
        server = primary.server
        server.sql("CREATE ROLE pitr_standby LOGIN REPLICATION")
        for function in (
            "pg_ls_dir(text, boolean, boolean)",
            "pg_stat_file(text, boolean)",
            "pg_read_binary_file(text)",
            "pg_read_binary_file(text, bigint, bigint, boolean)",
        ):
            server.sql(f"GRANT EXECUTE ON FUNCTION {function} TO pitr_standby")
        server.sql("SELECT pg_create_physical_replication_slot(%s, true)", SLOT)

    @property
    def upstream(self) -> Login:
        server = self.primary.server
        return Login(unix_socket=server.socket, port=server.PORT, user="pitr_standby", password=PASSWORD)

    def request(self, **options: Any) -> Request:
        primary = self.primary
        values: dict[str, Any] = {
            "pgdata": str(self.server.data),
            "bin_dir": primary.bin_dir,
            "login": self.server.login,
            "upstream": self.upstream,
            "slot": SLOT,
            "application_name": SLOT,
            "passfile": str(primary.directory / "secrets" / "main.pgpass"),
            "wal_command": primary.wal_command,
            "repository": str(primary.repository),
            "cluster": CLUSTER,
            "settings": {"archive_mode": "on", "archive_command": primary.archive_command},
            **self.options,
            **options,
        }
        return Request(**values)

    def make(self, **options: Any) -> tuple[Decision, Result]:
        """What the role does, but for starting."""
        standby = Standby(self.request(**options))
        decision = standby.look()
        if decision.stop:
            self.server.stop()
        return decision, standby.perform(decision)

    def refused(self, code: str, **options: Any) -> PitrError:
        """The refusal, which has touched nothing."""
        before = fingerprint(self.server.data)
        with pytest.raises(PitrError) as caught:
            self.make(**options)
        assert f"[{code}]" in caught.value.message, caught.value.message
        assert fingerprint(self.server.data) == before
        return caught.value

    @property
    def turn(self) -> Turn:
        return Turn(self.server.login, str(self.server.data), self.primary.bin_dir, str(self.server.log), 30)

    def run(self) -> Pair:
        self.server.start(wait=False)
        self.turn.wait_attached()
        return self

    def follows(self, phase: str) -> None:
        """What is committed on the primary arrives."""
        self.primary.commit(phase)
        until(lambda: self.server.phase == phase, f"phase {phase}")

    def diverge(self) -> None:
        """Somebody promotes the standby, and both take writes."""
        self.server.sql("SELECT pg_promote()")
        self.server.sql("UPDATE status SET phase = 'stray'")
        self.server.sql("CREATE TABLE stray AS SELECT generate_series(1, 1000)")
        self.server.sql("CHECKPOINT")
        self.primary.commit("the primary went on")

    def close(self) -> None:
        self.server.close()


@pytest.fixture
def pair(sandbox: Callable[..., Sandbox]) -> Iterator[Callable[..., Pair]]:
    """Makes a primary with nothing beside it: ``pair(settings={…})``."""
    made: list[Pair] = []

    def make(**options: Any) -> Pair:
        made.append(Pair(sandbox(**options)))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_clone_from_the_primary_follows_and_a_second_time_nothing_is_done(pair: Callable[..., Pair]) -> None:
    here = pair()
    decision, done = here.make()
    assert decision.action == "clone" and done.changed and not done.moved_aside
    assert (here.server.data / "standby.signal").exists() and not (here.server.data / "recovery.signal").exists()
    here.run().follows("one")
    assert here.server.show("primary_slot_name") == SLOT
    assert here.primary.server.value("SELECT active FROM pg_replication_slots WHERE slot_name = %s", SLOT)
    before = fingerprint(here.server.data / "conf.d", here.server.data / "postgresql.auto.conf")
    decision, done = here.make()
    assert (decision.action, done.changed) == ("none", False)
    assert fingerprint(here.server.data / "conf.d", here.server.data / "postgresql.auto.conf") == before
    # Stopped and started it is the same standby.
    here.server.stop()
    decision, done = here.make()
    assert (decision.action, decision.aside, done.moved_aside) == ("follow", False, "")
    here.run().follows("two")


def test_clone_from_the_repository_catches_up_and_streams(pair: Callable[..., Pair]) -> None:
    here = pair()
    here.primary.backup("stored")
    here.primary.commit("after the backup")
    here.primary.fill(3)
    here.primary.probe()
    decision, _done = here.make(clone_from="repository")
    assert decision.action == "clone"
    assert (here.server.data / "standby.signal").exists() and not (here.server.data / "recovery.signal").exists()
    assert recovery_conf.planned(str(here.server.data)) is None
    here.run().follows("streamed")
    assert here.make()[1].changed is False


def test_password_is_in_one_private_file_and_in_no_setting_or_argument(pair: Callable[..., Pair]) -> None:
    here = pair()
    arguments: set[bytes] = set()
    seen = threading.Event()

    def watch() -> None:
        while not seen.is_set():
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):
                    arguments.add(path.read_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    here.make()
    seen.set()
    watcher.join()
    assert any(b"pg_basebackup" in line for line in arguments)
    assert not any(PASSWORD.encode() in line for line in arguments)
    passfile = Path(here.request().passfile)
    assert passfile.stat().st_mode & 0o777 == 0o600 and passfile.parent.stat().st_mode & 0o777 == 0o700
    assert passfile.read_text(encoding="utf-8") == "*:*:*:*:a\\:secret\\\\ it's\n"
    for path in here.server.data.rglob("*"):
        if path.is_file():
            assert PASSWORD.encode() not in path.read_bytes(), path
    # One that others can read is written anew.
    passfile.chmod(0o644)
    assert Standby(here.request()).write_passfile(check=False)
    assert passfile.stat().st_mode & 0o777 == 0o600


def test_directories_of_others_are_refused(pair: Callable[..., Pair], stranger: Path) -> None:
    here = pair()
    here.server.data.mkdir()
    (here.server.data / "holiday.jpg").write_bytes(b"mine")
    here.refused("directory_foreign")
    here.refused("directory_foreign", rebuild="clone")
    shutil.rmtree(here.server.data)
    shutil.copytree(stranger, here.server.data)
    for rebuild in ("never", "rewind", "clone"):
        here.refused("directory_foreign", rebuild=rebuild)
    # Somebody has made a table in it, so that it is not what packages leave behind.
    here.refused("directory_foreign", replace_empty=True)


def test_empty_cluster_of_the_packages_is_moved_aside_only_when_that_was_said(pair: Callable[..., Pair]) -> None:
    here = pair()
    data = here.server.data
    here.server.program("initdb", "-D", str(data), "-U", "postgres", "-A", "trust", "-N")
    here.refused("directory_foreign")
    here.server.start("listen_addresses=''")
    decision, done = here.make(replace_empty=True)
    assert decision.stop and Path(done.moved_aside, "PG_VERSION").exists()
    here.run().follows("cloned")


def test_empty_cluster_that_has_run_for_a_while_is_known_by_what_its_server_has_told(pair: Callable[..., Pair]) -> None:
    here = pair()
    here.server.program("initdb", "-D", str(here.server.data), "-U", "postgres", "-A", "trust", "-N")
    here.server.start()
    # Takes numbers from the counter of objects, as do large values that autovacuum's statistics store.
    here.server.sql("CREATE TABLE gone ()")
    here.server.sql("DROP TABLE gone")
    standby = Standby(here.request(replace_empty=True))
    assert standby.look().stop and standby.local.empty_cluster
    here.server.stop()
    here.refused("directory_foreign", replace_empty=True)
    here.refused("directory_foreign", replace_empty=True, empty_cluster="7000000000000000000")
    decision, done = here.make(replace_empty=True, empty_cluster=standby.local.system_identifier)
    assert decision.action == "clone" and Path(done.moved_aside, "PG_VERSION").exists()


def test_empty_cluster_is_told_from_one_with_a_single_role(pair: Callable[..., Pair]) -> None:
    here = pair()
    here.server.program("initdb", "-D", str(here.server.data), "-U", "postgres", "-A", "trust", "-N")
    here.server.start()
    here.server.sql("CREATE ROLE somebody")
    with pytest.raises(PitrError, match="directory_foreign"):
        here.make(replace_empty=True)
    here.server.stop()
    here.refused("directory_foreign", replace_empty=True)


def test_server_that_is_a_primary_is_not_touched_without_a_word(pair: Callable[..., Pair]) -> None:
    here = pair()
    here.make()
    here.run()
    here.diverge()
    with pytest.raises(PitrError, match=r"\[is_primary\].*standby_rebuild=rewind"):
        here.make()
    assert here.server.phase == "stray"
    here.server.stop()
    here.refused("diverged")


@pytest.mark.parametrize("ending", ["fast", "immediate"])
def test_diverged_server_is_rewound(pair: Callable[..., Pair], ending: str) -> None:
    here = pair()
    here.make()
    here.run()
    here.diverge()
    here.server.stop(ending)
    before = (here.server.data / "PG_VERSION").stat().st_ino
    decision, done = here.make(rebuild="rewind")
    assert decision.action == "rewind" and not done.moved_aside
    assert (here.server.data / "PG_VERSION").stat().st_ino == before
    assert not Path(str(here.server.data) + REWINDING).exists()
    here.run().follows("rewound")
    assert here.server.value("SELECT to_regclass('stray')") is None
    assert here.make(rebuild="rewind")[1].changed is False


def test_rewind_fetches_what_the_directory_has_removed_from_the_archive(pair: Callable[..., Pair]) -> None:
    """pg_rewind needs the WAL since the fork, and the server has recycled it."""
    here = pair()
    here.make()
    here.run()
    here.diverge()
    for _number in range(12):
        here.server.sql("SELECT pg_switch_wal()")
        here.server.sql("SELECT pg_logical_emit_message(true, 'tests', repeat('x', 500000))")
        here.server.sql("CHECKPOINT")
    until(
        lambda: here.server.value("SELECT count(*) FROM pg_ls_archive_statusdir() WHERE name LIKE '%%.ready'") == 0,
        "the archive",
    )
    here.server.stop()
    keep = control_data(here.primary.bin_dir, str(here.server.data)).text("Latest checkpoint's REDO WAL file")
    gone = [path for path in (here.server.data / "pg_wal").glob("00000002" + "?" * 16) if path.name < keep]
    assert gone
    for path in gone:
        path.unlink()
    here.make(rebuild="rewind")
    here.run().follows("rewound")


def test_rewind_needs_checksums_or_hints(pair: Callable[..., Pair]) -> None:
    here = pair()
    here.make()
    here.run()
    here.diverge()
    here.server.stop()
    checksums = here.server.program("pg_checksums", "--disable", "-D", str(here.server.data))
    assert checksums.returncode == 0, checksums.stderr
    refusal = here.refused("rewind_impossible", rebuild="rewind")
    assert "standby_rebuild=clone" in refusal.message


def test_failed_rewind_leaves_the_directory_as_it_was_or_under_another_name(pair: Callable[..., Pair]) -> None:
    here = pair()
    here.make()
    here.run()
    here.diverge()
    here.server.stop()
    # Before anything is written: the role may not read what pg_rewind reads.
    here.primary.server.sql("REVOKE EXECUTE ON FUNCTION pg_read_binary_file(text) FROM pitr_standby")
    before = fingerprint(here.server.data)
    with pytest.raises(PitrError, match="was not rewound, and is stopped"):
        here.make(rebuild="rewind")
    assert fingerprint(here.server.data) == before
    here.primary.server.sql("GRANT EXECUTE ON FUNCTION pg_read_binary_file(text) TO pitr_standby")
    # In the middle.
    fake = here.primary.directory / "bin"
    fake.mkdir()
    for program in Path(here.primary.bin_dir).iterdir():
        (fake / program.name).symlink_to(program)
    (fake / "pg_rewind").unlink()
    (fake / "pg_rewind").write_text(
        f'#!/bin/sh\ncase "$*" in *--dry-run*) exec {here.primary.bin_dir}/pg_rewind "$@" ;; esac\nexit 1\n',
        encoding="ascii",
    )
    (fake / "pg_rewind").chmod(0o755)
    with pytest.raises(PitrError, match="half rewound and kept as"):
        here.make(rebuild="rewind", bin_dir=str(fake))
    kept = Path(str(here.server.data) + REWINDING)
    assert kept.exists() and not here.server.data.exists()
    here.refused("rewind_interrupted", rebuild="rewind")
    decision, _done = here.make(rebuild="clone")
    assert kept.exists() and "remove it yourself" in " ".join(decision.notes)
    here.run().follows("cloned")


@pytest.mark.parametrize("source", ["primary", "repository"])
def test_diverged_server_is_cloned_anew_and_the_old_directory_kept(pair: Callable[..., Pair], source: str) -> None:
    here = pair()
    here.primary.backup("stored")
    here.make()
    here.run()
    here.diverge()
    decision, done = here.make(rebuild="clone", clone_from=source)
    assert decision.aside and decision.stop
    assert Path(done.moved_aside, "PG_VERSION").exists() and done.moved_aside.startswith(f"{here.server.data}.old-")
    here.run().follows("cloned")


_KILLED = """
import os, signal, sys, json
from ansible_collections.pgdrill.pitr.plugins.module_utils import standby_make
from ansible_collections.pgdrill.pitr.plugins.module_utils.postgres import Login
values = json.loads(sys.argv[1])
values["login"], values["upstream"] = Login(**values["login"]), Login(**values["upstream"])
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "subprocess.Popen")
at, count = int(sys.argv[2]), 0

def hook(event, arguments):
    global count
    if event in CHANGES:
        count += 1
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)

standby = standby_make.Standby(standby_make.Request(**values))
decision = standby.look()
sys.addaudithook(hook)
standby.perform(decision)
print(count)
"""


def _killed(here: Pair, at: int, **options: Any) -> subprocess.CompletedProcess[str]:
    import dataclasses
    import json

    values = json.dumps(dataclasses.asdict(here.request(**options)))
    return subprocess.run(
        [sys.executable, "-c", _KILLED, values, str(at)],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize("source", ["primary", "repository"])
def test_clone_that_was_killed_never_starts_as_a_primary_and_is_repeated(
    pair: Callable[..., Pair], source: str, tmp_path: Path
) -> None:
    """Killed before each of its changes, or a sample of them."""
    here = pair()
    here.primary.backup("stored")
    data = here.server.data
    count = 0
    # The first one makes a few things that stay, such as the password file.
    for _time in range(2):
        whole = _killed(here, 0, clone_from=source)
        assert whole.returncode == 0, whole.stderr
        count = int(whole.stdout)
        shutil.rmtree(data)
    assert count > 10
    step = max(1, count // 6)
    for at in [*range(2, count - 1, step), count - 1, count]:
        # A retry of pg_basebackup's own may be one change less.
        done = _killed(here, at, clone_from=source)
        assert done.returncode == -signal.SIGKILL or at > count - 3, done.stderr
        if data.exists() and os.path.exists(data / PG_CONTROL):
            assert (data / "standby.signal").exists() and not (data / "recovery.signal").exists()
        elif data.exists() and os.listdir(data):
            assert refuses_to_start(here.primary.bin_dir, data)
        until(lambda: not _busy(here), "pg_basebackup has ended")
        decision, _done = here.make(clone_from=source)
        assert decision.action in ("clone", "follow"), at
        assert not (data / IN_PROGRESS).exists()
        if at > count - 3:
            here.run().follows(f"after {at}")
            here.server.stop()
        shutil.rmtree(data)


def _busy(here: Pair) -> bool:
    try:
        Standby(here.request()).look()
    except PitrError as error:
        return "still writes" in error.message
    return False


def test_clone_that_fails_puts_the_old_directory_back(pair: Callable[..., Pair]) -> None:
    here = pair()
    here.make()
    here.run()
    here.diverge()
    here.server.stop()
    before = fingerprint(here.server.data)
    with pytest.raises(PitrError, match="pg_basebackup failed"):
        here.make(rebuild="clone", tablespace_mapping={"not absolute": "/nowhere"})
    assert fingerprint(here.server.data) == before
    assert not list(here.server.data.parent.glob("data.*old*"))


def test_standby_of_a_delay_is_not_taken_for_one_that_could_take_over(pair: Callable[..., Pair]) -> None:
    here = pair(settings={})
    wanted = {**here.request().settings, "recovery_min_apply_delay": "1h"}
    here.make(settings=wanted)
    here.run()
    here.primary.commit("too new")
    with pytest.raises(PitrError, match=r"\[delayed\]"):
        here.turn.check_ready(here.upstream, 1 << 40)
    with pytest.raises(PitrError, match=r"\[delayed\]"):
        here.turn.check_failover(replace(here.upstream, port=1), {}, Bear())
    here.turn.check_failover(replace(here.upstream, port=1), {}, Bear(delayed=True))
    assert here.server.phase == "template"
    assert here.make(settings=wanted)[0].action == "none"


def test_standby_that_is_behind_detached_or_paused_does_not_take_over(pair: Callable[..., Pair]) -> None:
    here = pair()
    here.make()
    here.run()
    assert here.turn.check_ready(here.upstream, 1 << 20).in_recovery
    here.server.sql("SELECT pg_wal_replay_pause()")
    here.primary.commit("not replayed")
    until(lambda: here.server.value("SELECT pg_is_wal_replay_paused()"), "the pause")
    with pytest.raises(PitrError, match=r"\[paused\]"):
        here.turn.check_ready(here.upstream, 1 << 20)
    here.server.sql("SELECT pg_wal_replay_resume()")
    until(lambda: here.server.phase == "not replayed", "the replay")
    here.primary.fill(1)
    with pytest.raises(PitrError, match=r"\[lags\]"):
        here.turn.check_ready(here.upstream, -1)
    here.primary.server.stop()
    until(lambda: here.turn.state().receiver != "streaming", "the stop")
    with pytest.raises(PitrError, match=r"\[not_attached\]"):
        here.turn.check_ready(here.upstream, 1 << 20)


def test_failover_is_refused_while_the_primary_answers_or_another_one_has_more(pair: Callable[..., Pair]) -> None:
    here = pair()
    here.make()
    here.run()
    with pytest.raises(PitrError, match=r"\[primary_answers\]"):
        here.turn.check_failover(here.upstream, {}, Bear())
    # A refused login is an answer, too.
    with pytest.raises(PitrError, match=r"\[primary_answers\]"):
        here.turn.check_failover(replace(here.upstream, user="nobody_at_all"), {}, Bear())
    gone = replace(here.upstream, port=1)
    here.turn.check_failover(gone, {"db3": "0/1", "unknown": ""}, Bear())
    with pytest.raises(PitrError, match=r"\[behind\].*db3"):
        here.turn.check_failover(gone, {"db3": "F/0"}, Bear())
    here.turn.check_failover(gone, {"db3": "F/0"}, Bear(behind=True))


def test_promotion_waits_for_the_shutdown_checkpoint(pair: Callable[..., Pair]) -> None:
    here = pair()
    here.make()
    here.run()
    turn = Turn(here.server.login, str(here.server.data), here.primary.bin_dir, timeout=1)
    with pytest.raises(PitrError, match=r"has not come within 1 seconds\. It was not promoted") as caught:
        turn.promote("F/0", (), False)
    assert caught.value.detail["still_standby"]
    assert here.turn.state().in_recovery
    here.primary.server.stop()
    end = here.primary.server
    shutdown = str(control_data(here.primary.bin_dir, str(end.data)).checkpoint_lsn)
    assert here.turn.promote(shutdown, (here.primary.wal_command, "get", CLUSTER), False) == (True, 2)
    assert here.turn.promote(shutdown, (), False) == (False, 2)
    # The old primary has nothing that the new one has not.
    back = Pair.__new__(Pair)
    back.primary, back.server, back.options = here.primary, end, {}
    here.server.sql("SELECT pg_create_physical_replication_slot('old_primary', true)")
    login = replace(here.upstream, unix_socket=here.server.socket, port=here.server.PORT)
    standby = Standby(here.request(pgdata=str(end.data), login=end.login, upstream=login, slot="old_primary"))
    decision = standby.look()
    assert decision.action == "follow"
    standby.perform(decision)
    end.start(wait=False)
    Turn(end.login, str(end.data), here.primary.bin_dir, str(end.log), 30).wait_attached()
    here.server.sql("UPDATE status SET phase = 'on the new primary'")
    until(lambda: end.phase == "on the new primary", "the old primary")


def test_promotion_wants_an_archive_that_answers(pair: Callable[..., Pair]) -> None:
    here = pair()
    here.make()
    here.run()
    here.primary.repository.rename(here.primary.directory / "away")
    fetch = (here.primary.wal_command, "get", CLUSTER)
    with pytest.raises(PitrError, match="cannot be asked which timelines there are"):
        here.turn.promote("", fetch, False)
    assert here.turn.state().in_recovery
    assert here.turn.promote("", fetch, True)[0]


def test_standby_lives_through_an_archive_that_is_away_and_a_recovery_does_not(pair: Callable[..., Pair]) -> None:
    here = pair()
    here.make()
    here.primary.repository.rename(here.primary.directory / "away")
    here.run().follows("streamed")
    assert "is not a repository" in here.server.log_text()
    here.server.stop()
    # The same command in a recovery to a target: the end of the archive must not be believed.
    (here.server.data / "standby.signal").unlink()
    (here.server.data / "recovery.signal").touch()
    here.server.start(wait=False)
    until(lambda: not here.server.is_running, "the recovery stops")
    assert control_data(here.primary.bin_dir, str(here.server.data)).timeline == 1


def test_primary_itself_and_standbys_and_unaccepted_clusters_are_not_followed(pair: Callable[..., Pair]) -> None:
    here = pair()
    here.make()
    here.run()
    own = here.primary.server
    with pytest.raises(PitrError, match=r"\[is_the_primary\]"):
        here.make(pgdata=str(own.data), login=own.login, rebuild="clone")
    assert own.is_running
    second = here.primary.directory / "second" / "data"
    with pytest.raises(PitrError, match=r"\[primary_is_standby\]"):
        socket = here.server.socket
        here.make(pgdata=str(second), upstream=replace(here.upstream, unix_socket=socket, port=here.server.PORT))
    here.server.stop()
    settings.write(str(own.data), "60-unaccepted.conf", "pgdrill.accepted = 'off'\n", check=False)
    own.sql("SELECT pg_reload_conf()")
    until(lambda: own.value("SELECT current_setting('pgdrill.accepted', true)") == "off", "the reload")
    here.refused("primary_not_accepted")


def test_slot_that_is_missing_lost_or_used_by_another_is_told_before_anything(pair: Callable[..., Pair]) -> None:
    here = pair()
    here.refused("slot_missing", slot="nobodys")
    assert not here.server.data.exists()
    here.make()
    here.run()
    second = Server(here.primary.bin_dir, here.primary.directory / "second" / "data")
    second.data.parent.mkdir()
    try:
        with pytest.raises(PitrError, match=r"\[slot_in_use\]"):
            here.make(pgdata=str(second.data), login=second.login)
    finally:
        second.close()


def test_limits_are_at_least_the_primarys_and_what_alter_system_said_is_gone(pair: Callable[..., Pair]) -> None:
    here = pair(settings={"max_connections": 40, "max_prepared_transactions": 7})
    wanted = {**here.request().settings, "max_connections": 10, "max_locks_per_transaction": 200}
    # Read after what the clone has of the primary's configuration.
    here.options["file"] = "90-standby.conf"
    here.make(settings=wanted)
    here.run()
    assert here.server.show("max_connections") == "40"
    assert here.server.show("max_prepared_transactions") == "7"
    assert here.server.show("max_locks_per_transaction") == "200"
    here.server.sql("ALTER SYSTEM SET primary_conninfo = 'host=/nowhere'")
    decision, done = here.make(settings=wanted)
    assert decision.action == "none" and done.changes == ("primary_conninfo taken out of postgresql.auto.conf",)
    here.server.sql("SELECT pg_reload_conf()")
    here.follows("again")


def test_standby_behind_the_point_of_a_restore_follows_and_one_beyond_it_has_diverged(
    pair: Callable[..., Pair], restored: Callable[..., Any]
) -> None:
    """After a PITR of the primary to a point in its past."""
    here = pair()
    here.primary.backup("stored")
    here.make()
    here.run().follows("before")
    here.primary.server.sql("SELECT pg_create_restore_point('here')")
    here.primary.commit("wrong")
    here.primary.probe()
    until(lambda: here.server.phase == "wrong", "the mistake arrives")
    here.primary.server.stop()
    again = restored(here.primary, {"recovery_target_name": "here"}, archive_after="same", keep_out=False).run()
    again.server.sql("SELECT pg_create_physical_replication_slot(%s, true)", SLOT)
    upstream = replace(here.upstream, unix_socket=again.server.socket, port=again.server.PORT)
    with pytest.raises(PitrError, match=r"\[diverged\].*timeline 1 to"):
        here.make(upstream=upstream)
    assert here.server.phase == "wrong"
    decision, _done = here.make(upstream=upstream, rebuild="rewind")
    assert decision.action == "rewind"
    here.run()
    again.server.sql("UPDATE status SET phase = 'on the new timeline'")
    until(lambda: here.server.phase == "on the new timeline", "the standby")


def test_fenced_server_comes_up_as_a_standby_at_most(pair: Callable[..., Pair]) -> None:
    here = pair()
    own = here.primary.server
    turn = Turn(own.login, str(own.data), here.primary.bin_dir)
    with pytest.raises(PitrError, match="Stop it first"):
        turn.fence(check=False)
    own.stop("immediate")
    assert turn.fence(check=True) and not (own.data / "standby.signal").exists()
    assert turn.fence(check=False) and not turn.fence(check=False)
    own.start(wait=False)
    until(lambda: "database system is ready to accept read-only" in own.log_text(), "the server")
    assert own.value("SELECT pg_is_in_recovery()")


def test_slots_of_its_time_as_a_primary_are_dropped_and_no_others(pair: Callable[..., Pair]) -> None:
    here = pair()
    here.make()
    here.run()
    for name in ("ours", "theirs"):
        here.server.sql("SELECT pg_create_physical_replication_slot(%s, true)", name)
    assert here.turn.drop_slots(["ours", "never_there"], check=True) == ["ours"]
    assert here.turn.drop_slots(["ours", "never_there"], check=False) == ["ours"]
    assert here.server.sql("SELECT slot_name FROM pg_replication_slots") == [("theirs",)]


def test_waiting_for_a_standby_that_cannot_attach_tells_its_log(pair: Callable[..., Pair]) -> None:
    here = pair()
    here.make()
    here.primary.server.stop()
    here.server.start(wait=False)
    started = time.monotonic()
    with pytest.raises(PitrError, match=r"(?s)does not stream.*Last lines of .*could not connect to the primary"):
        Turn(here.server.login, str(here.server.data), here.primary.bin_dir, str(here.server.log), 2).wait_attached()
    assert time.monotonic() - started < 20
    here.server.stop()
    with pytest.raises(PitrError, match="is not running"):
        here.turn.wait_attached()


def test_clone_is_not_begun_while_another_one_writes(pair: Callable[..., Pair]) -> None:
    """What a killed run has left may be a pg_basebackup that goes on."""
    here = pair()
    scratch = here.server.data / combine.SCRATCH
    scratch.mkdir(parents=True)
    lock = locks.hold_directory(str(scratch))
    try:
        with pytest.raises(PitrError, match="Something still writes into"):
            here.make()
    finally:
        os.close(lock)
