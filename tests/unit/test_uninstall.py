# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Taking the commands away: all that was installed, and nothing of anybody else."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils import maintenance, maintenance_install
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.plugins.module_utils.install import COMMAND, install
from ansible_collections.pgdrill.pitr.plugins.module_utils.uninstall import uninstall
from ansible_collections.pgdrill.pitr.tests.unit.support import CLUSTER, tree

PITR = maintenance_install.COMMAND
WAL_SETTINGS = {"repository": "/srv/repo", "compression": "none"}
SETTINGS = maintenance.Settings(repository="/srv/repo", bin_dir="/usr/bin", login_host="db1")


def put(directory: Path, command: str, cluster: str = CLUSTER) -> None:
    if command == COMMAND:
        install(str(directory), cluster, WAL_SETTINGS)
    else:
        maintenance_install.install(str(directory), cluster, SETTINGS, "secret")


@pytest.mark.parametrize("command", [COMMAND, PITR])
def test_everything_that_was_installed_goes_and_check_mode_only_tells(tmp_path: Path, command: str) -> None:
    put(tmp_path, command)
    before = tree(tmp_path)
    told = uninstall(str(tmp_path), CLUSTER, command, check=True)
    assert tree(tmp_path) == before and told
    assert uninstall(str(tmp_path), CLUSTER, command) == told
    assert list(tmp_path.iterdir()) == []
    assert uninstall(str(tmp_path), CLUSTER, command) == []


def test_files_of_others_stay(tmp_path: Path) -> None:
    put(tmp_path, COMMAND)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "lib" / "mine.py").write_text("mine")
    uninstall(str(tmp_path), CLUSTER, COMMAND)
    left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*"))
    assert left == ["lib", "lib/mine.py", "notes.txt"]


@pytest.mark.parametrize("command", [COMMAND, PITR])
def test_program_stays_for_another_cluster(tmp_path: Path, command: str) -> None:
    put(tmp_path, command)
    before = tree(tmp_path)
    put(tmp_path, command, "other")
    uninstall(str(tmp_path), "other", command)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(("gone", "left"), [(COMMAND, PITR), (PITR, COMMAND)])
def test_what_another_command_needs_stays(tmp_path: Path, gone: str, left: str) -> None:
    put(tmp_path, left)
    put(tmp_path, gone)
    uninstall(str(tmp_path), CLUSTER, gone)
    assert not (tmp_path / gone).exists()
    said = subprocess.run([tmp_path / left], capture_output=True, text=True, check=False)
    assert said.stderr.startswith("usage:"), said.stderr
    uninstall(str(tmp_path), CLUSTER, left)
    assert list(tmp_path.iterdir()) == []


def test_command_of_a_receiver_that_is_configured_stays(tmp_path: Path) -> None:
    put(tmp_path, COMMAND)
    (tmp_path / "receiver").mkdir()
    (tmp_path / "receiver" / f"{CLUSTER}.json").write_text("{}")
    before = tree(tmp_path)
    with pytest.raises(PitrError, match="The receiver of the cluster"):
        uninstall(str(tmp_path), CLUSTER, COMMAND)
    assert tree(tmp_path) == before


def test_password_and_program_stay_while_monitoring_uses_them(tmp_path: Path) -> None:
    put(tmp_path, PITR)
    (tmp_path / "monitoring").mkdir()
    (tmp_path / "monitoring" / f"{CLUSTER}.json").write_text("{}")
    before = tree(tmp_path)
    uninstall(str(tmp_path), CLUSTER, PITR)
    assert set(before) - set(tree(tmp_path)) == {f"maintenance/{CLUSTER}.json"}
