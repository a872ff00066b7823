# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Statements in a server's log that may have destroyed something: csvlog, jsonlog, or stderr with a known prefix.

A log is written in the server's ``log_timezone``, which it names by an abbreviation ("CET", "IST") that may mean
several; only UTC and numbers are taken as they are. Times are cut off after milliseconds. A statement is logged before
it gets a transaction id (the field is 0 then), but a later line of the same virtual transaction may have it.
Sources: "Error Reporting and Logging" of the documentation, csvlog.c, jsonlog.c and log_status_format() of elog.c.
"""

from __future__ import annotations

import csv
import datetime
import glob
import gzip
import io
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import IO, Any

from .errors import PitrError

# Statements that are kept at most, and characters of each.
MAX_STATEMENTS = 2000
MAX_TEXT = 1000

_CSV = (
    "time", "user", "database", "pid", "client", "session", "line", "command", "started", "vxid", "xid", "severity",
    "state", "message", "detail", "hint", "internal", "internal_at", "context", "query", "query_at", "location",
    "application", "backend",
)  # fmt: skip
_JSON = {
    "timestamp": "time", "user": "user", "dbname": "database", "pid": "pid", "session_id": "session", "vxid": "vxid",
    "txid": "xid", "error_severity": "severity", "message": "message", "detail": "detail",
    "application_name": "application", "remote_host": "client",
}  # fmt: skip
_TIME = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(?:\.\d{1,6})?)(?: (\S+))?\Z")
_UTC = ("UTC", "GMT", "Z", "UCT", "Etc/UTC")
_OFFSET = re.compile(r"([+-])(\d\d)(?::?(\d\d))?\Z")
# Kinds by what a statement begins with, or has after a semicolon, a WITH or an EXPLAIN ANALYZE.
_STATEMENT = (
    ("drop_database", re.compile(r"\bDROP\s+DATABASE\b", re.I)),
    ("drop_tablespace", re.compile(r"\bDROP\s+TABLESPACE\b", re.I)),
    ("drop", re.compile(r"\bDROP\s+(?:FOREIGN\s+)?(?:TABLE|SCHEMA|OWNED|MATERIALIZED\s+VIEW|EXTENSION|TYPE)\b", re.I)),
    ("truncate", re.compile(r"\bTRUNCATE\b", re.I)),
    ("delete", re.compile(r"\b(?:DELETE\s+FROM|MERGE\s+INTO)\b", re.I)),
    ("update", re.compile(r"\b(?:UPDATE\s+\S|MERGE\s+INTO|ON\s+CONFLICT\b.*\bDO\s+UPDATE)\b", re.I | re.S)),
)
# Comments and string literals. What is between dollars is code in most cases, and is left as it is.
_PROSE = re.compile(r"(\$\w*\$).*?\1|/\*.*?\*/|--[^\n]*|'(?:[^']|'')*'", re.S)
_DURATION = re.compile(r"duration: ([0-9.]+) ms\s*(?:(?:parse|bind|execute) [^:]*: |statement: |plan:)?", re.I)
_BEGIN = re.compile(r"(?:statement|execute [^:]*|fastpath function call[^:]*): |AUDIT: ", re.I)
_FAILED = ("ERROR", "FATAL", "PANIC")


@dataclass(frozen=True)
class Statement:
    """One statement of a log. ``time`` is cut off after milliseconds; ``xid`` is 0 when the log does not tell it."""

    time: datetime.datetime
    kinds: tuple[str, ...]
    text: str
    xid: int = 0
    user: str = ""
    database: str = ""
    application: str = ""
    client: str = ""
    session: str = ""
    vxid: str = ""
    place: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For a module's result."""
        return {
            "time": self.time.isoformat(timespec="milliseconds"),
            "user": self.user,
            "database": self.database,
            "application": self.application,
            "client": self.client,
            "xid": self.xid or None,
            "statement": self.text,
            "place": self.place,
        }


def kinds_of(text: str) -> tuple[str, ...]:
    """What a statement may do to rows; empty for a harmless one."""
    code = _PROSE.sub(lambda match: match.group(0) if match.group(1) else " ", text)
    return tuple(kind for kind, pattern in _STATEMENT if pattern.search(code))


