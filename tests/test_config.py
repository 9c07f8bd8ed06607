# SPDX-License-Identifier: MPL-2.0
"""CONFIG: every key of both files, every problem at once, and the one place where a sample of the original is refused."""

import json
import re
from pathlib import Path

import pytest

import hookshot

ORIGINAL = Path(__file__).parent / "data" / "original"


# --- helpers

def toml(value):
    """Return a value as TOML writes it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(name)} = {toml(entry)}" for name, entry in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return str(value) if isinstance(value, Raw) else json.dumps(value, ensure_ascii=False)


class Raw(str):
    """Text that is TOML already."""


DATE = Raw("2020-01-01")   # Of no key's type.


def lines(keys):
    return "".join(f"{path} = {toml(value)}\n" for path, value in keys.items())


def load_config(keys):
    """Return config.toml of these keys (a mapping by path, or a text), and its problems."""
    problems = []
    return hookshot.load_config(keys if isinstance(keys, str) else lines(keys), "config.toml", problems), problems


def config_problems(keys):
    return load_config(keys)[1]


MINIMAL = {"name": "web", "security.allowed_image_pattern": "app:[0-9]+", "deploy.commands": [["deploy", "{{IMAGE}}"]]}


def service_text(keys, without=()):
    return "[[service]]\n" + lines({path: value for path, value in {**MINIMAL, **keys}.items() if path not in without})


def load_services(text, config=""):
    problems = []
    return hookshot.load_services(text, "services.toml", load_config(config)[0], problems), problems


def load_service(keys, defaults="", config=""):
    """Return the service of these keys, which must be right."""
    services, problems = load_services(defaults + service_text(keys), config)
    assert problems == []
    return services.by_name[keys.get("name", "web")]


def service_problems(keys, defaults="", without=()):
    return load_services(defaults + service_text(keys, without))[1]


def only(problems):
    """Return path and message of the one problem."""
    assert len(problems) == 1, problems
    return problems[0].path, problems[0].message


def walk(table, prefix=""):
    """Yield the path of every key of a table and of the tables in it."""
    for name, field in table._field_defaults.items():
        yield from walk(field, f"{prefix}{name}.") if hookshot.is_table(field) else [prefix + name]


def get(value, path):
    for name in path.split("."):
        value = getattr(value, name)
    return value


def plain(value):
    """Return a loaded value in the shapes of its file."""
    if isinstance(value, hookshot.Template):
        return value.text
    if isinstance(value, re.Pattern):
        return value.pattern
    if isinstance(value, hookshot.CommandSpec):
        return [word.text for word in value.run]
    if isinstance(value, hookshot.HttpProbe):
        return {"url": value.url.text, "status": value.status, "contains": plain(value.contains)}
    if isinstance(value, tuple | list):
        return [plain(entry) for entry in value]
    if isinstance(value, dict):
        return {name: plain(entry) for name, entry in value.items()}
    return value if isinstance(value, str | int | None) else str(value)


# --- the keys: path -> default as loaded, a value as written, that value as loaded

CONFIG_KEYS = {
    "server.listen": ([["127.0.0.1", 8080, "", "", -1]], ["[::1]:9000", "unix:/run/x", "systemd:web"],
                      [["::1", 9000, "", "", -1], ["", 0, "/run/x", "", -1], ["", 0, "", "web", -1]]),
    "server.socket_mode": (0o660, "600", 0o600),
    "server.worker_threads": (4, 64, 64),
    "server.max_request_size": (1 << 20, "64 kb", 64 << 10),
    "server.request_timeout": (30, "1m", 60),
    "server.shutdown_timeout": (300, 0, 0),
    "server.deploy_response": ("accepted", "completed", "completed"),
    "server.max_connections": (256, 10, 10),
    "server.tls.cert": ("", "/etc/hookshot/cert.pem", "/etc/hookshot/cert.pem"),
    "server.tls.client_ca": ("", "/etc/hookshot/ca.pem", "/etc/hookshot/ca.pem"),
    "server.tls.key": ("", "/etc/hookshot/key.pem", "/etc/hookshot/key.pem"),
    "security.allowed_ips": ([], ["10.0.0.0/8", "::1"], ["10.0.0.0/8", "::1/128"]),
    "security.rate_limit": (100, 0, 0),
    "security.trusted_proxies": ([], ["127.0.0.1"], ["127.0.0.1/32"]),
    "security.read_access": ("local", "token", "token"),
    "security.hmac_keys": (["hmac_key"], ["new", "old"], ["new", "old"]),
    "security.replay_window": (300, "1m", 60),
    "security.require_timestamp": (False, True, True),
    "storage.data_dir": ("/var/lib/hookshot", "/srv/state", "/srv/state"),
    "storage.retention.successful_deploys": (100, 1, 1),
    "storage.retention.failed_deploys": (50, 10000, 10000),
    "storage.retention.log_days": (90, 7, 7),
    "storage.retention.audit_days": (365, 30, 30),
    "logging.level": ("info", "debug", "debug"),
    "logging.format": ("json", "pretty", "pretty"),
    "logging.directory": ("", "/var/log/hookshot", "/var/log/hookshot"),
    "logging.rotation.max_size": (100 << 20, "1MB", 1 << 20),
    "logging.rotation.max_files": (10, 3, 3),
    "limits.max_concurrent_total": (10, 1000, 1000),
    "limits.max_concurrent_per_service": (1, 100, 100),
    "limits.max_queue_per_service": (20, 3, 3),
    "limits.deployment_timeout": (1800, "1h", 3600),
    "limits.command_timeout": (300, "90s", 90),
    "limits.lock_timeout": (3600, "2h", 7200),
    "limits.max_output": (10 << 20, "1MB", 1 << 20),
    "monitoring.metrics_enabled": (True, False, False),
    "monitoring.metrics_path": ("/metrics", "/prometheus", "/prometheus"),
    "monitoring.health_path": ("/health", "/healthz", "/healthz"),
    "monitoring.status_cache_seconds": (10, 1, 1),
    "secrets.source": ("auto", ["file", "env"], ["file", "env"]),
    "secrets.sources_priority": (["systemd", "file", "env"], ["env", "file"], ["env", "file"]),
    "secrets.secrets_file": ("/etc/hookshot/secrets", "/run/secrets", "/run/secrets"),
    "secrets.required_secrets": (["hmac_key"], [], []),
    "secrets.reload_interval": (300, 0, 0),
    "secrets.secret_prefix": ("HOOKSHOT_", "ACME_", "ACME_"),
    "secrets.command": ([], ["age", "-d", "x"], ["age", "-d", "x"]),
    "notifications.enabled": (False, True, True),
    "notifications.retry_for": (86400, "2h", 7200),
    "notifications.channel": ([], [{"name": "mine", "type": "exec", "command": ["true"]}], [[
        "mine", "exec", ["succeeded", "failed", "rolled_back", "rollback_failed", "cancelled"], [], False, 15, "", "auto", "", "", "", "", "starttls",
        "", "", "", [], ["true"], False]]),
    "notifications.webhook.on_failure": ("", "secret:hook", "secret:hook"),
    "notifications.webhook.on_rollback": ("", "https://example.net/a", "https://example.net/a"),
    "notifications.webhook.on_success": ("", "https://example.net/b", "https://example.net/b"),
    "notifications.webhook.timeout": (5, "10s", 10),
    "notifications.webhook.use_secrets": (False, True, True),
    "notifications.webhook.format": ("auto", "slack", "slack"),
    "notifications.webhook.signing_key": ("", "secret:notify", "secret:notify"),
    "notifications.webhook.allow_private": (False, True, True),
}
ONE, TWO = [["true"]], [["true"], ["echo", "{{IMAGE}}"]]
SERVICE_KEYS = {
    "name": (None, "web", "web"),
    "description": ("", "the site", "the site"),
    "enabled": (True, False, False),
    "working_dir": ("/srv", "/srv/web", "/srv/web"),
    "on_busy": ("queue", "replace", "replace"),
    "recovery": ("rollback", "retry", "retry"),
    "user": (None, "deploy", "deploy"),
    "group": (None, "deploy", "deploy"),
    "umask": (0o022, "077", 0o077),
    "nice": (0, 10, 10),
    "inherit_env": ([], ["XDG_RUNTIME_DIR"], ["XDG_RUNTIME_DIR"]),
    "env": ({}, {"A": "{{IMAGE}}"}, {"A": "{{IMAGE}}"}),
    "security.allowed_image_pattern": (None, "app:v[0-9]", "app:v[0-9]"),
    "security.allowed_env_overrides": ([], ["LOG_LEVEL"], ["LOG_LEVEL"]),
    "security.hmac_keys": ([], ["web_key"], ["web_key"]),
    "deploy.commands": (None, TWO, TWO),
    "deploy.timeout": (300, "2h", 7200),
    "deploy.retries": (0, 10, 10),
    "deploy.critical": (True, False, False),
    "healthcheck.initial_delay": (5, 0, 0),
    "healthcheck.interval": (3, 1, 1),
    "healthcheck.max_attempts": (20, 100, 100),
    "healthcheck.success_threshold": (3, 20, 20),
    "healthcheck.timeout": (10, "1m", 60),
    "healthcheck.commands": ([], ONE, ONE),
    "healthcheck.http": (None, "http://127.0.0.1/", {"url": "http://127.0.0.1/", "status": 200, "contains": None}),
    "healthcheck.tcp": (None, "127.0.0.1:80", "127.0.0.1:80"),
    "healthcheck.unix": (None, "/run/web.sock", "/run/web.sock"),
    "rollback.enabled": (True, False, False),
    "rollback.max_attempts": (2, 10, 10),
    "rollback.timeout": (300, 60, 60),
    "rollback.commands": ([], ONE, ONE),
    "hooks.pre_deploy": ([], ONE, ONE),
    "hooks.post_deploy": ([], ONE, ONE),
    "hooks.on_failure": ([], ONE, ONE),
    "templates": ({}, {"TAG": "{{IMAGE|tag}}"}, {"TAG": "{{IMAGE|tag}}"}),
}
DEFAULTS_KEYS = {
    "working_dir": ("/srv", "/opt", "/opt"),
    "command_timeout": (None, 60, 60),
    "healthcheck_timeout": (10, 20, 20),
    "rollback_enabled": (True, False, False),
    "on_busy": ("queue", "reject", "reject"),
    "inherit_env": ([], ["TERM"], ["TERM"]),
    "env": ({}, {"A": "b"}, {"A": "b"}),
}
COMMAND_KEYS = {
    "run": (None, ["echo", "{{IMAGE}}"], ["echo", "{{IMAGE}}"]),
    "name": (None, "pull it", "pull it"),
    "timeout": (None, "1m", 60),
    "retries": (None, 3, 3),
    "retry_delay": (None, 5, 5),
    "critical": (None, False, False),
    "env": ({}, {"A": "{{SERVICE}}"}, {"A": "{{SERVICE}}"}),
    "working_dir": (None, "/tmp", "/tmp"),
}
PROBE_KEYS = {
    "url": (None, "https://localhost/{{SERVICE}}", "https://localhost/{{SERVICE}}"),
    "status": (200, 204, 204),
    "contains": (None, "{{IMAGE|tag}}", "{{IMAGE|tag}}"),
}


@pytest.mark.parametrize("table, keys", [
    (hookshot.Config, CONFIG_KEYS), (hookshot.Service, SERVICE_KEYS), (hookshot.Defaults, DEFAULTS_KEYS),
    (hookshot.CommandSpec, COMMAND_KEYS),
    (hookshot.HttpProbe, PROBE_KEYS)], ids=["config", "service", "defaults", "command", "http"])
def test_the_keys_are_those_of_the_reference(table, keys):
    """A key that is added or lost shows up here, where its default and a value are pinned down."""
    assert list(walk(table)) == list(keys)


@pytest.mark.parametrize("path", CONFIG_KEYS)
def test_a_key_of_config_has_its_default_and_takes_a_value(path):
    default, written, loaded = CONFIG_KEYS[path]
    assert plain(get(load_config("")[0], path)) == default
    # [server.tls] needs both of its files; either may be the key that is tried.
    companions = {"server.tls.cert": "/c", "server.tls.key": "/k"} if path.startswith("server.tls.") else {}
    config, problems = load_config({**companions, path: written})
    assert (plain(get(config, path)), problems) == (loaded, [])


@pytest.mark.parametrize("path", SERVICE_KEYS)
def test_a_key_of_a_service_has_its_default_and_takes_a_value(path):
    default, written, loaded = SERVICE_KEYS[path]
    if path not in MINIMAL:
        assert plain(get(load_service({}), path)) == default
    assert plain(get(load_service({path: written}), path)) == loaded


@pytest.mark.parametrize("path", [path for path in COMMAND_KEYS if path != "run"])
def test_a_key_of_a_command_has_its_default_and_takes_a_value(path):
    default, written, loaded = COMMAND_KEYS[path]
    bare, full = load_service({"deploy.commands": [["true"], {"run": ["true"], path: written}]}).deploy.commands
    assert (plain(get(bare, path)), plain(get(full, path))) == (default, loaded)


@pytest.mark.parametrize("path", PROBE_KEYS)
def test_a_key_of_the_http_probe_has_its_default_and_takes_a_value(path):
    default, written, loaded = PROBE_KEYS[path]
    probe = load_service({"healthcheck.http": {"url": "http://127.0.0.1/", path: written}}).healthcheck.http
    assert plain(get(probe, path)) == loaded
    if path != "url":
        assert plain(get(load_service({"healthcheck.http": "http://127.0.0.1/"}).healthcheck.http, path)) == default


@pytest.mark.parametrize("path", [path for path, (default, _, _) in SERVICE_KEYS.items() if default is None and path in MINIMAL])
def test_a_key_without_a_default_is_required(path):
    found, message = only(service_problems({}, without=(path,)))
    assert (found.endswith(path), message) == (True, "is required")


# --- [defaults] and what a service inherits

@pytest.mark.parametrize("key, value, path, loaded", [
    ("working_dir", "/opt", "working_dir", "/opt"), ("command_timeout", 60, "deploy.timeout", 60),
    ("command_timeout", 60, "rollback.timeout", 60),
    ("healthcheck_timeout", 20, "healthcheck.timeout", 20), ("rollback_enabled", False, "rollback.enabled", False),
    ("on_busy", "reject", "on_busy", "reject"),
    ("inherit_env", ["TERM"], "inherit_env", ["TERM"]), ("env", {"A": "b"}, "env", {"A": "b"})])
def test_a_default_reaches_a_service_that_leaves_it_open(key, value, path, loaded):
    assert plain(get(load_service({}, defaults=f"[defaults]\n{lines({key: value})}"), path)) == loaded


def test_a_service_has_the_last_word_over_the_defaults():
    defaults = "[defaults]\n" + lines({"working_dir": "/opt", "command_timeout": 60, "healthcheck_timeout": 20,
                                       "rollback_enabled": False, "on_busy": "reject",
                                       "inherit_env": ["TERM"], "env": {"A": "default", "B": "default"}})
    service = load_service({"working_dir": "/srv/web", "deploy.timeout": 5, "rollback.timeout": 6, "healthcheck.timeout": 7,
                            "rollback.enabled": True,
                            "rollback.commands": ONE, "on_busy": "replace", "inherit_env": ["LANG"], "env": {"A": "own"}},
                           defaults)
    assert (service.working_dir, service.deploy.timeout, service.rollback.timeout, service.healthcheck.timeout) == (
        "/srv/web", 5, 6, 7)
    assert (service.rollback.enabled, service.on_busy, plain(service.env)) == (True, "replace", {"A": "own", "B": "default"})
    assert set(service.inherit_env) == {"TERM", "LANG"}


def test_commands_take_their_timeout_from_limits_when_nobody_else_says():
    service = load_service({}, config={"limits.command_timeout": 77})
    assert (service.deploy.timeout, service.rollback.timeout) == (77, 77)


@pytest.mark.parametrize("written, loaded", [("2h", 7200), ("1 M", 60), (15, 15)])
def test_durations_of_services_have_the_same_grammar(written, loaded):
    assert load_service({"deploy.timeout": written}).deploy.timeout == loaded


# --- wrong types

def wrong_types(value):
    """Return values of other types than that of a good one; true is no number, and 1 is no truth."""
    if isinstance(value, bool):
        return [1, "true", DATE]
    if isinstance(value, int):
        return [True, 1.5, [1], DATE]
    if isinstance(value, str):
        return [True, 7.5, [["x"]], DATE]
    return ["x y", 5, True, DATE] if isinstance(value, list) else ["x", [1], True, DATE]


def with_wrong_types(keys, skip=()):
    return [pytest.param(path, wrong, id=f"{path}={toml(wrong)}")
            for path, (_, good, _) in keys.items() if path not in skip for wrong in wrong_types(good)]


@pytest.mark.parametrize("path, value", with_wrong_types(CONFIG_KEYS))
def test_a_wrong_type_in_config_is_one_problem_at_its_key(path, value):
    found, message = only(config_problems({path: value}))
    assert found.partition("[")[0] == path and message


@pytest.mark.parametrize("path, value", with_wrong_types(SERVICE_KEYS))
def test_a_wrong_type_in_a_service_is_one_problem_at_its_key(path, value):
    found, message = only(service_problems({path: value}))
    assert found.startswith(("service[0]." if path == "name" else 'service "web".') + path) and message


@pytest.mark.parametrize("path, value", with_wrong_types(DEFAULTS_KEYS))
def test_a_wrong_type_in_defaults_is_one_problem_at_its_key(path, value):
    found, _ = only(service_problems({}, defaults=f"[defaults]\n{lines({path: value})}"))
    assert found == f"defaults.{path}"


@pytest.mark.parametrize("path, value", with_wrong_types(COMMAND_KEYS))
def test_a_wrong_type_in_a_command_is_one_problem_at_its_key(path, value):
    found, _ = only(service_problems({"deploy.commands": [["true"], {"run": ["true"], path: value}]}))
    assert found.startswith(f'service "web".deploy.commands[1].{path}')


@pytest.mark.parametrize("path, value", with_wrong_types(PROBE_KEYS))
def test_a_wrong_type_in_the_http_probe_is_one_problem_at_its_key(path, value):
    found, _ = only(service_problems({"healthcheck.http": {"url": "http://127.0.0.1/", path: value}}))
    assert found == f'service "web".healthcheck.http.{path}'


@pytest.mark.parametrize("table", ["server", "security", "storage", "storage.retention", "logging", "limits", "monitoring",
                                   "secrets"])
@pytest.mark.parametrize("value", ["x", 1, []])
def test_a_table_of_config_that_is_none_is_one_problem(table, value):
    assert only(config_problems({table: value})) == (table, f"{json.dumps(value)} is not a table")


@pytest.mark.parametrize("table", ["security", "deploy", "healthcheck", "rollback", "hooks"])
def test_a_table_of_a_service_that_is_none_is_a_problem(table):
    left = [path for path in MINIMAL if path.startswith(table)]
    problems = service_problems({table: 5}, without=left)
    assert (f'service "web".{table}', "5 is not a table") in [(problem.path, problem.message) for problem in problems]


@pytest.mark.parametrize("text", ["service = 5", "[service]\nname = 'web'", "service = [1]", "service = 'web'"])
def test_services_are_a_list_of_tables(text):
    assert only(load_services(text)[1]) == ("service", "is not a list of tables; write [[service]]")


# --- ranges

MB = 1 << 20
CONFIG_RANGES = {
    "server.worker_threads": (1, 64), "server.max_request_size": (1024, 100 * MB), "server.request_timeout": (1, None),
    "server.shutdown_timeout": (0, None),
    "server.max_connections": (1, None), "security.rate_limit": (0, 10000), "security.replay_window": (1, None), "storage.retention.successful_deploys": (1, 10000),
    "storage.retention.failed_deploys": (1, 10000), "storage.retention.log_days": (1, 10000), "storage.retention.audit_days": (7, 10000),
    "limits.max_concurrent_total": (1, 1000),
    "limits.max_concurrent_per_service": (1, 100), "limits.max_queue_per_service": (1, None),
    "limits.deployment_timeout": (1, None),
    "limits.command_timeout": (1, None), "limits.lock_timeout": (1, None), "limits.max_output": (64 << 10, None),
    "monitoring.status_cache_seconds": (0, None), "logging.rotation.max_size": (64 << 10, None), "logging.rotation.max_files": (1, 1000),
    "notifications.retry_for": (60, None), "notifications.webhook.timeout": (1, 60),
    "secrets.reload_interval": (0, None),
}
SERVICE_RANGES = {
    "nice": (-20, 19), "deploy.timeout": (1, 7200), "deploy.retries": (0, 10), "healthcheck.initial_delay": (0, None),
    "healthcheck.interval": (None, 180),
    "healthcheck.max_attempts": (3, 100), "healthcheck.success_threshold": (1, 20), "healthcheck.timeout": (1, None),
    "rollback.max_attempts": (1, 10),
    "rollback.timeout": (1, None),
}


def edges(ranges):
    """Return path, value, and whether it is allowed: both ends, one beyond each, and numbers that no range holds."""
    cases = []
    for path, (low, high) in ranges.items():
        good = [value for value in (low, high) if value is not None]
        bad = [value for value in (None if low is None else low - 1, None if high is None else high + 1, -1 << 40, 10**12, 2**63)
               if value is not None]
        cases += [pytest.param(path, value, value in good, id=f"{path}={value}") for value in good + bad]
    return cases


def test_every_number_of_both_files_has_a_range_here():
    """A new number cannot come without its ends being tried."""
    numbers = {path for keys in (CONFIG_KEYS, SERVICE_KEYS)
               for path, (_, _, loaded) in keys.items() if type(loaded) is int} - {"umask", "server.socket_mode"}
    assert numbers == {*CONFIG_RANGES, *SERVICE_RANGES}


@pytest.mark.parametrize("path, value, good", edges(CONFIG_RANGES))
def test_a_number_of_config_lies_in_its_range(path, value, good):
    problems = config_problems({path: value})
    if good:
        assert problems == []
    else:
        found, message = only(problems)
        assert found == path and "is out of range; allowed:" in message


@pytest.mark.parametrize("path, value, good", edges(SERVICE_RANGES))
def test_a_number_of_a_service_lies_in_its_range(path, value, good):
    found = [problem.path for problem in service_problems({path: value})]
    if good:
        assert found == []
    else:
        assert found and all(place.startswith(f'service "web".{path.partition(".")[0]}') for place in found)


@pytest.mark.parametrize("path, low, high", [("timeout", 1, 7200), ("retries", 0, 10), ("retry_delay", 0, 3600)])
def test_a_number_of_a_command_lies_in_its_range(path, low, high):
    for value, good in ((low, True), (high, True), (low - 1, False), (high + 1, False)):
        assert (service_problems({"deploy.commands": [{"run": ["true"], path: value}]}) == []) is good


@pytest.mark.parametrize("path, low, high", [
    ("deploy.commands", 1, 20), ("healthcheck.commands", 0, 20), ("rollback.commands", 0, 20), ("hooks.pre_deploy", 0, 20),
    ("hooks.post_deploy", 0, 20),
    ("hooks.on_failure", 0, 20)])
def test_a_list_of_commands_has_a_length(path, low, high):
    for count, good in ((low, True), (high, True), (high + 1, False), (low - 1, False)):
        if count >= 0:
            assert (service_problems({path: [["true"]] * count}) == []) is good, count


@pytest.mark.parametrize("path", ["security.allowed_ips", "security.trusted_proxies"])
def test_at_most_100_networks_are_listed(path):
    networks = [f"10.0.{index}.0/24" for index in range(101)]
    assert config_problems({path: networks[:100]}) == []
    assert only(config_problems({path: networks})) == (path, "has 101 entries; allowed: 0 to 100")


def test_a_network_with_host_bits_is_refused_with_the_right_one():
    path, message = only(config_problems({"security.allowed_ips": ["10.0.0.0/8", "192.168.1.7/24"]}))
    assert (path, message) == ("security.allowed_ips[1]", "192.168.1.7/24 has host bits set; the network is 192.168.1.0/24")


def test_a_threshold_beyond_the_attempts_is_refused():
    path, message = only(service_problems({"healthcheck.max_attempts": 2, "healthcheck.success_threshold": 3}))
    assert path.endswith("healthcheck.success_threshold") and "can never be reached with max_attempts 2" in message


def test_one_attempt_is_the_least():
    assert service_problems({"healthcheck.max_attempts": 1, "healthcheck.success_threshold": 1}) == []
    assert service_problems({"healthcheck.max_attempts": 0,
                             "healthcheck.success_threshold": 1})[0].path == 'service "web".healthcheck.max_attempts'


def test_probing_for_more_than_an_hour_is_refused():
    assert service_problems({"healthcheck.interval": 60, "healthcheck.max_attempts": 60}) == []
    assert "more than an hour" in only(service_problems({"healthcheck.interval": 61, "healthcheck.max_attempts": 60}))[1]


# --- values of one key

BAD_CONFIG_VALUES = [
    ("server.listen", "8080"), ("server.listen", "127.0.0.1:99999"), ("server.max_request_size", "1TB"),
    ("server.request_timeout", "soon"),
    ("server.deploy_response", "later"), ("security.read_access", "everyone"), ("security.hmac_keys", []),
    ("security.hmac_keys", ["a/b"]),
    ("security.allowed_ips", ["example.com"]), ("storage.data_dir", "relative"), ("storage.data_dir", ""),
    ("storage.data_dir", "/a\0b"),
    ("logging.level", "verbose"), ("logging.level", "INFO"), ("logging.format", "xml"), ("monitoring.health_path", "health"),
    ("monitoring.health_path", "/"),
    ("monitoring.health_path", "/a b"), ("monitoring.health_path", "/health\n"), ("monitoring.health_path", "/x?y"),
    ("secrets.source", "vault"),
    ("secrets.source", ["file", "auto"]), ("secrets.sources_priority", []), ("secrets.sources_priority", ["auto"]),
    ("secrets.secrets_file", "secrets"),
    ("secrets.secret_prefix", ""), ("secrets.secret_prefix", "A-B"), ("secrets.secret_prefix", "A\n"),
    ("secrets.required_secrets", [""]), ("secrets.command", ["a\0b"]),
]
BAD_SERVICE_VALUES = [
    ("description", "a\0b"), ("name", ""), ("name", "a b"), ("name", "../x"), ("name", "x" * 33), ("name", "web\n"),
    ("name", ["web"]), ("name", {"a": "b"}), ("working_dir", "srv"),
    ("on_busy", "wait"), ("recovery", "resume"), ("user", ""), ("umask", "888"), ("umask", "22"), ("umask", 18),
    ("inherit_env", ["A=B"]), ("env", {"A-B": "c"}),
    ("env", {"A": 1}), ("env", {"A": "a\0b"}), ("security.allowed_image_pattern", ""), ("security.allowed_image_pattern", "("),
    ("security.allowed_image_pattern", "(?u)a"), ("security.allowed_image_pattern", "a{9999999999}"),
    ("security.allowed_env_overrides", ["1A"]),
    ("deploy.commands", []), ("deploy.commands", [[]]), ("deploy.commands", [""]), ("deploy.commands", [[""]]),
    ("deploy.commands", [[" "]]), ("deploy.commands", [["a", 1]]),
    ("deploy.commands", [["a\0b"]]), ("deploy.commands", [{}]), ("deploy.commands", ["systemctl restart web"]),
    ("security.allowed_image_pattern", "app:[[:digit:]]+"), ("security.allowed_image_pattern", "[[:^alpha:]_]"),
    ("deploy.commands", [{"run": "true"}]),
    ("deploy.commands", [{"run": ["true"], "name": "a\nb"}]), ("healthcheck.http", "ftp://x/"),
    ("healthcheck.http", "127.0.0.1:80"), ("healthcheck.http", "http://"),
    ("healthcheck.http", {"url": "http://a/", "status": 600}), ("healthcheck.http", {"status": 200}),
    ("healthcheck.tcp", "localhost"), ("healthcheck.tcp", "localhost:http"),
    ("healthcheck.tcp", "localhost:70000"), ("healthcheck.tcp", ":80"), ("healthcheck.tcp", "a b:80"),
    ("healthcheck.unix", "web.sock"), ("templates", {"A-B": "x"}), ("templates", {"IMAGE": "x"}),
    ("templates", {"A": "{{A}}"}), ("templates", {"A": "{{"}),
]


@pytest.mark.parametrize("path, value", BAD_CONFIG_VALUES, ids=lambda value: toml(value))
def test_a_bad_value_in_config_is_told_at_its_key(path, value):
    assert only(config_problems({path: value}))[0].partition("[")[0] == path


@pytest.mark.parametrize("path, value", BAD_SERVICE_VALUES, ids=lambda value: toml(value))
def test_a_bad_value_in_a_service_is_told_at_its_key(path, value):
    problems = [problem for problem in service_problems({path: value}) if not problem.is_warning]
    assert f".{path}" in only(problems)[0]


@pytest.mark.parametrize("path, value, nearest",
                         [("server.deploy_response", "complete", "completed"), ("logging.level", "warnin", "warning"),
                          ("logging.format", "jsn", "json")])
def test_a_misspelt_choice_is_answered_with_the_nearest(path, value, nearest):
    assert only(config_problems({path: value}))[1].endswith(f"; did you mean {nearest}?")


def test_a_secrets_command_must_be_there_when_it_is_the_source():
    assert only(config_problems({"secrets.source": "command"})) == ("secrets.command", "is required by source = \"command\"")
    assert config_problems({"secrets.source": ["file", "command"], "secrets.command": ["age", "-d", "x"]}) == []


@pytest.mark.parametrize("pattern", [".*", ".+", "", "(?s).*", "(app)?", "[^ ]*"])
def test_a_pattern_that_matches_anything_is_warned_about_or_refused(pattern):
    assert "services.toml" == service_problems({"security.allowed_image_pattern": pattern})[0].file


def test_digits_in_a_pattern_are_ascii_digits():
    """In Python \\d matches Arabic digits too."""
    pattern = load_service({"security.allowed_image_pattern": r"v\d\w"}).security.allowed_image_pattern
    assert pattern.fullmatch("v1a") and not pattern.fullmatch("v٣a") and not pattern.fullmatch("v1é")


def test_enabling_a_rollback_without_commands_is_refused():
    assert only(service_problems({"rollback.enabled": True}))[0] == 'service "web".rollback.commands'


def test_two_services_of_one_name_are_refused():
    path, message = only(load_services(service_text({}) + service_text({}))[1])
    assert (path, message) == ('service "web".name', "is used by another service too")


def test_no_service_at_all_is_worth_a_warning():
    services, problems = load_services("")
    assert services.by_name == {} and [problem.is_warning for problem in problems] == [True]


# --- names of variables that no request may set

DENIED = """PATH HOME SHELL USER LOGNAME TMPDIR IFS ENV BASH_ENV SHELLOPTS BASHOPTS PS4 PROMPT_COMMAND CDPATH ZDOTDIR LD_PRELOAD
LD_LIBRARY_PATH LD_AUDIT DYLD_INSERT_LIBRARIES GCONV_PATH GLIBC_TUNABLES PYTHONPATH PYTHONSTARTUP PYTHONHOME PERL5LIB
PERL5OPT RUBYOPT RUBYLIB NODE_OPTIONS NODE_PATH JAVA_TOOL_OPTIONS _JAVA_OPTIONS CLASSPATH GIT_SSH_COMMAND
GIT_EXEC_PATH GIT_CONFIG_COUNT SSH_ASKPASS SSH_AUTH_SOCK DOCKER_HOST DOCKER_CONFIG CONTAINER_HOST CONTAINERS_CONF
KUBECONFIG EDITOR VISUAL PAGER BROWSER http_proxy HTTP_PROXY https_proxy no_proxy ALL_PROXY SSL_CERT_FILE
CURL_CA_BUNDLE CURL_HOME OPENSSL_CONF HOOKSHOT_IMAGE HOOKSHOT_HMAC_KEY NOTIFY_SOCKET LISTEN_FDS CREDENTIALS_DIRECTORY
WATCHDOG_USEC SUDO_ASKPASS XDG_CONFIG_HOME path Ld_Preload""".split()


@pytest.mark.parametrize("name", DENIED)
def test_a_variable_that_changes_how_commands_run_can_never_be_overridden(name):
    """Even if the operator lists it, in any case: Shellshock, httpoxy and GIT_SSH_COMMAND came in this way."""
    path, message = only(service_problems({"security.allowed_env_overrides": ["LOG_LEVEL", name]}))
    assert path == 'service "web".security.allowed_env_overrides[1]' and f"{name} can never come from a request" in message


def test_other_variables_can_be_allowed():
    names = ["LOG_LEVEL", "REPLICAS", "MY_PATH", "PATHS", "USERNAME", "DATABASE_URL", "_X", "lower", "MYLD_X", "HOOK"]
    assert list(load_service({"security.allowed_env_overrides": names}).security.allowed_env_overrides) == names


# --- templates in services

@pytest.mark.parametrize("path, value", [
    ("deploy.commands", [["{{IMGAE}}"]]), ("deploy.commands", [["x", "{{IMAGE|tga}}"]]),
    ("deploy.commands", [{"run": ["x"], "env": {"A": "{{IMGAE}}"}}]),
    ("rollback.commands", [["x", "{{IMGAE}}"]]), ("healthcheck.commands", [["x", "{{IMGAE}}"]]),
    ("hooks.pre_deploy", [["x", "{{IMGAE}}"]]),
    ("hooks.post_deploy", [["x", "{{IMGAE}}"]]), ("hooks.on_failure", [["x", "{{IMGAE}}"]]), ("env", {"A": "{{IMGAE}}"}),
    ("templates", {"A": "{{IMGAE}}"}),
    ("healthcheck.tcp", "{{IMGAE}}:80"), ("healthcheck.http", "http://a/{{IMGAE}}"),
    ("healthcheck.http", {"url": "http://a/", "contains": "{{IMGAE}}"}),
    ("hooks.pre_deploy", [["x", "{{STATUS}}"]]), ("deploy.commands", [["x", "{{ERROR_MESSAGE}}"]]),
    ("rollback.commands", [["x", "{{STATUS}}"]]), ("env", {"A": "{{STATUS}}"}),
    ("deploy.commands", [["x", "{{meta.}}"]])], ids=lambda value: toml(value))
def test_a_bad_placeholder_is_told_at_load_wherever_it_stands(path, value):
    found, message = only(service_problems({path: value}))
    assert found.startswith(f'service "web".{path}') and ("{{" in message or "unknown function" in message)


def test_an_unknown_variable_in_the_defaults_is_told_at_load():
    """Not at the first deploy, as a missing piece of metadata."""
    path, message = only(service_problems({}, defaults='[defaults]\nenv.A = "{{IMGAE}}"\n'))
    assert "env.A" in path and message == "unknown variable {{IMGAE}}; did you mean IMAGE?"


def test_the_same_mistake_in_the_defaults_is_told_once():
    problems = load_services('[defaults]\nenv.A = "{{IMGAE}}"\n' + service_text({}) + service_text({"name": "api"}))[1]
    assert len(problems) == 1


def test_custom_variables_are_known_to_their_service_alone():
    text = service_text({"templates": {"TAG": "{{IMAGE|tag}}"},
                         "deploy.commands": [["x", "{{TAG}}"]]}) + service_text({"name": "api",
                                 "deploy.commands": [["x", "{{TAG}}"]]})
    path, message = only(load_services(text)[1])
    assert path.startswith('service "api"') and "{{TAG}}" in message


# --- program text

SCRIPTS = [
    ["bash", "-c", "@"], ["sh", "-c", "@"], ["/bin/sh", "-c", "@"], ["bash", "-lc", "@"], ["bash", "-euxc", "@"],
    ["bash", "-ce", "@"], ["bash", "-x", "-c", "@"],
    ["bash", "-o", "pipefail", "-c", "@"], ["bash", "--norc", "-c", "@"], ["env", "bash", "-c", "@"],
    ["/usr/bin/env", "A=b", "bash", "-c", "@"],
    ["sudo", "-u", "x", "sh", "-c", "@"], ["timeout", "5", "dash", "-c", "@"], ["nice", "zsh", "-c", "@"],
    ["podman", "exec", "web", "sh", "-c", "@"],
    ["busybox", "sh", "-c", "@"], ["su", "deploy", "-c", "@"], ["su", "-", "deploy", "--command", "@"],
    ["su", "deploy", "--command=@"], ["ksh", "-c", "@"],
    ["ssh", "host", "bash", "-c", "@"], ["python3", "-c", "@"], ["python", "-c", "@"], ["python3.11", "-c", "@"],
    ["/usr/bin/python3.13", "-Ic", "@"],
    ["python2.7", "-c", "@"], ["python3", "-c@"], ["python3", "-u", "-c", "@"], ["perl", "-e", "@"], ["perl", "-ne", "@"],
    ["perl", "-E", "@"], ["perl", "-e@"],
    ["perl5.36", "-e", "@"], ["ruby", "-e", "@"], ["ruby3.1", "-e", "@"], ["node", "-e", "@"], ["node", "-p", "@"],
    ["node", "--eval", "@"], ["node", "--eval=@"],
    ["nodejs", "-e", "@"], ["php", "-r", "@"], ["php8.2", "-r", "@"], ["pypy3", "-c", "@"],
    # An interpreter goes on reading options after "-c": what follows them is the text.
    ["bash", "-c", "--", "@"], ["bash", "-c", "-e", "@"], ["sh", "-c", "+x", "@"], ["bash", "-c", "-o", "pipefail", "@"],
    # The first "-c" in a line need not be that of the interpreter.
    ["python3", "wrap.py", "-c", "wrap.conf", "sh", "-c", "@"],
    ["sudo", "-u", "node", "podman", "exec", "-e", "A=b", "web", "sh", "-c", "@"],
]


@pytest.mark.parametrize("argv", SCRIPTS, ids=" ".join)
def test_a_placeholder_in_program_text_is_refused_with_the_variable_to_write(argv):
    """A value inserted there would be executed. (OliveTin CVE-2025-50946; HookRun)"""
    argv = [word.replace("@", "deploy {{IMAGE}}") for word in argv]
    path, message = only(service_problems({"deploy.commands": [argv]}))
    index = next(index for index, word in enumerate(argv) if "{{" in word)
    assert path.endswith(f"[{index}]") and "would be executed" in message and '"$HOOKSHOT_IMAGE"' in message


@pytest.mark.parametrize("path", ["deploy.commands", "healthcheck.commands", "rollback.commands", "hooks.pre_deploy",
                                  "hooks.post_deploy", "hooks.on_failure"])
@pytest.mark.parametrize("command", [["sh", "-c", "x {{IMAGE}}"], {"run": ["sh", "-c", "x {{IMAGE}}"]}], ids=["list", "table"])
def test_program_text_is_found_in_every_phase_and_form(path, command):
    found, message = only(service_problems({path: [["true"], command]}))
    assert found.startswith(f'service "web".{path}[1]') and "would be executed" in message


@pytest.mark.parametrize("text, advice", [
    ("{{IMAGE}}", '"$HOOKSHOT_IMAGE"'), ("{{PREVIOUS_IMAGE}}", '"$HOOKSHOT_PREVIOUS_IMAGE"'),
    ("{{meta.git-sha}}", '"$HOOKSHOT_META_GIT_SHA"'),
    ("{{branch}}", '"$HOOKSHOT_META_BRANCH"'), ("{{UNIT}}", '"$HOOKSHOT_UNIT"'),
    ("{{IMAGE|tag}}", 'env = { VALUE = "{{IMAGE|tag}}" } and "$VALUE"')])
def test_the_advice_names_the_variable_that_carries_the_value(text, advice):
    assert advice in only(service_problems({"templates": {"UNIT": "web.service"},
                                            "deploy.commands": [["sh", "-c", f"x {text}"]]}))[1]


@pytest.mark.parametrize("argv", [
    ["sh", "-c", "echo \"$HOOKSHOT_IMAGE\""], ["sh", "-c", "echo \"$1\"", "_", "{{IMAGE}}"], ["bash", "deploy.sh", "{{IMAGE}}"],
    ["python3", "deploy.py", "{{IMAGE}}"],
    ["podman", "run", "-e", "TAG={{IMAGE|tag}}", "{{IMAGE}}"], ["podman", "run", "-c", "512", "{{IMAGE}}"],
    ["git", "-c", "x={{IMAGE}}", "fetch"],
    ["tar", "-c", "{{SERVICE}}"], ["sudo", "-u", "deploy", "podman", "pull", "{{IMAGE}}"], ["crash", "-c", "{{IMAGE}}"],
    ["./bash.py", "-c", "{{IMAGE}}"],
    # A user or a container may be called like an interpreter.
    ["podman", "run", "--name", "node", "-e", "TAG={{IMAGE|tag}}", "{{IMAGE}}"],
    ["sudo", "-u", "node", "podman", "run", "-e", "TAG={{IMAGE|tag}}", "{{IMAGE}}"]], ids=" ".join)
def test_values_as_arguments_are_what_placeholders_are_for(argv):
    assert service_problems({"deploy.commands": [argv]}) == []


# --- unknown keys

LATER_CONFIG_KEYS = ["server.workers", "freeze"]
LATER_SERVICE_KEYS = ["gitlab", "gitea", "bitbucket", "registry", "oidc", "guard", "current", "poll",
                      "healthcheck.bake"]


@pytest.mark.parametrize("path", LATER_CONFIG_KEYS)
def test_a_key_of_a_later_feature_is_unknown_to_config(path):
    found, message = only(config_problems({path: 1}))
    assert path.startswith(found) and message.startswith("unknown key")


@pytest.mark.parametrize("path", LATER_SERVICE_KEYS)
def test_a_key_of_a_later_feature_is_unknown_to_a_service(path):
    found, message = only(service_problems({path: {"a": 1}}))
    assert (found, message.startswith("unknown key")) == (f'service "web".{path}', True)


@pytest.mark.parametrize("path", CONFIG_KEYS)
def test_a_misspelt_key_of_config_is_answered_with_the_nearest(path):
    assert only(config_problems({f"{path}_x": 1})) == (f"{path}_x", f"unknown key; did you mean {path.rpartition('.')[2]}?")


@pytest.mark.parametrize("path", SERVICE_KEYS)
def test_a_misspelt_key_of_a_service_is_answered_with_the_nearest(path):
    assert only(service_problems({f"{path}_x": 1})) == (
        f'service "web".{path}_x', f"unknown key; did you mean {path.rpartition('.')[2]}?")


@pytest.mark.parametrize("text, path, nearest", [
    ("[default]\n", "default", "defaults"), ("[[services]]\n", "services", "service"),
    ("[defaults]\nworkdir = '/'\n", "defaults.workdir", "working_dir")])
def test_a_misspelt_table_of_services_is_answered_with_the_nearest(text, path, nearest):
    problem = load_services(text + service_text({}))[1][0]
    assert (problem.path, problem.message) == (path, f"unknown key; did you mean {nearest}?")


@pytest.mark.parametrize("command, path", [({"run": ["x"], "timout": 1}, "deploy.commands[0].timout"),
                                           ({"cmd": ["x"], "run": ["x"]}, "deploy.commands[0].cmd")])
def test_an_unknown_key_of_a_command_is_told(command, path):
    assert only(service_problems({"deploy.commands": [command]}))[0] == f'service "web".{path}'


def test_an_unknown_key_without_a_like_one_is_told_too():
    assert only(config_problems({"zzz": 1})) == ("zzz", "unknown key")


# --- all problems at once

def test_all_problems_are_told_at_once_with_file_and_path():
    problems = []
    config = hookshot.load_config(lines({"server.listen": "x", "server.port": 80, "limits.command_timeout": 0, "logging": 5,
                                         "extra": 1}), "/etc/c.toml", problems)
    hookshot.load_services(service_text({"deploy.commands": [["x", "{{IMGAE}}"], ["sh", "-c", "{{IMAGE}}"]], "nice": 99,
                                         "oops": 1})
                           + service_text({"name": "api", "umask": 1}, without=("security.allowed_image_pattern",)),
                           "/etc/s.toml", config, problems)
    assert {(problem.file, problem.path) for problem in problems} == {
        ("/etc/c.toml", "server.listen"), ("/etc/c.toml", "server.port"), ("/etc/c.toml", "limits.command_timeout"),
        ("/etc/c.toml", "logging"), ("/etc/c.toml", "extra"),
        ("/etc/s.toml", 'service "web".deploy.commands[0][1]'), ("/etc/s.toml", 'service "web".deploy.commands[1][2]'),
        ("/etc/s.toml", 'service "web".nice'),
        ("/etc/s.toml", 'service "web".oops'), ("/etc/s.toml", 'service "api".umask'),
        ("/etc/s.toml", 'service "api".security.allowed_image_pattern')}
    assert len(problems) == 11


def test_unknown_keys_are_told_in_the_order_of_the_file():
    """The same file gives the same report, whatever this process's hash seed."""
    names = [f"zz{index}" for index in range(20)]
    assert [problem.path for problem in config_problems(dict.fromkeys(names, 1))] == names


