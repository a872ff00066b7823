# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A frozen copy of a data directory that commands of the operator make and remove: LVM, ZFS, btrfs, a storage array."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .contents import PG_CONTROL
from .errors import PitrError
from .postgres import run


@dataclass(frozen=True)
class Snapshot:
    """``command`` makes it, ``cleanup`` removes it; both are argument lists, and no shell is involved.

    ``path`` is where the data directory then appears, ``tablespaces`` maps the directory of each tablespace to where
    that one does.
    """

    command: Sequence[str]
    path: str
    cleanup: Sequence[str] = ()
    tablespaces: Mapping[str, str] = field(default_factory=dict)

    def check(self, locations: Mapping[int, str]) -> None:
        """Refuse what can be known before. ``locations``: the tablespaces of the server. Raises PitrError."""
        for path in (self.path, *self.tablespaces.values()):
            if not os.path.isabs(path):
                raise PitrError(f"The snapshot's directory '{path}' is not an absolute path. No backup was taken.")
        missing = sorted(set(locations.values()) - set(self.tablespaces))
        if missing:
            # The links in the frozen copy lead to the living directories, which go on changing.
            raise PitrError(
                f"snapshot_tablespaces does not tell where the snapshot of {', '.join(missing)} appears. No backup was"
                " taken."
            )
        if os.path.lexists(os.path.join(self.path, PG_CONTROL)):
            raise PitrError(
                f"There is a data directory in {self.path} already, perhaps an earlier snapshot that was not removed."
                " What snapshot_command makes could not be told from it. Remove it; no backup was taken."
            )

    def take(self) -> None:
        """Raises PitrError when the command fails, or there is no data directory afterwards."""
        try:
            run(self.command)
        except PitrError as error:
            raise PitrError(f"snapshot_command: {error.message} No backup was taken.") from None
        if not os.path.isfile(os.path.join(self.path, PG_CONTROL)):
            raise PitrError(
                f"snapshot_command has succeeded, but there is no data directory in {self.path}. No backup was taken."
            )

    def remove(self) -> str:
        """What went wrong, or the empty text."""
        if not self.cleanup:
            return ""
        try:
            run(self.cleanup)
        except PitrError as error:
            return f"snapshot_cleanup_command: {error.message} The snapshot may still be there."
        return ""
