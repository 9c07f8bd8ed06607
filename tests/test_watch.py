# SPDX-License-Identifier: MPL-2.0
"""`hookshot watch`: a line for each move, or a screen; it outlives the server, and gives the terminal back."""

import codecs
import contextlib
import fcntl
import http.server
import json
import os
import pty
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading

import pytest

import hookshot
from support import PATIENCE_S, PROGRAM, Host, free_port, program, running, service, wait_until

TOKEN = "t0k3n-of-a-reader-0123456789abcdefgh"
HOLD = '["sh", "-c", "until [ -e go ]; do kill -0 $PPID || exit; sleep 0.02; done"]'
MOVE = {"at": "2026-11-23T13:15:02.000Z", "service": "web", "image": "app:1", "deploy_id": "d-1", "status": "Queued"}
SIX = "[limits]\nmax_concurrent_per_service = 6\n[server]\nworker_threads = 16\n"


def environment(url: str, **more: str) -> dict[str, str]:
    ours = {name: value for name, value in os.environ.items() if not name.startswith("HOOKSHOT_") and name not in ("LINES", "COLUMNS", "NO_COLOR")}
    return {**ours, "HOOKSHOT_URL": url, "TERM": "xterm", **more}


def url_of(host: Host) -> str:
    return f"http://127.0.0.1:{host.port}"


class Events:
    """A client whose server tells these events, one row for each connection."""

    url = "http://127.0.0.1:1"

    def __init__(self, *rows: list[tuple[str, str, str]]):
        self._rows = iter(rows)

    def follow_moves(self, last_event_id: str):
        yield from next(self._rows, [])


class Watch:
    """`hookshot watch` in a process of its own, what it prints in files."""

    def __init__(self, host: Host, *flags: str, **env: str):
        self._files = host.folder / "watch.out", host.folder / "watch.err"
        with open(self._files[0], "wb") as out, open(self._files[1], "wb") as err:
            self.process = subprocess.Popen([*program(), "watch", *flags], stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                                            env=environment(url_of(host), **env))

    @property
    def lines(self) -> list[str]:
        return self._files[0].read_text().splitlines()

    @property
    def said(self) -> str:
        return self._files[1].read_text()

    def end(self, number: int = signal.SIGINT) -> int:
        self.process.send_signal(number)
        return self.process.wait(PATIENCE_S)


@contextlib.contextmanager
def watching(host: Host, *flags: str, **env: str):
    """Give a watch that follows already."""
    watch = Watch(host, *flags, **env)
    try:
        wait_until(lambda: "hookshot_event_streams 1\n" in host.get("/metrics", Authorization=f"Bearer {TOKEN}").body.decode())
        yield watch
    finally:
        watch.process.kill()
        watch.process.wait()


def moves_of(host: Host, *ids: str) -> list[tuple[str, str]]:
    return [(deploy_id, move["state"]) for deploy_id in ids for move in host.record(deploy_id)["state_transitions"]]


class Screen:
    """What a terminal shows of what a program writes: only the sequences that `watch` may use are known."""

    _PIECE = re.compile(r"\x1b\[(\?)?(\d*)([A-Za-z])|\r|\n|[^\x00-\x1f\x7f-\x9f]")

    def __init__(self, width: int, height: int):
        self.width, self.height = width, height
        self.modes = {"25": True, "7": True, "1049": False}
        self._rows = [[" "] * width for _ in range(height)]
        self._x = self._y = 0
        self._text = ""

    def feed(self, text: str) -> None:
        self._text += text
        at = 0
        while at < len(self._text):
            piece = self._PIECE.match(self._text, at)
            if not piece:
                assert re.fullmatch(r"\x1b\[?\??\d*", self._text[at:]), f"not for a terminal: {self._text[at:at + 20]!r}"
                break
            self._take(piece)
            at = piece.end()
        self._text = self._text[at:]

    def _take(self, piece: re.Match) -> None:
        mark, number, letter = piece.groups()
        if mark:
            assert number in self.modes and letter in "hl"
            self.modes[number] = letter == "h"
        elif letter == "H":
            self._x = self._y = 0
        elif letter in ("K", "J"):
            for y in range(self._y, self._y + 1 if letter == "K" else self.height):
                self._rows[y][self._x if y == self._y else 0 :] = " " * (self.width - (self._x if y == self._y else 0))
        elif piece[0] == "\n":
            self._x, self._y = 0, self._y + 1
            assert self._y < self.height, "the screen scrolled"
        elif piece[0] == "\r":
            self._x = 0
        else:
            assert letter is None and self._x < self.width, "a line is too long"
            self._rows[self._y][self._x] = piece[0]
            self._x += 1

    @property
    def lines(self) -> list[str]:
        return ["".join(row).rstrip() for row in self._rows]

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


