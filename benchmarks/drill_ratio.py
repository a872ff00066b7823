# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The time of a drill beside that of the bare PostgreSQL commands of the same procedure.

Both begin with nothing (no data directory, no archive) and end with a cluster that was destroyed, rebuilt, compared
with its dump, checked with pg_amcheck and accepted. They run in turn on the same programs, with the same settings of
the server, the same load, and as the same user. bare.sh beside this file is what a person would type;
benchmarks/README.md says what is in both, and what only the drill does.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import re
import resource
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
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
BARE = Path(__file__).with_name("bare.sh")

Phases = dict[str, float]


class Failed(Exception):
    """Something did not work, so that there is nothing to compare."""


def bare(layout: Layout, major: int, home: Path) -> Phases:
    """bare.sh in the empty directory `home`, as the servers' user. Returns the seconds of each of its phases."""
    load = [SCALE, CLIENTS, JOBS, TRANSACTIONS]
    argv = ["bash", str(BARE), str(layout.bin_dir(major)), str(home), str(PORT), *map(str, load)]
    # Into a file: the server keeps standard output open, and we would wait for its end.
    output = home / "output"
    watch = ["sh", "-c", 'out=$1; shift; exec "$@" > "$out" 2>&1', "sh", str(output)]
    result = layout.account.capture([*watch, *argv], timeout=600)
    if result.returncode != 0:
        logs = [path for path in (output, home / "log") if path.exists()]
        texts = [path.read_text(encoding="utf-8", errors="replace")[-1500:] for path in logs]
        raise Failed("\n".join([f"bare.sh failed with exit code {result.returncode}:", result.stderr, *texts]))
    lines = (home / "phases").read_text(encoding="ascii").splitlines()
    begins = [(name, float(stamp)) for stamp, _space, name in (line.partition(" ") for line in lines)]
    return {name: after - begin for (name, begin), (_next, after) in itertools.pairwise(begins)}


class Drill:
    """site.yml and drill.yml with the scenario latest on fresh sandbox hosts, in one command as `make drill` has it."""

    def __init__(self, layout: Layout, major: int, logs: Path, profile: bool) -> None:
        self._layout = layout
        self._major = major
        self._logs = logs
        self._profile = profile

    def run(self, number: int) -> Phases:
        """One drill. Returns seconds by phase: what the drill's modules took, and all the rest of both playbooks."""
        stamps, log = self._logs / f"{number}.stamps", self._logs / f"{number}.log"
        evidence = self._logs / f"{number}.evidence"
        variables = json.dumps({"drill_scenarios": ["latest"], "drill_evidence_dir": str(evidence)})
        # The clock is read around the command; its output goes into a file.
        watch = 'log=$1 stamps=$2; shift 2; date +%s.%N >>"$stamps"; "$@" >>"$log" 2>&1; code=$?'
        watch += '; date +%s.%N >>"$stamps"; exit $code'
        command = ["sh", "-c", watch, "sh", str(log), str(stamps), *drill.command(self._layout, ["-e", variables])]
        env = drill.environment(self._layout)
        if self._profile:
            env["ANSIBLE_CALLBACKS_ENABLED"] = "ansible.posix.profile_tasks"
            env["PROFILE_TASKS_TASK_OUTPUT_LIMIT"] = "all"
        code = drill.run_playbooks(self._layout, self._major, [command], CHECKOUT, env)
        if code != 0:
            raise Failed(f"the drill failed with exit code {code}; its output: {log}")
        document = json.loads((evidence / "evidence.json").read_text(encoding="utf-8"))
        if document["verdict"] != "passed" or [item["name"] for item in document["scenarios"]] != ["latest"]:
            raise Failed(f"the drill did not pass the scenario latest: {evidence}")
        begin, end = map(float, stamps.read_text(encoding="ascii").split())
        phases: Phases = {}
        for item in document["phases"] + document["scenarios"][0]["phases"]:
            phases[f"drill: {item['name']}"] = item["seconds"]
        modules = sum(phases.values())
        return {**phases, "site.yml, Ansible, acceptance, evidence": end - begin - modules}

    def slowest(self, number: int, count: int = 16) -> list[tuple[str, float]]:
        """The slowest tasks of a profiled run, with their seconds on the clock."""
        text = (self._logs / f"{number}.log").read_text(encoding="utf-8")
        # The callback lists what it has at the end of each playbook, so that tasks of the first one stand there twice.
        found = dict(re.findall(r"^(.+?) -{2,} +([0-9.]+)s$", text, re.MULTILINE))
        tasks = [(name.removeprefix("pgdrill.pitr."), float(seconds)) for name, seconds in found.items()]
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
            return bare(layout, major, home)
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
