# SPDX-License-Identifier: MPL-2.0
"""SERVER: hostile, broken and slow bytes on a raw socket; each is refused, runs nothing, and the server goes on."""

import contextlib
import json
import socket
import time

import pytest

import hookshot
import support
from support import running, service, wait_until

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
    yield host
    assert host.get("/deployments").json["deployments"] == []
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
def connected(host):
    with socket.create_connection(("127.0.0.1", host.port), support.PATIENCE_S) as link:
        yield link


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


@pytest.mark.parametrize("content, status", ABUSES.values(), ids=ABUSES)
def test_an_ambiguous_request_is_refused_once_and_the_connection_closed(unharmed, content, status):
    [(found, headers, body)] = split(unharmed.raw(content + SMUGGLED))
    assert (found, headers["connection"], headers["content-type"]) == (status, "close", "application/problem+json")
    problem = json.loads(body)
    assert problem["status"] == status and problem["request_id"] == headers["x-request-id"]
    assert "server" not in headers or headers["server"] == "hookshot"


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
