# SPDX-License-Identifier: MPL-2.0
"""STORE: what was promised is on disk, limits hold in the claim, and every failure of the disk has its sentence."""

import collections
import contextlib
import itertools
import json
import os
import pathlib
import random
import re
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import warnings

import pytest

import hookshot
import support
from hookshot import HookshotError, Outcome, Phase, State, Store
from support import wait_until

LIMITS = hookshot.load_config("", "config.toml", []).limits
TRIGGER = hookshot.Trigger("192.0.2.7", "hmac_key", "curl/8", "req-1")
MANY = LIMITS._replace(max_concurrent_total=1000, max_concurrent_per_service=100, max_queue_per_service=10000)


def moves_of(store, deployment):
    return store.record(deployment.deploy_id)[1]


def results_of(store, deployment):
    return store.record(deployment.deploy_id)[2]


def request_of(service="web", image="app:1", *, key=None, **fields) -> hookshot.DeployRequest:
    body = json.dumps({"service": service, "image": image, **fields}).encode()
    return hookshot.parse_deploy(hookshot.VerifiedBody("hmac_key", body), key)


def submit(store, service="web", *, on_busy="queue", limits=LIMITS, at_ms=1000, **fields) -> hookshot.Submission:
    return store.submit(request_of(service, **fields), TRIGGER, at_ms, limits=limits, on_busy=on_busy)


def claim(store, limits=MANY, at_ms=2000) -> hookshot.Deployment | None:
    return store.claim(at_ms, limits=limits)


# The outcomes that take a claimed deployment to each end.
WAYS = {
    State.SUCCEEDED: (Outcome.PASSED, Outcome.PASSED_UNCHECKED), State.FAILED: (Outcome.PASSED, Outcome.FAILED_FOR_GOOD),
    State.ROLLED_BACK: (Outcome.PASSED, Outcome.FAILED, Outcome.PASSED),
    State.ROLLBACK_FAILED: (Outcome.PASSED, Outcome.FAILED, Outcome.FAILED_FOR_GOOD), State.CANCELLED: (Outcome.CANCELLED,)}


def end(store, deployment, state=State.SUCCEEDED, at_ms=3000, **changes) -> hookshot.Deployment:
    """Move a claimed deployment to its end."""
    *before, last = WAYS[state]
    for outcome in before:
        deployment, _ = store.move(deployment, outcome, "on", at_ms)
    ended, _ = store.move(deployment, last, "the end", at_ms, **changes)
    assert ended.state is state
    return ended


def deploy(store, service="web", state=State.SUCCEEDED, *, at_ms=3000, **fields) -> hookshot.Deployment:
    """Take one deployment through everything."""
    made = submit(store, service, limits=MANY, **fields).deployment
    claimed = claim(store)
    assert claimed and claimed.seq == made.seq
    return end(store, claimed, state, at_ms, duration_ms=500)


def result(step=1, **changes) -> hookshot.Result:
    values = {"phase": Phase.DEPLOY, "step": step, "name": "pull", "command": "pull app:1", "attempt": 1, "status": "failed", "exit_code": 3,
              "signal": None, "started_ms": 2000, "duration_ms": 5, "stdout": "out", "stderr": "é", "note": "n", "critical": False}
    return hookshot.Result(**values | changes)


def history(store, service=None, state=None, before_seq=None, limit=1000):
    return store.history(service=service, state=state, before_seq=before_seq, limit=limit)


def ask(folder, sql: str, *values):
    """Ask the database from outside."""
    with contextlib.closing(sqlite3.connect(folder / "state.db")) as db:
        return db.execute(sql, values).fetchall()


@contextlib.contextmanager
def opened(folder):
    store = Store(str(folder), clock=lambda: None)
    try:
        yield store
    finally:
        store.close()


@pytest.fixture
def store(tmp_path):
    with opened(tmp_path) as store:
        os.mkdir(store.logs)
        yield store


@contextlib.contextmanager
def small_disk(folder, size: str):
    """Give a file system of its own to a folder."""
    if os.geteuid() != 0:
        pytest.skip("missing: root")
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], capture_output=True).returncode:
        pytest.skip("missing: the right to mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk", "1m") as folder:
        yield folder


# --- submit

def test_a_submitted_deployment_is_what_was_asked(store):
    submission = submit(store, deploy_id="d-1", previous_image="app:0", metadata={"a": "é"}, overrides={"env": {"B": "1"}}, key="k-1")
    made = submission.deployment
    assert submission.created and submission.position == 1 and submission.can_start and not submission.superseded
    assert store.get("d-1") == made
    assert (made.state, made.image, made.previous_image, made.metadata, made.env, made.trigger, made.idempotency_key, made.queued_ms) == (
        State.QUEUED, "app:1", "app:0", {"a": "é"}, {"B": "1"}, TRIGGER, "k-1", 1000)
    assert [(move.state, move.at_ms) for move in moves_of(store, made)] == [(State.QUEUED, 1000)]


def test_a_deployment_without_an_id_gets_one(store):
    first, second = submit(store).deployment, submit(store).deployment
    assert hookshot.DEPLOY_ID.fullmatch(first.deploy_id) and first.deploy_id != second.deploy_id
    assert store.get(second.deploy_id) == second


@pytest.mark.parametrize("same", [{"deploy_id": "d-1"}, {"key": "k-1"}, {"deploy_id": "d-1", "key": "k-1"}], ids=str)
@pytest.mark.parametrize("ended", [False, True], ids=["queued", "ended"])
def test_the_same_request_again_is_the_same_deployment(store, same, ended):
    first = submit(store, **same).deployment
    if ended:
        first = end(store, claim(store))
    again = submit(store, **same)
    assert (again.created, again.deployment) == (False, first)
    assert len(history(store)) == 1 and store.queue_counts() == ({} if ended else {"web": {"queued": 1, "active": 0}})


@pytest.mark.parametrize("same, other", [({"deploy_id": "d-1"}, {"service": "api"}), *(
    (same, other) for same in ({"deploy_id": "d-1"}, {"key": "k-1"}) for other in ({"image": "app:2"}, {"metadata": {"a": "1"}}))], ids=str)
