# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Checks that what is written twice says the same: roles' argument specs and defaults, modules and lists of them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import variable_index
import yaml
from module_index import CHECKOUT, INDEX, module_names, render

_NOTHING = object()


def load(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping; an absent or empty one is an empty mapping."""
    if not path.is_file():
        return {}
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}


def inherited_defaults(roles: Path, role: str) -> dict[str, Any]:
    """The defaults of the roles that `role` brings along (dependencies in meta/main.yml), and of theirs."""
    found: dict[str, Any] = {}
    for dependency in load(roles / role / "meta" / "main.yml").get("dependencies") or []:
        name = dependency if isinstance(dependency, str) else dependency.get("role") or dependency.get("name")
        name = str(name).rpartition(".")[2]
        found = {**found, **inherited_defaults(roles, name), **load(roles / name / "defaults" / "main.yml")}
    return found


def role_problems(roles: Path, role: str) -> Iterator[str]:
    """What is wrong between a role's defaults/main.yml and the `main` entry point of its argument specs.

    An option has the default that defaults/main.yml gives, and is there exactly when it is not required. A role may
    also describe a variable of a role that it brings along; it then repeats that one's default.
    """
    specs = load(roles / role / "meta" / "argument_specs.yml").get("argument_specs") or {}
    if "main" not in specs:
        yield f"roles/{role}/meta/argument_specs.yml: no entry point `main`"
        return
    options = specs["main"].get("options") or {}
    own = load(roles / role / "defaults" / "main.yml")
    known = {**inherited_defaults(roles, role), **own}
    for name in sorted({*options, *own}):
        option = options.get(name)
        default = known.get(name, _NOTHING)
        where = f"roles/{role}: {name}"
        if option is None:
            yield f"{where} is in defaults/main.yml and not in the argument specs"
        elif option.get("required"):
            if "default" in option or name in own:
                yield f"{where} is required and has a default"
        elif default is _NOTHING:
            yield f"{where} is optional in the argument specs and not in defaults/main.yml"
        elif "default" not in option:
            yield f"{where} has the default {default!r} in defaults/main.yml and none in the argument specs"
        elif not same(option["default"], default):
            yield f"{where} has the default {option['default']!r} in the argument specs and {default!r} in defaults"


def same(one: object, other: object) -> bool:
    """Equal in value and in type: YAML's 1, "1" and true are three defaults."""
    return type(one) is type(other) and repr(one) == repr(other)


def module_problems(checkout: Path) -> Iterator[str]:
    """Modules that meta/runtime.yml or docs/modules.md leaves out, and names in them that are no module."""
    modules = set(module_names(checkout))
    groups = load(checkout / "meta" / "runtime.yml").get("action_groups") or {}
    for name in sorted(modules - set(groups.get("all") or [])):
        yield f"meta/runtime.yml: the module {name} is not in the action group `all`"
    for group, names in groups.items():
        for name in sorted({name for name in names if isinstance(name, str)} - modules):
            yield f"meta/runtime.yml: {name} in the action group `{group}` is no module"
    index = checkout / INDEX.relative_to(CHECKOUT)
    if not index.is_file() or index.read_text(encoding="utf-8") != render(checkout):
        yield f"{INDEX.relative_to(CHECKOUT)} is not what the modules say: run `make docs`"


def variable_problems(checkout: Path) -> Iterator[str]:
    """docs/variables.md, when the roles say something else."""
    page = checkout / variable_index.INDEX.relative_to(CHECKOUT)
    if not page.is_file() or page.read_text(encoding="utf-8") != variable_index.render(checkout):
        yield f"{variable_index.INDEX.relative_to(CHECKOUT)} is not what the roles say: run `make docs`"


def problems(checkout: Path) -> list[str]:
    """Everything that is wrong, one line each."""
    found = [*module_problems(checkout), *variable_problems(checkout)]
    roles = checkout / "roles"
    for role in sorted(path.name for path in roles.iterdir() if path.is_dir()):
        found += role_problems(roles, role)
    return found


if __name__ == "__main__":
    wrong = problems(CHECKOUT)
    print("\n".join(wrong) if wrong else "argument specs, defaults, lists of modules and of variables agree")
    sys.exit(1 if wrong else 0)
