# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Tablespaces go where they are mapped to and nowhere else; no character of a path is special."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.plugins.module_utils.plan import RefusedError
from ansible_collections.pgdrill.pitr.plugins.module_utils.restore import Restore as Engine
from ansible_collections.pgdrill.pitr.tests.integration.support import Restored, Sandbox, fingerprint, flip, in_child

Restore = Callable[..., Restored]
MakeSandbox = Callable[..., Sandbox]

# pg_ctl hands the data directory to a shell between double quotes, and a tablespace cannot have a single one.
STRANGE_DATA = "it's 100% ready %f %p äöü & back"
STRANGE_TABLESPACE = '100% "ready" %p äöü & $HOME \\ back'
STRANGE = 'it\'s 100% "ready" %f %p äöü & $HOME \\ back'


def _with_tablespace(make: MakeSandbox, location: Path) -> Sandbox:
    """A primary whose table ``far`` lies in a tablespace, with a backup and rows after it, stopped."""
    location.mkdir(parents=True, mode=0o700)
    primary = make()
    primary.server.sql(f"CREATE TABLESPACE far_away LOCATION {_literal(str(location))}")
    primary.server.sql("CREATE TABLE far TABLESPACE far_away AS SELECT 1 AS v")
    primary.backup("only")
    primary.server.sql("INSERT INTO far VALUES (2)")
    primary.commit("after")
    primary.probe()
    primary.server.stop()
    return primary


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _rows(cluster: Restored) -> list[int]:
    return [row[0] for row in cluster.server.sql("SELECT v FROM far ORDER BY v")]


@pytest.mark.parametrize("name", ["slow", STRANGE_TABLESPACE])
def test_tablespace_goes_where_it_is_mapped_to(
    sandbox: MakeSandbox, restored: Restore, tmp_path: Path, name: str
) -> None:
    original, target = tmp_path / "original" / name, tmp_path / "target" / name
    primary = _with_tablespace(sandbox, original)
    before = fingerprint(original, primary.server.data)
    cluster = restored(primary, tablespace_mapping={str(original): str(target)}).run()
    links = list((cluster.server.data / "pg_tblspc").iterdir())
    assert [os.readlink(link) for link in links] == [str(target)]
    assert _rows(cluster) == [1, 2]
    assert cluster.server.value(
        "SELECT pg_tablespace_location(oid) FROM pg_tablespace WHERE spcname = 'far_away'"
    ) == str(target)
    # The server that the backup came from, and its tablespace, are as they were.
    assert fingerprint(original, primary.server.data) == before


def test_tablespace_whose_place_is_taken_is_refused(sandbox: MakeSandbox, tmp_path: Path) -> None:
    original, taken = tmp_path / "original", tmp_path / "taken"
    primary = _with_tablespace(sandbox, original)
    taken.mkdir()
    (taken / "thesis.odt").touch()
    before = fingerprint(tmp_path)
    for mapping in ({}, {str(original): str(taken)}):
        with pytest.raises(RefusedError) as caught:
            primary.plan(tmp_path / "new", tablespace_mapping=mapping)
        assert [item.code for item in caught.value.refusals] == ["tablespace_not_empty"]
    # A part of the path is no match, and a mapping for nothing is a mistake.
    with pytest.raises(RefusedError) as caught:
        primary.plan(tmp_path / "new", tablespace_mapping={str(original)[:-1]: str(tmp_path / "other")})
    assert "tablespace_unknown" in [item.code for item in caught.value.refusals]
    assert fingerprint(tmp_path) == before


def test_tablespace_of_a_living_server_is_not_written_to_by_the_recovery_of_an_older_backup(
    sandbox: MakeSandbox, restored: Restore, tmp_path: Path
) -> None:
    original, data = tmp_path / "original", tmp_path / "new"
    original.mkdir(mode=0o700)
    primary = sandbox()
    primary.backup("older")
    before_it = primary.commit("before it")
    primary.restore_point("before it")
    primary.server.sql(f"CREATE TABLESPACE far_away LOCATION {_literal(str(original))}")
    primary.server.sql("CREATE TABLE far TABLESPACE far_away AS SELECT 1 AS v")
    primary.commit("after")
    primary.probe()
    before = fingerprint(original)
    with pytest.raises(RefusedError, match="no mapping changes") as caught:
        primary.plan(data)
    assert [item.code for item in caught.value.refusals] == ["tablespace_in_wal"]
    # The directory's record comes before the commit that a recovery to this time stops at.
    with pytest.raises(RefusedError, match="no mapping changes"):
        primary.plan(data, {"recovery_target_time": before_it.time_text})
    assert fingerprint(original) == before and not data.exists()
    # What ends before that is not concerned.
    for options in (
        {"recovery_target_lsn": str(before_it.end), "recovery_target_inclusive": False},
        {"recovery_target_xid": str(before_it.xid)},
        {"recovery_target_time": before_it.time_text, "recovery_target_inclusive": False},
        {"recovery_target_name": "before it"},
        {"recovery_target": "immediate"},
    ):
        assert primary.plan(data, options).backup.label == "older"
    assert restored(primary, {"recovery_target_xid": str(before_it.xid)}).run().phase == "before it"
    assert fingerprint(original) == before
    # Without the directory recovery would fail half-way; with an empty one it does what it should.
    primary.server.stop()
    original.rename(tmp_path / "moved")
    with pytest.raises(RefusedError, match="is not there") as caught:
        primary.plan(data)
    assert [item.code for item in caught.value.refusals] == ["tablespace_in_wal"]
    original.mkdir(mode=0o700)
    assert _rows(restored(primary).run()) == [1]


