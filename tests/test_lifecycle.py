# SPDX-License-Identifier: MPL-2.0
"""LIFECYCLE: one table holds the legal moves."""

import itertools
import json

import pytest

import hookshot
from hookshot import TERMINAL, TRANSITIONS, Outcome, State


def reachable(state):
    """Return every state that moves can lead to from `state`, itself included."""
    seen, waiting = set(), [state]
    while waiting:
        here = waiting.pop()
        if here not in seen:
            seen.add(here)
            waiting += TRANSITIONS.get(here, {}).values()
    return seen


def test_the_statuses_are_those_of_the_original_and_cancelled():
    assert [str(state) for state in State] == ["Queued", "Validating", "Deploying", "HealthChecking", "RollingBack", "Succeeded",
                                               "Failed", "RolledBack", "RollbackFailed", "Cancelled"]


def test_the_terminal_states_are_these_five():
    assert {str(state) for state in TERMINAL} == {"Succeeded", "Failed", "RolledBack", "RollbackFailed", "Cancelled"}
    assert {str(state) for state in hookshot.ACTIVE} == {"Validating", "Deploying", "HealthChecking", "RollingBack"}


LEGAL = {(state, outcome) for state, row in TRANSITIONS.items() for outcome in row}


@pytest.mark.parametrize("state, outcome", [*itertools.product(State, Outcome)], ids=lambda value: value.name)
def test_a_move_is_in_the_table_or_a_bug(state, outcome):
    if (state, outcome) in LEGAL:
        assert hookshot.advance(state, outcome) is TRANSITIONS[state][outcome]
    else:
        with pytest.raises(KeyError):
            hookshot.advance(state, outcome)


@pytest.mark.parametrize("state", sorted(TERMINAL))
def test_a_terminal_state_never_moves_again(state):
    assert reachable(state) == {state}


def test_every_state_can_be_reached_from_the_queue():
    assert reachable(State.QUEUED) == set(State)


@pytest.mark.parametrize("state", [state for state in State if state not in TERMINAL])
def test_every_other_state_can_reach_an_end(state):
    assert reachable(state) & TERMINAL


@pytest.mark.parametrize("state", [state for state in State if state not in TERMINAL])
def test_every_other_state_can_fail_or_be_left_without_a_rollback(state):
    """A bug, a full disk or a missing service must always have a way out."""
    assert {Outcome.FAILED_FOR_GOOD, Outcome.CANCELLED} & TRANSITIONS[state].keys()


def test_success_comes_only_after_the_commands_and_the_health_check():
    assert {(state, outcome) for state, row in TRANSITIONS.items() for outcome,
            target in row.items() if target is State.SUCCEEDED} == {
        (State.DEPLOYING, Outcome.PASSED_UNCHECKED), (State.HEALTH_CHECKING, Outcome.PASSED)}
    assert TRANSITIONS[State.DEPLOYING][Outcome.PASSED] is State.HEALTH_CHECKING


def test_a_rollback_ends_rolled_back_or_failed_and_cannot_be_cancelled_or_repeated():
    assert set(TRANSITIONS[State.ROLLING_BACK].values()) == {State.ROLLED_BACK, State.ROLLBACK_FAILED}
    assert {target for state, row in TRANSITIONS.items() for target in row.values()
            if target in (State.ROLLED_BACK, State.ROLLBACK_FAILED)
            if state is not State.ROLLING_BACK} == set()


@pytest.mark.parametrize("state", sorted(TRANSITIONS))
def test_no_outcome_means_the_opposite_of_its_name(state):
    row = TRANSITIONS[state]
    assert row.get(Outcome.CANCELLED, State.CANCELLED) is State.CANCELLED
    assert row.get(Outcome.RETRIED, State.QUEUED) is State.QUEUED
    assert row.get(Outcome.FAILED, State.ROLLING_BACK) is State.ROLLING_BACK
    assert row.get(Outcome.FAILED_FOR_GOOD, State.FAILED) in (State.FAILED, State.ROLLBACK_FAILED)
    assert State.SUCCEEDED not in {target for outcome,
                                   target in row.items() if outcome not in (Outcome.PASSED, Outcome.PASSED_UNCHECKED)}


def test_only_starting_over_leads_back():
    """Without it the table has no circle: a deployment ends after a bounded number of moves."""
    forward = {state: {target for outcome, target in row.items() if outcome is not Outcome.RETRIED} for state,
               row in TRANSITIONS.items()}

    def longest(state, path=()):
        assert state not in path, path
        return 1 + max((longest(target, (*path, state)) for target in forward.get(state, ())), default=0)

    assert longest(State.QUEUED) == 6


def test_the_exit_status_of_a_followed_deployment_tells_its_end():
    assert hookshot.EXIT_OF_STATE.keys() == TERMINAL
    assert {str(state): status for state, status in hookshot.EXIT_OF_STATE.items()} == {"Succeeded": 0, "Failed": 10,
            "RolledBack": 11, "RollbackFailed": 12, "Cancelled": 13}


def new(**fields):
    body = json.dumps({"service": "web", "image": "app:2", "previous_image": "app:1", "metadata": {"k": "v"},
                       "overrides": {"env": {"A": "b"}}, **fields}).encode()
    request = hookshot.parse_deploy(hookshot.VerifiedBody("main", body), "idem")
    return hookshot.new_deployment(request, hookshot.Trigger("192.0.2.1", "main", "ci/1", "req-1"), "d-1", 1000), request


def test_a_new_deployment_is_queued_and_remembers_its_request():
    deployment, request = new()
    assert (deployment.deploy_id, deployment.state, deployment.queued_ms, deployment.is_terminal,
            deployment.recoveries) == ("d-1", State.QUEUED, 1000, False, 0)
    assert deployment[deployment._fields.index("metadata"):deployment._fields.index("trigger")] == (request.metadata, request.env)
    assert (deployment.image, deployment.previous_image, deployment.digest, deployment.idempotency_key) == (
        "app:2", "app:1", request.digest, "idem")
    assert deployment.trigger.key_id == "main"
    assert (deployment.started_ms, deployment.completed_ms, deployment.duration_ms, deployment.queue_ms,
            deployment.error) == (None,) * 5


@pytest.mark.parametrize("state", State)
def test_a_deployment_knows_whether_it_ended(state):
    assert new()[0]._replace(state=state).is_terminal == (state in TERMINAL)
