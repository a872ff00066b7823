#!/usr/bin/python

# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: recovery
short_description: Wait for a recovery to reach its target, move it on, promote, accept
version_added: 0.1.0
description:
  - Waits for a restored server until it has reached its recovery target, and compares where PostgreSQL says that it
    stopped with what was asked for.
  - While it waits, the controller shows the progress.
  - A server that dies, ends recovery early, or stops elsewhere fails the task, with the last lines of its log.
extends_documentation_fragment:
  - pgdrill.pitr.login
  - pgdrill.pitr.ssh
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
      - V(moved) gives a recovery that is paused, or was stopped, a later target, without a new restore. Whether the
        target lies ahead, and whether the archive has the WAL up to it, is looked up first. The server must be started
        again afterwards; then wait for V(reached). It may be moved as often as you like, and never back.
      - V(resumed) lets a paused recovery go on. B(At its target that ends the recovery and promotes the server), which
        is waited for; a pause that somebody has asked for before the target just ends. RV(resumed) tells what it was.
      - V(promoted) ends a recovery that is paused. One that is still replaying goes on to its target first.
      - V(stopped) shuts a recovering server down, so that it can be started again and goes on.
      - V(accepted) makes the recovered cluster an ordinary one. It removes the recovery settings, lets ordinary users
        in, and WAL that was held back is archived from then on.
    type: str
    choices: [reached, moved, resumed, promoted, stopped, accepted]
    default: reached
  log_file:
    description:
      - The server's log, whose end is shown when the server dies, and which proves that a server has paused or shut
        down at its target. Where the logging collector is on, its files are found without this option.
    type: path
  repository:
    description:
      - Path or C(ssh://) address of the repository. Needed for O(state=moved).
    type: path
  cluster:
    description:
      - Name of the cluster in the repository. Needed for O(state=moved).
    type: str
  identity:
    description:
      - Path of a file with age identities on this host, when the WAL is encrypted. For O(state=moved).
    type: path
  recovery_target_time:
    description:
      - For O(state=moved), the new target. It must carry an offset from UTC.
    type: str
  recovery_target_xid:
    description:
      - For O(state=moved), the new target.
    type: str
  recovery_target_lsn:
    description:
      - For O(state=moved), the new target.
    type: str
  recovery_target_name:
    description:
      - For O(state=moved), the new target.
    type: str
  recovery_target_inclusive:
    description:
      - Whether the target itself is replayed.
    type: bool
    default: true
  recovery_target_timeline:
    description:
      - V(latest) or the number of a timeline that leads on from where the recovery stands. Without it the planned one.
    type: str
  recovery_target_action:
    description:
      - What the server does at the new target. Without it what was planned.
      - With the target as it was, only this is changed. That is how a server that has shut down at its target gets
        to pause or promote there.
    type: str
    choices: [promote, pause, shutdown]
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

- name: Not far enough; what would it take to get to half past two?
  pgdrill.pitr.recovery:
    login_unix_socket: /var/run/postgresql
    pgdata: /var/lib/postgresql/18/main
    bin_dir: /usr/lib/postgresql/18/bin
    repository: /var/lib/pitr
    cluster: main
    state: moved
    recovery_target_time: "2026-03-01 14:30:00+01:00"
  check_mode: true

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
  returned: with O(state=reached), and with O(state=promoted) when it was
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
collation_mismatches:
  description:
    - Collations whose version is another than the one that was recorded, with the statements to run in that database.
      C(collation) is V(default) for the database's own. C(problem) tells why a database could not be looked into.
  returned: with O(state=reached) and a running server, and with O(state=accepted)
  type: list
  elements: dict
  sample:
    - database: app
      collation: default
      recorded: "2.36"
      actual: "2.41"
      reindex:
        - REINDEX INDEX CONCURRENTLY public.customer_name
        - ALTER DATABASE app REFRESH COLLATION VERSION
      problem: ""
resumed:
  description:
    - What resuming did. V(promoted) at the target, V(continued) before it, V(stopped) when the server has stopped by
      itself, and empty when it was not paused.
  returned: with O(state=resumed)
  type: str
  sample: promoted
position:
  description: The end of what is replayed. No target before it can be reached any more.
  returned: with O(state=moved)
  type: str
  sample: 0/7A21F08
restart_required:
  description: Whether a server is running, that has to be started again to go on to the new target.
  returned: with O(state=moved)
  type: bool
  sample: true
plan:
  description: The plan of the rest of the way, as M(pgdrill.pitr.restore) returns it; C(moves) are the targets before.
  returned: with O(state=moved)
  type: dict
  sample: {"target": "time 2026-03-01 13:30:00.000000+00:00", "moved_from": "0/7A21F08"}
refusals:
  description: Why nothing was done, each with a stable code, a message and the nearest thing that would work.
  returned: when refused
  type: list
  elements: dict
  sample:
    - code: target_passed
      message: The target xid 745 lies at LSN 0/7000028, and the recovery stands at 0/7A21F08, behind it.
      nearest: A recovery only goes forward; restore again with this target.
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

import os
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.pgdrill.pitr.plugins.module_utils.boundary import (
    login_argument_spec,
    run_module,
    ssh_argument_spec,
    ssh_settings,
)
from ansible_collections.pgdrill.pitr.plugins.module_utils.collations import mismatches
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.plugins.module_utils.moves import Move, Request, stop
from ansible_collections.pgdrill.pitr.plugins.module_utils.postgres import Login, running_pid
from ansible_collections.pgdrill.pitr.plugins.module_utils.rates import add_replay
from ansible_collections.pgdrill.pitr.plugins.module_utils.recovery import Recovery

TARGET_OPTIONS: dict[str, dict[str, Any]] = {
    "recovery_target_time": {"type": "str"},
    "recovery_target_xid": {"type": "str"},
    "recovery_target_lsn": {"type": "str"},
    "recovery_target_name": {"type": "str"},
    "recovery_target_inclusive": {"type": "bool", "default": True},
    "recovery_target_timeline": {"type": "str"},
    "recovery_target_action": {"type": "str", "choices": ["promote", "pause", "shutdown"]},
}

ARGUMENT_SPEC: dict[str, dict[str, Any]] = {
    **login_argument_spec(),
    **ssh_argument_spec(),
    "bin_dir": {"type": "path", "required": True},
    "pgdata": {"type": "path", "required": True},
    "config_dir": {"type": "path"},
    "state": {
        "type": "str",
        "choices": ["reached", "moved", "resumed", "promoted", "stopped", "accepted"],
        "default": "reached",
    },
    "log_file": {"type": "path"},
    "repository": {"type": "path"},
    "cluster": {"type": "str"},
    "identity": {"type": "path"},
    **TARGET_OPTIONS,
    "timeout": {"type": "int", "default": 3600},
    "return_after": {"type": "float"},
}
REQUIRED_IF = [("state", "moved", ["repository", "cluster"])]


def _collations(params: dict[str, Any]) -> dict[str, Any]:
    return {"collation_mismatches": [item.to_dict() for item in mismatches(Login.from_params(params))]}


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
        result.update(timeline=recovery.timeline(), **_collations(params))
        # The next plan tells how long a replay will take.
        add_replay(recovery.planned(), params["pgdata"])
    return result


def moved(params: dict[str, Any], check: bool) -> dict[str, Any]:
    """Give the recovery a later target."""
    request = Request(
        login=Login.from_params(params),
        pgdata=params["pgdata"],
        bin_dir=params["bin_dir"],
        repository=params["repository"],
        cluster=params["cluster"],
        config_dir=params["config_dir"] or "",
        log_file=params["log_file"] or "",
        identity=os.path.abspath(params["identity"]) if params["identity"] else "",
        ssh=ssh_settings(params),
        target_options={name: params[name] for name in TARGET_OPTIONS},
    )
    done = Move(request).perform(check)
    return {
        "changed": done.changed,
        "plan": done.plan,
        "position": done.position,
        "restart_required": done.restart,
    }


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
    if state == "moved":
        return moved(params, module.check_mode)
    if state == "reached":
        return {"changed": False} if module.check_mode else reached(recovery, params)
    if module.check_mode:
        progress = recovery.progress().state
        waiting = {
            "resumed": progress == "paused",
            "promoted": progress in ("replaying", "paused"),
            "stopped": progress in ("starting", "replaying", "paused"),
        }
        return {"changed": waiting.get(state, bool(recovery.planned()))}
    if state == "stopped":
        return {"changed": stop(recovery, params["pgdata"], params["bin_dir"], params["timeout"])}
    if state == "accepted":
        if recovery.progress().state != "promoted":
            raise PitrError(f"The server in {params['pgdata']} is not promoted; there is nothing to accept yet.")
        changed, pending = recovery.accept()
        result = {"changed": changed, "pending_restart": pending, "timeline": recovery.timeline()}
        return {**result, **_collations(params)}
    if state == "resumed":
        resumed = recovery.go_on(params["timeout"])
        result = {"changed": bool(resumed), "resumed": resumed}
        return result if resumed == "stopped" else {**result, "timeline": recovery.timeline()}
    changed = recovery.promote(params["timeout"])
    result = {"changed": changed, "timeline": recovery.timeline()}
    if changed:
        found, _progress = recovery.wait(1)
        result["reached"] = found.to_dict() if found else {}
    return result


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec=ARGUMENT_SPEC,
        supports_check_mode=True,
        required_if=REQUIRED_IF,
    )
    run_module(module, run)


if __name__ == "__main__":
    main()
