# SPDX-License-Identifier: MPL-2.0
"""RUN: one process or probe, its deadline, its output, its end; nobody survives who should not."""

import base64
import contextlib
import itertools
import json
import os
import pathlib
import pwd
import re
import signal
import socket
import subprocess
import sys
import threading
import tracemalloc
import urllib.parse

import pytest

import hookshot
import support
from hookshot import DeploymentLog, Launch, Masker, Phase, StopToken
from support import wait_until

PREFIX = re.compile(r"(?m)^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z \w+ (?:out|err|--) ")
SECRET = "0f1e2d3c4b5a69788796a5b4c3d2e1f0"


class Bench:
    """A folder with a log, and commands run in it."""

    def __init__(self, folder: pathlib.Path, limit_bytes: int = 10 << 20, secrets: tuple[bytes, ...] = ()):
        self.folder, self.path = folder, folder / "1.log"
        self.log = DeploymentLog(str(self.path), limit_bytes)
        self.masker, self.stop, self.pid = Masker(secrets), StopToken(), 0

    def run(self, *argv: str, timeout_s: float = 1000, on_start=None, **changes) -> hookshot.Result:
        launch = Launch(phase=Phase.DEPLOY, step=1, name="it", attempt=1, argv=argv, env={"PATH": os.environ["PATH"]}, cwd=str(self.folder),
                        timeout_s=timeout_s, account=None, umask=0o022, nice=0)
        return hookshot.run_command(launch._replace(**changes), self.log, self.masker, self.stop, on_start or self.started)

    def started(self, pid: int) -> None:
        self.pid = pid

    def sh(self, script: str, **options) -> hookshot.Result:
        return self.run("sh", "-c", script, **options)

    def python(self, script: str, **options) -> hookshot.Result:
        return self.run(sys.executable, "-I", "-S", "-c", script, **options)

    def logged(self) -> str:
        """Return the log as it is on disk."""
        self.log.close()
        return self.path.read_text() if self.path.exists() else ""

    def output(self) -> str:
        """Return the log without what stands before each line."""
        return PREFIX.sub("", self.logged())

    def file(self, name: str) -> str:
        return (self.folder / name).read_text()


@pytest.fixture
def bench(tmp_path):
    bench = Bench(tmp_path)
    yield bench
    bench.log.close()
    bench.stop.close()
    if bench.pid:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(bench.pid, signal.SIGKILL)


def is_alive(pid: str | int) -> bool:
    process = hookshot.read_process(int(pid))
    return bool(process and process.is_alive)


@contextlib.contextmanager
def in_thread(work):
    """Run work beside the test; give a list that gets what it returns."""
    outcome = []
    thread = threading.Thread(target=lambda: outcome.append(work()))
    thread.start()
    try:
        yield outcome
    finally:
        thread.join(support.PATIENCE_S)
        assert not thread.is_alive()


# --- how it ended

@pytest.mark.parametrize("script, status, code, number", [
    ("exit 0", "succeeded", 0, None), ("exit 1", "failed", 1, None), ("exit 126", "failed", 126, None), ("exit 255", "failed", 255, None),
    ("kill -9 $$", "failed", None, 9), ("kill -TERM $$", "failed", None, 15), ("kill -SEGV $$", "failed", None, 11)])
def test_only_exit_0_is_success_and_a_signal_is_failure(bench, script, status, code, number):
    result = bench.sh(script)
    assert (result.status, result.exit_code, result.signal, result.is_ok) == (status, code, number, status == "succeeded")


def test_a_result_tells_what_ran_and_when(bench):
    before = hookshot.now_ms()
    result = bench.run("printf", "%s", "a b", "$HOME;")
    assert (result.phase, result.step, result.name, result.attempt) == (Phase.DEPLOY, 1, "it", 1)
    assert result.command == "printf %s 'a b' '$HOME;'" and result.stdout == "a b$HOME;"
    assert before <= result.started_ms <= hookshot.now_ms() and 0 <= result.duration_ms <= hookshot.now_ms() - before + 1


def test_the_caller_learns_the_pid_while_it_runs(bench):
    seen = []
    result = bench.sh("echo $$; while [ ! -e told ]; do sleep 0.01; done",
                      on_start=lambda pid: seen.append(pid) or (bench.folder / "told").touch())
    assert result.stdout == f"{seen[0]}\n"


def test_a_caller_that_fails_leaves_no_process_behind(bench):
    seen = []

    def on_start(pid):
        seen.append(pid)
        raise RuntimeError("not today")

    with pytest.raises(RuntimeError, match="not today"):
        bench.sh("sleep 1000 & sleep 1000", on_start=on_start)
    wait_until(lambda: not hookshot.is_group_alive(seen[0]))


