# SPDX-License-Identifier: MPL-2.0
"""What tests/machine.sh runs in a machine of its own for tests/test_drills.py: the blocks of backup.md, security.md and audit.md.

tests/test_drills.py writes two names before this text: SCRIPTS, the blocks by name, and PROGRAMS, archives of hookshot in base64:
this version, and a later one with a newer schema. Each drill starts on the same host. Prints one JSON object: for each drill
what its blocks printed and what was seen afterwards. It judges nothing; a drill that breaks down has `broken`.
"""

import base64
import contextlib
import hashlib
import hmac
import http.client
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable

SCRIPTS: dict[str, str]
PROGRAMS: dict[str, str]

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
ENV = {"PATH": PATH, "HOME": "/root", "LANG": "C.UTF-8", "TERM": "dumb"}
ETC, DATA, WEB = map(pathlib.Path, ("/etc/hookshot", "/var/lib/hookshot", "/srv/web"))
SHARE = pathlib.Path("/usr/local/share/hookshot")
BACKUP = pathlib.Path("/var/backups/hookshot.tar.gz")
SNAPSHOT = pathlib.Path("/var/snapshot")
# A copy of the repository, as far as an operator needs it, and where blocks are pasted.
COPY = pathlib.Path("/root/copy")
SERVICES = """
[[service]]
name = "web"
working_dir = "/srv/web"
[service.security]
allowed_image_pattern = 'web:[0-9.]+'
[service.deploy]
commands = [["ln", "-sfn", "{{IMAGE|tag}}", "current"], ["sh", "-c", "until [ ! -e hold-$HOOKSHOT_IMAGE ]; do sleep 0.05; done"]]
[service.rollback]
commands = [["ln", "-sfn", "{{PREVIOUS_IMAGE|tag}}", "current"]]
"""
# While it is there, a deployment of web:2.0 does not end.
HOLD = WEB / "hold-web:2.0"
# The names of the blocks that this drill has run.
PASTED: list[str] = []
DRILLS: list[Callable[[], dict[str, object]]] = []


def drill(function: Callable[[], dict[str, object]]) -> Callable[[], dict[str, object]]:
    DRILLS.append(function)
    return function


# --- a shell


def bash(script: str, folder: pathlib.Path = COPY, timeout_s: float = 120) -> "subprocess.CompletedProcess[str]":
    """Run a script as it is pasted into root's shell; what it leaves in the background is ended."""
    process = subprocess.Popen(["bash", "-e"], cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env=ENV, start_new_session=True)
    try:
        output, _ = process.communicate("trap 'kill -9 $(jobs -p) 2> /dev/null || :' EXIT\n" + script, timeout=timeout_s)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess([], process.returncode, output)


def attempt(name: str, *changes: tuple[str, str]) -> "subprocess.CompletedProcess[str]":
    """Run the blocks of a name; `changes` put what is here in the place of what a page can only show."""
    PASTED.append(name)
    script = SCRIPTS[name]
    for shown, real in changes:
        if shown not in script:
            raise RuntimeError(f"{name} does not hold {shown}")
        script = script.replace(shown, real)
    return bash(script)


def paste(name: str, *changes: tuple[str, str]) -> str:
    """Run the blocks of a name, which must do, and return what they printed."""
    done = attempt(name, *changes)
    if done.returncode:
        raise RuntimeError(f"{name} ended with {done.returncode}:\n{done.stdout}")
    return done.stdout


def run(script: str) -> str:
    done = bash(script)
    if done.returncode:
        raise RuntimeError(f"{script} ended with {done.returncode}:\n{done.stdout}")
    return done.stdout


def until(what: str, condition: Callable[[], object], patience_s: float = 40.0) -> object:
    deadline = time.monotonic() + patience_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what}: still not so after {patience_s} s")
        time.sleep(0.05)
    return value


# --- the server


def key_of(name: str = "hmac_key") -> bytes:
    return re.search(rf"^{name}=(.*)$", (ETC / "secrets").read_text(), re.MULTILINE)[1].encode()  # type: ignore[index]


