# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Options and attributes shared by modules: repository."""

from __future__ import annotations


class ModuleDocFragment:
    """Read by ansible-doc."""

    DOCUMENTATION = r"""
options:
  repository:
    description:
      - Directory of the repository, as seen from the host that runs the module.
      - Modules with the option C(ssh_identity) also take C(ssh://user@host:port/absolute/path), a repository on
        another host. The others belong on the repository host itself.
    type: path
    required: true
  cluster:
    description:
      - Name of the cluster, which is its folder in the repository.
      - Letters, digits, dots, dashes and underscores.
    type: str
    required: true
"""
