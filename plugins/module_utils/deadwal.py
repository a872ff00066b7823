# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The pg_wal of the server that has died: the newest WAL, which nobody has archived.

"Recovering Using a Continuous Archive Backup" begins with saving it, and copies its unarchived segments into the new
pg_wal in the end. Whose pg_wal that is, and whether it belongs to the past that is restored, is decided here; which of
its files are used is the rule of tail.py.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from . import recovery_conf
from .errors import PitrError
from .postgres import control_data, running_pid
from .repository import Chapter
from .request import Request
from .unfinished import left_behind, unaccepted
from .wal import SegmentHeader, WalFile

AUTO = "auto"
NONE = "none"
# Where the plan of an unaccepted cluster remembers the directory that its server died in.
REMEMBERED = "dead_pgdata"


@dataclass(frozen=True)
class Place:
    """``pg_wal``: the directory to look into, empty for none. ``problem``: why what is there is not used.

    ``asked``: the directory was named, so that a problem is a reason to refuse.
    """

    pg_wal: str = ""
    problem: str = ""
    asked: bool = False


def dead_pgdata(request: Request, system_identifier: str) -> str:
    """The data directory in which this cluster's server has died, as far as this host knows; empty when it has none.

    A restored cluster that nobody has accepted is not it: what it holds beyond the archive was put there by a restore,
    and was maybe left again. The one before it is, which the restore has moved aside.
    """
    pgdata = request.pgdata
    killed = left_behind(pgdata, system_identifier)
    if killed is not None:
        # What it has moved aside may have been a restored cluster itself.
        known = str(killed.get(REMEMBERED, killed.get("moved_aside")) or "")
    elif unaccepted(request):
        known = str((recovery_conf.planned(request.configuration) or {}).get(REMEMBERED) or "")
    else:
        known = pgdata
    return known if known and os.path.isdir(os.path.join(known, "pg_wal")) else ""


def find(request: Request, chapter: Chapter, timeline: int) -> Place:
    """The pg_wal that the request means, checked as far as its data directory tells of it."""
    if request.dead_pg_wal == NONE:
        return Place()
    if request.dead_pg_wal != AUTO:
        pg_wal = request.dead_pg_wal
        if not os.path.isabs(pg_wal):
            return Place(problem=f"dead_pg_wal is '{pg_wal}': auto, none, or an absolute path.", asked=True)
        if not os.path.isdir(pg_wal):
            return Place(problem=f"{pg_wal} is not a directory here, so no WAL can come from it.", asked=True)
        data = os.path.dirname(os.path.abspath(pg_wal))
        if not os.path.exists(os.path.join(data, "global", "pg_control")):
            # A copy of the directory alone: its files have to tell for themselves.
            data = ""
        return _checked(request, chapter, timeline, data, pg_wal, True)
    try:
        data = dead_pgdata(request, chapter.system_identifier)
    except (OSError, PitrError):
        # The directory itself is refused then, by name.
        data = ""
    return _checked(request, chapter, timeline, data, os.path.join(data, "pg_wal"), False) if data else Place()


def _checked(request: Request, chapter: Chapter, timeline: int, data: str, pg_wal: str, asked: bool) -> Place:
    # After the old directory was moved aside a link still leads there; a plain directory moves with it.
    place = os.path.realpath(pg_wal) if os.path.islink(pg_wal) else pg_wal
    try:
        names = os.listdir(place)
    except OSError as error:
        return Place(problem=f"{place} cannot be read: {error.strerror}.", asked=asked)
    newest = timeline
    if data:
        pid = running_pid(data)
        if pid is not None:
            return Place(
                problem=f"A server is running on {data} (process {pid}); its WAL is not at its end.", asked=asked
            )
        try:
            control = control_data(request.bin_dir, data)
        except PitrError as error:
            return Place(problem=f"It cannot be told whose {place} is: {error.message}", asked=asked)
        if control.system_identifier != chapter.system_identifier:
            problem = f"{place} belongs to the cluster with system identifier {control.system_identifier}."
            return Place(problem=problem, asked=asked)
        newest = control.timeline
    newest = max([newest, *(_timeline(place, name, chapter) for name in names)])
    if newest != timeline:
        problem = (
            f"{place} is of a server on timeline {newest}, the plan follows timeline {timeline}. What it has is part"
            " of another past."
        )
        if newest > timeline:
            problem += (
                f" To follow timeline {newest} archive its history file and its segments first (pitr-wal push"
                f" {request.cluster} {place}/…)."
            )
        return Place(problem=problem, asked=asked)
    return Place(place, asked=asked)


def _timeline(place: str, name: str, chapter: Chapter) -> int:
    """The timeline that a file of pg_wal proves this server to have come to, 0 when it proves nothing."""
    try:
        wal_file = WalFile.parse(name)
        if wal_file.kind == "history":
            return wal_file.timeline
        if wal_file.kind != "segment":
            return 0
        with open(os.path.join(place, name), "rb") as stream:
            header = SegmentHeader(stream.read(SegmentHeader.SIZE))
        # A recycled file carries a new name and old content.
        begin = wal_file.number(header.segment_size) * header.segment_size
        ours = header.system_identifier == chapter.system_identifier and int(header.page_address) == begin
        return wal_file.timeline if ours else 0
    except (PitrError, OSError):
        return 0
