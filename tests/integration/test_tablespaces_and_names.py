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
from typing import TYPE_CHECKING

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.plugins.module_utils.plan import RefusedError
from ansible_collections.pgdrill.pitr.plugins.module_utils.postgres import query
from ansible_collections.pgdrill.pitr.plugins.module_utils.restore import Restore as Engine
from ansible_collections.pgdrill.pitr.plugins.module_utils.restore import undo
from ansible_collections.pgdrill.pitr.tests.integration.support import Restored, Sandbox, fingerprint, flip, in_child

if TYPE_CHECKING:
    from ansible_collections.pgdrill.pitr.tests.integration.conftest import History

Restore = Callable[..., Restored]
MakeSandbox = Callable[..., Sandbox]

# pg_ctl hands the data directory to a shell between double quotes, and a tablespace cannot have a single one.
STRANGE_DATA = "it's 100% ready %f %p äöü & back"
STRANGE_TABLESPACE = '100% "ready" %p äöü & $HOME \\ back'
STRANGE_LINES = "two\nlines\r and a back\\slash\n"
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
        primary.plan(primary.server.data, force=True)
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


# --- all of them at once


def test_tablespaces_go_under_a_prefix_unless_they_are_mapped(
    sandbox: MakeSandbox, restored: Restore, tmp_path: Path
) -> None:
    # Names of which one is the beginning of another, and one that tablespace_map has to escape.
    places = [tmp_path / name for name in ("slow", "slow2", STRANGE_LINES)]
    primary = sandbox()
    for number, place in enumerate(places):
        place.mkdir(mode=0o700)
        with primary.server.connection() as connection:
            query(connection, f"CREATE TABLESPACE t{number} LOCATION {_literal(str(place))}")
        primary.server.sql(f"CREATE TABLE far{number} TABLESPACE t{number} AS SELECT {number} AS v")
    oids = {row[0]: row[1] for row in primary.server.sql("SELECT spcname, oid::int FROM pg_tablespace")}
    backup = primary.backup("only")
    assert {item.location for item in backup.tablespaces} == {str(place) for place in places}
    primary.probe()
    primary.server.stop()
    before = fingerprint(primary.server.data, *places)
    prefix, own = tmp_path / STRANGE, tmp_path / "own"
    cluster = restored(primary, tablespace_prefix=str(prefix), tablespace_mapping={str(places[1]): str(own)}).run()
    expected = {oids["t0"]: prefix / str(oids["t0"]), oids["t1"]: own, oids["t2"]: prefix / str(oids["t2"])}
    for oid, place in expected.items():
        assert os.readlink(cluster.server.data / "pg_tblspc" / str(oid)) == str(place)
        assert cluster.server.value("SELECT pg_tablespace_location(%s)", oid) == str(place)
    assert [cluster.server.value(f"SELECT v FROM far{number}") for number in range(3)] == [0, 1, 2]
    assert fingerprint(primary.server.data, *places) == before


def test_every_place_that_is_somebody_elses_is_refused(sandbox: MakeSandbox, history: History, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    primary = sandbox()
    for number, place in enumerate((one, two)):
        place.mkdir(mode=0o700)
        primary.server.sql(f"CREATE TABLESPACE t{number} LOCATION {_literal(str(place))}")
    primary.backup("only")
    primary.probe()
    primary.server.stop()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "new")
    new = tmp_path / "new" / "data"
    before = fingerprint(tmp_path)
    free = str(tmp_path / "free")
    cases = (
        ("tablespace_place", "relative/place", free),
        ("tablespace_place", str(tmp_path / "file" / "below"), free),
        ("tablespace_place", "/" + "x/" * 500, free),
        ("tablespace_in_pgdata", str(new / "far"), free),
        ("tablespace_in_pgdata", str(tmp_path / "new"), free),
        # By another name.
        ("tablespace_in_pgdata", str(tmp_path / "link" / "data" / "far"), free),
        ("tablespace_overlap", free, free),
        ("tablespace_overlap", free, f"{free}/below"),
        ("tablespace_overlap", f"{free}/below", free),
        ("tablespace_in_cluster", str(primary.server.data / "far"), free),
        ("tablespace_in_cluster", str(history.data / "far"), free),
        ("tablespace_in_cluster", str(one / "below"), free),
    )
    for code, first, second in cases:
        with pytest.raises(RefusedError) as caught:
            primary.plan(new, tablespace_mapping={str(one): first, str(two): second})
        assert [item.code for item in caught.value.refusals] == [code], (first, second)
    # The beginning of a path is not the path.
    primary.plan(new, tablespace_mapping={str(one): f"{new}-far", str(two): f"{new}-far2"})
    assert fingerprint(tmp_path) == before


def test_tablespace_that_comes_up_elsewhere_is_no_success(
    sandbox: MakeSandbox, restored: Restore, tmp_path: Path
) -> None:
    original, target = tmp_path / "original", tmp_path / "target"
    primary = _with_tablespace(sandbox, original)
    cluster = restored(primary, tablespace_mapping={str(original): str(target)})
    # Somebody has moved it before the start, and has told only the server.
    target.rename(tmp_path / "moved")
    told = cluster.server.data / "tablespace_map"
    told.write_text(told.read_text(encoding="utf-8").replace(str(target), str(tmp_path / "moved")), encoding="utf-8")
    with pytest.raises(PitrError, match=f"moved instead of {target}"):
        cluster.run()


