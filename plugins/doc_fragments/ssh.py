# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Options shared by modules that also reach a repository on another host: ssh_*."""

from __future__ import annotations


class ModuleDocFragment:
    """Read by ansible-doc."""

    DOCUMENTATION = r"""
options:
  ssh_identity:
    description:
      - Private key to log in to the repository host with, when O(repository) is C(ssh://user@host:port/absolute/path).
        Absolute path; the key has no passphrase.
      - Without it, ssh looks where it always looks.
    type: path
    default: ''
  ssh_known_hosts:
    description:
      - File that holds the repository host's key, in the format of ssh's C(known_hosts). Absolute path. A host with
        another key, or without one in there, is not talked to.
      - Without it, ssh looks where it always looks.
    type: path
    default: ''
  ssh_timeout:
    description:
      - Seconds after which a repository host that gives no sign of life is given up, 1 to 3600.
    type: int
    default: 30
"""
