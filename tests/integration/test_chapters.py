# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A new system identifier in a cluster's folder: refused until an operator opens a chapter, and then both restore."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.plugins.module_utils.expire import Expiry
from ansible_collections.pgdrill.pitr.plugins.module_utils.info import archive_info, backup_info
from ansible_collections.pgdrill.pitr.plugins.module_utils.plan import RefusedError
from ansible_collections.pgdrill.pitr.plugins.module_utils.postgres import binary_version
from ansible_collections.pgdrill.pitr.plugins.module_utils.retention import Policy
from ansible_collections.pgdrill.pitr.plugins.modules import repository as module
from ansible_collections.pgdrill.pitr.tests.integration.support import (
    CLUSTER,
    SEGMENT_SIZE,
    Restored,
    Sandbox,
    Server,
    fingerprint,
    until,
)


class _Invocation:
    def __init__(self, check_mode: bool = False, **params: Any) -> None:
        self.check_mode = check_mode
        self._diff = True
        self.params = params


def open_chapter(old: Sandbox, server: Server, check: bool = False, **more: Any) -> dict[str, Any]:
    options = {name: option.get("default") for name, option in module.ARGUMENT_SPEC.items()}
    options.update(
        repository=str(old.repository),
        cluster=CLUSTER,
        system_identifier=server.system_identifier,
        postgresql_version=binary_version(server.bin_dir),
        wal_segment_size=SEGMENT_SIZE,
        **more,
    )
    return module.run(_Invocation(check, **options))  # type: ignore[arg-type]


def dump(server: Server) -> list[str]:
    text = server.program("pg_dumpall", "-h", server.socket, "-p", str(server.PORT), "-U", "postgres").stdout
    assert "CREATE TABLE" in text
    # Random keys, new in every dump.
    return [line for line in text.splitlines() if not line.startswith(("\\restrict", "\\unrestrict"))]


@pytest.fixture
def upgraded(
    sandbox: Callable[..., Sandbox], stranger: Path, bin_dir: str, tmp_path: Path
) -> Iterator[tuple[Sandbox, Sandbox]]:
    """The old primary with a backup, and another system identifier that archives into the same folder."""
    old = sandbox()
    old.backup("old")
    old.commit("the old cluster")
    old.probe()
    new = Sandbox(bin_dir, tmp_path / "new", stranger, settings={"archive_command": old.archive_command})
    new.repository, new.wal_command = old.repository, old.wal_command
    try:
        yield old, new
    finally:
        new.server.close()


def test_both_chapters_restore_to_identical_dumps(
    upgraded: tuple[Sandbox, Sandbox], restored: Callable[..., Restored]
) -> None:
    old, new = upgraded
    truth = dump(old.server)
    old.server.stop()
    new.server.start()
    before = fingerprint(old.archive, old.backups)
    # Without the step: push, backup and the module refuse, and nothing is changed.
    with pytest.raises(PitrError, match=r"new_chapter of the module.*repository_new_chapter") as caught:
        open_chapter(old, new.server)
    assert caught.value.detail["found"] == new.server.system_identifier
    with pytest.raises(PitrError, match="new_chapter"):
        new.backup("new")
    new.server.sql("SELECT pg_switch_wal()")
    until(lambda: "system identifier" in new.server.log_text(), "the refusal of push")
    assert fingerprint(old.archive, old.backups) == before
    # Check mode tells and does nothing.
    told = open_chapter(old, new.server, check=True, new_chapter=True)
    assert (
        told["changed"] and told["chapter"] == 2 and str(old.repository / CLUSTER / "cluster.json") in told["created"]
    )
    assert [chapter.number for chapter in old.folder.chapters] == [1]
    # The step.
    done = open_chapter(old, new.server, new_chapter=True)
    assert done["changed"] and done["created"] == told["created"] and "archive/" in done["diff"]["after"]
    assert not open_chapter(old, new.server, new_chapter=True)["changed"]
    assert not open_chapter(old, new.server)["changed"]
    new.commit("the new cluster")
    new.backup("new")
    new.commit("after the upgrade")
    new.probe()
    new_truth = dump(new.server)
    new.server.stop()
    first, second = old.folder.chapters
    assert fingerprint(Path(old.folder.archive_path(first))).keys() <= before.keys()
    # Both are told apart.
    listed = backup_info(old.folder)
    assert [(item["label"], item["chapter"]) for item in listed["backups"]] == [("old", 1), ("new", 2)]
    assert [item["backup"] for item in listed["recovery_windows"]] == ["new"]
    assert [item["backup"] for item in backup_info(old.folder, first)["recovery_windows"]] == ["old"]
    assert archive_info(old.folder, chapter=first)["chapter"]["system_identifier"] == old.server.system_identifier
    # Both are restored.
    cluster = restored(old, chapter=1).run()
    assert cluster.phase == "the old cluster" and dump(cluster.server) == truth
    assert cluster.server.system_identifier == first.system_identifier
    cluster.server.stop()
    for options in ({}, {"chapter": 2}):
        cluster = restored(new, **options).run()
        assert cluster.phase == "after the upgrade" and dump(cluster.server) == new_truth
        cluster.server.stop()
    # Retention of one does not touch the other, and the last backup of the old one stays.
    for chapter in (second, first):
        Expiry(old.folder, Policy(keep_full=1), chapter).run()
    assert restored(old, chapter=1).run().phase == "the old cluster"


def test_folder_does_not_go_back_to_an_older_chapter(upgraded: tuple[Sandbox, Sandbox], tmp_path: Path) -> None:
    old, new = upgraded
    open_chapter(old, new.server, new_chapter=True)
    for flag in (False, True):
        with pytest.raises(PitrError, match=r"has gone on from this cluster \(chapter 1.*Nothing was changed"):
            open_chapter(old, old.server, new_chapter=flag)
    with pytest.raises(PitrError, match="older chapter"):
        old.backup("late")
    with pytest.raises(RefusedError, match=r"has no chapter 3; its chapters are: 1, 2"):
        old.plan(tmp_path / "elsewhere", chapter=3)
    # The data directory of the new cluster is never replaced by the old one.
    with pytest.raises(RefusedError, match="directory_foreign"):
        old.plan(new.server.data, chapter=1, force=True)
