# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The load of a drill: a database of its own, pgbench, and one status row that is rewritten around every recovery
target.

The row is the proof of exactness: after a restore to a target it must be the one written just before that target,
neither older nor newer. Marks are made while pgbench is running, so that the target lies in the middle of other
transactions.
"""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .errors import PitrError
from .postgres import Login, binary, query, run
from .target import format_time

SCENARIOS = ("time", "xid", "lsn", "name", "immediate", "latest")
COMMENT = "pgdrill.pitr: made by a drill, removed by the next one"
STATUS = "pitr_status"
# Between the clock reading of a time target and the commits around it; a commit's time has microseconds.
TICK = 0.01


@dataclass(frozen=True)
class Mark:
    """A recovery target in the load, as options of the module ``restore``, and the status row expected there."""

    scenario: str
    options: dict[str, Any]
    sequence: int
    phase: str

    def to_dict(self) -> dict[str, Any]:
        """For a module's result."""
        return {
            "scenario": self.scenario,
            "options": self.options,
            "expected": {"sequence": self.sequence, "phase": self.phase},
        }


class Load:
    """The drill's database."""

    def __init__(self, login: Login, bin_dir: str, database: str) -> None:
        self._login = login
        self._bin_dir = bin_dir
        self._database = database
        self._sequence = 0

    def prepare(self) -> None:
        """Make the database with the status row ``base``. Replaces one that an earlier drill made, and no other."""
        with contextlib.closing(self._login.connect()) as connection:
            quoted = '"' + self._database.replace('"', '""') + '"'
            found = query(
                connection,
                "SELECT shobj_description(oid, 'pg_database') FROM pg_database WHERE datname = %s",
                (self._database,),
            )
            if found:
                if found[0][0] != COMMENT:
                    raise PitrError(
                        f"The database '{self._database}' exists and was not made by a drill. Nothing was changed."
                        " Give the drill another one with drill_database."
                    )
                query(connection, f"DROP DATABASE {quoted}")
            query(connection, f"CREATE DATABASE {quoted}")
            query(connection, f"COMMENT ON DATABASE {quoted} IS %s", (COMMENT,))
        with contextlib.closing(self._login.connect(self._database)) as connection:
            query(
                connection, f"CREATE TABLE {STATUS} (id int PRIMARY KEY, sequence bigint NOT NULL, phase text NOT NULL)"
            )
            query(connection, f"INSERT INTO {STATUS} VALUES (1, 0, 'base')")

    def run(
        self, scenarios: Sequence[str], scale: int, clients: int, jobs: int, transactions: int, name: str
    ) -> list[Mark]:
        """Load and mark. ``name``: what the restore point is called. Raises PitrError when pgbench fails."""
        unknown = sorted(set(scenarios) - set(SCENARIOS))
        if unknown:
            raise PitrError(f"Unknown scenario {', '.join(unknown)}. There are {', '.join(SCENARIOS)}.")
        pgbench = binary(self._bin_dir, "pgbench")
        marks = []
        with (
            self._login.environment() as environment,
            contextlib.closing(self._login.connect(self._database)) as connection,
        ):
            self._advance(connection, "load")
            run([pgbench, "-i", "-q", "-s", str(scale), self._database], environment)
            argv = [pgbench, "-n", "-c", str(clients), "-j", str(jobs), "-t", str(transactions), self._database]
            with tempfile.TemporaryFile() as output:
                process = subprocess.Popen(
                    argv, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
                )
                try:
                    for scenario in scenarios:
                        if scenario in ("time", "xid", "lsn", "name"):
                            marks.append(self._mark(connection, scenario, name))
                    process.wait()
                except BaseException:
                    process.terminate()
                    process.wait()
                    raise
                output.seek(0)
                said = output.read().decode(errors="replace")
            if process.returncode != 0:
                raise PitrError(f"pgbench failed with exit code {process.returncode}: {said[-1500:].strip()}")
            self._advance(connection, "end")
        if "immediate" in scenarios:
            marks.append(Mark("immediate", {"recovery_target": "immediate"}, 0, "base"))
        if "latest" in scenarios:
            marks.append(Mark("latest", {}, self._sequence, "end"))
        return sorted(marks, key=lambda mark: SCENARIOS.index(mark.scenario))

    def _advance(self, connection: Any, phase: str) -> int:
        """Rewrite the row in a transaction of its own; returns its transaction id."""
        self._sequence += 1
        sql = f"UPDATE {STATUS} SET sequence = %s, phase = %s WHERE id = 1 RETURNING pg_current_xact_id()::text::bigint"
        return int(query(connection, sql, (self._sequence, phase))[0][0])

    def _mark(self, connection: Any, scenario: str, name: str) -> Mark:
        xid = self._advance(connection, f"before {scenario}")
        sequence = self._sequence
        options: dict[str, Any]
        if scenario == "time":
            time.sleep(TICK)
            options = {"recovery_target_time": format_time(query(connection, "SELECT clock_timestamp()")[0][0])}
            time.sleep(TICK)
        elif scenario == "xid":
            options = {"recovery_target_xid": str(xid)}
        elif scenario == "lsn":
            # Inclusive would replay one record more than there was at this position.
            lsn = query(connection, "SELECT pg_current_wal_insert_lsn()::text")[0][0]
            options = {"recovery_target_lsn": lsn, "recovery_target_inclusive": False}
        else:
            query(connection, "SELECT pg_create_restore_point(%s)", (name,))
            options = {"recovery_target_name": name}
        self._advance(connection, f"after {scenario}")
        return Mark(scenario, options, sequence, f"before {scenario}")


def check(login: Login, bin_dir: str, database: str, amcheck_wanted: bool, jobs: int) -> dict[str, Any]:
    """What a restored cluster holds: the status row, and what :func:`amcheck` finds.

    Raises PitrError when there is no connection, or pg_amcheck cannot do its work.
    """
    with contextlib.closing(login.connect(database)) as connection:
        rows = query(connection, f"SELECT sequence, phase FROM {STATUS} WHERE id = 1")
    result: dict[str, Any] = {"status": {"sequence": int(rows[0][0]), "phase": rows[0][1]} if rows else {}}
    if amcheck_wanted:
        result["amcheck"] = amcheck(login, bin_dir, jobs)
    return result


def amcheck(login: Login, bin_dir: str, jobs: int) -> dict[str, Any]:
    """Read every heap and B-tree index of every database. ``findings`` are pg_amcheck's, empty when all is well.

    Raises PitrError when there is no connection, or pg_amcheck cannot do its work.
    """
    with contextlib.closing(login.connect()) as connection:
        databases = [row[0] for row in query(connection, "SELECT datname FROM pg_database WHERE datallowconn")]
    argv = [binary(bin_dir, "pg_amcheck"), "--all", "--heapallindexed", "--install-missing", f"--jobs={jobs}"]
    with login.environment() as environment:
        environment.pop("PGDATABASE", None)
        # Exit code 2 is "corruption found"; its description is on standard output.
        process = subprocess.run(
            argv,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )
    findings = process.stdout.decode(errors="replace").strip()
    said = process.stderr.decode(errors="replace").strip()
    if process.returncode not in (0, 2):
        raise PitrError(f"pg_amcheck failed with exit code {process.returncode}: {(said or findings)[-2000:]}")
    if process.returncode == 2 and not findings:
        findings = said or "corruption was reported without a description"
    return {"ok": process.returncode == 0, "databases": databases, "findings": findings[:4000]}
