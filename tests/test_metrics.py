# SPDX-License-Identifier: MPL-2.0
"""METRICS: every fact is counted once, in text that Prometheus reads, from closed sets of labels, across restarts."""

import base64
import collections
import contextlib
import gzip
import hashlib
import hmac
import http.client
import http.server
import itertools
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

import hookshot
import support
from hookshot import METRICS, Metrics, Phase, State
from support import Host, need, running, service, wait_until
from test_log import deployment, result
from test_store import small_disk

TOKEN = "t0k3n-of-a-reader-0123456789abcdefgh"
TEAM_KEY = "7e57ab1e5eed0ddba11c0ffeefacade5ca1ab1ecafed00dbaadf00dfeedc0de1"
OPENMETRICS = "application/openmetrics-text; version=1.0.0"
HOLD = '["sh", "-c", "until [ -e go ]; do kill -0 $PPID || exit; sleep 0.02; done"]'
ROLLBACK = "[service.rollback]\n"
HEALTH = "[service.healthcheck]\ninitial_delay = 0\ninterval = 0\nmax_attempts = 2\nsuccess_threshold = 1\n"
# What is stored with the facts, and so goes on after a restart.
STORED = {"deployment_total", "deployment_duration_seconds", "rollback_total", "command_execution_duration_seconds", "healthcheck_failures_total"}


# --- a parser that lets nothing pass

_LABEL = r'[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\["\\n])*"'
_NUMBER = r"[+-]?(?:\d+(?:\.\d+)?(?:e[+-]?\d+)?|Inf)"
_SAMPLE = re.compile(rf"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{{({_LABEL}(?:,{_LABEL})*)\}})? ({_NUMBER})"
                     rf"(?: # \{{({_LABEL})\}} ({_NUMBER}) (\d+\.\d+))?")
_ESCAPES = {"\\\\": "\\", '\\"': '"', "\\n": "\n"}
Series = tuple[str, tuple[tuple[str, str], ...]]


class Exemplar(NamedTuple):
    series: Series
    label: tuple[str, str]
    value: float
    at_s: float


class Page(NamedTuple):
    """What one scrape says."""

    types: dict[str, str]
    values: dict[Series, float]
    exemplars: list[Exemplar]

    def value(self, name: str, **labels: str) -> float | None:
        return self.values.get((name, tuple(sorted(labels.items()))))

    def sum(self, name: str, **labels: str) -> float:
        """Return the sum of every series of a sample's name that has these labels."""
        return sum(value for (found, pairs), value in self.values.items() if found == name and labels.items() <= dict(pairs).items())

    def families(self) -> set[str]:
        return set(self.types)


