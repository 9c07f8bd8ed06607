# SPDX-License-Identifier: MPL-2.0
"""What examples/ holds for the host itself: each file is taken by the program that reads it, and does what docs/examples.md says."""

import base64
import calendar
import contextlib
import http.client
import json
import os
import pathlib
import re
import shutil
import socket
import socketserver
import ssl
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator

import pytest

import hookshot
import render_docs
from pages import script_of, text_of
from support import KEY, PATIENCE_S, ROOT, Answer, Certificates, Host, free_port, make_certificates, need, program, run_in_machine, running, running_proxy, service, wait_until
from test_store import small_disk

EXAMPLES = ROOT / "examples"
PAGE = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
LICENCE = "SPDX-License-Identifier: MPL-2.0"
TOKEN = "t0k3n-of-a-reader-0123456789abcdefgh"
HOLD = '["sh", "-c", "echo begin; until [ -e go ]; do kill -0 $PPID || exit; sleep 0.02; done; echo end"]'
CHANNEL = "# [[notifications.channel]]\n"

is_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can do this")


def read(name: str) -> str:
    return (EXAMPLES / name).read_text(encoding="utf-8")


def replaced(text: str, *pairs: tuple[str, object]) -> str:
    """Put other words in place of some, each of which must be there."""
    for old, new in pairs:
        assert old in text, old
        text = text.replace(old, str(new))
    return text


