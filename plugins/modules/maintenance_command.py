#!/usr/bin/python

# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: maintenance_command
short_description: Install the command pitr that takes backups, verifies and expires without Ansible
version_added: 0.2.0
description:
  - Installs C(pitr) and its settings for one cluster on the repository host, for timers. It does what
    M(pgdrill.pitr.base_backup), M(pgdrill.pitr.backup_verify) and M(pgdrill.pitr.expire) do, with the same code, and
    drills, which restore what the repository holds into a scratch directory and prove it.
  - Run it as the user that owns the repository. The password lies in a file with mode 0600, and is in no command line.
extends_documentation_fragment:
  - pgdrill.pitr.repository
  - pgdrill.pitr.bin_dir
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
      - V(absent) removes its settings and password of this cluster, and the program when no other cluster
        of the host uses it. Only the options that name it are needed then.
    type: str
    choices: [present, absent]
    default: present
  directory:
    description:
      - Directory to install into, that of C(pitr-wal).
    type: path
    required: true
  login_host:
    description:
      - Host name or address of the primary. Required with O(state=present).
    type: str
  login_port:
    description:
      - Port of the primary.
    type: int
    default: 5432
  login_user:
    description:
      - Role that takes base backups. Required with O(state=present).
    type: str
  login_password:
    description:
      - Password of the role.
    type: str
    default: ''
  ssl_mode:
    description:
      - Whether the connection is encrypted, and the server's certificate verified; sslmode of libpq.
    type: str
    choices: [disable, allow, prefer, require, verify-ca, verify-full]
    default: prefer
  ca_cert:
    description:
      - File with the certificates of the authorities that O(ssl_mode=verify-ca) and O(ssl_mode=verify-full) trust;
        sslrootcert of libpq.
    type: path
    default: ''
  type:
    description:
      - See M(pgdrill.pitr.base_backup).
    type: str
    choices: [full, incremental, auto]
    default: full
  full_every:
    description:
      - See M(pgdrill.pitr.base_backup).
    type: str
    default: 7 days
  max_chain:
    description:
      - See M(pgdrill.pitr.base_backup).
    type: int
    default: 24
  compression:
    description:
      - See M(pgdrill.pitr.base_backup).
    type: str
    default: auto
  checkpoint:
    description:
      - See M(pgdrill.pitr.base_backup).
    type: str
    choices: [fast, spread]
    default: fast
  max_rate:
    description:
      - See M(pgdrill.pitr.base_backup).
    type: str
    default: ''
  verify:
    description:
      - See M(pgdrill.pitr.base_backup).
    type: bool
    default: true
  archive_timeout:
    description:
      - See M(pgdrill.pitr.base_backup).
    type: int
    default: 600
  keep_full:
    description:
      - See M(pgdrill.pitr.expire). V(0) is no such rule.
    type: int
    default: 0
  recovery_window:
    description:
      - See M(pgdrill.pitr.expire).
    type: str
    default: ''
  backup_to_verify:
    description:
      - What C(pitr verify) reads when it is not told, V(latest), V(all) or a label.
    type: str
    default: latest
  verify_level:
    description:
      - See M(pgdrill.pitr.backup_verify).
    type: str
    choices: [stored, content]
    default: content
  identity:
    description:
      - Path of a file with age identities, to read the content of encrypted backups.
    type: str
    default: ''
  drill_directory:
    description:
      - Where C(pitr drill) makes its scratch directory, outside of the repository. Without it there are no drills.
    type: path
    default: ''
  drill_user:
    description:
      - A superuser of the cluster, as whom a drill reads its copy.
    type: str
    default: postgres
  drill_amcheck:
    description:
      - Whether a drill runs pg_amcheck.
    type: bool
    default: true
  drill_jobs:
    description:
      - Connections of pg_amcheck.
    type: int
    default: 2
  drill_timeout:
    description:
      - Seconds that the replay of a drill may take.
    type: int
    default: 86400
  drill_settings:
    description:
      - More settings of PostgreSQL for the server of a drill, such as C(shared_buffers).
    type: dict
    default: {}
  python:
    description:
      - Interpreter that runs the command; psycopg2 must be installed for it. Without it the one that runs this module,
        outside of its virtual environment.
    type: path
