# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The checks of a release: ansible-lint, ansible-test sanity, mypy, and a drill with the built collection."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from . import drill
from .interpreters import inspect
from .layout import Layout, create
from .packages import download
from .say import SandboxError, step
from .testing import copy_checkout

# The collections that galaxy.yml depends on; they come with the Python package `ansible`.
DEPENDENCIES = ("ansible.posix", "community.postgresql")
# The Pythons of managed hosts and controllers, see tests/config.yml.
_SANITY_PYTHONS = ("3.9", "3.10", "3.11", "3.12", "3.13")
_GALAXY = ("ansible-galaxy", "collection")


def lint(layout: Layout, arguments: Sequence[str]) -> int:
    """ansible-lint with the profile of .ansible-lint, then ruff and shellcheck. Returns the first exit code but 0."""
    env = drill.environment(layout)
    scripts = [".ci/run", "benchmarks/bare.sh", "molecule/shared/build-image"]
    commands = [
        [*layout.command("ansible-lint"), "--offline", "--strict", *arguments],
        [str(layout.venv / "bin" / "ruff"), "check", "--quiet"],
        [str(layout.venv / "bin" / "shellcheck"), *scripts],
    ]
    codes = [_call(command, env, layout.checkout) for command in commands]
    return next((code for code in codes if code != 0), 0)


def typecheck(layout: Layout) -> int:
    """mypy --strict on everything Python that is not a test (settings in pyproject.toml). Returns the exit code.

    The plugins are checked under their full names, since that is how they import each other.
    """
    env = drill.environment(layout)
    env["MYPYPATH"] = os.pathsep.join([str(layout.collections), str(layout.checkout / "tools")])
    plugins = layout.checkout / "plugins"
    package = "ansible_collections.pgdrill.pitr.plugins"
    targets = [
        f"{package}.{path.name}"
        for path in sorted(plugins.iterdir())
        if path.name != "doc_fragments" and any(path.glob("*.py"))
    ]
    scripts = sorted(path.stem for path in (layout.checkout / "tools").glob("*.py"))
    code = 0
    for names in (targets, ["sandboxlib", *scripts]):
        argv = [*layout.command("mypy"), "--no-error-summary"]
        for name in names:
            argv += ["--package", name]
        answer = subprocess.run(argv, env=env, cwd=layout.checkout, stdout=subprocess.PIPE, text=True, check=False)
        prefix = f"{layout.collections}/ansible_collections/pgdrill/pitr/"
        print(answer.stdout.replace(prefix, ""), end="", flush=True)
        code = code or answer.returncode
    if code == 0:
        step(f"mypy --strict: no error in {', '.join(path.rpartition('.')[2] for path in targets)}, tools")
    return code


def sanity(layout: Layout, arguments: Sequence[str]) -> int:
    """`ansible-test sanity`, whole, on a copy of the checkout. Returns its exit code; `arguments` go to it."""
    home = layout.root / "sanity"
    cache = home / ".ansible" / "test" / "cache"
    cache.mkdir(parents=True, exist_ok=True)
    _provide_get_pip(layout, cache)
    # ansible-test wants plain paths; the checkout may lie anywhere.
    with tempfile.TemporaryDirectory(prefix="pgdrill-sanity-", dir="/var/tmp") as name:
        copy = copy_checkout(layout, Path(name) / "collections")
        for dependency in DEPENDENCIES:
            _copy_collection(layout, dependency, copy.parents[1])
        env = drill.environment(layout)
        for variable in ("CONFIG", "COLLECTIONS_PATH", "HOME"):
            env.pop(f"ANSIBLE_{variable}", None)
        env["HOME"] = str(home)
        user_settings = Path("~/.config/pip/pip.conf").expanduser()
        if user_settings.is_file():
            env.setdefault("PIP_CONFIG_FILE", str(user_settings))
        env["PATH"] = os.pathsep.join(
            [str(_interpreters(Path(name) / "bin")), str(layout.venv / "bin"), "/usr/local/bin", "/usr/bin", "/bin"]
        )
        argv = [*layout.command("ansible-test"), "sanity", "--color", "no", "--python", "default", "--requirements"]
        return _call([*argv, *arguments], env, copy)


def _interpreters(directory: Path) -> Path:
    """A directory with a link to every Python of this machine that really runs. ansible-test takes the first name that
    it finds in the PATH, and a version manager's shim for a version that is not enabled ends it."""
    directory.mkdir()
    managed = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser() / "versions"
    found = []
    for version in _SANITY_PYTHONS:
        places = [f"python{version}", *map(str, sorted(managed.glob(f"{version}.*/bin/python{version}")))]
        running = (seen for seen in map(inspect, places) if seen and seen.text.startswith(f"{version}."))
        interpreter = next(running, None)
        if interpreter:
            (directory / f"python{version}").symlink_to(interpreter.executable)
            found.append(version)
    step(f"ansible-test sanity on Python {', '.join(found)} …")
    return directory


