# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A repository behind a real sshd: what push and get do there, and what happens when the link or the keys are wrong."""

from __future__ import annotations

import gzip
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils import remote
from ansible_collections.pgdrill.pitr.plugins.module_utils.codec import open_reader
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.plugins.module_utils.remote import SshTree
from ansible_collections.pgdrill.pitr.plugins.module_utils.repository import ClusterFolder
from ansible_collections.pgdrill.pitr.tests.integration.ssh_support import (
    Access,
    Link,
    Sshd,
    descendants,
    masters,
    private_place,
    program,
)
from ansible_collections.pgdrill.pitr.tests.integration.support import until
from ansible_collections.pgdrill.pitr.tests.unit.support import (
    CLUSTER,
    MIB,
    SYSTEM,
    history,
    make_repository,
    put,
    segment,
    tree,
    wal_name,
)


@pytest.fixture
def access(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Access]:
    """An empty repository with the cluster ``main`` behind a running sshd."""
    folder = make_repository(tmp_path / "the repository's 100% ü")
    with private_place(monkeypatch):
        made = Access(Sshd(tmp_path / "sshd"), Path(folder.repository), tmp_path)
        made.sshd.start()
        yield made
        made.sshd.stop()


@pytest.fixture
def link(access: Access) -> Iterator[Link]:
    """A link to the sshd that can be spoilt; its port is known by the same host key."""
    made = Link(access.sshd.port)
    access.sshd.know(made.port)
    yield made
    made.close()


@pytest.fixture
def reading(access: Access) -> Iterator[Callable[..., SshTree]]:
    """Trees that are closed in the end."""
    made: list[SshTree] = []

    def make(port: int = 0, key: Path | None = None, **more: str) -> SshTree:
        made.append(SshTree(access.url(port), access.ssh(key, **more)))
        return made[-1]

    yield make
    for one in made:
        one.close()


def clients() -> list[int]:
    """Our own processes of ssh."""
    ssh = program("ssh").encode()
    return [pid for pid in descendants(os.getpid()) if Path("/proc", str(pid), "cmdline").read_bytes().startswith(ssh)]


def private(place: str = "") -> Path:
    return Path(place or os.environ["TMPDIR"]) / f"pitr-{os.getuid()}"


def stored(access: Access, name: str) -> Path:
    return access.repository / CLUSTER / "archive" / "18-1" / name[:16] / name


def wal(tmp_path: Path, number: int, seed: int = 0) -> str:
    """A segment in a pg_wal; returns its path."""
    return put(tmp_path / "pg_wal", wal_name(1, number), segment(1, number, seed=seed))


def big(access: Access, megabytes: int) -> tuple[str, Path]:
    """A large file of a backup: its place in the repository, and the file."""
    path = access.repository / CLUSTER / "backups" / "b1" / "base.tar"
    path.parent.mkdir(exist_ok=True)
    block = os.urandom(MIB)
    with open(path, "wb") as stream:
        for number in range(megabytes):
            stream.write(number.to_bytes(8, "big") + block[8:])
    return f"{CLUSTER}/backups/b1/base.tar", path


def test_every_kind_of_file_goes_there_and_back(access: Access, tmp_path: Path) -> None:
    files = {
        wal_name(1, 5): segment(1, 5),
        wal_name(1, 6) + ".partial": segment(1, 6),
        wal_name(1, 5) + ".00000028.backup": b"START WAL LOCATION: 0/500028\n",
        "00000002.history": history((1, "0/600000")).encode(),
    }
    for name, content in files.items():
        pushed = access.push(put(tmp_path / "pg_wal", name, content))
        assert (pushed.returncode, pushed.stderr) == (0, ""), name
    for name, content in files.items():
        got = access.get(name, tmp_path / "got")
        assert (got.returncode, got.stderr) == (0, ""), name
        assert (tmp_path / "got").read_bytes() == content


def test_same_segment_again_succeeds_and_other_content_is_refused(access: Access, tmp_path: Path) -> None:
    path = wal(tmp_path, 5)
    assert access.push(path).returncode == 0
    before = tree(access.repository)
    assert access.push(path).returncode == 0
    other = put(tmp_path / "other", wal_name(1, 5), segment(1, 5, seed=1))
    answer = access.push(other)
    assert answer.returncode in range(1, 126) and "other content" in answer.stderr
    assert tree(access.repository) == before


