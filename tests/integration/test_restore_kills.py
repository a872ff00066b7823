# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""kill -9 of a restore at random moments: nothing half-done starts as a server, nothing is lost that was to be kept,
and the same restore succeeds the next time.

Half of the kills come before a random one of the restore's changes of the filesystem, so that every stage is met; half
by the clock, to its whole process group. ``make kill-test`` kills more often than the other tests do.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.plugins.module_utils.request import Request
from ansible_collections.pgdrill.pitr.plugins.module_utils.restore import Restore as Engine
from ansible_collections.pgdrill.pitr.tests.integration.support import (
    Restored,
    fingerprint,
    flip,
    in_child,
    refuses_to_start,
)

if TYPE_CHECKING:
    from ansible_collections.pgdrill.pitr.tests.integration.conftest import History

# Of each of the two kinds of restore.
KILLS = int(os.environ.get("PGDRILL_TEST_RESTORE_KILLS") or 8)
SEED = int(os.environ.get("PGDRILL_TEST_SEED") or time.time_ns() % 1_000_000)
MARKER = "pitr-restoring.json"
OPTIONS: dict[str, dict[str, Any]] = {"fresh": {"force": True}, "delta": {"force": True, "delta": True}}
_RUN = """
import json, sys
from ansible_collections.pgdrill.pitr.plugins.module_utils.request import Request
from ansible_collections.pgdrill.pitr.plugins.module_utils.restore import Restore
restore = Restore(Request(**json.loads(sys.argv[1])))
restore.execute(restore.plan())
"""


def _files(data: Path) -> dict[str, str]:
    """Files and links, without what says when and how the restore was done."""
    found = fingerprint(data)
    names = ("99-pitr-recovery.conf", MARKER)
    return {
        path[len(str(data)) :]: what
        for path, what in found.items()
        if not what.startswith("directory") and not any(name in path for name in names)
    }


def _killed_by_clock(request: Request, seconds: float) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _RUN, json.dumps(dataclasses.asdict(request))],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
    said = process.communicate()[1].decode(errors="replace")
    assert process.returncode in (0, -signal.SIGKILL), said


