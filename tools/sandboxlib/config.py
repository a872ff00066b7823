# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""sandbox.yml: what inventories/sandbox knows about this machine."""

from __future__ import annotations

import json
import os
import re
import secrets
import socket

from .layout import Layout, make_private
from .say import SandboxError

PORTS_PER_SANDBOX = 10


def write(layout: Layout, major: int, servers_are_down: bool = False) -> None:
    """Create the data and socket directories and write sandbox.yml, atomically.

    The ports of a sandbox stay the same from run to run, so that a server that still runs is found; only when
    `servers_are_down` are they looked at again and exchanged when somebody else has taken one.
    """
    run_dir = layout.run_dir(major)
    run_dir.mkdir(exist_ok=True)
    layout.account.own(run_dir)
    run_dir.chmod(0o700)
    make_private(layout.socket_dir(major), layout.account)
    values: dict[str, str | int | bool] = {
        "directory": str(run_dir),
        "socket_dir": str(layout.socket_dir(major)),
        "user": layout.account.name,
        "become": layout.account.is_other,
        "python": str(layout.python),
        "bin_dir": str(layout.bin_dir(major)),
        "postgresql_version": major,
        "port_base": _port_base(layout, major, servers_are_down),
        # Of the role that takes backups. Kept from run to run, so that a second site.yml finds nothing to change.
        "password": _current(layout, major, r"password: \"([0-9a-f]{32})\"") or secrets.token_hex(16),
    }
    lines = ["---", "# Written by `make setup`; read by inventories/sandbox."]
    # JSON is YAML: whatever characters the checkout's path has, they are quoted right.
    lines += [f"{name}: {json.dumps(value)}" for name, value in values.items()]
    fresh = layout.config.with_name("sandbox.yml.tmp")
    fresh.unlink(missing_ok=True)
    fresh.touch(mode=0o600)
    fresh.write_text("\n".join(lines) + "\n", encoding="utf-8")
    os.replace(fresh, layout.config)


def _port_base(layout: Layout, major: int, servers_are_down: bool) -> int:
    """The first of PORTS_PER_SANDBOX neighbouring TCP ports between 20000 and 29999, free on the loopback address."""
    first = 20000 + int(layout.key.rpartition("-")[2], 16) % 1000 * PORTS_PER_SANDBOX
    current = _current(layout, major, r"port_base: (2\d\d\d\d)")
    if current is not None:
        if not servers_are_down:
            return int(current)
        first = int(current)
    for offset in range(1000):
        base = 20000 + (first - 20000 + offset * PORTS_PER_SANDBOX) % 10000
        if all(_is_free(port) for port in range(base, base + PORTS_PER_SANDBOX)):
            return base
    raise SandboxError("no ten neighbouring TCP ports between 20000 and 29999 are free")


def _current(layout: Layout, major: int, pattern: str) -> str | None:
    """A value in sandbox.yml, when that is for the same major version."""
    try:
        text = layout.config.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    found = re.search(rf"^{pattern}$", text, re.MULTILINE)
    return found[1] if found and f"\npostgresql_version: {major}\n" in text else None


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
