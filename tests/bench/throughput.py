# SPDX-License-Identifier: MPL-2.0
"""Deployments a second, durable, one command /bin/true: one service and ten, 8 clients, beside bare fork+exec+wait."""

import multiprocessing
import os
import subprocess
import sys
import time

from common import Link, announce, make_host, service, signed_request

CLIENTS, SECONDS = 8, float(os.environ.get("BENCH_SECONDS", "8"))


# In a process of its own with nothing imported: fork copies page tables, so the size of the process is part of its price.
FORK = "pid = os.fork()\n    if not pid: os.execv('/bin/true', ['true'])\n    os.waitpid(pid, 0)"
SPAWN = "os.waitpid(os.posix_spawn('/bin/true', ['true'], {}), 0)"
LOOP = "import os, time\ncount, deadline = 0, time.monotonic() + 2\nwhile time.monotonic() < deadline:\n    {}\n    count += 1\nprint(count / 2)"


def floor_of(step: str) -> float:
    """Return runs of /bin/true a second in a bare loop."""
    return float(subprocess.run([sys.executable, "-S", "-c", LOOP.format(step)], capture_output=True, check=True).stdout)


def client(port: int, number: int, services: int, start: "multiprocessing.Event", done: "multiprocessing.Queue") -> None:
    """Deploy one after the other, each time waiting for the end; report how many succeeded, and until when."""
    requests = [signed_request({"service": f"s{(number + turn) % services}", "image": "app:1", "deploy_id": f"c{number}-{services}-{turn}"},
                               query="?wait=60") for turn in range(int(400 * SECONDS))]
    link = Link(port)
    done.put("ready")
    start.wait()
    count, deadline = 0, time.monotonic() + SECONDS
    for request in requests:
        link.send(request)
        status, body = link.receive()
        assert status == 200 and b'"Succeeded"' in body, (status, body)
        if time.monotonic() >= deadline:
            break
        count += 1
    done.put(count)


def deployments(port: int, services: int, *, first: int = 0) -> float:
    """Return deployments finished a second; clients are numbered from `first` on, and name their deployments by that."""
    start, done = multiprocessing.Event(), multiprocessing.Queue()
    clients = [multiprocessing.Process(target=client, args=(port, first + number, services, start, done)) for number in range(CLIENTS)]
    for process in clients:
        process.start()
    for _ in clients:
        done.get()
    start.set()
    counts = [done.get() for _ in clients]
    for process in clients:
        process.join()
    return sum(counts) / SECONDS


def main() -> None:
    announce(f"Deployments a second, {CLIENTS} clients, {SECONDS:g} s each")
    names = [service('["/bin/true"]', name=f"s{number}") for number in range(10)]
    host = make_host("".join(names), "[limits]\nmax_queue_per_service = 100\n[storage.retention]\nsuccessful_deploys = 10000\n")
    floors, spawn = [floor_of(FORK)], floor_of(SPAWN)
    host.start()
    try:
        host.port = host.port or 0
        results = {services: deployments(host.port, services) for services in (1, 10)}
    finally:
        host.close()
    floors.append(floor_of(FORK))
    floor = sum(floors) / len(floors)
    print(f"  floor: bare fork+exec+wait of /bin/true  {floor:7.0f}/s   (posix_spawn+wait {spawn:.0f}/s)")
    for services, rate in results.items():
        print(f"  {services:2} service{'s' if services > 1 else ' '}                              {rate:7.0f}/s   {rate / floor:.0%} of the floor "
              f"({rate / spawn:.0%} of posix_spawn)")


if __name__ == "__main__":
    sys.exit(main())
