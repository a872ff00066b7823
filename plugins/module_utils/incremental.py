# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a new backup builds upon: whether it can be incremental, upon which parent, and what its server needs for that.

An incremental backup needs three things: the parent's manifest, the server's WAL summaries from the parent's start on
(``summarize_wal``), and a parent that is part of the server's own past (PrepareForIncrementalBackup of
basebackup_incremental.c). All that can be asked before the copy begins is asked here.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import codec, extract, locks
from .backup import BasisError
from .catalog import Backup, broken_chains, chain
from .errors import PitrError
from .postgres import Login, query
from .reach import spans_from
from .repository import BACKUP_FILE, ClusterFolder
from .retention import parse_window
from .stored import MANIFEST, damaged_backups, open_tar, stored_backups
from .timeline import TimelineTree, parse_history
from .wal import Lsn

FULL, INCREMENTAL, AUTO = KINDS = ("full", "incremental", "auto")
# The first version that takes them.
SINCE = 17
# So much earlier than full_every, a twentieth of it but at most this, a full backup is due: a nightly one does not wait
# for another night because it began some seconds earlier than the last time.
EARLY = datetime.timedelta(hours=1)
# Each link has to be read for a restore, and one that is damaged takes all later ones with it.
MAX_CHAIN = 24
# INCREMENTAL_MAGIC of incremental_backup.h, with the number of blocks and the truncation length behind it.
_MAGIC = 0xD3AE1F0D
_HEADER = struct.Struct("=III")
_BLOCK = 8192


@dataclass(frozen=True)
class Choice:
    """What is to be taken: ``parent`` is None for a full backup. ``reason`` tells why, for people."""

    parent: Backup | None = None
    reason: str = ""

    @property
    def type(self) -> str:
        """As in ``backup.json``."""
        return FULL if self.parent is None else INCREMENTAL


