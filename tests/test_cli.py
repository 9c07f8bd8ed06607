# SPDX-License-Identifier: MPL-2.0
"""CLIENT and CLI: every command as a program of its own, its output, and the exit status that tells what happened."""

import contextlib
import http.client
import http.server
import json
import os
import pathlib
import pty
import re
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading

import pytest

import hookshot
import support
from support import KEY, PROGRAM, Host, program, running, service, wait_until

TOKEN = "t0k3n-of-a-reader-0123456789abcdefgh"
HOLD = '["sh", "-c", "echo begin; until [ -e go ]; do kill -0 $PPID || exit; sleep 0.02; done; echo end"]'
SICK = "[service.healthcheck]\ninitial_delay = 0\ninterval = 0\nmax_attempts = 1\nsuccess_threshold = 1\ncommands = [[\"false\"]]\n"
ROLLS = SICK.replace('["false"]', '["test", "-e", "well"]') + '[service.rollback]\ncommands = [["touch", "well"]]\n'
MISSING = "/nonexistent/config.toml"


def run(*args: str, env: dict[str, str] | None = None, stdin: bytes = b"", cwd: object = None,
    **options) -> "subprocess.CompletedProcess[str]":
    """Run the program without any variables of this machine's own hookshot."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HOOKSHOT_")} | (env or {})
    done = subprocess.run([*program(), *map(str, args)], input=stdin, capture_output=True, env=environment,
        cwd=cwd,
                          timeout=support.PATIENCE_S * 2, **options)
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def is_one_sentence(text: str) -> bool:
    return len(text.strip().splitlines()) == 1 and "Traceback" not in text


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    services = service('["echo", "hello"]') + service('["sh", "-c", "exit 3"]', name="bad") \
        + service(name="sick", tables=ROLLS) + service('["false"]', name="worse",
            tables='[service.rollback]\ncommands = [["false"]]\n') \
        + service(name="env").replace("[service.security]\n", '[service.security]\nallowed_env_overrides = ["COLOUR"]\n')
    with running(tmp_path_factory.mktemp("cli"), services, "[server]\nworker_threads = 8\n") as host:
        yield host


# --- without a server

def test_keygen_prints_a_fresh_key_and_nothing_else():
    one, two = run("keygen"), run("keygen")
    assert re.fullmatch(r"[0-9a-f]{64}\n", one.stdout) and one.stdout != two.stdout
    assert (one.returncode, one.stderr) == (0, "")


@pytest.mark.parametrize("args", [("version",), ("--version",)])
def test_version_tells_version_python_sqlite_and_platform(args):
    done = run(*args)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 1
    for words in (hookshot.__version__, "Python 3.", "SQLite 3.", os.uname().sysname):
        assert words in done.stdout
    document = json.loads(run("version", "--json").stdout)
    assert document["version"] == hookshot.__version__ and re.fullmatch("[0-9a-f]{64}", document["digest"])


def test_init_writes_files_that_validate_and_a_private_key(tmp_path):
    folder = tmp_path / "a folder"
    done = run("init", folder)
    assert done.returncode == 0
    assert done.stdout.splitlines() == [str(folder / name) for name in ("config.toml", "services.toml", "secrets")]
    assert stat.S_IMODE((folder / "secrets").stat().st_mode) == 0o600
    assert re.search(r"^hmac_key=[0-9a-f]{64}$", (folder / "secrets").read_text(), re.MULTILINE)
    found = run("-c", folder / "config.toml", "validate")
    assert (found.returncode, found.stderr) == (0, "") and "valid" in found.stdout


@pytest.mark.parametrize(("asked", "same"), [(["help"], ["--help"]), (["help", "deploy"], ["deploy", "--help"])])
def test_help_is_a_command_too(asked, same):
    found, wanted = (subprocess.run([*program(), *words], capture_output=True, text=True) for words in (asked, same))
    assert (found.returncode, found.stdout, found.stderr) == (0, wanted.stdout, "") and "usage: hookshot" in found.stdout


@pytest.mark.parametrize("old_python", [False, True])
def test_what_init_says_comes_next_can_be_pasted(tmp_path, old_python):
    folder, first = tmp_path / "a folder", tmp_path / "first in PATH"
    folder.mkdir()
    first.mkdir()
    shutil.copy(PROGRAM, folder)
    if old_python:
        (first / "python3").write_text("#!/bin/sh\nexit 9\n")
        (first / "python3").chmod(0o755)
    env = {**os.environ, "PATH": f"{first}:{os.environ['PATH']}"}
    said = subprocess.run([sys.executable, "hookshot.py", "init"], cwd=folder, env=env, capture_output=True, text=True, check=True).stderr
    line = next(line for line in said.splitlines() if line.endswith(" validate"))
    done = subprocess.run(["sh", "-c", line.removeprefix("Next:")], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["config.toml", "services.toml", "secrets"])
def test_init_overwrites_nothing(tmp_path, name):
    (tmp_path / name).write_text("mine")
    done = run("init", tmp_path)
    assert done.returncode == 73 and is_one_sentence(done.stderr) and name in done.stderr
    assert (tmp_path / name).read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_init_follows_no_link(tmp_path):
    (tmp_path / "secrets").symlink_to(tmp_path / "elsewhere")
    assert run("init", tmp_path).returncode == 73 and not (tmp_path / "elsewhere").exists()


def test_validate_prints_every_problem(tmp_path):
    host = Host(tmp_path, service('["no-such-program-x"]', '["echo", "{{IMGAE}}"]'), '[limits]\nmax_total = 1\n"\\u001b[31m" = 1\n')
    done = run("-c", host.config, "validate")
    assert done.returncode == 78 and done.stdout == ""
    # Nothing that a terminal would obey.
    for words in ("max_total", "IMGAE", str(host.config), str(host.services), "limits.\\x1b[31m"):
        assert words in done.stderr
    document = json.loads(run("-c", host.config, "validate", "--json").stdout)
    assert document["valid"] is False and len(document["problems"]) == 3
    assert not host.data.exists()


@pytest.mark.parametrize("args", [("nonsense",), ("run", "--port", "70000"), ("deploy",), ("history", "-n", "0"), ("--nonsense",),
    ("run", "--log-format", "xml")])
def test_a_wrong_command_line_is_told_with_2(args):
    done = run(*args)
    assert done.returncode == 2 and done.stdout == "" and "usage:" in done.stderr


@pytest.mark.parametrize("name", ["status", "logs", "cancel", "retry"])
def test_an_empty_id_is_told_before_anything_is_asked(name):
    done = run(name, "")
    assert done.returncode == 2 and "ID: is empty; `hookshot history` has the ids" in done.stderr


@pytest.mark.parametrize("args", [("--help",), ("deploy", "--help")])
def test_help_is_data(args):
    done = run(*args)
    assert (done.returncode, done.stderr) == (0, "") and "usage:" in done.stdout


def test_every_command_is_in_the_help():
    assert set(hookshot.COMMANDS) <= set(re.findall(r"^    ([\w-]+) ", run("--help").stdout, re.MULTILINE))


@pytest.mark.parametrize("args", [("run",), (), ("validate",), ("-q", "run")])
def test_a_missing_configuration_is_told_with_78(args):
    done = run(*args, env={"HOOKSHOT_CONFIG": MISSING})
    assert done.returncode == 78 and MISSING in done.stderr and "Traceback" not in done.stderr


def test_no_command_is_run(tmp_path):
    host = Host(tmp_path, service())
    with contextlib.closing(host):
        host.start(argv=("sh", "-c", 'exec "$0" "$1" "$2" "$3" "$4" "$5"', sys.executable, str(PROGRAM)))
        assert host.get("/ready").status == 200
        assert "run" not in pathlib.Path(f"/proc/{host.process.pid}/cmdline").read_text().split("\0")


def test_global_options_stand_before_and_after_the_command(tmp_path):
    host = Host(tmp_path, service())
    config, services = str(host.config), str(host.services)
    for args in (("-c", config, "-s", services, "validate"), ("validate", "-c", config, "-s", services), ("--config", config,
        "validate", "--services", services)):
        assert run(*args).returncode == 0
    assert run("validate", env={"HOOKSHOT_CONFIG": config, "HOOKSHOT_SERVICES": services}).returncode == 0
    assert run("validate", "-c", config, env={"HOOKSHOT_CONFIG": "/nonexistent", "HOOKSHOT_SERVICES": services}).returncode == 0


def test_a_signature_can_be_made_for_curl(host, tmp_path):
    body = b'{"service": "web", "image": "app:1"}\n'
    (tmp_path / "body").write_bytes(body)
    done = host.cli("sign", str(tmp_path / "body"))
    name, value = done.stdout.strip().split(": ")
    assert (done.returncode, done.stderr, host.cli("sign", stdin=body).stdout) == (0, "", done.stdout)
    answer = host.request("POST", "/deploy", body, {name: value})
    assert answer.status == 202 and host.wait(answer.json["deploy_id"])["status"] == "Succeeded"


@pytest.mark.parametrize("how", ["env", "flag", "variable"])
def test_a_key_comes_from_the_environment_or_a_file(tmp_path, how):
    (tmp_path / "key").write_text(KEY + "\n")
    env = {"env": {"HOOKSHOT_HMAC_KEY": KEY}, "flag": {}, "variable": {"HOOKSHOT_KEY_FILE": str(tmp_path / "key")}}[how]
    done = run("sign", *(("--key-file", tmp_path / "key") if how == "flag" else ()), stdin=b"body", env=env)
    assert done.stdout == f"X-Hub-Signature-256: {hookshot.sign(KEY.encode(), b'body')}\n"


def test_signing_without_a_key_is_not_permitted():
    done = run("sign", stdin=b"body")
    assert done.returncode == 77 and done.stdout == "" and is_one_sentence(done.stderr)


def test_a_client_beside_no_configuration_says_which_it_looked_for(tmp_path):
    done = run("sign", stdin=b"body", env={"HOME": str(tmp_path)})
    if not os.path.exists("/etc/hookshot/config.toml"):
        assert "/etc/hookshot/config.toml: cannot be read, and no other is named with -c or HOOKSHOT_CONFIG" in done.stderr


# --- a deploy and its outcome

OUTCOMES = {"web": (0, "Succeeded"), "bad": (10, "Failed"), "sick": (11, "RolledBack"), "worse": (12, "RollbackFailed")}


@pytest.mark.parametrize("name", OUTCOMES)
def test_the_exit_status_tells_the_outcome(host, name):
    (host.folder / "well").unlink(missing_ok=True)
    code, status = OUTCOMES[name]
    done = host.cli("deploy", name, "app:2", "--previous-image", "app:1")
    assert done.returncode == code and status in done.stderr.splitlines()[-1]
    # stdout is the log, line for line; talk is on stderr.
    deploy_id = re.search(r" as (\S+)$", done.stderr, re.MULTILINE)[1]
    assert done.stdout == host.log(deploy_id)


@pytest.mark.parametrize("name", OUTCOMES)
def test_json_is_all_there_is_on_stdout(host, name):
    (host.folder / "well").unlink(missing_ok=True)
    done = host.cli("deploy", name, "app:2", "--previous-image", "app:1", "--json")
    document = json.loads(done.stdout)
    assert (done.returncode, document["status"]) == OUTCOMES[name] and "step 1 of 1" in done.stderr


def test_metadata_overrides_and_an_id_go_along(host):
    done = host.cli("deploy", "env", "app:1", "--meta", "sha=abc=", "--meta", "pr=7", "--env", "COLOUR=red", "--id", "cli-1")
    assert done.returncode == 0
    assert host.record("cli-1")["metadata"] == {"sha": "abc=", "pr": "7"}
    again = host.cli("deploy", "env", "app:1", "--meta", "sha=abc=", "--meta", "pr=7", "--env", "COLOUR=red", "--id", "cli-1")
    assert again.returncode == 0 and "known already" in again.stderr
    assert host.cli("deploy", "env", "app:2", "--id", "cli-1").returncode == 65


def test_no_wait_prints_the_id_and_leaves(tmp_path):
    with running(tmp_path, service(HOLD)) as host:
        done = host.cli("deploy", "web", "app:1", "--no-wait")
        deploy_id = done.stdout.strip()
        assert done.returncode == 0 and host.record(deploy_id)["status"] != "Succeeded"
        document = json.loads(host.cli("deploy", "web", "app:1", "--no-wait", "--json").stdout)
        assert document["status"] == "Queued"
        late = host.cli("deploy", "web", "app:1", "--timeout", "1")
        assert late.returncode == 14 and "still" in late.stderr.splitlines()[-1] and "trying again" not in late.stderr
        # A program that waited in vain needs the id all the same.
        late = host.cli("deploy", "web", "app:1", "--timeout", "1", "--json", "--id", "late")
        assert late.returncode == 14 and json.loads(late.stdout)["deploy_id"] == "late"
        (tmp_path / "go").touch()
        assert host.wait(document["deploy_id"])["status"] == "Succeeded"


def test_a_superseded_deploy_exits_with_13(tmp_path):
    with running(tmp_path, service(HOLD, head='on_busy = "replace"')) as host:
        host.wait(host.deploy(), "Deploying")
        follower = threading.Thread(target=lambda: codes.append(host.cli("deploy", "web", "app:2", "--id", "old").returncode))
        codes: list[int] = []
        follower.start()
        wait_until(lambda: host.get("/status/old").status == 200)
        newest = host.deploy("app:3")
        follower.join(support.PATIENCE_S)
        (tmp_path / "go").touch()
        assert codes == [13] and host.wait(newest)["status"] == "Succeeded"


def test_a_dry_run_shows_the_plan_and_runs_nothing(host):
    before = host.get("/deployments").json
    done = host.cli("deploy", "web", "app:1", "--dry-run")
    assert done.returncode == 0 and "echo hello" in done.stdout and "nothing has run" in done.stdout
    assert json.loads(host.cli("deploy", "web", "app:1", "-n", "--json").stdout)["dry_run"] is True
    assert host.get("/deployments").json == before


@pytest.mark.parametrize("args, env, code", [
    (("deploy", "web", "evil:1"), {}, 65), (("deploy", "nowhere", "app:1"), {}, 65), (("deploy", "web", "app:1", "--env", "PATH=x"),
    {}, 65),
    (("status", "none"), {}, 65), (("logs", "none"), {}, 65), (("logs", "-f", "none"), {}, 65), (("status", "../services"), {}, 65),
    (("deploy", "web", "app:1", "--meta", "x"), {}, 2), (("deploy", "web", "app:1", "--url", "ftp://x"), {}, 2),
    (("deploy", "web", "app:1"), {"HOOKSHOT_HMAC_KEY": "f" * 20 + KEY}, 77), (("sign", "/nonexistent"), {}, 2)])
def test_a_refusal_is_one_sentence_and_an_exit_status(host, args, env, code):
    done = host.cli(*args, env=env)
    assert (done.returncode, done.stdout) == (code, "") and is_one_sentence(done.stderr)


def test_what_a_server_was_asked_and_did_not_answer_may_be_carried_out_yet():
    """As behind a socket unit whose service does not start."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = hookshot.Client(f"http://127.0.0.1:{silent.getsockname()[1]}", KEY.encode(), None)
        with pytest.raises(hookshot.HookshotError, match="has not answered within 0.2 s; what it was asked may be carried out yet"), \
                client._open("POST", "/deploy", b"{}", {}, 0.2):
            pass


