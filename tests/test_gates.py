# SPDX-License-Identifier: MPL-2.0
"""Gates: who gets in, from where, how often and how signed; whoever does not learns nothing, and nothing ran."""

import base64
import collections
import concurrent.futures
import contextlib
import gzip
import hashlib
import hmac
import http.client
import ipaddress
import itertools
import json
import re
import select
import signal
import socket
import sqlite3
import threading
import time
import zlib

import pytest

import hookshot
import support
from support import Host, running, service, wait_until

TOKEN = "t0k3n-of-a-reader-0123456789abcdefgh"
TEAM_KEY = "7e57ab1e5eed0ddba11c0ffeefacade5ca1ab1ecafed00dbaadf00dfeedc0de1"
STRANGER = hashlib.sha256(b"stranger").hexdigest()
WHSEC = "whsec_" + base64.b64encode(bytes(range(32))).decode()
BEARER = {"Authorization": f"Bearer {TOKEN}"}
BODY = json.dumps({"service": "web", "image": "app:1"}).encode()
# Each run leaves a line with its image.
MARK = '["sh", "-c", "echo $HOOKSHOT_IMAGE >> ran"]'
SCOPED = service(MARK) + service(MARK, name="team").replace("[service.security]\n", '[service.security]\nhmac_keys = ["team_key"]\n')
SERIAL = itertools.count()


def count(host: Host, table: str = "deployments") -> int:
    """Return how many rows a table has."""
    with contextlib.closing(sqlite3.connect(host.data / "state.db")) as db:
        return db.execute(f"SELECT count(*) FROM {table}").fetchone()[0]


def runs(host: Host) -> list[str]:
    """Return the images that ran, in order."""
    file = host.folder / "ran"
    return file.read_text().split() if file.exists() else []


def lines(host: Host, event: str, **fields: str) -> list[dict]:
    """Return the log's lines of an event with these fields."""
    found = [line for line in map(json.loads, host.output.read_text().splitlines()) if line["event"] == event]
    return [line for line in found if fields.items() <= line.items()]


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """A server for what needs no configuration of its own."""
    config = "[limits]\nmax_queue_per_service = 10000\n"
    secrets = f"read_token={TOKEN}\nteam_key={TEAM_KEY}\n"
    with running(tmp_path_factory.mktemp("gates"), SCOPED, config, secrets=secrets) as host:
        yield host


@pytest.fixture
def unharmed(host):
    """Give the host, and see afterwards that nothing was accepted and that it still answers."""
    before = [count(host, table) for table in ("deployments", "messages")]
    yield host
    assert [count(host, table) for table in ("deployments", "messages")] == before
    assert host.get("/ready").status == 200


def connected(port: int, address: str = "127.0.0.1", source: str | None = None):
    """Return a connection to an address of this host, from one of its addresses, that is closed with the block."""
    source_address = (source, 0) if source else None
    return contextlib.closing(http.client.HTTPConnection(address, port, timeout=support.PATIENCE_S, source_address=source_address))


def request_from(host: Host, source: str, method: str, path: str, body: bytes | None = None, headers: dict | None = None) -> support.Answer:
    """Send a request from another address of the loopback network."""
    with connected(host.port, source=source) as link:
        link.request(method, path, body, headers or {})
        return support.Answer(link.getresponse())


def ask(link: http.client.HTTPConnection, method: str, path: str, headers: list[tuple[str, str]], body: bytes | None = None):
    """Send a request whose headers may repeat, on a connection that is kept."""
    names = {name.lower() for name, _ in headers}
    link.putrequest(method, path, skip_host="host" in names, skip_accept_encoding=True)
    for name, value in headers + ([("Content-Length", str(len(body)))] if body is not None else []):
        link.putheader(name, value)
    link.endheaders(body)
    return support.Answer(link.getresponse())


def webhook(body: bytes, message_id: str = "msg_1", at_s: int | None = None, key: bytes = support.KEY.encode()) -> dict[str, str]:
    """Return the headers of Standard Webhooks, made from its specification alone."""
    at_s = int(time.time()) if at_s is None else at_s
    signature = base64.b64encode(hmac.new(key, f"{message_id}.{at_s}.".encode() + body, hashlib.sha256).digest()).decode()
    return {"webhook-id": message_id, "webhook-timestamp": str(at_s), "webhook-signature": f"v1,{signature}"}


def body_of(image: str, **fields) -> bytes:
    return json.dumps({"service": "web", "image": image, **fields}).encode()


def send(host: Host, message_id: str, body: bytes = BODY, *, headers: dict[str, str] | None = None, **how) -> support.Answer:
    """Send a message of Standard Webhooks to /deploy."""
    return host.request("POST", "/deploy", body, {**webhook(body, message_id, **how), **(headers or {})})


# --- every route, every credential, every place

def hub(key: str, body: bytes) -> list[tuple[str, str]]:
    return [("X-Hub-Signature-256", hookshot.sign(key.encode(), body))]


def fresh(body: bytes, **how) -> list[tuple[str, str]]:
    return list(webhook(body, f"msg_{next(SERIAL)}", **how).items())


# What a request carries, and whether that signs and whether it reads.
CREDENTIALS = {
    "none": (lambda body: [], False, False),
    "wrong signature": (lambda body: hub(STRANGER, body), False, False),
    "signature of another body": (lambda body: hub(support.KEY, body + b" "), False, False),
    "X-Hub-Signature-256": (lambda body: hub(support.KEY, body), True, False),
    "Standard Webhooks": (lambda body: fresh(body), True, False),
    "Standard Webhooks, wrong key": (lambda body: fresh(body, key=STRANGER.encode()), False, False),
    "Standard Webhooks, stale": (lambda body: fresh(body, at_s=int(time.time()) - 1000), False, False),
    "Standard Webhooks, future": (lambda body: fresh(body, at_s=int(time.time()) + 1000), False, False),
    "Standard Webhooks wrong, X-Hub-Signature-256 right": (
        lambda body: fresh(body, key=STRANGER.encode()) + hub(support.KEY, body), False, False),
    "wrong token": (lambda body: [("Authorization", "Bearer " + TOKEN[::-1])], False, False),
    "token": (lambda body: [("Authorization", f"Bearer {TOKEN}")], False, True),
    "token as a password": (
        lambda body: [("Authorization", "Basic " + base64.b64encode(f"x:{TOKEN}".encode()).decode())], False, False),
    "token under another scheme": (lambda body: [("Authorization", f"Token {TOKEN}")], False, False),
    "token without a scheme": (lambda body: [("Authorization", TOKEN)], False, False),
    "empty token": (lambda body: [("Authorization", "Bearer ")], False, False),
    "the signing key as a token": (lambda body: [("Authorization", f"Bearer {support.KEY}")], False, False),
    "key of another service": (lambda body: hub(TEAM_KEY, body), False, False),
    "two signatures": (lambda body: hub(support.KEY, body) * 2, None, None),
    "right and wrong signature": (lambda body: hub(STRANGER, body) + hub(support.KEY, body), None, None),
    "in the query": (lambda body: [], False, False),
}
QUERY = f"?token={TOKEN}&read_token={TOKEN}&access_token={TOKEN}&authorization=Bearer+{TOKEN}&x-hub-signature-256=" \
        + hookshot.sign(support.KEY.encode(), BODY)
PLACES = {"here": [], "behind a proxy": [("X-Forwarded-For", "127.0.0.1")], "under another name": [("Host", "evil.example")],
          "from another site": [("Origin", "https://evil.example")], "cross-site": [("Sec-Fetch-Site", "cross-site")]}
# What a request that is let in gets; whoever adds a route says so here.
CONTROL = {route.pattern for route in hookshot.ROUTES if route.gate == "signature"} - {"/deploy"}
# A deploy is no control request; tests/test_control.py sends what is.
STATUS_OF = collections.defaultdict(lambda: 200, {"/deploy": 202, **dict.fromkeys(CONTROL, 400)})


def expected_status(route: hookshot.Route, signs: bool | None, reads: bool | None, *, is_here: bool, access: str, has_time: bool) -> int:
    if signs is None:
        return 400
    if route.pattern in CONTROL and not has_time:
        return 401
    may = {"open": True, "signature": signs, "read": reads or access == "open" or (access == "local" and is_here)}[route.gate]
    return STATUS_OF[route.pattern] if may else 401


@pytest.fixture(scope="module", params=["local", "token", "open"])
def guarded(request, tmp_path_factory):
    config = f'[security]\nread_access = "{request.param}"\n[limits]\nmax_queue_per_service = 10000\n'
    secrets = f"read_token={TOKEN}\nteam_key={TEAM_KEY}\n"
    with running(tmp_path_factory.mktemp(request.param), SCOPED, config, secrets=secrets) as host:
        assert host.post({"service": "web", "image": "app:1", "deploy_id": "first"}, headers={"X-Request-ID": "req-first"}).status == 202
        names = {"{id}": "first", "{name}": "web", "{request_id}": "req-first"}
        wait_until(lambda: runs(host))
        yield host, request.param, names


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("credential", CREDENTIALS)
def test_every_route_lets_in_whom_its_gate_says(guarded, credential, place):
    host, access, names = guarded
    make, signs, reads = CREDENTIALS[credential]
    query = QUERY if credential == "in the query" else ""
    with connected(host.port) as link:
        for route, is_head in itertools.product(hookshot.ROUTES, (False, True)):
            if is_head and route.method != "GET" or route.pattern == "/events":
                continue  # It has no end; tests/test_events.py asks it for its credential.
            path = "/".join(names[part] if part.startswith("{") else part for part in route.pattern.split("/"))
            body = body_of("app:1", metadata={"n": next(SERIAL)}) if route.method == "POST" else None
            before = count(host), count(host, "messages")
            answer = ask(link, "HEAD" if is_head else route.method, path + query, make(body or b"") + PLACES[place], body)
            wanted = expected_status(route, signs, reads, is_here=place == "here", access=access, has_time=credential.startswith("Standard"))
            assert answer.status == wanted, (route.method, route.pattern, answer.body)
            assert not any(name.startswith("access-control-") for name in answer.headers)
            if wanted in (400, 401) or route.method == "GET":
                assert (count(host), count(host, "messages")) == before
            if wanted == 401:
                assert answer.headers["www-authenticate"]
                assert is_head or answer.json["code"] == "AUTHENTICATION_ERROR"


