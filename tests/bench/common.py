# SPDX-License-Identifier: MPL-2.0
"""What the benchmarks share: a host, prepared requests, percentiles. Run each with python3 tests/bench/NAME.py."""

import json
import os
import pathlib
import platform
import socket
import sys
import tempfile
from collections.abc import Sequence

sys.path[:0] = [str(pathlib.Path(__file__).resolve().parents[1]), str(pathlib.Path(__file__).resolve().parents[2])]

import hookshot
from support import KEY, ROOT, Host, service

BASELINE = "import http.server, sqlite3, tomllib, subprocess, hmac, json, argparse"


def announce(title: str) -> None:
    """Print what is measured, and where."""
    print(f"{title}\n  Python {platform.python_version()}, SQLite {hookshot.sqlite3.sqlite_version}, {os.cpu_count()} cores", flush=True)


def percentile(values: Sequence[float], share: float) -> float:
    """Return the nearest-rank percentile."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def make_host(services: str, config: str = "") -> Host:
    """Return a host in a temporary folder that lives as long as this process."""
    folder = tempfile.TemporaryDirectory(prefix="hookshot bench ")
    host = Host(pathlib.Path(folder.name), services, config)
    host.folder_owner = folder  # type: ignore[attr-defined]
    return host


def signed_request(document: dict, *, query: str = "") -> bytes:
    """Return the bytes of a signed POST /deploy."""
    body = json.dumps(document).encode()
    return (f"POST /deploy{query} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            f"X-Hub-Signature-256: {hookshot.sign(KEY.encode(), body)}\r\n\r\n").encode() + body


class Link:
    """A kept-alive connection that costs the client as little as possible."""

    def __init__(self, port: int, *, source: str = "127.0.0.1"):
        self._socket = socket.create_connection(("127.0.0.1", port), source_address=(source, 0))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, content: bytes) -> None:
        self._socket.sendall(content)

    def receive(self) -> tuple[int, bytes]:
        """Return status and body of one answer."""
        content = b""
        while b"\r\n\r\n" not in content:
            content += self._socket.recv(1 << 16)
        head, _, body = content.partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        rest = bytearray(length - len(body))
        view, count = memoryview(rest), 0
        while count < len(rest):
            count += self._socket.recv_into(view[count:])
        return int(head[9:12]), body + rest if rest else body
