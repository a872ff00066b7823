# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Recovery targets: what is accepted, what is refused, and what the server is told."""

from __future__ import annotations

import datetime
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils import target as module
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.plugins.module_utils.target import (
    ACTIONS,
    KINDS,
    RecoveryTarget,
    format_time,
    parse_time,
    parse_timeline,
    parse_xid,
)
from ansible_collections.pgdrill.pitr.plugins.module_utils.wal import Lsn
from ansible_collections.pgdrill.pitr.tests.unit.support import interpreters
from hypothesis import given
from hypothesis import strategies as st

UTC = datetime.timezone.utc
OPTIONS = {
    "immediate": ("recovery_target", "immediate"),
    "time": ("recovery_target_time", "2026-03-01 14:30:00+01:00"),
    "xid": ("recovery_target_xid", "745"),
    "lsn": ("recovery_target_lsn", "0/3000060"),
    "name": ("recovery_target_name", "before upgrade"),
}
TARGET_SETTINGS = {option for option, _value in OPTIONS.values()}

offsets = st.timedeltas(datetime.timedelta(hours=-14), datetime.timedelta(hours=14)).map(
    lambda delta: datetime.timezone(datetime.timedelta(minutes=delta // datetime.timedelta(minutes=1)))
)
times = st.datetimes(datetime.datetime(1, 1, 2), datetime.datetime(9999, 12, 30), timezones=offsets)


@st.composite
def targets(draw: st.DrawFn) -> RecoveryTarget:
    """Any target that can be asked for."""
    kind = draw(st.sampled_from(KINDS))
    value: dict[str, Any] = {}
    if kind == "time":
        value["time"] = draw(times).astimezone(UTC)
    elif kind == "xid":
        value["xid"] = draw(st.integers(3, 2**64 - 1))
    elif kind == "lsn":
        value["lsn"] = Lsn(draw(st.integers(0, 2**64 - 1)))
    elif kind == "name":
        # PostgreSQL takes any name, but not its history files (target.py).
        characters = st.characters(codec="utf-8", exclude_characters="\n\0")
        value["name"] = draw(st.text(characters, min_size=1, max_size=15))
    timeline = draw(st.one_of(st.sampled_from(["latest", "current"]), st.integers(1, 2**32 - 1).map(str)))
    return RecoveryTarget(
        kind, inclusive=draw(st.booleans()), timeline=timeline, action=draw(st.sampled_from(ACTIONS)), **value
    )


def options_of(target: RecoveryTarget) -> dict[str, object]:
    """The options that ask for this target."""
    options: dict[str, object] = {
        "recovery_target_inclusive": target.inclusive,
        "recovery_target_timeline": target.timeline,
        "recovery_target_action": target.action,
    }
    if target.kind != "latest":
        options[OPTIONS[target.kind][0]] = target.value or "immediate"
    return options


@given(targets())
def test_target_round_trips_through_options(target: RecoveryTarget) -> None:
    assert RecoveryTarget.from_options(options_of(target)) == target


@given(targets(), st.integers(1, 2**32 - 1))
def test_settings_name_one_target_at_most_and_the_planned_timeline(target: RecoveryTarget, timeline: int) -> None:
    settings = target.settings(timeline)
    named = TARGET_SETTINGS & set(settings)
    assert len(named) == (0 if target.kind == "latest" else 1)
    # An empty second target is a conflict for the server, so nothing may be there at all.
    assert all(value for value in settings.values())
    assert settings["recovery_target_timeline"] == str(timeline)
    assert settings["recovery_target_inclusive"] == ("on" if target.inclusive else "off")
    assert settings["recovery_target_action"] == target.action
    assert set(settings) - named == {
        "recovery_target_timeline",
        "recovery_target_inclusive",
        "recovery_target_action",
    }


@given(targets())
def test_settings_hold_the_value_that_was_asked(target: RecoveryTarget) -> None:
    settings = target.settings(1)
    if target.xid is not None:
        assert settings["recovery_target_xid"] == str(target.xid % 2**32)
    elif target.kind != "latest":
        assert settings[OPTIONS[target.kind][0]] == (target.value or "immediate")


def test_nothing_asked_is_the_end_of_the_archive() -> None:
    assert RecoveryTarget.from_options({}) == RecoveryTarget(
        "latest", inclusive=True, timeline="latest", action="promote"
    )
    blank = {option: "" for option in TARGET_SETTINGS} | {"recovery_target_timeline": None}
    assert RecoveryTarget.from_options(blank) == RecoveryTarget()


@pytest.mark.parametrize("first", OPTIONS)
@pytest.mark.parametrize("second", OPTIONS)
def test_two_targets_are_refused_by_name(first: str, second: str) -> None:
    if first == second:
        assert RecoveryTarget.from_options(dict([OPTIONS[first]])).kind == first
        return
    with pytest.raises(PitrError, match="More than one recovery target was given") as caught:
        RecoveryTarget.from_options(dict([OPTIONS[first], OPTIONS[second]]))
    assert f"{first} ({OPTIONS[first][1]})" in caught.value.message
    assert f"{second} ({OPTIONS[second][1]})" in caught.value.message


@pytest.mark.parametrize(
    ("option", "value", "why"),
    [
        ("recovery_target", "latest", "knows only 'immediate'"),
        ("recovery_target", "Immediate", "knows only 'immediate'"),
        ("recovery_target_xid", "abc", "not a transaction id"),
        ("recovery_target_xid", "0", "not a transaction id"),
        ("recovery_target_xid", 0, "not a transaction id"),
        ("recovery_target_xid", "2", "not a transaction id"),
        ("recovery_target_xid", "-745", "not a transaction id"),
        ("recovery_target_xid", "7.5", "not a transaction id"),
        ("recovery_target_xid", "0x2E9", "not a transaction id"),
        ("recovery_target_xid", "7_45", "not a transaction id"),
        ("recovery_target_xid", str(2**64), "not a transaction id"),
        ("recovery_target_lsn", "3000060", "not an LSN"),
        ("recovery_target_lsn", "0/XYZ", "not an LSN"),
        ("recovery_target_lsn", "latest", "not an LSN"),
        ("recovery_target_name", "x" * 64, "longer than 63 bytes"),
        ("recovery_target_name", "ä" * 32, "longer than 63 bytes"),
        ("recovery_target_action", "stop", "is not one of promote, pause, shutdown"),
        ("recovery_target_timeline", "newest", "not latest, current or the number"),
        ("recovery_target_timeline", "0", "not latest, current or the number"),
        ("recovery_target_timeline", 0, "not latest, current or the number"),
        ("recovery_target_timeline", "-1", "not latest, current or the number"),
        ("recovery_target_timeline", "+1", "not latest, current or the number"),
        ("recovery_target_timeline", "1_0", "not latest, current or the number"),
        ("recovery_target_timeline", "0A", "not latest, current or the number"),
        ("recovery_target_timeline", "0x", "not latest, current or the number"),
        ("recovery_target_timeline", "00000002.history", "not latest, current or the number"),
        ("recovery_target_timeline", str(2**32), "not latest, current or the number"),
        ("recovery_target_timeline", "1.5", "not latest, current or the number"),
    ],
)
def test_malformed_option_is_refused(option: str, value: object, why: str) -> None:
    with pytest.raises(PitrError, match=why):
        RecoveryTarget.from_options({option: value})


@pytest.mark.parametrize("text", ["2026-03-01 14:30:00", "2026-03-01T14:30", "2026-03-01 14:30:00.5"])
def test_time_without_offset_is_refused_and_shown_with_one(text: str) -> None:
    with pytest.raises(PitrError, match="has no offset from UTC") as caught:
        RecoveryTarget.from_options({"recovery_target_time": text})
    shown = caught.value.message.partition("Write ")[2].partition(" for UTC")[0]
    assert parse_time(shown).tzinfo is UTC


@pytest.mark.parametrize(
    "text",
    [
        "yesterday",
        "2026-03-01",
        "2026-02-30 12:00:00+00",
        "2026-13-01 12:00:00+00",
        "2026-03-01 24:30:00+00",
        "2026-03-01 12:60:00+00",
        "2026-03-01 12:00:00+25:00",
        "2026-03-01 12:00:00 CET",
        "2026-03-01 12:00:00 Europe/Berlin",
        "2026-03-01 12:00:00.1234567+00",
        "01.03.2026 12:00:00+00",
        "1772366400",
        "2026-03-01 12:00:00+1",
        "0000-01-01 00:00:00+00",
        "0001-01-01 00:00:00+14:00",
        "9999-12-31 23:59:59-14:00",
        "2026-03-01 12:00:00+00\n2026-03-02 12:00:00+00",
    ],
)
def test_text_that_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(PitrError, match="is not a time"):
        parse_time(text)


TIMES = [
    ("2026-03-01 14:30:00+00", "2026-03-01 14:30:00.000000+00:00"),
    ("2026-03-01T14:30Z", "2026-03-01 14:30:00.000000+00:00"),
    ("2026-03-01 14:30:00 utc", "2026-03-01 14:30:00.000000+00:00"),
    ("2026-03-01 14:30:00.5+01", "2026-03-01 13:30:00.500000+00:00"),
    ("2026-03-01 14:30:00.000001-0530", "2026-03-01 20:00:00.000001+00:00"),
    ("2026-03-01 00:30:00+05:45", "2026-02-28 18:45:00.000000+00:00"),
    (" 2026-03-01 14:30:00.12 +00:00 ", "2026-03-01 14:30:00.120000+00:00"),
]


@pytest.mark.parametrize(("text", "utc"), TIMES)
def test_time_with_offset_is_brought_to_utc(text: str, utc: str) -> None:
    assert format_time(parse_time(text)) == utc
    assert parse_time(text).tzinfo is UTC


@pytest.mark.parametrize("python", interpreters())
def test_times_are_read_on_every_supported_interpreter(python: str) -> None:
    """datetime.fromisoformat() understands less before Python 3.11."""
    package = Path(module.__file__).parent
    code = (
        f"import sys; sys.path.insert(0, {str(package.parent)!r})\n"
        f"from {package.name}.target import format_time, parse_time\n"
        f"for text, utc in {TIMES!r}: assert format_time(parse_time(text)) == utc, text\n"
    )
    subprocess.run([python, "-I", "-S", "-B", "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("name", ["x" * 63, "ä" * 31 + "x"])
def test_longest_name_of_a_restore_point_is_taken(name: str) -> None:
    assert RecoveryTarget.from_options({"recovery_target_name": name}).name == name


@given(times)
def test_time_round_trips_to_the_microsecond(time: datetime.datetime) -> None:
    assert parse_time(format_time(time)) == time
    assert parse_time(time.isoformat()) == time


@given(st.integers(3, 2**64 - 1))
def test_transaction_ids_of_32_and_64_bits_are_read(xid: int) -> None:
    assert parse_xid(str(xid)) == xid


@pytest.mark.parametrize(
    ("value", "timeline"),
    [
        (None, "latest"),
        ("", "latest"),
        ("latest", "latest"),
        ("current", "current"),
        (3, "3"),
        ("010", "10"),
        ("0xA", "10"),
    ],
)
def test_timeline_is_latest_current_or_a_number(value: object, timeline: str) -> None:
    assert parse_timeline(value) == timeline


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "latest"),
        ({"recovery_target": "immediate"}, "immediate"),
        ({"recovery_target_lsn": "0/3000060"}, "lsn 0/3000060"),
        ({"recovery_target_lsn": "0/3000060", "recovery_target_inclusive": False}, "lsn 0/3000060 (exclusive)"),
        ({"recovery_target_time": "2026-03-01 14:30:00+01"}, "time 2026-03-01 13:30:00.000000+00:00"),
        ({"recovery_target_name": "n", "recovery_target_inclusive": False}, "name n"),
    ],
)
def test_target_is_named_in_messages_as_it_was_asked(options: dict[str, object], text: str) -> None:
    assert str(RecoveryTarget.from_options(options)) == text
