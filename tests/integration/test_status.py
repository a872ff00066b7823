# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The status of real clusters: each fault has its verdict, and a primary or a repository that is gone is a finding."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils import activity
from ansible_collections.pgdrill.pitr.plugins.module_utils import maintenance as maintenances
from ansible_collections.pgdrill.pitr.plugins.module_utils.judge import CRITICAL, OK, UNKNOWN, WARNING, Finding
from ansible_collections.pgdrill.pitr.plugins.module_utils.maintenance_install import install
from ansible_collections.pgdrill.pitr.plugins.module_utils.postgres import running_pid
from ansible_collections.pgdrill.pitr.plugins.module_utils.status import Settings, look_and_judge
from ansible_collections.pgdrill.pitr.plugins.module_utils.statustext import METRICS, Status
from ansible_collections.pgdrill.pitr.plugins.module_utils.wal import Lsn
from ansible_collections.pgdrill.pitr.tests.integration.receiving import Receiving
from ansible_collections.pgdrill.pitr.tests.integration.support import (
    CLUSTER,
    Sandbox,
    Server,
    fingerprint,
    flip,
    until,
)
from ansible_collections.pgdrill.pitr.tests.unit.prometheus_text import parse, value


def settings(primary: Sandbox, user: str = "postgres", **limits: Any) -> Settings:
    return Settings(
        repository=str(primary.repository),
        login_host=primary.server.socket,
        login_port=primary.server.PORT,
        login_user=user,
        state_directory=str(primary.directory / "state"),
        limits={"free_percent": [0, 0], "days_left": [0, 0], **limits},
    )


def look(primary: Sandbox, user: str = "postgres", **limits: Any) -> Status:
    return look_and_judge(str(primary.directory / "pitr"), CLUSTER, settings(primary, user, **limits))


def finding(status: Status, check: str) -> Finding:
    return next(each for each in status.findings if each.check == check)


def wrong(status: Status) -> dict[str, str]:
    return {each.check: each.level for each in status.findings if each.level != OK}


@pytest.fixture
def primary(sandbox: Callable[..., Sandbox]) -> Sandbox:
    """A primary with a backup, everything archived."""
    made = sandbox()
    made.commit("first")
    made.backup("b1")
    made.commit("second")
    made.probe()
    return made


def test_healthy_cluster_is_ok_and_looking_changes_nothing_in_the_repository(primary: Sandbox) -> None:
    before = fingerprint(primary.repository)
    status = look(primary)
    assert wrong(status) == {}, status
    facts = status.facts
    assert facts.server is not None and facts.storage is not None
    assert facts.server.system_identifier == facts.storage.archive.system_identifier
    assert [backup.label for backup in facts.storage.restorable] == ["b1"]
    assert facts.storage.archive.last_segment == primary.segments()[-1].name
    stored = sum(path.stat().st_size for path in [*primary.segments(), *primary.archive.glob("*/*.backup")])
    stored += sum(path.stat().st_size for path in primary.backups.glob("b1/*") if path.name != "backup.json")
    assert facts.storage.room.stored == stored
    assert fingerprint(primary.repository) == before
    assert json.loads(json.dumps(status.to_dict()))["level"] == OK


def test_role_of_backups_sees_everything_with_pg_monitor_and_says_so_without(primary: Sandbox) -> None:
    primary.server.sql("CREATE ROLE pitr_backup LOGIN REPLICATION")
    status = look(primary, "pitr_backup")
    assert wrong(status) == {"primary": UNKNOWN} and "GRANT pg_monitor" in finding(status, "primary").do
    primary.server.sql("GRANT pg_monitor TO pitr_backup")
    status = look(primary, "pitr_backup")
    assert wrong(status) == {} and status.facts.server is not None and status.facts.server.wal_bytes


def test_archiving_that_is_broken_warns_then_is_critical_then_recovers(primary: Sandbox) -> None:
    look(primary)
    working = primary.archive_command
    primary.configure({"archive_command": "false"})
    primary.server.sql("SELECT pg_reload_conf()")
    primary.fill(2)
    until(lambda: primary.server.value("SELECT failed_count FROM pg_stat_archiver") > 0, "a failure")
    status = look(primary)
    assert wrong(status) == {"archiving": WARNING}, status
    said = finding(status, "archiving").says
    assert "archive_command fails" in said and "segments wait" in said
    # WAL has been waiting since the look before.
    time.sleep(1.1)
    status = look(primary, archive_lag=["1 min", "1 min"], archive_lag_bytes=["1kB", "1MB"])
    assert wrong(status)["archive_lag"] == CRITICAL and "behind the primary" in finding(status, "archive_lag").says
    assert status.facts.archive_lag is not None and status.facts.archive_lag >= 2 << 20
    assert status.facts.archive_lag_age > 1
    primary.configure({"archive_command": working})
    primary.server.sql("SELECT pg_reload_conf()")
    primary.probe()
    until(lambda: primary.server.value("SELECT last_archived_time > last_failed_time FROM pg_stat_archiver"), "success")
    status = look(primary)
    assert wrong(status) == {"archiving": WARNING} and "and works again" in finding(status, "archiving").says
    assert status.facts.archive_lag is not None and status.facts.archive_lag < 1 << 20


