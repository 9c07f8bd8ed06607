# SPDX-License-Identifier: MPL-2.0
"""LOG: one line an event, for programs or for people, harmless and without secrets."""

import base64
import contextlib
import fcntl
import json
import os
import pty
import threading
import typing
import urllib.parse

import pytest

import hookshot
import support

CANARY = 'c4n/ry "+&ä\\-0f1e2d3c4b5a'


def lines_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


@contextlib.contextmanager
def logging_to(path, *args, **options):
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    yield hookshot.Log(*args, descriptor=descriptor, **options)
    os.close(descriptor)


def written(tmp_path, *args, style="json", level="debug", masker=None, **fields) -> str:
    """Return what one write leaves."""
    with logging_to(tmp_path / "log", level, style) as log:
        log.masker = masker or log.masker
        log.write(*args, **fields)
    return (tmp_path / "log").read_text()


def deployment(**changes) -> hookshot.Deployment:
    request = hookshot.parse_deploy(hookshot.VerifiedBody("hmac_key", b'{"service": "web", "image": "app:1"}'), None)
    return hookshot.new_deployment(request, hookshot.Trigger("192.0.2.7", "hmac_key", None, "req-1"), "d-1", 0)._replace(**changes)


def result(**changes) -> hookshot.Result:
    values = {"phase": hookshot.Phase.DEPLOY, "step": 1, "name": "pull", "command": "pull --now", "attempt": 1, "status": "succeeded",
              "exit_code": 0, "signal": None, "started_ms": 0, "duration_ms": 5}
    return hookshot.Result(**values | changes)


# --- lines

def test_a_json_line_is_one_object_with_time_level_event_and_what_is_known(tmp_path):
    line = written(tmp_path, "info", "started", "here we are", deploy_id="d-1", error=None, step=0)
    assert line.endswith("\n") and line.count("\n") == 1
    found = json.loads(line)
    moment = found.pop("timestamp")
    assert len(moment) == 24 and moment[10] == "T" and moment[19] == "." and moment.endswith("Z")
    assert found == {"level": "info", "event": "started", "message": "here we are", "deploy_id": "d-1", "step": 0}


HOSTILE = "a\nb\rc\x1b[31md\0e\x85f\u2028g\u202eh\x7f"


@pytest.mark.parametrize("style", ["json", "pretty"])
@pytest.mark.parametrize("where", ["message", "field"])
def test_control_characters_cannot_forge_a_line(tmp_path, style, where):
    message, field = (HOSTILE, "x") if where == "message" else ("x", HOSTILE)
    line = written(tmp_path, "info", "e", message, style=style, image=field)
    assert line.endswith("\n") and line[:-1].isprintable() and len(line.splitlines()) == 1
    if style == "json":
        assert json.loads(line)["message" if where == "message" else "image"] == HOSTILE


@pytest.mark.parametrize("style", ["json", "pretty"])
def test_text_that_is_no_unicode_is_written_all_the_same(tmp_path, style):
    line = written(tmp_path, "info", "e", "a\udcffb", style=style)
    assert "a" in line and "b" in line and line.endswith("\n")


def test_a_pretty_line_has_level_message_and_fields(tmp_path):
    line = written(tmp_path, "warning", "e", "look out", style="pretty", service="web", error=None)
    assert line.split() == [line.split()[0], "WARNING", "look", "out", "service=web"]
    assert "\x1b" not in line


@pytest.mark.parametrize("threshold, kept", [
    ("debug", ["debug", "info", "warning", "error"]), ("info", ["info", "warning", "error"]), ("warning", ["warning", "error"]),
    ("error", ["error"])])
def test_lines_below_the_level_are_left_out(tmp_path, threshold, kept):
    with logging_to(tmp_path / "log", threshold) as log:
        for level in hookshot.LEVELS:
            log.write(level, "e", "m")
    assert [line["level"] for line in lines_of(tmp_path / "log")] == kept


def test_a_terminal_that_nobody_reads_keeps_nobody_waiting():
    """It says that it is ready while it has room for a few characters only."""
    master, slave = pty.openpty()
    log = hookshot.Log(descriptor=slave)
    done = threading.Event()

    def write() -> None:
        for number in range(3000):
            log.write("info", "flood", f"line {number} " + "x" * 150)
        done.set()

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    try:
        assert done.wait(support.PATIENCE_S)
        os.set_blocking(master, False)
        said = b""
        while b"log_lost" not in said:
            with contextlib.suppress(BlockingIOError):
                said += os.read(master, 1 << 16)
            log.write("info", "after", "somebody reads again")
        lines = [json.loads(line) for line in said.replace(b"\r\n", b"\n").split(b"\n")[:-1] if line.endswith(b"}")]
        assert {"flood", "log_lost"} <= {line["event"] for line in lines}
    finally:
        os.close(master)
        os.close(slave)


