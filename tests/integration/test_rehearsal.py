# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Drills by the clock: what the repository holds is proven, everything else is untouched, and nothing stays."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils import activity, locks, rehearsal
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.plugins.module_utils.incremental import SINCE, Basis
from ansible_collections.pgdrill.pitr.plugins.module_utils.maintenance_install import install
from ansible_collections.pgdrill.pitr.plugins.module_utils.maintenance_settings import Settings
from ansible_collections.pgdrill.pitr.plugins.module_utils.postgres import query, running_pid
from ansible_collections.pgdrill.pitr.plugins.module_utils.rehearsal import Proof, Rehearsal
from ansible_collections.pgdrill.pitr.plugins.module_utils.wal import Lsn
from ansible_collections.pgdrill.pitr.tests.integration.conftest import History
from ansible_collections.pgdrill.pitr.tests.integration.support import (
    CLUSTER,
    Identity,
    Sandbox,
    Server,
    Storage,
    cut,
    fingerprint,
    flip,
    until,
)


def wanted(storage: Storage, keep: bool = False, **more: Any) -> Rehearsal:
    """A drill of this repository; ``more``: settings without their ``drill_``."""
    told = {"directory": str(storage.directory / "drills"), **more}
    identity = told.pop("identity", "")
    settings = Settings(
        repository=str(storage.repository),
        bin_dir=storage.bin_dir,
        login_host="nowhere",
        identity=identity,
        **{f"drill_{name}": value for name, value in told.items()},
    )
    return Rehearsal(settings, CLUSTER, storage.wal_command, keep)


def drill(storage: Storage, **more: Any) -> Proof:
    return wanted(storage, **more).run()


def fails(storage: Storage, match: str, **more: Any) -> str:
    """The drill fails, the repository remembers it, and nothing stays. Returns what it says."""
    with pytest.raises(PitrError, match=match) as caught:
        drill(storage, **more)
    last = remembered(storage)[-1]
    assert last["verdict"] == "failed" and last["error"] in caught.value.message
    assert nothing_left(storage)
    return caught.value.message


def remembered(storage: Storage) -> list[dict[str, Any]]:
    return activity.read(activity.path_of(storage.folder))[activity.DRILL]


def nothing_left(storage: Storage, leases: int = 0) -> bool:
    """No directory but an empty one, and no server. Leases of killed drills end by themselves."""
    names = {path.name for path in (storage.directory / "drills").iterdir()}
    processes = subprocess.run(["pgrep", "-f", str(storage.directory / "drills")], capture_output=True, check=False)
    assert names <= {f"pitr-drill-{CLUSTER}.lock"}, names
    assert processes.returncode == 1, processes.stdout
    assert len(locks.leases(storage.folder)) == leases
    return True


