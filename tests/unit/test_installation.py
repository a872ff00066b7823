# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Where packages put PostgreSQL: both layouts, several versions and clusters, and hosts without any."""

from __future__ import annotations

from pathlib import Path

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils.errors import PitrError
from ansible_collections.pgdrill.pitr.plugins.module_utils.installation import detect, missing


def programs(root: Path, *directories: str) -> None:
    for directory in directories:
        path = root / directory.lstrip("/")
        path.mkdir(parents=True)
        (path / "postgres").touch()


def debian_cluster(root: Path, version: int, name: str, conf: str = "") -> Path:
    path = root / f"etc/postgresql/{version}/{name}"
    path.mkdir(parents=True)
    (path / "postgresql.conf").write_text(conf, encoding="utf-8")
    return path


def test_host_without_postgresql_has_none(tmp_path: Path) -> None:
    assert detect(root=str(tmp_path)) is None
    assert detect(version=17, root=str(tmp_path)) is None


@pytest.mark.parametrize("version", [15, 16, 17, 18])
def test_debian(tmp_path: Path, version: int) -> None:
    programs(tmp_path, f"/usr/lib/postgresql/{version}/bin")
    debian_cluster(tmp_path, version, "main", f"data_directory = '/var/lib/postgresql/{version}/main'   # comment\n")
    found = detect(root=str(tmp_path))
    assert found is not None and found.to_dict() == {
        "layout": "debian",
        "postgresql_version": version,
        "name": "main",
        "bin_dir": f"/usr/lib/postgresql/{version}/bin",
        "pgdata": f"/var/lib/postgresql/{version}/main",
        "config_dir": f"/etc/postgresql/{version}/main",
        "service": f"postgresql@{version}-main",
        "log_file": f"/var/log/postgresql/postgresql-{version}-main.log",
        "exists": True,
    }


@pytest.mark.parametrize("version", [15, 16, 17, 18])
def test_packages_of_pgdg_on_el(tmp_path: Path, version: int) -> None:
    programs(tmp_path, f"/usr/pgsql-{version}/bin")
    pgdata = tmp_path / f"var/lib/pgsql/{version}/data"
    pgdata.mkdir(parents=True)
    (pgdata / "PG_VERSION").write_text(f"{version}\n", encoding="ascii")
    (pgdata / "current_logfiles").write_text("stderr log/postgresql-Thu.log\n", encoding="ascii")
    found = detect(root=str(tmp_path))
    assert found is not None and found.to_dict() == {
        "layout": "pgdg-el",
        "postgresql_version": version,
        "name": "",
        "bin_dir": f"/usr/pgsql-{version}/bin",
        "pgdata": f"/var/lib/pgsql/{version}/data",
        "config_dir": f"/var/lib/pgsql/{version}/data",
        "service": f"postgresql-{version}",
        "log_file": f"/var/lib/pgsql/{version}/data/log/postgresql-Thu.log",
        "exists": True,
    }


def test_data_and_log_that_were_put_elsewhere_are_found_there(tmp_path: Path) -> None:
    programs(tmp_path, "/usr/lib/postgresql/17/bin")
    path = debian_cluster(tmp_path, 17, "main", "data_directory = '/srv/a place/data'\n")
    (path / "log").symlink_to("/srv/log/main.log")
    found = detect(root=str(tmp_path))
    assert found is not None and (found.pgdata, found.log_file) == ("/srv/a place/data", "/srv/log/main.log")


def test_cluster_of_an_older_version_is_taken_before_newer_programs_without_one(tmp_path: Path) -> None:
    programs(tmp_path, "/usr/lib/postgresql/17/bin", "/usr/lib/postgresql/18/bin")
    debian_cluster(tmp_path, 17, "main")
    found = detect(root=str(tmp_path))
    assert found is not None and found.postgresql_version == 17 and found.exists


def test_host_without_a_cluster_has_the_newest_programs(tmp_path: Path) -> None:
    programs(tmp_path, "/usr/lib/postgresql/15/bin", "/usr/lib/postgresql/17/bin")
    found = detect(root=str(tmp_path))
    assert found is not None and found.postgresql_version == 17 and not found.exists


def test_version_that_is_asked_for_is_not_replaced_by_another(tmp_path: Path) -> None:
    programs(tmp_path, "/usr/lib/postgresql/17/bin")
    debian_cluster(tmp_path, 17, "main")
    found = detect(version=16, root=str(tmp_path))
    assert found is not None and found.bin_dir == "/usr/lib/postgresql/16/bin" and not found.exists


def test_cluster_of_the_preferred_name_is_taken_of_several(tmp_path: Path) -> None:
    programs(tmp_path, "/usr/lib/postgresql/17/bin")
    debian_cluster(tmp_path, 17, "main")
    debian_cluster(tmp_path, 17, "shop")
    found = detect(preferred_name="shop", root=str(tmp_path))
    assert found is not None and found.service == "postgresql@17-shop"


def test_several_clusters_are_refused_by_name_until_one_is_named(tmp_path: Path) -> None:
    programs(tmp_path, "/usr/lib/postgresql/17/bin", "/usr/lib/postgresql/18/bin")
    debian_cluster(tmp_path, 17, "main")
    debian_cluster(tmp_path, 18, "main")
    debian_cluster(tmp_path, 18, "web")
    with pytest.raises(PitrError, match="18/main, 18/web, 17/main"):
        detect(preferred_name="shop", root=str(tmp_path))
    with pytest.raises(PitrError, match="18/main, 17/main"):
        detect(name="main", root=str(tmp_path))
    found = detect(version=17, name="main", root=str(tmp_path))
    assert found is not None and found.service == "postgresql@17-main"


def test_user_and_programs_that_are_not_there_are_told(tmp_path: Path) -> None:
    programs(tmp_path, "/usr/lib/postgresql/17/bin")
    there = str(tmp_path / "usr/lib/postgresql/17/bin")
    assert missing("root", there) == missing("", there) == []
    assert missing("nobody-of-this-name", there) == ["the user nobody-of-this-name"]
    assert missing("root", str(tmp_path)) == missing("root", "") == ["the programs of PostgreSQL"]