@pytest.mark.parametrize("make, argv, cwd, said", [
    (None, ("no-such-program-of-ours",), None, "program is not found"), (None, ("/nowhere/at/all",), None, "program is not found"),
    (None, ("true",), "/nowhere/at/all", "/nowhere/at/all does not exist"), ("plain", ("./file",), None, "not executable"),
    ("nonsense", ("./file",), None, "could not start"), (None, ("/",), None, "not executable")])
def test_what_cannot_start_says_why(bench, make, argv, cwd, said):
    if make:
        (bench.folder / "file").write_text("echo hello\n")
        (bench.folder / "file").chmod(0o644 if make == "plain" else 0o755)
    result = bench.run(*argv, **{"cwd": cwd} if cwd else {})
    assert (result.status, result.is_ok, result.exit_code, bench.pid) == ("not_started", False, None, 0)
    assert said in result.note and "Error" not in result.note


# --- what surrounds it

def test_a_command_has_a_session_and_group_of_its_own(bench):
    pid, fields = bench.sh("echo $$; cat /proc/$$/stat").stdout.split("\n")[:2]
    _, _, group, session, terminal = fields.rpartition(")")[2].split()[:5]
    assert pid == group == session and terminal == "0"


def test_a_command_inherits_no_descriptors_and_reads_nothing(bench):
    reader, writer = os.pipe()
    for descriptor in (reader, writer):
        os.set_inheritable(descriptor, True)
    result = bench.python("import os; print(sorted(f for f in os.listdir('/proc/self/fd') if os.path.exists(f'/proc/self/fd/{f}'))); "
                          "print(os.readlink('/proc/self/fd/0'), repr(open(0).read()))")
    os.close(reader), os.close(writer)
    assert result.stdout == "['0', '1', '2']\n/dev/null ''\n"


def test_a_command_has_the_environment_it_is_given_and_no_more(bench, monkeypatch):
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/x")
    result = bench.run("/usr/bin/env", env={"PATH": "/bin:/usr/bin", "A": "b=c d", "Ü": "ß"})
    assert sorted(result.stdout.splitlines()) == ["A=b=c d", "PATH=/bin:/usr/bin", "Ü=ß"]


def test_the_program_is_looked_up_on_the_path_it_is_given(bench):
    (bench.folder / "bin").mkdir()
    program = bench.folder / "bin" / "true"
    program.write_text("#!/bin/sh\necho ours\n")
    program.chmod(0o755)
    assert bench.run("true", env={"PATH": str(program.parent)}).stdout == "ours\n"


def test_a_command_runs_in_its_folder(bench):
    (bench.folder / "a b").mkdir()
    assert bench.run("pwd", cwd=str(bench.folder / "a b")).stdout == f"{bench.folder / 'a b'}\n"


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_command_has_the_services_umask_and_ours_stays(bench, umask):
    before = os.umask(0o027)
    try:
        assert int(bench.sh("umask", umask=umask).stdout, 8) == umask
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)


def test_a_command_is_as_nice_as_asked_and_we_stay_as_we_were(bench):
    before = os.getpriority(os.PRIO_PROCESS, 0)
    assert bench.run("nice", nice=3).stdout == f"{min(19, before + 3)}\n"
    assert os.getpriority(os.PRIO_PROCESS, 0) == before
    assert bench.run("nice").stdout == f"{before}\n"


def test_what_cannot_start_nicely_says_why_too(bench):
    assert "not found" in bench.run("no-such-program-of-ours", nice=3).note


def test_a_command_runs_as_its_user_and_group(bench):
    if os.geteuid() != 0:
        pytest.skip("missing: root")
    account = hookshot.find_account("nobody", None)
    entry = pwd.getpwnam("nobody")
    result = bench.sh("id -u; id -g; id -G; id -ru", account=account, cwd="/")
    assert result.stdout.splitlines() == [str(entry.pw_uid), str(entry.pw_gid), " ".join(map(str, account.groups)), str(entry.pw_uid)]
    assert os.geteuid() == 0


def test_only_root_can_run_as_another_user(bench):
    if os.geteuid() == 0:
        pytest.skip("root can")
    assert "only root" in bench.run("true", account=hookshot.find_account("root", None)).note


# --- its end, when it does not end by itself

FAMILY = """
sh -c 'echo $$ > child; sleep 1000 & echo $! > grandchild.new; mv grandchild.new grandchild; wait' &
echo $$ > leader
while [ ! -s grandchild ]; do sleep 0.01; done
echo up
wait
"""


def family(bench) -> list[str]:
    return [bench.file(name).strip() for name in ("leader", "child", "grandchild")]


