# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What an operator would check on converged hosts, after a disaster and a restore in place."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from ansible_collections.pgdrill.pitr.molecule.shared.hosts import (
    CLUSTER,
    FOLDER,
    HAS_RECEIVER,
    HOSTS,
    OWNER,
    PASSWORDS,
    REPOSITORY,
    changes,
    host,
    playbook,
    service,
    sql,
)

UNITS = [f"pitr-{verb}@{CLUSTER}" for verb in ("backup", "expire", "verify", "drill")]


def labels(repository: Any) -> set[str]:
    return set(repository.check_output(f"ls {FOLDER}/backups").split())


# --- services


def test_server_runs_under_its_own_service_and_starts_with_the_host(primary: Any) -> None:
    assert primary.service(service(primary)).is_running
    assert primary.service("postgresql").is_enabled


@pytest.mark.receiver
def test_receiver_is_enabled_and_receives_and_commits_wait_for_it(primary: Any, repository: Any) -> None:
    unit = repository.service(f"pitr-receiver@{CLUSTER}")
    assert unit.is_running and unit.is_enabled
    query = "SELECT sync_state FROM pg_stat_replication WHERE application_name = 'pitr_{}'"
    assert sql(primary, query.format(CLUSTER)) == "sync"
    status = json.loads(repository.file(f"{FOLDER}/receiver/status.json").content)
    timeline = int(sql(primary, "SELECT timeline_id FROM pg_control_checkpoint()"))
    assert (status["state"], status["timeline"]) == ("streaming", timeline), status


@pytest.mark.parametrize("unit", UNITS)
def test_timer_is_enabled_and_will_elapse(repository: Any, unit: str) -> None:
    timer = repository.service(f"{unit}.timer")
    assert timer.is_running and timer.is_enabled
    shown = repository.check_output(f"systemctl show -P NextElapseUSecRealtime {unit}.timer").strip()
    assert re.search(r"\d{4}-\d\d-\d\d", shown), shown


@pytest.mark.parametrize("name", HOSTS)
def test_no_unit_has_failed(name: str) -> None:
    assert host(name).check_output("systemctl --failed --no-legend --plain").strip() == ""


def test_archiving_is_on_and_of_the_present_timeline(primary: Any) -> None:
    timeline = int(sql(primary, "SELECT timeline_id FROM pg_control_checkpoint()"))
    assert sql(primary, "SELECT last_archived_wal FROM pg_stat_archiver").startswith(f"{timeline:08X}")
    assert sql(primary, "SHOW archive_command").startswith("/usr/local/lib/pgdrill/pitr-wal push")


# --- work by the clock


def test_backup_by_its_service_is_whole_and_told_in_the_journal(repository: Any) -> None:
    before = labels(repository)
    repository.check_output(f"systemctl start pitr-backup@{CLUSTER}.service")
    (new,) = labels(repository) - before
    journal = repository.check_output(f"journalctl -o cat -u pitr-backup@{CLUSTER}.service")
    assert f"backup {new} of {CLUSTER} is complete" in journal
    repository.check_output(f"systemctl start pitr-verify@{CLUSTER}.service")
    assert f"whole: {new}" in repository.check_output(f"journalctl -o cat -u pitr-verify@{CLUSTER}.service")


def test_backups_that_come_due_while_one_runs_do_not_overlap(repository: Any) -> None:
    before = labels(repository)
    start = f"systemctl start --no-block pitr-backup@{CLUSTER}.service"
    repository.check_output(f"{start}; sleep 0.3; {start}; {start}; systemctl start pitr-backup@{CLUSTER}.service")
    assert len(labels(repository) - before) == 1


def test_expire_by_its_service_keeps_what_the_policy_keeps(repository: Any) -> None:
    repository.check_output(f"systemctl start pitr-backup@{CLUSTER}.service")
    before = sorted(labels(repository))
    told = {label: repository.file(f"{FOLDER}/backups/{label}/backup.json").content_string for label in before}
    timelines = {label: json.loads(text)["timeline"] for label, text in told.items()}
    repository.check_output(f"systemctl start pitr-expire@{CLUSTER}.service")
    # Two of the newest timeline, and the one of the timeline before a restore, which alone leads there.
    older = [label for label in before if timelines[label] != timelines[before[-1]]]
    assert sorted(labels(repository)) == [*older, *before[-2:]] != before
    assert f"removed from {CLUSTER}: {before[len(older)]}" in repository.check_output(
        f"journalctl -o cat -u pitr-expire@{CLUSTER}"
    )


