# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Files on disk against a backup's manifest, several processes at a time.

pg_verifybackup does the reading: it knows every algorithm of every version, and its CRC32C (the default of
pg_basebackup) runs in the processor, while Python has none. A gigabyte takes it 0.35 s of a processor; SHA-256 as the
manifest's algorithm would take three times that here, and as much again in every backup.

CRC32C is blind for one kind of file. What ends with the CRC32C of its own content, and zeros, has the same CRC32C
whatever that content is: pg_control, the relation maps, and two more. Two relation maps that differ would corrupt a
cluster, so these are told apart by nothing but a SHA-256 that a restore has noted down, or an algorithm of that family
in the manifest.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .errors import PitrError
from .postgres import binary, binary_version
from .stored import MANIFEST, sha256

_COMPLAINT = re.compile(r'error: .*"(?:[^"]*/)?f(\d+)"')
# ControlFileData, RelMapFile, the state of a prepared transaction (EndPrepare), and CheckPointReplicationOrigin.
_OWN_CRC = re.compile(
    r"global/pg_control|(.*/)?pg_filenode\.map|pg_twophase/[0-9A-Fa-f]+|pg_logical/replorigin_checkpoint"
)
# Seconds between two calls of ``tick``.
_TICK = 5.0
# Files whose links and manifests take some 30 MB of memory.
_FEW = 100_000


def tells_apart(name: str, facts: Mapping[str, Any]) -> bool:
    """Whether the checksum in an entry of the manifest tells this file from one with other content."""
    algorithm = facts.get("Checksum-Algorithm", "NONE") if facts.get("Checksum") else "NONE"
    return str(algorithm).startswith("SHA") or (algorithm == "CRC32C" and not _OWN_CRC.fullmatch(name))


def noted(paths: Mapping[str, str]) -> dict[str, str]:
    """SHA-256 of the files (all of them small) whose CRC32C tells nothing. ``paths``: name to file."""
    found = {}
    for name, path in paths.items():
        if _OWN_CRC.fullmatch(name):
            with contextlib.suppress(FileNotFoundError):
                found[name] = sha256(path)
    return found


def differing(
    bin_dir: str,
    paths: Mapping[str, str],
    entries: Mapping[str, Mapping[str, Any]],
    tick: Callable[[], None] = lambda: None,
) -> set[str]:
    """Names whose file does not have the content that the manifest tells.

    ``paths``: name in the manifest to the file that shall have its content; ``entries``: name to its entry there.
    ``tick`` is called every few seconds. A file that cannot be read raises PitrError.
    """
    if not paths:
        return set()
    parts = _split(entries, paths, min(4, os.cpu_count() or 1))
    argv = [binary(bin_dir, "pg_verifybackup"), "--no-parse-wal", "--quiet"]
    if binary_version(bin_dir) >= 18:
        # It would look for PG_VERSION or base.tar to tell the format.
        argv.append("--format=plain")
    # A link costs a filesystem that is busy milliseconds.
    memory = "/dev/shm" if len(paths) < _FEW and os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="pitr-compare-", dir=memory) as place, contextlib.ExitStack() as stack:
        running = []
        for number, names in enumerate(parts):
            directory = os.path.join(place, str(number))
            _lay_out(directory, names, paths, entries)
            said = stack.enter_context(tempfile.TemporaryFile())
            process = subprocess.Popen(
                [*argv, directory],
                env={**os.environ, "LC_ALL": "C"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=said,
            )
            stack.callback(_end, process)
            running.append((process, names, said))
        found: set[str] = set()
        for process, names, said in running:
            # Popen.wait with a timeout looks every 50 ms; a thread is told at once.
            waiter = threading.Thread(target=process.wait, daemon=True)
            waiter.start()
            waiter.join(_TICK)
            while waiter.is_alive():
                tick()
                waiter.join(_TICK)
            said.seek(0)
            found |= _complaints(process.returncode, names, said.read().decode(errors="replace"), paths)
        return found


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.kill()
    process.wait()


def _split(entries: Mapping[str, Mapping[str, Any]], paths: Mapping[str, str], count: int) -> list[list[str]]:
    """The names in so many parts of about the same number of bytes."""
    sizes = sorted(((int(entries[name]["Size"]), name) for name in paths), reverse=True)
    parts: list[list[str]] = [[] for _number in range(min(count, len(sizes)))]
    total = [0] * len(parts)
    for size, name in sizes:
        smallest = total.index(min(total))
        parts[smallest].append(name)
        # What it costs to open one more.
        total[smallest] += size + 65536
    return parts


def _lay_out(
    directory: str, names: Sequence[str], paths: Mapping[str, str], entries: Mapping[str, Mapping[str, Any]]
) -> None:
    """A directory of links with a manifest of its own: numbers instead of names, which may hold anything."""
    os.mkdir(directory, mode=0o700)
    lines = []
    for number, name in enumerate(names):
        os.symlink(paths[name], os.path.join(directory, f"f{number}"))
        entry = {**entries[name], "Path": f"f{number}"}
        entry.pop("Encoded-Path", None)
        lines.append(json.dumps(entry))
    # Version 1 has no system identifier, which would have to be that of a pg_control; every version reads it.
    text = '{ "PostgreSQL-Backup-Manifest-Version": 1,\n"Files": [\n' + ",\n".join(lines) + '\n],\n"WAL-Ranges": [],\n'
    digest = hashlib.sha256(text.encode()).hexdigest()
    with open(os.path.join(directory, MANIFEST), "w", encoding="utf-8") as stream:
        stream.write(f'{text}"Manifest-Checksum": "{digest}"}}\n')


def _complaints(code: int, names: Sequence[str], said: str, paths: Mapping[str, str]) -> set[str]:
    if code == 0:
        return set()
    found = set()
    for line in said.splitlines():
        match = _COMPLAINT.search(line)
        name = names[int(match.group(1))] if match and int(match.group(1)) < len(names) else None
        if name is None or "could not" in line:
            where = f"{paths[name]}: " if name is not None else ""
            raise PitrError(f"Files cannot be compared with the backup's manifest: {where}{line.strip()}")
        found.add(name)
    if not found:
        raise PitrError(f"pg_verifybackup failed with exit code {code}: {said[-2000:]}")
    return found
