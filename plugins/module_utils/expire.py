# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Removing what retention.py says may go, in an order in which a kill at any moment harms nothing.

A backup becomes invisible by a rename, then its files go; only when all that should go is gone does WAL go, each
timeline from its beginning. So what is visible can always be restored, and the next run takes up what this one has
left.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
from typing import Any

from . import locks
from .catalog import Backup
from .errors import PitrError
from .index import ArchiveIndex, scan
from .info import range_bytes
from .repository import BACKUP_FILE, Chapter, ClusterFolder, write_json
from .retention import Circumstances, ExpirePlan, Floor, Policy, WalRange, plan
from .sizes import Sizes
from .stored import KEEP_FILE, damaged_backups, keep_mark, stored_backups
from .tree import fsync_directory
from .wal import Lsn, WalFile, is_log

SUFFIX = ".expired"
MAX_LISTED = 100


class Expiry:
    """One run of retention over one chapter of a cluster's folder, on the repository host."""

    def __init__(
        self,
        folder: ClusterFolder,
        policy: Policy,
        chapter: Chapter | None = None,
        now: datetime.datetime | None = None,
    ) -> None:
        """``now``: with its zone; this host's clock when it is left out."""
        self._folder = folder
        self._chapter = chapter or folder.chapter
        self._policy = policy
        self._now = now or datetime.datetime.now(datetime.timezone.utc)

    def run(self, check: bool = False) -> dict[str, Any]:
        """Plan, and unless ``check`` remove. Returns what went, or would go, and what stays and why.

        Raises PitrError when another expire is running, and when something could not be removed; then no WAL was.
        """
        if not os.path.isdir(self._folder.backups_path):
            raise PitrError(
                f"{self._folder.backups_path} does not exist. Is the repository mounted? Nothing was removed."
            )
        with contextlib.ExitStack() as stack:
            if not check:
                try:
                    stack.enter_context(locks.held(self._folder, locks.EXPIRE))
                except locks.InUseError:
                    raise PitrError(
                        f"Another expire of {self._folder.path} is running. Nothing was removed by this one."
                    ) from None
                except OSError as error:
                    raise PitrError(
                        f"{self._folder.locks_path} cannot be used for locks: {error.strerror}. Without them a restore"
                        " could lose what it reads. Nothing was removed."
                    ) from None
            leftovers = [] if self._policy.is_empty else self._leftovers()
            index = scan(self._folder, self._chapter)
            result = self._plan(index, stack, check)
            archive = self._folder.archive_path(self._chapter)
            borders = {index.name(item.timeline, item.last + 1)[:16] for item in result.wal}
            # Whole folders of what goes; the one at the border is looked at name by name.
            logs = [log for log in index.logs if any(log[:8] == border[:8] and log < border for border in borders)]
            stored = Sizes(archive, logs).result()
            outcome = self._tell(result, index, leftovers, stored)
            if not check:
                self._remove_backups(result, leftovers)
                for item in result.wal:
                    self._remove_wal(index, item)
                locks.forget_stale_leases(self._folder)
        return outcome

    # --- what to do

    def _leftovers(self) -> list[str]:
        """Directories of backups whose removal was begun."""
        names = self._folder.tree.names(self._folder.backups_path)
        return [name for name in names if name.startswith(".") and name.endswith(SUFFIX)]

    def _plan(self, index: ArchiveIndex, stack: contextlib.ExitStack, check: bool) -> ExpirePlan:
        """The plan, after nobody can begin to read what it removes any more.

        The lock comes first and the look at the leases after it: a restore writes its lease before it asks for the
        lock.
        """
        identifier = self._chapter.system_identifier
        written = self._written(index)
        locked: set[str] = set()
        busy: dict[str, str] = {}
        while True:
            # Anew each time: a backup that was taken meanwhile may build upon one that was to go.
            backups = [b for b in stored_backups(self._folder) if b.system_identifier == identifier]
            damaged = damaged_backups(self._folder, backups)
            held = {**self._held(backups), **busy}
            taken, unclear = floors(self._folder)
            doubts = [f"the backup {label} is being taken and does not tell what it needs" for label in unclear]
            known = {backup.label for backup in stored_backups(self._folder)}
            for label, lease in locks.leases(self._folder).items():
                if label not in known:
                    doubts.append(f"a recovery ({lease}) uses the backup {label}, which is not here")
            circumstances = Circumstances(damaged, held, taken, written, doubts)
            result = plan(backups, index, self._policy, self._now, circumstances)
            fresh = [backup.label for backup in result.remove if backup.label not in locked]
            if not fresh:
                return result
            for label in fresh:
                try:
                    if check:
                        # Nobody may be refused because somebody looks.
                        locks.probe_use(self._folder, label)
                    else:
                        stack.enter_context(locks.exclusive_use(self._folder, label))
                    locked.add(label)
                except locks.InUseError:
                    busy[label] = "a restore, or a backup that will build upon it, is reading it"

    def _held(self, backups: list[Backup]) -> dict[str, str]:
        """Label to who holds it: keep marks, leases, and files of somebody else in its directory."""
        found = {}
        leases = locks.leases(self._folder)
        for backup in backups:
            mark = keep_mark(self._folder, backup.label)
            strange = self._strange_files(backup)
            if strange:
                found[backup.label] = f"its directory holds files that are not of the backup: {', '.join(strange)}"
            if mark is not None:
                found[backup.label] = f"keep mark: {mark}"
            if backup.label in leases:
                found[backup.label] = f"a recovery replays from it ({leases[backup.label]})"
        return found

    def _strange_files(self, backup: Backup) -> list[str]:
        ours = {BACKUP_FILE, KEEP_FILE, *(file.name for file in backup.files)}
        names = os.listdir(os.path.join(self._folder.backups_path, backup.label))
        return sorted(name for name in names if name not in ours and not name.startswith("."))

    def _written(self, index: ArchiveIndex) -> dict[int, datetime.datetime]:
        """When the last segment of each timeline was stored; not before it was written."""
        result = {}
        for timeline in index.timelines:
            last = index.last(timeline)
            if last is not None:
                path = self._folder.wal_path(WalFile.parse(index.name(timeline, last)), self._chapter)
                with contextlib.suppress(FileNotFoundError):
                    seconds = self._folder.tree.stat(path).mtime
                    result[timeline] = datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc)
        return result

    def _tell(
        self, result: ExpirePlan, index: ArchiveIndex, leftovers: list[str], stored: dict[str, int]
    ) -> dict[str, Any]:
        archive = self._folder.archive_path(self._chapter)
        ranges = [
            {
                "timeline": item.timeline,
                "first": index.name(item.timeline, item.first),
                "last": index.name(item.timeline, item.last),
                "segments": item.segments,
                "bytes": range_bytes(archive, index, item, stored),
            }
            for item in result.wal
        ]
        attached = [each.place for each in index.attached if any(_covers(item, each) for item in result.wal)]
        return {
            **result.to_dict(),
            "changed": bool(result.remove or result.wal or leftovers),
            "chapter": self._chapter.number,
            "leftovers": leftovers,
            "expired_segments": {
                "count": sum(item.segments for item in result.wal),
                "bytes": sum(item["bytes"] for item in ranges if isinstance(item["bytes"], int)),
                "ranges": ranges[:MAX_LISTED],
                "attached": [os.path.basename(place) for place in attached[:MAX_LISTED]],
            },
            "unknown_files": index.unknown[:MAX_LISTED],
        }

    # --- doing it

    def _remove_backups(self, result: ExpirePlan, leftovers: list[str]) -> None:
        """Raises PitrError when one could not be removed, after all others were tried."""
        failures: list[str] = []
        gone: list[str] = []
        failed: set[str] = set()
        for name in leftovers:
            self._try_removal(os.path.join(self._folder.backups_path, name), failures)
        for backup in result.remove:
            if any(child.parent == backup.label and child.label in failed for child in result.remove):
                # Something that builds upon it is still visible.
                failed.add(backup.label)
                continue
            visible = os.path.join(self._folder.backups_path, backup.label)
            hidden = os.path.join(self._folder.backups_path, f".{backup.label}{SUFFIX}")
            try:
                os.rename(visible, hidden)
                fsync_directory(self._folder.backups_path)
            except OSError as error:
                failed.add(backup.label)
                failures.append(f"{visible}: {error.strerror}")
                continue
            if self._try_removal(hidden, failures):
                gone.append(backup.label)
        if failures:
            raise PitrError(
                f"Not everything could be removed: {'; '.join(failures)}. No WAL was removed. Mend that and run expire"
                " again; it takes up what is left.",
                removed=gone,
                failures=failures,
            )

    def _try_removal(self, directory: str, failures: list[str]) -> bool:
        """Remove a hidden directory of plain files. Adds what prevents it to ``failures``."""
        try:
            for name in sorted(os.listdir(directory)):
                os.unlink(os.path.join(directory, name))
            os.rmdir(directory)
            fsync_directory(self._folder.backups_path)
        except OSError as error:
            failures.append(f"{error.filename or directory}: {error.strerror}")
            return False
        return True

    def _remove_wal(self, index: ArchiveIndex, item: WalRange) -> None:
        """Remove a timeline's beginning, in ascending order: what is left after a kill has no hole."""
        archive = self._folder.archive_path(self._chapter)
        border = index.name(item.timeline, item.last + 1)
        attached = {each.place for each in index.attached if _covers(item, each)}
        for log in index.logs:
            if log[:8] != border[:8] or log > border[:16]:
                continue
            directory = os.path.join(archive, log)
            with contextlib.suppress(FileNotFoundError):
                for name in sorted(os.listdir(directory)):
                    whole = len(name) == 24 and is_log(name[:16]) and name < border
                    if (whole and name[:16] == log and f"{log}/{name}" not in index.unknown) or (
                        f"{log}/{name}" in attached
                    ):
                        with contextlib.suppress(FileNotFoundError):
                            os.unlink(os.path.join(directory, name))
                fsync_directory(directory)
                if log < border[:16]:
                    # Not empty when something lies in it that is not ours.
                    with contextlib.suppress(OSError):
                        os.rmdir(directory)
                        fsync_directory(archive)


