# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The time of a drill beside that of the bare PostgreSQL commands of the same procedure.

Both begin with nothing (no data directory, no archive) and end with a cluster that was destroyed, rebuilt, compared
with its dump and checked with pg_amcheck. They run in turn on the same programs, with the same settings of the server,
the same load, and as the same user. benchmarks/README.md says what is in both, and what only the drill does.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import platform
import re
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(CHECKOUT / "tools"))

from sandboxlib import cli, drill, postgresql  # noqa: E402  the path is set above
from sandboxlib import layout as layouts  # noqa: E402
from sandboxlib.layout import Layout  # noqa: E402
from sandboxlib.processes import Interrupted, Supervisor, raise_on_signals  # noqa: E402
from sandboxlib.say import SandboxError  # noqa: E402

SCALE, CLIENTS, JOBS, TRANSACTIONS = 10, 4, 2, 200  # the role drill's defaults
PORT = 20999
PAUSE = 0.05  # seconds between two looks, as the module recovery begins with

# What inventories/sandbox gives to initdb and to the server, and the role primary writes.
INITDB = ["--username=postgres", "--auth-local=trust", "--auth-host=scram-sha-256", "--encoding=UTF8", "--locale=C"]
INITDB += ["--data-checksums"]
SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "port": str(PORT),
    "max_wal_size": "2GB",
    "shared_buffers": "128MB",
    "wal_level": "replica",
    "archive_mode": "on",
    "archive_timeout": "60s",
    "max_wal_senders": "10",
    "max_replication_slots": "10",
    "wal_keep_size": "0",
    "wal_compression": "on",
}

Phases = dict[str, float]


class Failed(Exception):
    """Something did not work, so that there is nothing to compare."""


