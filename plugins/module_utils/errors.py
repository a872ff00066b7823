# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The one exception that crosses from the engine to a boundary (an Ansible module or the command line).

The engine raises, the boundary turns it into a message. A message says what happened, to which file or server, what is
untouched, and what to do next.
"""

from __future__ import annotations


class PitrError(Exception):
    """Something was not done, or not proven.

    ``detail`` holds machine-readable facts that a module returns beside the message.
    """

    def __init__(self, message: str, **detail: object) -> None:
        super().__init__(message)
        self.message = message
        self.detail = detail
