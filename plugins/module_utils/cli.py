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

from . import ahead, fast
from .archive import Absent, get
from .errors import PitrError

TYPE_CHECKING = False  # typing's own would cost more than most of what this imports
if TYPE_CHECKING:
    from typing import Any

ABSENT = 79
FAILED = 1
USAGE = (
    "usage: pitr-wal push CLUSTER PATH"
    " | pitr-wal get [--system-identifier=N] [--identity=PATH] [--lease=L] [--lenient] CLUSTER NAME TARGET"
    " | pitr-wal receive CLUSTER"
    " | pitr-wal serve --read|--write CLUSTER [REPOSITORY]"
)

LAUNCHER = """\
#!/bin/sh
# pitr-wal: {version}
# PostgreSQL reads exit 1 from restore_command as "end of archive", and hides an archive_command that ends above 125.
# So only a proven absence leaves here as 1 for get (79 inside), and every failure of push stays within 1 to 125.
# serve speaks over its standard input; receive runs for as long as the host does, and a signal has to reach it.
start() {{
exec {python} -I -S {library}/__main__.py {folder} "$@"
}}
case "$1" in
  serve) start "$@" ;;
  receive) start "$@" < /dev/null ;;
esac
# The traps are for what ends this shell on the way: when there is no free process, dash ends with 2.
case "$1" in get) trap 'exit 200' 0 ;; *) trap 'exit 125' 0 ;; esac
(start "$@") < /dev/null
status=$?
trap - 0
case "$1:$status" in
  *:0) exit 0 ;;
  get:{absent}) exit 1 ;;
  get:*) if [ "$status" -gt 125 ]; then exit "$status"; fi; exit 200 ;;
  *) if [ "$status" -gt 125 ]; then exit 125; fi; exit "$status" ;;
esac
"""


def configuration(folder: str, cluster: str) -> dict[str, Any]:
    """Read ``<folder>/<cluster>.json``: repository, compression, how to reach and read it. Raises PitrError."""
    return configured(folder, cluster)[0]


def configured(folder: str, cluster: str) -> tuple[dict[str, Any], bytes]:
    """The settings, and the bytes that they were read from. Raises PitrError."""
    path = fast.settings_path(folder, cluster)
    try:
        raw = fast.read(path)
    except OSError as error:
        raise PitrError(f"The settings {path} cannot be read: {error}.") from None
    return parsed(path, raw), raw


def parsed(path: str, raw: bytes) -> dict[str, Any]:
    """The settings in these bytes of the file ``path``. Raises PitrError when they are not usable."""
    try:
        value = json.loads(raw)
    except ValueError as error:
        raise PitrError(f"The settings {path} cannot be read: {error}.") from None
    if not isinstance(value, dict) or not value.get("repository"):
        raise PitrError(f"{path} names no repository.")
    return value


def writer_access(settings: dict[str, Any]) -> dict[str, str]:
    """How push reaches the repository."""
    return {**settings, "ssh_identity": settings.get("ssh_writer_identity", ""), "identity": ""}


def reader_access(settings: dict[str, Any], identity: str) -> dict[str, str]:
    """How get reaches and reads it; ``identity`` is that of the call, before that of the settings."""
    access = {**settings, "ssh_identity": settings.get("ssh_reader_identity", "")}
    access["identity"] = identity or settings.get("identity", "")
    return access


def recovers_to_target() -> bool:
    """Whether the server that calls, in its data directory, is no standby: the end of the archive ends its recovery.

    Told by recovery.signal, and not by the absence of standby.signal: a standby that is being promoted has removed that
    when it asks for the last time, and would be down for good if it were not answered (StartupXLOG).
    """
    return os.path.lexists("recovery.signal")


def main(argv: list[str]) -> int:
    """Run one command; ``argv`` is the installation's folder and then what PostgreSQL passed. Returns the exit code."""
    verb = argv[1] if len(argv) > 1 else ""
    failed = FAILED
    try:
        folder, arguments = argv[0], argv[2:]
        if verb == "push" and len(arguments) == 2:
            settings, raw = configured(folder, arguments[0])
            ahead.push(ahead.Context(arguments[0], raw, settings, writer_access(settings)), arguments[1])
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
        options, rest = fast.arguments_of(argv)
        if verb == "get" and len(rest) == 3 and not options.keys() - fast.GET_OPTIONS:
            cluster, name, target = rest
            failed = ABSENT if "lenient" in options and not recovers_to_target() else FAILED
            settings, raw = configured(folder, cluster)
            access = reader_access(settings, options.get("identity", ""))
            identifier, lease = options.get("system-identifier"), options.get("lease")
            get(name, target, settings["repository"], cluster, identifier, access, lease)
            ahead.follow(folder, ahead.Context(cluster, raw, settings, access), options, name, target)
            return 0
        if verb == "serve" and len(arguments) in (2, 3) and arguments[0] in ("--read", "--write"):
            from .serve import serve

            repository = arguments[2] if arguments[2:] else configuration(folder, arguments[1])["repository"]
            return serve(arguments[0][2:], arguments[1], repository)
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
    return failed