class Bare:
    """The procedure by hand: PostgreSQL's programs, cp, mv, and the shell's patience."""

    def __init__(self, layout: Layout, major: int, home: Path) -> None:
        self._layout = layout
        self._bin = layout.bin_dir(major)
        self._home = home
        self._data, self._archive, self._backup = home / "data", home / "archive", home / "backup"
        self._phases: Phases = {}
        self._env = ["LC_ALL=C", f"PGHOST={home}", f"PGPORT={PORT}", "PGUSER=postgres"]

    def run(self) -> Phases:
        """All of it, from initdb to pg_amcheck. Returns the seconds of each phase; raises Failed."""
        with self._phase("set up"):
            self._call("initdb", "-D", self._data, *INITDB)
            self._archive.mkdir(mode=0o700)
            self._layout.account.own(self._archive)
            self._append("postgresql.conf", {**SETTINGS, **self._own_settings()})
            self._pg_ctl("start", "-w", "-l", self._home / "log")
        with self._phase("base backup"):
            self._call("pg_basebackup", "-D", self._backup, "-F", "plain", "-X", "none", "-c", "fast")
        with self._phase("load"):
            self._psql("CREATE DATABASE pgdrill")
            self._call("pgbench", "-i", "-q", "-s", SCALE, "pgdrill")
            self._call("pgbench", "-n", "-c", CLIENTS, "-j", JOBS, "-t", TRANSACTIONS, "pgdrill")
        with self._phase("truth dump"):
            self._dump("truth.sql")
        with self._phase("last segment"):
            last = self._psql("SELECT pg_walfile_name(pg_switch_wal())")
            # The file is in the archive before cp has written all of it; the server knows when it has.
            done = self._data / "pg_wal" / "archive_status" / f"{last}.done"
            self._wait(f"{last} in the archive", done.exists)
        with self._phase("kill"):
            self._pg_ctl("stop", "-m", "immediate")
        with self._phase("restore"):
            self._run(["mv", self._data, self._home / "data.old"])
            self._run(["cp", "-a", self._backup, self._data])
            self._append("postgresql.auto.conf", {"restore_command": f"cp {self._archive}/%f %p"})
            self._run(["touch", self._data / "recovery.signal"])
        with self._phase("replay"):
            self._pg_ctl("start", "-w", "-l", self._home / "log")
            self._wait("the promotion", lambda: self._psql("SELECT pg_is_in_recovery()") == "f")
        with self._phase("second dump, diff"):
            self._dump("restored.sql")
            self._compare()
        with self._phase("pg_amcheck"):
            self._call("pg_amcheck", "--all", "--heapallindexed", "--install-missing", f"--jobs={JOBS}")
        self._pg_ctl("stop", "-m", "immediate")
        return self._phases

    def _own_settings(self) -> dict[str, str]:
        command = f"test ! -f {self._archive}/%f && cp %p {self._archive}/%f"
        return {"unix_socket_directories": str(self._home), "archive_command": command}

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self._phases[name] = time.monotonic() - started

    def _run(self, argv: Sequence[object], output: Path | None = None) -> str:
        """One program as the servers' user; its output as text, or in a file of that user."""
        words = [str(word) for word in argv]
        if output is not None:
            words = ["sh", "-c", 'out=$1; shift; exec "$@" > "$out"', "sh", str(output), *words]
        result = self._layout.account.capture(["env", *self._env, *words], timeout=600)
        if result.returncode != 0:
            log = self._home / "log"
            tail = log.read_text(encoding="utf-8", errors="replace")[-1500:] if log.exists() else ""
            said = (result.stderr + result.stdout)[-1500:]
            command = " ".join(words)
            raise Failed(f"{command} failed with exit code {result.returncode}:\n{said}\nThe server's log:\n{tail}")
        return result.stdout.strip()

    def _call(self, program: str, *arguments: object) -> None:
        self._run([self._bin / program, *arguments])

    def _psql(self, sql: str) -> str:
        return self._run([self._bin / "psql", "-X", "-A", "-t", "-d", "postgres", "-c", sql])

    def _pg_ctl(self, verb: str, *arguments: object) -> None:
        # Its children keep standard output open, which would let us wait for ever.
        self._run([self._bin / "pg_ctl", verb, "-s", "-D", self._data, *arguments], output=Path(os.devnull))

    def _dump(self, name: str) -> None:
        argv = [self._bin / "pg_dumpall", "--quote-all-identifiers"]
        if "--restrict-key" in self._run([argv[0], "--help"]):
            argv.append(Path("--restrict-key=0"))
        self._run(argv, output=self._home / name)

    def _compare(self) -> None:
        truth, restored = self._home / "truth.sql", self._home / "restored.sql"
        self._run(["diff", "-u", truth, restored])
        if truth.stat().st_size < 1000 or not filecmp.cmp(truth, restored, shallow=False):
            raise Failed(f"{truth} and {restored} differ, or there is nothing in them")

    def _append(self, name: str, settings: dict[str, str]) -> None:
        with (self._data / name).open("a", encoding="utf-8") as file:
            file.writelines(f"{key} = '{value}'\n" for key, value in settings.items())

    def _wait(self, what: str, done: Callable[[], bool]) -> None:
        end = time.monotonic() + 120
        while not done():
            if time.monotonic() > end:
                raise Failed(f"waited two minutes for {what}")
            time.sleep(PAUSE)


