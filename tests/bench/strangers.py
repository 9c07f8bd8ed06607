# SPDX-License-Identifier: MPL-2.0
"""Memory with 1,000 idle connections opened, and over a million distinct addresses through a trusted proxy."""

import contextlib
import os
import pathlib
import select
import socket
import sys

from common import announce, make_host, service

from support import wait_until

CONNECTIONS = int(os.environ.get("BENCH_CONNECTIONS", "1000"))
ADDRESSES = int(os.environ.get("BENCH_ADDRESSES", "1000000"))
# Requests sent before their answers are read.
BATCH = 50


def memory_of(pid: int) -> tuple[float, int]:
    """Return resident MB and the number of threads."""
    fields = dict(line.split(":", 1) for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) / 1024, int(fields["Threads"])


def show(label: str, pid: int) -> None:
    size_mb, threads = memory_of(pid)
    print(f"  {label:44} {size_mb:6.1f} MB resident, {threads} threads", flush=True)


def open_idle(port: int, pid: int) -> None:
    """Open connections from 20 addresses that say nothing."""
    with contextlib.ExitStack() as stack:
        links = [stack.enter_context(socket.create_connection(("127.0.0.1", port), 10, (f"127.0.0.{2 + number % 20}", 0)))
                 for number in range(CONNECTIONS)]
        # Whoever is turned away is told so, or finds the connection closed; the others hear nothing.
        poll = select.poll()
        for link in links:
            poll.register(link, select.POLLIN)
        told = wait_until(lambda: len(found) if len(found := poll.poll(500)) >= CONNECTIONS - 256 else 0)
        show(f"{CONNECTIONS} opened, {CONNECTIONS - told} admitted", pid)


def send_addresses(port: int, pid: int) -> None:
    """Send one refused request in the name of each address."""
    link = socket.create_connection(("127.0.0.1", port))
    for start in range(0, ADDRESSES, BATCH):
        names = (f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}" for number in range(start, start + BATCH))
        link.sendall(b"".join(f"GET /nothing HTTP/1.1\r\nHost: x\r\nX-Forwarded-For: {name}\r\n\r\n".encode() for name in names))
        seen, rest = 0, b""
        while seen < BATCH:
            block = rest + link.recv(1 << 16)
            seen += block.count(b"HTTP/1.1 404 ")
            rest = block[-12:] if not block.endswith(b"\n") else b""
        if start % (ADDRESSES // 4) == 0 and start:
            show(f"{start} addresses", pid)
    show(f"{ADDRESSES} addresses", pid)


def main() -> None:
    announce("Memory that strangers can make the server hold")
    host = make_host(service(), "[security]\nrate_limit = 100\ntrusted_proxies = [\"127.0.0.1\"]\n")
    host.start()
    assert host.process
    pid = host.process.pid
    try:
        show("idle", pid)
        open_idle(host.port, pid)
        send_addresses(host.port, pid)
    finally:
        host.close()


if __name__ == "__main__":
    sys.exit(main())
