# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Compression: what goes in comes out, damage never does, and nothing is left behind."""

from __future__ import annotations

import gzip
import os
import random
import resource
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils import codec
from ansible_collections.pgdrill.pitr.plugins.module_utils.codec import detect, open_reader, open_writer, parse, which
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from hypothesis import assume, given, settings
from hypothesis import strategies as st

# zstd and lz4 are commands; where one is missing nothing can be stored with it, and there is nothing to test.
CODECS = ["none", "gzip", *(name for name in ("lz4", "zstd") if which(name))]
CHECKED = [name for name in CODECS if name != "none"]
NOISE = random.Random(7).randbytes(300_000)
TEXT = b"WAL" * 100_000

contents = st.one_of(
    st.binary(max_size=2000),
    st.integers(0, len(NOISE)).map(lambda size: NOISE[:size]),
    st.integers(0, 3 * codec.CHUNK).map(lambda size: (b"0123456789" * (size // 10 + 1))[:size]),
)


def store(path: Path | str, name: str, content: bytes, chunk: int = codec.CHUNK) -> bytes:
    with open_writer(str(path), name) as writer:
        for at in range(0, len(content), chunk):
            writer.write(content[at : at + chunk])
    return Path(path).read_bytes()


def load(path: Path | str, chunk: int = -1) -> bytes:
    with open_reader(str(path)) as reader:
        if chunk < 0:
            return reader.read()
        parts: list[bytes] = []
        while True:
            part = reader.read(chunk)
            if not part:
                return b"".join(parts)
            parts.append(part)


def processes_of_ours() -> list[str]:
    """Children of this process, zombies too."""
    found = []
    for entry in os.listdir("/proc"):
        try:
            with open(f"/proc/{entry}/stat") as stream:
                name, _bracket, rest = stream.read().rpartition(")")
        except OSError:
            continue
        if rest.split()[1] == str(os.getpid()):
            found.append(name)
    return found


@pytest.mark.parametrize("name", CODECS)
@settings(deadline=None, max_examples=25)
@given(content=contents, write=st.integers(1, 2 * codec.CHUNK), read=st.integers(1, 2 * codec.CHUNK))
def test_content_round_trips_whatever_the_pieces(name: str, content: bytes, write: int, read: int) -> None:
    # Uncompressed content that begins like a compressed file would be taken for one; WAL, tar and SQL never do.
    assume(name != "none" or detect(content[:8]) == "none")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "f")
        store(path, name, content, max(write, len(content) // 50))
        assert load(path, max(read, len(content) // 50)) == content
        assert load(path) == content


@pytest.mark.parametrize("name", CODECS)
def test_reads_give_as_much_as_was_asked_until_the_end(tmp_path: Path, name: str) -> None:
    store(tmp_path / "f", name, NOISE)
    with open_reader(str(tmp_path / "f")) as reader:
        assert reader.read(0) == b""
        assert [len(reader.read(size)) for size in (1, 7, 100_000, 10**9, 5)] == [
            1,
            7,
            100_000,
            len(NOISE) - 100_008,
            0,
        ]
        assert reader.read() == b""


@pytest.mark.parametrize("name", CHECKED)
def test_compressed_file_is_told_by_its_first_bytes_and_readable_by_the_usual_command(
    tmp_path: Path, name: str
) -> None:
    stored = store(tmp_path / "anything", name, TEXT)
    assert detect(stored[:8]) == name
    assert len(stored) < len(TEXT) / 10
    with open_reader(str(tmp_path / "anything")) as reader:
        assert reader.codec == name
    result = subprocess.run([name, "-d", "-c"], input=stored, capture_output=True, check=True)
    assert result.stdout == TEXT


def test_file_is_private(tmp_path: Path) -> None:
    store(tmp_path / "f", "none", b"secret")
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o600


def test_several_gzip_members_are_read_as_one(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(gzip.compress(b"one") + gzip.compress(b"") + gzip.compress(b"two"))
    assert load(tmp_path / "f") == b"onetwo"


@pytest.mark.parametrize("name", CHECKED)
@pytest.mark.parametrize("content", [TEXT, NOISE, b"", b"x"], ids=["text", "noise", "empty", "byte"])
def test_truncation_anywhere_is_damage_and_names_the_file(tmp_path: Path, name: str, content: bytes) -> None:
    stored = store(tmp_path / "whole", name, content)
    size = len(stored)
    # Below five bytes nothing tells a codec any more; such a file is of the wrong size for whoever reads it.
    cuts = {
        5,
        6,
        7,
        10,
        15,
        20,
        size // 4,
        size // 2,
        3 * size // 4,
        size - 9,
        size - 8,
        size - 5,
        size - 4,
        size - 2,
        size - 1,
    }
    for cut in sorted(cut for cut in cuts if 5 <= cut < size):
        path = tmp_path / "cut"
        path.write_bytes(stored[:cut])
        with pytest.raises(PitrError, match="is damaged") as caught:
            load(path, 4096)
        assert str(path) in caught.value.message, cut
        assert caught.value.detail == {"path": str(path)}
    assert processes_of_ours() == []


@pytest.mark.parametrize("name", CHECKED)
@pytest.mark.parametrize("content", [TEXT, NOISE], ids=["text", "noise"])
def test_flipped_bit_anywhere_never_gives_other_content(tmp_path: Path, name: str, content: bytes) -> None:
    stored = store(tmp_path / "whole", name, content)
    chosen = [*random.Random(1).sample(range(6, len(stored)), 12), len(stored) - 1, len(stored) - 6]
    noticed = 0
    for at in chosen:
        path = tmp_path / "flipped"
        path.write_bytes(stored[:at] + bytes([stored[at] ^ 0x10]) + stored[at + 1 :])
        try:
            # Bits of a header may mean nothing (the operating system in gzip's); then the content is the same.
            assert load(path) == content
        except PitrError as error:
            assert str(path) in error.message
            noticed += 1
    assert noticed >= len(chosen) - 1


@pytest.mark.parametrize("name", CHECKED)
def test_rubbish_after_the_end_is_damage(tmp_path: Path, name: str) -> None:
    stored = store(tmp_path / "f", name, TEXT)
    (tmp_path / "f").write_bytes(stored + b"rubbish, not a frame")
    with pytest.raises(PitrError, match="is damaged"):
        load(tmp_path / "f")


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("read", [0, 1, 1000])
def test_reader_closed_early_leaves_no_process(tmp_path: Path, name: str, read: int) -> None:
    store(tmp_path / "f", name, NOISE * 20)
    before = len(os.listdir("/proc/self/fd"))
    with open_reader(str(tmp_path / "f")) as reader:
        reader.read(read)
    assert processes_of_ours() == []
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("name", CODECS)
def test_reading_and_writing_leave_no_process_and_no_open_file(tmp_path: Path, name: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    store(tmp_path / "f", name, TEXT)
    assert load(tmp_path / "f", 100_000) == TEXT
    assert processes_of_ours() == []
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("name", CODECS)
def test_failure_while_writing_removes_the_file(tmp_path: Path, name: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(RuntimeError, match="in between"), open_writer(str(tmp_path / "f"), name) as writer:
        writer.write(NOISE)
        raise RuntimeError("in between")
    assert os.listdir(tmp_path) == [] and processes_of_ours() == []
    assert len(os.listdir("/proc/self/fd")) == before


def test_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"old")
    with pytest.raises(FileExistsError), open_writer(str(tmp_path / "f"), "none"):
        pass
    assert (tmp_path / "f").read_bytes() == b"old"


@pytest.mark.parametrize("name", CODECS)
def test_unknown_or_impossible_codec_leaves_no_file(tmp_path: Path, name: str) -> None:
    for wrong in ("zip", f"{name}:99", f"{name}:fast"):
        if wrong.startswith("none:"):
            continue
        with pytest.raises(PitrError, match="Compression"), open_writer(str(tmp_path / "f"), wrong):
            pass
    assert os.listdir(tmp_path) == []


def in_a_small_filesystem(limit: int, function: Callable[[], object]) -> bytes:
    """Run ``function`` in a child whose files may not grow beyond ``limit`` bytes; returns what it raised."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            function()
            os.write(write, b"nothing")
        except BaseException as error:
            os.write(write, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(pid, 0)
    with os.fdopen(read, "rb") as stream:
        return stream.read()


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("size", [1, 20], ids=["at-the-end", "in-between"])
def test_full_disk_removes_the_file_and_says_so(tmp_path: Path, name: str, size: int) -> None:
    raised = in_a_small_filesystem(100_000, lambda: store(tmp_path / "f", name, NOISE * size))
    assert b"File too large" in raised or b"Write error" in raised, raised
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (b"", "none"),
        (b"\x18\xd1", "none"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"\x04\x22\x4d\x18", "lz4"),
    ],
)
def test_codec_is_told_by_magic(head: bytes, name: str) -> None:
    assert detect(head) == name


@pytest.mark.parametrize(
    ("text", "expected"),
    [("none", ("none", 0)), ("gzip", ("gzip", 1)), ("gzip:1", ("gzip", 1)), ("gzip:9", ("gzip", 9))],
)
def test_codec_and_level_are_read(text: str, expected: tuple[str, int]) -> None:
    assert parse(text) == expected


@pytest.mark.parametrize("text", ["", "brotli", "GZIP", "gzip:0", "gzip:10", "gzip:x", "gzip:-1", "gzip:1:2", "gzip:²"])
def test_unknown_codec_or_level_is_refused(text: str) -> None:
    with pytest.raises(PitrError, match="Compression"):
        parse(text)


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH of its own, with nothing in it, and no system folders behind it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path.startswith(str(tmp_path)) and real(path, mode))
    return folder


def test_auto_is_zstd_where_the_command_exists_and_gzip_elsewhere(commands: Path) -> None:
    assert parse("auto") == ("gzip", 1)
    (commands / "zstd").write_text("#!/bin/sh\n")
    (commands / "zstd").chmod(0o755)
    assert parse("auto") == ("zstd", 1)


def test_missing_command_is_refused_by_name(commands: Path) -> None:
    with pytest.raises(PitrError, match="The command lz4 is not installed"):
        parse("lz4")


@pytest.mark.parametrize("name", [name for name in CHECKED if name != "gzip"])
def test_file_whose_command_is_missing_is_an_error_and_not_plain_content(
    tmp_path: Path, request: pytest.FixtureRequest, name: str
) -> None:
    store(tmp_path / "f", name, TEXT)
    request.getfixturevalue("commands")
    with pytest.raises(PitrError, match=f"The command {name} is not installed"):
        load(tmp_path / "f")


def test_command_is_found_behind_a_path_that_postgresql_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert which("sh") in ("/usr/local/bin/sh", "/usr/bin/sh", "/bin/sh")
    monkeypatch.delenv("PATH")
    assert which("sh") is not None
    assert which("certainly-no-such-command") is None


def test_directory_and_current_directory_are_no_commands(commands: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (commands / "zstd").mkdir()
    assert which("zstd") is None
    (commands / "zstd").rmdir()
    (commands / "zstd").write_text("#!/bin/sh\n")
    (commands / "zstd").chmod(0o755)
    monkeypatch.chdir(commands)
    monkeypatch.setattr(os, "access", lambda path, _mode: path == "zstd" or path.startswith(str(commands)))
    monkeypatch.setenv("PATH", "")
    assert which("zstd") is None


def test_compressor_that_fails_is_told_in_its_own_words(commands: Path, tmp_path: Path) -> None:
    (commands / "zstd").write_text("#!/bin/sh\necho 'out of luck' >&2\nexit 1\n")
    (commands / "zstd").chmod(0o755)
    for content in (b"short", NOISE * 4):
        with pytest.raises(PitrError, match="zstd could not write: out of luck"):
            store(tmp_path / "f", "zstd", content)
        assert not (tmp_path / "f").exists()


def test_compressor_that_is_killed_has_failed(commands: Path, tmp_path: Path) -> None:
    (commands / "zstd").write_text("#!/bin/sh\nkill -9 $$\n")
    (commands / "zstd").chmod(0o755)
    with pytest.raises(PitrError, match="zstd could not write: ended with wait status 9"):
        store(tmp_path / "f", "zstd", b"short")
    assert not (tmp_path / "f").exists()
