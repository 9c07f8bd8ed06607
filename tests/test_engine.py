# SPDX-License-Identifier: MPL-2.0
"""ENGINE: deployments on a real server, from the request to every ending, through limits, crashes and shutdowns."""

import concurrent.futures
import contextlib
import http.server
import os
import pathlib
import signal
import socket
import sqlite3
import threading

import pytest

import support
from support import running, service, wait_until

# Appends "WORD IMAGE" to the service's trace.
SAY = '["sh", "-c", "echo {word} $HOOKSHOT_IMAGE >> $HOOKSHOT_SERVICE.trace"]'
# Says that it runs, then waits for the file that release() makes, or for the server's death: nothing outlives a test.
HOLD = '["sh", "-c", "echo begin $HOOKSHOT_IMAGE >> $HOOKSHOT_SERVICE.trace; until [ -e go ]; do kill -0 $PPID || exit; sleep 0.02; done; ' \
       'echo end $HOOKSHOT_IMAGE >> $HOOKSHOT_SERVICE.trace"]'
FAIL = '["sh", "-c", "echo this went wrong >&2; exit 7"]'
QUICK = "initial_delay = 0\ninterval = 0\n"
ONE_PROBE = f"{QUICK}max_attempts = 1\nsuccess_threshold = 1\n"


def say(word: str) -> str:
    return SAY.replace("{word}", word)


def health(*commands: str, rules: str = ONE_PROBE) -> str:
    return f"[service.healthcheck]\n{rules}commands = [{', '.join(commands)}]\n"


def rollback(*commands: str, rules: str = "") -> str:
    return f"[service.rollback]\n{rules}commands = [{', '.join(commands)}]\n"


def hooks(**lists: str) -> str:
    return "[service.hooks]\n" + "".join(f"{name} = [{commands}]\n" for name, commands in lists.items())


def trace(host: support.Host, name: str = "web") -> list[str]:
    path = host.folder / f"{name}.trace"
    return path.read_text().splitlines() if path.exists() else []


def release(host: support.Host) -> None:
    (host.folder / "go").touch()


def states(record: dict) -> list[str]:
    return [move["state"] for move in record["state_transitions"]]


def is_alive(pid: int) -> bool:
    """A zombie is not alive: nobody may reap it in a container."""
    with contextlib.suppress(OSError):
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def read_pid(host: support.Host, name: str) -> int:
    path = host.folder / name
    return int(wait_until(lambda: path.exists() and path.read_text().strip()))


# --- endings

START = ["Queued", "Validating", "Deploying"]
ENDINGS = {
    "ok": (service(say("deploy"), tables=health(say("probe"))), ["HealthChecking", "Succeeded"], ["deploy app:2", "probe app:2"]),
    "unchecked": (service(say("deploy")), ["Succeeded"], ["deploy app:2"]),
    "failing": (service(FAIL, say("never"), tables=rollback(say("back"))), ["RollingBack", "RolledBack"], ["back app:2"]),
    "unhealthy": (service(say("deploy"), tables=health('["test", "-e", "restored"]')
                          + rollback('["touch", "restored"]', say("back"))),
                  ["HealthChecking", "RollingBack", "RolledBack"], ["deploy app:2", "back app:2"]),
    "no-rollback-commands": (service(FAIL), ["Failed"], []),
    "rollback-disabled": (service(FAIL, tables=rollback(say("back"), rules="enabled = false\n")), ["Failed"], []),
    "rollback-fails": (service(FAIL, tables=rollback(say("back"), FAIL)), ["RollingBack", "RollbackFailed"], ["back app:2"] * 2),
    "sick-after-rollback": (service(say("deploy"), tables=health(FAIL) + rollback(say("back"))),
                            ["HealthChecking", "RollingBack", "RollbackFailed"], ["deploy app:2", "back app:2"]),
    "pre-deploy-fails": (service(say("deploy"), tables=hooks(pre_deploy=f"{say('pre')}, {FAIL}", on_failure=say("sorry"))
                                 + rollback(say("back"))), ["Failed"], ["pre app:2", "sorry app:2"]),
    "post-deploy-fails": (service(say("deploy"), tables=hooks(post_deploy=f"{FAIL}, {say('post')}") + rollback(say("back"))),
                          ["Succeeded"], ["deploy app:2", "post app:2"]),
    "killed": (service('["sh", "-c", "kill -9 $$"]'), ["Failed"], []),
    "program-gone": (service('["./not-there"]'), ["Failed"], []),
}


