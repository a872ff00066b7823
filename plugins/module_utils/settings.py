# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Settings of a server in one include file, and what they still need to come into force."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from typing import Any

from .errors import PitrError
from .postgres import Login, conf_literal, query
from .recovery_conf import INCLUDE_DIR, drop_include_dir, ensure_include_dir, has_include_dir
from .repository import write_atomic


def render(settings: Mapping[str, Any], header: str) -> str:
    """The include file: one assignment a line, sorted. Booleans become on and off."""
    lines = [f"# {header}"]
    for name, value in sorted(settings.items()):
        if not name.replace("_", "").replace(".", "").isalnum():
            raise PitrError(f"'{name}' is not the name of a setting. Nothing was changed.")
        text = {True: "on", False: "off"}[value] if isinstance(value, bool) else value
        lines.append(f"{name} = {conf_literal(text)}")
    return "\n".join(lines) + "\n"


def write(config_dir: str, file: str, text: str, check: bool) -> tuple[bool, str]:
    """Bring the file up to date and make postgresql.conf read it. Returns (changed, old text)."""
    path = os.path.join(config_dir, INCLUDE_DIR, file)
    old = ""
    with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8") as stream:
        old = stream.read()
    changed = old != text or not has_include_dir(config_dir)
    if changed and not check:
        ensure_include_dir(config_dir)
        write_atomic(path, text.encode())
    return changed, old


def remove(config_dir: str, file: str, check: bool) -> tuple[bool, str]:
    """Remove the file, and with the last one what ``ensure_include_dir`` has added. Returns (changed, old text)."""
    path = os.path.join(config_dir, INCLUDE_DIR, file)
    try:
        with open(path, encoding="utf-8") as stream:
            old = stream.read()
    except FileNotFoundError:
        return False, ""
    if not check:
        os.unlink(path)
        drop_include_dir(config_dir)
    return True, old


def loaded_at(login: Login) -> float:
    """When the server has last read its files, seconds of the epoch."""
    with contextlib.closing(login.connect()) as connection:
        return float(query(connection, "SELECT extract(epoch FROM pg_conf_load_time())")[0][0])


def apply(login: Login, reload: bool) -> list[str]:
    """Let the server read its files again, and return the settings that wait for a restart.

    Raises PitrError with file and line when the server cannot read something; it then goes on with its old settings.
    """
    with contextlib.closing(login.connect()) as connection:
        query(connection, "SET lc_messages TO 'C'")
        # What waits for a restart is listed as an error too (guc.c, ProcessConfigFileInternal); it is none here.
        wrong = query(
            connection,
            "SELECT sourcefile, sourceline, name, error FROM pg_file_settings WHERE error IS NOT NULL"
            " AND error <> 'setting could not be applied' AND error NOT LIKE '%%cannot be changed without%%'",
            (),
        )
        if wrong:
            file, line, name, error = wrong[0]
            where = f"{file}, line {line}" if file else "The configuration"
            raise PitrError(f"{where}: {name or ''} {error}. The server goes on with its old settings.")
        if reload:
            # The postmaster reads the files when it gets to the signal; wait until a new session sees that it has.
            before = query(connection, "SELECT pg_conf_load_time()")[0][0]
            query(connection, "SELECT pg_reload_conf()")
            for _attempt in range(50):
                with contextlib.closing(login.connect()) as fresh:
                    if query(fresh, "SELECT pg_conf_load_time()")[0][0] > before:
                        break
                query(connection, "SELECT pg_sleep(0.02)")
        with contextlib.closing(login.connect()) as fresh:
            # Settings of a recovery count as changed when they have gone with it, and mean nothing to a running server.
            rows = query(
                fresh,
                "SELECT name FROM pg_settings WHERE pending_restart AND name <> 'hot_standby'"
                " AND name NOT LIKE 'recovery_target%' ORDER BY name",
            )
            return [row[0] for row in rows]
