# SPDX-License-Identifier: MPL-2.0
"""SERVER: hostile, broken and slow bytes on a raw socket; each is refused, runs nothing, and the server goes on."""

import contextlib
import fcntl
import json
import os
import pathlib
import re
import resource
import select
import signal
import socket
import subprocess
import sys
import time

import pytest

import hookshot
import support
from support import Host, running, service, wait_until

BODY = json.dumps({"service": "web", "image": "app:1"}).encode()
LIMIT = 1 << 10
SIGNED = b"X-Hub-Signature-256: " + hookshot.sign(support.KEY.encode(), BODY).encode() + b"\r\n"
HOST = b"Host: 127.0.0.1\r\n"
SMUGGLED = b"GET /services HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


def length(body: bytes = BODY) -> bytes:
    return b"Content-Length: %d\r\n" % len(body)


def post(*lines: bytes, body: bytes = BODY) -> bytes:
    """Return a signed POST /deploy with further header lines in front; no length unless they give one."""
    return b"POST /deploy HTTP/1.1\r\n" + HOST + b"".join(lines) + SIGNED + b"\r\n" + body


def get(path: bytes = b"/ready", *lines: bytes, version: bytes = b"HTTP/1.1") -> bytes:
    return b"GET " + path + b" " + version + b"\r\n" + HOST + b"".join(lines) + b"\r\n"


