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
  encryption_recipients:
    description:
      - Who everything that is stored from now on is encrypted to, as public keys of age (C(age1…)) or SSH
        (C(ssh-ed25519 …), C(ssh-rsa …)). Any one of their identities opens it.
      - What is stored already stays as it is. An empty list ends encryption; without this option nothing is changed.
      - C(age) must be installed on the primary and on the repository host before.
    type: list
    elements: str
  new_chapter:
    description:
      - Whether a folder that belongs to another system identifier may go on with this one, in a new chapter with an
        archive of its own. Everything of the older chapters stays, and can be restored with the option C(chapter).
      - For the step after C(pg_upgrade), or after an initdb on purpose. Never leave it set - it is what keeps a second
        cluster out of the folder.
    type: bool
    default: false
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

- name: From now on encrypted to two keys, of which either opens it
  pgdrill.pitr.repository:
    repository: /var/lib/pitr
    cluster: main
    system_identifier: "7412345678901234567"
    postgresql_version: 18
    encryption_recipients:
      - age1ql3z7hjy54pw3hyww5ayyfg7zqgvc7w3j2elw8zmrj2kg5sfn9aqmcac8p
      - ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIHsKLqeplhpW+uObz5dvMgjz1OxfM/XXUB+VHtZ6isGN offsite
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
chapter:
  description: Number of the chapter that is being written.
  returned: success
  type: int
  sample: 1
created:
  description: What was created or changed, or would be in check mode.
  returned: success
  type: list
  elements: str
  sample: ["/var/lib/pitr/main/archive"]
encryption_recipients:
  description: Who new files are encrypted to; empty when they are not.
  returned: success
  type: list
  elements: str
  sample: []
recipients_id:
  description: Short name of these recipients, as in the first line of every encrypted file of the archive.
  returned: success
  type: str
  sample: 3f2a90c1d4e5b677
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
from ansible_collections.pgdrill.pitr.plugins.module_utils.encryption import check_recipients, recipients_id
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.plugins.module_utils.repository import Chapter, create
from ansible_collections.pgdrill.pitr.plugins.module_utils.wal import valid_segment_size

ARGUMENT_SPEC: dict[str, dict[str, Any]] = {
    **repository_argument_spec(),
    "system_identifier": {"type": "str", "required": True},
    "postgresql_version": {"type": "int", "required": True},
    "wal_segment_size": {"type": "int", "default": 16777216},
    "encryption_recipients": {"type": "list", "elements": "str"},
    "new_chapter": {"type": "bool", "default": False},
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
    wanted = params["encryption_recipients"]
    recipients = None if wanted is None else check_recipients(wanted)
    folder, created = create(
        params["repository"], params["cluster"], chapter, module.check_mode, recipients, params["new_chapter"]
    )
    result: dict[str, Any] = {"changed": bool(created), "path": folder.path, "created": created}
    result["archive"] = folder.archive_path()
    result["chapter"] = folder.chapter.number
    result.update(encryption_recipients=folder.recipients, recipients_id=recipients_id(folder.recipients))
    if module._diff:
        before = folder.former_recipients[-1] if created and folder.former_recipients else []
        result["diff"] = {
            "before": "".join(f"recipient {item}\n" for item in before),
            "after": "".join(f"{path}\n" for path in created)
            + "".join(f"recipient {item}\n" for item in folder.recipients if created),
        }
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
