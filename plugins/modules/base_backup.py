#!/usr/bin/python

# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: base_backup
short_description: Take a base backup into a repository
version_added: 0.1.0
description:
  - Takes a full or an incremental base backup as compressed tar files. By default over the replication protocol
    (C(pg_basebackup)).
  - The server may be a standby. Its primary archives the backup's WAL, into this very repository.
  - The backup becomes visible by its last atomic write, after its WAL was seen in this repository's archive. A failed
    or killed backup leaves nothing that looks like one.
  - Runs on the repository host, or wherever the repository is mounted; with another O(method) than V(stream) on the
    database host, where the repository is mounted.
extends_documentation_fragment:
  - pgdrill.pitr.login
  - pgdrill.pitr.repository
  - pgdrill.pitr.bin_dir
  - pgdrill.pitr.attributes
attributes:
  check_mode:
    support: full
    details:
      - In check mode the server is asked everything, and no backup is taken.
  diff_mode:
    support: none
  idempotent:
    support: partial
    details:
      - Idempotent with O(when=missing).
options:
  type:
    description:
      - V(incremental) holds what has changed since its parent, and needs PostgreSQL 17 and C(summarize_wal). It can
        only be restored together with all that it builds upon.
      - V(auto) is a full backup when one is due (O(full_every), O(max_chain)) or an incremental one cannot be taken,
        and else an incremental one. RV(type_reason) tells why.
    type: str
    choices: [full, incremental, auto]
    default: full
  parent:
    description:
      - Label of the backup that an incremental one builds upon. Without one it is the newest whole backup of this
        cluster that is part of the server's own past. Only with O(type=incremental).
    type: str
    default: ''
  full_every:
    description:
      - With O(type=auto) a full backup is due when the chain's full one is so old, for example V(7 days). Units are
        C(min), C(h), C(d) and C(weeks). A twentieth of it, at most an hour, less will do. Empty for never.
    type: str
    default: 7 days
  max_chain:
    description:
      - With O(type=auto) a full backup is due when the chain has so many incremental ones. V(0) for no limit.
    type: int
    default: 24
  identity:
    description:
      - Path of a file with age identities, to read the manifest of an encrypted parent. Without one no incremental
        backup can build upon an encrypted one, and O(type=auto) takes full ones.
    type: path
    default: ''
  method:
    description:
      - V(stream) has C(pg_basebackup) copy over the replication protocol.
      - V(low_level) copies the files itself between C(pg_backup_start) and C(pg_backup_stop), or those of a snapshot.
        The login needs C(EXECUTE) on the two functions, and no replication.
      - V(offline) copies the files of a server that was shut down cleanly. No login is used.
      - The last two run on the database host as a user that can read the data directory. What is stored, and how it is
        restored, is the same.
    type: str
    choices: [stream, low_level, offline]
    default: stream
  pgdata:
    description:
      - Data directory, for O(method=low_level) by default the one that the server tells. Required for
        O(method=offline).
    type: path
  snapshot_command:
    description:
      - For O(method=low_level), a command that makes a snapshot of the data directory and of all its tablespaces, as a
        list of arguments (no shell). It runs between start and stop, and the copy is made from the snapshot after
        that, so that the server's backup mode is short.
      - When it fails, no backup is taken.
    type: list
    elements: str
    default: []
  snapshot_path:
    description:
      - Where the data directory appears in the snapshot. There must be none before.
    type: path
  snapshot_tablespaces:
    description:
      - Directory of each tablespace, and where it appears in the snapshot.
    type: dict
    default: {}
  snapshot_cleanup_command:
    description:
      - A command that removes the snapshot, as a list of arguments. It runs whether or not the backup succeeds; that it
        fails is a warning.
    type: list
    elements: str
    default: []
  label:
    description:
      - Name of the backup. Without one it is the UTC time of its start and its type.
    type: str
    default: ''
  compression:
    description:
      - V(none), V(gzip), V(lz4) or V(zstd), with an optional C(:level). Compressed by the server with O(method=stream),
        else here.
      - V(auto) is zstd where the server and this host have it, else lz4 where both have that, else gzip.
    type: str
    default: auto
  checkpoint:
    description:
      - V(fast) checkpoints at once, V(spread) spares the disks.
    type: str
    choices: [fast, spread]
    default: fast
  max_rate:
    description:
      - Upper limit of the transfer, as C(pg_basebackup --max-rate) takes it, for example V(32M).
    type: str
    default: ''
  verify:
    description:
      - Read the backup back before it becomes visible. From PostgreSQL 18 every file is compared with the manifest's
        checksum, before that with its size.
    type: bool
    default: true
  archive_timeout:
    description:
      - Seconds to wait for the archiver to deliver the backup's WAL. For a standby that is its primary's, which
        archives a segment only when it is full; set C(archive_timeout) there below this.
    type: int
    default: 600
  when:
    description:
      - V(missing) takes a backup only when there is none yet. That one is full, whatever O(type) says.
    type: str
    choices: [always, missing]
    default: always
