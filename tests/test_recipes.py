# SPDX-License-Identifier: MPL-2.0
"""The recipes of docs/recipes.md work: prepared as the page says, by paste, then deployed by a real server, once with success and
once with a failure that is rolled back.

Web servers, databases, virtual environments, downloads, Ansible and kubectl are real; kubectl speaks to an API server of these tests.
Container engines, Nomad and, but for one test, systemd are stand-ins: they write down how they were called and keep the little state that a rollback
shows in.
"""

import base64
import contextlib
import hashlib
import http.server
import io
import json
import os
import pathlib
import re
import shutil
import signal
import sqlite3
import ssl
import subprocess
import sys
import tarfile
import threading
import tomllib
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

import hookshot
from pages import read_blocks, run_script, script_of
from support import PATIENCE_S, ROOT, Certificates, Host, free_port, make_certificates, need, program, run_in_machine, running_proxy, wait_until

EXAMPLES = ROOT / "examples"
FILES = sorted(EXAMPLES.glob("*/*/services.toml"))
SCRIPTS = sorted(EXAMPLES.glob("*/*/*.sh"))
PAGE = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
# Where things lie on a host, and in the folder of a test.
PLACES = re.compile(r"(?<![\w./-])/(?:srv|etc|usr/local/lib)/")
SUCCEEDED, FAILED, ROLLED_BACK = 0, 10, 11

each_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.parent.name)


def load(file: pathlib.Path) -> tuple[hookshot.Services, list[hookshot.Problem]]:
    problems: list[hookshot.Problem] = []
    config = hookshot.load_config("", "config.toml", problems)
    return hookshot.load_services(file.read_text(encoding="utf-8"), str(file), config, problems), problems


def words_of(file: pathlib.Path) -> list[list[str]]:
    """Return every command of a file as it is written."""
    services, _ = load(file)
    return [[word.text for word in command.run] for service in services.by_name.values()
            for _, commands, _ in hookshot.service_commands(service) for command in commands]


# --- as text


def test_every_recipe_has_its_section_and_every_file_its_recipe():
    sections = re.split(r"^## (.*)\n", PAGE, flags=re.MULTILINE)[1:]
    named = {title: set(re.findall(r"examples/(?:services|engines)/[a-z-]+(?=/)", text)) for title, text in zip(sections[::2], sections[1::2], strict=True)}
    folders = [folder for text in named.values() for folder in text]
    assert sorted(folders) == sorted(str(file.parent.relative_to(ROOT)) for file in FILES)


@each_file
def test_a_recipe_loads_without_a_problem_and_can_be_rolled_back(file):
    services, problems = load(file)
    assert problems == []
    assert len(services.by_name) == 1
    for service in services.by_name.values():
        assert service.rollback.enabled and service.rollback.commands
        assert service.healthcheck.http or service.healthcheck.commands
        assert service.description and service.working_dir.startswith("/srv")


@each_file
def test_a_recipe_says_what_it_assumes_and_takes_only_versions(file):
    text = file.read_text(encoding="utf-8")
    assert text.startswith("# SPDX-License-Identifier: MPL-2.0\n# ") and "\n# Assumes: " in text.partition("[[service]]")[0]
    [service] = load(file)[0].by_name.values()
    pattern = service.security.allowed_image_pattern
    good = next(image for image in ("site:1.4.0", "app:1.4.0", "web:1.4.0", "ghcr.io/acme/web:v1.4.0", "ghcr.io/acme/shop:v1.4.0",
                                    f"app:1.4.0@sha256:{'0' * 64}") if pattern.fullmatch(image))
    for hostile in ("latest", f"{good}/../..", f"{good} --privileged", f"evil.example/{good}", good.replace(".", "x", 1), f"{good}\n",
                    good.replace("1.4.0", "../../etc"), good.replace("1.4.0", "-rf"), good.replace("1.4.0", "{{version}}"), good.replace("1.4.0", "")):
        assert not pattern.fullmatch(hostile), hostile


@each_file
def test_no_health_check_of_a_recipe_asks_for_the_image(file):
    """It runs again after a rollback, where IMAGE is still what failed."""
    health = tomllib.loads(file.read_text(encoding="utf-8"))["service"][0]["healthcheck"]
    assert "IMAGE" not in json.dumps(health)


@each_file
def test_a_recipe_names_only_scripts_that_stand_beside_it(file):
    named = {pathlib.Path(word).name for words in words_of(file) for word in words if word.startswith("/usr/local/lib/hookshot/")}
    assert named == {script.name for script in SCRIPTS if script.parent == file.parent}


def shell_texts() -> list[tuple[str, str]]:
    scripts = [(f"{file.parent.name}: {words[0]} -c", f"#!/bin/sh\n# shellcheck disable=SC2154\n{words[2]}\n")
               for file in FILES for words in words_of(file) if words[:2] == ["sh", "-c"]]
    return scripts + [(str(script.relative_to(EXAMPLES)), script.read_text(encoding="utf-8")) for script in SCRIPTS]


@pytest.mark.parametrize(("place", "text"), shell_texts(), ids=lambda value: value if len(value) < 60 else "")
def test_shellcheck_finds_nothing(place, text):
    done = subprocess.run([need("shellcheck"), "--shell=sh", "-"], input=text, capture_output=True, text=True, timeout=PATIENCE_S)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_script_can_be_run_and_ends_at_the_first_failure(script):
    text = script.read_text(encoding="utf-8")
    assert os.access(script, os.X_OK)
    assert text.startswith("#!/bin/sh\n# SPDX-License-Identifier: MPL-2.0\n") and "\nset -eu\n" in text


UNITS = sorted(EXAMPLES.glob("*/*/*.service"))


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: f"{unit.parent.name}/{unit.name}")
def test_systemd_takes_the_unit(tmp_path, unit):
    """Under a folder where the program is there: systemd-analyze looks for it."""
    text = unit.read_text(encoding="utf-8")
    for path in ("/srv/app/current/bin/app", "/srv/app/current/run", "/srv/app/current", "/srv/web/%i/run"):
        text = text.replace(f"ExecStart={path}\n", "ExecStart=/bin/true\n")
    assert "/bin/true" in text
    text = text.replace("User=hookshot", "User=daemon")
    (tmp_path / unit.name).write_text(text)
    name = unit.name.replace("@", "@blue")
    if name != unit.name:
        (tmp_path / name).symlink_to(tmp_path / unit.name)
    done = subprocess.run([need("systemd-analyze"), "verify", tmp_path / name], capture_output=True, text=True, timeout=PATIENCE_S)
    assert (done.returncode, done.stderr) == (0, "")


