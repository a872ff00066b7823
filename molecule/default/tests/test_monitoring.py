# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Monitoring on a real host: the timer writes metrics that another user can read, and can write little else."""

from __future__ import annotations

import json
from typing import Any

UNIT = "pitr-status@shop"
METRICS = "/var/lib/pitr-monitoring/shop.prom"


def test_timer_is_enabled_and_the_service_has_written(repository: Any) -> None:
    timer = repository.service(f"{UNIT}.timer")
    assert timer.is_running and timer.is_enabled
    assert repository.run(f"systemctl start {UNIT}.service").rc == 0
    assert repository.check_output(f"systemctl show -P Result {UNIT}.service").strip() == "success"
    # What an exporter does that is another user.
    text = repository.check_output("su -s /bin/sh nobody -c 'cat /srv/pitr-shop.prom'")
    assert 'pitr_primary_up{cluster="shop"} 1' in text, text
    assert 'pitr_receiver_up{cluster="shop"} 1' in text, text
    assert repository.file(METRICS).mode == 0o644 and repository.file(METRICS).user == "pitr"


def test_everything_is_known_and_nothing_is_critical(repository: Any) -> None:
    answer = repository.run("su -s /bin/sh pitr -c '/usr/local/lib/pgdrill/pitr-status shop --json'")
    (cluster,) = json.loads(answer.stdout)["clusters"]
    levels = {each["check"]: each["level"] for each in cluster["findings"]}
    # What the machine of the tests has of room is not the matter, and archiving failed until the restore was accepted.
    assert {check for check, level in levels.items() if level != "OK"} <= {"space", "archiving"}, cluster["findings"]
    assert levels["archiving"] != "CRITICAL" and cluster["facts"]["server"]["refused"] == []
    assert cluster["facts"]["notes"] == []


def test_service_cannot_write_to_the_repository(repository: Any) -> None:
    properties = "-p ProtectSystem -p ReadWritePaths -p NoNewPrivileges"
    shown = repository.check_output(f"systemctl show {properties} {UNIT}.service")
    assert "ProtectSystem=strict" in shown and "NoNewPrivileges=yes" in shown
    assert "ReadWritePaths=\n" in shown + "\n" and "/srv" not in shown


def test_nothing_of_it_holds_the_password_but_the_passfile(repository: Any) -> None:
    places = "/var/lib/pitr-monitoring /usr/local/lib/pgdrill/monitoring /etc/systemd/system"
    assert repository.run(f"grep -rF 'backups:of' {places}").rc == 1
    assert repository.file("/usr/local/lib/pgdrill/maintenance/shop.pgpass").mode == 0o600
