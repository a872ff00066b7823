# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a call of ``pitr-wal`` may answer at once, because an earlier call has done the work and left a note of it.

``push`` finds an acknowledgement: this very file was archived ahead. ``get`` finds a segment that was fetched ahead,
and the note that it was whole. A note vouches for exactly what it tells: the facts are gathered anew, by the same
functions that its writer (ahead.py) used, and compared. Whatever differs, is missing or cannot be read means that the
note says nothing, and the full work is done.

PostgreSQL starts the command once per segment, so this file imports nothing that the interpreter has not loaded yet.
"""

from __future__ import annotations

import posix as os  # what os is made of; os itself costs a sixth of a start of Python
import sys
import time

TYPE_CHECKING = False  # typing's own would cost more than all of this
if TYPE_CHECKING:
    from collections.abc import Callable

    Facts = dict[str, str]
    Look = Callable[[str], str]

    from os import stat_result as StatResult

    from .tree import Tree

# The first page's long header (XLogLongPageHeaderData): what a segment says of itself.
HEAD = 40
# Seconds for which a note is believed. A clock that was set back makes it come from the future: not believed.
LIFETIME = 3600
_FIRST, _LAST = "pitr-note 1", "end"

PUSHED, FETCHED, LOCK = ".pitr-push", ".pitr-get", "lock"
# Seconds between two looks at a file that is being archived ahead, at first and in the end, and until it is archived
# here, whatever it takes.
LOOK_SECONDS = (0.002, 0.02)
PATIENCE = 60.0
# What a note can be, or what is around it, that makes it worth nothing.
ERRORS = (OSError, ValueError, KeyError)
# Options of get. A note is for exactly those that the segment was fetched with.
GET_OPTIONS = frozenset(("system-identifier", "identity", "lease", "lenient"))


def _join(folder: str, *names: str) -> str:
    return "/".join((folder.rstrip("/") if folder != "/" else "", *names))


def _folder(path: str) -> str:
    """Where a file lies; a name alone lies here."""
    folder, slash, _name = path.rpartition("/")
    return folder or slash or "."


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def _decoded(path: bytes) -> str:
    return path.decode(sys.getfilesystemencoding(), "surrogateescape")


def _exists(path: str) -> bool:
    try:
        os.stat(path)
    except OSError:
        return False
    return True


def read(path: str) -> bytes:
    """All bytes of a small file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.read(descriptor, 1 << 20)
    finally:
        os.close(descriptor)


def settings_path(folder: str, cluster: str) -> str:
    """Where the settings of the command for one cluster lie."""
    return _join(folder, f"{cluster}.json")


def pushed_spool(settings: bytes, cluster: str, path: str) -> str:
    """The directory of acknowledgements: beside ``path``, which is in pg_wal, or in the one that the settings name.

    Read out of the settings by hand, since json costs more than a start of Python. A wrong answer here is harmless:
    what lies there has to prove itself.
    """
    _before, found, rest = settings.partition(b'"spool": "')
    value, closed, _after = rest.partition(b'"')
    if not found or not closed or not value:
        return _join(_folder(path), PUSHED)
    if b"\\" in value:
        import json

        return _join(json.loads(settings)["spool"], cluster)
    return _join(_decoded(value), cluster)


def fetched_spool(target: str) -> str:
    """The directory of segments that were fetched ahead: always on pg_wal's filesystem, as they are renamed into it.

    The server leaves names alone there that are not those of WAL, and pg_basebackup copies nothing of pg_wal. What
    pg_rewind or cp copy of it is another file than the note tells.
    """
    return _join(_folder(target), FETCHED)


def is_private(status: StatResult) -> bool:
    """Whether nobody else could have put this here."""
    return status.st_uid == os.geteuid() and not status.st_mode & 0o022


def parse_note(data: bytes) -> Facts | None:
    """The facts of a note, or None when it is not whole."""
    lines = data.decode("ascii").split("\n")
    if lines[0] != _FIRST or lines[-2:] != [_LAST, ""]:
        return None
    return dict(line.partition(" ")[::2] for line in lines[1:-2])


def note(facts: Facts, now: float) -> bytes:
    """A note that tells these facts; ``now``: seconds since 1970, rounded down, so that it is not of the future."""
    lines = [_FIRST, *(f"{name} {value}" for name, value in facts.items()), f"written {int(now)}", _LAST, ""]
    return "\n".join(lines).encode("ascii")


def read_note(path: str) -> Facts | None:
    """The facts of a note that only we can have written, or None."""
    if not is_private(os.lstat(_folder(path))):
        return None
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        if not is_private(os.fstat(descriptor)):
            return None
        return parse_note(os.read(descriptor, 1 << 20))
    finally:
        os.close(descriptor)


