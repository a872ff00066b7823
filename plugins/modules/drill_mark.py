#!/usr/bin/python

# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: drill_mark
short_description: Remember in the repository that a drill was held
version_added: 0.2.0
description:
  - Notes the verdict of a drill in the cluster's folder, for monitoring to tell how long ago the last one passed. The
    role C(drill) does it; the evidence itself is what M(pgdrill.pitr.drill_report) writes.
extends_documentation_fragment:
  - pgdrill.pitr.repository
  - pgdrill.pitr.attributes
attributes:
  check_mode:
    support: full
  diff_mode:
    support: none
  idempotent:
    support: none
    details:
      - Each call is another drill.
options:
  verdict:
    description:
      - What the drill came to.
    type: str
    choices: [passed, failed]
    required: true
  scenarios:
    description:
      - Which disasters were rehearsed.
    type: list
    elements: str
    default: []
author:
  - pgdrill.pitr contributors (@pgdrill)
"""

EXAMPLES = r"""
- name: A drill was held
  pgdrill.pitr.drill_mark:
    repository: /srv/pitr
    cluster: main
    verdict: passed
    scenarios: [latest]
"""

RETURN = r"""
written:
  description: Whether it was written. A repository that this host may only read remembers nothing.
  returned: success
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
from ansible_collections.pgdrill.pitr.plugins.module_utils import activity
from ansible_collections.pgdrill.pitr.plugins.module_utils.boundary import repository_argument_spec, run_module
from ansible_collections.pgdrill.pitr.plugins.module_utils.repository import ClusterFolder

ARGUMENT_SPEC: dict[str, dict[str, Any]] = {
    **repository_argument_spec(),
    "verdict": {"type": "str", "choices": ["passed", "failed"], "required": True},
    "scenarios": {"type": "list", "elements": "str", "default": []},
}


def run(module: AnsibleModule) -> dict[str, Any]:
    """Write it down."""
    params = module.params
    path = activity.path_of(ClusterFolder.open(params["repository"], params["cluster"]))
    if module.check_mode:
        return {"changed": bool(path), "written": False}
    entry = {"verdict": params["verdict"], "scenarios": params["scenarios"]}
    written = activity.add(path, activity.DRILL, entry)
    return {"changed": written, "written": written}


def main() -> None:
    """Entry point."""
    run_module(AnsibleModule(argument_spec=ARGUMENT_SPEC, supports_check_mode=True), run)


if __name__ == "__main__":
    main()
