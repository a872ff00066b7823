# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Compression of everything that is stored: WAL segments, backups, dumps.

What a file is compressed with is told by its first bytes, never by its name, so that a change of compression leaves
older files readable. zstd and lz4 are the well-known commands; gzip is Python's zlib. What is written here carries a
checksum of its content, which is checked before the last byte is handed out. (zstd that a server has compressed, in a
base backup, carries none; there the manifest has one for every file.)

On the path of ``pitr-wal``: processes are started with posix_spawn, because importing ``subprocess`` costs more than
starting one.
"""

from __future__ import annotations

import contextlib
import os
import signal
import zlib
from collections.abc import Iterator

from .errors import PitrError
from .tree import LOCAL, Source, Tree

CHUNK = 1024 * 1024
NAMES = ("none", "gzip", "lz4", "zstd")

_MAGIC = ((b"\x28\xb5\x2f\xfd", "zstd"), (b"\x1f\x8b", "gzip"), (b"\x04\x22\x4d\x18", "lz4"))
_DEFAULT_LEVEL = {"gzip": 1, "lz4": 1, "zstd": 1}
_LEVELS = {"gzip": (1, 9), "lz4": (1, 12), "zstd": (1, 19)}


def which(command: str) -> str | None:
    """Absolute path of a command, or None. PostgreSQL may have been started with a very short PATH."""
    for folder in (*(os.environ.get("PATH") or "").split(os.pathsep), "/usr/local/bin", "/usr/bin", "/bin"):
        candidate = os.path.join(folder, command)
        if folder and os.access(candidate, os.X_OK) and not os.path.isdir(candidate):
            return candidate
    return None


def parse(codec: str) -> tuple[str, int]:
    """``name[:level]`` to (name, level). ``auto`` is zstd where the command exists, else gzip.

    Raises PitrError for an unknown name or level, or a missing command.
    """
    name, _colon, level = codec.partition(":")
    if name == "auto":
        name = "zstd" if which("zstd") else "gzip"
    if name not in NAMES:
        raise PitrError(f"Compression '{codec}' is not known. Use auto, {', '.join(NAMES)}, with an optional :level.")
    if name == "none":
        return name, 0
    low, high = _LEVELS[name]
    if level and not (level.isdecimal() and low <= int(level) <= high):
        raise PitrError(f"Compression level '{level}' is not one of {low} to {high} for {name}.")
    _command(name)
    return name, int(level) if level else _DEFAULT_LEVEL[name]


def _command(name: str) -> str:
    if name in ("gzip", "none"):
        return name
    found = which(name)
    if found is None:
        raise PitrError(
            f"The command {name} is not installed on this host. Install the package {name}, or choose gzip."
        )
    return found


def detect(head: bytes) -> str:
    """Name of the codec that wrote a file which begins with these bytes."""
    for magic, name in _MAGIC:
        if head.startswith(magic):
            return name
    return "none"


def _spawn(argv: list[str], stdin: int, stdout: int, stderr: int) -> int:
    """Start a process with these file descriptors (all of ours are close-on-exec)."""
    actions = [(os.POSIX_SPAWN_DUP2, source, target) for target, source in enumerate((stdin, stdout, stderr))]
    return os.posix_spawn(argv[0], argv, os.environ, file_actions=actions, setsigdef=[signal.SIGPIPE])


def _finish(pid: int, errors: int) -> str:
    """Wait for a process; return what it complained about, or the empty text when it succeeded."""
    with os.fdopen(errors, "rb") as stream:
        said = stream.read(4000).decode(errors="replace").strip()
    _pid, status = os.waitpid(pid, 0)
    if status == 0:
        return ""
    return said.replace("\n", " ") or f"ended with wait status {status}"


class Writer:
    """Compresses what is written into an open file descriptor. ``finish`` must succeed, or nothing was stored."""

    def __init__(self, target: int, codec: str) -> None:
        self._name, level = parse(codec)
        self._target = target
        self._pipe = -1
        if self._name == "gzip":
            self._deflate = zlib.compressobj(level, zlib.DEFLATED, 31)
        elif self._name != "none":
            source, self._pipe = os.pipe()
            self._errors, errors = os.pipe()
            argv = [_command(self._name), "-q", "-c", f"-{level}"]
            self._pid = _spawn(argv, source, target, errors)
            os.close(source)
            os.close(errors)

    def write(self, data: bytes) -> int:
        """Take the next bytes. Raises OSError as a file would, and PitrError when the compressor has given up."""
        if self._name == "gzip":
            _write_all(self._target, self._deflate.compress(data))
        elif self._pipe < 0:
            _write_all(self._target, data)
        else:
            try:
                _write_all(self._pipe, data)
            except BrokenPipeError:
                # "Broken pipe" tells nothing; the compressor has said that the disk is full.
                self.finish()
                raise
        return len(data)

    def finish(self) -> None:
        """Flush everything into the file. Raises PitrError when the compressor failed."""
        if self._name == "gzip":
            _write_all(self._target, self._deflate.flush())
        elif self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1
            said = _finish(self._pid, self._errors)
            if said:
                raise PitrError(f"{self._name} could not write: {said}.")

    def abort(self) -> None:
        """End the compressor without caring for its output."""
        if self._pipe >= 0:
            os.kill(self._pid, signal.SIGKILL)
            os.close(self._pipe)
            self._pipe = -1
            _finish(self._pid, self._errors)


def _write_all(target: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(target, view) :]


@contextlib.contextmanager
def open_writer(path: str, codec: str) -> Iterator[Writer]:
    """Create ``path`` (0600, must not exist), compress into it, and leave it on stable storage.

    Raises FileExistsError, OSError, or PitrError; then the file is removed again.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        writer = Writer(descriptor, codec)
        try:
            yield writer
            writer.finish()
            os.fsync(descriptor)
        except BaseException:
            writer.abort()
            raise
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise
    finally:
        os.close(descriptor)


