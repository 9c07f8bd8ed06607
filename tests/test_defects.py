# SPDX-License-Identifier: MPL-2.0
"""Defects of Hookshot 1.0 that must not come back: a test for each, here or, as PROVED_IN says, beside its section."""

import concurrent.futures
import contextlib
import importlib
import os
import signal

import pytest

from support import KEY, Host, running, service, wait_until

PROVED_IN = {
    "a request timeout cut a deployment short": "test_server.test_a_deployment_outlasts_request_timeout",
    "a leaving client cut a deployment short": "test_api.test_a_leaving_waiter_changes_nothing",
    "/status was made up": "test_api.test_the_record_of_a_success_is_complete_and_true",
    "/logs did not exist": "test_api.test_a_log_has_every_line_with_time_phase_and_stream",
    "dry_run deployed for real": "test_api.test_a_dry_run_tells_the_plan_and_neither_runs_nor_stores_anything",
    "run skipped validation": "test_daemon.test_every_problem_of_both_files_and_the_secrets_is_told_at_once",
    "--port and --bind were ignored": "test_daemon.test_flags_override_the_file",
    "death by signal counted as success": "test_engine.test_death_by_signal_is_a_failure_that_names_the_signal",
    "records were not recovered after a crash": "test_engine.test_after_a_crash_the_leftover_is_ended_and_the_policy_followed",
    "retention never ran": "test_daemon.test_deployments_beyond_their_retention_go_with_their_logs",
    "statistics were invented": "test_api.test_statistics_of_a_service_are_what_happened",
    "secrets were not reloaded": "test_daemon.test_changed_secrets_come_into_force_without_a_restart",
    "lock_timeout was not a wait": "test_engine.test_a_deployment_that_waits_longer_than_lock_timeout_expires_without_running",
    "an empty key was accepted": "test_daemon.test_a_missing_weak_or_broken_secret_stops_the_start_and_is_not_shown",
    "rate_limit = 0 crashed": "test_api.test_a_rate_limit_of_0_is_no_limit",
    "output of failed commands was not kept": "test_engine.test_output_of_a_failed_command_is_kept",
    "retries did nothing": "test_engine.test_a_command_is_tried_again_as_often_as_its_retries_say",
    "rolled-back and failed answers lacked id and status": "test_api.test_who_waits_is_told_the_outcome",
    "a duplicate deploy_id overwrote history": "test_api.test_the_same_id_with_the_same_body_is_one_deployment_and_with_another_a_conflict",
    "post_deploy ran before health": "test_engine.test_post_deploy_does_not_run_for_an_unhealthy_deployment",
    "hooks lacked overrides and the error": "test_engine.test_hooks_run_in_their_place_with_outcome_error_and_overrides",
    "X-Forwarded-For was believed from anyone": "test_api.test_forwarding_headers_of_a_stranger_are_not_believed",
    "size limits were inconsistent": "test_server.test_a_body_passes_at_its_limit_and_not_beyond",
    "errors were plain text": "test_server.test_an_ambiguous_request_is_refused_once_and_the_connection_closed",
    "an empty rollback was RollbackFailed": "test_engine.test_a_deployment_goes_through_its_states_to_its_ending",
    "only the direct child was killed": "test_engine.test_a_command_beyond_its_timeout_ends_with_its_whole_group",
    "children saw the secrets": "test_daemon.test_a_key_from_the_environment_signs_and_reaches_no_child",
    "concurrency of a service above 1 was impossible": "test_engine.test_no_more_run_at_once_than_the_limits_allow_and_no_fewer",
    "the wrong holder of a lock was named": "test_daemon.test_a_data_directory_has_one_server_at_a_time_and_the_holder_is_named",
    "X-Request-ID was ignored": "test_api.test_a_well_formed_request_id_is_echoed_and_another_replaced",
    "source = \"auto\" skipped the file": "test_daemon.test_auto_takes_the_file_too_and_the_first_source_wins",
    "malformed lines of secrets were logged": "test_daemon.test_a_missing_weak_or_broken_secret_stops_the_start_and_is_not_shown",
    "the reload signal killed the process": "test_daemon.test_sighup_swaps_good_files_whole_and_what_runs_keeps_the_old_ones",
    "errors echoed patterns": "test_api.test_what_is_wrong_with_a_field_is_named_and_nothing_stored",
}


@pytest.mark.parametrize("defect", PROVED_IN)
def test_the_proof_is_there(defect):
    module, _, name = PROVED_IN[defect].partition(".")
    assert callable(getattr(importlib.import_module(module), name, None)), f"{PROVED_IN[defect]} is gone"


def deploy_once(folder, text: str, config: str = "", **fields) -> tuple[dict, str]:
    """Deploy app:1.2 to a server of its own; return the record and the log."""
    with running(folder, text, config) as host:
        deploy_id = host.deploy("app:1.2", **fields)
        return host.wait(deploy_id), host.log(deploy_id)


def words(folder, *arguments: str, tables: str = "", **fields) -> list[str]:
    """Return what a command got as its arguments."""
    listed = ", ".join(f"'{argument}'" for argument in arguments)
    record, _ = deploy_once(folder, service(f"['printf', '%s\\n', {listed}]", tables=tables), **fields)
    return record["commands"][0]["stdout"].splitlines()


