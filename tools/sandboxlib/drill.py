# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A drill: site.yml and drill.yml on fresh sandbox hosts, and nothing left running afterwards."""

from __future__ import annotations

import locale
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from . import config, postgresql
from .layout import Layout, lock, make_private
from .processes import Interrupted, Supervisor
from .say import problem, step

PLAYBOOKS = ("playbooks/site.yml", "playbooks/drill.yml")
_FAILED_MARK = ".drill-failed"


def environment(layout: Layout) -> dict[str, str]:
    """The environment in which Ansible and everything else of the sandbox runs."""
    env = dict(os.environ)
    env.pop("PYTHONHOME", None)
    env["PATH"] = f"{layout.venv / 'bin'}{os.pathsep}{env.get('PATH', '/usr/bin:/bin')}"
    env["VIRTUAL_ENV"] = str(layout.venv)
    env["PGDRILL_SANDBOX"] = str(layout.root)
    # Named, not found: Ansible ignores ansible.cfg in a directory that others may write to.
    env["ANSIBLE_CONFIG"] = str(layout.checkout / "ansible.cfg")
    env["ANSIBLE_COLLECTIONS_PATH"] = str(layout.collections)
    env["ANSIBLE_HOME"] = str(layout.root / "ansible")
    env["ANSIBLE_REMOTE_TMP"] = env["ANSIBLE_SYSTEM_TMPDIRS"] = str(layout.ansible_tmp)
    env["ANSIBLE_ASYNC_DIR"] = str(layout.ansible_tmp / "async")
    # PGHOST, PGUSER, PGOPTIONS … of the user's shell would lead every tool to another server.
    for name in [name for name in env if name.startswith("PG") and not name.startswith("PGDRILL_")]:
        del env[name]
    if not _locale_works():
        env["LC_ALL"] = "C.UTF-8"
    return env


def _locale_works() -> bool:
    """Ansible ends at once when the locale is not installed or is not UTF-8."""
    try:
        locale.setlocale(locale.LC_ALL, "")
    except locale.Error:
        return False
    return locale.nl_langinfo(locale.CODESET).upper() in ("UTF-8", "UTF8")


def reset(layout: Layout, major: int) -> None:
    """Stop what runs in the sandbox hosts' data directory and remove it; what a failed drill left is kept, once."""
    run_dir = layout.run_dir(major)
    if not run_dir.exists():
        return
    postgresql.stop_all(layout, run_dir)
    if (run_dir / _FAILED_MARK).exists():
        kept = run_dir.with_name(f"{major}.failed")
        shutil.rmtree(kept, ignore_errors=True)
        run_dir.rename(kept)
        step(f"the last drill failed; what it left is now in {kept}")
    else:
        shutil.rmtree(run_dir)
    shutil.rmtree(layout.socket_dir(major), ignore_errors=True)


def command(layout: Layout, arguments: Sequence[str]) -> list[str]:
    """The command line of a drill; `arguments` go to both playbooks."""
    # One call for both: Ansible takes half a second to start.
    return [*layout.command("ansible-playbook"), "-i", "inventories/sandbox", *PLAYBOOKS, *arguments]


def drill(layout: Layout, major: int, arguments: Sequence[str]) -> int:
    """Run the drill; `arguments` go to both playbooks. Returns the exit code."""
    return run_playbooks(layout, major, [command(layout, arguments)], layout.checkout, environment(layout))


def run_playbooks(layout: Layout, major: int, commands: Sequence[Sequence[str]], cwd: Path, env: dict[str, str]) -> int:
    """Run commands one after the other on fresh sandbox hosts until one fails; returns the exit code of the last."""
    # What an interrupted module leaves behind in its TMPDIR goes with the rest.
    env = {**env, "TMPDIR": str(layout.ansible_tmp)}
    with lock(layout, "drill", f"another drill is running in {layout.root}; wait for it to end"):
        reset(layout, major)
        config.write(layout, major, servers_are_down=True)
        shutil.rmtree(layout.ansible_tmp, ignore_errors=True)
        make_private(layout.ansible_tmp, layout.account)
        run_dir = layout.run_dir(major)
        code = 1
        try:
            with Supervisor(lambda: postgresql.stop_all(layout, run_dir)) as supervisor:
                for command in commands:
                    code = supervisor.run(command, env, cwd)
                    if code != 0:
                        break
        except Interrupted as interruption:
            problem(f"{interruption}; the servers are stopped")
            return interruption.code
        finally:
            shutil.rmtree(layout.ansible_tmp, ignore_errors=True)
        if code != 0:
            (run_dir / _FAILED_MARK).touch()
            problem(f"failed (exit {code}); the servers are stopped, their files are in {run_dir}")
        return code
