# SPDX-License-Identifier: MPL-2.0
"""What examples/ci/ and docs/ci.md hold works: every text that a forge would run is run against a server, and every file has the shape that it needs."""

import base64
import contextlib
import functools
import http.client
import http.server
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pytest

import hookshot
from pages import read_blocks, script_of, text_of
from support import KEY, PATIENCE_S, ROOT, Host, free_port, make_certificates, need, program, running, service, wait_until

CI = ROOT / "examples" / "ci"
SCRIPT = CI / "deploy.sh"
PAGE = ROOT / "docs" / "ci.md"
WRONG = "wrong-0123456789-wrong-9876543210"
TOKEN = "t0k3n-of-a-reader-0123456789abcdefgh"
SHA = "0123456789abcdef0123456789abcdef01234567"
SHELLS = {"dash": ("dash",), "bash": ("bash", "--posix"), "busybox": ("busybox", "sh")}
# Only whoever has the token may read, as it is from another host.
CONFIG = '[security]\nread_access = "token"\n'
SECRETS = f"read_token={TOKEN}\n"

# Images of this service end as their tags say; it writes down what it deployed, and goes on with `slow` when there is a file `go`.
WEB = """
[[service]]
name = "web"
working_dir = "@"
recovery = "retry"
[service.security]
allowed_image_pattern = '[a-z./]+:[a-z0-9]+'
[service.deploy]
commands = [["sh", "-c", "echo deploying; printf '\\\\033[31mred\\\\n'; echo $HOOKSHOT_IMAGE >> deployed"],
            ["sh", "-c", "case $HOOKSHOT_IMAGE in *:slow) until [ -e go ]; do kill -0 $PPID || exit; sleep 0.02; done;; esac"],
            ["sh", "-c", "case $HOOKSHOT_IMAGE in *:bad) exit 1;; esac"]]
[service.rollback]
commands = [["sh", "-c", "! [ -e stuck ]"]]
[[service]]
name = "bare"
working_dir = "@"
[service.security]
allowed_image_pattern = 'app:[a-z0-9]+'
[service.deploy]
commands = [["test", "{{IMAGE}}", "=", "app:good"]]
"""


class Ended(NamedTuple):
    """How a script ended, and what it printed."""

    status: int
    out: str
    err: str


# --- reading what the forges read


@functools.cache
def system_python() -> str:
    """Return a Python that has PyYAML, or skip: the package python3-yaml is for the system's one."""
    for candidate in (sys.executable, "/usr/bin/python3"):
        if shutil.which(candidate) and subprocess.run([candidate, "-c", "import yaml"], capture_output=True).returncode == 0:
            return candidate
    pytest.skip("missing: python3-yaml")


def load_yaml(text: str) -> Any:
    """Return a YAML document with every scalar as its text, so that `on` stays a word; keys that appear twice are an error."""
    code = "import json, sys, yaml\n" \
        "class Loader(yaml.BaseLoader):\n" \
        "    def construct_mapping(self, node, deep=False):\n" \
        "        names = [key.value for key, _ in node.value]\n" \
        "        assert len(names) == len(set(names)), names\n" \
        "        return super().construct_mapping(node, deep)\n" \
        "json.dump(yaml.load(sys.stdin, Loader), sys.stdout)"
    done = subprocess.run([system_python(), "-c", code], input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@functools.cache
def example(name: str) -> Any:
    return load_yaml((CI / name).read_text(encoding="utf-8"))


GITHUB, ACTION, FORGEJO, WOODPECKER = "github/deploy.yml", "github/action/action.yml", "forgejo/deploy.yml", "woodpecker/deploy.yml"
TEMPLATE, GITLAB = "gitlab/hookshot.gitlab-ci.yml", "gitlab/example.gitlab-ci.yml"
FILES = [GITHUB, FORGEJO, ACTION, TEMPLATE, GITLAB, WOODPECKER]


def steps_of(name: str) -> list[dict[str, Any]]:
    """Return all steps of a workflow or of an action."""
    document = example(name)
    return document["runs"]["steps"] if "runs" in document else [step for job in document["jobs"].values() for step in job["steps"]]


def gitlab_jobs() -> dict[str, dict[str, Any]]:
    """Return the jobs of the example as GitLab merges them: with the file that it includes, and what they extend."""
    texts = {**example(TEMPLATE), **example(GITLAB)}
    jobs = {name: job for name, job in texts.items() if isinstance(job, dict) and ("script" in job or "extends" in job)}

    def merge(name: str) -> dict[str, Any]:
        job = jobs[name]
        parent = merge(job["extends"]) if "extends" in job else {}
        return {**parent, **job, "variables": {**parent.get("variables", {}), **job.get("variables", {})}}

    return {name: merge(name) for name in jobs}


def shell_texts() -> dict[str, tuple[str, str]]:
    """Return (dialect, text) of everything in the examples and on the page that a shell reads."""
    texts = {"deploy.sh": ("sh", SCRIPT.read_text(encoding="utf-8"))}
    for name in (GITHUB, FORGEJO, ACTION):
        texts |= {f"{name} {index}": ("bash", step["run"]) for index, step in enumerate(steps_of(name)) if "run" in step}
    for name, job in gitlab_jobs().items():
        texts[f"{GITLAB} {name}"] = ("sh", "\n".join([*job.get("before_script", []), *job["script"]]))
    for name, document in ((WOODPECKER, example(WOODPECKER)), ("Drone", load_yaml(text_of("ci-drone", "yaml")))):
        texts |= {f"{name} {step['name']}": ("sh", "\n".join(step["commands"])) for step in document["steps"]}
    texts |= {str(block): ("sh", block.text) for block in read_blocks("sh") if block.page == PAGE}
    return texts | {"Jenkins": ("sh", jenkins_script()), "cron": ("sh", cron_line()[2])}


def jenkins_script() -> str:
    [script] = re.findall(r"^ *sh '([^']*)'$", text_of("ci-jenkins", "groovy"), re.MULTILINE)
    return script


def cron_line() -> tuple[dict[str, str], str, str]:
    """Return variables, times and command of the crontab on the page, as cron reads them."""
    *settings, line = text_of("ci-cron", "cron").splitlines()
    *times, command = line.split(" ", 5)
    return dict(setting.split("=", 1) for setting in settings), " ".join(times), command.replace(r"\%", "%")


# --- a runner of jobs


class Runner:
    """A machine on which jobs run: a folder with what a job checks out, programs, and an environment that is not the test's."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.bin = folder / "work", folder / "bin"
        for path in (self.folder, self.bin):
            path.mkdir(parents=True)
        python, archive = program()
        # The copy of the repository that the page's blocks copy from.
        self.copy = folder / "hookshot"
        (self.copy / "dist").mkdir(parents=True)
        (self.copy / "examples").symlink_to(ROOT / "examples")
        (self.copy / "dist" / "hookshot.pyz").symlink_to(archive)
        self.add("python3", f'exec {shlex.quote(python)} "$@"')
        self.add("hookshot", f'exec {shlex.quote(python)} {shlex.quote(archive)} "$@"')
        for name in ("apk", "docker"):
            # A login reads the password, so that it is in no argument.
            self.add(name, f'{{ echo {name} "$@"; [ "$1" != login ] || {{ cat; echo; }}; }} >>{shlex.quote(str(folder / "calls"))}')
        self.calls = folder / "calls"

    def add(self, name: str, text: str) -> None:
        """Put a program on the PATH, before the machine's own."""
        (self.bin / name).write_text(f"#!/bin/sh\n{text}\n")
        (self.bin / name).chmod(0o755)

    def environment(self, env: Mapping[str, str]) -> dict[str, str]:
        return {"PATH": f"{self.bin}:{os.environ['PATH']}", "HOME": str(self.folder), "CI": "true", "HOOKSHOT_RETRY": "0", **env}

    def run(self, text: str, env: Mapping[str, str], shell: Sequence[str] = ("sh", "-e"), stdin: str = "") -> Ended:
        """Run a script in the job's folder, as the forge's runner starts it."""
        process = self.start(text, env, shell)
        out, err = process.communicate(stdin, timeout=2 * PATIENCE_S)
        return Ended(process.returncode, out, err)

    def start(self, text: str, env: Mapping[str, str], shell: Sequence[str] = ("sh", "-e")) -> "subprocess.Popen[str]":
        return subprocess.Popen([*shell, "-c", text], cwd=self.folder, env=self.environment(env), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True)

    def check_out(self, block: str) -> None:
        """Do what the page says: copy the files of an example into the repository that is deployed."""
        ended = self.run(script_of(block), {})
        assert ended.status == 0, ended.err

    def deploy(self, host: Host | None, *arguments: str, shell: Sequence[str] = ("sh",), **env: str) -> Ended:
        """Run deploy.sh against a host, as a job that nobody numbers."""
        command = shlex.join([*shell, str(SCRIPT), *arguments])
        return self.run(command, {"HOOKSHOT_URL": f"http://127.0.0.1:{host.port if host else 0}", "HOOKSHOT_HMAC_KEY": KEY, **env})


@pytest.fixture
def runner(tmp_path):
    for name in ("curl", "openssl"):
        need(name)
    return Runner(tmp_path / "runner")


@pytest.fixture
def host(tmp_path):
    with running(tmp_path / "host", WEB, CONFIG, secrets=SECRETS) as host:
        yield host


def deployed(host: Host) -> list[str]:
    file = host.folder / "deployed"
    return file.read_text().split() if file.exists() else []


def record(host: Host, deploy_id: str) -> dict[str, Any]:
    return host.get(f"/status/{deploy_id}", Authorization=f"Bearer {TOKEN}").json


def history(host: Host) -> list[dict[str, Any]]:
    """Return the deployments, the oldest first."""
    return host.get("/deployments", Authorization=f"Bearer {TOKEN}").json["deployments"][::-1]


def read_outputs(file: pathlib.Path) -> dict[str, str]:
    return dict(line.split("=", 1) for line in file.read_text().splitlines()) if file.exists() else {}


class Relay:
    """Stands before a server, and gives the answers of its own first that it was told to give."""

    def __init__(self, port: int, *answers: tuple[int, dict[str, str], bytes]):
        waiting, seen = list(answers), []

        class Handler(http.server.BaseHTTPRequestHandler):
            def handle_one(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                seen.append(self.path)
                status, headers, answer = waiting.pop(0) if waiting else self.ask(body)
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(answer))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(answer)

            do_GET = do_POST = handle_one

            def ask(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
                with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)) as link:
                    link.request(self.command, self.path, body or None, dict(self.headers))
                    response = link.getresponse()
                    return response.status, {"Content-Type": response.headers["Content-Type"]}, response.read()

            def log_message(self, *_: object) -> None:
                pass

        self.seen = seen
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "Relay":
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


