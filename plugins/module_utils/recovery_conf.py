# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The settings of a recovery: one include file that exists only while the cluster is recovering, and the signal files.

``postgresql.auto.conf`` is read after every include and would win, so assignments there of the settings that a
recovery needs are taken out, remembered in the include file, and put back by :func:`finish`. Old ``recovery_target*``
are not put back. Source: section "Recovery Target", and ``guc-file.l`` for the order of files.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Collection, Mapping
from typing import Any

from . import keep_out
from .errors import PitrError
from .postgres import conf_literal, parse_settings
from .repository import write_atomic
from .tree import fsync_directory

INCLUDE_DIR = "conf.d"
# The line that we add where postgresql.conf does not read that directory, and the only one that we take away.
INCLUDE_LINE = f"include_dir = '{INCLUDE_DIR}'    # added by pgdrill.pitr\n"
FILE = "99-pitr-recovery.conf"
_SAVED = "# pitr-saved: "
_PLAN = "# pitr-plan: "
_STALE = re.compile(r"(recovery_target(_.*)?|recovery_min_apply_delay|recovery_end_command|archive_cleanup_command)\Z")


def include_path(config_dir: str) -> str:
    """Path of the managed include file."""
    return os.path.join(config_dir, INCLUDE_DIR, FILE)


def has_include_dir(config_dir: str) -> bool:
    """Whether postgresql.conf reads conf.d."""
    with contextlib.suppress(FileNotFoundError):
        with open(os.path.join(config_dir, "postgresql.conf"), encoding="utf-8", errors="surrogateescape") as stream:
            return any(
                re.match(rf"\s*include_dir\s*=?\s*'?{re.escape(INCLUDE_DIR)}'?\s*(#.*)?$", line) for line in stream
            )
    return False


def ensure_include_dir(config_dir: str) -> bool:
    """Make postgresql.conf read conf.d. Returns whether something was changed."""
    os.makedirs(os.path.join(config_dir, INCLUDE_DIR), mode=0o700, exist_ok=True)
    if has_include_dir(config_dir):
        return False
    path = os.path.join(config_dir, "postgresql.conf")
    with open(path, "rb") as stream:
        text = stream.read()
    if text and not text.endswith(b"\n"):
        text += b"\n"
    write_atomic(path, text + INCLUDE_LINE.encode(), os.stat(path).st_mode & 0o777)
    return True


def drop_include_dir(config_dir: str) -> None:
    """When conf.d is empty, take away what :func:`ensure_include_dir` has added."""
    path = os.path.join(config_dir, "postgresql.conf")
    with open(path, "rb") as stream:
        text = stream.read()
    line = INCLUDE_LINE.encode()
    if os.listdir(os.path.join(config_dir, INCLUDE_DIR)) or line not in text:
        return
    write_atomic(path, text.replace(line, b""), os.stat(path).st_mode & 0o777)
    os.rmdir(os.path.join(config_dir, INCLUDE_DIR))


def write(config_dir: str, pgdata: str, settings: Mapping[str, str], plan: Mapping[str, Any]) -> None:
    """Write the include file, neutralise postgresql.auto.conf, and leave exactly one signal file, recovery.signal."""
    ensure_include_dir(config_dir)
    # A second writing must not forget what the first has taken out.
    by_name = {parse_settings(line)[0][0]: line for line in _remembered(config_dir, _SAVED) or []}
    by_name.update({parse_settings(line)[0][0]: line for line in _take_out(pgdata, set(settings))})
    saved = list(by_name.values())
    lines = [
        "# Written by pgdrill.pitr for one recovery; pgdrill.pitr.recovery removes it when the cluster is accepted.",
        _PLAN + json.dumps(plan, sort_keys=True),
        _SAVED + json.dumps(saved),
    ]
    lines += [f"{name} = {conf_literal(value)}" for name, value in sorted(settings.items())]
    write_atomic(include_path(config_dir), ("\n".join(lines) + "\n").encode())
    with contextlib.suppress(FileNotFoundError):
        os.unlink(os.path.join(pgdata, "standby.signal"))
    write_atomic(os.path.join(pgdata, "recovery.signal"), b"")


