# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What earlier looks at a cluster have seen: the state of monitoring on this host.

One small file for each cluster, outside of the repository. It may be lost at any time: then it is not known for a while
whether failures are new, how fast the repository fills, and since when WAL has been waiting.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Optional

from .errors import PitrError
from .repository import write_json
from .watched import DAY

# Failures count as new that long, whoever looks how often.
FAILURES_SPAN = 900.0
# Growth is told over the last days, and not from less than some hours.
GROWTH_SPAN = 14 * DAY
GROWTH_LEAST = 6 * 3600.0


@dataclass(frozen=True)
class Sample:
    """One look. ``at`` in seconds since 1970; what the primary tells is None where it did not answer."""

    at: float
    stored: int
    failed: Optional[int] = None
    lsn: Optional[int] = None
    timeline: Optional[int] = None


def thin(samples: Iterable[Sample], now: float) -> list[Sample]:
    """What is worth keeping, oldest first: one for each minute of the last hour, half hour of the day, and quarter day
    of thirty days; of those the oldest. Samples of the future are of a clock that was set back, and go."""
    kept: dict[tuple[float, int], Sample] = {}
    for sample in sorted(samples, key=lambda each: each.at):
        age = now - sample.at
        if not 0 <= age < 30 * DAY:
            continue
        step = 60.0 if age < 3600 else 1800.0 if age < DAY else 6 * 3600.0
        kept.setdefault((step, int(sample.at // step)), sample)
    return sorted(kept.values(), key=lambda each: each.at)


class Seen:
    """The samples of one cluster, and the sizes of folders of its archive."""

    def __init__(self, samples: Iterable[Sample] = (), folders: Optional[Mapping[str, tuple[int, int]]] = None) -> None:
        """``folders``: time of change (ns) and stored bytes by path below the cluster's archive."""
        self.samples = list(samples)
        self.folders = dict(folders or {})

    def new_failures(self, failed: int, now: float) -> tuple[Optional[int], float]:
        """Failures since FAILURES_SPAN ago, or since the oldest later sample, and that span; None without a sample.

        A counter that has fallen was reset, or is another server's: it then counts from nothing.
        """
        before = [sample for sample in self.samples if sample.failed is not None]
        old = [sample for sample in before if now - sample.at >= FAILURES_SPAN]
        base = old[-1] if old else before[0] if before else None
        if base is None or base.failed is None:
            return None, 0.0
        return (failed - base.failed if failed >= base.failed else failed), now - base.at

    def waiting(self, timeline: Optional[int], end: int, slack: int, now: float) -> float:
        """For how long the primary has been more than ``slack`` bytes ahead of this end of the archive, at least.

        Positions of another timeline do not count: a primary that was restored to an earlier point was further once.
        """
        ours = [sample for sample in self.samples if sample.timeline == timeline and sample.lsn is not None]
        ahead = [sample.at for sample in ours if (sample.lsn or 0) > end + slack]
        return max(0.0, now - min(ahead)) if ahead else 0.0

    def growth(self, stored: int, now: float) -> tuple[Optional[float], float]:
        """Stored bytes a day and the span that is told from; None where that is too short."""
        within = [sample for sample in self.samples if now - sample.at <= GROWTH_SPAN]
        if not within or now - within[0].at < GROWTH_LEAST:
            return None, 0.0
        span = now - within[0].at
        return (stored - within[0].stored) / span * DAY, span

    def to_dict(self) -> dict[str, Any]:
        """As stored."""
        return {"format": 1, "samples": [asdict(sample) for sample in self.samples], "folders": self.folders}


def path_of(directory: str, cluster: str) -> str:
    """Where the state of a cluster lies."""
    return os.path.join(directory, f"{cluster}.state.json")


def read(path: str) -> Seen:
    """What was seen; nothing where it cannot be read."""
    names = {item.name for item in fields(Sample)}
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError, KeyError):
        with open(path, encoding="utf-8") as stream:
            stored = json.load(stream)
        samples = [Sample(**{name: item[name] for name in names if name in item}) for item in stored["samples"]]
        folders = {str(log): (int(changed), int(count)) for log, (changed, count) in stored["folders"].items()}
        return Seen(sorted(samples, key=lambda each: each.at), folders)
    return Seen()


def write(path: str, seen: Seen) -> str:
    """Keep it. Returns what to say when that was not possible.

    In a directory of another user nothing is kept: the file would be closed to that one when root has looked.
    """
    try:
        os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
        if os.stat(os.path.dirname(path)).st_uid == os.geteuid():
            write_json(path, seen.to_dict())
    except (OSError, PitrError) as error:
        return f"{path} was not written, so that new failures and growth are not told: {error}"
    return ""
