# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Incremental backups: what they may build upon, and that a restored chain is the cluster it was taken from.

::

    [full]  changes  [one]  tables come and go  [two]  a relation shrinks, a tablespace goes  [three]  after
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils import combine, locks
from ansible_collections.pgdrill.pitr.plugins.module_utils.backup import BaseBackup, BasisError, stored_backups
from ansible_collections.pgdrill.pitr.plugins.module_utils.catalog import Backup, chain
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.plugins.module_utils.expire import Expiry
from ansible_collections.pgdrill.pitr.plugins.module_utils.incremental import Basis
from ansible_collections.pgdrill.pitr.plugins.module_utils.index import scan
from ansible_collections.pgdrill.pitr.plugins.module_utils.info import backup_info
from ansible_collections.pgdrill.pitr.plugins.module_utils.plan import RefusedError
from ansible_collections.pgdrill.pitr.plugins.module_utils.retention import Policy
from ansible_collections.pgdrill.pitr.plugins.module_utils.verify import Verification, choose
from ansible_collections.pgdrill.pitr.tests.integration.support import (
    Identity,
    Restored,
    Sandbox,
    Server,
    Storage,
    fingerprint,
    flip,
    in_child,
    refuses_to_start,
    until,
)

Restore = Callable[..., Restored]
MakeSandbox = Callable[..., Sandbox]
Chained = Callable[..., Sandbox]
SUMMARIZE = {"summarize_wal": "on"}


@pytest.fixture
def since_17(major: int) -> None:
    if major < 17:
        pytest.skip("incremental backups begin with PostgreSQL 17")


def _take(primary: Sandbox, label: str = "", kind: str = "incremental", **options: Any) -> tuple[Backup, str]:
    """A backup, and why it is of its type."""
    named = ("parent", "full_every", "max_chain")
    basis = Basis(primary.folder, primary.server.login, kind, **{k: v for k, v in options.items() if k in named})
    more = {key: value for key, value in options.items() if key not in named}
    work = BaseBackup(primary.folder, primary.server.login, primary.bin_dir, label=label, basis=basis, **more)
    return work.take(), work.reason


def _dump(server: Server) -> str:
    """Everything that the cluster is, as pg_dumpall tells it; tablespaces by name and not by place."""
    made = server.program("pg_dumpall", "-h", server.socket, "-p", str(server.PORT), "-U", "postgres")
    assert made.returncode == 0, made.stderr
    lines = made.stdout.split("\n")
    return "\n".join(line for line in lines if not line.startswith(("CREATE TABLESPACE", "\\restrict", "\\unrestrict")))


class Chain:
    """The life above. Shared, read-only, the primary stopped in the end; ``dump`` is its last state."""

    LABELS = ("full", "one", "two", "three")

    def __init__(self, sandbox: Sandbox, directory: Path) -> None:
        self.storage: Storage = sandbox
        self.data = sandbox.server.data
        sql = sandbox.server.sql
        self.places = {name: directory / name for name in ("kept", "dropped", "late")}
        for place in self.places.values():
            place.mkdir(mode=0o700)
        sql(f"CREATE TABLESPACE kept LOCATION '{self.places['kept']}'")
        sql(f"CREATE TABLESPACE dropped LOCATION '{self.places['dropped']}'")
        sql("CREATE TABLE far TABLESPACE kept AS SELECT i, repeat('far', 20) t FROM generate_series(1, 4000) i")
        sql("CREATE TABLE short_lived TABLESPACE dropped AS SELECT i FROM generate_series(1, 1000) i")
        sql("CREATE TABLE big AS SELECT i, 0 AS v, repeat('b', 100) t FROM generate_series(1, 20000) i")
        sql("CREATE INDEX big_i ON big (i)")
        sql("CREATE TABLE shrinks AS SELECT i, repeat('s', 100) t FROM generate_series(1, 20000) i")
        sql("CREATE TABLE emptied AS SELECT i FROM generate_series(1, 20000) i")
        sql("CREATE TABLE gone AS SELECT i FROM generate_series(1, 5000) i")
        self.backups = {"full": sandbox.backup("full")}
        sandbox.commit("one 1")
        sql("UPDATE big SET v = 1 WHERE i % 500 = 0")
        sql("UPDATE far SET t = 'one' WHERE i = 7")
        self._next(sandbox, "one")
        sql("DROP TABLE gone")
        sql("CREATE TABLE gone AS SELECT i, 'again' t FROM generate_series(1, 300) i")
        sql("CREATE TABLE fresh AS SELECT i FROM generate_series(1, 3000) i")
        sql("TRUNCATE emptied")
        sql("INSERT INTO emptied SELECT generate_series(1, 10)")
        sql(f"CREATE TABLESPACE late LOCATION '{self.places['late']}'")
        sql("CREATE TABLE later TABLESPACE late AS SELECT i FROM generate_series(1, 2000) i")
        sql("DROP TABLE short_lived")
        sql("CREATE DATABASE other TEMPLATE postgres STRATEGY file_copy")
        sandbox.fill(20)
        self._next(sandbox, "two")
        sql("DELETE FROM shrinks WHERE i > 100")
        sql("VACUUM (TRUNCATE) shrinks")
        sql("DELETE FROM big WHERE i > 15000")
        sql("VACUUM FULL big")
        sql("DROP TABLESPACE dropped")
        sql("CHECKPOINT")
        self._next(sandbox, "three")
        sql("UPDATE far SET t = 'after' WHERE i = 8")
        sandbox.commit("end")
        self.dump = _dump(sandbox.server)
        sandbox.probe()
        sandbox.server.stop()

    def _next(self, sandbox: Sandbox, label: str) -> None:
        sandbox.commit(f"before {label}")
        self.backups[label], _reason = _take(sandbox, label)
        sandbox.commit(f"after {label}")

    def mapping(self, directory: Path) -> dict[str, str]:
        """Other places for all tablespaces."""
        return {str(place): str(directory / name) for name, place in self.places.items() if name != "dropped"}


