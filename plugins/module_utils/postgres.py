# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""PostgreSQL as the engine meets it: its programs, pg_control, connections, and quoting for its configuration."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import PitrError
from .wal import Lsn

SUPPORTED = (15, 16, 17, 18)

# Seconds between two looks at postmaster.pid.
LOOK = 0.01
# GUCs that a standby or a recovery must have at least as high as the server that wrote the WAL
# (CheckRequiredParameterValues of xlogrecovery.c), with their line in pg_controldata.
FLOORS = {
    "max_connections": "max_connections setting",
    "max_worker_processes": "max_worker_processes setting",
    "max_wal_senders": "max_wal_senders setting",
    "max_prepared_transactions": "max_prepared_xacts setting",
    "max_locks_per_transaction": "max_locks_per_xact setting",
}


@dataclass(frozen=True)
class Login:
    """Where and as whom to connect; the options of community.postgresql."""

    host: str = ""
    port: int = 5432
    user: str = "postgres"
    password: str = ""
    unix_socket: str = ""
    db: str = "postgres"
    # libpq's sslmode and sslrootcert.
    ssl_mode: str = ""
    ca_cert: str = ""

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> Login:
        """From a module's ``login_*`` options."""
        return cls(
            host=params.get("login_host") or "",
            port=int(params.get("login_port") or 5432),
            user=params.get("login_user") or "postgres",
            password=params.get("login_password") or "",
            unix_socket=params.get("login_unix_socket") or "",
            db=params.get("login_db") or "postgres",
            ssl_mode=params.get("ssl_mode") or "",
            ca_cert=params.get("ca_cert") or "",
        )

    def __str__(self) -> str:
        return f"{self.user}@{self.host or self.unix_socket or 'local socket'}:{self.port}"

    def connect(self, db: str = "", application_name: str = "pgdrill.pitr", replication: bool = False) -> Any:
        """A psycopg2 connection in autocommit mode, or one that takes commands of the replication protocol.

        Raises PitrError when there is none to be had.
        """
        try:
            import psycopg2
            import psycopg2.extras
        except ImportError:
            raise PitrError("The Python library psycopg2 is missing on this host. Install python3-psycopg2.") from None
        parameters: dict[str, Any] = {
            "port": self.port,
            "user": self.user,
            "dbname": db or self.db,
            "application_name": application_name,
            "connect_timeout": 10,
        }
        if self.host or self.unix_socket:
            parameters["host"] = self.host or self.unix_socket
        if self.password:
            parameters["password"] = self.password
        if self.ssl_mode:
            parameters["sslmode"] = self.ssl_mode
        if self.ca_cert:
            parameters["sslrootcert"] = self.ca_cert
        if replication:
            parameters["connection_factory"] = psycopg2.extras.PhysicalReplicationConnection
        try:
            connection = psycopg2.connect(**parameters)
        except psycopg2.Error as error:
            raise PitrError(f"No connection to {self}: {str(error).strip()}") from None
        if not replication:
            # A replication connection has no transactions, and psycopg2 does not let that be said.
            connection.autocommit = True
        return connection

    @contextlib.contextmanager
    def environment(self) -> Iterator[dict[str, str]]:
        """Environment for libpq programs.

        The password goes through a 0600 file, not through argv or the environment.
        """
        environment = {
            key: value for key, value in os.environ.items() if not key.startswith("PG") or key == "PGPASSFILE"
        }
        # Messages are parsed, times are printed: the same on every host.
        environment.update(LC_ALL="C", PGPORT=str(self.port), PGUSER=self.user, PGDATABASE=self.db)
        if self.host or self.unix_socket:
            environment["PGHOST"] = self.host or self.unix_socket
        if self.ssl_mode:
            environment["PGSSLMODE"] = self.ssl_mode
        if self.ca_cert:
            environment["PGSSLROOTCERT"] = self.ca_cert
        if not self.password:
            yield environment
            return
        with tempfile.NamedTemporaryFile("w", prefix="pitr-passfile-", encoding="utf-8") as passfile:
            escaped = self.password.replace("\\", "\\\\").replace(":", "\\:")
            passfile.write(f"*:*:*:*:{escaped}\n")
            passfile.flush()
            environment["PGPASSFILE"] = passfile.name
            yield environment


