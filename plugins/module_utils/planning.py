# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""From a request to a plan: what is there is looked at, and nothing is changed anywhere.

The decision itself is the pure function of plan.py; what it cannot know of this host (hostcheck.py), of the keys, of
where a target lies in WAL (locate.py), and of the WAL beyond the archive's end (beyond.py) is asked here. Whatever can
be known is told at once, also when the target alone is reason enough to refuse.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from . import extract, inplace, places, rates
from .beyond import Beyond
from .catalog import Backup, broken_chains, chain
from .createdspaces import check_created
from .encryption import LockedError, by_recipients, check_identity, recipients_id, try_identity
from .errors import PitrError
from .hostcheck import check_directory, check_host, check_space, room, told
from .index import ArchiveIndex, scan
from .lastrecord import check_lsn
from .locate import Found, Locator
from .plan import Refusal, RefusedError, RestorePlan, candidates, chosen, plan, segment_names, target_timeline
from .repository import ClusterFolder
from .request import Request
from .stored import damaged_backups, stored_backups
from .target import RecoveryTarget
from .wal import WalFile

# Refusals for want of a key: what else cannot be decrypted is no further news.
_KEYS = ("identity_missing", "identity_wrong", "identity_unusable", "age_missing")


class Planner:
    """One request, looked at.

    After :meth:`plan`, ``folder`` is the opened folder of the cluster, ``chapter`` the chapter that is restored from,
    ``beyond`` what there is beyond the archive's end, and ``wal_directory`` where pg_wal goes (places.py).
    """

    def __init__(self, request: Request) -> None:
        self._request = request
        self._refusals: list[Refusal] = []
        self.wal_directory = ""

    def plan(self) -> RestorePlan:
        """Decide without touching anything. Raises RefusedError with every reason that can be known now."""
        target = self._target()
        try:
            access = {**self._request.ssh, "identity": self._request.identity}
            folder = ClusterFolder.open(self._request.repository, self._request.cluster, access)
            self.chapter = folder.select(self._request.chapter)
        except PitrError as error:
            raise RefusedError([*self._refusals, Refusal("repository", error.message)]) from None
        self.folder = folder
        in_the_way = list(check_directory(self._request, self.chapter, folder.name))
        self._refusals += in_the_way
        # Whether there is a directory that a delta restore would change in place.
        in_place = not in_the_way and inplace.applies(self._request, self.chapter.system_identifier)
        backups = [b for b in stored_backups(folder) if b.system_identifier == self.chapter.system_identifier]
        damaged = broken_chains(backups, damaged_backups(folder, backups))
        index = scan(folder, self.chapter)
        # What is changed in place has no pg_wal of before any more when that would be read.
        request = inplace.without_dead_wal(self._request) if in_place else self._request
        self.beyond = Beyond(request, folder, self.chapter)
        result = self._decide(target, backups, damaged, index, in_place) if target is not None else None
        backup = result.backup if result is not None else self._likely(backups, damaged)
        if backup is None:
            raise RefusedError(self._refusals)
        links = chain(backup, {each.label: each for each in backups})
        if not in_place:
            self.wal_directory = places.wal_directory(self._request, backup)
        self._refusals += check_host(self._request, links, self.chapter, self.wal_directory, in_place)
        tail_bytes = len(result.from_elsewhere) * index.segment_size if result is not None else 0
        wal_bytes = result.wal_bytes if result is not None else 0
        filesystems = room(self._request, links, wal_bytes, tail_bytes, self.wal_directory)
        self._refusals += check_space(self._request, self.chapter, filesystems, in_place)
        self._check_keys(links, result, index)
        if self._refusals or result is None:
            raise RefusedError(self._refusals)
        result = replace(result, in_place=in_place)
        looked, notes = told(self._request, result, filesystems, self.wal_directory)
        looked["estimate"] = rates.estimate(rates.path_of(folder), backup, result.wal_bytes)
        return replace(result, looked={**result.looked, **looked}, notes=(*result.notes, *notes))

    def _refuse(self, code: str, message: str, nearest: str = "") -> None:
        self._refusals.append(Refusal(code, message, nearest))

    def _target(self) -> RecoveryTarget | None:
        try:
            return RecoveryTarget.from_options(self._request.target_options)
        except PitrError as error:
            self._refuse("target", error.message)
            return None

    def _decide(
        self,
        target: RecoveryTarget,
        backups: list[Backup],
        damaged: Mapping[str, str],
        index: ArchiveIndex,
        in_place: bool,
    ) -> RestorePlan | None:
        """The plan as far as repository and target go, or None and refusals."""
        try:
            self._look_beyond(target, backups, index)
            found = self._locate(target, backups, index, damaged)
            result = plan(
                backups, index, target, self._request.backup, damaged, found.location, found.commits, found.nearby
            )
            result = replace(result, notes=(*found.notes, *result.notes))
            result = self.beyond.complete(result, index)
            check_lsn(result, index, self.beyond.scanner(index))
            refusals, notes = check_created(self._request, result, index, self.beyond.scanner(index), in_place)
            self._refusals += refusals
            return replace(result, notes=(*result.notes, *notes))
        except RefusedError as error:
            self._refusals += [self.beyond.hint(refusal, index) for refusal in error.refusals]
        except LockedError as error:
            self._refuse(error.code, error.message, self._whose(error.detail.get("recipients")))
        except PitrError as error:
            if "path" not in error.detail:
                raise
            # A segment had to be read.
            self._refuse("archive_damaged", error.message)
        return None

    def _choice(self, backups: list[Backup]) -> str:
        """What was asked for, or auto when there is no such backup: what else is wrong shall be told as well."""
        try:
            chosen(backups, self._request.backup)
        except RefusedError:
            return "auto"
        return self._request.backup

    def _likely(self, backups: list[Backup], damaged: Mapping[str, str]) -> Backup | None:
        """The backup that would be taken if the target were right: the host can be looked at for it."""
        if not backups:
            return None
        among = [b for b in chosen(backups, self._choice(backups)) if b.label not in damaged]
        return max(among, key=lambda backup: backup.stopped_at, default=None)

    def _look_beyond(self, target: RecoveryTarget, backups: list[Backup], index: ArchiveIndex) -> None:
        if not backups or target.kind == "immediate":
            return
        try:
            timeline = target_timeline(target, index.tree, backups, self._choice(backups))
        except RefusedError:
            # The plan will say so.
            return
        self.beyond.look(target, timeline, index)

    def _locate(
        self, target: RecoveryTarget, backups: list[Backup], index: ArchiveIndex, damaged: Mapping[str, str]
    ) -> Found:
        """Look into the WAL for what the catalog cannot tell: where an xid or a name is, when the last commit was."""
        if not backups or target.kind not in ("time", "xid", "name"):
            return Found()
        try:
            timeline = target_timeline(target, index.tree, backups, self._choice(backups))
            related = candidates(backups, index.tree, timeline, self._choice(backups))
        except RefusedError:
            return Found()
        whole = [backup for backup in related if backup.label not in damaged]
        return Locator(self.beyond.scanner(index), index, timeline, whole).find(target)

    def _check_keys(self, links: Sequence[Backup], result: RestorePlan | None, index: ArchiveIndex) -> None:
        """Can everything that is needed be decrypted here?

        Tried on the backup's manifest, and on one segment of each set of recipients among those that are needed.
        """
        if any(refusal.code in _KEYS for refusal in self._refusals):
            return
        tree = self.folder.tree
        if tree.identity:
            self._try("backup_damaged", lambda: check_identity(tree.identity))
            if places.within(tree.identity, self._request.pgdata):
                message = f"The identity file {tree.identity} lies in the data directory, which is replaced."
                self._refuse("identity_unusable", message, "Keep it elsewhere.")
        if any(refusal.code in (*_KEYS, "backup_damaged") for refusal in self._refusals):
            return
        for link in links:
            if link.encryption and not any(refusal.code in _KEYS for refusal in self._refusals):
                self._try("backup_damaged", partial(self._try_manifest, link), link.encryption)
        if result is None or not (self.folder.recipients or self.folder.former_recipients):
            # Not known which WAL, or none of it can be encrypted.
            return
        chapter = self.folder.require(links[-1].system_identifier)
        names = [name for name in segment_names(result, index) if name not in result.from_elsewhere]
        paths = [self.folder.wal_path(WalFile.parse(name), chapter) for name in names]
        try:
            found = by_recipients(tree, paths)
        except PitrError as error:
            self._refuse("archive_damaged", error.message)
            return
        for recipients, path in found.items():
            self._try("archive_damaged", partial(try_identity, tree, path), recipients)

    def _try_manifest(self, link: Backup) -> None:
        stored = os.path.join(self.folder.backups_path, link.label)
        try_identity(self.folder.tree, extract.check_manifest(link, stored, self.folder.tree))

    def _try(self, code: str, action: Callable[[], None], recipients: str = "") -> None:
        """Refuse with the reason of what fails, or with ``code`` when no key is to blame."""
        try:
            action()
        except LockedError as error:
            self._refuse(error.code, error.message, self._whose(recipients))
        except PitrError as error:
            self._refuse(code, error.message)

    def _whose(self, identifier: object) -> str:
        """Who the recipients with this id are, where cluster.json remembers them."""
        for recipients in (self.folder.recipients, *self.folder.former_recipients):
            if identifier and identifier == recipients_id(recipients):
                return f"The identity (path) of one of these is needed: {', '.join(recipients)}."
        return ""
