# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A repository on another host: ``ssh://[user@]host[:port]/absolute/path``, through ``pitr-wal serve`` over there.

ssh's own multiplexing keeps one connection for a while after the last use (ControlPersist), so that the calls of
PostgreSQL, one for each segment, do not each log in. A link that is dead ends in an error within the time of
``ssh_timeout``: an error, never "the file is not there".

On the path of ``pitr-wal``.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import os
import signal
import stat
import time
import zlib
from collections.abc import Iterator, Mapping

from .codec import which
from .errors import PitrError
from .tree import Entry, Source, Tree
from .wire import (
    ANSWER,
    CHUNK,
    DATA,
    END,
    FAILURE,
    HELLO,
    PROTOCOL,
    REQUEST,
    WORD,
    Lost,
    Silent,
    Wire,
    document,
    older_than,
    write_all,
)

SCHEME = "ssh://"
# Seconds: until the other side is given up, by default; how long a connection waits for the next call; how long the
# repository's disk may take for one request.
TIMEOUT = 30
PERSIST = 120
SILENCE = 900.0
# Bytes. A smaller file is fetched as a whole before anybody looks at it.
WHOLE = 32 * 1024 * 1024
# Bytes of a frame from the server: a directory's names are one.
LIMIT = 64 * 1024 * 1024
# What sockaddr_un holds, less what ssh adds to the name while it makes the socket.
_SOCKET_PATH = 104 - 18
# fcntl.F_SETPIPE_SZ, which Python has since 3.10 only.
_F_SETPIPE_SZ = 1031


class Address:
    """Where a repository is: what stands behind ``ssh://``."""

    __slots__ = ("host", "path", "port", "user")

    def __init__(self, repository: str) -> None:
        """Read the address. Raises PitrError when it cannot be one."""
        authority, slash, path = repository[len(SCHEME) :].partition("/")
        self.user, _at, place = authority.rpartition("@")
        if place.startswith("["):
            self.host, _bracket, port = place[1:].partition("]")
            port = port.removeprefix(":")
        else:
            self.host, _colon, port = place.partition(":")
        self.port = int(port) if port.isascii() and port.isdecimal() else 0
        self.path = slash + path.rstrip("/")
        # A name that begins with a dash would be an option of ssh.
        good = self.host and not self.host.startswith("-") and not self.user.startswith("-")
        if not good or (port and not 0 < self.port < 65536) or len(self.path) < 2:
            raise PitrError(f"'{repository}' is no repository. Over ssh it is ssh://user@host:port/absolute/path.")


def private_directory() -> str:
    """A directory of this user alone, for sockets and what is being sent. Empty when others have taken its name."""
    path = os.path.join(os.environ.get("TMPDIR") or "/tmp", f"pitr-{os.geteuid()}")
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)
    status = os.lstat(path)
    ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o077
    return path if ours else ""


def control_path(directory: str, argv: list[str]) -> str:
    """Name of the socket that calls with these same arguments share. Empty when there can be none."""
    text = "\0".join(argv).encode("utf-8", "surrogateescape")
    path = os.path.join(directory, f"{zlib.crc32(text):08x}{zlib.adler32(text):08x}")
    return path if directory and len(os.fsencode(path)) < _SOCKET_PATH else ""


