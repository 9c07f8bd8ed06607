# SPDX-License-Identifier: MPL-2.0
"""Reload: what it tells, what a broken or half-written file changes (nothing), what it takes away, keys that come and go, `hookshot reload`."""

import contextlib
import http.client
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import hookshot
import support
from support import KEY, Host, running, service, wait_until
from test_store import request_of

NEXT_KEY = "7b1f0c9d3e5a48629c47d1e08f35ab62" * 2
TEAM_KEY = "e94d2c7f10b8653aa6d3f90b1c5e7428" * 2
CANARY = "canary-5f2d9c"
# Stays until it is told to go on, or the server is gone.
HOLD = '["sh", "-c", "echo $HOOKSHOT_SERVICE $HOOKSHOT_IMAGE >> trace; until [ -e go ]; do kill -0 $PPID || exit; sleep 0.02; done"]'
NOTE = '["sh", "-c", "echo $HOOKSHOT_SERVICE $HOOKSHOT_IMAGE >> trace"]'


def events(host: Host, name: str) -> list[dict[str, Any]]:
    return [line for line in map(json.loads, host.output.read_text().splitlines()) if line["event"] == name]


def record_of(host: Host) -> dict[str, Any]:
    return json.loads((host.data / "reload.json").read_text())


def reload(host: Host) -> dict[str, Any]:
    """Send SIGHUP and return the server's record of what came of it."""
    before = record_of(host)["number"]
    host.process.send_signal(signal.SIGHUP)
    return wait_until(lambda: (record := record_of(host))["number"] > before and record["outcome"] != "reading" and record)


def metric(host: Host, line: str) -> bool:
    return f"\n{line}\n" in host.get("/metrics").body.decode()


# --- what is told


def flatten(config: str, services: str) -> dict[str, str]:
    problems: list[hookshot.Problem] = []
    loaded = hookshot.load_config(config, "config.toml", problems)
    flat = hookshot.flatten_settings(loaded, hookshot.load_services(services.replace('"@"', '"/home"'), "services.toml", loaded, problems))
    assert not hookshot.has_errors(problems), problems
    return flat


CHANNEL = '[[notifications.channel]]\nname = "{}"\ntype = "{}"\n{} = "https://a.example/{}"\n'
PROBE = '[service.healthcheck.http]\nurl = "http://u:{}@localhost/"\nstatus = {}\n'


@pytest.mark.parametrize("before, after, lines", [
    (("", ""), ("", ""), []),
    (("", ""), ('[limits]\nmax_output = "20MB"\ndeployment_timeout = "1h"\n', ""),
     ["limits.deployment_timeout: 1800 -> 3600", "limits.max_output: 10MB -> 20MB"]),
    (("", ""), ('[server]\nsocket_mode = "0600"\n[security]\nallowed_ips = ["10.0.0.0/8", "unix"]\n[secrets]\nsource = ["env"]\n', ""),
     ['server.socket_mode: "0660" -> "0600"', "security.allowed_ips: [] -> [10.0.0.0/8, unix]", 'secrets.source: "auto" -> [env]']),
    (("", service() + service(name="old")), ("", service() + service(name="api")), ['service "old": removed', 'service "api": added']),
    (("", service()), ("", service(head="user = \"nobody\"\numask = \"077\"\n").replace("[a-z0-9.]+", "[0-9]+")),
     ['service "web".user: unset -> "nobody"', 'service "web".umask: "022" -> "077"',
      'service "web".security.allowed_image_pattern: "app:[a-z0-9.]+" -> "app:[0-9]+"']),
    (("", service('["a"]', '["b"]')), ("", service('["a"]', '{ run = ["b"], timeout = 5 }', '["c"]')),
     ['service "web".deploy.commands[1].timeout: unset -> 5', 'service "web".deploy.commands[2]: added']),
    (("", service('["a", "x"]')), ("", service('["a", "y"]')), ['service "web".deploy.commands[0].run: changed']),
    (("", service(tables='[service.env]\nA = "1"\nB = "1"\n')), ("", service(tables='[service.env]\nA = "2"\nC = "1"\n')),
     ['service "web".env.A: changed', 'service "web".env.B: removed', 'service "web".env.C: added']),
    (("", service(tables=PROBE.format("a", 200))), ("", service(tables=PROBE.format("b", 204))),
     ['service "web".healthcheck.http.url: changed', 'service "web".healthcheck.http.status: 200 -> 204']),
    (("", service(tables=PROBE.format("a", 200))), ("", service()), ['service "web".healthcheck.http: removed']),
    ((CHANNEL.format("a", "slack", "url", 1) + CHANNEL.format("b", "slack", "url", 1), ""),
     (CHANNEL.format("c", "slack", "url", 1) + CHANNEL.format("b", "teams", "url", 2), ""),
     ['notifications.channel "a": removed', 'notifications.channel "b".type: "slack" -> "teams"', 'notifications.channel "b".url: changed',
      'notifications.channel "c": added']),
    (("", ""), (CHANNEL.format("a", "slack", "url", 1), ""), ['notifications.channel "a": added']),
    ((CHANNEL.format("a", "slack", "url", 1), ""), ("", ""), ['notifications.channel "a": removed']),
    # What differs only behind what is shown of it has changed all the same.
    (("", service(head=f'description = "{"x" * 100}1"')), ("", service(head=f'description = "{"x" * 100}2"')),
     ['service "web".description: changed']),
    (("", service(head='description = "a\\u001b[31m"')), ("", service(head='description = "b"')), ['service "web".description: "a\\\\u001b[31m" -> "b"'.replace("\\\\", "\\")]),
    # A default is every service's.
    (("", "[defaults]\nworking_dir = \"/a\"\n" + service().replace('working_dir = "@"\n', "")),
     ("", "[defaults]\nworking_dir = \"/b\"\n" + service().replace('working_dir = "@"\n', "")), ['service "web".working_dir: "/a" -> "/b"'])])
