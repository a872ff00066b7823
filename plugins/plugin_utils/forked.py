# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Modules of this collection on a host that is the controller itself.

Sending a module to such a host means packing it, starting an interpreter and compiling everything again: 0.3 seconds
for what a fork of the worker does in 0.05, and a drill is some thirty tasks. So where the connection is local and the
interpreter is the one that Ansible runs in, the module's function is called in a forked child, as the user that the
task becomes. Everywhere else, and in doubt, the module is sent like any other.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import pwd
import sys
import traceback
from dataclasses import dataclass
from typing import Any

from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from ansible.plugins.action import ActionBase
from ansible.plugins.loader import become_loader, connection_loader, filter_loader, shell_loader, test_loader
from ansible_collections.pgdrill.pitr.plugins.module_utils.boundary import outcome

PREFIX = "pgdrill.pitr."
MODULES = "ansible_collections.pgdrill.pitr.plugins.modules"
# Set to 0 to send the modules even so.
SWITCH = "PGDRILL_FORK"


@dataclass(frozen=True)
class Invocation:
    """Stands in for AnsibleModule."""

    params: dict[str, Any]
    check_mode: bool
    _diff: bool


class ForkedAction(ActionBase):
    """Runs the module of the same name, forked where that is the same and sent where it is not."""

    _supports_check_mode = True
    _supports_async = True

    def __init_subclass__(cls) -> None:
        """Load the module with its action plugin, for which Ansible's strategy asks before it forks a worker.

        What a worker loads is gone with it: every task would compile the same sources again.
        """
        super().__init_subclass__()
        with contextlib.suppress(ImportError):
            importlib.import_module(f"{MODULES}.{cls.__module__.rpartition('.')[2]}")

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Called by Ansible."""
        super().run(tmp, task_vars)
        return self.call(dict(self._task.args), task_vars)

    def call(self, arguments: dict[str, Any], task_vars: dict[str, Any] | None, name: str = "") -> dict[str, Any]:
        """Run a module of the collection with these arguments; without ``name`` the task's own."""
        name = name or self._task.action.rpartition(".")[2]
        user = self._fork_as(task_vars or {})
        if user is None:
            wrap = bool(self._task.async_val)
            sent: dict[str, Any] = self._execute_module(
                module_name=PREFIX + name, module_args=arguments, task_vars=task_vars, wrap_async=wrap
            )
            return sent
        module = importlib.import_module(f"{MODULES}.{name}")
        validator = ArgumentSpecValidator(module.ARGUMENT_SPEC, required_if=getattr(module, "REQUIRED_IF", None))
        validated = validator.validate(arguments)
        if validated.error_messages:
            return {"failed": True, "msg": "; ".join(validated.error_messages)}
        # Through JSON, as a module gets them: plain values instead of the controller's tagged ones.
        parameters = json.loads(json.dumps(validated.validated_parameters))
        return _forked(module.run, Invocation(parameters, bool(self._task.check_mode), bool(self._task.diff)), user)

    def _fork_as(self, task_vars: dict[str, Any]) -> str | None:
        """The user to become, empty for none; None when the module has to be sent."""
        if os.environ.get(SWITCH) == "0" or self._task.async_val or any(self._task.environment or []):
            return None
        if self._connection.ansible_name != "ansible.builtin.local":
            return None
        interpreter = self._templar.template(task_vars.get("ansible_python_interpreter") or "")
        # The directory, not what the name links to: a virtual environment decides which libraries there are.
        if os.path.realpath(os.path.dirname(interpreter)) != os.path.realpath(os.path.dirname(sys.executable)):
            return None
        become = self._connection.become
        if become is None:
            return ""
        user = str(become.get_option("become_user", playcontext=self._play_context) or "")
        return user if user and os.geteuid() == 0 else None


def _forked(function: Any, invocation: Invocation, user: str) -> dict[str, Any]:
    """Call in a child and return what it says; a child that dies without a word is a failure."""
    source, target = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(source)
            with os.fdopen(target, "w", encoding="utf-8") as stream:
                try:
                    if user:
                        _become(user)
                    result = outcome(invocation, function)
                except Exception as error:
                    result = {"failed": True, "msg": f"{type(error).__name__}: {error}"}
                    result["exception"] = traceback.format_exc()
                json.dump(result, stream)
            code = 0
        finally:
            # Not sys.exit: the worker's own clean-up belongs to the worker.
            os._exit(code)
    os.close(target)
    with os.fdopen(source, encoding="utf-8") as stream:
        said = stream.read()
    _pid, status = os.waitpid(child, 0)
    with contextlib.suppress(ValueError):
        result = json.loads(said)
        if isinstance(result, dict) and status == 0:
            result.setdefault("changed", False)
            return result
    return {"failed": True, "msg": f"The task ended without a result (wait status {status}). Nothing is known of it."}


def _become(user: str) -> None:
    """What su does, for good: groups, group, user, and the environment that goes with it."""
    entry = pwd.getpwnam(user)
    os.initgroups(entry.pw_name, entry.pw_gid)
    os.setgid(entry.pw_gid)
    os.setuid(entry.pw_uid)
    os.environ.update(HOME=entry.pw_dir, USER=user, LOGNAME=user)
    os.chdir("/")


def _load_for_workers() -> None:
    """Load what the tasks of a local host want, in the process that workers are forked from; see __init_subclass__."""
    connection_loader.get("ansible.builtin.local", class_only=True)
    become_loader.get("ansible.builtin.su", class_only=True)
    shell_loader.get("ansible.builtin.sh", class_only=True)
    filter_loader.get("ansible.builtin.combine")
    test_loader.get("ansible.builtin.changed")
    with contextlib.suppress(ImportError):
        importlib.import_module("psycopg2.extras")
    # A worker's garbage collector would look at all that was there before it, and so copy the pages of it.
    gc.freeze()


_load_for_workers()
