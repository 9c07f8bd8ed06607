# SPDX-License-Identifier: MPL-2.0
"""ERRORS: one row per failure, told the same way over HTTP and by the exit status."""

import pytest

import hookshot

# What the original's callers and SPEC 2 and 6 rely on: code in answers -> HTTP status, exit status of the client.
PROMISED = {
    "VALIDATION_ERROR": (400, 65), "AUTHENTICATION_ERROR": (401, 77), "ACCESS_DENIED": (403, 77), "NOT_FOUND": (404, 65),
    "SERVICE_NOT_FOUND": (404, 65), "DEPLOYMENT_NOT_FOUND": (404, 65), "METHOD_NOT_ALLOWED": (405, 65),
    "DEPLOY_ID_CONFLICT": (409, 65),
    "RATE_LIMIT_EXCEEDED": (429, 75), "CONCURRENCY_LIMIT_EXCEEDED": (503, 75),
}


@pytest.mark.parametrize("code", PROMISED)
def test_a_code_of_the_original_keeps_its_statuses(code):
    kind = hookshot.ERRORS[hookshot.KIND_OF_CODE[code]]
    assert (kind.http, kind.exit) == PROMISED[code]


def test_every_code_names_exactly_one_row():
    """A client finds its way from the code of an answer back to the row."""
    assert len(hookshot.KIND_OF_CODE) == len(hookshot.ERRORS)
    assert all(hookshot.ERRORS[name].code == code for code, name in hookshot.KIND_OF_CODE.items())


@pytest.mark.parametrize("http", [408, 411, 413, 414, 415, 417, 431, 501, 505, 507])
def test_each_way_to_be_malformed_has_a_status_of_its_own(http):
    assert [kind.http for kind in hookshot.ERRORS.values()].count(http) == 1


def test_no_failure_looks_like_success_or_like_a_followed_deployment():
    """0 is success, 1 a traceback, 10 to 14 the outcomes of a deployment that ran."""
    assert {kind.exit for kind in hookshot.ERRORS.values()} == {2, 65, 69, 70, 73, 75, 77, 78}
    assert all(400 <= kind.http <= 599 for kind in hookshot.ERRORS.values())


def test_every_answer_that_may_be_tried_again_says_when():
    """429, 503 and 507 carry Retry-After; whoever must not try the same again is told nothing of the kind."""
    for name, kind in hookshot.ERRORS.items():
        if name in ("usage", "unreachable", "cannot_write", "in_use", "config"):
            continue  # Never sent over HTTP.
        assert (kind.retry_after_s is not None) == (kind.http in (429, 503, 507)), name


def test_an_error_carries_its_row_and_its_sentence():
    error = hookshot.HookshotError("busy", "web is busy", details="one runs")
    assert (error.kind.code, error.sentence, error.details, str(error)) == (
        "CONCURRENCY_LIMIT_EXCEEDED", "web is busy", "one runs", "web is busy")
    assert error.retry_after_s == hookshot.ERRORS["busy"].retry_after_s


def test_an_error_may_know_better_when_to_try_again():
    assert hookshot.HookshotError("rate_limited", "slow down", retry_after_s=0).retry_after_s == 0


def test_a_name_without_a_row_is_a_bug():
    with pytest.raises(KeyError):
        hookshot.HookshotError("no_such_row", "x")


@pytest.mark.parametrize("count, sentence", [(1, "1 problem in the configuration"), (2, "2 problems in the configuration")])
def test_a_config_error_keeps_all_its_problems(count, sentence):
    problems = [hookshot.Problem("config.toml", f"key{index}", "is wrong") for index in range(count)]
    error = hookshot.ConfigError(problems)
    assert (error.problems, error.sentence, error.kind.exit) == (tuple(problems), sentence, 78)
