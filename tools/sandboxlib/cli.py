# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The command line of tools/sandbox.py."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from . import checks, config, drill, molecule, packages, postgresql, programs, testing
from .layout import DEFAULT_MAJOR, MAJORS, Layout, create, locate, lock, remove
from .processes import Interrupted, raise_on_signals
from .say import SandboxError, problem, step


def main(arguments: Sequence[str]) -> int:
    """Run one sub-command; returns the exit code."""
    if not sys.platform.startswith("linux"):
        problem("the sandbox runs on Linux only")
        return 1
    os.umask(0o022)  # The servers' user reads what we install.
    command, separator, rest = _split(arguments)
    options, extra = _parser().parse_known_args(command)
    if extra and options.command not in ("drill", "test", "mutation", "molecule", "sanity", "lint"):
        _parser().error(f"unknown arguments: {' '.join(extra)}")
    raise_on_signals()
    try:
        return _run(options, extra + rest if separator else extra)
    except SandboxError as error:
        problem(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        problem("interrupted")
        return 130
    except Interrupted as interruption:
        return interruption.code


def _split(arguments: Sequence[str]) -> tuple[list[str], bool, list[str]]:
    """What stands before and after the first `--`."""
    if "--" not in arguments:
        return list(arguments), False, []
    at = list(arguments).index("--")
    return list(arguments[:at]), True, list(arguments[at + 1 :])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sandbox.py", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.add_argument("--pg", default=str(DEFAULT_MAJOR), help="PostgreSQL's major version (%(default)s)")
        return command

    add("setup", "install Ansible and PostgreSQL into .sandbox").add_argument(
        "--test", action="store_true", help="the tools of the tests, too"
    )
    add("drill", "run a drill on fresh sandbox hosts; other arguments go to ansible-playbook")
    add("test", "run the tests (--pg all: on every PostgreSQL); other arguments go to pytest")
    add("mutation", "take away guards of the engine, one by one: a test must fail; other arguments choose by name")
    add("molecule", "run molecule's scenarios, the roles on hosts with systemd; other arguments name them")
    add("lint", "ansible-lint")
    add("typecheck", "mypy --strict")
    add("sanity", "ansible-test sanity on a copy; other arguments go to it")
    add("install-check", "build and install the collection, and run a drill with what was installed")
    add("stop", "stop the servers of the sandbox hosts")
    add("clean", "remove the sandbox and all caches; evidence stays")
    add("run", "run a command in the sandbox's environment: run [--test] -- command …").add_argument(
        "--test", action="store_true", help="with the tools of the tests"
    )
    return parser


def _run(options: argparse.Namespace, extra: Sequence[str]) -> int:
    layout = locate()
    if options.command == "clean":
        _stop(layout)
        remove(layout)
        return 0
    if options.command == "stop":
        step(f"{_stop(layout)} servers stopped")
        return 0
    majors = testing.parse_majors(options.pg)
    if len(majors) > 1 and options.command != "test":
        raise SandboxError(f"--pg {options.pg}: name one PostgreSQL version")
    with_tests = options.command in ("test", "mutation", "molecule", "lint", "sanity", "typecheck") or getattr(
        options, "test", False
    )
    needs_servers = options.command in ("setup", "drill", "test", "mutation", "install-check")
    # Some guards are about programs of another version.
    others = [min(MAJORS)] if options.command == "mutation" else []
    setup(
        layout,
        sorted({*majors, *others}) if needs_servers else [],
        with_tests,
        with_programs=with_tests and needs_servers,
        with_molecule=options.command == "molecule",
    )
    if options.command == "setup":
        config.write(layout, majors[0])
        step(f"ready: {layout.root}")
        return 0
    if options.command == "drill":
        return drill.drill(layout, majors[0], extra)
    if options.command == "test":
        return testing.test(layout, majors, extra)
    if options.command == "mutation":
        return testing.mutation(layout, majors[0], extra)
    if options.command == "molecule":
        return molecule.run(layout, extra)
    if options.command == "lint":
        return checks.lint(layout, extra)
    if options.command == "typecheck":
        return checks.typecheck(layout)
    if options.command == "sanity":
        return checks.sanity(layout, extra)
    if options.command == "install-check":
        return checks.install_check(layout, majors[0])
    if not extra:
        raise SandboxError("run what? sandbox.py run -- command …")
    env = drill.environment(layout)
    os.execvpe(extra[0], list(extra), env)


def setup(
    layout: Layout,
    majors: Sequence[int],
    with_tests: bool,
    with_programs: bool = False,
    with_molecule: bool = False,
) -> None:
    """Install what is not installed yet. Two at a time would spoil each other's work: the second one waits."""
    create(layout)
    with lock(layout, "setup"):
        names = [
            packages.RUN,
            *([packages.TEST] if with_tests else []),
            *([packages.MOLECULE] if with_molecule else []),
        ]
        packages.ensure(layout, *names)
        for major in majors:
            postgresql.ensure(layout, major)
        if with_programs:
            programs.ensure(layout)


def _stop(layout: Layout) -> int:
    """Stop the servers of all sandbox hosts; of an ordinary user's sandbox in this checkout, too, for root."""
    run_dirs = {layout.root / "run", (layout.checkout / ".sandbox").resolve() / "run"}
    return sum(
        postgresql.stop_all(layout, directory / str(major)) for directory in run_dirs for major in MAJORS
    )  # fmt: skip