class Basis:
    """What was asked for, and the way to it. :class:`.backup.BaseBackup` asks it."""

    def __init__(
        self,
        folder: ClusterFolder,
        login: Login,
        kind: str = INCREMENTAL,
        parent: str = "",
        full_every: str = "",
        max_chain: int = MAX_CHAIN,
    ) -> None:
        """``parent``: a label, empty for the newest that will do. ``full_every`` and ``max_chain`` matter for ``auto``.

        ``full_every`` as parse_window reads it, empty for never. Raises PitrError when the options contradict.
        """
        if parent and kind != INCREMENTAL:
            raise PitrError(f"parent names the backup '{parent}', and the type is {kind}. No backup was taken.")
        if max_chain < 0:
            raise PitrError(f"max_chain is {max_chain}; 0 means no limit. No backup was taken.")
        self._folder = folder
        self._login = login
        self._kind = kind
        self._parent = parent
        self._every = parse_window(full_every, "full_every", "No backup was taken.") if full_every else None
        self._max_chain = max_chain

    @property
    def may_be_full(self) -> bool:
        """Whether a full backup will do, too."""
        return self._kind == AUTO

    def choose(self, connection: Any, facts: Mapping[str, Any]) -> Choice:
        """Decide. ``facts`` are those of BaseBackup.check. Raises PitrError when what was asked for cannot be had."""
        if self._kind == FULL:
            return Choice()
        try:
            return self._incremental(connection, facts)
        except BasisError as error:
            if self._kind != AUTO:
                raise PitrError(f"{error.message} No backup was taken.", **error.detail) from None
            return Choice(None, error.message)

    def _incremental(self, connection: Any, facts: Mapping[str, Any]) -> Choice:
        if facts["version"] < SINCE:
            raise BasisError(f"PostgreSQL {facts['version']} takes no incremental backups; they begin with {SINCE}.")
        tree, timeline, lsn = self._position()
        backups = stored_backups(self._folder)
        problems = broken_chains(backups, damaged_backups(self._folder, backups))
        if self._parent:
            parent = self._named(backups, problems, facts, tree, timeline, lsn)
        else:
            parent = self._newest(backups, problems, facts, tree, timeline, lsn)
        if self._kind == AUTO:
            self._full_is_due(parent, backups, facts["now"])
        if facts["summarize_wal"] != "on":
            raise BasisError(
                f"{self._login} has summarize_wal = off, and an incremental backup needs WAL summaries from its"
                " parent's start on. Set it on (role variable primary_summarize_wal) and take a full backup first."
            )
        self._check_summaries(connection, parent, tree, timeline)
        self._check_key(parent)
        return Choice(
            parent, f"{parent.label} is the newest backup that it can build upon." if not self._parent else ""
        )

    # --- which parent

    def _position(self) -> tuple[TimelineTree, int, Lsn]:
        """The server's own past, its timeline, and how far it has come, over the replication protocol."""
        with contextlib.closing(self._login.connect(replication=True)) as connection:
            _identifier, timeline, lsn, _database = query(connection, "IDENTIFY_SYSTEM")[0]
            histories = {}
            if int(timeline) > 1:
                content = query(connection, f"TIMELINE_HISTORY {int(timeline)}")[0][1]
                data = content.encode() if isinstance(content, str) else bytes(content)
                histories[int(timeline)] = parse_history(int(timeline), data.decode(errors="replace"))
        return TimelineTree(histories), int(timeline), Lsn.parse(lsn)

    def _why_not(self, backup: Backup, facts: Mapping[str, Any], tree: TimelineTree, timeline: int, lsn: Lsn) -> str:
        """What prevents that a backup of this server builds upon this one; empty when nothing does."""
        if backup.system_identifier != facts["system_identifier"]:
            return (
                f"is of the cluster with system identifier {backup.system_identifier}, an older chapter; the server is"
                f" {facts['system_identifier']}"
            )
        if backup.type not in (FULL, INCREMENTAL) or not any(f.name.startswith(MANIFEST) for f in backup.files):
            return "was not taken by pg_basebackup with a manifest"
        if not tree.contains(timeline, backup.timeline, backup.stop_lsn):
            return (
                f"ended on timeline {backup.timeline} at LSN {backup.stop_lsn}, which is not part of the past of the"
                f" server's timeline {timeline}"
            )
        if backup.own_wal:
            return "was taken offline; pg_combinebackup wants a backup_label, which such a backup has not"
        if backup.stop_lsn > lsn:
            return f"ended at LSN {backup.stop_lsn}, and the server is only at {lsn}: it was set back since"
        return ""

    def _named(
        self,
        backups: Sequence[Backup],
        problems: Mapping[str, str],
        facts: Mapping[str, Any],
        tree: TimelineTree,
        timeline: int,
        lsn: Lsn,
    ) -> Backup:
        found = [backup for backup in backups if backup.label == self._parent]
        if not found:
            labels = ", ".join(backup.label for backup in backups) or "none"
            raise BasisError(f"There is no backup '{self._parent}' to build upon. There are: {labels}.")
        why = self._why_not(found[0], facts, tree, timeline, lsn)
        if why:
            raise BasisError(f"The parent {self._parent} {why}.")
        if self._parent in problems:
            raise BasisError(f"The parent {self._parent} cannot be built upon: {problems[self._parent]}.")
        return found[0]

    def _newest(
        self,
        backups: Sequence[Backup],
        problems: Mapping[str, str],
        facts: Mapping[str, Any],
        tree: TimelineTree,
        timeline: int,
        lsn: Lsn,
    ) -> Backup:
        reasons = {b.label: self._why_not(b, facts, tree, timeline, lsn) or problems.get(b.label, "") for b in backups}
        usable = [backup for backup in backups if not reasons[backup.label]]
        if usable:
            return max(usable, key=lambda backup: (backup.stop_lsn, backup.stopped_at))
        if not backups:
            raise BasisError("There is no backup to build upon yet.")
        newest = backups[-1].label
        raise BasisError(f"None of {len(backups)} backups can be built upon; the newest, {newest}: {reasons[newest]}.")

    def _full_is_due(self, parent: Backup, backups: Sequence[Backup], now: datetime.datetime) -> None:
        links = chain(parent, {backup.label: backup for backup in backups})
        if self._every is not None:
            age = now - links[0].started_at
            if age >= self._every - min(EARLY, self._every / 20):
                hours = age.total_seconds() / 3600
                raise BasisError(f"The full backup {links[0].label} is {hours:.1f} hours old, so that another is due.")
        if self._max_chain and len(links) - 1 >= self._max_chain:
            raise BasisError(f"The chain of {links[0].label} has {len(links) - 1} incremental backups (max_chain).")

    # --- what it needs

    def _check_summaries(self, connection: Any, parent: Backup, tree: TimelineTree, timeline: int) -> None:
        """A hole in the summaries is never filled; what is behind the last one is still being written."""
        rows = query(connection, "SELECT tli, start_lsn::text, end_lsn::text FROM pg_available_wal_summaries()")
        summaries = sorted((int(tli), Lsn.parse(start), Lsn.parse(end)) for tli, start, end in rows)
        for span in spans_from(parent.start_lsn, tree, timeline):
            reached = span.begin
            later = None
            for tli, start, end in summaries:
                if tli != span.timeline or end <= reached:
                    continue
                if start > reached:
                    later = start
                    break
                reached = end
            if later is not None and (span.end is None or reached < span.end):
                raise BasisError(_holes(self._login, parent, f"those of {reached} to {later} are not there"))
            if span.end is not None and reached < span.end:
                raise BasisError(_holes(self._login, parent, f"those of {reached} to {span.end} are not there"))

    def _check_key(self, parent: Backup) -> None:
        """Whether the parent's manifest can be read here. Raises BasisError."""
        try:
            with self.manifest(parent):
                pass
        except PitrError as error:
            raise BasisError(f"The manifest of the parent {parent.label} cannot be read: {error.message}") from None

    @contextlib.contextmanager
    def parent_held(self, parent: Backup) -> Iterator[None]:
        """No expire removes the parent, or one of those it builds upon, as long. Raises BasisError when one is gone."""
        by_label = {backup.label: backup for backup in stored_backups(self._folder)}
        with contextlib.ExitStack() as stack:
            for link in chain(by_label.get(parent.label, parent), by_label):
                try:
                    stack.enter_context(locks.reading(self._folder, link.label))
                    there = os.path.exists(os.path.join(self._folder.backups_path, link.label, BACKUP_FILE))
                except locks.InUseError:
                    there = False
                if not there:
                    raise BasisError(f"The backup {link.label}, to build upon, is just being removed by an expire.")
            yield

    @contextlib.contextmanager
    def manifest(self, parent: Backup) -> Iterator[int]:
        """The parent's manifest, decrypted and decompressed, as an open file without a name.

        So nothing of it is left after a kill, and nobody else finds it. There is no copy in plain text beside an
        encrypted one in the repository either: it tells size, checksum and time of every file of the cluster.
        """
        stored = extract.check_manifest(
            parent, os.path.join(self._folder.backups_path, parent.label), self._folder.tree
        )
        with tempfile.TemporaryFile(prefix="pitr-manifest-") as copy:
            with codec.open_reader(stored, self._folder.tree) as reader:
                shutil.copyfileobj(reader, copy, codec.CHUNK)
            copy.flush()
            yield copy.fileno()

    def combined_bytes(self, paths: Sequence[str]) -> tuple[int, int]:
        """What these tars become when they are combined with the parent, and how much of it can have changed; bytes."""
        return _combined_bytes(paths)


