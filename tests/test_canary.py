# SPDX-License-Identifier: MPL-2.0
"""Secrets of every source and kind, deployments that print them, and then a look everywhere: nothing may be found."""

import base64
import contextlib
import gzip
import http.client
import json
import os
import pathlib
import re
import secrets
import signal
import ssl
import sys
import urllib.parse

import pytest

import hookshot
from receivers import Receiver
from support import Host, make_certificates, service, wait_until

# Prints what the file beside it holds as it is, and in each form that secrets are masked in.
PRINTER = """
import base64, json, sys, urllib.parse
for line in open("printed", "rb").read().split(b"\\0"):
    for form in (line, base64.b64encode(line), base64.urlsafe_b64encode(line), urllib.parse.quote(line, safe="").encode(), urllib.parse.quote_plus(line).encode(),
                 json.dumps(line.decode()).encode(), json.dumps(line.decode(), ensure_ascii=False).encode()):
        for stream in (sys.stdout.buffer, sys.stderr.buffer):
            stream.write(b"[" + form + b"]\\n")
            # In two pieces.
            stream.write(form[:9]), stream.flush(), stream.write(form[9:] + b"\\n"), stream.flush()
if len(sys.argv) > 1:
    open("hanging", "w").close()
    __import__("time").sleep(600)
"""
SERVICES = f"""
[[service]]
name = "fails"
working_dir = "@"
[service.security]
allowed_image_pattern = '.+'
[service.deploy]
commands = [["{{PYTHON}}", "printer.py"], ["sh", "-c", "env; cat /proc/self/environ /proc/$PPID/cmdline; exit 1"]]
[service.rollback]
commands = [["{{PYTHON}}", "printer.py"]]
[service.hooks]
on_failure = [["{{PYTHON}}", "printer.py"]]
""" + "".join(service('["{PYTHON}", "printer.py"%s]' % more, name=name, head=head) for name, more, head in (
    ("works", "", ""), ("hangs", ', "hang"', "")))