@pytest.mark.parametrize("trap", ["", "trap '' TERM\n"], ids=["willing", "stubborn"])
def test_a_timeout_ends_the_whole_group(bench, monkeypatch, trap):
    monkeypatch.setattr(hookshot, "KILL_AFTER_S", 0.3)
    result = bench.sh(trap + FAMILY, timeout_s=1)
    assert (result.status, result.exit_code, result.signal) == ("timed_out", None, 9 if trap else 15)
    assert result.stdout == "up\n" and not any(map(is_alive, family(bench)))


def test_a_stubborn_grandchild_does_not_survive_its_willing_parents(bench, monkeypatch):
    monkeypatch.setattr(hookshot, "KILL_AFTER_S", 0.3)
    result = bench.sh("sh -c 'trap \"\" TERM; echo $$ > stubborn; while :; do sleep 1000; done' & echo up; wait", timeout_s=1)
    assert (result.status, result.signal) == ("timed_out", 15)
    assert not is_alive(bench.file("stubborn"))


def test_a_child_that_handles_term_gets_the_time_to_clean_up(bench, monkeypatch):
    monkeypatch.setattr(hookshot, "KILL_AFTER_S", 1000)
    result = bench.sh("trap 'sleep 0.3; echo cleaned > cleaned; echo bye; exit 7' TERM; while :; do sleep 0.05; done", timeout_s=0.5)
    assert (result.status, result.exit_code, result.stdout) == ("timed_out", 7, "bye\n") and bench.file("cleaned") == "cleaned\n"


@pytest.mark.parametrize("reason, number", [("shutdown", 15), ("now", 9)])
def test_a_stop_ends_the_whole_group(bench, reason, number):
    with in_thread(lambda: bench.sh(FAMILY)) as outcome:
        wait_until(lambda: (bench.folder / "grandchild").exists())
        bench.stop.set(reason)
    assert (outcome[0].status, outcome[0].signal) == ("stopped", number)
    assert not any(map(is_alive, family(bench)))


def test_now_after_shutdown_waits_no_longer(bench, monkeypatch):
    monkeypatch.setattr(hookshot, "KILL_AFTER_S", 1000)
    with in_thread(lambda: bench.sh("trap 'touch asked' TERM; echo $$ > leader; while :; do sleep 0.05; done")) as outcome:
        wait_until(lambda: (bench.folder / "leader").exists() and bench.file("leader"))
        bench.stop.set("shutdown")
        try:
            wait_until(lambda: (bench.folder / "asked").exists())
            bench.stop.set("now")
            wait_until(lambda: not is_alive(bench.file("leader")), patience_s=10)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(bench.pid, signal.SIGKILL)
    assert (outcome[0].status, outcome[0].signal) == ("stopped", 9)


def test_a_stop_that_came_before_the_start_counts(bench):
    bench.stop.set("now")
    assert bench.sh("sleep 1000").status == "stopped"


def test_a_stop_token_can_be_waited_for(bench):
    assert bench.stop.wait(0) is False and bench.stop.wait(0.01) is False
    bench.stop.set("shutdown")
    assert bench.stop.wait(1000) is True and bench.stop.wait(0) is True and bench.stop.reason == "shutdown"


@pytest.mark.parametrize("how", ["sleep 1000 &", "setsid sleep 1000 &"], ids=["in the group", "in its own session"])
def test_a_daemon_that_holds_the_pipes_open_does_not_hang_the_step(bench, how):
    result = bench.sh(f"{how} echo $! > daemon; printf ready")
    daemon = int(bench.file("daemon"))
    try:
        assert (result.status, result.stdout, is_alive(daemon)) == ("succeeded", "ready", True)
    finally:
        os.kill(daemon, signal.SIGKILL)


def test_a_command_that_closes_its_output_is_waited_for(bench):
    result = bench.sh("exec >&- 2>&-; sleep 0.3; echo done > done; exit 3")
    assert (result.exit_code, bench.file("done")) == (3, "done\n")