# --- the shape of the files


@pytest.mark.parametrize("name", FILES)
def test_an_example_is_yaml(name):
    assert isinstance(example(name), dict)


@pytest.mark.parametrize("block", [block for block in read_blocks("yaml") if block.page == PAGE], ids=str)
def test_a_snippet_of_the_page_is_yaml_and_stands_in_the_example(block):
    assert load_yaml(block.text)
    if block.run != "ci-drone":
        names = {"ci-github": GITHUB, "ci-gitlab": GITLAB, "ci-forgejo": FORGEJO, "ci-woodpecker": WOODPECKER}
        text = (CI / names[block.run]).read_text(encoding="utf-8")
        assert any(textwrap.indent(block.text, " " * depth) in text for depth in (0, 2, 4, 6))


def test_every_shell_text_is_clean_for_shellcheck(tmp_path):
    shellcheck = need("shellcheck")
    for index, (dialect, text) in enumerate(shell_texts().values()):
        (tmp_path / f"{index:02}.{dialect}").write_text(text if text.startswith("#!") else f"#!/bin/{dialect}\n{text}\n")
    done = subprocess.run([shellcheck, *sorted(tmp_path.iterdir())], capture_output=True, text=True)
    assert done.returncode == 0, f"{list(shell_texts())}\n{done.stdout}"


@pytest.mark.parametrize("name", [GITHUB, FORGEJO, ACTION])
def test_no_text_of_a_shell_holds_an_expression(name):
    """A value that stands in the text is program text: GitHub puts it there before a shell reads it."""
    assert [step["run"] for step in steps_of(name) if "${{" in step.get("run", "")] == []


def test_no_text_of_a_shell_holds_what_woodpecker_and_drone_fill_in():
    assert [text for name, (_, text) in shell_texts().items() if name.startswith((WOODPECKER, "Drone")) and "${" in text] == []


@pytest.mark.parametrize("name", [GITHUB, FORGEJO])
def test_secrets_reach_a_step_as_its_environment_only(name):
    document = example(name)
    found = 0
    for step in steps_of(name):
        found += sum("secrets." in value for value in step.get("env", {}).values())
    assert found == json.dumps(document).count("secrets.") > 0


@pytest.mark.parametrize("name", [GITHUB, FORGEJO])
def test_actions_of_others_are_pinned_to_a_commit(name):
    used = [step["uses"] for step in steps_of(name) if "uses" in step and not step["uses"].startswith("./")]
    assert used and all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", action) for action in used)
    assert not any("uses" in step for step in steps_of(ACTION))


