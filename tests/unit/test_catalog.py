# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A backup's description: what is stored is what is read, and damage is noticed."""

from __future__ import annotations

import datetime
import json

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils.catalog import Backup, StoredFile, Tablespace
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.plugins.module_utils.wal import Lsn
from ansible_collections.pgdrill.pitr.tests.unit.support import EPOCH, make_backup
from hypothesis import given
from hypothesis import strategies as st

texts = st.text(st.characters(codec="utf-8"), max_size=20)
lsns = st.integers(0, 2**64 - 1).map(Lsn)
moments = st.datetimes(timezones=st.just(datetime.timezone.utc))
counts = st.integers(0, 2**62)

backups = st.builds(
    Backup,
    label=texts,
    type=st.just("full"),
    system_identifier=counts.map(str),
    postgresql_version=st.integers(15, 18),
    wal_segment_size=counts,
    timeline=st.integers(1, 2**32 - 1),
    start_lsn=lsns,
    stop_lsn=lsns,
    started_at=moments,
    stopped_at=moments,
    database_bytes=counts,
    compression=texts,
    verified=texts,
    files=st.lists(st.builds(StoredFile, texts, counts, texts), max_size=3).map(tuple),
    tablespaces=st.lists(st.builds(Tablespace, counts, texts), max_size=3).map(tuple),
    next_xid=st.none() | counts,
)


@given(backups)
def test_backup_round_trips_through_json(backup: Backup) -> None:
    assert Backup.from_dict(json.loads(json.dumps(backup.to_dict()))) == backup


def test_stored_bytes_and_seconds_are_shown() -> None:
    backup = make_backup(files=(StoredFile("base.tar", 10, "00"), StoredFile("backup_manifest", 5, "11")))
    shown = backup.to_dict()
    assert (shown["stored_bytes"], shown["seconds"]) == (15, 30.0)
    assert shown["stop_lsn"] == str(backup.stop_lsn) and shown["stopped_at"] == EPOCH.isoformat()


def test_unknown_keys_of_the_same_format_are_ignored() -> None:
    backup = make_backup()
    assert Backup.from_dict({**backup.to_dict(), "colour": "blue"}) == backup


@pytest.mark.parametrize(
    "key", ["label", "timeline", "start_lsn", "stop_lsn", "started_at", "stopped_at", "files", "tablespaces"]
)
def test_missing_key_is_named_as_damage(key: str) -> None:
    document = make_backup().to_dict()
    del document[key]
    with pytest.raises(PitrError, match=f"damaged: KeyError '{key}'"):
        Backup.from_dict(document)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("stop_lsn", "rubbish"),
        ("stop_lsn", None),
        ("stopped_at", "yesterday"),
        ("stopped_at", 5),
        ("files", None),
        ("files", [{"name": "base.tar"}]),
        ("files", ["base.tar"]),
        ("tablespaces", [7]),
    ],
)
def test_value_of_the_wrong_kind_is_refused(key: str, value: object) -> None:
    with pytest.raises(PitrError):
        Backup.from_dict({**make_backup().to_dict(), key: value})