def mentions(text: str, relation: str) -> bool:
    """Whether a statement names this relation, with or without its schema and its quotes."""
    schema, _dot, table = relation.rpartition(".")
    name = rf'"?{re.escape(table)}"?(?![\w$])'
    return (
        re.search(rf'(?<![\w$."]){name}|(?<![\w$])"?{re.escape(schema or "x")}"?\s*\.\s*{name}', text, re.I) is not None
    )


class Zone:
    """How the times of a log are read. ``name`` is the server's log_timezone, empty when nobody has told."""

    def __init__(self, name: str = "") -> None:
        """Raises PitrError for a name that this host does not know."""
        self._zone: datetime.tzinfo | None = None
        self.name = name
        if name in _UTC:
            self._zone = datetime.timezone.utc
        elif name:
            import zoneinfo

            try:
                self._zone = zoneinfo.ZoneInfo(name)
            except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
                message = f"This host does not know the time zone '{name}' (log_timezone)."
                raise PitrError(f"{message} Write it as SHOW log_timezone does, such as Europe/Berlin.") from None

    def read(self, text: str, place: str) -> datetime.datetime:
        """A log's time in UTC. Raises PitrError when it may mean several moments."""
        match = _TIME.match(text.strip())
        if match is None:
            raise PitrError(f"{place}: '{text[:60]}' is not a time of a server log.")
        when, zone = match.groups()
        naive = datetime.datetime.fromisoformat(when if "." not in when else f"{when:0<26}")
        if zone in _UTC:
            return naive.replace(tzinfo=datetime.timezone.utc)
        offset = _OFFSET.match(zone or "")
        if offset is not None:
            sign, hours, minutes = offset.groups()
            delta = datetime.timedelta(hours=int(hours), minutes=int(minutes or 0))
            value = naive - delta if sign == "+" else naive + delta
            return value.replace(tzinfo=datetime.timezone.utc)
        if self._zone is None:
            raise PitrError(
                f"{place}: '{zone or 'no zone'}' does not tell an offset from UTC, and a guessed time zone finds the"
                " wrong transaction. Say which zone the server logs in with log_timezone (SHOW log_timezone)."
            )
        fitting = [
            value.astimezone(datetime.timezone.utc)
            for value in (naive.replace(tzinfo=self._zone, fold=fold) for fold in (0, 1))
            if zone is None or value.tzname() == zone
        ]
        if not fitting:
            raise PitrError(f"{place}: {self.name} has no time {text}. Is log_timezone right?")
        # Without its abbreviation the hour that is repeated in autumn is there twice; take the earlier one.
        return fitting[0]


# What the escapes of log_line_prefix stand for; all others are passed over.
_ESCAPES = {
    "a": r"(?P<application>.*?)", "u": r"(?P<user>.*?)", "d": r"(?P<database>.*?)", "p": r"\d+",
    "r": r"(?P<client>\S*?)", "h": r"(?P<host>\S*?)", "c": r"(?P<session>[0-9a-f]+\.[0-9a-f]+)",
    "v": r"(?P<vxid>-?\d*/?\d*)", "x": r"(?P<xid>\d+)", "t": r"(?P<time>\d{4}-\S+ \S+ \S+)",
    "m": r"(?P<time_ms>\d{4}-\S+ \S+ \S+)", "n": r"(?P<epoch>\d+\.\d+)", "l": r"\d+", "e": r"[0-9A-Z]{5}",
    "i": r".*?", "b": r".*?", "s": r"\d{4}-\S+ \S+ \S+", "P": r"\d*", "Q": r"-?\d+", "L": r"\S*?",
}  # fmt: skip


