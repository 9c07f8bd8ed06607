# SPDX-License-Identifier: MPL-2.0
"""What tests share: a host in a temporary folder, a real server on it, signed requests, waits with a deadline."""

import atexit
import contextlib
import functools
import http.client
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest

import hookshot

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "hookshot.py"
KEY = "0f1e2d3c4b5a69788796a5b4c3d2e1f00f1e2d3c4b5a69788796a5b4c3d2e1f0"
# Long enough for a loaded machine; a wait that succeeds never takes it.
PATIENCE_S = 30.0


@functools.cache
def program() -> tuple[str, str]:
    """Return the words that start hookshot: from the archive that users copy, with byte code, in half the time of the source."""
    folder = tempfile.mkdtemp(prefix="hookshot-program-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.chmod(folder, 0o755)
    archive = os.path.join(folder, "hookshot.pyz")
    subprocess.run([sys.executable, ROOT / "build_zipapp.py", "--output", archive, "--python", sys.executable], check=True, stdout=subprocess.DEVNULL)
    return sys.executable, archive


def need(program: str) -> str:
    """Return the path of a program, or skip the test because this machine lacks it (a failure under CI)."""
    found = shutil.which(program)
    if not found:
        pytest.skip(f"missing: {program}")
    return found


@functools.cache
def has_python_of_machine() -> bool:
    """Return whether this is the Python of the machines that run_in_machine boots, Debian's: of several suites at once, one needs them."""
    with contextlib.suppress(OSError):
        there = subprocess.run(["/usr/bin/python3", "-c", "import sys; print(*sys.version_info[:2])"], capture_output=True, text=True).stdout
        return there.split() == [str(number) for number in sys.version_info[:2]]
    return False


def run_in_machine(script: object, *, program: object = PROGRAM, file: object = None) -> Any:
    """Run a script where tests/machine.sh says; return the JSON that it prints. Skips where no machine can be had."""
    need("systemd-nspawn")
    # By SIGTERM, at which the machine is taken away again; longer than machine.sh waits for others.
    command = ["timeout", 40 * PATIENCE_S, ROOT / "tests/machine.sh", program, script, *([file] if file else [])]
    done = subprocess.run(list(map(str, command)), stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip(f"no machine can be had here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


@contextlib.contextmanager
def running_proxy(name: str, folder: pathlib.Path, text: str, is_up: Callable[[], bool]) -> Iterator[None]:
    """Run nginx or Caddy in a folder with this configuration, from when `is_up` says so."""
    found, file = need(name), folder / f"{name}.conf"
    file.write_text(text)
    command = {"nginx": [found, "-p", folder, "-c", file], "caddy": [found, "run", "--adapter", "caddyfile", "--config", file]}[name]
    with open(folder / "proxy.log", "wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                   env={**os.environ, "HOME": str(folder), "XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder)})
        try:
            wait_until(lambda: is_up() or process.poll() is not None)
            assert process.poll() is None, (folder / "proxy.log").read_text()
            yield
        finally:
            process.terminate()
            process.wait(PATIENCE_S)


def wait_until(condition: Callable[[], Any], *, patience_s: float = PATIENCE_S) -> Any:
    """Return the first true value of `condition`; fail when it stays false."""
    deadline = time.monotonic() + patience_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"still false after {patience_s} s"
        time.sleep(0.01)
    return value


def free_port() -> int:
    """Return a TCP port that nothing uses, and that nothing gets by chance: the kernel's own choices lie above these."""
    while True:
        port = random.randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("0.0.0.0", port)):
            return port


class Certificates(NamedTuple):
    """Files in PEM: what make_certificates() makes. Keys have no passphrase but for `locked_key`."""

    ca: pathlib.Path
    server: pathlib.Path
    server_key: pathlib.Path
    client: pathlib.Path
    client_key: pathlib.Path
    other_ca: pathlib.Path
    other_client: pathlib.Path
    other_client_key: pathlib.Path
    # Another certificate of the same authority for the same names.
    renewed: pathlib.Path
    renewed_key: pathlib.Path
    locked_key: pathlib.Path
    rsa_key: pathlib.Path
    garbage: pathlib.Path


