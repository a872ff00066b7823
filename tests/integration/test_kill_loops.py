# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""kill -9 of everything that archives and fetches, at random moments, under load; then nothing is lost.

PGDRILL_TEST_KILLS: how many processes have to be hit (default: 200 on the newest PostgreSQL, 40 on the others);
PGDRILL_TEST_SEED: repeats a sequence of moments, as far as clocks and schedulers let it. ``make kill-test KILLS=2000``.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils import codec, dump
from ansible_collections.pgdrill.pitr.plugins.module_utils.expire import set_mark
from ansible_collections.pgdrill.pitr.plugins.module_utils.info import archive_info, backup_info
from ansible_collections.pgdrill.pitr.plugins.module_utils.postgres import SUPPORTED
from ansible_collections.pgdrill.pitr.plugins.module_utils.stored import sha256, stored_backups
from ansible_collections.pgdrill.pitr.plugins.module_utils.wal import WalFile
from ansible_collections.pgdrill.pitr.tests.integration.receiving import Receiving, unbroken
from ansible_collections.pgdrill.pitr.tests.integration.support import (
    CLUSTER,
    SEGMENT_SIZE,
    Restored,
    Sandbox,
    until,
)

KILLS = int(os.environ.get("PGDRILL_TEST_KILLS") or 0)
SEED = int(os.environ.get("PGDRILL_TEST_SEED") or int.from_bytes(os.urandom(3), "big"))
# Seconds; a kill takes a fraction of one.
TIMEOUT = max(600, 3 * KILLS)

TABLES = """
CREATE TABLE account (id int PRIMARY KEY, balance bigint NOT NULL DEFAULT 0);
INSERT INTO account (id) SELECT generate_series(1, 1000);
CREATE TABLE ledger (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, account int NOT NULL, note text NOT NULL);
"""
TRANSACTION = """
\\set account random(1, 1000)
BEGIN;
UPDATE account SET balance = balance + 1 WHERE id = :account;
INSERT INTO ledger (account, note) VALUES (:account, repeat('x', 200));
END;
"""
RATE = 300  # transactions per second

BASE_BACKUP = """
import sys
from ansible_collections.pgdrill.pitr.plugins.module_utils.backup import BaseBackup
from ansible_collections.pgdrill.pitr.plugins.module_utils.postgres import Login
from ansible_collections.pgdrill.pitr.plugins.module_utils.repository import ClusterFolder
repository, cluster, socket, bin_dir, label = sys.argv[1:]
login = Login(unix_socket=socket, port=5432)
BaseBackup(ClusterFolder.open(repository, cluster), login, bin_dir, label=label, archive_timeout=30).take()
"""
EXPIRE = """
import sys
from ansible_collections.pgdrill.pitr.plugins.module_utils.expire import Expiry
from ansible_collections.pgdrill.pitr.plugins.module_utils.repository import ClusterFolder
from ansible_collections.pgdrill.pitr.plugins.module_utils.retention import Policy
Expiry(ClusterFolder.open(*sys.argv[1:]), Policy(keep_full=1)).run()
"""


# --- processes


def _stat(pid: int) -> tuple[str, int, int]:
    """State, parent and session of a process (proc_pid_stat(5)); state Z when there is none."""
    with contextlib.suppress(OSError, ValueError):
        words = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return words[0], int(words[1]), int(words[3])
    return "Z", 0, 0


def _living(wanted: Callable[[int, int, int], bool]) -> list[int]:
    """Living processes for which ``wanted(pid, parent, session)``."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            state, parent, session = _stat(int(name))
            if state not in "ZX" and wanted(int(name), parent, session):
                found.append(int(name))
    return found


def _below(pid: int) -> list[int]:
    """Living descendants, nearest first."""
    found: list[int] = []
    heads = [pid]
    while heads:
        heads = _living(lambda _pid, parent, _session: parent in heads)  # noqa: B023
        found += heads
    return found


def _strike(pid: int) -> bool:
    """kill -9. Whether somebody living was hit."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if _stat(pid)[0] not in "ZX":
            os.kill(pid, signal.SIGKILL)
            return True
    return False


# --- the field


