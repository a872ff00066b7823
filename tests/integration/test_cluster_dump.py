# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""cluster_dump on real servers: a truth, and copies of its directory in which one thing is different."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils.dump import Request, Result, load_index, perform, take
from ansible_collections.pgdrill.pitr.plugins.module_utils.dumpparse import Indexer
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.plugins.module_utils.postgres import Login
from ansible_collections.pgdrill.pitr.plugins.module_utils.recovery_conf import FILE, INCLUDE_DIR
from ansible_collections.pgdrill.pitr.tests.integration.support import Server, until

SCHEMA = """
CREATE ROLE app LOGIN PASSWORD 'first secret';
ALTER ROLE app SET work_mem = '8MB';
CREATE ROLE boss LOGIN SUPERUSER PASSWORD 'very: \\secret';
CREATE DATABASE gone;
CREATE DATABASE shop;
ALTER DATABASE shop SET work_mem = '9MB';
CREATE TABLESPACE fast LOCATION '';
\\connect shop
CREATE TABLE item (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, v text, seen timestamptz, raw bytea, x float8);
INSERT INTO item (v, seen, raw, x)
  SELECT 'row ' || i, '2026-01-01 00:00+00'::timestamptz + i * interval '1 min', sha256(i::text::bytea), i / 3.0
    FROM generate_series(1, 1000) i;
CREATE INDEX item_v ON item (v);
CREATE UNLOGGED TABLE cache (id serial, v text);
INSERT INTO cache (v) VALUES ('a'), ('b');
CREATE TABLE empty (i int);
CREATE SEQUENCE up INCREMENT BY 5;
SELECT nextval('up') FROM generate_series(1, 3);
CREATE SEQUENCE down INCREMENT BY -3 MAXVALUE 1000 START 900;
SELECT nextval('down') FROM generate_series(1, 3);
CREATE SEQUENCE fresh;
CREATE FUNCTION look_alike() RETURNS text LANGUAGE sql AS $f$SELECT ';
--
-- Name: up; Type: SEQUENCE SET; Schema: public; Owner: postgres
--

SELECT pg_catalog.setval(''"public"."up"'', 11, true);
'$f$;
SELECT lo_from_bytea(4242, '\\x00112233');
"""

SETTINGS = (
    "listen_addresses = ''",
    "fsync = off",
    "autovacuum = off",
    "shared_buffers = 16MB",
    "min_wal_size = 2MB",
    "allow_in_place_tablespaces = on",
)

HBA = """
local all boss scram-sha-256
local all all trust
"""


