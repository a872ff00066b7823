# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The verdict of a drill: a proof that is missing is a failure with a name."""

from __future__ import annotations

import copy
import datetime
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils.report import (
    _STEPS,
    evidence,
    failures,
    scenario,
    summary,
    write,
)

FINISHED = datetime.datetime(2026, 3, 1, 13, 0, 0, 123456, tzinfo=datetime.timezone(datetime.timedelta(hours=1)))
Raw = dict[str, Any]


def good(name: str = "latest") -> Raw:
    """The results of one scenario's tasks, all well."""
    return {
        "name": name,
        "target": {"recovery_target_xid": "745"},
        "expected": {"sequence": 7, "phase": "end"},
        "amcheck_wanted": True,
        "stop": {
            "seconds": 0.5,
            "started_at": "2026-03-01T12:00:00+00:00",
            "finished_at": "2026-03-01T12:00:00.5+00:00",
        },
        "restore": {
            "seconds": 3.25,
            "plan": {
                "target": "latest",
                "backup": "20260301T110000Z-full",
                "first_segment": "000000010000000000000002",
                "last_segment": "000000010000000000000009",
                "segments": 8,
                "wal_bytes": 8 * 16 * 2**20,
            },
        },
        "start": {"seconds": 0.75},
        "recovery": {
            "seconds": 2.0,
            "timeline": 2,
            "reached": {"lsn": "0/9000060", "reason": "no recovery target specified"},
            "finished_at": "2026-03-01T12:00:12.345000+00:00",
        },
        "check": {"seconds": 1.5, "status": {"sequence": 7, "phase": "end"}, "amcheck": {"ok": True, "findings": ""}},
        "dump": {
            "seconds": 1.25,
            "identical": True,
            "fingerprint": "f00d",
            "explained": [{"database": "app", "object": "sequence s", "reason": "up to 32 values ahead"}],
        },
        "error": "",
        "failed_task": "",
    }


def drill(*names: str, requested: list[str] | None = None) -> Raw:
    return {
        "cluster": "main",
        "system_identifier": "73",
        "postgresql_version": "18.6",
        "started_at": "2026-03-01T11:00:00+00:00",
        "requested": list(names) if requested is None else requested,
        "load": {"scale": 10},
        "phases": [{"name": "backup", "seconds": 4.5}, {"name": "truth"}],
        "scenarios": [good(name) for name in names],
        "error": "",
        "failed_task": "",
    }


def without(*path: str) -> Callable[[Raw], None]:
    def change(raw: Raw) -> None:
        for key in path[:-1]:
            raw = raw[key]
        del raw[path[-1]]

    change.__name__ = "without-" + "-".join(path)
    return change


def having(value: object, *path: str) -> Callable[[Raw], None]:
    def change(raw: Raw) -> None:
        for key in path[:-1]:
            raw = raw[key]
        raw[path[-1]] = value

    change.__name__ = "-".join(path) + f"={value}"[:30]
    return change


FAULTS: list[tuple[Callable[[Raw], None], str]] = [
    (without("restore"), "nothing was restored"),
    (without("restore", "plan"), "nothing was restored"),
    (having({}, "restore", "plan"), "nothing was restored"),
    (without("recovery"), "it is not known where the recovery stopped"),
    (without("recovery", "reached"), "it is not known where the recovery stopped"),
    (having(None, "recovery", "reached"), "it is not known where the recovery stopped"),
    (without("expected"), "the status row was not compared"),
    (having({}, "expected"), "the status row was not compared"),
    (without("check", "status"), "the status row was not compared"),
    (having({}, "check", "status"), "the status row was not compared"),
    (having(6, "check", "status", "sequence"), "the status row is"),
    (having(8, "check", "status", "sequence"), "the status row is"),
    (having("before latest", "check", "status", "phase"), "the status row is"),
    (without("check", "amcheck"), "pg_amcheck did not run"),
    (having({}, "check", "amcheck"), "pg_amcheck did not run"),
    (having({"ok": False, "findings": "index i lacks a tuple"}, "check", "amcheck"), "index i lacks a tuple"),
    (having({"findings": ""}, "check", "amcheck"), "pg_amcheck found corruption"),
    (without("dump"), "the dumps were not compared"),
    (without("dump", "identical"), "the dumps were not compared"),
    (having({"skipped": True, "changed": False}, "dump"), "the dumps were not compared"),
    (having({"identical": False, "difference_count": 3}, "dump"), "differs from the original in 3 objects"),
    (having("Connection refused", "error"), "a task: Connection refused"),
]


