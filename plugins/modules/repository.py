#!/usr/bin/python

# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: repository
short_description: Create or validate a cluster folder in a repository
version_added: 0.1.0
description:
  - Makes a directory a repository, creates the folder of one cluster in it, and binds that folder to the cluster's
    system identifier.
  - A folder that is bound to another cluster is refused and left as it is; two clusters never share an archive.
extends_documentation_fragment:
  - pgdrill.pitr.repository
  - pgdrill.pitr.attributes
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
  idempotent:
    support: full
options:
  system_identifier:
    description:
      - System identifier of the cluster (C(pg_controldata), or RV(pgdrill.pitr.instance#module:system_identifier)).
    type: str
    required: true
  postgresql_version:
    description:
      - Major version of the cluster.
    type: int
    required: true
  wal_segment_size:
    description:
      - Size of its WAL segments in bytes.
    type: int
    default: 16777216
author:
  - pgdrill.pitr contributors (@pgdrill)
"""

EXAMPLES = r"""
- name: A folder for the cluster main
  pgdrill.pitr.repository:
    repository: /var/lib/pitr
    cluster: main
    system_identifier: "7412345678901234567"
    postgresql_version: 18
"""

RETURN = r"""
path:
  description: The cluster's folder.
  returned: success
  type: str
  sample: /var/lib/pitr/main
archive:
  description: The folder of the archive that is being written.
  returned: success
  type: str
  sample: /var/lib/pitr/main/archive/18-1
created:
  description: What was created, or would be in check mode.
  returned: success
  type: list
  elements: str
  sample: ["/var/lib/pitr/main/archive"]
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

import datetime
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.pgdrill.pitr.plugins.module_utils.boundary import repository_argument_spec, run_module
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.plugins.module_utils.repository import Chapter, create
from ansible_collections.pgdrill.pitr.plugins.module_utils.wal import valid_segment_size

ARGUMENT_SPEC: dict[str, dict[str, Any]] = {
    **repository_argument_spec(),
    "system_identifier": {"type": "str", "required": True},
    "postgresql_version": {"type": "int", "required": True},
    "wal_segment_size": {"type": "int", "default": 16777216},
}


def run(module: AnsibleModule) -> dict[str, Any]:
    """Create or validate."""
    params = module.params
    if not params["system_identifier"].isdigit():
        raise PitrError(f"system_identifier '{params['system_identifier']}' is not a number. Nothing was changed.")
    if not valid_segment_size(params["wal_segment_size"]):
        raise PitrError(f"wal_segment_size {params['wal_segment_size']} is not a power of two from 1 MB to 1 GB.")
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    chapter = Chapter(1, params["system_identifier"], params["wal_segment_size"], params["postgresql_version"], now)
    folder, created = create(params["repository"], params["cluster"], chapter, module.check_mode)
    result: dict[str, Any] = {"changed": bool(created), "path": folder.path, "created": created}
    result["archive"] = folder.archive_path()
    if module._diff:
        result["diff"] = {"before": "", "after": "".join(f"{path}\n" for path in created)}
    return result


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec=ARGUMENT_SPEC,
        supports_check_mode=True,
    )
    run_module(module, run)


if __name__ == "__main__":
    main()
