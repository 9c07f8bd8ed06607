# SPDX-License-Identifier: MPL-2.0
"""Notices: what they cost a deployment, and that each arrives although the receiver fails and the server is killed.

First: deployments a second without notices, and with a receiver that is well, dead (refuses) and hanging, in turns.
Then: deployments posted by clients that try again, while the receiver fails at random and the server is killed with
kill -9 and started again. Exit status 0 only if every promise holds. BENCH_DEPLOYMENTS, BENCH_KILLS, BENCH_SECONDS,
BENCH_SEED and BENCH_PATIENCE (seconds) change the size, BENCH_PROGRAM what is measured.
"""

import base64
import collections
import datetime
import hashlib
import hmac
import http.client
import itertools
import json
import multiprocessing
import os
import pathlib
import random
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from common import ROOT, Link, announce, make_host, percentile, service, signed_request

import hookshot
from receivers import HttpAnswer, Received, Receiver
from support import Host, wait_until

DEPLOYMENTS, KILLS = int(os.environ.get("BENCH_DEPLOYMENTS", "1000")), int(os.environ.get("BENCH_KILLS", "20"))
SECONDS, SEED = float(os.environ.get("BENCH_SECONDS", "8")), int(os.environ.get("BENCH_SEED", "1"))
PATIENCE_S = float(os.environ.get("BENCH_PATIENCE", "300"))
PROGRAM = pathlib.Path(os.environ.get("BENCH_PROGRAM", ROOT / "hookshot.py"))
CLIENTS, TURNS, POSTERS = 8, 3, 4
# The channel's time-out, and the longest that a server lives before it is killed: notices are sent all the while.
TIMEOUT_S, LIFE_S = 1, 1.5
NOTICE_KEY = b"a key for notices, 32 bytes long"

COMMON = """
[limits]
max_queue_per_service = 10000
[storage.retention]
successful_deploys = 10000
failed_deploys = 10000
"""
NOTIFICATIONS = """
[notifications]
enabled = true
retry_for = "1d"
[[notifications.channel]]
name = "bench"
type = "webhook"
url = "{url}/hook"
signing_key = "secret:notice_key"
events = ["started", "succeeded", "failed"]
timeout = {timeout}
allow_private = true
"""
# How the receiver fails, with weights; hanging goes on beyond the channel's time-out.
MIX: dict[HttpAnswer, int] = {204: 70, 500: 10, "reset": 7, "close": 7, "hang": 3, ("slow", 0.3, 204): 3}
FINAL_TYPES = {"Succeeded": "deployment.succeeded", "Failed": "deployment.failed"}
STARTED_TYPE = "deployment.started"


def make_server(url: str | None) -> Host:
    """Return a host whose notices go to `url` (None: there are none), with a copy of the program.

    A copy, for an edit meanwhile must not be taken for a crash.
    """
    # "fail": a deployment that a kill interrupts ends, instead of beginning a second time.
    host = make_host(service('["true"]', head='recovery = "fail"'),
                     COMMON + (NOTIFICATIONS.format(url=url, timeout=TIMEOUT_S) if url else ""))
    with host.secrets.open("a") as secrets:
        secrets.write(f"notice_key=whsec_{base64.b64encode(NOTICE_KEY).decode()}\n")
    shutil.copy(PROGRAM, host.folder / "hookshot.py")
    return host


def start(host: Host, *, wait: bool = True) -> None:
    host.start(wait=wait, argv=(sys.executable, str(host.folder / "hookshot.py")))


# --- what notices cost

class Turn(NamedTuple):
    """One run of all clients against one server."""

    count: int
    # From a request to its answer, which comes at the deployment's end.
    taken_s: list[float]
    # How long the server took to end after SIGTERM.
    stop_s: float
    # Notices that had come when the clients ended.
    notices: int


def client(port: int, number: int, turn: int, begin: Any, done: Any) -> None:
    """Deploy one after the other, each time waiting for the end; report how long each took."""
    link, taken_s = Link(port), []
    done.put("ready")
    begin.wait()
    deadline = time.monotonic() + SECONDS
    for deployment in itertools.count():
        request = signed_request({"service": "web", "image": "app:1", "deploy_id": f"t{turn}-c{number}-{deployment}"}, query="?wait=60")
        began_s = time.monotonic()
        link.send(request)
        status, body = link.receive()
        ended_s = time.monotonic()
        assert status == 200 and b'"Succeeded"' in body, (status, body)
        if ended_s >= deadline:
            break
        taken_s.append(ended_s - began_s)
    done.put(taken_s)