def test_missing_segment_is_told_from_a_hole_as_in_a_directory(access: Access, tmp_path: Path) -> None:
    for number in (5, 7):
        access.push(wal(tmp_path, number))
    assert access.get(wal_name(1, 8), tmp_path / "got").returncode == 1
    hole = access.get(wal_name(1, 6), tmp_path / "got")
    assert hole.returncode > 125 and "hole" in hole.stderr
    assert not (tmp_path / "got").exists()


def test_many_calls_share_one_connection_for_each_key(access: Access, tmp_path: Path) -> None:
    for number in range(5, 10):
        assert access.push(wal(tmp_path, number)).returncode == 0
        assert access.get(wal_name(1, number), tmp_path / "got").returncode == 0
    assert access.sshd.logins == 2


def test_one_process_asks_everything_in_one_session(access: Access, tmp_path: Path) -> None:
    access.push(wal(tmp_path, 5))
    folder = ClusterFolder.open(access.url(), CLUSTER, access.ssh())
    for _time in range(20):
        assert folder.tree.exists(str(folder.path))
        with open_reader(f"{folder.archive_path()}/{wal_name(1, 5)[:16]}/{wal_name(1, 5)}", folder.tree) as reader:
            assert reader.read() == segment(1, 5)
    assert len(clients()) == 1
    assert isinstance(folder.tree, SshTree)
    folder.tree.close()


# --- keys


def test_key_gives_no_shell_no_files_and_no_forwarding(access: Access, tmp_path: Path) -> None:
    before = tree(access.repository)
    for key in (access.writer, access.reader):
        for words in ((), ("id",), ("sh", "-c", "touch /tmp/pitr-was-here"), ("pitr-wal; touch /tmp/pitr-was-here",)):
            answer = access.plain_ssh(key, *words, text="touch /tmp/pitr-was-here\n")
            assert answer.returncode != 0 and "nothing else" in answer.stderr, words
            assert "uid=" not in answer.stdout
        answer = access.plain_ssh(key, "sftp", options=("-s",), text="\0\0\0\5\1\0\0\0\3")
        assert answer.returncode != 0 and answer.stdout == ""
        answer = access.plain_ssh(key, options=("-W", f"127.0.0.1:{access.sshd.port}"))
        assert answer.returncode != 0 and "SSH-2.0" not in answer.stdout
        answer = access.plain_ssh(key, "-N", options=("-o", "ExitOnForwardFailure=yes", "-R", "0:127.0.0.1:1"))
        assert answer.returncode != 0
        answer = access.plain_ssh(key, options=("-tt",))
        assert answer.returncode != 0 and "PTY allocation request failed" in answer.stderr
    assert not Path("/tmp/pitr-was-here").exists()
    assert tree(access.repository) == before


def test_scp_copies_nothing_in_either_direction(access: Access, tmp_path: Path) -> None:
    before = tree(access.repository)
    options = ["-F", "/dev/null", "-B", "-P", str(access.sshd.port), "-o", "IdentitiesOnly=yes"]
    options += ["-o", f"UserKnownHostsFile={access.sshd.known_hosts}"]
    mark = put(tmp_path, "mark", "x")
    secret = f"127.0.0.1:{access.repository}/{CLUSTER}/cluster.json"
    scp = str(Path(program("ssh")).with_name("scp"))
    for key in (access.writer, access.reader):
        for protocol in ("-O", "-s"):
            for pair in ((mark, f"127.0.0.1:{access.repository}/mark"), (secret, str(tmp_path / "copy"))):
                argv = [scp, protocol, *options, "-i", str(key), *pair]
                assert subprocess.run(argv, capture_output=True, check=False, timeout=60).returncode != 0
    assert not (tmp_path / "copy").exists() and tree(access.repository) == before


def test_reader_adds_nothing_and_writer_reads_no_backup(
    access: Access, tmp_path: Path, reading: Callable[..., SshTree]
) -> None:
    big(access, 1)
    before = tree(access.repository)
    access.configure(ssh_writer_identity=str(access.reader), ssh_reader_identity=str(access.writer))
    answer = access.push(wal(tmp_path, 5))
    assert answer.returncode in range(1, 126) and "only reads" in answer.stderr
    answer = access.get(wal_name(1, 5), tmp_path / "got")
    assert answer.returncode > 125 and "only adds WAL" in answer.stderr
    writer = reading(key=access.writer)
    with pytest.raises(PitrError, match="only adds WAL"):
        writer.open(f"{access.url()}/{CLUSTER}/backups/b1/base.tar")
    with pytest.raises(PitrError, match="may not list"):
        writer.names(f"{access.url()}/{CLUSTER}/backups")
    assert tree(access.repository) == before


