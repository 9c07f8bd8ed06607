# SPDX-License-Identifier: MPL-2.0
"""docs/troubleshooting.md: each symptom happens, the program says what the page quotes, and cures that can be run cure."""

import contextlib
import functools
import http.server
import json
import os
import pathlib
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator

import pytest

import hookshot
from pages import read_blocks, run_script, script_of, text_of
from render_docs import LOCAL_ERRORS
from support import KEY, PATIENCE_S, ROOT, Host, free_port, make_certificates, need, program, running, service, wait_until
from test_store import small_disk

PAGE = ROOT / "docs" / "troubleshooting.md"
TEXT = PAGE.read_text(encoding="utf-8")


# --- the page against the tables


def rows_below(heading: str) -> list[list[str]]:
    """Return the cells of the table below a heading, without its head."""
    table = TEXT.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in table.splitlines() if line.startswith("| ")][2:]


def test_every_error_of_the_api_has_an_entry_in_their_order():
    told = [row[0].strip("`") for row in rows_below("By code")]
    assert told == [kind.code for name, kind in hookshot.ERRORS.items() if name not in LOCAL_ERRORS]


def test_every_exit_status_has_an_entry():
    told = [int(number) for row in rows_below("By exit status") for number in row[0].split(", ")]
    known = {kind.exit for kind in hookshot.ERRORS.values()} | set(hookshot.EXIT_OF_STATE.values())
    assert told == sorted(known | {1, hookshot.EXIT_STILL_RUNNING, hookshot.EXIT_INTERRUPTED})


def test_every_quoted_message_is_proved_here():
    quoted = [block for block in read_blocks("") if block.page == PAGE]
    tests = pathlib.Path(__file__).read_text(encoding="utf-8")
    assert quoted and [str(block) for block in quoted if not block.run or f'"{block.run}"' not in tests] == []


# --- what the program says

