#!/usr/bin/python

# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: restore
short_description: Plan and perform a restore with a recovery target
version_added: 0.1.0
description:
  - Chooses the backup, checks the archive, the host and the data directory, and restores; then
    M(pgdrill.pitr.instance) or the service starts the server, and M(pgdrill.pitr.recovery) waits for the target.
  - Every refusal that can be known is given before anything is touched. In check mode the plan is made and nothing
    else.
  - A data directory in the way is never removed; with O(force) it is moved aside, and only when it is this cluster's
    own and no server is running on it. With O(delta), too, it is changed in place instead.
  - Run it as the user that owns the data directory.
extends_documentation_fragment:
  - pgdrill.pitr.repository
  - pgdrill.pitr.ssh
  - pgdrill.pitr.chapter
  - pgdrill.pitr.bin_dir
  - pgdrill.pitr.attributes
attributes:
  check_mode:
    support: full
    details:
      - In check mode the result is the plan.
  diff_mode:
    support: none
  idempotent:
    support: none
options:
  state:
    description:
      - V(present) restores.
      - V(undone) puts the directory O(moved_aside) back in place of a restored cluster that was not accepted. The
        latter is kept under another name, or removed with O(keep_unaccepted=false).
      - V(settled) removes the directory O(moved_aside) when the restored cluster was accepted, and only a directory
        that a restore has moved aside.
    type: str
    choices: [present, undone, settled]
    default: present
  pgdata:
    description:
      - Data directory to restore into.
    type: path
    required: true
  config_dir:
    description:
      - Where postgresql.conf is, when it is not in the data directory.
    type: path
  backup:
    description:
      - Label of the backup to begin with. V(auto) is the newest one that ended before the target, V(latest) the
        newest one or none.
    type: str
    default: auto
  recovery_target_time:
    description:
      - Restore to this time. It must carry an offset from UTC, as in V(2026-03-01 14:29:59+01:00).
    type: str
  recovery_target_xid:
    description:
      - Restore up to this transaction.
    type: str
  recovery_target_lsn:
    description:
      - Restore up to this position of the WAL. With O(recovery_target_inclusive=false) exactly what had been written
        there.
    type: str
  recovery_target_name:
    description:
      - Restore to this restore point.
    type: str
  recovery_target:
    description:
      - V(immediate) stops as soon as the backup is consistent.
      - Without any target everything that is archived is replayed.
    type: str
    choices: [immediate]
  recovery_target_inclusive:
    description:
      - Whether the target itself is replayed.
    type: bool
    default: true
  recovery_target_timeline:
    description:
      - V(latest), V(current) (the backup's) or the number of a timeline.
    type: str
    default: latest
  recovery_target_action:
    description:
      - What the server does at the target.
    type: str
    choices: [promote, pause, shutdown]
    default: promote
  tablespace_mapping:
    description:
      - Directories of tablespaces, old to new. Those that are not named go where they were.
    type: dict
    default: {}
  tablespace_prefix:
    description:
      - A directory for all tablespaces that O(tablespace_mapping) does not name; each goes to a directory in it that
        is called after its OID.
    type: path
    version_added: 0.2.0
  pg_wal_directory:
    description:
      - Directory for C(pg_wal), which becomes a link to it. It must be empty or not exist.
      - Without it C(pg_wal) is a plain directory; where it is a link in the data directory that is replaced, it is a
        link to a new directory beside the present one, which stays as it is.
    type: path
    version_added: 0.2.0
  archive_after:
    description:
      - What the restored cluster does with WAL of its own. V(none-until-promoted) keeps it until
        M(pgdrill.pitr.recovery) accepts the cluster, V(off) archives nothing, V(same) archives into the same archive
        at once.
    type: str
    choices: ['off', same, none-until-promoted]
    default: none-until-promoted
  wal_command:
    description:
      - Path of C(pitr-wal), see M(pgdrill.pitr.wal_command).
    type: path
    required: true
  force:
    description:
      - Replace a data directory of the same cluster; it is moved aside, or with O(delta) changed in place.
    type: bool
    default: false
  delta:
    description:
      - Change the data directory in place. Every file is compared with the backup's manifest by its content; what
        differs is written anew, what the backup does not have is removed, and everything else stays.
      - Needs O(force), and a directory of the same cluster without a running server, or what an interrupted restore of
        it has left. Where there is no directory, or an empty one, everything is written.
      - Nothing is moved aside, so that there is nothing to undo. A delta restore that failed or was interrupted leaves
        a directory that no server can start from; repeat it.
      - Not with an incremental backup.
    type: bool
    default: false
    version_added: 0.2.0
  keep_unaccepted:
    description:
      - Whether a restored cluster that was never accepted is moved aside like any other, or removed when it is in the
        way.
    type: bool
    default: true
  moved_aside:
    description:
      - For O(state=undone) and O(state=settled), what RV(moved_aside) was.
    type: path
  use_partial:
    description:
      - Go on with what a receiver has and the archive has not, see M(pgdrill.pitr.receiver). Only with files that
        continue the archive without a hole on the timeline of the plan, and that are this cluster's WAL of that
        position.
      - Without it the plan's notes tell when there is such WAL, and how far it reaches.
    type: bool
    default: false
  keep_out:
    description:
      - Whether ordinary users are kept out until M(pgdrill.pitr.recovery) accepts the cluster. Its C(pg_hba.conf) is
        put aside, and one with the rules below takes its place. It is put back when the cluster is accepted or the
        restore undone.
      - The restore is refused when C(hba_file) lies neither in the data directory nor in O(config_dir).
    type: bool
    default: true
  inspect_user:
    description:
      - With O(keep_out), the superuser who is let in over the unix socket, by the method of the cluster's own
        C(pg_hba.conf). The other modules connect as this one. The operating system's user may come in as the role of
        its own name, too.
    type: str
    default: postgres
  inspect_hba:
    description:
      - With O(keep_out), lines of C(pg_hba.conf) for those who are to look at the cluster, too, such as
        V(host app auditor 192.0.2.7/32 scram-sha-256).
    type: list
    elements: str
    default: []
  dead_pg_wal:
    description:
      - Whose C(pg_wal) has WAL that the server had not archived when it died. V(auto) is that of the data directory
        which is moved aside, when nothing but everything is asked for (no target), or of the one before it when that
        directory is a restored cluster that was never accepted. V(none) uses none. A path is a C(pg_wal) directory on
        this host, or a copy of one; it is used for every target.
      - Its segments are copied, and never changed. Only those are used that continue the archive without a hole, on
        the timeline of the plan, are this cluster's WAL of the position that their name says, and in which one record
        follows the other. The last one may be half written.
      - Never that of a server which has gone on to another timeline than that of the plan, or which still runs.
      - Where several have the same WAL, the archive is asked first; RV(plan) tells in C(sources) how far each has led.
    type: str
    default: auto
  defer_above:
    description:
      - Only plan when the backup is larger than this many bytes. The action plugin uses it to run a
        large restore in the background and show the progress; leave it out.
    type: int
  identity:
    description:
      - Path of a file with age identities (private keys) on this host, when the backup or its WAL is encrypted. One
        file may hold several; it must not be open to other users, and have no passphrase.
      - The server reads the same file while it recovers, through its C(restore_command); remove it afterwards.
      - Without the right one the restore is refused in the plan, before anything is touched.
    type: path
  verify:
    description:
      - Compare every restored file with the backup's manifest (C(pg_verifybackup)).
    type: bool
    default: true
author:
  - pgdrill.pitr contributors (@pgdrill)
"""

EXAMPLES = r"""
- name: What would be done?
  pgdrill.pitr.restore:
    repository: /var/lib/pitr
    cluster: main
    pgdata: /var/lib/postgresql/18/main
    bin_dir: /usr/lib/postgresql/18/bin
    wal_command: /usr/local/lib/pgdrill/pitr-wal
    recovery_target_time: "2026-03-01 14:29:59+01:00"
    force: true
  check_mode: true

- name: Restore everything that is archived
  pgdrill.pitr.restore:
    repository: /var/lib/pitr
    cluster: main
    pgdata: /var/lib/postgresql/18/main
    bin_dir: /usr/lib/postgresql/18/bin
    wal_command: /usr/local/lib/pgdrill/pitr-wal
    force: true
"""

RETURN = r"""
plan:
  description: What is, or in check mode would be, done.
  returned: with O(state=present)
  type: dict
  sample:
    backup: 20260301T142959Z-full
    chain: [20260301T142959Z-full]
    backup_timeline: 1
    start_lsn: 0/2000028
    consistent_lsn: 0/2000120
    target: time 2026-03-01 13:29:59.000000+00:00
    target_kind: time
    target_value: "2026-03-01 13:29:59.000000+00:00"
    target_inclusive: true
    target_action: promote
    timeline: 1
    timeline_path: [{"timeline": 1, "from": "0/2000028", "to": null}]
    first_segment: "000000010000000000000002"
    last_segment: "000000010000000000000007"
    segments: 6
    wal_bytes: 100663296
    end_lsn: 0/8000000
    backup_bytes: 23443211
    in_place: false
    notes: []
    from_receiver: []
    from_pg_wal: []
    at_least: null
    sources: [{"name": "archive", "segments": 6, "last_lsn": "0/8000000"}]
    space:
      - filesystem: /var/lib/postgresql/18
        for:
          - {"what": "data directory", "path": /var/lib/postgresql/18/main, "bytes": 23443211}
          - {"what": "pg_wal", "path": /var/lib/postgresql/18/main/pg_wal, "bytes": 67108864}
        needed_bytes: 90552075
        recovery_bytes: 33554432
        free_bytes: 41003491328
    estimate:
      copy_seconds: 0.4
      copy_basis: 3 restores of this cluster
      replay_seconds: 1.6
      replay_basis: 3 recoveries of this cluster
    tablespaces: []
    moved_aside: [{"from": /var/lib/postgresql/18/main, "to": "/var/lib/postgresql/18/main.old-<UTC time>"}]
    server_version: {"backup": "18.1", "host": "18.1"}
    data_checksums: true
    floors: {"max_connections": 100, "max_worker_processes": 8, "max_wal_senders": 10,
      "max_prepared_transactions": 0, "max_locks_per_transaction": 64}
    collation: {"providers": [libc], "backup_glibc": "2.41", "host_glibc": "2.41", "backup_icu": "153.128"}
plan_text:
  description: The same as lines to read.
  returned: with O(state=present)
  type: list
  elements: str
  sample: ["backup   20260301T142959Z-full, full, 22 MiB, of 2026-03-01 13:29:59.000000+00:00"]
backup:
  description: Label of the backup.
  returned: with O(state=present)
  type: str
  sample: 20260301T142959Z-full
timeline:
  description: Timeline that is followed.
  returned: with O(state=present)
  type: int
  sample: 1
delta:
  description: Files and bytes that were kept and written when a directory was changed in place, and files removed.
  returned: with O(delta=true), when there was a directory and it was changed
  type: dict
  sample: {kept: 961, kept_bytes: 1199570944, written: 7, written_bytes: 1114112, removed: 12}
moved_aside:
  description: Where the old data directory is now; empty when there was none.
  returned: success
  type: str
  sample: /var/lib/postgresql/18/main.old-20260301T143210
refusals:
  description: Why nothing was done, each with a stable code, a message and the nearest thing that would work.
  returned: when refused
  type: list
  elements: dict
  sample:
    - code: time_without_offset
      message: The time '2026-03-01 14:29:59' has no offset from UTC.
      nearest: ""
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

import os
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.pgdrill.pitr.plugins.module_utils.boundary import (
    repository_argument_spec,
    run_module,
    ssh_argument_spec,
    ssh_settings,
)
from ansible_collections.pgdrill.pitr.plugins.module_utils.plantext import lines
from ansible_collections.pgdrill.pitr.plugins.module_utils.request import ARCHIVE_AFTER, Request
from ansible_collections.pgdrill.pitr.plugins.module_utils.restore import Restore, settle, undo

TARGET_OPTIONS: dict[str, dict[str, Any]] = {
    "recovery_target_time": {"type": "str"},
    "recovery_target_xid": {"type": "str"},
    "recovery_target_lsn": {"type": "str"},
    "recovery_target_name": {"type": "str"},
    "recovery_target": {"type": "str", "choices": ["immediate"]},
    "recovery_target_inclusive": {"type": "bool", "default": True},
    "recovery_target_timeline": {"type": "str", "default": "latest"},
    "recovery_target_action": {"type": "str", "choices": ["promote", "pause", "shutdown"], "default": "promote"},
}

ARGUMENT_SPEC: dict[str, dict[str, Any]] = {
    **repository_argument_spec(),
    **ssh_argument_spec(),
    "bin_dir": {"type": "path", "required": True},
    **TARGET_OPTIONS,
    "chapter": {"type": "int"},
    "state": {"type": "str", "choices": ["present", "undone", "settled"], "default": "present"},
    "pgdata": {"type": "path", "required": True},
    "config_dir": {"type": "path"},
    "backup": {"type": "str", "default": "auto"},
    "tablespace_mapping": {"type": "dict", "default": {}},
    "tablespace_prefix": {"type": "path"},
    "pg_wal_directory": {"type": "path"},
    "archive_after": {"type": "str", "choices": list(ARCHIVE_AFTER), "default": "none-until-promoted"},
    "wal_command": {"type": "path", "required": True},
    "force": {"type": "bool", "default": False},
    "delta": {"type": "bool", "default": False},
    "keep_unaccepted": {"type": "bool", "default": True},
    "moved_aside": {"type": "path"},
    "identity": {"type": "path"},
    "verify": {"type": "bool", "default": True},
    "use_partial": {"type": "bool", "default": False},
    "keep_out": {"type": "bool", "default": True},
    "inspect_user": {"type": "str", "default": "postgres"},
    "inspect_hba": {"type": "list", "elements": "str", "default": []},
    "dead_pg_wal": {"type": "str", "default": "auto"},
    "defer_above": {"type": "int"},
}
REQUIRED_IF = [("state", "undone", ["moved_aside"]), ("state", "settled", ["moved_aside"])]


def run(module: AnsibleModule) -> dict[str, Any]:
    """Plan, and outside check mode restore."""
    params = module.params
    request = Request(
        repository=params["repository"],
        cluster=params["cluster"],
        pgdata=os.path.realpath(params["pgdata"]),
        bin_dir=params["bin_dir"],
        wal_command=params["wal_command"],
        target_options={name: params[name] for name in TARGET_OPTIONS},
        backup=params["backup"],
        config_dir=params["config_dir"] or "",
        tablespace_mapping=params["tablespace_mapping"],
        tablespace_prefix=params["tablespace_prefix"] or "",
        pg_wal_directory=params["pg_wal_directory"] or "",
        force=params["force"],
        delta=params["delta"],
        keep_unaccepted=params["keep_unaccepted"],
        archive_after=params["archive_after"],
        verify=params["verify"],
        chapter=params["chapter"],
        identity=os.path.abspath(params["identity"]) if params["identity"] else "",
        use_partial=params["use_partial"],
        keep_out=params["keep_out"],
        inspect_user=params["inspect_user"],
        inspect_hba=tuple(params["inspect_hba"]),
        dead_pg_wal=params["dead_pg_wal"],
        ssh=ssh_settings(params),
    )
    if params["state"] == "settled":
        return {"changed": settle(request, params["moved_aside"], module.check_mode), "moved_aside": ""}
    if params["state"] == "undone":
        kept = undo(request, params["moved_aside"], module.check_mode)
        return {"changed": True, "moved_aside": kept}
    restore = Restore(request)
    plan = restore.plan()
    result: dict[str, Any] = {
        "changed": True,
        "plan": plan.to_dict(),
        "plan_text": lines(plan.to_dict()),
        "backup": plan.backup.label,
        "timeline": plan.timeline,
    }
    result["moved_aside"] = ""
    if params["defer_above"] and plan.backup.database_bytes > params["defer_above"]:
        # The controller starts it again in the background, so that it can show the progress.
        return {**result, "changed": False, "deferred": True}
    if not module.check_mode:
        done = restore.execute(plan)
        result["moved_aside"] = done.moved_aside
        if done.delta is not None:
            result["delta"] = done.delta.to_dict()
    return result


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec=ARGUMENT_SPEC,
        supports_check_mode=True,
        required_if=REQUIRED_IF,
    )
    run_module(module, run)


if __name__ == "__main__":
    main()
