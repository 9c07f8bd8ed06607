# SPDX-License-Identifier: MPL-2.0
"""What tests/machine.sh runs in a machine of its own for tests/test_migrating.py: the steps of docs/migrating.md, over a stand-in for Hookshot 1.0.

The test puts BLOCKS (by name, the text of the page) and BUILD (build_zipapp.py) before this text. Prints one JSON object: what was seen.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
import urllib.request

BLOCKS: dict[str, str]
BUILD: str
ETC, WORK, NEW = (pathlib.Path(name) for name in ("/etc/hookshot", "/srv/web-app", "/srv/new"))
UNIT = pathlib.Path("/etc/systemd/system/hookshot.service")
ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8"}
# It answers what step 4 asks for, as the user of its unit.
OLD_PROGRAM = '''#!/usr/bin/python3
import http.server

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"services": [{"name": "web-app", "current_image": "ghcr.io/example/web-app:v1.2.3"}]}')

http.server.HTTPServer(("127.0.0.1", 8080), Handler).serve_forever()
'''
OLD_UNIT = """[Service]
Type=simple
User=hookshot
ExecStart=/opt/hookshot/hookshot run
[Install]
WantedBy=multi-user.target
"""
CONFIG = """[server]
listen = "127.0.0.1:8080"
[storage]
data_dir = "/var/lib/hookshot"
[logging]
level = "warn"
directory = "/var/log/hookshot"
[limits]
lock_timeout = 60
"""
SERVICES = """[[service]]
name = "web-app"
working_dir = "/srv/web-app"
[service.security]
allowed_image_pattern = '^ghcr\\.io/example/web-app:v\\d+\\.\\d+\\.\\d+$'
[service.github]
repo = "example/web-app"
[service.deploy]
commands = [["touch", "{{IMAGE|tag}}"]]
[service.rollback]
commands = [["touch", "back"]]
"""
seen: dict[str, object] = {}


def paste(name: str, *as_user: str) -> str:
    """Paste blocks of the page into a shell that ends at the first failure; its python3 is Debian's."""
    done = subprocess.run([*as_user, "bash", "-e"], input=BLOCKS[name], cwd=NEW, capture_output=True, text=True, timeout=120, env=ENVIRONMENT)
    if done.returncode:
        journal = subprocess.run(["journalctl", "--no-pager", "-n", "20", "-o", "cat"], capture_output=True, text=True).stdout
        raise SystemExit(f"{name} ended with {done.returncode}: {done.stdout}{done.stderr}\n{journal}")
    return done.stdout


def answers(path: str) -> dict:
    deadline = time.monotonic() + 40
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:8080{path}", timeout=10) as answer:
                return json.load(answer)
        except OSError as error:
            if time.monotonic() > deadline:
                raise SystemExit(f"{path}: {error}") from error
            time.sleep(0.05)


def give(*paths: pathlib.Path) -> None:
    for path in paths:
        shutil.chown(path, "hookshot", "hookshot")


def set_up() -> None:
    """The host of Hookshot 1.0, and a copy of the repository."""
    subprocess.run(["useradd", "--system", "--home-dir", "/var/lib/hookshot", "hookshot"], check=True)
    data, log, program = (pathlib.Path(name) for name in ("/var/lib/hookshot", "/var/log/hookshot", "/opt/hookshot/hookshot"))
    for folder in (ETC, WORK, NEW, data, log, data / "locks", program.parent):
        folder.mkdir(parents=True, exist_ok=True)
    (data / "state.redb").write_text("redb")
    (ETC / "config.toml").write_text(CONFIG)
    (ETC / "services.toml").write_text(SERVICES)
    (ETC / "secrets").write_text(f"hmac_key={'0f1e2d3c' * 8}\n")
    (ETC / "secrets").chmod(0o640)
    program.write_text(OLD_PROGRAM)
    program.chmod(0o755)
    pathlib.Path("/usr/local/bin/hookshot").symlink_to(program)
    shutil.copy("/usr/local/bin/hookshot.py", NEW / "hookshot.py")
    (NEW / "build_zipapp.py").write_text(BUILD)
    give(WORK, NEW, data, log, data / "locks", data / "state.redb")
    shutil.chown(ETC / "secrets", "root", "hookshot")
    UNIT.write_text(OLD_UNIT)
    subprocess.run(["systemctl", "enable", "--now", "hookshot.service"], check=True, capture_output=True)
    answers("/services")


def move() -> None:
    paste("secrets-of-1")
    plan = paste("beside", "runuser", "-u", "hookshot", "--")
    seen["beside"] = ["deploy 1: touch v1.2.3" in plan, os.listdir(WORK)]
    seen["old"] = json.loads(paste("old"))["services"][0]["current_image"]
    paste("switch")
    # A second time, as after something was forgotten: the files of 1.0 are still those.
    told = paste("switch")
    seen["doctor"] = [line for line in told.splitlines() if line.startswith("fail")]
    seen["new"] = [answers("/ready")["ready"], answers("/services")["services"][0]["current_image"]]
    paste("first")
    seen["first"] = [answers("/services")["services"][0]["current_image"], os.listdir(WORK)]
    seen["kept"] = [os.path.islink("/usr/local/bin/hookshot"), pathlib.Path("/opt/hookshot/hookshot").exists(), pathlib.Path("/var/lib/hookshot/state.redb").read_text()]


def move_back() -> None:
    paste("way-back")
    seen["back"] = [answers("/services")["services"][0].keys() == {"name", "current_image"}, (ETC / "services.toml").read_text() == SERVICES,
                    os.readlink("/usr/local/bin/hookshot")]


for stage in (set_up, move, move_back):
    began = time.monotonic()
    stage()
    print(f"{stage.__name__}: {time.monotonic() - began:.1f} s", file=sys.stderr)
print(json.dumps(seen))
