# SPDX-License-Identifier: MPL-2.0
"""Control on real servers: cancel, retry, rollback, lock, unlock; who may, replays, races, crashes, and what is left alone."""

import collections
import concurrent.futures
import contextlib
import http.client
import json
import pathlib
import random
import signal
import sqlite3
import threading
from typing import Any

import pytest

import hookshot
import support
from receivers import Receiver
from support import running, service, wait_until

OTHER_KEY = "41d7c0b9e5f2483a96bc17e80d35fa2c6b9e01f4a87d52c3908e6ab1f3d4c752"
# Notes in the service's trace that it runs, then stays until it is told to go on, or stopped, or the server is gone: nothing
# outlives a test. Its child is of its group.
UNTIL = "until [ -e go ]; do kill -0 $PPID || exit; sleep 0.02; done"
STAY = f'["sh", "-c", "echo begin $HOOKSHOT_IMAGE >> $HOOKSHOT_SERVICE.trace; ({UNTIL}) & echo $! > $HOOKSHOT_SERVICE.child; ' \
       f'echo $$ > $HOOKSHOT_SERVICE.held; {UNTIL}"]'
# Takes no notice of SIGTERM nor of the server's death: only SIGKILL ends it.
STUBBORN = '["sh", "-c", "trap \'\' TERM; sleep 1000 & echo $! > $HOOKSHOT_SERVICE.child; echo $$ > $HOOKSHOT_SERVICE.held; wait"]'
SAY = '["sh", "-c", "echo {word} $HOOKSHOT_IMAGE >> $HOOKSHOT_SERVICE.trace"]'
FAIL = '["sh", "-c", "exit 7"]'
BACK = f"[service.rollback]\ncommands = [{SAY.replace('{word}', 'back')}]\n"
HOOKS = f"[service.hooks]\non_failure = [{SAY.replace('{word}', 'sorry')}]\n"
ONE_PROBE = "initial_delay = 0\ninterval = 0\nmax_attempts = 1\nsuccess_threshold = 1\n"
# Succeeds at once, unless the file "sick" is there.
QUICK = '["sh", "-c", "test ! -e sick && echo $HOOKSHOT_IMAGE $COLOUR >> $HOOKSHOT_SERVICE.trace"]'
COLOURED = 'allowed_env_overrides = ["COLOUR"]\n'


def coloured(text: str) -> str:
    return text.replace("[service.security]\n", f"[service.security]\n{COLOURED}")


def headers_of(key: bytes, body: bytes, message_id: str | None = None, *, late_s: int = 0) -> dict[str, str]:
    at_s = hookshot.now_ms() // 1000 - late_s
    return {"Content-Type": "application/json", **hookshot.sign_webhook(key, body, message_id or hookshot.new_message_id(), at_s)}


def path_of(action: str, target: str) -> str:
    return f"/{'deployments' if hookshot.CONTROLS[action][0] == 'deploy_id' else 'services'}/{target}/{action}"


def body_of(action: str, target: str, **fields: Any) -> bytes:
    return json.dumps({"action": action, hookshot.CONTROLS[action][0]: target, **fields}).encode()


def control(host: support.Host, action: str, target: str = "web", *, key: bytes | None = None, message_id: str | None = None, query: str = "",
            **fields: Any) -> support.Answer:
    body = body_of(action, target, **fields)
    return host.request("POST", path_of(action, target) + query, body, headers_of(key or host.key, body, message_id))


def say(word: str) -> str:
    return SAY.replace("{word}", word)


def trace(host: support.Host, name: str = "web") -> list[str]:
    path = host.folder / f"{name}.trace"
    return path.read_text().splitlines() if path.exists() else []


def read_pid(host: support.Host, name: str) -> int:
    path = host.folder / name
    return int(wait_until(lambda: path.exists() and path.read_text().strip()))


def is_alive(pid: int) -> bool:
    """A zombie is not alive: nobody may reap it in a container."""
    with contextlib.suppress(OSError):
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def states(record: dict[str, Any]) -> list[str]:
    return [move["state"] for move in record["state_transitions"]]


def check_problem(answer: support.Answer, status: int, code: str) -> str:
    assert (answer.status, answer.json["code"]) == (status, code), answer.body
    return answer.json["error"]


def control_lines(host: support.Host) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in host.output.read_text().splitlines() if line.startswith("{")]
    return [line for line in lines if line["event"] == "control"]


def succeed(host: support.Host, image: str, name: str = "web", **fields: Any) -> str:
    deploy_id = host.deploy(image, name, **fields)
    assert host.wait(deploy_id)["status"] == "Succeeded"
    return deploy_id


def view(host: support.Host, name: str = "web") -> dict[str, Any]:
    return host.get(f"/services/{name}").json


# --- cancel


def test_a_queued_deployment_is_cancelled_at_once_and_never_runs(tmp_path):
    with running(tmp_path, service(STAY)) as host:
        first = host.deploy("app:1")
        held = read_pid(host, "web.held")
        queued = host.deploy("app:2")
        answer = control(host, "cancel", queued, reason="wrong image")
        assert (answer.status, answer.json["status"]) == (200, "Cancelled")
        record = host.record(queued)
        assert states(record) == ["Queued", "Cancelled"] and record["timings"]["started_at"] is None
        assert "hmac_key" in record["error"] and "127.0.0.1" in record["error"] and "wrong image" in record["error"]
        assert is_alive(held) and host.wait(first, "Deploying")
        (tmp_path / "go").touch()
        assert host.wait(first)["status"] == "Succeeded" and trace(host) == ["begin app:1"]
        assert view(host)["health"] == "Healthy", "a deployment that never ran says nothing of the service"


@pytest.mark.parametrize("command", [STAY, STUBBORN], ids=["gentle", "ignores SIGTERM"])
def test_a_running_deployment_is_stopped_with_its_whole_group(tmp_path, command):
    with running(tmp_path, service('["true"]', command, tables=BACK + HOOKS)) as host:
        deploy_id = host.deploy("app:2", previous_image="app:1")
        held, child = read_pid(host, "web.held"), read_pid(host, "web.child")
        answer = control(host, "cancel", deploy_id, reason="stop it")
        assert answer.status in (200, 202) and (answer.status == 200 or answer.json["stopping"] is True)
        record = host.wait(deploy_id)
        assert states(record) == ["Queued", "Validating", "Deploying", "Cancelled"]
        assert not is_alive(held) and not is_alive(child)
        assert [step["status"] for step in record["commands"]] == ["succeeded", "stopped"]
        assert record["error"].endswith("stop it") and not record["rollback"]["attempted"] and record["failure_stage"] is None
        assert not any(word in line for line in trace(host) for word in ("back", "sorry"))
        assert host.log(deploy_id).splitlines()[-1].endswith(f"ending as Cancelled: {record['error']}")
        found = view(host)
        assert (found["health"], found["current_image"], found["stats"]["cancelled"], found["stats"]["total_deploys"]) == ("Unknown", None, 1, 0)
        assert found["last_deploy"]["status"] == "Cancelled"


