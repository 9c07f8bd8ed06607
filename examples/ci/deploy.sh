#!/bin/sh
# SPDX-License-Identifier: MPL-2.0
# Have a Hookshot server deploy, from a CI job that has curl, openssl and a POSIX shell, and no Python.
#
#   deploy.sh SERVICE IMAGE [KEY=VALUE ...]         deploy; the pairs are metadata
#   deploy.sh --rollback SERVICE [IMAGE|DEPLOY_ID]  go back, to the last good image if none is named
#
#   HOOKSHOT_URL         https://host[:port]
#   HOOKSHOT_HMAC_KEY    the key; or HOOKSHOT_KEY_FILE, a file that holds the key alone
#   HOOKSHOT_READ_TOKEN  shows the log as it comes; without it only the outcome is told
#   HOOKSHOT_CA          authorities that the server's certificate may come from, in PEM (default: curl's)
#   HOOKSHOT_CERT, HOOKSHOT_CERT_KEY  client certificate and its key, in PEM, where the server asks for one
#   HOOKSHOT_TIMEOUT     seconds to wait for the end (3600); 0: do not wait
#   HOOKSHOT_RETRY       seconds to try again while the server cannot be reached or is busy (60); 0: try once
#   HOOKSHOT_DEPLOY_ID   default: made of the service and the numbers of the CI run; the same id never runs twice
#   HOOKSHOT_OUTPUT      file to which deploy_id=, status= and log_url= are appended
#
# Exit status, as that of `hookshot deploy`: 0 Succeeded, or accepted if it does not wait; 10 Failed, 11 RolledBack,
# 12 RollbackFailed, 13 Cancelled, 14 accepted, but its end is not known; 2 usage, 65 refused as invalid, 69 not reached,
# 70 server's mistake, 75 busy or locked, 77 not permitted, 78 key or certificate cannot be used.
#
# The key never is an argument of a program, which every user of the machine could see, nor in a program's environment.
{ set +x; } 2>/dev/null
set -eu
export LC_ALL=C
key=${HOOKSHOT_HMAC_KEY:-} token=${HOOKSHOT_READ_TOKEN:-}
unset HOOKSHOT_HMAC_KEY HOOKSHOT_READ_TOKEN

fail() { # STATUS SENTENCE
    printf 'deploy.sh: %s\n' "$2" >&2
    exit "$1"
}

is_number() {
    case $1 in '' | *[!0-9]* | ?????????*) return 1 ;; esac
}

# --- the request

usage='deploy.sh SERVICE IMAGE [KEY=VALUE ...] or deploy.sh --rollback SERVICE [IMAGE|DEPLOY_ID]'
action=deploy
if [ "${1-}" = --rollback ]; then
    action=rollback
    shift
fi
case $action,$# in deploy,[01] | rollback,0 | rollback,[3-9]*) fail 2 "$usage" ;; esac
for value in "$@"; do
    case $value in *[[:cntrl:]]*) fail 2 "an argument holds a control character" ;; esac
done
service=$1 target=${2-}
case $service in '' | *[!A-Za-z0-9_-]*) fail 2 "$service is no name of a service; $usage" ;; esac
timeout=${HOOKSHOT_TIMEOUT:-3600} patience=${HOOKSHOT_RETRY:-60}
is_number "$timeout" || fail 2 "HOOKSHOT_TIMEOUT is not a number of seconds"
is_number "$patience" || fail 2 "HOOKSHOT_RETRY is not a number of seconds"
url=${HOOKSHOT_URL:-}
url=${url%/}
case $url in http://?* | https://?*) ;; *) fail 2 "HOOKSHOT_URL is not http://host or https://host" ;; esac

# What names this run of this job, and is the same if the job's commands run again.
if [ -n "${HOOKSHOT_DEPLOY_ID:-}" ]; then
    id=$HOOKSHOT_DEPLOY_ID
elif [ -n "${GITHUB_RUN_ID:-}" ]; then # Gitea and Forgejo set it too
    id=run-$GITHUB_RUN_ID-${GITHUB_RUN_ATTEMPT:-1}-$service-${GITHUB_JOB:-job}
