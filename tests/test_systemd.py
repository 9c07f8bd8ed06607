# SPDX-License-Identifier: MPL-2.0
"""systemd: what a service manager is told, the sockets and folders that it gives, the units that are printed, and the real thing."""

import contextlib
import http.client
import json
import os
import pathlib
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

import hookshot
import render_docs
from support import KEY, PATIENCE_S, ROOT, Host, make_certificates, need, program, run_in_machine, service, wait_until

HOLD = '["sh", "-c", "until [ -e go ]; do kill -0 $PPID || exit; sleep 0.02; done"]'
EXAMPLES = ROOT / "examples" / "systemd"
PATHS = ("/etc/hookshot/config.toml", "/etc/hookshot/services.toml")
SYSTEM_PROGRAM = ("/usr/bin/python3", "/usr/local/bin/hookshot")


# --- what the manager is told


class Manager:
    """Stands for systemd at the other end of $NOTIFY_SOCKET."""

    def __init__(self, address: str):
        self.link = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.link.bind(address.replace("@", "\0", 1))
        self.link.settimeout(PATIENCE_S)
        self.heard: list[list[str]] = []

    def hear(self) -> list[str]:
        self.heard.append(self.link.recv(4096).decode().split("\n"))
        return self.heard[-1]

    def hear_until(self, wanted: str) -> list[str]:
        """Return the first message from now on with a line that begins so."""
        while not any(line.startswith(wanted) for line in self.hear()):
            pass
        return self.heard[-1]


@pytest.fixture
def manager() -> Iterator[Manager]:
    """A manager at an abstract address."""
    with contextlib.closing((found := Manager(f"@hookshot-test-{os.getpid()}")).link):
        yield found


def address_of(manager: Manager) -> str:
    return manager.link.getsockname().decode().replace("\0", "@", 1)


def test_the_manager_hears_of_every_stage_of_a_servers_life(tmp_path, manager):
    host = Host(tmp_path, service(HOLD, '["true"]'), "[server]\nshutdown_timeout = 60\n")
    with contextlib.closing(host):
        host.start(wait=False, env={"NOTIFY_SOCKET": address_of(manager), "WATCHDOG_USEC": "600000"})
        assert [manager.hear(), manager.hear()] == [["READY=1"], ["WATCHDOG=1", "STATUS=idle, 1 service"]]
        # Nothing is waited for: at READY=1 it listens, and its workers work.
        host.port = int(re.search(r"127\.0\.0\.1:(\d+)", host.output.read_text())[1])
        host.deploy()
        assert "STATUS=deploying web, step 1 of 2" in manager.hear_until("STATUS=deploying")
        host.deploy()
        assert "STATUS=deploying web, step 1 of 2, 1 queued" in manager.hear_until("STATUS=")
        assert "WATCHDOG=1" in manager.hear_until("WATCHDOG=")

        host.process.send_signal(signal.SIGHUP)
        [reloading, since] = manager.hear_until("RELOADING=")
        assert reloading == "RELOADING=1" and 0 < int(since.removeprefix("MONOTONIC_USEC=")) <= time.monotonic() * 1_000_000
        assert manager.hear_until("READY=") == ["READY=1"]

        host.process.send_signal(signal.SIGTERM)
        assert manager.hear_until("STOPPING=") == ["STOPPING=1"]
        after = len(manager.heard)
        manager.hear_until("EXTEND_TIMEOUT_USEC=15000000")
        manager.hear_until("STATUS=shutting down; deploying web, step 1 of 2, 1 queued")
        assert not any("WATCHDOG=1" in lines for lines in manager.heard[after:])
        (tmp_path / "go").touch()
        assert host.process.wait(PATIENCE_S) == 0


def test_a_manager_that_takes_nothing_holds_nothing_up_and_hears_of_it_later(tmp_path, manager):
    with contextlib.closing(Host(tmp_path, service('["env"]'))) as host, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                other.sendto(b"FILLS=1", manager.link.getsockname())
        # The watchdog of another process is not ours to feed.
        host.start(env={"NOTIFY_SOCKET": address_of(manager), "WATCHDOG_USEC": "300000", "WATCHDOG_PID": "1", "LISTEN_PID": "1", "LISTEN_FDS": "1"})
        [command] = host.wait(host.deploy())["commands"]
        assert not re.search("NOTIFY_SOCKET|WATCHDOG|LISTEN", command["stdout"])
        assert manager.hear_until("READY=1")
        assert host.stop() == 0
        manager.hear_until("STOPPING=1")
        assert not any("WATCHDOG=1" in lines for lines in manager.heard)