WAITS = {
    "health, before the first probe": service(tables="[service.healthcheck]\ninitial_delay = 1000\ncommands = [[\"true\"]]\n"),
    "health, between probes": service(tables="[service.healthcheck]\ninitial_delay = 0\ninterval = 60\nmax_attempts = 60\ncommands = [[\"true\"]]\n"),
    "before another try": service('{ run = ["false"], retries = 1, retry_delay = "1h" }'),
    "pre_deploy": service('["true"]', tables=f"[service.hooks]\npre_deploy = [{STAY}]\n"),
    "post_deploy": service('["true"]', tables=f"[service.hooks]\npost_deploy = [{STAY}]\n"),
    "a probe": service('["true"]', tables=f"[service.healthcheck]\n{ONE_PROBE}timeout = 1000\ncommands = [{STAY}]\n"),
}


@pytest.mark.parametrize("name", WAITS)
def test_a_cancel_reaches_every_phase(tmp_path, name):
    with running(tmp_path, WAITS[name]) as host:
        deploy_id = host.deploy()
        if STAY in WAITS[name]:
            read_pid(host, "web.held")
        else:
            wait_until(lambda: host.record(deploy_id)["progress"]["phase"] == ("deploy" if "try" in name else "healthcheck"))
        assert control(host, "cancel", deploy_id).status in (200, 202)
        assert host.wait(deploy_id)["status"] == "Cancelled"


def test_what_fails_already_or_has_ended_is_not_cancelled(tmp_path):
    names = {"hook": f"[service.hooks]\non_failure = [{STAY}]\n", "rolls": f"[service.rollback]\ncommands = [{STAY}]\n"}
    services = "".join(service(FAIL, name=name, tables=tables) for name, tables in names.items()) + service(name="done")
    with running(tmp_path, services) as host:
        done = succeed(host, "app:1", "done")
        assert "has ended already: Succeeded" in check_problem(control(host, "cancel", done), 409, "NOT_POSSIBLE")
        ids = {name: host.deploy("app:2", name, previous_image="app:1") for name in names}
        for name in names:
            read_pid(host, f"{name}.held")
        assert "on_failure hooks run" in check_problem(control(host, "cancel", ids["hook"]), 409, "NOT_POSSIBLE")
        assert "is rolled back" in check_problem(control(host, "cancel", ids["rolls"]), 409, "NOT_POSSIBLE")
        (tmp_path / "go").touch()
        assert [host.wait(ids[name])["status"] for name in names] == ["Failed", "RolledBack"]
        assert "SIGTERM" not in host.log(ids["hook"]) + host.log(ids["rolls"])


def test_other_deployments_go_on_while_one_is_cancelled_and_its_place_is_taken_by_the_next(tmp_path):
    with running(tmp_path, service(STAY, name="a") + service(STAY, name="b")) as host:
        first, next_one, other = host.deploy("app:1", "a"), host.deploy("app:2", "a"), host.deploy("app:1", "b")
        mine, others = read_pid(host, "a.held"), read_pid(host, "b.held")
        control(host, "cancel", first)
        wait_until(lambda: trace(host, "a") == ["begin app:1", "begin app:2"])
        assert not is_alive(mine) and is_alive(others)
        (tmp_path / "go").touch()
        assert [host.wait(deploy_id)["status"] for deploy_id in (next_one, other)] == ["Succeeded", "Succeeded"]


def test_cancelled_twice_says_by_whom_first_and_a_message_again_gives_its_answer_again(tmp_path):
    with running(tmp_path, service(STUBBORN)) as host:
        deploy_id = host.deploy()
        read_pid(host, "web.held")
        with concurrent.futures.ThreadPoolExecutor(2) as clients:
            first = clients.submit(control, host, "cancel", deploy_id, message_id="one", reason="first")
            wait_until(lambda: "is stopped" in host.output.read_text())
            second = control(host, "cancel", deploy_id, message_id="two", reason="second")
            assert {first.result().status, second.status} <= {200, 202}
        assert host.wait(deploy_id)["error"].endswith("first")
        for message_id, reason in (("one", "first"), ("two", "second")):
            again = control(host, "cancel", deploy_id, message_id=message_id, reason=reason)
            assert (again.status, again.json["status"]) == (200, "Cancelled")
        check_problem(control(host, "cancel", deploy_id), 409, "NOT_POSSIBLE")
        check_problem(control(host, "cancel", deploy_id, message_id="one", reason="another body"), 409, "DEPLOY_ID_CONFLICT")
        assert states(host.record(deploy_id)).count("Cancelled") == 1


@pytest.mark.parametrize("recovery", ["rollback", "retry", "fail"])
def test_a_cancel_that_was_answered_survives_kill_9(tmp_path, recovery):
    with running(tmp_path, service(STUBBORN, head=f'recovery = "{recovery}"', tables=BACK + HOOKS)) as host:
        deploy_id = host.deploy("app:2", previous_image="app:1")
        held, child = read_pid(host, "web.held"), read_pid(host, "web.child")
        answer = control(host, "cancel", deploy_id, reason="for good")
        assert (answer.status, answer.json["status"], answer.json["stopping"]) == (202, "Deploying", True)
        host.kill()
        record = host.start().wait(deploy_id)
        assert record["status"] == "Cancelled" and record["error"].endswith("for good") and not record["rollback"]["attempted"]
        assert not is_alive(held) and not is_alive(child) and trace(host) == []
        assert view(host)["health"] == "Unknown"


def test_what_runs_but_is_in_no_workers_hand_yet_is_cancelled_when_it_is_taken(tmp_path):
    """After a crash the one worker rolls the first deployment back; the second one waits for it."""
    first = service(STUBBORN, name="a", tables=f"[service.rollback]\ncommands = [{STAY}]\n")
    second = service(STUBBORN, name="b", tables=BACK)
    with running(tmp_path, first + second, "[server]\nworker_threads = 2\n") as host:
        ids = []
        for name in ("a", "b"):
            ids.append(host.deploy("app:2", name, previous_image="app:1"))
            read_pid(host, f"{name}.held")
        host.kill()
        host.write(first + second, "[server]\nworker_threads = 1\n")
        host.start()
        wait_until(lambda: trace(host, "a") == ["begin app:2"])
        answer = control(host, "cancel", ids[1])
        assert (answer.status, answer.json["stopping"]) == (202, True)
        (tmp_path / "go").touch()
        assert [host.wait(deploy_id)["status"] for deploy_id in ids] == ["RolledBack", "Cancelled"] and trace(host, "b") == []


