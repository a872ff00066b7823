#!/usr/bin/python

# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: recovery
short_description: Wait for a recovery to reach its target, resume, promote, accept
version_added: 0.1.0
description:
  - Waits for a restored server until it has reached its recovery target, and compares where PostgreSQL says that it
    stopped with what was asked for.
  - While it waits, the controller shows the progress.
  - A server that dies, ends recovery early, or stops elsewhere fails the task, with the last lines of its log.
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
  pgdata:
    description:
      - Data directory of the server.
    type: path
    required: true
  config_dir:
    description:
      - Where postgresql.conf is, when it is not in the data directory.
    type: path
  state:
    description:
      - V(reached) waits until the target is reached (and, as the restore's action says, the server is promoted,
        paused or shut down there).
      - V(resumed) lets a paused recovery go on. V(promoted) ends recovery if it is still under way.
      - V(accepted) makes the recovered cluster an ordinary one. It removes the recovery settings, and WAL that was
        held back is archived from then on.
    type: str
    choices: [reached, resumed, promoted, accepted]
    default: reached
  log_file:
    description:
      - The server's log, whose end is shown when the server dies.
    type: path
  timeout:
    description:
      - Seconds to wait.
    type: int
    default: 3600
  return_after:
    description:
      - Return with RV(progress) after this many seconds when the target is not reached by then. The action plugin uses
        it to show the progress; leave it out.
    type: float
author:
  - pgdrill.pitr contributors (@pgdrill)
"""

EXAMPLES = r"""
- name: Wait for the target
  pgdrill.pitr.recovery:
    login_unix_socket: /var/run/postgresql
    pgdata: /var/lib/postgresql/18/main
    bin_dir: /usr/lib/postgresql/18/bin
    timeout: 7200

- name: It is what we wanted
  pgdrill.pitr.recovery:
    login_unix_socket: /var/run/postgresql
    pgdata: /var/lib/postgresql/18/main
    bin_dir: /usr/lib/postgresql/18/bin
    state: accepted
"""

RETURN = r"""
reached:
  description: Where the recovery stopped, in PostgreSQL's words and taken apart.
  returned: with O(state=reached)
  type: dict
  sample:
    lsn: 0/7A21F08
    reason: before 2026-03-01 13:29:59.104211+00
    time: "2026-03-01 13:29:59.104211+00"
    xid: ""
    name: ""
    last_transaction_time: "2026-03-01T13:29:58.934110+00:00"
timeline:
  description: Timeline that the server writes now, or replays.
  returned: when the server is running
  type: int
  sample: 2
pending_restart:
  description: Settings that only a restart brings into force.
  returned: with O(state=accepted)
  type: list
  elements: str
  sample: []
progress:
  description: How far the recovery is.
  returned: when the time was not enough
  type: dict
  sample: {"state": "replaying", "lsn": "0/5000000", "end_lsn": "0/8000000", "percent": 50.0, "remaining_seconds": 12.5}
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
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.plugins.module_utils.postgres import Login, running_pid
from ansible_collections.pgdrill.pitr.plugins.module_utils.rates import add_replay
from ansible_collections.pgdrill.pitr.plugins.module_utils.recovery import Recovery

ARGUMENT_SPEC: dict[str, dict[str, Any]] = {
    **login_argument_spec(),
    "bin_dir": {"type": "path", "required": True},
    "pgdata": {"type": "path", "required": True},
    "config_dir": {"type": "path"},
    "state": {"type": "str", "choices": ["reached", "resumed", "promoted", "accepted"], "default": "reached"},
    "log_file": {"type": "path"},
    "timeout": {"type": "int", "default": 3600},
    "return_after": {"type": "float"},
}


def reached(recovery: Recovery, params: dict[str, Any]) -> dict[str, Any]:
    """Wait. The controller waits in slices, to show the progress in between."""
    found, progress = recovery.wait(params["return_after"] or params["timeout"])
    if found is None:
        if params["return_after"]:
            return {"changed": False, "progress": progress.to_dict(), "progress_text": str(progress)}
        message = f"The target was not reached within {params['timeout']} seconds; the recovery goes on: {progress}."
        raise PitrError(message, progress=progress.to_dict())
    result: dict[str, Any] = {"changed": False, "reached": found.to_dict()}
    if running_pid(params["pgdata"]) is not None:
        result["timeline"] = recovery.timeline()
        # The next plan tells how long a replay will take.
        add_replay(recovery.planned(), params["pgdata"])
    return result


def run(module: AnsibleModule) -> dict[str, Any]:
    """Do one step."""
    params = module.params
    recovery = Recovery(
        Login.from_params(params),
        params["pgdata"],
        params["bin_dir"],
        params["config_dir"] or "",
        params["log_file"] or "",
    )
    state = params["state"]
    if state == "reached":
        return {"changed": False} if module.check_mode else reached(recovery, params)
    if module.check_mode:
        progress = recovery.progress().state
        waiting = {"resumed": progress == "paused", "promoted": progress in ("replaying", "paused")}
        return {"changed": waiting.get(state, bool(recovery.planned()))}
    if state == "accepted":
        if recovery.progress().state != "promoted":
            raise PitrError(f"The server in {params['pgdata']} is not promoted; there is nothing to accept yet.")
        changed, pending = recovery.accept()
        return {"changed": changed, "pending_restart": pending, "timeline": recovery.timeline()}
    changed = recovery.resume() if state == "resumed" else recovery.promote(params["timeout"])
    return {"changed": changed, "timeline": recovery.timeline()}


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec=ARGUMENT_SPEC,
        supports_check_mode=True,
    )
    run_module(module, run)


if __name__ == "__main__":
    main()