def ssh_arguments(address: Address, settings: Mapping[str, str]) -> list[str]:
    """Arguments of ssh but for those of multiplexing. Raises PitrError for a setting that cannot be."""
    timeout = _timeout(settings)
    options = {
        "BatchMode": "yes",
        "PreferredAuthentications": "publickey",
        "StrictHostKeyChecking": "yes",
        "UpdateHostKeys": "no",
        "ConnectTimeout": str(timeout),
        "ServerAliveInterval": str(max(1, timeout // 3)),
        "ServerAliveCountMax": "2",
        "ClearAllForwardings": "yes",
        "ForwardAgent": "no",
        "ForwardX11": "no",
        "PermitLocalCommand": "no",
        "RequestTTY": "no",
        "LogLevel": "ERROR",
    }
    if settings.get("ssh_known_hosts"):
        options["UserKnownHostsFile"] = _quoted(settings["ssh_known_hosts"])
        options["GlobalKnownHostsFile"] = "/dev/null"
    if settings.get("ssh_identity"):
        options["IdentityFile"] = _quoted(settings["ssh_identity"])
        options["IdentitiesOnly"] = "yes"
        options["IdentityAgent"] = "none"
    # -F: no configuration of the user or the host can weaken this.
    argv = ["-F", "/dev/null", "-a", "-x", "-T"]
    for name, value in options.items():
        argv += ["-o", f"{name}={value}"]
    if address.user:
        argv += ["-l", address.user]
    if address.port:
        argv += ["-p", str(address.port)]
    return [*argv, "--", address.host, WORD]


def _timeout(settings: Mapping[str, str]) -> int:
    text = str(settings.get("ssh_timeout") or TIMEOUT)
    if not (text.isascii() and text.isdecimal() and 0 < int(text) <= 3600):
        raise PitrError(f"ssh_timeout is '{text}'; it is a number of seconds from 1 to 3600.")
    return int(text)


def _quoted(path: str) -> str:
    """A path in an option of ssh, which splits at spaces and replaces what begins with a percent sign."""
    if path and (not os.path.isabs(path) or {'"', "$", "\\", "\n"} & set(path)):
        raise PitrError(f"'{path}' cannot be given to ssh: use an absolute path without quotes and dollar signs.")
    return '"' + path.replace("%", "%%") + '"'


def _anonymous() -> int:
    """Descriptor of a file without a name, in memory where this Python can."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("pitr-wal")
    return os.open(os.environ.get("TMPDIR") or "/tmp", os.O_TMPFILE | os.O_RDWR, 0o600)


class Session:
    """One ``pitr-wal serve`` that answers us, through a process of ssh."""

    def __init__(self, argv: list[str], timeout: float) -> None:
        """Start ssh. What it complains about goes to a file: a pipe would stay open in the connection that persists,
        and PostgreSQL's own log must not."""
        self._errors = _anonymous()
        source, self._target = os.pipe()
        self.source, target = os.pipe()
        # ssh may stay behind for the next call; it shall not keep our working directory (the data directory) busy.
        command = ["/bin/sh", "-c", 'cd / && exec "$@"', "sh", *argv]
        streams = enumerate((source, target, self._errors))
        actions = [(os.POSIX_SPAWN_DUP2, ours, number) for number, ours in streams]
        try:
            self._pid = os.posix_spawn(
                command[0], command, os.environ, file_actions=actions, setsigdef=[signal.SIGPIPE]
            )
        finally:
            os.close(source)
            os.close(target)
        # A stalled link must not hold us in write(2).
        os.set_blocking(self._target, False)
        self.wire = Wire(self.source, self._target, timeout, LIMIT)
        self.used = False

    def greet(self, path: str) -> None:
        """Exchange greetings. Raises Lost, and PitrError when the repository host refuses."""
        self.wire.say(HELLO, {"protocol": PROTOCOL, "repository": path})
        kind, payload = self.wire.receive()
        if kind != HELLO or not isinstance(document(payload).get("protocol"), int):
            raise Lost("something else than pitr-wal answers there")
        kind, payload = self.wire.receive()
        if kind == FAILURE:
            raise _error(document(payload), path)
        self.wire.patience = SILENCE

    def said(self) -> str:
        """What ssh, or the other side's shell, has complained about, in one line."""
        lines = os.pread(self._errors, 8192, 0).decode(errors="replace").splitlines()
        return " ".join(line.strip().strip("@").strip() for line in lines if line.strip(" @")).strip()

    def close(self, wait: bool = True) -> None:
        """Let ssh and the other side end; they notice that nobody talks to them any more."""
        if self._pid:
            self.forget()
            pid, self._pid = self._pid, 0
            deadline = time.monotonic() + 1
            while wait and os.waitpid(pid, os.WNOHANG)[0] == 0:
                if time.monotonic() > deadline:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                    break
                time.sleep(0.001)

    def kill(self) -> None:
        """Let whoever waits for the other side see its end at once."""
        if self._pid:
            # Not reaped yet, so it is still ours.
            os.kill(self._pid, signal.SIGKILL)

    def abort(self) -> None:
        """End it now, also in the middle of a transfer."""
        if self._pid:
            self.kill()
            os.waitpid(self._pid, 0)
            self._pid = 0
            self.forget()

    def forget(self) -> None:
        """Close our descriptors: all that a forked child may do with its parent's session."""
        for descriptor in (self._target, self.source, self._errors):
            os.close(descriptor)


def _error(failure: Mapping[str, object], path: str) -> Exception:
    """What the other side has answered, as the exception that a local file would have raised."""
    kind = failure.get("kind")
    if kind == "absent":
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    if kind == "exists":
        return FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
    number = failure.get("errno")
    # These two would be read as answers, and only the kinds above are.
    if kind == "error" and isinstance(number, int) and number not in (errno.ENOENT, errno.EEXIST):
        return OSError(number, os.strerror(number), path)
    return PitrError(f"The repository host refuses: {failure.get('message') or 'without a reason'}", path=path)


class _Stream(Source):
    """A large file on its way: a thread takes it out of its frames and puts it into a pipe, so memory stays flat."""

    def __init__(self, tree: SshTree, session: Session, path: str, size: int) -> None:
        # Most processes that come here, those of pitr-wal, never need it.
        import fcntl
        import threading

        source, self._pipe = os.pipe()
        super().__init__(source, path)
        for descriptor in (source, session.source):
            # Fewer turns between processes; without it everything works as well.
            with contextlib.suppress(OSError):
                fcntl.fcntl(descriptor, _F_SETPIPE_SZ, 1024 * 1024)
        self._tree = tree
        self._session = session
        self._size = size
        self._problem: Exception | None = None
        self._is_done = False
        self._lock = threading.Lock()
        try:
            # Larger than WHOLE, so there is a first frame; it is peeked into.
            self._head = bytes(self._frame() or b"")
        except BaseException:
            os.close(source)
            os.close(self._pipe)
            raise
        self._thread = threading.Thread(target=self._pump, daemon=True)
        self._thread.start()

    def _frame(self) -> bytearray | None:
        """The next bytes, None at the proven end. Raises what went wrong."""
        try:
            return _content(self._session.wire.receive(), self._size, self.name)
        except Lost as lost:
            raise self._tree.broken(self._session, lost, self.name) from None

    def _pump(self) -> None:
        received = 0
        data: bytes | bytearray | None = self._head
        problem: Exception | None = None
        try:
            while data is not None:
                received += len(data)
                write_all(self._pipe, data)
                data = self._frame()
            if received != self._size:
                problem = PitrError(f"{self.name} was transferred with {received} bytes instead of {self._size}.")
        except BrokenPipeError:
            # Nobody reads any more. close() ends the session.
            os.close(self._pipe)
            return
        except (PitrError, OSError) as error:
            problem = error
        with self._lock:
            self._problem = problem
            self._is_done = True
            if problem is None:
                self._tree.release(self._session)
            else:
                self._session.abort()
        # Last: whoever sees the end of the pipe asks check() next.
        os.close(self._pipe)

    def peek(self, size: int = 512) -> bytes:
        """The first bytes, without moving on."""
        return self._head[:size]

    def skip(self, size: int) -> None:
        """Go to this position. Only before anything was read."""
        while size:
            data = os.read(self.descriptor, size)
            if not data:
                self.check()
                return
            size -= len(data)

    def check(self) -> None:
        """Raise when the transfer has failed."""
        with self._lock:
            if self._problem is not None:
                raise self._problem

    def close(self) -> None:
        """Let go, also in the middle."""
        os.close(self.descriptor)
        with self._lock:
            if not self._is_done:
                self._session.kill()
        self._thread.join()
        if not self._is_done:
            self._session.abort()


def _content(frame: tuple[bytes, bytearray], size: int, path: str) -> bytearray | None:
    """Bytes of a frame of content, None for its end. Raises what the other side has said instead, or Lost."""
    kind, payload = frame
    if kind == DATA:
        return payload
    if kind == FAILURE:
        raise _error(document(payload), path)
    if kind != END or document(payload).get("size") != size:
        raise Lost("the file has changed while it was sent")
    return None


class SshTree(Tree):
    """A repository on another host."""

    is_far = True

    def __init__(self, repository: str, settings: Mapping[str, str] | None = None) -> None:
        """Connects to nothing yet.

        ``settings``: ``ssh_identity``, ``ssh_known_hosts`` (paths), ``ssh_timeout``, and ``identity`` as for Tree.
        """
        super().__init__((settings or {}).get("identity", ""))
        self._repository = repository
        self._address = Address(repository)
        self._timeout = float(_timeout(settings or {}))
        self._arguments = ssh_arguments(self._address, settings or {})
        self._idle: list[Session] = []
        self._owner = os.getpid()

    # --- sessions

    def _session(self) -> Session:
        """One that is waiting, or a new one."""
        if self._owner != os.getpid():
            for session in self._idle:
                session.forget()
            self._idle = []
            self._owner = os.getpid()
        with contextlib.suppress(IndexError):
            return self._idle.pop()
        return self._connect()

    def release(self, session: Session) -> None:
        """Keep a session for the next request."""
        session.used = True
        self._idle.append(session)

    def close(self, wait: bool = True) -> None:
        """End all sessions that wait."""
        if self._owner == os.getpid():
            while self._idle:
                self._idle.pop().close(wait)

    def _connect(self) -> Session:
        """A session that has been greeted. Raises PitrError."""
        ssh = which("ssh")
        if ssh is None:
            raise PitrError("The command ssh is not installed on this host. Install the package openssh-client.")
        control = control_path(private_directory(), self._arguments)
        argv = [ssh, *self._arguments]
        shared = [
            "-o",
            "ControlMaster=auto",
            "-o",
            f"ControlPersist={PERSIST}",
            "-o",
            f"ControlPath={_quoted(control)}",
        ]
        was_there = bool(control) and os.path.exists(control)
        try:
            return self._greeted([ssh, *shared, *self._arguments] if control else argv)
        except Lost as lost:
            if not was_there:
                raise PitrError(str(lost)) from None
            if isinstance(lost, Silent):
                # The process behind the socket has stopped, or waits for a host that is gone. The next call shall
                # not wait for it.
                with contextlib.suppress(OSError):
                    os.unlink(control)
        # The connection that persisted may have died with the network since; the repository has not.
        try:
            return self._greeted(argv)
        except Lost as lost:
            raise PitrError(str(lost)) from None

    def _greeted(self, argv: list[str]) -> Session:
        session = Session(argv, self._timeout)
        try:
            session.greet(self._address.path)
        except Lost as lost:
            text = self._explained(session, lost)
            session.abort()
            raise type(lost)(text) from None
        except BaseException:
            session.abort()
            raise
        return session

    def _explained(self, session: Session, lost: Lost) -> str:
        """Why there is no session."""
        # What it says comes before what closes the connection.
        said = session.said()
        if "host key" in said.lower() or "HOST IDENTIFICATION" in said:
            return (
                f"The host key of {self._address.host} is not the one in the known hosts file: {said} Either the host"
                f" was installed anew, or it is another host. Nothing was sent or read."
            )
        if "Permission denied" in said:
            return f"{self._repository}: {self._address.host} does not accept our key: {said} Nothing was done."
        reason = f"{said} ({lost})" if said else str(lost)
        return f"The repository {self._repository} cannot be reached: {reason}. Nothing was done."

    def broken(self, session: Session, lost: Lost, path: str) -> PitrError:
        """The error for a conversation that has broken off."""
        said = session.said()
        reason = f"{said} ({lost})" if said else str(lost)
        return PitrError(
            f"The connection to the repository host broke off at {path}: {reason}. Nothing was replaced.", path=path
        )

    # --- conversation

    def _place(self, path: str) -> str:
        return path[len(self._repository) :].lstrip("/")

    def _ask(self, path: str, request: dict[str, object]) -> tuple[Session, dict[str, object]]:
        """Make a request; returns its answer and the session, which the caller releases or aborts."""
        while True:
            session = self._session()
            try:
                session.wire.say(REQUEST, {**request, "place": self._place(path)})
                answer = self._answer(session, path)
            except Lost as lost:
                error = self.broken(session, lost, path)
                session.abort()
                if not session.used:
                    raise error from None
                # It had been waiting, and the other side has lost its patience since. All requests can be repeated.
                continue
            return session, answer

    def _answer(self, session: Session, path: str) -> dict[str, object]:
        """The next answer. Raises Lost, or what the other side has said; then the session is released."""
        kind, payload = session.wire.receive()
        value = document(payload)
        if kind == FAILURE:
            self.release(session)
            raise _error(value, path)
        if kind != ANSWER:
            raise Lost("something else than pitr-wal answers there")
        return value

    def _simple(self, path: str, operation: str) -> dict[str, object]:
        session, answer = self._ask(path, {"do": operation})
        self.release(session)
        return answer

    # --- the operations of Tree

    def open(self, path: str) -> Source:
        """The stored bytes of a file. A small one has come as a whole when this returns."""
        session, answer = self._ask(path, {"do": "open"})
        size = answer.get("size")
        if not isinstance(size, int):
            session.abort()
            raise PitrError(f"{path}: the repository host's answer makes no sense. Update pgdrill.pitr there or here.")
        if size > WHOLE:
            try:
                return _Stream(self, session, path, size)
            except BaseException:
                session.abort()
                raise
        target = _anonymous()
        try:
            self._fetch(session, path, size, target)
            os.lseek(target, 0, os.SEEK_SET)
        except BaseException:
            os.close(target)
            raise
        return Source(target, path)

    def _fetch(self, session: Session, path: str, size: int, target: int) -> None:
        try:
            while (data := _content(session.wire.receive(), size, path)) is not None:
                write_all(target, data)
        except Lost as lost:
            error = self.broken(session, lost, path)
            session.abort()
            raise error from None
        except BaseException:
            session.abort()
            raise
        self.release(session)

    def read(self, path: str) -> bytes:
        """All stored bytes of a small file."""
        source = self.open(path)
        try:
            parts = []
            while data := os.read(source.descriptor, CHUNK):
                parts.append(data)
            source.check()
            return b"".join(parts)
        finally:
            source.close()

    def stat(self, path: str) -> Entry:
        """Size and time."""
        answer = self._simple(path, "stat")
        size, mtime = answer.get("size"), answer.get("mtime")
        if not isinstance(size, int) or not isinstance(mtime, (int, float)):
            raise PitrError(f"{path}: the repository host's answer makes no sense. Update pgdrill.pitr there or here.")
        return Entry(size, mtime)

    def names(self, path: str) -> list[str]:
        """Names in a directory, sorted."""
        names = self._simple(path, "names").get("names")
        if not isinstance(names, list):
            raise PitrError(f"{path}: the repository host's answer makes no sense. Update pgdrill.pitr there or here.")
        return [str(name) for name in names]

    @contextlib.contextmanager
    def adding(self, path: str) -> Iterator[str]:
        """Where to write what shall be stored as ``path``; it is sent when the block is left."""
        directory, is_shared = private_directory(), True
        if not directory:
            is_shared = False
            directory = os.path.join(os.environ.get("TMPDIR") or "/tmp", f"pitr-{os.urandom(8).hex()}")
            os.mkdir(directory, 0o700)
        else:
            _sweep(directory)
        temporary = os.path.join(directory, f"{os.path.basename(path)}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
        try:
            yield temporary
            self._send(temporary, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            if not is_shared:
                os.rmdir(directory)

    def _send(self, temporary: str, path: str) -> None:
        try:
            descriptor = os.open(temporary, os.O_RDONLY)
        except FileNotFoundError:
            # Not to be mistaken for an answer about the repository.
            raise PitrError(f"{temporary} is gone before it was sent. Nothing was stored.") from None
        try:
            session, _answer = self._ask(path, {"do": "add", "size": os.fstat(descriptor).st_size})
            try:
                session.wire.send_file(descriptor)
                self._answer(session, path)
            except Lost as lost:
                error = self.broken(session, lost, path)
                session.abort()
                raise error from None
            self.release(session)
        finally:
            os.close(descriptor)

    def touch_lease(self, path: str) -> None:
        """Give a lease the present time of the repository host."""
        self._simple(path, "lease")

    def settle(self, path: str) -> None:
        """Make sure that a stored file that is there survives a power failure."""
        self._simple(path, "settle")


def _sweep(directory: str) -> None:
    """Remove what a killed call has left in the private directory."""
    for name in os.listdir(directory):
        path = os.path.join(directory, name)
        with contextlib.suppress(OSError):
            if name.endswith(".tmp") and older_than(path, 3600):
                os.unlink(path)


_SETTINGS = ("ssh_identity", "ssh_known_hosts", "ssh_timeout", "identity")
_TREES: dict[tuple[str, ...], SshTree] = {}


def ssh_tree(repository: str, settings: Mapping[str, str] | None = None) -> SshTree:
    """The way to this repository with these settings; the same one for the same, so that sessions are shared."""
    chosen = [str((settings or {}).get(name) or "") for name in _SETTINGS]
    key = (repository, *chosen)
    if key not in _TREES:
        _TREES[key] = SshTree(repository, settings)
    return _TREES[key]


def forget_sessions() -> None:
    """In a forked process that has closed all descriptors: begin anew."""
    _TREES.clear()


@atexit.register
def _close_all() -> None:
    """Without waiting: the process is ending, and ssh notices that by itself."""
    for tree in _TREES.values():
        tree.close(wait=False)
