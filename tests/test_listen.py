# SPDX-License-Identifier: MPL-2.0
"""SERVER and DAEMON: the addresses that are listened on, unix sockets, clients that come by them, and the end of listening."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time

import pytest

import hookshot
import support
from support import KEY, PATIENCE_S, Host, free_port, need, program, running, service, wait_until

HOLD = '["sh", "-c", "until [ -e go ]; do kill -0 $PPID || exit; sleep 0.02; done"]'
BODY = json.dumps({"service": "web", "image": "app:1"}).encode()
SIGNED = {"Content-Type": "application/json", "X-Hub-Signature-256": hookshot.sign(KEY.encode(), BODY)}


def speaks_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as link:
            link.bind(("::1", 0))
    except OSError:
        return False
    return True


ipv6 = pytest.mark.skipif(not speaks_ipv6(), reason="this machine has no IPv6")


class Link(http.client.HTTPConnection):
    """HTTP to an address as the server's log names it: http://host:port or unix:/path."""

    def __init__(self, url: str, source: str = ""):
        super().__init__("localhost", timeout=PATIENCE_S)
        self._url, self._source = url, source

    def connect(self):
        if self._url.startswith("unix:"):
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.settimeout(PATIENCE_S)
            self.sock.connect(self._url.removeprefix("unix:"))
        else:
            name, _, port = self._url.removeprefix("http://").rpartition(":")
            self.sock = socket.create_connection((name.strip("[]"), int(port)), PATIENCE_S, (self._source, 0) if self._source else None)


def ask(url: str, method: str = "GET", path: str = "/services", body: bytes | None = None, source: str = "",
        **headers: str) -> support.Answer:
    with contextlib.closing(Link(url, source)) as link:
        link.request(method, path, body, headers)
        return support.Answer(link.getresponse())


def deploy(url: str, path: str = "/deploy?wait=20", **headers: str) -> support.Answer:
    return ask(url, "POST", path, BODY, **(SIGNED | headers))


def listen(*addresses: str, rest: str = "") -> str:
    return f"[server]\nlisten = {json.dumps(addresses)}\n{rest}"


def start_and_fail(host: Host, *flags: str) -> str:
    """Start a server that cannot; return the one line that it says."""
    done = subprocess.run([*program(), "-c", str(host.config), "run", *flags], stdin=subprocess.DEVNULL,
                          capture_output=True, timeout=PATIENCE_S)
    lines = done.stderr.decode().splitlines()
    assert done.returncode == 78 and len(lines) == 1 and lines[0].startswith("hookshot: cannot listen on "), (done.returncode, lines)
    return lines[0]