def test_scenario_with_every_proof_has_passed() -> None:
    assert failures(good()) == []
    assert scenario(good())["verdict"] == "passed"


@pytest.mark.parametrize(("fault", "why"), FAULTS, ids=[fault.__name__ for fault, _why in FAULTS])
def test_scenario_with_one_proof_missing_or_wrong_has_failed_by_name(fault: Callable[[Raw], None], why: str) -> None:
    raw = good()
    fault(raw)
    document = evidence({**drill(), "requested": ["latest"], "scenarios": [raw]}, FINISHED)
    (item,) = document["scenarios"]
    assert item["verdict"] == "failed" and document["verdict"] == "failed"
    (reason,) = item["failures"]
    assert why in reason
    assert document["failures"] == [f"latest: {reason}"]


def test_every_proof_missing_is_named_at_once() -> None:
    assert len(failures({"name": "latest"})) == 5
    assert scenario({"name": "latest"})["verdict"] == "failed"


def test_check_that_did_not_run_misses_status_and_amcheck() -> None:
    raw = good()
    del raw["check"]
    assert failures(raw) == ["the status row was not compared", "pg_amcheck did not run"]


def test_amcheck_may_be_left_out_on_purpose_only() -> None:
    raw = good()
    del raw["check"]["amcheck"]
    raw["amcheck_wanted"] = False
    assert failures(raw) == []
    del raw["amcheck_wanted"]
    assert failures(raw) == ["pg_amcheck did not run"]


@pytest.mark.parametrize("name", ["time", "xid", "lsn", "name", "immediate"])
def test_only_the_end_of_the_archive_is_compared_with_the_truth(name: str) -> None:
    raw = good(name)
    raw["dump"] = {}
    assert failures(raw) == []
    raw["check"]["status"]["sequence"] = 8
    assert len(failures(raw)) == 1


def test_failed_task_is_named_and_hides_what_could_not_follow() -> None:
    raw = {"name": "xid", "error": "[archive_gap] a hole", "failed_task": "Restore", "restore": {}}
    assert failures(raw) == ["Restore: [archive_gap] a hole"]


def test_drill_with_all_scenarios_has_passed() -> None:
    document = evidence(drill("time", "xid", "latest"), FINISHED)
    assert document["verdict"] == "passed" and document["failures"] == []
    assert [item["name"] for item in document["scenarios"]] == ["time", "xid", "latest"]


def test_scenario_that_was_asked_for_and_did_not_run_is_a_failure() -> None:
    document = evidence(drill("time", requested=["time", "xid", "latest"]), FINISHED)
    assert document["verdict"] == "failed"
    assert document["failures"] == ["xid: did not run", "latest: did not run"]


@pytest.mark.parametrize("scenarios", [[], None])
def test_drill_without_any_scenario_has_failed(scenarios: list[Raw] | None) -> None:
    nothing = evidence({**drill(), "requested": [], "scenarios": scenarios}, FINISHED)
    assert nothing["verdict"] == "failed" and nothing["failures"] == ["no scenario was asked for"]
    asked = evidence({**drill(), "requested": ["latest"], "scenarios": scenarios}, FINISHED)
    assert asked["failures"] == ["latest: did not run"]


def test_empty_input_has_failed() -> None:
    assert evidence({}, FINISHED)["verdict"] == "failed"


def test_scenario_nobody_asked_for_counts_when_it_failed() -> None:
    raw = drill("time", "xid", requested=["time"])
    del raw["scenarios"][1]["recovery"]
    assert evidence(raw, FINISHED)["verdict"] == "failed"


