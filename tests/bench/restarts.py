# SPDX-License-Identifier: MPL-2.0
"""Restarts while clients post all the time: the sockets are held as systemd holds them. Then the same without, to compare.

Two clients come by a new connection for each deploy, one keeps its connection. A deploy is refused if it is answered with
anything but 200 or 202, or not at all; lost, if it was accepted and is unknown or has not succeeded in the end. The one that
keeps its connection may find it closed; it then sends the same deploy again, as RFC 9112, 9.3.1 lets a client do that knows
a repetition to be harmless. Exit status 0 only if nothing was refused or lost with the sockets held.
"""

import collections
import contextlib
import http.client
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable

from common import KEY, announce, make_host, percentile, service

import hookshot
from support import PATIENCE_S, Host, free_port
from test_systemd import launch

RESTARTS = int(os.environ.get("BENCH_ROUNDS", "50"))


class Client(threading.Thread):
    """Posts one deploy after the other and notes what became of each."""

    def __init__(self, name: str, port: int, *, keeps: bool):
        super().__init__(name=name)
        self._port, self._keeps, self._link = port, keeps, None
        self.over = threading.Event()
        self.accepted: set[str] = set()
        self.refused: collections.Counter[str] = collections.Counter()
        self.repeated, self.took_s = 0, []

    def run(self) -> None:
        number = 0
        while not self.over.is_set():
            number += 1
            began = time.monotonic()
            self._post(f"{self.name}-{number}")
            self.took_s.append(time.monotonic() - began)
            self.over.wait(0.002)

    def _post(self, deploy_id: str) -> None:
        was_kept = self._link is not None
        try:
            status = self._send(deploy_id)
            if status in (200, 202):
                self.accepted.add(deploy_id)
            else:
                self.refused[f"status {status}"] += 1
        except (OSError, http.client.HTTPException) as error:
            self._drop()
            if was_kept:
                self.repeated += 1
                self._post(deploy_id)
            else:
                self.refused[type(error).__name__] += 1

    def _send(self, deploy_id: str) -> int:
        body = json.dumps({"service": "web", "image": "app:1", "deploy_id": deploy_id}).encode()
        self._link = self._link or http.client.HTTPConnection("127.0.0.1", self._port, timeout=PATIENCE_S)
        self._link.request("POST", "/deploy", body, {"Content-Type": "application/json", "X-Hub-Signature-256": hookshot.sign(KEY.encode(), body)})
        answer = self._link.getresponse()
        answer.read()
        if not self._keeps or answer.will_close:
            self._drop()
        return answer.status

    def _drop(self) -> None:
        if self._link:
            self._link.close()
        self._link = None


def play(host: Host, port: int, start: Callable[[], object]) -> tuple[list[Client], list[float]]:
    """Restart while clients post; return the clients, and how long each restart took."""
    start()
    clients = [Client(name, port, keeps=name == "kept") for name in ("new-1", "new-2", "kept")]
    for client in clients:
        client.start()
    gaps = []
    for _ in range(RESTARTS):
        time.sleep(0.2)
        began = time.monotonic()
        host.stop()
        start()
        gaps.append(time.monotonic() - began)
    for client in clients:
        client.over.set()
        client.join()
    return clients, gaps


def count_lost(host: Host, accepted: set[str]) -> int:
    """Return how many accepted deployments did not come to their end."""
    for deploy_id in sorted(accepted)[-20:]:
        host.wait(deploy_id)
    while host.get("/health").json["deployment_queue"]["pending"]:
        time.sleep(0.2)
    states = {deploy_id: host.get(f"/status/{deploy_id}") for deploy_id in accepted}
    return sum(answer.status != 200 or answer.json["status"] != "Succeeded" for answer in states.values())


def measure(title: str, *, is_held: bool) -> bool:
    host = make_host(service(), "[storage.retention]\nsuccessful_deploys = 10000\n[limits]\nmax_queue_per_service = 10000\n[monitoring]\nstatus_cache_seconds = 0\n")
    with contextlib.closing(host), socket.socket() as link:
        link.bind(("127.0.0.1", 0 if is_held else free_port()))
        port = link.getsockname()[1]
        if is_held:
            link.listen(1024)
        else:
            link.close()
        held = launch([link], "hookshot.socket") if is_held else {}
        clients, gaps = play(host, port, lambda: host.start(*() if is_held else ("--port", str(port)), **held))
        accepted = set().union(*(client.accepted for client in clients))
        refused = sum((client.refused for client in clients), collections.Counter())
        lost = count_lost(host, accepted)
    slowest = [took for client in clients for took in client.took_s]
    print(f"  {title}: {RESTARTS} restarts of {percentile(gaps, 0.5) * 1000:.0f} ms (median) to {max(gaps) * 1000:.0f} ms, {len(accepted)} accepted\n"
          f"    refused {sum(refused.values())} {dict(refused) or ''}, lost {lost}; found a kept connection closed and sent again: "
          f"{sum(client.repeated for client in clients)}\n"
          f"    from request to answer: median {percentile(slowest, 0.5) * 1000:.1f} ms, slowest {max(slowest) * 1000:.0f} ms", flush=True)
    return not refused and not lost


def main() -> int:
    announce("restarts under socket activation, with clients that post all the time")
    is_well = measure("sockets held", is_held=True)
    measure("sockets of its own", is_held=False)
    return 0 if is_well else 1


if __name__ == "__main__":
    sys.exit(main())