def client(host: Host, *args: str, env: dict[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
    """Run a client command that finds the server by the host's configuration alone."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HOOKSHOT_")} | (env or {})
    return subprocess.run([*program(), "-c", str(host.config), *args], capture_output=True, text=True, env=environment,
                          timeout=PATIENCE_S)


# --- several addresses

def test_every_address_of_a_list_answers(tmp_path):
    with running(tmp_path, service(), listen("127.0.0.1:0", "127.0.0.2:0", f"unix:{tmp_path}/socket")) as host:
        assert [url.rpartition(":")[0] for url in host.urls] == ["http://127.0.0.1", "http://127.0.0.2", "unix"]
        for url in host.urls:
            assert ask(url).status == 200 and deploy(url).json["status"] == "Succeeded"
        assert len(ask(host.urls[0], path="/deployments").json["deployments"]) == 3


@ipv6
def test_ipv6_beside_ipv4_and_each_for_itself(tmp_path):
    port = free_port()
    with running(tmp_path, service(), listen(f"[::]:{port}", f"0.0.0.0:{port}")) as host:
        assert host.urls == [f"http://[::1]:{port}", f"http://127.0.0.1:{port}"]
        for url in host.urls:
            assert ask(url).status == 200


@ipv6
def test_an_ipv6_address_takes_no_ipv4(tmp_path):
    with running(tmp_path, service(), listen("[::]:0")) as host:
        assert deploy(host.urls[0]).json["status"] == "Succeeded"
        assert ask(host.urls[0], path="/deployments").status == 200
        with pytest.raises(ConnectionRefusedError):
            ask(f"http://127.0.0.1:{host.port}")


@pytest.mark.parametrize("address", ["127.0.0.1", pytest.param("[::1]", marks=ipv6)])
def test_a_port_alone_is_every_address(tmp_path, address):
    with running(tmp_path, service(), listen(":0")) as host:
        assert host.urls == [f"http://127.0.0.1:{host.port}"]
        url = f"http://{address}:{host.port}"
        assert ask(url).status == 200
        deploy_id = deploy(url).json["deploy_id"]
        assert host.record(deploy_id)["triggered_by"]["address"] == address.strip("[]")


@pytest.mark.parametrize("allowed, source, status", [
    ("127.0.0.0/8", "", 202), ("127.0.0.2", "127.0.0.2", 202), ("127.0.0.2", "127.0.0.3", 403), ("::ffff:127.0.0.2", "127.0.0.2", 202),
    ("::/0", "127.0.0.2", 403), ("unix", "127.0.0.2", 403)])
def test_an_ipv4_client_of_a_port_on_all_addresses_counts_as_ipv4(tmp_path, allowed, source, status):
    with running(tmp_path, service(), listen(":0", rest=f'[security]\nallowed_ips = ["{allowed}"]\n')) as host:
        answer = ask(host.urls[0], "POST", "/deploy", BODY, source, **SIGNED)
        assert answer.status == status
        if status == 403:
            assert answer.json["code"] == "ACCESS_DENIED" and list((host.data / "logs").iterdir()) == []


@pytest.mark.parametrize("text, path, words", [
    ('["127.0.0.1:8080", "127.0.0.1:8080"]', "server.listen[1]", "twice"),
    ('["unix:/tmp/x", ":1", "unix:/tmp/x"]', "server.listen[2]", "twice"),
    ("[]", "server.listen", ""), ('["x"]', "server.listen[0]", "host:port"), (f'"unix:/tmp/{"x" * 108}"', "server.listen", "107 bytes"),
    ('"unix:relative"', "server.listen", "host:port"), ('"unix:/nonexistent/x"', "server.listen", "/nonexistent does not exist"),
    ('"[::1"', "server.listen", "host:port"), ('"::1:80"', "server.listen", "host:port"), ("8080", "server.listen", "host:port")])
@pytest.mark.parametrize("command", ["run", "validate"])
def test_a_wrong_address_is_told_with_its_place(tmp_path, command, text, path, words):
    host = Host(tmp_path, service(), f"[server]\nlisten = {text}\n")
    done = client(host, command)
    heading, line = done.stderr.splitlines()
    assert done.returncode == 78 and heading == f"{host.config}: 1 problem"
    assert line.startswith(f"  {path}: ") and words in line and not host.data.exists()


@pytest.mark.parametrize("address, rest, is_warned", [
    (":0", "", True), ("0.0.0.0:0", "", True), ("[::]:0", "", True), ("192.0.2.7:80", "", True), ("deploy.example:80", "", True),
    ("127.0.0.1:0", "", False), ("127.9.9.9:0", "", False), ("[::1]:0", "", False), ("localhost:0", "", False), ("unix:@/s", "", False),
    (":0", '[security]\ntrusted_proxies = ["192.0.2.1"]\n', False), (":0", "TLS", False)])
def test_plain_http_beyond_this_host_is_worth_a_warning(tmp_path, address, rest, is_warned):
    """Whoever reads along could repeat a deploy that is signed without a timestamp, and reads what is answered."""
    if rest == "TLS":
        files = support.make_certificates(tmp_path)
        rest = f'[server.tls]\ncert = "{files.server}"\nkey = "{files.server_key}"\n'
    host = Host(tmp_path, service(), listen(address.replace("@", str(tmp_path)), rest=rest))
    done = client(host, "validate")
    said = [line for line in done.stderr.splitlines() if "plain HTTP" in line]
    assert done.returncode == 0 and len(said) == is_warned, done.stderr
    assert all("warning: server.listen: " in line and "[server.tls]" in line and "security.trusted_proxies" in line for line in said)


@pytest.mark.parametrize("path, is_taken", [("/deploy", True), ("/ready", True), ("/status/x", True), ("/services", True), ("/healthz", False),
                                            ("/health", False), ("/status", False)])
def test_the_health_path_cannot_take_another_requests_path(tmp_path, path, is_taken):
    """The health report at /deploy would switch deploys off without a word."""
    done = client(Host(tmp_path, service(), f'[monitoring]\nhealth_path = "{path}"\n'), "validate")
    assert (done.returncode, "monitoring.health_path: " in done.stderr) == ((78, True) if is_taken else (0, False)), done.stderr


def test_two_free_ports_are_no_duplicates(tmp_path):
    with running(tmp_path, service(), listen("127.0.0.1:0", "127.0.0.1:0")) as host:
        assert len(set(host.urls)) == 2 and all(ask(url).status == 200 for url in host.urls)


@pytest.mark.parametrize("flags, found", [(("--port", "0"), "http://127.0.0.2:"), (("--bind", "127.0.0.3"), "http://127.0.0.3:"),
                                          (("--bind", "127.0.0.3", "--port", "0"), "http://127.0.0.3:")])
def test_flags_stand_in_for_the_whole_list(tmp_path, flags, found):
    host = Host(tmp_path, service(), listen(f"unix:{tmp_path}/socket", "127.0.0.2:0", "127.0.0.1:0"))
    with contextlib.closing(host):
        [url] = host.start(*flags).urls
        assert url.startswith(found) and ask(url).status == 200 and not (tmp_path / "socket").exists()


@ipv6
@pytest.mark.parametrize("text", ["", "127.0.0.1:8080", "[::1]:8080", ":8080", "unix:/tmp/x", "a b", "http://localhost", "::g"])
def test_bind_takes_nothing_but_a_host(tmp_path, text):
    """An unset variable must not open every address of the host."""
    done = client(Host(tmp_path, service()), "run", "--bind", text)
    assert done.returncode == 2 and "is not a host" in done.stderr and "--port" in done.stderr


@pytest.mark.parametrize("address", [":0", "0.0.0.0:0"])
def test_what_listens_everywhere_says_so(tmp_path, address):
    with running(tmp_path, service(), listen(address)) as host:
        [line] = [json.loads(line)["message"] for line in host.output.read_text().splitlines() if '"started"' in line]
        assert "(all addresses)" in line and ask(host.urls[0]).status == 200


def test_bind_takes_an_ipv6_address_with_and_without_brackets(tmp_path):
    for address in ("::1", "[::1]"):
        with contextlib.closing(Host(tmp_path, service())) as host:
            [url] = host.start("--bind", address).urls
            assert url.startswith("http://[::1]:") and ask(url).status == 200


# --- what is in the way

def test_a_taken_port_is_one_line_and_leaves_nothing_behind(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        host = Host(tmp_path, service(), listen(f"unix:{tmp_path}/socket", address))
        line = start_and_fail(host)
        assert address in line and os.strerror(98) in line and "choose another" in line
        assert not (tmp_path / "socket").exists()
    # Neither the folder nor a socket is held: the same configuration starts now.
    with contextlib.closing(host):
        assert ask(host.start().urls[0]).status == 200


@pytest.mark.parametrize("address, words", [("192.0.2.1:0", "assign"), ("no-such-host.invalid:0", "known|resolution|address")])
def test_an_address_that_is_not_of_this_host_is_one_line(tmp_path, address, words):
    line = start_and_fail(Host(tmp_path, service(), listen("127.0.0.1:0", address)))
    assert address in line and re.search(words, line)


def test_a_living_servers_socket_is_not_replaced(tmp_path):
    with running(tmp_path / "one", service(), listen(f"unix:{tmp_path}/socket")) as host:
        line = start_and_fail(Host(tmp_path / "two", service(), listen("127.0.0.1:0", f"unix:{tmp_path}/socket")))
        assert f"unix:{tmp_path}/socket" in line and os.strerror(98) in line
        assert ask(host.urls[0]).status == 200


def test_a_busy_servers_socket_is_not_waited_for(tmp_path):
    """Its backlog is full: to connect would block for as long as it does not accept."""
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as busy, contextlib.ExitStack() as stack:
        busy.bind(path)
        busy.listen(0)
        while True:
            link = stack.enter_context(socket.socket(socket.AF_UNIX))
            link.setblocking(False)
            if link.connect_ex(path):
                break
        assert "Address already in use" in start_and_fail(Host(tmp_path, service(), listen(f"unix:{path}")))
        assert os.path.exists(path)


@pytest.mark.parametrize("kind", ["file", "folder", "link", "dangling link"])
def test_what_is_no_socket_is_not_touched(tmp_path, kind):
    path, target = tmp_path / "socket", tmp_path / "target"
    if kind == "folder":
        path.mkdir()
    elif kind == "file":
        path.write_text("mine")
    else:
        path.symlink_to(target)
        if kind == "link":
            target.write_text("mine")
    line = start_and_fail(Host(tmp_path / "host", service(), listen(f"unix:{path}")))
    assert str(path) in line
    assert path.is_dir() if kind == "folder" else path.is_symlink() if "link" in kind else path.read_text() == "mine"
    assert target.exists() == (kind == "link")


def test_the_socket_of_a_killed_server_is_replaced(tmp_path):
    with running(tmp_path, service(), listen(f"unix:{tmp_path}/socket")) as host:
        host.kill()
        assert (tmp_path / "socket").is_socket()
        assert deploy(host.start().urls[0]).json["status"] == "Succeeded"


def test_a_stop_takes_the_socket_away(tmp_path):
    with running(tmp_path, service(), listen(f"unix:{tmp_path}/socket")) as host:
        assert host.stop() == 0 and not (tmp_path / "socket").exists()


def test_a_stop_leaves_the_socket_of_another_server(tmp_path):
    with running(tmp_path / "one", service(), listen(f"unix:{tmp_path}/socket")) as first:
        (tmp_path / "socket").unlink()
        with running(tmp_path / "two", service(), listen(f"unix:{tmp_path}/socket")) as second:
            assert first.stop() == 0
            assert ask(second.urls[0]).status == 200
            assert second.stop() == 0 and not (tmp_path / "socket").exists()


@pytest.mark.parametrize("key, mode", [("", 0o660), ('socket_mode = "0600"\n', 0o600), ('socket_mode = "666"\n', 0o666)])
def test_a_socket_has_the_mode_that_is_asked_for(tmp_path, key, mode):
    with running(tmp_path, service(), listen(f"unix:{tmp_path}/socket", rest=key)) as host:
        assert stat.S_IMODE((tmp_path / "socket").stat().st_mode) == mode and ask(host.urls[0]).status == 200


# --- who comes by a unix socket

def test_a_peer_at_a_unix_socket_may_read_and_is_recorded(tmp_path):
    with running(tmp_path, service(), listen(f"unix:{tmp_path}/socket")) as host:
        deploy_id = deploy(host.urls[0]).json["deploy_id"]
        record = ask(host.urls[0], path=f"/status/{deploy_id}").json
        assert record["triggered_by"]["address"] == "unix" and record["triggered_by"]["key_id"] == "hmac_key"
        assert ask(host.urls[0], Host="evil.example").status == 401
        assert ask(host.urls[0], **{"X-Forwarded-For": "127.0.0.1"}).status == 401


@pytest.mark.parametrize("allowed, status", [(["127.0.0.1", "::/0", "0.0.0.0/0"], 403), (["unix"], 200), (["127.0.0.1", "unix"], 200)])
def test_allowed_ips_speak_of_unix_sockets_too(tmp_path, allowed, status):
    text = listen("127.0.0.1:0", f"unix:{tmp_path}/socket", rest=f"[security]\nallowed_ips = {json.dumps(allowed)}\n")
    with running(tmp_path, service(), text) as host:
        assert ask(host.urls[1]).status == status and deploy(host.urls[1]).status == status
        assert ask(host.urls[0], path="/ready").status == (403 if allowed == ["unix"] else 200)
        assert bool(list((host.data / "logs").iterdir())) == (status == 200)


def test_a_trusted_proxy_at_a_unix_socket_says_who_asks(tmp_path):
    rest = '[security]\ntrusted_proxies = ["unix"]\nallowed_ips = ["198.51.100.0/24"]\n'
    text, secrets = listen(f"unix:{tmp_path}/socket", rest=rest), "read_token=a-token-of-a-reader-0123456789\n"
    with running(tmp_path, service(), text, secrets=secrets) as host:
        url, reader = host.urls[0], {"Authorization": "Bearer a-token-of-a-reader-0123456789"}
        deploy_id = deploy(url, **{"X-Forwarded-For": "203.0.113.9, 198.51.100.7"}).json["deploy_id"]
        from_there = {"X-Forwarded-For": "198.51.100.7"}
        record = ask(url, path=f"/status/{deploy_id}", **reader, **from_there)
        assert record.json["triggered_by"]["address"] == "198.51.100.7"
        assert ask(url, **from_there).status == 401
        assert deploy(url, **{"X-Forwarded-For": "203.0.113.9"}).status == 403 and deploy(url).status == 403
        assert len(ask(url, path="/deployments", **reader, **from_there).json["deployments"]) == 1


def test_one_address_cannot_take_the_places_of_a_unix_socket(tmp_path):
    """A share of the places is an address's own; those at a unix socket are many users and share all."""
    with running(tmp_path, service(), listen("127.0.0.1:0", f"unix:{tmp_path}/socket", rest="max_connections = 32\n")) as host, \
            contextlib.ExitStack() as stack:
        for _ in range(16):
            link = stack.enter_context(socket.create_connection(("127.0.0.1", host.port), PATIENCE_S))
            link.sendall(b"GET")
        for _ in range(12):
            link = stack.enter_context(socket.socket(socket.AF_UNIX))
            link.connect(f"{tmp_path}/socket")
            link.sendall(b"GET")
        assert deploy(host.urls[1]).json["status"] == "Succeeded"


# --- the client

def test_the_client_takes_a_unix_url(tmp_path):
    with running(tmp_path, service(), listen("127.0.0.1:0", f"unix:{tmp_path}/socket")) as host:
        url = host.urls[1]
        done = client(host, "deploy", "web", "app:1", "--url", url)
        assert done.returncode == 0 and "Succeeded" in done.stderr
        assert client(host, "services", env={"HOOKSHOT_URL": url}).returncode == 0
        assert client(host, "status", host.get("/deployments").json["deployments"][0]["deploy_id"], "--url", url).returncode == 0


def test_the_client_finds_a_unix_socket_in_the_configuration(tmp_path):
    with running(tmp_path, service('["echo", "hello"]'), listen(f"unix:{tmp_path}/socket")) as host:
        assert "web" in client(host, "services").stdout
        done = client(host, "deploy", "web", "app:1")
        assert done.returncode == 0 and "hello" in done.stdout
        host.stop()
        done = client(host, "services")
        assert done.returncode == 69 and f"unix:{tmp_path}/socket" in done.stderr and len(done.stderr.splitlines()) == 1


def test_the_client_prefers_a_tcp_address(tmp_path):
    port = free_port()
    with running(tmp_path, service(), listen(f"unix:{tmp_path}/socket", f"127.0.0.1:{port}")) as host:
        (tmp_path / "socket").unlink()
        assert host.port == port and client(host, "services").returncode == 0


@pytest.mark.parametrize("url", ["unix:/nonexistent/socket", "unix:/" + "x" * 200])
def test_a_unix_socket_that_is_not_there_is_told_with_69(tmp_path, url):
    done = client(Host(tmp_path, service()), "services", "--url", url)
    assert done.returncode == 69 and url in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("url", ["unix:relative", "unix:", "unix://host/x"])
def test_a_unix_url_that_is_none_is_told_with_2_or_69(tmp_path, url):
    done = client(Host(tmp_path, service()), "services", "--url", url)
    assert done.returncode in (2, 69) and len(done.stderr.splitlines()) == 1


# --- changes and the end

def events(host, name: str) -> list[dict]:
    return [line for line in map(json.loads, host.output.read_text().splitlines()) if line["event"] == name]


def test_a_changed_list_waits_for_a_restart_and_says_so(tmp_path):
    with running(tmp_path, service(), listen("127.0.0.1:0")) as host:
        host.write(service() + service(name="api"), listen("127.0.0.1:0", f"unix:{tmp_path}/socket"))
        host.process.send_signal(signal.SIGHUP)
        wait_until(lambda: events(host, "reloaded"))
        assert any("restart" in line["message"] for line in events(host, "restart_needed"))
        assert not (tmp_path / "socket").exists() and ask(host.urls[0], path="/services/api").status == 200
        host.stop()
        host.start()
        assert ask(host.urls[1]).status == 200


def test_idle_connections_do_not_hold_up_a_stop(tmp_path):
    with running(tmp_path, service(), listen("127.0.0.1:0", f"unix:{tmp_path}/socket", rest="request_timeout = 3600\n")) as host, \
            contextlib.ExitStack() as stack:
        links = [stack.enter_context(contextlib.closing(Link(url))) for url in host.urls for _ in range(10)]
        for number, link in enumerate(links):
            link.connect()
            if number % 2:
                link.request("GET", "/ready")
                link.getresponse().read()
            else:
                link.sock.sendall(b"GET /ready HTTP/1.1\r\n"[: number])
        began = time.monotonic()
        assert host.stop() == 0 and time.monotonic() - began < 15
        for link in links:
            with contextlib.suppress(ConnectionResetError):
                assert link.sock.recv(1) == b""


def test_a_stop_waits_for_what_runs_and_answers_who_waits(tmp_path):
    with running(tmp_path, service(HOLD), listen("127.0.0.1:0", f"unix:{tmp_path}/socket")) as host:
        answers: list[support.Answer] = []
        threads = [threading.Thread(target=lambda url=url: answers.append(deploy(url, "/deploy?wait=60", **{"Idempotency-Key": "one"})))
                   for url in host.urls]
        for thread in threads:
            thread.start()
        wait_until(lambda: [entry["status"] for entry in ask(host.urls[0], path="/deployments").json["deployments"]] == ["Deploying"])
        wait_until(lambda: len(events(host, "deploy_repeated")) == 1)
        host.process.send_signal(signal.SIGTERM)
        wait_until(lambda: ask(host.urls[1], path="/ready").status == 503)
        assert deploy(host.urls[0]).status == 503
        (tmp_path / "go").touch()
        for thread in threads:
            thread.join(PATIENCE_S)
        assert [(answer.status, answer.json["status"]) for answer in answers] == [(200, "Succeeded")] * 2
        assert host.process.wait(PATIENCE_S) == 0


def test_who_waits_beyond_shutdown_timeout_is_told_that_it_goes_on(tmp_path):
    with running(tmp_path, service(HOLD, head='recovery = "retry"'), "[server]\nshutdown_timeout = 0\n") as host:
        answers: list[support.Answer] = []
        thread = threading.Thread(target=lambda: answers.append(deploy(f"http://127.0.0.1:{host.port}", "/deploy?wait=60")))
        thread.start()
        wait_until(lambda: [entry["status"] for entry in host.get("/deployments").json["deployments"]] == ["Deploying"])
        assert host.stop() == 0
        thread.join(PATIENCE_S)
        [answer] = answers
        assert answer.status == 202 and answer.headers["connection"] == "close" and answer.json["status"] not in hookshot.TERMINAL
        (tmp_path / "go").touch()
        assert host.start().wait(answer.json["deploy_id"])["status"] == "Succeeded"


# --- signatures with a timestamp, by curl

def curl(*args: object, stdin: str = "") -> tuple[int, dict]:
    done = subprocess.run([need("curl"), "-sS", "--max-time", str(PATIENCE_S), "-w", "\n%{http_code}", *map(str, args)], input=stdin,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    body, _, status = done.stdout.rpartition("\n")
    return int(status), json.loads(body)


def test_sign_prints_headers_that_curl_sends_and_the_server_takes_once(tmp_path):
    with running(tmp_path, service(), listen(f"unix:{tmp_path}/socket", rest="[security]\nrequire_timestamp = true\n")) as host:
        body = tmp_path / "body.json"
        body.write_bytes(BODY)
        done = client(host, "sign", "--timestamp", str(body))
        names = [line.partition(": ")[0] for line in done.stdout.splitlines()]
        assert (done.returncode, done.stderr, names) == (0, "", ["webhook-id", "webhook-timestamp", "webhook-signature"])
        send = ("--unix-socket", f"{tmp_path}/socket", "-H", "@-", "-H", "Content-Type: application/json",
                "http://localhost/deploy?wait=20")
        status, answer = curl("--data-binary", f"@{body}", *send, stdin=done.stdout)
        assert (status, answer["status"]) == (200, "Succeeded")
        # The same message again runs nothing; the same signature over another body is none.
        curl("--data-binary", f"@{body}", *send, stdin=done.stdout)
        assert curl("--data-binary", "{}", *send, stdin=done.stdout)[0] == 401
        assert len(ask(host.urls[0], path="/deployments").json["deployments"]) == 1


def test_require_timestamp_refuses_a_signature_without_one_and_takes_the_clients(tmp_path):
    with running(tmp_path, service(), "[security]\nrequire_timestamp = true\n") as host:
        refused = host.post(BODY)
        assert refused.status == 401 and "require_timestamp" in refused.json["error"]
        assert host.get("/deployments").json["deployments"] == []
        assert host.cli("deploy", "web", "app:1").returncode == 0


def test_sign_without_a_timestamp_prints_one_header(tmp_path):
    with running(tmp_path, service()) as host:
        done = host.cli("sign", stdin=BODY)
        status, answer = curl("--data-binary", BODY.decode(), "-H", "@-", "-H", "Content-Type: application/json",
                              f"http://127.0.0.1:{host.port}/deploy?wait=20", stdin=done.stdout)
        assert (done.stdout, status) == (f"X-Hub-Signature-256: {SIGNED['X-Hub-Signature-256']}\n", 200)
