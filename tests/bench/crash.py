# SPDX-License-Identifier: MPL-2.0
"""Rounds of: start, fire signed deploys for several services, kill -9 at a random instant, start again.

Then every deployment that was acknowledged must be known and ended, none may have overlapped another of its service,
none may have run again after it succeeded, and the database must be whole. Exit status 0 only if all of it holds.
"""

import collections
import contextlib
import http.client
import os
import pathlib
import random
import shutil
import signal
import sqlite3
import sys
import threading
import time

from common import ROOT, announce, make_host

import hookshot
from support import Host, wait_until

ROUNDS, SEED = int(os.environ.get("BENCH_ROUNDS", "200")), int(os.environ.get("BENCH_SEED", "1"))
# Each policy of recovery, and one service whose commands ignore SIGTERM.
POLICIES = {"rollback": "rollback", "fail": "fail", "retry": "retry", "stubborn": "rollback"}

# Tells of each run of a command: service, deployment, phase, what happened, when. "overlap" if the process of an
# earlier run still lives, whoever started it.
SCRIPT = """
[ "$HOOKSHOT_SERVICE" = stubborn ] && trap '' TERM
say() { echo "$HOOKSHOT_SERVICE $HOOKSHOT_DEPLOY_ID $1 $2 $(date +%s%3N)" >> journal; }
last=$(cat "$HOOKSHOT_SERVICE.pid" 2>/dev/null)
if [ -n "$last" ] && [ -d "/proc/$last" ] && grep -qz "^HOOKSHOT_SERVICE=$HOOKSHOT_SERVICE$" "/proc/$last/environ" 2>/dev/null \\
   && [ "$(cut -d' ' -f3 "/proc/$last/stat")" != Z ]; then say "$1" overlap; fi
echo $$ > "$HOOKSHOT_SERVICE.pid"
say "$1" begin
sleep "0.0$(($$ % 10))"
say "$1" end
: > "$HOOKSHOT_SERVICE.pid"
"""

SERVICE = """
[[service]]
name = "{name}"
working_dir = "@"
recovery = "{policy}"
[service.security]
allowed_image_pattern = 'app:[0-9]+'
[service.deploy]
commands = [["sh", "work.sh", "deploy"], ["sh", "work.sh", "deploy2"]]
[service.rollback]
commands = [["sh", "work.sh", "rollback"]]
"""


def fire(host: Host, round_number: int, acknowledged: set[str], stop: threading.Event, chance: random.Random) -> None:
    """Deploy until told to stop; note every id that a 2xx answered for."""
    for number in range(1000):
        if stop.is_set():
            return
        deploy_id, service = f"r{round_number}-{threading.current_thread().name}-{number}", chance.choice(list(POLICIES))
        with contextlib.suppress(OSError, http.client.HTTPException):
            answer = host.post({"deploy_id": deploy_id, "service": service, "image": f"app:{chance.randint(1, 9)}"})
            if answer.status < 300:
                acknowledged.add(deploy_id)
        stop.wait(chance.random() * 0.02)


def start(host: Host) -> None:
    """Start the copy that main() made: an edit of hookshot.py meanwhile must not be taken for a crash."""
    host.start(argv=(sys.executable, str(host.folder / "hookshot.py")))


def play(host: Host, chance: random.Random) -> set[str]:
    """Play every round and return what was acknowledged."""
    acknowledged: set[str] = set()
    for number in range(ROUNDS):
        start(host)
        stop = threading.Event()
        clients = [threading.Thread(target=fire, args=(host, number, acknowledged, stop, random.Random(chance.random())), name=f"c{index}")
                   for index in range(3)]
        for client in clients:
            client.start()
        time.sleep(chance.random() * 0.4)
        host.stop(signal.SIGKILL)
        stop.set()
        for client in clients:
            client.join()
        if (number + 1) % 50 == 0:
            print(f"  {number + 1} rounds, {len(acknowledged)} acknowledged", flush=True)
    return acknowledged


def settle(host: Host) -> dict[str, str]:
    """Let one last server finish everything, stop it, and return the states by id."""
    start(host)
    wait_until(lambda: host.get("/health").json["deployment_queue"] | {"workers": 0} == {"pending": 0, "active": 0, "workers": 0},
               patience_s=600)
    host.stop()
    with contextlib.closing(sqlite3.connect(host.data / "state.db")) as db:
        assert db.execute("PRAGMA integrity_check").fetchone()[0] == "ok", "integrity_check"
        return {row[0]: (row[1], row[2]) for row in db.execute("SELECT deploy_id, state, completed_ms FROM deployments")}


def judge(journal: pathlib.Path, states: dict[str, tuple[str, int]], acknowledged: set[str]) -> dict[str, int]:
    """Count what must not be."""
    lines = [line.split() for line in journal.read_text().splitlines()]
    begins = collections.Counter((deploy_id, phase) for service, deploy_id, phase, what, _ in lines if what == "begin" and service != "retry")
    late = sum(what == "begin" and phase != "rollback" and states[deploy_id][0] == "Succeeded" and int(at) > states[deploy_id][1]
               for _, deploy_id, phase, what, at in lines)
    return {
        "acknowledged, but unknown": len(acknowledged - states.keys()),
        "not ended": sum(state not in hookshot.TERMINAL for state, _ in states.values()),
        "overlapped": sum(what == "overlap" for *_, what, _ in lines),
        "deploy commands run twice (recovery is not retry)": sum(count > 1 for (_, phase), count in begins.items() if phase != "rollback"),
        "commands begun after success": late}


def main() -> int:
    announce(f"kill -9 at a random instant, {ROUNDS} rounds, seed {SEED}")
    host = make_host("".join(SERVICE.format(name=name, policy=policy) for name, policy in POLICIES.items()),
                     "[storage.retention]\nsuccessful_deploys = 10000\nfailed_deploys = 10000\n")
    (host.folder / "work.sh").write_text(SCRIPT)
    shutil.copy(ROOT / "hookshot.py", host.folder)
    started = time.monotonic()
    try:
        acknowledged = play(host, random.Random(SEED))
        states = settle(host)
        found = judge(host.folder / "journal", states, acknowledged)
    finally:
        host.close()
    ends = collections.Counter(state for state, _ in states.values())
    print(f"  {len(acknowledged)} acknowledged, {len(states)} known: {', '.join(f'{count} {state}' for state, count in sorted(ends.items()))}; "
          f"{time.monotonic() - started:.0f} s; integrity_check ok")
    for name, count in found.items():
        print(f"  {name}: {count}")
    return 1 if any(found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
