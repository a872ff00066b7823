# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""``pitr-wal receive``: keeps pg_receivewal running on the repository host and carries what it has finished into the
archive.

Before each connection the server is asked who it is. What is received lies in the spool (``<cluster>/receiver/``);
finished segments and history files enter the archive by the same code as pushed ones. The newest finished segment stays
in the spool, because pg_receivewal goes on behind the newest file that it finds there.

Started by systemd or by the module ``receiver`` with ``python3 -I -S``, so it needs the standard library only.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import sys
import time
from typing import Any

from . import archive, codec, locks
from .errors import PitrError
from .repository import Chapter, ClusterFolder
from .spool import (
    LEFT,
    SPOOL,
    STATUS_FILE,
    SpoolFile,
    Start,
    behind,
    in_front,
    next_start,
    seed_name,
    segments,
    spool_path,
    written,
)
from .timeline import Span, Switch, ancestry, parse_history
from .tree import fsync_directory, make_directory, temporary_name
from .upstream import Facts, Primary, Settings, WrongServerError, read_settings
from .wal import Lsn, SegmentHeader, WalFile, history_name, segment_name

# Seconds.
TICK = 0.25
FIRST_PAUSE = 0.2
LONGEST_PAUSE = 10.0
ENDING = 20.0
LOCK_FILE = "receiver.lock"
# Held by pg_receivewal itself, so that one that has survived its supervisor is found.
STREAM_LOCK_FILE = "receiver-stream.lock"
_PREFIX = re.compile(r"pg_receivewal: (?:error: |fatal: |detail: |hint: )?")


def lock_path(folder: ClusterFolder, name: str = LOCK_FILE) -> str:
    """Where a lock of the cluster's receiver lies."""
    return os.path.join(folder.path, "locks", name)


def try_lock(path: str) -> int | None:
    """Take a lock that dies with its holder; None when somebody has it."""
    try:
        return locks.acquire(path)
    except locks.InUseError:
        return None


def holders(path: str) -> list[int]:
    """Processes of this user on this host that have the file open, but for ourselves."""
    found = []
    wanted = os.path.realpath(path)
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            for descriptor in os.listdir(f"/proc/{entry}/fd"):
                with contextlib.suppress(OSError):
                    if os.readlink(f"/proc/{entry}/fd/{descriptor}") == wanted:
                        found.append(int(entry))
                        break
    return found


def say(text: str) -> None:
    """One line for the log."""
    sys.stderr.write(f"{_now()} pitr-wal receive: {text}\n")
    sys.stderr.flush()


def _is_trouble(line: str, segment: str) -> bool:
    """Whether the server has the segment and could not read it, which may pass.

    Then it names the file with its directory, or an offset in it (WalSndSegmentOpen, WALReadRaiseError).
    """
    return f"pg_wal/{segment}" in line or f"{segment}," in line


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())


