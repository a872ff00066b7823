# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What each transaction did to stored rows, told from its WAL records. Pure; nothing is read here.

WAL has no statements, but it has their traces, which :class:`Ledger` adds up per transaction until it ends:

- a deleted or updated row is a record of the resource manager Heap with the file that the row is in;
- a commit record lists the files that it removes, and (since PostgreSQL 15) the statistics that it drops, which name
  the dropped relations by their OIDs (xactdesc.c);
- VACUUM FULL, CLUSTER and ALTER TABLE remove files, too. They build a transient relation and drop it again (cluster.c),
  so that an OID is created and dropped by the same transaction;
- TRUNCATE gives a relation a new file with nothing in it; REINDEX gives one with at least a first page in it, which is
  a full-page image in WAL;
- each dropped table, view or composite type takes two rows of pg_type with it; an index or a sequence takes none.
"""

from __future__ import annotations

import datetime
import re
from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from .wal import Lsn
from .waldump import Record

# What a transaction can be looked for by. The first ones are what is looked for unless something else is asked.
LOSSES = ("drop", "truncate", "delete", "update", "drop_database", "drop_tablespace")
KINDS = (*LOSSES, "insert", "rewrite", "drop_index", "drop_sequence", "drop_unstored")
# Kinds that are looked for by a number of rows.
COUNTED = ("delete", "update", "insert")

# FirstNormalObjectId of transam.h: relations below belong to the system.
FIRST_NORMAL_OID = 16384
DEFAULT_TABLESPACE, GLOBAL_TABLESPACE = 1663, 1664
PG_TYPE, PG_CLASS, PG_INDEX, PG_SEQUENCE, PG_DATABASE = 1247, 1259, 2610, 2224, 1262
# PGSTAT_KIND_RELATION of pgstat_kind.h (pgstat.h before 18).
STATS_OF_RELATION = "2"

# A transaction that has touched more files is counted on without telling them apart.
MAX_FILES = 1000
# Transactions (with subtransactions) that are open at once and whose records are kept.
MAX_OPEN = 200_000

# Of xlog_heap.h: XLH_DELETE_IS_SUPER (a speculative insertion taken back), XLH_DELETE_IS_PARTITION_MOVE (an update).
_DELETE_IS_SUPER, _DELETE_IS_PARTITION_MOVE = 0x08, 0x10

_REL = re.compile(r"\brel (\d+)/(\d+)/(\d+)(?: fork (\w+))? blk (\d+)")
_PATH = re.compile(r"(?:(global)|(base)/(\d+)|pg_tblspc/(\d+)/[^/\s]+/(\d+))/(\d+)(?:_(\w+))?\Z")
_FLAGS = re.compile(r"flags:? 0x([0-9A-Fa-f]+)")
_OFFSET = re.compile(r"\boff:? (\d+)")
_LOCK = re.compile(r"xid (\d+) db (\d+) rel (\d+)")
_TUPLES = re.compile(r"(?:ntuples: (\d+)|(\d+) tuples)")
_RUNNING = re.compile(r"RUNNING_XACTS nextXid (\d+) latestCompletedXid \d+ oldestRunningXid (\d+)")
_CHECKPOINT_XID = re.compile(r"; xid \d+:(\d+);")
_GID = re.compile(r"PREPARE gid (.*): \d{4}-\d\d-\d\d \d\d:\d\d:\d\d(?:\.\d+)? \S+?(?:;|\Z)", re.DOTALL)
# Resource managers that write a new relation's first page with a record of their own instead of a full-page image.
_FIRST_PAGES = ("Sequence", "Hash", "BRIN", "Generic")
_RELIDS = re.compile(r"\brelids:? \[?([0-9 ,]+)")

RMGRS = ("Heap", "Transaction", "Standby", "Storage", "Database", "Tablespace", "XLOG", *_FIRST_PAGES)
# Beginnings of descriptions that the ledger looks at; everything else need not be taken apart.
_OPERATIONS = (
    b"DELETE", b"UPDATE", b"HOT_UPDATE", b"TRUNCATE", b"COMMIT", b"ABORT", b"PREPARE", b"RUNNING_XACTS", b"LOCK xid",
    b"CREATE", b"DROP", b"FPI ", b"FPI,", b"CHECKPOINT_SHUTDOWN", b"LOG rel", b"INIT_META_PAGE",
)  # fmt: skip
_INSERTS = (b"INSERT", b"MULTI_INSERT")


def is_wanted(line: bytes, inserts: bool = False) -> bool:
    """Whether a line of pg_waldump is one that the ledger looks at. Cheap: most lines of a busy server are not."""
    at = line.find(b" desc: ") + 7
    if line.startswith(_OPERATIONS, at):
        # A data page's image after a checkpoint says nothing; that of a new file belongs to a transaction.
        return not line.startswith(b"FPI", at) or b" tx:          0," not in line
    if line.startswith(b"INPLACE", at):
        return b"rel 1664/0/1262 " in line
    if line.startswith(b"rmgr: Generic "):
        return True
    return inserts and line.startswith(_INSERTS, at) and line.startswith((b"rmgr: Heap ", b"rmgr: Heap2 "))


class RelFile(NamedTuple):
    """Where a relation is stored (RelFileLocator): ``number`` is its file name, which is not its OID for ever."""

    tablespace: int
    database: int
    number: int

    def __str__(self) -> str:
        return f"{self.tablespace}/{self.database}/{self.number}"


def parse_path(text: str) -> tuple[RelFile, str] | None:
    """A path such as ``base/5/16385_init`` as file and fork (empty for the main one); None when it is none."""
    match = _PATH.match(text)
    if match is None:
        return None
    shared, base, of_base, tablespace, of_tablespace, number, fork = match.groups()
    if shared:
        return RelFile(GLOBAL_TABLESPACE, 0, int(number)), fork or ""
    if base:
        return RelFile(DEFAULT_TABLESPACE, int(of_base), int(number)), fork or ""
    return RelFile(int(tablespace), int(of_tablespace), int(number)), fork or ""


def precedes(one: int, other: int) -> bool:
    """Whether a 32-bit transaction id is older than another one (TransactionIdPrecedes)."""
    return bool((one - other) & 0x80000000) and one != other


@dataclass
class Account:
    """What one transaction or subtransaction has done so far."""

    first_lsn: Lsn
    deleted: Counter[RelFile] = field(default_factory=Counter)
    updated: Counter[RelFile] = field(default_factory=Counter)
    inserted: Counter[RelFile] = field(default_factory=Counter)
    # Rows deleted from pg_type, pg_class and so on, by (database, number of the file).
    catalog: Counter[tuple[int, int]] = field(default_factory=Counter)
    # New files of the main fork, those of them with a first page, and OIDs that were created.
    created: dict[RelFile, None] = field(default_factory=dict)
    filled: set[RelFile] = field(default_factory=set)
    born: set[tuple[int, int]] = field(default_factory=set)
    # (database, OID) of relations that were locked exclusively, in order; those that a TRUNCATE record names.
    locked: dict[tuple[int, int], None] = field(default_factory=dict)
    truncated: dict[tuple[int, int], None] = field(default_factory=dict)
    dropped_databases: dict[int, None] = field(default_factory=dict)
    dropped_tablespaces: dict[int, None] = field(default_factory=dict)
    # pg_database lost a row. ``point_of_no_return``: what was done to it before that no rollback takes back.
    database_row: bool = False
    point_of_no_return: Lsn | None = None
    gid: str = ""
    overflowed: bool = False

    def count(self, counter: Counter[RelFile], file: RelFile, rows: int = 1) -> None:
        """Add rows; beyond MAX_FILES they are only counted."""
        if file not in counter and len(counter) >= MAX_FILES:
            self.overflowed = True
            file = RelFile(0, file.database, 0)
        counter[file] += rows

    def add(self, other: Account) -> None:
        """A subtransaction becomes part of its parent."""
        self.first_lsn = min(self.first_lsn, other.first_lsn)
        for mine, theirs in (
            (self.deleted, other.deleted), (self.updated, other.updated), (self.inserted, other.inserted),
        ):  # fmt: skip
            for file, rows in theirs.items():
                self.count(mine, file, rows)
        self.catalog.update(other.catalog)
        self.created.update(other.created)
        self.filled |= other.filled
        self.born |= other.born
        self.locked.update(other.locked)
        self.truncated.update(other.truncated)
        self.dropped_databases.update(other.dropped_databases)
        self.dropped_tablespaces.update(other.dropped_tablespaces)
        self.database_row |= other.database_row
        points = [lsn for lsn in (self.point_of_no_return, other.point_of_no_return) if lsn is not None]
        self.point_of_no_return = min(points, default=None)
        self.gid = self.gid or other.gid
        self.overflowed |= other.overflowed


@dataclass
class Ended:
    """A committed transaction with everything that its subtransactions did.

    ``lsn`` is where the commit record begins. ``began_before``: its first records may lie before what was read.
    """

    xid: int
    subxids: tuple[int, ...]
    time: datetime.datetime
    lsn: Lsn
    timeline: int
    account: Account
    removed: tuple[RelFile, ...] = ()
    dropped: tuple[tuple[int, int], ...] = ()
    began_before: bool = False


class Ledger:
    """Adds up records in the order of WAL, and gives a transaction back when it commits. Aborted ones are forgotten."""

    def __init__(self, only: Iterable[int] | None = None) -> None:
        """``only``: transactions and subtransactions to look at, all others are passed over."""
        self._only = None if only is None else frozenset(only)
        self._open: dict[int, Account] = {}
        # Next transaction id at the first moment that WAL tells it: what is older may have begun before.
        self._known_from: int | None = None
        # In-place updates of pg_database by (block, offset): DROP DATABASE makes its row invalid before it deletes it,
        # and before it has a transaction id.
        self._in_place: OrderedDict[tuple[int, int], Lsn] = OrderedDict()
        self.dropped_accounts = 0

    def gap(self) -> None:
        """WAL is missing here: whatever was open may have ended since."""
        self._open.clear()
        self._in_place.clear()
        self._known_from = None

    def feed(self, record: Record) -> Ended | None:
        """Take one record."""
        text = record.description
        rmgr = record.rmgr
        if rmgr == "Transaction":
            return self._transaction(record)
        if rmgr == "Standby":
            if text.startswith("RUNNING_XACTS"):
                self._running(text)
            elif text.startswith("LOCK"):
                self._lock(record)
        elif rmgr == "XLOG":
            if text.startswith("CHECKPOINT_SHUTDOWN"):
                self._shut_down(text)
            elif text.startswith(("FPI ", "FPI,")):
                self._fill(record)
        elif rmgr in _FIRST_PAGES:
            self._fill(record)
        elif rmgr in ("Heap", "Heap2"):
            self._heap(record)
        elif rmgr == "Storage" and text.startswith("CREATE "):
            self._create(record)
        elif rmgr == "Database" and text.startswith("DROP"):
            match = re.search(r"dir \d+/(\d+)", text)
            account = self._account(record)
            if match is not None and account is not None:
                account.dropped_databases[int(match.group(1))] = None
        elif rmgr == "Tablespace" and text.startswith("DROP"):
            match = re.search(r"DROP (\d+)", text)
            account = self._account(record)
            if match is not None and account is not None:
                account.dropped_tablespaces[int(match.group(1))] = None
                account.point_of_no_return = account.first_lsn
        return None

    def _account(self, record: Record) -> Account | None:
        xid = record.xid
        if not xid or (self._only is not None and xid not in self._only):
            return None
        account = self._open.get(xid)
        if account is None:
            if len(self._open) >= MAX_OPEN:
                self.dropped_accounts += 1
                return None
            account = self._open[xid] = Account(record.lsn)
        return account

    def _fill(self, record: Record) -> None:
        account = self._open.get(record.xid)
        if account is not None and account.created:
            for match in _REL.finditer(record.description):
                account.filled.add(RelFile(*map(int, match.group(1, 2, 3))))

    def _heap(self, record: Record) -> None:
        text = record.description
        operation = text.partition(" ")[0].partition("+")[0]
        if operation == "INPLACE":
            match, offset = _REL.search(text), _OFFSET.search(text)
            if match is not None and offset is not None:
                place = int(match.group(5)), int(offset.group(1))
                self._in_place[place] = record.lsn
                self._in_place.move_to_end(place)
                while len(self._in_place) > MAX_FILES:
                    self._in_place.popitem(last=False)
            return
        account = self._account(record)
        if account is None:
            return
        if operation == "TRUNCATE":
            match = _RELIDS.search(text)
            # The record (of wal_level logical) does not tell the database; the transaction's locks do.
            database = next(iter(account.locked), (0, 0))[0]
            for oid in re.findall(r"\d+", match.group(1)) if match else ():
                account.truncated[database, int(oid)] = None
            return
        match = _REL.search(text)
        if match is None:
            return
        file = RelFile(*map(int, match.group(1, 2, 3)))
        if file.number < FIRST_NORMAL_OID:
            if operation == "DELETE":
                account.catalog[file.database, file.number] += 1
                if file.number == PG_DATABASE and file.tablespace == GLOBAL_TABLESPACE:
                    self._database_row(account, text, int(match.group(5)))
            return
        if operation == "DELETE":
            flags = _FLAGS.search(text)
            bits = int(flags.group(1), 16) if flags else 0
            if not bits & _DELETE_IS_SUPER:
                moved = bits & _DELETE_IS_PARTITION_MOVE
                account.count(account.updated if moved else account.deleted, file)
        elif operation in ("UPDATE", "HOT_UPDATE"):
            account.count(account.updated, file)
        elif operation == "INSERT":
            account.count(account.inserted, file)
        elif operation == "MULTI_INSERT":
            tuples = _TUPLES.search(text)
            account.count(account.inserted, file, int(tuples.group(1) or tuples.group(2)) if tuples else 1)

    def _database_row(self, account: Account, text: str, block: int) -> None:
        account.database_row = True
        offset = _OFFSET.search(text)
        made_invalid = self._in_place.get((block, int(offset.group(1)))) if offset else None
        account.point_of_no_return = made_invalid or account.first_lsn

    def _create(self, record: Record) -> None:
        account = self._account(record)
        found = parse_path(record.description.partition(" ")[2].strip())
        if account is None or found is None:
            return
        file, fork = found
        # A relation's first file bears its OID as its name.
        account.born.add((file.database, file.number))
        if not fork and len(account.created) < MAX_FILES:
            account.created[file] = None

    def _lock(self, record: Record) -> None:
        for xid, database, oid in _LOCK.findall(record.description):
            # LogStandbySnapshot writes one such record for all locks that are held.
            account = self._open.get(int(xid)) if int(xid) != record.xid else self._account(record)
            if account is not None and len(account.locked) < MAX_FILES:
                account.locked[int(database), int(oid)] = None

    def _running(self, text: str) -> None:
        """What runs now (LogStandbySnapshot): whatever is older has ended, if only by a crash."""
        match = _RUNNING.match(text)
        if match is None:
            return
        following, oldest = map(int, match.groups())
        if self._known_from is None:
            self._known_from = following
        for xid in [xid for xid in self._open if precedes(xid, oldest)]:
            del self._open[xid]

    def _shut_down(self, text: str) -> None:
        """Nothing runs but what was prepared."""
        match = _CHECKPOINT_XID.search(text)
        if match is not None and self._known_from is None:
            self._known_from = int(match.group(1))
        self._open = {xid: account for xid, account in self._open.items() if account.gid}

    def _transaction(self, record: Record) -> Ended | None:
        text = record.description
        if text.startswith("PREPARE"):
            account, match = self._account(record), _GID.match(text)
            if account is not None and match is not None:
                account.gid = match.group(1)
            return None
        time = record.time
        if time is None:
            return None
        xid = record.ended_xid
        subxids = tuple(map(int, _list(text, "subxacts").split()))
        accounts = [self._open.pop(each, None) for each in (xid, *subxids)]
        if not record.is_commit or (self._only is not None and xid not in self._only):
            return None
        whole = accounts[0] or Account(record.lsn)
        for account in accounts[1:]:
            if account is not None:
                whole.add(account)
        removed = [found[0] for found in map(parse_path, _list(text, "rels").split()) if found and not found[1]]
        dropped = [item.split("/") for item in _list(text, "dropped stats").split()]
        began_before = self._known_from is None or any(precedes(each, self._known_from) for each in (xid, *subxids))
        return Ended(
            xid,
            subxids,
            time,
            record.lsn,
            record.timeline,
            whole,
            tuple(dict.fromkeys(removed)),
            tuple((int(item[1]), int(item[2])) for item in dropped if len(item) == 3 and item[0] == STATS_OF_RELATION),
            began_before,
        )


def _list(text: str, name: str) -> str:
    """One list of a commit record; a prepared transaction's gid is not in it."""
    match = re.search(rf"; {name}: ([^;]*)", text)
    return match.group(1) if match else ""


