# SPDX-License-Identifier: MPL-2.0
"""The clients that docs/api.md shows in other languages deploy, are refused, try again and tell the outcome, against a real server."""

import contextlib
import http.client
import http.server
import os
import pathlib
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from pages import run_script, script_of, text_of
from support import KEY, PATIENCE_S, free_port, need, running, service

TOKEN = "t0k3n-of-a-reader-0123456789abcdefgh"
SERVICES = service('["touch", "ran.{{DEPLOY_ID}}"]', '["test", "{{IMAGE|tag}}", "!=", "bad"]', name="site") + service('["false"]', name="broken") \
    + service('["test", "{{IMAGE|tag}}", "!=", "bad"]', name="returning", tables='[service.rollback]\ncommands = [["true"]]\n')
# The first go build of a machine compiles the library as well.
BUILD_PATIENCE_S = 600
FILES = {"sh": "deploy.sh", "python": "deploy.py", "node": "deploy.mjs", "go": "deploy.go"}
BLOCKS = {"client-sh": "sh", "client-python": "python", "client-node": "js", "client-go": "go"}


def write_clients(folder: pathlib.Path) -> None:
    """Write the programs of the page under the names that it gives them."""
    for name, language in BLOCKS.items():
        (folder / FILES[name.removeprefix("client-")]).write_text(text_of(name, language))


@pytest.fixture(scope="module", params=list(FILES))
def client(request, tmp_path_factory) -> list[str]:
    """The words that start one client."""
    folder, name = tmp_path_factory.mktemp(request.param), request.param
    for program in {"sh": ["bash", "curl", "openssl"], "python": [], "node": ["node"], "go": ["go"]}[name]:
        need(program)
    write_clients(folder)
    if name == "go":
        done = subprocess.run(["go", "build", "-o", "deploy", "deploy.go"], cwd=folder, capture_output=True, text=True, timeout=BUILD_PATIENCE_S)
        assert done.returncode == 0, done.stderr
        return [str(folder / "deploy")]
    return [*{"sh": ["bash"], "python": [sys.executable], "node": ["node"]}[name], str(folder / FILES[name])]


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    with running(tmp_path_factory.mktemp("host"), SERVICES, secrets=f"read_token={TOKEN}\n") as host:
        yield host