@dataclass
class Field:
    """A primary under load, a receiver, a standby that lives on the archive alone, and what was done to them."""

    primary: Sandbox
    standby: Restored
    receiver: Receiving
    scratch: Path
    chance: random.Random
    labels: Iterator[int] = field(default_factory=lambda: iter(range(1_000_000)))
    # How long a victim lives when nobody kills it, in seconds.
    lifetimes: dict[str, float] = field(default_factory=dict)

    @property
    def pg_wal(self) -> Path:
        return self.primary.server.data / "pg_wal"

    def finished_segment(self) -> Path:
        """A segment that the archiver is at, or has just done."""
        self.primary.fill(1)
        names = sorted(path.name.partition(".")[0] for path in (self.pg_wal / "archive_status").glob("?" * 24 + ".*"))
        return self.pg_wal / (names[-1] if self.chance.random() < 0.8 else self.chance.choice(names))


Hunt = Callable[[str, Field], bool]


def command(argv_of: Callable[[Field], list[str]], check: Callable[[Field, int], None]) -> Hunt:
    """Start it in a session of its own and kill one process of that session, or all of them.

    ``check`` is given the exit code of the command (negative: the signal that ended it).
    """

    def hunt(name: str, field: Field) -> bool:
        argv = argv_of(field)
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        started = time.monotonic()
        if name not in field.lifetimes:
            check(field, process.wait())
            field.lifetimes[name] = time.monotonic() - started
            return False
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(field.chance.uniform(0, field.lifetimes[name]))
            # It was quicker than the ones before.
            field.lifetimes[name] = (field.lifetimes[name] + time.monotonic() - started) / 2
        members = sorted(_living(lambda _pid, _parent, session: session == process.pid))
        if field.chance.random() < 0.5 and members:
            members = [field.chance.choice(members)]
        hit = [_strike(pid) for pid in members]
        code = process.wait()
        # Who outlives the one that was hit may still deliver, which is to be looked at before expire has its turn.
        until(lambda: not _living(lambda _pid, _parent, session: session == process.pid), f"the end of {name}")
        check(field, code)
        return any(hit) and code != 0

    return hunt


def called_by(parent: Callable[[Field], int], afterwards: Callable[[Field], None]) -> Hunt:
    """Kill what a process of the server runs: the shell, the launcher, the interpreter, or a compressor."""

    def hunt(name: str, field: Field) -> bool:
        field.primary.fill(1)
        if not field.standby.server.is_running:
            field.standby.server.start(wait=False)
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            pid = parent(field)
            if pid and (below := _below(pid)):
                # The interpreter is where the work is; the shell's death ends the archiver, which is slow to come back.
                time.sleep(field.chance.uniform(0, 0.05))
                below = _below(pid) or below
                if _strike(below[-1] if field.chance.random() < 0.9 else below[0]):
                    afterwards(field)
                    return True
                # It was done already; there will be another one.
                field.primary.fill(1)
            time.sleep(0.002)
        return False

    return hunt


def _backend(field: Field, server: str, title: str) -> int:
    """Process of a server by its title (init_ps_display), 0 when there is none."""
    data = field.primary.server.data if server == "primary" else field.standby.server.data
    with contextlib.suppress(OSError, ValueError, IndexError):
        postmaster = int((data / "postmaster.pid").read_text(encoding="utf-8").split()[0])
        for pid in _living(lambda _pid, parent, _session: parent == postmaster):
            if title in Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="replace"):
                return pid
    return 0


def _push(field: Field) -> list[str]:
    return [field.primary.wal_command, "push", CLUSTER, str(field.finished_segment())]


def _pushed(_field: Field, code: int) -> None:
    assert code <= 125, "the archiver would end and its failure not be counted"


def _get(field: Field) -> list[str]:
    name = field.chance.choice(field.primary.segments()).name
    return [field.primary.wal_command, "get", CLUSTER, name, str(field.scratch / name)]


def _got(field: Field, code: int) -> None:
    assert not 1 <= code <= 125, "the server would take it for the end of the archive"
    delivered = [path for path in field.scratch.iterdir() if not path.name.endswith(".pitr")]
    assert code != 0 or delivered
    for path in delivered:
        # Whole or not there, whoever was killed.
        with codec.open_reader(str(field.primary.archive / path.name[:16] / path.name)) as reader:
            assert path.read_bytes() == reader.read(), path
        path.unlink()