def test_the_github_workflow_gives_each_job_the_least_and_keeps_deploys_apart():
    document = example(GITHUB)
    jobs = document["jobs"]
    assert document["permissions"] == {}
    assert {name: job["permissions"] for name, job in jobs.items()} == {
        "build": {"contents": "read", "packages": "write"}, **dict.fromkeys(("staging", "production", "rollback"), {"contents": "read"})}
    assert jobs["staging"]["needs"] == "build" and jobs["production"]["needs"] == ["build", "staging"]
    for name in ("staging", "production"):
        assert jobs[name]["environment"] == name
        assert jobs[name]["concurrency"] == {"group": f"deploy-{name}", "cancel-in-progress": "false"}
    assert jobs["rollback"]["concurrency"]["group"] == "deploy-${{ inputs.environment }}" and jobs["rollback"]["environment"] == "${{ inputs.environment }}"
    assert all("timeout-minutes" in job for job in jobs.values())
    checkouts = [step for step in steps_of(GITHUB) if step.get("uses", "").startswith("actions/checkout@")]
    assert len(checkouts) == len(jobs) and all(step["with"]["persist-credentials"] == "false" for step in checkouts)
    assert set(document["on"]) == {"push", "workflow_dispatch"}


def test_the_gitlab_jobs_ask_before_production_and_keep_deploys_apart():
    jobs, document = gitlab_jobs(), example(GITLAB)
    deploys = {name: job for name, job in jobs.items() if not name.startswith(".") and name != "build"}
    assert deploys.keys() == {"staging", "production", "rollback-production"}
    for name, job in deploys.items():
        target = name.removeprefix("rollback-")
        assert job["environment"] == {"name": target} and job["resource_group"] == target and job["interruptible"] == "false"
        assert job["stage"] in document["stages"] and (job.get("when") == "manual") == (target == "production")
    assert jobs["production"]["needs"] == ["staging"] and jobs["staging"]["needs"] == ["build"]
    assert "HMAC" not in (CI / GITLAB).read_text(), "the key belongs into a variable of the project"


# --- deploy.sh


@pytest.mark.parametrize("shell", SHELLS)
def test_the_exit_status_of_the_script_tells_the_outcome(host, runner, tmp_path, shell):
    need(SHELLS[shell][0])
    output = tmp_path / "output"

    def deploy(*arguments: str, **env: str) -> int:
        ended = runner.deploy(host, *arguments, shell=SHELLS[shell], HOOKSHOT_OUTPUT=str(output), **env)
        said.append(ended.err)
        assert KEY not in ended.out + ended.err
        return ended.status

    said: list[str] = []
    assert deploy("web", "app:1", "commit=f00", 'note=a "b" \\ c') == 0
    outputs = read_outputs(output)
    assert outputs["status"] == "Succeeded" and outputs["log_url"].endswith(f"/logs/{outputs['deploy_id']}")
    assert record(host, outputs["deploy_id"])["metadata"] == {"commit": "f00", "note": 'a "b" \\ c'}
    assert deploy("web", "app:bad") == 11 and "back on app:1" in said[-1] and "app:bad" in said[-1]
    assert read_outputs(output)["status"] == "RolledBack"
    (host.folder / "stuck").touch()
    assert deploy("web", "app:bad") == 12
    (host.folder / "stuck").unlink()
    assert deploy("bare", "app:bad") == 10
    assert deploy("web", "other:1/") == 65 and "is not allowed" in said[-1]
    assert deploy("nothing", "app:1") == 65 and "no service nothing" in said[-1]
    assert deploy("web", "app:1", HOOKSHOT_HMAC_KEY=WRONG) == 77
    assert deploy("web", "app:1", HOOKSHOT_HMAC_KEY="") == 77
    assert deploy("web", "app:1", HOOKSHOT_URL=f"http://127.0.0.1:{free_port()}") == 69
    assert deploy("web", "app:1", HOOKSHOT_URL="127.0.0.1") == 2
    assert deploy("web") == deploy("web", "app:1", "commit") == deploy("we b", "app:1") == deploy("web", "app:\n1") == 2
    assert host.cli("lock", "web", "--reason", "stocktaking", env={"HOOKSHOT_HMAC_KEY": KEY}).returncode == 0
    before = deployed(host)
    assert deploy("web", "app:2") == 75 and "stocktaking" in said[-1]
    assert deployed(host) == before


@pytest.mark.parametrize("shell", SHELLS)
def test_the_log_is_shown_to_who_has_the_token(host, runner, shell):
    need(SHELLS[shell][0])
    with_token = runner.deploy(host, "web", "app:1", shell=SHELLS[shell], HOOKSHOT_READ_TOKEN=TOKEN)
    without = runner.deploy(host, "web", "app:2", shell=SHELLS[shell])
    wrong = runner.deploy(host, "web", "app:3", shell=SHELLS[shell], HOOKSHOT_READ_TOKEN=TOKEN[::-1])
    assert with_token.status == without.status == wrong.status == 0
    assert "deploy out deploying" in with_token.out and "\033" not in with_token.out
    assert without.out == wrong.out == ""
    assert "HOOKSHOT_READ_TOKEN" in without.err and "401" in wrong.err


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_signs_with_any_key(tmp_path, runner, shell):
    """The HMAC is made by hand: shorter and longer keys than a block, bytes that cancel the pads out, base64, a file."""
    need(SHELLS[shell][0])
    keys = {"short": "k5-short-76543210", "block": "6\\" + "6b\\3-91xQz" * 6 + "66", "long": "L0ng-and-1onger/" * 9, "text": "p%ss w\"rd's $(no) ü\\0",
            "whsec": "whsec_" + base64.b64encode(bytes(range(48))).decode(), "long_whsec": "whsec_" + base64.b64encode(bytes(range(200))).decode()}
    secrets = "".join(f"{name}={value}\n" for name, value in keys.items())
    config = f'[security]\nhmac_keys = {json.dumps([*keys, "hmac_key"])}\n'
    (tmp_path / "key").write_text(keys["text"] + "\n")
    with running(tmp_path / "host", service(), config, secrets=secrets) as host:
        for name, key in keys.items():
            ended = runner.deploy(host, "web", "app:1", shell=SHELLS[shell], HOOKSHOT_HMAC_KEY=key, HOOKSHOT_DEPLOY_ID=name, HOOKSHOT_TIMEOUT="0")
            assert ended.status == 0, (name, ended.err)
            assert host.record(name)["triggered_by"]["key_id"] == name
        ended = runner.deploy(host, "web", "app:2", shell=SHELLS[shell], HOOKSHOT_HMAC_KEY="", HOOKSHOT_KEY_FILE=str(tmp_path / "key"),
                              HOOKSHOT_TIMEOUT="0")
        assert ended.status == 0, ended.err


