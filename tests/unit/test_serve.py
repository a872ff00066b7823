# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The repository host's side of ``ssh://``, asked directly: what a key may do, whoever holds it."""

from __future__ import annotations

import gzip
import hashlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils import locks
from ansible_collections.pgdrill.pitr.plugins.module_utils import serve as serving
from ansible_collections.pgdrill.pitr.plugins.module_utils.encryption import Header, recipients_id
from ansible_collections.pgdrill.pitr.plugins.module_utils.repository import ClusterFolder
from ansible_collections.pgdrill.pitr.plugins.module_utils.wire import (
    ANSWER,
    CHUNK,
    DATA,
    END,
    FAILURE,
    HELLO,
    PROTOCOL,
    REQUEST,
    WORD,
    Lost,
    Silent,
    Wire,
    document,
)
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

PLACE = f"{CLUSTER}/archive/18-1"
FIRST = f"{PLACE}/{wal_name(1, 5)[:16]}/{wal_name(1, 5)}"


class Talk:
    """A client without manners: says what a test wants it to say."""

    def __init__(self, access: str, repository: Path, cluster: str = CLUSTER, claims: str = "") -> None:
        source, self._to = os.pipe()
        self._from, target = os.pipe()
        self.code: int | None = None

        def run() -> None:
            self.code = serving.serve(access, cluster, str(repository), source, target)
            os.close(source)
            os.close(target)

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()
        self.wire = Wire(self._from, self._to, 20, 1 << 30)
        self.hello = document(self.wire.receive()[1])
        self.wire.say(HELLO, {"protocol": PROTOCOL, "repository": claims or str(repository)})
        self.greeting = self.hear()

    def hear(self) -> Any:
        """The kind of the next frame, and what it says."""
        kind, payload = self.wire.receive()
        return kind, payload if kind == DATA else document(payload)

    def ask(self, do: str, place: Any = None, **more: Any) -> Any:
        self.wire.say(REQUEST, {"do": do, "place": place, **more})
        return self.hear()

    def content(self) -> bytes:
        """What follows the answer to ``open``."""
        parts = []
        while True:
            kind, said = self.hear()
            if kind == END:
                return b"".join(parts)
            assert kind == DATA
            parts.append(said)

    def add(self, place: str, data: bytes, size: int | None = None) -> Any:
        """Add, and give the last answer."""
        answer = self.ask("add", place, size=len(data) if size is None else size)
        if answer[0] != ANSWER:
            return answer
        return self.send(data)

    def send(self, data: bytes) -> Any:
        """The content of what is being added; gives the answer."""
        for start in range(0, len(data), CHUNK):
            self.wire.send(DATA, data[start : start + CHUNK])
        self.wire.say(END, {"size": len(data)})
        return self.hear()

    def hang_up(self) -> None:
        if self._to >= 0:
            os.close(self._to)
            self._to = -1
        self._thread.join(20)
        assert not self._thread.is_alive()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ClusterFolder:
    """A repository with two clusters; ``main`` holds a segment and something that looks like a backup."""
    monkeypatch.setenv("SSH_ORIGINAL_COMMAND", WORD)
    # Only the main thread may ask for signals.
    monkeypatch.setattr(serving.signal, "signal", lambda *_arguments: None)
    made = make_repository(tmp_path / "r")
    make_repository(tmp_path / "r", "other")
    put(Path(made.backups_path) / "b1", "backup.json", "{}")
    put(Path(made.archive_path()) / wal_name(1, 4)[:16], wal_name(1, 4), segment(1, 4))
    return made


@pytest.fixture
def talk(folder: ClusterFolder) -> Iterator[Callable[..., Talk]]:
    made: list[Talk] = []

    def start(access: str, **options: str) -> Talk:
        made.append(Talk(access, Path(folder.repository), **options))
        return made[-1]

    yield start
    for one in made:
        one.hang_up()


def refused(answer: Any) -> str:
    """The message of a refusal."""
    kind, said = answer
    assert kind == FAILURE and said["kind"] == "refused", answer
    return str(said["message"])


def temporaries(folder: ClusterFolder) -> list[str]:
    return [name for name in tree(folder.repository) if name.endswith(".tmp")]


# --- a writer's key


