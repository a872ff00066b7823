# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Encryption with the real age: what is written without a key, read with one, and refused with the right reason."""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
from pathlib import Path

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils import archive, cli, codec, crypt
from ansible_collections.pgdrill.pitr.plugins.module_utils.archive import get, push
from ansible_collections.pgdrill.pitr.plugins.module_utils.crypt import (
    LENGTH,
    Header,
    LockedError,
    check_recipients,
    parse_header,
    recipients_id,
    try_identity,
    verify_stored,
)
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.plugins.module_utils.repository import ClusterFolder
from ansible_collections.pgdrill.pitr.plugins.module_utils.tree import Tree
from ansible_collections.pgdrill.pitr.tests.unit.support import (
    CLUSTER,
    MIB,
    history,
    make_repository,
    put,
    segment,
    tree,
    wal_name,
)

EXAMPLE = "age1ql3z7hjy54pw3hyww5ayyfg7zqgvc7w3j2elw8zmrj2kg5sfn9aqmcac8p"
BACKUP_TEXT = "START WAL LOCATION: 0/2000028 (file 000000010000000000000002)\nLABEL: secret\n"


class Key:
    """An identity file and its public key."""

    def __init__(self, path: Path, kind: str = "age") -> None:
        self.path = str(path)
        if kind == "age":
            subprocess.run(["age-keygen", "-o", self.path], check=True, capture_output=True)
            derived = subprocess.run(["age-keygen", "-y", self.path], check=True, capture_output=True, text=True)
            self.public = derived.stdout.strip()
        else:
            argv = ["ssh-keygen", "-q", "-t", kind, "-N", "", "-f", self.path]
            subprocess.run(argv + (["-b", "2048"] if kind == "rsa" else []), check=True)
            self.public = Path(f"{self.path}.pub").read_text(encoding="ascii").strip()


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Key:
    return Key(tmp_path_factory.mktemp("key") / "mine key")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Key:
    return Key(tmp_path_factory.mktemp("key") / "other")


class Site:
    """A repository of an encrypted cluster, and a pg_wal to push from."""

    def __init__(self, directory: Path, *recipients: str) -> None:
        self.repository = directory / "repository"
        self.pg_wal = directory / "pg_wal"
        self.folder = make_repository(self.repository)
        self.target = str(directory / "fetched")
        self.encrypt_to(*recipients)

    def encrypt_to(self, *recipients: str) -> None:
        self.folder.change_recipients(check_recipients(recipients))
        self.folder.save()

    def push(self, name: str, content: bytes | str, compression: str = "zstd") -> Path:
        path = put(self.pg_wal, name, content)
        push(path, str(self.repository), CLUSTER, compression)
        return self.stored(name)

    def stored(self, name: str) -> Path:
        folder = self.repository / CLUSTER / "archive" / "18-1"
        return folder / name if name.endswith(".history") else folder / name[:16] / name

    def get(self, name: str, identity: str = "") -> bytes:
        if os.path.exists(self.target):
            os.unlink(self.target)
        get(name, self.target, str(self.repository), CLUSTER, None, {"identity": identity})
        return Path(self.target).read_bytes()

    def refused(self, name: str, identity: str = "") -> PitrError:
        """The error of a get; nothing was delivered, and nothing is left."""
        with pytest.raises(PitrError) as caught:
            self.get(name, identity)
        assert not list(Path(self.target).parent.glob("fetched*"))
        return caught.value


@pytest.fixture
def site(tmp_path: Path, key: Key) -> Site:
    return Site(tmp_path, key.public)


NAME = wal_name(1, 3)
CONTENT = segment(1, 3)


