# SPDX-License-Identifier: MPL-2.0
"""The audit: a chain of rows that shows what was done to it; the trace of each decision; the last use of each key."""

import concurrent.futures
import contextlib
import hashlib
import http.client
import ipaddress
import json
import pathlib
import sqlite3
import threading
from collections.abc import Iterator
from typing import Any

import pytest

import hookshot
import support
from support import running, service, wait_until

TEAM_KEY = "41d7c0b9e5f2483a96bc17e80d35fa2c6b9e01f4a87d52c3908e6ab1f3d4c752"
STRANGER = "c61e05ba7f9843d2e8a60b7c95d1f4a3206be8d79f51ca34b0e6d28f17c93a54"
OLD_KEY = "7be0415fc2d94a1e8f36a7d80c5be219d4f7036a1b8ec59270fd3ae61c84b95d"
LIMITS = hookshot.load_config("", "config.toml", []).limits._replace(max_queue_per_service=10_000)
TRIGGER = hookshot.Trigger("192.0.2.7", "hmac_key", "curl/8", "req-1")
DAY_MS = 86_400_000


@contextlib.contextmanager
def opened(folder: pathlib.Path) -> Iterator[hookshot.Store]:
    (folder / "logs").mkdir(exist_ok=True)
    with contextlib.closing(hookshot.Store(str(folder))) as store:
        yield store


def submit(store: hookshot.Store, number: int, at_ms: int = 1000, **fields: Any) -> hookshot.Submission:
    body = json.dumps({"service": "web", "image": f"app:{number}", "deploy_id": f"d-{number}", **fields}).encode()
    request = hookshot.parse_deploy(hookshot.VerifiedBody("hmac_key", body), None)
    return store.submit(request, TRIGGER._replace(request_id=f"req-{number}"), at_ms, limits=LIMITS, on_busy="queue")


def verify(folder: pathlib.Path, head: str | None = None) -> hookshot.AuditCheck:
    return hookshot.verify_audit(str(folder / "state.db"), head)


def rows_of(folder: pathlib.Path, **how: Any) -> list[hookshot.AuditRow]:
    """Oldest first."""
    return list(reversed(hookshot.read_audit(str(folder / "state.db"), **{"service": None, "limit": 10**6, **how})))


def ask(folder: pathlib.Path, *statements: str) -> list[Any]:
    with contextlib.closing(sqlite3.connect(folder / "state.db")) as db, db:
        return [db.execute(statement).fetchall() for statement in statements][-1]


# --- the chain


@pytest.fixture(scope="module")
def filled(tmp_path_factory) -> bytes:
    """A database with ten rows in its audit, as bytes."""
    folder = tmp_path_factory.mktemp("filled")
    with opened(folder) as store:
        for number in range(8):
            submit(store, number)
        store.record_audit([hookshot.AuditRow(2000, "count", "counted", detail="7 X from 192.0.2.1, é \N{SNOWMAN}", requests=7),
                            hookshot.AuditRow(2001, "deploy", "RATE_LIMIT_EXCEEDED", "req-9", "192.0.2.1", gate="rate")], [])
    return (folder / "state.db").read_bytes()


@pytest.fixture()
def folder(tmp_path, filled) -> pathlib.Path:
    (tmp_path / "state.db").write_bytes(filled)
    return tmp_path


def test_the_rows_fit_and_can_be_checked_with_nothing_of_hookshot(folder):
    """As docs/audit.md says."""
    found = verify(folder)
    assert (found.rows, found.first, found.last, found.bad, found.problem) == (10, 1, 10, None, None)
    before = "0" * 64
    for *values, digest in ask(folder, "SELECT at_ms, action, decision, request_id, address, key_id, service, deploy_id, image, gate, detail, requests, n, hash "
                                       "FROM audit ORDER BY n"):
        before = hashlib.sha256((before + "\n" + json.dumps(values, separators=(",", ":"))).encode()).hexdigest()
        assert before == digest
    assert found.hash == before


@pytest.mark.parametrize("column", [name for name in hookshot.AuditRow._fields if name not in ("n",)])
def test_an_edit_of_any_column_is_found(folder, column):
    ask(folder, f"UPDATE audit SET {column}='5' WHERE n=4")
    assert verify(folder).bad == 4


