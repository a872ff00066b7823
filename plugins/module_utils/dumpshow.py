# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What two dumps differ in, for people: the first lines that differ, cut, and without passwords.

The dumps are read in step, so that memory stays flat. The text comes through readers that are passed in.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Callable, Optional, Protocol

from .dumpdiff import Finding
from .dumpindex import CLUSTER, FRAME, DumpObject, text_of
from .dumpparse import is_noise
from .errors import PitrError

SHOWN = 200  # characters of a line that are shown
_CHUNK = 1024 * 1024
_LINE = 4096  # bytes of a line that are read for being shown, before and behind the first difference

# Objects that hold credentials in many shapes, over several lines.
_HIDDEN_TYPES = frozenset(["FOREIGN DATA WRAPPER", "SERVER", "SUBSCRIPTION", "USER MAPPING"])
_SETTING_TYPES = frozenset(["DATABASE PROPERTIES", "HBA RULE", "ROLE SETTING", "SETTING"])
_DATA_TYPES = frozenset(["BLOBS", "TABLE DATA"])
_HIDDEN = "(not shown, it may hold credentials)"
_REDACTED = "'(redacted)'"
_SECRET = re.compile(r"passw|passphrase|secret|token|salt|jwt|credential|conninfo|api_?key|private_?key", re.IGNORECASE)
_PASSWORD = re.compile(
    r"""(passw(?:or)?d"?\s*(?:[=:]\s*)?)(?:''[^']+''|'(?:[^']|'')*'?)|(passw(?:or)?d\s*[=:]\s*)[^\s'",;]+""",
    re.IGNORECASE,
)


class Reader(Protocol):
    """What codec.open_reader gives."""

    def read(self, size: int) -> bytes: ...


OpenReader = Callable[[], AbstractContextManager[Reader]]


@dataclass(frozen=True)
class Difference:
    """One difference as it is shown. Lines count from 1 in the uncompressed dumps; None where a side has none."""

    database: str
    object: str
    kind: str
    line: Optional[int]
    restored_line: Optional[int]
    object_line: Optional[int]
    truth: str
    restored: str


class _Text:
    """Objects of one dump, read forward; a step back opens the dump again."""

    def __init__(self, open_reader: OpenReader) -> None:
        self._open = open_reader
        self._stack = ExitStack()
        self._reader: Reader | None = None
        self._position = 0

    def seek(self, item: DumpObject | None) -> None:
        """Go to the beginning of an object, which may then be read."""
        self._left = 0 if item is None else item.size
        if item is None:
            return
        if self._reader is None or item.offset < self._position:
            self.close()
            self._reader = self._stack.enter_context(self._open())
            self._position = 0
        while self._position < item.offset:
            self._position += len(self._take(min(_CHUNK, item.offset - self._position)))

    def read(self, size: int) -> bytes:
        """Up to ``size`` bytes of the object, fewer only at its end."""
        if not self._left:
            return b""
        data = self._take(min(size, self._left))
        self._left -= len(data)
        self._position += len(data)
        return data

    def _take(self, size: int) -> bytes:
        data = b"" if self._reader is None else self._reader.read(size)
        if len(data) < size:
            raise PitrError("A stored dump is shorter than its index says. It was changed; take it again.")
        return data

    def close(self) -> None:
        self._stack.close()
        self._reader = None


def illustrate(
    findings: Sequence[Finding], open_truth: OpenReader, open_restored: OpenReader, limit: int
) -> list[Difference]:
    """The first ``limit`` findings with their lines, read in step so that memory stays flat.

    Raises PitrError when a stored dump does not match its index.
    """
    truth, restored = _Text(open_truth), _Text(open_restored)
    try:
        return [_illustrate(finding, truth, restored) for finding in findings[:limit]]
    finally:
        truth.close()
        restored.close()


def _illustrate(finding: Finding, truth: _Text, restored: _Text) -> Difference:
    left, right = finding.truth, finding.restored
    if finding.kind == "order" and left is not None and right is not None:
        texts = f"here comes {left.label}", f"here comes {right.label}"
        return Difference(left.database, finding.label, finding.kind, left.line, right.line, None, *texts)
    if finding.either.type == FRAME and finding.label.startswith("DATABASE "):
        line, restored_line = (None if item is None else item.line for item in (left, right))
        return Difference(finding.either.database, finding.label, finding.kind, line, restored_line, None, "", "")
    truth.seek(left)
    restored.seek(right)
    if left is not None and right is not None and left.type == right.type == FRAME:
        return _illustrate_frame(finding, left, right, truth, restored)
    if left is None or right is None:
        number, line_of_either = _first_statement(truth if right is None else restored, finding.either)
        shown = show(finding.either, line_of_either, b"")[0]
        texts = (shown, "") if right is None else ("", shown)
    else:
        found = first_difference(truth, restored)
        if found is None:
            raise PitrError(
                f"The stored dumps do not differ in {left.label}, their indexes do. One was changed after it was taken."
            )
        number, before, line_of_truth, line_of_restored = found
        texts = show(left, line_of_truth, line_of_restored, before)
    line, restored_line = (None if item is None else item.line + number for item in (left, right))
    return Difference(
        finding.either.database, finding.label, finding.kind, line, restored_line, number + 1, texts[0], texts[1]
    )


