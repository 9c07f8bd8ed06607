#!/bin/sh
# SPDX-License-Identifier: MPL-2.0
# fetch.sh URL sha256:CHECKSUM FILE: have FILE hold what has this checksum, from URL unless it is there already.
# With --present in place of the URL nothing is fetched.
set -eu
url=$1 checksum=${2#sha256:} file=$3

is_right() {
    printf '%s  %s\n' "$checksum" "$1" | sha256sum --check --status --strict
}

if [ -f "$file" ] && is_right "$file"; then
    echo "$file is there"
    exit 0
fi
if [ "$url" = --present ]; then
    echo "$file is missing, or has another checksum than $checksum" >&2
    exit 1
fi
# Beside its place, so that the name appears with the whole content or not at all.
new=$(mktemp "$file.XXXXXX")
trap 'rm -f "$new"' EXIT
curl --fail --silent --show-error --location --proto =https,http --proto-redir =https --max-time 90 \
    --output "$new" "$url"
if ! is_right "$new"; then
    echo "$url: its checksum is $(sha256sum "$new" | cut -d ' ' -f 1), not $checksum" >&2
    exit 1
fi
chmod 0755 "$new"
mv -f "$new" "$file"