def age_processes() -> list[str]:
    """Children of this process that are age, dead ones too."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text(encoding="ascii", errors="replace")
            except OSError:
                continue
            if "(age)" in stat and int(stat.rpartition(")")[2].split()[1]) == os.getpid():
                found.append(stat)
    return found


# --- the first line


def test_first_line_is_what_the_format_says() -> None:
    header = Header("a" * 64, "b" * 64, 1048576, "0123456789abcdef")
    line = header.line()
    assert line == b"pitr-age 1 " + b"a" * 64 + b" " + b"b" * 64 + b" 000001048576 0123456789abcdef\n"
    assert len(line) == LENGTH == 171
    read = parse_header(line + b"age-encryption.org/v1\n", "f")
    assert (read.content, read.stored, read.size, read.recipients) == ("a" * 64, "b" * 64, 1048576, "0123456789abcdef")


def test_changed_bit_in_the_first_line_is_never_read_as_the_same() -> None:
    line = Header("1" * 64, "2" * 64, 345, "4" * 16).line()
    for position in range(LENGTH):
        for bit in range(8):
            changed = bytearray(line)
            changed[position] ^= 1 << bit
            try:
                read = parse_header(bytes(changed), "f")
            except PitrError as error:
                assert error.message.startswith("f ")
            else:
                assert read.line() == bytes(changed)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"pitr-age 1",
        Header("1" * 64, "2" * 64, 3, "4" * 16).line()[:-1],
        Header("A" * 64, "2" * 64, 3, "4" * 16).line(),
        Header("1" * 64, "2" * 64, 3, "g" * 16).line(),
        Header("1" * 63, "2" * 65, 3, "4" * 16).line(),
        Header("1" * 64, "2" * 64, 3, "4" * 16).line().replace(b"000000000003", b"          +3"),
        Header("1" * 64, "2" * 64, 3, "4" * 16).line().replace(b"pitr-age 1", b"pitr-age 01"),
    ],
)
def test_line_that_was_not_written_here_is_damaged(line: bytes) -> None:
    with pytest.raises(PitrError, match="first line"):
        parse_header(line + b"rest", "f")


def test_newer_version_of_the_line_is_told_from_damage() -> None:
    with pytest.raises(PitrError, match="newer version"):
        parse_header(b"pitr-age 2 anything\n", "f")


# --- recipients


def ssh_rsa(bits: int) -> str:
    def field(data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + data

    modulus = (1 << (bits - 1)) | 1
    blob = field(b"ssh-rsa") + field(b"\1\0\1") + field(modulus.to_bytes(bits // 8 + 1, "big"))
    return "ssh-rsa " + base64.b64encode(blob).decode()


def test_recipients_are_sorted_once_and_without_comments(key: Key, tmp_path: Path) -> None:
    ssh = Key(tmp_path / "ssh", "ed25519").public
    assert len(ssh.split()) == 3
    found = check_recipients([ssh, f" {key.public}\n", EXAMPLE, key.public, ssh_rsa(2048)])
    assert found == tuple(sorted({" ".join(ssh.split()[:2]), key.public, EXAMPLE, ssh_rsa(2048)}))


def test_id_of_recipients_is_what_the_shell_computes(key: Key) -> None:
    command = f"printf '%s\\n' {key.public} {EXAMPLE} | LC_ALL=C sort | sha256sum | cut -c 1-16"
    by_hand = subprocess.run(["sh", "-c", command], check=True, capture_output=True, text=True).stdout.strip()
    assert recipients_id([key.public, EXAMPLE]) == recipients_id([EXAMPLE, key.public]) == by_hand
    assert recipients_id([]) == ""


@pytest.mark.parametrize(
    "secret",
    ["AGE-SECRET-KEY-1{}", "age-secret-key-1{}", "AGE-PLUGIN-YUBIKEY-1{}", "-----BEGIN OPENSSH PRIVATE KEY-----\n{}"],
)
def test_private_key_among_recipients_is_refused_without_repeating_it(secret: str) -> None:
    hidden = "QQPZRY9X8GF2TVDW0S3JN54KHCE6MUA7L"
    with pytest.raises(PitrError, match="Recipient 2 is a private key") as caught:
        check_recipients([EXAMPLE, secret.format(hidden)])
    assert hidden.lower() not in repr(caught.value).lower()
    assert hidden.lower() not in str(caught.value.detail).lower()


@pytest.mark.parametrize(
    "value",
    [
        "",
        "age1",
        EXAMPLE[:-1],
        EXAMPLE + "q",
        EXAMPLE[:20] + ("q" if EXAMPLE[20] != "q" else "p") + EXAMPLE[21:],
        EXAMPLE.upper(),
        "age1yubikey1q2w7u3vpya839jxxuq8g0sedh3d740d4xvn639sqhr95ejj8vu3hyfumptt",
        "ssh-ed25519",
        "ssh-ed25519 AAAA",
        "ssh-ed25519 !!!!",
        "ssh-ed25519 " + ssh_rsa(2048).split()[1],
        ssh_rsa(1024),
        "ecdsa-sha2-nistp256 AAAA",
        "/etc/passwd",
    ],
)
def test_recipient_that_age_would_not_take_is_refused(value: str) -> None:
    with pytest.raises(PitrError, match="Recipient 1 is not one that age knows") as caught:
        check_recipients([value])
    assert not value or len(value) < 12 or value not in caught.value.message


@pytest.mark.parametrize("kind", ["age", "ed25519", "rsa"])
def test_recipients_that_are_accepted_are_ones_that_age_takes(tmp_path: Path, kind: str) -> None:
    key = Key(tmp_path / "key", kind)
    site = Site(tmp_path, key.public)
    site.push(NAME, CONTENT)
    assert site.get(NAME, key.path) == CONTENT


# --- push and get


@pytest.mark.parametrize("compression", ["none", "gzip", "lz4", "zstd"])
def test_encrypted_segment_comes_back_as_it_was(site: Site, key: Key, compression: str) -> None:
    stored = site.push(NAME, CONTENT, compression).read_bytes()
    header = parse_header(stored, "f")
    assert header.content == hashlib.sha256(CONTENT).hexdigest()
    assert header.stored == hashlib.sha256(stored[LENGTH:]).hexdigest()
    assert header.size == MIB
    assert header.recipients == recipients_id([key.public])
    assert stored[LENGTH:].startswith(b"age-encryption.org/v1\n")
    assert CONTENT[40:200] not in stored
    assert site.get(NAME, key.path) == CONTENT
    with codec.open_reader(str(site.stored(NAME)), Tree(key.path)) as reader:
        assert b"".join(iter(lambda: reader.read(77_777), b"")) == CONTENT
        assert reader.read(1) == b""
    assert age_processes() == []


def test_encrypted_segment_is_read_by_hand(site: Site, key: Key) -> None:
    stored = site.push(NAME, CONTENT)
    command = f"tail -n +2 '{stored}' | age -d -i '{key.path}' | zstd -dcq"
    assert subprocess.run(["sh", "-c", command], check=True, capture_output=True).stdout == CONTENT


def test_backup_files_are_encrypted_and_history_files_are_not(site: Site, key: Key) -> None:
    name = f"{NAME}.00000028.backup"
    stored = site.push(name, BACKUP_TEXT)
    assert b"LABEL" not in stored.read_bytes() and stored.read_bytes().startswith(b"pitr-age 1 ")
    assert site.get(name, key.path) == BACKUP_TEXT.encode()
    text = history((1, "0/3000000"))
    site.push("00000002.history", text)
    assert site.get("00000002.history") == text.encode()


def test_partial_segment_is_encrypted(site: Site, key: Key) -> None:
    site.push(f"{NAME}.partial", CONTENT)
    assert site.stored(f"{NAME}.partial").read_bytes().startswith(b"pitr-age 1 ")
    assert site.get(f"{NAME}.partial", key.path) == CONTENT


def test_same_content_again_is_done_and_changes_nothing(site: Site, key: Key) -> None:
    site.push(NAME, CONTENT)
    before = tree(site.repository)
    site.push(NAME, CONTENT, "gzip")
    assert tree(site.repository) == before


def test_other_content_under_the_same_name_is_refused(site: Site) -> None:
    site.push(NAME, CONTENT)
    before = tree(site.repository)
    with pytest.raises(PitrError, match="exists with other content, unchanged"):
        site.push(NAME, segment(1, 3, seed=1))
    assert tree(site.repository) == before


@pytest.mark.parametrize("offset", [20, 80, 150, LENGTH + 5, LENGTH + 3000, -1])
def test_duplicate_of_a_damaged_file_is_not_called_done(site: Site, offset: int) -> None:
    """The digest in the first line alone would prove nothing: the segment must be there, whole."""
    stored = site.push(NAME, CONTENT)
    damaged = bytearray(stored.read_bytes())
    damaged[offset] ^= 4
    stored.write_bytes(damaged)
    with pytest.raises(PitrError, match="was not archived"):
        site.push(NAME, CONTENT)


def test_file_from_before_encryption_is_compared_by_content(tmp_path: Path, key: Key) -> None:
    site = Site(tmp_path)
    stored = site.push(NAME, CONTENT)
    site.encrypt_to(key.public)
    before = stored.read_bytes()
    site.push(NAME, CONTENT)
    assert stored.read_bytes() == before and site.get(NAME) == CONTENT
    with pytest.raises(PitrError, match="other content"):
        site.push(NAME, segment(1, 3, seed=1))


def test_encrypted_file_is_compared_when_encryption_has_ended(site: Site, key: Key) -> None:
    site.push(NAME, CONTENT)
    site.encrypt_to()
    site.push(NAME, CONTENT)
    with pytest.raises(PitrError, match="other content"):
        site.push(NAME, segment(1, 3, seed=1))
    plain = site.push(wal_name(1, 4), segment(1, 4))
    assert not plain.read_bytes().startswith(b"pitr-age")


def test_either_of_two_recipients_opens_it(tmp_path: Path, key: Key, other: Key) -> None:
    site = Site(tmp_path, key.public, other.public)
    site.push(NAME, CONTENT)
    assert site.get(NAME, key.path) == site.get(NAME, other.path) == CONTENT


def test_changed_recipients_need_both_identities_which_one_file_may_hold(site: Site, key: Key, other: Key) -> None:
    site.push(NAME, CONTENT)
    site.encrypt_to(other.public)
    site.push(wal_name(1, 4), segment(1, 4))
    both = Path(site.target).with_name("both")
    both.write_text(Path(key.path).read_text() + Path(other.path).read_text())
    both.chmod(0o600)
    assert site.get(NAME, str(both)) == CONTENT
    assert site.get(wal_name(1, 4), str(both)) == segment(1, 4)
    error = site.refused(wal_name(1, 4), key.path)
    assert isinstance(error, LockedError) and error.code == "identity_wrong"
    opened = ClusterFolder.open(str(site.repository), CLUSTER)
    assert opened.recipients == [other.public] and opened.former_recipients == [[key.public]]


def test_nothing_is_delivered_without_an_identity(site: Site) -> None:
    site.push(NAME, CONTENT)
    error = site.refused(NAME)
    assert isinstance(error, LockedError) and error.code == "identity_missing"
    assert str(site.stored(NAME)) in error.message


def test_wrong_identity_is_not_called_damage(site: Site, other: Key) -> None:
    site.push(NAME, CONTENT)
    error = site.refused(NAME, other.path)
    assert isinstance(error, LockedError) and error.code == "identity_wrong"
    assert "damaged" not in error.message and other.path in error.message


def test_damaged_stanza_is_not_called_a_wrong_identity(site: Site, key: Key) -> None:
    """age cannot tell these apart; the digest of the stored bytes can."""
    stored = site.push(NAME, CONTENT)
    data = bytearray(stored.read_bytes())
    at = data.index(b"\n-> X25519 ") + 20
    data[at] = ord("A") if data[at] != ord("A") else ord("B")
    stored.write_bytes(data)
    assert "is damaged" in site.refused(NAME, key.path).message


@pytest.mark.parametrize(
    ("content", "mode", "why"),
    [
        (None, 0, "cannot be read: No such file"),
        ("AGE-SECRET-KEY-1QQPZRYHIDDEN\n", 0o600, "is not one that age can use"),
        ("# nothing\n", 0o600, "is not one that age can use"),
        ("key", 0o604, "is open to every user of this host"),
        ("key", 0o602, "is open to every user of this host"),
        ("age-encryption.org/v1\n-> scrypt", 0o600, "has a passphrase"),
        ("-----BEGIN AGE ENCRYPTED FILE-----\n", 0o600, "has a passphrase"),
        ("-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\n", 0o600, "has a passphrase"),
    ],
)
def test_unusable_identity_is_told_without_its_content(
    site: Site, key: Key, tmp_path: Path, content: str | None, mode: int, why: str
) -> None:
    site.push(NAME, CONTENT)
    path = tmp_path / "identity"
    if content is not None:
        path.write_text(Path(key.path).read_text() if content == "key" else content)
        path.chmod(mode)
    error = site.refused(NAME, str(path))
    assert isinstance(error, LockedError) and error.code == "identity_unusable"
    assert why in error.message and str(path) in error.message and "HIDDEN" not in error.message


def test_identity_of_ssh_with_a_passphrase_is_refused_instead_of_asked_for(tmp_path: Path) -> None:
    locked = str(tmp_path / "locked")
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "secret", "-f", locked], check=True)
    site = Site(tmp_path, Path(f"{locked}.pub").read_text())
    site.push(NAME, CONTENT)
    assert "has a passphrase" in site.refused(NAME, locked).message


def test_identity_readable_by_a_group_is_accepted(site: Site, key: Key, tmp_path: Path) -> None:
    path = tmp_path / "identity"
    path.write_text(Path(key.path).read_text())
    path.chmod(0o640)
    site.push(NAME, CONTENT)
    assert site.get(NAME, str(path)) == CONTENT


@pytest.fixture
def without_age(monkeypatch: pytest.MonkeyPatch) -> None:
    real = codec.which
    monkeypatch.setattr(crypt, "which", lambda command: None if command == "age" else real(command))


def test_push_without_age_archives_nothing(site: Site, without_age: None) -> None:
    before = tree(site.repository)
    with pytest.raises(LockedError, match="age is not installed") as caught:
        site.push(NAME, CONTENT)
    assert caught.value.code == "age_missing"
    assert tree(site.repository) == before


def test_get_without_age_is_an_error_and_not_an_absence(
    site: Site, key: Key, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    site.push(NAME, CONTENT)
    monkeypatch.setattr(crypt, "which", lambda command: None)
    put(tmp_path, f"{CLUSTER}.json", f'{{"repository": "{site.repository}", "identity": "{key.path}"}}')
    assert cli.main([str(tmp_path), "get", CLUSTER, NAME, site.target]) == cli.FAILED
    assert "age is not installed on this host" in capfd.readouterr().err


# --- the command


def test_identity_comes_from_the_settings_or_the_command_line(
    site: Site, key: Key, other: Key, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    site.push(NAME, CONTENT)
    put(tmp_path, f"{CLUSTER}.json", f'{{"repository": "{site.repository}"}}')
    assert cli.main([str(tmp_path), "get", CLUSTER, NAME, site.target]) == cli.FAILED
    assert "no identity to decrypt it with was given" in capfd.readouterr().err
    options = [f"--identity={key.path}", "--system-identifier=7300000000000000001"]
    for order in (options, options[::-1]):
        assert cli.main([str(tmp_path), "get", *order, CLUSTER, NAME, site.target]) == 0
        assert Path(site.target).read_bytes() == CONTENT
    put(tmp_path, f"{CLUSTER}.json", f'{{"repository": "{site.repository}", "identity": "{key.path}"}}')
    assert cli.main([str(tmp_path), "get", CLUSTER, NAME, site.target]) == 0
    assert cli.main([str(tmp_path), "get", f"--identity={other.path}", CLUSTER, NAME, site.target]) == cli.FAILED


# --- damage


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, key: Key) -> tuple[Site, bytes]:
    site = Site(tmp_path_factory.mktemp("whole"), key.public)
    return site, site.push(NAME, CONTENT).read_bytes()


def _boundaries(data: bytes) -> list[int]:
    """Ends of the line, of age's header, of its nonce, of every chunk, and one byte to either side."""
    mac = data.index(b"\n--- ")
    payload = data.index(b"\n", mac + 1) + 1
    places = [0, 10, LENGTH, payload, payload + 16, len(data)]
    places += range(payload + 16, len(data), 65536 + 16)
    near = {place + step for place in places for step in (-1, 0, 1)}
    return sorted(place for place in near if 0 <= place < len(data))