@pytest.fixture(scope="module")
def endings(tmp_path_factory):
    services = "".join(text.replace('"web"', f'"{name}"') for name, (text, _, _) in ENDINGS.items())
    with running(tmp_path_factory.mktemp("endings"), services, "[server]\nworker_threads = 8") as host:
        yield host


@pytest.mark.parametrize("name", ENDINGS)
def test_a_deployment_goes_through_its_states_to_its_ending(endings, name):
    _, rest, said = ENDINGS[name]
    record = endings.wait(endings.deploy("app:2", name, previous_image="app:1"))
    assert states(record) == START + rest
    assert trace(endings, name) == said
    ok = rest[-1] == "Succeeded"
    assert (record["error"] is None) == ok
    assert (record["timings"]["completed_at"] is not None) and record["timings"]["duration_ms"] >= 0
    assert record["rollback"]["attempted"] == ("RollingBack" in rest)
    assert record["rollback"]["succeeded"] == {"RolledBack": True, "RollbackFailed": False}.get(rest[-1])


def test_death_by_signal_is_a_failure_that_names_the_signal(endings):
    record = endings.wait(endings.deploy("app:3", "killed"))
    [command] = record["commands"]
    assert (command["status"], command["signal"], command["exit_code"]) == ("failed", 9, None)
    assert "SIGKILL" in record["error"]


def test_a_program_that_is_not_there_is_named_in_the_record(endings):
    [command] = endings.wait(endings.deploy("app:3", "program-gone"))["commands"]
    assert command["status"] == "not_started" and "not found" in command["note"]


def test_output_of_a_failed_command_is_kept(endings):
    record = endings.wait(endings.deploy("app:3", "no-rollback-commands"))
    [command] = record["commands"]
    assert (command["exit_code"], command["stderr"], command["output_preview"]) == (7, "this went wrong\n", "this went wrong")
    assert "this went wrong" in endings.log(record["deploy_id"])


def test_output_of_failed_probes_is_kept(endings):
    record = endings.wait(endings.deploy("app:3", "sick-after-rollback", previous_image="app:1"))
    probes = [command for command in record["commands"] if command["phase"] == "healthcheck"]
    assert [probe["stderr"] for probe in probes] == ["this went wrong\n"] * 2


# --- hooks

TELL = '["sh", "-c", "echo \\"$HOOKSHOT_PHASE|$HOOKSHOT_STATUS|$HOOKSHOT_ERROR_MESSAGE|$COLOUR\\" >> $HOOKSHOT_SERVICE.trace"]'
OVERRIDE = "[service.security]\nallowed_env_overrides = [\"COLOUR\"]\n"


def test_hooks_run_in_their_place_with_outcome_error_and_overrides(tmp_path):
    allowed = service(tables=health(TELL) + hooks(pre_deploy=TELL, post_deploy=TELL, on_failure=TELL)).replace(
        "[service.security]\n", OVERRIDE)
    broken = allowed.replace('"web"', '"broken"').replace('["true"]', FAIL)
    with running(tmp_path, allowed + broken) as host:
        for name in ("web", "broken"):
            host.wait(host.deploy(service=name, overrides={"env": {"COLOUR": "red"}}))
        assert trace(host) == ["pre_deploy|||red", "healthcheck|||red", "post_deploy|Succeeded||red"]
        pre, failure = trace(host, "broken")
        assert pre == "pre_deploy|||red"
        phase, status, error, colour = failure.split("|")
        assert (phase, status, colour) == ("on_failure", "Failed", "red") and "exited with status 7" in error


def test_post_deploy_does_not_run_for_an_unhealthy_deployment(tmp_path):
    with running(tmp_path, service(tables=health(FAIL) + hooks(post_deploy=say("post")))) as host:
        assert host.wait(host.deploy())["status"] == "Failed"
        assert trace(host) == []


def test_on_failure_runs_after_the_rollback_and_knows_its_outcome(tmp_path):
    with running(tmp_path, service(FAIL, tables=rollback(say("back")) + hooks(on_failure=TELL))) as host:
        host.wait(host.deploy("app:2", previous_image="app:1"))
        back, failure = trace(host)
        assert back == "back app:2" and failure.startswith("on_failure|RolledBack|sh exited with status 7")