def test_a_cancel_during_a_shutdown_ends_the_deployment_as_cancelled(tmp_path):
    with running(tmp_path, service(STAY)) as host:
        deploy_id = host.deploy()
        held = read_pid(host, "web.held")
        host.process.send_signal(signal.SIGTERM)
        wait_until(lambda: host.get("/ready").status == 503)
        assert control(host, "cancel", deploy_id).status == 200
        assert host.process.wait(support.PATIENCE_S) == 0 and not is_alive(held)
        assert host.start().record(deploy_id)["status"] == "Cancelled"


@contextlib.contextmanager
def opened(folder: pathlib.Path):
    hookshot_folder = folder / "data"
    (hookshot_folder / "logs").mkdir(parents=True, exist_ok=True)
    with contextlib.closing(hookshot.Store(str(hookshot_folder), clock=lambda: CLOCK["now"])) as store:
        yield store


CLOCK = {"now": "boot-1000"}
LIMITS = hookshot.load_config("", "config.toml", []).limits._replace(max_concurrent_total=1000, max_concurrent_per_service=100, max_queue_per_service=10000)
TRIGGER = hookshot.Trigger("192.0.2.7", "hmac_key", "curl/8", "req-1")
MESSAGES = map("m-{}".format, range(10**9))


def asked(action: str, target: str = "web", **fields: Any) -> hookshot.ControlRequest:
    message = hookshot.SignedMessage(next(MESSAGES), 10**15)
    return hookshot.parse_control(hookshot.VerifiedBody("hmac_key", body_of(action, target, **fields), message), action, target)


def submit(store: hookshot.Store, image: str = "app:1", name: str = "web", **options: Any) -> hookshot.Deployment:
    body = json.dumps({"service": name, "image": image}).encode()
    request = hookshot.parse_deploy(hookshot.VerifiedBody("hmac_key", body), None)
    return store.submit(request, TRIGGER, 1000, limits=LIMITS, on_busy="queue", **options).deployment


def test_one_that_ran_and_waits_for_its_second_start_leaves_the_health_unknown(tmp_path):
    """It has run before the crash: what it left nobody knows."""
    with opened(tmp_path) as store:
        submit(store)
        begun = store.claim(2000, limits=LIMITS)
        waiting, _ = store.move(begun, hookshot.Outcome.RETRIED, "starts over", 3000)
        with contextlib.closing(sqlite3.connect(store.path)) as db, db:
            db.execute("UPDATE services SET health='Healthy'")
        cancelled, _ = store.cancel(asked("cancel", waiting.deploy_id), TRIGGER, "cancelled", 4000)
        assert cancelled.state is hookshot.State.CANCELLED and store.service_record("web").health == "Unknown"


@pytest.mark.parametrize("outcome", [outcome for outcome in hookshot.TRANSITIONS[hookshot.State.DEPLOYING] if outcome is not hookshot.Outcome.CANCELLED])
def test_what_somebody_wants_cancelled_moves_nowhere_else(tmp_path, outcome):
    with opened(tmp_path) as store:
        submit(store)
        running_one, _ = store.move(store.claim(2000, limits=LIMITS), hookshot.Outcome.PASSED, "on", 2500)
        noted, _ = store.cancel(asked("cancel", running_one.deploy_id), TRIGGER, "by ann", 3000)
        for work in (lambda: store.move(running_one, outcome, "on", 4000), lambda: store.note_progress(running_one)):
            with pytest.raises(hookshot.CancelWanted, match="by ann"):
                work()
        assert store.get(running_one.deploy_id) == noted
        with pytest.raises(hookshot.CancelWanted, match="by ann"):
            store.move(noted, outcome, "on", 4000)
        store.note_progress(noted)
        ended, _ = store.move(noted, hookshot.Outcome.CANCELLED, "by ann", 5000)
        assert ended.state is hookshot.State.CANCELLED and store.get(ended.deploy_id) == ended


# --- retry and rollback


def test_a_retry_deploys_the_same_with_its_overrides_and_says_of_what(tmp_path):
    with running(tmp_path, coloured(service(QUICK))) as host:
        (tmp_path / "sick").touch()
        failed = host.deploy("app:1", overrides={"env": {"COLOUR": "red"}}, metadata={"commit": "abc"})
        assert host.wait(failed)["status"] == "Failed"
        (tmp_path / "sick").unlink()
        answer = control(host, "retry", failed, query="?wait=20")
        assert (answer.status, answer.json["status"], answer.json["image"]) == (200, "Succeeded", "app:1")
        record = host.record(answer.json["deploy_id"])
        assert answer.json["deploy_id"] != failed and trace(host) == ["app:1 red"]
        assert record["metadata"] == {"commit": "abc"} and record["triggered_by"]["key_id"] == "hmac_key"
        assert record["state_transitions"][0]["reason"] == f"retry of {failed}, asked by hmac_key from 127.0.0.1"


def test_only_what_has_ended_is_tried_again(tmp_path):
    with running(tmp_path, service(STAY)) as host:
        deploy_id = host.deploy()
        read_pid(host, "web.held")
        assert "has not ended yet" in check_problem(control(host, "retry", deploy_id), 409, "NOT_POSSIBLE")
        check_problem(control(host, "retry", "never"), 404, "DEPLOYMENT_NOT_FOUND")
        control(host, "cancel", deploy_id)
        host.wait(deploy_id, "Cancelled")
        assert control(host, "retry", deploy_id).status == 202


def test_a_rollback_returns_to_the_last_good_image_with_the_overrides_it_had(tmp_path):
    with running(tmp_path, coloured(service(QUICK))) as host:
        check_problem(control(host, "rollback"), 409, "NOT_POSSIBLE")
        succeed(host, "app:1", overrides={"env": {"COLOUR": "red"}}, metadata={"commit": "abc"})
        check_problem(control(host, "rollback"), 409, "NOT_POSSIBLE")
        succeed(host, "app:2")
        (tmp_path / "sick").touch()
        assert host.wait(host.deploy("app:3"))["status"] == "Failed"
        (tmp_path / "sick").unlink()
        answer = control(host, "rollback", reason="2 is slow", query="?wait=20")
        assert (answer.status, answer.json["status"], answer.json["image"]) == (200, "Succeeded", "app:1")
        record = host.record(answer.json["deploy_id"])
        assert record["previous_image"] == "app:2" and record["metadata"] == {"commit": "abc"}
        assert record["state_transitions"][0]["reason"] == "rollback to the last good image, asked by hmac_key from 127.0.0.1: 2 is slow"
        assert trace(host) == ["app:1 red", "app:2", "app:1 red"] and view(host)["current_image"] == "app:1"


