# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Waits for a recovery in slices, and shows in between how far it is: a long replay must not look like a hang."""

from __future__ import annotations

import time
from typing import Any

from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.pgdrill.pitr.plugins.plugin_utils.forked import ForkedAction

display = Display()

# Seconds. The first slices are short, so that a small recovery ends in one call and a large one is soon seen to move.
FIRST_SLICE = 5.0
LONGEST_SLICE = 30.0


class ActionModule(ForkedAction):
    """Call the module until the target is reached or the time is over."""

    _supports_async = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Called by Ansible."""
        ActionBase.run(self, tmp, task_vars)
        arguments = dict(self._task.args)
        if arguments.get("state", "reached") != "reached" or self._task.check_mode:
            return self.call(arguments, task_vars)
        timeout = float(arguments.get("timeout") or 3600)
        started = time.monotonic()
        first_started_at = None
        length = FIRST_SLICE
        while True:
            left = timeout - (time.monotonic() - started)
            final = left <= length
            # The last call has no slice: it fails by itself, with the module's own words.
            arguments["timeout"] = max(1, int(left)) if final else int(timeout)
            arguments["return_after"] = None if final else length
            result = self.call(arguments, task_vars)
            first_started_at = first_started_at or result.get("started_at")
            if final or result.get("failed") or "reached" in result:
                break
            name = self._task.get_name().strip()
            host = (task_vars or {}).get("inventory_hostname", "")
            display.display(
                f"  [{host}] {name}: {result.get('progress_text')}, {time.monotonic() - started:.0f} s so far"
            )
            length = min(length * 1.5, LONGEST_SLICE)
        if "seconds" in result:
            result["seconds"] = round(time.monotonic() - started, 3)
            result["started_at"] = first_started_at
        return result
