# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What is archived and fetched ahead, with real servers: faster, and never anything else."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils import codec
from ansible_collections.pgdrill.pitr.plugins.module_utils.fast import FETCHED, PUSHED
from ansible_collections.pgdrill.pitr.plugins.module_utils.info import archive_info
from ansible_collections.pgdrill.pitr.plugins.module_utils.wal import Lsn
from ansible_collections.pgdrill.pitr.tests.integration.support import Restored, Sandbox, until

if TYPE_CHECKING:
    from ansible_collections.pgdrill.pitr.tests.integration.conftest import History

Restore = Callable[..., Restored]
MakeSandbox = Callable[..., Sandbox]


def _ready(primary: Sandbox) -> set[str]:
    return {path.stem for path in (primary.server.data / "pg_wal" / "archive_status").glob("*.ready")}


def _archived_count(primary: Sandbox) -> int:
    return int(primary.server.value("SELECT archived_count FROM pg_stat_archiver"))


def test_backlog_is_archived_by_one_call_and_acknowledged_by_the_next_ones(
    sandbox: MakeSandbox, restored: Restore
) -> None:
    primary = sandbox(settings={"archive_command": "false"})
    primary.fill(8)
    until(lambda: len(_ready(primary)) >= 8, "a backlog")
    backlog = _ready(primary)
    # Archives, and tells the server that it has not: so there is only ever one file that it asks for.
    primary.configure({"archive_command": f"{primary.archive_command} && false"})
    primary.server.sql("SELECT pg_reload_conf()")
    until(lambda: backlog <= {path.name for path in primary.segments()}, "the backlog in the archive")
    assert _archived_count(primary) == 0 and _ready(primary) >= backlog
    notes = primary.server.data / "pg_wal" / PUSHED
    assert notes.stat().st_mode & 0o777 == 0o700
    primary.configure({"archive_command": primary.archive_command})
    primary.server.sql("SELECT pg_reload_conf()")
    until(lambda: not _ready(primary) & backlog, "an empty backlog")
    assert _archived_count(primary) >= len(backlog)
    assert not {path.name for path in notes.iterdir()} & backlog
    for stored in primary.segments():
        original = primary.server.data / "pg_wal" / stored.name
        with codec.open_reader(str(stored)) as reader:
            assert not original.exists() or reader.read() == original.read_bytes()
    primary.backup("only")
    primary.commit("end")
    primary.probe()
    assert archive_info(primary.folder)["gaps"] == []
    primary.server.stop()
    assert restored(primary).run().phase == "end"


@contextmanager
def _all_the_time(work: Callable[[], object]) -> Iterator[None]:
    """Do this over and over while the block runs."""
    ended = threading.Event()

    def loop() -> None:
        while not ended.wait(0.002):
            with suppress(OSError):
                work()

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _fetchers(data: Path) -> Iterator[int]:
    """Processes of Python that work in this data directory."""
    for name in os.listdir("/proc"):
        if name.isdigit() and name != str(os.getpid()):
            with suppress(OSError):
                if os.path.realpath(f"/proc/{name}/cwd") == str(data.resolve()):
                    program = os.path.basename(os.path.realpath(f"/proc/{name}/exe"))
                    if program.startswith("python"):
                        yield int(name)


def _kill_fetchers(data: Path) -> None:
    for pid in _fetchers(data):
        # Those that the server waits for are its own affair: they are the children of a shell.
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as stream:
            session = int(stream.read().rpartition(")")[2].split()[3])
        if session == pid:
            os.kill(pid, signal.SIGKILL)


def _replace_fetched(data: Path, change: Callable[[bytes], bytes]) -> None:
    """Not in place: what the server has taken in the meantime is its own."""
    for path in (data / "pg_wal" / FETCHED).iterdir():
        if len(path.name) == 24:
            changed = data / "changed"
            changed.write_bytes(change(path.read_bytes()))
            changed.rename(path)


def _damage_fetched(data: Path) -> None:
    _replace_fetched(data, lambda content: content[:500_000] + bytes([content[500_000] ^ 0xFF]) + content[500_001:])


def _cut_fetched(data: Path) -> None:
    _replace_fetched(data, lambda content: content[:400_000])


@pytest.mark.parametrize("fault", [None, _kill_fetchers, _damage_fetched, _cut_fetched])
def test_recovery_with_fetched_segments_ends_where_it_does_without(
    history: History, restored: Restore, fault: Callable[[Path], None] | None
) -> None:
    cluster = restored(history.storage, {"recovery_target_timeline": "current"}, backup="first")
    data = cluster.server.data
    with _all_the_time(lambda: fault(data) if fault else None):
        reached = cluster.run().reached
    assert cluster.phase == history.commits[-1].phase
    assert Lsn.parse(reached.lsn) >= history.commits[-1].start
    log = cluster.server.log_text()
    # One after another, none skipped, none twice but the last.
    names = [line.split('"')[1] for line in log.splitlines() if "restored log file" in line]
    stored = [path.name for path in history.storage.segments()]
    assert [name for name in stored if name >= names[0]] == sorted(set(names))
    until(lambda: not (data / "pg_wal" / FETCHED).exists() or not list(_fetchers(data)), "the end of fetching")
    if fault is not _kill_fetchers:
        assert not (data / "pg_wal" / FETCHED).exists()
