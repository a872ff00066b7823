# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Options and attributes shared by modules: chapter."""

from __future__ import annotations


class ModuleDocFragment:
    """Read by ansible-doc."""

    DOCUMENTATION = r"""
options:
  chapter:
    description:
      - Number of a chapter of the cluster's folder. A chapter is one system identifier; C(pg_upgrade) begins another.
        M(pgdrill.pitr.backup_info) tells the number of each backup.
      - Without it the newest one.
    type: int
"""