@pytest.mark.parametrize("text", ["a", "[server", "a = 1\na = 2", "a = \x01", "a = '", "a = 2020-13-45", "a = " + "9" * 5000,
                                  "[server]\n[server]"], ids=lambda text: repr(text[:20]))
def test_a_file_that_is_no_toml_is_one_problem(text):
    assert only(config_problems(text))[1].startswith("is not valid TOML")
    assert load_services(text)[1][0].message.startswith("is not valid TOML")


@pytest.mark.parametrize("text, table, line", [("[logging]\n\n[logging]\nlevel = 'info'\n", "logging", 3), ("[a.b]\n[a.b]", "a.b", 2)])
def test_a_table_that_stands_twice_is_named_with_its_line(text, table, line):
    """A block of the documentation, pasted below the sample that has this table."""
    message = only(config_problems(text))[1]
    assert message.startswith(f"is not valid TOML: [{table}] stands twice (at line {line}, ") and message.endswith("; keep one of the two, with the keys of both")


def test_a_key_with_a_problem_leaves_the_others_loaded():
    """So that the checks between keys can go on."""
    config, problems = load_config({"server.worker_threads": 0, "server.request_timeout": 5})
    assert (len(problems), config.server.request_timeout, config.limits.max_concurrent_total) == (1, 5, 10)


