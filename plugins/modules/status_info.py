#!/usr/bin/python

# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: status_info
short_description: Tell how a cluster's archiving, backups and repository are, and what to do
version_added: 0.2.0
description:
  - Looks at the primary and at the repository, and judges what it finds. C(pitr-status) is the same as a command.
  - A primary that does not answer is a finding, and what the repository tells is told all the same. The module fails
    only when it was called wrongly.
  - Run it on the repository host as the user that owns the repository.
extends_documentation_fragment:
  - pgdrill.pitr.repository
  - pgdrill.pitr.attributes
attributes:
  check_mode:
    support: full
  diff_mode:
    support: N/A
  idempotent:
    support: N/A
    details:
      - It tells what is now.
options:
  directory:
    description:
      - Directory of C(pitr-wal) and C(pitr) on this host, for the commands that findings name, and for settings that
        C(pitr-status) has there. O(limits) and O(state_directory) given here win over those.
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
author:
  - pgdrill.pitr contributors (@pgdrill)
"""

EXAMPLES = r"""
- name: How is the cluster main?
  pgdrill.pitr.status_info:
    directory: /usr/local/lib/pgdrill
    repository: /srv/pitr
    cluster: main
    login_host: db1.example.com
    login_user: pitr_backup
    login_password: "{{ vault_pitr_backup_password }}"
  register: status
  failed_when: status.level == 'CRITICAL'
"""

RETURN = r"""
level:
  description: The worst of all findings, V(OK), V(WARNING), V(CRITICAL) or V(UNKNOWN).
  returned: success
  type: str
  sample: WARNING
findings:
  description: One for each check, what it says, and the command to type first.
  returned: success
  type: list
  elements: dict
  sample:
    - check: full_backup
      level: WARNING
      says: 20260301T142959Z-full, 9.0 days old
      do: journalctl -u pitr-backup@main; /usr/local/lib/pgdrill/pitr backup main
facts:
  description: What is known, ages in seconds and sizes in bytes. Not a fixed interface, which C(findings) is.
  returned: success
  type: dict
  sample: {"archive_lag": 1048576}
text:
  description: The same for people, as lines.
  returned: success
  type: list
  elements: str
  sample: ["main: OK"]
row:
  description: One line of the table that the playbook C(status.yml) shows.
  returned: success
  type: str
  sample: main            OK
header:
  description: The line above it.
  returned: success
  type: str
  sample: cluster         status
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

import dataclasses
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.pgdrill.pitr.plugins.module_utils.boundary import repository_argument_spec, run_module
from ansible_collections.pgdrill.pitr.plugins.module_utils.postgres import Login
from ansible_collections.pgdrill.pitr.plugins.module_utils.repository import check_cluster_name
from ansible_collections.pgdrill.pitr.plugins.module_utils.status import Settings, look_and_judge, stored_settings
from ansible_collections.pgdrill.pitr.plugins.module_utils.statustext import fleet_header, fleet_row, table

ARGUMENT_SPEC: dict[str, dict[str, Any]] = {
    **repository_argument_spec(),
    "directory": {"type": "path", "required": True},
    "login_host": {"type": "str", "required": True},
    "login_port": {"type": "int", "default": 5432},
    "login_user": {"type": "str", "required": True},
    "login_password": {"type": "str", "default": "", "no_log": True},
    "limits": {"type": "dict", "default": {}},
    "state_directory": {"type": "str", "default": ""},
}


def run(module: AnsibleModule) -> dict[str, Any]:
    """Look."""
    params = module.params
    check_cluster_name(params["cluster"])
    settings = Settings.from_dict(params)
    stored = stored_settings(params["directory"], params["cluster"])
    if stored is not None:
        settings = dataclasses.replace(
            settings,
            limits={**stored.limits, **settings.limits},
            state_directory=settings.state_directory or stored.state_directory,
        )
    # The timer remembers. A look by somebody else leaves nothing behind.
    found = look_and_judge(params["directory"], params["cluster"], settings, Login.from_params(params), keep=False)
    told = found.to_dict()
    return {
        "changed": False,
        "level": told["level"],
        "findings": told["findings"],
        "facts": told["facts"],
        "text": table(found),
        "row": fleet_row(found),
        "header": fleet_header(),
    }


def main() -> None:
    """Entry point."""
    run_module(AnsibleModule(argument_spec=ARGUMENT_SPEC, supports_check_mode=True), run)


if __name__ == "__main__":
    main()
