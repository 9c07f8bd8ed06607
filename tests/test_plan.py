# SPDX-License-Identifier: MPL-2.0
"""PLAN: what a deployment will do, and what became of it, both as values."""

import itertools
import json

import pytest

import hookshot
from hookshot import HealthPolicy, HealthProgress, Outcome, Phase, Result, State

AT_MS = 1767225599999   # 2025-12-31T23:59:59.999Z
SERVICE = """
[[service]]
name = "web"
working_dir = "/srv/web"
{head}
[service.security]
allowed_image_pattern = 'app:[a-z0-9.-]+'
allowed_env_overrides = ["LOG_LEVEL", "REPLICAS"]
[service.deploy]
commands = {commands}
{tables}
"""


def load_service(commands='[["deploy", "{{IMAGE}}"]]', head="", tables="", defaults=""):
    problems = []
    config = hookshot.load_config("", "config.toml", problems)
    text = SERVICE.replace("{commands}", commands).replace("{head}", head).replace("{tables}", tables)
    services = hookshot.load_services(defaults + text, "services.toml", config, problems)
    assert problems == []
    return services.by_name["web"]


def request_of(image="app:2", **fields):
    return hookshot.parse_deploy(hookshot.VerifiedBody("main", json.dumps({"service": "web", "image": image, **fields}).encode()),
                                 None)


def deployment_of(service, *, last_good="app:1", started_ms=AT_MS, **fields):
    """Return the deployment of a request that the service allows, as the claim leaves it."""
    request = request_of(**fields)
    hookshot.check_request(service, request)
    deployment = hookshot.new_deployment(request, hookshot.Trigger("127.0.0.1", "main", None, "r"), "d-1", AT_MS - 5000)
    return deployment._replace(started_ms=started_ms,
                               previous_image=hookshot.choose_previous_image(request.image, request.previous_image, last_good))


def plan_of(service, *, environ=None, account=None, limits=None, **fields):
    return hookshot.build_plan(service, deployment_of(service, **fields), limits or hookshot.load_config("", "c", []).limits,
                               environ or {}, account)


def launch(service, phase=Phase.DEPLOY, step=1, attempt=1, status="", error="", **options):
    plan = plan_of(service, **options)
    return hookshot.launch_of(plan, plan.commands[phase][step - 1], attempt, status=status, error=error)


# --- what a service allows

def refusal(service, **fields):
    with pytest.raises(hookshot.HookshotError) as caught:
        hookshot.check_request(service, request_of(**fields))
    return caught.value.kind.http, caught.value.sentence


@pytest.mark.parametrize("field", ["image", "previous_image"])
@pytest.mark.parametrize("image", ["evil:1", "xapp:1", "app:1x y", "app:1 --privileged", "app:", "app", "APP:1", "app:1@sha256:0",
                                   "app:١"])
def test_the_pattern_must_match_the_whole_image(field, image):
    """Both images: a rollback runs the previous one."""
    status, sentence = refusal(load_service(), **{field: image})
    assert status == 400 and sentence == f"{field}: {image} is not allowed for service web"


def test_a_pattern_with_anchors_does_not_let_a_final_newline_pass():
    """"$" matches before one. parse_deploy refuses it too; this is the second lock."""
    service = load_service()
    service = service._replace(security=service.security._replace(allowed_image_pattern=hookshot.re.compile("^app:1$")))
    for field in ("image", "previous_image"):
        request = request_of("app:1")._replace(**{field: "app:1\n"})
        with pytest.raises(hookshot.HookshotError, match=f"^{field}: "):
            hookshot.check_request(service, request)


def test_an_alternative_of_the_pattern_is_not_a_prefix():
    """'a|b' means the whole of a or the whole of b."""
    service = load_service()
    service = service._replace(security=service.security._replace(allowed_image_pattern=hookshot.re.compile("app:1|app:2")))
    hookshot.check_request(service, request_of("app:2"))
    assert refusal(service, image="app:22")[0] == refusal(service, image="app:12")[0] == 400


