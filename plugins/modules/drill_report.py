#!/usr/bin/python

# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: drill_report
short_description: Write the evidence of a drill and give the verdict
version_added: 0.1.0
description:
  - Turns the results of a drill's tasks into C(evidence.json) and a summary on the terminal.
  - The verdict is V(passed) only when every scenario that was asked for is there and every proof of it is. What was
    not measured counts as failed, by name.
  - Runs on the controller, whatever host the task is for.
  - The task itself does not fail by a failed verdict, so that what comes after it can tidy up; assert on RV(verdict).
extends_documentation_fragment:
  - pgdrill.pitr.attributes
attributes:
  check_mode:
    support: full
  diff_mode:
    support: none
  idempotent:
    support: none
options:
  directory:
    description:
      - Directory of this drill's evidence. A link C(latest) beside it is set to it.
    type: path
    required: true
  drill:
    description:
      - What the drill collected. The role pgdrill.pitr.drill fills it.
    type: dict
    required: true
author:
  - pgdrill.pitr contributors (@pgdrill)
"""

EXAMPLES = r"""
- name: Evidence
  pgdrill.pitr.drill_report:
    directory: ./evidence/20260301T143000Z
    drill:
      cluster: main
      postgresql_version: 18
      started_at: "2026-03-01T14:30:00+00:00"
      requested: [latest]
      scenarios: "{{ drill_results }}"
"""

RETURN = r"""
verdict:
  description: V(passed) or V(failed).
  returned: success
  type: str
  sample: passed
failures:
  description: Everything that speaks against it.
  returned: success
  type: list
  elements: str
  sample: []
msg:
  description: The failures as one text, empty when there is none.
  returned: success
  type: str
  sample: ""
paths:
  description: The files that were written.
  returned: success
  type: dict
  sample: {"json": "./evidence/20260301T143000Z/evidence.json", "latest": "./evidence/latest"}
summary:
  description: The lines for the terminal.
  returned: success
  type: list
  elements: str
  sample: ["  Drill of cluster main, PostgreSQL 18"]
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

# The work is done on the controller by the action plugin of the same name: evidence belongs to who runs the drill.
