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
  - Walks the archive of a cluster and tells which WAL it holds, what is missing in between, how old its newest
    segment is, and which WAL backups need and lack, or no backup needs.
  - Memory does not grow with the number of segments. A million of them take two to three seconds, most of that for
    their sizes.
  - With O(bin_dir) also when the last transaction in it ended, which is the latest time that can be restored.
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
  sizes:
    description:
      - Whether stored bytes are added up, which means a look at every file. Only done where O(repository) is a
        directory of the host.
    type: bool
    default: true
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
chapter:
  description: Which part of the folder this is about, as C(cluster.json) has it.
  returned: success
  type: dict
  sample:
    number: 1
    system_identifier: "7412345678901234567"
    wal_segment_size: 16777216
    postgresql_version: 18
    opened_at: "2026-03-01T12:00:00+00:00"
timelines:
  description:
    - Every timeline, where it came from (V(null) for C(timelines[].history) when its history file is missing), and the
      unbroken ranges of its segments, the newest 100.
  returned: success
  type: list
  elements: dict
  sample:
    - timeline: 2
      parent: 1
      switch_lsn: 0/7A21F08
      reason: no recovery target specified
      history: [{"timeline": 1, "until_lsn": 0/7A21F08}]
      segments: 7
      stored_bytes: 41231872
      ranges: [["000000020000000000000007", "00000002000000000000000D"]]
gaps:
  description:
    - Segments missing with WAL before and after them, at most 100 runs. C(gaps[].names) has the missing names, the
      first 100 of all runs.
  returned: success
  type: list
  elements: dict
  sample:
    - timeline: 1
      segments: 1
      first: "000000010000000000000004"
      last: "000000010000000000000004"
      names: ["000000010000000000000004"]
missing_segments:
  description: How many segments all gaps lack.
  returned: success
  type: int
  sample: 1
missing_for_backups:
  description:
    - Backups that lack WAL between their start and their stop, and so cannot be restored. At most 101 names each.
  returned: success
  type: list
  elements: dict
  sample: [{"backup": "20260301T142959Z-full", "segments": 1, "names": ["000000010000000000000004"]}]
unneeded:
  description: WAL that no backup needs, for each timeline. M(pgdrill.pitr.expire) removes it.
  returned: success
  type: list
  elements: dict
  sample:
    - timeline: 1
      first: "000000010000000000000001"
      last: "000000010000000000000001"
      segments: 1
unneeded_segments:
  description: How many segments that are.
  returned: success
  type: int
  sample: 1
unneeded_bytes:
  description: How many stored bytes; null without O(sizes).
  returned: success
  type: int
  sample: 16812
segments:
  description: Number of segments.
  returned: success
  type: int
  sample: 7
stored_bytes:
  description: What the WAL takes in the repository; null without O(sizes).
  returned: success
  type: int
  sample: 41231872
unknown_files:
  description: Files that are not WAL, at most 100. They are left alone.
  returned: success
  type: list
  elements: str
  sample: []
first_segment:
  description: Name of the segment that lies first in the WAL.
  returned: success
  type: str
  sample: "000000010000000000000001"
first_segment_archived_at:
  description: When it was stored, ISO 8601, UTC.
  returned: success
  type: str
  sample: "2026-02-22T14:31:07+00:00"
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
    "chapter": {"type": "int"},
    "bin_dir": {"type": "path"},
    "identity": {"type": "path"},
    "sizes": {"type": "bool", "default": True},
}


def run(module: AnsibleModule) -> dict[str, Any]:
    """Walk."""
    params = module.params
    folder = open_cluster(params)
    chapter = folder.select(params["chapter"])
    return {"changed": False, **archive_info(folder, params["bin_dir"] or "", chapter, params["sizes"])}


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec=ARGUMENT_SPEC,
        supports_check_mode=True,
    )
    run_module(module, run)


if __name__ == "__main__":
    main()
