# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Backups back into directories: complete or an error, never outside, never startable before the end."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils import codec
from ansible_collections.pgdrill.pitr.plugins.module_utils.catalog import Backup, StoredFile, Tablespace
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.plugins.module_utils.extract import (
    HELD_BACK,
    PG_CONTROL,
    extract,
    extract_tar,
    rewrite_tablespace_map,
    verify,
)
from ansible_collections.pgdrill.pitr.plugins.module_utils.stored import parse_tablespace_map
from ansible_collections.pgdrill.pitr.tests.unit.support import make_backup, put
from hypothesis import given
from hypothesis import strategies as st

CODECS = ["none", "gzip", *(name for name in ("lz4", "zstd") if codec.which(name))]
CONTENT = {
    "backup_label": b"START WAL LOCATION: 0/2000028\n",
    "PG_VERSION": b"18\n",
    "base/1/1259": os.urandom(200_000),
    "base/1/empty": b"",
    "global/pg_control": b"c" * 8192,
    "pg_tblspc/": b"",
    "pg_wal/": b"",
}


def member(
    name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = ""
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name.rstrip("/"))
    info.type = tarfile.DIRTYPE if name.endswith("/") else kind
    info.mode = 0o700 if name.endswith("/") else 0o600
    info.size = len(content)
    info.linkname = link
    return info, content


