# SPDX-License-Identifier: MPL-2.0
"""What tests/machine.sh runs in a machine of its own for tests/test_deployment_page.py: the blocks of docs/deployment.md, by paste.

/usr/local/lib/file has the blocks by name. Prints one JSON object: what was seen at each stage. It judges nothing.
"""

import http.client
import json
import os
import pathlib
import re
import ssl
import subprocess
import sys
import time

BLOCKS = json.loads(pathlib.Path("/usr/local/lib/file").read_text())
CLONE = pathlib.Path("/root/hookshot")
CERTIFICATES = pathlib.Path("/etc/ssl/hookshot")
CADDYFILE = pathlib.Path("/etc/caddy/Caddyfile")
AUTHORITY_OF_CADDY = pathlib.Path("/var/lib/caddy/.local/share/caddy/pki/authorities/local/root.crt")
# A service whose log can be watched while it grows.
SLOW = """
[[service]]
name = "slow"
working_dir = "/srv/web"
[service.security]
allowed_image_pattern = 'slow:[0-9]+'
[service.deploy]
commands = [["sh", "-c", "echo begin; until [ -e go ]; do sleep 0.05; done; echo end"]]
"""
# What a root shell of a fresh host has; nothing of the host of the tests.
ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8"}
seen: dict[str, object] = {}


def run(script: str, *, may_fail: bool = False) -> tuple[int, str]:
    """Run a piece of shell in the clone, as it is pasted."""
    done = subprocess.run(["bash", "-e"], input=script, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=CLONE, env=ENVIRONMENT, timeout=120)
    if done.returncode and not may_fail:
        raise SystemExit(f"{script}\nended with {done.returncode}: {done.stdout}\n{journal()}")
    return done.returncode, done.stdout


def paste(name: str) -> str:
    return run(BLOCKS[name])[1]


def journal() -> str:
    return subprocess.run(["journalctl", "--no-pager", "-n", "60", "-o", "cat"], capture_output=True, text=True).stdout


def until(what: str, condition, patience_s: float = 40.0):
    deadline = time.monotonic() + patience_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise SystemExit(f"{what}: still not so after {patience_s} s\n{journal()}")
        time.sleep(0.05)
    return value


def outcomes(output: str) -> list[str]:
    return re.findall(r"^\w+ \w+:[0-9.]+: \w+", output, re.MULTILINE)


def make_surroundings() -> None:
    """A name and an address for the host, a stranger's address, and a certificate."""
    run("""
        ip address add 192.0.2.10/32 dev lo
        ip address add 203.0.113.5/32 dev lo
        echo 192.0.2.10 deploy.example.com >> /etc/hosts
        install -d /etc/ssl/hookshot
        openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=deploy.example.com \\
          -addext subjectAltName=DNS:deploy.example.com -keyout /etc/ssl/hookshot/privkey.pem -out /etc/ssl/hookshot/fullchain.pem
    """)


def install() -> None:
    for name in ("install", "user", "application", "config", "secrets"):
        paste(f"production-{name}")
    seen["modes"] = run("stat -c '%n %U %a' /etc/hookshot/config.toml /etc/hookshot/services.toml /etc/hookshot/secrets /srv/web")[1].splitlines()


def start() -> None:
    paste("production-polkit")
    run("systemctl restart polkit.service")
    seen["unit"] = [line for line in paste("production-unit").splitlines() if not line.startswith("Created symlink")]
    seen["runs as"] = run("systemctl show hookshot.service --value -p User")[1].strip()
    seen["folders"] = run("stat -c '%n %U %a' /var/lib/hookshot /var/log/hookshot /var/log/hookshot/hookshot.log")[1].splitlines()
    [seen["exposure"]] = re.findall(r"Overall exposure level .*: ([0-9.]+)", paste("production-security"))
    paste("production-again")
    seen["first"] = outcomes(paste("production-first"))
    seen["answers"] = run("curl -s http://127.0.0.1:8000/index.html")[1]
    status, output = run("runuser -u hookshot -- hookshot deploy web web:1.2", may_fail=True)
    seen["bad release"] = [status, *outcomes(output), run("curl -s http://127.0.0.1:8000/index.html")[1]]
    # One verb on one unit, and no other.
    seen["polkit"] = [run(f"runuser -u hookshot -- systemctl --no-ask-password {words}", may_fail=True)[0] == 0
                      for words in ("restart web.service", "stop web.service", "restart polkit.service")]


def allow_sudo() -> None:
    seen["visudo"] = paste("production-sudo").splitlines()[-1]
    seen["sudo"] = [run(f"runuser -u hookshot -- sudo -n {words}", may_fail=True)[0] == 0
                    for words in ("systemctl restart web.service", "systemctl stop web.service")]
    run("rm /etc/sudoers.d/hookshot")


def ask(path: str, authority: pathlib.Path, source: str = "192.0.2.10") -> http.client.HTTPResponse:
    """Ask the proxy, from an address, with the token."""
    context = ssl.create_default_context(cafile=str(authority))
    link = http.client.HTTPSConnection("deploy.example.com", 443, timeout=60, source_address=(source, 0), context=context)
    token = (CLONE / "read_token").read_text().strip()
    link.request("GET", path, headers={"Authorization": f"Bearer {token}", "Accept": "text/plain"})
    return link.getresponse()