@pytest.mark.parametrize("address", ["/nowhere/at/all", "/" + "long" * 40, "vsock:2:1", "nonsense"])
def test_an_address_of_no_manager_is_passed_over(address):
    environ = {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "1", "WATCHDOG_PID": "1"}
    told = hookshot.ServiceManager(environ)
    told.tell("READY=1")
    assert not told.tell_now("STATUS=well") and told.watchdog_s is None and environ == {}


@pytest.fixture
def daemon(tmp_path, manager, monkeypatch) -> Iterator[hookshot.Daemon]:
    """A server in this process, whose reports are made by the test."""
    host = Host(tmp_path, service())
    umask = os.umask(0o077)
    found = hookshot.Daemon(str(host.config), str(host.services), environ={"NOTIFY_SOCKET": address_of(manager), "WATCHDOG_USEC": "3600000000"})
    monkeypatch.setattr(hookshot, "_REPORT_TURN_S", 3600.0)
    found.start()
    monkeypatch.setattr(hookshot, "_REPORT_TURN_S", 0.0)
    try:
        manager.hear_until("STATUS=idle")
        yield found
    finally:
        found.stop()
        os.umask(umask)


def test_the_watchdog_hears_nothing_while_a_part_does_not_turn(daemon, manager, capfd):
    daemon.report(time.monotonic())
    assert "WATCHDOG=1" in manager.hear()
    daemon.report(time.monotonic() + 1000)
    assert manager.hear() == ["STATUS=stuck: reader, housekeeper"] and '"stuck"' in capfd.readouterr().err
    daemon.report(time.monotonic())
    assert "WATCHDOG=1" in manager.hear()


def test_the_watchdog_hears_nothing_while_workers_are_missing(daemon, manager):
    daemon.engine.drain()
    assert daemon.engine.join(PATIENCE_S)
    daemon.report(time.monotonic())
    assert manager.hear() == ["STATUS=stuck: workers"]


def test_the_watchdog_hears_nothing_while_the_database_does_not_answer(daemon, manager, tmp_path):
    daemon.app.store.close()
    (tmp_path / "data").rename(tmp_path / "away")
    daemon.report(time.monotonic())
    assert [line.partition(":")[0] for line in manager.hear()] == ["STATUS=the database does not answer"]
    (tmp_path / "away").rename(tmp_path / "data")
    daemon.report(time.monotonic())
    assert "WATCHDOG=1" in manager.hear()


def running_as(state: hookshot.State, step: int = 0) -> hookshot.Deployment:
    trigger = hookshot.Trigger(address="127.0.0.1", key_id="hmac_key", user_agent="", request_id="r")
    blank = dict.fromkeys(hookshot.Deployment._fields)
    return hookshot.Deployment(**{**blank, "service": "web", "state": state, "step": step, "steps_total": 5, "trigger": trigger})


@pytest.mark.parametrize("states, waiting, words", [
    ((), 0, "idle, 3 services"), ((), 2, "2 queued"), (("Validating",), 0, "preparing web"), (("Deploying",), 3, "deploying web, step 2 of 5, 3 queued"),
    (("HealthChecking",), 0, "checking web, step 2 of 5"), (("RollingBack",), 0, "rolling back web, step 2 of 5"),
    (("Deploying", "RollingBack"), 3, "2 deployments run, 3 queued")])
def test_a_status_says_what_is_done(states, waiting, words):
    deployments = [running_as(hookshot.State(state), 2 * (state != "Validating")) for state in states]
    assert hookshot.describe_work(deployments, waiting, 3) == words
    assert hookshot._DOINGS.keys() == hookshot.ACTIVE


# --- sockets that are passed

# Puts the descriptors of argv[1] where systemd would, says so, and becomes the server.
LAUNCH = """
import os, sys
fds, names, *command = sys.argv[1:]
copies = [os.dup(os.dup(os.dup(int(fd)))) for fd in fds.split(",")]
for number, fd in enumerate(copies, 3):
    os.dup2(fd, number)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(copies)), LISTEN_FDNAMES=names)
os.execv(sys.executable, [sys.executable, *command])
"""