class Prefix:
    """A ``log_line_prefix`` as a pattern."""

    def __init__(self, text: str) -> None:
        """Raises PitrError for a prefix without a time."""
        pattern = ""
        optional = 0
        seen: set[str] = set()
        for literal, padding, letter in re.findall(r"([^%]+)|%(-?\d*)(.)", text):
            if literal or letter == "%":
                pattern += re.escape(literal or "%")
            elif letter == "q":
                # Background processes stop here.
                pattern += "(?:"
                optional += 1
            elif letter in _ESCAPES and letter not in seen:
                seen.add(letter)
                pattern += rf" *{_ESCAPES[letter]} *" if padding else _ESCAPES[letter]
            else:
                pattern += r".*?"
        if not seen & {"t", "m", "n"}:
            raise PitrError(f"The log_line_prefix '{text}' has no time (%m, %t or %n), so its lines cannot be placed.")
        self._pattern = re.compile(pattern + ")?" * optional + r"(?P<severity>[A-Z][A-Z0-9]*):  (?P<message>.*)", re.S)

    def match(self, line: str) -> dict[str, str] | None:
        """The fields of a line, or None for a line that continues another one."""
        match = self._pattern.match(line)
        if match is None:
            return None
        fields = {name: value or "" for name, value in match.groupdict().items()}
        fields["time"] = fields.get("time_ms") or fields.get("time") or ""
        if fields.get("epoch"):
            moment = datetime.datetime.fromtimestamp(float(fields["epoch"]), datetime.timezone.utc)
            fields["time"] = moment.strftime("%Y-%m-%d %H:%M:%S.%f UTC")
        return fields


class LogReader:
    """Reads logs, a line at a time, and keeps what may have destroyed something between two times."""

    def __init__(
        self,
        zone: Zone,
        prefix: str = "",
        since: datetime.datetime | None = None,
        until: datetime.datetime | None = None,
        relation: str = "",
    ) -> None:
        """``relation``: keep only statements that name it, and those that need not (DROP SCHEMA, DROP OWNED …)."""
        self._zone = zone
        self._prefix = prefix
        self._since = since
        self._until = until
        self._relation = relation
        self.files: list[str] = []
        self.lines = 0
        self.left_out = 0

    def statements(self, patterns: Sequence[str]) -> list[Statement]:
        """All statements, by time. Raises PitrError when a pattern matches nothing or a log cannot be read."""
        found: list[Statement] = []
        # What later lines tell of a virtual transaction.
        xids: dict[tuple[str, str], int] = {}
        failed: set[tuple[str, str, str]] = set()
        for path in _paths(patterns):
            self.files.append(path)
            for fields, place in self._rows(path):
                self.lines += 1
                key = fields.get("session") or fields.get("pid", ""), fields.get("vxid", "")
                xid = int(fields.get("xid") or 0) if (fields.get("xid") or "0").isdigit() else 0
                if xid and all(key):
                    xids[key] = xid
                    if len(xids) > 50 * MAX_STATEMENTS:
                        del xids[next(iter(xids))]
                if fields.get("severity") in _FAILED:
                    failed.add((*key, _text(fields.get("query", ""))))
                    continue
                statement = self._statement(fields, place, xid)
                if statement is not None:
                    if len(found) >= MAX_STATEMENTS:
                        self.left_out += 1
                        continue
                    found.append(statement)
        result = []
        for statement in found:
            key = statement.session, statement.vxid
            if not statement.xid and all(key) and key in xids:
                statement = replace(statement, xid=xids[key])
            if (*key, statement.text) not in failed:
                result.append(statement)
        return sorted(result, key=lambda item: item.time)

    def _statement(self, fields: Mapping[str, str], place: str, xid: int) -> Statement | None:
        message = fields.get("message", "")
        start = _BEGIN.search(message[:200])
        if start is None:
            return None
        text = message[start.end() :]
        kinds = kinds_of(text)
        if not kinds or (self._relation and not (mentions(text, self._relation) or _is_wide(text))):
            return None
        time = self._zone.read(fields.get("time", ""), place)
        duration = _DURATION.match(message)
        if duration is not None:
            # Logged at the statement's end.
            time -= datetime.timedelta(milliseconds=float(duration.group(1)))
        early = self._since is not None and time < self._since
        if early or (self._until is not None and time > self._until):
            return None
        return Statement(
            time, kinds, _text(text), xid, fields.get("user", ""), fields.get("database", ""),
            fields.get("application", ""), fields.get("client") or fields.get("host", ""),
            fields.get("session") or fields.get("pid", ""), fields.get("vxid", ""), place,
        )  # fmt: skip

    def _rows(self, path: str) -> Iterator[tuple[dict[str, str], str]]:
        try:
            with _open(path) as stream:
                name = os.path.basename(path).removesuffix(".gz")
                if name.endswith(".csv"):
                    yield from _csv_rows(stream, path)
                elif name.endswith(".json"):
                    yield from _json_rows(stream, path)
                else:
                    yield from self._stderr_rows(stream, path)
        except (OSError, EOFError) as error:
            raise PitrError(f"{path} cannot be read: {error}.") from None

    def _stderr_rows(self, stream: IO[str], path: str) -> Iterator[tuple[dict[str, str], str]]:
        if not self._prefix:
            raise PitrError(f"{path} is neither .csv nor .json. Say how its lines begin with log_line_prefix.")
        prefix = Prefix(self._prefix)
        fields: dict[str, str] | None = None
        at = 0
        any_line = False
        for number, line in enumerate(stream, 1):
            line = line.rstrip("\n")
            found = None if line.startswith("\t") else prefix.match(line)
            if found is None:
                if fields is not None and len(fields["message"]) < 10 * MAX_TEXT:
                    fields["message"] += "\n" + line.lstrip("\t")
                continue
            any_line = True
            if found["severity"] == "STATEMENT" and fields is not None and fields["severity"] in _FAILED:
                fields["query"] = found["message"]
                continue
            if fields is not None:
                yield fields, f"{path}:{at}"
            fields, at = found, number
        if fields is not None:
            yield fields, f"{path}:{at}"
        if not any_line and os.path.getsize(path):
            raise PitrError(f"No line of {path} begins like '{self._prefix}'. Is log_line_prefix right?")


