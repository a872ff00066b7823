# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Certificates that a server could not use are refused, by what is wrong with them."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils.certificates import check, files, newer_than
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.tests.unit.support import Authority


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ca")


@pytest.fixture
def settings(authority: Authority, tmp_path: Path) -> dict[str, object]:
    certificate, key = authority.issue(tmp_path, "server")
    return {"ssl": True, "ssl_cert_file": str(certificate), "ssl_key_file": key.name, "work_mem": "8MB"}


def test_pair_that_fits_passes_and_relative_paths_are_of_the_data_directory(
    tmp_path: Path, settings: dict[str, object], authority: Authority
) -> None:
    check({**settings, "ssl_ca_file": str(authority.certificate)}, str(tmp_path))
    assert files(settings, "/data")["ssl_key_file"] == "/data/server.key"
    check({"work_mem": "8MB"}, str(tmp_path))


def test_key_of_another_certificate_is_refused(
    tmp_path: Path, settings: dict[str, object], authority: Authority
) -> None:
    authority.issue(tmp_path, "other")
    with pytest.raises(PitrError, match="of each other"):
        check({**settings, "ssl_key_file": "other.key"}, str(tmp_path))


def test_cut_certificate_is_refused(tmp_path: Path, settings: dict[str, object]) -> None:
    path = tmp_path / "server.crt"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(PitrError, match="could not use the certificate"):
        check(settings, str(tmp_path))


@pytest.mark.parametrize("name", ["ssl_cert_file", "ssl_key_file", "ssl_ca_file"])
def test_file_that_is_not_there_is_named(tmp_path: Path, settings: dict[str, object], name: str) -> None:
    with pytest.raises(PitrError, match=f"{name} is .*/gone"):
        check({**settings, name: "gone"}, str(tmp_path))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644])
def test_key_that_others_may_read_is_refused(tmp_path: Path, settings: dict[str, object], mode: int) -> None:
    os.chmod(tmp_path / "server.key", mode)
    with pytest.raises(PitrError, match="would not use the key"):
        check(settings, str(tmp_path))


def test_file_that_was_moved_into_place_is_newer_whatever_its_own_time(tmp_path: Path) -> None:
    old, new = tmp_path / "a", tmp_path / "b"
    old.touch()
    time.sleep(0.01)
    loaded = time.time()
    assert not newer_than([str(old)], loaded)
    time.sleep(0.01)
    new.touch()
    os.utime(new, (1, 1))
    new.rename(old)
    assert newer_than([str(old)], loaded)