def test_a_refusal_does_not_show_the_pattern():
    assert "[a-z" not in refusal(load_service(), image="evil:1")[1]


def test_an_override_must_be_on_the_list():
    service = load_service()
    hookshot.check_request(service, request_of(overrides={"env": {"LOG_LEVEL": "debug", "REPLICAS": 2}}))
    assert refusal(service, overrides={"env": {"LOG_LEVEL": "x", "OTHER": "y"}}) == (
        400, "overrides.env.OTHER: may not be set for service web")
    assert refusal(service, overrides={"env": {"log_level": "x"}})[0] == 400
    assert refusal(service, overrides={"env": {"PATH": "/tmp"}})[0] == 400


def test_metadata_is_never_refused_for_its_names():
    hookshot.check_request(load_service(), request_of(metadata={"IMAGE": "evil", "PATH": "x"}))


def test_a_disabled_service_is_refused():
    assert refusal(load_service(head="enabled = false"))[0] == 403


# --- the image to roll back to

@pytest.mark.parametrize("image, requested, last_good, previous", [
    ("b", "a", "z", "a"), ("b", None, "z", "z"), ("b", None, None, None), ("b", None, "b", None), ("b", "a", None, "a"),
    ("b", "b", None, None)])
def test_the_previous_image_is_the_requests_or_the_last_good_one_if_it_differs(image, requested, last_good, previous):
    assert hookshot.choose_previous_image(image, requested, last_good) == previous


@pytest.mark.parametrize("tables, last_good, reason", [
    ('[service.rollback]\ncommands = [["x"]]', "app:1", None),
    ('[service.rollback]\ncommands = [["x"]]', None, "no previous image is known"),
    ('[service.rollback]\ncommands = [["x"]]', "app:2", "no previous image is known"),
    ("", "app:1", "there are no rollback commands"),
    ('[service.rollback]\nenabled = false\ncommands = [["x"]]', "app:1", "rollback is disabled")])
def test_a_rollback_needs_leave_commands_and_an_image(tables, last_good, reason):
    """Otherwise the failure is a Failed, not a RollbackFailed."""
    plan = plan_of(load_service(tables=tables), last_good=last_good)
    assert (plan.rollback_refusal, plan.can_roll_back) == (reason, reason is None)


# --- expansion

def test_values_reach_commands_as_single_arguments():
    service = load_service('[["deploy", "--image={{IMAGE}}", "{{meta.note}}", "{{SERVICE}}", "{{DEPLOY_ID}}", "{{WORKING_DIR}}"]]')
    assert launch(service, metadata={"note": "a b; $(id) {{IMAGE}}"}).argv == (
        "deploy", "--image=app:2", "a b; $(id) {{IMAGE}}", "web", "d-1", "/srv/web")


def test_times_are_those_of_the_start_in_utc():
    service = load_service('[["x", "{{TIMESTAMP}}", "{{DATE}}", "{{DATETIME}}"]]')
    assert launch(service).argv[1:] == ("1767225599", "2025-12-31", "2025-12-31T23:59:59.999Z")
    assert launch(service, started_ms=None).argv[1] == "1767225594"


def test_attempt_phase_status_and_error_are_those_of_the_moment():
    service = load_service('[["x", "{{ATTEMPT}}", "{{PHASE}}"]]',
                           tables='[service.hooks]\non_failure = [["x", "{{PHASE}}", "{{STATUS}}", "{{ERROR_MESSAGE}}"]]')
    assert launch(service, attempt=3).argv[1:] == ("3", "deploy")
    late = launch(service, Phase.ON_FAILURE, status="Failed", error="pull exited with status 1")
    assert late.argv[1:] == ("on_failure", "Failed", "pull exited with status 1")
    assert (late.env["HOOKSHOT_STATUS"], late.env["HOOKSHOT_ERROR_MESSAGE"], late.env["HOOKSHOT_ATTEMPT"]) == (
        "Failed", "pull exited with status 1", "1")


