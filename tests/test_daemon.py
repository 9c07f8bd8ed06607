# SPDX-License-Identifier: MPL-2.0
"""DAEMON: start, refusals before the socket opens, reload, secrets, signals, files, two servers."""

import contextlib
import http.client
import json
import os
import signal
import socket
import stat
import threading

import pytest

import hookshot
import support
from support import KEY, Host, running, service, wait_until

NEW_KEY = "c0de" * 4 + "0123456789abcdef" * 3


def refuse(host: Host, *flags: str, env: dict[str, str] | None = None) -> tuple[int, str]:
    """Start a server that should not start; return its exit status and what it said."""
    host.start(*flags, wait=False, env=env)
    code = host.process.wait(support.PATIENCE_S)
    return code, host.output.read_text()


def events(host: Host, name: str) -> list[dict]:
    return [line for line in map(json.loads, host.output.read_text().splitlines()) if line["event"] == name]


def reload(host: Host, event: str = "reloaded") -> None:
    """Send SIGHUP and wait until it is dealt with."""
    before = len(events(host, event))
    host.process.send_signal(signal.SIGHUP)
    wait_until(lambda: len(events(host, event)) > before)


def write_secrets(host: Host, text: str) -> None:
    host.secrets.write_text(text)


# --- before the socket opens

def test_every_problem_of_both_files_and_the_secrets_is_told_at_once(tmp_path):
    host = Host(tmp_path, service('["no-such-program-x"]', '["echo", "{{IMGAE}}"]', head="enabeld = true\non_busy = 7"),
                "[limits]\nmax_total = 3\ncommand_timeout = \"0s\"\n[server]\nworker_threads = 65\n")
    code, said = refuse(host)
    assert code == 78
    for words in ("limits.max_total", "command_timeout", "worker_threads", "IMGAE", "enabeld", "did you mean enabled", "on_busy"):
        assert words in said
    assert str(host.config) in said and str(host.services) in said
    assert "Traceback" not in said and not host.data.exists()


def test_what_the_host_lacks_is_told_at_once(tmp_path):
    host = Host(tmp_path, service('["no-such-program-x"]') + service(name="api").replace('working_dir = "@"',
        'working_dir = "@/none"')
                + service(name="job", head='user = "nobody-of-this-name"'))
    host.secrets.chmod(0o644)
    code, said = refuse(host)
    assert code == 78
    for words in ("no-such-program-x", "/none does not exist", "nobody-of-this-name", "chmod 600"):
        assert words in said
    assert KEY not in said and not host.data.exists()


@pytest.mark.parametrize("secrets, words", [
    ("", "hmac_key is not found"), ("hmac_key=\n", "shorter than 16 bytes"), ("hmac_key=short\n", "shorter than 16 bytes"),
    ("hmac_key=change-me-change-me-change-me\n", "placeholder"), (f"hmac_key={KEY}\ngibberish-{NEW_KEY}\n", "line 2"),
    (f"hmac_key={KEY}\nhmac_key={NEW_KEY}\n", "line 2")])
def test_a_missing_weak_or_broken_secret_stops_the_start_and_is_not_shown(tmp_path, secrets, words):
    host = Host(tmp_path, service())
    write_secrets(host, secrets)
    code, said = refuse(host)
    assert code == 78 and words in said and KEY not in said and NEW_KEY not in said


def test_missing_files_are_told_with_what_to_do(tmp_path):
    host = Host(tmp_path, service())
    host.config.unlink()
    host.services.unlink()
    code, said = refuse(host)
    assert code == 78 and str(host.config) in said and str(host.services) in said and "hookshot init" in said


