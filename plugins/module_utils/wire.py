# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Frames between a host that reaches a repository over ssh and ``pitr-wal serve`` on the repository host.

A frame is one letter, the length of what follows (four bytes, big endian), and that many bytes. docs/ssh.md has the
conversation. On the path of ``pitr-wal``.
"""

from __future__ import annotations

import json
import os
import select
import time

PROTOCOL = 1
# What the client asks sshd to run. A forced command runs instead, and sees this word.
WORD = "pitr-wal"

HELLO = b"H"
REQUEST = b"Q"
ANSWER = b"A"
DATA = b"D"
END = b"E"
FAILURE = b"F"

# Bytes of content in one frame.
CHUNK = 256 * 1024
_HEAD = 5


class Lost(Exception):
    """The other side is gone, or silent, or says what nobody understands. The text tells which."""


class Silent(Lost):
    """The other side has not said or taken anything for too long."""


class Wire:
    """One end of the conversation."""

    def __init__(self, source: int, target: int, patience: float, limit: int) -> None:
        """``patience``: seconds without a byte after which the other side is given up. ``limit``: of a frame, bytes."""
        self.patience = patience
        self._source = source
        self._target = target
        self._limit = limit
        self._incoming, self._outgoing = select.poll(), select.poll()
        self._incoming.register(source, select.POLLIN)
        self._outgoing.register(target, select.POLLOUT)

    def _wait(self, poll: select.poll) -> None:
        if not poll.poll(self.patience * 1000):
            raise Silent(f"no answer for {self.patience:g} seconds")

    def _take(self, size: int) -> bytearray:
        """So many bytes and none of what follows them: a megabyte a millisecond goes through here, uncopied."""
        data = bytearray(size)
        view = memoryview(data)
        while view:
            self._wait(self._incoming)
            count = os.readv(self._source, [view])
            if not count:
                raise Lost("the connection was closed")
            view = view[count:]
        return data

    def receive(self) -> tuple[bytes, bytearray]:
        """The next frame: kind and payload. Raises Lost."""
        head = self._take(_HEAD)
        size = int.from_bytes(head[1:], "big")
        if size > self._limit:
            raise Lost("something else than pitr-wal answers there")
        return bytes(head[:1]), self._take(size)

    def send(self, kind: bytes, payload: bytes = b"") -> None:
        """Send a frame. Raises Lost."""
        parts = [memoryview(kind + len(payload).to_bytes(4, "big")), memoryview(payload)]
        while parts:
            try:
                count = os.writev(self._target, parts)
            except BlockingIOError:
                self._wait(self._outgoing)
                continue
            except BrokenPipeError:
                raise Lost("the connection was closed") from None
            while parts and count >= len(parts[0]):
                count -= len(parts.pop(0))
            if parts:
                parts[0] = parts[0][count:]

    def say(self, kind: bytes, value: dict[str, object]) -> None:
        """Send a frame with a document."""
        self.send(kind, json.dumps(value).encode())

    def send_file(self, descriptor: int) -> None:
        """Send a file from where it stands to its end. Raises Lost, and OSError when it cannot be read."""
        size = 0
        while True:
            data = os.read(descriptor, CHUNK)
            if not data:
                break
            self.send(DATA, data)
            size += len(data)
        self.say(END, {"size": size})


def document(payload: bytes | bytearray) -> dict[str, object]:
    """What a frame with a document says. Raises Lost when it is none."""
    try:
        value = json.loads(payload)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise Lost("something else than pitr-wal answers there")
    return value


def write_all(descriptor: int, data: bytes | bytearray) -> None:
    """Write everything."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def older_than(path: str, seconds: float) -> bool:
    """Whether a file was last changed so long ago."""
    return time.time() - os.lstat(path).st_mtime > seconds