class Drill:
    """site.yml and drill.yml with the scenario latest on fresh sandbox hosts, as `make drill` runs them."""

    def __init__(self, layout: Layout, major: int, logs: Path, profile: bool) -> None:
        self._layout = layout
        self._major = major
        self._logs = logs
        self._profile = profile

    def run(self, number: int) -> Phases:
        """One drill. Returns seconds by phase: site.yml, what the drill's modules took, and the rest of drill.yml."""
        stamps, log = self._logs / f"{number}.stamps", self._logs / f"{number}.log"
        evidence = self._logs / f"{number}.evidence"
        # The clock is read around each playbook; its output goes into a file.
        watch = 'log=$1 stamps=$2; shift 2; date +%s.%N >>"$stamps"; "$@" >>"$log" 2>&1; code=$?'
        watch += '; date +%s.%N >>"$stamps"; exit $code'
        commands = []
        for playbook in drill.PLAYBOOKS:
            argv = [*self._layout.command("ansible-playbook"), "-i", "inventories/sandbox", playbook]
            argv += ["-e", json.dumps({"drill_scenarios": ["latest"], "drill_evidence_dir": str(evidence)})]
            commands.append(["sh", "-c", watch, "sh", str(log), str(stamps), *argv])
        env = drill.environment(self._layout)
        if self._profile:
            env["ANSIBLE_CALLBACKS_ENABLED"] = "ansible.posix.profile_tasks"
            env["PROFILE_TASKS_TASK_OUTPUT_LIMIT"] = "all"
        code = drill.run_playbooks(self._layout, self._major, commands, CHECKOUT, env)
        if code != 0:
            raise Failed(f"the drill failed with exit code {code}; its output: {log}")
        document = json.loads((evidence / "evidence.json").read_text(encoding="utf-8"))
        if document["verdict"] != "passed" or [item["name"] for item in document["scenarios"]] != ["latest"]:
            raise Failed(f"the drill did not pass the scenario latest: {evidence}")
        begin, middle, start, end = map(float, stamps.read_text(encoding="ascii").split())
        phases: Phases = {"site.yml": middle - begin}
        for item in document["phases"] + document["scenarios"][0]["phases"]:
            phases[f"drill: {item['name']}"] = item["seconds"]
        modules = sum(value for name, value in phases.items() if name.startswith("drill: "))
        phases["drill: Ansible, accept, evidence"] = end - start - modules
        return phases

    def slowest(self, number: int, count: int = 16) -> list[tuple[str, float]]:
        """The slowest tasks of a profiled run, with their seconds on the clock."""
        text = (self._logs / f"{number}.log").read_text(encoding="utf-8")
        found = re.findall(r"^(.+?) -{2,} +([0-9.]+)s$", text, re.MULTILINE)
        tasks = [(name.removeprefix("pgdrill.pitr."), float(seconds)) for name, seconds in found]
        return sorted(tasks, key=lambda item: -item[1])[:count]


def own_layout(base: Layout, root: Path) -> Layout:
    """A sandbox of our own that borrows programs and packages from the checkout's: drills go on beside it."""
    root.chmod(0o755)
    (root / "venv").symlink_to(base.venv)
    (root / "postgresql").symlink_to(base.root / "postgresql")
    layout = Layout.at(base.checkout, root, base.account, is_elsewhere=True)
    layouts.create(layout)
    return layout


def bare_round(layout: Layout, major: int) -> Phases:
    """The bare commands in a fresh directory, and no server left behind, whatever happens."""
    home = Path(tempfile.mkdtemp(prefix="pgdrill-bare-", dir="/tmp"))  # short, for the socket's path
    layout.account.own(home)
    try:
        with Supervisor(lambda: postgresql.stop_all(layout, home)):
            return Bare(layout, major, home).run()
    finally:
        shutil.rmtree(home, ignore_errors=True)


def median(rounds: Sequence[Phases]) -> Phases:
    """The median of every phase."""
    return {name: statistics.median(phases.get(name, 0.0) for phases in rounds) for name in rounds[0]}


def totals(rounds: Sequence[Phases]) -> list[float]:
    return [sum(phases.values()) for phases in rounds]


def print_phases(title: str, rounds: Sequence[Phases]) -> None:
    print(f"\n{title}: {statistics.median(totals(rounds)):.1f} s", end="")
    print(f"  (rounds: {', '.join(f'{total:.1f}' for total in totals(rounds))})")
    for name, seconds in median(rounds).items():
        print(f"  {name:<34}{seconds:6.1f}")