elif [ -n "${GITLAB_CI:-}" ]; then
    id=job-$CI_JOB_ID-$service
elif [ -n "${CI_PIPELINE_NUMBER:-}" ]; then # Woodpecker
    id=pipeline-$CI_PIPELINE_NUMBER-$service-${CI_STEP_NAME:-step}-${CI_REPO:-}
elif [ -n "${DRONE_BUILD_NUMBER:-}" ]; then
    id=build-$DRONE_BUILD_NUMBER-$service-${DRONE_STEP_NAME:-step}-${DRONE_REPO:-}
elif [ -n "${BUILD_TAG:-}" ]; then # Jenkins
    id=$BUILD_TAG-$service
else
    id=$(date -u +%Y%m%d-%H%M%S)-$(openssl rand -hex 4)
fi
id=$(printf %s "$id" | tr -c 'A-Za-z0-9._-' - | cut -c 1-128)
# A message id has no full stop.
message_id=$(printf %s "$action-$id" | tr . -)

text() { # VALUE: as a JSON string
    printf '"%s"' "$(printf %s "$1" | sed 's/[\\"]/\\&/g')"
}

render_deploy() {
    printf '{"deploy_id":%s,"service":%s,"image":%s' "$(text "$id")" "$(text "$service")" "$(text "$target")"
    shift 2
    separator=',"metadata":{' end=
    for pair in "$@"; do
        case $pair in ?*=*) ;; *) fail 2 "$pair is not KEY=VALUE" ;; esac
        printf '%s%s:%s' "$separator" "$(text "${pair%%=*}")" "$(text "${pair#*=}")"
        separator=, end='}'
    done
    printf '%s}\n' "$end"
}

render_rollback() {
    printf '{"action":"rollback","service":%s' "$(text "$service")"
    [ -z "$target" ] || printf ',"to":%s' "$(text "$target")"
    printf ',"reason":%s}\n' "$(text "asked for by $id")"
}

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
trap 'fail 130 "interrupted; a deployment that was accepted goes on"' INT
trap 'fail 143 "ended from outside; a deployment that was accepted goes on"' TERM
trap 'exit 143' HUP
if [ "$action" = deploy ]; then
    path=/deploy
    render_deploy "$@" >"$folder/body"
else
    path=/services/$service/rollback
    render_rollback >"$folder/body"
fi

# --- the signature

if [ -n "${HOOKSHOT_KEY_FILE:-}" ]; then
    key=$(cat "$HOOKSHOT_KEY_FILE") || fail 78 "the file in HOOKSHOT_KEY_FILE cannot be read"
    case $key in *[[:cntrl:]]*) fail 78 "the file in HOOKSHOT_KEY_FILE holds more than a key" ;; esac
fi
[ -n "$key" ] || fail 77 "there is no key to sign with; set HOOKSHOT_HMAC_KEY or HOOKSHOT_KEY_FILE"
case $token in *[![:graph:]]*) fail 2 "HOOKSHOT_READ_TOKEN has characters that no header can have" ;; esac

numbers() { od -An -v -tu1; }

key_numbers() { # a key that begins with whsec_ is base64
    case $key in
        whsec_*) printf '%s\n' "${key#whsec_}" | openssl base64 -d -A | numbers ;;
        *) printf %s "$key" | numbers ;;
    esac
}