def test_file_cut_at_every_boundary_is_refused(whole: tuple[Site, bytes], key: Key) -> None:
    site, data = whole
    stored = site.stored(NAME)
    try:
        for length in _boundaries(data):
            stored.write_bytes(data[:length])
            error = site.refused(NAME, key.path)
            assert "is damaged" in error.message and not isinstance(error, LockedError), (length, error.message)
    finally:
        stored.write_bytes(data)
    assert age_processes() == []


def test_changed_bit_anywhere_is_refused(whole: tuple[Site, bytes], key: Key) -> None:
    site, data = whole
    stored = site.stored(NAME)
    line = [place for place in range(LENGTH) if not LENGTH - 17 <= place < LENGTH - 1]
    try:
        for offset in [
            *line[::3],
            *range(LENGTH, LENGTH + 300, 7),
            *range(LENGTH + 300, len(data), 50021),
            len(data) - 1,
        ]:
            changed = bytearray(data)
            changed[offset] ^= 1
            stored.write_bytes(changed)
            error = site.refused(NAME, key.path)
            assert "is damaged" in error.message or "newer version" in error.message, (offset, error.message)
            assert not isinstance(error, LockedError), (offset, error.message)
    finally:
        stored.write_bytes(data)


def test_line_of_another_file_is_refused(site: Site, key: Key) -> None:
    first, second = site.push(NAME, CONTENT), site.push(wal_name(1, 4), segment(1, 4))
    first.write_bytes(first.read_bytes()[:LENGTH] + second.read_bytes()[LENGTH:])
    assert "is damaged" in site.refused(NAME, key.path).message


