# SPDX-License-Identifier: MPL-2.0
"""docs/deployment.md by paste, on a host of its own: systemd, polkit, nginx and Caddy with TLS, firewalls, an upgrade and the way back."""

import json
import pathlib
import re

import pytest

from pages import read_blocks, script_of, text_of
from support import ROOT, has_python_of_machine, need, run_in_machine
from test_quickstart import read_yaml

PRODUCTION = ("production-install", "production-user", "production-application", "production-config", "production-secrets", "production-polkit",
              "production-sudo", "production-unit", "production-again", "production-security", "production-first", "production-nginx", "production-caddy", "production-caller",
              "production-nftables", "production-ufw", "production-prometheus", "production-logs", "production-upgrade", "production-back",
              "production-restore", "production-doctor")
PAGES = ("systemd-unit", "systemd-socket", "systemd-credentials", "systemd-encrypted", "systemd-user", "operations-reload", "operations-key")
SCRAPE = "production-scrape"


# Booted once for all Pythons of a run.
in_one_suite = pytest.mark.skipif(not has_python_of_machine(), reason="the tests with Debian's Python run this")


def in_a_machine(folder: pathlib.Path, script: str, blocks: dict[str, str]) -> dict:
    """Return what a script of tests/ has seen in a machine of its own that it was given these blocks for."""
    (folder / "blocks").write_text(json.dumps(blocks))
    return run_in_machine(ROOT / "tests" / script, file=folder / "blocks")


def without_figures(lines: list[str]) -> list[str]:
    """Return what doctor says, but for what is another on each host: figures, file systems, and whether memory may be locked."""
    kept = [re.sub(r"[0-9][0-9.:TZ-]*( [KMG]?B)?|\((overlay|ext4)\)", "N", line) for line in lines if line]
    return [line.partition("its user")[0] for line in kept]


@in_one_suite
def test_a_production_host_is_made_by_paste(tmp_path):
    for program in ("systemd-nspawn", "nginx", "caddy", "nft", "ufw", "sudo", "promtool", "curl", "openssl", "ip", "pkaction"):
        need(program)
    seen = in_a_machine(tmp_path, "machine_deployment.py", {name: script_of(name) for name in PRODUCTION} | {SCRAPE: text_of(SCRAPE, "yaml")})
    [shown] = [block.text.splitlines() for block in read_blocks("") if block.page.name == "deployment.md" and block.text.startswith("ok   python")]
    assert without_figures(seen.pop("doctor")) == without_figures(shown)
    through_a_proxy = [["web web:1.1: Succeeded"], True, True, "192.0.2.10", 403]
    assert seen == {
        "modes": ["/etc/hookshot/config.toml root 644", "/etc/hookshot/services.toml root 644", "/etc/hookshot/secrets hookshot 600", "/srv/web hookshot 755"],
        "unit": ["as hookshot, the server's user:", "/etc/hookshot/config.toml and /etc/hookshot/services.toml are valid; services: web"],
        "runs as": "hookshot", "exposure": "1.4", "first": ["web web:1.0: Succeeded"], "answers": "web 1.0\n",
        "folders": ["/var/lib/hookshot hookshot 700", "/var/log/hookshot hookshot 755", "/var/log/hookshot/hookshot.log hookshot 640"],
        "bad release": [11, "web web:1.2: RolledBack", "web 1.0\n"], "polkit": [True, False, False],
        "visudo": "hookshot.sudoers: parsed OK", "sudo": [True, False], "nginx": through_a_proxy, "caddy": through_a_proxy,
        # A caller and a stranger: without a firewall, with nftables, with ufw.
        "firewall": [[True, True], [True, False], [True, False]],
        "promtool": True, "metrics": True, "logs": True, "upgraded": [], "newer": "/usr/local/lib/hookshot/2.1.0.pyz",
        "older": ["/usr/local/lib/hookshot/2.0.0.pyz", "active"], "restored": ["active", "active", "web web:1.0: Succeeded"],
        "checklist": ["enabled", "enabled", "enabled", "127.0.0.1:8080"]}


@in_one_suite
def test_the_pages_of_systemd_and_of_operation_work_by_paste(tmp_path):
    need("systemd-nspawn")
    blocks = {name: script_of(name) for name in PAGES} | {"systemd-override": text_of("systemd-override", "ini"),
                                                         "systemd-encrypted.ini": text_of("systemd-encrypted", "ini")}
    seen = in_a_machine(tmp_path, "machine_pages.py", blocks)
    for name in ("reload", "key"):
        told = seen[name]
        seen[name] = told[told.index("reloaded") + 1 :]
    assert seen == {
        "deployed": "Succeeded", "reload": ["limits.max_output: 10MB -> 20MB"], "key": ["security.hmac_keys: [hmac_key] -> [hmac_key, hmac_key_2]", "secret hmac_key_2: added"], "deployed by the new key": "Succeeded", "keys": True,
        "override": "no\n", "socket": [True, "Succeeded"], "credentials": "Succeeded", "encrypted": "Succeeded", "user": ["Succeeded"]}


@pytest.mark.parametrize("block", [block for block in read_blocks("yaml") if block.page.name == "deployment.md"], ids=str)
def test_a_block_of_yaml_is_a_table(block):
    assert read_yaml(block.text)


def test_both_pages_have_the_same_rule_of_polkit():
    assert text_of("systemd-polkit", "js") in script_of("production-polkit")
