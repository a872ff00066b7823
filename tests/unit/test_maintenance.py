# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The command pitr: installed whole, its secret for its user alone, and every failure an exit code and a sentence."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils import maintenance
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.plugins.module_utils.maintenance import Settings, read_settings
from ansible_collections.pgdrill.pitr.plugins.module_utils.maintenance_install import install

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