def stand_by(config_dir: str, pgdata: str, names: Collection[str] = (), check: bool = False) -> list[str]:
    """Leave exactly one signal file, standby.signal, and nothing in postgresql.auto.conf that would win over ``names``.

    Whatever a recovery to a target has set is gone, too. Returns what was (or would be) changed, as words for a person.
    """
    done = []
    if os.path.exists(include_path(config_dir)):
        done.append(f"{include_path(config_dir)} of a recovery to a target removed")
        if not check:
            discard(config_dir)
    found = {name for name, _value in parse_settings(_read_auto_conf(pgdata))}
    for name in sorted(name for name in found if name in names or _STALE.match(name)):
        done.append(f"{name} taken out of postgresql.auto.conf")
    if not check:
        _take_out(pgdata, set(names))
    if os.path.lexists(os.path.join(pgdata, "recovery.signal")):
        done.append("recovery.signal removed")
    if not os.path.exists(os.path.join(pgdata, "standby.signal")):
        done.append("standby.signal made")
    if not check:
        # In this order: at no moment is there no signal file, with which a server would come up as a primary.
        if not os.path.exists(os.path.join(pgdata, "standby.signal")):
            write_atomic(os.path.join(pgdata, "standby.signal"), b"")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(pgdata, "recovery.signal"))
            fsync_directory(pgdata)
    return done


def _auto_conf(pgdata: str) -> str:
    return os.path.join(pgdata, "postgresql.auto.conf")


def _read_auto_conf(pgdata: str) -> str:
    """Its text, byte for byte: only a line feed ends a line, and a value may hold any other character."""
    with contextlib.suppress(FileNotFoundError):
        with open(_auto_conf(pgdata), encoding="utf-8", errors="surrogateescape", newline="") as stream:
            return stream.read()
    return ""


def _take_out(pgdata: str, names: set[str]) -> list[str]:
    """Remove assignments of these settings from postgresql.auto.conf; return the lines that are worth keeping."""
    lines = _read_auto_conf(pgdata).split("\n")
    kept, saved = [], []
    for line in lines:
        found = parse_settings(line)
        stale = bool(found) and bool(_STALE.match(found[0][0]))
        if found and (stale or found[0][0] in names):
            if not stale and found[0][0] != "restore_command":
                saved.append(line)
        else:
            kept.append(line)
    if len(kept) != len(lines):
        write_atomic(_auto_conf(pgdata), "\n".join(kept).encode("utf-8", "surrogateescape"))
    return saved


def clear_auto_conf(pgdata: str) -> None:
    """Leave nothing in postgresql.auto.conf, for a copy whose own configuration shall win over all ALTER SYSTEM."""
    write_atomic(_auto_conf(pgdata), b"")


def planned(config_dir: str) -> dict[str, Any] | None:
    """The plan of the recovery that this configuration belongs to, or None when none is under way."""
    found = _remembered(config_dir, _PLAN)
    return found if isinstance(found, dict) else None


def settings(config_dir: str) -> dict[str, str]:
    """The settings in the include file; none when no managed recovery is under way."""
    with contextlib.suppress(FileNotFoundError):
        with open(include_path(config_dir), encoding="utf-8") as stream:
            return dict(parse_settings(stream.read()))
    return {}


def _remembered(config_dir: str, prefix: str) -> Any:
    try:
        with open(include_path(config_dir), encoding="utf-8") as stream:
            for line in stream:
                if line.startswith(prefix):
                    return json.loads(line[len(prefix) :])
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise PitrError(f"{include_path(config_dir)} is damaged: {error}. Read it and remove it by hand.") from None
    return None


def discard(config_dir: str) -> None:
    """Remove the include file of a restored cluster that is gone; with it goes what was taken out of that cluster.

    A pg_hba.conf beside it lets in again whom it let in before.
    """
    with contextlib.suppress(PitrError):
        _let_in(config_dir)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(include_path(config_dir))


def _let_in(config_dir: str) -> None:
    hba_file = (planned(config_dir) or {}).get("hba_file")
    if hba_file:
        keep_out.let_in(hba_file)


def finish(config_dir: str, pgdata: str) -> bool:
    """Remove the include file and put back what was taken out. Returns whether there was something to do.

    The caller reloads the server. A setting that somebody has set again meanwhile is not overwritten. The include file
    goes last, so that what was killed in between can be repeated.
    """
    path = include_path(config_dir)
    if not os.path.exists(path):
        return False
    _let_in(config_dir)
    saved = _remembered(config_dir, _SAVED) or []
    if saved:
        text = _read_auto_conf(pgdata)
        if text and not text.endswith("\n"):
            text += "\n"
        present = {name for name, _value in parse_settings(text)}
        back = [line for line in saved if parse_settings(line)[0][0] not in present]
        write_atomic(
            _auto_conf(pgdata), (text + "".join(f"{line}\n" for line in back)).encode("utf-8", "surrogateescape")
        )
    os.unlink(path)
    fsync_directory(os.path.dirname(path))
    return True