def test_a_change_is_a_line_with_path_old_and_new_value(before, after, lines):
    assert hookshot.describe_changes(flatten(*before), flatten(*after)) == lines


def test_what_may_be_a_secret_is_told_without_its_value():
    """Everything that is confidential, an argument list, or a text with placeholders, of every table of both files."""
    def files(word: str) -> tuple[str, str]:
        url = f"https://x.example/{word}"
        config = f'[secrets]\ncommand = ["vault", "{word}"]\n[notifications.webhook]\non_failure = "{url}"\non_success = "{url}"\nsigning_key = "{word}"\n' \
                 f'[[notifications.channel]]\nname = "a"\ntype = "webhook"\nurl = "{url}"\ntoken = "{word}"\nsigning_key = "{word}"\n' \
                 f'[[notifications.channel]]\nname = "b"\ntype = "email"\nserver = "m:25"\nsender = "a@b"\nrecipients = ["a@b"]\nusername = "u"\npassword = "{word}"\n' \
                 f'[[notifications.channel]]\nname = "c"\ntype = "exec"\ncommand = ["say", "{word}"]\n'
        run = f'{{ run = ["x", "{word}"], env = {{ A = "{word}" }} }}'
        tables = f'[service.env]\nTOKEN = "{word}"\n[service.templates]\nT = "{word}"\n[service.rollback]\ncommands = [{run}]\n' \
                 f'[service.healthcheck]\ntcp = "{word}:1"\nhttp = {{ url = "http://u:{word}@x/", contains = "{word}" }}\n[service.hooks]\npre_deploy = [{run}]\n'
        return config, f'[defaults.env]\nD = "{word}"\n' + service(run, tables=tables)

    lines = hookshot.describe_changes(flatten(*files(CANARY)), flatten(*files("other-" + CANARY)))
    assert len(lines) == 21 and all(line.endswith(": changed") for line in lines), lines
    assert CANARY not in "".join(flatten(*files(CANARY)).values())


def test_every_key_of_both_files_is_compared():
    flat = flatten("", service())

    def paths(table: type, prefix: str) -> Iterator[str]:
        for name, field in table._field_defaults.items():
            yield from paths(field, f"{prefix}{name}.") if hookshot.is_table(field) else (f"{prefix}{name}",)

    empty = {f'service "web".{name}' for name in ("env", "templates")}
    wanted = {*paths(hookshot.Config, ""), *paths(hookshot.Service, 'service "web".')} - empty
    assert {path for path in wanted if not any(each == path or each.startswith(f"{path}[") for each in flat)} == set()


def test_secrets_are_told_by_name():
    assert hookshot.describe_secrets({"a": b"1", "b": b"1", "c": b"1"}, {"b": b"2", "c": b"1", "d": b"1"}) \
        == ["secret a: removed", "secret b: new value", "secret d: added"]