# Of podman-systemd.unit(5), as of podman 4.4; the other sections are systemd's own.
QUADLET_KEYS = {
    "Container": {"AddCapability", "Annotation", "ContainerName", "DropCapability", "Environment", "EnvironmentFile", "EnvironmentHost", "Exec",
                  "ExposeHostPort", "Group", "Image", "Label", "Network", "NoNewPrivileges", "Notify", "PodmanArgs", "PublishPort", "ReadOnly",
                  "RunInit", "SeccompProfile", "Secret", "Timezone", "User", "VolatileTmp", "Volume"},
    "Volume": {"Copy", "Device", "Group", "Label", "Options", "Type", "User"},
    "Unit": {"Description", "Wants", "After"}, "Service": {"Restart", "RestartSec", "TimeoutStartSec"}, "Install": {"WantedBy"}}


@pytest.mark.parametrize("name", ["web.container", "web-data.volume"])
def test_a_quadlet_has_only_keys_that_there_are(name):
    """Debian 12 has no generator of Quadlets, so this is a check of names and no more."""
    section, keys = "", []
    for line in (EXAMPLES / "services" / "quadlet" / name).read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif line and not line.startswith("#"):
            keys.append((section, line.partition("=")[0]))
    assert keys and [(section, key) for section, key in keys if key not in QUADLET_KEYS[section]] == []


YAML = sorted(file for pattern in ("*.yml", "*.yaml") for folder in ("services", "engines") for file in (EXAMPLES / folder).rglob(pattern))