def ask(method: str, path: str, document: object = None, *, key: bytes | None = None, headers: dict[str, str] | None = None) -> tuple[int, dict]:
    body, sent = None, dict(headers or {})
    if document is not None:
        body = json.dumps(document).encode()
        signature = hmac.new(key or key_of(), body, hashlib.sha256).hexdigest()
        sent |= {"Content-Type": "application/json", "X-Hub-Signature-256": f"sha256={signature}"}
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", 8080, timeout=60)) as link:
        link.request(method, path, body, sent)
        answer = link.getresponse()
        return answer.status, json.loads(answer.read())


def deploy(image: str, *, path: str = "/deploy", **fields: object) -> str:
    status, answer = ask("POST", path, {"service": "web", "image": image, **fields})
    if status not in (200, 202):
        raise RuntimeError(f"{image}: {status} {answer}")
    return answer["deploy_id"]


def status_of(deploy_id: str) -> str:
    status, answer = ask("GET", f"/status/{deploy_id}")
    return answer["status"] if status == 200 else str(status)


def images() -> list[str]:
    """Return what was deployed and how it ended, the oldest first."""
    return [f"{each['image']} {each['status']}" for each in reversed(ask("GET", "/deployments")[1]["deployments"])]


def is_active() -> str:
    return bash("systemctl is-active hookshot").stdout.strip()


def owner_and_mode(path: pathlib.Path) -> str:
    return f"{path.owner()} {path.stat().st_mode & 0o7777:04o}"


# --- the host


def set_up() -> None:
    """As docs/systemd.md says, and one deployment and one backup more."""
    COPY.mkdir()
    (COPY / "dist").mkdir()
    for name, program in PROGRAMS.items():
        (COPY / name).parent.mkdir(exist_ok=True)
        (COPY / name).write_bytes(base64.b64decode(program))
    shutil.copytree(SHARE, COPY / "examples/systemd")
    pathlib.Path("/var/backups").mkdir(exist_ok=True)
    WEB.mkdir(parents=True)
    run("install -m 0755 dist/hookshot.pyz /usr/local/bin/hookshot\n"
        "install -D -m 0644 examples/systemd/sysusers.conf /etc/sysusers.d/hookshot.conf && systemd-sysusers\n"
        "hookshot init /etc/hookshot\n"
        "sed -i 's/^# rate_limit = .*/rate_limit = 0/; s/^# shutdown_timeout = .*/shutdown_timeout = 0/; s/^# status_cache_seconds = .*/status_cache_seconds = 1/' "
        "/etc/hookshot/config.toml\n"
        f"cat > /etc/hookshot/services.toml <<'END'\n{SERVICES}\nEND\n"
        "install -D -m 0644 examples/systemd/tmpfiles.conf /etc/tmpfiles.d/hookshot.conf && systemd-tmpfiles --create /etc/tmpfiles.d/hookshot.conf\n"
        "chown hookshot: /srv/web\n"
        "hookshot show unit > /etc/systemd/system/hookshot.service\n"
        "systemctl daemon-reload && systemctl enable --now hookshot\n")
    deploy("web:1.0", path="/deploy?wait=60")
    run(f"hookshot export {BACKUP} && systemctl stop hookshot")
    SNAPSHOT.mkdir()
    for folder in (ETC, DATA):
        run(f"cp -a {folder} {SNAPSHOT}/")
    run(f"cp -p {BACKUP} {SNAPSHOT}/")


def reset() -> None:
    """Make the host as set_up() left it, with the server running."""
    bash("systemctl stop hookshot; systemctl reset-failed hookshot; umount -q /var/lib/hookshot; rm -f /srv/web/* /root/*.tar.gz")
    for folder in (ETC, DATA):
        run(f"rm -rf {folder} {folder}.* && cp -a {SNAPSHOT}/{folder.name} {folder.parent}/")
    run(f"rm -rf /var/backups/hookshot* && cp -p {SNAPSHOT}/{BACKUP.name} {BACKUP} && install -m 0755 dist/hookshot.pyz /usr/local/bin/hookshot\n"
        "systemctl daemon-reload && systemctl start hookshot")


# --- backup.md