author:
  - pgdrill.pitr contributors (@pgdrill)
"""

EXAMPLES = r"""
- name: A full backup
  pgdrill.pitr.base_backup:
    login_host: db1.example.com
    login_user: pitr_backup
    repository: /var/lib/pitr
    cluster: main
    bin_dir: /usr/lib/postgresql/18/bin

- name: Incremental backups, and a full one each week
  pgdrill.pitr.base_backup:
    login_host: db1.example.com
    login_user: pitr_backup
    repository: /var/lib/pitr
    cluster: main
    bin_dir: /usr/lib/postgresql/18/bin
    type: auto
    full_every: 7 days

- name: From an LVM snapshot, on the database host
  pgdrill.pitr.base_backup:
    login_unix_socket: /var/run/postgresql
    repository: /mnt/pitr
    cluster: main
    bin_dir: /usr/lib/postgresql/18/bin
    method: low_level
    snapshot_command: [/usr/local/sbin/snapshot, make]
    snapshot_path: /mnt/snapshot/18/main
    snapshot_cleanup_command: [/usr/local/sbin/snapshot, remove]

- name: Of a server that is shut down
  pgdrill.pitr.base_backup:
    repository: /mnt/pitr
    cluster: main
    bin_dir: /usr/lib/postgresql/18/bin
    method: offline
    pgdata: /var/lib/postgresql/18/main
"""

RETURN = r"""
backup:
  description: The backup as stored in its C(backup.json).
  returned: when a backup was taken
  type: dict
  sample:
    label: 20260301T142959Z-full
    type: full
    method: stream
    timeline: 1
    start_lsn: 0/2000028
    stop_lsn: 0/2000120
    started_at: "2026-03-01T14:29:59.123456+00:00"
    stopped_at: "2026-03-01T14:30:02.503112+00:00"
    stored_bytes: 3441163
    database_bytes: 23443211
    verified: checksums
    parent: null
    restored_bytes: 0
type:
  description: V(full) or V(incremental), what was taken or, in check mode, would be.
  returned: when a backup was taken, or would be
  type: str
  sample: incremental
parent:
  description: Label of the backup that it builds upon; null for a full one.
  returned: when a backup was taken, or would be
  type: str
  sample: 20260301T142959Z-full
type_reason:
  description: Why O(type=auto) came to this type, or O(type=incremental) to this parent. Empty when both were given.
  returned: when a backup was taken, or would be
  type: str
  sample: The full backup 20260301T142959Z-full is 168.1 hours old, so that another is due.
warnings:
  description: What was passed over, or left behind, by a backup that is good all the same.
  returned: when there are any
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
    repository_argument_spec,
    run_module,
)
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.plugins.module_utils.incremental import Basis
from ansible_collections.pgdrill.pitr.plugins.module_utils.methods import make_backup
from ansible_collections.pgdrill.pitr.plugins.module_utils.postgres import Login
from ansible_collections.pgdrill.pitr.plugins.module_utils.repository import ClusterFolder, require_directory
from ansible_collections.pgdrill.pitr.plugins.module_utils.snapshot import Snapshot
from ansible_collections.pgdrill.pitr.plugins.module_utils.stored import stored_backups

