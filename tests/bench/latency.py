# SPDX-License-Identifier: MPL-2.0
"""Time from a request's last byte to the command's first instruction, idle, beside the floor of one fork+exec."""

import os
import pathlib
import subprocess
import sys
import tempfile
import time

from common import Link, announce, make_host, percentile, service, signed_request

from support import need, wait_until

ROUNDS = int(os.environ.get("BENCH_ROUNDS", "300"))
# Writes the monotonic clock (ns), the same for every process, with the first thing that it does.
STAMP = """
#include <fcntl.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>
int main(int argc, char **argv) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    char text[32];
    int length = snprintf(text, sizeof text, "%lld\\n", now.tv_sec * 1000000000LL + now.tv_nsec);
    int file = open(argv[1], O_WRONLY | O_APPEND);
    return write(file, text, length) != length;
}
"""


def read_stamps(path: pathlib.Path, count: int) -> int:
    """Return the last of `count` stamps once it is there."""
    return int(wait_until(lambda: (lines := path.read_text().split())[count - 1 : count])[0])


# In a process of its own with nothing imported, as idle between two rounds as the server is.
FORK = "pid = os.fork()\n    if not pid: os.execv(program, [program, path])"
SPAWN = "pid = os.posix_spawn(program, [program, path], {})"
LOOP = """
import os, sys, time
program, path = sys.argv[1:3]
for _ in range(int(sys.argv[3])):
    time.sleep(0.04)
    print(time.monotonic_ns())
    STEP
    os.waitpid(pid, 0)
"""


def floor(step: str, program: str, path: pathlib.Path) -> list[float]:
    """Return the ms from just before a process is made to its program's first instruction."""
    done = subprocess.run([sys.executable, "-S", "-c", LOOP.replace("STEP", step), program, str(path), str(ROUNDS)], capture_output=True, check=True)
    return [(int(ended) - int(started)) / 1e6 for started, ended in zip(done.stdout.split(), path.read_text().split(), strict=True)]


def measure(port: int, path: pathlib.Path) -> list[float]:
    """Return the ms from the last byte's send to the first instruction of the deployment's command."""
    found, link = [], Link(port)
    for number in range(1, ROUNDS + 1):
        request = signed_request({"service": "web", "image": "app:1", "deploy_id": f"d{number}"})
        link.send(request[:-1])
        time.sleep(0.02)
        started = time.monotonic_ns()
        link.send(request[-1:])
        assert link.receive()[0] == 202
        found.append((read_stamps(path, number) - started) / 1e6)
        time.sleep(0.02)
    return found


def main() -> None:
    announce(f"Last byte of the request to the command's first instruction, idle, {ROUNDS} rounds")
    with tempfile.TemporaryDirectory() as folder:
        source, program = pathlib.Path(folder, "stamp.c"), str(pathlib.Path(folder, "stamp"))
        source.write_text(STAMP)
        subprocess.run([need("cc"), "-O2", "-o", program, str(source)], check=True)
        files = [pathlib.Path(folder, name) for name in ("fork", "spawn", "hookshot")]
        for file in files:
            file.touch()
        host = make_host(service(f'["{program}", "{files[2]}"]'), "[limits]\nmax_queue_per_service = 1000\n")
        floors = {"fork+exec": floor(FORK, program, files[0]), "posix_spawn": floor(SPAWN, program, files[1])}
        host.start()
        try:
            found = measure(host.port, files[2])
        finally:
            host.close()
    for name, values in {**floors, "hookshot": found}.items():
        print(f"  {name:12} p50 {percentile(values, .5):6.2f} ms   p99 {percentile(values, .99):6.2f} ms")
    for name, values in floors.items():
        print(f"  p50 above {name}: {percentile(found, .5) - percentile(values, .5):.2f} ms")


if __name__ == "__main__":
    sys.exit(main())
