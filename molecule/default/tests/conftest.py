# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The hosts, over podman."""

from __future__ import annotations

import os
from typing import Any

import pytest
import testinfra


def host(name: str) -> Any:
    return testinfra.get_host(f"podman://pgdrill-{os.environ['PGDRILL_MOLECULE']}-{name}")


@pytest.fixture(scope="session")
def primary() -> Any:
    return host("primary")


@pytest.fixture(scope="session")
def repository() -> Any:
    return host("repository")