def test_a_port_that_is_taken_is_told_in_one_line(tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        host = Host(tmp_path, service())
        code, said = refuse(host, "--port", str(other.getsockname()[1]))
    assert code == 78 and len(said.splitlines()) == 1 and "listen" in said


def test_a_data_directory_has_one_server_at_a_time_and_the_holder_is_named(tmp_path):
    with running(tmp_path, service()) as host:
        second = Host(tmp_path / "second", service(), f'[storage]\ndata_dir = "{host.data}"\n')
        code, said = refuse(second)
        assert code == 75 and f"pid {host.process.pid}" in said and len(said.splitlines()) == 1
        assert host.wait(host.deploy())["status"] == "Succeeded"
        host.kill()
        second.start()
        assert len(second.get("/deployments").json["deployments"]) == 1
        second.close()


def test_two_servers_with_directories_of_their_own_know_nothing_of_each_other(tmp_path):
    with running(tmp_path / "a", service()) as one, running(tmp_path / "b", service()) as two:
        one.wait(one.deploy())
        assert len(one.get("/deployments").json["deployments"]) == 1 and two.get("/deployments").json["deployments"] == []


@pytest.mark.parametrize("damage", [b"not a database, but long enough to be taken for one" * 100, b""], ids=["noise", "empty"])
def test_a_database_that_is_none_is_told_and_left_as_it_is(tmp_path, damage):
    with running(tmp_path, service()) as host:
        host.wait(host.deploy())
        host.stop()
        database = host.data / "state.db"
        database.write_bytes(damage)
        if damage:
            code, said = refuse(host)
            assert code == 75 and "restore a backup" in said.splitlines()[-1] and "Traceback" not in said
            assert database.read_bytes() == damage
        else:
            assert host.start().get("/deployments").json["deployments"] == []


def test_flags_override_the_file(tmp_path):
    with socket.socket() as taken, contextlib.closing(Host(tmp_path, service())) as host:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        host.write(service(), f'[server]\nlisten = "127.0.0.1:{taken.getsockname()[1]}"\n')
        host.start("--port", "0", "--bind", "127.0.0.2", "--log-format", "json")
        assert "127.0.0.2" in events(host, "started")[0]["message"]
        with socket.create_connection(("127.0.0.2", host.port)):
            pass


def test_files_are_ours_alone(tmp_path):
    with running(tmp_path, service()) as host:
        host.wait(host.deploy())
        modes = {path.relative_to(tmp_path).as_posix(): stat.S_IMODE(path.stat().st_mode) for path in [host.data,
            *host.data.rglob("*")]}
        assert modes["data"] == modes["data/logs"] == 0o700
        assert len(modes) >= 5 and {mode for name, mode in modes.items() if name not in ("data", "data/logs")} == {0o600}


def test_a_data_directory_that_others_can_read_is_closed(tmp_path):
    (tmp_path / "data").mkdir(mode=0o755)
    (tmp_path / "data").chmod(0o755)
    with running(tmp_path, service()) as host:
        assert stat.S_IMODE(host.data.stat().st_mode) == 0o700


def test_commands_get_the_services_umask_not_the_servers(tmp_path):
    with running(tmp_path, service('["touch", "made"]') + service('["touch", "closed"]', name="api", head='umask = "077"')) as host:
        host.wait(host.deploy())
        host.wait(host.deploy(service="api"))
        assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("made", "closed")] == [0o644, 0o600]


# --- who else could change what runs here


def look_at(host: Host) -> tuple[list[str], list[str]]:
    """Return the errors and the warnings that `validate` and `run` have for this host."""
    problems: list[hookshot.Problem] = []
    paths = str(host.config), str(host.services)
    settings = hookshot.read_settings(*paths, problems)
    hookshot.check_host(settings, *paths, os.environ, problems)
    hookshot.load_keyring(*settings, hookshot.SecretSurroundings({}, None), paths[0], problems)
    return [str(problem) for problem in problems if not problem.is_warning], [str(problem) for problem in problems if problem.is_warning]


@pytest.mark.parametrize("name", ["config", "services"])
def test_a_file_that_every_user_may_write_is_refused(tmp_path, name):
    """Whoever may write services.toml decides what runs. A link is followed, as configuration management makes them."""
    host = Host(tmp_path, service())
    assert look_at(host) == ([], [])
    file = getattr(host, name)
    (tmp_path / "files").mkdir()
    file.rename(tmp_path / "files/kept")
    file.symlink_to("files/kept")
    assert look_at(host) == ([], [])
    (tmp_path / "files/kept").chmod(0o666)
    errors, warnings = look_at(host)
    assert errors == [f"{file}: {tmp_path}/files/kept can be changed by every user of this host (mode 0666); run chmod o-w on it"] and warnings == []
    code, said = refuse(host)
    assert code == 78 and "chmod o-w" in said and not host.data.exists()


def test_a_file_that_its_group_may_read_and_a_folder_as_tmp_are_ordinary(tmp_path):
    host = Host(tmp_path, service())
    host.config.chmod(0o640)
    host.services.chmod(0o664 if host.services.stat().st_gid == os.getegid() else 0o644)
    tmp_path.chmod(0o1777)
    assert look_at(host) == ([], [])