def test_keys_of_one_cluster_do_not_reach_another_one(access: Access, tmp_path: Path) -> None:
    make_repository(access.repository, "other")
    other = Access(access.sshd, access.repository, tmp_path / "for other", "other")
    assert other.push(wal(tmp_path, 5)).returncode == 0
    before = tree(access.repository)
    other.configure(ssh_writer_identity=str(access.writer), ssh_reader_identity=str(access.reader))
    answer = other.push(wal(tmp_path, 6))
    assert answer.returncode in range(1, 126) and "key is for the cluster 'main'" in answer.stderr
    answer = other.get(wal_name(1, 5), tmp_path / "got")
    assert answer.returncode > 125 and "key is for the cluster 'main'" in answer.stderr
    assert tree(access.repository) == before


def test_key_of_nobody_is_told_as_such(access: Access, tmp_path: Path) -> None:
    stranger = access.sshd.key("stranger")
    access.configure(ssh_writer_identity=str(stranger), ssh_reader_identity=str(stranger))
    answer = access.push(wal(tmp_path, 5))
    assert answer.returncode in range(1, 126) and "does not accept our key" in answer.stderr
    assert answer.stderr.count("\n") == 1
    answer = access.get(wal_name(1, 5), tmp_path / "got")
    assert answer.returncode > 125 and "does not accept our key" in answer.stderr


def test_foreign_segment_is_refused_by_the_repository_host_itself(
    access: Access, tmp_path: Path, reading: Callable[..., SshTree]
) -> None:
    """A client whose own check is out of order."""
    before = tree(access.repository)
    place = f"{access.url()}/{CLUSTER}/archive/18-1/{wal_name(1, 5)[:16]}/{wal_name(1, 5)}"
    with pytest.raises(PitrError, match="system identifier"):
        with reading(key=access.writer).adding(place) as temporary:
            Path(temporary).write_bytes(gzip.compress(segment(1, 5, system=SYSTEM + 1)))
    assert tree(access.repository) == before


# --- the link


def test_changed_host_key_stops_both_commands(access: Access, tmp_path: Path) -> None:
    access.push(wal(tmp_path, 5))
    before = tree(access.repository)
    access.sshd.stop()
    access.sshd.new_host_key()
    access.sshd.start()
    answer = access.push(wal(tmp_path, 6))
    assert answer.returncode in range(1, 126) and "host key" in answer.stderr and answer.stderr.count("\n") == 1
    answer = access.get(wal_name(1, 9), tmp_path / "got")
    assert answer.returncode > 125 and "host key" in answer.stderr
    assert tree(access.repository) == before and access.sshd.logins == 1


def test_host_that_nobody_has_pinned_is_not_trusted(access: Access, tmp_path: Path) -> None:
    access.configure(ssh_known_hosts=put(tmp_path, "empty", ""))
    answer = access.push(wal(tmp_path, 5))
    assert answer.returncode in range(1, 126) and "host key" in answer.stderr


def test_unreachable_repository_is_never_an_absent_file(access: Access, tmp_path: Path) -> None:
    access.push(wal(tmp_path, 5))
    access.sshd.stop()
    answer = access.push(wal(tmp_path, 6))
    assert answer.returncode in range(1, 126) and "cannot be reached" in answer.stderr
    assert answer.stderr.count("\n") == 1
    answer = access.get(wal_name(1, 9), tmp_path / "got")
    assert answer.returncode > 125 and "cannot be reached" in answer.stderr
    access.sshd.start()
    assert access.push(wal(tmp_path, 6)).returncode == 0
    assert access.get(wal_name(1, 9), tmp_path / "got").returncode == 1


def test_directory_that_is_gone_on_the_repository_host_is_never_an_absent_file(access: Access, tmp_path: Path) -> None:
    access.push(wal(tmp_path, 5))
    (access.repository / "pitr-repository.json").rename(tmp_path / "marker")
    answer = access.get(wal_name(1, 9), tmp_path / "got")
    assert answer.returncode > 125 and "Is its filesystem mounted?" in answer.stderr


