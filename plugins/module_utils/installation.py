# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Where a distribution's packages put PostgreSQL: programs, data, configuration, log, service.

Two layouts: that of Debian and Ubuntu, the same for PGDG's packages there (pg_createcluster(1), postgresql-common), and
that of PGDG's packages on EL. Which one a host has is told by its programs, not by its name.
"""

from __future__ import annotations

import os
import pwd
import re
from dataclasses import asdict, dataclass
from typing import Any

from .errors import PitrError
from .postgres import SUPPORTED, parse_settings

DEBIAN, PGDG_EL = "debian", "pgdg-el"


@dataclass(frozen=True)
class Installation:
    """One major version's programs on a host, and the one cluster that is meant. ``name`` is what the packages call the
    cluster (empty on EL, which has one a version); ``exists`` whether it is there."""

    layout: str
    postgresql_version: int
    name: str
    bin_dir: str
    pgdata: str
    config_dir: str
    service: str
    log_file: str
    exists: bool

    def to_dict(self) -> dict[str, Any]:
        """For a fact."""
        return asdict(self)


def bin_dir(layout: str, version: int) -> str:
    """Directory of PostgreSQL's programs."""
    return f"/usr/lib/postgresql/{version}/bin" if layout == DEBIAN else f"/usr/pgsql-{version}/bin"


def debian(version: int, name: str, root: str = "/") -> Installation:
    """A cluster as pg_createcluster lays it out; one that is there may say otherwise where its data lies."""
    config_dir = f"/etc/postgresql/{version}/{name}"
    conf = _read(_in(root, f"{config_dir}/postgresql.conf"))
    settings = dict(parse_settings(conf or ""))
    log_link = _in(root, f"{config_dir}/log")
    log_file = f"/var/log/postgresql/postgresql-{version}-{name}.log"
    return Installation(
        layout=DEBIAN,
        postgresql_version=version,
        name=name,
        bin_dir=bin_dir(DEBIAN, version),
        pgdata=settings.get("data_directory") or f"/var/lib/postgresql/{version}/{name}",
        config_dir=config_dir,
        service=f"postgresql@{version}-{name}",
        # pg_ctlcluster(1): the link `log`, where there is one, names the file.
        log_file=os.readlink(log_link) if os.path.islink(log_link) else log_file,
        exists=conf is not None,
    )


def pgdg_el(version: int, root: str = "/") -> Installation:
    """The cluster of PGDG's packages on EL; its configuration lies in the data directory."""
    pgdata = f"/var/lib/pgsql/{version}/data"
    log_file = f"/var/lib/pgsql/{version}/pgstartup.log"
    # The collector tells where it writes to; another day's file may follow.
    for line in (_read(_in(root, f"{pgdata}/current_logfiles")) or "").splitlines():
        kind, _space, path = line.partition(" ")
        if kind == "stderr" and path:
            log_file = path if path.startswith("/") else f"{pgdata}/{path}"
    return Installation(
        layout=PGDG_EL,
        postgresql_version=version,
        name="",
        bin_dir=bin_dir(PGDG_EL, version),
        pgdata=pgdata,
        config_dir=pgdata,
        service=f"postgresql-{version}",
        log_file=log_file,
        exists=os.path.exists(_in(root, f"{pgdata}/PG_VERSION")),
    )


def detect(
    version: int | None = None, name: str = "", preferred_name: str = "", root: str = "/"
) -> Installation | None:
    """What this host has. None when it has no supported PostgreSQL in either layout.

    ``version`` and ``name`` are taken when given, whether they are there or not. Else the cluster ``preferred_name`` of
    the newest version that has it, else the only cluster there is, else (a host without a cluster, such as a repository
    host) the newest version of the programs. Raises PitrError when several clusters remain.
    """
    found = [
        (layout, major)
        for layout in (DEBIAN, PGDG_EL)
        for major in sorted(SUPPORTED, reverse=True)
        if os.path.exists(_in(root, f"{bin_dir(layout, major)}/postgres"))
    ]
    if version is not None:
        found = [item for item in found if item[1] == version] or found[:1]
        found = [(found[0][0], version)] if found else []
    if not found:
        return None
    candidates = [
        installation
        for layout, major in found
        for installation in _clusters(layout, major, root)
        if installation.exists
    ]
    layout, major = found[0]
    if name:
        candidates = [item for item in candidates if item.name in (name, "")]
    else:
        candidates = [item for item in candidates if item.name == preferred_name] or candidates
        if candidates and candidates[0].name == preferred_name:
            candidates = candidates[:1]
    if len(candidates) > 1:
        there = ", ".join(f"{item.postgresql_version}/{item.name or 'data'}" for item in candidates)
        raise PitrError(
            f"This host has several clusters ({there}), and it is not told which one is meant. Set"
            " pitr_postgresql_version, or pitr_packaged_cluster to the part behind the slash. Nothing was changed."
        )
    if candidates:
        return candidates[0]
    return debian(major, name or "main", root) if layout == DEBIAN else pgdg_el(major, root)


def missing(user: str, bin_dir: str) -> list[str]:
    """What a host has not got yet, in words: this user (when one is named), PostgreSQL's programs in ``bin_dir``."""
    found = []
    try:
        if user:
            pwd.getpwnam(user)
    except KeyError:
        found.append(f"the user {user}")
    if not (bin_dir and os.path.exists(os.path.join(bin_dir, "postgres"))):
        found.append("the programs of PostgreSQL")
    return found


def _clusters(layout: str, version: int, root: str) -> list[Installation]:
    if layout == PGDG_EL:
        return [pgdg_el(version, root)]
    try:
        names = sorted(os.listdir(_in(root, f"/etc/postgresql/{version}")))
    except OSError:
        return []
    return [debian(version, name, root) for name in names if re.fullmatch(r"[\w.-]+", name)]


def _in(root: str, path: str) -> str:
    return os.path.join(root, path.lstrip("/"))


def _read(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8", errors="replace") as stream:
            return stream.read()
    except OSError:
        return None