def _paths(patterns: Sequence[str]) -> list[str]:
    paths: dict[str, None] = {}
    for pattern in patterns:
        matching = sorted(glob.glob(pattern))
        if not matching:
            raise PitrError(f"log_files: nothing matches {pattern}.")
        paths.update(dict.fromkeys(path for path in matching if os.path.isfile(path)))
    return list(paths)


def _open(path: str) -> IO[str]:
    if path.endswith(".gz"):
        return io.TextIOWrapper(gzip.open(path, "rb"), encoding="utf-8", errors="replace", newline="")
    return open(path, encoding="utf-8", errors="replace", newline="")


def _csv_rows(stream: IO[str], path: str) -> Iterator[tuple[dict[str, str], str]]:
    csv.field_size_limit(1 << 30)
    reader = csv.reader(stream)
    try:
        for row in reader:
            if len(row) < len(_CSV) - 1:
                # The line that the server is writing right now; any other one is no csvlog.
                if reader.line_num <= 1:
                    raise PitrError(f"{path}:1 has {len(row)} fields; a csvlog has {len(_CSV)} or more.")
                continue
            yield dict(zip(_CSV, row)), f"{path}:{reader.line_num}"
    except csv.Error as error:
        raise PitrError(f"{path}:{reader.line_num}: {error}.") from None


def _json_rows(stream: IO[str], path: str) -> Iterator[tuple[dict[str, str], str]]:
    for number, line in enumerate(stream, 1):
        try:
            document = json.loads(line)
        except ValueError:
            if number == 1 and not line.lstrip().startswith("{"):
                raise PitrError(f"{path}:1 is no line of a jsonlog.") from None
            continue
        if isinstance(document, dict):
            fields = {ours: str(document[theirs]) for theirs, ours in _JSON.items() if document.get(theirs) is not None}
            fields["query"] = str(document.get("statement") or "")
            yield fields, f"{path}:{number}"


def _text(text: str) -> str:
    """On one line, cut off."""
    return " ".join(text.split())[:MAX_TEXT]


def _is_wide(text: str) -> bool:
    """Whether a statement destroys relations without naming them."""
    return re.search(r"\b(?:DROP\s+(?:SCHEMA|OWNED|DATABASE|EXTENSION)|CASCADE|EXECUTE|DO)\b", text, re.I) is not None
