# SPDX-License-Identifier: MPL-2.0
"""API: every route and gate on a real server; what is answered is what happened, and a refusal changes nothing."""

import base64
import concurrent.futures
import contextlib
import http.client
import json
import os
import re
import shutil
import socket
import sqlite3
import subprocess

import pytest

import hookshot
import support
from support import running, service, wait_until

TOKEN = "t0k3n-of-a-reader-0123456789abcdefgh"
TEAM_KEY = "7e57ab1e5eed0ddba11c0ffeefacade5ca1ab1ecafed00dbaadf00dfeedc0de1"
HOLD = '["sh", "-c", "echo begin; until [ -e go ]; do kill -0 $PPID || exit; sleep 0.02; done; echo end"]'
TALK = '["sh", "-c", "for i in 1 2 3 4 5; do echo line $i; done"]'
SICK = "[service.healthcheck]\ninitial_delay = 0\ninterval = 0\nmax_attempts = 1\nsuccess_threshold = 1\ncommands = [[\"test\", \"-e\", \"well\"]]\n" \
       '[service.rollback]\ncommands = [["touch", "well"]]\n'
BEARER = {"Authorization": f"Bearer {TOKEN}"}
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


def count(host: support.Host) -> int:
    """Return how many deployments are stored."""
    with contextlib.closing(sqlite3.connect(host.data / "state.db")) as db:
        return db.execute("SELECT count(*) FROM deployments").fetchone()[0]


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """A server with services that succeed, talk, hold, fail and fall sick; read access from this host."""
    services = service() + service(TALK, name="talk") + service(HOLD, name="hold") + service("[\"sh\", \"-c\", \"exit 3\"]",
        name="bad") \
        + service(name="sick", tables=SICK) + service(name="off", head="enabled = false") \
        + service(name="team").replace("[service.security]\n", '[service.security]\nhmac_keys = ["team_key"]\n') \
        + service('["sh", "-c", "echo $COLOUR"]', name="env").replace("[service.security]\n",
            '[service.security]\nallowed_env_overrides = ["COLOUR"]\n')
    config = "[server]\nworker_threads = 8\nmax_request_size = 4096\n[monitoring]\nstatus_cache_seconds = 0\n"
    with running(tmp_path_factory.mktemp("api"), services, config, secrets=f"read_token={TOKEN}\nteam_key={TEAM_KEY}\n") as host:
        yield host


@pytest.fixture
def unchanged(host):
    """Give the host, and see afterwards that nothing was stored."""
    before = count(host)
    yield host
    assert count(host) == before


def check_problem(answer: support.Answer, status: int, code: str) -> dict:
    """Return the problem document after checking every member that RFC 9457 and Hookshot 1.0 promise."""
    problem = answer.json
    assert (answer.status, problem["status"], problem["code"]) == (status, status, code)
    assert answer.headers["content-type"] == "application/problem+json"
    assert problem["type"] == "about:blank" and problem["title"] and problem["detail"] == problem["error"]
    assert "details" in problem and TIME.fullmatch(problem["timestamp"])
    assert problem["request_id"] == answer.headers["x-request-id"]
    return problem


# --- who may do what

ROUTES = [(route.method, route.pattern.replace("{id}", "none").replace("{request_id}", "none").replace("{name}", "web"), route.gate) for route in hookshot.ROUTES
          if route.pattern != "/events"]  # It has no end; tests/test_events.py asks it for its credential.
ANSWER_OF_READ = {"/status/none": 404, "/logs/none": 404, "/requests/none": 404}


@pytest.fixture(scope="module", params=["local", "token", "open"])
def guarded(request, tmp_path_factory):
    config = f'[security]\nread_access = "{request.param}"\n'
    with running(tmp_path_factory.mktemp(request.param), service(), config, secrets=f"read_token={TOKEN}\n") as host:
        yield request.param, host


