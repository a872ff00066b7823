# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Incremental backups: what they may build upon, and that a restored chain is the cluster it was taken from.

::

    [full]  changes  [one]  tables come and go  [two]  a relation shrinks, a tablespace goes  [three]  after
"""

from __future__ import annotations

import datetime
import os
import shutil
import signal
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils import combine, locks
from ansible_collections.pgdrill.pitr.plugins.module_utils.backup import BaseBackup
from ansible_collections.pgdrill.pitr.plugins.module_utils.catalog import Backup, chain
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.plugins.module_utils.expire import Expiry
from ansible_collections.pgdrill.pitr.plugins.module_utils.incremental import Basis
from ansible_collections.pgdrill.pitr.plugins.module_utils.index import scan
from ansible_collections.pgdrill.pitr.plugins.module_utils.info import backup_info
from ansible_collections.pgdrill.pitr.plugins.module_utils.plan import RefusedError
from ansible_collections.pgdrill.pitr.plugins.module_utils.repository import ClusterFolder
from ansible_collections.pgdrill.pitr.plugins.module_utils.restore import Restore as Engine
from ansible_collections.pgdrill.pitr.plugins.module_utils.retention import Policy
from ansible_collections.pgdrill.pitr.plugins.module_utils.stored import stored_backups
from ansible_collections.pgdrill.pitr.plugins.module_utils.verify import Verification, choose
from ansible_collections.pgdrill.pitr.tests.integration.ssh_support import Access, Sshd, private_place
from ansible_collections.pgdrill.pitr.tests.integration.support import (
    CLUSTER,
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
        # Not compressed, so that nothing but the manifest tells a changed byte.
        self.backups = {"full": sandbox.backup("full", compression="none")}
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
        self.backups[label], _reason = _take(sandbox, label, compression="none")
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


def test_target_between_two_links_begins_with_the_older_one(chained: Chain, restored: Restore, tmp_path: Path) -> None:
    target = {"recovery_target_lsn": str(chained.backups["two"].stop_lsn), "recovery_target_inclusive": False}
    taken = {item.location for item in chained.backups["two"].tablespaces}
    mapping = {str(place): str(tmp_path / "spaces" / place.name) for place in chained.places.values()}
    used = {old: new for old, new in mapping.items() if old in taken}
    cluster = restored(chained.storage, target, tablespace_mapping=used).run()
    assert [link.label for link in cluster.plan.chain] == ["full", "one", "two"]
    assert cluster.phase == "before two"
    assert cluster.server.value("SELECT count(*) FROM gone") == 300


@pytest.mark.parametrize("label", ["full", "two"])
def test_missing_link_is_refused_by_name(chained: Chain, tmp_path: Path, label: str) -> None:
    storage = chained.storage.copy(tmp_path / "copy")
    shutil.rmtree(storage.backups / label)
    before = fingerprint(tmp_path)
    with pytest.raises(RefusedError) as caught:
        storage.plan(tmp_path / "new", backup="three", tablespace_mapping=chained.mapping(tmp_path / "spaces"))
    assert [item.code for item in caught.value.refusals] == ["backup_damaged"]
    child = Chain.LABELS[Chain.LABELS.index(label) + 1]
    assert f"three: the parent {label} of {child} is missing" in caught.value.message
    assert fingerprint(tmp_path) == before


def test_damaged_link_is_refused_by_name_and_file(chained: Chain, tmp_path: Path) -> None:
    storage = chained.storage.copy(tmp_path / "copy")
    stored = next(path for path in (storage.backups / "one").iterdir() if path.name.startswith("base.tar"))
    os.truncate(stored, stored.stat().st_size - 1)
    before = fingerprint(tmp_path)
    with pytest.raises(RefusedError) as caught:
        storage.plan(tmp_path / "new", backup="three", tablespace_mapping=chained.mapping(tmp_path / "spaces"))
    assert f"three: one, which it builds upon: {stored} has" in caught.value.message
    # The full one before it is whole. Beyond its end the living server has made a tablespace.
    taken = {item.location for item in chained.backups["full"].tablespaces}
    mapping = {place: str(tmp_path / "spaces" / Path(place).name) for place in taken}
    found = storage.plan(tmp_path / "new", {"recovery_target": "immediate"}, tablespace_mapping=mapping)
    assert found.backup.label == "full"
    assert fingerprint(tmp_path) == before


def _flip_in(storage: Storage, label: str) -> Path:
    """Change one byte of a file of the cluster in a backup; no size and no tar header tells."""
    stored = storage.backups / label / "base.tar"
    with tarfile.open(stored) as tar:
        offset = next(m.offset_data for m in tar if m.size > 1000 and m.name.startswith("base/"))
    flip(stored, offset + 900)
    return stored


@pytest.mark.parametrize("label", Chain.LABELS)
def test_link_with_other_content_is_found_before_it_is_combined(chained: Chain, tmp_path: Path, label: str) -> None:
    storage = chained.storage.copy(tmp_path / "copy")
    stored = _flip_in(storage, label)
    data = tmp_path / "new" / "data"
    request = storage.request(data, backup="three", tablespace_mapping=chained.mapping(tmp_path / "spaces"))
    engine = Engine(request)
    plan = engine.plan()
    before = fingerprint(storage.backups)
    with pytest.raises(PitrError, match=stored.name):
        engine.execute(plan)
    assert fingerprint(storage.backups) == before
    assert not data.exists()
    assert not [path for path in (tmp_path / "spaces").rglob("*") if path.is_file()]


def _other_combinebackup(bin_dir: str, programs: Path, script: str) -> Path:
    """PostgreSQL's programs, with a shell script in the place of one; ``$real`` is that one."""
    programs.mkdir()
    for path in Path(bin_dir).iterdir():
        (programs / path.name).symlink_to(path)
    (programs / "pg_combinebackup").unlink()
    text = f"#!/bin/sh\nreal={bin_dir}/pg_combinebackup\n{script}\n"
    (programs / "pg_combinebackup").write_text(text, encoding="ascii")
    (programs / "pg_combinebackup").chmod(0o755)
    return programs