class Cluster(Server):
    """A server that can be dumped. Where it lives is written in its files, too: that must not count."""

    def __init__(self, bin_dir: str, folder: Path, template: Path) -> None:
        folder.mkdir(exist_ok=True)
        super().__init__(bin_dir, folder / "data")
        shutil.copytree(template, self.data, symlinks=True)
        self.configure(f"unix_socket_directories = '{self.socket}'")

    def configure(self, *lines: str) -> None:
        with open(self.data / "postgresql.conf", "a", encoding="utf-8") as stream:
            stream.writelines(f"{line}\n" for line in lines)

    def psql(self, script: str, db: str = "shop") -> str:
        argv = [os.path.join(self.bin_dir, "psql"), "-X", "-q", "-t", "-A", "-v", "ON_ERROR_STOP=1"]
        argv += ["-h", self.socket, "-p", str(self.PORT), "-U", "postgres", "-d", db]
        result = subprocess.run(argv, input=script, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    def dump(self, **options: Any) -> Result:
        return perform(Request(**{"login": self.login, "bin_dir": self.bin_dir, **options}))


@pytest.fixture(scope="module")
def stopped(bin_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """The directory of a stopped cluster, and the path of its dump: the truth."""
    folder = tmp_path_factory.mktemp("truth")
    # The shared template has no databases but postgres.
    arguments = ["-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "-N", "-k", "--wal-segsize=1"]
    initdb = [os.path.join(bin_dir, "initdb"), "-D", str(folder / "initdb"), *arguments]
    subprocess.run(initdb, check=True, stdout=subprocess.DEVNULL)
    cluster = Cluster(bin_dir, folder, folder / "initdb")
    try:
        (cluster.data / "pg_hba.conf").write_text(HBA, encoding="utf-8")
        cluster.configure(*SETTINGS)
        cluster.start()
        cluster.psql(SCHEMA, "postgres")
        truth = str(folder / "truth")
        cluster.dump(path=truth)
        cluster.stop()
        yield cluster.data, truth
    finally:
        cluster.close()


@pytest.fixture
def truth(stopped: tuple[Path, str]) -> str:
    return stopped[1]


@pytest.fixture
def copy(bin_dir: str, stopped: tuple[Path, str], tmp_path: Path) -> Iterator[Cluster]:
    """A copy of the cluster that is not started yet."""
    cluster = Cluster(bin_dir, tmp_path / "copy", stopped[0])
    yield cluster
    cluster.close()


@pytest.fixture
def restored(copy: Cluster) -> Cluster:
    """A running copy of the cluster."""
    copy.start()
    return copy


@pytest.fixture(scope="module")
def living(bin_dir: str, stopped: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A running copy that many tests change, each with a truth of its own."""
    cluster = Cluster(bin_dir, tmp_path_factory.mktemp("living"), stopped[0])
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()


def told(result: Result) -> list[tuple[str, str, str]]:
    assert result.compared is not None
    return [(item.database, item.kind, item.object) for item in result.compared.differences]


def explained(result: Result) -> dict[str, tuple[str, str]]:
    assert result.compared is not None
    return {item.object: (item.truth, item.restored) for item in result.compared.comparison.explained}


def test_a_copy_of_the_cluster_is_identical(restored: Cluster, truth: str) -> None:
    result = restored.dump(compare_to=truth)
    assert told(result) == [] and explained(result) == {}
    assert result.index.fingerprint == load_index(truth).fingerprint
    assert result.index.databases == ["template1", "gone", "postgres", "shop"]
    assert not result.changed


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        ("UPDATE item SET v = 'Row 500' WHERE id = 500", ("shop", "changed", "TABLE DATA public.item")),
        ("UPDATE item SET x = x + 1e-9 WHERE id = 1", ("shop", "changed", "TABLE DATA public.item")),
        ("DELETE FROM item WHERE id = 1000", ("shop", "changed", "TABLE DATA public.item")),
        ("DROP INDEX item_v", ("shop", "missing", "INDEX public.item_v")),
        ("CREATE INDEX more ON item (x)", ("shop", "extra", "INDEX public.more")),
        ("ALTER TABLE item SET TABLESPACE fast", ("shop", "changed", "TABLE public.item")),
        ("INSERT INTO cache (id, v) VALUES (9, 'c')", ("shop", "changed", "TABLE DATA public.cache")),
        ("ALTER TABLE empty OWNER TO app", ("shop", "changed", "TABLE public.empty")),
        ("COMMENT ON TABLE item IS 'x'", ("shop", "extra", 'COMMENT public.TABLE "item"')),
        ("GRANT SELECT ON item TO app", ("shop", "extra", 'ACL public.TABLE "item"')),
        ("SELECT lo_put(4242, 0, '\\xff')", ("shop", "changed", "BLOBS")),
        ("ALTER ROLE app PASSWORD 'other secret'", ("(cluster)", "changed", "ROLE ATTRIBUTES app")),
        ("ALTER ROLE app CREATEDB", ("(cluster)", "changed", "ROLE ATTRIBUTES app")),
        ("ALTER ROLE app SET work_mem = '7MB'", ("(cluster)", "changed", "ROLE SETTING app work_mem")),
        ("ALTER ROLE app SET geqo = off", ("(cluster)", "extra", "ROLE SETTING app geqo")),
        ("ALTER ROLE ALL SET geqo = off", ("(cluster)", "extra", "ROLE SETTING ALL geqo")),
        ("ALTER DATABASE shop SET work_mem = '7MB'", ("shop", "changed", "DATABASE PROPERTIES shop")),
        ("ALTER SYSTEM SET work_mem = '7MB'", ("(cluster)", "extra", "SETTING work_mem")),
        ("ALTER SYSTEM SET shared_buffers = '1GB'", ("(cluster)", "changed", "SETTING shared_buffers")),
        ("CREATE DATABASE another", ("another", "extra", "DATABASE another")),
        ("DROP DATABASE gone", ("gone", "missing", "DATABASE gone")),
        (
            "CREATE DATABASE shut;\nALTER DATABASE shut ALLOW_CONNECTIONS false",
            ("(cluster)", "extra", "CLOSED DATABASE shut"),
        ),
        ("\\connect template1\nCREATE TABLE t ()", ("template1", "extra", "TABLE public.t")),
    ],
)
def test_one_change_is_found_by_name(living: Cluster, tmp_path: Path, sql: str, expected: tuple[str, str, str]) -> None:
    before = str(tmp_path / "before")
    living.dump(path=before)
    living.psql(sql)
    found = told(living.dump(compare_to=before))
    # What follows from it may be told as well, such as the rows of a new table.
    database, kind, label = expected
    assert [item for item in found if item[:2] == (database, kind) and item[2].startswith(label)], found
    assert len(found) <= 3, found


def test_the_row_that_differs_is_shown(restored: Cluster, truth: str) -> None:
    restored.psql("UPDATE item SET v = 'Row 500' WHERE id = 500")
    result = restored.dump(compare_to=truth)
    assert result.compared is not None
    (difference,) = result.compared.differences
    # An update writes the row anew at the end, so the first row that differs is the one behind it.
    assert difference.truth.startswith("500\trow 500\t2026-01-01 08:20:00+00\t")
    assert difference.restored.startswith("501\trow 501\t")
    assert difference.line == difference.restored_line


def test_no_password_and_no_hash_is_shown(restored: Cluster, truth: str) -> None:
    hashes = [restored.psql("SELECT rolpassword FROM pg_authid WHERE rolname = 'app'")]
    restored.psql("ALTER ROLE app PASSWORD 'other secret'")
    hashes.append(restored.psql("SELECT rolpassword FROM pg_authid WHERE rolname = 'app'"))
    restored.psql("CREATE FOREIGN DATA WRAPPER w; CREATE SERVER s FOREIGN DATA WRAPPER w OPTIONS (password 'secret')")
    restored.psql("CREATE USER MAPPING FOR app SERVER s OPTIONS (\"user\" 'u', password 'map\nsecret')")
    restored.psql("CREATE PUBLICATION p; ALTER DATABASE shop SET app.jwt_secret = 'a secret'")
    restored.psql("CREATE SUBSCRIPTION p CONNECTION 'password=secret' PUBLICATION p WITH (connect = false)", "postgres")
    restored.psql("ALTER SYSTEM SET ssl_passphrase_command = 'echo secret'")
    values = restored.dump(compare_to=truth).to_dict("")
    text = json.dumps(values)
    assert values["difference_count"] >= 7 and "ROLE ATTRIBUTES app" in text and "(redacted, differs)" in text
    for kind in ("USER MAPPING", "SERVER", "SUBSCRIPTION", "DATABASE PROPERTIES", "SETTING ssl_passphrase_command"):
        assert kind in text
    text = text.replace("jwt_secret", "")
    for secret in (*hashes, "SCRAM", "secret"):
        assert secret not in text


def test_lines_of_the_host_based_authentication_count(restored: Cluster, truth: str) -> None:
    hba = restored.data / "pg_hba.conf"
    with open(hba, "a", encoding="utf-8") as stream:
        stream.write("host all all 10.0.0.0/8 md5\n")
    assert told(restored.dump(compare_to=truth)) == [("(cluster)", "extra", "HBA RULE host all all 10.0.0.0 md5")], (
        "without a reload"
    )
    hba.write_text("\n# comment\n\n" + HBA, encoding="utf-8")
    assert told(restored.dump(compare_to=truth)) == [], "where a rule stands does not count"
    lines = HBA.strip().splitlines()
    hba.write_text("\n".join([lines[1], lines[0], ""]), encoding="utf-8")
    assert told(restored.dump(compare_to=truth)) == [("(cluster)", "order", "HBA RULE local all boss scram-sha-256")]


def test_settings_of_the_recovery_and_of_the_place_do_not_count(restored: Cluster, truth: str) -> None:
    (restored.data / INCLUDE_DIR).mkdir(exist_ok=True)
    (restored.data / INCLUDE_DIR / FILE).write_text("max_connections = 500\nwork_mem = '1MB'\n", encoding="utf-8")
    restored.configure(f"include_dir = '{INCLUDE_DIR}'", "port = 7777", "external_pid_file = '/tmp/x'")
    for name in ("archive_mode = on", "restore_command = 'x'", "recovery_target_time = '2026-01-01 00:00:00+00'"):
        restored.psql(f"ALTER SYSTEM SET {name}")
    assert told(restored.dump(compare_to=truth)) == []
    (restored.data / INCLUDE_DIR / "90-other.conf").write_text("max_connections = 500\n", encoding="utf-8")
    assert told(restored.dump(compare_to=truth)) == [("(cluster)", "changed", "SETTING max_connections")]


def test_how_far_a_sequence_may_be_ahead(restored: Cluster, truth: str) -> None:
    """Sequence, its value in the truth, its increment."""
    for sequence, value, increment in (("up", 11, 5), ("down", 894, -3), ("item_id_seq", 1000, 1)):
        label = f"SEQUENCE SET public.{sequence}"
        for ahead in (1, 32):
            restored.psql(f"SELECT setval('{sequence}', {value + ahead * increment})")
            result = restored.dump(compare_to=truth)
            assert (told(result), list(explained(result))) == ([], [label]), f"{sequence} is {ahead} ahead"
        for other in (value + 33 * increment, value - increment, *([value + 1] if increment != 1 else [])):
            restored.psql(f"SELECT setval('{sequence}', {other})")
            result = restored.dump(compare_to=truth)
            assert (told(result), explained(result)) == ([("shop", "changed", label)], {}), f"{sequence} is at {other}"
        restored.psql(f"SELECT setval('{sequence}', {value})")
    restored.psql("SELECT nextval('fresh')")
    assert told(restored.dump(compare_to=truth)) == [("shop", "changed", "SEQUENCE SET public.fresh")]


def test_a_function_body_that_looks_like_a_sequence_is_not_excused(restored: Cluster, truth: str) -> None:
    body = restored.psql("SELECT pg_get_functiondef('look_alike()'::regprocedure)")
    restored.psql(body.replace("11, true", "16, true"))
    assert told(restored.dump(compare_to=truth)) == [("shop", "changed", "FUNCTION public.look_alike()")]


def test_a_real_crash_makes_explained_differences_only(restored: Cluster, tmp_path: Path) -> None:
    restored.psql("CHECKPOINT")
    restored.psql("SELECT nextval('up'); SELECT nextval('down'); SELECT nextval('fresh'); SELECT txid_current()")
    before = str(tmp_path / "before")
    restored.dump(path=before)
    restored.stop("immediate")
    restored.start()
    result = restored.dump(compare_to=before)
    assert told(result) == []
    assert explained(result) == {
        "SEQUENCE SET public.up": ("16", str(16 + 32 * 5)),
        "SEQUENCE SET public.down": ("891", str(891 - 32 * 3)),
        "SEQUENCE SET public.fresh": ("1", "33"),
        "TABLE DATA public.cache": ("2 rows", "0 rows"),
        "SEQUENCE SET public.cache_id_seq": ("2", "1, not called yet"),
    }


def test_truth_from_a_standby(copy: Cluster, truth: str, tmp_path: Path) -> None:
    standby = copy
    (standby.data / "standby.signal").touch()
    standby.start()
    from_standby = str(tmp_path / "standby")
    assert standby.dump(path=from_standby).index.in_recovery
    result = standby.dump(compare_to=truth)
    assert told(result) == [], "what cannot be read is explained"
    assert set(explained(result)) == {"TABLE DATA public.cache", "SEQUENCE SET public.cache_id_seq"}
    standby.psql("SELECT pg_promote()")
    until(lambda: standby.psql("SELECT pg_is_in_recovery()") == "f", "the promotion")
    result = standby.dump(compare_to=from_standby)
    assert told(result) == []
    assert set(explained(result)) == {"TABLE DATA public.cache", "SEQUENCE SET public.cache_id_seq"}
    standby.psql("INSERT INTO cache (id, v) VALUES (1, 'written after the restore')")
    assert told(standby.dump(compare_to=from_standby)) == [("shop", "extra", "TABLE DATA public.cache")]


def test_the_environment_of_the_caller_does_not_count(
    restored: Cluster, truth: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGTZ", "Asia/Tokyo")
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    monkeypatch.setenv("PGDATESTYLE", "German")
    monkeypatch.setenv("PGCLIENTENCODING", "LATIN1")
    monkeypatch.setenv("PGDATABASE", "nowhere")
    monkeypatch.setenv("PGOPTIONS", "-c bytea_output=escape -c extra_float_digits=0")
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    assert told(restored.dump(compare_to=truth)) == []


def test_the_time_zone_of_the_server_does_not_change_the_rows(restored: Cluster, truth: str) -> None:
    restored.configure("timezone = 'Asia/Tokyo'")
    restored.psql("SELECT pg_reload_conf()")
    assert told(restored.dump(compare_to=truth)) == [("(cluster)", "changed", "SETTING timezone")]


def test_login_with_a_password(restored: Cluster, truth: str, tmp_path: Path) -> None:
    login = Login(unix_socket=restored.socket, port=Cluster.PORT, user="boss", password="very: \\secret")
    assert told(restored.dump(login=login, compare_to=truth)) == []
    wrong = Login(unix_socket=restored.socket, port=Cluster.PORT, user="boss", password="wrong secret")
    with pytest.raises(PitrError) as raised:
        restored.dump(login=wrong, path=str(tmp_path / "kept"))
    assert "secret" not in str(raised.value)
    assert not list(tmp_path.glob("*kept*"))


def test_a_role_that_may_not_read_everything_is_refused(restored: Cluster, tmp_path: Path) -> None:
    app = Login(unix_socket=restored.socket, port=Cluster.PORT, user="app")
    with pytest.raises(PitrError, match="permission denied"):
        restored.dump(login=app, path=str(tmp_path / "kept"))
    assert not list(tmp_path.glob("*kept*"))


# --- dumps that do not come to their end -----------------------------------------------------------------------------


def program(server: Cluster, folder: Path, script: str) -> str:
    """A bin_dir whose pg_dumpall is this script; $REAL is the real one."""
    folder.mkdir()
    for name in os.listdir(server.bin_dir):
        os.symlink(os.path.join(server.bin_dir, name), folder / name)
    (folder / "pg_dumpall").unlink()
    real = os.path.join(server.bin_dir, "pg_dumpall")
    text = f'#!/bin/bash\nREAL={real}\n[ "$1" = --help ] && exec $REAL --help\n{script}\n'
    (folder / "pg_dumpall").write_text(text, encoding="utf-8")
    (folder / "pg_dumpall").chmod(0o755)
    return str(folder)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ('$REAL "$@"; echo went wrong >&2; exit 1', "went wrong"),
        ('$REAL "$@" | head -c 20000; exit 0', "not complete"),
        ('$REAL "$@" | sed "/cluster dump complete/d"; exit 0', "not complete"),
        ("exit 0", "not complete"),
        ("kill -9 $$", "exit code -9"),
    ],
)
def test_a_dump_that_is_not_whole_is_not_kept(
    restored: Cluster, truth: str, tmp_path: Path, script: str, message: str
) -> None:
    bin_dir = program(restored, tmp_path / "bin", script)
    with pytest.raises(PitrError, match=message):
        restored.dump(bin_dir=bin_dir, path=str(tmp_path / "kept"))
    with pytest.raises(PitrError, match=message):
        restored.dump(bin_dir=bin_dir, compare_to=truth)
    with pytest.raises(PitrError, match=message):
        take(restored.login, bin_dir, str(tmp_path / "kept"))
    assert not list(tmp_path.glob("*kept*")) and not list(Path(truth).parent.glob(".*"))


def is_gone(pid: str) -> bool:
    try:
        return " Z " in Path(f"/proc/{pid}/stat").read_text(encoding="ascii")
    except FileNotFoundError:
        return True


def test_an_interrupt_ends_pg_dumpall_and_its_children(
    restored: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids = tmp_path / "pids"
    script = f"sleep 600 & echo $$ $! > {pids}; echo; wait"
    bin_dir = program(restored, tmp_path / "bin", script)
    feed = Indexer.feed

    def interrupted(indexer: Indexer, data: bytes) -> None:
        if data == b"\n":
            raise KeyboardInterrupt
        feed(indexer, data)

    monkeypatch.setattr(Indexer, "feed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        restored.dump(bin_dir=bin_dir, path=str(tmp_path / "kept"))
    for pid in pids.read_text(encoding="ascii").split():
        until(partial(is_gone, pid), f"the end of process {pid}")
    assert not list(tmp_path.glob("*kept*"))


# --- size ------------------------------------------------------------------------------------------------------------

CHILD = r"""
import json, re, sys
from ansible_collections.pgdrill.pitr.plugins.module_utils.dump import Request, perform
from ansible_collections.pgdrill.pitr.plugins.module_utils.postgres import Login
socket, bin_dir, path, compare_to = sys.argv[1:]
result = perform(Request(Login(unix_socket=socket), bin_dir, path, compare_to, "gzip:1"))
# Not ru_maxrss: that begins with the size of the process which this one was forked from.
kilobytes = int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read()).group(1))
print(json.dumps({**result.to_dict(path), "rss": kilobytes * 1024}))
"""


def test_memory_does_not_grow_with_the_rows(restored: Cluster, tmp_path: Path) -> None:
    restored.psql("CREATE TABLE big AS SELECT i, repeat('x', 100) AS v FROM generate_series(1, 700000) i")
    restored.psql("CREATE TABLE wide AS SELECT repeat('y', 30000000) AS v")

    def child(path: str, compare_to: str) -> dict[str, Any]:
        argv = [sys.executable, "-c", CHILD, restored.socket, restored.bin_dir, path, compare_to]
        values: dict[str, Any] = json.loads(subprocess.run(argv, check=True, capture_output=True, text=True).stdout)
        return values

    truth = str(tmp_path / "truth")
    first = child(truth, "")
    assert first["bytes"] > 100_000_000
    restored.psql("UPDATE big SET v = 'z' WHERE i = 700000; UPDATE wide SET v = v || 'z'")
    second = child("", truth)
    differences = {item["object"]: item for item in second["differences"]}
    assert differences["TABLE DATA public.big"]["truth"] == "700000\t" + "x" * 100
    assert differences["TABLE DATA public.wide"]["restored"].endswith("yyyz")
    for values in (first, second):
        assert values["rss"] < 64 * 1024 * 1024, f"{values['rss'] / 1e6:.0f} MB"


# --- the module ------------------------------------------------------------------------------------------------------


def module(server: Cluster, check_mode: bool = False, **options: Any) -> tuple[int, dict[str, Any]]:
    """Exit code and result of the module, as Ansible runs it."""
    arguments = {"login_unix_socket": server.socket, "bin_dir": server.bin_dir, "_ansible_check_mode": check_mode}
    name = "ansible_collections.pgdrill.pitr.plugins.modules.cluster_dump"
    given = json.dumps({"ANSIBLE_MODULE_ARGS": {**arguments, **options}})
    result = subprocess.run([sys.executable, "-m", name], input=given, capture_output=True, text=True, check=False)
    assert result.stdout, result.stderr
    values: dict[str, Any] = json.loads(result.stdout)
    return result.returncode, values


def test_the_module_fails_on_a_difference_unless_told_otherwise(restored: Cluster, truth: str, tmp_path: Path) -> None:
    code, values = module(restored, compare_to=truth)
    assert code == 0 and values["identical"] is True and values["changed"] is False
    restored.psql("DELETE FROM item WHERE id = 1000; DROP INDEX item_v")
    code, values = module(restored, compare_to=truth, path=str(tmp_path / "kept"), max_differences=1)
    assert code == 1 and values["failed"] is True and values["identical"] is False
    assert "2 differences" in values["msg"] and truth in values["msg"]
    assert values["difference_count"] == 2 and len(values["differences"]) == 1
    assert os.path.exists(tmp_path / "kept"), "the evidence is kept"
    code, values = module(restored, compare_to=truth, fail_on_difference=False)
    assert code == 0 and values["identical"] is False and values["difference_count"] == 2


def test_the_module_keeps_a_dump_once(restored: Cluster, tmp_path: Path) -> None:
    path = str(tmp_path / "kept")
    code, values = module(restored, check_mode=True, path=path)
    assert code == 0 and values["changed"] is True and values["path"] == "" and not os.path.exists(path)
    code, values = module(restored, path=path)
    assert code == 0 and values["changed"] is True and values["path"] == path
    assert "identical" not in values
    code, values = module(restored, path=path)
    assert code == 0 and values["changed"] is False
    code, values = module(restored, compare_to=str(tmp_path / "nothing"))
    assert code == 1 and "There is no dump" in values["msg"]
