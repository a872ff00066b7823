# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The hosts by what they do in the inventory that the scenario began with."""

from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.pgdrill.pitr.molecule.shared.hosts import HAS_RECEIVER, OVER_SSH, group, host


@pytest.fixture(scope="session")
def primary() -> Any:
    return host(group("postgresql_primary")[0])


@pytest.fixture(scope="session")
def repository() -> Any:
    return host(group("pitr_repository")[0])


_PARTS = {"receiver": HAS_RECEIVER, "ssh": OVER_SSH}


def pytest_configure(config: pytest.Config) -> None:
    """Tests of what not every scenario has."""
    for part in _PARTS:
        config.addinivalue_line("markers", f"{part}: only where the scenario has it")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Take away the tests of what this scenario does not have."""
    lacking = [part for part, there in _PARTS.items() if not there]
    items[:] = [item for item in items if not any(item.get_closest_marker(part) for part in lacking)]
