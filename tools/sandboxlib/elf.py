# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Where a program or library looks for the libraries it needs: a change for files that were moved after the build."""

from __future__ import annotations

import os
from pathlib import Path


def search_in(file: Path, built_for: str | Path, now: str) -> None:
    """Let `file` look for its libraries in `now` (such as `$ORIGIN`, its own directory) instead of `built_for`.

    The dynamic section names the directory as a NUL-terminated string (elf(5), DT_RUNPATH), and a shorter one fits in
    its place. A file that does not name `built_for` stays as it is.
    """
    old = b"\0" + os.fsencode(built_for) + b"\0"
    new = b"\0" + os.fsencode(now)
    content = file.read_bytes()
    if old in content and len(new) < len(old):
        file.write_bytes(content.replace(old, new.ljust(len(old), b"\0")))
