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
from collections.abc import Iterator, Sequence

from .errors import PitrError
from .tree import LOCAL, Source, Tree

TYPE_CHECKING = False  # typing's own would cost more than most of what this imports
if TYPE_CHECKING:
    from .encryption import Seal

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


Stages = list[list[str]]  # argv of one process each; every one reads what the one before it writes


def compressing(name: str, level: int, size: int = 0) -> Stages:
    """The processes that compress with this codec; none where Python does it itself.

    ``size`` (bytes) is that of the content, when it is known. It is written into the file's header.
    """
    if name == "zstd":
        known = [f"--stream-size={size}"] if size else []
        # Without a second thread for what one segment is too short for: a tenth less of the processors.
        return [[_command(name), "-q", "-c", f"-{level}", "--single-thread", *known]]
    if name == "lz4":
        return [[_command(name), "-q", "-c", f"-{level}"]]
    return []


def decompressing(name: str) -> Stages:
    """The processes that give back the content of a file of this codec; none where Python does it itself."""
    return [[_command(name), "-q", "-d", "-c"]] if name in ("zstd", "lz4") else []


class Pipeline:
    """Processes in a row: the first reads ``stdin``, the last writes ``stdout``. The caller closes both."""

    def __init__(self, stages: Stages, stdin: int, stdout: int) -> None:
        """Start all of them. The descriptors may be files, so that no content passes through Python."""
        # After finish: whether it failed only because nobody took what it had to give.
        self.cut_off = False
        self._pids: list[int] = []
        self._errors, errors = os.pipe()
        source = stdin
        try:
            for number, argv in enumerate(stages, 1):
                reader, target = (-1, stdout) if number == len(stages) else os.pipe()
                self._pids.append(_spawn(argv, source, target, errors))
                if source != stdin:
                    os.close(source)
                if target != stdout:
                    os.close(target)
                source = reader
        except BaseException:
            os.close(errors)
            self.kill()
            raise
        os.close(errors)

    def finish(self) -> str:
        """Wait for all; return what they complained about, or the empty text when every one succeeded."""
        with os.fdopen(self._errors, "rb") as stream:
            said = stream.read(4000).decode(errors="replace").strip()
        # What age adds to every error.
        said = " ".join(line for line in said.splitlines() if not line.startswith("age: report "))
        failed = 0
        for pid in self._pids:
            status = os.waitpid(pid, 0)[1]
            # One that could not hand on what it had is no reason, but whoever did not take it.
            if status and failed in (0, signal.SIGPIPE):
                failed = status
        self._pids = []
        self.cut_off = failed == signal.SIGPIPE
        if not failed:
            return ""
        return said or f"ended with wait status {failed}"

    def kill(self) -> None:
        """End them without caring for their output."""
        for pid in self._pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.finish()


def _spawn(argv: list[str], stdin: int, stdout: int, stderr: int) -> int:
    """Start a process with these file descriptors (all of ours are close-on-exec)."""
    actions = [(os.POSIX_SPAWN_DUP2, source, target) for target, source in enumerate((stdin, stdout, stderr))]
    return os.posix_spawn(argv[0], argv, os.environ, file_actions=actions, setsigdef=[signal.SIGPIPE])


class Writer:
    """Compresses what is written into an open file descriptor. ``finish`` must succeed, or nothing was stored."""

    def __init__(self, target: int, codec: str | tuple[str, int], after: Stages | None = None) -> None:
        """``codec`` as text or as ``parse`` gives it; ``after``: processes behind the compression."""
        self._name, level = parse(codec) if isinstance(codec, str) else codec
        self._deflate = zlib.compressobj(level, zlib.DEFLATED, 31) if self._name == "gzip" else None
        stages = [*compressing(self._name, level), *(after or [])]
        self._pipeline: Pipeline | None = None
        self._target = target
        if stages:
            source, self._target = os.pipe()
            try:
                self._pipeline = Pipeline(stages, source, target)
            except BaseException:
                os.close(self._target)
                raise
            finally:
                os.close(source)

    def write(self, data: bytes) -> int:
        """Take the next bytes. Raises OSError as a file would, and PitrError when the compressor has given up."""
        try:
            _write_all(self._target, data if self._deflate is None else self._deflate.compress(data))
        except BrokenPipeError:
            # "Broken pipe" tells nothing; the compressor has said that the disk is full.
            self._end()
            raise
        return len(data)

    def finish(self) -> None:
        """Flush everything into the file. Raises PitrError when the compressor failed."""
        if self._deflate is not None:
            try:
                _write_all(self._target, self._deflate.flush())
            except BrokenPipeError:
                self._end()
                raise
        self._end()

    def _end(self) -> None:
        pipeline, self._pipeline = self._pipeline, None
        if pipeline is not None:
            os.close(self._target)
            said = pipeline.finish()
            if said:
                raise PitrError(f"{self._name} could not write: {said}.")

    def abort(self) -> None:
        """End the compressor without caring for its output."""
        pipeline, self._pipeline = self._pipeline, None
        if pipeline is not None:
            pipeline.kill()
            os.close(self._target)