def test_an_unreachable_server_is_told_with_69():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        for args in (("deploy", "web", "app:1"), ("services",), ("status", "x"), ("logs", "x")):
            done = run(*args, "--url", url, env={"HOOKSHOT_HMAC_KEY": KEY})
            assert done.returncode == 69 and url in done.stderr and is_one_sentence(done.stderr)


def test_something_else_than_a_hookshot_server_is_told_with_69():
    with socket.create_server(("127.0.0.1", 0)) as server:
        def answer():
            link, _ = server.accept()
            with link:
                link.recv(1 << 16)
                link.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\nConnection: close\r\n\r\n<html>")

        threading.Thread(target=answer, daemon=True).start()
        done = run("services", "--url", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert done.returncode == 69 and "Hookshot" in done.stderr and is_one_sentence(done.stderr)


def test_busy_and_limited_are_told_with_75(tmp_path):
    with running(tmp_path, service(HOLD, head='on_busy = "reject"')) as host:
        host.deploy()
        assert host.cli("deploy", "web", "app:2").returncode == 75
    with running(tmp_path / "2", service(), "[security]\nrate_limit = 1\n") as host:
        host.deploy()
        assert host.cli("deploy", "web", "app:2").returncode == 75


def test_a_client_that_may_not_read_learns_the_outcome_all_the_same(tmp_path):
    text = service() + service('["false"]', name="bad")
    with running(tmp_path, text, '[security]\nread_access = "token"\n', secrets=f"read_token={TOKEN}\n") as host:
        env = {"HOOKSHOT_HMAC_KEY": KEY}
        url = f"http://127.0.0.1:{host.port}"
        assert run("deploy", "web", "app:1", "--url", url, env=env).returncode == 0
        done = run("deploy", "bad", "app:1", "--url", url, env=env)
        assert done.returncode == 10 and "exited with status 1" in done.stderr
        refused = run("services", "--url", url)
        assert refused.returncode == 77 and is_one_sentence(refused.stderr)
        assert run("services", "--url", url, env={"HOOKSHOT_READ_TOKEN": TOKEN}).returncode == 0


@pytest.mark.parametrize("config, env", [("", {}), ('[security]\nread_access = "token"\n',
    {"HOOKSHOT_READ_TOKEN": "none-of-theirs-0123456789"})])
def test_a_followed_deploy_survives_a_restart_of_the_server(tmp_path, config, env):
    with running(tmp_path, service(HOLD, head='recovery = "retry"'), config, secrets=f"read_token={TOKEN}\n") as host:
        port = str(host.port)
        codes: list[int] = []
        follower = threading.Thread(target=lambda: codes.append(host.cli("deploy", "web", "app:1", "--id", "long", env=env,
            patience_s=60).returncode))
        follower.start()
        authorized = {"Authorization": f"Bearer {TOKEN}"}
        wait_until(lambda: (answer := host.get("/status/long", **authorized)).status == 200 and answer.json["progress"]["phase"])
        host.kill()
        host.start("--port", port)
        (tmp_path / "go").touch()
        follower.join(60)
        assert codes == [0]


# --- reading

def test_status_shows_a_deployment_and_its_commands(host):
    deploy_id = host.deploy(service="bad")
    record = host.wait(deploy_id)
    done = host.cli("status", deploy_id)
    assert done.returncode == 0 and done.stderr == ""
    for words in (deploy_id, "Failed", "exited with status 3", "deploy  1"):
        assert words in done.stdout
    assert json.loads(host.cli("status", deploy_id, "--json").stdout) == record


def test_history_lists_newest_first(host):
    ids = [host.deploy(service=name) for name in ("web", "bad")]
    for deploy_id in ids:
        host.wait(deploy_id)
    rows = [line.split()[0] for line in host.cli("history").stdout.splitlines()]
    assert rows[:3] == ["DEPLOYMENT", ids[1], ids[0]]
    assert host.cli("history", "web", "-n", "1").stdout.splitlines()[1].startswith(ids[0])
    assert all("Failed" in line for line in host.cli("history", "--status", "Failed").stdout.splitlines()[1:])
    assert json.loads(host.cli("history", "--json", "-n", "1").stdout)["deployments"][0]["deploy_id"] == ids[1]
    # The name is mistyped, or nothing of it is kept.
    assert host.cli("history", "wbe").stderr == "there are no deployments of wbe; `hookshot services` has the names\n"
    none = host.cli("history", "wbe", "--status", "Failed")
    assert none.returncode == 0 and none.stderr == "there are no deployments of wbe in state Failed; `hookshot services` has the names\n"


def test_logs_prints_the_log_and_follow_tells_the_outcome(host):
    deploy_id = host.deploy(service="bad")
    host.wait(deploy_id)
    log = host.log(deploy_id)
    assert host.cli("logs", deploy_id).stdout == log
    assert host.cli("logs", deploy_id, "--tail", "1").stdout == log.splitlines(keepends=True)[-1]
    followed = host.cli("logs", "-f", deploy_id)
    assert (followed.returncode, followed.stdout) == (10, log)


def test_services_lists_every_service(host):
    done = host.cli("services")
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["SERVICE", "bad", "env", "sick", "web", "worse"]
    assert json.loads(host.cli("services", "--json").stdout) == host.get("/services").json


def test_control_characters_of_a_command_do_not_reach_the_terminal(tmp_path):
    with running(tmp_path, service(r'''["printf", "\\033]0;owned\\007\\033[2J%s\\n", "shown"]''')) as host:
        done = host.cli("deploy", "web", "app:1")
        assert "shown" in done.stdout and "\x1b" not in done.stdout + done.stderr and "\x07" not in done.stdout


# --- being a good program

def test_a_reader_that_has_enough_is_no_failure(host):
    for _ in range(3):
        host.wait(host.deploy())
    environment = {**os.environ, "HOOKSHOT_URL": f"http://127.0.0.1:{host.port}"}
    with subprocess.Popen([*program(), "history"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=environment) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait(support.PATIENCE_S) == 0


def test_output_that_cannot_be_written_is_told_with_73():
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    with open("/dev/full", "wb") as full:
        done = subprocess.run([*program(), "keygen"], stdout=full, stderr=subprocess.PIPE,
            timeout=support.PATIENCE_S)
    assert done.returncode == 73 and is_one_sentence(done.stderr.decode())


def on_terminal(*args: str, env: dict[str, str]) -> tuple[int, str]:
    """Run with stderr on a terminal; return the exit status and what the terminal got."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", **env}
    environment = {name: value for name, value in environment.items() if value}
    process = subprocess.Popen([*program(), *args], stdout=subprocess.DEVNULL, stderr=theirs, env=environment,
        start_new_session=True)
    os.close(theirs)
    got = b""
    with contextlib.suppress(OSError):  # EIO: the last one who had the terminal open is gone
        while select.select([ours], [], [], support.PATIENCE_S)[0] and (block := os.read(ours, 1 << 16)):
            got += block
            if b"listens on" in block:
                process.send_signal(signal.SIGTERM)
    try:
        return process.wait(1), got.decode()
    finally:
        process.kill()
        process.wait()
        os.close(ours)


@pytest.mark.parametrize("env, coloured", [({"NO_COLOR": ""}, True), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": "", "TERM": "dumb"},
    False)])
def test_colour_only_on_a_terminal_whose_user_wants_it(tmp_path, env, coloured):
    host = Host(tmp_path, service())
    code, got = on_terminal("-c", str(host.config), "run", "--log-format", "pretty", env=env)
    assert code == 0 and "listens on" in got and ("\x1b[" in got) == coloured


def test_a_terminal_gets_a_progress_line_that_is_gone_at_the_end(host):
    code, got = on_terminal("deploy", "web", "app:1", "-c", str(host.config), env={"HOOKSHOT_URL": f"http://127.0.0.1:{host.port}"})
    assert code == 0 and re.search(r"\r\x1b\[Kweb  ", got)
    assert re.search(r"\r\x1b\[Kweb app:1: Succeeded[^\r]*\r\n$", got)


def test_an_interrupted_follower_leaves_the_deployment_running(tmp_path):
    with running(tmp_path, service(HOLD)) as host:
        environment = {**os.environ, "HOOKSHOT_URL": f"http://127.0.0.1:{host.port}"}
        process = subprocess.Popen([*program(), "deploy", "web", "app:1", "--id", "left", "-c", str(host.config)],
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
        while b"begin" not in process.stdout.readline():
            pass
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=support.PATIENCE_S)[1].decode()
        assert process.returncode == 130 and "goes on without you" in said and "Traceback" not in said
        (tmp_path / "go").touch()
        assert host.wait("left")["status"] == "Succeeded"


# --- demo

@pytest.fixture
def public_folder():
    """A folder with spaces in its name that every user may enter, with the program in it."""
    with tempfile.TemporaryDirectory(prefix="hookshot test ") as name:
        folder = pathlib.Path(name)
        folder.chmod(0o755)
        shutil.copy(PROGRAM, folder / "hookshot.py")
        (folder / "hookshot.py").chmod(0o644)
        (folder / "tmp dir").mkdir()
        (folder / "tmp dir").chmod(0o1777)
        yield folder


def find_python(**identity) -> str:
    """Return a Python that a user can run (one in root's home is of no use to others), or skip."""
    for path in dict.fromkeys((sys.executable, os.path.realpath(sys.executable), "/usr/bin/python3", "/usr/local/bin/python3")):
        with contextlib.suppress(OSError):
            check = "import sys, sqlite3, socket; sys.exit(sys.version_info < (3, 11))"
            if subprocess.run([path, "-c", check], capture_output=True, cwd="/", **identity).returncode == 0:
                return path
    pytest.skip("no Python here that an ordinary user can run")


@pytest.mark.parametrize("user", ["this user", "an ordinary user"])
def test_the_demo_shows_a_success_and_a_rollback_to_anyone(public_folder, user):
    if user == "an ordinary user" and os.geteuid() != 0:
        pytest.skip("this user is one")
    identity = {"user": 65534, "group": 65534, "extra_groups": []} if user == "an ordinary user" else {}
    environment = {"PATH": os.environ["PATH"], "TMPDIR": str(public_folder / "tmp dir"), "HOOKSHOT_URL": "http://192.0.2.1",
        "HOOKSHOT_HMAC_KEY": KEY}
    done = subprocess.run([find_python(**identity), "hookshot.py", "demo", "--once"], cwd=public_folder, env=environment,
        capture_output=True,
                          timeout=support.PATIENCE_S * 2, **identity)
    said = done.stdout.decode()
    assert done.returncode == 0, said + done.stderr.decode()
    assert "demo/web:1.0: Succeeded" in said and "demo/web:2.0-broken: RolledBack" in said and "http://127.0.0.1:" in said
    assert list((public_folder / "tmp dir").iterdir()) == [] and not (public_folder / "data").exists()


def test_the_demo_stays_until_it_is_interrupted(public_folder):
    process = subprocess.Popen([sys.executable, "hookshot.py", "demo"], cwd=public_folder, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE)
    url = ""
    while b"Press Ctrl-C" not in (line := process.stdout.readline()):
        assert line, process.stderr.read()
        url = (re.search(rb"http://[0-9.:]+", line) or [url])[0]
    with contextlib.closing(http.client.HTTPConnection(url.decode().removeprefix("http://"), timeout=support.PATIENCE_S)) as link:
        link.request("GET", "/services")
        assert json.loads(link.getresponse().read())["services"][0]["stats"]["total_deploys"] == 2
    process.send_signal(signal.SIGINT)
    assert process.wait(support.PATIENCE_S) == 0
    process.communicate()


# --- whatever happens while it is followed

def test_a_rate_limit_met_while_following_is_waited_out(tmp_path):
    """75 would tell a CI to deploy again, though the first deployment runs."""
    with running(tmp_path, service('["echo", "hello"]'), "[security]\nrate_limit = 20\n") as host:
        while int(host.get("/nothing").headers["ratelimit"].partition("r=")[2].partition(";")[0]) > 1:
            pass
        done = host.cli("deploy", "web", "app:1")
        assert done.returncode == 0 and "hello" in done.stdout and "Succeeded" in done.stderr
        assert "RATE_LIMIT_EXCEEDED" in host.output.read_text()


def test_a_deploy_that_was_accepted_never_ends_like_a_refusal(tmp_path):
    """The server is restarted with another key while it runs: nothing can be asked any more, but it was accepted."""
    with running(tmp_path, service(HOLD), '[security]\nread_access = "token"\n', secrets=f"read_token={TOKEN}\n") as host:
        key = tmp_path / "key"
        key.write_text(KEY)
        process = subprocess.Popen([*program(), "deploy", "web", "app:1", "--id", "orphan", "--url", host.urls[0],
                                    "--key-file", str(key)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                   env={name: value for name, value in os.environ.items() if not name.startswith("HOOKSHOT_")})
        wait_until(lambda: "deploy_repeated" in host.output.read_text())  # it asks for the outcome, for want of the token
        host.secrets.write_text(f"hmac_key={KEY[1:]}\nread_token={TOKEN}\n")
        host.kill()
        host.start("--port", str(host.port))
        said = process.communicate(timeout=support.PATIENCE_S * 2)[1]
        assert process.returncode == 14 and "orphan was accepted" in said and "hookshot status orphan" in said and "Traceback" not in said
        assert "trying again" in said


@contextlib.contextmanager
def answering(*answers: tuple[int, bytes]):
    """Give the URL of a server that gives these answers in turn, the last one for ever, and the list of what it was asked."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self) -> None:
            asked.append(self.path)
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, body = answers[min(len(asked), len(answers)) - 1]
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = answer
        log_message = lambda self, *args: None

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", asked
        finally:
            server.shutdown()
            thread.join()


ACCEPTED = (202, b'{"deploy_id": "x", "service": "web", "status": "Queued", "image": "app:1", "position": 1}')
UNREADABLE = (401, b'{"code": "AUTHENTICATION_ERROR", "error": "reading needs the bearer token"}')


@pytest.mark.parametrize("last", [(502, b'{"message": "Bad Gateway"}'), (200, b""), (202, b"[]"), ACCEPTED, (502, b"<html>")], ids=str)
def test_a_follower_is_patient_with_answers_that_come_too_soon(last):
    with answering(ACCEPTED, UNREADABLE, last) as (url, asked):
        done = run("deploy", "web", "app:1", "--id", "x", "--url", url, "--timeout", "3", env={"HOOKSHOT_HMAC_KEY": KEY})
    assert done.returncode == 14 and "Traceback" not in done.stderr and "hookshot status x" in done.stderr
    assert "HOOKSHOT_READ_TOKEN" in done.stderr
    assert 3 <= len(asked) <= 8


@pytest.mark.parametrize("answer", [(404, b'{"detail": "x"}'), (502, b'{"message": "x"}'), (200, b"null"), (200, b"[1]"), (200, b"")], ids=str)
@pytest.mark.parametrize("args", [("deploy", "web", "app:1"), ("status", "x"), ("services",), ("history",)], ids=" ".join)
def test_another_server_is_told_and_is_no_bug(args, answer):
    with answering(answer) as (url, _):
        done = run(*args, "--url", url, env={"HOOKSHOT_HMAC_KEY": KEY})
    assert done.returncode == 69 and is_one_sentence(done.stderr) and url in done.stderr


@pytest.mark.parametrize("env, flags", [({}, ("--url", "http://a..b")), ({}, ("--url", "http://127.0.0.1:9/\xfc")),
                                        ({"HOOKSHOT_READ_TOKEN": "\u2603" * 20}, ("--url", "http://127.0.0.1:9")),
                                        ({"HOOKSHOT_READ_TOKEN": "a\nb"}, ("--url", "http://127.0.0.1:9"))], ids=str)
def test_what_cannot_be_sent_is_told_with_2_or_69(env, flags):
    done = run("services", *flags, env=env)
    assert done.returncode in (2, 69) and is_one_sentence(done.stderr) and "bug" not in done.stderr


def test_a_server_that_answers_when_it_is_over_is_followed_all_the_same(tmp_path):
    """deploy_response = "completed": the client asks for the id first, and is not timed out by a long deployment."""
    with running(tmp_path, service(HOLD), '[server]\ndeploy_response = "completed"\n') as host:
        done = host.cli("deploy", "web", "app:1", "--no-wait")
        deploy_id = done.stdout.strip()
        assert done.returncode == 0 and "accepted" in done.stderr and host.record(deploy_id)["status"] != "Succeeded"
        (tmp_path / "go").touch()
        again = host.cli("deploy", "web", "app:1", "--id", deploy_id)
        assert again.returncode == 0 and "known already" in again.stderr and "Succeeded" in again.stderr
        other = host.cli("deploy", "web", "app:2")
        assert other.returncode == 0 and "accepted" in other.stderr and "known already" not in other.stderr


@pytest.mark.parametrize("key", [KEY + "==", "abcDEF012_-" * 4 + "==", "whsec_" + "QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVo=" ])
def test_a_key_may_be_base64(tmp_path, key):
    file = tmp_path / "key"
    file.write_text(key + "\n")
    assert run("deploy", "web", "app:1", "--url", "http://127.0.0.1:9", "--key-file", file).returncode == 69


@pytest.mark.parametrize("text", ["hmac_key={key}\n", "# secrets\nhmac_key={key}\n", "{key}\n{key}\n",
                                  "-----BEGIN PRIVATE KEY-----\n{key}\n-----END PRIVATE KEY-----\n"])
def test_a_file_that_holds_more_than_a_key_is_told(tmp_path, text):
    file = tmp_path / "key"
    file.write_text(text.replace("{key}", KEY))
    done = run("deploy", "web", "app:1", "--url", "http://127.0.0.1:9", "--key-file", file)
    assert done.returncode == 78 and is_one_sentence(done.stderr) and "holds more than a key" in done.stderr and KEY not in done.stderr


def test_a_key_of_the_environment_is_looked_at_before_it_signs():
    done = run("deploy", "web", "app:1", "--url", "http://127.0.0.1:9", env={"HOOKSHOT_HMAC_KEY": "short"})
    assert done.returncode == 78 and is_one_sentence(done.stderr) and "HOOKSHOT_HMAC_KEY" in done.stderr and "16 bytes" in done.stderr


@pytest.mark.parametrize("flags, words", [(("--url", ""), "--url is empty"), (("--url", "https://localhost:1", "--cert-key", "k.pem"), "--cert")])
def test_flags_that_make_no_sense_are_told_with_2(flags, words):
    done = run("services", *flags)
    assert done.returncode == 2 and is_one_sentence(done.stderr) and words in done.stderr


# --- over TLS

@pytest.mark.parametrize("head, args, status, words", [
    ("[logging]\nlevl = 1\n[server]", ("services",), 69, "cannot be reached"),
    ("[server]\nlisen = 1", ("services",), 78, "did you mean listen?"),
    ("[server", ("services",), 78, "name it with --url"),
    ("[server", ("services", "--url", "http://127.0.0.1:9"), 69, "cannot be reached"),
    ("[server", ("deploy", "web", "app:1", "--url", "http://127.0.0.1:9"), 77, "config.toml: is not valid TOML"),
    ("[server]", ("deploy", "web", "app:1", "--url", "http://127.0.0.1:9"), 77, "secrets: can be read by others (mode 0644)); set HOOKSHOT_HMAC_KEY")])
def test_a_client_needs_of_the_servers_file_what_leads_to_the_server_and_says_why_it_has_no_key(tmp_path, head, args, status, words):
    host = Host(tmp_path, service())
    host.config.write_text(host.config.read_text().replace("[server]", head))
    (tmp_path / "secrets").chmod(0o644)
    done = run("-c", host.config, *args)
    assert done.returncode == status and words in done.stderr and done.stdout == "", done.stderr


def test_who_is_refused_is_told_the_request_to_explain(host):
    done = host.cli("deploy", "web", "evil:1")
    request_id = re.search(r"refused: .* \(request ([0-9a-f]+)\)\n", done.stderr)[1]
    assert done.returncode == 65 and "refused  image" in host.cli("explain", request_id).stdout


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    return support.make_certificates(tmp_path_factory.mktemp("certificates"))


def tls_host(folder, certificates, *, client_ca: bool = False, address: str = "127.0.0.1:0") -> Host:
    asks = f'client_ca = "{certificates.ca}"\n' if client_ca else ""
    return Host(folder, service('["echo", "hello"]'), f'[server]\nlisten = "{address}"\n[server.tls]\n'
                f'cert = "{certificates.server}"\nkey = "{certificates.server_key}"\n{asks}')


@pytest.fixture(scope="module")
def secure(tmp_path_factory, certificates):
    """The URL of a server that speaks TLS, under the name that its certificate has."""
    with contextlib.closing(tls_host(tmp_path_factory.mktemp("secure"), certificates).start()) as host:
        yield f"https://localhost:{host.port}"


@pytest.fixture(scope="module")
def mutual(tmp_path_factory, certificates):
    """The same of one that asks for client certificates."""
    with contextlib.closing(tls_host(tmp_path_factory.mktemp("mutual"), certificates, client_ca=True).start()) as host:
        yield f"https://localhost:{host.port}"


def test_the_client_deploys_follows_and_reads_over_tls(secure, certificates):
    trust = ("--url", secure, "--ca", certificates.ca)
    done = run("deploy", "web", "app:1", "--id", "over-tls", *trust, env={"HOOKSHOT_HMAC_KEY": KEY})
    assert done.returncode == 0 and "hello" in done.stdout and "Succeeded" in done.stderr
    assert "over-tls" in run("status", "over-tls", *trust).stdout and "hello" in run("logs", "over-tls", *trust).stdout
    assert run("services", *trust).stdout.splitlines()[1].startswith("web ")
    assert run("services", env={"HOOKSHOT_URL": secure, "HOOKSHOT_CA": str(certificates.ca)}).returncode == 0
    assert run("services", *trust, env={"HOOKSHOT_CA": str(certificates.other_ca)}).returncode == 0


@pytest.mark.parametrize("ca, name", [(None, "localhost"), ("other_ca", "localhost"), ("client", "localhost"), ("ca", "127.0.0.2")])
def test_a_certificate_that_is_not_trusted_is_told_with_69(secure, certificates, ca, name):
    url = secure.replace("localhost", name)
    # The server listens on 127.0.0.1 alone: 127.0.0.2 is made to lead there by a relay.
    with relay(name, int(secure.rpartition(":")[2])) if name != "localhost" else contextlib.nullcontext(url) as url:
        done = run("deploy", "web", "app:1", "--id", "untrusted", "--url", url, *(("--ca", getattr(certificates, ca)) if ca else ()),
                   env={"HOOKSHOT_HMAC_KEY": KEY})
    assert done.returncode == 69 and done.stdout == "" and is_one_sentence(done.stderr)
    assert url in done.stderr and "certificate" in done.stderr and "not trusted" in done.stderr
    assert ("name its authority with --ca" in done.stderr) == (ca != "ca") and ("use a name" in done.stderr) == (ca == "ca")
    assert run("status", "untrusted", "--url", secure, "--ca", certificates.ca).returncode == 65


@contextlib.contextmanager
def relay(name: str, port: int):
    """Give a URL at another address, whose first connection is passed on to a local port."""
    with socket.create_server((name, 0)) as server:
        def carry():
            with contextlib.suppress(OSError):
                link, _ = server.accept()
                with link, socket.create_connection(("127.0.0.1", port)) as other:
                    ends = {link: other, other: link}
                    while True:
                        for end in select.select(list(ends), [], [])[0]:
                            block = end.recv(1 << 16)
                            if not block:
                                return
                            ends[end].sendall(block)

        threading.Thread(target=carry, daemon=True).start()
        yield f"https://{name}:{server.getsockname()[1]}"


def test_http_to_a_tls_port_and_https_to_a_plain_one_are_told_in_one_sentence(secure, host):
    for url in (secure.replace("https", "http"), f"https://127.0.0.1:{host.port}"):
        done = run("services", "--url", url)
        assert done.returncode in (65, 69) and is_one_sentence(done.stderr) and url in done.stderr
    assert "https" in run("services", "--url", secure.replace("https", "http")).stderr
    assert "does not speak TLS" in done.stderr and "use http://" in done.stderr


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.2"])
def test_the_servers_own_configuration_pins_its_certificate_for_any_name(tmp_path, certificates, address):
    host = tls_host(tmp_path, certificates, address=f"{address}:{support.free_port()}")
    with contextlib.closing(host.start()):
        done = run("-c", host.config, "deploy", "web", "app:1")
        assert done.returncode == 0 and "hello" in done.stdout
        assert run("-c", host.config, "services").returncode == 0
        # Another server with another certificate of the same authority at this address is not it.
        host.config.write_text(host.config.read_text().replace(str(certificates.server), str(certificates.renewed))
                               .replace(str(certificates.server_key), str(certificates.renewed_key)))
        done = run("-c", host.config, "services")
        assert done.returncode == 69 and is_one_sentence(done.stderr) and "SIGHUP" in done.stderr


def test_a_chain_in_the_servers_file_pins_its_own_certificate_alone(tmp_path, certificates):
    """The file of a server has its issuer's certificate too; what else that one issued is not this server."""
    ours, theirs = tmp_path / "ours.pem", tmp_path / "theirs.pem"
    ours.write_text(certificates.server.read_text() + certificates.ca.read_text())
    theirs.write_text(certificates.renewed.read_text() + certificates.ca.read_text())
    host = tls_host(tmp_path, certificates._replace(server=ours), address=f"127.0.0.1:{support.free_port()}")
    with contextlib.closing(host.start()):
        assert run("-c", host.config, "services").returncode == 0
        host.config.write_text(host.config.read_text().replace(str(ours), str(theirs))
                               .replace(str(certificates.server_key), str(certificates.renewed_key)))
        assert run("-c", host.config, "services").returncode == 69


def test_on_the_host_itself_a_unix_socket_needs_no_client_certificate(tmp_path, certificates):
    host = tls_host(tmp_path, certificates, client_ca=True)
    host.config.write_text(host.config.read_text().replace('listen = "127.0.0.1:0"', f'listen = ["127.0.0.1:0", "unix:{tmp_path}/socket"]'))
    with contextlib.closing(host.start()):
        assert run("-c", host.config, "services").returncode == 0


def test_a_client_certificate_lets_in(mutual, certificates):
    both = tuple(map(str, ("--cert", certificates.client, "--cert-key", certificates.client_key)))
    trust = ("--url", mutual, "--ca", certificates.ca)
    assert run("deploy", "web", "app:1", *trust, *both, env={"HOOKSHOT_HMAC_KEY": KEY}).returncode == 0
    named = {"HOOKSHOT_CERT": str(certificates.client), "HOOKSHOT_CERT_KEY": str(certificates.client_key)}
    assert run("services", *trust, env=named).returncode == 0
    joined = certificates.client.with_name("joined.pem")
    joined.write_text(certificates.client.read_text() + certificates.client_key.read_text())
    assert run("services", *trust, "--cert", joined).returncode == 0


@pytest.mark.parametrize("names", [(), ("other_client", "other_client_key")])
def test_without_the_right_client_certificate_the_sentence_says_so(mutual, certificates, names):
    given = [word for flag, name in zip(("--cert", "--cert-key"), names) for word in (flag, getattr(certificates, name))]
    for _ in range(5):
        done = run("deploy", "web", "app:1", "--id", "uninvited", "--url", mutual, "--ca", certificates.ca, *given,
                   env={"HOOKSHOT_HMAC_KEY": KEY})
        assert done.returncode == 77 and done.stdout == "" and is_one_sentence(done.stderr)
        assert f"does not accept the client certificate {given[1]}" in done.stderr if given else "name yours with --cert" in done.stderr
    done = run("status", "uninvited", "--url", mutual, "--ca", certificates.ca, "--cert", certificates.client,
               "--cert-key", certificates.client_key)
    assert done.returncode == 65


@pytest.mark.parametrize("flags", [
    {"--ca": "/nonexistent/ca.pem"}, {"--ca": "garbage"}, {"--ca": "client_key"}, {"--ca": "ca", "--cert": "/nonexistent/cert.pem"},
    {"--ca": "ca", "--cert": "client"}, {"--ca": "ca", "--cert": "client", "--cert-key": "server_key"},
    {"--ca": "ca", "--cert": "server", "--cert-key": "locked_key"}, {"--ca": "ca", "--cert": "client", "--cert-key": "garbage"}])
def test_a_bad_file_is_one_sentence_and_exit_78(secure, certificates, flags):
    given = [word for flag, name in flags.items() for word in (flag, getattr(certificates, name, name))]
    for args in (("services",), ("deploy", "web", "app:1")):
        done = run(*args, "--url", secure, *given, env={"HOOKSHOT_HMAC_KEY": KEY})
        assert done.returncode == 78 and done.stdout == "" and is_one_sentence(done.stderr)
        assert str(given[-1]) in done.stderr