def test_a_kernel_without_pidfd_will_do(tmp_path):
    """Container runtimes and older kernels refuse pidfd_open."""
    strace = support.need("strace")
    code = f"""
import sys; sys.path[:0] = [{str(support.ROOT)!r}]
from hookshot import *
log, stop = DeploymentLog({str(tmp_path / 'log')!r}, 1 << 20), StopToken()
launch = Launch(Phase.DEPLOY, 1, "it", 1, ("sh", "-c", "echo hello; exit 3"), os.environ, "/", 60, None, 0o22, 0)
result = run_command(launch, log, Masker(), stop, lambda pid: None)
print(result.status, result.exit_code, result.stdout)
late = run_command(launch._replace(argv=("sleep", "1000"), timeout_s=0.2), log, Masker(), stop, lambda pid: None)
print(late.status, late.signal)
"""
    done = subprocess.run([strace, "-f", "-o", tmp_path / "trace", "-e", "trace=pidfd_open", "-e", "inject=pidfd_open:error=ENOSYS",
                           sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "failed 3 hello\n\ntimed_out 15\n", done.stderr


def test_no_descriptor_is_left_open(bench):
    bench.run("echo", "the log is open now")
    before = os.listdir("/proc/self/fd")
    for _ in range(5):
        bench.sh("echo x")
        bench.run("no-such-program-of-ours")
        bench.sh("sleep 1000", timeout_s=0.01)
    assert os.listdir("/proc/self/fd") == before


# --- output

def test_output_goes_to_the_log_line_by_line_with_time_phase_and_stream(bench):
    bench.log.note("engine", "step 1")
    bench.sh("echo one; echo two; sleep 0.2; echo three >&2")
    lines = bench.logged().splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == ["engine -- step 1", "deploy out one", "deploy out two", "deploy err three"]
    assert all(PREFIX.match(line) for line in lines)


def test_output_is_in_the_log_before_the_command_ends(bench):
    with in_thread(lambda: bench.sh("echo early; while [ ! -e go ]; do sleep 0.01; done")):
        wait_until(lambda: bench.path.exists() and "early" in bench.path.read_text())
        (bench.folder / "go").touch()


def test_the_log_is_private_and_goes_on_where_it_was(tmp_path):
    before = os.umask(0)
    try:
        for _ in range(2):
            bench = Bench(tmp_path)
            bench.run("echo", "hello")
            assert bench.output().endswith("hello\n")
    finally:
        os.umask(before)
    assert bench.path.read_text().count("hello") == 2 and bench.path.stat().st_mode & 0o777 == 0o600


MIB = 1 << 20
WRITES = {"out": f"os.write(1, b'o' * {MIB})", "err": f"os.write(2, b'e' * {MIB})"}


@pytest.mark.parametrize("order", [("out", "err"), ("err", "out")])
def test_a_mebibyte_on_each_stream_passes_in_any_order(bench, order):
    result = bench.python("import os\n" + "\n".join(WRITES[stream] for stream in order))
    text = bench.output()
    assert result.is_ok and (text.count("o"), text.count("e")) == (MIB, MIB)
    assert (result.stdout, result.stderr) == ("o" * hookshot.PREVIEW_BYTES, "e" * hookshot.PREVIEW_BYTES)


def test_streams_that_alternate_block_by_block_pass(bench):
    result = bench.python("import os\nfor n in range(200):\n os.write(1, b'o' * 5000); os.write(2, b'e' * 5000)")
    text = bench.output()
    assert result.is_ok and (text.count("o"), text.count("e")) == (1_000_000, 1_000_000)


@pytest.mark.parametrize("text, logged", [("x", "x\n"), ("x\n", "x\n"), ("a\nb", "a\nb\n"), ("", ""), ("\n", "\n"), ("\n\n", "\n\n")])
def test_the_last_line_needs_no_newline(bench, text, logged):
    assert bench.run("printf", "%s", text).stdout == text
    assert bench.output() == logged


def test_two_thousand_quick_commands_lose_no_output(bench):
    results = [bench.run("printf", f"x{number}") for number in range(2000)]
    assert [result.stdout for result in results] == [f"x{number}" for number in range(2000)]
    assert bench.output().split() == [f"x{number}" for number in range(2000)]


ODD = {
    "not UTF-8": (b"a\xff\xc3(b\n", "a\ufffd\ufffd(b\n", "a\ufffd\ufffd(b\n"), "NUL": (b"a\0b\n", "a\\x00b\n", "a\\x00b\n"),
    "ANSI": (b"\x1b[31mred\x1b[0m\n", "\\x1b[31mred\\x1b[0m\n", "\x1b[31mred\x1b[0m\n"),
    "carriage return": (b"10%\r20%\n", "10%\\r20%\n", "10%\r20%\n"), "Windows": (b"a\r\nb\r\n", "a\nb\n", "a\r\nb\r\n"),
    "tab": (b"a\tb\n", "a\tb\n", "a\tb\n"), "line separator": ("a\u2028b\u202ec\n".encode(), "a\\u2028b\\u202ec\n", "a\u2028b\u202ec\n"),
    "forged line": (b"a\x0b2026-01-01T00:00:00.000Z engine -- Succeeded\n", "a\\x0b2026-01-01T00:00:00.000Z engine -- Succeeded\n", None)}


@pytest.mark.parametrize("name", ODD)
def test_odd_bytes_are_made_harmless_in_the_log(bench, name):
    content, logged, preview = ODD[name]
    (bench.folder / "bytes").write_bytes(content)
    result = bench.run("cat", "bytes")
    lines = bench.logged().split("\n")[:-1]
    assert all(PREFIX.match(line) for line in lines)
    assert bench.output() == logged
    assert preview is None or result.stdout == preview
    json.dumps(result.stdout).encode()


@pytest.mark.parametrize("shift", range(4))
@pytest.mark.parametrize("character", ["é", "€", "😀"])
def test_a_character_cut_by_a_chunk_border_is_whole_in_the_log(bench, character, shift):
    text = "x" * shift + character * 60_000
    (bench.folder / "bytes").write_text(text)
    result = bench.run("cat", "bytes")
    assert "".join(bench.output().split("\n")) == text
    assert set(result.stdout) == {character} and len(result.stdout.encode()) > hookshot.PREVIEW_BYTES - 4


def test_a_character_that_comes_byte_by_byte_is_whole(bench):
    script = "import os, time\nfor byte in '€\\n'.encode():\n os.write(1, bytes([byte])); time.sleep(0.02)"
    assert bench.python(script).stdout == "€\n" and bench.output() == "€\n"


def test_a_very_long_line_is_kept_in_pieces(bench):
    assert bench.python("print('0123456789' * 100_000)").is_ok
    lines = bench.output().split("\n")
    assert "".join(lines) == "0123456789" * 100_000 and 10 < len(lines) < 200


@pytest.mark.parametrize("size", [hookshot.PREVIEW_BYTES - 1, hookshot.PREVIEW_BYTES, hookshot.PREVIEW_BYTES + 1, 100_000])
def test_the_record_keeps_the_last_10_kb(bench, size):
    text = "".join(itertools.islice(itertools.cycle("0123456789abcdefg\n"), size))
    (bench.folder / "text").write_text(text)
    result = bench.sh("cat text; cat text >&2; exit 1")
    assert result.stdout == result.stderr == text[-hookshot.PREVIEW_BYTES:]


# --- much output

def numbered(count: int) -> str:
    return "".join(f"line {number} {'.' * 40}\n" for number in range(count))


def test_a_log_within_max_output_is_whole(tmp_path):
    bench = Bench(tmp_path, 1 << 20)
    (tmp_path / "text").write_text(numbered(9000))
    bench.run("cat", "text")
    assert bench.output() == numbered(9000)


def test_head_and_tail_of_a_flood_are_kept_with_a_note_of_the_cut(tmp_path):
    bench = Bench(tmp_path, 1 << 20)
    (tmp_path / "text").write_text(numbered(200_000))
    bench.run("cat", "text")
    bench.log.note("engine", "Succeeded")
    logged = bench.logged()
    lines = PREFIX.sub("", logged).splitlines()
    numbers = [int(line.split()[1]) for line in lines if line.startswith("line ")]
    assert numbers[0] == 0 and numbers[-1] == 199_999
    gaps = [(a, b) for a, b in itertools.pairwise(numbers) if b != a + 1]
    assert len(gaps) == 1 and len(numbers) > 5000
    assert len([line for line in lines if "max_output" in line]) == 1
    assert len([line for line in lines if "were cut" in line]) == 1
    assert lines[-1] == "Succeeded"


def test_nothing_is_said_to_be_cut_when_nothing_is(tmp_path):
    """What goes beyond the head but fits in the tail."""
    bench = Bench(tmp_path, 1 << 20)
    for number in range(100):
        bench.log.output("deploy", "out", b"%d" % number + b"x" * 8500 + b"\n")
    logged = bench.logged()
    assert re.findall(r" out (\d+)x", logged) == [str(number) for number in range(100)]
    assert "cut" not in logged


FLOODS = {
    "long lines": b"x" * 999 + b"\n", "short lines": b"y\n", "empty lines": b"\n", "no lines": b"z", "control characters": b"\0",
    "not UTF-8": b"\xff", "wide characters": "€".encode()}


@pytest.mark.parametrize("limit", [64 << 10, 1 << 20])
@pytest.mark.parametrize("name", FLOODS)
def test_the_log_of_a_flood_is_no_larger_than_max_output(tmp_path, name, limit):
    bench = Bench(tmp_path, limit)
    unit = FLOODS[name]
    (tmp_path / "bytes").write_bytes(unit * (3 * limit // len(unit)))
    bench.run("cat", "bytes")
    bench.log.note("engine", "Succeeded")
    bench.log.close()
    assert limit // 3 < bench.path.stat().st_size <= limit * 1.02 + 300
    assert bench.logged().endswith("engine -- Succeeded\n")


def test_the_tail_of_many_small_writes_takes_little_memory(tmp_path):
    log = DeploymentLog(str(tmp_path / "log"), 1 << 20)
    for number in range(20_000):
        log.output("deploy", "out", b"%d\n" % number)
    tracemalloc.start()
    for number in range(150_000):
        log.output("deploy", "out", b"%d\n" % number)
    log.close()
    grown = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert grown < 4 << 20


MEASURE = """
import sys; sys.path[:0] = [{root!r}]
from hookshot import *

def peak_kb():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])

log, stop, masker = DeploymentLog({log!r}, 10 << 20), StopToken(), Masker([b"{secret}"])
def run(*argv):
    return run_command(Launch(Phase.DEPLOY, 1, "it", 1, argv, os.environ, "/", 600, None, 0o22, 0), log, masker, stop, lambda pid: None)
run("sh", "-c", "echo warm; echo up >&2")
before = peak_kb()
result = run("sh", "-c", {script!r})
log.close()
print(result.status, len(result.stdout), peak_kb() - before)
"""


@pytest.mark.parametrize("script", ["yes | head -c 2G", "head -c 2G /dev/zero", "yes '' | head -c 200M >&2; head -c 9000 /dev/zero"],
                         ids=["lines", "no lines", "empty lines"])
def test_two_gigabytes_of_output_take_a_few_megabytes_of_memory(tmp_path, script):
    code = MEASURE.format(root=str(support.ROOT), log=str(tmp_path / "log"), script=script, secret=SECRET)
    # Compiling the module takes more memory than running it does, and would hide what it grows by.
    env = {**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path / "compiled"), "PYTHONDONTWRITEBYTECODE": ""}
    subprocess.run([sys.executable, "-c", "import hookshot"], env={**env, "PYTHONPATH": str(support.ROOT)}, check=True)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=env)
    status, preview, grown_kb = done.stdout.split()
    assert status == "succeeded" and int(preview) >= 9000 and int(grown_kb) < 8 << 10, done.stdout


# --- secrets

FORMS = {"as it is": SECRET, "base64": base64.b64encode(SECRET.encode()).decode().rstrip("="), "URL": None, "JSON": None}
ODD_SECRET = 'p"4/s+s w&ö\\rd'
FORMS["URL"], FORMS["JSON"] = urllib.parse.quote(ODD_SECRET, safe=""), json.dumps(ODD_SECRET)[1:-1]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cut", [None, 1, 7, -1])
def test_a_secret_is_masked_in_log_and_record_wherever_it_is_cut(tmp_path, form, cut):
    bench = Bench(tmp_path, secrets=(SECRET.encode(), ODD_SECRET.encode()))
    text = FORMS[form]
    pieces = [f"a {text} b", f" {text}\n"] if cut is None else [f"a {text[:cut]}", f"{text[cut:]} b {text[:cut]}", f"{text[cut:]}\n"]
    result = bench.python("import sys, time\n"
                          f"for piece in {pieces!r}:\n for stream in (1, 2):\n"
                          "  open(stream, 'wb', buffering=0, closefd=False).write(piece.encode())\n"
                          " time.sleep(0.05)")
    assert result.stdout == result.stderr == "a *** b ***\n"
    assert sorted(bench.logged().split(" deploy ", 1)[1].partition("\n")[0].split()[1:]) == ["***", "***", "a", "b"]
    assert text not in bench.logged()


def test_a_secret_across_the_border_of_full_chunks_is_masked(tmp_path):
    bench = Bench(tmp_path, secrets=(SECRET.encode(),))
    for shift in range(0, len(SECRET) + 2, 3):
        (tmp_path / "text").write_text("x" * (65536 - shift) + SECRET + "x" * 65536 + SECRET)
        result = bench.run("cat", "text")
        assert result.stdout.endswith("x***")
    whole = "".join(bench.output().split("\n"))
    assert SECRET not in whole and SECRET[4:] not in whole and whole.count("***") == 2 * len(range(0, len(SECRET) + 2, 3))


def test_a_secret_that_is_the_start_of_another_hides_none_of_it(tmp_path):
    bench = Bench(tmp_path, secrets=(b"hunter2hunter2", b"hunter2hunter2-and-more"))
    result = bench.python("import os, time\nfor piece in (b'<hunter2hunter2', b'-and-more>\\n'):\n os.write(1, piece); time.sleep(0.1)")
    assert result.stdout == "<***>\n" and bench.output() == "<***>\n"


def test_what_looked_like_the_start_of_a_secret_is_not_lost(tmp_path):
    bench = Bench(tmp_path, secrets=(SECRET.encode(),))
    assert bench.run("printf", "%s", f"a {SECRET[:20]}").stdout == f"a {SECRET[:20]}"
    assert bench.run("printf", "%s\\n%s", SECRET[:9], SECRET[9:20]).stdout == f"{SECRET[:9]}\n{SECRET[9:20]}"


def test_a_secret_in_the_command_line_is_masked_in_the_record(tmp_path):
    bench = Bench(tmp_path, secrets=(SECRET.encode(),))
    result = bench.run("true", f"--key={SECRET}")
    assert result.command == "true --key=***"


def test_a_large_secret_does_not_stall_the_output(tmp_path):
    """A credential may be a certificate."""
    bench = Bench(tmp_path, secrets=(os.urandom(30_000),))
    (tmp_path / "bytes").write_bytes(os.urandom(4 * MIB))
    assert bench.run("cat", "bytes", timeout_s=20).status == "succeeded"


# --- a log that cannot be written

def test_a_full_disk_costs_lines_of_the_log_and_nothing_else(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("missing: root")
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "none", disk], capture_output=True).returncode:
        pytest.skip("missing: the right to mount")
    try:
        log, bench = DeploymentLog(str(disk / "1.log"), 10 << 20), Bench(tmp_path)
        (disk / "filler").write_bytes(b"x" * (60 << 10))
        bench.log = log
        (tmp_path / "text").write_text(numbered(10_000))
        result = bench.run("cat", "text")
        assert result.is_ok and result.stdout.endswith("line 9999 " + "." * 40 + "\n")
        (disk / "filler").unlink()
        log.note("engine", "there is room again")
        log.close()
        logged = (disk / "1.log").read_text()
        assert "line 0 " in logged and "there is room again" in logged and "lines are missing" in logged
    finally:
        log.close()
        subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: path.symlink_to("/etc/passwd")], ids=["folder", "symlink"])
