# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Directories that go, whoever else is at work in them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils.unfinished import remove_tree


def test_directory_in_which_somebody_else_clears_away_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = tmp_path / "tree"
    (tree / "pg_wal" / ".pitr-get").mkdir(parents=True)
    removed = os.rmdir

    def somebody_first(path: Any, *arguments: Any, **more: Any) -> None:
        if str(path).endswith(".pitr-get") and (tree / "pg_wal" / ".pitr-get").exists():
            removed(tree / "pg_wal" / ".pitr-get")
        removed(path, *arguments, **more)

    monkeypatch.setattr(os, "rmdir", somebody_first)
    remove_tree(str(tree))
    assert not tree.exists()
    remove_tree(str(tree))


def test_what_cannot_be_removed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tree").mkdir()

    def refused(path: Any, *_arguments: Any, **_more: Any) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "rmdir", refused)
    with pytest.raises(PermissionError):
        remove_tree(str(tmp_path / "tree"))