def test_what_the_matrix_tried_left_no_secret_in_the_log(guarded):
    host, _, _ = guarded
    assert host.request("POST", "/deploy", BODY, {"X-Hub-Signature-256": "sha256=00"}).status == 401
    said = host.output.read_text()
    assert not [secret for secret in (support.KEY, TEAM_KEY, TOKEN, QUERY[-64:], "v1,") if secret in said]
    assert lines(host, "request_refused")


def test_without_a_token_an_empty_one_opens_nothing(tmp_path):
    with running(tmp_path, service(MARK)) as host:
        for header in ("Bearer", "Bearer ", 'Bearer ""', "Bearer None", "", "bearer  "):
            answer = host.get("/services", **{"X-Forwarded-For": "127.0.0.1", "Authorization": header})
            assert answer.status == 401
        assert host.get("/services").status == 200


def told(answer: support.Answer) -> tuple:
    """Return all that an answer tells, but for what differs between any two requests.

    Without `Connection` too: who is refused by his head before his body is there sees the connection end.
    """
    document = {name: value for name, value in answer.json.items() if name not in ("request_id", "timestamp")}
    headers = {name: value for name, value in answer.headers.items() if name not in ("date", "x-request-id", "connection")}
    assert "request_id" in answer.json and len(answer.json["request_id"]) == len(answer.headers["x-request-id"])
    return answer.status, document, headers


STRANGERS = {
    "unsigned": lambda body: {}, "wrongly signed": lambda body: {"X-Hub-Signature-256": "sha256=" + "0" * 64},
    "not even hex": lambda body: {"X-Hub-Signature-256": "x"}, "empty": lambda body: {"X-Hub-Signature-256": ""},
    "wrong message": lambda body: webhook(body, key=STRANGER.encode()),
    "stale and wrong": lambda body: webhook(body, at_s=1, key=STRANGER.encode()),
    "no timestamp": lambda body: {"webhook-id": "a", "webhook-signature": "v1,AAAA"},
    "bad timestamp": lambda body: {**webhook(body), "webhook-timestamp": "soon"},
    "bad id": lambda body: {**webhook(body), "webhook-id": "a.b"},
    "unknown version": lambda body: {**webhook(body), "webhook-signature": "v9,AAAA"},
    "another service's key": lambda body: {"X-Hub-Signature-256": hookshot.sign(TEAM_KEY.encode(), body)},
    "another service's message": lambda body: webhook(body, f"msg_{next(SERIAL)}", key=TEAM_KEY.encode()),
    "with a token": lambda body: BEARER,
}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_a_stranger_is_told_the_same_whatever_he_asks_for(unharmed, stranger):
    """Known, unknown and disabled services, wrong keys and none: one answer (OliveTin CVE-2026-48709)."""
    reference = told(unharmed.request("POST", "/deploy", BODY))
    assert reference[0] == 401
    for name in ("web", "nowhere"):
        body = json.dumps({"service": name, "image": "app:1"}).encode()
        assert told(unharmed.request("POST", "/deploy", body, STRANGERS[stranger](body))) == reference


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"service":"web"}', b"\xff", b"x" * 100_000],
                         ids=["empty", "half", "list", "short", "noise", "long"])
@pytest.mark.parametrize("stranger", ["unsigned", "wrongly signed", "wrong message"])
def test_a_strangers_body_is_not_looked_at(unharmed, stranger, body):
    headers = {"Content-Type": "text/plain", "Content-Encoding": "gzip", **STRANGERS[stranger](body)}
    answer = unharmed.request("POST", "/deploy", body, headers)
    reference = told(unharmed.request("POST", "/deploy", BODY))
    assert told(answer) == reference


def test_unknown_paths_say_nothing_of_what_there_is(unharmed):
    assert {unharmed.get(path).status for path in ("/", "/admin", "/deploy/", "/services/", "/services/web/", "/.env", "/DEPLOY")} == {404}


# --- POST only

OVERRIDES = {"X-HTTP-Method-Override": "POST", "X-HTTP-Method": "POST", "X-Method-Override": "POST"}


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "post", "QUERY"])
def test_only_post_deploys(unharmed, method):
    headers = {"X-Hub-Signature-256": hookshot.sign(unharmed.key, BODY), "Content-Type": "application/json", **OVERRIDES}
    for path in ("/deploy", "/deploy?_method=POST&method=POST"):
        answer = unharmed.request(method, path, BODY, headers)
        assert (answer.status, answer.headers["allow"]) == (405, "POST")
        assert answer.body == b"" if method == "HEAD" else answer.json["code"] == "METHOD_NOT_ALLOWED"
        assert not any(name.startswith("access-control-") for name in answer.headers)


@pytest.mark.parametrize("pattern", sorted({route.pattern for route in hookshot.ROUTES if route.method == "GET"}))
def test_a_route_for_reading_takes_no_other_method(unharmed, pattern):
    path = pattern.replace("{id}", "x").replace("{name}", "web")
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        answer = unharmed.request(method, path, BODY, {"X-Hub-Signature-256": hookshot.sign(unharmed.key, BODY), **BEARER})
        assert answer.status == 405
        allowed = {route.method for route in hookshot.ROUTES if route.pattern == pattern} | {"HEAD"}
        assert set(answer.headers["allow"].split(", ")) == allowed


def test_a_method_override_makes_no_get_of_a_post(unharmed):
    answer = unharmed.request("POST", "/deploy", BODY, {"X-HTTP-Method-Override": "GET"})
    assert answer.status == 401


# --- Standard Webhooks on a server

@pytest.fixture(scope="module")
def inbox(tmp_path_factory):
    """A server that keeps one deployment, and takes any number of messages."""
    config = "[storage.retention]\nsuccessful_deploys = 1\nfailed_deploys = 1\n[limits]\nmax_queue_per_service = 10000\n"
    with running(tmp_path_factory.mktemp("inbox"), service(MARK), config) as host:
        yield host


def test_a_message_that_comes_again_is_the_same_deployment(inbox):
    body = body_of("app:again")
    first = send(inbox, "again", body)
    assert first.status == 202
    inbox.wait(first.json["deploy_id"])
    now_s = int(time.time())
    # As it was, and as senders repeat it: the same id, signed anew with the time of the new attempt.
    for again in (send(inbox, "again", body), send(inbox, "again", body, at_s=now_s + 10), send(inbox, "again", body, at_s=now_s - 10)):
        assert (again.status, again.json["deploy_id"]) == (200, first.json["deploy_id"])
    assert runs(inbox).count("app:again") == 1


@pytest.mark.parametrize("key", ["other-1", '"other-2"', "again"])
def test_an_unsigned_idempotency_key_makes_no_second_deployment_of_a_message(inbox, key):
    """It is a header that no signature covers: whoever captured the message may set it."""
    body = body_of(f"app:key{len(key)}")
    first = send(inbox, f"keyed-{len(key)}", body, headers={"Idempotency-Key": "its-own-" + str(len(key))})
    again = send(inbox, f"keyed-{len(key)}", body, headers={"Idempotency-Key": key})
    assert (first.status, again.status, again.json["deploy_id"]) == (202, 200, first.json["deploy_id"])
    inbox.wait(first.json["deploy_id"])
    assert runs(inbox).count(f"app:key{len(key)}") == 1


def test_many_copies_of_a_message_at_once_are_one_deployment(inbox):
    body, headers = body_of("app:copies"), webhook(body_of("app:copies"), "copies")
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: inbox.request("POST", "/deploy", body, headers), range(20)))
    assert sorted(answer.status for answer in answers) == [200] * 19 + [202]
    [deploy_id] = {answer.json["deploy_id"] for answer in answers}
    inbox.wait(deploy_id)
    assert runs(inbox).count("app:copies") == 1


def test_ids_and_keys_of_one_service_say_nothing_of_another_ones(tmp_path):
    """Who may sign for one service must neither block what is sent to the other nor learn of it."""
    services = "".join(service(MARK, name=name).replace("[service.security]", f'[service.security]\nhmac_keys = ["key_{name}"]') for name in "ab")
    keys = {"a": "a1b2c3d4e5f60718293a4b5c6d7e8f90", "b": "00aa11bb22cc33dd44ee55ff66778899"}
    with running(tmp_path, services, secrets="".join(f"key_{name}={key}\n" for name, key in keys.items())) as host:
        ids = set()
        for name, key in keys.items():
            body = json.dumps({"service": name, "image": "app:1"}).encode()
            for _ in range(2):
                ids.add(host.post(body, key=key.encode(), headers={"Idempotency-Key": "ci-run-42"}).json["deploy_id"])
                ids.add(send(host, "msg_7", body, key=key.encode()).json["deploy_id"])
        assert len(ids) == 4 == count(host)


def test_a_neighbour_that_forwards_and_is_not_believed_is_told_of_once(tmp_path):
    """A proxy that no one named: all its clients are one client, and the operator must learn why they are refused."""
    with running(tmp_path, service(MARK), "[security]\nrate_limit = 1\n") as host:
        for number in range(5):
            host.get("/nothing", **{"X-Forwarded-For": f"198.51.100.{number}"})
        [line] = [line for line in lines(host, "proxy_not_believed")]
        assert "127.0.0.1" in line["message"] and "security.trusted_proxies" in line["message"]


