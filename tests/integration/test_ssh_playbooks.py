# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The playbooks with the repository on another host: roles write the keys, and a drill proves the restore."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from ansible_collections.pgdrill.pitr.tests.integration.ssh_support import USER, Sshd, private_place
from ansible_collections.pgdrill.pitr.tests.integration.test_playbooks import Site

pytestmark = pytest.mark.once


@pytest.fixture
def site(bin_dir: str, major: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A sandbox whose repository host is only reached over ssh."""
    with private_place(monkeypatch):
        made = Site(bin_dir, major, tmp_path)
        yield made
        made.close()


def test_site_and_drill_over_ssh(site: Site, tmp_path: Path) -> None:
    sshd = Sshd(tmp_path / "sshd")
    writer, reader, former = (sshd.key(name) for name in ("writer", "reader", "former"))
    public = {key: key.with_suffix(".pub").read_text(encoding="ascii").strip() for key in (writer, reader, former)}
    repository = site.run_dir / 'the "repository"\'s place'
    variables = {
        "postgresql_primary": {
            "pitr_repository": f"ssh://{USER}@127.0.0.1:{sshd.port}{repository}",
            "pitr_ssh_writer_identity": str(writer),
            "pitr_ssh_reader_identity": str(reader),
            "pitr_ssh_known_hosts": str(sshd.known_hosts),
        },
        "pitr_repository": {
            "pitr_repository": str(repository),
            "pitr_wal_directory": str(site.run_dir / "on the repository host"),
            "repository_user": USER,
            "repository_authorized_keys": str(sshd.authorized_keys),
            "repository_writer_keys": [public[writer]],
            "repository_reader_keys": [public[reader]],
        },
    }
    inventory = tmp_path / "inventory" / "groups.yml"
    (inventory.parent / "group_vars").mkdir(parents=True)
    inventory.write_text(yaml.safe_dump({name: {} for name in variables}), encoding="utf-8")
    for name, values in variables.items():
        (inventory.parent / "group_vars" / f"{name}.yml").write_text(yaml.safe_dump(values), encoding="utf-8")
    also = ("-i", str(inventory))
    sshd.start()
    try:
        # A key that has gone from the inventory goes from the file; other clusters' lines, and those of others, stay.
        others = [
            f"ssh-ed25519 {public[former].split()[1]} an operator",
            f'restrict,command="/usr/local/lib/pgdrill/pitr-wal serve --read other" {public[former]}',
            f'restrict,command="/usr/local/bin/else main" {public[former]}',
        ]
        site.succeed("site", *also, repository_reader_keys=[public[reader], public[former]])
        with open(sshd.authorized_keys, "a", encoding="utf-8") as stream:
            stream.write("".join(f"{line}\n" for line in others))
        assert len(sshd.authorized_keys.read_text(encoding="utf-8").splitlines()) == 6
        site.succeed("site", *also)
        lines = sshd.authorized_keys.read_text(encoding="utf-8").splitlines()
        assert lines[2:] == others and [public[writer] in lines[0], public[reader] in lines[1]] == [True, True]
        sshd.authorized_keys.write_text("".join(f"{line}\n" for line in lines[:2]), encoding="utf-8")
        again = site.succeed("site", *also).partition("PLAY RECAP")[2]
        assert set(re.findall(r"changed=(\d+)", again)) == {"0"}, again
        lines = sshd.authorized_keys.read_text(encoding="utf-8").splitlines()
        assert [line.split()[0].partition(",")[0] for line in lines] == ["restrict", "restrict"]
        archived = [path for path in repository.glob("main/archive/*/*/*") if len(path.name) == 24]
        assert archived and not site.repository.exists()
        site.succeed("drill", *also, drill_scenarios=["time", "latest"])
        assert site.evidence["verdict"] == "passed"
        both = {"repository_reader_keys": [public[writer]]}
        assert "same public key" in site.fail("site", *also, **both)
    finally:
        sshd.stop()
        shutil.rmtree(repository, ignore_errors=True)
