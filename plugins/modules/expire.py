#!/usr/bin/python

# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: expire
short_description: Remove backups and WAL that a retention policy does not need
version_added: 0.2.0
description:
  - Removes the base backups that neither O(keep_full) nor O(recovery_window) needs, and then the WAL that no remaining
    backup needs. Without both nothing is removed.
  - What stays can always be restored. The last restorable backup, backups with a keep mark, those that a restore or a
    recovery is using, history files, and files that are not of this collection never go.
  - An incremental backup and what it builds upon go together or not at all.
  - It can be killed at any moment and run again. When a backup cannot be removed no WAL is.
  - Run it on the repository host, as the user that the repository belongs to.
extends_documentation_fragment:
  - pgdrill.pitr.repository
  - pgdrill.pitr.chapter
  - pgdrill.pitr.attributes
attributes:
  check_mode:
    support: full
    details:
      - The result lists exactly what would go.
  diff_mode:
    support: full
  idempotent:
    support: full
options:
  keep_full:
    description:
      - Keep so many of the newest full backups that can be restored, and all WAL since the oldest of them.
    type: int
  recovery_window:
    description:
      - Keep what is needed to restore to any point of this span of time before now, such as V(7 days), V(12 h) or
        V(1 day 12 h). Units are min, h, days and weeks.
      - With O(keep_full) whatever one of the two needs is kept.
    type: str
  state:
    description:
      - V(applied) applies the policy.
      - V(kept) gives O(backup) a keep mark, V(unkept) takes it away. A marked backup and all WAL since its start stay
        whatever the policy.
    type: str
    choices: [applied, kept, unkept]
    default: applied
  backup:
    description:
      - Label of the backup to mark.
    type: str
  reason:
    description:
      - Why it is kept, for those who wonder later.
    type: str
    default: kept
author:
  - pgdrill.pitr contributors (@pgdrill)
"""

EXAMPLES = r"""
- name: What would go?
  pgdrill.pitr.expire:
    repository: /var/lib/pitr
    cluster: main
    keep_full: 2
    recovery_window: 7 days
  check_mode: true
  diff: true

- name: Two full backups, and any point of the last week
  pgdrill.pitr.expire:
    repository: /var/lib/pitr
    cluster: main
    keep_full: 2
    recovery_window: 7 days

- name: Never remove the backup from before the migration
  pgdrill.pitr.expire:
    repository: /var/lib/pitr
    cluster: main
    state: kept
    backup: 20260301T142959Z-full
    reason: before the migration to the new tariffs
"""

RETURN = r"""
expired_backups:
  description: Backups that were removed, or would be in check mode, and why.
  returned: with O(state=applied)
  type: list
  elements: dict
  sample:
    - backup: 20260201T142959Z-full
      bytes: 3941821
      reasons: [the policy does not need it]
expired_segments:
  description:
    - WAL that was removed, or would be - count and stored bytes, for each timeline from where to where (at most 100),
      and the C(.backup) and C(.partial) files that go with it (the first 100).
  returned: with O(state=applied)
  type: dict
  sample:
    count: 212
    bytes: 41231872
    ranges:
      - timeline: 1
        first: "000000010000000000000001"
        last: "0000000100000000000000D4"
        segments: 212
        bytes: 41231872
    attached: ["000000010000000000000002.00000028.backup"]
kept_backups:
  description: Backups that stay, and why.
  returned: with O(state=applied)
  type: list
  elements: dict
  sample:
    - backup: 20260301T142959Z-full
      reasons: [one of the newest 2 full backups, the recovery window begins with it]
leftovers:
  description: Directories that an interrupted run had left, and that were, or would be, removed.
  returned: with O(state=applied)
  type: list
  elements: str
  sample: []
unknown_files:
  description: Files in the archive that are not WAL, at most 100. They are left alone.
  returned: with O(state=applied)
  type: list
  elements: str
  sample: []
notes:
  description: What else an operator should know, such as why nothing was removed.
  returned: with O(state=applied)
  type: list
  elements: str
  sample: []
chapter:
  description: Number of the chapter that this was about.
  returned: with O(state=applied)
  type: int
  sample: 1
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
from ansible_collections.pgdrill.pitr.plugins.module_utils.boundary import repository_argument_spec, run_module
from ansible_collections.pgdrill.pitr.plugins.module_utils.expire import Expiry, as_diff, set_mark
from ansible_collections.pgdrill.pitr.plugins.module_utils.repository import ClusterFolder
from ansible_collections.pgdrill.pitr.plugins.module_utils.retention import Policy

ARGUMENT_SPEC: dict[str, dict[str, Any]] = {
    **repository_argument_spec(),
    "chapter": {"type": "int"},
    "keep_full": {"type": "int"},
    "recovery_window": {"type": "str"},
    "state": {"type": "str", "choices": ["applied", "kept", "unkept"], "default": "applied"},
    "backup": {"type": "str"},
    "reason": {"type": "str", "default": "kept"},
}
REQUIRED_IF = [("state", "kept", ["backup"]), ("state", "unkept", ["backup"])]


def run(module: AnsibleModule) -> dict[str, Any]:
    """Apply the policy, or mark."""
    params = module.params
    folder = ClusterFolder.open(params["repository"], params["cluster"])
    if params["state"] != "applied":
        reason = (params["reason"] or "kept") if params["state"] == "kept" else None
        return {"changed": set_mark(folder, params["backup"], reason, module.check_mode)}
    policy = Policy.from_options(params["keep_full"], params["recovery_window"])
    result = Expiry(folder, policy, folder.select(params["chapter"])).run(module.check_mode)
    if module._diff:
        result["diff"] = as_diff(result)
    return result


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec=ARGUMENT_SPEC,
        supports_check_mode=True,
        required_if=REQUIRED_IF,
    )
    run_module(module, run)


if __name__ == "__main__":
    main()
