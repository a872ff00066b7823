# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Writes docs/variables.md from what the roles say of their variables (`make docs`)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

CHECKOUT = Path(__file__).resolve().parent.parent
INDEX = CHECKOUT / "docs" / "variables.md"

_HEAD = """\
# Which variables are there?

```console
$ ansible-doc -t role pgdrill.pitr.primary
```

shows the same for one role. Set a variable once, in the inventory, for the hosts of all groups; those that differ from
host to host in the group's or the host's file. What a playbook wants typed (`…_confirm`) never stands in an inventory.
This page is written by `make docs`.
"""
# The markup of Ansible's documentation: C(code), V(value), O(option), M(module), P(plugin#type), with \) for a bracket.
_MARKUP = re.compile(r"\b([CVOMEP])\(((?:[^)\\]|\\.)*)\)")


def markdown(text: str) -> str:
    """A line of a description as it stands in a cell of a table."""
    plain = _MARKUP.sub(lambda found: f"`{found[2].partition('#')[0]}`", text).replace("\\)", ")")
    return plain.replace("|", "\\|").replace("\n", " ").strip()


def default(option: dict[str, Any]) -> str:
    """What a variable is when nobody sets it."""
    if option.get("required"):
        return "**required**"
    value = option.get("default")
    if isinstance(value, bool):
        value = str(value).lower()
    shown = '""' if value in ("", None) else str(value)
    return f"`{shown}`".replace("|", "\\|")


def variables(specs: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every variable of a role once, in the order of its specs, whichever entry points know it."""
    found: dict[str, dict[str, Any]] = {}
    for entry in specs.values():
        for name, option in (entry.get("options") or {}).items():
            found.setdefault(name, option)
    return found


def row(name: str, option: dict[str, Any]) -> str:
    """A line of a role's table."""
    described = option.get("description") or []
    text = " ".join(markdown(line) for line in ([described] if isinstance(described, str) else described))
    kind = str(option.get("type", "str"))
    if option.get("choices"):
        kind += ": " + ", ".join(f"`{choice}`".replace("|", "\\|") for choice in option["choices"])
    return f"| `{name}` | {kind} | {default(option)} | {text} |\n"


def role_specs(checkout: Path = CHECKOUT) -> dict[str, dict[str, Any]]:
    """The argument specs of each role; first that of what all share, then by name."""
    found = {}
    for path in (checkout / "roles").glob("*/meta/argument_specs.yml"):
        found[path.parent.parent.name] = yaml.safe_load(path.read_text(encoding="utf-8"))["argument_specs"]
    return {name: found[name] for name in sorted(found, key=lambda name: (name != "pitr", name))}


def render(checkout: Path = CHECKOUT) -> str:
    """The text of docs/variables.md."""
    parts = [_HEAD]
    for role, specs in role_specs(checkout).items():
        said = markdown(str(next(iter(specs.values())).get("short_description", "")))
        parts.append(f"\n## {role}\n\n{said}.\n")
        known = variables(specs)
        if known:
            parts.append("\n| variable | type | default | |\n| --- | --- | --- | --- |\n")
            parts += [row(name, option) for name, option in known.items()]
    return "".join(parts)


if __name__ == "__main__":
    INDEX.parent.mkdir(exist_ok=True)
    INDEX.write_text(render(), encoding="utf-8")
    print(f"{INDEX.relative_to(CHECKOUT)} written")