def test_a_line_that_was_cut_does_not_spoil_the_next():
    """A pipe with little room: what fits of a long line goes, its rest is lost, and what follows begins on a line of its own."""
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 8192)
    try:
        log = hookshot.Log(descriptor=write)
        log.write("info", "long", "x" * 20_000)
        log.write("info", "none", "there is no room at all")
        said = os.read(read, 1 << 16)
        log.write("info", "good", "this one is whole")
        cut, lost, good, end = (said + os.read(read, 1 << 16)).split(b"\n")
        assert cut.startswith(b"{") and not cut.endswith(b"}") and end == b""
        assert json.loads(lost)["message"].endswith(": 2") and json.loads(good)["event"] == "good"
    finally:
        os.close(read)
        os.close(write)


@pytest.mark.parametrize("environment, style, is_coloured", [
    ({"TERM": "xterm"}, "pretty", True), ({"TERM": "xterm", "NO_COLOR": "1"}, "pretty", False), ({"TERM": "dumb"}, "pretty", False),
    ({"TERM": "xterm", "NO_COLOR": ""}, "pretty", True), ({"TERM": "xterm"}, "json", False)])
def test_colour_is_for_terminals_that_want_it(monkeypatch, environment, style, is_coloured):
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    master, slave = pty.openpty()
    hookshot.Log("info", style, descriptor=slave).write("error", "e", "m")
    seen = os.read(master, 1000)
    os.close(master), os.close(slave)
    assert (b"\x1b[" in seen) == is_coloured


def test_a_closed_stderr_does_not_raise():
    reader, writer = os.pipe()
    os.close(reader)
    log = hookshot.Log(descriptor=writer)
    log.write("error", "e", "nobody reads")
    os.close(writer)
    log.write("error", "e", "nowhere to write")


def test_lines_of_threads_never_mix(tmp_path):
    with logging_to(tmp_path / "log") as log:
        threads = [threading.Thread(target=lambda number=number: [log.write("info", "e", str(number) * 500, n=n) for n in range(100)])
                   for number in range(8)]
        [thread.start() for thread in threads], [thread.join() for thread in threads]
    lines = lines_of(tmp_path / "log")
    assert sorted((line["message"][0], line["n"]) for line in lines) == [(str(number), n) for number in range(8) for n in range(100)]
    assert all(line["message"] == line["message"][0] * 500 for line in lines)


# --- events

EVENTS = {
    "accepted": (hookshot.Accepted(deployment(), True, deployment().trigger), "info"),
    "repeated": (hookshot.Accepted(deployment(), False, deployment().trigger), "info"),
    "moved": (hookshot.Moved(deployment(state=hookshot.State.VALIDATING), hookshot.State.QUEUED, ""), "info"),
    "stepped": (hookshot.Moved(deployment(state=hookshot.State.DEPLOYING), hookshot.State.VALIDATING, ""), "debug"),
    "succeeded": (hookshot.Moved(deployment(state=hookshot.State.SUCCEEDED), hookshot.State.DEPLOYING, "well"), "info"),
    "failed": (hookshot.Moved(deployment(state=hookshot.State.FAILED), hookshot.State.DEPLOYING, "bad"), "error"),
    "rolled back": (hookshot.Moved(deployment(state=hookshot.State.ROLLED_BACK), hookshot.State.ROLLING_BACK, "bad"), "warning"),
    "rollback failed": (hookshot.Moved(deployment(state=hookshot.State.ROLLBACK_FAILED), hookshot.State.ROLLING_BACK, ""), "error"),
    "command": (hookshot.CommandEnded(deployment(), result()), "debug"),
    "bad command": (hookshot.CommandEnded(deployment(), result(status="failed", exit_code=3)), "warning"),
    "refused": (hookshot.Refused("req-1", "192.0.2.7", "POST", "/deploy", "VALIDATION_ERROR", "no"), "warning"),
    "controlled": (hookshot.Controlled(deployment().trigger, "lock", "web", None, "done", "web is locked by ann"), "info"),
    "control refused": (hookshot.Controlled(deployment().trigger, "cancel", None, "d-1", "NOT_POSSIBLE", "it has ended"), "warning"),
    "broken": (hookshot.Broken("worker-1", ValueError("why")), "error"),
    "broken deployment": (hookshot.Broken("deployment", ValueError("why"), "req-1", "d-1"), "error"),
    "trouble": (hookshot.Trouble("queue_unreadable", "the disk is full"), "error"),
    "trouble of a deployment": (hookshot.Trouble("record_waiting", "the disk is full", "d-1"), "error"),
    "reloaded": (hookshot.Reloaded(True, "read again", 0), "info"),
    "not reloaded": (hookshot.Reloaded(False, "not read again", 0), "error"),
    "delivered": (hookshot.Notified("chat", "delivered", "d-1", "req-1", "msg_1", "told chat"), "debug"),
    "retried": (hookshot.Notified("chat", "retried", "d-1", "req-1", "msg_1", "could not tell chat"), "warning"),
    "given up": (hookshot.Notified("chat", "expired", "d-1", "req-1", "msg_1", "could not tell chat"), "error"),
    "notice refused": (hookshot.Notified("chat", "refused", "d-1", "req-1", "msg_1", "could not tell chat"), "error"),
    "noted": (hookshot.Noted("started", "hookshot listens"), "info"),
}