def tar_of(members: list[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def cluster_tar(content: dict[str, bytes]) -> bytes:
    """As the server makes it: directories before their files."""
    members, seen = [], set()
    for name, data in content.items():
        parts = name.rstrip("/").split("/")
        for depth in range(1, len(parts)):
            folder = "/".join(parts[:depth]) + "/"
            if folder not in seen and folder not in content:
                seen.add(folder)
                members.append(member(folder))
        members.append(member(name, data))
    return tar_of(members)


def store(path: Path, content: bytes, compression: str = "none") -> str:
    with codec.open_writer(str(path), compression) as writer:
        writer.write(content)
    return str(path)


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("compression", CODECS)
def test_backup_is_unpacked_with_pg_control_held_back(tmp_path: Path, compression: str) -> None:
    path = store(tmp_path / "base.tar", cluster_tar(CONTENT), compression)
    root = tmp_path / "pgdata"
    root.mkdir()
    counted: list[int] = []
    extract_tar(path, str(root), counted.append)
    expected = {name: data for name, data in CONTENT.items() if not name.endswith("/")}
    expected[HELD_BACK] = expected.pop(PG_CONTROL)
    assert files(root) == expected
    assert sum(counted) == sum(map(len, expected.values()))
    assert (root / "pg_wal").is_dir() and (root / "base/1/1259").stat().st_mode & 0o777 == 0o600


def test_modes_of_the_tar_are_kept_whatever_the_umask(tmp_path: Path) -> None:
    folder, file = member("shared/"), member("shared/file", b"x")
    folder[0].mode, file[0].mode = 0o750, 0o640
    path = store(tmp_path / "base.tar", tar_of([folder, file]))
    root = tmp_path / "pgdata"
    root.mkdir()
    before = len(os.listdir("/proc/self/fd"))
    old = os.umask(0o027)
    try:
        extract_tar(path, str(root), lambda _count: None)
    finally:
        os.umask(old)
    assert (root / "shared").stat().st_mode & 0o777 == 0o750
    assert (root / "shared" / "file").stat().st_mode & 0o777 == 0o640
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("compression", CODECS)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.99])
def test_truncated_backup_is_an_error_that_names_it(tmp_path: Path, compression: str, share: float) -> None:
    path = store(tmp_path / "base.tar", cluster_tar(CONTENT), compression)
    whole = Path(path).read_bytes()
    # A plain tar cut between two members looks shorter, not damaged; its size and the manifest tell then.
    cut = int(len(whole) * share) if compression != "none" else min(int(len(whole) * share) // 512 * 512 + 100, 200_000)
    Path(path).write_bytes(whole[:cut])
    root = tmp_path / "pgdata"
    root.mkdir()
    with pytest.raises(PitrError, match="is damaged") as caught:
        extract_tar(path, str(root), lambda _count: None)
    assert path in caught.value.message
    assert not (root / PG_CONTROL).exists()


@pytest.mark.parametrize("compression", [name for name in CODECS if name != "none"])
def test_flipped_bit_in_a_backup_is_an_error_that_names_it(tmp_path: Path, compression: str) -> None:
    path = store(tmp_path / "base.tar", cluster_tar(CONTENT), compression)
    for share in (0.2, 0.6, 0.95):
        whole = bytearray(Path(path).read_bytes())
        whole[int(len(whole) * share)] ^= 0x20
        damaged = tmp_path / f"damaged{share}"
        damaged.write_bytes(whole)
        root = tmp_path / f"pgdata{share}"
        root.mkdir()
        with pytest.raises(PitrError, match="is damaged") as caught:
            extract_tar(str(damaged), str(root), lambda _count: None)
        assert str(damaged) in caught.value.message


@pytest.mark.parametrize("name", ["../outside", "/tmp/outside", "base/../../outside", "..", "base/1/../../../x"])
def test_name_that_leads_out_of_the_directory_is_refused(tmp_path: Path, name: str) -> None:
    path = store(tmp_path / "base.tar", tar_of([member("base/"), member("base/1/"), member(name, b"x")]))
    root = tmp_path / "pgdata"
    root.mkdir()
    with pytest.raises(PitrError, match="is damaged: it holds the name"):
        extract_tar(path, str(root), lambda _count: None)
    assert files(root) == {} and sorted(os.listdir(tmp_path)) == ["base.tar", "pgdata"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_what_is_neither_file_nor_directory_is_refused(tmp_path: Path, kind: bytes) -> None:
    path = store(tmp_path / "base.tar", tar_of([member("link", kind=kind, link="/etc")]))
    with pytest.raises(PitrError, match="neither a file nor a directory"):
        extract_tar(path, str(tmp_path), lambda _count: None)
    assert os.listdir(tmp_path) == ["base.tar"]


@pytest.mark.parametrize("name", ["./global/pg_control", "global/pg_control"])
def test_control_file_is_held_back_however_it_is_written(tmp_path: Path, name: str) -> None:
    path = store(tmp_path / "base.tar", tar_of([member("./"), member("global/"), member(name, b"control")]))
    root = tmp_path / "pgdata"
    root.mkdir()
    extract_tar(path, str(root), lambda _count: None)
    assert files(root) == {HELD_BACK: b"control"}


def test_existing_file_is_never_overwritten(tmp_path: Path) -> None:
    path = store(tmp_path / "base.tar", cluster_tar(CONTENT))
    put(tmp_path / "pgdata", "PG_VERSION", "16\n")
    with pytest.raises(FileExistsError):
        extract_tar(path, str(tmp_path / "pgdata"), lambda _count: None)
    assert (tmp_path / "pgdata" / "PG_VERSION").read_text() == "16\n"


def with_tablespace(tmp_path: Path) -> tuple[Backup, Path]:
    folder = tmp_path / "stored"
    folder.mkdir()
    store(folder / "base.tar.gz", cluster_tar(CONTENT), "gzip")
    store(folder / "16385.tar.gz", cluster_tar({"PG_18_202506291/5/16386": b"rows"}), "gzip")
    names = ("16385.tar.gz", "backup_manifest", "base.tar.gz")
    backup = make_backup(files=tuple(StoredFile(name, 0, "") for name in names))
    return Backup(**{**backup.__dict__, "tablespaces": (Tablespace(16385, "/old place"),)}), folder


def test_tablespace_goes_where_it_was_mapped(tmp_path: Path) -> None:
    backup, folder = with_tablespace(tmp_path)
    root, place = tmp_path / "pgdata", tmp_path / "new" / "place"
    root.mkdir()
    counted: list[int] = []
    extract(backup, str(folder), str(root), {16385: str(place)}, counted.append)
    assert files(place) == {"PG_18_202506291/5/16386": b"rows"}
    assert os.readlink(root / "pg_tblspc" / "16385") == str(place)
    assert place.stat().st_mode & 0o777 == 0o700
    assert sum(counted) == sum(map(len, CONTENT.values())) + 4


def test_tablespace_without_a_file_is_an_error(tmp_path: Path) -> None:
    backup, folder = with_tablespace(tmp_path)
    lame = Backup(**{**backup.__dict__, "files": backup.files[1:]})
    (tmp_path / "pgdata").mkdir()
    with pytest.raises(PitrError, match="has no file for the tablespace 16385"):
        extract(lame, str(folder), str(tmp_path / "pgdata"), {16385: str(tmp_path / "ts")}, lambda _count: None)


@pytest.fixture
def verified(tmp_path: Path) -> tuple[Backup, Callable[[str], None]]:
    """A backup with its manifest, and a way to play pg_verifybackup."""
    put(tmp_path, "backup_manifest", b"manifest")
    backup = make_backup(files=(StoredFile("backup_manifest", 8, hashlib.sha256(b"manifest").hexdigest()),))

    def play(script: str) -> None:
        (tmp_path / "pg_verifybackup").write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/argv\n{script}\n')
        (tmp_path / "pg_verifybackup").chmod(0o755)

    return backup, play


def test_restored_files_are_compared_with_the_manifest(
    tmp_path: Path, verified: tuple[Backup, Callable[[str], None]]
) -> None:
    backup, play = verified
    play("exit 0")
    verify(backup, str(tmp_path), "/pgdata", str(tmp_path))
    argv = (tmp_path / "argv").read_text().splitlines()
    assert argv[-1] == "/pgdata" and "--manifest-path=" in "".join(argv)
    assert {f"--ignore={PG_CONTROL}", f"--ignore={HELD_BACK}"} <= set(argv)


def test_restored_file_that_differs_is_an_error_with_its_name(
    tmp_path: Path, verified: tuple[Backup, Callable[[str], None]]
) -> None:
    backup, play = verified
    play("echo 'pg_verifybackup: error: checksum mismatch for file \"base/1/1259\"' >&2; exit 1")
    with pytest.raises(PitrError, match='checksum mismatch for file "base/1/1259"'):
        verify(backup, str(tmp_path), "/pgdata", str(tmp_path))


def test_manifest_that_was_exchanged_is_refused(tmp_path: Path, verified: tuple[Backup, Callable[[str], None]]) -> None:
    backup, play = verified
    play("exit 0")
    put(tmp_path, "backup_manifest", b"another!")
    with pytest.raises(PitrError, match="is not the file that was stored with the backup"):
        verify(backup, str(tmp_path), "/pgdata", str(tmp_path))
    assert not (tmp_path / "argv").exists()


paths = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20).map(
    lambda path: "/" + path
)


@given(st.dictionaries(st.integers(1, 2**32 - 1), paths, min_size=1, max_size=4))
def test_tablespace_map_round_trips_for_any_path(locations: dict[int, str]) -> None:
    import tempfile

    tablespaces = tuple(Tablespace(oid, "/old") for oid in locations)
    with tempfile.TemporaryDirectory() as folder:
        rewrite_tablespace_map(folder, tablespaces, locations)
        text = Path(folder, "tablespace_map").read_bytes().decode()
    assert parse_tablespace_map(text) == tuple(Tablespace(oid, path) for oid, path in locations.items())


def test_cluster_without_tablespaces_gets_no_map(tmp_path: Path) -> None:
    rewrite_tablespace_map(str(tmp_path), (), {})
    assert os.listdir(tmp_path) == []
