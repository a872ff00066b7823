# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Whether a machine can run the hosts of molecule, and what it is told when it cannot."""

from __future__ import annotations

from pathlib import Path

from sandboxlib.molecule import everything, why_not


def test_ordinary_user_is_told_that_root_is_needed() -> None:
    assert "root" in why_not(1000, lambda _program: True, lambda: "")


def test_missing_programs_are_named_by_their_packages_in_one_line() -> None:
    said = why_not(0, lambda program: program not in ("runc", "debootstrap"), lambda: "not reached")
    assert said.endswith("apt-get install runc debootstrap") and "\n" not in said


def test_podman_that_does_not_answer_is_the_reason() -> None:
    assert why_not(0, lambda _program: True, lambda: "podman is broken") == "podman is broken"


def test_machine_with_everything_can() -> None:
    assert why_not(0, lambda _program: True, lambda: "") == ""


def test_every_directory_with_a_scenario_in_it_is_run_and_default_first(tmp_path: Path) -> None:
    for name in ("topology", "default", "bookworm", "shared"):
        (tmp_path / "molecule" / name).mkdir(parents=True)
        if name != "shared":
            (tmp_path / "molecule" / name / "molecule.yml").touch()
    assert everything(tmp_path) == ["default", "bookworm", "topology"]