# --- retries, what is not critical, deadlines

def fails_until(attempt: int) -> str:
    return f'"sh", "-c", "test $HOOKSHOT_ATTEMPT -ge {attempt}"'


@pytest.mark.parametrize("needed, retries, ending", [(1, 0, "Succeeded"), (2, 0, "Failed"), (3, 2, "Succeeded"), (4, 2, "Failed")])
def test_a_command_is_tried_again_as_often_as_its_retries_say(tmp_path, needed, retries, ending):
    with running(tmp_path, service(f"{{ run = [{fails_until(needed)}], retries = {retries}, retry_delay = 0 }}")) as host:
        record = host.wait(host.deploy())
        tries = min(needed, retries + 1)
        assert record["status"] == ending
        assert [command["attempt"] for command in record["commands"]] == list(range(1, tries + 1))
        assert host.log(record["deploy_id"]).count("trying again in 0 s") == tries - 1


def test_a_failure_that_is_not_critical_is_noted_and_carried_on(tmp_path):
    soft = FAIL.replace("[", "{ run = [", 1) + ", critical = false }"
    with running(tmp_path, service(soft, say("deploy"))) as host:
        record = host.wait(host.deploy())
        assert record["status"] == "Succeeded" and trace(host) == ["deploy app:1"]
        assert [(command["status"], command["critical"]) for command in record["commands"]] == [("failed", False), ("succeeded",
            True)]
        assert "not critical" in host.log(record["deploy_id"])


SLOW = '["sh", "-c", "sleep 1000 & echo $! > child; wait"]'


def test_a_command_beyond_its_timeout_ends_with_its_whole_group(tmp_path):
    with running(tmp_path, service(f"{{ run = {SLOW}, timeout = 1 }}")) as host:
        record = host.wait(host.deploy())
        [command] = record["commands"]
        assert (record["status"], command["status"], command["timed_out"]) == ("Failed", "timed_out", True)
        assert not is_alive(read_pid(host, "child"))


@pytest.mark.parametrize("slow", [
    service('["sleep", "1000"]'), service('{ run = ["false"], retries = 1, retry_delay = "1h" }'),
    service(tables=health('["true"]', rules="initial_delay = 1000\n")), service(tables=hooks(pre_deploy='["sleep", "1000"]'))])
def test_deployment_timeout_bounds_commands_waits_and_probes(tmp_path, slow):
    with running(tmp_path, slow, "[limits]\ndeployment_timeout = 1") as host:
        assert host.wait(host.deploy())["status"] == "Failed"


def test_the_rollback_has_a_time_of_its_own(tmp_path):
    with running(tmp_path, service('["sleep", "1000"]', tables=rollback(say("back"))), "[limits]\ndeployment_timeout = 1") as host:
        record = host.wait(host.deploy("app:2", previous_image="app:1"))
        assert record["status"] == "RolledBack" and trace(host) == ["back app:2"]


# --- health

def probe_series(*good: int) -> str:
    """Return a probe that is good at these turns."""
    pattern = "|".join(map(str, good)) or "none"
    return '["sh", "-c", "echo probe >> count; case $(wc -l < count | tr -d \' \') in ' + pattern + ') ;; *) exit 1 ;; esac"]'


@pytest.mark.parametrize("good, threshold, most, probes, ending", [
    ((1,), 1, 5, 1, "Succeeded"), ((1, 2, 3), 3, 9, 3, "Succeeded"), ((1, 3, 4), 2, 4, 4, "Succeeded"),
    ((), 4, 5, 2, "Failed"), ((1, 2), 3, 4, 3, "Failed"), ((), 1, 3, 3, "Failed")])
def test_probes_end_at_the_threshold_or_when_it_is_out_of_reach(tmp_path, good, threshold, most, probes, ending):
    rules = f"{QUICK}max_attempts = {most}\nsuccess_threshold = {threshold}\n"
    with running(tmp_path, service(tables=health(probe_series(*good), rules=rules))) as host:
        record = host.wait(host.deploy())
        assert record["status"] == ending
        assert len([command for command in record["commands"] if command["phase"] == "healthcheck"]) == probes