SERVICES = service(NOTE) + service(name="api")


@pytest.fixture(scope="module")
def host(tmp_path_factory) -> Iterator[Host]:
    """A server whose files tests break, each putting them right again."""
    with running(tmp_path_factory.mktemp("reload"), SERVICES, '[logging]\nlevel = "debug"\n') as host:
        yield host


@pytest.fixture
def restored(host: Host) -> Iterator[Host]:
    """The server, with its files as they were at the end."""
    texts = {path: path.read_text() for path in (host.config, host.services, host.secrets)}
    yield host
    for path, text in texts.items():
        if path.is_symlink() or path.exists() and not path.is_file():
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        path.write_text(text)
        path.chmod(0o600)
    assert reload(host)["outcome"] == "taken"
    assert host.get("/ready").json == {"ready": True, "message": "ready"}


def test_the_log_has_a_line_for_each_change_and_no_value_of_a_secret(restored):
    before = len(events(restored, "config_changed"))
    restored.write(service(NOTE, head="nice = 3") + service(name="job"), f'[logging]\nlevel = "debug"\n[notifications.webhook]\non_failure = "https://x.example/{CANARY}"\n')
    restored.secrets.write_text(f"hmac_key={KEY}\nread_token={CANARY}-{NEXT_KEY}\n")
    record = reload(restored)
    lines = ["notifications.webhook.on_failure: changed", 'service "web".nice: 0 -> 3', 'service "api": removed', 'service "job": added', "secret read_token: added"]
    assert record["changes"] == [line["message"] for line in events(restored, "config_changed")[before:]] == lines
    assert reload(restored)["changes"] == []
    assert events(restored, "reloaded")[-1]["message"].endswith("nothing has changed")
    assert CANARY not in restored.output.read_text() and CANARY not in json.dumps(record)


def test_very_many_changes_are_told_by_the_first_and_their_number(restored):
    restored.services.write_text((SERVICES + "".join(service(name=f"s{number}") for number in range(60))).replace("@", str(restored.folder)))
    changes = reload(restored)["changes"]
    assert len(changes) == 51 and changes[0] == 'service "s0": added' and changes[-1] == "and 10 changes more"


# --- files that cannot be used


def make_link(path: pathlib.Path, target: str) -> None:
    path.unlink()
    path.symlink_to(target)


def make_folder(path: pathlib.Path) -> None:
    path.unlink()
    path.mkdir()


def make_pipe(path: pathlib.Path) -> None:
    path.unlink()
    os.mkfifo(path)


def cut(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 + 7])


DAMAGES: dict[str, tuple[str, Callable[[pathlib.Path], Any], str]] = {
    "services cut": ("services", cut, "services.toml"),
    "services missing": ("services", lambda path: path.unlink(), "No such file"),
    "services empty": ("services", lambda path: path.write_text(""), "no service any more"),
    "services without a service": ("services", lambda path: path.write_text("# soon\n[defaults]\n"), "no service any more"),
    "services a folder": ("services", make_folder, "not a regular file"),
    "services a pipe": ("services", make_pipe, "not a regular file"),
    "services not UTF-8": ("services", lambda path: path.write_bytes(path.read_bytes() + b"# \xff"), "not UTF-8"),
    "services dangling": ("services", lambda path: make_link(path, "nowhere"), "No such file"),
    "config empty": ("config", lambda path: path.write_text(""), "is empty"),
    "config missing": ("config", lambda path: path.unlink(), "No such file"),
    "config wrong": ("config", lambda path: path.write_text(f"{path.read_text()}\n[limits]\n{CANARY} = 1\n"), "unknown key"),
    "secrets missing": ("secrets", lambda path: path.unlink(), "does not exist"),
    "secrets empty": ("secrets", lambda path: path.write_text(""), "hmac_key is not found"),
    "secrets open to others": ("secrets", lambda path: path.chmod(0o644), "can be read by others"),
    "secrets cut": ("secrets", lambda path: path.write_text(f"hmac_key={KEY[:12]}"), "shorter than 16 bytes")}


