# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Takes the canonical dump of a running cluster, keeps it if asked to, and compares it with an earlier one.

The dump is pg_dumpall's, behind the comments of :mod:`.dumppreamble`, so that psql can still run it.

A stored dump is the file ``<path>`` and its index ``<path>.index.json``, which can be made again from the dump.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import IO, Any, Optional

from . import codec
from .dumpdiff import Comparison, compare
from .dumpindex import DumpIndex
from .dumpparse import Indexer, index_of
from .dumppreamble import preamble
from .dumpshow import Difference, illustrate
from .errors import PitrError
from .postgres import Login, binary, run

CHUNK = 1024 * 1024
INDEX_SUFFIX = ".index.json"
_F_SETPIPE_SZ = 1031  # fcntl.F_SETPIPE_SZ, which Python knows from 3.10 on


@dataclass(frozen=True)
class Request:
    """What to do. ``path``: where to keep the dump, or empty; ``compare_to``: the dump that is the truth, or empty."""

    login: Login
    bin_dir: str
    path: str = ""
    compare_to: str = ""
    compression: str = "auto"
    max_differences: int = 20
    check_mode: bool = False
    # Remove the truth once the comparison has found nothing: a dump holds everything that the cluster does.
    discard_identical: bool = False


@dataclass(frozen=True)
class Compared:
    """``differences`` are the first of ``comparison.findings``, with their lines."""

    comparison: Comparison
    differences: tuple[Difference, ...]

    def message(self, compare_to: str) -> str:
        """One sentence for a failure; empty when there is none."""
        count = len(self.comparison.findings)
        if not count:
            return ""
        first = self.comparison.findings[0]
        what = f"{first.label} in {first.either.database} is {first.kind}"
        differences = f"{count} difference{'s' if count > 1 else ''}"
        return f"The cluster is not identical to {compare_to}: {differences}, the first is that {what}."


@dataclass(frozen=True)
class Result:
    """``changed``: a dump was stored, or would be. ``seconds`` is the wall-clock time of all of it."""

    index: DumpIndex
    changed: bool
    seconds: float
    compared: Optional[Compared]

    def to_dict(self, path: str) -> dict[str, Any]:
        """The return values of the module."""
        result: dict[str, Any] = {
            "changed": self.changed,
            "fingerprint": self.index.fingerprint,
            "databases": self.index.databases,
            "objects": len(self.index.objects),
            "bytes": self.index.size,
            "seconds": self.seconds,
            "path": path,
        }
        if self.compared is not None:
            comparison = self.compared.comparison
            result["identical"] = comparison.identical
            result["difference_count"] = len(comparison.findings)
            result["differences"] = [asdict(item) for item in self.compared.differences]
            result["explained"] = [asdict(item) for item in comparison.explained]
        return result


def perform(request: Request) -> Result:
    """Take the dump, compare it, store it. Raises PitrError when one of them failed; then nothing was stored."""
    started = time.monotonic()
    _check(request)
    truth = load_index(request.compare_to) if request.compare_to else None
    keep = bool(request.path) and not request.check_mode
    folder = os.path.dirname(request.path if keep else request.compare_to) or "."
    name = os.path.basename(request.path or request.compare_to)
    with contextlib.ExitStack() as stack:
        # Without a path the dump is still needed to show what differs; beside the truth there is room for such a file.
        temporary = ""
        if keep or truth is not None:
            temporary = stack.enter_context(_temporary(folder, name))
        index = take(request.login, request.bin_dir, temporary, request.compression)
        compared = None
        if truth is not None:
            comparison = compare(truth, index)
            shown = illustrate(
                comparison.findings,
                lambda: codec.open_reader(request.compare_to),
                lambda: codec.open_reader(temporary),
                request.max_differences,
            )
            compared = Compared(comparison, tuple(shown))
        changed = bool(request.path) and not _holds(request.path, index)
        if keep and changed:
            _store(temporary, request.path, index)
    if request.discard_identical and compared is not None and compared.comparison.identical:
        changed = True
        for path in (request.compare_to, request.compare_to + INDEX_SUFFIX):
            with contextlib.suppress(FileNotFoundError):
                if not request.check_mode:
                    os.unlink(path)
    return Result(index, changed, round(time.monotonic() - started, 3), compared)


def _check(request: Request) -> None:
    """Refuse what cannot work before the server is asked for anything."""
    codec.parse(request.compression)
    if request.max_differences < 0:
        raise PitrError("max_differences must be 0 or more.")
    if request.path:
        folder = os.path.dirname(os.path.abspath(request.path))
        # In check mode the task that makes the directory has made nothing, either.
        if not os.path.isdir(folder) and not request.check_mode:
            raise PitrError(f"The directory {folder} does not exist; the dump cannot be kept there. Create it first.")
        if os.path.isdir(request.path):
            raise PitrError(f"{request.path} is a directory. Give the path of a file.")
        if request.compare_to and os.path.realpath(request.path) == os.path.realpath(request.compare_to):
            raise PitrError(f"{request.path} is the dump to compare with. Keep the new dump under another name.")