def test_platform_without_a_way_to_copy_uses_the_next(
    chained: Chain, restored: Restore, tmp_path: Path, bin_dir: str
) -> None:
    script = """case " $* " in *" --copy "*) exec "$real" "$@";; esac
echo "pg_combinebackup: error: file cloning not supported on this platform" >&2; exit 1"""
    programs = _other_combinebackup(bin_dir, tmp_path / "bin", script)
    mapping = chained.mapping(tmp_path / "spaces")
    cluster = restored(chained.storage, tablespace_mapping=mapping, bin_dir=str(programs))
    assert cluster.run().phase == "end"


def test_failed_combination_leaves_everything_as_it_was(chained: Chain, tmp_path: Path, bin_dir: str) -> None:
    programs = _other_combinebackup(bin_dir, tmp_path / "bin", 'echo "error: the disk is on fire" >&2; exit 1')
    data = tmp_path / "new" / "data"
    shutil.copytree(chained.data, data)
    (tmp_path / "spaces").mkdir()
    mapping = chained.mapping(tmp_path / "spaces")
    engine = Engine(chained.storage.request(data, force=True, tablespace_mapping=mapping, bin_dir=str(programs)))
    plan = engine.plan()
    before = fingerprint(data)
    with pytest.raises(PitrError, match="could not combine full, one, two, three: error: the disk is on fire"):
        engine.execute(plan)
    assert fingerprint(data) == before
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["data"]
    _no_scratch(tmp_path / "spaces")


def test_result_that_is_not_whole_is_not_used(chained: Chain, tmp_path: Path, bin_dir: str) -> None:
    """A pg_combinebackup that loses a byte, and does not notice."""
    spoil = 'while [ "$1" != --output ]; do shift; done; printf 0 | dd of="$2"/PG_VERSION conv=notrunc status=none'
    programs = _other_combinebackup(bin_dir, tmp_path / "bin", f'"$real" "$@" || exit\n{spoil}')
    data = tmp_path / "new" / "data"
    mapping = chained.mapping(tmp_path / "spaces")
    engine = Engine(chained.storage.request(data, tablespace_mapping=mapping, bin_dir=str(programs)))
    plan = engine.plan()
    with pytest.raises(PitrError, match="What pg_combinebackup has made of full, one, two, three is not whole"):
        engine.execute(plan)
    assert not data.exists()


