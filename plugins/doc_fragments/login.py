# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Options and attributes shared by modules: login."""

from __future__ import annotations


class ModuleDocFragment:
    """Read by ansible-doc."""

    DOCUMENTATION = r"""
options:
  login_host:
    description:
      - Host of the server. Without it and O(login_unix_socket), the local socket that libpq was built with.
    type: str
    default: ''
  login_port:
    description:
      - Port of the server.
    type: int
    default: 5432
  login_user:
    description:
      - Role to connect as.
    type: str
    default: postgres
  login_password:
    description:
      - Password of the role. It reaches PostgreSQL's own programs through a file with mode 0600, never through their
        arguments.
    type: str
    default: ''
  login_unix_socket:
    description:
      - Directory of the server's Unix socket.
    type: str
    default: ''
  login_db:
    description:
      - Database to connect to.
    type: str
    default: postgres
  ssl_mode:
    description:
      - Whether the connection is encrypted, and the server's certificate verified; sslmode of libpq.
    type: str
    choices: [disable, allow, prefer, require, verify-ca, verify-full]
    default: prefer
  ca_cert:
    description:
      - File with the certificates of the authorities that O(ssl_mode=verify-ca) and O(ssl_mode=verify-full) trust;
        sslrootcert of libpq.
    type: path
    default: ''
requirements:
  - psycopg2 on the host that runs the module
"""