def play_turn(host: Host, turn: int, receiver: Receiver | None) -> Turn:
    """Start the server, let the clients deploy for SECONDS, and stop it."""
    start(host)
    begin, done = multiprocessing.Event(), multiprocessing.Queue()
    clients = [multiprocessing.Process(target=client, args=(host.port, number, turn, begin, done), daemon=True) for number in range(CLIENTS)]
    for process in clients:
        process.start()
    for _ in clients:
        done.get(timeout=60)
    before = len(receiver.requests) if receiver else 0
    begin.set()
    taken_s = [value for _ in clients for value in done.get(timeout=SECONDS + 120)]
    notices = len(receiver.requests) - before if receiver else 0
    for process in clients:
        process.join()
    began_s = time.monotonic()
    host.stop()
    return Turn(len(taken_s), taken_s, time.monotonic() - began_s, notices)


def measure_cost() -> list[str]:
    """Print deployments a second beside those without notices; return the promises that are broken."""
    with Receiver() as healthy, Receiver(itertools.repeat("hang")) as hanging:
        dead = Receiver()
        receivers: dict[str, Receiver | None] = {"no notices": None, "healthy receiver": healthy, "dead receiver": dead, "hanging receiver": hanging}
        hosts = {name: make_server(receiver and receiver.url) for name, receiver in receivers.items()}
        turns: dict[str, list[Turn]] = collections.defaultdict(list)
        try:
            for number, (name, host) in itertools.product(range(TURNS), hosts.items()):
                turns[name].append(play_turn(host, number, receivers[name]))
        finally:
            for host in hosts.values():
                host.close()
    rates, p99_s = {}, {}
    for name, played in turns.items():
        rates[name] = sum(turn.count for turn in played) / TURNS / SECONDS
        taken_s = [value for turn in played for value in turn.taken_s]
        p99_s[name] = percentile(taken_s, 0.99)
        turn_rates = [turn.count / SECONDS for turn in played]
        print(f"  {name:17} {rates[name]:4.0f}/s (turns {min(turn_rates):.0f}-{max(turn_rates):.0f}), "
              f"{rates[name] / rates['no notices']:.0%} of the rate without   request to end: "
              f"p50 {percentile(taken_s, 0.5) * 1000:.1f} ms, p99 {p99_s[name] * 1000:.1f} ms ({p99_s[name] / p99_s['no notices']:.2f}x), "
              f"max {max(taken_s) * 1000:.0f} ms   stop: {max(turn.stop_s for turn in played):.2f} s   "
              f"requests meanwhile: {sum(turn.notices for turn in played)} for {sum(turn.count for turn in played)} deployments", flush=True)
    # Wide bounds: a deployment that waits for a receiver waits for its time-out, which no noise of a machine resembles.
    return [f"a {name} delays deployments" for name in ("dead receiver", "hanging receiver")
            if rates[name] < rates["no notices"] / 2 or p99_s[name] > 2 * p99_s["no notices"] + TIMEOUT_S / 2]


# --- that they arrive

