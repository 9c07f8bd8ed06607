# SPDX-License-Identifier: MPL-2.0
"""METRICS: every fact is counted once, in text that Prometheus reads, from closed sets of labels, across restarts."""

import collections
import contextlib
import gzip
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
        assert counted(hookshot.Notified("chat", outcome, "d-1", "msg_1", "m")) == {
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
