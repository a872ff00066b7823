#!/usr/bin/python

# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: instance
short_description: Make, start and stop a cluster that no service manager owns
version_added: 0.1.0
description:
  - Runs C(initdb) and C(pg_ctl) for a data directory that belongs to the user that runs the module.
  - For packaged servers use their service; this module is for sandboxes, drills and clones.
extends_documentation_fragment:
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
  pgdata:
    description:
      - Data directory.
    type: path
    required: true
  state:
    description:
      - V(status) only looks. V(present) runs initdb when the directory is no cluster yet. V(started) and V(stopped)
        start and stop, V(restarted) does both.
      - V(killed) sends SIGKILL to the server, as a crash would.
    type: str
    choices: [status, present, started, stopped, restarted, killed]
    default: status
  mode:
    description:
      - How to stop.
    type: str
    choices: [smart, fast, immediate]
    default: fast
  initdb_options:
    description:
      - Further options of initdb.
    type: list
    elements: str
    default: []
  log_file:
    description:
      - Where the server's output goes. Without it a file beside the data directory.
    type: path
  wait:
    description:
      - Wait until a started server accepts connections. V(false) returns when it owns the directory, for recoveries
        that may take hours; see M(pgdrill.pitr.recovery).
    type: bool
    default: true
  timeout:
    description:
      - Seconds to wait.
    type: int
    default: 60
author:
  - pgdrill.pitr contributors (@pgdrill)
"""

EXAMPLES = r"""
- name: A cluster of our own
  pgdrill.pitr.instance:
    pgdata: /tmp/sandbox/data
    bin_dir: /usr/lib/postgresql/18/bin
    state: present
    initdb_options: [--username=postgres, --auth-local=trust]

- name: Start it
  pgdrill.pitr.instance:
    pgdata: /tmp/sandbox/data
    bin_dir: /usr/lib/postgresql/18/bin
    state: started
"""

RETURN = r"""
exists:
  description: Whether the directory is a cluster.
  returned: success
  type: bool
  sample: true
running:
  description: Whether a server is running on it.
  returned: success
  type: bool
  sample: true
pid:
  description: Its process id, 0 when it is not running.
  returned: success
  type: int
  sample: 4711
port:
  description: Its port, 0 when it is not running.
  returned: success
  type: int
  sample: 5432
system_identifier:
  description: Which cluster it is; empty when there is none.
  returned: success
  type: str
  sample: "7412345678901234567"
data_checksums:
  description: Whether its pages have checksums; null when there is no cluster.
  returned: success
  type: bool
  sample: true
standby:
  description: Whether it is, or will come up as, a standby (standby.signal).
  returned: success
  type: bool
  sample: false
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
from ansible_collections.pgdrill.pitr.plugins.module_utils.boundary import run_module
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.plugins.module_utils.instance import Instance, Status

ARGUMENT_SPEC: dict[str, dict[str, Any]] = {
    "bin_dir": {"type": "path", "required": True},
    "pgdata": {"type": "path", "required": True},
    "state": {
        "type": "str",
        "choices": ["status", "present", "started", "stopped", "restarted", "killed"],
        "default": "status",
    },
    "mode": {"type": "str", "choices": ["smart", "fast", "immediate"], "default": "fast"},
    "initdb_options": {"type": "list", "elements": "str", "default": []},
    "log_file": {"type": "path"},
    "wait": {"type": "bool", "default": True},
    "timeout": {"type": "int", "default": 60},
}


def change(instance: Instance, status: Status, params: dict[str, Any], check: bool) -> bool:
    """Bring the state about. Returns whether something was (or would be) changed."""
    state = params["state"]
    if state == "present":
        if not status.exists and not check:
            instance.initialize(params["initdb_options"])
        return not status.exists
    if state in ("started", "restarted") and not status.exists:
        if check:
            return True
        raise PitrError(f"{params['pgdata']} is not a data directory. Nothing was started.")
    stop = status.running and state in ("stopped", "restarted")
    start = state == "restarted" or (state == "started" and not status.running)
    kill = status.running and state == "killed"
    if not check:
        if kill:
            instance.kill()
        if stop:
            instance.stop(params["mode"])
        if start:
            instance.start(params["wait"])
    return stop or start or kill


def run(module: AnsibleModule) -> dict[str, Any]:
    """Look, change, look again."""
    params = module.params
    instance = Instance(params["bin_dir"], params["pgdata"], params["log_file"] or "", params["timeout"])
    before = instance.status()
    changed = change(instance, before, params, module.check_mode)
    status = instance.status() if changed and not module.check_mode else before
    return {"changed": changed, **status.__dict__}


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec=ARGUMENT_SPEC,
        supports_check_mode=True,
    )
    run_module(module, run)


if __name__ == "__main__":
    main()
