# SPDX-License-Identifier: MPL-2.0
"""Cost of the audit: processor time and deployments a second beside the same server without it; a refusal; checking 100,000 rows."""

import ipaddress
import os
import pathlib
import random
import statistics
import sys
import tempfile
import time

from common import Link, announce, make_host
from observing import cpu_us, deploy, start

import hookshot
from support import PROGRAM, free_port

DEPLOYMENTS, TURNS, ROWS = 25, int(os.environ.get("BENCH_ROUNDS", "60")), 100_000
# Starts the server as it is, but writes no row of the audit and no use of a key with an acceptance.
DRIVER = """
import sys
sys.path.insert(0, {folder!r})
import hookshot
hookshot.Store._audit = classmethod(lambda cls, db, row: None)
sys.argv[0] = {program!r}
sys.exit(hookshot.main())
"""
BASE = "without"
VARIANTS = (BASE, "without, once more", "with the audit")


def compare() -> None:
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in VARIANTS}
    hosts = {name: make_host("") for name in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        driver = pathlib.Path(folder, "driver.py")
        driver.write_text(DRIVER.format(folder=str(PROGRAM.parent), program=str(PROGRAM)))
        try:
            for name in VARIANTS:
                start(hosts[name], "error", free_port(), (sys.executable, str(PROGRAM if name == VARIANTS[-1] else driver)))
                deploy(Link(hosts[name].port), "warm", 50)
            for turn in range(TURNS):
                for name in random.sample(VARIANTS, len(VARIANTS)):
                    link, pid = Link(hosts[name].port), hosts[name].process.pid
                    before, began = cpu_us(pid), time.monotonic()
                    deploy(link, f"turn{turn}", DEPLOYMENTS)
                    found[name].append(((cpu_us(pid) - before) / DEPLOYMENTS, DEPLOYMENTS / (time.monotonic() - began)))
        finally:
            for host in hosts.values():
                host.close()
    for name, values in found.items():
        more = statistics.median(value[0] - base[0] for value, base in zip(values, found[BASE]))
        faster = statistics.median(value[1] / base[1] for value, base in zip(values, found[BASE]))
        print(f"  {name:20} {statistics.median(value[0] for value in values):6.0f} us of processor time a deployment ({more:+4.0f})   "
              f"{statistics.median(value[1] for value in values):6.1f} deployments/s ({faster - 1:+.1%})")


def chain() -> None:
    row = hookshot.AuditRow(hookshot.now_ms(), "deploy", "accepted", "1a8dd2cc00000c8c", "203.0.113.17", "hmac_key", "web", "20261125-035530-aeb6cec4", "registry.example/app:1.0")
    with tempfile.TemporaryDirectory() as folder:
        store = hookshot.Store(folder)
        for first in range(0, ROWS, 1000):
            store.record_audit([row._replace(request_id=f"1a8dd2cc{number:08x}") for number in range(first, first + 1000)], [])
        journal, address = hookshot.Journal(store, lambda event: None), ipaddress.ip_address("203.0.113.17")
        began = time.perf_counter()
        for _ in range(ROWS):
            journal.admits("AUTHENTICATION_ERROR", address, is_known=False)
        print(f"  counting a refusal {(time.perf_counter() - began) / ROWS * 1e6:.1f} us")
        store.close()
        path, began = os.path.join(folder, "state.db"), time.perf_counter()
        assert hookshot.verify_audit(path).rows == ROWS
        print(f"  checking {ROWS} rows {time.perf_counter() - began:.2f} s; on disk {os.stat(path).st_size / ROWS:.0f} bytes a row, its index included")


def main() -> None:
    announce(f"The audit: {TURNS} turns of {DEPLOYMENTS} deployments with one command, one after the other")
    compare()
    chain()


if __name__ == "__main__":
    sys.exit(main())