def test_damage_makes_the_verification_fail_by_name(repository: Any) -> None:
    newest = sorted(labels(repository))[-1]
    path = repository.check_output(f"ls -S {FOLDER}/backups/{newest}/* | head -n 1").strip()
    # A run of the timer's may be on its way; it would be the one that is waited for.
    repository.check_output(f"systemctl stop pitr-verify@{CLUSTER}.service")
    repository.check_output(f"cp -p {path} /root/kept")
    # Another value than the one that is there.
    turn = "import sys; f = open(sys.argv[1], 'r+b'); f.seek(700); b = f.read(1)[0]"
    turn += "; f.seek(700); f.write(bytes([b ^ 255]))"
    repository.check_output("python3 -c %s %s", turn, path)
    try:
        assert repository.run(f"systemctl start pitr-verify@{CLUSTER}.service").rc != 0
        assert path.rpartition("/")[2] in repository.check_output(f"journalctl -o cat -u pitr-verify@{CLUSTER} -n 20")
    finally:
        repository.check_output(f"cp -p /root/kept {path} && rm /root/kept")
    repository.check_output(f"systemctl start pitr-verify@{CLUSTER}.service")


def test_drill_by_its_service_proves_what_the_repository_holds(primary: Any, repository: Any) -> None:
    sql(primary, "CREATE TABLE IF NOT EXISTS drilled AS SELECT generate_series(1, 1000) AS n")
    before = labels(repository)
    repository.check_output(f"systemctl start pitr-drill@{CLUSTER}.service")
    said = repository.check_output(f"journalctl -o cat -u pitr-drill@{CLUSTER}.service -n 20")
    assert f"the drill of {CLUSTER} passed: restored {max(before)}" in said and "pg_amcheck found nothing in" in said
    # Nothing stays: no copy, no server, and the repository is as it was.
    assert repository.check_output("ls /srv/pitr-drill").split() == [f"pitr-drill-{CLUSTER}.lock"]
    assert repository.run("pgrep -f '[d]rill of'").rc == 1
    assert labels(repository) == before
    last = json.loads(repository.file(f"{FOLDER}/activity.json").content)["drill"][-1]
    assert (last["verdict"], last["by"], last["backup"]) == ("passed", "clock", max(before))


@pytest.mark.parametrize("unit", [*UNITS, *([f"pitr-receiver@{CLUSTER}"] if HAS_RECEIVER else [])])
def test_unit_is_locked_down(repository: Any, unit: str) -> None:
    text = repository.check_output(f"systemctl show --all {unit}.service")
    for line in (
        f"User={OWNER}",
        "ProtectSystem=strict",
        "NoNewPrivileges=yes",
        "CapabilityBoundingSet=",
        "PrivateTmp=yes",
    ):
        assert f"\n{line}\n" in text
    places = "/srv/pitr /srv/pitr-drill" if unit.startswith("pitr-drill@") else "/srv/pitr"
    assert f"\nReadWritePaths={places}\n" in text
    said = repository.check_output(f"systemd-analyze security --no-pager {unit}.service | tail -n 1")
    assert float(re.search(r": (\d+\.\d)", said)[1]) < 3, said


# --- secrets


def test_nothing_of_the_repository_is_for_others(repository: Any) -> None:
    assert repository.check_output(f"find /srv/pitr ! -user {OWNER} -o ! -type l -perm /077").strip() == ""


@pytest.mark.parametrize("name", HOSTS)
def test_password_is_in_no_journal_no_process_and_no_file_that_others_may_read(name: str) -> None:
    machine = host(name)
    for password in PASSWORDS:
        assert password not in machine.check_output("journalctl --no-pager -a")
        assert password not in machine.check_output("cat /proc/[0-9]*/cmdline | tr '\\0' ' '")
        for form in (password, password.replace("\\", "\\\\").replace(":", "\\:")):
            places = "/etc /usr/local /var/lib /var/log /var/backups /srv /root /home /tmp /run"
            for path in machine.run(f"grep -rlsF --devices=skip -e '{form}' {places}").stdout.split():
                assert machine.file(path).mode & 0o077 == 0, path


def test_user_postgres_is_as_the_packages_or_the_operator_have_made_him(primary: Any, repository: Any) -> None:
    for machine in (primary, repository):
        user = machine.user("postgres")
        assert (user.home, user.shell) == ("/var/lib/postgresql", "/bin/bash")


@pytest.mark.ssh
@pytest.mark.parametrize("name", [name for name in HOSTS if name != REPOSITORY])
def test_private_keys_are_the_servers_alone(name: str) -> None:
    machine = host(name)
    for kind in ("writer", "reader"):
        key = machine.file(f"/etc/pgdrill/{CLUSTER}-{kind}")
        assert (key.user, key.mode) == ("postgres", 0o600)
    assert machine.file("/etc/pgdrill").mode == 0o700


@pytest.mark.parametrize("name", HOSTS)
def test_code_that_the_servers_run_is_nobody_elses_to_change(name: str) -> None:
    assert host(name).check_output("find /usr/local/lib/pgdrill ! -type l -perm /022").strip() == ""


# --- a second look


def test_check_mode_of_converged_hosts_shows_no_change() -> None:
    answer = playbook("site", "--check")
    assert answer.returncode == 0, answer.stdout[-3000:]
    assert set(changes(answer).values()) == {0}, answer.stdout[-5000:]