def test_error_outside_of_the_scenarios_is_a_failure_even_when_all_passed() -> None:
    document = evidence({**drill("latest"), "error": "no space", "failed_task": "Truth"}, FINISHED)
    assert document["verdict"] == "failed"
    assert document["failures"] == ["Truth: no space"]


def test_error_of_a_scenario_is_told_once() -> None:
    raw = drill("latest")
    raw["scenarios"][0] |= {"error": "no space", "failed_task": "Restore"}
    raw |= {"error": "no space", "failed_task": "Restore"}
    assert evidence(raw, FINISHED)["failures"] == ["latest: Restore: no space"]


def test_figures_of_a_scenario_are_those_of_its_tasks() -> None:
    item = scenario(good())
    assert item["rto_seconds"] == 12.345
    assert item["rpo"] == {"transactions": 0, "seconds": 0.0}
    assert item["phases"] == [
        {"name": "stop", "seconds": 0.5},
        {"name": "restore", "seconds": 3.25},
        {"name": "start", "seconds": 0.75},
        {"name": "replay", "seconds": 2.0},
        {"name": "check", "seconds": 1.5},
        {"name": "compare", "seconds": 1.25},
    ]
    assert item["wal"]["segments"] == 8 and item["wal"]["last_segment"].endswith("9")
    assert (item["target"], item["backup"], item["timeline"]) == ("latest", "20260301T110000Z-full", 2)
    assert item["fingerprint"] == "f00d"
    assert item["refusals"] == [] and item["differences"] == []
    assert item["status"] == {"expected": good()["expected"], "found": {"sequence": 7, "phase": "end"}}


def test_task_that_was_skipped_is_no_phase() -> None:
    raw = good("xid")
    raw["dump"] = {"skipped": True, "changed": False, "seconds": 1}
    assert "compare" not in [phase["name"] for phase in scenario(raw)["phases"]]
    assert {key for key, _name in _STEPS} >= {"stop", "restore", "start", "recovery", "check", "dump"}


@pytest.mark.parametrize(("found", "lost"), [(7, 0), (5, 2), (0, 7), (9, 0)])
def test_lost_transactions_are_counted_and_never_called_none_unless_none(found: int, lost: int) -> None:
    raw = good()
    raw["check"]["status"]["sequence"] = found
    rpo = scenario(raw)["rpo"]
    assert rpo["transactions"] == lost
    assert rpo["seconds"] == (0.0 if lost == 0 else None)


def test_what_was_not_measured_is_none_and_not_zero() -> None:
    item = scenario({"name": "xid", "error": "broken"})
    assert item["rto_seconds"] is None
    assert item["rpo"] == {"transactions": None, "seconds": None}
    assert item["reached"] is None and item["backup"] is None and item["phases"] == []
    for key in ("stop", "recovery"):
        raw = good()
        del raw[key]
        assert scenario(raw)["rto_seconds"] is None


def test_refused_restore_keeps_its_reasons_and_what_was_asked() -> None:
    refusals = [{"code": "archive_gap", "message": "a hole", "nearest": ""}]
    item = scenario({"name": "xid", "error": "a hole", "target": {"recovery_target_xid": "7"}, "refusals": refusals})
    assert item["refusals"] == refusals and item["target"] == {"recovery_target_xid": "7"}


def test_times_of_the_document_are_utc() -> None:
    document = evidence(drill("latest"), FINISHED)
    assert document["finished_at"] == "2026-03-01T12:00:00.123+00:00"
    assert document["phases"] == [{"name": "backup", "seconds": 4.5}]


def test_document_says_what_was_drilled() -> None:
    document = evidence({**drill("latest"), "old_pgdata": "/data.old", "advice": "Read."}, FINISHED)
    assert document["load"] == {"scale": 10} and document["started_at"] == "2026-03-01T11:00:00+00:00"
    assert (document["cluster"], document["system_identifier"], document["postgresql_version"]) == (
        "main",
        "73",
        "18.6",
    )
    assert (document["old_pgdata"], document["advice"]) == ("/data.old", "Read.")
    nothing = evidence({}, FINISHED)
    assert (nothing["load"], nothing["old_pgdata"], nothing["advice"]) == ({}, "", "")


