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
  - Takes a full base backup as compressed tar files. By default over the replication protocol (C(pg_basebackup)).
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
      - Kind of backup.
    type: str
    choices: [full]
    default: full
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
    version_added: 0.2.0
  pgdata:
    description:
      - Data directory, for O(method=low_level) by default the one that the server tells. Required for
        O(method=offline).
    type: path
    version_added: 0.2.0
  snapshot_command:
    description:
      - For O(method=low_level), a command that makes a snapshot of the data directory and of all its tablespaces, as a
        list of arguments (no shell). It runs between start and stop, and the copy is made from the snapshot after
        that, so that the server's backup mode is short.
      - When it fails, no backup is taken.
    type: list
    elements: str
    default: []
    version_added: 0.2.0
  snapshot_path:
    description:
      - Where the data directory appears in the snapshot. There must be none before.
    type: path
    version_added: 0.2.0
  snapshot_tablespaces:
    description:
      - Directory of each tablespace, and where it appears in the snapshot.
    type: dict
    default: {}
    version_added: 0.2.0
  snapshot_cleanup_command:
    description:
      - A command that removes the snapshot, as a list of arguments. It runs whether or not the backup succeeds; that it
        fails is a warning.
    type: list
    elements: str
    default: []
    version_added: 0.2.0
  label:
    description:
      - Name of the backup. Without one it is the UTC time of its start and its type.
    type: str
    default: ''
  compression:
    description:
      - V(none), V(gzip), V(lz4) or V(zstd), with an optional C(:level). Compressed by the server with O(method=stream),
        else here.
      - V(auto) is zstd where the server and this host have it, else gzip.
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
      - V(missing) takes a backup only when there is none yet.
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
from ansible_collections.pgdrill.pitr.plugins.module_utils.backup import stored_backups
from ansible_collections.pgdrill.pitr.plugins.module_utils.boundary import (
    login_argument_spec,
    repository_argument_spec,
    run_module,
)
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.plugins.module_utils.methods import make_backup
from ansible_collections.pgdrill.pitr.plugins.module_utils.postgres import Login
from ansible_collections.pgdrill.pitr.plugins.module_utils.repository import ClusterFolder, require_directory
from ansible_collections.pgdrill.pitr.plugins.module_utils.snapshot import Snapshot

ARGUMENT_SPEC: dict[str, dict[str, Any]] = {
    **login_argument_spec(),
    **repository_argument_spec(),
    "bin_dir": {"type": "path", "required": True},
    "type": {"type": "str", "choices": ["full"], "default": "full"},
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
    folder = ClusterFolder.open(params["repository"], params["cluster"])
    if params["when"] == "missing":
        current = folder.chapter.system_identifier
        there = [backup for backup in stored_backups(folder) if backup.system_identifier == current]
        if there:
            return {"changed": False, "backup": there[-1].to_dict()}
    login = Login.from_params(params)
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
    )
    if module.check_mode:
        work.dry_run()
        return {"changed": True}
    result: dict[str, Any] = {"changed": True, "backup": work.take().to_dict()}
    if work.warnings:
        result["warnings"] = work.warnings
    return result


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