pad() { # MASK NUMBER ...: the key, filled up to 64 bytes, each xor MASK, for printf %b
    mask=$1
    shift
    while [ $# -lt 64 ]; do set -- "$@" 0; done
    for number in "$@"; do printf '\\0%03o' $((number ^ mask)); done
}

hash() { openssl dgst -sha256 -binary; }

# HMAC of RFC 2104 by hand: what openssl offers takes the key as an argument. printf is no program, but part of the shell.
key_bytes=$(key_numbers)
# shellcheck disable=SC2086  # a list of numbers
set -- $key_bytes
if [ $# -gt 64 ]; then
    # shellcheck disable=SC2046,SC2059  # numbers; the format is made of them
    set -- $(printf "$(printf '\\%03o' "$@")" | hash | numbers)
fi
[ $# -gt 0 ] || fail 78 "the key is whsec_ without base64"
inner=$(pad 54 "$@") outer=$(pad 92 "$@")
unset key key_bytes
set --

sign() { # of standard input, as base64
    { printf %b "$outer"; { printf %b "$inner"; cat; } | hash; } | hash | openssl base64 -A
}

# --- asking

ask() { # SECONDS_TO_WAIT: send the request; sets code, failure and answer
    now=$(date +%s)
    signature=$({ printf '%s.%s.' "$message_id" "$now"; cat "$folder/body"; } | sign)
    : >"$folder/answer"
    : >"$folder/headers"
    failure=0
    code=$(curl --silent --show-error --connect-timeout 10 --max-time $(($1 + 30)) ${HOOKSHOT_CA:+--cacert "$HOOKSHOT_CA"} \
        ${HOOKSHOT_CERT:+--cert "$HOOKSHOT_CERT"} ${HOOKSHOT_CERT_KEY:+--key "$HOOKSHOT_CERT_KEY"} \
        -H 'Content-Type: application/json' -H 'Accept: application/json' -H "webhook-id: $message_id" \
        -H "webhook-timestamp: $now" -H "webhook-signature: v1,$signature" --data-binary @"$folder/body" \
        --output "$folder/answer" --dump-header "$folder/headers" --write-out '%{http_code}' \
        "$url$path?wait=$1" 2>"$folder/error") || failure=$?
    answer=$(tr -d '\000-\037\177' <"$folder/answer")
}

member() { # NAME: a text of the answer. Inside of a text a quote has a backslash before it, so nothing in there is found.
    printf '%s\n' "$answer" | sed -nE 's/^.*[{,] *"'"$1"'": *"(([^"\\]|\\.)*)".*$/\1/p' | sed 's/\\\(["\\/]\)/\1/g'
}

pause_asked() { # Retry-After, or 1
    seconds=$(tr -d '\r' <"$folder/headers" | sed -n 's/^[Rr]etry-[Aa]fter: *\([0-9]\{1,5\}\)$/\1/p' | tail -n 1)
    echo "${seconds:-1}"
}

judge() { # Sets verdict: 0 if the answer tells of a deployment, else an exit status; and why.
    why=$(member error)
    why="$url refused: ${why:-HTTP $code}$(request=$(member request_id); printf %s "${request:+ (request $request)}")"
    case $failure in
        0) ;;
        2 | 3 | 4) verdict=2 why=$(cat "$folder/error"); return ;;
        58 | 77) verdict=78 why=$(cat "$folder/error"); return ;;
        60) verdict=69 why="$(head -n 1 "$folder/error"); name its authority in HOOKSHOT_CA"; return ;;
        *)
            verdict=69 why="$url cannot be reached: $(head -n 1 "$folder/error")"
            # The server ends the handshake if it wants another client certificate.
            case $why in *alert*) verdict=77 ;; esac
            return
            ;;
    esac
    verdict=0
    [ -z "$(member deploy_id)" ] || return 0
    case $code,$(member code) in
        *,) verdict=69 why="$url answered $code, but not as a Hookshot server does" ;;
        401,* | 403,*) verdict=77 ;;
        408,* | 423,* | 429,* | 503,* | 507,*) verdict=75 ;;
        500,*) verdict=70 ;;
        *) verdict=65 ;;
    esac
}

is_passing() { # whether trying again may help
    case $verdict,$code,$failure in 69,*,60) return 1 ;; 69,* | 75,503,* | 75,429,* | 75,408,*) return 0 ;; esac
    return 1
}

ask_until() { # SECONDS_TO_WAIT: ask until there is an answer of weight, for as long as patience goes
    lost_at=$(date +%s)
    while :; do
        ask "$1"
        judge
        left=$((lost_at + patience - $(date +%s)))
        if ! is_passing || [ "$left" -le 0 ]; then return; fi
        pause=$(pause_asked)
        [ "$pause" -gt 0 ] || pause=1
        [ "$pause" -lt "$left" ] || pause=$left
        printf 'deploy.sh: %s; trying again in %s s\n' "$why" "$pause" >&2
        sleep "$pause"
    done
}

