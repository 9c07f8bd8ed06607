# SPDX-License-Identifier: MPL-2.0
"""What docs/migrating.md says: the steps from Hookshot 1.0 run, its tables leave nothing out, and webhook's example does the same here."""

import contextlib
import hashlib
import io
import json
import pathlib
import re
import socket
import subprocess
import tarfile
import tomllib

import pytest

import hookshot
from pages import run_script, script_of, text_of
from support import KEY, PROGRAM, ROOT, Host, free_port, need, run_in_machine, running, service, wait_until

PAGE = (ROOT / "docs/migrating.md").read_text(encoding="utf-8")
ORIGINAL = ROOT / "tests/data/original"


def first_cells(heading: str) -> str:
    """Return the first column of the tables between a heading and the next one of its kind, one cell a line."""
    level = heading.partition(" ")[0]
    text = re.split(rf"^#{{2,{len(level)}}} ", PAGE.partition(f"\n{heading}\n")[2], flags=re.MULTILINE)[0]
    return "\n".join(line.split(" | ")[0] for line in text.splitlines() if line.startswith("| "))


# --- from Hookshot 1.0

SERVICES_OF_1 = """
[defaults]
working_dir = "@"

[[service]]
name = "web-app"

[service.security]
allowed_image_pattern = '^ghcr\\.io/example/web-app:v\\d+\\.\\d+\\.\\d+$'

[service.github]
repo = "example/web-app"

[service.deploy]
commands = [["touch", "deployed-{{git_sha|default(x)}}"]]

[service.healthcheck]
commands = [["true"]]

[service.rollback]
enabled = true
commands = [["touch", "back"]]
"""


def test_the_steps_beside_the_old_server_work_by_paste_and_deploy_nothing(tmp_path):
    for program in ("bash", "curl", "openssl", "awk"):
        need(program)
    old, folder = tmp_path / "etc", tmp_path / "beside the old one"
    old.mkdir()
    folder.mkdir()
    (old / "config.toml").write_text((ORIGINAL / "config.toml").read_text().replace("/etc/hookshot", str(old)))
    (old / "services.toml").write_text(SERVICES_OF_1.replace("@", str(tmp_path)))
    (old / "secrets").write_text(f"hmac_key={KEY}\nnotifications.webhook.on_failure=https://hooks.slack.com/services/T0/B0/x\n")
    (old / "secrets").chmod(0o600)
    before = {file: file.read_bytes() for file in old.iterdir()}
    (folder / "hookshot.py").write_bytes(PROGRAM.read_bytes())
    script = script_of("beside")
    assert "/etc/hookshot/" in script and "18080" in script

    done = run_script(script.replace("/etc/hookshot/", f"{old}/").replace("18080", str(free_port())), folder)

    assert done.returncode == 0, done.stdout
    assert 'service "web-app".github: is a table that Hookshot 1.0 checked and never used' in done.stdout and "exit status 78" in done.stdout
    assert "deploy 1: touch deployed-" in done.stdout and '"touch","deployed-9f3c21ab"' in done.stdout.replace(" ", ""), done.stdout
    assert not [*tmp_path.glob("deployed*"), *tmp_path.glob("back")] and {file: file.read_bytes() for file in old.iterdir()} == before


def test_the_switch_and_the_way_back_work_by_paste_under_systemd(tmp_path):
    """tests/machine_migrating.py says over what; the page says what is done."""
    blocks = {name: script_of(name) for name in ("secrets-of-1", "beside", "old", "switch", "first", "way-back")}
    build = (ROOT / "build_zipapp.py").read_text(encoding="utf-8")
    script = tmp_path / "script.py"
    script.write_text((ROOT / "tests/machine_migrating.py").read_text(encoding="utf-8")
                      .replace("BLOCKS: dict[str, str]\n", f"BLOCKS = {blocks!r}\n").replace("BUILD: str\n", f"BUILD = {build!r}\n"))
    assert run_in_machine(script) == {
        "beside": [True, []], "old": "ghcr.io/example/web-app:v1.2.3", "doctor": [], "new": [True, None],
        "first": ["ghcr.io/example/web-app:v1.2.3", ["v1.2.3"]], "kept": [False, True, "redb"],
        "back": [True, True, "/opt/hookshot/hookshot"]}


def keys_of(table: dict, prefix: str = "") -> dict[str, None]:
    """Return the path of every key of a file in its order; [[service]] counts as one table, a mapping of names as a key."""
    found: dict[str, None] = {}
    for name, value in table.items():
        for entry in value if name == "service" else [value]:
            deeper = isinstance(entry, dict) and name not in ("env", "templates")
            found |= keys_of(entry, f"{prefix}{name}.") if deeper else {prefix + name: None}
    return found


