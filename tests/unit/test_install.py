# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Installing the command: complete, readable by the server's user, and not touched when nothing changes."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils import install as module
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.plugins.module_utils.install import COMMAND, FILES, PACKAGE, install
from ansible_collections.pgdrill.pitr.tests.unit.support import CLUSTER, interpreters, tree

SETTINGS = {"repository": "/srv/repo", "compression": "none"}
SOURCES = Path(module.__file__).parent


def imported(name: str) -> set[str]:
    """Siblings that a module imports, wherever the statement stands."""
    found = set()
    for node in ast.walk(ast.parse((SOURCES / f"{name}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            found |= {node.module.partition(".")[0]} if node.module else {alias.name for alias in node.names}
    return found


def closure(name: str) -> set[str]:
    """A module and everything of ours that it needs."""
    found, left = set(), {name}
    while left:
        name = left.pop()
        found.add(name)
        left |= imported(name) - found
    return found


def test_list_of_files_is_what_the_command_imports() -> None:
    assert closure("cli") == set(FILES)


@pytest.mark.parametrize("python", interpreters())
def test_every_installed_module_needs_only_itself_and_the_standard_library(tmp_path: Path, python: str) -> None:
    install(str(tmp_path), CLUSTER, SETTINGS, python)
    code = (
        "import sys, importlib\n"
        f"sys.path[:0] = [{str(tmp_path / 'lib')!r}]\n"
        f"for name in {FILES!r}: importlib.import_module('{PACKAGE}.' + name)\n"
        "wrong = [m.__name__ for m in list(sys.modules.values())"
        " if 'site-packages' in (getattr(m, '__file__', None) or '')]\n"
        "assert not wrong, wrong\n"
        "assert 'subprocess' not in sys.modules and 'dataclasses' not in sys.modules\n"
    )
    subprocess.run([python, "-I", "-S", "-W", "error", "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("python", interpreters())
def test_library_is_compiled_by_the_interpreter_that_will_run_it(tmp_path: Path, python: str) -> None:
    install(str(tmp_path), CLUSTER, SETTINGS, python)
    version = subprocess.run(
        [python, "-I", "-S", "-c", "import sys; print(sys.implementation.cache_tag)"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    cache = tmp_path / "lib" / PACKAGE / "__pycache__"
    assert {f"{name}.{version}.pyc" for name in FILES} <= set(os.listdir(cache))


def test_second_installation_changes_nothing(tmp_path: Path) -> None:
    python = interpreters()[0]
    changed = install(str(tmp_path), CLUSTER, SETTINGS, python)
    assert str(tmp_path / COMMAND) in changed and len(changed) == len(FILES) + 4
    before = tree(tmp_path)
    assert install(str(tmp_path), CLUSTER, SETTINGS, python) == []
    assert tree(tmp_path) == before


def test_check_mode_names_what_would_be_written_and_writes_nothing(tmp_path: Path) -> None:
    directory = tmp_path / "d"
    announced = install(str(directory), CLUSTER, SETTINGS, interpreters()[0], check=True)
    assert not directory.exists()
    assert install(str(directory), CLUSTER, SETTINGS, interpreters()[0]) == announced


def test_check_mode_compiles_nothing(tmp_path: Path) -> None:
    install(str(tmp_path), CLUSTER, SETTINGS, interpreters()[0])
    shutil.rmtree(tmp_path / "lib" / PACKAGE / "__pycache__")
    (tmp_path / "lib" / PACKAGE / "wal.py").write_text("# damaged\n")
    assert install(str(tmp_path), CLUSTER, SETTINGS, interpreters()[0], check=True) == [
        str(tmp_path / "lib" / PACKAGE / "wal.py")
    ]
    assert not (tmp_path / "lib" / PACKAGE / "__pycache__").exists()


def test_running_interpreter_is_the_one_that_is_installed_by_default(tmp_path: Path) -> None:
    install(str(tmp_path), CLUSTER, SETTINGS)
    assert f"{module.interpreter()} -I -S" in (tmp_path / COMMAND).read_text()


def test_only_what_differs_is_written_again(tmp_path: Path) -> None:
    python = interpreters()[0]
    install(str(tmp_path), CLUSTER, SETTINGS, python)
    (tmp_path / "lib" / PACKAGE / "wal.py").write_text("# damaged\n")
    os.chmod(tmp_path / COMMAND, 0o644)
    changed = install(str(tmp_path), CLUSTER, {**SETTINGS, "compression": "gzip:2"}, python)
    assert sorted(changed) == sorted(
        [str(tmp_path / "lib" / PACKAGE / "wal.py"), str(tmp_path / COMMAND), str(tmp_path / f"{CLUSTER}.json")]
    )
    assert os.access(tmp_path / COMMAND, os.X_OK)


def test_second_cluster_shares_the_command(tmp_path: Path) -> None:
    python = interpreters()[0]
    install(str(tmp_path), CLUSTER, SETTINGS, python)
    assert install(str(tmp_path), "other", SETTINGS, python) == [str(tmp_path / "other.json")]


def test_everything_is_readable_by_the_servers_user_whatever_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o077)
    try:
        install(str(tmp_path / "d"), CLUSTER, SETTINGS, interpreters()[0])
    finally:
        os.umask(old)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "d").rglob("*") if path.suffix != ".pyc"}
    assert modes.pop(COMMAND) == 0o755
    assert {modes.pop(f"{name}.py") for name in FILES} == {0o644}
    assert modes[f"{CLUSTER}.json"] == 0o644


@pytest.mark.parametrize(
    "settings", [{"repository": "/r", "compression": "brotli"}, {"repository": "/r", "compression": "gzip:99"}]
)
def test_settings_that_cannot_be_are_refused_before_anything_is_written(
    tmp_path: Path, settings: dict[str, str]
) -> None:
    with pytest.raises(PitrError, match="Compression"):
        install(str(tmp_path / "d"), CLUSTER, settings, interpreters()[0])
    with pytest.raises(PitrError, match="cannot name a cluster"):
        install(str(tmp_path / "d"), "../x", SETTINGS, interpreters()[0])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("python", ["/nonexistent/python3", os.devnull])
def test_interpreter_that_cannot_be_executed_is_refused(tmp_path: Path, python: str) -> None:
    with pytest.raises(PitrError, match="cannot be executed by this user"):
        install(str(tmp_path / "d"), CLUSTER, SETTINGS, python)
    assert list(tmp_path.iterdir()) == []


def test_interpreter_is_not_that_of_a_virtual_environment() -> None:
    python = module.interpreter()
    code = "import sys; assert sys.prefix == sys.base_prefix, sys.prefix; print(*sys.version_info[:2])"
    said = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.split() == [str(part) for part in sys.version_info[:2]]


def test_launcher_is_plain_posix_shell(tmp_path: Path) -> None:
    directory = tmp_path / 'a\'b "c" $d'
    install(str(directory), CLUSTER, SETTINGS, interpreters()[0])
    text = (directory / COMMAND).read_text()
    assert text.startswith("#!/bin/sh\n") and f"# pitr-wal: {module.VERSION}\n" in text
    subprocess.run(["/bin/sh", "-n", str(directory / COMMAND)], check=True)