def test_metadata_named_image_changes_no_image():
    """In the original it replaced the image and so went round the pattern."""
    service = load_service('[["x", "{{IMAGE}}", "{{PREVIOUS_IMAGE}}"]]', tables='[service.templates]\nTAG = "{{IMAGE|tag}}"')
    started = launch(service, metadata={"IMAGE": "evil", "PREVIOUS_IMAGE": "evil", "TAG": "evil", "image": "evil",
                                        "SERVICE": "evil"})
    assert started.argv[1:] == ("app:2", "app:1")
    assert [started.env[f"HOOKSHOT_{name}"] for name in ("IMAGE", "PREVIOUS_IMAGE", "TAG", "SERVICE")] == [
        "app:2", "app:1", "2", "web"]
    assert started.env["HOOKSHOT_META_IMAGE"] == "evil"


@pytest.mark.parametrize("head, commands, tables", [
    ("", '[["x", "{{branch}}"]]', ""), ("", '[{run = ["x"], env = {A = "{{meta.branch}}"}}]', ""),
    ('env = {A = "{{branch}}"}', '[["x"]]', ""),
    ("", '[["x"]]', '[service.hooks]\non_failure = [["x", "{{branch}}"]]'),
    ("", '[["x"]]', '[service.rollback]\ncommands = [["x", "{{branch}}"]]'),
    ("", '[["x"]]', '[service.healthcheck]\nhttp = "http://a/{{branch}}"'),
    ("", '[["x"]]', '[service.healthcheck]\ntcp = "{{branch}}:80"'),
    ("", '[["x", "{{A}}"]]', '[service.templates]\nA = "{{branch}}"')])
def test_missing_metadata_is_refused_before_anything_runs(head, commands, tables):
    """Wherever it is needed, the last hook included."""
    service = load_service(commands, head, tables)
    with pytest.raises(hookshot.HookshotError, match="metadata.branch is needed by this service and missing") as caught:
        plan_of(service)
    assert caught.value.kind.http == 400
    plan_of(service, metadata={"branch": "main"})


def test_a_custom_variable_that_is_not_used_needs_no_metadata():
    assert "HOOKSHOT_A" not in launch(load_service(tables='[service.templates]\nA = "{{branch}}"')).env


@pytest.mark.parametrize("tables, checks", [
    ('http = "http://127.0.0.1/{{IMAGE|tag}}"\ntimeout = 4', [hookshot.HttpCheck("http://127.0.0.1/2", 200, None, 4.0)]),
    ('http = {url = "http://127.0.0.1/", status = 204, contains = "{{IMAGE}}"}',
     [hookshot.HttpCheck("http://127.0.0.1/", 204, "app:2", 10.0)]),
    ('tcp = "[::1]:80"', [hookshot.SocketCheck("::1", 80, 10.0)]),
    ('tcp = "{{meta.host}}:443"', [hookshot.SocketCheck("example", 443, 10.0)]),
    ('unix = "/run/web.sock"', [hookshot.SocketCheck("/run/web.sock", None, 10.0)]), ("", [])])
def test_probes_without_programs_are_expanded_into_the_plan(tables, checks):
    plan = plan_of(load_service(tables="[service.healthcheck]\n" + tables), metadata={"host": "example"})
    assert (list(plan.checks), plan.has_health) == (checks, bool(checks))


@pytest.mark.parametrize("port", ["http", "70000", "", "٣", "80 "])
def test_a_port_that_a_request_gives_must_be_one(port):
    service = load_service(tables='[service.healthcheck]\ntcp = "localhost:{{meta.port}}"')
    with pytest.raises(hookshot.HookshotError) as caught:
        plan_of(service, metadata={"port": port})
    assert caught.value.kind.http == 400


# --- the commands of a plan

PHASES = """
[service.healthcheck]
initial_delay = 1
interval = 2
max_attempts = 7
success_threshold = 4
timeout = 11
commands = [["health"]]
[service.rollback]
timeout = 12
max_attempts = 3
commands = [["rollback"]]
[service.hooks]
pre_deploy = [["pre"]]
post_deploy = [["post"]]
on_failure = [["failure"]]
"""