ATTACKS = {
    "one removed": (["DELETE FROM audit WHERE n=4"], 5),
    "the first removed": (["DELETE FROM audit WHERE n=1"], 2),
    "removed and closed up": (["DELETE FROM audit WHERE n=4", "UPDATE audit SET n=n-1 WHERE n > 4"], 4),
    "two exchanged": (["UPDATE audit SET n=100 WHERE n=4", "UPDATE audit SET n=4 WHERE n=5", "UPDATE audit SET n=5 WHERE n=100"], 4),
    "the last one doubled": (["INSERT INTO audit SELECT 11, at_ms, action, decision, request_id, address, key_id, service, deploy_id, image, gate, "
                              "detail, requests, hash FROM audit WHERE n=10"], 11),
    "one put in": (["UPDATE audit SET n=n+101 WHERE n > 4", "UPDATE audit SET n=n-100 WHERE n > 100",
                    "INSERT INTO audit SELECT 5, at_ms, action, decision, request_id, address, key_id, service, deploy_id, image, gate, "
                    "detail, requests, hash FROM audit WHERE n=4"], 5),
    "one before the first": (["INSERT INTO audit SELECT 0, at_ms, action, decision, request_id, address, key_id, service, deploy_id, image, gate, "
                              "detail, requests, hash FROM audit WHERE n=1"], 0),
    "a text that is none": (["UPDATE audit SET detail=CAST(x'ff' AS TEXT) WHERE n=4"], 4),
    "a value of another kind": (["UPDATE audit SET detail=x'00' WHERE n=4"], 4),
    "the first ones removed, as if by retention": ([
        "DELETE FROM audit WHERE n < 4",
        "INSERT INTO audit SELECT 11, 1, 'prune', 'done', NULL, NULL, NULL, NULL, NULL, NULL, NULL, 'rows up to 3, whose hash is ' || hash || "
        "', are not kept any longer', 1, hash FROM audit WHERE n=10"], 4)}


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_was_done_to_the_rows_is_found(folder, attack):
    statements, bad = ATTACKS[attack]
    ask(folder, *statements)
    assert verify(folder).bad == bad


def test_an_edited_row_with_a_hash_made_anew_does_not_fit_the_next(folder):
    row = rows_of(folder)[3]._replace(image="app:666")
    before = rows_of(folder)[2].hash
    ask(folder, f"UPDATE audit SET image='app:666', hash='{hookshot.chain_hash(before, row)}' WHERE n=4")
    assert verify(folder).bad == 5


def test_a_lost_end_and_a_chain_made_anew_need_a_head_noted_before(folder):
    noted = verify(folder).hash
    assert verify(folder, noted).has_head and verify(folder, rows_of(folder)[4].hash).has_head
    ask(folder, "DELETE FROM audit WHERE n=10")
    found = verify(folder, noted)
    assert found.bad is None and found.rows == 9 and not found.has_head
    before = hookshot.AUDIT_ROOT
    for row in rows_of(folder):
        row = row._replace(address="192.0.2.99")
        before = hookshot.chain_hash(before, row)
        ask(folder, f"UPDATE audit SET address='192.0.2.99', hash='{before}' WHERE n={row.n}")
    found = verify(folder, noted)
    assert found.bad is None and not found.has_head


def test_an_empty_audit_fits(tmp_path):
    with opened(tmp_path):
        pass
    assert verify(tmp_path)[:4] == (0, 1, 0, hookshot.AUDIT_ROOT)


# --- with the facts


def test_an_acceptance_and_its_row_are_one_transaction(tmp_path):
    """What is refused in the transaction, alone or beside others, leaves neither."""
    with opened(tmp_path) as store:
        submit(store, 1)
        with pytest.raises(hookshot.HookshotError, match="belongs to another request"):
            submit(store, 1, image="app:other")
        assert not submit(store, 1).created
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda number: store.record_audit([hookshot.AuditRow(1, "reload", "done")], []) if number % 3 else submit(store, number), range(3, 300)))
        deployed = {row[0] for row in ask(tmp_path, "SELECT deploy_id FROM deployments")}
        rows = rows_of(tmp_path)
    assert {row.deploy_id for row in rows if row.decision == "accepted"} == deployed and len(deployed) == 100
    assert verify(tmp_path)[:3] == (298, 1, 298)


def test_a_database_of_the_last_schema_is_upgraded_with_all_that_is_in_it(tmp_path):
    last = next(number for number, script in enumerate(hookshot.MIGRATIONS) if "CREATE TABLE audit" in script)
    with contextlib.closing(sqlite3.connect(tmp_path / "state.db")) as db, db:
        db.executescript("".join(hookshot.MIGRATIONS[:last]) + f"PRAGMA user_version={last};")
        db.execute("INSERT INTO locks VALUES ('web', 'ann', NULL, 1, NULL, NULL)")
    with pytest.raises(hookshot.HookshotError, match="older hookshot"):
        verify(tmp_path)
    before = hookshot.now_ms() // 1000 * 1000
    with opened(tmp_path) as store:
        assert store.locks(1)["web"].owner == "ann" and verify(tmp_path).rows == 0
        assert before <= int(store.marks()["keys_since_ms"]) <= hookshot.now_ms()
        submit(store, 1, service="api")
    assert verify(tmp_path).rows == 1


