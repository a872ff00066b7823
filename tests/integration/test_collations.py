# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A restored cluster on a host with other collations is told, with what is to be built anew."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from ansible_collections.pgdrill.pitr.plugins.module_utils.collations import Mismatch, mismatches
from ansible_collections.pgdrill.pitr.plugins.module_utils.postgres import query
from ansible_collections.pgdrill.pitr.tests.integration.support import Restored, Sandbox

PREPARE = """
CREATE TABLE customer (id int PRIMARY KEY, name text, code text COLLATE "C", span int4range,
                       EXCLUDE USING gist (span WITH &&), nick text COLLATE {collation});
CREATE INDEX customer_name ON customer (name);
CREATE INDEX "Customer Code" ON customer (code);
CREATE INDEX customer_nick ON customer (nick);
CREATE INDEX customer_expression ON customer ((lower(code) COLLATE {collation}));
CREATE TABLE parted (name text) PARTITION BY HASH (name);
CREATE TABLE parted_0 PARTITION OF parted FOR VALUES WITH (MODULUS 1, REMAINDER 0);
CREATE INDEX parted_name ON parted (name);
"""


def test_mismatch_of_a_database_and_of_a_collation_is_told_with_the_indexes(
    sandbox: Callable[..., Sandbox], restored: Callable[..., Restored]
) -> None:
    primary = sandbox()
    found = primary.server.sql(
        "SELECT quote_ident(nspname) || '.' || quote_ident(collname), pg_collation_actual_version(c.oid), c.oid"
        " FROM pg_collation c JOIN pg_namespace n ON n.oid = collnamespace"
        # One that has a version, if this PostgreSQL knows any; else one for which the server has none to record.
        " WHERE pg_collation_actual_version(c.oid) IS NOT NULL OR collname = 'POSIX' ORDER BY 2 NULLS LAST, 1 LIMIT 1"
    )
    collation, actual, oid = found[0]
    primary.server.sql('CREATE DATABASE "The App" TEMPLATE postgres')
    with contextlib.closing(primary.server.login.connect("The App")) as connection:
        for statement in PREPARE.format(collation=collation).split(";"):
            if statement.strip():
                query(connection, statement)
        # As the catalog looks where another library has made it.
        query(connection, "UPDATE pg_collation SET collversion = '0.1' WHERE oid = %s", (oid,))
    primary.server.sql("UPDATE pg_database SET datcollversion = '0.2' WHERE datname = 'The App'")
    own = primary.server.value(
        "SELECT pg_database_collation_actual_version(oid) FROM pg_database WHERE datname = 'The App'"
    )
    primary.backup("only")
    commit = primary.commit("target")
    primary.commit("later")
    primary.probe()
    primary.server.stop()
    options = {"recovery_target_xid": str(commit.xid), "recovery_target_action": "pause"}
    cluster = restored(primary, options).run()
    of_database, of_collation = mismatches(cluster.server.login)
    refresh = ('ALTER DATABASE "The App" REFRESH COLLATION VERSION',) if own is not None else ()
    indexes = ("customer_name", "parted_0_name_idx")
    reindex = tuple(f"REINDEX INDEX CONCURRENTLY public.{name}" for name in indexes)
    assert of_database == Mismatch("The App", "default", "0.2", own or "", reindex + refresh)
    indexes = ("customer_expression", "customer_nick")
    reindex = tuple(f"REINDEX INDEX CONCURRENTLY public.{name}" for name in indexes)
    refresh = (f"ALTER COLLATION {collation} REFRESH VERSION",) if actual is not None else ()
    assert of_collation == Mismatch("The App", collation, "0.1", actual or "", reindex + refresh)
    # What is told to do works, and then nothing is left to tell.
    cluster.recovery.promote(60)
    for item in (of_database, of_collation):
        for command in item.reindex:
            with contextlib.closing(cluster.server.login.connect("The App")) as connection:
                query(connection, command)
    left = [name for name, now in (("default", own), (collation, actual)) if now is None]
    assert [item.collation for item in mismatches(cluster.server.login)] == left


def test_cluster_of_this_host_has_no_mismatch(sandbox: Callable[..., Sandbox]) -> None:
    primary = sandbox()
    primary.server.sql("CREATE DATABASE closed TEMPLATE postgres ALLOW_CONNECTIONS false")
    assert mismatches(primary.server.login) == []