def test_every_phase_has_its_commands_timeouts_and_gravity():
    plan = plan_of(load_service('[["one"], ["two"]]', "", "timeout = 10\nretries = 2\n" + PHASES))
    assert {phase: [(command.name, command.step, command.timeout_s, command.retries, command.critical) for command in commands]
            for phase, commands in plan.commands.items()} == {
        Phase.PRE_DEPLOY: [("pre", 1, 10, 0, True)], Phase.DEPLOY: [("one", 1, 10, 2, True), ("two", 2, 10, 2, True)],
        Phase.HEALTHCHECK: [("health", 1, 11, 0, True)],
        Phase.POST_DEPLOY: [("post", 1, 10, 0, False)], Phase.ROLLBACK: [("rollback", 1, 12, 0, True)],
        Phase.ON_FAILURE: [("failure", 1, 10, 0, False)]}
    assert (plan.health, plan.rollback_attempts) == (HealthPolicy(1, 2, 7, 4), 3)


def test_a_command_overrides_its_phase():
    own_keys = 'timeout = 1, retries = 0, retry_delay = 9, critical = true, working_dir = "/tmp"'
    command, = plan_of(load_service(f'[{{run = ["/usr/bin/x"], name = "pull", {own_keys}}}]',
                                    "", "timeout = 10\nretries = 2\ncritical = false")).commands[Phase.DEPLOY]
    assert (command.name, command.timeout_s, command.retries, command.retry_delay_s, command.critical, command.cwd) == (
        "pull", 1, 0, 9, True, "/tmp")


def test_a_command_without_a_name_is_called_after_its_program():
    """Not after its arguments, which callers must not see."""
    plan = plan_of(load_service('[["/usr/bin/podman", "pull", "secret-place/{{IMAGE}}"]]'))
    assert plan.commands[Phase.DEPLOY][0].name == "podman"


def test_a_launch_never_has_more_time_than_the_deployment_has_left():
    plan = plan_of(load_service(tables="timeout = 10"))
    command, = plan.commands[Phase.DEPLOY]
    assert [hookshot.launch_of(plan, command, 1, timeout_s=left).timeout_s for left in (None, 4.5, 20.0)] == [10, 4.5, 10]


def test_what_commands_run_as_is_the_services():
    account = hookshot.Account("deploy", 1000, 1001, (1001, 4), "/home/deploy", "/bin/sh")
    started = launch(load_service(head='umask = "077"\nnice = 5'), account=account)
    assert (started.account, started.umask, started.nice, started.cwd) == (account, 0o077, 5, "/srv/web")


# --- the environment of commands

SERVER_ENV = {
    "PATH": "/bin", "HOME": "/root", "LANG": "C.UTF-8", "LC_ALL": "C", "TZ": "UTC", "TERM": "xterm", "EDITOR": "vi",
    "AWS_SECRET_ACCESS_KEY": "canary",
    "HOOKSHOT_HMAC_KEY": "canary", "HOOKSHOT_CONFIG": "canary", "DEPLOY_RECEIVER_HMAC_KEY": "canary", "NOTIFY_SOCKET": "canary",
    "CREDENTIALS_DIRECTORY": "canary",
    "LISTEN_FDS": "canary", "LISTEN_PID": "canary", "LISTEN_FDNAMES": "canary", "WATCHDOG_USEC": "canary",
    "WATCHDOG_PID": "canary", "INVOCATION_ID": "canary",
    "JOURNAL_STREAM": "canary", "LD_PRELOAD": "canary", "PYTHONPATH": "canary", "BASH_ENV": "canary",
    "XDG_RUNTIME_DIR": "/run/user/0",
}
NEVER = [name for name in SERVER_ENV if name.startswith(("HOOKSHOT_", "DEPLOY_RECEIVER_", "LISTEN_", "WATCHDOG_", "NOTIFY",
        "CRED", "INVOC", "JOURNAL"))]


def own(env):
    """Return an environment without what every command gets from the deployment itself."""
    return {name: value for name, value in env.items() if not name.startswith("HOOKSHOT_")}