def test_content_that_is_not_what_was_stored_is_refused(site: Site, key: Key) -> None:
    """Somebody who has the public key can write a file that decrypts; its digest is that of what was archived."""
    stored = site.push(NAME, CONTENT)
    header = parse_header(stored.read_bytes(), "f")
    argv = ["sh", "-c", f"zstd -qc | age -r {key.public}"]
    forged = subprocess.run(argv, input=segment(1, 3, seed=9), check=True, capture_output=True).stdout
    header.stored = hashlib.sha256(forged).hexdigest()
    stored.write_bytes(header.line() + forged)
    assert "its content is not what was stored" in site.refused(NAME, key.path).message
    with (
        codec.open_reader(str(stored), Tree(key.path)) as reader,
        pytest.raises(PitrError, match="not what was stored"),
    ):
        reader.read()


def test_bytes_behind_the_end_are_refused(site: Site, key: Key) -> None:
    stored = site.push(NAME, CONTENT)
    stored.write_bytes(stored.read_bytes() + b"x")
    assert "is damaged" in site.refused(NAME, key.path).message


def test_backup_file_that_is_not_one_is_refused(site: Site) -> None:
    name = f"{NAME}.00000028.backup"
    stored = site.push(name, BACKUP_TEXT)
    # One bit of the first line, and the file is not known to be encrypted any more.
    stored.write_bytes(b"q" + stored.read_bytes()[1:])
    assert "is damaged" in site.refused(name).message