def test_a_folder_in_which_everyone_may_put_another_file_is_warned_of(tmp_path):
    host = Host(tmp_path / "open", service())
    host.folder.chmod(0o777)
    errors, warnings = look_at(host)
    assert errors == [] and [warning.partition(":")[0] for warning in warnings] == [str(path) for path in (host.config, host.services, host.secrets)]
    assert all(f"{host.folder} can be changed by every user of this host (mode 0777); run chmod o-w on it" in warning for warning in warnings)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_what_belongs_to_others_is_warned_of(tmp_path):
    host = Host(tmp_path, service())
    host.data.mkdir()
    os.chown(host.services, 4321, 0)
    os.chown(host.config, 0, 4321)
    host.config.chmod(0o664)
    os.chown(host.data, 4321, 0)
    errors, warnings = look_at(host)
    assert errors == [] and len(warnings) == 3
    assert "can be changed by group 4321 (mode 0664)" in warnings[0] and "services.toml belongs to user 4321, who can change it" in warnings[1]
    assert f"storage.data_dir: {host.data} belongs to user 4321" in warnings[2]


def test_a_data_directory_that_is_everyones_is_refused_and_left_as_it_is(tmp_path):
    """As /tmp: closing it, which is done to a data directory, would harm the whole host."""
    host = Host(tmp_path, service())
    host.data.mkdir()
    host.data.chmod(0o1777)
    code, said = refuse(host)
    assert code == 78 and f"{host.data} is everyone's; choose a folder in it" in said
    assert stat.S_IMODE(host.data.stat().st_mode) == 0o1777


# --- secrets and environment

@pytest.mark.parametrize("name", ["HOOKSHOT_HMAC_KEY", "DEPLOY_RECEIVER_HMAC_KEY"])
def test_a_key_from_the_environment_signs_and_reaches_no_child(tmp_path, name):
    host = Host(tmp_path, service('["env"]', head='inherit_env = ["SOME_WORD"]'), '[secrets]\nsource = "env"\n')
    with contextlib.closing(host):
        host.start(env={name: KEY, "SOME_WORD": "through", "OTHER_WORD": "kept back", "NOTIFY_SOCKET": "/x",
            "CREDENTIALS_DIRECTORY": "/y"})
        [command] = host.wait(host.deploy())["commands"]
        environment = dict(line.partition("=")[::2] for line in command["stdout"].splitlines())
        assert KEY not in command["stdout"] and name not in environment
        assert environment["SOME_WORD"] == "through" and environment["HOOKSHOT_IMAGE"] == "app:1"
        assert not {"OTHER_WORD", "NOTIFY_SOCKET", "CREDENTIALS_DIRECTORY"} & environment.keys()


@pytest.mark.parametrize("source", ['"auto"', '"systemd"', '["env", "systemd"]'])
def test_a_systemd_credential_is_a_secret(tmp_path, source):
    (tmp_path / "credentials").mkdir()
    (tmp_path / "credentials" / "hmac_key").write_text(NEW_KEY + "\n")
    host = Host(tmp_path, service(), f"[secrets]\nsource = {source}\n", key=NEW_KEY)
    host.secrets.unlink()
    with contextlib.closing(host):
        host.start(env={"CREDENTIALS_DIRECTORY": str(tmp_path / "credentials")})
        assert host.wait(host.deploy())["status"] == "Succeeded"


def test_auto_takes_the_file_too_and_the_first_source_wins(tmp_path):
    host = Host(tmp_path, service(), '[secrets]\nsource = "auto"\n', secrets="read_token=a-token-of-the-file-0123456789abcd\n")
    with contextlib.closing(host):
        host.start(env={"HOOKSHOT_HMAC_KEY": NEW_KEY})
        assert host.wait(host.deploy())["status"] == "Succeeded"
        assert host.post({"service": "web", "image": "app:1"}, key=NEW_KEY.encode()).status == 401
        assert host.get("/services", **{"X-Real-IP": "1",
            "Authorization": "Bearer a-token-of-the-file-0123456789abcd"}).status == 200


