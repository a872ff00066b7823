# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Installing the commands ``pitr`` and ``pitr-status`` beside ``pitr-wal`` and from the same source."""

from __future__ import annotations

import ast
import json
import os
import shlex

from . import maintenance, seen
from .errors import PitrError
from .install import PACKAGE, VERSION, interpreter, source, write_files
from .maintenance_settings import Settings, passfile_path, settings_path
from .repository import check_cluster_name
from .status import FOLDER
from .status import Settings as StatusSettings
from .status import settings_path as status_settings_path
from .watched import Limits

COMMAND = "pitr"
STATUS_COMMAND = "pitr-status"
# Imported, so that Ansible sends it and all that it needs.
_ENTRY = maintenance.__name__.rpartition(".")[2]
# Not -S: psycopg2 lies where the distribution has put it. Not the user's own directories either.
_LAUNCHER = """\
#!/bin/sh
# pitr: {version}
exec {python} -I {library}/pitr.py {folder} {verb}"$@"
"""
_MAIN = f"""\
import sys

sys.path.insert(0, __file__.rpartition("/")[0])

from {PACKAGE}.{_ENTRY} import main

sys.exit(main(sys.argv[1:]))
"""


def needed(entry: str = _ENTRY) -> list[str]:
    """Names of all siblings that ``entry`` needs, itself included, by their import statements wherever they stand."""
    found: set[str] = set()
    left = {entry}
    while left:
        name = left.pop()
        found.add(name)
        for node in ast.walk(ast.parse(source(name))):
            if isinstance(node, ast.ImportFrom) and node.level:
                names = [node.module.partition(".")[0]] if node.module else [alias.name for alias in node.names]
                left |= set(names) - found
    return sorted(found)


def content(
    directory: str, cluster: str, settings: Settings | StatusSettings, password: str, python: str
) -> dict[str, tuple[bytes, int]]:
    """All files of an installation with their modes, by path. Raises PitrError.

    Both commands are installed whatever the settings are for, of backups or of monitoring, and share the password.
    """
    check_cluster_name(cluster)
    if "\n" in password:
        raise PitrError("The password has a line break, which a password file cannot hold. Nothing was changed.")
    library = os.path.join(directory, "lib")
    files = {os.path.join(library, PACKAGE, f"{name}.py"): (source(name), 0o644) for name in needed()}
    files[os.path.join(library, PACKAGE, "__init__.py")] = (b"", 0o644)
    files[os.path.join(library, "pitr.py")] = (_MAIN.encode(), 0o644)
    escaped = password.replace("\\", "\\\\").replace(":", "\\:")
    files[passfile_path(directory, cluster)] = (f"*:*:*:*:{escaped}\n".encode() if password else b"", 0o600)
    text = json.dumps(settings.to_dict(), indent=2, sort_keys=True) + "\n"
    if isinstance(settings, StatusSettings):
        Limits.from_options(settings.limits)
        files[status_settings_path(directory, cluster)] = (text.encode(), 0o600)
    else:
        files[settings_path(directory, cluster)] = (text.encode(), 0o600)
    for command, verb in ((COMMAND, ""), (STATUS_COMMAND, "status ")):
        launcher = _LAUNCHER.format(
            version=VERSION,
            python=shlex.quote(python),
            library=shlex.quote(library),
            folder=shlex.quote(directory),
            verb=verb,
        )
        files[os.path.join(directory, command)] = (launcher.encode(), 0o755)
    return files


def remove_monitoring(directory: str, cluster: str, check: bool = False) -> list[str]:
    """Forget what monitoring was told, and the password where nobody else uses it. Returns the paths of what goes."""
    check_cluster_name(cluster)
    unwanted = [status_settings_path(directory, cluster), seen.path_of(os.path.join(directory, FOLDER), cluster)]
    if not os.path.exists(settings_path(directory, cluster)):
        unwanted.append(passfile_path(directory, cluster))
    found = [path for path in unwanted if os.path.exists(path)]
    if not check:
        for path in found:
            os.unlink(path)
    return found


def install(
    directory: str,
    cluster: str,
    settings: Settings | StatusSettings,
    password: str,
    python: str = "",
    check: bool = False,
) -> list[str]:
    """Bring an installation up to date. Returns the paths that were, or with ``check`` would be, written."""
    return write_files(content(directory, cluster, settings, password, python or interpreter()), check)