def test_the_same_id_with_another_body_is_a_conflict(store, same, other):
    first = submit(store, **same).deployment
    with pytest.raises(HookshotError) as caught:
        submit(store, **same, **other)
    assert caught.value.kind.code == "DEPLOY_ID_CONFLICT" and (same.get("deploy_id") or same["key"]) in caught.value.sentence
    assert history(store) == (first,)


def test_the_same_key_for_another_service_is_another_key(store):
    first, second = submit(store, key="k-1"), submit(store, key="k-1", service="api")
    assert first.created and second.created and first.deployment.deploy_id != second.deployment.deploy_id


def test_a_repeated_request_is_no_reason_to_refuse_a_busy_service(store):
    first = submit(store, deploy_id="d-1").deployment
    full = LIMITS._replace(max_queue_per_service=1)
    assert submit(store, deploy_id="d-1", limits=full).deployment == first
    assert submit(store, deploy_id="d-1", on_busy="reject").deployment == first
    assert submit(store, deploy_id="d-1", on_busy="replace").deployment == first
    assert store.get("d-1").state is State.QUEUED


def test_one_hundred_same_requests_at_once_are_one_deployment(store):
    seen = collections.Counter()
    run_all([lambda: seen.update([submit(store, deploy_id="d-1").created]) for _ in range(100)])
    assert seen == {True: 1, False: 99} and len(history(store)) == 1


# --- on_busy and the queue

def test_a_queue_tells_positions_and_whether_one_can_start(store):
    submissions = [submit(store) for _ in range(3)]
    assert [submission.position for submission in submissions] == [1, 2, 3]
    claim(store)
    assert submit(store).can_start is False
    assert submit(store, "api").can_start is True


def test_a_full_queue_refuses_and_other_services_do_not_mind(store):
    limits = LIMITS._replace(max_queue_per_service=2)
    claimed = submit(store, limits=limits).deployment
    claim(store, LIMITS)
    for _ in range(2):
        submit(store, limits=limits)
    with pytest.raises(HookshotError) as caught:
        submit(store, limits=limits, deploy_id="late")
    assert (caught.value.kind.code, caught.value.kind.http) == ("CONCURRENCY_LIMIT_EXCEEDED", 503) and caught.value.retry_after_s
    assert store.get("late") is None and store.get(claimed.deploy_id)
    submit(store, "api", limits=limits)


@pytest.mark.parametrize("is_claimed", [False, True], ids=["queued", "running"])
def test_reject_refuses_while_another_is_queued_or_runs(store, is_claimed):
    first = submit(store, on_busy="reject").deployment
    if is_claimed:
        first = claim(store)
    with pytest.raises(HookshotError) as caught:
        submit(store, on_busy="reject", deploy_id="late")
    assert caught.value.name == "busy" and store.get("late") is None
    if is_claimed:
        end(store, first)
        assert submit(store, on_busy="reject").created
    assert submit(store, "api", on_busy="reject").created


def test_reject_refuses_only_what_could_not_start(store):
    limits = LIMITS._replace(max_concurrent_per_service=2)
    assert [submit(store, on_busy="reject", limits=limits).created for _ in range(2)] == [True, True]
    with pytest.raises(HookshotError):
        submit(store, on_busy="reject", limits=limits)


def test_replace_cancels_what_is_queued_and_nothing_else(store):
    running = submit(store).deployment
    running = claim(store)
    other = submit(store, "api").deployment
    queued = [submit(store).deployment for _ in range(2)]
    submission = submit(store, on_busy="replace", at_ms=5000)
    assert [old.deploy_id for old in submission.superseded] == [old.deploy_id for old in queued]
    for old in queued:
        now = store.get(old.deploy_id)
        assert (now.state, now.completed_ms) == (State.CANCELLED, 5000)
        assert moves_of(store, now)[-1].reason.startswith("superseded")
    assert store.get(running.deploy_id) == running and store.get(other.deploy_id) == other
    assert submission.position == 1


@pytest.mark.parametrize("is_grouped", [False, True], ids=["alone", "with others"])
def test_a_refused_replacement_cancels_nothing(store, tmp_path, is_grouped):
    queued = submit(store).deployment
    refused = lambda: submit(store, on_busy="replace", limits=LIMITS._replace(max_queue_per_service=0))
    if is_grouped:
        outcomes = write_together(store, tmp_path, [refused, lambda: submit(store, "api")])
        assert isinstance(outcomes[0], HookshotError) and outcomes[1].created
    else:
        with pytest.raises(HookshotError):
            refused()
    assert store.get(queued.deploy_id) == queued


# --- claim

@pytest.mark.parametrize("per_service", [1, 2, 5])
def test_a_claim_keeps_the_limit_of_a_service(store, per_service):
    limits = MANY._replace(max_concurrent_per_service=per_service)
    made = [submit(store, limits=MANY).deployment for _ in range(7)]
    claimed = list(iter(lambda: claim(store, limits), None))
    assert [one.seq for one in claimed] == [one.seq for one in made[:per_service]]
    end(store, claimed[-1])
    assert claim(store, limits).seq == made[per_service].seq
    assert claim(store, limits) is None


@pytest.mark.parametrize("total", [1, 3])
def test_a_claim_keeps_the_limit_of_all(store, total):
    limits = MANY._replace(max_concurrent_total=total)
    for number in range(5):
        submit(store, f"s{number}")
    claimed = list(iter(lambda: claim(store, limits), None))
    assert [one.service for one in claimed] == [f"s{number}" for number in range(total)]
    end(store, claimed[0])
    assert claim(store, limits).service == f"s{total}"


def test_a_busy_service_does_not_hold_up_the_others(store):
    for service in ("web", "web", "web", "api"):
        submit(store, service)
    assert [one.service for one in iter(lambda: claim(store, LIMITS), None)] == ["web", "api"]


def test_a_claimed_deployment_is_validating_and_knows_its_start_and_previous_image(store):
    deploy(store, image="app:1")
    submit(store, image="app:2")
    claimed = claim(store, at_ms=9000)
    assert (claimed.state, claimed.started_ms, claimed.queue_ms, claimed.previous_image) == (State.VALIDATING, 9000, 8000, "app:1")
    assert store.get(claimed.deploy_id) == claimed