def test_a_rollback_goes_to_an_image_or_a_deployment_by_name(tmp_path):
    with running(tmp_path, coloured(service(QUICK) + service(QUICK, name="api"))) as host:
        first = succeed(host, "app:1", overrides={"env": {"COLOUR": "red"}})
        succeed(host, "app:1", overrides={"env": {"COLOUR": "blue"}})
        succeed(host, "app:2")
        elsewhere = succeed(host, "app:9", "api")
        (tmp_path / "sick").touch()
        failed = host.deploy("app:3")
        assert host.wait(failed)["status"] == "Failed"
        (tmp_path / "sick").unlink()
        assert [control(host, "rollback", to=to, query="?wait=20").json["image"] for to in ("app:1", first, "app:7")] == ["app:1", "app:1", "app:7"]
        assert trace(host)[-3:] == ["app:1 blue", "app:1 red", "app:7"]
        assert "is Failed" in check_problem(control(host, "rollback", to=failed), 409, "NOT_POSSIBLE")
        # What belongs to another service is only a text here, and no image of this one.
        check_problem(control(host, "rollback", to=elsewhere), 400, "VALIDATION_ERROR")
        check_problem(control(host, "rollback", to="evil/image:1"), 400, "VALIDATION_ERROR")


def test_what_the_service_allows_now_decides(tmp_path):
    with running(tmp_path, coloured(service(QUICK))) as host:
        old = succeed(host, "app:1", overrides={"env": {"COLOUR": "red"}})
        succeed(host, "app:2")
        host.write(service(QUICK))
        host.process.send_signal(signal.SIGHUP)
        wait_until(lambda: '"reloaded"' in host.output.read_text())
        assert "COLOUR" in check_problem(control(host, "rollback"), 400, "VALIDATION_ERROR")
        assert "COLOUR" in check_problem(control(host, "retry", old), 400, "VALIDATION_ERROR")
        assert len(host.get("/deployments").json["deployments"]) == 2


@pytest.mark.parametrize("action", ["rollback", "retry"])
def test_the_same_message_again_makes_no_second_deployment(tmp_path, action):
    with running(tmp_path, service(QUICK)) as host:
        first = succeed(host, "app:1")
        succeed(host, "app:2")
        target = first if action == "retry" else "web"
        with concurrent.futures.ThreadPoolExecutor(20) as clients:
            answers = list(clients.map(lambda _: control(host, action, target, message_id="one"), range(20)))
        assert len({answer.json["deploy_id"] for answer in answers}) == 1 and [answer.status for answer in answers].count(202) == 1
        made = answers[0].json["deploy_id"]
        host.wait(made)
        host.kill()
        host.start()
        again = control(host, action, target, message_id="one")
        assert (again.status, again.json["deploy_id"], again.json["status"]) == (200, made, "Succeeded")
        assert len(host.get("/deployments").json["deployments"]) == 3
        assert control(host, action, target, message_id="two").json["deploy_id"] != made


def test_the_query_for_a_rollback_uses_the_index(tmp_path):
    with opened(tmp_path) as store, contextlib.closing(sqlite3.connect(store.path)) as db:
        for clause in ("image='x'", "image IS NOT (SELECT current_image FROM services WHERE name='web')"):
            plan = db.execute("EXPLAIN QUERY PLAN SELECT seq FROM deployments WHERE completed_ms IS NOT NULL AND service='web' AND state='Succeeded' "
                              f"AND {clause} ORDER BY seq DESC LIMIT 1").fetchall()
            assert "deployments_ended" in plan[0][3] and not any("TEMP B-TREE" in row[3] for row in plan)


# --- lock


def test_a_locked_service_refuses_deploys_with_who_why_and_until(tmp_path):
    with running(tmp_path, service(QUICK) + service(QUICK, name="api")) as host:
        failed = succeed(host, "app:1")
        assert (view(host)["locked"], view(host)["lock"]) == (False, None)
        answer = control(host, "lock", reason="migration", owner="ann@desk", **{"for": "2h"})
        assert answer.status == 200 and answer.json["lock"] == view(host)["lock"] and view(host)["locked"] is True
        lock = answer.json["lock"]
        assert (lock["owner"], lock["reason"]) == ("ann@desk", "migration") and lock["until"] > lock["since"]
        refused = host.post({"service": "web", "image": "app:2"})
        sentence = check_problem(refused, 423, "SERVICE_LOCKED")
        assert sentence == f"service web is locked by ann@desk until {lock['until']}: migration" and refused.json["lock"] == lock
        assert 7000 < int(refused.headers["retry-after"]) <= 7201
        check_problem(control(host, "retry", failed), 423, "SERVICE_LOCKED")
        plan = host.post({"service": "web", "image": "app:2", "dry_run": True})
        assert (plan.status, plan.json["locked"], plan.json["lock"]) == (200, True, lock)
        assert len(host.get("/deployments").json["deployments"]) == 1 and trace(host) == ["app:1"]
        succeed(host, "app:1", "api")
        assert b'hookshot_service_locked{service="web"} 1' in host.get("/metrics").body
        assert b'hookshot_service_locked{service="api"} 0' in host.get("/metrics").body
        host.kill()
        host.start()
        check_problem(host.post({"service": "web", "image": "app:2"}), 423, "SERVICE_LOCKED")
        answer = control(host, "unlock", owner="ann@desk")
        assert (answer.status, answer.json) == (200, {"service": "web", "locked": False, "lock": None})
        succeed(host, "app:2")


def test_rollback_and_cancel_work_on_a_locked_service_and_what_waits_goes_on(tmp_path):
    with running(tmp_path, service(STAY)) as host:
        (tmp_path / "go").touch()
        succeed(host, "app:1")
        succeed(host, "app:2")
        (tmp_path / "go").unlink()
        (tmp_path / "web.held").unlink()
        held, queued = host.deploy("app:3"), host.deploy("app:4")
        read_pid(host, "web.held")
        control(host, "lock")
        check_problem(host.post({"service": "web", "image": "app:5"}), 423, "SERVICE_LOCKED")
        assert control(host, "cancel", held).status in (200, 202)
        (tmp_path / "go").touch()
        assert host.wait(queued)["status"] == "Succeeded"
        answer = control(host, "rollback", query="?wait=20")
        assert (answer.status, answer.json["image"]) == (200, "app:2")
        # A deployment that is known is told of, locked or not.
        assert host.post({"service": "web", "image": "app:4", "deploy_id": "x"}).status == 423


def test_another_owners_lock_is_taken_or_opened_by_force_only(tmp_path):
    with running(tmp_path, service()) as host:
        assert control(host, "unlock").json["lock"] is None
        assert control(host, "lock").json["lock"]["owner"] == "hmac_key"
        for action in ("lock", "unlock"):
            assert "is locked by hmac_key" in check_problem(control(host, action, owner="bob"), 423, "SERVICE_LOCKED")
        assert control(host, "lock", reason="still").json["lock"]["reason"] == "still"
        assert control(host, "lock", owner="bob", force=True).json["lock"] == view(host)["lock"] and view(host)["lock"]["owner"] == "bob"
        check_problem(control(host, "unlock"), 423, "SERVICE_LOCKED")
        assert control(host, "unlock", force=True).json["locked"] is False