def test_a_command_starts_with_a_clean_environment():
    started = launch(load_service(), environ=SERVER_ENV)
    assert own(started.env) == {"PATH": "/bin", "HOME": "/root", "LANG": "C.UTF-8", "LC_ALL": "C", "TZ": "UTC"}
    assert "canary" not in started.env.values()


def test_every_command_gets_the_deployments_values_whatever_phase():
    service = load_service(tables=PHASES + '[service.templates]\nUNIT = "{{SERVICE}}.service"')
    for phase in Phase:
        env = launch(service, phase, metadata={"git-sha": "abc", "build.id": 7}).env
        given = {name: value for name, value in env.items() if name.startswith("HOOKSHOT_")}
        assert given == {
            "HOOKSHOT_IMAGE": "app:2", "HOOKSHOT_PREVIOUS_IMAGE": "app:1", "HOOKSHOT_SERVICE": "web", "HOOKSHOT_DEPLOY_ID": "d-1",
            "HOOKSHOT_WORKING_DIR": "/srv/web",
            "HOOKSHOT_TIMESTAMP": "1767225599", "HOOKSHOT_DATE": "2025-12-31", "HOOKSHOT_DATETIME": "2025-12-31T23:59:59.999Z",
            "HOOKSHOT_ATTEMPT": "1",
            "HOOKSHOT_PHASE": phase.value, "HOOKSHOT_STATUS": "", "HOOKSHOT_ERROR_MESSAGE": "", "HOOKSHOT_UNIT": "web.service",
            "HOOKSHOT_META_GIT_SHA": "abc", "HOOKSHOT_META_BUILD_ID": "7"}


def test_a_custom_variable_does_not_hide_metadata_of_the_same_name():
    """The advice about program text is $HOOKSHOT_META_REGION for {{meta.region}}: it must hold that value."""
    env = launch(load_service(tables='[service.templates]\nregion = "eu"'), metadata={"region": "mars"}).env
    assert (env["HOOKSHOT_REGION"], env["HOOKSHOT_META_REGION"]) == ("eu", "mars")


def test_inherit_env_lets_named_variables_through():
    started = launch(load_service(head='inherit_env = ["XDG_RUNTIME_DIR", "ABSENT"]',
                                  defaults='[defaults]\ninherit_env = ["TERM"]\n'), environ=SERVER_ENV)
    assert own(started.env) == {"PATH": "/bin", "HOME": "/root", "LANG": "C.UTF-8", "LC_ALL": "C", "TZ": "UTC",
                                "XDG_RUNTIME_DIR": "/run/user/0", "TERM": "xterm"}


def test_inherit_env_never_lets_secrets_or_the_service_managers_sockets_through():
    service = load_service()._replace(inherit_env=tuple(NEVER))
    started = launch(service, environ=SERVER_ENV)
    assert "canary" not in started.env.values() and own(started.env).keys() & set(NEVER) == set()


def test_the_nearest_setting_of_a_variable_wins():
    """Server, defaults, service, command, request: each over those before it."""
    commands = '[{run = ["x"], env = {D = "command", LOG_LEVEL = "command"}}]'
    head = 'inherit_env = ["A", "B", "C", "D", "LOG_LEVEL"]\nenv = {C = "service", D = "service", LOG_LEVEL = "service"}'
    defaults = '[defaults]\nenv = {B = "defaults", C = "defaults", D = "defaults", LOG_LEVEL = "defaults"}\n'
    started = launch(load_service(commands, head, defaults=defaults),
                     environ=dict.fromkeys(["A", "B", "C", "D", "LOG_LEVEL"], "server"),
                     overrides={"env": {"LOG_LEVEL": "request"}})
    assert [started.env[name] for name in ("A", "B", "C", "D", "LOG_LEVEL")] == [
        "server", "defaults", "service", "command", "request"]


