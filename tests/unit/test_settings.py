# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The managed include file of a server's settings, and how it comes into force."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils import settings
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.plugins.module_utils.postgres import Login, parse_settings
from ansible_collections.pgdrill.pitr.plugins.module_utils.recovery_conf import INCLUDE_LINE
from hypothesis import given
from hypothesis import strategies as st

names = st.from_regex(r"[a-z][a-z0-9_]{0,20}", fullmatch=True)
values = st.one_of(
    st.text(st.characters(codec="utf-8", exclude_characters="\0\n"), max_size=20), st.integers(), st.booleans()
)


@given(st.dictionaries(names, values, max_size=6))
def test_rendered_settings_are_read_back_sorted(found: dict[str, Any]) -> None:
    text = settings.render(found, "Managed")
    words = {True: "on", False: "off"}
    expected = [(n, words[v] if isinstance(v, bool) else str(v)) for n, v in sorted(found.items())]
    assert parse_settings(text) == expected
    assert text.startswith("# Managed\n") and text.endswith("\n")


def test_booleans_and_numbers_are_not_confused() -> None:
    text = settings.render({"a": True, "b": False, "c": 1, "d": 0, "e": "1min"}, "x")
    assert text == "# x\na = 'on'\nb = 'off'\nc = '1'\nd = '0'\ne = '1min'\n"


@pytest.mark.parametrize("name", ["", "a b", "a=b", "a\nb", "a'b", "a#b", "include_dir 'x'", "a-b"])
def test_what_is_no_name_of_a_setting_is_refused(name: str) -> None:
    with pytest.raises(PitrError, match="is not the name of a setting"):
        settings.render({name: 1}, "x")


def test_value_with_a_line_break_is_refused() -> None:
    with pytest.raises(PitrError, match="line break"):
        settings.render({"archive_command": "a\nport = 1"}, "x")


def test_file_is_written_once_and_included(tmp_path: Path) -> None:
    (tmp_path / "postgresql.conf").write_text("port = 1\n")
    assert settings.write(str(tmp_path), "50-pitr.conf", "a = '1'\n", check=False) == (True, "")
    path = tmp_path / "conf.d" / "50-pitr.conf"
    assert path.read_text() == "a = '1'\n" and path.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "postgresql.conf").read_text() == f"port = 1\n{INCLUDE_LINE}"
    before = path.stat().st_ino
    assert settings.write(str(tmp_path), "50-pitr.conf", "a = '1'\n", check=False) == (False, "a = '1'\n")
    assert path.stat().st_ino == before
    assert settings.write(str(tmp_path), "50-pitr.conf", "a = '2'\n", check=False) == (True, "a = '1'\n")


def test_check_mode_says_the_same_and_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "postgresql.conf").write_text("port = 1\n")
    assert settings.write(str(tmp_path), "50-pitr.conf", "a = '1'\n", check=True) == (True, "")
    assert os.listdir(tmp_path) == ["postgresql.conf"] and (tmp_path / "postgresql.conf").read_text() == "port = 1\n"


def test_file_that_is_right_but_not_included_is_a_change(tmp_path: Path) -> None:
    (tmp_path / "postgresql.conf").write_text("port = 1\n")
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d" / "50-pitr.conf").write_text("a = '1'\n")
    assert settings.write(str(tmp_path), "50-pitr.conf", "a = '1'\n", check=True)[0] is True
    settings.write(str(tmp_path), "50-pitr.conf", "a = '1'\n", check=False)
    assert settings.write(str(tmp_path), "50-pitr.conf", "a = '1'\n", check=True)[0] is False