def test_command_that_is_gone_on_the_repository_host_is_never_an_absent_file(access: Access, tmp_path: Path) -> None:
    access.server_command.unlink()
    answer = access.get(wal_name(1, 9), tmp_path / "got")
    assert answer.returncode > 125 and "not found" in answer.stderr


@pytest.mark.parametrize("kilobytes", [64, 500])
def test_push_that_breaks_off_leaves_nothing_and_the_next_one_succeeds(
    access: Access, link: Link, tmp_path: Path, kilobytes: int
) -> None:
    before = tree(access.repository)
    access.configure(repository=access.url(link.port), compression="none")
    link.cut_after = kilobytes * 1024
    answer = access.push(wal(tmp_path, 5))
    assert answer.returncode in range(1, 126), answer.stderr
    assert answer.stderr.count("\n") == 1
    until(lambda: tree(access.repository) == before, "the temporary file is gone")
    assert not list(private().glob("*.tmp"))
    link.cut_after = 0
    assert access.push(wal(tmp_path, 5)).returncode == 0
    assert access.get(wal_name(1, 5), tmp_path / "got").returncode == 0


def test_sshd_that_is_killed_during_a_push_leaves_no_name(access: Access, link: Link, tmp_path: Path) -> None:
    access.configure(repository=access.url(link.port), compression="none")
    link.rate = 400_000
    folder = stored(access, wal_name(1, 5)).parent
    with subprocess.Popen(
        [str(access.client / "pitr-wal"), "push", CLUSTER, wal(tmp_path, 5)], stderr=subprocess.PIPE, text=True
    ) as pushing:
        until(lambda: folder.is_dir() and any(path.stat().st_size for path in folder.iterdir()), "it is being sent")
        access.sshd.stop()
        said = pushing.communicate(timeout=60)[1]
    assert pushing.returncode in range(1, 126) and said.count("\n") == 1
    # What was killed with it could not tidy up: no reader takes that for a segment.
    left = list(folder.iterdir()) if folder.exists() else []
    assert all(path.name.startswith(".") and path.name.endswith(".tmp") for path in left)
    link.rate = 0
    access.sshd.start()
    assert access.get(wal_name(1, 5), tmp_path / "got").returncode == 1
    assert access.push(wal(tmp_path, 5)).returncode == 0
    assert access.get(wal_name(1, 5), tmp_path / "got").returncode == 0


def test_get_that_breaks_off_delivers_nothing(access: Access, link: Link, tmp_path: Path) -> None:
    access.configure(compression="none")
    access.push(wal(tmp_path, 5))
    access.configure(repository=access.url(link.port))
    link.rate = 200_000
    with subprocess.Popen(
        [str(access.client / "pitr-wal"), "get", CLUSTER, wal_name(1, 5), str(tmp_path / "got")],
        stderr=subprocess.PIPE, text=True,
    ) as getting:  # fmt: skip
        until(lambda: link.received > 100_000, "it is being fetched")
        link.cut()
        said = getting.communicate(timeout=60)[1]
    assert getting.returncode > 125 and "damaged" not in said and said.count("\n") == 1
    assert not [name for name in os.listdir(tmp_path) if name.startswith("got")]
    link.rate = 0
    assert access.get(wal_name(1, 5), tmp_path / "got").returncode == 0


def test_slow_link_works(access: Access, link: Link, tmp_path: Path) -> None:
    access.configure(repository=access.url(link.port), compression="none", ssh_timeout="3")
    link.rate = 150_000
    started = time.monotonic()
    answer = access.push(wal(tmp_path, 5))
    assert (answer.returncode, answer.stderr) == (0, "")
    assert time.monotonic() - started > 3
    link.rate = 500_000
    assert access.get(wal_name(1, 5), tmp_path / "got").returncode == 0
    assert (tmp_path / "got").read_bytes() == segment(1, 5)


@pytest.mark.parametrize("when", ["before", "during", "between"])
def test_stalled_link_is_given_up(access: Access, link: Link, tmp_path: Path, when: str) -> None:
    access.configure(repository=access.url(link.port), compression="none", ssh_timeout="3")
    if when == "between":
        assert access.push(wal(tmp_path, 4)).returncode == 0
    if when == "during":
        link.stall_after = 200_000
    else:
        link.stalled.set()
    started = time.monotonic()
    answer = access.push(wal(tmp_path, 5))
    assert answer.returncode in range(1, 126) and answer.stderr.count("\n") == 1
    assert time.monotonic() - started < 15
    answer = access.get(wal_name(1, 9), tmp_path / "got")
    assert answer.returncode > 125
    link.stall_after = 0
    link.stalled.clear()
    access.configure(repository=access.url(link.port))
    assert access.push(wal(tmp_path, 5)).returncode == 0