def test_the_end_of_one_deployment_can_claim_the_next(store):
    submit(store), submit(store)
    running, _ = store.move(claim(store, LIMITS), Outcome.PASSED, "", 2000)
    assert claim(store, LIMITS) is None
    ended, following = store.move(running, Outcome.PASSED_UNCHECKED, "", 3000, then_claim=LIMITS)
    assert (ended.state, following.state) == (State.SUCCEEDED, State.VALIDATING)
    assert store.queue_counts() == {"web": {"queued": 0, "active": 1}}


@pytest.mark.parametrize("per_service", [1, 2])
def test_sixteen_threads_claiming_at_once_never_exceed_a_limit(store, per_service):
    limits = LIMITS._replace(max_concurrent_total=4, max_concurrent_per_service=per_service, max_queue_per_service=100)
    made = collections.defaultdict(list)
    for service in ("a", "b", "c") * 16:
        made[service].append(submit(store, service, limits=limits).deployment.seq)
    claimed = collections.defaultdict(list)

    def work():
        mine = None
        while mine or any(counts["queued"] for counts in store.queue_counts().values()):
            if not mine:
                mine = claim(store, limits)
                continue
            claimed[mine.service].append(mine.seq)
            active = [counts["active"] for counts in store.queue_counts().values()]
            assert sum(active) <= 4 and max(active) <= per_service
            running, _ = store.move(mine, Outcome.PASSED, "", 2000)
            _, mine = store.move(running, Outcome.PASSED_UNCHECKED, "", 3000, then_claim=limits if mine.seq % 2 else None)

    run_all([work] * 16)
    assert {service: sorted(numbers) for service, numbers in claimed.items()} == made
    if per_service == 1:
        assert claimed == made, "first come, first served within a service"


def run_all(works) -> None:
    """Run every work in a thread of its own, all at once; raise what any of them raised."""
    problems, gate = [], threading.Barrier(len(works))

    def run(work):
        gate.wait()
        try:
            work()
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    [thread.start() for thread in threads]
    [thread.join(support.PATIENCE_S * 2) for thread in threads]
    assert not any(thread.is_alive() for thread in threads)
    if problems:
        raise problems[0]


# --- moves

def test_a_stale_move_is_a_bug_and_changes_nothing(store):
    submit(store)
    claimed = claim(store)
    moved, _ = store.move(claimed, Outcome.PASSED, "", 2000)
    with pytest.raises(RuntimeError):
        store.move(claimed, Outcome.FAILED_FOR_GOOD, "", 3000, error="stale")
    assert store.get(claimed.deploy_id) == moved
    assert [move.state for move in moves_of(store, moved)] == [State.QUEUED, State.VALIDATING, State.DEPLOYING]
    assert store.service_record("web") == hookshot.ServiceRecord("web")


def test_of_two_threads_that_move_a_deployment_one_succeeds(store):
    for _ in range(20):
        submit(store)
        claimed, seen = claim(store), collections.Counter()

        def move(outcome):
            try:
                seen[store.move(claimed, outcome, "", 3000)[0].state] += 1
            except RuntimeError:
                seen["stale"] += 1

        run_all([lambda: move(Outcome.FAILED_FOR_GOOD), lambda: move(Outcome.CANCELLED)])
        assert seen["stale"] == 1 and seen[store.get(claimed.deploy_id).state] == 1
    record = store.service_record("web")
    assert record.failed + record.cancelled == 20


@pytest.mark.parametrize("outcome", [outcome for outcome in Outcome])
def test_a_terminal_deployment_never_moves_again(store, outcome):
    ended = deploy(store)
    with pytest.raises(KeyError):
        store.move(ended, outcome, "", 9000)
    assert store.get(ended.deploy_id) == ended


def test_progress_and_results_are_kept(store):
    submit(store)
    running = claim(store)._replace(phase="deploy", step=1, steps_total=2, current_step="pull", command_no=1, pid=77, pid_started="x-1")
    first, second = result(), result(2, status="succeeded", exit_code=0, signal=None, critical=True)
    store.note_progress(running, [(1, first)])
    assert store.get(running.deploy_id) == running
    ended, _ = store.move(running, Outcome.FAILED_FOR_GOOD, "", 3000, [(2, second)])
    assert results_of(store, running) == (first, second)
    assert (ended.pid, ended.pid_started, ended.phase, ended.current_step) == (None, None, None, None)


def test_unfinished_is_what_was_running_oldest_first(store, tmp_path):
    for _ in range(3):
        submit(store, limits=MANY)
    first, second = claim(store), claim(store)
    second, _ = store.move(second, Outcome.PASSED, "", 2000)
    deploy_ids = [one.deploy_id for one in store.unfinished()]
    assert deploy_ids == [first.deploy_id, second.deploy_id]
    end(store, first, State.FAILED)
    assert store.unfinished() == (second,)


# --- several writers, one commit