def test_retention_takes_whole_days_from_the_beginning_and_the_rest_can_be_checked(tmp_path):
    with opened(tmp_path) as store:
        # A clock that was put back in between: the row stays until all before it go.
        for number, at_ms in enumerate((0, DAY_MS // 2, 5 * DAY_MS, DAY_MS, 9 * DAY_MS)):
            submit(store, number, at_ms)
        assert store.prune_audit(8 * DAY_MS - 1, days=7) == 0, "a day of grace: one row of pruning a day, not one each hour"
        assert store.prune_audit(9 * DAY_MS, days=7) == 2 and store.prune_audit(9 * DAY_MS, days=7) == 0
        assert [row.n for row in rows_of(tmp_path)] == [3, 4, 5, 6] and verify(tmp_path)[:3] == (4, 3, 6)
        assert store.prune_audit(20 * DAY_MS, days=7) == 3
        assert verify(tmp_path)[:3] == (2, 6, 7), "the row that says what was removed before goes too, the new one stays"
        for number in range(10, 20):
            submit(store, number, 20 * DAY_MS)
        assert store.prune_audit(20 * DAY_MS, days=7, keep=5) and len(rows_of(tmp_path)) <= 6
        check = verify(tmp_path)
        assert check.bad is None
    ask(tmp_path, f"DELETE FROM audit WHERE n={check.first}")
    assert verify(tmp_path).bad == check.first + 1


def test_a_row_that_was_removed_by_retention_cannot_come_back(tmp_path, folder):
    with opened(folder) as store:
        assert store.prune_audit(2000 + 9 * DAY_MS, days=7) == 9
    assert verify(folder).bad is None
    ask(folder, "INSERT INTO audit SELECT 9, at_ms, action, decision, request_id, address, key_id, service, deploy_id, image, gate, detail, requests, hash "
                "FROM audit WHERE n=10")
    assert verify(folder).bad == 9


# --- floods


def journal(store: hookshot.Store, told: list[Any] | None = None) -> hookshot.Journal:
    return hookshot.Journal(store, (told if told is not None else []).append)


def refuse(kept: hookshot.Journal, number: int, address: str, code: str = "AUTHENTICATION_ERROR", *, is_known: bool = False) -> bool:
    if kept.admits(code, ipaddress.ip_address(address), is_known=is_known):
        kept.add(hookshot.AuditRow(number, "deploy", code, f"req-{number}", address))
        return True
    return False


def test_a_flood_of_refusals_is_a_few_rows_and_a_number(tmp_path):
    with opened(tmp_path) as store:
        kept = journal(store)
        kept.turn(0.0)
        for number in range(5000):
            refuse(kept, number, "192.0.2.1")
        refuse(kept, 5000, "192.0.2.2")
        assert len(rows_of(tmp_path)) == 0
        kept.turn(1.0)
        assert [row.request_id for row in rows_of(tmp_path)] == ["req-0", "req-1", "req-2", "req-5000"]
        kept.turn(61.0)
        count = rows_of(tmp_path)[-1]
        assert (count.action, count.requests, count.detail) == ("count", 4997, "4997 AUTHENTICATION_ERROR from 192.0.2.1")
        kept.turn(200.0)
        assert len(rows_of(tmp_path)) == 5 and verify(tmp_path).bad is None


def test_strangers_from_everywhere_grow_nothing_and_take_nothing_from_who_holds_a_key(tmp_path):
    with opened(tmp_path) as store:
        kept, minutes = journal(store), 50
        kept.turn(0.0)
        for minute in range(minutes):
            for number in range(2000):
                refuse(kept, number, f"10.{minute}.{number >> 8}.{number & 255}")
            assert len(kept._rows) + len(kept._counted) + len(kept._given) < 1500
            kept.turn(60.0 * (minute + 1))
        rows = rows_of(tmp_path)
        assert len(rows) == 100 + (minutes - 1) + minutes, "a hundred at once, then one a minute, and the count of each minute"
        assert sum(row.requests for row in rows) == minutes * 2000
        assert max(len(row.detail or "") for row in rows) < 600
        assert refuse(kept, 1, "10.0.0.1", is_known=True)


def test_what_waits_is_found_and_what_is_written_is_found_once(tmp_path):
    with opened(tmp_path) as store:
        kept = journal(store)
        kept.add(hookshot.AuditRow(hookshot.now_ms(), "deploy", "VALIDATION_ERROR", "twice", "192.0.2.1"))
        assert [row.n for row in kept.find("twice")] == [0] and kept.find("other") == []
        store.record_audit(kept.find("twice"), [])
        assert [row.n for row in kept.find("twice")] == [1], "written, and not yet let go"
        kept.add(hookshot.AuditRow(hookshot.now_ms() - 8 * DAY_MS, "deploy", "VALIDATION_ERROR", "old", "192.0.2.1"))
        kept.turn(0.0)
        assert kept.find("old") == [] and len(rows_of(tmp_path)) == 3


def test_who_uses_an_id_of_another_does_not_hide_his_request(tmp_path):
    with opened(tmp_path) as store:
        submit(store, 1, hookshot.now_ms())
        store.record_audit([hookshot.AuditRow(hookshot.now_ms(), "deploy", "AUTHENTICATION_ERROR", "req-1", "192.0.2.9") for _ in range(150)], [])
        found = journal(store).find("req-1")
        assert len(found) == 100 and found[0].decision == "accepted" and found[-1].n == 151


def test_rows_wait_for_a_database_that_cannot_be_written(tmp_path):
    with opened(tmp_path) as store:
        told: list[Any] = []
        kept = journal(store, told)
        refuse(kept, 1, "192.0.2.1")
        kept.use(hookshot.KeyUse("hmac_key", "web", 5, "192.0.2.1", "req-1"))
        store._relaxed_writer.execute("PRAGMA query_only=ON")
        with pytest.raises(hookshot.HookshotError, match="read-only"):
            kept.turn(0.0)
        store._relaxed_writer.execute("PRAGMA query_only=OFF")
        kept.turn(1.0)
        assert [row.request_id for row in rows_of(tmp_path)] == ["req-1"] and store.key_uses()["hmac_key", "web"].at_ms == 5


def test_a_disk_that_stays_full_takes_no_more_memory_and_what_is_lost_is_told(tmp_path):
    with opened(tmp_path) as store:
        told: list[Any] = []
        kept, sent = journal(store, told), 0
        store._relaxed_writer.execute("PRAGMA query_only=ON")
        for minute in range(1000):
            for number in range(8):
                refuse(kept, number, "192.0.2.1", is_known=True)
                sent += 1
            with pytest.raises(hookshot.HookshotError):
                kept.turn(60.0 * minute)
        assert len(kept._rows) <= 2001
        kept.stop()
        kept.run()
        assert "rows of the audit are lost" in told[-1].message
        store._relaxed_writer.execute("PRAGMA query_only=OFF")
        kept.turn(1e9)
        assert sum(row.requests for row in rows_of(tmp_path)) == sent


def test_a_row_that_cannot_be_written_keeps_no_other_from_it(tmp_path):
    with opened(tmp_path) as store:
        kept = journal(store)
        kept.add(hookshot.AuditRow(1, "reload", "done", detail="\ud800"))
        with pytest.raises(UnicodeEncodeError):
            kept.turn(0.0)
        refuse(kept, 1, "192.0.2.1")
        kept.turn(1.0)
        assert [row.request_id for row in rows_of(tmp_path)] == ["req-1"] and verify(tmp_path).bad is None


# --- a server

ANY_KEY = 'hmac_keys = ["hmac_key", "old_key", "spare_key"]'
LONG = "until [ -e go ]; do kill -0 $PPID || exit; sleep 0.02; done"
SERVICES = (service(f'["sh", "-c", "{LONG}"]') + service('["echo", "{{meta.release}}"]', name="picky", head='description = "needs meta"')
            + service(name="off", head="enabled = false")
            + service(name="api").replace("[service.security]\n", '[service.security]\nhmac_keys = ["team_key"]\n') + service(name="quick"))
CONFIG = f"""
[server]
request_timeout = 2
max_request_size = "64KB"
[security]
{ANY_KEY}
allowed_ips = ["127.0.0.1", "127.0.0.4/30"]
rate_limit = 10000
[limits]
max_queue_per_service = 1
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    secrets = f"team_key={TEAM_KEY}\nold_key={OLD_KEY}\nspare_key={TEAM_KEY[::-1]}\n"
    with running(tmp_path_factory.mktemp("audited"), SERVICES, CONFIG, secrets=secrets) as host:
        yield host


def send(host: support.Host, path: str, body: bytes, headers: dict[str, str], source: str = "127.0.0.1") -> tuple[int, str]:
    """Return status and request id of an answer to a request from an address."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", host.port, timeout=30, source_address=(source, 0))) as link:
        link.request("POST", path, body, headers)
        answer = link.getresponse()
        answer.read()
        return answer.status, answer.headers["X-Request-ID"]