class Reader:
    """The content of a stored file. The read that returns ``b""`` has checked the file's own checksum."""

    def __init__(self, source: Source) -> None:
        """The caller closes ``source``, after this."""
        self._file = source
        self._source = source.descriptor
        self._pid = 0
        self.codec = detect(source.peek(8))
        self._buffer = b""
        if self.codec == "gzip":
            self._inflate = zlib.decompressobj(31)
            self._raw = b""
        elif self.codec != "none":
            self._source, target = os.pipe()
            self._errors, errors = os.pipe()
            self._pid = _spawn([_command(self.codec), "-q", "-d", "-c"], source.descriptor, target, errors)
            os.close(target)
            os.close(errors)

    def _damaged(self, why: str) -> PitrError:
        """What to raise; when the transfer has failed, that is raised instead, for the file is not to blame."""
        self._file.check()
        return PitrError(f"{self._file.name} is damaged: {why}.", path=self._file.name)

    def _next(self) -> bytes:
        """The next piece of content of any size, empty at the proven end."""
        if self.codec == "none":
            return os.read(self._source, CHUNK)
        if self.codec == "gzip":
            return self._next_gzip()
        data = os.read(self._source, CHUNK) if self._source >= 0 else b""
        if not data and self._pid:
            os.close(self._source)
            self._source = -1
            pid, self._pid = self._pid, 0
            said = _finish(pid, self._errors)
            if said:
                raise self._damaged(f"{self.codec} says: {said}")
        return data

    def _next_gzip(self) -> bytes:
        while True:
            raw = self._inflate.unconsumed_tail or self._raw or os.read(self._source, CHUNK)
            self._raw = b""
            if self._inflate.eof:
                if not raw:
                    return b""
                # A gzip file may consist of several members, one after the other.
                self._inflate = zlib.decompressobj(31)
            elif not raw:
                raise self._damaged("it ends before its gzip stream does")
            try:
                data = self._inflate.decompress(raw, 4 * CHUNK)
            except zlib.error as error:
                raise self._damaged(str(error)) from None
            self._raw = self._inflate.unused_data
            if data:
                return data

    def read(self, size: int = -1) -> bytes:
        """Up to ``size`` bytes, as many as there are; all of the rest when negative. Raises PitrError when damaged."""
        parts = [self._buffer]
        length = len(self._buffer)
        while size < 0 or length < size:
            data = self._next()
            if not data:
                self._file.check()
                break
            parts.append(data)
            length += len(data)
        whole = parts[0] if len(parts) == 1 else b"".join(parts)
        if size < 0:
            self._buffer = b""
            return whole
        self._buffer = whole[size:]
        return whole[:size]

    def close(self) -> None:
        """Let go, also in the middle of the content."""
        if self._pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
            os.close(self._source)
            pid, self._pid = self._pid, 0
            _finish(pid, self._errors)


@contextlib.contextmanager
def open_reader(path: str, tree: Tree = LOCAL) -> Iterator[Reader]:
    """Read the content of a stored file, whatever it is compressed with.

    Raises OSError when it cannot be opened and PitrError, naming it, when it is damaged or truncated.
    """
    source = tree.open(path)
    try:
        reader = Reader(source)
        try:
            yield reader
        finally:
            reader.close()
    finally:
        source.close()