def launch(links: list[socket.socket], names: str) -> dict[str, object]:
    """Return what Host.start() needs to pass sockets as systemd does."""
    fds = [link.fileno() for link in links]
    return {"argv": (sys.executable, "-c", LAUNCH, ",".join(map(str, fds)), names, program()[1]), "fds": fds}


@contextlib.contextmanager
def held(*places: object, kind: int = socket.SOCK_STREAM) -> Iterator[list[socket.socket]]:
    """Hold sockets as a manager does: a port of 127.0.0.1 for 0, a unix socket for a path."""
    with contextlib.ExitStack() as stack:
        links = []
        for place in places:
            links.append(stack.enter_context(socket.socket(socket.AF_INET if place == 0 else socket.AF_UNIX, kind)))
            links[-1].bind(("127.0.0.1", 0) if place == 0 else str(place))
            if kind == socket.SOCK_STREAM:
                links[-1].listen(1024)
        yield links


def refused(host: Host, links: list[socket.socket], names: str, *flags: str) -> str:
    """Return what a server says that does not start with these sockets."""
    host.start(*flags, wait=False, **launch(links, names))
    assert host.process.wait(PATIENCE_S) in (2, 78)
    said, text = host.output.read_text(), "Traceback"
    assert text not in said
    host.output.write_text("")
    return said


def test_sockets_that_are_passed_take_the_place_of_the_files_addresses_and_stay(tmp_path):
    host = Host(tmp_path, service('["env"]', '["sh", "-c", "ls /proc/self/fd | wc -l"]'))
    with held(0, tmp_path / "socket") as links, contextlib.closing(host):
        host.start(**launch(links, "hookshot.socket:hookshot.socket"))
        port = links[0].getsockname()[1]
        assert host.urls == [f"http://127.0.0.1:{port}", f"unix:{tmp_path}/socket"]
        commands = host.wait(host.deploy())["commands"]
        # 0, 1, 2, and the one that ls itself opens.
        assert "LISTEN" not in commands[0]["stdout"] and commands[1]["stdout"].strip() == "4"
        with contextlib.closing(http.client.HTTPConnection("localhost")) as link:
            link.sock = socket.socket(socket.AF_UNIX)
            link.sock.connect(str(tmp_path / "socket"))
            link.request("GET", "/ready")
            assert link.getresponse().status == 200
        host.process.send_signal(signal.SIGHUP)
        wait_until(lambda: '"reloaded"' in host.output.read_text())
        assert "restart_needed" not in host.output.read_text()
        assert host.stop() == 0
        assert (tmp_path / "socket").is_socket()


def test_a_socket_is_found_by_its_name_and_speaks_tls(tmp_path):
    files = make_certificates(tmp_path)
    config = f'[server]\nlisten = ["systemd:web", "127.0.0.1:0"]\n[server.tls]\ncert = "{files.server}"\nkey = "{files.server_key}"\n'
    with held(0) as links, contextlib.closing(Host(tmp_path / "host", service(), config)) as host:
        host.start(**launch(links, "web"))
        assert host.urls[0] == f"https://127.0.0.1:{links[0].getsockname()[1]}" and len(host.urls) == 2
        host.tls = hookshot.ssl.create_default_context(cafile=str(files.ca))
        assert host.wait(host.deploy())["status"] == "Succeeded"


def test_what_cannot_be_listened_on_is_refused_in_a_sentence(tmp_path):
    host = Host(tmp_path, service(), '[server]\nlisten = ["systemd:web"]\n')
    with contextlib.closing(host), held(0) as good, held(0, kind=socket.SOCK_DGRAM) as datagrams, open(tmp_path / "file", "w") as file, \
            socket.socket() as deaf:
        assert "is no stream socket" in refused(host, datagrams, "web")
        assert "does not listen; write Accept=no" in refused(host, [deaf], "web")
        assert "is no socket" in refused(host, [file], "web")
        said = refused(host, good, "other")
        assert "systemd passed no socket named web" in said and 'add "systemd:other"' in said
        assert "leave one or the other" in refused(host, good, "web", "--port", "0")


def test_without_the_socket_that_is_named_nothing_starts_and_the_client_asks_for_a_url(tmp_path):
    host = Host(tmp_path, service(), '[server]\nlisten = "systemd:web"\n')
    done = host.cli("run")
    assert done.returncode == 78 and "systemd passed no socket named web" in done.stderr
    done = host.cli("services", env={"HOOKSHOT_URL": "", "CONFIGURATION_DIRECTORY": "/etc/a-runner"})
    assert done.returncode == 2 and "--url" in done.stderr


