# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The hosts of the scenario that is tested, over podman, and what its inventory says of them."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import testinfra

CHECKOUT = Path(__file__).resolve().parents[2]
_KEY = os.environ["PGDRILL_MOLECULE"]
# Where the hosts are, and beside it what the scenario says of them.
ADDRESSES = os.environ["MOLECULE_INVENTORY_FILE"]
INVENTORY = os.path.dirname(ADDRESSES)
_INVENTORY: dict[str, Any] = json.loads(
    subprocess.run(["ansible-inventory", "-i", INVENTORY, "--list"], check=True, capture_output=True, text=True).stdout
)
# What Ansible prints is to be read; molecule asks for colours.
PLAIN = {"ANSIBLE_FORCE_COLOR": "0", "ANSIBLE_NOCOLOR": "1"}


def group(name: str) -> list[str]:
    """The hosts of an inventory group, in its order."""
    return list(_INVENTORY.get(name, {}).get("hosts", []))


def variables(name: str) -> dict[str, Any]:
    """What the inventory says of a host; templates as they are written."""
    return dict(_INVENTORY["_meta"]["hostvars"][name])


PRIMARY = group("postgresql_primary")[0]
REPOSITORY = group("pitr_repository")[0]
CLUSTER: str = variables(PRIMARY)["pitr_cluster"]
PASSWORDS: list[str] = [value for name, value in variables(PRIMARY).items() if name.endswith("_password")]
HOSTS: list[str] = sorted(_INVENTORY["_meta"]["hostvars"])
OVER_SSH: bool = variables(PRIMARY)["pitr_repository"].startswith("ssh://")
HAS_RECEIVER: bool = variables(REPOSITORY).get("receiver_state") == "started"
# Whose the repository is.
OWNER: str = variables(REPOSITORY)["ansible_become_user"]
FOLDER = f"/srv/pitr/{CLUSTER}"


def container(name: str) -> str:
    """What podman calls a host."""
    return f"pgdrill-{_KEY}-{name}"


def host(name: str) -> Any:
    """testinfra's handle of a host."""
    return testinfra.get_host(f"podman://{container(name)}")


def sql(database_host: Any, text: str) -> str:
    """What psql prints for the superuser over the local socket; fields are divided by |."""
    return str(database_host.check_output("su postgres -c %s", f"psql -qAtX -c {json.dumps(text)}")).strip()


def service(database_host: Any) -> str:
    """The service of the only cluster that Debian's packages know on this host."""
    version, name = database_host.check_output("pg_lsclusters --no-header").split()[:2]
    return f"postgresql@{version}-{name}"


def playbook(name: str, *arguments: str, inventory: Sequence[str] = (INVENTORY,)) -> subprocess.CompletedProcess[str]:
    """`ansible-playbook` as an operator types it, with these inventory sources; whether it worked is in the answer."""
    sources = [word for source in inventory for word in ("-i", source)]
    argv = ["ansible-playbook", *sources, f"playbooks/{name}.yml", *arguments]
    plain = {**os.environ, **PLAIN}
    return subprocess.run(
        argv, cwd=CHECKOUT, env=plain, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )


def changes(answer: subprocess.CompletedProcess[str]) -> dict[str, int]:
    """How many tasks of a play changed something, by host."""
    found = re.findall(r"^(\w+) +: ok=\d+ +changed=(\d+)", answer.stdout, re.MULTILINE)
    return {name: int(count) for name, count in found}