@drill
def daily() -> dict[str, object]:
    """The file in cron.daily, carried out as cron does; on two days of the week, the first of which is long past."""
    reset()
    paste("backup-daily")
    before = BACKUP.stat().st_ino
    listing = run("run-parts --regex '^hookshot-backup$' --list /etc/cron.daily").strip()
    run("run-parts --regex '^hookshot-backup$' /etc/cron.daily")
    day = pathlib.Path(f"/var/backups/hookshot-{time.strftime('%u')}.tar.gz")
    seen = {"listing": listing, "mode": owner_and_mode(BACKUP), "new": BACKUP.stat().st_ino != before, "linked": BACKUP.samefile(day)}
    first = BACKUP.stat().st_ino
    run("run-parts --regex '^hookshot-backup$' /etc/cron.daily")
    seen["again"] = BACKUP.stat().st_ino != first and BACKUP.samefile(day) and len(list(BACKUP.parent.glob("hookshot*"))) == 2
    seen["young"] = paste("backup-age-of")
    run(f"touch -d '2 days ago' {BACKUP}")
    seen["old"] = attempt("backup-age-of").returncode
    return seen


@drill
def export_and_import() -> dict[str, object]:
    reset()
    made = paste("backup-make")
    deploy("web:2.0", path="/deploy?wait=60")
    said = paste("backup-import")
    return {"made": made, "said": said, "images": images(), "kept": sorted(path.name for path in (*ETC.glob("*.bak"), *DATA.glob("*.bak")))}


@drill
def encryption() -> dict[str, object]:
    reset()
    paste("backup-age-key")
    run("mv hookshot-backup.pub /etc/hookshot/backup.pub")
    paste("backup-age")
    with_age = paste("backup-age-read", ("2026-11-29", time.strftime("%Y-%m-%d")))
    paste("backup-gpg-key", ("gpg --quick", "gpg --batch --passphrase '' --quick"))
    run("mv hookshot-backup.asc /etc/hookshot/backup.asc")
    paste("backup-gpg")
    with_gpg = paste("backup-gpg-read")
    files = (next(BACKUP.parent.glob("*.age")), pathlib.Path(f"{BACKUP}.gpg"))
    return {"age": with_age, "gpg": with_gpg, "files": [path.read_bytes()[:20].decode("latin-1") for path in files]}


@drill
def off_site() -> dict[str, object]:
    """The other host is a folder here."""
    reset()
    run("mkdir -p /srv/elsewhere && cp -p /var/backups/hookshot.tar.gz /var/backups/hookshot-1.tar.gz.age")
    paste("backup-rsync", ("backup@backup.example.org:hookshot/", "/srv/elsewhere/"))
    here = ("sftp:backup@backup.example.org:hookshot", "/srv/elsewhere/restic")
    paste("backup-restic-init", here)
    said = paste("backup-restic", here)
    return {"rsync": sorted(path.name for path in pathlib.Path("/srv/elsewhere").iterdir()), "restic": said, "read": paste("backup-restic-read", here)}


@drill
def fresh_host() -> dict[str, object]:
    """(a) A machine on which nothing of hookshot is, but the copy of the repository and the backup."""
    reset()
    deploy_id = deploy("web:2.0", path="/deploy?wait=60")
    run(f"hookshot export {BACKUP} && cp -p {BACKUP} /root/hookshot.tar.gz")
    run("systemctl disable --now hookshot && rm -rf /etc/hookshot /var/lib/hookshot /var/backups/hookshot* /srv/web /usr/local/bin/hookshot "
        "/etc/systemd/system/hookshot.service /etc/sysusers.d/hookshot.conf /etc/tmpfiles.d/hookshot.conf && userdel hookshot && systemctl daemon-reload")
    said = paste("drill-fresh")
    return {"said": said, "active": is_active(), "record": status_of(deploy_id), "images": images(), "current": os.readlink(WEB / "current"),
            "owners": [owner_and_mode(path) for path in (ETC / "secrets", DATA, DATA / "state.db", ETC / "config.toml")]}


