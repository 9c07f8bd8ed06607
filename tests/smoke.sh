#!/usr/bin/env bash
# SPDX-License-Identifier: MPL-2.0
# Smoke test of a built archive: init, validate, run, deploy, status, history, SIGTERM.
#
#   tests/smoke.sh dist/hookshot.pyz        PYTHON=python3.12 chooses another interpreter
#
# Exit status 0 if all of it works. Talks to loopback only; every wait has an end.
set -euo pipefail

[[ $# -eq 1 && -f $1 ]] || { echo "usage: $0 ARCHIVE" >&2; exit 2; }
archive=$(realpath "$1")
python=${PYTHON:-python3}
home=$(mktemp -d)
server=

clean_up() {
    [[ -z $server ]] || kill -KILL "$server" 2>/dev/null || true
    rm -rf "$home"
}
trap clean_up EXIT

fail() {
    echo "smoke: $*" >&2
    if [[ -f $home/server.log ]]; then sed 's/^/  server: /' "$home/server.log" >&2; fi
    exit 1
}

# expect WHAT SECONDS COMMAND...: the condition comes true in time, or the test ends.
expect() {
    local what=$1 deadline=$((SECONDS + $2))
    shift 2
    until "$@"; do
        ((SECONDS < deadline)) || fail "$what: not within the time"
        sleep 0.1
    done
}

hookshot() {
    timeout --kill-after=5 60 "$python" "$archive" -c "$home/config.toml" -s "$home/services.toml" "$@" </dev/null
}

is_ready() {
    kill -0 "$server" 2>/dev/null || fail "the server ended before it was ready"
    "$python" - "$url/ready" <<<'import sys, urllib.request as r
r.build_opener(r.ProxyHandler({})).open(sys.argv[1], timeout=2)' 2>/dev/null
}

is_gone() { ! kill -0 "$server" 2>/dev/null; }

timeout 60 "$python" "$archive" init "$home" </dev/null || fail "init"
hookshot validate || fail "validate"

port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
url=http://127.0.0.1:$port
# Not through the function: the signal at the end is for the server itself, not for a timeout around it.
"$python" "$archive" -c "$home/config.toml" -s "$home/services.toml" run --port "$port" \
    </dev/null >"$home/server.log" 2>&1 &
server=$!
expect "GET /ready" 20 is_ready

hookshot deploy example example/app:1.0 --id smoke-1 --url "$url" || fail "deploy: exit status $?"
# Not grep -q: it stops reading at the first match, and the writer would fail.
hookshot status smoke-1 --url "$url" --json | grep smoke-1 >/dev/null || fail "status does not show the deployment"
hookshot history example --url "$url" --json | grep smoke-1 >/dev/null || fail "history does not show the deployment"

kill -TERM "$server"
expect "the end after SIGTERM" 30 is_gone
status=0
wait "$server" || status=$?
server=
((status == 0)) || fail "exit status $status after SIGTERM"
echo "smoke: $1 works"
