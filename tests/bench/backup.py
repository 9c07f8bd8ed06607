# SPDX-License-Identifier: MPL-2.0
"""Backup of a database with 100,000 deployments while deploys run: seconds, peak memory of the exporter, slowest acceptance meanwhile.

Then the import of it: seconds, peak memory. BENCH_DEPLOYMENTS chooses another number.
"""

import contextlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time

from common import ROOT, Link, announce, make_host, percentile, service, signed_request

import hookshot
from support import Host

DEPLOYMENTS = int(os.environ.get("BENCH_DEPLOYMENTS", "100000"))
SERVICES, OUTPUT = 10, "a line of output of a command, as commands write them, with a number: "
KEEP = "[storage.retention]\nsuccessful_deploys = 10000\nfailed_deploys = 10000\n[limits]\nmax_queue_per_service = 1000\n"
AT_MS = 1_790_000_000_000


def fill(host: Host, number: int) -> None:
    """Write deployments with four moves, two commands and a log each, as the server would have."""
    host.data.mkdir(mode=0o700)
    store = hookshot.Store(str(host.data))
    store.close()
    (host.data / "logs").mkdir(mode=0o700)
    trigger = json.dumps(["192.0.2.7", "hmac_key", "curl/8", "req-1"])
    with contextlib.closing(sqlite3.connect(host.data / "state.db")) as db, db:
        db.executemany(
            "INSERT INTO deployments (seq, deploy_id, service, state, image, metadata, env, trigger, digest, queued_ms, started_ms, completed_ms, duration_ms) "
            "VALUES (?, ?, ?, 'Succeeded', ?, '{}', '{}', ?, ?, ?, ?, ?, 5000)",
            ((seq, f"deployment-{seq}", f"s{seq % SERVICES}", f"app:{seq}", trigger, f"{seq:064x}", AT_MS + seq, AT_MS + seq, AT_MS + seq + 5000)
             for seq in range(1, number + 1)))
        states = (None, "Queued", "Validating", "Deploying", "Succeeded")
        db.executemany("INSERT INTO moves (seq, previous, state, at_ms, reason) VALUES (?, ?, ?, ?, 'every command succeeded')",
                       ((seq, states[n], states[n + 1], AT_MS + seq + n) for seq in range(1, number + 1) for n in range(4)))
        db.executemany("INSERT INTO commands VALUES (?, ?, 'deploy', ?, 'pull', 'podman pull app', 1, 'ok', 0, NULL, ?, 2000, ?, '', '', 1)",
                       ((seq, n, n, AT_MS + seq, "".join(f"{OUTPUT}{seq * n + line}\n" for line in range(10))) for seq in range(1, number + 1) for n in (1, 2)))
    for seq in range(1, number + 1):
        (host.data / f"logs/{seq}.log").write_text("".join(f"2026-09-21T13:26:40.000Z deploy out {OUTPUT}{seq}-{line}\n" for line in range(20)))


def run(host: Host, *command: str) -> tuple[float, float]:
    """Run a command and return its seconds and its peak memory in MB."""
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, str(ROOT / "hookshot.py"), "-c", str(host.config), "-s", str(host.services), *command], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = status
    assert status == 0, command
    return time.monotonic() - started, usage.ru_maxrss / 1024


class Deployer(threading.Thread):
    """Deploys one after the other and notes how long each acceptance took."""

    def __init__(self, host: Host, name: str):
        super().__init__(name=name)
        self._link, self._ended, self._service = Link(host.port), threading.Event(), name
        self.seconds: list[float] = []
        self.refused = 0
        self.start()

    def run(self) -> None:
        number = 0
        while not self._ended.wait(0.01):
            number += 1
            request = signed_request({"service": self._service, "image": f"app:{number}"})
            started = time.monotonic()
            self._link.send(request)
            status, _ = self._link.receive()
            self.seconds.append(time.monotonic() - started)
            self.refused += status != 202

    def end(self) -> str:
        self._ended.set()
        self.join()
        assert not self.refused, self.refused
        return f"{len(self.seconds)} deploys accepted, median {percentile(self.seconds, .5) * 1e3:.1f} ms, 99 % in {percentile(self.seconds, .99) * 1e3:.1f} ms, " \
               f"slowest {max(self.seconds) * 1e3:.0f} ms"


def measure(number: int) -> None:
    """Print the figures of one database."""
    host = make_host("".join(service(name=f"s{index}") for index in range(SERVICES)), KEEP)
    try:
        fill(host, number)
        database = (host.data / "state.db").stat().st_size
        logs = sum(path.stat().st_size for path in (host.data / "logs").iterdir())
        print(f"  {number} deployments: database {database >> 20} MB, logs {logs >> 20} MB", flush=True)
        host.start()
        deployer = Deployer(host, "s1")
        time.sleep(5)
        print(f"    nothing else            {deployer.end()}", flush=True)
        for flags in (("--no-logs",), ()):
            deployer = Deployer(host, "s1")
            target = host.folder / "backup.tar.gz"
            seconds, memory = run(host, "export", *flags, str(target))
            print(f"    export {' '.join(flags):12} {seconds:5.1f} s, {memory:.0f} MB of memory, archive {target.stat().st_size >> 20} MB\n"
                  f"            meanwhile       {deployer.end()}", flush=True)
        host.stop()
        for flags in (("--dry-run",), ("--force",)):
            seconds, memory = run(host, "import", *flags, str(target))
            print(f"    import {' '.join(flags):12} {seconds:5.1f} s, {memory:.0f} MB of memory", flush=True)
    finally:
        host.close()
        shutil.rmtree(host.data, ignore_errors=True)


def main() -> None:
    announce("Backup while deploys run, and its import")
    for number in (DEPLOYMENTS // 10, DEPLOYMENTS):
        measure(number)


if __name__ == "__main__":
    sys.exit(main())
