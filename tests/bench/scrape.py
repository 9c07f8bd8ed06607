# SPDX-License-Identifier: MPL-2.0
"""Scrape time and size with 200 services and full histograms, under load; and what scrapes cost deployments. Aim: p99 under 20 ms."""

import contextlib
import gzip
import itertools
import json
import multiprocessing
import os
import sqlite3
import sys
import time
from collections.abc import Callable

from common import Link, announce, make_host, percentile, service, signed_request

import hookshot
from support import Host

SERVICES, COMMANDS, CLIENTS = 200, 5, 8
SCRAPES, SECONDS, TURNS = int(os.environ.get("BENCH_ROUNDS", "200")), float(os.environ.get("BENCH_SECONDS", "5")), 3
KINDS = {"text": ("text/plain", "identity"), "text, gzip": ("text/plain", "gzip"), "OpenMetrics": (hookshot.METRICS_TYPES[True], "identity"),
         "OpenMetrics, gzip": (hookshot.METRICS_TYPES[True], "gzip")}
# What a small answer from the same kind of thread takes at the same time.
FLOOR = "floor, GET /services/s0"


def scrape_request(kind: str) -> bytes:
    if kind == FLOOR:
        return b"GET /services/s0 HTTP/1.1\r\nHost: localhost\r\n\r\n"
    accept, coding = KINDS[kind]
    return f"GET /metrics HTTP/1.1\r\nHost: localhost\r\nAccept: {accept}\r\nAccept-Encoding: {coding}\r\n\r\n".encode()


def fill(host: Host) -> int:
    """Put observations into every bucket of every histogram of every service, as if they had been deployed for years; return the rows."""
    rows, phases = [], ("total", "queue", "deploy", "healthcheck", "rollback")
    for number in range(SERVICES):
        for phase in phases:
            rows += [("deployment_duration_seconds", [f"s{number}", phase], bucket) for bucket in range(10)]
        for phase, command in itertools.product(("deploy", "rollback"), range(COMMANDS)):
            rows += [("command_execution_duration_seconds", [f"s{number}", phase, f"step {command}"], bucket) for bucket in range(11)]
        rows.append(("healthcheck_failures_total", [f"s{number}"], 0))
    with contextlib.closing(sqlite3.connect(host.data / "state.db")) as db, db:
        db.executemany("INSERT OR REPLACE INTO tallies (metric, labels, bucket, number, total) VALUES (?, ?, ?, 12345, 6789.125)",
                       [(metric, json.dumps(labels), bucket) for metric, labels, bucket in rows])
    return len(rows)


def client(port: int, number: int, run: str, ready: "multiprocessing.Queue", over: "multiprocessing.Event", done: "multiprocessing.Queue") -> None:
    """Deploy one after the other, each time waiting for the end, until told; report how many a second."""
    link, count = Link(port), 0
    ready.put(number)
    started = time.monotonic()
    while not over.is_set():
        link.send(signed_request({"service": f"s{(number * 25 + count) % SERVICES}", "image": "app:1", "deploy_id": f"{run}-{number}-{count}"}, query="?wait=60"))
        status, body = link.receive()
        assert status == 200 and b'"Succeeded"' in body, (status, body)
        count += 1
    done.put(count / (time.monotonic() - started))


def under_load(port: int, run: str, work: Callable[[], None]) -> float:
    """Do something while the clients deploy; return the deployments a second."""
    ready, over, done = multiprocessing.Queue(), multiprocessing.Event(), multiprocessing.Queue()
    clients = [multiprocessing.Process(target=client, args=(port, number, run, ready, over, done)) for number in range(CLIENTS)]
    for process in clients:
        process.start()
    for _ in clients:
        ready.get()
    try:
        work()
    finally:
        over.set()
    rates = [done.get() for _ in clients]
    for process in clients:
        process.join()
    return sum(rates)


def measure(port: int, kind: str, found: list[float], sizes: list[int]) -> None:
    """Scrape again and again, with a pause between two as no scraper comes without; note ms and bytes."""
    link, request = Link(port), scrape_request(kind)
    for _ in range(SCRAPES):
        time.sleep(0.02)
        started = time.monotonic()
        link.send(request)
        status, body = link.receive()
        found.append((time.monotonic() - started) * 1000)
        sizes.append(len(body))
        assert status == 200 and (gzip.decompress(body) if "gzip" in kind else body).startswith(b"{" if kind == FLOOR else b"# ")


def every_second(port: int, interval_s: float | None) -> None:
    """Let the clients deploy for a while; scrape as Prometheus does at that interval, or not at all."""
    deadline, link, request = time.monotonic() + SECONDS, Link(port), scrape_request("OpenMetrics, gzip")
    while time.monotonic() < deadline:
        if interval_s:
            link.send(request)
            link.receive()
        time.sleep(min(interval_s or SECONDS, max(0.0, deadline - time.monotonic())))


def show(title: str, found: list[float], sizes: list[int]) -> None:
    print(f"  {title:36} {percentile(sizes, .5) / 1000:7.1f} kB   p50 {percentile(found, .5):6.2f} ms   p99 {percentile(found, .99):6.2f} ms", flush=True)


def main() -> None:
    announce(f"Scrapes of {SERVICES} services with {COMMANDS} commands each and full histograms, {SCRAPES} of each kind, {CLIENTS} clients deploying")
    commands = [f'{{ name = "step {number}", run = ["/bin/true"] }}' for number in range(COMMANDS)]
    host = make_host("".join(service(*commands, name=f"s{number}") for number in range(SERVICES)),
                     "[limits]\nmax_queue_per_service = 100\n[storage.retention]\nsuccessful_deploys = 10000\n")
    host.start()
    host.stop()
    rows = fill(host)
    started = time.monotonic()
    host.start()
    print(f"  {rows} tallies restored; the start took {time.monotonic() - started:.2f} s")
    try:
        for kind in (*KINDS, FLOOR):
            found, sizes = [], []
            measure(host.port, kind, found, sizes)
            show(f"idle: {kind}", found, sizes)
        for number, kind in enumerate((*KINDS, FLOOR)):
            found, sizes = [], []
            under_load(host.port, f"k{number}", lambda: measure(host.port, kind, found, sizes))
            show(f"under load: {kind}", found, sizes)
        rates: dict[str, list[float]] = {"none": [], "every second": []}
        for turn, name in itertools.product(range(TURNS), ("none", "every second")):
            rates[name].append(under_load(host.port, f"r{turn}{name[:2].strip()}", lambda: every_second(host.port, 1.0 if name == "every second" else None)))
    finally:
        host.close()
    without, scraped = (percentile(rates[name], .5) for name in ("none", "every second"))
    print(f"  deployments a second without scrapes {without:.1f}, with one every second {scraped:.1f}: {scraped / without:.1%} (medians of {TURNS} turns)")


if __name__ == "__main__":
    sys.exit(main())
