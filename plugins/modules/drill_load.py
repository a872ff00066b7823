#!/usr/bin/python

# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: drill_load
short_description: Make the load of a drill, with a mark for every recovery target
version_added: 0.1.0
description:
  - Makes a database of its own, loads it with C(pgbench), and rewrites one status row around each recovery target
    while pgbench is running.
  - A database of that name that was not made by a drill is never touched.
extends_documentation_fragment:
  - pgdrill.pitr.login
  - pgdrill.pitr.bin_dir
  - pgdrill.pitr.attributes
attributes:
  check_mode:
    support: full
  diff_mode:
    support: none
  idempotent:
    support: none
options:
  state:
    description:
      - V(prepared) makes the database with the status row V(base), V(loaded) runs the load.
    type: str
    choices: [prepared, loaded]
    required: true
  database:
    description:
      - Name of the drill's database.
    type: str
    default: pgdrill
  scenarios:
    description:
      - Targets to mark.
    type: list
    elements: str
    default: [latest]
  scale:
    description:
      - Scale factor of pgbench; 10 is about 150 MB.
    type: int
    default: 10
  clients:
    description:
      - Clients of pgbench.
    type: int
    default: 4
  jobs:
    description:
      - Threads of pgbench.
    type: int
    default: 2
  transactions:
    description:
      - Transactions of each client.
    type: int
    default: 200
  restore_point:
    description:
      - Name of the restore point for the scenario V(name).
    type: str
    default: pgdrill
author:
  - pgdrill.pitr contributors (@pgdrill)
"""

EXAMPLES = r"""
- name: Load
  pgdrill.pitr.drill_load:
    login_unix_socket: /tmp/sandbox
    bin_dir: /usr/lib/postgresql/18/bin
    state: loaded
    scenarios: [time, latest]
"""

RETURN = r"""
marks:
  description: For every scenario the options of M(pgdrill.pitr.restore) and the status row expected there.
  returned: with O(state=loaded)
  type: list
  elements: dict
  sample:
    - scenario: time
      options: {"recovery_target_time": "2026-03-01 13:29:59.104211+00:00"}
      expected: {"sequence": 2, "phase": "before time"}
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

from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.pgdrill.pitr.plugins.module_utils.boundary import login_argument_spec, run_module
from ansible_collections.pgdrill.pitr.plugins.module_utils.load import Load
from ansible_collections.pgdrill.pitr.plugins.module_utils.postgres import Login

ARGUMENT_SPEC: dict[str, dict[str, Any]] = {
    **login_argument_spec(),
    "bin_dir": {"type": "path", "required": True},
    "state": {"type": "str", "choices": ["prepared", "loaded"], "required": True},
    "database": {"type": "str", "default": "pgdrill"},
    "scenarios": {"type": "list", "elements": "str", "default": ["latest"]},
    "scale": {"type": "int", "default": 10},
    "clients": {"type": "int", "default": 4},
    "jobs": {"type": "int", "default": 2},
    "transactions": {"type": "int", "default": 200},
    "restore_point": {"type": "str", "default": "pgdrill"},
}


def run(module: AnsibleModule) -> dict[str, Any]:
    """Prepare or load."""
    params = module.params
    if module.check_mode:
        return {"changed": True, "marks": []}
    load = Load(Login.from_params(params), params["bin_dir"], params["database"])
    if params["state"] == "prepared":
        load.prepare()
        return {"changed": True, "marks": []}
    marks = load.run(
        params["scenarios"],
        params["scale"],
        params["clients"],
        params["jobs"],
        params["transactions"],
        params["restore_point"],
    )
    return {"changed": True, "marks": [mark.to_dict() for mark in marks]}


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec=ARGUMENT_SPEC,
        supports_check_mode=True,
    )
    run_module(module, run)


if __name__ == "__main__":
    main()
