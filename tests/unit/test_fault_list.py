# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""docs/faults.md names the test of every fault: there is one of that name."""

from __future__ import annotations

import re
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]


def test_tests_that_the_list_of_faults_names_exist() -> None:
    text = (TOP / "docs" / "faults.md").read_text(encoding="utf-8")
    named = re.findall(r"`(test_[a-z0-9_]+)(…?)`", text)
    assert len(named) > 25
    defined = {
        name
        for path in (TOP / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    unknown = [name for name, cut in named if not any(one == name or (cut and one.startswith(name)) for one in defined)]
    assert unknown == []


def test_files_that_the_list_of_faults_names_exist() -> None:
    text = (TOP / "docs" / "faults.md").read_text(encoding="utf-8")
    for name in re.findall(r"\(`((?:unit/)?test_\w+\.py)`\)", text):
        assert list((TOP / "tests").rglob(name.removeprefix("unit/"))), name