note() { # NAME VALUE
    [ -z "${HOOKSHOT_OUTPUT:-}" ] || printf '%s=%s\n' "$1" "$2" >>"$HOOKSHOT_OUTPUT"
}

show_log() { # SECONDS: the log as it comes, until the deployment ends
    {
        status=0
        if [ -n "$token" ]; then printf 'Authorization: Bearer %s\n' "$token"; fi |
            curl --silent --show-error --fail --no-buffer --connect-timeout 10 --max-time "$1" \
                ${HOOKSHOT_CA:+--cacert "$HOOKSHOT_CA"} ${HOOKSHOT_CERT:+--cert "$HOOKSHOT_CERT"} ${HOOKSHOT_CERT_KEY:+--key "$HOOKSHOT_CERT_KEY"} \
                -H @- "$url/logs/$deploy_id?follow=1" 2>"$folder/error" || status=$?
        echo "$status" >"$folder/status"
    } | while IFS= read -r line || [ -n "$line" ]; do
        # What commands print may be meant for a terminal.
        case $line in *[[:cntrl:]]*) line=$(printf %s "$line" | tr -d '\001-\010\013-\037\177') ;; esac
        printf '%s\n' "$line"
    done
    case $(cat "$folder/status") in
        0 | 28) ;;
        22)
            [ -n "$token" ] && why=$(head -n 1 "$folder/error") || why="that needs HOOKSHOT_READ_TOKEN"
            echo "deploy.sh: the log cannot be read from here ($why); waiting for the outcome" >&2
            ;;
        *) echo "deploy.sh: the log broke off; waiting for the outcome" >&2 ;;
    esac
}

is_ended() {
    case $1 in Succeeded | Failed | RolledBack | RollbackFailed | Cancelled) ;; *) return 1 ;; esac
}

# --- from the request to its end

ask_until 0
[ "$verdict" -eq 0 ] || fail "$verdict" "$why"
deploy_id=$(member deploy_id) status=$(member status)
case $deploy_id in *[!A-Za-z0-9._-]*) fail 69 "$url answered, but not as a Hookshot server does" ;; esac
echo "deploy.sh: $action of $service${target:+ to $target} is $deploy_id" >&2
note deploy_id "$deploy_id"
note log_url "$url/logs/$deploy_id"
if [ "$timeout" -eq 0 ]; then
    note status "$status"
    exit 0
fi

deadline=$(($(date +%s) + timeout))
show_log "$timeout"
while :; do
    left=$((deadline - $(date +%s)))
    # Shorter than the time after which proxies give up. Also at the end: then the outcome is asked for without waiting.
    wait=$((left < 20 ? left : 20))
    [ "$wait" -gt 0 ] || wait=0
    asked_at=$(date +%s)
    ask_until "$wait"
    if [ "$verdict" -ne 0 ]; then
        note status unknown
        fail 14 "$deploy_id was accepted and goes on, but its end is not known: $why"
    fi
    status=$(member status)
    if is_ended "$status"; then break; fi
    if [ "$left" -le 0 ]; then
        note status "$status"
        fail 14 "$deploy_id still runs after $timeout s"
    fi
    # An answer that comes too soon is answered by patience.
    [ $(($(date +%s) - asked_at)) -ge 1 ] || sleep 1
done
note status "$status"
image=$(member attempted_image) current=$(member current_image) error=$(member error)
[ -n "$image" ] || image=$(member image)
printf 'deploy.sh: %s %s: %s%s%s\n' "$service" "$image" "$status" "${current:+, back on $current}" "${error:+: $error}" >&2
case $status in Succeeded) exit 0 ;; Failed) exit 10 ;; RolledBack) exit 11 ;; RollbackFailed) exit 12 ;; *) exit 13 ;; esac