# --- the sample

def test_the_sample_shows_every_key_at_its_default():
    """With all comment signs removed it says the same as an empty file."""
    sample = hookshot.render_sample(hookshot.Config, "", {})
    assert load_config(sample) == (load_config("")[0], [])
    config, problems = load_config(re.sub(r"^# (?=\w+ = )", "", sample, flags=re.MULTILINE))
    assert (config, problems) == (load_config("")[0], [])
    assert set(re.findall(r"^# (\w+) = ", sample, re.MULTILINE)) == {path.rpartition(".")[2] for path in CONFIG_KEYS}


def test_a_value_put_into_the_sample_is_in_force():
    config, problems = load_config(hookshot.render_sample(hookshot.Config, "",
            {"server.listen": "[::1]:1", "storage.retention.log_days": 7}))
    assert (config.server.listen, config.storage.retention.log_days, problems) == ((("::1", 1, "", "", -1),), 7, [])


# --- moving over from the original

def load_original(services):
    problems = []
    config = hookshot.load_config((ORIGINAL / "config.toml").read_text(), "config.toml", problems)
    return hookshot.load_services(services, "services.toml", config, problems), problems


def test_files_of_the_original_load_but_for_a_placeholder_in_shell_text_and_the_table_of_github():
    _, problems = load_original((ORIGINAL / "services.toml").read_text())
    (table, why), (path, message) = [(problem.path, problem.message) for problem in problems]
    assert table == 'service "web-app".github' and "never used" in why and "let the workflow send the deploy" in why
    assert path.startswith('service "worker".deploy.commands[1]') and path.endswith("[2]")
    assert 'write "$HOOKSHOT_IMAGE" instead' in message