def _holes(login: Login, parent: Backup, what: str) -> str:
    return (
        f"The WAL summaries of {login} do not reach back to the start of {parent.label} (timeline {parent.timeline},"
        f" LSN {parent.start_lsn}): {what}. They are kept for wal_summary_keep_time, and written while summarize_wal is"
        " on. A full backup is needed to go on."
    )


def _combined_bytes(paths: Sequence[str]) -> tuple[int, int]:
    """Files without a changed block count as unchanged: they are taken whole from an older backup."""
    total = changed = 0
    for path in paths:
        with open_tar(path) as tar:
            for member in tar:
                if not member.isfile():
                    continue
                size = member.size
                name = os.path.basename(member.name)
                stream = tar.extractfile(member) if name.startswith("INCREMENTAL.") else None
                if stream is None:
                    changed += size
                else:
                    magic, blocks, length = _HEADER.unpack(stream.read(_HEADER.size))
                    if magic != _MAGIC:
                        raise PitrError(f"{path} is damaged: {member.name} is not an incremental file.", path=path)
                    numbers = struct.unpack(f"={blocks}I", stream.read(4 * blocks))
                    # find_reconstructed_block_length of reconstruct.c
                    size = _BLOCK * max(length, *(number + 1 for number in numbers), 0)
                    changed += size if blocks else 0
                total += size
    return total, changed
