# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The operating system's user that the sandbox's servers run as: PostgreSQL refuses to run as root."""

from __future__ import annotations

import grp
import os
import pwd
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .say import SandboxError


@dataclass(frozen=True)
class Account:
    """A user by name and numbers; `is_other` when it is not the one who runs this process."""

    name: str
    uid: int
    gid: int
    is_other: bool

    def own(self, path: Path) -> None:
        """Hand `path` itself (not what lies in it) to this user."""
        if self.is_other:
            os.chown(path, self.uid, self.gid, follow_symlinks=False)

    def popen(
        self, argv: Sequence[str], env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> subprocess.Popen[bytes]:
        """Start `argv` as this user in the foreground, with our terminal and our process group."""
        if self.is_other:
            return subprocess.Popen(argv, env=env, cwd=cwd, user=self.uid, group=self.gid, extra_groups=[])
        return subprocess.Popen(argv, env=env, cwd=cwd)

    def capture(self, argv: Sequence[str], timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Run `argv` as this user from / without input; `timeout` in seconds. Never raises: a command that cannot be
        started has the return code 126, one that does not end 124."""
        identity: dict[str, Any] = {"user": self.uid, "group": self.gid, "extra_groups": []} if self.is_other else {}
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PG"))}
        try:
            answer: subprocess.CompletedProcess[str] = subprocess.run(
                argv, cwd="/", env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                errors="replace", timeout=timeout, check=False, **identity,
            )  # fmt: skip
            return answer
        except subprocess.TimeoutExpired:
            return subprocess.CompletedProcess(list(argv), 124, "", f"no answer within {timeout:g} s")
        except OSError as error:
            return subprocess.CompletedProcess(list(argv), 126, "", str(error))


def myself() -> Account:
    """The user who runs this process."""
    uid = os.geteuid()
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:  # A container may run with a bare number; PostgreSQL's tools want a name.
        raise SandboxError(
            f"the user id {uid} has no entry in /etc/passwd, and PostgreSQL will not start without one; "
            "run as a user that has one"
        ) from None
    return Account(name, uid, os.getegid(), is_other=False)


def server_account() -> Account:
    """Who the servers run as: ourselves, or, for root, $PITR_SANDBOX_USER, $SUDO_USER or `nobody`."""
    if os.geteuid() != 0:
        return myself()
    sudo_user = os.environ.get("SUDO_USER", "")
    name = os.environ.get("PITR_SANDBOX_USER") or (sudo_user if sudo_user not in ("", "root") else "nobody")
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        raise SandboxError(
            f"there is no user {name!r} for the servers to run as (PostgreSQL refuses root); "
            "name another one: PITR_SANDBOX_USER=name"
        ) from None
    if entry.pw_uid == 0:
        raise SandboxError("PITR_SANDBOX_USER must not be root: PostgreSQL refuses to run as root")
    try:
        grp.getgrgid(entry.pw_gid)
    except KeyError:
        raise SandboxError(f"the group {entry.pw_gid} of the user {name} does not exist; name another user") from None
    return Account(entry.pw_name, entry.pw_uid, entry.pw_gid, is_other=True)
