# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Every way to take a base backup: under load, restored to exactly the target, with the same catalog entry."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils import codec
from ansible_collections.pgdrill.pitr.plugins.module_utils.catalog import Backup
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.plugins.module_utils.index import scan
from ansible_collections.pgdrill.pitr.plugins.module_utils.info import backup_info
from ansible_collections.pgdrill.pitr.plugins.module_utils.lowlevel import LowLevelBackup
from ansible_collections.pgdrill.pitr.plugins.module_utils.methods import make_backup
from ansible_collections.pgdrill.pitr.plugins.module_utils.plan import RefusedError
from ansible_collections.pgdrill.pitr.plugins.module_utils.postgres import Login, control_data, query
from ansible_collections.pgdrill.pitr.plugins.module_utils.snapshot import Snapshot
from ansible_collections.pgdrill.pitr.plugins.module_utils.stored import damaged_backups, open_tar, stored_backups
from ansible_collections.pgdrill.pitr.plugins.module_utils.verify import Verification
from ansible_collections.pgdrill.pitr.plugins.module_utils.wal import Lsn
from ansible_collections.pgdrill.pitr.tests.integration.support import (
    Identity,
    Restored,
    Sandbox,
    Server,
    fingerprint,
    flip,
    until,
)

Restore = Callable[..., Restored]
MakeSandbox = Callable[..., Sandbox]


def _take(primary: Sandbox, method: str, server: Server | None = None, **options: Any) -> Backup:
    source = server or primary.server
    fields: dict[str, Any] = {"label": "only", "archive_timeout": 30}
    if method == "offline":
        fields["pgdata"] = str(source.data)
    work = make_backup(method, primary.folder, source.login, primary.bin_dir, **{**fields, **options})
    backup = work.take()
    assert work.warnings == []
    return backup


def _refused(primary: Sandbox, method: str, match: str, server: Server | None = None, **options: Any) -> None:
    """Nothing becomes visible, and nothing of the server's is touched."""
    before = fingerprint(primary.backups)
    with pytest.raises(PitrError, match=match):
        _take(primary, method, server, **options)
    assert fingerprint(primary.backups) == before


@contextlib.contextmanager
def _load(server: Server, tablespace: str = "") -> Iterator[None]:
    """Rows, relations and files come and go, until the block is left."""
    place = f" TABLESPACE {tablespace}" if tablespace else ""
    # No sequence: a recovered one may stand up to 32 values ahead.
    server.sql(f"CREATE TABLE IF NOT EXISTS busy (id bigint PRIMARY KEY, v text){place}")
    server.sql(f"CREATE INDEX IF NOT EXISTS busy_v ON busy (v){place}")
    server.sql("CREATE UNLOGGED TABLE IF NOT EXISTS forgotten (v int)")
    stop = threading.Event()
    failed: list[BaseException] = []

    def work() -> None:
        try:
            with server.connection() as connection:
                number = 0
                while not stop.is_set():
                    number += 1
                    ids = f"generate_series({200 * number}, {200 * number + 199})"
                    query(connection, f"INSERT INTO busy SELECT i, md5(i::text) FROM {ids} i")
                    query(connection, "UPDATE busy SET v = v || 'x' WHERE id % 7 = 0 AND length(v) < 40")
                    query(connection, "INSERT INTO forgotten VALUES (1)")
                    query(connection, f"CREATE TABLE passing (v text){place}")
                    query(connection, "INSERT INTO passing SELECT repeat('p', 1000) FROM generate_series(1, 50)")
                    if number % 3 == 0:
                        query(connection, "DELETE FROM busy WHERE id % 5 = 0")
                        query(connection, "VACUUM busy")
                    query(connection, "DROP TABLE passing")
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        until(lambda: failed or server.value("SELECT count(*) FROM busy") > 1000, "some load")
        yield
    finally:
        stop.set()
        thread.join()
    assert not failed, failed


def _dump(server: Server) -> str:
    """What the cluster is, but for the places of its tablespaces and for what is unlogged."""
    argv = ["-h", server.socket, "-U", "postgres", "--restrict-key=tests", "--no-unlogged-table-data"]
    done = server.program("pg_dumpall", *argv)
    assert done.returncode == 0, done.stderr
    return re.sub(r"LOCATION '[^']*'", "LOCATION", done.stdout)


