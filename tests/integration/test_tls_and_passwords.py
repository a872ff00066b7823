# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Certificates and passwords come, and are exchanged, while the receiver receives and a backup is taken."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.plugins.module_utils.postgres import Login
from ansible_collections.pgdrill.pitr.plugins.module_utils.receiver import (
    LOCK_FILE,
    STREAM_LOCK_FILE,
    holders,
    lock_path,
)
from ansible_collections.pgdrill.pitr.plugins.module_utils.repository import ClusterFolder
from ansible_collections.pgdrill.pitr.tests.integration.support import until
from ansible_collections.pgdrill.pitr.tests.integration.test_playbooks import Site, _changed
from ansible_collections.pgdrill.pitr.tests.integration.topology import Topology
from ansible_collections.pgdrill.pitr.tests.unit.support import Authority

# The newest of those that are fetched with OpenSSL in it.
pytestmark = pytest.mark.once(17)
RECEIVED_BY = "SELECT pid FROM pg_stat_replication WHERE application_name = 'pitr_main' AND state = 'streaming'"
ROLES = {"receiver_state": "started"}


@pytest.fixture
def fresh(bin_dir: str, major: int, tmp_path: Path) -> Iterator[Site]:
    """A sandbox with a receiver; it ends with the test."""
    site = Site(bin_dir, major, tmp_path)
    try:
        site.succeed("site", **ROLES)
        yield site
    finally:
        for name in (LOCK_FILE, STREAM_LOCK_FILE):
            with contextlib.suppress(Exception):
                for pid in holders(lock_path(ClusterFolder.open(str(site.repository), "main"), name)):
                    os.kill(pid, signal.SIGKILL)
        site.close()


@pytest.fixture
def _tls(bin_dir: str) -> None:
    said = subprocess.run(
        [f"{bin_dir}/psql", "sslmode=require host=127.0.0.1 port=1"], capture_output=True, text=True, check=False
    )
    if "not compiled in" in said.stderr:
        pytest.skip("this PostgreSQL is built without OpenSSL")


def served(site: Site) -> str:
    """The certificate that the server shows."""
    argv = ["openssl", "s_client", "-starttls", "postgres", "-connect", f"127.0.0.1:{site.port}"]
    shown = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False).stdout
    return shown[shown.index("-----BEGIN") : shown.index("-----END")]


def content(path: Path) -> str:
    text = path.read_text(encoding="ascii")
    return text[text.index("-----BEGIN") : text.index("-----END")]