class Server:
    """Plays a server whose postmaster reads its files some questions after the signal, and then tells its sessions."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, delay: int = 3) -> None:
        self.delay = delay
        self.loaded = False
        self.wrong: list[tuple[Any, ...]] = []
        self.reloads = 0
        self.sessions = 0
        self.english = False
        monkeypatch.setattr(settings, "query", self.query)
        monkeypatch.setattr(Login, "connect", lambda _self: Session(self))

    def query(self, session: Session, sql: str, _parameters: object = None) -> list[tuple[Any, ...]]:
        self.english = self.english or sql == "SET lc_messages TO 'C'"
        if self.reloads:
            self.delay -= 1
        elif sql == "SELECT pg_reload_conf()":
            self.reloads = 1
        if self.reloads and self.delay <= 0:
            self.loaded = True
        if sql.startswith("SELECT sourcefile"):
            assert self.english, "the texts of errors are compared"
            return self.wrong
        if sql == "SELECT pg_conf_load_time()":
            return [(session.loaded_at,)]
        if "pending_restart" in sql:
            return [("max_connections",), ("wal_level",)] if self.loaded else []
        return [("",)]


class Session:
    """A session begins with its postmaster's configuration; when told, it reads the files a moment after it."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._began_after = server.loaded
        server.sessions += 1

    @property
    def loaded_at(self) -> int:
        if self._began_after:
            return 200
        return 201 if self._server.loaded else 100

    def close(self) -> None:
        pass


@pytest.mark.parametrize("delay", [0, 1, 2, 5, 20])
def test_reload_is_waited_for_and_not_longer(monkeypatch: pytest.MonkeyPatch, delay: int) -> None:
    """With no delay the asking session has read the files before it can look; it must have looked before the signal."""
    server = Server(monkeypatch, delay)
    assert settings.apply(Login(), reload=True) == ["max_connections", "wal_level"]
    assert server.sessions <= delay + 4


def test_without_reload_nothing_is_signalled(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(monkeypatch)
    server.loaded = True
    assert settings.apply(Login(), reload=False) == ["max_connections", "wal_level"]
    assert server.reloads == 0


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (("/data/conf.d/50-pitr.conf", 3, "work_mem", "invalid value"), "/data/conf.d/50-pitr.conf, line 3: work_mem"),
        (("/data/postgresql.conf", 7, None, "syntax error"), "/data/postgresql.conf, line 7:  syntax error"),
        ((None, None, None, "broken"), "The configuration:  broken"),
    ],
)
def test_file_that_the_server_cannot_read_is_named_and_not_loaded(
    monkeypatch: pytest.MonkeyPatch, row: tuple[Any, ...], said: str
) -> None:
    server = Server(monkeypatch)
    server.wrong = [row]
    with pytest.raises(PitrError, match="The server goes on with its old settings") as caught:
        settings.apply(Login(), reload=True)
    assert said in caught.value.message
    assert server.reloads == 0


@pytest.mark.parametrize("conf", ["port = 1\n", "port = 1\ninclude_dir = 'conf.d'\n", ""])
def test_removal_leaves_what_was_there_before(tmp_path: Path, conf: str) -> None:
    path = tmp_path / "postgresql.conf"
    path.write_text(conf)
    if "conf.d" in conf:
        (tmp_path / "conf.d").mkdir()
    settings.write(str(tmp_path), "50-pitr.conf", "a = '1'\n", False)
    assert settings.remove(str(tmp_path), "50-pitr.conf", True) == (True, "a = '1'\n")
    assert (tmp_path / "conf.d" / "50-pitr.conf").exists()
    assert settings.remove(str(tmp_path), "50-pitr.conf", False) == (True, "a = '1'\n")
    assert path.read_text() == conf and (tmp_path / "conf.d").exists() is ("conf.d" in conf)
    assert settings.remove(str(tmp_path), "50-pitr.conf", False) == (False, "")


def test_removal_leaves_the_include_directory_to_files_of_others(tmp_path: Path) -> None:
    (tmp_path / "postgresql.conf").write_text("port = 1\n")
    settings.write(str(tmp_path), "50-pitr.conf", "a = '1'\n", False)
    (tmp_path / "conf.d" / "10-mine.conf").write_text("work_mem = 8MB\n")
    settings.remove(str(tmp_path), "50-pitr.conf", False)
    assert (tmp_path / "conf.d" / "10-mine.conf").exists()
    assert "conf.d" in (tmp_path / "postgresql.conf").read_text()