def _check_relations(server: Server) -> None:
    """Heap and indexes are consistent with each other."""
    argv = ["-h", server.socket, "-U", "postgres", "-d", "postgres", "--install-missing", "--heapallindexed"]
    done = server.program("pg_amcheck", *argv)
    assert done.returncode == 0, done.stdout + done.stderr


def _files(primary: Sandbox) -> list[str]:
    return sorted(path.name.partition(".")[0] for path in (primary.backups / "only").iterdir())


def _names(primary: Sandbox, name: str = "base") -> list[str]:
    stored = next((primary.backups / "only").glob(f"{name}.tar*"))
    with open_tar(str(stored)) as tar:
        return [member.name for member in tar]


def _standby(primary: Sandbox, make: Callable[[Path], Server], **settings: str) -> Server:
    """A streaming standby of the sandbox's primary, caught up."""
    data = primary.directory / "standby"
    argv = ["-h", primary.server.socket, "-U", "postgres", "-D", str(data), "-R", "-X", "stream", "-c", "fast"]
    for location in primary.server.sql("SELECT pg_tablespace_location(oid) FROM pg_tablespace"):
        if location[0]:
            argv += ["-T", f"{location[0]}={primary.directory}/standby-far"]
    made = primary.server.program("pg_basebackup", *argv)
    assert made.returncode == 0, made.stderr
    lines = [f"{name} = '{value}'\n" for name, value in settings.items()]
    (data / "conf.d" / "90-standby.conf").write_text("hot_standby = on\n" + "".join(lines), encoding="ascii")
    server = make(data)
    server.start()
    _catch_up(primary, server)
    return server


def _catch_up(primary: Sandbox, standby: Server) -> None:
    end = Lsn.parse(primary.server.value("SELECT pg_current_wal_lsn()::text"))
    until(lambda: Lsn.parse(standby.value("SELECT pg_last_wal_replay_lsn()::text")) >= end, "the standby")


@pytest.mark.parametrize("compression", ["auto", "none", "gzip", "lz4:3"])
@pytest.mark.parametrize("method", ["low_level"])
def test_backup_under_load_is_restored_exactly(
    sandbox: MakeSandbox, restored: Restore, tmp_path: Path, method: str, compression: str
) -> None:
    if compression.startswith("lz4") and not codec.which("lz4"):
        pytest.skip("this host has no lz4")
    far = tmp_path / "far"
    far.mkdir(mode=0o700)
    primary = sandbox()
    primary.server.sql(f"CREATE TABLESPACE far_away LOCATION '{far}'")
    with _load(primary.server, "far_away"):
        backup = _take(primary, method, compression=compression)
        time.sleep(0.5)
    commit = primary.commit("wanted")
    wanted = _dump(primary.server)
    primary.commit("too late")
    primary.probe()
    primary.server.stop()
    assert backup.method == method
    assert backup == stored_backups(primary.folder)[0]
    assert _files(primary) == sorted(["backup", "backup_manifest", "base", str(backup.tablespaces[0].oid)])
    assert damaged_backups(primary.folder, [backup]) == {}
    mapping = {str(far): str(tmp_path / "far new")}
    cluster = restored(primary, {"recovery_target_xid": str(commit.xid)}, tablespace_mapping=mapping).run()
    assert cluster.phase == "wanted"
    assert _dump(cluster.server) == wanted
    _check_relations(cluster.server)
    # Consistent at its own end, too.
    mapping = {str(far): str(tmp_path / "far immediate")}
    immediate = restored(primary, {"recovery_target": "immediate"}, tablespace_mapping=mapping).run()
    _check_relations(immediate.server)


