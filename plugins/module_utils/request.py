# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What is asked of a restore."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .catalog import Backup

ARCHIVE_AFTER = ("off", "same", "none-until-promoted")


@dataclass(frozen=True)
class Request:
    """What was asked. Paths are absolute; ``wal_command`` is the installed ``pitr-wal``."""

    repository: str
    cluster: str
    pgdata: str
    bin_dir: str
    wal_command: str
    target_options: Mapping[str, Any] = field(default_factory=dict)
    backup: str = "auto"
    config_dir: str = ""
    tablespace_mapping: Mapping[str, str] = field(default_factory=dict)
    # Every tablespace that is not mapped goes to a directory in here, named by its OID.
    tablespace_prefix: str = ""
    # Where pg_wal goes, outside of the data directory.
    pg_wal_directory: str = ""
    force: bool = False
    # Change the directory in place, where there is one of this cluster, instead of moving it aside.
    delta: bool = False
    keep_unaccepted: bool = True
    archive_after: str = "none-until-promoted"
    verify: bool = True
    # Path of the file with age identities that open what is encrypted, empty for none.
    identity: str = ""
    use_partial: bool = False
    # Nobody but ``inspect_user`` over the unix socket, and whom the lines ``inspect_hba`` let in, until it is accepted.
    keep_out: bool = True
    inspect_user: str = "postgres"
    inspect_hba: tuple[str, ...] = ()
    # Whose pg_wal has WAL beyond the archive's end: auto, none, or a path (deadwal.py).
    dead_pg_wal: str = "auto"
    # How a repository on another host is reached: the settings of remote.SshTree.
    ssh: Mapping[str, str] = field(default_factory=dict)
    # What is restored becomes a standby: standby.signal, and no settings of a recovery to a target.
    standby: bool = False
    # Number of the chapter to restore from; the newest one when None.
    chapter: int | None = None

    def __post_init__(self) -> None:
        # The roles always say where the configuration is; in the data directory it comes with the backup.
        if self.config_dir and os.path.abspath(self.config_dir) == os.path.abspath(self.pgdata):
            object.__setattr__(self, "config_dir", "")

    @property
    def configuration(self) -> str:
        """Directory of postgresql.conf."""
        return self.config_dir or self.pgdata

    def locations(self, backup: Backup) -> dict[int, str]:
        """Where each tablespace of the backup goes."""
        result = {}
        for item in backup.tablespaces:
            default = os.path.join(self.tablespace_prefix, str(item.oid)) if self.tablespace_prefix else item.location
            result[item.oid] = self.tablespace_mapping.get(item.location, default)
        return result
