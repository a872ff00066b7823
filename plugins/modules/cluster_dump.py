#!/usr/bin/python
# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: cluster_dump
short_description: Dump a whole cluster in canonical form, and compare it with an earlier dump
description:
  - Dumps all of a running cluster with C(pg_dumpall), reduces it to a fingerprint, and keeps the dump if wanted.
  - Compares the cluster with an earlier dump. The earlier dump is the truth, the running cluster is what was
    restored.
  - Every difference counts, down to one byte of one row, an index, the password of a role, a setting, a line of
    C(pg_hba.conf), or a whole database. The first differences are shown with the line that differs.
  - The dump is streamed. Memory grows with the number of objects in the cluster, not with their size.
notes:
  - These differences are tolerated and listed in RV(explained). A sequence that stands ahead by at most 32 values,
    because the server writes WAL for 32 values of a sequence at once. A table or sequence that is C(UNLOGGED) and
    that the crash or the restore has reset, or that one of the dumps lacks because its server was in recovery.
    Nothing else is tolerated.
  - Settings are compared as the configuration files say, whether the server has loaded them yet or not. Left out are
    settings that tell where a cluster lives (C(port), C(data_directory), C(unix_socket_directories), C(config_file),
    C(hba_file), C(ident_file), C(external_pid_file)), and settings that a restore must change (C(archive_mode),
    C(archive_command), C(archive_library), C(archive_cleanup_command), C(restore_command), C(recovery_*),
    C(hot_standby), C(primary_conninfo), C(primary_slot_name)). The include file that M(pgdrill.pitr.restore) writes
    for a recovery is not read, so that settings it raises count with the value they have elsewhere.
  - Not compared, because C(pg_dumpall) does not write it, is the content of materialized views, of foreign tables, of
    tables that an extension owns and does not mark as configuration, and of databases that refuse connections. Such
    databases themselves are compared.
  - C(pg_dumpall) takes one snapshot for each database. While others write to the cluster, its dump is of no single
    moment.
  - Both dumps must be taken with the same major version of PostgreSQL.
  - A dump holds everything that is in the cluster. The stored file has mode 0600. Passwords are never shown, and
    neither are options of foreign servers, user mappings and subscriptions; rows that differ are.
  - The role to connect as must be a superuser.
version_added: 1.0.0
author:
  - pgdrill.pitr contributors (@pgdrill)
extends_documentation_fragment:
  - pgdrill.pitr.login
  - pgdrill.pitr.bin_dir
  - pgdrill.pitr.attributes
attributes:
  check_mode:
    support: full
    details:
      - The cluster is dumped and compared, and nothing is kept.
      - With O(compare_to), a temporary file lies beside it while the module runs.
  diff_mode:
    support: none
  idempotent:
    support: full
    details:
      - A stored dump is replaced only when the content of the cluster has changed.
options:
  path:
    description:
      - File to keep the dump in. Its index is written beside it, with C(.index.json) behind the name.
      - The directory must exist. Without this option nothing is kept.
    type: path
  compare_to:
    description:
      - File of an earlier dump, the truth to compare the running cluster with.
    type: path
  compression:
    description:
      - How O(path) is compressed, one of V(none), V(gzip), V(lz4) and V(zstd), with a level behind a colon if wanted,
        such as V(zstd:3).
      - V(auto) is V(zstd) where that command is installed, else V(gzip).
    type: str
    default: auto
  discard_identical:
    description:
      - Remove the dump of O(compare_to) when the comparison has found no difference. A dump holds everything that the
        cluster does, so it should not lie around longer than it is needed.
    type: bool
    default: false
  max_differences:
    description:
      - How many differences are shown. All of them are counted.
    type: int
    default: 20
  fail_on_difference:
    description:
      - Whether the module fails when the cluster is not identical to O(compare_to).
      - Set it to V(false) only where RV(identical) is evaluated afterwards.
    type: bool
    default: true
seealso:
  - module: pgdrill.pitr.restore
  - name: pg_dumpall
    description: The program that writes the dump.
    link: https://www.postgresql.org/docs/current/app-pg-dumpall.html
"""

EXAMPLES = r"""
- name: Keep the truth before the cluster is destroyed
  pgdrill.pitr.cluster_dump:
    bin_dir: /usr/lib/postgresql/18/bin
    login_unix_socket: /run/postgresql
    path: /var/lib/pitr/evidence/truth.sql.zst

- name: Prove that the restored cluster is the same
  pgdrill.pitr.cluster_dump:
    bin_dir: /usr/lib/postgresql/18/bin
    login_unix_socket: /run/postgresql
    path: /var/lib/pitr/evidence/restored.sql.zst
    compare_to: /var/lib/pitr/evidence/truth.sql.zst