def _base_backup(field: Field) -> list[str]:
    primary = field.primary
    place = [str(primary.repository), CLUSTER, primary.server.socket, primary.bin_dir]
    return [sys.executable, "-c", BASE_BACKUP, *place, f"backup{next(field.labels)}"]


def _expire(field: Field) -> list[str]:
    """Removes all backups but the newest and the first, which is marked."""
    return [sys.executable, "-c", EXPIRE, str(field.primary.repository), CLUSTER]


def _standby_goes_on(field: Field) -> None:
    """What it saw of the kill is the end of the server, and never the end of the archive."""
    server = field.standby.server
    with contextlib.suppress(AssertionError):
        until(lambda: not server.is_running, "the standby's reaction", 2)
    assert "selected new timeline ID" not in server.log_text()
    if not server.is_running:
        server.start(wait=False)


def _receiver(_name: str, field: Field) -> bool:
    """Kill the supervisor, pg_receivewal, or both; what is not there is started first, and may be hit as it starts."""
    receiver = field.receiver
    if not receiver.control.pid():
        receiver.launch()
    field.primary.fill(1)
    time.sleep(field.chance.uniform(0, 0.5))
    pid = receiver.control.pid()
    members = [*([pid] if pid else []), *receiver.streams]
    if len(members) > 1 and field.chance.random() < 0.5:
        members = [field.chance.choice(members)]
    struck = [_strike(one) for one in members]
    return any(struck)


@dataclass(frozen=True)
class Victim:
    """``weight``: how often it is chosen, beside the others."""

    name: str
    weight: int
    hunt: Hunt


VICTIMS = (
    Victim("push beside the archiver", 100, command(_push, _pushed)),
    Victim("push of the archiver", 15, called_by(lambda field: _backend(field, "primary", "archiver"), lambda _: None)),
    Victim("get", 60, command(_get, _got)),
    Victim("get of a standby", 10, called_by(lambda field: _backend(field, "standby", "startup"), _standby_goes_on)),
    Victim("receiver", 20, _receiver),
    Victim("base_backup", 15, command(_base_backup, lambda _field, _code: None)),
    Victim("expire", 10, command(_expire, lambda _field, _code: None)),
)


# --- what must hold afterwards


def _archive_is_whole(primary: Sandbox) -> int:
    """Every file of the archive has its content; returns their number."""
    count = 0
    for path in primary.archive.rglob("*"):
        if path.is_dir():
            continue
        if path.name.startswith("."):
            # Left by a kill; no reader takes it for anything.
            assert path.name.endswith(".tmp"), path
            continue
        WalFile.parse(path.name)
        with codec.open_reader(str(path)) as reader:
            content = reader.read()
        original = primary.server.data / "pg_wal" / path.name
        if len(path.name) == 24:
            assert len(content) == SEGMENT_SIZE, path
        done = primary.server.data / "pg_wal" / "archive_status" / f"{path.name}.done"
        if done.exists() and original.exists():
            assert content == original.read_bytes(), path
        count += 1
    info = archive_info(primary.folder)
    assert info["gaps"] == [] and info["unknown_files"] == []
    return count


def _compare(primary: Sandbox, cluster: Restored, truth: Path) -> None:
    request = dump.Request(cluster.server.login, primary.bin_dir, compare_to=str(truth))
    compared = dump.perform(request).compared
    assert compared is not None and compared.comparison.identical, compared and compared.message(str(truth))


