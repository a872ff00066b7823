# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""pytest: unit tests once, integration tests on each PostgreSQL asked for."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from . import postgresql, programs, smallfs
from .drill import environment
from .layout import MAJORS, Layout, lock, make_private
from .processes import Interrupted, Supervisor
from .say import SandboxError, problem

_UNIT, _INTEGRATION = "tests/unit", "tests/integration"
_MUTATION = "tests/mutation/run.py"
# Bytes; four tests at a time use a good part of one.
_ROOM = 8 * 1024**3
_NO_TEST_RAN = 5  # pytest's exit code
_NEVER_COPIED = (".hypothesis", ".git", ".sandbox", ".venv", "evidence", "__pycache__")


def test(layout: Layout, majors: Sequence[int], arguments: Sequence[str]) -> int:
    """Run the tests; returns 0 only when some ran and none failed. `arguments` go to pytest; when they name files,
    only these run."""
    return _as_tests(layout, lambda checkout: _runs(layout, checkout, majors, arguments))


def mutation(layout: Layout, major: int, arguments: Sequence[str]) -> int:
    """Take away one guard after the other and demand that a test fails; `arguments` choose by name. Returns 0 when
    every mutation was caught."""
    argv = [str(layout.python), _MUTATION, *arguments]
    return _as_tests(layout, lambda _checkout: [(major, argv)])


def _as_tests(layout: Layout, runs: Callable[[Path], list[tuple[int, list[str]]]]) -> int:
    """Run (major, argv)s as the tests' user, in a checkout that this user may write to, and clear up after them."""
    with lock(layout, "test", f"tests are running already in {layout.root}; wait for them to end"):
        checkout = layout.checkout
        if layout.account.is_other:
            checkout = copy_checkout(layout, layout.root / "checkout")
            _hand_over(layout, checkout)
        chosen = runs(checkout)
        majors = sorted({major for major, _argv in chosen})
        temporary = _memory(layout)
        places = [layout.test_tmp, layout.test_memory]
        for place in places:
            shutil.rmtree(place, ignore_errors=True)
        make_private(temporary, layout.account)
        small = smallfs.mount(layout)
        try:
            with Supervisor(lambda: [postgresql.stop_all(layout, place) for place in places]) as supervisor:
                codes = []
                for major, argv in chosen:
                    env = _environment(layout, checkout, major, small)
                    env["TMPDIR"] = str(temporary)
                    env["PGDRILL_TEST_MAJORS"] = " ".join(map(str, majors))
                    codes.append(supervisor.run(argv, env, checkout, layout.account))
        except Interrupted as interruption:
            problem(str(interruption))
            return interruption.code
        if all(code in (0, _NO_TEST_RAN) for code in codes) and 0 in codes:
            for place in places:
                shutil.rmtree(place, ignore_errors=True)
            return 0
        if set(codes) == {_NO_TEST_RAN}:
            problem("no test ran")
        else:
            problem(f"tests failed; their files are in {temporary}")
        return next(code for code in codes if code != 0)


