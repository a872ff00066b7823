# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Where the server's log is, and which of its lines are proof of a recovery that has stopped."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils import serverlog

STOP = 'recovery stopping at restore point "a ""b", time 2026-03-01 12:00:00+00'
START = "starting PostgreSQL 18.6 on x86_64"
OTHER = "database system is ready to accept read-only connections"


def line(message: str, kind: str = "stderr") -> str:
    if kind == "jsonlog":
        return json.dumps({"timestamp": "2026-03-01 12:00:00 UTC", "message": message}) + "\n"
    if kind == "csvlog":
        quoted = message.replace('"', '""')
        return "2026-03-01 12:00:00 UTC,,,7,,69a4,1,,2026-03-01,,0,LOG,00000," + f'"{quoted}",,,,,,,,,"","startup",,0\n'
    return f"2026-03-01 12:00:00 UTC [7] LOG:  {message}\n"


@pytest.mark.parametrize("kind", ["stderr", "csvlog", "jsonlog"])
def test_last_stop_is_read_from_the_collectors_file_and_from_rotated_ones(tmp_path: Path, kind: str) -> None:
    (tmp_path / "log").mkdir()
    suffix = {"stderr": "log", "csvlog": "csv", "jsonlog": "json"}[kind]
    old, new = (tmp_path / "log" / f"{name}.{suffix}" for name in ("z", "a"))
    (tmp_path / "current_logfiles").write_text(f"{kind} log/a.{suffix}\n")
    given = tmp_path / "given"
    # What the server was started with is not the log of this run.
    given.write_text(line(START) + line("recovery stopping after reaching consistency"))
    old.write_text(line(START, kind) + line(STOP, kind) + line(OTHER, kind) * 9)
    new.write_text(line(OTHER, kind))
    os.utime(old, (1, 1))
    assert serverlog.last_stop(str(tmp_path), str(given)) == STOP
    # A start that came later: that run has not stopped anywhere yet.
    new.write_text(line(START, kind) + line(OTHER, kind))
    assert serverlog.last_stop(str(tmp_path), str(given)) == ""
    new.write_text("")
    assert serverlog.last_stop(str(tmp_path), str(given)) == STOP
    assert serverlog.readable(str(tmp_path), str(given)) == [str(new)]


@pytest.mark.parametrize("later", serverlog.STARTED)
def test_log_of_an_earlier_run_is_no_proof(tmp_path: Path, later: str) -> None:
    log = tmp_path / "log"
    log.write_text(line(START) + line(STOP))
    assert serverlog.last_stop(str(tmp_path), str(log)) == STOP
    log.write_text(line(START) + line(STOP) + line(later + "18 to process"))
    assert serverlog.last_stop(str(tmp_path), str(log)) == ""
    assert serverlog.last_stop(str(tmp_path), str(tmp_path / "none")) == ""
    assert serverlog.last_stop(str(tmp_path), "") == ""


def test_proof_is_found_however_much_was_logged_since(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(line(START) + line(STOP) + line(OTHER) * 20_000)
    assert serverlog.last_stop(str(tmp_path), str(log)) == STOP


@pytest.mark.parametrize(
    "text",
    [
        line(f"statement: SELECT '{STOP}'"),
        line("statement: SELECT '") + f"\tLOG:  {STOP}\n",
        f"2026-03-01 [7] STATEMENT:  {STOP}\n",
    ],
)
def test_words_of_somebody_else_are_no_proof(tmp_path: Path, text: str) -> None:
    log = tmp_path / "log"
    log.write_text(line(START) + text)
    assert serverlog.last_stop(str(tmp_path), str(log)) == ""
    # And they do not hide what is proof.
    log.write_text(line(START) + line(STOP) + text)
    assert serverlog.last_stop(str(tmp_path), str(log)) == STOP