# --- the connection that persists


def test_persisting_connection_holds_neither_descriptors_nor_directory_of_the_server(
    access: Access, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    source, target = os.pipe()
    logs, log = os.pipe()
    path = wal(tmp_path, 5)
    with subprocess.Popen(
        [str(access.client / "pitr-wal"), "push", CLUSTER, path], cwd=data, pass_fds=[target], stdout=log, stderr=log
    ) as pushing:
        os.close(target)
        os.close(log)
        assert pushing.wait(60) == 0
    (master,) = masters(os.environ["TMPDIR"])
    # The end of a pipe is seen only when nobody holds its other side any more.
    assert os.read(source, 1) == b"" and os.read(logs, 1) == b""
    assert os.readlink(f"/proc/{master}/cwd") == "/"
    assert os.getsid(master) != os.getsid(0)
    assert clients() == []
    for descriptor in (source, logs):
        os.close(descriptor)


def test_socket_of_a_connection_that_was_killed_is_no_obstacle(access: Access, tmp_path: Path) -> None:
    access.push(wal(tmp_path, 5))
    (master,) = masters(os.environ["TMPDIR"])
    os.kill(master, signal.SIGKILL)
    until(lambda: not masters(os.environ["TMPDIR"]), "the connection has ended")
    assert list(private().iterdir()), "its socket is still there"
    for number in (6, 7, 8):
        answer = access.push(wal(tmp_path, number))
        assert (answer.returncode, answer.stderr) == (0, "")
    assert access.sshd.logins == 2


def test_connection_that_was_stopped_is_no_obstacle(access: Access, tmp_path: Path) -> None:
    access.configure(ssh_timeout="5")
    access.push(wal(tmp_path, 5))
    (master,) = masters(os.environ["TMPDIR"])
    os.kill(master, signal.SIGSTOP)
    try:
        started = time.monotonic()
        assert access.push(wal(tmp_path, 6)).returncode == 0
        assert time.monotonic() - started < 30
        started = time.monotonic()
        assert access.push(wal(tmp_path, 7)).returncode == 0
        assert time.monotonic() - started < 5, "the second call has not waited for it again"
    finally:
        os.kill(master, signal.SIGKILL)


def test_connection_that_died_with_the_network_is_no_obstacle(access: Access, link: Link, tmp_path: Path) -> None:
    access.configure(repository=access.url(link.port))
    access.push(wal(tmp_path, 5))
    link.cut()
    assert access.push(wal(tmp_path, 6)).returncode == 0


def test_calls_at_once_all_succeed(access: Access, tmp_path: Path) -> None:
    paths = [wal(tmp_path, number) for number in range(5, 13)]
    running = [
        subprocess.Popen([str(access.client / "pitr-wal"), "push", CLUSTER, path], stderr=subprocess.PIPE)
        for path in [*paths, *paths]
    ]
    for one in running:
        said = one.communicate(timeout=120)[1]
        assert (one.returncode, said) == (0, b"")
    for number in range(5, 13):
        assert access.get(wal_name(1, number), tmp_path / "got").returncode == 0


def test_directory_of_another_user_is_not_used_for_sockets(
    access: Access, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private().mkdir(mode=0o777)
    private().chmod(0o777)
    assert access.push(wal(tmp_path, 5)).returncode == 0
    assert not list(private().iterdir()) and not masters(os.environ["TMPDIR"])
    assert os.listdir(os.environ["TMPDIR"]) == [private().name]


def test_long_temporary_path_costs_the_connection_and_nothing_else(
    access: Access, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Path(os.environ["TMPDIR"], "x" * 100)
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    assert access.push(wal(tmp_path, 5)).returncode == 0
    assert not masters(place)


def test_leftovers_of_killed_calls_are_removed(access: Access, tmp_path: Path) -> None:
    access.push(wal(tmp_path, 5))
    old, young = Path(put(private(), "old.tmp", "x")), Path(put(private(), "young.tmp", "x"))
    os.utime(old, (0, 0))
    access.push(wal(tmp_path, 6))
    assert young.exists() and not old.exists()


# --- large files


def test_large_file_streams_with_flat_memory_and_arrives_whole(access: Access, tmp_path: Path) -> None:
    place, path = big(access, 200)
    code = f"""
import hashlib, os, resource, sys
from ansible_collections.pgdrill.pitr.plugins.module_utils.remote import SshTree
tree = SshTree({access.url()!r}, {access.ssh()!r})
tree.stat({access.url()!r} + "/main/cluster.json")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
source = tree.open({access.url()!r} + "/" + {place!r})
digest = hashlib.sha256()
while data := os.read(source.descriptor, 1 << 20):
    digest.update(data)
source.check()
source.close()
print(digest.hexdigest(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert answer.returncode == 0, answer.stderr
    digest, kilobytes = answer.stdout.split()
    expected = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout.split()[0]
    assert digest == expected
    assert int(kilobytes) < 20_000


@pytest.mark.parametrize("size", [1, 40])
def test_beginning_can_be_looked_at_and_skipped(access: Access, reading: Callable[..., SshTree], size: int) -> None:
    place, path = big(access, size)
    source = reading().open(f"{access.url()}/{place}")
    with open(path, "rb") as stream:
        head = stream.read(512)
        assert source.peek() == head and source.peek(10) == head[:10]
        source.skip(200)
        assert source.peek(20) == head[:20]
        stream.seek(200)
        assert os.read(source.descriptor, 1000) == stream.read(1000)
    source.close()


def test_large_file_can_be_let_go_in_the_middle_and_the_next_one_read(
    access: Access, reading: Callable[..., SshTree]
) -> None:
    place, _path = big(access, 60)
    threads = threading.active_count()
    tree = reading()
    for _time in range(3):
        source = tree.open(f"{access.url()}/{place}")
        assert len(os.read(source.descriptor, 100)) == 100
        # Two at once, and other requests beside them.
        other = tree.open(f"{access.url()}/{place}")
        assert tree.stat(f"{access.url()}/{place}").size == 60 * MIB
        other.close()
        source.close()
    assert threading.active_count() == threads


def test_large_transfer_that_breaks_off_is_not_called_damage(
    access: Access, link: Link, reading: Callable[..., SshTree]
) -> None:
    place, path = big(access, 60)
    path.write_bytes(b"\x1f\x8b" + gzip.compress(os.urandom(50 * MIB), 0)[2:])
    tree = reading(link.port)
    opened = f"{access.url(link.port)}/{place}"
    with pytest.raises(PitrError, match="broke off") as caught:
        with open_reader(opened, tree) as reader:
            reader.read(MIB)
            link.cut()
            while reader.read(MIB):
                pass
    assert "damaged" not in caught.value.message
    with open_reader(opened, tree) as reader:
        assert sum(iter(lambda: len(reader.read(MIB)), 0)) == 50 * MIB


def test_large_file_that_is_damaged_is_called_damaged(access: Access, reading: Callable[..., SshTree]) -> None:
    place, path = big(access, 60)
    content = bytearray(gzip.compress(os.urandom(50 * MIB), 0))
    content[-6] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(PitrError, match="is damaged"):
        with open_reader(f"{access.url()}/{place}", reading()) as reader:
            while reader.read(MIB):
                pass


def test_session_that_the_server_has_ended_meanwhile_is_replaced(
    access: Access, reading: Callable[..., SshTree]
) -> None:
    tree = reading()
    path = f"{access.url()}/{CLUSTER}/cluster.json"
    tree.stat(path)
    for pid in clients():
        os.kill(pid, signal.SIGKILL)
    assert tree.stat(path).size > 0


def test_forked_child_does_not_speak_into_its_parents_session(access: Access, reading: Callable[..., SshTree]) -> None:
    tree = reading()
    path = f"{access.url()}/{CLUSTER}/cluster.json"
    content = tree.read(path)
    child = os.fork()
    if child == 0:
        os._exit(0 if all(tree.read(path) == content for _time in range(20)) else 1)
    assert all(tree.read(path) == content for _time in range(20))
    assert os.waitpid(child, 0)[1] == 0


def test_missing_ssh_is_named(access: Access, reading: Callable[..., SshTree], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "which", lambda _command: None)
    with pytest.raises(PitrError, match="openssh-client"):
        reading().stat(f"{access.url()}/{CLUSTER}")
