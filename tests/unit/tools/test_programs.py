# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from sandboxlib import programs
from sandboxlib.accounts import myself
from sandboxlib.layout import Layout
from sandboxlib.programs import Program

TOOL = Program("a-tool-of-the-tests", "a-package-of-the-tests")


@pytest.fixture
def sandbox(tmp_path: Path) -> Layout:
    return Layout.at(tmp_path / "checkout", tmp_path / "sandbox", myself(), is_elsewhere=False)


def put(path: Path, says: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho {says}\n", encoding="ascii")
    path.chmod(0o755)


def test_program_of_the_system_is_preferred_to_an_unpacked_one(
    sandbox: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(sandbox.programs / TOOL.name, "unpacked")
    assert programs.find(sandbox, TOOL) == sandbox.programs / TOOL.name
    put(tmp_path / "bin" / TOOL.name, "system")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    assert programs.find(sandbox, TOOL) == tmp_path / "bin" / TOOL.name


def test_variable_is_set_only_for_a_program_that_is_there(sandbox: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "PROGRAMS", (TOOL,))
    assert programs.variables(sandbox) == {}
    put(sandbox.programs / TOOL.name, "unpacked")
    assert programs.variables(sandbox) == {"PGDRILL_TEST_A_TOOL_OF_THE_TESTS": str(sandbox.programs / TOOL.name)}


def test_library_is_found_where_it_was_unpacked(sandbox: Layout) -> None:
    library = Program("libsomething_of_the_tests.so", "a-package")
    assert programs.find(sandbox, library) is None
    put(sandbox.programs.parent / "system" / "usr" / "lib" / "a-machine" / library.name, "")
    assert programs.find(sandbox, library) is not None
    assert library.variable == "PGDRILL_TEST_LIBSOMETHING_OF_THE_TESTS"


def test_machine_without_apt_is_told_in_one_line_which_tests_are_skipped(
    sandbox: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    programs.ensure(sandbox, [TOOL])
    told = capsys.readouterr()
    assert (told.out + told.err).count("\n") == 1 and f"{TOOL.name} are skipped" in told.out + told.err
    assert programs.find(sandbox, TOOL) is None


def test_launcher_lets_a_program_find_its_libraries_where_they_lie_in_the_end(tmp_path: Path) -> None:
    fresh, place = tmp_path / "it's fresh", tmp_path / "the place"
    put(fresh / "system" / "usr" / "bin" / "tool", "$LD_LIBRARY_PATH")
    put(fresh / "system" / "usr" / "lib" / "libtool.so.1", "")
    programs._write_launcher(fresh / "launcher", place / "system" / "usr" / "bin" / "tool", fresh, place)
    fresh.rename(place)
    answer = subprocess.run([place / "launcher"], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == str(place / "system" / "usr" / "lib")
