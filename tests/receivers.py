# SPDX-License-Identifier: MPL-2.0
"""Stand-ins for what notices are sent to: a web receiver and a mail server, real sockets on loopback that fail as told.

    with Receiver([500, "reset", ("slow", 0.3, 200)]) as receiver:     # then 204 for every further request
        ...post to receiver.url...
        first, second, third = receiver.wait_for(3)

Both keep what they were sent, and both can be stopped (connections are refused) and started again on the same port.
What the other side got wrong beyond an answer is in `faults`; leaving the context fails the test when there are any.
"""

import base64
import binascii
import contextlib
import dataclasses
import itertools
import re
import socket
import socketserver
import ssl
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from http import HTTPStatus
from typing import Any, Self

from support import PATIENCE_S

# The longest line that either side of a mail conversation may send, its end included (RFC 5321, 4.5.3.1.6).
MAX_LINE_BYTES = 1000
MAX_MAIL_BYTES = 10 << 20


class Hangup(Exception):
    """The conversation is over: the other side has gone, or the script says so."""


class Wire:
    """One connection as its conversation sees it: lines and counted bytes in, bytes out. Owned by one thread."""

    def __init__(self, connection: socket.socket):
        self.connection = connection
        self._read = b""

    @property
    def waiting(self) -> bytes:
        """What has been read from the socket and not been asked for yet."""
        return self._read

    def line(self) -> bytes:
        """Return the next line with its end, LF; raise Hangup at the end of the stream."""
        while b"\n" not in self._read:
            self._fill()
        line, end, self._read = self._read.partition(b"\n")
        return line + end

    def exactly(self, count: int) -> bytes:
        while len(self._read) < count:
            self._fill()
        content, self._read = self._read[:count], self._read[count:]
        return content

    def _fill(self) -> None:
        content = self.connection.recv(1 << 16)
        if not content:
            raise Hangup
        self._read += content

    def send(self, content: bytes) -> None:
        self.connection.sendall(content)

    def hang(self) -> None:
        """Say nothing more until the other side closes, or the stand-in is stopped."""
        while self.connection.recv(1 << 16):
            pass
        raise Hangup

    def reset(self) -> None:
        """End the connection with RST instead of FIN."""
        # To linger for no time means to throw away what is unsent and to reset (socket(7)).
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raise Hangup


