# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The ways to take a base backup, by their names."""

from __future__ import annotations

from typing import Any

from .backup import BaseBackup
from .errors import PitrError
from .lowlevel import LowLevelBackup
from .offline import OfflineBackup
from .postgres import Login
from .repository import ClusterFolder
from .snapshot import Snapshot

METHODS = ("stream", "low_level", "offline")


def make_backup(
    method: str,
    folder: ClusterFolder,
    login: Login,
    bin_dir: str,
    pgdata: str = "",
    snapshot: Snapshot | None = None,
    **options: Any,
) -> BaseBackup:
    """A backup that was not begun yet. ``options`` as for BaseBackup.

    Raises PitrError when an option belongs to another method: it would have no effect.
    """
    if method != "stream" and options.pop("basis", None) is not None:
        raise PitrError(f"An incremental backup is taken with method stream, not with {method}. No backup was taken.")
    if snapshot is not None and method != "low_level":
        raise PitrError(f"A snapshot is taken with method low_level, not with {method}. No backup was taken.")
    if method == "low_level":
        return LowLevelBackup(folder, login, bin_dir, pgdata=pgdata, snapshot=snapshot, **options)
    if method == "offline":
        if not pgdata:
            raise PitrError("method offline needs pgdata: no server is asked for it. No backup was taken.")
        return OfflineBackup(folder, login, bin_dir, pgdata=pgdata, **options)
    return BaseBackup(folder, login, bin_dir, **options)
