# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Quoting, configuration files, programs and processes of PostgreSQL."""

from __future__ import annotations

import os
import shlex
import subprocess
import time
from pathlib import Path

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.plugins.module_utils.postgres import (
    FLOORS,
    ControlData,
    Login,
    binary,
    binary_version,
    conf_literal,
    control_data,
    data_version,
    parse_settings,
    run,
    running_pid,
    shell_command,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

words = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
values = st.text(st.characters(codec="utf-8", exclude_characters="\0\n"), max_size=30)
names = st.from_regex(r"[a-z_][a-z0-9_]{0,20}(\.[a-z_][a-z0-9_]{0,10})?", fullmatch=True)


@settings(deadline=None, max_examples=60)
@given(st.lists(words, max_size=4))
@example(["a b", "it's", '"q"', "$HOME", "`id`", "%p", "100%", "%%", "\\", "*", "~", "", "-n", "ä\n;", "#x"])
def test_words_of_a_command_reach_the_program_unchanged(argv: list[str]) -> None:
    """The server turns %% into % and starts the rest with sh -c (BuildArchiveCommand, system)."""
    line = shell_command(["printf", "%s\\0", *argv]).replace("%%", "%")
    said = subprocess.run(["/bin/sh", "-c", line], capture_output=True, check=True).stdout.decode(
        "utf-8", "surrogateescape"
    )
    assert said.split("\0")[:-1] == (argv or [""])


@given(st.lists(words, min_size=1, max_size=4))
def test_command_holds_no_placeholder_but_those_that_were_asked_for(argv: list[str]) -> None:
    line = shell_command(argv, ["%f", "%p"])
    assert line.endswith(' "%f" "%p"')
    assert "%" not in line.removesuffix(' "%f" "%p"').replace("%%", "")


def test_placeholders_are_quoted_for_a_data_directory_with_spaces() -> None:
    line = shell_command(["echo", "100%"], ["%p"]).replace("%%", "%").replace("%p", "/data dir/pg_wal/x")
    assert shlex.split(line) == ["echo", "100%", "/data dir/pg_wal/x"]


@given(names, values)
def test_setting_round_trips_through_a_configuration_file(name: str, value: str) -> None:
    assert parse_settings(f"{name} = {conf_literal(value)}\n") == [(name, value)]


@given(st.dictionaries(names, values, max_size=5))
def test_file_of_settings_round_trips_with_comments_between(found: dict[str, str]) -> None:
    text = "".join(f"# {name} = 'old'\n\n  {name}={conf_literal(value)} # why\n" for name, value in found.items())
    assert dict(parse_settings(text)) == found


@given(values)
def test_literal_is_one_token_of_the_servers_lexer(value: str) -> None:
    """STRING of guc-file.l: \\'([^'\\\\\\n]|\\\\.|\\'\\')*\\' from end to end."""
    inner = conf_literal(value)[1:-1]
    at = 0
    while at < len(inner):
        assert inner[at] != "\n"
        at += 2 if inner[at] in "\\'" else 1
    assert at == len(inner)
    assert inner.replace("''", "").replace("\\\\", "").find("'") < 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("port = 5432", [("port", "5432")]),
        ("port 5432", [("port", "5432")]),
        ("port=5432", [("port", "5432")]),
        ("  Port\t= 5432 # comment", [("port", "5432")]),
        ("a = 'it''s'", [("a", "it's")]),
        ("a = 'it\\'s'", [("a", "it's")]),
        ("a = 'back\\\\slash'", [("a", "back\\slash")]),
        ("a = ''", [("a", "")]),
        ("a = '# no comment'", [("a", "# no comment")]),
        ("my.setting = on", [("my.setting", "on")]),
        ("# a = 1", []),
        ("", []),
        ("= 1", []),
        ("a = 1\na = 2", [("a", "1"), ("a", "2")]),
        ("a = 1\r\nb = '2'\r\n", [("a", "1"), ("b", "2")]),
        ("include 'other.conf'", [("include", "other.conf")]),
    ],
)
def test_assignments_are_read_as_the_server_reads_them(text: str, expected: list[tuple[str, str]]) -> None:
    assert parse_settings(text) == expected


