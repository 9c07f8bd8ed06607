# SPDX-License-Identifier: MPL-2.0
"""Time to accept a signed deploy: idle, while four connections flood with bad signatures, and beside 500 that one address holds."""

import contextlib
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator

from common import Link, announce, make_host, percentile, service, signed_request
from frontdoor import POST

from support import need

ROUNDS = int(os.environ.get("BENCH_ROUNDS", "500"))
HELD = 500
# What the holders have said: nothing, half a request line, half a head, half a body; every second one goes on byte by byte.
STARTS = (b"", b"GET /re", b"GET /ready HTTP/1.1\r\nHost: x\r\n",
          b"POST /deploy HTTP/1.1\r\nHost: x\r\nX-Hub-Signature-256: sha256=00\r\nContent-Length: 1000\r\n\r\n{")


def measure(port: int, name: str, *, is_fresh: bool = False) -> list[float]:
    """Return the ms from sending a signed deploy to its 202; `is_fresh`: each on a connection of its own, connecting included."""
    found, link = [], Link(port)
    for number in range(ROUNDS):
        request = signed_request({"service": "web", "image": "app:1", "deploy_id": f"{name}-{number}"})
        started = time.monotonic_ns()
        if is_fresh:
            link = Link(port)
        link.send(request)
        assert link.receive()[0] == 202
        found.append((time.monotonic_ns() - started) / 1e6)
        time.sleep(0.02)
    return found


@contextlib.contextmanager
def flood(port: int) -> Iterator[None]:
    """Send bad signatures over four connections, as many as they get answered."""
    with tempfile.TemporaryDirectory() as folder:
        script = pathlib.Path(folder, "post.lua")
        script.write_text(POST)
        wrk = subprocess.Popen([need("wrk"), "-t1", "-c4", "-d600s", "-s", str(script), f"http://127.0.0.1:{port}/deploy"], stdout=subprocess.PIPE)
        try:
            time.sleep(0.5)
            yield
        finally:
            wrk.send_signal(2)
            text = wrk.communicate()[0].decode()
    print(f"  the flood: {next(line.split()[1] for line in text.splitlines() if 'Requests/sec' in line)} requests a second")


@contextlib.contextmanager
def crowd(port: int) -> Iterator[None]:
    """Open 500 connections from one address; half of them drip a byte ten times a second, and come again when they are cut off."""
    over = threading.Event()

    def hold() -> None:
        links: list[Link | None] = [None] * HELD
        while not over.wait(0.1):
            for index, link in enumerate(links):
                start = STARTS[index % len(STARTS)]
                try:
                    if link is None:
                        links[index] = link = Link(port, source="127.0.0.2")
                        link.send(start)
                    elif index % 2 and start:
                        link.send(b"x")
                except OSError:
                    links[index] = None

    thread = threading.Thread(target=hold, name="crowd")
    thread.start()
    try:
        time.sleep(1)
        yield
    finally:
        over.set()
        thread.join()


def main() -> None:
    announce(f"From sending a signed deploy to its 202 (on disk), {ROUNDS} rounds, 50 a second")
    host = make_host(service(), "[limits]\nmax_queue_per_service = 10000\n")
    host.start()
    try:
        found = {"idle": measure(host.port, "idle")}
        with flood(host.port):
            found["flooded"] = measure(host.port, "flood")
        found["idle, new connections"] = measure(host.port, "fresh", is_fresh=True)
        with crowd(host.port):
            found[f"beside {HELD} held, new connections"] = measure(host.port, "crowd", is_fresh=True)
    finally:
        host.close()
    for name, values in found.items():
        print(f"  {name:34} p50 {percentile(values, .5):6.2f} ms   p99 {percentile(values, .99):6.2f} ms   slowest {max(values):6.2f} ms")
    print(f"  p99 under the flood: {percentile(found['flooded'], .99) / percentile(found['idle'], .5):.1f} times the idle p50")


if __name__ == "__main__":
    sys.exit(main())
