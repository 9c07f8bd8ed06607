# SPDX-License-Identifier: MPL-2.0
"""What examples/ holds works: Prometheus takes the files, the alerts do what their tests say, and every name in them exists."""

import json
import re
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

import hookshot
from support import PATIENCE_S, ROOT, need

PROMETHEUS = ROOT / "examples" / "prometheus"
ALERTS = (PROMETHEUS / "alerts.yml").read_text(encoding="utf-8")
TEST_FILES = sorted(PROMETHEUS.glob("*_test.yml"))
DASHBOARD = json.loads((ROOT / "examples" / "grafana" / "hookshot.json").read_text(encoding="utf-8"))

# Labels that Prometheus adds to what it scrapes, and the metric that it makes.
SCRAPE_LABELS = {"job", "instance"}
SUFFIXES = {"histogram": ("_bucket", "_sum", "_count")}
TOKEN = re.compile(r"""(?P<text>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')|(?P<range>\[[^\]]*\])|(?P<number>[0-9][0-9a-zA-Z.]*)"""
                   r"|(?P<word>[a-zA-Z_:][\w:]*)|(?P<sign>[^\s\w])")
WORDS = {"and", "or", "unless", "offset", "bool", "by", "without", "on", "ignoring", "group_left", "group_right", "inf", "nan"}


# --- reading