def vouches(found: Facts | None, facts: Facts, now: float) -> bool:
    """The one rule: a note is believed when it is young and tells all of these facts, and no others."""
    if found is None or not 0 <= now - float(found.get("written", "nan")) <= LIFETIME:
        return False
    return {name: value for name, value in found.items() if name != "written"} == facts


def encoded(path: str) -> str:
    """A path as a fact."""
    return path.encode(sys.getfilesystemencoding(), "surrogateescape").hex()


def identity(status: StatResult) -> str:
    """Which file it is, and in which state. Whatever is done to a file changes its ctime, and nobody can set that."""
    return f"{status.st_dev} {status.st_ino} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"


def source_facts(settings: bytes, cluster: str, name: str, descriptor: int) -> Facts:
    """What is known of a file in pg_wal or in the spool, and of whom it belongs to."""
    return {
        "settings": settings.hex(),
        "cluster": cluster,
        "name": name,
        "file": identity(os.fstat(descriptor)),
        "head": os.pread(descriptor, HEAD, 0).hex(),
    }


def look_local(path: str) -> str:
    """How to look at one stored file: what comes back is the same while the file is the same."""
    return identity(os.stat(path))


def look_in(tree: Tree, repository: str) -> Look:
    """The same by whatever way a repository is reached."""
    if is_local(repository):
        return look_local

    def look(path: str) -> str:
        entry = tree.stat(path)
        return f"{entry.size} {entry.mtime!r}"

    return look


def repository_facts(repository: str, cluster: str, look: Look) -> Facts:
    """The two documents at the top: they tell that it is the same repository, cluster and chapter.

    They are replaced as a whole when they change, and are not there when nothing is mounted.
    """
    return {
        "marker": look(_join(repository, "pitr-repository.json")),
        "folder": look(_join(repository, cluster, "cluster.json")),
    }


def stored_facts(repository: str, cluster: str, stored: str, look: Look | None) -> Facts:
    """What is known of a stored file and of the repository around it."""
    facts = {"repository": encoded(repository), "stored": encoded(stored)}
    if look is not None:
        facts.update(repository_facts(repository, cluster, look))
        facts["object"] = look(stored)
    return facts


def is_local(repository: str) -> bool:
    """Whether the repository is a directory of this host."""
    return repository.startswith("/")


def _place(found: Facts, cluster: str, name: str) -> tuple[str, str]:
    """Repository and stored file that a note is about. Raises ValueError when it cannot be that of this file.

    That it is the configured repository follows from the settings, which the note has, byte for byte.
    """
    repository, stored = (_decoded(bytes.fromhex(found[key])) for key in ("repository", "stored"))
    if not stored.startswith(_join(repository, cluster, "archive", "")) or _name(stored) != name:
        raise ValueError(stored)
    return repository, stored


def _stored_now(settings: bytes, cluster: str, repository: str, stored: str) -> Facts:
    """The facts of the repository as they are now, as push reaches it."""
    if is_local(repository):
        return stored_facts(repository, cluster, stored, look_local)
    import json

    from .cli import writer_access
    from .tree import tree_for

    tree = tree_for(repository, writer_access(json.loads(settings)))
    try:
        return stored_facts(repository, cluster, stored, look_in(tree, repository))
    finally:
        tree.close(wait=False)


def is_acknowledged(settings: bytes, cluster: str, path: str, directory: str) -> bool:
    """Whether a note proves that this very file lies in the archive, on stable storage."""
    name = _name(path)
    try:
        found = read_note(_join(directory, name))
        if found is None:
            return False
        repository, stored = _place(found, cluster, name)
        descriptor = os.open(path, os.O_RDONLY)
        try:
            facts = source_facts(settings, cluster, name, descriptor)
        finally:
            os.close(descriptor)
        return vouches(found, {**facts, **_stored_now(settings, cluster, repository, stored)}, time.time())
    except ERRORS:
        return False
    except Exception as error:
        # Of a repository that cannot be reached; not named here, for its module costs time.
        if type(error).__name__ == "PitrError":
            return False
        raise


def is_locked(directory: str) -> bool:
    """Whether a process is at work for this spool directory. Raises OSError when there has never been one."""
    lock = os.open(_join(directory, LOCK), os.O_RDWR)
    try:
        os.lockf(lock, os.F_TEST, 0)
    except OSError:
        return True
    finally:
        os.close(lock)
    return False


def _is_under_way(directory: str, name: str) -> bool:
    """Whether a process is archiving this file ahead, right now or soon."""
    return name.encode() in read(_join(directory, LOCK)).split(b"\n") and is_locked(directory)