class Terminal:
    """A pseudo-terminal with `hookshot watch` on it; everything that it writes goes over a Screen."""

    def __init__(self, url: str, width: int, height: int, *flags: str, **env: str):
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
        self.before = termios.tcgetattr(theirs)
        self.screen, self.raw = Screen(width, height), ""
        # What is read may end in the middle of a letter.
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self.process = subprocess.Popen([*program(), "watch", *flags], stdin=theirs, stdout=theirs, stderr=subprocess.DEVNULL,
                                        env=environment(url, **env), start_new_session=True)
        self._theirs = theirs

    def read(self) -> bool:
        """Take what has been written, up to the end of a screen if it is one; False if nothing has."""
        is_there = False
        while select.select([self._ours], [], [], 0.05)[0]:
            text, is_there = self._decoder.decode(os.read(self._ours, 1 << 16)), True
            self.raw += text
            self.screen.feed(text)
            if self.raw.endswith("\x1b[J"):
                break
        return is_there

    def show(self, *words: str) -> Screen:
        """Return the screen once it has these words."""
        wait_until(lambda: (self.read() or True) and all(word in self.screen.text for word in words))
        return self.screen

    def resize(self, width: int, height: int) -> None:
        fcntl.ioctl(self._theirs, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))

    def end(self, number: int = signal.SIGINT) -> int:
        self.process.send_signal(number)
        wait_until(lambda: not self.read() and self.process.poll() is not None)
        return self.process.returncode

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)
        os.close(self._theirs)


def on_terminal(url: str, width: int = 120, height: int = 30, *flags: str, **env: str):
    return contextlib.closing(Terminal(url, width, height, *flags, **env))


# --- lines

@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_each_move_is_a_line_where_there_is_no_terminal(tmp_path, flags):
    with running(tmp_path, service() + service('["false"]', name="bad")) as host, watching(host, *flags) as watch:
        good, bad = host.deploy(), host.deploy(service="bad", image="app:2")
        expected = sorted(moves_of(host, host.wait(good)["deploy_id"], host.wait(bad)["deploy_id"]))
        wait_until(lambda: len(watch.lines) >= len(expected))
        if flags:
            found = [json.loads(line) for line in watch.lines]
            assert [move["id"] for move in found] == list(range(1, len(expected) + 1))
            assert sorted((move["deploy_id"], move["status"]) for move in found) == expected
            assert next(move for move in found if move["status"] == "Failed")["error"] == host.record(bad)["error"]
        else:
            found = [re.fullmatch(r"\d{4}-\S+Z (web|bad) app:[12] (\S+) (?:\w+ -> )?(\w+)(: .+)?", line) for line in watch.lines]
            assert sorted((line[2], line[3]) for line in found) == expected
            assert next(line[4] for line in found if line[3] == "Failed") == f": {host.record(bad)['error']}"
        assert watch.end() == 130 and "Traceback" not in watch.said


def test_a_terminal_that_knows_no_sequences_gets_lines(tmp_path):
    with running(tmp_path, service()) as host, on_terminal(url_of(host), 300, TERM="dumb") as terminal:
        wait_until(lambda: "hookshot_event_streams 1\n" in host.get("/metrics").body.decode())
        host.wait(host.deploy())
        terminal.show("-> Succeeded")
        assert "\x1b" not in terminal.raw and terminal.end() == 130


@pytest.mark.parametrize("has_seen", [True, False])
@pytest.mark.parametrize("end", ["stop", "kill"])
def test_it_goes_on_without_a_gap_when_the_server_restarts(tmp_path, has_seen, end):
    port = free_port()
    with running(tmp_path, service(), f'[server]\nlisten = "127.0.0.1:{port}"\n') as host, watching(host, "--json") as watch:
        ids = [host.deploy()] if has_seen else []
        for deploy_id in ids:
            host.wait(deploy_id)
        getattr(host, end)()
        wait_until(lambda: "trying again" in watch.said)
        host.start()
        ids += [host.deploy() for _ in range(3)]
        for deploy_id in ids:
            host.wait(deploy_id)
        expected = moves_of(host, *ids)
        wait_until(lambda: len(watch.lines) >= len(expected))
        found = [json.loads(line) for line in watch.lines]
        assert [move["id"] for move in found] == list(range(1, len(expected) + 1))
        assert sorted((move["deploy_id"], move["status"]) for move in found) == sorted(expected)
        # Once, however often it tried.
        assert watch.said.count("trying again") == 1 and len(watch.said.splitlines()) == 1
        assert watch.end() == 130


