# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What somebody who has become a database host's postgres can do to the repository: add WAL, and nothing else.

Where there is a standby, that is the host that is looked at; the primary of another scenario has been.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from ansible_collections.pgdrill.pitr.molecule.shared.hosts import CLUSTER, PRIMARY, group
from ansible_collections.pgdrill.pitr.molecule.shared.hosts import host as host_of

LIBRARY = "/usr/local/lib/pgdrill/lib"
REPOSITORY = "ssh://pitr@repository.test/srv/pitr"
SSH = "-o BatchMode=yes -o UserKnownHostsFile=/etc/pgdrill/known_hosts -o IdentitiesOnly=yes"
KINDS = ["writer", "reader"]


@pytest.fixture(scope="module")
def intruder() -> Any:
    return host_of([*group("postgresql_standby"), PRIMARY][0])


def as_postgres(intruder: Any, command: str) -> Any:
    return intruder.run("timeout 60 su -s /bin/bash postgres -c %s", command)


def through_the_library(intruder: Any, kind: str, statement: str) -> Any:
    """What our own client does with a key when it is told to misbehave; `tree` is the repository."""
    settings = {"ssh_identity": f"/etc/pgdrill/{CLUSTER}-{kind}", "ssh_known_hosts": "/etc/pgdrill/known_hosts"}
    program = (
        f"import sys; sys.path.insert(0, {LIBRARY!r})\n"
        "from pgdrill_pitr.tree import tree_for\n"
        f"tree = tree_for({REPOSITORY!r}, {settings!r})\n"
        f"{statement}\n"
    )
    intruder.check_output("printf %%s %s > /tmp/program.py", program)
    return as_postgres(intruder, "python3 -I /tmp/program.py")


@pytest.fixture(autouse=True)
def _nothing_changes(repository: Any) -> Iterator[None]:
    """Whatever a test tries, what the repository holds stays as it was. Receiver and archiver may add."""
    repository.check_output(
        "mkdir -p /srv/pitr/other && echo secret > /srv/pitr/other/cluster.json && chown -R pitr: /srv/pitr/other"
    )
    listing = f"cd /srv/pitr && find other {CLUSTER}/archive {CLUSTER}/backups {CLUSTER}/cluster.json -type f | sort"
    before = repository.check_output(f"{listing} | xargs sha256sum").splitlines()
    yield
    after = repository.check_output(f"{listing} | xargs sha256sum").splitlines()
    repository.check_output("rm -r /srv/pitr/other")
    assert set(before) <= set(after)
    assert not repository.file("/tmp/owned").exists
    assert not repository.file("/srv/pitr/owned").exists


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("command", ["id", "sh -i", "touch /tmp/owned", "cat /etc/passwd", "rm -rf /srv/pitr", ""])
def test_key_opens_no_shell(intruder: Any, kind: str, command: str) -> None:
    answer = as_postgres(
        intruder,
        f"echo 'touch /tmp/owned; id' | ssh {SSH} -i /etc/pgdrill/{CLUSTER}-{kind} pitr@repository.test {command}",
    )
    assert "uid=" not in answer.stdout and "root:" not in answer.stdout


@pytest.mark.parametrize("kind", KINDS)
def test_key_copies_no_files(intruder: Any, kind: str) -> None:
    key = f"-i /etc/pgdrill/{CLUSTER}-{kind}"
    for command in (
        f"scp {SSH} {key} /etc/hostname pitr@repository.test:/tmp/owned",
        f"scp {SSH} {key} pitr@repository.test:/srv/pitr/other/cluster.json /tmp/stolen",
        f"echo 'put /etc/hostname /tmp/owned' | sftp {SSH} {key} -b - pitr@repository.test",
        f"ssh {SSH} {key} -N -o ExitOnForwardFailure=yes -R 12345:localhost:22 pitr@repository.test",
        f"ssh {SSH} {key} -W localhost:22 pitr@repository.test",
    ):
        assert as_postgres(intruder, command).rc != 0, command
    assert not intruder.file("/tmp/stolen").exists


@pytest.mark.parametrize("kind", KINDS)
def test_root_and_others_are_not_to_be_had_with_a_key(intruder: Any, kind: str) -> None:
    for user in ("root", "postgres"):
        assert as_postgres(intruder, f"ssh {SSH} -i /etc/pgdrill/{CLUSTER}-{kind} {user}@repository.test id").rc != 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "path", ["/srv/pitr", "/srv/pitr/other", "/etc", f"/srv/pitr/{CLUSTER}/..", f"/srv/pitr/{CLUSTER}/../other", "/"]
)
def test_nothing_outside_the_clusters_folder_is_listed(intruder: Any, kind: str, path: str) -> None:
    answer = through_the_library(intruder, kind, f"print(tree.names({path!r}))")
    assert answer.rc != 0 and "other" not in answer.stdout and "passwd" not in answer.stdout, answer.stdout


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "path", ["/srv/pitr/other/cluster.json", "/etc/passwd", f"/srv/pitr/{CLUSTER}/../other/cluster.json"]
)
def test_nothing_outside_the_clusters_folder_is_read(intruder: Any, kind: str, path: str) -> None:
    answer = through_the_library(intruder, kind, f"print(tree.read({path!r}))")
    assert answer.rc != 0 and "secret" not in answer.stdout and "root:" not in answer.stdout


@pytest.mark.parametrize("kind", KINDS)
def test_no_file_is_overwritten(intruder: Any, repository: Any, kind: str) -> None:
    archived = repository.check_output(f"find /srv/pitr/{CLUSTER}/archive -type f -name '0*' | sort").split()
    for path in (archived[0], archived[-1], f"/srv/pitr/{CLUSTER}/cluster.json", "/srv/pitr/owned"):
        answer = through_the_library(
            intruder,
            kind,
            f"with tree.adding({path!r}) as temporary:\n    open(temporary, 'wb').write(b'x' * 16777216)",
        )
        assert answer.rc != 0, (path, answer.stdout)


@pytest.mark.parametrize("kind", KINDS)
def test_the_protocol_knows_no_deletion(intruder: Any, repository: Any, kind: str) -> None:
    path = repository.check_output(f"find /srv/pitr/{CLUSTER}/archive -type f | sort | head -n 1").strip()
    for verb in ("remove", "delete", "unlink", "rename", "truncate"):
        answer = through_the_library(intruder, kind, f"print(tree._ask({path!r}, {json.dumps({'do': verb})}))")
        assert answer.rc != 0, answer.stdout


def test_segment_of_another_content_is_refused_by_push(intruder: Any) -> None:
    answer = as_postgres(
        intruder,
        "cd /tmp && head -c 16777216 /dev/zero > 000000010000000000000003 &&"
        f" /usr/local/lib/pgdrill/pitr-wal push {CLUSTER} /tmp/000000010000000000000003",
    )
    assert 1 <= answer.rc <= 125, answer.stderr
