# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What belongs to a cluster and pg_dumpall leaves out, as comments that stand before its dump.

These are the settings and the client authentication, as the files of the configuration say (the server may not have
loaded them yet), the settings of ALTER ROLE ALL, and databases that refuse connections.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from .dumpparse import PREAMBLE
from .postgres import query
from .recovery_conf import FILE as RECOVERY_FILE

# Where a cluster lives is not what it is.
_LOCATION = frozenset(
    ["config_file", "data_directory", "external_pid_file", "hba_file", "ident_file", "port", "unix_socket_directories"]
)
# What a restore must change, or a cluster that never archives into the archive it came from.
_RESTORE = re.compile(
    r"(archive_(mode|command|library|cleanup_command)|restore_command|recovery_.*|hot_standby"
    r"|primary_(conninfo|slot_name))\Z"
)

# The last assignment wins (guc-file.l). What the managed include file of a recovery sets is not of the cluster.
_SETTINGS = """
SELECT DISTINCT ON (lower(name) COLLATE "C") lower(name), setting
  FROM pg_catalog.pg_file_settings
 WHERE name IS NOT NULL AND sourcefile !~ %s
 ORDER BY lower(name) COLLATE "C", seqno DESC
"""

_FOR_ALL_ROLES = """
SELECT s FROM pg_catalog.pg_db_role_setting, pg_catalog.unnest(setconfig) s
 WHERE setdatabase = 0 AND setrole = 0
 ORDER BY s COLLATE "C"
"""

_HBA = "SELECT pg_catalog.to_jsonb(r) FROM pg_catalog.pg_hba_file_rules r ORDER BY {order}line_number"
_IDENT = "SELECT pg_catalog.to_jsonb(m) FROM pg_catalog.pg_ident_file_mappings m ORDER BY {order}line_number"

# pg_dumpall passes over these; only that they are there can be compared.
_CLOSED_DATABASES = """
SELECT datname, pg_catalog.pg_get_userbyid(datdba) FROM pg_catalog.pg_database
 WHERE (NOT datallowconn OR datconnlimit = -2) AND datname <> 'template0' ORDER BY datname
"""

_META = """
SELECT pg_catalog.pg_is_in_recovery(), pg_catalog.current_setting('server_version_num')::int,
       (SELECT system_identifier::text FROM pg_catalog.pg_control_system())
"""

_POSITION_COLUMNS = frozenset(["file_name", "line_number", "map_number", "rule_number"])


def is_compared(setting: str) -> bool:
    """Whether a setting of the configuration files is part of what a restore must reproduce."""
    return setting not in _LOCATION and _RESTORE.match(setting) is None


def preamble(connection: Any) -> bytes:
    """Comments that stand before the dump: one line for each thing that pg_dumpall leaves out.

    Raises PitrError when the user may not read them: pg_dumpall wants a superuser, too.
    """
    in_recovery, version, system_identifier = query(connection, _META)[0]
    lines = [
        _line("META", "in_recovery", in_recovery),
        _line("META", "server_version_num", version),
        _line("META", "system_identifier", system_identifier),
    ]
    for name, setting in query(connection, _SETTINGS, [f"(^|/){re.escape(RECOVERY_FILE)}$"]):
        if is_compared(name):
            lines.append(_line("SETTING", name, setting))
    for (setting,) in query(connection, _FOR_ALL_ROLES):
        name, _equals, value = setting.partition("=")
        lines.append(_line("ROLE SETTING", f"ALL {name}", value))
    order = "rule_number, " if version >= 160000 else ""
    for (rule,) in query(connection, _HBA.format(order=order)):
        lines.append(_line("HBA RULE", *_file_rule(rule, ("type", "database", "user_name", "address", "auth_method"))))
    order = "map_number, " if version >= 160000 else ""
    for (rule,) in query(connection, _IDENT.format(order=order)):
        lines.append(_line("IDENT MAPPING", *_file_rule(rule, ("map_name", "sys_name", "pg_username"))))
    for name, owner in query(connection, _CLOSED_DATABASES):
        lines.append(_line("CLOSED DATABASE", name, {"owner": owner}))
    return PREAMBLE + b"".join(lines)


def _line(kind: str, name: str, value: object) -> bytes:
    """JSON keeps everything on one line and in ASCII."""
    return f"-- {kind} {json.dumps(name)} {json.dumps(value, sort_keys=True)}\n".encode("ascii")


def _file_rule(rule: Mapping[str, Any], name_columns: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
    """Name and value of a line of pg_hba.conf or pg_ident.conf, without where it stands; no passwords in the name."""
    value = {key: item for key, item in rule.items() if key not in _POSITION_COLUMNS}
    # The message of an error names the file.
    value["error"] = value.get("error") is not None
    words = [rule.get(column) for column in name_columns]
    texts = [",".join(word) if isinstance(word, list) else str(word) for word in words if word is not None]
    return " ".join(texts), value