def test_a_wrong_token_is_told_with_77(tmp_path):
    with running(tmp_path, service(), '[security]\nread_access = "token"\n', secrets=f"read_token={TOKEN}\n") as host:
        for env in ({}, {"HOOKSHOT_READ_TOKEN": TOKEN[::-1]}):
            watch = Watch(host, **env)
            assert watch.process.wait(PATIENCE_S) == 77 and len(watch.said.splitlines()) == 1 and watch.lines == []


def test_a_token_that_is_taken_away_ends_it_with_77(tmp_path):
    with running(tmp_path, service(), '[security]\nread_access = "token"\n', secrets=f"read_token={TOKEN}\n") as host, \
            watching(host, HOOKSHOT_READ_TOKEN=TOKEN) as watch:
        host.stop()
        host.secrets.write_text(f"hmac_key={host.key.decode()}\nread_token={TOKEN[::-1]}\n")
        host.write(service(), f'[server]\nlisten = "127.0.0.1:{host.port}"\n[security]\nread_access = "token"\n')
        host.start()
        assert watch.process.wait(PATIENCE_S) == 77 and "refused" in watch.said.splitlines()[-1]


def test_a_server_that_is_not_there_is_told_with_69(tmp_path):
    host = Host(tmp_path, service())
    host.port = free_port()
    watch = Watch(host)
    assert watch.process.wait(PATIENCE_S) == 69 and len(watch.said.splitlines()) == 1 and "cannot be reached" in watch.said


