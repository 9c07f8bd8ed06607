# SPDX-License-Identifier: MPL-2.0
"""Cold start of the archive to GET /ready, beside starting Python with the same imports; sizes of the archives."""

import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time

from common import BASELINE, ROOT, announce, make_host, percentile, service
from pythons import SUPPORTED

from support import free_port

ROUNDS = int(os.environ.get("BENCH_ROUNDS", "15"))


def build(path: pathlib.Path, *flags: str) -> int:
    """Build an archive and return its size in bytes."""
    subprocess.run([sys.executable, str(ROOT / "build_zipapp.py"), "--output", str(path), *flags], check=True, capture_output=True)
    return path.stat().st_size


def is_ready(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), 1) as link:
            link.sendall(b"GET /ready HTTP/1.0\r\n\r\n")
            return link.recv(100).startswith(b"HTTP/1.1 200")
    except OSError:
        return False


def start_to_ready(archive: pathlib.Path, config: pathlib.Path, services: pathlib.Path) -> float:
    """Return the seconds from starting the process to the first 200 of /ready."""
    port = free_port()
    started = time.monotonic()
    server = subprocess.Popen([sys.executable, str(archive), "-c", str(config), "-s", str(services), "run", "--port", str(port)],
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not is_ready(port):
        assert server.poll() is None, "the server ended"
        time.sleep(0.001)
    took = time.monotonic() - started
    server.terminate()
    server.wait()
    return took


def imports() -> float:
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", BASELINE], check=True)
    return time.monotonic() - started


def main() -> None:
    announce(f"Cold start to /ready, {ROUNDS} rounds in turn; size of the archive")
    with tempfile.TemporaryDirectory() as folder:
        plain, compiled, three = (pathlib.Path(folder, f"{name}.pyz") for name in ("plain", "compiled", "three"))
        sizes = {"source only": build(plain), "byte code for this Python": build(compiled, "--python", sys.executable),
                 f"byte code for {len(SUPPORTED)} Pythons": build(three, *(flag for path in SUPPORTED.values() for flag in ("--python", path)))}
        host = make_host(service())
        start_to_ready(compiled, host.config, host.services)  # creates the database, so that each round finds the same
        rounds = [(imports(), start_to_ready(compiled, host.config, host.services), start_to_ready(plain, host.config, host.services))
                  for _ in range(ROUNDS)]
    base, fast, slow = ([values[index] for values in rounds] for index in range(3))
    print(f"  python3 -c '{BASELINE}'  {percentile(base, .5) * 1000:6.0f} ms")
    for name, values in (("with byte code", fast), ("source only", slow)):
        ratios = [value / floor for value, floor in zip(values, base)]
        print(f"  {name:15} {percentile(values, .5) * 1000:6.0f} ms   {percentile(ratios, .5):.2f} times")
    for name, size in sizes.items():
        print(f"  {name:26} {size / 1024:6.1f} KB")


if __name__ == "__main__":
    sys.exit(main())
