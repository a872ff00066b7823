# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Where things lie: the one file that knows the paths of a sandbox.

<checkout>/.sandbox            for root, and where the checkout's path is not plain, a link into /var/tmp
  venv/                        Ansible and, after `make test`, the tools of the tests
  python/                      a copy of the interpreter, only when the servers' user cannot read the original
  postgresql/<major>/bin       PostgreSQL
  collections/                 this checkout as the collection pgdrill.pitr
  programs/bin                 programs for tests that the system does not have
  run/<major>/                 the data of the sandbox hosts
  sandbox.yml                  what inventories/sandbox reads
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .accounts import Account, server_account
from .say import SandboxError, problem, step

# Ansible does not quote the path of the interpreter everywhere (asynchronous tasks), and the kernel reads only the
# start of a script's first line. A checkout may lie in any other place; its sandbox then lies in /var/tmp.
_PLAIN = re.compile(r"[A-Za-z0-9/._+-]{1,80}")

MAJORS = (15, 16, 17, 18)
DEFAULT_MAJOR = 18


@dataclass(frozen=True)
class Layout:
    """The paths of one sandbox. `root` is real (no link in it), `checkout` is where the collection's files lie."""

    checkout: Path
    root: Path
    account: Account
    key: str  # <uid>-<8 hex digits>: tells the sandboxes of one machine apart in shared directories and port numbers
    is_elsewhere: bool  # whether it is another place than <checkout>/.sandbox

    @classmethod
    def at(cls, checkout: Path, root: Path, account: Account, is_elsewhere: bool) -> Layout:
        """The layout with its key, which comes from the checkout, or from the place itself when that is elsewhere."""
        key = f"{os.geteuid()}-{_digest(root if is_elsewhere else checkout)}"
        return cls(checkout, root, account, key, is_elsewhere)

    @property
    def venv(self) -> Path:
        return self.root / "venv"

    @property
    def python(self) -> Path:
        return self.venv / "bin" / "python"

    def command(self, name: str) -> list[str]:
        """argv of a command of the venv; through its interpreter, as the kernel limits a script's first line."""
        return [str(self.python), str(self.venv / "bin" / name)]

    @property
    def programs(self) -> Path:
        """Launchers of programs for tests that were unpacked beside it."""
        return self.root / "programs" / "bin"

    @property
    def collections(self) -> Path:
        return self.root / "collections"

    @property
    def config(self) -> Path:
        return self.root / "sandbox.yml"

    def postgresql(self, major: int) -> Path:
        return self.root / "postgresql" / str(major)

    def bin_dir(self, major: int) -> Path:
        return self.postgresql(major) / "bin"

    def run_dir(self, major: int) -> Path:
        return self.root / "run" / str(major)

    def socket_dir(self, major: int) -> Path:
        """Short, because the path of a Unix socket has at most 107 bytes."""
        return Path(f"/tmp/pgdrill-{self.key}-{major}")

    @property
    def ansible_tmp(self) -> Path:
        """Where Ansible puts modules and the state of asynchronous tasks on the sandbox hosts. The default lies in the
        home directory, which `nobody` has not, and Ansible does not quote this path."""
        return Path(f"/tmp/pgdrill-{self.key}-ansible")

    @property
    def test_tmp(self) -> Path:
        """TMPDIR of the tests, short for the same reason."""
        return Path(f"/tmp/pgdrill-{self.key}-t")

    @property
    def test_memory(self) -> Path:
        """The same on a file system in memory."""
        return Path(f"/dev/shm/pgdrill-{self.key}")

    @property
    def home(self) -> Path:
        """HOME of what runs as the servers' user, which may have none (`nobody`)."""
        return self.root / "home"


def _digest(path: Path) -> str:
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:8]


def find_checkout() -> Path:
    """The directory above tools/, links resolved."""
    return Path(__file__).resolve().parent.parent.parent


def locate() -> Layout:
    """The layout of this checkout's sandbox for the user who runs this; nothing is created."""
    checkout = find_checkout()
    elsewhere = os.environ.get("PGDRILL_SANDBOX")
    root = checkout / ".sandbox"
    if os.geteuid() == 0 or not _PLAIN.fullmatch(str(root)):
        # /root is closed to the user that the servers of root's sandbox run as.
        root = Path("/var/tmp").resolve() / f"pgdrill-{os.geteuid()}-{_digest(checkout)}"
    default = root
    if elsewhere:
        root = Path(elsewhere).resolve()
        if not _PLAIN.fullmatch(str(root)):
            raise SandboxError(f"PGDRILL_SANDBOX={elsewhere}: only letters, digits and /._+- please, and at most 80")
    return Layout.at(checkout, root, server_account(), is_elsewhere=root != default)