ARGUMENT_SPEC: dict[str, dict[str, Any]] = {
    **login_argument_spec(),
    **repository_argument_spec(),
    "bin_dir": {"type": "path", "required": True},
    "type": {"type": "str", "choices": ["full", "incremental", "auto"], "default": "full"},
    "parent": {"type": "str", "default": ""},
    "full_every": {"type": "str", "default": "7 days"},
    "max_chain": {"type": "int", "default": 24},
    "identity": {"type": "path", "default": ""},
    "method": {"type": "str", "choices": ["stream", "low_level", "offline"], "default": "stream"},
    "pgdata": {"type": "path"},
    "snapshot_command": {"type": "list", "elements": "str", "default": []},
    "snapshot_path": {"type": "path"},
    "snapshot_tablespaces": {"type": "dict", "default": {}},
    "snapshot_cleanup_command": {"type": "list", "elements": "str", "default": []},
    "label": {"type": "str", "default": ""},
    "compression": {"type": "str", "default": "auto"},
    "checkpoint": {"type": "str", "choices": ["fast", "spread"], "default": "fast"},
    "max_rate": {"type": "str", "default": ""},
    "verify": {"type": "bool", "default": True},
    "archive_timeout": {"type": "int", "default": 600},
    "when": {"type": "str", "choices": ["always", "missing"], "default": "always"},
}


def run(module: AnsibleModule) -> dict[str, Any]:
    """Take the backup."""
    params = module.params
    require_directory(params["repository"])
    folder = ClusterFolder.open(params["repository"], params["cluster"], {"identity": params["identity"]})
    if params["when"] == "missing":
        current = folder.chapter.system_identifier
        there = [backup for backup in stored_backups(folder) if backup.system_identifier == current]
        if there:
            return {"changed": False, "backup": there[-1].to_dict()}
    login = Login.from_params(params)
    # There is nothing to build upon when none is there.
    kind = "full" if params["when"] == "missing" else params["type"]
    basis = None
    if params["method"] == "stream" or kind == "incremental":
        basis = Basis(folder, login, kind, params["parent"], params["full_every"], params["max_chain"])
    work = make_backup(
        params["method"],
        folder,
        login,
        params["bin_dir"],
        pgdata=params["pgdata"] or "",
        snapshot=_snapshot(params),
        compression=params["compression"],
        checkpoint=params["checkpoint"],
        max_rate=params["max_rate"],
        verify=params["verify"],
        label=params["label"],
        archive_timeout=params["archive_timeout"],
        basis=basis,
    )
    result: dict[str, Any] = {"changed": True}
    if module.check_mode:
        work.dry_run()
    else:
        result["backup"] = work.take().to_dict()
    if work.warnings:
        result["warnings"] = work.warnings
    parent = work.parent.label if work.parent else None
    return {**result, "type": "incremental" if parent else "full", "parent": parent, "type_reason": work.reason}


def _snapshot(params: dict[str, Any]) -> Snapshot | None:
    names = ("snapshot_command", "snapshot_path", "snapshot_cleanup_command", "snapshot_tablespaces")
    if not any(params[name] for name in names):
        return None
    if not (params["snapshot_command"] and params["snapshot_path"]):
        raise PitrError("A snapshot needs snapshot_command and snapshot_path. No backup was taken.")
    return Snapshot(
        params["snapshot_command"],
        params["snapshot_path"],
        params["snapshot_cleanup_command"],
        params["snapshot_tablespaces"],
    )


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec=ARGUMENT_SPEC,
        supports_check_mode=True,
    )
    run_module(module, run)


if __name__ == "__main__":
    main()
