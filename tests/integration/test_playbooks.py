# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The playbooks as a user runs them: real ansible-playbook, the sandbox inventory, a real server.

Few and wide, because a task costs a third of a second.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.pgdrill.pitr.plugins.module_utils.postgres import running_pid
from ansible_collections.pgdrill.pitr.tests.integration.support import (
    SEGMENT_SIZE,
    Identity,
    Server,
    cut,
    fingerprint,
    flip,
    until,
)

CHECKOUT = Path(__file__).resolve().parents[2]
# Small segments, so that a small load has a middle.
SMALL = {
    "primary_initdb_options": [
        "--username=postgres",
        "--auth-local=trust",
        "--auth-host=scram-sha-256",
        "--encoding=UTF8",
        "--locale=C",
        "--data-checksums",
        "--wal-segsize=1",
        "--no-sync",
    ],
    "repository_wal_segment_size": SEGMENT_SIZE,
    "drill_scale": 1,
    "drill_transactions": 50,
}


class Site:
    """A sandbox of its own for the inventory ``inventories/sandbox``."""

    def __init__(self, bin_dir: str, major: int, directory: Path) -> None:
        self.directory = directory
        self.run_dir = directory / "run"
        self.run_dir.mkdir()
        self.repository = self.run_dir / "repository"
        self.server = Server(bin_dir, self.run_dir / "primary" / "data")
        self.server.log = self.run_dir / "primary" / "postgresql.log"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        # The inventory gives the server this port on its socket, too.
        self.server.PORT = self.port
        values = {
            "directory": str(self.run_dir),
            "socket_dir": self.server.socket,
            "user": "nobody",
            "become": False,
            "python": sys.executable,
            "bin_dir": bin_dir,
            "postgresql_version": major,
            "port_base": self.port,
            "password": "not a secret",
        }
        (directory / "sandbox.yml").write_text(yaml.safe_dump(values), encoding="utf-8")
        self.tmp = Path(tempfile.mkdtemp(prefix="a"))
        collections = os.environ.get("ANSIBLE_COLLECTIONS_PATH") or str(CHECKOUT / ".sandbox" / "collections")
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("PG")},
            "PGDRILL_SANDBOX": str(directory),
            "ANSIBLE_CONFIG": str(CHECKOUT / "ansible.cfg"),
            "ANSIBLE_COLLECTIONS_PATH": collections,
            "ANSIBLE_HOME": str(self.tmp / "home"),
            "ANSIBLE_REMOTE_TMP": str(self.tmp),
            "ANSIBLE_SYSTEM_TMPDIRS": str(self.tmp),
            "ANSIBLE_ASYNC_DIR": str(self.tmp / "async"),
            "LC_ALL": "C.UTF-8",
        }
        self.evidence_dir = directory / "evidence" / "none"

    def play(self, name: str, *arguments: str, **variables: Any) -> subprocess.CompletedProcess[str]:
        """Run a playbook, whatever its exit code; output and errors are one text."""
        self.evidence_dir = self.directory / "evidence" / str(time.monotonic_ns())
        extra = {**SMALL, "drill_evidence_dir": str(self.evidence_dir), **variables}
        argv = [sys.executable, str(Path(sys.executable).parent / "ansible-playbook"), "-i", "inventories/sandbox"]
        argv += [f"playbooks/{name}.yml", "-e", json.dumps(extra), *arguments]
        return subprocess.run(
            argv, cwd=CHECKOUT, env=self.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, check=False, timeout=300,
        )  # fmt: skip

    def succeed(self, name: str, *arguments: str, **variables: Any) -> str:
        result = self.play(name, *arguments, **variables)
        assert result.returncode == 0, result.stdout
        return result.stdout

    def fail(self, name: str, *arguments: str, **variables: Any) -> str:
        result = self.play(name, *arguments, **variables)
        assert result.returncode != 0, result.stdout
        return result.stdout

    @property
    def evidence(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads((self.evidence_dir / "evidence.json").read_text(encoding="utf-8"))
        return document

    @property
    def identity(self) -> tuple[str, int, str]:
        """Which server runs: it was neither replaced nor stopped in between when this has not changed."""
        pid = running_pid(str(self.server.data))
        assert pid is not None, "no server is running"
        return self.server.system_identifier, pid, str(self.server.value("SELECT pg_postmaster_start_time()::text"))

    def segments(self) -> list[Path]:
        return sorted(path for path in self.repository.glob("main/archive/*/*/*") if len(path.name) == 24)

    def close(self) -> None:
        self.server.close()
        shutil.rmtree(self.tmp, ignore_errors=True)


def _changed(output: str) -> dict[str, int]:
    """How much was changed on every host, from the recap."""
    found = dict(re.findall(r"^(\S+)\s+: ok=\d+\s+changed=(\d+)", output, re.MULTILINE))
    assert found, output
    return {host: int(count) for host, count in found.items()}


@pytest.fixture
def fresh(bin_dir: str, major: int, tmp_path: Path) -> Iterator[Site]:
    """A sandbox in which nothing has been done yet."""
    site = Site(bin_dir, major, tmp_path)
    try:
        yield site
    finally:
        site.close()


@pytest.fixture(scope="module")
def site(bin_dir: str, major: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A sandbox after site.yml. Tests leave its server running."""
    site = Site(bin_dir, major, tmp_path_factory.mktemp("site"))
    try:
        site.succeed("site")
        yield site
    finally:
        site.close()


def test_site_is_honest_in_check_mode_and_changes_nothing_the_second_time(fresh: Site) -> None:
    before = fingerprint(fresh.run_dir)
    fresh.succeed("site", "--check")
    assert fingerprint(fresh.run_dir) == before
    assert sum(_changed(fresh.succeed("site")).values()) > 5
    identity = fresh.identity
    assert list(fresh.repository.glob("main/backups/*/backup.json"))
    assert set(_changed(fresh.succeed("site")).values()) == {0}
    assert set(_changed(fresh.succeed("site", "--check")).values()) == {0}
    assert fresh.identity == identity
    assert "recovery_windows" in fresh.succeed("status")
    # The settings are really in force, and the role that takes backups is no superuser.
    assert fresh.server.show("archive_mode") == "on"
    assert fresh.server.value("SELECT rolsuper FROM pg_roles WHERE rolname = 'pitr_backup'") is False
    fresh.succeed("backup")
    assert len(list(fresh.repository.glob("main/backups/*/backup.json"))) == 2


@pytest.mark.once
def test_retention_after_a_backup_only_with_a_policy_and_every_backup_is_verified(fresh: Site) -> None:
    def labels() -> list[str]:
        return sorted(path.parent.name for path in fresh.repository.glob("main/backups/*/backup.json"))

    fresh.succeed("site")
    fresh.succeed("backup")
    fresh.succeed("verify", backup_to_verify="all")
    before = fingerprint(fresh.repository)
    # Without a policy nothing goes, and in check mode nothing either.
    assert not _changed(fresh.succeed("expire")).get("repository")
    shown = fresh.succeed("expire", "--check", "--diff", backup_keep_full=1)
    assert f"-backup {labels()[0]}" in shown and f"-backup {labels()[1]}" not in shown
    assert {name: at for name, at in fingerprint(fresh.repository).items() if "/locks" not in name} == {
        name: at for name, at in before.items() if "/locks" not in name
    }
    older = labels()
    fresh.succeed("backup", backup_keep_full=1, backup_recovery_window="1 min")
    # Those of the last minute are within the window.
    assert labels()[:2] == older
    fresh.succeed("backup", backup_keep_full=1)
    assert len(labels()) == 1 and labels()[0] not in older
    assert not any(_changed(fresh.succeed("expire", backup_keep_full=1)).values())
    fresh.succeed("verify")
    assert "Write it with units" in fresh.fail("expire", backup_recovery_window="7")
    assert "missing_for_backups" in fresh.succeed("status")


@pytest.mark.once
def test_incremental_backups_by_a_variable(fresh: Site, major: int) -> None:
    fresh.succeed("site", backup_type="incremental")
    if major < 17:
        assert f"PostgreSQL {major} takes no incremental backups" in fresh.fail("backup", backup_type="incremental")
    else:
        assert fresh.server.show("summarize_wal") == "on"
        assert "is the newest backup that it can build upon" in fresh.succeed("backup", backup_type="incremental")
        assert "incremental backups (max_chain)" in fresh.succeed(
            "backup", "--check", backup_type="auto", backup_max_chain=1
        )
        fresh.succeed("verify")
    shown = fresh.succeed("backup", backup_type="auto")
    suffix = "full" if major < 17 else "incr"
    labels = sorted(path.parent.name for path in fresh.repository.glob("main/backups/*/backup.json"))
    assert labels[-1].endswith(suffix) and labels[-1] in shown


@pytest.mark.once
def test_nothing_is_destroyed_without_the_right_word(site: Site, tmp_path: Path) -> None:
    identity, files = site.identity, fingerprint(site.repository)
    for confirmation in ("wrong", ""):
        output = site.fail("drill", drill_confirm=confirmation)
        assert "drill_confirm=main" in output
        assert not site.evidence_dir.exists()
        assert site.identity == identity
    assert "running" in site.fail("restore", restore_confirm="main", restore_force=True)
    elsewhere = tmp_path / "elsewhere"
    output = site.succeed("restore", "--check", pitr_pgdata=str(elsewhere))
    assert "consistent  at " in output and "target      " in output
    assert "restore_confirm=main" in site.fail("restore", pitr_pgdata=str(elsewhere))
    for variables, code in (
        ({"restore_target_time": "2026-01-01 00:00:00+00"}, "target_before_first_backup"),
        ({"restore_target_time": "2026-01-01 00:00:00"}, "offset"),
        ({"pitr_cluster": "other"}, "no cluster"),
    ):
        assert code in site.fail("restore", pitr_pgdata=str(elsewhere), restore_confirm="main", **variables)
    assert not elsewhere.exists()
    assert site.identity == identity
    assert fingerprint(site.repository) == files


def test_drill_of_all_six_scenarios_passes_and_says_so(site: Site) -> None:
    output = site.succeed("drill")
    evidence = site.evidence
    assert evidence["verdict"] == "passed" and evidence["failures"] == []
    assert [item["name"] for item in evidence["scenarios"]] == ["time", "xid", "lsn", "name", "immediate", "latest"]
    for item in evidence["scenarios"]:
        assert item["verdict"] == "passed"
        assert item["status"]["found"] == item["status"]["expected"]
        assert item["backup"] and item["target"] and item["reached"]["lsn"] and item["timeline"] > 1
        assert item["amcheck"]["ok"]
        assert item["rto_seconds"] > 0 and item["rpo"] == {"transactions": 0, "seconds": 0.0}
        assert {"stop", "restore", "start", "replay", "check"} <= {phase["name"] for phase in item["phases"]}
        assert item["differences"] == [] and item["refusals"] == []
    for key in ("cluster", "postgresql_version", "started_at", "finished_at", "phases", "system_identifier"):
        assert evidence[key], key
    assert (site.evidence_dir.parent / "latest").resolve() == site.evidence_dir.resolve()
    assert "PASSED" in output and str(site.evidence_dir) in output
    # The restored cluster is the primary now, archives on its own timeline, and nothing is left lying about.
    assert site.server.system_identifier == evidence["system_identifier"]
    assert sorted(path.name for path in (site.run_dir / "primary").iterdir()) == ["data", "pitr", "postgresql.log"]
    assert not list(site.server.data.rglob("*pitr-recovery*"))
    assert not site.server.value("SELECT pg_is_in_recovery()")
    assert set(_changed(site.succeed("site")).values()) == {0}


class Saboteur(threading.Thread):
    """Waits until the drill's load is being archived, and breaks something behind its back."""

    def __init__(self, site: Site, damage: Callable[[Sequence[Path]], Path]) -> None:
        super().__init__(daemon=True)
        self._site = site
        self._damage = damage
        self._known = set(site.segments())
        self._status = site.run_dir / "primary" / "data" / "pg_wal" / "archive_status"
        self._over = threading.Event()
        self.damaged: Path | None = None

    def run(self) -> None:
        while not self._over.is_set():
            new = [path for path in self._site.segments() if path not in self._known]
            # As long as the server asks for it, what is deleted is archived once more.
            if len(new) >= 7 and not (self._status / f"{new[3].name}.ready").exists():
                self.damaged = self._damage(new)
                return
            time.sleep(0.02)

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        self.start()
        try:
            yield
        finally:
            self._over.set()
            self.join(timeout=30)


@pytest.mark.once
def test_drill_on_a_damaged_archive_fails_by_name_and_the_original_is_back(site: Site) -> None:
    site.server.sql("CREATE TABLE IF NOT EXISTS precious AS SELECT 42 AS v")
    aside = site.directory / "aside"

    def delete_middle(new: Sequence[Path]) -> Path:
        shutil.move(new[3], aside)
        return new[3]

    def cut_middle(new: Sequence[Path]) -> Path:
        shutil.copy2(new[3], aside)
        cut(new[3])
        return new[3]

    def newest_base() -> Path:
        return max(site.repository.glob("main/backups/*/base.tar*"), key=lambda path: path.stat().st_mtime)

    def flip_base(_new: Sequence[Path]) -> Path:
        path = newest_base()
        shutil.copy2(path, aside)
        flip(path, path.stat().st_size // 2)
        return path

    def cut_every_base(_new: Sequence[Path]) -> Path:
        for path in site.repository.glob("main/backups/*/base.tar*"):
            cut(path)
        return newest_base()

    for damage in (delete_middle, cut_middle, flip_base, cut_every_base):
        before = site.server.system_identifier
        saboteur = Saboteur(site, damage)
        with saboteur.at_work():
            output = site.fail("drill", drill_scenarios=["latest"])
        assert saboteur.damaged is not None, output
        assert saboteur.damaged.name in output, (damage, output)
        evidence = site.evidence
        assert evidence["verdict"] == "failed"
        assert saboteur.damaged.name in json.dumps(evidence), evidence
        assert "FAILED" in output
        # The original is back in its place, and runs.
        assert site.server.system_identifier == before
        assert site.server.value("SELECT v FROM precious") == 42
        for path in (site.run_dir / "primary").glob("data.*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if aside.exists():
            # As it was: the next fault shall be found by itself.
            shutil.move(aside, saboteur.damaged)


@pytest.mark.once
def test_restore_in_place_to_a_point_in_time(fresh: Site) -> None:
    fresh.succeed("site")
    server = fresh.server
    server.sql("CREATE TABLE status AS SELECT 'good'::text AS phase")
    server.sql("SELECT pg_create_restore_point('before the mistake')")
    server.sql("UPDATE status SET phase = 'mistake'")
    server.sql("SELECT pg_switch_wal()")
    server.stop()
    identifier = server.system_identifier
    # As text, which is what -e restore_accept=true makes of it.
    variables = {"restore_target_name": "before the mistake", "restore_force": "true", "restore_accept": "true"}
    files = fingerprint(fresh.run_dir / "primary", fresh.repository)
    fresh.succeed("restore", "--check", **variables)
    assert fingerprint(fresh.run_dir / "primary", fresh.repository) == files
    output = fresh.succeed("restore", restore_confirm="main", **variables)
    assert "before the mistake" in output
    assert (server.phase, server.system_identifier) == ("good", identifier)
    assert len(list((fresh.run_dir / "primary").glob("data.old-*"))) == 1
    until(lambda: list(fresh.repository.glob("main/archive/*/00000002.history")), "the history file in the archive")
    assert set(_changed(fresh.succeed("site")).values()) == {0}


@pytest.mark.once
def test_encryption_is_turned_on_by_a_variable_and_a_restore_wants_the_key(fresh: Site, tmp_path: Path) -> None:
    key, other = Identity(tmp_path / "key"), Identity(tmp_path / "other")
    secret = key.secrets[0].decode()
    output = fresh.fail("site", repository_encryption_recipients=[key.public, secret])
    assert "holds a private key" in output and secret not in output
    assert not fresh.repository.exists()
    recipients = {"repository_encryption_recipients": [key.public]}
    assert sum(_changed(fresh.succeed("site", **recipients)).values()) > 5
    assert set(_changed(fresh.succeed("site", **recipients)).values()) == {0}
    # Not named is not ended.
    assert set(_changed(fresh.succeed("site")).values()) == {0}
    document = fresh.repository / "main" / "cluster.json"
    before = document.read_bytes()
    both = {"repository_encryption_recipients": [other.public, key.public]}
    shown = fresh.succeed("site", "--check", "--diff", **both)
    assert _changed(shown)["repository"] == 1 and f"+recipient {other.public}" in shown
    assert document.read_bytes() == before
    assert _changed(fresh.succeed("site", **both))["repository"] == 1
    assert set(_changed(fresh.succeed("site", **both)).values()) == {0}
    fresh.server.sql("CREATE TABLE status AS SELECT 'encrypted'::text AS phase")
    fresh.server.sql("SELECT pg_switch_wal()")
    assert "no identity" in fresh.succeed("status")
    fresh.server.stop()
    files = fingerprint(fresh.run_dir / "primary", fresh.repository)
    confirmed = {"restore_confirm": "main", "restore_force": True}
    refused = fresh.fail("restore", **confirmed)
    assert "identity_missing" in refused and key.public in refused
    assert "identity_wrong" in fresh.fail("restore", **confirmed, restore_identity=str(other.path))
    assert fingerprint(fresh.run_dir / "primary", fresh.repository) == files
    output = fresh.succeed("restore", "-vvv", **confirmed, restore_identity=str(key.path))
    assert fresh.server.phase == "encrypted" and secret not in output
    trees = [path for path in fresh.run_dir.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]
    assert trees == []
