#!/usr/bin/python

# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: archive_probe
short_description: Prove that archiving works end to end
version_added: 0.1.0
description:
  - Writes a record, switches WAL, and waits until that very segment lies in the repository. Where the server's own
    file can be read, the content is compared byte by byte.
  - Fails with the archiver's last failure when nothing arrives.
extends_documentation_fragment:
  - pgdrill.pitr.login
  - pgdrill.pitr.repository
  - pgdrill.pitr.ssh
  - pgdrill.pitr.attributes
attributes:
  check_mode:
    support: full
    details:
      - In check mode nothing is switched and nothing is proven.
  diff_mode:
    support: N/A
  idempotent:
    support: full
options:
  timeout:
    description:
      - Seconds to wait.
    type: int
    default: 60
author:
  - pgdrill.pitr contributors (@pgdrill)
"""

EXAMPLES = r"""
- name: Does archiving work?
  pgdrill.pitr.archive_probe:
    login_unix_socket: /var/run/postgresql
    repository: /var/lib/pitr
    cluster: main
"""

RETURN = r"""
segment:
  description: The segment that arrived.
  returned: when not in check mode
  type: str
  sample: "000000010000000000000007"
lsn:
  description: Position after the switch.
  returned: when not in check mode
  type: str
  sample: 0/7A21F08
compared:
  description: Whether the content was compared with the server's file, or only the arrival was seen.
  returned: when not in check mode
  type: bool
  sample: true
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
    open_cluster,
    repository_argument_spec,
    run_module,
    ssh_argument_spec,
)
from ansible_collections.pgdrill.pitr.plugins.module_utils.postgres import Login
from ansible_collections.pgdrill.pitr.plugins.module_utils.probe import Probe

ARGUMENT_SPEC: dict[str, dict[str, Any]] = {
    **login_argument_spec(),
    **repository_argument_spec(),
    **ssh_argument_spec(),
    "timeout": {"type": "int", "default": 60},
}


def run(module: AnsibleModule) -> dict[str, Any]:
    """Probe. A switched segment is what the server does by itself all day, so it is not called a change."""
    params = module.params
    if module.check_mode:
        return {"changed": False}
    folder = open_cluster(params)
    return {"changed": False, **Probe(Login.from_params(params), folder, params["timeout"]).switch_and_wait().to_dict()}


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec=ARGUMENT_SPEC,
        supports_check_mode=True,
    )
    run_module(module, run)


if __name__ == "__main__":
    main()