class Page(http.server.BaseHTTPRequestHandler):
    """Answers 200 "version 1.0" at /, 500 elsewhere."""

    def do_GET(self):
        self.send_response(200 if self.path == "/" else 500)
        self.end_headers()
        self.wfile.write(b"version 1.0")

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """An HTTP server, a unix socket, and a port where nobody listens."""
    folder = tmp_path_factory.mktemp("t")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page) as page, socket.socket(socket.AF_UNIX) as unix, socket.socket() as closed:
        unix.bind(str(folder / "s"))
        unix.listen()
        closed.bind(("127.0.0.1", 0))
        threading.Thread(target=page.serve_forever, daemon=True).start()
        yield {"PAGE": page.server_address[1], "CLOSED": closed.getsockname()[1], "SOCKET": folder / "s", "NOWHERE": folder / "n"}
        page.shutdown()


@pytest.mark.parametrize("probe, ending, why", [
    ('http = "http://127.0.0.1:PAGE/"', "Succeeded", ""),
    ('http = { url = "http://127.0.0.1:PAGE/", contains = "version {{IMAGE|tag}}" }', "Succeeded", ""),
    ('http = { url = "http://127.0.0.1:PAGE/sick", status = 500 }', "Succeeded", ""),
    ('http = "http://127.0.0.1:PAGE/sick"', "Failed", "answered 500, not 200"),
    ('http = { url = "http://127.0.0.1:PAGE/", contains = "version 2" }', "Failed", "without the expected text"),
    ('http = "http://127.0.0.1:CLOSED/"', "Failed", "refused"),
    ('tcp = "127.0.0.1:PAGE"', "Succeeded", ""), ('tcp = "127.0.0.1:CLOSED"', "Failed", "refused"),
    ('unix = "SOCKET"', "Succeeded", ""), ('unix = "NOWHERE"', "Failed", "No such file")])
def test_http_tcp_and_unix_are_probed_without_any_program(tmp_path, target, probe, ending, why):
    for word, value in target.items():
        probe = probe.replace(word, str(value))
    with running(tmp_path, service(tables=f"[service.healthcheck]\n{ONE_PROBE}{probe}\n")) as host:
        record = host.wait(host.deploy("app:1.0"))
        assert record["status"] == ending
        assert why in (record["error"] or "")
        assert [command["phase"] for command in record["commands"]] == ["deploy", "healthcheck"]


# --- rolling back

def test_the_previous_image_is_the_requests_else_the_last_good_one_unless_it_is_the_same(tmp_path):
    sick = health('["sh", "-c", "test ! -e sick"]')
    back = rollback('["sh", "-c", "rm sick; echo back to $HOOKSHOT_PREVIOUS_IMAGE >> web.trace"]')
    with running(tmp_path, service(tables=sick + back)) as host:
        def deploy(image, **fields):
            record = host.wait(host.deploy(image, **fields))
            return record["status"], record["previous_image"]

        def current():
            return host.get("/services/web").json["current_image"]

        (tmp_path / "sick").touch()
        assert deploy("app:1") == ("Failed", None)
        (tmp_path / "sick").unlink()
        assert deploy("app:1") == ("Succeeded", None) and current() == "app:1"
        (tmp_path / "sick").touch()
        assert deploy("app:2") == ("RolledBack", "app:1") and current() == "app:1"
        (tmp_path / "sick").touch()
        assert deploy("app:2", previous_image="app:0") == ("RolledBack", "app:0") and current() == "app:0"
        (tmp_path / "sick").touch()
        assert deploy("app:0") == ("Failed", None)
        assert deploy("app:3", previous_image="app:3") == ("Failed", None)
        assert trace(host) == ["back to app:1", "back to app:0"]


@pytest.mark.parametrize("most, ending", [(1, "RollbackFailed"), (2, "RolledBack")])
def test_the_whole_rollback_is_tried_max_attempts_times(tmp_path, most, ending):
    back = rollback(say("back"), f"[{fails_until(2)}]", rules=f"max_attempts = {most}\n")
    with running(tmp_path, service(FAIL, tables=back)) as host:
        record = host.wait(host.deploy("app:2", previous_image="app:1"))
        assert record["status"] == ending and trace(host) == ["back app:2"] * most


# --- the queue