def write_together(store, folder, works) -> list:
    """Carry the works out in one transaction; return what each returned or raised.

    Another program holds the database while they line up: the first writer waits for it, the others for the first.
    """
    outcomes = [None] * len(works)

    def run(index, work):
        try:
            outcomes[index] = work()
        except BaseException as error:
            outcomes[index] = error

    threads = [threading.Thread(target=run, args=item) for item in enumerate(works)]
    blocker = threading.Thread(target=lambda: submit(store, "blocker"))
    with contextlib.closing(sqlite3.connect(folder / "state.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        blocker.start()
        wait_until(lambda: store._writer_lock.locked() and not store._pending)
        for number, thread in enumerate(threads, 1):
            thread.start()
            wait_until(lambda: len(store._pending) == number)
        other.execute("COMMIT")
    for thread in (blocker, *threads):
        thread.join(support.PATIENCE_S)
        assert not thread.is_alive()
    return outcomes


def test_a_failing_write_undoes_itself_and_nothing_else(store, tmp_path):
    submit(store, deploy_id="d-1")
    stale = claim(store)
    running, _ = store.move(stale, Outcome.PASSED, "", 2000)
    outcomes = write_together(store, tmp_path, [
        lambda: submit(store, deploy_id="before"),
        lambda: submit(store, deploy_id="d-1", image="app:2"),
        lambda: store.move(stale, Outcome.PASSED, "", 2000, [(1, result())]),
        lambda: store.move(running, Outcome.FAILED_FOR_GOOD, "", 3000, [(1, result())], error=object()),
        lambda: submit(store, deploy_id="after")])
    assert outcomes[0].created and outcomes[4].created
    assert isinstance(outcomes[1], HookshotError) and outcomes[1].name == "conflict"
    assert isinstance(outcomes[2], RuntimeError)
    assert isinstance(outcomes[3], sqlite3.ProgrammingError)
    assert store.get("d-1") == running and results_of(store, running) == () and store.service_record("web").failed == 0
    assert store.get("before") and store.get("after") and len(history(store)) == 4


class Whim(Exception):
    """Nothing that STORE has heard of."""


@pytest.mark.parametrize("is_grouped", [False, True], ids=["alone", "with others"])
def test_any_exception_in_a_write_reaches_its_caller_alone(store, tmp_path, is_grouped):
    def work(db):
        db.execute("DELETE FROM deployments")
        raise Whim

    submit(store, deploy_id="d-1")
    write = lambda: store._write(work, durable=True)
    if is_grouped:
        outcomes = write_together(store, tmp_path, [write, lambda: submit(store, deploy_id="d-2"), write])
        assert [type(outcome) for outcome in outcomes] == [Whim, hookshot.Submission, Whim]
    else:
        with pytest.raises(Whim):
            write()
    assert store.get("d-1") and submit(store, deploy_id="d-3").created


def test_even_an_interrupt_in_a_write_leaves_nobody_waiting(store, tmp_path):
    def work(db):
        raise KeyboardInterrupt

    outcomes = write_together(store, tmp_path, [lambda: store._write(work, durable=True), lambda: submit(store, deploy_id="d-1")])
    assert isinstance(outcomes[0], KeyboardInterrupt)
    assert isinstance(outcomes[1], BaseException) == (store.get("d-1") is None), "an error means that it was not done"
    assert submit(store, deploy_id="d-2").created


def test_concurrent_writers_lose_nothing(store, tmp_path):
    ids = collections.deque()
    run_all([lambda n=n: [ids.append(submit(store, f"s{n}", limits=MANY).deployment.deploy_id) for _ in range(25)] for n in range(8)])
    assert len(set(ids)) == 200
    assert {row[0] for row in ask(tmp_path, "SELECT deploy_id FROM deployments")} == set(ids)


# --- durability

SCRIPT = """
import os, sys
sys.path[:0] = {paths!r}
import test_store as t
from hookshot import *
store = Store({folder!r}, clock=lambda: None)
def mark(text): os.write(1, b"MARK %s\\n" % text.encode())
"""


def trace(folder, steps: str, *options: str) -> tuple[str, str]:
    """Run steps on a store in a process of its own under strace; return the trace and what it printed."""
    strace = support.need("strace")
    # The tests are imported by it too, so pytest must be found.
    script = folder / "steps.py"
    script.write_text(SCRIPT.format(paths=[str(support.ROOT), str(support.ROOT / "tests"), *sys.path], folder=str(folder)) + steps)
    done = subprocess.run([strace, "-f", "-o", folder / "trace", "-e", "trace=fsync,fdatasync,write", *options, sys.executable, script],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return (folder / "trace").read_text(), done.stdout


def syncs_by_mark(traced: str) -> dict[str, list[str]]:
    """Return the sync calls after each mark."""
    found, mark = collections.defaultdict(list), "start"
    for line in traced.splitlines():
        if match := re.search(r'write\(1, "MARK ([^\\]*)\\n"', line):
            mark = match[1]
            found[mark] = []
        elif match := re.search(r"\b(fsync|fdatasync)\(", line):
            found[mark].append(match[1])
    return found


def test_promises_are_synced_and_progress_is_not(tmp_path):
    traced, _ = trace(tmp_path, """
mark("submit"); t.submit(store)
mark("claim"); running = t.claim(store)
mark("progress"); store.note_progress(running._replace(step=1), [(1, t.result())])
mark("move"); running, _ = store.move(running, Outcome.PASSED, "", 2000)
mark("end"); store.move(running, Outcome.PASSED_UNCHECKED, "", 3000)
mark("queue two"); t.submit(store), t.submit(store)
mark("again"); running, _ = store.move(t.claim(store), Outcome.PASSED, "", 2000)
mark("end and claim"); store.move(running, Outcome.FAILED_FOR_GOOD, "", 3000, then_claim=t.MANY)
mark("replace"); t.submit(store, on_busy="replace")
mark("expire"); store.expire(10**9, lock_timeout_s=1)
mark("closing"); store.close()
""")
    counts = {mark: len(calls) for mark, calls in syncs_by_mark(traced).items()}
    assert counts["progress"] == counts["move"] == 0
    assert all(counts[mark] >= 1 for mark in ("submit", "claim", "end", "end and claim", "replace", "expire")), counts


FAILING_DISK = """
t.submit(store, deploy_id="before")
mark("sync")
try:
    t.submit(store, deploy_id="during")
    mark("accepted")
except HookshotError as error:
    mark(f"refused {error.name}: {error.sentence}")
mark("known during" if store.get("during") else "unknown during")
t.submit(store, deploy_id="after")
mark("closing")
os._exit(0)
"""


def test_a_disk_that_fails_to_sync_is_told_to_the_caller(tmp_path):
    (tmp_path / "dry").mkdir()
    (tmp_path / "wet").mkdir()
    calls = syncs_by_mark(trace(tmp_path / "dry", FAILING_DISK)[0])
    name = calls["sync"][0]
    number = calls["start"].count(name) + 1
    _, printed = trace(tmp_path / "wet", FAILING_DISK, "-e", f"inject={name}:error=EIO:when={number}")
    assert "MARK refused storage: the disk failed" in printed and "MARK accepted" not in printed and "MARK unknown during" in printed
    with opened(tmp_path / "wet") as store:
        assert [one.deploy_id for one in history(store)] == ["after", "before"]


def test_what_was_acknowledged_survives_kill_9(tmp_path):
    code = SCRIPT.format(paths=[str(support.ROOT), str(support.ROOT / "tests"), *sys.path], folder=str(tmp_path)) + """
while True:
    print(t.submit(store, limits=t.MANY).deployment.deploy_id, flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        seen = [process.stdout.readline().strip() for _ in range(30)]
        process.kill()
        seen += [line.strip() for line in process.stdout if line.endswith("\n")]
    with opened(tmp_path) as store:
        assert set(seen) <= {one.deploy_id for one in history(store)}
        assert ask(tmp_path, "PRAGMA integrity_check") == [("ok",)]


# --- the schema

def test_a_fresh_database_has_this_versions_schema(store, tmp_path):
    assert ask(tmp_path, "PRAGMA user_version") == [(len(hookshot.MIGRATIONS),)]
    assert ask(tmp_path, "PRAGMA journal_mode") == [("wal",)]


def test_a_database_is_opened_again_with_everything_in_it(tmp_path):
    with opened(tmp_path) as store:
        ended = deploy(store, metadata={"a": "1"})
    with opened(tmp_path) as store:
        assert store.get(ended.deploy_id) == ended and store.service_record("web").succeeded == 1


def test_a_database_of_a_newer_version_is_refused_and_left_alone(tmp_path):
    with opened(tmp_path) as store:
        submit(store, deploy_id="d-1")
    newer = len(hookshot.MIGRATIONS) + 1
    ask(tmp_path, f"PRAGMA user_version={newer}")
    with pytest.raises(HookshotError) as caught:
        Store(str(tmp_path))
    assert caught.value.name == "storage" and f"schema {newer}" in caught.value.sentence and "newer" in caught.value.sentence
    assert ask(tmp_path, "PRAGMA user_version") == [(newer,)] and ask(tmp_path, "SELECT deploy_id FROM deployments") == [("d-1",)]


def test_moves_keep_their_order_when_a_database_of_the_second_schema_is_upgraded(tmp_path):
    """Whatever the clock did, which jumped back in the middle of one deployment and stood still during another."""
    states, times = ["Queued", "Validating", "Deploying", "Succeeded"], {1: [5000, 5001, 10, 11], 2: [4000, 4000, 4000, 4000], 3: [6000, 6001, 6002, 6003]}
    with contextlib.closing(sqlite3.connect(tmp_path / "state.db")) as db:
        db.executescript("".join(hookshot.MIGRATIONS[:2]) + "PRAGMA user_version=2;")
        for seq, moments in times.items():
            db.execute("INSERT INTO deployments (seq, deploy_id, service, state, image, metadata, env, trigger, digest, queued_ms, completed_ms) "
                       "VALUES (?, 'd-' || ?, 'web', 'Succeeded', 'app:1', '{}', '{}', '[\"192.0.2.1\", \"hmac_key\", null, \"r\"]', 'd', 1, 2)", (seq, seq))
            db.executemany("INSERT INTO moves VALUES (?, ?, ?, ?, '')", [(seq, n, state, at_ms) for n, (state, at_ms) in enumerate(zip(states, moments), 1)])
        db.commit()
    with opened(tmp_path) as store:
        for seq, moments in times.items():
            assert [(move.state, move.at_ms) for move in store.record(f"d-{seq}")[1]] == [*zip(states, moments)]
        moves = store.moves_after(0, 100)
        assert [move.deployment.seq for move in moves] == [2] * 4 + [1] * 4 + [3] * 4
        assert [move.before for move in moves] == [None, *states[:3]] * 3


def test_a_migration_upgrades_an_older_database(tmp_path, monkeypatch):
    with opened(tmp_path) as store:
        made = submit(store).deployment
    monkeypatch.setattr(hookshot, "MIGRATIONS", (
        *hookshot.MIGRATIONS, "CREATE TABLE extra (x); INSERT INTO extra SELECT seq FROM deployments;"))
    with opened(tmp_path) as store:
        assert store.get(made.deploy_id) == made
    assert ask(tmp_path, "SELECT x FROM extra") == [(made.seq,)] and ask(tmp_path, "PRAGMA user_version") == [(len(hookshot.MIGRATIONS),)]


def test_a_failing_migration_is_undone(tmp_path, monkeypatch):
    with opened(tmp_path) as store:
        made = submit(store).deployment
    monkeypatch.setattr(hookshot, "MIGRATIONS", (
        *hookshot.MIGRATIONS, "CREATE TABLE extra (x); DELETE FROM deployments; INSERT INTO nowhere VALUES (1);"))
    with pytest.raises(HookshotError) as caught:
        Store(str(tmp_path))
    assert caught.value.name == "storage"
    monkeypatch.undo()
    assert not ask(tmp_path, "SELECT name FROM sqlite_master WHERE name='extra'")
    with opened(tmp_path) as store:
        assert store.get(made.deploy_id) == made


# --- statistics

def test_statistics_are_true_at_every_moment_and_outlive_the_history(store):
    chance, expected = random.Random(7), collections.Counter()
    retention = hookshot.Retention(successful_deploys=2, failed_deploys=2, log_days=1)
    current = failed_ms = health = None
    for number in range(60):
        state = chance.choice(list(WAYS))
        ended = deploy(store, state=state, image=f"app:{number}", previous_image="app:old", at_ms=3000 + number)
        expected[hookshot.COUNT_OF_STATE[state]] += 1
        expected["duration_ms"] += 500 * (state is not State.CANCELLED)
        current = {State.SUCCEEDED: ended.image, State.ROLLED_BACK: "app:old"}.get(state, current)
        failed_ms = ended.completed_ms if state in (State.FAILED, State.ROLLED_BACK, State.ROLLBACK_FAILED) else failed_ms
        health = {State.SUCCEEDED: "Healthy", State.ROLLED_BACK: "Degraded", State.CANCELLED: "Unknown"}.get(state, "Unhealthy")
        store.prune("web", retention)
        assert store.service_record("web") == hookshot.ServiceRecord(
            "web", current, ended.deploy_id, state, ended.completed_ms, health or "Unknown", last_failure_ms=failed_ms, **expected)
    assert len(expected) == 6, "the sample has every ending"


def test_a_service_that_never_deployed_has_zeros(store):
    submit(store, "api")
    assert store.service_record("web") == hookshot.ServiceRecord("web")
    assert store.service_records() == ()
    end(store, claim(store))
    assert [record.name for record in store.service_records()] == ["api"]


def test_queue_counts_are_by_service(store):
    assert store.queue_counts() == {}
    for service in ("web", "web", "web", "api"):
        submit(store, service)
    claim(store, LIMITS)
    assert store.queue_counts() == {"web": {"queued": 2, "active": 1}, "api": {"queued": 1, "active": 0}}


# --- history

def test_history_is_newest_first_and_a_cursor_shows_each_once(store):
    made = [deploy(store, service) for service in ("web", "api", "web", "web", "api")]
    seen, before = [], None
    while page := history(store, before_seq=before, limit=2):
        seen += page
        before = page[-1].seq
    assert seen == made[::-1]


def test_a_cursor_does_not_slip_when_new_ones_come(store):
    made = [deploy(store) for _ in range(4)]
    first = history(store, limit=2)
    deploy(store)
    assert history(store, before_seq=first[-1].seq, limit=2) == (made[1], made[0])


@pytest.mark.parametrize("before", [0, 1])
def test_nothing_is_older_than_the_first(store, before):
    assert deploy(store).seq == 1
    assert history(store, before_seq=before) == ()


def test_history_can_be_filtered(store):
    good, bad, other = deploy(store), deploy(store, state=State.FAILED), deploy(store, "api")
    assert history(store, service="web") == (bad, good)
    assert history(store, state="Succeeded") == (other, good)
    assert history(store, service="web", state="Succeeded") == (good,)
    assert history(store, service="nobody") == ()


# --- retention

def log_of(store, deployment) -> pathlib.Path:
    path = pathlib.Path(store.log_path(deployment))
    path.touch()
    return path


def test_retention_keeps_the_newest_of_each_kind_with_their_logs(store, tmp_path):
    states = [State.SUCCEEDED, State.FAILED, State.CANCELLED, State.ROLLED_BACK, State.SUCCEEDED, State.ROLLBACK_FAILED, State.SUCCEEDED]
    made = [deploy(store, state=state) for state in states]
    others = [deploy(store, "api") for _ in range(3)]
    made.append(submit(store).deployment)
    logs = {one.seq: log_of(store, one) for one in (*made, *others)}
    for one in made:
        store.note_progress(one, [(9, result())])
    assert store.prune("web", hookshot.Retention(successful_deploys=2, failed_deploys=1, log_days=1)) == 4
    kept = [made[4], made[5], made[6], *others, made[7]]
    assert [one.seq for one in history(store)] == sorted((one.seq for one in kept), reverse=True)
    assert sorted(seq for seq, path in logs.items() if path.exists()) == sorted(one.seq for one in kept)
    for table in ("moves", "commands"):
        assert {seq for (seq,) in ask(tmp_path, f"SELECT seq FROM {table}")} <= {one.seq for one in kept}
    assert ask(tmp_path, "PRAGMA foreign_key_check") == []


def test_retention_works_in_batches(store):
    for _ in range(25):
        deploy(store)
    retention = hookshot.Retention(successful_deploys=3, failed_deploys=1, log_days=1)
    assert [store.prune("web", retention, batch=10) for _ in range(4)] == [10, 10, 2, 0]
    assert len(history(store)) == 3


def test_retention_never_touches_what_has_not_ended(store):
    for _ in range(3):
        submit(store)
    claim(store)
    assert store.prune("web", hookshot.Retention(successful_deploys=1, failed_deploys=1, log_days=1)) == 0
    assert len(history(store)) == 3


@pytest.mark.parametrize("state", [State.SUCCEEDED, State.FAILED])
def test_a_pruned_deployments_number_is_never_given_again(store, state):
    """A log file is named by it."""
    numbers = []
    for _ in range(4):
        numbers.append(deploy(store, state=state).seq)
        store.prune("web", hookshot.Retention(successful_deploys=1, failed_deploys=1, log_days=1))
    assert numbers == sorted(set(numbers)) and len(history(store)) == 1


def test_old_logs_go_and_new_ones_stay(store):
    old, new = log_of(store, deploy(store)), log_of(store, deploy(store))
    os.utime(old, (1000, 1000))
    new.write_bytes(b"x" * 10_000)
    assert 10_000 <= store.prune_logs(2_000_000) <= 20_000
    assert (old.exists(), new.exists(), len(history(store))) == (False, True, 2)


def figures(store) -> tuple[int, int, int]:
    """Return pages, free pages, and whether they can be given back (2: in steps)."""
    with contextlib.closing(sqlite3.connect(store.path)) as db:
        return tuple(db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "auto_vacuum"))


def fill_up(folder, number: int) -> None:
    """Store this many ended deployments with 10 KB each, in one transaction."""
    with contextlib.closing(sqlite3.connect(folder / "state.db")) as db:
        db.executemany("INSERT INTO deployments (deploy_id, service, state, image, metadata, env, trigger, digest, queued_ms, completed_ms) "
                       "VALUES (?, 'web', 'Succeeded', ?, '{}', '{}', ?, '', 0, 1)",
                       [(f"old-{n}", "x" * 10_000, json.dumps(["127.0.0.1", "key", "", ""])) for n in range(number)])
        db.commit()


def test_pages_that_retention_has_freed_are_given_back_in_small_steps(tmp_path):
    with opened(tmp_path) as store:
        fill_up(tmp_path, 600)
        while store.prune("web", hookshot.Retention(1, 1, 1)):
            pass
        pages, free, kind = figures(store)
        assert kind == 2 and free > 1500
        assert store.shrink()
        assert figures(store)[0] == pages - 64
        while store.shrink():
            pass
        assert figures(store)[1] == 256, "a share stays for what comes next"
        assert not store.shrink() and figures(store)[1] == 256
        store.close()
        assert (tmp_path / "state.db").stat().st_size < 400 * 4096 and len(history(Store(str(tmp_path)))) == 1


def test_a_database_of_an_earlier_version_learns_to_give_pages_back(tmp_path):
    with contextlib.closing(sqlite3.connect(tmp_path / "state.db")) as db:
        db.executescript(f"PRAGMA journal_mode=WAL; {hookshot.MIGRATIONS[0]} PRAGMA user_version=1;")
    fill_up(tmp_path, 3)
    with opened(tmp_path) as store:
        assert figures(store)[2] == 2
        assert [made.deploy_id for made in history(store)] == ["old-2", "old-1", "old-0"]


def test_a_write_ahead_log_that_a_reader_has_let_grow_is_cut(tmp_path):
    with opened(tmp_path) as store, contextlib.closing(sqlite3.connect(store.path, isolation_level=None)) as reader:
        submit(store)
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM deployments").fetchone()
        fill_up(tmp_path, 2000)
        store.checkpoint()
        assert os.stat(store.path + "-wal").st_size > 20_000_000
        reader.execute("COMMIT")
        store.checkpoint()
        submit(store)
        assert os.stat(store.path + "-wal").st_size <= 8 << 20


# --- waiting too long

def test_what_waited_longer_than_lock_timeout_is_cancelled_and_nothing_else(store):
    running = submit(store, at_ms=0).deployment
    running = claim(store)
    old, young = submit(store, at_ms=0).deployment, submit(store, at_ms=5000).deployment
    (expired,) = store.expire(10_001, lock_timeout_s=10)
    assert (expired.deploy_id, expired.state, expired.completed_ms) == (old.deploy_id, State.CANCELLED, 10_001)
    assert "lock_timeout" in expired.error and store.get(old.deploy_id) == expired
    assert store.get(young.deploy_id) == young and store.get(running.deploy_id) == running
    assert store.expire(10_001, lock_timeout_s=10) == ()


def test_nothing_expires_at_the_very_second(store):
    submit(store, at_ms=0)
    assert store.expire(10_000, lock_timeout_s=10) == ()


def test_a_deployment_that_starts_over_waits_anew(store):
    submit(store, at_ms=0)
    store.move(claim(store, at_ms=1000), Outcome.RETRIED, "the server stopped", 60_000)
    assert store.expire(61_000, lock_timeout_s=10) == ()
    assert claim(store)


def test_every_statement_is_one_that_later_pythons_take_too(tmp_path):
    with warnings.catch_warnings(), opened(tmp_path) as store:
        warnings.simplefilter("error")
        made = deploy(store, deploy_id="d-1", key="k-1")
        submit(store), submit(store, on_busy="replace")
        store.note_progress(claim(store), [(1, result())])
        store.expire(10**9, lock_timeout_s=1), store.prune("web", hookshot.Retention(1, 1, 1)), store.unfinished()
        history(store), moves_of(store, made), results_of(store, made), store.service_record("web"), store.queue_counts()
        store.tallies(), store.moves_after(store.last_move() - 1, 10), store.marks()
        store.enqueue([hookshot.Outgoing(0, "chat", made.seq, "msg_1", "[]", 0, None)], {"notified": "1"})
        (notice,) = store.next_notices("chat", 1)
        store.count_attempt(notice.id), store.take_notice(notice.id), store.drop_channel("chat"), store.outbox_counts()


# --- when the disk or the file fails

def refusal(caught, *words: str, code="STORAGE_ERROR", http=503) -> None:
    """Assert that an error is this refusal, with a sentence that says what it is."""
    error = caught.value
    assert (error.kind.code, error.kind.http) == (code, http), error.sentence
    assert all(word in error.sentence for word in words), error.sentence
    assert error.retry_after_s


@pytest.mark.parametrize("content", [b"this is no database\n" * 500, b"SQLite format 3\0" + b"\xff" * 5000], ids=["text", "header"])
def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path, content):
    (tmp_path / "state.db").write_bytes(content)
    with pytest.raises(HookshotError) as caught:
        Store(str(tmp_path))
    refusal(caught, "database", "backup")
    assert (tmp_path / "state.db").read_bytes() == content


def damage(folder, copy, *, keeps_wal: bool) -> None:
    """Write a database with rubbish in its middle into `copy`, as a crash or a clean end leaves it."""
    with opened(folder) as store:
        for number in range(300):
            submit(store, limits=MANY, deploy_id=f"d-{number}", metadata={"a": "x" * 400})
        with contextlib.closing(sqlite3.connect(store.path)) as db:
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        content = bytearray((folder / "state.db").read_bytes())
    assert len(content) > 100_000
    content[20_000:-20_000] = b"\xa5" * (len(content) - 40_000)
    (copy / "state.db").write_bytes(content)
    if keeps_wal:
        (copy / "state.db-wal").touch()


def test_a_database_damaged_by_a_crash_is_refused_at_start(tmp_path):
    folder, copy = tmp_path / "a", tmp_path / "b"
    folder.mkdir(), copy.mkdir()
    damage(folder, copy, keeps_wal=True)
    with pytest.raises(HookshotError) as caught:
        Store(str(copy))
    refusal(caught, "damaged", "backup")


def test_a_damaged_database_is_told_when_it_is_found(tmp_path):
    folder, copy = tmp_path / "a", tmp_path / "b"
    folder.mkdir(), copy.mkdir()
    damage(folder, copy, keeps_wal=False)
    with contextlib.suppress(HookshotError), opened(copy) as store:
        with pytest.raises(HookshotError) as caught:
            history(store)
        refusal(caught, "damaged", "backup")
        with pytest.raises(HookshotError) as caught:
            submit(store, deploy_id="d-7", image="app:9")
        refusal(caught, "damaged", "backup")


def test_a_locked_database_is_told_and_works_again_afterwards(tmp_path, monkeypatch):
    monkeypatch.setattr(hookshot, "_BUSY_TIMEOUT_S", 0.1)
    with opened(tmp_path) as store, contextlib.closing(sqlite3.connect(tmp_path / "state.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(HookshotError) as caught:
            submit(store, deploy_id="d-1")
        refusal(caught, "locked")
        assert history(store) == (), "reading goes on"
        other.execute("ROLLBACK")
        assert submit(store, deploy_id="d-1").created


@contextlib.contextmanager
def read_only(folder):
    """Give a folder with a database that cannot be written."""
    if os.geteuid() == 0:
        with small_disk(folder, "16m"):
            with opened(folder) as store:
                submit(store, deploy_id="d-1")
            subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
            yield folder
        return
    folder.mkdir()
    with opened(folder) as store:
        submit(store, deploy_id="d-1")
    (folder / "state.db").chmod(0o400)
    folder.chmod(0o500)
    yield folder
    folder.chmod(0o700)


def test_a_read_only_database_is_told(tmp_path):
    with read_only(tmp_path / "data") as folder, pytest.raises(HookshotError) as caught:
        with opened(folder) as store:
            submit(store, deploy_id="d-2")
    refusal(caught)
    assert re.search("read-only|cannot be opened", caught.value.sentence), caught.value.sentence


def test_a_folder_that_is_not_there_is_told(tmp_path):
    with pytest.raises(HookshotError) as caught:
        Store(str(tmp_path / "nowhere"))
    refusal(caught, "cannot be opened")


def fill(disk) -> pathlib.Path:
    """Leave no byte free on a disk; return the file that takes it."""
    filler = disk / "filler"
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
        while file.write(b"\0" * 4096):
            pass
    return filler


def test_a_nearly_full_disk_refuses_new_deployments_and_lets_running_ones_end(tmp_path):
    with small_disk(tmp_path / "disk", "10m") as disk, opened(disk) as store:
        submit(store, deploy_id="d-1")
        claimed = claim(store)
        (disk / "filler").write_bytes(b"\0" * (4 << 20))
        with pytest.raises(HookshotError) as caught:
            submit(store, deploy_id="d-2")
        refusal(caught, "free", code="DISK_FULL", http=507)
        assert end(store, claimed).state is State.SUCCEEDED and store.get("d-2") is None
        (disk / "filler").unlink()
        assert submit(store, deploy_id="d-2").created


@pytest.mark.parametrize("writers", [1, 8])
def test_a_full_disk_loses_no_record_and_tells_no_lie(disk, monkeypatch, writers):
    monkeypatch.setattr(hookshot, "DISK_RESERVE_BYTES", 0)
    kept, refused, numbers = collections.deque(), collections.deque(), itertools.count()

    def write():
        while not refused:
            deploy_id = f"d-{next(numbers)}"
            try:
                kept.append(submit(store, limits=MANY, deploy_id=deploy_id, metadata={"a": "x" * 400}).deployment.deploy_id)
            except HookshotError as error:
                refused.append((deploy_id, error))

    with opened(disk) as store:
        (disk / "spare").write_bytes(b"\0" * (200 << 10))
        run_all([write] * writers)
        for deploy_id, error in refused:
            assert (error.kind.code, error.kind.http) == ("DISK_FULL", 507), error.sentence
            assert "full" in error.sentence and store.get(deploy_id) is None
        assert kept and {one.deploy_id for one in history(store, limit=10**6)} == set(kept)
        (disk / "spare").unlink()
        assert submit(store, deploy_id="after", limits=MANY).created
    with opened(disk) as store:
        assert {one.deploy_id for one in history(store, limit=10**6)} == {*kept, "after"}
        assert ask(disk, "PRAGMA integrity_check") == [("ok",)]


def test_a_move_refused_by_a_full_disk_can_be_made_when_there_is_room(disk, monkeypatch):
    monkeypatch.setattr(hookshot, "DISK_RESERVE_BYTES", 0)
    with opened(disk) as store:
        submit(store, deploy_id="d-1")
        running, _ = store.move(claim(store), Outcome.PASSED, "", 2000)
        filler = fill(disk)
        large = [(1, result(stdout="x" * 10_000, stderr="y" * 10_000))]
        with pytest.raises(HookshotError) as caught:
            store.move(running, Outcome.PASSED_UNCHECKED, "", 3000, large)
        refusal(caught, "full", code="DISK_FULL", http=507)
        assert store.get("d-1") == running and results_of(store, running) == () and store.service_record("web").succeeded == 0
        filler.unlink()
        assert store.move(running, Outcome.PASSED_UNCHECKED, "", 3000, large)[0].state is State.SUCCEEDED
        assert store.service_record("web").succeeded == 1 and len(results_of(store, running)) == 1


def test_a_start_on_a_full_disk_says_so(disk):
    Store(str(disk)).close()
    fill(disk)
    with pytest.raises(HookshotError) as caught, opened(disk) as store:
        store.note_progress(hookshot.new_deployment(request_of(), TRIGGER, "d-1", 0))
    refusal(caught, "full", code="DISK_FULL", http=507)


# --- one server a folder, private to it

def test_what_a_server_writes_is_private_whatever_its_umask(tmp_path):
    host = support.Host(tmp_path, support.service('["echo", "hello"]'))
    before = os.umask(0)
    try:
        with contextlib.closing(host.start()):
            host.wait(host.deploy())
            modes = {path.relative_to(tmp_path).as_posix(): stat.S_IMODE(path.lstat().st_mode)
                     for path in (host.data, *host.data.rglob("*"))}
    finally:
        os.umask(before)
    folders = {"data", "data/logs"}
    assert {"data/state.db", "data/state.db-wal", "data/state.db-shm", "data/hookshot.lock", "data/logs/1.log"} <= set(modes)
    assert {name: oct(mode) for name, mode in modes.items() if mode != (0o700 if name in folders else 0o600)} == {}


def test_a_second_server_on_one_folder_is_refused_until_the_first_is_killed(tmp_path):
    with support.running(tmp_path, support.service()) as host:
        first = host.deploy()
        second = subprocess.run([*support.program(), "-c", host.config, "-s", host.services, "run"],
                                capture_output=True, text=True, timeout=support.PATIENCE_S)
        assert second.returncode == 75 and f"pid {host.process.pid}" in second.stderr and "Traceback" not in second.stderr
        assert host.get("/ready").status == 200
        host.stop(signal.SIGKILL)
        host.start()
        assert host.wait(first)["status"] in hookshot.TERMINAL
