# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The receiver against real servers: what it received is the server's WAL, whole, whatever dies meanwhile."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.plugins.module_utils.info import archive_info
from ansible_collections.pgdrill.pitr.plugins.module_utils.postgres import query
from ansible_collections.pgdrill.pitr.plugins.module_utils.receiver_control import Control
from ansible_collections.pgdrill.pitr.plugins.module_utils.upstream import Primary, Settings
from ansible_collections.pgdrill.pitr.plugins.module_utils.wal import Lsn
from ansible_collections.pgdrill.pitr.tests.integration.receiving import (
    APPLICATION,
    SLOT,
    Receiving,
    armed,
    content,
    mark,
    unbroken,
)
from ansible_collections.pgdrill.pitr.tests.integration.support import (
    SEGMENT_SIZE,
    Restored,
    Sandbox,
    Server,
    Storage,
    fingerprint,
    until,
)

Restore = Callable[..., Restored]
MakeSandbox = Callable[..., Sandbox]
MakeReceiver = Callable[..., Receiving]
# An archive_command that archives nothing: everything that is in the archive came from the receiver.
ALONE = {"archive_command": "true"}
# How often the test of random kills kills.
KILLS = int(os.environ.get("PGDRILL_RECEIVER_KILLS") or 12)


@pytest.fixture
def receiver() -> Iterator[MakeReceiver]:
    """Makes a receiver that ends with the test: ``receiver(primary, synchronous=True)``."""
    made: list[Receiving] = []

    def make(storage: Storage, **options: Any) -> Receiving:
        server = options.pop("server", None) or storage.server  # type: ignore[attr-defined]
        made.append(Receiving(storage, server, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_host_that_refuses_does_not_hide_the_primary_behind_it(sandbox: MakeSandbox, bin_dir: str) -> None:
    """libpq asks the next one only when there is no connection at all."""
    primary, other = sandbox(settings=ALONE), sandbox()
    rules = other.server.data / "pg_hba.conf"
    rules.write_text("local all,replication all reject\n", encoding="ascii")
    other.server.sql("SELECT pg_reload_conf()")
    hosts = [other.server.socket, primary.server.socket]
    asked = Primary(Settings(bin_dir, ",".join(hosts), primary.server.PORT, "postgres", SLOT, APPLICATION))
    until(lambda: "rejects" in _said(bin_dir, other), "the refusal")
    identifier = primary.server.value("SELECT system_identifier::text FROM pg_control_system()")
    assert asked.identify().system_identifier == identifier
    # What streams goes there and nowhere else.
    assert f"host='{primary.server.socket}'" in asked.conninfo()
    primary.server.stop()
    with pytest.raises(PitrError) as caught:
        asked.identify()
    assert "rejects" in str(caught.value) and "No such file" in str(caught.value)
    assert f"host='{','.join(hosts)}'" in asked.conninfo()


def _said(bin_dir: str, sandbox: Sandbox) -> str:
    try:
        Primary(Settings(bin_dir, sandbox.server.socket, sandbox.server.PORT, "postgres", SLOT, APPLICATION)).identify()
    except PitrError as error:
        return str(error)
    return ""


def test_received_segments_are_the_servers_own(sandbox: MakeSandbox, receiver: MakeReceiver) -> None:
    primary = sandbox(settings=ALONE)
    receiving = receiver(primary).start()
    primary.fill(3)
    receiving.wait_for(primary.server)
    names = unbroken(primary)
    assert len(names) >= 3
    for stored in primary.segments():
        original = primary.server.data / "pg_wal" / stored.name
        assert content(stored) == original.read_bytes()
    # The newest finished one stays, so that pg_receivewal knows where to go on.
    until(
        lambda: [path.name for path in receiving.spool.iterdir() if len(path.name) == 24] == names[-1:], "a tidy spool"
    )
    assert primary.server.value("SELECT active FROM pg_replication_slots WHERE slot_name = %s", SLOT)
    receiving.stop()
    assert receiving.streams == []
    assert receiving.status["state"] == "stopped"


def slot(server: Server) -> tuple[Any, ...]:
    """(wal_status, active) of the receiver's slot; empty when there is none."""
    rows = server.sql("SELECT wal_status, active FROM pg_replication_slots WHERE slot_name = %s", SLOT)
    return rows[0] if rows else ()


class Load:
    """A client that writes and switches until it is told to stop, through restarts of the server."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._done = threading.Event()
        self.rows = 0
        server.sql("CREATE TABLE load (number int PRIMARY KEY, filler text)")
        self._thread = threading.Thread(target=self._work)

    def _work(self) -> None:
        while not self._done.is_set():
            try:
                with self._server.connection() as connection:
                    while not self._done.is_set():
                        query(
                            connection,
                            "INSERT INTO load VALUES (%s, repeat(md5(%s), 400))",
                            (self.rows, str(self.rows)),
                        )
                        self.rows += 1
            except (PitrError, psycopg2.Error):
                # Somewhere between two rows; the one under way may be there or not.
                self._done.wait(0.05)
                try:
                    self.rows = int(self._server.value("SELECT coalesce(max(number) + 1, 0) FROM load"))
                except (PitrError, psycopg2.Error):
                    continue

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._done.set()
        self._thread.join()


def test_pushed_and_received_wal_is_the_same_and_no_conflict(
    sandbox: MakeSandbox, receiver: MakeReceiver, restored: Restore
) -> None:
    primary = sandbox()
    receiving = receiver(primary).start()
    primary.backup("only")
    with Load(primary.server):
        primary.fill(20)
    primary.commit("end")
    primary.probe()
    receiving.wait_for(primary.server)
    unbroken(primary)
    assert primary.server.value("SELECT failed_count FROM pg_stat_archiver") == 0
    assert receiving.status["not_archived"] == {} and receiving.status["last_error"] == ""
    primary.server.stop()
    assert restored(primary).run().phase == "end"


def test_restart_of_the_server_leaves_no_hole(sandbox: MakeSandbox, receiver: MakeReceiver, restored: Restore) -> None:
    primary = sandbox(settings=ALONE)
    receiving = receiver(primary).start()
    primary.backup("only")
    pid = receiving.control.pid()
    with Load(primary.server) as load:
        for mode in ("fast", "immediate", "fast"):
            rows = load.rows
            until(lambda rows=rows: load.rows > rows + 60, "some load")  # type: ignore[misc]
            primary.server.stop(mode)
            primary.server.start()
    primary.commit("end")
    primary.fill(1)
    receiving.wait_for(primary.server)
    assert receiving.control.pid() == pid, "the same receiver went on"
    unbroken(primary)
    primary.server.stop()
    result = restored(primary).run()
    assert result.phase == "end"


def test_receiver_killed_at_random_moments_leaves_no_hole(
    sandbox: MakeSandbox, receiver: MakeReceiver, restored: Restore
) -> None:
    primary = sandbox(settings=ALONE)
    receiving = receiver(primary).start()
    primary.backup("only")
    chance = random.Random(4711)
    with Load(primary.server) as load:
        for number in range(KILLS):
            rows = load.rows
            until(lambda rows=rows: load.rows > rows, "some load")  # type: ignore[misc]
            # From the first moments of a start to the middle of streaming; the moment is what is random here.
            time.sleep(chance.uniform(0, 0.6))
            receiving.kill(also_stream=number % 3 != 0)
            receiving.launch()
    primary.commit("end")
    primary.fill(1)
    receiving.control.wait()
    receiving.wait_for(primary.server)
    names = unbroken(primary)
    assert not list(primary.archive.rglob("*.partial"))
    wanted = primary.server.value("SELECT count(*)::text || md5(string_agg(filler, '' ORDER BY number)) FROM load")
    primary.server.stop()
    result = restored(primary).run()
    assert result.phase == "end"
    assert (
        result.server.value("SELECT count(*)::text || md5(string_agg(filler, '' ORDER BY number)) FROM load") == wanted
    )
    print(f"\nreceiver: {KILLS} kills, {len(names)} segments, no hole")


def test_pg_receivewal_that_has_outlived_its_supervisor_is_ended_by_the_next_one(
    sandbox: MakeSandbox, receiver: MakeReceiver
) -> None:
    primary = sandbox(settings=ALONE)
    receiving = receiver(primary).start()
    (orphan,) = receiving.streams
    receiving.kill(also_stream=False)
    assert receiving.streams == [orphan]
    primary.fill(1)
    receiving.start()
    assert orphan not in receiving.streams and len(receiving.streams) == 1
    primary.fill(1)
    receiving.wait_for(primary.server)
    unbroken(primary)


def test_second_receiver_of_a_cluster_ends_and_the_first_goes_on(sandbox: MakeSandbox, receiver: MakeReceiver) -> None:
    primary = sandbox(settings=ALONE)
    receiving = receiver(primary).start()
    pid, streams = receiving.control.pid(), receiving.streams
    receiving.control.start()
    until(lambda: "running already" in receiving.log, "the second one's words")
    assert receiving.control.pid() == pid and receiving.streams == streams


def test_commit_waits_for_a_synchronous_receiver(sandbox: MakeSandbox, receiver: MakeReceiver) -> None:
    primary = sandbox(settings=ALONE)
    receiving = receiver(primary, synchronous=True).start()
    primary.configure({"synchronous_standby_names": f'"{APPLICATION}"'})
    primary.server.sql("SELECT pg_reload_conf()")
    until(lambda: armed(primary.server), "a synchronous receiver")
    primary.commit("acknowledged")
    receiving.stop()
    done = threading.Event()
    thread = threading.Thread(target=lambda: (primary.commit("waiting"), done.set()))
    thread.start()
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
    until(lambda: primary.server.value(waiting) == 1, "a commit that waits")
    assert not done.is_set()
    receiving.start()
    thread.join(30)
    assert done.is_set() and primary.server.phase == "waiting"


def test_stalled_synchronous_receiver_is_let_go_by_resetting_the_setting(
    sandbox: MakeSandbox, receiver: MakeReceiver
) -> None:
    """What docs/receiver.md tells for three o'clock in the morning."""
    primary = sandbox(settings=ALONE)
    receiving = receiver(primary, synchronous=True).start()
    primary.server.sql(f"ALTER SYSTEM SET synchronous_standby_names = '\"{APPLICATION}\"'")
    primary.server.sql("SELECT pg_reload_conf()")
    until(lambda: armed(primary.server), "a synchronous receiver")
    receiving.stop()
    thread = threading.Thread(target=primary.commit, args=("waiting",))
    thread.start()
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
    until(lambda: primary.server.value(waiting) == 1, "a commit that waits")
    primary.server.sql("ALTER SYSTEM RESET synchronous_standby_names")
    primary.server.sql("SELECT pg_reload_conf()")
    thread.join(30)
    assert not thread.is_alive() and primary.server.phase == "waiting"


# --- which server


def test_foreign_cluster_is_refused_and_nothing_is_received(
    sandbox: MakeSandbox, receiver: MakeReceiver, stranger: Path, bin_dir: str, tmp_path: Path
) -> None:
    primary = sandbox(settings=ALONE)
    other = Sandbox(bin_dir, tmp_path / "other", stranger)
    try:
        other.server.start()
        receiving = receiver(primary, server=other.server)
        before = fingerprint(primary.archive)
        with pytest.raises(PitrError, match=r"system identifier \d+; .* belongs to"):
            receiving.start()
        assert fingerprint(primary.archive) == before
        assert slot(other.server) == ()
        assert not receiving.control.pid() and not [path for path in receiving.spool.iterdir() if path.is_file()]
    finally:
        other.server.close()


def test_segment_of_a_foreign_cluster_in_the_spool_is_put_aside(sandbox: MakeSandbox, receiver: MakeReceiver) -> None:
    """A server that was exchanged between the question and the connection."""
    primary = sandbox(settings=ALONE)
    receiving = receiver(primary).start()
    primary.fill(2)
    receiving.wait_for(primary.server)
    receiving.stop()
    (kept,) = (path for path in receiving.spool.iterdir() if len(path.name) == 24)
    number = int(kept.name, 16) + 9
    data = bytearray(kept.read_bytes())
    data[8:16] = ((number & 0xFFFFFFFF) * SEGMENT_SIZE).to_bytes(8, "little")
    data[24:32] = b"\1" * 8
    foreign = kept.with_name(f"{number:024X}")
    foreign.write_bytes(data)
    receiving.start()
    primary.fill(2)
    receiving.wait_for(primary.server)
    names = unbroken(primary)
    assert foreign.name not in names
    assert (receiving.spool / "left" / foreign.name).read_bytes() == data
    assert foreign.name in receiving.status["not_archived"]


@pytest.fixture
def standby(bin_dir: str, tmp_path: Path) -> Iterator[Callable[[Sandbox], Server]]:
    """Makes a running standby of a primary."""
    made: list[Server] = []

    def make(primary: Sandbox) -> Server:
        data = tmp_path / "standby" / "data"
        data.parent.mkdir()
        made.append(Server(bin_dir, data))
        host = ["-h", primary.server.socket, "-p", str(primary.server.PORT), "-U", "postgres"]
        taken = made[-1].program("pg_basebackup", "-D", str(data), "-R", "-X", "stream", "-c", "fast", "-N", *host)
        assert taken.returncode == 0, taken.stderr
        made[-1].start()
        return made[-1]

    yield make
    for one in made:
        one.close()


def caught_up(primary: Server, standby: Server) -> None:
    lsn = primary.value("SELECT pg_current_wal_flush_lsn()::text")
    until(lambda: standby.value("SELECT pg_last_wal_replay_lsn() >= %s::pg_lsn", lsn), "the standby")


def test_promotion_of_a_standby_is_followed_without_a_hole(
    sandbox: MakeSandbox, receiver: MakeReceiver, standby: Callable[[Sandbox], Server], restored: Restore
) -> None:
    primary = sandbox(settings=ALONE)
    follower = standby(primary)
    receiving = receiver(primary, host=f"{primary.server.socket},{follower.socket}").start()
    primary.backup("only")
    primary.fill(2)
    primary.commit("before the promotion")
    caught_up(primary.server, follower)
    receiving.wait_for(primary.server)
    pid = receiving.control.pid()
    primary.server.stop()
    follower.sql("SELECT pg_promote()")
    follower.sql("UPDATE status SET phase = 'on the new timeline'")
    until(lambda: receiving.status.get("timeline") == 2, "the new timeline")
    for _number in range(2):
        follower.sql("SELECT pg_logical_emit_message(true, 'tests', 'x')")
        follower.sql("SELECT pg_switch_wal()")
    follower.sql("UPDATE status SET phase = 'in the partial'")
    receiving.wait_for(follower)
    assert receiving.control.pid() == pid
    unbroken(primary)
    unbroken(primary, 2)
    assert archive_info(primary.folder)["gaps"] == []
    # The old timeline's partial goes when the archive has its WAL on the new one.
    until(lambda: not list(receiving.spool.glob("00000001*.partial")), "a tidy spool")
    receiving.stop()
    follower.stop()
    assert restored(primary).run().phase == "on the new timeline"
    assert restored(primary, use_partial=True).run().phase == "in the partial"


def test_server_on_a_timeline_that_was_left_is_refused(
    sandbox: MakeSandbox, receiver: MakeReceiver, standby: Callable[[Sandbox], Server]
) -> None:
    """The old primary comes back after a failover."""
    primary = sandbox(settings=ALONE)
    follower = standby(primary)
    receiving = receiver(primary, host=follower.socket).start()
    follower.sql("SELECT pg_promote()")
    follower.sql("SELECT pg_switch_wal()")
    until(lambda: receiving.status.get("timeline") == 2, "the new timeline")
    receiving.wait_for(follower)
    receiving.stop()
    old = receiver(primary)
    before = fingerprint(primary.archive)
    with pytest.raises(PitrError, match="timeline 2 was received already"):
        old.start()
    assert fingerprint(primary.archive) == before


@pytest.mark.parametrize("segments", [0, 3])
def test_promoted_standby_that_lacks_the_newest_wal_is_followed_from_where_it_left(
    sandbox: MakeSandbox, receiver: MakeReceiver, standby: Callable[[Sandbox], Server], restored: Restore, segments: int
) -> None:
    """The receiver is further on the old timeline than the new primary ever was; nothing of either is lost."""
    primary = sandbox(settings=ALONE)
    follower = standby(primary)
    receiving = receiver(primary, host=f"{primary.server.socket},{follower.socket}").start()
    primary.backup("only")
    primary.commit("both have it")
    caught_up(primary.server, follower)
    follower.sql("ALTER SYSTEM SET primary_conninfo = ''")
    follower.sql("SELECT pg_reload_conf()")
    senders = "SELECT count(*) FROM pg_stat_replication"
    until(lambda: primary.server.value(senders) == 1, "the standby's end of streaming")
    primary.fill(segments)
    primary.commit("only the receiver has it")
    receiving.wait_for(primary.server)
    received = receiving.partial
    assert received is not None
    old = received.read_bytes()
    primary.server.stop("immediate")
    follower.sql("SELECT pg_promote()")
    follower.sql("UPDATE status SET phase = 'on the new timeline'")
    until(lambda: receiving.status.get("timeline") == 2, "the new timeline")
    follower.sql("SELECT pg_switch_wal()")
    receiving.wait_for(follower)
    unbroken(primary)
    unbroken(primary, 2)
    assert archive_info(primary.folder)["gaps"] == []
    # What only the receiver has of the old branch is kept.
    until((receiving.spool / "left" / received.name).exists, "what was put aside")
    assert (receiving.spool / "left" / received.name).read_bytes() == old
    follower.stop()
    assert restored(primary).run().phase == "on the new timeline"


def test_restored_cluster_is_received_from_when_it_is_accepted_and_not_before(
    sandbox: MakeSandbox, receiver: MakeReceiver, restored: Restore
) -> None:
    primary = sandbox(settings=ALONE)
    receiving = receiver(primary, synchronous=True).start()
    primary.backup("only")
    primary.configure({"synchronous_standby_names": f'"{APPLICATION}"'})
    primary.commit("kept")
    receiving.wait_for(primary.server)
    receiving.stop()
    primary.server.stop("immediate")
    # Its rules would keep the receiver out as well, and that is not what is tried here.
    result = restored(primary, use_partial=True, archive_after="none-until-promoted", keep_out=False).run()
    assert result.phase == "kept"
    # Nobody receives from it, and it does not wait for anybody.
    assert result.server.show("synchronous_standby_names") == ""
    result.server.sql("UPDATE status SET phase = 'not accepted'")
    before = fingerprint(primary.archive)
    again = receiver(primary, server=result.server, synchronous=True)
    with pytest.raises(PitrError, match="not accepted"):
        again.start()
    assert fingerprint(primary.archive) == before
    assert slot(result.server) == ()
    again.launch()
    until(lambda: again.status.get("state") == "refused", "a refusal")
    result.recovery.accept()
    until(lambda: again.status.get("state") == "streaming", "an accepted cluster")
    result.server.sql("UPDATE status SET phase = 'accepted'")
    result.server.sql("SELECT pg_switch_wal()")
    again.wait_for(result.server)
    unbroken(primary, 2)
    result.server.stop()
    assert restored(primary).run().phase == "accepted"


# --- slots


def test_invalidated_slot_is_told_by_name_and_the_gap_is_told(sandbox: MakeSandbox, receiver: MakeReceiver) -> None:
    primary = sandbox(settings={**ALONE, "max_slot_wal_keep_size": "2MB", "max_wal_size": "2MB"})
    receiving = receiver(primary).start()
    primary.fill(2)
    receiving.wait_for(primary.server)
    receiving.stop()
    last = primary.segments()[-1].name
    primary.fill(12)
    primary.server.sql("CHECKPOINT")
    assert slot(primary.server)[0] == "lost"
    receiving.launch()
    until(lambda: receiving.status.get("state") == "streaming", "a new beginning")
    primary.fill(1)
    receiving.wait_for(primary.server)
    assert slot(primary.server) == ("reserved", True)
    status = receiving.status
    assert SLOT in receiving.log and "invalidated" in receiving.log
    assert status["slot_lost_at"]
    (gap,) = archive_info(primary.folder)["gaps"]
    assert int(gap["first"], 16) == int(last, 16) + 1
    assert status["not_received"] == f"{gap['first']} to {gap['last']}"


def test_gap_is_told_though_the_slot_was_moved_back(sandbox: MakeSandbox, receiver: MakeReceiver) -> None:
    """A receiver's word moves a slot back as well: to WAL that the server has removed."""
    primary = sandbox(settings={**ALONE, "max_wal_size": "2MB"})
    receiving = receiver(primary).start()
    primary.fill(2)
    receiving.wait_for(primary.server)
    receiving.stop()
    assert receiving.partial is not None
    first = receiving.partial.name[:24]
    primary.server.sql("SELECT pg_drop_replication_slot(%s)", SLOT)
    primary.fill(12)
    primary.server.sql("CHECKPOINT")
    primary.server.sql("SELECT pg_create_physical_replication_slot(%s, true)", SLOT)
    # What pg_receivewal does first: it tells where it is. The server's answer, that this is gone, may come later.
    lsn = Lsn(int(first[16:], 16) * SEGMENT_SIZE)
    _confirm(primary.server, lsn)
    assert primary.server.value("SELECT restart_lsn::text FROM pg_replication_slots") == str(lsn)
    receiving.launch()
    until(lambda: receiving.status.get("state") == "streaming", "a new beginning")
    primary.fill(1)
    receiving.wait_for(primary.server)
    (gap,) = archive_info(primary.folder)["gaps"]
    assert gap["first"] == first
    assert receiving.status["not_received"] == f"{gap['first']} to {gap['last']}"


def _confirm(server: Server, lsn: Lsn) -> None:
    """Receive by the slot from where the server stands, and tell it that everything before ``lsn`` was flushed."""
    with contextlib.closing(server.login.connect(replication=True)) as connection, connection.cursor() as cursor:
        now = server.value("SELECT pg_current_wal_flush_lsn()::text")
        cursor.start_replication(slot_name=SLOT, start_lsn=now, decode=False)
        cursor.send_feedback(write_lsn=int(lsn), flush_lsn=int(lsn), force=True)
        moved = "SELECT restart_lsn = %s::pg_lsn FROM pg_replication_slots WHERE slot_name = %s"
        until(lambda: server.value(moved, str(lsn), SLOT), "the slot's move")


def test_lost_slot_hides_no_hole_that_archive_command_fills(
    sandbox: MakeSandbox, receiver: MakeReceiver, restored: Restore
) -> None:
    primary = sandbox(settings={"max_slot_wal_keep_size": "2MB", "max_wal_size": "2MB"})
    receiving = receiver(primary).start()
    primary.backup("only")
    receiving.wait_for(primary.server)
    receiving.stop()
    primary.fill(12)
    primary.probe()
    primary.server.sql("CHECKPOINT")
    assert slot(primary.server)[0] == "lost"
    receiving.launch()
    until(lambda: receiving.status.get("state") == "streaming", "a new beginning")
    primary.commit("end")
    primary.probe()
    receiving.wait_for(primary.server)
    assert archive_info(primary.folder)["gaps"] == []
    primary.server.stop()
    assert restored(primary).run().phase == "end"


def test_dropped_slot_is_made_anew_and_wal_that_is_still_there_is_received(
    sandbox: MakeSandbox, receiver: MakeReceiver
) -> None:
    primary = sandbox(settings={**ALONE, "wal_keep_size": "64MB"})
    receiving = receiver(primary).start()
    primary.fill(2)
    receiving.wait_for(primary.server)
    receiving.stop()
    primary.server.sql("SELECT pg_drop_replication_slot(%s)", SLOT)
    primary.fill(5)
    primary.server.sql("CHECKPOINT")
    primary.fill(2)
    receiving.start()
    receiving.wait_for(primary.server)
    unbroken(primary)
    assert receiving.status["not_received"] is None
    assert slot(primary.server) == ("reserved", True)


def test_absent_receiver_leaves_no_slot_and_keeps_the_spool(sandbox: MakeSandbox, receiver: MakeReceiver) -> None:
    primary = sandbox(settings=ALONE)
    receiving = receiver(primary).start()
    mark(primary.server)
    receiving.wait_for(primary.server)
    receiving.stop()
    assert receiving.control.remove(check=True) and slot(primary.server) != ()
    assert receiving.control.remove(check=False)
    assert slot(primary.server) == ()
    assert receiving.partial is not None
    assert not receiving.control.remove(check=False), "the second time nothing is left to do"


def test_slot_that_cannot_be_dropped_is_told_and_the_settings_stay(
    sandbox: MakeSandbox, receiver: MakeReceiver
) -> None:
    primary = sandbox(settings=ALONE)
    receiving = receiver(primary).start()
    receiving.stop()
    primary.server.stop()
    with pytest.raises(PitrError, match=f"slot {SLOT} could not be dropped"):
        receiving.control.remove(check=False)
    primary.server.start()
    assert receiving.control.remove(check=False)
    assert slot(primary.server) == ()


def test_slot_of_a_foreign_cluster_is_not_dropped(
    sandbox: MakeSandbox, receiver: MakeReceiver, stranger: Path, bin_dir: str, tmp_path: Path
) -> None:
    primary = sandbox(settings=ALONE)
    other = Sandbox(bin_dir, tmp_path / "other", stranger)
    try:
        other.server.start()
        other.server.sql("SELECT pg_create_physical_replication_slot(%s, true)", SLOT)
        with pytest.raises(PitrError, match="belongs to the cluster"):
            receiver(primary, server=other.server).control.remove(check=False)
        assert slot(other.server) == ("reserved", False)
    finally:
        other.server.close()


# --- the spool and the archive


def test_segment_that_the_archive_has_with_other_content_is_told_and_stops_nothing_else(
    sandbox: MakeSandbox, receiver: MakeReceiver
) -> None:
    primary = sandbox(settings=ALONE)
    receiving = receiver(primary).start()
    primary.fill(2)
    receiving.wait_for(primary.server)
    receiving.stop()
    assert receiving.partial is not None
    name = receiving.partial.name[:24]
    stored = primary.segments()[-1].with_name(name)
    data = bytearray(receiving.partial.read_bytes())
    data[-1] ^= 0xFF
    stored.write_bytes(data)
    receiving.start()
    primary.fill(3)
    receiving.wait_for(primary.server)
    until(lambda: name in receiving.status["not_archived"], "the conflict")
    assert "other content" in receiving.status["not_archived"][name]
    assert stored.read_bytes() == data
    names = unbroken(primary)
    assert names[-1] > name, "later segments are archived"
    assert (receiving.spool / name).exists(), "the receiver's own is kept"


def test_repository_that_is_away_for_a_while_loses_nothing(sandbox: MakeSandbox, receiver: MakeReceiver) -> None:
    primary = sandbox(settings=ALONE)
    receiving = receiver(primary).start()
    primary.fill(1)
    receiving.wait_for(primary.server)
    # Only the marker: pg_receivewal goes on, and nothing can be archived.
    archive, spool = primary.archive, receiving.spool
    before = fingerprint(archive)
    marker = primary.repository / "pitr-repository.json"
    marker.rename(marker.with_name("away"))
    primary.fill(4)
    until(lambda: len(list(spool.glob("?" * 24))) >= 4, "segments that wait in the spool")
    assert fingerprint(archive) == before
    marker.with_name("away").rename(marker)
    until(lambda: len(list(spool.glob("?" * 24))) == 1, "an empty spool")
    unbroken(primary)


def test_repository_that_was_lost_and_made_anew_has_one_receiver_and_it_is_found(
    sandbox: MakeSandbox, receiver: MakeReceiver
) -> None:
    here = sandbox()
    receiving = receiver(here).start()
    receiving.wait_for(here.server)
    pid = receiving.control.pid()
    kept = here.repository.with_name("kept")
    shutil.copytree(here.repository, kept, ignore=shutil.ignore_patterns("receiver", "locks"))
    shutil.rmtree(here.repository)
    kept.rename(here.repository)
    until(lambda: receiving.control.pid() == pid, "the receiver is found where the new repository is")
    receiving.wait_for(here.server)
    assert len(receiving.streams) == 1


def test_file_that_was_cut_off_while_it_was_made_does_not_stop_the_receiver(
    sandbox: MakeSandbox, receiver: MakeReceiver
) -> None:
    """pg_receivewal fills a new file with zeros; killed meanwhile, it would refuse its own file for ever."""
    primary = sandbox(settings=ALONE)
    receiving = receiver(primary).start()
    primary.fill(2)
    receiving.wait_for(primary.server)
    receiving.stop()
    assert receiving.partial is not None
    os.truncate(receiving.partial, 0)
    os.truncate(receiving.partial, 65536)
    receiving.start()
    primary.fill(2)
    receiving.wait_for(primary.server)
    unbroken(primary)
    assert list((receiving.spool / "left").iterdir()) == []


def test_file_of_a_wrong_size_with_wal_in_it_is_put_aside(sandbox: MakeSandbox, receiver: MakeReceiver) -> None:
    primary = sandbox(settings=ALONE)
    receiving = receiver(primary).start()
    primary.fill(2)
    receiving.wait_for(primary.server)
    receiving.stop()
    assert receiving.partial is not None
    os.truncate(receiving.partial, 65536)
    data = receiving.partial.read_bytes()
    assert any(data)
    receiving.start()
    primary.fill(2)
    receiving.wait_for(primary.server)
    unbroken(primary)
    (left,) = (receiving.spool / "left").iterdir()
    assert left.read_bytes() == data


def test_password_is_in_a_private_file_and_never_among_arguments(sandbox: MakeSandbox, receiver: MakeReceiver) -> None:
    secret = "it's a \\ secret: yes"
    primary = sandbox(settings=ALONE)
    primary.server.sql("CREATE ROLE streamer LOGIN REPLICATION PASSWORD %s", secret)
    hba = primary.server.data / "pg_hba.conf"
    rules = "local replication streamer scram-sha-256\n" + hba.read_text(encoding="utf-8")
    hba.write_text(rules, encoding="utf-8")
    primary.server.sql("SELECT pg_reload_conf()")
    receiving = receiver(primary)
    request = receiving.control._request
    user = type(request.settings)(**{**request.settings.to_dict(), "user": "streamer"})  # type: ignore[arg-type]
    receiving.control = Control(dataclasses.replace(request, settings=user, password=secret))
    receiving.control.configure(check=False)
    receiving.start()
    files = list(Path(primary.wal_command).parent.joinpath("receiver").iterdir())
    holding = [path for path in files if "secret" in path.read_text(encoding="utf-8")]
    assert [path.suffix for path in holding] == [".pgpass"] and holding[0].stat().st_mode & 0o077 == 0
    for pid in [receiving.control.pid(), *receiving.streams]:
        for what in ("cmdline", "environ"):
            assert b"secret" not in Path(f"/proc/{pid}/{what}").read_bytes()
    before = fingerprint(Path(primary.wal_command).parent / "receiver" / f"{holding[0].name}")
    assert receiving.control.configure(check=False)[0] is False
    assert fingerprint(holding[0]) == before
    # One that the server does not take is not written, and the receiver goes on.
    streams = receiving.streams
    receiving.control = Control(dataclasses.replace(receiving.control._request, password="wrong"))
    with pytest.raises(PitrError, match="password was not changed"):
        receiving.control.configure(check=False)
    assert fingerprint(holding[0]) == before and receiving.streams == streams
    assert sorted(path.name for path in holding[0].parent.iterdir()) == sorted(path.name for path in files)


def test_receiver_ends_upon_sigterm_with_all_that_came_on_disk(sandbox: MakeSandbox, receiver: MakeReceiver) -> None:
    primary = sandbox(settings=ALONE)
    receiving = receiver(primary).start()
    lsn = receiving.wait_for(primary.server)
    receiving.stop()
    assert receiving.streams == [] and not receiving.control.pid()
    assert receiving.has(lsn)
    assert re.search(r"receive: ended$", receiving.log, re.MULTILINE)
    # A wrong status of a life that has ended would be taken for a running one.
    receiving.start()
    receiving.kill()
    assert receiving.control.status()["status"]["state"] == "stopped"
