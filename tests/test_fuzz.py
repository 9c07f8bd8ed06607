# SPDX-License-Identifier: MPL-2.0
"""SERVER: mutated requests, always the same ones; each is answered in proper HTTP or not at all, and none leaves anything behind."""

import json
import os
import random
import re
import socket

import pytest

import hookshot
import support
from support import running, service, wait_until

SEED = 20260301
BODY = json.dumps({"service": "web", "image": "app:1", "dry_run": True}).encode()
SIGNED = b"X-Hub-Signature-256: " + hookshot.sign(support.KEY.encode(), BODY).encode() + b"\r\n"
HOST = b"Host: 127.0.0.1\r\n"
# Every deploy that is rightly signed is a dry run: whatever becomes of a request, none may leave a deployment.
VALID = [
    b"GET /ready HTTP/1.1\r\n" + HOST + b"\r\n",
    b"GET /health HTTP/1.0\r\n\r\n",
    b"HEAD /services HTTP/1.1\r\n" + HOST + b"Accept-Encoding: gzip;q=0.5, *;q=0\r\n\r\n",
    b"GET /deployments?limit=5&status=Failed&cursor=9 HTTP/1.1\r\n" + HOST + b"Authorization: Bearer x\r\nOrigin: http://127.0.0.1\r\n\r\n",
    b"GET /logs/x%20y?tail=5&follow=1 HTTP/1.1\r\n" + HOST + b"Accept: text/event-stream\r\nLast-Event-ID: 5\r\n\r\n",
    b"GET /status/20260101 HTTP/1.1\r\nHost: [::1]:80\r\nX-Forwarded-For: 10.0.0.1, 10.0.0.2\r\n"
    b"Forwarded: for=\"[::1]:5\";proto=http\r\n\r\n",
    b"OPTIONS /deploy HTTP/1.1\r\n" + HOST + b"X-Request-ID: abc\r\nConnection: keep-alive\r\n\r\n",
    b"POST /deploy HTTP/1.1\r\n" + HOST + SIGNED
    + b"Content-Type: application/json; charset=utf-8\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY,
    b"POST /deploy?wait=1 HTTP/1.1\r\n" + HOST + SIGNED
    + b"Prefer: wait=1\r\nIdempotency-Key: \"k\"\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY,
    b"POST /deploy HTTP/1.1\r\n" + HOST + SIGNED
    + b"Transfer-Encoding: chunked\r\n\r\n%x;a=b\r\n" % len(BODY) + BODY + b"\r\n0\r\nA: b\r\n\r\n",
    b"POST /deploy HTTP/1.1\r\n" + HOST + SIGNED
    + b"Transfer-Encoding: chunked\r\n\r\n5\r\n" + BODY[:5] + b"\r\n%x\r\n" % len(BODY[5:]) + BODY[5:] + b"\r\n0\r\n\r\n",
    b"POST /deploy HTTP/1.1\r\n" + HOST
    + b"webhook-id: m1\r\nwebhook-timestamp: 1700000000\r\nwebhook-signature: v1,AAAA v1,BBBB\r\nContent-Length: 2\r\n\r\n{}",
]
PIECES = [b"\r\n", b"\n", b"\r", b"\r\n\r\n", b"\0", b" ", b"\t", b":", b"0", b"-1", b"\xff", b"%00", b"%2e%2e/", b"//", b"?", b"#",
          b"Content-Length: 5\r\n", b"Content-Length: 99999999999\r\n",
          b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: identity\r\n", b"Host: x\r\n", b"Connection: close\r\n",
          b"Expect: 100-continue\r\n", b"HTTP/1.1", b"HTTP/2.0", b"0\r\n\r\n",
          b"ffffffff\r\n", b" folded\r\n", b"x" * 9000, b"A: b\r\n" * 120]


def mutate(chance: random.Random, content: bytes) -> bytes:
    """Return the request with one to four things changed."""
    for _ in range(chance.randint(1, 4)):
        place, end = sorted(chance.randint(0, len(content)) for _ in range(2))
        match chance.randrange(9):
            case 0:  # flip a bit
                flipped = bytes(byte ^ 1 << chance.randrange(8) for byte in content[place : place + 1])
                content = content[:place] + flipped + content[place + 1 :]
            case 1:
                content = content[:place] + bytes([chance.randrange(256)]) + content[place:]
            case 2:
                content = content[:place] + chance.choice(PIECES) + content[place:]
            case 3:  # delete
                content = content[:place] + content[min(end, place + chance.randint(1, 10)) :]
            case 4:  # duplicate
                content = content[:end] + content[place:]
            case 5:  # truncate
                content = content[:place] if chance.random() < 0.3 else content
            case 6:  # splice
                other = chance.choice(VALID)
                content = content[:place] + other[chance.randint(0, len(other)) :]
            case 7:  # a line twice, or elsewhere
                lines = content.split(b"\r\n")
                lines.insert(chance.randint(0, len(lines)), chance.choice(lines))
                content = b"\r\n".join(lines)
            case 8:  # another line end
                ends = [found.start() for found in re.finditer(b"\r\n", content)]
                if ends:
                    place = chance.choice(ends)
                    content = content[:place] + chance.choice([b"\n", b"\r", b"\r\r\n", b"\n\r", b"\r\n\r\n", b"", b"\0\r\n",
                                                               b"\r\n "]) + content[place + 2 :]
    return content


