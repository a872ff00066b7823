# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What runbooks and production guide tell somebody to type is there: playbooks, variables, commands, pages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

TOP = Path(__file__).resolve().parents[2]
DOCS = TOP / "docs"
RUNBOOKS = sorted(path for path in (DOCS / "runbooks").glob("*.md") if path.name != "README.md")
PAGES = [DOCS / "production.md", DOCS / "runbooks" / "README.md", *RUNBOOKS]
# Of a variable of ours, wherever it stands: each role has its own, and so have playbooks that want something typed.
PREFIXES = "pitr|primary|standby|receiver|repository|backup|restore|monitoring|drill|find|promote|switchover|remove"


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def known_variables() -> set[str]:
    """Those in the roles' argument specs, and those that playbooks ask for."""
    found: set[str] = set()
    for path in (TOP / "roles").glob("*/meta/argument_specs.yml"):
        for entry in yaml.safe_load(text_of(path))["argument_specs"].values():
            found |= set(entry.get("options") or {})
    for path in (TOP / "playbooks").glob("*.yml"):
        found |= set(re.findall(rf"\b((?:{PREFIXES})_[a-z0-9_]+)\b", text_of(path)))
    for path in (TOP / "roles").glob("*/tasks/*.yml"):
        found |= set(re.findall(r"\b([a-z]+_confirm)\b", text_of(path)))
    return found


def anchors(path: Path) -> set[str]:
    """What GitHub makes of headings."""
    headings = re.findall(r"^#+ (.+)$", text_of(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_playbooks_exist(page: Path) -> None:
    named = set(re.findall(r"\bpgdrill\.pitr\.([a-z_]+)", text_of(page)))
    assert named and named <= {path.stem for path in (TOP / "playbooks").glob("*.yml")}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_variables_exist(page: Path) -> None:
    text = text_of(page)
    typed = set(re.findall(r"-e '?\{?\"?([a-z0-9_]+)\"?[=:]", text))
    # Inventories are YAML, the rest is prose.
    set_there = set(re.findall(r"^([a-z0-9_]+): ", "\n".join(re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)), re.M))
    mentioned = set(re.findall(rf"`((?:{PREFIXES})_[a-z0-9_]+)[`:]", text))
    # Ansible's own, the vault's, the role and the group names.
    others = {"ansible_become", "ansible_become_user", "all", "pitr_backup", "pitr_standby", "pitr_shop"}
    others |= {"postgresql_primary", "postgresql_standby", "pitr_repository", "pitr_spare"}
    others |= {name for name in set_there if name.startswith("vault_")}
    assert (typed | set_there | mentioned) - others <= known_variables()


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_commands_exist(page: Path) -> None:
    installed = {
        name
        for path in (TOP / "plugins" / "module_utils").glob("*.py")
        for name in re.findall(r'^(?:STATUS_|)COMMAND = "([a-z-]+)"', text_of(path), re.MULTILINE)
    }
    assert set(re.findall(r"/usr/local/lib/pgdrill/([a-z-]+)", text_of(page))) <= installed


@pytest.mark.parametrize(
    "page", [*PAGES, DOCS / "hosts.md", DOCS / "ssh.md", TOP / "README.md"], ids=lambda path: path.stem
)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", text_of(page)):
        if "://" in target:
            continue
        name, _hash, anchor = target.partition("#")
        path = (page.parent / name) if name else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


@pytest.mark.parametrize("page", RUNBOOKS, ids=lambda path: path.stem)
def test_runbook_begins_with_a_command_and_tells_how_to_know_that_it_is_good(page: Path) -> None:
    lines = text_of(page).splitlines()
    assert "```console" in lines[:5]
    assert "**It is good** when" in text_of(page)
    assert f"]({page.name})" in text_of(DOCS / "runbooks" / "README.md")


def test_every_runbook_of_the_list_is_there() -> None:
    listed = re.findall(r"^\| \[[^\]]+\]\(([a-z-]+\.md)\)", text_of(DOCS / "runbooks" / "README.md"), re.MULTILINE)
    assert sorted(listed) == [path.name for path in RUNBOOKS] and len(listed) >= 9