def test_files_of_the_original_load_once_they_are_written_as_advised():
    text = (ORIGINAL / "services.toml").read_text().replace("--name worker {{IMAGE}}\"",
            "--name worker \\\"$HOOKSHOT_IMAGE\\\"\"").replace('[service.github]\nrepo = "example/web-app"\n', "")
    services, problems = load_original(text)
    assert problems == []
    web, worker, site = services.by_name.values()
    assert (web.name, web.deploy.timeout, web.deploy.retries, web.healthcheck.timeout, web.rollback.enabled) == (
        "web-app", 600, 1, 5, True)
    assert (worker.deploy.timeout, worker.healthcheck.initial_delay, worker.rollback.enabled, site.enabled,
            site.working_dir) == (300, 1, False, False, "/srv")
    assert worker.deploy.commands[1].run[2].text.endswith('--name worker "$HOOKSHOT_IMAGE"')
    assert web.security.allowed_image_pattern.fullmatch("ghcr.io/example/web-app:v1.2.3")


@pytest.mark.parametrize("written, loaded", [("warn", "warning"), ("trace", "debug")])
def test_a_level_of_the_original_is_the_one_that_it_means(written, loaded):
    config, problems = load_config({"logging.level": written})
    assert (config.logging.level, problems) == (loaded, [])
    assert hookshot.parse_arguments(["--log-level", written, "run"]).log_level == loaded


