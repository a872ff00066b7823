# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Installing ``pitr-wal`` on a database host: this package as a plain directory, a launcher, and its settings."""

from __future__ import annotations

import compileall
import importlib
import json
import os
import shlex
import subprocess
import sys
from typing import Any

from .ahead import check_numbers
from .cli import ABSENT, LAUNCHER
from .codec import parse
from .errors import PitrError
from .repository import check_cluster_name, write_atomic
from .tree import tree_for

PACKAGE = "pgdrill_pitr"
# Everything cli.py imports; the test of the installed command fails when one is missing here.
FILES = (
    "ahead",
    "archive",
    "cli",
    "codec",
    "encryption",
    "errors",
    "fast",
    "locks",
    "receiver",
    "remote",
    "repository",
    "serve",
    "spool",
    "timeline",
    "tree",
    "upstream",
    "wal",
    "wire",
)
VERSION = "0.1.0"
COMMAND = "pitr-wal"
# Run as a file, not as a directory: that saves Python the search for what to run, a third of its start. A quick answer
# leaves nothing to tidy up.
_MAIN = f"""\
import posix
import sys

sys.path.insert(0, __file__.rpartition("/")[0])

from {PACKAGE}.fast import answer

if answer(sys.argv[1:]):
    posix._exit(0)

from {PACKAGE}.cli import main

sys.exit(main(sys.argv[1:]))
"""


def interpreter() -> str:
    """The interpreter that runs this, without a virtual environment or a version manager's shim around it."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


def source(name: str) -> bytes:
    """Source text of a sibling, wherever it was imported from: a directory, or the archive that Ansible sends."""
    module = importlib.import_module(f"{__package__}.{name}")
    loader: Any = module.__loader__
    # Python's own loaders give text, that of Ansible's collections gives bytes.
    text: str | bytes = loader.get_source(module.__name__)
    return text if isinstance(text, bytes) else text.encode()


def content(directory: str, cluster: str, settings: dict[str, Any], python: str) -> dict[str, tuple[bytes, int]]:
    """All files of an installation with their modes, by path. Raises PitrError when a setting cannot be."""
    check_cluster_name(cluster)
    parse(settings.get("compression") or "auto")
    for name in ("ssh_writer_identity", "ssh_reader_identity"):
        # What ssh could not use is refused now, and not by the first segment.
        tree_for(settings["repository"], {**settings, "ssh_identity": settings.get(name, "")})
    check_numbers(settings)
    library = os.path.join(directory, "lib")
    launcher = LAUNCHER.format(
        version=VERSION,
        python=shlex.quote(python),
        library=shlex.quote(library),
        folder=shlex.quote(directory),
        absent=ABSENT,
    )
    # The shell script passes its own folder first, so that the command finds its settings from anywhere.
    files = {os.path.join(library, PACKAGE, f"{name}.py"): (source(name), 0o644) for name in FILES}
    files[os.path.join(library, PACKAGE, "__init__.py")] = (b"", 0o644)
    files[os.path.join(library, "__main__.py")] = (_MAIN.encode(), 0o644)
    files[os.path.join(directory, f"{cluster}.json")] = (
        (json.dumps(settings, indent=2, sort_keys=True) + "\n").encode(),
        0o644,
    )
    files[os.path.join(directory, COMMAND)] = (launcher.encode(), 0o755)
    return files


def install(directory: str, cluster: str, settings: dict[str, Any], python: str = "", check: bool = False) -> list[str]:
    """Bring an installation up to date. Returns the paths that were (or with ``check`` would be) written.

    Each file is replaced as a whole, so a server that is archiving meanwhile sees the old or the new one.
    """
    python = python or interpreter()
    if not os.access(python, os.X_OK):
        raise PitrError(f"{python} cannot be executed by this user, so PostgreSQL could not run {COMMAND} with it.")
    changed = write_files(content(directory, cluster, settings, python), check)
    if changed and not check:
        for path in (os.path.join(directory, "lib"), os.path.join(directory, "lib", PACKAGE)):
            _make_directory(os.path.join(path, "__pycache__"))
        # Compiled once here; the server's user may not be allowed to write the cache, and each start would pay for it.
        # By the interpreter that will run it, which may be another version than the one that runs this.
        argv = [python, "-I", "-S", "-m", "compileall", "-q", os.path.join(directory, "lib")]
        if subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, check=False).returncode != 0:
            compileall.compile_dir(os.path.join(directory, "lib"), quiet=1)
    return changed


def write_files(files: dict[str, tuple[bytes, int]], check: bool = False) -> list[str]:
    """Write files with their modes, by path, each as a whole. Returns those that were, or with ``check`` would be."""
    changed = []
    for path, (data, mode) in files.items():
        if _current(path) == (data, mode):
            continue
        changed.append(path)
        if not check:
            _make_directory(os.path.dirname(path), 0o755 if mode & 0o077 else 0o700)
            write_atomic(path, data, mode)
            os.chmod(path, mode)
    return changed


def _make_directory(path: str, mode: int = 0o755) -> None:
    """Whatever umask this user has: code that a server runs must not be another user's to change."""
    if not os.path.isdir(path):
        _make_directory(os.path.dirname(path))
        os.mkdir(path, mode)
        os.chmod(path, mode)


def _current(path: str) -> tuple[bytes, int] | None:
    try:
        with open(path, "rb") as stream:
            return stream.read(), os.fstat(stream.fileno()).st_mode & 0o777
    except OSError:
        return None