def test_who_repeats_a_request_is_named_in_the_log(host):
    body = body_of("app:repeated", deploy_id="repeated-by-another")
    request_from(host, "127.0.0.2", "POST", "/deploy", body, {"X-Hub-Signature-256": hookshot.sign(host.key, body)})
    again = request_from(host, "127.0.0.9", "POST", "/deploy", body, {"X-Hub-Signature-256": hookshot.sign(host.key, body), "X-Request-ID": "again-1"})
    assert again.status == 200
    [line] = lines(host, "deploy_repeated", deploy_id="repeated-by-another")
    assert (line["address"], line["request_id"]) == ("127.0.0.9", "again-1")


def test_two_messages_with_the_same_body_are_two_deployments(inbox):
    body = body_of("app:twins")
    first, second = send(inbox, "twin-1", body), send(inbox, "twin-2", body)
    assert (first.status, second.status) == (202, 202) and first.json["deploy_id"] != second.json["deploy_id"]
    wait_until(lambda: runs(inbox).count("app:twins") == 2)


def test_another_body_under_the_same_message_id_is_a_conflict(inbox):
    assert send(inbox, "taken", body_of("app:taken")).status == 202
    before = count(inbox, "messages")
    answer = send(inbox, "taken", body_of("app:thief"))
    assert (answer.status, answer.json["code"]) == (409, "DEPLOY_ID_CONFLICT") and "webhook-id taken" in answer.json["detail"]
    wait_until(lambda: runs(inbox).count("app:taken") == 1)
    assert "app:thief" not in runs(inbox) and count(inbox, "messages") == before


def test_a_dry_run_does_not_use_a_message_up(inbox):
    plan = send(inbox, "dry", body_of("app:dry", dry_run=True))
    assert plan.status == 200 and "app:dry" not in runs(inbox)
    assert send(inbox, "dry", body_of("app:dry")).status == 202


def test_a_message_of_a_pruned_deployment_is_not_carried_out_again(inbox):
    body = body_of("app:pruned")
    first = send(inbox, "pruned", body).json["deploy_id"]
    inbox.wait(first)
    inbox.wait(inbox.deploy("app:next"))
    wait_until(lambda: inbox.get(f"/status/{first}").status == 404)
    answer = send(inbox, "pruned", body)
    assert (answer.status, answer.json["code"]) == (409, "DEPLOY_ID_CONFLICT") and first in answer.json["detail"]
    assert runs(inbox).count("app:pruned") == 1 and inbox.get("/ready").status == 200


@pytest.mark.parametrize("waits", [True, False], ids=["after its end", "at once"])
def test_a_killed_server_remembers_its_messages(tmp_path, waits):
    with running(tmp_path, service(MARK)) as host:
        first = send(host, "survivor").json["deploy_id"]
        if waits:
            host.wait(first)
        host.kill()
        host.start()
        again = send(host, "survivor")
        assert (again.status, again.json["deploy_id"]) == (200, first)
        assert send(host, "survivor", body_of("app:2")).status == 409
        host.wait(first)
        # Killed in the middle it may begin anew (recovery), but never as a second deployment.
        assert count(host) == 1 and (runs(host) == ["app:1"] or not waits)


def test_a_database_of_the_first_schema_is_upgraded_and_kept(tmp_path):
    host = Host(tmp_path, service(MARK))
    host.data.mkdir(mode=0o700)
    with contextlib.closing(sqlite3.connect(host.data / "state.db")) as db:
        db.executescript(hookshot.MIGRATIONS[0] + "PRAGMA user_version=1;")
        db.execute("INSERT INTO deployments (deploy_id, service, state, image, metadata, env, trigger, digest, queued_ms, completed_ms) "
                   "VALUES ('old', 'web', 'Succeeded', 'app:0', '{}', '{}', '[\"192.0.2.1\", \"hmac_key\", null, \"r\"]', 'd', 1, 2)")
        db.commit()
        assert not db.execute("SELECT 1 FROM sqlite_master WHERE name='messages'").fetchone()
    with contextlib.closing(host):
        host.start()
        assert host.record("old")["image"] == "app:0"
        first = send(host, "new")
        assert (first.status, send(host, "new").json["deploy_id"]) == (202, first.json["deploy_id"])
        host.wait(first.json["deploy_id"])
        assert host.stop() == 0
        with contextlib.closing(sqlite3.connect(host.data / "state.db")) as db:
            assert db.execute("PRAGMA user_version").fetchone()[0] == len(hookshot.MIGRATIONS)
        host.start()
        assert send(host, "new").status == 200 and runs(host) == ["app:1"]


def test_messages_are_forgotten_when_no_clock_lets_them_pass_again(tmp_path):
    """Bounded, yet never so early that a message within the window would run twice."""
    store = hookshot.Store(str(tmp_path))
    limits = hookshot.load_config("", "config.toml", []).limits._replace(max_queue_per_service=10000)
    trigger, day_ms = hookshot.Trigger("192.0.2.7", "hmac_key", None, "r"), 86_400_000

    def submit(message_id: str, at_ms: int, expires_ms: int) -> hookshot.Submission:
        verified = hookshot.VerifiedBody("hmac_key", BODY, hookshot.SignedMessage(message_id, expires_ms))
        return store.submit(hookshot.parse_deploy(verified, None), trigger, at_ms, limits=limits, on_busy="queue")

    def known(at_ms: int, **bounds: int) -> set[str]:
        while store.prune_messages(at_ms, batch=7, **bounds):
            pass
        with contextlib.closing(sqlite3.connect(tmp_path / "state.db")) as db:
            return {row[0] for row in db.execute("SELECT id FROM messages").fetchall()}

    with contextlib.closing(store):
        for number in range(50):
            assert submit(f"m{number}", 1000 + number, 301_000).created
        # A timestamp far ahead, taken with a window as wide: remembered until its own end.
        assert submit("ahead", 1000, 30 * day_ms).created
        assert len(known(6 * day_ms)) == 51
        # Sent again, signed anew: this signature could be repeated too.
        assert not submit("m0", 7 * day_ms, 7 * day_ms + 300_000).created
        assert submit("late", 8 * day_ms, 8 * day_ms + 300_000).created
        assert known(8 * day_ms) == {"ahead", "m0", "late"} and not submit("m0", 8 * day_ms, 8 * day_ms + 300_000).created
        assert not submit("ahead", 29 * day_ms, 30 * day_ms).created
        assert known(29 * day_ms) == {"ahead"}
        # Too many: the oldest go sooner, but none within two days.
        for number in range(30):
            assert submit(f"n{number}", 40 * day_ms + number, 40 * day_ms + 300_000).created
        for number in range(5):
            assert submit(f"o{number}", 42 * day_ms + 1000, 42 * day_ms + 300_000).created
        assert len(known(41 * day_ms, keep=20)) == 35
        assert known(42 * day_ms + 2000, keep=20) == {f"n{number}" for number in range(15, 30)} | {f"o{number}" for number in range(5)}
        assert len(known(42 * day_ms + 2000, keep=1)) == 5


def test_a_secret_of_standard_webhooks_signs_both_ways(tmp_path):
    """whsec_ and base64: its bytes are the key of messages; X-Hub-Signature-256 takes the text as it stands."""
    with running(tmp_path, service(MARK), key=WHSEC) as host:
        assert send(host, "whsec", key=bytes(range(32))).status == 202
        assert send(host, "text", key=WHSEC.encode()).status == 401
        assert host.post({"service": "web", "image": "app:2"}).status == 202
        wait_until(lambda: len(runs(host)) == 2)


@pytest.mark.parametrize("offset_s, status", [(0, 202), (-30, 202), (30, 202), (-3600, 401), (3600, 401)])
def test_replay_window_is_as_configured(tmp_path_factory, narrow_window, offset_s, status):
    body = body_of(f"app:{next(SERIAL)}")
    before = count(narrow_window)
    answer = send(narrow_window, f"w{next(SERIAL)}", body, at_s=int(time.time()) + offset_s)
    assert answer.status == status
    assert count(narrow_window) == before + (status == 202)
    if status == 401:
        assert "replay_window" in answer.json["detail"] and ("ahead" if offset_s > 0 else "behind") in answer.json["detail"]


@pytest.fixture(scope="module")
def narrow_window(tmp_path_factory):
    config = '[security]\nreplay_window = "10m"\nrequire_timestamp = true\n'
    with running(tmp_path_factory.mktemp("window"), service(MARK), config) as host:
        yield host


def test_require_timestamp_refuses_what_could_be_replayed(narrow_window):
    before = count(narrow_window)
    answer = narrow_window.post({"service": "web", "image": "app:1"})
    assert answer.status == 401 and "webhook-timestamp" in answer.json["detail"]
    assert count(narrow_window) == before
    # Who holds no key is not told how to sign.
    assert "webhook" not in narrow_window.post({"service": "web", "image": "app:1"}, key=STRANGER.encode()).json["detail"]


def test_a_key_that_is_taken_away_signs_nothing_from_the_reload_on(tmp_path):
    with running(tmp_path, SCOPED, secrets=f"team_key={TEAM_KEY}\n") as host:
        body = json.dumps({"service": "team", "image": "app:1"}).encode()
        assert [send(host, f"before-{key}", body, key=key.encode()).status for key in (support.KEY, TEAM_KEY)] == [202, 202]
        host.write(service(MARK) + service(MARK, name="team"))
        host.secrets.write_text(f"hmac_key={STRANGER}\nteam_key={TEAM_KEY}\n")
        host.process.send_signal(signal.SIGHUP)
        wait_until(lambda: lines(host, "reloaded"))
        before = count(host)
        for key in (support.KEY, TEAM_KEY):
            # What was accepted under it is not told of either.
            assert send(host, f"before-{key}", body, key=key.encode()).status == 401
            assert send(host, f"after-{key}", body, key=key.encode()).status == 401
        assert count(host) == before
        assert send(host, "after", body, key=STRANGER.encode()).status == 202


# --- addresses