def query(
    connection: Any, sql: str, parameters: Sequence[object] | Mapping[str, object] | None = None
) -> list[tuple[Any, ...]]:
    """Rows of one statement. Raises PitrError with the server's words."""
    import psycopg2

    try:
        with connection.cursor() as cursor:
            cursor.execute(sql, parameters)
            return list(cursor.fetchall()) if cursor.description else []
    except psycopg2.Error as error:
        raise PitrError(f"The server refused '{' '.join(sql.split())[:120]}': {str(error).strip()}") from None


def binary(bin_dir: str, name: str) -> str:
    """Path of one of PostgreSQL's programs. Raises PitrError when it is not there."""
    path = os.path.join(bin_dir, name)
    if not os.access(path, os.X_OK):
        raise PitrError(f"{path} does not exist or cannot be executed. Is bin_dir right, and the package complete?")
    return path


def run(argv: Sequence[str], env: Mapping[str, str] | None = None, timeout: float | None = None) -> str:
    """Run a program to its end and return its standard output.

    Raises PitrError with its standard error when it fails or takes longer than ``timeout`` seconds.
    """
    return _run(argv, env, timeout)[0]


def _run(argv: Sequence[str], env: Mapping[str, str] | None = None, timeout: float | None = None) -> tuple[str, str]:
    """The same with its standard error beside."""
    name = os.path.basename(argv[0])
    environment = dict(env) if env is not None else {**os.environ, "LC_ALL": "C"}
    try:
        result = subprocess.run(
            list(argv),
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise PitrError(f"{name} did not end within {timeout:g} seconds.") from None
    except OSError as error:
        raise PitrError(f"{argv[0]} could not be started: {error.strerror}.") from None
    if result.returncode != 0:
        said = (result.stderr.decode(errors="replace").strip() or result.stdout.decode(errors="replace").strip())[
            -2000:
        ]
        raise PitrError(f"{name} failed with exit code {result.returncode}: {said}", rc=result.returncode)
    return result.stdout.decode(errors="replace"), result.stderr.decode(errors="replace")


def effective_setting(bin_dir: str, config_dir: str, name: str) -> str:
    """What a server would use, as its own parser reads the files in ``config_dir``.

    Raises PitrError when they cannot be read.
    """
    try:
        return run([binary(bin_dir, "postgres"), "-D", config_dir, "-C", name]).rstrip("\n")
    except PitrError as error:
        raise PitrError(f"The configuration in {config_dir} cannot be used: {error.message}") from None


def binary_version(bin_dir: str) -> int:
    """Major version of the programs in ``bin_dir``."""
    output = run([binary(bin_dir, "postgres"), "--version"])
    match = re.search(r"\) (\d+)", output)
    if match is None:
        raise PitrError(f"{bin_dir}/postgres does not tell its version: {output.strip()}")
    return int(match.group(1))


@dataclass(frozen=True)
class ControlData:
    """pg_control, as pg_controldata shows it."""

    values: Mapping[str, str]

    def text(self, label: str) -> str:
        """One value by its English label. Raises PitrError when there is none."""
        if label not in self.values:
            raise PitrError(f"pg_controldata shows no '{label}'.")
        return self.values[label]

    @property
    def system_identifier(self) -> str:
        return self.text("Database system identifier")

    @property
    def state(self) -> str:
        return self.text("Database cluster state")

    @property
    def timeline(self) -> int:
        return int(self.text("Latest checkpoint's TimeLineID"))

    @property
    def data_checksums(self) -> bool:
        """Whether the cluster's pages have checksums."""
        return self.text("Data page checksum version") != "0"

    @property
    def wal_segment_size(self) -> int:
        return int(self.text("Bytes per WAL segment"))

    @property
    def checkpoint_lsn(self) -> Lsn:
        return Lsn.parse(self.text("Latest checkpoint location"))

    @property
    def floors(self) -> dict[str, int]:
        """Settings that a recovery of this cluster needs at least (design rule 7)."""
        return {guc: int(self.text(label)) for guc, label in FLOORS.items()}


def control_data(bin_dir: str, pgdata: str) -> ControlData:
    """Read pg_control of a data directory. Raises PitrError when it has none or it is damaged."""
    output, complaints = _run([binary(bin_dir, "pg_controldata"), "-D", pgdata])
    # It ends with 0 all the same. Up to 16 the warning is in its output, from 17 on it is an error message.
    for said in (complaints, output):
        if "warning:" in said.lower():
            raise PitrError(
                f"{pgdata}/global/pg_control is damaged, or of another version than {bin_dir}: {said.strip()[:300]}"
            )
    pairs = (line.partition(":") for line in output.splitlines())
    return ControlData({label.strip(): value.strip() for label, _colon, value in pairs})


def data_version(pgdata: str) -> int | None:
    """Major version of a data directory (PG_VERSION), None when the directory is none."""
    try:
        with open(os.path.join(pgdata, "PG_VERSION"), encoding="ascii") as stream:
            return int(stream.read().strip())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise PitrError(f"{pgdata}/PG_VERSION cannot be read: {error}.") from None


def running_pid(pgdata: str) -> int | None:
    """Process id of the server that owns this directory, None when there is none.

    The rule is pg_ctl's: the first line of postmaster.pid names a process that exists (a negative number is a
    stand-alone backend). A pid that was given to another program counts as running, as it does for the server itself
    unless that program belongs to somebody else: in doubt the directory is in use.
    """
    try:
        with open(os.path.join(pgdata, "postmaster.pid"), encoding="ascii", errors="replace") as stream:
            pid = abs(int(stream.readline().strip() or "0"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        return None
    if pid == 0:
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        return pid
    return None if _is_zombie(pid) else pid


def postmaster_status(pgdata: str) -> str:
    """What the running server says of itself in postmaster.pid: starting, stopping, ready or standby; empty without it.

    The eighth line (LOCK_FILE_LINE_PM_STATUS of pidfile.h), which pg_ctl waits for. Reading it costs next to nothing.
    """
    try:
        with open(os.path.join(pgdata, "postmaster.pid"), encoding="utf-8", errors="replace") as stream:
            lines = stream.read().split("\n")
    except OSError:
        return ""
    return lines[7].strip() if len(lines) > 7 else ""


def _is_zombie(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as stream:
            return stream.read().rpartition(")")[2].split()[0] == "Z"
    except (OSError, IndexError):
        return False


def conf_literal(value: object) -> str:
    """A value as postgresql.conf wants it quoted."""
    text = str(value)
    if "\n" in text or "\x00" in text:
        raise PitrError(f"A setting cannot hold a line break: {text!r}.")
    return "'" + text.replace("\\", "\\\\").replace("'", "''") + "'"


def shell_command(argv: Sequence[str], placeholders: Sequence[str] = ()) -> str:
    """A command line for archive_command and its kin: words quoted for the shell, ``%`` doubled, placeholders appended.

    The server replaces ``%p`` and ``%f`` itself and quotes nothing, hence the double quotes.
    """
    words = [shlex.quote(word).replace("%", "%%") for word in argv]
    return " ".join(words + [f'"{placeholder}"' for placeholder in placeholders])


def parse_settings(text: str) -> list[tuple[str, str]]:
    """Name and value of every assignment in a configuration file, in order, later ones winning.

    Understands what ALTER SYSTEM and pg_basebackup write (guc-file.l), not include directives.
    """
    result = []
    for line in text.split("\n"):
        match = re.match(r"\s*([A-Za-z_][A-Za-z0-9_.]*)\s*(?:=|\s)\s*('(?:[^'\\]|''|\\.)*'|[^\s#]*)", line)
        if match and not line.lstrip().startswith("#"):
            name, value = match.groups()
            if value.startswith("'"):
                value = re.sub(r"\\(.)", r"\1", value[1:-1].replace("''", "'"))
            result.append((name.lower(), value))
    return result
