# SPDX-License-Identifier: MPL-2.0
"""Requests a second and p99 of refusals and health reports, beside adnanh/webhook; load from wrk, in turns."""

import contextlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import NamedTuple

from common import KEY, announce, make_host, service

from support import free_port, need, wait_until

ROUNDS = int(os.environ.get("BENCH_ROUNDS", "5"))
SECONDS = int(os.environ.get("BENCH_SECONDS", "2"))
BODY = json.dumps({"service": "web", "image": "app:1"})
POST = f"""
wrk.method = "POST"
wrk.body = '{BODY}'
wrk.headers["Content-Type"] = "application/json"
wrk.headers["X-Hub-Signature-256"] = "sha256={'0' * 64}"
"""


class Case(NamedTuple):
    """One kind of request: its path here, on a rate-limited server here, or at the peer; a POST has the script."""

    name: str
    path: str
    peer_path: str
    is_post: bool
    is_limited: bool = False


CASES = (
    Case("GET /health", "/health", "/", False),
    Case("POST, bad signature", "/deploy", "/hooks/deploy", True),
    # The peer has no rate limit: it refuses the same requests for their signature.
    Case("POST, rate limited", "/deploy", "/hooks/deploy", True, is_limited=True),
)
LOADS = (("keep-alive, 8", 8, False), ("keep-alive, 64", 64, False), ("one request each, 8", 8, True))


class Run(NamedTuple):
    """What wrk and the process table say of one run."""

    rate: float
    p99_ms: float
    cpu_us: float


@contextlib.contextmanager
def peer(folder: pathlib.Path) -> Iterator[tuple[int, int]]:
    """Give the port and the pid of a webhook server with one hook of the same key."""
    hooks = folder / "hooks.json"
    source = {"source": "header", "name": "X-Hub-Signature-256"}
    hooks.write_text(json.dumps([{"id": "deploy", "execute-command": "/bin/true", "trigger-rule": {"match": {
        "type": "payload-hmac-sha256", "secret": KEY, "parameter": source}}}]))
    port = free_port()
    process = subprocess.Popen([need("webhook"), "-hooks", str(hooks), "-ip", "127.0.0.1", "-port", str(port)],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: _answers(f"http://127.0.0.1:{port}/"))
        yield port, process.pid
    finally:
        process.kill()
        process.wait()


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except OSError as error:
        return isinstance(error, urllib.error.HTTPError)
    return True


def cpu_seconds(pid: int) -> float:
    """Return what a process has used so far, in user and system mode."""
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def load(port: int, pid: int, path: str, script: pathlib.Path | None, connections: int, closes: bool) -> Run:
    """Run wrk once."""
    command = [need("wrk"), "-t1", f"-c{connections}", f"-d{SECONDS}s", "--latency", *(["-s", str(script)] if script else []),
               *(["-H", "Connection: close"] if closes else []), f"http://127.0.0.1:{port}{path}"]
    before = cpu_seconds(pid)
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = cpu_seconds(pid) - before
    words = text.split()
    p99, requests = words[words.index("99%") + 1], int(words[words.index("requests") - 1])
    scale = {"us": 1e-3, "ms": 1, "s": 1e3}
    unit = next(unit for unit in scale if p99.endswith(unit))
    return Run(float(words[words.index("Requests/sec:") + 1]), float(p99.removesuffix(unit)) * scale[unit], used / requests * 1e6)


def median(runs: list[Run]) -> Run:
    return Run(*(statistics.median(values) for values in zip(*runs, strict=True)))


def main() -> None:
    announce(f"Requests a second, medians of {ROUNDS} runs of {SECONDS} s in turns; wrk with one thread on the same machine")
    hosts = [make_host(service(), f"[security]\nrate_limit = {limit}\n") for limit in (0, 1)]
    with tempfile.TemporaryDirectory() as folder, peer(pathlib.Path(folder)) as (peer_port, peer_pid):
        script = pathlib.Path(folder, "post.lua")
        script.write_text(POST)
        try:
            for host in hosts:
                host.start()
            for case in CASES:
                for name, connections, closes in LOADS:
                    host, ours, theirs = hosts[case.is_limited], [], []
                    assert host.process
                    for _ in range(ROUNDS):
                        used = script if case.is_post else None
                        theirs.append(load(peer_port, peer_pid, case.peer_path, used, connections, closes))
                        ours.append(load(host.port, host.process.pid, case.path, used, connections, closes))
                    show(case.name, name, median(ours), median(theirs), [a.rate / b.rate for a, b in zip(ours, theirs, strict=True)])
        finally:
            for host in hosts:
                host.close()


def show(case: str, load_name: str, ours: Run, theirs: Run, ratios: list[float]) -> None:
    print(f"  {case:20} {load_name:20} hookshot {ours.rate:7.0f}/s p99 {ours.p99_ms:6.2f} ms {ours.cpu_us:4.0f} us CPU   "
          f"webhook {theirs.rate:7.0f}/s p99 {theirs.p99_ms:6.2f} ms {theirs.cpu_us:4.0f} us CPU   "
          f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})", flush=True)


if __name__ == "__main__":
    sys.exit(main())
