# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Ordinary users stay out of a restored cluster until it is accepted, and nothing of that stays afterwards.

Real logins with a password, over TCP and over the socket.
"""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils import keep_out, settings
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.plugins.module_utils.plan import RefusedError
from ansible_collections.pgdrill.pitr.plugins.module_utils.postgres import Login
from ansible_collections.pgdrill.pitr.plugins.module_utils.restore import Restore as Engine
from ansible_collections.pgdrill.pitr.plugins.module_utils.restore import undo
from ansible_collections.pgdrill.pitr.tests.integration.support import Restored, Sandbox, Server, fingerprint

Restore = Callable[..., Restored]
PASSWORD = "not a secret"
# Unlike the template's: the superuser over the socket, everybody else with a password.
HBA = """# The cluster's own rules.
local  all  postgres                        trust
local  all  all                             scram-sha-256
local  replication  postgres                trust
@INCLUDE@host   all  all  127.0.0.1/32      scram-sha-256
"""


class Guarded:
    """A stopped primary with two ordinary roles and rules of its own, and where its servers listen."""

    def __init__(self, sandbox: Sandbox, major: int) -> None:
        self.sandbox = sandbox
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        sandbox.configure({"listen_addresses": "127.0.0.1"})
        for role in ("app", "auditor"):
            sandbox.server.sql(f"CREATE ROLE {role} LOGIN PASSWORD '{PASSWORD}'")
        # Relative to the file it is in: such a rule must work again afterwards.
        include = "include more_rules.conf\n" if major >= 16 else ""
        data = sandbox.server.data
        (data / "more_rules.conf").write_text("host all nobody 127.0.0.1/32 reject\n", encoding="utf-8")
        self.hba = HBA.replace("@INCLUDE@", include)
        (data / "pg_hba.conf").write_text(self.hba, encoding="utf-8")
        sandbox.backup("only")
        self.commit = sandbox.commit("target")
        sandbox.commit("later")
        sandbox.probe()
        sandbox.server.stop()

    def start(self, cluster: Restored | Server) -> Server:
        server = cluster if isinstance(cluster, Server) else cluster.server
        server.PORT = self.port
        if isinstance(cluster, Restored):
            cluster.recovery = type(cluster.recovery)(
                server.login, str(server.data), server.bin_dir, cluster.request.config_dir, str(server.log)
            )
            cluster.run()
        else:
            server.start()
        return server

    def logins(self, server: Server, role: str = "app") -> dict[str, Login]:
        common = {"port": self.port, "user": role, "password": PASSWORD}
        return {
            "tcp": Login(host="127.0.0.1", **common),  # type: ignore[arg-type]
            "socket": Login(unix_socket=server.socket, **common),  # type: ignore[arg-type]
        }

    def come_in(self, server: Server, role: str = "app") -> set[str]:
        """By which ways this ordinary role comes in."""
        found = set()
        for way, login in self.logins(server, role).items():
            try:
                login.connect().close()
                found.add(way)
            except PitrError as error:
                assert "pg_hba.conf rejects connection" in error.message
        return found


@pytest.fixture
def guarded(sandbox: Callable[..., Sandbox], major: int) -> Guarded:
    return Guarded(sandbox(), major)


BOTH = {"tcp", "socket"}
PAUSE = {"recovery_target_action": "pause"}


def target(guarded: Guarded) -> dict[str, Any]:
    return {"recovery_target_xid": str(guarded.commit.xid)}


def test_ordinary_users_come_in_when_the_cluster_is_accepted_and_not_before(
    guarded: Guarded, restored: Restore
) -> None:
    cluster = restored(guarded.sandbox, {**target(guarded), **PAUSE})
    server = guarded.start(cluster)
    hba = server.data / "pg_hba.conf"
    assert guarded.come_in(server) == set()
    # The superuser looks at it meanwhile, and so do the modules.
    assert server.phase == "target"
    with pytest.raises(PitrError, match="pg_hba"):
        server.login.connect(replication=True)
    # Promoting lets nobody in, and neither does a reload or a restart.
    cluster.recovery.promote(60)
    server.sql("SELECT pg_reload_conf()")
    assert guarded.come_in(server) == set()
    server.restart()
    assert guarded.come_in(server) == set()
    changed, pending = cluster.recovery.accept()
    # It was restored without archiving; that alone waits for a restart, and the rules do not.
    assert changed and pending == ["archive_mode"]
    assert guarded.come_in(server) == BOTH
    assert hba.read_text(encoding="utf-8") == guarded.hba
    assert server.sql("SELECT error FROM pg_hba_file_rules WHERE error IS NOT NULL") == []
    assert not list(server.data.glob("*pitr-kept*"))
    assert server.show("hba_file") == str(hba)
    server.login.connect(replication=True).close()
    server.restart()
    assert guarded.come_in(server) == BOTH


def test_named_roles_may_look_too(guarded: Guarded, restored: Restore) -> None:
    line = "host postgres auditor 127.0.0.1/32 scram-sha-256"
    server = guarded.start(restored(guarded.sandbox, {**target(guarded), **PAUSE}, inspect_hba=(line,)))
    assert guarded.come_in(server, "auditor") == {"tcp"}
    assert guarded.come_in(server, "app") == set()


def test_without_keeping_out_everybody_comes_in_at_once(guarded: Guarded, restored: Restore) -> None:
    server = guarded.start(restored(guarded.sandbox, {**target(guarded), **PAUSE}, keep_out=False))
    assert guarded.come_in(server) == BOTH
    assert (server.data / "pg_hba.conf").read_text(encoding="utf-8") == guarded.hba


@pytest.mark.parametrize("killed", ["before the files", "between the files", "before the reload"])
def test_acceptance_that_was_killed_is_repeated(
    guarded: Guarded, restored: Restore, monkeypatch: pytest.MonkeyPatch, killed: str
) -> None:
    cluster = restored(guarded.sandbox, target(guarded))
    server = guarded.start(cluster)

    class Killed(BaseException):
        pass

    def die(*_arguments: Any, **_more: Any) -> Any:
        raise Killed

    where = {
        "before the files": ("recovery.keep_out.let_in", die),
        "between the files": ("recovery_conf.finish", die),
        "before the reload": ("settings.apply", die),
    }[killed]
    with monkeypatch.context() as patch:
        patch.setattr(f"ansible_collections.pgdrill.pitr.plugins.module_utils.{where[0]}", where[1])
        with pytest.raises(Killed):
            cluster.recovery.accept()
    assert guarded.come_in(server) == set()
    assert cluster.recovery.accept()[0]
    assert guarded.come_in(server) == BOTH
    assert (
        server.sql(
            "SELECT name FROM pg_settings WHERE sourcefile LIKE '%%99-pitr%%' AND context <> 'postmaster'",
        )
        == []
    )
    assert cluster.recovery.accept() == (False, [])


def test_rules_that_the_server_cannot_read_are_named_and_nobody_comes_in(guarded: Guarded, restored: Restore) -> None:
    cluster = restored(guarded.sandbox, target(guarded))
    server = guarded.start(cluster)
    kept = server.data / "pg_hba.conf.pitr-kept"
    kept.write_text(guarded.hba + "host all all nonsense\n", encoding="utf-8")
    with pytest.raises(PitrError, match="The cluster is not accepted, and ordinary users are still out"):
        cluster.recovery.accept()
    assert guarded.come_in(server) == set() and cluster.recovery.planned()
    (server.data / "pg_hba.conf").write_text(guarded.hba, encoding="utf-8")
    assert cluster.recovery.accept()[0]
    assert guarded.come_in(server) == BOTH


def test_signal_file_that_is_left_is_named(guarded: Guarded, restored: Restore) -> None:
    cluster = restored(guarded.sandbox, target(guarded))
    server = guarded.start(cluster)
    (server.data / "standby.signal").touch()
    with pytest.raises(PitrError, match=r"not rid of its recovery: standby\.signal"):
        cluster.recovery.accept()


def test_rules_that_were_replaced_during_the_recovery_are_noticed_and_kept(guarded: Guarded, restored: Restore) -> None:
    cluster = restored(guarded.sandbox, {**target(guarded), **PAUSE})
    server = guarded.start(cluster)
    replaced = guarded.hba + "# Written by somebody else.\n"
    (server.data / "pg_hba.conf").write_text(replaced, encoding="utf-8")
    with pytest.raises(PitrError, match=r"Ordinary users are not kept out .* was replaced since"):
        cluster.wait()
    cluster.recovery.promote(60)
    cluster.recovery.accept()
    assert (server.data / "pg_hba.conf").read_text(encoding="utf-8") == replaced
    assert guarded.come_in(server) == BOTH


def test_another_file_on_the_command_line_is_noticed(guarded: Guarded, restored: Restore, tmp_path: Path) -> None:
    cluster = restored(guarded.sandbox, target(guarded))
    other = tmp_path / "other_hba.conf"
    other.write_text("local all all trust\n", encoding="utf-8")
    cluster.server.start(wait=False, options=f"-c hba_file={other}")
    with pytest.raises(PitrError, match="Ordinary users are not kept out"):
        cluster.wait()


def test_task_that_is_not_let_in_says_so_at_once(guarded: Guarded, restored: Restore) -> None:
    cluster = restored(guarded.sandbox, {**target(guarded), **PAUSE})
    server = guarded.start(cluster)
    outside = type(cluster.recovery)(
        guarded.logins(server)["tcp"], str(server.data), server.bin_dir, "", str(server.log)
    )
    with pytest.raises(PitrError, match="does not let this task in"):
        outside.wait(60)


# --- a pg_hba.conf outside the data directory, as Debian has it


def external(data: Path, config: Path) -> None:
    """Configuration with a ``hba_file`` of its own, elsewhere."""
    (config / "conf.d").mkdir(parents=True)
    for name in ("postgresql.conf", "pg_hba.conf", "pg_ident.conf", "more_rules.conf"):
        shutil.copyfile(data / name, config / name)
    shutil.copyfile(data / "conf.d" / "50-tests.conf", config / "conf.d" / "50-tests.conf")
    with open(config / "postgresql.conf", "a", encoding="utf-8") as stream:
        stream.write(f"data_directory = '{data}'\nhba_file = '{config}/pg_hba.conf'\n")
        stream.write(f"ident_file = '{config}/pg_ident.conf'\n")


def test_own_hba_file_elsewhere_is_back_after_acceptance_undo_and_failure(
    guarded: Guarded, restored: Restore, server: Callable[[Path], Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = guarded.sandbox.server.data
    config = data.parent / "config"
    external(data, config)
    settings.write(str(config), "50-tests.conf", "listen_addresses = '127.0.0.1'\n", check=False)
    before = fingerprint(config / "pg_hba.conf")
    options = {"data": data, "force": True, "config_dir": str(config)}
    # A restore that fails at its last step.
    engine = Engine(guarded.sandbox.request(data, target(guarded), force=True, config_dir=str(config)))
    plan = engine.plan()
    tree = fingerprint(data, config)

    def fail(*_arguments: Any) -> None:
        raise PitrError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_check_effective", fail)
        with pytest.raises(PitrError, match="no room"):
            engine.execute(plan)
    assert fingerprint(data, config) == tree
    # One that is undone.
    cluster = restored(guarded.sandbox, target(guarded), **options)
    guarded.start(cluster)
    assert guarded.come_in(cluster.server) == set()
    assert fingerprint(config / "pg_hba.conf") != before
    cluster.server.stop()
    undo(cluster.request, cluster.result.moved_aside)
    assert fingerprint(config / "pg_hba.conf") == before and not list(config.glob("*kept*"))
    old = server(data)
    old.config = config
    guarded.start(old)
    assert guarded.come_in(old) == BOTH
    old.stop()
    # One in place of another that nobody has accepted: what is kept is still the cluster's own.
    first = restored(guarded.sandbox, target(guarded), **options)
    again = restored(guarded.sandbox, target(guarded), **options, keep_unaccepted=False)
    assert first.result.moved_aside and not again.result.moved_aside
    (kept,) = config.glob("*kept*")
    assert kept.read_text(encoding="utf-8") == guarded.hba
    guarded.start(again)
    again.recovery.accept()
    assert guarded.come_in(again.server) == BOTH
    assert fingerprint(config / "pg_hba.conf") == before and not list(config.glob("*kept*"))
    assert again.server.show("hba_file") == str(config / "pg_hba.conf")


def test_hba_file_that_may_be_somebody_elses_is_refused_and_nothing_is_touched(
    guarded: Guarded, restored: Restore, tmp_path: Path
) -> None:
    data = guarded.sandbox.server.data
    shared = tmp_path / "shared_hba.conf"
    shared.write_text("local all all trust\n", encoding="utf-8")
    with open(data / "postgresql.auto.conf", "a", encoding="utf-8") as stream:
        stream.write(f"hba_file = '{shared}'\n")
    before = fingerprint(data, shared)
    with pytest.raises(RefusedError) as caught:
        guarded.sandbox.plan(data, target(guarded), force=True)
    assert [refusal.code for refusal in caught.value.refusals] == ["keep_out"]
    assert "restore_keep_out: false" in caught.value.message
    assert fingerprint(data, shared) == before
    assert guarded.sandbox.plan(data, target(guarded), force=True, keep_out=False)


def test_line_that_is_none_is_refused(guarded: Guarded, tmp_path: Path) -> None:
    with pytest.raises(RefusedError) as caught:
        guarded.sandbox.plan(tmp_path / "none", target(guarded), inspect_hba=("auditor may look",))
    assert [refusal.code for refusal in caught.value.refusals] == ["keep_out"]


@pytest.mark.parametrize(
    ("own", "method"),
    [
        ("local all all trust\n", "trust"),
        ("# local all postgres trust\nlocal all postgres peer map=a # who\nlocal all all md5\n", "peer map=a"),
        ('local "all" all md5\nlocal all "postgres" scram-sha-256\n', "scram-sha-256"),
        ("local postgres,app postgres,app md5\n", "md5"),
        ("local all \\\n  postgres \\\n  md5\n", "md5"),
        ("local replication all trust\nhost all all all trust\nlocal all other trust\n", "peer"),
        ("local all +postgres trust\n", "peer"),
        ("local all postgres reject\nlocal all all trust\n", "peer"),
        ("", "peer"),
    ],
)  # fmt: skip
def test_superuser_proves_who_he_is_as_he_always_does(own: str, method: str) -> None:
    assert keep_out.socket_method(own, "postgres") == method
