# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The repository: where everything lies, and how it is written so that half-done never looks done.

::

    <repository>/
      pitr-repository.json                 the marker; without it nothing is read or written here
      <cluster>/
        cluster.json                       name and chapters; a chapter is one system identifier
        archive/<major>-<chapter>/
          <first 16 of the name>/<name>    WAL segments, .partial and .backup files
          <timeline>.history
        backups/<label>/                   complete once backup.json is there

docs/repository-format.md tells the same with reasons. On the path of ``pitr-wal``.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence

from .errors import PitrError
from .tree import LOCAL, Tree, fsync_directory, make_directory, temporary_name, tree_for
from .wal import WalFile

# The highest that is read. What an older version would not misread is written with the format that it knows.
FORMAT = 2
FORMAT_PLAIN = 1
MARKER = "pitr-repository.json"
CLUSTER_FILE = "cluster.json"
BACKUP_FILE = "backup.json"
# Names in ``locks/`` begin with it; after it come a backup's label, a dash and eight hexadecimal digits.
LEASE = "lease-"
# The lock of those who read a backup, before its label.
USE = "use-"
BEING_REMOVED = "is being removed by an expire"

_LEASE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,120}-[0-9a-f]{8}\Z")
_CLUSTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z")


def write_atomic(path: str, data: bytes, mode: int = 0o600) -> None:
    """Replace a small file as a whole: temporary file, fsync, rename, fsync of the directory."""
    temporary = temporary_name(path)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.rename(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    fsync_directory(os.path.dirname(path))


def write_json(path: str, value: object, mode: int = 0o600) -> None:
    """Write a small document of the repository."""
    write_atomic(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode(), mode)


def read_json(path: str, tree: Tree = LOCAL) -> dict[str, object]:
    """Read a document of the repository and check its format number. Raises OSError or PitrError."""
    data = tree.read(path)
    try:
        value = json.loads(data)
    except ValueError as error:
        raise PitrError(f"{path} is damaged: {error}.") from None
    if not isinstance(value, dict) or not isinstance(value.get("format"), int):
        raise PitrError(f"{path} is damaged: it has no format number.")
    if value["format"] > FORMAT:
        raise PitrError(
            f"{path} has format {value['format']}; this version reads up to {FORMAT}. Update pgdrill.pitr here."
        )
    return value


class Chapter:
    """One system identifier in a cluster's folder. pg_upgrade makes a new one; the old stays restorable."""

    __slots__ = ("number", "opened_at", "postgresql_version", "system_identifier", "wal_segment_size")

    def __init__(
        self, number: int, system_identifier: str, wal_segment_size: int, postgresql_version: int, opened_at: str
    ) -> None:
        self.number = number
        self.system_identifier = system_identifier
        self.wal_segment_size = wal_segment_size
        self.postgresql_version = postgresql_version
        self.opened_at = opened_at

    @property
    def folder(self) -> str:
        """Name of its folder below ``archive/``."""
        return f"{self.postgresql_version}-{self.number}"

    def to_dict(self) -> dict[str, object]:
        """As stored in cluster.json."""
        return {name: getattr(self, name) for name in self.__slots__}


def check_cluster_name(name: str) -> None:
    """A cluster's name is a folder: letters, digits, dot, dash, underscore; 63 characters. Raises PitrError."""
    if not _CLUSTER_NAME.match(name):
        raise PitrError(
            f"'{name}' cannot name a cluster: use letters, digits, dots, dashes and underscores, at most 63."
        )


class ClusterFolder:
    """One cluster's part of a repository."""

    def __init__(self, repository: str, name: str, access: Mapping[str, str] | None = None) -> None:
        """Does not touch the disk. ``access`` as for tree_for. Raises PitrError for a name that cannot be one."""
        check_cluster_name(name)
        self.repository = repository
        self.name = name
        self.tree = tree_for(repository, access)
        self.path = os.path.join(repository, name)
        self.chapters: list[Chapter] = []
        # What is stored from now on is encrypted to them; those of before are kept to tell which key an old file needs.
        self.recipients: list[str] = []
        self.former_recipients: list[list[str]] = []

    @classmethod
    def open(cls, repository: str, name: str, access: Mapping[str, str] | None = None) -> ClusterFolder:
        """Open an existing folder. Raises PitrError naming what is missing; an unmounted directory is never empty."""
        folder = cls(repository, name, access)
        try:
            read_json(os.path.join(repository, MARKER), folder.tree)
        except FileNotFoundError:
            raise PitrError(
                f"{repository} is not a repository: it has no {MARKER}. Is its filesystem mounted?"
                " If it is new, the module pgdrill.pitr.repository creates it.",
                repository=repository,
            ) from None
        except OSError as error:
            raise PitrError(f"The repository {repository} cannot be read: {error.strerror}.") from None
        try:
            stored = read_json(os.path.join(folder.path, CLUSTER_FILE), folder.tree)
        except FileNotFoundError:
            raise PitrError(
                f"The repository {repository} has no cluster '{name}'. Clusters there:"
                f" {', '.join(clusters(repository)) or 'none'}.",
                repository=repository,
                cluster=name,
            ) from None
        except OSError as error:
            raise PitrError(f"{folder.path} cannot be read: {error.strerror}.") from None
        chapters = stored.get("chapters")
        if not isinstance(chapters, list) or not chapters:
            raise PitrError(f"{os.path.join(folder.path, CLUSTER_FILE)} is damaged: it lists no chapter.")
        try:
            folder.chapters = [Chapter(**chapter) for chapter in chapters]
        except TypeError as error:
            raise PitrError(f"{os.path.join(folder.path, CLUSTER_FILE)} is damaged: {error}.") from None
        folder.recipients = _texts(stored.get("encryption_recipients", []), folder.path)
        former = stored.get("encryption_former_recipients", [])
        folder.former_recipients = [_texts(item, folder.path) for item in (former if isinstance(former, list) else [0])]
        return folder

    @property
    def chapter(self) -> Chapter:
        """The chapter that is being written."""
        return self.chapters[-1]

    def select(self, number: int | None) -> Chapter:
        """The chapter of this number, or the newest one. Raises PitrError when there is none."""
        for chapter in self.chapters:
            if chapter.number == number:
                return chapter
        if number is not None:
            known = ", ".join(str(chapter.number) for chapter in self.chapters)
            raise PitrError(f"{self.path} has no chapter {number}; its chapters are: {known}.")
        return self.chapter

    def require(self, system_identifier: str) -> Chapter:
        """The chapter with this system identifier. Raises PitrError when the folder belongs to another cluster."""
        for chapter in self.chapters:
            if chapter.system_identifier == system_identifier:
                return chapter
        raise PitrError(
            f"{self.path} belongs to the cluster with system identifier {self.chapter.system_identifier},"
            f" but this one is {system_identifier}. Nothing was written. Give this cluster a folder of its own; only if"
            " it is the same cluster after pg_upgrade, open a new chapter for it (new_chapter of the module"
            " pgdrill.pitr.repository, repository_new_chapter of the role).",
            expected=self.chapter.system_identifier,
            found=system_identifier,
        )

    @property
    def backups_path(self) -> str:
        """Folder of all base backups."""
        return os.path.join(self.path, "backups")

    @property
    def locks_path(self) -> str:
        """Folder of locks and leases."""
        return os.path.join(self.path, "locks")

    def touch_lease(self, lease: str) -> None:
        """Say that a recovery still needs the backup that ``lease`` names, and the WAL that follows it.

        Raises PitrError for a name that is none, and OSError when it cannot be written.
        """
        if not _LEASE_NAME.match(lease):
            raise PitrError(f"'{lease}' is not the name of a lease.")
        self.tree.touch_lease(os.path.join(self.locks_path, LEASE + lease))

    def archive_path(self, chapter: Chapter | None = None) -> str:
        """Folder of one chapter's archive."""
        return os.path.join(self.path, "archive", (chapter or self.chapter).folder)

    def wal_path(self, wal_file: WalFile, chapter: Chapter | None = None) -> str:
        """Where a file of the archive lies, or would."""
        return os.path.join(self.archive_path(chapter), wal_file.log, wal_file.name)

    def change_recipients(self, recipients: Sequence[str]) -> None:
        """Encrypt to others from now on, and remember who the older files are encrypted to."""
        if self.recipients:
            self.former_recipients.append(self.recipients)
        self.recipients = list(recipients)
        self.former_recipients = [item for item in self.former_recipients if item != self.recipients]

    def save(self) -> None:
        """Write cluster.json."""
        document: dict[str, object] = {"format": FORMAT_PLAIN, "name": self.name}
        document["chapters"] = [chapter.to_dict() for chapter in self.chapters]
        if self.recipients or self.former_recipients:
            # A version that does not know of encryption would go on storing plain files, and call the others damaged.
            document["format"] = FORMAT
            document["encryption_recipients"] = self.recipients
            document["encryption_former_recipients"] = self.former_recipients
        write_json(os.path.join(self.path, CLUSTER_FILE), document)


def _texts(value: object, path: str) -> list[str]:
    """A list of texts in cluster.json. Never taken for empty when it is something else: nothing would be encrypted."""
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        raise PitrError(f"{os.path.join(path, CLUSTER_FILE)} is damaged: its recipients are not a list of texts.")
    return value


def require_directory(repository: str) -> None:
    """What only happens on the repository host itself begins with this. Raises PitrError for another host's."""
    if repository.startswith("ssh://"):
        raise PitrError(
            f"{repository} is on another host. Run this there, with the repository's directory as its path."
            " Nothing was changed."
        )


def clusters(repository: str) -> list[str]:
    """Names of the clusters in a repository."""
    with contextlib.suppress(OSError), os.scandir(repository) as entries:
        return sorted(entry.name for entry in entries if os.path.exists(os.path.join(entry.path, CLUSTER_FILE)))
    return []


def create(
    repository: str,
    name: str,
    chapter: Chapter,
    check: bool = False,
    recipients: Sequence[str] | None = None,
    new_chapter: bool = False,
) -> tuple[ClusterFolder, list[str]]:
    """Create or validate a cluster's folder and bind it to a system identifier.

    With ``new_chapter`` a folder that belongs to another one gets a chapter beside the old ones, which stay.
    ``recipients``, as encryption.check_recipients gives them, are who everything stored from now on is encrypted to;
    empty ends encryption, None leaves it as it is. Returns the folder and what was (or with ``check`` would be) created
    or changed. Raises PitrError when the folder is bound to another cluster, or a directory with other things in it
    would become a repository.
    """
    require_directory(repository)
    folder = ClusterFolder(repository, name)
    created: list[str] = []
    marker = os.path.join(repository, MARKER)
    if not os.path.exists(marker):
        if os.path.isdir(repository) and [entry for entry in os.listdir(repository) if entry != "lost+found"]:
            raise PitrError(
                f"{repository} is neither empty nor a repository. Nothing was changed. Choose an empty directory."
            )
        created.append(marker)
        if not check:
            os.makedirs(repository, mode=0o700, exist_ok=True)
            write_json(marker, {"format": FORMAT_PLAIN})
    document = os.path.join(folder.path, CLUSTER_FILE)
    if os.path.exists(document):
        folder = ClusterFolder.open(repository, name)
        opened = _turn_to(folder, chapter, new_chapter)
    else:
        opened = False
        folder.chapters = [chapter]
        created.append(folder.path)
        if not check:
            make_directory(folder.path)
    for path in (os.path.join(folder.path, "archive"), folder.archive_path(), folder.backups_path):
        if not os.path.isdir(path):
            created.append(path)
            if not check:
                make_directory(path)
    to_write = opened or not os.path.exists(document)
    if opened:
        created.append(document)
    if recipients is not None and list(recipients) != folder.recipients:
        if not to_write:
            created.append(document)
        to_write = True
        folder.change_recipients(recipients)
    if to_write and not check:
        # Last: a folder without cluster.json is not open for anybody, and a chapter that it does not name neither.
        folder.save()
    return folder, created


def _turn_to(folder: ClusterFolder, chapter: Chapter, new_chapter: bool) -> bool:
    """Make sure that the folder is written by this system identifier. Returns whether a chapter was added for it.

    Raises PitrError when that was not asked for, or would go back to an older chapter.
    """
    known = [each for each in folder.chapters if each.system_identifier == chapter.system_identifier]
    if known and known[0] is not folder.chapter:
        raise PitrError(
            f"{folder.path} has gone on from this cluster (chapter {known[0].number}, system identifier"
            f" {known[0].system_identifier}) to chapter {folder.chapter.number}; two clusters never write into one"
            " folder. What was stored of it can be restored. To go on with it give it a folder of its own (another"
            " cluster name). Nothing was changed."
        )
    if not known and new_chapter:
        chapter.number = max(each.number for each in folder.chapters) + 1
        folder.chapters.append(chapter)
        return True
    folder.require(chapter.system_identifier)
    return False


def archived_logs(archive: str, timeline: int | None = None, tree: Tree = LOCAL) -> Iterator[str]:
    """Names of the 4 GB folders of an archive, of one timeline or all, ascending."""
    prefix = "" if timeline is None else f"{timeline:08X}"
    for name in tree.names(archive):
        # "00000002.history" has 16 characters too.
        if len(name) == 16 and "." not in name and name.startswith(prefix):
            yield name
