#!/usr/bin/python

# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: drill_check
short_description: Read the status row of a restored cluster and run pg_amcheck on it
version_added: 0.1.0
description:
  - Reads what M(pgdrill.pitr.drill_load) wrote and checks every heap and index (C(pg_amcheck --heapallindexed)) in
    every database.
  - Only collects; the verdict is made by M(pgdrill.pitr.drill_report).
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
    support: full
options:
  database:
    description:
      - Name of the drill's database.
    type: str
    default: pgdrill
  amcheck:
    description:
      - Whether to run pg_amcheck. It installs the extension amcheck where it is missing.
    type: bool
    default: true
  jobs:
    description:
      - Connections of pg_amcheck.
    type: int
    default: 2
author:
  - pgdrill.pitr contributors (@pgdrill)
"""

EXAMPLES = r"""
- name: What was restored?
  pgdrill.pitr.drill_check:
    login_unix_socket: /tmp/sandbox
    bin_dir: /usr/lib/postgresql/18/bin
"""

RETURN = r"""
status:
  description: The status row; empty when there is none.
  returned: success
  type: dict
  sample: {"sequence": 2, "phase": "before time"}
amcheck:
  description: Findings of pg_amcheck.
  returned: with O(amcheck=true)
  type: dict
  sample: {"ok": true, "databases": ["postgres", "pgdrill"], "findings": ""}
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
from ansible_collections.pgdrill.pitr.plugins.module_utils.load import check
from ansible_collections.pgdrill.pitr.plugins.module_utils.postgres import Login

ARGUMENT_SPEC: dict[str, dict[str, Any]] = {
    **login_argument_spec(),
    "bin_dir": {"type": "path", "required": True},
    "database": {"type": "str", "default": "pgdrill"},
    "amcheck": {"type": "bool", "default": True},
    "jobs": {"type": "int", "default": 2},
}


def run(module: AnsibleModule) -> dict[str, Any]:
    """Collect."""
    params = module.params
    if module.check_mode:
        return {"changed": False}
    found = check(Login.from_params(params), params["bin_dir"], params["database"], params["amcheck"], params["jobs"])
    return {"changed": False, **found}


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec=ARGUMENT_SPEC,
        supports_check_mode=True,
    )
    run_module(module, run)


if __name__ == "__main__":
    main()
