# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Writes docs/modules.md from what the modules say of themselves (`make docs`)."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import yaml

CHECKOUT = Path(__file__).resolve().parent.parent
INDEX = CHECKOUT / "docs" / "modules.md"

_HEAD = """\
# Modules

```console
$ ansible-doc pgdrill.pitr.restore
```

shows what a module does, its options, examples and what it returns. This page is written by `make docs`.

| module | does |
| --- | --- |
"""


def module_names(checkout: Path = CHECKOUT) -> list[str]:
    """The names of all modules, sorted."""
    return sorted(path.stem for path in (checkout / "plugins" / "modules").glob("*.py") if path.stem != "__init__")


def documentation(path: Path) -> dict[str, Any]:
    """The DOCUMENTATION of a module, parsed. Raises ValueError when it has none."""
    for statement in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Constant):
            names = [target.id for target in statement.targets if isinstance(target, ast.Name)]
            if names == ["DOCUMENTATION"]:
                parsed = yaml.safe_load(str(statement.value.value))
                if isinstance(parsed, dict):
                    return parsed
    raise ValueError(f"{path} has no DOCUMENTATION")


def render(checkout: Path = CHECKOUT) -> str:
    """The text of docs/modules.md."""
    rows = []
    for name in module_names(checkout):
        described = documentation(checkout / "plugins" / "modules" / f"{name}.py")
        rows.append(f"| `{name}` | {described['short_description']} |\n")
    return _HEAD + "".join(rows)


if __name__ == "__main__":
    INDEX.parent.mkdir(exist_ok=True)
    INDEX.write_text(render(), encoding="utf-8")
    print(f"{INDEX.relative_to(CHECKOUT)} written")
