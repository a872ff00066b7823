#!/usr/bin/env bash
# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# What a drill does, by hand: PostgreSQL's programs, zstd (or gzip), and the shell. No step is here that the drill has
# not, and every step that the drill has and that needs no tool of ours is here; benchmarks/README.md has the table.
#
# usage: bare.sh BIN_DIR HOME PORT SCALE CLIENTS JOBS TRANSACTIONS
# HOME is an empty directory; the phases and when each began are written to HOME/phases. The server is left running.
set -euo pipefail
bin=$1 home=$2 port=$3 scale=$4 clients=$5 jobs=$6 transactions=$7
export LC_ALL=C PATH="$bin:$PATH" PGDATA="$home/data" PGHOST="$home" PGPORT="$port" PGUSER=postgres PGTZ=UTC
archive=$home/archive backup=$home/backup
version=$(postgres --version | sed 's/.*) \([0-9]*\).*/\1/')

if command -v zstd > /dev/null; then
  pack='zstd -q -1 -c' unpack='zstd -q -d -c' suffix=.zst
else
  pack='gzip -1 -c' unpack='gzip -d -c' suffix=.gz
fi

# Two dumps are to be the same text; minor releases that do not know the option write no random keys, either.
restrict=()
if [[ $(pg_dumpall --help) == *--restrict-key* ]]; then restrict=(--restrict-key=0); fi

phase() { echo "$EPOCHREALTIME $1" >> "$home/phases"; }

die() {
  echo "$1" >&2
  exit 1
}

# Until a command succeeds, for a minute. Twenty looks a second, as a person's script would have them or fewer.
wait_for() {
  local end=$((SECONDS + 60))
  until "$@"; do
    [ "$SECONDS" -lt "$end" ] || die "waited a minute: $*"
    sleep 0.05
  done
}

sql() { psql -X -q -A -t -v ON_ERROR_STOP=1 "$@"; }

promoted() { [ "$(sql -d postgres -c 'SELECT pg_is_in_recovery()')" = f ]; }

# Archiving works end to end: a segment is switched and lies in the archive, with the same content.
probe() {
  local segment
  sql -d postgres -c "SELECT pg_logical_emit_message(false, 'bare', 'probe')" > /dev/null
  segment=$(sql -d postgres -c 'SELECT pg_walfile_name(pg_switch_wal())')
  wait_for test -e "$archive/$segment$suffix"
  $unpack "$archive/$segment$suffix" | cmp - "$PGDATA/pg_wal/$segment"
}

# The whole cluster as text: settings and access rules, which pg_dumpall leaves out, and then what it writes. What a
# restore must change is left out.
dump() {
  sql -d postgres -c "SELECT name, setting FROM pg_file_settings WHERE name !~ '^(archive_|restore_command|recovery_)'
    ORDER BY name, seqno" -c 'SELECT type, database, user_name, address, auth_method FROM pg_hba_file_rules
    ORDER BY line_number'
  pg_dumpall --quote-all-identifiers "${restrict[@]}"
}

phase 'set up'
initdb -D "$PGDATA" --username=postgres --auth-local=trust --auth-host=scram-sha-256 --encoding=UTF8 --locale=C \
  --data-checksums > /dev/null
mkdir -m 0700 "$archive"
# On stable storage before the server recycles the segment, whole or not at all, and never over another file.
archive_command="$pack \"%p\" > \"$archive/%f.tmp\" && sync \"$archive/%f.tmp\""
archive_command+=" && ln \"$archive/%f.tmp\" \"$archive/%f$suffix\" && rm \"$archive/%f.tmp\" && sync \"$archive\""
cat >> "$PGDATA/postgresql.conf" << END
listen_addresses = '127.0.0.1'
port = $port
unix_socket_directories = '$home'
max_wal_size = 2GB
shared_buffers = 128MB
wal_level = replica
archive_mode = on
archive_command = '$archive_command'
archive_timeout = 60s
max_wal_senders = 10
max_replication_slots = 10
wal_keep_size = 0
wal_compression = on
END
echo 'host replication,postgres backup 127.0.0.1/32 scram-sha-256' >> "$PGDATA/pg_hba.conf"
pg_ctl start -w -s -l "$home/log" > /dev/null
password=$(od -A n -N 16 -t x1 /dev/urandom | tr -d ' ')
sql -d postgres -c "CREATE ROLE backup LOGIN REPLICATION PASSWORD '$password'"
export PGPASSFILE=$home/pgpass
(umask 077 && echo "127.0.0.1:$port:*:backup:$password" > "$PGPASSFILE")