@drill
def broken_configuration() -> dict[str, object]:
    """(b) A key that is wrong, and a server that was restarted with it."""
    reset()
    broke = paste("break-config")
    down = bash("hookshot services").returncode
    said = paste("drill-config")
    return {"broke": broke, "down": down, "said": said, "active": is_active(), "images": images(),
            "files": [owner_and_mode(ETC / "config.toml"), (ETC / "config.toml.broken").exists(), (ETC / "config.toml.new").exists()]}


@drill
def damaged_database() -> dict[str, object]:
    """(c) Once with a backup, once without."""
    reset()
    broke = paste("break-database")
    paste("backup-daily")
    newest = BACKUP.stat().st_ino
    daily_status = bash("run-parts --regex '^hookshot-backup$' /etc/cron.daily").returncode
    exported = bash("hookshot export /var/backups/other.tar.gz")
    doctor = bash("hookshot doctor").stdout
    said = paste("drill-database")
    seen = {"broke": broke, "daily": [daily_status, BACKUP.stat().st_ino == newest, len(list(BACKUP.parent.iterdir()))], "doctor": doctor,
            "exported": [exported.returncode, exported.stdout], "said": said, "active": is_active(), "images": images(),
            "kept": len(list(DATA.parent.glob("hookshot.damaged-*/state.db"))) == 1}
    reset()
    paste("break-database")
    seen["anew"] = paste("drill-database-anew")
    return {**seen, "anew active": is_active(), "anew images": images(), "anew audit": run("hookshot audit verify")}


@drill
def lost_with_a_queue() -> dict[str, object]:
    """(d) One deployment runs and two wait when the backup is made; a fourth comes after it. Then the host is gone."""
    reset()
    HOLD.touch()
    ids = [deploy(f"web:{number}.0") for number in (2, 3, 4)]
    until("it runs", lambda: status_of(ids[0]) == "Deploying")
    run(f"hookshot export {BACKUP}")
    late = deploy("web:5.0", deploy_id="from-ci-5")
    run("systemctl kill -s KILL hookshot; systemctl stop hookshot; rm -rf /var/lib/hookshot/* /srv/web/hold*")
    listed = paste("drill-queue")
    states = [status_of(deploy_id) for deploy_id in (*ids, late)]
    again = paste("drill-queue-again", ("20261123-131502-9f3c21ab", ids[1]))
    # What the caller does who never heard of the end.
    deploy("web:5.0", path="/deploy?wait=60", deploy_id="from-ci-5")
    return {"listed": listed, "ids": ids, "states": states, "again": again, "images": images()}


@drill
def killed_with_a_queue() -> dict[str, object]:
    """(d) as well: the disk is there again, so nothing is to be done."""
    reset()
    HOLD.touch()
    ids = [deploy(f"web:{number}.0") for number in (2, 3)]
    until("it runs", lambda: status_of(ids[0]) == "Deploying")
    run("systemctl kill -s KILL hookshot")
    HOLD.unlink()
    run("systemctl restart hookshot")
    until("both ended", lambda: all(status_of(each) in ("Succeeded", "RolledBack", "Failed") for each in ids))
    return {"images": images()}


@drill
def lost_secrets() -> dict[str, object]:
    """(e) The file is gone; the server goes on with what it has, and does not start again."""
    reset()
    broke = paste("break-secrets")
    said = paste("drill-secrets")
    deploy("web:2.0", path="/deploy?wait=60")
    return {"broke": broke, "said": said, "owner": owner_and_mode(ETC / "secrets"), "images": images()}


@drill
def full_disk() -> dict[str, object]:
    """(f) The data directory is a small file system of its own, and something fills it."""
    reset()
    paste("break-disk")
    refused = ask("POST", "/deploy", {"service": "web", "image": "web:2.0"})
    health = until("noticed", lambda: (answer := ask("GET", "/health"))[0] == 503 and answer)
    doctor = bash("hookshot doctor").stdout
    said = paste("drill-disk")
    deploy("web:2.0", path="/deploy?wait=60")
    there = images()
    paste("drill-disk-end")
    return {"there": there, "refused": refused, "health": health, "doctor": doctor, "said": said, "images": images()}