def test_a_reader_that_has_enough_ends_it(tmp_path):
    """`hookshot watch | head -1`"""
    with running(tmp_path, service()) as host:
        process = subprocess.Popen([*program(), "watch"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(url_of(host)))
        with process:
            wait_until(lambda: "hookshot_event_streams 1\n" in host.get("/metrics").body.decode())
            host.wait(host.deploy())
            assert process.stdout.readline()
            process.stdout.close()
            wait_until(lambda: host.deploy() and process.poll() is not None)
            assert process.returncode == 0 and process.stderr.read() == b""


# --- the screen

def test_the_screen_shows_services_what_runs_with_its_step_and_the_latest_moves(tmp_path):
    with running(tmp_path, service('["true"]', HOLD) + service('["false"]', name="bad")) as host, on_terminal(url_of(host)) as terminal:
        terminal.show("SERVICE  HEALTH", "Unknown", "AT  SERVICE")
        failed = host.deploy(service="bad", image="app:3")
        host.wait(failed)
        runs = host.deploy()
        host.wait(runs, "Deploying")
        waits = host.deploy(image="app:2")
        lines = terminal.show(runs, waits, "Unhealthy", "2 of 2", "false exited with status 1").lines
        assert lines[0].startswith(f"hookshot at {url_of(host)}   ") and lines[0].endswith("UTC   Ctrl-C ends this") and lines[1] == ""
        clock = r"\d\d:\d\d:\d\d"
        # Tables and moves are asked for one after the other: the last move may be on the next screen.
        rows = (rf"bad Unhealthy - Failed {clock} 0 0", "web Unknown - - - 1 1", rf"web app:1 Deploying 2 of 2 sh {clock} {runs}",
                rf"web app:2 Queued - - {clock} {waits}", rf"{clock} bad app:3 Deploying Failed false exited with status 1",
                rf"{clock} web app:1 Validating Deploying .+", rf"{clock} web app:2 - Queued accepted")
        patterns = [re.compile(rf"^ *{row.replace(' ', ' +')} *$", re.MULTILINE) for row in rows]
        wait_until(lambda: (terminal.read() or True) and all(pattern.search(terminal.screen.text) for pattern in patterns))
        (tmp_path / "go").touch()
        host.wait(waits)
        terminal.show("web      Healthy    app:2")
        # The tables are asked for one after the other, and the newest move comes first.
        newest = re.compile(r"^AT .*\n\S+ +web +app:2 .*Succeeded", re.MULTILINE)
        wait_until(lambda: (terminal.read() or True) and runs not in terminal.screen.text and waits not in terminal.screen.text
                   and newest.search(terminal.screen.text))
        assert terminal.end() == 130


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_terminal_is_given_back(tmp_path, number):
    with running(tmp_path, service()) as host, on_terminal(url_of(host)) as terminal:
        screen = terminal.show("web")
        assert screen.modes == {"25": False, "7": False, "1049": True}
        assert terminal.end(number) == 130
        assert screen.modes == {"25": True, "7": True, "1049": False} and termios.tcgetattr(terminal._theirs) == terminal.before


def test_ctrl_c_on_the_keyboard_ends_it(tmp_path):
    with running(tmp_path, service()) as host:
        ours, theirs = pty.openpty()
        lead = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
        process = subprocess.Popen([sys.executable, "-c", lead, str(PROGRAM), "watch"], stdin=theirs, stdout=theirs, stderr=theirs,
                                   env=environment(url_of(host)), start_new_session=True)
        os.close(theirs)
        got = b""
        try:
            while b"Ctrl-C ends this" not in got:
                got += os.read(ours, 1 << 16)
            os.write(ours, b"\x03")
            with contextlib.suppress(OSError):
                while block := os.read(ours, 1 << 16):
                    got += block
            assert process.wait(PATIENCE_S) == 130 and got.rstrip().endswith(b"\x1b[?7h\x1b[?25h\x1b[?1049l") and b"Traceback" not in got
        finally:
            process.kill()
            process.wait()
            os.close(ours)


@pytest.mark.parametrize("width, height", [(80, 24), (40, 10), (20, 6), (10, 3), (5, 2), (2, 1), (300, 100)])
def test_nothing_wraps_and_nothing_scrolls_however_small_the_terminal_is(tmp_path, width, height):
    """Screen fails where a line is too long or the last line is left."""
    services = service('["true"]', HOLD) + "".join(service(name=f"service-{number}") for number in range(30))
    with running(tmp_path, services, SIX) as host, on_terminal(url_of(host), width, height) as terminal:
        wait_until(lambda: "hookshot_event_streams 1\n" in host.get("/metrics").body.decode())
        for number in range(6):
            host.wait(host.deploy(image=f"app:{'x' * 300}{number}"), "Deploying")
        for number in range(10):
            host.wait(host.deploy(service=f"service-{number}"))
        shown = terminal.raw.count("\x1b[H")
        wait_until(lambda: (terminal.read() or True) and terminal.raw.count("\x1b[H") > shown + 2)
        if (width, height) == (80, 24):
            # Together: what was read may end in the middle of a screen.
            wait_until(lambda: (terminal.read() or True) and terminal.screen.text.count("... and") >= 2 and ["SERVICE", "SERVICE", "AT"] == [
                line.split()[0] for line in terminal.screen.lines if re.match(r"(AT|SERVICE) ", line)])
        if height == 100:
            assert all(f"service-{number} " in terminal.screen.text for number in range(30)) and "... and" not in terminal.screen.text
        assert terminal.end() == 130


def test_a_terminal_that_changes_its_size_is_filled_anew(tmp_path):
    with running(tmp_path, service()) as host, on_terminal(url_of(host), 120, 30) as terminal:
        terminal.show("WAITING  RUNNING")
        terminal.resize(30, 5)
        wait_until(lambda: (terminal.read() or True) and "…" in terminal.screen.lines[0])
        assert len(terminal.screen.lines[0]) == 29 and terminal.screen.lines[5:] == [""] * 25
        terminal.resize(100, 30)
        terminal.show("WAITING  RUNNING")
        assert terminal.end() == 130


def test_no_colour_changes_nothing(tmp_path):
    with running(tmp_path, service()) as host:
        for env in ({}, {"NO_COLOR": "1"}):
            with on_terminal(url_of(host), **env) as terminal:
                terminal.show("web")
                # Screen knows no colours, and would have failed.
                assert terminal.end() == 130


def test_a_server_that_goes_is_told_of_and_its_return_shows(tmp_path):
    port = free_port()
    with running(tmp_path, service(), f'[server]\nlisten = "127.0.0.1:{port}"\n') as host, on_terminal(url_of(host)) as terminal:
        terminal.show("web")
        host.kill()
        screen = terminal.show("cannot be reached")
        assert screen.lines[1].endswith("trying again") and "web" in screen.text
        host.start()
        host.wait(host.deploy())
        terminal.show("Healthy", "Succeeded")
        wait_until(lambda: (terminal.read() or True) and "cannot be reached" not in terminal.screen.text)
        assert terminal.end() == 130


# --- what comes from outside

EVIL = "a\x1b[2J\x07b\x9b31m\u202e\r\n\x00c"


class Impostor(http.server.BaseHTTPRequestHandler):
    """Answers like a server, in texts that are made to take a terminal over."""

    def do_GET(self) -> None:
        document = {"/services": {"services": [{"name": EVIL, "health": EVIL, "current_image": EVIL, "queue": {"pending": 0, "active": 1},
                                                "last_deploy": {"status": EVIL, "completed_at": EVIL}}]},
                    "/deployments": {"deployments": [{"service": EVIL, "image": EVIL, "status": EVIL, "deploy_id": EVIL, "started_at": EVIL,
                                                      "progress": {"steps_completed": 0, "steps_total": 1, "current_step": EVIL}}]}}
        self.send_response(200)
        if self.path.startswith("/events"):
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            move = {"service": EVIL, "image": EVIL, "deploy_id": EVIL, "previous_status": EVIL, "status": EVIL, "at": EVIL, "reason": EVIL, "error": EVIL}
            with contextlib.suppress(OSError):
                self.wfile.write(f"id: 1\nevent: deployment\ndata: {json.dumps(move)}\n\n".encode())
                self.server.over.wait(PATIENCE_S)
        else:
            body = json.dumps(document[self.path.partition("?")[0]]).encode()
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *words) -> None:
        pass


