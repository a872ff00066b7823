#!/usr/bin/python

# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: backup_info
short_description: List base backups and what can be restored from them
version_added: 0.1.0
description:
  - Lists the complete backups of a cluster and the recovery window of each, the span of points that backup and
    archive can restore.
extends_documentation_fragment:
  - pgdrill.pitr.repository
  - pgdrill.pitr.ssh
  - pgdrill.pitr.chapter
  - pgdrill.pitr.attributes
attributes:
  check_mode:
    support: full
  diff_mode:
    support: N/A
  idempotent:
    support: full
author:
  - pgdrill.pitr contributors (@pgdrill)
"""

EXAMPLES = r"""
- name: What could be restored now?
  pgdrill.pitr.backup_info:
    repository: /var/lib/pitr
    cluster: main
  register: stored
"""

RETURN = r"""
backups:
  description:
    - Complete backups of all chapters, oldest first, with C(backups[].chapter) (its number) and C(backups[].keep),
      the reason of its keep mark or V(null).
  returned: success
  type: list
  elements: dict
  sample: [{"label": "20260301T142959Z-full", "type": "full", "timeline": 1, "chapter": 1, "keep": null}]
recovery_windows:
  description: For each backup of the chapter, from where to where it can be restored, or what is missing.
  returned: success
  type: list
  elements: dict
  sample:
    - backup: 20260301T142959Z-full
      from_time: "2026-03-01T14:30:02.503112+00:00"
      from_lsn: 0/2000120
      to_lsn: 0/9000000
      timeline: 1
      restorable: true
      problem: ""
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
    open_cluster,
    repository_argument_spec,
    run_module,
    ssh_argument_spec,
)
from ansible_collections.pgdrill.pitr.plugins.module_utils.info import backup_info

ARGUMENT_SPEC: dict[str, dict[str, Any]] = {
    **repository_argument_spec(),
    **ssh_argument_spec(),
    "chapter": {"type": "int"},
}


def run(module: AnsibleModule) -> dict[str, Any]:
    """List."""
    folder = open_cluster(module.params)
    return {"changed": False, **backup_info(folder, folder.select(module.params["chapter"]))}


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec=ARGUMENT_SPEC,
        supports_check_mode=True,
    )
    run_module(module, run)


if __name__ == "__main__":
    main()
