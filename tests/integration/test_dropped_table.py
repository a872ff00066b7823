# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The guide docs/dropped-table.md, typed as it stands there, from the alarm to the table that is back.

Its commands are taken from the page; only places, times, and what the page says to take from an earlier command's
output are put in.
"""

from __future__ import annotations

import datetime
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ansible_collections.pgdrill.pitr.plugins.module_utils.postgres import Login, query
from ansible_collections.pgdrill.pitr.plugins.module_utils.target import format_time
from ansible_collections.pgdrill.pitr.tests.integration.support import fingerprint, until
from ansible_collections.pgdrill.pitr.tests.integration.test_playbooks import CHECKOUT, Site

pytestmark = pytest.mark.once

GUIDE = CHECKOUT / "docs" / "dropped-table.md"


def commands() -> dict[str, list[str]]:
    """The commands of the page by the number of their section, those before the first one under an empty name."""
    result: dict[str, list[str]] = {}
    section = ""
    inside = False
    for line in GUIDE.read_text(encoding="utf-8").splitlines():
        heading = re.match(r"## (?:(\d)\.)?", line)
        if heading and not inside:
            section = heading.group(1) or "end"
        elif line.strip().startswith("```"):
            inside = line.strip() == "```console"
        elif inside and line.lstrip().startswith("$ "):
            result.setdefault(section, []).append(line.lstrip()[2:])
        elif inside:
            result[section][-1] += "\n" + line
    return result


class Operator:
    """Types what the page says, with the sandbox's places."""

    def __init__(self, site: Site, bin_dir: str) -> None:
        self.site = site
        self.guide = commands()
        self.aside = f"{site.server.data}.aside"
        venv = str(Path(sys.executable).parent)
        self.environment = {**site.environment, "PATH": f"{venv}:{bin_dir}:{os.environ['PATH']}"}
        self.replaced = {
            "-i myinventory": "-i inventories/sandbox",
            "/var/run/postgresql": site.server.socket,
            "-p 5432": f"-p {site.port}",
            "-p 5433": f"-p {site.port + 1}",
            "/var/lib/postgresql/18/main.aside": self.aside,
        }

    def type(self, section: str, first: int = 0, count: int = 1) -> str:
        """Run commands of a section in one shell, and return what they print."""
        text = "\n".join(self.guide[section][first : first + count])
        assert text, section
        for old, new in self.replaced.items():
            text = text.replace(old, new)
        done = subprocess.run(
            ["bash", "-c", text], cwd=CHECKOUT, env=self.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, check=False, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, f"{text}\n{done.stdout}"
        return done.stdout


@pytest.fixture
def site(bin_dir: str, major: int, tmp_path: Path) -> Iterator[Site]:
    """A sandbox of its own; a copy that was restored beside it ends with the test."""
    made = Site(bin_dir, major, tmp_path)
    try:
        yield made
    finally:
        made.server.program("pg_ctl", "stop", "-m", "immediate", "-D", f"{made.server.data}.aside")
        made.close()


SHOP = """
CREATE ROLE clerk;
CREATE TABLE customers (id int PRIMARY KEY, name text);
INSERT INTO customers SELECT i, 'customer ' || i FROM generate_series(1, 10) i;
CREATE TABLE orders (id serial PRIMARY KEY, customer int REFERENCES customers, note text);
INSERT INTO orders (customer, note) SELECT 1 + i % 10, repeat('x', 3000) FROM generate_series(1, 500) i;
GRANT SELECT ON orders TO clerk;
CREATE TABLE invoices (id int PRIMARY KEY, order_id int REFERENCES orders);
INSERT INTO invoices SELECT i, i FROM generate_series(1, 50) i;
CREATE TABLE items (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, v text);
INSERT INTO items (v) SELECT 'item' FROM generate_series(1, 40)
"""


def test_dropped_table_comes_back_as_the_guide_says_and_nothing_else_changes(site: Site, bin_dir: str) -> None:
    site.succeed("site")
    server = site.server
    server.sql("CREATE DATABASE shop")
    shop = Login(unix_socket=server.socket, port=site.port, db="shop")

    def sql(*statements: str, at: Login = shop) -> list[tuple[object, ...]]:
        with at.connect() as connection:
            for statement in statements[:-1]:
                query(connection, statement)
            return query(connection, statements[-1])

    sql(*SHOP.split(";"))
    identity = site.identity
    before = datetime.datetime.now(datetime.timezone.utc)
    # The mistake, and what was committed after it.
    sql("DROP TABLE orders CASCADE")
    sql("DELETE FROM items WHERE id > 10")
    sql("INSERT INTO customers VALUES (11, 'after')", "INSERT INTO items (v) VALUES ('after')")
    sql("UPDATE invoices SET order_id = 7 WHERE id = 1")

    operator = Operator(site, bin_dir)
    archived = len(site.segments())
    operator.type("")
    until(lambda: len(site.segments()) > archived, "the segment in the archive")
    assert "last_commit_time" in operator.type("", 1)
    operator.replaced["2026-03-01T14:20:00+01:00"] = format_time(before).replace(" ", "T")
    operator.replaced["2026-03-01T14:40:00+01:00"] = format_time(before + datetime.timedelta(minutes=20)).replace(
        " ", "T"
    )
    said = operator.type("1")
    assert "drop by transaction" in said and said.count("restore_with") == 1, said
    found = re.search(r'restore_with"?: "?(-e restore_target_xid=\d+ [^"\n]*)', said)
    assert found is not None, said
    operator.replaced["-e restore_target_xid=745 -e restore_target_inclusive=false -e restore_target_timeline=1"] = (
        found.group(1).strip()
    )
    assert "before" in operator.type("2")
    assert "500" in operator.type("3")
    # The copy does not archive, and does not write by itself.
    aside = Login(unix_socket=server.socket, port=site.port + 1, db="shop")
    shown = "SELECT current_setting('archive_mode'), current_setting('transaction_read_only')"
    assert sql(shown, at=aside) == [("off", "on")]
    # Now that there is a server that knows it, the name can be told.
    named = site.succeed("find_target", find_relation="public.orders", find_port=site.port + 1, find_kinds=["drop"])
    assert "public.orders" in named
    operator.type("4", 0, 2)
    assert "500" in operator.type("4", 2)
    assert sql("SELECT to_regclass('public.orders')") == [(None,)]
    operator.type("4", 3, 3)
    operator.type("5")
    assert sql("SELECT count(*), max(length(note)) FROM orders") == [(500, 3000)]
    # Its sequence goes on behind the last value, and its privileges and constraints are there.
    assert sql("INSERT INTO orders (customer) VALUES (11) RETURNING id")[0][0] > 500  # type: ignore[operator]
    assert sql("SELECT has_table_privilege('clerk', 'orders', 'SELECT')") == [(True,)]
    foreign_key = operator.type("5", 1).strip()
    assert "REFERENCES" in foreign_key and "invoices" in foreign_key
    sql(foreign_key)
    assert sql("SELECT count(*) FROM pg_constraint WHERE contype = 'f'") == [(2,)]
    # What was committed after the mistake is still there, and production has run all the time.
    assert sql("SELECT count(*) FROM items") == [(41,)] and sql("SELECT v FROM items WHERE id = 41") == [("after",)]
    assert sql("SELECT name FROM customers WHERE id = 11") == [("after",)]
    assert sql("SELECT order_id FROM invoices WHERE id = 1") == [(7,)]
    assert site.identity == identity
    operator.type("6", 0, 2)
    assert not os.path.exists(operator.aside)


def test_copy_is_not_put_in_the_place_of_the_cluster(site: Site) -> None:
    site.succeed("site")
    identity, files = site.identity, fingerprint(site.server.data / "conf.d", site.repository)
    for variables in ({"aside_pgdata": str(site.server.data)}, {"aside_port": site.port}):
        output = site.fail("restore_aside", **variables)
        assert "must not be those of the cluster itself" in output
    assert not os.path.exists(f"{site.server.data}.aside")
    assert site.identity == identity
    assert fingerprint(site.server.data / "conf.d", site.repository) == files
