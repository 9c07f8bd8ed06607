# SPDX-License-Identifier: MPL-2.0
"""Reloads under load, half of them with broken files: requests lost, deployments disturbed. And how long a reload takes."""

import collections
import json
import pathlib
import random
import re
import signal
import sys
import threading
import time

from common import Link, announce, make_host, percentile, service, signed_request
from support import Host, wait_until

RELOADS, CLIENTS, SERVICES, MANY = 100, 6, 4, 200
SAY = '["sh", "-c", "echo $HOOKSHOT_DEPLOY_ID $GENERATION >> runs"]'
DAMAGES = {
    "cut": lambda text: text[: len(text) // 2 + 5], "empty": lambda text: "", "wrong": lambda text: text + "[nonsense]\n",
    "gone": lambda text: None, "unknown program": lambda text: text.replace('"sh"', '"no-such-program"', 1)}


def services_of(generation: object, number: int = SERVICES) -> str:
    return "".join(service(SAY, name=f"s{index}", tables=f'[service.env]\nGENERATION = "{generation}"\n') for index in range(number))


def reload(host: Host) -> tuple[str, float]:
    """Send SIGHUP; return the outcome and the seconds until it is there."""
    path = host.data / "reload.json"
    before, began = json.loads(path.read_text())["number"], time.monotonic()
    host.process.send_signal(signal.SIGHUP)
    record = wait_until(lambda: (found := json.loads(path.read_text()))["number"] > before and found["outcome"] != "reading" and found)
    return record["outcome"], time.monotonic() - began


def put(path: pathlib.Path, text: str | None) -> None:
    """Replace a file in one step, as it ought to be done."""
    if text is None:
        path.unlink()
        return
    beside = path.with_suffix(".new")
    beside.write_text(text)
    beside.rename(path)


class Load:
    """Clients that deploy all the time, each waiting for the end of what it asked for, and one that reads."""

    def __init__(self, host: Host):
        self.host, self.over, self.lost = host, threading.Event(), []
        # The newest generation known to be in force; the newest that may be.
        self.certain = self.possible = 0
        self.asked: dict[str, tuple[int, int]] = {}
        self.disturbed: list[str] = []
        self.reads = 0
        self.threads = [threading.Thread(target=self.deploy, args=(number,)) for number in range(CLIENTS)] + [threading.Thread(target=self.read)]
        for thread in self.threads:
            thread.start()

    def deploy(self, number: int) -> None:
        link, count = Link(self.host.port, source=f"127.0.0.{number + 1}"), 0
        while not self.over.is_set():
            count += 1
            deploy_id, low = f"c{number}-{count}", self.certain
            try:
                link.send(signed_request({"service": f"s{count % SERVICES}", "image": "app:1", "deploy_id": deploy_id}, query="?wait=60"))
                status, body = link.receive()
            except OSError as error:
                self.lost.append(f"{deploy_id}: {error}")
                link = Link(self.host.port, source=f"127.0.0.{number + 1}")
                continue
            self.asked[deploy_id] = low, self.possible
            if status != 200 or json.loads(body)["status"] != "Succeeded":
                self.disturbed.append(f"{deploy_id}: {status} {body[:200]!r}")

    def read(self) -> None:
        link = Link(self.host.port, source="127.0.0.99")
        while not self.over.wait(0.005):
            link.send(b"GET /services HTTP/1.1\r\nHost: localhost\r\n\r\n")
            self.reads += 1
            if (status := link.receive()[0]) != 200:
                self.lost.append(f"GET /services: {status}")

    def stop(self) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join()


def resident_mb(host: Host) -> float:
    return int(re.search(r"VmRSS:\s+(\d+)", pathlib.Path(f"/proc/{host.process.pid}/status").read_text())[1]) / 1024


def measure_load() -> bool:
    host = make_host(services_of(0), '[server]\nmax_connections = 1000\n').start()
    load, times, outcomes = Load(host), [], collections.Counter()
    choice, before_mb, began = random.Random(5), resident_mb(host), time.monotonic()
    for number in range(1, RELOADS + 1):
        if number % 2:
            broken = choice.choice([*DAMAGES.values()])(services_of("broken"))
            put(host.services, broken and broken.replace("@", str(host.folder)))
        else:
            load.possible = number
            put(host.services, services_of(number).replace("@", str(host.folder)))
        outcome, seconds = reload(host)
        outcomes[outcome] += 1
        times.append(seconds)
        assert outcome == ("refused" if number % 2 else "taken"), (number, outcome)
        load.certain = load.possible
    took, after_mb = time.monotonic() - began, resident_mb(host)
    load.stop()
    runs = collections.Counter()
    wrong = []
    for line in (host.folder / "runs").read_text().splitlines():
        deploy_id, generation = line.split()
        runs[deploy_id] += 1
        low, high = load.asked[deploy_id]
        if generation == "broken" or not low <= int(generation) <= high:
            wrong.append(f"{deploy_id}: {generation}, not {low} to {high}")
    not_once = [deploy_id for deploy_id in load.asked if runs[deploy_id] != 1]
    host.stop()
    print(f"  {RELOADS} reloads in {took:.1f} s ({dict(outcomes)}), {len(load.asked)} deployments and {load.reads} reads meanwhile")
    print(f"  requests lost {len(load.lost)}, deployments disturbed {len(load.disturbed)}, not run exactly once {len(not_once)}, "
          f"with a configuration that was not theirs {len(wrong)}")
    print(f"  SIGHUP to outcome: median {percentile(times, 0.5) * 1000:.0f} ms, longest {max(times) * 1000:.0f} ms "
          "(100 ms of them waiting for files that have just been written)")
    print(f"  resident memory {before_mb:.1f} MB before, {after_mb:.1f} MB after", flush=True)
    for line in [*load.lost, *load.disturbed, *wrong, *not_once][:10]:
        print(f"    {line}")
    return not (load.lost or load.disturbed or not_once or wrong)


def measure_many() -> None:
    host = make_host(services_of(0, MANY)).start()
    same = [reload(host)[1] for _ in range(10)]
    changed = []
    for number in range(10):
        put(host.services, services_of(number + 1, MANY).replace("@", str(host.folder)))
        time.sleep(0.2)
        changed.append(reload(host)[1])
    host.stop()
    print(f"  {MANY} services: nothing changed {percentile(same, 0.5) * 1000:.0f} ms (longest {max(same) * 1000:.0f}), "
          f"every service changed {percentile(changed, 0.5) * 1000:.0f} ms (longest {max(changed) * 1000:.0f})", flush=True)


if __name__ == "__main__":
    announce(f"{RELOADS} reloads, half of them with broken files, while {CLIENTS} clients deploy {SERVICES} services; reloads with {MANY} services")
    is_good = measure_load()
    measure_many()
    sys.exit(not is_good)