def outer_address() -> str:
    """Return an address of this host that is not loopback."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing
        if not (address := probe.getsockname()[0]).startswith("127."):
            return address
    pytest.skip("this host has no address but loopback")


def need_ipv6() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")


def test_a_peer_that_is_not_loopback_is_not_local_whatever_it_says(tmp_path):
    address = outer_address()
    with running(tmp_path, service(MARK), '[server]\nlisten = "0.0.0.0:0"\n') as host:
        with connected(host.port, address) as link:
            for name in ("localhost", "127.0.0.1", address):
                assert ask(link, "GET", "/services", [("Host", name)]).status == 401
            assert ask(link, "GET", "/health", []).status == 200
        assert host.get("/services").status == 200


ALLOWED = {
    "bare": (["127.0.0.2"], {"127.0.0.1": 403, "127.0.0.2": 200, "127.0.0.3": 403}),
    "network": (["127.0.0.2/31"], {"127.0.0.1": 403, "127.0.0.2": 200, "127.0.0.3": 200, "127.0.0.4": 403}),
    "several": (["192.0.2.0/24", "127.0.0.3", "2001:db8::/32"], {"127.0.0.1": 403, "127.0.0.3": 200}),
    "mapped": (["::ffff:127.0.0.2"], {"127.0.0.1": 403, "127.0.0.2": 200}),
    "mapped network": (["::ffff:127.0.0.2/127"], {"127.0.0.1": 403, "127.0.0.2": 200, "127.0.0.3": 200}),
    "all of IPv4": (["0.0.0.0/0"], {"127.0.0.1": 200, "127.0.0.2": 200}),
    "all of IPv6": (["::/0"], {"127.0.0.1": 403}), "unix": (["unix"], {"127.0.0.1": 403}),
    "empty": ([], {"127.0.0.1": 200, "127.0.0.2": 200}),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_only_allowed_addresses_are_answered(tmp_path, name):
    allowed, expected = ALLOWED[name]
    with running(tmp_path, service(MARK), f"[security]\nallowed_ips = {json.dumps(allowed)}\n") as host:
        signed = {"X-Hub-Signature-256": hookshot.sign(host.key, BODY)}
        for source, status in expected.items():
            assert request_from(host, source, "GET", "/services").status == status
            answer = request_from(host, source, "POST", "/deploy", BODY, signed)
            assert answer.status == {200: 202, 403: 403}[status]
            if status == 403:
                assert answer.json["code"] == "ACCESS_DENIED" and source not in answer.body.decode()
                # Not even a forwarded address, which anyone can claim, nor what is open to all others.
                for path in ("/services", "/health", "/ready", "/nowhere"):
                    assert request_from(host, source, "GET", path, headers={"X-Forwarded-For": "127.0.0.2"}).status == 403
        assert count(host) == list(expected.values()).count(200)
        assert host.process.poll() is None


def test_an_ipv4_client_of_a_dual_stack_socket_is_judged_as_ipv4(tmp_path):
    need_ipv6()
    with running(tmp_path, service(MARK), '[server]\nlisten = ":0"\n[security]\nallowed_ips = ["127.0.0.2", "::1"]\n') as host:
        assert request_from(host, "127.0.0.1", "GET", "/services").status == 403
        assert request_from(host, "127.0.0.2", "GET", "/services").status == 200
        with connected(host.port, "::1") as link:
            assert ask(link, "GET", "/services", []).status == 200


@pytest.mark.parametrize("allowed, status", [(["::1"], 200), (["::/64"], 200), (["::2"], 403), (["127.0.0.1"], 403), (["0.0.0.0/0"], 403)])
def test_an_ipv6_client_is_judged_as_ipv6(tmp_path, allowed, status):
    need_ipv6()
    with running(tmp_path, service(MARK), f'[server]\nlisten = "[::1]:0"\n[security]\nallowed_ips = {json.dumps(allowed)}\n') as host:
        with connected(host.port, "::1") as link:
            assert ask(link, "GET", "/services", []).status == status
            assert ask(link, "POST", "/deploy", hub(support.KEY, BODY), BODY).status == {200: 202, 403: 403}[status]
        assert count(host) == (status == 200)


class UnixLink(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: str):
        super().__init__("localhost", timeout=support.PATIENCE_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(support.PATIENCE_S)
        self.sock.connect(self._path)


@contextlib.contextmanager
def on_unix_socket(folder, security: str):
    """Give a host that listens on TCP and on a unix socket, and the socket's path."""
    path = str(folder / "s")
    config = f'[server]\nlisten = ["127.0.0.1:0", "unix:{path}"]\n[security]\n{security}\n'
    host = Host(folder, service(MARK), config, secrets=f"read_token={TOKEN}\n")
    with contextlib.closing(host):
        host.start(wait=False)
        [started] = wait_until(lambda: lines(host, "started") if b'"started"' in host.output.read_bytes() else [])
        host.port = int(re.search(r"http://127\.0\.0\.1:(\d+)", started["message"])[1])
        yield host, path


@pytest.mark.parametrize("security, tcp, unix", [
    ("", 200, 200), ('allowed_ips = ["unix"]', 403, 200), ('allowed_ips = ["127.0.0.1"]', 200, 403), ('read_access = "token"', 401, 401)])
def test_a_unix_socket_is_a_place_of_its_own(tmp_path, security, tcp, unix):
    with on_unix_socket(tmp_path, security) as (host, path), contextlib.closing(UnixLink(path)) as link:
        assert host.get("/services").status == tcp
        assert ask(link, "GET", "/services", []).status == unix
        assert ask(link, "GET", "/services", [("X-Forwarded-For", "127.0.0.1")]).status == (401 if unix == 200 else unix)
        assert ask(link, "GET", "/services", [("Host", "evil.example")]).status == (401 if unix == 200 else unix)
        assert count(host) == 0


def test_a_proxy_at_a_unix_socket_can_be_trusted(tmp_path):
    with on_unix_socket(tmp_path, 'trusted_proxies = ["unix"]') as (host, path), contextlib.closing(UnixLink(path)) as link:
        headers = [("X-Forwarded-For", "192.0.2.9"), *hub(support.KEY, BODY)]
        deploy_id = ask(link, "POST", "/deploy", headers, BODY).json["deploy_id"]
        assert host.record(deploy_id)["triggered_by"]["address"] == "192.0.2.9"


def test_the_gates_stand_in_their_order(tmp_path):
    """Size, address, rate, route, signature: who fails at one is told of that one, and does not weigh on the next."""
    config = '[server]\nmax_request_size = 1024\n[security]\nallowed_ips = ["127.0.0.2"]\nrate_limit = 4\n'
    with running(tmp_path, service(MARK), config) as host:
        for _ in range(8):
            denied = request_from(host, "127.0.0.1", "POST", "/deploy", BODY)
            assert denied.status == 403 and "ratelimit" not in denied.headers
        assert request_from(host, "127.0.0.1", "POST", "/deploy", b"x" * 1025).status == 413
        assert request_from(host, "127.0.0.1", "GET", "/nowhere").status == 403
        statuses = [request_from(host, "127.0.0.2", *what).status for what in (
            ("POST", "/deploy", BODY), ("GET", "/nowhere"), ("GET", "/deploy"),
            ("POST", "/deploy", BODY, {"X-Hub-Signature-256": "sha256=00"}))]
        assert statuses == [401, 404, 405, 401]
        signed = {"X-Hub-Signature-256": hookshot.sign(host.key, BODY)}
        for what in (("POST", "/deploy", BODY, signed), ("GET", "/nowhere"), ("GET", "/deploy"), ("POST", "/deploy", BODY)):
            assert request_from(host, "127.0.0.2", *what).status == 429
        assert request_from(host, "127.0.0.2", "POST", "/deploy", b"x" * 1025).status == 413
        assert count(host) == 0 and request_from(host, "127.0.0.2", "GET", "/ready").status == 200


@pytest.mark.parametrize("source, headers, status", [
    ("127.0.0.1", {}, 403), ("127.0.0.2", {}, 401), ("127.0.0.3", {}, 429)], ids=["address", "signature", "rate"])
def test_who_is_refused_by_his_head_is_not_asked_for_his_body(doorman, source, headers, status):
    if status == 429:
        wait_until(lambda: request_from(doorman, source, "GET", "/nowhere").status == 429)
    with socket.create_connection(("127.0.0.1", doorman.port), support.PATIENCE_S, (source, 0)) as link:
        link.sendall(b"POST /deploy HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\nExpect: 100-continue\r\n\r\n")
        link.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: link.recv(1 << 16), b""))
    assert answer.startswith(b"HTTP/1.1 %d " % status) and answer.count(b"HTTP/1.1 ") == 1
    assert count(doorman) == 0


@pytest.fixture(scope="module")
def doorman(tmp_path_factory):
    config = '[security]\nallowed_ips = ["127.0.0.2", "127.0.0.3"]\nrate_limit = 5\n'
    with running(tmp_path_factory.mktemp("doorman"), service(MARK), config) as host:
        yield host


# --- proxies

def address_of(peer: str, headers: dict[str, str], trusted: list[str]) -> str:
    request = hookshot.Request("GET", "/", {}, headers, b"", hookshot.parse_address(peer), "r")
    return hookshot.render_peer(hookshot.client_address(request, [hookshot.parse_peers(text) for text in trusted]))


