# SPDX-License-Identifier: MPL-2.0
"""Readers of GET /events: what 200 that read, and 200 that never read, cost deployments, memory and GET /ready. In turns."""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import selectors
import socket
import statistics
import sys
import threading
import time

from common import Link, announce, make_host, percentile, service
from memory import resident_mb
from throughput import CLIENTS, SECONDS, deployments

READERS, ROUNDS = 200, int(os.environ.get("BENCH_ROUNDS", "3"))
CONFIG = """
[server]
max_connections = 4000
[limits]
max_queue_per_service = 100
[storage.retention]
successful_deploys = 10000
"""
KINDS = ("none", "reading", "silent")


def connect(port: int, number: int, *, is_reading: bool) -> socket.socket:
    """Return the connection of a reader, from one of ten addresses; one that will not read buffers little."""
    link = socket.socket()
    if not is_reading:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    link.bind((f"127.0.0.{10 + number % 10}", 0))
    link.connect(("127.0.0.1", port))
    link.sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
    while b"retry: 2000" not in link.recv(1 << 16):
        pass
    return link


def read(port: int, control: "multiprocessing.connection.Connection", *, is_reading: bool) -> None:
    """Be 200 readers until told to end; report how many bytes came to them, and to how many they still came at the end."""
    links = [connect(port, number, is_reading=is_reading) for number in range(READERS)]
    control.send("ready")
    selector, count = selectors.DefaultSelector(), 0
    selector.register(control, selectors.EVENT_READ)
    for link in links if is_reading else ():
        link.setblocking(False)
        selector.register(link, selectors.EVENT_READ)
    is_over = False
    while not is_over:
        for key, _ in selector.select():
            if key.fileobj is control:
                is_over = True
            elif block := key.fileobj.recv(1 << 16):
                count += len(block)
            else:
                selector.unregister(key.fileobj)
    control.send((count, len(selector.get_map()) - 1))


@contextlib.contextmanager
def readers(port: int, kind: str):
    """Have readers of a kind meanwhile."""
    if kind == "none":
        yield
        return
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.Process(target=read, args=(port, theirs), kwargs={"is_reading": kind == "reading"})
    process.start()
    ours.recv()
    try:
        yield
    finally:
        ours.send("end")
        count, left = ours.recv()
        process.join()
        if kind == "reading":
            print(f"    {count / READERS / 1e6:.2f} MB came to each reader; {left} of {READERS} were still followed", flush=True)


class Probe:
    """Asks GET /ready every 10 ms, in a thread."""

    def __init__(self, port: int):
        self.times_ms: list[float] = []
        self._link, self._over = Link(port), threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Probe":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(0.01):
            began = time.perf_counter()
            self._link.send(b"GET /ready HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert self._link.receive()[0] == 200
            self.times_ms.append((time.perf_counter() - began) * 1000)


def main() -> None:
    announce(f"{READERS} readers of GET /events; {CLIENTS} clients deploy /bin/true, {SECONDS:g} s each, {ROUNDS} rounds")
    host = make_host(service('["/bin/true"]', name="s0"), CONFIG).start()
    rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
    grown: dict[str, list[float]] = {kind: [] for kind in KINDS}
    times_ms: dict[str, list[float]] = {kind: [] for kind in KINDS}
    try:
        deployments(host.port, 1, first=999 * CLIENTS)
        for turn in range(ROUNDS * len(KINDS)):
            kind, before = KINDS[turn % len(KINDS)], resident_mb(host.process.pid)
            with readers(host.port, kind):
                connected = resident_mb(host.process.pid)
                with Probe(host.port) as probe:
                    rates[kind].append(deployments(host.port, 1, first=turn * CLIENTS))
                after = resident_mb(host.process.pid)
            times_ms[kind] += probe.times_ms
            grown[kind].append(after - before)
            print(f"  {kind:8} {rates[kind][-1]:6.0f}/s   memory {before:.1f} MB, {connected:.1f} with readers, {after:.1f} at the end", flush=True)
    finally:
        host.close()
    for kind in KINDS:
        ratio = statistics.median(mine / none for mine, none in zip(rates[kind], rates["none"]))
        print(f"  {kind:8} {statistics.median(rates[kind]):6.0f}/s   {ratio:.2f} of none   memory {statistics.median(grown[kind]):+.1f} MB   "
              f"GET /ready p50 {percentile(times_ms[kind], 0.5):.1f} ms, p99 {percentile(times_ms[kind], 0.99):.1f} ms, max {max(times_ms[kind]):.1f} ms")


if __name__ == "__main__":
    sys.exit(main())