def test_links_that_are_not_those_of_the_plan_undo_the_restore(
    sandbox: MakeSandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ansible_collections.pgdrill.pitr.plugins.module_utils import extract

    original, target = tmp_path / "original", tmp_path / "target"
    primary = _with_tablespace(sandbox, original)
    engine = Engine(primary.request(tmp_path / "new", tablespace_mapping={str(original): str(target)}))
    plan = engine.plan()

    def turn(pgdata: str, *_more: object) -> None:
        for name in os.listdir(os.path.join(pgdata, "pg_tblspc")):
            os.unlink(os.path.join(pgdata, "pg_tblspc", name))
            os.symlink(original, os.path.join(pgdata, "pg_tblspc", name))

    monkeypatch.setattr(extract, "rewrite_tablespace_map", turn)
    before = fingerprint(primary.server.data, original)
    with pytest.raises(PitrError, match=f"leads to {original} instead of {target}"):
        engine.execute(plan)
    assert fingerprint(primary.server.data, original) == before
    assert not (tmp_path / "new").exists()


# --- pg_wal on a filesystem of its own


def _with_wal_link(make: MakeSandbox, wal: Path) -> Sandbox:
    """A primary whose pg_wal is a link to ``wal``, with a backup and a commit after it, stopped."""
    primary = make(start=False)
    wal.parent.mkdir(parents=True)
    link = primary.server.data / "pg_wal"
    link.rename(wal)
    link.symlink_to(wal)
    primary.server.start()
    primary.backup("only")
    primary.commit("after")
    primary.probe()
    primary.server.stop()
    return primary


def test_pg_wal_that_is_a_link_gets_a_new_directory_beside_the_old(
    sandbox: MakeSandbox, restored: Restore, tmp_path: Path
) -> None:
    wal = tmp_path / STRANGE / "main"
    primary = _with_wal_link(sandbox, wal)
    before = fingerprint(wal)
    cluster = restored(primary, data=primary.server.data, force=True).run()
    assert cluster.phase == "after"
    link = cluster.server.data / "pg_wal"
    assert os.readlink(link) == f"{wal}.restored-only"
    assert any(f"{wal}.restored-only" in note and "stays as it is" in note for note in cluster.plan.notes)
    assert fingerprint(wal) == before
    assert os.readlink(Path(cluster.result.moved_aside) / "pg_wal") == str(wal)
    # And once more: the name does not grow, and nobody's WAL is mixed with another's.
    cluster.recovery.accept()
    cluster.server.stop()
    second = restored(primary, {"recovery_target_timeline": "1"}, data=primary.server.data, force=True).run()
    assert os.readlink(link) == f"{wal}.restored-onlyx"
    assert second.phase == "after"
    assert fingerprint(wal) == before
    second.server.stop()
    undo(second.request, second.result.moved_aside)
    assert os.readlink(link) == f"{wal}.restored-only"


def test_restore_that_is_not_wanted_takes_its_wal_directory_with_it(
    sandbox: MakeSandbox, restored: Restore, tmp_path: Path
) -> None:
    wal = tmp_path / "wal" / "main"
    primary = _with_wal_link(sandbox, wal)
    before = fingerprint(primary.server.data, wal.parent)
    cluster = restored(primary, data=primary.server.data, force=True, keep_unaccepted=False).run()
    cluster.server.stop()
    undo(cluster.request, cluster.result.moved_aside)
    assert fingerprint(primary.server.data, wal.parent) == before
    # Neither does a failed one leave it, nor one that was killed and repeated.
    stored = next((primary.backups / "only").glob("base.tar*"))
    flip(stored, stored.stat().st_size // 2)
    engine = Engine(primary.request(primary.server.data, force=True))
    plan = engine.plan()
    with pytest.raises(PitrError, match=r"base\.tar"):
        engine.execute(plan)
    assert fingerprint(primary.server.data, wal.parent) == before
    flip(stored, stored.stat().st_size // 2)
    request = primary.request(primary.server.data, force=True)
    assert in_child(request, below=f"{primary.server.data}/base/").returncode == -signal.SIGKILL
    assert (wal.parent / "main.restored-only").is_dir()
    repeated = restored(primary, data=primary.server.data, force=True).run()
    assert repeated.phase == "after"
    made = os.readlink(repeated.server.data / "pg_wal")
    assert sorted(path.name for path in wal.parent.iterdir()) == ["main", os.path.basename(made)]
    assert fingerprint(wal) == {name: value for name, value in before.items() if name.startswith(str(wal))}


def test_pg_wal_goes_where_it_is_told(sandbox: MakeSandbox, restored: Restore, tmp_path: Path) -> None:
    primary = _with_wal_link(sandbox, tmp_path / "wal" / "main")
    place = tmp_path / "elsewhere" / STRANGE
    cluster = restored(primary, pg_wal_directory=str(place)).run()
    assert os.readlink(cluster.server.data / "pg_wal") == str(place)
    assert any(len(path.name) == 24 for path in place.iterdir())
    assert cluster.phase == "after"
    # Elsewhere a plain directory.
    plain = restored(primary)
    assert not (plain.server.data / "pg_wal").is_symlink()


def test_place_for_pg_wal_that_is_somebody_elses_is_refused(
    sandbox: MakeSandbox, history: History, tmp_path: Path
) -> None:
    wal = tmp_path / "wal" / "main"
    primary = _with_wal_link(sandbox, wal)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.odt").touch()
    before = fingerprint(tmp_path)
    for place in (
        "relative",
        str(tmp_path / "taken"),
        str(tmp_path / "taken" / "thesis.odt"),
        str(primary.server.data / "wal"),
        str(primary.server.data.parent),
        str(wal),
        str(wal / "below"),
        str(history.data / "wal"),
    ):
        with pytest.raises(RefusedError) as caught:
            primary.plan(primary.server.data, force=True, pg_wal_directory=place)
        assert [item.code for item in caught.value.refusals] == ["pg_wal_directory"], place
    assert fingerprint(tmp_path) == before