def test_a_log_that_cannot_be_opened_stops_nothing(tmp_path, make):
    make(tmp_path / "1.log")
    bench = Bench(tmp_path)
    assert bench.run("echo", "hello").stdout == "hello\n"
    bench.log.close()


# --- probes

@contextlib.contextmanager
def server(*steps: bytes, family=socket.AF_INET, host="127.0.0.1"):
    """Give the port of a server that answers each connection with these pieces until the client leaves; with none it is silent."""
    with socket.socket(family) as listener:
        listener.bind((host, 0))
        listener.listen()
        seen: list[bytes] = []
        over = threading.Event()

        def answer(link):
            with link, contextlib.suppress(OSError):
                seen.append(link.recv(65536))
                for step in steps:
                    link.sendall(step)
                    if over.wait(0.2 if len(steps) > 3 else 0):
                        return
                if not steps:
                    over.wait(support.PATIENCE_S)

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=answer, args=(listener.accept()[0],), daemon=True).start()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield listener.getsockname()[1], seen
        finally:
            over.set()
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def answer_of(status: str = "200 OK", body: bytes = b"all is well", *headers: str) -> bytes:
    head = "\r\n".join([f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers])
    return head.encode() + b"\r\n\r\n" + body


def run_check(check, step: int) -> hookshot.Result:
    with contextlib.closing(hookshot.StopToken()) as stop:
        return hookshot.run_check(check, step, stop)