# --- levels that need no key


def test_stored_bytes_are_proven_without_a_key(site: Site) -> None:
    stored = site.push(NAME, CONTENT)
    assert verify_stored(Tree(), str(stored)).content == hashlib.sha256(CONTENT).hexdigest()
    data = bytearray(stored.read_bytes())
    data[-1] ^= 1
    stored.write_bytes(data)
    with pytest.raises(PitrError, match="its bytes are not those that were stored"):
        verify_stored(Tree(), str(stored))


def test_trial_of_an_identity_tells_right_from_wrong_and_damaged(site: Site, key: Key, other: Key) -> None:
    stored = str(site.push(NAME, CONTENT))
    try_identity(Tree(key.path), stored)
    for identity, code in ((other.path, "identity_wrong"), ("", "identity_missing")):
        with pytest.raises(LockedError) as caught:
            try_identity(Tree(identity), stored)
        assert caught.value.code == code
    os.truncate(stored, 300)
    with pytest.raises(PitrError, match="is damaged"):
        try_identity(Tree(key.path), stored)
    assert age_processes() == []


def test_reader_that_is_left_in_the_middle_leaves_no_process(site: Site, key: Key) -> None:
    stored = str(site.push(NAME, CONTENT, "none"))
    descriptors = len(os.listdir("/proc/self/fd"))
    for _time in range(20):
        with codec.open_reader(stored, Tree(key.path)) as reader:
            assert reader.read(10) == CONTENT[:10]
    assert age_processes() == []
    # The thread that feeds age closes its own, soon.
    deadline = os.times().elapsed + 10
    while len(os.listdir("/proc/self/fd")) > descriptors:
        assert os.times().elapsed < deadline