def test_writer_adds_a_segment_under_its_name(talk: Callable[..., Talk], folder: ClusterFolder) -> None:
    stored = gzip.compress(segment(1, 5), 1)
    writer = talk("write")
    assert writer.add(FIRST, stored)[0] == ANSWER
    assert writer.ask("settle", FIRST)[0] == ANSWER
    assert writer.ask("stat", FIRST)[1]["size"] == len(stored)
    assert Path(folder.repository, FIRST).read_bytes() == stored
    assert Path(folder.repository, FIRST).stat().st_mode & 0o777 == 0o600


def test_writer_reads_what_it_compares_with_and_no_backup(talk: Callable[..., Talk]) -> None:
    writer = talk("write")
    for place in ("pitr-repository.json", f"{CLUSTER}/cluster.json", f"{PLACE}/{wal_name(1, 4)[:16]}/{wal_name(1, 4)}"):
        assert writer.ask("open", place)[0] == ANSWER
        writer.content()
    for place in (f"{CLUSTER}/backups/b1/backup.json", f"{CLUSTER}/backups", PLACE, CLUSTER):
        assert "only adds WAL" in refused(writer.ask("open", place))
        assert "only adds WAL" in refused(writer.ask("stat", place))


def test_writer_may_not_list(talk: Callable[..., Talk]) -> None:
    assert "may not list" in refused(talk("write").ask("names", PLACE))


@pytest.mark.parametrize(
    "place",
    [
        "pitr-repository.json",
        f"{CLUSTER}/cluster.json",
        f"{CLUSTER}/backups/b1/backup.json",
        f"{CLUSTER}/backups/b2/base.tar.gz",
        f"{CLUSTER}/{wal_name(1, 5)}",
        f"{PLACE}/{wal_name(1, 5)}",
        f"{PLACE}/{wal_name(2, 5)[:16]}/{wal_name(1, 5)}",
        f"{CLUSTER}/archive/18-2/{wal_name(1, 5)[:16]}/{wal_name(1, 5)}",
        f"{PLACE}/{wal_name(1, 5)[:16]}/00000002.history",
        f"{PLACE}/{wal_name(1, 5)[:16]}/.{wal_name(1, 5)}.tmp",
        f"{PLACE}/x/../{wal_name(1, 5)[:16]}/{wal_name(1, 5)}",
        f"other/archive/18-1/{wal_name(1, 5)[:16]}/{wal_name(1, 5)}",
        f"../r/{FIRST}",
        f"/{FIRST}",
        f"/etc/{wal_name(1, 5)}",
        f"{FIRST}\n",
        f"{FIRST}\0",
        "",
        None,
        7,
    ],
)
def test_writer_adds_nothing_anywhere_else(talk: Callable[..., Talk], folder: ClusterFolder, place: Any) -> None:
    before = tree(Path(folder.repository).parent)
    refused(talk("write").add(place, gzip.compress(segment(1, 5))))
    assert tree(Path(folder.repository).parent) == before


def test_what_is_there_is_never_overwritten(talk: Callable[..., Talk], folder: ClusterFolder) -> None:
    before = tree(folder.repository)
    place = f"{PLACE}/{wal_name(1, 4)[:16]}/{wal_name(1, 4)}"
    assert talk("write").add(place, segment(1, 4, seed=1)) == (FAILURE, {"kind": "exists"})
    assert tree(folder.repository) == before


def test_segment_that_comes_while_it_is_sent_is_not_overwritten(
    talk: Callable[..., Talk], folder: ClusterFolder
) -> None:
    first, second = talk("write"), talk("write")
    data, other = segment(1, 5), segment(1, 5, seed=1)
    assert first.ask("add", FIRST, size=len(data))[0] == ANSWER
    assert second.add(FIRST, other)[0] == ANSWER
    assert first.send(data) == (FAILURE, {"kind": "exists"})
    assert Path(folder.repository, FIRST).read_bytes() == other and not temporaries(folder)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (segment(1, 5, system=SYSTEM + 1), "system identifier"),
        (segment(1, 6), "which is not what its name says"),
        (segment(1, 5, written_on=2), "was written on timeline 2"),
        (segment(1, 5, size=2 * MIB), "can be right"),
        (segment(1, 5)[:-1], "can be right"),
        (b"", "can be right"),
        (bytes(MIB), "is not a WAL segment"),
        (gzip.compress(segment(1, 5))[:-4], "is damaged"),
        (gzip.compress(segment(1, 5) * 40), "can be right"),
    ],
)
def test_segment_that_is_not_what_its_name_says_is_refused_on_the_repository_host(
    talk: Callable[..., Talk], folder: ClusterFolder, content: bytes, says: str
) -> None:
    before = tree(folder.repository)
    assert says in refused(talk("write").add(FIRST, content))
    assert tree(folder.repository) == before


