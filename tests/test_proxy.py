# SPDX-License-Identifier: MPL-2.0
"""Hookshot behind real proxies, configured as docs/configuration.md says."""

import contextlib
import http.client
import os

import pytest

import hookshot
from pages import text_of
from support import KEY, PATIENCE_S, Answer, free_port, running, running_proxy, service

TOKEN = "t0k3n-of-a-reader-0123456789abcdefgh"
HOLD = '["sh", "-c", "echo begin; until [ -e go ]; do kill -0 $PPID || exit; sleep 0.02; done; echo end"]'
NGINX = "@USER@pid nginx.pid;\ndaemon off;\nerror_log stderr;\nevents {}\nhttp {\naccess_log off;\n" + "".join(
    f"{name}_temp_path {name};\n" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")) + "server {\nlisten 127.0.0.1:@PORT@;\n@BLOCK@}\n}\n"
CADDY = "{\nadmin off\n}\nhttp://:@PORT@ {\nbind 127.0.0.1\n@BLOCK@}\n"


@contextlib.contextmanager
def proxy(name: str, folder, backend: int):
    """Give the port of a running nginx or Caddy in front of a port."""
    port, block = free_port(), text_of(name, name)
    assert "127.0.0.1:8080" in block
    user = "user root;\n" if os.geteuid() == 0 else ""
    text = {"nginx": NGINX, "caddy": CADDY}[name].replace("@USER@", user).replace("@PORT@", str(port)) \
        .replace("@BLOCK@", block.replace("127.0.0.1:8080", f"127.0.0.1:{backend}"))
    with running_proxy(name, folder, text, lambda: is_up(port)):
        yield port


def is_up(port: int) -> bool:
    with contextlib.suppress(OSError):
        return ask(port, "GET", "/ready").status == 200
    return False


@contextlib.contextmanager
def link_to(port: int, source: str = "127.0.0.1"):
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, PATIENCE_S, (source, 0))) as link:
        yield link


def ask(port: int, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None, source: str = "127.0.0.1") -> Answer:
    with link_to(port, source) as link:
        link.request(method, path, body, headers or {})
        return Answer(link.getresponse())


@pytest.fixture(params=["nginx", "caddy"], scope="module")
def proxied(request, tmp_path_factory):
    """A host whose proxy is trusted, and the proxy's port."""
    folder = tmp_path_factory.mktemp(request.param)
    config = '[security]\ntrusted_proxies = ["127.0.0.1"]\nread_access = "local"\n'
    with running(folder / "host", service(HOLD), config, secrets=f"read_token={TOKEN}\n") as host, proxy(request.param, folder, host.port) as port:
        yield host, port


@pytest.mark.parametrize("forged", [{}, {"X-Forwarded-For": "10.0.0.1"}, {"Forwarded": "for=10.0.0.2"}, {"X-Real-IP": "10.0.0.3"},
                                    {"Forwarded": 'for=10.0.0.4;host="x', "X-Forwarded-For": "127.0.0.1"}], ids=str)
def test_the_record_names_the_client_whatever_it_says_of_itself(proxied, forged):
    host, port = proxied
    (host.folder / "go").touch()
    body = b'{"service": "web", "image": "app:1", "dry_run": false}'
    headers = {"X-Hub-Signature-256": hookshot.sign(KEY.encode(), body), "Content-Type": "application/json", **forged}
    answer = ask(port, "POST", "/deploy", body, headers, source="127.0.0.7")
    assert answer.status == 202
    assert host.wait(answer.json["deploy_id"])["triggered_by"]["address"] == "127.0.0.7"


def test_who_comes_through_a_proxy_is_not_this_host(proxied):
    host, port = proxied
    assert host.get("/services").status == 200
    for headers in ({}, {"Host": "localhost"}, {"Host": "127.0.0.1", "X-Forwarded-For": "127.0.0.1"}):
        assert ask(port, "GET", "/services", headers=headers).status == 401
    assert ask(port, "GET", "/services", headers={"Authorization": f"Bearer {TOKEN}"}).status == 200


@pytest.mark.parametrize("accept", ["text/plain", "text/event-stream"])
def test_a_log_that_is_followed_comes_through_line_by_line(proxied, accept):
    host, port = proxied
    (host.folder / "go").unlink(missing_ok=True)
    deploy_id = host.deploy()
    with link_to(port) as link:
        link.request("GET", f"/logs/{deploy_id}?follow=1", headers={"Authorization": f"Bearer {TOKEN}", "Accept": accept})
        response = link.getresponse()
        assert response.status == 200
        # It has not ended, and will not before this line has come through.
        assert any(b"begin" in line for line in iter(response.readline, b""))
        (host.folder / "go").touch()
        rest = response.read()
    assert b"end" in rest and host.wait(deploy_id)["status"] == "Succeeded"


def test_a_move_comes_through_at_once(proxied):
    host, port = proxied
    (host.folder / "go").unlink(missing_ok=True)
    with link_to(port) as link:
        link.request("GET", "/events", headers={"Authorization": f"Bearer {TOKEN}", "Accept": "text/event-stream"})
        response = link.getresponse()
        assert response.status == 200 and response.readline() == b"retry: 2000\n"
        deploy_id = host.deploy()
        # It has not ended, and will not before this move has come through.
        assert any(b'"status":"Deploying"' in line and deploy_id.encode() in line for line in iter(response.readline, b""))
        (host.folder / "go").touch()
        assert any(b'"status":"Succeeded"' in line for line in iter(response.readline, b""))


def test_one_client_that_is_refused_for_its_rate_leaves_the_others_alone(tmp_path):
    config = '[security]\ntrusted_proxies = ["127.0.0.1"]\nrate_limit = 3\n'
    with running(tmp_path / "host", service(), config) as host, proxy("nginx", tmp_path, host.port) as port:
        assert [ask(port, "GET", "/nothing", source="127.0.0.8").status for _ in range(5)] == [404] * 3 + [429] * 2
        assert ask(port, "GET", "/nothing", source="127.0.0.9").status == 404