def test_error_of_a_drill_without_a_task_is_the_drills() -> None:
    assert evidence({"requested": ["xid"], "error": "broken"}, FINISHED)["failures"] == [
        "the drill: broken",
        "xid: did not run",
    ]


def test_input_is_not_changed() -> None:
    raw = drill("time", "latest")
    before = copy.deepcopy(raw)
    evidence(raw, FINISHED)
    assert raw == before


def shown(raw: Raw) -> str:
    return "\n".join(summary(evidence(raw, FINISHED), "/evidence/x"))


def test_summary_of_a_pass_holds_the_figures() -> None:
    text = shown(drill("latest"))
    for part in (
        "cluster main, PostgreSQL 18.6",
        "latest     PASSED",
        "asked      latest",
        "reached    no recovery target specified, LSN 0/9000060, timeline 2",
        "from       20260301T110000Z-full, 8 segments of WAL (128 MiB)",
        "status row 'end', expected 'end'",
        "stop 0.5  restore 3.2  start 0.8  replay 2.0  check 1.5  compare 1.2",
        "usable again after 12.3",
        "tolerated  app: sequence s: up to 32 values ahead",
        "before the disaster, seconds: backup 4.5",
        "Evidence: /evidence/x/evidence.json",
    ):
        assert part in text
    assert text.rstrip().endswith("PASSED") and "FAILED" not in text
    assert "old data directory" not in text and "None" not in text


def test_summary_of_a_failure_names_reasons_differences_and_the_old_directory() -> None:
    raw = drill("latest", requested=["latest", "xid"])
    raw["scenarios"][0]["dump"] = {
        "identical": False,
        "difference_count": 7,
        "differences": [
            {
                "database": "app",
                "object": f"table t{n}",
                "kind": "changed",
                "line": 9,
                "truth": "1\ta",
                "restored": "1\tb",
            }
            for n in range(7)
        ],
    }
    raw |= {"old_pgdata": "/data.old-20260301", "advice": "Read the log."}
    text = shown(raw)
    for part in (
        "latest     FAILED",
        "DIFFERENT  app: table t0: changed, line 9",
        "truth    1\ta",
        "restored 1\tb",
        "FAILED     latest: the restored cluster differs from the original in 7 objects",
        "FAILED     xid: did not run",
        "The old data directory: /data.old-20260301",
        "Read the log.",
    ):
        assert part in text
    assert "table t4" in text and "table t5" not in text
    assert text.rstrip().endswith("FAILED") and "PASSED" not in text


def test_summary_of_a_drill_that_broke_early_is_shown_too() -> None:
    raw = {**drill(), "requested": ["latest"], "error": "no backup", "failed_task": "Preflight"}
    raw["scenarios"] = [{"name": "latest", "error": "no backup", "failed_task": "Restore"}]
    text = shown(raw)
    assert "FAILED     latest: Restore: no backup" in text and "usable again after -" in text
    for part in ("asked      -", "reached    -, LSN -, timeline -", "from       -, 0 segments of WAL (-)"):
        assert part in text
    assert text.rstrip().endswith("FAILED")


def test_evidence_is_written_and_the_link_follows(tmp_path: Path) -> None:
    for name in ("first", "second"):
        document = evidence(drill("latest"), FINISHED)
        paths = write(document, str(tmp_path / "evidence" / name))
        assert json.loads(Path(paths["json"]).read_text()) == document
        assert os.readlink(tmp_path / "evidence" / "latest") == name
    assert sorted(os.listdir(tmp_path / "evidence")) == ["first", "latest", "second"]
    assert (tmp_path / "evidence" / "latest" / "evidence.json").stat().st_mode & 0o777 == 0o644


def test_directory_called_latest_is_not_replaced_by_a_link(tmp_path: Path) -> None:
    (tmp_path / "latest").mkdir()
    write(evidence(drill("latest"), FINISHED), str(tmp_path / "x"))
    assert not (tmp_path / "latest").is_symlink()