def test_metadata_named_image_does_not_replace_the_image(tmp_path):
    metadata = {"IMAGE": "evil:1", "image": "evil:2", "SERVICE": "evil"}
    assert words(tmp_path, "{{IMAGE}}", "{{SERVICE}}", "{{meta.IMAGE}}", metadata=metadata) == ["app:1.2", "web", "evil:1"]


def test_static_text_of_commands_is_not_filtered(tmp_path):
    texts = ["a;b|c&d", "$(date) `date` $HOME", "--flag=<x>", "two  spaces", "ä€", "*?[x]", '"quoted"']
    assert words(tmp_path, *texts) == texts


def test_custom_variables_may_refer_to_each_other_in_any_order(tmp_path):
    tables = '[service.templates]\nA = "{{B}}-a"\nB = "{{C}}-b"\nC = "{{IMAGE|tag}}"\n'
    assert words(tmp_path, "{{A}} {{B}} {{C}}", tables=tables) == ["1.2-b-a 1.2-b 1.2"]


def test_every_documented_variable_is_defined(tmp_path):
    names = ("IMAGE", "PREVIOUS_IMAGE", "SERVICE", "DEPLOY_ID", "WORKING_DIR", "TIMESTAMP", "DATE", "DATETIME", "ATTEMPT", "PHASE")
    got = dict(zip(names, words(tmp_path, *(f"{{{{{name}}}}}" for name in names), previous_image="app:1.1", deploy_id="id-1")))
    assert all(got.values())
    assert (got["PREVIOUS_IMAGE"], got["DEPLOY_ID"], got["WORKING_DIR"], got["ATTEMPT"], got["PHASE"]) == ("app:1.1", "id-1",
        str(tmp_path), "1", "deploy")


@pytest.mark.parametrize("lead", ["", "a", "ab"])
def test_a_character_at_a_cut_off_is_not_cut_in_two(tmp_path, lead):
    text = f"printf '{lead}'; yes € | head -n 30000 | tr -d '\\\\n'"
    record, log = deploy_once(tmp_path, service(f'["sh", "-c", "{text}"]'))
    [command] = record["commands"]
    assert record["status"] == "Succeeded" and set(command["stdout"]) == {"€"} and 9_000 < len(command["stdout"].encode()) <= 10_240
    assert "\ufffd" not in log and log.count("€") == 30000


def test_output_is_bounded_and_its_head_and_tail_are_kept(tmp_path):
    flood = '["sh", "-c", "echo first; yes 0123456789 | head -n 200000; echo last"]'
    record, log = deploy_once(tmp_path, service(flood), '[limits]\nmax_output = "64KB"\n')
    assert record["status"] == "Succeeded" and len(log) < 1 << 19
    assert " first\n" in log and " last\n" in log and "were cut here" in log


def test_a_daemon_that_holds_the_pipes_open_does_not_look_like_a_timeout(tmp_path):
    with running(tmp_path, service('["sh", "-c", "sleep 1000 & echo $! > daemon"]', '["true"]')) as host:
        record = host.wait(host.deploy())
        daemon = int((tmp_path / "daemon").read_text())
        try:
            assert record["status"] == "Succeeded" and not any(command["timed_out"] for command in record["commands"])
        finally:
            os.kill(daemon, signal.SIGKILL)


def test_errors_do_not_echo_command_lines(tmp_path):
    with running(tmp_path, service('["sh", "-c", "exit 3", "internal-detail"]')) as host:
        answer = host.post({"service": "web", "image": "app:1"}, path="/deploy?wait=30")
        assert answer.status == 500 and "exited with status 3" in answer.json["error"]
        assert "internal-detail" not in answer.body.decode()


@pytest.mark.parametrize("prefix, name", [("ACME_", "ACME_HMAC_KEY"), ("ACME", "ACME_HMAC_KEY"), ("HOOKSHOT_",
    "DEPLOY_RECEIVER_HMAC_KEY")])
def test_the_prefix_of_secrets_does_not_double_its_underscore(tmp_path, prefix, name):
    with contextlib.closing(Host(tmp_path, service(), f'[secrets]\nsource = "env"\nsecret_prefix = "{prefix}"\n')) as host:
        host.start(env={name: KEY})
        assert host.wait(host.deploy())["status"] == "Succeeded"


def test_requests_at_once_do_not_slip_past_the_rate_limit(tmp_path):
    with running(tmp_path, service(), "[security]\nrate_limit = 2\n") as host:
        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            codes = sorted(pool.map(lambda _: host.get("/services").status, range(24)))
        # One more comes back every 30 s.
        assert codes[:2] == [200, 200] and codes.count(429) >= 21


def test_one_request_sent_many_times_at_once_runs_once(tmp_path):
    with running(tmp_path, service('["sh", "-c", "echo ran >> runs"]')) as host:
        body = {"service": "web", "image": "app:1", "deploy_id": "once"}
        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            codes = sorted(pool.map(lambda _: host.post(body).status, range(24)))
        host.wait("once")
        assert codes == [200] * 23 + [202] and (tmp_path / "runs").read_text() == "ran\n"


def test_a_restarted_server_takes_over_its_directory_at_once(tmp_path):
    """A lock that is a file outlives kill -9; one that the kernel holds does not."""
    with running(tmp_path, service()) as host:
        for _ in range(3):
            host.kill()
            wait_until(lambda: host.process.poll() is not None)
            host.start()
        assert host.wait(host.deploy())["status"] == "Succeeded"
