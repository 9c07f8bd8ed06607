# SPDX-License-Identifier: MPL-2.0
"""GET /events and the server-sent events of a log: everything once, in order, whatever happens to reader and server."""

import concurrent.futures
import contextlib
import http.client
import itertools
import json
import random
import re
import signal
import socket
import sqlite3
import ssl
import sys
import threading

import pytest

import hookshot
import support
from support import PATIENCE_S, ROOT, Host, running, service, wait_until

TOKEN = "t0k3n-of-a-reader-0123456789abcdefgh"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
HOLD = '["sh", "-c", "until [ -e $HOOKSHOT_IMAGE ]; do kill -0 $PPID || exit; sleep 0.02; done"]'
SICK = "[service.healthcheck]\ninitial_delay = 0\ninterval = 0\nmax_attempts = 1\nsuccess_threshold = 1\ncommands = [[\"test\", \"-e\", \"well\"]]\n"
ROLLS = SICK + '[service.rollback]\ncommands = [["touch", "well"]]\n'
ROOMY = "[limits]\nmax_queue_per_service = 10000\n[storage.retention]\nsuccessful_deploys = 10000\nfailed_deploys = 10000\n"
# What a reader's socket buffers: little, so that a server notices soon that nobody reads.
SMALL_BUFFER_BYTES = 4096
# Makes each event as long as it can be.
LONG_IMAGE = "app:" + "a" * 500


class Link(http.client.HTTPConnection):
    """HTTP over TCP, TLS or a unix socket, from an address of this host."""

    def __init__(self, url: str, *, source: str = "127.0.0.1", buffer_bytes: int = 0, context: ssl.SSLContext | None = None):
        super().__init__("localhost", timeout=PATIENCE_S)
        self._url, self._source, self._buffer_bytes, self._context = url, source, buffer_bytes, context

    def connect(self) -> None:
        is_unix = self._url.startswith("unix:")
        self.sock = socket.socket(socket.AF_UNIX if is_unix else socket.AF_INET)
        self.sock.settimeout(PATIENCE_S)
        if self._buffer_bytes:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._buffer_bytes)
        if is_unix:
            self.sock.connect(self._url.removeprefix("unix:"))
        else:
            self.sock.bind((self._source, 0))
            self.sock.connect(("127.0.0.1", int(self._url.rpartition(":")[2])))
        if self._context:
            self.sock = self._context.wrap_socket(self.sock, server_hostname="localhost")


class Reader:
    """A client of GET /events, or of another stream of events."""

    def __init__(self, url: str, path: str = "/events", *, after: int | str | None = None, headers: dict[str, str] | None = None, **how):
        self._link = Link(url, **how)
        resume = {} if after is None else {"Last-Event-ID": str(after)}
        self._link.request("GET", path, headers={"Accept": "text/event-stream", **resume, **(headers or {})})
        self.response = self._link.getresponse()
        assert self.response.status == 200, self.response.read()
        self.last_id = ""

    def close(self) -> None:
        self.response.close()
        self._link.close()

    def send(self, content: bytes) -> None:
        self._link.sock.sendall(content)

    def next(self) -> dict[str, str]:
        """Return the next event, a comment under ""; {} at the end of the stream, however it comes."""
        found: dict[str, list[str]] = {}
        with contextlib.suppress(OSError, http.client.HTTPException):
            while line := self.response.readline().decode():
                if line == "\n":
                    self.last_id = found["id"][-1] if "id" in found else self.last_id
                    return {name: "\n".join(values) for name, values in found.items()}
                assert line.endswith("\n")
                name, _, value = line.removesuffix("\n").partition(": ")
                found.setdefault(name, []).append(value)
        return {}

    def begin(self) -> "Reader":
        """Read what a stream begins with: from here on nothing is missed."""
        first = self.next()
        assert first["retry"] == "2000" and first["id"].isdigit() and first.keys() == {"retry", "id"}
        return self

    def events(self):
        """Yield what is no comment and no beginning, until the end."""
        while event := self.next():
            if "data" in event:
                yield event

    def moves(self, number: int) -> list[dict]:
        """Return that many moves, each with its id."""
        found = []
        while len(found) < number:
            event = next(self.events())
            assert event["event"] == "deployment" and event.keys() == {"id", "event", "data"}
            found.append({"id": int(event["id"]), **json.loads(event["data"])})
        return found

    def moves_up_to(self, number: int) -> list[dict]:
        """Return the moves up to the one with this number."""
        found: list[dict] = []
        while not found or found[-1]["id"] < number:
            found += self.moves(1)
        return found