@pytest.mark.parametrize("file, damage, words", DAMAGES.values(), ids=DAMAGES)
def test_what_cannot_be_used_leaves_the_old_state_in_force_and_is_seen(restored, file, damage, words):
    damage(getattr(restored, file))
    record = reload(restored)
    assert record["outcome"] == "refused" and words in str(record["problems"])
    assert restored.wait(restored.deploy())["status"] == "Succeeded" and restored.get("/services/api").status == 200
    ready = restored.get("/ready")
    assert ready.status == 200 and ready.json["ready"] is True and list(ready.json["stale"]) == ["configuration"]
    assert metric(restored, "hookshot_config_last_reload_successful 0")
    # Strangers ask for it: neither names nor content.
    assert not any(word in ready.body.decode() for word in (CANARY, str(restored.folder), "toml"))
    assert reload(restored)["outcome"] == "refused" and restored.get("/ready").json == ready.json, "since when it is so"


def test_a_symlink_that_leads_to_another_file_is_followed(restored):
    """As those of Kubernetes are swapped: the folder that the link leads to is another."""
    for name, text in (("one", SERVICES), ("two", SERVICES + service(name="job"))):
        (restored.folder / name).mkdir()
        (restored.folder / name / "services.toml").write_text(text.replace("@", str(restored.folder)))
    (restored.folder / "latest").symlink_to("one")
    make_link(restored.services, "latest/services.toml")
    assert reload(restored)["changes"] == []
    (restored.folder / "other").symlink_to("two")
    (restored.folder / "other").rename(restored.folder / "latest")
    assert reload(restored)["changes"] == ['service "job": added']


def test_a_file_that_is_being_written_is_not_taken_half(restored):
    """Emptied, then written in pieces, each a file that could be read, while the server is asked to."""
    lines, pause = restored.services.read_text().splitlines(keepends=True), threading.Event()

    def write() -> None:
        with open(restored.services, "w", encoding="utf-8") as file:
            for line in [*lines, "# the end\n"]:
                file.write(line)
                file.flush()
                pause.wait(0.02)

    for _ in range(5):
        writer = threading.Thread(target=write)
        writer.start()
        record = reload(restored)
        writer.join()
        if record["outcome"] == "taken" and record["changes"] == []:
            return
        # On a machine under load the writer may have stood still for so long that its file was taken for complete.
        reload(restored)
    pytest.fail(f"half a file was read five times: {record}")


def test_signals_that_come_quickly_end_with_the_last_content(restored):
    for number in range(6):
        restored.services.write_text((SERVICES + service(name=f"s{number}")).replace("@", str(restored.folder)))
        restored.process.send_signal(signal.SIGHUP)
    assert wait_until(lambda: restored.get("/services/s5").status == 200)
    assert [entry["name"] for entry in restored.get("/services").json["services"]] == ["api", "s5", "web"]


def test_a_backup_meanwhile_is_whole(restored):
    archive = restored.folder / "backup.tar.gz"
    with subprocess.Popen([sys.executable, str(support.PROGRAM), "-c", str(restored.config), "-s", str(restored.services), "export", str(archive)],
                          stderr=subprocess.PIPE) as export:
        while export.poll() is None:
            assert reload(restored)["outcome"] == "taken"
        assert export.returncode == 0
    assert restored.cli("import", "--dry-run", str(archive)).returncode == 0


def test_what_needs_a_restart_is_told_and_not_in_force(restored):
    workers = restored.get("/health").json["deployment_queue"]["workers"]
    restored.write(SERVICES, '[server]\nworker_threads = 2\n[secrets]\nsecret_prefix = "OTHER_"\n[logging]\nlevel = "debug"\n')
    record = reload(restored)
    assert record["pending"] == ["server.worker_threads: 4 -> 2", 'secrets.secret_prefix: "HOOKSHOT_" -> "OTHER_"'] and record["changes"] == []
    assert "worker_threads: 4 -> 2" in events(restored, "restart_needed")[-1]["message"]
    assert restored.get("/health").json["deployment_queue"]["workers"] == workers


# --- hookshot reload, hookshot status


def test_the_command_prints_what_changed(restored):
    restored.services.write_text(restored.services.read_text().replace('name = "api"', 'name = "api"\nnice = 5'))
    done = restored.cli("reload")
    assert (done.returncode, done.stdout, done.stderr) == (0, 'service "api".nice: 0 -> 5\n', "reloaded\n")
    done = restored.cli("reload", "--json")
    assert done.returncode == 0 and json.loads(done.stdout) == {
        "reloaded": True, "config": str(restored.config), "services": str(restored.services), "changes": [], "pending": [], "problems": []}


