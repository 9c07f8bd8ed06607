# SPDX-License-Identifier: MPL-2.0
"""docs/scaling.md: what its reader is to run runs, its configurations carry a server, and its default figures are the program's."""

import re
import sys

import pytest

import hookshot
from pages import PAGES, read_blocks, run_script, script_of
from support import ROOT, program, running, service

[PAGE] = [page for page in PAGES if page.name == "scaling.md"]
TEXT = PAGE.read_text(encoding="utf-8")
# Records what it is called with; the roll-out of v2 does not come to an end.
KUBECTL = """#!/bin/sh
echo "$*" >> "$(dirname "$0")/calls"
case "$*" in
  set*) echo "$4" > "$(dirname "$0")/image" ;;
  rollout*) ! grep -q ':v2$' "$(dirname "$0")/image" ;;
esac
"""


def configuration(word: str) -> str:
    """Return the one block of TOML that holds a word."""
    [block] = [block for block in read_blocks("toml") if block.page == PAGE and word in block.text]
    return block.text


def test_the_larger_configuration_starts_as_many_workers_as_it_says(tmp_path):
    with running(tmp_path, service(), configuration("worker_threads")) as host:
        assert b"\nhookshot_workers_alive 16\n" in host.get("/metrics").body


def test_the_throughput_of_this_host_is_measured_by_paste(tmp_path):
    done = run_script(f"cd '{ROOT}'\n" + script_of("scaling-bench").replace("BENCH_SECONDS=2", "BENCH_SECONDS=0.5"), tmp_path)
    assert done.returncode == 0 and re.search(r"10 services +\d+/s", done.stdout), done.stdout


def deploy_to_both(tmp_path, second_works: bool = True, first_works: bool = True):
    """Run the loop over two hosts, twice; return what was said, and how many deployments each has."""
    works = {True: '["true"]', False: '["false"]'}
    with running(tmp_path / "one", service(works[first_works])) as one, running(tmp_path / "two", service(works[second_works])) as two:
        script = script_of("scaling-hosts").replace("127.0.0.1:8081", f"127.0.0.1:{one.port}").replace("127.0.0.1:8082", f"127.0.0.1:{two.port}")
        head = f'export HOOKSHOT_CONFIG="{one.config}" HOOKSHOT_SERVICES="{one.services}"\nhookshot() {{ "{sys.executable}" "{program()[1]}" "$@"; }}\n'
        (tmp_path / "shell").mkdir()
        done = run_script(f"{head}{script}deploy_everywhere web app:1 release-1\n", tmp_path / "shell")
        return done, [len(host.get("/deployments").json["deployments"]) for host in (one, two)]


def test_a_loop_deploys_to_each_host_once_however_often_it_runs(tmp_path):
    done, counts = deploy_to_both(tmp_path)
    assert done.returncode == 0 and counts == [1, 1], done.stdout
    assert done.stdout.count("known already") == 2


def test_a_loop_stops_at_the_first_host_that_does_not_succeed(tmp_path):
    done, counts = deploy_to_both(tmp_path, first_works=False)
    assert done.returncode == hookshot.EXIT_OF_STATE[hookshot.State.FAILED] and counts == [1, 0], done.stdout


def test_the_service_for_kubernetes_calls_kubectl_and_goes_back(tmp_path):
    (tmp_path / "kubectl").write_text(KUBECTL)
    (tmp_path / "kubectl").chmod(0o755)
    text = configuration("kubectl").replace('working_dir = "/srv"', f'working_dir = "{tmp_path}"\nenv = {{ PATH = "{tmp_path}:/usr/bin:/bin" }}')
    text = text.replace("initial_delay = 0", "initial_delay = 0\ninterval = 0")
    with running(tmp_path / "host", text) as host:
        for image, state in (("registry.example/web:v1", "Succeeded"), ("registry.example/web:v2", "RolledBack")):
            assert host.wait(host.deploy(image))["status"] == state, host.get("/deployments").body
    status = "rollout status deployment/web --timeout=5m"
    assert (tmp_path / "calls").read_text().splitlines() == [
        f"set image deployment/web web=registry.example/web:{tag}" if tag else status for tag in ("v1", "", "v2", "", "v1", "")]


DEFAULTS = [("server.worker_threads", "4"), ("limits.max_concurrent_total", "10"), ("limits.max_concurrent_per_service", "1"),
            ("limits.max_queue_per_service", "20"), ("limits.lock_timeout", "3600"), ("limits.command_timeout", "300"), ("limits.deployment_timeout", "1800"),
            ("security.rate_limit", "100"), ("server.max_connections", "256"), ("storage.retention.successful_deploys", "100"),
            ("limits.max_output", str(10 << 20))]


@pytest.mark.parametrize("key, value", DEFAULTS)
def test_a_key_that_the_page_turns_has_the_default_that_it_names(key, value):
    found = hookshot.load_config("", "config.toml", [])
    for name in key.split("."):
        found = getattr(found, name)
    assert str(found) == value and f"`{key}`" in TEXT
