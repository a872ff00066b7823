# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Encrypted repositories of real servers: nothing readable without a key, everything restorable with one."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils import codec, encryption, restore
from ansible_collections.pgdrill.pitr.plugins.module_utils.backup import BaseBackup
from ansible_collections.pgdrill.pitr.plugins.module_utils.encryption import LENGTH, recipients_id
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.plugins.module_utils.info import archive_info, backup_info
from ansible_collections.pgdrill.pitr.plugins.module_utils.plan import RefusedError
from ansible_collections.pgdrill.pitr.plugins.module_utils.repository import ClusterFolder
from ansible_collections.pgdrill.pitr.plugins.module_utils.stored import stored_backups
from ansible_collections.pgdrill.pitr.plugins.module_utils.wal import WalFile
from ansible_collections.pgdrill.pitr.tests.integration.ssh_support import Access, Sshd
from ansible_collections.pgdrill.pitr.tests.integration.support import (
    CLUSTER,
    PATIENCE,
    SEGMENT_SIZE,
    Identity,
    Restored,
    Sandbox,
    Storage,
    fingerprint,
    flip,
    until,
)
from ansible_collections.pgdrill.pitr.tests.unit.support import make_repository, put, segment, tree, wal_name

MakeSandbox = Callable[..., Sandbox]
Restore = Callable[..., Restored]
MARK = "a row that nobody without a key may read"


@pytest.fixture
def key(tmp_path: Path) -> Identity:
    return Identity(tmp_path / "mine key")


@pytest.fixture
def other(tmp_path: Path) -> Identity:
    return Identity(tmp_path / "other key")


@pytest.fixture
def encrypted(sandbox: MakeSandbox, key: Identity) -> Sandbox:
    """A running primary whose repository has always been encrypted."""
    primary = sandbox(start=False)
    primary.encrypt_to(key.public)
    primary.server.start()
    return primary


def dump(server: Any) -> str:
    """The cluster in words."""
    done = server.program("pg_dumpall", "-h", server.socket, "-p", str(server.PORT), "-U", "postgres")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    return "\n".join(line for line in lines if not line.startswith(("--", "\\restrict", "\\unrestrict")))


def holding(needles: list[bytes], *paths: Path) -> list[str]:
    """Files below these paths that have one of these texts in them."""
    found = []
    for top in paths:
        for path in [top, *top.rglob("*")]:
            if path.is_file() and not path.is_symlink():
                data = path.read_bytes()
                found += [str(path) for needle in needles if needle in data]
    return found


@contextlib.contextmanager
def watched_processes() -> Iterator[set[str]]:
    """Arguments and environments of all processes that can be seen meanwhile."""
    seen: set[str] = set()
    done = threading.Event()
    us = str(os.getpid())

    def look() -> None:
        while not done.is_set():
            for entry in os.listdir("/proc"):
                if entry.isdigit() and entry != us:
                    for name in ("cmdline", "environ"):
                        with contextlib.suppress(OSError):
                            seen.add(Path(f"/proc/{entry}/{name}").read_bytes().decode(errors="replace"))

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield seen
    finally:
        done.set()
        watcher.join()


def refusals(storage: Storage, data: Path, options: dict[str, Any] | None = None, **more: Any) -> dict[str, str]:
    """Codes and texts of a refused plan; nothing was touched by it."""
    before = fingerprint(data, storage.repository)
    with pytest.raises(RefusedError) as caught:
        storage.plan(data, options, force=True, **more)
    assert fingerprint(data, storage.repository) == before
    return {item.code: f"{item.message} {item.nearest}" for item in caught.value.refusals}


# --- the whole way