def promtool(*arguments: object) -> str:
    """Run promtool, which must find nothing wrong; return what it says."""
    done = subprocess.run([need("promtool"), *map(str, arguments)], cwd=PROMETHEUS, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                          timeout=4 * PATIENCE_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def read_values(text: str, key: str) -> list[str]:
    """Return the values of a key in the plain YAML of the examples: what stands in its line, or the deeper block below."""
    found = []
    for match in re.finditer(rf"^( *)(?:- )?{key}:(?: (?P<line>[^|>\n].*)| [|>]-?\n(?P<block>(?:\1  +.*\n|\n)+))", text, re.MULTILINE):
        found.append((match["line"] or match["block"]).strip().strip("'"))
    return found


def read_rules() -> dict[str, str]:
    """Return each alert with the text of its rule."""
    parts = re.split(r"^ +- alert: (\w+)\n", ALERTS, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def walk_panels(panels: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for panel in panels:
        yield panel
        yield from walk_panels(panel.get("panels", []))


PANELS = list(walk_panels(DASHBOARD["panels"]))


def fill_in(expr: str) -> str:
    """Put something in place of the dashboard's variables, as Grafana does before it asks."""
    return re.sub(r"\$__(?:rate_interval|range|interval)|\$\{?(?:instance|service)\}?", lambda match: "5m" if match[0].startswith("$__") else ".*", expr)


def dashboard_queries() -> dict[str, str]:
    queries = {f"{panel['title']}, {target['refId']}": fill_in(target["expr"]) for panel in PANELS for target in panel.get("targets", [])}
    queries |= {mark["name"]: fill_in(mark["expr"]) for mark in DASHBOARD["annotations"]["list"] if "expr" in mark}
    return queries | {f"variable {variable['name']}": re.sub(r"label_values\((.*), (\w+)\)", r"sum by (\2) (\1)", fill_in(variable["query"]["query"]))
                      for variable in DASHBOARD["templating"]["list"] if variable["type"] == "query"}


QUERIES = dashboard_queries()
EXPRESSIONS = {f"alert {name}": read_values(rule, "expr")[0] for name, rule in read_rules().items()} | QUERIES | {
    f"{file.name}: {series}": series for file in TEST_FILES for series in read_values(file.read_text(encoding="utf-8"), "series")}


# --- names in PromQL


def labels_of(name: str) -> set[str] | None:
    """Return the labels of a time series as the server makes and Prometheus keeps it, or None if there is no such series."""
    if name == "up":
        return SCRAPE_LABELS
    for metric, row in hookshot.METRICS.items():
        for suffix in SUFFIXES.get(row.kind, ("",)):
            if name == metric + suffix:
                return {*row.labels, *SCRAPE_LABELS, *(["le"] if suffix == "_bucket" else [])}
    return None


def words_between(tokens: list[tuple[str, str]], start: int, end: str) -> tuple[list[str], int]:
    """Return the words, and what follows, from `start` to the sign that closes."""
    stop = next(index for index in range(start, len(tokens)) if tokens[index][1] == end)
    return [text for kind, text in tokens[start:stop] if kind == "word"], stop + 1


def end_of_group(tokens: list[tuple[str, str]], start: int) -> int:
    depth = 0
    for index in range(start, len(tokens)):
        depth += {"(": 1, ")": -1}.get(tokens[index][1], 0)
        if depth == 0:
            return index + 1
    raise AssertionError("a bracket stays open")


def check_names(expr: str) -> list[str]:
    """Return what is wrong with the names in an expression: unknown metrics, and labels that they do not have."""
    tokens = [(match.lastgroup or "", match[0]) for match in TOKEN.finditer(expr)]
    problems: list[str] = []
    series: list[tuple[int, str]] = []
    lists: list[tuple[str, list[str], int, int]] = []
    index = 0
    while index < len(tokens):
        kind, text = tokens[index]
        following = tokens[index + 1][1] if index + 1 < len(tokens) else ""
        index += 1
        if text in {"by", "without", "on", "ignoring", "group_left", "group_right"} and following == "(":
            labels, index = words_between(tokens, index + 1, ")")
            if text == "by":
                # sum(x) by (y) is PromQL too, but then this check would have to look back.
                assert tokens[index][1] == "(", f"write the labels before what they group: {expr}"
                lists.append((text, labels, index, end_of_group(tokens, index)))
            else:
                lists.append((text, labels, 0, len(tokens)))
        elif kind == "word" and text.lower() not in WORDS and following not in {"(", "by", "without"}:
            series.append((index, text))
            if (known := labels_of(text)) is None:
                problems.append(f"there is no metric {text}")
            if following == "{":
                labels, index = words_between(tokens, index + 1, "}")
                problems += [f"{text} has no label {label}" for label in labels if known is not None and label not in known]
    for word, labels, start, end in lists:
        inside = [labels_of(name) or set() for place, name in series if start <= place < end]
        every = all if word == "by" else any
        problems += [f"{word} ({label}): what it is about has no such label" for label in labels if not every(label in known for known in inside)]
    return problems if series else [*problems, "no metric at all"]


def test_names_are_told_from_functions_labels_and_texts():
    """The check itself: it must see what it is for."""
    assert check_names('sum by (service) (rate(deployment_total{status="nonsense{x}"}[5m])) / 2e3 > bool 1') == []
    assert check_names('histogram_quantile(0.9, sum by (le, phase) (rate(deployment_duration_seconds_bucket[1h] offset 1d)))') == []
    assert check_names("deployment_totals > 0") == ["there is no metric deployment_totals"]
    assert check_names("deployment_duration_seconds > 0") == ["there is no metric deployment_duration_seconds"]
    assert check_names('deployment_total{state="x"}') == ["deployment_total has no label state"]
    assert check_names("sum by (phase) (deployment_active)") == ["by (phase): what it is about has no such label"]
    assert check_names("sum by (service) (deployment_active + deployment_queue_size)") == ["by (service): what it is about has no such label"]
    assert check_names("up == 0 unless on (host) deployment_active") == ["on (host): what it is about has no such label"]
    assert check_names("vector(1)") == ["no metric at all"]


@pytest.mark.parametrize("place", EXPRESSIONS)
def test_every_metric_and_label_exists(place):
    assert check_names(EXPRESSIONS[place]) == []


def test_every_metric_of_ours_is_shown_or_watched():
    """What process_* tells is known everywhere; what is ours is nowhere else."""
    text = "\n".join([*QUERIES.values(), *read_values(ALERTS, "expr")])
    ours = {name for name in hookshot.METRICS if not name.startswith("process_")}
    assert {name for name in ours if not re.search(rf"\b{name}(_bucket|_sum|_count)?\b", text)} == set()


# --- Prometheus


def test_prometheus_takes_the_configuration_and_the_alerts():
    said = promtool("check", "config", "prometheus.yml")
    assert f"{len(read_rules())} rules found" in said


def test_prometheus_takes_what_is_commented_out(tmp_path):
    """An operator who removes the signs has a token, TLS and Alertmanager. A sign and one space are prose."""
    text = (PROMETHEUS / "prometheus.yml").read_text(encoding="utf-8")
    plain = re.sub(r"^( *)#(?=\S|  )", r"\1", text, flags=re.MULTILINE)
    assert all(f"\n{line}" in plain for line in ("alerting:", "    authorization:", "      credentials_file:", "    tls_config:", "      key_file:"))
    (tmp_path / "prometheus.yml").write_text(plain)
    promtool("check", "config", "--syntax-only", tmp_path / "prometheus.yml")


def test_the_alerts_do_what_their_tests_say():
    assert promtool("test", "rules", *TEST_FILES).count("SUCCESS") == len(TEST_FILES)


@pytest.mark.parametrize("alert", read_rules())
def test_every_alert_is_seen_to_fire_and_not_to_fire(alert):
    text = "\n".join(file.read_text(encoding="utf-8") for file in TEST_FILES)
    expected = re.findall(rf"^ +alertname: {alert}\n +exp_alerts:(.*)\n", text, re.MULTILINE)
    assert "" in expected and " []" in expected


@pytest.mark.parametrize("alert", read_rules())
def test_every_alert_says_how_bad_it_is_and_what_to_do(alert):
    rule = read_rules()[alert]
    assert read_values(rule, "severity")[0] in {"critical", "warning"}
    assert "$labels.instance" in read_values(rule, "summary")[0]
    assert len(read_values(rule, "description")[0].split()) > 15
    # A label that the expression has lost would leave a hole in the sentence; the tests of the alerts have the whole texts.
    known = set().union(*(labels_of(name) or () for name in re.findall(r"\w+", read_values(rule, "expr")[0])))
    assert set(re.findall(r"\$labels\.(\w+)", rule)) <= known


# --- Grafana


def test_the_queries_of_the_dashboard_are_promql(tmp_path):
    rules = tmp_path / "rules.json"
    # JSON is YAML.
    rules.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": [
        {"record": f"query:{number}", "expr": expr} for number, expr in enumerate(QUERIES.values())]}]}))
    assert not re.search(r"\$", rules.read_text()), "a variable that fill_in() does not know"
    assert f"{len(QUERIES)} rules found" in promtool("check", "rules", rules)