class Victim:
    """A data directory of the cluster, and what is known of it before and after a whole restore."""

    def __init__(self, history: History, directory: Path, kind: str) -> None:
        self._history = history
        self.data = directory / "data"
        self._kind = kind
        self.request = history.storage.request(self.data, backup="first", **OPTIONS[kind])
        self._renew()
        self._before = _files(self.data)
        started = time.monotonic()
        done = in_child(self.request)
        assert done.returncode == 0, done.stderr
        self.changes = int(done.stdout)
        self.seconds = time.monotonic() - started
        self._after = _files(self.data)
        self.seen: dict[str, int] = {}

    def _renew(self) -> None:
        shutil.rmtree(self.data.parent, ignore_errors=True)
        self.data.parent.mkdir()
        shutil.copytree(self._history.data, self.data)
        if self._kind == "delta":
            # Much to write and to remove: otherwise nearly all of the time is spent comparing.
            for number, path in enumerate(sorted((self.data / "base").rglob("[0-9]*"))):
                if path.is_file() and path.stat().st_size and number % 2:
                    flip(path, path.stat().st_size // 2)
                    shutil.copy(path, path.with_name(f"9{path.name}"))

    def check(self, why: str, bin_dir: str) -> None:
        """What a kill may leave behind."""
        aside = sorted(self.data.parent.glob("data.old-*"))
        if self._kind == "delta":
            assert not aside, why
        else:
            # The old directory is whole, wherever it is. After a restore that was complete when it was killed, the
            # next one has moved aside what that had restored.
            assert _files(aside[0] if aside else self.data) == self._before, why
            assert all(_files(path) == self._after for path in aside[1:]), why
        if not self.data.exists():
            state = "moved aside"
        elif not (self.data / "global" / "pg_control").exists():
            state = "half done"
            assert refuses_to_start(bin_dir, self.data), why
        elif _files(self.data) == self._before:
            state = "untouched"
        else:
            state = "complete"
            assert _files(self.data) == self._after, why
        self.seen[state] = self.seen.get(state, 0) + 1

    def kill_at(self, change: int, bin_dir: str) -> bool:
        """One restore killed before this change, and then the whole one. Whether the first had begun to bring files."""
        self._renew()
        why = f"{self._kind}, before change {change} of {self.changes}"
        done = in_child(self.request, at=change)
        assert done.returncode == -signal.SIGKILL, f"{why}: {done.stderr}"
        self.check(why, bin_dir)
        has_begun = (self.data / "PG_VERSION").exists() and not (self.data / "global" / "pg_control").exists()
        self._finish(why)
        return has_begun

    def kill_twice(self, second: int, bin_dir: str) -> None:
        """A restore that is killed half-way, and the next one before this change of what it clears away.

        0: before it writes a marker of its own.
        """
        self._renew()
        assert in_child(self.request, at=self.changes // 2).returncode == -signal.SIGKILL
        why = f"{self._kind}, killed again before change {second}"
        marker = "" if second else str(self.data / f".{MARKER}")
        assert in_child(self.request, at=second, below=marker).returncode == -signal.SIGKILL, why
        self.check(why, bin_dir)
        self._finish(why)

    def _finish(self, why: str) -> None:
        engine = Engine(self.request)
        engine.execute(engine.plan())
        assert _files(self.data) == self._after, why
        assert not (self.data / MARKER).exists(), why
        assert not self.data.with_name("data.restoring").exists(), why

    def kill_and_repeat(self, rng: random.Random, number: int, bin_dir: str) -> None:
        """Once or several times in a row, and then the whole restore."""
        self._renew()
        for _again in range(rng.choice((1, 1, 2))):
            if number % 2:
                seconds = rng.uniform(0.4, 1.0) * self.seconds
                why = f"{self._kind}, seed {SEED}, kill {number}: after {seconds:.3f} s"
                _killed_by_clock(self.request, seconds)
            else:
                # Before the first change of the directory a delta restore makes links to compare its files.
                at = rng.randint(self.changes // 3 if self._kind == "delta" else 1, self.changes)
                why = f"{self._kind}, seed {SEED}, kill {number}: before change {at} of {self.changes}"
                done = in_child(self.request, at=at)
                # The next one has less to do than the first had.
                assert done.returncode in (0, -signal.SIGKILL), f"{why}: {done.stderr}"
            self.check(why, bin_dir)
        self._finish(why)


@pytest.mark.parametrize("kind", list(OPTIONS))
def test_restore_that_is_killed_anywhere_can_be_repeated_and_nothing_half_done_starts(
    history: History, tmp_path: Path, restored: Callable[..., Restored], kind: str, bin_dir: str
) -> None:
    rng = random.Random(f"{SEED} {kind}")
    victim = Victim(history, tmp_path / "victim", kind)
    for number in range(KILLS):
        victim.kill_and_repeat(rng, number, bin_dir)
    print(f"{kind}: {KILLS} restores killed, seed {SEED}; what was left: {victim.seen}")
    # And the last one is a cluster that recovers.
    cluster = restored(history.storage, data=victim.data, backup="first", force=True, delta=kind == "delta")
    assert cluster.run().phase == "end"


def test_kill_while_the_old_directory_is_moved_aside_forgets_nothing(
    history: History, tmp_path: Path, bin_dir: str, major: int
) -> None:
    """Its WAL is a part of what is restored: every moment until the first file has come."""
    victim = Victim(history, tmp_path / "victim", "fresh")
    change = 1
    while not victim.kill_at(change, bin_dir):
        # Nothing of this is another version's.
        change += 1 if major == 18 else 3
    assert change > 8 and victim.seen["moved aside"] and victim.seen["half done"], victim.seen


def test_kill_while_a_killed_restore_is_cleared_away_forgets_nothing(
    history: History, tmp_path: Path, bin_dir: str
) -> None:
    victim = Victim(history, tmp_path / "victim", "fresh")
    half = victim.changes // 2
    for second in (0, 2, half // 3, half + 20):
        victim.kill_twice(second, bin_dir)


def test_what_waits_in_the_place_of_the_new_directory_is_not_removed(history: History, tmp_path: Path) -> None:
    victim = Victim(history, tmp_path / "victim", "fresh")
    shutil.rmtree(victim.data)
    for aside in victim.data.parent.glob("data.old-*"):
        aside.rename(victim.data)
    place = victim.data.with_name("data.restoring")
    place.mkdir()
    (place / "mine").write_text("mine", encoding="ascii")
    before = fingerprint(victim.data, place)
    engine = Engine(victim.request)
    with pytest.raises(PitrError, match=r"is in the way .* nothing was touched"):
        engine.execute(engine.plan())
    assert fingerprint(victim.data, place) == before