def _memory(layout: Layout) -> Path:
    """TMPDIR of the tests: in memory where there is plenty of it, for servers' directories are made and removed by the
    thousand, and that is half of what tests on a disk do."""
    place = layout.test_memory.parent
    try:
        found = os.statvfs(place)
        meminfo = Path("/proc/meminfo").read_text(encoding="ascii")
        available = int(meminfo.partition("MemAvailable:")[2].split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        return layout.test_tmp
    room = min(available, found.f_bavail * found.f_frsize)
    usable = room >= _ROOM and not found.f_flag & os.ST_NOEXEC and os.access(place, os.W_OK)
    return layout.test_memory if usable else layout.test_tmp


def _runs(
    layout: Layout, checkout: Path, majors: Sequence[int], arguments: Sequence[str]
) -> list[tuple[int, list[str]]]:
    """(major, argv) of each pytest run: all in one for one major, else the unit tests apart and first."""
    pytest = [str(layout.python), "-m", "pytest"]
    if not any(argument in ("-n", "--numprocesses") or argument.startswith(("-n", "--pdb")) for argument in arguments):
        # Half of what integration tests do is to wait for servers.
        pytest += ["-n", str(2 * (os.cpu_count() or 1))]
    if any((checkout / argument.partition("::")[0]).exists() for argument in arguments):
        return [(major, [*pytest, *arguments]) for major in majors]
    for name in (_UNIT, _INTEGRATION):
        if not (checkout / name).is_dir():  # pytest with workers would say nothing of a directory that is not there
            raise SandboxError(f"there is no directory {name} in {checkout}")
    if len(majors) == 1:
        return [(majors[0], [*pytest, *arguments, _UNIT, _INTEGRATION])]
    runs = [(majors[-1], [*pytest, *arguments, _UNIT])]
    return runs + [(major, [*pytest, *arguments, _INTEGRATION]) for major in majors]


def _environment(layout: Layout, checkout: Path, major: int, small: Path | None) -> dict[str, str]:
    env = environment(layout)
    # pytest finds ansible_collections.pgdrill.pitr here and ansible_collections.community in the venv: both are parts
    # of one namespace package (PEP 420), as neither has an __init__.py.
    collections = checkout.parents[2] if layout.account.is_other else layout.collections
    env["PYTHONPATH"] = str(collections)
    env["ANSIBLE_COLLECTIONS_PATH"] = str(collections)
    env["ANSIBLE_CONFIG"] = str(checkout / "ansible.cfg")
    env["PGDRILL_TEST_BIN_DIR"] = str(layout.bin_dir(major))
    env["PGDRILL_TEST_PG"] = str(major)
    if small is not None:
        env.setdefault("PGDRILL_TEST_SMALL_FS", str(small))
    env.update(programs.variables(layout))
    # What was fetched comes last: of the system's own programs none is replaced.
    env["PATH"] += f"{os.pathsep}{layout.programs}"
    # A test that runs playbooks writes a sandbox.yml of its own and points this at it; never at the drills'.
    env.pop("PGDRILL_SANDBOX")
    env.pop("PYTEST_ADDOPTS", None)
    if layout.account.is_other:
        for name in ("HOME", "ANSIBLE_HOME"):
            env[name] = str(layout.home)
        env["USER"] = env["LOGNAME"] = layout.account.name
        env["PYTHONDONTWRITEBYTECODE"] = "1"
    return env


def copy_checkout(layout: Layout, into: Path) -> Path:
    """A fresh copy of the checkout's files, as <into>/ansible_collections/pgdrill/pitr; returns its path.

    What git ignores stays behind; changes that are not committed come along.
    """
    shutil.rmtree(into, ignore_errors=True)
    target = into / "ansible_collections" / "pgdrill" / "pitr"
    target.mkdir(parents=True)
    for name in _files(layout.checkout):
        source = layout.checkout / name
        if source.is_symlink() or source.is_file():  # git also lists files that were deleted and not committed
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name, follow_symlinks=False)
    return target


def _files(checkout: Path) -> list[str]:
    if (checkout / ".git").exists() and shutil.which("git"):
        listed = subprocess.run(
            # A checkout of another user is safe enough to be listed.
            ["git", "-c", f"safe.directory={checkout}", "ls-files", "-z", "-co", "--exclude-standard"],
            cwd=checkout, stdin=subprocess.DEVNULL, capture_output=True, check=False,
        )  # fmt: skip
        if listed.returncode == 0:
            return [os.fsdecode(name) for name in listed.stdout.split(b"\0") if name]
    found = []
    for directory, names, files in os.walk(checkout):
        names[:] = [name for name in names if name not in _NEVER_COPIED and not name.endswith("_cache")]
        here = Path(directory).relative_to(checkout)
        found += [str(here / name) for name in files if not name.endswith((".pyc", ".tar.gz")) and name != ".git"]
    return [name for name in found if name not in _NEVER_COPIED]


def _hand_over(layout: Layout, checkout: Path) -> None:
    """Give the copy to the servers' user: pytest and the tests write beside their files."""
    top = checkout.parents[2]
    for directory, _names, files in os.walk(top):
        layout.account.own(Path(directory))
        for name in files:
            layout.account.own(Path(directory) / name)


def parse_majors(text: str) -> list[int]:
    """`18` or `all`. Raises SandboxError for anything else."""
    if text == "all":
        return list(MAJORS)
    if text.isdigit() and int(text) in MAJORS:
        return [int(text)]
    raise SandboxError(f"PG={text} is not one of {', '.join(map(str, MAJORS))}, and for tests `all`")
