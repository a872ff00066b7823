#!/usr/bin/python

# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: receiver
short_description: Receive WAL from a primary while it is written
version_added: 0.2.0
description:
  - Configures, starts and ends C(pitr-wal receive) on the repository host, which keeps C(pg_receivewal) running with a
    replication slot of its own and carries finished segments into the archive, by the same rules as C(archive_command).
  - With O(synchronous), and with O(application_name) in the primary's C(synchronous_standby_names), a commit that was
    acknowledged is on the repository's disk.
  - Run it as the user that owns the repository. M(pgdrill.pitr.wal_command) installs the command before.
extends_documentation_fragment:
  - pgdrill.pitr.login
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
      - V(status) only looks. V(present) writes the settings, for a service manager that runs the command.
      - V(started) also runs it in the background, where no service manager does, and waits until it receives.
        V(stopped) ends it.
      - V(streaming) starts nothing, and waits until the one that a service manager runs receives.
      - V(absent) ends it, drops the slot on the server, and removes the settings. What lies in the spool stays.
    type: str
    choices: [status, present, started, streaming, stopped, absent]
    default: status
  directory:
    description:
      - Directory that C(pitr-wal) is installed in.
    type: path
    required: true
  slot:
    description:
      - Name of the replication slot. Without one it is made of the cluster's name.
    type: str
    default: ''
  application_name:
    description:
      - What C(synchronous_standby_names) calls the receiver. Without one it is the slot's name.
    type: str
    default: ''
  synchronous:
    description:
      - Flush everything at once and tell the server so.
    type: bool
    default: false
  log_file:
    description:
      - Where its output goes with O(state=started). Without it a file beside the settings.
    type: path
  timeout:
    description:
      - Seconds to wait.
    type: int
    default: 60
author:
  - pgdrill.pitr contributors (@pgdrill)
"""

EXAMPLES = r"""
- name: Receive
  pgdrill.pitr.receiver:
    login_host: db1.example.com
    login_user: pitr_backup
    repository: /var/lib/pitr
    cluster: main
    bin_dir: /usr/lib/postgresql/18/bin
    directory: /usr/local/lib/pgdrill
    synchronous: true
    state: started

- name: How is it?
  pgdrill.pitr.receiver:
    repository: /var/lib/pitr
    cluster: main
    bin_dir: /usr/lib/postgresql/18/bin
    directory: /usr/local/lib/pgdrill
"""

RETURN = r"""
running:
  description: Whether it runs.
  returned: success
  type: bool
  sample: true
status:
  description:
    - What the receiver last wrote of itself; empty when there never was one. C(state) is starting, connecting, catching
      up, streaming, waiting (for the next try), refused or stopped.
  returned: success
  type: dict
  sample:
    application_name: pitr_main
    archived_lsn: 0/7000000
    archived_segment: "000000010000000000000006"
    connected_since: "2026-03-01T14:29:59+00:00"
    last_error: ""
    not_archived: {}
    not_received: null
    received_lsn: 0/7A21F08
    slot: pitr_main
    slot_lost_at: null
    state: streaming
    synchronous: true
    timeline: 1
restart_needed:
  description: Whether one that runs has to be started anew for its settings. A new password does not need it.
  returned: with O(state=present) and O(state=started)
  type: bool
  sample: false
slot:
  description: Name of the replication slot.
  returned: success
  type: str
  sample: pitr_main
application_name:
  description: What C(synchronous_standby_names) calls the receiver.
  returned: success
  type: str
  sample: pitr_main
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
from ansible_collections.pgdrill.pitr.plugins.module_utils.boundary import (
    login_argument_spec,
    repository_argument_spec,
    run_module,
)
from ansible_collections.pgdrill.pitr.plugins.module_utils.receiver_control import Control, Request
from ansible_collections.pgdrill.pitr.plugins.module_utils.upstream import Settings, default_slot

ARGUMENT_SPEC: dict[str, dict[str, Any]] = {
    **login_argument_spec(),
    **repository_argument_spec(),
    "bin_dir": {"type": "path", "required": True},
    "state": {
        "type": "str",
        "choices": ["status", "present", "started", "streaming", "stopped", "absent"],
        "default": "status",
    },
    "directory": {"type": "path", "required": True},
    "slot": {"type": "str", "default": ""},
    "application_name": {"type": "str", "default": ""},
    "synchronous": {"type": "bool", "default": False},
    "log_file": {"type": "path"},
    "timeout": {"type": "int", "default": 60},
}


def request(params: dict[str, Any]) -> Request:
    """The receiver that these options are of."""
    slot = params["slot"] or default_slot(params["cluster"])
    settings = Settings(
        bin_dir=params["bin_dir"],
        host=params["login_host"] or params["login_unix_socket"],
        port=params["login_port"],
        user=params["login_user"],
        slot=slot,
        application_name=params["application_name"] or slot,
        synchronous=params["synchronous"],
        sslmode=params["ssl_mode"],
        sslrootcert=params["ca_cert"],
    )
    return Request(
        repository=params["repository"],
        cluster=params["cluster"],
        directory=params["directory"],
        settings=settings,
        password=params["login_password"],
        log_file=params["log_file"] or "",
        timeout=params["timeout"],
    )


def run(module: AnsibleModule) -> dict[str, Any]:
    """Look, change, look again."""
    params = module.params
    wanted = request(params)
    control = Control(wanted)
    names = {"slot": wanted.settings.slot, "application_name": wanted.settings.application_name}
    state = params["state"]
    result: dict[str, Any] = {"changed": False, **names}
    if state in ("present", "started"):
        result["changed"], before, after = control.configure(module.check_mode)
        result["restart_needed"] = before != after
        if module._diff:
            result["diff"] = {"before": before, "after": after}
    if state == "started":
        restarted = control.ensure_running(result["restart_needed"], module.check_mode)
        result["changed"] = result["changed"] or restarted
    elif state == "streaming":
        control.wait(end_refused=False)
    elif state in ("stopped", "absent"):
        running = bool(control.pid())
        if running and not module.check_mode:
            control.stop()
        removed = control.remove(module.check_mode) if state == "absent" else False
        result["changed"] = running or removed
    return {**result, **control.status()}


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec=ARGUMENT_SPEC,
        supports_check_mode=True,
    )
    run_module(module, run)


if __name__ == "__main__":
    main()
