# SPDX-License-Identifier: MPL-2.0
"""Time to accept a signed deploy, idle and while four other connections flood with bad signatures."""

import os
import pathlib
import subprocess
import sys
import tempfile
import time

from common import Link, announce, make_host, percentile, service, signed_request
from frontdoor import POST

from support import need

ROUNDS = int(os.environ.get("BENCH_ROUNDS", "500"))


def measure(port: int, name: str) -> list[float]:
    """Return the ms from sending a signed deploy to its 202."""
    found, link = [], Link(port)
    for number in range(ROUNDS):
        request = signed_request({"service": "web", "image": "app:1", "deploy_id": f"{name}-{number}"})
        started = time.monotonic_ns()
        link.send(request)
        assert link.receive()[0] == 202
        found.append((time.monotonic_ns() - started) / 1e6)
        time.sleep(0.02)
    return found


def main() -> None:
    announce(f"From sending a signed deploy to its 202 (on disk), {ROUNDS} rounds, 50 a second")
    host = make_host(service(), "[limits]\nmax_queue_per_service = 10000\n")
    host.start()
    try:
        idle = measure(host.port, "idle")
        with tempfile.TemporaryDirectory() as folder:
            script = pathlib.Path(folder, "post.lua")
            script.write_text(POST)
            flood = subprocess.Popen([need("wrk"), "-t1", "-c4", "-d600s", "-s", str(script), f"http://127.0.0.1:{host.port}/deploy"],
                                     stdout=subprocess.PIPE)
            try:
                time.sleep(0.5)
                flooded = measure(host.port, "flood")
            finally:
                flood.send_signal(2)
                text = flood.communicate()[0].decode()
    finally:
        host.close()
    for name, values in (("idle", idle), ("flooded", flooded)):
        print(f"  {name:8} p50 {percentile(values, .5):6.2f} ms   p99 {percentile(values, .99):6.2f} ms")
    print(f"  p99 under the flood: {percentile(flooded, .99) / percentile(idle, .5):.1f} times the idle p50; "
          f"the flood: {next(line.split()[1] for line in text.splitlines() if 'Requests/sec' in line)} requests a second")


if __name__ == "__main__":
    sys.exit(main())
