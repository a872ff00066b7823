#!/usr/bin/python

# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: backup_verify
short_description: Prove that stored backups and their WAL are whole
version_added: 0.2.0
description:
  - Reads stored backups back and compares them with what was written down when they were taken, with PostgreSQL's own
    manifest, and looks whether the WAL from their start to their stop is there and can be read.
  - Every damaged file is named. Nothing is changed.
  - Files are unpacked into the directory for temporary files (C(TMPDIR)) some at a time. It needs room for 256 MB, for
    the largest file of the database, and for the WAL of one backup.
extends_documentation_fragment:
  - pgdrill.pitr.repository
  - pgdrill.pitr.chapter
  - pgdrill.pitr.bin_dir
  - pgdrill.pitr.attributes
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
    details:
      - Shows what was stored and what is there of every damaged file.
  idempotent:
    support: full
options:
  backup:
    description:
      - Label of a backup, V(latest), or V(all) of the chapter.
    type: str
    default: latest
  level:
    description:
      - V(stored) compares the stored files with the sizes and digests that were written down, and looks whether the WAL
        is there. It needs no key.
      - V(content) also decompresses everything, compares every file with the checksum in the manifest, and reads the
        WAL with C(pg_waldump).
      - C(verified[].level) tells what was reached. Without a key for what is encrypted that is V(stored).
    type: str
    choices: [stored, content]
    default: content
  identity:
    description:
      - Path of a file with age identities, to read what is encrypted.
    type: path
  fail_on_damage:
    description:
      - Whether the module fails when something is damaged. It returns the same in any case.
    type: bool
    default: true
author:
  - pgdrill.pitr contributors (@pgdrill)
"""

EXAMPLES = r"""
- name: Every backup, to the last byte
  pgdrill.pitr.backup_verify:
    repository: /var/lib/pitr
    cluster: main
    bin_dir: /usr/lib/postgresql/18/bin
    backup: all
"""

RETURN = r"""
verified:
  description:
    - What was looked at, whether it is whole, and at which level. C(verified[].notes) tells why not at a higher one.
  returned: always
  type: list
  elements: dict
  sample:
    - backup: 20260301T142959Z-full
      level: content
      whole: true
      files: 2
      segments: 1
      notes: []
damaged:
  description: Everything that is not as it was stored, at most 1000 for each backup. Empty when all is whole.
  returned: always
  type: list
  elements: dict
  sample:
    - backup: 20260301T142959Z-full
      path: /var/lib/pitr/main/backups/20260301T142959Z-full/base.tar.gz
      problem: has other content than was stored
      stored: 3941821 bytes, sha256 5e88…
      found: 3941821 bytes, sha256 9f86…
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
from ansible_collections.pgdrill.pitr.plugins.module_utils.activity import add_verified
from ansible_collections.pgdrill.pitr.plugins.module_utils.boundary import repository_argument_spec, run_module
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.plugins.module_utils.index import scan
from ansible_collections.pgdrill.pitr.plugins.module_utils.repository import ClusterFolder
from ansible_collections.pgdrill.pitr.plugins.module_utils.stored import stored_backups
from ansible_collections.pgdrill.pitr.plugins.module_utils.verify import LEVELS, Verification, as_result, choose

ARGUMENT_SPEC: dict[str, dict[str, Any]] = {
    **repository_argument_spec(),
    "chapter": {"type": "int"},
    "bin_dir": {"type": "path", "required": True},
    "backup": {"type": "str", "default": "latest"},
    "level": {"type": "str", "choices": list(LEVELS), "default": "content"},
    "identity": {"type": "path"},
    "fail_on_damage": {"type": "bool", "default": True},
}


def run(module: AnsibleModule) -> dict[str, Any]:
    """Read everything."""
    params = module.params
    folder = ClusterFolder.open(params["repository"], params["cluster"], {"identity": params["identity"] or ""})
    chapter = folder.select(params["chapter"])
    backups = [b for b in stored_backups(folder) if b.system_identifier == chapter.system_identifier]
    work = Verification(folder, chapter, backups, scan(folder, chapter), params["bin_dir"], params["level"])
    result = as_result([work.verify(backup) for backup in choose(backups, params["backup"])], module._diff)
    if not module.check_mode:
        add_verified(folder, result["verified"])
    if result["damaged"] and params["fail_on_damage"]:
        names = ", ".join(f"{item['path']}: {item['problem']}" for item in result["damaged"][:5])
        more = f" and {len(result['damaged']) - 5} more" if len(result["damaged"]) > 5 else ""
        raise PitrError(f"Stored files are damaged: {names}{more}. Nothing was changed.", **result)
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