def make_certificates(folder: pathlib.Path) -> Certificates:
    """Make two authorities, certificates for localhost and 127.0.0.1, client certificates, and keys that do not serve."""
    openssl = need("openssl")
    files = Certificates(*(folder / f"{name}.pem" for name in Certificates._fields))

    def run(*args: object) -> None:
        done = subprocess.run([openssl, *map(str, args)], stdin=subprocess.DEVNULL, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()

    def issue(certificate: pathlib.Path, key: pathlib.Path, name: str, ca: tuple[pathlib.Path, pathlib.Path] | None = None) -> None:
        signed = ("-CA", ca[0], "-CAkey", ca[1]) if ca else ()
        kind = ("basicConstraints=critical,CA:FALSE", "subjectAltName=DNS:localhost,IP:127.0.0.1", "keyUsage=critical,digitalSignature") \
            if ca else ("keyUsage=critical,keyCertSign,cRLSign",)
        extensions = [word for extension in kind for word in ("-addext", extension)]
        run("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", 2, "-subj", f"/CN={name}",
            "-keyout", key, "-out", certificate, *extensions, *signed)

    ca, other_ca = ((file, file.with_suffix(".key")) for file in (files.ca, files.other_ca))
    issue(*ca, "An authority")
    issue(*other_ca, "Another authority")
    issue(files.server, files.server_key, "server", ca)
    issue(files.renewed, files.renewed_key, "server renewed", ca)
    issue(files.client, files.client_key, "client", ca)
    issue(files.other_client, files.other_client_key, "client of another", other_ca)
    run("pkey", "-in", files.server_key, "-aes-256-cbc", "-passout", "pass:secret", "-out", files.locked_key)
    run("genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048", "-out", files.rsa_key)
    files.garbage.write_text("-----BEGIN CERTIFICATE-----\nnonsense\n-----END CERTIFICATE-----\n")
    return files


class Answer:
    """One HTTP answer: status, headers (lower case), body, and its JSON if it is JSON."""

    def __init__(self, response: http.client.HTTPResponse):
        self.status = response.status
        self.headers = {name.lower(): value for name, value in response.getheaders()}
        self.body = response.read()

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Host:
    """A host of its own: both files, a secrets file, and at most one server at a time."""

    def __init__(self, folder: pathlib.Path, services: str, config: str = "", *, key: str = KEY, secrets: str = ""):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.config, self.services, self.secrets = folder / "config.toml", folder / "services.toml", folder / "secrets"
        self.data, self.output = folder / "data", folder / "server.log"
        self.key = key.encode()
        self.process: subprocess.Popen[bytes] | None = None
        self.port = 0
        # Where the server listens, as its log says.
        self.urls: list[str] = []
        # An ssl.SSLContext: request() and what builds on it then speak https.
        self.tls: Any = None
        self.write(services, config)
        self.secrets.write_text(f"hmac_key={key}\n{secrets}")
        self.secrets.chmod(0o600)

    def write(self, services: str, config: str = "") -> None:
        """Write both files. `config` is added to what every test needs: a port of its own, its folders, no rate limit."""
        self.services.write_text(services.replace("@", str(self.folder)))
        tables = {"server": 'listen = "127.0.0.1:0"', "storage": f'data_dir = "{self.data}"',
                  "secrets": f'secrets_file = "{self.secrets}"\nsource = "file"', "security": "rate_limit = 0"}
        text = config
        for name, lines in tables.items():
            keys = [line for line in lines.splitlines() if f"\n{line.split(' ')[0]} " not in f"\n{text}"]
            head = f"[{name}]\n"
            text = text.replace(head, head + "\n".join(keys) + "\n") if head in text else text + f"\n{head}" + "\n".join(keys) + "\n"
        self.config.write_text(text)

    def start(self, *flags: str, wait: bool = True, env: dict[str, str] | None = None, argv: tuple[str, ...] = (), fds: Sequence[int] = ()) -> "Host":
        """Start the server as a process of its own, with further descriptors `fds`, and wait until it is ready."""
        assert self.process is None or self.process.poll() is not None, "the last server still runs"
        self.output.touch()
        offset = self.output.stat().st_size
        with open(self.output, "ab") as log:
            self.process = subprocess.Popen([*(argv or program()), "-c", str(self.config), "-s", str(self.services), "run", *flags],
                                            stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, **(env or {})}, pass_fds=fds)
        if wait:
            self.urls = wait_until(lambda: self._find_urls(offset))
            self.port = next((int(url.rpartition(":")[2]) for url in self.urls if not url.startswith("unix:")), 0)
        return self

    def _find_urls(self, offset: int) -> list[str]:
        assert self.process and self.process.poll() is None, f"the server ended at start:\n{self.output.read_text()[offset:]}"
        for line in self.output.read_bytes()[offset:].decode().splitlines():
            if '"started"' in line:
                return json.loads(line)["message"].partition(" listens on ")[2].rpartition(", ")[0].replace(" (all addresses)", "").replace(" (from systemd)", "").split(" and ")
        return []

    def stop(self, number: int = signal.SIGTERM, *, patience_s: float = PATIENCE_S) -> int:
        """Send a signal and return the server's exit status."""
        assert self.process
        self.process.send_signal(number)
        return self.process.wait(patience_s)

    def kill(self) -> None:
        """kill -9, as a crash would."""
        self.stop(signal.SIGKILL)

    def close(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    # --- talking to it

    def request(self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> Answer:
        with contextlib.closing(http.client.HTTPSConnection("127.0.0.1", self.port, timeout=PATIENCE_S, context=self.tls) if self.tls
                                else http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)) as link:
            link.request(method, path, body, headers or {})
            return Answer(link.getresponse())

    def get(self, path: str, **headers: str) -> Answer:
        return self.request("GET", path, headers=headers)

    def post(self, document: Any, *, path: str = "/deploy", key: bytes | None = None, headers: dict[str, str] | None = None) -> Answer:
        """Send a signed POST; a document that is bytes goes out as it is."""
        body = document if isinstance(document, bytes) else json.dumps(document).encode()
        signature = hookshot.sign(key or self.key, body)
        return self.request("POST", path, body, {"Content-Type": "application/json", "X-Hub-Signature-256": signature, **(headers or {})})

    def deploy(self, image: str = "app:1", service: str = "web", **fields: Any) -> str:
        """Have a deployment accepted and return its id."""
        answer = self.post({"service": service, "image": image, **fields})
        assert answer.status == 202, answer.body
        return answer.json["deploy_id"]

    def record(self, deploy_id: str) -> dict[str, Any]:
        answer = self.get(f"/status/{deploy_id}")
        assert answer.status == 200, answer.body
        return answer.json

    def wait(self, deploy_id: str, *states: str) -> dict[str, Any]:
        """Return the record once the deployment is in one of `states` (default: any terminal one)."""
        wanted = states or tuple(hookshot.TERMINAL)
        return wait_until(lambda: (record := self.record(deploy_id))["status"] in wanted and record)

    def descriptors(self) -> int:
        """Return how many descriptors the server has open, about: only root may look, others ask it."""
        assert self.process
        try:
            return len(os.listdir(f"/proc/{self.process.pid}/fd"))
        except PermissionError:
            return int(self.get("/metrics").body.partition(b"\nprocess_open_fds ")[2].split()[0])

    def log(self, deploy_id: str) -> str:
        return self.get(f"/logs/{deploy_id}").body.decode()

    def raw(self, content: bytes, *, patience_s: float = 10.0) -> bytes:
        """Send bytes as they are and return everything until the server closes."""
        with socket.create_connection(("127.0.0.1", self.port), patience_s) as link:
            link.sendall(content)
            return b"".join(iter(lambda: link.recv(1 << 16), b""))

    def cli(self, *args: str, env: dict[str, str] | None = None, stdin: bytes = b"", patience_s: float = PATIENCE_S) -> "subprocess.CompletedProcess[str]":
        """Run a client command against this server."""
        environment = {**os.environ, "HOOKSHOT_URL": f"http://127.0.0.1:{self.port}", **(env or {})}
        done = subprocess.run([*program(), "-c", str(self.config), "-s", str(self.services), *args], input=stdin,
                              capture_output=True, env=environment, timeout=patience_s)
        return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


@contextlib.contextmanager
def running(folder: pathlib.Path, services: str, config: str = "", **options: Any) -> Iterator[Host]:
    """Give a host with a running server, and end it afterwards. "@" in `services` stands for the host's folder."""
    host = Host(folder, services, config, **options)
    try:
        yield host.start()
    finally:
        host.close()


def service(*commands: str, name: str = "web", head: str = "", tables: str = "") -> str:
    """Return a [[service]] with these commands (TOML texts), any image named app:..., in the host's folder."""
    return f"""
[[service]]
name = "{name}"
working_dir = "@"
{head}
[service.security]
allowed_image_pattern = 'app:[a-z0-9.]+'
[service.deploy]
commands = [{', '.join(commands or ('["true"]',))}]
{tables}
"""