class _Far(Tree):
    is_far = True


def test_every_set_of_recipients_is_found_near_and_at_its_borders_far(site: Site, key: Key, other: Key) -> None:
    paths = []
    for number in range(40):
        if number in (0, 13, 20):
            site.encrypt_to(*{0: [], 13: [key.public], 20: [other.public]}[number])
        paths.append(str(site.push(wal_name(1, number), segment(1, number))))
    ids = [recipients_id([key.public]), recipients_id([other.public])]
    assert crypt.by_recipients(Tree(), paths) == {ids[0]: paths[13], ids[1]: paths[20]}
    far = crypt.by_recipients(_Far(), paths)
    assert set(far) == set(ids) and far[ids[0]] in paths[13:20] and far[ids[1]] in paths[20:]
    assert crypt.by_recipients(_Far(), paths[:5]) == crypt.by_recipients(_Far(), []) == {}


# --- failures while writing


def test_full_disk_under_age_is_told_and_leaves_nothing(tmp_path: Path, key: Key) -> None:
    source = os.open(put(tmp_path, "f", CONTENT), os.O_RDONLY)
    target = tmp_path / "target"
    code = (
        "import os, resource, signal, sys\n"
        "from ansible_collections.pgdrill.pitr.plugins.module_utils import codec\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "codec.Storing(0, sys.argv[1], sys.argv[2], 1048576, [sys.argv[3]]).finish()\n"
    )
    for compression in ("zstd", "gzip", "none"):
        os.lseek(source, 0, os.SEEK_SET)
        argv = ["python3", "-c", code, str(target), compression, key.public]
        done = subprocess.run(argv, stdin=source, capture_output=True, text=True, check=False)
        assert done.returncode == 1 and "PitrError" in done.stderr, done.stderr
        assert "could not write: age: error:" in done.stderr and "age/report" not in done.stderr
        assert "file too large" in done.stderr
        assert not target.exists()
    os.close(source)


