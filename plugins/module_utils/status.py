# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The command ``pitr-status``: looks, judges, shows. Also what the module status_info does."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Optional

from . import seen
from .errors import PitrError
from .judge import CODES, UNKNOWN, Finding, judge
from .look import look
from .postgres import Login
from .repository import check_cluster_name, write_atomic
from .statustext import Status, metrics, nagios, overall, table
from .watched import Facts, Limits

USAGE = "usage: pitr-status [CLUSTER …] [--json | --nagios | --textfile PATH]"
FOLDER = "monitoring"


@dataclass(frozen=True)
class Settings:
    """``<directory>/monitoring/<cluster>.json``: whom to ask, where the repository is, and own limits.

    The password is the one of the command ``pitr``, in ``maintenance/<cluster>.pgpass``.
    """

    repository: str
    login_host: str
    login_port: int = 5432
    login_user: str = "pitr_backup"
    state_directory: str = ""
    limits: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As stored."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Settings:
        """As read; what a later version has stored besides is left out. Raises TypeError when one is missing."""
        return cls(**{item.name: values[item.name] for item in fields(cls) if item.name in values})


def settings_path(directory: str, cluster: str, folder: str = FOLDER) -> str:
    """Path of the settings."""
    return os.path.join(directory, folder, f"{cluster}.json")


def configured(directory: str) -> list[str]:
    """Clusters that can be looked at from here: those of monitoring, and those that the command pitr knows."""
    found = set()
    for folder in (FOLDER, "maintenance"):
        try:
            names = os.listdir(os.path.join(directory, folder))
        except OSError:
            continue
        found |= {name[:-5] for name in names if name.endswith(".json") and not name.endswith(".state.json")}
    return sorted(found)


def stored_settings(directory: str, cluster: str) -> Optional[Settings]:
    """The settings of monitoring, None where it is not installed. Raises PitrError when they cannot be used."""
    return read_settings(directory, cluster) if os.path.exists(settings_path(directory, cluster)) else None


def read_settings(directory: str, cluster: str) -> Settings:
    """The settings of monitoring; without them those of the command pitr, with all limits at their defaults.

    Raises PitrError when there are none that can be used.
    """
    check_cluster_name(cluster)
    path = settings_path(directory, cluster)
    if not os.path.exists(path) and os.path.exists(settings_path(directory, cluster, "maintenance")):
        path = settings_path(directory, cluster, "maintenance")
    try:
        with open(path, encoding="utf-8") as stream:
            return Settings.from_dict(json.load(stream))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise PitrError(
            f"The settings {path} cannot be used: {error}. The role pgdrill.pitr.monitoring writes them."
        ) from None


def look_and_judge(
    directory: str, cluster: str, settings: Settings, login: Optional[Login] = None, keep: bool = True
) -> Status:
    """Look at one cluster and judge it; with ``keep`` what was seen is kept. Raises PitrError for wrong limits."""
    limits = Limits.from_options(settings.limits)
    if login is None:
        login = Login(host=settings.login_host, port=settings.login_port, user=settings.login_user)
    path = seen.path_of(settings.state_directory or os.path.join(directory, FOLDER), cluster)
    memory = seen.read(path)
    facts = look(settings.repository, cluster, login, memory, directory)
    problem = seen.write(path, memory) if keep else ""
    if problem:
        facts = dataclasses.replace(facts, notes=(*facts.notes, problem))
    return Status(facts, tuple(judge(facts, limits, directory)))


def _of(directory: str, cluster: str) -> Status:
    # Of several clusters each has a password of its own.
    os.environ["PGPASSFILE"] = os.path.join(directory, "maintenance", f"{cluster}.pgpass")
    try:
        return look_and_judge(directory, cluster, read_settings(directory, cluster))
    except PitrError as error:
        # The others are told all the same.
        wrong = Finding("settings", UNKNOWN, error.message, "ansible-playbook pgdrill.pitr.site")
        return Status(Facts(cluster=cluster, at=time.time()), (wrong,))


def _arguments(argv: Sequence[str]) -> Optional[tuple[list[str], str, str]]:
    """Clusters, form, and the textfile's path; None for wrong use."""
    clusters: list[str] = []
    form = path = ""
    left = list(argv)
    while left:
        word = left.pop(0)
        if word in ("--json", "--nagios", "--textfile") and not form:
            form = word[2:]
            if form == "textfile":
                if not left or left[0].startswith("-"):
                    return None
                path = os.path.abspath(left.pop(0))
        elif word.startswith("-"):
            return None
        else:
            clusters.append(word)
    return clusters, form, path


def main(directory: str, argv: Sequence[str]) -> int:
    """Run the command. Returns the exit code of a Nagios plugin: 0 OK, 1 WARNING, 2 CRITICAL, 3 UNKNOWN or wrong use.

    With ``--textfile`` it is 0 when that was written, whatever it says, since the verdict is in it.
    """
    asked = _arguments(argv)
    if asked is None:
        sys.stderr.write(USAGE + "\n")
        return CODES[UNKNOWN]
    clusters, form, path = asked
    try:
        clusters = clusters or configured(directory)
        if not clusters:
            raise PitrError(f"No cluster is configured in {directory}. The role pgdrill.pitr.monitoring does it.")
        statuses = [_of(directory, cluster) for cluster in clusters]
        if form == "textfile":
            # Readable for the exporter, which is another user, from the first moment on.
            os.umask(0o022)
            write_atomic(path, metrics(statuses).encode(), 0o644)
            return 0
    except (PitrError, OSError) as error:
        message = (
            error.message if isinstance(error, PitrError) else f"{error.filename or 'the system'}: {error.strerror}"
        )
        if form == "nagios":
            sys.stdout.write(f"PITR UNKNOWN - {' '.join(message.split())}\n".replace("|", "/"))
        else:
            sys.stderr.write(f"pitr-status: {message}\n")
        return CODES[UNKNOWN]
    if form == "json":
        document = {"level": overall(statuses), "clusters": [each.to_dict() for each in statuses]}
        sys.stdout.write(json.dumps(document, indent=2) + "\n")
    elif form == "nagios":
        sys.stdout.write(nagios(statuses) + "\n")
    else:
        sys.stdout.write("\n\n".join("\n".join(table(each)) for each in statuses) + "\n")
    return CODES[overall(statuses)]
