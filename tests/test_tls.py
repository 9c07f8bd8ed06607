# SPDX-License-Identifier: MPL-2.0
"""SERVER over TLS: handshakes good, bad, slow and many; what goes over them; certificates that change and that are wrong."""

import concurrent.futures
import contextlib
import http.client
import itertools
import json
import os
import re
import select
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time

import pytest

import hookshot
from support import PATIENCE_S, Host, make_certificates, need, program, running, service, wait_until

LIMIT = 1 << 20
TALK = ("01234567890123456789012345678901234567890123456789\n", 60_000)
TALKER = f'["sh", "-c", "yes {TALK[0].strip()} | head -n {TALK[1]}"]'
HOLD = '["sh", "-c", "echo begin; until [ -e go ]; do kill -0 $PPID || exit; sleep 0.02; done; echo end"]'
CLOSE = b"Connection: close\r\n"
# The log keeps ten refusals a minute of one address: a test that reads the log comes from an address of its own.
SOURCES = (f"127.0.1.{number}" for number in itertools.count(1))


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    return make_certificates(tmp_path_factory.mktemp("certificates"))


def tls_config(cert, key, client_ca=None, server: str = "", rest: str = "") -> str:
    """Return a config.toml with [server.tls]."""
    asks = f'client_ca = "{client_ca}"\n' if client_ca else ""
    return f'[server]\n{server}\n[server.tls]\ncert = "{cert}"\nkey = "{key}"\n{asks}{rest}'


def trusting(certificates, *cert) -> ssl.SSLContext:
    """Return a client's context that trusts the authority, with a client certificate (its file and its key's) if given."""
    context = ssl.create_default_context(cafile=certificates.ca)
    if cert:
        context.load_cert_chain(*cert)
    return context


@contextlib.contextmanager
def running_tls(folder, certificates, services: str = service(), server: str = "", client_ca=None, rest: str = "", **options):
    """Give a host that speaks TLS with copies of the certificate in its folder, and whose requests trust the authority."""
    folder.mkdir(parents=True, exist_ok=True)
    cert, key = folder / "cert.pem", folder / "key.pem"
    shutil.copy(certificates.server, cert)
    shutil.copy(certificates.server_key, key)
    with running(folder, services, tls_config(cert, key, client_ca, server, rest), **options) as host:
        host.tls = trusting(certificates, *((certificates.client, certificates.client_key) if client_ca else ()))
        yield host


@pytest.fixture(scope="module")
def host(tmp_path_factory, certificates):
    with running_tls(tmp_path_factory.mktemp("tls"), certificates, service() + service(TALKER, name="talker")) as host:
        assert host.urls == [f"https://127.0.0.1:{host.port}"]
        yield host


def deployments(host) -> list[str]:
    return [entry["deploy_id"] for entry in host.get("/deployments").json["deployments"]]


@pytest.fixture
def unharmed(host):
    """Give the host, and see afterwards that nothing ran and that it still answers."""
    before = deployments(host)
    yield host
    assert deployments(host) == before
    assert host.get("/ready").status == 200


@contextlib.contextmanager
def plain(host, source: str = "127.0.0.1", *, window: int = 0):
    """Give a TCP connection to the server without TLS; `window`: a small receive buffer, for a slow reader."""
    with socket.socket() as link:
        link.settimeout(PATIENCE_S)
        if window:
            link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
        link.bind((source, 0))
        link.connect(("127.0.0.1", host.port))
        yield link


@contextlib.contextmanager
def secure(host, context: ssl.SSLContext | None = None, source: str = "127.0.0.1", *, window: int = 0):
    """Give a TLS connection that takes nothing but close_notify for an end."""
    with plain(host, source, window=window) as link:
        with (context or host.tls).wrap_socket(link, server_hostname="localhost", suppress_ragged_eofs=False) as wrapped:
            yield wrapped


def read_to_end(link) -> bytes:
    return b"".join(iter(lambda: link.recv(1 << 16), b""))


def wait_for_end(link) -> None:
    """Wait until the other side has closed, without reading what it said before."""
    poll = select.poll()
    poll.register(link, select.POLLRDHUP)
    assert poll.poll(PATIENCE_S * 1000)


def say(host, content: bytes, context: ssl.SSLContext | None = None, source: str = "127.0.0.1") -> bytes:
    """Send bytes over TLS and return everything until the server says that nothing follows."""
    with secure(host, context, source) as link:
        link.sendall(content)
        return read_to_end(link)


def get(path: bytes = b"/ready", *lines: bytes, version: bytes = b"HTTP/1.1") -> bytes:
    return b"GET " + path + b" " + version + b"\r\nHost: localhost\r\n" + b"".join(lines) + b"\r\n"


def post(host, body: bytes, *lines: bytes) -> bytes:
    """Return the head of a signed POST /deploy; its length must be among `lines`."""
    return b"POST /deploy HTTP/1.1\r\nHost: localhost\r\nX-Hub-Signature-256: " + hookshot.sign(host.key, body).encode() + b"\r\n" \
        + b"".join(lines) + b"\r\n"


