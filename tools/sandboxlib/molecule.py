# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""molecule: the roles on hosts with systemd, which are containers of podman."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from .drill import environment
from .layout import Layout, lock
from .say import problem, step

# Program, and Debian's package of it. The last two are of podman's networks with names.
_PROGRAMS = {
    "podman": "podman",
    "runc": "runc",
    "debootstrap": "debootstrap",
    "iptables": "iptables",
    "/usr/lib/podman/netavark": "netavark",
    "/usr/lib/podman/aardvark-dns": "aardvark-dns",
}
_SEQUENCES = ("test", "create", "prepare", "converge", "idempotence", "side-effect", "verify", "cleanup", "destroy")


def why_not(euid: int, found: Callable[[str], bool], podman_answers: Callable[[], str]) -> str:
    """Why this machine cannot run the hosts, in one line; empty when it can.

    ``found`` tells whether a program is there; ``podman_answers`` what is wrong with podman, empty when nothing is.
    """
    if euid != 0:
        return "the hosts of molecule are privileged containers with systemd, which only root can run"
    missing = [package for program, package in _PROGRAMS.items() if not found(program)]
    if missing:
        return f"the hosts of molecule need {', '.join(missing)}; on Debian: apt-get install {' '.join(missing)}"
    return podman_answers()


def obstacle() -> str:
    """What :func:`why_not` says of this machine."""
    return why_not(os.geteuid(), lambda program: shutil.which(program) is not None, _podman_answers)


def _podman_answers() -> str:
    answer = subprocess.run(
        ["podman", "--runtime", "runc", "info"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if answer.returncode == 0:
        return ""
    last = (answer.stderr.strip().splitlines() or ["no message"])[-1]
    return f"the hosts of molecule need podman, and `podman --runtime runc info` fails: {last}"


def everything(checkout: Path) -> list[str]:
    """The names of all scenarios, `default` first: what fails there fails in the others, too."""
    names = {path.parent.name for path in checkout.glob("molecule/*/molecule.yml")}
    return sorted(names, key=lambda name: (name != "default", name))


def run(layout: Layout, arguments: Sequence[str]) -> int:
    """Run scenarios; ``arguments`` are their names (all without any), and may begin with one of molecule's commands
    instead of `test`. Returns the first exit code but 0; 1 as well when the machine cannot run the hosts."""
    reason = obstacle()
    if reason:
        problem(reason)
        return 1
    words = list(arguments)
    sequence = words.pop(0) if words and words[0] in _SEQUENCES else "test"
    options = [word for word in words if word.startswith("-")]
    scenarios = [word for word in words if not word.startswith("-")] or everything(layout.checkout)
    env = environment(layout)
    # molecule writes a configuration of its own for Ansible.
    env.pop("ANSIBLE_CONFIG")
    for name in ("REMOTE_TMP", "SYSTEM_TMPDIRS", "ASYNC_DIR"):
        env.pop(f"ANSIBLE_{name}", None)
    with lock(layout, "molecule", f"molecule is running already in {layout.root}; wait for it to end"):
        for scenario in scenarios:
            step(f"molecule {sequence}: {scenario} …")
            # Names of containers and networks are the machine's; two checkouts do not share them, nor two scenarios.
            env["PGDRILL_MOLECULE"] = f"{layout.key}-{scenario}"
            env["MOLECULE_EPHEMERAL_DIRECTORY"] = str(layout.root / "molecule" / scenario)
            argv = [*layout.command("molecule"), "--base-config", "molecule/shared/base.yml"]
            argv += [sequence, "--scenario-name", scenario, *options]
            # No Supervisor: what watches over the containers has to outlive `create` and `converge`.
            code = subprocess.call(argv, env=env, cwd=layout.checkout, stdin=subprocess.DEVNULL)
            if code != 0:
                problem(
                    f"scenario {scenario} failed; its hosts are removed by `make molecule ARGS='destroy {scenario}'`"
                )
                return code
    return 0
