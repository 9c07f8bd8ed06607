#!/bin/sh
# SPDX-License-Identifier: MPL-2.0
# switch.sh start VERSION    start a release in the idle instance and wait until it answers
# switch.sh to VERSION URL   send requests to the instance that has this release, and wait until those to URL go there;
#                            no change if they go there already
#
# blue and green are links to the release that each instance runs, live.conf is a link to the nginx upstream of the
# instance in use. The current folder is that of the service.
set -eu
action=$1 version=$2
live=$(basename "$(readlink live.conf)" .conf)
case $live in
    blue) idle=green ;;
    green) idle=blue ;;
    *) echo "live.conf leads to $live, neither blue nor green" >&2; exit 1 ;;
esac

# Make a link beside its place and rename it.
link() {
    ln -sfn "$1" "$2.new"
    mv -fT "$2.new" "$2"
}

has() {
    [ "$(readlink "$1")" = "releases/$version" ]
}

case $action in
start)
    test -x "releases/$version/run"
    link "releases/$version" "$idle"
    systemctl restart "web@$idle.service"
    port=$(sed -n 's/^PORT=//p' "$idle.env")
    curl --fail --silent --show-error --output /dev/null --max-time 5 --retry 20 --retry-delay 1 --retry-connrefused \
        "http://127.0.0.1:$port/health"
    echo "$idle runs $version on port $port"
    ;;
to)
    if has "$idle"; then
        link "proxy/$idle.conf" live.conf
    elif ! has "$live"; then
        echo "neither instance has release $version" >&2
        exit 1
    fi
    # Also where nothing was linked: an attempt before this one may have ended between link and reload.
    systemctl reload nginx.service
    live=$(basename "$(readlink live.conf)" .conf)
    # For a moment after a reload the workers of before still answer, and with files that are wrong they go on for good.
    tries=0
    until curl --silent --max-time 5 --dump-header - --output /dev/null "$3" | grep -qi "^x-instance: $live"; do
        tries=$((tries + 1))
        if [ "$tries" = 20 ]; then
            echo "nginx does not send requests to $live" >&2
            exit 1
        fi
        sleep 1
    done
    echo "requests go to $live"
    ;;
*)
    echo "unknown action: $action" >&2
    exit 1
    ;;
esac