def test_a_lock_and_an_unlock_that_come_again_change_nothing(tmp_path):
    """What a listener on the wire could repeat."""
    with running(tmp_path, service()) as host:
        control(host, "lock", message_id="lock-1")
        assert control(host, "lock", message_id="lock-1").json["locked"] is True
        assert control(host, "unlock", message_id="unlock-1").json["locked"] is False
        assert control(host, "lock", message_id="lock-1").json["locked"] is False
        control(host, "lock", message_id="lock-2")
        assert control(host, "unlock", message_id="unlock-1").json["locked"] is True and view(host)["locked"] is True
        check_problem(control(host, "unlock", message_id="unlock-1", force=True), 409, "DEPLOY_ID_CONFLICT")
        host.kill()
        host.start()
        assert control(host, "unlock", message_id="unlock-1").json["locked"] is True


def test_a_lock_ends_when_its_time_is_over_and_not_when_somebody_sets_the_clock(tmp_path):
    with opened(tmp_path) as store:
        CLOCK["now"] = "boot-1000"
        lock = store.lock(asked("lock", **{"for": 60}), TRIGGER, 1_000_000).lock
        assert lock.until_ms == 1_060_000
        for uptime_ms, wall_ms, is_locked in ((1000, 1_000_000, True), (60_999, 9_000_000_000, True), (60_999, 5, True), (61_000, 5, False),
                                              (61_001, 1_060_001, False)):
            CLOCK["now"] = f"boot-{uptime_ms}"
            assert bool(store.locks(wall_ms)) == is_locked, (uptime_ms, wall_ms)
        # After a restart of the machine there is only the wall clock.
        for wall_ms, is_locked in ((1_059_999, True), (1_060_000, False)):
            CLOCK["now"] = "other-5"
            assert bool(store.locks(wall_ms)) == is_locked
        with pytest.raises(hookshot.HookshotError, match="locked by hmac_key"):
            submit_at(store, 1_059_999)
        assert submit_at(store, 1_060_000)
        assert store.expire_locks(1_059_999) == () and store.expire_locks(1_060_000) == (lock,) and store.locks(0) == {}
        store.lock(asked("lock"), TRIGGER, 1000)
        assert store.expire_locks(10**15) == () and store.locks(10**15)
    CLOCK["now"] = "boot-1000"


def submit_at(store: hookshot.Store, at_ms: int) -> hookshot.Submission:
    request = hookshot.parse_deploy(hookshot.VerifiedBody("hmac_key", b'{"service": "web", "image": "app:1"}'), None)
    return store.submit(request, TRIGGER, at_ms, limits=LIMITS, on_busy="queue")


def test_a_lock_that_is_over_is_removed_and_said_so(tmp_path):
    with running(tmp_path, service()) as host:
        control(host, "lock", owner="ann", **{"for": 1})
        wait_until(lambda: view(host)["locked"] is False)
        succeed(host, "app:1")
        wait_until(lambda: '"lock_expired"' in host.output.read_text(), patience_s=90)


# --- who may