def push(folder: str, cluster: str, path: str) -> bool:
    """True when the file is archived already, by an earlier call. Waits for the one that is at it."""
    try:
        settings = read(settings_path(folder, cluster))
        directory, name = pushed_spool(settings, cluster, path), _name(path)
        deadline = time.monotonic() + PATIENCE
        is_last_look = False
        pause = LOOK_SECONDS[0]
        while not is_acknowledged(settings, cluster, path, directory):
            if is_last_look:
                return False
            # It may have been acknowledged, and the process ended, between the two questions: then look once more.
            is_last_look = not _is_under_way(directory, name) or time.monotonic() > deadline
            if not is_last_look:
                time.sleep(pause)
                pause = min(1.4 * pause, LOOK_SECONDS[1])
        os.unlink(_join(directory, name))
    except ERRORS:
        return False
    return True


def fetched_facts(settings: bytes, cluster: str, options: dict[str, str], name: str, descriptor: int) -> Facts:
    """What is known of a segment in the spool, and of whom it was fetched for."""
    asked = "\n".join(f"{key}={value}" for key, value in sorted(options.items()))
    return {**source_facts(settings, cluster, name, descriptor), "options": encoded(asked)}


def _fits(settings: bytes, cluster: str, options: dict[str, str], name: str, directory: str, descriptor: int) -> bool:
    """Whether a note proves that this open file is the whole, checked segment ``name`` of that cluster."""
    found = read_note(_join(directory, f"{name}.note"))
    if found is None:
        return False
    facts = fetched_facts(settings, cluster, options, name, descriptor)
    repository, stored = _place(found, cluster, name)
    # A repository far away is not asked: what was fetched from it is here, whole.
    look = look_local if is_local(repository) else None
    return vouches(found, {**facts, **stored_facts(repository, cluster, stored, look)}, time.time())


def is_fetched(settings: bytes, cluster: str, options: dict[str, str], name: str, directory: str) -> bool:
    """Whether the segment lies in the spool, whole and checked."""
    try:
        descriptor = os.open(_join(directory, name), os.O_RDONLY | os.O_NOFOLLOW)
        try:
            return _fits(settings, cluster, options, name, directory, descriptor)
        finally:
            os.close(descriptor)
    except ERRORS:
        return False


def get(folder: str, cluster: str, options: dict[str, str], name: str, target: str) -> str:
    """Deliver a segment that was fetched ahead. Returns the spool directory, or the empty text when nothing was done.

    What is doubtful is left to whoever fetches ahead, which throws it away.
    """
    try:
        settings = read(settings_path(folder, cluster))
        directory = fetched_spool(target)
        path = _join(directory, name)
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            if not _fits(settings, cluster, options, name, directory, descriptor):
                return ""
            os.rename(path, target)
            # Nobody has exchanged it since we looked.
            there, ours = os.stat(target), os.fstat(descriptor)
            if (there.st_dev, there.st_ino) != (ours.st_dev, ours.st_ino):
                os.unlink(target)
                return ""
        finally:
            os.close(descriptor)
        os.unlink(f"{path}.note")
    except ERRORS:
        return ""
    return directory


def arguments_of(argv: list[str]) -> tuple[dict[str, str], list[str]]:
    """Options (``--name=value``, before anything else) and the other arguments of a call."""
    options: dict[str, str] = {}
    rest = argv[2:]
    while rest and rest[0].startswith("--"):
        name, _equals, value = rest.pop(0)[2:].partition("=")
        options[name] = value
    return options, rest


def answer(argv: list[str]) -> bool:
    """Answer a call at once with success, or leave it to cli.main, which takes the same arguments."""
    verb = argv[1] if len(argv) > 1 else ""
    options, rest = arguments_of(argv)
    if verb == "push" and not options and len(rest) == 2:
        return push(argv[0], rest[0], rest[1])
    if verb == "get" and not options.keys() - GET_OPTIONS and len(rest) == 3:
        directory = get(argv[0], rest[0], options, rest[1], rest[2])
        if directory:
            follow(argv[0], rest[0], options, rest[1], directory)
            return True
    return False


def server_is_init() -> bool:
    """Whether the server that calls us is process 1, as in a container without an init.

    It would adopt what we leave behind, and take a killed one for a crash of its own (HandleChildCrash).
    """
    try:
        return read("postmaster.pid").split(b"\n", 1)[0].strip() == b"1"
    except OSError:
        return False


def is_in_recovery() -> bool:
    """Whether the server that calls us (its working directory is the data directory) is in archive recovery."""
    return _exists("recovery.signal") or _exists("standby.signal")


def follow(folder: str, cluster: str, options: dict[str, str], name: str, directory: str) -> None:
    """Leave a process that fetches what comes after ``name``, unless there is one, or nobody is in recovery."""
    if not is_in_recovery() or server_is_init():
        return
    try:
        os.close(os.open(_join(directory, LOCK), os.O_RDWR | os.O_CREAT, 0o600))
        if is_locked(directory):
            return
    except OSError:
        # The directory has gone, since the recovery is over.
        return
    if os.fork() == 0:
        try:
            from .ahead import fetch_ahead

            fetch_ahead(folder, cluster, options, name, directory)
        finally:
            os._exit(0)
