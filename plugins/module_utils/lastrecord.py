# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Whether a recovery to an LSN has a record to stop at.

Recovery stops before or after the first record that begins at the target or behind it (recoveryStopsBefore and
recoveryStopsAfter of xlogrecovery.c). The archive's last segment is mostly nothing but zeros behind its last record
(pg_switch_wal fills it up), so that a position can lie within the archive and still be reached by no record: the server
would replay everything and then stop with FATAL.
"""

from __future__ import annotations

from .index import ArchiveIndex
from .plan import Refusal, RefusedError, RestorePlan
from .reach import reachable_end
from .waldump import WalScanner


def check_lsn(result: RestorePlan, index: ArchiveIndex, scanner: WalScanner) -> None:
    """Refuse an LSN target behind the last record that can be replayed. Raises RefusedError.

    Reads one segment, the last one, or a few more when no record begins there. Other targets pass.
    """
    lsn = result.target.lsn
    if lsn is None:
        return
    last, _count, missing = reachable_end(result.backup, index, result.timeline)
    if missing:
        last = min(number for _timeline, number in missing) - 1
    record = scanner.last_record(list(result.spans), last)
    if record is None or record.lsn < lsn:
        message = f"The target {result.target} lies after the last record in the archive."
        nearest = f"Restorable is up to LSN {record.lsn}; 'latest' restores everything." if record else ""
        raise RefusedError([Refusal("target_beyond_archive", message, nearest)])