@drill
def version_before() -> dict[str, object]:
    """(g) The later version has a schema of its own, so its database is of no use to the one before."""
    reset()
    upgraded = paste("drill-upgrade", ("dist/hookshot.pyz", "later/hookshot.pyz"))
    # A second time: what is kept is still the version before.
    paste("drill-upgrade", ("dist/hookshot.pyz", "later/hookshot.pyz"))
    deploy("web:2.0", path="/deploy?wait=60")
    version = run("hookshot version")
    back = attempt("drill-downgrade")
    log = run("journalctl -u hookshot -o cat -n 10 --no-pager")
    said = paste("drill-downgrade-import")
    return {"upgraded": upgraded, "version": version.split()[1], "back": [back.returncode, back.stdout], "log": log, "said": said, "active": is_active(),
            "images": images(), "now": run("hookshot version").split()[1]}


@drill
def version_before_of_the_same_schema() -> dict[str, object]:
    reset()
    # Another file, as an older version is; Python reads a zip with a line behind it all the same.
    run("rm -f /usr/local/bin/hookshot.before; echo >> /usr/local/bin/hookshot")
    paste("drill-upgrade")
    deploy("web:2.0", path="/deploy?wait=60")
    paste("drill-downgrade")
    return {"active": is_active(), "images": images()}


@drill
def rehearsal() -> dict[str, object]:
    """(h) The server goes on: it is the same process afterwards."""
    reset()
    pid = run("systemctl show -P MainPID hookshot")
    HOLD.touch()
    waiting = [deploy("web:2.0"), deploy("web:3.0")]
    run(f"hookshot export {BACKUP}")
    said = paste("drill-rehearsal")
    HOLD.unlink()
    until("ended", lambda: status_of(waiting[1]) == "Succeeded")
    return {"said": said, "same": pid == run("systemctl show -P MainPID hookshot"), "images": images(), "left": os.path.exists("/var/tmp/rehearsal"),
            "files": sorted(path.name for path in ETC.iterdir())}


# --- security.md


@drill
def key_rotation() -> dict[str, object]:
    reset()
    old = key_of()
    first = paste("rotate-key-add")
    new = key_of("hmac_key_2")
    statuses = [ask("POST", "/deploy?wait=60", {"service": "web", "image": f"web:{number}.0"}, key=key)[0] for number, key in ((2, old), (3, new))]
    until("noted", lambda: "hmac_key_2" in bash("runuser -u hookshot -- hookshot services --keys").stdout)
    keys = paste("rotate-key-look")
    last = paste("rotate-key-remove")
    statuses += [ask("POST", "/deploy?wait=60", {"service": "web", "image": f"web:{number}.0"}, key=key)[0] for number, key in ((4, old), (5, new))]
    run("systemctl restart hookshot")
    return {"first": first, "keys": keys, "last": last, "statuses": statuses, "secrets": owner_and_mode(ETC / "secrets"), "active": is_active()}


@drill
def leaked_key() -> dict[str, object]:
    reset()
    old = key_of()
    HOLD.touch()
    ids = [deploy(f"web:{number}.0", deploy_id=f"thief-{number}") for number in (2, 3)]
    until("it runs", lambda: status_of(ids[0]) == "Deploying")
    taken = paste("leaked-key")
    refused = ask("POST", "/deploy", {"service": "web", "image": "web:9.0"}, key=old)[0]
    states = [status_of(each) for each in ids]
    looked = paste("leaked-key-look")
    ended = paste("leaked-key-undo", ("20261123-131502-9f3c21ab", ids[0]), ("web:4.1", "web:1.0"))
    HOLD.unlink()
    return {"taken": taken, "refused": refused, "states": states, "looked": looked, "ended": ended, "images": images(),
            "current": os.readlink(WEB / "current")}


@drill
def token_rotation() -> dict[str, object]:
    reset()
    run("sed -i 's/^# read_access = .*/read_access = \"token\"/' /etc/hookshot/config.toml && grep -q '^read_access' /etc/hookshot/config.toml")
    first = paste("rotate-token")
    old = key_of("read_token").decode()
    before = ask("GET", "/services", headers={"Authorization": f"Bearer {old}"})[0]
    paste("rotate-token")
    new = key_of("read_token").decode()
    after = [ask("GET", "/services", headers={"Authorization": f"Bearer {token}"})[0] for token in (old, new)]
    return {"first": first, "before": before, "after": after, "differ": old != new, "secrets": owner_and_mode(ETC / "secrets")}


