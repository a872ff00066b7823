# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Ordinary users stay out of a restored cluster until somebody has looked at it and accepted it.

The section "Recovering Using a Continuous Archive Backup" asks for that: its procedure modifies pg_hba.conf for the
time of the recovery. So does this: the cluster's own file gets another name beside it, and a short one of ours takes
its place. It is the file and not the setting ``hba_file`` that changes, because that setting is read at the server's
start only (PGC_POSTMASTER in guc_tables.c): without a restart nobody could be let in again, and ``include`` and ``@``
of the cluster's own rules are relative to where their file lies (tokenize_auth_file of hba.c).

Our file says in its first line what the other's name is. Nothing else has to be remembered.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
from collections.abc import Sequence

from .errors import PitrError
from .repository import write_atomic
from .tree import fsync_directory

INSTEAD = (
    "Without keep_out (restore_keep_out: false) they are let in at once; keep them out by other means until you have"
    " looked, by closing the port, for example."
)
_KEPT = "# pitr-kept: "
_SUFFIX = ".pitr-kept"
_TOKEN = re.compile(r'"[^"]*"|[^\s,"#]+')
_TYPES = ("local", "host", "hostssl", "hostnossl", "hostgssenc", "hostnogssenc")


def kept_file(hba_file: str) -> str:
    """Where the cluster's own file is while ``hba_file`` is ours; empty when it is the cluster's own."""
    real = os.path.realpath(hba_file)
    with contextlib.suppress(FileNotFoundError), open(real, encoding="utf-8", errors="surrogateescape") as stream:
        first = stream.readline().rstrip("\n")
        if first.startswith(_KEPT):
            return os.path.join(os.path.dirname(real), first[len(_KEPT) :])
    return ""


def problem(hba_file: str, places: Sequence[str]) -> str:
    """Why this file cannot be exchanged, or the empty text. ``places``: where this cluster's own files lie.

    One that lies elsewhere may be the file of a server that is running.
    """
    real = os.path.realpath(hba_file)
    if not any(f"{real}/".startswith(f"{os.path.realpath(place)}/") for place in places):
        return f"hba_file is {hba_file}, which is neither in the data directory nor in the configuration's"
    if not os.path.isfile(real):
        return f"{hba_file} does not exist"
    # Who does not own a file may give it another name only when he may read and write it (fs.protected_hardlinks).
    if os.stat(real).st_uid != os.geteuid() and not os.access(real, os.R_OK | os.W_OK):
        return f"{hba_file} belongs to another user"
    if not os.access(os.path.dirname(real), os.W_OK):
        return f"{os.path.dirname(real)} cannot be written by this user"
    return ""


def rules(own: str, user: str, more: Sequence[str] = ()) -> str:
    """The lines of pg_hba.conf that let in ``user`` over the unix socket, and whoever ``more`` says; nobody else.

    ``own`` is the text of the cluster's own file: the superuser proves who he is as he does there. The operating
    system's user, who owns the server, may be itself. Raises PitrError when a line of ``more`` is none.
    """
    for line in more:
        if (line.split(None, 1) or [""])[0] not in _TYPES or "\n" in line:
            raise PitrError(
                f"'{line}' is not a line of pg_hba.conf. Write it like: host app auditor 192.0.2.7/32 scram-sha-256"
            )
    lines = [f"local all {_quoted(user)} {socket_method(own, user)}"]
    owner = pwd.getpwuid(os.geteuid()).pw_name
    if owner != user:
        lines.append(f"local all {_quoted(owner)} peer")
    lines += [*more, "local all all reject", "host all all all reject"]
    return "\n".join(lines) + "\n"


def _quoted(name: str) -> str:
    """A role's name that is nothing but a name: in quotes a keyword or a ``+`` has no meaning."""
    if '"' in name or "\n" in name:
        raise PitrError(f"The role {name!r} cannot be named in pg_hba.conf.")
    return f'"{name}"'


def socket_method(own: str, user: str) -> str:
    """Method and options of the first rule by which ``user`` comes in over the socket; ``peer`` when none is plain."""
    for line in own.replace("\\\n", " ").split("\n"):
        match = re.match(r'\s*local\s+((?:"[^"]*"|[^\s"#])+)\s+((?:"[^"]*"|[^\s"#])+)\s+(\S[^#]*)', line)
        if match is None:
            continue
        databases, users = (_TOKEN.findall(match.group(number)) for number in (1, 2))
        wanted = {user, f'"{user}"', "all"}
        if ("all" in databases or "postgres" in databases) and wanted & set(users):
            method = match.group(3).strip()
            return "peer" if method.split()[0] == "reject" else method
    return "peer"


def shut(hba_file: str, user: str, more: Sequence[str] = ()) -> None:
    """Put our file in place of the cluster's own, which is kept beside it. Repeating is harmless."""
    real = os.path.realpath(hba_file)
    kept = kept_file(real)
    if not kept:
        kept = real + _SUFFIX
        while os.path.lexists(kept):
            # Somebody's, or left by a kill between the two steps; either way nothing is overwritten.
            kept += "x"
    with open(kept if os.path.exists(kept) else real, encoding="utf-8", errors="surrogateescape") as stream:
        own = stream.read()
    text = f"{_KEPT}{os.path.basename(kept)}\n"
    text += (
        "# Written by pgdrill.pitr for the time of a recovery: ordinary users stay out. Accepting the cluster (module\n"
    )
    text += "# pgdrill.pitr.recovery) puts the file of the first line back, and so does an undone restore.\n"
    text += rules(own, user, more)
    if not os.path.exists(kept):
        os.link(real, kept)
    write_atomic(real, text.encode("utf-8", "surrogateescape"), os.stat(kept).st_mode & 0o777)


def let_in(hba_file: str) -> bool:
    """Give the cluster's own file its name back. Returns whether it had lost it. The caller reloads the server.

    A file that somebody has put there meanwhile is not ours, and stays.
    """
    real = os.path.realpath(hba_file)
    kept = kept_file(real)
    if not kept:
        return False
    if not os.path.exists(kept):
        raise PitrError(
            f"{real} keeps ordinary users out, and {kept}, the cluster's own, is gone. Write a new pg_hba.conf there."
        )
    os.rename(kept, real)
    fsync_directory(os.path.dirname(real))
    return True
