#!/usr/bin/python

# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: monitoring_command
short_description: Install the command pitr-status that tells how a cluster's archive and backups are
version_added: 0.2.0
description:
  - Installs C(pitr-status) and its settings for one cluster on the repository host, and C(pitr) beside it, with which
    it shares code and password file.
  - With O(state=absent) the settings go, and the password where C(pitr) does not use it. The commands stay.
  - Run it as the user that owns the repository. The password lies in a file with mode 0600, and is in no command line.
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
      - Whether the cluster is watched from here.
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
      - Host name or address of the primary; a path beginning with a slash is the directory of its socket.
    type: str
    required: true
  login_port:
    description:
      - Port of the primary.
    type: int
    default: 5432
  login_user:
    description:
      - Role that asks. It needs C(pg_monitor).
    type: str
    required: true
  login_password:
    description:
      - Password of the role.
    type: str
    default: ''
  limits:
    description:
      - Limits that differ from the defaults, each a list of two, C([warning, critical]); V(0) is never. Spans of time
        are like V(26 h), sizes like V(2GB). The names are C(full_age), C(backup_age), C(verify_age), C(drill_age),
        C(archive_lag), C(archive_lag_bytes), C(receiver_lag_bytes), C(slot_bytes), C(idle_slot_bytes), C(free_percent)
        and C(days_left).
    type: dict
    default: {}
  state_directory:
    description:
      - Directory for what was seen by earlier looks. Without it C(monitoring) below O(directory).
    type: str
    default: ''
  python:
    description:
      - Interpreter that runs the command; psycopg2 must be installed for it. Without it the one that runs this module,
        outside of its virtual environment.
    type: path
author:
  - pgdrill.pitr contributors (@pgdrill)
"""

EXAMPLES = r"""
- name: Watch the cluster main
  pgdrill.pitr.monitoring_command:
    directory: /usr/local/lib/pgdrill
    repository: /srv/pitr
    cluster: main
    login_host: db1.example.com
    login_user: pitr_backup
    login_password: "{{ vault_pitr_backup_password }}"
    limits:
      full_age: [2 days, 4 days]
"""

RETURN = r"""
command:
  description: Path of the command.
  returned: success
  type: str
  sample: /usr/local/lib/pgdrill/pitr-status
written:
  description: Files that were written or removed, or would be in check mode.
  returned: success
  type: list
  elements: str
  sample: ["/usr/local/lib/pgdrill/pitr-status"]
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
from ansible_collections.pgdrill.pitr.plugins.module_utils.maintenance_install import (
    STATUS_COMMAND,
    install,
    remove_monitoring,
)
from ansible_collections.pgdrill.pitr.plugins.module_utils.status import Settings

ARGUMENT_SPEC: dict[str, dict[str, Any]] = {
    **repository_argument_spec(),
    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
    "directory": {"type": "path", "required": True},
    "login_host": {"type": "str", "required": True},
    "login_port": {"type": "int", "default": 5432},
    "login_user": {"type": "str", "required": True},
    "login_password": {"type": "str", "default": "", "no_log": True},
    "limits": {"type": "dict", "default": {}},
    "state_directory": {"type": "str", "default": ""},
    "python": {"type": "path"},
}


def run(module: AnsibleModule) -> dict[str, Any]:
    """Install, or take away."""
    params = module.params
    directory, cluster = params["directory"], params["cluster"]
    if params["state"] == "absent":
        written = remove_monitoring(directory, cluster, module.check_mode)
    else:
        settings, python = Settings.from_dict(params), params["python"] or ""
        written = install(directory, cluster, settings, params["login_password"], python, module.check_mode)
    command = os.path.join(directory, STATUS_COMMAND)
    result: dict[str, Any] = {"changed": bool(written), "command": command, "written": written}
    if module._diff:
        result["diff"] = {"before": "", "after": "".join(f"{path}\n" for path in written)}
    return result


def main() -> None:
    """Entry point."""
    run_module(AnsibleModule(argument_spec=ARGUMENT_SPEC, supports_check_mode=True), run)


if __name__ == "__main__":
    main()