def chunked(*chunks: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + end


CHUNKED = b"Transfer-Encoding: chunked\r\n"
CLOSE = b"Connection: close\r\n"


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    with running(tmp_path_factory.mktemp("server"), service(),
        f"[server]\nmax_request_size = {LIMIT}\nrequest_timeout = 30\n") as host:
        yield host


@pytest.fixture
def unharmed(host):
    """Give the host, and see afterwards that nothing ran and that it still answers."""
    before = host.get("/deployments").json["deployments"]
    yield host
    assert host.get("/deployments").json["deployments"] == before
    assert host.get("/ready").status == 200


def split(answers: bytes) -> list[tuple[int, dict[str, str], bytes]]:
    """Return status, headers and body of each answer with a Content-Length in what a connection gave."""
    found = []
    while answers:
        head, _, rest = answers.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        size = int(headers.get("content-length", 0))
        found.append((int(first.split()[1]), headers, rest[:size]))
        answers = rest[size:]
    return found


@contextlib.contextmanager
def connected(host, source="127.0.0.1", port=0):
    with socket.create_connection(("127.0.0.1", port or host.port), support.PATIENCE_S, (source, 0)) as link:
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield link


def exchange(host, content: bytes, source="127.0.0.1") -> bytes:
    """Send bytes from an address and return everything until the server closes."""
    with connected(host, source) as link:
        link.sendall(content)
        return read_to_end(link)


def read_answer(link: socket.socket) -> bytes:
    """Return one answer with a Content-Length, and leave what follows it."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += link.recv(1) or pytest.fail(f"the connection ended in {head!r}")
    body, size = b"", int(split(head)[0][1].get("content-length", 0))
    while len(body) < size:
        body += link.recv(size - len(body)) or pytest.fail("the connection ended in a body")
    return head + body


def cpu_seconds(host) -> float:
    """Return the CPU time that the server has used."""
    fields = pathlib.Path(f"/proc/{host.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def status_field(host, name: str) -> int:
    """Return a number of /proc/PID/status: Threads, or VmHWM and the like in KB."""
    return int(re.search(rf"^{name}:\s+(\d+)", pathlib.Path(f"/proc/{host.process.pid}/status").read_text(), re.MULTILINE)[1])


def is_held(host, link: socket.socket) -> bool:
    """Return whether the server still has its end of an IPv4 connection open (after close() the kernel's is nobody's)."""
    ends = [f":{host.port:04X}", f":{link.getsockname()[1]:04X}"]
    rows = (line.split() for line in pathlib.Path("/proc/net/tcp").read_text().splitlines()[1:])
    return any([row[1][8:], row[2][8:]] == ends and row[9] != "0" for row in rows)


def read_to_end(link: socket.socket) -> bytes:
    return b"".join(iter(lambda: link.recv(1 << 16), b""))


ABUSES = {
    # request line
    "no version": (b"GET /ready\r\n\r\n", 400),
    "HTTP/0.9 word": (b"GET\r\n\r\n", 400),
    "two spaces": (b"GET  /ready HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "tab as space": (b"GET\t/ready\tHTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "trailing space": (b"GET /ready HTTP/1.1 \r\n" + HOST + b"\r\n", 400),
    "leading space": (b" GET /ready HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "bad method": (b"G@T /ready HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "lower version": (get(version=b"http/1.1"), 400),
    "long version": (get(version=b"HTTP/1.10"), 400),
    "version 2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    "version 1.2": (get(version=b"HTTP/1.2"), 505),
    "TLS hello": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100), 400),
    "absolute form": (get(b"http://127.0.0.1/ready"), 400),
    "authority form": (b"CONNECT 127.0.0.1:80 HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "asterisk form": (b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "double slash": (get(b"//evil.example/ready"), 400),
    "dot segments": (get(b"/status/../services"), 400),
    "encoded dots": (get(b"/status/%2e%2e/services"), 400),
    "encoded slash": (get(b"/status%2fx"), 400),
    "encoded backslash": (get(b"/status/%5cx"), 400),
    "encoded NUL": (get(b"/status/x%00"), 400),
    "encoded newline": (get(b"/status/x%0d%0aSet-Cookie:x"), 400),
    "bad escape": (get(b"/status/%zz"), 400),
    "escaped noise": (get(b"/status/%ff%fe"), 400),
    "raw UTF-8": (get("/status/ä".encode()), 400),
    "fragment": (get(b"/ready#x"), 400),
    "parameter twice": (get(b"/ready?wait=1&wait=2"), 400),
    "parameters": (get(b"/ready?" + b"&".join(b"a%d=1" % number for number in range(30))), 400),
    # headers
    "no host": (b"GET /ready HTTP/1.1\r\n\r\n", 400),
    "two hosts": (get(b"/ready", b"Host: evil.example\r\n"), 400),
    "line feeds only": (b"GET /ready HTTP/1.1\nHost: 127.0.0.1\n\n", 400),
    "bare LF in headers": (get(b"/ready", b"A: b\nC: d\r\n"), 400),
    "bare CR in headers": (get(b"/ready", b"A: b\rTransfer-Encoding: chunked\r\n"), 400),
    "NUL in a header": (get(b"/ready", b"A: b\x00c\r\n"), 400),
    "control in a header": (get(b"/ready", b"A: b\x01c\r\n"), 400),
    "space before colon": (get(b"/ready", b"Content-Length : 5\r\n"), 400),
    "folded line": (get(b"/ready", b"A: b\r\n folded\r\n"), 400),
    "no colon": (get(b"/ready", b"nonsense\r\n"), 400),
    "no name": (get(b"/ready", b": value\r\n"), 400),
    "two signatures": (post(length(), SIGNED), 400),
    "two ids": (get(b"/ready", b"X-Request-ID: a\r\nX-Request-ID: b\r\n"), 400),
    # bodies
    "two lengths": (post(length(), b"Content-Length: 5\r\n"), 400),
    "two equal lengths": (post(length(), length()), 400),
    "length list": (post(b"Content-Length: 5, 5\r\n"), 400),
    "negative length": (post(b"Content-Length: -1\r\n"), 400),
    "signed length": (post(b"Content-Length: +5\r\n"), 400),
    "underscored length": (post(b"Content-Length: 1_0\r\n"), 400),
    "hex length": (post(b"Content-Length: 0x10\r\n"), 400),
    "arabic length": (post("Content-Length: ٣\r\n".encode()), 400),
    "empty length": (post(b"Content-Length: \r\n"), 400),
    "20 digits": (post(b"Content-Length: 10000000000000000000\r\n"), 400),
    "19 digits": (post(b"Content-Length: 1000000000000000000\r\n"), 413),
    "one byte too many": (post(b"Content-Length: %d\r\n" % (LIMIT + 1)), 413),
    "no length": (post(body=b""), 411),
    "smuggled by no length": (post(body=SMUGGLED), 411),
    "both": (post(length(), CHUNKED, body=chunked(BODY) + SMUGGLED), 400),
    "both, chunked first": (post(CHUNKED, b"Content-Length: 4\r\n", body=chunked(BODY) + SMUGGLED), 400),
    "two codings": (post(CHUNKED, CHUNKED, body=chunked(BODY)), 400),
    "gzip, chunked": (post(b"Transfer-Encoding: gzip, chunked\r\n", body=chunked(BODY)), 501),
    "identity": (post(b"Transfer-Encoding: identity\r\n"), 501),
    "xchunked": (post(b"Transfer-Encoding: xchunked\r\n", body=chunked(BODY)), 501),
    "quoted chunked": (post(b'Transfer-Encoding: "chunked"\r\n', body=chunked(BODY)), 501),
    "chunked in 1.0": (post(CHUNKED, body=chunked(BODY)).replace(b"HTTP/1.1", b"HTTP/1.0"), 400),
    "chunk without size": (post(CHUNKED, body=b"\r\n" + BODY + b"\r\n0\r\n\r\n"), 400),
    "chunk with 0x": (post(CHUNKED, body=b"0x5\r\nhello\r\n0\r\n\r\n"), 400),
    "chunk of -1": (post(CHUNKED, body=b"-1\r\nhello\r\n0\r\n\r\n"), 400),
    "chunk with bare LF": (post(CHUNKED, body=b"5\nhello\n0\n\n" + b"x" * 2000), 400),
    "chunk longer than told": (post(CHUNKED, body=b"2\r\nhello\r\n0\r\n\r\n"), 400),
    "chunk of 4 GB": (post(CHUNKED, body=b"ffffffff\r\n"), 413),
    "chunks beyond the limit": (post(CHUNKED, body=chunked(b"x" * LIMIT, b"x")), 413),
    "endless extension": (post(CHUNKED, body=b"5;" + b"x" * 2000), 400),
    "bad trailer": (post(CHUNKED, body=chunked(BODY, end=b"0\r\nno trailer\r\n\r\n")), 400),
    "endless trailers": (post(CHUNKED, body=chunked(BODY, end=b"0\r\n" + b"a: b\r\n" * 200)), 400),
    "unknown expectation": (post(length(), b"Expect: 200-ok\r\n"), 417),
}


def shown(text: bytes) -> str:
    """Return bytes as part of a test's name."""
    return ascii(clip_middle(text))[1:]


def clip_middle(text: bytes) -> bytes:
    return text if len(text) <= 40 else text[:20] + b"..." + text[-10:]


def family(name: str, status: int, texts, make) -> dict[str, tuple[bytes, int]]:
    """Return one abuse for each text, which `make` puts in its place."""
    return {f"{name} {shown(text)}": (make(text), status) for text in texts}


def with_method(method: bytes) -> bytes:
    return method + get()[3:]


def with_header(line: bytes) -> bytes:
    return get(b"/ready", line + b"\r\n")


def with_length(value: bytes) -> bytes:
    return post(b"Content-Length: " + value + b"\r\n")


def with_coding(value: bytes) -> bytes:
    return post(b"Transfer-Encoding: " + value + b"\r\n", body=chunked(BODY))


def with_chunk_size(size: bytes) -> bytes:
    return post(CHUNKED, body=size + b"\r\nhello\r\n0\r\n\r\n")


def with_trailers(lines: bytes) -> bytes:
    return post(CHUNKED, body=chunked(BODY, end=b"0\r\n" + lines + b"\r\n\r\n"))


def bytes_of(*codes: int) -> list[bytes]:
    return [bytes([code]) for code in codes]


CONTROLS = bytes_of(*range(0x09), 0x0A, *range(0x0B, 0x20), 0x7F)
SENT_ONCE = ("Host", "Content-Length", "Transfer-Encoding", "Content-Type", "Content-Encoding", "Authorization", "Expect", "User-Agent",
             "X-Request-ID",
             "X-Hub-Signature-256", "Idempotency-Key", "Webhook-Id", "Webhook-Timestamp", "Webhook-Signature", "Origin", "Sec-Fetch-Site",
             "Last-Event-ID", "X-Forwarded-Host", "X-Real-IP", "Anything")
ABUSES |= {
    **family("method", 400, [b"G ET", b"GE\tT", b"GET\x00", b"\x00GET", b"G\rET", b"G\nET", b"\nGET", b"\rGET", b"\tGET", b"GET\x7f",
        "GÄT".encode(), b"\xffGET", b"GET,", b"GET:", b"GET;", b"G/T", b"G\\T", b"G(T", b"G)T", b"G<T", b"G>T", b"G=T", b"G?T", b"G[T",
        b"G]T", b"G{T", b"G}T", b'"GET"', b"X" * 33, b"X" * 400, b"\r\n\r\nGET", b"\r\n\nGET", b"\r\n\rGET", b"\r\n GET"], with_method),
    **family("version", 400, [b"", b"HTTP", b"HTTP/", b"HTTP/1", b"HTTP/1.", b"HTTP/.1", b"HTTP/11", b"HTTP/1,1", b"HTTP/+1.1",
        b"HTTP/-1.1", b"HTTP/01.1", b"HTTP/1.01", b"HTTP/1.1.1", b"HTTP/1.1x", b"HTTP/x.1", b"HTTP/0x1.1", b"HTTP/ 1.1", b"HTTP /1.1",
        b"HTTPS/1.1", b"HTP/1.1", b"Http/1.1", b"hTTP/1.1", b"ICY/1.1", b"RTSP/1.0", b"SIP/2.0", b"HTTP\\1.1", b"HTTP/1.1\t",
        b"HTTP/1.1\x00", b"HTTP/1.1\r", b"HTTP/1.1 HTTP/1.1", b"\tHTTP/1.1", b"HTTP/1.\xb9", "HTTP/١.١".encode(), "HTTP/１.１".encode()],
        lambda version: get(version=version)),
    **family("version", 505, [b"HTTP/%d.%d" % version for version in ((0, 0), (0, 9), (1, 2), (1, 9), (2, 0), (2, 1), (3, 0), (9, 9))],
        lambda version: get(version=version)),
    **family("target", 400, [b"", b"ready", b"*", b"?", b"?a=b", b"#", b"http:/ready", b"https://127.0.0.1/ready",
        b"HTTP://127.0.0.1/ready", b"http://", b"ftp://127.0.0.1/ready", b"127.0.0.1:80", b"127.0.0.1/ready", b"//", b"///", b"//ready",
        b"//ready?a=b", b"/\\evil.example", b"\\ready", b"/status\\x", b"/ready#", b"/#/ready", b"/ready?a#b", b"/ready?#", b"/.", b"/..",
        b"/./", b"/../", b"/./ready", b"/../ready", b"/ready/.", b"/ready/..", b"/status/./x", b"/status/..", b"/a/b/../../ready", b"/%2e",
        b"/%2E", b"/%2e%2E/ready", b"/.%2e/ready", b"/%2e./ready", b"/status/%2e%2e", b"/status%2Fx", b"/%2f", b"/%2F%2Fready",
        b"/status%5Cx", b"/%5c..%5c", b"/%00", b"/ready%00.html", b"/%", b"/%2", b"/%2/", b"/%g0", b"/%0g", b"/%-1", b"/% 20", b"/%u0041",
        b"/%%32e", b"/%c0%ae%c0%ae/ready", b"/%c0%af", b"/%e0%80%af", b"/%ed%a0%80", b"/%f5%80%80%80", b"/%ff", b"/%80", b"/%c3", b"/%0a",
        b"/%0d", b"/%0D%0A", b"/%09", b"/%1b[31m", b"/%7f", b"/%c2%85", b"/%c2%a0x%e2%80%a8", b"/%e2%80%ae", b"/%ef%bb%bfready", b"/\x7f",
        b"/\x80", b"/\xff", b"/\xc3\xa4", b"/ready\x00", b"/ready\t", b"/ready\x0b", b"/ready\x1b", b"/ready now", b" /ready", b"/ready ",
        b"/ready\r", b"/ready\n", b"/ready?a=1&a=2", b"/ready?a&a", b"/ready?a=&%61=", b"/ready?a=%ff", b"/ready?%ff=a",
        b"/ready?a=\xc3\xa4", b"/ready?a b", b"/ready?a=b HTTP/1.1", b"/ready?" + b"&".join(b"a%d" % number for number in range(21))], get),
    **family("header", 400, [b"A" + bad + b"B: x" for bad in (*CONTROLS, *(bytes([char]) for char in b' \t"(),/;<=>?@[\\]{}'), b"\x80",
        b"\xff", b"\xc3\xa4")], with_header),
    **family("header value", 400, [b"A: x" + bad + b"y" for bad in CONTROLS], with_header),
    **family("header line", 400, [b" ", b"\t", b"x", b":", b" :", b" A: x", b"\tA: x", b"A : x", b"A\t: x", b"A", b"A x", b"A\r", b"A: x\r",
        b"A: x\n", b"A: x\r\r", b"A: x\n ", b"A: x\r\n ", b"A: x\r\n\t", b"A: x\r\n\ty", b"A: x\r\n y: z", b"A: x\n\ty", b"GET / HTTP/1.1",
        b"Content-Length\x00: 5", b"Transfer-Encoding\x0b: chunked", b"Transfer-Encoding : chunked", b"Content-Length: 5\nX: y",
        b"A: b\nHost: evil.example", b"A: b\rHost: evil.example", b"A: b\n\nGET /services HTTP/1.1", b"A: b\n\r\nGET /services HTTP/1.1"],
        with_header),
    **family("host", 400, [b"Host: " + value for value in (b"a b", b"a/b", b"user@127.0.0.1", b"127.0.0.1,evil.example", b"127.0.0.1:80:80",
        b"127.0.0.1:x", b"a?b", b"a#b", b"a\\b", b"[::1", b"::1", b"<a>", b'"a"', b"\xe4")],
        lambda line: b"GET /ready HTTP/1.1\r\n" + line + b"\r\n\r\n"),
    **family("twice", 400, [f"{name}: 1\r\n{name.swapcase()}: 1".encode() for name in SENT_ONCE if name != "Host"], with_header),
    **family("twice", 400, [b"Host: 127.0.0.1", b"host: 127.0.0.1", b"HOST:127.0.0.1", b"Host:"], with_header),
    "first line folded": (b"GET /ready HTTP/1.1\r\n " + HOST + HOST + b"\r\n", 400),
    "POST without host": (post(length()).replace(HOST, b""), 400),
    "host in the trailers only": (post(CHUNKED, body=chunked(BODY, end=b"0\r\nHost: 127.0.0.1\r\n\r\n")).replace(HOST, b"", 1), 400),
    "nothing but line ends": (b"\r\n" * 20, 400),
    "CONNECT": (b"CONNECT /ready:80 HTTP/1.1\r\n\r\n", 400),
    "HTTP/0.9": (b"GET /ready\r\n", 400),
    "HTTP/0.9 POST": (b"POST /deploy\r\n" + BODY, 400),
    "SSH": (b"SSH-2.0-OpenSSH_9.2p1\r\n", 400),
    "SMTP": (b"EHLO evil.example\r\nMAIL FROM:<a@evil.example>\r\n", 400),
    "an answer": (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", 400),
    "PROXY protocol": (b"PROXY TCP4 10.0.0.1 10.0.0.2 1 2\r\n" + get(), 400),
    "PROXY protocol 2": (b"\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c" + bytes(12) + get(), 400),
    "SOCKS": (b"\x05\x01\x00", 400),
    "noise": (bytes(range(128, 256)), 400),
    "NULs": (bytes(300), 400),
    "byte order mark": (b"\xef\xbb\xbf" + get(), 400),
    "UTF-16": (get().decode().encode("utf-16"), 400),
    **family("length", 400, [b"", b" ", b"\t", b"-", b"+", b"-0", b"+0", b"--5", b"5-", b"5 5", b"5\t5", b"5,5", b"5, 6", b",5", b"5,",
        b"5;", b"5;a=b", b"5.0", b".5", b"5e1", b"0x5", b"0X5", b"0b1", b"0o5", b"5h", b"1_0", b"_5", b"5_", b'"5"', b"'5'", b"five",
        b"NaN", b"inf", b"\xb2", b"\xb9\xb2", "٥".encode(), "５".encode(), b"0" * 20, b"0" * 19 + b"5", b"1" * 20, b"9" * 400, b"5\x0b",
        b"\x0c5", b"5\x00", b"5\x7f", b"5\r", b"%d\xa0" % len(BODY), b"\x85%d" % len(BODY), b"%d chunked" % len(BODY), b"(5)", b"$5",
        b"5/6"], with_length),
    **family("length", 413, [b"%d" % size for size in (LIMIT + 1, 1 << 20, 1 << 31, (1 << 31) - 1, 1 << 32, (1 << 32) + 5, (1 << 63) - 1,
        10**19 - 1)] + [b"0" * 10 + b"%d" % (LIMIT + 1)], with_length),
    **family("length of a GET", 400, [b"-1", b"x", b"5, 5", b""], lambda value: get(b"/ready", b"Content-Length: " + value + b"\r\n")),
    "GET with a large body": (get(b"/ready", b"Content-Length: %d\r\n" % (LIMIT + 1)), 413),
    "GET with both": (get(b"/ready", length(), CHUNKED), 400),
    "HTTP/1.0 with a bad length": (get(b"/ready", b"Content-Length: -1\r\n", version=b"HTTP/1.0"), 400),
    **family("no length", 411, [b"POST", b"PUT", b"PATCH"], lambda method: method + post(body=b"")[4:]),
    **family("coding", 501, [b"", b"identity", b"gzip", b"deflate", b"compress", b"br", b"trailers", b"chunk", b"chunkedx", b"x-chunked",
        b"gzip, chunked", b"chunked, gzip", b"chunked, chunked", b"chunked,chunked", b"chunked,", b",chunked", b"chunked, identity",
        b"identity, chunked", b"chunked;q=1", b"chunked; a=b", b"chunked chunked", b"'chunked'", b'"chunked"', b"(chunked)", b"\xa0chunked",
        b"chunked\xa0", b"\x85chunked", b"chun\xadked", "сhunked".encode(), "ＣＨＵＮＫＥＤ".encode(), b"chunKed".replace(b"K",
        "\u212a".encode())], with_coding),
    **family("coding", 400, [b"\x0bchunked", b"chunked\x0b", b"\x0cchunked", b"chunked\x00", b"\x00", b"chunked\r", b"chun\nked",
        b"chunked\x7f", b"\x1fchunked"], with_coding),
    "both, chunked in capitals": (post(length(), b"TRANSFER-ENCODING: CHUNKED\r\n", body=chunked(BODY)), 400),
    "both, identity": (post(length(), b"Transfer-Encoding: identity\r\n"), 400),
    "both, length 0": (post(b"Content-Length: 0\r\n", CHUNKED, body=chunked(BODY)), 400),
    "both, bad length": (post(b"Content-Length: x\r\n", CHUNKED, body=chunked(BODY)), 400),
    "gzip in 1.0": (post(b"Transfer-Encoding: gzip\r\n").replace(b"HTTP/1.1", b"HTTP/1.0"), 400),
    **family("chunk", 400, [b"", b" ", b" 5", b"\t5", b"+5", b"-5", b"--5", b"0x5", b"5h", b"5x", b"g", b"z", b"5 5", b"5,5", b"5.", b"5=x",
        b"5:x", b"1_0", b'"5"', b"\xb2", "٥".encode(), "５".encode(), b"5\x00", b"\x005", b"5\x0b", b"5\x0c", b"5\r", b"\r5", b"5\n", b"\n5",
        b"5;a\r", b"5;a\n", b"5;a\nb", b"00000000a", b"fffffffff", b"ffffffffffffffff", b"10000000000000005", b"5" + b" " * 1100,
        b"5;" + b"x" * 1100], with_chunk_size),
    **family("chunk", 413, [b"401", b"00000401", b"7fffffff", b"80000000", b"FFFFFFFF", b"fffffffe;a=b", b"400"], lambda size: post(
        CHUNKED, body=b"1\r\nx\r\n" + size + b"\r\n")),
    **family("chunk's end", 400, [b"", b"\r", b"\n", b"\n\n", b"\r\r", b"\n\r", b"\r\x00", b"  ", b"x\r\n", b"\x00\r\n"],
        lambda end: post(CHUNKED, body=b"5\r\nhello" + end + b"0\r\n\r\n0\r\n\r\n")),
    **family("last chunk", 400, [b"0\n\n", b"0\r\r", b"0\r\n\n", b"-0\r\n\r\n", b"0x0\r\n\r\n", b"000000000\r\n\r\n"],
        lambda end: post(CHUNKED, body=chunked(BODY, end=end + b"\r\n"))),
    **family("trailer", 400, [b"a", b"a b", b": b", b" a: b", b"\ta: b", b"a : b", b"a: b\r\n c", b"a: b\r\n\tc", b"a: b\nc: d",
        b"a: b\rc: d", b"a\x00: b", b"a: \x00b", b"a: \x7f", b"a: \x1b[0m", b"a(b): c", b"\xe4: b", b"\r", b"\n",
        b"a: b\r\n" * 100 + b"c: d", b"a: " + b"x" * 3000], with_trailers),
    **family("expectation", 417, [b"100", b"continue", b"200-ok", b"100-continue, 100-continue", b"100-continue,", b"100-continue;a=b",
        b"100-continue x", b'"100-continue"', b"x100-continue", b"100_continue", b"\xa0100-continue"], lambda value: post(length(),
        b"Expect: " + value + b"\r\n")),
    **family("expectation", 400, [b"100-continue\x00", b"100-\rcontinue", b"100-\ncontinue"], lambda value: post(length(),
        b"Expect: " + value + b"\r\n")),
}


@pytest.mark.parametrize("content, status", ABUSES.values(), ids=ABUSES)
def test_an_ambiguous_request_is_refused_once_and_the_connection_closed(unharmed, content, status):
    [(found, headers, body)] = split(unharmed.raw(content + SMUGGLED))
    assert (found, headers["connection"], headers["content-type"]) == (status, "close", "application/problem+json")
    problem = json.loads(body)
    assert problem["status"] == status and problem["request_id"] == headers["x-request-id"]
    assert "server" not in headers or headers["server"] == "hookshot"


def feed(host, *pieces: bytes) -> bytes:
    """Send each piece after the server had time to read the one before, and return everything until the server closes."""
    with connected(host) as link, connected(host) as witness:
        for number, piece in enumerate(pieces):
            if number:
                # One thread reads all connections in turn: what came before this answer was asked for has been read.
                witness.sendall(get())
                assert read_answer(witness).startswith(b"HTTP/1.1 200 ")
            link.sendall(piece)
        return read_to_end(link)


def awkward_places(content: bytes) -> list[int]:
    """Return where to cut a request: inside its first and its last line end, inside the blank line, in the middle."""
    places = {content.find(b"\r") + 1, content.rfind(b"\r") + 1, content.find(b"\r\n\r\n") + 3, len(content) // 2}
    return sorted(place for place in places if 0 < place < len(content))


@pytest.mark.parametrize("content, status", ABUSES.values(), ids=ABUSES)
def test_an_ambiguous_request_is_refused_wherever_its_segments_end(unharmed, content, status):
    for place in awkward_places(content):
        answers = split(feed(unharmed, content[:place], content[place:] + SMUGGLED))
        assert [(found, headers["connection"]) for found, headers, _ in answers] == [(status, "close")], content[:place]


SHORT = {name: case for name, case in ABUSES.items() if len(case[0]) < 400}


@pytest.mark.parametrize("name", list(SHORT)[::6])
def test_an_ambiguous_request_is_refused_byte_by_byte(unharmed, name):
    content, status = SHORT[name]
    with connected(unharmed) as link:
        for byte in content + SMUGGLED:
            link.sendall(bytes([byte]))
        answers = split(read_to_end(link))
    assert [(found, headers["connection"]) for found, headers, _ in answers] == [(status, "close")]


@pytest.mark.parametrize("content, status", [
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400), (b"\x16", 400), (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    (b"PRI * HTTP/2.0\r\n", 505),
    (b"GET /ready\r\n", 400), (b"GET\r\n", 400), (b"GET / HTTP/0.9\r\n", 505), (b"\x80\x2e\x01\x00\x02", 400), (b"\x00", 400),
    (b"\x05\x01\x00", 400), (b"<?xml", 400),
    (b"{}", 400), (b"x\n", 400), (b"GET /ready HTTP/1.1\n", 400), (b"GET /ready HTTP/1.1\r\nA: b\n", 400),
    (b"GET /ready HTTP/1.1\r\nA\x00", 400),
    (b"x" * hookshot.MAX_REQUEST_LINE_BYTES, 414), (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 4000, 431),
    (post(length(), body=b"").replace(b"X-Hub", b"X-Hob"), 401), (post(CHUNKED, body=b"x\r\n"), 400),
    (post(CHUNKED, body=b"401\r\n"), 413)])
def test_what_cannot_become_right_is_refused_before_the_deadline(unharmed, content, status):
    began = time.monotonic()
    with connected(unharmed) as link:
        link.sendall(content)
        [(found, headers, _)] = split(read_to_end(link))
    assert (found, headers["connection"]) == (status, "close")
    assert time.monotonic() - began < 10  # request_timeout is 30


def line_of(size: int) -> bytes:
    """Return a GET whose request line has `size` bytes, line end included."""
    rest = len(b"GET /ready?a= HTTP/1.1\r\n")
    return get(b"/ready?a=" + b"x" * (size - rest), CLOSE)


def head_of(size: int) -> bytes:
    """Return a GET whose head has `size` bytes, blank line included; no single header is long."""
    content = get(b"/ready", CLOSE, *(b"H%d: %s\r\n" % (number, b"x" * 1000) for number in range(15)))
    return content[:-2] + b"Z: " + b"x" * (size - len(content) - 5) + b"\r\n\r\n"


def headers_of(number: int) -> bytes:
    return get(b"/ready", CLOSE, *(b"H%d: x\r\n" % index for index in range(number - 2)))


@pytest.mark.parametrize("make, limit, status", [
    (line_of, hookshot.MAX_REQUEST_LINE_BYTES, 414), (head_of, hookshot.MAX_HEAD_BYTES, 431), (headers_of, hookshot.MAX_HEADERS,
    431)])
def test_a_head_passes_at_its_limit_and_not_beyond(unharmed, make, limit, status):
    assert [split(unharmed.raw(make(limit + more)))[0][0] for more in (-1, 0, 1)] == [200, 200, status]


@pytest.mark.parametrize("frame", [lambda body: (length(body), body), lambda body: (CHUNKED, chunked(body[:100], body[100:]))])
def test_a_body_passes_at_its_limit_and_not_beyond(unharmed, frame):
    for size, status in ((LIMIT - 1, 401), (LIMIT, 401), (LIMIT + 1, 413)):
        header, body = frame(b"x" * size)
        assert split(unharmed.raw(post(header, CLOSE, body=body)))[0][0] == status


@pytest.mark.parametrize("content", [
    b"", b"GET", b"GET /ready HTTP/1.1\r\n", b"GET /ready HTTP/1.1\r\nHost: x\r\nA", post(length(), body=BODY[:5]),
    post(CHUNKED, body=b"5\r\nhe"), post(CHUNKED, body=b"5\r\nhello\r\n0\r\n")])
def test_a_client_that_leaves_in_the_middle_gets_nothing_done(unharmed, content):
    with connected(unharmed) as link:
        link.sendall(content)
        link.shutdown(socket.SHUT_WR)
        assert read_to_end(link) == b""


def test_a_refusal_reaches_a_client_that_is_still_sending(unharmed):
    body = b"x" * 200_000
    [(status, _, _)] = split(unharmed.raw(post(length(body), body=body)))
    assert status == 413


@pytest.mark.parametrize("lines, status", [
    ((length(b"x" * 900_000),), 413), ((CHUNKED,), 413), ((b"Content-Length: x\r\n",), 400), ((b"Transfer-Encoding: gzip\r\n",), 501),
    ((b"X-Hub-Signature-256: x\r\n",), 400)])
def test_a_large_unread_body_does_not_reset_the_refusal_away(unharmed, lines, status):
    body = chunked(b"x" * 900_000) if lines == (CHUNKED,) else b"x" * 900_000
    with connected(unharmed) as link:
        link.sendall(post(*lines, body=body))
        [(found, headers, _)] = split(read_to_end(link))
    assert (found, headers["connection"]) == (status, "close")


def test_what_follows_a_last_request_does_not_reset_its_answer_away(unharmed):
    for last in (get(b"/ready", CLOSE), b"GET /ready HTTP/1.0\r\n\r\n"):
        with connected(unharmed) as link:
            link.sendall(last + b"x" * 500_000)
            assert [status for status, _, _ in split(read_to_end(link))] == [200]


def test_tiny_chunks_keep_the_reading_thread_no_longer_than_large_ones(unharmed):
    """Unsigned clients may send them: a megabyte of one-byte chunks must not cost the time of all others."""
    with running(unharmed.folder / "tiny", service()) as host:
        before = cpu_seconds(host)
        with connected(host) as link, contextlib.suppress(BrokenPipeError, ConnectionResetError):
            link.sendall(post(CHUNKED, CLOSE, body=b"1\r\nx\r\n" * 1_000_000 + b"0\r\n\r\n"))
            [(status, _, body)] = split(read_to_end(link))
            assert (status, json.loads(body)["detail"]) == (400, "the chunks are too small")
        assert host.get("/ready").status == 200 and cpu_seconds(host) - before < 1


@pytest.mark.parametrize("size, times, is_taken", [(1, 700, True), (1, 1200, False), (10, 20_000, True), (16, 60_000, True)])
def test_chunks_may_be_small_as_long_as_they_are_more_than_framing(tmp_path, size, times, is_taken):
    """A request's worth of one-byte chunks, or a stream of lines, passes; a flood of framing does not (CVE-2023-39326)."""
    with running(tmp_path, service()) as host:
        chunks = [b"[" + b" " * (size - 1)] + [b" " * size] * times + [b"]"]
        [(status, _, body)] = split(exchange(host, post(CHUNKED, CLOSE, body=chunked(*chunks))))
        detail = json.loads(body)["detail"]
        assert (status, detail) == ((401, "the signature is missing or wrong") if is_taken else (400, "the chunks are too small"))


# --- the functions alone

@pytest.mark.parametrize("line, method, path, query, is_http_1_1", [
    ("GET / HTTP/1.1", "GET", "/", {}, True), ("get /ready HTTP/1.0", "get", "/ready", {}, False),
    ("M-SEARCH /a HTTP/1.1", "M-SEARCH", "/a", {}, True),
    ("GET /status/a%20b HTTP/1.1", "GET", "/status/a b", {}, True), ("GET /%c3%a4 HTTP/1.1", "GET", "/ä", {}, True),
    ("GET /%252f HTTP/1.1", "GET", "/%2f", {}, True),
    ("GET /%252e%252e HTTP/1.1", "GET", "/%2e%2e", {}, True), ("GET /.../..a HTTP/1.1", "GET", "/.../..a", {}, True),
    ("GET /a//b HTTP/1.1", "GET", "/a//b", {}, True),
    ("GET /a;b=c HTTP/1.1", "GET", "/a;b=c", {}, True), ("GET /a? HTTP/1.1", "GET", "/a", {}, True),
    ("GET /a?b HTTP/1.1", "GET", "/a", {"b": ""}, True),
    ("GET /a?b=c=d&e=/../x HTTP/1.1", "GET", "/a", {"b": "c=d", "e": "/../x"}, True), ("GET /a?b=%26%3d+x HTTP/1.1", "GET", "/a",
        {"b": "&= x"}, True),
    ("GET /a?b=http://c//d HTTP/1.1", "GET", "/a", {"b": "http://c//d"}, True), ("GET /a?b?c HTTP/1.1", "GET", "/a", {"b?c": ""}, True),
    ("X" * 32 + " / HTTP/1.1", "X" * 32, "/", {}, True)])
def test_a_request_line_has_these_parts(line, method, path, query, is_http_1_1):
    assert hookshot.parse_request_line(line) == (method, path, query, is_http_1_1)


@pytest.mark.parametrize("content, status", [case for name, case in ABUSES.items() if name.startswith(("method", "version", "target",
    "header", "host", "twice"))])
def test_a_head_that_is_refused_is_refused_by_parse_head_alone(content, status):
    end = content.rfind(b"\r\n\r\n")
    with pytest.raises(hookshot.HookshotError) as caught:
        hookshot.parse_head(content[: end if end >= 0 else None])
    assert caught.value.kind.http == status


@pytest.mark.parametrize("lines, headers", [
    ("A:b", {"a": "b"}), ("A: b", {"a": "b"}), ("A:\t b \t", {"a": "b"}), ("A:", {"a": ""}), ("A: b: c", {"a": "b: c"}),
    ("a: x\ty", {"a": "x\ty"}), ("!#$%&'*+.^_`|~-9: x", {"!#$%&'*+.^_`|~-9": "x"}),
    ("A: \xe4\xff", {"a": "\xe4\xff"}), ("A: \x80\x9f", {"a": "\x80\x9f"}), ("Accept: a\r\nACCEPT: b", {"accept": "a,b"}),
    ("X-Forwarded-For: a\r\nx-forwarded-for: b, c", {"x-forwarded-for": "a,b, c"})])
def test_header_lines_have_these_names_and_values(lines, headers):
    head = hookshot.parse_head(f"GET / HTTP/1.1\r\nHost: h\r\n{lines}".encode("latin-1"))
    assert head.headers == {"host": "h"} | headers


@pytest.mark.parametrize("value", ["h", "h:80", "h:", "127.0.0.1:8080", "[::1]", "[::1]:80", "a-b.c_d.example", ""])
def test_a_host_is_a_name_or_an_address_and_a_port(value):
    assert hookshot.parse_head(f"GET / HTTP/1.1\r\nHost: {value}".encode()).headers["host"] == value


@pytest.mark.parametrize("method, version, lines, expected", [
    ("GET", 1, "", 0), ("HEAD", 1, "", 0), ("DELETE", 1, "", 0), ("POST", 1, "", 411), ("PUT", 1, "", 411), ("PATCH", 1, "", 411),
    ("POST", 0, "", 411),
    ("POST", 1, "Content-Length: 0", 0), ("POST", 1, "Content-Length: 7", 7), ("POST", 1, "Content-Length: 0007", 7),
    ("GET", 1, "Content-Length: 7", 7), ("POST", 0, "Content-Length: 7", 7),
    ("POST", 1, "Content-Length: 100", 100), ("POST", 1, "Content-Length: 101", 413), ("POST", 1, "Content-Length: 9999999999999999999",
        413),
    ("POST", 1, "Content-Length: 10000000000000000000", 400), ("POST", 1, "Transfer-Encoding: chunked", None),
    ("GET", 1, "Transfer-Encoding: Chunked", None),
    ("POST", 0, "Transfer-Encoding: chunked", 400), ("POST", 1, "Transfer-Encoding: chunked\r\nContent-Length: 5", 400),
    ("POST", 1, "Transfer-Encoding:", 501)])
def test_a_body_has_this_length_or_is_refused(method, version, lines, expected):
    head = hookshot.parse_head(f"{method} / HTTP/1.{version}\r\nHost: h\r\n{lines}".rstrip().encode())
    try:
        assert hookshot.body_length(head, 100) == expected
    except hookshot.HookshotError as error:
        assert error.kind.http == expected


# --- what is right

def test_requests_on_one_connection_are_answered_in_order(unharmed):
    paths = [b"/ready", b"/nothing", b"/services", b"/health", b"/deployments"]
    requests = b"".join(get(path, b"X-Request-ID: r%d\r\n" % number) for number, path in enumerate(paths))
    answers = split(unharmed.raw(requests + get(b"/ready", CLOSE)))
    assert [status for status, _, _ in answers] == [200, 404, 200, 200, 200, 200]
    assert [headers["x-request-id"] for _, headers, _ in answers[:5]] == [f"r{number}" for number in range(5)]


def test_a_connection_is_kept_after_a_refusal_that_read_everything(unharmed):
    wrong = post(length()).replace(b"sha256=", b"sha256=00")
    answers = split(unharmed.raw(wrong + get(b"/ready", CLOSE)))
    assert [status for status, _, _ in answers] == [401, 200]


def test_http_1_0_is_answered_and_closed_even_for_a_stream(unharmed):
    [(status, headers, _)] = split(unharmed.raw(b"GET /ready HTTP/1.0\r\n\r\n"))
    assert (status, headers["connection"]) == (200, "close") and "transfer-encoding" not in headers


def test_head_has_the_headers_and_no_body(unharmed):
    answers = unharmed.raw(get(b"/services", CLOSE).replace(b"GET", b"HEAD"))
    assert answers.startswith(b"HTTP/1.1 200 ") and answers.endswith(b"\r\n\r\n") and b"Content-Length: " in answers


@pytest.mark.parametrize("pause_at", [1, 30, 60])
def test_a_request_may_come_in_pieces(unharmed, pause_at):
    content = get(b"/ready", CLOSE)
    with connected(unharmed) as link:
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start in range(0, len(content), pause_at):
            link.sendall(content[start : start + pause_at])
        assert read_to_end(link).startswith(b"HTTP/1.1 200 ")


def test_100_continue_comes_before_the_body_and_not_before_a_refusal(unharmed):
    for lines, expected in (((length(b"x" * (LIMIT + 1)),), b"HTTP/1.1 413"), ((length(),), b"HTTP/1.1 100 Continue\r\n\r\n")):
        with connected(unharmed) as link:
            link.sendall(post(*lines, b"Expect: 100-continue\r\n", CLOSE, body=b"").replace(b"sha256=", b"sha256=00"))
            assert link.recv(1 << 16).startswith(expected)
            link.shutdown(socket.SHUT_WR)
            read_to_end(link)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_chunked_body_is_put_together(tmp_path, size):
    chunks = [BODY[start : start + size] for start in range(0, len(BODY), size)]
    body = chunked(*chunks, end=b"0;last=1\r\nTrailer: dropped\r\n\r\n")
    with running(tmp_path, service()) as host:
        accepted, ready = split(host.raw(post(CHUNKED, body=body) + get(b"/ready", CLOSE)))
        assert (accepted[0], ready[0]) == (202, 200)
        assert host.wait(json.loads(accepted[2])["deploy_id"])["status"] == "Succeeded"


def test_no_answer_names_versions_or_paths(unharmed):
    for content in (get(b"/ready", CLOSE), get(b"/nothing", CLOSE), b"\x00\r\n\r\n"):
        answer = unharmed.raw(content).decode("latin-1")
        assert "Python" not in answer and str(unharmed.folder) not in answer and "Server: hookshot\r\n" in answer


def test_no_request_makes_the_server_report_a_bug(unharmed):
    assert '"bug"' not in unharmed.output.read_text()


# --- time and number

@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    with running(tmp_path_factory.mktemp("narrow"), service(), "[server]\nrequest_timeout = 1\nmax_connections = 3\n") as host:
        yield host


@pytest.mark.parametrize("content, answer", [
    (b"", b""), (b"GET /re", b"HTTP/1.1 408 "), (get()[:-2], b"HTTP/1.1 408 "), (post(length(), body=b"{"), b"HTTP/1.1 408 "),
    (post(CHUNKED, body=b"5\r\nhel"), b"HTTP/1.1 408 ")])
def test_a_slow_client_is_cut_at_request_timeout(narrow, content, answer):
    with connected(narrow) as link:
        link.sendall(content)
        assert read_to_end(link)[: len(answer) or 1] == answer
    assert narrow.get("/deployments").json["deployments"] == []


def test_bytes_that_drip_in_do_not_move_the_deadline(narrow):
    with connected(narrow) as link:
        link.settimeout(0.2)
        began, answer = time.monotonic(), None
        for byte in b"GET /ready HTTP/1.1\r\nX: " + b"x" * 200:
            with contextlib.suppress(TimeoutError):
                link.sendall(bytes([byte]))
                answer = link.recv(1 << 16)
                break
        assert answer and answer.startswith(b"HTTP/1.1 408 ") and time.monotonic() - began < 20


def test_a_deployment_outlasts_request_timeout(tmp_path):
    with running(tmp_path, service('["sleep", "1.5"]'), "[server]\nrequest_timeout = 1\n") as host:
        answer = host.post({"service": "web", "image": "app:1"}, path="/deploy?wait=30")
        assert (answer.status, answer.json["status"]) == (200, "Succeeded")


def test_connections_beyond_the_limit_are_told_so_and_places_come_back(narrow):
    def ready():
        with contextlib.suppress(OSError):
            return narrow.raw(get(b"/ready", CLOSE)).startswith(b"HTTP/1.1 200 ")

    wait_until(ready)
    with contextlib.ExitStack() as stack:
        links = [stack.enter_context(connected(narrow)) for _ in range(3)]
        for link in links:
            link.sendall(b"GET /ready HTTP/1.1\r\n")
        with connected(narrow) as late:
            [(status, headers, body)] = split(read_to_end(late))
        assert (status, json.loads(body)["code"], headers["connection"]) == (503, "CONNECTION_LIMIT_EXCEEDED", "close")
        assert int(headers["retry-after"]) > 0
    wait_until(ready)


# --- one connection, many requests

WRONG = post(length()).replace(b"sha256=", b"sha256=00")
UNSIGNED = post(length()).replace(b"X-Hub-", b"X-Hob-")


def test_pipelined_requests_of_all_kinds_are_answered_in_order(unharmed):
    """Answers of the reading thread do not overtake those of requests that have threads."""
    kinds = [(get(b"/ready"), 200), (WRONG, 401), (get(b"/services"), 200), (UNSIGNED, 401), (get(b"/deployments?limit=1"), 200),
             (get(b"/nothing"), 404),
             (post(CHUNKED, body=chunked(b"x" * 100)), 401), (get(b"/status/none"), 404), (get(b"/deploy"), 405),
             (post(length(b""), body=b""), 401), (get(b"/health"), 200),
             (get(b"/deployments?limit=x"), 400), (b"\r\n" + get(b"/ready"), 200), (post(length()).replace(b"/deploy", b"/ready"), 405)] * 8
    content = b"".join(request.replace(HOST, HOST + b"X-Request-ID: n%d\r\n" % number) for number, (request, _) in enumerate(kinds))
    with connected(unharmed) as link:
        link.sendall(content + get(b"/ready", CLOSE))
        answers = split(read_to_end(link))
    assert [(status, headers["x-request-id"]) for status, headers, _ in answers[:-1]] == [(status, f"n{number}") for number,
        (_, status) in enumerate(kinds)]
    assert answers[-1][0] == 200


def test_pipelined_deploys_are_accepted_in_order(tmp_path):
    with running(tmp_path, service()) as host:
        def deploy(number: int) -> bytes:
            body = json.dumps({"service": "web", "image": "app:1", "deploy_id": f"d{number}"}).encode()
            return post(length(body), body=body).replace(SIGNED, b"X-Hub-Signature-256: " + hookshot.sign(host.key,
                body).encode() + b"\r\n")

        with connected(host) as link:
            link.sendall(b"".join(deploy(number) + WRONG + get() for number in range(10)) + get(b"/deployments", CLOSE))
            answers = split(read_to_end(link))
        assert [status for status, _, _ in answers] == [202, 401, 200] * 10 + [200]
        assert [json.loads(body)["deploy_id"] for _, _, body in answers[:-1:3]] == [f"d{number}" for number in range(10)]
        assert {record["deploy_id"] for record in json.loads(answers[-1][2])["deployments"]} == {f"d{number}" for number in range(10)}


@pytest.mark.parametrize("refused, status", [
    (WRONG, 401), (UNSIGNED, 401), (post(length()).replace(b"/deploy", b"/nothing"), 404), (post(length()).replace(b"/deploy", b"/ready"),
        405),
    (post(length(b"x" * LIMIT), body=b"x" * LIMIT), 401), (post(length(b""), body=b""), 401), (post(CHUNKED, body=chunked(b"x")), 401),
    (WRONG.replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n"), 401)])
def test_a_refused_post_that_has_wholly_arrived_keeps_the_connection(unharmed, refused, status):
    with connected(unharmed) as link:
        for _ in range(3):
            link.sendall(refused)
            answer = read_answer(link)
            if answer.startswith(b"HTTP/1.1 100 "):
                answer = read_answer(link)
            [(found, headers, _)] = split(answer)
            assert found == status and "connection" not in headers
        link.sendall(get(b"/ready", CLOSE))
        assert [status for status, _, _ in split(read_to_end(link))] == [200]


@pytest.mark.parametrize("refused, status", [
    (UNSIGNED[:-1], 401), (UNSIGNED[: -len(BODY)], 401), (post(length()).replace(b"/deploy", b"/nothing")[:-1], 404),
    (post(length()).replace(b"/deploy", b"/ready")[:-1], 405), (post(CHUNKED, body=b"").replace(b"X-Hub-", b"X-Hob-"), 401),
    (post(CHUNKED, body=chunked(BODY)).replace(b"X-Hub-", b"X-Hob-"), 401)])
def test_a_refused_post_whose_body_is_not_there_closes_the_connection(unharmed, refused, status):
    with connected(unharmed) as link:
        link.sendall(refused)
        [(found, headers, _)] = split(read_to_end(link))
    assert (found, headers["connection"]) == (status, "close")


@pytest.mark.parametrize("requests, statuses", [
    (get(), [200]), (get() * 3, [200] * 3), (get(b"/services"), [200]), (WRONG, [401]), (WRONG + get(b"/services") + get(b"/nothing"),
        [401, 200, 404]),
    (post(CHUNKED, body=chunked(b"x")), [401]), (b"GET /ready HTTP/1.0\r\n\r\n", [200]), (get() + b"GET /re", [200]),
    (get() + b"\r\n", [200])])
def test_a_client_that_has_closed_its_side_gets_its_answers(unharmed, requests, statuses):
    with connected(unharmed) as link:
        link.sendall(requests)
        link.shutdown(socket.SHUT_WR)
        assert [status for status, _, _ in split(read_to_end(link))] == statuses


def test_a_deploy_of_a_client_that_has_closed_its_side_is_accepted_and_answered(tmp_path):
    with running(tmp_path, service()) as host, connected(host) as link:
        link.sendall(post(length()))
        link.shutdown(socket.SHUT_WR)
        [(status, _, body)] = split(read_to_end(link))
        assert status == 202 and host.wait(json.loads(body)["deploy_id"])["status"] == "Succeeded"


@pytest.mark.parametrize("start", [b"\r\n", b"\r", b""])
def test_one_empty_line_before_a_request_is_passed_over(unharmed, start):
    """RFC 9112, 2.2: some clients send one after a body."""
    answers = feed(unharmed, start or b"\r\nGET", (b"\r\n" + get(b"/ready", CLOSE))[len(start or b"\r\nGET"):])
    assert [status for status, _, _ in split(answers)] == [200]


# --- expectations

@pytest.fixture(scope="module")
def gated(tmp_path_factory):
    """A server for 127.0.0.0 to 127.0.0.7, where each address has three requests."""
    with running(tmp_path_factory.mktemp("gated"), service(), f"[server]\nmax_request_size = {LIMIT}\n[security]\n"
                 'allowed_ips = ["127.0.0.0/29"]\nrate_limit = 3\n') as host:
        yield host


EXPECTING = b"Expect: 100-continue\r\n"


@pytest.mark.parametrize("content, source, earlier, status", [
    (post(length(), EXPECTING, body=b""), "127.0.0.9", 0, 403), (post(CHUNKED, EXPECTING, body=b""), "127.0.0.9", 0, 403),
    (post(length(), EXPECTING, body=b""), "127.0.0.2", 3, 429), (post(length(), EXPECTING, body=b"").replace(b"/deploy", b"/nothing"),
                                                                 "127.0.0.3", 0, 404),
    (post(length(), EXPECTING, body=b"").replace(b"/deploy", b"/services"), "127.0.0.3", 0, 405),
    (post(length(), EXPECTING, body=b"").replace(b"X-Hub-", b"X-Hob-"), "127.0.0.3", 0, 401),
    (post(b"Content-Length: %d\r\n" % (LIMIT + 1), EXPECTING, body=b""), "127.0.0.4", 0, 413),
    (post(length(), b"Expect: 200-ok\r\n", body=b""), "127.0.0.4", 0, 417),
    (post(b"Content-Length: x\r\n", EXPECTING, body=b""), "127.0.0.4", 0, 400), (post(EXPECTING, body=b""), "127.0.0.4", 0, 411)])
def test_a_client_that_asks_first_is_refused_without_a_100(gated, content, source, earlier, status):
    for _ in range(earlier):
        assert exchange(gated, get(b"/services", CLOSE), source).startswith(b"HTTP/1.1 200 ")
    [(found, headers, _)] = split(exchange(gated, content, source))
    assert (found, headers["connection"]) == (status, "close")
    assert "deploy_accepted" not in gated.output.read_text() and gated.get("/ready").status == 200


@pytest.mark.parametrize("lines, body", [((length(),), BODY), ((CHUNKED,), chunked(BODY))])
def test_a_client_that_asks_first_and_may_go_on_sends_its_body_then(unharmed, lines, body):
    with connected(unharmed) as link:
        for _ in range(2):
            link.sendall(post(*lines, b"expect: 100-Continue\r\n", body=b"").replace(b"sha256=", b"sha256=00"))
            assert read_answer(link) == b"HTTP/1.1 100 Continue\r\n\r\n"
            link.sendall(body)
            assert read_answer(link).startswith(b"HTTP/1.1 401 ")


def test_an_http_1_0_client_gets_no_100(unharmed):
    with connected(unharmed) as link:
        link.sendall(post(length(), EXPECTING).replace(b"HTTP/1.1", b"HTTP/1.0").replace(b"sha256=", b"sha256=00"))
        assert [status for status, _, _ in split(read_to_end(link))] == [401]


# --- every answer

ANSWERS = {
    200: get(), 400: get(b"//"), 401: WRONG, 404: get(b"/nothing"), 405: get(b"/deploy"), 411: post(),
    413: post(length(b"x" * (LIMIT + 1))), 414: get(b"/" + b"x" * 9000),
    417: post(length(), b"Expect: x\r\n"), 431: headers_of(200), 501: post(b"Transfer-Encoding: gzip\r\n"), 505: get(version=b"HTTP/3.0")}


@pytest.mark.parametrize("status", ANSWERS)
def test_every_answer_has_these_headers(unharmed, status):
    with connected(unharmed) as link:
        link.sendall(ANSWERS[status])
        answer = read_answer(link)
    [(found, headers, body)] = split(answer)
    assert found == status and int(headers["content-length"]) == len(body) and answer.endswith(body)
    assert re.fullmatch(r"(Mon|Tue|Wed|Thu|Fri|Sat|Sun), \d\d (Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec) \d{4} \d\d:\d\d:\d\d GMT",
                        headers["date"])
    assert (headers["server"], headers["cache-control"], headers["x-content-type-options"]) == ("hookshot", "no-store", "nosniff")
    assert headers["content-type"] == ("application/json" if status == 200 else "application/problem+json") and headers["x-request-id"]
    names = [line.partition(b":")[0].lower() for line in answer.partition(b"\r\n\r\n")[0].split(b"\r\n")[1:]]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("given, is_kept", [
    (b"a", True), (b"A-z_0.9", True), (b"x" * 128, True), (b"x" * 129, False), (b"", False), (b"a b", False), (b"a/b", False),
    (b"\xe4", False), (b"a,b", False), (b"<a>", False)])
def test_a_good_request_id_comes_back_and_another_is_replaced(unharmed, given, is_kept):
    for request in (get(b"/ready", b"X-Request-ID: " + given + b"\r\n", CLOSE), get(b"/nothing", b"X-Request-ID: " + given + b"\r\n",
        CLOSE)):
        [(_, headers, body)] = split(unharmed.raw(request))
        assert (headers["x-request-id"] == given.decode("latin-1")) is is_kept and re.fullmatch(r"[A-Za-z0-9._-]{1,128}",
            headers["x-request-id"])
        assert json.loads(body).get("request_id", headers["x-request-id"]) == headers["x-request-id"]


def test_request_ids_of_ours_differ(unharmed):
    answers = split(unharmed.raw(get() * 200 + get(b"/ready", CLOSE)))
    assert len({headers["x-request-id"] for _, headers, _ in answers}) == 201


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "HEAD", "get", "BREW"])
def test_another_method_is_405_with_allow(unharmed, method):
    for route in hookshot.ROUTES:
        if method == route.method or (method, route.method) == ("HEAD", "GET"):
            continue
        path = re.sub(r"\{.*?\}", "x", route.pattern).encode()
        with connected(unharmed) as link:
            link.sendall(get(path, b"Content-Length: 0\r\n", CLOSE).replace(b"GET", method.encode(), 1))
            answer = read_to_end(link)
        head, _, body = answer.partition(b"\r\n\r\n")
        allow = re.search(rb"\r\nAllow: (.*?)\r\n", head + b"\r\n")
        assert answer.startswith(b"HTTP/1.1 405 ") and allow[1].decode().split(", ") == (["GET",
            "HEAD"] if route.method == "GET" else [route.method])
        assert bool(body) is (method != "HEAD")


@pytest.fixture(scope="module")
def busy(tmp_path_factory):
    """A server with one deployment behind it, whose log has 8 MB, and little patience."""
    talk = service('["sh", "-c", "yes 0123456789abcdef0123456789abcdef | head -c 8000000"]')
    with running(tmp_path_factory.mktemp("busy"), talk, "[server]\nrequest_timeout = 1\n") as host:
        assert host.wait(host.deploy(deploy_id="big"))["status"] == "Succeeded"
        yield host


@pytest.mark.parametrize("path",
                         [re.sub(r"\{name\}", "web",
                                 re.sub(r"\{id\}", "big", route.pattern)) for route in hookshot.ROUTES if route.method == "GET" and route.pattern != "/events"])
@pytest.mark.parametrize("end", ["", "/nothing"])
def test_head_of_every_route_has_the_length_of_get_and_no_body(busy, path, end):
    def agree():
        """Once: an uptime of one more digit may come between the two."""
        got, asked = busy.get(path + end), busy.request("HEAD", path + end)
        assert (asked.status, asked.body) == (got.status, b"") and {*asked.headers} == {*got.headers}
        return asked.headers.get("content-length") == got.headers.get("content-length")

    wait_until(agree)
    with connected(busy) as link:
        link.sendall(get((path + end).encode()).replace(b"GET", b"HEAD", 1) + get(b"/ready", CLOSE))
        answers = read_to_end(link)
    assert answers.count(b"HTTP/1.1 ") == 2 and answers.partition(b"\r\n\r\n")[2].startswith(b"HTTP/1.1 200 ")


# --- slow clients

def test_clients_that_drip_are_gone_after_request_timeout_wherever_they_are(narrow):
    """One byte at a time, in every part of a request."""
    with running(narrow.folder / "drip", service(), "[server]\nrequest_timeout = 1\n") as host, contextlib.ExitStack() as stack:
        starts = {b"": get(b"/" + b"x" * 500), b"GET /ready HTTP/1.1\r\n": b"A: b\r\n" * 100, get()[:-2]: b"A: " + b"x" * 500,
                  post(length(b"x" * 500), body=b""): b"x" * 499,
                  post(CHUNKED, body=b""): b"1\r\nx\r\n" * 100, post(CHUNKED, body=b"5;"): b"x" * 500,
                  post(CHUNKED, body=b"0\r\n"): b"A: b\r\n" * 90,
                  post(length(), EXPECTING, body=b""): b" " * 5}
        links = {stack.enter_context(connected(host)): (start, iter(rest)) for start, rest in starts.items()}
        for link, (start, _) in links.items():
            link.sendall(start)
        answers = dict.fromkeys(links, b"")
        deadline = time.monotonic() + support.PATIENCE_S
        while links and time.monotonic() < deadline:
            for link in select.select([*links], [], [], 0.1)[0]:
                with contextlib.suppress(ConnectionResetError):
                    if block := link.recv(1 << 16):
                        answers[link] += block
                        continue
                del links[link]
            for link, (_, rest) in links.items():
                with contextlib.suppress(BrokenPipeError, ConnectionResetError, StopIteration):
                    link.sendall(bytes([next(rest)]))
        assert not links
        assert all(re.match(rb"(HTTP/1.1 100 Continue\r\n\r\n)?HTTP/1.1 408 ", answer) for answer in answers.values())
        assert host.get("/deployments").json["deployments"] == []


@pytest.mark.parametrize("requests", [get(b"/logs/big"), get() * 100_000], ids=["one large answer", "many small answers"])
def test_a_client_that_takes_no_answer_is_dropped_while_others_are_served(busy, requests):
    with socket.socket() as link:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        link.connect(("127.0.0.1", busy.port))
        link.settimeout(0.5)
        with contextlib.suppress(TimeoutError):
            link.sendall(requests)
        # Others are answered meanwhile.
        wait_until(lambda: busy.get("/services").status == 200 and not is_held(busy, link))
        taken = b""
        with contextlib.suppress(ConnectionResetError):
            link.settimeout(support.PATIENCE_S)
            while block := link.recv(1 << 16):
                taken += block
        assert len(taken) < 7_900_000 and not taken.endswith(b"0\r\n\r\n")
    wait_until(lambda: status_field(busy, "Threads") < 20)


def test_a_kept_connection_is_closed_when_it_is_idle(busy):
    with connected(busy) as link:
        link.sendall(get())
        assert [status for status, _, _ in split(read_to_end(link))] == [200]


# --- limits on number

@pytest.fixture
def crowded(tmp_path):
    """A server with 64 places, 16 for each address but the proxy's."""
    with running(tmp_path, service(), '[server]\nmax_connections = 64\n[security]\ntrusted_proxies = ["127.0.0.5"]\n') as host:
        yield host


def crowd(stack: contextlib.ExitStack, host, number: int, source: str, *starts: bytes) -> list[socket.socket]:
    """Return that many connections from an address, which have sent one of `starts` and no more."""
    links = []
    for index in range(number):
        link = stack.enter_context(connected(host, source))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            link.sendall(starts[index % len(starts)])
        links.append(link)
    return links


def is_served(host, source: str) -> bool:
    """Return whether an address has a place; one that has none may be reset."""
    with contextlib.suppress(OSError):
        return exchange(host, get(b"/ready", CLOSE), source).startswith(b"HTTP/1.1 200 ")
    return False


def turned_away(links: list[socket.socket], number: int) -> list[bytes]:
    """Wait until the server has ended or answered so many of the connections, and return what each of those got."""
    ended = wait_until(lambda: len(found := select.select(links, [], [], 0)[0]) >= number and found)
    texts = []
    for link in ended:
        link.settimeout(support.PATIENCE_S)
        blocks = []
        # A reset may come after the answer.
        with contextlib.suppress(ConnectionResetError):
            while block := link.recv(1 << 16):
                blocks.append(block)
        texts.append(b"".join(blocks))
    return texts


def test_500_connections_of_one_address_do_not_keep_another_from_deploying(crowded):
    with contextlib.ExitStack() as stack:
        links = crowd(stack, crowded, 500, "127.0.0.2", b"", b"GET /re", get()[:-2], post(length(), body=b"{"),
                      post(CHUNKED, body=b"5\r\nh"))
        [(status, _, body)] = split(exchange(crowded, post(length(), CLOSE), "127.0.0.3"))
        assert status == 202
        gone = turned_away(links, 500 - 16)
        told = [split(text)[0] for text in gone if text]
        assert len(told) >= 32 and all(
            (status, headers["connection"], headers["retry-after"], json.loads(body)["code"]) == (503, "close", "5",
                "CONNECTION_LIMIT_EXCEEDED") for status, headers, body in told)
        assert crowded.wait(json.loads(body)["deploy_id"])["status"] == "Succeeded"
    wait_until(lambda: is_served(crowded, "127.0.0.2"))


def test_a_trusted_proxy_has_more_than_a_share(crowded):
    with contextlib.ExitStack() as stack:
        links = crowd(stack, crowded, 50, "127.0.0.5", get())
        assert all(read_answer(link).startswith(b"HTTP/1.1 200 ") for link in links)
        links = crowd(stack, crowded, 60, "127.0.0.5", b"")
        assert all(text.startswith(b"HTTP/1.1 503 ") for text in turned_away(links, 60 - 14) if text)


def test_many_addresses_meet_the_limit_of_all_and_places_come_back(crowded):
    with contextlib.ExitStack() as stack:
        links = [link for last in range(10, 20) for link in crowd(stack, crowded, 10, f"127.0.0.{last}", b"GET /re")]
        texts = turned_away(links, 100 - 64)
        assert len(texts) == 100 - 64
        assert all(split(text)[0][0] == 503 and split(text)[0][1]["retry-after"] == "5" for text in texts)
        assert exchange(crowded, b"", "127.0.0.30").startswith(b"HTTP/1.1 503 ")
    wait_until(lambda: is_served(crowded, "127.0.0.30"))
    with contextlib.ExitStack() as stack:
        links = [link for last in range(10, 14) for link in crowd(stack, crowded, 16, f"127.0.0.{last}", get())]
        assert all(read_answer(link).startswith(b"HTTP/1.1 200 ") for link in links)


def test_connections_have_no_threads(tmp_path):
    with running(tmp_path, service(), "[server]\nmax_connections = 1000\n") as host, contextlib.ExitStack() as stack:
        assert host.get("/services").status == 200
        before = status_field(host, "Threads")
        links = crowd(stack, host, 240, "127.0.0.2", b"", b"GET /re", post(length(), body=b"{"), get()[:-2])
        assert host.get("/ready").status == 200
        assert select.select(links, [], [], 0)[0] == []
        assert status_field(host, "Threads") <= before


@contextlib.contextmanager
def limited(host, which: int, value: int):
    """Lower a limit of the running server, as far as the block lasts."""
    soft, hard = resource.prlimit(host.process.pid, which)
    resource.prlimit(host.process.pid, which, (value, hard))
    try:
        yield
    finally:
        resource.prlimit(host.process.pid, which, (soft, hard))


@pytest.mark.parametrize("listen", ['"127.0.0.1:0"', '["127.0.0.1:0", "127.0.0.2:0"]'], ids=["one address", "two addresses"])
def test_a_server_without_descriptors_says_so_once_waits_and_recovers(tmp_path, listen):
    with running(tmp_path, service(), f"[server]\nlisten = {listen}\n") as host:
        ports = [(found[0], int(found[1])) for found in re.findall(r"http://([0-9.]+):(\d+)", host.output.read_text())]
        assert host.get("/services").status == 200
        troubles = lambda: host.output.read_text().count("no connection can be accepted")
        with limited(host, resource.RLIMIT_NOFILE, host.descriptors() + 5), contextlib.ExitStack() as stack:
            links = [stack.enter_context(socket.create_connection(address, support.PATIENCE_S)) for _ in range(15) for address in ports]
            wait_until(troubles)
            before, until = cpu_seconds(host), time.monotonic() + 2
            wait_until(lambda: time.monotonic() > until)
            assert cpu_seconds(host) - before < 1
            links[0].sendall(get())
            assert read_answer(links[0]).startswith(b"HTTP/1.1 200 ")  # who is in is served
            said = [line for line in host.output.read_text().splitlines() if "no connection can be accepted" in line]
            assert len(said) == 1 and "LimitNOFILE" in said[0] and "max_connections" in said[0]
        for address in ports:
            with socket.create_connection(address, support.PATIENCE_S) as link:
                link.sendall(get(b"/ready", CLOSE))
                assert read_to_end(link).startswith(b"HTTP/1.1 200 ")
        assert '"bug"' not in host.output.read_text()


def test_clients_in_the_backlog_are_served_when_descriptors_are_free_again(tmp_path):
    with running(tmp_path, service()) as host:
        assert host.get("/services").status == 200
        with limited(host, resource.RLIMIT_NOFILE, host.descriptors() + 3), contextlib.ExitStack() as stack:
            with contextlib.ExitStack() as first:
                crowd(first, host, 10, "127.0.0.1", b"")
                wait_until(lambda: "no connection can be accepted" in host.output.read_text())
                late = stack.enter_context(connected(host))
                late.sendall(get(b"/ready", CLOSE))
            assert read_to_end(late).startswith(b"HTTP/1.1 200 ")


def test_a_bug_can_be_told_without_a_free_descriptor():
    """The reading thread tells of bugs itself: what fails in telling would end it, and the server with it."""
    script = ("import os, resource, hookshot\n"
              "taken = os.dup(0)\n"
              "resource.setrlimit(resource.RLIMIT_NOFILE, (taken, taken))\n"
              "hookshot.log_event(hookshot.Log(), hookshot.Broken('server', KeyError('x')))\n")
    done = subprocess.run([sys.executable, "-c", script], cwd=support.ROOT, capture_output=True, timeout=support.PATIENCE_S)
    assert done.returncode == 0 and json.loads(done.stderr)["event"] == "bug", done.stderr


def test_a_server_that_gets_no_thread_says_503_and_goes_on(tmp_path):
    with running(tmp_path, service(), "[monitoring]\nstatus_cache_seconds = 1\n") as host:
        assert host.get("/ready").status == 200
        with limited(host, resource.RLIMIT_AS, (status_field(host, "VmSize") + 3000) << 10):
            for path in ("/services", "/health"):
                answer = host.get(path)
                assert (answer.status, answer.json["code"]) == (503, "CONNECTION_LIMIT_EXCEEDED") and int(answer.headers["retry-after"]) > 0
            assert host.post({"service": "web", "image": "app:1"}).status == 503
            assert host.get("/ready").status == 200
        assert host.get("/deployments").json["deployments"] == [] and host.get("/health").status == 200
        host.deploy()
        assert '"bug"' not in host.output.read_text()


def test_a_health_report_is_renewed_after_it_could_not_be_made(tmp_path):
    """A request for it that got no thread must not count as one that is under way for ever."""
    with running(tmp_path, service('["sh", "-c", "until [ -e go ]; do kill -0 $PPID || exit; sleep 0.1; done"]'),
                 "[monitoring]\nstatus_cache_seconds = 1\n") as host:
        deploy_id = host.deploy()
        host.wait(deploy_id, "Deploying")
        assert host.get("/health").status == 200
        with limited(host, resource.RLIMIT_AS, (status_field(host, "VmSize") + 3000) << 10), contextlib.ExitStack() as stack:
            # Stacks of ended threads are kept by the C library: until all of them are in use, a thread can still be had.
            answer = b""
            while b" 503 " not in answer:
                link = stack.enter_context(connected(host))
                link.sendall(get(b"/logs/" + deploy_id.encode() + b"?follow=1"))
                answer = link.recv(1 << 16)
            wait_until(lambda: host.get("/health").status == 503)  # once the report is too old
        (tmp_path / "go").touch()
        host.wait(deploy_id)
        host.data.rename(tmp_path / "moved")
        try:
            wait_until(lambda: host.get("/health").status == 503, patience_s=10)
        finally:
            (tmp_path / "moved").rename(host.data)


def test_large_bodies_at_once_stay_within_their_budget(tmp_path):
    """Six times 19 MB are more than the budget: some are refused, the small deploy is not, and all places come back."""
    size = 19_000_000
    with running(tmp_path, service(), '[server]\nmax_request_size = "20MB"\n') as host, contextlib.ExitStack() as stack:
        head = post(b"Content-Length: %d\r\n" % (size + 1), body=b"").replace(b"sha256=", b"sha256=00")
        links = []
        for _ in range(6):
            link = stack.enter_context(connected(host))
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                link.sendall(head + b"x" * size)
            links.append(link)
        wait_until(lambda: select.select(links, [], [], 0)[0])
        assert status_field(host, "VmHWM") < 300_000
        accepted = host.post({"service": "web", "image": "app:1", "metadata": {"a": "x" * 200}})
        assert accepted.status == 202
        refused = turned_away(links, 1)
        assert 0 < len(refused) < 6 and all(split(text)[0][0] == 503 and split(text)[0][1]["retry-after"] for text in refused if text)
        stack.close()
        wait_until(lambda: exchange(host, head[: head.index(b"Content-Length")] + b"Content-Length: %d\r\n" % size + CLOSE
                                    + head[head.index(b"X-Hub") :] + b"x" * size).startswith(b"HTTP/1.1 401 "))
        assert host.wait(accepted.json["deploy_id"])["status"] == "Succeeded"


def test_a_large_body_is_not_kept_after_its_answer(tmp_path):
    """Neither by connections that stay open nor by closed ones: the budget would be of no use."""
    size = 8_000_000
    head = post(b"Content-Length: %d\r\n" % size, body=b"").replace(b"sha256=", b"sha256=00")
    with running(tmp_path, service(), '[server]\nmax_request_size = "8MB"\n') as host, contextlib.ExitStack() as stack:
        assert host.get("/services").status == 200
        before = status_field(host, "VmHWM")
        for number in range(20):
            with contextlib.ExitStack() as closed:
                link = (closed, stack)[number % 2].enter_context(connected(host))
                link.sendall(head + b"x" * size)
                assert read_answer(link).startswith(b"HTTP/1.1 401 ")
        assert status_field(host, "VmHWM") - before < 60_000


def test_a_100_does_not_move_the_deadline(tmp_path):
    with running(tmp_path, service(), "[server]\nrequest_timeout = 2\n") as host, connected(host) as link:
        link.sendall(post(length(), EXPECTING, body=b"")[:-2])
        began = time.monotonic()
        wait_until(lambda: time.monotonic() - began > 1.5)
        link.sendall(b"\r\n")
        assert read_answer(link).startswith(b"HTTP/1.1 100 ")
        assert read_to_end(link).startswith(b"HTTP/1.1 408 ")
        assert time.monotonic() - began < 3.4  # a new deadline would end after 3.5


def test_a_log_that_nobody_reads_keeps_no_request_waiting(tmp_path):
    """Standard error is a full pipe: refusals go on, their lines are counted, and told of when somebody reads again."""
    host = Host(tmp_path, service(), f'[server]\nlisten = "127.0.0.1:{support.free_port()}"\n')
    read, write = os.pipe()
    os.set_blocking(read, False)
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 8192)
    process = subprocess.Popen([*support.program(), "-c", str(host.config), "run"], stdin=subprocess.DEVNULL, stderr=write)
    os.close(write)
    try:
        host.port = int(re.search(r":(\d+)", host.config.read_text())[1])
        wait_until(lambda: is_served(host, "127.0.0.1"))
        # The last line that comes by itself; from then on all are of refusals.
        wait_until(lambda: select.select([read], [], [], 0)[0] and b'"audit_head"' in os.read(read, 1 << 16))
        for last in range(2, 30):
            for _ in range(10):
                assert exchange(host, get(b"/nothing", CLOSE), f"127.0.0.{last}").startswith(b"HTTP/1.1 404 ")
        said = os.read(read, 1 << 16)
        assert exchange(host, get(b"/nothing", CLOSE), "127.0.0.40").startswith(b"HTTP/1.1 404 ")
        said += os.read(read, 1 << 16)
        [lost] = [line for line in map(json.loads, said.splitlines()) if line["event"] == "log_lost"]
        assert int(lost["message"].split()[-1]) + said.count(b"request_refused") == 281
        process.send_signal(signal.SIGTERM)
        assert process.wait(support.PATIENCE_S) == 0
    finally:
        process.kill()
        process.wait()
        os.close(read)


def test_tiny_chunks_take_no_more_memory_than_they_bring(tmp_path):
    with running(tmp_path, service(), '[server]\nmax_request_size = "4MB"\n') as host:
        before = status_field(host, "VmHWM")
        with connected(host) as link:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                link.sendall(post(CHUNKED, CLOSE, body=b"100\r\n" + b"x" * 256 + b"\r\n" + b"2\r\nxy\r\n" * 900_000))
            host.get("/ready")
            assert status_field(host, "VmHWM") - before < 20_000
