# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Tars are read back while they are being written, and what was not read to its end does not count."""

from __future__ import annotations

import io
import random
import tarfile
import time
from pathlib import Path

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils import codec
from ansible_collections.pgdrill.pitr.plugins.module_utils.following import Follower, count_stored

SIZES = (0, 5000, 3_000_000, 17)


def _stored(path: Path, name: str) -> bytes:
    """A compressed tar with files of SIZES, and one of WAL, which is none of the backup's."""
    if name in ("lz4", "zstd") and not codec.which(name):
        pytest.skip(f"{name} is not installed")
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for number, size in enumerate((*SIZES, 4000)):
            info = tarfile.TarInfo(f"base/{number}" if number < len(SIZES) else "pg_wal/x")
            info.size = size
            tar.addfile(info, io.BytesIO(random.Random(number).randbytes(size)))
    with codec.open_writer(str(path), name) as writer:
        writer.write(stream.getvalue())
    return path.read_bytes()


def _write(path: Path, content: bytes) -> None:
    step = len(content) // 7 + 1
    with open(path, "wb", buffering=0) as file:
        for start in range(0, len(content), step):
            file.write(content[start : start + step])
            time.sleep(0.05)


@pytest.mark.parametrize("name", ["none", "gzip", "lz4", "zstd"])
def test_what_is_still_being_written_is_counted(tmp_path: Path, name: str) -> None:
    content = _stored(tmp_path / "made", name)
    place = tmp_path / "backup"
    follower = Follower(str(place))
    time.sleep(0.05)
    place.mkdir()
    for tar in ("16384.tar", "base.tar"):
        _write(place / tar, content)
    (place / "backup_manifest").write_text("no tar", encoding="utf-8")
    expected = (len(SIZES), sum(SIZES))
    assert follower.finish() == {"16384.tar": expected, "base.tar": expected}
    assert count_stored(str(place / "base.tar")) == expected


@pytest.mark.parametrize("name", ["none", "gzip", "lz4", "zstd"])
def test_what_is_cut_off_is_not_counted(tmp_path: Path, name: str) -> None:
    content = _stored(tmp_path / "made", name)
    follower = Follower(str(tmp_path))
    _write(tmp_path / "16384.tar", content[: len(content) // 2])
    _write(tmp_path / "base.tar", content)
    assert list(follower.finish()) == ["base.tar"]


def test_nothing_at_all(tmp_path: Path) -> None:
    assert Follower(str(tmp_path / "none")).finish() == {}
