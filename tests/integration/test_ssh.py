# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A repository behind a real sshd: what push and get do there, and what happens when the link or the keys are wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ansible_collections.pgdrill.pitr.tests.integration.ssh_support import Access, Sshd
from ansible_collections.pgdrill.pitr.tests.unit.support import MIB, make_repository, put, segment, tree, wal_name


@pytest.fixture
def access(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Access]:
    """An empty repository with the cluster ``main`` behind a running sshd."""
    folder = make_repository(tmp_path / "the repository's place")
    sshd = Sshd(tmp_path / "sshd")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    made = Access(sshd, Path(folder.repository), tmp_path)
    sshd.start()
    yield made
    sshd.stop()


def test_segment_goes_there_and_back(access: Access, tmp_path: Path) -> None:
    content = segment(1, 5)
    path = put(tmp_path / "pg_wal", wal_name(1, 5), content)
    pushed = access.push(path)
    assert (pushed.returncode, pushed.stderr) == (0, "")
    got = access.get(wal_name(1, 5), tmp_path / "got")
    assert (got.returncode, got.stderr) == (0, "")
    assert (tmp_path / "got").read_bytes() == content
