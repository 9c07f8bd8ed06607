# SPDX-License-Identifier: MPL-2.0
"""The log in files of its own and on the journal: no line lost or split, and never in the way of a deployment."""

import contextlib
import json
import os
import re
import signal
import stat
import subprocess
import threading
import time

import pytest

import hookshot
from support import Host, running, service, wait_until

LINE = re.compile(r'\{"timestamp": "[0-9T:.-]{23}Z", "level": "\w+", "event": "\w+", .*\}')


def files_in(folder) -> list:
    """Return the log's files, the newest first."""
    return sorted(folder.iterdir(), key=lambda path: int(path.suffix[1:]) if path.suffix[1:].isdigit() else 0)


@contextlib.contextmanager
def logging_into(folder, *, max_size=64 << 10, max_files=1000, style="json", level="info", stream=None):
    """Give a Log that writes into `folder`, and to a file of its own in place of stderr."""
    folder.mkdir(exist_ok=True)
    descriptor = os.open(stream or folder.parent / "stream", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    log = hookshot.Log(level, style, descriptor)
    log.set_up(level, style, hookshot.Masker(), hookshot.LogFiles(str(folder), max_size, max_files))
    yield log
    os.close(descriptor)


# --- rotation

def test_no_line_is_lost_or_split_while_threads_write(tmp_path):
    folder = tmp_path / "log"
    with logging_into(folder) as log:
        def write(number: int) -> None:
            for turn in range(1000):
                log.write("info", "started", "x" * (turn % 300), thread=number, turn=turn)

        threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    files = files_in(folder)
    assert len(files) > 10 and all(path.stat().st_size <= 64 << 10 for path in files)
    lines = [line for path in reversed(files) for line in path.read_text().splitlines()]
    assert all(LINE.fullmatch(line) for line in lines) and log.lines_lost == 0
    found = [(line["thread"], line["turn"]) for line in map(json.loads, lines)]
    assert sorted(found) == [(number, turn) for number in range(8) for turn in range(1000)]
    for number in range(8):
        assert [turn for thread, turn in found if thread == number] == list(range(1000))


@pytest.mark.parametrize("max_files", [1, 2, 3])
def test_the_oldest_file_gives_way(tmp_path, max_files):
    with logging_into(tmp_path / "log", max_files=max_files) as log:
        for turn in range(3000):
            log.write("info", "started", "x" * 200, turn=turn)
    files = files_in(tmp_path / "log")
    assert [path.name for path in files] == ["hookshot.log", *(f"hookshot.log.{number}" for number in range(1, max_files))]
    turns = [json.loads(line)["turn"] for path in reversed(files) for line in path.read_text().splitlines()]
    assert turns == list(range(turns[0], 3000)) and turns[0] > 0


def test_fewer_files_are_kept_once_the_configuration_says_so(tmp_path):
    folder = tmp_path / "log"
    with logging_into(folder, max_files=6) as log:
        for count, max_files in ((6, 6), (2, 2), (1, 1)):
            log.set_up("info", "json", hookshot.Masker(), hookshot.LogFiles(str(folder), 64 << 10, max_files))
            for _ in range(3000):
                log.write("info", "started", "x" * 100)
            assert len(files_in(folder)) == count


def test_a_line_larger_than_a_file_has_one_of_its_own(tmp_path):
    with logging_into(tmp_path / "log") as log:
        for text in ("small", "x" * (100 << 10), "small"):
            log.write("info", "started", text)
    assert [len(path.read_text().splitlines()) for path in files_in(tmp_path / "log")] == [1, 1, 1]


@pytest.mark.parametrize("act", [
    lambda path: path.rename(path.with_suffix(".moved")), lambda path: path.unlink(), lambda path: path.write_text("")],
    ids=["renamed", "removed", "emptied"])
def test_another_program_may_take_the_file(tmp_path, act):
    with logging_into(tmp_path / "log") as log:
        log.write("info", "started", "before")
        act(tmp_path / "log" / "hookshot.log")
        log.write("info", "started", "after")
    assert [json.loads(line)["message"] for line in (tmp_path / "log" / "hookshot.log").read_text().splitlines()] == ["after"]


def test_a_link_in_the_files_place_is_not_followed(tmp_path):
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "hookshot.log").symlink_to(tmp_path / "victim")
    with logging_into(tmp_path / "log") as log:
        log.write("info", "started", "hello")
    assert not (tmp_path / "victim").exists() and log.lines_lost == 1
    told = [json.loads(line) for line in (tmp_path / "stream").read_text().splitlines()]
    assert [line["event"] for line in told] == ["started", "log_file_failed"] and str(tmp_path / "log") in told[1]["message"]


