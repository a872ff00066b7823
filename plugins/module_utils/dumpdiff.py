# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Which objects of two dumps differ: the truth, and what was restored. Pure: two indexes in, findings out.

Everything that differs is a difference, but for the two kinds of noise that replay of WAL makes by design. These are
listed as explained, with both values:

- A sequence may stand ahead by up to 32 values, because nextval() writes WAL for that many at once
  (SEQ_LOG_VALS of sequence.c).
- Relations that are unlogged are reset by crash recovery, and cannot be read during recovery.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from .dumpindex import (
    FRAME,
    DumpIndex,
    DumpObject,
    SequenceDefinition,
    SequencePosition,
    TableRows,
    UnloggedTable,
)
from .errors import PitrError

SEQUENCE_AHEAD = 32  # SEQ_LOG_VALS of sequence.c

# What an explained difference says: reason, truth, restored.
_Words = Optional["tuple[str, str, str]"]


@dataclass(frozen=True)
class Pair:
    """An object of the truth and one of the restored cluster that belong together; None where there is none."""

    truth: Optional[DumpObject]
    restored: Optional[DumpObject]

    @property
    def either(self) -> DumpObject:
        item = self.truth or self.restored
        if item is None:
            raise AssertionError("a pair of nothing")
        return item


@dataclass(frozen=True)
class Finding(Pair):
    """A difference, not illustrated yet. ``kind`` is missing, extra, changed or order."""

    kind: str = "changed"
    label: str = ""


@dataclass(frozen=True)
class Explained:
    """A difference that replay makes by design."""

    database: str
    object: str
    reason: str
    truth: str
    restored: str


@dataclass(frozen=True)
class Comparison:
    """All differences that nothing explains, and those that replay explains."""

    findings: tuple[Finding, ...]
    explained: tuple[Explained, ...]

    @property
    def identical(self) -> bool:
        return not self.findings


class _Noise:
    """The rules of what replay may change, read from the definitions of the truth."""

    def __init__(self, truth: DumpIndex, restored: DumpIndex) -> None:
        self._truth_in_recovery = truth.in_recovery
        self._restored_in_recovery = restored.in_recovery
        self._unlogged: set[tuple[str, str]] = set()
        self._sequences: dict[tuple[str, str], SequenceDefinition] = {}
        for item in truth.objects:
            if isinstance(item.fact, UnloggedTable):
                self._unlogged.add((item.database, item.fact.relation))
            elif isinstance(item.fact, SequenceDefinition):
                self._sequences[item.database, item.fact.relation] = item.fact

    def explain(self, pair: Pair) -> Explained | None:
        """Why this pair differs, or None when only a mistake can explain it."""
        database = pair.either.database
        truth, restored = (None if item is None else item.fact for item in (pair.truth, pair.restored))
        words = self._table(database, truth, restored) or self._sequence(database, truth, restored)
        return None if words is None else Explained(database, pair.either.label, *words)

    def _table(self, database: str, truth: object, restored: object) -> _Words:
        known = truth if isinstance(truth, TableRows) else restored
        if not isinstance(known, TableRows) or (database, known.relation) not in self._unlogged:
            return None
        if isinstance(truth, TableRows) and isinstance(restored, TableRows):
            if restored.rows or restored.frame != truth.frame:
                return None
            return "an unlogged table is empty after a crash or a restore", f"{truth.rows} rows", "0 rows"
        return self._unreadable(truth, restored, isinstance(restored, TableRows) and not restored.rows, "0 rows")

    def _unreadable(self, truth: object, restored: object, reset: bool, state: str) -> _Words:
        """An unlogged relation that one of the dumps does not have, because its server was in recovery."""
        reason = "an unlogged relation cannot be read during recovery"
        if truth is None and restored is not None and self._truth_in_recovery and reset:
            return reason, "not readable", state
        if restored is None and truth is not None and self._restored_in_recovery:
            return reason, "readable", "not readable"
        return None

    def _sequence(self, database: str, truth: object, restored: object) -> _Words:
        known = truth if isinstance(truth, SequencePosition) else restored
        if not isinstance(known, SequencePosition):
            return None
        definition = self._sequences.get((database, known.relation))
        if definition is None:
            return None
        unlogged = definition.unlogged
        if unlogged is None:
            unlogged = (database, definition.table) in self._unlogged
        start = (definition.start, False)
        reset = isinstance(restored, SequencePosition) and (restored.value, restored.called) == start
        if not isinstance(truth, SequencePosition) or not isinstance(restored, SequencePosition):
            return self._unreadable(truth, restored, reset, _position(restored)) if unlogged else None
        if truth.frame != restored.frame:
            return None
        if unlogged:
            reason = "an unlogged sequence is at its start after a crash or a restore"
            return (reason, _position(truth), _position(restored)) if reset else None
        ahead, rest = divmod(restored.value - truth.value, definition.increment)
        if not (truth.called and restored.called) or rest or not 0 <= ahead <= SEQUENCE_AHEAD:
            return None
        reason = f"a sequence is {ahead} values ahead, WAL is written for {SEQUENCE_AHEAD} at once"
        return reason, _position(truth), _position(restored)