@pytest.mark.parametrize("file", ["config.toml", "services.toml"])
def test_every_key_of_1_0_has_its_place_in_the_tables(file):
    keys = keys_of(tomllib.loads((ORIGINAL / file).read_text()))
    tables: dict[str, set[str]] = {}
    for cell in first_cells(f"### {file}").splitlines():
        words = re.findall(r"`([\w.]+)`", cell)
        prefix = words[0].rpartition(".")[0] if words else ""
        tables.setdefault(prefix, set()).update(word.rpartition(".")[2] for word in words)
    assert len(keys) > 20 and [key for key in keys if key.rpartition(".")[2] not in tables.get(key.rpartition(".")[0], ())] == []


METRICS_OF_1 = ("deployment_total", "deployment_duration_seconds", "deployment_active", "deployment_queue_size", "rollback_total",
                "command_execution_duration_seconds", "healthcheck_failures_total", "http_requests_total", "http_request_duration_seconds")


def test_every_metric_of_1_0_has_its_row_and_is_there(tmp_path):
    cells = first_cells("### Metrics")
    assert [name for name in METRICS_OF_1 if f"`{name}`" not in cells] == []
    with running(tmp_path, service()) as host:
        host.wait(host.deploy())
        text = host.get("/metrics").body.decode()
    assert [name for name in METRICS_OF_1 if f"# TYPE {name} " not in text] == []


def test_every_request_of_1_0_has_its_row_and_is_answered(tmp_path):
    cells = first_cells("### HTTP API")
    with running(tmp_path, service()) as host:
        deploy_id = host.deploy()
        host.wait(deploy_id)
        for path in ("/status/{id}", "/logs/{id}", "/services", "/health", "/ready"):
            assert f"`GET {path}`" in cells and host.get(path.replace("{id}", deploy_id)).status == 200
        for path in ("/status/nobody", "/logs/nobody"):
            assert host.get(path).status == 404
        assert host.get("/ready").json["message"] and "build" not in host.get("/health").json
        assert host.get("/services").json["services"][0].keys() >= {"name", "enabled", "current_image", "last_deploy", "health", "locked", "stats"}


def test_refusals_have_the_codes_of_the_table(tmp_path):
    refused = {"not known": ({"service": "x"}, 404, "SERVICE_NOT_FOUND"), "disabled": ({"service": "off"}, 403, "ACCESS_DENIED"),
               "image not allowed": ({"image": "evil"}, 400, "VALIDATION_ERROR"), "wrong type": ({"image": 5}, 400, "VALIDATION_ERROR"),
               "unknown field": ({"extra": 1}, 400, "VALIDATION_ERROR"), "deploy_id": ({"deploy_id": "a b"}, 400, "VALIDATION_ERROR")}
    with running(tmp_path, service() + service(name="off", head="enabled = false")) as host:
        for name, (fields, status, code) in refused.items():
            answer = host.post({"service": "web", "image": "app:1", **fields})
            assert (answer.status, answer.json["code"]) == (status, code), name
            assert answer.json.keys() >= {"error", "code", "details", "timestamp"}
        wrong = host.post({"service": "web", "image": "app:1"}, key=b"another key of some length")
        assert (wrong.status, wrong.json["code"]) == (401, "AUTHENTICATION_ERROR")


def test_a_hook_before_the_deploy_may_fail_where_it_says_so(tmp_path):
    """What 1.0 did with every hook; the page says how to have it back."""
    hooks = '[service.hooks]\npre_deploy = [{ run = ["false"], critical = false }]\n'
    with running(tmp_path, service(tables=hooks) + service(name="strict", tables='[service.hooks]\npre_deploy = [["false"]]\n')) as host:
        assert host.wait(host.deploy())["status"] == "Succeeded"
        assert host.wait(host.deploy(service="strict"))["status"] == "Failed"


def test_addresses_are_checked_for_every_request(tmp_path):
    with running(tmp_path, service(), '[security]\nallowed_ips = ["192.0.2.0/24"]\n') as host:
        assert {host.get(path).status for path in ("/health", "/ready", "/metrics", "/services")} == {403}