def signed(body: bytes, key: str = support.KEY, *, message_id: str | None = None, late_s: int = 0, **more: str) -> dict[str, str]:
    at_s = hookshot.now_ms() // 1000 - late_s
    return {"Content-Type": "application/json", **hookshot.sign_webhook(key.encode(), body, message_id or hookshot.new_message_id(), at_s), **more}


def trace(host: support.Host, request_id: str) -> dict[str, Any]:
    """Return the one trace of a request."""
    answer = host.get(f"/requests/{request_id}")
    assert answer.status == 200 and len(answer.json["requests"]) == 1, answer.body
    return answer.json["requests"][0]


def check_refused_at(host: support.Host, action: str, gate: str, request_id: str) -> dict[str, Any]:
    """Every gate before it was passed, and no other is told of."""
    found = trace(host, request_id)
    order = hookshot.GATES_OF[action]
    assert found["action"] == action and [told["gate"] for told in found["gates"]] == list(order[: order.index(gate) + 1]), found
    assert [told["result"] for told in found["gates"]] == ["passed"] * order.index(gate) + ["refused"]
    return found


def body_of(name: str, image: str = "app:1", **fields: Any) -> bytes:
    return json.dumps({"service": name, "image": image, **fields}).encode()


def control_body(action: str, target: str, **fields: Any) -> bytes:
    return json.dumps({"action": action, hookshot.CONTROLS[action][0]: target, **fields}).encode()


