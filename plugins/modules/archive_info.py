#!/usr/bin/python

# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: archive_info
short_description: Show timelines, ranges and gaps of a WAL archive
version_added: 0.1.0
description:
  - Walks the archive of a cluster and tells which WAL it holds, what is missing in between, and how old its newest
    segment is.
  - With O(bin_dir) also when the last transaction in it ended, which is the latest time that can be restored.
extends_documentation_fragment:
  - pgdrill.pitr.repository
  - pgdrill.pitr.ssh
  - pgdrill.pitr.attributes
attributes:
  check_mode:
    support: full
  diff_mode:
    support: N/A
  idempotent:
    support: full
options:
  bin_dir:
    description:
      - Directory of PostgreSQL's programs, for C(pg_waldump).
    type: path
  identity:
    description:
      - Path of a file with age identities, to read the last transaction when the archive is encrypted. Everything else
        is told without it.
    type: path
author:
  - pgdrill.pitr contributors (@pgdrill)
"""

EXAMPLES = r"""
- name: How fresh is the archive?
  pgdrill.pitr.archive_info:
    repository: /var/lib/pitr
    cluster: main
    bin_dir: /usr/lib/postgresql/18/bin
"""

RETURN = r"""
timelines:
  description: Every timeline, its parent and the unbroken ranges of its segments.
  returned: success
  type: list
  elements: dict
  sample:
    - timeline: 1
      parent: null
      switch_lsn: null
      reason: null
      segments: 7
      ranges: [["000000010000000000000001", "000000010000000000000007"]]
gaps:
  description: Segments missing between the first and the last of a timeline, at most 100 runs each.
  returned: success
  type: list
  elements: dict
  sample: [{"timeline": 1, "segments": 1, "first": "000000010000000000000004", "last": "000000010000000000000004"}]
segments:
  description: Number of segments.
  returned: success
  type: int
  sample: 7
unknown_files:
  description: Files that are not WAL, at most 100. They are left alone.
  returned: success
  type: list
  elements: str
  sample: []
last_segment:
  description: Name of the newest segment of the newest timeline.
  returned: success
  type: str
  sample: "000000010000000000000007"
last_segment_archived_at:
  description: When it was stored, ISO 8601, UTC.
  returned: success
  type: str
  sample: "2026-03-01T14:31:07+00:00"
last_commit_time:
  description: When the last transaction in the archive ended; null without O(bin_dir), or without a key to read it.
  returned: success
  type: str
  sample: "2026-03-01T14:31:06.882314+00:00"
last_commit_lsn:
  description: Where its record begins.
  returned: success
  type: str
  sample: 0/7A21F08
notes:
  description: What could not be told, and why.
  returned: success
  type: list
  elements: str
  sample: []
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
from ansible_collections.pgdrill.pitr.plugins.module_utils.info import archive_info

ARGUMENT_SPEC: dict[str, dict[str, Any]] = {
    **repository_argument_spec(),
    **ssh_argument_spec(),
    "bin_dir": {"type": "path"},
    "identity": {"type": "path"},
}


def run(module: AnsibleModule) -> dict[str, Any]:
    """Walk."""
    folder = open_cluster(module.params)
    return {"changed": False, **archive_info(folder, module.params["bin_dir"] or "")}


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec=ARGUMENT_SPEC,
        supports_check_mode=True,
    )
    run_module(module, run)


if __name__ == "__main__":
    main()