class _Handler(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        self.server.owner.serve(self.request)


class _Listener(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Accepts for a stand-in; server_close() waits until every conversation has ended."""

    request_queue_size = 128

    def __init__(self, bound: socket.socket, owner: "StandIn"):
        super().__init__(bound.getsockname(), _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket, self.owner = bound, owner
        self.server_activate()

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        return self.owner.admit(connection), address

    def shutdown_request(self, request: socket.socket) -> None:
        # The inherited one sends FIN first; a connection that is to be reset must not.
        self.owner.dismiss(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        self.owner.fault(repr(sys.exception()))


class StandIn:
    """A port on loopback that listens or refuses, the connections open on it, and what was seen. Thread-safe.

    The port is the same for the life of the object, and nothing else gets it meanwhile: while nobody listens, it
    stays bound.
    """

    def __init__(self, tls: tuple[Any, Any] | None):
        """`tls`: files of a certificate and its key, in PEM."""
        self._context: ssl.SSLContext | None = None
        if tls:
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._context.load_cert_chain(*tls)
        # Guards everything below and what the subclasses record; told of each change.
        self._changed = threading.Condition()
        self._open: set[socket.socket] = set()
        self._listener: _Listener | None = None
        self._halted = threading.Event()
        self.faults: list[str] = []
        # How many connections were accepted.
        self.accepted = 0
        self._bound = self._bind(0)
        self.port: int = self._bound.getsockname()[1]

    @staticmethod
    def _bind(port: int) -> socket.socket:
        bound = socket.socket()
        # Connections of the last listener may still be in TIME_WAIT.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(("127.0.0.1", port))
        return bound

    def start(self) -> Self:
        """Listen."""
        assert self._listener is None, "it listens already"
        self._halted.clear()
        self._listener = _Listener(self._bound, self)
        threading.Thread(target=self._listener.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def stop(self) -> None:
        """Cut every connection and refuse new ones; what is being said in this moment is not recorded any more."""
        listener, self._listener = self._listener, None
        if listener is None:
            return
        listener.shutdown()
        self._halted.set()
        with self._changed:
            left = list(self._open)
        for connection in left:
            # Not the method of SSLSocket: it takes its TLS object from under the thread that reads.
            with contextlib.suppress(OSError):
                socket.socket.shutdown(connection, socket.SHUT_RDWR)
        listener.server_close()
        self._bound = self._bind(self.port)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: Any, *_: Any) -> None:
        self.stop()
        self._bound.close()
        assert kind or not self.faults, self.faults

    # --- what _Listener calls

    def admit(self, connection: socket.socket) -> socket.socket:
        """Count a new connection among the open ones; return it, with TLS around it if that comes first."""
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._begins_with_tls():
            connection = self._wrap(connection)
        with self._changed:
            self._open.add(connection)
            self.accepted += 1
            self._changed.notify_all()
        return connection

    def _begins_with_tls(self) -> bool:
        return self._context is not None

    def _wrap(self, connection: socket.socket) -> ssl.SSLSocket:
        """Put TLS around a connection. The handshake comes later, in the connection's own thread."""
        assert self._context
        return self._context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)

    def serve(self, connection: socket.socket) -> None:
        """Lead one conversation to its end, whoever ends it."""
        # OSError: reset by the other side, a handshake that failed, or a stop.
        with contextlib.suppress(Hangup, OSError):
            if isinstance(connection, ssl.SSLSocket):
                connection.do_handshake()
            self._converse(Wire(connection))

    def _converse(self, wire: Wire) -> None:
        raise NotImplementedError

    def dismiss(self, connection: socket.socket) -> None:
        with self._changed:
            # Under STARTTLS another object has taken over the descriptor of the one that was admitted.
            found = [other for other in self._open if other is connection or getattr(other, "before", None) is connection]
            self._open.difference_update(found)
        for other in found or [connection]:
            other.close()

    def fault(self, sentence: str) -> None:
        """Keep what must not have happened."""
        with self._changed:
            self.faults.append(sentence)
            self._changed.notify_all()

    def _wait(self, condition: Callable[[], bool], what: Callable[[], str], patience_s: float) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, patience_s), f"after {patience_s} s: {what()}"


# --- HTTP

# A status; (status, headers[, body]); "reset", "close", "hang"; ("slow", seconds, status); ("drip", seconds, status).
HttpAnswer = int | str | tuple[Any, ...]
# One answer for each request in the order of their arrival; or what chooses it.
HttpScript = Iterable[HttpAnswer] | Callable[["Received"], HttpAnswer]


@dataclasses.dataclass(eq=False, slots=True)
class Received:
    """One whole request. Names of headers are in lower case; a header sent twice has both values, joined by ", "."""

    number: int
    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    # time.monotonic() when its last byte had come.
    at_s: float
    # What the script says about it.
    answer: HttpAnswer = 0
    # The status that was sent, and when its last byte was; None until then, or for ever.
    status: int | None = None
    answered_s: float | None = None