def test_encrypted_cluster_comes_back_whole_and_its_hosts_hold_no_key(
    encrypted: Sandbox, restored: Restore, key: Identity
) -> None:
    with watched_processes() as seen:
        encrypted.server.sql("CREATE TABLE secrets AS SELECT %s AS text, n FROM generate_series(1, 500) n", MARK)
        backup = encrypted.backup("only")
        encrypted.commit("before")
        target = encrypted.commit("wanted")
        encrypted.commit("after")
        encrypted.fill(2)
        assert encrypted.probe().compared
        encrypted.commit("end")
        encrypted.probe()
        truth = dump(encrypted.server)
        encrypted.server.stop()
        latest = restored(encrypted, identity=str(key.path)).run()
        timed = restored(encrypted, {"recovery_target_time": target.time_text}, identity=str(key.path)).run()
    assert latest.phase == "end" and dump(latest.server) == truth
    assert timed.phase == "wanted"
    assert backup.encryption == recipients_id([key.public])
    assert {file.name.rpartition(".")[2] for file in backup.files} == {"age"}
    assert all(path.read_bytes().startswith(b"pitr-age 1 ") for path in encrypted.segments())
    # Nothing of the content, and nothing of the key: in the repository, the command, the servers and their logs.
    assert holding([MARK.encode()], encrypted.repository) == []
    places = [encrypted.repository, encrypted.directory, latest.server.data, latest.server.log, encrypted.server.log]
    assert holding(key.secrets, *places) == []
    assert any(str(key.path) in text for text in seen), "the watcher has seen nothing"
    secrets = [secret.decode() for secret in key.secrets]
    assert secrets and not [text for text in seen for secret in secrets if secret in text]
    assert secrets[0] not in str(latest.plan.to_dict()) and secrets[0] not in str(latest.request)


def test_lists_tell_everything_but_the_last_commit_without_a_key(encrypted: Sandbox, key: Identity) -> None:
    encrypted.backup("only")
    encrypted.commit("one")
    encrypted.probe()
    assert backup_info(encrypted.folder)["recovery_windows"][0]["restorable"] is True
    listed = archive_info(encrypted.folder, encrypted.bin_dir)
    assert listed["gaps"] == [] and listed["segments"] > 1 and listed["last_commit_time"] is None
    assert len(listed["notes"]) == 1 and "no identity" in listed["notes"][0]
    folder = ClusterFolder.open(str(encrypted.repository), CLUSTER, {"identity": str(key.path)})
    read = archive_info(folder, encrypted.bin_dir)
    assert read["last_commit_time"] is not None and read["notes"] == []


def test_status_with_a_wrong_key_is_an_error_and_not_a_note(encrypted: Sandbox, other: Identity) -> None:
    encrypted.probe()
    folder = ClusterFolder.open(str(encrypted.repository), CLUSTER, {"identity": str(other.path)})
    with pytest.raises(PitrError, match="was not encrypted"):
        archive_info(folder, encrypted.bin_dir)


def test_timelines_are_readable_without_a_key(encrypted: Sandbox, restored: Restore, key: Identity) -> None:
    encrypted.backup("only")
    encrypted.commit("parent")
    encrypted.probe()
    encrypted.server.stop()
    child = restored(encrypted, archive_after="same", identity=str(key.path)).run()
    child.server.sql("UPDATE status SET phase = 'child'")
    child.server.sql("SELECT pg_switch_wal()")
    until(lambda: encrypted.segments(2) and (encrypted.archive / "00000002.history").exists(), "timeline 2")
    tree = {item["timeline"]: item["parent"] for item in archive_info(encrypted.folder)["timelines"]}
    assert tree == {1: None, 2: 1}
    child.server.stop()
    assert restored(encrypted, identity=str(key.path)).run().phase == "child"


# --- changes in the middle


def test_encryption_that_is_turned_on_later_leaves_everything_restorable(
    sandbox: MakeSandbox, restored: Restore, key: Identity
) -> None:
    primary = sandbox()
    primary.backup("plain")
    primary.commit("plain")
    primary.probe()
    primary.encrypt_to(key.public)
    early = primary.commit("encrypted")
    primary.fill(1)
    primary.probe()
    kinds = {path.read_bytes()[:9] == b"pitr-age " for path in primary.segments()}
    assert kinds == {True, False}
    primary.backup("encrypted")
    primary.commit("end")
    primary.probe()
    primary.server.stop()
    # The plain backup alone is not enough: WAL after it is encrypted.
    found = refusals(primary, primary.server.data, {"recovery_target_lsn": str(early.end)}, backup="plain")
    assert list(found) == ["identity_missing"] and key.public in found["identity_missing"]
    assert restored(primary, backup="plain", identity=str(key.path)).run().phase == "end"
    assert restored(primary, backup="encrypted", identity=str(key.path)).run().phase == "end"