def test_archiver_that_hangs_is_silent(primary: Sandbox) -> None:
    primary.configure({"archive_command": "sleep 100; false"})
    primary.server.sql("SELECT pg_reload_conf()")
    primary.fill(2)
    old = time.time() - 600
    ready = sorted((primary.server.data / "pg_wal" / "archive_status").glob("*.ready"))
    os.utime(ready[0], (old, old))
    status = look(primary)
    assert wrong(status) == {"archiving": WARNING, "archive_lag": WARNING}
    assert "silent" in finding(status, "archiving").says and status.facts.archive_lag_age > 500


def test_abandoned_slot_is_named_with_how_to_drop_it(primary: Sandbox) -> None:
    primary.server.sql("CHECKPOINT")
    primary.server.sql("SELECT pg_create_physical_replication_slot('gone_standby', true)")
    assert wrong(look(primary, idle_slot_bytes=["1MB", "3MB"])) == {}
    primary.fill(2)
    status = look(primary, idle_slot_bytes=["1MB", "3MB"])
    assert wrong(status) == {"slots": WARNING}
    slots = finding(status, "slots")
    assert "slot gone_standby keeps 2" in slots.says and "nobody uses it" in slots.says
    assert "pg_drop_replication_slot('gone_standby')" in slots.do
    primary.fill(2)
    assert wrong(look(primary, idle_slot_bytes=["1MB", "3MB"])) == {"slots": CRITICAL}


def test_missing_segment_is_a_gap_by_name(primary: Sandbox) -> None:
    primary.fill(4)
    primary.probe()
    # What was stored ahead of the archiver would be stored again.
    status_directory = primary.server.data / "pg_wal" / "archive_status"
    until(lambda: not list(status_directory.glob("*.ready")), "an archiver with nothing to do")
    missing = primary.segments()[-3]
    missing.unlink()
    status = look(primary)
    # It may be on its way still.
    assert wrong(status) == {"gaps": WARNING, "window": WARNING} and missing.name in finding(status, "gaps").says
    behind, old = primary.segments()[-2], time.time() - 400
    os.utime(behind, (old, old))
    status = look(primary)
    assert wrong(status) == {"gaps": CRITICAL, "window": CRITICAL}
    assert missing.name in finding(status, "window").says
    # A new backup does not need what is missing.
    primary.backup("b2")
    primary.probe()
    status = look(primary)
    assert wrong(status) == {"gaps": WARNING} and missing.name in finding(status, "gaps").says


def test_missing_wal_of_the_only_backup_leaves_nothing_to_restore(primary: Sandbox) -> None:
    backup = primary.backups / "b1" / "backup.json"
    start = json.loads(backup.read_text(encoding="utf-8"))["start_lsn"]
    primary.segment(Lsn.parse(start)).unlink()
    found = wrong(look(primary))
    assert found["window"] == found["full_backup"] == found["backup"] == CRITICAL


def test_damaged_backup_is_told_without_reading_it(primary: Sandbox) -> None:
    (primary.backups / "b1" / "backup_manifest").unlink()
    status = look(primary)
    assert finding(status, "window").level == CRITICAL and "backup_manifest" in finding(status, "window").says


def test_wrong_cluster_is_critical(primary: Sandbox, sandbox: Callable[..., Sandbox], stranger: Path) -> None:
    data = primary.directory / "stranger"
    shutil.copytree(stranger, data)
    other = Server(primary.bin_dir, data)
    try:
        other.start()
        asked = Settings(**{**settings(primary).to_dict(), "login_host": other.socket})
        status = look_and_judge("/nowhere", CLUSTER, asked, keep=False)
        identity = finding(status, "identity")
        assert identity.level == CRITICAL and "WRONG CLUSTER" in identity.says
        assert other.system_identifier in identity.says and primary.server.system_identifier in identity.says
    finally:
        other.close()


def test_primary_that_is_down_is_a_finding_and_the_repository_is_told(primary: Sandbox) -> None:
    primary.server.stop()
    status = look(primary)
    found = wrong(status)
    assert found.pop("primary") == CRITICAL and set(found.values()) == {UNKNOWN}
    assert "No connection" in finding(status, "primary").says
    assert finding(status, "window").level == OK and "b1" in finding(status, "window").says