FORWARDED = {
    "untrusted peer": ("192.0.2.9", {"x-forwarded-for": "198.51.100.7"}, ["127.0.0.1"], "192.0.2.9"),
    "no trust at all": ("127.0.0.1", {"x-forwarded-for": "198.51.100.7", "forwarded": "for=198.51.100.7"}, [], "127.0.0.1"),
    "no header": ("127.0.0.1", {}, ["127.0.0.1"], "127.0.0.1"),
    "one hop": ("127.0.0.1", {"x-forwarded-for": "198.51.100.7"}, ["127.0.0.1"], "198.51.100.7"),
    "what the client claims is left": (
        "127.0.0.1", {"x-forwarded-for": "127.0.0.1, 10.0.0.1, 198.51.100.7"}, ["127.0.0.1"], "198.51.100.7"),
    "two proxies": ("127.0.0.1", {"x-forwarded-for": "1.1.1.1, 198.51.100.7, 10.0.0.1"}, ["127.0.0.1", "10.0.0.0/8"], "198.51.100.7"),
    "a proxy further left counts for nothing": (
        "127.0.0.1", {"x-forwarded-for": "10.0.0.9, 198.51.100.7, 10.0.0.1"}, ["127.0.0.1", "10.0.0.0/8"], "198.51.100.7"),
    "all are proxies": ("127.0.0.1", {"x-forwarded-for": "10.0.0.2, 10.0.0.1"}, ["127.0.0.1", "10.0.0.0/8"], "10.0.0.2"),
    "port": ("127.0.0.1", {"x-forwarded-for": "198.51.100.7:4711"}, ["127.0.0.1"], "198.51.100.7"),
    "IPv6": ("127.0.0.1", {"x-forwarded-for": "2001:db8::7"}, ["127.0.0.1"], "2001:db8::7"),
    "IPv6 in brackets": ("127.0.0.1", {"x-forwarded-for": "[2001:db8::7]"}, ["127.0.0.1"], "2001:db8::7"),
    "IPv6 with a port": ("127.0.0.1", {"x-forwarded-for": "[2001:DB8::7]:4711"}, ["127.0.0.1"], "2001:db8::7"),
    "mapped": ("127.0.0.1", {"x-forwarded-for": "::ffff:198.51.100.7"}, ["127.0.0.1"], "198.51.100.7"),
    "mapped with a port": ("127.0.0.1", {"x-forwarded-for": "[::ffff:198.51.100.7]:80"}, ["127.0.0.1"], "198.51.100.7"),
    "mapped proxy": ("127.0.0.1", {"x-forwarded-for": "198.51.100.7, ::ffff:10.0.0.1"}, ["127.0.0.1", "10.0.0.1"], "198.51.100.7"),
    "mapped peer": ("::ffff:127.0.0.1", {"x-forwarded-for": "198.51.100.7"}, ["127.0.0.1"], "198.51.100.7"),
    "IPv6 proxy": ("2001:db8::1", {"x-forwarded-for": "198.51.100.7, 2001:db8::2"}, ["2001:db8::/32"], "198.51.100.7"),
    "noise": ("127.0.0.1", {"x-forwarded-for": "evil"}, ["127.0.0.1"], "unknown"),
    "noise to the left": ("127.0.0.1", {"x-forwarded-for": "evil, 198.51.100.7"}, ["127.0.0.1"], "198.51.100.7"),
    "noise after a proxy": ("127.0.0.1", {"x-forwarded-for": "198.51.100.7, evil, 10.0.0.1"}, ["127.0.0.1", "10.0.0.1"], "unknown"),
    "empty": ("127.0.0.1", {"x-forwarded-for": ""}, ["127.0.0.1"], "unknown"),
    "trailing comma": ("127.0.0.1", {"x-forwarded-for": "198.51.100.7,"}, ["127.0.0.1"], "unknown"),
    "Forwarded": ("127.0.0.1", {"forwarded": "for=198.51.100.7"}, ["127.0.0.1"], "198.51.100.7"),
    "Forwarded, parameters": (
        "127.0.0.1", {"forwarded": 'For="198.51.100.7:80";proto=https;by=10.0.0.1;host=x'}, ["127.0.0.1"], "198.51.100.7"),
    "Forwarded, IPv6": ("127.0.0.1", {"forwarded": 'for="[2001:db8::7]:4711"'}, ["127.0.0.1"], "2001:db8::7"),
    "Forwarded, hops": (
        "127.0.0.1", {"forwarded": "for=1.1.1.1, for=198.51.100.7;proto=http, for=10.0.0.1"}, ["127.0.0.1", "10.0.0.1"], "198.51.100.7"),
    "Forwarded, obfuscated": ("127.0.0.1", {"forwarded": "for=_hidden"}, ["127.0.0.1"], "unknown"),
    "Forwarded, unknown": ("127.0.0.1", {"forwarded": "for=1.1.1.1, for=unknown"}, ["127.0.0.1"], "unknown"),
    "Forwarded, a quote left open": ("127.0.0.1", {"forwarded": 'for=127.0.0.1;x=", for=198.51.100.7'}, ["127.0.0.1"], "unknown"),
    "Forwarded, a hop that says no address": ("127.0.0.1", {"forwarded": "for=127.0.0.1, proto=https"}, ["127.0.0.1"], "unknown"),
    "Forwarded, no address at all": ("127.0.0.1", {"forwarded": "proto=https"}, ["127.0.0.1"], "127.0.0.1"),
    "Forwarded, nothing but the scheme": (
        "127.0.0.1", {"forwarded": "proto=https", "x-forwarded-for": "198.51.100.7"}, ["127.0.0.1"], "198.51.100.7"),
    "Forwarded, a hop that says two": ("127.0.0.1", {"forwarded": "for=198.51.100.7;for=127.0.0.1"}, ["127.0.0.1"], "unknown"),
    "both agree": ("127.0.0.1", {"forwarded": "for=198.51.100.7", "x-forwarded-for": "198.51.100.7"}, ["127.0.0.1"], "198.51.100.7"),
    "Forwarded, a quoted comma": ("127.0.0.1", {"forwarded": 'for=198.51.100.7;host="x,for=10.0.0.1"'}, ["127.0.0.1"], "198.51.100.7"),
    "Forwarded, a quoted semicolon": ("127.0.0.1", {"forwarded": 'for=198.51.100.7;host="x;for=10.0.0.1"'}, ["127.0.0.1"], "198.51.100.7"),
    "Forwarded, an escaped quote": ("127.0.0.1", {"forwarded": 'for=198.51.100.7;host="x\\",for=10.0.0.1"'}, ["127.0.0.1"], "198.51.100.7"),
    "Forwarded, an open quote": ("127.0.0.1", {"forwarded": 'for=198.51.100.7;host="x,for=10.0.0.1'}, ["127.0.0.1"], "unknown"),
    "Forwarded, a quote in the middle": ("127.0.0.1", {"forwarded": 'for=10.0.0.1"'}, ["127.0.0.1"], "unknown"),
    "Forwarded, very long": ("127.0.0.1", {"forwarded": "for=127.0.0.1," * 500 + "for=198.51.100.7"}, ["127.0.0.1"], "unknown"),
    "both differ": ("127.0.0.1", {"forwarded": "for=127.0.0.1", "x-forwarded-for": "198.51.100.7"}, ["127.0.0.1"], "unknown"),
    "other headers": ("127.0.0.1", {"x-real-ip": "198.51.100.7", "x-client-ip": "198.51.100.7"}, ["127.0.0.1"], "127.0.0.1"),
    "a unix socket": ("127.0.0.1", {"x-forwarded-for": "unix"}, ["127.0.0.1", "unix"], "unknown"),
}


@pytest.mark.parametrize("text", ["for=1.1.1.1," + " " * 15_000 + "x", "\t" * 15_000, "," * 15_000, ";" * 15_000, "a=" * 7_000,
                                  'a="' + "\\" * 15_000, "for=" + '"' * 15_000, "a=b; " * 3_000, "a" * 15_000], ids=lambda text: text[:12])
def test_no_forwarding_header_keeps_the_reading_thread_busy(text):
    """It is read before any gate: its cost must grow with its length and no faster."""
    request = hookshot.Request("GET", "/", {}, {"forwarded": text}, b"", hookshot.parse_address("127.0.0.1"), "r")
    before = time.process_time()
    for _ in range(20):
        hookshot.client_address(request, [hookshot.parse_network("127.0.0.1")])
    assert time.process_time() - before < 2  # quadratic ones take 40 s


@pytest.mark.parametrize("name", FORWARDED)
def test_a_forwarded_address_is_the_first_from_the_right_that_is_no_proxy(name):
    peer, headers, trusted, address = FORWARDED[name]
    assert address_of(peer, headers, trusted) == address


@pytest.mark.parametrize("headers, address", [
    ([("X-Forwarded-For", "1.1.1.1"), ("X-Forwarded-For", "198.51.100.7")], "198.51.100.7"),
    ([("Forwarded", "for=1.1.1.1"), ("Forwarded", 'for="[2001:db8::7]:1"')], "2001:db8::7"),
    ([("X-Forwarded-For", "evil")], "unknown")])
def test_a_trusted_proxy_names_the_client_in_the_record(proxied, headers, address):
    with connected(proxied.port) as link:
        deploy_id = ask(link, "POST", "/deploy", headers + hub(support.KEY, BODY), BODY).json["deploy_id"]
    assert proxied.record(deploy_id)["triggered_by"]["address"] == address
    proxied.wait(deploy_id)


def test_a_peer_that_is_not_trusted_names_only_itself(proxied):
    headers = {"X-Hub-Signature-256": hookshot.sign(proxied.key, BODY), "X-Forwarded-For": "198.51.100.7", "Forwarded": "for=198.51.100.7"}
    answer = request_from(proxied, "127.0.0.2", "POST", "/deploy", BODY, headers)
    assert proxied.record(answer.json["deploy_id"])["triggered_by"]["address"] == "127.0.0.2"


@pytest.fixture(scope="module")
def proxied(tmp_path_factory):
    with running(tmp_path_factory.mktemp("proxied"), service(MARK), '[security]\ntrusted_proxies = ["127.0.0.1"]\n') as host:
        yield host


@pytest.fixture(scope="module")
def counting(tmp_path_factory):
    config = '[security]\ntrusted_proxies = ["127.0.0.1"]\nrate_limit = 5\n'
    with running(tmp_path_factory.mktemp("counting"), service(MARK), config) as host:
        yield host