def _write_all(target: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(target, view) :]


class NewFile:
    """A file (0600) that must not exist yet. ``keep`` puts it on stable storage, ``discard`` removes it."""

    def __init__(self, path: str) -> None:
        self._path = path
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)

    def keep(self) -> None:
        """Only now may it get its name."""
        os.fsync(self.descriptor)
        os.close(self.descriptor)
        self.descriptor = -1

    def discard(self) -> None:
        """As if it had never been; also after ``keep``."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
        with contextlib.suppress(OSError):
            os.unlink(self._path)


@contextlib.contextmanager
def open_writer(path: str, codec: str | tuple[str, int]) -> Iterator[Writer]:
    """Create ``path`` (0600, must not exist), compress into it, and leave it on stable storage.

    Raises FileExistsError, OSError, or PitrError; then the file is removed again.
    """
    file = NewFile(path)
    try:
        writer = Writer(file.descriptor, codec)
        try:
            yield writer
            writer.finish()
            file.keep()
        except BaseException:
            writer.abort()
            raise
    except BaseException:
        file.discard()
        raise


class Storing:
    """An open file on its way into a new one, ``path`` (0600, must not exist), compressed.

    Where the codec is a command, it reads the file itself from the moment on that this object exists: no content
    passes through Python, and several can be under way at the same time.
    """

    def __init__(
        self, source: int, path: str, codec: str | tuple[str, int], size: int, recipients: Sequence[str] = ()
    ) -> None:
        """``source`` stands at its beginning, and holds ``size`` bytes. With ``recipients`` it is encrypted to them.

        Raises FileExistsError, OSError, or PitrError; then there is no new file.
        """
        self._codec = parse(codec) if isinstance(codec, str) else codec
        self._source = source
        self._seal = _seal(recipients)
        stages = compressing(*self._codec, size)
        self._pipeline: Pipeline | None = None
        self._file = NewFile(path)
        try:
            self._after = self._seal.begin(self._file.descriptor) if self._seal else []
            if stages:
                self._pipeline = Pipeline([*stages, *self._after], source, self._file.descriptor)
        except BaseException:
            self._file.discard()
            raise

    def finish(self) -> None:
        """All of it is on stable storage. Raises OSError or PitrError; then the new file is removed."""
        try:
            if self._pipeline is None:
                _deflate(self._source, Writer(self._file.descriptor, self._codec, self._after))
            if self._seal:
                # While the processes work.
                self._seal.read(self._source)
            if self._pipeline is not None:
                pipeline, self._pipeline = self._pipeline, None
                said = pipeline.finish()
                if said:
                    raise PitrError(f"{self._codec[0]} could not write: {said}.")
            if self._seal:
                self._seal.finish(self._file.descriptor)
            self._file.keep()
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        """Stop, and remove the new file."""
        pipeline, self._pipeline = self._pipeline, None
        if pipeline is not None:
            pipeline.kill()
        self._file.discard()


def _seal(recipients: Sequence[str]) -> Seal | None:
    if not recipients:
        return None
    # What only encryption needs costs as much as a start of Python.
    from .encryption import Seal

    return Seal(recipients)


def _deflate(source: int, writer: Writer) -> None:
    try:
        while True:
            data = os.read(source, CHUNK)
            if not data:
                break
            writer.write(data)
        writer.finish()
    except BaseException:
        writer.abort()
        raise


def _widen(pipe: int) -> None:
    """Let a pipe hold a whole piece: sixteen times fewer changes between its two processes. Linux only."""
    # Not needed for a segment of WAL, and so not imported with the rest; F_SETPIPE_SZ has its name since Python 3.10.
    import fcntl

    with contextlib.suppress(OSError):
        fcntl.fcntl(pipe, getattr(fcntl, "F_SETPIPE_SZ", 1031), CHUNK)


class Reader:
    """The content of a stored file. The read that returns ``b""`` has checked the file's own checksum."""

    def __init__(self, source: Source) -> None:
        """The caller closes ``source``, after this."""
        self._file = source
        self._proof = source.proof()
        self._source = source.descriptor
        self._pipeline: Pipeline | None = None
        self.codec = detect(source.peek(8))
        self._buffer = b""
        self._space = bytearray()
        if self.codec == "gzip":
            self._inflate = zlib.decompressobj(31)
            self._raw = b""
        stages = decompressing(self.codec)
        if stages:
            self._source, target = os.pipe()
            _widen(target)
            try:
                self._pipeline = Pipeline(stages, source.descriptor, target)
            except BaseException:
                os.close(self._source)
                raise
            finally:
                os.close(target)

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
        data = os.read(self._source, CHUNK) if self._pipeline else b""
        if not data and self._pipeline:
            os.close(self._source)
            pipeline, self._pipeline = self._pipeline, None
            said = pipeline.finish()
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

    def _proven(self) -> bytes:
        """The next piece; empty when all checks of the whole have passed."""
        data = self._next()
        if not data:
            self._file.check()
            if self._proof is not None:
                self._proof.check()
        elif self._proof is not None:
            self._proof.update(data)
        return data

    def piece(self) -> bytes | memoryview:
        """The next piece of any size, as it came, without a copy: it is good until the next call.

        Empty at the proven end; raises as ``read`` does.
        """
        if self._buffer:
            data, self._buffer = self._buffer, b""
            return data
        if self._pipeline is not None and self._proof is None:
            # Into the same memory each time: a new megabyte is 256 page faults, which cost more than what they hold.
            self._space = self._space or bytearray(CHUNK)
            count = os.readv(self._source, [self._space])
            if count:
                return memoryview(self._space)[:count]
        return self._proven()

    def read(self, size: int = -1) -> bytes:
        """Up to ``size`` bytes, as many as there are; all of the rest when negative. Raises PitrError when damaged."""
        parts = [self._buffer]
        length = len(self._buffer)
        while size < 0 or length < size:
            data = self._proven()
            if not data:
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
        if self._pipeline:
            os.close(self._source)
            pipeline, self._pipeline = self._pipeline, None
            pipeline.kill()


