# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The boundary between Ansible and the engine: shared options, and one place where exceptions become messages."""

from __future__ import annotations

import datetime
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, Protocol

from .errors import PitrError
from .repository import ClusterFolder


def login_argument_spec() -> dict[str, dict[str, Any]]:
    """The ``login_*`` options of community.postgresql (doc fragment pgdrill.pitr.login)."""
    return {
        "login_host": {"type": "str", "default": ""},
        "login_port": {"type": "int", "default": 5432},
        "login_user": {"type": "str", "default": "postgres"},
        "login_password": {"type": "str", "default": "", "no_log": True},
        "login_unix_socket": {"type": "str", "default": ""},
        "login_db": {"type": "str", "default": "postgres"},
        "ssl_mode": {
            "type": "str",
            "choices": ["disable", "allow", "prefer", "require", "verify-ca", "verify-full"],
            "default": "prefer",
        },
        "ca_cert": {"type": "path", "default": ""},
    }


def repository_argument_spec() -> dict[str, dict[str, Any]]:
    """The options that name a cluster's place in a repository (doc fragment pgdrill.pitr.repository)."""
    return {
        "repository": {"type": "path", "required": True},
        "cluster": {"type": "str", "required": True},
    }


def ssh_argument_spec() -> dict[str, dict[str, Any]]:
    """How a repository on another host is reached (doc fragment pgdrill.pitr.ssh)."""
    return {
        "ssh_identity": {"type": "path", "default": ""},
        "ssh_known_hosts": {"type": "path", "default": ""},
        "ssh_timeout": {"type": "int", "default": 30},
    }


def ssh_settings(params: Mapping[str, Any]) -> dict[str, str]:
    """The options of ssh_argument_spec, as the engine wants them."""
    return {name: str(params[name]) for name in ssh_argument_spec() if params[name]}


def open_cluster(params: Mapping[str, Any]) -> ClusterFolder:
    """The cluster's folder that a module's options name. Raises PitrError."""
    access = {**ssh_settings(params), "identity": params.get("identity") or ""}
    return ClusterFolder.open(params["repository"], params["cluster"], access)


class Invocation(Protocol):
    """What a module's function sees of its invocation: an AnsibleModule, or the action plugins' stand-in."""

    @property
    def params(self) -> dict[str, Any]:
        """Validated options."""

    @property
    def check_mode(self) -> bool:
        """Whether nothing may be changed."""

    @property
    def _diff(self) -> bool:
        """Whether the change is to be shown."""


def outcome(invocation: Invocation, function: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """Call ``function`` and return the result with its times; a PitrError or OSError becomes ``failed`` and ``msg``."""
    started_at = datetime.datetime.now(datetime.timezone.utc)
    started = time.monotonic()
    try:
        result = function(invocation)
    except PitrError as error:
        return {**error.detail, "failed": True, "msg": error.message}
    except OSError as error:
        message = f"{error.filename or 'The system'}: {error.strerror or error}."
        return {"failed": True, "msg": message, "exception": traceback.format_exc()}
    result.setdefault("seconds", round(time.monotonic() - started, 3))
    result.setdefault("started_at", started_at.isoformat())
    result["finished_at"] = datetime.datetime.now(datetime.timezone.utc).isoformat()
    return result


def run_module(module: Any, function: Callable[[Any], dict[str, Any]]) -> NoReturn:
    """Leave the module with what ``function(module)`` comes to."""
    result = outcome(module, function)
    if result.pop("failed", False):
        module.fail_json(**result)
    module.exit_json(**result)
    raise AssertionError("exit_json returned")
