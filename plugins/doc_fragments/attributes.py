# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Options and attributes shared by modules: attributes."""

from __future__ import annotations


class ModuleDocFragment:
    """Read by ansible-doc."""

    DOCUMENTATION = r"""
options: {}
attributes:
  check_mode:
    description: Can run in C(check_mode) and return changed status prediction without modifying target.
  diff_mode:
    description: Shows what has changed, or would in C(check_mode), when in diff mode.
  idempotent:
    description: A second run with the same arguments, outside of check mode, reports no change.
  action_group:
    description: Use C(group/pgdrill.pitr.all) in C(module_defaults) to set defaults for this module.
    support: full
    membership:
      - pgdrill.pitr.all
"""