def test_deployments_of_a_service_run_in_the_order_they_came(tmp_path):
    with running(tmp_path, service(HOLD)) as host:
        ids = [host.deploy(f"app:{number}") for number in range(6)]
        wait_until(lambda: trace(host))
        assert [host.record(deploy_id)["status"] for deploy_id in ids[1:]] == ["Queued"] * 5
        release(host)
        for deploy_id in ids:
            assert host.wait(deploy_id)["status"] == "Succeeded"
        assert trace(host) == [f"{word} app:{number}" for number in range(6) for word in ("begin", "end")]


@pytest.mark.parametrize("config, services, running_at_once", [
    ("[limits]\nmax_concurrent_per_service = 1", ["web"] * 3, 1), ("[limits]\nmax_concurrent_per_service = 2", ["web"] * 3, 2),
    ("[limits]\nmax_concurrent_total = 2", ["web", "api", "job"], 2), ("[server]\nworker_threads = 1", ["web", "api"], 1),
    ("", ["web", "api", "job"], 3)])
def test_no_more_run_at_once_than_the_limits_allow_and_no_fewer(tmp_path, config, services, running_at_once):
    text = "".join(service(HOLD, name=name) for name in ("web", "api", "job"))
    with running(tmp_path, text, config) as host:
        ids = [host.deploy(f"app:{number}", name) for number, name in enumerate(services)]

        def begun():
            return sum(line.startswith("begin") for name in set(services) for line in trace(host, name))

        wait_until(lambda: begun() == running_at_once)
        queue = host.get("/health").json["deployment_queue"]
        assert (queue["active"], queue["pending"]) == (running_at_once, len(ids) - running_at_once)
        release(host)
        assert all(host.wait(deploy_id)["status"] == "Succeeded" for deploy_id in ids)
        assert begun() == len(ids)


def test_a_busy_service_that_rejects_stores_nothing(tmp_path):
    with running(tmp_path, service(HOLD, head='on_busy = "reject"')) as host:
        first = host.deploy()
        refused = host.post({"service": "web", "image": "app:2"})
        assert (refused.status, refused.json["code"]) == (503,
            "CONCURRENCY_LIMIT_EXCEEDED") and int(refused.headers["retry-after"]) > 0
        assert len(host.get("/deployments").json["deployments"]) == 1
        release(host)
        host.wait(first)
        assert host.wait(host.deploy("app:3"))["status"] == "Succeeded"


def test_the_newest_replaces_those_that_wait_but_not_the_one_that_runs(tmp_path):
    with running(tmp_path, service(HOLD, head='on_busy = "replace"')) as host:
        first = host.deploy("app:1")
        wait_until(lambda: trace(host))
        second, third = host.deploy("app:2"), host.deploy("app:3")
        cancelled = host.record(second)
        assert cancelled["status"] == "Cancelled" and "superseded" in cancelled["state_transitions"][-1]["reason"]
        release(host)
        assert [host.wait(deploy_id)["status"] for deploy_id in (first, third)] == ["Succeeded"] * 2
        assert trace(host) == ["begin app:1", "end app:1", "begin app:3", "end app:3"]
        assert host.get("/services/web").json["stats"]["cancelled"] == 1


def test_a_full_queue_refuses_and_stores_nothing(tmp_path):
    with running(tmp_path, service(HOLD), "[limits]\nmax_queue_per_service = 1") as host:
        host.deploy("app:1")
        wait_until(lambda: trace(host))
        answer = host.post({"service": "web", "image": "app:2"})
        assert (answer.status, answer.json["position"]) == (202, 1)
        refused = host.post({"service": "web", "image": "app:3"})
        assert (refused.status, refused.json["code"]) == (503, "CONCURRENCY_LIMIT_EXCEEDED")
        assert len(host.get("/deployments").json["deployments"]) == 2


def test_a_deployment_that_waits_longer_than_lock_timeout_expires_without_running(tmp_path):
    with running(tmp_path, service(HOLD), "[limits]\nlock_timeout = 1") as host:
        first, second = host.deploy("app:1"), host.deploy("app:2")
        record = host.wait(second)
        assert record["status"] == "Cancelled" and "lock_timeout" in record["error"] and record["commands"] == []
        assert host.record(first)["status"] == "Deploying"
        release(host)
        assert host.wait(first)["status"] == "Succeeded" and trace(host) == ["begin app:1", "end app:1"]


def test_a_disabled_service_refuses_and_stores_nothing(tmp_path):
    with running(tmp_path, service(head="enabled = false")) as host:
        answer = host.post({"service": "web", "image": "app:1"})
        assert answer.status == 403 and "disabled" in answer.json["detail"]
        assert host.get("/deployments").json["deployments"] == []
        assert host.get("/services/web").json["enabled"] is False