def test_an_environment_of_one_command_stays_with_it():
    plan = plan_of(load_service('[{run = ["x"], env = {A = "{{IMAGE}}"}}, ["y"]]'))
    first, second = (hookshot.launch_of(plan, command, 1).env for command in plan.commands[Phase.DEPLOY])
    assert first["A"] == "app:2" and "A" not in second


def test_overrides_reach_hooks_and_rollback_too():
    service = load_service(tables=PHASES)
    assert {launch(service, phase, overrides={"env": {"LOG_LEVEL": "debug"}}).env["LOG_LEVEL"] for phase in Phase} == {"debug"}


def test_a_value_in_the_environment_is_expanded_once():
    started = launch(load_service(head='env = {A = "<{{meta.k}}>"}'), metadata={"k": "{{IMAGE}}"},
                     overrides={"env": {"LOG_LEVEL": "{{IMAGE}}"}})
    assert (started.env["A"], started.env["LOG_LEVEL"]) == ("<{{IMAGE}}>", "{{IMAGE}}")


def test_nothing_sets_a_hookshot_variable_but_hookshot():
    """A command can believe $HOOKSHOT_IMAGE."""
    started = launch(load_service(tables='[service.templates]\nMETA_X = "ours"'),
                     environ={"HOOKSHOT_IMAGE": "forged"}, metadata={"IMAGE": "forged", "x": "forged"})
    assert (started.env["HOOKSHOT_IMAGE"], started.env["HOOKSHOT_META_X"]) == ("app:2", "ours")


def test_programs_are_found_even_if_the_server_has_no_path():
    assert launch(load_service(), environ={}).env["PATH"] == hookshot.DEFAULT_PATH


def test_a_command_under_another_account_gets_that_accounts_home():
    env = launch(load_service(), environ=SERVER_ENV,
                 account=hookshot.Account("deploy", 1000, 1000, (), "/home/deploy", "/bin/sh")).env
    assert {name: env[name] for name in ("HOME", "USER", "LOGNAME", "SHELL")} == {"HOME": "/home/deploy", "USER": "deploy",
            "LOGNAME": "deploy", "SHELL": "/bin/sh"}


# --- verdicts

def result(status="succeeded", *, step=1, attempt=1, critical=True, **fields):
    return Result(phase=Phase.DEPLOY, step=step, name="pull", command="pull it from a secret place", attempt=attempt,
                  status=status,
                  exit_code=fields.pop("exit_code", 0 if status == "succeeded" else None), signal=fields.pop("signal", None),
                  started_ms=0, duration_ms=4200, critical=critical, **fields)


@pytest.mark.parametrize("results, failed_step", [
    ([], None), ([result()], None), ([result("failed")], 1), ([result("timed_out")], 1), ([result("stopped")], 1),
    ([result("not_started")], 1),
    ([result(), result("failed", step=2)], 2), ([result("failed", attempt=1), result(attempt=2)], None),
    ([result(attempt=1), result("failed", attempt=2)], 1),
    ([result("failed", critical=False)], None), ([result("failed", critical=False), result("failed", step=2)], 2),
    ([result("failed", critical=False), result(step=2)], None),
    ([result("failed"), result("failed", step=2)], 1)])
def test_a_phase_fails_with_the_last_try_of_a_critical_command(results, failed_step):
    verdict = hookshot.judge(results)
    assert (verdict and verdict.step) == failed_step


@pytest.mark.parametrize("failed, words", [
    (result("failed", exit_code=3), "pull exited with status 3"),
    (result("failed", exit_code=127), "pull exited with status 127"),
    (result("failed", signal=9), "pull was killed by SIGKILL"), (result("failed", signal=99), "pull was killed by signal 99"),
    (result("timed_out", signal=15), "pull timed out after 4.2 s"),
    (result("not_started", note="was not found"), "pull was not found"), (result("stopped"), "pull stopped")])
def test_a_failure_is_explained_without_the_command_line(failed, words):
    assert failed.explain() == words
    assert not failed.is_ok


