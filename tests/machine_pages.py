# SPDX-License-Identifier: MPL-2.0
"""What tests/machine.sh runs in a machine of its own for tests/test_deployment_page.py: the blocks of docs/systemd.md and docs/operations.md.

/usr/local/lib/file has the blocks by name. Prints one JSON object: what was seen at each stage. It judges nothing.
"""

import json
import os
import pathlib
import re
import subprocess
import sys
import time

BLOCKS = json.loads(pathlib.Path("/usr/local/lib/file").read_text())
CONFIG = pathlib.Path("/etc/hookshot/config.toml")
DROP_INS = pathlib.Path("/etc/systemd/system/hookshot.service.d")
ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8"}
seen: dict[str, object] = {}


def run(script: str, *as_user: str, folder: str = "/root/hookshot") -> str:
    """Run a piece of shell as it is pasted, in the clone as root if nothing else is said."""
    done = subprocess.run([*as_user, "bash", "-e"], input=script, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder, env=ENVIRONMENT,
                          timeout=120)
    if done.returncode:
        journal = subprocess.run(["journalctl", "--no-pager", "-n", "40", "-o", "cat"], capture_output=True, text=True).stdout
        raise SystemExit(f"{script}\nended with {done.returncode}: {done.stdout}\n{journal}")
    return done.stdout


def paste(name: str) -> str:
    return run(BLOCKS[name])


def change(old: str, new: str) -> None:
    text = CONFIG.read_text()
    assert text.count(old) == 1, old
    CONFIG.write_text(text.replace(old, new))


def deploy(prefix: str = "runuser -u hookshot --") -> str:
    return re.findall(r"example/app:1.0: (\w+)", run(f"{prefix} hookshot deploy example example/app:1.0"))[-1]


def install() -> None:
    paste("systemd-unit")
    seen["deployed"] = deploy()


def operate() -> None:
    change('# max_output = "10MB"', 'max_output = "20MB"')
    seen["reload"] = paste("operations-reload").splitlines()
    paste("operations-key")
    change('# hmac_keys = ["hmac_key"]', 'hmac_keys = ["hmac_key", "hmac_key_2"]')
    seen["key"] = paste("operations-reload").splitlines()
    run("sed -n 's/^hmac_key_2=//p' /etc/hookshot/secrets > new_key")
    seen["deployed by the new key"] = deploy("env HOOKSHOT_HMAC_KEY=$(cat new_key)")
    seen["keys"] = "hmac_key_2" in run("runuser -u hookshot -- hookshot services --keys")


def override() -> None:
    DROP_INS.mkdir()
    (DROP_INS / "override.conf").write_text(BLOCKS["systemd-override"])
    seen["override"] = run("systemctl daemon-reload; systemd-analyze verify hookshot.service; systemctl restart hookshot.service;"
                           "systemctl show hookshot.service --value -p MemoryDenyWriteExecute")
    (DROP_INS / "override.conf").unlink()


def hold_the_socket() -> None:
    paste("systemd-socket")
    seen["socket"] = ["(from systemd)" in run("journalctl -u hookshot.service -o cat | grep started | tail -n 1"), deploy()]


def hand_over_credentials() -> None:
    change('# source = "auto"', 'source = "systemd"')
    change('hmac_keys = ["hmac_key", "hmac_key_2"]', 'hmac_keys = ["hmac_key"]')
    paste("systemd-credentials")
    seen["credentials"] = deploy("env HOOKSHOT_HMAC_KEY=$(cat /etc/hookshot/credentials/hmac_key)")
    paste("systemd-encrypted")
    (DROP_INS / "override.conf").write_text(BLOCKS["systemd-encrypted.ini"])
    run("rm /etc/hookshot/credentials/hmac_key; systemctl daemon-reload; systemctl restart hookshot.service")
    seen["encrypted"] = deploy("env HOOKSHOT_HMAC_KEY=$(systemd-creds decrypt --name=hmac_key /etc/hookshot/credentials/hmac_key.cred -)")


def be_a_users_own() -> None:
    run("systemctl stop hookshot.socket hookshot.service; useradd --create-home dep; loginctl enable-linger dep")
    uid = run("id -u dep").strip()
    deadline = time.monotonic() + 40
    while not os.path.exists(f"/run/user/{uid}/systemd/private"):
        if time.monotonic() > deadline:
            raise SystemExit("there is no manager of the user's own")
        time.sleep(0.05)
    as_user = ("runuser", "-u", "dep", "--", "env", "HOME=/home/dep", "USER=dep", f"XDG_RUNTIME_DIR=/run/user/{uid}")
    run(BLOCKS["systemd-user"], *as_user, folder="/home/dep")
    seen["user"] = re.findall(r"example/app:1.0: (\w+)", run("hookshot deploy example example/app:1.0", *as_user, folder="/home/dep"))


for stage in (install, operate, override, hold_the_socket, hand_over_credentials, be_a_users_own):
    began = time.monotonic()
    stage()
    print(f"{stage.__name__}: {time.monotonic() - began:.1f} s", file=sys.stderr)
print(json.dumps(seen))
