# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Timelines: three of them in one archive, with abandoned branches that can still be restored by number.

::

    timeline 1   born  [first] a1 a2 a3 [second] a4
    timeline 2                    b1 b2 b3                 from a2 on
    timeline 3                          c1 [third] c2      from b2 on
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils import codec
from ansible_collections.pgdrill.pitr.plugins.module_utils.info import archive_info, backup_info
from ansible_collections.pgdrill.pitr.plugins.module_utils.plan import RefusedError
from ansible_collections.pgdrill.pitr.tests.integration.support import (
    Commit,
    Restored,
    Sandbox,
    Storage,
    fingerprint,
    until,
)

Restore = Callable[..., Restored]


class Branches:
    """The archive above. ``commits`` by phase."""

    def __init__(self, sandbox: Sandbox, directory: Path) -> None:
        self.storage: Storage = sandbox
        self.commits: dict[str, Commit] = {}
        self._sandbox = sandbox
        self._write("born")
        sandbox.backup("first")
        self._write("a1", "a2", "a3")
        sandbox.backup("second")
        self._write("a4")
        sandbox.probe()
        sandbox.server.stop()
        self._branch(directory / "two", "a2")
        self._write("b1", "b2", "b3")
        sandbox.server.sql("SELECT pg_create_restore_point('end of two')")
        sandbox.probe()
        sandbox.server.close()
        self._branch(directory / "three", "b2")
        self._write("c1")
        sandbox.backup("third")
        self._write("c2")
        sandbox.probe()
        sandbox.server.close()

    def _write(self, *phases: str) -> None:
        for phase in phases:
            self.commits[phase] = self._sandbox.commit(phase)

    def _branch(self, data: Path, phase: str) -> None:
        data.parent.mkdir(exist_ok=True)
        options = {"recovery_target_xid": str(self.commits[phase].xid)}
        cluster = Restored(self._sandbox, data, options, archive_after="none-until-promoted").run()
        assert cluster.phase == phase
        cluster.recovery.accept()
        self._sandbox.server = cluster.server


@pytest.fixture(scope="session")
def branches(bin_dir: str, template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Branches]:
    """Shared, read-only."""
    directory = tmp_path_factory.mktemp("branches")
    sandbox = Sandbox(bin_dir, directory, template)
    first = sandbox.server
    try:
        first.start()
        branches = Branches(sandbox, directory)
        before = fingerprint(sandbox.archive, sandbox.backups)
        yield branches
        assert fingerprint(sandbox.archive, sandbox.backups) == before, "a test has written to what all share"
    finally:
        first.close()
        sandbox.server.close()


def _xid(branches: Branches, phase: str) -> dict[str, Any]:
    return {"recovery_target_xid": str(branches.commits[phase].xid)}


def test_archive_knows_three_timelines_and_where_they_branch(branches: Branches, bin_dir: str) -> None:
    info = archive_info(branches.storage.folder, bin_dir)
    assert [(item["timeline"], item["parent"]) for item in info["timelines"]] == [(1, None), (2, 1), (3, 2)]
    assert info["timelines"][1]["switch_lsn"] == str(branches.commits["a2"].end)
    assert info["timelines"][2]["switch_lsn"] == str(branches.commits["b2"].end)
    assert info["gaps"] == []
    windows = {item["backup"]: item for item in backup_info(branches.storage.folder)["recovery_windows"]}
    assert {label: item["timeline"] for label, item in windows.items()} == {"first": 3, "second": 1, "third": 3}
    assert all(item["restorable"] for item in windows.values())


def test_latest_follows_the_newest_timeline_from_its_own_backup(branches: Branches, restored: Restore) -> None:
    cluster = restored(branches.storage).run()
    assert (cluster.plan.backup.label, cluster.plan.timeline) == ("third", 3)
    assert cluster.phase == "c2"
    assert cluster.recovery.timeline() == 4


def test_latest_goes_through_all_timelines_from_the_oldest_backup(branches: Branches, restored: Restore) -> None:
    cluster = restored(branches.storage, backup="first").run()
    assert [span.timeline for span in cluster.plan.spans] == [1, 2, 3]
    assert cluster.phase == "c2"


@pytest.mark.parametrize(
    ("timeline", "phase", "label"), [("1", "a4", "second"), ("2", "b3", "first"), ("3", "c2", "third")]
)
def test_end_of_every_timeline_can_be_restored_by_its_number(
    branches: Branches, restored: Restore, timeline: str, phase: str, label: str
) -> None:
    cluster = restored(branches.storage, {"recovery_target_timeline": timeline}).run()
    assert cluster.plan.backup.label == label
    assert cluster.phase == phase
    # Never a number that was given away before.
    assert cluster.recovery.timeline() == 4


@pytest.mark.parametrize(("timeline", "phase"), [("1", "a3"), ("2", "b1"), ("latest", "b1"), ("0x2", "b3")])
def test_transaction_is_found_on_the_branch_that_was_asked_for(
    branches: Branches, restored: Restore, timeline: str, phase: str
) -> None:
    cluster = restored(branches.storage, {**_xid(branches, phase), "recovery_target_timeline": timeline}).run()
    assert cluster.plan.backup.label == "first"
    assert cluster.phase == phase


