#!/usr/bin/python

# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: restore_point
short_description: Create a named restore point that is archived before the task returns
version_added: 0.1.0
description:
  - Creates a restore point, switches WAL and waits until the segment that holds it lies in the repository, so that it
    can be restored to from then on.
extends_documentation_fragment:
  - pgdrill.pitr.login
  - pgdrill.pitr.repository
  - pgdrill.pitr.ssh
  - pgdrill.pitr.attributes
attributes:
  check_mode:
    support: full
  diff_mode:
    support: none
  idempotent:
    support: none
    details:
      - Each run creates another restore point.
options:
  name:
    description:
      - Name of the restore point, at most 63 bytes. A name may exist more than once; recovery stops at the first one
        after the backup.
    type: str
    required: true
  timeout:
    description:
      - Seconds to wait for the archiver.
    type: int
    default: 60
author:
  - pgdrill.pitr contributors (@pgdrill)
"""

EXAMPLES = r"""
- name: Before the migration
  pgdrill.pitr.restore_point:
    login_unix_socket: /var/run/postgresql
    repository: /var/lib/pitr
    cluster: main
    name: before migration 2026-03
"""

RETURN = r"""
lsn:
  description: End of the restore point's record.
  returned: when not in check mode
  type: str
  sample: 0/7A21F08
segment:
  description: The segment that holds it.
  returned: when not in check mode
  type: str
  sample: "000000010000000000000007"
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
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.plugins.module_utils.postgres import Login
from ansible_collections.pgdrill.pitr.plugins.module_utils.probe import Probe
from ansible_collections.pgdrill.pitr.plugins.module_utils.target import MAX_NAME_BYTES

ARGUMENT_SPEC: dict[str, dict[str, Any]] = {
    **login_argument_spec(),
    **repository_argument_spec(),
    **ssh_argument_spec(),
    "name": {"type": "str", "required": True},
    "timeout": {"type": "int", "default": 60},
}


def run(module: AnsibleModule) -> dict[str, Any]:
    """Create and wait."""
    params = module.params
    if not params["name"] or len(params["name"].encode()) > MAX_NAME_BYTES:
        raise PitrError(f"A restore point's name has 1 to {MAX_NAME_BYTES} bytes. None was created.")
    folder = open_cluster(params)
    if module.check_mode:
        return {"changed": True}
    lsn, archived = Probe(Login.from_params(params), folder, params["timeout"]).restore_point(params["name"])
    return {"changed": True, "lsn": lsn, "segment": archived.segment}


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec=ARGUMENT_SPEC,
        supports_check_mode=True,
    )
    run_module(module, run)


if __name__ == "__main__":
    main()