def test_a_key_file_that_holds_more_than_a_key_is_refused(host, runner, tmp_path):
    (tmp_path / "secrets").write_text(f"hmac_key={KEY}\nread_token={TOKEN}\n")
    ended = runner.deploy(host, "web", "app:1", HOOKSHOT_KEY_FILE=str(tmp_path / "secrets"))
    assert ended.status == 78 and "holds more than a key" in ended.err and KEY not in ended.err
    assert not history(host)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_job_that_is_ended_says_that_the_deployment_goes_on(host, runner, number, status):
    # A terminal and a forge end all programs of the job.
    text = f"exec setsid sh {shlex.quote(str(SCRIPT))} web app:slow"
    with runner.start(text, {"HOOKSHOT_URL": f"http://127.0.0.1:{host.port}", "HOOKSHOT_HMAC_KEY": KEY, "HOOKSHOT_DEPLOY_ID": "x"}) as process:
        assert "is x" in process.stderr.readline()
        os.killpg(process.pid, number)
        _, err = process.communicate(timeout=2 * PATIENCE_S)
    assert process.returncode == status and "goes on" in err


def test_neither_key_nor_token_is_given_to_another_program(host, runner, tmp_path):
    seen = tmp_path / "seen"
    names = ["curl", "openssl", "sed", "od", "tr", "cat", "date", "mktemp", "cut", "head", "tail", "sleep", "rm"]
    for name in names:
        runner.add(name, f'/usr/bin/tr "\\0" " " </proc/$$/cmdline >>{seen}; /usr/bin/env >>{seen}; exec {need(name)} "$@"')
    # Also where somebody looks for a fault with -x.
    ended = runner.deploy(host, "web", "app:1", shell=("sh", "-x"), HOOKSHOT_READ_TOKEN=TOKEN)
    assert ended.status == 0
    said = seen.read_text() + ended.out + ended.err
    assert "curl" in said and "openssl" in said and KEY not in said and TOKEN not in said


@pytest.mark.parametrize(("env", "again"), [
    ({"GITHUB_RUN_ID": "7", "GITHUB_RUN_ATTEMPT": "1", "GITHUB_JOB": "staging"}, {"GITHUB_RUN_ATTEMPT": "2"}),
    ({"GITLAB_CI": "true", "CI_JOB_ID": "7"}, {"CI_JOB_ID": "8"}),
    ({"CI_PIPELINE_NUMBER": "7", "CI_STEP_NAME": "to staging", "CI_REPO": "acme/web"}, {"CI_PIPELINE_NUMBER": "8"}),
    ({"DRONE_BUILD_NUMBER": "7", "DRONE_STEP_NAME": "deploy", "DRONE_REPO": "acme/web"}, {"DRONE_BUILD_NUMBER": "8"}),
    ({"BUILD_TAG": "jenkins-acme-web %2F-7"}, {"BUILD_TAG": "jenkins-acme-web %2F-8"})], ids=["github", "gitlab", "woodpecker", "drone", "jenkins"])
def test_a_job_that_runs_twice_deploys_once_and_another_one_anew(host, runner, env, again):
    assert [runner.deploy(host, "web", "app:1", **env).status for _ in range(2)] == [0, 0]
    assert deployed(host) == ["app:1"]
    assert runner.deploy(host, "web", "app:bad", **{**env, **again}).status == 11
    assert runner.deploy(host, "web", "app:2", **env).status == 65
    assert deployed(host) == ["app:1", "app:bad"]


def test_a_rollback_that_is_repeated_goes_back_once(host, runner):
    for image in ("app:1", "app:2"):
        assert runner.deploy(host, "web", image).status == 0
    job = {"GITLAB_CI": "true", "CI_JOB_ID": "7"}
    assert [runner.deploy(host, "--rollback", "web", **job).status for _ in range(2)] == [0, 0]
    assert deployed(host) == ["app:1", "app:2", "app:1"]
    # A deploy of the same job is not taken for it.
    assert runner.deploy(host, "web", "app:3", **job).status == 0
    assert runner.deploy(host, "--rollback", "web", "app:2").status == 0
    assert deployed(host)[3:] == ["app:3", "app:2"]
    assert runner.deploy(host, "--rollback", "bare").status == 65


def test_the_script_may_leave_without_waiting_and_tells_when_it_still_runs(host, runner, tmp_path):
    output = tmp_path / "output"
    ended = runner.deploy(host, "web", "app:slow", HOOKSHOT_TIMEOUT="0", HOOKSHOT_OUTPUT=str(output), HOOKSHOT_DEPLOY_ID="one")
    assert ended.status == 0 and read_outputs(output)["deploy_id"] == "one"
    ended = runner.deploy(host, "web", "app:slow", HOOKSHOT_TIMEOUT="1", HOOKSHOT_OUTPUT=str(output), HOOKSHOT_DEPLOY_ID="one")
    assert ended.status == 14 and "still runs" in ended.err
    assert host.cli("cancel", "one", env={"HOOKSHOT_HMAC_KEY": KEY}).returncode == 0
    ended = runner.deploy(host, "web", "app:slow", HOOKSHOT_OUTPUT=str(output), HOOKSHOT_DEPLOY_ID="one")
    assert ended.status == 13 and read_outputs(output)["status"] == "Cancelled"


PROBLEM = {"Content-Type": "application/problem+json"}
BUSY = json.dumps({"error": "the service is busy", "code": "CONCURRENCY_LIMIT_EXCEEDED", "status": 503}).encode()


def test_a_busy_server_is_asked_again_when_it_says(host, runner):
    answers = [(503, {**PROBLEM, "Retry-After": "1"}, BUSY), (502, {"Content-Type": "text/html"}, b"<html>Bad gateway</html>")]
    with Relay(host.port, *answers) as relay:
        ended = runner.deploy(host, "web", "app:1", HOOKSHOT_URL=relay.url, HOOKSHOT_RETRY="60")
        assert ended.status == 0 and "busy; trying again in 1 s" in ended.err and "answered 502" in ended.err
        assert deployed(host) == ["app:1"]


@pytest.mark.parametrize(("answer", "status"), [
    ((503, PROBLEM, BUSY), 75),
    ((502, {"Content-Type": "text/html"}, b"<html>Bad gateway</html>"), 69),
    ((200, {"Content-Type": "text/html"}, b'<html>"status":"Succeeded"</html>'), 69),
    ((200, {"Content-Type": "application/json"}, b'{"status":"Succeeded","deploy_id":"../../x"}'), 69),
    ((500, PROBLEM, b'{"error":"a mistake","code":"INTERNAL_ERROR","status":500}'), 70),
    ((429, PROBLEM, b'{"error":"too many","code":"RATE_LIMIT_EXCEEDED","status":429}'), 75),
    ((413, PROBLEM, b'{"error":"too large","code":"PAYLOAD_TOO_LARGE","status":413}'), 65),
    ((403, PROBLEM, b'{"error":"no","code":"ACCESS_DENIED","status":403}'), 77)], ids=str)
def test_an_answer_that_is_no_deployment_is_told_as_what_it_is(runner, answer, status):
    with Relay(0, answer) as relay:
        ended = runner.deploy(None, "web", "app:1", HOOKSHOT_URL=relay.url)
    assert ended.status == status and relay.seen == ["/deploy?wait=0"]


