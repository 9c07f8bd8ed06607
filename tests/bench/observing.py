# SPDX-License-Identifier: MPL-2.0
"""Cost of logging and metrics for one deployment, in microseconds of the server's processor time, beside the same run with both off.

What the database keeps of the counts, in transactions that are made anyway, stays in every run.
"""

import contextlib
import os
import pathlib
import random
import statistics
import sys
import tempfile
import time

from common import Link, announce, make_host, service, signed_request

from support import PROGRAM, Host, free_port, wait_until

DEPLOYMENTS, TURNS = 10, int(os.environ.get("BENCH_ROUNDS", "150"))
# Starts the server as it is, but tells neither the log nor the metrics of anything.
DRIVER = """
import sys
sys.path.insert(0, {folder!r})
import hookshot
hookshot.log_event = lambda log, event: None
hookshot.Metrics.observe = lambda metrics, event: None
hookshot.Metrics.add = lambda metrics, name, labels, amount, exemplar=None: None
sys.argv[0] = {program!r}
sys.exit(hookshot.main())
"""
BASE, CONTROL = "both off", "both off, once more"
VARIANTS = {BASE: "error", CONTROL: "error", "log at error, metrics": "error", "log at info, metrics": "info", "log at debug, metrics": "debug"}


def cpu_us(pid: int) -> float:
    """Return the microseconds that a process has run, threads that ended included; not its children, which are the commands."""
    # clock_getcpuclockid(3) for another process. /proc/PID/stat says the same, but in steps of 10 ms.
    return time.clock_gettime_ns(~pid << 3 | 2) / 1000


def deploy(link: Link, name: str, count: int) -> None:
    """Deploy one after the other, each time waiting for the end."""
    for number in range(count):
        link.send(signed_request({"service": "web", "image": "app:1", "deploy_id": f"{name}-{number}"}, query="?wait=60"))
        status, body = link.receive()
        assert status == 200 and b'"Succeeded"' in body, (status, body)


def measure(host: Host, name: str) -> float:
    """Return microseconds for one deployment."""
    link = Link(host.port)
    before = cpu_us(host.process.pid)
    deploy(link, name, DEPLOYMENTS)
    return (cpu_us(host.process.pid) - before) / DEPLOYMENTS


def start(host: Host, level: str, port: int, program: tuple[str, ...]) -> None:
    """Start a server whose log may be silent: it is ready when it says so over HTTP."""
    host.write(service('["/bin/true"]'), f'[server]\nlisten = "127.0.0.1:{port}"\n[limits]\nmax_queue_per_service = 100\n'
               f'[storage.retention]\nsuccessful_deploys = 10000\n[logging]\nlevel = "{level}"\nformat = "json"\n')
    host.start(wait=False, argv=program)
    host.port = port

    def is_ready() -> bool:
        with contextlib.suppress(OSError):
            return host.get("/ready").status == 200
        return False

    wait_until(is_ready)


def main() -> None:
    announce(f"Logging and metrics of a deployment with one command, {TURNS} turns of {DEPLOYMENTS} deployments each, the log in a file")
    found: dict[str, list[float]] = {name: [] for name in VARIANTS}
    hosts = {name: make_host("") for name in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        driver = pathlib.Path(folder, "driver.py")
        driver.write_text(DRIVER.format(folder=str(PROGRAM.parent), program=str(PROGRAM)))
        try:
            for name, level in VARIANTS.items():
                start(hosts[name], level, free_port(), (sys.executable, str(driver if name in (BASE, CONTROL) else PROGRAM)))
                deploy(Link(hosts[name].port), "warm", 50)
            for turn in range(TURNS):
                # Short turns in changing order: what else the machine does falls on all alike.
                for name in random.sample(list(VARIANTS), len(VARIANTS)):
                    found[name].append(measure(hosts[name], f"turn{turn}"))
            assert hosts[BASE].output.stat().st_size == 0 and b'"succeeded"} 0' in hosts[BASE].get("/metrics").body, "they are not off"
        finally:
            for host in hosts.values():
                host.close()
    medians = {name: statistics.median(values) for name, values in found.items()}
    for name, median in medians.items():
        more = statistics.median(value - base for value, base in zip(found[name], found[BASE]))
        print(f"  {name:24} {median:7.0f} us a deployment   {f'{more:+6.0f} us ({more / medians[BASE]:+.1%})' if name != BASE else ''}")


if __name__ == "__main__":
    sys.exit(main())