def test_a_command_that_prints_secrets_is_a_source(tmp_path):
    host = Host(tmp_path, service(), f'[secrets]\nsource = "command"\ncommand = ["echo", "hmac_key={KEY}"]\n')
    host.secrets.unlink()
    with contextlib.closing(host):
        assert host.start().wait(host.deploy())["status"] == "Succeeded"


def test_changed_secrets_come_into_force_without_a_restart(tmp_path):
    with running(tmp_path, service(), "[secrets]\nreload_interval = 1\n") as host:
        write_secrets(host, f"hmac_key={NEW_KEY}\n")
        wait_until(lambda: events(host, "secrets_reloaded"))
        assert host.post({"service": "web", "image": "app:1"}).status == 401
        host.key = NEW_KEY.encode()
        assert host.wait(host.deploy())["status"] == "Succeeded"
        write_secrets(host, "hmac_key=short\n")
        wait_until(lambda: events(host, "secrets_failed"))
        assert host.wait(host.deploy())["status"] == "Succeeded"
        assert KEY not in host.output.read_text() and NEW_KEY not in host.output.read_text()


def test_either_of_two_keys_signs_during_a_rotation(tmp_path):
    with running(tmp_path, service(), '[security]\nhmac_keys = ["hmac_key", "next_key"]\n',
        secrets=f"next_key={NEW_KEY}\n") as host:
        for key, name in ((KEY, "hmac_key"), (NEW_KEY, "next_key")):
            answer = host.post({"service": "web", "image": "app:1"}, key=key.encode())
            assert host.wait(answer.json["deploy_id"])["triggered_by"]["key_id"] == name


# --- signals

def test_sighup_swaps_good_files_whole_and_what_runs_keeps_the_old_ones(tmp_path):
    held = '["sh", "-c", "until [ -e go ]; do kill -0 $PPID || exit; sleep 0.02; done"]'
    with running(tmp_path, service(held, '["echo", "old"]')) as host:
        first, second = host.deploy(), host.deploy()
        host.wait(first, "Deploying")
        host.write(service('["echo", "new"]') + service(name="api"),
            "[limits]\nmax_queue_per_service = 1\n[logging]\nlevel = \"debug\"\n")
        reload(host)
        assert host.get("/services/api").status == 200
        (tmp_path / "go").touch()
        assert [command["stdout"] for command in host.wait(first)["commands"]] == ["", "old\n"]
        assert [command["stdout"] for command in host.wait(second)["commands"]] == ["new\n"]


@pytest.mark.parametrize("file, text", [("services", "[[service]"), ("services", '[[service]]\nname = "web"\n'), ("config",
    "[limits]\nnonsense = 1\n"), ("secrets", "")])
def test_sighup_with_a_broken_file_keeps_the_old_ones_and_says_why(tmp_path, file, text):
    with running(tmp_path, service()) as host:
        getattr(host, file).write_text(text)
        reload(host, "reload_failed")
        assert all(line["level"] == "error" for line in events(host, "reload_failed"))
        assert host.wait(host.deploy())["status"] == "Succeeded" and host.process.poll() is None


def test_a_service_that_is_taken_out_is_unknown_at_once(tmp_path):
    with running(tmp_path, service() + service(name="api")) as host:
        host.write(service())
        reload(host)
        assert host.post({"service": "api", "image": "app:1"}).status == 404 and host.get("/services/api").status == 404


def test_a_changed_address_waits_for_a_restart_and_says_so(tmp_path):
    with running(tmp_path, service()) as host:
        host.write(service(), "[server]\nworker_threads = 2\n")
        reload(host)
        assert any("restart" in line["message"] for line in events(host, "restart_needed"))
        assert host.get("/health").json["deployment_queue"]["workers"] == 4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_ends_an_idle_server_with_0(tmp_path, number):
    with running(tmp_path, service()) as host:
        host.wait(host.deploy())
        assert host.stop(number) == 0
        assert events(host, "stopped") and not (host.data / "state.db-wal").exists()


def test_a_signal_that_another_thread_receives_is_not_lost(tmp_path):
    """The kernel may choose any thread; kill(2) with a thread's own number makes it choose that one."""
    if not os.path.isdir("/proc/self/task"):
        pytest.skip("needs /proc")
    with running(tmp_path, service()) as host:
        other = max(int(name) for name in os.listdir(f"/proc/{host.process.pid}/task"))
        assert other != host.process.pid
        os.kill(other, signal.SIGTERM)
        assert host.process.wait(10.0) == 0