def create(layout: Layout) -> None:
    """Make the directories and links that every command needs. Raises SandboxError when others own them."""
    link = layout.checkout / ".sandbox"
    if not layout.is_elsewhere:
        if link.exists() and link.stat().st_uid != os.geteuid():
            raise SandboxError(
                f"{link} was made by another user (uid {link.stat().st_uid}); "
                "run as that user, have them run `make clean`, or use a clone of your own"
            )
        if layout.root != link:
            _make_own_directory(layout.root)
            _point(link, layout.root)
        elif link.is_symlink():
            link.unlink()  # The checkout was copied from a place where its sandbox had to lie elsewhere.
    try:
        layout.root.mkdir(parents=True, exist_ok=True)
        for path in (layout.root / "postgresql", layout.root / "run", layout.home):
            path.mkdir(exist_ok=True)
    except OSError as error:
        raise SandboxError(f"cannot create {error.filename}: {error.strerror}") from error
    for path in (layout.root / "run", layout.home):
        layout.account.own(path)
        path.chmod(0o700)
    pitr = layout.collections / "ansible_collections" / "pgdrill" / "pitr"
    pitr.parent.mkdir(parents=True, exist_ok=True)
    _point(pitr, layout.checkout)
    if not layout.is_elsewhere:
        venv = layout.checkout / ".venv"
        if venv.is_symlink() or not venv.exists():
            _point(venv, Path(".sandbox") / "venv")
    reachable = layout.account.capture(["test", "-x", str(layout.root / "run"), "-a", "-r", str(layout.root)])
    if reachable.returncode != 0:
        raise SandboxError(
            f"the user {layout.account.name}, whom the servers run as, cannot read {layout.root}; "
            "set PGDRILL_SANDBOX to a directory below which everybody may read"
        )


def _make_own_directory(path: Path) -> None:
    """Create `path` in a directory where everybody may write; refuse one that somebody else has put there."""
    try:
        path.mkdir(mode=0o755)
    except FileExistsError:
        status = path.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            raise SandboxError(f"{path} is not ours (uid {status.st_uid}); remove it") from None
    path.chmod(0o755)


def _point(link: Path, target: Path) -> None:
    """Let `link` be a symbolic link to `target`, atomically. Raises SandboxError when it is something else."""
    if link.is_symlink():
        if Path(os.readlink(link)) == target:
            return
    elif link.exists():
        raise SandboxError(f"{link} is in the way: it should be a link to {target}; remove it")
    fresh = link.with_name(f"{link.name}.{os.getpid()}.tmp")
    fresh.symlink_to(target)
    fresh.replace(link)


def make_private(path: Path, account: Account) -> None:
    """A directory (mode 0700) of `account` in /tmp. One that a third user has put there is removed by root and refused
    by others."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        pass
    else:
        if not stat.S_ISDIR(status.st_mode) or status.st_uid not in (os.geteuid(), account.uid):
            if os.geteuid() != 0:
                raise SandboxError(f"{path} belongs to uid {status.st_uid} and is in the way; remove it")
            # Such as that of another PITR_SANDBOX_USER.
            shutil.rmtree(path) if stat.S_ISDIR(status.st_mode) else path.unlink()
    path.mkdir(mode=0o700, exist_ok=True)
    account.own(path)
    path.chmod(0o700)


def remove(layout: Layout) -> None:
    """Remove the sandbox, its links and the caches of the checkout. The evidence of drills stays."""
    sockets = [layout.socket_dir(major) for major in MAJORS]
    for path in [layout.root, layout.test_tmp, layout.test_memory, layout.ansible_tmp, *sockets]:
        if path.exists():
            shutil.rmtree(path, onerror=lambda _function, name, error: problem(f"cannot remove {name}: {error[1]}"))
    if layout.is_elsewhere:
        return
    sandbox = layout.checkout / ".sandbox"
    if sandbox.is_dir() and not sandbox.is_symlink():
        shutil.rmtree(sandbox)
    for link in (sandbox, layout.checkout / ".venv"):
        if link.is_symlink():
            link.unlink()
    for name in (".ansible", ".cache", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".hypothesis"):
        shutil.rmtree(layout.checkout / name, ignore_errors=True)
    for directory, names, _files in os.walk(layout.checkout):
        names[:] = [name for name in names if name not in (".git", "evidence")]
        if "__pycache__" in names:
            names.remove("__pycache__")
            shutil.rmtree(Path(directory) / "__pycache__", ignore_errors=True)


@contextmanager
def lock(layout: Layout, name: str, refusal: str | None = None) -> Iterator[None]:
    """Hold the lock `name` of this sandbox. With `refusal`, raise SandboxError(refusal) when another process holds it;
    otherwise wait. The kernel gives it back when this process ends, however it ends."""
    with (layout.root / f".{name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if refusal:
                raise SandboxError(refusal) from None
            step(f"waiting for another process that does the {name} …")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
