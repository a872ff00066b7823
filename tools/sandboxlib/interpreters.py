# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which Python the sandbox is built on. The servers' user must be able to run it, too: Ansible's modules do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from .accounts import Account
from .elf import search_in
from .layout import Layout
from .say import SandboxError, step

OLDEST = (3, 11)
TOO_NEW = (3, 14)
CANDIDATES = ("python3", "python3.13", "python3.12", "python3.11", "/usr/bin/python3")

_PROBE = """
import importlib.util, json, os, sys
print(json.dumps({
    "executable": os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable),
    "version": sys.version_info[:3],
    "prefix": sys.base_prefix,
    "has_venv": importlib.util.find_spec("venv") is not None,
    "has_ensurepip": importlib.util.find_spec("ensurepip") is not None,
}))
"""
# What pip, Ansible and psycopg2 need of the standard library; each of them is a library of the system in disguise.
_WORKS = "import ctypes, hashlib, json, ssl, subprocess, zlib"


@dataclass(frozen=True)
class Interpreter:
    """A Python that is not itself in a venv: version managers' shims and venvs are resolved to what they stand for."""

    executable: Path
    version: tuple[int, int, int]
    prefix: Path
    has_venv: bool
    has_ensurepip: bool

    @property
    def fits(self) -> bool:
        return OLDEST <= self.version[:2] < TOO_NEW and self.has_venv

    @property
    def text(self) -> str:
        return ".".join(map(str, self.version))

    def runs_for(self, account: Account) -> bool:
        """Whether `account` can execute it: really tried, as permissions have many ways to say no."""
        return account.capture([str(self.executable), "-I", "-c", _WORKS]).returncode == 0


def inspect(name: str) -> Interpreter | None:
    """The interpreter behind a command name or a path; None when there is none or it does not run."""
    found = shutil.which(name)
    if not found:
        return None
    try:
        answer = subprocess.run(
            [found, "-I", "-c", _PROBE],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        facts = json.loads(answer.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None  # A shim for a version that is not enabled, Python 2, something that is no Python at all.
    major, minor, micro = facts["version"]
    return Interpreter(
        Path(facts["executable"]),
        (major, minor, micro),
        Path(facts["prefix"]),
        facts["has_venv"],
        facts["has_ensurepip"],
    )


def choose(layout: Layout) -> Interpreter:
    """The interpreter to build on: the one that PYTHON asks for, else the first that fits and that the servers' user
    can run, else a copy of the first that fits. Raises SandboxError when none does."""
    asked = os.environ.get("PYTHON")
    if asked:
        interpreter = inspect(asked)
        if interpreter is None:
            raise SandboxError(f"PYTHON={asked} does not run; give the path of a Python 3.11, 3.12 or 3.13")
        if not interpreter.fits:
            lack = "" if interpreter.has_venv else " without the module venv"
            raise SandboxError(f"PYTHON={asked} is Python {interpreter.text}{lack}; 3.11, 3.12 or 3.13 is needed")
        return interpreter if interpreter.runs_for(layout.account) else _copy(layout, interpreter)
    fitting = [found for found in map(inspect, CANDIDATES) if found is not None and found.fits]
    for interpreter in fitting:
        if interpreter.runs_for(layout.account):
            return interpreter
    if fitting:
        return _copy(layout, fitting[0])
    raise SandboxError(
        "no Python 3.11, 3.12 or 3.13 found (looked for " + ", ".join(CANDIDATES) + "); "
        "install one (Debian: apt-get install python3 python3-venv), or name it: make drill PYTHON=/path/to/python3.12"
    )


def _copy(layout: Layout, original: Interpreter) -> Interpreter:
    """Copy an interpreter that the servers' user cannot read (a version manager below /root) into the sandbox."""
    name = f"python{original.version[0]}.{original.version[1]}"
    home = layout.root / "python" / original.text
    mark = home / ".complete"
    copy = Interpreter(home / "bin" / name, original.version, home, True, original.has_ensurepip)
    is_copied = mark.is_file() and mark.read_text(encoding="utf-8") == str(original.executable)
    if is_copied and copy.runs_for(layout.account):
        return copy
    step(
        f"copying Python {original.text} from {original.prefix} into {home}, "
        f"because the user {layout.account.name} cannot run it there (once) …"
    )
    shutil.rmtree(home, ignore_errors=True)
    (home / "bin").mkdir(parents=True)
    shutil.copy2(original.executable, copy.executable)
    shutil.copytree(
        original.prefix / "lib" / name,
        home / "lib" / name,
        symlinks=True,
        ignore=shutil.ignore_patterns("site-packages", "test", "tests", "idlelib", "tkinter", "__pycache__"),
    )
    (home / "lib" / name / "site-packages").mkdir()
    for library in (original.prefix / "lib").glob("libpython*.so*"):
        shutil.copy2(library, home / "lib" / library.name, follow_symlinks=False)
    search_in(copy.executable, built_for=original.prefix / "lib", now="$ORIGIN/../lib")
    if not copy.runs_for(layout.account):
        error = layout.account.capture([str(copy.executable), "-I", "-c", _WORKS]).stderr.strip().splitlines()
        raise SandboxError(
            f"the user {layout.account.name} cannot run {original.executable}, nor the copy of it in {home} "
            f"({error[-1] if error else 'no message'}); name a Python that everybody can run: "
            "make drill PYTHON=/usr/bin/python3"
        )
    mark.write_text(str(original.executable), encoding="utf-8")
    return copy
