# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The command ``pitr`` of a repository host: backups, verification, retention, drills and status by a timer, without
Ansible.

It is this package beside ``pitr-wal``, with psycopg2 from the distribution, and does what the modules of the same names
do. Two runs at once do no harm: backups have a lock each, and a second expire says so and ends.
"""

from __future__ import annotations

import os
import signal
import sys
import time

from . import status
from .activity import add_verified
from .backup import BaseBackup
from .errors import PitrError
from .expire import Expiry
from .incremental import Basis
from .index import scan
from .install import COMMAND
from .maintenance_settings import Settings, passfile_path, read_settings
from .postgres import Login
from .rehearsal import Rehearsal
from .repository import ClusterFolder, require_directory
from .retention import Policy
from .stored import stored_backups
from .verify import Verification, as_result, choose

USAGE = (
    "usage: pitr backup CLUSTER | verify CLUSTER [all|latest|LABEL] | expire CLUSTER | drill CLUSTER [keep]"
    " | status [CLUSTER …]"
)
FAILED, WRONG_USE = 1, 2
# Seconds that a backup waits for the server to let it in, and between two tries.
PATIENCE, PAUSE = 60.0, 2.0


def wait_for(login: Login, patience: float = PATIENCE) -> None:
    """Until the server lets us in. For so many seconds a refusal may be one that passes: the server is restarted, or
    its password has changed and the file here is about to. Raises the last PitrError."""
    deadline = time.monotonic() + patience
    while True:
        try:
            login.connect().close()
            return
        except PitrError:
            if time.monotonic() > deadline:
                raise
        time.sleep(PAUSE)


def take_backup(settings: Settings, cluster: str) -> str:
    """Take a base backup. Returns what to say of it. Raises PitrError."""
    require_directory(settings.repository)
    folder = ClusterFolder.open(settings.repository, cluster, {"identity": settings.identity})
    login = Login(
        host=settings.login_host,
        port=settings.login_port,
        user=settings.login_user,
        ssl_mode=settings.ssl_mode,
        ca_cert=settings.ca_cert,
    )
    wait_for(login)
    backup = BaseBackup(
        folder,
        login,
        settings.bin_dir,
        compression=settings.compression,
        checkpoint=settings.checkpoint,
        max_rate=settings.max_rate,
        verify=settings.verify,
        archive_timeout=settings.archive_timeout,
        basis=Basis(folder, login, settings.type, "", settings.full_every, settings.max_chain),
    ).take()
    return f"backup {backup.label} of {cluster} is complete, from LSN {backup.start_lsn} to {backup.stop_lsn}"


def verify(settings: Settings, cluster: str, choice: str) -> str:
    """Read backups and their WAL back. Returns what to say. Raises PitrError, also when something is damaged."""
    folder = ClusterFolder.open(settings.repository, cluster, {"identity": settings.identity})
    chapter = folder.chapter
    backups = [b for b in stored_backups(folder) if b.system_identifier == chapter.system_identifier]
    work = Verification(folder, chapter, backups, scan(folder, chapter), settings.bin_dir, settings.verify_level)
    chosen = choose(backups, choice or settings.backup_to_verify)
    result = as_result([work.verify(backup) for backup in chosen])
    add_verified(folder, result["verified"])
    damaged = result["damaged"]
    if damaged:
        raise PitrError(
            "\n".join([f"{item['path']}: {item['problem']}" for item in damaged] + ["Nothing was changed."])
        )
    return f"whole: {', '.join(backup.label for backup in chosen)} of {cluster}, with their WAL"


def expire(settings: Settings, cluster: str) -> str:
    """Apply the retention policy. Returns what to say. Raises PitrError."""
    folder = ClusterFolder.open(settings.repository, cluster)
    policy = Policy.from_options(settings.keep_full or None, settings.recovery_window or None)
    result = Expiry(folder, policy).run()
    gone = ", ".join(item["backup"] for item in result["expired_backups"]) or "no backup"
    lines = [
        f"removed from {cluster}: {gone}; segments of WAL: {result['expired_segments']['count']}",
        *result["notes"],
    ]
    return "\n".join(map(str, lines))


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def drill(settings: Settings, cluster: str, directory: str, keep: bool) -> str:
    """Restore what the repository holds into a scratch directory, and prove it. Returns what to say. Raises PitrError.

    ``directory`` is where ``pitr-wal`` is installed.
    """
    require_directory(settings.repository)
    work = Rehearsal(settings, cluster, os.path.join(directory, COMMAND), keep, _say)
    # A stop of the service clears away what was begun.
    signal.signal(signal.SIGTERM, lambda _number, _frame: work.end())
    try:
        said = f"the drill of {cluster} passed: {work.run()}"
    except PitrError as error:
        raise PitrError(f"the drill of {cluster} FAILED. {error.message}{work.kept()}") from None
    return said + work.kept()


# What each verb may be told besides the cluster.
_MORE: dict[str, tuple[str, ...] | None] = {"backup": (), "expire": (), "verify": None, "drill": ("keep",)}


def main(argv: list[str]) -> int:
    """Run one command; ``argv`` is the installation's folder and then what was asked. Returns the exit code: 0 done, 1
    failed or damage found, 2 wrong use; of ``status`` see there."""
    if argv[1:2] == ["status"]:
        return status.main(argv[0], argv[2:])
    more = _MORE.get(argv[1] if argv[1:] else "", ())
    if len(argv) not in (3, 4) or argv[1] not in _MORE or (argv[3:] and more is not None and argv[3] not in more):
        sys.stderr.write(USAGE + "\n")
        return WRONG_USE
    directory, verb, cluster = argv[:3]
    # Backups are closed to everybody else, whoever starts this.
    os.umask(0o077)
    try:
        settings = read_settings(directory, cluster)
        passfile = passfile_path(directory, cluster)
        if os.path.exists(passfile):
            os.environ["PGPASSFILE"] = passfile
        if verb == "backup":
            said = take_backup(settings, cluster)
        elif verb == "verify":
            said = verify(settings, cluster, argv[3] if argv[3:] else "")
        elif verb == "drill":
            said = drill(settings, cluster, directory, bool(argv[3:]))
        else:
            said = expire(settings, cluster)
    except PitrError as error:
        sys.stderr.write(f"pitr {verb}: {error.message}\n")
        return FAILED
    except OSError as error:
        sys.stderr.write(f"pitr {verb}: {error.filename or 'the system'}: {error.strerror or error}\n")
        return FAILED
    sys.stdout.write(said + "\n")
    return 0
