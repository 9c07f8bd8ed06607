# SPDX-License-Identifier: MPL-2.0
"""What tests/machine.sh runs in a machine of its own for tests/test_examples_host.py: the blocks of docs/examples.md, as they are pasted.

Before it stands a line PARTS = {"files": {path: base64}, "blocks": {name: shell}}. Prints one JSON object: what was seen.
It judges nothing.
"""

import base64
import http.client
import json
import os
import pathlib
import ssl
import subprocess
import sys
import time

COPY = pathlib.Path("/root/copy")
SITE = pathlib.Path("/srv/site")
PARTS: dict[str, dict[str, str]] = globals()["PARTS"]
seen: dict[str, object] = {}
# Debian's Python before any other that this copy of a host has.
os.environ["PATH"] = "/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/sbin:/usr/local/bin"


def run(*words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)


def paste(name: str) -> str:
    """Run a block in the copy of the repository; what goes wrong ends everything."""
    done = subprocess.run(["bash", "-e"], input=PARTS["blocks"][name], cwd=COPY, capture_output=True, text=True, timeout=120)
    if done.returncode:
        journal = run("journalctl", "--no-pager", "-n", "40", "-o", "cat").stdout
        raise SystemExit(f"{name} ended with {done.returncode}: {done.stdout}{done.stderr}\n{journal}")
    return done.stdout


def deploy(image: str) -> int:
    return run("runuser", "-u", "hookshot", "--", "hookshot", "deploy", "site", image).returncode


def ask(method: str, path: str) -> int:
    """Ask the proxy; its certificate is another test's matter."""
    link = http.client.HTTPSConnection("127.0.0.1", 443, timeout=60, context=ssl._create_unverified_context())
    link.request(method, path, headers={"Host": "hookshot.example.net"})
    return link.getresponse().status


def set_up() -> None:
    for name, content in PARTS["files"].items():
        file = COPY / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(base64.b64decode(content))
    run("install", "-m", "0755", "/usr/local/bin/hookshot.py", "/usr/local/bin/hookshot")


def both_files() -> None:
    seen["valid"] = paste("examples-files").splitlines()[-1]
    seen["warnings"] = run("hookshot", "validate").stderr.splitlines()
    for release in ("1.0", "2.0"):
        (SITE / "releases" / release).mkdir()
    (SITE / "releases/1.0/index.html").write_text("hello\n")
    seen["deployed"] = [deploy("site:1.0"), deploy("site:2.0"), (SITE / "current").readlink().name]


def backup() -> None:
    listed = paste("examples-backup").splitlines()
    seen["archives"] = [line.split()[:3:2] for line in listed if "hookshot-" in line]
    seen["timer"] = run("systemctl", "show", "hookshot-backup.timer", "--value", "-p", "ActiveState", "-p", "UnitFileState").stdout.split()
    [name] = [line.split()[-1] for line in listed if "hookshot-" in line]
    seen["restorable"] = run("hookshot", "import", "--dry-run", f"/var/backups/hookshot/{name}").returncode
    run("install", "-d", "-o", "hookshot", "/mnt/backup/hookshot")
    drop_in = pathlib.Path("/etc/systemd/system/hookshot-backup.service.d/override.conf")
    drop_in.parent.mkdir()
    drop_in.write_text(PARTS["blocks"]["examples-folder"])
    run("systemctl", "daemon-reload")
    seen["elsewhere"] = [run("systemctl", "start", "hookshot-backup.service").returncode, len(os.listdir("/mnt/backup/hookshot"))]
    paste("examples-cron")


def logging() -> None:
    config = pathlib.Path("/etc/hookshot/config.toml")
    text = config.read_text()
    part = (COPY / "examples/logging/files.toml").read_text()
    head, rest = text.split("[logging]\n")
    config.write_text(f"{head}{part}\n[limits]\n{rest.partition('[limits]')[2]}")
    pathlib.Path("/etc/systemd/system/hookshot.service").write_text(run("hookshot", "show", "unit").stdout)
    run("systemctl", "daemon-reload")
    run("systemctl", "restart", "hookshot.service")
    seen["log file"] = pathlib.Path("/var/log/hookshot/hookshot.log").exists()
    paste("examples-rsyslog")
    seen["rsyslog"] = run("systemctl", "is-active", "rsyslog").stdout.strip()


def proxies() -> None:
    config = pathlib.Path("/etc/hookshot/config.toml")
    config.write_text(config.read_text().replace("# trusted_proxies = []", 'trusted_proxies = ["127.0.0.1"]').replace('# read_access = "local"', 'read_access = "token"'))
    run("systemctl", "reload", "hookshot.service")
    certificates = pathlib.Path("/etc/letsencrypt/live/hookshot.example.net")
    certificates.mkdir(parents=True)
    for name in ("fullchain.pem", "privkey.pem"):
        (certificates / name).write_bytes((COPY / name).read_bytes())
    paste("examples-nginx")
    seen["nginx"] = [ask("GET", "/ready"), ask("POST", "/deploy"), ask("GET", "/deploy"), ask("GET", "/services")]
    run("systemctl", "stop", "nginx")
    paste("examples-caddy")
    seen["caddy"] = run("systemctl", "is-active", "caddy").stdout.strip()
    run("systemctl", "stop", "caddy")


def firewall() -> None:
    paste("examples-firewall")
    paste("examples-firewall")
    seen["firewall"] = run("nft", "list", "table", "inet", "hookshot").stdout.count("drop")


for stage in (set_up, both_files, backup, logging, proxies, firewall):
    began = time.monotonic()
    stage()
    print(f"{stage.__name__}: {time.monotonic() - began:.1f} s", file=sys.stderr)
print(json.dumps(seen))