@pytest.mark.parametrize("value", ["a\nb", "\n", "a\0b"])
def test_setting_with_a_line_break_is_refused(value: str) -> None:
    with pytest.raises(PitrError, match="cannot hold a line break"):
        conf_literal(value)


def test_numbers_are_literals_too() -> None:
    assert conf_literal(5) == "'5'"


def test_login_comes_from_options_with_defaults() -> None:
    assert Login.from_params({}) == Login("", 5432, "postgres", "", "", "postgres")
    params = {
        "login_host": "db",
        "login_port": "5433",
        "login_user": "u",
        "login_password": "p",
        "login_unix_socket": "/run",
        "login_db": "d",
    }
    assert Login.from_params(params) == Login("db", 5433, "u", "p", "/run", "d")
    assert str(Login("db", 5433, "u")) == "u@db:5433"
    assert str(Login(unix_socket="/run")) == "postgres@/run:5432"
    assert "secret" not in str(Login(password="secret"))


def test_environment_of_programs_has_nothing_of_the_callers_and_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGHOST", "production")
    monkeypatch.setenv("PGSERVICE", "production")
    monkeypatch.setenv("PGPASSWORD", "inherited")
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    with Login("db", 5433, "u", "se:cr\\et", db="d").environment() as environment:
        names = {name: value for name, value in environment.items() if name.startswith("PG")}
        passfile = names.pop("PGPASSFILE")
        assert names == {"PGHOST": "db", "PGPORT": "5433", "PGUSER": "u", "PGDATABASE": "d"}
        assert environment["LC_ALL"] == "C"
        assert os.stat(passfile).st_mode & 0o777 == 0o600
        assert Path(passfile).read_text() == "*:*:*:*:se\\:cr\\\\et\n"
        assert "se:cr" not in " ".join(environment.values())
    assert not os.path.exists(passfile)


def test_environment_without_password_keeps_the_callers_passfile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGPASSFILE", "/home/me/.pgpass")
    with Login(unix_socket="/run/postgresql").environment() as environment:
        assert environment["PGPASSFILE"] == "/home/me/.pgpass"
        assert environment["PGHOST"] == "/run/postgresql"


def program(folder: Path, name: str, script: str) -> str:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(PitrError, match="pg_ctl does not exist or cannot be executed"):
        binary(str(tmp_path), "pg_ctl")
    (tmp_path / "pg_ctl").write_text("")
    with pytest.raises(PitrError, match="cannot be executed"):
        binary(str(tmp_path), "pg_ctl")
    assert binary(str(tmp_path), os.path.basename(program(tmp_path, "initdb", ""))) == str(tmp_path / "initdb")


def test_program_that_fails_is_an_error_with_its_words(tmp_path: Path) -> None:
    with pytest.raises(PitrError, match="failing failed with exit code 3: no luck") as caught:
        run([program(tmp_path, "failing", "echo output; echo no luck >&2; exit 3")])
    assert caught.value.detail == {"rc": 3}
    with pytest.raises(PitrError, match="only output"):
        run([program(tmp_path, "failing", "echo only output; exit 1")])


def test_program_killed_by_a_signal_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PitrError, match="exit code -9"):
        run([program(tmp_path, "killed", "kill -9 $$")])


def test_program_that_takes_too_long_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PitrError, match=r"did not end within 0\.2 seconds"):
        run([program(tmp_path, "slow", "exec sleep 30")], timeout=0.2)


def test_program_that_cannot_be_started_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PitrError, match="could not be started"):
        run([str(tmp_path / "none")])