def start(client: list[str], port: int, name: str = "site", image: str = "app:1", **env: str) -> "subprocess.Popen[str]":
    """Start a client as a CI job would."""
    environment = {**os.environ, "HOOKSHOT_URL": f"http://127.0.0.1:{port}", "HOOKSHOT_HMAC_KEY": KEY, "PATIENCE": "120", **env}
    return subprocess.Popen([*client, name, image], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def run(*args, **env: str) -> "subprocess.CompletedProcess[str]":
    with start(*args, **env) as process:
        out, err = process.communicate(timeout=4 * PATIENCE_S)
    return subprocess.CompletedProcess([], process.returncode, out, err)


def count(host) -> int:
    return len(host.get("/deployments?limit=200").json["deployments"])


@pytest.mark.parametrize("env", [{}, {"SIGNATURE": "simple"}], ids=["timestamp", "simple"])
def test_a_client_deploys_and_tells_how_it_ended(host, client, env):
    done = run(client, host.port, **env)
    assert done.returncode == 0, done
    assert "Succeeded" in done.stdout and done.stderr == ""


@pytest.mark.parametrize("name, image, state, status", [("broken", "app:1", "Failed", 10), ("returning", "app:bad", "RolledBack", 11)])
def test_a_deployment_that_does_not_succeed_is_the_exit_status(host, client, name, image, state, status):
    if name == "returning":
        host.wait(host.deploy(service=name))
    done = run(client, host.port, name, image)
    assert done.returncode == status and state in done.stdout and "exited with status 1" in done.stdout, done


@pytest.mark.parametrize("status, sentence, about", [
    (77, "the signature is missing or wrong", {"HOOKSHOT_HMAC_KEY": "not-the-key-" * 4}), (65, "there is no service nowhere", {"name": "nowhere"}),
    (65, "is not allowed for service site", {"image": "other:1"}), (75, "is locked by", {"name": "returning"})], ids=lambda value: str(value)[:20])
def test_a_client_that_is_refused_says_why_and_starts_nothing(host, client, status, sentence, about):
    about = dict(about)
    before = count(host)
    with contextlib.ExitStack() as stack:
        if status == 75:
            assert host.cli("lock", "returning").returncode == 0
            stack.callback(host.cli, "unlock", "returning")
        done = run(client, host.port, about.pop("name", "site"), about.pop("image", "app:1"), **about)
    assert done.returncode == status and sentence in done.stderr and "(request " in done.stderr, done
    assert count(host) == before


class Road(http.server.ThreadingHTTPServer):
    """What lies between client and server: each POST fares as `fates` says, the later ones arrive; where it is hasty, nothing is waited for."""

    daemon_threads = True

    def __init__(self, backend: int, *fates: str, is_hasty: bool = False):
        super().__init__(("127.0.0.1", 0), Traveller)
        self.backend, self.fates, self.is_hasty = backend, list(fates), is_hasty


class Traveller(http.server.BaseHTTPRequestHandler):
    server: Road

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self._forward(None)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        fate = self.server.fates.pop(0) if self.server.fates else "arrives"
        if fate.isdigit():
            self._answer(int(fate), b"<html>not now</html>", "1")
        elif fate == "answer lost":
            self._ask(body)[0].close()
            self.close_connection = True
        else:
            self._forward(body)

    def _ask(self, body: bytes | None) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        link = http.client.HTTPConnection("127.0.0.1", self.server.backend, timeout=PATIENCE_S)
        path = self.path.replace("wait=20", "wait=0") if self.server.is_hasty else self.path
        link.request(self.command, path, body, {name: value for name, value in self.headers.items() if name.lower() != "accept-encoding"})
        return link, link.getresponse()

    def _forward(self, body: bytes | None) -> None:
        link, response = self._ask(body)
        with contextlib.closing(link):
            self._answer(response.status, response.read(), response.getheader("Retry-After", ""))

    def _answer(self, status: int, body: bytes, retry_after: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if retry_after:
            self.send_header("Retry-After", retry_after)
        self.end_headers()
        self.wfile.write(body)


@contextlib.contextmanager
def road(backend: int, *fates: str, is_hasty: bool = False) -> Iterator[Road]:
    with Road(backend, *fates, is_hasty=is_hasty) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_a_client_tries_again_and_its_deployment_runs_once(host, client):
    """429, a proxy's 502, 503, and then an answer that is lost after the deployment was accepted."""
    before, ran = count(host), len(list(host.folder.glob("ran.*")))
    with road(host.port, "429", "502", "503", "answer lost") as way:
        done = run(client, way.server_address[1])
        assert way.fates == []
    assert done.returncode == 0 and "Succeeded" in done.stdout, done
    assert (count(host), len(list(host.folder.glob("ran.*")))) == (before + 1, ran + 1)


def test_a_client_waits_for_a_server_that_is_not_there_yet(tmp_path, client):
    port = free_port()
    with start(client, port) as process:
        assert process.stderr and process.stdout
        said = process.stderr.readline()
        assert "refused" in said.lower() or "connect" in said.lower(), said
        with running(tmp_path, SERVICES, f'[server]\nlisten = "127.0.0.1:{port}"\n') as host:
            output, _ = process.communicate(timeout=4 * PATIENCE_S)
            assert process.returncode == 0 and "Succeeded" in output
            assert count(host) == 1


@pytest.mark.parametrize("holds, status", [(True, 14), (False, 69)], ids=["accepted", "not reached"])
def test_a_client_whose_patience_is_over_says_how_far_it_came(tmp_path, client, holds, status):
    if not holds:
        assert run(client, free_port(), PATIENCE="1").returncode == status
        return
    with running(tmp_path, service('["sleep", "600"]', name="site")) as host:
        with road(host.port, is_hasty=True) as way:
            assert run(client, way.server_address[1], PATIENCE="3").returncode == status
        assert count(host) == 1
        assert host.record(host.get("/deployments").json["deployments"][0]["deploy_id"])["status"] == "Deploying"


@pytest.mark.parametrize("env, is_told", [({}, False), ({"HOOKSHOT_READ_TOKEN": TOKEN}, True)], ids=["without a token", "with a token"])
def test_a_client_shows_the_commands_where_it_may_read(tmp_path, client, env, is_told):
    is_told = is_told and not client[-1].endswith(".sh")  # which reads no record
    with running(tmp_path, SERVICES, '[security]\nread_access = "token"\n', secrets=f"read_token={TOKEN}\n") as host:
        done = run(client, host.port, **env)
    assert done.returncode == 0 and ("deploy touch: succeeded" in done.stdout) == is_told, done


def test_the_clients_run_as_the_page_says(tmp_path):
    for program in ("bash", "curl", "openssl", "node", "go"):
        need(program)
    with running(tmp_path / "host", service(name="site").replace("app:", "site:")) as host:
        write_clients(host.folder)
        script = script_of("clients")
        assert "127.0.0.1:8080" in script
        done = run_script(script.replace("127.0.0.1:8080", f"127.0.0.1:{host.port}"), host.folder)
        assert done.returncode == 0 and done.stdout.count("Succeeded") == 4, done.stdout
        assert count(host) == 4
    shutil.rmtree(tmp_path / "host")