def test_the_command_prints_what_is_wrong_and_status_shows_that_it_lasts(restored):
    restored.services.write_text(restored.services.read_text() + "[nonsense]\n")
    done = restored.cli("reload")
    assert done.returncode == 78 and done.stdout == "" and "nonsense: unknown key" in done.stderr and "nothing is reloaded" in done.stderr
    done = restored.cli("status")
    assert done.returncode == 0 and "state:          ready\n" in done.stdout and "configuration:  older than its files since 20" in done.stdout
    assert list(json.loads(restored.cli("status", "--json").stdout)["stale"]) == ["configuration"]


def test_a_config_that_cannot_be_read_hides_the_server_until_its_data_directory_is_named(restored):
    number = record_of(restored)["number"]
    restored.config.write_text(restored.config.read_text() + "[[[\n")
    done = restored.cli("reload")
    assert done.returncode == 78 and "is not valid TOML" in done.stderr and "--data-dir" in done.stderr and record_of(restored)["number"] == number
    done = restored.cli("reload", "--data-dir", str(restored.data))
    assert done.returncode == 78 and "is not valid TOML" in done.stderr and record_of(restored)["number"] == number + 1


def test_without_a_server_there_is_nobody_to_ask(tmp_path):
    done = Host(tmp_path, service()).cli("reload")
    assert done.returncode == 69 and "no server uses" in done.stderr and len(done.stderr.splitlines()) == 1


def test_who_holds_the_data_directory_without_being_its_server_gets_no_signal(tmp_path):
    """An import would die of it; and what a server that was killed left there names a pid that may be another's now."""
    with running(tmp_path, service()) as host:
        record = record_of(host)
        host.kill()
    received: list[int] = []
    before = signal.signal(signal.SIGHUP, lambda number, frame: received.append(number))
    lock = hookshot.FolderLock(str(host.data))
    try:
        for left in (record, {**record, "pid": os.getpid()}):
            (host.data / "reload.json").write_text(json.dumps(left))
            done = host.cli("reload")
            assert done.returncode == 75 and f"pid {os.getpid()}" in done.stderr and "takes no reload" in done.stderr
    finally:
        lock.release()
        signal.signal(signal.SIGHUP, before)
    assert received == []


def test_the_owner_of_a_data_directory_does_not_choose_whom_root_signals(tmp_path):
    if os.geteuid():
        pytest.skip("missing: root")
    host = Host(tmp_path, service())
    host.data.mkdir()
    received: list[int] = []
    before = signal.signal(signal.SIGHUP, lambda number, frame: received.append(number))
    lock = hookshot.FolderLock(str(host.data))
    try:
        me = hookshot.read_process(os.getpid())
        hookshot.ReloadRecord(me.pid, me.started_ticks, str(host.config), str(host.services)).write(str(host.data))
        os.chown(host.data / "reload.json", 65534, 65534)
        done = host.cli("reload")
    finally:
        lock.release()
        signal.signal(signal.SIGHUP, before)
    assert (done.returncode, received) == (75, []) and "takes no reload" in done.stderr


def test_a_server_that_drains_does_not_reload_and_the_command_says_so(tmp_path):
    with running(tmp_path, service(HOLD)) as host:
        deploy_id = host.deploy()
        host.wait(deploy_id, "Deploying")
        host.process.send_signal(signal.SIGTERM)
        wait_until(lambda: host.get("/ready").status == 503)
        assert "state:          draining" in host.cli("status").stdout
        with subprocess.Popen([sys.executable, str(support.PROGRAM), "-c", str(host.config), "reload"], stderr=subprocess.PIPE) as asking:
            host.process.send_signal(signal.SIGHUP)
            (tmp_path / "go").touch()
            assert host.process.wait(support.PATIENCE_S) == 0
            # It asked the server while that lived, or came too late, or just when it went.
            assert asking.wait(support.PATIENCE_S) in (69, 75)
        assert (tmp_path / "trace").read_text() == "web app:1\n" and not (host.data / "reload.json").exists()


def test_a_signal_before_the_start_is_over_ends_nothing_and_is_heeded_later(tmp_path):
    script = f"cd '{tmp_path}'; touch asked; until [ -e go ]; do sleep 0.02; done; echo hmac_key={KEY}"
    host = Host(tmp_path, service(), f"[secrets]\nsource = \"command\"\ncommand = [\"sh\", \"-c\", {json.dumps(script)}]\n")
    with contextlib.closing(host):
        host.start(wait=False)
        wait_until(lambda: (tmp_path / "asked").exists())
        host.process.send_signal(signal.SIGHUP)
        (tmp_path / "go").touch()
        wait_until(lambda: host.process.poll() is not None or events(host, "reloaded"))
        assert host.process.poll() is None