@pytest.mark.parametrize("attempt, delay", [(1, 2), (2, 4), (3, 8), (4, 16), (5, 32), (6, 60), (10, 60)])
def test_retries_wait_twice_as_long_each_time_up_to_a_minute(attempt, delay):
    command, = plan_of(load_service()).commands[Phase.DEPLOY]
    assert hookshot.retry_delay(command, attempt) == delay


@pytest.mark.parametrize("delay", [0, 7, 3600])
def test_retries_wait_as_long_as_the_operator_says(delay):
    command, = plan_of(load_service(f'[{{run = ["x"], retry_delay = {delay}}}]')).commands[Phase.DEPLOY]
    assert {hookshot.retry_delay(command, attempt) for attempt in (1, 2, 10)} == {delay}


# --- the series of probes

def watch(policy, probes):
    """Return the verdict of a series and how many probes it took."""
    progress = HealthProgress()
    for count, is_good in enumerate(probes, 1):
        progress, verdict = hookshot.watch_health(policy, progress, is_good)
        if verdict is not None:
            return verdict, count
    return None, len(probes)


@pytest.mark.parametrize("attempts, threshold, probes, verdict", [
    (20, 3, "+++", (True, 3)), (20, 3, "++-+++", (True, 6)), (5, 3, "++-", (False, 3)), (5, 3, "--", (None, 2)),
    (5, 3, "---", (False, 3)), (5, 3, "--+++", (True, 5)),
    (1, 1, "-", (False, 1)), (1, 1, "+", (True, 1)), (3, 3, "+-", (False, 2)), (4, 2, "+-+-", (False, 4)),
    (4, 2, "+-+", (None, 3)), (100, 1, "-" * 99 + "+", (True, 100))])
def test_probes_count_in_a_row_and_end_when_nothing_can_change(attempts, threshold, probes, verdict):
    assert watch(HealthPolicy(0, 0, attempts, threshold), [probe == "+" for probe in probes]) == verdict


@pytest.mark.parametrize("attempts, threshold",
                         [(attempts, threshold) for attempts in range(1, 8) for threshold in range(1, attempts + 1)])
def test_a_series_ends_as_early_as_it_may_and_never_earlier(attempts, threshold):
    """Against every possible series: healthy at the first full streak, unhealthy as soon as no continuation has one."""
    policy = HealthPolicy(0, 0, attempts, threshold)

    def has_streak(probes):
        return "+" * threshold in "".join("+" if probe else "-" for probe in probes)

    for probes in itertools.product([True, False], repeat=attempts):
        verdict, count = watch(policy, probes)
        assert verdict is has_streak(probes)
        if verdict:
            assert not has_streak(probes[:count - 1])
        else:
            assert has_streak((*probes[:count - 1], *[True] * (attempts - count + 1))), "it could have ended before"


# --- interruptions

def interrupted(state, recovery, *, recoveries=0, can_roll_back=True):
    verdict = hookshot.judge_interruption(deployment_of(load_service())._replace(state=state, recoveries=recoveries), recovery,
                                          can_roll_back=can_roll_back)
    return verdict and verdict.outcome


RUNNING = [State.VALIDATING, State.DEPLOYING, State.HEALTH_CHECKING]


@pytest.mark.parametrize("state", RUNNING)
@pytest.mark.parametrize("recovery, can_roll_back, outcome", [
    ("rollback", True, Outcome.FAILED), ("rollback", False, Outcome.FAILED_FOR_GOOD), ("fail", True, Outcome.FAILED_FOR_GOOD),
    ("fail", False, Outcome.FAILED_FOR_GOOD),
    ("retry", True, Outcome.RETRIED), ("retry", False, Outcome.RETRIED)])
def test_an_interrupted_deployment_follows_its_services_policy(state, recovery, can_roll_back, outcome):
    assert interrupted(state, recovery, can_roll_back=can_roll_back) is outcome


@pytest.mark.parametrize("recovery, outcome", [("rollback", None), ("retry", None), ("fail", Outcome.FAILED_FOR_GOOD)])
def test_an_interrupted_rollback_goes_on_unless_it_must_fail(recovery, outcome):
    assert interrupted(State.ROLLING_BACK, recovery) is outcome