def test_the_long_options_of_the_original_are_understood():
    levels = [hookshot.parse_arguments([option, "validate"]).log_level for option in ("--verbose", "--quiet")]
    assert levels == ["debug", "warning"]


@pytest.mark.parametrize("prefix, names", [("webhook_", ["webhook_on_failure"]), ("notifications.webhook.", ["notifications.webhook.on_failure"]),
                                           ("webhook_", ["notifications.webhook.on_failure", "webhook_on_failure"])])
def test_urls_of_notices_are_found_under_the_secrets_of_the_original_too(prefix, names):
    webhook = load_config({"notifications.webhook.use_secrets": True, "notifications.webhook.on_failure": "http://127.0.0.1/file"})[0].notifications.webhook
    [channel] = hookshot.webhook_channels(webhook, dict.fromkeys(names, b"http://127.0.0.1/secret"))
    assert channel.url == f"secret:{prefix}on_failure"


# --- what a placeholder, a name, a network may be

@pytest.mark.parametrize("word", ["{{.State.Status}}", "--format={{.Id}} {{IMAGE}}", "{{."])
def test_a_placeholder_of_podmans_own_is_left_alone(word):
    assert service_problems({"deploy.commands": [["podman", "inspect", word]]}) == []


@pytest.mark.parametrize("program", ["{{meta.program}}", "{{program}}", "/opt/{{program}}"])
def test_the_program_itself_may_not_come_from_metadata(program):
    assert "may not come from a request's metadata" in only(service_problems({"deploy.commands": [[program]]}))[1]


@pytest.mark.parametrize("name", ["NOTIFY_SOCKET", "CREDENTIALS_DIRECTORY", "HOOKSHOT_HMAC_KEY", "LISTEN_FDS"])
def test_what_no_command_may_see_cannot_be_inherited(name):
    assert "never let through" in only(service_problems({"inherit_env": [name]}))[1]


def test_a_hookshot_variable_cannot_be_set_by_the_operator():
    assert only(service_problems({"env.HOOKSHOT_IMAGE": "x"}))[0].endswith("env.HOOKSHOT_IMAGE")


def test_a_network_of_mapped_addresses_is_the_ipv4_network_that_it_means():
    assert str(hookshot.parse_network("::ffff:10.0.0.0/104")) == "10.0.0.0/8"
