# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Encryption of what is stored to age recipients: those who write know public keys only.

A file of the archive begins with one line of ASCII that can be read without a key: digests of the content and of the
bytes that follow, the size of the content, and which recipients it is for. Then comes what ``age`` wrote, and inside of
that the compressed content. A file of a base backup is what ``age`` wrote and nothing else; its digests are in
backup.json. The command ``age`` does the cryptography; of secrets this module knows the path of an identity file.

On the path of ``pitr-wal``, and imported there only when something encrypted is met.
"""

from __future__ import annotations

import _socket
import _thread
import binascii
import contextlib
import hashlib
import os
from collections.abc import Sequence

from .codec import CHUNK, Pipeline, open_source, which
from .errors import PitrError
from .tree import Proof, Source, Tree

PREFIX = b"pitr-age "
# How age's own files begin (C2SP, age-encryption.org/v1).
AGE = b"age-encryption.org/"
VERSION = b"1"
LENGTH = len(PREFIX) + len(VERSION) + 1 + 64 + 1 + 64 + 1 + 12 + 1 + 16 + 1
SUFFIX = ".age"

_HEX = frozenset(b"0123456789abcdef")
_BECH32 = "qpzry9x8gf2tvdw0s3jn54khce6mua7l"
_RSA_MINIMUM = 2048


class LockedError(PitrError):
    """Something is encrypted and cannot be read here; the file itself is not to blame.

    ``code``: identity_missing, identity_unusable, identity_wrong or age_missing.
    """

    def __init__(self, code: str, message: str, **detail: object) -> None:
        super().__init__(message, **detail)
        self.code = code


class Header:
    """The first line of an encrypted file of the archive.

    ``content`` and ``stored`` are SHA-256 in hex, of the content before compression and of the bytes behind the line;
    ``size`` is the content's in bytes, ``recipients`` the id of those it was encrypted to.
    """

    __slots__ = ("content", "recipients", "size", "stored")

    def __init__(self, content: str, stored: str, size: int, recipients: str) -> None:
        self.content = content
        self.stored = stored
        self.size = size
        self.recipients = recipients

    def line(self) -> bytes:
        """As stored."""
        return b"%s%s %s %s %012d %s\n" % (
            PREFIX,
            VERSION,
            self.content.encode(),
            self.stored.encode(),
            self.size,
            self.recipients.encode(),
        )


def parse_header(head: bytes, name: str) -> Header:
    """Read the line. Raises PitrError, naming the file, for anything that :meth:`Header.line` would not have written.

    Strict, because a bit that has changed must not be taken for something else.
    """
    fields = head[:LENGTH].split(b" ")
    version = fields[1] if len(fields) > 1 else b""
    is_number = version.isdigit() and version[:1] != b"0" and len(version) < 6
    if head.startswith(PREFIX) and is_number and version != VERSION:
        raise PitrError(f"{name} was encrypted by a newer version of pgdrill.pitr. Update it here.", path=name)
    if len(fields) == 6 and [len(field) for field in fields[2:]] == [64, 64, 12, 17]:
        content, stored, size, recipients = fields[2:]
        header = Header(content.decode("latin-1"), stored.decode("latin-1"), 0, recipients[:-1].decode("latin-1"))
        if size.isdigit():
            header.size = int(size)
            if header.line() == head[:LENGTH] and _HEX.issuperset(content + stored + recipients[:-1]):
                return header
    raise PitrError(f"{name} is damaged: its first line is not that of an encrypted file.", path=name)


# --- recipients


def check_recipients(values: Sequence[str]) -> tuple[str, ...]:
    """Recipients as they are stored: sorted, each once, without comments. Raises PitrError.

    What is wrong is told by its position only: somebody may have put a secret where a public key belongs.
    """
    result = set()
    for position, value in enumerate(values, 1):
        text = value.strip()
        if "AGE-SECRET-KEY" in text.upper() or "PRIVATE KEY" in text.upper() or "AGE-PLUGIN-" in text.upper():
            raise PitrError(
                f"Recipient {position} is a private key. Nothing was changed. Hosts that write need public keys only:"
                " age-keygen -y prints the one that belongs to an identity. A key that has been in an inventory or a"
                " log is not secret any more; make a new one."
            )
        kind = text.split(" ", 1)[0]
        if text.startswith("age1") and _is_x25519(text):
            result.add(text)
        elif kind in ("ssh-ed25519", "ssh-rsa") and _is_ssh(text):
            result.add(" ".join(text.split()[:2]))
        else:
            raise PitrError(
                f"Recipient {position} is not one that age knows: age1… (whole, without a typing error), ssh-ed25519 …"
                f" or ssh-rsa … of at least {_RSA_MINIMUM} bits. Nothing was changed."
            )
    return tuple(sorted(result))


def _is_x25519(text: str) -> bool:
    """Bech32 (BIP 173) of 32 bytes with the prefix ``age``; its checksum finds every typing error."""
    data = text[4:]
    if len(data) != 58 or any(character not in _BECH32 for character in data):
        return False
    check = 1
    # The prefix "age", expanded: the high bits of each letter, zero, the low bits.
    for value in (3, 3, 3, 0, 1, 7, 5, *(_BECH32.index(character) for character in data)):
        top = check >> 25
        check = (check & 0x1FFFFFF) << 5 ^ value
        for bit, generator in enumerate((0x3B6A57B2, 0x26508E6D, 0x1EA119FA, 0x3D4233DD, 0x2A1462B3)):
            if top >> bit & 1:
                check ^= generator
    return check == 1


def _is_ssh(text: str) -> bool:
    """A line of a ``.pub`` file: type, base64 of length-prefixed fields (RFC 4253, section 6.6), comment."""
    words = text.split()
    if "\n" in text or len(words) < 2:
        return False
    try:
        blob = binascii.a2b_base64(words[1].encode("ascii"))
    except (ValueError, UnicodeEncodeError):
        return False
    fields = []
    while blob:
        length = int.from_bytes(blob[:4], "big")
        if len(blob) < 4 + length:
            return False
        fields.append(blob[4 : 4 + length])
        blob = blob[4 + length :]
    if not fields or fields[0] != words[0].encode():
        return False
    if words[0] == "ssh-ed25519":
        return len(fields) == 2 and len(fields[1]) == 32
    return len(fields) == 3 and int.from_bytes(fields[2], "big").bit_length() >= _RSA_MINIMUM


def recipients_id(recipients: Sequence[str]) -> str:
    """Short name of a set of recipients, empty for none.

    By hand: ``printf '%s\\n' … | LC_ALL=C sort | sha256sum | cut -c 1-16``.
    """
    if not recipients:
        return ""
    return hashlib.sha256("".join(f"{recipient}\n" for recipient in sorted(recipients)).encode()).hexdigest()[:16]


# --- the command


def _age() -> str:
    found = which("age")
    if found is None:
        raise LockedError("age_missing", "The command age is not installed on this host. Install the package age.")
    return found


def encrypt_argv(recipients: Sequence[str]) -> list[str]:
    """Encrypts its standard input. Public keys may be seen by everybody who sees processes. Raises PitrError."""
    argv = [_age(), "-e"]
    for recipient in recipients:
        argv += ["-r", recipient]
    return argv


def decrypt_argv(identity: str, name: str, header: Header | None = None) -> list[str]:
    """Decrypts its standard input. Raises LockedError, naming ``name``, the file that is to be read."""
    if not identity:
        whom = f" (recipients {header.recipients})" if header else ""
        raise LockedError(
            "identity_missing",
            f"{name} is encrypted{whom}, and no identity to decrypt it with was given here.",
            path=name,
            recipients=header.recipients if header else None,
        )
    check_identity(identity)
    return [_age(), "-d", "-i", identity]


def check_identity(path: str) -> None:
    """Whether this file of private keys can be used by a command that nobody watches. Raises LockedError."""
    try:
        with open(path, "rb") as stream:
            mode = os.fstat(stream.fileno()).st_mode
            head = stream.read(200)
    except OSError as error:
        raise LockedError("identity_unusable", f"The identity file {path} cannot be read: {error.strerror}.") from None
    why = ""
    if mode & 0o007:
        why = f"is open to every user of this host (mode {mode & 0o777:04o}). chmod o= it, and think of who has read it"
    elif head.startswith((AGE, b"-----BEGIN AGE ENCRYPTED FILE-----")) or _has_passphrase(head):
        why = "has a passphrase, and nobody is there to type it. Give one without, on a host that is as safe"
    if why:
        raise LockedError("identity_unusable", f"The identity file {path} {why}.")


def _has_passphrase(head: bytes) -> bool:
    """Of OpenSSH's private keys: PROTOCOL.key of OpenSSH begins with a magic text and the cipher's name, or none."""
    first, _line_feed, rest = head.partition(b"\n")
    if first.strip() == b"-----BEGIN OPENSSH PRIVATE KEY-----":
        return not rest.startswith(b"b3BlbnNzaC1rZXktdjEAAAAABG5vbmU")
    return first.startswith(b"-----BEGIN ") and b"ENCRYPTED" in head


class _Digest(Proof):
    """SHA-256 and number of bytes."""

    def __init__(self) -> None:
        self.sha256 = hashlib.sha256()
        self.size = 0

    def update(self, data: bytes) -> None:
        """The next piece."""
        self.sha256.update(data)
        self.size += len(data)


class _Content(_Digest):
    """Content against its digest and size in the first line."""

    def __init__(self, header: Header, name: str) -> None:
        super().__init__()
        self._header = header
        self._name = name

    def check(self) -> None:
        """Raises PitrError when it is another."""
        if (self.sha256.hexdigest(), self.size) != (self._header.content, self._header.size):
            raise PitrError(f"{self._name} is damaged: its content is not what was stored.", path=self._name)


# --- writing


class Seal:
    """What makes a file of the archive encrypted: the last process that writes it, and the first line."""

    def __init__(self, recipients: Sequence[str]) -> None:
        """Raises LockedError when age is not installed."""
        self._argv = encrypt_argv(recipients)
        self._recipients = recipients_id(recipients)
        self._content = _Digest()

    def begin(self, target: int) -> list[list[str]]:
        """Leave room for the line in an empty file; the process that is to write what follows."""
        # Until everything is known this is no line that anybody would read.
        os.write(target, b"\n".rjust(LENGTH))
        return [self._argv]

    def read(self, source: int) -> None:
        """Take the digest of the content, from an open file whose position does not move."""
        self._content = _Digest()
        self._content.read(source)

    def finish(self, target: int) -> None:
        """Fill the line in. The file must have been opened for reading, too. Raises PitrError when it is empty."""
        stored = _Digest()
        stored.read(target, LENGTH)
        if not stored.size:
            raise PitrError("age could not encrypt: it has written nothing.")
        content = self._content
        header = Header(content.sha256.hexdigest(), stored.sha256.hexdigest(), content.size, self._recipients)
        os.pwrite(target, header.line(), 0)


# --- reading


class Decrypted(Source):
    """What is inside of an encrypted file, as the source of whoever decompresses it."""

    def __init__(self, inner: Source, identity: str) -> None:
        """Owns ``inner`` from now on. Raises LockedError without a usable identity, PitrError for a damaged line."""
        head = inner.peek()
        self.header = parse_header(head, inner.name) if head.startswith(PREFIX) else None
        argv = decrypt_argv(identity, inner.name, self.header)
        self._inner = inner
        self._identity = identity
        self._stored = hashlib.sha256()
        self._trouble: OSError | None = None
        self._said = ""
        self._process: Pipeline | None = None
        self._stopped = False
        self._fed = _thread.allocate_lock()
        # Not a pipe: only from a socket can the first bytes be looked at and still be there for another process.
        self._socket, theirs = _socket.socketpair()
        super().__init__(self._socket.fileno(), inner.name)
        with contextlib.ExitStack() as ours:
            ours.callback(theirs.close)
            stdin = inner.descriptor
            feed = -1
            if self.header is not None:
                inner.skip(LENGTH)
                stdin, feed = os.pipe()
                ours.callback(os.close, stdin)
            try:
                self._process = Pipeline([argv], stdin, theirs.fileno())
            except BaseException:
                self._socket.close()
                if feed >= 0:
                    os.close(feed)
                raise
        if feed >= 0:
            self._fed.acquire()
            _thread.start_new_thread(self._feed, (os.dup(inner.descriptor), feed))

    def _feed(self, source: int, target: int) -> None:
        """Hand the stored bytes to age and take their digest; in a thread, for somebody else reads what age writes.

        Goes on when age has given up, because the digest tells whether the file or the identity is to blame.
        """
        try:
            while not self._stopped:
                data = os.read(source, CHUNK)
                if not data:
                    break
                self._stored.update(data)
                view = memoryview(data)
                while view and target >= 0:
                    try:
                        view = view[os.write(target, view) :]
                    except BrokenPipeError:
                        os.close(target)
                        target = -1
        except OSError as error:
            self._trouble = error
        finally:
            if target >= 0:
                os.close(target)
            os.close(source)
            self._fed.release()

    def peek(self, size: int = 512) -> bytes:
        """The first bytes, without moving on; possibly fewer. Empty when there are none, which check explains."""
        return self._socket.recv(size, _socket.MSG_PEEK)

    def skip(self, size: int) -> None:
        """There is no position in what comes from a process."""
        raise ValueError("an encrypted file is read from its beginning")

    def check(self) -> None:
        """After the end, or instead of blaming the file: raise LockedError or PitrError with the cause."""
        # Whoever read from it has ended; age must not wait for room. The descriptor stays valid until close.
        with contextlib.suppress(OSError):
            self._socket.shutdown(_socket.SHUT_RD)
        process, self._process = self._process, None
        if process is not None:
            said = process.finish()
            self._said = "" if process.cut_off else said
        if self.header is not None:
            # Never long: age has ended, so nothing holds the thread up but the rest of the file.
            self._fed.acquire()
            self._fed.release()
        if self._trouble is not None:
            raise self._trouble
        self._inner.check()
        if self.header is not None and self._stored.hexdigest() != self.header.stored:
            raise PitrError(f"{self.name} is damaged: its bytes are not those that were stored.", path=self.name)
        said = self._said.replace("age: error: ", "")
        if not said:
            return
        if said.startswith('reading "') or "failed to obtain" in said:
            # Not in age's words, which may have parts of the file in them.
            raise LockedError("identity_unusable", f"The identity file {self._identity} is not one that age can use.")
        if "no identity matched" in said:
            whom = f" (recipients {self.header.recipients})" if self.header else ""
            raise LockedError(
                "identity_wrong",
                f"{self.name} was not encrypted{whom} to the identity {self._identity}. It needs another identity,"
                " or an identity file that holds both.",
                path=self.name,
                recipients=self.header.recipients if self.header else None,
            )
        raise PitrError(f"{self.name} is damaged: age says: {said}.", path=self.name)

    def proof(self) -> Proof | None:
        """Digest and size of the content, which the first line tells; a file of a backup has none."""
        return None if self.header is None else _Content(self.header, self.name)

    def close(self) -> None:
        """Let go, also in the middle."""
        self._stopped = True
        self._socket.close()
        if self._process is not None:
            self._process.kill()
        self._inner.close()


def read_header(tree: Tree, path: str) -> Header | None:
    """The first line of a file of the archive, None when it is not encrypted."""
    source = tree.open(path)
    try:
        head = source.peek()
    finally:
        source.close()
    return parse_header(head, path) if head.startswith(PREFIX) else None


def by_recipients(tree: Tree, paths: Sequence[str]) -> dict[str, str]:
    """One encrypted file for each set of recipients, by its id, among these files of the archive in their order.

    Looks at the first line of each; where that takes long, at the first and the last, and between two that differ. Then
    recipients that were in force for a while between two times of the same others are not found.
    """
    found: dict[str, str] = {}

    def look(at: int) -> str:
        header = read_header(tree, paths[at])
        if header is None:
            return ""
        found.setdefault(header.recipients, paths[at])
        return header.recipients

    if not tree.is_far:
        for at in range(len(paths)):
            look(at)
        return found
    # Pairs of positions with what was found there.
    last = len(paths) - 1
    pairs = [(0, look(0), last, look(last))] if paths else []
    while pairs:
        left, first, right, second = pairs.pop()
        if first != second and right - left > 1:
            middle = (left + right) // 2
            between = look(middle)
            pairs += [(left, first, middle, between), (middle, between, right, second)]
    return found


def check_stored(source: Source) -> Header:
    """Compare an encrypted file of the archive with its first line, for which no key is needed.

    Raises PitrError when its bytes are not those that were stored.
    """
    header = parse_header(source.peek(), source.name)
    source.skip(LENGTH)
    digest = hashlib.sha256()
    while True:
        data = os.read(source.descriptor, CHUNK)
        if not data:
            break
        digest.update(data)
    # The transfer, not the file.
    source.check()
    if digest.hexdigest() != header.stored:
        raise PitrError(f"{source.name} is damaged: its bytes are not those that were stored.", path=source.name)
    return header


def verify_stored(tree: Tree, path: str) -> Header:
    """The same by its path."""
    source = tree.open(path)
    try:
        return check_stored(source)
    finally:
        source.close()


def content_digest(descriptor: int) -> tuple[str, int]:
    """SHA-256 and size of an open file, whose position does not move."""
    digest = _Digest()
    digest.read(descriptor)
    return digest.sha256.hexdigest(), digest.size


def try_identity(tree: Tree, path: str) -> None:
    """Find out whether ``tree.identity`` opens this file, by the first bytes that come out of it.

    Raises LockedError when it does not, PitrError when the file is damaged.
    """
    source = open_source(path, tree)
    try:
        if isinstance(source, Decrypted) and not source.peek(1):
            source.check()
    finally:
        source.close()
