# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import yaml
from sandboxlib import config, layout
from sandboxlib.accounts import Account, myself
from sandboxlib.layout import Layout
from sandboxlib.say import SandboxError


@pytest.fixture
def sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Layout:
    monkeypatch.setattr(Layout, "socket_dir", lambda self, major: tmp_path / f"sockets-{major}")
    place = Layout.at(tmp_path / "checkout", tmp_path / "sandbox", myself(), is_elsewhere=False)
    (place.root / "run").mkdir(parents=True)
    return place


def locate(monkeypatch: pytest.MonkeyPatch, checkout: str, uid: int) -> Layout:
    monkeypatch.delenv("PGDRILL_SANDBOX", raising=False)
    monkeypatch.setattr(layout, "find_checkout", lambda: Path(checkout))
    monkeypatch.setattr(layout, "server_account", lambda: Account("someone", 4711, 4711, is_other=uid == 0))
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    return layout.locate()


def test_ordinary_user_has_the_sandbox_in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    assert locate(monkeypatch, "/home/someone/pitr", 4711).root == Path("/home/someone/pitr/.sandbox")


@pytest.mark.parametrize(
    ("checkout", "uid"), [("/root/pitr", 0), ("/home/someone/my pitr", 4711), ("/home/it's", 4711), ("/h" * 40, 4711)]
)
def test_root_and_odd_paths_have_it_elsewhere(monkeypatch: pytest.MonkeyPatch, checkout: str, uid: int) -> None:
    root = locate(monkeypatch, checkout, uid).root
    assert root.parent == Path("/var/tmp").resolve()
    assert root.name.startswith(f"pgdrill-{uid}-")


def test_socket_of_a_server_fits_into_107_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    place = locate(monkeypatch, "/home/someone/" + "deep/" * 30 + "pitr", 4294967294)
    assert len(str(place.socket_dir(18) / ".s.PGSQL.20000.lock")) <= 107


def test_sandbox_in_place_of_a_foreign_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").write_text("precious", encoding="ascii")
    with pytest.raises(SandboxError, match="in the way"):
        layout._point(tmp_path / "link", tmp_path)
    assert (tmp_path / "link").read_text(encoding="ascii") == "precious"


def port_base(sandbox: Layout) -> int:
    base = yaml.safe_load(sandbox.config.read_text(encoding="utf-8"))["port_base"]
    assert isinstance(base, int)
    return base


def test_ports_stay_until_somebody_takes_one(sandbox: Layout) -> None:
    config.write(sandbox, 18)
    base = port_base(sandbox)
    with socket.create_server(("127.0.0.1", base + 3)):
        config.write(sandbox, 18)
        assert port_base(sandbox) == base
        config.write(sandbox, 18, servers_are_down=True)
        assert port_base(sandbox) != base


def test_sandbox_yml_holds_a_password_and_is_for_its_owner_only(sandbox: Layout) -> None:
    config.write(sandbox, 18)
    assert sandbox.config.stat().st_mode & 0o777 == 0o600
    before = sandbox.config.read_text(encoding="utf-8")
    config.write(sandbox, 18)
    assert sandbox.config.read_text(encoding="utf-8") == before