def test_manifest_is_the_servers_own_but_for_the_checksums(sandbox: MakeSandbox, major: int, tmp_path: Path) -> None:
    far = tmp_path / "far"
    far.mkdir(mode=0o700)
    primary = sandbox()
    primary.server.sql(f"CREATE TABLESPACE far_away LOCATION '{far}'")
    primary.server.sql("CREATE TABLE far TABLESPACE far_away AS SELECT 1 AS v")
    primary.server.sql("CREATE UNLOGGED TABLE forgotten AS SELECT 1 AS v")
    (primary.server.data / "pg_replslot" / "left").mkdir()
    (primary.server.data / "base" / "pgsql_tmp").mkdir()
    (primary.server.data / "base" / "pgsql_tmp" / "pgsql_tmp1.0").touch()
    (primary.server.data / 'odd name "ä\\\n').write_text("x", encoding="ascii")
    with open(os.fsencode(primary.server.data) + b"/not\xffutf8", "w", encoding="ascii"):
        pass
    primary.server.sql("CHECKPOINT")
    documents = []
    for method in ("stream", "low_level"):
        _take(primary, method, label=method)
        text = (primary.backups / method / "backup_manifest").read_text(encoding="utf-8")
        documents.append(json.loads(text))
    for document in documents:
        assert document["PostgreSQL-Backup-Manifest-Version"] == (2 if major >= 17 else 1)
        assert document.get("System-Identifier") == (int(primary.server.system_identifier) if major >= 17 else None)
        assert [sorted(item) for item in document["WAL-Ranges"]] == [["End-LSN", "Start-LSN", "Timeline"]]
    names = [{item.get("Path") or item["Encoded-Path"] for item in document["Files"]} for document in documents]
    assert names[0] == names[1]
    members = []
    for method in ("stream", "low_level"):
        for name in ("base", str(stored_backups(primary.folder)[0].tablespaces[0].oid)):
            with open_tar(str(next((primary.backups / method).glob(f"{name}.tar*")))) as tar:
                members.append({(name, member.name.removeprefix("./"), member.mode & 0o777) for member in tar})
    assert members[0] | members[1] == members[2] | members[3]


def test_damage_of_a_copied_file_is_found_by_the_restore(sandbox: MakeSandbox, tmp_path: Path) -> None:
    from ansible_collections.pgdrill.pitr.plugins.module_utils.restore import Restore as Engine

    primary = sandbox()
    _take(primary, "low_level", compression="none")
    primary.server.stop()
    stored = primary.backups / "only" / "base.tar"
    with tarfile.open(stored) as tar:
        member = next(item for item in tar if item.name.startswith("base/5/") and item.size > 8192)
    flip(stored, member.offset_data + 5000)
    engine = Engine(primary.request(tmp_path / "new", {"recovery_target": "immediate"}))
    with pytest.raises(PitrError, match=f'"{member.name}"'):
        engine.execute(engine.plan())
    assert not (tmp_path / "new").exists()