def _replace(path: str, value: object) -> None:
    """Replace a file as a whole. It only tells; nothing is lost with it, so it is not flushed."""
    temporary = temporary_name(path)
    try:
        with open(temporary, "x", encoding="utf-8") as stream:
            json.dump(value, stream, indent=2, sort_keys=True)
            stream.write("\n")
        os.rename(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


class _Place:
    """The cluster's folder, opened, and its spool."""

    def __init__(self, repository: str, cluster: str) -> None:
        if "://" in repository:
            raise PitrError(f"{repository}: a receiver runs on the repository's own host and wants a directory.")
        self.folder = ClusterFolder.open(repository, cluster)
        self.chapter: Chapter = self.folder.chapter
        self.size = self.chapter.wal_segment_size
        self.spool = spool_path(self.folder, self.chapter)
        self.left = os.path.join(self.spool, LEFT)
        for path in (os.path.dirname(self.spool), self.spool, self.left):
            make_directory(path)

    def files(self) -> list[SpoolFile]:
        return segments(os.listdir(self.spool), self.size)

    def path(self, file: SpoolFile) -> str:
        return os.path.join(self.spool, file.name)

    def stored(self, name: str) -> bool:
        return self.folder.tree.exists(self.folder.wal_path(WalFile.parse(name), self.chapter))

    def reach(self, file: SpoolFile) -> Lsn | None:
        """How far a file has been written."""
        descriptor = os.open(self.path(file), os.O_RDONLY)
        try:
            return written(lambda size, offset: os.pread(descriptor, size, offset), file.name, self.size)
        finally:
            os.close(descriptor)

    def put_aside(self, file: SpoolFile, why: str) -> None:
        """Move a file out of pg_receivewal's sight; nothing there is replaced."""
        target = os.path.join(self.left, file.name)
        while os.path.lexists(target):
            target += ".older"
        os.rename(self.path(file), target)
        fsync_directory(self.left)
        fsync_directory(self.spool)
        say(f"{file.name} is put aside as {target}: {why}")

    def switches(self, timeline: int) -> list[Switch]:
        """Ancestors of a timeline that we have followed, from the spool's or the archive's history file."""
        if timeline == 1:
            return []
        name = history_name(timeline)
        for path in (os.path.join(self.spool, name), self.folder.wal_path(WalFile.parse(name), self.chapter)):
            with contextlib.suppress(FileNotFoundError), codec.open_reader(path, self.folder.tree) as reader:
                return parse_history(timeline, reader.read().decode(errors="replace"))
        raise PitrError(f"{name} is neither in {self.spool} nor in the archive, so it is not known where to go on.")


class Receiver:
    """The supervisor of one cluster."""

    def __init__(self, repository: str, cluster: str, compression: str, settings: Settings) -> None:
        self._repository = repository
        self._cluster = cluster
        self._compression = compression
        self._settings = settings
        self._primary = Primary(settings)
        self._place: _Place | None = None
        self._process: Any = None
        self._lock = -1
        self._stream_lock = -1
        self._ending = False
        self._wake = -1
        self._unfinished = b""
        self._archived: dict[str, tuple[str, int, int]] = {}
        # Name to (when to try again, what was wrong).
        self._waiting: dict[str, tuple[float, str]] = {}
        self._removed = ""
        self._status: dict[str, Any] = {}
        self._told: dict[str, Any] = {}
        self._told_at = 0.0

    # --- life

    def run(self) -> int:
        """Until SIGTERM or SIGINT. Raises PitrError when it cannot even begin."""
        self._hold(self._open())
        self._listen()
        self._take_over()
        self._begin_status()
        pause = FIRST_PAUSE
        while not self._ending:
            began = time.monotonic()
            try:
                self._receive()
            except (PitrError, OSError, ValueError) as error:
                text = _words(error)
                if text != self._status.get("last_error"):
                    say(text)
                state = "refused" if isinstance(error, WrongServerError) else "waiting"
                self._tell(state=state, connected_since=None, last_error=text, last_error_at=_now())
            if time.monotonic() - began > LONGEST_PAUSE:
                pause = FIRST_PAUSE
            self._idle(pause)
            pause = min(pause * 2, LONGEST_PAUSE)
        self._sweep()
        self._tell(state="stopped", connected_since=None)
        os.close(self._lock)
        say("ended")
        return 0

    def _hold(self, place: _Place) -> bool:
        """Hold the lock of the folder that is there. Returns whether it had to be taken.

        A repository that was lost and made anew has other files under the same names. Whoever looks for a receiver
        there would find none, and start a second one. Raises PitrError when there is one.
        """
        path = lock_path(place.folder)
        if self._lock >= 0:
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._lock), os.stat(path)):
                    return False
        lock = try_lock(path)
        if lock is None:
            raise PitrError(f"A receiver of the cluster '{self._cluster}' is running already. This one ends.")
        if self._lock >= 0:
            os.close(self._lock)
        self._lock = lock
        return True

    def _listen(self) -> None:
        """Signals only wake the loop, which looks what there is to do."""
        self._wake, target = os.pipe()
        os.set_blocking(self._wake, False)
        os.set_blocking(target, False)
        signal.set_wakeup_fd(target, warn_on_full_buffer=False)

        def end(_signal: int, _frame: object) -> None:
            self._ending = True

        signal.signal(signal.SIGTERM, end)
        signal.signal(signal.SIGINT, end)
        signal.signal(signal.SIGCHLD, lambda _signal, _frame: None)

    def _open(self) -> _Place:
        self._place = _Place(self._repository, self._cluster)
        return self._place

    def _take_over(self) -> None:
        """End a pg_receivewal whose supervisor was killed; what it has received lies in the spool."""
        place = self._place or self._open()
        path = lock_path(place.folder, STREAM_LOCK_FILE)
        deadline = time.monotonic() + ENDING
        asked: set[int] = set()
        while True:
            lock = try_lock(path)
            if lock is not None:
                self._stream_lock = lock
                return
            late = time.monotonic() > deadline
            for pid in holders(path):
                if pid not in asked or late:
                    say(f"process {pid} is left over from a receiver that was killed, and is ended")
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL if late else signal.SIGINT)
                    asked.add(pid)
            if not asked and late:
                raise PitrError(f"{path} is held by a process of another user or host. End the receiver there first.")
            time.sleep(0.05)

    def _idle(self, seconds: float) -> None:
        """Wait, but go on carrying finished files into the archive."""
        deadline = time.monotonic() + seconds
        while not self._ending and time.monotonic() < deadline:
            self._sweep()
            self._sleep(min(TICK, max(0.0, deadline - time.monotonic())))

    def _sleep(self, seconds: float, *descriptors: int) -> None:
        """Until a signal arrives or one of the descriptors has something to read."""
        with contextlib.suppress(InterruptedError):
            ready = select.select([self._wake, *descriptors], [], [], seconds)[0]
            if self._wake in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._wake, 4096)

    # --- one connection

    def _receive(self) -> None:
        """One connection from the first question to its end. Always ends by raising, unless we are asked to end."""
        place = self._open()
        if self._hold(place):
            os.close(self._stream_lock)
            self._take_over()
        self._tell(state="connecting")
        facts = self._primary.identify()
        if facts.system_identifier != place.chapter.system_identifier:
            raise WrongServerError(
                f"{self._primary} has the system identifier {facts.system_identifier}; {place.folder.path} belongs to"
                f" {place.chapter.system_identifier}. Refused; nothing was received."
            )
        if not self._primary.is_accepted():
            raise WrongServerError(
                f"{self._primary} was restored and is not accepted yet; nothing is received from it until it is."
            )
        self._tidy(place)
        self._prepare(place, facts)
        self._stream(place, facts)

    def _tidy(self, place: _Place) -> None:
        """Take away what pg_receivewal would stumble over."""
        for file in place.files():
            path = place.path(file)
            size = os.stat(path).st_size
            if size == place.size:
                with open(path, "rb") as stream:
                    head = stream.read(SegmentHeader.SIZE)
                with contextlib.suppress(PitrError):
                    identifier = SegmentHeader(head).system_identifier
                    if identifier != place.chapter.system_identifier:
                        place.put_aside(file, f"it is of the cluster with system identifier {identifier}")
            elif size and file.partial and _is_zero(path):
                # pg_receivewal was killed while it filled the file with zeros, before any WAL was in it.
                os.unlink(path)
                fsync_directory(place.spool)
            elif size or not file.partial:
                place.put_aside(file, f"it has {size} bytes instead of {place.size}")

    def _prepare(self, place: _Place, facts: Facts) -> None:
        """A slot, and a spool that makes pg_receivewal begin where nothing is left out."""
        files = place.files()
        here = behind(files)
        if here is not None and facts.timeline < here.timeline:
            raise WrongServerError(
                f"{self._primary} is on timeline {facts.timeline}, and timeline {here.timeline} was received already:"
                " it is an old primary, or a standby that does not follow. Refused; nothing was received."
            )
        self._ensure_slot(here)
        if here is None:
            return
        start = here
        if facts.timeline > here.timeline:
            ours: list[Span] = ancestry(here.timeline, place.switches(here.timeline))
            theirs = ancestry(facts.timeline, self._primary.history(facts.timeline))
            start = next_start(here, ours, theirs, place.size)
        if self._removed and self._removed == segment_name(start.timeline, start.number, place.size):
            start = self._jump(place, start)
        self._removed = ""
        if start == here and not in_front(files, start):
            return
        for file in in_front(files, start):
            why = f"receiving goes on with {segment_name(start.timeline, start.number, place.size)}"
            if not file.partial and self._push(place, place.path(file)):
                self._remove(place.path(file))
            else:
                place.put_aside(file, why)
        seed = os.path.join(place.spool, seed_name(start, place.size))
        with contextlib.suppress(FileExistsError):
            os.close(os.open(seed, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        fsync_directory(place.spool)

    def _ensure_slot(self, here: Start | None) -> tuple[str, int]:
        """The slot's (LSN, timeline). One that keeps nothing any more is told by name and made anew."""
        name = self._settings.slot
        slot = self._primary.slot()
        if slot is not None and not slot[0]:
            lost = (
                f"The replication slot {name} keeps no WAL any more: the server has invalidated it"
                " (max_slot_wal_keep_size), or nobody has ever received by it. It is made anew."
            )
            if here is not None:
                self._tell(slot_lost_at=_now())
                self._complain(lost)
            self._primary.drop_slot()
            slot = None
        if slot is None:
            self._primary.create_slot()
            say(f"the replication slot {name} was made")
            slot = self._primary.slot()
        if slot is None or not slot[0]:
            raise PitrError(f"{self._primary} made the replication slot {name}, but it keeps no WAL.")
        return slot

    def _jump(self, place: _Place, start: Start) -> Start:
        """The server has said that it has removed the segment we want: go on with the oldest it keeps, and say so.

        By asking for that segment we have told the slot we are there (PhysicalConfirmReceivedLocation moves it back
        as well), so that only a new slot tells what is kept.
        """
        self._primary.drop_slot()
        slot = self._ensure_slot(None)
        number = Lsn.parse(slot[0]).segment_number(place.size)
        if number <= start.number:
            return start
        first = segment_name(start.timeline, start.number, place.size)
        last = segment_name(slot[1] or start.timeline, number - 1, place.size)
        missing = first if first == last else f"{first} to {last}"
        self._tell(not_received=missing, not_received_at=_now())
        self._complain(
            f"The server has removed {missing}, which was not received. archive_command may have archived it;"
            " archive_info tells what is missing. Take a base backup when something is."
        )
        return Start(slot[1] or start.timeline, number)

    def _stream(self, place: _Place, facts: Facts) -> None:
        import subprocess

        settings = self._settings
        argv = [self._primary.program("pg_receivewal"), f"--directory={place.spool}", f"--slot={settings.slot}"]
        argv += ["--no-loop", "--no-password", "--verbose", "--dbname", self._primary.conninfo()]
        if settings.synchronous:
            argv.append("--synchronous")
        source, target = os.pipe()
        try:
            self._process = subprocess.Popen(
                argv,
                env=self._primary.environment(),
                stdin=subprocess.DEVNULL,
                stdout=target,
                stderr=target,
                pass_fds=(self._stream_lock,),
                # SIGPIPE stays ignored: when we are killed it goes on receiving, though nobody hears it any more.
                restore_signals=False,
            )
        finally:
            os.close(target)
        os.set_blocking(source, False)
        said: list[str] = []
        begun = behind(place.files())
        try:
            while self._process.poll() is None and not self._ending:
                self._listen_to(source, said)
                self._look(place, facts)
                self._sleep(TICK, source)
            self._end_process()
            self._listen_to(source, said, final=True)
        finally:
            self._end_process()
            os.close(source)
        self._tell(connected_since=None)
        if self._ending:
            return
        self._sweep()
        text = " ".join(said[-6:])
        if begun is not None:
            wanted = segment_name(begun.timeline, begun.number, place.size)
            # The server's words are in the language of the server; the name of the segment is not.
            if any("stream: " in line and wanted in line and not _is_trouble(line, wanted) for line in said):
                self._removed = wanted
        raise PitrError(f"pg_receivewal ended with exit code {self._process.returncode}: {text[-1000:] or 'no word'}")

    def _listen_to(self, source: int, said: list[str], final: bool = False) -> None:
        """Read what pg_receivewal says; errors are kept, everything goes to the log.

        It writes a line in pieces, so one that is not whole waits for the rest unless this is the ``final`` look.
        """
        with contextlib.suppress(BlockingIOError):
            while True:
                data = os.read(source, 65536)
                if not data:
                    break
                self._unfinished += data
        lines = self._unfinished.split(b"\n")
        self._unfinished = b"" if final else lines.pop()
        for raw in lines:
            line = raw.decode(errors="replace")
            text = _PREFIX.sub("", line).strip()
            if text:
                say(f"pg_receivewal: {text}")
                if "error:" in line or "fatal:" in line or not line.startswith("pg_receivewal"):
                    said.append(text)

    def _end_process(self) -> None:
        """SIGINT, upon which pg_receivewal flushes what it has and ends (15 knows no other), then SIGKILL."""
        process = self._process
        if process is None or process.poll() is not None:
            return
        process.send_signal(signal.SIGINT)
        deadline = time.monotonic() + ENDING
        while process.poll() is None:
            if time.monotonic() > deadline:
                process.kill()
            time.sleep(0.02)

    # --- what has come

    def _look(self, place: _Place, facts: Facts) -> None:
        """Archive what is finished, and tell how far we are."""
        self._sweep()
        files = place.files()
        if not files:
            return
        newest = max(files, key=lambda file: (file.timeline, file.rank))
        try:
            reach = place.reach(newest) if newest.partial else Lsn((newest.number + 1) * place.size)
        except FileNotFoundError:
            # Finished, and renamed, since we have looked.
            return
        if reach is None:
            reach = Lsn(newest.number * place.size)
        # The page of the last byte that the server had when we asked has come.
        page = max(int(facts.lsn) - 1, 0) // 8192
        caught_up = newest.timeline >= facts.timeline and int(reach) > page * 8192
        changes: dict[str, Any] = {"timeline": newest.timeline, "received_lsn": str(reach)}
        if caught_up and self._status.get("state") != "streaming":
            changes.update(state="streaming", connected_since=_now(), last_error="")
        elif not caught_up and self._status.get("state") != "streaming":
            changes.update(state="catching up")
        self._tell(**changes)

    def _sweep(self) -> None:
        """Carry finished segments and history files into the archive; all but the newest segment leave the spool."""
        place = self._place
        if place is None:
            return
        try:
            names = os.listdir(place.spool)
            for name in sorted(name for name in names if name.endswith(".history") and not name.startswith(".")):
                self._push(place, os.path.join(place.spool, name))
            finished = [file for file in segments(names, place.size) if not file.partial]
            finished.sort(key=lambda file: (file.timeline, file.number))
            for file in finished:
                if self._push(place, place.path(file)):
                    end = Lsn((file.number + 1) * place.size)
                    self._status.update(archived_segment=file.name, archived_lsn=str(end))
                    if file is not finished[-1]:
                        self._remove(place.path(file))
                self._tell()
                if self._ending and self._process is not None and self._process.poll() is None:
                    # First end pg_receivewal; the rest is done afterwards.
                    return
            self._sweep_left(place, segments(names, place.size))
        except (PitrError, OSError) as error:
            self._complain(_words(error))

    def _sweep_left(self, place: _Place, files: list[SpoolFile]) -> None:
        """Finished segments that were put aside still belong into the archive; partial ones of older timelines go."""
        for name in os.listdir(place.left):
            path = os.path.join(place.left, name)
            if len(name) == 24 and self._push(place, path):
                self._remove(path)
        newest = max((file.timeline for file in files), default=0)
        for file in files:
            if not file.partial or file.timeline == newest:
                continue
            after = [item for item in place.switches(newest) if item.timeline == file.timeline]
            heir = ancestry(newest, place.switches(newest))
            follower = [span.timeline for span in heir if span.timeline > file.timeline]
            # As long as the archive lacks the segment of the next timeline this file has the only copy of its WAL.
            if not after or not follower or not place.stored(segment_name(follower[0], file.number, place.size)):
                continue
            reach = place.reach(file)
            if reach is None or reach <= after[0].lsn:
                os.unlink(place.path(file))
            else:
                place.put_aside(file, f"timeline {file.timeline} was left at {after[0].lsn}, it goes on to {reach}")

    def _push(self, place: _Place, path: str) -> bool:
        """Archive one file of the spool. What is refused waits, is told, and stops nothing else."""
        name = os.path.basename(path)
        try:
            status = os.stat(path)
        except FileNotFoundError:
            return False
        # Another chapter, or what was put aside, may have another file of this name.
        very_file = (path, status.st_ino, status.st_mtime_ns)
        if self._archived.get(name) == very_file:
            return True
        again, _why = self._waiting.get(name, (0.0, ""))
        if time.monotonic() < again:
            return False
        try:
            archive.push(path, self._repository, self._cluster, self._compression)
        except (PitrError, OSError) as error:
            why = _words(error)
            if self._waiting.get(name, (0.0, ""))[1] != why:
                self._complain(why)
            self._waiting[name] = (time.monotonic() + LONGEST_PAUSE, why)
            self._tell()
            return False
        self._waiting.pop(name, None)
        self._archived[name] = very_file
        return True

    def _remove(self, path: str) -> None:
        """Take a file that is archived out of the spool."""
        os.unlink(path)
        self._archived.pop(os.path.basename(path), None)

    # --- status

    def _begin_status(self) -> None:
        """What must not be forgotten comes from the last life."""
        place = self._place or self._open()
        old = read_status(place.folder)
        kept = ("slot_lost_at", "not_received", "not_received_at", "archived_segment", "archived_lsn", "received_lsn")
        self._status = {name: old.get(name) for name in kept}
        self._status.update(
            format=1,
            pid=os.getpid(),
            host=os.uname().nodename,
            started_at=_now(),
            slot=self._settings.slot,
            application_name=self._settings.application_name,
            synchronous=self._settings.synchronous,
            timeline=old.get("timeline"),
            connected_since=None,
            last_error="",
            last_error_at=None,
            state="starting",
        )
        self._tell(state="starting")

    def _complain(self, text: str) -> None:
        if text != self._status.get("last_error"):
            say(text)
        self._tell(last_error=text, last_error_at=_now())

    def _tell(self, **changes: Any) -> None:
        """Write the status when something has changed; the position alone at most once a second."""
        self._status.update(changes)
        self._status["not_archived"] = {name: why for name, (_again, why) in sorted(self._waiting.items())}
        if self._status == self._told or self._place is None:
            return
        quiet = ("received_lsn", "archived_segment", "archived_lsn")
        loud = any(self._status[name] != self._told.get(name) for name in self._status if name not in quiet)
        if loud or time.monotonic() - self._told_at > 1:
            self._told = dict(self._status)
            self._told_at = time.monotonic()
            with contextlib.suppress(OSError):
                _replace(status_path(self._place.folder), {**self._status, "updated_at": _now()})


def status_path(folder: ClusterFolder) -> str:
    """Where the status of the cluster's receiver lies."""
    return os.path.join(folder.path, SPOOL, STATUS_FILE)


def read_status(folder: ClusterFolder) -> dict[str, Any]:
    """What the receiver last said of itself; empty when there never was one."""
    with contextlib.suppress(OSError, ValueError):
        value = json.loads(folder.tree.read(status_path(folder)))
        if isinstance(value, dict):
            return value
    return {}


def _words(error: BaseException) -> str:
    if isinstance(error, PitrError):
        return error.message
    if isinstance(error, OSError):
        return f"{error.filename or 'The system'}: {error.strerror}."
    return f"The answer of a program was not understood: {error}."


def _is_zero(path: str) -> bool:
    with open(path, "rb") as stream:
        while True:
            data = stream.read(codec.CHUNK)
            if not data:
                return True
            if data.rstrip(b"\0"):
                return False


def main(directory: str, cluster: str, repository: str, compression: str) -> int:
    """The command ``pitr-wal receive``; ends with SIGTERM. Raises PitrError when it cannot begin."""
    return Receiver(repository, cluster, compression, read_settings(directory, cluster)).run()