@dataclass(frozen=True)
class Touched:
    """One relation and what was done to it. ``oid`` or ``file`` is known, or both."""

    kind: str
    database: int
    oid: int | None = None
    file: RelFile | None = None
    rows: int | None = None


@dataclass(frozen=True)
class Verdict:
    """What kind of transaction it was. ``certain`` is false when its traces allow for something harmless, too."""

    kinds: tuple[str, ...]
    touched: tuple[Touched, ...]
    certain: bool = True
    notes: tuple[str, ...] = ()

    def rows(self, kind: str) -> int:
        """Rows of one kind."""
        return sum(item.rows or 0 for item in self.touched if item.kind == kind)


def judge(ended: Ended) -> Verdict:
    """Tell the kinds of a transaction from what it left in WAL."""
    account = ended.account
    kinds: list[str] = []
    touched: list[Touched] = []
    notes: list[str] = []
    certain = True
    for kind, counter in (("delete", account.deleted), ("update", account.updated), ("insert", account.inserted)):
        # What a transaction does to relations that it made itself is nobody's loss.
        own = [
            Touched(kind, file.database, None, file, rows)
            for file, rows in counter.items()
            if file not in account.created
        ]
        if own:
            kinds.append(kind)
            touched += sorted(own, key=lambda item: -(item.rows or 0))
    if account.overflowed:
        notes.append(f"it touched more than {MAX_FILES} files; rows of the others are added up as file 0")
    if account.dropped_databases:
        if account.database_row:
            kinds.append("drop_database")
            touched += [Touched("drop_database", oid) for oid in account.dropped_databases]
        else:
            kinds.append("rewrite")
            notes.append("it removed a database's directory, as ALTER DATABASE SET TABLESPACE does with the old one")
    if account.dropped_tablespaces:
        kinds.append("drop_tablespace")
        touched += [Touched("drop_tablespace", 0, oid) for oid in account.dropped_tablespaces]
    for database in dict.fromkeys([file.database for file in ended.removed] + [at[0] for at in ended.dropped]):
        found = _relations(ended, database)
        kinds += found.kinds
        touched += found.touched
        notes += found.notes
        certain &= found.certain
    if ended.began_before and (ended.removed or ended.dropped):
        certain = False
        notes.append("it began before the WAL that was read; it may have rewritten a relation rather than dropped one")
    if account.gid:
        notes.append(
            f"it was a prepared transaction: just before its commit it exists as such, with its locks;"
            f" ROLLBACK PREPARED '{account.gid}' there ends it"
        )
    return Verdict(tuple(dict.fromkeys(kinds)), tuple(touched), certain, tuple(notes))


