# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Shows the plan before a large restore, and how far it is while it runs."""

from __future__ import annotations

import os
import time
from typing import Any

from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.pgdrill.pitr.plugins.plugin_utils.forked import ForkedAction

display = Display()

# Bytes. A smaller backup is unpacked within seconds, and one call is enough.
QUIET_UP_TO = 1 << 30
# Seconds a restore may take before Ansible ends it.
LONGEST = 7 * 24 * 3600
FIRST_PAUSE = 2.0
LONGEST_PAUSE = 30.0


class ActionModule(ForkedAction):
    """Call the module; when it says that there is much to do, call it again in the background and watch."""

    _supports_async = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Called by Ansible."""
        ActionBase.run(self, tmp, task_vars)
        arguments = dict(self._task.args)
        limit = int(os.environ.get("PGDRILL_QUIET_UP_TO", QUIET_UP_TO))
        result = self.call({**arguments, "defer_above": None if self._task.check_mode else limit}, task_vars)
        if not result.get("deferred"):
            return result
        return self._watch(arguments, result["plan"], task_vars)

    def _show(self, text: str, task_vars: dict[str, Any] | None) -> None:
        display.display(
            f"  [{(task_vars or {}).get('inventory_hostname', '')}] {self._task.get_name().strip()}: {text}"
        )

    def _watch(
        self, arguments: dict[str, Any], plan: dict[str, Any], task_vars: dict[str, Any] | None
    ) -> dict[str, Any]:
        self._show(
            f"backup {plan['backup']}, {plan['backup_bytes'] >> 20} MiB; then {plan['segments']} segments of WAL,"
            f" {plan['first_segment']} to {plan['last_segment']}; target {plan['target']}",
            task_vars,
        )
        started = time.monotonic()
        self._task.async_val = LONGEST
        job = self.call(arguments, task_vars)
        self._task.async_val = 0
        if job.get("failed") or "ansible_job_id" not in job:
            return job
        looks = {key: arguments[key] for key in ("pgdata", "config_dir", "bin_dir") if arguments.get(key)}
        pause = FIRST_PAUSE
        while True:
            time.sleep(pause)
            pause = min(pause * 1.3, LONGEST_PAUSE)
            status: dict[str, Any] = self._execute_module(
                module_name="ansible.legacy.async_status",
                module_args={"jid": job["ansible_job_id"], "_async_dir": self.get_shell_option("async_dir")},
                task_vars=task_vars,
            )
            if status.get("finished"):
                break
            found = self.call(looks, task_vars, "recovery_info")
            percent = (found.get("recovery") or {}).get("percent")
            text = "preparing or verifying" if percent is None else f"{percent:.0f} % of the files"
            self._show(f"{text}, {time.monotonic() - started:.0f} s so far", task_vars)
        self._execute_module(
            module_name="ansible.legacy.async_status",
            module_args={
                "jid": job["ansible_job_id"],
                "mode": "cleanup",
                "_async_dir": self.get_shell_option("async_dir"),
            },
            task_vars=task_vars,
        )
        return {
            key: value
            for key, value in status.items()
            if key not in ("ansible_job_id", "results_file", "finished", "started")
        }
