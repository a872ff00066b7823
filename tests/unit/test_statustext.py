# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Metrics, alert rules and dashboard: the text is Prometheus' own, and nothing is asked for that is never written."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.pgdrill.pitr.plugins.module_utils.judge import CRITICAL, OK, Finding, judge
from ansible_collections.pgdrill.pitr.plugins.module_utils.statustext import (
    METRICS,
    Status,
    fleet_header,
    fleet_row,
    metrics,
    nagios,
    table,
)
from ansible_collections.pgdrill.pitr.plugins.module_utils.wal import Lsn
from ansible_collections.pgdrill.pitr.plugins.module_utils.watched import Facts, Receiver, Sender, Slot
from ansible_collections.pgdrill.pitr.tests.unit.prometheus_text import parse, value
from ansible_collections.pgdrill.pitr.tests.unit.test_judge import FULL, GB, facts

CHECKOUT = Path(__file__).resolve().parents[2]
FILES = CHECKOUT / "roles" / "monitoring" / "files"
RULES = yaml.safe_load((FILES / "pitr.rules.yml").read_text(encoding="utf-8"))
DASHBOARD = json.loads((FILES / "pitr-dashboard.json").read_text(encoding="utf-8"))
WORDS = re.compile(r"\bpitr_[a-z_]+\b")


def status(given: Facts) -> Status:
    return Status(given, tuple(judge(given)))


EVERYTHING = facts(
    server={
        "slots": (Slot('a "slot"\\', "physical", True, "reserved", 5),),
        "senders": (Sender("r", "streaming", "sync", 9),),
        "wal_bytes": 7,
    },
    storage={
        "receiver": Receiver("r", True, "streaming", "", Lsn(1)),
        "drill_age": 5.0,
        "backups": (FULL, dataclasses.replace(FULL, label="i", type="incremental", age=60.0)),
    },
    room={"growth": 1.0 * GB},
)


def test_everything_that_is_known_is_written_and_can_be_read() -> None:
    samples, types = parse(metrics([status(EVERYTHING)]))
    assert set(types) == set(METRICS)
    assert {kind for kind, _says in METRICS.values()} == {"gauge", "counter"}
    assert value(samples, "pitr_last_backup_timestamp_seconds", type="incremental") == 1e9 - 60
    assert value(samples, "pitr_last_backup_timestamp_seconds", type="full") == 1e9 - 3600
    assert value(samples, "pitr_slot_retained_bytes", slot='a \\"slot\\"\\\\') == 5


def test_clusters_share_a_file() -> None:
    other = dataclasses.replace(EVERYTHING, cluster="other", server=None)
    samples, _types = parse(metrics([status(EVERYTHING), status(other)]))
    assert value(samples, "pitr_primary_up", cluster="main") == 1
    assert value(samples, "pitr_primary_up", cluster="other") == 0


def test_what_is_not_known_is_left_out() -> None:
    samples, _types = parse(metrics([status(Facts("main", 1e9))]))
    assert {name for name, _labels in samples} == {
        "pitr_finding",
        "pitr_primary_up",
        "pitr_status",
        "pitr_status_duration_seconds",
        "pitr_status_timestamp_seconds",
    }


def test_nagios_gets_one_line_whatever_is_said() -> None:
    loud = Status(facts(), (Finding("primary", CRITICAL, "two\nlines | and a bar"),))
    line = nagios([loud])
    assert line.startswith("PITR CRITICAL - main primary: two lines / and a bar | 'main_archive_lag'=0B")
    assert "\n" not in line and line.count("|") == 1


def test_table_has_what_is_wrong_first_and_what_to_do() -> None:
    lines = table(status(facts(storage={"damaged": ("b1",)})))
    assert lines[0] == "main: CRITICAL" and lines[1].split()[:2] == ["CRITICAL", "verify"]
    assert lines[2].strip().startswith("-> ") and "pitr verify main all" in lines[2]
    assert all(line.split()[0] == OK for line in lines[3:])


def test_fleet_has_the_same_columns_for_every_cluster() -> None:
    at = fleet_header().index("restorable to")
    assert fleet_row(status(facts()))[at:].startswith("2/80000000")
    assert fleet_row(status(Facts("nobody-knows", 0.0)))[at:].startswith("-")
    assert "primary: " in fleet_row(status(Facts("nobody-knows", 0.0)))


def rules() -> list[dict[str, Any]]:
    return [rule for group in RULES["groups"] for rule in group["rules"]]


def test_rules_have_the_shape_that_prometheus_reads() -> None:
    assert set(RULES) == {"groups"} and all(set(group) == {"name", "rules"} for group in RULES["groups"])
    names = [rule["alert"] for rule in rules()]
    assert len(set(names)) == len(names)
    for rule in rules():
        assert set(rule) == {"alert", "expr", "for", "labels", "annotations"}, rule
        assert re.fullmatch(r"\d+[smhd]", rule["for"]) and set(rule["annotations"]) == {"summary", "description"}
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["expr"].count("(") == rule["expr"].count(")") and WORDS.search(rule["expr"])


def expressions() -> list[str]:
    panels = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    variables = [item["query"]["query"] for item in DASHBOARD["templating"]["list"] if isinstance(item["query"], dict)]
    return [rule["expr"] for rule in rules()] + panels + variables


@pytest.mark.parametrize("expression", expressions())
def test_no_metric_is_asked_for_that_the_command_does_not_write(expression: str) -> None:
    named = set(WORDS.findall(expression))
    assert named and named <= set(METRICS)
    # Label values, too.
    text = metrics([status(EVERYTHING)])
    for found in re.findall(r'\b(type|check|of)="(\w+)"', expression):
        assert '{}="{}"'.format(*found) in text


def test_rules_cover_every_level_and_a_command_that_does_not_run() -> None:
    together = " ".join(rule["expr"] for rule in rules())
    for part in (
        "pitr_finding == 2",
        "pitr_finding == 1",
        "pitr_finding == 3",
        "absent(pitr_status)",
        "_timestamp_seconds >",
    ):
        assert part in together


def test_dashboard_panels_have_a_place_each() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_every_check_and_metric_is_in_the_guide() -> None:
    guide = (CHECKOUT / "docs" / "monitoring.md").read_text(encoding="utf-8")
    for finding in judge(Facts("main", 0.0)):
        assert f"`{finding.check}`" in guide, finding.check
    for name in METRICS:
        assert f"`{name}`" in guide, name
    for rule in rules():
        assert rule["alert"] in guide, rule["alert"]
