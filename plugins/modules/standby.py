#!/usr/bin/python

# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: standby
short_description: Make a standby, and let it take over
version_added: 0.3.0
description:
  - Looks at a data directory and at the primary, decides what has to be done so that a standby of it runs there, and
    does it. A standby that follows its primary is left alone.
  - A directory of another cluster, and one that has diverged from the primary, are refused by name before anything is
    touched.
  - Starts and stops no server; the role P(pgdrill.pitr.standby#role) does.
extends_documentation_fragment:
  - pgdrill.pitr.login
  - pgdrill.pitr.repository
  - pgdrill.pitr.ssh
  - pgdrill.pitr.bin_dir
  - pgdrill.pitr.attributes
attributes:
  check_mode:
    support: full
  diff_mode:
    support: none
  idempotent:
    support: full
options:
  login_host:
    description:
      - Host of the standby itself. It is best asked over its socket, O(login_unix_socket).
  state:
    description:
      - V(status) only looks. V(present) makes the directory one of a standby. V(attached) waits until the running
        standby streams.
      - V(ready) fails unless the standby could take over from a primary that is stopped for it. V(failover) fails
        unless it could do so from one that is gone.
      - V(promoted) makes it the primary. V(fenced) lets a server that is stopped come up as a standby at most.
    type: str
    choices: [status, present, attached, ready, failover, promoted, fenced]
    default: status
  pgdata:
    description:
      - Data directory.
    type: path
    required: true
  config_dir:
    description:
      - Where postgresql.conf is, when not in the data directory.
    type: path
  log_file:
    description:
      - The server's log. Its last lines are shown when the standby does not come up.
    type: path
  file:
    description:
      - Name of the file below C(conf.d) that the settings go into.
    type: str
    default: 50-pitr.conf
  settings:
    description:
      - What that file is to say besides what the module adds. RV(settings) has both, for M(pgdrill.pitr.settings).
    type: dict
    default: {}
  primary_host:
    description:
      - Host of the primary, or the directory of its socket.
    type: str
    default: ''
  primary_port:
    description:
      - Port of the primary.
    type: int
    default: 5432
  primary_user:
    description:
      - Role that replicates.
    type: str
    default: pitr_standby
  primary_password:
    description:
      - Its password. It goes into O(passfile), and nowhere else.
    type: str
    default: ''
  primary_ssl_mode:
    description:
      - Whether connections to the primary are encrypted, and its certificate verified; sslmode of libpq.
    type: str
    choices: [disable, allow, prefer, require, verify-ca, verify-full]
    default: prefer
  primary_ca_cert:
    description:
      - File on the standby's host with the certificates of the authorities that the primary's certificate is trusted
        by; sslrootcert of libpq. The server's user reads it whenever it connects.
    type: path
    default: ''
  passfile:
    description:
      - File that the password is kept in, mode 0600, for the standby's connection to the primary.
    type: path
    default: ''
  slot:
    description:
      - Physical replication slot of this standby on the primary. It has to be there.
    type: str
    default: ''
  application_name:
    description:
      - What C(synchronous_standby_names) calls this standby. Without it the slot's name.
    type: str
    default: ''
  clone_from:
    description:
      - Where the data comes from when there is none, the primary (C(pg_basebackup)) or the repository's newest backup.
    type: str
    choices: [primary, repository]
    default: primary
  rebuild:
    description:
      - What may be done with a directory of this cluster that is no standby of this primary, because it has diverged or
        is a primary itself. V(never) refuses. V(rewind) runs C(pg_rewind). V(clone) moves it aside and clones anew.
    type: str
    choices: [never, rewind, clone]
    default: never
  replace_empty:
    description:
      - Whether a cluster in which nothing was made since initdb, as packages leave behind, may be moved aside.
    type: bool
    default: false
  empty_cluster:
    description:
      - What a call in check mode has returned as RV(empty_cluster) while the server ran. A stopped cluster in which
        nothing was made, but statistics were gathered, cannot be told from others.
    type: str
    default: ''
  tablespace_mapping:
    description:
      - Directory of a tablespace on the primary, and where it goes here, for a clone.
    type: dict
    default: {}
  wal_command:
    description:
      - The installed command C(pitr-wal).
    type: path
    required: true
  identity:
    description:
      - Path of a file with age identities, where the repository is encrypted.
    type: path
  verify:
    description:
      - Compare a clone with its manifest.
    type: bool
    default: true
  require_slot:
    description:
      - Whether a standby that is yet to be made is refused while its slot is not there.
    type: bool
    default: true
  stale_slots:
    description:
      - With O(state=attached), names of physical slots to drop on this server when nobody uses them, such as those of
        its own time as the primary. There they would keep WAL for ever.
    type: list
    elements: str
    default: []
  max_lag:
    description:
      - With O(state=ready), bytes that the standby may be behind.
    type: int
    default: 16777216
  shutdown_lsn:
    description:
      - With O(state=promoted), position of the old primary's shutdown checkpoint (RV(checkpoint_lsn)). It is not
        promoted before it has replayed that.
    type: str
    default: ''
  although_primary_answers:
    description:
      - With O(state=failover), go on although the primary answers.
    type: bool
    default: false
  others:
    description:
      - With O(state=failover), how far each other standby, and the receiver, is (RV(known_lsn)), by name. Empty texts
        are those of whom nothing is known.
    type: dict
    default: {}
  although_behind:
    description:
      - With O(state=failover), go on although another one has more.
    type: bool
    default: false
  although_delayed:
    description:
      - With O(state=failover), go on although the standby replays late on purpose. It replays all that it has before it
        is promoted.
    type: bool
    default: false
  although_no_archive:
    description:
      - With O(state=promoted), go on although the archive cannot be asked which timelines there are.
    type: bool
    default: false
  timeout:
    description:
      - Seconds to wait.
    type: int
    default: 60
author:
  - pgdrill.pitr contributors (@pgdrill)
"""

EXAMPLES = r"""
- name: A standby
  pgdrill.pitr.standby:
    state: present
    pgdata: /var/lib/postgresql/18/main
    config_dir: /etc/postgresql/18/main
    bin_dir: /usr/lib/postgresql/18/bin
    login_unix_socket: /var/run/postgresql
    primary_host: db1.example.com
    primary_password: "{{ vault_standby_password }}"
    passfile: /usr/local/lib/pgdrill/standby/main.pgpass
    slot: db2
    repository: /srv/pitr
    cluster: main
    wal_command: /usr/local/lib/pgdrill/pitr-wal
"""

RETURN = r"""
action:
  description: What is (or would be) done, V(none), V(clone), V(rewind) or V(follow).
  returned: state is present
  type: str
  sample: clone
why:
  description: The reason for it.
  returned: state is present
  type: str
  sample: there is no data directory
stop:
  description: Whether a server that runs there has to be stopped first.
  returned: state is present
  type: bool
  sample: false
empty_cluster:
  description: System identifier of the cluster in the directory when nothing was made in it since initdb, else empty.
  returned: state is present
  type: str
  sample: ""
notes:
  description: What somebody should know.
  returned: state is present
  type: list
  elements: str
  sample: []
changes:
  description: What was changed, in words.
  returned: state is present
  type: list
  elements: str
  sample: ["clone: there is no data directory"]
moved_aside:
  description: Where the directory is now that was in the way, or empty.
  returned: state is present
  type: str
  sample: /var/lib/postgresql/18/main.old-20260301T143210
settings:
  description: All settings of the standby's file, for M(pgdrill.pitr.settings).
  returned: state is present
  type: dict
  sample: {primary_slot_name: db2}
exists:
  description: Whether there is a data directory.
  returned: state is not present
  type: bool
  sample: true
running:
  description: Whether a server runs.
  returned: always
  type: bool
  sample: true
in_recovery:
  description: Whether it is a standby.
  returned: state is not present
  type: bool
  sample: true
control_state:
  description: The cluster's state in pg_control.
  returned: state is not present
  type: str
  sample: shut down
checkpoint_lsn:
  description: Position of the last checkpoint in pg_control.
  returned: state is not present
  type: str
  sample: 0/7000028
received_lsn:
  description: How far WAL was streamed.
  returned: state is not present
  type: str
  sample: 0/7A21F08
replayed_lsn:
  description: How far WAL was replayed.
  returned: state is not present
  type: str
  sample: 0/7A21F08
known_lsn:
  description: The later of the two, how far this standby could come.
  returned: state is not present
  type: str
  sample: 0/7A21F08
timeline:
  description: Timeline in pg_control; with O(state=promoted) that of the new primary.
  returned: state is not present
  type: int
  sample: 2
dropped_slots:
  description: Slots that were dropped.
  returned: state is attached
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

import os
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.pgdrill.pitr.plugins.module_utils.boundary import (
    login_argument_spec,
    repository_argument_spec,
    run_module,
    ssh_argument_spec,
    ssh_settings,
)
from ansible_collections.pgdrill.pitr.plugins.module_utils.postgres import Login
from ansible_collections.pgdrill.pitr.plugins.module_utils.standby import REBUILD
from ansible_collections.pgdrill.pitr.plugins.module_utils.standby_make import Request, Standby
from ansible_collections.pgdrill.pitr.plugins.module_utils.standby_turn import Bear, Turn

STATES = ["status", "present", "attached", "ready", "failover", "promoted", "fenced"]
ARGUMENT_SPEC: dict[str, dict[str, Any]] = {
    **login_argument_spec(),
    **repository_argument_spec(),
    **ssh_argument_spec(),
    "bin_dir": {"type": "path", "required": True},
    "state": {"type": "str", "choices": STATES, "default": "status"},
    "pgdata": {"type": "path", "required": True},
    "config_dir": {"type": "path"},
    "log_file": {"type": "path"},
    "file": {"type": "str", "default": "50-pitr.conf"},
    "settings": {"type": "dict", "default": {}},
    "primary_host": {"type": "str", "default": ""},
    "primary_port": {"type": "int", "default": 5432},
    "primary_user": {"type": "str", "default": "pitr_standby"},
    "primary_password": {"type": "str", "default": "", "no_log": True},
    "primary_ssl_mode": {**login_argument_spec()["ssl_mode"]},
    "primary_ca_cert": {"type": "path", "default": ""},
    "passfile": {"type": "path", "default": ""},
    "slot": {"type": "str", "default": ""},
    "application_name": {"type": "str", "default": ""},
    "clone_from": {"type": "str", "choices": ["primary", "repository"], "default": "primary"},
    "rebuild": {"type": "str", "choices": list(REBUILD), "default": "never"},
    "replace_empty": {"type": "bool", "default": False},
    "empty_cluster": {"type": "str", "default": ""},
    "tablespace_mapping": {"type": "dict", "default": {}},
    "wal_command": {"type": "path", "required": True},
    "identity": {"type": "path"},
    "verify": {"type": "bool", "default": True},
    "require_slot": {"type": "bool", "default": True},
    "stale_slots": {"type": "list", "elements": "str", "default": []},
    "max_lag": {"type": "int", "default": 16777216},
    "shutdown_lsn": {"type": "str", "default": ""},
    "although_primary_answers": {"type": "bool", "default": False},
    "others": {"type": "dict", "default": {}},
    "although_behind": {"type": "bool", "default": False},
    "although_delayed": {"type": "bool", "default": False},
    "although_no_archive": {"type": "bool", "default": False},
    "timeout": {"type": "int", "default": 60},
}


def upstream(params: dict[str, Any]) -> Login:
    """The primary, as the role that replicates."""
    host = params["primary_host"]
    socket = host if host.startswith("/") else ""
    return Login(
        host="" if socket else host,
        unix_socket=socket,
        port=params["primary_port"],
        user=params["primary_user"],
        password=params["primary_password"],
        ssl_mode=params["primary_ssl_mode"],
        ca_cert=params["primary_ca_cert"],
    )


def request(params: dict[str, Any]) -> Request:
    """What was asked of a standby."""
    pgdata = os.path.realpath(params["pgdata"])
    config_dir = params["config_dir"] or ""
    if config_dir and os.path.realpath(config_dir) == pgdata:
        config_dir = ""
    return Request(
        pgdata=pgdata,
        bin_dir=params["bin_dir"],
        login=Login.from_params(params),
        upstream=upstream(params),
        slot=params["slot"],
        application_name=params["application_name"] or params["slot"],
        passfile=params["passfile"],
        wal_command=params["wal_command"],
        repository=params["repository"],
        cluster=params["cluster"],
        config_dir=config_dir,
        file=params["file"],
        settings=params["settings"],
        clone_from=params["clone_from"],
        rebuild=params["rebuild"],
        replace_empty=params["replace_empty"],
        empty_cluster=params["empty_cluster"],
        tablespace_mapping=params["tablespace_mapping"],
        identity=os.path.abspath(params["identity"]) if params["identity"] else "",
        ssh=ssh_settings(params),
        verify=params["verify"],
        require_slot=params["require_slot"],
    )


def make(module: AnsibleModule) -> dict[str, Any]:
    """Look, decide, do."""
    standby = Standby(request(module.params))
    decision = standby.look()
    result: dict[str, Any] = {
        "action": decision.action,
        "why": decision.why,
        "stop": decision.stop,
        "notes": list(decision.notes),
        "running": standby.local.running,
        "empty_cluster": standby.local.system_identifier if standby.local.empty_cluster else "",
    }
    done = standby.perform(decision, module.check_mode)
    result.update(changed=done.changed, changes=list(done.changes), moved_aside=done.moved_aside)
    return {**result, "settings": standby.settings()}


def run(module: AnsibleModule) -> dict[str, Any]:
    """Look, and do what was asked."""
    params = module.params
    state, check = params["state"], module.check_mode
    if state == "present":
        return make(module)
    pgdata = os.path.realpath(params["pgdata"])
    turn = Turn(Login.from_params(params), pgdata, params["bin_dir"], params["log_file"] or "", params["timeout"])
    result: dict[str, Any] = {"changed": False}
    if state == "ready":
        return {**result, **turn.check_ready(upstream(params), params["max_lag"]).to_dict()}
    if state == "failover":
        bear = Bear(params["although_primary_answers"], params["although_delayed"], params["although_behind"])
        return {**result, **turn.check_failover(upstream(params), params["others"], bear).to_dict()}
    if state == "attached" and not check:
        found = turn.wait_attached()
        dropped = turn.drop_slots(params["stale_slots"], check)
        return {"changed": bool(dropped), "dropped_slots": dropped, **found.to_dict()}
    if state == "promoted" and not check:
        fetch = [params["wal_command"], "get", params["cluster"]]
        changed, timeline = turn.promote(params["shutdown_lsn"], fetch, params["although_no_archive"])
        return {**turn.state().to_dict(), "changed": changed, "timeline": timeline}
    if state == "fenced":
        result["changed"] = turn.fence(check)
    return {**result, **turn.state().to_dict()}


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec=ARGUMENT_SPEC,
        supports_check_mode=True,
    )
    run_module(module, run)


if __name__ == "__main__":
    main()