def signed(document: object, *headers: str) -> bytes:
    """Return the bytes of a signed POST /deploy."""
    body = json.dumps(document).encode()
    lines = ["POST /deploy HTTP/1.1", "Host: localhost", "Content-Type: application/json", f"Content-Length: {len(body)}",
             f"X-Hub-Signature-256: {hookshot.sign(KEY.encode(), body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def answer_of(link: socket.socket) -> tuple[int, bytes]:
    """Return the status of the one answer that comes before the end, and all of it; 0 if none comes."""
    content = b"".join(iter(lambda: link.recv(1 << 16), b""))
    return int(content[9:12] or 0), content


def test_over_a_restart_nobody_is_refused_and_who_was_let_in_is_answered(tmp_path):
    """One has sent half of its request, one rests between two, one comes when nothing accepts any more, one follows a log."""
    host = Host(tmp_path, service(HOLD), '[limits]\nmax_queue_per_service = 50\n')
    with held(0) as links, contextlib.closing(host):
        host.start(**launch(links, "hookshot.socket"))
        first = host.deploy()
        host.wait(first, "Deploying")
        address = ("127.0.0.1", host.port)
        with contextlib.ExitStack() as stack:
            half, resting = (stack.enter_context(socket.create_connection(address, PATIENCE_S)) for _ in range(2))
            request = signed({"service": "web", "image": "app:2", "deploy_id": "half"})
            half.sendall(request[:100])
            resting.sendall(signed({"service": "web", "image": "app:3", "deploy_id": "rested"}))
            assert b" 202 " in resting.recv(1 << 16)
            follower = stack.enter_context(contextlib.closing(http.client.HTTPConnection(*address, timeout=PATIENCE_S)))
            follower.request("GET", f"/logs/{first}?follow=1")
            following = follower.getresponse()
            host.process.send_signal(signal.SIGTERM)
            # It is closed once nothing is accepted any more.
            assert resting.recv(1 << 16) == b""
            late = stack.enter_context(socket.create_connection(address, PATIENCE_S))
            late.sendall(signed({"service": "web", "image": "app:4", "deploy_id": "late"}, "Connection: close"))
            half.sendall(request[100:])
            status, content = answer_of(half)
            assert status == 202 and b"Connection: close" in content
            (tmp_path / "go").touch()
            assert host.process.wait(PATIENCE_S) == 0
            assert b"succeeded" in following.read()
            assert select.select([late], [], [], 0)[0] == []
            host.start(**launch(links, "hookshot.socket"))
            assert answer_of(late)[0] == 202
        for deploy_id in (first, "half", "rested", "late"):
            assert host.wait(deploy_id)["status"] == "Succeeded"


def test_who_rests_after_an_answer_that_began_before_the_end_comes_again_to_the_next_server(tmp_path):
    """Else its next request would meet a server that takes no deployments any more."""
    loud = service('["sh", "-c", "yes | head -c 8000000"]', name="loud")
    host = Host(tmp_path, service(HOLD) + loud)
    with held(0) as links, contextlib.closing(host), contextlib.ExitStack() as stack:
        host.start(**launch(links, "hookshot.socket"))
        host.wait(host.deploy(), "Deploying")
        told = host.deploy(service="loud")
        host.wait(told)
        resting, reading = (stack.enter_context(contextlib.closing(http.client.HTTPConnection("127.0.0.1", host.port, timeout=PATIENCE_S))) for _ in range(2))
        resting.request("GET", "/ready")
        assert resting.getresponse().read()
        reading.request("GET", f"/logs/{told}")
        answer, link = reading.getresponse(), reading.sock
        host.process.send_signal(signal.SIGTERM)
        assert resting.sock.recv(1) == b""
        assert len(answer.read()) > 8_000_000 and not answer.will_close
        assert link.recv(1) == b"" and host.process.poll() is None
        (tmp_path / "go").touch()
        assert host.process.wait(PATIENCE_S) == 0


def test_a_client_that_posts_all_the_time_notices_no_restart(tmp_path):
    host, answers, over = Host(tmp_path, service()), [], threading.Event()

    def post() -> None:
        while not over.is_set():
            try:
                answers.append(host.post({"service": "web", "image": "app:1"}, path="/deploy?wait=20").status)
            except (OSError, http.client.HTTPException) as error:
                answers.append(error)

    with held(0) as links, contextlib.closing(host):
        host.start(**launch(links, "hookshot.socket"))
        clients = [threading.Thread(target=post) for _ in range(2)]
        for client in clients:
            client.start()
        try:
            for _ in range(2):
                count = len(answers)
                wait_until(lambda: len(answers) > count + 5)
                assert host.stop() == 0
                host.start(**launch(links, "hookshot.socket"))
        finally:
            over.set()
            for client in clients:
                client.join()
        assert set(answers) <= {200, 202}, answers


# --- folders


@pytest.fixture
def elsewhere(monkeypatch) -> Callable[..., None]:
    """Set the variables that say where folders are; all others are unset."""
    for name in ("CONFIGURATION", "STATE", "LOGS", "RUNTIME"):
        monkeypatch.delenv(f"{name}_DIRECTORY", raising=False)
    for name in ("XDG_CONFIG_HOME", "XDG_STATE_HOME", "HOOKSHOT_CONFIG"):
        monkeypatch.delenv(name, raising=False)

    def set_variables(**values: str) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_variables


def places(path: str, text: str = "") -> tuple[str, str, str]:
    """Return data_dir, logging.directory and secrets_file of a config.toml at a path."""
    problems: list[hookshot.Problem] = []
    config = hookshot.load_config(text, path, problems, hookshot.default_places(path))
    assert problems == []
    return config.storage.data_dir, config.logging.directory, config.secrets.secrets_file


def test_the_units_folders_hold_for_what_the_file_leaves_out(elsewhere):
    assert places(*PATHS[:1]) == ("/var/lib/hookshot", "", "/etc/hookshot/secrets") and hookshot.find_config() == PATHS[0]
    elsewhere(STATE_DIRECTORY="/var/lib/a:/var/lib/b", LOGS_DIRECTORY="/var/log/a", CONFIGURATION_DIRECTORY="/etc/a:/etc/b")
    assert hookshot.find_config() == "/etc/a/config.toml"
    assert places("/etc/a/config.toml") == ("/var/lib/a", "/var/log/a", "/etc/a/secrets")
    text = '[storage]\ndata_dir = "/x"\n[logging]\ndirectory = ""\n[secrets]\nsecrets_file = "/y"\n'
    assert places("/etc/a/config.toml", text) == ("/x", "", "/y")


def test_a_users_own_file_has_its_data_in_the_users_folders(elsewhere, tmp_path, monkeypatch):
    elsewhere(HOME=str(tmp_path), XDG_STATE_HOME="not/absolute")
    own = tmp_path / ".config/hookshot/config.toml"
    assert places(str(own)) == (f"{tmp_path}/.local/state/hookshot", "", f"{own.parent}/secrets")
    assert places(PATHS[0])[0] == "/var/lib/hookshot"
    own.parent.mkdir(parents=True)
    own.touch()
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert hookshot.find_config() == str(own)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert hookshot.find_config() == PATHS[0]
    elsewhere(XDG_CONFIG_HOME=f"{tmp_path}/c", XDG_STATE_HOME=f"{tmp_path}/s")
    assert places(f"{tmp_path}/c/hookshot/config.toml") == (f"{tmp_path}/s/hookshot", "", f"{tmp_path}/c/hookshot/secrets")


def test_show_config_tells_what_is_in_force_and_no_secret(tmp_path):
    host = Host(tmp_path, service(), '[notifications.webhook]\non_failure = "https://chat.example/secret-path"\non_success = "secret:hook"\n')
    done = host.cli("show", "config", env={"LOGS_DIRECTORY": f"{tmp_path}/logs"})
    shown = json.loads(done.stdout)
    assert done.returncode == 0 and shown["logging"]["directory"] == f"{tmp_path}/logs" and shown["storage"]["data_dir"] == str(host.data)
    assert shown["notifications"]["webhook"]["on_failure"] == "***" and shown["notifications"]["webhook"]["on_success"] == "secret:hook"
    assert shown["server"]["listen"] == ["127.0.0.1:0"] and shown["server"]["socket_mode"] == "0660" and "secret-path" not in done.stdout


# --- units

# What is configured, the options of render_unit, and the exposure that must not be exceeded.
CASES = {
    "plain": (service('["./app"]'), "", {}, 1.4),
    "low port": (service('["./app"]'), '[server]\nlisten = ":80"\n', {}, 1.6),
    "docker": (service('["docker", "pull", "{{IMAGE}}"]'), "", {}, 1.4),
    "machine code": (service('["env", "npm", "ci"]'), "", {}, 1.4),
    "systemctl": (service('["systemctl", "restart", "web.service"]'), "", {}, 2.5),
    "users": (service('["./app"]', head='user = "www-data"\nnice = -5'), "", {}, 2.8),
    "podman": (service('["bash", "-c", "podman pull $HOOKSHOT_IMAGE && podman ps"]'), "", {}, 9.1),
    "sudo": (service('["sudo", "systemctl", "restart", "web.service"]'), "", {}, 9.2),
    "user's own": (service('["./app"]'), "", {"is_user": True}, 6.3),
    "user's podman": (service('["podman", "ps"]'), "", {"is_user": True}, 9.6)}


def settings_of(services: str, config: str) -> hookshot.Settings:
    problems: list[hookshot.Problem] = []
    loaded = hookshot.load_config(config, PATHS[0], problems)
    settings = hookshot.Settings(loaded, hookshot.load_services(services.replace("@", "/srv/web"), PATHS[1], loaded, problems))
    assert not hookshot.has_errors(problems), problems
    return settings


def render(case: str) -> str:
    services, config, options, _ = CASES[case]
    return hookshot.render_unit(settings_of(services, config), PATHS, SYSTEM_PROGRAM, **options)


def analyze(folder: pathlib.Path, text: str, *words: str) -> str:
    """Run systemd-analyze on a unit, which must find nothing to say against it."""
    unit = folder / "hookshot.service"
    unit.write_text(text)
    done = subprocess.run([need("systemd-analyze"), *words, str(unit)], capture_output=True, text=True, timeout=PATIENCE_S,
                          env={**os.environ, "XDG_RUNTIME_DIR": str(folder)})
    assert (done.returncode, done.stderr) == (0, ""), text
    return done.stdout


@pytest.mark.parametrize("case", CASES)
def test_a_printed_unit_is_right_and_as_closed_as_its_commands_allow(tmp_path, case):
    text = render(case)
    analyze(tmp_path, text, *["--user"] * text.endswith("default.target\n"), "verify")
    said = analyze(tmp_path, text, "security", "--offline=true")
    assert float(re.search(r"Overall exposure level .*: ([0-9.]+)", said)[1]) <= CASES[case][3]


def test_a_unit_leaves_room_for_what_commands_need():
    plain, users, systemctl, sudo, podman, own = map(render, ("plain", "users", "systemctl", "sudo", "podman", "user's own"))
    assert "User=hookshot" in plain and "StateDirectory=hookshot" in plain and "ReadWritePaths=-/srv/web" in plain
    assert "User=root" in users and "CAP_SETUID" in users and "CAP_SYS_NICE" in users and "ProtectProc" not in users and "~@resources" not in users
    assert "# systemctl, of service web, asks the service manager" in systemctl and "User=root" in systemctl
    assert "User=hookshot" in sudo and "NoNewPrivileges" not in sudo and "ReadWritePaths" not in sudo
    assert "User=root" in podman and "Delegate=yes" in podman and "Protect" not in podman and "Restrict" not in podman
    assert "MemoryDenyWriteExecute" in plain and "MemoryDenyWriteExecute" not in render("machine code")
    assert "SupplementaryGroups=docker" in render("docker") and "AmbientCapabilities=CAP_NET_BIND_SERVICE" in render("low port")
    assert "User=" not in own and "Protect" not in own and "WantedBy=default.target" in own


def test_a_unit_goes_by_where_things_are():
    config = '[server]\nlisten = "unix:/run/hookshot/socket"\nshutdown_timeout = 70\nmax_connections = 1000\n[storage]\ndata_dir = "/data/hookshot"\n' \
        '[logging]\ndirectory = "/var/log/hookshot"\n[secrets]\nsource = "systemd"\n'
    text = hookshot.render_unit(settings_of(service('["./app"]').replace("@", "/home/web"), config), PATHS, ("/opt/a b/python", "/opt/50%$x"))
    assert 'ExecStart="/opt/a b/python" /opt/50%%$$x -c /etc/hookshot/config.toml -s /etc/hookshot/services.toml run\n' in text
    assert "TimeoutStopSec=100\n" in text and "LimitNOFILE=2100:524288" in text and "StateDirectory" not in text
    assert "LogsDirectory=hookshot" in text and "RuntimeDirectory=hookshot\nRuntimeDirectoryPreserve=yes" in text
    assert "ReadWritePaths=-/data/hookshot -/home/web\n" in text and "ProtectHome=read-only" in text
    assert "LoadCredential=hmac_key:/etc/hookshot/credentials/hmac_key" in text


@pytest.mark.parametrize("listen, lines", [
    ('"127.0.0.1:80"', ["ListenStream=127.0.0.1:80"]), ('":80"', ["ListenStream=80"]), ('"localhost:80"', ["ListenStream=127.0.0.1:80"]),
    ('"[::1]:80"', ["ListenStream=[::1]:80", "BindIPv6Only=ipv6-only"]),
    ('"unix:/run/h/s"', ["ListenStream=/run/h/s", "SocketMode=0660", "SocketUser=hookshot", "RemoveOnStop=yes"])])
def test_a_socket_unit_listens_where_the_file_says(tmp_path, listen, lines):
    text = hookshot.render_socket(settings_of(service(), f"[server]\nlisten = {listen}\n"))
    assert text.partition("[Socket]\n")[2].partition("\nBacklog")[0].splitlines() == lines
    (tmp_path / "hookshot.service").write_text(render("plain"))
    (tmp_path / "hookshot.socket").write_text(text)
    done = subprocess.run([need("systemd-analyze"), "verify", str(tmp_path / "hookshot.socket")], capture_output=True, text=True, timeout=PATIENCE_S)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("listen", ['"127.0.0.1:0"', '"www.example:80"', '"systemd:web"'])
def test_an_address_of_which_no_socket_unit_can_be_made_is_told(listen):
    with pytest.raises(hookshot.HookshotError, match="a socket unit cannot be made"):
        hookshot.render_socket(settings_of(service(), f"[server]\nlisten = {listen}\n"))


def test_the_units_in_examples_are_those_of_a_fresh_host():
    assert {file: file.read_text() for file in EXAMPLES.glob("hookshot.*")} == render_docs.example_units(), "run python3 tests/render_docs.py"


def test_the_example_of_a_user_is_right():
    done = subprocess.run([need("systemd-sysusers"), "--dry-run", str(EXAMPLES / "sysusers.conf")], capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr


def test_show_prints_units_for_this_host(tmp_path):
    host = Host(tmp_path / "a host", service(), '[server]\nlisten = "127.0.0.1:8080"\n')
    unit, sockets = host.cli("show", "unit"), host.cli("show", "socket", "--user")
    assert (unit.returncode, sockets.returncode) == (0, 0)
    assert f'"{host.config}"' in unit.stdout and program()[1] in unit.stdout and "PrivateTmp" not in unit.stdout
    assert "ListenStream=127.0.0.1:8080" in sockets.stdout


def test_a_reloads_check_does_without_credentials_that_systemd_keeps_for_the_server(tmp_path):
    host = Host(tmp_path, service(), '[secrets]\nsource = "systemd"\n')
    environment = {"CREDENTIALS_DIRECTORY": str(tmp_path / "nowhere")}
    done = host.cli("validate", env=environment)
    assert done.returncode == 0 and "are not looked at" in done.stderr, done.stderr
    host.services.write_text("half of it [")
    assert host.cli("validate", env=environment).returncode == 78
    assert host.cli("run", env=environment).returncode == 78


# --- the real thing


def test_an_operators_way_with_systemd(tmp_path):
    """tests/machine_systemd.py says what is done: units installed, started, reloaded, watched, stopped, restarted under a socket."""
    seen = run_in_machine(ROOT / "tests/machine_systemd.py")
    assert seen == {
        "doctor": ["ok   user      hookshot, as the server", "ok   unit      hookshot.service is loaded, Type=notify, User=hookshot"],
        "verify": [0, ""], "before ready": ["activating", "start"], "ready": [200, "idle, 1 service", "hookshot"], "deployed": ["Succeeded", True],
        "status": "deploying web, step 2 of 2", "reloaded": ["Deploying", "0"], "not reloaded": [1, "active"], "stopped": ["inactive", "success", True], "left": [],
        "recovered": "RolledBack", "in peace": True, "watchdog": [True, 200, True], "under a socket": [202], "lost": [], "listens": True,
        "systemctl": ["root", "Succeeded", True], "credentials": {"ready": True, "message": "ready"}, "user": ["active", True],
        "doctor of a user": ["ok   unit      hookshot.service is loaded, Type=notify, User=dep"]}