@pytest.mark.parametrize("name", EVENTS)
def test_every_event_is_one_line_of_its_level(tmp_path, name):
    event, level = EVENTS[name]
    with logging_to(tmp_path / "log", "debug") as log:
        hookshot.log_event(log, event)
    (line,) = lines_of(tmp_path / "log")
    assert line["level"] == level and line["message"]
    assert line["event"] in hookshot.LOG_EVENTS
    assert line.get("deploy_id") == (event.deployment.deploy_id if hasattr(event, "deployment") else getattr(event, "deploy_id", None))
    if hasattr(event, "deployment") or hasattr(event, "request_id"):
        assert line.get("request_id") == (event.deployment.trigger.request_id if hasattr(event, "deployment") else event.request_id)


@pytest.mark.parametrize("name", EVENTS)
def test_an_event_below_the_level_is_no_line(tmp_path, name):
    event, level = EVENTS[name]
    with logging_to(tmp_path / "log", "info") as log:
        hookshot.log_event(log, event)
    assert len(lines_of(tmp_path / "log")) == (level != "debug")


def test_every_kind_of_event_is_covered_here():
    assert {type(event) for event, _ in EVENTS.values()} == set(typing.get_args(hookshot.Event))


def test_a_bug_leaves_its_trace_in_the_log(tmp_path):
    try:
        int("x")
    except ValueError as error:
        with logging_to(tmp_path / "log") as log:
            hookshot.log_event(log, hookshot.Broken("worker-1", error))
    (line,) = lines_of(tmp_path / "log")
    assert "ValueError" in line["message"] and "Traceback" in line["trace"] and __file__.rpartition("/")[2] in line["trace"]


# --- masking

@pytest.mark.parametrize("style", ["json", "pretty"])
def test_a_secret_is_masked_in_a_line(tmp_path, style):
    secret = "0f1e2d3c4b5a69788796a5b4c3d2e1f0"
    line = written(tmp_path, "info", "e", f"key {secret}", style=style, masker=hookshot.Masker([secret.encode()]), field=secret)
    assert secret not in line and line.count("***") == 2


FORMS = {
    "as it is": CANARY, "base64": base64.b64encode(CANARY.encode()).decode(),
    "base64 unpadded": base64.b64encode(CANARY.encode()).decode().rstrip("="),
    "URL": urllib.parse.quote(CANARY, safe=""), "JSON": json.dumps(CANARY)[1:-1],
}


@pytest.mark.parametrize("form", FORMS)
def test_a_secret_is_masked_in_each_of_its_forms(form):
    masker = hookshot.Masker([CANARY.encode()])
    assert masker.mask_text(f"<{FORMS[form]}> and <{FORMS[form]}>").replace("=", "") == "<***> and <***>"


def test_a_secret_with_bytes_beyond_utf8_is_masked():
    assert hookshot.Masker([b"\xff\xfe\xfd\xfc\xfb\xfa"]).mask(b"a\xff\xfe\xfd\xfc\xfb\xfab") == b"a***b"


def test_a_secret_that_contains_another_is_masked_whole():
    for order in ([b"hunter2", b"hunter2hunter3"], [b"hunter2hunter3", b"hunter2"]):
        assert hookshot.Masker(order).mask(b"hunter2hunter3 hunter2") == b"*** ***"


def test_values_as_short_as_words_are_not_masked():
    masker = hookshot.Masker([b"web", b"", b"true"])
    assert masker.mask(b"web true") == b"web true"
    assert masker.mask_text("web true") == "web true"


@pytest.mark.parametrize("content, safe", [(b"nothing", 7), (b"abc hun", 4), (b"hunter", 0), (b"", 0), (b"xh", 1)])
def test_what_may_be_the_start_of_a_secret_is_held_back(content, safe):
    assert hookshot.Masker([b"hunter2"]).safe_length(content) == safe
