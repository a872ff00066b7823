#!/usr/bin/python

# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: wal_command
short_description: Install the command pitr-wal that PostgreSQL calls
version_added: 0.1.0
description:
  - Installs C(pitr-wal) on a database host, which is what C(archive_command) and C(restore_command) run.
  - It is part of this collection as a plain directory beside a tiny launcher, and needs nothing but a Python 3.9 or
    later.
extends_documentation_fragment:
  - pgdrill.pitr.repository
  - pgdrill.pitr.attributes
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
  idempotent:
    support: full
options:
  state:
    description:
      - V(absent) removes the command and its settings of this cluster, and the program when no other cluster
        of the host uses it. Only the options that name it are needed then.
    type: str
    choices: [present, absent]
    default: present
  directory:
    description:
      - Directory to install into. Its owner should be root or the user that installs; PostgreSQL's user only has to
        read it.
    type: path
    required: true
  compression:
    description:
      - How segments are stored, V(none), V(gzip), V(lz4) or V(zstd) with an optional C(:level); V(auto) is zstd where
        the command exists, else gzip.
    type: str
    default: auto
  identity:
    description:
      - Path of a file with age identities that C(pitr-wal get) uses when none is given to it. Only on a host that is
        to read what is encrypted, such as a standby; a primary needs none to archive.
    type: path
  ssh_writer_identity:
    description:
      - Private key that C(pitr-wal push) logs in to the repository host with, when O(repository) is
        C(ssh://user@host:port/absolute/path). Absolute path; without a passphrase, readable for PostgreSQL's user and
        nobody else.
      - Over there its public key may only add WAL; the role P(pgdrill.pitr.repository#role) sees to that.
    type: path
    default: ''
  ssh_reader_identity:
    description:
      - The same for C(pitr-wal get). Over there its public key may only read.
    type: path
    default: ''
  ssh_known_hosts:
    description:
      - File that holds the repository host's key, in the format of ssh's C(known_hosts). Absolute path. A host with
        another key, or without one in there, is not talked to.
    type: path
    default: ''
  ssh_timeout:
    description:
      - Seconds after which a repository host that gives no sign of life is given up, 1 to 3600.
    type: int
    default: 30
  push_ahead:
    description:
      - Number of files that a call of C(pitr-wal push) archives beyond the one that it was asked for, when they are
        ready. V(0) switches it off.
      - Nothing is answered sooner than it is on stable storage, whatever the number.
    type: int
    default: 32
  prefetch:
    description:
      - Number of segments that are fetched ahead during a recovery, into C(pg_wal/.pitr-get), and at most 256 MB (but
        one segment at least). V(0) switches it off.
    type: int
    default: 8
  spool:
    description:
      - Directory of the notes about files that were archived ahead. PostgreSQL's user must be able to write there; a
        directory for each cluster is made in it, 0700. Without it, C(.pitr-push) in the cluster's C(pg_wal).
    type: path
  python:
    description:
      - Interpreter that runs the command. Without it the one that runs this module, outside of its virtual environment.
    type: path
author:
  - pgdrill.pitr contributors (@pgdrill)
"""

EXAMPLES = r"""
- name: pitr-wal for the cluster main
  pgdrill.pitr.wal_command:
    directory: /usr/local/lib/pgdrill
    repository: /var/lib/pitr
    cluster: main

- name: The same with the repository on another host
  pgdrill.pitr.wal_command:
    directory: /usr/local/lib/pgdrill
    repository: ssh://pitr@backup.example.com/srv/pitr
    cluster: main
    ssh_writer_identity: /etc/pgdrill/main-writer
    ssh_reader_identity: /etc/pgdrill/main-reader
    ssh_known_hosts: /etc/pgdrill/known_hosts
"""

RETURN = r"""
removed:
  description: What was removed, or would be in check mode.
  returned: with O(state=absent)
  type: list
  elements: str
  sample: [/usr/local/lib/pgdrill/main.json]
command:
  description: Path of the launcher.
  returned: with O(state=present)
  type: str
  sample: /usr/local/lib/pgdrill/pitr-wal
archive_command:
  description: The setting for the server, quoted.
  returned: with O(state=present)
  type: str
  sample: /usr/local/lib/pgdrill/pitr-wal push main "%p"
written:
  description: Files that were written, or would be in check mode.
  returned: with O(state=present)
  type: list
  elements: str
  sample: ["/usr/local/lib/pgdrill/pitr-wal"]
seconds:
  description: How long the module took.
  returned: success
  type: float
  sample: 0.412
started_at:
  description: When it began, ISO 8601, UTC.
  returned: success
  type: str
  sample: "2026-03-01T14:29:59.123456+00:00"
finished_at:
  description: When it ended, ISO 8601, UTC.
  returned: success
  type: str
  sample: "2026-03-01T14:30:02.503112+00:00"
"""

import os
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.pgdrill.pitr.plugins.module_utils.boundary import repository_argument_spec, run_module
from ansible_collections.pgdrill.pitr.plugins.module_utils.install import COMMAND, install
from ansible_collections.pgdrill.pitr.plugins.module_utils.postgres import shell_command
from ansible_collections.pgdrill.pitr.plugins.module_utils.uninstall import uninstall

ARGUMENT_SPEC: dict[str, dict[str, Any]] = {
    **repository_argument_spec(),
    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
    "directory": {"type": "path", "required": True},
    "compression": {"type": "str", "default": "auto"},
    "identity": {"type": "path"},
    "ssh_writer_identity": {"type": "path", "default": ""},
    "ssh_reader_identity": {"type": "path", "default": ""},
    "ssh_known_hosts": {"type": "path", "default": ""},
    "ssh_timeout": {"type": "int", "default": 30},
    "push_ahead": {"type": "int", "default": 32},
    "prefetch": {"type": "int", "default": 8},
    "spool": {"type": "path"},
    "python": {"type": "path"},
}


def run(module: AnsibleModule) -> dict[str, Any]:
    """Install, or take away."""
    params = module.params
    if params["state"] == "absent":
        removed = uninstall(params["directory"], params["cluster"], COMMAND, module.check_mode)
        gone: dict[str, Any] = {"changed": bool(removed), "removed": removed}
        if module._diff:
            gone["diff"] = {"before": "".join(f"{path}\n" for path in removed), "after": ""}
        return gone
    settings: dict[str, Any] = {name: params[name] for name in ("repository", "compression", "push_ahead", "prefetch")}
    if params["identity"]:
        settings["identity"] = os.path.abspath(params["identity"])
    if params["repository"].startswith("ssh://"):
        settings.update({name: str(params[name]) for name in ARGUMENT_SPEC if name.startswith("ssh_") and params[name]})
    if params["spool"]:
        settings["spool"] = os.path.abspath(params["spool"])
    written = install(params["directory"], params["cluster"], settings, params["python"] or "", module.check_mode)
    command = os.path.join(params["directory"], COMMAND)
    result: dict[str, Any] = {"changed": bool(written), "command": command, "written": written}
    result["archive_command"] = shell_command([command, "push", params["cluster"]], ["%p"])
    if module._diff:
        result["diff"] = {"before": "", "after": "".join(f"{path}\n" for path in written)}
    return result


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec=ARGUMENT_SPEC,
        supports_check_mode=True,
    )
    run_module(module, run)


if __name__ == "__main__":
    main()
