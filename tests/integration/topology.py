# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A primary, a standby and a repository as three directories of one machine, and the playbooks as a user runs them."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from ansible_collections.pgdrill.pitr.tests.integration.support import Server
from ansible_collections.pgdrill.pitr.tests.integration.test_playbooks import CHECKOUT, SMALL, Site

# Its end has nothing that a quoting would change.
SECRET = "stand:by\\'s Zq7kx2secret"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Topology(Site):
    """Hosts db1 and db2 (and more), and a repository. ``primary`` is whom the inventory calls so."""

    def __init__(self, bin_dir: str, major: int, directory: Path, hosts: Sequence[str] = ("db1", "db2")) -> None:
        super().__init__(bin_dir, major, directory)
        self.server.close()
        self._bin_dir, self._major = bin_dir, major
        self.primary = hosts[0]
        self.servers: dict[str, Server] = {}
        for host in hosts:
            server = Server(bin_dir, self.run_dir / host / "data")
            (self.run_dir / host).mkdir()
            server.log = self.run_dir / host / "postgresql.log"
            server.PORT = _free_port()
            self.servers[host] = server
        self.write_inventory()

    def write_inventory(self, **variables: Any) -> None:
        """With ``self.primary`` as the primary and all others as standbys. ``variables`` are for all hosts."""
        hosts = {
            host: {
                "pitr_pgdata": str(server.data),
                "pitr_log_file": str(server.log),
                "pitr_wal_directory": str(self.run_dir / host / "pitr"),
                "pitr_login_unix_socket": server.socket,
                "pitr_login_port": server.PORT,
            }
            for host, server in self.servers.items()
        }
        shared = {
            "ansible_connection": "ansible.builtin.local",
            "ansible_python_interpreter": sys.executable,
            "pitr_cluster": "main",
            "pitr_postgresql_version": self._major,
            "pitr_bin_dir": self._bin_dir,
            "pitr_manage_instance": True,
            "pitr_repository": str(self.repository),
            "pitr_address": "127.0.0.1",
            "pitr_backup_password": "not a secret",
            "standby_password": SECRET,
            "standby_timeout": 60,
            "primary_standby_addresses": ["127.0.0.1/32"],
            "primary_settings": {
                "listen_addresses": "127.0.0.1",
                "port": "{{ pitr_login_port }}",
                "unix_socket_directories": "{{ pitr_login_unix_socket }}",
                "shared_buffers": "16MB",
                "fsync": False,
            },
            **variables,
        }
        inventory = {
            "all": {
                "vars": shared,
                "children": {
                    "postgresql_primary": {"hosts": {self.primary: hosts[self.primary]}},
                    "postgresql_standby": {
                        "hosts": {host: value for host, value in hosts.items() if host != self.primary}
                    },
                    "pitr_repository": {
                        "hosts": {
                            "repository": {
                                "pitr_wal_directory": str(self.run_dir / "repository-host" / "pitr"),
                                "pitr_login_port": self.servers[self.primary].PORT,
                            }
                        }
                    },
                },
            }
        }
        (self.run_dir / "repository-host").mkdir(exist_ok=True)
        (self.directory / "hosts.yml").write_text(yaml.safe_dump(inventory, sort_keys=False), encoding="utf-8")

    def play(self, name: str, *arguments: str, **variables: Any) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, str(Path(sys.executable).parent / "ansible-playbook")]
        argv += ["-i", str(self.directory / "hosts.yml"), f"playbooks/{name}.yml"]
        argv += ["-e", json.dumps({**SMALL, **variables}), *arguments]
        return subprocess.run(
            argv, cwd=CHECKOUT, env=self.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, check=False, timeout=300,
        )  # fmt: skip

    def __getitem__(self, host: str) -> Server:
        return self.servers[host]

    def close(self) -> None:
        for server in self.servers.values():
            server.close()
        super().close()