def test_primary_that_takes_the_connection_and_says_nothing_is_a_finding(primary: Sandbox) -> None:
    postmaster = running_pid(str(primary.server.data))
    assert postmaster is not None
    os.kill(postmaster, signal.SIGSTOP)
    try:
        status = look(primary)
    finally:
        os.kill(postmaster, signal.SIGCONT)
    assert finding(status, "primary").level == CRITICAL and "timeout expired" in finding(status, "primary").says
    assert finding(status, "window").level == OK


def test_standby_is_no_primary(primary: Sandbox) -> None:
    primary.server.stop()
    (primary.server.data / "standby.signal").touch()
    primary.server.start()
    status = look(primary)
    assert finding(status, "primary").level == CRITICAL and "in recovery" in finding(status, "primary").says


def test_repository_that_is_gone_is_a_finding_and_the_primary_is_told(primary: Sandbox) -> None:
    primary.repository.rename(primary.directory / "unmounted")
    primary.repository.mkdir()
    status = look(primary)
    assert finding(status, "repository").level == CRITICAL and "mounted?" in finding(status, "repository").says
    assert finding(status, "primary").level == finding(status, "slots").level == OK
    assert finding(status, "window").level == UNKNOWN


def test_old_backup_is_told_by_its_age(primary: Sandbox) -> None:
    path = primary.backups / "b1" / "backup.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    for name in ("started_at", "stopped_at"):
        document[name] = (datetime.datetime.fromisoformat(document[name]) - datetime.timedelta(days=9)).isoformat()
    path.write_text(json.dumps(document), encoding="utf-8")
    status = look(primary)
    assert wrong(status) == {"full_backup": WARNING, "backup": CRITICAL, "verify": WARNING}
    assert finding(status, "full_backup").says == "b1, 9.0 days old"


def test_verification_leaves_a_trace_and_damage_stays_told_until_it_is_whole(primary: Sandbox) -> None:
    jobs = maintenances.Settings(
        repository=str(primary.repository), bin_dir=primary.bin_dir, login_host=primary.server.socket
    )
    primary.backup("b2")
    maintenances.verify(jobs, CLUSTER, "all")
    status = look(primary)
    assert finding(status, "verify").says.startswith("whole (content)")
    base = next((primary.backups / "b1").glob("base.tar*"))
    flip(base, 100)
    with pytest.raises(Exception, match="other content"):
        maintenances.verify(jobs, CLUSTER, "b1")
    # That another one is whole takes nothing back.
    maintenances.verify(jobs, CLUSTER, "b2")
    status = look(primary)
    assert finding(status, "verify").level == CRITICAL and "b1" in finding(status, "verify").says
    flip(base, 100)
    maintenances.verify(jobs, CLUSTER, "b1")
    assert wrong(look(primary)) == {}


def test_drill_is_told(primary: Sandbox) -> None:
    path = activity.path_of(primary.folder)
    assert finding(look(primary), "drill").says == "no drill is known"
    activity.add(path, activity.DRILL, {"verdict": "passed", "scenarios": ["latest"]})
    assert finding(look(primary), "drill").says.startswith("passed ")
    activity.add(path, activity.DRILL, {"verdict": "failed", "scenarios": ["latest"]})
    assert finding(look(primary), "drill").level == WARNING
    assert "evidence" in finding(look(primary), "drill").do
    activity.add(path, activity.DRILL, {"verdict": "failed", "scenarios": ["latest"], "by": activity.CLOCK})
    assert finding(look(primary), "drill").do == f"journalctl -u pitr-drill@{CLUSTER}"


# --- the command


