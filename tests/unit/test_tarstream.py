# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The tar reader gives what tarfile gives, in every format, and takes nothing for whole that is not."""

from __future__ import annotations

import io
import os
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils import codec
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.plugins.module_utils.extract import extract_tar
from ansible_collections.pgdrill.pitr.plugins.module_utils.tarstream import open_stream

NAMES = ["base/1/1259", "x" * 120, "d/" * 60 + "deep", "äöü\udcff", ".hidden", "a b\nc"]


def _tar(kind: int) -> bytes:
    rng = random.Random(7)
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=kind, errors="surrogateescape") as tar:
        for number, name in enumerate(NAMES):
            info = tarfile.TarInfo("directory/" if number == 0 else name)
            info.mode = 0o700 + number
            if number == 0:
                info.type = tarfile.DIRTYPE
                tar.addfile(info)
                continue
            content = rng.randbytes((number - 1) * 700_001)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def _read(path: Path) -> list[tuple[str, str, int, int, bytes]]:
    found = []
    with open_stream(str(path)) as tar:
        for member in tar:
            found.append((member.name.rstrip("/"), member.kind, member.size, member.mode, tar.content()))
    return found


@pytest.mark.parametrize("name", ["none", "gzip", "lz4", "zstd"])
@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_same_as_tarfile(tmp_path: Path, kind: int, name: str) -> None:
    if name in ("lz4", "zstd") and not codec.which(name):
        pytest.skip(f"{name} is not installed")
    path = tmp_path / "x.tar"
    with codec.open_writer(str(path), name) as writer:
        writer.write(_tar(kind))
    expected = []
    with tarfile.open(fileobj=io.BytesIO(_tar(kind)), errors="surrogateescape") as tar:
        for member in tar:
            stream = tar.extractfile(member)
            kind_name = "directory" if member.isdir() else "file"
            expected.append((member.name, kind_name, member.size, member.mode, stream.read() if stream else b""))
    assert _read(path) == expected


def test_pieces_are_good_until_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with codec.open_writer(str(path), "gzip" if codec.which("zstd") is None else "zstd") as writer:
        writer.write(_tar(tarfile.GNU_FORMAT))
    whole = []
    with open_stream(str(path)) as tar:
        for _member in tar:
            content = b""
            for piece in tar.pieces():
                content += piece
            whole.append(content)
    assert whole == [content for *_facts, content in _read(path)]


def test_number_in_base_256_is_understood(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    info = tarfile.TarInfo("large")
    info.size = 9 << 30
    header = info.tobuf(tarfile.GNU_FORMAT)
    path.write_bytes(header + b"some of it")
    with pytest.raises(PitrError, match="ends before"), open_stream(str(path)) as tar:
        for member in tar:
            assert member.size == 9 << 30


def _cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _cut_between(content: bytes) -> bytes:
    return content.rstrip(b"\0")[:-1] if len(content) < 1024 else content[:512]


def _flip_header(content: bytes) -> bytes:
    return content[:130] + bytes([content[130] ^ 1]) + content[131:]


@pytest.mark.parametrize("damage", [_cut, _cut_between, _flip_header])
def test_what_is_not_whole_is_damaged(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(damage(_tar(tarfile.GNU_FORMAT)))
    with pytest.raises(PitrError, match=r"x\.tar is damaged"):
        _read(path)


def test_name_that_leads_elsewhere_and_link_are_refused(tmp_path: Path) -> None:
    for info in (tarfile.TarInfo("../outside"), tarfile.TarInfo("/outside"), tarfile.TarInfo("link")):
        if info.name == "link":
            info.type, info.linkname = tarfile.SYMTYPE, "/etc"
        path = tmp_path / "x.tar"
        with tarfile.open(path, "w") as tar:
            tar.addfile(info)
        (tmp_path / "root").mkdir(exist_ok=True)
        with pytest.raises(PitrError, match="is damaged"):
            extract_tar(str(path), str(tmp_path / "root"), lambda _count: None)
        assert os.listdir(tmp_path / "root") == []
