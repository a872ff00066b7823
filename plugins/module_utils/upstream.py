# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The server that a receiver receives from: how it is reached, who it is, and its slot.

It is asked with psql, since the receiver runs with ``python3 -I -S`` and has the standard library only.
"""

from __future__ import annotations

import json
import os
import re
import time

from .errors import PitrError
from .timeline import Switch, parse_history
from .wal import Lsn

# A restored cluster that nobody has accepted says so by this setting; see restore.py.
ACCEPTED = "pgdrill.accepted"
# SQLSTATE: undefined_object, object_in_use. Messages are in the server's language.
_UNKNOWN_SETTING = "42704"
_IN_USE = "55006"
# psql's exit code when there is no connection (psql, "Exit Status").
_NO_CONNECTION = 2
_SLOT_NAME = re.compile(r"[a-z0-9_]{1,63}\Z")


class WrongServerError(PitrError):
    """This server is not the one to receive from, and trying again will not make it so by itself."""


class Settings:
    """``<directory>/receiver/<cluster>.json``: how to reach the server, and as what."""

    __slots__ = (
        "application_name",
        "bin_dir",
        "host",
        "passfile",
        "port",
        "slot",
        "sslmode",
        "sslrootcert",
        "synchronous",
        "user",
    )

    def __init__(
        self,
        bin_dir: str,
        host: str,
        port: int,
        user: str,
        slot: str,
        application_name: str,
        synchronous: bool = False,
        passfile: str = "",
        sslmode: str = "",
        sslrootcert: str = "",
    ) -> None:
        """``host``: one, or several with commas between them, of which the primary is taken.

        Raises PitrError for a slot that PostgreSQL would not make.
        """
        if not _SLOT_NAME.match(slot):
            raise PitrError(f"'{slot}' cannot name a replication slot: use a-z, 0-9 and underscores, at most 63.")
        self.bin_dir = bin_dir
        self.host = host
        self.port = port
        self.user = user
        self.slot = slot
        self.application_name = application_name
        self.synchronous = synchronous
        self.passfile = passfile
        self.sslmode = sslmode
        self.sslrootcert = sslrootcert

    def to_dict(self) -> dict[str, object]:
        """As stored."""
        return {name: getattr(self, name) for name in self.__slots__}


def default_slot(cluster: str) -> str:
    """Name of a cluster's slot when none was given; clusters may have characters that slots may not."""
    return "pitr_" + re.sub("[^a-z0-9_]", "_", cluster.lower())[:58]


def settings_path(directory: str, cluster: str) -> str:
    """Where the settings of a cluster's receiver lie, below the directory of ``pitr-wal``."""
    return os.path.join(directory, "receiver", f"{cluster}.json")


def read_settings(directory: str, cluster: str) -> Settings:
    """Raises PitrError when there are none or they cannot be used."""
    path = settings_path(directory, cluster)
    try:
        with open(path, encoding="utf-8") as stream:
            return Settings(**json.load(stream))
    except (OSError, ValueError, TypeError) as error:
        raise PitrError(
            f"The receiver's settings {path} cannot be read: {error}. The module pgdrill.pitr.receiver writes them."
        ) from None


class Facts:
    """What a server says of itself. ``lsn`` is what it had written (flushed), on ``timeline``."""

    __slots__ = ("lsn", "system_identifier", "timeline")

    def __init__(self, system_identifier: str, timeline: int, lsn: Lsn) -> None:
        self.system_identifier = system_identifier
        self.timeline = timeline
        self.lsn = lsn