def test_a_backup_of_1_0_is_refused_with_what_can_be_had_from_it(tmp_path):
    files = {"state.redb": b"redb", "config.toml": b"[server]\n", "services.toml": b""}
    manifest = {"version": "1.0", "created_at": 1738252822, "hookshot_version": "1.0.2", "files": {
        name: {"path": name, "checksum": hashlib.sha256(content).hexdigest(), "size": len(content)} for name, content in files.items()}}
    archive = tmp_path / "old.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in {"manifest.json": json.dumps(manifest).encode(), **files}.items():
            entry = tarfile.TarInfo(f"hookshot-state-20250130-143022/{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    host = Host(tmp_path / "host", service())
    done = host.cli("import", "--dry-run", str(archive))
    assert done.returncode == 65 and "is a backup of Hookshot 1.0, whose database cannot be read" in done.stderr and "with tar" in done.stderr


# --- from webhook

KEYS_OF_A_HOOK = (
    "id", "execute-command", "command-working-directory", "response-message", "response-headers", "success-http-response-code",
    "include-command-output-in-response", "include-command-output-in-response-on-error", "pass-environment-to-command", "pass-arguments-to-command",
    "pass-file-to-command", "parse-parameters-as-json", "trigger-rule", "trigger-rule-mismatch-http-response-code", "trigger-signature-soft-failures",
    "incoming-payload-content-type", "http-methods",
    "value", "regex", "payload-hmac-sha1", "payload-hmac-sha256", "payload-hmac-sha512", "payload-hash-sha1", "payload-hash-sha256", "payload-hash-sha512",
    "ip-whitelist", "scalr-signature",
    "header", "url", "query", "payload", "raw-request-body", "request", "string", "entire-payload", "entire-query", "entire-headers")


def test_every_key_rule_and_source_of_webhook_has_its_row():
    cells = first_cells("### hooks.json, key by key")
    assert [key for key in KEYS_OF_A_HOOK if f"`{key}`" not in cells] == []


@contextlib.contextmanager
def webhook(hooks: pathlib.Path, port: int):
    """Run the real webhook on a port of this host."""
    with open(hooks.with_suffix(".log"), "wb") as log:
        process = subprocess.Popen([need("webhook"), "-hooks", hooks, "-ip", "127.0.0.1", "-port", str(port), "-verbose"],
                                   stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        wait_until(lambda: process.poll() is not None or is_open(port))
        assert process.poll() is None, hooks.with_suffix(".log").read_text()
        yield
    finally:
        process.kill()
        process.wait()


def is_open(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def test_the_example_of_webhook_runs_the_same_command_with_the_same_values_here(tmp_path):
    for program in ("bash", "curl", "openssl", "webhook"):
        need(program)
    site, program, hooks, port = tmp_path / "site", tmp_path / "deploy-site", tmp_path / "hooks.json", free_port()
    site.mkdir()
    program.write_text(script_of("webhook-script"))
    program.chmod(0o755)

    def placed(text: str) -> str:
        assert "/usr/local/bin/deploy-site" in text and '"/srv/site"' in text
        return text.replace("/usr/local/bin/deploy-site", str(program)).replace("/srv/site", str(site))

    def call(name: str, *changes: tuple[str, str]) -> str:
        script = script_of(name).replace("127.0.0.1:9000", f"127.0.0.1:{port}").replace("127.0.0.1:8080", f"127.0.0.1:{host.port}")
        for old, new in changes:
            assert old in script
            script = script.replace(old, new)
        folder = tmp_path / f"{name}-{len(changes)}-{changes[0][1] if changes else ''}".replace("/", "-")
        folder.mkdir()
        done = run_script(script, folder)
        assert done.returncode == 0, done.stdout
        return done.stdout

    def lines() -> list[str]:
        return (site / "deployed").read_text().splitlines() if (site / "deployed").exists() else []

    hooks.write_text(placed(text_of("webhook", "json")))
    key = json.loads(hooks.read_text())[0]["trigger-rule"]["and"][0]["match"]["secret"]
    assert f"`hmac_key={key}`" in PAGE
    with webhook(hooks, port), running(tmp_path / "host", placed(text_of("webhook", "toml")), text_of("webhook-config", "toml"), key=key) as host:
        assert "deploying" in call("webhook-before")
        wait_until(lambda: len(lines()) == 1)
        assert '"status":"Succeeded"' in call("webhook-after")
        assert lines() == [f"v1.4 by ada in {site}"] * 2

        assert "not satisfied" in call("webhook-before", ("heads/main", "heads/dev"))
        refused = call("webhook-after", ("heads/main", "heads/dev"))
        assert '"status":"Failed"' in refused and '"failure_stage":"pre_deploy"' in refused, refused
        call("webhook-before", (f"key={key}", "key=wrong"))
        assert '"code":"AUTHENTICATION_ERROR"' in call("webhook-after", (f"key={key}", "key=wrong"))
        assert len(lines()) == 2


def test_the_script_of_the_example_needs_nothing_but_its_two_values():
    assert set(re.findall(r"\$(\w+)", script_of("webhook-script"))) == {"1", "DEPLOYED_BY"}
    assert hookshot.env_name_of("sender") == "HOOKSHOT_META_SENDER"