@pytest.mark.usefixtures("_tls")
def test_certificates_come_and_are_exchanged_without_an_outage(fresh: Site, tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca")
    certificate, key = authority.issue(tmp_path, "server")
    server = fresh.identity
    tls = {
        **ROLES,
        "primary_ssl_cert_file": str(certificate),
        "primary_ssl_key_file": str(key),
        "pitr_sslrootcert": str(authority.certificate),
    }
    fresh.succeed("site", **tls)
    assert fresh.identity == server and served(fresh) == content(certificate)
    rules = "SELECT DISTINCT type FROM pg_hba_file_rules WHERE 'pitr_backup' = ANY (user_name)"
    assert fresh.server.sql(rules) == [("hostssl",)]
    until(lambda: fresh.server.sql(RECEIVED_BY), "the receiver")
    receiver = fresh.server.sql(RECEIVED_BY)
    assert fresh.server.sql(f"SELECT ssl FROM pg_stat_ssl WHERE pid IN ({RECEIVED_BY})") == [(True,)]
    fresh.succeed("backup", **tls)

    # Another one of the same authority, moved into place.
    for path in authority.issue(tmp_path, "next"):
        path.rename(tmp_path / path.name.replace("next", "server"))
    assert served(fresh) != content(certificate)
    assert _changed(fresh.succeed("site", **tls))["primary"] == 1
    assert served(fresh) == content(certificate)
    assert (fresh.identity, fresh.server.sql(RECEIVED_BY)) == (server, receiver)
    assert set(_changed(fresh.succeed("site", **tls)).values()) == {0}

    # A pair that does not fit is refused while the old one still serves.
    good, kept = key.read_bytes(), content(certificate)
    _certificate, wrong = authority.issue(tmp_path, "wrong")
    key.write_bytes(wrong.read_bytes())
    assert "could not use the certificate" in " ".join(fresh.fail("site", **tls).split())
    assert (fresh.identity, served(fresh)) == (server, kept)
    key.write_bytes(good)

    # Whoever has a certificate of somebody else is not talked to.
    for path in Authority(tmp_path / "foreign").issue(tmp_path, "foreign"):
        path.rename(tmp_path / path.name.replace("foreign", "server"))
    assert "certificate verify failed" in fresh.fail("site", **tls, backup_when="always")


@pytest.mark.usefixtures("_tls")
def test_standby_streams_encrypted_and_from_nobody_else(bin_dir: str, major: int, tmp_path: Path) -> None:
    hosts = Topology(bin_dir, major, tmp_path)
    try:
        hosts.succeed("site")
        authority = Authority(tmp_path / "ca")
        certificate, key = authority.issue(tmp_path, "server")
        tls = {
            "primary_ssl_cert_file": str(certificate),
            "primary_ssl_key_file": str(key),
            "pitr_sslrootcert": str(authority.certificate),
        }
        starts = [hosts[name].value("SELECT pg_postmaster_start_time()") for name in ("db1", "db2")]
        hosts.succeed("site", **tls)
        encrypted = "SELECT ssl FROM pg_stat_ssl JOIN pg_stat_replication USING (pid) WHERE application_name = 'db2'"
        until(lambda: hosts["db1"].sql(encrypted) == [(True,)], "the standby, encrypted")
        assert "sslmode='verify-full'" in hosts["db2"].show("primary_conninfo")
        # It will speak TLS as the primary, too.
        assert hosts["db2"].show("ssl_cert_file") == str(certificate)
        # The rule that let it in without TLS is gone, on both.
        rules = "SELECT DISTINCT type FROM pg_hba_file_rules WHERE 'pitr_standby' = ANY (user_name)"
        assert [hosts[name].sql(rules) for name in ("db1", "db2")] == [[("hostssl",)], [("hostssl",)]]
        assert [hosts[name].value("SELECT pg_postmaster_start_time()") for name in ("db1", "db2")] == starts
        assert set(_changed(hosts.succeed("site", **tls)).values()) == {0}

        for path in Authority(tmp_path / "foreign").issue(tmp_path, "foreign"):
            path.rename(tmp_path / path.name.replace("foreign", "server"))
        hosts["db1"].sql("SELECT pg_reload_conf()")
        until(lambda: "certificate verify failed" in hosts.fail("standby", **tls), "the refusal")
    finally:
        hosts.close()


def test_password_is_exchanged_while_receiver_and_backup_go_on_and_is_in_no_log(fresh: Site) -> None:
    assert "only one is given" in fresh.fail("site", **ROLES, primary_ssl_cert_file="server.crt")
    new = "an other: pass\\word"
    old = Login(host="127.0.0.1", port=fresh.port, user="pitr_backup", password="not a secret")
    old.connect().close()
    fresh.server.sql("ALTER SYSTEM SET log_statement = 'all'")
    fresh.server.sql("ALTER SYSTEM SET log_min_duration_statement = 0")
    fresh.server.sql("SELECT pg_reload_conf()")
    until(lambda: fresh.server.sql(RECEIVED_BY), "the receiver")
    server, receiver = fresh.identity, fresh.server.sql(RECEIVED_BY)
    taken: list[str] = []
    slow = {"backup_max_rate": "600k", "backup_compression": "none"}
    backup = threading.Thread(target=lambda: taken.append(fresh.succeed("backup", **slow)))
    backup.start()
    copying = "SELECT 1 FROM pg_stat_progress_basebackup WHERE phase = 'streaming database files'"
    until(lambda: fresh.server.sql(copying), "the backup")
    output = fresh.succeed("site", **ROLES, pitr_backup_password=new)
    assert fresh.server.sql(copying), "the backup was over before the password changed"
    backup.join()
    assert taken, "the backup failed"
    assert (fresh.identity, fresh.server.sql(RECEIVED_BY)) == (server, receiver)
    with pytest.raises(PitrError, match="password authentication failed"):
        old.connect()
    assert set(_changed(fresh.succeed("site", **ROLES, pitr_backup_password=new)).values()) == {0}
    # The next connections are made with the new one.
    fresh.server.sql("SELECT pg_terminate_backend(%s)", receiver[0][0])
    until(lambda: fresh.server.sql(RECEIVED_BY) not in ([], receiver), "the receiver with the new password")
    fresh.succeed("backup", pitr_backup_password=new)
    assert "pitr_backup" in fresh.server.log_text()
    for text in (fresh.server.log_text(), output):
        assert "pass\\word" not in text and "pass\\\\word" not in text