def path_of(action: str, target: str) -> str:
    return f"/{'deployments' if hookshot.CONTROLS[action][0] == 'deploy_id' else 'services'}/{target}/{action}"


def control(host: support.Host, action: str, target: str, key: str = support.KEY, *, message_id: str | None = None, **fields: Any) -> tuple[int, str]:
    body = control_body(action, target, **fields)
    return send(host, path_of(action, target), body, signed(body, key, message_id=message_id))


def test_each_gate_of_a_deploy_refuses_what_all_behind_it_would_refuse_too(host):
    """A staircase: every request violates one gate and, as far as that can be, each one behind; so the order that is told is the true one."""
    bad = b'{"service": "off", "image": '
    worst = {"Content-Type": "text/plain"}
    steps = [
        ("length", 413, bad.ljust(70_000), worst, "127.0.0.2"),
        ("address", 403, bad, worst, "127.0.0.2"),
        ("credentials", 401, bad, worst, "127.0.0.1"),
        ("signature", 401, bad, signed(bad, STRANGER, late_s=9999) | worst, "127.0.0.1"),
        ("timestamp", 401, bad, signed(bad, TEAM_KEY, late_s=9999) | worst, "127.0.0.1"),
        ("media_type", 415, bad, signed(bad, TEAM_KEY) | worst, "127.0.0.1"),
        ("fields", 400, bad, signed(bad, TEAM_KEY), "127.0.0.1")]
    env = {"overrides": {"env": {"COLOUR": "red"}}}
    for gate, status, key, body in (
            ("key", 401, TEAM_KEY, body_of("nowhere", "evil:1", **env)), ("target", 404, support.KEY, body_of("nowhere", "evil:1", **env)),
            ("enabled", 403, support.KEY, body_of("off", "evil:1", **env)), ("image", 400, support.KEY, body_of("picky", "evil:1", **env)),
            ("overrides", 400, support.KEY, body_of("picky", **env)), ("plan", 400, support.KEY, body_of("picky"))):
        steps.append((gate, status, body, signed(body, key), "127.0.0.1"))
    for gate, status, body, headers, source in steps:
        answered, request_id = send(host, "/deploy", body, headers, source)
        assert answered == status, gate
        found = check_refused_at(host, "deploy", gate, request_id)
        assert found["address"] == source and (found["key_id"] is None) == (gate in ("length", "address", "credentials", "signature", "timestamp"))
        assert (found["service"] is None) == (hookshot.GATES_OF["deploy"].index(gate) <= hookshot.GATES_OF["deploy"].index("fields"))


def test_a_body_that_does_not_come_is_refused_at_its_transfer(host):
    late = host.raw(b"POST /deploy HTTP/1.1\r\nHost: localhost\r\nX-Request-ID: slow-1\r\nX-Hub-Signature-256: sha256=00\r\nContent-Length: 5\r\n\r\n{")
    assert b" 408 " in late.partition(b"\r\n")[0]
    check_refused_at(host, "deploy", "transfer", "slow-1")