@drill
def certificates() -> dict[str, object]:
    reset()
    make = ("openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days {} -subj /CN=localhost "
            "-addext subjectAltName=DNS:localhost -keyout privkey.pem -out fullchain.pem 2> /dev/null")
    PASTED.append("tls-toml")
    config = (ETC / "config.toml").read_text()
    for line in SCRIPTS["tls-toml"].splitlines()[1:]:
        config = config.replace(f'# {line.split()[0]} = ""\n', f"{line}\n")
    (ETC / "config.toml").write_text(config)
    run(make.format(2) + "\n"
        "install -d -m 0750 -g hookshot /etc/hookshot/tls\ninstall -m 0640 -g hookshot fullchain.pem privkey.pem /etc/hookshot/tls/\nsystemctl restart hookshot")
    ending = paste("tls-ends")
    run(make.format(9))
    said = paste("tls-renew")
    lines = bash("hookshot doctor").stdout.splitlines()
    return {"before": ending, "said": said, "after": paste("tls-ends"), "doctor": [line for line in lines if line.split()[1:2] == ["tls"]]}


@drill
def doctor() -> dict[str, object]:
    reset()
    return {"said": attempt("doctor").stdout, "exposure": paste("hardening")}


# --- audit.md


@drill
def audit() -> dict[str, object]:
    reset()
    # What has no row yet has no head in the log.
    until("written", lambda: "started" in run("hookshot audit"))
    run("systemctl restart hookshot")
    run("runuser -u hookshot -- hookshot lock web --reason stocktaking --for 1h")
    ask("POST", "/deploy", {"service": "web", "image": "web:3.0"}, headers={"X-Request-ID": "1a8dd2cc00000c92"})
    run("runuser -u hookshot -- hookshot unlock web")
    said = until("written", lambda: "SERVICE_LOCKED" in (text := paste("audit-look")) and text)
    verified = run("hookshot audit verify")
    head = verified.split()[-1]
    logged = paste("audit-logged")
    number, of_log = re.search(r"row (\d+) of the audit has the hash (\w+)", logged).groups()  # type: ignore[union-attr]
    shown = "1957d48774b4c5f647c9ca883040994078d05d44f6bd4711902721537dc66aa8"
    seen = {"logged": [int(number), bash(f"hookshot audit verify --head {of_log}").returncode], "said": said, "head": paste("audit-head", (shown, head)),
            "other": attempt("audit-head").returncode}
    PASTED.append("audit-by-hand")
    (DATA / "check.py").write_text(SCRIPTS["audit-by-hand"])
    seen["by hand"] = bash("python3 check.py", DATA).returncode
    run("systemctl stop hookshot && sqlite3 /var/lib/hookshot/state.db \"UPDATE audit SET image='web:9.9' WHERE n=2\"")
    edited = [bash("hookshot audit verify").returncode, bash("python3 check.py", DATA).returncode]
    explained = bash("systemctl start hookshot; runuser -u hookshot -- hookshot explain 1a8dd2cc00000c92").stdout
    return {**seen, "edited": edited, "explained": explained}


def main() -> None:
    began = time.monotonic()
    set_up()
    print(f"set_up: {time.monotonic() - began:.1f} s", file=sys.stderr)
    seen = {}
    for function in DRILLS:
        began = time.monotonic()
        PASTED.clear()
        try:
            seen[function.__name__] = {**function(), "pasted": sorted(set(PASTED))}
        except Exception:
            journal = subprocess.run(["journalctl", "--no-pager", "-n", "20", "-o", "cat", "-u", "hookshot"], capture_output=True, text=True).stdout
            seen[function.__name__] = {"broken": f"{traceback.format_exc()}\n{journal}"}
        print(f"{function.__name__}: {time.monotonic() - began:.1f} s", file=sys.stderr)
    print(json.dumps(seen))


main()