class Primary:
    """The server, over the replication protocol and by PostgreSQL's own programs: no library is needed."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        # Which of several hosts was the primary when it was asked last.
        self._found = ""

    def conninfo(self, **more: str) -> str:
        """A connection string. There is never a password in it; that is the passfile's."""
        settings = self.settings
        values = {
            "host": self._found or settings.host,
            "port": str(settings.port),
            "user": settings.user,
            "application_name": settings.application_name,
            "connect_timeout": "10",
            # A server that has vanished without a word is noticed after half a minute.
            "keepalives_idle": "10",
            "keepalives_interval": "5",
            "keepalives_count": "4",
            "passfile": settings.passfile,
            "sslmode": settings.sslmode,
            "sslrootcert": settings.sslrootcert,
            "target_session_attrs": "primary" if "," in settings.host else "any",
            **more,
        }
        quoted = {name: value.replace("\\", "\\\\").replace("'", "\\'") for name, value in values.items() if value}
        return " ".join(f"{name}='{value}'" for name, value in quoted.items())

    def environment(self) -> dict[str, str]:
        """For PostgreSQL's programs: their own messages in English, nothing inherited that changes a connection."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
        return {**kept, "LC_ALL": "C"}

    def program(self, name: str) -> str:
        """Path of one of PostgreSQL's programs. Raises PitrError when it is not there."""
        path = os.path.join(self.settings.bin_dir, name)
        if not os.access(path, os.X_OK):
            raise PitrError(f"{path} does not exist or cannot be executed. Is bin_dir right, and the package complete?")
        return path

    def command(self, text: str, timeout: float = 30) -> str:
        """One command of the replication protocol. Raises PitrError with the server's words.

        Of several hosts each is asked apart. libpq asks the next one only when there is no connection at all: a standby
        with a certificate that has expired, or one that does not know the password, would hide the primary behind it.
        """
        hosts = self.settings.host.split(",")
        refused = []
        for host in sorted(hosts, key=lambda host: host != self._found):
            try:
                code, output, messages = self._ask(host, text, timeout)
            except TimeoutError:
                refused.append(f"{host or 'It'} did not answer within {timeout:g} seconds.")
                continue
            said = " ".join(messages.decode(errors="replace").split())
            if code == _NO_CONNECTION:
                refused.append(said[:500])
                continue
            self._found = host
            if code != 0:
                raise PitrError(f"{self}: {said[:500]}", said=said)
            return output.decode(errors="replace").rstrip("\n")
        self._found = ""
        raise PitrError(f"{self}: {' '.join(refused)}", said=" ".join(refused))

    def _ask(self, host: str, text: str, timeout: float) -> tuple[int, bytes, bytes]:
        import subprocess

        argv = [self.program("psql"), "-XAtq", "-w", "-v", "ON_ERROR_STOP=1", "-v", "VERBOSITY=verbose"]
        argv += ["-d", self.conninfo(replication="true", host=host), "-c", text]
        try:
            done = subprocess.run(
                argv,
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise TimeoutError from None
        return done.returncode, done.stdout, done.stderr

    def __str__(self) -> str:
        return f"The server {self.settings.user}@{self.settings.host or 'local socket'}:{self.settings.port}"

    def identify(self) -> Facts:
        """IDENTIFY_SYSTEM."""
        identifier, timeline, lsn, *_database = self.command("IDENTIFY_SYSTEM").split("|")
        return Facts(identifier, int(timeline), Lsn.parse(lsn))

    def is_accepted(self) -> bool:
        """Whether this is not a restored copy that nobody has accepted as the primary."""
        try:
            return self.command(f"SHOW {ACCEPTED}") != "off"
        except PitrError as error:
            if f" {_UNKNOWN_SETTING}: " in str(error.detail.get("said")):
                return True
            raise

    def history(self, timeline: int) -> list[Switch]:
        """Ancestors of a timeline as the server knows them."""
        if timeline == 1:
            return []
        return parse_history(timeline, self.command(f"TIMELINE_HISTORY {timeline}").partition("|")[2])

    def slot(self) -> tuple[str, int] | None:
        """(LSN, timeline) from which on the slot keeps WAL; None when there is no slot, ("", 0) when it keeps none."""
        kind, lsn, timeline = self.command(f'READ_REPLICATION_SLOT "{self.settings.slot}"').split("|")
        if not kind:
            return None
        return (lsn, int(timeline or 0)) if lsn else ("", 0)

    def create_slot(self) -> None:
        """A physical slot that keeps WAL from now on (from the last checkpoint)."""
        self.command(f'CREATE_REPLICATION_SLOT "{self.settings.slot}" PHYSICAL RESERVE_WAL')

    def drop_slot(self, patience: float = 10) -> None:
        """Raises PitrError when somebody still uses it after ``patience`` seconds.

        Not with WAIT: the server would go on waiting for us when we have given up long ago, and drop it then.
        """
        deadline = time.monotonic() + patience
        while True:
            try:
                self.command(f'DROP_REPLICATION_SLOT "{self.settings.slot}"')
                return
            except PitrError as error:
                if f" {_IN_USE}: " not in str(error.detail.get("said")) or time.monotonic() > deadline:
                    raise
            time.sleep(0.1)
