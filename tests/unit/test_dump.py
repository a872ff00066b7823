# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Keeping dumps, and the order of things: with recorded dumps in the place of a server."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils import codec, dump, dumppreamble
from ansible_collections.pgdrill.pitr.plugins.module_utils.dump import Request, load_index, perform
from ansible_collections.pgdrill.pitr.plugins.module_utils.dumpindex import DumpIndex
from ansible_collections.pgdrill.pitr.plugins.module_utils.dumpparse import index_of
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.plugins.module_utils.postgres import Login

TRUTH = (Path(__file__).parent / "fixtures" / "cluster-dump-18.sql").read_bytes()
OTHER = TRUTH.replace(b"2\ttab", b"2\tTAB")

Run = Callable[..., dump.Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """perform() on a cluster whose dump is given; paths are names in tmp_path."""

    def perform_on(text: bytes, path: str = "", compare_to: str = "", **options: Any) -> dump.Result:
        def take(_login: Login, _bin_dir: str, target: str = "", compression: str = "auto") -> DumpIndex:
            if target:
                with codec.open_writer(target, compression) as writer:
                    writer.write(text)
            return index_of([text])

        monkeypatch.setattr(dump, "take", take)
        full = {"path": path and str(tmp_path / path), "compare_to": compare_to and str(tmp_path / compare_to)}
        return perform(Request(Login(), "/nowhere", **{**full, **options}))

    return perform_on


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.mark.parametrize("compression", ["none", "gzip", "auto"])
def test_a_kept_dump_is_compared_with_later(run: Run, tmp_path: Path, compression: str) -> None:
    assert run(TRUTH, "truth", compression=compression).changed
    assert names(tmp_path) == ["truth", "truth.index.json"]
    assert {os.stat(tmp_path / name).st_mode & 0o777 for name in names(tmp_path)} == {0o600}
    result = run(TRUTH, compare_to="truth")
    assert result.to_dict("")["identical"] is True and not result.changed
    values = run(OTHER, compare_to="truth", compression=compression).to_dict("")
    assert values["identical"] is False and values["difference_count"] == 1
    (difference,) = values["differences"]
    assert (difference["object"], difference["truth"]) == ("TABLE DATA public.t", "2\ttab\\there\\nnl")
    assert names(tmp_path) == ["truth", "truth.index.json"], "nothing else stays"


def test_values_are_fit_for_json(run: Run) -> None:
    run(TRUTH, "truth")
    values = run(OTHER, compare_to="truth").to_dict("")
    assert json.loads(json.dumps(values)) == values
    assert set(values) == {
        "changed", "fingerprint", "databases", "objects", "bytes", "seconds", "path",
        "identical", "difference_count", "differences", "explained",
    }  # fmt: skip
    assert "identical" not in run(TRUTH).to_dict("")


def test_the_same_content_is_not_stored_again(run: Run, tmp_path: Path) -> None:
    run(TRUTH, "truth")
    before = os.stat(tmp_path / "truth").st_ino
    assert not run(TRUTH, "truth").changed
    assert os.stat(tmp_path / "truth").st_ino == before
    assert run(OTHER, "truth").changed
    assert load_index(str(tmp_path / "truth")).fingerprint == index_of([OTHER]).fingerprint


def test_check_mode_keeps_nothing_and_tells_the_truth(run: Run, tmp_path: Path) -> None:
    assert run(TRUTH, "truth", check_mode=True).changed
    assert run(TRUTH, "missing-directory/truth", check_mode=True).changed
    assert names(tmp_path) == []
    run(TRUTH, "truth")
    assert not run(TRUTH, "truth", check_mode=True).changed
    result = run(OTHER, "other", compare_to="truth", check_mode=True)
    assert result.changed and len(result.to_dict("")["differences"]) == 1
    assert names(tmp_path) == ["truth", "truth.index.json"]


def test_a_dump_is_kept_when_it_differs(run: Run, tmp_path: Path) -> None:
    run(TRUTH, "truth")
    result = run(OTHER, "restored", compare_to="truth")
    assert names(tmp_path) == ["restored", "restored.index.json", "truth", "truth.index.json"]
    assert result.compared is not None
    assert result.compared.message("truth") == (
        "The cluster is not identical to truth: 1 difference, the first is that TABLE DATA public.t in d1 is changed."
    )


def test_the_index_is_made_again_from_the_dump(run: Run, tmp_path: Path) -> None:
    run(TRUTH, "truth")
    (tmp_path / "truth.index.json").unlink()
    assert load_index(str(tmp_path / "truth")).fingerprint == index_of([TRUTH]).fingerprint
    assert run(TRUTH, compare_to="truth").to_dict("")["identical"] is True


def test_a_dump_that_was_changed_afterwards_is_refused(run: Run, tmp_path: Path) -> None:
    run(TRUTH, "truth", compression="none")
    (tmp_path / "truth").write_bytes(TRUTH + b"\n")
    with pytest.raises(PitrError, match="changed after it was taken"):
        run(TRUTH, compare_to="truth")


def test_a_damaged_dump_without_an_index_is_refused(run: Run, tmp_path: Path) -> None:
    run(TRUTH, "truth", compression="gzip")
    (tmp_path / "truth.index.json").unlink()
    data = (tmp_path / "truth").read_bytes()
    (tmp_path / "truth").write_bytes(data[: len(data) // 2])
    with pytest.raises(PitrError, match="truth"):
        run(TRUTH, compare_to="truth")
    (tmp_path / "truth").write_bytes(TRUTH[:5000])
    with pytest.raises(PitrError, match="truth: The dump is not complete"):
        run(TRUTH, compare_to="truth")


def test_a_crash_while_storing_leaves_no_index_of_another_dump(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(TRUTH, "truth", compression="none")
    rename = os.rename

    def stop(source: str, target: str) -> None:
        if target.endswith(dump.INDEX_SUFFIX):
            raise OSError(5, "stopped")
        rename(source, target)

    monkeypatch.setattr(os, "rename", stop)
    with pytest.raises(OSError, match="stopped"):
        run(OTHER, "truth", compression="none")
    monkeypatch.undo()
    assert names(tmp_path) == ["truth"]
    assert load_index(str(tmp_path / "truth")).fingerprint == index_of([OTHER]).fingerprint


def test_what_a_killed_run_has_left_is_removed(run: Run, tmp_path: Path) -> None:
    (tmp_path / ".truth.4194999.partial").touch()
    (tmp_path / f".truth.{os.getppid()}.partial").touch()
    (tmp_path / ".other.4194999.partial").touch()
    run(TRUTH, "truth")
    assert names(tmp_path) == [
        ".other.4194999.partial",
        f".truth.{os.getppid()}.partial",
        "truth",
        "truth.index.json",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "missing/dump"}, "does not exist"),
        ({"path": "folder"}, "is a directory"),
        ({"compare_to": "missing"}, "There is no dump"),
        ({"path": "truth", "compare_to": "folder/../truth"}, "is the dump to compare with"),
        ({"compression": "snappy"}, "snappy"),
        ({"max_differences": -1}, "max_differences"),
    ],
)
def test_what_cannot_work_is_refused_before_the_server_is_asked(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    run(TRUTH, "truth")
    (tmp_path / "folder").mkdir()
    asked = []
    monkeypatch.setattr(Login, "connect", lambda *_: asked.append(1))
    for check_mode in (False, True) if message != "does not exist" else (False,):
        with pytest.raises(PitrError, match=message):
            run(OTHER, check_mode=check_mode, **options)
    assert not asked and names(tmp_path) == ["folder", "truth", "truth.index.json"]
    assert load_index(str(tmp_path / "truth")).fingerprint == index_of([TRUTH]).fingerprint


def test_the_command_line_of_pg_dumpall() -> None:
    argv = ["/b/pg_dumpall", "--quote-all-identifiers", "--no-password", "--database=postgres"]
    assert dump.dumpall_argv("/b/pg_dumpall", "... --rows-per-insert ...", "postgres") == argv
    assert dump.dumpall_argv("/b/pg_dumpall", "--restrict-key=RESTRICT_KEY", "postgres") == [*argv, "--restrict-key=0"]


@pytest.mark.parametrize(
    ("name", "compared"),
    [
        ("work_mem", True),
        ("max_connections", True),
        ("listen_addresses", True),
        ("archive_timeout", True),
        ("hot_standby_feedback", True),
        ("wal_level", True),
        ("port", False),
        ("data_directory", False),
        ("unix_socket_directories", False),
        ("archive_mode", False),
        ("archive_command", False),
        ("restore_command", False),
        ("recovery_target_time", False),
        ("primary_conninfo", False),
        ("hot_standby", False),
    ],
)
def test_settings_that_are_compared(name: str, compared: bool) -> None:
    assert dumppreamble.is_compared(name) is compared


def test_a_rule_is_known_without_its_place_and_its_password() -> None:
    rule = {
        "rule_number": 3, "file_name": "/x/pg_hba.conf", "line_number": 9, "type": "host", "database": ["a", "b"],
        "user_name": ["all"], "address": "10.0.0.0", "netmask": "255.0.0.0", "auth_method": "ldap",
        "options": ["ldapbindpasswd=geheim"], "error": 'wrong "x" in /x/pg_hba.conf',
    }  # fmt: skip
    name, value = dumppreamble._file_rule(rule, ("type", "database", "user_name", "address", "auth_method"))
    assert name == "host a,b all 10.0.0.0 ldap"
    assert value["error"] is True and "/x/" not in str(value) and value["options"] == ["ldapbindpasswd=geheim"]
    assert not {"rule_number", "file_name", "line_number"} & set(value)
    assert dumppreamble._file_rule({**rule, "line_number": 10, "error": None}, ("type",))[1]["error"] is False