def probe(url: str, status=200, contains=None, timeout_s=20.0) -> hookshot.Result:
    return run_check(hookshot.HttpCheck(url, status, contains, timeout_s), 3)


def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_a_good_answer_is_a_success_and_the_result_says_what_was_asked():
    with server(answer_of()) as (port, seen):
        result = probe(f"http://127.0.0.1:{port}/health?deep=1", contains="is well")
    assert (result.status, result.phase, result.step, result.name, result.note) == ("succeeded", Phase.HEALTHCHECK, 3, "http", "")
    assert result.command == f"http http://127.0.0.1:{port}/health?deep=1"
    request = seen[0].decode().split("\r\n")
    assert request[0] == "GET /health?deep=1 HTTP/1.1" and f"Host: 127.0.0.1:{port}" in request and "Connection: close" in request


@pytest.mark.parametrize("answer, options, said", [
    (answer_of("503 Service Unavailable"), {}, "answered 503, not 200"), (answer_of(), {"status": 204}, "answered 200, not 204"),
    (answer_of("302 Found", b"", "Location: http://127.0.0.1:9/"), {}, "answered 302, not 200"),
    (answer_of(), {"contains": "version 2"}, "without the expected text"), (b"not HTTP at all\r\n\r\n", {}, "failed"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nall is", {"contains": "well"}, ""), (b"HTTP/1.1 200 OK\r\n" + b"x" * 70_000, {}, "failed")])
def test_a_wrong_answer_is_a_failure_that_says_why(answer, options, said):
    with server(answer) as (port, _):
        result = probe(f"http://127.0.0.1:{port}/", **options)
    assert result.status == "failed" and result.note and said in result.note and not result.is_ok


def test_an_expected_redirect_is_good_and_not_followed():
    with server(b"") as (target, asked), server(answer_of("301 Moved", b"", f"Location: http://127.0.0.1:{target}/")) as (port, _):
        assert probe(f"http://127.0.0.1:{port}/", status=301).is_ok
    assert asked == []


def test_the_expected_text_may_come_in_pieces_and_in_chunks():
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    with server(chunked + b"4\r\nall \r\n", b"6\r\nis w\xc3\xa9\r\n", b"1\r\nl\r\n0\r\n\r\n") as (port, _):
        assert probe(f"http://127.0.0.1:{port}/", contains="all is wél").is_ok


def test_an_answer_over_ipv6_is_as_good():
    try:
        with server(answer_of(), family=socket.AF_INET6, host="::1") as (port, seen):
            assert probe(f"http://[::1]:{port}/").is_ok
            assert f"Host: [::1]:{port}" in seen[0].decode()
            assert run_check(hookshot.SocketCheck("::1", port, 20.0), 1).is_ok
    except OSError:
        pytest.skip("this host has no IPv6")


def test_a_refused_connection_is_a_failure_that_says_so():
    port = closed_port()
    result = probe(f"http://127.0.0.1:{port}/")
    assert (result.status, result.note) == ("failed", "failed: Connection refused")
    result = run_check(hookshot.SocketCheck("127.0.0.1", port, 20.0), 1)
    assert (result.status, result.name, result.note, result.command) == ("failed", "tcp", "failed: Connection refused", f"tcp 127.0.0.1:{port}")


def test_a_stop_ends_a_probe_that_waits_for_an_answer():
    with server() as (port, seen), contextlib.closing(hookshot.StopToken()) as stop:
        stopper = threading.Thread(target=lambda: (wait_until(lambda: seen), stop.set("cancel")))
        stopper.start()
        result = hookshot.run_check(hookshot.HttpCheck(f"http://127.0.0.1:{port}/", 200, None, 600.0), 1, stop)
        stopper.join()
    assert (result.status, result.note, result.duration_ms < 600_000) == ("stopped", "was stopped", True)


def test_a_probe_that_can_have_no_thread_is_a_failure_that_says_so():
    before = threading.stack_size(1 << 46)  # more than there are addresses
    try:
        result = run_check(hookshot.SocketCheck("127.0.0.1", closed_port(), 20.0), 1)
    finally:
        threading.stack_size(before)
    assert (result.status, result.note) == ("failed", "failed: the host has no more threads")


def test_silence_is_a_failure_when_the_time_is_up():
    with server() as (port, _):
        result = probe(f"http://127.0.0.1:{port}/", timeout_s=0.3)
    assert (result.status, result.note) == ("failed", "did not answer within 0.3 s")


# Each piece comes in time for itself; all of them together take much longer than the probe may.
DRIPS = {
    "status line": [b"HTTP/1.1 200 "] + [b"O"] * 100 + [b"\r\nContent-Length: 2\r\n\r\nok"],
    "headers": [b"HTTP/1.1 200 OK\r\n"] + [b"X-A: b\r\n"] * 90 + [b"Content-Length: 2\r\n\r\nok"],
    "body": [b"HTTP/1.1 200 OK\r\nContent-Length: 102\r\n\r\n"] + [b"."] * 100 + [b"ok"]}


@pytest.mark.parametrize("part", DRIPS)
def test_an_answer_that_drips_is_given_up_in_time(part):
    with server(*DRIPS[part]) as (port, _), in_thread(
            lambda: probe(f"http://127.0.0.1:{port}/", contains="ok" if part == "body" else None, timeout_s=0.5)) as outcome:
        wait_until(lambda: outcome, patience_s=8)
    assert (outcome[0].status, outcome[0].note) == ("failed", "did not answer within 0.5 s")


def test_a_body_that_never_ends_is_not_read_to_the_end():
    with server(answer_of(body=b"x" * (50 << 20))) as (port, _):
        assert probe(f"http://127.0.0.1:{port}/", contains="y").note == "answered without the expected text"


def test_a_host_without_an_address_is_a_failure():
    result = probe("http://no-such-host.invalid/")
    assert result.status == "failed" and result.note


@pytest.mark.parametrize("url", ["http://127.0.0.1:99999/", "http://127.0.0.1:1/a b", "http://127.0.0.1:1/ä", "http://[::1/"])
def test_an_address_that_is_none_is_a_failure(url):
    assert probe(url).status == "failed"


def test_a_tcp_check_succeeds_when_the_connection_is_accepted():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        result = run_check(hookshot.SocketCheck("127.0.0.1", listener.getsockname()[1], 20.0), 2)
    assert (result.status, result.note, result.step) == ("succeeded", "", 2)


def test_a_unix_check_needs_a_listening_socket(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check = hookshot.SocketCheck("s", None, 20.0)
    assert run_check(check, 1).note == "failed: No such file or directory"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("s")
        assert run_check(check, 1).note == "failed: Connection refused"
        listener.listen()
        result = run_check(check, 1)
    assert (result.status, result.name, result.command) == ("succeeded", "unix", "unix s")
