# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Certificates of a server: whether it could use them, and whether it has read those that are there now.

A running server that cannot use what it is told to read again goes on with the old certificate and says so in its log
only (section "Secure TCP/IP Connections with SSL"); one that is started does not come up. So they are tried before.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterable, Mapping
from typing import Any

from .errors import PitrError

# The settings that name files which a reload reads again.
FILES = ("ssl_cert_file", "ssl_key_file", "ssl_ca_file", "ssl_crl_file")


def files(settings: Mapping[str, Any], pgdata: str) -> dict[str, str]:
    """Paths by setting, of those that are set; relative ones are PostgreSQL's, of the data directory."""
    return {name: os.path.join(pgdata, str(settings[name])) for name in FILES if settings.get(name)}


def check(settings: Mapping[str, Any], pgdata: str) -> None:
    """Raises PitrError when a server that runs as this user could not use the certificates of ``settings``.

    Nothing is asked of settings without ``ssl_cert_file`` and ``ssl_key_file``. The key's mode is what the server
    demands (be-secure-common.c, check_ssl_key_file_permissions).
    """
    found = files(settings, pgdata)
    if "ssl_cert_file" not in found or "ssl_key_file" not in found:
        return
    certificate, key = found["ssl_cert_file"], found["ssl_key_file"]
    for name, path in found.items():
        if not os.access(path, os.R_OK):
            raise PitrError(
                f"{name} is {path}, which is not there or not to be read by this user. Nothing was changed."
            )
    status = os.stat(key)
    if status.st_uid not in (os.geteuid(), 0) or status.st_mode & (0o077 if status.st_uid else 0o027):
        raise PitrError(
            f"The server would not use the key {key}: it has to belong to the server's user with mode 0600, or to root"
            " with 0640 at most. Nothing was changed."
        )
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        # A key with a passphrase must not make it ask for one.
        context.load_cert_chain(certificate, key, password=lambda: b"")
        if "ssl_ca_file" in found:
            context.load_verify_locations(found["ssl_ca_file"])
    except (ssl.SSLError, ValueError) as error:
        why = getattr(error, "reason", None) or error
        raise PitrError(
            f"The server could not use the certificate {certificate} with the key {key}: {why}. Are they of each other,"
            " and both whole? Nothing was changed, and a running server goes on with what it has."
        ) from None


def newer_than(paths: Iterable[str], loaded: float) -> bool:
    """Whether one of these files has been changed, or replaced, since ``loaded`` (seconds of the epoch)."""
    # A file that is moved into place keeps its own time, and gets a new one of its inode.
    return any(max(status.st_mtime, status.st_ctime) > loaded for status in map(os.stat, paths))