def parse_labels(text: str | None) -> tuple[tuple[str, str], ...]:
    pairs = [(name, re.sub(r"\\.", lambda match: _ESCAPES[match[0]], value)) for name, value in re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', text or "")]
    assert len(dict(pairs)) == len(pairs), f"a label twice: {text}"
    return tuple(sorted(pairs))


def parse_page(content: bytes, *, is_openmetrics: bool = False) -> Page:
    """Read a whole answer; fail at the first line that the format does not allow."""
    page, about, family, lines = Page({}, {}, []), {}, "", content.decode("utf-8").split("\n")
    assert lines.pop() == "", "the last line has no end"
    if is_openmetrics:
        assert lines.pop() == "# EOF"
    for line in lines:
        if line.startswith("#"):
            word, name, text = re.fullmatch(r"# (HELP|TYPE|UNIT) ([a-zA-Z_:][a-zA-Z0-9_:]*) (.+)", line).groups()
            assert name == family or name not in about, f"families are interleaved: {line}"
            family = name
            assert word not in about.setdefault(name, {}) and "samples" not in about[name], line
            about[name][word] = text
            assert "\\" not in text and (word != "UNIT" or (is_openmetrics and name.endswith(f"_{text}"))), line
            if word == "TYPE":
                assert text in ("counter", "gauge", "histogram"), line
                page.types[name] = text
            continue
        name, labels, value, exemplar, *of_exemplar = _SAMPLE.fullmatch(line).groups()
        kind = about[family]["TYPE"]
        ends = {"counter": ("_total",) if is_openmetrics else ("",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}[kind]
        assert name in [family + end for end in ends] and "HELP" in about[family], line
        about[family]["samples"] = "yes"
        key = name, parse_labels(labels)
        assert key not in page.values, f"twice: {line}"
        page.values[key] = float(value)
        assert kind == "gauge" or float(value) >= 0, line
        if exemplar:
            assert is_openmetrics and name.endswith("_bucket"), line
            (label,) = parse_labels(exemplar)
            assert len("".join(label)) <= 128, line
            page.exemplars.append(Exemplar(key, label, *map(float, of_exemplar)))
    assert all("samples" in said for said in about.values()), "a family without a sample"
    if is_openmetrics:
        units = {name: next((unit for unit in ("seconds", "bytes") if name.endswith(f"_{unit}")), None) for name in about}
        assert {name: said.get("UNIT") for name, said in about.items()} == units
    check_histograms(page)
    return page


def check_histograms(page: Page) -> None:
    """Buckets are cumulative, in order, and end with +Inf, which is the count; exemplars lie in their buckets."""
    found: dict[Series, list[tuple[float, float]]] = collections.defaultdict(list)
    for (name, labels), value in page.values.items():
        if name.endswith("_bucket"):
            found[name.removesuffix("_bucket"), tuple(pair for pair in labels if pair[0] != "le")].append((float(dict(labels)["le"]), value))
    for (name, labels), buckets in found.items():
        bounds, counts = zip(*buckets)
        assert list(bounds) == [*METRICS[name].bounds, float("inf")], name
        assert list(counts) == sorted(counts) and counts[-1] == page.values[name + "_count", labels], name
        assert page.values[name + "_sum", labels] >= 0
    assert len(found) == sum(1 for name, _ in page.values if name.endswith("_count"))
    for exemplar in page.exemplars:
        name, labels = exemplar.series
        bound = float(dict(labels)["le"])
        below = max((limit for limit in METRICS[name.removesuffix("_bucket")].bounds if limit < bound), default=-1.0)
        assert below < exemplar.value <= bound and page.values[exemplar.series] >= 1


@pytest.mark.parametrize("text", [
    "a 1\n", "# TYPE a_total counter\n# HELP a_total x\na_total -1\n", "# TYPE a gauge\n# HELP a x\na 1\na 1\n",
    "# TYPE a gauge\n# HELP a x\na 1\n# TYPE a gauge\n", '# TYPE a gauge\n# HELP a x\na{b="\\x"} 1\n', '# TYPE a gauge\n# HELP a x\na{b="c",b="d"} 1\n',
    "# TYPE a gauge\n# HELP a x\nb 1\n", "# TYPE a gauge\n# HELP a x\n", "# TYPE a gauge\n# HELP a x\na 1", "# TYPE a gauge\n# HELP a x\na 1 \n",
    "# TYPE a gauge\n# HELP a x\na 1\n# TYPE b gauge\n# HELP b x\nb 1\na{c=\"d\"} 1\n", "# UNIT a_seconds seconds\n# TYPE a_seconds gauge\n# HELP a_seconds x\na_seconds 1\n"])
def test_the_parser_of_these_tests_refuses_what_no_format_allows(text):
    with pytest.raises((AssertionError, AttributeError, KeyError)):
        parse_page(text.encode())


# --- the table

def test_names_follow_the_conventions():
    for name, metric in METRICS.items():
        assert metric.kind in ("counter", "gauge", "histogram") and re.fullmatch(r"[a-z][a-z_]*[a-z]", name)
        assert (metric.kind == "counter") == name.endswith("_total") and (metric.kind == "histogram") == bool(metric.bounds)
        assert list(metric.bounds) == sorted(set(metric.bounds)) and metric.doc.endswith(".") and not set('\\"\n') & set(metric.doc)
        assert "_ms" not in name and not {"le", "deploy_id", "image", "reason_text"} & set(metric.labels)


# --- what counts for what

def observed(*events: hookshot.Event) -> Page:
    metrics = Metrics()
    for event in events:
        metrics.observe(event)
    pages = [parse_page(metrics.render((), is_openmetrics=is_openmetrics), is_openmetrics=is_openmetrics) for is_openmetrics in (False, True)]
    assert pages[0].values == pages[1].values
    return pages[1]


def counted(*events: hookshot.Event) -> dict[Series, float]:
    """Return what events count for; of histograms only count and sum."""
    return {key: value for key, value in observed(*events).values.items() if not key[0].endswith("_bucket")}


def series(name: str, **labels: str) -> Series:
    return name, tuple(sorted(labels.items()))


ENDS = {State.SUCCEEDED: ("succeeded", 0), State.FAILED: ("failed", 1), State.ROLLED_BACK: ("rolled_back", 1), State.ROLLBACK_FAILED: ("rollback_failed", 1),
        State.CANCELLED: ("cancelled", None)}


def ended(state: State = State.SUCCEEDED, **changes: Any) -> hookshot.Moved:
    values = {"state": state, "completed_ms": 1_700_000_000_500, "duration_ms": 61_000, "queue_ms": 0}
    return hookshot.Moved(deployment(**values | changes), State.DEPLOYING, "so it went")


@pytest.mark.parametrize("state", sorted(hookshot.TERMINAL))
def test_an_ending_counts_by_how_with_its_time_and_whether_the_service_fails(state):
    status, failing = ENDS[state]
    assert counted(ended(state)) == {
        series("deployment_total", service="web", status=status): 1,
        series("deployment_duration_seconds_count", service="web", phase="total"): 1,
        series("deployment_duration_seconds_sum", service="web", phase="total"): 61,
        series("deployment_duration_seconds_count", service="web", phase="queue"): 1,
        series("deployment_duration_seconds_sum", service="web", phase="queue"): 0,
        series("hookshot_service_last_deployment_timestamp_seconds", service="web"): 1_700_000_000.5,
        **({series("hookshot_service_failing", service="web"): failing} if failing is not None else {})}


def test_a_cancelled_deployment_leaves_it_open_whether_the_service_fails():
    for state in (State.SUCCEEDED, State.FAILED):
        assert counted(ended(state), ended(State.CANCELLED))[series("hookshot_service_failing", service="web")] == (state is State.FAILED)


@pytest.mark.parametrize("phase", ["total", "queue", "deploy", "healthcheck", "rollback"])
def test_each_phase_is_a_histogram_of_its_own(phase):
    field = "duration_ms" if phase == "total" else f"{phase}_ms"
    event = ended(**{"duration_ms": None, "queue_ms": None, field: 1_250})
    assert {key: value for key, value in counted(event).items() if key[0].startswith("deployment_duration")} == {
        series("deployment_duration_seconds_count", service="web", phase=phase): 1,
        series("deployment_duration_seconds_sum", service="web", phase=phase): 1.25}


@pytest.mark.parametrize("stage, reason, word", [
    ("deploy", "pull failed", "deploy"), ("healthcheck", "sick", "healthcheck"), ("post_deploy", "no", "post_deploy"),
    ("deploy", hookshot.INTERRUPTED, "interrupted"), ("healthcheck", hookshot.INTERRUPTED, "interrupted"),
    ("validating", "odd", "other"), (None, "odd", "other"), ("what a caller wrote", "odd", "other")])
def test_a_rollback_counts_by_the_phase_that_failed(stage, reason, word):
    after = deployment(state=State.ROLLING_BACK, failure_stage=stage)
    assert counted(hookshot.Moved(after, State.DEPLOYING, reason)) == {series("rollback_total", service="web", reason=word): 1}


@pytest.mark.parametrize("state", sorted(set(State) - hookshot.TERMINAL - {State.ROLLING_BACK}))
def test_other_moves_count_for_nothing(state):
    assert counted(hookshot.Moved(deployment(state=state, queue_ms=5, deploy_ms=5), State.QUEUED, "on")) == {}


COMMAND_STATES = {"succeeded": {}, "failed": {"exit_code": 3}, "timed_out": {"exit_code": None, "signal": 15}}


@pytest.mark.parametrize("status", COMMAND_STATES)
@pytest.mark.parametrize("phase", Phase)
def test_a_command_counts_with_its_time_and_a_failed_probe_as_a_failure_too(phase, status):
    ended = hookshot.CommandEnded(deployment(), result(phase=phase, status=status, duration_ms=1500, **COMMAND_STATES[status]))
    labels = {"service": "web", "phase": str(phase), "command": "pull"}
    expected = {series("command_execution_duration_seconds_count", **labels): 1, series("command_execution_duration_seconds_sum", **labels): 1.5}
    if phase is Phase.HEALTHCHECK and status != "succeeded":
        expected[series("healthcheck_failures_total", service="web")] = 1
    assert counted(ended) == expected


@pytest.mark.parametrize("phase", [Phase.DEPLOY, Phase.HEALTHCHECK])
def test_a_command_that_could_not_start_took_no_time_but_its_probe_failed(phase):
    event = hookshot.CommandEnded(deployment(), result(phase=phase, status="not_started", exit_code=None))
    assert counted(event) == ({series("healthcheck_failures_total", service="web"): 1} if phase is Phase.HEALTHCHECK else {})


def refused(code: str, reason: str | None = None) -> hookshot.Refused:
    return hookshot.Refused("req-1", "192.0.2.7", "POST", "/deploy", hookshot.ERRORS[code].code, "no", reason)


@pytest.mark.parametrize("reason", hookshot.AUTH_REASONS)
def test_a_refusal_for_who_asked_counts_by_its_reason(reason):
    assert counted(refused("authentication", reason)) == {series("hookshot_auth_failures_total", reason=reason): 1}


@pytest.mark.parametrize("code", hookshot.ERRORS)
def test_of_other_refusals_only_those_of_the_rate_limit_count(code):
    assert counted(refused(code)) == ({series("hookshot_rate_limited_total"): 1} if code == "rate_limited" else {})


def test_every_reason_that_a_refusal_can_have_is_in_the_table():
    source = support.PROGRAM.read_text(encoding="utf-8")
    assert set(re.findall(r', reason="(\w+)"\)$', source, re.MULTILINE)) == set(hookshot.AUTH_REASONS)


def test_bugs_reloads_and_notices_count():
    assert counted(hookshot.Broken("worker-1", ValueError("why"))) == {series("hookshot_internal_errors_total"): 1}
    good, bad = hookshot.Reloaded(True, "m", 1_500), hookshot.Reloaded(False, "m", 9_000)
    taken_at, is_good = series("hookshot_config_last_reload_success_timestamp_seconds"), series("hookshot_config_last_reload_successful")
    assert counted(good) == {series("hookshot_reloads_total", outcome="succeeded"): 1, is_good: 1, taken_at: 1.5}
    assert counted(bad) == {series("hookshot_reloads_total", outcome="failed"): 1, is_good: 0}
    after = counted(good, bad)
    assert (after[is_good], after[taken_at]) == (0, 1.5)
    assert counted(bad, good)[is_good] == 1
    for outcome in ("delivered", "retried", "refused", "expired"):
        assert counted(hookshot.Notified("chat", outcome, "d-1", "req-1", "msg_1", "m")) == {
            series("hookshot_notifications_total", channel="chat", outcome=outcome): 1}


@pytest.mark.parametrize("event", [hookshot.Accepted(deployment(), True, deployment().trigger), hookshot.Trouble("queue_unreadable", "m"),
                                   hookshot.Noted("started", "m")])
def test_other_events_count_for_nothing(event):
    assert counted(event) == {}


def test_counters_are_there_before_their_first_count():
    metrics = Metrics()
    metrics.expect(["web"], ["chat"])
    page = parse_page(metrics.render((), is_openmetrics=False))
    assert set(page.values.values()) == {0} and page.families() == {
        "deployment_total", "rollback_total", "healthcheck_failures_total", "hookshot_service_failing", "hookshot_notifications_total",
        "hookshot_auth_failures_total", "hookshot_reloads_total", "hookshot_rate_limited_total", "hookshot_internal_errors_total",
        "hookshot_event_streams_dropped_total"}
    assert len(page.values) == len(hookshot.COUNT_OF_STATE) + 4 + 1 + 1 + 4 + len(hookshot.AUTH_REASONS) + 2 + 3
    metrics.observe(ended())
    metrics.expect(["web"], ["chat"])
    assert parse_page(metrics.render((), is_openmetrics=False)).value("deployment_total", service="web", status="succeeded") == 1


def test_what_was_counted_before_a_restart_goes_on():
    events = [ended(duration_ms=spent) for spent in (0, 999, 1_000, 1_001, 59_999, 10_000_000)] + [
        hookshot.CommandEnded(deployment(), result(phase=Phase.HEALTHCHECK, status="failed", duration_ms=spent)) for spent in (5, 100, 101, 700_000)]
    tallies: dict[tuple, list[float]] = {}
    for event in events:
        for name, labels, amount in (hookshot.tally_move(event.deployment, event.reason) if isinstance(event, hookshot.Moved)
                                     else hookshot.tally_result("web", event.result)):
            kept = tallies.setdefault((name, labels, hookshot.bucket_index(name, amount)), [0, 0])
            kept[0], kept[1] = kept[0] + 1, kept[1] + amount
    metrics = Metrics()
    metrics.expect(["web"], [])
    metrics.restore((*key, *kept) for key, kept in tallies.items())
    page, before = parse_page(metrics.render((), is_openmetrics=False)), observed(*events)
    of_tallies = {key: value for key, value in before.values.items() if re.sub("_(bucket|sum|count)$", "", key[0]) in STORED - {"deployment_total"}}
    assert len(of_tallies) > 30 and of_tallies == {key: page.values[key] for key in of_tallies}
    metrics.observe(events[0])
    assert parse_page(metrics.render((), is_openmetrics=False)).sum("deployment_duration_seconds_count", phase="total") == 7


# --- the text

def test_the_text_of_prometheus_to_the_byte():
    metrics = Metrics()
    metrics.add("deployment_total", ("web", "failed"), 2)
    metrics.add("http_request_duration_seconds", ("GET", "/health"), 0.002)
    metrics.add("http_request_duration_seconds", ("GET", "/health"), 0.005)
    metrics.add("http_request_duration_seconds", ("GET", "/health"), 99.5)
    expected = """\
# HELP deployment_total Deployments that ended, by how: succeeded, failed, rolled_back, rollback_failed, cancelled.
# TYPE deployment_total counter
deployment_total{service="web",status="failed"} 2
# HELP http_request_duration_seconds From a request's first byte to its answer's head.
# TYPE http_request_duration_seconds histogram
BUCKETShttp_request_duration_seconds_sum{method="GET",path="/health"} 99.507
http_request_duration_seconds_count{method="GET",path="/health"} 3
# HELP hookshot_ready 1 while deploys are accepted, 0 while starting or draining.
# TYPE hookshot_ready gauge
hookshot_ready 1
"""
    counts = {"0.001": 0} | dict.fromkeys(["0.005", "0.01", "0.025", "0.05", "0.1", "0.25", "0.5", "1.0", "2.5", "5.0", "10.0"], 2) | {"+Inf": 3}
    buckets = "".join(f'http_request_duration_seconds_bucket{{method="GET",path="/health",le="{bound}"}} {number}\n' for bound, number in counts.items())
    assert metrics.render([("hookshot_ready", (), 1)], is_openmetrics=False).decode() == expected.replace("BUCKETS", buckets)


def test_openmetrics_to_the_byte():
    metrics = Metrics()
    metrics.observe(hookshot.Moved(deployment(state=State.ROLLING_BACK, failure_stage="deploy"), State.DEPLOYING, "no"))
    metrics.observe(ended(state=State.CANCELLED, duration_ms=None, queue_ms=7_250))
    expected = """\
# TYPE deployment counter
# HELP deployment Deployments that ended, by how: succeeded, failed, rolled_back, rollback_failed, cancelled.
deployment_total{service="web",status="cancelled"} 1
# TYPE deployment_duration_seconds histogram
# UNIT deployment_duration_seconds seconds
# HELP deployment_duration_seconds How long ended deployments took: total, queue, deploy, healthcheck, rollback.
deployment_duration_seconds_bucket{service="web",phase="queue",le="1.0"} 0
deployment_duration_seconds_bucket{service="web",phase="queue",le="5.0"} 0
deployment_duration_seconds_bucket{service="web",phase="queue",le="10.0"} 1 # {deploy_id="d-1"} 7.25 1700000000.500
deployment_duration_seconds_bucket{service="web",phase="queue",le="30.0"} 1
deployment_duration_seconds_bucket{service="web",phase="queue",le="60.0"} 1
deployment_duration_seconds_bucket{service="web",phase="queue",le="120.0"} 1
deployment_duration_seconds_bucket{service="web",phase="queue",le="300.0"} 1
deployment_duration_seconds_bucket{service="web",phase="queue",le="600.0"} 1
deployment_duration_seconds_bucket{service="web",phase="queue",le="1800.0"} 1
deployment_duration_seconds_bucket{service="web",phase="queue",le="+Inf"} 1
deployment_duration_seconds_sum{service="web",phase="queue"} 7.25
deployment_duration_seconds_count{service="web",phase="queue"} 1
# TYPE rollback counter
# HELP rollback Rollbacks begun, by the phase that failed: deploy, healthcheck, post_deploy; or interrupted.
rollback_total{service="web",reason="deploy"} 1
# TYPE hookshot_service_last_deployment_timestamp_seconds gauge
# UNIT hookshot_service_last_deployment_timestamp_seconds seconds
# HELP hookshot_service_last_deployment_timestamp_seconds When the last deployment ended, unix time.
hookshot_service_last_deployment_timestamp_seconds{service="web"} 1700000000.5
# TYPE process_cpu_seconds counter
# UNIT process_cpu_seconds seconds
# HELP process_cpu_seconds Processor time used, user and system.
process_cpu_seconds_total 0.25
# EOF
"""
    assert metrics.render([("process_cpu_seconds_total", (), 0.25)], is_openmetrics=True).decode() == expected


def test_nothing_counted_is_an_empty_page():
    assert Metrics().render((), is_openmetrics=False) == b"" and Metrics().render((), is_openmetrics=True) == b"# EOF\n"


@pytest.mark.parametrize("name", ['a"b', "a\\b", "a\nb", 'a\\"b\\n', "é中", "{{IMAGE}}", 'x"} 5\nevil 1', "a,b=c"])
def test_a_label_is_read_back_as_it_was(name):
    page = observed(hookshot.CommandEnded(deployment(), result(name=name)))
    assert {dict(labels)["command"] for _, labels in page.values} == {name}


def test_the_newest_deployment_of_each_bucket_is_its_exemplar():
    page = observed(*(ended(deploy_id=f"d-{number}", duration_ms=spent, queue_ms=None, completed_ms=number * 1000)
                      for number, spent in enumerate((500, 700, 61_000, 7_200_000, 800, 62_000), 1)))
    assert {(dict(found.series[1])["le"], *found[1:]) for found in page.exemplars} == {
        ("1.0", ("deploy_id", "d-5"), 0.8, 5.0), ("120.0", ("deploy_id", "d-6"), 62.0, 6.0), ("+Inf", ("deploy_id", "d-4"), 7200.0, 4.0)}


@pytest.mark.parametrize("length, has_one", [(1, True), (119, True), (120, False), (128, False)])
def test_an_id_that_is_too_long_for_an_exemplar_is_left_out(length, has_one):
    page = observed(ended(deploy_id="x" * length))
    assert {found.label for found in page.exemplars} == ({("deploy_id", "x" * length)} if has_one else set())
    assert page.value("deployment_total", service="web", status="succeeded") == 1


def test_a_text_that_is_kept_is_never_behind_what_was_counted():
    """Threads count at random while others render; every page is whole, none goes back, and the last has it all."""
    metrics, is_over, expected, problems = Metrics(), threading.Event(), collections.Counter(), []
    keys = [("deployment_total", (f"s{number}", "failed")) for number in range(5)] + [("http_request_duration_seconds", ("GET", f"/{number}")) for number in range(5)]
    lock = threading.Lock()

    def count(seed: int) -> None:
        chance, mine = random.Random(seed), collections.Counter()
        for turn in range(1500):
            (name, labels), amount = chance.choice(keys), chance.choice((1, 2, 7, 20))
            metrics.add(name, labels, amount, (f"d-{seed}-{turn}", 1.0) if METRICS[name].bounds else None)
            mine[name, labels] += amount
            mine[name, labels, "count"] += 1
        with lock:
            expected.update(mine)

    def read(is_openmetrics: bool) -> None:
        last: dict[Series, float] = {}
        try:
            while not is_over.is_set():
                page = parse_page(metrics.render((), is_openmetrics=is_openmetrics), is_openmetrics=is_openmetrics)
                assert all(page.values.get(key, 0) >= value for key, value in last.items())
                last = page.values
        except BaseException as error:
            problems.append(error)

    writers = [threading.Thread(target=count, args=(seed,)) for seed in range(4)]
    readers = [threading.Thread(target=read, args=(kind,)) for kind in (False, True)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in writers + readers:
            thread.start()
        for thread in writers:
            thread.join()
        is_over.set()
        for thread in readers:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not problems, problems
    for is_openmetrics, _ in itertools.product((False, True), range(2)):
        page = parse_page(metrics.render((), is_openmetrics=is_openmetrics), is_openmetrics=is_openmetrics)
        for name, labels in keys:
            pairs = dict(zip(METRICS[name].labels, labels))
            if METRICS[name].bounds:
                assert page.value(f"{name}_sum", **pairs) == expected[name, labels]
                assert page.value(f"{name}_count", **pairs) == expected[name, labels, "count"]
            else:
                assert page.value(name, **pairs) == expected[name, labels]


def test_a_gauge_says_what_it_was_given_last():
    metrics = Metrics()
    for value in (1, 1, 0, 2.5, 0):
        metrics.put("hookshot_service_failing", ("web",), value)
        for is_openmetrics in (False, True, False):
            page = parse_page(metrics.render((), is_openmetrics=is_openmetrics), is_openmetrics=is_openmetrics)
            assert page.value("hookshot_service_failing", service="web") == value


# --- who gets which format

@pytest.mark.parametrize("accept, wanted", [
    # Prometheus 2.24, 2.42, 2.54 and 3.x, with and without protobuf before it, and with the text format preferred.
    ("application/openmetrics-text; version=0.0.1,text/plain;version=0.0.4;q=0.5,*/*;q=0.1", False),
    ("application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1", True),
    ("application/openmetrics-text;version=1.0.0;q=0.5,application/openmetrics-text;version=0.0.1;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2", True),
    ("application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited;q=0.6,application/openmetrics-text;version=1.0.0;q=0.5,"
     "application/openmetrics-text;version=0.0.1;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2", True),
    ("application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,application/openmetrics-text;version=0.0.1;q=0.5,"
     "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2", True),
    ("text/plain;version=0.0.4;q=0.6,application/openmetrics-text;version=1.0.0;q=0.5,*/*;q=0.2", False),
    # Browsers, curl, nothing.
    ("text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8", False), ("*/*", False), ("", False), ("text/plain", False),
    # Weights and versions.
    ("application/openmetrics-text", True), ("Application/OpenMetrics-Text; Version=1.0.0", True), ("application/openmetrics-text;version=1.0.0; charset=utf-8", True),
    ("application/openmetrics-text;q=0", False), ("application/openmetrics-text;q=0.000,*/*", False), ("application/openmetrics-text;version=2.0.0", False),
    ("application/openmetrics-text;version=2.0.0,application/openmetrics-text;version=1.0.0;q=0.1", True),
    ("application/openmetrics-text;q=0.5,text/plain;q=0.5", True), ("application/openmetrics-text;q=0.5,text/plain;q=0.6", False),
    ("application/openmetrics-text;q=0.5,text/*;q=0.6", False), ("application/openmetrics-text;q=0.5,*/*;q=0.6", False),
    ("application/openmetrics-text;q=0.5,*/*;q=0.6,text/plain;q=0.1", True), ("application/openmetrics-text,*/*", True),
    # Nonsense asks for nothing.
    ("application/openmetrics-text;q=x", False), ("application/openmetrics-text;q=1.5", False), ("application/openmetrics-textual", False), (",;,;;q=,", False),
    ("application/openmetrics-text ; q = 1 ; version = 1.0.0", True)])
def test_openmetrics_is_for_those_who_ask_for_it(accept, wanted):
    assert hookshot.wants_openmetrics(accept) is wanted


# --- a server where everything happened

def scrape(host: Host, *, is_openmetrics: bool = False, path: str = "/metrics", **headers: str) -> Page:
    answer = host.request("GET", path, headers={**({"Accept": OPENMETRICS} if is_openmetrics else {}), **headers})
    assert (answer.status, answer.headers["content-type"]) == (200, hookshot.METRICS_TYPES[is_openmetrics])
    return parse_page(answer.body, is_openmetrics=is_openmetrics)


def reload(host: Host, services: str, config: str) -> Page:
    """Write both files, have them read, and return the page after that."""
    before = scrape(host).sum("hookshot_reloads_total")
    host.write(services, config)
    host.process.send_signal(signal.SIGHUP)
    return wait_until(lambda: (page := scrape(host)).sum("hookshot_reloads_total") > before and page)


@contextlib.contextmanager
def receiver() -> Iterator[str]:
    """A server of notices: /good takes them, /bad refuses, /busy puts off."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response({"/good": 204, "/bad": 404}.get(self.path, 503))
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def webhook_headers(key: str, body: bytes, at_s: int) -> dict[str, str]:
    signature = base64.b64encode(hmac.digest(key.encode(), f"msg_1.{at_s}.".encode() + body, hashlib.sha256)).decode()
    return {"webhook-id": "msg_1", "webhook-timestamp": str(at_s), "webhook-signature": f"v1,{signature}"}


EVENTFUL = (
    service() + service(HOLD, name="hold", head='on_busy = "replace"', tables=ROLLBACK + 'commands = [["true"]]\n')
    + service("[\"sh\", \"-c\", \"exit 3\"]", name="bad") + service('["false"]', name="back", tables=ROLLBACK + 'commands = [["true"]]\n')
    + service('["false"]', name="worse", tables=ROLLBACK + 'commands = [["false"]]\n')
    + service(name="sick", tables=HEALTH + 'commands = [["test", "-e", "well"]]\n' + ROLLBACK + 'commands = [["touch", "well"]]\n')
    + service(name="post", tables='[service.hooks]\npost_deploy = [{ run = ["false"], critical = true }]\n' + ROLLBACK + 'commands = [["true"]]\n')
    + service(name="team").replace("[service.security]\n", '[service.security]\nhmac_keys = ["team_key"]\n'))
ALLOWED = '[security]\nallowed_ips = ["127.0.0.1"]\nrate_limit = 0\n'


def channels(url: str) -> str:
    return "[notifications]\nenabled = true\n" + "".join(
        f'[[notifications.channel]]\nname = "{name}"\ntype = "webhook"\nurl = "{url}/{name}"\n' for name in ("good", "bad", "busy"))


def have_everything_happen(host: Host, url: str) -> None:
    """Bring about every kind of event once or more."""
    config = ALLOWED + channels(url)
    interrupted = host.deploy("app:2", "hold", previous_image="app:1")
    host.wait(interrupted, "Deploying")
    host.kill()
    host.start()
    assert host.wait(interrupted)["status"] == "RolledBack"
    running_one, superseded, last = (host.deploy(f"app:{number}", "hold") for number in range(3, 6))
    assert host.wait(superseded)["status"] == "Cancelled"
    (host.folder / "go").touch()
    for deploy_id, status in ((running_one, "Succeeded"), (last, "Succeeded"), (host.deploy(), "Succeeded"), (host.deploy(service="bad"), "Failed"),
                              *((host.deploy("app:2", name, previous_image="app:1"), status) for name, status in (
                                  ("back", "RolledBack"), ("worse", "RollbackFailed"), ("sick", "RolledBack"), ("post", "RolledBack")))):
        assert host.wait(deploy_id)["status"] == status
    body = json.dumps({"service": "web", "image": "app:1"}).encode()
    assert host.request("POST", "/deploy", body).status == 401                                                     # missing
    assert host.post(body, key=b"x" * 32).status == 401                                                            # wrong
    assert host.request("POST", "/deploy", body, webhook_headers(support.KEY, body, int(time.time()) - 4000)).status == 401    # stale
    assert host.post(body, key=TEAM_KEY.encode()).status == 401                                                    # other_service
    assert host.get("/services", Host="evil.example").status == 401                                                # token
    link = http.client.HTTPConnection("127.0.0.1", host.port, timeout=support.PATIENCE_S, source_address=("127.0.0.2", 0))
    with contextlib.closing(link):
        link.request("GET", "/health")
        assert link.getresponse().status == 403                                                                    # address
    reload(host, EVENTFUL, config.replace("rate_limit = 0", "rate_limit = 1\nrequire_timestamp = true"))
    assert host.post(body).status == 401                                                                           # no_timestamp
    assert host.get("/services").status == 429
    assert reload(host, EVENTFUL, config + "[nonsense]\n").value("hookshot_config_last_reload_successful") == 0
    assert reload(host, EVENTFUL, config).value("hookshot_config_last_reload_successful") == 1
    wait_until(lambda: "hookshot_deployment_logs_bytes" in scrape(host).families())
    wait_until(lambda: (page := scrape(host)) and all(page.value("hookshot_notifications_total", channel=name, outcome=outcome)
                                                      for name, outcome in (("good", "delivered"), ("bad", "refused"), ("busy", "retried")))
               and not page.value("hookshot_notifications_pending", channel="good"))


@pytest.fixture(scope="module")
def eventful(tmp_path_factory):
    with receiver() as url, running(tmp_path_factory.mktemp("metrics"), EVENTFUL, ALLOWED + channels(url),
                                    secrets=f"read_token={TOKEN}\nteam_key={TEAM_KEY}\n") as host:
        have_everything_happen(host, url)
        yield host


def test_every_metric_is_there_once_everything_happened_in_both_formats(eventful):
    plain, openmetrics = scrape(eventful), scrape(eventful, is_openmetrics=True)
    assert plain.families() == set(METRICS)
    assert openmetrics.families() == {name.removesuffix("_total") if metric.kind == "counter" else name for name, metric in METRICS.items()}
    assert plain.values.keys() - openmetrics.values.keys() == set() and {plain.types[name] for name in METRICS} == {"counter", "gauge", "histogram"}
    for (name, labels), _ in plain.values.items():
        metric = METRICS.get(name) or METRICS[re.sub("_(bucket|sum|count)$", "", name)]
        assert {label for label, _ in labels} - {"le"} == set(metric.labels), name


def test_promtool_finds_nothing_to_say(eventful):
    done = subprocess.run([need("promtool"), "check", "metrics"], input=eventful.get("/metrics").body, capture_output=True, timeout=support.PATIENCE_S)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_each_thing_that_happened_is_counted_as_often_as_it_did(eventful):
    page = scrape(eventful)
    endings = {(labels["service"], labels["status"]): value for (name, pairs), value in page.values.items()
               if name == "deployment_total" and (labels := dict(pairs)) and value}
    assert endings == {("hold", "rolled_back"): 1, ("hold", "cancelled"): 1, ("hold", "succeeded"): 2, ("web", "succeeded"): 1, ("bad", "failed"): 1,
                       ("back", "rolled_back"): 1, ("worse", "rollback_failed"): 1, ("sick", "rolled_back"): 1, ("post", "rolled_back"): 1}
    rollbacks = {(labels["service"], labels["reason"]): value for (name, pairs), value in page.values.items()
                 if name == "rollback_total" and (labels := dict(pairs)) and value}
    assert rollbacks == {("hold", "interrupted"): 1, ("back", "deploy"): 1, ("worse", "deploy"): 1, ("sick", "healthcheck"): 1, ("post", "post_deploy"): 1}
    assert page.value("healthcheck_failures_total", service="sick") == 2
    assert {reason: page.value("hookshot_auth_failures_total", reason=reason) for reason in hookshot.AUTH_REASONS} == dict.fromkeys(hookshot.AUTH_REASONS, 1)
    assert page.value("hookshot_rate_limited_total") == 1 and page.value("hookshot_internal_errors_total") == 0
    assert (page.value("hookshot_reloads_total", outcome="succeeded"), page.value("hookshot_reloads_total", outcome="failed")) == (2, 1)
    failing = {name: page.value("hookshot_service_failing", service=name) for name in ("web", "hold", "bad", "back", "worse", "sick", "post", "team")}
    assert failing == {"web": 0, "hold": 0, "bad": 1, "back": 1, "worse": 1, "sick": 1, "post": 1, "team": 0}
    assert page.value("hookshot_notifications_pending", channel="good") == 0 and page.value("hookshot_notifications_pending", channel="busy") > 0
    assert page.value("deployment_queue_size") == 0 == page.sum("deployment_active")
    assert page.value("command_execution_duration_seconds_count", service="sick", phase="healthcheck", command="test") == 3


def test_gauges_say_what_is_so(eventful):
    page, config = scrape(eventful), hookshot.load_config("", "config.toml", [])
    python = ".".join(map(str, sys.version_info[:3]))
    assert page.value("hookshot_build_info", version=hookshot.__version__, python=python, sqlite=sqlite3.sqlite_version) == 1
    assert page.value("hookshot_ready") == 1
    assert page.value("hookshot_workers_alive") == page.value("hookshot_workers_configured") == config.server.worker_threads
    assert page.value("hookshot_start_time_seconds") <= time.time() + 1
    usage = shutil.disk_usage(eventful.data)
    assert 0 < page.value("hookshot_disk_free_bytes") <= usage.total
    size = sum(path.stat().st_size for path in (eventful.data / "state.db", eventful.data / "state.db-wal"))
    assert size / 4 < page.value("hookshot_database_size_bytes") < size * 4
    last = eventful.get("/services/web").json["last_deploy"]["completed_at"]
    assert hookshot.render_time(round(page.value("hookshot_service_last_deployment_timestamp_seconds", service="web") * 1000)) == last


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="this system has no /proc")
def test_the_figures_of_the_process_are_those_of_the_kernel(eventful):
    page, folder = scrape(eventful), f"/proc/{eventful.process.pid}"
    with open(f"{folder}/status") as file:
        status = dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)
    assert abs(page.value("process_threads") - int(status["Threads"])) <= 4
    assert abs(page.value("process_open_fds") - eventful.descriptors()) <= 8
    for name, field in (("process_resident_memory_bytes", "VmRSS"), ("process_virtual_memory_bytes", "VmSize")):
        assert 0.5 < page.value(name) / (int(status[field].split()[0]) * 1024) < 2
    with open(f"{folder}/limits") as file:
        assert page.value("process_max_fds") == next(int(line.split()[3]) for line in file if line.startswith("Max open files"))
    with open(f"{folder}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    ticks = os.sysconf("SC_CLK_TCK")
    spent = (int(fields[11]) + int(fields[12])) / ticks
    assert spent / 2 < page.value("process_cpu_seconds_total") <= spent
    uptime_s = float(open("/proc/uptime").read().split()[0])
    assert abs(page.value("process_start_time_seconds") - (time.time() - uptime_s + int(fields[19]) / ticks)) < 2.5


def test_head_gzip_and_the_headers_that_caches_need(eventful):
    answer = eventful.request("HEAD", "/metrics")
    assert answer.status == 200 and answer.body == b"" and int(answer.headers["content-length"]) > 1000
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", eventful.port, timeout=support.PATIENCE_S)) as link:
        for accept, is_openmetrics in (("*/*", False), (OPENMETRICS, True)):
            link.request("GET", "/metrics", headers={"Accept": accept, "Accept-Encoding": "gzip"})
            response = link.getresponse()
            content = response.read()
            assert response.getheader("Content-Encoding") == "gzip" and len(content) == int(response.getheader("Content-Length"))
            assert {"accept", "accept-encoding"} <= {word.strip().lower() for word in ",".join(response.headers.get_all("Vary")).split(",")}
            assert parse_page(gzip.decompress(content), is_openmetrics=is_openmetrics).families()
    assert "content-encoding" not in eventful.get("/metrics").headers


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_metrics_are_only_read(eventful, method):
    answer = eventful.request(method, "/metrics", b"")
    assert answer.status == 405 and answer.headers["allow"] == "GET, HEAD"


# --- labels

STATUSES = {str(kind.http) for kind in hookshot.ERRORS.values()} | {"200", "202", "304"}
PATHS = {route.pattern for route in hookshot.ROUTES} | {"other"}
METHODS = {route.method for route in hookshot.ROUTES} | {"HEAD", "other"}


def hostile_requests(word: str) -> list[bytes]:
    """Requests that carry a word wherever a caller can write one."""
    body = json.dumps({"service": word, "image": f"app:{word}", "deploy_id": word, "metadata": {word: word}}).encode()
    good = json.dumps({"service": "web", "image": f"app:{word}", "deploy_id": word, "metadata": {word: word}}).encode()

    def signed(content: bytes, path: str = "/deploy") -> bytes:
        return (f"POST {path} HTTP/1.1\r\nHost: {word}\r\nUser-Agent: {word}\r\nX-Request-ID: {word}\r\nContent-Length: {len(content)}\r\nConnection: close\r\n"
                f"X-Hub-Signature-256: {hookshot.sign(support.KEY.encode(), content)}\r\n\r\n").encode() + content

    lines = [f"{word.upper()} / HTTP/1.1", f"{word} /deploy HTTP/1.1", "get /health HTTP/1.1", f"GET /{word} HTTP/1.1", f"GET /status/{word} HTTP/1.1", f"GET /logs/{word}?tail={word} HTTP/1.1",
             f"GET /services/{word} HTTP/1.1", f"GET /deployments?service={word} HTTP/1.1", f"HEAD /{word}/{word} HTTP/1.1", f"PATCH /services/{word}/lock HTTP/1.1",
             f"GET /metrics?{word}={word} HTTP/1.1", f"GET /metrics/{word} HTTP/1.1", f"GET /%22%0A{word} HTTP/1.1", f"GET /events?service={word} HTTP/1.1",
             f"GET /requests/{word} HTTP/1.1", f"POST /webhook/{word} HTTP/1.1", f"OPTIONS * HTTP/1.1", f"GET http://{word}/health HTTP/1.1"]
    ordinary = [f"{line}\r\nHost: localhost\r\nUser-Agent: {word}\r\nX-Forwarded-For: {word}\r\nAccept: {word}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode() for line in lines]
    broken = [f"{word}\r\n\r\n".encode(), f"GET /{word}\r\n\r\n".encode(), f"GET /{word} HTTP/9.{word}\r\n\r\n".encode(), b"\x00\xff" + word.encode() + b"\r\n\r\n",
              f"GET /health HTTP/1.1\r\n{word}\r\n\r\n".encode(), f'G"}} /{word} HTTP/1.1\r\nHost: a\r\n\r\n'.encode()]
    return [*ordinary, *broken, signed(body), signed(good), signed(good, f"/services/{word}/rollback"), signed(body, f"/deployments/{word}/cancel")]


def test_nothing_that_a_caller_writes_makes_a_series(tmp_path):
    with running(tmp_path, service()) as host:
        def throw(word: str) -> Page:
            for content in hostile_requests(word):
                host.raw(content)
            host.wait(word)
            return scrape(host)

        throw("first0")
        # What the logs take is measured in the background, and there from then on.
        wait_until(lambda: ("hookshot_deployment_logs_bytes", ()) in scrape(host).values)
        first, chance = throw("second1"), random.Random(7)
        for _ in range(3):
            word = "x" + "".join(chance.choices("abcdefghijklmnopqrstuvwxyz0123456789", k=12))
            later = throw(word)
            assert later.values.keys() == first.values.keys()
            assert word.encode() not in host.get("/metrics").body
        assert later.sum("http_requests_total", path="other") > first.sum("http_requests_total", path="other")
        for (name, pairs), _ in later.values.items():
            labels = dict(pairs)
            if name.startswith("http_"):
                assert labels["path"] in PATHS and labels["method"] in METHODS and labels.get("status", "200") in STATUSES, labels
            assert labels.get("service", "web") == "web"
        # An id is told where it is asked for, as an exemplar; that is no series.
        assert {found.label[0] for found in scrape(host, is_openmetrics=True).exemplars} == {"deploy_id"}


def test_a_request_counts_once_under_its_route_with_the_time_it_took(tmp_path):
    with running(tmp_path, service()) as host:
        def page_after(method: str, path: str) -> tuple[Page, Page]:
            before = scrape(host)
            host.request(method, path)
            # An answer is counted before it goes out.
            return before, scrape(host)

        for method, path, pattern, status in (("GET", "/status/none", "/status/{id}", "404"), ("HEAD", "/health", "/health", "200"), ("GET", "/nowhere", "other", "404"),
                                              ("BREW", "/health", "other", "405"), ("GET", "/services", "/services", "200")):
            before, after = page_after(method, path)
            labels = {"method": method if method in METHODS else "other", "path": pattern}
            assert after.sum("http_requests_total", **labels, status=status) - before.sum("http_requests_total", **labels, status=status) == 1, (method, path)
            assert after.sum("http_request_duration_seconds_count", **labels) == after.sum("http_requests_total", **labels)
            assert after.sum("http_requests_total") - before.sum("http_requests_total") == 2, "the scrape itself and this request"


# --- where it is, and for whom

def test_metrics_path_moves_it_and_the_label_stays(tmp_path):
    with running(tmp_path, service(), '[monitoring]\nmetrics_path = "/internal/prometheus"\n') as host:
        assert host.get("/metrics").status == 404
        scrape(host, path="/internal/prometheus")
        assert scrape(host, path="/internal/prometheus").value("http_requests_total", method="GET", path="/metrics", status="200") == 1


def test_metrics_that_are_off_are_nowhere(tmp_path):
    with running(tmp_path, service(), "[monitoring]\nmetrics_enabled = false\n") as host:
        assert host.get("/metrics").status == host.request("HEAD", "/metrics").status == 404


def test_only_those_who_may_read_see_the_metrics(tmp_path):
    with running(tmp_path, service(), '[security]\nread_access = "token"\n', secrets=f"read_token={TOKEN}\n") as host:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {TOKEN}"}):
            answer = host.get("/metrics", **headers)
            assert answer.status == 401 and answer.headers["www-authenticate"] and b"deployment_total" not in answer.body
        page = scrape(host, Authorization=f"Bearer {TOKEN}")
        assert page.value("hookshot_auth_failures_total", reason="token") == 3


def test_scrapes_are_not_rate_limited(tmp_path):
    with running(tmp_path, service(), "[security]\nrate_limit = 2\n") as host:
        for _ in range(20):
            page = scrape(host)
        assert page.value("hookshot_rate_limited_total") == 0
        assert [host.get("/services").status for _ in range(3)] == [200, 200, 429]
        assert scrape(host).value("hookshot_rate_limited_total") == 1


# --- across restarts

COUNTED = (service() + service('["false"]', name="bad") + service('["false"]', name="back", tables=ROLLBACK + 'commands = [["true"]]\n')
           + service(HOLD, name="hold", tables=ROLLBACK + 'commands = [["true"]]\n')
           + service(name="sick", tables=HEALTH + 'commands = [["false"]]\n'))


def stored(page: Page) -> dict[Series, float]:
    """Return what goes on after a restart; without what is begun anew at 0."""
    return {key: value for key, value in page.values.items() if re.sub("_(bucket|sum|count)$", "", key[0]) in STORED and value}


def check_against_the_api(host: Host) -> None:
    """What is counted is what the other routes say."""
    page, found = scrape(host), collections.Counter()
    cursor = ""
    while cursor is not None:
        answer = host.get(f"/deployments?limit=200{cursor and '&cursor=' + urllib.parse.quote(cursor)}").json
        found.update((one["service"], one["status"]) for one in answer["deployments"])
        cursor = answer.get("next_cursor")
    for name in ("web", "bad", "back", "hold", "sick"):
        counts = {State(state): found[name, state] for state in hookshot.TERMINAL}
        assert {state: page.value("deployment_total", service=name, status=word) for state, word in hookshot.COUNT_OF_STATE.items()} == counts, name
        assert page.sum("deployment_total", service=name) == host.get(f"/services/{name}").json["stats"]["total_deploys"] + counts[State.CANCELLED]
        assert (page.value("deployment_duration_seconds_count", service=name, phase="total") or 0) == sum(counts.values()) - counts[State.CANCELLED]


def test_counters_go_on_after_a_restart_and_after_a_crash(tmp_path):
    with running(tmp_path, COUNTED) as host:
        for name in ("web", "web", "bad", "back", "sick"):
            host.wait(host.deploy("app:2", name, previous_image="app:1"))
        for end, signal_number in (("restart", signal.SIGTERM), ("crash", signal.SIGKILL)):
            before = scrape(host)
            check_against_the_api(host)
            host.stop(signal_number)
            host.start()
            after = scrape(host)
            assert stored(after) == stored(before) and len(stored(after)) > 50, end
            check_against_the_api(host)
            for name in ("web", "bad", "sick"):
                key = {"service": name}
                assert after.value("hookshot_service_failing", **key) == before.value("hookshot_service_failing", **key) == (name != "web")
                last = "hookshot_service_last_deployment_timestamp_seconds"
                assert after.value(last, **key) == before.value(last, **key) > 0
            host.wait(host.deploy())
            assert scrape(host).sum("deployment_total", service="web") == before.sum("deployment_total", service="web") + 1
            assert scrape(host, is_openmetrics=True).exemplars, "they come with what ends from now on"


def test_a_deployment_that_a_crash_interrupts_counts_once(tmp_path):
    with running(tmp_path, COUNTED) as host:
        deploy_id = host.deploy("app:2", "hold", previous_image="app:1")
        host.wait(deploy_id, "Deploying")
        page = scrape(host)
        assert (page.value("deployment_active", service="hold"), page.sum("deployment_total")) == (1, 0)
        waiting = host.deploy("app:3", "hold")
        assert scrape(host).value("deployment_queue_size") == 1
        host.kill()
        (tmp_path / "go").touch()
        host.start()
        host.wait(deploy_id), host.wait(waiting)
        page = scrape(host)
        assert page.value("rollback_total", service="hold", reason="interrupted") == 1
        assert page.value("deployment_total", service="hold", status="rolled_back") == 1 == page.value("deployment_total", service="hold", status="succeeded")
        check_against_the_api(host)


def deploy_until_it_breaks(host: Host) -> None:
    with contextlib.suppress(OSError, http.client.HTTPException):
        for name in itertools.cycle(("web", "bad", "back", "sick")):
            host.post({"service": name, "image": "app:2", "previous_image": "app:1"})


def counters_of(page: Page) -> dict[Series, float]:
    return {key: value for key, value in page.values.items() if page.types.get(key[0]) != "gauge"}


def check_growth(before: dict[Series, float], after: dict[Series, float]) -> None:
    assert not [key for key, value in before.items() if after.get(key, 0) < value]


@pytest.mark.parametrize("is_openmetrics", [False, True])
def test_no_counter_goes_back_under_load_nor_what_is_stored_over_a_crash(tmp_path, is_openmetrics):
    """A counter that goes back by a little is read as one that began anew: its whole value would be counted again."""
    with running(tmp_path, COUNTED) as host:
        for _ in range(2):
            client = threading.Thread(target=deploy_until_it_breaks, args=(host,))
            client.start()
            page, deadline = scrape(host), time.monotonic() + support.PATIENCE_S
            wanted = page.sum("deployment_total") + 20
            while page.sum("deployment_total") < wanted and time.monotonic() < deadline:
                before, page = page, scrape(host, is_openmetrics=is_openmetrics)
                check_growth(counters_of(before), counters_of(page))
            host.kill()
            client.join()
            host.start()
            check_growth(stored(page), stored(scrape(host)))
        wait_until(lambda: (page := scrape(host)).value("deployment_queue_size") == 0 == page.sum("deployment_active"))
        assert scrape(host).sum("deployment_total") >= 40
        check_against_the_api(host)


# --- when the disk or the database is in trouble

def test_a_full_disk_takes_no_figure_away(tmp_path):
    with small_disk(tmp_path / "disk", "16m") as disk, running(tmp_path / "host", service(), f'[storage]\ndata_dir = "{disk}/data"\n') as host:
        host.wait(host.deploy())
        before = scrape(host)
        with contextlib.suppress(OSError), open(disk / "filler", "wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))
        assert host.post({"service": "web", "image": "app:2"}).status == 507
        page = scrape(host, is_openmetrics=True)
        assert page.value("hookshot_disk_free_bytes") < 1 << 16 < before.value("hookshot_disk_free_bytes")
        assert len(page.families()) == len(before.families()) and page.value("deployment_total", service="web", status="succeeded") == 1


def test_a_locked_database_takes_no_figure_away(tmp_path):
    with running(tmp_path, service()) as host:
        host.wait(host.deploy())
        before = scrape(host)
        with contextlib.closing(sqlite3.connect(host.data / "state.db", isolation_level=None)) as db:
            db.execute("BEGIN EXCLUSIVE")
            page = scrape(host)
            db.execute("ROLLBACK")
        assert page.families() == before.families()


def test_figures_that_cannot_be_had_are_left_out_and_the_others_stay(tmp_path):
    with running(tmp_path, service()) as host:
        host.wait(host.deploy())
        before = scrape(host)
        shutil.rmtree(host.data)
        page = wait_until(lambda: "hookshot_disk_free_bytes" not in (page := scrape(host)).families() and page)
        missing = before.families() - page.families()
        assert missing <= {"hookshot_disk_free_bytes", "hookshot_database_size_bytes", "deployment_queue_size", "deployment_active", "hookshot_notifications_pending"}
        assert page.value("deployment_total", service="web", status="succeeded") == 1 and page.value("hookshot_internal_errors_total") == 0
        assert scrape(host, is_openmetrics=True).value("hookshot_ready") == 1


# --- a real Prometheus

@contextlib.contextmanager
def prometheus(folder, port: int) -> Iterator[str]:
    """Run Prometheus, scraping a server ten times a second; give its address."""
    folder.mkdir()
    own = support.free_port()
    (folder / "prometheus.yml").write_text("global: {scrape_interval: 100ms, scrape_timeout: 100ms}\nscrape_configs:\n- job_name: hookshot\n"
                                           f"  static_configs: [{{targets: ['127.0.0.1:{port}']}}]\n")
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen([need("prometheus"), f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
                                    f"--web.listen-address=127.0.0.1:{own}", "--enable-feature=exemplar-storage"],
                                   stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        yield f"http://127.0.0.1:{own}"
    finally:
        process.kill()
        process.wait()


def ask(url: str, path: str, **query: object) -> Any:
    """Return the data of an answer of Prometheus's API; nothing while there is none."""
    with contextlib.suppress(OSError):
        with urllib.request.urlopen(f"{url}/api/v1/{path}?{urllib.parse.urlencode(query)}", timeout=support.PATIENCE_S) as response:
            return json.load(response)["data"]
    return None


def value_of(url: str, expression: str) -> float | None:
    found = ask(url, "query", query=expression)
    return float(found["result"][0]["value"][1]) if found and found["result"] else None


def test_prometheus_scrapes_it_and_knows_the_deployments_and_an_example_of_each(tmp_path):
    with running(tmp_path / "host", service() + service('["false"]', name="bad")) as host, prometheus(tmp_path / "prometheus", host.port) as url:
        wait_until(lambda: value_of(url, "up") == 1)
        ids = {"web": [host.deploy(f"app:{number}") for number in range(7)], "bad": [host.deploy(f"app:{number}", "bad") for number in range(3)]}
        for deploy_id in itertools.chain(*ids.values()):
            host.wait(deploy_id)
        wait_until(lambda: value_of(url, "sum(deployment_total)") == 10)
        assert value_of(url, 'sum(deployment_total{service="bad",status="failed"})') == 3
        assert value_of(url, 'deployment_duration_seconds_count{service="web",phase="total"}') == 7
        assert value_of(url, 'deployment_duration_seconds_bucket{service="web",phase="total",le="+Inf"}') == 7
        (target,) = ask(url, "targets")["activeTargets"]
        assert (target["health"], target["lastError"]) == ("up", "")
        # Only OpenMetrics has them.
        span = {"start": time.time() - 600, "end": time.time() + 600}
        found = wait_until(lambda: ask(url, "query_exemplars", query="deployment_duration_seconds_bucket", **span))
        told = {one["seriesLabels"]["service"]: {exemplar["labels"]["deploy_id"] for exemplar in one["exemplars"]} for one in found}
        assert told.keys() == {"web", "bad"} and all(told[name] and told[name] <= set(ids[name]) for name in told)
        assert value_of(url, 'http_requests_total{method="GET",path="/metrics",status="200"}') > 0
        types = {name: about[0]["type"] for name, about in (ask(url, "targets/metadata") and ask(url, "metadata")).items()}
        assert (types["deployment_duration_seconds"], types["deployment"], types["deployment_active"]) == ("histogram", "counter", "gauge")