def measure(layout: Layout, options: argparse.Namespace, logs: Path) -> dict[str, object]:
    """All rounds, alternating, so that what else the machine does hits both. Prints and returns the figures."""
    ours = Drill(layout, options.pg, logs, options.profile)
    bare_rounds: list[Phases] = []
    drill_rounds: list[Phases] = []
    processors: dict[str, list[float]] = {"bare": [], "drill": []}
    loads = []
    for number in range(options.rounds):
        loads.append(os.getloadavg()[0])
        turns: list[tuple[str, Callable[[], None]]] = [
            ("bare", lambda: bare_rounds.append(bare_round(layout, options.pg))),
            ("drill", lambda: drill_rounds.append(ours.run(len(drill_rounds)))),
        ]
        for name, turn in turns if number % 2 == 0 else reversed(turns):
            before = _processor_seconds()
            turn()
            processors[name].append(_processor_seconds() - before)
        print(
            f"round {number + 1}: bare {totals(bare_rounds)[-1]:.1f} s, drill {totals(drill_rounds)[-1]:.1f} s,"
            f" load before it {loads[-1]:.2f}",
            flush=True,
        )
    print_phases("bare PostgreSQL commands", bare_rounds)
    print_phases("site.yml and drill.yml, scenario latest", drill_rounds)
    ratio = statistics.median(totals(drill_rounds)) / statistics.median(totals(bare_rounds))
    each = [ours / bare for ours, bare in zip(totals(drill_rounds), totals(bare_rounds), strict=True)]
    print(f"\nratio of the medians: {ratio:.2f}  (rounds: {', '.join(f'{value:.2f}' for value in each)})")
    used = {name: statistics.median(seconds) for name, seconds in processors.items()}
    print(
        f"processor time, which other work on the machine changes less: bare {used['bare']:.1f} s,"
        f" drill {used['drill']:.1f} s, ratio {used['drill'] / used['bare']:.2f}"
    )
    if options.profile:
        print("\nslowest tasks of the last drill, seconds:")
        for name, seconds in ours.slowest(options.rounds - 1):
            print(f"  {seconds:6.2f}  {name}")
    return {
        "postgresql": options.pg,
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version(), "loads": loads},
        "bare": bare_rounds,
        "drill": drill_rounds,
        "ratio": ratio,
        "ratios": each,
        "processor_seconds": processors,
    }


def _processor_seconds() -> float:
    """Used by all that we have started, the servers included: the supervisor adopts them and waits for their end."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> int:
    """Returns 0 when everything worked, whatever the figures are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = layouts.DEFAULT_MAJOR
    parser.add_argument("--pg", type=int, default=default, help="PostgreSQL's major version (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="how often both run (%(default)s)")
    parser.add_argument("--profile", action="store_true", help="list the slowest tasks of the last drill")
    parser.add_argument("--json", type=Path, help="file for the figures of every round")
    options = parser.parse_args()
    os.umask(0o022)
    raise_on_signals()
    root = Path(tempfile.mkdtemp(prefix="pgdrill-bench-", dir="/var/tmp"))
    layout: Layout | None = None
    try:
        base = layouts.locate()
        cli.setup(base, [options.pg], with_tests=False)
        layout = own_layout(base, root)
        logs = root / "logs"
        logs.mkdir()
        result = measure(layout, options, logs)
        if options.json:
            options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    except (Failed, SandboxError) as error:
        print(f"drill_ratio: {error}", file=sys.stderr)
        print(f"drill_ratio: the files are left in {root}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, Interrupted):
        _remove(layout, root, options.pg)
        return 130
    _remove(layout, root, options.pg)
    return 0


def _remove(layout: Layout | None, root: Path, major: int) -> None:
    """Nothing of ours stays; what `root` links to is not ours."""
    if layout is not None:
        for path in (layout.socket_dir(major), layout.ansible_tmp):
            shutil.rmtree(path, ignore_errors=True)
    shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