author:
  - pgdrill.pitr contributors (@pgdrill)
"""

EXAMPLES = r"""
- name: For the timers of the cluster main
  pgdrill.pitr.maintenance_command:
    directory: /usr/local/lib/pgdrill
    repository: /srv/pitr
    cluster: main
    bin_dir: /usr/lib/postgresql/18/bin
    login_host: db1.example.com
    login_user: pitr_backup
    login_password: "{{ vault_pitr_backup_password }}"
    keep_full: 7
"""

RETURN = r"""
removed:
  description: What was removed, or would be in check mode.
  returned: with O(state=absent)
  type: list
  elements: str
  sample: [/usr/local/lib/pgdrill/maintenance/main.json]
command:
  description: Path of the command.
  returned: with O(state=present)
  type: str
  sample: /usr/local/lib/pgdrill/pitr
written:
  description: Files that were written, or would be in check mode.
  returned: with O(state=present)
  type: list
  elements: str
  sample: ["/usr/local/lib/pgdrill/pitr"]
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
from ansible_collections.pgdrill.pitr.plugins.module_utils.maintenance_install import COMMAND, install
from ansible_collections.pgdrill.pitr.plugins.module_utils.maintenance_settings import Settings
from ansible_collections.pgdrill.pitr.plugins.module_utils.uninstall import uninstall

ARGUMENT_SPEC: dict[str, dict[str, Any]] = {
    **repository_argument_spec(),
    "bin_dir": {"type": "path", "required": True},
    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
    "directory": {"type": "path", "required": True},
    "login_host": {"type": "str"},
    "login_port": {"type": "int", "default": 5432},
    "login_user": {"type": "str"},
    "login_password": {"type": "str", "default": "", "no_log": True},
    "ssl_mode": {
        "type": "str",
        "choices": ["disable", "allow", "prefer", "require", "verify-ca", "verify-full"],
        "default": "prefer",
    },
    "ca_cert": {"type": "path", "default": ""},
    "type": {"type": "str", "choices": ["full", "incremental", "auto"], "default": "full"},
    "full_every": {"type": "str", "default": "7 days"},
    "max_chain": {"type": "int", "default": 24},
    "compression": {"type": "str", "default": "auto"},
    "checkpoint": {"type": "str", "choices": ["fast", "spread"], "default": "fast"},
    "max_rate": {"type": "str", "default": ""},
    "verify": {"type": "bool", "default": True},
    "archive_timeout": {"type": "int", "default": 600},
    "keep_full": {"type": "int", "default": 0},
    "recovery_window": {"type": "str", "default": ""},
    "backup_to_verify": {"type": "str", "default": "latest"},
    "verify_level": {"type": "str", "choices": ["stored", "content"], "default": "content"},
    "identity": {"type": "str", "default": ""},
    "drill_directory": {"type": "path", "default": ""},
    "drill_user": {"type": "str", "default": "postgres"},
    "drill_amcheck": {"type": "bool", "default": True},
    "drill_jobs": {"type": "int", "default": 2},
    "drill_timeout": {"type": "int", "default": 86400},
    "drill_settings": {"type": "dict", "default": {}},
    "python": {"type": "path"},
}


def run(module: AnsibleModule) -> dict[str, Any]:
    """Install, or take away."""
    params = module.params
    directory = params["directory"]
    if params["state"] == "absent":
        removed = uninstall(directory, params["cluster"], COMMAND, module.check_mode)
        gone: dict[str, Any] = {"changed": bool(removed), "removed": removed}
        if module._diff:
            gone["diff"] = {"before": "".join(f"{path}\n" for path in removed), "after": ""}
        return gone
    written = install(
        directory,
        params["cluster"],
        Settings.from_dict(params),
        params["login_password"],
        params["python"] or "",
        module.check_mode,
    )
    result: dict[str, Any] = {"changed": bool(written), "command": os.path.join(directory, COMMAND), "written": written}
    if module._diff:
        result["diff"] = {"before": "", "after": "".join(f"{path}\n" for path in written)}
    return result


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec=ARGUMENT_SPEC,
        required_if=[("state", "present", ("login_host", "login_user"))],
        supports_check_mode=True,
    )
    run_module(module, run)


if __name__ == "__main__":
    main()