@pytest.mark.parametrize("credential", ["none", "wrong", "right"])
@pytest.mark.parametrize("method, path, gate", ROUTES)
def test_every_route_asks_for_its_credential(guarded, method, path, gate, credential):
    mode, host = guarded
    if gate == "signature":
        headers = {"none": {}, "wrong": {"X-Hub-Signature-256": "sha256=" + "0" * 64},
                   "right": hookshot.sign_webhook(host.key, b"{}", hookshot.new_message_id(), hookshot.now_ms() // 1000)}[credential]
        answer = host.request(method, path, b"{}", headers)
        assert answer.status == (400 if credential == "right" else 401)
        assert count(host) == 0
    else:
        # From this host, but through a proxy: what a stranger's request looks like.
        headers = {"none": {}, "wrong": {"Authorization": "Bearer " + "x" * 36}, "right": BEARER}[credential]
        passes = gate == "open" or mode == "open" or credential == "right"
        answer = host.get(path, **{"X-Forwarded-For": "127.0.0.1"}, **headers)
        assert answer.status == (ANSWER_OF_READ.get(path, 200) if passes else 401)
        local = host.get(path, **headers)
        assert local.status == (ANSWER_OF_READ.get(path, 200) if passes or mode == "local" else 401)
    if answer.status == 401:
        check_problem(answer, 401, "AUTHENTICATION_ERROR")
        assert answer.headers["www-authenticate"]


@pytest.mark.parametrize("headers, status", [
    ({}, 200), ({"Host": "localhost"}, 200), ({"Host": "localhost:8080"}, 200), ({"Host": "[::1]:80"}, 200),
    ({"Host": "rebound.evil.example"}, 401), ({"Host": "127.0.0.1.evil.example"}, 401), ({"Host": "localhost.evil.example"}, 401),
    ({"X-Forwarded-For": "127.0.0.1"}, 401), ({"Forwarded": "for=127.0.0.1"}, 401), ({"X-Real-IP": "127.0.0.1"}, 401),
    ({"Via": "1.1 x"}, 401),
    ({"Host": "evil.example", **BEARER}, 200), ({"X-Forwarded-For": "192.0.2.1", **BEARER}, 200),
    ({"X-Forwarded-For": "1", "Authorization": "bearer " + TOKEN}, 200), ({"X-Forwarded-For": "1", "Authorization": TOKEN}, 401),
    ({"X-Forwarded-For": "1", "Authorization": "Bearer tök"}, 401), ({"X-Forwarded-For": "1", "Authorization": f"Basic {TOKEN}"},
    401)])
def test_local_reading_means_this_hosts_name_and_no_proxy(host, headers, status):
    encoded = {name: value.encode("utf-8") for name, value in headers.items()}
    assert host.request("GET", "/services", headers=encoded).status == status


def test_a_token_in_the_query_is_no_credential(host):
    assert host.get(f"/services?token={TOKEN}", **{"X-Forwarded-For": "192.0.2.1"}).status == 401


@pytest.mark.parametrize("signature", [
    None, "", "sha256=", "sha256=" + "0" * 64, "sha1=" + "0" * 40, "0" * 64, "sha256=" + "g" * 64, "sha256=ä",
    "v1," + base64.b64encode(bytes(32)).decode(), hookshot.sign(b"another key of enough bytes", b"BODY"), hookshot.sign(b"",
    b"BODY")])
def test_a_missing_or_wrong_signature_is_refused_alike_for_known_and_unknown_services(unchanged, signature):
    answers = []
    for name in ("web", "nowhere"):
        body = json.dumps({"service": name, "image": "app:1"}).encode()
        headers = {} if signature is None else {"X-Hub-Signature-256": signature.encode()}
        answers.append(check_problem(unchanged.request("POST", "/deploy", body, headers), 401, "AUTHENTICATION_ERROR"))
    assert answers[0]["detail"] == answers[1]["detail"] and answers[0]["details"] == answers[1]["details"]


def test_a_signature_holds_for_the_raw_body_only(unchanged):
    body = b'{"service": "web", "image": "app:1"}'
    headers = {"X-Hub-Signature-256": hookshot.sign(unchanged.key, body)}
    assert unchanged.request("POST", "/deploy", body.replace(b": ", b":"), headers).status == 401


@pytest.mark.parametrize("change", [str.upper, str.lower])
def test_a_signature_may_be_written_in_either_case(host, change):
    body = b'{ "service":"web",\n"image":"app:1", "metadata": {"who": "J\\u00f6rg \xc3\xa4"} }\n'
    signature = change(hookshot.sign(host.key, body).removeprefix("sha256="))
    assert host.request("POST", "/deploy", body, {"X-Hub-Signature-256": f"sha256={signature}"}).status == 202


def test_a_services_key_signs_for_its_service_only(host):
    key = TEAM_KEY.encode()
    before = count(host)
    wrong = [host.post({"service": name, "image": "app:1"}, key=key) for name in ("web", "nowhere")]
    for answer in wrong:
        check_problem(answer, 401, "AUTHENTICATION_ERROR")
    assert wrong[0].json["detail"] == wrong[1].json["detail"] and count(host) == before
    answer = host.post({"service": "team", "image": "app:1"}, key=key)
    assert answer.status == 202
    assert host.wait(answer.json["deploy_id"])["triggered_by"]["key_id"] == "team_key"
    assert host.wait(host.deploy(service="team"))["triggered_by"]["key_id"] == "hmac_key"


# --- errors

@pytest.mark.parametrize("method, path, status, code, allow", [
    ("GET", "/", 404, "NOT_FOUND", None), ("GET", "/nothing", 404, "NOT_FOUND", None), ("GET", "/status/", 404, "NOT_FOUND", None),
    ("GET", "/status/a/b", 404, "NOT_FOUND", None), ("GET", "/status/none", 404, "DEPLOYMENT_NOT_FOUND", None),
    ("GET", "/status/%3Cscript%3E", 404, "DEPLOYMENT_NOT_FOUND", None), ("GET", "/logs/none", 404, "DEPLOYMENT_NOT_FOUND", None),
    ("GET", "/services/none", 404, "SERVICE_NOT_FOUND", None), ("GET", "/deploy", 405, "METHOD_NOT_ALLOWED", "POST"),
    ("HEAD", "/deploy", 405, None, "POST"), ("POST", "/health", 405, "METHOD_NOT_ALLOWED", "GET, HEAD"),
    ("DELETE", "/status/x", 405, "METHOD_NOT_ALLOWED", "GET, HEAD"), ("PUT", "/deploy", 405, "METHOD_NOT_ALLOWED", "POST"),
    ("OPTIONS", "/deploy", 405, "METHOD_NOT_ALLOWED", "POST"), ("PATCH", "/services/web", 405, "METHOD_NOT_ALLOWED", "GET, HEAD")])
def test_a_wrong_path_or_method_is_told_as_a_problem(unchanged, method, path, status, code, allow):
    answer = unchanged.request(method, path, b"{}" if method not in ("GET", "HEAD") else None)
    assert answer.status == status and answer.headers.get("allow") == allow
    if code:
        check_problem(answer, status, code)


@pytest.mark.parametrize("path", ["/health", "/ready", "/services", "/services/web", "/deployments", "/status/ID", "/logs/ID",
    "/nothing"])
def test_head_answers_as_get_does_without_a_body(host, path):
    deploy_id = host.deploy(service="talk")
    host.wait(deploy_id)
    path = path.replace("ID", deploy_id)
    head, get = host.request("HEAD", path), host.get(path)
    assert (head.status, head.body, head.headers["content-type"]) == (get.status, b"", get.headers["content-type"])
    assert head.headers.get("content-length") in (None, get.headers.get("content-length")), "a length of 0 would be a lie"


@pytest.mark.parametrize("given, echoed", [
    ("abc-1.2_3", True), ("x" * 128, True), ("x" * 129, False), ("", False), ("a b", False), ("a/b", False), ("ä", False), ("<x>",
    False)])
def test_a_well_formed_request_id_is_echoed_and_another_replaced(host, given, echoed):
    answer = host.request("GET", "/nothing", headers={"X-Request-ID": given.encode()})
    own = answer.headers["x-request-id"]
    assert own == answer.json["request_id"]
    assert own == given if echoed else re.fullmatch(r"[0-9a-f]{16}", own)


@pytest.mark.parametrize("headers, status", [
    ({"Content-Type": "application/json; charset=UTF-8"}, 202), ({"Content-Type": "Application/JSON"}, 202),
    ({"Content-Type": "text/plain"}, 415), ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
    ({"Content-Type": "application/json; charset=latin-1"}, 415), ({"Content-Encoding": "gzip"}, 415)])
def test_only_plain_json_is_taken(host, headers, status):
    before = count(host)
    answer = host.post({"service": "web", "image": "app:1"}, headers=headers)
    assert answer.status == status and count(host) == before + (status == 202)


def test_a_body_beyond_max_request_size_is_refused(unchanged):
    check_problem(unchanged.post(b"x" * 4097), 413, "PAYLOAD_TOO_LARGE")


@pytest.mark.parametrize("body, field", [
    (b"", "not JSON"), (b"{", "not JSON"), (b"[]", "not a JSON object"), (b"\xff", "UTF-8"), (b"[" * 2000 + b"]" * 2000, "nested"),
    (b'{"service":"web","service":"api","image":"app:1"}', "service"),
    (b'{"service":"web","image":"app:1","metadata":{"a":NaN}}', "metadata.a"),
    (b'{"service":"web","image":"app:1","metadata":{"a":%s}}' % (b"9" * 3000), "metadata.a"),
    (b'{"service":"web","image":"app:\\ud800"}', "image"), (b'{"service":"web","image":"app:1\\u0000"}', "image")])
def test_what_is_no_plain_json_is_named_and_nothing_stored(unchanged, body, field):
    assert field in check_problem(unchanged.post(body), 400, "VALIDATION_ERROR")["detail"]


@pytest.mark.parametrize("change, field", [
    ({"service": None}, "service: is required"), ({"image": None}, "image: is required"), ({"service": 1}, "service"),
    ({"image": ["app:1"]}, "image"), ({"image": ""}, "image"), ({"image": "other:1"}, "image"), ({"image": "app:1 "}, "image"),
    ({"image": "app:1\n"}, "image"), ({"image": "-app:1"}, "image"), ({"previous_image": "evil:1"}, "previous_image"),
    ({"metadata": []}, "metadata"), ({"metadata": {"a": {}}}, "metadata.a"), ({"dry_run": "yes"}, "dry_run"), ({"imgae": ""}, "imgae"),
    ({"deploy_id": "../x"}, "deploy_id"), ({"deploy_id": "x" * 129}, "deploy_id"), ({"overrides": {"env": {"A": []}}}, "overrides.env.A"),
    ({"overrides": {"env": {"COLOUR": "x"}}}, "COLOUR"), ({"service": "env", "overrides": {"env": {"PATH": "x"}}}, "PATH"),
    ({"service": "env", "overrides": {"env": {"LD_PRELOAD": "x"}}}, "LD_PRELOAD")])
def test_what_is_wrong_with_a_field_is_named_and_nothing_stored(unchanged, change, field):
    problem = check_problem(unchanged.post({"service": "web", "image": "app:1", **change}), 400, "VALIDATION_ERROR")
    assert field in problem["detail"] and "app:[a-z" not in json.dumps(problem)


def test_an_unknown_service_is_told_to_who_may_deploy(unchanged):
    check_problem(unchanged.post({"service": "nowhere", "image": "app:1"}), 404, "SERVICE_NOT_FOUND")


@pytest.mark.parametrize("path", ["/deploy?wait=x", "/deploy?wait=-1", "/deploy?wait="])
def test_an_unreadable_wait_is_refused_before_anything_is_stored(unchanged, path):
    check_problem(unchanged.post({"service": "web", "image": "app:1"}, path=path), 400, "VALIDATION_ERROR")


# --- deploying

def test_an_accepted_deploy_is_told_where_to_look(host):
    answer = host.post({"service": "web", "image": "app:1"})
    document = answer.json
    deploy_id = document["deploy_id"]
    assert answer.status == 202 and answer.headers["location"] == document["status_url"] == f"/status/{deploy_id}"
    assert document == {"deploy_id": deploy_id, "service": "web", "status": "Queued", "image": "app:1",
        "position": document["position"],
                        "status_url": f"/status/{deploy_id}", "log_url": f"/logs/{deploy_id}"}
    assert document["position"] >= 1


def test_the_same_id_with_the_same_body_is_one_deployment_and_with_another_a_conflict(host):
    body = {"service": "web", "image": "app:1", "deploy_id": "build-17"}
    assert host.post(body).status == 202
    first = host.wait("build-17")
    before = count(host)
    again = host.post(body)
    assert (again.status, again.json["deploy_id"], again.json["status"]) == (200, "build-17", "Succeeded")
    check_problem(host.post({**body, "image": "app:2"}), 409, "DEPLOY_ID_CONFLICT")
    assert count(host) == before and host.record("build-17") == first


@pytest.mark.parametrize("first, second", [("key-1", '"key-1"'), ('"key 2"', None), ("key-3", "key-3")])
def test_an_idempotency_key_makes_two_requests_one(host, first, second):
    body = {"service": "web", "image": "app:1"}
    one = host.post(body, headers={"Idempotency-Key": first})
    if second is None:
        check_problem(one, 400, "VALIDATION_ERROR")
        return
    before = count(host)
    two = host.post(body, headers={"Idempotency-Key": second})
    assert (one.status, two.status, two.json["deploy_id"]) == (202, 200, one.json["deploy_id"])
    check_problem(host.post({**body, "image": "app:2"}, headers={"Idempotency-Key": first}), 409, "DEPLOY_ID_CONFLICT")
    assert count(host) == before


def test_a_repeated_request_of_a_failed_deployment_is_told_so_with_200(host):
    body = {"service": "bad", "image": "app:1", "deploy_id": "bad-1"}
    host.post(body)
    host.wait("bad-1")
    again = host.post(body)
    assert (again.status, again.json["status"]) == (200, "Failed")


def test_a_dry_run_tells_the_plan_and_neither_runs_nor_stores_anything(unchanged):
    answer = unchanged.post({"service": "sick", "image": "app:2", "previous_image": "app:1", "dry_run": True})
    plan = answer.json
    assert answer.status == 200 and plan["dry_run"] is True
    assert plan["phases"]["deploy"][0]["run"] == ["true"] and plan["phases"]["deploy"][0]["timeout_seconds"] > 0
    assert "HOOKSHOT_IMAGE" in plan["phases"]["deploy"][0]["env"]
    assert (plan["rollback"]["possible"], plan["rollback"]["to"]) == (True, "app:1")
    assert unchanged.get(f"/status/{plan['deploy_id']}").status == 404
    assert not (unchanged.folder / "well").exists()


@pytest.mark.parametrize("document", [{"service": "off", "image": "app:1"}, {"service": "web", "image": "evil:1"},
    {"service": "nowhere", "image": "app:1"}])
def test_a_dry_run_is_refused_as_the_deploy_would_be(unchanged, document):
    real, dry = unchanged.post(document), unchanged.post({**document, "dry_run": True})
    assert (dry.status, dry.json["code"], dry.json["detail"]) == (real.status, real.json["code"], real.json["detail"])


# --- waiting

ENDS = {"web": (200, "Succeeded"), "bad": (500, "Failed"), "sick": (200, "RolledBack")}


@pytest.mark.parametrize("how", [{"path": "/deploy?wait=30"}, {"headers": {"Prefer": "respond-async, wait=30"}}])
@pytest.mark.parametrize("name", ENDS)
def test_who_waits_is_told_the_outcome(host, how, name):
    (host.folder / "well").unlink(missing_ok=True)
    answer = host.post({"service": name, "image": "app:2", "previous_image": "app:1"}, **how)
    document = answer.json
    assert (answer.status, document["status"]) == ENDS[name]
    assert document["service"] == name and document["status_url"] == f"/status/{document['deploy_id']}" and document["log_url"]
    assert TIME.fullmatch(document["started_at"]) and TIME.fullmatch(document["completed_at"]) and document["duration_seconds"] >= 0
    if name == "bad":
        assert document["failure_stage"] == "deploy" and "status 3" in document["failure_detail"] and document["requires_intervention"] is False
    if name == "sick":
        assert (document["attempted_image"], document["current_image"]) == ("app:2", "app:1")
        assert document["error"] and document["rollback_reason"]
    if "headers" in how:
        assert answer.headers["preference-applied"] == "wait=30"


def test_a_failed_rollback_asks_for_intervention(tmp_path):
    with running(tmp_path, service('["false"]', tables='[service.rollback]\ncommands = [["false"]]')) as host:
        answer = host.post({"service": "web", "image": "app:2", "previous_image": "app:1"}, path="/deploy?wait=30")
        assert (answer.status, answer.json["status"], answer.json["requires_intervention"]) == (500, "RollbackFailed", True)


def test_a_wait_of_nothing_is_an_answer_at_once(tmp_path):
    """Also where the server would wait for the end: so a client learns the id, and whether the request was new."""
    with running(tmp_path, service(), '[server]\ndeploy_response = "completed"\n') as host:
        for number in range(20):
            first = host.post({"service": "web", "image": "app:1", "deploy_id": f"d{number}"}, path="/deploy?wait=0")
            assert first.status == 202 and first.json["position"] == 1
            host.wait(f"d{number}")
        again = host.post({"service": "web", "image": "app:1", "deploy_id": "d0"}, path="/deploy?wait=0")
        assert (again.status, again.json["status"]) == (200, "Succeeded") and "position" not in again.json


def test_waiting_ends_when_its_time_is_up_and_the_deployment_goes_on(tmp_path):
    with running(tmp_path, service(HOLD)) as host:
        answer = host.post({"service": "web", "image": "app:1"}, path="/deploy?wait=1")
        assert (answer.status, answer.json["status"]) == (202, "Deploying")
        (tmp_path / "go").touch()
        assert host.wait(answer.json["deploy_id"])["status"] == "Succeeded"


def test_a_leaving_waiter_changes_nothing(tmp_path):
    with running(tmp_path, service(HOLD), '[server]\ndeploy_response = "completed"\n') as host:
        body = json.dumps({"service": "web", "image": "app:1", "deploy_id": "left"}).encode()
        with socket.create_connection(("127.0.0.1", host.port)) as link:
            link.sendall(b"POST /deploy HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\nX-Hub-Signature-256: %b\r\n\r\n%b"
                         % (len(body), hookshot.sign(host.key, body).encode(), body))
            wait_until(lambda: host.get("/status/left").status == 200 and host.record("left")["status"] == "Deploying")
        (tmp_path / "go").touch()
        record = host.wait("left")
        assert record["status"] == "Succeeded" and record["commands"][0]["stdout"] == "begin\nend\n"
        again = host.post(body)
        assert (again.status, again.json["status"]) == (200, "Succeeded")
        assert host.post({"service": "web", "image": "app:2"}).json["status"] == "Succeeded"


def test_who_waits_is_answered_when_the_server_shuts_down(tmp_path):
    with running(tmp_path, service(HOLD), "[server]\nshutdown_timeout = 0\n") as host:
        body = json.dumps({"service": "web", "image": "app:1", "deploy_id": "cut"}).encode()
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", host.port, timeout=support.PATIENCE_S)) as link:
            link.request("POST", "/deploy?wait=100", body, {"X-Hub-Signature-256": hookshot.sign(host.key, body)})
            wait_until(lambda: host.get("/status/cut").status == 200 and host.record("cut")["progress"]["phase"])
            host.process.terminate()
            answer = support.Answer(link.getresponse())
        assert (answer.status, answer.json["deploy_id"], answer.json["status"]) == (202, "cut", "Deploying")
        assert host.process.wait(support.PATIENCE_S) == 0


# --- the record

def test_the_record_of_a_success_is_complete_and_true(host):
    answer = host.post({"service": "env", "image": "app:1", "metadata": {"sha": "abc", "pr": 7, "draft": False, "gone": None},
                        "overrides": {"env": {"COLOUR": "red"}}}, headers={"User-Agent": "ci/1.0", "X-Request-ID": "req-1"})
    record = host.wait(answer.json["deploy_id"])
    assert record["metadata"] == {"sha": "abc", "pr": "7", "draft": "false"}
    assert record["triggered_by"] == {"address": "127.0.0.1", "key_id": "hmac_key", "user_agent": "ci/1.0", "request_id": "req-1"}
    assert [move["state"] for move in record["state_transitions"]] == ["Queued", "Validating", "Deploying", "Succeeded"]
    assert record["rollback"] == {"attempted": False, "reason": None, "succeeded": None} and record["error"] is None
    [command] = record["commands"]
    assert (command["phase"], command["step"], command["status"], command["exit_code"], command["signal"]) == ("deploy", 1,
        "succeeded", 0, None)
    assert (command["timed_out"], command["attempt"], command["stdout"], command["output_preview"]) == (False, 1, "red\n", "red")
    timings = record["timings"]
    moments = [timings[name] for name in ("queued_at", "started_at", "completed_at")]
    assert all(map(TIME.fullmatch, moments)) and moments == sorted(moments)
    assert [move["at"] for move in record["state_transitions"]][0] == timings["queued_at"]
    assert [move["at"] for move in record["state_transitions"]][-1] == timings["completed_at"]
    assert timings["deploy_time_ms"] >= command["duration_ms"] and timings["duration_ms"] >= timings["deploy_time_ms"]
    assert timings["queue_time_ms"] >= 0 and timings["healthcheck_time_ms"] is None and timings["rollback_time_ms"] is None
    assert record["logs_url"] == f"/logs/{record['deploy_id']}"


def test_the_record_of_a_rollback_tells_both_ways(host):
    (host.folder / "well").unlink(missing_ok=True)
    record = host.wait(host.deploy("app:2", "sick", previous_image="app:1"))
    assert (record["status"], record["previous_image"]) == ("RolledBack", "app:1")
    assert [command["phase"] for command in record["commands"]] == ["deploy", "healthcheck", "rollback", "healthcheck"]
    assert record["rollback"]["attempted"] and record["rollback"]["succeeded"] and "health check failed" in record["rollback"]["reason"]
    assert "health check failed" in record["error"]
    assert all(record["timings"][name] is not None for name in ("deploy_time_ms", "healthcheck_time_ms", "rollback_time_ms"))


def test_the_record_of_a_running_deployment_tells_where_it_is(tmp_path):
    with running(tmp_path, service('["true"]', HOLD.replace("[", '{ name = "switch", run = [', 1) + "}", '["true"]')) as host:
        deploy_id = host.deploy()
        wait_until(lambda: host.record(deploy_id)["progress"]["current_step"] == "switch")
        record = host.record(deploy_id)
        assert record["status"] == "Deploying" and record["timings"]["completed_at"] is None
        assert record["progress"] == {"phase": "deploy", "steps_completed": 1, "steps_total": 3, "current_step": "switch"}
        (tmp_path / "go").touch()
        host.wait(deploy_id)


# --- the log

@pytest.fixture(scope="module")
def talked(host):
    """Give the id of a deployment that has printed five lines, and its whole log."""
    deploy_id = host.deploy(service="talk")
    host.wait(deploy_id)
    return deploy_id, host.log(deploy_id)


def test_a_log_has_every_line_with_time_phase_and_stream(host, talked):
    deploy_id, log = talked
    assert re.findall(r"^[0-9T:.Z-]{24} deploy out line (\d)$", log, re.MULTILINE) == list("12345")
    assert host.get(f"/logs/{deploy_id}").headers["content-type"] == "text/plain; charset=utf-8"


@pytest.mark.parametrize("tail", [0, 1, 2, 3, 100000])
def test_tail_gives_the_last_lines(host, talked, tail):
    deploy_id, log = talked
    lines = log.splitlines(keepends=True)
    assert host.get(f"/logs/{deploy_id}?tail={tail}").body.decode() == "".join(lines[-tail:] if tail else [])


@pytest.mark.parametrize("tail", ["-1", "x", "1e3", "100001", ""])
def test_an_unreadable_tail_is_refused(host, talked, tail):
    check_problem(host.get(f"/logs/{talked[0]}?tail={tail}"), 400, "VALIDATION_ERROR")


def events_of(body: bytes) -> list[dict[str, str]]:
    """Return the fields of each event, several lines of data joined as a browser joins them."""
    events = []
    for text in body.decode().strip("\n").split("\n\n"):
        event: dict[str, str] = {}
        for name, _, value in (line.partition(": ") for line in text.split("\n")):
            event[name] = f"{event[name]}\n{value}" if name in event else value
        events.append(event)
    return events


def test_server_sent_events_have_ids_to_resume_from_and_an_end(host, talked):
    deploy_id, log = talked
    path, accept = f"/logs/{deploy_id}", {"Accept": "text/event-stream"}
    *blocks, end = events_of(host.get(path, **accept).body)
    assert "\n".join(event["data"] for event in blocks) == log.rstrip("\n") and int(blocks[-1]["id"]) == len(log.encode())
    assert end["event"] == "end" and json.loads(end["data"]) == {"deploy_id": deploy_id, "status": "Succeeded", "error": None}
    content = log.encode()
    for position in [index + 1 for index, byte in enumerate(content) if byte == 0x0A]:
        *rest, _ = events_of(host.get(path, **accept, **{"Last-Event-ID": str(position)}).body)
        assert "\n".join(event["data"] for event in rest) == content[position:].decode().rstrip("\n")


@pytest.mark.parametrize("headers, path", [({}, "?follow=1"), ({"Accept": "text/event-stream"}, "")])
def test_following_shows_lines_as_they_come_and_ends_with_the_deployment(tmp_path, headers, path):
    with running(tmp_path, service(HOLD)) as host:
        deploy_id = host.deploy()
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", host.port, timeout=support.PATIENCE_S)) as link:
            link.request("GET", f"/logs/{deploy_id}{path}", headers=headers)
            response = link.getresponse()
            seen = b""
            while b" out begin" not in seen:
                seen += response.readline()
            assert host.wait(deploy_id, "Deploying") and b" out end" not in seen
            (tmp_path / "go").touch()
            seen += response.read()
        assert b" out end" in seen and b"Succeeded" in seen
        assert host.log(deploy_id) in seen.decode() or headers


# --- lists and statistics

def test_deployments_are_listed_newest_first_a_page_at_a_time(tmp_path):
    with running(tmp_path, service() + service('["false"]', name="bad")) as host:
        ids = [host.deploy(service=name) for name in ("web", "bad", "web", "bad", "web")]
        for deploy_id in ids:
            host.wait(deploy_id)

        def page(query=""):
            found = host.get(f"/deployments{query}").json
            return [entry["deploy_id"] for entry in found["deployments"]], found["next_cursor"]

        assert page() == (ids[::-1], None)
        assert page("?service=bad") == ([ids[3], ids[1]], None) and page("?service=nowhere") == ([], None)
        assert page("?status=Succeeded") == ([ids[4], ids[2], ids[0]], None)
        assert page("?service=web&status=Failed") == ([], None)
        first, cursor = page("?limit=2")
        second, cursor = page(f"?limit=2&cursor={cursor}")
        third, end = page(f"?limit=2&cursor={cursor}")
        assert first + second + third == ids[::-1] and end is None
        assert page("?limit=5")[1] is None


@pytest.mark.parametrize("query", ["limit=0", "limit=201", "limit=x", "limit=", "cursor=x", "cursor=-1", "status=Nope"])
def test_a_wrong_parameter_of_the_list_is_refused(host, query):
    problem = check_problem(host.get(f"/deployments?{query}"), 400, "VALIDATION_ERROR")
    assert query.partition("=")[0] in problem["detail"]


def test_statistics_of_a_service_are_what_happened(tmp_path):
    sick = SICK.replace('[["test", "-e", "well"]]', '[["sh", "-c", "test -e well"]]')
    with running(tmp_path, service('["sh", "-c", "test ! -e broken"]', tables=sick)) as host:
        never = host.get("/services/web").json
        assert (never["health"], never["current_image"], never["last_deploy"], never["stats"]["success_rate"]) == ("Unknown", None,
            None, None)
        (tmp_path / "well").touch()
        first = host.wait(host.deploy("app:1"))
        assert host.get("/services/web").json["health"] == "Healthy"
        (tmp_path / "well").unlink()
        second = host.wait(host.deploy("app:2"))
        assert host.get("/services/web").json["health"] == "Degraded"
        (tmp_path / "broken").touch()
        (tmp_path / "well").touch()
        third = host.wait(host.deploy("app:1"))
        assert [record["status"] for record in (first, second, third)] == ["Succeeded", "RolledBack", "Failed"]
        found = host.get("/services/web").json
        assert [entry for entry in host.get("/services").json["services"]] == [found]
        assert (found["current_image"], found["health"], found["locked"], found["queue"]) == ("app:1", "Unhealthy", False,
            {"pending": 0, "active": 0})
        assert found["last_deploy"] == {"deploy_id": third["deploy_id"], "status": "Failed",
            "completed_at": third["timings"]["completed_at"]}
        stats = found["stats"]
        assert (stats["total_deploys"], stats["succeeded"], stats["rolled_back"], stats["failed"]) == (3, 1, 1, 1)
        assert stats["success_rate"] == pytest.approx(1 / 3, abs=1e-3) and stats["last_failure"] == third["timings"]["completed_at"]
        mean = sum(record["timings"]["duration_ms"] for record in (first, second, third)) / 3000
        assert stats["avg_duration_seconds"] == pytest.approx(mean, abs=2e-3)
        host.stop()
        assert host.start().get("/services/web").json == found


# --- who is let in, and how often

def through(*chain: str) -> dict[str, str]:
    return {"X-Forwarded-For": ", ".join(chain)}


@pytest.mark.parametrize("headers, status", [
    (through("192.0.2.7"), 401), (through("192.0.2.7:4711"), 401), (through("198.51.100.1"), 403), (through("192.0.2.7",
    "198.51.100.1"), 403),
    (through("198.51.100.1", "192.0.2.7"), 401), (through("192.0.2.7", "127.0.0.9"), 401), (through("[2001:db8::1]:80"), 401),
    (through("2001:db9::1"), 403), (through("::ffff:192.0.2.7"), 401), (through("unknown"), 403),
    ({"Forwarded": 'for="[2001:db8::1]:80";proto=https'}, 401),
    ({"Forwarded": "for=192.0.2.7, for=198.51.100.1"}, 403), ({}, 403)])
def test_behind_a_trusted_proxy_the_clients_own_address_counts(proxied, headers, status):
    answer = proxied.post(b"x", key=b"wrong key of enough bytes", headers=headers)
    assert answer.status == status and count(proxied) == 0


@pytest.fixture(scope="module")
def proxied(tmp_path_factory):
    config = '[security]\nallowed_ips = ["192.0.2.0/24", "2001:db8::/32"]\ntrusted_proxies = ["127.0.0.0/8"]\n'
    with running(tmp_path_factory.mktemp("proxied"), service(), config) as host:
        yield host


def test_forwarding_headers_of_a_stranger_are_not_believed(tmp_path):
    with running(tmp_path, service(), '[security]\nallowed_ips = ["192.0.2.0/24"]\n') as host:
        for headers in (through("192.0.2.7"), {"Forwarded": "for=192.0.2.7"}, {"X-Real-IP": "192.0.2.7"}):
            check_problem(host.post({"service": "web", "image": "app:1"}, headers=headers), 403, "ACCESS_DENIED")
        assert count(host) == 0


def test_a_deploys_address_is_the_clients_behind_the_proxy(proxied):
    headers = through("192.0.2.7", "127.0.0.2")
    deploy_id = proxied.post({"service": "web", "image": "app:1"}, headers=headers).json["deploy_id"]
    with contextlib.closing(sqlite3.connect(proxied.data / "state.db")) as db, db:
        assert json.loads(db.execute("SELECT \"trigger\" FROM deployments WHERE deploy_id=?",
            (deploy_id,)).fetchone()[0])[0] == "192.0.2.7"


def test_too_many_requests_from_one_address_are_told_when_to_come_back(tmp_path):
    with running(tmp_path, service(), '[security]\nrate_limit = 3\ntrusted_proxies = ["127.0.0.1"]\n') as host:
        def ask(address):
            return host.post({"service": "web", "image": "app:1"}, headers=through(address))

        assert [ask("192.0.2.1").status for _ in range(3)] == [202] * 3
        problem = ask("192.0.2.1")
        check_problem(problem, 429, "RATE_LIMIT_EXCEEDED")
        assert 1 <= int(problem.headers["retry-after"]) <= 60 and count(host) == 3
        assert ask("192.0.2.2").status == 202
        assert [ask(f"2001:db8:0:1::{number}").status for number in range(1, 5)] == [202] * 3 + [429]
        assert ask("2001:db8:0:2::1").status == 202
        assert [host.get("/health").status for _ in range(5)] == [200] * 5


def test_a_rate_limit_of_0_is_no_limit(tmp_path):
    with running(tmp_path, service(), "[security]\nrate_limit = 0\n") as host:
        assert {host.get("/services").status for _ in range(50)} == {200}


# --- health

def test_health_tells_queue_database_disk_and_workers(host):
    report = host.get("/health").json
    assert report["status"] == "healthy" and report["version"] == hookshot.__version__ and report["uptime_seconds"] >= 0
    assert report["deployment_queue"]["workers"] == 8 and report["deployment_queue"]["pending"] == 0
    assert report["database"]["connected"] is True and report["database"]["size_bytes"] > 0
    assert report["logs"]["size_bytes"] is None or report["logs"]["size_bytes"] >= 0
    assert report["checks"] == {"database": "ok", "disk_space": "ok", "worker_pool": "ok"}
    assert host.get("/ready").json == {"ready": True, "message": "ready"}


def test_health_is_cached_for_status_cache_seconds(tmp_path):
    with running(tmp_path, service(HOLD), "[monitoring]\nstatus_cache_seconds = 3600\n") as host:
        assert host.get("/health").json["deployment_queue"]["active"] == 0
        host.wait(host.deploy(), "Deploying")
        assert host.get("/health").json["deployment_queue"]["active"] == 0
        (tmp_path / "go").touch()


def test_health_answers_at_its_configured_path_only(tmp_path):
    with running(tmp_path, service(), '[monitoring]\nhealth_path = "/healthz"\n') as host:
        assert (host.get("/healthz").status, host.get("/health").status) == (200, 404)


# --- when storage fails

def test_a_damaged_database_is_told_with_503_and_nothing_runs(tmp_path):
    with running(tmp_path, service('["touch", "ran"]'), "[monitoring]\nstatus_cache_seconds = 0\n") as host:
        host.wait(host.deploy())
        (tmp_path / "ran").unlink()
        for suffix in ("", "-wal"):
            path = host.data / f"state.db{suffix}"
            path.write_bytes(b"\xa5" * path.stat().st_size)
        # Open connections have the pages of so small a database in memory; several readers at once make a new one look.
        with concurrent.futures.ThreadPoolExecutor(8) as readers:
            wait_until(lambda: any(answer.status == 503 for answer in readers.map(host.get, ["/deployments"] * 16)))
        problem = host.post({"service": "web", "image": "app:2"})
        check_problem(problem, 503, "STORAGE_ERROR")
        assert int(problem.headers["retry-after"]) > 0 and str(tmp_path) not in problem.body.decode()
        health = host.get("/health")
        assert (health.status, health.json["status"], health.json["database"]["connected"]) == (503, "unhealthy", False)
        assert not (tmp_path / "ran").exists()
        host.kill()


def test_a_locked_database_is_told_with_503_and_works_again_afterwards(tmp_path):
    with running(tmp_path, service()) as host:
        with contextlib.closing(sqlite3.connect(host.data / "state.db", isolation_level=None)) as db:
            db.execute("BEGIN IMMEDIATE")
            check_problem(host.post({"service": "web", "image": "app:1"}), 503, "STORAGE_ERROR")
            assert host.get("/services").status == 200
            db.execute("ROLLBACK")
        assert count(host) == 0
        assert host.wait(host.deploy())["status"] == "Succeeded"


def test_a_data_directory_that_is_gone_is_told_with_503(tmp_path):
    with running(tmp_path, service(), "[monitoring]\nstatus_cache_seconds = 0\n") as host:
        shutil.rmtree(host.data)
        assert host.get("/health").status == 503
        check_problem(host.post({"service": "web", "image": "app:1"}), 503, "STORAGE_ERROR")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 16 MB."""
    if os.geteuid() != 0:
        pytest.skip("missing: root")
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", folder], capture_output=True).returncode:
        pytest.skip("this machine does not let root mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_refuses_new_deploys_with_507_and_loses_nothing(tmp_path, small_disk):
    with running(tmp_path, service(),
        f'[storage]\ndata_dir = "{small_disk}/data"\n[monitoring]\nstatus_cache_seconds = 0\n') as host:
        deploy_id = host.deploy()
        host.wait(deploy_id)
        with contextlib.suppress(OSError), open(small_disk / "filler", "wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))
        refused = host.post({"service": "web", "image": "app:2"})
        check_problem(refused, 507, "DISK_FULL")
        assert int(refused.headers["retry-after"]) > 0
        assert (host.get("/health").status, host.record(deploy_id)["status"]) == (503, "Succeeded")
        assert len(host.get("/deployments").json["deployments"]) == 1
        (small_disk / "filler").unlink()
        assert host.get("/health").status == 200 and host.wait(host.deploy("app:3"))["status"] == "Succeeded"


@pytest.mark.parametrize("headers, address", [
    ({"x-forwarded-for": "203.0.113.9"}, "203.0.113.9"),
    ({"forwarded": "for=203.0.113.9"}, "203.0.113.9"),
    ({"forwarded": "for=203.0.113.9", "x-forwarded-for": "203.0.113.9"}, "203.0.113.9"),
    ({"forwarded": "for=10.0.0.1", "x-forwarded-for": "203.0.113.9"}, None),
    ({}, "127.0.0.1")])
def test_a_forwarding_header_that_the_proxy_passed_through_forges_no_address(headers, address):
    request = hookshot.Request("GET", "/", {}, headers, b"", hookshot.parse_address("127.0.0.1"), "id")
    found = hookshot.client_address(request, [hookshot.parse_network("127.0.0.1")])
    assert (None if found is None else str(found)) == address