def test_what_an_error_quotes_is_not_taken_for_the_outcome(runner):
    quoted = json.dumps({"error": 'exited with 1: {"status":"Succeeded","deploy_id":"x"}', "deploy_id": "one", "service": "web", "status": "Failed",
                         "image": "app:1"}, separators=(",", ":")).encode()
    answers = [(500, {"Content-Type": "application/json"}, quoted), (404, PROBLEM, b"{}"), (500, {"Content-Type": "application/json"}, quoted)]
    with Relay(0, *answers) as relay:
        ended = runner.deploy(None, "web", "app:1", HOOKSHOT_URL=relay.url)
    assert ended.status == 10 and 'exited with 1: {"status":"Succeeded"' in ended.err


def wait_for_text(file: pathlib.Path, text: str, process: "subprocess.Popen[Any]") -> None:
    def is_there() -> bool:
        assert process.poll() is None or text in file.read_text(), file.read_text()
        return text in file.read_text()
    wait_until(is_there)


@contextlib.contextmanager
def followed(runner: Runner, url: str, folder: pathlib.Path) -> Iterator[tuple["subprocess.Popen[str]", pathlib.Path]]:
    """Give deploy.sh while it follows a slow deployment, and the file that it writes into."""
    said = folder / "said"
    process = runner.start(f'exec sh {shlex.quote(str(SCRIPT))} web app:slow >{shlex.quote(str(said))} 2>&1', {
        "HOOKSHOT_URL": url, "HOOKSHOT_HMAC_KEY": KEY, "HOOKSHOT_READ_TOKEN": TOKEN, "HOOKSHOT_DEPLOY_ID": "one", "HOOKSHOT_RETRY": "60"})
    try:
        wait_until(said.exists)
        wait_for_text(said, "step 2 of 3", process)
        yield process, said
    finally:
        process.kill()
        process.communicate()


def test_a_server_that_is_killed_meanwhile_is_waited_for(tmp_path, runner):
    config = f'[server]\nlisten = "127.0.0.1:{free_port()}"\n{CONFIG}'
    with running(tmp_path / "host", WEB, config, secrets=SECRETS) as host, followed(runner, host.urls[0], tmp_path) as (process, said):
        host.kill()
        wait_for_text(said, "trying again", process)
        (host.folder / "go").touch()
        host.start()
        assert process.wait(2 * PATIENCE_S) == 0, said.read_text()
        assert len(history(host)) == 1


