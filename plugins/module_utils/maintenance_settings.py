# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the command ``pitr`` is told of a cluster, and where that lies beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from .errors import PitrError
from .repository import check_cluster_name


@dataclass(frozen=True)
class Settings:
    """What ``<directory>/maintenance/<cluster>.json`` holds: the options of the modules. The password is in
    ``<cluster>.pgpass`` beside it, which libpq reads; sizes and times are in the modules' units."""

    repository: str
    bin_dir: str
    login_host: str
    login_port: int = 5432
    login_user: str = "pitr_backup"
    ssl_mode: str = ""
    ca_cert: str = ""
    type: str = "full"
    full_every: str = ""
    max_chain: int = 0
    compression: str = "auto"
    checkpoint: str = "fast"
    max_rate: str = ""
    verify: bool = True
    archive_timeout: int = 600
    keep_full: int = 0
    recovery_window: str = ""
    backup_to_verify: str = "latest"
    verify_level: str = "content"
    identity: str = ""
    drill_directory: str = ""
    drill_user: str = "postgres"
    drill_amcheck: bool = True
    drill_jobs: int = 2
    drill_timeout: int = 86400
    drill_settings: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As stored."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Settings:
        """As read; what a later version has stored besides is left out. Raises TypeError when one is missing."""
        return cls(**{field.name: values[field.name] for field in fields(cls) if field.name in values})


def settings_path(directory: str, cluster: str) -> str:
    """Path of the settings."""
    return os.path.join(directory, "maintenance", f"{cluster}.json")


def passfile_path(directory: str, cluster: str) -> str:
    """Path of the password file."""
    return os.path.join(directory, "maintenance", f"{cluster}.pgpass")


def read_settings(directory: str, cluster: str) -> Settings:
    """Raises PitrError when there are none that can be used."""
    check_cluster_name(cluster)
    path = settings_path(directory, cluster)
    try:
        with open(path, encoding="utf-8") as stream:
            return Settings.from_dict(json.load(stream))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise PitrError(
            f"The settings {path} cannot be used: {error}. The role pgdrill.pitr.backup writes them. Nothing was done."
        ) from None
