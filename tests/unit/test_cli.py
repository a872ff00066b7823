# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The installed command as PostgreSQL meets it: exit codes decide whether a recovery goes on, stops or promotes."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils import cli
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.plugins.module_utils.install import COMMAND, PACKAGE, install
from ansible_collections.pgdrill.pitr.plugins.module_utils.repository import MARKER
from ansible_collections.pgdrill.pitr.plugins.module_utils.wal import WalFile
from ansible_collections.pgdrill.pitr.tests.unit.support import (
    CLUSTER,
    MIB,
    SYSTEM,
    header,
    history,
    interpreters,
    make_repository,
    put,
    segment,
    wal_name,
)


class Host:
    """A database host: pg_wal, a repository with segments 3 and 5, and the command installed beside them."""

    def __init__(self, root: Path, python: str) -> None:
        self.pgdata = root / "data dir"
        self.pg_wal = self.pgdata / "pg_wal"
        self.repository = root / "repository"
        self.folder = make_repository(self.repository)
        self.directory = root / "it's 100% installed"
        self.command = str(self.directory / COMMAND)
        install(str(self.directory), CLUSTER, {"repository": str(self.repository), "compression": "gzip"}, python)
        for number in (3, 5):
            name = wal_name(1, number)
            put(Path(self.folder.wal_path(WalFile.parse(name))).parent, name, segment(1, number))
        self.path = put(self.pg_wal, wal_name(1, 6), segment(1, 6))

    def run(self, *arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """As the server runs it: in the data directory, with little in the environment, through a shell."""
        return subprocess.run(
            [self.command, *arguments],
            cwd=self.pgdata,
            env=environment or {"PATH": "/usr/bin:/bin"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def push(self, path: str = f"pg_wal/{wal_name(1, 6)}") -> subprocess.CompletedProcess[str]:
        return self.run("push", CLUSTER, path)

    def get(self, name: str, *options: str) -> subprocess.CompletedProcess[str]:
        return self.run("get", *options, CLUSTER, name, "pg_wal/RECOVERYXLOG")

    @property
    def fetched(self) -> Path:
        return self.pg_wal / "RECOVERYXLOG"


@pytest.fixture(params=interpreters()[:1])
def host(request: pytest.FixtureRequest, tmp_path: Path) -> Host:
    return Host(tmp_path, request.param)


@pytest.mark.parametrize("python", interpreters())
def test_all_good_answers_on_every_interpreter(tmp_path: Path, python: str) -> None:
    host = Host(tmp_path, python)
    pushed = host.push()
    assert (pushed.returncode, pushed.stdout, pushed.stderr) == (0, "", "")
    again = host.push()
    assert (again.returncode, again.stderr) == (0, "")
    got = host.get(wal_name(1, 6))
    assert (got.returncode, got.stdout, got.stderr) == (0, "", "")
    assert host.fetched.read_bytes() == segment(1, 6)
    absent = host.get(wal_name(1, 7))
    assert (absent.returncode, absent.stdout, absent.stderr) == (1, "", "")
    hole = host.get(wal_name(1, 4))
    assert hole.returncode > 125 and wal_name(1, 5) in hole.stderr


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_largest_segments_pass_in_little_memory(tmp_path: Path, compression: str) -> None:
    size = 1024 * MIB
    folder = make_repository(tmp_path / "repository", size=size)
    settings = {"repository": folder.repository, "compression": compression}
    install(str(tmp_path / "pitr"), CLUSTER, settings, interpreters()[0])
    (tmp_path / "pg_wal").mkdir()
    name = wal_name(1, 3, size)
    with open(tmp_path / "pg_wal" / name, "wb") as stream:
        stream.write(header(address=3 * size, size=size))
        stream.truncate(size)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (300 * MIB, 300 * MIB))

    for arguments in (("push", CLUSTER, f"pg_wal/{name}"), ("get", CLUSTER, name, "pg_wal/RECOVERYXLOG")):
        result = subprocess.run(
            [str(tmp_path / "pitr" / COMMAND), *arguments], cwd=tmp_path, env={"PATH": "/usr/bin:/bin"},
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, preexec_fn=limit,
        )  # fmt: skip
        assert (result.returncode, result.stderr) == (0, "")
    fetched = tmp_path / "pg_wal" / "RECOVERYXLOG"
    with open(fetched, "rb") as stream:
        assert stream.read(40) == header(address=3 * size, size=size)
    assert fetched.stat().st_size == size
    # A gigabyte is not left lying about until the tests' directory is removed.
    shutil.rmtree(tmp_path)


def test_absent_files_of_all_kinds_exit_1(host: Host) -> None:
    for name in (wal_name(1, 6), wal_name(2, 6), "00000001.history", "00000002.history"):
        assert (host.get(name).returncode, host.get(name).stderr) == (1, "")


def test_history_is_fetched(host: Host) -> None:
    text = history((1, "0/350000"))
    put(host.pg_wal, "00000002.history", text)
    assert host.push("pg_wal/00000002.history").returncode == 0
    assert host.run("get", CLUSTER, "00000002.history", "pg_wal/RECOVERYHISTORY").returncode == 0
    assert (host.pg_wal / "RECOVERYHISTORY").read_text() == text


def test_system_identifier_chooses_the_chapter(host: Host) -> None:
    assert host.get(wal_name(1, 5), f"--system-identifier={SYSTEM}").returncode == 0
    foreign = host.get(wal_name(1, 5), "--system-identifier=42")
    assert foreign.returncode > 125 and "42" in foreign.stderr


# How a host can break. Each is one reason for a failure of push (1 to 125) and of get (above 125, and never 1).


def delete_a_module(host: Host) -> None:
    (host.directory / "lib" / PACKAGE / "timeline.py").unlink()


def delete_the_package(host: Host) -> None:
    shutil.rmtree(host.directory / "lib" / PACKAGE)


def delete_the_library(host: Host) -> None:
    shutil.rmtree(host.directory / "lib")


def break_a_module(host: Host) -> None:
    (host.directory / "lib" / PACKAGE / "archive.py").write_text("import no_such_module\n")


def truncate_a_module(host: Host) -> None:
    path = host.directory / "lib" / PACKAGE / "codec.py"
    path.write_bytes(path.read_bytes()[:3000])


def replace_the_interpreter(host: Host, python: str) -> None:
    path = Path(host.command)
    lines = path.read_text().splitlines(keepends=True)
    # The last one: those before it are of what serves and receives.
    *_others, number = (at for at, line in enumerate(lines) if " -I -S " in line)
    lines[number] = python + lines[number][lines[number].index(" -I -S ") :]
    path.write_text("".join(lines))


def remove_the_interpreter(host: Host) -> None:
    replace_the_interpreter(host, "/nonexistent/python3")


def forbid_the_interpreter(host: Host) -> None:
    replace_the_interpreter(host, str(host.directory / f"{CLUSTER}.json").replace("'", "'\\''").join("''"))


def crash_the_interpreter(host: Host) -> None:
    """A Python that cannot find its own standard library exits 1."""
    crashing = Path(put(host.directory, "python", "#!/bin/sh\necho 'Fatal Python error' >&2\nexit 1\n"))
    crashing.chmod(0o755)
    replace_the_interpreter(host, str(crashing).replace("'", "'\\''").join("''"))


def kill_python(number: signal.Signals) -> Callable[[Host], None]:
    def break_it(host: Host) -> None:
        path = host.directory / "lib" / PACKAGE / "archive.py"
        # Under nohup, and in the background of a script, some signals are ignored, and that is inherited.
        heed = "" if number == signal.SIGKILL else f"import signal\nsignal.signal({int(number)}, signal.SIG_DFL)\n"
        dying = f"import os\n{heed}os.write(2, b'dying')\nos.kill(os.getpid(), {int(number)})\n"
        path.write_text(path.read_text().replace("from . import codec\n", f"from . import codec\n{dying}", 1))

    return break_it


def remove_the_settings(host: Host) -> None:
    (host.directory / f"{CLUSTER}.json").unlink()


def settings_of(content: str) -> Callable[[Host], None]:
    def break_it(host: Host) -> None:
        (host.directory / f"{CLUSTER}.json").write_text(content)

    return break_it


def remove_the_repository(host: Host) -> None:
    host.repository.rename(host.repository.with_name("elsewhere"))


def unmount_the_repository(host: Host) -> None:
    remove_the_repository(host)
    host.repository.mkdir()


def remove_the_marker(host: Host) -> None:
    (host.repository / MARKER).unlink()


def damage_the_marker(host: Host) -> None:
    (host.repository / MARKER).write_bytes(b"\0" * 20)


def damage_the_cluster(host: Host) -> None:
    (host.repository / CLUSTER / "cluster.json").write_text('{"format": 1, "chapters": [{"number": 1}]}')


def remove_the_archive(host: Host) -> None:
    shutil.rmtree(host.folder.archive_path())


BREAKS = [
    delete_a_module,
    delete_the_package,
    delete_the_library,
    break_a_module,
    truncate_a_module,
    remove_the_interpreter,
    forbid_the_interpreter,
    crash_the_interpreter,
    kill_python(signal.SIGKILL),
    kill_python(signal.SIGSEGV),
    kill_python(signal.SIGTERM),
    kill_python(signal.SIGINT),
    remove_the_settings,
    settings_of(""),
    settings_of("{"),
    settings_of("[]"),
    settings_of("{}"),
    settings_of('{"repository": ""}'),
    settings_of('{"repository": 5}'),
    settings_of('{"repository": "\\ud800"}'),
    remove_the_repository,
    unmount_the_repository,
    remove_the_marker,
    damage_the_marker,
    damage_the_cluster,
    remove_the_archive,
]


@pytest.mark.parametrize("break_it", BREAKS, ids=lambda item: item.__name__)
def test_broken_host_fails_push_visibly_and_get_safely(host: Host, break_it: Callable[[Host], None]) -> None:
    break_it(host)
    pushed = host.push()
    assert 1 <= pushed.returncode <= 125 and pushed.stderr
    # Not there, there, and a hole: without a working command nothing may be told apart.
    for name in (wal_name(1, 6), wal_name(1, 5), wal_name(1, 4), "00000002.history"):
        got = host.get(name)
        assert 125 < got.returncode <= 255 and got.stderr
        assert not host.fetched.exists()


@pytest.mark.parametrize(
    "content", [segment(1, 6, system=SYSTEM + 1), b"short", b""], ids=["foreign", "short", "empty"]
)
def test_segment_that_is_refused_fails_push(host: Host, content: bytes) -> None:
    put(host.pg_wal, wal_name(1, 6), content)
    pushed = host.push()
    assert 1 <= pushed.returncode <= 125
    assert pushed.stderr.startswith("pitr-wal push: ") and wal_name(1, 6) in pushed.stderr


def test_different_duplicate_fails_push(host: Host) -> None:
    put(host.pg_wal, wal_name(1, 5), segment(1, 5, seed=1))
    pushed = host.push(f"pg_wal/{wal_name(1, 5)}")
    assert 1 <= pushed.returncode <= 125 and "other content" in pushed.stderr


@pytest.mark.parametrize(
    "content", [b"", segment(1, 5)[:-1], segment(1, 5, system=SYSTEM + 1), b"\x1f\x8b\x08 damaged"]
)
def test_damaged_stored_segment_fails_get_and_is_named(host: Host, content: bytes) -> None:
    stored = host.folder.wal_path(WalFile.parse(wal_name(1, 5)))
    Path(stored).write_bytes(content)
    got = host.get(wal_name(1, 5))
    assert 125 < got.returncode <= 255 and stored in got.stderr
    assert not host.fetched.exists()


def test_target_that_cannot_be_written_fails_get(host: Host) -> None:
    got = host.run("get", CLUSTER, wal_name(1, 5), "no/such/directory/RECOVERYXLOG")
    assert 125 < got.returncode <= 255 and "no/such/directory" in got.stderr


@pytest.mark.parametrize(
    "arguments",
    [(), ("help",), ("push",), ("push", CLUSTER), ("push", CLUSTER, "a", "b"), ("hold", CLUSTER, "x"), ("serve",)],
)
def test_other_calls_exit_within_the_range_of_an_archive_command(host: Host, arguments: tuple[str, ...]) -> None:
    result = host.run(*arguments)
    assert 1 <= result.returncode <= 125 and result.stderr


@pytest.mark.parametrize(
    "arguments", [(), (CLUSTER,), (CLUSTER, wal_name(1, 7)), ("--system-identifier=1", CLUSTER, "x")]
)
def test_get_with_the_wrong_arguments_is_never_absent(host: Host, arguments: tuple[str, ...]) -> None:
    result = host.run("get", *arguments)
    assert result.returncode > 125 and "usage" in result.stderr


def test_unknown_cluster_is_an_error(host: Host) -> None:
    assert host.run("get", "other", wal_name(1, 7), "x").returncode > 125
    assert 1 <= host.run("push", "other", host.path).returncode <= 125
    shutil.copy(host.directory / f"{CLUSTER}.json", host.directory / "other.json")
    assert host.run("get", "other", wal_name(1, 7), "x").returncode > 125


def test_command_works_without_path_home_and_terminal(host: Host) -> None:
    result = host.run(
        "push", CLUSTER, host.path, environment={"PYTHONPATH": "/nonexistent", "PYTHONHOME": "/nonexistent"}
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_settings_are_read_each_time(host: Host) -> None:
    path = host.directory / f"{CLUSTER}.json"
    path.write_text(json.dumps({"repository": str(host.repository), "compression": "none"}))
    assert host.push().returncode == 0
    # Not compressed: no smaller than a segment.
    assert Path(host.folder.wal_path(WalFile.parse(wal_name(1, 6)))).stat().st_size > len(segment(1, 6))
    path.write_text(json.dumps({"repository": str(host.repository), "compression": "brotli"}))
    put(host.pg_wal, wal_name(1, 7), segment(1, 7))
    pushed = host.push(f"pg_wal/{wal_name(1, 7)}")
    assert 1 <= pushed.returncode <= 125 and "brotli" in pushed.stderr


# The same without a process of its own.


def test_main_tells_absence_and_failure_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    repository = make_repository(tmp_path / "r").repository
    put(tmp_path, f"{CLUSTER}.json", json.dumps({"repository": repository, "compression": "none"}))
    path = put(tmp_path / "pg_wal", wal_name(1, 3), segment(1, 3))
    target = str(tmp_path / "target")
    assert cli.main([str(tmp_path), "get", CLUSTER, wal_name(1, 3), target]) == cli.ABSENT
    assert cli.main([str(tmp_path), "push", CLUSTER, path]) == 0
    assert cli.main([str(tmp_path), "get", CLUSTER, wal_name(1, 3), target]) == 0
    assert capsys.readouterr() == ("", "")
    assert cli.main([str(tmp_path), "get", CLUSTER, wal_name(1, 2), target]) == cli.FAILED
    assert capsys.readouterr().err.startswith("pitr-wal get: ")
    assert cli.ABSENT not in (0, cli.FAILED)


def test_hold_keeps_the_wal_of_a_cluster_that_nobody_has_accepted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([str(tmp_path), "hold", CLUSTER, "pg_wal/x"]) == cli.FAILED
    assert "not accepted yet" in capsys.readouterr().err


def test_error_of_the_system_names_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    repository = make_repository(tmp_path / "r").repository
    put(tmp_path, f"{CLUSTER}.json", json.dumps({"repository": repository, "compression": "none"}))
    path = put(tmp_path / "pg_wal", wal_name(1, 3), segment(1, 3))
    cli.main([str(tmp_path), "push", CLUSTER, path])
    assert cli.main([str(tmp_path), "get", CLUSTER, wal_name(1, 3), str(tmp_path / "gone" / "x")]) == cli.FAILED
    assert f"{tmp_path}/gone/x.pitr: No such file or directory" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["[]", "{}", '{"repository": ""}', "5", "null"])
def test_settings_without_a_repository_are_named(tmp_path: Path, content: str) -> None:
    path = put(tmp_path, f"{CLUSTER}.json", content)
    with pytest.raises(PitrError, match=f"{path} names no repository"):
        cli.configuration(str(tmp_path), CLUSTER)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["push", CLUSTER],
        ["push", "--system-identifier=1", CLUSTER, "x"],
        ["push", CLUSTER, "x", "y"],
        ["other", CLUSTER, wal_name(1, 3), "target"],
        ["get", CLUSTER, wal_name(1, 3)],
    ],
)
def test_call_that_is_none_does_nothing_but_say_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    repository = make_repository(tmp_path / "r").repository
    put(tmp_path, f"{CLUSTER}.json", json.dumps({"repository": repository}))
    assert cli.main([str(tmp_path), *arguments]) == cli.FAILED
    assert capsys.readouterr().err == f"{cli.USAGE}\n"


def test_settings_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(PitrError, match=f"{tmp_path}/other.json cannot be read"):
        cli.configuration(str(tmp_path), "other")


def test_lenient_get_tells_a_standby_that_there_is_nothing_and_a_recovery_that_it_failed(host: Host) -> None:
    hole = wal_name(1, 4)
    assert host.get(hole).returncode == 200
    standby = host.get(hole, "--lenient")
    assert standby.returncode == 1 and "the archive has a hole" in standby.stderr
    (host.repository / MARKER).unlink()
    assert host.get(wal_name(1, 5), "--lenient").returncode == 1
    # Both signal files: whoever left them, it is not for us to say which one is meant.
    for name in ("standby.signal", "recovery.signal"):
        (host.pgdata / name).touch()
    assert host.get(hole, "--lenient").returncode == 200
    (host.pgdata / "standby.signal").unlink()
    assert host.get(wal_name(1, 5), "--lenient").returncode == 200


def test_lenient_get_fetches_what_is_there(host: Host) -> None:
    assert host.get(wal_name(1, 5), "--lenient").returncode == 0
    assert (host.pg_wal / "RECOVERYXLOG").read_bytes() == segment(1, 5)
