# SPDX-License-Identifier: MPL-2.0
"""docs/deployment.md by paste, on a host of its own: systemd, polkit, nginx and Caddy with TLS, firewalls, an upgrade and the way back."""

import json
import pathlib
import subprocess

import pytest

from pages import script_of, text_of
from support import PATIENCE_S, PROGRAM, ROOT, need

PRODUCTION = ("production-install", "production-user", "production-application", "production-config", "production-secrets", "production-polkit",
              "production-sudo", "production-unit", "production-security", "production-first", "production-nginx", "production-caddy", "production-caller",
              "production-nftables", "production-ufw", "production-prometheus", "production-logs", "production-upgrade", "production-back",
              "production-restore", "production-doctor")
SCRAPE = "production-scrape"


def in_a_machine(folder: pathlib.Path, script: str, blocks: dict[str, str]) -> dict:
    """Return what a script of tests/ has seen in a machine of its own that it was given these blocks for."""
    (folder / "blocks").write_text(json.dumps(blocks))
    # By SIGTERM, at which the machine is taken away again.
    command = ["timeout", str(20 * PATIENCE_S), ROOT / "tests/machine.sh", PROGRAM, ROOT / "tests" / script, folder / "blocks"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip(f"no machine can be had here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    (folder / "said").write_text(done.stderr)
    return json.loads(done.stdout)


def test_a_production_host_is_made_by_paste(tmp_path):
    for program in ("systemd-nspawn", "nginx", "caddy", "nft", "ufw", "sudo", "promtool", "curl", "openssl"):
        need(program)
    seen = in_a_machine(tmp_path, "machine_deployment.py", {name: script_of(name) for name in PRODUCTION} | {SCRAPE: text_of(SCRAPE, "yaml")})
    assert seen == {}