@pytest.mark.parametrize("can_roll_back, outcome", [(True, Outcome.FAILED), (False, Outcome.FAILED_FOR_GOOD)])
def test_a_deployment_that_takes_the_server_down_is_not_retried_for_ever(can_roll_back, outcome):
    times = [interrupted(State.DEPLOYING, "retry", recoveries=count, can_roll_back=can_roll_back) for count in range(6)]
    assert times == [Outcome.RETRIED] * hookshot.MAX_RECOVERIES + [outcome] * (6 - hookshot.MAX_RECOVERIES)
    assert interrupted(State.ROLLING_BACK, "rollback", recoveries=hookshot.MAX_RECOVERIES) is Outcome.FAILED_FOR_GOOD


@pytest.mark.parametrize("state, recovery, recoveries, can_roll_back",
                         [*itertools.product([*RUNNING, State.ROLLING_BACK], ["rollback", "fail", "retry"], range(5),
                                             [True, False])])
def test_what_follows_an_interruption_is_always_a_legal_move(state, recovery, recoveries, can_roll_back):
    outcome = interrupted(state, recovery, recoveries=recoveries, can_roll_back=can_roll_back)
    assert outcome is None or hookshot.advance(state, outcome)


# --- the dry run

def test_a_dry_run_shows_what_would_run_and_where_it_would_return():
    service = load_service('[["podman", "pull", "{{IMAGE}}"]]', tables=PHASES)
    shown = hookshot.render_plan(plan_of(service))
    assert (shown["service"], shown["image"], shown["dry_run"], shown["timeout_seconds"]) == ("web", "app:2", True, 1800)
    assert list(shown["phases"]) == [phase.value for phase in Phase]
    assert shown["rollback"] == {"possible": True, "to": "app:1", "reason": None, "max_attempts": 3}
    step, = shown["phases"]["deploy"]
    assert (step["run"], step["working_dir"], step["timeout_seconds"], step["retries"],
            step["critical"]) == (["podman", "pull", "app:2"], "/srv/web", 300, 0, True)
    assert shown["healthcheck"]["max_attempts"] == 7
    json.dumps(shown)


def test_a_dry_run_says_why_there_would_be_no_rollback():
    shown = hookshot.render_plan(plan_of(load_service(), last_good=None))
    assert shown["rollback"] == {"possible": False, "to": None, "reason": "there are no rollback commands", "max_attempts": 2}
    assert shown["healthcheck"] is None


def test_a_dry_run_names_the_environment_and_never_shows_its_values():
    service = load_service('[{run = ["x"], env = {TOKEN = "canary-1"}}]',
                           'env = {DATABASE_URL = "canary-2"}\ninherit_env = ["API_KEY"]', PHASES)
    shown = hookshot.render_plan(plan_of(service, environ={"API_KEY": "canary-3", "HOME": "canary-4"},
                                         overrides={"env": {"LOG_LEVEL": "canary-5"}}))
    assert "canary" not in json.dumps(shown)
    assert {"TOKEN", "DATABASE_URL", "API_KEY", "HOME", "LOG_LEVEL", "HOOKSHOT_IMAGE"} <= set(shown["phases"]["deploy"][0]["env"])


def test_a_dry_run_leaves_open_what_only_the_end_will_tell():
    service = load_service(tables='[service.hooks]\non_failure = [["x", "{{STATUS}}", "{{ERROR_MESSAGE}}"]]')
    assert hookshot.render_plan(plan_of(service))["phases"]["on_failure"][0]["run"] == ["x", "{{STATUS}}", "{{ERROR_MESSAGE}}"]


def test_a_dry_run_shows_the_probes():
    service = load_service(tables='[service.healthcheck]\nhttp = {url = "http://a/", contains = "x"}\ntcp = "b:1"\nunix = "/c"')
    assert hookshot.render_plan(plan_of(service))["healthcheck"]["checks"] == [
        {"url": "http://a/", "status": 200, "contains": "x"}, {"tcp": "b:1"}, {"unix": "/c"}]