@pytest.fixture
def installed(primary: Sandbox) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the installed pitr-status; ``again(**limits)`` first installs it anew."""
    directory = primary.directory / "a place"

    def run(*arguments: str, **limits: Any) -> subprocess.CompletedProcess[str]:
        install(str(directory), CLUSTER, settings(primary, **limits), "secret", sys.executable)
        argv = [str(directory / "pitr-status"), *arguments]
        return subprocess.run(argv, capture_output=True, text=True, check=False, umask=0o077)

    return run


def test_command_has_a_table_a_line_a_document_and_nagios_codes(
    primary: Sandbox, installed: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    answer = installed()
    assert (answer.returncode, answer.stderr) == (0, ""), answer
    assert answer.stdout.startswith("main: OK\n") and "OK        archiving" in answer.stdout
    answer = installed("--nagios", "main")
    assert answer.returncode == 0 and answer.stdout.startswith("PITR OK - main | 'main_archive_lag'=")
    assert answer.stdout.count("\n") == 1
    primary.server.sql("SELECT pg_create_physical_replication_slot('gone', true)")
    primary.fill(2)
    assert installed("--nagios", idle_slot_bytes=["1MB", 0]).returncode == 1
    answer = installed("--nagios", idle_slot_bytes=["1MB", "1MB"])
    assert answer.returncode == 2 and answer.stdout.startswith("PITR CRITICAL - main slots: slot gone keeps")
    answer = installed("--json", idle_slot_bytes=["1MB", "1MB"])
    assert answer.returncode == 2 and json.loads(answer.stdout)["clusters"][0]["cluster"] == "main"
    assert installed("--nagios", "other").returncode == 3
    # The one that cannot be looked at takes nothing from the other.
    answer = installed("main", "other", "--json")
    assert [each["level"] for each in json.loads(answer.stdout)["clusters"]] == [OK, UNKNOWN]
    assert json.loads(answer.stdout)["level"] == UNKNOWN
    for wrong_use in (["--xml"], ["--json", "--nagios"], ["--textfile"]):
        answer = installed(*wrong_use)
        assert answer.returncode == 3 and answer.stderr.startswith("usage: pitr-status")
    assert "secret" not in answer.stdout + answer.stderr


def test_textfile_is_what_prometheus_reads_and_whole_at_every_moment(
    primary: Sandbox, installed: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    path = tmp_path / "metrics" / "main.prom"
    path.parent.mkdir()
    primary.server.sql("SELECT pg_create_physical_replication_slot('gone', true)")
    assert installed("--textfile", str(path)).returncode == 0
    samples, types = parse(path.read_text(encoding="utf-8"))
    assert set(types) <= set(METRICS)
    assert value(samples, "pitr_status", cluster="main") == 0
    assert value(samples, "pitr_primary_up") == 1 and value(samples, "pitr_slot_active", slot="gone") == 0
    assert value(samples, "pitr_backups", type="full") == 1
    assert abs((value(samples, "pitr_last_backup_timestamp_seconds", type="any") or 0) - time.time()) < 600
    assert path.stat().st_mode & 0o777 == 0o644
    # Who reads it meanwhile reads the old one to its end.
    before = path.read_bytes()
    with open(path, "rb", buffering=0) as reader:
        assert reader.read(10) == before[:10]
        assert installed("--textfile", str(path)).returncode == 0
        assert before[:10] + reader.read() == before != path.read_bytes()
    assert [name.name for name in path.parent.iterdir()] == ["main.prom"]
    # What is wrong is in the file, and no failure of the command.
    primary.server.stop()
    assert installed("--textfile", str(path)).returncode == 0
    samples, _types = parse(path.read_text(encoding="utf-8"))
    assert value(samples, "pitr_primary_up") == 0 and value(samples, "pitr_status") == 2
    assert value(samples, "pitr_archive_lag_bytes") is None and value(samples, "pitr_backups", type="full") == 1
    answer = installed("--textfile", str(tmp_path / "nowhere" / "main.prom"))
    assert answer.returncode == 3 and "nowhere" in answer.stderr


def test_state_that_cannot_be_kept_is_a_note(primary: Sandbox) -> None:
    (primary.directory / "state").write_text("in the way", encoding="ascii")
    status = look(primary)
    assert wrong(status) == {} and "was not written" in status.facts.notes[0]


# --- with a receiver


@pytest.fixture
def receiving(sandbox: Callable[..., Sandbox]) -> Iterator[tuple[Sandbox, Receiving]]:
    """A primary of which only the receiver archives."""
    primary = sandbox(settings={"archive_command": "true"})
    receiver = Receiving(primary, primary.server)
    try:
        receiver.start()
        # The first segment is of before the slot.
        primary.fill(1)
        receiver.wait_for(primary.server)
        primary.backup("b1")
        yield primary, receiver
    finally:
        receiver.close()


def test_receiver_is_watched(receiving: tuple[Sandbox, Receiving]) -> None:
    primary, receiver = receiving
    status = look(primary)
    assert wrong(status) == {}, status
    assert status.facts.receiver_lag is not None and "behind the primary" in finding(status, "receiver").says
    receiver.stop()
    until(lambda: not primary.server.sql("SELECT 1 FROM pg_stat_replication"), "the end of the connection")
    status = look(primary)
    assert wrong(status) == {"receiver": CRITICAL}
    assert "pitr-receiver@main" in finding(status, "receiver").do
    # One that was taken away is not missed.
    settings_file = primary.directory / "pitr" / "receiver" / "main.json"
    settings_file.rename(settings_file.with_suffix(".away"))
    assert wrong(look(primary)) == {} and finding(look(primary), "receiver").says == "there is none"
    settings_file.with_suffix(".away").rename(settings_file)
    # Without the primary what the receiver says counts.
    receiver.start()
    primary.server.stop()
    until(lambda: receiver.status["state"] != "streaming", "a receiver without a server")
    assert finding(look(primary), "receiver").level == CRITICAL