def test_first_segment_of_a_timeline_is_explained_by_the_history_file(talk: Callable[..., Talk]) -> None:
    name = wal_name(2, 5)
    place = f"{PLACE}/{name[:16]}/{name}"
    writer = talk("write")
    copied = segment(2, 5, written_on=1)
    assert "there is no 00000002.history" in refused(writer.add(place, copied))
    assert "00000002.history" in refused(writer.add(f"{PLACE}/00000002.history", b"nonsense"))
    assert writer.add(f"{PLACE}/00000002.history", history((1, "0/5000A0")).encode())[0] == ANSWER
    assert writer.add(place, copied)[0] == ANSWER


AGE = b"age-encryption.org/v1"


def encrypted(content: bytes, recipients: Sequence[str], size: int = MIB, stored: bytes = b"") -> bytes:
    """What a pushing host makes of a segment; that age has made it is of no interest here."""
    digest = hashlib.sha256(stored or content).hexdigest()
    return Header("0" * 64, digest, size, recipients_id(recipients)).line() + content


def test_encrypted_segment_is_stored_unread_when_it_came_whole(
    talk: Callable[..., Talk], folder: ClusterFolder
) -> None:
    folder.change_recipients(["age1one", "age1two"])
    folder.save()
    good = encrypted(b"age-encryption.org/v1", folder.recipients)
    writer = talk("write")
    before = tree(folder.repository)
    for bad, says in (
        (encrypted(AGE + b"x", folder.recipients, stored=b"y"), "are not those that were stored"),
        (encrypted(AGE + b"x", folder.recipients, size=MIB - 1), "can be right"),
        (encrypted(AGE + b"x", ["age1three"]), "other recipients"),
        (encrypted(b"plain", folder.recipients), "says that it is encrypted, and is not"),
        (b"pitr-age 1 and no more", "is damaged"),
        (gzip.compress(segment(1, 5)), "is not encrypted"),
    ):
        message = refused(writer.add(FIRST, bad))
        assert says in message and ".tmp" not in message
    assert tree(folder.repository) == before
    assert writer.add(FIRST, good)[0] == ANSWER
    assert Path(folder.repository, FIRST).read_bytes() == good
    assert writer.add(f"{PLACE}/00000002.history", history((1, "0/5000A0")).encode())[0] == ANSWER


def test_encrypted_segment_of_a_cluster_that_is_not_encrypted_is_refused(
    talk: Callable[..., Talk], folder: ClusterFolder
) -> None:
    message = refused(talk("write").add(FIRST, encrypted(b"age-encryption.org/v1", ["age1one"])))
    assert "is encrypted, and this cluster is not" in message


def test_recipients_that_change_during_a_connection_are_heeded(
    talk: Callable[..., Talk], folder: ClusterFolder
) -> None:
    writer = talk("write")
    assert writer.add(FIRST, segment(1, 5))[0] == ANSWER
    folder.change_recipients(["age1one"])
    folder.save()
    place = f"{PLACE}/{wal_name(1, 6)[:16]}/{wal_name(1, 6)}"
    assert "is not encrypted" in refused(writer.add(place, segment(1, 6)))


@pytest.mark.parametrize("size", [3 * MIB, -1, "many", None, 1 << 62])
def test_size_that_no_segment_has_is_refused_before_anything_is_sent(
    talk: Callable[..., Talk], folder: ClusterFolder, size: Any
) -> None:
    before = tree(folder.repository)
    assert "at most" in refused(talk("write").ask("add", FIRST, size=size))
    assert tree(folder.repository) == before


@pytest.mark.parametrize("more", [True, False])
def test_other_number_of_bytes_than_announced_ends_the_connection(
    talk: Callable[..., Talk], folder: ClusterFolder, more: bool
) -> None:
    before = tree(folder.repository)
    writer = talk("write")
    data = segment(1, 5)
    with pytest.raises(Lost):
        writer.add(FIRST, data, size=len(data) + (-1 if more else 1))
    assert tree(folder.repository) == before


