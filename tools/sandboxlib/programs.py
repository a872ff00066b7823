# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Programs of the operating system that tests need: an sshd to log in to, age to encrypt with, compressors.

What the system has is used. What it has not is fetched as Debian packages and unpacked into .sandbox, which needs no
root, installs nothing and starts no service. Where there is no apt-get the tests that need a program are skipped.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .layout import Layout
from .say import SandboxError, problem, step

# Ordinary users seldom have these in their PATH, and sshd lies there.
_ADMINISTRATORS = ("/usr/local/sbin", "/usr/sbin", "/sbin")


@dataclass(frozen=True)
class Program:
    """A command, or a shared library to be preloaded, and Debian's package of it."""

    name: str
    package: str

    @property
    def variable(self) -> str:
        """Environment variable that tells the tests where it is; unset where it is not."""
        return f"PGDRILL_TEST_{self.name.removesuffix('.so').upper().replace('-', '_')}"

    @property
    def is_library(self) -> bool:
        return self.name.endswith(".so")


PROGRAMS = (
    Program("sshd", "openssh-server"),
    Program("ssh", "openssh-client"),
    Program("ssh-keygen", "openssh-client"),
    # sshd lets nobody in whose account is locked or has no shell, such as `nobody`; this lends it another passwd file.
    Program("libnss_wrapper.so", "libnss-wrapper"),
    Program("age", "age"),
    Program("age-keygen", "age"),
    Program("zstd", "zstd"),
    Program("lz4", "lz4"),
)


def find(layout: Layout, program: Program) -> Path | None:
    """Where the program is: on the system, or unpacked by :func:`ensure`."""
    if program.is_library:
        unpacked = layout.programs.parent / "system" / "usr" / "lib"
        return next((path for place in (Path("/usr/lib"), unpacked) for path in place.glob(f"*/{program.name}")), None)
    places = [*os.environ.get("PATH", "/usr/bin:/bin").split(os.pathsep), *_ADMINISTRATORS, str(layout.programs)]
    found = shutil.which(program.name, path=os.pathsep.join(place for place in places if place))
    return Path(found) if found else None


def ensure(layout: Layout, programs: Sequence[Program] = PROGRAMS) -> None:
    """Fetch what is missing. What cannot be had is told in one line, and is no error."""
    missing = [program for program in programs if find(layout, program) is None]
    if not missing:
        return
    names = ", ".join(program.name for program in missing)
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        problem(f"tests that need {names} are skipped: not installed, and there is no apt-get to fetch them with")
        return
    step(f"fetching {names} (once) …")
    try:
        # What was unpacked before makes room, so it comes along.
        unpacked = [
            program for program in programs if layout.programs.parent in (find(layout, program) or Path()).parents
        ]
        _unpack(layout, [*missing, *unpacked])
    except SandboxError as error:
        problem(f"tests that need {names} are skipped: {error}")


def variables(layout: Layout) -> dict[str, str]:
    """``PGDRILL_TEST_SSHD`` and its like with absolute paths, for the programs that are there."""
    found = ((program.variable, find(layout, program)) for program in PROGRAMS)
    return {name: str(path) for name, path in found if path}


def _unpack(layout: Layout, programs: Sequence[Program]) -> None:
    """Unpack the programs' packages, with what these need and the system has not. Raises SandboxError."""
    place = layout.programs.parent
    fresh = place.with_name(f".{place.name}.tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    for name in ("lists/partial", "cache/archives/partial", "packages", "system", layout.programs.name):
        (fresh / name).mkdir(parents=True)
    packages = sorted({program.package for program in programs})
    _apt(fresh, "update")
    planned = _apt(fresh, "install", "--simulate", "--no-install-recommends", *packages)
    # What is installed and only would be upgraded has its old version in brackets.
    wanted = set(packages) | set(re.findall(r"^Inst (\S+) \(", planned, re.MULTILINE))
    _apt(fresh, "download", *sorted(wanted))
    for package in (fresh / "packages").glob("*.deb"):
        _run(["dpkg-deb", "--extract", str(package), str(fresh / "system")], fresh)
    for name in ("lists", "cache", "packages"):
        shutil.rmtree(fresh / name)
    for program in programs:
        if program.is_library:
            continue
        original = next(_originals(fresh / "system", program.name), None)
        if original is None:
            raise SandboxError(f"the package {program.package} holds no {program.name}")
        _write_launcher(fresh / layout.programs.name / program.name, place / original.relative_to(fresh), fresh, place)
    shutil.rmtree(place, ignore_errors=True)
    fresh.rename(place)


def _originals(system: Path, name: str) -> Iterator[Path]:
    for folder in ("usr/sbin", "usr/bin", "sbin", "bin"):
        if (system / folder / name).exists():
            yield system / folder / name


def _write_launcher(launcher: Path, original: Path, fresh: Path, place: Path) -> None:
    """A script that lets the program find its libraries. By an absolute path: sshd starts itself again by it."""
    libraries = {path.parent for path in (fresh / "system").rglob("*.so*")}
    found = os.pathsep.join(str(place / path.relative_to(fresh)) for path in sorted(libraries))
    setting = f"LD_LIBRARY_PATH={shlex.quote(found)}\nexport LD_LIBRARY_PATH\n" if libraries else ""
    launcher.write_text(f'#!/bin/sh\n{setting}exec {shlex.quote(str(original))} "$@"\n', encoding="utf-8")
    launcher.chmod(0o755)


def _apt(fresh: Path, *arguments: str) -> str:
    """apt-get with package lists and a cache of our own: an ordinary user may do that, and the system's stay as is."""
    options = [f"Dir::State::Lists={fresh / 'lists'}", f"Dir::Cache={fresh / 'cache'}", "Debug::NoLocking=1"]
    # Root's apt-get would become a user who may not write here.
    options.append("APT::Sandbox::User=root")
    return _run(["apt-get", "-q", *(word for option in options for word in ("-o", option)), *arguments], fresh)


def _run(argv: Sequence[str], fresh: Path) -> str:
    answer = subprocess.run(
        argv, cwd=fresh / "packages", env={**os.environ, "LC_ALL": "C.UTF-8"}, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, errors="replace", check=False,
    )  # fmt: skip
    if answer.returncode != 0:
        said = [line for line in answer.stderr.splitlines() if line.startswith("E:")] or answer.stderr.splitlines()
        raise SandboxError(f"{argv[0]} fails: {(said or ['no message'])[-1]}")
    return answer.stdout