def read_yaml(text: str) -> list[Any]:
    """Return the documents of a text, read by the Python of the system, which has python3-yaml; the one of this test may not."""
    source = "import json, sys, yaml; print(json.dumps(list(yaml.safe_load_all(sys.stdin))))"
    done = subprocess.run(["/usr/bin/python3", "-c", source], input=text, capture_output=True, text=True, timeout=PATIENCE_S)
    if "No module named 'yaml'" in done.stderr:
        pytest.skip("missing: python3-yaml")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("file", YAML, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_yaml_is_yaml(file):
    assert all(read_yaml(file.read_text(encoding="utf-8")))


def test_the_job_of_nomad_closes_what_it_opens():
    """No parser of HCL is at hand: brackets, and the names that services.toml and run.sh count on."""
    for name in ("web.nomad.hcl", "hookshot.policy.hcl"):
        text = (EXAMPLES / "engines" / "nomad" / name).read_text(encoding="utf-8")
        bare = re.sub(r'"[^"\n]*"|#.*', "", text)
        assert '"' not in bare
        for opening, closing in ("{}", "[]"):
            assert bare.count(opening) == bare.count(closing) > 0
    job = (EXAMPLES / "engines" / "nomad" / "web.nomad.hcl").read_text(encoding="utf-8")
    assert 'variable "image"' in job and "image    = var.image" in job and 'job "web"' in job
    assert re.search(r"auto_revert +?= true", job)


def test_docker_knows_the_flags_and_takes_the_stack():
    """Where a docker client is at hand; neither needs an engine."""
    docker = shutil.which("docker")
    if not docker:
        pytest.skip("no docker client here; the flags are those of Docker 20.10")
    text = (EXAMPLES / "engines/swarm/update.sh").read_text(encoding="utf-8")
    flags = set(re.findall(r"--[a-z-]+", text.partition("docker service update")[2].partition("\nruns=")[0].partition("\n#")[0]))
    known = subprocess.run([docker, "service", "update", "--help"], capture_output=True, text=True, timeout=PATIENCE_S).stdout
    assert len(flags) == 5 and {flag for flag in flags if f"{flag} " not in known} == set()
    done = subprocess.run([docker, "stack", "config", "--compose-file", EXAMPLES / "engines/swarm/stack.yaml"], capture_output=True, text=True,
                          timeout=PATIENCE_S)
    if "docker stack COMMAND" in done.stderr:
        return  # Older than Docker 25.
    assert done.returncode == 0 and "failure_action: rollback" in done.stdout, done.stderr


@pytest.mark.parametrize("file", sorted(file for kind in ("services", "engines") for file in (EXAMPLES / kind).rglob("*") if file.is_file()),
                         ids=lambda file: f"{file.parent.name}/{file.name}")
def test_an_example_begins_with_its_license(file):
    assert re.match(r"(#!.*\n)?(#|//) SPDX-License-Identifier: MPL-2.0\n", file.read_text(encoding="utf-8"))


def test_polkit_allows_what_the_recipes_call_and_no_more():
    rules = (EXAMPLES / "services/hookshot.rules").read_text(encoding="utf-8")
    allowed = {(unit, verb) for unit, verbs in json.loads(rules[rules.index("var allowed = ") + 14 : rules.index(";\n  if")]).items() for verb in verbs}
    called = {(words[2], words[1]) for file in FILES if file.parent.name != "quadlet" for words in words_of(file) if words[0] == "systemctl"}
    for script in SCRIPTS:
        for verb, unit in re.findall(r'systemctl (\w+) "?([\w@$.]+)', script.read_text(encoding="utf-8")):
            called |= {(unit.replace("$idle", colour), verb) for colour in ("blue", "green")}
    assert allowed == called


# --- a host for a recipe

STAND_IN = '''#!/bin/sh
cd "@STATE@" || exit
name=${0##*/}
[ "$name" = chown ] || printf '%s\\n' "$name $*" >>calls
'''
# Starts, stops and restarts what a unit file in etc/systemd/system names; nginx reads its files anew.
SYSTEMCTL = r'''
stop() {
    [ -f "$1.pid" ] || return 0
    pid=$(cat "$1.pid")
    kill -9 "$pid" 2>/dev/null || return 0
    while [ -d "/proc/$pid" ] && ! grep -q '^State:.Z' "/proc/$pid/status" 2>/dev/null; do sleep 0.02; done
    rm -f "$1.pid"
}
start() {
    file=$1 instance=
    case $1 in *@*) instance=${1#*@} instance=${instance%.service} file=${1%%@*}@.service ;; esac
    unit=$(sed "s/%i/$instance/g" "@ROOT@/etc/systemd/system/$file")
    value() { printf '%s\n' "$unit" | sed -n "s/^$1=//p"; }
    files=$(value EnvironmentFile)
    [ -z "$files" ] || files=$(grep -v '^#' "$files")
    folder=$(value WorkingDirectory)
    program=$(value ExecStart)
    name=$1 state=$PWD
    case $folder in "@ROOT@"*) cd "$folder" || exit ;; esac
    env $(value Environment) $files setsid "$program" </dev/null >>"$state/$name.log" 2>&1 &
    echo $! >"$state/$name.pid"
}
case "$1 $2" in
    "restart web.service") cp tag live; exit ;;
    "reload nginx.service") exec nginx -p "@ROOT@" -c "@ROOT@/nginx.conf" -s reload ;;
    restart*) stop "$2"; start "$2" ;;
    start*) start "$2" ;;
    stop*) stop "$2" ;;
esac
'''
NGINX = "@USER@pid nginx.pid;\ndaemon off;\nerror_log stderr;\nevents {}\nhttp {\naccess_log off;\n" + "".join(
    f"{name}_temp_path {name};\n" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")) + "include etc/nginx/conf.d/*.conf;\n}\n"


class Stage:
    """A host for one recipe: its files in a folder, stand-ins before the real programs, a server that runs without services.

    What the page says to paste is pasted with the host's paths led into the folder, and with `replaced`: ports and names.
    Health checks have fewer probes than in the examples, and no wait before them.
    """

    def __init__(self, folder: pathlib.Path, replaced: Mapping[str, str], stand_ins: Mapping[str, str]):
        self.folder, self.replaced, self.state, self.bin = folder, dict(replaced), folder / "state", folder / "stand-ins"
        for path in (self.state, self.bin, folder / "etc/nginx/conf.d", folder / "etc/systemd/system"):
            path.mkdir(parents=True, exist_ok=True)
        self.host = Host(folder / "etc/hookshot", "")
        for file in (file for kind in ("services", "engines") for file in (EXAMPLES / kind).rglob("*") if file.is_file()):
            copy = folder / file.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            text = self.place(file.read_text(encoding="utf-8"))
            copy.write_text(self.hasten(text) if file.name == "services.toml" else text)
        for name, text in {"systemctl": SYSTEMCTL, "chown": "", **stand_ins}.items():
            head = STAND_IN.replace("@STATE@", str(self.state))
            self.add_program(name, head + text.replace("@ROOT@", str(folder)))
        # "runuser -u hookshot -- PROGRAM": everything of a test runs as one user.
        self.add_program("runuser", '#!/bin/sh\nshift 3\nexec "$@"\n')
        self.add_program("hookshot", '#!/bin/sh\nexec "{}" "{}" "$@"\n'.format(*program()))

    def add_program(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def place(self, text: str) -> str:
        text = PLACES.sub(lambda match: f"{self.folder}{match[0]}", text)
        for old, new in self.replaced.items():
            text = text.replace(old, new)
        return text

    def hasten(self, text: str) -> str:
        for name, value in {"initial_delay": 0, "interval": 1, "max_attempts": 6, "success_threshold": 2}.items():
            text, count = re.subn(rf"^{name} = \d+$", f"{name} = {value}", text, flags=re.MULTILINE)
            assert count == 1, name
        return text.replace("retries = 2", "retries = 1, retry_delay = 0")

    @property
    def path(self) -> str:
        return f"{self.bin}:{os.environ['PATH']}"

    def start(self) -> None:
        self.host.start(env={"PATH": self.path})

    def paste(self, name: str, files: Mapping[str, str] = {}) -> str:
        """Run the blocks of a name as they are pasted, in a folder with the examples and these files; return what they print."""
        folder = self.folder / name
        folder.mkdir()
        (folder / "examples").symlink_to(self.folder / "examples")
        for file, text in files.items():
            (folder / file).write_text(text)
        done = run_script(f"export PATH='{self.path}' HOOKSHOT_CONFIG='{self.host.config}' HOOKSHOT_URL='{self.host.urls[0]}'\n"
                          + self.place(script_of(name)), folder)
        assert done.returncode == 0, done.stdout + self.host.output.read_text()
        return done.stdout

    def deploy(self, service: str, image: str, *flags: str) -> tuple[int, str]:
        """Deploy as a client does; return its exit status and the log."""
        done = self.host.cli("deploy", service, image, *flags, patience_s=4 * PATIENCE_S)
        return done.returncode, done.stdout + done.stderr

    def calls(self) -> list[str]:
        """Return how the stand-ins were called since the last time, in the paths of a real host."""
        file = self.state / "calls"
        text = file.read_text().replace(str(self.folder), "") if file.exists() else ""
        file.write_text("")
        return text.splitlines()

    def keep(self, name: str, text: str) -> None:
        (self.state / name).write_text(text)

    def known(self, name: str) -> str:
        return (self.state / name).read_text().strip()

    def link(self, path: str) -> str:
        return os.readlink(self.folder / path)

    def close(self) -> None:
        self.host.close()
        for file in self.state.glob("*.pid"):
            with contextlib.suppress(ProcessLookupError, ValueError):
                os.kill(int(file.read_text()), signal.SIGKILL)


@contextlib.contextmanager
def stage_of(folder: pathlib.Path, replaced: Mapping[str, str], stand_ins: Mapping[str, str] = {}) -> Iterator[Stage]:
    for name in ("bash", "curl", "setsid"):
        need(name)
    stage = Stage(folder, replaced, stand_ins)
    try:
        stage.start()
        yield stage
    finally:
        stage.close()


@contextlib.contextmanager
def serving(answer: Callable[[str], tuple[int, bytes]]) -> Iterator[int]:
    """Give the port of a web server that answers a path with a status and a body."""

    class Handler(Quiet):
        def do_GET(self) -> None:
            self.give(*answer(self.path))

    with listening(Handler) as port:
        yield port


@contextlib.contextmanager
def serving_api(cluster: "Cluster", certificates: Certificates) -> Iterator[int]:
    """Give the port of a cluster's API server. It speaks TLS: kubectl sends no token without."""

    class Handler(Quiet):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, document = cluster.answer(self.command, self.path, self.headers.get("Authorization", "").removeprefix("Bearer "), body)
            self.give(status, json.dumps(document).encode(), "application/json")

        do_PATCH = do_GET

    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificates.server, certificates.server_key)
    with listening(Handler, tls) as port:
        yield port


class Quiet(http.server.BaseHTTPRequestHandler):
    """Answers without a line on stderr."""

    def give(self, status: int, body: bytes, kind: str = "text/html") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@contextlib.contextmanager
def listening(handler: type[Quiet], tls: ssl.SSLContext | None = None) -> Iterator[int]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        if tls:
            server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def nginx_of(stage: Stage) -> Iterator[None]:
    """Run a real nginx with what lies in etc/nginx/conf.d."""
    text = NGINX.replace("@USER@", "user root;\n" if os.geteuid() == 0 else "")
    with running_proxy("nginx", stage.folder, text, (stage.folder / "nginx.pid").exists):
        yield


def get(port: int, path: str = "/") -> str:
    return subprocess.run(["curl", "--silent", "--fail", "--max-time", "10", f"http://127.0.0.1:{port}{path}"], capture_output=True, text=True).stdout


def program_text(version: str, *, health: int = 200, page: int = 200) -> str:
    """Return a program that serves on $PORT: /health with one status, everything else with another and its version."""
    return f'''#!{sys.executable}
import http.server, os


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response({health} if self.path == "/health" else {page})
        self.end_headers()
        self.wfile.write(b"{version}")


http.server.HTTPServer(("127.0.0.1", int(os.environ["PORT"])), Handler).serve_forever()
'''


def write_program(file: pathlib.Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    file.chmod(0o755)


# --- services, with real parts


def test_a_static_site_is_switched_and_switched_back(tmp_path):
    need("nginx")
    port = free_port()
    with stage_of(tmp_path, {"127.0.0.1:8081": f"127.0.0.1:{port}"}) as stage, nginx_of(stage):
        stage.paste("recipe-static-site")
        releases = tmp_path / "srv/site/releases"
        for version, page in {"1.4.0": "<html>one</html>\n", "1.5.0": "<html>cut sho"}.items():
            (releases / version).mkdir()
            (releases / version / "index.html").write_text(page)

        assert "Succeeded" in stage.paste("recipe-static-site-deploy")
        assert get(port) == "<html>one</html>\n"

        for version in ("1.5.0", "1.6.0"):
            status, said = stage.deploy("site", f"site:{version}")
            assert status == ROLLED_BACK, said
            assert stage.link("srv/site/current") == "releases/1.4.0" and get(port) == "<html>one</html>\n"


def test_a_static_site_keeps_five_releases(tmp_path):
    need("nginx")
    port = free_port()
    with stage_of(tmp_path, {"127.0.0.1:8081": f"127.0.0.1:{port}"}) as stage, nginx_of(stage):
        stage.paste("recipe-static-site")
        releases = tmp_path / "srv/site/releases"
        for number in range(8):
            (releases / f"1.{number}.0").mkdir()
            (releases / f"1.{number}.0" / "index.html").write_text("<html></html>")
            os.utime(releases / f"1.{number}.0", (number, number))
        # The oldest by its folder; deployed now, it is the newest.
        assert stage.deploy("site", "site:1.0.0")[0] == SUCCEEDED
        wait_until(lambda: sorted(os.listdir(releases)) == ["1.0.0", "1.4.0", "1.5.0", "1.6.0", "1.7.0"])


def test_a_binary_is_fetched_by_its_checksum_and_rolled_back(tmp_path):
    files: dict[str, bytes] = {}
    port = free_port()

    def publish(version: str, text: str) -> str:
        files[f"/app/{version}/app-linux-amd64"] = text.encode()
        return f"app:{version}@sha256:{hashlib.sha256(text.encode()).hexdigest()}"

    with serving(lambda path: (200, files[path]) if path in files else (404, b"")) as downloads, \
            stage_of(tmp_path, {"https://downloads.example.org": f"http://127.0.0.1:{downloads}", "127.0.0.1:8000": f"127.0.0.1:{port}",
                                "PORT=8000": f"PORT={port}"}) as stage:
        stage.paste("recipe-binary")
        good = program_text("one")
        publish("1.4.0", good)
        assert "Succeeded" in stage.paste("recipe-binary-deploy", {"app-linux-amd64": good})
        assert get(port) == "one"
        live = stage.link("srv/app/current")
        stage.calls()

        # Another file than the signed request means: refused before anything is switched.
        publish("1.5.0", program_text("evil"))
        status, said = stage.deploy("app", f"app:1.5.0@sha256:{hashlib.sha256(b'what was built').hexdigest()}")
        assert status == ROLLED_BACK and "its checksum is" in said, said
        assert stage.link("srv/app/current") == live and os.listdir(tmp_path / "srv/app/releases") == [live.removeprefix("releases/")]

        status, said = stage.deploy("app", publish("1.6.0", program_text("ill", health=404)))
        assert status == ROLLED_BACK, said
        assert stage.link("srv/app/current") == live and get(port) == "one"
        assert stage.calls() == ["systemctl restart app.service"] * 3

        # The same version built anew is another file, and leaves the one before where it is.
        assert stage.deploy("app", publish("1.4.0", program_text("one again")))[0] == SUCCEEDED
        assert get(port) == "one again" and (tmp_path / "srv/app" / live).exists()


def write_wheel(folder: pathlib.Path, version: str, text: str, requires: str = "") -> None:
    """Write a wheel of package "app", with a program of that name."""
    info = f"app-{version}.dist-info"
    parts = {"app.py": text, f"{info}/METADATA": f"Metadata-Version: 2.1\nName: app\nVersion: {version}\n{requires}",
             f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
             f"{info}/entry_points.txt": "[console_scripts]\napp = app:main\n"}
    with zipfile.ZipFile(folder / f"app-{version}-py3-none-any.whl", "w") as wheel:
        for name, content in parts.items():
            wheel.writestr(name, content)
        wheel.writestr(f"{info}/RECORD", "".join(f"{name},,\n" for name in [*parts, f"{info}/RECORD"]))


def module_text(version: str, *, health: int = 200) -> str:
    head, _, tail = program_text(version, health=health).rpartition("\nhttp.server.HTTPServer")
    return f"{head}\ndef main():\n    http.server.HTTPServer{tail}"


def test_a_python_application_gets_an_environment_for_each_version(tmp_path):
    port = free_port()
    with stage_of(tmp_path, {"127.0.0.1:8000": f"127.0.0.1:{port}", "PORT=8000": f"PORT={port}"}) as stage:
        stage.paste("recipe-venv")
        wheels = tmp_path / "srv/app/wheels"
        write_wheel(wheels, "1.4.0", module_text("one"))
        write_wheel(wheels, "1.5.0", module_text("ill", health=500))
        write_wheel(wheels, "1.6.0", module_text("needs"), requires="Requires-Dist: not-uploaded\n")

        assert "Succeeded" in stage.paste("recipe-venv-deploy")
        assert get(port) == "one"
        stage.calls()

        status, said = stage.deploy("app", "app:1.5.0")
        assert status == ROLLED_BACK, said
        assert stage.link("srv/app/current") == "venvs/1.4.0" and get(port) == "one"
        assert stage.calls() == ["systemctl restart app.service"] * 2

        # A wheel that is missing, and an environment whose program cannot be imported: seen before the switch.
        shutil.copytree(tmp_path / "srv/app/venvs/1.4.0", tmp_path / "srv/app/venvs/1.7.0", symlinks=True)
        [module] = (tmp_path / "srv/app/venvs/1.7.0").glob("lib/*/site-packages/app.py")
        module.write_text("import not_there\n")
        for version, why in {"1.6.0": "not-uploaded", "1.7.0": "not_there"}.items():
            status, said = stage.deploy("app", f"app:{version}")
            assert status == ROLLED_BACK and why in said, said
            assert get(port) == "one"
        assert not (tmp_path / "srv/app/venvs/1.6.0/complete").exists()


def test_blue_and_green_are_switched_without_a_gap(tmp_path):
    need("nginx")
    ports = {number: free_port() for number in (8000, 8001, 8002)}
    with stage_of(tmp_path, {f"127.0.0.1:{old}": f"127.0.0.1:{new}" for old, new in ports.items()}
                  | {f"PORT={old}": f"PORT={new}" for old, new in ports.items()}) as stage, nginx_of(stage):
        stage.paste("recipe-blue-green")
        releases = tmp_path / "srv/web/releases"
        write_program(releases / "1.4.0/run", program_text("one"))
        write_program(releases / "1.5.0/run", program_text("two"))
        write_program(releases / "1.6.0/run", program_text("mute", health=404))
        write_program(releases / "1.7.0/run", program_text("no page", page=404))
        # nginx starts new workers after its reload has returned.
        live = lambda text: wait_until(lambda: get(ports[8000]) == text)

        assert "Succeeded" in stage.paste("recipe-blue-green-deploy")
        live("one")
        assert stage.link("srv/web/live.conf") == "proxy/green.conf"

        assert stage.deploy("web", "web:1.5.0")[0] == SUCCEEDED
        live("two")
        assert stage.link("srv/web/live.conf") == "proxy/blue.conf"
        assert get(ports[8002]) == "one", "the release before runs on"

        # It does not answer where it was started, so nothing was sent to it: the link is as old as it was.
        before = os.lstat(tmp_path / "srv/web/live.conf").st_ino
        status, said = stage.deploy("web", "web:1.6.0")
        assert status == ROLLED_BACK, said
        assert os.lstat(tmp_path / "srv/web/live.conf").st_ino == before
        live("two")

        # It answers for itself and not as users come: switched, and switched back.
        stage.calls()
        status, said = stage.deploy("web", "web:1.7.0")
        assert status == ROLLED_BACK, said
        assert stage.link("srv/web/live.conf") == "proxy/blue.conf"
        live("two")
        assert stage.calls() == ["systemctl restart web@green.service", "systemctl reload nginx.service", "systemctl reload nginx.service"]


DATABASE_PROGRAM = f'''#!{sys.executable}
import http.server, os, sqlite3

database = sqlite3.connect("data/app.db", isolation_level=None)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        try:
            database.execute("INSERT INTO visits (path) VALUES (?)", (self.path,))
            rows = database.execute("SELECT @COLUMNS@ FROM notes").fetchall()
            self.send_response(@STATUS@)
        except sqlite3.Error as error:
            self.send_response(500)
            rows = error
        self.end_headers()
        self.wfile.write(str(rows).encode())


http.server.HTTPServer(("127.0.0.1", int(os.environ["PORT"])), Handler).serve_forever()
'''


def test_migrations_pass_a_gate_and_are_taken_back(tmp_path):
    need("sqlite3")
    port = free_port()
    folder = tmp_path / "srv/app"

    def release(version: str, columns: str, *, status: int = 200, **migrations: str) -> None:
        write_program(folder / "releases" / version / "run", DATABASE_PROGRAM.replace("@COLUMNS@", columns).replace("@STATUS@", str(status)))
        (folder / "releases" / version / "migrations").mkdir()
        for name, text in {"0001_first": "CREATE TABLE notes (text TEXT); CREATE TABLE visits (path TEXT)", **migrations}.items():
            (folder / "releases" / version / "migrations" / f"{name.replace('_', '-')}.sql").write_text(text)

    def ask(sql: str) -> list[Any]:
        with contextlib.closing(sqlite3.connect(folder / "data/app.db")) as database:
            return database.execute(sql).fetchall()

    with stage_of(tmp_path, {"127.0.0.1:8000": f"127.0.0.1:{port}", "PORT=8000": f"PORT={port}"}) as stage:
        stage.paste("recipe-migration")
        release("1.4.0", "text")
        assert "Succeeded" in stage.paste("recipe-migration-deploy")
        assert ask("PRAGMA user_version") == [(1,)] and get(port, "/health") == "[]"
        with contextlib.closing(sqlite3.connect(folder / "data/app.db", isolation_level=None)) as database:
            database.execute("INSERT INTO notes VALUES ('old')")

        two = {"0002_stars": "ALTER TABLE notes ADD COLUMN stars INTEGER DEFAULT 5; -- of 5"}
        release("1.5.0", "text, stars", **two)
        assert stage.deploy("app", "app:1.5.0")[0] == SUCCEEDED
        assert get(port) == "[('old', 5)]"
        stage.calls()

        # The gate: a schema that the release does not know, and a migration that fails on the copy. Nothing is even stopped.
        release("1.6.0", "text", **two, **{"0003_bad": "CREATE TABLE half (x); ALTER TABLE nowhere ADD COLUMN y"})
        for image, why in {"app:1.4.0": "is at migration 2", "app:1.6.0": "nowhere"}.items():
            status, said = stage.deploy("app", image)
            assert status == FAILED and why in said, said
        assert stage.calls() == [] and get(port) == "[('old', 5)]" and ask("PRAGMA user_version") == [(2,)]
        assert list((folder / "backups").glob("*rehearsal*")) == []

        # Migrated, and ill: the schema and the rows of before are back, and what was replaced is kept.
        release("1.7.0", "text, stars, colour", status=500, **two, **{"0003_colour": "ALTER TABLE notes ADD COLUMN colour; DELETE FROM notes"})
        status, said = stage.deploy("app", "app:1.7.0", "--id", "the-seventh")
        assert status == ROLLED_BACK, said
        assert stage.link("srv/app/current") == "releases/1.5.0" and get(port) == "[('old', 5)]"
        assert ask("PRAGMA user_version") == [(2,)] and ask("PRAGMA integrity_check") == [("ok",)]
        assert (folder / "data/app.db.the-seventh").exists()
        assert stage.calls() == [f"systemctl {verb} app.service" for verb in ("stop", "start", "stop", "start")]


def test_a_restore_that_was_cut_short_goes_on(tmp_path):
    """It may be killed between any two of its steps, and is tried again."""
    need("sqlite3")
    script = EXAMPLES / "services/migration/database.sh"
    (tmp_path / "data").mkdir()
    (tmp_path / "backups").mkdir()
    for file, version in {"data/app.db": 2, "backups/x.db": 1}.items():
        with contextlib.closing(sqlite3.connect(tmp_path / file)) as database:
            database.execute(f"PRAGMA user_version = {version}")
            database.execute("CREATE TABLE t (x)")
            database.commit()

    def version() -> int:
        with contextlib.closing(sqlite3.connect(tmp_path / "data/app.db")) as database:
            return database.execute("PRAGMA user_version").fetchone()[0]

    def restore(name: str) -> str:
        return subprocess.run([script, "restore", name], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    assert "no backup" in restore("never") and version() == 2
    (tmp_path / "data/app.db").rename(tmp_path / "data/app.db.x")
    (tmp_path / "data/app.db.new").write_text("half of it")
    assert "restored" in restore("x") and version() == 1
    assert "nothing to restore" in restore("x") and version() == 1


# --- services and engines, with stand-ins

# Every release answers but v2.0.0, whose rollout is good, and v3.0.0, whose rollout is not.
ILL, UNROLLABLE = "v2.0.0", "v3.0.0"


def answer_of(state: pathlib.Path) -> Callable[[str], tuple[int, bytes]]:
    """Return what the application answers whose image stands in the file live."""

    def answer(path: str) -> tuple[int, bytes]:
        image = (state / "live").read_text().strip() if (state / "live").exists() else ""
        return (200 if image and ILL not in image else 500), image.encode()

    return answer


@contextlib.contextmanager
def container_stage(folder: pathlib.Path, url: str, stand_ins: Mapping[str, str]) -> Iterator[Stage]:
    with serving(answer_of(folder / "state")) as port, stage_of(folder, {url: f"http://127.0.0.1:{port}"}, stand_ins) as stage:
        yield stage


PODMAN = '''
case "$1 $2" in
    "pull --quiet") case $3 in *v9.9.9) echo "manifest unknown" >&2; exit 125 ;; esac; echo "$3" >>images ;;
    "image exists") grep -qxF "$3" images ;;
    tag*) grep -qxF "$2" images && echo "$2" >tag ;;
esac
'''


def test_a_quadlet_is_restarted_with_another_tag(tmp_path):
    with container_stage(tmp_path, "http://127.0.0.1:8000", {"podman": PODMAN}) as stage:
        stage.keep("tag", "")
        stage.paste("recipe-quadlet")
        stage.calls()
        image = "ghcr.io/acme/web:v"
        assert "Succeeded" in stage.paste("recipe-quadlet-deploy")
        assert stage.calls() == [f"podman pull --quiet {image}1.4.0", f"podman tag {image}1.4.0 localhost/web:live", "systemctl restart web.service",
                                 *["systemctl is-active --quiet web.service"] * 2]

        status, said = stage.deploy("web", f"{image}2.0.0")
        assert status == ROLLED_BACK, said
        calls = stage.calls()
        assert calls[:3] == [f"podman pull --quiet {image}2.0.0", f"podman tag {image}2.0.0 localhost/web:live", "systemctl restart web.service"]
        assert calls[-5:] == [f"podman image exists {image}1.4.0", f"podman tag {image}1.4.0 localhost/web:live", "systemctl restart web.service",
                              *["systemctl is-active --quiet web.service"] * 2]
        assert stage.known("live") == f"{image}1.4.0"

        # Pruned meanwhile: the image before is pulled again.
        stage.keep("images", "")
        assert stage.deploy("web", f"{image}2.0.0")[0] == ROLLED_BACK
        assert f"podman pull --quiet {image}1.4.0" in stage.calls() and stage.known("live") == f"{image}1.4.0"

        # Cannot be pulled: tried twice here, three times in the example; what runs is as it was.
        status, said = stage.deploy("web", f"{image}9.9.9")
        assert status == ROLLED_BACK and "manifest unknown" in said, said
        assert stage.calls()[:2] == [f"podman pull --quiet {image}9.9.9"] * 2 and stage.known("live") == f"{image}1.4.0"


DOCKER = '''
image=
for word; do
    [ "$image" = next ] && image=$word
    [ "$word" = --image ] && image=next
done
case "$1 $2" in
    "compose up")
        . "@ROOT@/srv/shop/.env"
        case $WEB_IMAGE in *v3.0.0) echo "container shop-web-1 is unhealthy" >&2; exit 1 ;; esac
        echo "$WEB_IMAGE" >live ;;
    "service update")
        # Swarm goes back from this one by itself, and says 0.
        case $image in *v3.0.0) exit 0 ;; esac
        echo "$image@sha256:0123" >live ;;
    "service inspect") cat live ;;
esac
'''


def test_a_compose_project_is_brought_up_with_what_env_names(tmp_path):
    with container_stage(tmp_path, "http://127.0.0.1:8000", {"docker": DOCKER}) as stage:
        stage.paste("recipe-compose")
        assert len((tmp_path / "srv/shop/db_password").read_text().strip()) >= 32
        assert (tmp_path / "srv/shop/db_password").stat().st_mode & 0o777 == 0o600
        assert "Succeeded" in stage.paste("recipe-compose-deploy")
        image, up = "ghcr.io/acme/shop:v", "docker compose up --detach --wait --wait-timeout 120 --quiet-pull web"
        assert stage.calls() == [f"docker pull --quiet {image}1.4.0", up]
        for version in (ILL, UNROLLABLE):
            status, said = stage.deploy("shop", f"ghcr.io/acme/shop:{version}")
            assert status == ROLLED_BACK, said
            assert stage.calls() == [f"docker pull --quiet ghcr.io/acme/shop:{version}", up, up]
            assert (tmp_path / "srv/shop/.env").read_text() == f"WEB_IMAGE={image}1.4.0\n" and stage.known("live") == f"{image}1.4.0"


def test_a_compose_file_takes_its_image_from_env_alone():
    [document] = read_yaml((EXAMPLES / "services/compose/compose.yaml").read_text(encoding="utf-8"))
    assert document["services"]["web"]["image"].startswith("${WEB_IMAGE:?")
    assert all("healthcheck" in service for service in document["services"].values())
    assert set(document["services"]["db"]["secrets"]) == document["secrets"].keys()


def test_a_service_of_the_swarm_is_updated_and_looked_at(tmp_path):
    with container_stage(tmp_path, "http://127.0.0.1:8000", {"docker": DOCKER}) as stage:
        stage.paste("recipe-swarm")
        assert stage.calls() == ["docker stack deploy --with-registry-auth --compose-file examples/engines/swarm/stack.yaml web"]
        assert "Succeeded" in stage.paste("recipe-swarm-deploy")
        image = "ghcr.io/acme/web:v"
        update = f"docker service update --detach=false --quiet --with-registry-auth --update-failure-action rollback --image {image}"
        look = "docker service inspect --format {{.Spec.TaskTemplate.ContainerSpec.Image}} web_web"
        assert stage.calls() == [f"{update}1.4.0 web_web", look]
        for version in ("2.0.0", "3.0.0"):
            status, said = stage.deploy("web", f"{image}{version}")
            assert status == ROLLED_BACK, said
            assert ("not ghcr.io/acme/web:v3.0.0" in said) == (version == "3.0.0")
            assert stage.calls() == [f"{update}{version} web_web", look, f"{update}1.4.0 web_web", look]
            assert stage.known("live") == f"{image}1.4.0@sha256:0123"


class Cluster:
    """An API server of Kubernetes with one Deployment, for a real kubectl: what a token may do is what rbac.yaml says."""

    ADMIN, TOKEN = "admin-t0ken", "s3rvice-account-t0ken"
    BASE = "/apis/apps/v1/namespaces/web/deployments"

    def __init__(self, state: pathlib.Path):
        self.state, self.requests = state, []
        folder = EXAMPLES / "engines/kubernetes"
        documents = [document for name in ("deployment.yaml", "rbac.yaml") for document in read_yaml((folder / name).read_text(encoding="utf-8"))]
        self.deployment = next(document for document in documents if document["kind"] == "Deployment")
        [self.rule] = next(document for document in documents if document["kind"] == "Role")["rules"]
        self.deployment["metadata"] |= {"generation": 0, "resourceVersion": "1", "uid": "1"}
        self.roll()

    def roll(self) -> None:
        """Have the rollout of what is set end at once."""
        self.deployment["metadata"]["generation"] += 1
        image = self.deployment["spec"]["template"]["spec"]["containers"][0]["image"]
        stuck = UNROLLABLE in image
        self.deployment["status"] = {
            "observedGeneration": self.deployment["metadata"]["generation"], "replicas": 2, "updatedReplicas": 2 - stuck, "availableReplicas": 2,
            "readyReplicas": 2, "conditions": [{"type": "Progressing", "status": str(not stuck),
                                               "reason": "ProgressDeadlineExceeded" if stuck else "NewReplicaSetAvailable"}]}
        if not stuck:
            (self.state / "live").write_text(image)

    def answer(self, method: str, url: str, token: str, body: bytes) -> tuple[int, Any]:
        path, _, query = url.partition("?")
        discovery = {
            "/api": {"kind": "APIVersions", "versions": ["v1"]},
            "/apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": [{
                "name": "apps", "versions": [{"groupVersion": "apps/v1", "version": "v1"}], "preferredVersion": {"groupVersion": "apps/v1", "version": "v1"}}]},
            "/api/v1": {"kind": "APIResourceList", "groupVersion": "v1", "resources": [
                {"name": "secrets", "singularName": "", "namespaced": True, "kind": "Secret", "verbs": ["get"]}]},
            "/apis/apps/v1": {"kind": "APIResourceList", "groupVersion": "apps/v1", "resources": [
                {"name": "deployments", "singularName": "", "namespaced": True, "kind": "Deployment", "verbs": ["get", "list", "patch", "watch"]}]}}
        if method == "GET" and path in discovery:
            return 200, discovery[path]
        if path == "/api/v1/namespaces/web/secrets/hookshot-token" and token == self.ADMIN:
            return 200, {"kind": "Secret", "apiVersion": "v1", "metadata": {"name": "hookshot-token", "namespace": "web"},
                         "data": {"token": base64.b64encode(self.TOKEN.encode()).decode()}}
        selected = path == f"{self.BASE}/web" or "fieldSelector=metadata.name%3Dweb" in query
        verb = "patch" if method == "PATCH" else "watch" if "watch=true" in query else "list" if path == self.BASE else "get"
        self.requests.append(f"{verb} {path}")
        allowed = token == self.TOKEN and selected and verb in self.rule["verbs"] and path.startswith(self.BASE) and self.rule["resourceNames"] == ["web"]
        if not allowed:
            return 403, {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "Forbidden", "code": 403, "message": f"{verb} {url} is forbidden"}
        if verb == "patch":
            [container] = json.loads(body)["spec"]["template"]["spec"]["containers"]
            assert container["name"] == "web"
            self.deployment["spec"]["template"]["spec"]["containers"][0]["image"] = container["image"]
            self.roll()
        if verb == "list":
            return 200, {"kind": "DeploymentList", "apiVersion": "apps/v1", "metadata": {"resourceVersion": "1"}, "items": [self.deployment]}
        return 200, {"type": "MODIFIED", "object": self.deployment} if verb == "watch" else self.deployment


def test_a_deployment_of_kubernetes_gets_an_image_and_the_one_before(tmp_path, monkeypatch):
    """kubectl is real, and has no right but those of rbac.yaml."""
    need("kubectl")
    (tmp_path / "state").mkdir()
    cluster = Cluster(tmp_path / "state")
    certificates = make_certificates(tmp_path)
    authority = base64.b64encode(certificates.ca.read_bytes()).decode()
    with serving_api(cluster, certificates) as api:
        admin = tmp_path / "admin"
        admin.write_text(json.dumps({
            "apiVersion": "v1", "kind": "Config", "current-context": "a", "contexts": [{"name": "a", "context": {"cluster": "a", "user": "a"}}],
            "clusters": [{"name": "a", "cluster": {"server": f"https://127.0.0.1:{api}", "certificate-authority-data": authority}}], "users": [{"name": "a", "user": {"token": cluster.ADMIN}}]}))
        monkeypatch.setenv("KUBECONFIG", str(admin))
        monkeypatch.setenv("HOME", str(tmp_path))   # kubectl keeps what it has discovered there.
        with container_stage(tmp_path, "https://web.example.org", {}) as stage:
            assert "deployment" in stage.paste("recipe-kubernetes")
            file = tmp_path / "etc/hookshot/kubeconfig"
            assert file.stat().st_mode & 0o777 == 0o600 and cluster.TOKEN in file.read_text() and cluster.ADMIN not in file.read_text()

            assert "Succeeded" in stage.paste("recipe-kubernetes-deploy")
            image, base = "ghcr.io/acme/web:v", cluster.BASE
            assert stage.known("live") == f"{image}1.4.0"
            for version, why in {"2.0.0": "500", "3.0.0": "exceeded its progress deadline"}.items():
                cluster.requests.clear()
                status, said = stage.deploy("web", f"{image}{version}")
                assert status == ROLLED_BACK and why in said and cluster.TOKEN not in said, said
                assert stage.known("live") == f"{image}1.4.0"
                assert cluster.requests.count(f"patch {base}/web") == 2
            # What hookshot needs is what it has.
            assert {request.partition(" ")[0] for request in cluster.requests} <= set(cluster.rule["verbs"])


def test_a_role_that_lacks_a_verb_is_noticed(tmp_path):
    """The check itself: without it, rbac.yaml could say anything."""
    (tmp_path / "state").mkdir()
    cluster = Cluster(tmp_path / "state")
    path = f"{cluster.BASE}/web"
    assert cluster.answer("GET", path, cluster.TOKEN, b"")[0] == 200
    assert cluster.answer("GET", cluster.BASE, cluster.TOKEN, b"")[0] == cluster.answer("GET", f"{cluster.BASE}/api", cluster.TOKEN, b"")[0] == 403
    assert cluster.answer("GET", "/api/v1/namespaces/web/secrets/hookshot-token", cluster.TOKEN, b"")[0] == 403
    cluster.rule["verbs"].remove("get")
    assert cluster.answer("GET", path, cluster.TOKEN, b"")[0] == 403


NOMAD = '''
[ "$NOMAD_TOKEN" = t0ken ] || exit 1
case "$1 $2" in
    "job run")
        # auto_revert: Nomad goes back from this one by itself, and this version says 0.
        case $3 in *v3.0.0) exit 0 ;; esac
        echo "${3#-var=image=}" >live ;;
    "job inspect") cat live ;;
esac
'''


def test_a_job_of_nomad_is_run_and_looked_at(tmp_path):
    with container_stage(tmp_path, "http://web.service.consul:8000", {"nomad": NOMAD}) as stage:
        (tmp_path / "etc/hookshot/nomad.token").write_text("t0ken\n")
        stage.paste("recipe-nomad")
        assert "Succeeded" in stage.paste("recipe-nomad-deploy")
        image = "ghcr.io/acme/web:v"
        run, look = f"nomad job run -var=image={image}", "nomad job inspect -t {{range .TaskGroups}}{{range .Tasks}}{{.Config.image}} {{end}}{{end}} web"
        assert stage.calls() == [f"{run}1.4.0 web.nomad.hcl", look]
        for version in ("2.0.0", "3.0.0"):
            status, said = stage.deploy("web", f"{image}{version}")
            assert status == ROLLED_BACK and "t0ken" not in said, said
            assert stage.calls() == [f"{run}{version} web.nomad.hcl", look, f"{run}1.4.0 web.nomad.hcl", look]
            assert stage.known("live") == f"{image}1.4.0"


# --- Ansible, real


def test_a_playbook_switches_every_host_and_back(tmp_path):
    """The hosts are this one, with two folders and two web servers, over a local connection."""
    need("ansible-playbook")
    sites = {name: tmp_path / name / "site" for name in ("web1", "web2")}

    def answer(name: str) -> Callable[[str], tuple[int, bytes]]:
        def of(path: str) -> tuple[int, bytes]:
            file = sites[name] / "current/index.html"
            text = file.read_bytes() if file.exists() else b""
            return (500 if not text or (b"ill" in text and name == "web2") else 200), text
        return of

    with serving(answer("web1")) as first, serving(answer("web2")) as second, \
            stage_of(tmp_path, {"http://www.example.org/": f"http://127.0.0.1:{first}/"}) as stage:
        stage.paste("recipe-ansible")
        hosts = {"web1": first, "web2": second}
        (tmp_path / "srv/ansible/inventory.ini").write_text("[web]\n" + "".join(
            f"{name} ansible_connection=local ansible_python_interpreter={sys.executable} site_folder={sites[name]} site_port={port}\n"
            for name, port in hosts.items()))
        for version, text in {"1.4.0": "good", "1.5.0": "ill on one host"}.items():
            folder = tmp_path / "srv/ansible/releases" / version
            folder.mkdir()
            (folder / "index.html").write_text(text)
        for site in sites.values():
            site.mkdir(parents=True)

        assert "Succeeded" in stage.paste("recipe-ansible-deploy")
        assert {os.readlink(site / "current") for site in sites.values()} == {"releases/1.4.0"}

        status, said = stage.deploy("site", "site:1.5.0")
        assert status == ROLLED_BACK, said
        assert {os.readlink(site / "current") for site in sites.values()} == {"releases/1.4.0"}
        assert {(site / "current/index.html").read_text() for site in sites.values()} == {"good"}
        assert {len(os.listdir(site / "releases")) for site in sites.values()} == {2}, "both hosts had the release that failed"


def test_the_inventory_of_ansible_is_one_and_its_playbook_is_taken(tmp_path):
    need("ansible-playbook")
    folder = EXAMPLES / "engines/ansible"
    environ = {**os.environ, "ANSIBLE_HOME": str(tmp_path), "ANSIBLE_LOCAL_TEMP": str(tmp_path)}
    done = subprocess.run([need("ansible-playbook"), "--inventory", "inventory.ini", "--extra-vars", "version=1.4.0", "--syntax-check", "deploy.yml"],
                          cwd=folder, env=environ, capture_output=True, text=True, timeout=2 * PATIENCE_S)
    assert (done.returncode, done.stderr) == (0, "")
    done = subprocess.run([need("ansible-inventory"), "--inventory", "inventory.ini", "--list"], cwd=folder, env=environ, capture_output=True, text=True,
                          timeout=2 * PATIENCE_S)
    hosts = json.loads(done.stdout)["_meta"]["hostvars"]
    assert hosts.keys() == {"web1.example.org", "web2.example.org"}
    assert hosts["web1.example.org"]["ansible_ssh_common_args"] == "-o UserKnownHostsFile=/srv/ansible/known_hosts"


# --- a machine of its own: systemd, polkit and nginx, all real

MACHINE = r'''
import base64, io, json, os, pathlib, subprocess, tarfile
os.makedirs("/opt/copy")
tarfile.open(fileobj=io.BytesIO(base64.b64decode("@TAR@"))).extractall("/opt/copy")
os.chdir("/opt/copy")


def paste(script, *, fails=False):
    done = subprocess.run(["bash", "-e"], input=script, capture_output=True, text=True, timeout=120)
    if bool(done.returncode) != fails:
        raise SystemExit(f"{script}\nended with {done.returncode}: {done.stdout}{done.stderr}")
    return done.stdout.strip()


paste("""
chmod -R a+rX /opt/copy
printf '#!/bin/sh\\nexec /usr/bin/python3 /usr/local/bin/hookshot.py "$@"\\n' > /usr/local/bin/hookshot && chmod 0755 /usr/local/bin/hookshot
install -D -m 0644 examples/systemd/sysusers.conf /etc/sysusers.d/hookshot.conf && systemd-sysusers
hookshot init /etc/hookshot
install -D -m 0644 examples/systemd/tmpfiles.conf /etc/tmpfiles.d/hookshot.conf && systemd-tmpfiles --create
hookshot show unit > /etc/systemd/system/hookshot.service
systemctl daemon-reload && systemctl enable --now hookshot.service
rm -f /etc/nginx/sites-enabled/*
mkdir -p /etc/nginx/conf.d /etc/polkit-1/rules.d
systemctl start nginx.service
""")
for script in @SCRIPTS@:
    paste(script)
for version, health in {"1.4.0": 200, "1.5.0": 404}.items():
    folder = pathlib.Path("/srv/web/releases") / version
    folder.mkdir()
    (folder / "run").write_text(f"""#!/usr/bin/python3
import http.server, os


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response({health} if self.path == "/health" else 200)
        self.end_headers()
        self.wfile.write(b"{version}")


http.server.HTTPServer(("127.0.0.1", int(os.environ["PORT"])), Handler).serve_forever()
""")
    (folder / "run").chmod(0o755)
seen = {"user": paste("systemctl show -P User hookshot.service")}
paste("@DEPLOY@")
seen["page"] = paste("curl --silent http://127.0.0.1:8000/")
paste("@DEPLOY@".replace("1.4.0", "1.5.0"), fails=True)
seen["after a failure"] = paste("curl --silent http://127.0.0.1:8000/; readlink /srv/web/live.conf")
seen["history"] = paste("runuser -u hookshot -- hookshot history web").count("RolledBack")
paste("runuser -u hookshot -- systemctl stop nginx.service", fails=True)
paste("runuser -u hookshot -- systemctl restart nginx.service", fails=True)
print(json.dumps(seen))
'''


def test_blue_and_green_on_a_real_host(tmp_path):
    """Pasted as the page says, with its polkit rules: the unit runs as hookshot, and may do these things and no others."""
    for name in ("nginx", "pkcheck"):
        need(name)
    rights = next(block.text for block in read_blocks("sh") if block.page.name == "recipes.md" and "hookshot.rules" in block.text)
    unit = next(block.text for block in read_blocks("sh") if block.page.name == "recipes.md" and block.text.startswith("hookshot show unit"))
    assert "apt-get install polkitd\n" in rights
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        tar.add(EXAMPLES, "examples")
    scripts = [script_of("recipe-blue-green"), rights.replace("apt-get install polkitd\n", ""), unit]
    text = MACHINE.replace("@TAR@", base64.b64encode(archive.getvalue()).decode()).replace("@SCRIPTS@", repr(scripts)) \
        .replace("@DEPLOY@", script_of("recipe-blue-green-deploy").strip())
    (tmp_path / "script.py").write_text(text)
    assert run_in_machine(tmp_path / "script.py") == {"user": "hookshot", "page": "1.4.0", "after a failure": "1.4.0proxy/green.conf", "history": 1}
