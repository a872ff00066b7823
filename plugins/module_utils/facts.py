# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a server says of itself when a backup is taken, and a plan wants to know years later on another host.

All of it is told, none of it decides: a backup without these facts (of an older version, or of a server that does not
tell them) is restored like any other.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .errors import PitrError
from .postgres import FLOORS, query

# How pg_database and pg_collation abbreviate them (catalog/pg_collation.h).
PROVIDERS = {"c": "libc", "i": "icu", "b": "builtin"}


@dataclass(frozen=True)
class Facts:
    """``None``, empty text or an empty mapping: not known.

    ``floors``: what a recovery's settings must be at least. ``tablespace_bytes``: bytes of the files of each tablespace
    by its oid. ``providers``: the collation providers (libc, icu, builtin) that databases use by default, or that
    collations of the user's make use of. ``glibc``, ``icu``: versions of these libraries as collations see them.
    """

    server_version: str = ""
    data_checksums: bool | None = None
    floors: Mapping[str, int] = field(default_factory=dict)
    max_wal_size: int | None = None
    providers: tuple[str, ...] = ()
    glibc: str = ""
    icu: str = ""
    tablespace_bytes: Mapping[int, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As stored in backup.json; the keys of JSON are texts."""
        result = asdict(self)
        result["providers"] = list(self.providers)
        result["tablespace_bytes"] = {str(oid): size for oid, size in self.tablespace_bytes.items()}
        return result

    @classmethod
    def from_dict(cls, value: object) -> Facts | None:
        """Read back what there is; None when there is nothing. What cannot be read is not known."""
        if not isinstance(value, Mapping):
            return None
        known: dict[str, Any] = {}
        for name in ("server_version", "glibc", "icu"):
            if isinstance(value.get(name), str):
                known[name] = value[name]
        for name, kind in (("data_checksums", bool), ("max_wal_size", int)):
            if isinstance(value.get(name), kind):
                known[name] = value[name]
        with contextlib.suppress(TypeError, ValueError, AttributeError):
            known["floors"] = {str(name): int(floor) for name, floor in value["floors"].items()}
        with contextlib.suppress(TypeError, ValueError, AttributeError, KeyError):
            known["tablespace_bytes"] = {int(oid): int(size) for oid, size in value["tablespace_bytes"].items()}
        if isinstance(value.get("providers"), Sequence):
            known["providers"] = tuple(str(item) for item in value["providers"])
        return cls(**known)


def gather(connection: Any) -> Facts:
    """Ask the server that is being backed up. Never raises: what it does not tell is not known.

    The sizes of the tablespaces are in the backup's manifest.
    """
    known: dict[str, Any] = {}
    with contextlib.suppress(PitrError):
        version, checksums, wal = query(
            connection,
            "SELECT current_setting('server_version'), current_setting('data_checksums') = 'on',"
            " (SELECT setting::bigint * 1024 * 1024 FROM pg_settings WHERE name = 'max_wal_size')",
        )[0]
        known.update(server_version=str(version), data_checksums=bool(checksums), max_wal_size=int(wal))
    with contextlib.suppress(PitrError):
        rows = query(connection, "SELECT name, setting::bigint FROM pg_settings WHERE name IN %s", (tuple(FLOORS),))
        known["floors"] = {str(name): int(setting) for name, setting in rows}
    with contextlib.suppress(PitrError):
        # Collations below this oid came with initdb (FirstNormalObjectId of transam.h); every cluster has those.
        rows = query(
            connection,
            "SELECT datlocprovider::text FROM pg_database UNION SELECT collprovider::text FROM pg_collation"
            " WHERE oid >= 16384",
        )
        known["providers"] = tuple(sorted(PROVIDERS.get(row[0], row[0]) for row in rows))
    # The locales C and POSIX depend on no library, and have no version; one other of each library is enough.
    for name, which in (("glibc", "collprovider = 'c' AND collcollate !~ '^(C|POSIX)'"), ("icu", "collprovider = 'i'")):
        with contextlib.suppress(PitrError):
            rows = query(
                connection,
                f"SELECT pg_collation_actual_version(oid) FROM pg_collation WHERE {which} ORDER BY oid LIMIT 1",
            )
            known[name] = str(rows[0][0] or "") if rows else ""
    return Facts(**known)


def host_glibc() -> str:
    """Version of this host's C library, empty when it is not the GNU one or does not tell."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        name, _space, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
        return version if name == "glibc" else ""
    return ""


def library_notes(facts: Facts | None, here: str) -> list[str]:
    """What may go wrong because of collations where the GNU C library has version ``here`` ("Collation Support").

    An index is ordered by the library's rules of the host where it was written; other rules do not find what is there,
    and let duplicates in.
    """
    if facts is None:
        return []
    notes = []
    if "libc" in facts.providers and facts.glibc and here and facts.glibc != here:
        notes.append(
            f"the backup's host had glibc {facts.glibc}, this one has {here}: text may sort in another order, and then"
            " indexes on text are corrupt. Compare the versions with pg_database.datcollversion after the restore,"
            " and REINDEX what depends on them before anybody writes, or restore on a host with the same glibc"
        )
    if "icu" in facts.providers:
        version = f" (version {facts.icu})" if facts.icu else ""
        notes.append(
            f"databases or collations use ICU{version}: if the ICU library here is another one, indexes on text are"
            " corrupt until they are built anew; pg_database.datcollversion and pg_collation.collversion tell"
        )
    return notes