@contextlib.contextmanager
def _temporary(folder: str, name: str) -> Iterator[str]:
    """Name of a file that does not exist yet and is gone afterwards, unless it was renamed."""
    path = os.path.join(folder, f".{name}.{os.getpid()}.partial")
    for leftover in os.listdir(folder):
        # A run that was killed has left it, and it may be large.
        found = re.fullmatch(rf"\.{re.escape(name)}\.(\d+)\.partial", leftover)
        if found and (int(found.group(1)) == os.getpid() or not os.path.exists(f"/proc/{found.group(1)}")):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(folder, leftover))
    try:
        yield path
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


# --- stored dumps ----------------------------------------------------------------------------------------------------


def load_index(path: str) -> DumpIndex:
    """The index of a stored dump; read from the dump itself when its file is gone.

    Raises PitrError when there is no dump, or it is damaged, or of another format.
    """
    if not os.path.isfile(path):
        raise PitrError(f"There is no dump {path}. Take one with the option path before the cluster is compared.")
    try:
        with open(path + INDEX_SUFFIX, encoding="utf-8") as stream:
            text = stream.read()
    except FileNotFoundError:
        with codec.open_reader(path) as reader:
            try:
                return index_of(iter(lambda: reader.read(CHUNK), b""))
            except PitrError as error:
                raise PitrError(f"{path}: {error.message}") from None
    index = DumpIndex.from_json(text, path + INDEX_SUFFIX)
    stored = index.meta.get("stored_size")
    if stored != os.path.getsize(path):
        raise PitrError(
            f"{path} has {os.path.getsize(path)} bytes, its index was made for {stored}. It was changed after it was"
            " taken; take it again."
        )
    return index


def _holds(path: str, index: DumpIndex) -> bool:
    """Whether this very dump is stored there already."""
    try:
        return load_index(path).fingerprint == index.fingerprint
    except (PitrError, OSError):
        return False


def _store(temporary: str, path: str, index: DumpIndex) -> None:
    """Give the dump its name. Whatever happens in between, there is never an index beside a dump that it is not of."""
    stored = replace(index, meta={**index.meta, "stored_size": os.path.getsize(temporary)})
    new_index = temporary + INDEX_SUFFIX
    try:
        with open(os.open(new_index, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as stream:
            stream.write(stored.to_json())
            stream.flush()
            os.fsync(stream.fileno())
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path + INDEX_SUFFIX)
        os.rename(temporary, path)
        os.rename(new_index, path + INDEX_SUFFIX)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(new_index)
    folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


# --- taking ----------------------------------------------------------------------------------------------------------


def take(login: Login, bin_dir: str, path: str = "", compression: str = "auto") -> DumpIndex:
    """Dump the cluster that ``login`` reaches into the new file ``path`` (none when empty), and return its index.

    Raises PitrError when the dump is not whole; then ``path`` does not exist.
    """
    connection = login.connect()
    try:
        head = preamble(connection)
    finally:
        connection.close()
    indexer = Indexer()
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(codec.open_writer(path, compression)) if path else None
        with _pg_dumpall(login, bin_dir) as pieces:
            for piece in _chain(head, pieces):
                indexer.feed(piece)
                if writer is not None:
                    writer.write(piece)
        # Inside of the writer's block: a dump that is not whole must not be left behind.
        return indexer.finish()


def _chain(head: bytes, pieces: Iterator[bytes]) -> Iterator[bytes]:
    yield head
    yield from pieces


def dumpall_argv(program: str, help_text: str, db: str) -> list[str]:
    """The command line of pg_dumpall. Minor releases without ``--restrict-key`` write no ``\\restrict`` either."""
    argv = [program, "--quote-all-identifiers", "--no-password", f"--database={db}"]
    if "--restrict-key" in help_text:
        argv.append("--restrict-key=0")
    return argv


@contextlib.contextmanager
def _pg_dumpall(login: Login, bin_dir: str) -> Iterator[Iterator[bytes]]:
    """The output of pg_dumpall in pieces. Leaving the block raises PitrError when the program failed."""
    program = binary(bin_dir, "pg_dumpall")
    argv = dumpall_argv(program, run([program, "--help"]), login.db)
    with login.environment() as environment, tempfile.TemporaryFile() as errors:
        # Times are shown in the client's time zone; the same for both dumps, wherever they are taken.
        environment = {**environment, "PGTZ": "UTC"}
        process = subprocess.Popen(
            argv,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,  # pg_dumpall starts pg_dump; both are ended together
        )
        with process:  # closes the pipe
            try:
                yield _pieces(process.stdout)
            except BaseException:
                _end(process)
                raise
            code = process.wait()
        if code != 0:
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip()[-2000:]
            raise PitrError(f"pg_dumpall failed with exit code {code}, the dump is not kept. It says: {said}", rc=code)


def _pieces(stream: IO[bytes] | None) -> Iterator[bytes]:
    if stream is None:
        raise AssertionError("stdout is a pipe")
    descriptor = stream.fileno()
    with contextlib.suppress(OSError):  # a larger pipe saves switches between the programs; the limit is the system's
        fcntl.fcntl(descriptor, _F_SETPIPE_SZ, CHUNK)
    return iter(lambda: os.read(descriptor, CHUNK), b"")


def _end(process: subprocess.Popen[bytes]) -> None:
    for number, seconds in ((signal.SIGTERM, 10.0), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