def test_recipients_that_change_need_both_identities(
    encrypted: Sandbox, restored: Restore, key: Identity, other: Identity, tmp_path: Path
) -> None:
    encrypted.backup("only")
    encrypted.commit("old key")
    encrypted.fill(1)
    encrypted.probe()
    encrypted.encrypt_to(other.public)
    encrypted.commit("new key")
    encrypted.fill(1)
    encrypted.probe()
    encrypted.server.stop()
    data = encrypted.server.data
    # Each of the two opens only a part of what is needed, and the plan says so.
    for identity, needed in ((key, other), (other, key)):
        found = refusals(encrypted, data, identity=str(identity.path))
        assert list(found) == ["identity_wrong"] and needed.public in found["identity_wrong"]
    both = tmp_path / "both"
    both.write_text(key.path.read_text() + other.path.read_text())
    both.chmod(0o600)
    assert restored(encrypted, identity=str(both)).run().phase == "new key"
    # What lies before the change needs the old one only.
    first = next(
        path for path in encrypted.segments() if path.read_bytes()[154:170].decode() == recipients_id([key.public])
    )
    plan = encrypted.plan(tmp_path / "elsewhere", {"recovery_target": "immediate"}, identity=str(key.path))
    assert plan.first_segment >= first.name


# --- refusals in the plan


@pytest.mark.parametrize(
    "options",
    [{}, {"recovery_target": "immediate"}, {"recovery_target_time": True}, {"recovery_target_xid": True}],
    ids=["latest", "immediate", "time", "xid"],
)
def test_restore_without_the_right_identity_is_refused_before_anything_is_touched(
    encrypted: Sandbox, key: Identity, other: Identity, tmp_path: Path, options: dict[str, Any]
) -> None:
    encrypted.backup("only")
    commit = encrypted.commit("wanted")
    encrypted.commit("later")
    encrypted.probe()
    encrypted.server.stop()
    if "recovery_target_time" in options:
        options = {"recovery_target_time": commit.time_text}
    if "recovery_target_xid" in options:
        options = {"recovery_target_xid": str(commit.xid)}
    data = encrypted.server.data
    missing = refusals(encrypted, data, options)
    assert list(missing) == ["identity_missing"]
    wrong = refusals(encrypted, data, options, identity=str(other.path))
    assert list(wrong) == ["identity_wrong"]
    # Who can help is told, and what is secret is not.
    assert key.public in missing["identity_missing"] and key.public in wrong["identity_wrong"]
    opened = tmp_path / "opened"
    opened.write_bytes(key.path.read_bytes())
    opened.chmod(0o644)
    assert "identity_unusable" in refusals(encrypted, data, options, identity=str(opened))
    assert "identity_unusable" in refusals(encrypted, data, options, identity=str(tmp_path / "nowhere"))
    assert encrypted.plan(data, options, force=True, identity=str(key.path)).backup.label == "only"


def test_identity_in_the_directory_that_is_moved_aside_is_refused(encrypted: Sandbox, key: Identity) -> None:
    encrypted.backup("only")
    encrypted.probe()
    encrypted.server.stop()
    inside = encrypted.server.data / "key"
    inside.write_bytes(key.path.read_bytes())
    inside.chmod(0o600)
    found = refusals(encrypted, encrypted.server.data, identity=str(inside))
    assert "lies in the data directory" in found["identity_unusable"]