@pytest.mark.parametrize("first, same, other", [
    ("2001:db8:1:1::1", "2001:db8:1:1:ffff::2", "2001:db8:1:2::1"), ("198.51.100.1", "::ffff:198.51.100.1", "198.51.100.2"),
    ("[2001:db8:2::1]:80", "2001:db8:2::2", "198.51.100.3")])
def test_clients_behind_a_proxy_are_counted_each_for_itself_and_ipv6_by_64(counting, first, same, other):
    for _ in range(5):
        assert counting.get("/nowhere", **{"X-Forwarded-For": first}).status == 404
    assert counting.get("/nowhere", **{"X-Forwarded-For": same}).status == 429
    assert counting.get("/nowhere", **{"X-Forwarded-For": other}).status == 404
    # What the client itself put in front changes nothing.
    assert counting.get("/nowhere", **{"X-Forwarded-For": f"203.0.113.9, {first}"}).status == 429


# --- local means here

@pytest.mark.parametrize("name, status", [
    ("127.0.0.1", 200), ("127.0.0.1:1", 200), ("127.9.9.9", 200), ("localhost", 200), ("localhost:8080", 200), ("LOCALHOST", 200),
    ("LocalHost:80", 200), ("[::1]", 200), ("[::1]:8080", 200),
    ("evil.example", 401), ("127.0.0.1.evil.example", 401), ("localhost.evil", 401), ("localhost.", 401), ("evil.localhost", 401),
    ("127.0.0.1.nip.io:80", 401), ("evil.example:127", 401), ("0.0.0.0", 401), ("[::]", 401), ("0", 401), ("2130706433", 401),
    ("0x7f000001", 401),
    ("127.1", 401), ("10.0.0.1", 401), ("", 401), (" ", 401), ("xlocalhost", 401)])
def test_local_reading_takes_only_a_host_that_is_this_host(unharmed, name, status):
    """DNS rebinding: a page's own name, made to resolve to 127.0.0.1, is what the browser sends here."""
    with connected(unharmed.port) as link:
        assert ask(link, "GET", "/services", [("Host", name)]).status == status
        assert ask(link, "GET", "/services", [("Host", name), ("Authorization", f"Bearer {TOKEN}")]).status == 200
        assert ask(link, "GET", "/ready", [("Host", name)]).status == 200