def test_a_file_has_whole_times_whatever_the_terminal_shows(tmp_path):
    with logging_into(tmp_path / "log", style="pretty") as log:
        log.write("warning", "started", "hello", deploy_id="d-1")
    text = (tmp_path / "log" / "hookshot.log").read_text()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z WARNING hello deploy_id=d-1\n", text)


# --- a disk that is full

@contextlib.contextmanager
def small_disk(folder):
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "none", folder], capture_output=True).returncode:
        pytest.skip("missing: the right to mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_costs_lines_and_says_how_many(tmp_path):
    with small_disk(tmp_path / "log") as disk, logging_into(disk, max_size=1 << 20, stream=tmp_path / "stream") as log:
        for turn in range(2000):
            log.write("info", "started", "x" * 100, turn=turn)
        lost = log.lines_lost
        assert 0 < lost < 2000
        # Only whole lines are there, however little the last piece of the disk was.
        text = (disk / "hookshot.log").read_text()
        assert text.endswith("\n") and all(LINE.fullmatch(line) for line in text.splitlines())
        os.truncate(disk / "hookshot.log", 0)
        log.write("info", "started", "room again")
        lines = [json.loads(line) for line in (text + (disk / "hookshot.log").read_text()).splitlines()]
        assert [line["event"] for line in lines[-2:]] == ["log_lost", "started"] and log.lines_lost == lost
        # The last room of the disk may take the short line that tells, and then not the next one.
        assert sum(int(line["message"].rpartition(" ")[2]) for line in lines if line["event"] == "log_lost") == lost
    told = [json.loads(line) for line in (tmp_path / "stream").read_text().splitlines()]
    assert len([line for line in told if line["event"] == "started"]) == 2001
    assert len([line for line in told if line["event"] == "log_file_failed"]) == 1


def test_a_full_log_disk_stops_no_deployment(tmp_path):
    with small_disk(tmp_path / "log") as disk:
        (disk / "filler").write_bytes(b"x" * (120 << 10))
        with running(tmp_path / "host", service(), f'[logging]\ndirectory = "{disk}"\nlevel = "debug"\n') as host:
            ended = [host.wait(host.deploy())["status"] for _ in range(20)]
            assert ended == ["Succeeded"] * 20
            lost = re.search(rb"^hookshot_log_lines_lost_total (\d+)$", host.get("/metrics").body, re.MULTILINE)
            assert int(lost[1]) > 0 and b"log_file_failed" in host.output.read_bytes()
            (disk / "filler").unlink()
            host.wait(host.deploy())
            wait_until(lambda: b"log_lost" in (disk / "hookshot.log").read_bytes())


# --- the server

def test_a_server_writes_both_and_makes_the_directory(tmp_path):
    folder = tmp_path / "deep" / "log"
    with running(tmp_path / "host", service(), f'[logging]\ndirectory = "{folder}"\n') as host:
        host.wait(host.deploy(deploy_id="d-1"))
        log = folder / "hookshot.log"
        wait_until(lambda: log.read_bytes() == host.output.read_bytes())
        assert stat.S_IMODE(folder.stat().st_mode) == 0o750 and stat.S_IMODE(log.stat().st_mode) == 0o640
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        assert {line["deploy_id"] for line in lines if line["event"].startswith("deploy_")} == {"d-1"}
        asked = {line["request_id"] for line in lines if line.get("deploy_id")}
        assert len(asked) == 1


def test_reload_begins_and_ends_the_files(tmp_path):
    folder = tmp_path / "log"
    with running(tmp_path / "host", service()) as host:
        for directory, count in ((f'[logging]\ndirectory = "{folder}"\n', 1), ("", 1), (f'[logging]\ndirectory = "{folder}"\n', 2)):
            before = host.output.read_bytes().count(b'"reloaded"')
            host.write(service(), directory)
            host.process.send_signal(signal.SIGHUP)
            wait_until(lambda: host.output.read_bytes().count(b'"reloaded"') > before)
            wait_until(lambda: (folder / "hookshot.log").exists() and (folder / "hookshot.log").read_bytes().count(b'"reloaded"') == count)


def test_a_directory_that_cannot_be_is_a_problem_before_anything_starts(tmp_path):
    host = Host(tmp_path, service(), '[logging]\ndirectory = "/dev/null/log"\n')
    done = host.cli("run")
    assert done.returncode == 78 and "logging.directory: /dev/null is not a directory" in done.stderr and not host.data.exists()


# --- the journal

def journal_of(tmp_path, style: str) -> list[str]:
    """Return the lines of a server whose stderr says that it is the journal."""
    host = Host(tmp_path, service('["false"]'), f'[logging]\nformat = "{style}"\n')
    with open(host.output, "ab") as file:
        status = os.fstat(file.fileno())
    try:
        host.start(env={"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}, wait=False)
        wait_until(lambda: b"listens on" in host.output.read_bytes())
        host.port = int(re.search(rb"http://127\.0\.0\.1:(\d+)", host.output.read_bytes())[1])
        host.wait(host.deploy())
        wait_until(lambda: b"Failed" in host.output.read_bytes())
    finally:
        host.close()
    return host.output.read_text().splitlines()


def test_on_the_journal_json_has_a_priority_and_no_time(tmp_path):
    lines = journal_of(tmp_path, "json")
    priorities = {"info": "<6>", "warning": "<4>", "error": "<3>"}
    for line in lines:
        fields = json.loads(line[3:])
        assert line[:3] == priorities[fields["level"]] and "timestamp" not in fields
    assert any(line.startswith("<3>") and '"Failed"' in line for line in lines)


def test_on_the_journal_text_has_a_priority_and_no_time(tmp_path):
    lines = journal_of(tmp_path, "pretty")
    assert all(re.match(r"<[346]>(INFO   |WARNING|ERROR  ) \S", line) for line in lines) and len(lines) >= 4


def test_a_stream_that_only_claims_to_be_the_journal_is_none(tmp_path):
    """A child inherits JOURNAL_STREAM, and its stderr may lead elsewhere."""
    with running(tmp_path, service()) as host:
        pass
    host.start(env={"JOURNAL_STREAM": "1:1"})
    host.close()
    assert all(LINE.fullmatch(line) for line in host.output.read_text().splitlines())


# --- times

def preloaded() -> str:
    """Return libfaketime, or skip."""
    for folder in ("/usr/lib/x86_64-linux-gnu/faketime", "/usr/lib/aarch64-linux-gnu/faketime", "/usr/lib/faketime"):
        if os.path.exists(path := f"{folder}/libfaketime.so.1"):
            return path
    pytest.skip("missing: faketime")


@pytest.mark.parametrize("jump", ["-2h", "+2h"])
def test_a_clock_that_jumps_makes_no_duration_wrong(tmp_path, jump):
    """While one deployment runs and another waits; only instants follow the wall clock."""
    shift = tmp_path / "shift"
    shift.write_text("+0s\n")
    env = {"LD_PRELOAD": preloaded(), "FAKETIME_TIMESTAMP_FILE": str(shift), "FAKETIME_NO_CACHE": "1", "DONT_FAKE_MONOTONIC": "1",
           "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    host = Host(tmp_path / "host", service('["sh", "-c", "until test -e go; do sleep 0.02; done"]',
                                           tables='[service.healthcheck]\ninitial_delay = 0\ninterval = 0\nsuccess_threshold = 1\ncommands = [["true"]]\n'),
                "[limits]\nlock_timeout = 600\n[security]\nrate_limit = 0\n")
    try:
        host.start(env=env)
        began = time.monotonic()
        first, second = host.deploy(), host.deploy("app:2")
        host.wait(first, "Deploying")
        # At once: the library that moves the clock ends a process that finds the file empty.
        (tmp_path / "next").write_text(f"{jump}\n")
        (tmp_path / "next").rename(shift)
        # The housekeeper looks for what has waited too long, and is not deceived.
        wait_until(lambda: abs(hookshot.now_ms() / 1000 - host_time(host) - (7200 if jump[0] == "-" else -7200)) < 60)
        time.sleep(2.2)
        (host.folder / "go").touch()
        records = [host.wait(first), host.wait(second)]
        spent_ms = (time.monotonic() - began) * 1000
        for record in records:
            assert record["status"] == "Succeeded", record["error"]
            timings = record["timings"]
            for name in ("duration_ms", "queue_time_ms", "deploy_time_ms", "healthcheck_time_ms"):
                assert 0 <= timings[name] <= spent_ms + 50, (name, timings)
            assert all(0 <= command["duration_ms"] <= spent_ms + 50 for command in record["commands"])
        assert records[1]["timings"]["queue_time_ms"] >= 2000
        sums = re.findall(rb"^deployment_duration_seconds_sum\{.*?\} (\S+)$", host.get("/metrics").body, re.MULTILINE)
        assert sums and all(0 <= float(value) <= spent_ms / 500 for value in sums)
    finally:
        host.close()


def host_time(host: Host) -> float:
    """Return what the server holds for the time, from its Date header."""
    import email.utils

    return email.utils.parsedate_to_datetime(host.get("/ready").headers["date"]).timestamp()
