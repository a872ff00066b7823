# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A backup that was copied here is read back before it becomes visible.

Its manifest has SHA-256 (manifest.py), which Python compares in every version of PostgreSQL and of every compression.
pg_verifybackup reads tar files from 18 on, and only what its build can decompress.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence

from . import codec
from .errors import PitrError
from .manifest import read_manifest
from .stored import MANIFEST, open_tar


def check(directory: str, names: Sequence[str]) -> None:
    """Every file of the manifest is in the tars with its checksum, and no other is. Raises PitrError."""
    with codec.open_reader(os.path.join(directory, MANIFEST)) as reader:
        expected = read_manifest(reader)
    for name in names:
        if name.startswith(MANIFEST):
            continue
        place = "" if name.startswith("base.tar") else f"pg_tblspc/{name.partition('.')[0]}/"
        with open_tar(os.path.join(directory, name)) as tar:
            for member in tar:
                path = place + member.name
                if not member.isfile() or path.startswith("pg_wal/"):
                    continue
                stream = tar.extractfile(member)
                digest = hashlib.sha256()
                while stream is not None and (data := stream.read(codec.CHUNK)):
                    digest.update(data)
                line = expected.pop(path, None)
                if line is None or json.loads(line)["Checksum"] != digest.hexdigest():
                    raise PitrError(f"{path} cannot be read back from {name} as it was written. No backup was kept.")
    if expected:
        raise PitrError(f"{', '.join(list(expected)[:5])} cannot be found in the backup's files. No backup was kept.")