def test_lsn_means_another_row_on_another_timeline(branches: Branches, restored: Restore) -> None:
    # The branches have WAL at the same positions.
    start = branches.commits["b1"].start
    assert branches.commits["a3"].end < start < branches.commits["a4"].start
    options = {"recovery_target_lsn": str(start), "recovery_target_inclusive": False}
    assert restored(branches.storage, {**options, "recovery_target_timeline": "1"}).run().phase == "a3"
    assert restored(branches.storage, {**options, "recovery_target_timeline": "2"}).run().phase == "a2"


def test_transaction_of_an_abandoned_branch_is_not_in_the_newest_timeline(branches: Branches, tmp_path: Path) -> None:
    # The ids were given away again after the branch, so that a3 is b1 there; a4 and b3 have other numbers.
    with pytest.raises(RefusedError, match="not in the archived WAL of timeline 3"):
        branches.storage.plan(tmp_path / "none", {"recovery_target_name": "end of two"})
    options = {"recovery_target_name": "end of two", "recovery_target_timeline": "2"}
    assert branches.storage.plan(tmp_path / "none", options).timeline == 2


def test_current_is_the_timeline_of_the_backup(branches: Branches, restored: Restore, tmp_path: Path) -> None:
    current = {"recovery_target_timeline": "current"}
    assert branches.storage.plan(tmp_path / "none", current).timeline == 3
    cluster = restored(branches.storage, current, backup="first").run()
    assert cluster.plan.timeline == 1
    assert cluster.phase == "a4"


def test_backup_of_an_abandoned_branch_is_refused_for_the_newest_timeline(branches: Branches, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="second on timeline 1") as caught:
        branches.storage.plan(tmp_path / "none", backup="second")
    assert [item.code for item in caught.value.refusals] == ["no_backup_on_timeline"]


def test_timeline_without_its_history_file_is_refused_and_not_left_out(branches: Branches, tmp_path: Path) -> None:
    storage = branches.storage.copy(tmp_path / "broken")
    (storage.archive / "00000003.history").unlink()
    # "latest" without the file would silently be the abandoned timeline 2.
    with pytest.raises(RefusedError, match=r"00000003\.history"):
        storage.plan(tmp_path / "none")
    # What was asked for by number does not depend on it.
    assert storage.plan(tmp_path / "none", {"recovery_target_timeline": "2"}).timeline == 2


def test_first_segment_of_a_timeline_is_missed_when_later_ones_are_there(branches: Branches, tmp_path: Path) -> None:
    storage = branches.storage.copy(tmp_path / "broken")
    first = storage.segments(3)[0]
    assert len(storage.segments(3)) > 1
    first.unlink()
    # The parent's copy of that segment ends at the switch; the records after it are lost.
    with pytest.raises(RefusedError, match=first.name) as caught:
        storage.plan(tmp_path / "none", backup="first")
    assert [item.code for item in caught.value.refusals] == ["archive_gap"]


def test_recovery_that_ends_before_its_timeline_began_leaves_an_archive_that_can_be_restored(
    bin_dir: str, template: Path, tmp_path: Path, restored: Restore
) -> None:
    """PostgreSQL then writes a history file whose positions do not ascend, and goes on archiving.

    The switch lies in another segment than the one that the history file tells for its parent.
    """
    sandbox = Sandbox(bin_dir, tmp_path / "sandbox", template)
    first = sandbox.server
    try:
        first.start()
        sandbox.backup("only")
        sandbox.commit("one")
        early = sandbox.commit("early")
        sandbox.fill(2)
        late = sandbox.commit("late")
        sandbox.probe()
        first.stop()
        two = restored(sandbox, {"recovery_target_xid": str(late.xid)}, archive_after="same").run()
        two.recovery.accept()
        sandbox.server = two.server
        sandbox.probe()
        two.server.stop()
        three = restored(sandbox, {"recovery_target_xid": str(early.xid)}, archive_after="same").run()
        assert three.phase == "early"
        three.recovery.accept()
        sandbox.server = three.server
        until((sandbox.archive / "00000003.history").exists, "the history file in the archive")
        with codec.open_reader(str(sandbox.archive / "00000003.history")) as reader:
            text = reader.read().decode()
        assert [line.split()[1] for line in text.splitlines() if line] == [str(late.end), str(early.end)]
        sandbox.commit("after early")
        sandbox.probe()
        three.server.stop()
        cluster = restored(sandbox).run()
        assert cluster.plan.timeline == 3
        assert [(span.timeline, span.end) for span in cluster.plan.spans] == [(1, early.end), (3, None)]
        assert cluster.phase == "after early"
    finally:
        first.close()


def test_damaged_history_file_is_named(branches: Branches, tmp_path: Path) -> None:
    storage = branches.storage.copy(tmp_path / "broken")
    (storage.archive / "00000003.history").write_text("2\tnowhere\n", encoding="ascii")
    with pytest.raises(Exception, match=r"00000003\.history"):
        storage.plan(tmp_path / "none")