def test_output_is_returned_and_messages_are_english(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    assert run([program(tmp_path, "say", "echo $LC_ALL; cat")]) == "C\n"


@pytest.mark.parametrize(
    ("said", "version"),
    [
        ("postgres (PostgreSQL) 18.6", 18),
        ("postgres (PostgreSQL) 17.5 (Debian 17.5-1.pgdg120+1)", 17),
        ("postgres (PostgreSQL) 19devel", 19),
        ("postgres (PostgreSQL) 15beta2", 15),
    ],
)
def test_major_version_is_read(tmp_path: Path, said: str, version: int) -> None:
    program(tmp_path, "postgres", f"echo '{said}'")
    assert binary_version(str(tmp_path)) == version


def test_version_that_is_not_told_is_an_error(tmp_path: Path) -> None:
    program(tmp_path, "postgres", "echo hello")
    with pytest.raises(PitrError, match="does not tell its version: hello"):
        binary_version(str(tmp_path))


CONTROL = """\
pg_control version number:            1800
Database system identifier:           7300000000000000001
Database cluster state:               in production
Latest checkpoint location:           0/3000060
Latest checkpoint's TimeLineID:       2
max_connections setting:              120
max_worker_processes setting:         8
max_wal_senders setting:              10
max_prepared_xacts setting:           0
max_locks_per_xact setting:           64
Bytes per WAL segment:                1048576
Time of latest checkpoint:            Sun Mar  1 12:00:00 2026
"""


def test_control_data_is_read_by_label(tmp_path: Path) -> None:
    (tmp_path / "output").write_text(CONTROL)
    program(tmp_path, "pg_controldata", f"[ \"$1 $2\" = '-D /data' ] && cat {shlex.quote(str(tmp_path / 'output'))}")
    data = control_data(str(tmp_path), "/data")
    assert data.system_identifier == "7300000000000000001"
    assert (data.state, data.timeline, data.wal_segment_size) == ("in production", 2, 1048576)
    assert data.checkpoint_lsn == 0x3000060
    assert data.text("Time of latest checkpoint") == "Sun Mar  1 12:00:00 2026"
    assert data.floors == {
        "max_connections": 120,
        "max_worker_processes": 8,
        "max_wal_senders": 10,
        "max_prepared_transactions": 0,
        "max_locks_per_transaction": 64,
    }
    assert set(data.floors) == set(FLOORS)


def test_damaged_control_file_is_an_error(tmp_path: Path) -> None:
    program(tmp_path, "pg_controldata", "echo 'WARNING: Calculated CRC checksum does not match value stored in file.'")
    with pytest.raises(PitrError, match="/data/global/pg_control is damaged"):
        control_data(str(tmp_path), "/data")


def test_label_that_is_not_there_is_an_error() -> None:
    with pytest.raises(PitrError, match="shows no 'Database system identifier'"):
        str(ControlData({}).system_identifier)


def test_version_of_a_data_directory(tmp_path: Path) -> None:
    assert data_version(str(tmp_path)) is None
    (tmp_path / "PG_VERSION").write_text("18\n")
    assert data_version(str(tmp_path)) == 18
    (tmp_path / "PG_VERSION").write_text("eighteen\n")
    with pytest.raises(PitrError, match="PG_VERSION cannot be read"):
        data_version(str(tmp_path))


def pid_file(folder: Path, first_line: object) -> str:
    (folder / "postmaster.pid").write_text(f"{first_line}\n{folder}\n1772366400\n5432\n")
    return str(folder)


def test_server_runs_while_its_process_exists(tmp_path: Path) -> None:
    assert running_pid(str(tmp_path)) is None
    assert running_pid(pid_file(tmp_path, os.getpid())) == os.getpid()
    assert running_pid(pid_file(tmp_path, -os.getpid())) == os.getpid()


def test_server_of_another_user_runs_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(_pid: int, _signal: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", kill)
    assert running_pid(pid_file(tmp_path, os.getpid())) == os.getpid()


def test_server_that_has_ended_does_not_run(tmp_path: Path) -> None:
    process = subprocess.Popen(["/bin/true"])
    process.wait()
    assert running_pid(pid_file(tmp_path, process.pid)) is None
    assert running_pid(pid_file(tmp_path, 0)) is None


def test_zombie_is_no_server(tmp_path: Path) -> None:
    process = subprocess.Popen(["/bin/true"])
    deadline = time.monotonic() + 10
    while running_pid(pid_file(tmp_path, process.pid)) is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert running_pid(str(tmp_path)) is None
    process.wait()


def test_data_directory_that_is_a_file_runs_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert running_pid(str(tmp_path / "file")) is None