def _position(position: object) -> str:
    if not isinstance(position, SequencePosition):
        return ""
    return f"{position.value}" if position.called else f"{position.value}, not called yet"


def compare(truth: DumpIndex, restored: DumpIndex) -> Comparison:
    """Every difference between the truth and the restored cluster, in the order of the truth, extra objects last.

    Raises PitrError when the two cannot be compared: dumps of different major versions differ in how they say things.
    """
    for program in ("server", "pg_dump"):
        versions = truth.meta.get(program), restored.meta.get(program)
        if versions[0] != versions[1]:
            raise PitrError(
                f"The dumps cannot be compared: the {program} of the truth was of version {versions[0]}, now it is of"
                f" {versions[1]}. Use the server and the programs of one major version."
            )
    if truth.fingerprint == restored.fingerprint:
        return Comparison((), ())
    findings, lone = _databases(truth, restored)
    explained: list[Explained] = []
    same: dict[int, object] = {}  # id of an object that belongs to an explained pair → what both have in common
    noise = _Noise(truth, restored)
    for pair in _pairs(truth, restored, lone):
        reason = noise.explain(pair)
        if reason is None:
            kind = "missing" if pair.restored is None else "extra" if pair.truth is None else "changed"
            findings.append(Finding(pair.truth, pair.restored, kind, pair.either.label))
            continue
        for item in (pair.truth, pair.restored):
            if item is not None:
                same[id(item)] = len(explained) if pair.truth and pair.restored else None
        explained.append(reason)
    if not findings:
        # Frames follow from the objects around them; they are only told when nothing else is to be told.
        findings.extend(_sequence_of_objects(truth, restored, same))
    if not findings and not explained:
        raise PitrError("The fingerprints differ, and no difference was found. This is a defect of the comparison.")
    return Comparison(tuple(findings), tuple(explained))


def _databases(truth: DumpIndex, restored: DumpIndex) -> tuple[list[Finding], set[str]]:
    """Databases that only one side has: one finding each. Returns their names, too."""
    firsts: list[dict[str, DumpObject]] = []
    for index in (truth, restored):
        first: dict[str, DumpObject] = {}
        for item in index.objects:
            first.setdefault(item.database, item)
        firsts.append(first)
    ours, theirs = firsts
    lone = [Finding(item, None, "missing", f"DATABASE {name}") for name, item in ours.items() if name not in theirs]
    lone += [Finding(None, item, "extra", f"DATABASE {name}") for name, item in theirs.items() if name not in ours]
    return lone, {finding.either.database for finding in lone}


def _pairs(truth: DumpIndex, restored: DumpIndex, lone: set[str]) -> list[Pair]:
    """Pairs whose digests differ. Among objects of one name, equal ones belong together, whatever their order."""
    left = _by_key(truth, lone)
    right = _by_key(restored, lone)
    pairs: list[Pair] = []
    for key, items in left.items():
        others = right.get(key, [])
        if len(items) == len(others) == 1:
            if items[0].digest != others[0].digest:
                pairs.append(Pair(items[0], others[0]))
            continue
        remaining = list(others)
        unmatched = []
        for item in items:
            twin = next((other for other in remaining if other.digest == item.digest), None)
            if twin is None:
                unmatched.append(item)
            else:
                remaining.remove(twin)
        for position in range(max(len(unmatched), len(remaining))):
            pairs.append(Pair(*(side[position] if position < len(side) else None for side in (unmatched, remaining))))
    pairs.extend(Pair(None, item) for key, items in right.items() if key not in left for item in items)
    return pairs


def _by_key(index: DumpIndex, lone: set[str]) -> dict[tuple[str, str, str, str], list[DumpObject]]:
    result: dict[tuple[str, str, str, str], list[DumpObject]] = {}
    for item in index.objects:
        if item.type != FRAME and item.database not in lone:
            result.setdefault(item.key, []).append(item)
    return result


def _sequence_of_objects(truth: DumpIndex, restored: DumpIndex, same: dict[int, object]) -> list[Finding]:
    """The first place where the order of objects, or the text between them, differs."""
    sides = []
    for index in (truth, restored):
        # Without digest: a frame with no content. None in ``same``: an explained object that only one side has.
        sides.append([item for item in index.objects if item.digest and same.get(id(item), item) is not None])
    for position in range(max(map(len, sides))):
        left, right = (side[position] if position < len(side) else None for side in sides)
        keys = [None if item is None else same.get(id(item), (item.key, item.digest)) for item in (left, right)]
        if keys[0] == keys[1]:
            continue
        if left is None or right is None or FRAME in (left.type, right.type):
            return [_frame(left, right, [item for side in sides for item in side[position:]])]
        return [Finding(left, right, "order", left.label)]
    return []


def _frame(left: DumpObject | None, right: DumpObject | None, rest: list[DumpObject]) -> Finding:
    """The text between objects differs here; it is known by the object that follows."""
    following = next((item for item in rest if item.type != FRAME), None)
    label = f"text before {following.label}" if following else "text at the end"
    if left is not None and right is not None and left.type == right.type:
        return Finding(left, right, "changed", label)
    if left is not None and left.type == FRAME:
        return Finding(left, None, "missing", label)
    return Finding(None, right, "extra", label)