class Posters:
    """Clients that post each deployment until it is accepted, no more of them than allowed so far."""

    def __init__(self, host: Host):
        self.accepted: set[str] = set()
        # Answers that no client should get.
        self.refused: collections.Counter[str] = collections.Counter()
        self._host, self._numbers = host, iter(range(DEPLOYMENTS))
        self._allowed, self._changed = 0, threading.Condition()
        self._threads = [threading.Thread(target=self._run, args=(random.Random(f"{SEED} {index}"),), daemon=True) for index in range(POSTERS)]
        for thread in self._threads:
            thread.start()

    def allow(self, count: int) -> None:
        """Let so many deployments be posted in all."""
        with self._changed:
            self._allowed = count
            self._changed.notify_all()

    def join(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _take(self) -> int | None:
        """Return the number of the next deployment, once it is allowed; None after the last."""
        with self._changed:
            number = next(self._numbers, None)
            self._changed.wait_for(lambda: number is None or number < self._allowed)
            return number

    def _run(self, chance: random.Random) -> None:
        while (number := self._take()) is not None:
            deploy_id = f"d{number}"
            while not self._post(deploy_id):
                time.sleep(0.01 + chance.random() * 0.05)
            self.accepted.add(deploy_id)

    def _post(self, deploy_id: str) -> bool:
        try:
            answer = self._host.post({"deploy_id": deploy_id, "service": "web", "image": "app:1"})
        except (OSError, http.client.HTTPException):
            return False
        if answer.status not in (200, 202, 429, 503):
            self.refused[f"{answer.status} {answer.body[:200]!r}"] += 1
        return answer.status in (200, 202)


def choose_answers(chance: random.Random) -> Callable[[Received], HttpAnswer]:
    """Return what fails as MIX says."""
    answers, weights = list(MIX), list(MIX.values())
    return lambda _: chance.choices(answers, weights)[0]


def play_kills(host: Host, chance: random.Random) -> Posters:
    """Kill the server KILLS times while the clients post; return them when all is accepted and one last server runs."""
    posters = Posters(host)
    for number in range(KILLS):
        # Every fifth is killed while it starts, before it is known to be ready.
        is_early = number % 5 == 4
        start(host, wait=not is_early)
        if not is_early:
            posters.allow(DEPLOYMENTS * (number + 1) // (KILLS + 1))
        time.sleep(chance.random() * (0.3 if is_early else LIFE_S))
        host.kill()
    start(host)
    posters.allow(DEPLOYMENTS)
    posters.join()
    return posters


class Ended(NamedTuple):
    """A deployment as GET /deployments tells of it."""

    status: str
    has_started: bool
    completed_at_s: float


def history(host: Host) -> dict[str, Ended]:
    """Return every deployment, once all have ended."""
    # Not by /health, whose numbers may be ten seconds old.
    entries = wait_until(lambda: (found := list(itertools.chain(*pages(host)))) and all(entry["completed_at"] for entry in found) and found,
                         patience_s=PATIENCE_S)
    return {entry["deploy_id"]: Ended(entry["status"], bool(entry["started_at"]), datetime.datetime.fromisoformat(entry["completed_at"]).timestamp())
            for entry in entries}


def pages(host: Host) -> Iterator[list[dict[str, Any]]]:
    cursor = ""
    while cursor is not None:
        page = host.get(f"/deployments?limit=200{cursor and '&cursor=' + cursor}").json
        yield page["deployments"]
        cursor = page["next_cursor"]


class Notice(NamedTuple):
    """One request as the receiver saw it."""

    message_id: str
    deploy_id: str
    kind: str
    is_signed: bool
    at_s: float
    # When a 2xx had been sent; None if it was not.
    taken_s: float | None


def read_notice(received: Received) -> Notice:
    """Return what a request says; is_signed only if its signature is that of Standard Webhooks over id, time and body."""
    document, headers = json.loads(received.body), received.headers
    signed = f"{headers.get('webhook-id')}.{headers.get('webhook-timestamp')}.".encode() + received.body
    expected = "v1," + base64.b64encode(hmac.digest(NOTICE_KEY, signed, hashlib.sha256)).decode()
    is_signed = expected in headers.get("webhook-signature", "").split() and re.fullmatch("[0-9]{10}", headers["webhook-timestamp"]) is not None
    is_taken = received.status is not None and 200 <= received.status < 300
    return Notice(headers.get("webhook-id", ""), document["data"]["deploy_id"], document["type"], is_signed, received.at_s,
                  received.answered_s if is_taken else None)


def first_taken(notices: list[Notice]) -> dict[tuple[str, str], float]:
    """Return when each notice was answered with a 2xx for the first time, by deployment and type."""
    taken: dict[tuple[str, str], float] = {}
    for notice in notices:
        if notice.taken_s is not None:
            key = (notice.deploy_id, notice.kind)
            taken[key] = min(notice.taken_s, taken.get(key, notice.taken_s))
    return taken


def due(ended: dict[str, Ended]) -> tuple[set[tuple[str, str]], set[tuple[str, str]]]:
    """Return the final notices that must come, and those of the beginning, by deployment and type."""
    return ({(deploy_id, FINAL_TYPES.get(deployment.status, deployment.status)) for deploy_id, deployment in ended.items()},
            {(deploy_id, STARTED_TYPE) for deploy_id, deployment in ended.items() if deployment.has_started})


def wait_for_notices(receiver: Receiver, ended: dict[str, Ended]) -> None:
    """Return once every notice has been taken, or after PATIENCE_S; say how it goes."""
    final, started = due(ended)
    began_s = told_s = time.monotonic()
    while missing := (final | started) - first_taken([read_notice(received) for received in receiver.requests]).keys():
        now_s = time.monotonic()
        if now_s - began_s > PATIENCE_S:
            print(f"  patience is over after {PATIENCE_S:g} s", flush=True)
            return
        if now_s - told_s > 30:
            told_s = now_s
            print(f"  {now_s - began_s:.0f} s: {len(missing)} notices have not arrived yet", flush=True)
        time.sleep(0.25)


def judge(notices: list[Notice], ended: dict[str, Ended], accepted: set[str]) -> dict[str, int]:
    """Count what must not be."""
    taken, (final, _) = first_taken(notices), due(ended)
    ids, meanings = collections.defaultdict(set), collections.defaultdict(set)
    for notice in notices:
        ids[notice.deploy_id, notice.kind].add(notice.message_id)
        meanings[notice.message_id].add((notice.deploy_id, notice.kind))
    return {
        "not accepted": DEPLOYMENTS - len(accepted),
        "accepted, but unknown": len(accepted - ended.keys()),
        "not ended as succeeded or failed": sum(deployment.status not in FINAL_TYPES for deployment in ended.values()),
        "final notices not delivered": len(final - taken.keys()),
        "final notices that contradict the record": len({(notice.deploy_id, notice.kind) for notice in notices if notice.kind != STARTED_TYPE} - final),
        "notices with more than one webhook-id": sum(len(found) > 1 for found in ids.values()),
        "webhook-ids of more than one notice": sum(len(found) > 1 for found in meanings.values()),
        "requests without a good signature": sum(not notice.is_signed for notice in notices),
        "finals taken before their started": sum((deploy_id, STARTED_TYPE) in taken and taken[deploy_id, STARTED_TYPE] > taken[deploy_id, kind]
                                                 for deploy_id, kind in taken if kind != STARTED_TYPE)}


def report(notices: list[Notice], ended: dict[str, Ended], accepted: set[str]) -> None:
    """Print what came, and when."""
    taken, (final, started) = first_taken(notices), due(ended)
    again = sum(notice.at_s > taken.get((notice.deploy_id, notice.kind), notice.at_s) for notice in notices)
    sends = collections.Counter(notice.message_id for notice in notices)
    clock_s = time.time() - time.monotonic()
    lags_s = [at_s + clock_s - ended[deploy_id].completed_at_s for (deploy_id, kind), at_s in taken.items() if (deploy_id, kind) in final]
    ends = collections.Counter(deployment.status for deployment in ended.values())
    print(f"  accepted: {len(accepted)} of {DEPLOYMENTS}; ended: {len(ended)} ({', '.join(f'{count} {status}' for status, count in sorted(ends.items()))})")
    print(f"  delivered at least once: {len(final & taken.keys())} of {len(final)} final notices, {len(started & taken.keys())} of {len(started)} started")
    print(f"  requests in all: {len(notices)} for {len(sends)} webhook-ids, one of them {max(sends.values(), default=0)} times; "
          f"sent again after a 2xx: {again}")
    if lags_s:
        print(f"  from a deployment's end to its delivery: p50 {percentile(lags_s, 0.5):.2f} s, p99 {percentile(lags_s, 0.99):.2f} s, max {max(lags_s):.2f} s")


def measure_delivery() -> list[str]:
    """Play the kills and print what arrived; return the promises that are broken."""
    print(f"  {DEPLOYMENTS} deployments, {KILLS} kills, seed {SEED}; the receiver: "
          f"{', '.join(f'{weight} % ' + (' '.join(map(str, answer)) if isinstance(answer, tuple) else str(answer)) for answer, weight in MIX.items())}", flush=True)
    chance, began_s = random.Random(SEED), time.monotonic()
    with Receiver(choose_answers(random.Random(f"{SEED} answers"))) as receiver:
        host = make_server(receiver.url)
        try:
            posters = play_kills(host, chance)
            ended = history(host)
            print(f"  accepted and ended after {time.monotonic() - began_s:.0f} s", flush=True)
            wait_for_notices(receiver, ended)
            print(f"  judged after {time.monotonic() - began_s:.0f} s", flush=True)
        finally:
            host.close()
        notices = [read_notice(received) for received in receiver.requests]
    report(notices, ended, posters.accepted)
    found = judge(notices, ended, posters.accepted)
    for name, count in found.items():
        print(f"  {name}: {count}")
    for answer, count in posters.refused.items():
        print(f"  refused {count} times: {answer}")
    return [name for name, count in found.items() if count] + ["posts were refused"] * bool(posters.refused)


def main() -> int:
    announce(f"Notices: {CLIENTS} clients, one service, {TURNS} turns of {SECONDS:g} s each; the receiver runs on the same machine")
    broken = measure_cost() if SECONDS else []
    broken += measure_delivery() if DEPLOYMENTS else []
    for name in broken:
        print(f"  BROKEN: {name}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
