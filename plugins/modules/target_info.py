#!/usr/bin/python

# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: target_info
short_description: Find the transaction that destroyed something, and the recovery target just before it
version_added: 0.1.0
description:
  - Reads the archived WAL between two times with C(pg_waldump) and tells which transactions dropped, truncated,
    deleted or updated how much, each with the recovery settings that stop just before it and the backup that a restore
    would begin with.
  - The segment to begin with is searched for by halves, by the times of commits; from there on the WAL is streamed.
    Memory does not grow with it. Nothing is changed.
  - WAL knows relations by numbers. With C(login_*) of the running server, or of one that was restored to a moment
    before, the result has their names; with O(log_files) also who did it and with which statement.
  - C(VACUUM FULL), C(CLUSTER), C(REINDEX) and C(ALTER TABLE) remove files as well. They are told from a drop, and a
    candidate for which that is not possible has a false C(certain) in RV(candidates).
  - Whatever is aborted is no candidate. What happened to temporary and unlogged tables is not in WAL, except that they
    were dropped.
extends_documentation_fragment:
  - pgdrill.pitr.repository
  - pgdrill.pitr.ssh
  - pgdrill.pitr.chapter
  - pgdrill.pitr.bin_dir
  - pgdrill.pitr.attributes
attributes:
  check_mode:
    support: full
  diff_mode:
    support: N/A
  idempotent:
    support: full
options:
  relation:
    description:
      - What was damaged, as C(schema.table), C(table), an OID, the number of a file, or a file as C(1663/5/16385).
      - A name needs a server that knows it (O(login_unix_socket), O(login_host)). A dropped table has no name any more
        on the running one; then all transactions are shown that may have been it.
    type: str
    default: ''
  database:
    description:
      - Name or OID of the database. A name needs a server that knows it.
    type: str
    default: ''
  since:
    description:
      - Only transactions that ended at or after this time. It must carry an offset from UTC, as in
        V(2026-03-01 14:25:00+01:00). Without it the whole archive is read.
    type: str
    default: ''
  until:
    description:
      - Only transactions that ended at or before this time, likewise.
    type: str
    default: ''
  kinds:
    description:
      - What a transaction must have done, at least one of these.
      - V(rewrite) is C(VACUUM FULL), C(CLUSTER), C(REINDEX) and C(ALTER TABLE), V(drop_unstored) the drop of what has
        no files (temporary tables, views, partitioned tables without partitions).
    type: list
    elements: str
    choices: [drop, truncate, delete, update, drop_database, drop_tablespace, insert, rewrite, drop_index,
      drop_sequence, drop_unstored]
    default: [drop, truncate, delete, update, drop_database, drop_tablespace]
  min_rows:
    description:
      - Deletes, updates and inserts count only from this number of rows on, for each transaction and kind.
    type: int
    default: 1
  timeline:
    description:
      - V(latest), or the number of the timeline that is followed. Transactions on other branches are not found.
    type: str
    default: latest
  log_files:
    description:
      - Logs of the server to look into, on the host that runs the module. Paths or patterns; C(.csv) is a csvlog,
        C(.json) a jsonlog, anything else has lines that begin with O(log_line_prefix). C(.gz) is unpacked.
    type: list
    elements: str
    default: []
  log_timezone:
    description:
      - The server's C(log_timezone), such as V(Europe/Berlin). Without it that of the server of the C(login_*) options;
        without either, the logs must be in UTC or have numbers for offsets, as abbreviations may mean several zones.
    type: str
    default: ''
  log_line_prefix:
    description:
      - The server's C(log_line_prefix), for logs that are neither csvlog nor jsonlog. Without it that of the server of
        the C(login_*) options.
    type: str
    default: ''
  limit:
    description:
      - How many candidates are returned, the most likely ones.
    type: int
    default: 10
  identity:
    description:
      - Path of a file with age identities, when the archive is encrypted.
    type: path
  login_host:
    description:
      - Host of a server of this cluster that is asked for names. It is refused when it is another cluster.
      - No server is asked without this and O(login_unix_socket).
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
      - Password of the role.
    type: str
    default: ''
  login_unix_socket:
    description:
      - Directory of the server's Unix socket.
    type: str
    default: ''
  login_db:
    description:
      - Database to connect to first. The databases of the candidates are asked as well.
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
  - psycopg2 on the host that runs the module, when a server is asked
author:
  - pgdrill.pitr contributors (@pgdrill)
"""

EXAMPLES = r"""
- name: Someone dropped a table at about 14:30
  pgdrill.pitr.target_info:
    repository: /var/lib/pitr
    cluster: main
    bin_dir: /usr/lib/postgresql/18/bin
    since: "2026-03-01 14:20:00+01:00"
    until: "2026-03-01 14:40:00+01:00"
    kinds: [drop]
  register: found