def test_copy_that_cannot_be_read_back_is_refused(sandbox: MakeSandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that does not keep what was written shows itself before the backup is visible."""
    from ansible_collections.pgdrill.pitr.plugins.module_utils import readback

    primary = sandbox()
    original = readback.check

    def check(directory: str, names: list[str]) -> None:
        stored = Path(directory) / "base.tar"
        with tarfile.open(stored) as tar:
            member = next(item for item in tar if item.name.startswith("base/5/") and item.size > 8192)
        flip(stored, member.offset_data + 5000)
        original(directory, names)

    monkeypatch.setattr(readback, "check", check)
    _refused(primary, "low_level", "cannot be read back from base.tar", compression="none")


def test_damaged_control_file_is_noticed(stranger: Path, bin_dir: str, tmp_path: Path) -> None:
    """pg_controldata ends with 0 all the same, and tells it in another place in every version."""
    data = tmp_path / "data"
    shutil.copytree(stranger, data)
    assert control_data(bin_dir, str(data)).state == "shut down"
    flip(data / "global" / "pg_control", 40)
    with pytest.raises(PitrError, match="is damaged, or of another version"):
        control_data(bin_dir, str(data))


def test_encrypted_backup_of_every_method(sandbox: MakeSandbox, restored: Restore, tmp_path: Path) -> None:
    if not codec.which("age"):
        pytest.skip("this host has no age")
    primary = sandbox()
    identity = Identity(tmp_path / "identity")
    primary.encrypt_to(identity.public)
    primary.commit("in it")
    _take(primary, "low_level", label="online")
    primary.commit("after")
    primary.probe()
    primary.server.stop()
    _take(primary, "offline", label="cold")
    for label, phase in (("online", "in it"), ("cold", "after")):
        names = {path.name for path in (primary.backups / label).iterdir()} - {"backup.json"}
        assert all(name.endswith(".age") for name in names)
        options = {"recovery_target": "immediate"}
        assert restored(primary, options, backup=label, identity=str(identity.path)).run().phase == phase


def test_file_that_shrinks_or_grows_meanwhile_keeps_its_size_in_the_tar(tmp_path: Path) -> None:
    from ansible_collections.pgdrill.pitr.plugins.module_utils.manifest import Manifest
    from ansible_collections.pgdrill.pitr.plugins.module_utils.tarcopy import Copy

    data = tmp_path / "data"
    (data / "global").mkdir(parents=True)
    (data / "pg_tblspc").mkdir()
    size = 3 * codec.CHUNK + 5
    for name in ("grows", "shrinks"):
        (data / name).write_bytes(b"x" * size)
    target = tmp_path / "target"
    target.mkdir()
    seen: list[str] = []

    def change(path: str) -> None:
        """When the first piece of a file was read."""
        if path not in seen:
            seen.append(path)
            os.truncate(path, codec.CHUNK if path.endswith("shrinks") else 2 * size)

    from ansible_collections.pgdrill.pitr.plugins.module_utils import tarcopy

    original = tarcopy._read

    def reading(source: int, count: int, path: str) -> bytes:
        found = original(source, count, path)
        change(path)
        return found

    tarcopy._read = reading
    try:
        with Manifest(str(target / "backup_manifest"), 18, "1") as manifest:
            with Copy(str(target), "none", manifest) as copy:
                copy.base(str(data))
                copy.finish(b"control")
            manifest.finish(1, Lsn(1), Lsn(2))
    finally:
        tarcopy._read = original
    with tarfile.open(target / "base.tar") as tar:
        grows, shrinks = (tar.extractfile(name).read() for name in ("grows", "shrinks"))  # type: ignore[union-attr]
    assert grows == b"x" * size
    assert shrinks == b"x" * codec.CHUNK + bytes(size - codec.CHUNK)


def test_session_that_ends_meanwhile_leaves_no_backup(sandbox: MakeSandbox) -> None:
    primary = sandbox()
    errors: list[Exception] = []
    before = fingerprint(primary.backups)

    def take() -> None:
        try:
            _take(primary, "low_level", max_rate="1M")
        except PitrError as error:
            errors.append(error)

    thread = threading.Thread(target=take)
    thread.start()
    until(lambda: list(primary.backups.glob(".*/base.tar*")), "the copy")
    primary.server.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'pgdrill only'")
    thread.join(timeout=60)
    assert len(errors) == 1, errors
    assert fingerprint(primary.backups) == before


def test_server_that_archives_elsewhere_is_found_out(sandbox: MakeSandbox) -> None:
    primary = sandbox(settings={"archive_command": "true"})
    _refused(primary, "low_level", "has not come to", archive_timeout=1)


def test_directory_that_is_not_the_servers_is_refused(
    sandbox: MakeSandbox, server: Callable[[Path], Server], stranger: Path, tmp_path: Path
) -> None:
    primary = sandbox()
    _refused(primary, "low_level", "is not the data directory of", pgdata=str(stranger))
    _refused(primary, "low_level", "run it on the database host", pgdata=str(tmp_path / "none"))
    # A standby on the same host is the same cluster.
    standby = _standby(primary, server)
    _refused(primary, "low_level", "is not the data directory of", pgdata=str(standby.data))


def test_directory_that_cannot_be_read_is_refused(sandbox: MakeSandbox) -> None:
    primary = sandbox()
    version = primary.server.data / "PG_VERSION"
    version.chmod(0)
    try:
        _refused(primary, "low_level", f"{version}: Permission denied.* as the owner of the data directory")
    finally:
        version.chmod(0o600)


def test_role_without_the_functions_is_refused_and_with_them_needs_no_more(
    sandbox: MakeSandbox, restored: Restore
) -> None:
    primary = sandbox()
    primary.server.sql("CREATE ROLE copier LOGIN")
    login = Login(unix_socket=primary.server.socket, port=primary.server.PORT, user="copier")
    before = fingerprint(primary.backups)

    def take() -> None:
        data = str(primary.server.data)
        LowLevelBackup(primary.folder, login, primary.bin_dir, label="only", pgdata=data, archive_timeout=30).take()

    with pytest.raises(PitrError, match="GRANT EXECUTE"):
        take()
    assert fingerprint(primary.backups) == before
    primary.server.sql("GRANT EXECUTE ON FUNCTION pg_backup_start, pg_backup_stop TO copier")
    primary.commit("in it")
    take()
    primary.server.stop()
    assert restored(primary, {"recovery_target": "immediate"}).run().phase == "in it"


# --- snapshots


class Frozen:
    """A snapshot by ``cp``: not atomic, as between start and stop on a primary it need not be."""

    def __init__(self, primary: Sandbox, far: Path | None = None, then: str = "") -> None:
        self.path = primary.directory / "frozen"
        self.log = primary.directory / "commands"
        script = primary.directory / "snapshot"
        more = f'cp -a "{far}" "{self.path}-far"' if far else ":"
        # What vanishes during the copy is no error here either.
        script.write_text(
            f'#!/bin/sh\necho "$1" >> "{self.log}"\n'
            f'if [ "$1" = make ]; then cp -a "{primary.server.data}" "{self.path}" 2>/dev/null; {more}; {then or ":"}\n'
            f'else rm -rf "{self.path}" "{self.path}-far"; fi\n',
            encoding="utf-8",
        )
        script.chmod(0o755)
        tablespaces = {str(far): f"{self.path}-far"} if far else {}
        self.snapshot = Snapshot([str(script), "make"], str(self.path), [str(script), "remove"], tablespaces)

    @property
    def calls(self) -> list[str]:
        return self.log.read_text(encoding="ascii").split() if self.log.exists() else []


def test_snapshot_is_what_is_copied(sandbox: MakeSandbox, restored: Restore, tmp_path: Path) -> None:
    far = tmp_path / "far"
    far.mkdir(mode=0o700)
    primary = sandbox()
    primary.server.sql(f"CREATE TABLESPACE far_away LOCATION '{far}'")
    frozen = Frozen(primary, far)
    with _load(primary.server, "far_away"):
        backup = _take(primary, "low_level", snapshot=frozen.snapshot, max_rate="8M")
    assert frozen.calls == ["make", "remove"]
    assert not frozen.path.exists()
    commit = primary.commit("wanted")
    wanted = _dump(primary.server)
    primary.commit("too late")
    primary.probe()
    primary.server.stop()
    # Backup mode had ended before the copy began.
    assert backup.seconds > 1
    options = {"recovery_target_xid": str(commit.xid)}
    cluster = restored(primary, options, tablespace_mapping={str(far): str(tmp_path / "new")}).run()
    assert cluster.phase == "wanted"
    assert _dump(cluster.server) == wanted
    _check_relations(cluster.server)


def _backup_mode(server: Server) -> bool:
    """Whether a session of ours is connected, which is what backup mode lasts for."""
    return bool(server.sql("SELECT 1 FROM pg_stat_activity WHERE application_name LIKE 'pgdrill %'"))


def test_snapshot_command_that_fails_leaves_no_backup(sandbox: MakeSandbox) -> None:
    primary = sandbox()
    frozen = Frozen(primary, then="echo the pool is full >&2; exit 5")
    _refused(primary, "low_level", "snapshot_command: .*exit code 5: the pool is full", snapshot=frozen.snapshot)
    assert frozen.calls == ["make", "remove"]
    assert not frozen.path.exists()
    until(lambda: not _backup_mode(primary.server), "the end of backup mode")
    # The next one is not disturbed.
    _take(primary, "low_level", snapshot=Frozen(primary).snapshot)


def test_snapshot_command_that_makes_nothing_leaves_no_backup(sandbox: MakeSandbox, tmp_path: Path) -> None:
    primary = sandbox()
    snapshot = Snapshot(["true"], str(tmp_path / "nowhere"))
    _refused(primary, "low_level", "there is no data directory", snapshot=snapshot)


def test_snapshot_that_is_older_than_the_backup_is_refused(sandbox: MakeSandbox) -> None:
    primary = sandbox()
    old = primary.directory / "old"
    # What vanishes during the copy of a running server's directory is no error.
    copied = ["cp", "-a", str(primary.server.data)]
    subprocess.run([*copied, str(old)], check=False)
    primary.commit("later")
    primary.server.sql("CHECKPOINT")
    path = primary.directory / "frozen"
    _refused(
        primary, "low_level", "is older than the start of the backup",
        snapshot=Snapshot(["mv", str(old), str(path)], str(path), ["rm", "-rf", str(path)]),
    )  # fmt: skip
    # One that was never removed is found before.
    subprocess.run([*copied, str(path)], check=False)
    _refused(primary, "low_level", "perhaps an earlier snapshot", snapshot=Snapshot(["true"], str(path)))


def test_snapshot_without_a_tablespace_is_refused(sandbox: MakeSandbox, tmp_path: Path) -> None:
    far = tmp_path / "far"
    far.mkdir(mode=0o700)
    primary = sandbox()
    primary.server.sql(f"CREATE TABLESPACE far_away LOCATION '{far}'")
    frozen = Frozen(primary)
    _refused(primary, "low_level", f"does not tell where the snapshot of {far} appears", snapshot=frozen.snapshot)
    assert frozen.calls == []


def test_snapshot_that_is_not_removed_is_told(sandbox: MakeSandbox) -> None:
    primary = sandbox()
    frozen = Frozen(primary)
    snapshot = Snapshot(frozen.snapshot.command, frozen.snapshot.path, ["sh", "-c", "echo busy >&2; exit 1"])
    work = make_backup(
        "low_level", primary.folder, primary.server.login, primary.bin_dir, snapshot=snapshot, archive_timeout=30
    )
    work.take()
    assert len(work.warnings) == 1
    assert "busy The snapshot may still be there" in work.warnings[0]


# --- offline


def test_offline_backup_alone_is_enough(sandbox: MakeSandbox, restored: Restore, tmp_path: Path) -> None:
    far = tmp_path / "far"
    far.mkdir(mode=0o700)
    primary = sandbox()
    primary.server.sql(f"CREATE TABLESPACE far_away LOCATION '{far}'")
    with _load(primary.server, "far_away"):
        pass
    commit = primary.commit("at the end")
    wanted = _dump(primary.server)
    primary.server.stop()
    before = fingerprint(primary.server.data, far)
    backup = _take(primary, "offline")
    assert fingerprint(primary.server.data, far) == before
    assert backup.method == "offline"
    assert backup.own_wal and not {path.name for path in primary.segments()} & set(backup.own_wal)
    assert backup.stop_lsn > backup.start_lsn > commit.end
    assert backup.next_xid is not None and backup.next_xid > commit.xid
    assert [window["restorable"] for window in backup_info(primary.folder)["recovery_windows"]] == [True]
    for number, options in enumerate(({"recovery_target": "immediate"}, {})):
        mapping = {str(far): str(tmp_path / f"new {number}")}
        cluster = restored(primary, options, tablespace_mapping=mapping).run()
        assert cluster.phase == "at the end"
        assert _dump(cluster.server) == wanted
        _check_relations(cluster.server)
        cluster.recovery.accept()
        cluster.server.stop()


def test_offline_backup_and_the_life_after_it(sandbox: MakeSandbox, restored: Restore) -> None:
    primary = sandbox()
    primary.commit("before the shutdown")
    primary.server.stop()
    backup = _take(primary, "offline")
    primary.server.start()
    with _load(primary.server):
        time.sleep(0.5)
    commit = primary.commit("after it")
    wanted = _dump(primary.server)
    primary.commit("the end")
    primary.probe()
    primary.server.stop()
    cases = (
        ({}, "the end"),
        ({"recovery_target_xid": str(commit.xid)}, "after it"),
        ({"recovery_target_lsn": str(backup.stop_lsn), "recovery_target_inclusive": False}, "before the shutdown"),
        ({"recovery_target": "immediate"}, "before the shutdown"),
        ({"recovery_target": "immediate", "recovery_target_action": "pause"}, "before the shutdown"),
    )
    for options, phase in cases:
        cluster = restored(primary, options).run()
        assert cluster.phase == phase, options
        if phase == "after it":
            assert _dump(cluster.server) == wanted
        if "pause" not in options.values():
            _check_relations(cluster.server)
        cluster.server.stop()


def test_targets_behind_an_offline_backup_without_later_wal_are_refused(sandbox: MakeSandbox, tmp_path: Path) -> None:
    primary = sandbox()
    primary.server.stop()
    backup = _take(primary, "offline")
    before = fingerprint(tmp_path)
    for options in (
        {"recovery_target_lsn": str(backup.stop_lsn)},
        {"recovery_target_lsn": str(Lsn(backup.stop_lsn + 1000))},
        {"recovery_target": "immediate", "recovery_target_action": "pause"},
    ):
        with pytest.raises(RefusedError) as caught:
            primary.plan(tmp_path / "new", options)
        assert [item.code for item in caught.value.refusals] == ["target_beyond_archive"]
    assert fingerprint(tmp_path) == before


def test_wal_that_is_missing_after_an_offline_backup_is_a_hole(sandbox: MakeSandbox, tmp_path: Path) -> None:
    primary = sandbox()
    primary.server.stop()
    backup = _take(primary, "offline")
    primary.server.start()
    primary.commit("after")
    primary.fill(2)
    primary.probe()
    primary.server.stop()
    # The backup's own copy of this segment ends with the shutdown.
    primary.segment(backup.start_lsn).unlink()
    with pytest.raises(RefusedError) as caught:
        primary.plan(tmp_path / "new")
    assert [item.code for item in caught.value.refusals] == ["archive_gap"]


def test_offline_backup_of_a_server_that_is_not_shut_down_is_refused(
    sandbox: MakeSandbox, server: Callable[[Path], Server]
) -> None:
    primary = sandbox()
    standby = _standby(primary, server)
    _refused(primary, "offline", "A server is running")
    standby.stop()
    _refused(primary, "offline", "is a standby that was shut down", standby)
    primary.server.stop("immediate")
    _refused(primary, "offline", "was not shut down cleanly: pg_control says 'in production'")


def test_offline_backup_of_a_server_that_is_started_meanwhile_is_refused(sandbox: MakeSandbox) -> None:
    primary = sandbox()
    primary.server.stop()
    errors: list[PitrError] = []
    before = fingerprint(primary.backups)

    def take() -> None:
        try:
            _take(primary, "offline", max_rate="2M")
        except PitrError as error:
            errors.append(error)

    thread = threading.Thread(target=take)
    thread.start()
    until(lambda: list(primary.backups.glob(".*/base.tar*")), "the copy")
    primary.server.start()
    primary.server.stop()
    thread.join(timeout=60)
    assert [error.message.partition(" in ")[0] for error in errors] == ["A server was started"]
    assert fingerprint(primary.backups) == before


def test_offline_backup_without_its_checkpoint_in_pg_wal_is_refused(sandbox: MakeSandbox) -> None:
    primary = sandbox()
    primary.server.stop()
    lsn = control_data(primary.bin_dir, str(primary.server.data)).checkpoint_lsn
    for path in (primary.server.data / "pg_wal").iterdir():
        if path.is_file():
            path.rename(primary.directory / path.name)
    _refused(primary, "offline", f"does not have the shutdown checkpoint at {lsn}")


def test_offline_backup_of_wal_level_minimal_is_refused(sandbox: MakeSandbox) -> None:
    primary = sandbox(settings={"archive_mode": "off", "wal_level": "minimal", "max_wal_senders": "0"})
    primary.server.stop()
    _refused(primary, "offline", "wal_level = minimal")


def test_offline_backup_on_a_later_timeline(sandbox: MakeSandbox, restored: Restore) -> None:
    primary = sandbox(start=False)
    # Promoted elsewhere, before it archived here.
    primary.configure({"archive_mode": "off"})
    (primary.server.data / "standby.signal").touch()
    primary.server.start()
    assert primary.server.value("SELECT pg_promote()")
    primary.server.stop()
    _refused(primary, "offline", "Nothing was ever archived")
    primary.configure({"archive_mode": "on"})
    primary.server.start()
    primary.probe()
    primary.commit("on the second timeline")
    primary.server.stop()
    assert not (primary.archive / "00000002.history").exists()
    backup = _take(primary, "offline")
    assert backup.timeline == 2
    own = (primary.server.data / "pg_wal" / "00000002.history").read_bytes()
    assert (primary.archive / "00000002.history").read_bytes() == own
    cluster = restored(primary, {"recovery_target": "immediate"}).run()
    assert cluster.phase == "on the second timeline"
    assert cluster.recovery.timeline() == 3


def test_restored_offline_backup_can_be_undone(sandbox: MakeSandbox, restored: Restore) -> None:
    from ansible_collections.pgdrill.pitr.plugins.module_utils.restore import undo

    primary = sandbox()
    primary.server.stop()
    _take(primary, "offline")
    before = fingerprint(primary.server.data)
    cluster = restored(primary, {"recovery_target": "immediate"}, data=primary.server.data, force=True).run()
    cluster.server.stop()
    undo(cluster.request, cluster.result.moved_aside)
    assert fingerprint(primary.server.data) == before


# --- standbys


@pytest.mark.parametrize("archiving", ["on", "off", "always"])
@pytest.mark.parametrize("method", ["stream", "low_level"])
def test_backup_from_a_standby(
    sandbox: MakeSandbox, restored: Restore, server: Callable[[Path], Server], tmp_path: Path, method: str,
    archiving: str,
) -> None:  # fmt: skip
    far = tmp_path / "far"
    far.mkdir(mode=0o700)
    primary = sandbox(settings={"archive_timeout": "1s"})
    primary.server.sql(f"CREATE TABLESPACE far_away LOCATION '{far}'")
    standby = _standby(primary, server, archive_mode=archiving)
    with _load(primary.server, "far_away"):
        backup = _take(primary, method, standby)
    commit = primary.commit("wanted")
    wanted = _dump(primary.server)
    primary.commit("too late")
    primary.probe()
    primary.server.stop()
    standby.stop()
    assert [item.location for item in backup.tablespaces] == [str(primary.directory / "standby-far")]
    mapping = {backup.tablespaces[0].location: str(tmp_path / "new")}
    cluster = restored(primary, {"recovery_target_xid": str(commit.xid)}, tablespace_mapping=mapping).run()
    assert cluster.phase == "wanted"
    assert _dump(cluster.server) == wanted
    _check_relations(cluster.server)
    mapping = {backup.tablespaces[0].location: str(tmp_path / "immediate")}
    immediate = restored(primary, {"recovery_target": "immediate"}, tablespace_mapping=mapping).run()
    _check_relations(immediate.server)


@pytest.mark.parametrize("method", ["stream", "low_level"])
def test_backup_from_a_standby_waits_for_the_primary_and_says_what_to_do(
    sandbox: MakeSandbox, restored: Restore, server: Callable[[Path], Server], method: str
) -> None:
    primary = sandbox()
    standby = _standby(primary, server)
    primary.commit("in it")
    primary.server.sql("CHECKPOINT")
    _catch_up(primary, standby)
    _refused(primary, method, r"run pg_switch_wal\(\) on the primary", standby, archive_timeout=1)
    result: list[Backup] = []
    thread = threading.Thread(target=lambda: result.append(_take(primary, method, standby)))
    thread.start()
    until(lambda: list(primary.backups.glob(".*/backup_manifest")), "the copy")
    time.sleep(1)
    assert stored_backups(primary.folder) == []
    primary.probe()
    thread.join(timeout=60)
    assert [backup.label for backup in result] == ["only"]
    primary.server.stop()
    standby.stop()
    assert restored(primary, {"recovery_target": "immediate"}).run().phase == "in it"


@pytest.mark.parametrize("method", ["stream", "low_level"])
def test_standby_that_is_promoted_meanwhile_leaves_no_backup(
    sandbox: MakeSandbox, server: Callable[[Path], Server], method: str
) -> None:
    primary = sandbox()
    standby = _standby(primary, server)
    errors: list[PitrError] = []
    before = fingerprint(primary.backups)

    def take() -> None:
        try:
            _take(primary, method, standby, max_rate="1M")
        except PitrError as error:
            errors.append(error)

    thread = threading.Thread(target=take)
    thread.start()
    until(lambda: list(primary.backups.glob(".*/base.tar*")), "the copy")
    assert standby.value("SELECT pg_promote()")
    thread.join(timeout=60)
    assert len(errors) == 1
    assert "promoted" in errors[0].message
    assert fingerprint(primary.backups) == before


def test_every_method_is_verified_alike(sandbox: MakeSandbox) -> None:
    primary = sandbox()
    (primary.server.data / ".hidden").write_text("x", encoding="ascii")
    _take(primary, "stream", label="one")
    _take(primary, "low_level", label="two")
    primary.probe()
    primary.server.stop()
    _take(primary, "offline", label="three")
    folder = primary.folder
    backups = stored_backups(folder)
    assert [backup.method for backup in backups] == ["stream", "low_level", "offline"]
    work = Verification(folder, folder.chapter, backups, scan(folder), primary.bin_dir)
    for backup in backups:
        report = work.verify(backup)
        assert (report.damage, report.notes, report.level) == ((), (), "content")
        # And what is damaged is found.
        stored = next((primary.backups / backup.label).glob("base.tar*"))
        flip(stored, stored.stat().st_size // 2)
        assert work.verify(backup).damage