def floors(folder: ClusterFolder) -> tuple[list[Floor], list[str]]:
    """Backups being taken now, and the labels of those that do not tell from where they need WAL."""
    found: list[Floor] = []
    unclear: list[str] = []
    for label, text in locks.taken(folder):
        try:
            value = json.loads(text or "")
            found.append(Floor(int(value["timeline"]), Lsn.parse(value["lsn"]), label))
        except (ValueError, KeyError, TypeError, PitrError):
            unclear.append(label)
    return found, unclear


def _covers(item: WalRange, attached: Any) -> bool:
    return bool(attached.timeline == item.timeline and attached.number <= item.last)


def set_mark(folder: ClusterFolder, label: str, reason: str | None, check: bool = False) -> bool:
    """Set (with a reason) or remove (None) the keep mark of a backup. Returns whether that is a change.

    Raises PitrError when there is no such backup.
    """
    labels = [backup.label for backup in stored_backups(folder)]
    if label not in labels:
        raise PitrError(f"There is no backup '{label}'. There are: {', '.join(labels) or 'none'}. Nothing was changed.")
    path = os.path.join(folder.backups_path, label, KEEP_FILE)
    if keep_mark(folder, label) == reason:
        return False
    if check:
        return True
    try:
        # An expire that is running has decided already; whoever marks wants to be sure.
        with locks.reading(folder, label):
            if not os.path.exists(os.path.join(folder.backups_path, label, BACKUP_FILE)):
                raise locks.InUseError(label)
            if reason is None:
                os.unlink(path)
                fsync_directory(os.path.dirname(path))
            else:
                since = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
                write_json(path, {"format": 1, "reason": reason, "since": since})
    except locks.InUseError:
        raise PitrError(f"The backup {label} is just being removed by an expire. Nothing was changed.") from None
    return True


def as_diff(result: dict[str, Any]) -> dict[str, str]:
    """What was there and what stays, for ``--diff``."""
    kept = [f"backup {item['backup']}" for item in result["kept_backups"]]
    going = [f"backup {item['backup']}" for item in result["expired_backups"]]
    going += [f"left behind {name}" for name in result["leftovers"]]
    going += [
        f"WAL {item['first']} to {item['last']}, {item['segments']} segments, {item['bytes']} bytes"
        for item in result["expired_segments"]["ranges"]
    ]
    return {
        "before": "".join(f"{line}\n" for line in sorted(kept + going)),
        "after": "".join(f"{line}\n" for line in sorted(kept)),
    }