def test_tablespace_that_is_gone_is_restored_to_its_own_place(
    sandbox: MakeSandbox, restored: Restore, tmp_path: Path
) -> None:
    original = tmp_path / "original"
    primary = _with_tablespace(sandbox, original)
    original.rename(tmp_path / "lost")
    assert _rows(restored(primary).run()) == [1, 2]


def test_failed_restore_leaves_the_tablespaces_place_empty(sandbox: MakeSandbox, tmp_path: Path) -> None:
    original, target = tmp_path / "original", tmp_path / "target"
    primary = _with_tablespace(sandbox, original)
    stored = next(path for path in (primary.backups / "only").iterdir() if path.name[0].isdigit())
    flip(stored, stored.stat().st_size // 2)
    target.mkdir()
    places = (primary.server.data, primary.archive, primary.backups, original, target)
    before = fingerprint(*places)
    engine = Engine(primary.request(tmp_path / "new", tablespace_mapping={str(original): str(target)}))
    plan = engine.plan()
    with pytest.raises(PitrError, match=stored.name):
        engine.execute(plan)
    assert fingerprint(*places) == before
    assert not (tmp_path / "new").exists()


def test_killed_restore_with_a_tablespace_can_be_repeated(
    sandbox: MakeSandbox, restored: Restore, tmp_path: Path
) -> None:
    original, target = tmp_path / "original", tmp_path / "target"
    primary = _with_tablespace(sandbox, original)
    data = tmp_path / "new"
    request = primary.request(data, tablespace_mapping={str(original): str(target)})
    assert in_child(request, below=f"{target}/PG_").returncode == -signal.SIGKILL
    assert in_child(request, below=f"{data}/.tablespace_map").returncode == -signal.SIGKILL
    assert (data / "pitr-restoring.json").exists()
    assert list(target.iterdir())
    # What somebody else has put there in the meantime is not cleared away.
    (target / "thesis.odt").touch()
    with pytest.raises(RefusedError, match="not empty"):
        primary.plan(data, tablespace_mapping={str(original): str(target)})
    (target / "thesis.odt").unlink()
    cluster = restored(primary, data=data, tablespace_mapping={str(original): str(target)}).run()
    assert _rows(cluster) == [1, 2]


def test_strange_names_of_every_directory(sandbox: MakeSandbox, restored: Restore, tmp_path: Path) -> None:
    place = tmp_path / STRANGE_DATA
    primary = sandbox(data=place / "data", repository=tmp_path / STRANGE / "repository")
    primary.backup("only")
    commit = primary.commit("target")
    primary.server.sql("SELECT pg_create_restore_point(%s)", 'it\'s 100% "ready" äöü')
    primary.commit("after")
    primary.probe()
    primary.server.stop()
    settings = json.loads((Path(primary.wal_command).parent / "main.json").read_text(encoding="utf-8"))
    assert settings["repository"] == str(tmp_path / STRANGE / "repository")
    for number, options in enumerate(
        ({"recovery_target_name": 'it\'s 100% "ready" äöü'}, {"recovery_target_xid": str(commit.xid)})
    ):
        cluster = restored(
            primary, options, data=place / f"restored {number}", archive_after="none-until-promoted"
        ).run()
        assert cluster.phase == "target"
        cluster.recovery.accept()
        cluster.server.stop()
    # The branches that were accepted are newer timelines.
    own = restored(primary, {"recovery_target_timeline": "1"}, data=place / "data", force=True).run()
    assert own.phase == "after"


def test_pitr_wal_in_a_strange_directory(sandbox: MakeSandbox, restored: Restore, tmp_path: Path) -> None:
    from ansible_collections.pgdrill.pitr.plugins.module_utils.install import install
    from ansible_collections.pgdrill.pitr.plugins.module_utils.postgres import shell_command

    primary = sandbox(start=False)
    directory = tmp_path / STRANGE / "pitr"
    install(str(directory), "main", {"repository": str(primary.repository), "compression": "gzip"})
    primary.wal_command = str(directory / "pitr-wal")
    primary.configure({"archive_command": shell_command([primary.wal_command, "push", "main"], ["%p"])})
    primary.server.start()
    primary.backup("only")
    primary.commit("after")
    primary.probe()
    primary.server.stop()
    assert restored(primary).run().phase == "after"