def _relations(ended: Ended, database: int) -> Verdict:
    """Dropped, truncated and rewritten relations of one database."""
    account = ended.account
    dropped = [at for at in ended.dropped if at[0] == database]
    transient = {at for at in dropped if at in account.born}
    lost = [at for at in _in_order(dropped, account.locked) if at not in transient]
    removed = [file for file in ended.removed if file.database == database and file not in account.created]
    kinds: list[str] = []
    touched: list[Touched] = []
    notes: list[str] = []
    certain = True
    if transient:
        kinds.append("rewrite")
    if lost:
        tables = account.catalog[database, PG_TYPE] // 2 - _heaps(transient)
        if not account.catalog[database, PG_CLASS]:
            # VACUUM FULL of a catalog gives it a new file, too; then its rows cannot be recognised.
            certain = False
            kinds.append("drop")
            notes.append("the system catalogs have moved: what was dropped may be an index or a sequence")
        elif tables > 0:
            kinds.append("drop" if removed else "drop_unstored")
            if not removed:
                notes.append(
                    "no file was removed: a temporary table, a view, or a partitioned table without partitions"
                )
        elif not transient:
            kinds.append("drop_index" if account.catalog[database, PG_INDEX] else "drop_sequence")
        if kinds[-1] != "rewrite":
            touched += [Touched(kinds[-1], database, oid) for _db, oid in lost]
    places = {(file.tablespace, file.database) for file in removed}
    emptied = [
        file
        for file in account.created
        if file.database == database
        and file not in account.filled
        and file not in ended.removed
        # A new relation's file bears the OID that the transaction holds a lock on.
        and (file.database, file.number) not in account.locked
        and (file.tablespace, file.database) in places
    ]
    named = [at for at in account.truncated if at not in account.born and at[0] in (0, database)]
    if transient or not removed:
        emptied = []
    # A dropped relation's files are removed as well; a new one beside it was emptied only when a file is left over.
    numbers = {oid for _db, oid in lost}
    if lost and not [file for file in removed if file.number not in numbers]:
        emptied = []
    if named or emptied:
        kinds.append("truncate")
        if named:
            touched += [Touched("truncate", database, oid) for _db, oid in named]
        else:
            touched += [Touched("truncate", database, None, file) for file in emptied]
            known = {*transient, *lost, *account.born}
            touched += [Touched("truncate", database, oid) for db, oid in account.locked if (db, oid) not in known]
    elif removed and not lost and not transient:
        kinds.append("rewrite")
    if "rewrite" in kinds and not touched:
        touched += [Touched("rewrite", database, None, file) for file in removed]
    return Verdict(tuple(kinds), tuple(touched), certain, tuple(notes))


def _in_order(dropped: list[tuple[int, int]], locked: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Dropped relations in the order in which they were locked: a table comes before what belongs to it."""
    rank = {at: position for position, at in enumerate(locked)}
    return sorted(dropped, key=lambda at: (rank.get(at, len(rank)), at))


def _heaps(transient: Iterable[tuple[int, int]]) -> int:
    """How many of the transient relations are tables: a TOAST table and its index have OIDs in a row, and no types."""
    oids = {oid for _db, oid in transient}
    indexes = sum(1 for oid in oids if oid - 1 in oids)
    return len(oids) - 2 * indexes