@pytest.fixture
def impostor():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Impostor) as server:
        server.over = threading.Event()
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.over.set()
            server.shutdown()
            thread.join()


def test_no_control_character_from_outside_reaches_the_screen(impostor):
    """Screen fails for every one that is not known."""
    with on_terminal(impostor, 1000, 30) as terminal:
        screen = terminal.show(r"a\x1b[2J\x07b\x9b31m\u202e\r\n\x00c", "AT ")
        moves = [line for line in screen.lines if line.count(r"\x1b[2J") >= 5]
        assert len(moves) >= 2 and terminal.end() == 130
        assert not set(terminal.raw) & {"\x07", "\x9b", "\u202e", "\x00"}


def test_no_control_character_from_outside_is_printed(impostor, tmp_path):
    host = Host(tmp_path, service())
    host.port = int(impostor.rpartition(":")[2])
    for flags in ((), ("--json",)):
        watch = Watch(host, *flags)
        try:
            wait_until(lambda: watch.lines)
            assert all(line.isprintable() for line in watch._files[0].read_text().split("\n"))
        finally:
            watch.process.kill()
            watch.process.wait()


@pytest.mark.parametrize("data", ["[1]", "null", "{}", '{"at": "2026"}', "[" * 50_000], ids=["list", "null", "empty", "part", "nested"])
def test_events_that_are_no_moves_are_told_and_do_not_end_it(data):
    stream = hookshot.MoveStream(Events([("deployment", "1", data)], [("deployment", "2", json.dumps(MOVE))]))
    told = stream.get(PATIENCE_S)
    assert isinstance(told, hookshot.HookshotError) and "sends events that cannot be read" in told.sentence
    assert stream.get(PATIENCE_S) == {**MOVE, "id": 2}


@pytest.mark.parametrize("piece", [b"x" * 1000, b"data: " + b"x" * 1000 + b"\n"], ids=["line", "event"])
def test_what_has_no_end_is_not_read_on(piece, monkeypatch):
    monkeypatch.setattr(hookshot, "_MAX_ANSWER_BYTES", 100_000)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        def say() -> None:
            link, _ = listener.accept()
            with link, contextlib.suppress(OSError):
                link.recv(1 << 16)
                link.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
                while True:
                    link.sendall(piece)

        speaker = threading.Thread(target=say)
        speaker.start()
        client = hookshot.Client(f"http://127.0.0.1:{listener.getsockname()[1]}", None, None)
        with pytest.raises(hookshot.HookshotError, match="without an end"):
            for _ in client.follow_moves(""):
                pass
        speaker.join()