def test_client_that_never_stops_sending_is_cut_off(talk: Callable[..., Talk], folder: ClusterFolder) -> None:
    before = tree(folder.repository)
    writer = talk("write")
    assert writer.ask("add", FIRST, size=CHUNK)[0] == ANSWER
    writer.wire.send(DATA, bytes(CHUNK))
    writer.wire.send(DATA, b"x")
    with pytest.raises(Lost):
        writer.hear()
    assert tree(folder.repository) == before


def test_client_that_dies_in_the_middle_leaves_nothing(talk: Callable[..., Talk], folder: ClusterFolder) -> None:
    before = tree(folder.repository)
    writer = talk("write")
    assert writer.ask("add", FIRST, size=MIB)[0] == ANSWER
    writer.wire.send(DATA, segment(1, 5)[:CHUNK])
    writer.hang_up()
    assert tree(folder.repository) == before


def test_client_that_falls_silent_in_the_middle_is_given_up(
    talk: Callable[..., Talk], folder: ClusterFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "STALLED", 0.2)
    before = tree(folder.repository)
    writer = talk("write")
    assert writer.ask("add", FIRST, size=MIB)[0] == ANSWER
    with pytest.raises(Lost):
        writer.hear()
    assert tree(folder.repository) == before


def test_server_that_is_ended_in_the_middle_takes_its_temporary_file_along(folder: ClusterFolder) -> None:
    code = (
        "import sys; from ansible_collections.pgdrill.pitr.plugins.module_utils.serve import serve;"
        f"sys.exit(serve('write', {CLUSTER!r}, {folder.repository!r}))"
    )
    environment = {**os.environ, "SSH_ORIGINAL_COMMAND": WORD}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    ) as child:
        assert child.stdin and child.stdout
        wire = Wire(child.stdout.fileno(), child.stdin.fileno(), 20, 1 << 20)
        wire.receive()
        wire.say(HELLO, {"protocol": PROTOCOL, "repository": folder.repository})
        assert wire.receive()[0] == ANSWER
        wire.say(REQUEST, {"do": "add", "place": FIRST, "size": MIB})
        assert wire.receive()[0] == ANSWER
        assert temporaries(folder)
        child.send_signal(signal.SIGTERM)
        assert child.wait(20) == 1
    assert not temporaries(folder)


# --- a reader's key


def test_reader_reads_everything_of_its_cluster(talk: Callable[..., Talk], folder: ClusterFolder) -> None:
    reader = talk("read")
    assert reader.ask("names", f"{CLUSTER}/backups") == (ANSWER, {"names": ["b1"]})
    assert reader.ask("open", f"{CLUSTER}/backups/b1/backup.json")[1]["size"] == 2
    assert reader.content() == b"{}"
    assert reader.ask("stat", PLACE)[0] == ANSWER
    assert reader.ask("stat", f"{CLUSTER}/nothing") == (FAILURE, {"kind": "absent"})
    assert reader.ask("open", f"{CLUSTER}/nothing") == (FAILURE, {"kind": "absent"})
    assert reader.ask("names", f"{CLUSTER}/nothing") == (FAILURE, {"kind": "absent"})


def test_reader_adds_nothing(talk: Callable[..., Talk], folder: ClusterFolder) -> None:
    before = tree(folder.repository)
    reader = talk("read")
    assert "only reads" in refused(reader.add(FIRST, segment(1, 5)))
    assert "only reads" in refused(reader.ask("settle", FIRST))
    assert tree(folder.repository) == before


def test_reader_renews_the_leases_of_its_recoveries_and_nothing_else(
    talk: Callable[..., Talk], folder: ClusterFolder
) -> None:
    before = tree(folder.repository)
    reader = talk("read")
    places = ["backups/b1/backup.json", "cluster.json", "locks/expire", "locks/lease-b1", "locks/lease-/x-01234567"]
    places += ["archive/lease-b1-01234567", "locks/deeper/lease-b1-01234567"]
    for place in places:
        refused(reader.ask("lease", f"{CLUSTER}/{place}"))
    refused(reader.ask("lease", "other/locks/lease-b1-01234567"))
    lease = f"{CLUSTER}/locks/lease-b1-01234567"
    assert "holds no lease" in refused(talk("write").ask("lease", lease))
    assert tree(folder.repository) == before
    path = Path(folder.repository, lease)
    for _time in range(2):
        assert reader.ask("lease", lease) == (ANSWER, {})
        assert path.read_bytes() == b"" and "b1" in locks.leases(folder)
        os.utime(path, (1, 1))
        assert locks.leases(folder) == {}