phase 'base backup'
# The server compresses, with zstd where it was built with it and this host can read it.
server=server-gzip:level=1 base=base.tar.gz read_base='gzip -d -c'
known=$(sql -d postgres -c "SELECT enumvals FROM pg_settings WHERE name = 'wal_compression'")
if [[ $suffix == .zst && $known == *zstd* ]]; then
  server="server-zstd:level=1,workers=$(nproc)" base=base.tar.zst read_base=$unpack
fi
# Without WAL in it, so that the server waits until the archive has what the backup needs.
pg_basebackup --host=127.0.0.1 --username=backup --no-password -D "$backup" -F tar -Z "$server" -X none -c fast
if [ "$version" -ge 18 ]; then
  pg_verifybackup --no-parse-wal --quiet "$backup"
else # It reads no tar before 18.
  $read_base "$backup/$base" | tar -t > /dev/null
fi
(cd "$backup" && sha256sum ./* > "$home/backup.sha256")
probe

phase 'load'
sql -d postgres -c 'CREATE DATABASE pgdrill'
sql -d pgdrill -c 'CREATE TABLE status (id int PRIMARY KEY, phase text NOT NULL)' \
  -c "INSERT INTO status VALUES (1, 'base')"
pgbench -i -q -s "$scale" pgdrill > "$home/pgbench.log" 2>&1
pgbench -n -c "$clients" -j "$jobs" -t "$transactions" pgdrill >> "$home/pgbench.log" 2>&1
sql -d pgdrill -c "UPDATE status SET phase = 'end'"

phase 'truth dump'
# It holds everything that the cluster does, and is to outlive it.
(umask 077 && dump | $pack > "$home/truth.sql$suffix")
sync "$home/truth.sql$suffix"

phase 'last segment'
probe

phase 'kill'
pg_ctl stop -s -m immediate

phase 'restore'
(cd "$backup" && grep backup_manifest "$home/backup.sha256" | sha256sum --check --status)
mv "$PGDATA" "$home/data.old"
mkdir -m 0700 "$PGDATA"
$read_base "$backup/$base" | tar -x -C "$PGDATA"
pg_verifybackup --no-parse-wal --quiet --manifest-path="$backup/backup_manifest" "$PGDATA"
# Until it is accepted, the restored cluster archives nothing into the archive that it came from.
cat >> "$PGDATA/postgresql.auto.conf" << END
restore_command = '$unpack "$archive/%f$suffix" > "%p"'
archive_command = 'false'
recovery_target_timeline = '1'
END
touch "$PGDATA/recovery.signal"
[ "$(postgres -C archive_command)" = false ] || die 'archive_command would be another one'
[ -n "$(postgres -C restore_command)" ] || die 'restore_command would be empty'
# A machine that loses its power must not find a directory with holes that a server starts from.
sync --file-system "$PGDATA"

phase 'replay'
pg_ctl start -w -s -l "$home/log" > /dev/null
wait_for promoted
[[ $(tail -n 1 "$PGDATA/pg_wal/00000002.history") == *'no recovery target specified' ]] || die 'not the end of the archive'

phase 'second dump, comparison'
dump | cmp - <($unpack "$home/truth.sql$suffix")
rm "$home/truth.sql$suffix"

phase 'status row, pg_amcheck'
[ "$(sql -d pgdrill -c 'SELECT phase FROM status')" = end ] || die 'the status row is not the last one'
pg_amcheck --all --heapallindexed --install-missing --jobs="$jobs"

phase 'acceptance'
sql -d postgres -c 'ALTER SYSTEM RESET restore_command' -c 'ALTER SYSTEM RESET archive_command' \
  -c 'ALTER SYSTEM RESET recovery_target_timeline' -c 'SELECT pg_reload_conf()' > /dev/null
probe
rm -r "$home/data.old"

phase 'end'
