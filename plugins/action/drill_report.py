# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Judges a drill, writes its evidence on the controller, and shows the closing summary as plain lines."""

from __future__ import annotations

import datetime
import os
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.pgdrill.pitr.plugins.module_utils.report import evidence, summary, write

display = Display()


class ActionModule(ActionBase):
    """The whole of drill_report: nothing of it happens on the managed host."""

    TRANSFERS_FILES = False
    _requires_connection = False
    _supports_check_mode = True
    _supports_async = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Called by Ansible."""
        super().run(tmp, task_vars)
        _result, arguments = self.validate_argument_spec(
            argument_spec={
                "directory": {"type": "path", "required": True},
                "drill": {"type": "dict", "required": True},
            }
        )
        directory = os.path.abspath(arguments["directory"])
        started_at = datetime.datetime.now(datetime.timezone.utc)
        document = evidence(arguments["drill"], started_at)
        lines = summary(document, directory)
        paths: dict[str, str] = {}
        if not self._task.check_mode:
            try:
                paths = write(document, directory)
            except OSError as error:
                raise AnsibleActionFail(
                    f"The evidence could not be written to {directory}: {error.strerror}."
                ) from error
            for line in lines:
                display.display(line)
        finished_at = datetime.datetime.now(datetime.timezone.utc)
        return {
            "changed": True,
            "verdict": document["verdict"],
            "failures": document["failures"],
            # What Ansible shows when the task is failed for its verdict.
            "msg": " ".join(document["failures"]),
            "paths": paths,
            "summary": lines,
            "seconds": (finished_at - started_at).total_seconds(),
            "started_at": started_at.isoformat(),
            "finished_at": finished_at.isoformat(),
        }
