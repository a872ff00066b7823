#!/usr/bin/python

# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: settings
short_description: Keep settings of a server in one include file
version_added: 0.1.0
description:
  - Writes settings to a file below C(conf.d) of the configuration directory, makes postgresql.conf read that
    directory, and reloads a running server.
  - Tells which settings wait for a restart, so that a server is restarted only when one does.
extends_documentation_fragment:
  - pgdrill.pitr.login
  - pgdrill.pitr.attributes
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
  idempotent:
    support: full
options:
  config_dir:
    description:
      - Where postgresql.conf is.
    type: path
    required: true
  pgdata:
    description:
      - Data directory, to know whether a server is running. Without it the same as O(config_dir).
    type: path
  file:
    description:
      - Name of the file below C(conf.d).
    type: str
    default: 50-pitr.conf
  settings:
    description:
      - Settings by name. Booleans become C(on) and C(off). Required with O(state=present).
      - Certificates that they name (C(ssl_cert_file), C(ssl_key_file), C(ssl_ca_file)) are tried before, as the user
        that runs the module. A running server is let read them again when the files are newer than what it has read.
    type: dict
  state:
    description:
      - V(absent) removes the file, and, when it was the last one below C(conf.d), the line of postgresql.conf that this
        module has added.
    type: str
    choices: [present, absent]
    default: present
  reload:
    description:
      - Let a running server read its files again even when the settings have not changed, for example after a change
        of C(pg_hba.conf).
    type: bool
    default: false
author:
  - pgdrill.pitr contributors (@pgdrill)
"""

EXAMPLES = r"""
- name: Archive
  pgdrill.pitr.settings:
    login_unix_socket: /var/run/postgresql
    config_dir: /etc/postgresql/18/main
    pgdata: /var/lib/postgresql/18/main
    settings:
      wal_level: replica
      archive_mode: true
"""

RETURN = r"""
path:
  description: The include file.
  returned: success
  type: str
  sample: /etc/postgresql/18/main/conf.d/50-pitr.conf
running:
  description: Whether a server was running.
  returned: success
  type: bool
  sample: true
pending_restart:
  description: Settings that only a restart brings into force.
  returned: success
  type: list
  elements: str
  sample: [archive_mode]
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
from ansible_collections.pgdrill.pitr.plugins.module_utils.boundary import login_argument_spec, run_module
from ansible_collections.pgdrill.pitr.plugins.module_utils.certificates import check, files, newer_than
from ansible_collections.pgdrill.pitr.plugins.module_utils.postgres import Login, running_pid
from ansible_collections.pgdrill.pitr.plugins.module_utils.recovery_conf import INCLUDE_DIR
from ansible_collections.pgdrill.pitr.plugins.module_utils.settings import apply, loaded_at, remove, render, write

ARGUMENT_SPEC: dict[str, dict[str, Any]] = {
    **login_argument_spec(),
    "config_dir": {"type": "path", "required": True},
    "pgdata": {"type": "path"},
    "file": {"type": "str", "default": "50-pitr.conf"},
    "settings": {"type": "dict"},
    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
    "reload": {"type": "bool", "default": False},
}


def run(module: AnsibleModule) -> dict[str, Any]:
    """Write, reload, ask."""
    params = module.params
    config_dir = params["config_dir"]
    pgdata = params["pgdata"] or config_dir
    wanted: dict[str, str] = {}
    if params["state"] == "absent":
        text = ""
        changed, old = remove(config_dir, params["file"], module.check_mode)
    else:
        text = render(params["settings"], "Managed by pgdrill.pitr; changes are overwritten.")
        check(params["settings"], pgdata)
        wanted = files(params["settings"], pgdata)
        changed, old = write(config_dir, params["file"], text, module.check_mode)
    running = running_pid(pgdata) is not None
    pending: list[str] = []
    if running:
        login = Login.from_params(params)
        changed = changed or newer_than(wanted.values(), loaded_at(login) if wanted else 0)
        pending = apply(login, (changed or params["reload"]) and not module.check_mode)
    path = os.path.join(config_dir, INCLUDE_DIR, params["file"])
    result: dict[str, Any] = {"changed": changed, "path": path, "running": running, "pending_restart": pending}
    if module._diff:
        result["diff"] = {"before_header": path, "after_header": path, "before": old, "after": text}
    return result


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec=ARGUMENT_SPEC,
        required_if=[("state", "present", ("settings",))],
        supports_check_mode=True,
    )
    run_module(module, run)


if __name__ == "__main__":
    main()
