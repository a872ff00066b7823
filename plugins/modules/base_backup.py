#!/usr/bin/python

# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: base_backup
short_description: Take a base backup into a repository
version_added: 0.1.0
description:
  - Takes a full base backup over the replication protocol (C(pg_basebackup)) as compressed tar files.
  - The backup becomes visible by its last atomic write, after its WAL was seen in this repository's archive. A failed
    or killed backup leaves nothing that looks like one.
  - Runs on the repository host, or wherever the repository is mounted.
extends_documentation_fragment:
  - pgdrill.pitr.login
  - pgdrill.pitr.repository
  - pgdrill.pitr.bin_dir
  - pgdrill.pitr.attributes
attributes:
  check_mode:
    support: full
    details:
      - In check mode the server is asked everything, and no backup is taken.
  diff_mode:
    support: none
  idempotent:
    support: partial
    details:
      - Idempotent with O(when=missing).
options:
  type:
    description:
      - Kind of backup.
    type: str
    choices: [full]
    default: full
  label:
    description:
      - Name of the backup. Without one it is the UTC time of its start and its type.
    type: str
    default: ''
  compression:
    description:
      - V(none), V(gzip), V(lz4) or V(zstd), with an optional C(:level). Compressed by the server.
      - V(auto) is zstd where the server and this host have it, else lz4 where both have that, else gzip.
    type: str
    default: auto
  checkpoint:
    description:
      - V(fast) checkpoints at once, V(spread) spares the disks.
    type: str
    choices: [fast, spread]
    default: fast
  max_rate:
    description:
      - Upper limit of the transfer, as C(pg_basebackup --max-rate) takes it, for example V(32M).
    type: str
    default: ''
  verify:
    description:
      - Read the backup back before it becomes visible. From PostgreSQL 18 every file is compared with the manifest's
        checksum, before that with its size.
    type: bool
    default: true
  archive_timeout:
    description:
      - Seconds to wait for the archiver to deliver the backup's WAL.
    type: int
    default: 600
  when:
    description:
      - V(missing) takes a backup only when there is none yet.
    type: str
    choices: [always, missing]
    default: always
author:
  - pgdrill.pitr contributors (@pgdrill)
"""

EXAMPLES = r"""
- name: A full backup
  pgdrill.pitr.base_backup:
    login_host: db1.example.com
    login_user: pitr_backup
    repository: /var/lib/pitr
    cluster: main
    bin_dir: /usr/lib/postgresql/18/bin
"""

RETURN = r"""
backup:
  description: The backup as stored in its C(backup.json).
  returned: when a backup was taken
  type: dict
  sample:
    label: 20260301T142959Z-full
    type: full
    timeline: 1
    start_lsn: 0/2000028
    stop_lsn: 0/2000120
    started_at: "2026-03-01T14:29:59.123456+00:00"
    stopped_at: "2026-03-01T14:30:02.503112+00:00"
    stored_bytes: 3441163
    database_bytes: 23443211
    verified: checksums
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

import contextlib
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.pgdrill.pitr.plugins.module_utils.backup import BaseBackup, stored_backups
from ansible_collections.pgdrill.pitr.plugins.module_utils.boundary import (
    login_argument_spec,
    repository_argument_spec,
    run_module,
)
from ansible_collections.pgdrill.pitr.plugins.module_utils.postgres import Login
from ansible_collections.pgdrill.pitr.plugins.module_utils.repository import ClusterFolder, require_directory

ARGUMENT_SPEC: dict[str, dict[str, Any]] = {
    **login_argument_spec(),
    **repository_argument_spec(),
    "bin_dir": {"type": "path", "required": True},
    "type": {"type": "str", "choices": ["full"], "default": "full"},
    "label": {"type": "str", "default": ""},
    "compression": {"type": "str", "default": "auto"},
    "checkpoint": {"type": "str", "choices": ["fast", "spread"], "default": "fast"},
    "max_rate": {"type": "str", "default": ""},
    "verify": {"type": "bool", "default": True},
    "archive_timeout": {"type": "int", "default": 600},
    "when": {"type": "str", "choices": ["always", "missing"], "default": "always"},
}


def run(module: AnsibleModule) -> dict[str, Any]:
    """Take the backup."""
    params = module.params
    require_directory(params["repository"])
    folder = ClusterFolder.open(params["repository"], params["cluster"])
    if params["when"] == "missing":
        current = folder.chapter.system_identifier
        there = [backup for backup in stored_backups(folder) if backup.system_identifier == current]
        if there:
            return {"changed": False, "backup": there[-1].to_dict()}
    login = Login.from_params(params)
    work = BaseBackup(
        folder,
        login,
        params["bin_dir"],
        compression=params["compression"],
        checkpoint=params["checkpoint"],
        max_rate=params["max_rate"],
        verify=params["verify"],
        label=params["label"],
        archive_timeout=params["archive_timeout"],
    )
    if module.check_mode:
        with contextlib.closing(login.connect()) as connection:
            work.check(connection)
        return {"changed": True}
    return {"changed": True, "backup": work.take().to_dict()}


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec=ARGUMENT_SPEC,
        supports_check_mode=True,
    )
    run_module(module, run)


if __name__ == "__main__":
    main()