def test_room_for_the_links_is_counted(chained: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    last = chained.backups["three"]
    links = [chained.backups[label] for label in Chain.LABELS]
    unpacked = sum(link.database_bytes for link in links)
    monkeypatch.setattr(combine, "_can_share", lambda directory, version: False)
    assert combine.needed_bytes(links, str(tmp_path)) == unpacked + last.directory_bytes
    free = last.directory_bytes + 5 * last.wal_segment_size

    class Full:
        f_bavail, f_frsize = free, 1

    monkeypatch.setattr(os, "statvfs", lambda path: Full)
    before = fingerprint(tmp_path)
    with pytest.raises(RefusedError) as caught:
        chained.storage.plan(tmp_path / "new", tablespace_mapping=chained.mapping(tmp_path / "spaces"))
    assert [item.code for item in caught.value.refusals] == ["space"]
    assert fingerprint(tmp_path) == before


def _killed(request: Any, below: str = "", prelude: str = "", at: int = 0) -> None:
    result = in_child(request, below=below, prelude=prelude, at=at)
    assert result.returncode == -signal.SIGKILL, result.stderr


# The child dies while pg_combinebackup, which outlives it, is at work.
_WHILE_COMBINING = """
from ansible_collections.pgdrill.pitr.plugins.module_utils import combine
original = combine.subprocess.Popen
def popen(argv, **options):
    if not argv[0].endswith("/pg_combinebackup"):
        return original(argv, **options)
    original(["/bin/sh", "-c", 'sleep 2; exec "$0" "$@"', *argv], **options)
    os.kill(os.getpid(), signal.SIGKILL)
combine.subprocess.Popen = popen
"""


@pytest.mark.parametrize("moment", ["unpacking", "combining", "moving up", "clearing"])
def test_killed_while_combining_can_be_repeated(
    chained: Chain, restored: Restore, tmp_path: Path, bin_dir: str, moment: str
) -> None:
    data = tmp_path / "new" / "data"
    mapping = chained.mapping(tmp_path / "spaces")
    request = chained.storage.request(data, tablespace_mapping=mapping)
    scratch = data / combine.SCRATCH
    if moment == "unpacking":
        _killed(request, below=f"{scratch}/2/")
    elif moment == "combining":
        _killed(request, prelude=_WHILE_COMBINING)
        # Until it has ended, nobody clears away what it writes.
        with pytest.raises(RefusedError) as caught:
            chained.storage.plan(data, tablespace_mapping=mapping)
        assert "restore_running" in [item.code for item in caught.value.refusals]
        until(lambda: not combine.is_busy(str(data)), "the end of pg_combinebackup")
        assert (scratch / "result" / "global" / "pg_control").exists()
    elif moment == "moving up":
        _killed(request, below=f"{scratch}/result/global")
    else:
        _killed(request, below=f"{data}/.tablespace_map")
        assert not scratch.exists()
    assert (data / "pitr-restoring.json").exists()
    assert not (data / "global" / "pg_control").exists()
    assert refuses_to_start(bin_dir, data)
    cluster = restored(chained.storage, data=data, tablespace_mapping=mapping).run()
    _no_scratch(data, tmp_path / "spaces")
    assert _dump(cluster.server) == chained.dump


def test_repeated_kills_at_every_step_leave_nothing_that_starts(
    chained: Chain, restored: Restore, tmp_path: Path, bin_dir: str
) -> None:
    """Into one place, again and again, over what the one before has left."""
    data = tmp_path / "new" / "data"
    mapping = chained.mapping(tmp_path / "spaces")
    request = chained.storage.request(data, tablespace_mapping=mapping)
    for at in (3, 40, 400, 1500, 3000):
        result = in_child(request, at=at)
        assert result.returncode == -signal.SIGKILL, result.stderr
        until(lambda: not combine.is_busy(str(data)), "the end of pg_combinebackup")
        assert not (data / "global" / "pg_control").exists()
        assert refuses_to_start(bin_dir, data)
    assert restored(chained.storage, data=data, tablespace_mapping=mapping).run().phase == "end"


def test_stored_chain_is_verified_whole(chained: Chain, bin_dir: str, tmp_path: Path) -> None:
    storage = chained.storage.copy(tmp_path / "copy")

    def reports() -> dict[str, bool]:
        folder = storage.folder
        backups = stored_backups(folder)
        work = Verification(folder, folder.chapter, backups, scan(folder), bin_dir)
        return {report.backup: not report.damage for report in map(work.verify, choose(backups, "latest"))}

    assert reports() == dict.fromkeys(Chain.LABELS, True)
    _flip_in(storage, "one")
    assert reports() == {**dict.fromkeys(Chain.LABELS, True), "one": False}


def test_chain_expires_whole_or_not_at_all(sandbox: MakeSandbox, restored: Restore, since_17: None) -> None:
    primary = sandbox(settings=SUMMARIZE)
    primary.backup("old")
    for label in ("old-1", "old-2"):
        primary.commit(label)
        _take(primary, label)
    primary.backup("new")
    _take(primary, "new-1", parent="new")
    primary.commit("end")
    primary.probe()
    primary.server.stop()
    kept = Expiry(primary.folder, Policy(keep_full=2)).run()
    assert kept["expired_backups"] == []
    # One that is read keeps its whole chain.
    with locks.reading(primary.folder, "old-1"):
        assert Expiry(primary.folder, Policy(keep_full=1)).run()["expired_backups"] == []
    gone = Expiry(primary.folder, Policy(keep_full=1)).run()
    assert [item["backup"] for item in gone["expired_backups"]] == ["old-2", "old-1", "old"]
    cluster = restored(primary).run()
    assert [link.label for link in cluster.plan.chain] == ["new", "new-1"]
    assert cluster.phase == "end"


def test_parent_stays_while_a_backup_builds_upon_it(
    sandbox: MakeSandbox, monkeypatch: pytest.MonkeyPatch, since_17: None
) -> None:
    primary = sandbox(settings=SUMMARIZE)
    primary.backup("old")
    primary.backup("new")
    seen: list[Any] = []
    original = BaseBackup._copy

    def copy(self: BaseBackup, *arguments: Any) -> None:
        seen.append(Expiry(primary.folder, Policy(keep_full=1)).run()["expired_backups"])
        original(self, *arguments)

    monkeypatch.setattr(BaseBackup, "_copy", copy)
    _take(primary, "child", parent="old")
    assert seen == [[]]
    assert {backup.label for backup in stored_backups(primary.folder)} == {"old", "new", "child"}


def test_parent_of_a_backup_that_became_visible_while_expire_was_deciding_stays(
    sandbox: MakeSandbox, monkeypatch: pytest.MonkeyPatch, since_17: None
) -> None:
    """Between the list of backups and the lock on the one that is to go."""
    primary = sandbox(settings=SUMMARIZE)
    primary.backup("old")
    primary.backup("new")
    original = locks.exclusive_use
    taken: list[str] = []

    def exclusive_use(folder: Any, label: str) -> Any:
        if not taken:
            taken.append(label)
            _take(primary, "child", parent="old")
        return original(folder, label)

    monkeypatch.setattr(locks, "exclusive_use", exclusive_use)
    Expiry(primary.folder, Policy(keep_full=1)).run()
    assert taken == ["old"]
    labels = {backup.label for backup in stored_backups(primary.folder)}
    # Whole or gone: the chain that nobody needs went with its new link, or all of it is there.
    assert labels in ({"new"}, {"old", "new", "child"})


def test_parent_that_is_just_being_removed_is_not_built_upon(sandbox: MakeSandbox, since_17: None) -> None:
    primary = sandbox(settings=SUMMARIZE)
    primary.backup("only")
    before = fingerprint(primary.backups)
    with locks.exclusive_use(primary.folder, "only"):
        with pytest.raises(PitrError, match=r"only, to build upon, is just being removed by an expire. No backup was"):
            _take(primary, "child")
        assert fingerprint(primary.backups) == before
        taken, reason = _take(primary, "other", "auto")
    assert taken.type == "full" and "is just being removed" in reason


# --- what an incremental backup may build upon


def _refused(primary: Sandbox, match: str, **options: Any) -> None:
    before = fingerprint(primary.backups)
    with pytest.raises(PitrError, match=match) as caught:
        _take(primary, **options)
    assert caught.value.message.endswith("No backup was taken.")
    assert fingerprint(primary.backups) == before


def test_versions_without_them_refuse(sandbox: MakeSandbox, major: int) -> None:
    if major >= 17:
        pytest.skip("this version takes incremental backups")
    primary = sandbox()
    primary.backup("only")
    _refused(primary, f"PostgreSQL {major} takes no incremental backups; they begin with 17")
    taken, reason = _take(primary, "auto", "auto")
    assert taken.type == "full" and "they begin with 17" in reason


def test_old_server_is_told_by_its_version_alone(sandbox: MakeSandbox) -> None:
    primary = sandbox(start=False)
    with pytest.raises(PitrError, match="PostgreSQL 16 takes no incremental backups"):
        Basis(primary.folder, primary.server.login).choose(None, {"version": 16})
    choice = Basis(primary.folder, primary.server.login, "auto").choose(None, {"version": 16})
    assert choice.parent is None and "PostgreSQL 16" in choice.reason


def test_server_that_summarizes_nothing_is_refused(sandbox: MakeSandbox, since_17: None) -> None:
    primary = sandbox()
    primary.backup("only")
    _refused(primary, r"summarize_wal = off.*primary_summarize_wal")
    taken, reason = _take(primary, "auto", "auto")
    assert taken.type == "full" and "summarize_wal = off" in reason


def test_summaries_with_a_hole_are_refused(sandbox: MakeSandbox, since_17: None) -> None:
    primary = sandbox(settings=SUMMARIZE)
    primary.backup("only")
    primary.configure({"summarize_wal": "off"})
    primary.server.sql("SELECT pg_reload_conf()")
    until(lambda: primary.server.show("summarize_wal") == "off", "the setting")
    primary.fill(30)
    primary.server.sql("CHECKPOINT")
    primary.probe()
    primary.server.sql("CHECKPOINT")
    primary.configure({"summarize_wal": "on"})
    primary.server.sql("SELECT pg_reload_conf()")
    until(lambda: primary.server.show("summarize_wal") == "on", "the setting")
    primary.fill(2)
    _refused(primary, "WAL summaries of .* LSN")
    taken, reason = _take(primary, "auto", "auto")
    assert taken.type == "full" and "WAL summaries" in reason
    # From now on there are enough again.
    taken, _reason = _take(primary, "again", "auto")
    assert (taken.type, taken.parent) == ("incremental", "auto")


def _summaries(primary: Sandbox, since: Backup) -> list[Path]:
    """Files with summaries of what came after the start of a backup, in order.

    The one that is being written is called temp.summary.
    """
    found = sorted((primary.server.data / "pg_wal" / "summaries").glob("[0-9A-F]*.summary"))
    return [path for path in found if int(path.stem[24:40], 16) > since.start_lsn]


def test_removed_summaries_are_noticed_before_the_copy(
    sandbox: MakeSandbox, monkeypatch: pytest.MonkeyPatch, since_17: None
) -> None:
    primary = sandbox(settings=SUMMARIZE)
    backup = primary.backup("only")
    for number in range(3):
        primary.fill(1)
        primary.server.sql("CHECKPOINT")
        until(lambda number=number: len(_summaries(primary, backup)) > number, "a summary")  # type: ignore[misc]
    _summaries(primary, backup)[1].unlink()

    def copy(self: BaseBackup, *arguments: Any) -> None:
        raise AssertionError("the copy has begun")

    monkeypatch.setattr(BaseBackup, "_copy", copy)
    _refused(primary, r"do not reach back to the start of only .* are not there")


def test_unknown_parent_is_refused(sandbox: MakeSandbox, since_17: None) -> None:
    primary = sandbox(settings=SUMMARIZE)
    _refused(primary, "no backup to build upon yet")
    primary.backup("only")
    _refused(primary, "There is no backup 'other' to build upon. There are: only", parent="other")


def test_damaged_parent_is_refused_and_passed_over(sandbox: MakeSandbox, restored: Restore, since_17: None) -> None:
    primary = sandbox(settings=SUMMARIZE)
    primary.backup("whole")
    primary.backup("broken")
    stored = next(path for path in (primary.backups / "broken").iterdir() if path.name.startswith("base.tar"))
    os.truncate(stored, 100)
    _refused(primary, f"broken cannot be built upon: {stored} has 100 bytes", parent="broken")
    primary.commit("in it")
    taken, _reason = _take(primary, "next")
    assert taken.parent == "whole"
    # Its own content tells, too.
    manifest = primary.backups / "next" / "backup_manifest"
    flip(manifest, 30)
    _refused(primary, "manifest of the parent next cannot be read: .* not the file that was stored", parent="next")


def test_parent_without_a_manifest_is_refused(sandbox: MakeSandbox, since_17: None) -> None:
    primary = sandbox(settings=SUMMARIZE)
    primary.backup("only")
    document = primary.backups / "only" / "backup.json"
    text = document.read_text(encoding="utf-8")
    document.write_text(text.replace("backup_manifest", "something_else"), encoding="utf-8")
    (primary.backups / "only" / "backup_manifest").rename(primary.backups / "only" / "something_else")
    _refused(primary, "The parent only was not taken by pg_basebackup with a manifest", parent="only")
    taken, reason = _take(primary, "auto", "auto")
    assert taken.type == "full" and "with a manifest" in reason


def test_parent_of_an_older_chapter_is_refused(sandbox: MakeSandbox, stranger: Path, since_17: None) -> None:
    primary = sandbox(settings=SUMMARIZE)
    backup = primary.backup("only")
    document = primary.backups / "only" / "backup.json"
    text = document.read_text(encoding="utf-8")
    other = str(int(backup.system_identifier) - 1)
    document.write_text(text.replace(backup.system_identifier, other), encoding="utf-8")
    _refused(primary, "an older chapter", parent="only")
    _refused(primary, "None of 1 backups can be built upon.*an older chapter")


def test_parent_newer_than_the_server_is_refused(sandbox: MakeSandbox, tmp_path: Path, since_17: None) -> None:
    """A server that somebody has set back, outside of PostgreSQL: a snapshot of its disks."""
    primary = sandbox(settings=SUMMARIZE)
    primary.backup("before")
    primary.server.stop()
    shutil.copytree(primary.server.data, tmp_path / "snapshot")
    primary.server.start()
    primary.fill(3)
    primary.backup("after")
    primary.server.stop()
    shutil.rmtree(primary.server.data)
    shutil.copytree(tmp_path / "snapshot", primary.server.data)
    primary.configure({"archive_command": "true"})
    primary.server.start()
    _refused(primary, "after ended at LSN .* and the server is only at", parent="after")


def _promote(primary: Sandbox) -> None:
    """Onto the next timeline, in its own directory."""
    primary.server.stop()
    (primary.server.data / "standby.signal").touch()
    primary.server.start()
    assert primary.server.value("SELECT pg_promote()")
    until(lambda: not primary.server.value("SELECT pg_is_in_recovery()"), "the promotion")


def test_chain_across_a_timeline_switch(sandbox: MakeSandbox, restored: Restore, since_17: None) -> None:
    primary = sandbox(settings=SUMMARIZE)
    primary.server.sql("CREATE TABLE numbers AS SELECT i FROM generate_series(1, 10000) i")
    primary.backup("one")
    primary.server.sql("DELETE FROM numbers WHERE i % 2 = 0")
    _take(primary, "two")
    _promote(primary)
    primary.server.sql("INSERT INTO numbers SELECT generate_series(1, 77)")
    primary.commit("on two")
    taken, _reason = _take(primary, "three")
    assert (taken.timeline, taken.parent) == (2, "two")
    primary.commit("end")
    truth = _dump(primary.server)
    primary.probe()
    primary.server.stop()
    cluster = restored(primary).run()
    assert [link.label for link in cluster.plan.chain] == ["one", "two", "three"]
    assert cluster.phase == "end" and _dump(cluster.server) == truth


def test_summaries_of_an_older_timeline_are_needed_too(
    sandbox: MakeSandbox, monkeypatch: pytest.MonkeyPatch, since_17: None
) -> None:
    primary = sandbox(settings=SUMMARIZE)
    backup = primary.backup("only")
    primary.fill(2)
    _promote(primary)
    primary.fill(2)
    primary.server.sql("CHECKPOINT")

    def of(timeline: int) -> list[Path]:
        return [path for path in _summaries(primary, backup) if path.name.startswith(f"{timeline:08X}")]

    until(lambda: of(1) and of(2), "summaries of both timelines")
    for path in of(1):
        path.unlink()
    monkeypatch.setattr(BaseBackup, "_copy", lambda *arguments: pytest.fail("the copy has begun"))
    _refused(primary, r"do not reach back to the start of only \(timeline 1")


def test_parent_on_another_branch_is_refused_and_passed_over(
    sandbox: MakeSandbox, restored: Restore, since_17: None
) -> None:
    """The server was restored to a point before its newest backup."""
    primary = sandbox(settings=SUMMARIZE)
    primary.backup("common")
    point = primary.commit("the point")
    primary.fill(2)
    primary.backup("abandoned")
    primary.probe()
    primary.server.stop()
    cluster = restored(primary, {"recovery_target_xid": str(point.xid)}, archive_after="same").run()
    cluster.recovery.accept()
    primary.server = cluster.server
    until(lambda: primary.server.value("SELECT timeline_id FROM pg_control_checkpoint()") == 2, "the new timeline")
    _refused(primary, "abandoned ended on timeline 1 .* not part of the past of the server's", parent="abandoned")
    # It summarized while it replayed, from where the backup began.
    taken, _reason = _take(primary, "next")
    assert (taken.parent, taken.timeline) == ("common", 2)
    primary.commit("end")
    primary.probe()
    primary.server.stop()
    again = restored(primary).run()
    assert [link.label for link in again.plan.chain] == ["common", "next"]
    assert again.phase == "end"


# --- auto


def test_auto_takes_what_is_due(sandbox: MakeSandbox, since_17: None) -> None:
    primary = sandbox(settings=SUMMARIZE)
    taken, reason = _take(primary, "first", "auto", full_every="7 days", max_chain=2)
    assert taken.type == "full" and "no backup to build upon yet" in reason
    for label in ("second", "third"):
        taken, reason = _take(primary, label, "auto", full_every="7 days", max_chain=2)
        assert taken.type == "incremental" and "is the newest backup" in reason
    taken, reason = _take(primary, "fourth", "auto", full_every="7 days", max_chain=2)
    assert taken.type == "full" and "chain of first has 2 incremental backups (max_chain)" in reason
    document = primary.backups / "fourth" / "backup.json"
    text = document.read_text(encoding="utf-8")
    old = (taken.started_at - datetime.timedelta(days=6, hours=23, minutes=30)).isoformat()
    document.write_text(text.replace(taken.started_at.isoformat(), old), encoding="utf-8")
    # Half an hour early is not too early.
    taken, reason = _take(primary, "fifth", "auto", full_every="7 days", max_chain=2)
    assert taken.type == "full" and "fourth is 167.5 hours old" in reason


def test_default_label_tells_the_type(sandbox: MakeSandbox, since_17: None) -> None:
    primary = sandbox(settings=SUMMARIZE)
    labels = [_take(primary, "", "auto")[0].label for _number in range(2)]
    assert labels[0].endswith("-full") and labels[1].endswith("-incr")


def test_auto_is_full_when_the_server_says_no_after_all(
    sandbox: MakeSandbox, monkeypatch: pytest.MonkeyPatch, since_17: None
) -> None:
    """The summaries are looked at before; what happens between is told by the server."""
    primary = sandbox(settings=SUMMARIZE)
    backup = primary.backup("only")
    primary.fill(2)
    primary.server.sql("CHECKPOINT")
    until(lambda: _summaries(primary, backup), "a summary")
    for path in (primary.server.data / "pg_wal" / "summaries").iterdir():
        path.unlink()
    monkeypatch.setattr(Basis, "_check_summaries", lambda *arguments: None)
    _refused(
        primary,
        r"are not enough to build upon only.*WAL summaries are required.*first unsummarized LSN in this range is .*\.",
    )
    taken, reason = _take(primary, "next", "auto")
    assert taken.type == "full" and "WAL summaries are required" in reason
    assert not list(primary.backups.glob(".*"))


def test_contradictory_options_are_refused(sandbox: MakeSandbox) -> None:
    primary = sandbox(start=False)
    for options, match in (
        ({"kind": "auto", "parent": "x"}, "parent names the backup 'x', and the type is auto"),
        ({"kind": "auto", "max_chain": -1}, "max_chain is -1"),
        ({"kind": "auto", "full_every": "7"}, "full_every '7' is not a span of time.*No backup was taken"),
    ):
        with pytest.raises(PitrError, match=match):
            Basis(primary.folder, primary.server.login, **options)  # type: ignore[arg-type]


# --- encrypted, and far away


def test_encrypted_chain(sandbox: MakeSandbox, restored: Restore, tmp_path: Path, since_17: None) -> None:
    key, other = Identity(tmp_path / "key"), Identity(tmp_path / "other")
    primary = sandbox(settings=SUMMARIZE)
    primary.encrypt_to(key.public)
    primary.backup("one")
    # Without the key its manifest says nothing to anybody, us included.
    _refused(primary, "manifest of the parent one cannot be read: .* no identity")
    taken, reason = _take(primary, "two", "auto")
    assert taken.type == "full" and "no identity" in reason
    primary.commit("in it")
    folder = ClusterFolder.open(str(primary.repository), CLUSTER, {"identity": str(key.path)})
    basis = Basis(folder, primary.server.login)
    BaseBackup(folder, primary.server.login, primary.bin_dir, label="three", basis=basis).take()
    stored = [path.name for path in (primary.backups / "three").iterdir()]
    assert all(name.endswith(".age") or name == "backup.json" for name in stored)
    primary.commit("end")
    primary.probe()
    primary.server.stop()
    for identity, code in (("", "identity_missing"), (str(other.path), "identity_wrong")):
        with pytest.raises(RefusedError) as caught:
            primary.plan(tmp_path / "new", identity=identity)
        assert code in [item.code for item in caught.value.refusals]
    cluster = restored(primary, identity=str(key.path)).run()
    assert [link.label for link in cluster.plan.chain] == ["two", "three"]
    assert cluster.phase == "end"


def test_parent_that_another_key_opens_is_refused_in_the_plan(
    sandbox: MakeSandbox, tmp_path: Path, since_17: None
) -> None:
    """The recipients were changed in the middle of a chain, and here is only the new key."""
    old = Identity(tmp_path / "old")
    both = Identity(tmp_path / "both", old)
    primary = sandbox(settings=SUMMARIZE)
    primary.encrypt_to(old.public)
    primary.backup("one")
    primary.encrypt_to(both.public)
    folder = ClusterFolder.open(str(primary.repository), CLUSTER, {"identity": str(both.path)})
    basis = Basis(folder, primary.server.login)
    BaseBackup(folder, primary.server.login, primary.bin_dir, label="two", basis=basis).take()
    primary.probe()
    primary.server.stop()
    new = tmp_path / "new key"
    new.write_bytes(both.path.read_bytes().replace(old.path.read_bytes(), b""))
    new.chmod(0o600)
    before = fingerprint(primary.backups)
    with pytest.raises(RefusedError) as caught:
        primary.plan(tmp_path / "data", identity=str(new), backup="two")
    assert [item.code for item in caught.value.refusals] == ["identity_wrong"]
    assert f"{primary.backups}/one/" in caught.value.message
    assert fingerprint(primary.backups) == before
    primary.plan(tmp_path / "data", identity=str(both.path), backup="two")


def test_chain_is_restored_over_ssh(
    sandbox: MakeSandbox, restored: Restore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, since_17: None
) -> None:
    primary = sandbox(settings=SUMMARIZE)
    primary.backup("one")
    primary.commit("in it")
    _take(primary, "two")
    primary.commit("end")
    primary.probe()
    primary.server.stop()
    with private_place(monkeypatch):
        access = Access(Sshd(tmp_path / "sshd"), primary.repository, tmp_path)
        access.sshd.start()
        cluster = restored(
            primary,
            repository=access.url(),
            wal_command=str(access.client / "pitr-wal"),
            ssh={name: value for name, value in access.ssh().items() if name.startswith("ssh_")},
        ).run()
        assert len(cluster.plan.chain) == 2
        assert cluster.phase == "end"
        access.sshd.stop()