def reading(host: Host, path: str = "/events", **how):
    """Give a reader that has begun."""
    return contextlib.closing(Reader(url_of(host), path, **how).begin())


def url_of(host: Host) -> str:
    return f"http://127.0.0.1:{host.port}"


def kept(host: Host, service: str | None = None, after: int = 0) -> list[dict]:
    """Return the moves that the database has, asked from outside."""
    with contextlib.closing(sqlite3.connect(host.data / "state.db")) as db:
        rows = db.execute("SELECT m.id, d.deploy_id, d.service, d.image, m.state, m.previous, m.at_ms, m.reason FROM moves m "
                          "JOIN deployments d USING (seq) WHERE m.id > ? AND d.service = coalesce(?, d.service) ORDER BY m.id", (after, service)).fetchall()
    names = ("id", "deploy_id", "service", "image", "status", "previous_status", "at", "reason")
    return [dict(zip(names, (*row[:6], hookshot.render_time(row[6]), row[7]))) for row in rows]


def known(moves: list[dict]) -> list[dict]:
    """Return moves without what only an ended deployment has."""
    return [{name: value for name, value in move.items() if name not in ("error", "duration_ms")} for move in moves]


def ids(moves: list[dict]) -> list[int]:
    return [move["id"] for move in moves]


def lines(host: Host, event: str) -> list[dict]:
    return [line for line in map(json.loads, host.output.read_text().splitlines()) if line["event"] == event]


def metric(host: Host, name: str) -> float:
    return float(re.search(rf"^{name} (\S+)$", host.get("/metrics").body.decode(), re.MULTILINE)[1])


def finish(host: Host, number: int = 1, **fields) -> list[str]:
    """Have deployments carried out one after the other and return their ids."""
    found = [host.deploy(**fields) for _ in range(number)]
    for deploy_id in found:
        host.wait(deploy_id)
    return found


@contextlib.contextmanager
def tuned(folder, services: str, config: str = "", **constants):
    """Give a host whose server has other constants."""
    driver = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport hookshot\nvars(hookshot).update({constants!r})\nsys.exit(hookshot.main())\n"
    host = Host(folder, services, config)
    try:
        yield host.start(argv=(sys.executable, "-c", driver))
    finally:
        host.close()