def test_lease_on_a_backup_that_is_not_there_is_refused(talk: Callable[..., Talk], folder: ClusterFolder) -> None:
    """It would keep all WAL for ever."""
    before = tree(folder.repository)
    assert "There is no backup 'b2'" in refused(talk("read").ask("lease", f"{CLUSTER}/locks/lease-b2-01234567"))
    assert tree(folder.repository) == before


def test_lease_on_a_backup_that_is_being_removed_is_refused(talk: Callable[..., Talk], folder: ClusterFolder) -> None:
    with locks.exclusive_use(folder, "b1"):
        message = refused(talk("read").ask("lease", f"{CLUSTER}/locks/lease-b1-01234567"))
    assert "is being removed by an expire" in message


def test_number_of_leases_is_bounded(talk: Callable[..., Talk], folder: ClusterFolder) -> None:
    reader = talk("read")
    for number in range(100):
        assert reader.ask("lease", f"{CLUSTER}/locks/lease-b1-{number:08x}") == (ANSWER, {})
    assert "100 leases already" in refused(reader.ask("lease", f"{CLUSTER}/locks/lease-b1-{100:08x}"))
    assert reader.ask("lease", f"{CLUSTER}/locks/lease-b1-{1:08x}") == (ANSWER, {})


def test_backup_that_is_being_taken_is_shown_to_nobody(talk: Callable[..., Talk], folder: ClusterFolder) -> None:
    """Its files are not encrypted yet."""
    partial = Path(folder.backups_path, ".b2.partial")
    partial.mkdir()
    (partial / "base.tar").write_bytes(b"plain")
    reader = talk("read")
    assert reader.ask("names", f"{CLUSTER}/backups")[1]["names"] == ["b1"]
    for do, place in (("names", ".b2.partial"), ("open", ".b2.partial/base.tar"), ("stat", ".b2.partial/base.tar")):
        assert "may not name" in refused(reader.ask(do, f"{CLUSTER}/backups/{place}"))


def test_refused_segment_leaves_no_folder_behind(talk: Callable[..., Talk], folder: ClusterFolder) -> None:
    before = tree(folder.repository)
    name = wal_name(1, 9 * 4096 + 5)
    refused(talk("write").add(f"{PLACE}/{name[:16]}/{name}", gzip.compress(segment(1, 5))))
    assert tree(folder.repository) == before
    assert not Path(folder.archive_path(), name[:16]).exists()
    impossible = f"{name[:16]}FFFFFFFF"
    assert "cannot be a segment" in refused(talk("write").add(f"{PLACE}/{name[:16]}/{impossible}", b"x"))


@pytest.mark.parametrize("access", ["read", "write"])
@pytest.mark.parametrize(
    "place",
    ["other/cluster.json", "other", "", ".", "..", f"{CLUSTER}/../other/cluster.json", "/etc/passwd", f"{CLUSTER}/..",
     f"{CLUSTER}//../other", f"./{CLUSTER}/cluster.json", f"{CLUSTER}/\0", f"{CLUSTER}x/cluster.json"],
)  # fmt: skip
@pytest.mark.parametrize("do", ["open", "stat", "names"])
def test_neither_key_reaches_beyond_its_cluster(talk: Callable[..., Talk], access: str, place: str, do: str) -> None:
    says = "may not list" if (access, do) == ("write", "names") else "may not name"
    assert says in refused(talk(access).ask(do, place))


@pytest.mark.parametrize("do", ["open", "stat", "names"])
def test_link_that_leads_out_of_the_cluster_is_not_followed(
    talk: Callable[..., Talk], folder: ClusterFolder, do: str
) -> None:
    os.symlink("../other", os.path.join(folder.path, "door"))
    os.symlink("/etc", os.path.join(folder.path, "backups", "gate"))
    reader = talk("read")
    for place in ("door", "door/cluster.json", "backups/gate", "backups/gate/passwd"):
        assert "leads out" in refused(reader.ask(do, f"{CLUSTER}/{place}"))