def test_restore_on_a_host_without_age_is_refused_in_the_plan(
    encrypted: Sandbox, key: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    encrypted.backup("only")
    encrypted.probe()
    encrypted.server.stop()
    real = codec.which
    monkeypatch.setattr(encryption, "which", lambda command: None if command == "age" else real(command))
    found = refusals(encrypted, encrypted.server.data, identity=str(key.path))
    assert list(found) == ["age_missing"]


def test_damaged_manifest_is_not_called_a_wrong_identity(encrypted: Sandbox, key: Identity) -> None:
    encrypted.backup("only")
    encrypted.probe()
    encrypted.server.stop()
    flip(encrypted.backups / "only" / "backup_manifest.age", 5)
    assert list(refusals(encrypted, encrypted.server.data, identity=str(key.path))) == ["backup_damaged"]


@pytest.mark.parametrize("searched", [False, True], ids=["tried", "searched"])
@pytest.mark.parametrize("offset", [20, LENGTH + 40], ids=["line", "stanza"])
def test_damaged_segment_that_the_plan_comes_upon_is_a_refusal(
    encrypted: Sandbox, key: Identity, offset: int, searched: bool, tmp_path: Path
) -> None:
    encrypted.backup("only")
    encrypted.probe()
    encrypted.server.stop()
    if searched:
        # A tablespace that the backup lacks: where it was created is looked for in WAL.
        (tmp_path / "later").mkdir()
        (encrypted.server.data / "pg_tblspc" / "99999").symlink_to(tmp_path / "later")
    plan = encrypted.plan(encrypted.server.data, force=True, identity=str(key.path))
    flip(next(path for path in encrypted.segments() if path.name == plan.first_segment), offset)
    found = refusals(encrypted, encrypted.server.data, identity=str(key.path))
    assert list(found) == ["archive_damaged"] and plan.first_segment in found["archive_damaged"]


# --- damage during recovery


@pytest.mark.parametrize("offset", [15, 90, 145, LENGTH + 40, LENGTH + 400])
def test_damaged_segment_stops_the_recovery_instead_of_ending_it(
    encrypted: Sandbox, restored: Restore, key: Identity, offset: int, tmp_path: Path
) -> None:
    encrypted.backup("only")
    encrypted.commit("before")
    encrypted.fill(1)
    encrypted.probe()
    encrypted.commit("after")
    encrypted.fill(1)
    encrypted.probe()
    encrypted.server.stop()
    cluster = restored(encrypted, identity=str(key.path))
    victim = encrypted.segments()[-2]
    flip(victim, offset)
    # The command says it as PostgreSQL hears it.
    command = [encrypted.wal_command, "get", f"--identity={key.path}", CLUSTER, victim.name, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode > 125 and "is damaged" in done.stderr and not (tmp_path / "out").exists()
    cluster.server.start(wait=False)
    until(lambda: not cluster.server.is_running, "the end of the server")
    assert "is damaged" in cluster.server.log_text()
    assert not (cluster.server.data / "pg_wal" / "00000002.history").exists()
    flip(victim, offset)
    assert cluster.run().phase == "after"


def test_identity_that_goes_away_during_recovery_loses_nothing(
    encrypted: Sandbox, restored: Restore, key: Identity
) -> None:
    encrypted.backup("only")
    encrypted.commit("end")
    encrypted.probe()
    encrypted.server.stop()
    cluster = restored(encrypted, identity=str(key.path))
    away = key.path.with_name("away")
    key.path.rename(away)
    cluster.server.start(wait=False)
    until(lambda: not cluster.server.is_running, "the end of the server")
    assert "cannot be read" in cluster.server.log_text()
    away.rename(key.path)
    assert cluster.run().phase == "end"


# --- archiving


def test_primary_without_age_keeps_its_wal_until_age_is_there(
    sandbox: MakeSandbox, restored: Restore, key: Identity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    primary = sandbox(start=False)
    primary.encrypt_to(key.public)
    # The archiver's own search path, with a place of its own for age, and the usual ones hidden.
    lib = Path(primary.wal_command).parent / "lib" / "pgdrill_pitr" / "codec.py"
    hidden = lib.read_text()
    lib.write_text(
        hidden.replace(
            "def which(command: str) -> str | None:",
            "def which(command):\n    return None if command == 'age' else _which(command)\n\n\ndef _which(command):",
        )
    )
    primary.server.start()
    primary.commit("waiting")
    primary.fill(2)
    failed = "SELECT failed_count FROM pg_stat_archiver"
    until(lambda: primary.server.value(failed) > 0, "a failure that PostgreSQL counts")
    assert primary.segments() == [] and "age is not installed" in primary.server.log_text()
    lib.write_text(hidden)
    primary.probe()
    assert len(primary.segments()) >= 3
    primary.backup("only")
    primary.commit("end")
    primary.probe()
    primary.server.stop()
    assert restored(primary, identity=str(key.path)).run().phase == "end"


def test_probe_notices_other_content_without_a_key(encrypted: Sandbox) -> None:
    encrypted.probe()
    stored = encrypted.segments()[-1]
    original = encrypted.server.data / "pg_wal" / stored.name
    from ansible_collections.pgdrill.pitr.plugins.module_utils.probe import Probe

    probe = Probe(encrypted.server.login, encrypted.folder, PATIENCE)
    assert probe._compare(str(stored), str(original))
    flip(original, SEGMENT_SIZE // 2)
    with pytest.raises(PitrError, match="other content"):
        probe._compare(str(stored), str(original))


# --- backups


def test_backup_without_age_is_refused_before_it_begins(encrypted: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encryption, "which", lambda command: None)
    with pytest.raises(PitrError, match="age is not installed"):
        encrypted.backup("none")
    # Check mode tells it, too, which copies nothing.
    work = BaseBackup(encrypted.folder, encrypted.server.login, encrypted.bin_dir)
    with encrypted.server.connection() as connection, pytest.raises(PitrError, match="age is not installed"):
        work.check(connection)
    assert list(encrypted.backups.iterdir()) == []


def test_backup_that_cannot_be_encrypted_is_not_there(encrypted: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    real = encryption.encrypt_argv
    monkeypatch.setattr(encryption, "encrypt_argv", lambda recipients: [*real(recipients), "-r", "age1nobody"])
    with pytest.raises(PitrError, match="could not encrypt"):
        encrypted.backup("none")
    assert list(encrypted.backups.iterdir()) == []


_KILLED = """
import os, signal, sys
from ansible_collections.pgdrill.pitr.plugins.module_utils import backup
from ansible_collections.pgdrill.pitr.plugins.module_utils.postgres import Login
from ansible_collections.pgdrill.pitr.plugins.module_utils.repository import ClusterFolder
repository, cluster, socket, port, bin_dir, at = sys.argv[1:]
real, count = backup._encrypt, 0

def encrypt(*arguments):
    global count
    count += 1
    if count == int(at):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)

backup._encrypt = encrypt
folder = ClusterFolder.open(repository, cluster)
backup.BaseBackup(folder, Login(unix_socket=socket, port=int(port)), bin_dir).take()
"""


def test_plain_files_of_a_killed_backup_are_removed_by_the_next_one(
    encrypted: Sandbox, restored: Restore, key: Identity
) -> None:
    encrypted.server.sql("CREATE TABLE secrets AS SELECT %s AS text FROM generate_series(1, 500)", MARK)
    server = encrypted.server
    for at in (1, 2):
        argv = [sys.executable, "-c", _KILLED, str(encrypted.repository), CLUSTER, server.socket, str(server.PORT)]
        done = subprocess.run([*argv, encrypted.bin_dir, str(at)], capture_output=True, text=True, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr
        left = [path for path in encrypted.backups.iterdir() if path.name.startswith(".")]
        assert len(left) == 1 and stored_backups(encrypted.folder) == []
    # It has another label, so that it would not come upon them by itself.
    encrypted.backup("next", compression="none")
    assert sorted(path.name for path in encrypted.backups.iterdir()) == ["next"]
    assert holding([MARK.encode()], encrypted.repository) == []
    names = sorted(path.name for path in (encrypted.backups / "next").iterdir())
    assert names == ["backup.json", "backup_manifest.age", "base.tar.age"]
    encrypted.commit("end")
    encrypted.probe()
    encrypted.server.stop()
    assert restored(encrypted, identity=str(key.path)).run().phase == "end"


def test_directory_of_a_backup_that_is_being_taken_is_left_alone(encrypted: Sandbox) -> None:
    from ansible_collections.pgdrill.pitr.plugins.module_utils.backup import _lock, sweep

    partial = encrypted.backups / ".busy.partial"
    lock = _lock(str(partial))
    assert lock is not None
    (partial / "base.tar").write_text("being written")
    assert sweep(encrypted.folder) == []
    assert (partial / "base.tar").exists()
    os.close(lock)
    assert sweep(encrypted.folder) == [str(partial)]
    assert not partial.exists()


def test_damaged_file_of_an_encrypted_backup_is_noticed_and_the_old_directory_comes_back(
    encrypted: Sandbox, key: Identity
) -> None:
    encrypted.backup("only")
    encrypted.probe()
    encrypted.server.stop()
    data = encrypted.server.data
    [stored] = encrypted.backups.glob("only/base.tar*.age")
    flip(stored, stored.stat().st_size - 1000)
    before = fingerprint(data)
    work = restore.Restore(encrypted.request(data, force=True, identity=str(key.path)))
    with pytest.raises(PitrError, match=r"base\.tar.*is damaged: age says"):
        work.execute(work.plan())
    assert fingerprint(data) == before


def test_encrypted_backup_with_a_tablespace_is_restored(
    encrypted: Sandbox, restored: Restore, key: Identity, tmp_path: Path
) -> None:
    place = tmp_path / "space"
    place.mkdir(mode=0o700)
    with encrypted.server.connection() as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(f"CREATE TABLESPACE space LOCATION '{place}'")
            cursor.execute("CREATE TABLE there TABLESPACE space AS SELECT generate_series(1, 100) AS n")
    encrypted.backup("only")
    encrypted.probe()
    encrypted.server.stop()
    mapping = {str(place): str(tmp_path / "mapped")}
    cluster = restored(encrypted, identity=str(key.path), tablespace_mapping=mapping).run()
    assert cluster.server.value("SELECT count(*) FROM there") == 100
    assert list((tmp_path / "mapped").iterdir())


# --- through ssh


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: Identity) -> Iterator[Access]:
    """An encrypted repository with nothing in it, behind an sshd."""
    folder = make_repository(tmp_path / "repository")
    folder.change_recipients(encryption.check_recipients([key.public]))
    folder.save()
    sshd = Sshd(tmp_path / "sshd")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    sshd.start()
    yield Access(sshd, Path(folder.repository), tmp_path)
    sshd.stop()


def test_encrypted_segment_goes_through_ssh_and_back(
    remote: Access, tmp_path: Path, key: Identity, other: Identity
) -> None:
    name = wal_name(1, 5)
    path = put(tmp_path / "pg_wal", name, segment(1, 5))
    # Compressible or not, the client's first push, a repeated one, and one of something else.
    assert (remote.push(path).returncode, remote.push(path).returncode) == (0, 0)
    before = tree(remote.repository)
    put(tmp_path / "pg_wal", name, segment(1, 5, seed=1))
    again = remote.push(path)
    assert 1 <= again.returncode <= 125 and "other content" in again.stderr
    assert tree(remote.repository) == before
    [stored] = remote.repository.rglob(name)
    assert stored.read_bytes().startswith(b"pitr-age 1 ")
    target = tmp_path / "got"
    for identity, words in ((None, "no identity"), (other, "was not encrypted"), (key, "")):
        option = [f"--identity={identity.path}"] if identity else []
        got = remote.run("get", *option, CLUSTER, name, str(target))
        assert words in got.stderr and (got.returncode > 125) == bool(words) and target.exists() == (not words)
    assert target.read_bytes() == segment(1, 5)


def test_damaged_encrypted_segment_is_told_through_ssh(remote: Access, tmp_path: Path, key: Identity) -> None:
    name = wal_name(1, 5)
    remote.push(put(tmp_path / "pg_wal", name, segment(1, 5)))
    [stored] = remote.repository.rglob(name)
    for offset in (90, LENGTH + 300, stored.stat().st_size - 1):
        flip(stored, offset)
        got = remote.run("get", f"--identity={key.path}", CLUSTER, name, str(tmp_path / "got"))
        assert got.returncode > 125 and "is damaged" in got.stderr and not (tmp_path / "got").exists()
        flip(stored, offset)


def test_repository_host_takes_no_encrypted_file_that_is_not_whole(remote: Access, tmp_path: Path) -> None:
    name = wal_name(1, 5)
    remote.push(put(tmp_path / "pg_wal", name, segment(1, 5)))
    [stored] = remote.repository.rglob(name)
    whole = stored.read_bytes()
    short = encryption.parse_header(whole, name)
    short.size = 1000
    folder = ClusterFolder.open(remote.url(), CLUSTER, remote.ssh(remote.writer))
    before = tree(remote.repository)
    for number, data in enumerate((whole[:-1], whole[:LENGTH], whole[:50], short.line() + whole[LENGTH:]), 10):
        place = folder.wal_path(WalFile.parse(wal_name(1, number)))
        with pytest.raises(PitrError, match=r"is damaged|can be right"), folder.tree.adding(place) as temporary:
            Path(temporary).write_bytes(data)
    assert tree(remote.repository) == before
    with folder.tree.adding(folder.wal_path(WalFile.parse(wal_name(1, 20)))) as temporary:
        Path(temporary).write_bytes(whole)
    folder.tree.close()