def test_the_last_gates_of_a_deploy_and_of_control_requests(host):
    body = body_of("web", deploy_id="holder")
    status, accepted = send(host, "/deploy", body, signed(body, message_id="m-holder"))
    assert status == 202
    host.wait("holder", "Deploying")
    waiting = body_of("web", "app:2", deploy_id="waiter")
    assert send(host, "/deploy", waiting, signed(waiting))[0] == 202
    assert control(host, "lock", "web", owner="ann", reason="audit night", message_id="m-lock")[0] == 200

    # Locked, and the queue is full: each refusal is the first that applies.
    other = body_of("web", "app:3", deploy_id="holder")
    for gate, status, body in (("id", 409, other), ("lock", 423, body_of("web", "app:3"))):
        answered, request_id = send(host, "/deploy", body, signed(body))
        assert answered == status
        found = check_refused_at(host, "deploy", gate, request_id)
    assert "locked by ann" in found["detail"] and "audit night" in found["detail"] and found["gates"][-1]["rule"].startswith("service web is not locked")
    for action, gate, status, made in (
            ("lock", "lock", 423, control(host, "lock", "web", owner="bob")), ("unlock", "lock", 423, control(host, "unlock", "web", owner="bob")),
            ("lock", "id", 409, control(host, "lock", "web", owner="bob", message_id="m-holder")),
            ("lock", "target", 404, control(host, "lock", "nowhere")), ("lock", "key", 401, control(host, "lock", "nowhere", TEAM_KEY)),
            ("cancel", "target", 404, control(host, "cancel", "none")), ("cancel", "key", 401, control(host, "cancel", "holder", TEAM_KEY)),
            ("cancel", "fields", 400, control(host, "cancel", "holder", colour="red")), ("retry", "state", 409, control(host, "retry", "holder")),
            ("retry", "id", 409, control(host, "retry", "holder", message_id="m-holder")),
            ("rollback", "state", 409, control(host, "rollback", "web")), ("rollback", "image", 400, control(host, "rollback", "picky", to="evil:1")),
            ("rollback", "enabled", 403, control(host, "rollback", "off", to="evil:1")),
            ("rollback", "plan", 400, control(host, "rollback", "picky", to="app:1")), ("rollback", "queue", 503, control(host, "rollback", "web", to="app:9"))):
        assert made[0] == status, action
        check_refused_at(host, action, gate, made[1])
    plain = control_body("lock", "web")
    status, request_id = send(host, path_of("lock", "web"), plain, {"X-Hub-Signature-256": hookshot.sign(support.KEY.encode(), plain)})
    assert status == 401 and check_refused_at(host, "lock", "timestamp", request_id)["key_id"] == "hmac_key"

    assert control(host, "unlock", "web", owner="ann")[0] == 200
    body = body_of("web", "app:4")
    status, request_id = send(host, "/deploy", body, signed(body))
    assert status == 503 and "max_queue_per_service" in check_refused_at(host, "deploy", "queue", request_id)["detail"]

    found = trace(host, accepted)
    assert found["decision"] == "accepted" and found["deploy_id"] == "holder" and {told["result"] for told in found["gates"]} == {"passed"}
    assert [told["gate"] for told in found["gates"]] == list(hookshot.GATES_OF["deploy"])
    (host.folder / "go").touch()
    assert host.wait("waiter")["status"] == "Succeeded"
    assert check_refused_at(host, "cancel", "state", control(host, "cancel", "waiter")[1])


def test_who_is_too_fast_is_refused_at_the_rate(tmp_path):
    """And a body that would be refused by all the rest is not looked at."""
    with running(tmp_path, service(), "[security]\nrate_limit = 1\n") as host:
        answers = [send(host, "/deploy", b"{", {}, "127.0.0.3") for _ in range(2)]
        assert [status for status, _ in answers] == [401, 429]
        check_refused_at(host, "deploy", "rate", answers[1][1])


def test_a_full_disk_and_a_server_that_shuts_down_come_before_the_id(tmp_path, monkeypatch):
    order = hookshot.GATES_OF["deploy"]
    assert order.index("accepting") < order.index("storage") < order.index("id")
    with opened(tmp_path) as store:
        submit(store, 1)
        monkeypatch.setattr(hookshot, "DISK_RESERVE_BYTES", 1 << 62)
        with pytest.raises(hookshot.HookshotError) as caught:
            submit(store, 1, image="app:other")
    assert caught.value.name == "disk_full"


def test_every_kind_of_refusal_of_a_signed_request_has_its_gate():
    named = set(hookshot._GATE_OF_WORD.values()) | {"image", "overrides", "plan"}
    assert named == set(hookshot.GATES) == {gate for gates in hookshot.GATES_OF.values() for gate in gates}
    words = {*hookshot.ERRORS, *hookshot.AUTH_REASONS}
    assert set(hookshot._GATE_OF_WORD) <= words
    assert hookshot.GATES_OF.keys() == {"deploy", "plan", *hookshot.CONTROLS}


def test_a_repeated_request_and_a_plan_are_told_as_such(host):
    body = body_of("quick", deploy_id="again")
    with_id = {"X-Request-ID": "used-twice"}
    assert send(host, "/deploy", body, signed(body, **with_id))[0] == 202
    host.wait("again")
    assert send(host, "/deploy", body, signed(body, **with_id), "127.0.0.4")[0] == 200
    first, second = host.get("/requests/used-twice").json["requests"]
    assert (first["decision"], second["decision"], second["address"], second["deploy_id"]) == ("accepted", "repeated", "127.0.0.4", "again")
    assert second["gates"][-1] == {"gate": "id", "rule": hookshot.GATES["id"], "result": "known"} and {told["result"] for told in second["gates"][:-1]} == {"passed"}
    # Whoever follows what he asked for himself asks with ?wait: that is no news.
    assert send(host, "/deploy?wait=5", body, signed(body, **{"X-Request-ID": "follows"}))[0] == 200
    assert send(host, "/deploy?wait=5", body, signed(body, **{"X-Request-ID": "replays"}), "127.0.0.4")[0] == 200
    assert host.get("/requests/follows").status == 404 and trace(host, "replays")["decision"] == "repeated"

    plan = body_of("quick", dry_run=True)
    _, request_id = send(host, "/deploy", plan, signed(plan))
    assert trace(host, request_id)["decision"] == "planned"
    assert [told["gate"] for told in trace(host, request_id)["gates"]] == list(hookshot.GATES_OF["plan"])
    assert control(host, "lock", "quick", message_id="m-twice")[0] == control(host, "lock", "quick", message_id="m-twice")[0] == 200
    _, repeated = control(host, "lock", "quick", message_id="m-twice")
    assert trace(host, repeated)["decision"] == "repeated" and trace(host, repeated)["gates"][-1]["result"] == "known"
    control(host, "unlock", "quick")