def is_encrypted(source: Source) -> bool:
    """Whether a stored file is encrypted, by its first bytes."""
    # As in encryption.py, which is not imported for every file.
    return source.peek(32).startswith((b"pitr-age ", b"age-encryption.org/"))


def is_stored_encrypted(path: str, tree: Tree = LOCAL) -> bool:
    """The same, of a file by its path."""
    source = tree.open(path)
    try:
        return is_encrypted(source)
    finally:
        source.close()


def open_source(path: str, tree: Tree = LOCAL) -> Source:
    """The stored bytes of a file; those inside of it when it is encrypted. Raises as open_reader does."""
    source = tree.open(path)
    try:
        if is_encrypted(source):
            from .encryption import Decrypted

            return Decrypted(source, tree.identity)
        return source
    except BaseException:
        source.close()
        raise


@contextlib.contextmanager
def open_reader(path: str, tree: Tree = LOCAL) -> Iterator[Reader]:
    """Read the content of a stored file, whatever it is compressed with, and whether or not it is encrypted.

    Raises OSError when it cannot be opened, PitrError, naming it, when it is damaged or truncated, and LockedError (of
    encryption.py) when ``tree.identity`` does not open it.
    """
    source = open_source(path, tree)
    try:
        reader = Reader(source)
        try:
            yield reader
        finally:
            reader.close()
    finally:
        source.close()


def extract(path: str, target: int, target_name: str, tree: Tree = LOCAL) -> None:
    """Write the content of a stored file into an open, empty file, which errors call ``target_name``.

    Where the codec is a command, it writes the file itself. Raises what ``open_reader`` and its reads raise, and
    OSError when the target cannot be written.
    """
    source = open_source(path, tree)
    try:
        stages = decompressing(detect(source.peek(8)))
        if stages and not Pipeline(stages, source.descriptor, target).finish():
            source.check()
            proof = source.proof()
            if proof is not None:
                proof.read(target)
                proof.check()
            return
    finally:
        source.close()
    # Done here, or once more after a failure: only the one who both reads and writes can tell which of the files is
    # to blame, and a full disk must not be taken for a damaged archive.
    os.ftruncate(target, 0)
    os.lseek(target, 0, os.SEEK_SET)
    with open_reader(path, tree) as reader:
        while True:
            data = reader.read(CHUNK)
            if not data:
                return
            try:
                _write_all(target, data)
            except OSError as error:
                error.filename = target_name
                raise
