# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The boundary between Ansible and the engine: shared options, and one place where exceptions become messages."""

from __future__ import annotations

import datetime
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from .errors import PitrError


def login_argument_spec() -> dict[str, dict[str, Any]]:
    """The ``login_*`` options of community.postgresql (doc fragment pgdrill.pitr.login)."""
    return {
        "login_host": {"type": "str", "default": ""},
        "login_port": {"type": "int", "default": 5432},
        "login_user": {"type": "str", "default": "postgres"},
        "login_password": {"type": "str", "default": "", "no_log": True},
        "login_unix_socket": {"type": "str", "default": ""},
        "login_db": {"type": "str", "default": "postgres"},
    }


def repository_argument_spec() -> dict[str, dict[str, Any]]:
    """The options that name a cluster's place in a repository (doc fragment pgdrill.pitr.repository)."""
    return {
        "repository": {"type": "path", "required": True},
        "cluster": {"type": "str", "required": True},
    }


def run_module(module: Any, function: Callable[[Any], dict[str, Any]]) -> NoReturn:
    """Call ``function(module)`` and leave with its result; a PitrError or OSError becomes a message."""
    started_at = datetime.datetime.now(datetime.timezone.utc)
    started = time.monotonic()
    try:
        result = function(module)
    except PitrError as error:
        module.fail_json(msg=error.message, **error.detail)
    except OSError as error:
        module.fail_json(
            msg=f"{error.filename or 'The system'}: {error.strerror or error}.", exception=traceback.format_exc()
        )
    result.setdefault("seconds", round(time.monotonic() - started, 3))
    result.setdefault("started_at", started_at.isoformat())
    result["finished_at"] = datetime.datetime.now(datetime.timezone.utc).isoformat()
    module.exit_json(**result)
    raise AssertionError("exit_json returned")