def test_a_client_that_names_no_host_is_not_local(unharmed):
    assert unharmed.raw(b"GET /services HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 401 ")
    assert unharmed.raw(b"GET /ready HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("headers, status", [
    ({"Origin": "http://localhost:8080"}, 200), ({"Origin": "http://127.0.0.1"}, 200), ({"Origin": "http://[::1]:80"}, 200),
    ({"Sec-Fetch-Site": "none"}, 200), ({"Sec-Fetch-Site": "same-origin"}, 200),
    ({"Origin": "null"}, 401), ({"Origin": ""}, 401), ({"Origin": "https://evil.example"}, 401),
    ({"Origin": "http://localhost.evil.example"}, 401), ({"Origin": "http://127.0.0.1.evil.example"}, 401), ({"Origin": "localhost"}, 401),
    ({"Origin": "https://evil.example://localhost"}, 401),
    ({"Sec-Fetch-Site": "cross-site"}, 401), ({"Sec-Fetch-Site": "same-site"}, 401), ({"Sec-Fetch-Site": ""}, 401),
    ({"Sec-Fetch-Site": "x"}, 401),
    ({"Origin": "http://localhost", "Sec-Fetch-Site": "cross-site"}, 401),
    ({"Origin": "https://evil.example", "Sec-Fetch-Site": "none"}, 401),
    *(({name: "127.0.0.1"}, 401) for name in ("Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "X-Real-IP", "Via")),
    ({"X-Forwarded-For": ""}, 401)])
def test_local_reading_takes_no_page_of_another_site_and_no_proxy(unharmed, headers, status):
    for path in ("/services", "/deployments", "/status/x", "/logs/x", "/services/web"):
        found = unharmed.get(path, **headers).status
        assert found == status or (status == 200 and found == 404 and path in ("/status/x", "/logs/x"))
        assert unharmed.get(path, **headers, **BEARER).status in (200, 404)


def test_loopback_means_all_of_it(unharmed):
    assert request_from(unharmed, "127.0.0.2", "GET", "/services").status == 200


# --- rate limit

def limit_of(answer: support.Answer) -> tuple[int, int]:
    """Return what RateLimit says: requests left, seconds until all are there again."""
    match = re.fullmatch(r'"default";r=(\d+);t=(\d+)', answer.headers["ratelimit"])
    return int(match[1]), int(match[2])


def test_the_rate_is_told_with_every_answer_and_ends_in_429(tmp_path):
    with running(tmp_path, service(MARK), "[security]\nrate_limit = 4\n") as host:
        signed = {"X-Hub-Signature-256": hookshot.sign(host.key, BODY)}
        # Good, bad, refused: each costs one and says so.
        for number, (what, status) in enumerate([(("GET", "/services"), 200), (("GET", "/nowhere"), 404), (("POST", "/deploy", BODY), 401),
                                                 (("POST", "/deploy", BODY, {"X-Hub-Signature-256": "sha256=0"}), 401)]):
            answer = host.request(*what)
            assert (answer.status, answer.headers["ratelimit-policy"]) == (status, '"default";q=4;w=60')
            left, reset_s = limit_of(answer)
            assert left == 3 - number and 0 < reset_s <= 15 * (number + 1)
        for _ in range(3):
            answer = host.request("POST", "/deploy", BODY, signed)
            assert (answer.status, answer.json["code"]) == (429, "RATE_LIMIT_EXCEEDED")
            assert limit_of(answer)[0] == 0 and 45 <= limit_of(answer)[1] <= 60
            assert 1 <= int(answer.headers["retry-after"]) <= 16 and answer.headers["ratelimit-policy"] == '"default";q=4;w=60'
        assert count(host) == 0
        for path in ("/health", "/ready"):
            for method in ("GET", "HEAD"):
                answer = host.request(method, path)
                assert answer.status == 200 and not {"ratelimit", "ratelimit-policy", "retry-after"} & answer.headers.keys()
        # Another address has its own.
        assert request_from(host, "127.0.0.2", "POST", "/deploy", BODY, signed).status == 202
        assert host.get("/services").status == 429


def test_retry_after_is_kept(tmp_path):
    """Who waits as long as he is told is let in."""
    with running(tmp_path, service(MARK), "[security]\nrate_limit = 60\n") as host:
        answer = wait_until(lambda: (answer := host.get("/services")).status == 429 and answer)
        assert answer.headers["retry-after"] == "1"
        until = time.monotonic() + int(answer.headers["retry-after"])
        wait_until(lambda: time.monotonic() > until)
        assert host.get("/services").status == 200


def test_the_health_path_of_the_operator_is_not_limited(tmp_path):
    with running(tmp_path, service(MARK), '[security]\nrate_limit = 1\n[monitoring]\nhealth_path = "/healthz"\n') as host:
        assert [host.get("/healthz").status for _ in range(5)] == [200] * 5
        assert [host.get("/health").status for _ in range(2)] == [404, 429]


def test_a_rate_limit_of_0_is_none(host):
    """The original divided by it."""
    for _ in range(150):
        answer = host.get("/nowhere")
        assert answer.status == 404 and not {"ratelimit", "ratelimit-policy", "retry-after"} & answer.headers.keys()


def admit(limiter: hookshot.RateLimiter, text: str, now_s: float, per_minute: int = 60) -> hookshot.Allowance:
    return limiter.admit(hookshot.parse_address(text), now_s, per_minute=per_minute)


def test_tokens_come_back_at_the_rate_and_never_beyond_it():
    limiter = hookshot.RateLimiter()
    assert [admit(limiter, "192.0.2.1", 1000.0)[:2] for _ in range(60)] == [(0.0, left) for left in range(59, -1, -1)]
    refused = admit(limiter, "192.0.2.1", 1000.0)
    assert (refused.wait_s, refused.left, refused.reset_s) == (1.0, 0, 60)
    assert admit(limiter, "192.0.2.1", 1000.5).wait_s == 0.5
    assert admit(limiter, "192.0.2.1", 1001.0) == (0.0, 0, 60)
    assert admit(limiter, "192.0.2.1", 1001.0).wait_s > 0
    assert admit(limiter, "192.0.2.1", 1011.0)[:2] == (0.0, 9)
    # A day's rest is worth no more than a minute's.
    assert admit(limiter, "192.0.2.1", 90_000.0) == (0.0, 59, 1)


def test_being_refused_costs_nothing():
    """Who knocks on while he is refused is let in as soon as anyone else."""
    limiter = hookshot.RateLimiter()
    for _ in range(60):
        admit(limiter, "192.0.2.1", 0.0)
    for step in range(1, 100):
        assert admit(limiter, "192.0.2.1", step / 100).wait_s > 0
    assert admit(limiter, "192.0.2.1", 1.001).wait_s == 0


@pytest.mark.parametrize("per_minute", [1, 7, 100, 10_000])
def test_over_any_time_no_more_pass_than_the_rate_and_one_fill(per_minute):
    limiter = hookshot.RateLimiter()
    passed = sum(not admit(limiter, "192.0.2.1", step * 0.01, per_minute).wait_s for step in range(30_000))
    assert per_minute * 5 <= passed <= per_minute * 6 or passed == 30_000


def test_waiting_as_long_as_was_said_is_enough_at_any_rate():
    for per_minute in (1, 3, 7, 60, 100, 9999, 10_000):
        limiter, now_s = hookshot.RateLimiter(), 12345.678
        while not (allowance := admit(limiter, "192.0.2.1", now_s, per_minute)).wait_s:
            pass
        assert admit(limiter, "192.0.2.1", now_s + int(allowance.wait_s) + 1, per_minute).wait_s == 0


def test_a_lower_rate_holds_at_once():
    limiter = hookshot.RateLimiter()
    assert admit(limiter, "192.0.2.1", 0.0, 10_000).left == 9999
    assert [bool(admit(limiter, "192.0.2.1", 0.0, 2).wait_s) for _ in range(3)] == [False, False, True]


@pytest.mark.parametrize("one, other, is_same", [
    ("192.0.2.1", "192.0.2.1", True), ("192.0.2.1", "192.0.2.2", False), ("192.0.2.1", "::ffff:192.0.2.1", True),
    ("2001:db8::1", "2001:db8::ffff:ffff:ffff:ffff", True), ("2001:db8::1", "2001:db8:0:1::1", False), ("::1", "::2", True),
    ("0.0.0.0", "::", False), ("evil", "worse", True), ("evil", "0.0.0.0", False), ("255.255.255.255", "::1", False)])
def test_what_counts_as_one_client(one, other, is_same):
    limiter = hookshot.RateLimiter()
    admit(limiter, one, 0.0, 1)
    assert bool(admit(limiter, other, 0.0, 1).wait_s) == is_same


@pytest.mark.parametrize("make", [ipaddress.IPv4Address, lambda number: ipaddress.IPv6Address((0x20010DB8 << 96) + (number << 64))],
                         ids=["IPv4", "IPv6"])
def test_the_table_of_addresses_is_bounded(make):
    limiter, most = hookshot.RateLimiter(), hookshot.RateLimiter._MAX_ADDRESSES
    for number in range(200_000):
        limiter.admit(make(number), number / 1000, per_minute=1)
        if number % 5000 == 0:
            assert len(limiter._buckets) <= most
    assert len(limiter._buckets) == most


def test_who_is_seen_often_is_not_forgotten_for_those_seen_once():
    limiter = hookshot.RateLimiter()
    admit(limiter, "192.0.2.1", 0.0, 1)
    for number in range(3 * hookshot.RateLimiter._MAX_ADDRESSES):
        limiter.admit(ipaddress.IPv4Address(number), 0.0, per_minute=1)
        if number % 1000 == 0:
            assert admit(limiter, "192.0.2.1", 0.0, 1).wait_s > 0


# --- gzip

@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A server whose answers are long, and one deployment with a long log."""
    talk = '["sh", "-c", "for i in $(seq 200); do echo this is line $i of many; done"]'
    wait = '["sh", "-c", "echo first line; until [ -e go-$HOOKSHOT_DEPLOY_ID ]; do kill -0 $PPID || exit; sleep 0.02; done; ' \
           'echo last line"]'
    services = service(talk) + service(wait, name="slow") + "".join(service(name=f"s{number}") for number in range(20))
    with running(tmp_path_factory.mktemp("talker"), services, "[server]\nworker_threads = 8\n") as host:
        host.wait(host.deploy(deploy_id="talk"))
        yield host


def is_gzipped(answer: support.Answer) -> bool:
    encoding = answer.headers.get("content-encoding")
    assert encoding in (None, "gzip")
    return encoding == "gzip"


@pytest.mark.parametrize("accepted, gzipped", [
    ("gzip", True), ("GZIP", True), ("x-gzip", True), ("gzip, deflate, br, zstd", True), ("br,gzip;q=0.1", True), ("gzip;q=1", True),
    ("gzip ; q=0.001", True), ("*", True), ("identity, *;q=0.5", True), ("gzip, *;q=0", True), ("deflate;q=0,gzip", True),
    ("gzip;q=0", False), ("gzip; q=0", False), ("gzip;q=0.0", False), ("gzip;q=0.000", False), ("GZIP;Q=0", False), ("*;q=0", False),
    ("gzip;q=0, *", False), ("identity", False), ("br", False), ("", False), ("gzipped", False), ("deflate, br", False), (None, False)])
def test_long_answers_are_gzipped_for_who_takes_it(talker, accepted, gzipped):
    headers = [] if accepted is None else [("Accept-Encoding", accepted)]
    with connected(talker.port) as link:
        plain = ask(link, "GET", "/services", [])
        for path in ("/services", "/logs/talk"):
            answer = ask(link, "GET", path, headers)
            assert answer.status == 200 and is_gzipped(answer) == gzipped and answer.headers["vary"] == "Accept-Encoding"
            body = gzip.decompress(answer.body) if gzipped else answer.body
            assert body == (plain.body if path == "/services" else ask(link, "GET", path, []).body)
        assert len(plain.body) > 1024
        # Several lines make one list.
        assert is_gzipped(ask(link, "GET", "/services", [("Accept-Encoding", "br"), ("Accept-Encoding", "gzip")]))


def test_a_head_tells_what_a_get_would(talker):
    for path, headers in itertools.product(("/services", "/logs/talk", "/services/web", "/nowhere", "/ready"),
                                           ({"Accept-Encoding": "gzip"}, {"Accept-Encoding": "identity"})):
        get, head = talker.get(path, **headers), talker.request("HEAD", path, headers=headers)
        assert (head.status, head.body) == (get.status, b"")
        for name in ("content-type", "content-encoding", "vary", "content-length", "transfer-encoding", "cache-control"):
            assert head.headers.get(name) == get.headers.get(name), (path, name)


@pytest.mark.parametrize("path", ["/ready", "/health", "/services/web", "/status/nowhere", "/nowhere"])
def test_short_answers_are_never_gzipped(talker, path):
    answer = talker.get(path, **{"Accept-Encoding": "gzip"})
    assert not is_gzipped(answer) and len(answer.body) < 1024
    assert int(answer.headers["content-length"]) == len(answer.body)


def follow(host: Host, path: str, *header_lines: bytes):
    """Return a file of what the server streams, after its head, and the head."""
    link = socket.create_connection(("127.0.0.1", host.port), support.PATIENCE_S)
    link.sendall(b"GET %b HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n%b\r\n" % (path.encode(), b"".join(header_lines)))
    file = link.makefile("rb")
    link.close()  # the file keeps it
    head = b"".join(iter(file.readline, b"\r\n")).lower()
    return file, head


def chunks(file):
    """Yield each chunk of a chunked body as it comes."""
    while size := int(file.readline(), 16):
        yield file.read(size)
        assert file.readline() == b"\r\n"


def test_a_followed_log_is_gzipped_line_by_line(talker):
    """Each chunk can be read when it comes: a follower waits for no block to fill."""
    deploy_id = talker.deploy(service="slow")
    file, head = follow(talker, f"/logs/{deploy_id}?follow=1", b"Accept-Encoding: gzip\r\n")
    with contextlib.closing(file):
        assert b"content-encoding: gzip\r\n" in head and b"transfer-encoding: chunked\r\n" in head
        reader, text, released = zlib.decompressobj(31), b"", False
        for chunk in chunks(file):
            text += reader.decompress(chunk)
            if b"first line" in text and b"last line" not in text:
                (talker.folder / f"go-{deploy_id}").touch()
                released = True
        assert released and b"last line" in text and reader.eof and not reader.unused_data


@pytest.mark.parametrize("encoding", [b"Accept-Encoding: gzip\r\n", b""])
def test_server_sent_events_are_never_gzipped(talker, encoding):
    deploy_id = talker.deploy(service="slow")
    file, head = follow(talker, f"/logs/{deploy_id}", b"Accept: text/event-stream\r\n", encoding)
    with contextlib.closing(file):
        assert b"content-type: text/event-stream" in head and b"content-encoding" not in head
        text = b""
        for chunk in chunks(file):
            text += chunk
            if b"first line" in text:
                (talker.folder / f"go-{deploy_id}").touch()
        assert b"last line" in text and b"event: end\n" in text


def test_an_http_1_0_client_gets_a_gzipped_log_until_the_end(talker):
    answer = talker.raw(b"GET /logs/talk HTTP/1.0\r\nHost: localhost\r\nAccept-Encoding: gzip\r\n\r\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"Content-Encoding: gzip" in head and b"Transfer-Encoding" not in head
    assert gzip.decompress(body) == talker.get("/logs/talk").body


# --- floods and the log

def test_a_flood_of_refusals_leaves_ten_lines_an_address():
    throttle = hookshot.RefusalThrottle()
    assert [throttle.admit("A", "192.0.2.1", 0.0) for _ in range(200)] == [True] * 10 + [False] * 190
    # Another reason and another address have lines of their own.
    assert throttle.admit("B", "192.0.2.1", 0.0) and throttle.admit("A", "192.0.2.2", 0.0)
    assert throttle.take(59.9) == []
    assert throttle.take(60.0) == [("A", "192.0.2.1", 190)]
    assert throttle.take(60.0) == []
    assert throttle.admit("A", "192.0.2.1", 60.1)


def test_what_had_its_line_is_not_told_again():
    throttle = hookshot.RefusalThrottle()
    for _ in range(10):
        assert throttle.admit("A", "192.0.2.1", 5.0)
    assert throttle.take(1000.0) == []


def test_a_minute_is_told_of_when_it_is_over_and_begins_with_its_first_refusal():
    throttle = hookshot.RefusalThrottle()
    for now_s in range(100, 160):
        throttle.admit("A", "192.0.2.1", float(now_s))
    for _ in range(12):
        throttle.admit("A", "192.0.2.2", 130.0)
    assert throttle.take(160.0) == [("A", "192.0.2.1", 50)]
    assert throttle.take(190.0) == [("A", "192.0.2.2", 2)]


def test_a_flood_from_everywhere_leaves_a_bounded_number_of_lines():
    throttle = hookshot.RefusalThrottle()
    shown = sum(throttle.admit("A", str(ipaddress.IPv4Address(number)), 0.0) for number in range(50_000))
    assert shown == hookshot.RefusalThrottle._MAX_SOURCES + hookshot.RefusalThrottle._LINES
    assert len(throttle._seen) <= hookshot.RefusalThrottle._MAX_SOURCES + 1
    # Another reason is still told of.
    assert throttle.admit("B", "192.0.2.1", 0.0)
    assert ("A", "others", 50_000 - shown) in throttle.take(60.0)
    assert throttle.admit("A", "198.51.100.1", 61.0)


def test_refusals_in_many_threads_are_all_counted():
    throttle = hookshot.RefusalThrottle()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        shown = sum(pool.map(lambda _: sum(throttle.admit("A", "192.0.2.1", 0.0) for _ in range(1000)), range(8)))
    assert shown == 10 and throttle.take(60.0) == [("A", "192.0.2.1", 7990)]


def test_a_flood_of_bad_signatures_is_ten_lines_in_the_log_and_all_are_answered(host):
    before = count(host)
    headers = [("X-Hub-Signature-256", "sha256=" + "0" * 64)]
    with connected(host.port, source="127.0.0.8") as link:
        assert {ask(link, "POST", "/deploy", headers, BODY).status for _ in range(200)} == {401}
    for _ in range(5):
        assert request_from(host, "127.0.0.9", "POST", "/deploy", BODY).status == 401
        assert request_from(host, "127.0.0.8", "GET", "/nowhere").status == 404
    code = {"code": "AUTHENTICATION_ERROR"}
    # Twice ten, should a minute end in between.
    assert 10 <= len(lines(host, "request_refused", address="127.0.0.8", **code)) <= 20
    assert len(lines(host, "request_refused", address="127.0.0.9", **code)) == 5
    assert len(lines(host, "request_refused", address="127.0.0.8", code="NOT_FOUND")) == 5
    assert count(host) == before


def test_a_refused_path_is_logged_without_its_query_and_on_one_line(host):
    request_from(host, "127.0.0.10", "GET", "/nowhere%C2%A0?token=" + TOKEN, headers={"User-Agent": "x"})
    request_from(host, "127.0.0.10", "GET", "/nowhere-10?token=s3cret")
    found = lines(host, "request_refused", address="127.0.0.10")
    assert found and all("?" not in line["message"] and "s3cret" not in json.dumps(line) for line in found)


# --- bugs

@pytest.fixture
def damaged(tmp_path):
    """A server with a deployment whose record holds what no version of this program writes."""
    with running(tmp_path, service(MARK)) as host:
        host.wait(host.deploy(deploy_id="odd"))
        host.wait(host.deploy(deploy_id="good"))
        with contextlib.closing(sqlite3.connect(host.data / "state.db")) as db:
            db.execute("UPDATE deployments SET metadata='{' WHERE deploy_id='odd'")
            db.commit()
        yield host


@pytest.mark.parametrize("path", ["/status/odd", "/logs/odd", "/deployments"])
def test_a_bug_is_one_500_with_a_request_id_and_one_line_in_the_log(damaged, path):
    answer = damaged.get(path, **{"X-Request-ID": "unlucky-1"})
    problem, said = answer.json, answer.body.decode()
    assert (answer.status, problem["code"]) == (500, "INTERNAL_ERROR")
    assert problem["request_id"] == answer.headers["x-request-id"] == "unlucky-1"
    assert not re.search(r"JSON|Traceback|hookshot\.py|sqlite|line \d|File", said) and str(damaged.folder) not in said
    [line] = lines(damaged, "bug")
    assert line["request_id"] == "unlucky-1" and "Traceback" in line["trace"] and "JSONDecodeError" in line["trace"]
    assert damaged.get("/status/good").status == 200
    assert damaged.wait(damaged.deploy("app:2"))["status"] == "Succeeded"
    assert len(lines(damaged, "bug")) == 1


def test_a_log_that_cannot_be_opened_is_an_error_with_its_reason(damaged):
    [log] = [path for path in (damaged.data / "logs").iterdir() if path.name == "2.log"]
    log.unlink()
    log.mkdir()
    answer = damaged.get("/logs/good?tail=5")
    assert (answer.status, answer.json["code"]) == (503, "STORAGE_ERROR") and str(damaged.folder) not in answer.body.decode()
    assert "Is a directory" in answer.json["detail"] and not lines(damaged, "bug")
    assert damaged.get("/ready").status == 200


def test_a_log_that_cannot_be_read_any_further_leaves_a_line(damaged):
    """The head is gone already, so the answer can only break off; the operator must learn of it."""
    log = damaged.data / "logs" / "2.log"
    log.unlink()
    log.mkdir()
    with contextlib.suppress(http.client.HTTPException):
        assert damaged.get("/logs/good").status == 500
    wait_until(lambda: lines(damaged, "answer_broken"), patience_s=5)
    assert damaged.get("/ready").status == 200


class Unlucky(Exception):
    """What a handler with a bug raises."""


def fail(app, request):
    raise Unlucky("the secret is hunter2")


def fail_midway(app, request):
    def stream():
        yield b"begun\n"
        raise Unlucky("the secret is hunter2")

    return hookshot.Response(200, content_type="text/plain", stream=stream())


BUGS = {
    "handler": hookshot.Route("GET", "/bug", "open", fail, ""), "quick": hookshot.Route("GET", "/bug", "open", fail, "", quick=fail),
    "signed": hookshot.Route("POST", "/bug", "signature", fail, "", quick=fail),
    "stream": hookshot.Route("GET", "/bug", "open", fail_midway, ""),
    "status": hookshot.Route("GET", "/bug", "open", lambda app, request: hookshot.Response(299), ""),
    "quick status": hookshot.Route("GET", "/bug", "open", fail, "", quick=lambda app, request: hookshot.Response(299)),
    "header": hookshot.Route("GET", "/bug", "open", lambda app, request: hookshot.Response(200, headers=(("A",),)), ""),
    "None": hookshot.Route("GET", "/bug", "open", lambda app, request: None, ""),
}


@contextlib.contextmanager
def serving(folder):
    """Give the port of a server in this process, and the list of what it publishes."""
    with serving_here(folder) as (server, events):
        yield server.listeners[0].listen.port, events


@contextlib.contextmanager
def serving_here(folder):
    """Give a server in this process, and the list of what it publishes."""
    host, events = Host(folder, service(MARK)), []
    problems: list[hookshot.Problem] = []
    settings = hookshot.read_settings(str(host.config), str(host.services), problems)
    keyring = hookshot.Keyring({"hmac_key": support.KEY.encode()}, hookshot.Masker())
    current = hookshot.Current(*settings, keyring)
    host.data.mkdir()
    with contextlib.closing(hookshot.Store(str(host.data))) as store:
        engine = hookshot.Engine(store, lambda: current, events.append, {})
        app = hookshot.App(store, engine, lambda: current, hookshot.Waiters(), events.append, hookshot.Metrics(), hookshot.Log("error"))
        server = hookshot.HttpServer(app)
        server.listen(hookshot.parse_listen("127.0.0.1:0"))
        thread = threading.Thread(target=server.serve, daemon=True)
        thread.start()
        try:
            yield server, events
        finally:
            server.close(support.PATIENCE_S)
            thread.join(support.PATIENCE_S)
            assert not thread.is_alive()


@pytest.mark.parametrize("name", BUGS)
def test_a_bug_in_a_handler_stays_in_its_request(tmp_path, monkeypatch, name):
    """A route of its own in ROUTES' place; nothing else is changed."""
    route = BUGS[name]
    monkeypatch.setitem(hookshot._PLAIN_ROUTES, (route.method, route.pattern), route)
    body = BODY if route.method == "POST" else None
    with serving(tmp_path) as (port, events), connected(port) as link:
        for number in range(1, 4):
            try:
                answer = ask(link, route.method, "/bug", hub(support.KEY, BODY) if body else [], body)
            except (http.client.HTTPException, OSError):
                link.close()  # begun and broken off: no client can take that for a whole answer
                assert name not in ("handler", "quick", "signed")
            else:
                assert (answer.status, answer.json["code"]) == (500, "INTERNAL_ERROR")
                assert "hunter2" not in answer.body.decode() and "Unlucky" not in answer.body.decode()
            wait_until(lambda: len([event for event in events if isinstance(event, hookshot.Broken)]) == number)
        ids = [event.request_id for event in events if isinstance(event, hookshot.Broken)]
        assert all(ids) and (name not in ("handler", "quick", "signed") or ids[-1] == answer.headers["x-request-id"])
        assert ask(link, "GET", "/services/none", []).status == 404
        # A body that stayed unread would be taken for the next request here.
        assert ask(link, "GET", "/services", []).status == 200
        assert len([event for event in events if isinstance(event, hookshot.Broken)]) == 3


def test_a_connection_stands_in_the_queue_of_turns_once_whatever_it_sends(tmp_path):
    """A pipelining client that had many turns at once would crowd out the others."""
    with serving_here(tmp_path) as (server, events), contextlib.ExitStack() as stack:
        address, over = ("127.0.0.1", server.listeners[0].listen.port), threading.Event()
        taken, longest = [0], 0

        def talk(link: socket.socket) -> None:
            link.setblocking(False)
            while not over.is_set():
                readable, writable, _ = select.select([link], [link], [], 0.1)
                with contextlib.suppress(BlockingIOError):
                    if writable:
                        link.send(b"GET /ready HTTP/1.1\r\nHost: a\r\n\r\n" * 1000)
                    if readable:
                        taken[0] += len(link.recv(1 << 16))

        links = [stack.enter_context(socket.create_connection(address)) for _ in range(4)]
        threads = [threading.Thread(target=talk, args=(link,)) for link in links]
        for thread in threads:
            thread.start()
        try:
            deadline = time.monotonic() + support.PATIENCE_S
            while taken[0] < 5_000_000 and time.monotonic() < deadline:
                longest = max(longest, len(server._again))
                over.wait(0.001)
        finally:
            over.set()
            for thread in threads:
                thread.join()
        assert taken[0] >= 5_000_000 and longest <= len(links) and not events
