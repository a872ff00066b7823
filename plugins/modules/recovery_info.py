#!/usr/bin/python

# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: recovery_info
short_description: Show how far a running recovery is
version_added: 0.1.0
description:
  - Tells whether a server is recovering, how much of the planned WAL is replayed, and about how long it will still
    take.
  - Also before the server accepts connections.
extends_documentation_fragment:
  - pgdrill.pitr.login
  - pgdrill.pitr.bin_dir
  - pgdrill.pitr.attributes
attributes:
  check_mode:
    support: full
  diff_mode:
    support: N/A
  idempotent:
    support: full
options:
  pgdata:
    description:
      - Data directory of the server.
    type: path
    required: true
  config_dir:
    description:
      - Where postgresql.conf is, when it is not in the data directory.
    type: path
author:
  - pgdrill.pitr contributors (@pgdrill)
"""

EXAMPLES = r"""
- name: How far is it?
  pgdrill.pitr.recovery_info:
    login_unix_socket: /var/run/postgresql
    pgdata: /var/lib/postgresql/18/main
    bin_dir: /usr/lib/postgresql/18/bin
"""

RETURN = r"""
recovery:
  description:
    - The progress. C(state) is restoring, stopped, starting, replaying, paused or promoted.
    - C(lsn) is the end of what was replayed; as long as the server lets nobody in, the beginning of the segment that it
      works on. C(end_lsn) is where the target is, or at the latest will have been, when the plan has found no more.
      C(distance_bytes) is the way between them, C(percent) and C(remaining_seconds) are reckoned from it, and
      C(bytes_per_second) since the server was started. What is not known is null or empty.
  returned: success
  type: dict
  sample:
    state: replaying
    lsn: 0/5000000
    end_lsn: 0/8000000
    percent: 50.0
    remaining_seconds: 12.5
    timeline: 1
    distance_bytes: 50331648
    bytes_per_second: 4026531
    last_transaction_time: "2026-03-01T14:21:03.512311+00:00"
    target: time 2026-03-01 13:29:59.000000+00:00
plan:
  description: The restore's plan while its recovery is not accepted; empty otherwise.
  returned: success
  type: dict
  sample: {"backup": "20260301T142959Z-full", "target": "latest"}
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
from ansible_collections.pgdrill.pitr.plugins.module_utils.postgres import Login
from ansible_collections.pgdrill.pitr.plugins.module_utils.recovery import Recovery

ARGUMENT_SPEC: dict[str, dict[str, Any]] = {
    **login_argument_spec(),
    "bin_dir": {"type": "path", "required": True},
    "pgdata": {"type": "path", "required": True},
    "config_dir": {"type": "path"},
}


def run(module: AnsibleModule) -> dict[str, Any]:
    """Look once."""
    params = module.params
    recovery = Recovery(Login.from_params(params), params["pgdata"], params["bin_dir"], params["config_dir"] or "")
    return {"changed": False, "recovery": recovery.progress().to_dict(), "plan": recovery.planned()}


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec=ARGUMENT_SPEC,
        supports_check_mode=True,
    )
    run_module(module, run)


if __name__ == "__main__":
    main()