# --- what a reload takes away


def test_many_signals_while_files_are_read_are_one_reading_and_an_end_does_not_wait_for_it(tmp_path):
    config = f'[secrets]\nsource = ["file", "command"]\ncommand = ["sh", "-c", "until [ -e {tmp_path}/go ]; do kill -0 $PPID || exit; sleep 0.02; done"]\n'
    with contextlib.closing(Host(tmp_path / "host", service(), config)) as host:
        (tmp_path / "go").touch()
        host.start()
        (tmp_path / "go").unlink()
        for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGHUP, signal.SIGTERM):
            host.process.send_signal(number)
            # The kernel makes one of several that are not taken yet.
            wait_until(lambda: record_of(host)["outcome"] == "reading" and not pending_signals(host))
        (tmp_path / "go").touch()
        assert host.process.wait(support.PATIENCE_S) == 0
        assert len(events(host, "reloaded")) == 1


def pending_signals(host: Host) -> bool:
    """Return whether the kernel still keeps a signal for the server."""
    status = dict(line.split(":", 1) for line in pathlib.Path(f"/proc/{host.process.pid}/status").read_text().splitlines())
    return any(int(status[name], 16) for name in ("SigPnd", "ShdPnd"))


def test_a_secrets_file_that_no_source_reads_is_not_looked_at(tmp_path):
    with contextlib.closing(Host(tmp_path / "host", service(), f'[secrets]\nsource = "env"\nsecrets_file = "{tmp_path}"\n')) as host:
        host.start(env={"HOOKSHOT_HMAC_KEY": KEY})
        assert reload(host)["outcome"] == "taken"


def test_what_waits_and_may_not_run_any_more_ends_as_cancelled_and_what_runs_goes_on(tmp_path):
    own = 'hmac_keys = ["team_key"]\n'
    before = service(HOLD, name="held") + "".join(service(NOTE, name=name) for name in ("gone", "off", "stays")) \
        + service(NOTE, name="team").replace("[service.security]\n", f"[service.security]\n{own}")
    keys = '[limits]\nmax_concurrent_total = 1\n[security]\nhmac_keys = ["hmac_key"{}]\n'
    with running(tmp_path, before, keys.format(', "next_key"'), secrets=f"next_key={NEXT_KEY}\nteam_key={TEAM_KEY}\n") as host:
        def deploy(name: str, key: str = KEY) -> str:
            return host.post({"service": name, "image": "app:1"}, key=key.encode()).json["deploy_id"]

        held = deploy("held")
        host.wait(held, "Deploying")
        ids = {"gone": [deploy("gone"), deploy("gone")], "off": [deploy("off")], "team": [deploy("team", TEAM_KEY)], "next": [deploy("stays", NEXT_KEY)],
               "stays": [deploy("stays"), deploy("team")]}
        # The one that runs has other commands from now on; it is not to notice.
        after = before.replace(HOLD, '["false"]').replace(own, "").replace(service(NOTE, name="gone"), "").replace('name = "off"', 'name = "off"\nenabled = false')
        host.write(after, keys.format(""))
        assert reload(host)["outcome"] == "taken"

        reasons = {"gone": "service gone is not in services.toml any more", "off": "service off is disabled in services.toml",
                   "team": "the key team_key, which asked for it, may not deploy service team any more",
                   "next": "the key next_key, which asked for it, may not deploy service stays any more"}
        for name, reason in reasons.items():
            for record in map(host.record, ids[name]):
                assert (record["status"], record["error"], record["timings"]["started_at"]) == ("Cancelled", reason, None)
                assert record["state_transitions"][-1]["reason"] == reason
        moved = [line for line in events(host, "deploy_moved") if line["status"] == "Cancelled"]
        assert [line["error"] for line in moved] == [*[reasons["gone"]] * 2, reasons["off"], reasons["team"], reasons["next"]]
        assert metric(host, 'deployment_total{service="gone",status="cancelled"} 2')
        assert {host.record(deploy_id)["status"] for deploy_id in ids["stays"]} == {"Queued"}

        (tmp_path / "go").touch()
        assert [host.wait(deploy_id)["status"] for deploy_id in (held, *ids["stays"])] == ["Succeeded"] * 3
        assert (tmp_path / "trace").read_text() == "held app:1\nstays app:1\nteam app:1\n"