TARGETS = {"cancel": "waits", "retry": "ended", "rollback": "web", "lock": "web", "unlock": "web"}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Two services, of which one has a key of its own; a deployment of web that ended, and one that waits."""
    own = service(QUICK, name="own").replace("[service.security]\n", '[service.security]\nhmac_keys = ["own_key"]\n')
    web = service(f'["sh", "-c", "test $HOOKSHOT_IMAGE = app:1 && exit; {UNTIL}"]')
    with running(tmp_path_factory.mktemp("shared"), web + own, secrets=f"own_key={OTHER_KEY}\n") as host:
        assert host.wait(host.deploy("app:1", deploy_id="ended"))["status"] == "Succeeded"
        host.deploy("app:2", deploy_id="runs")
        host.deploy("app:3", deploy_id="waits")
        host.deploy("app:1", "own", deploy_id="owned")
        host.wait("owned")
        yield host


def state_of(host: support.Host) -> Any:
    deployments = host.get("/deployments").json["deployments"]
    return [(entry["deploy_id"], entry["status"]) for entry in deployments if entry["deploy_id"] != "runs"], view(host), view(host, "own")


def credentials(host: support.Host, body: bytes, name: str) -> dict[str, str]:
    right = headers_of(host.key, body)
    hub = {"Content-Type": "application/json", "X-Hub-Signature-256": hookshot.sign(host.key, body)}
    return {
        "none": {"Content-Type": "application/json"}, "hub alone": hub, "token": {"Authorization": "Bearer " + "x" * 36},
        "wrong key": headers_of(b"w" * 32, body), "another service's key": headers_of(OTHER_KEY.encode(), body),
        "stale": headers_of(host.key, body, late_s=301), "of the future": headers_of(host.key, body, late_s=-301),
        "another id": {**right, "webhook-id": "msg_other"}, "another body": headers_of(host.key, body + b" "),
        "hub and stale": {**hub, **headers_of(host.key, body, late_s=301)},
    }[name]


@pytest.mark.parametrize("credential", ["none", "hub alone", "token", "wrong key", "another service's key", "stale", "of the future", "another id",
                                        "another body", "hub and stale"])
@pytest.mark.parametrize("action", hookshot.CONTROLS)
def test_control_needs_the_right_key_and_a_fresh_timestamp(shared, action, credential):
    before, body = state_of(shared), body_of(action, TARGETS[action])
    answer = shared.request("POST", path_of(action, TARGETS[action]), body, credentials(shared, body, credential))
    sentence = check_problem(answer, 401, "AUTHENTICATION_ERROR")
    assert ("with a timestamp" in sentence) == (credential == "hub alone") and answer.headers["www-authenticate"]
    assert state_of(shared) == before


@pytest.mark.parametrize("action", hookshot.CONTROLS)
def test_a_key_of_one_service_learns_nothing_of_the_others(shared, action):
    """What is there, what is not, and what another key signed look alike."""
    there, gone = TARGETS[action], "nowhere"
    answers = [control(shared, action, target, key=OTHER_KEY.encode()) for target in (there, gone)]
    strange = control(shared, action, there, key=b"w" * 32)
    assert {(answer.status, answer.json["code"], answer.json["error"]) for answer in (*answers, strange)} == {
        (401, "AUTHENTICATION_ERROR", "the signature is missing or wrong")}


def test_a_key_of_one_service_controls_that_one(shared):
    key = OTHER_KEY.encode()
    assert control(shared, "lock", "own", key=key).json["lock"]["owner"] == "own_key"
    assert control(shared, "unlock", "own", key=key).status == 200
    assert control(shared, "retry", "owned", key=key, query="?wait=20").json["status"] == "Succeeded"
    check_problem(control(shared, "cancel", "owned", key=key), 409, "NOT_POSSIBLE")
    check_problem(control(shared, "rollback", "own", key=key), 409, "NOT_POSSIBLE")


def test_with_a_global_key_what_is_not_there_is_said(shared):
    for action in ("cancel", "retry"):
        check_problem(control(shared, action, "nowhere"), 404, "DEPLOYMENT_NOT_FOUND")
    for action in ("rollback", "lock", "unlock"):
        check_problem(control(shared, action, "nowhere"), 404, "SERVICE_NOT_FOUND")


@pytest.mark.parametrize("signed_for", [*hookshot.CONTROLS, "deploy"])
@pytest.mark.parametrize("sent_to", [*hookshot.CONTROLS, "deploy"])
def test_what_was_signed_for_one_action_is_refused_at_every_other(shared, signed_for, sent_to):
    """The signature does not cover the path, so the body says what it is for."""
    if signed_for == sent_to:
        return
    body = b'{"service": "web", "image": "app:1"}' if signed_for == "deploy" else body_of(signed_for, TARGETS[signed_for])
    path = "/deploy" if sent_to == "deploy" else path_of(sent_to, TARGETS[sent_to])
    before = state_of(shared)
    check_problem(shared.request("POST", path, body, headers_of(shared.key, body)), 400, "VALIDATION_ERROR")
    assert state_of(shared) == before


@pytest.mark.parametrize("action, target, other", [("cancel", "waits", "runs"), ("retry", "ended", "owned"), ("rollback", "web", "own"),
                                                   ("lock", "web", "own"), ("unlock", "web", "own")])
def test_what_was_signed_for_one_target_is_refused_at_another(shared, action, target, other):
    before, body = state_of(shared), body_of(action, target)
    answer = shared.request("POST", path_of(action, other), body, headers_of(shared.key, body))
    assert f"is not {other}, which the path names" in check_problem(answer, 400, "VALIDATION_ERROR")
    assert state_of(shared) == before


@pytest.mark.parametrize("action, fields, told", [
    ("cancel", {"force": True}, "force: unknown field"), ("cancel", {"reason": 7}, "reason: is not a text"),
    ("cancel", {"reason": "a\nb"}, "reason: has control"), ("lock", {"reason": "x" * 513}, "reason: is longer"),
    ("lock", {"for": 0}, "for: is not between"), ("lock", {"for": True}, "for: true is not a duration"), ("lock", {"for": "soon"}, "for: \"soon\" is not"),
    ("lock", {"for": "367d"}, "for: is not between"), ("lock", {"for": 1.5}, "for: 1.5 is not"), ("lock", {"owner": "\u202eann"}, "owner: has control"),
    ("lock", {"owner": "x" * 129}, "owner: is longer"), ("lock", {"force": "yes"}, "force: is not true or false"),
    ("rollback", {"to": ""}, "to: is empty"), ("rollback", {"to": "--privileged"}, "to: starts with '-'"), ("rollback", {"to": ["a"]}, "to: is not a text"),
    ("retry", {"reason": "why"}, "reason: unknown field"), ("unlock", {"for": 5}, "for: unknown field"), ("lock", {"action": None}, "action: is required"),
    ("lock", {"service": None}, "service: is required"), ("lock", {"dry_run": True}, "dry_run: unknown field")])
def test_fields_are_read_strictly(shared, action, fields, told):
    before = state_of(shared)
    target = TARGETS[action]
    body = json.dumps({"action": action, hookshot.CONTROLS[action][0]: target} | fields).encode()
    answer = shared.request("POST", path_of(action, target), body, headers_of(shared.key, body))
    assert told in check_problem(answer, 400, "VALIDATION_ERROR") and state_of(shared) == before


@pytest.mark.parametrize("body", [b"", b"[]", b"null", b"{", b'{"action": "lock", "action": "lock", "service": "web"}', b"\xff"])
def test_what_is_no_object_is_refused(shared, body):
    check_problem(shared.request("POST", "/services/web/lock", body, headers_of(shared.key, body)), 400, "VALIDATION_ERROR")


def test_the_content_type_is_checked_and_other_methods_are_not_taken(shared):
    body = body_of("lock", "web")
    headers = {**headers_of(shared.key, body), "Content-Type": "text/plain"}
    check_problem(shared.request("POST", "/services/web/lock", body, headers), 415, "UNSUPPORTED_MEDIA_TYPE")
    answer = shared.get("/services/web/lock")
    assert (answer.status, answer.headers["allow"]) == (405, "POST")


def test_every_control_request_is_one_line_of_the_log(tmp_path):
    with running(tmp_path, service(QUICK)) as host:
        deploy_id = succeed(host, "app:1")
        answers = [control(host, "lock", reason="r", owner="ann", message_id="m-1"), control(host, "lock", reason="r", owner="ann", message_id="m-1"),
                   control(host, "unlock", owner="bob"), control(host, "unlock", owner="bob", force=True), control(host, "cancel", deploy_id)]
        body = body_of("retry", deploy_id)
        retried = host.request("POST", path_of("retry", deploy_id), body, {**headers_of(host.key, body), "X-Request-ID": "mine", "User-Agent": "u\u00e9/1"})
        lines = wait_until(lambda: len(found := control_lines(host)) == 6 and found)
        assert [(line["action"], line["outcome"], line["level"]) for line in lines] == [
            ("lock", "done", "info"), ("lock", "repeated", "info"), ("unlock", "SERVICE_LOCKED", "warning"), ("unlock", "done", "info"),
            ("cancel", "NOT_POSSIBLE", "warning"), ("retry", "done", "info")]
        assert all((line["address"], line["key_id"]) == ("127.0.0.1", "hmac_key") for line in lines)
        assert [line["request_id"] for line in lines[:5]] == [answer.headers["x-request-id"] for answer in answers]
        assert (lines[5]["request_id"], lines[5]["deploy_id"], lines[5]["service"]) == ("mine", retried.json["deploy_id"], "web")
        assert "forced" in lines[3]["message"] and "ann" in lines[0]["message"]


def test_a_deploy_that_was_overheard_fills_no_log(tmp_path):
    """Its signature is right, and anyone who has read it can send it to another path."""
    with running(tmp_path, service()) as host:
        for _ in range(200):
            check_problem(host.post({"service": "web", "image": "app:1"}, path="/services/web/lock"), 401, "AUTHENTICATION_ERROR")
        assert control_lines(host) == [] and host.output.read_text().count('"request_refused"') < 100


# --- races


def test_of_twenty_who_cancel_at_once_one_is_the_first(tmp_path):
    with running(tmp_path, service(STAY)) as host:
        deploy_id = host.deploy()
        held = read_pid(host, "web.held")
        with concurrent.futures.ThreadPoolExecutor(20) as clients:
            answers = list(clients.map(lambda number: control(host, "cancel", deploy_id, reason=f"number {number}"), range(20)))
        assert {answer.status for answer in answers} <= {200, 202, 409}
        record = host.wait(deploy_id)
        assert states(record)[-1] == "Cancelled" and states(record).count("Cancelled") == 1 and not is_alive(held)
        assert len({answer.json["error"] for answer in answers if answer.status == 200}) == 1


def test_a_lock_and_deploys_at_once_are_in_one_order(tmp_path):
    """What is accepted is older than the lock: no deploy that was answered after it runs."""
    with running(tmp_path, service(QUICK), "[limits]\nmax_queue_per_service = 1000\n") as host:
        def knock(number: int) -> support.Answer:
            return control(host, "lock") if number == 10 else host.post({"service": "web", "image": f"app:{number}"})

        with concurrent.futures.ThreadPoolExecutor(20) as clients:
            answers = list(clients.map(knock, range(60)))
        accepted = {answer.json["deploy_id"] for answer in answers if answer.status == 202}
        assert {answer.status for answer in answers} <= {200, 202, 423}
        assert {entry["deploy_id"] for entry in host.get("/deployments?limit=200").json["deployments"]} == accepted
        assert host.post({"service": "web", "image": "app:x"}).status == 423


def test_a_cancel_and_the_end_agree_on_who_was_first(tmp_path):
    with running(tmp_path, service('["true"]', '["true"]')) as host, concurrent.futures.ThreadPoolExecutor(4) as clients:
        for number in range(60):
            deploy_id = host.deploy(f"app:{number}")
            answers = [one.result() for one in [clients.submit(control, host, "cancel", deploy_id) for _ in range(number % 3 + 1)]]
            record = host.wait(deploy_id)
            won = any(answer.status in (200, 202) for answer in answers)
            assert record["status"] == ("Cancelled" if won else "Succeeded"), [answer.body for answer in answers]


# --- whatever comes in whatever order

# Writes its deployment's id and the time, again and again.
WORK = '["sh", "-c", "for turn in 1 2 3 4; do echo $HOOKSHOT_DEPLOY_ID $(date +%s%3N) >> work.trace; sleep 0.01; done; test ! -e sick"]'


def check_history(host: support.Host, deploy_id: str) -> None:
    """Assert that a deployment went by legal moves to one end, and that nothing of it ran after it was cancelled."""
    moves = host.record(deploy_id)["state_transitions"]
    for before, after in zip(moves, moves[1:]):
        assert after["state"] in hookshot.TRANSITIONS[hookshot.State(before["state"])].values()
    assert [move["state"] in hookshot.TERMINAL for move in moves].count(True) == 1 and moves[-1]["state"] in hookshot.TERMINAL
    if moves[-1]["state"] == "Cancelled":
        path = host.folder / "work.trace"
        worked = [int(line.split()[1]) for line in path.read_text().splitlines() if line.split()[0] == deploy_id] if path.exists() else []
        ended_ms = sqlite3.connect(host.data / "state.db").execute(
            "SELECT completed_ms FROM deployments WHERE deploy_id=?", (deploy_id,)).fetchone()[0]
        assert all(at_ms <= ended_ms for at_ms in worked), (deploy_id, ended_ms, worked)


@pytest.mark.parametrize("seed", range(3))
def test_every_deployment_ends_once_whatever_control_requests_come(tmp_path, seed):
    names = ["a", "b", "c"]
    probe = f"[service.healthcheck]\n{ONE_PROBE}commands = [{WORK}]\n"
    services = "".join(service(WORK, name=name, tables=probe + BACK, head=f'on_busy = "{on_busy}"\nrecovery = "{recovery}"')
                       for name, on_busy, recovery in zip(names, ("queue", "replace", "queue"), ("rollback", "fail", "retry")))
    config = "[limits]\nmax_concurrent_per_service = 2\nmax_queue_per_service = 5\n[server]\nworker_threads = 4\n" \
             "[storage.retention]\nsuccessful_deploys = 10000\nfailed_deploys = 10000\n"
    ids: collections.deque[str] = collections.deque(["none"])
    answered: list[str] = []
    is_gone = threading.Event()

    def act(chance: random.Random) -> None:
        kind, name = chance.choice(["deploy", "deploy", "cancel", "cancel", "cancel", "retry", "rollback", "lock", "unlock", "unlock"]), chance.choice(names)
        answered.append(kind)
        try:
            if kind == "deploy":
                answer = host.post({"service": name, "image": f"app:{chance.randrange(4)}"})
            elif kind in ("cancel", "retry"):
                answer = control(host, kind, chance.choice(list(ids)[-8:]))
            else:
                answer = control(host, kind, name, **({"force": True} if kind == "unlock" else {}))
        except (OSError, http.client.HTTPException):
            return  # the server is killed once, in the middle
        assert answer.status in (200, 202, 404, 409, 423, 503), answer.body
        if answer.status == 202 and kind in ("deploy", "retry", "rollback"):
            ids.append(answer.json["deploy_id"])

    def act_often(number: int) -> None:
        chance = random.Random(f"{seed} {number}")
        for _ in range(15):
            # Not a moment after the kill: the port may be another server's by then.
            if not is_gone.is_set():
                act(chance)

    with running(tmp_path, services, config) as host:
        for is_killed in (True, False):
            with concurrent.futures.ThreadPoolExecutor(20) as clients:
                working = [clients.submit(act_often, number) for number in range(20)]
                if is_killed:
                    wait_until(lambda: len(answered) > 150)
                    is_gone.set()
                    host.kill()
                for one in working:
                    one.result()
            if is_killed:
                host.start()
                is_gone.clear()
        for name in names:
            control(host, "unlock", name, force=True)
        wait_until(lambda: not host.get("/deployments?unfinished=1").json["deployments"])
        found, cursor = [], ""
        while cursor is not None:
            page = host.get(f"/deployments?limit=200{cursor and f'&cursor={cursor}'}").json
            found, cursor = found + page["deployments"], page["next_cursor"]
        lost = set(ids) - {"none"} - {entry["deploy_id"] for entry in found}
        assert not lost and len({entry["status"] for entry in found}) > 1
        for entry in found:
            check_history(host, entry["deploy_id"])
        assert '"bug"' not in host.output.read_text()


# --- by command line


def test_the_command_line_rolls_back_and_retries_and_follows(tmp_path):
    with running(tmp_path, service(QUICK)) as host:
        done = host.cli("rollback", "web")
        assert done.returncode == 65 and "nothing to go back to" in done.stderr
        succeed(host, "app:1")
        second = succeed(host, "app:2")
        done = host.cli("rollback", "web", "--reason", "2 is slow")
        assert done.returncode == 0 and "web back to app:1" in done.stderr and "ending as Succeeded" in done.stdout
        done = host.cli("rollback", "web", "--to", second, "--json")
        assert done.returncode == 0 and (json.loads(done.stdout)["image"], json.loads(done.stdout)["status"]) == ("app:2", "Succeeded")
        (tmp_path / "sick").touch()
        done = host.cli("retry", second)
        assert done.returncode == 10 and "Failed" in done.stderr
        done = host.cli("rollback", "web", "--no-wait")
        assert done.returncode == 0 and host.wait(done.stdout.strip())["image"] == "app:1"
        assert len(host.get("/deployments").json["deployments"]) == 6


def test_the_command_line_follows_a_rollback_without_the_right_to_read(tmp_path):
    """It asks with the same message again, which makes no second deployment."""
    with running(tmp_path, service(QUICK), '[security]\nread_access = "token"\n', secrets=f"read_token={OTHER_KEY}\n") as host:
        for image in ("app:1", "app:2"):
            assert host.post({"service": "web", "image": image}, path="/deploy?wait=20").json["status"] == "Succeeded"
        done = host.cli("rollback", "web", "--json", env={"HOOKSHOT_READ_TOKEN": "not the right one"})
        assert done.returncode == 0 and json.loads(done.stdout)["status"] == "Succeeded" and "read token" in done.stderr
        assert trace(host) == ["app:1", "app:2", "app:1"]


def test_the_command_line_cancels(tmp_path):
    with running(tmp_path, service(STUBBORN)) as host:
        first, queued = host.deploy("app:1"), host.deploy("app:2")
        held = read_pid(host, "web.held")
        done = host.cli("cancel", queued, "--json", "--reason", "not this one")
        assert done.returncode == 0 and json.loads(done.stdout)["status"] == "Cancelled" and "not this one" in done.stderr
        done = host.cli("cancel", first)
        assert done.returncode == 0 and "is being stopped" in done.stderr and not is_alive(held)
        assert host.record(first)["status"] == "Cancelled"
        done = host.cli("cancel", first)
        assert done.returncode == 65 and "has ended already" in done.stderr
        assert host.cli("cancel", "no/such thing").returncode == 65


def test_a_deployment_that_is_followed_and_cancelled_exits_with_13(tmp_path):
    with running(tmp_path, service(STAY)) as host, concurrent.futures.ThreadPoolExecutor(1) as clients:
        followed = clients.submit(host.cli, "deploy", "web", "app:1", "--id", "mine")
        read_pid(host, "web.held")
        control(host, "cancel", "mine")
        assert followed.result().returncode == 13 and "Cancelled" in followed.result().stderr


def test_the_command_line_locks_and_unlocks(tmp_path):
    with running(tmp_path, service(QUICK)) as host:
        done = host.cli("lock", "web", "--reason", "stocktaking", "--for", "2h")
        owner = view(host)["lock"]["owner"]
        assert done.returncode == 0 and "@" in owner and done.stdout.startswith(f"web is locked by {owner} until ") and "stocktaking" in done.stdout
        assert "web (locked)" in host.cli("services").stdout
        done = host.cli("deploy", "web", "app:1")
        assert done.returncode == 75 and f"locked by {owner}" in done.stderr and "stocktaking" in done.stderr
        done = host.cli("unlock", "web", "--json")
        assert done.returncode == 0 and json.loads(done.stdout) == {"service": "web", "locked": False, "lock": None}
        control(host, "lock", owner="bob")
        assert host.cli("unlock", "web").returncode == 75 and host.cli("lock", "web").returncode == 75
        assert host.cli("lock", "web", "--force").returncode == 0 and view(host)["lock"]["owner"] == owner
        assert host.cli("unlock", "web").stdout == "web is not locked\n"
        assert host.cli("lock", "web", "--for", "soon").returncode == 2
        assert host.cli("lock", "web", "--for", "0").returncode == 65 and view(host)["locked"] is False
        assert host.cli("deploy", "web", "app:1").returncode == 0
        assert host.cli("lock", "web", env={"SUDO_USER": "ann"}).stdout.startswith("web is locked by ann@")


# --- told


def test_a_lock_is_told_once_to_the_channels_that_want_it_also_across_a_crash(tmp_path):
    channels = "[notifications]\nenabled = true\n" + "".join(
        f'[[notifications.channel]]\nname = "{name}"\ntype = "webhook"\nurl = "@URL/{name}"\n{rest}\n' for name, rest in (
            ("all", 'events = ["locked", "cancelled"]'), ("others", 'events = ["locked"]\nservices = ["api"]'), ("usual", "")))
    with Receiver() as receiver, running(tmp_path, service(STAY) + service(QUICK, name="api"), channels.replace("@URL", receiver.url.rstrip("/"))) as host:
        control(host, "lock", owner="ann@desk", reason="<@everyone> & co", **{"for": "2h"})
        (told,) = receiver.wait_for(1)
        lock, document = view(host)["lock"], json.loads(told.body)
        assert told.path.endswith("/all") and document["type"] == "service.locked" and document["timestamp"] == lock["since"]
        assert {name: document["data"][name] for name in ("service", "owner", "reason", "until")} == {
            "service": "web", "owner": "ann@desk", "reason": "<@everyone> & co", "until": lock["until"]}
        assert set(document["data"]) == {"service", "owner", "reason", "until", "host"}
        control(host, "unlock", force=True)
        receiver.stop()
        control(host, "lock", owner="bob")
        host.kill()
        receiver.start()
        host.start()
        second = receiver.wait_for(2)[1]
        assert json.loads(second.body)["data"]["owner"] == "bob" and second.headers["webhook-id"] != told.headers["webhook-id"]
        # Whatever else were told would have come before what a later lock is told as.
        control(host, "lock", "api")
        assert {received.path.rpartition("/")[2] for received in receiver.wait_for(4)[2:]} == {"all", "others"}


@pytest.mark.parametrize("kind", sorted(hookshot._BUILDERS))
def test_a_lock_has_its_words_in_every_format(kind):
    lock = hookshot.Lock("web", "ann@desk", "stocktaking", 1000, 61_000, None)
    channel = hookshot.Channel(**dict.fromkeys(hookshot.Channel._fields, ""))._replace(url="https://chat.example/hook", token="t", chat_id="1")
    told = json.loads(hookshot._BUILDERS[kind](hookshot.notice_of_lock(lock, "app1"), channel, "msg_1", 1).body)
    text = json.dumps(told, ensure_ascii=False).replace("\u200b", "").replace("\\\\", "")
    assert all(word in text for word in ("web", "ann@desk", "stocktaking", "app1")) and "Deployment" not in text and "None" not in text