def call_through(proxy: str, authority: pathlib.Path) -> None:
    """Deploy as a caller from elsewhere, and watch a log that grows."""
    (CLONE / "ca.pem").write_bytes(authority.read_bytes())
    called = outcomes(paste("production-caller"))
    deploy_id = json.loads(run("runuser -u hookshot -- hookshot deploy slow slow:1 --no-wait --json 2> /dev/null")[1])["deploy_id"]
    response = ask(f"/logs/{deploy_id}?follow=1", authority)
    # It has not ended, and will not before this line has come through.
    begun = any(b"begin" in line for line in iter(response.readline, b""))
    pathlib.Path("/srv/web/go").touch()
    ended = b"end" in response.read()
    pathlib.Path("/srv/web/go").unlink()
    history = json.loads(run("runuser -u hookshot -- hookshot history web --json 2> /dev/null")[1])
    record = json.loads(run(f"runuser -u hookshot -- hookshot status {history['deployments'][0]['deploy_id']} --json 2> /dev/null")[1])
    seen[proxy] = [called, begun, ended, record["triggered_by"]["address"], ask("/services", authority, "203.0.113.5").status]


def serve_tls() -> None:
    services = pathlib.Path("/etc/hookshot/services.toml")
    services.write_text(services.read_text() + SLOW)
    run("sed -n 's/^ci_key=//p' /etc/hookshot/secrets > ci_key; sed -n 's/^read_token=//p' /etc/hookshot/secrets > read_token; chmod 600 ci_key read_token")
    run("systemctl reload hookshot.service && hookshot reload")
    paste("production-nginx")
    call_through("nginx", CERTIFICATES / "fullchain.pem")
    run("systemctl stop nginx.service")
    # No authority on the Internet can be asked here: Caddy's own stands for one.
    block = BLOCKS["production-caddy"]
    head = "cat > /etc/caddy/Caddyfile <<'END'\n"
    assert head in block
    run(block.replace(head, head + "{\nlocal_certs\nskip_install_trust\n}\n"))
    until("a certificate of Caddy's own", AUTHORITY_OF_CADDY.exists)
    until("Caddy answers", lambda: run("curl -s --cacert /var/lib/caddy/.local/share/caddy/pki/authorities/local/root.crt https://deploy.example.com/ready", may_fail=True)[0] == 0)
    call_through("caddy", AUTHORITY_OF_CADDY)
    run("systemctl stop caddy.service; systemctl start nginx.service")


def make_outside() -> None:
    """A network beyond this host, with a caller's address and a stranger's."""
    run("""
        ip netns add outside
        ip link add outside type veth peer name host netns outside
        ip link set outside up
        ip route add 192.0.2.20 dev outside
        ip route add 203.0.113.20 dev outside
        ip -n outside link set host up
        ip -n outside address add 192.0.2.20/32 dev host
        ip -n outside address add 203.0.113.20/32 dev host
        ip -n outside route add 192.0.2.10 dev host
    """)


def who_comes_through() -> list[bool]:
    """Whether a caller and a stranger reach the proxy's port."""
    return [run(f"ip netns exec outside curl -s -k --connect-timeout 3 --interface {address} https://192.0.2.10/ready", may_fail=True)[0] == 0
            for address in ("192.0.2.20", "203.0.113.20")]


def close_ports() -> None:
    make_outside()
    open_before = who_comes_through()
    paste("production-nftables")
    by_nftables = who_comes_through()
    run("systemctl stop nftables.service")
    paste("production-ufw")
    seen["firewall"] = [open_before, by_nftables, who_comes_through()]
    run("ufw --force disable")


def watch() -> None:
    paste("production-prometheus")
    pathlib.Path("/etc/prometheus/prometheus.yml").write_text(BLOCKS["production-scrape"])
    seen["promtool"] = "SUCCESS" in run("promtool check config /etc/prometheus/prometheus.yml")[1]
    seen["metrics"] = b"hookshot_ready 1" in ask("/metrics", CERTIFICATES / "fullchain.pem").read()
    seen["logs"] = '"deploy_moved"' in paste("production-logs")


def upgrade() -> None:
    seen["upgraded"] = [line for line in paste("production-upgrade").splitlines() if line.startswith("fail")]
    seen["newer"] = os.readlink("/usr/local/bin/hookshot")
    paste("production-back")
    seen["older"] = [os.readlink("/usr/local/bin/hookshot"), run("systemctl is-active hookshot.service")[1].strip()]
    paste("production-restore")
    seen["restored"] = [*run("systemctl is-active hookshot.socket hookshot.service")[1].split(), *outcomes(paste("production-first"))]


def look() -> None:
    services = pathlib.Path("/etc/hookshot/services.toml")
    services.write_text(services.read_text().removesuffix(SLOW))
    run("hookshot reload")
    seen["doctor"] = paste("production-doctor").splitlines()
    seen["checklist"] = run("systemctl is-enabled hookshot.socket hookshot.service web.service; runuser -u hookshot -- hookshot services --keys > /dev/null;"
                            "hookshot import --dry-run /var/backups/hookshot-2.0.0.tar.gz > /dev/null 2>&1; runuser -u hookshot -- hookshot lock web > /dev/null;"
                            "ss -ltnH | awk '$4 ~ /:8080$/ {print $4}'")[1].split()


for stage in (make_surroundings, install, start, allow_sudo, serve_tls, close_ports, watch, upgrade, look):
    began = time.monotonic()
    stage()
    print(f"{stage.__name__}: {time.monotonic() - began:.1f} s", file=sys.stderr)
print(json.dumps(seen))