def conversation(chance: random.Random) -> bytes:
    """Return one to four requests for one connection, most of them mutated."""
    return b"".join(mutate(chance, request) if chance.random() < 0.8 else request for request in chance.choices(VALID,
        k=chance.randint(1, 4)))


ALLOWED = {100, 200, 400, 401, 404, 405, 408, 411, 413, 414, 415, 417, 431, 501, 505}
ANSWER = re.compile(rb"HTTP/1\.1 (\d{3}) [A-Za-z -]+\r\n((?:[A-Za-z-]+: [^\r\n\0]*\r\n)*)\r\n")


def statuses(answers: bytes) -> list[int]:
    """Return the status of each answer; fail for what is not exactly a row of answers."""
    found = []
    while answers:
        match = ANSWER.match(answers)
        assert match, answers[:200]
        found.append(int(match[1]))
        assert found[-1] in ALLOWED, answers[:1000]
        answers = answers[match.end() :]
        if found[-1] != 100:
            size = int(re.search(rb"Content-Length: (\d+)\r\n", match[2])[1])
            # To HEAD, the next answer follows at once; no body begins like one.
            if answers and not answers.startswith(b"HTTP/1.1 "):
                assert len(answers) >= size, answers
                answers = answers[size:]
    return found


def exchange(host, *pieces: bytes) -> bytes:
    """Send the pieces, then close that side, and return everything that comes. Each wait has a deadline."""
    with socket.create_connection(("127.0.0.1", host.port), support.PATIENCE_S) as link:
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in pieces:
            link.sendall(piece)
        link.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: link.recv(1 << 16), b""))


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    with running(tmp_path_factory.mktemp("fuzz"), service(), "[server]\nmax_request_size = 2000\nrequest_timeout = 30\n") as host:
        yield host


@pytest.fixture
def unharmed(host):
    """Give the host, and see afterwards that it is as it was."""
    def size():
        return host.descriptors(), len(os.listdir(f"/proc/{host.process.pid}/task"))

    for path in ("/services", "/health", "/deployments"):
        assert host.get(path).status == 200
    descriptors, threads = size()
    yield host
    wait_until(lambda: size()[0] <= descriptors + 3 and size()[1] <= threads + 3)
    assert host.get("/deployments").json["deployments"] == [] and host.get("/ready").status == 200
    assert '"bug"' not in host.output.read_text()


def test_what_is_valid_is_answered(unharmed):
    assert [statuses(exchange(unharmed, request))[-1] for request in VALID] == [200, 200, 200, 200, 404, 401, 405, 200, 200, 200, 200, 401]


@pytest.mark.parametrize("seed", range(10))
def test_mutated_requests_get_proper_answers_and_leave_nothing_behind(unharmed, seed):
    chance = random.Random(SEED + seed)
    answered = 0
    for _ in range(100):
        content = conversation(chance)
        try:
            answered += len(statuses(exchange(unharmed, content)))
        except (AssertionError, OSError) as error:
            raise AssertionError(f"after {content!r}") from error
    assert answered > 100


# A head with two faults may be refused for either, whichever is there first.
MALFORMED = {400, 414, 431, 505}
# Refused by the head alone: the connection goes on only if the body has wholly arrived by then.
BY_THE_HEAD = {401, 404, 405}


def agree(whole: list[int], cut: list[int]) -> bool:
    """Return whether two rows of answers say the same, as far as the timing of segments may not matter."""
    same = all(one == other or {one, other} <= MALFORMED for one, other in zip(whole, cut))
    shorter = min(whole, cut, key=len)
    return same and (len(whole) == len(cut) or bool(shorter) and shorter[-1] in BY_THE_HEAD)


def test_answers_do_not_depend_on_where_segments_end(unharmed):
    """What two readers could cut differently is how requests are smuggled."""
    chance, late = random.Random(SEED), 0
    for _ in range(300):
        content = conversation(chance)
        inside = [found.start() + 1 for found in re.finditer(b"\r\n", content)]
        anywhere = [chance.randint(0, len(content)) for _ in range(chance.randint(1, 20))]
        places = sorted({*anywhere, *chance.sample(inside, len(inside) // 2)})
        pieces = [content[start:end] for start, end in zip([0, *places], [*places, len(content)])]
        whole = [status for status in statuses(exchange(unharmed, content)) if status != 100]
        try:
            cut = [status for status in statuses(exchange(unharmed, *pieces)) if status != 100]
        except (BrokenPipeError, ConnectionResetError):
            # After the answer to a request that ends the connection the rest may come too late: then there is nothing to compare.
            late += 1
            continue
        assert agree(whole, cut), (whole, cut, content, pieces)
    assert late < 150


def test_mutated_heads_are_parsed_or_refused_and_nothing_else():
    chance = random.Random(SEED)
    parsed = 0
    for _ in range(20_000):
        head = mutate(chance, chance.choice(VALID)).partition(b"\r\n\r\n")[0]
        try:
            found = hookshot.parse_head(head)
            length = hookshot.body_length(found, 2000)
        except hookshot.HookshotError as error:
            assert error.kind.http in ALLOWED, head
            continue
        parsed += 1
        assert length is None or 0 <= length <= 2000
        assert found.path.startswith("/") and found.path.isprintable() and not {".", ".."} & {*found.path.split("/")}, head
        assert all(name == name.lower() and not re.search(r"[\r\n\0]", value) for name, value in found.headers.items()), head
        assert "host" in found.headers or not found.is_http_1_1, head
    assert parsed > 1000