def test_every_panel_has_its_own_id_title_and_data_source():
    ids = [panel["id"] for panel in PANELS]
    assert len(set(ids)) == len(ids)
    assert len(QUERIES) == sum(len(panel.get("targets", [])) for panel in PANELS) + 3, "two queries have one name"
    source = {"type": "prometheus", "uid": "${datasource}"}
    for panel in PANELS:
        if panel["type"] != "row":
            assert panel["datasource"] == source and panel["targets"] and all(target["datasource"] == source for target in panel["targets"])
            letters = [target["refId"] for target in panel["targets"]]
            assert len(set(letters)) == len(letters)


def test_no_panel_covers_another_or_leaves_the_page():
    taken: dict[tuple[int, int], str] = {}
    for panel in PANELS:
        place = panel["gridPos"]
        assert place["w"] > 0 and place["h"] > 0 and place["x"] >= 0 and place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken, f"{panel['title']} covers {taken[x, y]}"
                taken[x, y] = panel["title"]


def test_the_dashboard_is_of_no_installation():
    """An import must make a new dashboard, ask for the data source, and find every variable that a query uses."""
    assert DASHBOARD["id"] is None and "__inputs" not in DASHBOARD
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource" and variables["datasource"]["query"] == "prometheus"
    text = json.dumps(DASHBOARD)
    assert {name for name in re.findall(r"\$\{?([a-z]\w*)", text) if not name.startswith("__")} == variables.keys()
    # Every label that a legend names is left by its query.
    for panel in PANELS:
        for target in panel.get("targets", []):
            for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
                grouped = re.search(r"by \(([^)]*)\)", target["expr"])
                assert label in (re.findall(r"\w+", grouped[1]) if grouped else ["instance"]), panel["title"]