def _provide_get_pip(layout: Layout, cache: Path) -> None:
    """Put a get-pip.py where ansible-test keeps the one that it otherwise downloads from a server of its own.

    The original is a copy of pip with a few lines around it; ours takes the same pip from PyPI.
    """
    internal = list(layout.venv.glob("lib/python3*/site-packages/ansible_test/_internal/python_requirements.py"))
    versions = [
        line.split("'")[1] for path in internal for line in path.read_text("utf-8").splitlines() if " pip='" in line
    ]
    if len(versions) != 1:
        raise SandboxError("this ansible-test does not tell which pip its venvs want; look into _provide_get_pip()")
    script = cache / f"get_pip_{versions[0].replace('.', '_')}.py"
    if script.exists():
        return
    with tempfile.TemporaryDirectory(dir=cache) as name:
        requirements = Path(name) / "pip.txt"
        requirements.write_text(f"pip=={versions[0]}\n", encoding="ascii")
        wheel = download(layout, requirements, Path(name))
        shutil.unpack_archive(wheel, Path(name) / "unpacked", "zip")
        shutil.rmtree(cache / "pip", ignore_errors=True)
        (Path(name) / "unpacked" / "pip").rename(cache / "pip")
    fresh = script.with_suffix(".tmp")
    fresh.write_text(
        "import sys\n"
        "from pip._internal.cli.main import main\n"
        "OWN = ('--no-setuptools', '--no-wheel')\n"
        "sys.exit(main(['install', '--force-reinstall', *(word for word in sys.argv[1:] if word not in OWN)]))\n",
        encoding="ascii",
    )
    fresh.replace(script)


def _copy_collection(layout: Layout, name: str, into: Path) -> None:
    """Copy a collection of the venv to <into>/<namespace>/<name>: documentation and code of ours refer to it."""
    namespace, _dot, short = name.partition(".")
    sources = list(layout.venv.glob(f"lib/python3*/site-packages/ansible_collections/{namespace}/{short}"))
    if not sources:
        raise SandboxError(f"{name} is not in {layout.venv}")
    shutil.copytree(sources[0], into / namespace / short, ignore=shutil.ignore_patterns("tests", "__pycache__"))


def install_check(layout: Layout, major: int) -> int:
    """Build the collection, install it into an empty directory and run a drill with it from there; nothing of the
    checkout is in reach but venv and PostgreSQL. Returns the exit code."""
    base = layout.root / "install-check"
    shutil.rmtree(base, ignore_errors=True)
    base.mkdir()
    other = Layout.at(layout.checkout, base / "sandbox", layout.account, is_elsewhere=True)
    create(other)
    # Its place of the checkout would be found before what was installed.
    shutil.rmtree(other.collections)
    for name in ("venv", "postgresql"):
        path = other.root / name
        if path.is_dir():
            path.rmdir()
        path.symlink_to(layout.root / name)
    collections = base / "collections"
    work = base / "work"
    work.mkdir()
    env = drill.environment(other)
    env["ANSIBLE_COLLECTIONS_PATH"] = str(collections)
    env.pop("ANSIBLE_CONFIG")
    galaxy = [*layout.command(_GALAXY[0]), *_GALAXY[1:]]
    source = copy_checkout(layout, base / "source")
    step("building and installing the collection …")
    for argv in (
        [*galaxy, "build", str(source), "--output-path", str(base)],
        [*galaxy, "install", "--no-deps", "--offline", "-p", str(collections), "ARTIFACT"],
    ):
        artifacts = [str(path) for path in base.glob("*.tar.gz")]
        argv = [word for item in argv for word in (artifacts if item == "ARTIFACT" else [item])]
        answer = subprocess.run(argv, env=env, cwd=work, capture_output=True, text=True, check=False)
        if answer.returncode != 0:
            raise SandboxError(f"{' '.join(argv[1:4])} failed:\n{answer.stdout}{answer.stderr}")
    shutil.rmtree(source.parents[2])
    installed = collections / "ansible_collections" / "pgdrill" / "pitr"
    play = [*layout.command("ansible-playbook"), "-i", str(installed / "inventories" / "sandbox")]
    commands = [[*play, "pgdrill.pitr.site"], [*play, "pgdrill.pitr.drill", "-e", "drill_scenarios=[latest]"]]
    code = drill.run_playbooks(other, major, commands, work, env)
    if code == 0:
        if not (work / "evidence" / "latest" / "evidence.json").is_file():
            raise SandboxError(f"the drill passed but left no evidence in {work / 'evidence'}")
        shutil.rmtree(other.socket_dir(major), ignore_errors=True)
        shutil.rmtree(base)
    return code


def _call(argv: Sequence[str], env: Mapping[str, str], cwd: Path) -> int:
    """Run a command in the foreground without input; returns its exit code."""
    sys.stdout.flush()
    return subprocess.run(argv, env=env, cwd=cwd, stdin=subprocess.DEVNULL, check=False).returncode