def test_source_that_cannot_be_read_ends_the_processes(tmp_path: Path, key: Key) -> None:
    source = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises((OSError, PitrError)):
        codec.Storing(source, str(tmp_path / "target"), "zstd", 0, [key.public]).finish()
    os.close(source)
    assert not (tmp_path / "target").exists()
    assert age_processes() == []


def test_no_secret_is_in_the_arguments_of_a_process(site: Site, key: Key, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    real = os.posix_spawn

    def spy(path: str, argv: list[str], *rest: object, **more: object) -> int:
        seen.extend(argv)
        return real(path, argv, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "posix_spawn", spy)
    site.push(NAME, CONTENT)
    site.get(NAME, key.path)
    assert key.public in seen and key.path in seen
    assert not any("SECRET" in argument for argument in seen)


# --- the document


def test_cluster_that_is_not_encrypted_stays_readable_for_older_versions(tmp_path: Path, key: Key) -> None:
    site = Site(tmp_path)
    document = site.repository / CLUSTER / "cluster.json"
    assert '"format": 1' in document.read_text() and "encryption" not in document.read_text()
    assert '"format": 1' in (site.repository / "pitr-repository.json").read_text()
    site.encrypt_to(key.public)
    assert '"format": 2' in document.read_text()


@pytest.mark.parametrize("value", ['"age1"', "[1]", "{}", "null", '[""]'])
def test_damaged_recipients_are_never_taken_for_none(site: Site, key: Key, value: str) -> None:
    document = site.repository / CLUSTER / "cluster.json"
    text = document.read_text()
    listed = text[text.index('"encryption_recipients": ') + len('"encryption_recipients": ') :]
    document.write_text(text.replace(listed[: listed.index("]") + 1], value))
    before = tree(site.repository)
    with pytest.raises(PitrError, match="is damaged"):
        site.push(NAME, CONTENT)
    assert tree(site.repository) == before


def test_small_files_tell_by_their_first_bytes_that_they_are_encrypted(site: Site) -> None:
    stored = site.push(NAME, CONTENT)
    assert stored.read_bytes().startswith(crypt.PREFIX) and stored.read_bytes()[LENGTH:].startswith(crypt.AGE)
    for path, encrypted in ((stored, True), (site.pg_wal / NAME, False)):
        source = Tree().open(str(path))
        assert codec.is_encrypted(source) is encrypted
        source.close()
    assert archive.same_content(str(stored), Tree(), os.open(site.pg_wal / NAME, os.O_RDONLY))