- name: Compare without failing, to judge later
  pgdrill.pitr.cluster_dump:
    bin_dir: /usr/lib/postgresql/18/bin
    login_host: db2.example.org
    login_user: postgres
    login_password: "{{ vault_postgres_password }}"
    compare_to: /var/lib/pitr/evidence/truth.sql.zst
    max_differences: 5
    fail_on_difference: false
  register: comparison
"""

RETURN = r"""
fingerprint:
  description:
    - Digest of the whole content. Two clusters with the same fingerprint are identical in everything that is
      compared.
    - It does not depend on the minor release of PostgreSQL.
  returned: success
  type: str
  sample: 2001ef7ea43899fb75a57fd84646e8edeebc879f95ef1221bb56cea9c26f5f08
databases:
  description: The databases that were dumped.
  returned: success
  type: list
  elements: str
  sample: [template1, postgres, shop]
objects:
  description: How many objects the dump consists of.
  returned: success
  type: int
  sample: 119
bytes:
  description: Size of the dump before compression.
  returned: success
  type: int
  sample: 18832
seconds:
  description: How long all of it took.
  returned: success
  type: float
  sample: 0.213
path:
  description: Where the dump was kept, empty when it was not.
  returned: success
  type: str
  sample: /var/lib/pitr/evidence/truth.sql.zst
identical:
  description: Whether there is no difference but the explained ones.
  returned: when O(compare_to) is given
  type: bool
  sample: false
difference_count:
  description: Number of differences that nothing explains.
  returned: when O(compare_to) is given
  type: int
  sample: 1
differences:
  description:
    - The first differences, at most O(max_differences).
    - The text between objects, such as C(SET default_tablespace), and the order of objects are reported only when
      nothing else differs, because they follow from the objects.
  returned: when O(compare_to) is given
  type: list
  elements: dict
  contains:
    database:
      description: Name of the database; V((cluster\)) for what belongs to no database, such as roles and settings.
      type: str
    object:
      description: Type and name of the object.
      type: str
    kind:
      description:
        - V(missing) when only the truth has the object, V(extra) when only the restored cluster has it.
        - V(changed) when both have it, V(order) when the same objects come in another order.
      type: str
    line:
      description: Line of the difference in the dump that is the truth, from 1.
      type: int
    restored_line:
      description: The same in the dump of the restored cluster.
      type: int
    object_line:
      description: Line of the difference within the object, from 1.
      type: int
    truth:
      description: The line as the truth has it, cut to 200 characters around the difference.
      type: str
    restored:
      description: The line as the restored cluster has it.
      type: str
  sample:
    - database: shop
      object: TABLE DATA public.pgbench_branches
      kind: changed
      line: 412
      restored_line: 412
      object_line: 6
      truth: "1\t-31337\t\\N"
      restored: "1\t-31336\t\\N"
explained:
  description: Differences that replay makes by design, see the notes.
  returned: when O(compare_to) is given
  type: list
  elements: dict
  contains:
    database:
      description: Name of the database.
      type: str
    object:
      description: Type and name of the object.
      type: str
    reason:
      description: Why it may differ.
      type: str
    truth:
      description: The value of the truth.
      type: str
    restored:
      description: The value of the restored cluster.
      type: str
  sample:
    - database: shop
      object: SEQUENCE SET public.orders_id_seq
      reason: a sequence is 32 values ahead, WAL is written for 32 at once
      truth: "1001"
      restored: "1033"
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.pgdrill.pitr.plugins.module_utils.boundary import login_argument_spec, run_module
from ansible_collections.pgdrill.pitr.plugins.module_utils.dump import Request, perform
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.plugins.module_utils.postgres import Login

ARGUMENT_SPEC: dict[str, dict[str, Any]] = {
    **login_argument_spec(),
    "bin_dir": {"type": "path", "required": True},
    "path": {"type": "path"},
    "compare_to": {"type": "path"},
    "compression": {"type": "str", "default": "auto"},
    "max_differences": {"type": "int", "default": 20},
    "discard_identical": {"type": "bool", "default": False},
    "fail_on_difference": {"type": "bool", "default": True},
}


def run(module: AnsibleModule) -> dict[str, Any]:
    """Dump and compare. Raises PitrError when it could not be done, or when a difference must fail."""
    params = module.params
    request = Request(
        login=Login.from_params(params),
        bin_dir=params["bin_dir"],
        path=params["path"] or "",
        compare_to=params["compare_to"] or "",
        compression=params["compression"],
        max_differences=params["max_differences"],
        discard_identical=params["discard_identical"],
        check_mode=module.check_mode,
    )
    result = perform(request)
    values = result.to_dict("" if module.check_mode else request.path)
    if params["fail_on_difference"] and result.compared is not None and not result.compared.comparison.identical:
        raise PitrError(result.compared.message(request.compare_to), **values)
    return values


def main() -> None:
    run_module(
        AnsibleModule(
            argument_spec=ARGUMENT_SPEC,
            supports_check_mode=True,
        ),
        run,
    )


if __name__ == "__main__":
    main()