def test_nothing_of_a_secret_a_body_or_a_header_is_kept(host):
    """The canary is a key that a pipeline has put where it does not belong."""
    canary = {"X-Request-ID": "canary", "X-Secret": "CANARY-header", "Authorization": "Bearer CANARY-token"}
    for body in (body_of("quick", f"app:{OLD_KEY}", colour=5), body_of("quick", f"evil:{OLD_KEY}"), b'{"service": "CANARY-body", "image": 5'):
        send(host, "/deploy", body, signed(body, **canary), "127.0.0.5")
    control(host, "lock", "quick", reason=f"with {OLD_KEY}", owner=OLD_KEY)
    control(host, "unlock", "quick", owner=OLD_KEY)
    send(host, f"/deploy?token={OLD_KEY}&CANARY-query", b"CANARY-body", {"X-Hub-Signature-256": "sha256=CANARY-signature", "X-Request-ID": "canary"}, "127.0.0.5")
    assert len(host.get("/requests/canary").json["requests"]) == 4
    stored = ask(host.data, "SELECT * FROM audit")
    wait_until(lambda: len(ask(host.data, "SELECT * FROM audit WHERE request_id='canary'")) == 4)
    texts = json.dumps([stored, ask(host.data, "SELECT * FROM audit"), ask(host.data, "SELECT * FROM key_uses"), ask(host.data, "SELECT * FROM lockings"),
                        host.get("/requests/canary").json, host.get("/services?keys=1").json])
    assert OLD_KEY not in texts and "CANARY" not in texts and "app:[a-z0-9.]+" not in texts and "***" in texts


def test_only_signed_routes_leave_traces_and_readers_that_miss_leave_no_rows(host):
    assert host.request("GET", "/status/none", headers={"X-Request-ID": "reader"}).status == 404
    assert host.request("GET", "/nowhere", headers={"X-Request-ID": "scanner"}).status == 404
    assert host.get("/requests/reader").status == 404
    found = trace(host, "scanner")
    assert (found["action"], found["decision"], found["gates"]) == ("GET other", "NOT_FOUND", [])
    assert host.get("/requests/%0a").status in (400, 404)


@pytest.fixture()
def command(host, capsys):
    """Gives what runs a command here, with the host's files: its exit status and what it prints."""
    def run(*args: str, config: pathlib.Path = host.config) -> tuple[int, str]:
        status = hookshot.main(["-c", str(config), *args])
        return status, "".join(capsys.readouterr())

    return run


def test_the_last_use_of_each_key_is_known_by_service(host, command):
    body = body_of("quick", "evil:1")
    assert send(host, "/deploy", body, signed(body, OLD_KEY, **{"X-Request-ID": "refused-use"}))[0] == 400
    assert send(host, "/deploy", b"{", signed(b"{", OLD_KEY, **{"X-Request-ID": "vague-use"}))[0] == 400

    def keys() -> dict[tuple[str | None, str], dict[str, Any]]:
        return {(entry["service"], entry["name"]): entry for entry in host.get("/services?keys=1").json["keys"]}

    used = wait_until(lambda: (found := keys()).get((None, "old_key")) and found)
    assert used["quick", "old_key"]["request_id"] == "refused-use", "it signed, so it was used"
    assert used[None, "old_key"]["request_id"] == "vague-use" and used["off", "old_key"]["last_used_at"] is None
    assert ("web", "team_key") not in used and used["web", "hmac_key"]["address"] == "127.0.0.1"
    assert "keys" not in host.get("/services").json
    status, printed = command("services", "--keys", "--url", f"http://127.0.0.1:{host.port}")
    assert status == 0 and "refused-use" in printed and support.KEY not in printed
    since = host.get("/services?keys=1").json["keys_recorded_since"]
    assert [line.split()[2:5] for line in printed.splitlines() if line.startswith("web") and "spare_key" in line] == [["never", "since", since]]


