# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the timers of a repository host do is what the role's variables say."""

from __future__ import annotations

from collections.abc import Callable

from ansible_collections.pgdrill.pitr.plugins.module_utils.incremental import SINCE
from ansible_collections.pgdrill.pitr.plugins.module_utils.maintenance import expire, take_backup, verify
from ansible_collections.pgdrill.pitr.plugins.module_utils.maintenance_settings import Settings
from ansible_collections.pgdrill.pitr.plugins.module_utils.stored import stored_backups
from ansible_collections.pgdrill.pitr.tests.integration.support import CLUSTER, Sandbox


def test_backups_by_the_clock_have_the_type_that_was_asked_for(sandbox: Callable[..., Sandbox], major: int) -> None:
    primary = sandbox(settings={"summarize_wal": "on"} if major >= SINCE else {})
    settings = Settings(
        repository=str(primary.repository),
        bin_dir=primary.bin_dir,
        # libpq takes the directory of a socket for a host.
        login_host=primary.server.socket,
        login_port=primary.server.PORT,
        login_user="postgres",
        type="auto",
        full_every="7 days",
        keep_full=1,
    )
    for phase in ("first", "second"):
        primary.commit(phase)
        assert "is complete" in take_backup(settings, CLUSTER)
    assert [backup.type for backup in stored_backups(primary.folder)] == [
        "full",
        "incremental" if major >= SINCE else "full",
    ]
    assert verify(settings, CLUSTER, "all").startswith("whole: ")
    expire(settings, CLUSTER)
    # The chain is whole or gone; without one the older full backup goes.
    assert len(stored_backups(primary.folder)) == (2 if major >= SINCE else 1)
