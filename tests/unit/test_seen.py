# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What earlier looks have seen: what is kept of it, and what is told from it."""

from __future__ import annotations

from pathlib import Path

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils import seen
from ansible_collections.pgdrill.pitr.plugins.module_utils.seen import Sample, Seen, thin
from ansible_collections.pgdrill.pitr.plugins.module_utils.watched import DAY
from hypothesis import given
from hypothesis import strategies as st

NOW = 1_000_000_000.0


def test_failures_are_new_for_a_quarter_of_an_hour_however_often_somebody_looks() -> None:
    samples = [Sample(NOW - 1000, 0, failed=5), *(Sample(NOW - ago, 0, failed=8) for ago in (120, 60, 1))]
    assert Seen(samples).new_failures(8, NOW) == (3, 1000)
    assert Seen(samples).new_failures(8, NOW + 1000) == (0, 1001)
    assert Seen([]).new_failures(8, NOW) == (None, 0)


def test_counter_that_was_reset_counts_from_nothing() -> None:
    assert Seen([Sample(NOW - 60, 0, failed=50)]).new_failures(2, NOW) == (2, 60)


def test_wal_waits_since_the_first_look_that_saw_it() -> None:
    samples = [Sample(NOW - 300, 0, lsn=1000, timeline=1), Sample(NOW - 200, 0, lsn=3000, timeline=1)]
    assert Seen(samples).waiting(1, 2000, 100, NOW) == 200
    assert Seen(samples).waiting(1, 3000, 100, NOW) == 0
    assert Seen(samples).waiting(1, 2950, 100, NOW) == 0


def test_position_of_another_timeline_is_not_waited_for() -> None:
    assert Seen([Sample(NOW - 9 * DAY, 0, lsn=9000, timeline=1)]).waiting(2, 2000, 0, NOW) == 0


def test_growth_is_not_told_from_a_short_time() -> None:
    assert Seen([Sample(NOW - 3600, 100)]).growth(200, NOW) == (None, 0)
    assert Seen([Sample(NOW - DAY, 100), Sample(NOW - 60, 150)]).growth(200, NOW) == (100, DAY)
    assert Seen([Sample(NOW - 20 * DAY, 10**9), Sample(NOW - DAY, 200)]).growth(200, NOW) == (0, DAY)


@given(st.lists(st.integers(0, 40 * int(DAY)), max_size=300), st.integers(0, 40 * int(DAY)))
def test_samples_stay_few_and_those_of_a_month_have_their_oldest(ages: list[int], later: int) -> None:
    kept = thin([Sample(NOW - age, 0) for age in ages], NOW)
    assert len(kept) <= 62 + 48 + 120
    assert kept == sorted(kept, key=lambda each: each.at) and thin(kept, NOW) == kept
    young = [age for age in ages if age < 30 * DAY]
    # But for what shares a step with it.
    if young:
        assert NOW - kept[0].at == max(young)
    assert set(thin(kept, NOW + later)) <= set(kept)


def test_many_looks_stay_few() -> None:
    kept: list[Sample] = []
    for minute in range(3 * 24 * 60):
        kept = thin([*kept, Sample(NOW + minute * 60, minute)], NOW + minute * 60)
    assert len(kept) < 130 and kept[0].at < NOW + 6 * 3600


def test_sample_of_the_future_goes() -> None:
    assert thin([Sample(NOW + 3600, 1)], NOW) == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"samples": 1}', '{"samples": [{"at": "x"}], "folders": {"a": 1}}'])
def test_state_that_cannot_be_read_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "main.state.json").write_text(text, encoding="utf-8")
    found = seen.read(seen.path_of(str(tmp_path), "main"))
    assert found.samples == [] and found.folders == {}


def test_state_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = seen.path_of(str(tmp_path / "new"), "main")
    assert seen.write(path, Seen([Sample(NOW, 5, 1, 2, 3)], {"18-1/x": (7, 8)})) == ""
    found = seen.read(path)
    assert found.samples == [Sample(NOW, 5, 1, 2, 3)] and found.folders == {"18-1/x": (7, 8)}