@pytest.mark.timeout(TIMEOUT)
def test_nothing_is_lost_whoever_is_killed(
    sandbox: Callable[..., Sandbox], restored: Callable[..., Restored], major: int, tmp_path: Path
) -> None:
    kills = KILLS or (200 if major == max(SUPPORTED) else 40)
    print(f"\nPGDRILL_TEST_SEED={SEED}: {kills} kills on PostgreSQL {major}")
    primary = sandbox(settings={"max_wal_senders": 10, "wal_keep_size": "8MB"})
    server = primary.server
    for statement in TABLES.strip().split(";\n"):
        server.sql(statement)
    primary.backup("first")
    set_mark(primary.folder, "first", "it is restored at the end")
    standby = restored(primary, archive_after="off")
    (standby.server.data / "recovery.signal").rename(standby.server.data / "standby.signal")
    (standby.server.data / "conf.d" / "zz-standby.conf").write_text(
        "wal_retrieve_retry_interval = '50ms'\n", encoding="ascii"
    )
    standby.server.start(wait=False)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    receiver = Receiving(primary, server)
    field = Field(primary, standby, receiver, scratch, random.Random(SEED))
    script = tmp_path / "transaction.sql"
    script.write_text(TRANSACTION, encoding="ascii")
    pgbench = [os.path.join(primary.bin_dir, "pgbench"), "-n", "-c", "2", "-R", str(RATE), "-T", "100000"]
    hits: Counter[str] = Counter()
    misses: Counter[str] = Counter()
    started = time.monotonic()
    load = subprocess.Popen(
        [*pgbench, "-f", str(script), "-h", server.socket, "-p", str(server.PORT), "-U", "postgres", "postgres"],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        while sum(hits.values()) < kills or not all(hits[one.name] for one in VICTIMS):
            if sum(hits.values()) < kills:
                victim = field.chance.choices(VICTIMS, [one.weight for one in VICTIMS])[0]
            else:
                # None is left out.
                victim = next(one for one in VICTIMS if not hits[one.name])
            (hits if victim.hunt(victim.name, field) else misses)[victim.name] += 1
            assert load.poll() is None, "pgbench has ended"
            # Half of the tries miss, by their nature.
            assert sum(misses.values()) < 50 + 5 * kills, (hits, misses)
    except BaseException:
        receiver.close()
        raise
    finally:
        load.terminate()
        load.wait()
    seconds = time.monotonic() - started
    for victim in VICTIMS:
        lifetime = field.lifetimes.get(victim.name)
        lived = f", lives {lifetime:.2f} s" if lifetime else ""
        print(f"{victim.name:<28} {hits[victim.name]:5} killed, {misses[victim.name]:5} missed{lived}")
    print(f"{sum(hits.values())} kills in {seconds:.1f} s; {server.value('SELECT count(*) FROM ledger')} transactions")

    # All of it works again, at once.
    try:
        receiver.launch()
        # The receiver is patient with a slot that it was killed at; there is something else to do meanwhile.
        primary.backup("last")
        receiver.control.wait()
        receiver.wait_for(server)
        receiver.stop()
    finally:
        receiver.close()
    assert unbroken(primary)
    end = primary.commit("end").end
    primary.probe()
    ready = server.data / "pg_wal" / "archive_status"
    until(lambda: not list(ready.glob("*.ready")), "an empty backlog")
    truth = tmp_path / "truth"
    dump.perform(dump.Request(server.login, primary.bin_dir, path=str(truth)))
    stored = _archive_is_whole(primary)
    folder = primary.folder
    backups = stored_backups(folder)
    for backup in backups:
        for file in backup.files:
            assert sha256(str(primary.backups / backup.label / file.name)) == file.sha256, (backup.label, file.name)
    assert all(item["restorable"] for item in backup_info(folder)["recovery_windows"])

    # The standby, which has been shot down all the time, has come to the same end.
    # It may lie there since the receiver was ahead of an archiver that was shot: a hole for a while, and no end.
    assert "selected new timeline ID" not in standby.server.log_text()
    if not standby.server.is_running:
        standby.server.start(wait=False)
    until(lambda: standby.server.is_running, "the standby")
    until(lambda: _replayed(standby, str(end)), "the standby at the primary's end")
    assert standby.phase == "end"
    standby.server.stop("fast")
    for label in ("first", "last"):
        cluster = restored(primary, backup=label, archive_after="none-until-promoted", keep_out=False).run()
        assert cluster.phase == "end"
        _compare(primary, cluster, truth)
        cluster.server.stop("immediate")
        shutil.rmtree(cluster.server.data)
    print(f"{stored} files in the archive and {len(backups)} backups are whole, restored and identical")
    print(f"{time.monotonic() - started:.1f} s in all")


def _replayed(standby: Restored, position: str) -> bool:
    """Whether the standby has come so far."""
    with contextlib.suppress(Exception):
        return bool(standby.server.value("SELECT pg_last_wal_replay_lsn() >= %s::pg_lsn", position))
    return False