def test_a_queued_deployment_of_a_service_that_is_removed_ends_with_the_reason(tmp_path):
    with running(tmp_path, service(HOLD) + service(name="api")) as host:
        first, second = host.deploy("app:1"), host.deploy("app:2")
        wait_until(lambda: trace(host))
        host.services.write_text(service(name="api").replace("@", str(tmp_path)))
        host.process.send_signal(signal.SIGHUP)
        record = host.wait(second)
        assert record["status"] == "Cancelled" and record["error"] == "service web is not in services.toml any more"
        release(host)
        # What runs keeps the files it began with.
        assert host.wait(first)["status"] == "Succeeded"
        assert trace(host) == ["begin app:1", "end app:1"]


# --- crashes

# Every command notes whether the one that was left running still lives; in the phase that `hold` names it stays.
STEP = '["sh", "-c", "' \
       'if [ -e held ]; then case \\"$(cat /proc/$(cat held)/stat 2>/dev/null)\\" in \'\'|*\') Z \'*) ;; *) echo overlap >> web.trace ;; esac; fi; ' \
       'echo $HOOKSHOT_PHASE >> web.trace; ' \
       'if [ \\"$(cat hold 2>/dev/null)\\" = $HOOKSHOT_PHASE ]; then echo $$ > held; exec sleep 1000; fi; ' \
       'test $HOOKSHOT_PHASE != deploy || test ! -e sick"]'
CRASHING = service(STEP, tables=health(STEP) + rollback(STEP))


@contextlib.contextmanager
def crashed(folder, phase: str, recovery: str):
    """Give a host whose server was killed while a deployment was in `phase`, the deployment's id, and the leftover's pid."""
    host = support.Host(folder, CRASHING.replace('name = "web"', f'name = "web"\nrecovery = "{recovery}"'))
    (folder / "hold").write_text(phase)
    if phase == "rollback":
        (folder / "sick").touch()
    left = 0
    try:
        host.start()
        deploy_id = host.deploy("app:2", previous_image="app:1")
        left = read_pid(host, "held")
        host.kill()
        assert is_alive(left)
        (folder / "hold").unlink()
        yield host, deploy_id, left
    finally:
        host.close()
        if left and is_alive(left):
            os.kill(left, signal.SIGKILL)


@pytest.mark.parametrize("phase, recovery, ending, after", [
    ("deploy", "rollback", "RolledBack", ["rollback", "healthcheck"]), ("deploy", "fail", "Failed", []),
    ("deploy", "retry", "Succeeded", ["deploy", "healthcheck"]),
    ("healthcheck", "rollback", "RolledBack", ["rollback", "healthcheck"]), ("healthcheck", "fail", "Failed", []),
    ("healthcheck", "retry", "Succeeded", ["deploy", "healthcheck"]),
    ("rollback", "rollback", "RolledBack", ["rollback", "healthcheck"]), ("rollback", "fail", "RollbackFailed", []),
    ("rollback", "retry", "RolledBack", ["rollback", "healthcheck"])])
def test_after_a_crash_the_leftover_is_ended_and_the_policy_followed(tmp_path, phase, recovery, ending, after):
    with crashed(tmp_path, phase, recovery) as (host, deploy_id, left):
        before = trace(host)
        host.start()
        record = host.wait(deploy_id)
        assert not is_alive(left)
        assert record["status"] == ending and record["recoveries"] == 1
        assert trace(host) == before + after


def test_a_deployment_killed_before_its_first_command_is_recovered_too(tmp_path):
    with crashed(tmp_path, "deploy", "retry") as (host, deploy_id, left):
        os.kill(left, signal.SIGKILL)
        with contextlib.closing(sqlite3.connect(host.data / "state.db")) as db, db:
            db.execute("UPDATE deployments SET state='Validating', phase=NULL, pid=NULL")
        assert host.start().wait(deploy_id)["status"] == "Succeeded"


