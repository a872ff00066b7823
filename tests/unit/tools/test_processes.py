# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the supervisor of a drill ends. It takes over whole process trees, so each test has one in another process."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import sandboxlib

TOOLS = Path(sandboxlib.__file__).parent.parent

# A daemon as PostgreSQL is one: in a session of its own, its parent gone.
DAEMON = "(setsid sh -c 'echo $$ > pid; exec sleep 300' &); while [ ! -s pid ]; do sleep 0.01; done"

PROGRAM = """
import os, pathlib, sys
from sandboxlib import processes
from sandboxlib.processes import Interrupted, Supervisor
processes._SELF_END, processes._FORWARDED_END, processes._ORPHANS_END = 0.3, 0.3, 1
try:
    with Supervisor(lambda: print("servers stopped", flush=True)) as supervisor:
        code = supervisor.run(["sh", "-c", sys.argv[1]], dict(os.environ), pathlib.Path.cwd())
except Interrupted as interruption:
    code = interruption.code
sys.exit(code)
"""


def start(directory: Path, command: str) -> subprocess.Popen[str]:
    argv = [sys.executable, "-c", PROGRAM, command]
    return subprocess.Popen(
        argv,
        cwd=directory,
        env={"PYTHONPATH": str(TOOLS)},
        stdout=subprocess.PIPE,
        text=True,
        # A script in the background, and nohup, start everything with signals ignored, and that is inherited.
        preexec_fn=_heed_interrupts,
    )


def _heed_interrupts() -> None:
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def daemon_runs(directory: Path) -> bool:
    return Path("/proc", (directory / "pid").read_text(encoding="ascii").strip()).exists()


def test_daemon_of_a_successful_command_is_ended(tmp_path: Path) -> None:
    process = start(tmp_path, DAEMON)
    output, _none = process.communicate(timeout=30)
    assert (process.returncode, output) == (0, "servers stopped\n")
    assert not daemon_runs(tmp_path)


def test_daemon_that_was_killed_is_reaped_at_once(tmp_path: Path) -> None:
    killed = (
        f"{DAEMON}; kill -9 $(cat pid); for i in $(seq 100); do [ -e /proc/$(cat pid) ] || exit 5; sleep 0.05; done"
    )
    process = start(tmp_path, killed)
    process.communicate(timeout=30)
    assert process.returncode == 5


def test_exit_code_of_a_failed_command_is_kept(tmp_path: Path) -> None:
    process = start(tmp_path, f"{DAEMON}; exit 7")
    process.communicate(timeout=30)
    assert process.returncode == 7
    assert not daemon_runs(tmp_path)


def test_daemon_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    process = start(tmp_path, DAEMON.replace("exec sleep 300", 'trap "" TERM; while :; do sleep 1; done'))
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert not daemon_runs(tmp_path)


def test_interrupted_command_and_its_daemon_are_ended(tmp_path: Path) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        process = start(tmp_path, f"{DAEMON}; sleep 300")
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text(encoding="ascii"):
            time.sleep(0.01)
        process.send_signal(number)
        output, _none = process.communicate(timeout=30)
        assert (process.returncode, output) == (128 + number, "servers stopped\n")
        assert not daemon_runs(tmp_path)
        (tmp_path / "pid").unlink()