def _illustrate_frame(
    finding: Finding, left: DumpObject, right: DumpObject, truth: _Text, restored: _Text
) -> Difference:
    """Frames are a few lines, of which some are noise."""
    sides = []
    for text in (truth, restored):
        numbered = enumerate(text.read(_CHUNK).split(b"\n"))
        sides.append([(number, line) for number, line in numbered if not is_noise(line)] + [(0, b"")])
    pairs = (pair for pair in zip(*sides) if pair[0][1] != pair[1][1])
    (number, line), (other_number, other_line) = next(pairs, (sides[0][-1], sides[1][-1]))
    texts = show(left, line[:_LINE], other_line[:_LINE])
    lines = left.line + number, right.line + other_number
    return Difference(left.database, finding.label, finding.kind, *lines, number + 1, *texts)


def _first_statement(text: _Text, item: DumpObject) -> tuple[int, bytes]:
    """Number (from 0) and text of the first line that is neither blank nor a comment."""
    lines = text.read(4 * _LINE).split(b"\n")
    for number, line in enumerate(lines):
        of_preamble = item.database == CLUSTER and line.startswith(b"-- " + item.type.encode())
        if line.strip() and (of_preamble or not line.startswith(b"--")):
            return number, line[:_LINE]
    return 0, lines[0][:_LINE]


def first_difference(left: Reader, right: Reader) -> tuple[int, int, bytes, bytes] | None:
    """The first line that differs, of two texts read in step; None when there is none.

    Returns its number from 0, how many bytes of it were left out at its beginning, and the two lines, both cut.
    """
    number, head, column = 0, b"", 0
    while True:
        one, other = left.read(_CHUNK), right.read(_CHUNK)
        if one == other:
            if not one:
                return None
            number += one.count(b"\n")
            start = one.rfind(b"\n") + 1
            if start:
                head, column = b"", 0
            column += len(one) - start
            head = (head + one[start:])[-_LINE:]
            continue
        at = _common(one, other)
        number += one.count(b"\n", 0, at)
        start = one.rfind(b"\n", 0, at) + 1
        if start:
            head, column = b"", 0
        column += at - start
        head = (head + one[start:at])[-_LINE:]
        lines = [head + _rest_of_line(side[at:], reader) for side, reader in ((one, left), (other, right))]
        return number, column - len(head), lines[0], lines[1]


def _rest_of_line(data: bytes, reader: Reader) -> bytes:
    if len(data) < _LINE:
        data += reader.read(_LINE)
    return data[:_LINE].split(b"\n", 1)[0]


def _common(one: bytes, other: bytes) -> int:
    """How many bytes two texts have in common at their beginning."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def show(item: DumpObject, truth: bytes, restored: bytes, before: int = 0) -> tuple[str, str]:
    """Two lines as they may be shown: without passwords, cut around the first difference.

    ``before`` is how many bytes of the lines were left out at their beginning.
    """
    lines = [text_of(line) for line in (truth, restored)]
    if item.type in _HIDDEN_TYPES or (item.type in _SETTING_TYPES and any(map(_SECRET.search, lines))):
        return _HIDDEN, _HIDDEN
    if before and item.type not in _DATA_TYPES:
        # It is unknown whether a password was announced in what was left out.
        text = f"(not shown, {before + _LINE} bytes into a long line)"
        return text, text
    shown = [_PASSWORD.sub(_redact, line) for line in lines]
    if shown[0] == shown[1] and lines[0] != lines[1]:
        shown[1] = shown[1].replace(_REDACTED, "'(redacted, differs)'")
    column = next((n for n, (one, other) in enumerate(zip(*shown)) if one != other), min(map(len, shown)))
    return _cut(shown[0], column, before > 0), _cut(shown[1], column, before > 0)


def _redact(found: re.Match[str]) -> str:
    return (found.group(1) or found.group(2)) + _REDACTED


def _cut(line: str, column: int, more_before: bool) -> str:
    if len(line) <= SHOWN:
        return ("…" if more_before else "") + line
    start = max(0, min(column - SHOWN // 2, len(line) - SHOWN))
    before = "…" if start or more_before else ""
    after = "…" if start + SHOWN < len(line) else ""
    return before + line[start : start + SHOWN] + after