def test_every_accepted_deployment_survives_kill_9_in_order(tmp_path):
    with crashed(tmp_path, "deploy", "fail") as (host, first, _):
        (tmp_path / "hold").write_text("none")
        host.start()
        host.wait(first)
        (tmp_path / "hold").write_text("deploy")
        (tmp_path / "held").unlink()
        ids = [host.deploy(f"app:{number}") for number in range(3)]
        left = read_pid(host, "held")
        host.kill()
        (tmp_path / "hold").unlink()
        host.start()
        assert [host.wait(deploy_id)["status"] for deploy_id in ids] == ["Failed", "Succeeded", "Succeeded"]
        assert not is_alive(left) and "overlap" not in trace(host)


def test_a_deployment_that_outlives_three_restarts_is_not_begun_a_fourth_time(tmp_path):
    with crashed(tmp_path, "deploy", "retry") as (host, deploy_id, _):
        (tmp_path / "hold").write_text("deploy")
        for _ in range(3):
            (tmp_path / "held").unlink()
            host.start()
            read_pid(host, "held")
            host.kill()
        (tmp_path / "hold").unlink()
        record = host.start().wait(deploy_id)
        assert record["status"] == "RolledBack" and trace(host).count("deploy") == 4 and "overlap" not in trace(host)


def test_a_daemon_that_an_earlier_command_left_is_let_be_by_the_recovery(tmp_path):
    leaves = '["sh", "-c", "sleep 1000 >/dev/null 2>&1 & echo $! > daemon"]'
    with running(tmp_path, service(leaves, '["sh", "-c", "echo $$ > held; exec sleep 1000"]')) as host:
        deploy_id = host.deploy()
        held, daemon = read_pid(host, "held"), read_pid(host, "daemon")
        host.kill()
        try:
            assert host.start().wait(deploy_id)["status"] == "Failed"
            assert not is_alive(held) and is_alive(daemon)
        finally:
            os.kill(daemon, signal.SIGKILL)


# Notes that it runs, and stays until it is killed.
STAY = '["sh", "-c", "echo hook >> $HOOKSHOT_SERVICE.trace; echo $$ > held; exec sleep 1000"]'


@pytest.mark.parametrize("recovery", ["rollback", "retry", "fail"])
def test_a_crash_in_a_failure_hook_does_not_change_the_verdict(tmp_path, recovery):
    tables = rollback(SAY.replace("{word}", "back")) + hooks(pre_deploy=FAIL, on_failure=STAY)
    with running(tmp_path, service(SAY.replace("{word}", "deploy"), head=f'recovery = "{recovery}"', tables=tables)) as host:
        deploy_id = host.deploy("app:2", previous_image="app:1")
        read_pid(host, "held")
        host.kill()
        record = host.start().wait(deploy_id)
        assert record["status"] == "Failed" and "pre_deploy" in record["error"] and trace(host) == ["hook"]


def test_a_crash_in_a_failure_hook_rolls_nothing_back_twice(tmp_path):
    with running(tmp_path, service(FAIL, tables=rollback(SAY.replace("{word}", "back")) + hooks(on_failure=STAY))) as host:
        deploy_id = host.deploy("app:2", previous_image="app:1")
        read_pid(host, "held")
        host.kill()
        assert host.start().wait(deploy_id)["status"] == "RolledBack" and trace(host) == ["back app:2", "hook"]


def test_recovery_lets_the_commands_of_another_data_directory_be(tmp_path):
    """Two servers of one host may be given the same deploy_id."""
    work = service('["true"]', HOLD)
    with running(tmp_path / "a", work) as here, running(tmp_path / "b", service(HOLD)) as there:
        mine = here.deploy(deploy_id="ci-1")
        wait_until(lambda: trace(here))
        there.deploy(deploy_id="ci-1")
        wait_until(lambda: trace(there))
        there.kill()
        assert there.start().wait("ci-1")["status"] == "Failed"
        release(here)
        assert here.wait(mine)["status"] == "Succeeded"


def test_a_stopped_command_is_in_the_record(tmp_path):
    with running(tmp_path, service('["sh", "-c", "echo hello; echo $$ > held; exec sleep 1000"]', head='recovery = "fail"'),
                 "[server]\nshutdown_timeout = 0\n") as host:
        deploy_id = host.deploy()
        read_pid(host, "held")
        host.stop()
        record = host.start().wait(deploy_id)
        assert [(command["status"], command["stdout"]) for command in record["commands"]] == [("stopped", "hello\n")]


