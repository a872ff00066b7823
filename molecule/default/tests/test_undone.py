# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Last of all, by the name of this file: what the roles have set is taken away again, and nothing else."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

from ansible_collections.pgdrill.pitr.molecule.shared.hosts import PLAIN

CHECKOUT = Path(__file__).resolve().parents[3]
OTHERS = 'restrict,command="/usr/local/lib/pgdrill/pitr-wal serve --read other" ssh-ed25519 AAAAC3Nz other'


def remove(*arguments: str) -> list[int]:
    """Run remove.yml; how much was changed on each host."""
    argv = ["ansible-playbook", "-i", os.environ["MOLECULE_INVENTORY_FILE"], "playbooks/remove.yml", *arguments]
    plain = {**os.environ, **PLAIN}
    answer = subprocess.run(argv, cwd=CHECKOUT, env=plain, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout[-3000:]
    return [int(n) for n in re.findall(r"^\w+ +: ok=\d+ +changed=(\d+)", answer.stdout, re.MULTILINE)]


def test_removal_leaves_data_repository_and_what_others_have_set(primary: Any, repository: Any) -> None:
    stored = "cd /srv/pitr && find . -type f ! -path '*/receiver/*' | sort | xargs sha256sum"
    keys = repository.check_output("echo ~pitr/.ssh/authorized_keys").strip()
    repository.check_output("echo '%s' >> %s" % (OTHERS, keys))
    primary.check_output("su postgres -c 'psql -qc \"CREATE TABLE precious (n int)\"'")
    before = set(repository.check_output(stored).splitlines())
    assert min(remove("-e", "remove_confirm=shop")) > 5
    assert before <= set(repository.check_output(stored).splitlines())
    assert repository.file(keys).content_string.splitlines() == [OTHERS]
    for host in (primary, repository):
        assert not host.file("/usr/local/lib/pgdrill").exists
        assert host.check_output("ls /etc/systemd/system | grep pitr; systemctl --failed --no-legend --plain") == ""
        assert host.run("systemctl list-units --all --no-legend 'pitr-*'").stdout.strip() == ""
    assert not primary.file("/etc/pgdrill").exists
    assert primary.service("postgresql@17-main").is_running
    asked = "SHOW archive_mode", "SHOW archive_command", "TABLE precious", "SELECT count(*) FROM pg_replication_slots"
    said = primary.check_output("su postgres -c %s", f'psql -qAtX -c "{"; ".join(asked)}"').split()
    assert said == ["off", "(disabled)", "0"]
    assert "pitr" not in primary.check_output(
        "cat /etc/postgresql/17/main/pg_hba.conf; ls /etc/postgresql/17/main/conf.d"
    )
    assert remove("-e", "remove_confirm=shop") == [0, 0]
