# SPDX-License-Identifier: MPL-2.0
"""What tests/machine.sh runs in a machine of its own for tests/test_systemd.py: an operator's way with the printed units.

Prints one JSON object: what was seen at each stage. It judges nothing.
"""

import http.client
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

PROGRAM = "/usr/local/bin/hookshot.py"
UNITS = pathlib.Path("/etc/systemd/system")
SHARE = pathlib.Path("/usr/local/share/hookshot")
WORK = pathlib.Path("/srv/web")
SERVICES = """
[[service]]
name = "web"
working_dir = "/srv/web"
[service.security]
allowed_image_pattern = 'app:[a-z0-9.]+'
[service.deploy]
commands = [["touch", "{{IMAGE|tag}}"], ["sh", "-c", "until [ ! -e hold ]; do sleep 0.05; done"]]
[service.rollback]
commands = [["true"]]
"""
RESTARTING = """
[[service]]
name = "unit"
working_dir = "/srv/web"
[service.security]
allowed_image_pattern = 'app:[a-z0-9.]+'
[service.deploy]
commands = [["systemctl", "restart", "other.service"]]
"""
seen: dict[str, object] = {}


def run(*words: str, input: str = "") -> str:
    done = subprocess.run(words, input=input, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise SystemExit(f"{words} ended with {done.returncode}: {done.stdout}{done.stderr}\n{journal()}")
    return done.stdout


def journal() -> str:
    return subprocess.run(["journalctl", "--no-pager", "-n", "40", "-o", "cat"], capture_output=True, text=True).stdout


def hookshot(*words: str) -> str:
    return run("/usr/bin/python3", PROGRAM, *words)


def properties(*names: str) -> list[str]:
    return [run("systemctl", "show", "hookshot.service", "--value", "-p", name).strip() for name in names]


def until(what: str, condition, patience_s: float = 40.0):
    deadline = time.monotonic() + patience_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise SystemExit(f"{what}: still not so after {patience_s} s: {properties('ActiveState', 'StatusText')}\n{journal()}")
        time.sleep(0.05)
    return value


def sign(body: bytes) -> list[str]:
    # The secrets are one user's alone.
    return run("runuser", "-u", pathlib.Path("/etc/hookshot/secrets").owner(), "--", "/usr/bin/python3", PROGRAM, "sign", input=body.decode()).strip().split(": ")


def ask(method: str, path: str, document: object = None) -> tuple[int, dict]:
    body, headers = None, {}
    if document is not None:
        body = json.dumps(document).encode()
        name, value = sign(body)
        headers = {"Content-Type": "application/json", name: value}
    link = http.client.HTTPConnection("127.0.0.1", 8080, timeout=60)
    link.request(method, path, body, headers)
    answer = link.getresponse()
    return answer.status, json.loads(answer.read())


def deploy(image: str, service: str = "web", path: str = "/deploy") -> str:
    status, answer = ask("POST", path, {"service": service, "image": image})
    if status not in (200, 202):
        raise SystemExit(f"{image}: {status} {answer}\n{journal()}")
    return answer["deploy_id"]


def state(deploy_id: str) -> str:
    return ask("GET", f"/status/{deploy_id}")[1]["status"]


def add(unit: str, name: str, lines: str) -> None:
    (UNITS / f"{unit}.d").mkdir(exist_ok=True)
    (UNITS / f"{unit}.d" / f"{name}.conf").write_text(lines)
    run("systemctl", "daemon-reload")


def set_up() -> None:
    """As docs/systemd.md says."""
    for name in ("sysusers", "tmpfiles"):
        pathlib.Path(f"/etc/{name}.d").mkdir(exist_ok=True)
        pathlib.Path(f"/etc/{name}.d/hookshot.conf").write_text((SHARE / f"{name}.conf").read_text())
    run("systemd-sysusers")
    hookshot("init", "/etc/hookshot")
    run("systemd-tmpfiles", "--create", "/etc/tmpfiles.d/hookshot.conf")
    config = pathlib.Path("/etc/hookshot/config.toml")
    # A command that brings no secret, but takes until it may: then the server is not ready yet.
    config.write_text(config.read_text().replace('# source = "auto"', 'source = ["file", "command"]')
                      .replace("# command = []", 'command = ["sh", "-c", "until [ -e /srv/web/go ]; do sleep 0.05; done"]')
                      .replace("# rate_limit = 100", "rate_limit = 0").replace("# shutdown_timeout = 300", "shutdown_timeout = 0"))
    pathlib.Path("/etc/hookshot/services.toml").write_text(SERVICES)
    WORK.mkdir(parents=True, exist_ok=True)
    run("chown", "hookshot:", str(WORK))
    (UNITS / "hookshot.service").write_text(hookshot("show", "unit"))
    (UNITS / "hookshot.socket").write_text(hookshot("show", "socket"))
    verified = subprocess.run(["systemd-analyze", "verify", "hookshot.service", "hookshot.socket"], capture_output=True, text=True)
    seen["verify"] = [verified.returncode, verified.stderr]
    add("hookshot.service", "test", "[Service]\nRestartSec=100ms\n")
    run("systemctl", "enable", "hookshot.service")


def start() -> None:
    run("systemctl", "start", "--no-block", "hookshot.service")
    until("asked for its secrets", lambda: "go ]" in run("ps", "-eo", "args"))
    seen["before ready"] = properties("ActiveState", "SubState")
    (WORK / "go").touch()
    until("active", lambda: properties("ActiveState") == ["active"])
    seen["ready"] = [ask("GET", "/ready")[0], *properties("StatusText", "User")]
    seen["doctor"] = [line for line in hookshot("doctor").splitlines() if line.startswith(("fail", "ok   user", "ok   unit", "warn unit"))]


def work() -> None:
    deploy_id = deploy("app:1", path="/deploy?wait=30")
    seen["deployed"] = [state(deploy_id), (WORK / "1").exists()]
    (WORK / "hold").touch()
    deploy_id = deploy("app:2")
    seen["status"] = until("deploying", lambda: (text := properties("StatusText")[0]) == "deploying web, step 2 of 2" and text)
    run("systemctl", "reload", "hookshot.service")
    until("reloaded", lambda: '"reloaded"' in run("journalctl", "-u", "hookshot.service", "-o", "cat"))
    until("active", lambda: properties("ActiveState") == ["active"])
    seen["reloaded"] = [state(deploy_id), *properties("NRestarts")]
    pathlib.Path("/etc/hookshot/services.toml").write_text("half of it [")
    seen["not reloaded"] = [subprocess.run(["systemctl", "reload", "hookshot.service"], capture_output=True).returncode, *properties("ActiveState")]
    pathlib.Path("/etc/hookshot/services.toml").write_text(SERVICES)
    begun = time.monotonic()
    run("systemctl", "stop", "hookshot.service")
    seen["stopped"] = [*properties("ActiveState", "Result"), time.monotonic() - begun < 30]
    seen["left"] = [line for line in run("ps", "-u", "hookshot", "-o", "args=", "-N", "-u", "root").splitlines() if "hold" in line]
    (WORK / "hold").unlink()
    run("systemctl", "start", "hookshot.service")
    seen["recovered"] = until("recovered", lambda: (found := state(deploy_id)) in ("RolledBack", "Failed", "Succeeded") and found)


def watch() -> None:
    add("hookshot.service", "watchdog", "[Service]\nWatchdogSec=2\n")
    run("systemctl", "restart", "hookshot.service")
    [pid] = properties("MainPID")
    told = properties("WatchdogTimestampMonotonic")
    until("told that all is well", lambda: properties("WatchdogTimestampMonotonic") != told)
    seen["in peace"] = properties("MainPID", "NRestarts") == [pid, "0"]
    os.kill(int(pid), signal.SIGSTOP)
    until("restarted by the watchdog", lambda: properties("NRestarts") == ["1"] and properties("ActiveState") == ["active"])
    seen["watchdog"] = [properties("MainPID") != [pid], ask("GET", "/ready")[0], "watchdog" in run("journalctl", "-u", "hookshot.service", "-o", "cat").lower()]


def restart_under_a_socket() -> None:
    run("systemctl", "stop", "hookshot.service")
    run("systemctl", "start", "hookshot.socket")
    body = json.dumps({"service": "web", "image": "app:3"}).encode()
    name, value = sign(body)
    answers: list[object] = []
    over = threading.Event()

    def post() -> None:
        while not over.is_set():
            try:
                link = http.client.HTTPConnection("127.0.0.1", 8080, timeout=60)
                link.request("POST", "/deploy", body, {"Content-Type": "application/json", name: value})
                answer = link.getresponse()
                document = json.loads(answer.read())
                answers.append((answer.status, document.get("deploy_id")))
                while answer.status == 202 and state(document["deploy_id"]) == "Queued" and not over.is_set():
                    time.sleep(0.01)
            except Exception as error:
                answers.append(repr(error))

    client = threading.Thread(target=post)
    client.start()
    # The first connection starts it.
    until("started by a connection", lambda: answers)
    for _ in range(2):
        count = len(answers)
        run("systemctl", "restart", "hookshot.service")
        until("answered again", lambda: len(answers) > count)
    over.set()
    client.join()
    seen["under a socket"] = sorted({answer[0] if isinstance(answer, tuple) else answer for answer in answers}, key=str)
    seen["lost"] = [deploy_id for status, deploy_id in (answer for answer in answers if isinstance(answer, tuple)) if ask("GET", f"/status/{deploy_id}")[0] != 200]
    seen["listens"] = "(from systemd)" in run("journalctl", "-u", "hookshot.service", "-o", "cat")


def ask_the_manager() -> None:
    """A service whose command talks to systemd, and secrets that come as credentials."""
    (UNITS / "other.service").write_text("[Service]\nType=oneshot\nExecStart=touch /run/other-was-started\n")
    pathlib.Path("/etc/hookshot/services.toml").write_text(SERVICES + RESTARTING)
    run("systemctl", "stop", "hookshot.socket", "hookshot.service")
    credentials = pathlib.Path("/etc/hookshot/credentials")
    credentials.mkdir(mode=0o700)
    (credentials / "hmac_key").write_text(hookshot("keygen"))
    os.environ["HOOKSHOT_KEY_FILE"] = str(credentials / "hmac_key")
    config = pathlib.Path("/etc/hookshot/config.toml")
    config.write_text(config.read_text().replace('["file", "command"]', '"systemd"'))
    run("chown", "root:", "/etc/hookshot/secrets")
    (UNITS / "hookshot.service").write_text(hookshot("show", "unit"))
    run("systemctl", "daemon-reload")
    run("systemctl", "start", "hookshot.service")
    hookshot("validate")
    deploy_id = deploy("app:4", "unit", "/deploy?wait=30")
    seen["systemctl"] = [*properties("User"), state(deploy_id), os.path.exists("/run/other-was-started")]
    run("systemctl", "reload", "hookshot.service")
    seen["credentials"] = until("reloaded", lambda: "secrets: are not looked at" in journal()) and ask("GET", "/ready")[1]


def run_for_a_user() -> None:
    """The unit of a user's own manager."""
    run("systemctl", "stop", "hookshot.service")
    run("useradd", "--create-home", "dep")
    run("loginctl", "enable-linger", "dep")
    home, uid = pathlib.Path("/home/dep"), run("id", "-u", "dep").strip()
    until("a manager of the user's own", lambda: os.path.exists(f"/run/user/{uid}/systemd/private"))
    as_user = ("runuser", "-u", "dep", "--", "env", "-u", "HOOKSHOT_KEY_FILE", "-C", str(home), f"HOME={home}", f"XDG_RUNTIME_DIR=/run/user/{uid}")
    program = (*as_user, "/usr/bin/python3", PROGRAM)
    run(*program, "init", str(home / ".config/hookshot"))
    run(*as_user, "sed", "-i", "/^data_dir/d", ".config/hookshot/config.toml")
    run(*as_user, "mkdir", "-p", ".config/systemd/user")
    (home / ".config/systemd/user/hookshot.service").write_text(run(*program, "show", "unit", "--user"))
    run(*as_user, "systemctl", "--user", "enable", "--now", "hookshot.service")
    run(*program, "deploy", "example", "example/app:1.0")
    seen["doctor of a user"] = [line for line in run(*program, "doctor").splitlines() if line.split()[1] == "unit"]
    run(*as_user, "systemctl", "--user", "reload", "hookshot.service")
    seen["user"] = [run(*as_user, "systemctl", "--user", "is-active", "hookshot.service").strip(), (home / ".local/state/hookshot/state.db").exists()]


for stage in (set_up, start, work, watch, restart_under_a_socket, ask_the_manager, run_for_a_user):
    began = time.monotonic()
    stage()
    print(f"{stage.__name__}: {time.monotonic() - began:.1f} s", file=sys.stderr)
print(json.dumps(seen))