def test_what_newer_files_have_let_in_does_not_end_by_older_ones(tmp_path):
    """A reload may come while the transaction that looks through the queue waits for its turn."""
    problems: list[hookshot.Problem] = []
    config = hookshot.load_config("", "config.toml", problems)
    older, newer = (hookshot.Current(config, hookshot.load_services(text.replace('"@"', '"/"'), "services.toml", config, problems), hookshot.Keyring({}, hookshot.Masker([])))
                    for text in ("", service()))
    store, in_force, told = hookshot.Store(str(tmp_path)), [older], []
    trigger = hookshot.Trigger("127.0.0.1", "hmac_key", None, "r-1")
    made = store.submit(request_of(), trigger, 1, limits=config.limits, on_busy="queue").deployment
    engine = hookshot.Engine(store, lambda: in_force.pop() if in_force else newer, told.append, {})
    engine.withdraw()
    assert told == [] and store.get(made.deploy_id).state == "Queued"
    store.close()


def test_what_waited_and_what_starts_over_end_so_at_a_start_too(tmp_path):
    before = service(HOLD, name="held", head='recovery = "retry"') + service(name="gone") + service(NOTE, name="stays")
    keys = '[limits]\nmax_concurrent_total = 1\n[security]\nhmac_keys = [{}"hmac_key"]\n'
    with running(tmp_path, before, keys.format('"next_key", '), secrets=f"next_key={NEXT_KEY}\n") as host:
        held = host.post({"service": "held", "image": "app:1"}, key=NEXT_KEY.encode()).json["deploy_id"]
        host.wait(held, "Deploying")
        gone, stays = host.deploy(service="gone"), host.deploy(service="stays")
        host.kill()
        host.write(before.replace(service(name="gone"), ""), keys.format(""))
        host.start()
        assert host.wait(gone)["error"] == "service gone is not in services.toml any more"
        record = host.wait(held)
        assert (record["status"], record["error"]) == ("Cancelled", "the key next_key, which asked for it, may not deploy service held any more")
        assert host.wait(stays)["status"] == "Succeeded" and (tmp_path / "trace").read_text() == "held app:1\nstays app:1\n"


# --- keys that come and go


