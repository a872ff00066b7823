# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The command pitr: installed whole, its secret for its user alone, and every failure an exit code and a sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils import maintenance
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.plugins.module_utils.maintenance_install import install, remove_monitoring
from ansible_collections.pgdrill.pitr.plugins.module_utils.maintenance_settings import Settings, read_settings
from ansible_collections.pgdrill.pitr.plugins.module_utils.status import Settings as StatusSettings
from ansible_collections.pgdrill.pitr.tests.unit.support import interpreters, make_repository

CLUSTER = "main"


def settings(tmp_path: Path) -> Settings:
    return Settings(repository=str(tmp_path / "repository"), bin_dir="/nowhere/bin", login_host="db1")


def run(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(directory / "pitr"), *arguments], capture_output=True, text=True, check=False)


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    directory = tmp_path / "a place"
    install(str(directory), CLUSTER, settings(tmp_path), r"pass:wo\rd", sys.executable)
    return directory


def test_second_installation_writes_nothing(tmp_path: Path, installed: Path) -> None:
    assert install(str(installed), CLUSTER, settings(tmp_path), r"pass:wo\rd", sys.executable) == []


def test_check_mode_writes_nothing_and_tells_what_it_would(tmp_path: Path) -> None:
    written = install(str(tmp_path / "there"), CLUSTER, settings(tmp_path), "x", sys.executable, check=True)
    assert str(tmp_path / "there" / "pitr") in written and not (tmp_path / "there").exists()


def test_password_is_escaped_for_libpq_and_for_its_user_alone(installed: Path) -> None:
    passfile = installed / "maintenance" / "main.pgpass"
    assert passfile.read_text(encoding="utf-8") == "*:*:*:*:pass\\:wo\\\\rd\n"
    assert passfile.stat().st_mode & 0o777 == 0o600
    assert passfile.parent.stat().st_mode & 0o777 == 0o700
    with_secret = [
        p for p in installed.rglob("*") if p.is_file() and b"pass" in p.read_bytes() and b"wo\\" in p.read_bytes()
    ]
    assert with_secret == [passfile]


def test_nothing_is_installed_that_others_may_change(installed: Path) -> None:
    assert [path for path in installed.rglob("*") if path.stat().st_mode & 0o022] == []


def test_everything_that_the_command_imports_is_installed(installed: Path) -> None:
    answer = run(installed, "expire", CLUSTER)
    # It came as far as the repository, which is not there.
    assert answer.returncode == 1 and "Traceback" not in answer.stderr and "repository" in answer.stderr


@pytest.mark.parametrize("arguments", [[], ["backup"], ["restore", "main"], ["backup", "main", "all"], ["--help"]])
def test_wrong_use_ends_with_two_and_the_usage(installed: Path, arguments: list[str]) -> None:
    answer = run(installed, *arguments)
    assert answer.returncode == 2 and answer.stderr.startswith("usage: pitr")


def test_cluster_without_settings_is_told_by_path(installed: Path) -> None:
    answer = run(installed, "backup", "other")
    assert answer.returncode == 1 and "maintenance/other.json" in answer.stderr


def test_name_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PitrError):
        read_settings(str(tmp_path), "../main")


def test_password_with_a_line_break_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PitrError, match="line break"):
        install(str(tmp_path / "there"), CLUSTER, settings(tmp_path), "a\nb", sys.executable)
    assert not (tmp_path / "there").exists()


# --- pitr-status


def watched(tmp_path: Path, **limits: list[str]) -> StatusSettings:
    return StatusSettings(str(tmp_path / "repository"), login_host=str(tmp_path / "nowhere"), limits=dict(limits))


@pytest.mark.parametrize("python", interpreters())
def test_status_runs_with_every_interpreter_and_tells_of_the_repository(tmp_path: Path, python: str) -> None:
    make_repository(tmp_path / "repository")
    install(str(tmp_path / "place"), CLUSTER, watched(tmp_path), "secret", python)
    argv = [str(tmp_path / "place" / "pitr-status"), "--json"]
    answer = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert answer.returncode == 2 and answer.stderr == "", answer
    levels = {each["check"]: each["level"] for each in json.loads(answer.stdout)["clusters"][0]["findings"]}
    # No server is there, and perhaps not even psycopg2: both are findings.
    assert levels["primary"] == "CRITICAL" and levels["repository"] == levels["gaps"] == "OK"


def test_both_commands_share_their_code_and_the_password(tmp_path: Path, installed: Path) -> None:
    written = install(str(installed), CLUSTER, watched(tmp_path), r"pass:wo\rd", sys.executable)
    assert written == [str(installed / "monitoring" / "main.json")]
    assert install(str(installed), CLUSTER, settings(tmp_path), r"pass:wo\rd", sys.executable) == []


def test_limit_that_cannot_be_is_refused_before_anything_is_installed(tmp_path: Path) -> None:
    with pytest.raises(PitrError, match="backup_age"):
        install(str(tmp_path / "there"), CLUSTER, watched(tmp_path, backup_age=["1", "2"]), "x", sys.executable)
    assert not (tmp_path / "there").exists()


def test_password_goes_with_monitoring_unless_backups_need_it(tmp_path: Path, installed: Path) -> None:
    install(str(installed), CLUSTER, watched(tmp_path), r"pass:wo\rd", sys.executable)
    assert remove_monitoring(str(installed), CLUSTER, check=True) == [str(installed / "monitoring" / "main.json")]
    assert (installed / "monitoring" / "main.json").exists()
    remove_monitoring(str(installed), CLUSTER)
    assert (installed / "maintenance" / "main.pgpass").exists()
    alone = tmp_path / "alone"
    install(str(alone), CLUSTER, watched(tmp_path), "x", sys.executable)
    remove_monitoring(str(alone), CLUSTER)
    assert not (alone / "maintenance" / "main.pgpass").exists() and remove_monitoring(str(alone), CLUSTER) == []


def test_status_looks_at_what_the_command_pitr_knows(installed: Path) -> None:
    answer = subprocess.run([str(installed / "pitr-status"), "--nagios"], capture_output=True, text=True, check=False)
    assert answer.returncode == 2 and answer.stdout.startswith("PITR CRITICAL - main primary: ")
    answer = run(installed, "status", "other")
    assert answer.returncode == 3 and "monitoring/other.json" in answer.stdout


# --- a server that does not let in


class Door:
    """Lets in at the so-manieth knock."""

    def __init__(self, refusals: int) -> None:
        self.refusals = refusals

    def connect(self) -> Door:
        self.refusals -= 1
        if self.refusals >= 0:
            raise PitrError("password authentication failed")
        return self

    def close(self) -> None:
        pass


def test_backup_waits_for_a_server_that_is_restarted_or_has_a_new_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maintenance, "PAUSE", 0.01)
    maintenance.wait_for(Door(3))  # type: ignore[arg-type]
    with pytest.raises(PitrError, match="authentication failed"):
        maintenance.wait_for(Door(10**9), patience=0.05)  # type: ignore[arg-type]
