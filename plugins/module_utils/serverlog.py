# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The server's own log, wherever it is: what was given, or where the logging collector writes.

Only the log tells a recovery that has paused or shut down at its target from one that somebody has paused or stopped
before it. With ``logging_collector`` the file that the server was started with ends after a few lines; where it goes on
is told by ``current_logfiles`` in the data directory (section "Where to Log"), in up to three formats.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import mmap
import os

TAIL_BYTES = 64 * 1024
TAIL_LINES = 15
# So many rotated files are looked into, from the newest on.
MOST_FILES = 1000
# A run of the server begins with the first, or takes its log elsewhere with one of the others (PostmasterMain).
STARTED = ("starting PostgreSQL ", "ending log output to stderr", "redirecting log output to logging collector")
STOPPING = "recovery stopping "
# Of a line in the format csvlog (section "Using CSV-Format Log Output"), counted from 0.
_CSV_MESSAGE = 13


def current_files(pgdata: str) -> dict[str, str]:
    """Format (stderr, csvlog, jsonlog) and path of each file that the logging collector writes; empty without one.

    The server removes the list when it starts without the collector, and leaves it when it shuts down.
    """
    found = {}
    with contextlib.suppress(OSError), open(os.path.join(pgdata, "current_logfiles"), encoding="utf-8") as stream:
        for line in stream:
            kind, _space, path = line.rstrip("\n").partition(" ")
            found[kind] = os.path.join(pgdata, path)
    return found


def sources(pgdata: str, log_file: str) -> list[tuple[str, list[str]]]:
    """For each format the files to look into, newest first: those of the collector, or else ``log_file``."""
    found = []
    for kind, path in current_files(pgdata).items():
        others = []
        with contextlib.suppress(OSError), os.scandir(os.path.dirname(path)) as entries:
            suffix = os.path.splitext(path)[1]
            others = [(e.stat().st_mtime, e.path) for e in entries if e.name.endswith(suffix) and e.is_file()]
        older = [other for _when, other in sorted(others, reverse=True) if other != path]
        found.append((kind, [path, *older][:MOST_FILES]))
    # Where there is a collector, the other file ends with an earlier run.
    return found or ([("stderr", [log_file])] if log_file else [])


def readable(pgdata: str, log_file: str) -> list[str]:
    """The newest file of every source that can be read."""
    return [paths[0] for _kind, paths in sources(pgdata, log_file) if os.access(paths[0], os.R_OK)]


def last_stop(pgdata: str, log_file: str) -> str:
    """What the server's last run says of where its recovery stopped (``recovery stopping …``), or the empty text."""
    for kind, paths in sources(pgdata, log_file):
        for path in paths:
            message, started = _look(path, kind)
            if message:
                return message
            if started:
                break
    return ""


def _look(path: str, kind: str) -> tuple[str, bool]:
    """The last stop behind the last start of the server in this file, and whether it holds a start."""
    try:
        with open(path, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            started = max(_last(data, text, kind, 0, len(data)) for text in STARTED)
            stopped = _last(data, STOPPING, kind, max(started, 0), len(data))
            if stopped < 0:
                return "", started >= 0
            return _message(data, stopped, kind), True
    except (OSError, ValueError):
        # It cannot be read, or is empty, which cannot be mapped.
        return "", False


def _last(data: mmap.mmap, beginning: str, kind: str, begin: int, end: int) -> int:
    """Where the last message that begins so stands, from its end backwards; -1 when there is none."""
    found = data.rfind(beginning.encode(), begin, end)
    while found >= 0:
        # The same words inside of a statement that was logged are no message.
        if _message(data, found, kind).startswith(beginning):
            return found
        found = data.rfind(beginning.encode(), begin, found)
    return -1


def _message(data: mmap.mmap, position: int, kind: str) -> str:
    """The message of the line at this position. A message of more lines than one is not looked for."""
    begin = data.rfind(b"\n", 0, position) + 1
    end = data.find(b"\n", position)
    line = bytes(data[begin : end if end >= 0 else len(data)]).decode(errors="replace")
    if kind == "jsonlog":
        with contextlib.suppress(ValueError):
            value = json.loads(line)
            return str(value.get("message", "")) if isinstance(value, dict) else ""
        return ""
    if kind == "csvlog":
        with contextlib.suppress(csv.Error):
            row = next(csv.reader(io.StringIO(line)), [])
            return row[_CSV_MESSAGE] if len(row) > _CSV_MESSAGE else ""
        return ""
    # Whatever log_line_prefix puts before it. Further lines of a message begin with a tab (send_message_to_server_log).
    return "" if line.startswith("\t") else line.partition("LOG:  ")[2].rstrip()


def tail(path: str) -> str:
    """The last lines of a log that are worth showing, or the empty text when it cannot be read."""
    try:
        with open(path, "rb") as stream:
            stream.seek(0, os.SEEK_END)
            stream.seek(max(0, stream.tell() - TAIL_BYTES))
            lines = stream.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return "\n".join(lines[-TAIL_LINES:])
