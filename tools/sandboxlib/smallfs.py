# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A small filesystem for the tests of full disks, where root starts them.

It lives in a mount namespace that this process makes for itself and its children, so that it goes away with the last
of them, however they end. Other users' tests make one in a user namespace; see tests/integration/smalldisk.py.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

from .layout import Layout

# Room for a few base backups of the tests' servers.
SIZE = "96m"
NAMES = 4000
_CLONE_NEWNS = 0x00020000  # unshare(2)


def mount(layout: Layout) -> Path | None:
    """A directory of the tests' user: `rw` is a small filesystem, `ro` the same one, read-only. None when this process
    may not mount, as in most containers."""
    if os.geteuid() != 0 or ctypes.CDLL(None).unshare(_CLONE_NEWNS) != 0:
        return None
    place = layout.root / "small"
    writable, view = place / "rw", place / "ro"
    for directory in (writable, view):
        directory.mkdir(parents=True, exist_ok=True)
    owner = f"uid={layout.account.uid},gid={layout.account.gid},mode=700"
    commands = (
        ["mount", "--make-rprivate", "/"],
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE},nr_inodes={NAMES},{owner}", "pgdrill", str(writable)],
        ["mount", "--bind", str(writable), str(view)],
        ["mount", "-o", "remount,bind,ro", str(view)],
    )
    for command in commands:
        if subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False).returncode != 0:
            return None
    return place