# What differs from run to run, as the page shows it.
SHOWN = [(r"\(request [0-9a-f]+\)", "(request 1a8dd2cc00000c92)"), (r"\(pid \d+\)", "(pid 812)"), (r"locked by \S+", "locked by ann@desk"),
         (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", "2026-11-25T04:02:29.843Z"), (r"127\.0\.0\.1:\d+", "127.0.0.1:8080"),
         (r"lock_timeout \(\d+ s\)", "lock_timeout (3600 s)"), (r"by user \d+;", "by user 998;"), (r"this one knows \d+", "this one knows 5")]


def shown(said: str, host: Host | None) -> str:
    """Return what was said as the page would show it."""
    if host:
        for real, other in ((host.data, "/var/lib/hookshot"), (host.config, "/etc/hookshot/config.toml"), (host.secrets, "/etc/hookshot/secrets"),
                            (host.folder, "/srv/web")):
            said = said.replace(str(real), other)
    return functools.reduce(lambda text, pair: re.sub(*pair, text), SHOWN, said)


def assert_quoted(name: str, said: str, host: Host | None = None) -> None:
    """Assert that every line that the page quotes under a name was said."""
    said = shown(said, host)
    for line in text_of(name, "").splitlines():
        assert line in said, said


def said_by(done: "subprocess.CompletedProcess[str]", status: int | None = None) -> str:
    assert status is None or done.returncode == status, (done.returncode, done.stdout, done.stderr)
    return done.stdout + done.stderr


def log_of(host: Host) -> str:
    """Return the messages of a server's log."""
    return "\n".join(json.loads(line)["message"] for line in host.output.read_text().splitlines() if line.startswith("{"))


HEALTH = '[service.healthcheck]\ninitial_delay = 0\ninterval = 0\nmax_attempts = 2\nsuccess_threshold = 1\nhttp = "http://127.0.0.1:9/health"\n'
SERVICES = (
    service(tables='[service.rollback]\ncommands = [["true"]]\n') + service(name="off", head="enabled = false") + service('["sleep", "600"]', name="slow")
    + service('["sleep", "600"]', name="rejecting", head='on_busy = "reject"') + service('["sh", "-c", "thing --now"]', name="shell")
    + service('["sh", "-c", "rm -f bin/thing"]', '["thing"]', name="thing", head='env = { PATH = "@/bin:/usr/bin:/bin" }')
    + service('["./script.sh"]', name="script") + service('{ run = ["sleep", "600"], timeout = 1 }', name="late")
    + service('["sh", "-c", "kill -9 $$"]', name="killed") + service(name="sick", tables=HEALTH + '[service.rollback]\ncommands = [["true"]]\n')
    + service('["false"]', name="never", tables='[service.rollback]\nenabled = false\ncommands = [["true"]]\n')
    + service('["test", "{{IMAGE|tag}}", "!=", "bad"]', name="worse", tables='[service.rollback]\ncommands = [["false"]]\n')
    + service(name="web2", head="").replace('working_dir = "@"', 'working_dir = "@/elsewhere"')
    + service('["sh", "-c", "yes | head -c 200000"]', name="loud"))
CONFIG = "[limits]\nmax_queue_per_service = 1\nmax_output = \"64KB\"\n[server]\nworker_threads = 8\n"


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    folder = tmp_path_factory.mktemp("host")
    (folder / "bin").mkdir()
    (folder / "bin/thing").write_text("#!/bin/sh\n")
    (folder / "bin/thing").chmod(0o755)
    (folder / "script.sh").write_text("#!/bin/sh\n")
    (folder / "elsewhere").mkdir()
    with running(folder, SERVICES, CONFIG) as host:
        (folder / "elsewhere").rmdir()
        yield host


def deploy(host: Host, name: str = "web", image: str = "app:1", *options: str, status: int, **env: str) -> str:
    return said_by(host.cli("deploy", name, image, *options, env=env), status)


def failed_health(host: Host) -> str:
    said = deploy(host, "sick", status=10)
    return said


def refused_by_no_rollback(host: Host) -> str:
    return deploy(host, "sick", status=10) + deploy(host, "shell", status=10) + deploy(host, "never", status=10)


def failed_rollback(host: Host) -> str:
    return deploy(host, "worse", status=0) + deploy(host, "worse", "app:bad", status=12)


def not_possible(host: Host) -> str:
    host.post({"service": "web", "image": "app:1", "deploy_id": "release-7"})
    host.wait("release-7")
    return said_by(host.cli("rollback", "slow"), 65) + said_by(host.cli("cancel", "release-7"), 65)


def locked(host: Host) -> str:
    said_by(host.cli("lock", "web", "--reason", "stocktaking", "--for", "2h"), 0)
    try:
        return deploy(host, status=75)
    finally:
        said_by(host.cli("unlock", "web"), 0)


def busy(host: Host) -> str:
    stuck(host)
    host.post({"service": "slow", "image": "app:1"})
    host.post({"service": "rejecting", "image": "app:1"})
    return deploy(host, "slow", status=75) + deploy(host, "rejecting", status=75)


def stuck(host: Host) -> str:
    found = host.get("/deployments?service=slow&status=Deploying").json["deployments"]
    deploy_id = found[0]["deploy_id"] if found else host.deploy(service="slow")
    return wait_until(lambda: "now:" in (said := said_by(host.cli("status", deploy_id), 0)) and said)


def conflicting(host: Host) -> str:
    host.post({"service": "web", "image": "app:1", "deploy_id": "release-7"})
    return host.post({"service": "web", "image": "app:2", "deploy_id": "release-7"}).body.decode()


def late_clock(host: Host) -> str:
    done = subprocess.run([need("faketime"), "-f", "-1h", *program(), "-c", host.config, "-s", host.services, "deploy", "web", "app:1"], text=True,
                          capture_output=True, env={**os.environ, "HOOKSHOT_URL": f"http://127.0.0.1:{host.port}"})
    return said_by(done, 77)


def json_errors(host: Host, *answers) -> str:
    """Return the sentences of refusals as they are, without JSON's backslashes."""
    return "\n".join(answer.json["error"] for answer in answers)


def mended_body(host: Host) -> str:
    return host.request("POST", "/services/web/lock", b"{}", {"Content-Type": "application/json", "X-Hub-Signature-256": hookshot.sign(KEY.encode(), b"{}")}).json["error"]


def log_gone(host: Host) -> str:
    deploy_id = host.deploy()
    host.wait(deploy_id)
    [(number,)] = sqlite3.connect(f"file:{host.data}/state.db?mode=ro", uri=True).execute("SELECT seq FROM deployments WHERE deploy_id=?", (deploy_id,))
    (host.data / "logs" / f"{number}.log").unlink(missing_ok=True)
    return said_by(host.cli("logs", deploy_id), 65)


def loud(host: Host) -> str:
    deploy_id = host.deploy(service="loud")
    host.wait(deploy_id)
    return host.log(deploy_id)


def silent(host: Host) -> str:
    """Ask what takes the connection and says nothing; for less than the minute that the program waits."""
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        client = hookshot.Client(f"http://127.0.0.1:{nobody.getsockname()[1]}", KEY.encode(), None)
        with pytest.raises(hookshot.HookshotError) as told, client._open("POST", "/deploy", b"{}", {}, 0.2):
            pass
    return f"hookshot: {told.value}".replace("0.2 s", f"{hookshot._READ_TIMEOUT_S:g} s")


def gateway(host: Host) -> str:
    class Proxy(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Say nothing."""

        def do_POST(self) -> None:
            self.send_error(502)

    with http.server.HTTPServer(("127.0.0.1", 0), Proxy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        done = host.cli("deploy", "web", "app:1", "--url", f"http://127.0.0.1:{server.server_address[1]}")
        server.shutdown()
    return said_by(done, 69)


def never_run(host: Host) -> str:
    return said_by(host.cli("services", "--url", "unix:/run/hookshot/hookshot.sock"), 69)


CASES: dict[str, Callable[[Host], str]] = {
    "trouble-signature": lambda host: deploy(host, status=77, HOOKSHOT_HMAC_KEY="1f1e2d3c4b5a69788796a5b4c3d2e1f0"),
    "trouble-clock": late_clock,
    "trouble-control": mended_body,
    "trouble-token": lambda host: host.get("/services", **{"X-Forwarded-For": "192.0.2.1"}).json["error"],
    "trouble-disabled": lambda host: deploy(host, "off", status=77),
    "trouble-image": lambda host: deploy(host, "web", "other:1", status=65),
    "trouble-json": lambda host: host.post(b"{'service': 'web'}").json["error"],
    "trouble-fields": lambda host: host.post({"service": "web", "imag": "app:1", "image": 3}).json["error"],
    "trouble-service": lambda host: deploy(host, "nope", status=65),
    "trouble-path": lambda host: json_errors(host, host.get("/hooks/deploy"), host.get("/deploy")),
    "trouble-deployment": lambda host: said_by(host.cli("status", "nothing"), 65),
    "trouble-conflict": conflicting,
    "trouble-not-possible": not_possible,
    "trouble-size": lambda host: host.post(b"{" + b" " * 2_000_000 + b"}").json["error"],
    "trouble-media": lambda host: json_errors(host, host.post({}, headers={"Content-Type": "application/x-www-form-urlencoded"}),
                                              host.post({}, headers={"Content-Encoding": "gzip"})),
    "trouble-locked": locked,
    "trouble-busy": busy,
    "trouble-stuck": stuck,
    "trouble-refused": lambda host: said_by(host.cli("deploy", "web", "app:1", "--url", f"http://127.0.0.1:{free_port()}"), 69),
    "trouble-tls": lambda host: said_by(host.cli("services", "--url", f"https://127.0.0.1:{host.port}"), 69),
    "trouble-silent": silent,
    "trouble-gateway": gateway,
    "trouble-unix": never_run,
    "trouble-shell": lambda host: deploy(host, "shell", status=10),
    "trouble-program": lambda host: deploy(host, "thing", status=10),
    "trouble-directory": lambda host: deploy(host, "web2", status=10).replace("/elsewhere", ""),
    "trouble-executable": lambda host: deploy(host, "script", status=10),
    "trouble-timeout": lambda host: deploy(host, "late", status=10),
    "trouble-killed": lambda host: deploy(host, "killed", status=10),
    "trouble-health": failed_health,
    "trouble-no-rollback": refused_by_no_rollback,
    "trouble-rollback-failed": failed_rollback,
    "trouble-output": loud,
    "trouble-log-gone": log_gone,
}


@pytest.mark.parametrize("name", CASES)
def test_a_running_server_says_what_the_page_quotes(host, name):
    assert_quoted(name, CASES[name](host), host)


# --- servers of their own


def test_a_server_that_wants_timestamps_says_so(tmp_path):
    with running(tmp_path, service(), "[security]\nrequire_timestamp = true\n") as host:
        assert_quoted("trouble-timestamp", host.post({"service": "web", "image": "app:1"}).json["error"])
        assert host.cli("deploy", "web", "app:1").returncode == 0


def test_an_address_that_may_not_come_and_a_proxy_that_is_not_trusted_are_told(tmp_path):
    with running(tmp_path, service(), '[security]\nallowed_ips = ["192.0.2.0/24"]\n') as host:
        assert_quoted("trouble-address", said_by(host.cli("deploy", "web", "app:1"), 77))
        assert host.get("/ready", **{"X-Forwarded-For": "192.0.2.7"}).status == 403
        assert_quoted("trouble-proxy", wait_until(lambda: "believed" in log_of(host) and log_of(host)))
        # The cure.
        host.write(service(), '[security]\nallowed_ips = ["192.0.2.0/24"]\ntrusted_proxies = ["127.0.0.1"]\n')
        assert host.cli("reload").returncode == 0
        assert host.get("/ready", **{"X-Forwarded-For": "192.0.2.7"}).status == 200


def test_too_many_requests_are_told(tmp_path):
    with running(tmp_path, service(), "[security]\nrate_limit = 2\n") as host:
        answers = [host.get("/nothing").status for _ in range(2)]
        assert answers == [404, 404]
        assert_quoted("trouble-rate", said_by(host.cli("deploy", "web", "app:1"), 75))


def test_a_server_that_shuts_down_says_so(tmp_path):
    with running(tmp_path, service('["sleep", "600"]'), "[server]\nshutdown_timeout = 60\n") as host:
        host.wait(host.deploy(), "Deploying")
        assert host.process
        host.process.terminate()
        wait_until(lambda: host.get("/ready").status == 503)
        assert_quoted("trouble-shutdown", host.post({"service": "web", "image": "app:2"}).json["error"])


def test_too_many_connections_are_told(tmp_path):
    with running(tmp_path, service(), "[server]\nmax_connections = 1\n") as host, contextlib.ExitStack() as stack:

        def crowd() -> bytes:
            stack.enter_context(socket.create_connection(("127.0.0.1", host.port), PATIENCE_S)).sendall(b"GET /ready HTTP/1.1\r\n")
            return host.raw(b"GET /ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")

        answer = wait_until(lambda: b" 503 " in (answer := crowd()) and answer)
        assert_quoted("trouble-connections", answer.decode())


def test_a_locked_database_is_told_and_works_again_when_it_is_let_go(tmp_path):
    with running(tmp_path, service()) as host:
        with contextlib.closing(sqlite3.connect(host.data / "state.db", isolation_level=None)) as db:
            db.execute("BEGIN IMMEDIATE")
            assert_quoted("trouble-database-locked", host.post({"service": "web", "image": "app:1"}).json["error"])
            db.execute("ROLLBACK")
        assert host.wait(host.deploy())["status"] == "Succeeded"


def test_a_bug_is_told_with_a_trace_in_the_log(tmp_path):
    with running(tmp_path, service()) as host:
        host.wait(host.deploy(deploy_id="odd"))
        with contextlib.closing(sqlite3.connect(host.data / "state.db")) as db:
            db.execute("UPDATE deployments SET metadata='{' WHERE deploy_id='odd'")
            db.commit()
        problem = host.get("/status/odd").json
        assert_quoted("trouble-bug", problem["error"])
        [line] = [line for line in map(json.loads, host.output.read_text().splitlines()) if line["event"] == "bug"]
        assert line["request_id"] == problem["request_id"] and line["trace"]


def test_a_full_disk_is_told_and_its_cure_needs_no_restart(tmp_path):
    with small_disk(tmp_path / "disk", "16m") as disk, running(tmp_path / "host", service(), f'[storage]\ndata_dir = "{disk}/data"\n') as host:
        data = disk / "data"
        host.data = data
        with contextlib.suppress(OSError), open(disk / "filler", "wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))
        assert_quoted("trouble-disk", host.post({"service": "web", "image": "app:1"}).json["error"], host)
        done = run_script(f"DATA_DIR='{data}'\n" + script_of("trouble-space"), tmp_path)
        assert done.returncode == 0 and "100%" in done.stdout and f"{data}/logs" in done.stdout, done.stdout
        (disk / "filler").unlink()
        assert host.wait(host.deploy())["status"] == "Succeeded"


def test_a_certificate_of_an_unknown_authority_is_told(tmp_path):
    pytest.importorskip("ssl")
    files = make_certificates(tmp_path)
    config = f'[server.tls]\ncert = "{files.server}"\nkey = "{files.server_key}"\n'
    with running(tmp_path / "host", service(), config) as host:
        url = f"https://127.0.0.1:{host.port}"
        assert_quoted("trouble-certificate", said_by(host.cli("services", "--url", url), 69))
        assert host.cli("services", "--url", url, "--ca", str(files.ca)).returncode == 0


def test_what_waits_too_long_says_so(tmp_path):
    with running(tmp_path, service('["sleep", "600"]'), "[limits]\nlock_timeout = 1\n") as host:
        host.deploy()
        assert_quoted("trouble-expired", host.wait(host.deploy())["error"])


def test_what_a_crash_interrupts_is_recovered_and_told(tmp_path):
    with running(tmp_path, service('["sleep", "600"]')) as host:
        deploy_id = host.deploy()
        host.wait(deploy_id, "Deploying")
        host.kill()
        host.start()
        assert_quoted("trouble-interrupted", host.wait(deploy_id)["error"])
        assert_quoted("trouble-recovery", log_of(host))


def test_a_clock_that_is_behind_is_told_by_doctor(tmp_path):
    with running(tmp_path, service()) as host:
        host.wait(host.deploy())
        done = subprocess.run([need("faketime"), "-f", "-1h", *program(), "-c", host.config, "-s", host.services, "doctor"], capture_output=True, text=True)
        assert_quoted("trouble-future", said_by(done, 78))


def test_a_key_of_another_service_is_told_apart_by_explain_and_by_the_metric(tmp_path):
    other = "9f1e2d3c4b5a69788796a5b4c3d2e1f09f1e2d3c4b5a69788796a5b4c3d2e1f0"
    services = service() + service(name="other").replace("[service.security]", '[service.security]\nhmac_keys = ["other_key"]')
    with running(tmp_path, services, secrets=f"other_key={other}\n") as host:
        answer = host.post({"service": "web", "image": "app:1"}, key=other.encode(), headers={"X-Request-ID": "refused-1"})
        assert answer.json["error"] == "the signature is missing or wrong"
        wait_until(lambda: "refused  key" in host.cli("explain", "refused-1").stdout)
        assert b'hookshot_auth_failures_total{reason="other_service"} 1' in host.get("/metrics").body
        assert {"other_key", "hmac_key"} <= set(said_by(host.cli("services", "--keys"), 0).split())


# --- servers that do not start


# Root may do everything, so it becomes somebody else; with what it has loaded, since its Python may be closed to others.
AS_NOBODY = "import os, sys; sys.path[:0] = [sys.argv.pop(1)]; import hookshot; b'x'.decode('utf-8-sig'); os.setresuid(65534, 65534, 65534); sys.exit(hookshot.main(sys.argv[1:]))"


def start(host: Host, status: int, *command: str, as_nobody: bool = False) -> str:
    """Run a server (or another command) that ends at once; return what it said."""
    words = [sys.executable, "-c", AS_NOBODY, str(ROOT)] if as_nobody and os.geteuid() == 0 else program()
    done = subprocess.run([*words, "-c", host.config, "-s", host.services, *(command or ("run",))], stdin=subprocess.DEVNULL, text=True,
                          capture_output=True, timeout=2 * PATIENCE_S)
    return said_by(done, status)


def test_a_data_directory_has_one_server(tmp_path):
    with running(tmp_path, service()) as host:
        assert_quoted("trouble-in-use", start(host, 75), host)


def test_a_wrong_key_keeps_a_server_from_starting_and_from_reloading(tmp_path):
    with running(tmp_path, service()) as host:
        host.write(service(), "[limit]\nmax_output = 1\n")
        assert_quoted("trouble-reload", said_by(host.cli("reload"), 78), host)
        assert host.get("/ready").json["stale"]
        host.stop()
        assert_quoted("trouble-config", start(host, 78), host)


def test_a_reload_without_a_server_says_so(tmp_path):
    host = Host(tmp_path, service())
    assert_quoted("trouble-no-server", start(host, 69, "reload"), host)


def test_a_program_that_is_not_there_is_found_before_the_start(tmp_path):
    host = Host(tmp_path, service('["nosuchprogram"]'))
    assert_quoted("trouble-validate-program", start(host, 78), host)


def test_a_port_in_use_is_told(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        host = Host(tmp_path, service(), f'[server]\nlisten = "127.0.0.1:{other.getsockname()[1]}"\n')
        assert_quoted("trouble-port", start(host, 78), host)


def test_secrets_that_are_open_or_not_there_are_told(tmp_path):
    host = Host(tmp_path, service())
    host.secrets.chmod(0o644)
    assert_quoted("trouble-secrets", start(host, 78), host)
    host.secrets.unlink()
    assert_quoted("trouble-no-secrets", start(host, 78), host)


@pytest.fixture
def open_folder() -> Iterator[pathlib.Path]:
    """A folder that every user can look into."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield pathlib.Path(folder)


def test_a_user_who_may_not_read_the_secrets_or_write_the_data_is_told(open_folder):
    host = Host(open_folder / "host", service())
    host.folder.chmod(0o755)
    host.secrets.chmod(0o600 if os.geteuid() == 0 else 0)
    assert_quoted("trouble-no-key", start(host, 77, "deploy", "web", "app:1", "--url", "http://127.0.0.1:9", as_nobody=True), host)
    host.data.mkdir(mode=0o555)
    assert_quoted("trouble-directory-refused", start(host, 78, as_nobody=True), host)


def test_a_database_that_is_newer_damaged_or_half_imported_is_told(tmp_path):
    with running(tmp_path, service()) as host:
        host.stop()
        with contextlib.closing(sqlite3.connect(host.data / "state.db")) as db:
            db.execute("PRAGMA user_version=99")
            db.commit()
        assert_quoted("trouble-newer", start(host, 75), host)
        (host.data / "state.db").write_bytes(b"nonsense" * 4096)
        assert_quoted("trouble-damaged", start(host, 75), host)
        (host.data / "import.journal").write_text("{}")
        assert_quoted("trouble-import", start(host, 75), host)


# --- cures that run


def paste(name: str, host: Host, *, before: str = "") -> "subprocess.CompletedProcess[str]":
    """Run the blocks of a name as on the host itself."""
    words = f'"{sys.executable}" "{program()[1]}"'
    head = f'export HOOKSHOT_CONFIG="{host.config}" HOOKSHOT_SERVICES="{host.services}" HOOKSHOT_URL="http://127.0.0.1:{host.port}"\n' \
        f'hookshot() {{ {words} "$@"; }}\n'
    with tempfile.TemporaryDirectory() as folder:
        return run_script(head + before + script_of(name), pathlib.Path(folder))


def test_the_ways_to_look_work_by_paste(tmp_path):
    with running(tmp_path, service('["echo", "seen in the log"]')) as host:
        host.wait(host.deploy())
        done = paste("trouble-look", host)
        assert done.returncode == 0 and "seen in the log" in done.stdout and "Succeeded" in done.stdout, done.stdout


def test_the_header_that_is_printed_for_a_body_is_the_one_that_is_accepted(host):
    done = paste("trouble-sign", host)
    name, _, value = done.stdout.strip().partition(": ")
    body = b'{"service": "web", "image": "app:1"}'
    assert done.returncode == 0
    assert host.request("POST", "/deploy", body, {"Content-Type": "application/json", name: value}).status == 202


@pytest.mark.parametrize("option, status", [("-d", "401"), ("--data-binary", "202")])
def test_curl_changes_a_body_that_is_data_and_leaves_one_that_is_binary(host, tmp_path, option, status):
    body = tmp_path / "body.json"
    body.write_bytes(b'{"service": "web",\n"image": "app:1"}\n')
    done = subprocess.run([need("curl"), "--silent", "--output", "/dev/null", "--write-out", "%{http_code}", f"http://127.0.0.1:{host.port}/deploy",
                           "-H", "Content-Type: application/json", "-H", f"X-Hub-Signature-256: {hookshot.sign(KEY.encode(), body.read_bytes())}",
                           option, f"@{body}"], capture_output=True, text=True)
    assert done.stdout == status


def test_the_service_that_shows_the_environment_does_so(tmp_path):
    [block] = [block for block in read_blocks("toml") if block.page == PAGE and '"look"' in block.text]
    with running(tmp_path, block.text.replace('"/srv"', f'"{tmp_path}"')) as host:
        done = paste("trouble-environment", host)
        assert done.returncode == 0 and "uid=" in done.stdout and str(tmp_path) in done.stdout and "HOOKSHOT_IMAGE=look" in done.stdout, done.stdout


def test_a_path_of_a_service_lets_its_commands_find_their_programs(tmp_path):
    [block] = [block for block in read_blocks("toml") if block.page == PAGE and "/opt/node/bin" in block.text]
    (tmp_path / "thing").write_text("#!/bin/sh\necho found\n")
    (tmp_path / "thing").chmod(0o755)
    with running(tmp_path, block.text.replace('name = "web"', f'name = "web"\nworking_dir = "{tmp_path}"').replace("/opt/node/bin", str(tmp_path))) as host:
        assert "deploy out found" in said_by(host.cli("deploy", "web", "app:1"), 0)


def test_a_server_in_the_foreground_says_that_it_listens(tmp_path):
    host = Host(tmp_path, service())
    assert script_of("trouble-run").endswith("hookshot run\n")
    done = paste("trouble-run", host, before="hookshot() { timeout --signal=TERM 10 " + f'"{sys.executable}" "{program()[1]}"' + ' "$@"; }\n')
    assert "valid" in done.stdout and '"started"' in done.stdout, done.stdout


def test_a_backup_cures_a_damaged_database_and_an_empty_folder_does_too(tmp_path):
    with running(tmp_path, service()) as host:
        host.wait(host.deploy(deploy_id="kept"))
        backup = tmp_path / "backup.tar.gz"
        said_by(host.cli("export", str(backup)), 0)
        host.stop()
        (host.data / "state.db").write_bytes(b"nonsense" * 4096)
        start(host, 75)
        done = paste("trouble-restore", host, before=f"BACKUP={backup}\n")
        assert done.returncode == 0, done.stdout
        assert host.start().record("kept")["status"] == "Succeeded"
        host.stop()
        shutil.move(host.data, tmp_path / "old")
        host.data.mkdir()
        assert host.start().get("/deployments").json["deployments"] == []


def test_a_notice_that_does_not_arrive_is_told(tmp_path):
    channel = f'[notifications]\n[[notifications.channel]]\nname = "chat"\ntype = "webhook"\nurl = "http://127.0.0.1:{free_port()}/"\n'
    host = Host(tmp_path, service(), channel)
    done = paste("trouble-notice", host)
    assert done.returncode == 69
    assert_quoted("trouble-notice-said", done.stdout)


def test_an_archive_with_byte_code_is_made_by_paste(tmp_path):
    for name in ("build_zipapp.py", "hookshot.py", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    done = run_script(script_of("trouble-bytecode"), tmp_path)
    assert done.returncode == 0 and hookshot.__version__ in done.stdout, done.stdout
    listed = subprocess.run([sys.executable, "-m", "zipfile", "-l", tmp_path / "dist/hookshot.pyz"], capture_output=True, text=True).stdout
    assert "hookshot.pyc" in listed


@pytest.mark.parametrize("config, status", [('[security]\nread_access = "token"\n', 401), ("[monitoring]\nmetrics_enabled = false\n", 404)])
def test_metrics_that_are_missing_answer_as_the_page_says(tmp_path, config, status):
    with running(tmp_path, service(), config, secrets="read_token=t0k3n-of-a-reader-0123456789abcdefgh\n") as host:
        assert host.get("/metrics").status == status


# --- codes that a client meets seldom


SEND = b"POST /deploy HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nX-Hub-Signature-256: sha256=00\r\n"
RARE = {
    "BAD_REQUEST": b"GET / HTTP/1.1\r\n\r\n", "LENGTH_REQUIRED": SEND + b"\r\n", "URI_TOO_LONG": b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n\r\n",
    "EXPECTATION_FAILED": SEND + b"Content-Length: 2\r\nExpect: more\r\n\r\n", "NOT_IMPLEMENTED": SEND + b"Transfer-Encoding: gzip\r\n\r\n",
    "HEADERS_TOO_LARGE": b"GET /ready HTTP/1.1\r\nHost: localhost\r\n" + b"".join(b"X-%d: 1\r\n" % number for number in range(101)) + b"\r\n",
    "HTTP_VERSION_NOT_SUPPORTED": b"GET /ready HTTP/2.0\r\nHost: localhost\r\n\r\n"}


@pytest.mark.parametrize("code", RARE)
def test_what_the_page_names_as_the_cause_has_this_code(host, code):
    assert f'"code":"{code}"'.encode() in host.raw(RARE[code])


def test_a_request_that_does_not_arrive_has_this_code(tmp_path):
    with running(tmp_path, service(), "[server]\nrequest_timeout = 1\n") as host:
        assert b'"code":"REQUEST_TIMEOUT"' in host.raw(b"GET /ready HTTP/1.1\r\n", patience_s=PATIENCE_S)