def test_keys_of_every_source_are_rotated_without_a_gap(tmp_path):
    """Two live keys and more, both kinds of signature; what is new signs and what is old does not, from the reload on."""
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    names = ("file_key", "cred_key", "cmd_key", "env_key")
    keys = {name: f"{number:x}0d1e2f3a4b5c6d7" * 4 for number, name in enumerate(names, 1)}

    def put(name: str, value: str | None) -> None:
        path = {"file_key": host.secrets, "cred_key": credentials / "cred_key", "cmd_key": tmp_path / "printed"}[name]
        if value is None:
            path.unlink()
            return
        path.write_text(f"{value}\n" if name == "cred_key" else f"{name}={value}\n")

    def ways(key: str) -> set[int]:
        """Return the answers to both kinds of signature; while secrets are read again, the first may be of the old ones."""
        body = json.dumps({"service": "web", "image": "app:1", "dry_run": True}).encode()
        webhook = hookshot.sign_webhook(key.encode(), body, hookshot.new_message_id(), hookshot.now_ms() // 1000)
        return {host.post(body, key=key.encode()).status, host.request("POST", "/deploy", body, {"Content-Type": "application/json", **webhook}).status}

    def signs(key: str) -> bool:
        found = ways(key)
        assert found in ({200}, {401})
        return found == {200}

    config = '[security]\nhmac_keys = [{}]\n[secrets]\nsource = ["systemd", "file", "command", "env"]\nrequired_secrets = []\nreload_interval = 1\n' \
             f'command = ["cat", "{tmp_path}/printed"]\n'
    host = Host(tmp_path, service(), config.format(", ".join(f'"{name}"' for name in names)))
    with contextlib.closing(host):
        for name in names[:3]:
            put(name, keys[name])
        host.start(env={"HOOKSHOT_ENV_KEY": keys["env_key"], "CREDENTIALS_DIRECTORY": str(credentials)})
        assert all(map(signs, keys.values()))

        old = {name: keys[name] for name in names[:3]}
        for number, name in enumerate(old, 10):
            keys[name] = f"{number:x}f6e5d4c3b2a1908" * 4
            put(name, keys[name])
        # Nobody asked for it: reload_interval has it read.
        wait_until(lambda: all(ways(key) == {200} for key in keys.values()))
        assert not any(map(signs, old.values()))
        told = " ".join(line["message"] for line in events(host, "secrets_reloaded"))
        assert all(f"secret {name}: new value" in told for name in old)

        # One that vanishes stays in force and is told once; that it is there again is told too.
        put("cmd_key", None)
        wait_until(lambda: host.get("/ready").json.get("stale"))
        assert list(host.get("/ready").json["stale"]) == ["secrets"] and metric(host, "hookshot_secrets_last_reload_successful 0")
        assert signs(keys["cmd_key"]) and "secrets:        older" in host.cli("status", env={"HOOKSHOT_HMAC_KEY": keys["env_key"]}).stdout
        put("cmd_key", keys["cmd_key"])
        wait_until(lambda: "stale" not in host.get("/ready").json)
        assert metric(host, "hookshot_secrets_last_reload_successful 1")
        assert len(events(host, "secrets_failed")) == len({line["message"] for line in events(host, "secrets_failed")})
        assert events(host, "secrets_reloaded")[-1]["message"] == "secrets can be read again, and have not changed"

        host.write(service(), config.format('"env_key"'))
        assert reload(host)["changes"] == ["security.hmac_keys: [file_key, cred_key, cmd_key, env_key] -> [env_key]"]
        assert [name for name, key in keys.items() if signs(key)] == ["env_key"]
        said = host.output.read_text() + (host.data / "reload.json").read_text()
        assert not any(key in said for key in (*keys.values(), *old.values()))


def test_a_read_token_that_is_taken_away_ends_what_is_read_with_it(tmp_path):
    """Streams that were let in with it: events, and the log of what still runs. One of the new token goes on."""
    tokens = [f"{number}-token-of-readers-0123456789abcdef" for number in range(2)]

    def stream(path: str, token: str) -> http.client.HTTPResponse:
        link = http.client.HTTPConnection("127.0.0.1", host.port, timeout=support.PATIENCE_S)
        links.callback(link.close)
        link.request("GET", path, headers={"Authorization": f"Bearer {token}"})
        answer = link.getresponse()
        assert answer.status == 200 and answer.read1(100)
        return answer

    with contextlib.ExitStack() as links, running(tmp_path, service(HOLD), '[security]\nread_access = "token"\n', secrets=f"read_token={tokens[0]}\n") as host:
        deploy_id = host.deploy()
        wait_until(lambda: (tmp_path / "trace").exists())
        revoked = [stream(path, tokens[0]) for path in ("/events", f"/logs/{deploy_id}?follow=1")]
        host.secrets.write_text(f"hmac_key={KEY}\nread_token={tokens[1]}\n")
        assert reload(host)["changes"] == ["secret read_token: new value"]
        events_left = stream("/events", tokens[1])
        wait_until(lambda: events(host, "stream_dropped"))
        assert b"event: dropped" in revoked[0].read()
        with pytest.raises(http.client.IncompleteRead):
            revoked[1].read()
        (tmp_path / "go").touch()
        text = b""
        while b'"Succeeded"' not in text:
            assert (piece := events_left.read1(1 << 16)), text
            text += piece
        assert "may not read any more" in events(host, "stream_dropped")[0]["message"]


def test_a_new_certificate_is_told_and_one_that_is_none_is_seen(tmp_path):
    files = support.make_certificates(tmp_path)
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    cert.write_bytes(files.server.read_bytes())
    key.write_bytes(files.server_key.read_bytes())
    key.chmod(0o600)
    config = f'[server]\nlisten = ["127.0.0.1:0", "unix:{tmp_path}/socket"]\n[server.tls]\ncert = "{cert}"\nkey = "{key}"\n'
    with running(tmp_path, service(), config) as host:
        cert.write_bytes(files.renewed.read_bytes())
        assert reload(host)["outcome"] == "refused"  # the key is still that of the old one
        stale = host.cli("status", "--json", env={"HOOKSHOT_URL": f"unix:{tmp_path}/socket"})
        assert list(json.loads(stale.stdout)["stale"]) == ["configuration"]
        key.write_bytes(files.renewed_key.read_bytes())
        assert reload(host)["changes"] == ["server.tls.cert: another file", "server.tls.key: another file"]