def test_a_proxy_that_gives_up_early_is_survived(tmp_path, host, runner):
    nginx, port = need("nginx"), free_port()
    user = "user root;\n" if os.geteuid() == 0 else ""
    paths = "".join(f"{name}_temp_path {name};\n" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    (tmp_path / "nginx.conf").write_text(
        f"{user}pid nginx.pid;\ndaemon off;\nerror_log stderr;\nevents {{}}\nhttp {{\naccess_log off;\n{paths}server {{\nlisten 127.0.0.1:{port};\n"
        f"location / {{\nproxy_pass http://127.0.0.1:{host.port};\nproxy_read_timeout 1s;\n}}\n}}\n}}\n")
    with open(tmp_path / "nginx.log", "wb") as log:
        server = subprocess.Popen([nginx, "-p", tmp_path, "-c", tmp_path / "nginx.conf"], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            ready = [need("curl"), "-sf", f"http://127.0.0.1:{port}/ready"]
            wait_until(lambda: server.poll() is None and subprocess.run(ready, capture_output=True).returncode == 0)
            with followed(runner, f"http://127.0.0.1:{port}", tmp_path) as (process, said):
                wait_for_text(said, "the log broke off", process)
                wait_for_text(said, "answered 504", process)
                (host.folder / "go").touch()
                assert process.wait(2 * PATIENCE_S) == 0, said.read_text()
        finally:
            server.terminate()
            server.wait(PATIENCE_S)


def test_certificates_are_checked_and_shown(tmp_path, runner):
    files = make_certificates(tmp_path)
    config = f'[server.tls]\ncert = "{files.server}"\nkey = "{files.server_key}"\nclient_ca = "{files.ca}"\n'
    with running(tmp_path / "host", service(), config) as host:
        url = {"HOOKSHOT_URL": f"https://127.0.0.1:{host.port}"}
        ours = {**url, "HOOKSHOT_CA": str(files.ca), "HOOKSHOT_CERT": str(files.client), "HOOKSHOT_CERT_KEY": str(files.client_key)}
        unknown = runner.deploy(host, "web", "app:1", **{**ours, "HOOKSHOT_CA": str(files.other_ca)})
        assert unknown.status == 69 and "HOOKSHOT_CA" in unknown.err
        assert runner.deploy(host, "web", "app:1", **{**ours, "HOOKSHOT_CA": str(tmp_path / "none")}).status == 78
        assert runner.deploy(host, "web", "app:1", **url, HOOKSHOT_CA=str(files.ca)).status == 77
        ended = runner.deploy(host, "web", "app:1", **ours)
        assert ended.status == 0, ended.err


# --- GitHub and Forgejo


class Workflow:
    """Runs jobs of a workflow as GitHub's runner does: contexts filled in, one shell a step, outputs through files."""

    def __init__(self, runner: Runner, url: str, **env: str):
        self.runner, self.url, self.files = runner, url, runner.folder.parent
        self.contexts = {"secrets.HOOKSHOT_HMAC_KEY": KEY, "secrets.HOOKSHOT_READ_TOKEN": TOKEN, "secrets.GITHUB_TOKEN": "gh-token", "vars.HOOKSHOT_URL": url,
                         "vars.HOOKSHOT_STAGING_URL": url, "vars.HOOKSHOT_PRODUCTION_URL": url, "secrets.HOOKSHOT_STAGING_KEY": KEY,
                         "secrets.HOOKSHOT_PRODUCTION_KEY": KEY}
        self.env = {"GITHUB_ACTIONS": "true", "GITHUB_RUN_ID": "9041", "GITHUB_RUN_ATTEMPT": "1", "GITHUB_SHA": SHA, "GITHUB_REPOSITORY": "Acme/Web",
                    "GITHUB_SERVER_URL": "https://github.com", "GITHUB_ACTOR": "ann", "GITHUB_REF_NAME": "v1$(touch injected)", **env}
        self.summary = self.files / "summary"
        self.printed: list[Ended] = []

    def fill_in(self, values: Mapping[str, str], contexts: Mapping[str, str]) -> dict[str, str]:
        return {name: re.sub(r"\$\{\{ ([\w.-]+) \}\}", lambda match: contexts[match[1]], value) for name, value in values.items()}

    def run_steps(self, steps: Sequence[Mapping[str, Any]], contexts: dict[str, str], env: Mapping[str, str], shell: str) -> bool:
        """Run steps in order and return whether all went well; after a failure only those that say always()."""
        is_well = True
        for number, step in enumerate(steps):
            assert step.get("if", "always()") == "always()"
            if (not is_well and "if" not in step) or step.get("uses", "").startswith("actions/checkout@"):
                continue
            own = {**env, **self.fill_in(step.get("env", {}), contexts)}
            if "uses" in step:
                is_well &= self.run_action(step, contexts, own)
                continue
            assert step.get("shell", shell) == "bash"
            output = self.files / f"output-{number}"
            output.unlink(missing_ok=True)
            script = self.files / "step.sh"
            script.write_text(step["run"])
            ended = self.runner.run(f"exec bash --noprofile --norc -e -o pipefail {shlex.quote(str(script))}",
                                    {**own, "GITHUB_OUTPUT": str(output), "GITHUB_STEP_SUMMARY": str(self.summary)})
            self.printed.append(ended)
            is_well &= ended.status == 0
            outputs = read_outputs(output)
            for key in ("deploy_id", "status", "log_url", *outputs):
                contexts[f"steps.{step.get('id', number)}.outputs.{key}"] = outputs.get(key, "")
        return is_well

    def run_action(self, step: Mapping[str, Any], contexts: dict[str, str], env: Mapping[str, str]) -> bool:
        folder = self.runner.folder / step["uses"]
        action = load_yaml((folder / "action.yml").read_text())
        given = self.fill_in(step["with"], contexts)
        assert given.keys() <= action["inputs"].keys()
        assert all(name in given for name, row in action["inputs"].items() if row.get("required") == "true")
        inside = {f"inputs.{name}": given.get(name, row.get("default", "")) for name, row in action["inputs"].items()}
        is_well = self.run_steps(action["runs"]["steps"], inside, {**env, "GITHUB_ACTION_PATH": str(folder)}, "")
        self.outputs = self.fill_in({name: row["value"] for name, row in action["outputs"].items()}, inside)
        return is_well

    def run_job(self, name: str, document: Mapping[str, Any], **contexts: str) -> bool:
        job = document["jobs"][name]
        known = {**self.contexts, **contexts}
        is_well = self.run_steps(job["steps"], known, {**self.env, "GITHUB_JOB": name}, document.get("defaults", {}).get("run", {}).get("shell", "bash"))
        self.contexts |= {f"needs.{name}.outputs.{key}": value for key, value in self.fill_in(job.get("outputs", {}), known).items()}
        return is_well


def test_the_github_workflow_builds_deploys_and_takes_back(host, runner):
    need("bash")
    runner.check_out("ci-github")
    workflow, document = Workflow(runner, f"http://127.0.0.1:{host.port}/"), load_yaml((runner.folder / ".github/workflows/deploy.yml").read_text())
    image = f"ghcr.io/acme/web:{SHA}"

    assert workflow.run_job("build", document)
    assert runner.calls.read_text().splitlines() == [
        "docker login ghcr.io --username ann --password-stdin", "gh-token", f"docker build --tag {image} .", f"docker push {image}"]
    assert runner.deploy(host, "web", "app:1").status == 0
    for _ in range(2):
        assert workflow.run_job("staging", document), workflow.printed
    log_url = f"http://127.0.0.1:{host.port}/logs/run-9041-1-web-staging"
    assert workflow.outputs == {"deploy_id": "run-9041-1-web-staging", "status": "Succeeded", "log_url": log_url}
    assert workflow.run_job("production", document)
    assert deployed(host) == ["app:1", image, image]
    assert record(host, "run-9041-1-web-staging")["metadata"] == {"commit": SHA, "run": "https://github.com/Acme/Web/actions/runs/9041"}
    assert workflow.summary.read_text().splitlines()[0] == f"**web**: Succeeded ([log of run-9041-1-web-staging]({log_url}))"

    assert workflow.run_job("rollback", document, **{"inputs.environment": "staging", "inputs.to": ""})
    assert deployed(host)[-1] == "app:1"
    workflow.env["GITHUB_RUN_ID"] = "9042"
    assert workflow.run_job("rollback", document, **{"inputs.environment": "staging", "inputs.to": image})
    assert deployed(host)[-1] == image
    workflow.env["GITHUB_RUN_ID"] = "9043"
    assert not workflow.run_job("rollback", document, **{"inputs.environment": "staging", "inputs.to": "$(touch injected)"})
    assert not (runner.folder / "injected").exists()


def run_action(workflow: Workflow, key: str = KEY, **inputs: str) -> tuple[int, dict[str, str]]:
    """Run the action with these inputs and return the exit status of its first step, and its outputs."""
    workflow.printed.clear()
    workflow.summary.unlink(missing_ok=True)
    step = {"uses": "./.github/actions/hookshot", "with": {"url": workflow.url, "service": "web", **inputs}}
    is_well = workflow.run_action(step, {}, {**workflow.env, "HOOKSHOT_HMAC_KEY": key, "GITHUB_JOB": "deploy"})
    assert is_well == (workflow.printed[0].status == 0)
    return workflow.printed[0].status, workflow.outputs


def test_the_github_action_tells_what_became_of_it(host, runner):
    need("bash")
    runner.check_out("ci-github")
    workflow = Workflow(runner, f"http://127.0.0.1:{host.port}")
    nothing = {"deploy_id": "", "status": "", "log_url": ""}

    def run(key: str = KEY, **inputs: str) -> tuple[int, dict[str, str]]:
        workflow.env["GITHUB_RUN_ID"] = str(int(workflow.env["GITHUB_RUN_ID"]) + 1)
        return run_action(workflow, key, **inputs)

    assert run(image="app:1")[0] == 0
    status, outputs = run(image="app:bad")
    assert status == 11 and outputs["status"] == "RolledBack" and "RolledBack" in workflow.summary.read_text()
    assert run(image="app:1", key=WRONG) == (77, nothing) and "not accepted" in workflow.summary.read_text()
    assert run(image="app:1", service="nothing") == (65, nothing)
    assert run(image="app:1", url=f"http://127.0.0.1:{free_port()}") == (69, nothing)
    assert host.cli("lock", "web", env={"HOOKSHOT_HMAC_KEY": KEY}).returncode == 0
    assert run(image="app:1") == (75, nothing)
    assert host.cli("unlock", "web", env={"HOOKSHOT_HMAC_KEY": KEY}).returncode == 0
    status, outputs = run(image="app:slow", wait="false")
    assert status == 0 and outputs["status"] in {"Queued", "Validating", "Deploying"}
    (host.folder / "go").touch()


def test_what_a_command_prints_is_no_command_to_the_runner(tmp_path, runner):
    need("bash")
    runner.check_out("ci-github")
    shouting = service('["echo", "##[add-mask]x"]', '["echo", "::set-output name=x::y"]')
    with running(tmp_path / "host", shouting, CONFIG, secrets=SECRETS) as host:
        workflow = Workflow(runner, f"http://127.0.0.1:{host.port}")
        workflow.env["HOOKSHOT_READ_TOKEN"] = TOKEN
        for image, status in (("app:1", 0), ("nothing", 65)):
            workflow.env["GITHUB_RUN_ID"] += "0"
            assert run_action(workflow, image=image)[0] == status
            first, *log, last = workflow.printed[0].out.splitlines()
            mark = first.removeprefix("::stop-commands::")
            assert re.fullmatch("[0-9a-f]{32}", mark) and last == f"::{mark}::" and mark not in "".join(log)
            assert ("::set-output" in "".join(log)) == (status == 0)


def test_the_forgejo_workflow_deploys(host, runner):
    need("bash")
    runner.check_out("ci-forgejo")
    document = load_yaml((runner.folder / ".forgejo/workflows/deploy.yml").read_text())
    workflow = Workflow(runner, f"http://127.0.0.1:{host.port}")
    for _ in range(2):
        assert workflow.run_job("staging", document) and workflow.run_job("production", document), workflow.printed
    assert deployed(host) == [f"registry.example.org/acme/web:{SHA}"] * 2
    assert record(host, "run-9041-1-web-production")["status"] == "Succeeded"
    assert not (runner.folder / "injected").exists()
    workflow.contexts["secrets.HOOKSHOT_STAGING_KEY"] = WRONG
    assert not workflow.run_job("staging", document) and workflow.printed[-1].status == 77


# --- GitLab


def run_gitlab(runner: Runner, name: str, shell: str, **env: str) -> Ended:
    """Run a job as GitLab's runner does: variables expanded in one another, before_script and script in one shell."""
    job = gitlab_jobs()[name]
    variables = {"CI_REGISTRY_IMAGE": "registry.example.org/acme/web", "CI_COMMIT_SHA": SHA, "CI_PIPELINE_URL": "https://gitlab.example.org/p/1",
                 "GITLAB_CI": "true", "CI_REGISTRY": "registry.example.org", "CI_REGISTRY_USER": "ann", "CI_REGISTRY_PASSWORD": "registry-password", **env,
                 **example(GITLAB)["variables"], **job["variables"]}
    for _ in range(3):
        variables = {key: re.sub(r"\$(\w+)", lambda match: variables.get(match[1], ""), value) for key, value in variables.items()}
    return runner.run("\n".join([*job.get("before_script", []), *job["script"]]), variables, (*SHELLS[shell], "-e"))


@pytest.mark.parametrize("shell", SHELLS)
def test_the_gitlab_jobs_deploy_and_take_back(host, runner, shell):
    need(SHELLS[shell][0])
    runner.check_out("ci-gitlab")
    assert load_yaml((runner.folder / ".gitlab-ci.yml").read_text())["include"] == [{"local": "ci/hookshot.gitlab-ci.yml"}]
    shutil.copy(program()[1], runner.folder / "ci/hookshot.pyz")
    image = f"registry.example.org/acme/web:{SHA}"
    env = {"HOOKSHOT_URL": f"http://127.0.0.1:{host.port}", "HOOKSHOT_HMAC_KEY": KEY}

    assert run_gitlab(runner, "build", shell).status == 0
    assert runner.calls.read_text().splitlines() == [
        "docker login registry.example.org --username ann --password-stdin", "registry-password", f"docker build --tag {image} .", f"docker push {image}"]
    assert runner.deploy(host, "web", "app:1").status == 0
    for _ in range(2):
        ended = run_gitlab(runner, "staging", shell, **env, CI_JOB_ID="1")
        assert ended.status == 0, ended.err
    assert runner.calls.read_text().splitlines()[-1] == "apk add --no-cache curl openssl"
    assert read_outputs(runner.folder / "hookshot.env")["deploy_id"] == "job-1-web"
    assert run_gitlab(runner, "production", shell, **env, CI_JOB_ID="2").status == 0
    assert deployed(host) == ["app:1", image, image]
    assert run_gitlab(runner, "rollback-production", shell, **env, CI_JOB_ID="3").status == 0
    assert run_gitlab(runner, "rollback-production", shell, **env, CI_JOB_ID="4", HOOKSHOT_ROLLBACK_TO=image).status == 0
    assert deployed(host)[3:] == ["app:1", image]
    assert record(host, "job-1-web")["metadata"] == {"commit": SHA, "pipeline": "https://gitlab.example.org/p/1"}
    assert run_gitlab(runner, "production", shell, **{**env, "HOOKSHOT_HMAC_KEY": WRONG}, CI_JOB_ID="5").status == 77


CLIENT_CASES = [("web", "app:1", {}, 0), ("web", "app:bad", {}, 11), ("nothing", "app:1", {}, 65),
                ("web", "app:1", {"HOOKSHOT_HMAC_KEY": WRONG}, 77), ("web", "app:1", {"HOOKSHOT_URL": "http://127.0.0.1:1"}, 69)]


def test_the_gitlab_job_with_the_client_deploys_once(host, runner):
    runner.check_out("ci-gitlab")
    shutil.copy(program()[1], runner.folder / "ci/hookshot.pyz")
    for number, (name, image, extra, status) in enumerate(CLIENT_CASES):
        env = {"HOOKSHOT_URL": f"http://127.0.0.1:{host.port}", "HOOKSHOT_HMAC_KEY": KEY, "CI_JOB_ID": str(number), "HOOKSHOT_SERVICE": name,
               "HOOKSHOT_IMAGE": image, **extra}
        assert [run_gitlab(runner, ".hookshot-client", "dash", **env).status for _ in range(2)] == [status, status]
    assert deployed(host) == ["app:1", "app:bad"]
    assert record(host, "job-0-web")["metadata"]["pipeline"] == "https://gitlab.example.org/p/1"


# --- Woodpecker and others


def test_the_woodpecker_steps_deploy_once(host, runner):
    runner.check_out("ci-woodpecker")
    steps = load_yaml((runner.folder / ".woodpecker/deploy.yml").read_text())["steps"]
    env = {"CI": "woodpecker", "CI_COMMIT_SHA": SHA, "CI_PIPELINE_NUMBER": "8", "CI_PIPELINE_URL": "https://ci.example.org/repos/7/pipeline/8"}
    for step in steps:
        assert step["environment"]["HOOKSHOT_HMAC_KEY"] == {"from_secret": f"hookshot_{step['name']}_key"}
        given = {**step["environment"], **env, "HOOKSHOT_URL": f"http://127.0.0.1:{host.port}"}
        for key, status in ((KEY, 0), (KEY, 0), (WRONG, 77)):
            ended = runner.run("\n".join(step["commands"]), {**given, "HOOKSHOT_HMAC_KEY": key})
            assert ended.status == status, ended.err
    assert deployed(host) == [f"registry.example.org/acme/web:{SHA}"] * 2
    assert [row["deploy_id"] for row in history(host)] == ["pipeline-8-web-staging", "pipeline-8-web-production"]


def test_drone_and_jenkins_deploy_once(host, runner):
    runner.check_out("ci-gitlab")
    env = {"HOOKSHOT_URL": f"http://127.0.0.1:{host.port}", "HOOKSHOT_HMAC_KEY": KEY}
    drone = load_yaml(text_of("ci-drone", "yaml"))
    [step] = drone["steps"]
    assert drone["trigger"] == {"event": ["promote"], "target": ["production"]} and step["environment"]["HOOKSHOT_HMAC_KEY"] == {"from_secret": "hookshot_key"}
    given = {"DRONE_COMMIT_SHA": SHA, "DRONE_BUILD_NUMBER": "3", "DRONE_STEP_NAME": "deploy", "DRONE_REPO": "acme/web"}
    assert [runner.run("\n".join(step["commands"]), {**env, **given}).status for _ in range(2)] == [0, 0]
    given = {"GIT_COMMIT": SHA, "BUILD_URL": "https://ci.example.org/job/web/3/", "BUILD_TAG": "jenkins-web-3"}
    assert [runner.run(jenkins_script(), {**env, **given}).status for _ in range(2)] == [0, 0]
    assert [row["deploy_id"] for row in history(host)] == ["build-3-web-deploy-acme-web", "jenkins-web-3-web"]
    assert deployed(host) == [f"ghcr.io/acme/web:{SHA}"] * 2


@pytest.fixture
def key_file(tmp_path):
    file = tmp_path / "web-key"
    file.write_text(KEY)
    file.chmod(0o600)
    return file


def aim(text: str, host: Host, key_file: pathlib.Path) -> str:
    """Return a text of the page with the host and the key file of the test."""
    wanted = {"https://production.example.org:8443": f"http://127.0.0.1:{host.port}", "/etc/hookshot-web-key": str(key_file)}
    for old, new in wanted.items():
        assert old in text
        text = text.replace(old, new)
    return text


def test_the_script_by_hand_prints_what_the_page_shows(host, runner, key_file):
    script = aim(script_of("ci-hand"), host, key_file)
    ended = runner.run(f"cd {shlex.quote(str(runner.copy))}\n{script}", {})
    shown = next(block for block in read_blocks("") if block.page == PAGE).text
    assert ended.status == 0 and ended.out == ""
    assert re.sub(r"\d{8}-\d{6}-[0-9a-f]{8}", "ID", ended.err) == re.sub(r"\d{8}-\d{6}-[0-9a-f]{8}", "ID", shown)


def test_a_push_to_a_bare_repository_deploys(host, runner, key_file, tmp_path):
    git, bare = need("git"), tmp_path / "web.git"
    runner.add("git", f'exec {git} -c user.name=Ann -c user.email=ann@example.org -c init.defaultBranch=main -c protocol.file.allow=always "$@"')
    assert runner.run(f"git init --quiet --bare {bare} && git -C {bare} config receive.denyDeleteCurrent ignore && git init --quiet . && "
                      f"git remote add origin {bare}", {}).status == 0
    hook = bare / "hooks/post-receive"
    hook.write_text(aim(script_of("ci-git"), host, key_file))
    hook.chmod(0o755)

    def push(text: str) -> Ended:
        ended = runner.run(f"git commit --quiet --allow-empty --message 'A change' && {text}", {"HOOKSHOT_READ_TOKEN": TOKEN})
        assert ended.status == 0, ended.err
        return ended

    first = push("git push --quiet origin HEAD:refs/heads/main")
    commit = runner.run("git rev-parse HEAD", {}).out.strip()
    assert deployed(host) == [f"ghcr.io/acme/web:{commit}"] and "remote: " in first.err and "Succeeded" in first.err
    assert "deploying" in first.err
    push("git push --quiet origin HEAD:refs/heads/topic HEAD:refs/tags/v1")
    assert len(deployed(host)) == 1
    push("git push --quiet origin HEAD:refs/heads/topic HEAD:refs/heads/main HEAD:refs/heads/a")
    push("git push --quiet origin :refs/heads/main")
    assert len(deployed(host)) == 2


def test_cron_deploys_once_a_day(host, runner, key_file):
    text = aim(text_of("ci-cron", "cron"), host, key_file)
    settings, times, command = cron_line()
    env = dict(line.split("=", 1) for line in text.splitlines()[: len(settings)])
    assert "/usr/local/bin" in env.pop("PATH").split(":")
    assert times == "15 3 * * *" and r"\%" in text and not re.search(r"(?<!\\)%", text)
    # As midnight may come between them, the day is the same for both.
    runner.add("date", 'case "$*" in "-u +%Y-%m-%d") echo 2026-11-25;; *) exit 1;; esac')
    for _ in range(2):
        ended = runner.run(command, env, ("sh",))
        assert ended.status == 0, ended.err
    assert [row["deploy_id"] for row in history(host)] == ["nightly-2026-11-25"]


# --- keys


def test_a_key_of_a_service_is_made_as_the_page_says(tmp_path, runner):
    services = text_of("ci-keys", "toml")
    with running(tmp_path / "host", service()) as host:
        env = {"HOOKSHOT_CONFIG": str(host.config)}
        script = script_of("ci-keys")
        assert "/etc/hookshot/secrets" in script
        ended = runner.run(script.replace("/etc/hookshot/secrets", str(host.secrets)), env)
        assert ended.status == 0, ended.err
        # Podman and systemctl are the reader's.
        host.write(re.sub(r"commands = .*", 'commands = [["true"]]', services), CONFIG)
        ended = runner.run(script_of("ci-reload"), {**env, "HOOKSHOT_URL": f"http://127.0.0.1:{host.port}"})
        assert ended.status == 0 and "web_ci_key" in ended.out, ended
        keys = dict(line.split("=", 1) for line in host.secrets.read_text().split())
        image = f"ghcr.io/acme/web:{SHA}"
        ended = runner.deploy(host, "web", image, HOOKSHOT_HMAC_KEY=keys["web_ci_key"], HOOKSHOT_READ_TOKEN=keys["read_token"])
        assert ended.status == 0 and "Succeeded" in ended.out + ended.err
        assert runner.deploy(host, "web", "ghcr.io/acme/web:latest", HOOKSHOT_HMAC_KEY=keys["web_ci_key"]).status == 65
        assert runner.deploy(host, "other", image, HOOKSHOT_HMAC_KEY=keys["web_ci_key"]).status == 77


def test_the_statuses_that_the_script_names_are_those_of_the_client():
    head = SCRIPT.read_text().partition("\n{ set +x; }")[0]
    told = {int(number) for number in re.findall(r"\b(\d+)\b", head.partition("Exit status")[2].partition("The key never")[0])}
    assert told == {0, 2, 78, *hookshot.EXIT_OF_STATE.values(), hookshot.EXIT_STILL_RUNNING, *(kind.exit for name, kind in hookshot.ERRORS.items())} - {73}