@pytest.fixture(scope="session")
def chained(bin_dir: str, major: int, template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    """Shared, read-only."""
    if major < 17:
        pytest.skip("incremental backups begin with PostgreSQL 17")
    directory = tmp_path_factory.mktemp("chain")
    sandbox = Sandbox(bin_dir, directory, template, settings=SUMMARIZE)
    try:
        sandbox.server.start()
        made = Chain(sandbox, directory)
        before = fingerprint(sandbox.archive, sandbox.backups, made.data, *made.places.values())
        yield made
        after = fingerprint(sandbox.archive, sandbox.backups, made.data, *made.places.values())
        assert after == before, "a test has written to what all share"
    finally:
        sandbox.server.close()


def _no_scratch(*places: Path) -> None:
    assert not [path for place in places for path in place.rglob(f"*{combine.SCRATCH}*")]


# --- chains and their restore


def test_chain_is_stored_like_fulls(chained: Chain) -> None:
    stored = {backup.label: backup for backup in stored_backups(chained.storage.folder)}
    assert [stored[label].type for label in Chain.LABELS] == ["full", *["incremental"] * 3]
    assert [stored[label].parent for label in Chain.LABELS] == [None, "full", "one", "two"]
    assert stored["one"].stored_bytes < stored["full"].stored_bytes / 2
    assert [link.label for link in chain(stored["three"], stored)] == list(Chain.LABELS)
    assert all(window["restorable"] for window in backup_info(chained.storage.folder)["recovery_windows"])


def test_restored_chain_is_the_cluster_it_was_taken_from(chained: Chain, restored: Restore, tmp_path: Path) -> None:
    mapping = chained.mapping(tmp_path / "spaces")
    cluster = restored(chained.storage, tablespace_mapping=mapping)
    assert [link.label for link in cluster.plan.chain] == list(Chain.LABELS)
    _no_scratch(cluster.server.data, tmp_path / "spaces")
    assert not (cluster.server.data / "backup_manifest").exists()
    links = {os.readlink(link) for link in (cluster.server.data / "pg_tblspc").iterdir()}
    assert links == set(mapping.values())
    cluster.run()
    assert cluster.phase == "end"
    assert _dump(cluster.server) == chained.dump
    # Every page of every relation, not only what a dump reads.
    cluster.server.stop()
    checked = cluster.server.program("pg_checksums", "--check", "-D", str(cluster.server.data))
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("label", Chain.LABELS)
def test_every_link_can_be_restored(chained: Chain, restored: Restore, tmp_path: Path, label: str) -> None:
    mapping = {str(place): str(tmp_path / "spaces" / name) for name, place in chained.places.items()}
    taken = {item.location for item in chained.backups[label].tablespaces}
    used = {old: new for old, new in mapping.items() if old in taken}
    cluster = restored(chained.storage, {"recovery_target": "immediate"}, backup=label, tablespace_mapping=used).run()
    assert cluster.phase == (f"before {label}" if label != "full" else "template")
    expected = chained.backups[label]
    assert cluster.plan.to_dict()["backup_bytes"] == expected.directory_bytes


@pytest.mark.parametrize("method", ["--clone", "--link", "--copy-file-range", "--copy"])
def test_every_way_to_copy(
    chained: Chain, restored: Restore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, major: int, method: str
) -> None:
    offered = combine.methods([str(tmp_path)], major)
    if method not in offered:
        pytest.skip("not on this filesystem, or not with this version")
    monkeypatch.setattr(combine, "methods", lambda directories, version: [method])
    cluster = restored(chained.storage, tablespace_mapping=chained.mapping(tmp_path / "spaces"))
    files = [path for path in (cluster.server.data / "base").rglob("*") if path.is_file()]
    assert all(path.stat().st_nlink == 1 for path in files)
    assert _dump(cluster.run().server) == chained.dump


def test_size_of_the_result_is_known_when_the_backup_is_taken(
    chained: Chain, restored: Restore, tmp_path: Path
) -> None:
    """Within what the server adds and removes: backup_label, and what a restore writes."""
    cluster = restored(chained.storage, tablespace_mapping=chained.mapping(tmp_path / "spaces"))
    places = (cluster.server.data, tmp_path / "spaces")
    written = sum(path.stat().st_size for place in places for path in place.rglob("*") if path.is_file())
    assert abs(written - chained.backups["three"].directory_bytes) < 64 * 1024
