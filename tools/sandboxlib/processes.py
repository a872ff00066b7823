# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs commands and ends everything that they started, daemons included."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType

from .accounts import Account
from .say import problem, step

_PR_SET_CHILD_SUBREAPER = 36
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# Seconds.
_POLL = 0.05
_SELF_END = 3  # for a command that the terminal's Ctrl-C reached as well as us
_FORWARDED_END = 10
_ORPHANS_END = 5


class Interrupted(Exception):
    """A signal asked us to end. `code` is what a shell shows for it: 130 for Ctrl-C."""

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.code = 128 + number


def raise_on_signals() -> None:
    """Let SIGTERM and SIGHUP raise Interrupted, as SIGINT raises KeyboardInterrupt; an ignored signal stays ignored."""

    def interrupt(number: int, _frame: FrameType | None) -> None:
        raise Interrupted(number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, interrupt)


class Supervisor:
    """While it is entered, every process that a command leaves behind becomes our child (prctl(2),
    PR_SET_CHILD_SUBREAPER), wherever it daemonised itself to; on leaving, servers are stopped by `stop_servers` and the
    rest is ended. Only one may be active in a process."""

    def __init__(self, stop_servers: Callable[[], object]) -> None:
        self._stop_servers = stop_servers
        self._signal = 0
        self._repeated = False
        self._old: dict[int, object] = {}
        self._terminal = select.poll()
        self._has_terminal = sys.stdin is not None and sys.stdin.isatty()
        if self._has_terminal:
            self._terminal.register(sys.stdin.fileno(), 0)

    def __enter__(self) -> Supervisor:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")
        for number in _SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup, and jobs in the background of a script
                self._old[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._stop_servers()
            left = end_descendants()
            if left:
                problem(f"these processes could not be ended: {', '.join(map(str, left))}")
        finally:
            for number, handler in self._old.items():
                signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._repeated = self._signal != 0
        self._signal = self._signal or number

    def check(self) -> None:
        """Raise Interrupted when a signal has come."""
        if self._signal:
            raise Interrupted(self._signal)

    def _pause(self) -> None:
        """Sleep for a moment, and notice when the terminal goes away: the kernel tells that to the session's leader
        only, and a make in that place would keep it to itself."""
        if not self._has_terminal:
            time.sleep(_POLL)
        elif self._terminal.poll(_POLL * 1000):
            self._has_terminal = False
            self._signal = self._signal or signal.SIGHUP

    def run(self, argv: Sequence[str], env: Mapping[str, str], cwd: Path, account: Account | None = None) -> int:
        """Run a command in the foreground; returns its exit code (128 + n for a signal). Raises Interrupted."""
        self.check()
        if account is None:
            process = subprocess.Popen(argv, env=env, cwd=cwd)
        else:
            process = account.popen(argv, env=env, cwd=cwd)
        while process.poll() is None and not self._signal:
            _reap(but=process.pid)
            self._pause()
        if self._signal:
            self._let_end(process)
        self.check()
        code = process.returncode
        return code if code >= 0 else 128 - code

    def _let_end(self, process: subprocess.Popen[bytes]) -> None:
        """Give an interrupted command time to tidy up; what is left of it after that is killed with the orphans."""
        if self._signal == signal.SIGINT:
            self._wait(process, _SELF_END)
        if process.poll() is None:
            process.send_signal(self._signal)
            self._wait(process, _FORWARDED_END)

    def _wait(self, process: subprocess.Popen[bytes], seconds: float) -> None:
        """Wait for the end of a command; a second Ctrl-C means that its user has no more patience."""
        end = time.monotonic() + seconds
        while process.poll() is None and not self._repeated and time.monotonic() < end:
            _reap(but=process.pid)
            time.sleep(_POLL)


def _processes() -> dict[int, tuple[int, str, str]]:
    """Every process by its id: (parent's id, state, name), from /proc/<pid>/stat (proc_pid_stat(5))."""
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                text = Path("/proc", name, "stat").read_text(encoding="utf-8", errors="replace")
            except OSError:
                continue  # It has ended meanwhile.
            head, _bracket, tail = text.rpartition(")")
            state, parent = tail.split()[:2]
            found[int(name)] = (int(parent), state, head.partition("(")[2])
    return found


def descendants() -> dict[int, str]:
    """Our living descendants: names by process id. Zombies do not count."""
    table = _processes()
    children: dict[int, list[int]] = {}
    for pid, (parent, _state, _name) in table.items():
        children.setdefault(parent, []).append(pid)
    found: dict[int, str] = {}
    queue = list(children.get(os.getpid(), []))
    while queue:
        pid = queue.pop()
        queue += children.get(pid, [])
        if table[pid][1] not in "ZX":
            found[pid] = table[pid][2]
    return found


def end_descendants() -> list[int]:
    """End every descendant, politely first; returns the ids of those that would not go."""
    for final in (False, True):
        end = time.monotonic() + _ORPHANS_END
        signalled: set[int] = set()
        while True:
            _reap()
            left = descendants()
            if not left:
                return []
            if time.monotonic() > end:
                break
            for pid, name in left.items():
                if pid not in signalled:
                    signalled.add(pid)
                    _send(pid, signal.SIGKILL if final else _polite(name))
            time.sleep(_POLL)
    return sorted(left)


def _polite(name: str) -> signal.Signals:
    """SIGTERM would let a postmaster wait for its clients; SIGQUIT is its immediate shutdown."""
    return signal.SIGQUIT if name == "postgres" else signal.SIGTERM


def _send(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass
    except PermissionError:
        step(f"may not end process {pid}")


def _reap(but: int = 0) -> None:
    """Take the exit status of every child that has ended, ours and those that became ours; not that of `but`, for which
    somebody else waits.

    This must go on all the time: a killed postmaster that nobody reaps still has a process id, and to PostgreSQL the
    lock file that names it is that of a running server.
    """
    with contextlib.suppress(ChildProcessError):
        while ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if ended.si_pid == but:
                return
            os.waitpid(ended.si_pid, 0)