class Planted:
    """The secrets by name, and what a place must not hold: each of them whole, in any form."""

    def __init__(self, values: dict[str, str], key_file: pathlib.Path):
        self.values = values
        # Lines of the TLS key's base64: enough to know it by.
        self.pem = [line.encode() for line in key_file.read_text().splitlines() if len(line) == 64]
        forms = {}
        for name, value in values.items():
            raw = value.encode()
            for form in (raw, base64.b64encode(raw).rstrip(b"="), base64.urlsafe_b64encode(raw).rstrip(b"="), urllib.parse.quote(value, safe="").encode(), urllib.parse.quote_plus(value).encode(),
                         raw.hex().encode(), json.dumps(value)[1:-1].encode(), json.dumps(value, ensure_ascii=False)[1:-1].encode(), raw[: len(raw) * 2 // 3]):
                forms[form] = name
        self._forms = forms | {line: "the TLS key" for line in self.pem}

    def find(self, where: str, content: bytes) -> list[str]:
        """Return what of it stands in `content`, with what is around it."""
        return [f"{where}: {name}: ...{content[max(0, at - 120) : at + len(form) + 40]!r}" for form, name in self._forms.items() if (at := content.find(form)) >= 0]


def descendants(pid: int) -> list[int]:
    children = {}
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if name.isdecimal():
                children.setdefault(int(pathlib.Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[1]), []).append(int(name))
    found = [pid]
    for each in found:
        found += children.get(each, [])
    return found


def read_all(host: Host, path: str, headers: dict[str, str], method: str = "GET") -> bytes:
    """Return head and body of an answer; of one without an end what comes at once."""
    with contextlib.closing(http.client.HTTPSConnection("127.0.0.1", host.port, timeout=10, context=host.tls)) as link:
        link.request(method, path, headers=headers)
        response = link.getresponse()
        head = str(response.getheaders()).encode()
        return head + (response.read1(1 << 20) if response.getheader("Content-Type", "").startswith("text/event-stream") else response.read())


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("canary")
    certificates = make_certificates(folder)
    with Receiver() as good, Receiver(lambda request: (500, {}, b"no")) as bad:
        random = iter(lambda: secrets.token_hex(20), None)
        planted = Planted({
            "hmac_key": next(random), "std_key": "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode(), "service_key": next(random),
            "read_token": next(random), "cred_url": f"{good.url}/{next(random)}", "env_token": f'q"/ß+ {next(random)}', "old_token": next(random),
            "vault_password": next(random), "inline_token": next(random), "inline_url": f"{bad.url}/{next(random)}"}, certificates.server_key)
        yield folder, certificates, planted, good, bad


def make_host(folder: pathlib.Path, certificates, planted: Planted) -> tuple[Host, dict[str, str]]:
    """Return a host with a secret from each source, and the environment that its server is started with."""
    values = planted.values
    (folder / "host").mkdir()
    (folder / "credentials").mkdir()
    (folder / "credentials/cred_url").write_text(values["cred_url"])
    (folder / "vault").write_text(f"vault_password={values['vault_password']}\n")
    config = f"""
[server]
listen = ["127.0.0.1:0", "unix:{folder}/sock"]
[server.tls]
cert = "{certificates.server}"
key = "{certificates.server_key}"
[secrets]
source = ["systemd", "file", "env", "command"]
command = ["cat", "{folder}/vault"]
[security]
hmac_keys = ["hmac_key", "std_key"]
read_access = "token"
[logging]
level = "debug"
directory = "{folder}/log"
[limits]
command_timeout = 60
[notifications]
enabled = true
[notifications.webhook]
on_failure = "{values['inline_url']}"
[[notifications.channel]]
name = "chat"
type = "webhook"
url = "secret:cred_url"
token = "{values['inline_token']}"
signing_key = "secret:std_key"
[[notifications.channel]]
name = "mail"
type = "email"
server = "127.0.0.1:1"
security = "none"
username = "bot"
password = "secret:vault_password"
sender = "a@example.org"
recipients = ["b@example.org"]
[[notifications.channel]]
name = "run"
type = "exec"
command = ["sh", "-c", "env; tr '\\\\0' ' ' < /proc/$PPID/cmdline; cat; false"]
"""
    services = SERVICES.replace("{PYTHON}", sys.executable).replace("[service.security]", '[service.security]\nhmac_keys = ["service_key"]', 1)
    host = Host(folder / "host", services, config, key=values["hmac_key"],
                secrets="".join(f"{name}={values[name]}\n" for name in ("std_key", "service_key", "read_token")))
    (host.folder / "printer.py").write_text(PRINTER)
    (host.folder / "printed").write_bytes(b"\0".join(value.encode() for value in values.values()))
    host.tls = ssl.create_default_context(cafile=str(certificates.ca))
    env = {"HOOKSHOT_ENV_TOKEN": values["env_token"], "DEPLOY_RECEIVER_OLD_TOKEN": values["old_token"], "CREDENTIALS_DIRECTORY": str(folder / "credentials")}
    return host, env


def test_no_secret_is_found_anywhere(planted):
    folder, certificates, planted, good, bad = planted
    host, env = make_host(folder, certificates, planted)
    values, found = planted.values, []
    token = {"Authorization": f"Bearer {values['read_token']}"}
    host.get = lambda path, **headers: Host.get(host, path, **{**token, **headers})
    try:
        host.start(env=env)
        # --- what there is to tell: an end of each kind
        ids = [host.deploy("app:1", "works"), host.post({"service": "fails", "image": "app:1"}, key=values["service_key"].encode()).json["deploy_id"]]
        for deploy_id in ids:
            host.wait(deploy_id)
        ids.append(host.post({"service": "fails", "image": "app:2", "previous_image": "app:1"}, key=values["service_key"].encode()).json["deploy_id"])
        hanging = host.deploy("app:1", "hangs")
        wait_until(lambda: (host.folder / "hanging").exists())
        host.wait(ids[-1])
        # --- callers who put secrets where they do not belong
        host.post({"service": "works", "image": "app:1"}, key=b"not the key at all")
        odd = {"X-Request-ID": "odd-1", "User-Agent": values["hmac_key"], "X-Github-Encoded-Secret": values["service_key"], "Referer": values["std_key"]}
        ids.append(host.post({"service": "works", "image": "app:3", "metadata": {"leaked": values["vault_password"]}}, headers=odd).json["deploy_id"])
        assert host.cli("lock", "hangs", "--reason", f"the key is {values['hmac_key']}", env={"HOOKSHOT_URL": f"unix:{folder}/sock"}).returncode == 0
        for path in (f"/services?token={values['read_token']}", f"/{values['hmac_key']}", f"/status/{values['service_key']}"):
            host.get(path)
            found += planted.find(f"GET {path[:9]} without a token", read_all(host, "/services", {"Authorization": f"Bearer {values['hmac_key']}"}))
        host.wait(ids[-1])
        # --- reloads that are refused, with secrets in what is wrong
        for file, text in ((host.config, f'\n[[notifications.channel]]\nname = "x"\ntype = "webhook"\nurl = "htp:/{values["inline_token"]}"\n'),
                           (host.config, f'\n[x]\n"{values["inline_token"]}'), (host.secrets, f"{values['old_token']}\n")):
            before, lines = file.read_text(), host.output.read_text().count('"reload_failed"')
            file.write_text(before + text)
            host.process.send_signal(signal.SIGHUP)
            wait_until(lambda: host.output.read_text().count('"reload_failed"') > lines)
            done = host.cli("validate", env=env)
            found += planted.find("validate of a broken file", (done.stdout + done.stderr).encode())
            file.write_text(before)
        # --- while a command runs: the server and all that it has started
        for pid in descendants(host.process.pid):
            for name in ("environ", "cmdline"):
                with contextlib.suppress(PermissionError, FileNotFoundError):
                    found += planted.find(f"{name} of {pid}", pathlib.Path(f"/proc/{pid}/{name}").read_bytes())
        for path in host.data.glob("state.db*"):
            found += planted.find(f"{path.name} in use", path.read_bytes())
        # --- everything that is answered
        for route in hookshot.ROUTES:
            for value in (*ids, hanging) if "{id}" in route.pattern and route.method == "GET" else ("works",):
                path = re.sub(r"\{\w+\}", lambda name: "odd-1" if name[0] == "{request_id}" else value if name[0] == "{id}" else "fails", route.pattern)
                if route.method == "GET":
                    found += planted.find(path, read_all(host, path, {**token, "Last-Event-ID": "0"}))
        found += planted.find("HEAD", read_all(host, "/metrics", token, "HEAD")) + planted.find("OpenMetrics", read_all(host, "/metrics", {**token, "Accept": "application/openmetrics-text"}))
        calls = [["validate"], ["validate", "--json"], ["doctor"], ["doctor", "--json"], ["services"], ["history", "--json"], ["logs", ids[1]], ["status", ids[1], "--json"],
                 ["notify-test", "chat"], ["notify-test", "run"], ["notify-test", "mail"], ["show", "config"], ["show", "unit"], ["explain", "odd-1"], ["audit"], ["reload"], ["cancel", hanging]]
        for call in calls:
            if call[0] in hookshot.COMMANDS:
                done = host.cli(*call, env={**env, "HOOKSHOT_URL": f"https://127.0.0.1:{host.port}", "HOOKSHOT_CA": str(certificates.ca), "HOOKSHOT_READ_TOKEN": values["read_token"]})
                assert done.returncode != 2, done.stderr
                found += planted.find(" ".join(call), (done.stdout + done.stderr).encode())
        for request in (*good.wait_for(1), *bad.wait_for(1)):
            found += planted.find("a notice", request.body)
        assert host.stop() == 0
    finally:
        host.close()
    # --- what is left
    kept = [path for place in (host.data, folder / "log") for path in place.rglob("*") if path.is_file()]
    assert any(path.name == "state.db" for path in kept) and any("log" in path.name for path in kept) and any(path.parent.name == "logs" for path in kept)
    for path in (*kept, host.output):
        found += planted.find(str(path), path.read_bytes())
    # Those that config.toml has itself would be in the archive with it, which is refused (docs/backup.md).
    text = host.config.read_text()
    refused = host.cli("export", str(folder / "refused.tar.gz"), "--no-secrets", env=env)
    assert refused.returncode != 0 and not (folder / "refused.tar.gz").exists()
    found += planted.find("export", refused.stderr.encode())
    host.config.write_text(text.replace(values["inline_token"], "secret:vault_password").replace(f'on_failure = "{values["inline_url"]}"', ""))
    assert host.cli("export", str(folder / "state.tar.gz"), "--no-secrets", env=env).returncode == 0
    found += planted.find("the archive", gzip.decompress((folder / "state.tar.gz").read_bytes()))
    assert found == [], "\n".join(found)
    # That the deployments did print them, and were not kept from it.
    assert b"***" in b"".join(path.read_bytes() for path in kept if path.parent.name == "logs")
