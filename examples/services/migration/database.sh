#!/bin/sh
# SPDX-License-Identifier: MPL-2.0
# The database's part of a deployment; the current folder is that of the service.
#
# database.sh known RELEASE              fail if the database has migrations that the release does not have
# database.sh backup ID                  copy the database to backups/ID.db, also while it is in use
# database.sh rehearse ID RELEASE        apply the release's migrations to a copy of that backup
# database.sh migrate DATABASE RELEASE   apply them
# database.sh restore ID                 put the backup back if the schema is not the one that it has
# database.sh prune NUMBER               keep so many backups
#
# PRAGMA user_version is the number of the last migration that was applied.
set -eu
database=data/app.db

# sqlite3 would make a file that is missing.
version_of() {
    [ -f "$1" ] || { echo "there is no $1" >&2; return 1; }
    sqlite3 "$1" 'PRAGMA user_version'
}

# 0007-name.sql is migration 7.
number_of() {
    basename "$1" | sed 's/^0*//; s/-.*//'
}

check() {
    result=$(sqlite3 "$1" 'PRAGMA integrity_check')
    [ "$result" = ok ] || { echo "$1 is damaged: $result" >&2; exit 1; }
}

# Each migration and its number are one transaction: it is applied as a whole or not at all.
migrate() {
    for file in "$2"/migrations/[0-9]*.sql; do
        [ -e "$file" ] || continue
        number=$(number_of "$file")
        applied=$(version_of "$1")
        [ "$number" -gt "$applied" ] || continue
        echo "applying $(basename "$file")"
        # A line of its own ends the last one of the file, which may be a comment.
        {
            echo 'BEGIN IMMEDIATE;'
            cat "$file"
            printf '\n;PRAGMA user_version = %s;\nCOMMIT;\n' "$number"
        } | sqlite3 -bail "$1"
        applied=$(version_of "$1")
        [ "$applied" = "$number" ] || { echo "$file was not applied" >&2; return 1; }
    done
}

case $1 in
known)
    newest=0
    for file in "$2"/migrations/[0-9]*.sql; do
        [ -e "$file" ] || continue
        newest=$(number_of "$file")
    done
    applied=$(version_of "$database")
    if [ "$applied" -gt "$newest" ]; then
        echo "the database is at migration $applied, $2 knows $newest" >&2
        exit 1
    fi
    ;;
backup)
    version_of "$database" >/dev/null
    rm -f "backups/$2.db.new"
    sqlite3 "$database" ".backup 'backups/$2.db.new'"
    check "backups/$2.db.new"
    mv -f "backups/$2.db.new" "backups/$2.db"
    ;;
rehearse)
    copy=backups/$2.rehearsal
    trap 'rm -f "$copy" "$copy-journal" "$copy-wal" "$copy-shm"' EXIT
    cp "backups/$2.db" "$copy"
    migrate "$copy" "$3"
    check "$copy"
    ;;
migrate)
    migrate "$2" "$3"
    ;;
restore)
    # Migrations are applied after a backup only.
    if [ ! -f "backups/$2.db" ]; then
        echo "there is no backup, so nothing was changed"
        exit 0
    fi
    before=$(version_of "backups/$2.db")
    if [ -f "$database" ]; then
        now=$(version_of "$database")
        if [ "$now" = "$before" ]; then
            echo "the schema is as it was; nothing to restore"
            exit 0
        fi
        # What a killed program left in the write-ahead log belongs to what is kept.
        sqlite3 "$database" 'PRAGMA wal_checkpoint(TRUNCATE)' >/dev/null
        mv -f "$database" "$database.$2"
        rm -f "$database-wal" "$database-shm"
    fi
    cp "backups/$2.db" "$database.new"
    mv -f "$database.new" "$database"
    echo "restored backups/$2.db; what was replaced is $database.$2"
    ;;
prune)
    find backups -name '*.db' -printf '%T@ %p\n' | sort -rn | tail -n "+$(($2 + 1))" | cut -d ' ' -f 2- |
        xargs -r rm -f --
    ;;
*)
    echo "unknown action: $1" >&2
    exit 1
    ;;
esac
