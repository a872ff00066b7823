# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the user reads: one short line a step, one clear line for an error."""

from __future__ import annotations

import contextlib
import sys
from typing import TextIO


class SandboxError(Exception):
    """Something the user must know or do; the message says what happened and what to do next."""


def step(text: str) -> None:
    """Tell that a step begins. Flushed, so that the order holds against the output of child processes."""
    _write(sys.stdout, text)


def problem(text: str) -> None:
    """Tell an error or a warning, on stderr."""
    _write(sys.stderr, text)


def _write(stream: TextIO, text: str) -> None:
    # Whoever read us may be gone (a closed terminal or pipe), and there may still be servers to stop.
    with contextlib.suppress(OSError):
        print(f"sandbox: {text}", file=stream, flush=True)
