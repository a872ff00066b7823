# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Backups as they lie in a repository: which there are, and what is in their files. Taking them is backup.py."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tarfile
from collections.abc import Iterator

from . import codec
from .catalog import Backup, Tablespace
from .errors import PitrError
from .repository import BACKUP_FILE, ClusterFolder, read_json
from .tree import LOCAL, Tree

MANIFEST = "backup_manifest"
KEEP_FILE = "keep.json"


def stored_backups(folder: ClusterFolder) -> list[Backup]:
    """Complete backups of a cluster, oldest first. Raises PitrError when a description is damaged."""
    backups = []
    try:
        names = folder.tree.names(folder.backups_path)
    except FileNotFoundError:
        raise PitrError(f"{folder.backups_path} does not exist. Is the repository mounted?") from None
    for name in names:
        document = os.path.join(folder.backups_path, name, BACKUP_FILE)
        if name.startswith("."):
            continue
        try:
            backups.append(Backup.from_dict(read_json(document, folder.tree)))
        except (FileNotFoundError, NotADirectoryError):
            # Not complete, or not a backup.
            continue
        except PitrError as error:
            raise PitrError(f"{document}: {error.message}.") from None
    return sorted(backups, key=lambda backup: (backup.stopped_at, backup.label))


def keep_mark(folder: ClusterFolder, label: str) -> str | None:
    """The reason that was given for keeping this backup whatever the policy, None when it has no such mark.

    A mark that cannot be read counts.
    """
    path = os.path.join(folder.backups_path, label, KEEP_FILE)
    try:
        return str(read_json(path, folder.tree).get("reason") or "kept")
    except FileNotFoundError:
        return None
    except (OSError, PitrError):
        return "kept; the mark cannot be read"


def damaged_backups(folder: ClusterFolder, backups: list[Backup]) -> dict[str, str]:
    """Labels of backups whose files are missing or have another size than when they were stored, with the reason."""
    result = {}
    for backup in backups:
        for file in backup.files:
            path = os.path.join(folder.backups_path, backup.label, file.name)
            try:
                size = folder.tree.stat(path).size
            except OSError as error:
                result[backup.label] = f"{path}: {error.strerror}"
                break
            if size != file.size:
                result[backup.label] = f"{path} has {size} bytes, {file.size} were stored"
                break
    return result


@contextlib.contextmanager
def open_tar(path: str, tree: Tree = LOCAL) -> Iterator[tarfile.TarFile]:
    """Walk a stored tar once, whatever it is compressed with. Raises PitrError naming it when it is damaged."""
    with codec.open_reader(path, tree) as reader:
        try:
            # "r|" reads strictly forward; the mode never seeks.
            with tarfile.open(fileobj=reader, mode="r|", bufsize=codec.CHUNK) as tar:  # type: ignore[call-overload]
                yield tar
            # Only the read that returns nothing has checked the checksum of the stream.
            while reader.read(codec.CHUNK):
                pass
        except tarfile.TarError as error:
            raise PitrError(f"{path} is damaged: {error}.", path=path) from None


def unescape_tablespace(text: str) -> str:
    """A path in tablespace_map: backslash escapes line breaks and itself (read_tablespace_map of xlogrecovery.c)."""
    return re.sub(r"\\(.)", r"\1", text, flags=re.DOTALL)


def parse_tablespace_map(text: str) -> tuple[Tablespace, ...]:
    """Tablespaces of a backup. Lines end at a line feed that no backslash escapes."""
    entries = re.findall(r"(\d+) ((?:[^\\\n]|\\.)+)\n", text, flags=re.DOTALL)
    return tuple(Tablespace(int(oid), unescape_tablespace(path)) for oid, path in entries)


def sha256(path: str, tree: Tree = LOCAL) -> str:
    """Digest of a file's stored bytes."""
    digest = hashlib.sha256()
    source = tree.open(path)
    try:
        while True:
            data = os.read(source.descriptor, codec.CHUNK)
            if not data:
                source.check()
                return digest.hexdigest()
            digest.update(data)
    finally:
        source.close()