def test_the_log_is_one_json_object_a_line_and_control_characters_are_shown(tmp_path):
    with running(tmp_path, service()) as host:
        host.get("/%1b" + "x")
        host.get("/nothing", **{"User-Agent": "a\x1b[31mb"})
        host.wait(host.deploy())
        host.stop()
        for line in host.output.read_text().splitlines():
            entry = json.loads(line)
            assert {"timestamp", "level", "event", "message"} <= entry.keys() and "\x1b" not in line


def test_no_secret_and_no_body_is_ever_logged(tmp_path):
    canary = "canary-in-a-body"
    with running(tmp_path, service(f'["echo", "{KEY}"]'), '[logging]\nlevel = "debug"\n') as host:
        deploy_id = host.deploy(metadata={"note": canary})
        host.wait(deploy_id)
        host.get("/services?token=" + canary)
        host.post(canary.encode())
        assert "***" in host.log(deploy_id)
        # The metadata is part of the record, so it is in the database and nowhere else.
        for path in [host.output, *host.data.rglob("*")]:
            content = path.read_bytes() if path.is_file() else b""
            assert KEY.encode() not in content
            assert canary.encode() not in content or path.name.startswith("state.db")


def test_deployments_beyond_their_retention_go_with_their_logs(tmp_path):
    with running(tmp_path, service(), "[storage.retention]\nsuccessful_deploys = 2\nfailed_deploys = 1\n") as host:
        ids = [host.deploy() for _ in range(5)]
        host.wait(ids[-1])
        wait_until(lambda: len(host.get("/deployments").json["deployments"]) == 2)
        assert [host.get(f"/status/{deploy_id}").status for deploy_id in ids] == [404, 404, 404, 200, 200]
        assert len(list((host.data / "logs").iterdir())) == 2
        assert host.get("/services/web").json["stats"]["total_deploys"] == 5


# Prints a key, and a value that is new each time. While "slow" exists, the first to ask waits for "go".
SLOW_SECRETS = """
cd "FOLDER"
if [ -e slow ] && mkdir asked 2>/dev/null; then until [ -e go ]; do sleep 0.02; done; fi
echo "hmac_key=KEY"
echo "nonce=nonce-$$-$(date +%N)"
"""


def test_a_stop_in_the_middle_of_deploys_waits_for_no_worker_that_sleeps(tmp_path):
    """Workers that a deploy on its way kept from going must be woken when it is accepted; they would sleep for 30 s."""
    with running(tmp_path, service(), "[server]\nshutdown_timeout = 60\nworker_threads = 8\n") as host:
        over = threading.Event()

        def flood() -> None:
            with contextlib.suppress(OSError, http.client.HTTPException):
                while not over.is_set():
                    host.post({"service": "web", "image": "app:1"})

        threads = [threading.Thread(target=flood) for _ in range(3)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(host.get("/deployments").json["deployments"]) > 20)
        try:
            assert host.stop(patience_s=20) == 0
        finally:
            over.set()
            for thread in threads:
                thread.join()


def test_a_slow_reading_of_secrets_does_not_undo_a_reload(tmp_path):
    """The command that brings the secrets takes its time; meanwhile SIGHUP brings a new service, which stays."""
    host = Host(tmp_path, service(), '[secrets]\nsource = "command"\nreload_interval = 1\ncommand = ["sh", "%s/secrets.sh"]\n' % tmp_path)
    (tmp_path / "secrets.sh").write_text(SLOW_SECRETS.replace("FOLDER", str(tmp_path)).replace("KEY", KEY))
    with contextlib.closing(host):
        host.start()
        (tmp_path / "slow").touch()
        wait_until(lambda: (tmp_path / "asked").exists())
        host.services.write_text((service() + service(name="api")).replace("@", str(tmp_path)))
        host.process.send_signal(signal.SIGHUP)
        with contextlib.suppress(AssertionError):
            wait_until(lambda: host.get("/services/api").status == 200, patience_s=1)
        before = len(events(host, "secrets_reloaded"))
        (tmp_path / "go").touch()
        wait_until(lambda: len(events(host, "secrets_reloaded")) > before and events(host, "reloaded"))
        wait_until(lambda: len(events(host, "secrets_reloaded")) > before + 1)
        assert host.get("/services/api").status == 200