def test_segment_is_not_added_through_a_link(talk: Callable[..., Talk], folder: ClusterFolder, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    os.symlink(elsewhere, Path(folder.archive_path()) / wal_name(2, 5)[:16])
    name = wal_name(2, 5)
    assert "leads out" in refused(talk("write").add(f"{PLACE}/{name[:16]}/{name}", segment(2, 5)))
    assert not list(elsewhere.iterdir())


def test_pipe_and_directory_are_not_files(talk: Callable[..., Talk], folder: ClusterFolder) -> None:
    os.mkfifo(os.path.join(folder.path, "pipe"))
    reader = talk("read")
    assert "is not a file" in refused(reader.ask("open", f"{CLUSTER}/pipe"))
    assert "is not a file" in refused(reader.ask("open", f"{CLUSTER}/backups"))


# --- the conversation


@pytest.mark.parametrize("do", ["remove", "rename", "write", "mkdir", "", None, ["open"]])
@pytest.mark.parametrize("access", ["read", "write"])
def test_there_are_no_other_requests(talk: Callable[..., Talk], folder: ClusterFolder, access: str, do: Any) -> None:
    before = tree(folder.repository)
    assert "is not known here" in refused(talk(access).ask(do, f"{CLUSTER}/cluster.json"))
    assert tree(folder.repository) == before


def test_another_repository_than_the_keys_is_refused(talk: Callable[..., Talk], folder: ClusterFolder) -> None:
    assert "This key is for the repository" in refused(talk("read", claims="/somewhere/else").greeting)
    assert talk("read", claims=folder.repository + "/").greeting[0] == ANSWER


def test_missing_cluster_is_an_error_and_not_an_absence(talk: Callable[..., Talk]) -> None:
    assert "has no cluster 'gone'" in refused(talk("read", cluster="gone").greeting)


def test_other_version_of_the_conversation_is_refused(folder: ClusterFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "PROTOCOL", 2)
    talk = Talk("read", Path(folder.repository))
    assert "Update the older one" in refused(talk.greeting)
    talk.hang_up()


@pytest.mark.parametrize("frame", [b"Q\xff\xff\xff\xff", b"Q\0\0\0\x03no!", b"Q\0\0\0\x02[]", b"SSH-2.0", b"D\0\0\0\0"])
def test_nonsense_ends_the_connection(talk: Callable[..., Talk], folder: ClusterFolder, frame: bytes) -> None:
    before = tree(folder.repository)
    reader = talk("read")
    os.write(reader._to, frame)
    if frame == b"SSH-2.0":
        reader.hang_up()
    with pytest.raises(Lost):
        reader.hear()
    assert tree(folder.repository) == before


@pytest.mark.parametrize("asked", ["", "sh", "ls /", "pitr-wal; id", "scp -t /tmp"])
def test_whatever_else_a_key_is_used_for_is_refused(
    asked: str, folder: ClusterFolder, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SSH_ORIGINAL_COMMAND", asked)
    assert serving.serve("read", CLUSTER, folder.repository) == 1
    told = capfd.readouterr()
    assert told.out == "" and "nothing else" in told.err


# --- frames


def test_silence_is_noticed_in_both_directions() -> None:
    source, target = os.pipe()
    os.set_blocking(target, False)
    wire = Wire(source, target, 0.05, 1 << 20)
    with pytest.raises(Silent):
        wire.receive()
    with pytest.raises(Silent):
        wire.send(DATA, bytes(10 << 20))
    for descriptor in (source, target):
        os.close(descriptor)


def test_frames_arrive_as_they_were_sent_however_the_bytes_are_cut() -> None:
    source, target = os.pipe()
    wire = Wire(source, target, 20, 1 << 20)
    frames = [(DATA, b""), (DATA, b"x"), (END, b"{}"), (DATA, bytes(range(256)) * 100)]
    stream = b"".join(kind + len(payload).to_bytes(4, "big") + payload for kind, payload in frames)

    def dribble() -> None:
        for start in range(0, len(stream), 777):
            os.write(target, stream[start : start + 777])
        os.close(target)

    thread = threading.Thread(target=dribble)
    thread.start()
    assert [wire.receive() for _frame in frames] == frames
    with pytest.raises(Lost):
        wire.receive()
    thread.join()
    os.close(source)
