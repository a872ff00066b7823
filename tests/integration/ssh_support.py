# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A real sshd of the test's own, with keys that may add to or read from one cluster, and a link that can be spoilt."""

from __future__ import annotations

import contextlib
import os
import pwd
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils.install import COMMAND, install
from ansible_collections.pgdrill.pitr.tests.integration.support import until

USER = pwd.getpwuid(os.getuid()).pw_name


def program(name: str) -> str:
    """A program of the system that the tests were given."""
    path = os.environ.get(f"PGDRILL_TEST_{name.upper().replace('-', '_')}") or shutil.which(name)
    if not path:
        pytest.skip(f"{name} is not installed")
    return path


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Sshd:
    """sshd on a port of the loopback interface, as an ordinary user, for that user."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.port = free_port()
        self.log = directory / "sshd.log"
        self.authorized_keys = directory / "authorized_keys"
        self.authorized_keys.write_text("", encoding="ascii")
        self.known_hosts = directory / "known_hosts"
        self._process: subprocess.Popen[bytes] | None = None
        self._keygen = program("ssh-keygen")
        self._sshd = program("sshd")
        self.new_host_key()
        self.know(self.port)

    def key(self, name: str) -> Path:
        """A new key pair; returns the private key's path."""
        path = self.directory / name
        path.unlink(missing_ok=True)
        argv = [self._keygen, "-q", "-t", "ed25519", "-N", "", "-f", str(path)]
        subprocess.run(argv, stdin=subprocess.DEVNULL, check=True, capture_output=True)
        return path

    def new_host_key(self) -> None:
        self._host_key = self.key("host_key")

    def know(self, port: int) -> None:
        """Pin the present host key for this port."""
        kind, key = self._host_key.with_suffix(".pub").read_text(encoding="ascii").split()[:2]
        with open(self.known_hosts, "a", encoding="ascii") as stream:
            stream.write(f"[127.0.0.1]:{port} {kind} {key}\n")

    def allow(self, key: Path, command: str, options: str = "restrict") -> None:
        """Let a key run this command and nothing else."""
        line = f'{options},command="{command}"' if command else options
        with open(self.authorized_keys, "a", encoding="utf-8") as stream:
            stream.write(f"{line} {key.with_suffix('.pub').read_text(encoding='ascii')}")

    def start(self, *options: str) -> None:
        config = self.directory / "sshd_config"
        lines = [
            f"Port {self.port}",
            "ListenAddress 127.0.0.1",
            f"HostKey {self._host_key}",
            f"AuthorizedKeysFile {self.authorized_keys}",
            "UsePAM no",
            "StrictModes no",
            "PidFile none",
            "PermitUserEnvironment no",
            "MaxStartups 100",
            "Subsystem sftp internal-sftp",
            "AllowTcpForwarding yes",
            *options,
        ]
        # From OpenSSH 9.8 on, the part that serves a connection is a program beside it.
        for option, name in (("SshdSessionPath", "sshd-session"), ("SshdAuthPath", "sshd-auth")):
            unpacked = Path(self._sshd).parent.parent / "system" / "usr" / "lib" / "openssh" / name
            if unpacked.exists():
                lines.append(f"{option} {unpacked}")
        config.write_text("\n".join(lines) + "\n", encoding="utf-8")
        environment = {"PATH": os.environ.get("PATH", "/usr/bin:/bin")}
        wrapper = os.environ.get("PGDRILL_TEST_LIBNSS_WRAPPER")
        if wrapper:
            home = self.directory / "home"
            home.mkdir(exist_ok=True)
            passwd, group = self.directory / "passwd", self.directory / "group"
            passwd.write_text(f"{USER}:x:{os.getuid()}:{os.getgid()}::{home}:/bin/sh\n", encoding="utf-8")
            group.write_text(f"group:x:{os.getgid()}:\n", encoding="utf-8")
            environment.update(LD_PRELOAD=wrapper, NSS_WRAPPER_PASSWD=str(passwd), NSS_WRAPPER_GROUP=str(group))
        with open(self.log, "ab") as log:
            # A session of its own, so that everything it starts can be ended with it.
            self._process = subprocess.Popen(
                [self._sshd, "-D", "-e", "-f", str(config)], env=environment, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        until(lambda: listening(self.port) or self._process_ended(), "sshd listens")

    def _process_ended(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, f"sshd has ended:\n{self.log_text()}"
        return False

    def log_text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    @property
    def logins(self) -> int:
        """Connections that were authenticated."""
        return self.log_text().count("Accepted publickey")

    def children(self) -> list[int]:
        """Processes that serve connections."""
        assert self._process is not None
        return descendants(self._process.pid)

    def stop(self) -> None:
        """Everything of it, as when the host is switched off: connections break, too."""
        if self._process is not None:
            for pid in [self._process.pid, *self.children()]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, 9)
            self._process.wait()
            self._process = None


def listening(port: int) -> bool:
    """Whether somebody accepts connections there."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def descendants(pid: int) -> list[int]:
    """Ids of the living processes that descend from this one."""
    parents: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                text = Path("/proc", name, "stat").read_text(encoding="utf-8", errors="replace")
                parents.setdefault(int(text.rpartition(")")[2].split()[1]), []).append(int(name))
    found, queue = [], list(parents.get(pid, []))
    while queue:
        child = queue.pop()
        found.append(child)
        queue += parents.get(child, [])
    return found


class Link:
    """A proxy between client and sshd that can be slow (``rate``, bytes per second), stop, or break."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.rate = 0.0
        self.stalled = threading.Event()
        # Bytes from the client after which every connection is cut; 0 for never.
        self.cut_after = 0
        # Bytes from the client after which nothing goes on; 0 for never.
        self.stall_after = 0
        self.passed = 0
        self.received = 0
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _address = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                return
            self._pairs.append((client, server))
            for source, target, counts in ((client, server, True), (server, client, False)):
                threading.Thread(target=self._copy, args=(source, target, counts), daemon=True).start()

    def _copy(self, source: socket.socket, target: socket.socket, counts: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(16384):
                while self.stalled.is_set():
                    time.sleep(0.02)
                if self.rate:
                    time.sleep(len(data) / self.rate)
                target.sendall(data)
                if not counts:
                    self.received += len(data)
                else:
                    self.passed += len(data)
                    if self.cut_after and self.passed >= self.cut_after:
                        self.cut()
                    if self.stall_after and self.passed >= self.stall_after:
                        self.stalled.set()
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        """Break what is connected."""
        for pair in self._pairs:
            for end in pair:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.stalled.clear()
        self._listener.close()
        self.cut()


class Access:
    """How clients of one cluster reach a repository through sshd: two keys, and a ``pitr-wal`` for either side."""

    def __init__(self, sshd: Sshd, repository: Path, directory: Path, cluster: str = "main") -> None:
        self.sshd = sshd
        self.repository = repository
        self.cluster = cluster
        self.server_command = directory / "server" / COMMAND
        install(str(directory / "server"), cluster, {"repository": str(repository)})
        self.writer = sshd.key(f"writer-{cluster}")
        self.reader = sshd.key(f"reader-{cluster}")
        for key, access in ((self.writer, "--write"), (self.reader, "--read")):
            sshd.allow(key, self.forced(access))
        self.client = directory / "client"
        self.configure()

    def forced(self, access: str) -> str:
        """The command of an authorized key."""
        argv = [str(self.server_command), "serve", access, self.cluster, str(self.repository)]
        return " ".join(map(shlex.quote, argv)).replace('"', '\\"')

    def url(self, port: int = 0) -> str:
        return f"ssh://{USER}@127.0.0.1:{port or self.sshd.port}{self.repository}"

    def settings(self, **more: str) -> dict[str, str]:
        return {
            "repository": self.url(),
            "ssh_writer_identity": str(self.writer),
            "ssh_reader_identity": str(self.reader),
            "ssh_known_hosts": str(self.sshd.known_hosts),
            "ssh_timeout": "10",
            **more,
        }

    def configure(self, **more: str) -> None:
        """Install the client's command with these settings."""
        install(str(self.client), self.cluster, self.settings(**more))

    def ssh(self, key: Path | None = None, **more: str) -> dict[str, str]:
        """Settings for a tree or a module."""
        return {**self.settings(**more), "ssh_identity": str(key or self.reader)}

    def run(self, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """The client's pitr-wal, as the server calls it."""
        environment = {"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "TMPDIR": tempfile.gettempdir()}
        return subprocess.run(
            [str(self.client / COMMAND), *arguments], cwd=cwd, env=environment, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip

    def push(self, path: Path | str) -> subprocess.CompletedProcess[str]:
        return self.run("push", self.cluster, str(path))

    def get(self, name: str, target: Path) -> subprocess.CompletedProcess[str]:
        return self.run("get", self.cluster, name, str(target))

    def plain_ssh(self, key: Path, *words: str, options: tuple[str, ...] = (), text: str = "") -> Any:
        """What somebody with a stolen key would try."""
        argv = [program("ssh"), "-F", "/dev/null", "-o", "BatchMode=yes", "-o", "IdentitiesOnly=yes", "-i", str(key)]
        argv += ["-o", f"UserKnownHostsFile={self.sshd.known_hosts}", "-p", str(self.sshd.port), "-l", USER, *options]
        return subprocess.run(
            [*argv, "127.0.0.1", *words], input=text, capture_output=True, text=True, check=False, timeout=60
        )


def masters(place: Path | str) -> list[int]:
    """Processes of ssh that keep a connection whose socket lies in this directory."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                line = Path("/proc", name, "cmdline").read_bytes()
            except OSError:
                continue
            if line.startswith(b"ssh: ") and str(place).encode() in line:
                found.append(int(name))
    return found


@contextlib.contextmanager
def private_place(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sockets of connections that persist lie in a place of this test alone, and are gone in the end."""
    # As short as sockets want it.
    place = tempfile.mkdtemp(prefix="k")
    monkeypatch.setenv("TMPDIR", place)
    monkeypatch.setattr("tempfile.tempdir", place)
    try:
        yield
    finally:
        for pid in masters(place):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(place, ignore_errors=True)