def test_one_worker_never_has_two_deployments(tmp_path):
    """Each command asks how many run: of services that could all run at once, with one worker there is one."""
    names = ["a", "b", "c"]
    count = '["sh", "-c", "mkdir running && sleep 0.01 && rmdir running"]'
    with running(tmp_path, "".join(service(count, name=name) for name in names), "[server]\nworker_threads = 1\n") as host:
        for _ in range(10):
            with concurrent.futures.ThreadPoolExecutor(3) as clients:
                ids = list(clients.map(lambda name: host.deploy(service=name), names))
            records = sorted((host.wait(deploy_id) for deploy_id in ids), key=lambda record: record["timings"]["queued_at"])
            assert [record["status"] for record in records] == ["Succeeded"] * 3
            started, ended = ([record["timings"][name] for record in records] for name in ("started_at", "completed_at"))
            assert all(end <= start for end, start in zip(sorted(ended), sorted(started)[1:]))


def test_progress_is_that_of_the_phase_that_is_on(tmp_path):
    with running(tmp_path, service('["true"]', '["true"]', tables=health('["true"]', rules="initial_delay = 1000\n")),
                 "[limits]\ndeployment_timeout = 1\n") as host:
        deploy_id = host.deploy()
        progress = host.wait(deploy_id, "HealthChecking")["progress"]
        assert (progress["phase"], progress["current_step"], progress["steps_total"]) == ("healthcheck", None, 1)
        assert host.wait(deploy_id)["failure_stage"] == "healthcheck"


# --- shutdown

def test_shutdown_lets_a_running_deployment_finish_and_refuses_new_ones(tmp_path):
    with running(tmp_path, service(HOLD)) as host:
        deploy_id, queued = host.deploy("app:1"), host.deploy("app:2")
        wait_until(lambda: trace(host))
        host.process.send_signal(signal.SIGTERM)
        wait_until(lambda: host.get("/ready").status == 503)
        refused = host.post({"service": "web", "image": "app:3"})
        assert (refused.status, refused.json["code"]) == (503, "SHUTTING_DOWN") and int(refused.headers["retry-after"]) > 0
        release(host)
        assert host.process.wait(support.PATIENCE_S) == 0
        assert trace(host) == ["begin app:1", "end app:1"]
        host.start()
        assert [host.wait(name)["recoveries"] for name in (deploy_id, queued)] == [0, 0]
        assert trace(host) == ["begin app:1", "end app:1", "begin app:2", "end app:2"]
        assert len(host.get("/deployments").json["deployments"]) == 2


@pytest.mark.parametrize("held", [HOLD, '{ run = ["false"], retries = 1, retry_delay = "1h" }'])
def test_what_outlasts_shutdown_timeout_is_stopped_and_recovered_at_the_next_start(tmp_path, held):
    with running(tmp_path, service(held, head='recovery = "fail"'), "[server]\nshutdown_timeout = 0") as host:
        deploy_id = host.deploy()
        wait_until(lambda: host.record(deploy_id)["progress"]["phase"] or host.record(deploy_id)["commands"])
        assert host.stop() == 0
        host.start()
        record = host.wait(deploy_id)
        assert record["status"] == "Failed" and "the server stopped while it ran" in record["error"]
        assert "end app:1" not in trace(host)


def test_a_second_signal_stops_at_once_without_asking_the_command_first(tmp_path):
    asked = '["sh", "-c", "trap \'echo asked >> web.trace\' TERM; echo $$ > held; while :; do sleep 1; done"]'
    with running(tmp_path, service(asked)) as host:
        host.deploy()
        held = read_pid(host, "held")
        host.process.send_signal(signal.SIGTERM)
        wait_until(lambda: host.get("/ready").status == 503)
        assert host.stop() == 0
        assert not is_alive(held) and trace(host) == []


def test_a_second_signal_does_not_wait_for_a_probe(tmp_path):
    """The probe of an address that never answers has five minutes; the server is gone long before."""
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as silent:
        port = silent.getsockname()[1]
        tables = f'[service.healthcheck]\ninitial_delay = 0\ntimeout = 300\nhttp = "http://127.0.0.1:{port}/"\n'
        with running(tmp_path, service(tables=tables)) as host:
            host.deploy()
            silent.settimeout(support.PATIENCE_S)
            with silent.accept()[0]:
                host.process.send_signal(signal.SIGTERM)
                wait_until(lambda: host.get("/ready").status == 503)
                assert host.stop() == 0
