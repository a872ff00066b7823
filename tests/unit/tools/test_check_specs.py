# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

from pathlib import Path
from typing import Any

import check_specs
import pytest
import variable_index
import yaml

SHARED = {"pitr_cluster": "main"}


@pytest.fixture
def roles(tmp_path: Path) -> Path:
    write(tmp_path / "pitr" / "defaults" / "main.yml", SHARED)
    write(tmp_path / "pitr" / "meta" / "argument_specs.yml", spec({"pitr_cluster": {"default": "main"}}))
    write(tmp_path / "primary" / "meta" / "main.yml", {"dependencies": [{"role": "pgdrill.pitr.pitr"}]})
    return tmp_path


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content), encoding="utf-8")


def spec(options: dict[str, Any]) -> dict[str, Any]:
    return {"argument_specs": {"main": {"options": options}}}


def found(roles: Path, defaults: dict[str, Any], options: dict[str, Any]) -> list[str]:
    write(roles / "primary" / "defaults" / "main.yml", defaults)
    write(roles / "primary" / "meta" / "argument_specs.yml", spec(options))
    return list(check_specs.role_problems(roles, "primary"))


def test_equal_defaults_pass(roles: Path) -> None:
    options = {"primary_port": {"type": "int", "default": 5432}, "primary_name": {"required": True}}
    assert found(roles, {"primary_port": 5432}, options) == []


def test_repeated_default_of_a_dependency_passes(roles: Path) -> None:
    assert found(roles, {}, {"pitr_cluster": {"default": "main"}}) == []


@pytest.mark.parametrize(
    ("defaults", "options", "told"),
    [
        ({"primary_port": 5432}, {}, "not in the argument specs"),
        ({}, {"primary_port": {"default": 5432}}, "not in defaults/main.yml"),
        ({"primary_port": 5432}, {"primary_port": {}}, "none in the argument specs"),
        ({"primary_port": 5432}, {"primary_port": {"default": 5433}}, "5433"),
        ({"primary_port": 5432}, {"primary_port": {"default": "5432"}}, "'5432'"),
        ({"primary_on": True}, {"primary_on": {"default": 1}}, "True"),
        ({"primary_port": 5432}, {"primary_port": {"required": True}}, "required and has a default"),
        ({}, {"pitr_cluster": {"default": "other"}}, "'other'"),
    ],
)
def test_difference_is_told(roles: Path, defaults: dict[str, Any], options: dict[str, Any], told: str) -> None:
    problems = found(roles, defaults, options)
    assert len(problems) == 1
    assert told in problems[0]


def test_role_without_specs_is_told(roles: Path) -> None:
    assert "no entry point `main`" in next(check_specs.role_problems(roles, "primary"))


def test_page_of_variables_that_is_out_of_date_is_told(tmp_path: Path) -> None:
    write(tmp_path / "roles" / "primary" / "meta" / "argument_specs.yml", spec({"primary_port": {"default": 1}}))
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "variables.md"
    page.write_text(variable_index.render(tmp_path), encoding="utf-8")
    assert list(check_specs.variable_problems(tmp_path)) == []
    write(tmp_path / "roles" / "primary" / "meta" / "argument_specs.yml", spec({"primary_port": {"default": 2}}))
    assert "make docs" in next(check_specs.variable_problems(tmp_path))


def test_row_of_a_variable_has_its_type_its_default_and_what_it_is() -> None:
    option = {"type": "str", "default": "a|b", "choices": ["a|b", "c"], "description": ["See O(other); V(x\\)|y)."]}
    options = {"main": {"options": {"one": option}}, "other": {"options": {"one": {}, "two": {"required": True}}}}
    assert list(variable_index.variables(options)) == ["one", "two"]
    assert variable_index.row("one", option) == "| `one` | str: `a\\|b`, `c` | `a\\|b` | See `other`; `x)\\|y`. |\n"
    assert "**required**" in variable_index.row("two", {"required": True})
