# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Taking an installed command away again: what was written for one cluster, and the program when no other one uses it.

Only what ``install`` and ``maintenance_install`` write is removed, by name; a directory goes when it is empty.
"""

from __future__ import annotations

import contextlib
import os
import shutil

from .errors import PitrError
from .install import COMMAND, PACKAGE
from .maintenance_settings import passfile_path
from .maintenance_settings import settings_path as maintenance_path
from .repository import check_cluster_name
from .tree import fsync_directory
from .upstream import settings_path as receiver_path

# Of each command: its program below lib/, and its launchers.
PROGRAMS = {COMMAND: ("__main__.py", (COMMAND,)), "pitr": ("pitr.py", ("pitr", "pitr-status"))}
# What may be told to `pitr` lies in several directories; the password is shared.
WATCHED = "monitoring"


def uninstall(directory: str, cluster: str, command: str, check: bool = False) -> list[str]:
    """Remove ``command`` of one cluster. Returns the paths that went, or with ``check`` would go; none when there is
    nothing.

    Raises PitrError while the cluster's receiver is configured, which runs ``pitr-wal``.
    """
    check_cluster_name(cluster)
    receiver = receiver_path(directory, cluster)
    if command == COMMAND:
        # In check mode the receiver that would be gone by now is still there.
        if not check and os.path.exists(receiver):
            raise PitrError(
                f"The receiver of the cluster '{cluster}' uses {os.path.join(directory, COMMAND)}. Remove it first,"
                " with the state absent of pgdrill.pitr.receiver. Nothing was changed."
            )
        own = os.path.join(directory, f"{cluster}.json")
        files = [own, receiver.replace(".json", ".log")]
    else:
        own = maintenance_path(directory, cluster)
        watched = os.path.exists(os.path.join(directory, WATCHED, f"{cluster}.json"))
        files = [own] if watched else [own, passfile_path(directory, cluster)]
    gone = [path for path in files if os.path.lexists(path)]
    others = _names(os.path.dirname(own), ".json") - {os.path.basename(own)}
    if command != COMMAND:
        others |= _names(os.path.join(directory, WATCHED), ".json")
    if not others:
        library = os.path.join(directory, "lib")
        program, launchers = PROGRAMS[command]
        paths = [os.path.join(library, program), *(os.path.join(directory, name) for name in launchers)]
        gone += [path for path in paths if os.path.lexists(path)]
        # Each command lies beside this one and uses the same package.
        if not any(os.access(os.path.join(directory, name), os.X_OK) for name in _names(directory) - set(launchers)):
            cached = [os.path.join(library, name) for name in (PACKAGE, "__pycache__")]
            gone += [path for path in cached if os.path.lexists(path)]
    if gone and not check:
        for path in gone:
            _remove(path)
        for name in ("receiver", "maintenance", WATCHED, "lib"):
            # Somebody else's files may lie there.
            with contextlib.suppress(OSError):
                os.rmdir(os.path.join(directory, name))
        fsync_directory(directory)
    return gone


def _names(directory: str, ending: str = "") -> set[str]:
    """Files of a directory with this ending; with none, all that are no directories."""
    with contextlib.suppress(FileNotFoundError):
        return {entry.name for entry in os.scandir(directory) if entry.name.endswith(ending) and not entry.is_dir()}
    return set()


def _remove(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        os.unlink(path)