def run(*words: object, **options: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([*map(str, words)], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=4 * PATIENCE_S, **options)


# --- all of them


def test_the_page_has_a_row_for_every_file():
    rows = re.findall(r"^\| (.*?) \|", PAGE, re.MULTILINE)
    named = {path for row in rows for path in re.findall(r"`(examples/[\w./-]+)`", row)}
    files = {str(file.relative_to(ROOT)) for file in EXAMPLES.rglob("*") if file.is_file()}
    covered = {file for file in files for path in named if file == path or (path.endswith("/") and file.startswith(path))}
    assert files - covered == set()
    assert {path for path in named if not (ROOT / path).exists()} == set()


@pytest.mark.parametrize("file", sorted(file for file in EXAMPLES.rglob("*") if file.is_file() and file.suffix not in (".json", ".md")),
                         ids=lambda file: str(file.relative_to(EXAMPLES)))
def test_every_file_names_its_licence_first(file):
    first, second = (*file.read_text(encoding="utf-8").split("\n", 2), "")[:2]
    assert LICENCE in (second if first.startswith("#!") else first)


def test_the_examples_that_follow_from_the_program_are_as_it_says():
    assert {file: file.read_text(encoding="utf-8") for file in render_docs.example_files()} == render_docs.example_files(), "run python3 tests/render_docs.py"


# --- both files and the secrets


def uncommented(text: str) -> str:
    """Return a file in which every sign before a key or a table is removed."""
    return re.sub(r"^# (?=\[[\w.\[\]]+\]$|\w+ = )", "", text, flags=re.MULTILINE)


def load_config(text: str) -> hookshot.Config:
    problems: list[hookshot.Problem] = []
    config = hookshot.load_config(text, "config.toml", problems)
    assert problems == []
    return config


def load_services(text: str) -> hookshot.Services:
    problems: list[hookshot.Problem] = []
    services = hookshot.load_services(text, "services.toml", load_config(""), problems)
    assert problems == []
    return services


def test_config_shows_every_key_at_its_default():
    text = read("config.toml")
    plain, channel = text.split(CHANNEL)
    assert load_config(text) == load_config(uncommented(plain)) == load_config("")
    shown = uncommented(plain)
    assert len(re.findall(r"^\w+ = ", shown, re.MULTILINE)) == sum(
        not hookshot.is_table(field) for table in render_docs.walk_tables(hookshot.Config) for field in table._field_defaults.values())
    assert tomllib.loads(uncommented(channel)).keys() == hookshot.Channel._field_defaults.keys()


@pytest.mark.parametrize("kind", hookshot.CHANNEL_TYPES)
def test_the_keys_of_a_channel_are_taken_by_the_types_that_have_them(kind):
    keys = tomllib.loads(uncommented(read("config.toml").split(CHANNEL)[1])) | {"type": kind}
    row = hookshot.CHANNEL_TYPES[kind]
    of_kind = {*hookshot._COMMON_CHANNEL_KEYS, *row.required, *row.optional}
    lines = [f"{name} = {json.dumps(value)}" for name, value in keys.items() if name in of_kind]
    [channel] = load_config("[[notifications.channel]]\n" + "\n".join(lines)).notifications.channel
    assert channel.type == kind


def test_services_show_every_key_and_what_is_shown_as_a_default_is_one():
    text = read("services.toml")
    load_services(uncommented(text))
    without_hints = re.sub(r"(; unset by default\)\n)# \w+ = .*\n", r"\1", text)
    assert load_services(uncommented(without_hints)) == load_services(text)
    tables = [hookshot.Defaults, *render_docs.walk_tables(hookshot.Service)]
    assert len(re.findall(r"^\w+ = ", uncommented(text), re.MULTILINE)) == sum(
        not hookshot.is_table(field) for table in tables for field in table._field_defaults.values())


@pytest.fixture
def prepared(tmp_path) -> pathlib.Path:
    """A folder that stands for the root of a host, with the files of the examples in their places."""
    etc = tmp_path / "etc/hookshot"
    for folder in (etc, tmp_path / "var/lib", tmp_path / "srv/site"):
        folder.mkdir(parents=True)
    (etc / "config.toml").write_text(replaced(read("config.toml"), ("/etc/", f"{tmp_path}/etc/"), ("/var/lib/", f"{tmp_path}/var/lib/")))
    (etc / "services.toml").write_text(replaced(read("services.toml"), ("/srv/site", f"{tmp_path}/srv/site")))
    (etc / "secrets").write_text(read("secrets"))
    (etc / "secrets").chmod(0o600)
    return tmp_path


def validate(root: pathlib.Path) -> "subprocess.CompletedProcess[str]":
    env = {name: value for name, value in os.environ.items() if not name.startswith("HOOKSHOT_")}
    return run(*program(), "-c", root / "etc/hookshot/config.toml", "validate", env=env)


def test_validate_takes_the_files_but_none_of_the_placeholders(prepared):
    done = validate(prepared)
    assert done.returncode == 78
    assert set(re.findall(r"secret (\w+) is a placeholder", done.stdout + done.stderr)) == {"hmac_key", "read_token"}
    secrets = prepared / "etc/hookshot/secrets"
    [command] = [line for line in script_of("examples-files").splitlines() if line.startswith("sed ")]
    (prepared / "hookshot").write_text(f"#!/bin/sh\nexec '{program()[0]}' '{program()[1]}' \"$@\"\n")
    (prepared / "hookshot").chmod(0o755)
    done = run("sh", "-ec", replaced(command, ("/etc/hookshot/secrets", secrets)), env={**os.environ, "PATH": f"{prepared}:{os.environ['PATH']}"})
    assert (done.returncode, done.stderr) == (0, "")
    done = validate(prepared)
    assert (done.returncode, done.stderr) == (0, "") and "services: site" in done.stdout
    values = re.findall(r"^\w+=(.*)$", secrets.read_text(), re.MULTILINE)
    assert len(values) == len(set(values)) == 2


def test_the_service_deploys_and_is_rolled_back(tmp_path):
    site = tmp_path / "site"
    for release in ("1.0", "2.0"):
        (site / "releases" / release).mkdir(parents=True)
    (site / "releases/1.0/index.html").write_text("hello\n")
    with running(tmp_path / "host", replaced(read("services.toml"), ("/srv/site", site))) as host:
        assert host.wait(host.deploy("site:1.0", "site"))["status"] == "Succeeded"
        assert host.wait(host.deploy("site:2.0", "site"))["status"] == "RolledBack"
        assert os.readlink(site / "current") == "releases/1.0"


# --- systemd


def analyze(folder: pathlib.Path, *words: str) -> str:
    done = run(need("systemd-analyze"), *words, env={**os.environ, "XDG_RUNTIME_DIR": str(folder)})
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_the_units_of_the_backup_are_right_and_closed(tmp_path):
    # A unit takes a path with a space in it for two words, and this checkout may lie at one.
    script = shutil.copy(EXAMPLES / "backup/hookshot-backup", tmp_path)
    for name in ("hookshot-backup.service", "hookshot-backup.timer"):
        (tmp_path / name).write_text(read(f"systemd/{name}").replace("/usr/local/sbin/hookshot-backup", str(script)))
    analyze(tmp_path, "verify", str(tmp_path / "hookshot-backup.timer"), str(tmp_path / "hookshot-backup.service"))
    said = analyze(tmp_path, "security", "--offline=true", str(tmp_path / "hookshot-backup.service"))
    assert float(re.search(r"Overall exposure level .*: ([0-9.]+)", said)[1]) <= 0.7
    when = re.search(r"^OnCalendar=(.*)$", read("systemd/hookshot-backup.timer"), re.MULTILINE)[1]
    assert "Next elapse" in analyze(tmp_path, "calendar", when)


def test_the_unit_of_a_user_is_right(tmp_path):
    (tmp_path / "hookshot.service").write_text(read("systemd-user/hookshot.service"))
    analyze(tmp_path, "--user", "verify", str(tmp_path / "hookshot.service"))


@is_root
def test_the_user_and_the_folders_are_made(tmp_path):
    for tool in ("systemd-sysusers", "systemd-tmpfiles"):
        need(tool)
    (tmp_path / "etc/hookshot").mkdir(parents=True)
    (tmp_path / "etc/hookshot/secrets").touch()
    done = run("systemd-sysusers", f"--root={tmp_path}", EXAMPLES / "systemd/sysusers.conf")
    assert done.returncode == 0, done.stderr
    [account] = [line.split(":") for line in (tmp_path / "etc/passwd").read_text().splitlines() if line.startswith("hookshot:")]
    assert account[5:] == ["/var/lib/hookshot", "/usr/sbin/nologin"]
    done = run("systemd-tmpfiles", f"--root={tmp_path}", "--create", EXAMPLES / "systemd/tmpfiles.conf")
    assert (done.returncode, done.stderr) == (0, "")
    for path, mode in (("etc/hookshot/secrets", 0o600), ("var/backups/hookshot", 0o700)):
        status = (tmp_path / path).stat()
        assert (status.st_uid, status.st_mode & 0o777) == (int(account[2]), mode)


# --- backup


class Backups:
    """A host with a server and the script of the examples, which finds this hookshot."""

    def __init__(self, host: Host):
        self.folder, self.script, caller = host.folder / "backups", host.folder / "hookshot-backup", host.folder / "hookshot"
        self.folder.mkdir()
        caller.write_text(f"#!/bin/sh\nexec '{program()[0]}' '{program()[1]}' \"$@\"\n")
        self.script.write_text(replaced(read("backup/hookshot-backup"), ("/usr/local/bin/hookshot", caller)))
        for file in (caller, self.script):
            file.chmod(0o755)
        self.env = {**os.environ, "HOOKSHOT_CONFIG": str(host.config), "BACKUP_FOLDER": str(self.folder), "TZ": "Pacific/Kiritimati"}

    def run(self, *before: str) -> "subprocess.CompletedProcess[str]":
        return run(*before, self.script, env=self.env)

    def names(self) -> list[str]:
        return sorted(os.listdir(self.folder))


@pytest.fixture
def backups(tmp_path) -> Iterator[tuple[Host, Backups]]:
    with running(tmp_path / "host", service()) as host:
        host.wait(host.deploy())
        yield host, Backups(host)


def test_the_newest_seven_backups_are_kept_and_named_by_utc(backups):
    host, made = backups
    old = [f"hookshot-202001{day:02}T030000Z.tar.gz" for day in range(1, 10)]
    others = ["hookshot-2019.tar.gz", "hookshot-before-the-move.tar.gz", "notes"]
    for name in old + others:
        (made.folder / name).touch()
    done = made.run()
    assert done.returncode == 0, done.stderr
    [new] = {*made.names()} - {*old, *others}
    assert {*made.names()} == {*old[-6:], *others, new}
    named = time.strptime(new, "hookshot-%Y%m%dT%H%M%SZ.tar.gz")
    assert abs(time.time() - calendar.timegm(named)) < 3600
    assert (made.folder / new).stat().st_mode & 0o777 == 0o600
    done = host.cli("import", "--dry-run", str(made.folder / new))
    assert done.returncode == 0 and "1 deployment, 1 log" in done.stdout, done.stderr


@pytest.mark.parametrize("why, status", [("full", 73), ("no folder", 73), ("configuration", 78)])
def test_a_backup_that_fails_leaves_nothing_half_and_removes_nothing(backups, tmp_path, why, status):
    host, made = backups
    with small_disk(tmp_path / "disk", "4k") if why == "full" else contextlib.nullcontext(made.folder) as made.folder:
        old = [f"hookshot-202001{day:02}T030000Z.tar.gz" for day in range(1, 10)]
        for name in old:
            (made.folder / name).touch()
        if why == "configuration":
            host.config.write_text("half of it [")
        made.env["BACKUP_FOLDER"] = str(made.folder / "none") if why == "no folder" else str(made.folder)
        done = made.run()
        assert done.returncode == status and done.stderr, done.stderr
        assert made.names() == old
    assert not [name for name in os.listdir(host.data) if name.startswith(".export-")]


def test_cron_runs_the_script_and_mails_only_what_goes_wrong(tmp_path):
    [line] = [line for line in read("cron/hookshot-backup").splitlines() if not line.startswith("#") and " " in line]
    minute, hour, *rest, user, command = line.split(maxsplit=6)[:7]
    assert minute.isdecimal() and hour.isdecimal() and rest == ["*"] * 3 and user == "hookshot"
    # To cron "%" is the end of the line.
    assert "%" not in command
    script = tmp_path / "script"
    for text, mailed in (("echo exported 3 deployments >&2", ""), ("echo hookshot: no room >&2; exit 73", "hookshot: no room\n")):
        script.write_text(f"#!/bin/sh\n{text}\n")
        script.chmod(0o755)
        assert run("sh", "-c", replaced(command, ("/usr/local/sbin/hookshot-backup", script))).stdout == mailed


@pytest.mark.parametrize("name", ["backup/hookshot-backup"])
def test_shellcheck_has_nothing_to_say_of_a_script(name):
    assert os.access(EXAMPLES / name, os.X_OK)
    done = run(need("shellcheck"), EXAMPLES / name)
    assert done.returncode == 0, done.stdout


# --- logging


def test_a_log_for_the_journal_is_in_no_file(tmp_path):
    with running(tmp_path / "host", service(), read("logging/journal.toml")) as host:
        assert all(json.loads(line)["level"] for line in host.output.read_text().splitlines())
        assert load_config(read("logging/journal.toml")) == load_config("")


class Collector(socketserver.ThreadingTCPServer):
    """Keeps the lines that are sent to it, once it listens."""

    daemon_threads = True

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        super().__init__(("127.0.0.1", 0), socketserver.StreamRequestHandler, bind_and_activate=False)
        self.server_bind()

    def finish_request(self, request: socket.socket, client_address: object) -> None:
        with request.makefile("rb") as stream:
            self.lines.extend(stream)

    def listen(self) -> None:
        self.server_activate()
        threading.Thread(target=self.serve_forever, daemon=True).start()


@contextlib.contextmanager
def sender(folder: pathlib.Path, rules: pathlib.Path) -> Iterator["subprocess.Popen[bytes]"]:
    """Give a running rsyslogd, and end it as the system would."""
    with open(folder / "rsyslog.log", "ab") as log:
        process = subprocess.Popen([need("rsyslogd"), "-n", "-f", rules, "-i", folder / "pid"], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


def test_rsyslog_sends_every_line_over_rotations_and_absences_of_the_collector(tmp_path):
    need("rsyslogd")
    logs, work, rules = tmp_path / "logs", tmp_path / "work", tmp_path / "rsyslog.conf"
    work.mkdir()
    config = replaced(read("logging/files.toml"), ("/var/log/hookshot", logs), ("50MB", "64KB"), ('level = "info"', 'level = "debug"'), ("max_files = 5", "max_files = 1000"))
    with running(tmp_path / "host", service(), config) as host, Collector() as collector:
        rules.write_text(f'global(workDirectory="{work}")\n' + replaced(
            read("logging/rsyslog.conf"), ("/var/log/hookshot/", f"{logs}/"), ("collector.example.net", "127.0.0.1"), ('"5170"', f'"{collector.server_address[1]}"')))
        done = run("rsyslogd", "-N1", "-f", rules)
        assert done.returncode == 0 and "error" not in done.stderr.lower(), done.stderr
        with sender(tmp_path, rules):
            wait_until(lambda: "cannot connect" in (tmp_path / "rsyslog.log").read_text())
        assert list(work.glob("hookshot.*"))
        collector.listen()
        with sender(tmp_path, rules):
            wait_until(lambda: collector.lines)
            # As the trace of a bug may be.
            with open(logs / "hookshot.log", "ab") as file:
                file.write(json.dumps({"timestamp": "", "trace": "x" * 20_000}).encode() + b"\n")
            while len(list(logs.iterdir())) < 4:
                host.wait(host.deploy())
            assert host.stop() == 0
            written = sorted(line for file in logs.iterdir() for line in file.read_bytes().splitlines(keepends=True))
            with contextlib.suppress(AssertionError):
                wait_until(lambda: len(collector.lines) >= len(written))
            assert sorted(collector.lines) == written
            assert all("timestamp" in json.loads(line) for line in written)
        collector.shutdown()


# --- proxies

NGINX = "@USER@pid nginx.pid;\ndaemon off;\nerror_log stderr;\nevents {}\nhttp {\naccess_log off;\n" + "".join(
    f"{name}_temp_path {name};\n" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")) + "@SERVER@}\n"
CADDY = "{\nadmin off\nauto_https disable_redirects\n}\n"
# Only this address may ask for more than deploys, where the example says how.
OPERATOR = "127.0.0.8"


def configure(name: str, port: int, backend: int, files: Certificates, *, is_narrow: bool) -> str:
    """Return the example for a port and certificates of this test, and with what is commented out if it is to be narrow."""
    if name == "nginx":
        text = replaced(read("nginx/hookshot.conf"), ("listen 443 ssl;", f"listen 127.0.0.1:{port} ssl;"), ("listen [::]:443 ssl;", ""),
                        ("/etc/letsencrypt/live/hookshot.example.net/fullchain.pem", files.server), ("/etc/letsencrypt/live/hookshot.example.net/privkey.pem", files.server_key))
        text = NGINX.replace("@USER@", "user root;\n" if os.geteuid() == 0 else "").replace("@SERVER@", text)
    else:
        text = CADDY + replaced(read("caddy/Caddyfile"), ("\nhookshot.example.net {", f"\nhttps://localhost:{port} {{\n\tbind 127.0.0.1"),
                                ("#tls /etc/caddy/hookshot.pem /etc/caddy/hookshot.key", f"tls {files.server} {files.server_key}"))
    text = replaced(text, ("127.0.0.1:8080", f"127.0.0.1:{backend}"), ("192.0.2.0/24", f"{OPERATOR}/32"))
    # A sign and a space, or a sign in the first column, is prose.
    return re.sub(r"^(\s+)#(?! |\n)", r"\1", text, flags=re.MULTILINE) if is_narrow else text


def is_open(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), PATIENCE_S):
        return True
    return False


class Front:
    """Speaks TLS to a proxy from an address of this test's choice."""

    def __init__(self, port: int, host: Host, authority: pathlib.Path):
        self.port, self.host, self.tls = port, host, ssl.create_default_context(cafile=str(authority))

    @contextlib.contextmanager
    def link(self, source: str = "127.0.0.7") -> Iterator[http.client.HTTPSConnection]:
        with contextlib.closing(http.client.HTTPSConnection("localhost", self.port, timeout=PATIENCE_S, context=self.tls)) as link:
            link.sock = self.tls.wrap_socket(socket.create_connection(("127.0.0.1", self.port), PATIENCE_S, (source, 0)), server_hostname="localhost")
            yield link

    def ask(self, method: str, path: str, body: bytes | None = None, *, source: str = "127.0.0.7", **headers: str) -> Answer:
        with self.link(source) as link:
            link.request(method, path, body, headers)
            return Answer(link.getresponse())

    def deploy(self, *, size: int = 0, **headers: str) -> Answer:
        """Send a signed deploy, with a body of so many bytes if that is more than it needs."""
        body = json.dumps({"service": "web", "image": "app:1"}).encode().ljust(size)
        return self.ask("POST", "/deploy", body, **{"X-Hub-Signature-256": hookshot.sign(KEY.encode(), body), "Content-Type": "application/json", **headers})


@contextlib.contextmanager
def fronted(name: str, folder: pathlib.Path, *, is_narrow: bool = False) -> Iterator[Front]:
    need(name)
    config = '[security]\ntrusted_proxies = ["127.0.0.1"]\nread_access = "token"\n'
    assert config in PAGE
    files, port = make_certificates(folder), free_port()
    with running(folder / "host", service(HOLD), config, secrets=f"read_token={TOKEN}\n") as host, \
            running_proxy(name, folder, configure(name, port, host.port, files, is_narrow=is_narrow), lambda: is_open(port)):
        yield Front(port, host, files.ca)


@pytest.fixture(params=["nginx", "caddy"], scope="module")
def front(request, tmp_path_factory) -> Iterator[Front]:
    with fronted(request.param, tmp_path_factory.mktemp(request.param)) as found:
        yield found


@pytest.mark.parametrize("forged", [{}, {"X-Forwarded-For": "10.0.0.1"}, {"Forwarded": "for=10.0.0.2"}], ids=str)
def test_a_deploy_goes_through_and_the_record_has_the_callers_address(front, forged):
    (front.host.folder / "go").touch()
    answer = front.deploy(**forged)
    assert answer.status == 202, answer.body
    record = json.loads(wait_until(lambda: (found := front.ask("GET", f"/status/{answer.json['deploy_id']}", Authorization=f"Bearer {TOKEN}")).json["status"] == "Succeeded" and found.body))
    assert record["triggered_by"]["address"] == "127.0.0.7"


def test_who_has_no_token_reads_nothing(front):
    assert front.ask("GET", "/services").status == 401
    assert front.ask("GET", "/services", Authorization=f"Bearer {TOKEN}").status == 200


@pytest.mark.parametrize("path, mark, end", [("/logs/@?follow=1", b"begin", b"end"), ("/events", b'"status":"Deploying"', b'"status":"Succeeded"')])
def test_what_is_followed_comes_through_before_it_ends(front, path, mark, end):
    go = front.host.folder / "go"
    go.unlink(missing_ok=True)
    begun = front.deploy().json["deploy_id"] if "@" in path else ""
    with front.link() as link:
        link.request("GET", path.replace("@", begun), headers={"Authorization": f"Bearer {TOKEN}", "Accept": "text/event-stream"})
        response = link.getresponse()
        assert response.status == 200 and response.readline()
        if not begun:
            assert front.deploy().status == 202
        # It has not ended, and will not before this line has come through.
        assert any(mark in line for line in iter(response.readline, b""))
        go.touch()
        assert any(end in line for line in iter(response.readline, b""))


def test_a_body_is_as_large_as_the_server_takes(front):
    (front.host.folder / "go").touch()
    assert front.deploy(size=1 << 20).status == 202
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        # Caddy passes a body on as it comes, and Hookshot, which knows its length, closes before all of it is there.
        assert front.deploy(size=(1 << 20) + 1).status in (413, 502)


@pytest.mark.parametrize("name", ["nginx", "caddy"])
def test_only_deploys_are_open_to_everyone_if_the_signs_are_removed(tmp_path, name):
    with fronted(name, tmp_path, is_narrow=True) as front:
        (front.host.folder / "go").touch()
        assert front.deploy().status == 202
        for method, path in (("GET", "/ready"), ("GET", "/services"), ("POST", "/services/web/lock"), ("GET", "/deploy"), ("POST", "/deploy/x")):
            assert front.ask(method, path, Authorization=f"Bearer {TOKEN}").status == 403, (method, path)
        assert front.ask("GET", "/services", source=OPERATOR, Authorization=f"Bearer {TOKEN}").status == 200


# --- firewall

# In a network of its own: a host with a Hookshot's port and another one, and a neighbour with the addresses of a caller and of a stranger.
NETWORK = """
set -eu
ip link set lo up
unshare -n sleep 600 &
neighbour=$!
trap 'kill $neighbour $servers 2> /dev/null || :' EXIT
servers=
until [ "$(readlink /proc/$neighbour/ns/net)" != "$(readlink /proc/$$/ns/net)" ]; do :; done
ip link add here type veth peer name there netns "$neighbour"
there() { nsenter -t "$neighbour" -n "$@"; }
ip address add 192.0.2.1/24 dev here
ip -6 address add 2001:db8:10::1/64 dev here nodad
ip link set here up
there ip address add 192.0.2.10/24 dev there
there ip address add 203.0.113.5/32 dev there
there ip -6 address add 2001:db8:10::2/64 dev there nodad
there ip link set there up
ip route add 203.0.113.5/32 dev here
nft -c -f "$1"
nft -f "$1"
nft -f "$1"
for port in 8080 8081; do
    "$2" -m http.server --bind :: "$port" > /dev/null 2>&1 &
    servers="$servers $!"
    until curl --silent --output /dev/null "http://127.0.0.1:$port/"; do :; done
done
try() { if there curl --silent --output /dev/null --max-time 2 --interface "$1" "http://$2/"; then echo "$3 in"; else echo "$3 $?"; fi; }
try 192.0.2.10 192.0.2.1:8080 caller
try 2001:db8:10::2 '[2001:db8:10::1]:8080' 'caller of IPv6'
try 203.0.113.5 192.0.2.1:8081 'stranger elsewhere'
try 203.0.113.5 192.0.2.1:8080 stranger
nft list chain inet hookshot port | grep -q 'packets 0' || echo dropped
"""


@is_root
def test_the_firewall_lets_in_those_who_are_named_and_leaves_other_ports_alone(tmp_path):
    for tool in ("nft", "ip", "unshare", "nsenter", "curl"):
        need(tool)
    if run("unshare", "-n", "true").returncode:
        pytest.skip("no network of its own can be had here")
    done = run("unshare", "-n", "bash", "-c", NETWORK, "bash", EXAMPLES / "firewall/nftables.conf", sys.executable, cwd=tmp_path)
    assert done.stdout.splitlines() == ["caller in", "caller of IPv6 in", "stranger elsewhere in", "stranger 28", "dropped"], done.stderr


# --- the page, as it is pasted


def test_an_operators_way_through_the_page(tmp_path):
    """tests/machine_examples.py says what is done: every block of docs/examples.md is pasted on a machine with systemd."""
    for tool in ("nginx", "caddy", "rsyslogd", "nft"):
        need(tool)
    names = ["examples-files", "examples-backup", "examples-cron", "examples-rsyslog", "examples-nginx", "examples-caddy", "examples-firewall"]
    certificates = make_certificates(tmp_path)
    files = {str(file.relative_to(ROOT)): file for file in EXAMPLES.rglob("*") if file.is_file()} | {
        "fullchain.pem": certificates.server, "privkey.pem": certificates.server_key}
    parts = {"files": {name: base64.b64encode(file.read_bytes()).decode() for name, file in files.items()},
             "blocks": {name: script_of(name) for name in names} | {"examples-folder": text_of("examples-folder", "ini")}}
    script = tmp_path / "script.py"
    script.write_text(f"PARTS = {parts!r}\n" + (ROOT / "tests/machine_examples.py").read_text())
    assert run_in_machine(script) == {
        "valid": "/etc/hookshot/config.toml and /etc/hookshot/services.toml are valid; services: site", "warnings": ["as hookshot, the server's user:"], "deployed": [0, 11, "1.0"],
        "archives": [["-rw-------", "hookshot"]], "timer": ["active", "enabled"], "restorable": 0, "elsewhere": [0, 1], "log file": True, "rsyslog": "active",
        "nginx": [200, 401, 403, 401], "caddy": "active", "firewall": 1}
