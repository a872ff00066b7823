# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Work before it is asked for: a note that fits saves a call its work, any other is worth nothing."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils import ahead, archive, cli, fast
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.plugins.module_utils.install import COMMAND, install
from ansible_collections.pgdrill.pitr.plugins.module_utils.repository import MARKER, Chapter, ClusterFolder
from ansible_collections.pgdrill.pitr.plugins.module_utils.wal import WalFile
from ansible_collections.pgdrill.pitr.tests.unit.support import (
    CLUSTER,
    MIB,
    SYSTEM,
    history,
    interpreters,
    make_repository,
    put,
    segment,
    tree,
    wal_name,
)

PATIENCE = 60.0
OPTIONS = {"system-identifier": str(SYSTEM)}


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for: {what}"
        time.sleep(0.01)


def change(path: Path, at: int = MIB // 2) -> None:
    """One bit of a file, whose size and time of change stay as they were."""
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    with open(path, "r+b") as stream:
        stream.write(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def call(argv: list[str]) -> int:
    """What the installed __main__.py does; the exit code."""
    return 0 if fast.answer(argv) else cli.main(argv)


class Host:
    """A data directory whose archiver has a backlog, a repository, and the installed command."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.pgdata = root / "data"
        self.pg_wal = self.pgdata / "pg_wal"
        self.status = self.pg_wal / "archive_status"
        self.status.mkdir(parents=True)
        self.repository = root / "repository"
        self.folder = make_repository(self.repository)
        self.directory = root / "installed"
        self.settings: dict[str, object] = {"repository": str(self.repository), "compression": "gzip"}
        self.configure()
        self.notes = self.pg_wal / fast.PUSHED
        self.spool = self.pg_wal / fast.FETCHED

    def configure(self, **settings: object) -> None:
        self.settings.update(settings)
        install(str(self.directory), CLUSTER, self.settings, interpreters()[0])

    def add(self, name: str, content: bytes | str) -> str:
        """A file in pg_wal that is ready."""
        (self.status / f"{name}.ready").touch()
        return put(self.pg_wal, name, content)

    def fill(self, *numbers: int) -> None:
        for number in numbers:
            self.add(wal_name(1, number), segment(1, number))

    def stored(self, name: str) -> Path:
        return Path(ClusterFolder.open(str(self.repository), CLUSTER).wal_path(WalFile.parse(name)))

    @property
    def archived(self) -> list[str]:
        return sorted(path.name for path in Path(self.folder.archive_path()).rglob("*") if path.is_file())

    def content(self, name: str) -> bytes:
        """What the archive gives back, by the code that knows nothing of notes."""
        target = self.root / "compared"
        archive.get(name, str(target), json.loads((self.directory / f"{CLUSTER}.json").read_text())["repository"],
                    CLUSTER)  # fmt: skip
        try:
            return target.read_bytes()
        finally:
            target.unlink()

    def push(self, name: str) -> int:
        """As the archiver: relative to the data directory; .done when it was good."""
        code = call([str(self.directory), "push", CLUSTER, f"pg_wal/{name}"])
        if code == 0:
            (self.status / f"{name}.ready").rename(self.status / f"{name}.done")
        return code

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.directory / COMMAND), *arguments], cwd=self.pgdata, env={"PATH": "/usr/bin:/bin"},
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    def get(self, number: int, timeline: int = 1, system: int = SYSTEM) -> subprocess.CompletedProcess[str]:
        option = f"--system-identifier={system}"
        return self.run("get", option, CLUSTER, wal_name(timeline, number), "pg_wal/RECOVERYXLOG")

    def recover(self) -> None:
        """From here on this is a server in recovery."""
        (self.pgdata / "recovery.signal").touch()
        (self.pgdata / "postmaster.pid").touch()

    def has(self, number: int) -> bool:
        return (self.spool / f"{wal_name(1, number)}.note").exists()

    @property
    def fetchers(self) -> list[int]:
        """Processes of the command that work in our data directory."""
        found = []
        for name in os.listdir("/proc"):
            if name.isdigit() and int(name) != os.getpid():
                try:
                    if os.path.realpath(f"/proc/{name}/cwd") == str(self.pgdata.resolve()):
                        found.append(int(name))
                except OSError:
                    continue
        return found


HOLDER = """
import os, select, sys
os.lockf(os.open(sys.argv[1], os.O_RDWR | os.O_CREAT), os.F_LOCK, 0)
print(flush=True)
select.select([sys.stdin], [], [], float(sys.argv[2]))
"""
HOLDER_SECONDS = 15.0


@contextmanager
def held(lock: Path) -> Iterator[None]:
    """Another process has this lock, for so many seconds at most."""
    argv = [interpreters()[0], "-c", HOLDER, str(lock), str(HOLDER_SECONDS)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        try:
            yield
        finally:
            holder.communicate()


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    made = Host(tmp_path)
    monkeypatch.chdir(made.pgdata)
    return made


def in_this_process(work: Callable[[Callable[[], None]], None]) -> None:
    work(lambda: None)


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that were written this very moment count as old ones, and everything happens in this process."""
    monkeypatch.setattr(ahead, "SETTLED_SECONDS", 0)
    monkeypatch.setattr(ahead, "in_background", in_this_process)


@pytest.fixture
def worked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files for which the full work was begun."""
    names: list[str] = []
    real = archive.Pushing.__init__

    def begin(pushing: archive.Pushing, path: str, folder: ClusterFolder, compression: str) -> None:
        names.append(os.path.basename(path))
        real(pushing, path, folder, compression)

    monkeypatch.setattr(archive.Pushing, "__init__", begin)
    return names


# --- push: ahead


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("compression", ["none", "gzip", "zstd"])
def test_one_call_archives_what_is_ready_and_later_calls_only_look(
    host: Host, worked: list[str], compression: str
) -> None:
    host.configure(compression=compression)
    host.fill(*range(3, 9))
    assert host.push(wal_name(1, 3)) == 0
    assert host.archived == [wal_name(1, number) for number in range(3, 9)]
    assert sorted(os.listdir(host.notes)) == [*(wal_name(1, number) for number in range(4, 9)), "lock"]
    assert host.notes.stat().st_mode & 0o777 == 0o700
    worked.clear()
    before = tree(host.repository)
    for number in range(4, 9):
        assert host.push(wal_name(1, number)) == 0
    assert worked == [] and tree(host.repository) == before
    assert os.listdir(host.notes) == ["lock"]
    for number in range(3, 9):
        assert host.content(wal_name(1, number)) == segment(1, number)


@pytest.mark.usefixtures("settled")
def test_all_kinds_of_files_are_archived_ahead_in_the_order_of_the_archiver(host: Host, worked: list[str]) -> None:
    host.fill(3, 4)
    host.add(f"{wal_name(1, 3)}.00000028.backup", "START WAL LOCATION: 0/300028\n")
    host.add(f"{wal_name(1, 5)}.partial", segment(1, 5))
    host.add("00000002.history", history((1, "0/550000")))
    host.push("00000002.history")
    assert worked == [
        "00000002.history", wal_name(1, 3), f"{wal_name(1, 3)}.00000028.backup", wal_name(1, 4),
        f"{wal_name(1, 5)}.partial",
    ]  # fmt: skip
    worked.clear()
    for path in sorted(host.status.glob("*.ready")):
        assert host.push(path.stem) == 0
    assert worked == []


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize(("count", "names"), [(0, 1), (2, 3), (100, 6)])
def test_number_of_files_ahead_is_the_setting(host: Host, count: int, names: int) -> None:
    host.configure(push_ahead=count)
    host.fill(*range(3, 9))
    host.push(wal_name(1, 3))
    assert host.archived == [wal_name(1, number) for number in range(3, 3 + names)]
    assert host.notes.exists() == bool(count)


@pytest.mark.parametrize("value", ["many", -1, True, 1.5, None])
def test_number_that_is_none_fails_and_names_the_setting(
    host: Host, capsys: pytest.CaptureFixture[str], value: object
) -> None:
    (host.directory / f"{CLUSTER}.json").write_text(json.dumps({**host.settings, "push_ahead": value}))
    host.fill(3)
    assert host.push(wal_name(1, 3)) == 1
    assert "The setting push_ahead is" in capsys.readouterr().err


def test_call_by_hand_archives_only_what_it_names(host: Host) -> None:
    host.fill(3, 4, 5)
    (host.status / f"{wal_name(1, 3)}.ready").unlink()
    assert call([str(host.directory), "push", CLUSTER, f"pg_wal/{wal_name(1, 3)}"]) == 0
    assert host.archived == [wal_name(1, 3)]


@pytest.mark.usefixtures("settled")
def test_file_that_was_changed_this_moment_is_left_alone_until_its_times_tell_of_a_change(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may change once more within the same tick of the clock that its times are told by."""
    slept: list[float] = []
    host.fill(3, 4)
    monkeypatch.setattr(ahead, "SETTLED_SECONDS", 100.0)
    monkeypatch.setattr(time, "sleep", slept.append)
    host.push(wal_name(1, 3))
    assert len(slept) == 1 and 50 < slept[0] <= 100
    assert sorted(os.listdir(host.notes)) == [wal_name(1, 4), "lock"]


@pytest.mark.usefixtures("settled")
def test_later_segment_that_is_refused_stops_there_and_is_told_by_its_own_call(
    host: Host, capsys: pytest.CaptureFixture[str]
) -> None:
    host.fill(3, 4, 6, 7)
    host.add(wal_name(1, 5), segment(1, 5, system=SYSTEM + 1))
    assert host.push(wal_name(1, 3)) == 0
    assert capsys.readouterr().err == ""
    assert host.archived == [wal_name(1, 3), wal_name(1, 4)]
    assert sorted(os.listdir(host.notes)) == [wal_name(1, 4), "lock"]
    assert host.push(wal_name(1, 4)) == 0
    assert host.push(wal_name(1, 5)) == 1
    assert "was written by the cluster" in capsys.readouterr().err
    assert host.archived == [wal_name(1, 3), wal_name(1, 4)]


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("compression", ["gzip", "zstd"])
@pytest.mark.parametrize("differs", [3, 4, 5])
def test_copy_of_a_cluster_leaves_nothing_behind_the_first_segment_that_differs(
    host: Host, compression: str, differs: int
) -> None:
    """The owner has not come to the later ones yet; with those of the copy there, it could never archive again."""
    host.configure(compression=compression)
    host.fill(*range(3, 9))
    for number in range(3, differs + 1):
        content = segment(1, number, seed=number == differs)
        archive.push(put(host.root, wal_name(1, number), content), str(host.repository), CLUSTER, "gzip")
    before = tree(host.repository)
    assert host.push(wal_name(1, 3)) == (1 if differs == 3 else 0)
    assert tree(host.repository) == before
    if differs == 4:
        assert host.push(wal_name(1, 4)) == 1


@pytest.mark.usefixtures("settled")
def test_first_that_fails_at_its_end_takes_the_others_with_it(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.configure(compression="zstd")
    host.fill(3, 4, 5)

    def fail(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", fail)
        assert host.push(wal_name(1, 3)) == 1
    assert host.archived == [] and not list(Path(host.folder.archive_path()).rglob("*.tmp"))
    assert host.push(wal_name(1, 3)) == 0
    assert host.archived == [wal_name(1, 3), wal_name(1, 4), wal_name(1, 5)]


@pytest.mark.usefixtures("settled")
def test_call_that_took_long_begins_with_no_others(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "PUSH_SECONDS", -1.0)
    host.fill(*range(3, 9))
    assert host.push(wal_name(1, 3)) == 0
    assert len(host.archived) <= ahead.PUSH_WIDTH


@pytest.mark.usefixtures("settled")
def test_notes_of_what_is_not_ready_any_more_are_removed(host: Host) -> None:
    host.fill(3, 4, 5)
    host.push(wal_name(1, 3))
    put(host.notes, f".{wal_name(1, 9)}.1.2.tmp", b"")
    for number in (4, 5):
        (host.status / f"{wal_name(1, number)}.ready").unlink()
    host.fill(6, 7)
    host.push(wal_name(1, 6))
    assert sorted(os.listdir(host.notes)) == [wal_name(1, 7), "lock"]


@pytest.mark.usefixtures("settled")
def test_nothing_stays_open_and_no_process_is_left(host: Host) -> None:
    host.configure(compression="zstd")
    host.fill(*range(3, 9))
    host.add(wal_name(1, 9), segment(1, 9, system=5))
    host.fill(10)
    before = len(os.listdir("/proc/self/fd"))
    host.push(wal_name(1, 3))
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


# --- push: the spool


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize(
    "name", ["plain", "with space", "qu'ote", 'double"quote', "back\\slash", "ümläut-数据", "100%"]
)
def test_spool_may_be_any_directory_and_is_shared_by_clusters(host: Host, worked: list[str], name: str) -> None:
    spool = host.root / name
    host.configure(spool=str(spool))
    host.fill(3, 4)
    host.push(wal_name(1, 3))
    assert os.listdir(spool) == [CLUSTER] and sorted(os.listdir(spool / CLUSTER)) == [wal_name(1, 4), "lock"]
    assert not host.notes.exists()
    worked.clear()
    assert host.push(wal_name(1, 4)) == 0
    assert worked == []


def _in_the_way(host: Host) -> None:
    host.notes.write_bytes(b"")


def _of_everybody(host: Host) -> None:
    host.notes.mkdir()
    host.notes.chmod(0o777)


def _link(host: Host) -> None:
    (host.root / "elsewhere").mkdir()
    host.notes.symlink_to(host.root / "elsewhere")


@pytest.mark.parametrize("damage", [_in_the_way, _of_everybody, _link], ids=lambda item: item.__name__)
def test_spool_that_cannot_be_used_is_told_and_everything_is_archived_even_so(
    host: Host, capsys: pytest.CaptureFixture[str], damage: Callable[[Host], None]
) -> None:
    damage(host)
    host.fill(3, 4)
    for number in (3, 4):
        assert host.push(wal_name(1, number)) == 0
        assert host.content(wal_name(1, number)) == segment(1, number)
    said = capsys.readouterr().err
    assert "cannot be used" in said and str(fast.PUSHED) in said and said.count("\n") == 1


# --- push: notes that must not be believed. Segment 4 was archived ahead, then something happened.

NAME = wal_name(1, 4)


def _source_replaced(host: Host) -> None:
    put(host.root, "other", segment(1, 4, seed=1))
    status = (host.pg_wal / NAME).stat()
    os.utime(host.root / "other", ns=(status.st_atime_ns, status.st_mtime_ns))
    os.rename(host.root / "other", host.pg_wal / NAME)


def _source_modified(host: Host) -> None:
    change(host.pg_wal / NAME)


def _source_recycled(host: Host) -> None:
    os.rename(host.pg_wal / wal_name(1, 3), host.pg_wal / NAME)


def _source_copied(host: Host) -> None:
    shutil.copy2(host.pg_wal / NAME, host.root / "copy")
    os.rename(host.root / "copy", host.pg_wal / NAME)


def _source_removed(host: Host) -> None:
    (host.pg_wal / NAME).unlink()


def _source_truncated(host: Host) -> None:
    os.truncate(host.pg_wal / NAME, MIB // 2)


def _stored_removed(host: Host) -> None:
    host.stored(NAME).unlink()


def _stored_replaced(host: Host) -> None:
    stored = host.stored(NAME)
    status = stored.stat()
    stored.unlink()
    archive.push(put(host.root, NAME, segment(1, 4, seed=1)), str(host.repository), CLUSTER, "gzip")
    os.utime(stored, ns=(status.st_atime_ns, status.st_mtime_ns))


def _stored_damaged(host: Host) -> None:
    change(host.stored(NAME), host.stored(NAME).stat().st_size // 2)


def _stored_truncated(host: Host) -> None:
    os.truncate(host.stored(NAME), 5000)


def _archive_emptied(host: Host) -> None:
    shutil.rmtree(host.folder.archive_path())
    os.mkdir(host.folder.archive_path())


def _repository_anew(host: Host) -> None:
    shutil.rmtree(host.repository)
    make_repository(host.repository)


def _repository_copied(host: Host) -> None:
    shutil.copytree(host.repository, host.root / "copy")
    shutil.rmtree(host.repository)
    (host.root / "copy").rename(host.repository)


def _repository_unmounted(host: Host) -> None:
    host.repository.rename(host.root / "away")
    host.repository.mkdir()


def _marker_removed(host: Host) -> None:
    (host.repository / MARKER).unlink()


def _cluster_removed(host: Host) -> None:
    (Path(host.folder.path) / "cluster.json").unlink()


def _new_chapter(host: Host) -> None:
    host.folder.chapters.append(Chapter(2, str(SYSTEM + 1), MIB, 19, ""))
    host.folder.save()
    Path(host.folder.archive_path()).mkdir()


def _other_repository(host: Host) -> None:
    make_repository(host.root / "other repository")
    host.configure(repository=str(host.root / "other repository"))


def _rewrite(host: Host, edit: Callable[[str], str]) -> None:
    (host.notes / NAME).write_text(edit((host.notes / NAME).read_text()))


def _written(host: Host, seconds: float) -> None:
    _rewrite(host, lambda text: text[: text.index("written ")] + f"written {time.time() + seconds:.3f}\nend\n")


def _note_too_old(host: Host) -> None:
    _written(host, -3700)


def _note_of_the_future(host: Host) -> None:
    """The clock was set back."""
    _written(host, 60)


def _note_without_time(host: Host) -> None:
    _rewrite(host, lambda text: text[: text.index("written ")] + "end\n")


def _note_of_no_time(host: Host) -> None:
    _rewrite(host, lambda text: text[: text.index("written ")] + "written nan\nend\n")


def _note_of_another_segment(host: Host) -> None:
    shutil.copy(host.notes / wal_name(1, 5), host.notes / NAME)


def _note_of_another_stored_file(host: Host) -> None:
    """All of it is true, but it tells of another file of the archive."""
    host.stored(NAME).unlink()
    other = host.stored(wal_name(1, 5))
    _rewrite(host, lambda text: "\n".join(
        f"stored {fast.encoded(str(other))}" if line.startswith("stored ")
        else f"object {fast.identity(other.stat())}" if line.startswith("object ") else line
        for line in text.split("\n")))  # fmt: skip


def _note_of_a_file_outside(host: Host) -> None:
    host.stored(NAME).unlink()
    other = Path(put(host.root / "outside", NAME, b"x"))
    _rewrite(host, lambda text: "\n".join(
        f"stored {fast.encoded(str(other))}" if line.startswith("stored ")
        else f"object {fast.identity(other.stat())}" if line.startswith("object ") else line
        for line in text.split("\n")))  # fmt: skip


def _note_cut(host: Host) -> None:
    _rewrite(host, lambda text: text[:-4])


def _note_empty(host: Host) -> None:
    _rewrite(host, lambda _text: "")


def _note_of_noise(host: Host) -> None:
    (host.notes / NAME).write_bytes(random.Random(1).randbytes(500))


def _note_of_another_format(host: Host) -> None:
    _rewrite(host, lambda text: text.replace("pitr-note 1", "pitr-note 2"))


def _note_with_more(host: Host) -> None:
    _rewrite(host, lambda text: text.replace("written ", "but-see 1\nwritten "))


def _note_of_everybody(host: Host) -> None:
    (host.notes / NAME).chmod(0o666)


def _note_is_a_link(host: Host) -> None:
    (host.notes / NAME).rename(host.root / "note")
    (host.notes / NAME).symlink_to(host.root / "note")


def _spool_of_everybody(host: Host) -> None:
    host.notes.chmod(0o777)


STALE = [
    _source_replaced, _source_modified, _source_recycled, _source_copied, _source_removed, _source_truncated,
    _stored_removed, _stored_replaced, _stored_damaged, _stored_truncated, _archive_emptied, _repository_anew,
    _repository_copied, _repository_unmounted, _marker_removed, _cluster_removed, _new_chapter, _other_repository,
    _note_too_old, _note_of_the_future, _note_without_time, _note_of_no_time, _note_of_another_segment,
    _note_of_another_stored_file, _note_of_a_file_outside, _note_cut, _note_empty, _note_of_noise,
    _note_of_another_format, _note_with_more, _note_of_everybody, _note_is_a_link, _spool_of_everybody,
]  # fmt: skip
REFUSED = [
    _source_replaced, _source_modified, _source_recycled, _source_removed, _source_truncated, _stored_replaced,
    _stored_damaged, _stored_truncated, _repository_unmounted, _marker_removed, _cluster_removed, _new_chapter,
]  # fmt: skip


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("happened", STALE, ids=lambda item: item.__name__)
def test_stale_acknowledgement_is_worth_nothing(
    host: Host, worked: list[str], capsys: pytest.CaptureFixture[str], happened: Callable[[Host], None]
) -> None:
    host.fill(3, 4, 5)
    host.push(wal_name(1, 3))
    assert NAME in os.listdir(host.notes)
    worked.clear()
    happened(host)
    # Both at once: what the note is worth, and what comes of it.
    assert not fast.is_acknowledged(
        (host.directory / f"{CLUSTER}.json").read_bytes(), CLUSTER, f"pg_wal/{NAME}", f"pg_wal/{fast.PUSHED}"
    )
    code = host.push(NAME)
    assert code == (1 if happened in REFUSED else 0)
    if code == 0:
        assert worked[0] == NAME
        assert host.content(NAME) == (host.pg_wal / NAME).read_bytes() == segment(1, 4)
    else:
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("at", range(12))
def test_acknowledgement_without_one_of_its_lines_is_worth_nothing(host: Host, worked: list[str], at: int) -> None:
    host.fill(3, 4)
    host.push(wal_name(1, 3))
    lines = (host.notes / NAME).read_text().split("\n")
    assert len(lines) == 14
    del lines[at]
    (host.notes / NAME).write_text("\n".join(lines))
    host.stored(NAME).unlink()
    worked.clear()
    assert host.push(NAME) == 0
    assert worked == [NAME] and host.content(NAME) == segment(1, 4)


@pytest.mark.usefixtures("settled")
def test_acknowledgement_for_another_cluster_is_worth_nothing(host: Host, worked: list[str]) -> None:
    make_repository(host.repository, "other")
    shutil.copy(host.directory / f"{CLUSTER}.json", host.directory / "other.json")
    host.fill(3, 4)
    host.push(wal_name(1, 3))
    worked.clear()
    assert call([str(host.directory), "push", "other", f"pg_wal/{NAME}"]) == 0
    assert worked == [NAME]
    assert Path(ClusterFolder.open(str(host.repository), "other").wal_path(WalFile.parse(NAME))).exists()


# --- push: the process that goes on


def test_calls_one_after_another_wait_for_the_process_that_is_at_their_files(host: Host) -> None:
    host.configure(compression="zstd", push_ahead=4)
    host.fill(*range(3, 15))
    for number in range(3, 15):
        result = host.run("push", CLUSTER, f"pg_wal/{wal_name(1, number)}")
        assert (result.returncode, result.stderr) == (0, "")
        # Not sooner than it is stored.
        assert host.stored(wal_name(1, number)).exists()
        (host.status / f"{wal_name(1, number)}.ready").unlink()
    for number in range(3, 15):
        assert host.content(wal_name(1, number)) == segment(1, number)
    until(lambda: not host.fetchers, "the end of the process")


def test_failure_of_the_process_is_told_by_the_call(host: Host) -> None:
    host.fill(3, 4)
    put(host.pg_wal, wal_name(1, 3), segment(1, 3, system=5))
    result = host.run("push", CLUSTER, f"pg_wal/{wal_name(1, 3)}")
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert "was written by the cluster with system identifier 5" in result.stderr
    shutil.rmtree(host.folder.archive_path())
    put(host.pg_wal, wal_name(1, 3), segment(1, 3))
    result = host.run("push", CLUSTER, f"pg_wal/{wal_name(1, 3)}")
    assert result.returncode == 1 and "No such file or directory" in result.stderr
    assert str(host.folder.archive_path()) in result.stderr


def test_process_that_dies_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def die(_done: Callable[[], None]) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(PitrError, match="not known to be stored"):
        ahead.in_background(die)
    os.waitpid(-1, 0)


@pytest.mark.usefixtures("settled")
def test_second_call_leaves_to_the_first_what_it_is_at(host: Host, worked: list[str]) -> None:
    host.fill(3, 4, 5)
    host.push(wal_name(1, 3))
    for name in (wal_name(1, 4), wal_name(1, 5)):
        (host.notes / name).unlink()
        host.stored(name).unlink()
    worked.clear()
    with held(host.notes / "lock"):
        (host.notes / "lock").write_text(wal_name(1, 5))
        assert host.push(wal_name(1, 4)) == 0
        assert worked == [wal_name(1, 4)]
        # The one that is said to be under way is waited for, but not for ever.
        worked.clear()
        fast_patience, fast.PATIENCE = fast.PATIENCE, 0.3
        try:
            started = time.monotonic()
            assert host.push(wal_name(1, 5)) == 0
        finally:
            fast.PATIENCE = fast_patience
        assert worked == [wal_name(1, 5)] and 0.3 < time.monotonic() - started < HOLDER_SECONDS


@pytest.mark.usefixtures("settled")
def test_server_that_has_stopped_is_not_served_any_more(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    (host.pgdata / "postmaster.pid").touch()
    host.fill(*range(3, 12))
    monkeypatch.setattr(ahead, "in_background", lambda work: work((host.pgdata / "postmaster.pid").unlink))
    assert host.push(wal_name(1, 3)) == 0
    assert len(host.archived) <= ahead.PUSH_WIDTH


def test_killed_push_is_made_good_by_the_next_calls(host: Host) -> None:
    host.configure(compression="zstd")
    numbers = range(3, 19)
    host.fill(*numbers)
    command = [str(host.directory / COMMAND), "push", CLUSTER]
    chance = random.Random(5)
    pending = [wal_name(1, number) for number in numbers]
    for _attempt in range(12):
        process = subprocess.Popen([*command, f"pg_wal/{pending[0]}"], cwd=host.pgdata, start_new_session=True)
        try:
            process.wait(chance.uniform(0.0, 0.25))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        if process.wait() == 0:
            (host.status / f"{pending[0]}.ready").unlink()
            assert host.content(pending.pop(0))
    for name in pending:
        assert host.run("push", CLUSTER, f"pg_wal/{name}").returncode == 0
    for number in numbers:
        assert host.content(wal_name(1, number)) == segment(1, number)


# --- get: ahead


class Fetched(Host):
    """A server in recovery for which segments 4 to 6 were fetched ahead, in this process."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        for number in range(3, 7):
            archive.push(put(root, wal_name(1, number), segment(1, number)), str(self.repository), CLUSTER, "zstd")
        self.recover()
        self.spool.mkdir(mode=0o700)

    def prefetch(self, count: int = 3) -> ahead.Prefetch:
        made = ahead.Prefetch(str(self.directory), CLUSTER, OPTIONS, wal_name(1, 3), f"pg_wal/{fast.FETCHED}")
        for _number in range(count):
            assert made._fetch_next()
        return made

    def deliver(self, name: str = NAME, system: int = SYSTEM, cluster: str = CLUSTER) -> bytes | None:
        """What the quick way delivers."""
        target = self.pg_wal / "RECOVERYXLOG"
        options = {"system-identifier": str(system)}
        if not fast.get(str(self.directory), cluster, options, name, "pg_wal/RECOVERYXLOG"):
            assert not target.exists()
            return None
        content = target.read_bytes()
        target.unlink()
        return content


@pytest.fixture
def fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fetched:
    made = Fetched(tmp_path)
    monkeypatch.chdir(made.pgdata)
    return made


def test_fetched_segments_are_delivered_once_by_a_rename(fetched: Fetched) -> None:
    fetched.prefetch()
    for number in (4, 5, 6):
        inode = (fetched.spool / wal_name(1, number)).stat().st_ino
        assert fast.get(str(fetched.directory), CLUSTER, OPTIONS, wal_name(1, number), "pg_wal/RECOVERYXLOG")
        delivered = fetched.pg_wal / "RECOVERYXLOG"
        assert delivered.stat().st_ino == inode and delivered.read_bytes() == segment(1, number)
        assert delivered.stat().st_mode & 0o777 == 0o600
        delivered.unlink()
        assert fetched.deliver(wal_name(1, number)) is None
    assert os.listdir(fetched.spool) == []


def _other_content(host: Host, content: bytes) -> None:
    path = host.spool / NAME
    status = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def _bit(host: Host) -> None:
    change(host.spool / NAME)


def _first_page(host: Host) -> None:
    change(host.spool / NAME, 20)


def _cut(host: Host) -> None:
    os.truncate(host.spool / NAME, MIB // 2)


def _emptied(host: Host) -> None:
    os.truncate(host.spool / NAME, 0)


def _foreign(host: Host) -> None:
    _other_content(host, segment(1, 4, system=SYSTEM + 1))


def _of_another_timeline(host: Host) -> None:
    _other_content(host, segment(2, 4))


def _of_another_branch(host: Host) -> None:
    _other_content(host, segment(1, 4, seed=1))


def _exchanged(host: Host) -> None:
    (host.spool / wal_name(1, 5)).rename(host.spool / NAME)


def _exchanged_with_note(host: Host) -> None:
    (host.spool / wal_name(1, 5)).rename(host.spool / NAME)
    (host.spool / f"{wal_name(1, 5)}.note").rename(host.spool / f"{NAME}.note")


def _is_a_link(host: Host) -> None:
    (host.spool / NAME).rename(host.root / "elsewhere")
    (host.spool / NAME).symlink_to(host.root / "elsewhere")


def _copied(host: Host) -> None:
    """What cp or pg_rewind make of it."""
    shutil.copytree(host.spool, host.root / "copied", copy_function=shutil.copy2)
    shutil.rmtree(host.spool)
    shutil.move(host.root / "copied", host.spool)


def _no_note(host: Host) -> None:
    (host.spool / f"{NAME}.note").unlink()


def _half_a_note(host: Host) -> None:
    os.truncate(host.spool / f"{NAME}.note", 300)


def _old_note(host: Host) -> None:
    path = host.spool / f"{NAME}.note"
    text = path.read_text()
    path.write_text(text[: text.index("written ")] + f"written {time.time() - 3700:.3f}\nend\n")


def _replaced_in_the_archive(host: Host) -> None:
    stored = host.stored(NAME)
    stored.unlink()
    archive.push(put(host.root, NAME, segment(1, 4, seed=1)), str(host.repository), CLUSTER, "zstd")


def _other_settings(host: Host) -> None:
    _other_repository(host)


DOUBTFUL = [
    _bit, _first_page, _cut, _emptied, _foreign, _of_another_timeline, _of_another_branch, _exchanged,
    _exchanged_with_note, _is_a_link, _copied, _no_note, _half_a_note, _old_note, _replaced_in_the_archive,
    _other_settings, _repository_anew, _new_chapter, _marker_removed,
]  # fmt: skip


@pytest.mark.parametrize("happened", DOUBTFUL, ids=lambda item: item.__name__)
def test_doubtful_fetched_segment_is_not_delivered_but_fetched_anew(
    fetched: Fetched, happened: Callable[[Host], None]
) -> None:
    fetched.prefetch()
    happened(fetched)
    assert fetched.deliver() is None
    (fetched.pgdata / "recovery.signal").unlink()
    got = fetched.get(4)
    target = fetched.pg_wal / "RECOVERYXLOG"
    if happened in (_other_settings, _repository_anew, _marker_removed):
        # The repository as it is now has no such segment, or is none.
        assert got.returncode != 0 and not target.exists()
    else:
        expected = segment(1, 4, seed=1) if happened is _replaced_in_the_archive else segment(1, 4)
        assert got.returncode == 0 and target.read_bytes() == expected


@pytest.mark.parametrize(
    ("name", "system", "cluster"),
    [(wal_name(1, 4), SYSTEM + 1, CLUSTER), (wal_name(2, 4), SYSTEM, CLUSTER), (wal_name(1, 4), SYSTEM, "other")],
    ids=["system", "timeline", "cluster"],
)
def test_fetched_segment_is_delivered_only_to_whom_it_is_for(
    fetched: Fetched, name: str, system: int, cluster: str
) -> None:
    shutil.copy(fetched.directory / f"{CLUSTER}.json", fetched.directory / "other.json")
    fetched.prefetch()
    assert fetched.deliver(name, system, cluster) is None
    assert fetched.deliver() == segment(1, 4)


def test_damaged_stored_segment_is_not_fetched_ahead(fetched: Fetched) -> None:
    stored = fetched.stored(wal_name(1, 5))
    stored.write_bytes(stored.read_bytes()[:-3])
    made = fetched.prefetch(1)
    with pytest.raises(PitrError, match="is damaged"):
        made._fetch_next()
    assert sorted(os.listdir(fetched.spool)) == [NAME, f"{NAME}.note"]


def test_absence_is_not_remembered(fetched: Fetched) -> None:
    made = fetched.prefetch(3)
    assert not made._fetch_next()
    archive.push(put(fetched.root, wal_name(1, 7), segment(1, 7)), str(fetched.repository), CLUSTER, "zstd")
    assert made._fetch_next()
    assert fetched.deliver(wal_name(1, 7)) == segment(1, 7)


def test_repository_that_was_exchanged_ends_it(fetched: Fetched) -> None:
    made = fetched.prefetch(1)
    _repository_copied(fetched)
    with pytest.raises(PitrError, match="have changed"):
        made._fetch_next()


def test_room_is_left_to_the_server(fetched: Fetched, monkeypatch: pytest.MonkeyPatch) -> None:
    made = fetched.prefetch(1)
    room = os.statvfs(fetched.spool)
    free = room.f_bavail * room.f_frsize // MIB
    monkeypatch.setattr(ahead, "ROOM_LEFT", free + 100)
    assert not made._fetch_next()


def test_what_is_fetched_ahead_takes_limited_room(fetched: Fetched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "PREFETCH_BYTES", 2 * MIB)
    assert fetched.prefetch(0)._count == 2
    monkeypatch.setattr(ahead, "PREFETCH_BYTES", MIB // 2)
    assert fetched.prefetch(0)._count == 1


def test_what_an_earlier_process_has_left_is_adopted_as_far_as_it_is_good(fetched: Fetched) -> None:
    fetched.prefetch()
    change(fetched.spool / wal_name(1, 5))
    put(fetched.spool, "fetching", b"half")
    made = fetched.prefetch(0)
    made._adopt()
    assert made._ready == [NAME]
    assert sorted(os.listdir(fetched.spool)) == [NAME, f"{NAME}.note"]
    assert made._fetch_next() and fetched.deliver(wal_name(1, 5)) == segment(1, 5)


# --- get: the process


def test_get_leaves_a_process_that_keeps_segments_ready_and_ends_with_the_recovery(fetched: Fetched) -> None:
    fetched.spool.rmdir()
    fetched.configure(prefetch=2)
    assert fetched.get(3).returncode == 0
    until(lambda: fetched.has(5), "two segments ahead")
    assert len(fetched.fetchers) == 1 and not fetched.has(6)
    assert fetched.get(4).returncode == 0
    assert (fetched.pg_wal / "RECOVERYXLOG").read_bytes() == segment(1, 4)
    until(lambda: fetched.has(6), "the next one")
    assert len(fetched.fetchers) == 1
    (fetched.pgdata / "recovery.signal").unlink()
    until(lambda: not fetched.fetchers, "the end of the process")
    assert not fetched.spool.exists()


def test_second_process_gives_way_to_the_first(fetched: Fetched) -> None:
    with held(fetched.spool / "lock"):
        pid = os.fork()
        if pid == 0:
            try:
                ahead.fetch_ahead(str(fetched.directory), CLUSTER, OPTIONS, wal_name(1, 3), f"pg_wal/{fast.FETCHED}")
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        assert os.listdir(fetched.spool) == ["lock"]


def test_process_ends_with_the_server_and_leaves_nothing(fetched: Fetched) -> None:
    assert fetched.get(3).returncode == 0
    until(lambda: fetched.has(6), "all segments ahead")
    (fetched.pgdata / "postmaster.pid").unlink()
    until(lambda: not fetched.fetchers, "the end of the process")
    assert not fetched.spool.exists()


def test_without_a_recovery_nothing_is_left_behind(fetched: Fetched) -> None:
    fetched.spool.rmdir()
    (fetched.pgdata / "recovery.signal").unlink()
    assert fetched.get(3).returncode == 0
    assert not fetched.spool.exists() and fetched.fetchers == []


def test_prefetch_that_is_switched_off_leaves_nothing_behind(fetched: Fetched) -> None:
    fetched.spool.rmdir()
    fetched.configure(prefetch=0)
    assert fetched.get(3).returncode == 0
    assert not fetched.spool.exists() and fetched.fetchers == []


def test_killed_process_is_replaced_and_nothing_half_is_delivered(fetched: Fetched) -> None:
    for number in (3, 4, 5, 6):
        assert fetched.get(number).returncode == 0
        assert (fetched.pg_wal / "RECOVERYXLOG").read_bytes() == segment(1, number)
        for pid in fetched.fetchers:
            # It may have ended by itself since.
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        until(lambda: not fetched.fetchers, "the end of the process")
    assert fetched.get(7).returncode == 1
    put(fetched.spool, "fetching", b"half")
    assert fetched.get(3).returncode == 0
    until(lambda: fetched.has(6), "all segments ahead, once more")
    (fetched.pgdata / "recovery.signal").unlink()
    until(lambda: not fetched.spool.exists(), "an end without a trace")


def test_recovery_that_goes_on_elsewhere_is_followed(fetched: Fetched) -> None:
    text = history((1, "0/450000"))
    for name, content in (("00000002.history", text.encode()), (wal_name(2, 4), segment(2, 4, written_on=1)),
                          (wal_name(2, 5), segment(2, 5)), (wal_name(2, 6), segment(2, 6))):  # fmt: skip
        archive.push(put(fetched.root, name, content), str(fetched.repository), CLUSTER, "zstd")
    assert fetched.get(3).returncode == 0
    until(lambda: fetched.has(6), "all of timeline 1 ahead")
    assert fetched.get(4, timeline=2).returncode == 0
    until((fetched.spool / f"{wal_name(2, 6)}.note").exists, "timeline 2 ahead")
    assert not fetched.has(6)
    assert fetched.get(5, timeline=2).returncode == 0
    assert (fetched.pg_wal / "RECOVERYXLOG").read_bytes() == segment(2, 5)
    (fetched.pgdata / "recovery.signal").unlink()
    until(lambda: not fetched.fetchers, "the end of the process")


def test_hole_and_absence_are_answered_as_without(fetched: Fetched) -> None:
    fetched.stored(wal_name(1, 5)).unlink()
    assert fetched.get(3).returncode == 0
    until(lambda: fetched.has(4), "the one before the hole")
    assert fetched.get(4).returncode == 0
    hole = fetched.get(5)
    assert hole.returncode > 125 and "the archive has a hole" in hole.stderr
    assert fetched.get(7).returncode == 1
    (fetched.pgdata / "recovery.signal").unlink()
    until(lambda: not fetched.fetchers, "the end of the process")


def test_push_removes_what_a_recovery_has_left(fetched: Fetched) -> None:
    fetched.prefetch()
    put(fetched.spool, "lock", b"")
    fetched.fill(7)
    assert fetched.push(wal_name(1, 7)) == 0
    assert fetched.spool.exists()
    (fetched.pgdata / "recovery.signal").unlink()
    fetched.fill(8)
    assert fetched.push(wal_name(1, 8)) == 0
    assert not fetched.spool.exists()