def test_the_command_line_reads_the_audit_beside_the_server(host, command):
    status, shown = command("audit", "--service", "quick", "-n", "3", "--json")
    rows = json.loads(shown)["rows"]
    assert status == 0 and len(rows) == 3 and {row["service"] for row in rows} == {"quick"} and rows[0]["n"] > rows[1]["n"]
    _, table = command("audit", "-n", "1000")
    assert table.splitlines()[0].split()[:3] == ["ROW", "AT", "ACTION"] and " started " in table
    status, checked = command("audit", "verify")
    assert status == 0 and "fit together; head: row " in checked
    head, unusable = checked.split()[-1], host.folder / "unusable.toml"
    unusable.write_text("[server\n")
    assert command("audit", "verify", "--head", head, config=unusable)[0] == hookshot.EXIT_CONFIG
    assert command("audit", "verify", "--head", head, "--data-dir", str(host.data), config=unusable)[0] == 0
    status, told = command("audit", "verify", "--head", "ab" * 32)
    assert status == hookshot.ERRORS["audit_broken"].exit and "no row of the audit has the hash abab" in told
    for mistyped in ("", head[:20], head.upper(), f"{head}\n"):
        status, told = command("audit", "verify", "--head", mistyped)
        assert status == 2 and "64 of 0-9 a-f" in told and "removed" not in told
    assert command("audit", "--head", head)[0] == command("audit", "verify", "--service", "quick")[0] == 2
    status, told = command("audit", "--data-dir", str(host.folder))
    assert status == 2 and "--data-dir" in told


def test_the_command_line_explains(host, command):
    body = body_of("quick", "evil:1")
    _, request_id = send(host, "/deploy", body, signed(body, OLD_KEY), "127.0.0.6")
    at = ("--url", f"http://127.0.0.1:{host.port}")
    status, told = command("explain", request_id, *at)
    assert status == 0 and "refused  image" in told and "allowed_image_pattern of service quick" in told and "old_key" in told
    assert command("explain", "never-came", *at)[0] == 65
    assert json.loads(command("explain", request_id, "--json", *at)[1])["requests"][0]["decision"] == "VALIDATION_ERROR"


def test_the_operators_acts_and_the_head_leave_their_rows(host):
    before = len(ask(host.data, "SELECT n FROM audit WHERE action='reload'"))
    host.process.send_signal(1)
    wait_until(lambda: len(ask(host.data, "SELECT n FROM audit WHERE action='reload' AND decision='done'")) > before)
    lines = [json.loads(line) for line in host.output.read_text().splitlines() if '"audit_head"' in line]
    number, head = lines[0]["message"].split()[1], lines[0]["message"].split()[-1]
    assert ask(host.data, f"SELECT hash FROM audit WHERE n={number}") == [(head,)]


def test_a_backup_takes_the_chain_along_and_an_import_adds_its_row(host, tmp_path):
    archive = tmp_path / "backup.tar.gz"
    assert host.cli("export", str(archive)).returncode == 0
    other = support.Host(tmp_path / "other", service())
    done = other.cli("import", str(archive))
    assert done.returncode == 0, done.stderr
    data = pathlib.Path(other.folder / "data")
    check = hookshot.verify_audit(str(data / "state.db"))
    assert check.bad is None and check.rows > 20
    assert hookshot.read_audit(str(data / "state.db"), service=None, limit=1)[0].action == "import"


def test_a_killed_server_leaves_a_chain_that_fits_and_a_row_of_all_it_accepted(tmp_path):
    """Many clients deploy, lock, and are refused, until kill -9."""
    with running(tmp_path, service(), "[limits]\nmax_queue_per_service = 10000\n[storage.retention]\nfailed_deploys = 10000\nsuccessful_deploys = 10000\n") as host:
        accepted: list[str] = []
        enough = threading.Event()

        def work(client: int) -> None:
            with contextlib.suppress(OSError, http.client.HTTPException):
                for number in range(10_000):
                    deploy_id = f"c{client}-{number}"
                    body = body_of("web", deploy_id=deploy_id)
                    if send(host, "/deploy", body, signed(body, **{"X-Request-ID": deploy_id}))[0] == 202:
                        accepted.append(deploy_id)
                    body = control_body("cancel", deploy_id)
                    send(host, path_of("cancel", deploy_id), body, signed(body))
                    send(host, "/deploy", b"{", {})
                    if len(accepted) >= 150:
                        enough.set()

        threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        assert enough.wait(support.PATIENCE_S)
        host.kill()
        for thread in threads:
            thread.join(support.PATIENCE_S)
        check = verify(host.data)
        assert check.bad is None and check.rows >= len(accepted)
        rows = [row for row in rows_of(host.data) if row.decision == "accepted"]
        assert {row.deploy_id for row in rows} == {row[0] for row in ask(host.data, "SELECT deploy_id FROM deployments")} >= set(accepted)
        host.start()
        assert trace(host, accepted[-1])["decision"] == "accepted"
        assert verify(host.data).bad is None