class Receiver(StandIn):
    """A web server that keeps every request and answers as told: 204 unless the script says otherwise.

    Answers: a status; (status, headers) and (status, headers, body); "reset" (RST after the request), "close" (the end
    without an answer), "hang" (silence until the other side closes); ("slow", seconds, status), which answers after so
    long; ("drip", seconds, status), which waits so long before each byte of the answer's head.

    `answers` gives one for each request in the order of arrival (itertools.repeat(500): always), or is a function of
    the request. One is chosen at a time, and nothing is recorded meanwhile: a function may use what is not thread-safe.
    """

    def __init__(self, answers: HttpScript = (), *, tls: tuple[Any, Any] | None = None):
        assert not isinstance(answers, str), f"one answer is not a script: [{answers!r}]"
        super().__init__(tls)
        self._requests: list[Received] = []
        # Connections that ended within a request.
        self.broken = 0
        self._choose: Callable[[Received], HttpAnswer]
        self.script(answers)

    def script(self, answers: HttpScript) -> None:
        """Answer by this script from now on."""
        chosen = answers if callable(answers) else iter(answers)
        with self._changed:
            self._choose = chosen if callable(chosen) else lambda _: next(chosen, 204)

    @property
    def url(self) -> str:
        """The address, without a path."""
        return f"{'https' if self._context else 'http'}://127.0.0.1:{self.port}"

    @property
    def requests(self) -> tuple[Received, ...]:
        """What has come so far, in the order of arrival."""
        with self._changed:
            return tuple(self._requests)

    def wait_for(self, count: int, *, patience_s: float = PATIENCE_S) -> tuple[Received, ...]:
        """Return all requests once there are at least so many."""
        self._wait(lambda: len(self._requests) >= count, lambda: f"{len(self._requests)} of {count} requests", patience_s)
        return self.requests

    def _converse(self, wire: Wire) -> None:
        keeps = True
        while keeps and (received := self._read(wire)):
            keeps = self._answer(wire, received) and received.headers.get("connection", "").lower() != "close"

    def _read(self, wire: Wire) -> Received | None:
        """Return the next request, recorded; None if the connection ends or breaks."""
        request = b""
        try:
            request = wire.line()
            parts = _read_request(wire, request)
        except (Hangup, OSError):
            with self._changed:
                self.broken += bool(request or wire.waiting)
            return None
        except ValueError as error:
            self.fault(f"not a request: {error}")
            wire.send(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            return None
        return self._record(*parts)

    def _record(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Received:
        with self._changed:
            received = Received(len(self._requests), method, path, headers, body, time.monotonic())
            # Before the choice, so that a script that fails loses no request.
            self._requests.append(received)
            self._changed.notify_all()
            received.answer = self._choose(received)
            return received

    def _answer(self, wire: Wire, received: Received) -> bool:
        """Do what the script says; tell whether the connection may go on."""
        match received.answer:
            case "reset":
                wire.reset()
            case "close":
                return False
            case "hang":
                wire.hang()
            case ("slow", seconds, status):
                if self._halted.wait(seconds):
                    return False
                return self._say(wire, received, status)
            case ("drip", seconds, status):
                return self._say(wire, received, status, pause_s=seconds)
            case (int() as status, headers, *body):
                return self._say(wire, received, status, headers, *body)
            case int() as status:
                return self._say(wire, received, status)
        raise ValueError(f"{received.answer!r} is no answer")

    def _say(self, wire: Wire, received: Received, status: int, headers: Mapping[str, str] | None = None, body: bytes = b"", *,
             pause_s: float = 0) -> bool:
        """Send an answer; tell whether the connection may go on."""
        fields = {name.lower(): f"{name}: {value}" for name, value in (headers or {}).items()}
        if status >= 200 and status not in (204, 304) and "transfer-encoding" not in fields:
            fields.setdefault("content-length", f"Content-Length: {len(body)}")
        phrase = HTTPStatus(status).phrase if status in list(HTTPStatus) else "As Told"
        head = "\r\n".join([f"HTTP/1.1 {status} {phrase}", *fields.values(), "", ""]).encode("latin-1")
        if pause_s:
            for byte in head:
                if self._halted.wait(pause_s):
                    return False
                wire.send(bytes([byte]))
            head = b""
        wire.send(head + (b"" if received.method == "HEAD" else body))
        with self._changed:
            received.status, received.answered_s = status, time.monotonic()
            self._changed.notify_all()
        return "close" not in fields.get("connection", "")


def _read_request(wire: Wire, request: bytes) -> tuple[str, str, dict[str, str], bytes]:
    """Return method, path, headers and body; a ValueError says why this is no request of HTTP/1.1."""
    match = re.fullmatch(rb"([A-Z]+) ([!-~]+) HTTP/1\.[01]\r\n", request)
    if not match:
        raise ValueError(f"request line {request!r}")
    headers: dict[str, str] = {}
    while (line := wire.line()) != b"\r\n":
        name, colon, value = line.removesuffix(b"\r\n").partition(b":")
        if not line.endswith(b"\r\n") or not colon or not re.fullmatch(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name) or re.search(rb"[\r\n\0]", value):
            raise ValueError(f"header line {line!r}")
        key, text = name.decode().lower(), value.strip(b" \t").decode("latin-1")
        headers[key] = f"{headers[key]}, {text}" if key in headers else text
    if "host" not in headers:
        raise ValueError("no Host header")
    return match[1].decode(), match[2].decode(), headers, _read_body(wire, headers)


def _read_body(wire: Wire, headers: dict[str, str]) -> bytes:
    if headers.get("transfer-encoding", "").lower() == "chunked":
        body = b""
        while size := int(wire.line().strip(), 16):
            body += wire.exactly(size + 2)[:-2]
        while wire.line() != b"\r\n":
            pass
        return body
    length = headers.get("content-length", "0")
    if not re.fullmatch("[0-9]{1,9}", length, re.ASCII):
        raise ValueError(f"Content-Length {length!r}")
    return wire.exactly(int(length))


# --- mail

@dataclasses.dataclass(frozen=True, slots=True)
class Mail:
    """One message that was taken, and how it came. `content` is as sent, dots unstuffed, lines ended by CRLF."""

    sender: str
    recipients: tuple[str, ...]
    content: bytes
    was_tls: bool
    user: str | None
    # time.monotonic() when it was taken.
    at_s: float


class MailServer(StandIn):
    """An SMTP server (RFC 5321) that keeps every mail and every command, is strict, and refuses as told.

    `tls` (files of certificate and key) offers STARTTLS, or with `implicit` speaks TLS from the first byte. With
    `users` (passwords by name) mail takes AUTH PLAIN or LOGIN; where there is STARTTLS, AUTH comes only after it.

    `refuse` maps a stage to a reply ("550 no such user"), "hang", "close" or "reset", which then stand for every time,
    or to a sequence of these with None for no refusal: one for each time, none after the last. So
    {"RCPT": ["451 greylisted"] * 2} is greylisting. Stages: CONNECT, EHLO, HELO, STARTTLS, AUTH, MAIL, RCPT, DATA,
    BODY (after the final dot), RSET, NOOP, QUIT; and "RCPT a@example.org" for one recipient. A reply of 421 also closes.

    Strict: commands out of order, lines over 1,000 bytes, CR or LF alone, 8-bit content without BODY=8BITMIME,
    addresses beyond ASCII without SMTPUTF8, and mail larger than said are refused.
    """

    def __init__(self, *, tls: tuple[Any, Any] | None = None, implicit: bool = False, users: Mapping[str, str] | None = None,
                 refuse: Mapping[str, str | Iterable[str | None]] | None = None, max_bytes: int = MAX_MAIL_BYTES,
                 extensions: tuple[str, ...] = ("8BITMIME", "SMTPUTF8")):
        super().__init__(tls)
        self.implicit, self.users, self.max_bytes, self.extensions = implicit, users, max_bytes, extensions
        self._mails: list[Mail] = []
        self._commands: list[bytes] = []
        self._refusals: dict[str, Iterator[str | None]] = {}
        self.refuse(refuse or {})

    def refuse(self, refusals: Mapping[str, str | Iterable[str | None]]) -> None:
        """Refuse this, and nothing else, from now on."""
        scripts = {stage: itertools.repeat(said) if isinstance(said, str) else iter(said) for stage, said in refusals.items()}
        with self._changed:
            self._refusals = scripts

    @property
    def address(self) -> str:
        """host:port"""
        return f"127.0.0.1:{self.port}"

    @property
    def mails(self) -> tuple[Mail, ...]:
        """What was taken so far."""
        with self._changed:
            return tuple(self._mails)

    @property
    def commands(self) -> tuple[bytes, ...]:
        """Every line that was sent outside of messages, with its end, of all connections; the answers to AUTH too."""
        with self._changed:
            return tuple(self._commands)

    def wait_for(self, count: int, *, patience_s: float = PATIENCE_S) -> tuple[Mail, ...]:
        """Return all mails once there are at least so many."""
        self._wait(lambda: len(self._mails) >= count, lambda: f"{len(self._mails)} of {count} mails; commands: {self._commands}", patience_s)
        return self.mails

    def wait_for_command(self, verb: bytes, count: int = 1, *, patience_s: float = PATIENCE_S) -> None:
        """Return once a command has come so many times."""
        self._wait(lambda: sum(line.upper().startswith(verb) for line in self._commands) >= count,
                   lambda: f"{verb!r} has not come {count} times: {self._commands}", patience_s)

    def _begins_with_tls(self) -> bool:
        return self.implicit

    def _converse(self, wire: Wire) -> None:
        MailConversation(self, wire).run()

    # --- what MailConversation calls

    def refusal(self, stage: str) -> str | None:
        """Take the next refusal scripted for a stage."""
        with self._changed:
            return next(self._refusals.get(stage, iter(())), None)

    def note_command(self, line: bytes) -> None:
        with self._changed:
            self._commands.append(line)
            self._changed.notify_all()

    def take(self, mail: Mail) -> None:
        with self._changed:
            self._mails.append(mail)
            self._changed.notify_all()

    def start_tls(self, wire: Wire) -> Wire:
        """Put TLS around a connection that is open."""
        before = wire.connection
        wrapped = self._wrap(before)
        # stop() must find the one that is alive now; dismiss() is given the one that was.
        wrapped.before = before
        with self._changed:
            self._open.discard(before)
            self._open.add(wrapped)
        wrapped.do_handshake()
        return Wire(wrapped)

    @property
    def has_starttls(self) -> bool:
        return self._context is not None and not self.implicit


class MailConversation:
    """One connection to a MailServer: what has been said, and the answer to each command. Owned by one thread."""

    def __init__(self, server: MailServer, wire: Wire):
        self._server, self._wire = server, wire
        self._is_tls = server.implicit
        self._user: str | None = None
        self._has_greeted = False
        self._forget()

    def _forget(self) -> None:
        """Begin a new mail."""
        self._sender: str | None = None
        self._recipients: list[str] = []
        self._options: dict[str, str] = {}

    def run(self) -> None:
        """Talk until QUIT, or until the other side has gone."""
        if not self._is_refused("CONNECT"):
            self._reply("220 localhost ESMTP stand-in")
        while True:
            line = self._command_line()
            verb, _, rest = line.decode("utf-8", "surrogateescape").removesuffix("\r\n").partition(" ")
            answer = self.COMMANDS.get(verb.upper())
            if not line.endswith(b"\r\n") or b"\r" in line[:-2] or len(line) > MAX_LINE_BYTES:
                self._reply("500 5.5.2 a line ends in CRLF and has at most 1000 bytes")
            elif answer is None:
                self._reply("500 5.5.1 unknown command")
            elif not self._is_refused(verb.upper()):
                answer(self, rest)

    def _command_line(self) -> bytes:
        line = self._wire.line()
        self._server.note_command(line)
        return line

    def _reply(self, *lines: str) -> None:
        """Send a reply; several lines share the code of the first."""
        code, texts = lines[0][:3], [lines[0][4:], *lines[1:]]
        self._wire.send("".join(f"{code}-{text}\r\n" for text in texts[:-1]).encode() + f"{code} {texts[-1]}\r\n".encode())
        if code == "421":
            raise Hangup

    def _is_refused(self, stage: str) -> bool:
        """Do what the script says about a stage; tell whether it says anything."""
        said = self._server.refusal(stage)
        match said:
            case None:
                return False
            case "hang":
                self._wire.hang()
            case "close":
                raise Hangup
            case "reset":
                self._wire.reset()
        self._reply(said)
        return True

    # --- the commands

    def _ehlo(self, rest: str) -> None:
        self._forget()
        self._has_greeted = True
        server = self._server
        offers = [f"SIZE {server.max_bytes}", *server.extensions]
        if server.has_starttls and not self._is_tls:
            offers.append("STARTTLS")
        elif server.users:
            offers.append("AUTH PLAIN LOGIN")
        self._reply("250 localhost", *offers)

    def _helo(self, rest: str) -> None:
        self._forget()
        self._has_greeted = True
        self._reply("250 localhost")

    def _starttls(self, rest: str) -> None:
        if not self._server.has_starttls or self._is_tls:
            return self._reply("502 5.5.1 no STARTTLS here")
        if self._wire.waiting:
            # It would otherwise count as sent under TLS (CVE-2011-0411).
            self._server.fault(f"sent after STARTTLS in the clear: {self._wire.waiting!r}")
        self._reply("220 2.0.0 go ahead")
        self._wire = self._server.start_tls(self._wire)
        self._is_tls, self._has_greeted, self._user = True, False, None
        self._forget()

    def _auth(self, rest: str) -> None:
        if not self._server.users or self._user is not None or self._sender is not None or not self._has_greeted:
            return self._reply("503 5.5.1 AUTH makes no sense here")
        if self._server.has_starttls and not self._is_tls:
            return self._reply("538 5.7.11 AUTH takes TLS")
        mechanism, _, initial = rest.partition(" ")
        try:
            match mechanism.upper():
                case "PLAIN":
                    _, user, password = self._asked("", initial).split("\0")
                case "LOGIN":
                    user, password = self._asked("VXNlcm5hbWU6", initial), self._asked("UGFzc3dvcmQ6")
                case _:
                    return self._reply("504 5.5.4 PLAIN or LOGIN")
        except ValueError:
            return self._reply("501 5.5.2 that is not what AUTH takes")
        if self._server.users.get(user) != password:
            return self._reply("535 5.7.8 wrong name or password")
        self._user = user
        self._reply("235 2.7.0 welcome")

    def _asked(self, prompt: str, initial: str = "") -> str:
        """Return what the client says in base64, at once or when asked."""
        if not initial:
            self._reply(f"334 {prompt}")
            initial = self._command_line().decode("ascii").strip()
        try:
            return base64.b64decode(initial, validate=True).decode()
        except binascii.Error as error:
            raise ValueError(str(error)) from None

    def _mail(self, rest: str) -> None:
        if not self._has_greeted or self._sender is not None:
            return self._reply("503 5.5.1 EHLO comes first, and one MAIL at a time")
        if self._server.users and self._user is None:
            return self._reply("530 5.7.0 authentication required")
        match = re.fullmatch(r"FROM:<([^<>\s]*)>((?: \S+)*)", rest, re.IGNORECASE)
        if not match:
            return self._reply("501 5.5.4 MAIL FROM:<address>")
        options = dict(word.upper().partition("=")[::2] for word in match[2].split())
        if options.keys() - {"SIZE", "BODY", "SMTPUTF8"} or not re.fullmatch("[0-9]+", options.get("SIZE", "0"), re.ASCII):
            return self._reply("555 5.5.4 SIZE=number, BODY=7BIT or 8BITMIME, and SMTPUTF8 are understood")
        if not match[1].isascii() and "SMTPUTF8" not in options:
            return self._reply("553 5.6.7 that address takes SMTPUTF8")
        if int(options.get("SIZE", "0")) > self._server.max_bytes:
            return self._reply("552 5.3.4 too large")
        self._sender, self._options = match[1], options
        self._reply("250 2.1.0 ok")

    def _rcpt(self, rest: str) -> None:
        if self._sender is None:
            return self._reply("503 5.5.1 MAIL comes first")
        match = re.fullmatch(r"TO:<([^<>\s]+)>", rest, re.IGNORECASE)
        if not match:
            return self._reply("501 5.5.4 RCPT TO:<address>")
        if not match[1].isascii() and "SMTPUTF8" not in self._options:
            return self._reply("553 5.6.7 that address takes SMTPUTF8")
        if self._is_refused(f"RCPT {match[1]}"):
            return None
        self._recipients.append(match[1])
        self._reply("250 2.1.5 ok")

    def _data(self, rest: str) -> None:
        if not self._recipients:
            return self._reply("503 5.5.1 RCPT comes first")
        self._reply("354 end with a dot")
        lines = []
        while (line := self._wire.line()) != b".\r\n":
            lines.append(line)
        content = b"".join(line.removeprefix(b".") for line in lines)
        problem = self._problem(lines, content)
        if problem:
            self._reply(problem)
        elif not self._is_refused("BODY"):
            self._server.take(Mail(self._sender or "", tuple(self._recipients), content, self._is_tls, self._user, time.monotonic()))
            self._reply("250 2.0.0 taken")
        self._forget()

    def _problem(self, lines: list[bytes], content: bytes) -> str | None:
        """Return the reply to a message that cannot be taken, or None."""
        if len(content) > self._server.max_bytes:
            return "552 5.3.4 too large"
        if any(not line.endswith(b"\r\n") or b"\r" in line[:-2] for line in lines):
            return "554 5.6.0 CR or LF alone"
        if any(len(line.removeprefix(b".")) > MAX_LINE_BYTES for line in lines):
            return "554 5.6.0 a line has at most 1000 bytes"
        if not content.isascii() and self._options.get("BODY") != "8BITMIME":
            return "554 5.6.3 8-bit content takes BODY=8BITMIME"
        return None

    def _rset(self, rest: str) -> None:
        self._forget()
        self._reply("250 2.0.0 forgotten")

    def _noop(self, rest: str) -> None:
        self._reply("250 2.0.0 ok")

    def _quit(self, rest: str) -> None:
        self._reply("221 2.0.0 bye")
        raise Hangup

    COMMANDS = {"EHLO": _ehlo, "HELO": _helo, "STARTTLS": _starttls, "AUTH": _auth, "MAIL": _mail, "RCPT": _rcpt, "DATA": _data,
                "RSET": _rset, "NOOP": _noop, "QUIT": _quit}
