# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The command ``pitr-wal`` that PostgreSQL calls, and how it is installed.

It is this package as a plain directory, started by a few lines of shell. The shell stays in between because of one
number: an interpreter that cannot start, or a crash of Python, exits 1, and PostgreSQL reads 1 from
``restore_command`` as "end of archive". Only the code ABSENT, which nothing but :func:`main` produces, becomes 1.
"""

from __future__ import annotations

import json
import os
import sys

from .archive import Absent, get, push
from .errors import PitrError

ABSENT = 79
FAILED = 1
USAGE = (
    "usage: pitr-wal push CLUSTER PATH"
    " | pitr-wal get [--system-identifier=N] [--identity=PATH] [--lease=L] CLUSTER NAME TARGET"
    " | pitr-wal receive CLUSTER"
    " | pitr-wal serve --read|--write CLUSTER REPOSITORY"
)
GET_OPTIONS = ("--system-identifier=", "--identity=", "--lease=")

LAUNCHER = """\
#!/bin/sh
# pitr-wal: {version}
# PostgreSQL reads exit 1 from restore_command as "end of archive", and hides an archive_command that ends above 125.
# So only a proven absence leaves here as 1 for get (79 inside), and every failure of push stays within 1 to 125.
# serve speaks over its standard input; receive runs for as long as the host does, and a signal has to reach it.
case "$1" in
  serve) exec {python} -I -S {library} {folder} "$@" ;;
  receive) exec {python} -I -S {library} {folder} "$@" < /dev/null ;;
esac
{python} -I -S {library} {folder} "$@" < /dev/null
status=$?
case "$1:$status" in
  *:0) exit 0 ;;
  get:{absent}) exit 1 ;;
  get:*) if [ "$status" -gt 125 ]; then exit "$status"; fi; exit 200 ;;
  *) if [ "$status" -gt 125 ]; then exit 125; fi; exit "$status" ;;
esac
"""


def configuration(folder: str, cluster: str) -> dict[str, str]:
    """Read ``<folder>/<cluster>.json``: repository, compression, how to reach and read it. Raises PitrError."""
    path = os.path.join(folder, f"{cluster}.json")
    try:
        with open(path, encoding="utf-8") as stream:
            value = json.load(stream)
    except (OSError, ValueError) as error:
        raise PitrError(f"The settings {path} cannot be read: {error}.") from None
    if not isinstance(value, dict) or not value.get("repository"):
        raise PitrError(f"{path} names no repository.")
    return value


def main(argv: list[str]) -> int:
    """Run one command; ``argv`` is the installation's folder and then what PostgreSQL passed. Returns the exit code."""
    verb = argv[1] if len(argv) > 1 else ""
    try:
        folder, arguments = argv[0], argv[2:]
        if verb == "push" and len(arguments) == 2:
            settings = configuration(folder, arguments[0])
            access = {**settings, "ssh_identity": settings.get("ssh_writer_identity", ""), "identity": ""}
            push(arguments[1], settings["repository"], arguments[0], settings.get("compression", "auto"), access)
            return 0
        if verb == "hold":
            # archive_command of a restored cluster that nobody has accepted yet: its WAL waits in pg_wal.
            sys.stderr.write(
                "pitr-wal hold: this cluster was restored and is not accepted yet; its WAL is kept here.\n"
            )
            return FAILED
        if verb == "receive" and len(arguments) == 1:
            from . import receiver

            settings = configuration(folder, arguments[0])
            compression = settings.get("compression", "auto")
            return receiver.main(folder, arguments[0], settings["repository"], compression)
        options = {}
        while verb == "get" and arguments and arguments[0].startswith(GET_OPTIONS):
            name, _equals, value = arguments.pop(0).partition("=")
            options[name] = value
        if verb == "get" and len(arguments) == 3:
            settings = configuration(folder, arguments[0])
            access = {**settings, "ssh_identity": settings.get("ssh_reader_identity", "")}
            access["identity"] = options.get("--identity") or settings.get("identity", "")
            identifier, lease = options.get("--system-identifier"), options.get("--lease")
            get(arguments[1], arguments[2], settings["repository"], arguments[0], identifier, access, lease)
            return 0
        if verb == "serve" and len(arguments) == 3 and arguments[0] in ("--read", "--write"):
            from .serve import serve

            return serve(arguments[0][2:], arguments[1], arguments[2])
        sys.stderr.write(USAGE + "\n")
        return FAILED
    except Absent:
        # Not an error: PostgreSQL asks for files that do not exist yet, all the time.
        return ABSENT
    except PitrError as error:
        sys.stderr.write(f"pitr-wal {verb}: {error.message}\n")
    except OSError as error:
        sys.stderr.write(
            f"pitr-wal {verb}: {error.filename or ''}: {error.strerror}. Not done; nothing was replaced.\n"
        )
    return FAILED