def statuses(answers: bytes) -> list[int]:
    """Return the status of each answer with a Content-Length in what a connection gave."""
    found = []
    while answers:
        head, _, rest = answers.partition(b"\r\n\r\n")
        found.append(int(head.split()[1]))
        size = next(int(line.split()[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:"))
        answers = rest[size:]
    return found


def lines_of(host, address: str) -> list[dict]:
    """Return the log's lines about an address."""
    return [line for line in map(json.loads, host.output.read_text().splitlines()) if line.get("address") == address]


def events(host, name: str) -> list[dict]:
    return [line for line in map(json.loads, host.output.read_text().splitlines()) if line["event"] == name]


def client_hello() -> bytes:
    """Return the first bytes of a handshake as Python's client sends them."""
    context, incoming, outgoing = ssl.create_default_context(), ssl.MemoryBIO(), ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing, server_hostname="localhost").do_handshake()
    return outgoing.read()


def padded(document: dict, size: int) -> bytes:
    """Return the JSON of a document in exactly `size` bytes."""
    body = json.dumps(document).encode()
    return body + b" " * (size - len(body))


# --- reading and deploying

def test_tls_answers_reads_and_signed_deploys(host):
    assert host.get("/ready").status == 200
    record = host.wait(host.deploy())
    assert record["status"] == "Succeeded" and record["triggered_by"]["address"] == "127.0.0.1"
    assert host.post({"service": "web", "image": "app:1"}, path="/deploy?wait=20").json["status"] == "Succeeded"


def test_a_wrong_signature_is_refused_over_tls_too(unharmed):
    assert unharmed.post({"service": "web", "image": "app:1"}, key=b"f" * 64).status == 401
    assert unharmed.request("POST", "/deploy", b"{}").status == 401


def test_curl_trusts_the_authority_and_deploys(host, certificates, tmp_path):
    curl, body = need("curl"), tmp_path / "body.json"
    body.write_text('{"service": "web", "image": "app:1"}')

    def call(path: str, *args: str) -> dict:
        done = subprocess.run([curl, "-sS", "--cacert", certificates.ca, "--max-time", str(PATIENCE_S), *args,
                               f"https://localhost:{host.port}{path}"], capture_output=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    assert call("/ready")["ready"] is True
    answer = call("/deploy?wait=20", "--data-binary", f"@{body}", "-H", "Content-Type: application/json",
                  "-H", f"X-Hub-Signature-256: {hookshot.sign(host.key, body.read_bytes())}")
    assert answer["status"] == "Succeeded"


def test_a_client_that_does_not_trust_the_authority_turns_away(unharmed):
    with pytest.raises(ssl.SSLCertVerificationError):
        say(unharmed, get(), ssl.create_default_context())


@pytest.mark.parametrize("headers, status", [
    ({}, 200), ({"Host": "localhost"}, 200), ({"Host": "evil.example"}, 401), ({"X-Forwarded-For": "127.0.0.1"}, 401),
    ({"Forwarded": "for=127.0.0.1"}, 401), ({"Origin": "https://evil.example"}, 401), ({"Origin": "https://localhost:1"}, 200),
    ({"Sec-Fetch-Site": "cross-site"}, 401)])
def test_who_may_read_is_the_same_as_over_tcp(unharmed, headers, status):
    assert unharmed.get("/services", **headers).status == status


def test_reading_may_need_the_token_and_an_address(tmp_path, certificates):
    rest = '[security]\nread_access = "token"\nallowed_ips = ["127.0.0.1"]\n'
    with running_tls(tmp_path, certificates, rest=rest, secrets="read_token=a-token-of-a-reader-0123456789abcdef\n") as host:
        assert host.get("/services").status == 401
        assert host.get("/services", Authorization="Bearer a-token-of-a-reader-0123456789abcdef").status == 200
        assert statuses(say(host, get(b"/ready", CLOSE), source="127.0.0.2")) == [403]


def test_a_unix_socket_beside_tls_speaks_plain_http(tmp_path, certificates):
    with running_tls(tmp_path, certificates, server=f'listen = ["127.0.0.1:0", "unix:{tmp_path}/socket"]') as host:
        assert host.urls == [f"https://127.0.0.1:{host.port}", f"unix:{tmp_path}/socket"] and host.get("/services").status == 200
        with socket.socket(socket.AF_UNIX) as link:
            link.settimeout(PATIENCE_S)
            link.connect(f"{tmp_path}/socket")
            link.sendall(get(b"/services", CLOSE))
            assert read_to_end(link).startswith(b"HTTP/1.1 200 ")


# --- versions and names

@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
def test_tls_1_2_and_1_3_are_spoken(unharmed, version):
    context = ssl.create_default_context(cafile=unharmed.folder / "cert.pem")
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
    with secure(unharmed, context) as link:
        assert link.version() == version.replace("_", ".")
        link.sendall(get(b"/services", CLOSE))
        assert read_to_end(link).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("version", ["TLSv1", "TLSv1_1"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_older_versions_are_refused(unharmed, version):
    source, context = next(SOURCES), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version, context.maximum_version = ssl.TLSVersion[version], ssl.TLSVersion[version]
    with pytest.raises(OSError):
        say(unharmed, get(), context, source)
    [line] = wait_until(lambda: lines_of(unharmed, source))
    assert "unsupported protocol" in line["message"]


@pytest.mark.parametrize("offer, chosen", [(["h2", "http/1.1"], "http/1.1"), (["http/1.1"], "http/1.1"), (["h2"], None), ([], None)])
def test_alpn_says_http_1_1(unharmed, certificates, offer, chosen):
    context = trusting(certificates)
    if offer:
        context.set_alpn_protocols(offer)
    with secure(unharmed, context) as link:
        assert link.selected_alpn_protocol() == chosen
        link.sendall(get(b"/ready", CLOSE))
        assert read_to_end(link).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
def test_a_session_is_taken_up_again_with_its_client_certificate(mutual, certificates, version):
    context = trusting(certificates, certificates.client, certificates.client_key)
    context.maximum_version = ssl.TLSVersion[version]
    with secure(mutual, context) as link:
        link.sendall(get(b"/ready", CLOSE))
        read_to_end(link)
        session = link.session
    with plain(mutual) as link, context.wrap_socket(link, server_hostname="localhost", session=session) as again:
        again.sendall(get(b"/services", CLOSE))
        assert read_to_end(again).startswith(b"HTTP/1.1 200 ") and again.session_reused


# --- much, and slowly

def test_a_body_at_the_limit_is_deployed(host):
    answer = host.post(padded({"service": "web", "image": "app:1"}, LIMIT), path="/deploy?wait=20")
    assert (answer.status, answer.json["status"]) == (200, "Succeeded")


def test_a_body_in_chunks_over_many_records_is_deployed(host):
    body = padded({"service": "web", "image": "app:1"}, 200_000)
    pieces = [body[start : start + 7000] for start in range(0, len(body), 7000)]
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    answer = say(host, post(host, body, b"Transfer-Encoding: chunked\r\n", CLOSE) + chunks + b"0\r\n\r\n")
    assert statuses(answer) == [202]


@pytest.mark.parametrize("lines, status", [(b"Content-Length: 9999999\r\n", 413), (b"Bad : x\r\n", 400)])
def test_a_refusal_reaches_a_client_that_is_still_sending(unharmed, lines, status):
    with secure(unharmed) as link:
        link.sendall(post(unharmed, b"", lines) + b" " * 100_000)
        wait_for_end(link)
        assert unharmed.get("/ready").status == 200  # the server has gone on to others
        for _ in range(10):
            link.sendall(b" " * 30_000)
        assert statuses(read_to_end(link)) == [status]


def test_a_body_that_is_cut_off_runs_nothing(unharmed):
    body = padded({"service": "web", "image": "app:1"}, 20_000)
    with secure(unharmed) as link:
        link.sendall(post(unharmed, body, b"Content-Length: 20000\r\n") + body[:-1])
    with secure(unharmed) as link:
        link.sendall(post(unharmed, body, b"Content-Length: 20000\r\n") + body[:-1])
        with contextlib.suppress(OSError):
            link.unwrap()


@pytest.mark.parametrize("size", [1, 20, 16 << 10])
def test_pipelined_requests_in_records_of_any_size_are_answered_in_order(unharmed, size):
    paths = [b"/ready", b"/nothing", b"/services", b"/health"] * 5
    content = b"".join(get(path, b"X-Request-ID: r%d\r\n" % number) for number, path in enumerate(paths)) + get(b"/ready", CLOSE)
    with secure(unharmed) as link:
        for start in range(0, len(content), size):
            link.sendall(content[start : start + size])
        answers = read_to_end(link)
    assert statuses(answers) == [200, 404, 200, 200] * 5 + [200]
    places = [answers.index(b"X-Request-ID: r%d\r\n" % number) for number in range(len(paths))]
    assert places == sorted(places)


def test_one_connection_carries_many_requests(host):
    with contextlib.closing(http.client.HTTPSConnection("localhost", host.port, timeout=PATIENCE_S, context=host.tls)) as link:
        for number in range(60):
            link.request("GET", ("/ready", "/services", "/nothing")[number % 3])
            response = link.getresponse()
            response.read()
            assert response.status == (200, 200, 404)[number % 3]
            socket_of_all = link.sock if not number else socket_of_all
            assert link.sock is socket_of_all


@pytest.fixture(scope="module")
def talked(host):
    """The id of a deployment whose log has three megabytes."""
    deploy_id = host.deploy(service="talker")
    assert host.wait(deploy_id)["status"] == "Succeeded"
    return deploy_id


def is_whole(log: bytes) -> bool:
    return log.count(TALK[0].encode()) == TALK[1] and log.endswith(b"\n")


def test_a_log_of_megabytes_comes_whole(host, talked):
    assert is_whole(host.get(f"/logs/{talked}").body)


@pytest.mark.parametrize("version", [b"HTTP/1.1", b"HTTP/1.0"])
def test_a_slow_reader_gets_everything_and_its_end_and_keeps_nobody_waiting(host, talked, version):
    with secure(host, window=4096) as link:
        link.sendall(get(f"/logs/{talked}".encode(), CLOSE, version=version))
        blocks = []
        while block := link.recv(4096):
            blocks.append(block)
            if len(blocks) % 100 == 0:
                assert host.get("/ready").status == 200
    head, _, body = b"".join(blocks).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert is_whole(body) if version == b"HTTP/1.0" else body.endswith(b"\r\n0\r\n\r\n")


def test_answers_that_nobody_reads_wait_and_then_come_all(unharmed):
    """More than the kernel holds for a connection: sending blocks in the middle of a record, and goes on later."""
    number = 25_000
    with secure(unharmed, window=1 << 16) as link:
        # Python's own deadline would count the wait for a server that waits for us.
        link.setblocking(False)
        unsent, answers = get() * number + get(b"/ready", CLOSE), []
        while unsent:
            try:
                unsent = unsent[link.send(unsent[: 16 << 10]) :]
            except ssl.SSLWantWriteError:
                # Neither side can send on: the server is as full as it gets.
                assert unharmed.get("/ready").status == 200
                with contextlib.suppress(ssl.SSLWantReadError):
                    answers.append(link.recv(1 << 20))
        link.settimeout(PATIENCE_S)
        answers.append(read_to_end(link))
    assert b"".join(answers).count(b"HTTP/1.1 200 OK\r\n") == number + 1


def sockets(host) -> int:
    """Return how many sockets the server has open."""
    found = 0
    for name in os.listdir(f"/proc/{host.process.pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            found += os.readlink(f"/proc/{host.process.pid}/fd/{name}").startswith("socket:")
    return found


@pytest.mark.parametrize("path", ["/ready", "/logs"])
def test_a_reader_that_takes_nothing_is_gone_after_request_timeout(tmp_path, certificates, path):
    if not os.path.isdir("/proc/self/fd") or os.geteuid() != 0:
        pytest.skip("needs /proc, and root to see what a server has open")
    with running_tls(tmp_path, certificates, service(TALKER.replace(str(TALK[1]), "180000")), server="request_timeout = 1") as host:
        before = sockets(host)
        deploy_id = host.deploy()
        host.wait(deploy_id)
        with secure(host, window=4096) as link:
            link.settimeout(1.0)
            with contextlib.suppress(OSError):
                link.sendall(get(f"/logs/{deploy_id}".encode()) if path == "/logs" else get() * 25_000)
            wait_until(lambda: sockets(host) == before)
            assert host.get("/ready").status == 200
            link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


def test_a_deployment_is_followed_over_tls(tmp_path, certificates):
    with running_tls(tmp_path, certificates, service(HOLD)) as host:
        deploy_id = host.deploy()
        with secure(host) as link:
            link.sendall(get(f"/logs/{deploy_id}".encode(), b"Accept: text/event-stream\r\n", CLOSE))
            got = b""
            while b"-- begin" not in got and b"begin\n" not in got:
                assert (block := link.recv(1 << 16))
                got += block
            (tmp_path / "go").touch()
            got += read_to_end(link)
        assert b"event: end" in got and b'"status":"Succeeded"' in got


def test_a_request_that_does_not_arrive_is_told_so_over_tls(tmp_path, certificates):
    with running_tls(tmp_path, certificates, server="request_timeout = 1") as host:
        assert statuses(say(host, b"GET /ready HTTP/1.1\r\n")) == [408]
        body = b"{}"
        assert statuses(say(host, post(host, body, b"Content-Length: 3\r\n") + body)) == [408]
        assert say(host, b"") == b""
        assert host.get("/deployments").json["deployments"] == []


# --- the end of a connection

@pytest.mark.parametrize("content", [
    get(b"/ready", CLOSE), get(b"/services", CLOSE), get(b"/ready", version=b"HTTP/1.0"), get(b"/nothing", CLOSE), b"nonsense\r\n\r\n",
    get(b"/ready", b"Bad : x\r\n"), b"POST /deploy HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999999\r\n\r\n",
    get(b"/ready", CLOSE) + get(b"/ready")], ids=["quick", "slow", "1.0", "404", "nonsense", "bad header", "too large", "one more"])
def test_the_end_is_said_and_not_only_there(unharmed, content):
    assert len(statuses(say(unharmed, content))) == 1


def test_idle_connections_are_told_the_end_at_a_stop(tmp_path, certificates):
    with running_tls(tmp_path, certificates) as host, secure(host) as used, secure(host) as fresh:
        used.sendall(get())
        assert used.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
        fresh.sendall(get())
        assert fresh.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
        assert host.stop() == 0
        assert (read_to_end(used), read_to_end(fresh)) == (b"", b"")


# --- handshakes that are none

def test_a_client_that_stops_in_the_handshake_is_gone_after_request_timeout_and_blocks_nobody(tmp_path, certificates):
    hello = client_hello()
    with running_tls(tmp_path, certificates, server="request_timeout = 1") as host, contextlib.ExitStack() as stack:
        threads = len(os.listdir(f"/proc/{host.process.pid}/task")) if os.path.isdir("/proc/self/task") else 0
        links = [stack.enter_context(plain(host, next(SOURCES))) for _ in range(40)]
        for number, link in enumerate(links):
            link.sendall((b"", hello[:1], hello[:50], hello)[number % 4])
        assert host.wait(host.deploy())["status"] == "Succeeded"
        assert not threads or len(os.listdir(f"/proc/{host.process.pid}/task")) < threads + 20
        for link in links:
            with contextlib.suppress(ConnectionResetError):
                read_to_end(link)  # its deadline is far beyond request_timeout


@pytest.mark.parametrize("content", [
    get(), b"GET /ready HTTP/1.0\r\n\r\n", b"POST /deploy HTTP/1.1\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"x"])
def test_plain_http_on_the_tls_port_is_told_to_use_https(unharmed, content):
    with plain(unharmed) as link:
        link.sendall(content)
        answer = read_to_end(link)
    assert statuses(answer) == [400] and b"use https://" in answer and b"Connection: close\r\n" in answer


def test_a_tls_hello_on_a_plain_port_is_answered_at_once(tmp_path):
    with running(tmp_path, service(), "[server]\nrequest_timeout = 3600\n") as host:
        began = time.monotonic()
        with plain(host) as link:
            link.sendall(client_hello())
            answer = read_to_end(link)
        assert statuses(answer) == [400] and b"TLS on a plain port" in answer
        with plain(host) as link, pytest.raises(ssl.SSLError, match="(?i)wrong.version"):
            ssl.create_default_context().wrap_socket(link, server_hostname="localhost")
        assert time.monotonic() - began < PATIENCE_S
        assert host.get("/ready").status == 200


def untrusting(host, source: str) -> None:
    say(host, get(), ssl.create_default_context(), source)


def leaving(host, source: str) -> None:
    with plain(host, source) as link:
        link.sendall(client_hello()[:60])
        link.shutdown(socket.SHUT_WR)
        read_to_end(link)


def resetting(host, source: str) -> None:
    with plain(host, source) as link:
        link.sendall(client_hello())
        link.recv(1)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


def raw(content: bytes):
    def attempt(host, source: str) -> None:
        with plain(host, source) as link:
            link.sendall(content)
            read_to_end(link)
    return attempt


ATTEMPTS = {
    "distrust": (untrusting, "unknown ca"), "leaving": (leaving, "the client left|unexpected eof"), "reset": (resetting, "reset|eof|left"),
    "noise": (raw(b"\x16\x03\x01\x00\x05nonsense"), "^[a-z][a-z0-9 ]+$"), "long record": (raw(b"\x16\x03\x01\xff\xff" + bytes(100)), "^[a-z][a-z0-9 ]+$"),
    "wrong version": (raw(b"\x16\x09\x09\x00\x05" + bytes(5)), "^[a-z][a-z0-9 ]+$"), "no ciphers": (raw(
        b"\x16\x03\x01\x00\x2d\x01\x00\x00\x29\x03\x03" + bytes(32) + b"\x00\x00\x02\x00\xff\x01\x00"), "^[a-z][a-z0-9 ]+$")}


@pytest.mark.parametrize("attempt, reason", ATTEMPTS.values(), ids=ATTEMPTS)
def test_a_failed_handshake_is_one_line_of_the_log_with_the_reason(unharmed, attempt, reason):
    source = next(SOURCES)
    with contextlib.suppress(OSError):
        attempt(unharmed, source)
    [line] = wait_until(lambda: lines_of(unharmed, source))
    # A good request that came later is through: nothing more about the first can follow.
    assert unharmed.get("/ready").status == 200 and len(lines_of(unharmed, source)) == 1
    assert (line["event"], line["level"]) == ("request_refused", "warning")
    said, _, why = line["message"].partition("the TLS handshake failed: ")
    assert said == "" and re.search(reason, why)
    assert not events(unharmed, "bug")


def test_many_handshakes_at_once_are_all_answered(host):
    def ask(number: int) -> bool:
        return say(host, get((b"/ready", b"/services")[number % 2], CLOSE), source=f"127.0.2.{number % 8 + 1}").startswith(b"HTTP/1.1 200 ")

    with concurrent.futures.ThreadPoolExecutor(40) as pool:
        assert all(pool.map(ask, range(200)))


def test_connections_beyond_the_limit_are_told_so_and_places_come_back(tmp_path, certificates):
    def is_ready() -> bool:
        with contextlib.suppress(OSError):
            return say(host, get(b"/ready", CLOSE)).startswith(b"HTTP/1.1 200 ")
        return False

    with running_tls(tmp_path, certificates, server="max_connections = 3") as host:
        with contextlib.ExitStack() as stack:
            for _ in range(3):
                stack.enter_context(secure(host))
            for content in (b"", get(), b"x"):
                answer = say(host, content)
                assert statuses(answer) == [503] and b"\r\nRetry-After: 5\r\n" in answer and b"\r\nConnection: close\r\n" in answer
            # Who does not shake hands holds no place, and is gone soon; beyond a number of those, at once.
            with plain(host) as silent:
                assert read_to_end(silent) == b""
            crowd = [stack.enter_context(plain(host)) for _ in range(70)]
            wait_until(lambda: len(select.select(crowd, [], [], 0)[0]) >= 6)
        wait_until(is_ready)


# --- client certificates

@pytest.fixture(scope="module")
def mutual(tmp_path_factory, certificates):
    with running_tls(tmp_path_factory.mktemp("mutual"), certificates, client_ca=certificates.ca) as host:
        yield host


def test_the_right_client_certificate_is_let_in(mutual):
    assert mutual.wait(mutual.deploy())["status"] == "Succeeded"


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
@pytest.mark.parametrize("names, reason, alert", [
    ((), "peer did not return a certificate", "CERTIFICATE_REQUIRED|HANDSHAKE_FAILURE"),
    (("other_client", "other_client_key"), "certificate verify failed", "UNKNOWN_CA")])
def test_without_the_right_client_certificate_nobody_is_let_in(mutual, certificates, version, names, reason, alert):
    before, source = deployments(mutual), next(SOURCES)
    context = trusting(certificates, *(getattr(certificates, name) for name in names))
    context.maximum_version = ssl.TLSVersion[version]
    # With TLS 1.3 a client learns it from what it reads first: nothing is sent here, so that nothing hides the alert.
    with pytest.raises(ssl.SSLError, match=f"(?i){alert}"), secure(mutual, context, source) as link:
        read_to_end(link)
    [line] = wait_until(lambda: lines_of(mutual, source))
    assert reason in line["message"]
    assert deployments(mutual) == before


def test_a_client_that_sends_at_once_learns_what_is_wrong_with_its_certificate(mutual, certificates):
    """The alert must not be lost to a reset, though the server has not read what came after the handshake."""
    body = padded({"service": "web", "image": "app:1"}, 60_000)
    with secure(mutual, trusting(certificates), next(SOURCES)) as link:
        wait_for_end(link)
        assert mutual.get("/ready").status == 200
        link.sendall(post(mutual, body, b"Content-Length: 60000\r\n") + body)
        with pytest.raises(ssl.SSLError, match="(?i)certificate.required"):
            read_to_end(link)
    assert mutual.get("/ready").status == 200


# --- certificates that change

def reload(host, name: str = "reloaded") -> dict:
    """Send SIGHUP and return the line that says how it went."""
    before = len(events(host, name))
    host.process.send_signal(signal.SIGHUP)
    return wait_until(lambda: len(found := events(host, name)) > before and found[-1])


def shown(host, context=None) -> bytes:
    with secure(host, context) as link:
        link.sendall(get(b"/ready", CLOSE))
        assert read_to_end(link).startswith(b"HTTP/1.1 200 ")
        return link.getpeercert(binary_form=True)


def der(path) -> bytes:
    return ssl.PEM_cert_to_DER_cert(path.read_text())


def test_sighup_takes_a_new_certificate_and_leaves_open_connections_alone(tmp_path, certificates):
    with running_tls(tmp_path, certificates) as host, secure(host) as old:
        old.sendall(get(b"/services"))
        assert old.recv(1 << 16).startswith(b"HTTP/1.1 200 ") and shown(host) == der(certificates.server)
        shutil.copy(certificates.renewed, tmp_path / "cert.pem")
        shutil.copy(certificates.renewed_key, tmp_path / "key.pem")
        assert shown(host) == der(certificates.server)
        reload(host)
        assert shown(host) == der(certificates.renewed) and not events(host, "restart_needed")
        old.sendall(get(b"/services", CLOSE))
        assert read_to_end(old).startswith(b"HTTP/1.1 200 ")


def test_a_client_of_an_authority_that_is_gone_gets_one_more_answer(tmp_path, certificates):
    """A connection outlives neither the authority nor the certificate by which it was made."""
    clients = tmp_path / "clients.pem"
    shutil.copy(certificates.ca, clients)
    with running_tls(tmp_path, certificates, client_ca=clients) as host, secure(host) as old:
        old.sendall(get())
        assert old.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
        shutil.copy(certificates.other_ca, clients)
        reload(host)
        old.sendall(get())
        answer = read_to_end(old)
        assert answer.startswith(b"HTTP/1.1 200 ") and b"\r\nConnection: close\r\n" in answer


def test_a_file_that_vanishes_during_a_reload_ends_nothing(tmp_path, certificates):
    with running_tls(tmp_path, certificates) as host:
        (tmp_path / "cert.pem").unlink()
        reload(host, "reload_failed")
        assert shown(host) == der(certificates.server)


def test_sighup_does_not_turn_an_address_plain(tmp_path, certificates):
    """Whether there is TLS at all needs a restart, as the rest of [server] does."""
    with running_tls(tmp_path, certificates) as host:
        text = host.config.read_text()
        host.config.write_text("".join(line for line in text.splitlines(True) if not line.startswith(("[server.tls]", "cert =", "key ="))))
        assert host.config.read_text() != text
        reload(host)
        assert shown(host) == der(certificates.server)
        assert "need a restart" in events(host, "restart_needed")[-1]["message"]


def break_mismatch(folder, certificates):
    shutil.copy(certificates.renewed_key, folder / "key.pem")


def break_garbage(folder, certificates):
    shutil.copy(certificates.garbage, folder / "cert.pem")


def break_missing(folder, certificates):
    (folder / "cert.pem").unlink()


def break_locked(folder, certificates):
    shutil.copy(certificates.locked_key, folder / "key.pem")


def break_empty(folder, certificates):
    (folder / "key.pem").write_text("")


@pytest.mark.parametrize("damage", [break_mismatch, break_garbage, break_missing, break_locked, break_empty])
def test_sighup_with_a_bad_certificate_keeps_the_old_one_and_says_why(tmp_path, certificates, damage):
    with running_tls(tmp_path, certificates) as host:
        damage(tmp_path, certificates)
        reload(host, "reload_failed")
        line = events(host, "reload_problem")[-1]
        assert line["level"] == "error" and "server.tls" in line["message"] and "pem" in line["message"]
        assert shown(host) == der(certificates.server) and host.wait(host.deploy())["status"] == "Succeeded"
        shutil.copy(certificates.renewed, tmp_path / "cert.pem")
        shutil.copy(certificates.renewed_key, tmp_path / "key.pem")
        reload(host)
        assert shown(host) == der(certificates.renewed)


def test_sighup_takes_another_authority_of_clients(tmp_path, certificates):
    clients = tmp_path / "clients.pem"
    shutil.copy(certificates.ca, clients)
    ours, theirs = (trusting(certificates, *pair) for pair in ((certificates.client, certificates.client_key),
                                                                (certificates.other_client, certificates.other_client_key)))
    with running_tls(tmp_path, certificates, client_ca=clients) as host:
        shown(host, ours)
        shutil.copy(certificates.other_ca, clients)
        reload(host)
        shown(host, theirs)
        with pytest.raises(OSError):
            shown(host, ours)


# --- certificates that are wrong from the start

BAD_FILES = {
    "no cert": ({"cert": "/nonexistent/cert.pem"}, "server.tls.cert", "cannot be read"),
    "no key": ({"key": "/nonexistent/key.pem"}, "server.tls.key", "cannot be read"),
    "no client_ca": ({"client_ca": "/nonexistent/ca.pem"}, "server.tls.client_ca", "cannot be read"),
    "a folder": ({"cert": "/"}, "server.tls.cert", "cannot be read"),
    "garbage cert": ({"cert": "garbage"}, "server.tls.cert", "garbage.pem .*cannot be used"),
    "garbage key": ({"key": "garbage"}, "server.tls.key", "garbage.pem holds no private key in PEM"),
    "key as cert": ({"cert": "server_key"}, "server.tls.cert", "server_key.pem holds no certificate in PEM"),
    "cert as key": ({"key": "server"}, "server.tls.key", "server.pem holds no private key in PEM"),
    "another's key": ({"key": "renewed_key"}, "server.tls.key", "renewed_key.pem do not belong together"),
    "a key of another kind": ({"key": "rsa_key"}, "server.tls.key", "rsa_key.pem do not belong together"),
    "a passphrase": ({"key": "locked_key"}, "server.tls.key", "locked_key.pem has a passphrase"),
    "garbage client_ca": ({"client_ca": "garbage"}, "server.tls.client_ca", "holds no certificates"),
    "key as client_ca": ({"client_ca": "client_key"}, "server.tls.client_ca", "holds no certificates"),
    "cert alone": ({"key": ""}, "server.tls.key", "is required"),
    "key alone": ({"cert": ""}, "server.tls.cert", "is required"),
    "relative": ({"cert": "cert.pem"}, "server.tls.cert", "is not an absolute path"),
}


@pytest.mark.parametrize("command", ["run", "validate"])
@pytest.mark.parametrize("files, path, words", BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_one_clear_line_and_exit_78(tmp_path, certificates, command, files, path, words):
    named = {"cert": "server", "key": "server_key", "client_ca": "ca"} | files
    cert, key, client_ca = (str(getattr(certificates, named[name], named[name])) for name in ("cert", "key", "client_ca"))
    host = Host(tmp_path, service(), tls_config(cert, key, client_ca))
    done = subprocess.run([*program(), "-c", str(host.config), command], stdin=subprocess.DEVNULL, capture_output=True,
                          timeout=PATIENCE_S, start_new_session=True)
    heading, *lines = done.stderr.decode().splitlines()
    assert done.returncode == 78 and heading == f"{host.config}: 1 problem"
    assert len(lines) == 1 and lines[0].startswith(f"  {path}: ") and re.search(words, lines[0])
    assert not host.data.exists()


@pytest.fixture(scope="module")
def odd_certificates(tmp_path_factory):
    """Pairs (certificate, key) that work, and that clients refuse; and one that OpenSSL refuses."""
    folder, openssl, faketime = tmp_path_factory.mktemp("odd"), need("openssl"), need("faketime")
    pairs = {}
    for name, shift, kind in (("expired", "-30d", ("ec", "-pkeyopt", "ec_paramgen_curve:P-256")), ("early", "+30d", ("ec", "-pkeyopt", "ec_paramgen_curve:P-256")),
                              ("weak", "-1d", ("rsa:1024",))):
        cert, key = pairs[name] = (folder / f"{name}.pem", folder / f"{name}.key")
        subprocess.run([faketime, "-f", shift, openssl, "req", "-x509", "-newkey", *kind, "-nodes", "-days", "2", "-subj", "/CN=odd",
                        "-keyout", key, "-out", cert], check=True, capture_output=True)
    return pairs


def validate(host) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([*program(), "-c", str(host.config), "validate"], capture_output=True, timeout=PATIENCE_S, text=True)


@pytest.mark.parametrize("name, status, words", [
    ("expired", 0, "warning: server.tls.cert: clients will not trust .*: certificate has expired"),
    ("early", 0, "warning: server.tls.cert: clients will not trust .*: certificate is not yet valid"),
    ("weak", 78, "server.tls.cert: .* cannot be used: .*key too small")])
def test_a_certificate_that_clients_refuse_is_told(tmp_path, odd_certificates, name, status, words):
    cert, key = odd_certificates[name]
    done = validate(Host(tmp_path, service(), tls_config(cert, key)))
    assert done.returncode == status and re.search(words, done.stderr)


def test_an_expired_certificate_is_told_at_the_reload_that_brings_it(tmp_path, certificates, odd_certificates):
    with running_tls(tmp_path, certificates) as host:
        for source, name in zip(odd_certificates["expired"], ("cert.pem", "key.pem"), strict=True):
            shutil.copy(source, tmp_path / name)
        reload(host)
        assert any("certificate has expired" in line["message"] for line in events(host, "config_warning"))


def test_a_key_that_every_user_can_read_is_worth_a_warning(tmp_path, certificates):
    key = tmp_path / "key.pem"
    shutil.copy(certificates.server_key, key)
    for mode, is_told in ((0o600, False), (0o640, False), (0o644, True)):
        key.chmod(mode)
        done = validate(Host(tmp_path, service(), tls_config(certificates.server, key)))
        assert done.returncode == 0 and ("server.tls.key: " in done.stderr and "chmod o=" in done.stderr) == is_told


def test_key_updates_are_taken_in_stride(host, certificates):
    """The client renews its keys (TLS 1.3), with and without asking for the same; neither is data."""
    openssl = need("openssl")
    process = subprocess.Popen([openssl, "s_client", "-connect", f"127.0.0.1:{host.port}", "-CAfile", str(certificates.ca), "-tls1_3"],
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said = b""

    def is_said(words: bytes, times: int = 1) -> bool:
        nonlocal said
        if select.select([process.stdout], [], [], 0)[0]:
            said += os.read(process.stdout.fileno(), 1 << 16)
        return said.count(words) >= times

    try:
        wait_until(lambda: is_said(b"Verify return code: 0"))
        for times, line in enumerate((b"k\n", b"K\n", b"k\n", b"K\n"), 1):
            os.write(process.stdin.fileno(), line)
            wait_until(lambda: is_said(b"KEYUPDATE", times))
        os.write(process.stdin.fileno(), get(b"/ready", CLOSE))
        wait_until(lambda: is_said(b"HTTP/1.1 200 "))
    finally:
        process.kill()
        process.wait()


def test_good_files_validate(tmp_path, certificates):
    host = Host(tmp_path, service(), tls_config(certificates.server, certificates.server_key, certificates.ca))
    done = subprocess.run([*program(), "-c", str(host.config), "validate"], capture_output=True, timeout=PATIENCE_S)
    assert (done.returncode, done.stderr) == (0, b"")


def test_nothing_here_made_the_server_report_a_bug(host, mutual):
    assert not events(host, "bug") and not events(mutual, "bug")
    assert host.get("/ready").status == 200 and mutual.get("/ready").status == 200
