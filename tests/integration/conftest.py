# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Servers that tests share, and factories for those they break.

``PGDRILL_TEST_BIN_DIR`` chooses PostgreSQL (default: the one of the sandbox). Shared fixtures are never written to by a
test; what breaks something works on a copy.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.pgdrill.pitr.plugins.module_utils.catalog import Backup
from ansible_collections.pgdrill.pitr.tests.integration.support import (
    Commit,
    Restored,
    Sandbox,
    Server,
    Storage,
    fingerprint,
    make_template,
)

CHECKOUT = Path(__file__).resolve().parents[2]


def pytest_configure() -> None:
    """Before there are workers: all of them have to choose the same sample of test_exactness.py."""
    os.environ.setdefault("PGDRILL_TEST_EXACT_SEED", str(random.SystemRandom().randrange(10**6)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of several PostgreSQLs one is enough for what knows no versions: the newest, or the one that the marker names."""
    majors = [int(major) for major in os.environ.get("PGDRILL_TEST_MAJORS", "").split()]
    if len(majors) < 2:
        return
    this = int(os.environ["PGDRILL_TEST_PG"])

    def runs(item: pytest.Item) -> bool:
        marker = item.get_closest_marker("once")
        return marker is None or this == next((major for major in marker.args if major in majors), max(majors))

    items[:] = [item for item in items if runs(item)]


def pytest_report_header() -> str:
    return f"exactness: PGDRILL_TEST_EXACT_SEED={os.environ['PGDRILL_TEST_EXACT_SEED']}"


@pytest.fixture(scope="session")
def bin_dir() -> str:
    """PostgreSQL's programs."""
    if os.geteuid() == 0:
        pytest.fail("PostgreSQL does not run as root. Run `make test`, which starts pytest as another user.")
    value = os.environ.get("PGDRILL_TEST_BIN_DIR")
    if not value:
        config = CHECKOUT / ".sandbox" / "sandbox.yml"
        if not config.exists():
            pytest.fail("There is no PostgreSQL to test with. Run `make test`, or set PGDRILL_TEST_BIN_DIR.")
        value = yaml.safe_load(config.read_text(encoding="utf-8"))["bin_dir"]
    return str(value)


@pytest.fixture(scope="session")
def major(bin_dir: str) -> int:
    """PostgreSQL's major version."""
    from ansible_collections.pgdrill.pitr.plugins.module_utils.postgres import binary_version

    return binary_version(bin_dir)


@pytest.fixture(scope="session")
def other_bin_dir(bin_dir: str) -> str:
    """The programs of another major version, where the sandbox has one."""
    for path in sorted(Path(bin_dir).parent.parent.glob("*/bin")):
        if path != Path(bin_dir) and (path / "pg_controldata").exists():
            return str(path)
    pytest.skip("the sandbox holds only one PostgreSQL")


@pytest.fixture(scope="session")
def template(bin_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stopped cluster to copy."""
    data = tmp_path_factory.mktemp("template") / "data"
    make_template(bin_dir, data)
    return data


@pytest.fixture(scope="session")
def stranger(bin_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stopped cluster with another system identifier."""
    data = tmp_path_factory.mktemp("stranger") / "data"
    make_template(bin_dir, data)
    return data


class History:
    """The life of one primary: three backups, phases after each of them, everything archived, stopped in the end.

    ``commits`` are all phases in order; ``epoch`` finds those that follow a backup.
    """

    LABELS = ("first", "second", "third")

    def __init__(self, sandbox: Sandbox) -> None:
        self.sandbox = sandbox
        self.backups: dict[str, Backup] = {}
        self.commits: list[Commit] = [sandbox.commit("born")]
        self.points: dict[str, str] = {}
        for label in self.LABELS:
            self.backups[label] = sandbox.backup(label)
            for number in (1, 2, 3):
                self.commits.append(sandbox.commit(f"{label} {number}"))
                if number == 2:
                    name = f"point after {label} 2"
                    self.points[label] = name
                    sandbox.server.sql("SELECT pg_create_restore_point(%s)", name)
                sandbox.fill(1)
        self.commits.append(sandbox.commit("end"))
        sandbox.probe()
        self.data = sandbox.server.data
        sandbox.server.stop()

    @property
    def storage(self) -> Storage:
        return self.sandbox

    def commit(self, phase: str) -> Commit:
        return next(commit for commit in self.commits if commit.phase == phase)

    def before(self, phase: str) -> str:
        """The phase that was overwritten by this one."""
        phases = [commit.phase for commit in self.commits]
        return phases[phases.index(phase) - 1]


@pytest.fixture(scope="session")
def history(bin_dir: str, template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[History]:
    """Shared, read-only: a repository with three backups and the WAL between them."""
    sandbox = Sandbox(bin_dir, tmp_path_factory.mktemp("history"), template)
    try:
        sandbox.server.start()
        history = History(sandbox)
        before = fingerprint(sandbox.archive, sandbox.backups, history.data)
        yield history
        assert fingerprint(sandbox.archive, sandbox.backups, history.data) == before, (
            "a test has written to what all share"
        )
    finally:
        sandbox.server.close()


@pytest.fixture
def sandbox(bin_dir: str, template: Path, tmp_path: Path) -> Iterator[Callable[..., Sandbox]]:
    """Makes a running primary of the test's own: ``sandbox(settings={…})``."""
    made: list[Sandbox] = []

    def make(**options: Any) -> Sandbox:
        start = options.pop("start", True)
        made.append(Sandbox(bin_dir, tmp_path / f"sandbox{len(made)}", template, **options))
        if start:
            made[-1].server.start()
        return made[-1]

    yield make
    for one in made:
        one.server.close()


@pytest.fixture
def restored(tmp_path: Path) -> Iterator[Callable[..., Restored]]:
    """Restores into a directory of the test's own and stops what was started: ``restored(storage, {target})``."""
    made: list[Restored] = []

    def make(storage: Storage, options: dict[str, Any] | None = None, **more: Any) -> Restored:
        data = more.pop("data", None) or tmp_path / f"restored{len(made)}" / "data"
        data.parent.mkdir(parents=True, exist_ok=True)
        made.append(Restored(storage, data, options, **more))
        return made[-1]

    yield make
    for one in made:
        one.server.close()


@pytest.fixture
def own_data(history: History, tmp_path: Path) -> Path:
    """A copy of the stopped primary's own data directory, which does not archive into the shared repository."""
    data = tmp_path / "own" / "data"
    data.parent.mkdir()
    shutil.copytree(history.data, data)
    (data / "conf.d" / "90-copy.conf").write_text("archive_mode = off\n", encoding="ascii")
    return data


@pytest.fixture
def server(bin_dir: str) -> Iterator[Callable[[Path], Server]]:
    """A server on a directory that is there already; stopped in the end."""
    made: list[Server] = []

    def make(data: Path) -> Server:
        made.append(Server(bin_dir, data))
        return made[-1]

    yield make
    for one in made:
        one.close()