@contextlib.contextmanager
def deploying(host: Host, clients: int, number: int | None = None, **fields):
    """Have clients deploy meanwhile, whatever becomes of it: each `number` times, or until the block ends."""
    over = threading.Event()

    def deploy() -> None:
        for _ in itertools.count() if number is None else range(number):
            if over.is_set():
                return
            with contextlib.suppress(OSError, http.client.HTTPException):
                host.post({"service": "web", "image": "app:1", **fields})

    threads = [threading.Thread(target=deploy) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield
        if number is not None:
            for thread in threads:
                thread.join()
    finally:
        over.set()
        for thread in threads:
            thread.join()


def rest_of(host: Host) -> int:
    """Wait until everything has ended; return the number of the last move."""
    # Hundreds of them, on a machine that has other tests to run too.
    wait_until(lambda: not host.get("/deployments?unfinished=1&limit=1").json["deployments"], patience_s=4 * PATIENCE_S)
    return kept(host)[-1]["id"]


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    services = service() + service(name="api") + service('["false"]', name="bad")
    with running(tmp_path_factory.mktemp("events"), services, ROOMY) as host:
        finish(host)
        yield host


# --- what comes

def test_the_answer_is_a_stream_that_nobody_keeps_or_holds_back(host):
    with contextlib.closing(Reader(url_of(host))) as reader:
        assert reader.response.headers["Content-Type"] == "text/event-stream"
        assert reader.response.headers["Cache-Control"] == "no-store" and reader.response.headers["X-Accel-Buffering"] == "no"
        assert reader.response.headers["Transfer-Encoding"] == "chunked" and reader.response.headers["X-Request-ID"]


@pytest.mark.parametrize("encoding", ["gzip", "gzip, br, *"])
def test_a_stream_is_never_gzipped(host, encoding):
    with contextlib.closing(Reader(url_of(host), "/events?after=0", headers={"Accept-Encoding": encoding})) as reader:
        assert "Content-Encoding" not in reader.response.headers and reader.begin().moves(1)


def test_every_move_of_every_deployment_comes_once_in_order_with_its_id(tmp_path):
    services = service() + service('["false"]', name="bad") + service(name="sick", tables=ROLLS) + service(HOLD, name="held", head='on_busy = "replace"')
    with running(tmp_path, services) as host, reading(host) as reader:
        finish(host, image="app:1")
        finish(host, service="bad")
        finish(host, service="sick", previous_image="app:0")
        held = host.deploy(service="held")
        host.wait(held, "Deploying")
        superseded, last = host.deploy(service="held", image="app:2"), host.deploy(service="held", image="app:1")
        (tmp_path / "app:1").touch()
        assert host.wait(last)["status"] == "Succeeded" and host.wait(superseded)["status"] == "Cancelled"
        expected = kept(host)
        found = reader.moves(len(expected))
        assert known(found) == expected and ids(found) == sorted(set(ids(found)))
        ends = {move["service"]: move for move in found if move["status"] in hookshot.TERMINAL}
        assert [ends[name]["status"] for name in ("web", "bad", "sick", "held")] == ["Succeeded", "Failed", "RolledBack", "Succeeded"]
        assert "Cancelled" in [move["status"] for move in found]
        for move in found:
            assert ("error" in move) == ("duration_ms" in move) == (move["status"] in hookshot.TERMINAL)
        records = {deploy_id: host.record(deploy_id) for deploy_id in {move["deploy_id"] for move in found}}
        for move in ends.values():
            record = records[move["deploy_id"]]
            assert (move["error"], move["duration_ms"]) == (record["error"], record["timings"]["duration_ms"])
        assert {(move["status"], move["at"]) for move in found} == {
            (move["state"], move["at"]) for record in records.values() for move in record["state_transitions"]}


def test_the_order_is_that_of_the_database_whoever_deploys_at_once(tmp_path):
    services = "".join(service(name=f"s{number}") for number in range(8))
    with running(tmp_path, services, ROOMY + "[server]\nworker_threads = 8\n") as host, reading(host) as one, reading(host) as two:
        with contextlib.ExitStack() as stack:
            for number in range(8):
                stack.enter_context(deploying(host, 1, 10, service=f"s{number}"))
        last = rest_of(host)
        found = one.moves_up_to(last)
        assert known(found) == kept(host) and len(found) >= 8 * 10 * 3
        assert two.moves_up_to(last) == found
        for deploy_id in {move["deploy_id"] for move in found}:
            chain = [move for move in found if move["deploy_id"] == deploy_id]
            assert [move["previous_status"] for move in chain] == [None, *(move["status"] for move in chain[:-1])]


def test_after_0_gives_everything_that_is_kept(tmp_path):
    with running(tmp_path, service(), "[storage.retention]\nsuccessful_deploys = 2\n") as host:
        finish(host, 6)
        wait_until(lambda: len(host.get("/deployments").json["deployments"]) == 2)
        expected = kept(host)
        assert expected[0]["id"] > 1
        with reading(host, "/events?after=0") as reader:
            assert known(reader.moves(len(expected))) == expected


def test_moves_that_retention_removed_keep_no_reader_from_going_on(tmp_path):
    """The one that was accepted first ends last: the last moves are those of the one to be removed."""
    config = "[storage.retention]\nsuccessful_deploys = 1\n[limits]\nmax_concurrent_per_service = 2\n"
    with running(tmp_path, service(HOLD), config) as host:
        older, newer = host.deploy(image="app:1"), host.deploy(image="app:2")
        (tmp_path / "app:2").touch()
        host.wait(newer)
        (tmp_path / "app:1").touch()
        wait_until(lambda: host.get(f"/status/{older}").status == 404)
        expected = kept(host)
        with reading(host) as other, reading(host, "/events?after=0") as reader:
            assert int(other.last_id) > expected[-1]["id"]
            assert known(reader.moves(len(expected))) == expected
            finish(host, image="app:1")
            assert ids(reader.moves(1)) == ids(other.moves(1)) == [int(other.last_id)]


def test_a_service_can_be_asked_for_alone(host):
    with reading(host, "/events?service=api") as reader, reading(host, "/events?service=bad&after=0") as bad:
        after = int(reader.last_id)
        for name in ("web", "api", "bad", "api"):
            finish(host, service=name)
        expected = kept(host, "api", after)
        assert known(reader.moves(len(expected))) == expected and len({move["deploy_id"] for move in expected}) == 2
        expected = kept(host, "bad")
        assert known(bad.moves(len(expected))) == expected


def test_an_unknown_service_is_not_found(host):
    answer = host.get("/events?service=nowhere")
    assert (answer.status, answer.json["code"]) == (404, "SERVICE_NOT_FOUND") and "nowhere" in answer.json["detail"]


@pytest.mark.parametrize("after", ["", "-1", "x", "1e3", "1000000000000000000", "%D9%A1"])
def test_an_unreadable_after_is_refused(host, after):
    answer = host.get(f"/events?after={after}")
    assert (answer.status, answer.json["code"]) == (400, "VALIDATION_ERROR") and "after" in answer.json["detail"]
    wait_until(lambda: metric(host, "hookshot_event_streams") == 0)


# --- going on

@pytest.mark.parametrize("last_id", ["", "x", "-1", "1.5", "0x1", "1 ", "9" * 19, "9" * 18, "\u0661"])
def test_an_id_that_is_none_or_from_the_future_means_from_now(host, last_id):
    last = kept(host)[-1]["id"]
    headers = {"Last-Event-ID": last_id.encode()}
    with contextlib.closing(Reader(url_of(host), headers=headers).begin()) as reader:
        # Blanks around a header's value are not part of it.
        assert int(reader.last_id) == (1 if last_id.strip() == "1" else last)
        if last_id.strip() != "1":
            finish(host)
            assert ids(reader.moves(1)) == [last + 1]


def test_the_last_id_goes_before_the_url_that_an_event_source_asks_for_again(host):
    with reading(host, "/events?after=0") as reader:
        first, second = reader.moves(2)
    with reading(host, "/events?after=0", after=first["id"]) as reader:
        assert reader.moves(1) == [second]
    with reading(host, "/events?after=0", after="nonsense") as reader:
        assert reader.moves(1) == [first]


@pytest.mark.parametrize("end", ["disconnect", "restart", "kill -9"])
def test_a_reader_goes_on_in_the_middle_of_a_burst_without_a_gap_or_a_repetition(tmp_path, end):
    with running(tmp_path, service() + service(name="api"), ROOMY + "[server]\nshutdown_timeout = 1\n") as host:
        reader = Reader(url_of(host)).begin()
        found: list[dict] = []
        for _ in range(3):
            with deploying(host, 3), deploying(host, 1, service="api"):
                found += reader.moves(random.randrange(1, 40))
                if end == "restart":
                    host.stop()
                elif end == "kill -9":
                    host.kill()
            reader.close()
            if end != "disconnect":
                host.start()
            reader = Reader(url_of(host), after=reader.last_id).begin()
        found += reader.moves_up_to(rest_of(host))
        reader.close()
        assert known(found) == kept(host)


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_a_reader_that_has_seen_no_move_yet_goes_on_after_a_restart(tmp_path, end):
    """What it has is the id that the stream began with."""
    with running(tmp_path, service()) as host:
        finish(host)
        with reading(host) as reader:
            getattr(host, end)()
            assert list(reader.events()) == []
        host.start()
        finish(host)
        with reading(host, after=reader.last_id) as again:
            expected = kept(host, after=int(reader.last_id))
            assert known(again.moves(len(expected))) == expected and len({move["deploy_id"] for move in expected}) == 1


def test_a_move_that_comes_while_the_first_reader_opens_is_not_left_behind(tmp_path):
    """The move is committed after the newest number was read; what was published of it met no reader."""
    class Busy(hookshot.Store):
        def last_move(self) -> int:
            newest, limits = super().last_move(), hookshot.load_config("", "config.toml", []).limits
            request = hookshot.parse_deploy(hookshot.VerifiedBody("hmac_key", b'{"service": "web", "image": "app:1"}'), None)
            deployment = self.submit(request, hookshot.Trigger("192.0.2.7", "hmac_key", None, "req-1"), 0, limits=limits, on_busy="queue").deployment
            feed.note(hookshot.Accepted(deployment, True, hookshot.Trigger("192.0.2.7", "hmac_key", None, "req-1")))
            return newest

    with contextlib.closing(Busy(str(tmp_path))) as store:
        feed, has_come = hookshot.EventFeed(store, lambda event: None, hookshot.Metrics()), threading.Event()
        feed.on_news = has_come.set
        thread = threading.Thread(target=feed.run, daemon=True)
        thread.start()
        reader = feed.open(None, None, "req-1")
        try:
            assert has_come.wait(PATIENCE_S) and b"id: 1\n" in reader.take(1 << 16)
        finally:
            feed.stop()
            thread.join(PATIENCE_S)


def test_random_disconnects_and_resumptions_give_exactly_the_moves_of_the_database(tmp_path):
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    services = "".join(service(name=f"s{number}") for number in range(3)) + service('["false"]', name="s3")
    over, last = threading.Event(), 0

    def read(number: int) -> list[dict]:
        dice, found, last_id, name = random.Random(seed + number), [], "0", (None, None, None, "s1", "s3")[number % 5]
        while not over.is_set() or int(last_id) < last:
            query = "" if name is None else f"?service={name}"
            reader = Reader(url_of(host), f"/events{query}", after=last_id, buffer_bytes=dice.choice((0, SMALL_BUFFER_BYTES)))
            with contextlib.closing(reader.begin()):
                for _ in range(dice.randrange(200)):
                    if over.is_set() and not (remaining := kept(host, name, int(found[-1]["id"]) if found else 0)):
                        return found
                    found += reader.moves(1)
                    last_id = reader.last_id
        return found

    # Readers that come and go as fast as they can leave connections behind that the server still has to notice the end of.
    with running(tmp_path, services, ROOMY + "[server]\nmax_connections = 4000\n") as host, concurrent.futures.ThreadPoolExecutor(5) as pool:
        readers = [pool.submit(read, number) for number in range(5)]
        with contextlib.ExitStack() as stack:
            for number in range(4):
                stack.enter_context(deploying(host, 1, 75, service=f"s{number}"))
        last = rest_of(host)
        over.set()
        # Wakes whoever waits for a move of its own.
        for number in range(4):
            finish(host, service=f"s{number}")
        expected = kept(host)
        assert len({move["deploy_id"] for move in expected}) == 304
        for number, reader in enumerate(readers):
            found, name = reader.result(PATIENCE_S), (None, None, None, "s1", "s3")[number]
            of_it = [move for move in expected if name in (None, move["service"])]
            assert known(found) == of_it[: len(found)] and len(found) >= len([move for move in of_it if move["id"] <= last])


# --- readers of all kinds

def test_silence_is_broken_by_a_comment(tmp_path):
    with tuned(tmp_path, service(), _FEED_HEARTBEAT_S=0.05) as host, reading(host) as reader:
        assert [reader.next() for _ in range(3)] == [{"": "still here"}] * 3
        finish(host)
        assert reader.moves(1)
        assert any("" in reader.next() for _ in range(20))


def test_silence_is_broken_also_while_other_services_are_busy(tmp_path):
    with tuned(tmp_path, service() + service(name="api"), ROOMY, _FEED_HEARTBEAT_S=1.0) as host, \
            reading(host, "/events?service=api") as reader, deploying(host, 2):
        assert reader.next() == {"": "still here"} and reader.next() == {"": "still here"}


def test_head_answers_ends_and_keeps_the_connection(host):
    with contextlib.closing(Link(url_of(host))) as link:
        for _ in range(3):
            link.request("HEAD", "/events?after=0")
            answer = support.Answer(link.getresponse())
            assert answer.status == 200 and answer.headers["content-type"] == "text/event-stream" and answer.body == b""
            used = link.sock
        link.request("GET", "/ready")
        assert link.getresponse().status == 200 and link.sock is used
    assert metric(host, "hookshot_event_streams") == 0


def receive(link: socket.socket, until: bytes) -> bytes:
    """Return what comes up to some bytes."""
    got = b""
    while until not in got:
        block = link.recv(1 << 16)
        assert block, got
        got += block
    return got


def test_a_client_of_http_1_0_gets_a_stream_without_chunks(tmp_path):
    with running(tmp_path, service()) as host, socket.create_connection(("127.0.0.1", host.port), PATIENCE_S) as link:
        link.sendall(b"GET /events HTTP/1.0\r\nHost: localhost\r\n\r\n")
        got = receive(link, b"retry: 2000\nid: 0\n\n")
        assert b"chunked" not in got.lower()
        finish(host)
        got += receive(link, b'"Succeeded"')
        expected = kept(host)
        host.stop()
        while block := link.recv(1 << 16):
            got += block
        body = got.partition(b"\r\n\r\n")[2]
        assert [int(number) for number in re.findall(rb"^id: (\d+)$", body, re.MULTILINE)] == [0, *ids(expected)]
        assert re.fullmatch(rb"retry: 2000\nid: 0\n\n(id: \d+\nevent: deployment\ndata: [^\n]+\n\n)+", body)


def test_events_come_over_tls_and_over_a_unix_socket(tmp_path):
    certificates = support.make_certificates(tmp_path)
    config = f'[server]\nlisten = ["127.0.0.1:0", "unix:{tmp_path}/socket"]\n[server.tls]\ncert = "{certificates.server}"\nkey = "{certificates.server_key}"\n'
    with contextlib.closing(Host(tmp_path, service(), config)) as host:
        host.tls = ssl.create_default_context(cafile=certificates.ca)
        host.start()
        with contextlib.closing(Reader(url_of(host), context=host.tls).begin()) as secure, \
                contextlib.closing(Reader(f"unix:{tmp_path}/socket").begin()) as local:
            secure.send(b"GET /ready HTTP/1.1\r\n\r\n" * 1000)
            finish(host, 20)
            expected = kept(host)
            assert known(secure.moves(len(expected))) == known(local.moves(len(expected))) == expected
            assert metric(host, "hookshot_event_streams") == 2
            secure.close()
            wait_until(lambda: metric(host, "hookshot_event_streams") == 1)


@pytest.mark.parametrize("mode", ["local", "token", "open"])
def test_who_may_not_read_gets_no_event(tmp_path, mode):
    stranger = {"X-Forwarded-For": "127.0.0.1"}
    with running(tmp_path, service(), f'[security]\nread_access = "{mode}"\n', secrets=f"read_token={TOKEN}\n") as host:
        for origin, (credential, is_right) in itertools.product(({}, stranger), (({}, False), ({"Authorization": f"Bearer {TOKEN[::-1]}"}, False), (BEARER, True))):
            if is_right or mode == "open" or (mode == "local" and not origin):
                with contextlib.closing(Reader(url_of(host), headers={**origin, **credential})) as reader:
                    assert reader.begin()
            else:
                for method in ("GET", "HEAD"):
                    answer = host.request(method, "/events", headers={**origin, **credential})
                    assert answer.status == 401 and answer.headers["www-authenticate"]
                assert host.get("/events?service=nowhere", **origin, **credential).status == 401
        wait_until(lambda: metric_of(host, "hookshot_event_streams") == 0)


def metric_of(host: Host, name: str) -> float:
    return float(re.search(rf"^{name} (\S+)$", host.get("/metrics", **BEARER).body.decode(), re.MULTILINE)[1])


def test_sixty_readers_get_the_same(tmp_path):
    with running(tmp_path, service(), ROOMY) as host, contextlib.ExitStack() as stack:
        readers = [stack.enter_context(reading(host, source=f"127.0.0.{10 + number % 6}")) for number in range(60)]
        assert metric(host, "hookshot_event_streams") == 60
        with deploying(host, 4, 10):
            pass
        last, expected = rest_of(host), kept(host)
        found = [reader.moves_up_to(last) for reader in readers]
        assert known(found[0]) == expected and all(moves == found[0] for moves in found)
        assert host.get("/ready").status == 200


def test_a_client_that_closes_is_forgotten_and_its_place_is_free(tmp_path):
    """Of one address 8 places are given here, to whom 30 readers come one after the other."""
    with running(tmp_path, service(), "[server]\nmax_connections = 8\n") as host:
        for number in range(30):
            with reading(host) as reader:
                if number % 2:
                    finish(host)
                    assert reader.moves(1)
            wait_until(lambda: metric(host, "hookshot_event_streams") == 0)
        wait_until(lambda: metric(host, "hookshot_connections") == 1)
        assert not lines(host, "bug")


@pytest.mark.parametrize("more", [b"GET /ready HTTP/1.1\r\nHost: a\r\n\r\n", b"\0\xff" * 500_000, b"\r\n"], ids=["request", "noise", "line"])
def test_what_a_client_sends_while_it_follows_does_no_harm(host, more):
    with reading(host) as reader:
        after = int(reader.last_id)
        reader.send(more)
        finish(host, 2)
        expected = kept(host, after=after)
        assert known(reader.moves(len(expected))) == expected
        reader.send(more)
        assert host.get("/ready").status == 200
    wait_until(lambda: metric(host, "hookshot_event_streams") == 0)
    assert not lines(host, "bug")


@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_a_client_that_shuts_its_sending_side_is_taken_for_gone(host, version):
    with socket.create_connection(("127.0.0.1", host.port), PATIENCE_S) as link:
        link.sendall(f"GET /events HTTP/{version}\r\nHost: localhost\r\n\r\n".encode())
        receive(link, b"retry")
        wait_until(lambda: metric(host, "hookshot_event_streams") == 1)
        link.shutdown(socket.SHUT_WR)
        wait_until(lambda: metric(host, "hookshot_event_streams") == 0)


@pytest.mark.parametrize("when", ["following", "catching up"])
def test_a_reader_that_takes_nothing_is_dropped_and_told_of_and_can_go_on(tmp_path, when):
    """Over a unix socket, whose buffers do not grow."""
    config = f'[server]\nrequest_timeout = 1\nlisten = ["127.0.0.1:0", "unix:{tmp_path}/socket"]\n'
    with running(tmp_path, service(), ROOMY + config) as host:
        if when == "catching up":
            with deploying(host, 4, 150, image=LONG_IMAGE):
                pass
            rest_of(host)
        with contextlib.closing(Reader(f"unix:{tmp_path}/socket", "/events?after=0")) as reader:
            while not lines(host, "stream_dropped"):
                with deploying(host, 4, 10, image=LONG_IMAGE):
                    pass
            [line] = lines(host, "stream_dropped")
            assert "too slow" in line["message"] and metric(host, "hookshot_event_streams_dropped_total") == 1
            wait_until(lambda: metric(host, "hookshot_event_streams") == 0)
            # What is still in the buffers, its last event perhaps cut off.
            found = [{"id": int(event["id"]), **json.loads(event["data"])} for event in reader.begin().events()]
        last = rest_of(host)
        with reading(host, after=reader.last_id) as again:
            found += again.moves_up_to(last)
        assert known(found) == kept(host)


def test_a_reader_that_has_fallen_behind_is_told_where_to_go_on(tmp_path):
    config = f'[server]\nlisten = ["127.0.0.1:0", "unix:{tmp_path}/socket"]\nrequest_timeout = 300\n'
    with tuned(tmp_path, service(), ROOMY + config, _FEED_MOVES=150) as host:
        with contextlib.closing(Reader(f"unix:{tmp_path}/socket").begin()) as reader:
            # More than the buffers between the two and the moves that are kept ready.
            with deploying(host, 4, 150, image=LONG_IMAGE):
                pass
            rest_of(host)
            *events, last = reader.events()
        found = [{"id": int(event["id"]), **json.loads(event["data"])} for event in events]
        assert last["event"] == "dropped" and json.loads(last["data"]) == {"resume_after": found[-1]["id"]} and int(reader.last_id) == found[-1]["id"]
        [line] = lines(host, "stream_dropped")
        assert f" {found[-1]['id']};" in line["message"] and metric(host, "hookshot_event_streams_dropped_total") == 1
        last_id = kept(host)[-1]["id"]
        assert found[-1]["id"] < last_id
        with reading(host, after=found[-1]["id"]) as again:
            found += again.moves_up_to(last_id)
        assert known(found) == kept(host)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_end_of_the_server_ends_the_streams(tmp_path, number):
    config = "[server]\nrequest_timeout = 300\nshutdown_timeout = 300\n"
    with running(tmp_path, service(), config) as host, contextlib.ExitStack() as stack:
        readers = [stack.enter_context(reading(host)) for _ in range(10)]
        finish(host)
        expected = kept(host)
        assert host.stop(number) == 0
        for reader in readers:
            assert [int(event["id"]) for event in reader.events()] == ids(expected)
        assert not lines(host, "bug") and not lines(host, "stream_dropped")


def test_moves_that_cannot_be_read_for_a_while_come_afterwards(tmp_path):
    """A column has another name for a while: moves are written, and cannot be read in the order of their numbers."""
    def rename(before: str, after: str) -> None:
        with contextlib.closing(sqlite3.connect(host.data / "state.db", timeout=PATIENCE_S)) as db:
            db.execute(f"ALTER TABLE moves RENAME COLUMN {before} TO {after}")

    with tuned(tmp_path, service(), _FEED_RETRY_S=0.05) as host, reading(host) as reader:
        finish(host)
        wait_until(lambda: kept(host))
        found = reader.moves(len(kept(host)))
        rename("id", "number")
        deploy_id = host.deploy()
        wait_until(lambda: lines(host, "events_unreadable"))
        assert "GET /events" in lines(host, "events_unreadable")[0]["message"]
        rename("number", "id")
        host.wait(deploy_id)
        found += reader.moves_up_to(kept(host)[-1]["id"])
        assert known(found) == kept(host) and not lines(host, "bug")


# --- the events of a log

TALKER = """
import sys
for number in range(3000):
    sys.stdout.write(f"line {number} " + "x" * (number % 90) + "\\n")
sys.stdout.flush()
sys.stdout.buffer.write(b"carriage\\rreturn\\r\\n\\n\\n: comment\\ndata: data\\nid: 7\\nevent: end\\n\\xff\\xfe\\x1b[31m \\xe2\\x80\\xa8 \\xc3\\xa9\\n" + b"y" * 300000 + b"\\nno end")
"""


@pytest.fixture(scope="module")
def talked(tmp_path_factory):
    """A host and a deployment that wrote a log that is hard to tell."""
    folder = tmp_path_factory.mktemp("talked")
    with running(folder, service(f'["{sys.executable}", "talker.py"]')) as host:
        (folder / "talker.py").write_text(TALKER)
        [deploy_id] = finish(host)
        yield host, deploy_id


def log_of(host: Host, path: str, after: int | None = None) -> tuple[bytes, list[int], dict[str, str]]:
    """Return what the events of a log make of it, their ids, and the last event."""
    with contextlib.closing(Reader(url_of(host), path, after=after)) as reader:
        *events, end = reader.events()
    return "".join(event["data"] + "\n" for event in events).encode(), [int(event["id"]) for event in events], end


def test_the_events_of_a_log_are_byte_for_byte_the_log_from_wherever_they_are_resumed(talked):
    host, deploy_id = talked
    path, log = f"/logs/{deploy_id}", host.get(f"/logs/{deploy_id}").body
    assert b"line 2999 " in log and b"carriage\\rreturn" in log and b"y" * 1000 in log and b"no end\n" in log and len(log) > 500_000
    text, offsets, end = log_of(host, path)
    assert text == log and offsets[-1] == len(log) and offsets == sorted(set(offsets)) and len(offsets) > 5
    assert end["event"] == "end" and json.loads(end["data"])["status"] == "Succeeded"
    ends = [match.end() for match in re.finditer(b"\n", log)]
    for offset in [0, *offsets, *random.sample(ends, 30)]:
        assert log_of(host, path, offset)[0] == log[offset:]
    assert log_of(host, path, len(log) + 1000)[:2] == (b"", [])


def test_a_log_that_grows_is_followed_and_resumed_to_the_same(tmp_path):
    talker = '["sh", "-c", "for n in 1 2 3 4 5 6 7 8 9; do echo begin $n; until [ -e go$n ]; do kill -0 $PPID || exit; sleep 0.02; done; seq 500; done"]'
    with running(tmp_path, service(talker)) as host:
        deploy_id, last_id, text = host.deploy(), None, ""
        for number in range(1, 10):
            with contextlib.closing(Reader(url_of(host), f"/logs/{deploy_id}", after=last_id)) as reader:
                for event in reader.events():
                    text, last_id = text + event["data"] + "\n", event["id"]
                    if f" out begin {number}\n" in text:
                        break
            (tmp_path / f"go{number}").touch()
        rest, _, end = log_of(host, f"/logs/{deploy_id}", last_id)
        assert (text.encode() + rest) == host.get(f"/logs/{deploy_id}").body and end["event"] == "end"


def test_a_last_line_that_a_full_disk_cut_off_is_an_event_too(tmp_path):
    with running(tmp_path, service('["echo", "hello"]')) as host:
        [deploy_id] = finish(host)
        [file] = (host.data / "logs").iterdir()
        with open(file, "ab") as log:
            log.write(b"cut o")
        text, offsets, end = log_of(host, f"/logs/{deploy_id}")
        assert text == file.read_bytes() + b"\n" and offsets[-1] == len(text) - 1 and end["event"] == "end"