- name: Who has emptied public.orders?
  pgdrill.pitr.target_info:
    repository: /var/lib/pitr
    cluster: main
    bin_dir: /usr/lib/postgresql/18/bin
    login_unix_socket: /var/run/postgresql
    relation: public.orders
    since: "2026-03-01 14:20:00+01:00"
    kinds: [truncate, delete]
    min_rows: 1000
    log_files: [/var/log/postgresql/*.csv]
"""

RETURN = r"""
candidates:
  description:
    - Committed transactions that may be the one, the most likely first.
    - C(settings) are the recovery settings to stop just before it, C(settings_lsn) the same with an LSN, C(variables)
      what the role C(restore) takes for it. C(plan) is what M(pgdrill.pitr.restore) would do, C(refusals) why it would
      not.
    - C(settings_paused) stop before its first record, and are for a server that is paused there and read from; paused
      just before its commit, a standby holds its exclusive locks. What others committed between the two is missing. It
      is V(null) when its first record is not in the WAL that was read.
    - C(certain) is false when the traces in WAL allow for something harmless, or when it could not be told whether the
      relation is the one that was asked for; C(notes) say which. C(complete) is false when its first records are not in
      the WAL that was read.
  returned: success
  type: list
  elements: dict
  sample:
    - xid: 745
      commit_time: "2026-03-01 13:29:59.123456+00:00"
      lsn: 0/7A21F08
      timeline: 1
      kinds: [drop]
      certain: true
      complete: true
      database: 16384
      database_name: shop
      relations:
        - kind: drop
          oid: 16402
          file: null
          rows: null
          name: null
          toast_of: null
          named_by: null
          unnamed_because: "the running server at postgres@/var/run/postgresql:5432 has no relation 16402: it was
            dropped, or is not there yet"
      relations_in_all: 1
      deleted_rows: 0
      updated_rows: 0
      inserted_rows: null
      removed_files: 3
      subtransactions: 0
      prepared_as: null
      log:
        - time: "2026-03-01T13:29:59.101+00:00"
          user: alice
          database: shop
          application: psql
          client: 10.0.0.7
          xid: null
          statement: DROP TABLE orders
          place: /var/log/postgresql/postgresql-14.csv:1204
          matched_by: "the time: it is the next such transaction to commit after the statement"
      settings: {"recovery_target_xid": "745", "recovery_target_inclusive": false, "recovery_target_timeline": "1"}
      settings_lsn:
        recovery_target_lsn: 0/7A21F08
        recovery_target_inclusive: false
        recovery_target_timeline: "1"
      settings_paused:
        recovery_target_lsn: 0/7A21E58
        recovery_target_inclusive: false
        recovery_target_timeline: "1"
      variables: -e restore_target_xid=745 -e restore_target_inclusive=false -e restore_target_timeline=1
      backup: 20260301T020000Z-full
      plan: {"backup": "20260301T020000Z-full", "target": "xid 745 (exclusive)", "segments": 41}
      refusals: []
      notes: []
matches:
  description: How many transactions fit; RV(candidates) has at most O(limit) of them.
  returned: success
  type: int
  sample: 1
transactions:
  description: How many transactions committed between the two times.
  returned: success
  type: int
  sample: 8113
timeline:
  description: Number of the timeline that was followed.
  returned: success
  type: int
  sample: 1
first_segment:
  description: The segment that was read first.
  returned: success
  type: str
  sample: "000000010000000000000007"
segments_read:
  description: How many segments were read from there on.
  returned: success
  type: int
  sample: 12
read_until:
  description: When the last transaction that was met ended; null when there was none.
  returned: success
  type: str
  sample: "2026-03-01 13:41:02.221000+00:00"
log_statements:
  description: Statements of the logs that belong to no candidate; perhaps they failed, or found nothing to change.
  returned: success
  type: list
  elements: dict
  sample: []
notes:
  description: What is to be known about the whole, such as missing WAL.
  returned: success
  type: list
  elements: str
  sample: []
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
from ansible_collections.pgdrill.pitr.plugins.module_utils.boundary import (
    login_argument_spec,
    open_cluster,
    repository_argument_spec,
    run_module,
    ssh_argument_spec,
)
from ansible_collections.pgdrill.pitr.plugins.module_utils.findtarget import KINDS, LOSSES
from ansible_collections.pgdrill.pitr.plugins.module_utils.postgres import Login
from ansible_collections.pgdrill.pitr.plugins.module_utils.target import parse_time
from ansible_collections.pgdrill.pitr.plugins.module_utils.targetinfo import Question, TargetInfo

ARGUMENT_SPEC: dict[str, dict[str, Any]] = {
    **repository_argument_spec(),
    **ssh_argument_spec(),
    **login_argument_spec(),
    "bin_dir": {"type": "path", "required": True},
    "chapter": {"type": "int"},
    "identity": {"type": "path"},
    "relation": {"type": "str", "default": ""},
    "database": {"type": "str", "default": ""},
    "since": {"type": "str", "default": ""},
    "until": {"type": "str", "default": ""},
    "kinds": {"type": "list", "elements": "str", "choices": list(KINDS), "default": list(LOSSES)},
    "min_rows": {"type": "int", "default": 1},
    "timeline": {"type": "str", "default": "latest"},
    "log_files": {"type": "list", "elements": "str", "default": []},
    "log_timezone": {"type": "str", "default": ""},
    "log_line_prefix": {"type": "str", "default": ""},
    "limit": {"type": "int", "default": 10},
}


def run(module: AnsibleModule) -> dict[str, Any]:
    """Search."""
    params = module.params
    question = Question(
        relation=params["relation"],
        database=params["database"],
        since=parse_time(params["since"]) if params["since"] else None,
        until=parse_time(params["until"]) if params["until"] else None,
        kinds=tuple(params["kinds"]),
        min_rows=params["min_rows"],
        timeline=params["timeline"],
        limit=params["limit"],
        log_files=tuple(params["log_files"]),
        log_timezone=params["log_timezone"],
        log_line_prefix=params["log_line_prefix"],
    )
    folder = open_cluster(params)
    login = Login.from_params(params) if params["login_host"] or params["login_unix_socket"] else None
    search = TargetInfo(folder, folder.select(params["chapter"]), params["bin_dir"], question, login)
    return {"changed": False, **search.run()}


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec=ARGUMENT_SPEC,
        supports_check_mode=True,
    )
    run_module(module, run)


if __name__ == "__main__":
    main()