@contextlib.contextmanager
def looked_at(storage: Storage, **more: Any) -> Iterator[tuple[Server, Proof]]:
    """The copy of a drill that keeps it, started as its last words say."""
    work = wanted(storage, keep=True, **more)
    proof = work.run()
    assert running_pid(str(Path(work.place) / "data")) is None
    start, look = work.kept().splitlines()[2:4]
    subprocess.run(start, shell=True, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    server = Server(storage.bin_dir, Path(work.place) / "data")
    os.rmdir(server.socket)
    server.socket = look.split()[2]
    try:
        yield server, proof
    finally:
        work.clear()
        assert nothing_left(storage) and not Path(server.socket).exists()


@pytest.fixture
def storage(history: History, tmp_path: Path) -> Storage:
    """A copy of a repository with three backups and WAL after them."""
    return history.sandbox.copy(tmp_path / "a place")


def test_everything_that_is_archived_is_proven_and_nothing_stays(storage: Storage, history: History) -> None:
    with looked_at(storage) as (server, proof):
        assert server.phase == history.commits[-1].phase
    before = fingerprint(storage.backups, storage.archive)
    proof = drill(storage)
    assert nothing_left(storage) and fingerprint(storage.backups, storage.archive) == before
    assert proof.backup == "third" and proof.timeline == 2 and proof.databases == ("postgres",)
    assert Lsn.parse(proof.lsn) >= history.commits[-1].end and set(proof.seconds) == {"restore", "replay", "check"}
    last = remembered(storage)[-1]
    assert (last["verdict"], last["by"], last["lsn"], last["backup"]) == ("passed", "clock", proof.lsn, "third")
    assert proof.lsn in str(proof) and "postgres" in str(proof)


def test_copy_acts_on_nobody(sandbox: Callable[..., Sandbox]) -> None:
    primary = sandbox(settings={"wal_level": "logical", "max_logical_replication_workers": 4})
    with primary.server.connection() as connection:
        for statement in (
            "CREATE PUBLICATION everything",
            "CREATE SUBSCRIPTION again CONNECTION 'host=/nowhere' PUBLICATION everything"
            " WITH (connect = false, slot_name = 'again')",
            "ALTER SUBSCRIPTION again ENABLE",
            "ALTER SYSTEM SET shared_preload_libraries = 'no_such_library'",
            "ALTER SYSTEM SET listen_addresses = '*'",
        ):
            query(connection, statement)
        query(connection, "SELECT pg_reload_conf()")
    primary.backup("first")
    primary.commit("after")
    primary.probe()
    before = fingerprint(primary.server.data / "global", primary.server.data / "postgresql.auto.conf")
    with looked_at(primary) as (copy, _proof):
        assert copy.phase == "after" and copy.show("listen_addresses") == "" and copy.show("archive_mode") == "off"
        assert copy.show("shared_preload_libraries") == "" and copy.show("cluster_name") == "drill of main"
        assert copy.value("SELECT count(*) FROM pg_subscription WHERE subenabled") == 1
        launched = "SELECT count(*) FROM pg_stat_activity WHERE backend_type LIKE 'logical replication%'"
        assert copy.value(launched) == 0
        assert Path(copy.socket).stat().st_mode & 0o777 == 0o700
    assert fingerprint(primary.server.data / "global", primary.server.data / "postgresql.auto.conf") == before
    assert primary.server.phase == "after"


def test_tablespaces_and_configuration_elsewhere_are_left_alone(
    sandbox: Callable[..., Sandbox], tmp_path: Path, major: int
) -> None:
    primary = sandbox(settings={"summarize_wal": "on"} if major >= SINCE else {})
    space = tmp_path / "a space"
    space.mkdir()
    primary.server.sql(f"CREATE TABLESPACE elsewhere LOCATION '{space}'")
    primary.server.sql("CREATE TABLE there (n int) TABLESPACE elsewhere")
    primary.backup("first")
    primary.server.sql("INSERT INTO there SELECT generate_series(1, 1000)")
    primary.probe()
    primary.server.sql("CHECKPOINT")
    before = fingerprint(space)
    with looked_at(primary) as (copy, _proof):
        assert copy.value("SELECT count(*) FROM there") == 1000
        where = "SELECT pg_tablespace_location(oid) FROM pg_tablespace WHERE spcname = 'elsewhere'"
        assert copy.value(where).startswith(f"{copy.data.parent}/")
    assert fingerprint(space) == before


def test_raised_settings_of_the_primary_are_followed(sandbox: Callable[..., Sandbox]) -> None:
    primary = sandbox(settings={"max_connections": 250, "max_prepared_transactions": 7})
    primary.backup("first")
    primary.commit("after")
    primary.probe()
    assert drill(primary).backup == "first"


def test_damage_that_only_amcheck_sees_fails_the_drill(sandbox: Callable[..., Sandbox]) -> None:
    primary = sandbox()
    primary.server.sql("CREATE TABLE indexed (n int)")
    primary.server.sql("CREATE INDEX by_n ON indexed (n)")
    # Rows that the index does not know.
    primary.server.sql("UPDATE pg_index SET indisready = false WHERE indexrelid = 'by_n'::regclass")
    primary.server.sql("INSERT INTO indexed SELECT generate_series(1, 100)")
    primary.server.sql("UPDATE pg_index SET indisready = true WHERE indexrelid = 'by_n'::regclass")
    primary.backup("first")
    primary.probe()
    assert "by_n" in fails(primary, "pg_amcheck found damage")
    assert drill(primary, amcheck=False).databases == ()
    assert [item["verdict"] for item in remembered(primary)] == ["failed", "passed"]


@pytest.mark.once
@pytest.mark.parametrize("which", [-1, -2])
def test_damaged_wal_fails_the_drill(storage: Storage, which: int) -> None:
    victim = storage.segments()[which]
    flip(victim, victim.stat().st_size // 2)
    fails(storage, "(?s)archive|WAL|read")


@pytest.mark.once
def test_hole_in_the_archive_fails_the_drill(storage: Storage) -> None:
    victim = storage.segments()[-2]
    victim.unlink()
    assert victim.name[:24] in fails(storage, "cannot be restored")


@pytest.mark.once
def test_damaged_backup_fails_the_drill(storage: Storage) -> None:
    cut(max((storage.backups / "third").iterdir(), key=lambda path: path.stat().st_size))
    # The one before it could be restored; that nobody shall learn from a disaster.
    assert "third" in fails(storage, "backup_damaged")


def test_newest_backup_whose_parent_is_damaged_fails_the_drill(sandbox: Callable[..., Sandbox], major: int) -> None:
    if major < SINCE:
        pytest.skip("this version takes no incremental backups")
    primary = sandbox(settings={"summarize_wal": "on"})
    parent = primary.backup("parent")
    # Of its own, and stopped after the parent: a restore would take this one.
    primary.backup("other")
    primary.backup("newest", basis=Basis(primary.folder, primary.server.login, "incremental", parent.label))
    primary.probe()
    assert drill(primary).backup == "newest"
    cut(max((primary.backups / "parent").iterdir(), key=lambda path: path.stat().st_size))
    assert primary.plan(primary.directory / "new").backup.label == "other"
    assert "parent" in fails(primary, "backup_damaged")


@pytest.mark.once
def test_repository_without_a_backup_fails_the_drill(storage: Storage) -> None:
    for path in list(storage.backups.iterdir()):
        path.rename(storage.directory / path.name)
    assert "cannot be restored" in fails(storage, "backup")


@pytest.mark.once
def test_what_is_encrypted_wants_its_key(sandbox: Callable[..., Sandbox], tmp_path: Path) -> None:
    primary = sandbox()
    key = Identity(tmp_path / "key")
    primary.encrypt_to(key.public)
    primary.backup("first")
    primary.commit("after")
    primary.probe()
    fails(primary, "identity_missing")
    assert drill(primary, identity=str(key.path)).backup == "first"


@pytest.mark.once
def test_replay_that_takes_too_long_fails_the_drill(storage: Storage) -> None:
    fails(storage, "not reached within 0 seconds", timeout=0, settings={"recovery_min_apply_delay": "1h"})


@pytest.mark.once
def test_superuser_that_is_none_is_told(storage: Storage) -> None:
    fails(storage, "nobody_at_all", user="nobody_at_all")


@pytest.mark.once
def test_room_of_the_archive_is_not_taken(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "RESERVE", 1.0)
    monkeypatch.setattr(rehearsal, "RESERVE_BYTES", 1 << 60)
    fails(storage, "leaves .* MiB to the archive")
    if os.stat("/tmp").st_dev != os.stat(storage.repository).st_dev:
        # On another filesystem it is not asked for.
        place = Path(wanted(storage, directory=f"/tmp/{storage.directory.parent.name}-{os.getpid()}").place)
        drill(storage, directory=str(place.parent))
        (place.parent / f"{place.name}.lock").unlink()
        place.parent.rmdir()


@pytest.mark.once
@pytest.mark.parametrize("directory", ["", "relative", "{repository}", "{repository}/drills"])
def test_directory_that_cannot_be_one_for_drills_is_refused(storage: Storage, directory: str) -> None:
    before = fingerprint(storage.repository)
    with pytest.raises(PitrError, match="Nothing was done"):
        drill(storage, directory=directory.format(repository=storage.repository))
    assert fingerprint(storage.repository) == before and remembered(storage) == []


@pytest.mark.once
def test_what_no_drill_has_made_is_not_removed(storage: Storage) -> None:
    place = Path(wanted(storage).place)
    (place / "data").mkdir(parents=True)
    (place / "data" / "PG_VERSION").write_text("18\n", encoding="ascii")
    before = fingerprint(place)
    with pytest.raises(PitrError, match="no drill has made it"):
        drill(storage)
    assert fingerprint(place) == before


@pytest.mark.once
def test_server_of_somebody_else_is_not_stopped(storage: Storage, sandbox: Callable[..., Sandbox]) -> None:
    other = sandbox(data=Path(wanted(storage).place) / "data")
    with pytest.raises(PitrError, match="no drill has made it"):
        drill(storage)
    assert other.server.phase == "template"


@pytest.mark.once
def test_two_drills_of_one_cluster_do_not_meet(storage: Storage) -> None:
    (storage.directory / "drills").mkdir()
    lock = locks.acquire(f"{wanted(storage).place}.lock")
    with pytest.raises(PitrError, match="Another drill"):
        drill(storage)
    assert remembered(storage) == []
    os.close(lock)
    assert drill(storage).backup == "third"


# --- the command


@pytest.fixture
def command(storage: Storage) -> Callable[..., list[str]]:
    """``pitr``, installed, as a command line; ``settings`` are options of drills."""

    def build(*arguments: str, **settings: Any) -> list[str]:
        values = Settings(
            repository=str(storage.repository),
            bin_dir=storage.bin_dir,
            login_host="nowhere",
            drill_directory=str(storage.directory / "drills"),
            **settings,
        )
        directory = Path(storage.wal_command).parent
        install(str(directory), CLUSTER, values, "", sys.executable)
        return [str(directory / "pitr"), "drill", CLUSTER, *arguments]

    return build


def run(argv: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=120)


def test_command_tells_what_was_proven(storage: Storage, command: Callable[..., list[str]]) -> None:
    answer = run(command())
    assert (answer.returncode, answer.stderr) == (0, "") and answer.stdout.startswith("the drill of main passed: ")
    assert nothing_left(storage) and remembered(storage)[-1]["lsn"] in answer.stdout


def test_command_tells_what_has_failed_and_how_to_look_at_it(
    storage: Storage, command: Callable[..., list[str]]
) -> None:
    victim = storage.segments()[-1]
    flip(victim, victim.stat().st_size // 2)
    answer = run(command("keep"))
    assert answer.returncode == 1 and answer.stderr.startswith("pitr drill: the drill of main FAILED. ")
    assert "until the next drill" in answer.stderr and "pg_ctl start" in answer.stderr
    assert running_pid(str(storage.directory / "drills" / f"pitr-drill-{CLUSTER}" / "data")) is None
    flip(victim, victim.stat().st_size // 2)
    assert run(command()).returncode == 0 and nothing_left(storage)


@pytest.mark.once
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_drill_that_is_killed_is_no_failed_one_and_leaves_nothing_behind_the_next(
    storage: Storage, command: Callable[..., list[str]], how: signal.Signals
) -> None:
    data = storage.directory / "drills" / f"pitr-drill-{CLUSTER}" / "data"
    argv = command(drill_settings={"recovery_min_apply_delay": "1h"})
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until(lambda: running_pid(str(data)), "the server of the drill")
    process.send_signal(how)
    assert process.wait(60) == (-signal.SIGKILL if how == signal.SIGKILL else 128 + signal.SIGTERM)
    assert remembered(storage) == []
    if how == signal.SIGKILL:
        assert running_pid(str(data)) is not None
    else:
        assert nothing_left(storage)
    assert run(command()).returncode == 0 and nothing_left(storage, leases=int(how == signal.SIGKILL))
