#!/usr/bin/python

# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: installation_info
short_description: Where the distribution's packages have put PostgreSQL
version_added: 0.1.0
description:
  - Looks for PostgreSQL as Debian's, Ubuntu's and PGDG's packages install it, and returns its directories, its log and
    the name of its service. The role P(pgdrill.pitr.pitr#role) makes defaults of it.
extends_documentation_fragment:
  - pgdrill.pitr.attributes
attributes:
  check_mode:
    support: full
  diff_mode:
    support: none
    details: It changes nothing.
  idempotent:
    support: full
options:
  version:
    description:
      - Major version that is meant. Without it, that of the cluster that is found.
    type: int
  name:
    description:
      - What the packages call the cluster, such as V(main). Without it, O(preferred_name) when there is one, else the
        only cluster that there is.
    type: str
    default: ''
  preferred_name:
    description:
      - The name to look for first.
    type: str
    default: ''
  repository:
    description:
      - Repository on this host. When it knows the cluster O(cluster), and O(version) is not given, that one's version
        is taken.
    type: path
  cluster:
    description:
      - Name of the cluster in O(repository).
    type: str
    default: ''
  user:
    description:
      - A user of the host who has to be there; RV(missing) tells when there is none.
    type: str
    default: ''
  bin_dir:
    description:
      - Directory of PostgreSQL's programs, where it is none that packages use.
    type: path
author:
  - pgdrill.pitr contributors (@pgdrill)
"""

EXAMPLES = r"""
- name: Where is PostgreSQL
  pgdrill.pitr.installation_info:

- name: Of version 17
  pgdrill.pitr.installation_info:
    version: 17
"""

RETURN = r"""
installation:
  description:
    - Layout (V(debian), V(pgdg-el)), directories and names; C(exists) tells whether the cluster is there. Empty when no
      PostgreSQL was found in these layouts.
  returned: success
  type: dict
  sample:
    layout: debian
    postgresql_version: 17
    name: main
    bin_dir: /usr/lib/postgresql/17/bin
    pgdata: /var/lib/postgresql/17/main
    config_dir: /etc/postgresql/17/main
    service: postgresql@17-main
    log_file: /var/log/postgresql/postgresql-17-main.log
    exists: true
missing:
  description: What is not there of O(user) and PostgreSQL's programs, in words.
  returned: success
  type: list
  elements: str
  sample: [the user postgres, the programs of PostgreSQL]
seconds:
  description: How long the module took.
  returned: success
  type: float
  sample: 0.004
started_at:
  description: When it began, ISO 8601, UTC.
  returned: success
  type: str
  sample: "2026-03-01T14:29:59.123456+00:00"
finished_at:
  description: When it ended, ISO 8601, UTC.
  returned: success
  type: str
  sample: "2026-03-01T14:29:59.127112+00:00"
"""

import os
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.pgdrill.pitr.plugins.module_utils.boundary import run_module
from ansible_collections.pgdrill.pitr.plugins.module_utils.installation import detect, missing
from ansible_collections.pgdrill.pitr.plugins.module_utils.repository import ClusterFolder

ARGUMENT_SPEC: dict[str, dict[str, Any]] = {
    "version": {"type": "int"},
    "name": {"type": "str", "default": ""},
    "preferred_name": {"type": "str", "default": ""},
    "repository": {"type": "path"},
    "cluster": {"type": "str", "default": ""},
    "user": {"type": "str", "default": ""},
    "bin_dir": {"type": "path"},
}


def run(module: AnsibleModule) -> dict[str, Any]:
    """Look."""
    params = module.params
    version = params["version"]
    repository = params["repository"] or ""
    if version is None and os.path.exists(os.path.join(repository, params["cluster"], "cluster.json")):
        version = ClusterFolder.open(repository, params["cluster"]).chapter.postgresql_version
    found = detect(version, params["name"], params["preferred_name"])
    bin_dir = params["bin_dir"] or (found.bin_dir if found else "")
    return {
        "changed": False,
        "installation": found.to_dict() if found else {},
        "missing": missing(params["user"], bin_dir),
    }


def main() -> None:
    """Entry point."""
    run_module(AnsibleModule(argument_spec=ARGUMENT_SPEC, supports_check_mode=True), run)


if __name__ == "__main__":
    main()
