# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""archive_info and the plan of expire over a synthetic archive, in seconds and memory.

``make bench-archive``, or ``python benchmarks/archive_scan.py [--segments 1000000] [--segment-size 16]``. The archive
is made of hard links to a few sparse files, below ``--directory`` (default: a temporary one), and removed afterwards.
Each question is asked in a process of its own, so that its memory is its own. It exits with 1 when a question takes
more than ``--seconds`` or ``--megabytes``.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# The engine needs nothing of Ansible; its files import each other relatively.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "plugins"))

MIB = 1024 * 1024
SYSTEM = "7300000000000000001"
# A file has at most 65000 names on ext4.
LINKS = 60000
STATUS = ("status", "status, the second time")


def make(repository: Path, segments: int, size: int) -> None:
    """A repository with so many segments on two timelines, one of them lost, and ten backups."""
    from module_utils import repository as repositories
    from module_utils.backup import BACKUP_FILE
    from module_utils.catalog import Backup, StoredFile
    from module_utils.wal import Lsn, segment_name

    chapter = repositories.Chapter(1, SYSTEM, size, 18, "2026-01-01T00:00:00+00:00")
    folder, _created = repositories.create(str(repository), "main", chapter)
    archive = folder.archive_path()
    switch = segments // 2
    lost = segments // 3
    source = ""
    for number in range(segments):
        timeline = 1 if number < switch else 2
        name = segment_name(timeline, number, size)
        path = os.path.join(archive, name[:16], name)
        if number % LINKS == 0 or number == switch:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            source = path
            with open(path, "wb") as stream:
                stream.truncate(size // 3)
        elif number != lost:
            if number % (0x100000000 // size) == 0:
                os.makedirs(os.path.dirname(path), exist_ok=True)
            os.link(source, path)
    Path(archive, "00000002.history").write_text(f"1\t{Lsn(switch * size)}\tno recovery target specified\n", "ascii")
    now = datetime.datetime.now(datetime.timezone.utc)
    for count in range(10):
        number = segments // 10 * count + 1
        stopped = now - datetime.timedelta(days=10 - count)
        label = f"backup-{count}"
        backup = Backup(
            label=label,
            type="full",
            system_identifier=SYSTEM,
            postgresql_version=18,
            wal_segment_size=size,
            timeline=1 if number < switch else 2,
            start_lsn=Lsn(number * size + 40),
            stop_lsn=Lsn(number * size + 400),
            started_at=stopped,
            stopped_at=stopped,
            database_bytes=0,
            compression="none",
            verified="no",
            files=(StoredFile("base.tar", 0, hashlib.sha256(b"").hexdigest()),),
        )
        directory = Path(folder.backups_path, label)
        directory.mkdir()
        (directory / "base.tar").touch()
        (directory / BACKUP_FILE).write_text(json.dumps(backup.to_dict()), "utf-8")


def ask(question: str, repository: str) -> dict[str, object]:
    """One question, in this process. Returns what it cost and a few words of the answer."""
    from module_utils.expire import Expiry
    from module_utils.index import scan
    from module_utils.info import archive_info
    from module_utils.look import Look
    from module_utils.repository import ClusterFolder
    from module_utils.retention import Policy
    from module_utils.seen import Seen

    folder = ClusterFolder.open(repository, "main")
    seen = Seen()
    if question == "status, the second time":
        Look(folder, seen, time.time()).storage(2)
    before = time.perf_counter()
    if question == "scan":
        answer = f"{scan(folder).segments} segments"
    elif question == "expire":
        result = Expiry(folder, Policy.from_options(3, "2 days")).run(check=True)
        answer = f"{len(result['expired_backups'])} backups, {result['expired_segments']['count']} segments would go"
    elif question.startswith("status"):
        storage = Look(folder, seen, time.time()).storage(2)
        answer = f"{storage.archive.segments} segments, {storage.room.stored} bytes, {len(storage.restorable)} backups"
    else:
        info = archive_info(folder, sizes=question == "archive_info")
        answer = f"{info['segments']} segments, {info['missing_segments']} missing, {info['stored_bytes']} bytes"
    seconds = time.perf_counter() - before
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    processor = sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {
        "seconds": round(seconds, 2),
        "processor": round(processor, 2),
        "megabytes": round(peak / 1024, 1),
        "answer": answer,
    }


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--segments", type=int, default=1_000_000)
    parser.add_argument("--segment-size", type=int, default=16, help="MiB")
    parser.add_argument("--directory", default=None)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--megabytes", type=float, default=200.0)
    parser.add_argument("--ask", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ask:
        print(json.dumps(ask(*options.ask)))
        return 0
    place = Path(tempfile.mkdtemp(prefix="pitr-archive-scan-", dir=options.directory))
    failed = False
    try:
        started = time.perf_counter()
        make(place / "repository", options.segments, options.segment_size * MIB)
        print(
            f"made in {time.perf_counter() - started:.1f} s: {options.segments} segments of {options.segment_size} MiB"
        )
        for question in ("scan", "archive_info without sizes", "archive_info", "expire", *STATUS):
            argv = [sys.executable, __file__, "--ask", question, str(place / "repository")]
            said = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True, text=True).stdout
            cost = json.loads(said)
            over = cost["seconds"] > options.seconds or cost["megabytes"] > options.megabytes
            failed = failed or over
            line = f"{question:26} {cost['seconds']:5.2f} s  (processor {cost['processor']:5.2f} s)"
            line += f"  {cost['megabytes']:6.1f} MB  {cost['answer']}"
            print(line + ("  TOO MUCH" if over else ""))
    finally:
        shutil.rmtree(place)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
