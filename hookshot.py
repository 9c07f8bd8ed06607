#!/usr/bin/env python3
# SPDX-License-Identifier: MPL-2.0
"""Hookshot: one signed HTTP request becomes one deployment that the operator wrote down beforehand.

What flows, from the socket to the terminal state:

    socket bytes
      | SERVER             limits on size, time and number; nothing is parsed twice
    Request
      | API.dispatch       a row of ROUTES, its gates in the order written there
    VerifiedBody
      | WIRE.parse_deploy  all problems of the body at once
    DeployRequest
      | STORE.submit       one durable transaction; same id and same body -> the same answer
    Deployment(Queued)     -> Accepted -> 202
      | STORE.claim        the limits are in the claim itself
      | PLAN.build_plan    pure: commands, environment, deadlines
    Plan
      | RUN                output goes to the deployment's log as it comes
    Result
      | PLAN.judge         -> Outcome -> LIFECYCLE.advance -> State
      | STORE.move         compare and set
    Moved                  published after the commit: log, waiting requests

Down the page is up the stack: a section uses only sections above it (ASSETS, the last, holds only text).

    1 ERRORS      2 VALUES     3 TEMPLATES    4 CONFIG    5 WIRE      6 LIFECYCLE   7 PLAN
    9 EVENTS     10 METRICS   11 WORLD       12 LOG      13 STORE    14 SECRETS    15 RUN
   16 NOTIFY     17 ENGINE
   18 API        19 SERVER    20 BACKUP      21 DAEMON   22 CLIENT    23 DOCTOR     24 CLI
    A ASSETS
"""

import sys

# Said before anything that an older Python or Windows does not have is imported.
if sys.version_info < (3, 11) or sys.platform == "win32":
    _found = "Windows" if sys.platform == "win32" else "Python %d.%d" % sys.version_info[:2]
    sys.stderr.write("hookshot: needs Python 3.11 or newer on Linux or macOS; this is " + _found + "\n")
    sys.exit(78)

import argparse
import base64
import bisect
import collections
import contextlib
import errno
import fcntl
import functools
import gc
import hashlib
import hmac
import http
import http.client
import http.server
import importlib
import ipaddress
import itertools
import json
import os
import pwd
import queue
import re
import resource
import secrets
import select
import selectors
import shlex
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
import threading
import time
import tomllib
import urllib.parse
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from typing import Any, NamedTuple, NoReturn, Protocol

try:
    import ssl
except ImportError:  # a Python built without OpenSSL: only TLS is off
    ssl = None  # type: ignore[assignment]

__version__ = "2.0.0"


# === 1. ERRORS ========================================================================================================
# Every failure that a caller or an operator can meet is a row here; everything else is a bug.
#
# 1. A HookshotError is a row's name plus one sentence: what happened, with which value, what to do.
# 2. The sentence never holds a secret, a command line, a pattern or a stack: callers read it.
# 3. Rows are translated once, at the edge: to HTTP by API, to an exit status by CLI.


class ErrorKind(NamedTuple):
    """One kind of failure: its code in answers, HTTP status, exit status of the client, and when to try again."""

    code: str
    http: int
    exit: int
    title: str
    retry_after_s: int | None = None


# sysexits.h gives the numbers from 64 on; 10 to 14 are outcomes of a followed deployment (see EXIT_OF_STATE).
EXIT_OK, EXIT_BUG, EXIT_CONFIG = 0, 70, 78
EXIT_STILL_RUNNING, EXIT_INTERRUPTED = 14, 130

ERRORS: dict[str, ErrorKind] = {
    "validation": ErrorKind("VALIDATION_ERROR", 400, 65, "The request is not valid"),
    "bad_request": ErrorKind("BAD_REQUEST", 400, 65, "The HTTP request is malformed"),
    "authentication": ErrorKind("AUTHENTICATION_ERROR", 401, 77, "The request is not authenticated"),
    "access_denied": ErrorKind("ACCESS_DENIED", 403, 77, "Access is denied"),
    "not_found": ErrorKind("NOT_FOUND", 404, 65, "There is no such resource"),
    "service_not_found": ErrorKind("SERVICE_NOT_FOUND", 404, 65, "There is no such service"),
    "deployment_not_found": ErrorKind("DEPLOYMENT_NOT_FOUND", 404, 65, "There is no such deployment"),
    "method_not_allowed": ErrorKind("METHOD_NOT_ALLOWED", 405, 65, "The method is not allowed here"),
    "request_timeout": ErrorKind("REQUEST_TIMEOUT", 408, 75, "The request took too long"),
    "conflict": ErrorKind("DEPLOY_ID_CONFLICT", 409, 65, "The id is taken by another request"),
    "not_possible": ErrorKind("NOT_POSSIBLE", 409, 65, "This is not possible as things are"),
    "length_required": ErrorKind("LENGTH_REQUIRED", 411, 65, "The body has no length"),
    "too_large": ErrorKind("PAYLOAD_TOO_LARGE", 413, 65, "The body is too large"),
    "uri_too_long": ErrorKind("URI_TOO_LONG", 414, 65, "The request line is too long"),
    "media_type": ErrorKind("UNSUPPORTED_MEDIA_TYPE", 415, 65, "The body is not of a supported type"),
    "expectation": ErrorKind("EXPECTATION_FAILED", 417, 65, "The expectation cannot be met"),
    "service_locked": ErrorKind("SERVICE_LOCKED", 423, 75, "The service is locked"),
    "rate_limited": ErrorKind("RATE_LIMIT_EXCEEDED", 429, 75, "There were too many requests", 60),
    "headers_too_large": ErrorKind("HEADERS_TOO_LARGE", 431, 65, "The headers are too large"),
    "internal": ErrorKind("INTERNAL_ERROR", 500, 70, "The server made a mistake"),
    "not_implemented": ErrorKind("NOT_IMPLEMENTED", 501, 65, "The transfer coding is not supported"),
    "busy": ErrorKind("CONCURRENCY_LIMIT_EXCEEDED", 503, 75, "The service is busy", 30),
    "overloaded": ErrorKind("CONNECTION_LIMIT_EXCEEDED", 503, 75, "There are too many connections", 5),
    "shutting_down": ErrorKind("SHUTTING_DOWN", 503, 75, "The server is shutting down", 30),
    "storage": ErrorKind("STORAGE_ERROR", 503, 75, "The database cannot be used", 30),
    "http_version": ErrorKind("HTTP_VERSION_NOT_SUPPORTED", 505, 65, "The HTTP version is not supported"),
    "disk_full": ErrorKind("DISK_FULL", 507, 75, "The disk is full", 60),
    # The rest never leaves over HTTP: failures of the command line.
    "bad_archive": ErrorKind("BAD_ARCHIVE", 400, 65, "An archive is not as it should be"),
    "usage": ErrorKind("USAGE", 400, 2, "The command line is wrong"),
    "unreachable": ErrorKind("UNREACHABLE", 502, 69, "The server cannot be reached"),
    "cannot_write": ErrorKind("CANNOT_WRITE", 500, 73, "A file cannot be written"),
    "in_use": ErrorKind("IN_USE", 503, 75, "Another process holds it"),
    "audit_broken": ErrorKind("AUDIT_BROKEN", 500, 65, "The audit is not as it was written"),
    "config": ErrorKind("CONFIG", 500, 78, "The configuration is wrong"),
}
KIND_OF_CODE = {kind.code: name for name, kind in ERRORS.items()}


class HookshotError(Exception):
    """A row of ERRORS and its sentence; `details` is a further text for the caller, `headers` go with the answer.

    `members` are further members of the JSON answer. Callers see neither `reason`, a word for the metrics, nor `gate`, a row
    of GATES where the error does not tell it, nor `about`: the service, deploy_id and image that were asked for.
    """

    def __init__(self, name: str, sentence: str, *, details: str | None = None, retry_after_s: int | None = None,
                 headers: tuple[tuple[str, str], ...] = (), reason: str | None = None, members: Mapping[str, Any] = {},
                 gate: str | None = None):
        super().__init__(sentence)
        self.name = name
        self.kind = ERRORS[name]
        self.sentence = sentence
        self.details = details
        self.headers = headers
        self.members = members
        self.reason = reason
        self.gate = gate
        self.about: tuple[str | None, str | None, str | None] = (None, None, None)
        self.retry_after_s = self.kind.retry_after_s if retry_after_s is None else retry_after_s


class Problem(NamedTuple):
    """One thing wrong with a file: where, and what to do about it. A warning does not stop the server."""

    file: str
    path: str
    message: str
    is_warning: bool = False

    def __str__(self) -> str:
        return f"{self.file}: {self.path}{': ' if self.path else ''}{self.message}"


class ConfigError(HookshotError):
    """All problems of the configuration at once."""

    def __init__(self, problems: Sequence[Problem]):
        super().__init__("config", f"{len(problems)} problem{'s' * (len(problems) != 1)} in the configuration")
        self.problems = tuple(problems)


# === 2. VALUES ========================================================================================================
# Small texts and numbers, in and out: durations, sizes, times, ids, addresses. Everything here is pure.
#
# 1. parse_* raises ValueError with a sentence for the operator; render_* never fails.
# 2. Patterns are used with fullmatch and re.ASCII: "$" would let a final newline pass, "\d" would let other digits.

SERVICE_NAME = re.compile(r"[A-Za-z0-9_-]{1,32}", re.ASCII)
DEPLOY_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", re.ASCII)
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}", re.ASCII)
ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}", re.ASCII)
SECRET_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}", re.ASCII)
META_KEY = re.compile(r"[A-Za-z0-9_.-]{1,64}", re.ASCII)

# A value from a request ends in an argument list: longer than this is no image name and no commit.
MAX_VALUE_CHARS = 512

_DURATION = re.compile(r"\s*(\d{1,9})\s*(s|m|h|d)?\s*", re.ASCII | re.IGNORECASE)
_DURATION_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_SIZE = re.compile(r"\s*(\d{1,15})\s*(b|kb|kib|k|mb|mib|m|gb|gib|g)?\s*", re.ASCII | re.IGNORECASE)
_SIZE_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


def parse_duration(value: object) -> int:
    """Return whole seconds from an integer or a text such as "90s", "5m", "2h"."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = _DURATION.fullmatch(value) if isinstance(value, str) else None
    if not match:
        raise ValueError(f"{render_value(value)} is not a duration; write seconds (90) or \"90s\", \"5m\", \"2h\"")
    return int(match[1]) * _DURATION_UNITS[(match[2] or "s").lower()]


def parse_size(value: object) -> int:
    """Return bytes from an integer or a text such as "64KB", "1 mb" (1024-based)."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if not match:
        raise ValueError(f"{render_value(value)} is not a size; write bytes (1048576) or \"64KB\", \"1MB\"")
    return int(match[1]) * _SIZE_UNITS[(match[2] or "")[:1].lower()]


def render_value(value: object) -> str:
    """Return a configuration value as its file would write it, clipped, without control characters; what is in a table may be secret."""
    if value and isinstance(value, dict):
        return "a table"
    if isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
        return "a list of tables"
    if isinstance(value, str | bool | int | float | list | dict) or value is None:
        return clip(escape_controls(json.dumps(value, ensure_ascii=False, default=str)), 80)
    return clip(escape_controls(str(value)), 80)


def render_time(at_ms: int | None) -> str | None:
    """Return RFC 3339 in UTC with milliseconds, or None for a time that has not come."""
    if at_ms is None:
        return None
    return f"{_render_second(at_ms // 1000)}.{at_ms % 1000:03d}Z"


@functools.lru_cache(maxsize=16)
def _render_second(seconds: int) -> str:
    """Most times rendered in a row lie in the same second, and strftime is slow."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


def render_duration(duration_ms: int | None) -> str:
    """Return a duration for people: "85 ms", "4.2 s", "3 m 20 s", "2 h 5 m"."""
    if duration_ms is None:
        return "-"
    if duration_ms < 1000:
        return f"{duration_ms} ms"
    if duration_ms < 60_000:
        return f"{duration_ms / 1000:.1f} s"
    minutes, seconds = divmod(duration_ms // 1000, 60)
    parts = (f"{minutes // 60} h", f"{minutes % 60} m") if minutes >= 60 else (f"{minutes} m", f"{seconds} s")
    return " ".join(part for part in parts if not part.startswith("0 "))


def render_size(size_bytes: int) -> str:
    """Return a size for people, 1024-based."""
    for unit, scale in (("GB", 1 << 30), ("MB", 1 << 20), ("KB", 1 << 10)):
        if size_bytes >= scale:
            return f"{size_bytes / scale:.1f}".removesuffix(".0") + f" {unit}"
    return f"{size_bytes} B"


def clip(text: str, limit: int) -> str:
    """Return at most `limit` characters of `text`, an ellipsis in place of what was cut."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


CONTROL_ESCAPES = {code: f"\\x{code:02x}" for code in [*range(32), *range(127, 160)]} | {
    9: "\\t", 10: "\\n", 13: "\\r", 0x2028: "\\u2028", 0x2029: "\\u2029",
    # Bidirectional overrides can make a log line read as something else ("Trojan source").
    **{code: f"\\u{code:04x}" for code in [*range(0x202A, 0x202F), *range(0x2066, 0x206A)]},
}


def escape_controls(text: str) -> str:
    """Return `text` with every control character made visible, so that it cannot forge a log line or move a cursor."""
    return text if text.isprintable() else text.translate(CONTROL_ESCAPES)


def check_request_value(text: str, *, may_start_with_dash: bool = False) -> str | None:
    """Return what is wrong with a value from a request, or None: it may end in a command's arguments."""
    if len(text) > MAX_VALUE_CHARS:
        return f"is longer than {MAX_VALUE_CHARS} characters"
    if not text.isprintable():
        return "has control or other unprintable characters"
    if text.startswith("-") and not may_start_with_dash:
        return "starts with '-', so a command would take it for an option"
    return None


def nearest(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean X?" for the known name most like `name`, or nothing."""
    import difflib  # only ever needed when something is wrong

    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {found[0]}?" if found else ""


Network = ipaddress.IPv4Network | ipaddress.IPv6Network
# Stands for the address of a peer at a unix socket, which has none: in lists of networks, in records, in the log.
UNIX_PEER = "unix"
# What a request comes from: an address, UNIX_PEER, or None for one that cannot be read.
Peer = ipaddress.IPv4Address | ipaddress.IPv6Address | str | None


def parse_network(value: object) -> Network:
    """Return the network of a bare address or a CIDR text; host bits must be zero."""
    if not isinstance(value, str):
        raise ValueError(f"{render_value(value)} is not an address; write \"192.0.2.7\" or \"192.0.2.0/24\"")
    try:
        return _unmap(ipaddress.ip_network(value))
    except ValueError:
        pass
    try:
        right = ipaddress.ip_network(value, strict=False)
    except ValueError:
        raise ValueError(f"{render_value(value)} is not an address or CIDR network") from None
    raise ValueError(f"{value} has host bits set; the network is {right}")


def _unmap(network: Network) -> Network:
    """Return the IPv4 network of ::ffff:0:0/96 addresses: clients' addresses are unmapped before they are compared."""
    mapped = network.version == 6 and network.prefixlen >= 96 and getattr(network.network_address, "ipv4_mapped", None)
    return ipaddress.ip_network(f"{mapped}/{network.prefixlen - 96}") if mapped else network


def parse_address(text: str) -> Peer:
    """Return the address in a peer or forwarding text: brackets, port and zone stripped, v4-mapped unmapped."""
    text = text.strip()
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def parse_peers(value: object) -> Network | str:
    """Return a network, or UNIX_PEER for "unix"."""
    return UNIX_PEER if value == UNIX_PEER else parse_network(value)


def is_in(address: Peer, networks: Sequence[Network | str]) -> bool:
    """Return whether `address` lies in one of `networks`; an unreadable one lies in none."""
    if address is None or isinstance(address, str):
        return address in networks
    return any(address in network for network in networks if not isinstance(network, str))


def render_peer(address: Peer) -> str:
    """Return the text of an address, "unix" or "unknown"."""
    return "unknown" if address is None else str(address)


def is_loopback(address: Peer) -> bool:
    """Return whether this is an address at which a host speaks with itself."""
    return address is not None and not isinstance(address, str) and address.is_loopback


_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# Public by mistake in Pythons before 3.11.10 and 3.12.4 (CVE-2024-4032).
_LOCAL_TOO = (ipaddress.ip_network("192.0.0.0/24"), ipaddress.ip_network("64:ff9b:1::/48"))
# All that is assigned of IPv6. Beyond it lie site-local addresses and old spellings of IPv4 ones, which ipaddress takes for global.
_UNICAST = (ipaddress.ip_network("2000::/3"),)


def is_public(address: Peer) -> bool:
    """Return whether this is an address of the internet: no private, local or reserved one, nor one that leads to such."""
    if address is None or isinstance(address, str) or is_in(address, _LOCAL_TOO):
        return False
    if address.version == 6 and address in _NAT64:
        return is_public(ipaddress.ip_address(int(address) & 0xFFFFFFFF))
    if address.version == 6 and not is_in(address, _UNICAST):
        return False
    embedded = address.sixtofour if address.version == 6 else None
    return address.is_global and not address.is_multicast and (embedded is None or is_public(embedded))


def bucket_of(address: Peer) -> int | str | None:
    """Return what is counted together: an IPv4 address, or the /64 that one IPv6 customer has to himself."""
    if address is None or isinstance(address, str):
        return address
    return int(address) if address.version == 4 else -1 - (int(address) >> 64)


# What stands for every address, and the one among them by which a host reaches itself.
_EVERYWHERE = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}


class ListenAddress(NamedTuple):
    """Where the server listens: a host ("" = every address of this host) and a port (0 = any free one), or a socket's path.

    `name`: the name of a socket that systemd passes; `fd`: its descriptor, once it is there and the rest is known.
    """

    host: str
    port: int
    path: str = ""
    name: str = ""
    fd: int = -1

    def __str__(self) -> str:
        if self.is_awaited:
            return f"systemd:{self.name}"
        return f"unix:{self.path}" if self.path else f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_awaited(self) -> bool:
        """Whether this is but the name of a socket that is to be passed."""
        return bool(self.name) and self.fd < 0

    @property
    def is_everywhere(self) -> bool:
        """Whether this is every address of the host (of one kind)."""
        return not self.path and not self.is_awaited and self.host in _EVERYWHERE

    def url(self, *, is_tls: bool) -> str:
        """Return the URL under which a client on this host reaches the server."""
        host = _EVERYWHERE.get(self.host, self.host)
        return str(self) if self.path else f"http{'s' * is_tls}://{self._replace(host=host)}"


# sun_path of Linux has 108 bytes, the last of them NUL (unix(7)).
_MAX_SOCKET_PATH_BYTES = 107


# What FileDescriptorName= may hold, as far as it is no port: "systemd:80" is a host.
_PASSED_NAME = re.compile(r"systemd:([A-Za-z_][A-Za-z0-9_.@-]{0,254})", re.ASCII)


def parse_listen(value: object) -> ListenAddress:
    """Return the parts of "127.0.0.1:8080", "[::1]:8080", ":8080" (every address of this host), "unix:/path" or "systemd:NAME"."""
    if isinstance(value, str) and (match := _PASSED_NAME.fullmatch(value)):
        return ListenAddress("", 0, name=match[1])
    if isinstance(value, str) and re.fullmatch(r"unix:/[^\0]+", value):
        path = value.removeprefix("unix:")
        if len(path.encode()) > _MAX_SOCKET_PATH_BYTES:
            raise ValueError(f"{render_value(value)} is longer than the {_MAX_SOCKET_PATH_BYTES} bytes that a socket's path may have")
        return ListenAddress("", 0, path)
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]*)):([0-9]{1,5})", value, re.ASCII) if isinstance(value, str) else None
    if not match or int(match[3]) > 65535:
        raise ValueError(f"{render_value(value)} is not host:port; write \"127.0.0.1:8080\", \":8080\", \"[::1]:8080\", \"unix:/path\" or \"systemd:NAME\"")
    return ListenAddress(match[1] or match[2] or "", int(match[3]))


# Validity of a certificate (RFC 5280, 4.1.2.5): two times, each of two digits of the year (UTCTime) or of four.
_VALIDITY = re.compile(rb"\x30[\x1e-\x22](?:\x17\x0d|\x18\x0f)([0-9]{12,14})Z(?:\x17\x0d|\x18\x0f)([0-9]{12,14})Z")


def parse_validity(pem: str) -> tuple[str, str] | None:
    """Return from when and until when the first certificate of a file is valid, as RFC 3339 UTC; None if that cannot be found."""
    body = pem.partition("-----BEGIN CERTIFICATE-----")[2].partition("-----END")[0]
    try:
        match = _VALIDITY.search(base64.b64decode(body))
    except ValueError:
        return None
    return (_parse_asn1_time(match[1].decode()), _parse_asn1_time(match[2].decode())) if match else None


def _parse_asn1_time(text: str) -> str:
    full = text if len(text) == 14 else ("20" if text < "50" else "19") + text
    return f"{full[:4]}-{full[4:6]}-{full[6:8]}T{full[8:10]}:{full[10:12]}:{full[12:]}Z"


class ImageName(NamedTuple):
    """The parts of a container image reference; parts that are absent are empty."""

    registry: str
    repository: str
    tag: str
    digest: str


def parse_image(text: str) -> ImageName:
    """Split [registry/]repository[:tag][@digest]; any text has a reading, none is an error."""
    rest, _, digest = text.partition("@")
    path, slash, last = rest.rpartition("/")
    last, _, tag = last.partition(":")
    whole = f"{path}{slash}{last}"
    first, slash, remainder = whole.partition("/")
    # A first component is a registry if it could be a host: the rule of the distribution reference grammar.
    is_registry = bool(slash) and ("." in first or ":" in first or first == "localhost")
    return ImageName(first, remainder, tag, digest) if is_registry else ImageName("", whole, tag, digest)


# === 3. TEMPLATES =====================================================================================================
# {{NAME | function(args)}} in commands, environment values, probes and custom variables.
#
# 1. What a template may name is checked when the configuration is loaded, never found out at deploy time.
# 2. A value is inserted once; braces inside it stay text.
# 3. Built-in names win over custom ones, those win over request metadata: metadata can shadow nothing.

VARIABLES: dict[str, str] = {
    "IMAGE": "the image to deploy",
    "PREVIOUS_IMAGE": "the image a rollback returns to; empty when none is known",
    "SERVICE": "name of the service",
    "DEPLOY_ID": "id of the deployment",
    "WORKING_DIR": "working directory of the service",
    "TIMESTAMP": "start of the deployment, unix seconds",
    "DATE": "start of the deployment, YYYY-MM-DD in UTC",
    "DATETIME": "start of the deployment, RFC 3339 in UTC",
    "ATTEMPT": "number of the attempt of this command, from 1",
    "PHASE": "pre_deploy, deploy, healthcheck, post_deploy, rollback or on_failure",
    "STATUS": "status of the deployment; in post_deploy and on_failure hooks",
    "ERROR_MESSAGE": "why it failed; in on_failure hooks, else empty",
}
LATE_VARIABLES = frozenset({"STATUS", "ERROR_MESSAGE"})


class TemplateFunction(NamedTuple):
    """A function of templates: number of arguments, the work, and a line of documentation."""

    arguments: int
    apply: Callable[..., str]
    doc: str


def _apply_match(value: str, pattern: str) -> str:
    match = re.search(pattern, value, re.ASCII)
    return "" if not match else match[1] or "" if match.re.groups else match[0]


def _apply_date(value: str, layout: str) -> str:
    return time.strftime(layout, time.gmtime(int(value))) if value.isdecimal() and len(value) < 12 else ""


FUNCTIONS: dict[str, TemplateFunction] = {
    "tag": TemplateFunction(0, lambda value: parse_image(value).tag, "tag of an image"),
    "digest": TemplateFunction(0, lambda value: parse_image(value).digest, "digest of an image"),
    "repository": TemplateFunction(0, lambda value: parse_image(value).repository, "repository of an image"),
    "registry": TemplateFunction(0, lambda value: parse_image(value).registry, "registry of an image"),
    "basename": TemplateFunction(0, lambda value: parse_image(value).repository.rpartition("/")[2],
                                 "last part of an image's repository"),
    "short": TemplateFunction(0, lambda value: value.rpartition(":")[2][:12], "first 12 characters, of a digest or commit"),
    "lower": TemplateFunction(0, lambda value: value.lower(), "lower case"),
    "upper": TemplateFunction(0, lambda value: value.upper(), "upper case"),
    "replace": TemplateFunction(2, lambda value, old, new: value.replace(old, new), "every a replaced by b"),
    "default": TemplateFunction(1, lambda value, other: value or other, "x when the value is empty or missing"),
    "match": TemplateFunction(1, _apply_match, "first group (or all) of what the regular expression finds; else empty"),
    "sha256": TemplateFunction(0, lambda value: hashlib.sha256(value.encode()).hexdigest(), "SHA-256 in hex"),
    "date": TemplateFunction(1, _apply_date, "unix seconds in a strftime layout, UTC"),
}

# "{{." opens a placeholder of podman's and docker's own (--format '{{.State}}'); it is left alone.
_INSERT = re.compile(r"\{\{(?!\.)(.*?)\}\}", re.DOTALL)
_NAME = re.compile(r"meta\.[A-Za-z0-9_.-]{1,64}|(?!meta\.)[A-Za-z_][A-Za-z0-9_.-]*", re.ASCII)
_CALL = re.compile(r"([a-z0-9]+)(?:\((.*)\))?", re.ASCII | re.DOTALL)


class Insert(NamedTuple):
    """One {{...}}: a name and the functions its value goes through."""

    name: str
    calls: tuple[tuple[str, tuple[str, ...]], ...]


class Template(NamedTuple):
    """A parsed text: literal parts and inserts, in order."""

    text: str
    parts: tuple[str | Insert, ...]

    @property
    def inserts(self) -> tuple[Insert, ...]:
        return tuple(part for part in self.parts if isinstance(part, Insert))


class Scope(NamedTuple):
    """What names mean while a template is expanded."""

    values: Mapping[str, str]
    custom: Mapping[str, Template]
    metadata: Mapping[str, str]


def _split_calls(source: str) -> list[str]:
    """Split at "|" outside parentheses, so that match(a|b) stays whole."""
    pieces, depth, start = [], 0, 0
    for index, char in enumerate(source):
        depth += (char == "(") - (char == ")")
        if char == "|" and depth == 0:
            pieces.append(source[start:index])
            start = index + 1
    return [*pieces, source[start:]]


def _parse_call(source: str) -> tuple[str, tuple[str, ...]]:
    match = _CALL.fullmatch(source.strip())
    function = FUNCTIONS.get(match[1]) if match else None
    if not function:
        raise ValueError(f"unknown function {source.strip()!r}{nearest(source.strip().partition('(')[0], FUNCTIONS)}")
    name, text = match[1], match[2]
    arguments = () if text is None else tuple(text.split(",", function.arguments - 1)) if function.arguments else (text,)
    if len(arguments) != function.arguments:
        raise ValueError(f"{name} takes {function.arguments} argument{'s' * (function.arguments != 1)}: {source.strip()}")
    if name == "match":
        try:
            re.compile(arguments[0], re.ASCII)
        except (re.error, ValueError, OverflowError, RecursionError) as error:
            raise ValueError(f"match has a bad regular expression: {error}") from None
    return name, arguments


def parse_template(text: str) -> Template:
    """Return the parsed template; raise ValueError for a bad name, an unknown function or a stray "{{"."""
    parts: list[str | Insert] = []
    position = 0
    for match in _INSERT.finditer(text):
        name, *calls = _split_calls(match[1])
        if not _NAME.fullmatch(name.strip()):
            raise ValueError(f"{match[0]} is no placeholder; write {{{{NAME}}}} or {{{{NAME|function}}}}")
        parts += [text[position : match.start()], Insert(name.strip(), tuple(_parse_call(call) for call in calls))]
        position = match.end()
    if re.search(r"\{\{(?!\.)", text[position:]):
        raise ValueError("'{{' without '}}'")
    return Template(text, tuple(part for part in [*parts, text[position:]] if part != ""))


def names_metadata(name: str) -> bool:
    """Return whether a name that is neither built in nor custom can be a key of the request's metadata.

    Names in capitals are variables: a misspelt {{IMGAE}} must be an error, not a missing metadata key.
    """
    return name.startswith("meta.") or not name.isupper()


def check_template(template: Template, custom: Iterable[str], *, late: bool) -> str | None:
    """Return what is wrong with the names in a template, or None; `late` allows what only hooks know."""
    known = {*VARIABLES, *custom}
    for insert in template.inserts:
        if insert.name not in known and not names_metadata(insert.name):
            return f"unknown variable {{{{{insert.name}}}}}{nearest(insert.name, known)}"
        if insert.name in LATE_VARIABLES and not late:
            return f"{{{{{insert.name}}}}} is known only in post_deploy and on_failure hooks"
    return None


def find_cycle(custom: Mapping[str, Template]) -> str | None:
    """Return "A -> B -> A" if custom variables refer to each other in a circle, else None."""

    def visit(name: str, path: tuple[str, ...]) -> str | None:
        if name in path:
            return " -> ".join([*path[path.index(name) :], name])
        inserts = custom[name].inserts if name in custom and name not in VARIABLES else ()
        return next(filter(None, (visit(insert.name, (*path, name)) for insert in inserts)), None)

    return next(filter(None, (visit(name, ()) for name in custom)), None)


def _resolve(name: str, scope: Scope) -> str:
    if name in scope.values:
        return scope.values[name]
    if name in scope.custom:
        return expand(scope.custom[name], scope)
    name = name.removeprefix("meta.")
    if name not in scope.metadata:
        raise ValueError(f"metadata.{name} is needed by this service and missing")
    return scope.metadata[name]


def expand(template: Template, scope: Scope) -> str:
    """Return the text with every value inserted once; raise ValueError for metadata that the request lacks."""
    pieces = []
    for part in template.parts:
        if isinstance(part, str):
            pieces.append(part)
            continue
        try:
            given = _resolve(part.name, scope)
        except ValueError:
            if not any(name == "default" for name, _ in part.calls):
                raise
            given = ""
        value = given
        for name, arguments in part.calls:
            value = FUNCTIONS[name].apply(value, *arguments)
        # "app:-v" is a harmless image, but its tag would be an option of the command.
        if value.startswith("-") and given and not given.startswith("-") and not any(pieces):
            raise ValueError(f"a part of {part.name} starts with '-', so a command would take it for an option")
        pieces.append(value)
    return "".join(pieces)


# === 4. CONFIG ========================================================================================================
# Every key of config.toml and services.toml, once: a field whose default is a Key (default, check, doc).
# The loader, `init`'s sample and docs/configuration.md are derived from these classes.
#
# 1. A key that is accepted has an effect; an unknown key is a problem that names the nearest known one.
# 2. Loading collects every problem with file and key path, and raises once.
# 3. NamedTuple, not dataclass: as frozen and as slotted, and it spares each start the 40 ms that dataclasses
#    need to import `inspect` and to generate code for so many classes.


class Place(NamedTuple):
    """Where in a file a value stands, and the list that its problems go to."""

    file: str
    path: str
    problems: list[Problem]

    def __truediv__(self, name: str) -> "Place":
        return self._replace(path=f"{self.path}.{name}" if self.path else name)

    def at(self, index: int) -> "Place":
        """Return the place of an entry of this list."""
        return self._replace(path=f"{self.path}[{index}]")

    def problem(self, message: str) -> None:
        """Note what is wrong here."""
        self.problems.append(Problem(self.file, self.path, message))

    def warning(self, message: str) -> None:
        """Note what is worth a look here, but stops nothing."""
        self.problems.append(Problem(self.file, self.path, message, is_warning=True))


class Check(NamedTuple):
    """How a value is read: `kind` for the reference, `parse(value, place)` raising ValueError for one problem."""

    kind: str
    parse: Callable[[Any, Place], Any]


class Key(NamedTuple):
    """What a field of a table is: its default as the file would write it, its check, its line of documentation."""

    default: Any
    check: Check
    doc: str


REQUIRED = object()

# What files of Hookshot 1.0 may say besides: other names of levels, and a table of a service that nothing ever read.
LEVELS_OF_HOOKSHOT_1 = {"trace": "debug", "warn": "warning"}
_TABLES_OF_HOOKSHOT_1 = {
    "github": "is a table that Hookshot 1.0 checked and never used; no webhook of GitHub is answered here either. "
              "Remove it, and let the workflow send the deploy"}


def key(default: Any, check: Check, doc: str) -> Any:
    """Return a Key; typed Any because it stands where the loaded value's default would."""
    return Key(default, check, doc)


def _integer(low: int, high: int) -> Check:
    def parse(value: Any, place: Place) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{render_value(value)} is not a whole number")
        return _in_range(value, low, high, str)

    return Check(f"whole number, {low} to {high}", parse)


def _in_range(value: int, low: int, high: int, render: Callable[[int], str]) -> int:
    if not low <= value <= high:
        raise ValueError(f"{render(value)} is out of range; allowed: {render(low)} to {render(high)}")
    return value


def _duration(low: int, high: int) -> Check:
    return Check(f"duration, {low} s to {render_duration(high * 1000)}",
                 lambda value, place: _in_range(parse_duration(value), low, high, lambda seconds: f"{seconds} s"))


def _size(low: int, high: int) -> Check:
    return Check(f"size, {render_size(low)} to {render_size(high)}",
                 lambda value, place: _in_range(parse_size(value), low, high, render_size))


def _choice(*allowed: str) -> Check:
    def parse(value: Any, place: Place) -> str:
        if value not in allowed:
            hint = nearest(value, allowed) if isinstance(value, str) else ""
            raise ValueError(f"{render_value(value)} is not one of {', '.join(allowed)}{hint}")
        return value

    return Check(" or ".join(f'"{word}"' for word in allowed), parse)


def _log_level() -> Check:
    check = _choice("debug", "info", "warning", "error")
    return check._replace(parse=lambda value, place: check.parse(level_named(value), place))


def level_named(value: Any) -> Any:
    """Return the level that a name of Hookshot 1.0 stands for; any other value as it is."""
    return LEVELS_OF_HOOKSHOT_1.get(value, value) if isinstance(value, str) else value


def _text(pattern: re.Pattern[str] | None = None, kind: str = "text", *, may_be_empty: bool = False) -> Check:
    def parse(value: Any, place: Place) -> str:
        if not isinstance(value, str):
            raise ValueError(f"{render_value(value)} is not a text")
        if "\0" in value or (pattern and not pattern.fullmatch(value)) or not (value or may_be_empty):
            raise ValueError(f"{render_value(value)} is not {'a valid ' if pattern else 'a non-empty '}{kind}")
        return value

    return Check(kind, parse)


def _boolean(value: Any, place: Place) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{render_value(value)} is not true or false")
    return value


def _list(item: Check, low: int, high: int) -> Check:
    def parse(value: Any, place: Place) -> tuple[Any, ...]:
        if not isinstance(value, list):
            advice = f"; write [[{place.path}]]" if isinstance(value, dict) and item.kind == "table" else ""
            raise ValueError(f"{render_value(value)} is not a list{advice}")
        if not low <= len(value) <= high:
            raise ValueError(f"has {len(value)} entries; allowed: {low} to {high}")
        return tuple(_parse_at(item, entry, place.at(index)) for index, entry in enumerate(value))

    return Check(f"list of {item.kind}", parse)


def _mapping(names: re.Pattern[str], item: Check) -> Check:
    def parse(value: Any, place: Place) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise ValueError(f"{render_value(value)} is not a table of name = value")
        for name in value:
            if not names.fullmatch(name):
                (place / name).problem("is not a valid name here")
        return {name: _parse_at(item, entry, place / name) for name, entry in value.items()}

    return Check(f"table of name = {item.kind}", parse)


def _parse_at(check: Check, value: Any, place: Place) -> Any:
    """Return the parsed value, or None after noting the problem at its place."""
    try:
        return check.parse(value, place)
    except ValueError as error:
        place.problem(str(error))
        return None


def _plain(parse: Callable[[Any], Any], kind: str) -> Check:
    return Check(kind, lambda value, place: parse(value))


def _parse_template_value(value: Any, place: Place) -> Template:
    if not isinstance(value, str) or "\0" in value:
        raise ValueError(f"{render_value(value)} is not a text")
    return parse_template(value)


def _parse_regex(value: Any, place: Place) -> re.Pattern[str]:
    if not isinstance(value, str) or not value:
        raise ValueError("is not a regular expression")
    if re.search(r"\[\[:\^?[a-z]+:\]", value):
        # Python would read a set of these letters, and the pattern would match nothing that was meant.
        raise ValueError("has a class such as [[:digit:]], which regular expressions of Python do not know; write [0-9]")
    try:
        pattern = re.compile(value, re.ASCII)
    except (re.error, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"is not a valid regular expression: {error}") from None
    if pattern.fullmatch("") or pattern.fullmatch("any/thing:at-all"):
        place.warning("matches anything; name the repository, as in ghcr\\.io/owner/name:v[0-9.]+")
    return pattern


# Names that change what a command is or does, whatever the operator meant by allowing them: a caller who could set
# one of these could run code of his own (Shellshock, httpoxy and GIT_SSH_COMMAND are all of this kind).
DENIED_ENV = re.compile(
    r"PATH|IFS|ENV|ZDOTDIR|FPATH|BASH_ENV|SHELLOPTS|BASHOPTS|BASH_FUNC.*|PS4|PROMPT_COMMAND|CDPATH|HOME|SHELL|USER|LOGNAME|TMPDIR"
    r"|LD_.*|DYLD_.*|GCONV_PATH|LOCPATH|NLSPATH|HOSTALIASES|RES_OPTIONS|MALLOC_.*|GLIBC_TUNABLES"
    r"|PYTHON.*|PERL.*|RUBY.*|GEM_.*|BUNDLE_.*|NODE_.*|NPM_CONFIG_.*|JAVA_TOOL_OPTIONS|_JAVA_OPTIONS|JDK_JAVA_OPTIONS"
    r"|CLASSPATH|PHPRC|PHP_INI_SCAN_DIR|LUA_.*|GIT_.*|SSH_.*|DOCKER_.*|CONTAINERS?_.*|KUBECONFIG|EDITOR|VISUAL|PAGER"
    r"|BROWSER|HTTPS?_PROXY|ALL_PROXY|FTP_PROXY|NO_PROXY|SSL_CERT_.*|CURL_.*|OPENSSL_.*|HOOKSHOT_.*|NOTIFY_SOCKET"
    r"|LISTEN_.*|CREDENTIALS_DIRECTORY|WATCHDOG_.*|SUDO_.*|XDG_.*|DBUS_.*", re.ASCII | re.IGNORECASE)


# Never let through to a command: it could speak in the server's name, or hold a secret.
NEVER_INHERITED = re.compile(r"HOOKSHOT_.*|DEPLOY_RECEIVER_.*|NOTIFY_SOCKET|CREDENTIALS_DIRECTORY|LISTEN_.*|WATCHDOG_.*|INVOCATION_ID"
                             r"|JOURNAL_STREAM|MAINPID", re.ASCII)


def _env_name(forbidden: re.Pattern[str], why: str) -> Check:
    def parse(value: Any, place: Place) -> str:
        if not isinstance(value, str) or not ENV_NAME.fullmatch(value):
            raise ValueError(f"{render_value(value)} is not the name of an environment variable")
        if forbidden.fullmatch(value):
            raise ValueError(f"{value} {why}")
        return value

    return Check("environment variable name", parse)


def _parse_umask(value: Any, place: Place) -> int:
    if isinstance(value, str) and re.fullmatch(r"0?[0-7]{3}", value):
        return int(value, 8)
    raise ValueError(f"{render_value(value)} is not a umask; write it as text, \"022\"")


def _parse_absolute(value: Any, place: Place) -> str:
    if not isinstance(value, str) or not value.startswith("/") or "\0" in value:
        raise ValueError(f"{render_value(value)} is not an absolute path")
    return value


_BOOLEAN = Check("true or false", _boolean)
_TEXT = _text()
_PATH = Check("absolute path", _parse_absolute)
_PATH_OR_NONE = Check("absolute path, or empty", lambda value, place: "" if value == "" else _parse_absolute(value, place))
_PEERS = _list(_plain(parse_peers, 'address, CIDR network or "unix"'), 0, 100)
_SECRET_NAMES = _list(_text(SECRET_NAME, "secret name"), 1, 16)
_ENV_NAMES = _list(_env_name(NEVER_INHERITED, "is never let through: with it a command could speak in the server's name, "
                                              "or hold a secret"), 0, 100)
_OVERRIDE_NAMES = _list(_env_name(DENIED_ENV, "can never come from a request: it changes how commands are found or run"), 0, 100)
# HOOKSHOT_* is what the server sets; a name of the operator's there would be overwritten.
_ENV_TEXTS = _mapping(re.compile(r"(?!HOOKSHOT_)" + ENV_NAME.pattern, re.ASCII), Check("text with placeholders", _parse_template_value))
_URL_PATH = _text(re.compile(r"/[A-Za-z0-9._/-]{1,63}", re.ASCII), "path such as \"/health\"")
_HOUR = 3600


class Retention(NamedTuple):
    """[storage.retention]"""

    successful_deploys: int = key(100, _integer(1, 10000), "successful deployments kept per service")
    failed_deploys: int = key(50, _integer(1, 10000), "deployments with any other ending kept per service")
    log_days: int = key(90, _integer(1, 10000), "days that a deployment's log is kept")
    audit_days: int = key(365, _integer(7, 10000), "days that rows of the audit are kept, and at most one more")


def _parse_listen_list(value: Any, place: Place) -> tuple[ListenAddress, ...]:
    if not isinstance(value, list):
        return (parse_listen(value),)
    entries = _list(_LISTEN, 1, 16).parse(value, place)
    for index, entry in enumerate(entries):
        if entry is not None and (entry.port or entry.path or entry.name) and entry in entries[:index]:
            place.at(index).problem(f"{entry} is here twice")
    return entries


def _parse_mode(value: Any, place: Place) -> int:
    if isinstance(value, str) and re.fullmatch(r"0?[0-7]{3}", value) and int(value, 8) & 0o600 == 0o600:
        return int(value, 8)
    raise ValueError(f"{render_value(value)} is not a mode with which its owner can use it; write it as text, \"0660\"")


_LISTEN = Check('host:port, unix:/path or systemd:NAME', lambda value, place: parse_listen(value))


class Tls(NamedTuple):
    """[server.tls]"""

    cert: str = key("", _PATH_OR_NONE, "certificate chain in PEM; every TCP address then speaks TLS, read again on SIGHUP")
    client_ca: str = key("", _PATH_OR_NONE, "authorities of client certificates in PEM; a client without one is not let in")
    key: str = key("", _PATH_OR_NONE, "private key of cert in PEM, without a passphrase")


class Server(NamedTuple):
    """[server]"""

    listen: tuple[ListenAddress, ...] = key("127.0.0.1:8080", Check("host:port, unix:/path, systemd:NAME, or a list of these", _parse_listen_list),
                                            "where to listen; \":8080\" is every address of this host")
    socket_mode: int = key("0660", Check('octal text such as "0660"', _parse_mode), "mode of unix sockets")
    worker_threads: int = key(4, _integer(1, 64), "deployments carried out at once")
    max_request_size: int = key("1MB", _size(1 << 10, 100 << 20), "largest request body")
    request_timeout: int = key(30, _duration(1, _HOUR), "to read a request and to send its answer")
    shutdown_timeout: int = key(300, _duration(0, 24 * _HOUR), "how long running deployments may go on at shutdown")
    deploy_response: str = key("accepted", _choice("accepted", "completed"), "answer a deploy at once, or when it ended")
    max_connections: int = key(256, _integer(1, 10000), "connections open at once; one address gets a quarter of them, but 8 in any case")
    tls: Tls = Tls  # type: ignore[assignment]


class Security(NamedTuple):
    """[security]"""

    allowed_ips: tuple[Network | str, ...] = key([], _PEERS, "client addresses let in (\"unix\": those at a unix socket); empty lets all in")
    rate_limit: int = key(100, _integer(0, 10000), "requests a minute from one address (IPv6: one /64); 0 = no limit")
    trusted_proxies: tuple[Network | str, ...] = key([], _PEERS, "peers whose forwarding headers are believed (\"unix\": those at a unix socket)")
    read_access: str = key("local", _choice("local", "token", "open"),
                           "who may read: loopback or the secret read_token; only the token; everyone")
    hmac_keys: tuple[str, ...] = key(["hmac_key"], _SECRET_NAMES, "secrets that may sign for every service")
    replay_window: int = key(300, _duration(1, 24 * _HOUR), "how far a signed timestamp may be from this host's clock")
    require_timestamp: bool = key(False, _BOOLEAN, "refuse signatures without a timestamp (X-Hub-Signature-256)")


class Storage(NamedTuple):
    """[storage]"""

    data_dir: str = key("/var/lib/hookshot", _PATH, "database and deployment logs, private to the server")
    retention: Retention = Retention  # type: ignore[assignment]


class Rotation(NamedTuple):
    """[logging.rotation]"""

    max_size: int = key("100MB", _size(64 << 10, 100 << 30), "size at which a new file is begun")
    max_files: int = key(10, _integer(1, 1000), "files kept, the one that is written to among them")


class Logging(NamedTuple):
    """[logging]"""

    level: str = key("info", _log_level(), "least severe line written (warn is warning, trace is debug)")
    format: str = key("json", _choice("json", "pretty"), "one JSON object a line, or text for people")
    directory: str = key("", _PATH_OR_NONE, "where the log is also kept, as hookshot.log; empty: on stderr only")
    rotation: Rotation = Rotation  # type: ignore[assignment]


class Limits(NamedTuple):
    """[limits]"""

    max_concurrent_total: int = key(10, _integer(1, 1000), "deployments running at once (worker_threads bounds it too)")
    max_concurrent_per_service: int = key(1, _integer(1, 100), "deployments of one service running at once")
    max_queue_per_service: int = key(20, _integer(1, 10000), "deployments of one service waiting")
    deployment_timeout: int = key(1800, _duration(1, 24 * _HOUR), "a whole deployment, up to its rollback")
    command_timeout: int = key(300, _duration(1, 2 * _HOUR), "one command, unless the service says otherwise")
    lock_timeout: int = key(3600, _duration(1, 7 * 24 * _HOUR), "how long a queued deployment may wait for its turn")
    max_output: int = key("10MB", _size(64 << 10, 1 << 30), "log kept of one deployment: its head and its tail")


class Monitoring(NamedTuple):
    """[monitoring]"""

    metrics_enabled: bool = key(True, _BOOLEAN, "whether there are metrics to be read")
    metrics_path: str = key("/metrics", _URL_PATH, "path of the metrics")
    health_path: str = key("/health", _URL_PATH, "path of the health report")
    status_cache_seconds: int = key(10, _duration(0, _HOUR), "how long a health report is reused")


SOURCE_NAMES = ("systemd", "file", "env", "command")


def _parse_sources(value: Any, place: Place) -> tuple[str, ...] | str:
    names = value if isinstance(value, list) else [value]
    for name in names:
        if name not in SOURCE_NAMES and value != "auto":
            raise ValueError(f"{render_value(name)} is not auto or one of {', '.join(SOURCE_NAMES)}")
    return value if value == "auto" else tuple(names)


class Secrets(NamedTuple):
    """[secrets]"""

    source: tuple[str, ...] | str = key("auto", Check('"auto", a source, or a list of them', _parse_sources),
                                        "where secrets come from; auto = every source that is there, in priority order")
    sources_priority: tuple[str, ...] = key(["systemd", "file", "env"], _list(_choice(*SOURCE_NAMES), 1, 4),
                                            "order of the sources; the first that has a secret wins")
    secrets_file: str = key("/etc/hookshot/secrets", _PATH, "file of key=value lines, mode 0600")
    required_secrets: tuple[str, ...] = key(["hmac_key"], _list(_text(SECRET_NAME, "secret name"), 0, 100),
                                            "secrets without which the server does not start")
    reload_interval: int = key(300, _duration(0, 24 * _HOUR), "how often secrets are read again; 0 = never")
    secret_prefix: str = key("HOOKSHOT_", _text(ENV_NAME, "prefix"), "prefix of secrets in the environment")
    command: tuple[str, ...] = key([], _list(_TEXT, 0, 100), "command that prints key=value lines, for age, sops, vault")


_SECRET_REFERENCE = re.compile(r"secret:(" + SECRET_NAME.pattern + ")", re.ASCII)


def _parse_confidential(value: Any) -> str:
    # What is wrong may be a secret, so that no message shows it.
    if not isinstance(value, str) or "\0" in value:
        raise ValueError("is not a text; write it in quotes")
    return value


_CONFIDENTIAL = _plain(_parse_confidential, 'text, or "secret:NAME"')
# What the URLs of [notifications.webhook] are told of.
EVENTS_OF_WEBHOOK = {"on_failure": ("failed", "rollback_failed"), "on_rollback": ("rolled_back",), "on_success": ("succeeded",)}
NOTICE_EVENTS = ("started", "succeeded", "failed", "rolled_back", "rollback_failed", "cancelled", "locked")
# Of what RFC 5322 allows only what needs no quotes: a comma or a bracket would be syntax in a header.
_MAIL_ADDRESS = _text(re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~.-]{1,64}@[A-Za-z0-9.-]{1,255}", re.ASCII), "mail address")


def secret_named(text: str | None) -> str | None:
    """Return the secret that a value names as "secret:NAME", or None for a value that is meant as it is."""
    match = _SECRET_REFERENCE.fullmatch(text or "")
    return match[1] if match else None


class ChannelType(NamedTuple):
    """What one type of channel is, the keys that it needs, and those that it may have."""

    doc: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()


CHANNEL_TYPES: dict[str, ChannelType] = {
    "webhook": ChannelType("JSON of our own, signed as Standard Webhooks says; or another's, as `format` or the URL says", ("url",),
                           ("format", "signing_key", "token", "allow_private")),
    "slack": ChannelType("an incoming webhook of Slack, Mattermost or Rocket.Chat", ("url",), ("allow_private",)),
    "discord": ChannelType("a webhook of Discord", ("url",), ("allow_private",)),
    "teams": ChannelType("a workflow of Microsoft Teams that takes Adaptive Cards", ("url",), ("allow_private",)),
    "telegram": ChannelType("a bot of Telegram; `url` only for a Bot API server of your own", ("token", "chat_id"), ("url", "allow_private")),
    "ntfy": ChannelType("a topic of ntfy: `url` is https://ntfy.sh/TOPIC", ("url",), ("token", "allow_private")),
    "gotify": ChannelType("an application of Gotify", ("url", "token"), ("allow_private",)),
    "email": ChannelType("a mail server", ("server", "sender", "recipients"), ("security", "username", "password", "allow_private")),
    "exec": ChannelType("a command: the notice is JSON on its standard input and HOOKSHOT_* in its environment", ("command",)),
}
# Keys whose values are secrets, or may name one.
SECRET_KEYS = ("url", "token", "signing_key", "password")


class Channel(NamedTuple):
    """[[notifications.channel]]"""

    name: str = key(REQUIRED, _text(SERVICE_NAME, "name (1 to 32 of A-Z a-z 0-9 - _)"), "unique name, in logs and metrics")
    type: str = key(REQUIRED, _choice(*CHANNEL_TYPES), "what kind of receiver it is")
    events: tuple[str, ...] = key(["succeeded", "failed", "rolled_back", "rollback_failed", "cancelled"], _list(_choice(*NOTICE_EVENTS), 1, 7),
                                  f"what is told, of {', '.join(NOTICE_EVENTS)}")
    services: tuple[str, ...] = key([], _list(_text(SERVICE_NAME, "service name"), 0, 1000), "services that are told of; empty: all")
    only_changes: bool = key(False, _BOOLEAN, "tell when a service turns red or worse, and when it is green again; not each time")
    timeout: int = key(15, _duration(1, 60), "for one attempt")
    url: str = key("", _CONFIDENTIAL, "where to send")
    format: str = key("auto", _choice("auto", "json", "slack", "discord", "teams"), "of type webhook; auto knows the URLs of Slack, Discord and Teams")
    signing_key: str = key("", _CONFIDENTIAL, "key of the signature; empty: unsigned")
    token: str = key("", _CONFIDENTIAL, "of a bot or an application; of type webhook and ntfy a bearer token")
    chat_id: str = key("", _text(re.compile(r"-?[0-9]{1,20}|@[A-Za-z0-9_]{1,64}|", re.ASCII), "chat id", may_be_empty=True), "of type telegram")
    server: str = key("", _text(re.compile(r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}|", re.ASCII), "host:port", may_be_empty=True), "mail server, host:port")
    security: str = key("starttls", _choice("starttls", "tls", "none"), "of type email: STARTTLS, TLS from the beginning, or none")
    username: str = key("", _text(may_be_empty=True), "of the mail server")
    password: str = key("", _CONFIDENTIAL, "of the mail server")
    sender: str = key("", Check("mail address", lambda value, place: value and _MAIL_ADDRESS.parse(value, place)), "of type email: from whom")
    recipients: tuple[str, ...] = key([], _list(_MAIL_ADDRESS, 0, 50), "of type email: to whom")
    command: tuple[str, ...] = key([], _list(_TEXT, 0, 100), "of type exec: program and arguments")
    allow_private: bool = key(False, _BOOLEAN, "whether a name may lead to a private address; an address in the URL always may")


_COMMON_CHANNEL_KEYS = ("name", "type", "events", "services", "only_changes", "timeout")


def _parse_channel(value: Any, place: Place) -> Channel:
    if not isinstance(value, dict):
        raise ValueError("is not a table; write [[notifications.channel]]")
    channel = _load_table(Channel, value, place)
    kind = CHANNEL_TYPES.get(channel.type)
    if kind:
        for name in kind.required:
            if not getattr(channel, name) and (name not in value or getattr(channel, name) is not None):
                (place / name).problem(f"is required by type {channel.type}")
        for name in value.keys() & {*Channel._fields} - {*_COMMON_CHANNEL_KEYS, *kind.required, *kind.optional}:
            (place / name).problem(f"has no effect in a channel of type {channel.type}; remove it")
    return channel


class NoticeWebhook(NamedTuple):
    """[notifications.webhook]"""

    on_failure: str = key("", _CONFIDENTIAL, "URL that is told of failures, rollbacks that failed among them")
    on_rollback: str = key("", _CONFIDENTIAL, "URL that is told of rollbacks")
    on_success: str = key("", _CONFIDENTIAL, "URL that is told of successes")
    timeout: int = key(5, _duration(1, 60), "for one attempt")
    use_secrets: bool = key(False, _BOOLEAN, "take the URLs from the secrets webhook_on_failure, webhook_on_rollback, webhook_on_success "
                            "(or notifications.webhook.on_failure, ...) where they are there")
    format: str = key("auto", _choice("auto", "json", "slack", "discord", "teams"), "auto knows the URLs of Slack, Discord and Teams")
    signing_key: str = key("", _CONFIDENTIAL, "key of the signature of our own JSON; empty: unsigned")
    allow_private: bool = key(False, _BOOLEAN, "whether a name may lead to a private address; an address in the URL always may")


class Notifications(NamedTuple):
    """[notifications]"""

    enabled: bool = key(False, _BOOLEAN, "whether anything is sent")
    retry_for: int = key("1d", _duration(60, 30 * 24 * _HOUR), "how long a notice is tried")
    channel: tuple[Channel, ...] = key([], _list(Check("table", _parse_channel), 0, 100), "the channels, each a [[notifications.channel]] table")
    webhook: NoticeWebhook = NoticeWebhook  # type: ignore[assignment]


class Config(NamedTuple):
    """config.toml"""

    server: Server = Server  # type: ignore[assignment]
    security: Security = Security  # type: ignore[assignment]
    storage: Storage = Storage  # type: ignore[assignment]
    logging: Logging = Logging  # type: ignore[assignment]
    limits: Limits = Limits  # type: ignore[assignment]
    monitoring: Monitoring = Monitoring  # type: ignore[assignment]
    secrets: Secrets = Secrets  # type: ignore[assignment]
    notifications: Notifications = Notifications  # type: ignore[assignment]


class CommandSpec(NamedTuple):
    """One command: an argv list, or this table."""

    run: tuple[Template, ...] = key(REQUIRED, _list(Check("text with placeholders", _parse_template_value), 1, 200),
                                    "program and arguments; never a shell unless you write one")
    name: str | None = key(None, _text(re.compile(r"[\w .:/+-]{1,64}"), "name of 1 to 64 plain characters"),
                           "name in logs and records; else the program")
    timeout: int | None = key(None, _duration(1, 2 * _HOUR), "overrides the phase's timeout")
    retries: int | None = key(None, _integer(0, 10), "overrides the phase's retries")
    retry_delay: int | None = key(None, _duration(0, _HOUR), "fixed wait between tries; else 2, 4, 8, ... at most 60 s")
    critical: bool | None = key(None, _BOOLEAN, "whether its failure fails the phase; in post_deploy and on_failure "
                                                "the default is false")
    env: dict[str, Template] = key({}, _ENV_TEXTS, "environment of this command alone")
    working_dir: str | None = key(None, _PATH, "overrides the service's working directory")


def _parse_command(value: Any, place: Place) -> CommandSpec | None:
    if isinstance(value, list):
        value, place = {"run": value}, place
    if not isinstance(value, dict):
        raise ValueError(f"{render_value(value)} is not a command; write [\"program\", \"argument\"]")
    command = _load_table(CommandSpec, value, place)
    if command.run and command.run[0] and not command.run[0].text.strip():
        place.problem("has an empty program")
    return command


def _commands(low: int, high: int) -> Check:
    return _list(Check("command", _parse_command), low, high)


class ServiceSecurity(NamedTuple):
    """[service.security]"""

    allowed_image_pattern: re.Pattern[str] = key(REQUIRED, Check("regular expression", _parse_regex),
                                                 "which images may be deployed; matched against the whole value")
    allowed_env_overrides: tuple[str, ...] = key([], _OVERRIDE_NAMES, "variables that a request may set")
    hmac_keys: tuple[str, ...] = key([], _list(_text(SECRET_NAME, "secret name"), 0, 16),
                                     "secrets that may sign for this service only")


class ServiceDeploy(NamedTuple):
    """[service.deploy]"""

    commands: tuple[CommandSpec, ...] = key(REQUIRED, _commands(1, 20), "what a deployment runs, in order")
    timeout: int | None = key(None, _duration(1, 2 * _HOUR), "per command; else command_timeout")
    retries: int = key(0, _integer(0, 10), "tries after a failure, per command")
    critical: bool = key(True, _BOOLEAN, "a failing command stops the deployment; false: noted and carried on")


class HttpProbe(NamedTuple):
    """A request that must be answered as expected, made without any program."""

    url: Template = key(REQUIRED, Check("URL", _parse_template_value), "http:// or https:// URL; redirects are not followed")
    status: int = key(200, _integer(100, 599), "expected status")
    contains: Template | None = key(None, Check("text with placeholders", _parse_template_value),
                                    "text that the first 64 KB of the answer must hold")


def _parse_http_probe(value: Any, place: Place) -> HttpProbe:
    if isinstance(value, str):
        value = {"url": value}
    if not isinstance(value, dict):
        raise ValueError(f"{render_value(value)} is not a URL or a table with url, status, contains")
    probe = _load_table(HttpProbe, value, place)
    if probe.url and not re.match(r"https?://[^/\s]", probe.url.text):
        place.problem(f"{render_value(probe.url.text)} is not an http:// or https:// URL")
    return probe


class Healthcheck(NamedTuple):
    """[service.healthcheck]"""

    initial_delay: int = key(5, _duration(0, _HOUR), "wait before the first probe")
    interval: int = key(3, _duration(0, _HOUR), "wait between probes")
    max_attempts: int = key(20, _integer(1, 100), "probes at most")
    success_threshold: int = key(3, _integer(1, 100), "good probes in a row that count as healthy")
    timeout: int | None = key(None, _duration(1, _HOUR), "per probe; else defaults.healthcheck_timeout")
    commands: tuple[CommandSpec, ...] = key([], _commands(0, 20), "commands that must all exit 0")
    http: HttpProbe | None = key(None, Check("URL or { url, status, contains }", _parse_http_probe), "HTTP request to make")
    tcp: Template | None = key(None, Check("host:port", _parse_template_value), "address that must accept a connection")
    unix: str | None = key(None, _PATH, "unix socket that must accept a connection")


class Rollback(NamedTuple):
    """[service.rollback]"""

    enabled: bool | None = key(None, _BOOLEAN, "else defaults.rollback_enabled")
    max_attempts: int = key(2, _integer(1, 10), "tries of the whole list of commands")
    timeout: int | None = key(None, _duration(1, 2 * _HOUR), "per command; else command_timeout")
    commands: tuple[CommandSpec, ...] = key([], _commands(0, 20), "what returns to {{PREVIOUS_IMAGE}}")


class Hooks(NamedTuple):
    """[service.hooks]"""

    pre_deploy: tuple[CommandSpec, ...] = key([], _commands(0, 20), "before anything else; a failure stops the deployment")
    post_deploy: tuple[CommandSpec, ...] = key([], _commands(0, 20), "after success, health included")
    on_failure: tuple[CommandSpec, ...] = key([], _commands(0, 20), "after a failure and its rollback")


class Service(NamedTuple):
    """[[service]]"""

    name: str = key(REQUIRED, _text(SERVICE_NAME, "name (1 to 32 of A-Z a-z 0-9 - _)"), "unique name")
    description: str = key("", _text(may_be_empty=True), "one line for people")
    enabled: bool = key(True, _BOOLEAN, "whether deploys are accepted, and carried out if they wait")
    working_dir: str | None = key(None, _PATH, "directory of the commands; else defaults.working_dir")
    on_busy: str | None = key(None, _choice("queue", "reject", "replace"),
                              "while one runs: wait in line, refuse, or replace those that wait")
    recovery: str = key("rollback", _choice("rollback", "fail", "retry"),
                        "what a restart does with a deployment that it finds half-way")
    user: str | None = key(None, _TEXT, "user that commands run as (the server must be root)")
    group: str | None = key(None, _TEXT, "group that commands run as; else the user's")
    umask: int = key("022", Check('octal text such as "022"', _parse_umask), "umask of the commands")
    nice: int = key(0, _integer(-20, 19), "added niceness of the commands")
    inherit_env: tuple[str, ...] = key([], _ENV_NAMES, "variables let through from the server's environment")
    env: dict[str, Template] = key({}, _ENV_TEXTS, "environment of every command")
    security: ServiceSecurity = ServiceSecurity  # type: ignore[assignment]
    deploy: ServiceDeploy = ServiceDeploy  # type: ignore[assignment]
    healthcheck: Healthcheck = Healthcheck  # type: ignore[assignment]
    rollback: Rollback = Rollback  # type: ignore[assignment]
    hooks: Hooks = Hooks  # type: ignore[assignment]
    templates: dict[str, Template] = key({}, _mapping(ENV_NAME, Check("text with placeholders", _parse_template_value)),
                                         "custom variables")


class Defaults(NamedTuple):
    """[defaults]"""

    working_dir: str = key("/srv", _PATH, "directory of the commands")
    command_timeout: int | None = key(None, _duration(1, 2 * _HOUR), "per command; else limits.command_timeout")
    healthcheck_timeout: int = key(10, _duration(1, _HOUR), "per probe")
    rollback_enabled: bool = key(True, _BOOLEAN, "whether failures are rolled back")
    on_busy: str = key("queue", _choice("queue", "reject", "replace"), "see service.on_busy")
    inherit_env: tuple[str, ...] = key([], _ENV_NAMES, "added to every service's")
    env: dict[str, Template] = key({}, _ENV_TEXTS, "environment of every command; a service's own wins")


def is_table(default: object) -> bool:
    """Return whether a field's default names a table's class rather than a Key."""
    return isinstance(default, type)


def _load_table(table: type, raw: Mapping[str, Any], place: Place) -> Any:
    """Return `table` built from `raw`; a key with a problem is None."""
    for name in [name for name in raw if name not in table._fields]:
        known = _TABLES_OF_HOOKSHOT_1.get(name) if table is Service else None
        (place / name).problem(known or f"unknown key{nearest(name, table._fields)}")
    return table(**{name: _load_field(default, raw, name, place / name) for name, default in table._field_defaults.items()})


def _load_field(field: Any, raw: Mapping[str, Any], name: str, place: Place) -> Any:
    if is_table(field):
        value = raw.get(name, {})
        if not isinstance(value, dict):
            place.problem(f"{render_value(value)} is not a table")
            value = {}
        return _load_table(field, value, place)
    if name in raw:
        return _parse_at(field.check, raw[name], place)
    if field.default is REQUIRED:
        place.problem("is required")
        return None
    return None if field.default is None else field.check.parse(field.default, place)


# After one of these programs an option makes program text of an argument: as a letter, alone or with others ("-lc"), or as
# a word. A value inserted there would be executed.
_SCRIPT_OPTIONS = {
    **dict.fromkeys(("sh", "bash", "rbash", "dash", "zsh", "ksh", "mksh", "ash", "fish", "csh", "tcsh", "su", "runuser", "flock",
                     "python", "pypy"), ("c", "command")),
    **dict.fromkeys(("perl", "ruby", "node", "nodejs", "lua"), ("eEp", "eval|print")), "php": ("rBRE", "run"),
}
_INTERPRETER = re.compile(r"(?:.*/)?([a-z]+)[\d.]*", re.ASCII)
# What follows one of these is a name: a user or a container may be called "node".
_NAMING_OPTIONS = ("-u", "--user", "-g", "--group", "--name")


def find_scripts(argv: Sequence[Template]) -> list[int]:
    """Return the indexes of the arguments that may be program text ("-c" of a shell and the like)."""
    found: list[int] = []
    letters, words, is_next, is_own = "", "", False, False
    for index, (before, text) in enumerate(itertools.pairwise(["", *(word.text for word in argv)])):
        match = _INTERPRETER.fullmatch(text) if before not in _NAMING_OPTIONS else None
        if is_next:
            found.append(index)
            # A shell goes on reading options: bash -c -o pipefail 'text'.
            is_next = text.startswith(("-", "+")) or before in ("-o", "+o", "-O", "+O")
        if match and match[1] in _SCRIPT_OPTIONS:
            (letters, words), is_own = _SCRIPT_OPTIONS[match[1]], True
        elif letters and re.fullmatch(rf"-[A-Za-z]*[{letters}][A-Za-z]*|--(?:{words})", text):
            is_next = True
        elif letters and re.match(rf"--(?:{words})=" + rf"|-[A-Za-z]*[{letters}]" * is_own, text):
            found.append(index)  # The text may stand in the same word: python3 -c'text'.
        is_own = is_own and (bool(match) or text.startswith(("-", "+")))
    return found


def env_name_of(name: str, custom: Iterable[str] = ()) -> str:
    """Return the environment variable that carries a template variable to every command."""
    if name not in VARIABLES and name not in custom:
        name = "META_" + name.removeprefix("meta.")
    return "HOOKSHOT_" + re.sub(r"[^A-Z0-9]", "_", name.upper())


def _check_command(command: CommandSpec, custom: Iterable[str], place: Place, *, late: bool) -> None:
    texts = [(place.at(index), word) for index, word in enumerate(command.run or ())]
    texts += [(place / f"env.{name}", text) for name, text in (command.env or {}).items()]
    for where, text in texts:
        if text and (problem := check_template(text, custom, late=late)):
            where.problem(problem)
    argv = [word or Template("", ()) for word in command.run or ()]
    if any(insert.name not in {*VARIABLES, *custom} and names_metadata(insert.name) for insert in (argv[0].inserts if argv else ())):
        place.at(0).problem("the program itself may not come from a request's metadata")
    script = next((index for index in find_scripts(argv) if argv[index].inserts), None)
    if script is not None:
        insert = argv[script].inserts[0]
        advice = f'"${env_name_of(insert.name, custom)}"' if not insert.calls else "a variable set in env, such as " \
            f'env = {{ VALUE = "{{{{{insert.name}|{insert.calls[0][0]}}}}}" }} and "$VALUE"'
        place.at(script).problem(f"a placeholder inside program text would be executed; write {advice} instead")


def service_commands(service: Service) -> Iterator[tuple[str, tuple[CommandSpec, ...], bool]]:
    """Yield path, commands, and whether they may use what only hooks know."""
    yield "hooks.pre_deploy", service.hooks.pre_deploy, False
    yield "deploy.commands", service.deploy.commands, False
    yield "healthcheck.commands", service.healthcheck.commands, False
    yield "hooks.post_deploy", service.hooks.post_deploy, True
    yield "rollback.commands", service.rollback.commands, False
    yield "hooks.on_failure", service.hooks.on_failure, True


def _check_service(service: Service, place: Place) -> None:
    """Note what is wrong between keys, each of which is right by itself."""
    custom = service.templates or {}
    for name, template in custom.items():
        if name in VARIABLES:
            (place / f"templates.{name}").problem("is a built-in variable; choose another name")
        elif template and (problem := check_template(template, custom, late=True)):
            (place / f"templates.{name}").problem(problem)
    usable = {name: template for name, template in custom.items() if template}
    if cycle := find_cycle(usable):
        (place / "templates").problem(f"variables refer to each other in a circle: {cycle}")
    for path, commands, late in service_commands(service):
        for index, command in enumerate(commands or ()):
            if command:
                _check_command(command, custom, (place / path).at(index), late=late)
    health = service.healthcheck
    texts = {f"env.{name}": text for name, text in (service.env or {}).items()} | {
        "healthcheck.tcp": health.tcp, "healthcheck.http.url": health.http and health.http.url,
        "healthcheck.http.contains": health.http and health.http.contains}
    for path, text in texts.items():
        if text and (problem := check_template(text, custom, late=False)):
            (place / path).problem(problem)
    _check_health(health, place / "healthcheck")
    if service.rollback.enabled and not service.rollback.commands:
        (place / "rollback.commands").problem("are required when rollback.enabled is true")


def _check_health(health: Healthcheck, place: Place) -> None:
    if health.success_threshold and health.max_attempts and health.success_threshold > health.max_attempts:
        (place / "success_threshold").problem(
            f"{health.success_threshold} can never be reached with max_attempts {health.max_attempts}")
    if (health.interval or 0) * (health.max_attempts or 0) > _HOUR:
        (place / "interval").problem("interval x max_attempts is more than an hour")
    match = health.tcp and re.fullmatch(r"\S+:(?:([0-9]{1,5})|.*\}\})", health.tcp.text)
    if health.tcp and (not match or int(match[1] or 0) > 65535):
        (place / "tcp").problem(f"{render_value(health.tcp.text)} is not host:port")


class Services(NamedTuple):
    """services.toml, read: the services by name, with their defaults filled in."""

    by_name: dict[str, Service]


def _parse_toml(text: str, file: str, problems: list[Problem]) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # Not only TOMLDecodeError: a number of 5,000 digits, deep nesting.
        problems.append(Problem(file, "", f"is not valid TOML: {_toml_problem(error)}"))
        return {}


def _toml_problem(error: Exception) -> str:
    # tomllib says "Cannot declare ('server', 'tls') twice (at line 9, column 12)". It is what a pasted block leads to.
    twice = re.fullmatch(r"Cannot declare \((.+?),?\) twice( \(.*\))?", str(error))
    if not twice:
        return str(error)
    table = twice[1].replace("'", "").replace(", ", ".")
    return f"[{table}] stands twice{twice[2] or ''}; keep one of the two, with the keys of both"


def load_config(text: str, file: str, problems: list[Problem], places: Mapping[str, str] = {}) -> Config:
    """Return the parsed config.toml; what is wrong with it is added to `problems`. `places` holds for keys that it leaves out."""
    raw = _parse_toml(text, file, problems)
    for path, value in places.items():
        table, _, name = path.partition(".")
        if isinstance(raw.setdefault(table, {}), dict):
            raw[table].setdefault(name, value)
    config = _load_table(Config, raw, Place(file, "", problems))
    tls, place = config.server.tls, Place(file, "server.tls", problems)
    for name in ("cert", "key"):
        if any(tls) and not getattr(tls, name) and not any(problem.path == f"server.tls.{name}" for problem in problems):
            (place / name).problem("is required with the other keys of [server.tls]")
    place = Place(file, "secrets", problems)
    if config.secrets.source and "command" in config.secrets.source and not config.secrets.command:
        (place / "command").problem("is required by source = \"command\"")
    _check_notifications(config.notifications, Place(file, "notifications", problems))
    return config


def _check_notifications(notifications: Notifications, place: Place) -> None:
    names = [channel.name for channel in notifications.channel or () if channel]
    for name in {name for name in names if name and names.count(name) > 1}:
        (place / "channel").problem(f"two channels are named {name}")


def load_services(text: str, file: str, config: Config, problems: list[Problem]) -> Services:
    """Return the parsed services.toml; what is wrong with it is added to `problems`."""
    raw = _parse_toml(text, file, problems)
    place = Place(file, "", problems)
    for name in [name for name in raw if name not in ("defaults", "service")]:
        (place / name).problem(f"unknown key{nearest(name, ('defaults', 'service'))}")
    defaults = _load_field(Defaults, raw, "defaults", place / "defaults")
    tables = raw.get("service", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        (place / "service").problem("is not a list of tables; write [[service]]")
        tables = []
    by_name: dict[str, Service] = {}
    for index, table in enumerate(tables):
        name = table.get("name")
        here = place._replace(path=f'service "{clip(escape_controls(name), 40)}"' if isinstance(name, str) else f"service[{index}]")
        service = _load_table(Service, table, here)
        _check_service(service, here)
        for variable, text in (defaults.env or {}).items():
            if text and variable not in (service.env or {}) and (problem := check_template(text, service.templates or {}, late=False)):
                unknown = Problem(file, f"defaults.env.{variable}", problem)
                problems += [] if unknown in problems else [unknown]
        if service.name in by_name:
            (here / "name").problem("is used by another service too")
        if service.name:
            by_name[service.name] = _inherit(service, defaults, config.limits)
    for channel in config.notifications.channel or ():
        for name in (channel and channel.services) or ():
            if name not in by_name:
                (place / "service").warning(f"channel {channel.name} of notifications names {name}, but there is no such service")
    if not by_name and not problems:
        (place / "service").warning("there is no service yet; nothing can be deployed")
    return Services(by_name)


def _inherit(service: Service, defaults: Defaults, limits: Limits) -> Service:
    """Return the service with what it leaves open taken from [defaults] and [limits]."""
    command_timeout = defaults.command_timeout or limits.command_timeout
    health, rollback, deploy = service.healthcheck, service.rollback, service.deploy
    enabled = defaults.rollback_enabled if rollback.enabled is None else rollback.enabled
    return service._replace(
        working_dir=service.working_dir or defaults.working_dir,
        on_busy=service.on_busy or defaults.on_busy,
        inherit_env=(*(defaults.inherit_env or ()), *(service.inherit_env or ())),
        env={**(defaults.env or {}), **(service.env or {})},
        deploy=deploy._replace(timeout=deploy.timeout or command_timeout),
        healthcheck=health._replace(timeout=health.timeout or defaults.healthcheck_timeout),
        rollback=rollback._replace(timeout=rollback.timeout or command_timeout, enabled=enabled))


# Begins what stands for a value that may hold a secret: a change of it is seen, the value is not.
_HIDDEN = "sha256:"


def flatten_settings(config: Config, services: Services) -> dict[str, str]:
    """Return the text of every key of both files by its path, for comparing; what may hold a secret is a digest."""
    flat = dict(_flatten(config, ""))
    for service in services.by_name.values():
        here = f'service "{service.name}"'
        flat |= {here: "set"} | dict(_flatten(service, f"{here}."))
    return flat


def _flatten(table: Any, prefix: str) -> Iterator[tuple[str, str]]:
    for name, field in type(table)._field_defaults.items():
        value, path = getattr(table, name), prefix + name
        if is_table(field):
            yield from _flatten(value, f"{path}.")
        elif isinstance(value, dict):
            yield from ((f"{path}.{entry}", _hide(text)) for entry, text in value.items())
        elif _is_row(value):
            yield from _flatten_row(value, path)
        elif isinstance(value, tuple) and value and all(map(_is_row, value)):
            for index, row in enumerate(value):
                yield from _flatten_row(row, f'{path} "{row.name}"' if isinstance(row, Channel) else f"{path}[{index}]")
        else:
            yield path, _render_setting(value, field.check)


def _is_row(value: object) -> bool:
    """Return whether a value is a table of keys itself, such as a command or a channel."""
    return isinstance(value, tuple) and any(isinstance(default, Key) for default in getattr(value, "_field_defaults", {}).values())


def _flatten_row(row: Any, path: str) -> Iterator[tuple[str, str]]:
    yield path, "set"
    yield from _flatten(row, f"{path}.")


def _render_setting(value: Any, check: Check) -> str:
    if value is None:
        return "unset"
    # Argument lists and texts with placeholders are the operator's own words: a password may be among them.
    if check is _CONFIDENTIAL or check.kind == "list of text" or "placeholders" in check.kind or isinstance(value, Template):
        return _hide(value)
    if check.kind.startswith("size"):
        return render_size(value).replace(" ", "")
    if "octal" in check.kind:
        return f'"0{value:o}"'
    text = f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else json.dumps(getattr(value, "pattern", value), ensure_ascii=False)
    return escape_controls(text)


def _hide(value: object) -> str:
    return _HIDDEN + hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def describe_changes(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Return a line for each change between two results of flatten_settings; what came or went as a whole has one."""
    lines: list[str] = []
    wholes: tuple[str, ...] = ()
    for path in dict.fromkeys([*before, *after]):
        old, new = before.get(path, "unset"), after.get(path, "unset")
        # An empty list of tables has a line of its own, and its rows have theirs.
        if old != new and {old, new} != {"[]", "unset"} and not path.startswith(wholes):
            lines.append(f"{path}: {_describe_change(old, new)}")
            wholes += (f"{path}.",) if "set" in (old, new) else ()
    return lines


def _describe_change(old: str, new: str) -> str:
    shown = clip(old, 80), clip(new, 80)
    if shown[0] != shown[1] and not any(text == "set" or text.startswith(_HIDDEN) for text in shown):
        return " -> ".join(shown)
    return "added" if old == "unset" else "removed" if new == "unset" else "changed"


def render_sample(table: type, heading: str, values: Mapping[str, Any], prefix: str = "") -> str:
    """Return a commented file of every key: those in `values` ("server.listen": ...) set, the others at their default."""
    keys = {name: field for name, field in table._field_defaults.items() if not is_table(field)}
    lines = [f"[{heading}]"] if heading else []
    for name, field in keys.items():
        path = f"{prefix}{name}"
        text = json.dumps(values.get(path, field.default), ensure_ascii=False)
        lines += [f"# {field.doc} ({field.check.kind})", f"{name} = {text}" if path in values else f"# {name} = {text}"]
    tables = [render_sample(field, f"{prefix}{name}", values, f"{prefix}{name}.")
              for name, field in table._field_defaults.items() if is_table(field)]
    return "\n".join(lines) + "\n" * bool(lines) + "\n" * bool(lines and tables) + "\n".join(tables)


# === 5. WIRE ==========================================================================================================
# What goes over HTTP, as values: requests, answers, signatures, bounded JSON.
#
# 1. A VerifiedBody comes only from verify(); parse_deploy takes nothing else. Skipping authentication does not fit.
# 2. The signature covers the raw bytes; nothing is parsed before it is verified.
# 3. JSON is strict: what two parsers could read differently is refused, and the answer names the field.

SIGNATURE_HEADER = "x-hub-signature-256"
# Standard Webhooks (standardwebhooks.com, specification 1.0): the id and the time are signed together with the body.
WEBHOOK_HEADERS = ("webhook-signature", "webhook-id", "webhook-timestamp")
# No full stop: it parts id, time and body in what is signed, so with one in the id two messages could sign alike.
_WEBHOOK_ID = re.compile(r"[!-\-/-~]{1,255}", re.ASCII)
_WEBHOOK_KEY_PREFIX = b"whsec_"
# A header may list several signatures, one for each key of a rotation.
_MAX_WEBHOOK_SIGNATURES = 8
MAX_JSON_DEPTH = 16
# 2**63 has 19 digits; a longer integer is no number of anything here, and int() of it costs quadratic time.
MAX_NUMBER_CHARS = 20
MAX_METADATA_KEYS = 50
# Told of one body: a megabyte of wrong fields must not be answered with another one.
MAX_PROBLEMS = 50


class SignedMessage(NamedTuple):
    """What tells a signed message that comes again: its id, and when its timestamp is too old to pass a second time."""

    id: str
    expires_ms: int


class VerifiedBody(NamedTuple):
    """A body whose signature was right. Only verify() makes one."""

    key_id: str
    body: bytes
    message: SignedMessage | None = None


class Request(NamedTuple):
    """One HTTP request. Header names are lower case; `peer` is who connected, `verified` what passed the signature gate."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes
    peer: Peer
    request_id: str
    is_gone: Callable[[], bool] = lambda: False
    verified: VerifiedBody | None = None


class Feed(Protocol):
    """What goes on after an answer's stream, as it happens: the reading thread takes from it, and closes it."""

    def take(self, limit_bytes: int) -> bytes | None:
        """Return what there is to send, b"" for nothing yet, None if the reader has fallen behind too far."""

    def farewell(self) -> bytes:
        """Tell of a reader that has fallen behind, and return what it is told itself."""

    def close(self) -> None:
        """Nobody reads any more."""


class Response(NamedTuple):
    """One answer: a body, or a stream of chunks (an empty one: nothing new yet), which a feed may go on."""

    status: int
    body: bytes = b""
    content_type: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()
    stream: Iterator[bytes] | None = None
    feed: Feed | None = None


class DeployRequest(NamedTuple):
    """A well-formed POST /deploy; whether the service allows it is PLAN's to say."""

    deploy_id: str | None
    service: str
    image: str
    previous_image: str | None
    metadata: dict[str, str]
    env: dict[str, str]
    dry_run: bool
    digest: str
    idempotency_key: str | None
    key_id: str
    message: SignedMessage | None = None


class ControlRequest(NamedTuple):
    """A well-formed control request; whether its key may ask for that is API's to say."""

    action: str
    target: str
    to: str | None
    reason: str | None
    owner: str
    for_s: int | None
    force: bool
    digest: str
    key_id: str
    message: SignedMessage


_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def render_json(value: object) -> bytes:
    """Return compact UTF-8 JSON with a final newline."""
    return _ENCODER.encode(value).encode("utf-8", "replace") + b"\n"


def sign(key: bytes, body: bytes) -> str:
    """Return the value of X-Hub-Signature-256 for a body (HMAC-SHA256, hex)."""
    return "sha256=" + hmac.digest(key, body, "sha256").hex()


def webhook_key(secret: bytes) -> bytes:
    """Return the key of Standard Webhooks that a secret stands for: its bytes, or after "whsec_" what their base64 says.

    Raises ValueError for a secret that begins so and goes on with anything but base64.
    """
    if not secret.startswith(_WEBHOOK_KEY_PREFIX):
        return secret
    return base64.b64decode(secret.removeprefix(_WEBHOOK_KEY_PREFIX), validate=True)


def sign_webhook(secret: bytes, body: bytes, message_id: str, at_s: int) -> dict[str, str]:
    """Return the three headers of Standard Webhooks for a body."""
    signature = base64.b64encode(hmac.digest(webhook_key(secret), f"{message_id}.{at_s}.".encode() + body, "sha256")).decode()
    return {"webhook-id": message_id, "webhook-timestamp": str(at_s), "webhook-signature": f"v1,{signature}"}


# Shorter keys can be guessed; an empty one lets anybody sign.
MIN_KEY_BYTES = 16


class SigningKey(NamedTuple):
    """A secret that may sign: for each kind of signature an HMAC-SHA256 begun with its key. Finishing a copy takes half the time."""

    hub: hmac.HMAC
    webhook: hmac.HMAC


def prepare_keys(values: Mapping[str, bytes]) -> dict[str, SigningKey]:
    """Return secrets, by name, ready to verify with; one that is too short signs for nothing."""
    return {name: SigningKey(*(hmac.new(key, digestmod="sha256") for key in (secret, webhook_key(secret))))
            for name, secret in values.items() if len(secret) >= MIN_KEY_BYTES}


def _finish(begun: hmac.HMAC, message: bytes) -> bytes:
    code = begun.copy()
    code.update(message)
    return code.digest()


def has_signature(headers: Mapping[str, str]) -> bool:
    """Return whether a request claims to be signed at all."""
    return SIGNATURE_HEADER in headers or WEBHOOK_HEADERS[0] in headers


def verify(body: bytes, headers: Mapping[str, str], keys: Mapping[str, SigningKey], security: Security, now_ms: int) -> VerifiedBody:
    """Return the proof that one of `keys` signed `body`; raise `authentication` otherwise.

    A signature of Standard Webhooks decides alone where there is one. Every key is tried whatever the earlier ones gave,
    each compared in constant time: the time taken tells nothing. What is wrong beyond that is told to holders of a key only.
    """
    is_webhook = WEBHOOK_HEADERS[0] in headers
    signers = (_signers_webhook if is_webhook else _signers_hub)(body, headers, keys)
    if not signers:
        raise HookshotError("authentication", "the signature is missing or wrong", reason="wrong")
    if not is_webhook:
        if security.require_timestamp:
            raise HookshotError("authentication", "this server takes only signatures with a timestamp: the webhook-id, webhook-timestamp "
                                                  "and webhook-signature headers (security.require_timestamp)", reason="no_timestamp")
        return VerifiedBody(signers[0], body)
    at_ms, window_ms = int(headers["webhook-timestamp"]) * 1000, security.replay_window * 1000
    if abs(now_ms - at_ms) > window_ms:
        raise HookshotError("authentication", f"the signature's timestamp is {render_duration(abs(now_ms - at_ms))} "
                                              f"{'ahead of' if at_ms > now_ms else 'behind'} this host's clock, more than "
                                              f"security.replay_window ({security.replay_window} s); check both clocks", reason="stale")
    return VerifiedBody(signers[0], body, SignedMessage(headers["webhook-id"], at_ms + window_ms))


def _signers_hub(body: bytes, headers: Mapping[str, str], keys: Mapping[str, SigningKey]) -> list[str]:
    """Return the names of the keys that made X-Hub-Signature-256."""
    given = headers.get(SIGNATURE_HEADER, "").strip().encode("latin-1", "replace").lower()
    return [key_id for key_id, key in keys.items() if hmac.compare_digest(b"sha256=" + _finish(key.hub, body).hex().encode(), given)]


def _signers_webhook(body: bytes, headers: Mapping[str, str], keys: Mapping[str, SigningKey]) -> list[str]:
    """Return the names of the keys that made one of the signatures in webhook-signature."""
    message_id, at_s = headers.get("webhook-id", ""), headers.get("webhook-timestamp", "")
    if not _WEBHOOK_ID.fullmatch(message_id) or not re.fullmatch(r"[0-9]{1,12}", at_s, re.ASCII):
        return []
    signed = f"{message_id}.{at_s}.".encode() + body
    claims = [word.removeprefix("v1,").encode("latin-1", "replace") for word in headers["webhook-signature"].split() if word.startswith("v1,")]
    signers = []
    for key_id, key in keys.items():
        expected = base64.b64encode(_finish(key.webhook, signed))
        # A list, not any() of a generator: that would stop at the first right one.
        signers += [key_id] if any([hmac.compare_digest(expected, claim) for claim in claims[:_MAX_WEBHOOK_SIGNATURES]]) else []
    return signers


class _BadNumber(NamedTuple):
    """Stands in a parsed document for a number that is refused, until its path is known."""

    text: str


def _parse_number(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        value = convert(text) if len(text) <= MAX_NUMBER_CHARS else None
        return value if value is not None and abs(value) < 1e300 else _BadNumber(text)

    return parse


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        counts = collections.Counter(name for name, _ in pairs)
        raise HookshotError("validation", f"{_show_key(counts.most_common(1)[0][0])}: appears twice in one object")
    return document


def _show_key(name: str) -> str:
    return clip(escape_controls(name.encode("utf-8", "replace").decode()), 64)


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_int=_parse_number(int), parse_float=_parse_number(float),
                            parse_constant=_BadNumber)


def parse_json(body: bytes) -> Any:
    """Return the document; raise `validation`, naming the field, for anything that is not plain, bounded JSON."""
    try:
        document = _DECODER.decode(body.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise HookshotError("validation", f"the body is not UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise HookshotError("validation", f"the body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise HookshotError("validation", f"the body is nested deeper than {MAX_JSON_DEPTH} levels") from None
    _check_json(document, "body", 1)
    return document


def _check_json(value: Any, path: str, depth: int) -> None:
    if isinstance(value, _BadNumber):
        raise HookshotError("validation", f"{path}: {clip(value.text, 24)} is not an acceptable number")
    if isinstance(value, str):
        problem = "has a NUL character" if "\0" in value else "has a lone surrogate" if not _is_unicode(value) else None
        if problem:
            raise HookshotError("validation", f"{path}: {problem}")
    elif isinstance(value, dict | list):
        if depth > MAX_JSON_DEPTH:
            raise HookshotError("validation", f"{path}: is nested deeper than {MAX_JSON_DEPTH} levels")
        for name, entry in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(name, str):
                _check_json(name, f"{path}, a key", depth)
            _check_json(entry, _show_key(str(name)) if path == "body" else f"{path}.{_show_key(str(name))}", depth + 1)


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


_DEPLOY_FIELDS = ("deploy_id", "service", "image", "previous_image", "metadata", "overrides", "dry_run")


class _Fields:
    """Reads the fields of one document and collects every problem, each with its field's path."""

    def __init__(self, document: Mapping[str, Any], known: Sequence[str], prefix: str = ""):
        self._document, self._prefix = document, prefix
        unknown = itertools.islice((name for name in document if name not in known), MAX_PROBLEMS)
        self.problems = [f"{prefix}{_show_key(name)}: unknown field{nearest(name, known)}" for name in unknown]

    def text(self, name: str, check: Callable[[str], str | None], *, required: bool = False) -> str | None:
        value = self._document.get(name)
        if value is None:
            self.problems += [f"{self._prefix}{name}: is required"] if required else []
            return None
        problem = check(value) if isinstance(value, str) else "is not a text"
        self.problems += [f"{self._prefix}{name}: {problem}"] if problem else []
        return value

    def table(self, name: str) -> dict[str, Any]:
        value = self._document.get(name)
        if isinstance(value, dict):
            return value
        self.problems += [] if value is None else [f"{self._prefix}{name}: is not an object"]
        return {}

    def duration(self, name: str, high_s: int) -> int | None:
        value = self._document.get(name)
        if value is None:
            return None
        try:
            seconds = parse_duration(value)
            if 1 <= seconds <= high_s:
                return seconds
            problem = f"is not between 1 s and {high_s} s"
        except ValueError as error:
            problem = str(error)
        self.problems.append(f"{self._prefix}{name}: {problem}")
        return None

    def boolean(self, name: str) -> bool:
        value = self._document.get(name)
        self.problems += [] if value is None or isinstance(value, bool) else [f"{self._prefix}{name}: is not true or false"]
        return value is True


def _scalar_texts(table: Mapping[str, Any], names: re.Pattern[str], path: str, problems: list[str], *, dash: bool) -> dict[str, str]:
    """Return scalars as text (null dropped); note what is not a scalar, and what no command may get."""
    texts = {}
    for name, value in table.items():
        text = {True: "true", False: "false"}.get(value, value) if isinstance(value, bool) else value
        text = str(text) if isinstance(text, int | float) else text
        shown = f"{path}.{_show_key(name)}"
        if not names.fullmatch(name):
            problems.append(f"{shown}: is not a valid name")
        elif text is not None and not isinstance(text, str):
            problems.append(f"{shown}: is not a text, a number, true or false")
        elif text is not None and (problem := check_request_value(text, may_start_with_dash=dash)):
            problems.append(f"{shown}: {problem}")
        elif text is not None:
            texts[name] = text
    return texts


def _check_image(value: str) -> str | None:
    return check_request_value(value) or (None if value and not value.isspace() else "is empty")


def _matches(pattern: re.Pattern[str], allowed: str) -> Callable[[str], str | None]:
    return lambda value: None if pattern.fullmatch(value) else f"is not {allowed}"


check_deploy_id = _matches(DEPLOY_ID, "1 to 128 of A-Z a-z 0-9 . _ - starting with a letter or digit")


def _parse_object(body: bytes) -> dict[str, Any]:
    document = parse_json(body)
    if not isinstance(document, dict):
        raise HookshotError("validation", "the body is not a JSON object")
    return document


def _refuse_problems(problems: Sequence[str]) -> None:
    if problems:
        raise HookshotError("validation", "; ".join(problems[:10]), details="\n".join(problems[:MAX_PROBLEMS]))


def parse_deploy(verified: VerifiedBody, idempotency_key: str | None) -> DeployRequest:
    """Return the deploy request in a verified body; raise `validation` with every problem at once."""
    document = _parse_object(verified.body)
    fields = _Fields(document, _DEPLOY_FIELDS)
    overrides = _Fields(fields.table("overrides"), ("env",), "overrides.")
    metadata = fields.table("metadata")
    problems = fields.problems
    if len(metadata) > MAX_METADATA_KEYS:
        problems.append(f"metadata: has more than {MAX_METADATA_KEYS} keys")
    request = DeployRequest(
        deploy_id=fields.text("deploy_id", check_deploy_id),
        service=fields.text("service", _matches(SERVICE_NAME, "a service name"), required=True) or "",
        image=fields.text("image", _check_image, required=True) or "",
        previous_image=fields.text("previous_image", _check_image),
        metadata=_scalar_texts(metadata, META_KEY, "metadata", problems, dash=False),
        # Never inserted into arguments, so "-Xmx1g" is as good as any other value.
        env=_scalar_texts(overrides.table("env"), ENV_NAME, "overrides.env", problems, dash=True),
        dry_run=fields.boolean("dry_run"),
        digest=hashlib.sha256(verified.body).hexdigest(),
        idempotency_key=parse_idempotency_key(idempotency_key, problems),
        key_id=verified.key_id,
        message=verified.message)
    problems += overrides.problems
    _refuse_problems(problems)
    return request


# What may be asked of a deployment or a service that is there: the field that names it, and further fields.
CONTROLS: dict[str, tuple[str, tuple[str, ...]]] = {
    "cancel": ("deploy_id", ("reason",)),
    "retry": ("deploy_id", ()),
    "rollback": ("service", ("to", "reason")),
    "lock": ("service", ("reason", "for", "owner", "force")),
    "unlock": ("service", ("owner", "force")),
}
MAX_LOCK_S = 366 * 86_400
MAX_OWNER_CHARS = 128


def parse_control(verified: VerifiedBody, action: str, target: str) -> ControlRequest:
    """Return the control request in a verified body that came for an action and a target, as its path names them.

    The signature does not cover the path: so the body names both too, or what was signed for one could be sent to another.
    Nor does X-Hub-Signature-256 cover a time: an old `unlock` must not pass a second time. Raises `authentication`, `validation`.
    """
    if verified.message is None:
        raise HookshotError("authentication", "this takes only signatures with a timestamp: the webhook-id, webhook-timestamp and "
                                              "webhook-signature headers", reason="no_timestamp")
    name, options = CONTROLS[action]
    fields = _Fields(_parse_object(verified.body), ("action", name, *options))
    for field, expected in (("action", action), (name, target)):
        fields.text(field, _named_by_path(expected), required=True)
    request = ControlRequest(
        action=action, target=target, to=fields.text("to", _check_image), reason=fields.text("reason", _check_words) or None,
        owner=fields.text("owner", _check_owner) or verified.key_id, for_s=fields.duration("for", MAX_LOCK_S), force=fields.boolean("force"),
        digest=hashlib.sha256(verified.body).hexdigest(), key_id=verified.key_id, message=verified.message)
    _refuse_problems(fields.problems)
    return request


def _named_by_path(expected: str) -> Callable[[str], str | None]:
    return lambda value: None if value == expected else f"is not {_show_key(expected)}, which the path names"


def _check_words(value: str) -> str | None:
    return check_request_value(value, may_start_with_dash=True)


def _check_owner(value: str) -> str | None:
    return _check_words(value) or (f"is longer than {MAX_OWNER_CHARS} characters" if len(value) > MAX_OWNER_CHARS else None)


def parse_idempotency_key(header: str | None, problems: list[str]) -> str | None:
    """Return the key of an Idempotency-Key header, quoted (RFC 8941 string) or bare, or None without one."""
    if header is None:
        return None
    bare = header[1:-1] if len(header) >= 2 and header[0] == header[-1] == '"' else header
    if not re.fullmatch(r"[!#-\[\]-~]{1,255}", bare, re.ASCII):
        problems.append("Idempotency-Key: is not 1 to 255 visible ASCII characters")
    return bare


def parse_wait(query: Mapping[str, str], prefer: str | None) -> int | None:
    """Return the seconds that a caller wants to wait for the end (?wait=N, or Prefer: wait=N of RFC 7240), or None."""
    text = query.get("wait")
    if text is None:
        preferences = (part.partition(";")[0].partition("=") for part in (prefer or "").split(","))
        text = next((value.strip().strip('"') for name, _, value in preferences if name.strip().lower() == "wait"), None)
        # An unreadable preference is no preference (RFC 7240, section 2).
        return int(text) if text and re.fullmatch(r"\d{1,6}", text, re.ASCII) else None
    if not re.fullmatch(r"\d{1,6}", text, re.ASCII):
        raise HookshotError("validation", f"wait: {clip(escape_controls(text), 20)} is not a number of seconds")
    return int(text)


def render_problem(error: HookshotError, request_id: str, now_ms: int) -> bytes:
    """Return application/problem+json (RFC 9457) with the members of Hookshot 1.0 beside it."""
    members = _ENCODER.encode(error.members)[1:-1] + "," if error.members else ""
    return (f'{_render_failure(error.name, error.sentence, error.details)},{members}'
            f'"timestamp":"{render_time(now_ms)}","request_id":"{request_id}"}}\n').encode("utf-8", "replace")


# A flood is told the same again and again.
@functools.lru_cache(maxsize=64)
def _render_failure(name: str, sentence: str, details: str | None) -> str:
    """Return a problem's members that do not change from one request to the next, as the beginning of a JSON object."""
    kind = ERRORS[name]
    return _ENCODER.encode({"type": "about:blank", "title": kind.title, "status": kind.http, "detail": sentence, "error": sentence,
                            "code": kind.code, "details": details})[:-1]


# === 6. LIFECYCLE =====================================================================================================
# The states of a deployment and the only table of its legal moves.
#
# 1. An illegal move is the KeyError of the lookup: a bug, never a decision.
# 2. Terminal states have no row, so they never move again.
# 3. A crash is no special path: the restart feeds the policy's outcome to the same table.


class State(StrEnum):
    """Where a deployment is; the values are what callers and the database see."""

    QUEUED = "Queued"
    VALIDATING = "Validating"
    DEPLOYING = "Deploying"
    HEALTH_CHECKING = "HealthChecking"
    ROLLING_BACK = "RollingBack"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    ROLLED_BACK = "RolledBack"
    ROLLBACK_FAILED = "RollbackFailed"
    CANCELLED = "Cancelled"


class Outcome(StrEnum):
    """How a phase ended; with the state it decides the next state."""

    CLAIMED = "claimed"
    PASSED = "passed"
    PASSED_UNCHECKED = "passed, and there is nothing to check"
    FAILED = "failed, and can be rolled back"
    FAILED_FOR_GOOD = "failed, and cannot be rolled back"
    RETRIED = "interrupted, and starts over"
    CANCELLED = "cancelled"


TRANSITIONS: dict[State, dict[Outcome, State]] = {
    State.QUEUED: {
        Outcome.CLAIMED: State.VALIDATING,
        Outcome.CANCELLED: State.CANCELLED},
    State.VALIDATING: {
        Outcome.PASSED: State.DEPLOYING,
        Outcome.FAILED: State.ROLLING_BACK,
        Outcome.FAILED_FOR_GOOD: State.FAILED,
        Outcome.RETRIED: State.QUEUED,
        Outcome.CANCELLED: State.CANCELLED},
    State.DEPLOYING: {
        Outcome.PASSED: State.HEALTH_CHECKING,
        Outcome.PASSED_UNCHECKED: State.SUCCEEDED,
        Outcome.FAILED: State.ROLLING_BACK,
        Outcome.FAILED_FOR_GOOD: State.FAILED,
        Outcome.RETRIED: State.QUEUED,
        Outcome.CANCELLED: State.CANCELLED},
    State.HEALTH_CHECKING: {
        Outcome.PASSED: State.SUCCEEDED,
        Outcome.FAILED: State.ROLLING_BACK,
        Outcome.FAILED_FOR_GOOD: State.FAILED,
        Outcome.RETRIED: State.QUEUED,
        Outcome.CANCELLED: State.CANCELLED},
    State.ROLLING_BACK: {
        Outcome.PASSED: State.ROLLED_BACK,
        Outcome.FAILED_FOR_GOOD: State.ROLLBACK_FAILED},
}
TERMINAL = frozenset(state for state in State if state not in TRANSITIONS)
ACTIVE = frozenset(TRANSITIONS) - {State.QUEUED}
# The words for how a deployment ended, in counts and notices; and the exit statuses of one that is followed.
COUNT_OF_STATE = {State.SUCCEEDED: "succeeded", State.FAILED: "failed", State.ROLLED_BACK: "rolled_back",
                  State.ROLLBACK_FAILED: "rollback_failed", State.CANCELLED: "cancelled"}
EXIT_OF_STATE = {State.SUCCEEDED: 0, State.FAILED: 10, State.ROLLED_BACK: 11, State.ROLLBACK_FAILED: 12, State.CANCELLED: 13}


def advance(state: State, outcome: Outcome) -> State:
    """Return the next state; KeyError if the move is illegal."""
    return TRANSITIONS[state][outcome]


class Trigger(NamedTuple):
    """Who asked for a deployment."""

    address: str
    key_id: str
    user_agent: str | None
    request_id: str


class Deployment(NamedTuple):
    """One deployment as its row says; times are unix milliseconds, durations milliseconds."""

    seq: int
    deploy_id: str
    service: str
    state: State
    image: str
    previous_image: str | None
    metadata: dict[str, str]
    env: dict[str, str]
    trigger: Trigger
    digest: str
    idempotency_key: str | None
    queued_ms: int
    started_ms: int | None
    completed_ms: int | None
    duration_ms: int | None
    deploy_ms: int | None
    healthcheck_ms: int | None
    rollback_ms: int | None
    phase: str | None
    step: int
    steps_total: int
    current_step: str | None
    command_no: int
    pid: int | None
    pid_started: str | None
    error: str | None
    failure_stage: str | None
    rollback_reason: str | None
    verdict: str | None  # the Outcome that its on_failure hooks are told of; after a crash it still holds
    recoveries: int
    queue_ms: int | None
    clock: str | None  # a clock reading of WORLD: of when it was queued, then of when it started
    cancel_reason: str | None  # somebody wants it to end as Cancelled while it runs; from then on it moves nowhere else

    @property
    def is_terminal(self) -> bool:
        return self.state in TERMINAL


def new_deployment(request: DeployRequest, trigger: Trigger, deploy_id: str, at_ms: int) -> Deployment:
    """Return the record of a request that has just been accepted (`seq` is given by the database)."""
    return Deployment(
        seq=0, deploy_id=deploy_id, service=request.service, state=State.QUEUED, image=request.image,
        previous_image=request.previous_image, metadata=request.metadata, env=request.env, trigger=trigger, digest=request.digest,
        idempotency_key=request.idempotency_key, queued_ms=at_ms, started_ms=None, completed_ms=None, duration_ms=None,
        deploy_ms=None, healthcheck_ms=None, rollback_ms=None, phase=None, step=0, steps_total=0, current_step=None, command_no=0,
        pid=None, pid_started=None, error=None, failure_stage=None, rollback_reason=None, verdict=None,
        recoveries=0, queue_ms=None, clock=None, cancel_reason=None)


class Move(NamedTuple):
    """One entry of a deployment's history of states."""

    state: State
    at_ms: int
    reason: str


# === 7. PLAN ==========================================================================================================
# What a deployment will do, worked out before anything runs: commands, environment, deadlines, verdicts. Pure.
#
# 1. build_plan is the one place that expands and refuses; `dry_run`, acceptance and execution share it.
# 2. A request's values reach commands as arguments where the operator put a placeholder, and as HOOKSHOT_* variables.
# 3. judge and watch_health turn what happened into verdicts; nothing else decides whether a phase passed.


class Phase(StrEnum):
    """The parts of a deployment in which commands run."""

    PRE_DEPLOY = "pre_deploy"
    DEPLOY = "deploy"
    HEALTHCHECK = "healthcheck"
    POST_DEPLOY = "post_deploy"
    ROLLBACK = "rollback"
    ON_FAILURE = "on_failure"


class Account(NamedTuple):
    """The identity that commands run as."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str
    shell: str


class Command(NamedTuple):
    """One command of a plan, its templates not yet expanded: attempt and status are known only when it runs."""

    phase: Phase
    step: int
    name: str
    argv: tuple[Template, ...]
    env: Mapping[str, Template]
    cwd: str
    timeout_s: int
    retries: int
    retry_delay_s: int | None
    critical: bool


class HttpCheck(NamedTuple):
    """A GET that must answer with this status and hold this text."""

    url: str
    status: int
    contains: str | None
    timeout_s: float


class SocketCheck(NamedTuple):
    """A TCP address (host, port) or a unix socket (path, None) that must accept a connection."""

    host: str
    port: int | None
    timeout_s: float


class HealthPolicy(NamedTuple):
    """When a series of probes counts as healthy."""

    initial_delay_s: int
    interval_s: int
    max_attempts: int
    success_threshold: int


class Plan(NamedTuple):
    """Everything about one deployment that is fixed before it starts."""

    service: str
    image: str
    previous_image: str | None
    commands: Mapping[Phase, tuple[Command, ...]]
    checks: tuple[HttpCheck | SocketCheck, ...]
    health: HealthPolicy
    rollback_attempts: int
    rollback_refusal: str | None
    scope: Scope
    env: Mapping[str, str]
    service_env: Mapping[str, Template]
    overrides: Mapping[str, str]
    account: Account | None
    umask: int
    nice: int
    timeout_s: int

    @property
    def has_health(self) -> bool:
        return bool(self.commands[Phase.HEALTHCHECK] or self.checks)

    @property
    def can_roll_back(self) -> bool:
        return self.rollback_refusal is None


class Launch(NamedTuple):
    """One process to start, complete; what RUN needs and nothing more."""

    phase: Phase
    step: int
    name: str
    attempt: int
    argv: tuple[str, ...]
    env: Mapping[str, str]
    cwd: str
    timeout_s: float
    account: Account | None
    umask: int
    nice: int


class Result(NamedTuple):
    """What became of one attempt of one command or probe."""

    phase: Phase
    step: int
    name: str
    command: str
    attempt: int
    status: str  # "succeeded", "failed", "timed_out", "stopped" or "not_started"
    exit_code: int | None
    signal: int | None
    started_ms: int
    duration_ms: int
    stdout: str = ""
    stderr: str = ""
    note: str = ""
    critical: bool = True

    @property
    def is_ok(self) -> bool:
        return self.status == "succeeded"

    def explain(self) -> str:
        """Return why it failed, in words: never the command line, which callers must not see."""
        if self.status == "timed_out":
            return f"{self.name} timed out after {render_duration(self.duration_ms)}" + (f"; it {self.note}" if self.note else "")
        if self.signal is not None:
            return f"{self.name} was killed by {_signal_name(self.signal)}"
        if self.exit_code is not None and self.exit_code != 0:
            return f"{self.name} exited with status {self.exit_code}"
        return f"{self.name} {self.note or self.status}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


# Let through from the server's environment: what programs need to find their files and speak the right language.
SAFE_ENV = re.compile(r"PATH|HOME|USER|LOGNAME|SHELL|LANG|LANGUAGE|LC_[A-Z]+|TZ|TMPDIR", re.ASCII)
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def check_request(service: Service, request: DeployRequest) -> None:
    """Raise unless the service allows this request; the sentence tells a caller nothing of the pattern."""
    if not service.enabled:
        raise HookshotError("access_denied", f"service {service.name} is disabled; set enabled = true in services.toml")
    for field, image in (("image", request.image), ("previous_image", request.previous_image)):
        if image is not None and not service.security.allowed_image_pattern.fullmatch(image):
            raise HookshotError("validation", f"{field}: {clip(image, 128)} is not allowed for service {service.name}", gate="image")
    for name in request.env:
        if name not in service.security.allowed_env_overrides:
            raise HookshotError("validation", f"overrides.env.{name}: may not be set for service {service.name}", gate="overrides")


def choose_previous_image(image: str, requested: str | None, last_good: str | None) -> str | None:
    """Return what a rollback would return to: the request's, else the last good one, if it is another image."""
    previous = requested or last_good
    return previous if previous != image else None


def build_plan(service: Service, deployment: Deployment, limits: Limits, environ: Mapping[str, str], account: Account | None) -> Plan:
    """Return the plan; raise `validation` if a command needs metadata that the request lacks.

    `deployment.previous_image` is what choose_previous_image gave; `environ` is the server's environment.
    """
    scope = _scope_of(service, deployment)
    health = service.healthcheck
    plan = Plan(
        service=service.name, image=deployment.image, previous_image=deployment.previous_image,
        commands={
            Phase.PRE_DEPLOY: _commands_of(Phase.PRE_DEPLOY, service.hooks.pre_deploy, service, service.deploy.timeout),
            Phase.DEPLOY: _commands_of(Phase.DEPLOY, service.deploy.commands, service, service.deploy.timeout,
                                       retries=service.deploy.retries, critical=service.deploy.critical),
            Phase.HEALTHCHECK: _commands_of(Phase.HEALTHCHECK, health.commands, service, health.timeout),
            Phase.POST_DEPLOY: _commands_of(Phase.POST_DEPLOY, service.hooks.post_deploy, service, service.deploy.timeout,
                                            critical=False),
            Phase.ROLLBACK: _commands_of(Phase.ROLLBACK, service.rollback.commands, service, service.rollback.timeout),
            Phase.ON_FAILURE: _commands_of(Phase.ON_FAILURE, service.hooks.on_failure, service, service.deploy.timeout,
                                           critical=False)},
        checks=_checks_of(health, scope),
        health=HealthPolicy(health.initial_delay, health.interval, health.max_attempts, health.success_threshold),
        rollback_attempts=service.rollback.max_attempts,
        rollback_refusal=_why_no_rollback(service, deployment.previous_image),
        scope=scope, env=_base_env(service, environ, account), service_env=service.env, overrides=deployment.env,
        account=account, umask=service.umask, nice=service.nice, timeout_s=limits.deployment_timeout)
    for command in itertools.chain.from_iterable(plan.commands.values()):
        for template in (*command.argv, *command.env.values()):
            _expand(template, scope)
    for template in service.env.values():
        _expand(template, scope)
    return plan


def _why_no_rollback(service: Service, previous_image: str | None) -> str | None:
    if not service.rollback.enabled:
        return "rollback is disabled"
    if not service.rollback.commands:
        return "there are no rollback commands"
    return None if previous_image else "no previous image is known"


def _scope_of(service: Service, deployment: Deployment) -> Scope:
    at_ms = deployment.started_ms or deployment.queued_ms
    moment = render_time(at_ms) or ""
    return Scope(values={
        "IMAGE": deployment.image, "PREVIOUS_IMAGE": deployment.previous_image or "", "SERVICE": service.name,
        "DEPLOY_ID": deployment.deploy_id, "WORKING_DIR": service.working_dir or "", "TIMESTAMP": str(at_ms // 1000),
        "DATE": moment[:10], "DATETIME": moment, "ATTEMPT": "1", "PHASE": "", "STATUS": "", "ERROR_MESSAGE": "",
    }, custom=service.templates, metadata=deployment.metadata)


def _commands_of(phase: Phase, specs: Sequence[CommandSpec], service: Service, timeout_s: int | None, *, retries: int = 0,
                 critical: bool = True) -> tuple[Command, ...]:
    return tuple(Command(
        phase=phase, step=step, name=spec.name or clip(escape_controls(os.path.basename(spec.run[0].text)), 64), argv=spec.run,
        env=spec.env, cwd=spec.working_dir or service.working_dir or "/", timeout_s=spec.timeout or timeout_s or 1,
        retries=retries if spec.retries is None else spec.retries, retry_delay_s=spec.retry_delay,
        critical=critical if spec.critical is None else spec.critical) for step, spec in enumerate(specs, 1))


def _checks_of(health: Healthcheck, scope: Scope) -> tuple[HttpCheck | SocketCheck, ...]:
    timeout_s = float(health.timeout or 1)
    checks: list[HttpCheck | SocketCheck] = []
    if health.http:
        contains = health.http.contains
        checks.append(HttpCheck(_expand(health.http.url, scope), health.http.status,
                                None if contains is None else _expand(contains, scope), timeout_s))
    if health.tcp:
        host, _, port = _expand(health.tcp, scope).rpartition(":")
        if not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65535:
            raise HookshotError("validation", "the health check's tcp address has no port")
        checks.append(SocketCheck(host.strip("[]"), int(port), timeout_s))
    if health.unix:
        checks.append(SocketCheck(health.unix, None, timeout_s))
    return tuple(checks)


def _base_env(service: Service, environ: Mapping[str, str], account: Account | None) -> dict[str, str]:
    env = {name: value for name, value in environ.items() if _may_inherit(name, name in service.inherit_env)}
    env.setdefault("PATH", DEFAULT_PATH)
    if account:
        env |= {"HOME": account.home, "USER": account.name, "LOGNAME": account.name, "SHELL": account.shell}
    return env


@functools.cache
def _may_inherit(name: str, is_named: bool) -> bool:
    return bool(is_named or SAFE_ENV.fullmatch(name)) and not NEVER_INHERITED.fullmatch(name)


def _expand(template: Template, scope: Scope) -> str:
    try:
        return expand(template, scope)
    except ValueError as error:
        raise HookshotError("validation", str(error)) from None


def launch_of(plan: Plan, command: Command, attempt: int, *, status: str = "", error: str = "", timeout_s: float | None = None) -> Launch:
    """Return the process of one attempt of a command; raise `validation` for missing metadata."""
    scope = plan.scope._replace(values={**plan.scope.values, "ATTEMPT": str(attempt), "PHASE": command.phase, "STATUS": status,
                                        "ERROR_MESSAGE": error})
    env = dict(plan.env)
    env |= {name: _expand(template, scope) for name, template in plan.service_env.items()}
    env |= {name: _expand(template, scope) for name, template in command.env.items()}
    env |= plan.overrides
    env |= _variables(scope)
    return Launch(
        phase=command.phase, step=command.step, name=command.name, attempt=attempt,
        argv=tuple(_expand(word, scope) for word in command.argv), env=env, cwd=command.cwd,
        timeout_s=command.timeout_s if timeout_s is None else min(timeout_s, command.timeout_s),
        account=plan.account, umask=plan.umask, nice=plan.nice)


def _variables(scope: Scope) -> dict[str, str]:
    """Return what every command gets as HOOKSHOT_*; a custom variable whose metadata is missing is left out."""
    env = {f"HOOKSHOT_META_{re.sub('[^A-Z0-9]', '_', name.upper())}": value for name, value in scope.metadata.items()}
    for name, template in scope.custom.items():
        with contextlib.suppress(ValueError):
            env[env_name_of(name, scope.custom)] = expand(template, scope)
    env |= {f"HOOKSHOT_{name}": value for name, value in scope.values.items()}
    return env


def judge(results: Sequence[Result]) -> Result | None:
    """Return the critical result that failed a phase, or None if the phase passed."""
    last: dict[int, Result] = {result.step: result for result in results}
    return next((result for result in last.values() if result.critical and not result.is_ok), None)


def retry_delay(command: Command, attempt: int) -> int:
    """Return the seconds to wait after a failed attempt: the operator's, or 2, 4, 8, ... at most 60."""
    return min(60, 2**attempt) if command.retry_delay_s is None else command.retry_delay_s


class HealthProgress(NamedTuple):
    """How a series of probes stands."""

    attempts: int = 0
    streak: int = 0


def watch_health(policy: HealthPolicy, progress: HealthProgress, is_good: bool) -> tuple[HealthProgress, bool | None]:
    """Return the progress after one more probe, and the verdict: healthy, unhealthy, or None for "go on".

    Unhealthy comes as soon as the attempts left cannot reach the threshold any more.
    """
    after = HealthProgress(progress.attempts + 1, progress.streak + 1 if is_good else 0)
    if after.streak >= policy.success_threshold:
        return after, True
    left = policy.max_attempts - after.attempts
    return after, False if left < policy.success_threshold - after.streak else None


class Interruption(NamedTuple):
    """What a restart does with a deployment that it finds half-way."""

    outcome: Outcome
    reason: str


# A deployment that takes the server down each time must not do so for ever.
MAX_RECOVERIES = 3
INTERRUPTED = "the server stopped while it ran"


def judge_interruption(deployment: Deployment, recovery: str, *, can_roll_back: bool) -> Interruption | None:
    """Return the move that follows an interruption, or None to go on with the rollback that was under way."""
    if deployment.cancel_reason:
        return Interruption(Outcome.CANCELLED, deployment.cancel_reason)
    if deployment.state is State.ROLLING_BACK:
        if recovery == "fail" or deployment.recoveries >= MAX_RECOVERIES:
            return Interruption(Outcome.FAILED_FOR_GOOD, "the server stopped during the rollback")
        return None
    if recovery == "retry" and deployment.recoveries < MAX_RECOVERIES:
        return Interruption(Outcome.RETRIED, f"{INTERRUPTED}; it starts over")
    outcome = Outcome.FAILED if recovery != "fail" and can_roll_back else Outcome.FAILED_FOR_GOOD
    return Interruption(outcome, INTERRUPTED)


def render_plan(plan: Plan) -> dict[str, Any]:
    """Return the answer to a dry run: every phase's expanded commands, names of the environment, timeouts."""
    late = {"status": "{{STATUS}}", "error": "{{ERROR_MESSAGE}}"}
    phases = {phase: [_render_launch(launch_of(plan, command, 1, **late), command, plan) for command in commands]
              for phase, commands in plan.commands.items()}
    return {
        "service": plan.service, "image": plan.image, "dry_run": True, "status": "Planned", "phases": phases,
        "healthcheck": {
            "checks": [{"url": check.url, "status": check.status, "contains": check.contains} if isinstance(check, HttpCheck)
                       else {"tcp": f"{check.host}:{check.port}"} if check.port is not None else {"unix": check.host}
                       for check in plan.checks],
            **plan.health._asdict()} if plan.has_health else None,
        "rollback": {"possible": plan.can_roll_back, "to": plan.previous_image, "reason": plan.rollback_refusal,
                     "max_attempts": plan.rollback_attempts},
        "timeout_seconds": plan.timeout_s}


def _render_launch(launch: Launch, command: Command, plan: Plan) -> dict[str, Any]:
    return {"step": launch.step, "name": launch.name, "run": list(launch.argv), "env": sorted(launch.env), "working_dir": launch.cwd,
            "timeout_seconds": launch.timeout_s, "retries": command.retries, "critical": command.critical,
            "user": plan.account.name if plan.account else None}


# === 9. EVENTS ========================================================================================================
# Facts, told once.
#
# 1. A fact is told after it is true: after the commit, where there is one.
# 2. Whoever listens neither fails nor waits.


class Accepted(NamedTuple):
    """A deploy request is on disk; `trigger` is who asked now, be it for the first time or again."""

    deployment: Deployment
    created: bool
    trigger: Trigger


class Moved(NamedTuple):
    """A deployment has a new state."""

    deployment: Deployment
    before: State
    reason: str


class CommandEnded(NamedTuple):
    """One attempt of one command or probe is over."""

    deployment: Deployment
    result: Result


class Refused(NamedTuple):
    """A request was answered with an error."""

    request_id: str
    address: Peer
    method: str
    path: str
    code: str
    sentence: str
    reason: str | None = None


class Controlled(NamedTuple):
    """A control request was carried out, or refused: who asked for what, and what came of it ("done", "repeated" or a code)."""

    trigger: Trigger
    action: str
    service: str | None
    deploy_id: str | None
    outcome: str
    message: str


class Broken(NamedTuple):
    """A bug reached a boundary: the work goes on, the trace goes to the log."""

    where: str
    error: BaseException
    request_id: str | None = None
    deploy_id: str | None = None


class Reloaded(NamedTuple):
    """The files were read again: what is in them is in force, or not taken."""

    is_taken: bool
    message: str
    at_ms: int


# What an attempt to send a notice comes to, and how loudly the log tells it.
NOTICE_OUTCOMES = {"delivered": "debug", "retried": "warning", "refused": "error", "expired": "error"}


class Notified(NamedTuple):
    """One attempt to send a notice is over; `outcome` is a row of NOTICE_OUTCOMES."""

    channel: str
    outcome: str
    deploy_id: str
    request_id: str
    message_id: str
    message: str


class Trouble(NamedTuple):
    """Something that the operator should look at; the server goes on. `event` is a row of LOG_EVENTS."""

    event: str
    message: str
    deploy_id: str | None = None
    request_id: str | None = None
    level: str = "error"


class Noted(NamedTuple):
    """A stage of the server's own life. `event` is a row of LOG_EVENTS."""

    event: str
    message: str


Event = Accepted | Moved | CommandEnded | Refused | Controlled | Broken | Reloaded | Notified | Trouble | Noted
Publish = Callable[[Event], None]


# === 10. METRICS ======================================================================================================
# What is counted: the table of metrics, which facts count for what, and the text that Prometheus reads. Owns the samples.
#
# 1. METRICS is the one table: HELP, TYPE, docs/monitoring.md and the checks of the examples come from it.
# 2. Labels come from closed sets: configured names, route patterns, words of the tables here. Nothing that a caller wrote.
# 3. tally_* say what a stored fact counts for. STORE keeps those counts with the fact, so they go on after a restart.
# 4. What is true at this moment only (queues, sizes) is not kept here: whoever renders brings it.

# Upper bounds, seconds.
_DEPLOYMENT_BOUNDS = (1.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
_COMMAND_BOUNDS = (0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_REQUEST_BOUNDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
# What stands for a method or a path that is in no table.
OTHER = "other"
# Why a request was refused for who sent it: HookshotError.reason.
AUTH_REASONS = ("missing", "wrong", "stale", "no_timestamp", "other_service", "token", "address")
# The words of label "reason" of rollback_total: the phase that failed, or that the server itself had stopped.
_ROLLBACK_REASONS = ("deploy", "healthcheck", "post_deploy", "interrupted")
# OpenMetrics 1.0: the names and values of an exemplar's labels have at most 128 characters together.
_MAX_EXEMPLAR_CHARS = 128


class Metric(NamedTuple):
    """One row of METRICS: "counter", "gauge" or "histogram", the names of its labels, what it says, its upper bounds."""

    kind: str
    labels: tuple[str, ...]
    doc: str
    bounds: tuple[float, ...] = ()


METRICS: dict[str, Metric] = {
    # Named as in Hookshot 1.0.
    "deployment_total": Metric("counter", ("service", "status"), "Deployments that ended, by how: succeeded, failed, rolled_back, rollback_failed, cancelled."),
    "deployment_duration_seconds": Metric("histogram", ("service", "phase"), "How long ended deployments took: total, queue, deploy, healthcheck, rollback.", _DEPLOYMENT_BOUNDS),
    "deployment_active": Metric("gauge", ("service",), "Deployments that run now."),
    "deployment_queue_size": Metric("gauge", (), "Deployments that wait for their turn."),
    "rollback_total": Metric("counter", ("service", "reason"), "Rollbacks begun, by the phase that failed: deploy, healthcheck, post_deploy; or interrupted."),
    "command_execution_duration_seconds": Metric("histogram", ("service", "phase", "command"), "How long commands and probes took, by their names in services.toml.", _COMMAND_BOUNDS),
    "healthcheck_failures_total": Metric("counter", ("service",), "Probes of health checks that failed."),
    "http_requests_total": Metric("counter", ("method", "path", "status"), "Requests answered; path is the route's pattern."),
    "http_request_duration_seconds": Metric("histogram", ("method", "path"), "From a request's first byte to its answer's head.", _REQUEST_BOUNDS),
    # Our own.
    "hookshot_build_info": Metric("gauge", ("version", "python", "sqlite"), "Always 1; the labels say what runs."),
    "hookshot_start_time_seconds": Metric("gauge", (), "When the server started, unix time."),
    "hookshot_ready": Metric("gauge", (), "1 while deploys are accepted, 0 while starting or draining."),
    "hookshot_service_failing": Metric("gauge", ("service",), "1 while the last deployment that ran did not succeed."),
    "hookshot_service_last_deployment_timestamp_seconds": Metric("gauge", ("service",), "When the last deployment ended, unix time."),
    "hookshot_service_locked": Metric("gauge", ("service",), "1 while the service is locked: deploys of it are refused."),
    "hookshot_workers_alive": Metric("gauge", (), "Workers that live."),
    "hookshot_workers_configured": Metric("gauge", (), "Workers that ought to live (server.worker_threads)."),
    "hookshot_database_size_bytes": Metric("gauge", (), "What the database takes on disk, its write-ahead log included."),
    "hookshot_deployment_logs_bytes": Metric("gauge", (), "What the logs of deployments take on disk; looked at every five minutes."),
    "hookshot_disk_free_bytes": Metric("gauge", (), "What may still be written on the data directory's file system."),
    "hookshot_connections": Metric("gauge", (), "Connections of clients that are open."),
    "hookshot_event_streams": Metric("gauge", (), "Readers of GET /events."),
    "hookshot_event_streams_dropped_total": Metric("counter", (), "Readers of GET /events that were dropped: too slow, or not allowed to read any more."),
    "hookshot_auth_failures_total": Metric("counter", ("reason",), "Requests refused for who sent them: missing, wrong or stale signature, no_timestamp, other_service, token, address."),
    "hookshot_rate_limited_total": Metric("counter", (), "Requests refused by security.rate_limit."),
    "hookshot_reloads_total": Metric("counter", ("outcome",), "Reloads of the configuration: succeeded, failed."),
    "hookshot_config_last_reload_successful": Metric("gauge", (), "1 if the configuration in force is the one in the files, as far as the last reload says."),
    "hookshot_config_last_reload_success_timestamp_seconds": Metric("gauge", (), "When the configuration in force was read, unix time."),
    "hookshot_secrets_last_reload_successful": Metric("gauge", (), "0 while secrets could not be read again by secrets.reload_interval; the old ones are in force."),
    "hookshot_notifications_total": Metric("counter", ("channel", "outcome"), "Attempts to send a notice: delivered, retried, refused, expired."),
    "hookshot_notifications_pending": Metric("gauge", ("channel",), "Notices in the outbox."),
    "hookshot_log_lines_lost_total": Metric("counter", (), "Lines of the log that could not be written."),
    "hookshot_internal_errors_total": Metric("counter", (), "Bugs that reached a boundary; the log has their traces."),
    # Of every process, as client libraries name them; where there is /proc.
    "process_cpu_seconds_total": Metric("counter", (), "Processor time used, user and system."),
    "process_open_fds": Metric("gauge", (), "Descriptors that are open."),
    "process_max_fds": Metric("gauge", (), "Descriptors that may be open."),
    "process_resident_memory_bytes": Metric("gauge", (), "Memory in use."),
    "process_virtual_memory_bytes": Metric("gauge", (), "Address space in use."),
    "process_start_time_seconds": Metric("gauge", (), "When the process started, unix time."),
    "process_threads": Metric("gauge", (), "Threads."),
}

# A metric's name, the values of its labels, and what to add to a counter, to observe in a histogram, or what a gauge says.
Sample = tuple[str, tuple[str, ...], float]
# What is kept of a sample's series: the number and the sum in one bucket (the index of its bound; 0 for a counter).
Tally = tuple[str, tuple[str, ...], int, int, float]


def tally_move(after: Deployment, reason: str) -> list[Sample]:
    """Return what a deployment's move counts for."""
    service = after.service
    if after.state is State.ROLLING_BACK:
        why = "interrupted" if reason == INTERRUPTED else after.failure_stage
        return [("rollback_total", (service, why if why in _ROLLBACK_REASONS else OTHER), 1)]
    if not after.is_terminal:
        return []
    durations = {"total": after.duration_ms, "queue": after.queue_ms, "deploy": after.deploy_ms, "healthcheck": after.healthcheck_ms,
                 "rollback": after.rollback_ms}
    return [("deployment_duration_seconds", (service, phase), spent_ms / 1000) for phase, spent_ms in durations.items() if spent_ms is not None]


def tally_result(service: str, result: Result) -> list[Sample]:
    """Return what one attempt of a command or probe counts for."""
    samples: list[Sample] = []
    if result.status != "not_started":
        samples.append(("command_execution_duration_seconds", (service, result.phase, result.name), result.duration_ms / 1000))
    if result.phase is Phase.HEALTHCHECK and not result.is_ok:
        samples.append(("healthcheck_failures_total", (service,), 1))
    return samples


def bucket_index(name: str, value: float) -> int:
    """Return the index of the bucket that a value falls into; behind the last bound lies +Inf."""
    return bisect.bisect_left(METRICS[name].bounds, value)


# Exemplars by bucket: deploy_id, value, unix time in seconds.
_Exemplars = Mapping[int, tuple[str, float, float]]
_NO_TEXTS: tuple[bytes | None, bytes | None] = (None, None)


class _Series:
    """The samples of one metric with one set of labels, and its two texts (plain, OpenMetrics) as long as they are true."""

    __slots__ = ("template", "total", "counts", "exemplars", "texts")

    def __init__(self, name: str, labels: tuple[str, ...]):
        self.template = _template_of(name, labels)
        # Of a counter or gauge: its value. Of a histogram: the sum of what was observed.
        self.total = 0.0
        self.counts = [0] * (len(METRICS[name].bounds) + 1 if METRICS[name].bounds else 0)
        self.exemplars: dict[int, tuple[str, float, float]] = {}
        self.texts = _NO_TEXTS


class _Copy(NamedTuple):
    """What a series said at one moment."""

    series: _Series
    total: float
    counts: tuple[int, ...]
    exemplars: _Exemplars


class Metrics:
    """The samples. Any thread; the lock is held for a few lines, and never while text is made."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._series: dict[tuple[str, tuple[str, ...]], _Series] = {}
        # The counter and the histogram of requests of one kind, found at once: there may be tens of thousands a second.
        self._requests: dict[tuple[str, str, int], tuple[_Series, _Series]] = {}

    def add(self, name: str, labels: tuple[str, ...], amount: float, exemplar: tuple[str, float] | None = None) -> None:
        """Add to a counter, or observe in a histogram; `exemplar`: a deploy_id and when (unix seconds)."""
        bounds = METRICS[name].bounds
        with self._lock:
            series = self._find(name, labels)
            series.total += amount
            if bounds:
                index = bucket_index(name, amount)
                series.counts[index] += 1
                if exemplar:
                    series.exemplars[index] = (exemplar[0], amount, exemplar[1])
            series.texts = _NO_TEXTS

    def _find(self, name: str, labels: tuple[str, ...]) -> _Series:
        """Return a series, a new one if need be. The caller holds the lock."""
        series = self._series.get((name, labels))
        if series is None:
            series = self._series[name, labels] = _Series(name, labels)
        return series

    def count_request(self, method: str, path: str, status: int, seconds: float) -> None:
        """Count an HTTP request; `path` is a route's pattern."""
        kind = method, path, status
        with self._lock:
            found = self._requests.get(kind)
            if found is None:
                found = self._requests[kind] = (self._find("http_requests_total", (method, path, str(status))),
                                                self._find("http_request_duration_seconds", (method, path)))
            counter, latency = found
            counter.total += 1
            latency.total += seconds
            latency.counts[bisect.bisect_left(_REQUEST_BOUNDS, seconds)] += 1
            counter.texts = latency.texts = _NO_TEXTS

    def put(self, name: str, labels: tuple[str, ...], value: float) -> None:
        """Have a gauge say `value` from now on."""
        with self._lock:
            series = self._find(name, labels)
            series.total, series.texts = value, _NO_TEXTS

    def begin(self, name: str, labels: tuple[str, ...]) -> None:
        """Have a counter or gauge say 0 if it says nothing yet: what is absent until it first counts has no increase."""
        with self._lock:
            self._find(name, labels)

    def expect(self, services: Iterable[str], channels: Iterable[str]) -> None:
        """Begin every counter whose labels are known beforehand, so that its first count is an increase."""
        for service in services:
            for status in COUNT_OF_STATE.values():
                self.begin("deployment_total", (service, status))
            for reason in _ROLLBACK_REASONS:
                self.begin("rollback_total", (service, reason))
            self.begin("healthcheck_failures_total", (service,))
            self.begin("hookshot_service_failing", (service,))
        for channel, outcome in itertools.product(channels, NOTICE_OUTCOMES):
            self.begin("hookshot_notifications_total", (channel, outcome))
        for name, words in (("hookshot_auth_failures_total", AUTH_REASONS), ("hookshot_reloads_total", ("succeeded", "failed"))):
            for word in words:
                self.begin(name, (word,))
        for name in ("hookshot_rate_limited_total", "hookshot_internal_errors_total", "hookshot_event_streams_dropped_total"):
            self.begin(name, ())

    def restore(self, tallies: Iterable[Tally]) -> None:
        """Go on from what was counted before the restart."""
        for name, labels, bucket, number, total in tallies:
            if name not in METRICS or len(labels) != len(METRICS[name].labels):
                continue  # another version counted it
            with self._lock:
                series = self._find(name, labels)
                series.total += total
                if series.counts:
                    series.counts[min(bucket, len(series.counts) - 1)] += number

    def observe(self, event: Event) -> None:
        """Count an event."""
        if isinstance(event, Refused):  # first, because of floods
            if event.reason:
                self.add("hookshot_auth_failures_total", (event.reason,), 1)
            elif event.code == ERRORS["rate_limited"].code:
                self.add("hookshot_rate_limited_total", (), 1)
        elif isinstance(event, Moved):
            self._observe_move(event)
        elif isinstance(event, CommandEnded):
            for name, labels, amount in tally_result(event.deployment.service, event.result):
                self.add(name, labels, amount)
        elif isinstance(event, Notified):
            self.add("hookshot_notifications_total", (event.channel, event.outcome), 1)
        elif isinstance(event, Broken):
            self.add("hookshot_internal_errors_total", (), 1)
        elif isinstance(event, Reloaded):
            self.add("hookshot_reloads_total", ("succeeded" if event.is_taken else "failed",), 1)
            self.put("hookshot_config_last_reload_successful", (), int(event.is_taken))
            if event.is_taken:
                self.put("hookshot_config_last_reload_success_timestamp_seconds", (), event.at_ms / 1000)

    def _observe_move(self, event: Moved) -> None:
        deployment = event.deployment
        at_s = (deployment.completed_ms or 0) / 1000
        exemplar = (deployment.deploy_id, at_s) if len("deploy_id" + deployment.deploy_id) <= _MAX_EXEMPLAR_CHARS else None
        for name, labels, amount in tally_move(deployment, event.reason):
            self.add(name, labels, amount, exemplar if METRICS[name].bounds else None)
        if deployment.is_terminal:
            self.add("deployment_total", (deployment.service, COUNT_OF_STATE[deployment.state]), 1)
            self.put("hookshot_service_last_deployment_timestamp_seconds", (deployment.service,), at_s)
            if deployment.state is not State.CANCELLED:
                self.put("hookshot_service_failing", (deployment.service,), int(deployment.state is not State.SUCCEEDED))

    def render(self, extra: Iterable[Sample], *, is_openmetrics: bool) -> bytes:
        """Return every sample, `extra` (what is true at this moment only) among them, as Prometheus text or as OpenMetrics 1.0."""
        with self._lock:
            found = [(key[0], series.texts[is_openmetrics] or _Copy(series, series.total, tuple(series.counts), dict(series.exemplars)))
                     for key, series in self._series.items()]
        families: dict[str, list[bytes]] = {name: [] for name in METRICS}
        fresh = []
        for name, text in found:
            if isinstance(text, _Copy):
                copy, text = text, _render_samples(text.series.template, text.total, text.counts, text.exemplars if is_openmetrics else {})
                fresh.append((copy, text))
            families[name].append(text)
        self._keep(fresh, is_openmetrics)
        for name, labels, value in extra:
            families[name].append(_render_samples(_template_of(name, labels), value, (), {}))
        # Put together once: in a thread of its own, every copy of some MB costs milliseconds of page faults.
        parts = [part for name, texts in families.items() if texts for part in (_render_head(name, is_openmetrics), *texts)]
        return b"".join((*parts, b"# EOF\n" * is_openmetrics))

    def _keep(self, fresh: Iterable[tuple[_Copy, bytes]], is_openmetrics: bool) -> None:
        """Keep texts for the next time, unless something was counted meanwhile."""
        with self._lock:
            for (series, total, counts, exemplars), text in fresh:
                if series.total == total and tuple(series.counts) == counts:
                    plain, rich = series.texts
                    # Without exemplars both formats write samples alike.
                    series.texts = (text, text) if not exemplars else (plain, text) if is_openmetrics else (text, rich)


def _render_head(name: str, is_openmetrics: bool) -> bytes:
    metric = METRICS[name]
    if not is_openmetrics:
        return f"# HELP {name} {metric.doc}\n# TYPE {name} {metric.kind}\n".encode()
    # OpenMetrics 1.0: a counter's family has its name without _total, and a unit is the end of the family's name.
    family = name.removesuffix("_total") if metric.kind == "counter" else name
    unit = next((f"# UNIT {family} {unit}\n" for unit in ("seconds", "bytes") if family.endswith(f"_{unit}")), "")
    return f"# TYPE {family} {metric.kind}\n{unit}# HELP {family} {metric.doc}\n".encode()


def _template_of(name: str, labels: tuple[str, ...]) -> bytes:
    """Return the lines of a series with %d for each bucket's count, %b for value or sum, %d for the number; filled in at once."""
    metric = METRICS[name]
    pairs = ",".join([f'{label}="{_escape_label(value)}"' for label, value in zip(metric.labels, labels, strict=True)]).replace("%", "%%")
    if not metric.bounds:
        return (f"{name}{{{pairs}}} %b\n" if pairs else f"{name} %b\n").encode()
    buckets = "".join([f'{name}_bucket{{{pairs},le="{bound}"}} %d\n' for bound in (*metric.bounds, "+Inf")])
    return f"{buckets}{name}_sum{{{pairs}}} %b\n{name}_count{{{pairs}}} %d\n".encode()


def _render_samples(template: bytes, total: float, counts: Sequence[int], exemplars: _Exemplars) -> bytes:
    if not counts:
        return template % _render_number(total)
    running = tuple(itertools.accumulate(counts))
    text = template % (*running, _render_number(total), running[-1])
    if not exemplars:
        return text
    lines = text.split(b"\n")
    for index, (deploy_id, value, at_s) in exemplars.items():
        lines[index] += b' # {deploy_id="%b"} %b %.3f' % (deploy_id.encode(), _render_number(value), at_s)
    return b"\n".join(lines)


def _render_number(value: float) -> bytes:
    return b"%d" % value if value == int(value) else repr(round(value, 6)).encode()


def _escape_label(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


METRICS_TYPES = {False: "text/plain; version=0.0.4; charset=utf-8", True: "application/openmetrics-text; version=1.0.0; charset=utf-8"}


def wants_openmetrics(accept: str) -> bool:
    """Return whether an Accept header asks for OpenMetrics, and no less than for plain text (RFC 9110, 12.5.1)."""
    weights: dict[str, float] = {}
    for element in accept.lower().split(","):
        media_type, *parameters = [part.strip().replace(" ", "") for part in element.split(";")]
        weight = next((part[2:] for part in parameters if part.startswith("q=")), "1")
        is_known = "version=1.0.0" in parameters or not any(part.startswith("version=") for part in parameters) \
            or media_type != "application/openmetrics-text"
        if is_known and re.fullmatch(r"0(\.\d{0,3})?|1(\.0{0,3})?", weight, re.ASCII):
            weights[media_type] = max(weights.get(media_type, 0.0), float(weight))
    asked = weights.get("application/openmetrics-text", 0.0)
    plain = next((weights[media_range] for media_range in ("text/plain", "text/*", "*/*") if media_range in weights), 0.0)
    return asked > 0 and asked >= plain


# === 11. WORLD ========================================================================================================
# The wall clock, random ids, accounts, private files and the process table.
#
# 1. Instants come from the wall clock (milliseconds), durations from the monotonic one (seconds).
# 2. What we create is ours alone: files 0600, folders 0700.
# 3. A process is known by pid and start time together; a pid alone may long be another program.


def now_ms() -> int:
    """Return the wall clock, unix milliseconds."""
    return time.time_ns() // 1_000_000


def new_deploy_id(at_ms: int) -> str:
    """Return an id that sorts by time and that people can read out: 20261123-131502-9f3c21ab."""
    return time.strftime("%Y%m%d-%H%M%S-", time.gmtime(at_ms // 1000)) + secrets.token_hex(4)


def with_jitter(seconds: float) -> float:
    """Return between half of it and all of it, by chance: those who failed together shall not come again together."""
    return seconds * (1 + secrets.randbelow(1001) / 1000) / 2


def new_key() -> str:
    """Return a key of 32 random bytes in hex."""
    return secrets.token_hex(32)


_request_ids = map(f"{secrets.token_hex(4)}{{:08x}}".format, itertools.count(secrets.randbits(16)))


def new_request_id() -> str:
    """Return 16 hex digits that no other request of this process has, and hardly one of another process."""
    return next(_request_ids)


def new_message_id() -> str:
    """Return a fresh id of a signed message (Standard Webhooks): no full stop in it, and no one can guess it."""
    return f"msg_{secrets.token_hex(12)}"


def make_private_folder(path: str) -> None:
    """Create a folder (and its parents) with mode 0700; close an existing one of ours to others."""
    os.makedirs(path, mode=0o700, exist_ok=True)
    status = os.stat(path)
    if status.st_uid == os.geteuid() and stat.S_IMODE(status.st_mode) & 0o077:
        os.chmod(path, 0o700)


def make_log_folder(path: str) -> None:
    """Create a folder that its group may read, because logs are shipped by others; leave an existing one as it is."""
    if not os.path.isdir(path):
        os.makedirs(path, exist_ok=True)
        os.chmod(path, 0o750)


def write_private_file(path: str, text: str, *, mode: int = 0o600) -> None:
    """Create a file that must not exist yet; OSError says why it cannot be."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(descriptor)


def is_open_to_others(path: str) -> bool:
    """Return whether every user of this host may read a file."""
    try:
        return bool(os.stat(path).st_mode & stat.S_IROTH)
    except OSError:
        return False


def find_writers(path: str) -> Iterator[tuple[str, bool]]:
    """Yield (who else may change a file or put another in its place and what to do, whether it is the file that everyone may change).

    "Else" is whoever is neither root nor this user. Links are followed; the folders of a link and of what it leads to count.
    """
    real = os.path.realpath(path)
    for name in dict.fromkeys((real, os.path.dirname(real), os.path.dirname(os.path.abspath(path)))):
        status = os.stat(name)
        mode = f"mode {stat.S_IMODE(status.st_mode):04o}"
        # Sticky, as /tmp: only a file's owner may replace it there.
        if status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
            yield f"{name} can be changed by every user of this host ({mode}); run chmod o-w on it", name == real
        elif status.st_mode & stat.S_IWGRP and status.st_gid not in (0, os.getegid()) and not status.st_mode & stat.S_ISVTX:
            yield f"{name} can be changed by group {status.st_gid} ({mode}); run chmod g-w on it", False
        elif status.st_uid not in (0, os.geteuid()):
            yield f"{name} belongs to user {status.st_uid}, who can change it; give it to root or to the server's user {os.geteuid()}", False


def read_text(path: str, limit_bytes: int = 4 << 20) -> str:
    """Return a UTF-8 file of bounded size; OSError or ValueError say why not."""
    with open(path, "rb") as file:
        content = file.read(limit_bytes + 1)
    if len(content) > limit_bytes:
        raise ValueError(f"is larger than {render_size(limit_bytes)}")
    return content.decode("utf-8-sig")


def replace_private_file(path: str, text: str) -> None:
    """Put a file in place of what is there: a reader finds all of one or of the other. A power cut may undo it; OSError says why not."""
    beside = f"{path}.new"
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(beside, path)


class FileMark(NamedTuple):
    """What tells one content of a file from another: which file it is, its size, and when it was last changed (unix ns)."""

    device: int
    inode: int
    size: int
    changed_ns: int


def read_mark(path: str) -> FileMark | None:
    """Return the mark of a file, None if there is none to be seen. Not of its mtime, which `cp -p` sets to what it was elsewhere."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return FileMark(status.st_dev, status.st_ino, status.st_size, status.st_ctime_ns)


def await_change(path: str, mark: FileMark | None, deadline_s: float) -> None:
    """Wait until a file has another mark, at most until `deadline_s` (monotonic)."""
    while read_mark(path) == mark and time.monotonic() < deadline_s:
        time.sleep(0.01)


DEFAULT_CONFIG = "/etc/hookshot/config.toml"
# What the folders of a unit (systemd.exec(5)) hold for a config.toml that does not say: variable, key, file in the folder.
UNIT_FOLDERS = {"CONFIGURATION_DIRECTORY": ("secrets.secrets_file", "secrets"), "LOGS_DIRECTORY": ("logging.directory", ""),
                "STATE_DIRECTORY": ("storage.data_dir", "")}


def _own_folder(kind: str, default: str) -> str:
    """Return where hookshot's files of one kind are for an ordinary user (XDG base directories; a relative path counts as none)."""
    base = os.environ.get(f"XDG_{kind}_HOME", "")
    return os.path.join(base if base.startswith("/") else os.path.expanduser(default), "hookshot")


def find_config() -> str:
    """Return the config.toml of who names none: in the unit's ConfigurationDirectory=, an ordinary user's own if it is there, else the host's."""
    if folder := os.environ.get("CONFIGURATION_DIRECTORY", "").partition(":")[0]:
        return os.path.join(folder, "config.toml")
    own = os.path.join(_own_folder("CONFIG", "~/.config"), "config.toml")
    return own if os.geteuid() and os.path.isfile(own) else DEFAULT_CONFIG


def default_places(config_path: str) -> dict[str, str]:
    """Return what holds for paths that a config.toml does not name: the directories of the unit (systemd.exec(5)), or of a user for his own file."""
    folder, places = os.path.dirname(config_path), {}
    if folder == _own_folder("CONFIG", "~/.config"):
        places = {"storage.data_dir": _own_folder("STATE", "~/.local/state"), "secrets.secrets_file": os.path.join(folder, "secrets")}
    for variable, (key, file) in UNIT_FOLDERS.items():
        if path := os.environ.get(variable, "").partition(":")[0]:
            places[key] = os.path.join(path, file) if file else path
    return places


class FolderLock:
    """The kernel's lock on a data directory: held while this process lives, gone with it, however it ends."""

    # Whoever only looks (holder) has it for microseconds; that keeps nobody from starting.
    _LOOK_S = 0.2

    def __init__(self, folder: str):
        self.path = os.path.join(folder, "hookshot.lock")
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        deadline = time.monotonic() + self._LOOK_S
        while not (is_locked := self._try_lock()) and time.monotonic() < deadline:
            time.sleep(0.01)
        if not is_locked:
            holder = os.pread(self._descriptor, 20, 0).decode("ascii", "replace").strip()
            os.close(self._descriptor)
            raise HookshotError("in_use", f"another hookshot (pid {holder or 'unknown'}) uses {folder}; stop it, or use another data_dir")
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)

    def _try_lock(self) -> bool:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        return False

    @staticmethod
    def holder(folder: str) -> str | None:
        """Return the pid of who holds the lock on a folder at this moment, "unknown" if it does not say; None if nobody does."""
        try:
            descriptor = os.open(os.path.join(folder, "hookshot.lock"), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return os.pread(descriptor, 20, 0).decode("ascii", "replace").strip() or "unknown"
        finally:
            os.close(descriptor)
        return None

    def release(self) -> None:
        """Let the next server in. The file stays: unlinking it would let two servers lock two files of one name."""
        os.close(self._descriptor)


def return_memory() -> None:
    """Give back to the system what compiling this module took: malloc keeps 10 MB of it, where there is no byte code."""
    with contextlib.suppress(ImportError, OSError, AttributeError):
        import ctypes  # may be missing; after the start nobody waits for it

        ctypes.CDLL(None).malloc_trim(0)


# prctl(2) and mlockall(2).
_PR_GET_DUMPABLE, _PR_SET_DUMPABLE = 3, 4
_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4


def _libc() -> Any:
    """Return the C library; raise ImportError where it cannot be called."""
    try:
        import ctypes  # may be missing, and takes a millisecond

        return ctypes.CDLL(None, use_errno=True)
    except (OSError, MemoryError) as error:  # a static build; a system that forbids ctypes what it needs
        raise ImportError(str(error)) from None


def protect_memory() -> None:
    """Keep what is in memory out of core dumps and away from other programs of the same user, as far as this system can.

    Children begin anew with their exec. So where the kernel can be asked, RLIMIT_CORE, which they would inherit, is left as it is.
    """
    try:
        if _libc().prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) == 0:
            return
    except (ImportError, AttributeError):  # the latter on macOS
        pass
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def lock_memory() -> None:
    """Keep this process's memory out of swap, where that can never fail later.

    Under a finite RLIMIT_MEMLOCK every new thread's stack would count, 8 MB each, and be refused beyond it. The limit does not
    hold for who has CAP_IPC_LOCK; what is in /proc does not tell that in a container, but a limit of 0 has the kernel say it.
    """
    try:
        libc, (soft, hard) = _libc(), resource.getrlimit(resource.RLIMIT_MEMLOCK)
        if soft != resource.RLIM_INFINITY:
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, hard))
        # ONFAULT: of a stack only what is used, so this costs no memory.
        libc.mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT)
        if soft != resource.RLIM_INFINITY:
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (soft, hard))
    except (ImportError, AttributeError, OSError, ValueError):
        pass


class Protection(NamedTuple):
    """What keeps a process's memory to itself, as the kernel says. None: it does not say, or not to this user."""

    dumps_core: bool | None
    is_dumpable: bool | None
    is_locked: bool | None

    def __str__(self) -> str:
        facts = ((self.dumps_core, "may dump core", "dumps no core"),
                 (self.is_dumpable, "can be read by other programs of its user", "cannot be read by other programs of its user"),
                 (self.is_locked, "is never swapped out", "may be swapped out"))
        return ", ".join(no if value is False else yes if value else f"perhaps {yes}" for value, yes, no in facts)


def read_protection(pid: int | None = None) -> Protection:
    """Return what protects the memory of a process, this one by default."""
    folder = f"/proc/{pid or 'self'}"
    is_dumpable = _is_dumpable(pid)
    core = _find_number(f"{folder}/limits", r"Max core file size +(\w+)")
    locked = _find_number(f"{folder}/status", r"VmLck:\s+(\d+) kB")
    if core is None and pid is None:
        core = str(resource.getrlimit(resource.RLIMIT_CORE)[0])
    dumps_core = False if core == "0" or is_dumpable is False else is_dumpable if core else None
    return Protection(dumps_core, is_dumpable, None if locked is None else locked != "0")


def _is_dumpable(pid: int | None) -> bool | None:
    if pid is None:
        with contextlib.suppress(ImportError, AttributeError):
            return _libc().prctl(_PR_GET_DUMPABLE, 0, 0, 0, 0) != 0
        return None
    with contextlib.suppress(OSError):
        # proc(5): the files of a process that is not dumpable belong to root. Of root's own they always do.
        owner = os.stat(f"/proc/{pid}").st_uid
        return os.stat(f"/proc/{pid}/environ").st_uid == owner if owner else None
    return None


def _find_number(path: str, pattern: str) -> str | None:
    with contextlib.suppress(OSError), open(path, encoding="utf-8") as file:
        match = re.search(pattern, file.read())
        return match[1] if match else None
    return None


def erase_variable(name: str) -> None:
    """Overwrite the value of a variable of this process's environment where /proc/PID/environ shows it: removing it leaves it there."""
    try:
        import ctypes  # may be missing

        libc = _libc()
        libc.getenv.restype = ctypes.c_void_p
        if address := libc.getenv(os.fsencode(name)):
            ctypes.memset(address, 0, len(ctypes.string_at(address)))
    except (ImportError, AttributeError):
        pass


def is_clock_synchronised() -> bool | None:
    """Return what the kernel was told of the clock by whoever keeps it (adjtimex(2), asked only), or None if it does not say."""
    with contextlib.suppress(ImportError, AttributeError):
        import ctypes

        state = _libc().adjtimex(ctypes.create_string_buffer(512))  # struct timex has 208 bytes
        return None if state < 0 else state != 5
    return None


def file_system_of(path: str) -> str | None:
    """Return the type of the file system that a path lies on, as /proc/self/mountinfo names it, or None."""
    found, device = None, os.stat(path).st_dev
    with contextlib.suppress(OSError), open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            mount, _, rest = line.partition(" - ")
            if mount.split()[2] == f"{os.major(device)}:{os.minor(device)}":
                found = rest.split()[0]
    return found


def find_listener(port: int) -> str | None:
    """Return the name and pid of who listens on a TCP port, as far as /proc shows it to this user."""
    sockets = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError), open(table, encoding="utf-8") as file:
            rows = [line.split() for line in file]
            sockets |= {f"socket:[{row[9]}]" for row in rows if row[3] == "0A" and row[1].endswith(f":{port:04X}")}
    for process in list_processes() if sockets else ():
        with contextlib.suppress(OSError):
            if any(os.readlink(entry.path) in sockets for entry in os.scandir(f"/proc/{process.pid}/fd")):
                with open(f"/proc/{process.pid}/comm", encoding="utf-8", errors="replace") as file:
                    return f"{file.read().strip()} (pid {process.pid})"
    return None


def read_file_limit(pid: int) -> int | None:
    """Return how many descriptors a process may have open, or None if that cannot be known or has no limit."""
    limit = _find_number(f"/proc/{pid}/limits", r"Max open files +(\d+)")
    return None if limit is None else int(limit)


def read_unit(pid: int) -> str | None:
    """Return the systemd service that a process belongs to, by its control group: the innermost, as a user's own manager is one too."""
    return _find_number(f"/proc/{pid}/cgroup", r"(?s).*/([^/\n]+\.service)[/\n]")


def owner_of(path: str) -> Account | None:
    """Return the account that a file or, by its folder in /proc, a process belongs to; None if there is none."""
    with contextlib.suppress(OSError, KeyError):
        return find_account(pwd.getpwuid(os.stat(path).st_uid).pw_name, None)
    return None


def is_of_another(path: str, pid: int) -> bool:
    """Return whether a file belongs to another user than a process, as far as /proc tells."""
    with contextlib.suppress(OSError):
        return os.stat(path).st_uid != os.stat(f"/proc/{pid}").st_uid
    return False


def become(account: Account) -> bool:
    """Turn this process from root's into another account's, for good; return whether it was root's and is not any more.

    Where Python itself is closed to that account, no module can be imported from here on, not even a codec.
    """
    if os.geteuid() != 0 or account.uid == 0:
        return False
    os.setgroups(account.groups)
    os.setgid(account.gid)
    os.setuid(account.uid)
    # A change of user has the kernel forget it.
    protect_memory()
    return True


def find_closed(path: str, account: Account) -> str | None:
    """Return the first folder on the way to a program or folder, or itself, that its mode closes to an account; ACLs are not looked at."""
    real = os.path.realpath(path)
    steps = [real[:end] or "/" for end, letter in enumerate(real) if letter == "/"] + [real]
    for step in steps:
        status = os.stat(step)
        bit = stat.S_IXUSR if account.uid == status.st_uid else stat.S_IXGRP if status.st_gid in account.groups else stat.S_IXOTH
        if not status.st_mode & (0o111 if account.uid == 0 else bit):
            return step
    return None


def free_bytes(path: str) -> int:
    """Return what an ordinary user may still write on the file system of `path`."""
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


def name_of_user(uid: int) -> str:
    """Return the name of a user, or the number of one that has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def own_user() -> str:
    """Return the name of the user that this process runs as, or the number of one that has none."""
    return name_of_user(os.geteuid())


def find_account(user: str | None, group: str | None) -> Account | None:
    """Return the identity for a service's user and group, or None for the server's own; ValueError if unknown."""
    if user is None and group is None:
        return None
    import grp  # only services with a user or group of their own need it

    try:
        entry = pwd.getpwnam(user) if user else pwd.getpwuid(os.geteuid())
    except KeyError:
        raise ValueError(f"user {user} does not exist on this host") from None
    try:
        gid = grp.getgrnam(group).gr_gid if group else entry.pw_gid
    except KeyError:
        raise ValueError(f"group {group} does not exist on this host") from None
    return Account(entry.pw_name, entry.pw_uid, gid, tuple(os.getgrouplist(entry.pw_name, gid)), entry.pw_dir, entry.pw_shell or "/bin/sh")


@functools.cache
def _boot_id() -> str:
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id", encoding="utf-8") as file:
        return file.read(8)
    return ""


class ProcessStat(NamedTuple):
    """What /proc says of a process: its group, when it started (clock ticks since boot), and whether it still runs."""

    pid: int
    pgid: int
    started_ticks: int
    is_alive: bool


# An exec takes milliseconds, on a loaded host perhaps a second; a pid comes round again only after thousands of forks.
_BIRTH_TOLERANCE_S = 2


class OwnFigures(NamedTuple):
    """What /proc says of this process: seconds, bytes, numbers."""

    cpu_s: float
    threads: int
    virtual_bytes: int
    resident_bytes: int
    started_s: float
    descriptors: int
    max_descriptors: int


def read_own_figures() -> OwnFigures | None:
    """Return the figures of this process, or None where there is no /proc."""
    ticks, page = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
    try:
        with open("/proc/self/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        with open("/proc/stat", "rb") as file:
            booted_s = next(int(line.split()[1]) for line in file if line.startswith(b"btime "))
        descriptors = len(os.listdir("/proc/self/fd"))
    except (OSError, StopIteration):
        return None
    # proc_pid_stat(5), counted from the state: utime, stime, num_threads, starttime, vsize, rss.
    return OwnFigures((int(fields[11]) + int(fields[12])) / ticks, int(fields[17]), int(fields[20]), int(fields[21]) * page,
                      booted_s + int(fields[19]) / ticks, descriptors, resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def birth_now() -> str | None:
    """Return what tells a process started just now from any other with its pid: boot and time since boot.

    Asking /proc for the start time instead would cost more than all else that is recorded of a command.
    """
    boot_id = _boot_id()
    return f"{boot_id}-{int(time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf('SC_CLK_TCK'))}" if boot_id else None


def was_born(process: ProcessStat, birth: str | None) -> bool:
    """Return whether a process is the one that started at `birth`."""
    boot_id, _, ticks = (birth or "").partition("-")
    tolerance = _BIRTH_TOLERANCE_S * os.sysconf("SC_CLK_TCK")
    return bool(boot_id) and boot_id == _boot_id() and abs(process.started_ticks - int(ticks)) <= tolerance


def clock_reading() -> str | None:
    """Return what durations are measured with across restarts: the boot, and the milliseconds since (CLOCK_BOOTTIME)."""
    boot_id = _boot_id()
    return f"{boot_id}-{time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000}" if boot_id else None


def elapsed_ms(since: str | None, until: str | None, *, wall_ms: int) -> int:
    """Return the milliseconds from one clock reading to another; what the wall clock says where they are not of one boot."""
    (boot, _, begun), (same_boot, _, ended) = (since or "").partition("-"), (until or "").partition("-")
    # A wall clock that was put back gives 0, never less.
    return int(ended) - int(begun) if boot and boot == same_boot else max(0, wall_ms)


def read_process(pid: int) -> ProcessStat | None:
    """Return a process of this moment, or None if there is none (or no /proc)."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    # proc_pid_stat(5): after the name come state, ppid, pgrp; field 22 is the start time in ticks since boot.
    return ProcessStat(pid, int(fields[2]), int(fields[19]), fields[0] not in (b"Z", b"X"))


def list_processes() -> Iterator[ProcessStat]:
    """Yield every process that still runs; nothing where there is no /proc."""
    with contextlib.suppress(OSError):
        for name in os.listdir("/proc"):
            if name.isdecimal() and (process := read_process(int(name))) and process.is_alive:
                yield process


def read_environment(pid: int) -> dict[bytes, bytes]:
    """Return the environment a process was started with; empty if we may not look."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return dict(entry.partition(b"=")[::2] for entry in file.read().split(b"\0") if entry)
    except OSError:
        return {}


def signal_process(pid: int, number: int) -> None:
    """Send a signal to one process; OSError says why it cannot be. The caller knows that the pid is not another's by now."""
    os.kill(pid, number)


def is_group_alive(pgid: int) -> bool:
    """Return whether any process of a group still runs; zombies do not count."""
    if not os.path.isdir("/proc/self"):
        return signal_group(pgid, 0)
    return any(process.pgid == pgid for process in list_processes())


def signal_group(pgid: int, number: int) -> bool:
    """Send a signal to a process group; return whether anyone got it."""
    try:
        os.killpg(pgid, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


# From SIGTERM to SIGKILL. systemd waits 90 s; these processes have already overrun or outlived their deployment.
KILL_AFTER_S = 5.0


def end_groups(pgids: Iterable[int], *, kill_after_s: float = KILL_AFTER_S) -> None:
    """Send SIGTERM to the groups, SIGKILL to what is left of them after `kill_after_s`; nobody survives."""
    left = [pgid for pgid in pgids if signal_group(pgid, signal.SIGTERM)]
    deadline = time.monotonic() + kill_after_s
    pause = 0.005
    while left and time.monotonic() < deadline:
        time.sleep(pause)
        pause = min(0.1, pause * 2)
        left = [pgid for pgid in left if is_group_alive(pgid)]
    for pgid in left:
        signal_group(pgid, signal.SIGKILL)
    while any(is_group_alive(pgid) for pgid in left) and time.monotonic() < deadline + KILL_AFTER_S:
        time.sleep(0.01)


# === 12. LOG ==========================================================================================================
# The server's own lines on stderr and in files, JSON or for people, and the masking of secrets in everything that is kept.
#
# 1. Lines of threads never mix.
# 2. A log that cannot be written, or that nobody reads any more, stops nothing.
# 3. Control characters from outside are made visible before they reach a line.
# 4. A file that is full gives way to a new one between two lines; what cannot be written is counted, and told later.

LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}
_LEVEL_COLOURS = {"debug": "2", "info": "32", "warning": "33", "error": "31"}
# Shorter values are words of everyday text; masking them would make logs unreadable and hide nothing.
_MIN_MASKED_BYTES = 6
_MASK = b"***"
_LOG_PIECE_BYTES = 4096
_LINE_ENCODER = json.JSONEncoder(default=str)
# syslog(3).
_PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3}

# One name for each kind of line.
LOG_EVENTS: dict[str, str] = {
    "started": "the server listens",
    "memory": "what protects the server's memory, as the kernel says",
    "draining": "it shuts down; running deployments may end",
    "stopped": "it has ended",
    "recovery": "deployments were interrupted and will be recovered",
    "reloaded": "configuration, secrets and certificates were read again",
    "config_changed": "what a reload has changed, a line for each change",
    "reload_problem": "what is wrong with what was read again",
    "reload_failed": "what was read again is not taken; the old configuration stays",
    "restart_needed": "a change needs a restart to be in force",
    "secrets_reloaded": "secrets have changed",
    "secrets_failed": "secrets cannot be read; the old ones stay",
    "config_warning": "something in the configuration is worth a look",
    "deploy_accepted": "a deployment is on disk",
    "deploy_repeated": "a known deployment was asked for again",
    "deploy_moved": "a deployment has a new state (debug for Deploying and HealthChecking)",
    "command_ended": "a command or probe has ended (debug, or warning if it failed)",
    "record_waiting": "a deployment cannot be recorded yet: the disk is full or the database locked",
    "queue_unreadable": "the queue of deployments cannot be read",
    "control": "somebody asked to cancel, retry, roll back, lock or unlock; `outcome` says what came of it",
    "lock_expired": "the time of a lock is over",
    "request_refused": "a request was answered with an error",
    "requests_refused": "how many more of one kind were refused in a minute",
    "audit_head": "number and hash of the newest row of the audit, at start and once a day",
    "audit_failed": "rows of the audit cannot be written yet and are kept in memory, or are lost because the server ends",
    "proxy_not_believed": "a neighbour sends forwarding headers, and is no trusted proxy",
    "connections_exhausted": "no connection can be accepted",
    "answer_broken": "an answer broke off while it was sent",
    "stream_dropped": "a reader of GET /events was too slow, or may not read any more",
    "events_unreadable": "moves cannot be read for GET /events",
    "notice_delivered": "a notice was delivered (debug)",
    "notice_retried": "a notice could not be delivered and will be tried again",
    "notice_refused": "a notice was refused for good",
    "notice_expired": "a notice could not be delivered in time and is given up",
    "notices_failed": "the outbox cannot be worked on",
    "notices_dropped": "notices for a channel that is gone, or too many for one that takes none",
    "stuck": "a part of the server has stopped or the database does not answer; systemd's watchdog is not told that all is well",
    "housekeeping_failed": "keeping house failed and will be tried again",
    "log_lost": "how many lines could not be written before this one",
    "log_file_failed": "the file in logging.directory cannot be written",
    "bug": "a mistake of hookshot; `trace` says where",
}


class Masker:
    """Replaces the values of secrets by ***, also where they stand in base64, URL- or JSON-encoded. Immutable."""

    def __init__(self, values: Iterable[bytes] = ()):
        forms: set[bytes] = set()
        for value in values:
            if len(value) >= _MIN_MASKED_BYTES:
                forms |= {value, base64.b64encode(value).rstrip(b"="), urllib.parse.quote(value, safe="").encode(),
                          urllib.parse.quote_plus(value).encode(),
                          base64.urlsafe_b64encode(value).rstrip(b"="),
                          *(json.dumps(value.decode("utf-8", "replace"), ensure_ascii=is_ascii)[1:-1].encode() for is_ascii in (True, False))}
        # Longest first: a secret that contains another one is masked whole.
        self._forms = sorted(forms, key=len, reverse=True)

    def mask(self, content: bytes) -> bytes:
        """Return the content without any secret that lies whole in it."""
        for form in self._forms:
            if form in content:
                content = content.replace(form, _MASK)
        return content

    def mask_text(self, text: str) -> str:
        """Return the text without any secret that lies whole in it."""
        return self.mask(text.encode("utf-8", "replace")).decode("utf-8", "replace") if self._forms else text

    def safe_length(self, content: bytes) -> int:
        """Return how much of the end-to-be-continued content can be masked and let go: the rest may be the start of a secret."""
        safe = len(content)
        for form in self._forms:
            start = content.find(form[:1], max(0, len(content) - len(form) + 1))
            while 0 <= start < safe:
                if form.startswith(content[start:]):
                    safe = start
                start = content.find(form[:1], start + 1)
        # A secret that lies whole across that place stays whole.
        for form in self._forms:
            whole = content.find(form, max(0, safe - len(form) + 1), safe + len(form) - 1)
            safe = whole if whole >= 0 else safe
        return safe


class LogFiles(NamedTuple):
    """Where the log is kept besides stderr: hookshot.log in a directory, and the ones before it as hookshot.log.1, .2, ..."""

    directory: str
    max_size: int
    max_files: int


class _Style(NamedTuple):
    """How lines look. The journal adds its own time, and takes a priority from their beginning (sd-daemon(3))."""

    is_json: bool
    is_on_journal: bool = False
    is_on_terminal: bool = False
    is_coloured: bool = False

    def render(self, level: str, event: str, message: str, fields: Mapping[str, object], at_ms: int) -> bytes:
        """Return a line; it holds no line break but the one at its end."""
        moment = render_time(at_ms) or ""
        if self.is_json:
            time_field = {} if self.is_on_journal else {"timestamp": moment}
            line = _LINE_ENCODER.encode({**time_field, "level": level, "event": event, "message": message, **fields})
        else:
            # A terminal shows what happens now; a file may be read years later.
            moment = "" if self.is_on_journal else f"{moment[11:] if self.is_on_terminal else moment} "
            label = f"\x1b[{_LEVEL_COLOURS[level]}m{level.upper():7}\x1b[0m" if self.is_coloured else f"{level.upper():7}"
            extra = "".join(f" {name}={escape_controls(str(value))}" for name, value in fields.items())
            line = f"{moment}{label} {escape_controls(message)}{extra}"
        return f"{f'<{_PRIORITIES[level]}>' if self.is_on_journal else ''}{line}\n".encode("utf-8", "replace")


class _Stream:
    """Lines to a descriptor that others may share and nobody may read."""

    def __init__(self, descriptor: int):
        self._descriptor = descriptor
        self._out = _own_description(descriptor)
        self._poll = select.poll()
        self._poll.register(self._out, select.POLLOUT)
        # Whether the last line ended in the middle.
        self._is_cut = False
        self.lost, self.problem = 0, ""
        self.style = _Style(True)

    def set_up(self, *, is_json: bool) -> None:
        """Write in this style from now on."""
        is_on_journal = _is_journal(self._descriptor)
        self.style = _Style(is_json, is_on_journal, os.isatty(self._descriptor), not is_json and wants_colour(self._descriptor))

    def put(self, line: bytes) -> bool:
        """Write a line if that needs no waiting: whoever ought to read it may have stopped, and requests must not stop with him."""
        content = b"\n" * self._is_cut + line
        rest = content
        # A pipe that is ready takes as much as this at once (pipe(7), PIPE_BUF).
        with contextlib.suppress(OSError):
            while rest and self._poll.poll(0):
                rest = rest[os.write(self._out, rest[:_LOG_PIECE_BYTES]) :]
        if rest != content:
            self._is_cut = bool(rest) and len(rest) < len(line)
        return not rest


class _File:
    """Lines to a file of our own that gives way to a new one when it is full."""

    def __init__(self, files: LogFiles, *, is_json: bool):
        self.files, self.style = files, _Style(is_json)
        self.lost, self.problem = 0, ""
        self._path = os.path.join(files.directory, "hookshot.log")
        self._descriptor = -1

    def put(self, line: bytes) -> bool:
        """Append a whole line or nothing; `problem` says why nothing."""
        try:
            size = self._open()
            if size and size + len(line) > self.files.max_size:
                self._rotate()
                size = self._open()
            written = os.write(self._descriptor, line)
            if written < len(line):
                # A disk that is nearly full takes a part: a half line would be read as something else.
                os.ftruncate(self._descriptor, size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self.problem = f"{self._path} cannot be written: {error.strerror}"
            return False
        return True

    def close(self) -> None:
        """Close the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _open(self) -> int:
        """Return the size of the open file; it is opened anew if another program has renamed or removed it."""
        try:
            named = os.stat(self._path)
        except FileNotFoundError:
            named = None
        if self._descriptor >= 0:
            opened = os.fstat(self._descriptor)
            if named and (named.st_dev, named.st_ino) == (opened.st_dev, opened.st_ino):
                return opened.st_size
            self.close()
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        self._descriptor = os.open(self._path, flags, 0o640)
        if not named:
            # Whatever the umask: the group may be one that ships logs.
            os.fchmod(self._descriptor, 0o640)
        return os.fstat(self._descriptor).st_size

    def _rotate(self) -> None:
        """Move every file on by one, the oldest out."""
        self.close()
        oldest = self.files.max_files - 1
        for number in range(oldest, 0, -1):
            with contextlib.suppress(FileNotFoundError):
                os.replace(f"{self._path}.{number - 1}" if number > 1 else self._path, f"{self._path}.{number}")
        if not oldest:
            os.unlink(self._path)
        # Those of a time when more were kept.
        with contextlib.suppress(FileNotFoundError):
            for number in itertools.count(oldest + 1):
                os.unlink(f"{self._path}.{number}")


class Log:
    """Writes lines to one descriptor, and to files if there is a directory for them. Any thread."""

    def __init__(self, level: str = "info", style: str = "json", descriptor: int = 2):
        self._stream = _Stream(descriptor)
        self._file: _File | None = None
        self._lock = threading.Lock()
        self.lines_lost = 0
        self.set_up(level, style, Masker())

    def set_up(self, level: str, style: str, masker: Masker, files: LogFiles | None = None) -> None:
        """Write lines from now on from this level on, in this style, masked so, and to these files."""
        self.masker = masker
        self._threshold = LEVELS[level]
        with self._lock:
            self._stream.set_up(is_json=style == "json")
            if self._file and self._file.files != files:
                self._file.close()
                self._file = None
            if files and not self._file:
                self._file = _File(files, is_json=style == "json")
            elif self._file:
                self._file.style = _Style(style == "json")

    def shows(self, level: str) -> bool:
        """Return whether a line of this level is written."""
        return LEVELS[level] >= self._threshold

    def write(self, level: str, event: str, message: str, **fields: object) -> None:
        """Write one line; `event` is a row of LOG_EVENTS. Fields that are None are left out."""
        if not self.shows(level):
            return
        known = {name: value for name, value in fields.items() if value is not None}
        at_ms, file = now_ms(), self._file
        line = self.masker.mask(self._stream.style.render(level, event, message, known, at_ms))
        copy = file and (line if file.style == self._stream.style else self.masker.mask(file.style.render(level, event, message, known, at_ms)))
        with self._lock:
            self._put(self._stream, line, at_ms)
            # Another file may be in force by now.
            if copy and self._file is file and file:
                was_well = not file.lost
                self._put(file, copy, at_ms)
                if was_well and file.lost:
                    self._put(self._stream, self._stream.style.render("error", "log_file_failed", file.problem, {}, at_ms), at_ms)

    def _put(self, sink: _Stream | _File, line: bytes, at_ms: int) -> None:
        if sink.lost:
            told = sink.style.render("warning", "log_lost", f"lines of the log that could not be written: {sink.lost}", {}, at_ms)
            sink.lost = 0 if sink.put(told) else sink.lost
        if not sink.put(line):
            sink.lost += 1
            self.lines_lost += 1


def _is_journal(descriptor: int) -> bool:
    """Return whether a descriptor leads to the journal: JOURNAL_STREAM has its device and inode (systemd.exec(5))."""
    with contextlib.suppress(OSError):
        status = os.fstat(descriptor)
        return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
    return False


def _own_description(descriptor: int) -> int:
    """Return a descriptor for the same terminal or pipe that never waits; where there cannot be one, the same descriptor.

    Not by O_NONBLOCK on the given one: that would change it for every program that shares the terminal.
    """
    with contextlib.suppress(OSError):
        if os.isatty(descriptor) or stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            return os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    return descriptor


def wants_colour(descriptor: int) -> bool:
    """Return whether a descriptor is a terminal whose user has not said NO_COLOR (no-color.org)."""
    return os.isatty(descriptor) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


class RefusalThrottle:
    """Keeps floods out of the log: a few lines a minute for one reason and one address, then only their number. Any thread."""

    _LINES = 10
    _WINDOW_S = 60.0
    # What comes from further addresses shares one count.
    _MAX_SOURCES = 1000

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # (code, address or /64) -> [when its minute began, its first address, how many since]
        self._seen: dict[tuple[str, int | str | None], list[Any]] = {}

    def admit(self, code: str, address: Peer, now_s: float) -> bool:
        """Return whether this refusal may have a line of its own."""
        source = (code, bucket_of(address))
        with self._lock:
            window = self._seen.get(source)
            if not window:
                first = render_peer(address)
                if len(self._seen) >= self._MAX_SOURCES:
                    source, first = (code, "others"), "others"
                window = self._seen.setdefault(source, [now_s, first, 0])
            window[2] += 1
            return window[2] <= self._LINES

    def take(self, now_s: float) -> list[tuple[str, str, int]]:
        """Return (code, address, number) of the refusals that had no line, for each minute that is over."""
        with self._lock:
            over = [source for source, (began_s, _, _) in self._seen.items() if now_s - began_s >= self._WINDOW_S]
            windows = [(source[0], *self._seen.pop(source)[1:]) for source in over]
        return [(code, first, number - self._LINES) for code, first, number in windows if number > self._LINES]


# What a night watch needs: accepted, begun, gone wrong, ended. The steps between are in the deployment's own log.
_LEVEL_OF_STATE = {State.FAILED: "error", State.ROLLBACK_FAILED: "error", State.ROLLED_BACK: "warning", State.CANCELLED: "warning",
                   State.ROLLING_BACK: "warning", State.DEPLOYING: "debug", State.HEALTH_CHECKING: "debug"}


def _log_accepted(log: Log, event: Accepted) -> None:
    deployment, trigger = event.deployment, event.trigger
    name, message = ("deploy_accepted", f"accepted {deployment.service} {deployment.image}") if event.created else \
        ("deploy_repeated", f"asked again for {deployment.service} {deployment.image}, which is {deployment.state}; nothing runs twice")
    log.write("info", name, message, deploy_id=deployment.deploy_id, service=deployment.service, image=deployment.image,
              request_id=trigger.request_id, address=trigger.address, key_id=trigger.key_id)


def _log_moved(log: Log, event: Moved) -> None:
    deployment, level = event.deployment, _LEVEL_OF_STATE.get(event.deployment.state, "info")
    if not log.shows(level):
        return
    log.write(level, "deploy_moved",
              f"{deployment.service}: {event.before} -> {deployment.state}{': ' if event.reason else ''}{event.reason}",
              deploy_id=deployment.deploy_id, service=deployment.service, status=deployment.state, error=deployment.error,
              duration_ms=deployment.duration_ms, request_id=deployment.trigger.request_id)


def _log_command_ended(log: Log, event: CommandEnded) -> None:
    deployment, result, level = event.deployment, event.result, "debug" if event.result.is_ok else "warning"
    if not log.shows(level):
        return
    said = f"{result.name} succeeded" if result.is_ok else result.explain()
    log.write(level, "command_ended",
              f"{deployment.service}: {result.phase} step {result.step}: {said}", deploy_id=deployment.deploy_id,
              service=deployment.service, phase=result.phase, step=result.step, attempt=result.attempt, status=result.status,
              exit_code=result.exit_code, signal=result.signal, duration_ms=result.duration_ms, request_id=deployment.trigger.request_id)


def _log_refused(log: Log, event: Refused) -> None:
    # What could not be read has neither method nor path.
    what = "" if event.method == "-" else f"{event.method} {event.path}: "
    log.write("warning", "request_refused", f"{what}{event.sentence}", request_id=event.request_id, address=render_peer(event.address),
              code=event.code)


def _log_controlled(log: Log, event: Controlled) -> None:
    trigger = event.trigger
    log.write("info" if event.outcome in ("done", "repeated") else "warning", "control", f"{event.action}: {event.message}", action=event.action,
              outcome=event.outcome, deploy_id=event.deploy_id, service=event.service, address=trigger.address, key_id=trigger.key_id,
              user_agent=trigger.user_agent, request_id=trigger.request_id)


def _log_broken(log: Log, event: Broken) -> None:
    try:
        import traceback  # only a bug needs it

        trace = "".join(traceback.format_exception(event.error))
    except OSError as error:  # no descriptor is free to read the module with
        trace = f"{event.error!r} (its trace cannot be made: {error.strerror})"
    log.write("error", "bug", f"{event.where}: {type(event.error).__name__}; please report it", request_id=event.request_id,
              deploy_id=event.deploy_id, trace=trace)


def _log_reloaded(log: Log, event: Reloaded) -> None:
    log.write(*(("info", "reloaded") if event.is_taken else ("error", "reload_failed")), event.message)


def _log_notified(log: Log, event: Notified) -> None:
    log.write(NOTICE_OUTCOMES[event.outcome], f"notice_{event.outcome}", event.message, channel=event.channel, deploy_id=event.deploy_id,
              request_id=event.request_id, message_id=event.message_id)


_LINES: dict[type, Callable[[Log, Any], None]] = {
    Accepted: _log_accepted, Moved: _log_moved, CommandEnded: _log_command_ended, Refused: _log_refused, Controlled: _log_controlled,
    Broken: _log_broken, Reloaded: _log_reloaded, Notified: _log_notified,
    Trouble: lambda log, event: log.write(event.level, event.event, event.message, deploy_id=event.deploy_id, request_id=event.request_id),
    Noted: lambda log, event: log.write("info", event.event, event.message),
}


def log_event(log: Log, event: Event) -> None:
    """Write the line of an event."""
    _LINES[type(event)](log, event)


# === 13. STORE ========================================================================================================
# Every SQL statement there is. Owns state.db and its writer.
#
# 1. One public method is one transaction; a durable one has reached the disk (synchronous=FULL) when it returns.
# 2. Writers that wait while another commits share the next commit: one fsync serves them all, and a statement that
#    fails undoes its own savepoint only.
# 3. A move is compare-and-set on the state; a count other than one row is a bug that raises.
# 4. STORE returns facts and raises `storage` or `disk_full`; it never logs, publishes or sleeps.

_ACTIVE_SQL = ", ".join(f"'{state}'" for state in State if state in ACTIVE)
_STATES_SQL = ", ".join(f"'{state}'" for state in State)

# `completed_ms IS NULL` is how a statement names what has not ended: it makes the small partial indexes apply. `seq`
# needs no AUTOINCREMENT: the newest deployment is always within its service's retention, so no number comes twice.
MIGRATIONS: tuple[str, ...] = (
    f"""
    CREATE TABLE deployments (
        seq INTEGER PRIMARY KEY, deploy_id TEXT NOT NULL UNIQUE, service TEXT NOT NULL,
        state TEXT NOT NULL CHECK (state IN ({_STATES_SQL})), image TEXT NOT NULL, previous_image TEXT,
        metadata TEXT NOT NULL, env TEXT NOT NULL, trigger TEXT NOT NULL, digest TEXT NOT NULL, idempotency_key TEXT,
        queued_ms INTEGER NOT NULL, started_ms INTEGER, completed_ms INTEGER, duration_ms INTEGER, deploy_ms INTEGER,
        healthcheck_ms INTEGER, rollback_ms INTEGER, phase TEXT, step INTEGER NOT NULL DEFAULT 0,
        steps_total INTEGER NOT NULL DEFAULT 0, current_step TEXT, command_no INTEGER NOT NULL DEFAULT 0, pid INTEGER,
        pid_started TEXT, error TEXT, failure_stage TEXT, rollback_reason TEXT, verdict TEXT,
        recoveries INTEGER NOT NULL DEFAULT 0);
    CREATE UNIQUE INDEX deployments_by_key ON deployments (idempotency_key) WHERE idempotency_key IS NOT NULL;
    CREATE INDEX deployments_open ON deployments (state, service) WHERE completed_ms IS NULL;
    CREATE INDEX deployments_ended ON deployments (service, state) WHERE completed_ms IS NOT NULL;
    CREATE TABLE moves (
        seq INTEGER NOT NULL REFERENCES deployments ON DELETE CASCADE, n INTEGER NOT NULL, state TEXT NOT NULL,
        at_ms INTEGER NOT NULL, reason TEXT NOT NULL, PRIMARY KEY (seq, n)) WITHOUT ROWID;
    CREATE TABLE commands (
        seq INTEGER NOT NULL REFERENCES deployments ON DELETE CASCADE, n INTEGER NOT NULL, phase TEXT NOT NULL,
        step INTEGER NOT NULL, name TEXT NOT NULL, command TEXT NOT NULL, attempt INTEGER NOT NULL, status TEXT NOT NULL,
        exit_code INTEGER, signal INTEGER, started_ms INTEGER NOT NULL, duration_ms INTEGER NOT NULL, stdout TEXT NOT NULL,
        stderr TEXT NOT NULL, note TEXT NOT NULL, critical INTEGER NOT NULL, PRIMARY KEY (seq, n));
    CREATE TABLE services (
        name TEXT PRIMARY KEY, current_image TEXT, last_deploy_id TEXT, last_status TEXT, last_completed_ms INTEGER,
        health TEXT NOT NULL DEFAULT 'Unknown', succeeded INTEGER NOT NULL DEFAULT 0, failed INTEGER NOT NULL DEFAULT 0,
        rolled_back INTEGER NOT NULL DEFAULT 0, rollback_failed INTEGER NOT NULL DEFAULT 0,
        cancelled INTEGER NOT NULL DEFAULT 0, duration_ms INTEGER NOT NULL DEFAULT 0, last_failure_ms INTEGER) WITHOUT ROWID;
    """,
    # Signed messages that were accepted; they may outlast their deployments, so that none is carried out twice. Ids and
    # keys are a service's own: those who may deploy one service must not block, or learn of, what is sent to another.
    """
    CREATE TABLE messages (
        service TEXT NOT NULL, id TEXT NOT NULL, digest TEXT NOT NULL, deploy_id TEXT NOT NULL, expires_ms INTEGER NOT NULL,
        PRIMARY KEY (service, id)) WITHOUT ROWID;
    CREATE INDEX messages_by_expiry ON messages (expires_ms);
    DROP INDEX deployments_by_key;
    CREATE UNIQUE INDEX deployments_by_key ON deployments (service, idempotency_key) WHERE idempotency_key IS NOT NULL;
    """,
    # Moves get numbers of their own, in the order of their commits and never used twice: streams and notices go on from one.
    # `tallies` keeps what the metrics counted, `outbox` what is to be sent, `marks` how far the outbox has come.
    """
    ALTER TABLE deployments ADD COLUMN queue_ms INTEGER;
    ALTER TABLE deployments ADD COLUMN clock TEXT;
    UPDATE deployments SET queue_ms=max(0, started_ms - queued_ms) WHERE started_ms IS NOT NULL;
    CREATE TABLE numbered (
        id INTEGER PRIMARY KEY AUTOINCREMENT, seq INTEGER NOT NULL REFERENCES deployments ON DELETE CASCADE, previous TEXT,
        state TEXT NOT NULL, at_ms INTEGER NOT NULL, reason TEXT NOT NULL);
    INSERT INTO numbered (seq, previous, state, at_ms, reason)
        SELECT seq, (SELECT state FROM moves AS earlier WHERE earlier.seq=moves.seq AND earlier.n=moves.n - 1), state, at_ms, reason
        FROM moves ORDER BY (SELECT max(at_ms) FROM moves AS earlier WHERE earlier.seq=moves.seq AND earlier.n <= moves.n), seq, n;
    DROP TABLE moves;
    ALTER TABLE numbered RENAME TO moves;
    CREATE INDEX moves_by_deployment ON moves (seq);
    CREATE TABLE tallies (
        metric TEXT NOT NULL, labels TEXT NOT NULL, bucket INTEGER NOT NULL, number INTEGER NOT NULL, total REAL NOT NULL,
        PRIMARY KEY (metric, labels, bucket)) WITHOUT ROWID;
    CREATE TABLE marks (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
    INSERT INTO marks VALUES ('database_id', lower(hex(randomblob(8))));
    CREATE TABLE outbox (
        id INTEGER PRIMARY KEY AUTOINCREMENT, channel TEXT NOT NULL, seq INTEGER NOT NULL, message_id TEXT NOT NULL, notice TEXT NOT NULL,
        created_ms INTEGER NOT NULL, clock TEXT, attempts INTEGER NOT NULL DEFAULT 0);
    CREATE INDEX outbox_by_deployment ON outbox (channel, seq, id);
    """,
    # A wish to cancel stands in the row of what runs, so that it outlives the server. `lockings` numbers what `locks` only
    # has the last of, as `moves` does: notices are made from it.
    """
    ALTER TABLE deployments ADD COLUMN cancel_reason TEXT;
    CREATE TABLE locks (
        service TEXT PRIMARY KEY, owner TEXT NOT NULL, reason TEXT, since_ms INTEGER NOT NULL, until_ms INTEGER, clock TEXT) WITHOUT ROWID;
    CREATE TABLE lockings (
        id INTEGER PRIMARY KEY AUTOINCREMENT, service TEXT NOT NULL, owner TEXT NOT NULL, reason TEXT, since_ms INTEGER NOT NULL,
        until_ms INTEGER, clock TEXT);
    """,
    # `hash` covers the row and the hash before it. `key_uses` has the last use of each key by service ("" where that is unknown).
    """
    CREATE TABLE audit (
        n INTEGER PRIMARY KEY, at_ms INTEGER NOT NULL, action TEXT NOT NULL, decision TEXT NOT NULL, request_id TEXT, address TEXT,
        key_id TEXT, service TEXT, deploy_id TEXT, image TEXT, gate TEXT, detail TEXT, requests INTEGER NOT NULL, hash TEXT NOT NULL);
    CREATE INDEX audit_by_request ON audit (request_id) WHERE request_id IS NOT NULL;
    CREATE TABLE key_uses (
        key_id TEXT NOT NULL, service TEXT NOT NULL, at_ms INTEGER NOT NULL, address TEXT, request_id TEXT,
        PRIMARY KEY (key_id, service)) WITHOUT ROWID;
    INSERT INTO marks VALUES ('keys_since_ms', CAST(strftime('%s', 'now') AS INTEGER) * 1000);
    """,
)

_COLUMNS = ", ".join(Deployment._fields)
_MOVE_COLUMNS = "m.id, m.previous, m.state, m.at_ms, m.reason, " + ", ".join(f"d.{name}" for name in Deployment._fields)
_UPDATE = (
    "UPDATE deployments SET state=?, previous_image=?, started_ms=?, completed_ms=?, duration_ms=?, deploy_ms=?, healthcheck_ms=?, "
    "rollback_ms=?, phase=?, step=?, steps_total=?, current_step=?, command_no=?, pid=?, pid_started=?, error=?, failure_stage=?, "
    "rollback_reason=?, verdict=?, recoveries=?, queue_ms=?, clock=? WHERE seq=? AND state=? AND cancel_reason IS ?")
_CLAIM = (
    f"SELECT {_COLUMNS}, (SELECT current_image FROM services WHERE name=q.service) FROM deployments AS q "
    "WHERE completed_ms IS NULL AND state='Queued' "
    f"AND (SELECT count(*) FROM deployments AS a WHERE a.completed_ms IS NULL AND a.state IN ({_ACTIVE_SQL})) < ? "
    f"AND (SELECT count(*) FROM deployments AS a WHERE a.completed_ms IS NULL AND a.state IN ({_ACTIVE_SQL}) AND a.service=q.service) < ? "
    "ORDER BY seq LIMIT 1")
# How each ending changes what is known of a service. "Cancelled" changes it only if something ran: then nobody knows.
_HEALTH_OF_STATE = {State.SUCCEEDED: "Healthy", State.FAILED: "Unhealthy", State.ROLLED_BACK: "Degraded",
                    State.ROLLBACK_FAILED: "Unhealthy"}
_SENTENCE_OF_SQLITE_ERROR = {
    # What a full disk gives where the shared memory of the write-ahead log must be made: at start.
    sqlite3.SQLITE_IOERR_SHMSIZE: ("disk_full", "the disk is full; free some space"),
    sqlite3.SQLITE_FULL: ("disk_full", "the disk is full; free some space"),
    sqlite3.SQLITE_READONLY: ("storage", "the database is read-only; check the file system and the owner of its files"),
    sqlite3.SQLITE_IOERR: ("storage", "the disk failed while the database was used; check the kernel's log"),
    sqlite3.SQLITE_CORRUPT: ("storage", "the database is damaged; stop the server and restore a backup"),
    sqlite3.SQLITE_NOTADB: ("storage", "state.db is not a database; stop the server and restore a backup"),
    sqlite3.SQLITE_CANTOPEN: ("storage", "the database cannot be opened; check the owner and mode of the data directory"),
    sqlite3.SQLITE_BUSY: ("storage", "another program keeps the database locked; end it"),
    sqlite3.SQLITE_LOCKED: ("storage", "another program keeps the database locked; end it"),
}
# Left free so that running deployments can write their endings when new ones are refused already.
DISK_RESERVE_BYTES = 8 << 20
_BUSY_TIMEOUT_S = 5.0
_IDLE_READERS = 4
# Waiting deployments that are looked at in one turn, the oldest first.
_EXPIRY_BATCH = 1000
# Senders of Standard Webhooks try again for days, with the same id and a new timestamp. Beyond that number the oldest
# are forgotten sooner, but not before their timestamps, at most a day ahead (security.replay_window), cannot pass any more.
_MESSAGES_KEPT_MS = 7 * 86_400_000
_MAX_MESSAGES = 100_000
_MESSAGE_MAY_PASS_MS = 2 * 86_400_000
# Lockings from which notices may still be made: they are, within a second.
_LOCKINGS_KEPT = 1000
# About 300 MB. Accepted requests alone never come near it: these are a thousand a day for almost three years.
_MAX_AUDIT_ROWS = 1_000_000
_AUDIT_BATCH = 5000
_MAX_TRACES = 100
_DAY_MS = 86_400_000
# A quarter of what makes SQLite itself checkpoint, in the commit that reaches it: 5 ms on top of 0.3 ms.
_CHECKPOINT_BYTES = 1 << 20
# What a long reading, such as a backup's, lets the write-ahead log grow to is cut to this at the next checkpoint.
_WAL_KEPT_BYTES = 8 << 20
# Pages of 4 KB that deletions have left free. A share of them stays for what comes next; the others are given back to the
# file system, so few at a time that a commit beside it waits for half a millisecond.
_SPARE_PAGES, _SPARE_SHARE, _SHRINK_PAGES = 256, 10, 64


# A result and its number among the commands of its deployment.
NumberedResult = tuple[int, Result]


class Transition(NamedTuple):
    """A move as it is on disk: its number, from which state to which, when and why; and the deployment as it is now."""

    id: int
    before: State | None
    state: State
    at_ms: int
    reason: str
    deployment: Deployment


class Outgoing(NamedTuple):
    """A notice in the outbox, or on its way there (id 0). `notice` is its facts as JSON, `message_id` the same at each attempt."""

    id: int
    channel: str
    seq: int
    message_id: str
    notice: str
    created_ms: int
    clock: str | None
    attempts: int = 0


class Submission(NamedTuple):
    """What became of a deploy request: a new deployment or the one that was there, and those that it replaced.

    `can_start`: its service has a free place. `claimed`: what the idle worker that there is shall carry out now.
    """

    deployment: Deployment
    created: bool
    position: int | None
    superseded: tuple[Deployment, ...] = ()
    can_start: bool = False
    claimed: Deployment | None = None


class Lock(NamedTuple):
    """Who keeps deploys away from a service, why, since when and until when (None: until somebody unlocks it)."""

    service: str
    owner: str
    reason: str | None
    since_ms: int
    until_ms: int | None
    clock: str | None

    def left_ms(self, clock: str | None, at_ms: int) -> int | None:
        """Return how long it still holds: measured, so that a clock that is put forward or back changes nothing."""
        if self.until_ms is None:
            return None
        return self.until_ms - self.since_ms - elapsed_ms(self.clock, clock, wall_ms=at_ms - self.since_ms)


class AuditRow(NamedTuple):
    """What became of one request, or of an operator's act; docs/audit.md has the words. The last two are the store's to give.

    `requests`: how many it stands for. `gate`: the row of GATES that refused, or found it to be known already.
    """

    at_ms: int
    action: str
    decision: str
    request_id: str | None = None
    address: str | None = None
    key_id: str | None = None
    service: str | None = None
    deploy_id: str | None = None
    image: str | None = None
    gate: str | None = None
    detail: str | None = None
    requests: int = 1
    n: int = 0
    hash: str = ""


_AUDIT_COLUMNS = ", ".join(AuditRow._fields)
# What stands before the first row.
AUDIT_ROOT = "0" * 64
_AUDIT_ENCODER = json.JSONEncoder(separators=(",", ":"), default=repr)
_PRUNED = re.compile(r"rows up to (\d{1,18}), whose hash is ([0-9a-f]{64}), .*", re.ASCII)


def chain_hash(before: str, row: AuditRow) -> str:
    """Return the hash of a row: SHA-256 over the hash before it and the row's values as compact ASCII JSON, `n` last."""
    return hashlib.sha256(f"{before}\n{_AUDIT_ENCODER.encode(row[:-1])}".encode()).hexdigest()


class KeyUse(NamedTuple):
    """The last signature of a key for a service ("" where that is unknown): also if the request was refused then."""

    key_id: str
    service: str
    at_ms: int
    address: str | None
    request_id: str | None


class CancelWanted(Exception):
    """A deployment was not moved or written, because somebody wants it to end as Cancelled: `reason`."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class LockChange(NamedTuple):
    """What became of a request to lock or unlock: the lock that there is now, and whether the same message came before."""

    lock: Lock | None
    is_repeated: bool


def render_lock(lock: Lock) -> dict[str, str | None]:
    """Return a lock as answers have it."""
    return {"owner": lock.owner, "reason": lock.reason, "since": render_time(lock.since_ms), "until": render_time(lock.until_ms)}


def _locked(lock: Lock, left_ms: int | None) -> HookshotError:
    until = f" until {render_time(lock.until_ms)}" if lock.until_ms is not None else ""
    reason = f": {lock.reason}" if lock.reason else ""
    return HookshotError("service_locked", f"service {lock.service} is locked by {lock.owner}{until}{reason}", members={"lock": render_lock(lock)},
                         retry_after_s=None if left_ms is None else left_ms // 1000 + 1)


class ServiceRecord(NamedTuple):
    """What is known of a service: counted as things happen, never recomputed."""

    name: str
    current_image: str | None = None
    last_deploy_id: str | None = None
    last_status: str | None = None
    last_completed_ms: int | None = None
    health: str = "Unknown"
    succeeded: int = 0
    failed: int = 0
    rolled_back: int = 0
    rollback_failed: int = 0
    cancelled: int = 0
    duration_ms: int = 0
    last_failure_ms: int | None = None


def _is_of_storage(error: BaseException) -> bool:
    """Return whether the database or its disk failed, and not a statement of ours."""
    return isinstance(error, sqlite3.Error) and not isinstance(error, sqlite3.IntegrityError | sqlite3.ProgrammingError)


def _storage_error(error: BaseException) -> HookshotError:
    code = getattr(error, "sqlite_errorcode", 0)
    name, sentence = _SENTENCE_OF_SQLITE_ERROR.get(code) or _SENTENCE_OF_SQLITE_ERROR.get(code & 0xFF) or (
        "storage", f"the database cannot be used ({error})")
    return HookshotError(name, sentence, details=str(error))


def _deployment_of(row: Sequence[Any]) -> Deployment:
    values = dict(zip(Deployment._fields, row, strict=True))
    return Deployment(**values | {
        "state": State(values["state"]), "metadata": json.loads(values["metadata"]), "env": json.loads(values["env"]),
        "trigger": Trigger(*json.loads(values["trigger"]))})


class _Ticket:
    """One write that waits for the writer: what to do, and then what came of it."""

    __slots__ = ("work", "durable", "result", "error", "is_done")

    def __init__(self, work: Callable[[sqlite3.Connection], Any], durable: bool):
        self.work, self.durable = work, durable
        self.result: Any = None
        self.error: BaseException | None = None
        self.is_done = False


class Store:
    """The database of one data directory. Any thread; at most one Store per directory (see FolderLock)."""

    def __init__(self, folder: str, *, clock: Callable[[], str | None] = clock_reading):
        """Open or create the database and bring it to this version's schema; raise `storage` with what to do."""
        self._clock = clock
        self.path = os.path.join(folder, "state.db")
        self.logs = os.path.join(folder, "logs")
        self._folder = folder
        # A page that was read damaged once: what is written beside it might not be found again, so nothing is promised.
        self._damage: HookshotError | None = None
        self._pending: collections.deque[_Ticket] = collections.deque()
        self._writer_lock = threading.Lock()
        self._readers: queue.SimpleQueue[sqlite3.Connection] = queue.SimpleQueue()
        ended_uncleanly = os.path.exists(self.path + "-wal")
        try:
            self._writer = self._connect("FULL")
            # Before the first page is written: later it takes a VACUUM.
            self._writer.execute("PRAGMA auto_vacuum=INCREMENTAL")
            self._writer.execute("PRAGMA journal_mode=WAL")
            self._migrate()
            # For what no caller was promised: its commits need no fsync of their own, the next durable one takes them along.
            self._relaxed_writer = self._connect("NORMAL")
            if ended_uncleanly and (problem := self._writer.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
                raise HookshotError("storage", f"{self.path} is damaged ({clip(problem, 100)}); restore a backup")
            self._make_shrinkable()
        except sqlite3.Error as error:
            raise _storage_error(error) from error
        status = os.stat(self.path)
        # Tells this host's data directories apart: two servers may be given the same deploy_id.
        self.identity = f"{status.st_dev:x}.{status.st_ino:x}"

    def _connect(self, synchronous: str) -> sqlite3.Connection:
        db = sqlite3.connect(self.path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        db.execute(f"PRAGMA synchronous={synchronous}")
        db.execute(f"PRAGMA journal_size_limit={_WAL_KEPT_BYTES}")
        db.execute("PRAGMA foreign_keys=ON")
        return db

    def _make_shrinkable(self) -> None:
        """Write a database of an earlier version anew, once, so that it can give back what deletions leave free."""
        if self._writer.execute("PRAGMA auto_vacuum").fetchone()[0] == 0:
            # It takes as much room as the database does. Where there is none, the next start tries again.
            with contextlib.suppress(sqlite3.OperationalError):
                self._writer.execute("VACUUM")

    def _migrate(self) -> None:
        version = self._writer.execute("PRAGMA user_version").fetchone()[0]
        if version > len(MIGRATIONS):
            raise HookshotError("storage", f"{self.path} was written by a newer hookshot (schema {version}, this one knows "
                                           f"{len(MIGRATIONS)}); run that version, or restore an older backup")
        for number, script in enumerate(MIGRATIONS[version:], version + 1):
            try:
                self._writer.executescript(f"BEGIN IMMEDIATE; {script} PRAGMA user_version={number}; COMMIT;")
            except BaseException:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                raise

    def close(self) -> None:
        """Close every connection; the last one folds the write-ahead log into the database."""
        with self._writer_lock:
            while True:
                try:
                    self._readers.get_nowait().close()
                except queue.Empty:
                    break
            self._relaxed_writer.close()
            self._writer.close()

    # --- the writer and the readers

    def _write(self, work: Callable[[sqlite3.Connection], Any], *, durable: bool) -> Any:
        """Carry out `work` in a transaction, together with whatever else waits, and return its result."""
        ticket = _Ticket(work, durable)
        self._pending.append(ticket)
        with self._writer_lock:
            if not ticket.is_done:
                self._carry_out([self._pending.popleft() for _ in range(len(self._pending))])
        if ticket.error:
            raise self._translate(ticket.error) if _is_of_storage(ticket.error) else ticket.error
        return ticket.result

    def _carry_out(self, tickets: Sequence[_Ticket]) -> None:
        db = self._writer if any(ticket.durable for ticket in tickets) else self._relaxed_writer
        try:
            db.execute("BEGIN IMMEDIATE")
            for ticket in tickets:
                self._carry_out_one(db, ticket, is_alone=len(tickets) == 1)
            if db.in_transaction:
                db.execute("COMMIT")
        except BaseException as error:
            for ticket in tickets:
                ticket.error = ticket.error or error
            if not isinstance(error, Exception):
                raise
        finally:
            if db.in_transaction:
                db.execute("ROLLBACK")
            for ticket in tickets:
                ticket.is_done = True

    @staticmethod
    def _carry_out_one(db: sqlite3.Connection, ticket: _Ticket, *, is_alone: bool) -> None:
        if is_alone:
            ticket.result = ticket.work(db)
            return
        db.execute("SAVEPOINT one")
        try:
            ticket.result = ticket.work(db)
        except Exception as error:
            ticket.error = error
            # A full disk or an I/O error has already undone the whole transaction: then nothing of it may be claimed done.
            if not db.in_transaction:
                raise
            db.execute("ROLLBACK TO one")
        db.execute("RELEASE one")

    @contextlib.contextmanager
    def _reader(self) -> Iterator[sqlite3.Connection]:
        try:
            try:
                db = self._readers.get_nowait()
            except queue.Empty:
                db = self._connect("NORMAL")
                db.execute("PRAGMA query_only=ON")
            try:
                yield db
            finally:
                # A burst of readers leaves no more connections open than everyday needs.
                if self._readers.qsize() < _IDLE_READERS:
                    self._readers.put(db)
                else:
                    db.close()
        except sqlite3.Error as error:
            raise self._translate(error) from error

    def _translate(self, error: BaseException) -> HookshotError:
        translated = _storage_error(error)
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            self._damage = translated
        return translated

    # --- accepting

    def submit(self, request: DeployRequest, trigger: Trigger, at_ms: int, *, limits: Limits, on_busy: str,
               may_claim: bool = False, reason: str = "accepted", ignores_lock: bool = False, action: str = "deploy") -> Submission:
        """Put a deployment in the queue, durably and with its row of the audit, or return the one with the same id and body.

        With `may_claim` the queue's next deployment is taken in the same transaction: one fsync instead of two.

        Raises `conflict` for the same id with another body, `service_locked`, `busy` when the service's rules say so, `disk_full`.
        """
        if self._damage:
            raise self._damage
        try:
            free = free_bytes(self._folder)
        except OSError as error:
            raise HookshotError("storage", f"the data directory cannot be used: {error.strerror}") from None
        if free < DISK_RESERVE_BYTES:
            raise HookshotError("disk_full", f"less than {render_size(DISK_RESERVE_BYTES)} are free for {self._folder}; free some space")
        return self._write(lambda db: self._submit(db, request, trigger, at_ms, limits, on_busy, may_claim, reason, ignores_lock, action), durable=True)

    def _submit(self, db: sqlite3.Connection, request: DeployRequest, trigger: Trigger, at_ms: int, limits: Limits,
                on_busy: str, may_claim: bool, reason: str, ignores_lock: bool, action: str) -> Submission:
        service = request.service
        if existing := self._find_same(db, request) or self._find_message(db, service, request):
            self._remember_message(db, service, request, existing.deploy_id, at_ms)
            return Submission(existing, False, None)
        if not ignores_lock:
            self._refuse_locked(db, service, at_ms)
        counts = dict(db.execute("SELECT state, count(*) FROM deployments WHERE completed_ms IS NULL AND service=? GROUP BY state",
                                 (request.service,)).fetchall())
        queued = counts.pop(State.QUEUED, 0)
        superseded: tuple[Deployment, ...] = ()
        if on_busy == "replace":
            superseded = self._supersede(db, request.service, at_ms)
            queued = 0
        elif on_busy == "reject" and queued + sum(counts.values()) >= limits.max_concurrent_per_service:
            raise HookshotError("busy", f"service {request.service} is busy and does not queue (on_busy = \"reject\")")
        if queued >= limits.max_queue_per_service:
            raise HookshotError("busy", f"the queue of service {request.service} is full, with {queued} waiting (limits.max_queue_per_service)")
        deployment = new_deployment(request, trigger, request.deploy_id or new_deploy_id(at_ms), at_ms)._replace(clock=self._clock())
        cursor = db.execute(
            "INSERT INTO deployments (deploy_id, service, state, image, previous_image, metadata, env, trigger, digest, "
            "idempotency_key, queued_ms, clock) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (deployment.deploy_id, deployment.service, deployment.state, deployment.image, deployment.previous_image,
             json.dumps(deployment.metadata), json.dumps(deployment.env), json.dumps(trigger), deployment.digest,
             deployment.idempotency_key, at_ms, deployment.clock))
        deployment = deployment._replace(seq=cursor.lastrowid or 0)
        self._remember_message(db, service, request, deployment.deploy_id, at_ms)
        self._add_move(db, None, deployment, at_ms, reason)
        self._audit(db, AuditRow(at_ms, action, "accepted", trigger.request_id, trigger.address, trigger.key_id, service, deployment.deploy_id,
                                 deployment.image, detail=reason if action != "deploy" else None))
        # While the service is busy nobody need be woken: writes are serial, so whoever frees the place will find this row.
        can_start = sum(counts.values()) < limits.max_concurrent_per_service
        claimed = self._claim(db, at_ms, limits) if can_start and may_claim else None
        return Submission(deployment, True, queued + 1, superseded, can_start, claimed)

    @staticmethod
    def _find_same(db: sqlite3.Connection, request: DeployRequest) -> Deployment | None:
        for column, value, clause, values in (
                ("deploy_id", request.deploy_id, "deploy_id=?", (request.deploy_id,)),
                ("idempotency_key", request.idempotency_key, "service=? AND idempotency_key=?", (request.service, request.idempotency_key))):
            row = value and db.execute(f"SELECT {_COLUMNS} FROM deployments WHERE {clause}", values).fetchone()
            if row:
                existing = _deployment_of(row)
                if existing.digest != request.digest:
                    raise HookshotError("conflict", f"{column} {clip(value or '', 128)} belongs to another request; choose a new one")
                return existing
        return None

    @staticmethod
    def _recall(db: sqlite3.Connection, service: str, request: DeployRequest | ControlRequest) -> str | None:
        """Return the id of the deployment that a signed message was about when it came before ("" for none), or None."""
        message_id = request.message.id if request.message else ""
        row = db.execute("SELECT digest, deploy_id FROM messages WHERE service=? AND id=?", (service, message_id)).fetchone()
        if row and row[0] != request.digest:
            raise HookshotError("conflict", f"webhook-id {clip(message_id, 128)} belongs to another message; choose a new one")
        return row and row[1]

    @classmethod
    def _find_message(cls, db: sqlite3.Connection, service: str, request: DeployRequest | ControlRequest) -> Deployment | None:
        """Return what a signed message started, or was about, when it came before."""
        deploy_id = cls._recall(db, service, request)
        if deploy_id is None:
            return None
        found = db.execute(f"SELECT {_COLUMNS} FROM deployments WHERE deploy_id=?", (deploy_id,)).fetchone()
        if not found:
            raise HookshotError("conflict", f"this message was accepted before, as deployment {deploy_id}, which is beyond its retention")
        return _deployment_of(found)

    @staticmethod
    def _remember_message(db: sqlite3.Connection, service: str, request: DeployRequest | ControlRequest, deploy_id: str, at_ms: int) -> None:
        if request.message:
            db.execute("INSERT INTO messages (service, id, digest, deploy_id, expires_ms) VALUES (?, ?, ?, ?, ?) "
                       # It was signed anew: from now on this signature could be repeated.
                       "ON CONFLICT (service, id) DO UPDATE SET expires_ms=max(expires_ms, excluded.expires_ms)",
                       (service, request.message.id, request.digest, deploy_id, max(request.message.expires_ms, at_ms + _MESSAGES_KEPT_MS)))

    def _supersede(self, db: sqlite3.Connection, service: str, at_ms: int) -> tuple[Deployment, ...]:
        rows = db.execute(f"SELECT {_COLUMNS} FROM deployments WHERE completed_ms IS NULL AND state='Queued' AND service=? "
                          "ORDER BY seq", (service,)).fetchall()
        return tuple(self._move(db, _deployment_of(row), Outcome.CANCELLED, "superseded by a newer deployment", at_ms) for row in rows)

    # --- control

    def find_repeated(self, service: str, control: ControlRequest) -> Deployment | None:
        """Return the deployment that a control message made when it came before; raise `conflict` if it was another message."""
        with self._reader() as db:
            return self._find_message(db, service, control)

    def find_good(self, service: str, image: str | None = None) -> Deployment | None:
        """Return the newest deployment that succeeded: with this image, or with another than the current one."""
        if image is not None:
            clause, values = "AND image=?", (service, image)
        else:
            clause, values = "AND image IS NOT (SELECT current_image FROM services WHERE name=?)", (service, service)
        found = self._select(f"WHERE completed_ms IS NOT NULL AND service=? AND state='Succeeded' {clause} ORDER BY seq DESC LIMIT 1", values)
        return next(iter(found), None)

    def cancel(self, control: ControlRequest, trigger: Trigger, reason: str, at_ms: int) -> tuple[Deployment, bool]:
        """End a queued deployment as Cancelled, or note in the row of a running one that it shall end so; durably.

        Returns it as it is then, and whether the same message came before. Raises `deployment_not_found`, and `not_possible`
        for one that has ended, or that fails already: its rollback and its hooks are not cut short.
        """
        return self._write(lambda db: self._cancel(db, control, trigger, reason, at_ms), durable=True)

    def _cancel(self, db: sqlite3.Connection, control: ControlRequest, trigger: Trigger, reason: str, at_ms: int) -> tuple[Deployment, bool]:
        row = db.execute(f"SELECT {_COLUMNS} FROM deployments WHERE deploy_id=?", (control.target,)).fetchone()
        if not row:
            raise HookshotError("deployment_not_found", f"there is no deployment {control.target} any more")
        found = _deployment_of(row)
        if self._recall(db, found.service, control) is not None:
            return found, True
        if found.is_terminal:
            raise HookshotError("not_possible", f"deployment {found.deploy_id} has ended already: {found.state}")
        if Outcome.CANCELLED not in TRANSITIONS[found.state] or found.verdict:
            raise HookshotError("not_possible", f"deployment {found.deploy_id} cannot be cancelled any more: it has failed and "
                                                f"{'is rolled back' if found.state is State.ROLLING_BACK else 'its on_failure hooks run'}")
        self._remember_message(db, found.service, control, found.deploy_id, at_ms)
        self._audit_control(db, control, trigger, found.service, at_ms, found)
        if found.state is State.QUEUED:
            return self._move(db, found, Outcome.CANCELLED, reason, at_ms, error=reason), False
        # Whoever came first is the one that it says.
        db.execute("UPDATE deployments SET cancel_reason=coalesce(cancel_reason, ?) WHERE seq=?", (reason, found.seq))
        return found._replace(cancel_reason=found.cancel_reason or reason), False

    def lock(self, control: ControlRequest, trigger: Trigger, at_ms: int) -> LockChange:
        """Lock a service, or change the lock of the same owner, durably; raise `service_locked` if it is another's, unless forced."""
        def work(db: sqlite3.Connection) -> LockChange:
            service, before = control.target, self._find_lock(db, control.target, at_ms)
            if self._recall(db, service, control) is not None:
                return LockChange(before, True)
            if before and before.owner != control.owner and not control.force:
                raise _locked(before, before.left_ms(self._clock(), at_ms))
            lock = Lock(service, control.owner, control.reason, at_ms, control.for_s and at_ms + control.for_s * 1000, self._clock())
            db.execute("INSERT OR REPLACE INTO locks (service, owner, reason, since_ms, until_ms, clock) VALUES (?, ?, ?, ?, ?, ?)", lock)
            number = db.execute("INSERT INTO lockings (service, owner, reason, since_ms, until_ms, clock) VALUES (?, ?, ?, ?, ?, ?)", lock).lastrowid or 0
            db.execute("DELETE FROM lockings WHERE id <= ?", (number - _LOCKINGS_KEPT,))
            self._remember_message(db, service, control, "", at_ms)
            self._audit_control(db, control, trigger, service, at_ms)
            return LockChange(lock, False)

        return self._write(work, durable=True)

    def unlock(self, control: ControlRequest, trigger: Trigger, at_ms: int) -> LockChange:
        """Unlock a service, durably; raise `service_locked` if the lock is another owner's, unless forced."""
        def work(db: sqlite3.Connection) -> LockChange:
            service, before = control.target, self._find_lock(db, control.target, at_ms)
            if self._recall(db, service, control) is not None:
                return LockChange(before, True)
            if before and before.owner != control.owner and not control.force:
                raise _locked(before, before.left_ms(self._clock(), at_ms))
            db.execute("DELETE FROM locks WHERE service=?", (service,))
            self._remember_message(db, service, control, "", at_ms)
            self._audit_control(db, control, trigger, service, at_ms)
            return LockChange(None, False)

        return self._write(work, durable=True)

    def _refuse_locked(self, db: sqlite3.Connection, service: str, at_ms: int) -> None:
        if lock := self._find_lock(db, service, at_ms):
            raise _locked(lock, lock.left_ms(self._clock(), at_ms))

    def _find_lock(self, db: sqlite3.Connection, service: str, at_ms: int) -> Lock | None:
        row = db.execute("SELECT service, owner, reason, since_ms, until_ms, clock FROM locks WHERE service=?", (service,)).fetchone()
        lock = row and Lock(*row)
        return lock if lock and self._holds(lock, at_ms) else None

    def _holds(self, lock: Lock, at_ms: int) -> bool:
        left_ms = lock.left_ms(self._clock(), at_ms)
        return left_ms is None or left_ms > 0

    def locks(self, at_ms: int) -> dict[str, Lock]:
        """Return the locks that hold, by service."""
        with self._reader() as db:
            rows = db.execute("SELECT service, owner, reason, since_ms, until_ms, clock FROM locks").fetchall()
        return {lock.service: lock for lock in map(Lock._make, rows) if self._holds(lock, at_ms)}

    def expire_locks(self, at_ms: int) -> tuple[Lock, ...]:
        """Remove the locks whose time is over; return them."""
        with self._reader() as db:
            rows = db.execute("SELECT service, owner, reason, since_ms, until_ms, clock FROM locks WHERE until_ms IS NOT NULL").fetchall()
        over = [lock for lock in map(Lock._make, rows) if not self._holds(lock, at_ms)]
        if not over:
            return ()

        def work(db: sqlite3.Connection) -> tuple[Lock, ...]:
            # One that was renewed meanwhile is another.
            return tuple(lock for lock in over if db.execute("DELETE FROM locks WHERE service=? AND since_ms=? AND until_ms IS ?",
                                                             (lock.service, lock.since_ms, lock.until_ms)).rowcount)

        return self._write(work, durable=False)

    # --- the audit

    @staticmethod
    def _last_audit(db: sqlite3.Connection) -> tuple[int, str]:
        return db.execute("SELECT n, hash FROM audit ORDER BY n DESC LIMIT 1").fetchone() or (0, AUDIT_ROOT)

    @classmethod
    def _add_audit(cls, db: sqlite3.Connection, row: AuditRow) -> None:
        number, before = cls._last_audit(db)
        row = row._replace(n=number + 1)
        db.execute("INSERT INTO audit (at_ms, action, decision, request_id, address, key_id, service, deploy_id, image, gate, detail, requests, n, hash) "
                   "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row._replace(hash=chain_hash(before, row)))

    @staticmethod
    def _note_use(db: sqlite3.Connection, use: KeyUse) -> None:
        db.execute("INSERT INTO key_uses (key_id, service, at_ms, address, request_id) VALUES (?, ?, ?, ?, ?) ON CONFLICT (key_id, service) "
                   "DO UPDATE SET at_ms=excluded.at_ms, address=excluded.address, request_id=excluded.request_id "
                   # What is written in batches comes late. A clock that was put back is believed.
                   "WHERE excluded.at_ms >= at_ms OR excluded.at_ms < at_ms - 60000", use)

    @classmethod
    def _audit(cls, db: sqlite3.Connection, row: AuditRow) -> None:
        """Write the row of a signed request in the transaction of what it did."""
        cls._add_audit(db, row)
        cls._note_use(db, KeyUse(row.key_id or "", row.service or "", row.at_ms, row.address, row.request_id))

    @classmethod
    def _audit_control(cls, db: sqlite3.Connection, control: ControlRequest, trigger: Trigger, service: str, at_ms: int,
                       deployment: Deployment | None = None) -> None:
        words = [f"by {control.owner}"] * (deployment is None) + [f"for {control.for_s} s"] * bool(control.for_s) + ["forced"] * control.force
        words += [control.reason] if control.reason else []
        cls._audit(db, AuditRow(at_ms, control.action, "done", trigger.request_id, trigger.address, trigger.key_id, service,
                                deployment and deployment.deploy_id, deployment and deployment.image, detail=", ".join(words) or None))

    def record_audit(self, rows: Sequence[AuditRow], uses: Iterable[KeyUse]) -> None:
        """Write rows of the audit whose facts are written nowhere else, and when keys were last used."""
        def work(db: sqlite3.Connection) -> None:
            for row in rows:
                self._add_audit(db, row)
            for use in uses:
                self._note_use(db, use)

        self._write(work, durable=False)

    def audit_head(self) -> tuple[int, str]:
        """Return number and hash of the audit's newest row."""
        with self._reader() as db:
            return self._last_audit(db)

    def audit_of(self, request_id: str, since_ms: int) -> tuple[AuditRow, ...]:
        """Return the rows of the requests with an id, oldest first; of very many those that were signed: anyone may choose an id."""
        with self._reader() as db:
            rows = db.execute(f"SELECT {_AUDIT_COLUMNS} FROM audit WHERE request_id=? AND at_ms >= ? ORDER BY key_id IS NULL, n DESC LIMIT ?",
                              (request_id, since_ms, _MAX_TRACES)).fetchall()
        return tuple(sorted(map(AuditRow._make, rows), key=lambda row: row.n))

    def key_uses(self) -> dict[tuple[str, str], KeyUse]:
        """Return the last uses of keys, by key and service."""
        with self._reader() as db:
            rows = db.execute("SELECT key_id, service, at_ms, address, request_id FROM key_uses").fetchall()
        return {use[:2]: use for use in map(KeyUse._make, rows)}

    def prune_audit(self, at_ms: int, *, days: int, keep: int = _MAX_AUDIT_ROWS) -> int:
        """Remove a batch of the audit's first rows once they are older than `days` and one more, or are more than `keep`.

        A row of its own says up to which, and with which hash: from there the chain is checked. Returns how many are removed.
        """
        before_ms = at_ms - days * _DAY_MS
        with self._reader() as db:
            first = db.execute("SELECT n, at_ms FROM audit ORDER BY n LIMIT 1").fetchone()
            newest, _ = self._last_audit(db)
            if not first or (first[1] >= before_ms - _DAY_MS and newest - first[0] < keep):
                return 0
            young = db.execute("SELECT n FROM audit WHERE at_ms >= ? ORDER BY n LIMIT 1", (before_ms,)).fetchone()
        last = min(max(young[0] - 1 if young else newest, newest - keep), first[0] + _AUDIT_BATCH - 1, newest - 1)

        def work(db: sqlite3.Connection) -> int:
            # Somebody may have removed the row of this very number.
            number, digest = db.execute("SELECT n, hash FROM audit WHERE n <= ? ORDER BY n DESC LIMIT 1", (last,)).fetchone()
            removed = db.execute("DELETE FROM audit WHERE n <= ?", (number,)).rowcount
            self._add_audit(db, AuditRow(at_ms, "prune", "done", detail=f"rows up to {number}, whose hash is {digest}, are not kept any longer"))
            return removed

        return self._write(work, durable=False) if last >= first[0] else 0

    # --- carrying out

    def claim(self, at_ms: int, *, limits: Limits) -> Deployment | None:
        """Take the oldest queued deployment that the limits let run, durably; None if there is none."""
        return self._write(lambda db: self._claim(db, at_ms, limits), durable=True)

    def _claim(self, db: sqlite3.Connection, at_ms: int, limits: Limits) -> Deployment | None:
        row = db.execute(_CLAIM, (limits.max_concurrent_total, limits.max_concurrent_per_service)).fetchone()
        if not row:
            return None
        queued, last_good, clock = _deployment_of(row[:-1]), row[-1], self._clock()
        previous = choose_previous_image(queued.image, queued.previous_image, last_good)
        # One that starts over keeps what it had at its first start.
        begun = {} if queued.started_ms else {
            "started_ms": at_ms, "clock": clock, "queue_ms": elapsed_ms(queued.clock, clock, wall_ms=at_ms - queued.queued_ms)}
        return self._move(db, queued, Outcome.CLAIMED, "its turn has come", at_ms, previous_image=previous, **begun)

    def move(self, deployment: Deployment, outcome: Outcome, reason: str, at_ms: int, results: Sequence[NumberedResult] = (),
             moved: tuple[State, Move] | None = None, *, then_claim: Limits | None = None,
             **changes: Any) -> tuple[Deployment, Deployment | None]:
        """Move a deployment on, as TRANSITIONS says, with changed fields; durable if it ends.

        With it go the results since the last write, and the move to its state from an earlier one (`moved`). Returns the
        new record and, with `then_claim`, the next deployment, taken in the same transaction: one fsync instead of two.
        """
        def work(db: sqlite3.Connection) -> tuple[Deployment, Deployment | None]:
            if moved:
                self._catch_up(db, deployment, moved)
            self._add_results(db, deployment, results)
            return self._move(db, deployment, outcome, reason, at_ms, **changes), then_claim and self._claim(db, at_ms, then_claim)

        return self._write(work, durable=advance(deployment.state, outcome) in TERMINAL)

    def _move(self, db: sqlite3.Connection, before: Deployment, outcome: Outcome, reason: str, at_ms: int, **changes: Any) -> Deployment:
        after = before._replace(state=advance(before.state, outcome), **changes)
        if before.cancel_reason and outcome is not Outcome.CANCELLED:
            raise CancelWanted(before.cancel_reason)
        if after.is_terminal:
            after = after._replace(completed_ms=at_ms, phase=None, current_step=None, pid=None, pid_started=None)
        self._update(db, before, after)
        self._add_move(db, before.state, after, at_ms, reason)
        if after.is_terminal:
            self._count(db, after)
        self._tally(db, tally_move(after, reason))
        return after

    @staticmethod
    def _update(db: sqlite3.Connection, before: Deployment, after: Deployment) -> None:
        cursor = db.execute(_UPDATE, (
            after.state, after.previous_image, after.started_ms, after.completed_ms, after.duration_ms, after.deploy_ms,
            after.healthcheck_ms, after.rollback_ms, after.phase, after.step, after.steps_total, after.current_step,
            after.command_no, after.pid, after.pid_started, after.error, after.failure_stage, after.rollback_reason,
            after.verdict, after.recoveries, after.queue_ms, after.clock, after.seq, before.state, before.cancel_reason))
        if cursor.rowcount != 1:
            row = db.execute("SELECT state, cancel_reason FROM deployments WHERE seq=?", (before.seq,)).fetchone()
            if row and row[0] == before.state and row[1] and before.cancel_reason is None:
                raise CancelWanted(row[1])
            raise RuntimeError(f"deployment {before.deploy_id} is no longer {before.state}")

    @staticmethod
    def _add_move(db: sqlite3.Connection, before: State | None, deployment: Deployment, at_ms: int, reason: str) -> None:
        db.execute("INSERT INTO moves (seq, previous, state, at_ms, reason) VALUES (?, ?, ?, ?, ?)",
                   (deployment.seq, before, deployment.state, at_ms, reason))

    @staticmethod
    def _tally(db: sqlite3.Connection, samples: Iterable[Sample]) -> None:
        db.executemany("INSERT INTO tallies (metric, labels, bucket, number, total) VALUES (?, ?, ?, 1, ?) ON CONFLICT (metric, labels, bucket) "
                       "DO UPDATE SET number=number+1, total=total+excluded.total",
                       [(name, json.dumps(labels), bucket_index(name, amount), amount) for name, labels, amount in samples])

    @staticmethod
    def _count(db: sqlite3.Connection, ended: Deployment) -> None:
        column = COUNT_OF_STATE[ended.state]
        image = {State.SUCCEEDED: ended.image, State.ROLLED_BACK: ended.previous_image}.get(ended.state)
        failed_ms = ended.completed_ms if ended.state in (State.FAILED, State.ROLLED_BACK, State.ROLLBACK_FAILED) else None
        ran = ended.state in _HEALTH_OF_STATE
        health = _HEALTH_OF_STATE[ended.state] if ran else "Unknown" if ended.started_ms else None
        db.execute(f"INSERT INTO services (name, {column}, last_deploy_id, last_status, last_completed_ms, current_image, last_failure_ms, "
                   "health, duration_ms) VALUES (?, 1, ?, ?, ?, ?, ?, coalesce(?, 'Unknown'), ?) ON CONFLICT (name) DO UPDATE SET "
                   f"{column}={column}+1, last_deploy_id=excluded.last_deploy_id, last_status=excluded.last_status, "
                   "last_completed_ms=excluded.last_completed_ms, current_image=coalesce(excluded.current_image, current_image), "
                   "last_failure_ms=coalesce(excluded.last_failure_ms, last_failure_ms), health=coalesce(?, health), "
                   "duration_ms=duration_ms+excluded.duration_ms",
                   (ended.service, ended.deploy_id, ended.state, ended.completed_ms, image, failed_ms, health,
                    ended.duration_ms or 0 if ran else 0, health))

    def note_progress(self, deployment: Deployment, results: Sequence[NumberedResult] = (), moved: tuple[State, Move] | None = None) -> None:
        """Record which command runs now and as which process, so that a restart can find what is left of it.

        With it go what goes with a move.
        """
        def work(db: sqlite3.Connection) -> None:
            if moved:
                self._catch_up(db, deployment, moved)
            else:
                self._update(db, deployment, deployment)
            self._add_results(db, deployment, results)

        self._write(work, durable=False)

    def _catch_up(self, db: sqlite3.Connection, deployment: Deployment, moved: tuple[State, Move]) -> None:
        self._update(db, deployment._replace(state=moved[0]), deployment)
        self._add_move(db, moved[0], deployment, moved[1].at_ms, moved[1].reason)

    def _add_results(self, db: sqlite3.Connection, deployment: Deployment, results: Sequence[NumberedResult]) -> None:
        db.executemany("INSERT INTO commands (seq, n, phase, step, name, command, attempt, status, exit_code, signal, started_ms, "
                       "duration_ms, stdout, stderr, note, critical) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                       [(deployment.seq, number, *result) for number, result in results])
        for _, result in results:
            self._tally(db, tally_result(deployment.service, result))

    def expire(self, at_ms: int, *, lock_timeout_s: int) -> tuple[Deployment, ...]:
        """Cancel what has waited in the queue for longer than lock_timeout; return it."""
        clock, limit_ms = self._clock(), lock_timeout_s * 1000
        with self._reader() as db:
            # One that starts over waits from then on, not from when it was first queued; its clock reading is of its first start.
            rows = db.execute("SELECT seq, CASE WHEN started_ms IS NULL THEN clock END, (SELECT max(at_ms) FROM moves WHERE moves.seq=deployments.seq "
                              "AND moves.state='Queued') FROM deployments WHERE completed_ms IS NULL AND state='Queued' ORDER BY seq LIMIT ?",
                              (_EXPIRY_BATCH,)).fetchall()
        late = [seq for seq, since, since_ms in rows if elapsed_ms(since, clock, wall_ms=at_ms - since_ms) > limit_ms]
        if not late:
            return ()
        reason = f"expired: it waited longer than lock_timeout ({lock_timeout_s} s) for its turn"

        def work(db: sqlite3.Connection) -> tuple[Deployment, ...]:
            found = [db.execute(f"SELECT {_COLUMNS} FROM deployments WHERE seq=? AND state='Queued'", (seq,)).fetchone() for seq in late]
            return tuple(self._move(db, _deployment_of(row), Outcome.CANCELLED, reason, at_ms, error=reason) for row in found if row)

        return self._write(work, durable=True)

    def withdraw(self, why: Callable[[Deployment], str | None], at_ms: int) -> tuple[Deployment, ...]:
        """Cancel everything in the queue that `why` gives a reason for, durably and in one go; return it."""
        clause = "WHERE completed_ms IS NULL AND state='Queued' ORDER BY seq"
        if not any(map(why, self._select(clause, ()))):
            return ()

        def work(db: sqlite3.Connection) -> tuple[Deployment, ...]:
            found = map(_deployment_of, db.execute(f"SELECT {_COLUMNS} FROM deployments {clause}").fetchall())
            return tuple(self._move(db, each, Outcome.CANCELLED, reason, at_ms, error=reason) for each in found if (reason := why(each)))

        return self._write(work, durable=True)

    # --- reading

    def unfinished(self) -> tuple[Deployment, ...]:
        """Return what was running when the last server ended, oldest first."""
        return self._select(f"WHERE completed_ms IS NULL AND state IN ({_ACTIVE_SQL}) ORDER BY seq", ())

    def get(self, deploy_id: str) -> Deployment | None:
        """Return a deployment as it is on disk now."""
        return next(iter(self._select("WHERE deploy_id=?", (deploy_id,))), None)

    def history(self, *, service: str | None, state: str | None, before_seq: int | None, limit: int,
                is_unfinished: bool = False) -> tuple[Deployment, ...]:
        """Return deployments (or only those that have not ended), newest first, older than the one with `before_seq`."""
        clause = "WHERE service=coalesce(?, service) AND state=coalesce(?, state) AND seq < ?" + " AND completed_ms IS NULL" * is_unfinished
        return self._select(clause + " ORDER BY seq DESC LIMIT ?", (service, state, 1 << 62 if before_seq is None else before_seq, limit))

    def _select(self, clause: str, values: Sequence[Any]) -> tuple[Deployment, ...]:
        with self._reader() as db:
            return tuple(map(_deployment_of, db.execute(f"SELECT {_COLUMNS} FROM deployments {clause}", values).fetchall()))

    def record(self, deploy_id: str) -> tuple[Deployment, tuple[Move, ...], tuple[Result, ...]] | None:
        """Return a deployment with the states it went through and how its commands ended, all of one instant."""
        with self._reader() as db:
            db.execute("BEGIN")
            try:
                row = db.execute(f"SELECT {_COLUMNS} FROM deployments WHERE deploy_id=?", (deploy_id,)).fetchone()
                seq = row and row[0]
                moves = db.execute("SELECT state, at_ms, reason FROM moves WHERE seq=? ORDER BY id", (seq,)).fetchall()
                results = db.execute("SELECT phase, step, name, command, attempt, status, exit_code, signal, started_ms, duration_ms, "
                                     "stdout, stderr, note, critical FROM commands WHERE seq=? ORDER BY n", (seq,)).fetchall()
            finally:
                db.execute("COMMIT")
        return row and (_deployment_of(row), tuple(Move(State(move[0]), *move[1:]) for move in moves),
                        tuple(Result(Phase(result[0]), *result[1:13], critical=bool(result[13])) for result in results))

    def service_record(self, name: str) -> ServiceRecord:
        """Return what is known of a service; zeros for one that never deployed."""
        return next(iter(self.service_records(name)), ServiceRecord(name))

    def service_records(self, name: str | None = None) -> tuple[ServiceRecord, ...]:
        """Return what is known of every service that ever ended a deployment, or of one."""
        with self._reader() as db:
            rows = db.execute("SELECT name, current_image, last_deploy_id, last_status, last_completed_ms, health, succeeded, failed, "
                              "rolled_back, rollback_failed, cancelled, duration_ms, last_failure_ms FROM services WHERE name=coalesce(?, name) "
                              "ORDER BY name", (name,)).fetchall()
        return tuple(ServiceRecord(*row) for row in rows)

    def queue_counts(self) -> dict[str, dict[str, int]]:
        """Return how many deployments wait and run, by service: {"web": {"queued": 2, "active": 1}}."""
        counts: dict[str, dict[str, int]] = {}
        with self._reader() as db:
            rows = db.execute("SELECT service, state='Queued', count(*) FROM deployments WHERE completed_ms IS NULL GROUP BY 1, 2").fetchall()
        for service, is_queued, number in rows:
            counts.setdefault(service, {"queued": 0, "active": 0})["queued" if is_queued else "active"] = number
        return counts

    def tallies(self) -> tuple[Tally, ...]:
        """Return what was counted of stored facts up to now, for the metrics to go on from."""
        with self._reader() as db:
            rows = db.execute("SELECT metric, labels, bucket, number, total FROM tallies").fetchall()
        return tuple((metric, tuple(json.loads(labels)), *rest) for metric, labels, *rest in rows)

    # --- moves as they come, and what is to be told of them

    def last_move(self) -> int:
        """Return the number of the newest move; 0 before the first."""
        with self._reader() as db:
            row = db.execute("SELECT seq FROM sqlite_sequence WHERE name='moves'").fetchone()
        return row[0] if row else 0

    def moves_after(self, number: int, limit: int) -> tuple[Transition, ...]:
        """Return the moves that follow one, in the order of their commits."""
        with self._reader() as db:
            rows = db.execute(f"SELECT {_MOVE_COLUMNS} FROM moves AS m JOIN deployments AS d USING (seq) WHERE m.id > ? ORDER BY m.id LIMIT ?",
                              (number, limit)).fetchall()
        return tuple(Transition(row[0], row[1] and State(row[1]), State(row[2]), row[3], row[4], _deployment_of(row[5:])) for row in rows)

    def last_locking(self) -> int:
        """Return the number of the newest locking; 0 before the first."""
        with self._reader() as db:
            row = db.execute("SELECT seq FROM sqlite_sequence WHERE name='lockings'").fetchone()
        return row[0] if row else 0

    def lockings_after(self, number: int, limit: int) -> tuple[tuple[int, Lock], ...]:
        """Return the locks that followed one, in the order of their commits, each with its number."""
        with self._reader() as db:
            rows = db.execute("SELECT id, service, owner, reason, since_ms, until_ms, clock FROM lockings WHERE id > ? ORDER BY id LIMIT ?",
                              (number, limit)).fetchall()
        return tuple((row[0], Lock(*row[1:])) for row in rows)

    def marks(self) -> dict[str, str]:
        """Return the marks by name."""
        with self._reader() as db:
            return dict(db.execute("SELECT name, value FROM marks").fetchall())

    def enqueue(self, notices: Sequence[Outgoing], marks: Mapping[str, str]) -> None:
        """Put notices into the outbox and set marks, in one transaction."""
        def work(db: sqlite3.Connection) -> None:
            db.executemany("INSERT INTO outbox (channel, seq, message_id, notice, created_ms, clock, attempts) VALUES (?, ?, ?, ?, ?, ?, ?)",
                           [notice[1:] for notice in notices])
            db.executemany("INSERT INTO marks (name, value) VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value=excluded.value", [*marks.items()])

        self._write(work, durable=False)

    def trim_outbox(self, channel: str, keep: int) -> int:
        """Remove the oldest notices of a channel but for `keep`; return how many."""
        return self._write(lambda db: db.execute(
            "DELETE FROM outbox WHERE channel=? AND id <= (SELECT id FROM outbox WHERE channel=? ORDER BY id DESC LIMIT 1 OFFSET ?)",
            (channel, channel, keep)).rowcount, durable=False)

    def next_notices(self, channel: str, limit: int) -> tuple[Outgoing, ...]:
        """Return the oldest notice of each deployment that waits for a channel, oldest first: those behind it must wait."""
        with self._reader() as db:
            rows = db.execute("SELECT id, channel, seq, message_id, notice, created_ms, clock, attempts FROM outbox WHERE id IN "
                              "(SELECT min(id) FROM outbox WHERE channel=? GROUP BY seq) ORDER BY id LIMIT ?", (channel, limit)).fetchall()
        return tuple(Outgoing(*row) for row in rows)

    def take_notice(self, number: int) -> None:
        """Remove a notice that is delivered, or will never be."""
        self._write(lambda db: db.execute("DELETE FROM outbox WHERE id=?", (number,)), durable=False)

    def drop_channel(self, channel: str) -> None:
        """Remove everything that waits for a channel."""
        self._write(lambda db: db.execute("DELETE FROM outbox WHERE channel=?", (channel,)), durable=False)

    def count_attempt(self, number: int) -> None:
        """Note that a notice could not be delivered yet."""
        self._write(lambda db: db.execute("UPDATE outbox SET attempts=attempts+1 WHERE id=?", (number,)), durable=False)

    def outbox_counts(self) -> dict[str, int]:
        """Return how many notices wait, by channel."""
        with self._reader() as db:
            return dict(db.execute("SELECT channel, count(*) FROM outbox GROUP BY channel").fetchall())

    def size_bytes(self) -> int:
        """Return what the database takes on disk."""
        sizes = (os.stat(self.path + suffix).st_size for suffix in ("", "-wal") if os.path.exists(self.path + suffix))
        return sum(sizes)

    def log_path(self, deployment: Deployment) -> str:
        """Return the file of a deployment's log: named by our own number, never by anything a caller chose."""
        return os.path.join(self.logs, f"{deployment.seq}.log")

    # --- keeping house

    def prune(self, service: str, retention: Retention, *, batch: int = 100) -> int:
        """Remove up to `batch` deployments of a service beyond its retention, logs first; return how many."""
        with self._reader() as db:
            rows = db.execute(
                "SELECT seq FROM (SELECT seq FROM deployments WHERE completed_ms IS NOT NULL AND service=? AND state='Succeeded' "
                "ORDER BY seq DESC LIMIT -1 OFFSET ?) UNION ALL SELECT seq FROM (SELECT seq FROM deployments WHERE completed_ms "
                "IS NOT NULL AND service=? AND state<>'Succeeded' ORDER BY seq DESC LIMIT -1 OFFSET ?) LIMIT ?",
                (service, retention.successful_deploys, service, retention.failed_deploys, batch)).fetchall()
        for (seq,) in rows:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(self.logs, f"{seq}.log"))
        if rows:
            self._write(lambda db: db.executemany("DELETE FROM deployments WHERE seq=?", rows), durable=False)
        return len(rows)

    def shrink(self) -> bool:
        """Give some of the pages that are free back to the file system; return whether there are more."""
        with self._reader() as db:
            pages, free = (db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count"))
        surplus = free - max(_SPARE_PAGES, (pages - free) // _SPARE_SHARE)

        def work(db: sqlite3.Connection) -> None:
            for _ in range(min(surplus, _SHRINK_PAGES)):
                # Python steps this statement once, whatever its number says: one page.
                db.execute("PRAGMA incremental_vacuum(1)")

        if surplus > 0:
            self._write(work, durable=False)
        return surplus > _SHRINK_PAGES

    def checkpoint(self) -> None:
        """Fold the write-ahead log into the database, before a commit that a deployment waits for has to do it."""
        with contextlib.suppress(FileNotFoundError):
            if os.stat(self.path + "-wal").st_size >= _CHECKPOINT_BYTES:
                with self._reader() as db:
                    db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    def prune_messages(self, at_ms: int, *, keep: int = _MAX_MESSAGES, batch: int = 1000) -> int:
        """Forget up to `batch` signed messages that came too long ago, or are more than `keep`; return how many."""
        return self._write(lambda db: db.execute(
            "DELETE FROM messages WHERE (service, id) IN (SELECT service, id FROM messages WHERE expires_ms < max(?, min(?, coalesce("
            "(SELECT expires_ms FROM messages ORDER BY expires_ms DESC LIMIT 1 OFFSET ?), 0))) ORDER BY expires_ms LIMIT ?)",
            (at_ms, at_ms + _MESSAGES_KEPT_MS - _MESSAGE_MAY_PASS_MS, keep - 1, batch)).rowcount, durable=False)

    def prune_logs(self, before_ms: int) -> int:
        """Remove deployment logs last written before an instant; return how many bytes the others take."""
        kept_bytes = 0
        for entry in os.scandir(self.logs):
            with contextlib.suppress(FileNotFoundError):
                status = entry.stat()
                if status.st_mtime_ns // 1_000_000 < before_ms:
                    os.unlink(entry.path)
                else:
                    kept_bytes += status.st_blocks * 512
        return kept_bytes

    # --- after a restore

    def settle_restored(self, reason: str, at_ms: int) -> tuple[Deployment, ...]:
        """End what a backup caught unfinished, durably, and return it: what was asked for back then must not run now.

        Raises `storage` for records that are not as this program writes them.
        """
        def work(db: sqlite3.Connection) -> tuple[Deployment, ...]:
            # New moves get numbers that others had in the database's other future. With a new id of the database the
            # notices of both are not taken for the same.
            db.execute("UPDATE marks SET value=lower(hex(randomblob(8))) WHERE name='database_id'")
            rows = db.execute(f"SELECT {_COLUMNS} FROM deployments WHERE completed_ms IS NULL ORDER BY seq").fetchall()
            self._add_audit(db, AuditRow(at_ms, "import", "done", detail=f"{reason}; deployments given up: {len(rows)}"))
            return tuple(self._give_up(db, _deployment_of(row), reason, at_ms) for row in rows)

        try:
            return self._write(work, durable=True)
        except (ValueError, TypeError, KeyError, sqlite3.IntegrityError):
            raise HookshotError("storage", "its records cannot be read") from None

    def _give_up(self, db: sqlite3.Connection, found: Deployment, reason: str, at_ms: int) -> Deployment:
        if found.state is State.QUEUED or found.cancel_reason:
            # A wish to cancel stands in the row: then no other move is possible.
            reason = found.cancel_reason or reason
            return self._move(db, found, Outcome.CANCELLED, reason, at_ms, error=reason)
        return self._move(db, found, Outcome.FAILED_FOR_GOOD, reason, at_ms, error=reason, failure_stage=found.failure_stage or found.phase or "validating")


# --- whole databases, for backup and restore

# Pages of 4 KB at a time: between two steps Ctrl-C is heard.
_COPY_PAGES = 1024
# Two databases of one schema give the same; the text of their schemas may differ with the version of SQLite. What
# ANALYZE leaves is SQLite's own.
_SHAPES = (
    "SELECT type, name, tbl_name FROM sqlite_master WHERE name NOT LIKE 'sqlite!_stat%' ESCAPE '!'",
    "SELECT m.name, c.cid, c.name, c.type, c.\"notnull\", c.pk FROM sqlite_master AS m JOIN pragma_table_info(m.name) AS c "
    "WHERE m.type='table' AND m.name NOT LIKE 'sqlite!_stat%' ESCAPE '!'")


def _open_existing(path: str, mode: str) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{urllib.parse.quote(path)}?{mode}", timeout=_BUSY_TIMEOUT_S, isolation_level=None, uri=True)


def copy_database(source: str, target: str) -> None:
    """Copy what a database holds at this instant into a new file; a server that uses it goes on writing meanwhile."""
    try:
        with contextlib.closing(_open_existing(source, "mode=rw")) as live, contextlib.closing(sqlite3.connect(target, isolation_level=None)) as copy:
            live.execute("PRAGMA query_only=ON")
            # Read once and thrown away: it need not survive anything.
            copy.execute("PRAGMA synchronous=OFF")
            # Without a transaction that keeps the instant, each commit of the server would make the copy start over.
            live.execute("BEGIN")
            live.execute("SELECT count(*) FROM sqlite_master").fetchone()
            live.backup(copy, pages=_COPY_PAGES)
    except sqlite3.Error as error:
        raise _storage_error(error) from error


def check_database(path: str) -> tuple[int, str | None]:
    """Return the schema version of a database and what is wrong with it, or None. A newer schema is looked at no further."""
    try:
        with contextlib.closing(_open_existing(path, "immutable=1")) as db, contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as model:
            # It may come from an archive that someone has made up: nothing in its schema shall be carried out.
            db.execute("PRAGMA trusted_schema=OFF")
            db.text_factory = lambda text: text.decode("utf-8", "replace")
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version > len(MIGRATIONS):
                return version, None
            problem = db.execute("PRAGMA quick_check(1)").fetchone()[0]
            if problem != "ok":
                return version, clip(escape_controls(problem), 100)
            for script in MIGRATIONS[:version]:
                model.executescript(script)
            # No triggers, no views, no tables and columns but ours.
            objects, expected = ({tuple(row) for query in _SHAPES for row in each.execute(query).fetchall()} for each in (db, model))
            return version, None if version > 0 and objects == expected else "its tables are not those of hookshot"
    except UnicodeDecodeError:
        # What Python makes of an error of SQLite's whose message quotes a damaged schema.
        return 0, "its schema cannot be read"
    except sqlite3.DatabaseError as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR):
            return 0, clip(escape_controls(str(error)), 100)
        raise _storage_error(error) from error


def deployment_numbers(path: str) -> Iterator[int]:
    """Yield the numbers of all deployments of a database that nobody else uses, in order."""
    with contextlib.closing(_open_existing(path, "immutable=1")) as db:
        for (number,) in db.execute("SELECT seq FROM deployments ORDER BY seq"):
            yield number


def _open_beside(path: str) -> sqlite3.Connection:
    """Open a database for reading that a server may be using."""
    # Without a write-ahead log nobody is at work: then SQLite need not make one, and leave it behind, in order to read.
    return _open_existing(path, "mode=ro" if os.path.exists(path + "-wal") else "immutable=1")


def count_unfinished(path: str) -> int | None:
    """Return how many deployments of a database have not ended, None if it cannot be read. Changes nothing on disk."""
    try:
        with contextlib.closing(_open_beside(path)) as db:
            return db.execute("SELECT count(*) FROM deployments WHERE completed_ms IS NULL").fetchone()[0]
    except (sqlite3.Error, UnicodeDecodeError):  # the latter from a message that quotes a damaged schema
        return None


class DatabaseReport(NamedTuple):
    """What was found in a database: schema, bytes, when something last happened; what is wrong with it, or None; whether all was looked at."""

    version: int
    size_bytes: int
    wal_bytes: int
    unused_bytes: int
    latest_ms: int
    problem: str | None
    is_complete: bool


_FACTS = ("PRAGMA user_version", "PRAGMA page_count", "PRAGMA freelist_count", "PRAGMA page_size")


def examine_database(path: str, is_late: Callable[[], bool]) -> DatabaseReport:
    """Look through a database that a server may be using, until `is_late`; raise `storage` if it cannot be read."""
    wal = path + "-wal"
    problem, is_complete, latest_ms = None, True, 0
    try:
        with contextlib.closing(_open_beside(path)) as db:
            version, pages, unused, page_bytes = (db.execute(fact).fetchone()[0] for fact in _FACTS)
            if 0 < version <= len(MIGRATIONS):
                latest_ms = db.execute("SELECT coalesce(max(max(queued_ms, coalesce(completed_ms, 0))), 0) FROM deployments").fetchone()[0]
            # Asked every 10,000 instructions of SQLite's machine: some milliseconds.
            db.set_progress_handler(is_late, 10_000)
            try:
                problem = db.execute("PRAGMA quick_check(1)").fetchone()[0]
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode != sqlite3.SQLITE_INTERRUPT:
                    raise
                is_complete = False
    except (sqlite3.Error, UnicodeDecodeError) as error:
        raise _storage_error(error) from None
    size = os.path.getsize(wal) if os.path.exists(wal) else 0
    return DatabaseReport(version, pages * page_bytes, size, unused * page_bytes, latest_ms, None if problem in (None, "ok") else clip(escape_controls(problem), 100), is_complete)


def describe_sqlite() -> tuple[str, bool]:
    """Return the version of SQLite, and whether it may be used by several threads."""
    return sqlite3.sqlite_version, sqlite3.threadsafety > 0


# --- the audit of a data directory, read by another process


@contextlib.contextmanager
def _open_audit(path: str) -> Iterator[sqlite3.Connection]:
    try:
        os.stat(path)
    except PermissionError as error:
        raise HookshotError("access_denied", f"{path} cannot be looked at: {error.strerror}; run this as root or as the server's user") from None
    except OSError:
        raise HookshotError("usage", f"there is no database {path}; name the data directory with --data-dir") from None
    try:
        with contextlib.closing(_open_beside(path)) as db:
            db.text_factory = lambda text: text.decode("utf-8", "replace")
            if not db.execute("SELECT 1 FROM sqlite_master WHERE name='audit'").fetchone():
                raise HookshotError("usage", f"{path} is of an older hookshot and has no audit yet; start this one on it")
            yield db
    except sqlite3.Error as error:
        raise _storage_error(error) from error


def read_audit(path: str, *, service: str | None, limit: int) -> tuple[AuditRow, ...]:
    """Return the newest rows of a database's audit, newest first."""
    with _open_audit(path) as db:
        rows = db.execute(f"SELECT {_AUDIT_COLUMNS} FROM audit WHERE ? IS NULL OR service=? ORDER BY n DESC LIMIT ?", (service, service, limit)).fetchall()
    return tuple(map(AuditRow._make, rows))


class AuditCheck(NamedTuple):
    """What checking a chain of rows found: how many, from which on, the newest, and the first that is wrong (None: all fit)."""

    rows: int
    first: int
    last: int
    hash: str
    bad: int | None = None
    problem: str | None = None
    has_head: bool = False


def verify_audit(path: str, head: str | None = None) -> AuditCheck:
    """Check every row of a database's audit against the one before it; `head` is a hash that some row must have."""
    with _open_audit(path) as db:
        db.execute("BEGIN")
        pruned = db.execute("SELECT detail FROM audit WHERE action='prune' ORDER BY n DESC LIMIT 1").fetchone()
        match = pruned and _PRUNED.fullmatch(str(pruned[0]))
        start = (int(match[1]), match[2]) if match else (0, AUDIT_ROOT)
        return check_chain(map(AuditRow._make, db.execute(f"SELECT {_AUDIT_COLUMNS} FROM audit ORDER BY n")), start, head)


def check_chain(rows: Iterable[AuditRow], start: tuple[int, str], head: str | None) -> AuditCheck:
    """Return what is found; `start` is number and hash of the row before the first."""
    found = AuditCheck(0, start[0] + 1, *start, has_head=head == start[1])
    for row in rows:
        if row.n != found.last + 1:
            return found._replace(bad=row.n, problem=f"rows {found.last + 1} to {row.n - 1}, which should stand before it, are missing"
                                  if row.n > found.last else "it stands where it should not")
        if row.hash != chain_hash(found.hash, row):
            return found._replace(bad=row.n, problem="it, or the one before it, was edited, moved, put in or exchanged")
        found = found._replace(rows=found.rows + 1, last=row.n, hash=row.hash, has_head=found.has_head or row.hash == head)
    return found


# === 14. SECRETS ======================================================================================================
# Where keys come from: systemd credentials, a file, the environment, a command. Owns nothing; returns a Keyring.
#
# 1. A secret is never in a message: bad lines are told by number, secrets by name.
# 2. What others could read or plant is refused: wrong mode, wrong owner, too short, a placeholder.
# 3. Secrets in the environment are taken out of it at start, before anything else can inherit them.

GOOD_KEY_BYTES = 32
PREFIX_OF_HOOKSHOT_1 = "DEPLOY_RECEIVER_"
# Variables of ours that configure the command line and are no secrets.
_PLAIN_VARIABLES = frozenset({"HOOKSHOT_CONFIG", "HOOKSHOT_SERVICES", "HOOKSHOT_URL", "HOOKSHOT_KEY_FILE", "HOOKSHOT_CA", "HOOKSHOT_CERT",
                              "HOOKSHOT_CERT_KEY"})
_SECRETS_COMMAND_TIMEOUT_S = 30
_MAX_SECRETS_BYTES = 1 << 20


class Keyring(NamedTuple):
    """All secrets of this moment by name, and what masks them. Replaced whole, never changed."""

    values: Mapping[str, bytes]
    masker: Masker
    # By name: the source that a secret was taken from.
    origins: Mapping[str, str] = {}

    def pick(self, names: Iterable[str]) -> dict[str, bytes]:
        """Return the named secrets that are there."""
        return {name: self.values[name] for name in names if name in self.values}


class SecretSurroundings(NamedTuple):
    """What of the process's environment secrets may come from; taken once, at start."""

    environment: Mapping[str, str]
    credentials: str | None

    @classmethod
    def take(cls, environ: Any, prefix: str) -> "SecretSurroundings":
        """Return the secrets in `environ` and remove them from it."""
        prefix = prefix.rstrip("_") + "_"
        found = {}
        names = [name for name in environ if name.startswith((prefix, PREFIX_OF_HOOKSHOT_1)) and name not in _PLAIN_VARIABLES]
        for name in sorted(names, key=lambda name: name.startswith(prefix)):  # ours come last, so they win
            if environ is os.environ:
                erase_variable(name)
            found[name.removeprefix(prefix).removeprefix(PREFIX_OF_HOOKSHOT_1).lower()] = environ.pop(name)
        return cls(found, environ.get("CREDENTIALS_DIRECTORY"))


def parse_secrets(text: str, place: Place) -> dict[str, bytes]:
    """Return the secrets in key=value lines; a bad line is a problem told by its number."""
    found: dict[str, bytes] = {}
    for number, line in enumerate(text.splitlines(), 1):
        name, equals, value = line.strip().partition("=")
        name, value = name.strip(), value.strip()
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        here = place._replace(path=f"line {number}")
        if not equals or not SECRET_NAME.fullmatch(name):
            here.problem("is not key=value")
        elif name in found:
            here.problem("has a name that an earlier line has too")
        elif value[:1] in "\"'" and value[:1] == value[-1:] and value:
            here.problem("has a value in quotes; write it without them")
        else:
            found[name] = value.encode()
    return found


def _read_secrets_file(config: Secrets, surroundings: SecretSurroundings, place: Place) -> dict[str, bytes]:
    place = place._replace(file=config.secrets_file, path="")
    try:
        descriptor = os.open(config.secrets_file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        if config.source != "auto":
            place.problem("does not exist; create it with mode 0600, or run `hookshot init`")
        return {}
    except OSError as error:
        place.problem(f"cannot be read: {error.strerror}")
        return {}
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        # Before fdopen, which refuses a folder by an exception.
        os.close(descriptor)
        place.problem("is not a regular file")
        return {}
    _warn_of_planting(config.secrets_file, place)
    with os.fdopen(descriptor, "rb") as file:
        if status.st_mode & 0o077:
            place.problem(f"can be read by others (mode {stat.S_IMODE(status.st_mode):04o}); run chmod 600 on it")
        elif status.st_uid not in (0, os.geteuid()):
            owner = name_of_user(status.st_uid)
            place.problem(f"belongs to user {owner}, and this runs as {own_user()}; have it run as {owner}, or run chown {own_user()}: on the file")
        else:
            content = file.read(_MAX_SECRETS_BYTES + 1)
            if len(content) <= _MAX_SECRETS_BYTES:
                return parse_secrets(_decode_secrets(content, place), place)
            place.problem(f"is larger than {render_size(_MAX_SECRETS_BYTES)}")
    return {}


def _warn_of_planting(path: str, place: Place) -> None:
    """Note who might put another file in the place of the secrets. What is there already is judged by its own owner and mode."""
    with contextlib.suppress(OSError):
        for message, _ in find_writers(os.path.dirname(path)):
            place.warning(message)


def _decode_secrets(content: bytes, place: Place) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        place.problem("is not UTF-8")
        return ""


def _read_systemd_credentials(config: Secrets, surroundings: SecretSurroundings, place: Place) -> dict[str, bytes]:
    if not surroundings.credentials:
        if config.source != "auto":
            place.problem("source is systemd, but CREDENTIALS_DIRECTORY is not set; use LoadCredential= in the unit")
        return {}
    found = {}
    try:
        for entry in os.scandir(surroundings.credentials):
            if SECRET_NAME.fullmatch(entry.name) and entry.is_file():
                with open(entry.path, "rb") as file:
                    # One newline: what `echo secret > file` adds. More would be part of the secret.
                    found[entry.name] = file.read(1 << 16).removesuffix(b"\n")
    except OSError as error:
        place.problem(f"credentials cannot be read from {surroundings.credentials}: {error.strerror}")
    return found


def _read_environment_secrets(config: Secrets, surroundings: SecretSurroundings, place: Place) -> dict[str, bytes]:
    return {name: os.fsencode(value) for name, value in surroundings.environment.items()}


def _run_secrets_command(config: Secrets, surroundings: SecretSurroundings, place: Place) -> dict[str, bytes]:
    place = place / "command"
    if not config.command:
        return {}
    env = {name: value for name, value in os.environ.items() if SAFE_ENV.fullmatch(name)}
    try:
        done = subprocess.run(config.command, stdin=subprocess.DEVNULL, capture_output=True, env=env, timeout=_SECRETS_COMMAND_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        place.problem(f"did not end within {_SECRETS_COMMAND_TIMEOUT_S} s")
    except OSError as error:
        place.problem(f"cannot be started: {error.strerror}")
    else:
        if done.returncode == 0:
            return parse_secrets(_decode_secrets(done.stdout, place), place._replace(path="secrets.command, output"))
        place.problem(f"ended with status {done.returncode}; run it by hand to see why")
    return {}


_SECRET_SOURCES: dict[str, Callable[[Secrets, SecretSurroundings, Place], dict[str, bytes]]] = {
    "systemd": _read_systemd_credentials, "file": _read_secrets_file, "env": _read_environment_secrets,
    "command": _run_secrets_command}


def sources_of(config: Secrets) -> tuple[str, ...]:
    """Return the names of the sources that secrets are taken from; the first one that has a secret is believed."""
    if config.source != "auto":
        return config.source or ()
    names = config.sources_priority or ()
    return (*names, "command") if config.command and "command" not in names else names


def load_keyring(config: Config, services: Services, surroundings: SecretSurroundings, file: str, problems: list[Problem]) -> Keyring:
    """Return every secret that any source has; what is missing, weak or unreadable is added to `problems`."""
    place = Place(file, "secrets", problems)
    values: dict[str, bytes] = {}
    origins: dict[str, str] = {}
    for name in sources_of(config.secrets):
        try:
            found = _SECRET_SOURCES[name](config.secrets, surroundings, place)
        except OSError as error:  # a disk that fails while it is read
            place.problem(f"source {name} cannot be read: {error.strerror}")
            continue
        for secret, value in found.items():
            values.setdefault(secret, value)
            origins.setdefault(secret, name)
    _check_secrets(values, config, services, place)
    return Keyring(values, Masker([*values.values(), *_confidential_texts(config.notifications)]), origins)


def describe_secrets(before: Mapping[str, bytes], after: Mapping[str, bytes]) -> list[str]:
    """Return a line for each secret that was added, removed or changed, by its name alone."""
    return [f"secret {name}: {'added' if name not in before else 'removed' if name not in after else 'new value'}"
            for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]


def _confidential_texts(notifications: Notifications) -> Iterator[bytes]:
    """Yield what stands in config.toml and is a secret all the same: URLs of chats, tokens, passwords."""
    for table in (*(notifications.channel or ()), notifications.webhook):
        for name in (*SECRET_KEYS, *EVENTS_OF_WEBHOOK):
            text = getattr(table, name, None)
            if text and not secret_named(text):
                yield text.encode()


def _secrets_of_channels(notifications: Notifications) -> Iterator[tuple[str, str]]:
    """Yield (secret, who wants it) for everything that channels take from secrets."""
    webhook = notifications.webhook
    for name in (*EVENTS_OF_WEBHOOK, "signing_key"):
        if secret := secret_named(getattr(webhook, name)):
            yield secret, f"notifications.webhook.{name}"
    for channel in notifications.channel or ():
        for name in SECRET_KEYS if channel else ():
            if secret := secret_named(getattr(channel, name)):
                yield secret, f"notifications.channel {channel.name}, {name}"


def _check_secrets(values: Mapping[str, bytes], config: Config, services: Services, place: Place) -> None:
    keys = {name: "security.hmac_keys" for name in config.security.hmac_keys or ()}
    for service in services.by_name.values():
        keys = {name: f"service {service.name}.security.hmac_keys" for name in service.security.hmac_keys or ()} | keys
    if config.security.read_access == "token":
        keys["read_token"] = 'security.read_access = "token"'
    wanted = dict(_secrets_of_channels(config.notifications)) if config.notifications.enabled else {}
    path = config.secrets.secrets_file
    # "auto" passes over a file that is not there; any other source that fails has a problem of its own.
    is_absent = config.secrets.source == "auto" and "file" in sources_of(config.secrets) and path and not os.path.exists(path)
    absent = f" ({path} does not exist)" if is_absent else ""
    for name, wanted_by in (wanted | {name: "secrets.required_secrets" for name in config.secrets.required_secrets or ()} | keys).items():
        if name not in values:
            place.problem(f"secret {name} is not found in any source{absent}; it is required by {wanted_by}")
        elif name not in keys and not values[name].strip():
            place.problem(f"secret {name} is empty; it is required by {wanted_by}")
    for name in sorted(values.keys() & (keys.keys() | {"read_token"})):
        if problem := check_key(values[name]) or (check_webhook_key(values[name]) if name in keys else None):
            place.problem(f"secret {name} {problem}; make a new one with `hookshot keygen`")
        elif len(values[name]) < GOOD_KEY_BYTES:
            place.warning(f"secret {name} has only {len(values[name])} bytes; {GOOD_KEY_BYTES} or more are better")


def check_webhook_key(value: bytes) -> str | None:
    """Return why a secret that claims to be a key of Standard Webhooks is none, or None."""
    try:
        return None if len(webhook_key(value)) >= MIN_KEY_BYTES else f"is shorter than {MIN_KEY_BYTES} bytes{' after whsec_' if value.startswith(b'whsec_') else ''}"
    except ValueError:
        return "begins with whsec_, but what follows is not base64"


def check_key(value: bytes) -> str | None:
    """Return why a value must not be used as a key, or None."""
    if len(value.strip()) < MIN_KEY_BYTES:
        return f"is shorter than {MIN_KEY_BYTES} bytes"
    if len(set(value)) < 6 or re.search(rb"change.?me|your.?(secret|key)|example|placeholder|replace.?(me|this)", value, re.IGNORECASE):
        return "is a placeholder, not a secret"
    return None


# === 15. RUN ==========================================================================================================
# One process or probe: start it, keep its output, hold its deadline, end its whole group. Owns the running process.
#
# 1. Only the worker that started a process signals it; the leader is reaped last, so its group's number stays ours.
# 2. Memory is bounded whatever a command prints: chunks go to the log at once, the tail of a flood is a short ring.
# 3. The end of a command is its leader's exit, not the end of its pipes: a daemon may hold those for ever.

# A command that ends sooner is recorded with its result only: that halves the writes of a quick deployment. A server
# that dies meanwhile finds it again by the marks in its environment.
LASTING_S = 0.02
# After the leader's exit, how long to wait for output of those it left behind; what was written before is there already.
DRAIN_S = 0.5
CHUNK_BYTES = 1 << 16
PREVIEW_BYTES = 10 << 10
# A line longer than this is written in pieces, so that a stream without newlines is bounded too.
_LINE_BYTES = 8 << 10
_TAIL_BYTES = 256 << 10


class StopToken:
    """Asks a worker to stop what it runs; can be waited for, also in poll()."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK) if hasattr(os, "pipe2") else os.pipe()
        self.reason: str | None = None

    def fileno(self) -> int:
        """Return what poll() waits for."""
        return self._read

    def set(self, reason: str) -> None:
        """Ask: "shutdown" and "cancel" let a command clean up, "now" kills it. Any thread."""
        self.reason = "now" if self.reason == "now" else reason
        with contextlib.suppress(OSError):
            os.write(self._write, b"!")

    def wait(self, seconds: float) -> bool:
        """Return whether it was asked within `seconds`."""
        poll = select.poll()
        poll.register(self._read, select.POLLIN)
        return bool(poll.poll(max(0.0, seconds) * 1000))

    def close(self) -> None:
        """Give the pipe back."""
        os.close(self._read)
        os.close(self._write)


# As escape_controls, but a tab in a program's output is layout.
_OUTPUT_ESCAPES = {code: escape for code, escape in CONTROL_ESCAPES.items() if code not in (9, 10)}


class DeploymentLog:
    """The log file of one deployment: head, and the tail of what goes beyond max_output. One thread.

    Writing never raises: a full disk costs lines of this log, not the deployment.
    """

    def __init__(self, path: str, limit_bytes: int):
        self._path = path
        self._limit = limit_bytes - min(_TAIL_BYTES, limit_bytes // 4)
        self._tail_limit = limit_bytes - self._limit
        self._tail: collections.deque[tuple[str, bytes]] = collections.deque()
        self._tail_bytes = 0
        self._is_flooded = False
        self._cut_bytes = 0
        self._lost = 0
        self._unwritten = bytearray()
        self._descriptor = -1
        self._size = 0
        with contextlib.suppress(OSError):
            self._size = os.stat(path).st_size

    def note(self, phase: str, text: str) -> None:
        """Add a line of the engine's own; it is written with the next output or flush()."""
        self._add(f"{render_time(now_ms())} {phase} -- ", text.encode("utf-8", "replace") + b"\n")

    def output(self, phase: str, stream: str, block: bytes) -> None:
        """Write whole lines of a command's output, already masked."""
        # Bytes that are not UTF-8 grow when they are replaced; the limits count what is written.
        block = block.decode("utf-8", "replace").encode()
        self._add(f"{render_time(now_ms())} {phase} {stream} ", block)
        self.flush()

    def flush(self) -> None:
        """Write what was noted. The file is created here: that costs a disk more than all else before a command starts."""
        if not self._unwritten:
            return
        content, self._unwritten = bytes(self._unwritten), bytearray()
        try:
            if self._descriptor < 0:
                flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
                self._descriptor = os.open(self._path, flags, 0o600)
            while content:
                content = content[os.write(self._descriptor, content) :]
        except OSError:
            self._lost += 1

    def close(self) -> None:
        """Write what was kept of the end of a flood, and close the file; again is nothing."""
        kept, room = [], self._tail_limit
        while self._tail and room:
            content = _prefix_lines(*self._tail.pop())
            if len(content) > room:
                start = content.find(b"\n", len(content) - room - 1) + 1
                self._cut_bytes += start
                content, room = content[start:], len(content) - start
            kept.append(content)
            room -= len(content)
        self._cut_bytes += sum(len(block) for _, block in self._tail)
        self._tail.clear()
        if self._cut_bytes:
            self._write_note(f"{render_size(self._cut_bytes)} were cut here; the end follows")
            self._cut_bytes = 0
        for content in reversed(kept):
            self._write(content)
        if self._lost:
            self._write_note(f"{self._lost} writes to this log failed; lines are missing")
            self._lost = 0
        self.flush()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _add(self, prefix: str, block: bytes) -> None:
        # In pieces: a block of nothing but newlines grows forty times when each gets its prefix.
        start = 0
        while start < len(block):
            piece = block[start : start + _LINE_BYTES]
            if start + len(piece) < len(block):
                piece = piece[: piece.rfind(b"\n") + 1 or _character_boundary(piece, len(piece))]
            self._add_piece(prefix, piece)
            start += len(piece)

    def _add_piece(self, prefix: str, piece: bytes) -> None:
        if not self._is_flooded:
            content = _prefix_lines(prefix, piece)
            if self._size + len(content) <= self._limit:
                self._write(content)
                return
            if half := piece.rfind(b"\n", 0, len(piece) // 2) + 1:
                self._add_piece(prefix, piece[:half])
                self._add_piece(prefix, piece[half:])
                return
            self._is_flooded = True
            self._write_note("max_output is reached; the end of the output follows when the deployment ends")
        self._tail.append((prefix, piece))
        # At least what it will take in the file; close() measures.
        self._tail_bytes += len(prefix) + len(piece)
        while self._tail_bytes > self._tail_limit:
            prefix, dropped = self._tail.popleft()
            self._tail_bytes -= len(prefix) + len(dropped)
            self._cut_bytes += len(dropped)

    def _write_note(self, text: str) -> None:
        self._write(f"{render_time(now_ms())} log -- {text}\n".encode())

    def _write(self, content: bytes) -> None:
        self._size += len(content)
        self._unwritten += content
        if len(self._unwritten) > CHUNK_BYTES:
            self.flush()


def _prefix_lines(prefix: str, block: bytes) -> bytes:
    text = block.replace(b"\r\n", b"\n").decode("utf-8", "replace").removesuffix("\n")
    if not text.isprintable():
        text = text.translate(_OUTPUT_ESCAPES)
    return (prefix + text.replace("\n", "\n" + prefix) + "\n").encode("utf-8", "replace")


class _Output:
    """One stream of one command: masks it, hands whole lines to the log, keeps the last bytes for the record."""

    def __init__(self, phase: str, stream: str, log: DeploymentLog, masker: Masker):
        self._phase, self._stream, self._log, self._masker = phase, stream, log, masker
        self._raw = b""
        self._line = b""
        self._preview = b""
        self._is_cut = False

    def feed(self, chunk: bytes) -> None:
        """Take a chunk as it was read."""
        raw = self._raw + chunk
        safe = self._masker.safe_length(raw)
        self._raw, masked = raw[safe:], self._masker.mask(raw[:safe])
        self._keep(masked)
        block = self._line + masked
        end = block.rfind(b"\n") + 1
        if len(block) - end > _LINE_BYTES:
            end = _character_boundary(block, len(block))
        if end:
            self._log.output(self._phase, self._stream, block[:end])
        self._line = block[end:]

    def end(self) -> str:
        """Flush what is left and return the preview for the record."""
        rest = self._masker.mask(self._raw)
        self._keep(rest)
        if self._line + rest:
            self._log.output(self._phase, self._stream, self._line + rest)
        # A character may have been cut in two where the preview starts.
        preview = self._preview.lstrip(bytes(range(0x80, 0xC0))) if self._is_cut else self._preview
        return preview.decode("utf-8", "replace").replace("\0", "\\x00")

    def _keep(self, content: bytes) -> None:
        kept = self._preview + content[-PREVIEW_BYTES:]
        self._is_cut = self._is_cut or len(self._preview) + len(content) > PREVIEW_BYTES
        self._preview = kept[-PREVIEW_BYTES:]


def _character_boundary(block: bytes, end: int) -> int:
    """Return the last index up to `end` that does not cut a UTF-8 character in two."""
    for back in range(1, min(4, end) + 1):
        byte = block[end - back]
        if byte >= 0xC0:
            length = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return end if length <= back else end - back
        if byte < 0x80:
            return end
    return end


def _spawn(launch: Launch) -> "subprocess.Popen[bytes]":
    account = launch.account
    identity: dict[str, Any] = {"user": account.uid, "group": account.gid, "extra_groups": account.groups} if account else {}
    return subprocess.Popen(
        launch.argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0, env=launch.env,
        cwd=launch.cwd, umask=launch.umask, start_new_session=True, close_fds=True, **identity)


def _spawn_nicely(launch: Launch) -> "subprocess.Popen[bytes]":
    """Start a process with its niceness from its first instruction.

    On Linux niceness belongs to a thread and its children inherit it (sched(7)), but an unprivileged thread cannot
    take it back: so a thread of its own sets it, starts the process, and ends.
    """
    outcome: list[Any] = []

    def start() -> None:
        try:
            os.setpriority(os.PRIO_PROCESS, 0, os.getpriority(os.PRIO_PROCESS, 0) + launch.nice)
            outcome.append(_spawn(launch))
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=start, name="spawn")
    thread.start()
    thread.join()
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def _why_not_started(error: Exception, launch: Launch) -> str:
    if not os.path.isdir(launch.cwd):
        return f"could not start: its working directory {launch.cwd} does not exist"
    if isinstance(error, FileNotFoundError):
        return "could not start: the program is not found; check the name and PATH"
    if isinstance(error, PermissionError) and launch.nice < 0 and os.geteuid() != 0:
        return f"could not start: only root can run commands with nice {launch.nice}"
    if isinstance(error, PermissionError) and launch.account and os.geteuid() != 0:
        return f"could not start: only root can run commands as user {launch.account.name}"
    if isinstance(error, PermissionError):
        return "could not start: the program is not executable for this user, or the working directory is closed to it"
    return f"could not start: {getattr(error, 'strerror', None) or type(error).__name__}"


class _Watch:
    """Watches one running process until it and, where it must end, its group is over."""

    def __init__(self, process: "subprocess.Popen[bytes]", outputs: Mapping[Any, _Output], stop: StopToken, deadline: float,
                 on_lasting: Callable[[int], None]):
        self._process, self._stop, self._deadline = process, stop, deadline
        self._on_lasting: Callable[[int], None] | None = on_lasting
        self._lasting_at = time.monotonic() + LASTING_S
        self._outputs = {pipe.fileno(): (pipe, output) for pipe, output in outputs.items()}
        self._poll = select.poll()
        for descriptor in (*self._outputs, stop.fileno()):
            self._poll.register(descriptor, select.POLLIN)
        # Where there is no pidfd (macOS, older kernels, strict containers), the exit is found by asking often.
        self._pidfd = -1
        with contextlib.suppress(AttributeError, OSError):
            self._pidfd = os.pidfd_open(process.pid)
        if self._pidfd >= 0:
            self._poll.register(self._pidfd, select.POLLIN)
        self._exited_at: float | None = None
        self._kill_at: float | None = None
        self.verdict: str | None = None

    def run(self) -> None:
        """Return when the leader has ended (not reaped), its output is read, and nobody who had to end is left."""
        while not self._is_over():
            self.turn()

    def close(self) -> None:
        """Give the descriptors back."""
        for pipe, _ in self._outputs.values():
            pipe.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)

    def turn(self) -> None:
        """Wait for one thing to happen, and deal with it."""
        for descriptor, _ in self._poll.poll(self._patience() * 1000):
            if descriptor in self._outputs:
                self._read(descriptor)
            elif descriptor == self._pidfd:
                self._note_exit()
            elif self.verdict is None and self._exited_at is None:
                self._terminate("stopped", at_once=self._stop.reason == "now")
            else:
                # Its byte stays unread, because wait() must see it too: from here on every turn looks at its reason.
                self._poll.unregister(descriptor)
        if self._pidfd < 0 and self._has_exited():
            self._note_exit()
        now = time.monotonic()
        if self._on_lasting and self._exited_at is None and now >= self._lasting_at:
            tell, self._on_lasting = self._on_lasting, None
            tell(self._process.pid)
        if self.verdict is None and self._exited_at is None and now >= self._deadline:
            self._terminate("timed_out", at_once=False)
        if self._kill_at is not None and (now >= self._kill_at or self._stop.reason == "now"):
            signal_group(self._process.pid, signal.SIGKILL)

    def _read(self, descriptor: int) -> None:
        pipe, output = self._outputs[descriptor]
        if chunk := os.read(descriptor, CHUNK_BYTES):
            output.feed(chunk)
            return
        self._poll.unregister(descriptor)
        del self._outputs[descriptor]
        pipe.close()

    def _has_exited(self) -> bool:
        if hasattr(os, "waitid"):
            return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        return self._process.poll() is not None

    def _note_exit(self) -> None:
        if self._exited_at is None:
            self._exited_at = time.monotonic()
            if self._pidfd >= 0:
                self._poll.unregister(self._pidfd)

    def _terminate(self, verdict: str, *, at_once: bool) -> None:
        self.verdict = verdict
        signal_group(self._process.pid, signal.SIGKILL if at_once else signal.SIGTERM)
        self._kill_at = time.monotonic() + (0.0 if at_once else KILL_AFTER_S)

    def _patience(self) -> float:
        if self._exited_at is not None or self._pidfd < 0:
            return 0.02
        if self._kill_at is not None:
            return min(0.1, max(0.001, self._kill_at - time.monotonic()))
        until = min(self._deadline, self._lasting_at) if self._on_lasting else self._deadline
        return min(60.0, max(0.001, until - time.monotonic()))

    @property
    def has_given_up(self) -> bool:
        """Return whether the group survived SIGKILL: it is not ours to signal (sudo), or stuck in the kernel."""
        return self._kill_at is not None and time.monotonic() >= self._kill_at + KILL_AFTER_S

    def _is_over(self) -> bool:
        if self._exited_at is None:
            return self.has_given_up
        if self.verdict is not None and is_group_alive(self._process.pid):
            return self.has_given_up
        return not self._outputs or time.monotonic() >= self._exited_at + DRAIN_S


def run_command(launch: Launch, log: DeploymentLog, masker: Masker, stop: StopToken, on_lasting: Callable[[int], None]) -> Result:
    """Run one command to its end and return what became of it. Blocks; the calling thread owns the process.

    `on_lasting(pid)` is called when it still runs after LASTING_S. A stop or the deadline ends the whole process group.
    """
    started_ms, started = now_ms(), time.monotonic()
    result = Result(phase=launch.phase, step=launch.step, name=launch.name, command=masker.mask_text(shlex.join(launch.argv)),
                    attempt=launch.attempt, status="not_started", exit_code=None, signal=None, started_ms=started_ms, duration_ms=0)
    try:
        process = _spawn_nicely(launch) if launch.nice else _spawn(launch)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return result._replace(note=_why_not_started(error, launch))
    assert process.stdout and process.stderr
    out, err = _Output(launch.phase, "out", log, masker), _Output(launch.phase, "err", log, masker)
    code: int | None = None
    try:
        outputs, deadline = {process.stdout: out, process.stderr: err}, started + launch.timeout_s
        with contextlib.closing(_Watch(process, outputs, stop, deadline, on_lasting)) as watch:
            watch.run()
    except BaseException:
        signal_group(process.pid, signal.SIGKILL)
        raise
    finally:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(DRAIN_S)
    if code is None:
        result = result._replace(note="could not be killed, and still runs; does it run as another user?")
    status = watch.verdict or ("succeeded" if code == 0 else "failed")
    return result._replace(status=status, exit_code=code if code is not None and code >= 0 else None,
                           signal=-code if code is not None and code < 0 else None,
                           duration_ms=int((time.monotonic() - started) * 1000), stdout=out.end(), stderr=err.end())


def kind_of(check: HttpCheck | SocketCheck) -> str:
    """Return the name of a check: http, tcp or unix."""
    return "http" if isinstance(check, HttpCheck) else "unix" if check.port is None else "tcp"


def run_check(check: HttpCheck | SocketCheck, step: int, stop: StopToken) -> Result:
    """Probe an HTTP, TCP or unix address once, without any program. Blocks for at most its timeout, or until a stop."""
    kind = kind_of(check)
    target = check.url if isinstance(check, HttpCheck) else check.host if check.port is None else f"{check.host}:{check.port}"
    started_ms, started = now_ms(), time.monotonic()
    # A thread of its own: neither a stop nor a deadline reaches into a resolver that waits for its DNS server.
    notes: list[str] = []
    read, write = os.pipe()
    try:
        threading.Thread(target=_note_probe, args=(check, notes, write), name="probe", daemon=True).start()
    except RuntimeError:  # the limit of the host, as a command meets it that cannot be started
        notes.append("failed: the host has no more threads")
        os.close(write)
    poll = select.poll()
    poll.register(read)
    poll.register(stop, select.POLLIN)
    try:
        poll.poll(check.timeout_s * 1000)
    finally:
        os.close(read)
    note = notes[0] if notes else "was stopped" if stop.reason else f"did not answer within {check.timeout_s:g} s"
    status = "succeeded" if not note else "failed" if notes or not stop.reason else "stopped"
    return Result(phase=Phase.HEALTHCHECK, step=step, name=kind, command=f"{kind} {target}", attempt=1, status=status,
                  exit_code=None, signal=None, started_ms=started_ms, duration_ms=int((time.monotonic() - started) * 1000), note=note)


def _note_probe(check: HttpCheck | SocketCheck, notes: list[str], write: int) -> None:
    """Add what a probe found to `notes`, "" if all is well, and close `write`."""
    try:
        notes.append(_probe_http(check) if isinstance(check, HttpCheck) else _probe_socket(check))
    except TimeoutError:
        notes.append(f"did not answer within {check.timeout_s:g} s")
    except (OSError, http.client.HTTPException, ValueError) as error:
        notes.append(f"failed: {getattr(error, 'strerror', None) or type(error).__name__}")
    finally:
        os.close(write)


def _probe_socket(check: SocketCheck) -> str:
    if check.port is not None:
        socket.create_connection((check.host, check.port), check.timeout_s).close()
        return ""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(check.timeout_s)
        client.connect(check.host)
    return ""


@contextlib.contextmanager
def hanging_up(link: socket.socket, deadline: float) -> Iterator[None]:
    """End a connection at a deadline, whatever is being read: its own timeout begins anew with every byte that drips in.

    Raises TimeoutError when that was reached.
    """
    is_over = StopToken()
    # TLS takes the socket's descriptor over; this one stays.
    with link.dup() as end:
        clock = threading.Thread(target=_hang_up, args=(end, is_over, deadline), name="hang up", daemon=True)
        clock.start()
        try:
            yield
        finally:
            is_over.set("over")
            clock.join()
            is_over.close()
            if time.monotonic() >= deadline:
                raise TimeoutError


def _hang_up(link: socket.socket, is_over: StopToken, deadline: float) -> None:
    if not is_over.wait(deadline - time.monotonic()):
        with contextlib.suppress(OSError):
            link.shutdown(socket.SHUT_RDWR)


def _probe_http(check: HttpCheck) -> str:
    parts = urllib.parse.urlsplit(check.url)
    deadline = time.monotonic() + check.timeout_s
    if parts.scheme == "https":
        if not hasattr(http.client, "HTTPSConnection"):
            return "failed: this Python has no ssl module"
        client: http.client.HTTPConnection = http.client.HTTPSConnection(parts.hostname or "", parts.port, timeout=check.timeout_s)
    else:
        client = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=check.timeout_s)
    with contextlib.closing(client):
        client.request("GET", urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, "")),
                       headers={"User-Agent": f"hookshot/{__version__}", "Connection": "close"})
        with hanging_up(client.sock, deadline):
            answer = client.getresponse()
            body = b""
            while check.contains is not None and len(body) < 1 << 16 and (piece := answer.read1(1 << 14)):
                body += piece
    if answer.status != check.status:
        return f"answered {answer.status}, not {check.status}"
    if check.contains is not None and check.contains.encode() not in body:
        return "answered without the expected text"
    return ""


# === 16. NOTIFY =======================================================================================================
# Tells people and programs what became of deployments. Owns the outbox's sender.
#
# 1. Moves and locks in the database become notices in the outbox in one transaction, so none is lost and none waits for a receiver.
# 2. One thread sends. A notice is tried until it is delivered, refused for good, or too old; its id stays the same.
# 3. Notices of one deployment reach a channel in their order; those of others do not wait for them.
# 4. What a deployment brought along is text, whatever the sink makes of text: no mention, no markup, no header.
# 5. Where a notice goes is the operator's word alone. Redirects are not followed, and what a receiver says is not kept.

# The next try comes after 1, 2, 4, ... seconds, half of it by chance, so that channels do not knock all at once.
_MAX_BACKOFF_S = 900.0
# After so many failures to reach a receiver at all, the whole channel waits, at most this long.
_UNREACHABLE_TRIES, _MAX_PAUSE_OF_CHANNEL_S = 3, 60.0
# Whatever Retry-After says: a receiver must not silence its channel for ever.
_MAX_RETRY_AFTER_S = 3600.0
_MOVES_PAGE, _HEADS = 200, 200
_SHUTDOWN_S = 2.0
# What is read of all that a mail server says.
_MAX_REPLIES_BYTES = 1 << 20
# For the answer to QUIT, when the mail is accepted already.
_FAREWELL_S = 2.0
_IDLE_NOTIFIER_S = 60.0
# Moves of this time become notices together: a transaction for each would slow deployments down.
_GATHER_S = 0.1
# Notices that one channel may have waiting: a receiver that is gone for good must not fill the disk.
_MAX_OUTBOX = 10_000
# What is told of an error: the start of it says most, and chats take a few thousand characters in all.
_ERROR_CHARS = 1000
# The mark up to which moves have become notices; empty while notifications are off, so that turning them on tells no history.
_CURSOR, _DATABASE_ID = "notified", "database_id"
# The same for locks. Their notices stand in the outbox as those of a deployment that there cannot be: in their order.
_LOCK_CURSOR, _LOCK_SEQ = "notified_locks", 0


class Notice(NamedTuple):
    """What there is to tell of one move, or of a lock; kept in the outbox as JSON."""

    event: str
    service: str
    image: str
    previous_image: str | None
    current_image: str | None
    deploy_id: str
    status: str
    at_ms: int
    error: str | None
    failure_stage: str | None
    duration_ms: int | None
    host: str
    request_id: str
    # Of a lock; an outbox of an older version lacks them.
    owner: str | None = None
    reason: str | None = None
    until: str | None = None


_OF_LOCK = ("event", "service", "at_ms", "host", "owner", "reason", "until")
_OF_DEPLOYMENT = tuple(name for name in Notice._fields if name not in ("owner", "reason", "until"))


def told_of(notice: Notice) -> dict[str, Any]:
    """Return what programs are told: the fields that its event has."""
    return {name: getattr(notice, name) for name in (_OF_LOCK if notice.event == "locked" else _OF_DEPLOYMENT)}


def notice_of_lock(lock: Lock, host: str) -> Notice:
    """Return what a lock is told as."""
    return Notice("locked", lock.service, "", None, None, "", "", lock.since_ms, None, None, None, host, "", lock.owner,
                  lock.reason, render_time(lock.until_ms))


def notice_of(move: Transition, host: str) -> Notice | None:
    """Return what a move is told as, or None."""
    deployment, is_end = move.deployment, move.state in TERMINAL
    event = COUNT_OF_STATE.get(move.state) or ("started" if move.state is State.VALIDATING else None)
    if not event:
        return None
    # The record is of now, the move may be an earlier one.
    return Notice(
        event, deployment.service, deployment.image, deployment.previous_image,
        {State.SUCCEEDED: deployment.image, State.ROLLED_BACK: deployment.previous_image}.get(move.state), deployment.deploy_id, move.state,
        move.at_ms, deployment.error and clip(deployment.error, _ERROR_CHARS) if is_end else None,
        deployment.failure_stage if is_end else None, deployment.duration_ms if is_end else None, host,
        deployment.trigger.request_id)


def parse_notice(text: str) -> Notice | None:
    """Return a notice of the outbox; None for what none of this version's is: nobody could make sense of it later either."""
    try:
        notice = Notice(*json.loads(text))
    except (ValueError, TypeError, RecursionError):
        return None
    has_texts = all(isinstance(value, str) for value in (notice.event, notice.service, notice.image, notice.deploy_id, notice.status, notice.host,
                                                           notice.request_id))
    return notice if has_texts and isinstance(notice.at_ms, int) and notice.event in NOTICE_EVENTS else None


# How bad it is, for channels with only_changes; what is not here changes nothing.
_SEVERITY = {"succeeded": 0, "failed": 1, "rolled_back": 1, "rollback_failed": 2}


def severity_after(event: str, before: int) -> int:
    """Return how bad it is with a service now: until it is green, as bad as it was at worst."""
    severity = _SEVERITY.get(event, before)
    return max(severity, before) if severity else 0


def wants(channel: Channel, notice: Notice, severity_before: int) -> bool:
    """Return whether a channel is told of this."""
    if notice.event not in channel.events or (channel.services and notice.service not in channel.services):
        return False
    return not channel.only_changes or severity_after(notice.event, severity_before) != severity_before


def message_id_of(database_id: str, facts: Sequence[object], channel: str) -> str:
    """Return the id of a notice: the same if the outbox has to be made again from the same facts, and no other's."""
    told = "\n".join((database_id, *map(str, facts), channel))
    return f"msg_{hashlib.sha256(told.encode()).hexdigest()[:24]}"


# --- words

_HEADLINES = {
    "started": "{service}: deploying {image}", "succeeded": "{service}: {image} is live", "failed": "{service}: {image} failed",
    "rolled_back": "{service}: {image} failed, back on {previous_image}",
    "rollback_failed": "{service}: {image} failed, and so did the rollback", "cancelled": "{service}: {image} was cancelled",
    "locked": "{service}: locked by {owner}",
    "test": "hookshot on {host}: this is a test"}
_COLOURS = {"started": "#6b7280", "succeeded": "#2e7d32", "failed": "#c62828", "rolled_back": "#ef6c00", "rollback_failed": "#b71c1c",
            "cancelled": "#6b7280", "locked": "#6b7280", "test": "#1565c0"}
# As ntfy counts: 1 (least) to 5.
_PRIORITIES_OF_EVENTS = {"started": 2, "succeeded": 3, "failed": 4, "rolled_back": 4, "rollback_failed": 5, "cancelled": 3, "locked": 3, "test": 3}


def headline(notice: Notice) -> str:
    """Return a notice in one line, without control characters."""
    return _visible(clip(_HEADLINES[notice.event].format_map(notice._asdict()), 400))


def facts_of(notice: Notice) -> list[tuple[str, str]]:
    """Return what is known, by name, without control characters."""
    facts = [("Error", notice.error), ("Stage", notice.failure_stage), ("Image", notice.image), ("Previous image", notice.previous_image),
             ("Took", None if notice.duration_ms is None else render_duration(notice.duration_ms)), ("Deployment", notice.deploy_id),
             ("Reason", notice.reason), ("Until", notice.until), ("Host", notice.host)]
    return [(name, _visible(value)) for name, value in facts if value]


def _visible(text: str) -> str:
    """Return `text` without control characters, and without halves of characters, which no encoding has."""
    return escape_controls(text).encode("utf-8", "backslashreplace").decode()


def _plain_words(notice: Notice) -> str:
    return "\n".join(f"{name}: {value}" for name, value in facts_of(notice))


# --- what each kind of receiver takes


class Post(NamedTuple):
    """One HTTP POST."""

    url: str
    headers: dict[str, str]
    body: bytes


def _post_json(url: str, document: object, headers: Mapping[str, str] = {}) -> Post:
    return Post(url, {"Content-Type": "application/json", **headers}, render_json(document))


def _bearer(channel: Channel) -> dict[str, str]:
    return {"Authorization": f"Bearer {channel.token}"} if channel.token else {}


def build_json(notice: Notice, channel: Channel, message_id: str, at_s: int) -> Post:
    """Return our own JSON in the shape that Standard Webhooks recommends, signed if there is a key."""
    data = {name: value for name, value in told_of(notice).items() if name not in ("event", "at_ms")}
    kind = "service" if notice.event == "locked" else "deployment"
    post = _post_json(channel.url, {"type": f"{kind}.{notice.event}", "timestamp": render_time(notice.at_ms), "data": data}, _bearer(channel))
    signed = sign_webhook(channel.signing_key.encode(), post.body, message_id, at_s) if channel.signing_key else {
        "webhook-id": message_id, "webhook-timestamp": str(at_s)}
    return post._replace(headers=post.headers | signed)


def _clip_bytes(text: str, limit: int, encoding: str) -> str:
    """Return `text` clipped to so many bytes of an encoding; a character is not cut in two."""
    content = text.encode(encoding, "replace")
    return text if len(content) <= limit else content[:limit - len("…".encode(encoding))].decode(encoding, "ignore") + "…"


def build_slack(notice: Notice, channel: Channel, message_id: str, at_s: int) -> Post:
    """Return a message of Slack (Mattermost and others take it too): values as plain_text, where no markup and no mention is read.

    Outside Slack "@all" is a mention; a zero-width space keeps it from being one.
    """
    fields = [{"type": "plain_text", "text": _clip_bytes(f"{name}\n{value}", 2 * 2000, "utf-16-le"), "emoji": False} for name, value in facts_of(notice)]
    text = headline(notice).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("@", "@\u200b")
    return _post_json(channel.url, {
        "text": text, "mrkdwn": False, "link_names": False,
        "attachments": [{"color": _COLOURS[notice.event], "fallback": text, "blocks": [{"type": "section", "fields": fields}]}]})


_DISCORD_MARKUP = str.maketrans({character: f"\\{character}" for character in "\\*_~`|>#-+[]()<@:"})


def build_discord(notice: Notice, channel: Channel, message_id: str, at_s: int) -> Post:
    """Return a message of Discord, its markup escaped, and no mention allowed."""
    # Counted in units of UTF-16, in which JavaScript counts.
    fields = [{"name": name, "value": _clip_bytes(value.translate(_DISCORD_MARKUP), 2 * 1024, "utf-16-le"), "inline": name not in ("Error", "Deployment")}
              for name, value in facts_of(notice)]
    return _post_json(channel.url, {"allowed_mentions": {"parse": []}, "embeds": [{
        "title": _clip_bytes(headline(notice).translate(_DISCORD_MARKUP), 2 * 256, "utf-16-le"), "color": int(_COLOURS[notice.event][1:], 16), "fields": fields,
        "timestamp": render_time(notice.at_ms)}]})


def build_teams(notice: Notice, channel: Channel, message_id: str, at_s: int) -> Post:
    """Return an Adaptive Card for a Teams workflow; text runs, because text blocks would read Markdown."""
    lines = [[{"type": "TextRun", "text": headline(notice), "weight": "Bolder", "size": "Medium"}]]
    lines += [[{"type": "TextRun", "text": f"{name}: ", "weight": "Bolder"}, {"type": "TextRun", "text": value}] for name, value in facts_of(notice)]
    card = {"$schema": "http://adaptivecards.io/schemas/adaptive-card.json", "type": "AdaptiveCard", "version": "1.4",
            "body": [{"type": "RichTextBlock", "inlines": runs} for runs in lines]}
    return _post_json(channel.url, {"type": "message", "attachments": [
        {"contentType": "application/vnd.microsoft.card.adaptive", "contentUrl": None, "content": card}]})


def build_telegram(notice: Notice, channel: Channel, message_id: str, at_s: int) -> Post:
    """Return a message of a Telegram bot: no parse_mode, so no markup; a zero-width space keeps "@name" from being a mention."""
    # 4096 is the limit; counted in units of UTF-16, as Telegram counts positions.
    text = _clip_bytes(f"{headline(notice)}\n\n{_plain_words(notice)}".replace("@", "@\u200b"), 2 * 4096, "utf-16-le")
    base = channel.url or "https://api.telegram.org"
    return _post_json(f"{base.rstrip('/')}/bot{channel.token}/sendMessage", {
        "chat_id": channel.chat_id, "text": text, "link_preview_options": {"is_disabled": True}})


def build_ntfy(notice: Notice, channel: Channel, message_id: str, at_s: int) -> Post:
    """Return a message of ntfy as JSON, because its headers would have to carry our text."""
    base, _, topic = channel.url.rstrip("/").rpartition("/")
    # A message beyond 4096 bytes would become an attachment, and a document beyond 8192 is refused; quoting may double it.
    return _post_json(f"{base}/", {"topic": topic, "title": _clip_bytes(headline(notice), 400, "utf-8"),
                                   "message": _clip_bytes(_plain_words(notice), 3400, "utf-8"), "priority": _PRIORITIES_OF_EVENTS[notice.event]}, _bearer(channel))


def build_gotify(notice: Notice, channel: Channel, message_id: str, at_s: int) -> Post:
    """Return a message of Gotify, shown as plain text."""
    document = {"title": headline(notice), "message": _plain_words(notice), "priority": 2 * _PRIORITIES_OF_EVENTS[notice.event],
                "extras": {"client::display": {"contentType": "text/plain"}}}
    return _post_json(f"{channel.url.rstrip('/')}/message", document, {"X-Gotify-Key": channel.token})


_BUILDERS: dict[str, Callable[[Notice, Channel, str, int], Post]] = {
    "json": build_json, "slack": build_slack, "discord": build_discord, "teams": build_teams, "telegram": build_telegram, "ntfy": build_ntfy,
    "gotify": build_gotify}
_FORMAT_OF_URL = (
    (re.compile(r"https://discord(?:app)?\.com/api/webhooks/.*/slack"), "slack"),
    (re.compile(r"https://(?:[a-z]+\.)?discord(?:app)?\.com/api/(?:v\d+/)?webhooks/.*"), "discord"),
    (re.compile(r"https://hooks\.slack(?:-gov)?\.com/.*"), "slack"),
    (re.compile(r"https://[^/]+\.(?:webhook\.office\.com|logic\.azure\.com|api\.powerplatform\.com)(?::\d+)?/.*"), "teams"))


def format_of(channel: Channel) -> str:
    """Return how a channel's notices are written: as its type or its format says, else as its URL does."""
    if channel.type != "webhook":
        return channel.type
    if channel.format != "auto":
        return channel.format
    return next((name for pattern, name in _FORMAT_OF_URL if pattern.fullmatch(channel.url)), "json")


def build_mail(notice: Notice, channel: Channel, message_id: str) -> Any:
    """Return an email.message.EmailMessage; its class refuses line breaks in headers, and the texts have none."""
    import email.message
    import email.utils

    mail = email.message.EmailMessage()
    mail["Subject"] = clip(headline(notice), 200)
    mail["From"], mail["To"] = channel.sender, ", ".join(channel.recipients)
    mail["Date"] = email.utils.formatdate(notice.at_ms / 1000)
    mail["Message-ID"] = f"<{message_id}@{re.sub('[^A-Za-z0-9.-]', '-', notice.host) or 'localhost'}>"
    # RFC 3834: nobody's out-of-office message shall answer it.
    mail["Auto-Submitted"] = "auto-generated"
    # What is not ASCII would otherwise go out as 8-bit content, which smtplib does not announce and a server need not take.
    mail.set_content(f"{headline(notice)}\n\n{_plain_words(notice)}\n", cte="quoted-printable")
    return mail


# --- channels


def reveal(text: str, secrets_by_name: Mapping[str, bytes]) -> str:
    """Return a value of the file, or the secret that it names as "secret:NAME" ("" if there is none)."""
    name = secret_named(text)
    return secrets_by_name.get(name, b"").decode("utf-8", "replace").strip() if name else text


def channels_of(notifications: Notifications, secrets_by_name: Mapping[str, bytes]) -> tuple[Channel, ...]:
    """Return every channel with its secrets in place, those of [notifications.webhook] first; none if notifications are off."""
    if not notifications.enabled:
        return ()
    channels = [*webhook_channels(notifications.webhook, secrets_by_name), *notifications.channel]
    return tuple(channel._replace(**{name: reveal(getattr(channel, name), secrets_by_name) for name in SECRET_KEYS}) for channel in channels)


def webhook_channels(webhook: NoticeWebhook, secrets_by_name: Mapping[str, bytes]) -> Iterator[Channel]:
    """Yield what [notifications.webhook] stands for: a channel for each URL."""
    empty = Channel(**{name: None for name in Channel._fields})
    for name, events in EVENTS_OF_WEBHOOK.items():
        url = getattr(webhook, name)
        # The second is the name that Hookshot 1.0 looked for.
        named = [secret for secret in (f"webhook_{name}", f"notifications.webhook.{name}") if secret in secrets_by_name]
        if webhook.use_secrets and named:
            url = f"secret:{named[0]}"
        if url:
            yield empty._replace(name=f"webhook.{name}", type="webhook", url=url, events=events, services=(), only_changes=False, token="", password="",
                                 timeout=webhook.timeout, format=webhook.format, signing_key=webhook.signing_key, allow_private=webhook.allow_private)


def check_channels(notifications: Notifications, secrets_by_name: Mapping[str, bytes], place: Place) -> None:
    """Add what is wrong with channels now that their secrets are known; no message has a URL or a token in it."""
    channels = channels_of(notifications._replace(enabled=True), secrets_by_name)
    # Also one whose secret is missing, which is told by its name elsewhere.
    to_be_signed = {channel.name for channel in (*webhook_channels(notifications.webhook, secrets_by_name), *notifications.channel) if channel.signing_key}
    if notifications.enabled != bool(channels):
        (place / "enabled").warning("is false, so nothing is sent" if channels else "is true, but there is no channel")
    for channel in channels if notifications.enabled else ():
        where = place._replace(path=f'{place.path}: channel "{channel.name}"')
        if channel.url and not _is_plain_url(channel.url):
            where.problem("its URL is not a plain http:// or https:// URL")
        elif channel.type == "ntfy" and not urllib.parse.urlsplit(channel.url).path.strip("/"):
            where.problem("its URL names no topic; write https://ntfy.sh/TOPIC")
        elif channel.url.startswith("http://") and not _is_written_private(channel.url) and not channel.allow_private:
            where.warning("its URL is plain HTTP: what is sent can be read on the way")
        if (channel.url.startswith("https://") or channel.type == "telegram" or channel.security not in (None, "none")) and not ssl:
            where.problem("needs Python's ssl module, which this Python lacks")
        if channel.server and not 0 < int(channel.server.rpartition(":")[2]) < 65536:
            where.problem("its server has no port from 1 to 65535")
        if channel.password and not channel.username:
            where.problem("its password has no effect without a username")
        elif channel.password and channel.security == "none" and not _is_no_name(channel.server.rpartition(":")[0]):
            where.warning('its password can be read on the way; security is "none"')
        if channel.token and not (channel.token.isascii() and channel.token.isprintable()):
            where.problem("its token has characters that no header can have")
        if channel.signing_key and (problem := check_webhook_key(channel.signing_key.encode())):
            where.problem(f"its signing_key {problem}")
        elif format_of(channel) == "json" and channel.name not in to_be_signed and channel.type == "webhook":
            where.warning("its notices are not signed; name a secret in signing_key")
        if channel.type == "webhook" and format_of(channel) != "json" and (channel.signing_key or channel.token):
            where.problem(f"signing_key and token have no effect in the format of {format_of(channel)}; remove them")


_URL = re.compile(r"https?://(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?(?:/[!-~]*)?", re.ASCII)


def _is_plain_url(url: str) -> bool:
    """Return whether this is http:// or https:// with a host, perhaps a port and a path, and nothing else."""
    try:
        return bool(_URL.fullmatch(url)) and urllib.parse.urlsplit(url).port != 0
    except ValueError:  # a port beyond 65535, brackets around what is no address
        return False


def _is_written_private(url: str) -> bool:
    """Return whether a URL has an address, or localhost, in place of a name: then the operator knows where it leads."""
    return _is_no_name(urllib.parse.urlsplit(url).hostname or "")


def _is_no_name(host: str) -> bool:
    """Return whether a host is an address (however it is spelled: 127.1 and 0x7f000001 are too) or localhost."""
    try:
        return host == "localhost" or parse_address(host) is not None or bool(socket.inet_aton(host))
    except OSError:
        return False


# --- sending


class Attempt(NamedTuple):
    """What came of one attempt: "delivered", "retried" (it is worth another) or "refused"; and whether anyone answered."""

    outcome: str
    words: str
    retry_after_s: float | None = None
    was_reached: bool = True


def dial(host: str, port: int, deadline: float, *, may_be_private: bool) -> socket.socket:
    """Return a connection to a host; OSError says why not. The address that is checked is the one that is connected to.

    A name that leads into a private network is refused unless the operator allows it: names can be changed by others.
    Its addresses share the time until the deadline (monotonic), so that one that is silent leaves some to the next.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    allowed = [entry for entry in found if may_be_private or is_public(parse_address(str(entry[4][0])))]
    if not allowed:
        raise PermissionError(errno.EACCES, "its name leads to a private address; set allow_private = true if that is meant")
    error: OSError = OSError(errno.EHOSTUNREACH, os.strerror(errno.EHOSTUNREACH))
    for left, (family, kind, protocol, _, address) in zip(range(len(allowed), 0, -1), allowed):
        link = socket.socket(family, kind, protocol)
        try:
            # Never 0, which would mean not to wait at all.
            link.settimeout(max(0.001, (deadline - time.monotonic()) / left))
            link.connect(address)
            link.settimeout(max(0.001, deadline - time.monotonic()))
            return link
        except OSError as failure:
            link.close()
            error = failure
    raise error


def send_post(post: Post, timeout_s: float, *, allow_private: bool) -> Attempt:
    """POST once, without following redirects; the answer's body is not read."""
    parts = urllib.parse.urlsplit(post.url)
    is_tls, host = parts.scheme == "https", parts.hostname or ""
    deadline = time.monotonic() + timeout_s
    try:
        link = dial(host, parts.port or (443 if is_tls else 80), deadline, may_be_private=allow_private or _is_written_private(post.url))
        with contextlib.closing(link), hanging_up(link, deadline):
            client = http.client.HTTPConnection(host, parts.port, timeout=timeout_s)
            client.sock = ssl.create_default_context().wrap_socket(link, server_hostname=host) if is_tls else link
            with contextlib.closing(client):
                client.request("POST", f"{parts.path or '/'}{'?' * bool(parts.query)}{parts.query}", post.body,
                               {"Host": parts.netloc, "User-Agent": f"hookshot/{__version__}", "Connection": "close", **post.headers})
                answer = client.getresponse()
                return judge_answer(answer.status, answer.getheader("Retry-After"), now_ms())
    except TimeoutError:
        return Attempt("retried", f"no answer within {timeout_s:g} s", was_reached=False)
    except (OSError, http.client.HTTPException, ValueError) as error:
        return Attempt("retried", _why_unreachable(error), was_reached=False)


# By OpenSSL's X509_V_ERR codes (x509_vfy.h): not yet valid, expired, another name, another address.
VERIFY_ADVICE = {9: "check this host's clock", 10: "have it renewed", 62: "use a name that it has", 64: "use a name or an address that it has"}


def _why_unreachable(error: Exception) -> str:
    """Return a reason in words of ours: the text of an error could hold what a receiver said."""
    if why := getattr(error, "verify_message", None):
        return f"its certificate is not trusted: {why.rstrip('.')}; {VERIFY_ADVICE.get(getattr(error, 'verify_code', 0), 'SSL_CERT_FILE names other authorities')}"
    if getattr(error, "reason", None) == "WRONG_VERSION_NUMBER":
        return "it does not speak TLS on this port"
    if isinstance(error, http.client.BadStatusLine) and not isinstance(error, http.client.RemoteDisconnected):
        return "it does not speak HTTP on this port"
    return getattr(error, "strerror", None) or {"RemoteDisconnected": "it closed without an answer"}.get(type(error).__name__, type(error).__name__)


def judge_answer(status: int, retry_after: str | None, at_ms: int) -> Attempt:
    """Return what an HTTP status means for a notice: 2xx delivered, 5xx, 408, 425 and 429 worth another try, the rest final."""
    words = f"HTTP {status}"
    if 200 <= status < 300:
        return Attempt("delivered", words)
    # Below 200: not the answer yet, and this client takes no other.
    if status < 200 or status >= 500 or status in (408, 425, 429):
        return Attempt("retried", words, parse_retry_after(retry_after, at_ms))
    return Attempt("refused", f"{words}; redirects are not followed" if 300 <= status < 400 else words)


def parse_retry_after(header: str | None, at_ms: int) -> float | None:
    """Return the seconds that a Retry-After header asks for, in seconds or as a date (RFC 9110, 10.2.3); None without a good one."""
    import email.utils

    if header is None:
        return None
    if re.fullmatch(r"\d{1,9}", header.strip(), re.ASCII):
        return min(float(header), _MAX_RETRY_AFTER_S)
    try:
        moment = email.utils.parsedate_to_datetime(header)
        return min(max(0.0, moment.timestamp() - at_ms / 1000), _MAX_RETRY_AFTER_S)
    except (ValueError, TypeError, OverflowError):
        return None


class _Bounded:
    """The lines of a file that ends after so many bytes, however much there is."""

    def __init__(self, file: Any, limit: int):
        self._file, self._left = file, limit
        self.close = file.close

    def readline(self, limit: int) -> bytes:
        """Return the next line, b"" at the end."""
        line: bytes = self._file.readline(min(limit, self._left))
        self._left -= len(line)
        return line


def send_mail(mail: Any, channel: Channel) -> Attempt:
    """Hand a message to the channel's mail server once."""
    import smtplib

    host, _, port = channel.server.rpartition(":")
    host = host.strip("[]")
    deadline = time.monotonic() + channel.timeout
    may_be_private = channel.allow_private or _is_no_name(host)

    class Client(smtplib.SMTP):
        """Connects to the address that was checked, and for no longer than all may take."""

        def __init__(self) -> None:
            # Named, because otherwise the library asks DNS for this host's name, which takes seconds without a network.
            super().__init__(timeout=channel.timeout, local_hostname="localhost")
            # What the library checks the certificate against after STARTTLS.
            self._host = host

        def _get_socket(self, host: str, port: int, timeout: float) -> socket.socket:
            link = dial(host, port, deadline, may_be_private=may_be_private)
            ends.enter_context(hanging_up(link, deadline))
            return ssl.create_default_context().wrap_socket(link, server_hostname=host) if channel.security == "tls" else link

        def getreply(self) -> tuple[int, bytes]:
            # The library keeps every line of a reply, and a reply may have any number of them.
            if self.file is None and self.sock:
                self.file = _Bounded(self.sock.makefile("rb"), _MAX_REPLIES_BYTES)
            return super().getreply()

    accepted = None
    try:
        with contextlib.ExitStack() as ends:
            client = Client()
            ends.callback(client.close)
            code, _ = client.connect(host, int(port))
            if code != 220:
                return _judge_reply(code, "the connection")
            client.ehlo_or_helo_if_needed()
            if channel.security == "starttls":
                client.starttls(context=ssl.create_default_context())
            if channel.username:
                client.login(channel.username, channel.password)
            refused = client.send_message(mail, channel.sender, channel.recipients)
            # It is accepted, whatever becomes of the farewell.
            accepted = Attempt("delivered", f"accepted, but for {len(refused)} recipients" if refused else "accepted")
            client.sock.settimeout(_FAREWELL_S)
            client.quit()
    except TimeoutError:
        return accepted or Attempt("retried", f"no answer within {channel.timeout} s", was_reached=False)
    except smtplib.SMTPRecipientsRefused as error:
        return _judge_reply(min(code for code, _ in error.recipients.values()), "every recipient")
    except smtplib.SMTPAuthenticationError as error:
        return _judge_reply(error.smtp_code, "the login")
    except smtplib.SMTPResponseException as error:
        return accepted or _judge_reply(error.smtp_code, "the mail")
    except smtplib.SMTPNotSupportedError:
        return Attempt("refused", f"the server does not offer what is asked for (security = \"{channel.security}\", a login)")
    except (OSError, ValueError) as error:  # SMTPException is an OSError
        return accepted or Attempt("retried", _why_unreachable(error), was_reached=False)
    return accepted


def _judge_reply(code: int, what: str) -> Attempt:
    """Return what an SMTP reply means: 4xx is worth another try (RFC 5321, 4.2.1)."""
    return Attempt("refused" if code >= 500 else "retried", f"{what} was refused with SMTP {code}")


def run_notice_command(notice: Notice, channel: Channel, environ: Mapping[str, str]) -> Attempt:
    """Run the channel's command, the notice as JSON on its standard input and as HOOKSHOT_* in its environment."""
    env = {name: value for name, value in environ.items() if SAFE_ENV.fullmatch(name)}
    env.setdefault("PATH", DEFAULT_PATH)
    env |= {f"HOOKSHOT_{name.upper()}": str(value).encode("utf-8", "replace").decode() for name, value in told_of(notice).items() if value is not None and "\0" not in str(value)}
    env["HOOKSHOT_MESSAGE"] = headline(notice)
    try:
        process = subprocess.Popen(channel.command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env,
                                   cwd="/", start_new_session=True)
    except OSError as error:
        return Attempt("retried", f"cannot be started: {error.strerror}", was_reached=False)
    try:
        process.communicate(render_json(told_of(notice)), timeout=channel.timeout)
    except subprocess.TimeoutExpired:
        end_groups([process.pid])
        process.wait()
        return Attempt("retried", f"did not end within {channel.timeout} s", was_reached=False)
    except OSError:  # it does not read its input, which is its own affair
        process.wait()
    return Attempt("delivered", "exit status 0") if process.returncode == 0 else Attempt("retried", f"exit status {process.returncode}")


def send_notice(notice: Notice, channel: Channel, message_id: str, environ: Mapping[str, str]) -> Attempt:
    """Try once to deliver a notice."""
    if channel.type == "exec":
        return run_notice_command(notice, channel, environ)
    if channel.type == "email":
        return send_mail(build_mail(notice, channel, message_id), channel)
    post = _BUILDERS[format_of(channel)](notice, channel, message_id, now_ms() // 1000)
    return send_post(post, channel.timeout, allow_private=channel.allow_private)


class _Patience:
    """How long a channel waits because its receiver cannot be reached, or asked for time."""

    def __init__(self) -> None:
        self.until, self._failures = 0.0, 0

    def note(self, attempt: Attempt, now: float) -> None:
        """Learn from an attempt."""
        self._failures = 0 if attempt.was_reached else self._failures + 1
        if attempt.retry_after_s:
            self.until = now + attempt.retry_after_s
        elif self._failures >= _UNREACHABLE_TRIES:
            self.until = now + with_jitter(min(_MAX_PAUSE_OF_CHANNEL_S, 2.0 ** (self._failures - _UNREACHABLE_TRIES)))


class Notifier:
    """Turns moves into notices, and sends them. run() in a thread of its own; note(), wake() and stop() from any thread."""

    def __init__(self, store: Store, read: Callable[[], tuple[Notifications, Mapping[str, bytes]]], publish: Publish, environ: Mapping[str, str]):
        """`read` returns what is in force: the configuration and the secrets."""
        self._store, self._read, self._publish, self._environ = store, read, publish, dict(environ)
        self._host = socket.gethostname()
        self._news, self._is_stopping = threading.Event(), threading.Event()
        self._stop_at = float("inf")
        # Whether there are moves that have not become notices, and before when nobody looks.
        self._is_behind, self._collect_at = True, 0.0
        # How many notices wait, by channel.
        self._pending: collections.Counter[str] = collections.Counter()
        self._marks: dict[str, str] | None = None
        self._known: tuple[Any, Any] = (None, None)
        self._channels: dict[str, Channel] = {}
        self._patience: dict[str, _Patience] = {}
        # Notices that are due, by channel: of different deployments, so that one does not have to wait for another.
        self._heads: dict[str, collections.deque[Outgoing]] = {}
        # When a notice that failed may be tried again (monotonic), by channel and its number. A restart tries them all at once.
        self._due: dict[str, dict[int, float]] = {}
        # Notices that are done with, but could not be removed: a full disk must not have them sent for ever.
        self._done: set[int] = set()

    def note(self, event: Event) -> None:
        """Take notice of a move or a lock."""
        if self._channels and (isinstance(event, Moved) or (isinstance(event, Controlled) and event.action == "lock")):
            self._is_behind = True
            self._news.set()

    def wake(self) -> None:
        """Look at the configuration and for new moves now."""
        self._is_behind, self._collect_at = True, 0.0
        self._news.set()

    def stop(self) -> None:
        """End run() soon: what is due is still sent, as far as a moment suffices."""
        self._stop_at = time.monotonic() + _SHUTDOWN_S
        self._is_stopping.set()
        self._news.set()

    def prepare(self) -> None:
        """Note where telling begins: what moves from now on is told. Before run(), which does it where the disk is full now."""
        with contextlib.suppress(HookshotError):
            self._take_configuration()

    def run(self) -> None:
        """Send until stop()."""
        is_in_trouble = False
        while True:
            try:
                wait_s, pause_s, is_in_trouble = self.turn(time.monotonic()), _GATHER_S, False
            except HookshotError as error:
                if not is_in_trouble:
                    self._publish(Trouble("notices_failed", f"notices wait until the outbox can be used: {error.sentence}"))
                self._is_behind, is_in_trouble, wait_s, pause_s = True, True, 1.0, 1.0
            except Exception as error:
                if time.monotonic() >= self._stop_at:
                    return  # it was waiting for a receiver, and the database has been closed meanwhile
                self._publish(Broken("notifier", error))
                self._is_behind, wait_s, pause_s = True, 5.0, 5.0
            if time.monotonic() >= self._stop_at or (self._is_stopping.is_set() and wait_s > 0):
                return
            if self._is_behind:
                # Maybe since a moment ago, and then the turn has answered with how long it would wait for nothing.
                self._is_stopping.wait(min(wait_s, pause_s))
            elif self._news.wait(wait_s):
                self._news.clear()

    def turn(self, now: float) -> float:
        """Make notices of new moves, try one notice of each channel; return the seconds until there is something to do."""
        self._take_configuration()
        if self._is_behind and (now >= self._collect_at or self._is_stopping.is_set()):
            self._is_behind, self._collect_at = False, now + _GATHER_S
            self._collect()
        for number in tuple(self._done):
            self._store.take_notice(number)
            self._done.discard(number)
        wait_s = self._collect_at - now if self._is_behind else _IDLE_NOTIFIER_S
        for channel in self._channels.values():
            wait_s = min(wait_s, self._turn_of(channel, now))
        return max(0.0, wait_s)

    # --- from moves to notices

    def _take_configuration(self) -> None:
        """Follow the configuration; what waits for a channel that is gone is dropped, and said so."""
        read = self._read()
        if self._marks is None:
            self._marks = self._store.marks()
        if read[0] is self._known[0] and read[1] is self._known[1]:
            return
        channels = {channel.name: channel for channel in channels_of(*read)}
        if not channels and self._marks.get(_CURSOR) != "":
            self._mark({_CURSOR: "", _LOCK_CURSOR: ""})
        elif channels and not self._marks.get(_CURSOR):
            self._mark({_CURSOR: str(self._store.last_move()), _LOCK_CURSOR: str(self._store.last_locking())})
        self._pending = collections.Counter(self._store.outbox_counts())
        for name, number in tuple(self._pending.items()):
            if name not in channels:
                del self._pending[name]
                self._store.drop_channel(name)
                self._publish(Trouble("notices_dropped", f"{number} notices for channel {name} are dropped: it is not configured any more"))
        self._patience = {name: self._patience.get(name, _Patience()) if self._channels.get(name) == channel else _Patience()
                          for name, channel in channels.items()}
        self._heads = {name: collections.deque() for name in channels}
        self._due = {name: self._due.get(name, {}) for name in channels}
        self._channels, self._known = channels, read

    def _mark(self, marks: Mapping[str, str], notices: Sequence[Outgoing] = ()) -> None:
        assert self._marks is not None
        self._store.enqueue(notices, marks)
        self._marks |= marks
        self._pending.update(notice.channel for notice in notices)
        for name in {notice.channel for notice in notices}:
            # A tenth more, so that there is something to do only now and then.
            if self._pending[name] > _MAX_OUTBOX * 1.1:
                gave_way = self._store.trim_outbox(name, _MAX_OUTBOX)
                self._pending[name] -= gave_way
                oldest = min((head.id for head in self._store.next_notices(name, 1)), default=0)
                self._due[name] = {number: at for number, at in self._due[name].items() if number >= oldest}
                self._publish(Trouble("notices_dropped", f"the {gave_way} oldest notices for channel {name} are dropped: it has taken none for too long"))

    def _collect(self) -> None:
        """Make notices of the moves since the last time, a page a transaction."""
        while self._channels and self._marks and (page := self._store.moves_after(int(self._marks[_CURSOR]), _MOVES_PAGE)):
            marks, notices = {_CURSOR: str(page[-1].id)}, []
            for move in page:
                if notice := notice_of(move, self._host):
                    facts = (move.id, move.deployment.deploy_id, move.state, move.at_ms)
                    notices += self._notices_for(facts, move.deployment.seq, notice, marks)
            self._mark(marks, notices)
        while self._channels and self._marks and (locks := self._store.lockings_after(int(self._marks.get(_LOCK_CURSOR) or 0), _MOVES_PAGE)):
            marks, notices = {_LOCK_CURSOR: str(locks[-1][0])}, []
            for number, lock in locks:
                notices += self._notices_for(("lock", number, lock.service, lock.since_ms), _LOCK_SEQ, notice_of_lock(lock, self._host), marks)
            self._mark(marks, notices)

    def _notices_for(self, facts: Sequence[object], seq: int, notice: Notice, marks: dict[str, str]) -> list[Outgoing]:
        assert self._marks is not None
        mark = f"severity:{notice.service}"
        before = int(marks.get(mark) or self._marks.get(mark) or 0)
        if (after := severity_after(notice.event, before)) != before:
            marks[mark] = str(after)
        text, clock = json.dumps(notice), clock_reading()
        return [Outgoing(0, channel.name, seq, message_id_of(self._marks[_DATABASE_ID], facts, channel.name), text, now_ms(), clock)
                for channel in self._channels.values() if wants(channel, notice, before)]

    # --- sending

    def _turn_of(self, channel: Channel, now: float) -> float:
        """Try the first notice of a channel that is due; return the seconds until the next one is."""
        patience = self._patience[channel.name]
        if patience.until > now:
            return patience.until - now
        heads = self._heads[channel.name]
        if not heads:
            found = [head for head in self._store.next_notices(channel.name, _HEADS + len(self._due[channel.name])) if head.id not in self._done]
            due = self._due[channel.name]
            heads.extend(head for head in found if due.get(head.id, 0.0) <= now)
            if not heads:
                return min([due[head.id] - now for head in found], default=_IDLE_NOTIFIER_S)
        self._try(channel, heads.popleft(), patience)
        return max(0.0, patience.until - time.monotonic())

    def _try(self, channel: Channel, sent: Outgoing, patience: _Patience) -> None:
        notice = parse_notice(sent.notice)
        attempt = self._attempt(notice, channel, sent) if notice else Attempt("refused", "what is kept in the outbox is no notice")
        patience.note(attempt, time.monotonic())
        age_s = elapsed_ms(sent.clock, clock_reading(), wall_ms=now_ms() - sent.created_ms) / 1000
        outcome = "expired" if attempt.outcome == "retried" and age_s >= self._read()[0].retry_for else attempt.outcome
        message = _describe(channel.name, notice, outcome, attempt, sent.attempts + 1)
        self._publish(Notified(channel.name, outcome, notice.deploy_id if notice else "", notice.request_id if notice else "",
                               sent.message_id, message))
        if outcome != "retried":
            self._pending[channel.name] -= 1
            self._due[channel.name].pop(sent.id, None)
            self._done.add(sent.id)
            self._store.take_notice(sent.id)
            self._done.discard(sent.id)
            return
        self._due[channel.name][sent.id] = time.monotonic() + max(attempt.retry_after_s or 0.0, with_jitter(min(_MAX_BACKOFF_S, 2.0 ** min(sent.attempts, 20))))
        self._store.count_attempt(sent.id)

    def _attempt(self, notice: Notice, channel: Channel, sent: Outgoing) -> Attempt:
        """Try to send; a bug that one notice or one channel brings out must not keep the others waiting."""
        try:
            return send_notice(notice, channel, sent.message_id, self._environ)
        except Exception as error:
            self._publish(Broken("notifier", error, notice.request_id, notice.deploy_id))
            return Attempt("retried", "a bug, its trace is in the log", was_reached=False)


def _describe(channel: str, notice: Notice | None, outcome: str, attempt: Attempt, tries: int) -> str:
    words = {"delivered": "told", "retried": "could not tell", "refused": "was refused by", "expired": "gives up telling"}[outcome]
    after = {"retried": "; it will be tried again", "expired": "; it is older than notifications.retry_for"}.get(outcome, "")
    what = f"{notice.service} {notice.event}" if notice else "a notice"
    return f"{what}: {words} {channel} at try {tries}: {attempt.words}{after}"


def sample_notice() -> Notice:
    """Return what `notify-test` sends."""
    return Notice("test", "example", "example/app:1.0", "example/app:0.9", None, "test", "Test", now_ms(), None, None, 1234, socket.gethostname(), "test")


# === 17. ENGINE =======================================================================================================
# Carries deployments out: workers, recovery after a crash, draining at shutdown. Owns the workers.
#
# 1. One worker thread per running deployment; what may run is decided by STORE's claim alone.
# 2. Every fact is stored first and published then. A deployment's record waits for a full disk to have room again.
# 3. A worker that is stopped leaves the deployment in its state; the next start finds it there and recovers it.
# 4. Who cancels what runs writes so into its row first: then no move but to Cancelled is possible. The worker is told after that.

_RETRY_STORAGE_S = 1.0
# No event is ever missed; this only bounds the harm if that were wrong.
_IDLE_TURN_S = 30.0
# Batches of one turn of the housekeeper; what is left waits for the next, so that deployments come first.
_PRUNE_BATCHES = 10
_SHRINK_BATCHES = 10
_LOGS_TURN_S = 300.0


class Current(NamedTuple):
    """What is in force; replaced whole, so a reference to it never changes under its reader. `tls` is an ssl.SSLContext or None."""

    config: Config
    services: Services
    keyring: Keyring
    tls: Any = None


def may_deploy(current: Current, service: str | None, key_id: str) -> bool:
    """Return whether a key may deploy a service: it signs for every service, or for this one."""
    found = current.services.by_name.get(service or "")
    return key_id in current.config.security.hmac_keys or bool(found and key_id in found.security.hmac_keys)


def why_withdrawn(deployment: Deployment, current: Current) -> str | None:
    """Return why a deployment that waits may not run any more, or None: what was allowed when it came may be so no longer."""
    name, key_id = deployment.service, deployment.trigger.key_id
    if name not in current.services.by_name:
        return f"service {name} is not in services.toml any more"
    if not current.services.by_name[name].enabled:
        return f"service {name} is disabled in services.toml"
    return None if may_deploy(current, name, key_id) else f"the key {key_id}, which asked for it, may not deploy service {name} any more"


class Waiter:
    """One thread's wait for the end of one deployment."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.deployment: Deployment | None = None

    def tell(self, deployment: Deployment | None) -> None:
        """Give the ended deployment to whoever waits; None ends the wait without one."""
        self.deployment = deployment
        self._event.set()

    def wait(self, seconds: float) -> Deployment | None:
        """Return the ended deployment, or None after `seconds`."""
        self._event.wait(seconds)
        return self.deployment


class Waiters:
    """Lets threads wait for a deployment's end. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiters: dict[str, list[Waiter]] = {}

    @contextlib.contextmanager
    def waiting_for(self, deploy_id: str) -> Iterator[Waiter]:
        """Give a waiter for the deployment's end; look at its state after entering, before waiting."""
        waiter = Waiter()
        with self._lock:
            self._waiters.setdefault(deploy_id, []).append(waiter)
        try:
            yield waiter
        finally:
            with self._lock:
                self._waiters[deploy_id].remove(waiter)
                if not self._waiters[deploy_id]:
                    del self._waiters[deploy_id]

    def release(self) -> int:
        """Let everyone stop waiting because the server closes; return how many that are."""
        with self._lock:
            waiters = [waiter for waiting in self._waiters.values() for waiter in waiting]
        for waiter in waiters:
            waiter.tell(None)
        return len(waiters)

    def tell(self, event: Event) -> None:
        """Wake whoever waits for a deployment that has just ended."""
        if isinstance(event, Moved) and event.deployment.is_terminal:
            with self._lock:
                for waiter in self._waiters.get(event.deployment.deploy_id, ()):
                    waiter.tell(event.deployment)


class _Interrupted(Exception):
    """The job was asked to stop: it is cancelled, or the server stops and the deployment stays as it is."""


class _Job:
    """One deployment in the hands of one worker, from its claim to its end."""

    def __init__(self, engine: "Engine", deployment: Deployment, current: Current, shutdown: StopToken):
        self._engine, self._store, self._publish = engine, engine.store, engine.publish
        self._deployment, self._current = deployment, current
        # A cancelled deployment still has its end to write, so the worker itself is stopped by another token.
        self._stop, self._shutdown = StopToken(), shutdown
        self._wish: str | None = None
        self._service = current.services.by_name.get(deployment.service)
        self._log = DeploymentLog(engine.store.log_path(deployment), current.config.limits.max_output)
        self._started = time.monotonic()
        self._deadline = self._started + current.config.limits.deployment_timeout
        self._phase_started = self._started
        self._plan: Plan | None = None
        self._next: Deployment | None = None
        # What the next write takes along: waiting for it costs a crash only the last lines, and saves two commits.
        self._unwritten_results: list[NumberedResult] = []
        self._unwritten_move: tuple[State, Move] | None = None

    def cancel(self, reason: str) -> None:
        """Have it stopped and ended as Cancelled; its row says so already. Any thread."""
        self._wish = reason
        self._stop.set("cancel")

    def stop(self, reason: str) -> None:
        """Have it stopped and left as it is, because the server stops. Any thread."""
        self._stop.set(reason)

    def close(self) -> None:
        """Give back what it held; nobody may stop it any more."""
        self._stop.close()

    def carry_out(self, *, is_interrupted: bool = False) -> Deployment | None:
        """Take the deployment to its end, and return the next one, claimed with that; _Interrupted if the server stops."""
        steps = {State.VALIDATING: self._validate, State.DEPLOYING: self._deploy, State.HEALTH_CHECKING: self._check_health,
                 State.ROLLING_BACK: self._roll_back}
        try:
            if is_interrupted:
                self._recover()
            while self._deployment.state in steps:
                steps[self._deployment.state]()
        except CancelWanted as wish:
            self._end_cancelled(wish.reason)
        except _Interrupted:
            if self._wish:
                self._end_cancelled(self._wish)
            else:
                self._leave()
                raise
        except Exception as error:
            # A bug must not leave a deployment without a worker: it would hold its service's place for ever.
            self._publish(Broken("deployment", error, self._deployment.trigger.request_id, self._deployment.deploy_id))
            self._unwritten_results.clear()
            try:
                self._move(Outcome.FAILED_FOR_GOOD, "the server made a mistake; its log has more", error="internal error",
                           duration_ms=self._duration_ms(now_ms()))
            except CancelWanted as wish:
                self._end_cancelled(wish.reason)
        finally:
            self._log.close()
        return self._next

    def _leave(self) -> None:
        """Leave the deployment to the next start; one that is cancelled at this moment has its wish in its row."""
        self._log.note("engine", "stopped by the server's shutdown; the next start recovers it")
        with contextlib.suppress(HookshotError, CancelWanted):
            self._write_progress()

    def _end_cancelled(self, reason: str, *, is_wish: bool = True) -> None:
        """End as Cancelled: nothing more runs, no hook either, and nothing is rolled back. A wish stands in the row already."""
        self._log.note("engine", f"ending as {State.CANCELLED}: {reason}")
        self._log.close()
        if is_wish:
            self._deployment = self._deployment._replace(cancel_reason=reason)
        self._move(Outcome.CANCELLED, reason, claims_next=True, error=reason, failure_stage=None, verdict=None,
                   duration_ms=self._duration_ms(now_ms()))

    def _recover(self) -> None:
        """Go on with a deployment that an earlier server left half-way, as its service's `recovery` says."""
        deployment = self._deployment
        self._log.note("engine", f"found half-way ({deployment.state}) after a restart")
        self._make_plan()
        recovery = self._service.recovery if self._service else "fail"
        verdict = judge_interruption(deployment, recovery, can_roll_back=bool(self._plan and self._plan.can_roll_back))
        self._deployment = deployment._replace(recoveries=deployment.recoveries + 1, pid=None, pid_started=None)
        if deployment.verdict and not deployment.cancel_reason:
            self._end(Outcome(deployment.verdict), deployment.error or "it failed", error=deployment.error)
        elif verdict is None:
            self._persist(self._write_progress)
        elif verdict.outcome is Outcome.CANCELLED:
            self._end_cancelled(verdict.reason)
        elif verdict.outcome is Outcome.RETRIED:
            self._move(Outcome.RETRIED, verdict.reason, phase=None, step=0, current_step=None)
        elif deployment.state is State.ROLLING_BACK:
            self._end(Outcome.FAILED_FOR_GOOD, f"{deployment.error}; {verdict.reason}")
        else:
            self._fail(verdict.reason, may_roll_back=recovery != "fail")

    # --- the states, one method each

    def _validate(self) -> None:
        # It came too late to be withdrawn from the queue with the others, or is being started over.
        if withdrawn := why_withdrawn(self._deployment, self._current):
            self._end_cancelled(withdrawn, is_wish=False)
            return
        refusal = self._make_plan()
        if refusal:
            self._fail(refusal, may_roll_back=False)
            return
        assert self._plan
        commands = self._plan.commands
        self._log.note("engine", f"{self._deployment.service} {self._deployment.image} "
                                 f"(previous image: {self._deployment.previous_image or 'none'})")
        # Written with whatever is written next; a crash until then is handled alike in both states.
        before, after = self._deployment.state, advance(self._deployment.state, Outcome.PASSED)
        self._unwritten_move = before, Move(after, now_ms(), "the plan is made")
        self._deployment = self._deployment._replace(state=after, steps_total=len(commands[Phase.PRE_DEPLOY]) + len(commands[Phase.DEPLOY]))

    def _make_plan(self) -> str | None:
        """Work the plan out, or return why there is none."""
        if not self._service:
            return f"service {self._deployment.service} is no longer configured"
        try:
            account = find_account(self._service.user, self._service.group)
            self._plan = build_plan(self._service, self._deployment, self._current.config.limits, self._engine.environ, account)
        except (HookshotError, ValueError) as error:
            return str(error)
        return None

    def _deploy(self) -> None:
        plan = self._need_plan()
        self._phase_started = time.monotonic()
        failed = self._run_phase(Phase.PRE_DEPLOY)
        if failed:
            self._fail(f"pre_deploy: {failed.explain()}", may_roll_back=False, deploy_ms=self._phase_ms())
            return
        failed = self._run_phase(Phase.DEPLOY)
        if failed:
            self._fail(failed.explain(), deploy_ms=self._phase_ms())
        elif plan.has_health:
            # With the state comes its phase: no record says HealthChecking and still shows the last deploy command.
            self._move(Outcome.PASSED, "every command succeeded", deploy_ms=self._phase_ms(), **_health_progress(plan))
        else:
            self._succeed(Outcome.PASSED_UNCHECKED, "every command succeeded; there is no health check", deploy_ms=self._phase_ms())

    def _check_health(self) -> None:
        self._phase_started = time.monotonic()
        unhealthy = self._watch_health(self._deadline)
        if unhealthy:
            self._fail(unhealthy, healthcheck_ms=self._phase_ms())
        else:
            self._succeed(Outcome.PASSED, "healthy", healthcheck_ms=self._phase_ms())

    def _succeed(self, outcome: Outcome, reason: str, **changes: Any) -> None:
        failed = self._run_phase(Phase.POST_DEPLOY, status=State.SUCCEEDED)
        if failed:
            self._fail(f"post_deploy: {failed.explain()}", **changes)
        else:
            self._end(outcome, reason, **changes)

    def _fail(self, reason: str, *, may_roll_back: bool = True, **changes: Any) -> None:
        stage = self._deployment.phase or "validating"
        changes |= {"error": reason, "failure_stage": stage}
        if may_roll_back and self._plan and self._plan.can_roll_back:
            self._move(Outcome.FAILED, reason, rollback_reason=reason, **changes)
            return
        refusal = self._plan.rollback_refusal if self._plan and may_roll_back else None
        self._end(Outcome.FAILED_FOR_GOOD, reason + (f"; not rolled back: {refusal}" if refusal else ""), **changes)

    def _roll_back(self) -> None:
        plan = self._need_plan()
        self._phase_started = time.monotonic()
        self._deadline = self._phase_started + self._current.config.limits.deployment_timeout
        self._log.note("engine", f"rolling back to {plan.previous_image}")
        problem = None
        for attempt in range(1, plan.rollback_attempts + 1):
            failed = self._run_phase(Phase.ROLLBACK, attempt=attempt)
            problem = failed.explain() if failed else None
            if not problem:
                break
            self._log.note(Phase.ROLLBACK, f"attempt {attempt} of {plan.rollback_attempts} failed: {problem}")
        if not problem and plan.has_health:
            problem = self._watch_health(self._deadline)
        if problem:
            self._end(Outcome.FAILED_FOR_GOOD, f"{self._deployment.error}; the rollback failed too: {problem}", rollback_ms=self._phase_ms())
        else:
            self._end(Outcome.PASSED, f"back on {plan.previous_image}", rollback_ms=self._phase_ms())

    # --- moving on

    def _move(self, outcome: Outcome, reason: str, *, claims_next: bool = False, **changes: Any) -> None:
        before, results, moved, at_ms = self._deployment, tuple(self._unwritten_results), self._unwritten_move, now_ms()
        limits = self._engine.current().config.limits if claims_next and self._engine.may_claim_next() else None
        self._deployment, self._next = self._persist(
            lambda: self._store.move(before, outcome, reason, at_ms, results, moved, then_claim=limits, **changes))
        self._announce_written(before)
        self._publish(Moved(self._deployment, before.state, reason))
        if self._next:
            self._publish(Moved(self._next, State.QUEUED, "its turn has come"))

    def _end(self, outcome: Outcome, reason: str, **changes: Any) -> None:
        """Run the on_failure hooks if it failed, then make the last move; the next deployment comes with it."""
        state = advance(self._deployment.state, outcome)
        if state is not State.SUCCEEDED:
            error = reason if state is not State.ROLLED_BACK else self._deployment.error or reason
            changes.setdefault("error", error)
            self._run_failure_hooks(outcome, state, changes)
        self._log.note("engine", f"ending as {state}: {reason}")
        # Whoever follows the log ends when the deployment does: the last line has to be there by then.
        self._log.close()
        self._move(outcome, reason, claims_next=True, duration_ms=self._duration_ms(now_ms()), **changes)

    def _run_failure_hooks(self, outcome: Outcome, state: State, changes: Mapping[str, Any]) -> None:
        """Run the on_failure hooks; a crash meanwhile must find the verdict, not judge again or roll back twice."""
        if self._deployment.verdict or not self._plan or not self._plan.commands[Phase.ON_FAILURE]:
            return
        self._deployment = self._deployment._replace(**{**changes, "verdict": outcome})
        self._persist(self._write_progress)
        self._run_phase(Phase.ON_FAILURE, status=state, error=changes["error"])

    def _write_progress(self) -> None:
        """Write what runs now, with what has not been written yet; raises like every write."""
        self._store.note_progress(self._deployment, tuple(self._unwritten_results), self._unwritten_move)
        self._announce_written(self._deployment)

    def _announce_written(self, deployment: Deployment) -> None:
        if self._unwritten_move:
            before, move = self._unwritten_move
            self._publish(Moved(deployment, before, move.reason))
        for _, result in self._unwritten_results:
            self._publish(CommandEnded(deployment, result))
        self._unwritten_move = None
        self._unwritten_results.clear()

    def _duration_ms(self, at_ms: int) -> int:
        if self._deployment.recoveries:
            # This process has not seen its beginning.
            return elapsed_ms(self._deployment.clock, clock_reading(), wall_ms=at_ms - (self._deployment.started_ms or at_ms))
        return int((time.monotonic() - self._started) * 1000)

    def _phase_ms(self) -> int:
        return int((time.monotonic() - self._phase_started) * 1000)

    def _need_plan(self) -> Plan:
        assert self._plan, "a state beyond Validating has a plan"
        return self._plan

    def _persist(self, work: Callable[[], Any]) -> Any:
        """Do a write of the record; while the disk is full or the database locked, wait until it succeeds."""
        for tries in itertools.count():
            try:
                return work()
            except HookshotError as error:
                if tries == 0:
                    self._publish(Trouble("record_waiting", f"it waits to be recorded: {error.sentence}", self._deployment.deploy_id,
                                          self._deployment.trigger.request_id))
            if self._shutdown.wait(_RETRY_STORAGE_S):
                raise _Interrupted

    # --- running

    def _run_phase(self, phase: Phase, *, attempt: int = 1, status: str = "", error: str = "") -> Result | None:
        """Run a phase's commands until a critical one fails; return that failure, or None."""
        commands = self._plan.commands[phase] if self._plan else ()
        for command in commands:
            result = self._run_with_retries(command, attempt, status, error)
            if failed := judge([result]):
                return failed
        return None

    def _run_with_retries(self, command: Command, attempt: int, status: str, error: str) -> Result:
        for number in itertools.count(attempt):
            result = self._run_once(command, number, status, error)
            tries = number - attempt
            if result.is_ok or tries >= command.retries or (self._is_late() and command.phase is not Phase.ON_FAILURE):
                return result
            delay_s = retry_delay(command, tries + 1)
            self._log.note(command.phase, f"{result.explain()}; trying again in {delay_s} s ({tries + 1} of {command.retries})")
            self._sleep(delay_s if command.phase is Phase.ON_FAILURE else min(delay_s, self._deadline - time.monotonic()))
        raise AssertionError("unreachable")

    def _is_late(self) -> bool:
        return time.monotonic() >= self._deadline

    def _heed_stop(self) -> None:
        """Start nothing more once it was asked to stop."""
        if self._stop.reason:
            raise _Interrupted

    def _run_once(self, command: Command, attempt: int, status: str, error: str) -> Result:
        plan = self._need_plan()
        self._heed_stop()
        if self._unwritten_results:
            # A crash from here on must not take what an ended command left behind for a part of this one.
            self._persist(self._write_progress)
        # Hooks tell of a failure, so the deadline that may have caused it does not bind them.
        is_hook_after = command.phase is Phase.ON_FAILURE
        left_s = None if is_hook_after else max(0.0, self._deadline - time.monotonic())
        launch = launch_of(plan, command, attempt, status=status, error=error, timeout_s=left_s)
        number = self._deployment.command_no + 1
        launch = launch._replace(env={**launch.env, "HOOKSHOT_COMMAND": f"{self._store.identity}-{number}"})
        self._deployment = self._deployment._replace(
            phase=command.phase, step=command.step, steps_total=len(plan.commands[command.phase]), current_step=command.name,
            command_no=number)
        self._log.note(command.phase, f"step {command.step} of {len(plan.commands[command.phase])}: {command.name}")
        if left_s is not None and left_s <= 0:
            result = Result(command.phase, command.step, command.name, "", attempt, "timed_out", None, None, now_ms(), 0)
        else:
            result = run_command(launch, self._log, self._current.keyring.masker, self._stop, self._note_running)
        result = self._record(result._replace(critical=command.critical))
        if result.status == "stopped":
            raise _Interrupted
        return result

    def _note_running(self, pid: int) -> None:
        self._deployment = self._deployment._replace(pid=pid, pid_started=birth_now())
        with contextlib.suppress(HookshotError):
            # The disk may be full: then the command runs on unrecorded, and recovery finds it by its environment.
            try:
                self._write_progress()
            except CancelWanted as wish:
                # At this very moment: it is about to be told to stop, with time to clean up. Until then it is on record.
                self._deployment = self._deployment._replace(cancel_reason=wish.reason)
                self._write_progress()
        self._log.flush()

    def _record(self, result: Result) -> Result:
        self._log.note(result.phase, f"{result.name} succeeded in {render_duration(result.duration_ms)}" if result.is_ok
                       else result.explain() + ("" if result.critical else "; it is not critical, so the deployment goes on"))
        self._deployment = self._deployment._replace(pid=None, pid_started=None)
        self._unwritten_results.append((self._deployment.command_no, result))
        return result

    def _watch_health(self, deadline: float) -> str | None:
        """Probe until the policy has a verdict; return why it is unhealthy, or None if it is healthy."""
        policy = self._need_plan().health
        progress, verdict, last = HealthProgress(), None, ""
        plan = self._need_plan()
        self._deployment = self._deployment._replace(**_health_progress(plan))
        self._log.note(Phase.HEALTHCHECK, f"up to {policy.max_attempts} probes, every {policy.interval_s} s; "
                                          f"needs {policy.success_threshold} good in a row")
        self._sleep(min(policy.initial_delay_s, max(0.0, deadline - time.monotonic())))
        while verdict is None:
            if time.monotonic() >= deadline:
                return "the deployment's time was up before it was healthy (limits.deployment_timeout)"
            failed = self._probe()
            last = failed.explain() if failed else ""
            progress, verdict = watch_health(policy, progress, failed is None)
            self._log.note(Phase.HEALTHCHECK, f"probe {progress.attempts} of {policy.max_attempts}: {last or 'good'}")
            if verdict is None:
                self._sleep(min(policy.interval_s, max(0.0, deadline - time.monotonic())))
        return None if verdict else f"health check failed: {last or 'too few good probes in a row'}"

    def _probe(self) -> Result | None:
        """Make every probe once, as long as they are good; return the one that was not."""
        plan = self._need_plan()
        for command in plan.commands[Phase.HEALTHCHECK]:
            result = self._run_with_retries(command, 1, "", "")
            if not result.is_ok and command.critical:
                return result
        for step, check in enumerate(plan.checks, len(plan.commands[Phase.HEALTHCHECK]) + 1):
            self._heed_stop()
            self._deployment = self._deployment._replace(step=step, command_no=self._deployment.command_no + 1, current_step=kind_of(check))
            result = self._record(run_check(check, step, self._stop))
            if result.status == "stopped":
                raise _Interrupted
            if not result.is_ok:
                return result
        return None

    def _sleep(self, seconds: float) -> None:
        if seconds > 0:
            self._log.flush()
            self._persist(self._write_progress)
            if self._stop.wait(seconds):
                raise _Interrupted


def _health_progress(plan: Plan) -> dict[str, Any]:
    """Return what a record says while its health check begins."""
    return {"phase": Phase.HEALTHCHECK, "step": 0, "current_step": None, "steps_total": len(plan.commands[Phase.HEALTHCHECK]) + len(plan.checks)}


class Engine:
    """The workers and what they share. start(), then stop(); every other method from any thread."""

    def __init__(self, store: Store, current: Callable[[], Current], publish: Publish, environ: Mapping[str, str]):
        self.store, self.current, self.publish = store, current, publish
        self.environ = dict(environ)
        self.is_draining = False
        self._wakeup = threading.Condition()
        # One hint is one look at the queue. Writes are serial, so a deployment that can start is seen either by the
        # worker that frees its place (its last move claims too) or by the submit that queued it, which then leaves a hint.
        self._hints = 0
        # Workers that wait, and deployments claimed for them: on their way (promised to a submit), or here.
        self._idle = self._promised = 0
        self._handed: collections.deque[Deployment] = collections.deque()
        self._interrupted: collections.deque[Deployment] = collections.deque()
        self._workers: list[tuple[threading.Thread, StopToken]] = []
        # What the workers have in hand, and wishes to cancel what is claimed but in no worker's hand yet; both by deploy_id.
        self._jobs_lock = threading.Lock()
        self._jobs: dict[str, _Job] = {}
        self._wishes: dict[str, str] = {}
        self._untidy: set[str] = set()
        # What was in force when the queue was last looked through for what may not run any more.
        self._queue_fits: Current | None = None
        self._logs_pruned_s: float | None = None
        # What the logs of deployments take on disk, as last measured; None until then.
        self.logs_bytes: int | None = None

    # --- what callers see

    def submit(self, request: DeployRequest, trigger: Trigger, on_busy: str, *, reason: str = "accepted", ignores_lock: bool = False,
               action: str = "deploy") -> Submission:
        """Queue a checked request; when this returns it is on disk."""
        if self.is_draining:
            raise HookshotError("shutting_down", "the server is shutting down; try again when it is back")
        with self._wakeup:
            has_worker = self._idle > self._promised + len(self._handed) + self._hints
            self._promised += has_worker
        claimed = None
        try:
            submission = self.store.submit(request, trigger, now_ms(), limits=self.current().config.limits, on_busy=on_busy,
                                           may_claim=has_worker, reason=reason, ignores_lock=ignores_lock, action=action)
            claimed = submission.claimed
            self.publish(Accepted(submission.deployment, submission.created, trigger))
        finally:
            with self._wakeup:
                self._promised -= has_worker
                if claimed:
                    self._handed.append(claimed)
                if self.is_draining:
                    # A promise kept them all from going.
                    self._wakeup.notify_all()
                elif claimed or self._hints:
                    self._wakeup.notify()
        if submission.can_start and (claimed is None or claimed.seq != submission.deployment.seq):
            self.wake()
        for deployment in submission.superseded:
            self.publish(Moved(deployment, State.QUEUED, "superseded by a newer deployment"))
        return submission

    def cancel(self, control: ControlRequest, trigger: Trigger, reason: str) -> tuple[Deployment, bool]:
        """Cancel a queued deployment, or have a running one stopped; when this returns that is on disk.

        Returns it as it is then, and whether the same message came before.
        """
        deployment, is_repeated = self.store.cancel(control, trigger, reason, now_ms())
        if is_repeated:
            return deployment, True
        if deployment.is_terminal:
            self.publish(Moved(deployment, State.QUEUED, reason))
            return deployment, False
        with self._jobs_lock:
            if job := self._jobs.get(deployment.deploy_id):
                job.cancel(deployment.cancel_reason or reason)
            else:
                self._wishes[deployment.deploy_id] = deployment.cancel_reason or reason
        if not job and ((latest := self.store.get(deployment.deploy_id)) is None or latest.is_terminal):
            # Its last move found the wish in the row.
            with self._jobs_lock:
                self._wishes.pop(deployment.deploy_id, None)
        return deployment, False

    def withdraw(self) -> None:
        """Cancel what waits in the queue and may not run any more, as what is in force says."""
        current = self.current()
        # By what is in force at the moment of the transaction: what it has let in since must not end by what was before.
        for deployment in self.store.withdraw(lambda queued: why_withdrawn(queued, self.current()), now_ms()):
            self.publish(Moved(deployment, State.QUEUED, deployment.error or "withdrawn"))
        self._queue_fits = current

    def may_claim_next(self) -> bool:
        """Return whether a worker may claim with its last move: not before those that were claimed or begun already."""
        return not (self.is_draining or self._handed or self._interrupted)

    def wake(self, *, everyone: bool = False) -> None:
        """Let an idle worker (or every one) look for work."""
        with self._wakeup:
            self._hints = len(self._workers) if everyone else self._hints + 1
            self._wakeup.notify(self._hints)

    def note(self, event: Event) -> None:
        """Take notice of what has ended: its service may have more history than it should keep."""
        if isinstance(event, Moved) and event.deployment.is_terminal:
            self._untidy.add(event.deployment.service)

    def alive_workers(self) -> int:
        """Return how many workers there are."""
        return sum(thread.is_alive() for thread, _ in self._workers)

    # --- life

    def recover(self) -> None:
        """End what a dead server left running, and line its deployments up for the workers. Before start()."""
        left = self.store.unfinished()
        if not left:
            return
        self.publish(Noted("recovery", f"{len(left)} deployment{'s were' if len(left) > 1 else ' was'} interrupted and will be recovered"))
        groups = find_leftovers(left, self.store.identity)
        if groups:
            self.publish(Noted("recovery", f"ending what is left of them: process group{'s' * (len(groups) > 1)} {', '.join(map(str, groups))}"))
            end_groups(groups)
        self._interrupted.extend(left)

    def start(self) -> None:
        """Start the workers."""
        self._untidy.update(record.name for record in self.store.service_records())
        for number in range(1, self.current().config.server.worker_threads + 1):
            stop = StopToken()
            thread = threading.Thread(target=self._work, args=(stop,), name=f"worker-{number}", daemon=True)
            self._workers.append((thread, stop))
            thread.start()
        self.wake(everyone=True)

    def drain(self) -> None:
        """Take no new deployment; what runs goes on."""
        self.is_draining = True
        self.wake(everyone=True)

    def join(self, seconds: float) -> bool:
        """Wait for the workers after drain(); return whether all have ended."""
        deadline = time.monotonic() + seconds
        for thread, _ in self._workers:
            thread.join(max(0.0, deadline - time.monotonic()))
        return self.alive_workers() == 0

    def stop(self, reason: str) -> None:
        """Stop what runs: "shutdown" gives it KILL_AFTER_S to clean up, "now" none. It is left for recovery."""
        for thread, stop in self._workers:
            if thread.is_alive():
                stop.set(reason)
        # After the workers: one that takes a deployment in hand from here on looks at its own token.
        with self._jobs_lock:
            for job in self._jobs.values():
                job.stop(reason)

    # --- one worker

    def _work(self, stop: StopToken) -> None:
        deployment: Deployment | None = None
        while True:
            try:
                deployment = self.turn(stop, deployment)
            except _Interrupted:
                return
            except HookshotError as error:
                deployment = None
                self.publish(Trouble("queue_unreadable", f"the queue cannot be read: {error.sentence}"))
                if stop.wait(_RETRY_STORAGE_S):
                    return
            except Exception as error:
                deployment = None
                self.publish(Broken(threading.current_thread().name, error))
                if stop.wait(_RETRY_STORAGE_S):
                    return
            if deployment is None and self.is_draining and not self._promised and not self._handed:
                return

    def turn(self, stop: StopToken, deployment: Deployment | None = None) -> Deployment | None:
        """Carry out one deployment: the given one, an interrupted one, or the next in the queue; return its successor."""
        deployment = deployment or self._take_handed()
        if deployment is None and not self.is_draining:
            with contextlib.suppress(IndexError):
                return self._carry_out(self._interrupted.popleft(), stop, is_interrupted=True)
            deployment = self._claim()
        if deployment is None:
            self._rest()
            return None
        return self._carry_out(deployment, stop)

    def _carry_out(self, deployment: Deployment, stop: StopToken, *, is_interrupted: bool = False) -> Deployment | None:
        """Take a deployment in hand, where it can be stopped, until it has ended."""
        job = _Job(self, deployment, self.current(), stop)
        with self._jobs_lock:
            self._jobs[deployment.deploy_id] = job
            wish = self._wishes.pop(deployment.deploy_id, None)
        if wish:
            job.cancel(wish)
        if stop.reason:
            job.stop(stop.reason)
        try:
            return job.carry_out(is_interrupted=is_interrupted)
        finally:
            with self._jobs_lock:
                # One that starts over may be in another worker's hand already.
                if self._jobs.get(deployment.deploy_id) is job:
                    del self._jobs[deployment.deploy_id]
            job.close()

    def _claim(self) -> Deployment | None:
        deployment = self.store.claim(now_ms(), limits=self.current().config.limits)
        if deployment:
            self.publish(Moved(deployment, State.QUEUED, "its turn has come"))
        return deployment

    def _take_handed(self) -> Deployment | None:
        with contextlib.suppress(IndexError):
            deployment = self._handed.popleft()
            self.publish(Moved(deployment, State.QUEUED, "its turn has come"))
            return deployment
        return None

    def _rest(self) -> None:
        """Wait until there is something to do: a handed deployment, or a hint that no promise has the first claim to."""
        with self._wakeup:
            self._idle += 1
            self._wakeup.wait_for(lambda: self._handed or (self._hints and self._idle > self._promised)
                                  or (self.is_draining and not self._promised), _IDLE_TURN_S)
            self._idle -= 1
            if not self._handed:
                self._hints = max(0, self._hints - 1)

    # --- keeping house

    def keep_house(self) -> None:
        """Cancel what may not run any more or waited too long, remove what is beyond its retention, a batch at a time."""
        config = self.current().config
        if self._queue_fits is not self.current():
            self.withdraw()
        for deployment in self.store.expire(now_ms(), lock_timeout_s=config.limits.lock_timeout):
            self.publish(Moved(deployment, State.QUEUED, deployment.error or "expired"))
        for lock in self.store.expire_locks(now_ms()):
            self.publish(Noted("lock_expired", f"the lock of {lock.owner} on service {lock.service} is over"))
        for service in [self._untidy.pop() for _ in range(len(self._untidy))]:
            for _ in range(_PRUNE_BATCHES):
                if not self.store.prune(service, config.storage.retention):
                    break
            else:
                self._untidy.add(service)
        for _ in range(_SHRINK_BATCHES):
            if not self.store.shrink():
                break
        self.store.checkpoint()
        if self._logs_pruned_s is None or time.monotonic() - self._logs_pruned_s > _LOGS_TURN_S:
            self._logs_pruned_s = time.monotonic()
            self.logs_bytes = self.store.prune_logs(now_ms() - config.storage.retention.log_days * 86_400_000)
            while self.store.prune_audit(now_ms(), days=config.storage.retention.audit_days):
                pass
            while self.store.prune_messages(now_ms()):
                pass


def find_leftovers(deployments: Iterable[Deployment], store_id: str) -> list[int]:
    """Return the process groups that interrupted deployments of one data directory left running.

    A group is a deployment's if its leader is the recorded process (same pid, same start time), or if a member carries
    the deployment's id and the number of a command that was started when the server died: one that is recorded as
    running, or a later one that the server had no time to record. A daemon that an earlier command left is let be.
    """
    by_id = {deployment.deploy_id.encode(): deployment for deployment in deployments}
    by_pid = {deployment.pid: deployment for deployment in by_id.values() if deployment.pid}
    groups = set()
    for process in list_processes():
        recorded = by_pid.get(process.pid)
        if recorded and was_born(process, recorded.pid_started):
            groups.add(process.pgid)
            continue
        environment = read_environment(process.pid)
        deployment = by_id.get(environment.get(b"HOOKSHOT_DEPLOY_ID", b""))
        owner, _, number = environment.get(b"HOOKSHOT_COMMAND", b"").rpartition(b"-")
        if deployment and owner == store_id.encode() and number.isdigit() and (process.pgid == deployment.pid or int(number) > deployment.command_no):
            groups.add(process.pgid)
    return sorted(groups - {os.getpgrp()})


# === 18. API ==========================================================================================================
# What each route does: gates, then a handler (app, request) -> Response. Owns the rate limiter, the health report, the feed and
# the journal.
#
# 1. ROUTES is the one table: 404, 405 with Allow, and docs/api.md come from it.
# 2. Gates run in this order: address, rate, route, token or signature, handler. Before they passed nothing is
#    stored but a few rows of the journal.
#    admit() needs the head alone, begin() the body too; neither waits, so the server's one reading thread calls them.
# 3. A caller without a right signature learns nothing: an unknown service and a wrong key give the same answer.
# 4. Answers say what the database says; nothing is made up and no history is scanned.

MAX_WAIT_S = 3600
# A cancelled command has KILL_AFTER_S to clean up; whoever cancelled is told sooner that it stops.
_CANCEL_WAIT_S = 3
_FOLLOW_PAUSE_S = 0.1
_HEARTBEAT_S = 15.0
# How long one request may take to make a new health report before another one tries.
_HEALTH_PATIENCE_S = 1.0
_PREVIEW_CHARS = 200
# Larger bodies, each verified with every key, take milliseconds, and other clients would wait for them.
_QUICK_BODY_BYTES = 64 << 10
# Below it gzip saves no packet; above it saving time is better than saving more bytes.
_WORTH_GZIP_BYTES = 1024
_LARGE_BYTES = 64 << 10
# Moves that are ready for readers of GET /events. One who is further behind reads them from the database when he comes again.
_FEED_MOVES = 2000
_FEED_PAGE = 500
# Moves that come within this time go out together, the more readers the longer: 200 sendings are as dear as a deployment.
_FEED_PAUSE_S, _FEED_PAUSE_PER_READER_S = 0.05, 0.0005
_FEED_RETRY_S = 1.0
MAX_TAIL_LINES = 100_000
# Headers that only a proxy adds, as everything that begins with x-forwarded-: a request with one did not come straight.
_FORWARDING_HEADERS = frozenset({"forwarded", "x-real-ip", "via"})


class Allowance(NamedTuple):
    """What the rate limiter says: seconds to wait (0: admitted), requests left, seconds until all are there again."""

    wait_s: float
    left: int
    reset_s: int


class RateLimiter:
    """A token bucket per address, IPv6 by /64; the least recently seen is forgotten first. Any thread."""

    _MAX_ADDRESSES = 10_000

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._buckets: collections.OrderedDict[object, tuple[float, float]] = collections.OrderedDict()

    def admit(self, address: Peer, now_s: float, *, per_minute: int) -> Allowance:
        """Take a token if there is one."""
        bucket, full = bucket_of(address), float(per_minute)
        with self._lock:
            tokens, seen_s = self._buckets.pop(bucket, (full, now_s))
            tokens += (now_s - seen_s) * full / 60
            tokens = tokens if tokens < full else full
            admitted = tokens >= 1
            tokens -= admitted
            self._buckets[bucket] = (tokens, now_s)
            if len(self._buckets) > self._MAX_ADDRESSES:
                self._buckets.popitem(last=False)
        return Allowance(0.0 if admitted else (1 - tokens) * 60 / full, int(tokens), -int((tokens - full) * 60 // full))


class HealthCache:
    """The last health report: when it was made, what it says, and its answer for one second. Any thread; replaced whole."""

    def __init__(self) -> None:
        self.report: tuple[float, dict[str, Any]] | None = None
        self.rendered: tuple[float, int, Response] | None = None
        # When a request was last sent to make a new report; what comes meanwhile gets the old one.
        self.asked_s = -_HEALTH_PATIENCE_S


class EventFeed:
    """The newest moves, read once and rendered once for all readers of GET /events. Any thread; run() in one of its own.

    Moves are read from the database, not taken from what is published: there they have one order, and a reader that comes
    again goes on where it was. While nobody reads, nothing is done.
    """

    def __init__(self, store: Store, publish: Publish, metrics: Metrics):
        self.store, self.publish, self.metrics = store, publish, metrics
        # What is called when there is news, without waiting.
        self.on_news: Callable[[], None] = lambda: None
        self._lock = threading.Lock()
        self._news, self._is_stopping = threading.Event(), threading.Event()
        # (number, service, text) of every move after `_floor`.
        self._moves: collections.deque[tuple[int, str, bytes]] = collections.deque()
        self._floor = self._last = 0
        # What was last asked of take(), and what it gave: most readers are at the same place.
        self._taken: tuple[tuple[int, str | None, int, int] | None, tuple[int, bytes]] = None, (0, b"")
        self.readers = 0

    def note(self, event: Event) -> None:
        """Take notice that there is a new move."""
        if self.readers and isinstance(event, Moved | Accepted):
            self._news.set()

    def open(self, after: int | None, service: str | None, request_id: str, may_read: Callable[[], bool] = lambda: True) -> "EventReader":
        """Return a reader that begins after a move, or with what comes, and ends when it may not read any more."""
        newest = self.store.last_move()
        with self._lock:
            if not self.readers:
                self._moves.clear()
                self._floor = self._last = newest
            self.readers += 1
        # A move that came after `newest` was read and before somebody counted as a reader was not noted.
        self._news.set()
        # A database that was restored from a backup may be behind what the reader has seen.
        return EventReader(self, newest if after is None else min(after, newest), service, request_id, may_read)

    def leave(self) -> None:
        """A reader has gone."""
        with self._lock:
            self.readers -= 1

    @property
    def floor(self) -> int:
        """The move after which all are ready."""
        return self._floor

    def take(self, after: int, service: str | None, limit_bytes: int) -> tuple[int, bytes] | None:
        """Return the number of the last move looked at and the text of those after `after`; None if they are not ready any more."""
        if after >= self._last:
            return after, b""
        with self._lock:
            if after < self._floor:
                return None
            asked = (after, service, limit_bytes, self._last)
            if asked == (before := self._taken)[0]:
                return before[1]
            moves = list(itertools.takewhile(lambda move: move[0] > after, reversed(self._moves)))
        texts, size = [], 0
        for number, owner, text in reversed(moves):
            if size >= limit_bytes:
                break
            after = number
            if service in (None, owner):
                texts.append(text)
                size += len(text)
        taken = after, b"".join(texts)
        self._taken = asked, taken
        return taken

    def run(self) -> None:
        """Read what is new until stop(), and what came until then."""
        is_last = False
        while not is_last:
            self._news.wait()
            self._news.clear()
            is_last = self._is_stopping.is_set()
            try:
                if self.readers:
                    self.turn()
            except HookshotError as error:
                self.publish(Trouble("events_unreadable", f"moves cannot be read for GET /events: {error.sentence}"))
                self._is_stopping.wait(_FEED_RETRY_S)
                self._news.set()
            except Exception as error:
                self.publish(Broken("feed", error))
            self._is_stopping.wait(_FEED_PAUSE_S + self.readers * _FEED_PAUSE_PER_READER_S)

    def turn(self) -> None:
        """Make ready what has come since the last turn, and tell of it."""
        while page := self.store.moves_after(self._last, _FEED_PAGE):
            rendered = [(move.id, move.deployment.service, render_transition(move)) for move in page]
            with self._lock:
                self._moves.extend(rendered)
                self._last = page[-1].id
                while len(self._moves) > _FEED_MOVES:
                    self._floor = self._moves.popleft()[0]
            self.on_news()

    def stop(self) -> None:
        """End run()."""
        self._is_stopping.set()
        self._news.set()


class EventReader:
    """One reader of GET /events: first what is in the database (backlog), then what comes (take). One thread at a time."""

    def __init__(self, feed: EventFeed, after: int, service: str | None, request_id: str, may_read: Callable[[], bool]):
        self._feed, self._after, self._service, self._request_id, self._may_read = feed, after, service, request_id, may_read
        self._is_open = True

    def backlog(self) -> Iterator[bytes]:
        """Yield the moves from where it begins to where the feed goes on."""
        # The id alone: a reader that is cut off before the first move comes again with it, and misses nothing.
        yield b"retry: 2000\nid: %d\n\n" % self._after
        while self._after < (floor := self._feed.floor):
            page = self._feed.store.moves_after(self._after, _FEED_PAGE)
            # None: the rest was removed with its deployments (storage.retention).
            self._after = page[-1].id if page else floor
            yield b"".join(render_transition(move) for move in page if self._service in (None, move.deployment.service))

    def take(self, limit_bytes: int) -> bytes | None:
        """Return what has come, b"" for nothing, None if it is too late for that, or forbidden by now."""
        found = self._feed.take(self._after, self._service, limit_bytes) if self._may_read() else None
        if found is None:
            return None
        self._after, text = found
        return text

    def farewell(self) -> bytes:
        """Count and log a reader that is dropped; return the event that tells it so."""
        why = "was too slow" if self._may_read() else "may not read any more"
        self._feed.metrics.add("hookshot_event_streams_dropped_total", (), 1)
        self._feed.publish(Trouble("stream_dropped", f"a reader of GET /events {why} and was dropped after move {self._after}; it can go on from there"
                                                     + " once it may" * (not self._may_read()), request_id=self._request_id, level="warning"))
        return b'event: dropped\ndata: {"resume_after":%d}\n\n' % self._after

    def close(self) -> None:
        """Leave the feed; again is nothing."""
        if self._is_open:
            self._is_open = False
            self._feed.leave()


def render_transition(move: Transition) -> bytes:
    """Return a move as a server-sent event, its id the move's number."""
    deployment = move.deployment
    document: dict[str, Any] = {
        "deploy_id": deployment.deploy_id, "service": deployment.service, "image": deployment.image, "status": move.state,
        "previous_status": move.before, "at": render_time(move.at_ms), "reason": move.reason}
    if move.state in TERMINAL:
        document |= {"error": deployment.error, "duration_ms": deployment.duration_ms}
    return b"id: %d\nevent: deployment\ndata: %b\n" % (move.id, render_json(document))


class _RowAllowance(NamedTuple):
    """How many rows of their own refusals get: for one code and address in a minute; of all at once, and then a minute."""

    each: int
    at_once: int
    a_minute: int


# Of strangers, and of who holds a key: so strangers cannot use up what is his.
_AUDIT_ALLOWANCES = {False: _RowAllowance(3, 100, 1), True: _RowAllowance(10, 1000, 5)}
_MINUTE_S, _DAY_S = 60.0, 86_400.0
_MAX_AUDIT_SOURCES = 1000
# Sources that the row of a minute's count names.
_NAMED_SOURCES = 8
_MAX_DETAIL_CHARS = 500
# Rows that wait for a database that cannot be written. Beyond them requests are only counted, until there is room again.
_MAX_WAITING_ROWS = 2000
_JOURNAL_TURN_S = 1.0
_TRACE_KEPT_MS = 7 * 86_400_000


class Journal:
    """What of the audit no transaction of a deployment writes: what was refused, repeated or planned, and the operator's acts.

    It waits in memory for at most a second, and a flood leaves a bounded number of rows: the rest is counted, a row a minute.
    Any thread; run() in one of its own.
    """

    def __init__(self, store: Store, publish: Publish):
        self._store, self._publish = store, publish
        self._lock, self._is_stopping = threading.Lock(), threading.Event()
        self._rows: list[AuditRow] = []
        self._uses: dict[tuple[str, str], KeyUse] = {}
        # Of this minute: (code, address or /64, whether with a key) -> rows given; and (code, address) -> what had none.
        self._given: collections.Counter[tuple[str, int | str | None, bool]] = collections.Counter()
        self._counted: collections.Counter[tuple[str, str]] = collections.Counter()
        self._left = {is_known: allowance.at_once for is_known, allowance in _AUDIT_ALLOWANCES.items()}
        self._minute_began: float | None = None
        self._head_told = -_DAY_S
        self._is_failing = False

    def admits(self, code: str, address: Peer, *, is_known: bool) -> bool:
        """Return whether this request may have a row of its own; if not, it is counted."""
        source = (code, bucket_of(address), is_known)
        with self._lock:
            if self._left[is_known] and len(self._rows) < _MAX_WAITING_ROWS and self._given[source] < _AUDIT_ALLOWANCES[is_known].each:
                self._left[is_known] -= 1
                self._given[source] += 1
                return True
            counted = (code, render_peer(address))
            self._counted[counted if counted in self._counted or len(self._counted) < _MAX_AUDIT_SOURCES else (code, "others")] += 1
            return False

    def add(self, row: AuditRow) -> None:
        """Have a row written that was admitted, or is an act of the operator's."""
        with self._lock:
            self._rows.append(row)

    def use(self, use: KeyUse) -> None:
        """Have the last use of a key written."""
        with self._lock:
            self._uses[use.key_id, use.service] = use

    def note(self, event: Event) -> None:
        """Take notice of what the operator did, and of what the server's life leaves in the audit."""
        if isinstance(event, Reloaded):
            self.add(AuditRow(event.at_ms, "reload", "done" if event.is_taken else ERRORS["config"].code, detail=event.message))
        elif isinstance(event, Noted) and event.event in ("started", "draining", "secrets_reloaded", "lock_expired"):
            self.add(AuditRow(now_ms(), event.event, "done", detail=event.message))

    def find(self, request_id: str) -> list[AuditRow]:
        """Return the rows of the requests with an id, oldest first, those that are not written yet too."""
        with self._lock:
            waiting = [row for row in self._rows if row.request_id == request_id]
        written = self._store.audit_of(request_id, now_ms() - _TRACE_KEPT_MS)
        known = {row._replace(n=0, hash="") for row in written}
        return [*written, *(row for row in waiting if row not in known)]

    def run(self) -> None:
        """Write what has come once a second until stop(), and then the rest."""
        is_last = False
        while not is_last:
            is_last = self._is_stopping.wait(_JOURNAL_TURN_S)
            try:
                self.turn(time.monotonic(), is_last=is_last)
                self._is_failing = False
            except HookshotError as error:
                if is_last and self._rows:
                    self._publish(Trouble("audit_failed", f"{len(self._rows)} rows of the audit are lost with the end of this server: {error.sentence}"))
                elif not self._is_failing:
                    self._publish(Trouble("audit_failed", f"rows of the audit cannot be written yet: {error.sentence}"))
                self._is_failing = True
            except Exception as error:
                self._publish(Broken("journal", error))

    def turn(self, now_s: float, *, is_last: bool = False) -> None:
        """Write what has come; tell the audit's head once a day."""
        self._end_minute(now_s, is_last=is_last)
        with self._lock:
            rows, uses = list(self._rows), dict(self._uses)
        is_waiting = False
        try:
            if rows or uses:
                self._store.record_audit(rows, uses.values())
        except HookshotError:
            is_waiting = True  # for better times
            raise
        finally:
            # Also after a bug: with a row that cannot be written, none would ever be again.
            if not is_waiting:
                self._forget(rows, uses)
        if now_s - self._head_told >= _DAY_S:
            self._head_told = now_s
            number, digest = self._store.audit_head()
            self._publish(Noted("audit_head", f"row {number} of the audit has the hash {digest}"))

    def _forget(self, rows: Sequence[AuditRow], uses: Mapping[tuple[str, str], KeyUse]) -> None:
        """Let go of what is written. Not sooner: until then it is not to be found in the database."""
        with self._lock:
            del self._rows[: len(rows)]
            self._uses = {source: use for source, use in self._uses.items() if uses.get(source) is not use}

    def _end_minute(self, now_s: float, *, is_last: bool) -> None:
        """Add the row of what was counted when a minute is over, and let a few rows more pass."""
        if self._minute_began is None:
            self._minute_began = now_s
        if (now_s - self._minute_began < _MINUTE_S or len(self._rows) >= _MAX_WAITING_ROWS) and not is_last:
            return
        self._minute_began = now_s
        with self._lock:
            counted, self._counted = self._counted, collections.Counter()
            self._given.clear()
            for is_known, (_, at_once, a_minute) in _AUDIT_ALLOWANCES.items():
                self._left[is_known] = min(at_once, self._left[is_known] + a_minute)
        if counted:
            named = [f"{number} {code} from {address}" for (code, address), number in counted.most_common(_NAMED_SOURCES)]
            rest = len(counted) - len(named)
            self.add(AuditRow(now_ms(), "count", "counted", requests=counted.total(),
                              detail=", ".join(named) + (f" and as many or fewer from each of {rest} more" if rest else "")))

    def stop(self) -> None:
        """End run()."""
        self._is_stopping.set()


class App:
    """What handlers may touch."""

    def __init__(self, store: Store, engine: Engine, current: Callable[[], Current], waiters: Waiters, publish: Publish, metrics: Metrics, log: Log):
        self.store, self.engine, self.current, self.waiters, self.publish = store, engine, current, waiters, publish
        self.metrics, self.log, self.feed = metrics, log, EventFeed(store, publish, metrics)
        self.started_ms = now_ms()
        # How many connections are open: the server says it.
        self.connections: Callable[[], int] = lambda: 0
        self.is_ready = False
        # What in force is older than its files, which could not be read again: "configuration", "secrets". And since when.
        self.stale: Mapping[str, int] = {}
        self.is_closing = False
        self.has_hinted = False
        self.started = time.monotonic()
        self.limiter = RateLimiter()
        self.journal = Journal(store, publish)
        self._signing_keys: tuple[Current | None, dict[str, SigningKey]] = (None, {})
        self.health = HealthCache()

    def signing_keys(self, current: Current) -> Mapping[str, SigningKey]:
        """Return every key that may sign for any service, by the name of its secret; put together once for each `current`."""
        of, keys = self._signing_keys
        if of is not current:
            names = [*current.config.security.hmac_keys]
            for service in current.services.by_name.values():
                names += service.security.hmac_keys
            keys = prepare_keys(current.keyring.pick(names))
            self._signing_keys = (current, keys)
        return keys


Handler = Callable[[App, Request], Response]


class Route(NamedTuple):
    """One row of ROUTES; `gate` is "open", "read" or "signature". `quick` gives the answer if that needs no waiting.

    What is not `is_limited` counts for no rate limit: monitoring asks it again and again.
    """

    method: str
    pattern: str
    gate: str
    handler: Handler
    doc: str
    quick: Callable[[App, Request], Response | None] | None = None
    is_limited: bool = True


def answer(status: int, document: object, *headers: tuple[str, str]) -> Response:
    """Return a JSON answer."""
    return Response(status, render_json(document), headers=headers)


_CHALLENGE = (("WWW-Authenticate", 'Bearer realm="hookshot", HMAC-SHA256 realm="hookshot", header="X-Hub-Signature-256"'),)


def answer_error(error: HookshotError, request_id: str) -> Response:
    """Return the problem+json answer of an error."""
    headers = error.headers
    if error.retry_after_s is not None:
        headers += (("Retry-After", str(error.retry_after_s)),)
    if error.kind.http == 401:
        headers += _CHALLENGE
    return Response(error.kind.http, render_problem(error, request_id, now_ms()), "application/problem+json", headers)


# --- gates


def client_address(request: Request, trusted: Sequence[Network | str]) -> Peer:
    """Return the client's address: the peer's, or what trusted proxies say (walked from the right); None if unreadable.

    A proxy that sets one forwarding header may pass the client's own other one through: if both are there, they must agree.
    """
    if not trusted or not is_in(request.peer, trusted):
        return request.peer
    found = {_first_untrusted(hops, request.peer, trusted) for hops in _forwarded_hops(request.headers)}
    return found.pop() if len(found) == 1 else None if found else request.peer


def _first_untrusted(hops: Sequence[str], peer: Peer, trusted: Sequence[Network | str]) -> Peer:
    address = peer
    for text in reversed(hops):
        address = parse_address(text)
        if not is_in(address, trusted):
            break
    return address


# A pair of RFC 7239, 4, and what ends it. A value that is not quoted may hold what ought to be: many proxies write it so.
_FORWARDED_PAIR = re.compile(r"""[ \t]*(?:([!#$%&'*+.^_`|~0-9A-Za-z-]+)=("(?:[^"\\]|\\.)*"|[^\s",;]*)[ \t]*)?([;,]|$)""", re.ASCII)
_MAX_FORWARDED_PAIRS = 200


def _forwarded_hops(headers: Mapping[str, str]) -> Iterator[list[str]]:
    if "forwarded" in headers:
        hops = _parse_forwarded(headers["forwarded"])
        # A hop that names no client, or two, cannot be walked past: what stands to its left is a stranger's own word.
        if any(hops):
            yield [hop[0] if len(hop) == 1 else "" for hop in hops]
    if "x-forwarded-for" in headers:
        yield headers["x-forwarded-for"].split(",")


def _parse_forwarded(text: str) -> list[list[str]]:
    """Return what each hop says in for=; two unreadable ones in place of a header that is malformed or very long."""
    hops: list[list[str]] = [[]]
    at = 0
    for _ in range(_MAX_FORWARDED_PAIRS):
        match = _FORWARDED_PAIR.match(text, at)
        if not match:
            break
        name, value, end = match.groups()
        if name and name.lower() == "for":
            hops[-1].append(re.sub(r"\\(.)", r"\1", value[1:-1]) if value.startswith('"') else value)
        if not end:
            return hops
        if end == ",":
            hops.append([])
        at = match.end()
    return [["", ""]]


def _is_local(request: Request) -> bool:
    """Return whether a request comes straight from this host, and not from a web page that a browser here shows.

    The Host header must name this host too: a page whose name was made to resolve to 127.0.0.1 (DNS rebinding) sends its
    own name. A page of another origin says so itself (Origin, and Sec-Fetch-Site of the Fetch Metadata specification).
    """
    peer, headers = request.peer, request.headers
    return ((peer == UNIX_PEER or is_loopback(peer)) and _names_this_host(headers.get("host", ""))
            and (headers.get("origin") is None or _names_this_host(headers["origin"].partition("://")[2]))
            and headers.get("sec-fetch-site", "none") in ("none", "same-origin")
            and not any(name in _FORWARDING_HEADERS or name.startswith("x-forwarded-") for name in headers))


def _names_this_host(host: str) -> bool:
    match = re.fullmatch(r"(localhost|[0-9.]+|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?", host.lower(), re.ASCII)
    return bool(match) and (match[1] == "localhost" or is_loopback(parse_address(match[1])))


# Header fields of an answer.
Fields = tuple[tuple[str, str], ...]


def admit(app: App, request: Request) -> tuple[Route, Fields]:
    """Let a request in by its head alone, before its body is read: address, rate, route, and a token or any signature at all.

    Returns the route, and the headers that the answer carries.
    """
    current = app.current()
    security = current.config.security
    address = client_address(request, security.trusted_proxies)
    if security.allowed_ips and not is_in(address, security.allowed_ips):
        _hint_at_proxy(app, request)
        raise HookshotError("access_denied", "this address may not use the server (security.allowed_ips)", reason="address")
    route = find_route(request.method, request.path, current.config)
    headers = () if route and not route.is_limited or not security.rate_limit else _check_rate(app, request, address, security.rate_limit)
    try:
        if not route:
            raise _no_route(request, current.config)
        if route.gate == "read":
            _check_read_access(current, request)
        elif route.gate == "signature" and not has_signature(request.headers):
            raise HookshotError("authentication", "the signature is missing or wrong", reason="missing")
    except HookshotError as error:
        error.headers += headers
        raise
    return route, headers


def _hint_at_proxy(app: App, request: Request) -> None:
    """Say once that a neighbour's forwarding headers are not believed: it may be a proxy, and all its clients count as one."""
    peer = request.peer
    is_neighbour = peer == UNIX_PEER or (peer is not None and not isinstance(peer, str) and peer.is_private)
    if app.has_hinted or not is_neighbour or not {"forwarded", "x-forwarded-for"} & request.headers.keys() \
            or is_in(peer, app.current().config.security.trusted_proxies):
        return
    app.has_hinted = True
    app.publish(Trouble("proxy_not_believed", f"forwarding headers from {peer} are not believed, so all its clients count as one; if it is your proxy, "
                        "add it to security.trusted_proxies"))


def _check_rate(app: App, request: Request, address: Peer, per_minute: int) -> Fields:
    """Return RateLimit headers (draft-ietf-httpapi-ratelimit-headers-10), or raise `rate_limited` with them."""
    allowance = app.limiter.admit(address, time.monotonic(), per_minute=per_minute)
    headers = (("RateLimit-Policy", f'"default";q={per_minute};w=60'), ("RateLimit", f'"default";r={allowance.left};t={allowance.reset_s}'))
    if allowance.wait_s:
        _hint_at_proxy(app, request)
        raise HookshotError("rate_limited", f"too many requests from this address: at most {per_minute} a minute (security.rate_limit)",
                            retry_after_s=int(allowance.wait_s) + 1, headers=headers)
    return headers


def _check_read_access(current: Current, request: Request) -> None:
    mode = current.config.security.read_access
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    token = current.keyring.values.get("read_token")
    has_token = token is not None and scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode("latin-1", "replace"), token)
    if not (mode == "open" or has_token or (mode == "local" and _is_local(request))):
        raise HookshotError("authentication", "reading needs the bearer token (secret read_token)"
                            + (", or a request straight from this host to localhost" if mode == "local" else ""), reason="token")


def _keeps_read_access(app: App, request: Request) -> Callable[[], bool]:
    """Return what says whether a reader that was let in may go on; looked at anew when something else is in force."""
    checked, is_allowed = app.current(), True

    def may_read() -> bool:
        nonlocal checked, is_allowed
        if checked is not (current := app.current()):
            checked, is_allowed = current, True
            try:
                _check_read_access(current, request)
            except HookshotError:
                is_allowed = False
        return is_allowed

    return may_read


MOVABLE_PATHS = ("/health", "/metrics")


def find_route(method: str, path: str, config: Config) -> Route | None:
    """Return the route of a request, or None."""
    path, method = _fixed_path(path, config), "GET" if method == "HEAD" else method
    return _PLAIN_ROUTES.get((method, path)) or next(
        (route for route in _PATTERN_ROUTES if route.method == method and matches_pattern(route.pattern, path)), None)


def _fixed_path(path: str, config: Config) -> str:
    """Return the path as ROUTES has it, or one that no route has: [monitoring] moves two of them."""
    monitoring = config.monitoring
    if path == monitoring.health_path:
        return "/health"
    if path == monitoring.metrics_path and monitoring.metrics_enabled:
        return "/metrics"
    return "" if path in MOVABLE_PATHS else path


def matches_pattern(pattern: str, path: str) -> bool:
    """Return whether a path is one that a route's pattern stands for."""
    parts, segments = pattern.split("/"), path.split("/")
    return len(parts) == len(segments) and all(part == segment or (part[:1] == "{" and segment) for part, segment in zip(parts, segments))


def _no_route(request: Request, config: Config) -> HookshotError:
    path = _fixed_path(request.path, config)
    methods = {route.method for route in ROUTES if matches_pattern(route.pattern, path)}
    if not methods:
        return HookshotError("not_found", "there is nothing at this path")
    allowed = ", ".join(sorted(methods | ({"HEAD"} if "GET" in methods else set())))
    return HookshotError("method_not_allowed", f"this path knows only {allowed}", headers=(("Allow", allowed),))


def begin(app: App, route: Route, request: Request) -> tuple[Request, Response | None]:
    """Pass the signature gate and answer what needs no waiting: neither disk, database nor much work. Never raises.

    Without an answer, the request that is returned goes to dispatch(), in a thread that may wait.
    """
    if len(request.body) * len(app.signing_keys(app.current())) > _QUICK_BODY_BYTES:
        return request, None
    try:
        request = _pass_signature(app, route, request)
        return request, route.quick(app, request) if route.quick else None
    except HookshotError as error:
        return request, refuse(app, request, error)
    except Exception as error:
        return request, answer_bug(app, request, error)


def dispatch(app: App, route: Route, request: Request) -> Response:
    """Return the answer to a request that has begun. Never raises."""
    try:
        request = _pass_signature(app, route, request)
        return _compress(request, route.handler(app, request))
    except HookshotError as error:
        return refuse(app, request, error)
    except Exception as error:
        return answer_bug(app, request, error)


def _pass_signature(app: App, route: Route, request: Request) -> Request:
    if route.gate != "signature" or request.verified:
        return request
    current = app.current()
    return request._replace(verified=verify(request.body, request.headers, app.signing_keys(current), current.config.security, now_ms()))


def answer_bug(app: App, request: Request, error: Exception) -> Response:
    """Publish a bug and return the answer that tells nothing of it but the request's id."""
    app.publish(Broken("request", error, request.request_id))
    told = HookshotError("internal", "the server made a mistake; its log has more under this request_id")
    _audit_refusal(app, request, client_address(request, app.current().config.security.trusted_proxies), told)
    return answer_error(told, request.request_id)


def refuse(app: App, request: Request, error: HookshotError) -> Response:
    """Publish that a request is refused (its path without the query, which may hold anything) and return the answer."""
    address = client_address(request, app.current().config.security.trusted_proxies)
    app.publish(Refused(request.request_id, address, request.method, request.path, error.kind.code, error.sentence, error.reason))
    _audit_refusal(app, request, address, error)
    return answer_error(error, request.request_id)


# --- the audit and the trace of decisions

# What decides on signed requests, and by which rule.
GATES = {
    "connection": "server.max_connections",
    "length": "server.max_request_size; the head says how long the body is",
    "address": "security.allowed_ips",
    "rate": "security.rate_limit",
    "credentials": "a signature is there",
    "transfer": "the body comes within server.request_timeout",
    "signature": "one of security.hmac_keys, or of the hmac_keys of a service, made it",
    "timestamp": "security.replay_window, security.require_timestamp; control requests must have one",
    "media_type": "JSON in UTF-8, not compressed",
    "fields": "fields and parameters are what they may be",
    "storage": "database and disk can be used",
    "key": "the key may sign for the service: security.hmac_keys, or the service's own hmac_keys",
    "target": "the service, or the deployment, is there",
    "id": "deploy_id, Idempotency-Key and webhook-id are not those of another request",
    "state": "the deployment can still be cancelled, or has ended; there is something to go back to",
    "enabled": "enabled of the service",
    "image": "allowed_image_pattern of the service",
    "overrides": "allowed_env_overrides of the service",
    "plan": "each command gets all that its placeholders need",
    "accepting": "the server is not shutting down",
    "lock": "the service is not locked, or by the same owner, or it is forced",
    "queue": "limits.max_queue_per_service, on_busy of the service",
}
_DOOR = ("connection", "length", "address", "rate", "credentials", "transfer", "signature", "timestamp", "media_type", "fields")
_REDONE = (*_DOOR, "storage", "key", "target", "id", "state", "enabled", "image", "overrides", "plan", "accepting")
# Which gates a request passes, in their order. A test walks along each.
GATES_OF = {
    "deploy": (*_DOOR, "key", "target", "enabled", "image", "overrides", "plan", "accepting", "storage", "id", "lock", "queue"),
    "plan": (*_DOOR, "key", "target", "enabled", "image", "overrides", "storage", "plan"),
    "retry": (*_REDONE, "lock", "queue"),
    "rollback": (*_REDONE, "queue"),
    "cancel": (*_DOOR, "storage", "key", "target", "id", "state"),
    "lock": (*_DOOR, "storage", "key", "target", "id", "lock"),
    "unlock": (*_DOOR, "storage", "key", "target", "id", "lock"),
}
# HookshotError.reason, or else its name, where that tells the gate.
_GATE_OF_WORD = {
    "overloaded": "connection", "too_large": "length", "length_required": "length", "bad_request": "length", "not_implemented": "length",
    "expectation": "length", "address": "address", "rate_limited": "rate", "missing": "credentials", "request_timeout": "transfer",
    "wrong": "signature", "stale": "timestamp", "no_timestamp": "timestamp", "media_type": "media_type", "validation": "fields",
    "storage": "storage", "disk_full": "storage", "other_service": "key", "service_not_found": "target", "deployment_not_found": "target",
    "conflict": "id", "not_possible": "state", "access_denied": "enabled", "shutting_down": "accepting", "service_locked": "lock", "busy": "queue"}


@contextlib.contextmanager
def _planning() -> Iterator[None]:
    """What is found not valid meanwhile, the plan refuses."""
    try:
        yield
    except HookshotError as error:
        error.gate = "plan" if error.name == "validation" else error.gate
        raise


def _action_of(request: Request, route: Route | None) -> str:
    """Return what the audit calls a request: "deploy", "cancel", ..., or method and route."""
    if route and route.gate == "signature":
        return route.pattern.rpartition("/")[2]
    return "-" if request.method == "-" else f"{request.method if request.method in _COUNTED_METHODS else OTHER} {route.pattern if route else OTHER}"


def _audit_refusal(app: App, request: Request, address: Peer, error: HookshotError) -> None:
    route = find_route(request.method, request.path, app.current().config)
    # Who may read, and asks for what is not there, is answered.
    if route and route.gate != "signature" and error.kind.http not in (401, 403, 429):
        return
    gate = error.gate or _GATE_OF_WORD.get(error.reason or "") or _GATE_OF_WORD.get(error.name)
    _audit_unwritten(app, request, address, _action_of(request, route), error.kind.code, gate, error.sentence, error.about)


def _audit_unwritten(app: App, request: Request, address: Peer, action: str, decision: str, gate: str | None, detail: str | None,
                  about: Sequence[str | None]) -> None:
    """Have the journal keep what no transaction has written: the row, if there may be one, and the use of the key."""
    key_id = request.verified.key_id if request.verified else None
    service, deploy_id, image = about
    if key_id:
        known = service if service in app.current().services.by_name else ""
        app.journal.use(KeyUse(key_id, known or "", now_ms(), render_peer(address), request.request_id))
    if app.journal.admits(decision, address, is_known=key_id is not None):
        mask = app.current().keyring.masker.mask_text
        app.journal.add(AuditRow(now_ms(), action, decision, request.request_id, render_peer(address), key_id, service, deploy_id,
                                 image and mask(image), gate, detail and clip(mask(detail), _MAX_DETAIL_CHARS)))


def handle_request(app: App, request: Request) -> Response:
    """GET /requests/{request_id}"""
    request_id = _last_segment(request)
    found = app.journal.find(request_id)
    if not found:
        raise HookshotError("not_found", f"there is no trace of a request {clip(escape_controls(request_id), 128)}: it is older than 7 days, or was "
                                         "one of many that were only counted, or never came")
    return answer(200, {"request_id": request_id, "requests": [_render_trace(row) for row in found]})


def _render_trace(row: AuditRow) -> dict[str, Any]:
    return {"at": render_time(row.at_ms), "action": row.action, "decision": row.decision, "detail": row.detail, "address": row.address,
            "key_id": row.key_id, "service": row.service, "deploy_id": row.deploy_id, "image": row.image, "gates": _render_gates(row)}


def _render_gates(row: AuditRow) -> list[dict[str, str]]:
    """Return the gates that a request came to, in order: it passed all but perhaps the last one."""
    names = GATES_OF.get("plan" if row.decision == "planned" else row.action, ())
    if row.decision not in ("accepted", "done", "planned"):
        # A gate that the list lacks cannot be told to stand behind others.
        names = (*names[: names.index(row.gate) if row.gate in names else 0], *([row.gate] if row.gate in GATES else []))
    result = {"accepted": "passed", "done": "passed", "planned": "passed", "repeated": "known"}.get(row.decision, "refused")
    of_service = f"service {row.service}" if row.service else "the service"
    return [{"gate": name, "rule": GATES[name].replace("the service", of_service), "result": result if name == row.gate else "passed"} for name in names]


def count_answer(app: App, method: str, route: Route | None, status: int, seconds: float) -> None:
    """Count an answer under its route's pattern; `route` is None for a request that is in no table or could not be read."""
    app.metrics.count_request(method if method in _COUNTED_METHODS else OTHER, route.pattern if route else OTHER, status, seconds)


# --- compressing


def _compress(request: Request, response: Response) -> Response:
    """Return the answer gzipped if the client takes that and it is worth it."""
    if response.stream is None and len(response.body) < _WORTH_GZIP_BYTES or response.content_type == "text/event-stream":
        return response
    headers = (*response.headers, ("Vary", "Accept-Encoding"))
    if not _takes_gzip(request.headers.get("accept-encoding", "")):
        return response._replace(headers=headers)
    try:
        import zlib  # a Python may lack it
    except ImportError:
        return response
    # 31: the largest window, and gzip's own frame.
    compressor = zlib.compressobj(6 if len(response.body) < _LARGE_BYTES else 1, zlib.DEFLATED, 31)
    headers += (("Content-Encoding", "gzip"),)
    if response.stream is not None:
        return response._replace(headers=headers, stream=_compress_stream(response.stream, compressor, zlib.Z_SYNC_FLUSH))
    return response._replace(headers=headers, body=compressor.compress(response.body) + compressor.flush())


def _takes_gzip(header: str) -> bool:
    """Return whether Accept-Encoding names gzip (or everything) with a weight above 0 (RFC 9110, 12.5.3)."""
    weights = {}
    for element in header.lower().split(","):
        name, _, parameter = element.partition(";")
        weights[name.strip()] = parameter.replace(" ", "") not in ("q=0", "q=0.", "q=0.0", "q=0.00", "q=0.000")
    return weights.get("gzip", weights.get("x-gzip", weights.get("*", False)))


def _compress_stream(stream: Iterator[bytes], compressor: Any, flush_mode: int) -> Iterator[bytes]:
    with contextlib.closing(stream):  # type: ignore[type-var]
        for chunk in stream:
            # A follower sees every line at once: what was compressed so far goes out with it.
            yield compressor.compress(chunk) + compressor.flush(flush_mode) if chunk else b""
    yield compressor.flush()


# --- deploying


def handle_deploy(app: App, request: Request) -> Response:
    """POST /deploy"""
    current, verified = app.current(), request.verified
    assert verified
    _check_media_type(request)
    deploy = parse_deploy(verified, request.headers.get("idempotency-key"))
    try:
        wait_s = parse_wait(request.query, request.headers.get("prefer"))
        return _deploy(app, request, current, deploy, wait_s)
    except HookshotError as error:
        error.about = (deploy.service, deploy.deploy_id, deploy.image)
        raise


def _deploy(app: App, request: Request, current: Current, deploy: DeployRequest, wait_s: int | None) -> Response:
    service = _service_for(current, deploy.service, deploy.key_id)
    check_request(service, deploy)
    trigger = _trigger_of(current, request, deploy.key_id)
    # What a caller may have put there by mistake would be in records, in argument lists and in environments.
    deploy = deploy._replace(metadata={name: current.keyring.masker.mask_text(text) for name, text in deploy.metadata.items()})
    draft = new_deployment(deploy, trigger, deploy.deploy_id or new_deploy_id(now_ms()), now_ms())
    if deploy.dry_run:
        with _planning():
            response = _answer_plan(app, service, draft)
        _audit_kept(app, request, "deploy", "planned", None, service.name, draft.deploy_id, draft.image)
        return response
    with _planning():
        build_plan(service, draft, current.config.limits, {}, None)
    submission = app.engine.submit(deploy, trigger, service.on_busy or "queue")
    # Whoever waits for the end of what he asked for himself, asks for it again and again.
    if not submission.created and not (wait_s and trigger[:2] == submission.deployment.trigger[:2]):
        _audit_kept(app, request, "deploy", "repeated", "id", service.name, submission.deployment.deploy_id, deploy.image)
    return _answer_submission(app, request, submission, _wait_of(current, wait_s))


def _audit_kept(app: App, request: Request, action: str, decision: str, gate: str | None, *about: str | None) -> None:
    """Keep a request that was let pass and has changed nothing; `about` is service, deploy_id and image."""
    address = client_address(request, app.current().config.security.trusted_proxies)
    _audit_unwritten(app, request, address, action, decision, gate, None, about)


def _wait_of(current: Current, wait_s: int | None) -> int | None:
    """Return how long an answer waits for the end of a deployment, where the caller may not have said so."""
    return MAX_WAIT_S if wait_s is None and current.config.server.deploy_response == "completed" else wait_s


def _trigger_of(current: Current, request: Request, key_id: str) -> Trigger:
    agent = request.headers.get("user-agent")
    return Trigger(render_peer(client_address(request, current.config.security.trusted_proxies)), key_id,
                   _plain_text(agent and current.keyring.masker.mask_text(agent)), request.request_id)


def _service_for(current: Current, name: str, key_id: str) -> Service:
    """Return the service, if the key that signed may deploy it."""
    _check_key(current, name, key_id)
    service = current.services.by_name.get(name)
    if not service:
        raise HookshotError("service_not_found", f"there is no service {clip(escape_controls(name), 40)}")
    return service


def _check_key(current: Current, name: str | None, key_id: str) -> None:
    """Raise unless a key may deploy a service; a key of one service gets the same answer for what is not there."""
    if not may_deploy(current, name, key_id):
        raise HookshotError("authentication", "the signature is missing or wrong", reason="other_service")


def _check_media_type(request: Request) -> None:
    media_type, _, parameters = request.headers.get("content-type", "application/json").partition(";")
    if media_type.strip().lower() != "application/json" or parameters.strip().lower().replace('"', "") not in ("", "charset=utf-8"):
        raise HookshotError("media_type", "the body must be application/json in UTF-8")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise HookshotError("media_type", "the body must not be compressed")


def _plain_text(text: str | None) -> str | None:
    return None if text is None else clip(escape_controls(text), 200)


def _answer_plan(app: App, service: Service, draft: Deployment) -> Response:
    last_good = app.store.service_record(service.name).current_image
    draft = draft._replace(previous_image=choose_previous_image(draft.image, draft.previous_image, last_good))
    try:
        account = find_account(service.user, service.group)
    except ValueError as error:
        raise HookshotError("validation", str(error)) from None
    plan = build_plan(service, draft, app.current().config.limits, app.engine.environ, account)
    lock = app.store.locks(now_ms()).get(service.name)
    document = render_json({"deploy_id": draft.deploy_id, **render_plan(plan), "locked": lock is not None, "lock": lock and render_lock(lock)})
    return Response(200, app.current().keyring.masker.mask(document))


def _urls(deployment: Deployment) -> dict[str, str]:
    return {"status_url": f"/status/{deployment.deploy_id}", "log_url": f"/logs/{deployment.deploy_id}"}


def _answer_submission(app: App, request: Request, submission: Submission, wait_s: int | None) -> Response:
    deployment = submission.deployment
    applied = (("Preference-Applied", f"wait={wait_s}"), ("Vary", "Prefer")) if wait_s is not None and "prefer" in request.headers else ()
    if wait_s and not deployment.is_terminal:
        deployment = _wait_for_end(app, request, deployment, min(wait_s, MAX_WAIT_S))
    if deployment.is_terminal and (wait_s is not None or not submission.created):
        return _answer_end(deployment, is_repeat=not submission.created and wait_s is None, headers=applied)
    document = {"deploy_id": deployment.deploy_id, "service": deployment.service, "status": deployment.state, "image": deployment.image,
                "position": submission.position, **_urls(deployment)}
    location = ("Location", f"/status/{deployment.deploy_id}")
    return answer(202 if submission.created or wait_s is not None else 200, document, location, *applied)


def _wait_for_end(app: App, request: Request, deployment: Deployment, seconds: int) -> Deployment:
    """Return the deployment as it is when it ended, time is up, the client has gone, or the server closes."""
    deadline = time.monotonic() + seconds
    with app.waiters.waiting_for(deployment.deploy_id) as waiter:
        latest = app.store.get(deployment.deploy_id) or deployment
        while not latest.is_terminal and not app.is_closing and (left_s := deadline - time.monotonic()) > 0:
            latest = waiter.wait(min(left_s, 1.0)) or latest
            if request.is_gone():
                break
    return latest if latest.is_terminal else app.store.get(deployment.deploy_id) or latest


def _answer_end(deployment: Deployment, *, is_repeat: bool, headers: tuple[tuple[str, str], ...]) -> Response:
    document: dict[str, Any] = {
        "deploy_id": deployment.deploy_id, "service": deployment.service, "status": deployment.state, "image": deployment.image,
        "started_at": render_time(deployment.started_ms), "completed_at": render_time(deployment.completed_ms),
        "duration_seconds": None if deployment.duration_ms is None else deployment.duration_ms / 1000, **_urls(deployment)}
    if deployment.state is State.ROLLED_BACK:
        document |= {"attempted_image": deployment.image, "current_image": deployment.previous_image, "error": deployment.error,
                     "rollback_reason": deployment.rollback_reason}
    elif deployment.state in (State.FAILED, State.ROLLBACK_FAILED):
        document |= {"error": deployment.error, "failure_stage": deployment.failure_stage, "failure_detail": deployment.error,
                     "requires_intervention": deployment.state is State.ROLLBACK_FAILED}
    elif deployment.state is State.CANCELLED:
        document["error"] = deployment.error or "cancelled before it ran"
    failed = deployment.state in (State.FAILED, State.ROLLBACK_FAILED)
    # A repeated request is told what became of the first; its own handling did not fail.
    return answer(500 if failed and not is_repeat else 200, document, ("Location", f"/status/{deployment.deploy_id}"), *headers)


# --- control


class _Again(NamedTuple):
    """What is deployed again: an image with the metadata and overrides that it had."""

    image: str
    metadata: Mapping[str, str]
    env: Mapping[str, str]


class _Done(NamedTuple):
    """What a control request did, told before its answer, which may wait."""

    service: str
    deploy_id: str | None
    message: str
    is_repeated: bool
    answer: Callable[[], Response]


def _control(app: App, request: Request, action: str, work: Callable[[App, Request, ControlRequest, Trigger], _Done]) -> Response:
    """Do what a control request asks, and publish who asked for what and what came of it, refusals too."""
    assert request.verified
    target, mask = request.path.split("/")[2], app.current().keyring.masker.mask_text
    trigger = _trigger_of(app.current(), request, request.verified.key_id)
    try:
        _check_media_type(request)
        control = parse_control(request.verified, action, target)
        done = work(app, request, control._replace(owner=mask(control.owner), reason=control.reason and mask(control.reason)), trigger)
    except HookshotError as error:
        shown = clip(escape_controls(target), 128)
        deploy_id, service = (shown, None) if CONTROLS[action][0] == "deploy_id" else (None, shown)
        error.about = (service, deploy_id, None)
        # Whoever has read a deploy on its way can send its signature here: that has no line of its own, so it cannot fill the log.
        if error.reason != "no_timestamp":
            app.publish(Controlled(trigger, action, service, deploy_id, error.kind.code, error.sentence))
        raise
    app.publish(Controlled(trigger, action, done.service, done.deploy_id, "repeated" if done.is_repeated else "done", done.message))
    if done.is_repeated:
        _audit_kept(app, request, action, "repeated", "id", done.service, done.deploy_id, None)
    return done.answer()


def _asked_by(trigger: Trigger, control: ControlRequest) -> str:
    return f"asked by {trigger.key_id} from {trigger.address}{': ' if control.reason else ''}{control.reason or ''}"


def _deployment_for(app: App, control: ControlRequest) -> Deployment:
    """Return the deployment that a control request names, if its key may deploy the service."""
    deployment = app.store.get(control.target) if DEPLOY_ID.fullmatch(control.target) else None
    _check_key(app.current(), deployment and deployment.service, control.key_id)
    if not deployment:
        raise _no_deployment(control.target)
    return deployment


def handle_cancel(app: App, request: Request) -> Response:
    """POST /deployments/{id}/cancel"""
    return _control(app, request, "cancel", _cancel)


def _cancel(app: App, request: Request, control: ControlRequest, trigger: Trigger) -> _Done:
    _deployment_for(app, control)
    deployment, is_repeated = app.engine.cancel(control, trigger, f"cancelled, {_asked_by(trigger, control)}")
    words = "is stopped" if not deployment.is_terminal else f"has ended as {deployment.state}"
    return _Done(deployment.service, deployment.deploy_id, f"{deployment.service} {deployment.image} {words}", is_repeated,
                 lambda: _answer_cancel(app, request, deployment))


def _answer_cancel(app: App, request: Request, deployment: Deployment) -> Response:
    if not deployment.is_terminal:
        deployment = _wait_for_end(app, request, deployment, _CANCEL_WAIT_S)
    if deployment.is_terminal:
        return _answer_end(deployment, is_repeat=True, headers=())
    return answer(202, _render_summary(deployment), ("Location", f"/status/{deployment.deploy_id}"))


def handle_retry(app: App, request: Request) -> Response:
    """POST /deployments/{id}/retry"""
    return _control(app, request, "retry", _retry)


def _retry(app: App, request: Request, control: ControlRequest, trigger: Trigger) -> _Done:
    deployment = _deployment_for(app, control)
    service = _service_for(app.current(), deployment.service, control.key_id)

    def find() -> _Again:
        if not deployment.is_terminal:
            raise HookshotError("not_possible", f"deployment {deployment.deploy_id} has not ended yet: {deployment.state}")
        return _Again(deployment.image, deployment.metadata, deployment.env)

    return _deploy_again(app, request, control, trigger, service, find, f"retry of {deployment.deploy_id}", ignores_lock=False)


def handle_rollback(app: App, request: Request) -> Response:
    """POST /services/{name}/rollback"""
    return _control(app, request, "rollback", _roll_back_service)


def _roll_back_service(app: App, request: Request, control: ControlRequest, trigger: Trigger) -> _Done:
    service = _service_for(app.current(), control.target, control.key_id)
    # Whoever locks a service wants it to stay well; and going back is what makes it well.
    return _deploy_again(app, request, control, trigger, service, lambda: _find_target(app.store, service, control.to),
                         f"rollback to {control.to or 'the last good image'}", ignores_lock=True)


def _find_target(store: Store, service: Service, to: str | None) -> _Again:
    """Return what to go back to: the last good one, a deployment that succeeded, or an image with the overrides that it had."""
    named = store.get(to) if to and DEPLOY_ID.fullmatch(to) else None
    if named and named.service == service.name and named.state is not State.SUCCEEDED:
        raise HookshotError("not_possible", f"deployment {to} is {named.state}: only one that succeeded can be gone back to; or name an image")
    found = named if named and named.service == service.name else store.find_good(service.name, to)
    if found:
        return _Again(found.image, found.metadata, found.env)
    if not to:
        raise HookshotError("not_possible", f"service {service.name} has nothing to go back to: no other image has succeeded; name one with \"to\"")
    return _Again(to, {}, {})


def _deploy_again(app: App, request: Request, control: ControlRequest, trigger: Trigger, service: Service,
                  find: Callable[[], _Again], words: str, *, ignores_lock: bool) -> _Done:
    """Queue a deployment like an earlier one, as what the service allows now; the same message again is told of the first."""
    current = app.current()
    wait_s = _wait_of(current, parse_wait(request.query, request.headers.get("prefer")))
    if existing := app.store.find_repeated(service.name, control):
        submission = Submission(existing, False, None)
    else:
        again = find()
        body = render_json({"service": service.name, "image": again.image, "metadata": again.metadata, "overrides": {"env": again.env}})
        assert request.verified
        # The digest tells the message that it came with; the body that was made from it is no message.
        deploy = parse_deploy(request.verified._replace(body=body), None)._replace(digest=control.digest)
        check_request(service, deploy)
        with _planning():
            build_plan(service, new_deployment(deploy, trigger, new_deploy_id(now_ms()), now_ms()), current.config.limits, {}, None)
        submission = app.engine.submit(deploy, trigger, service.on_busy or "queue", reason=f"{words}, {_asked_by(trigger, control)}",
                                       ignores_lock=ignores_lock, action=control.action)
    made = submission.deployment
    return _Done(service.name, made.deploy_id, f"{words}: {made.service} {made.image}", not submission.created,
                 lambda: _answer_submission(app, request, submission, wait_s))


def handle_lock(app: App, request: Request) -> Response:
    """POST /services/{name}/lock"""
    return _control(app, request, "lock", _lock)


def _lock(app: App, request: Request, control: ControlRequest, trigger: Trigger) -> _Done:
    service = _service_for(app.current(), control.target, control.key_id)
    return _lock_done(control, service, app.store.lock(control, trigger, now_ms()))


def handle_unlock(app: App, request: Request) -> Response:
    """POST /services/{name}/unlock"""
    return _control(app, request, "unlock", _unlock)


def _unlock(app: App, request: Request, control: ControlRequest, trigger: Trigger) -> _Done:
    service = _service_for(app.current(), control.target, control.key_id)
    return _lock_done(control, service, app.store.unlock(control, trigger, now_ms()))


def _lock_done(control: ControlRequest, service: Service, change: LockChange) -> _Done:
    lock, force = change.lock, " (forced)" if control.force else ""
    words = "is not locked" if not lock else f"is locked by {lock.owner} until {render_time(lock.until_ms) or 'it is unlocked'}"
    document = {"service": service.name, "locked": lock is not None, "lock": lock and render_lock(lock)}
    return _Done(service.name, None, f"{service.name} {words}{force}", change.is_repeated, lambda: answer(200, document))


# --- reading


def _last_segment(request: Request) -> str:
    return request.path.rpartition("/")[2]


def _deployment_of_path(app: App, request: Request) -> Deployment:
    deploy_id = _last_segment(request)
    deployment = app.store.get(deploy_id) if DEPLOY_ID.fullmatch(deploy_id) else None
    if not deployment:
        raise _no_deployment(deploy_id)
    return deployment


def _no_deployment(deploy_id: str) -> HookshotError:
    return HookshotError("deployment_not_found", f"there is no deployment {clip(escape_controls(deploy_id), 128)}; it may be beyond its retention")


def handle_status(app: App, request: Request) -> Response:
    """GET /status/{id}"""
    record = app.store.record(_deployment_of_path(app, request).deploy_id)
    return answer(200, _render_record(*record)) if record else handle_status(app, request)


def _render_record(deployment: Deployment, moves: Sequence[Move], results: Sequence[Result]) -> dict[str, Any]:
    rolled = {State.ROLLED_BACK: True, State.ROLLBACK_FAILED: False}
    attempted = any(move.state is State.ROLLING_BACK for move in moves)
    return {
        "deploy_id": deployment.deploy_id, "service": deployment.service, "status": deployment.state, "image": deployment.image,
        "previous_image": deployment.previous_image,
        "progress": _render_progress(deployment), "stopping": _is_stopping(deployment),
        "timings": {"queued_at": render_time(deployment.queued_ms), "started_at": render_time(deployment.started_ms),
                    "completed_at": render_time(deployment.completed_ms), "duration_ms": deployment.duration_ms,
                    "queue_time_ms": deployment.queue_ms, "deploy_time_ms": deployment.deploy_ms,
                    "healthcheck_time_ms": deployment.healthcheck_ms, "rollback_time_ms": deployment.rollback_ms},
        "state_transitions": [{"state": move.state, "at": render_time(move.at_ms), "reason": move.reason} for move in moves],
        "commands": [_render_result(result) for result in results],
        "rollback": {"attempted": attempted, "reason": deployment.rollback_reason, "succeeded": rolled.get(deployment.state)},
        "error": deployment.error, "failure_stage": deployment.failure_stage, "metadata": deployment.metadata,
        "triggered_by": deployment.trigger._asdict(), "recoveries": deployment.recoveries,
        "status_url": f"/status/{deployment.deploy_id}", "logs_url": f"/logs/{deployment.deploy_id}"}


def _render_progress(deployment: Deployment) -> dict[str, Any]:
    return {"phase": deployment.phase, "steps_completed": _steps_completed(deployment), "steps_total": deployment.steps_total,
            "current_step": deployment.current_step}


def _steps_completed(deployment: Deployment) -> int:
    """Return how many steps of the phase (for an ended deployment: of its last one) are done."""
    return deployment.steps_total if deployment.state is State.SUCCEEDED else max(0, deployment.step - 1)


def _render_result(result: Result) -> dict[str, Any]:
    preview = (result.stderr if not result.is_ok and result.stderr else result.stdout).strip()
    return {"phase": result.phase, "step": result.step, "name": result.name, "command": result.command, "status": result.status,
            "exit_code": result.exit_code, "signal": result.signal, "timed_out": result.status == "timed_out", "attempt": result.attempt,
            "critical": result.critical, "note": result.note or None, "started_at": render_time(result.started_ms),
            "duration_ms": result.duration_ms, "output_preview": preview[-_PREVIEW_CHARS:], "stdout": result.stdout, "stderr": result.stderr}


def _parse_number_parameter(query: Mapping[str, str], name: str, low: int, high: int, default: int) -> int:
    text = query.get(name, str(default))
    if not re.fullmatch(r"\d{1,18}", text, re.ASCII) or not low <= int(text) <= high:
        raise HookshotError("validation", f"{name}: {clip(escape_controls(text), 40)} is not a number from {low} to {high}")
    return int(text)


def handle_deployments(app: App, request: Request) -> Response:
    """GET /deployments"""
    limit = _parse_number_parameter(request.query, "limit", 1, 200, 50)
    before = _parse_number_parameter(request.query, "cursor", 1, 10**18 - 1, 10**18 - 1)
    state = request.query.get("status")
    if state is not None and state not in list(State):
        raise HookshotError("validation", f"status: {clip(escape_controls(state), 40)} is not one of {', '.join(State)}")
    is_unfinished = request.query.get("unfinished", "0") not in ("0", "false")
    found = app.store.history(service=request.query.get("service"), state=state, before_seq=before, limit=limit + 1, is_unfinished=is_unfinished)
    return answer(200, {"deployments": [_render_summary(deployment) for deployment in found[:limit]],
                        "next_cursor": str(found[limit - 1].seq) if len(found) > limit else None})


def _render_summary(deployment: Deployment) -> dict[str, Any]:
    return {"deploy_id": deployment.deploy_id, "service": deployment.service, "status": deployment.state, "image": deployment.image,
            "previous_image": deployment.previous_image, "queued_at": render_time(deployment.queued_ms),
            "started_at": render_time(deployment.started_ms), "completed_at": render_time(deployment.completed_ms),
            "duration_ms": deployment.duration_ms, "error": deployment.error, "progress": _render_progress(deployment), "stopping": _is_stopping(deployment), **_urls(deployment)}


def _is_stopping(deployment: Deployment) -> bool:
    """Return whether somebody has cancelled it, and it has not ended yet."""
    return deployment.cancel_reason is not None and not deployment.is_terminal


def handle_services(app: App, request: Request) -> Response:
    """GET /services"""
    counts = app.store.queue_counts()
    services, locks = app.current().services.by_name, app.store.locks(now_ms())
    keys = _render_keys(app) if request.query.get("keys", "0") not in ("0", "false") else {}
    return answer(200, {"services": [_render_service(service, app.store.service_record(name), counts.get(name, {}), locks.get(name))
                                     for name, service in sorted(services.items())], **keys})


def _render_keys(app: App) -> dict[str, Any]:
    """Return the keys in force by service, names only, and their last uses; service None: the key signed, but not for a service that is there."""
    current, uses = app.current(), app.store.key_uses()
    keys, everywhere = app.signing_keys(current), current.config.security.hmac_keys
    of_services = [(name, key) for name, service in sorted(current.services.by_name.items())
                   for key in dict.fromkeys((*everywhere, *service.security.hmac_keys)) if key in keys]
    rows = [(name, key, uses.get((key, name))) for name, key in of_services] + [(None, key, uses[key, ""]) for key in keys if (key, "") in uses]
    return {"keys": [{"service": name, "name": key, "last_used_at": render_time(use.at_ms) if use else None, "address": use and use.address,
                      "request_id": use and use.request_id} for name, key, use in rows],
            "keys_recorded_since": render_time(int(app.store.marks()["keys_since_ms"]))}


def handle_service(app: App, request: Request) -> Response:
    """GET /services/{name}"""
    name = _last_segment(request)
    service = app.current().services.by_name.get(name)
    if not service:
        raise HookshotError("service_not_found", f"there is no service {clip(escape_controls(name), 40)}")
    return answer(200, _render_service(service, app.store.service_record(name), app.store.queue_counts().get(name, {}),
                                       app.store.locks(now_ms()).get(name)))


def _render_service(service: Service, record: ServiceRecord, counts: Mapping[str, int], lock: Lock | None) -> dict[str, Any]:
    ran = record.succeeded + record.failed + record.rolled_back + record.rollback_failed
    last = {"deploy_id": record.last_deploy_id, "status": record.last_status, "completed_at": render_time(record.last_completed_ms)}
    return {
        "name": service.name, "description": service.description, "enabled": service.enabled, "current_image": record.current_image,
        "last_deploy": last if record.last_deploy_id else None, "health": record.health,
        "locked": lock is not None, "lock": lock and render_lock(lock),
        "queue": {"pending": counts.get("queued", 0), "active": counts.get("active", 0)},
        "stats": {"total_deploys": ran, "succeeded": record.succeeded, "failed": record.failed, "rolled_back": record.rolled_back,
                  "rollback_failed": record.rollback_failed, "cancelled": record.cancelled,
                  "success_rate": round(record.succeeded / ran, 4) if ran else None,
                  "avg_duration_seconds": round(record.duration_ms / ran / 1000, 3) if ran else None,
                  "last_failure": render_time(record.last_failure_ms)}}


def handle_logs(app: App, request: Request) -> Response:
    """GET /logs/{id}"""
    deployment = _deployment_of_path(app, request)
    path = app.store.log_path(deployment)
    is_sse = "text/event-stream" in request.headers.get("accept", "")
    follows = is_sse or request.query.get("follow", "0") not in ("0", "false")
    if not os.path.exists(path) and deployment.is_terminal and not is_sse:
        raise HookshotError("not_found", f"the log of {deployment.deploy_id} is gone (storage.retention.log_days), or nothing ever ran")
    start = 0
    if "tail" in request.query:
        start = _tail_offset(path, _parse_number_parameter(request.query, "tail", 0, MAX_TAIL_LINES, 100))
    if is_sse:
        resume = request.headers.get("last-event-id", "")
        start = int(resume) if re.fullmatch(r"\d{1,12}", resume, re.ASCII) else start
        stream = _follow_events(app, request, deployment, path, start)
        return Response(200, content_type="text/event-stream", headers=(("X-Accel-Buffering", "no"),), stream=stream)
    stream = (chunk for _, chunk in _read_log(app, request, deployment, path, start, follows))
    return Response(200, content_type="text/plain; charset=utf-8", headers=(("X-Accel-Buffering", "no"),), stream=stream)


def _open_log(path: str) -> Any:
    """Return the open file; FileNotFoundError if there is none yet."""
    try:
        return open(path, "rb", buffering=0)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise HookshotError("storage", f"the log cannot be read: {error.strerror}") from None


def _tail_offset(path: str, lines: int) -> int:
    """Return where the last `lines` lines of a file begin; its end is read backwards, a block at a time."""
    with contextlib.suppress(FileNotFoundError), _open_log(path) as file:
        position = file.seek(0, os.SEEK_END)
        missing = lines + 1  # the newline that ends the last line counts too
        while position > 0:
            size = min(CHUNK_BYTES, position)
            position = file.seek(position - size)
            block = file.read(size)
            found = block.count(b"\n")
            if found >= missing:
                for _ in range(found - missing + 1):
                    cut = block.find(b"\n") if _ == 0 else block.find(b"\n", cut + 1)
                return position + cut + 1
            missing -= found
    return 0


def _read_log(app: App, request: Request, deployment: Deployment, path: str, start: int, follows: bool) -> Iterator[tuple[int, bytes]]:
    """Yield (offset after it, chunk) from `start` on; with `follows` until the deployment has ended, b"" when idle."""
    file, may_read = None, _keeps_read_access(app, request)
    try:
        with app.waiters.waiting_for(deployment.deploy_id) as waiter:
            is_over = not follows or (app.store.get(deployment.deploy_id) or deployment).is_terminal
            while True:
                if not may_read():
                    raise HookshotError("authentication", f"the log of {deployment.deploy_id} may not be read any more")
                is_over = is_over or waiter.deployment is not None
                if file is None and os.path.exists(path):
                    file = open(path, "rb", buffering=0)
                    file.seek(start)
                chunk = file.read(CHUNK_BYTES) if file else b""
                if chunk:
                    start += len(chunk)
                    yield start, chunk
                elif is_over or app.is_closing or request.is_gone():
                    return
                else:
                    yield start, b""
                    waiter.wait(_FOLLOW_PAUSE_S)
    except OSError as error:
        # The answer has begun, so the client cannot be told; as an error of the link the disk's would go unnoticed.
        raise HookshotError("storage", f"the log of {deployment.deploy_id} cannot be read: {error.strerror}") from error
    finally:
        if file:
            file.close()


def _follow_events(app: App, request: Request, deployment: Deployment, path: str, start: int) -> Iterator[bytes]:
    """Yield the log as server-sent events of whole lines, their ids offsets to resume from; the last event is "end".

    Not an event for each line: many readers of a large log would leave the interpreter to nobody else.
    """
    rest, sent = b"", time.monotonic()
    for offset, chunk in _read_log(app, request, deployment, path, start, True):
        lines, newline, rest = (rest + chunk).rpartition(b"\n")
        if newline or time.monotonic() - sent >= _HEARTBEAT_S:
            sent = time.monotonic()
            yield _render_lines(offset - len(rest), lines) if newline else b": still running\n\n"
    if rest:  # a disk that was full has cut the last line off
        yield _render_lines(offset, rest)
    latest = app.store.get(deployment.deploy_id) or deployment
    yield b"event: end\ndata: " + render_json({"deploy_id": latest.deploy_id, "status": latest.state, "error": latest.error}) + b"\n"


def _render_lines(offset: int, lines: bytes) -> bytes:
    """Return lines of a log as a server-sent event, its id the offset after them."""
    return b"id: %d\ndata: %b\n\n" % (offset, lines.replace(b"\n", b"\ndata: "))


def handle_events(app: App, request: Request) -> Response:
    """GET /events"""
    service = request.query.get("service")
    if service is not None and service not in app.current().services.by_name:
        raise HookshotError("service_not_found", f"there is no service {clip(escape_controls(service), 40)}")
    resume = request.headers.get("last-event-id", "")
    after = _parse_number_parameter(request.query, "after", 0, 10**18 - 1, 0) if "after" in request.query else None
    # Before ?after=: an EventSource that comes again asks for the same URL.
    after = int(resume) if re.fullmatch(r"\d{1,18}", resume, re.ASCII) else after
    reader = app.feed.open(after, service, request.request_id, _keeps_read_access(app, request))
    return Response(200, content_type="text/event-stream", headers=(("X-Accel-Buffering", "no"),), stream=reader.backlog(), feed=reader)


def handle_metrics(app: App, request: Request) -> Response:
    """GET /metrics"""
    is_openmetrics = wants_openmetrics(request.headers.get("accept", ""))
    body = app.metrics.render(_measure(app), is_openmetrics=is_openmetrics)
    return Response(200, body, METRICS_TYPES[is_openmetrics], (("Vary", "Accept"),))


def _measure(app: App) -> list[Sample]:
    """Return what is true at this moment only; what cannot be found out is left out."""
    config, services = app.current().config, app.current().services.by_name
    python = ".".join(map(str, sys.version_info[:3]))
    samples: list[Sample] = [
        ("hookshot_build_info", (__version__, python, sqlite3.sqlite_version), 1),
        ("hookshot_start_time_seconds", (), app.started_ms / 1000),
        ("hookshot_ready", (), int(app.is_ready)),
        ("hookshot_secrets_last_reload_successful", (), int("secrets" not in app.stale)),
        ("hookshot_workers_alive", (), app.engine.alive_workers()),
        ("hookshot_workers_configured", (), config.server.worker_threads),
        ("hookshot_connections", (), app.connections()),
        ("hookshot_event_streams", (), app.feed.readers),
        ("hookshot_log_lines_lost_total", (), app.log.lines_lost)]
    # A full or broken disk must not take the other figures away.
    with contextlib.suppress(HookshotError, OSError):
        counts, pending, locks = app.store.queue_counts(), app.store.outbox_counts(), app.store.locks(now_ms())
        samples.append(("deployment_queue_size", (), sum(count["queued"] for count in counts.values())))
        samples += [("deployment_active", (name,), counts.get(name, {}).get("active", 0)) for name in sorted({*services, *counts})]
        samples += [("hookshot_service_locked", (name,), int(name in locks)) for name in sorted({*services, *locks})]
        channels = {channel.name: 0 for channel in channels_of(config.notifications, app.current().keyring.values)}
        samples += [("hookshot_notifications_pending", (name,), number) for name, number in {**channels, **pending}.items()]
        samples.append(("hookshot_database_size_bytes", (), app.store.size_bytes()))
    if app.engine.logs_bytes is not None:
        samples.append(("hookshot_deployment_logs_bytes", (), app.engine.logs_bytes))
    with contextlib.suppress(OSError):
        samples.append(("hookshot_disk_free_bytes", (), free_bytes(config.storage.data_dir)))
    if own := read_own_figures():
        samples += [("process_cpu_seconds_total", (), own.cpu_s), ("process_threads", (), own.threads),
                    ("process_virtual_memory_bytes", (), own.virtual_bytes), ("process_resident_memory_bytes", (), own.resident_bytes),
                    ("process_start_time_seconds", (), own.started_s), ("process_open_fds", (), own.descriptors),
                    ("process_max_fds", (), own.max_descriptors)]
    return samples


def _recent_health(app: App, request: Request) -> Response | None:
    """Return the last report's answer while it is fresh; rendered once a second."""
    report, now, lifetime_s = app.health.report, time.monotonic(), app.current().config.monitoring.status_cache_seconds
    if not report or not lifetime_s or (now - report[0] >= lifetime_s and now - app.health.asked_s >= _HEALTH_PATIENCE_S):
        app.health.asked_s = now
        return None
    made_at, uptime_s = report[0], int(now - app.started)
    rendered = app.health.rendered
    if not rendered or rendered[:2] != (made_at, uptime_s):
        document = {**report[1], "uptime_seconds": uptime_s}
        rendered = app.health.rendered = (made_at, uptime_s, _answer_health(document))
    return rendered[2]


def handle_health(app: App, request: Request) -> Response:
    """GET /health"""
    report = app.health.report = (time.monotonic(), _examine(app))
    return _answer_health({**report[1], "uptime_seconds": int(time.monotonic() - app.started)})


def _answer_health(document: dict[str, Any]) -> Response:
    return answer(200, document) if document["status"] == "healthy" else answer(503, document, ("Retry-After", "5"))


def _examine(app: App) -> dict[str, Any]:
    config = app.current().config
    workers, free = app.engine.alive_workers(), 0
    counts: dict[str, dict[str, int]] = {}
    size, database = None, "ok"
    try:
        free = free_bytes(config.storage.data_dir)
        counts, size = app.store.queue_counts(), app.store.size_bytes()
    except HookshotError as error:
        database = error.sentence
    except OSError as error:
        database = f"the data directory cannot be read: {error.strerror}"
    expected = config.server.worker_threads
    checks = {
        "database": database,
        "disk_space": "ok" if free >= DISK_RESERVE_BYTES else f"only {render_size(free)} are free for the data directory",
        "worker_pool": "ok" if workers == expected or not app.is_ready else f"only {workers} of {expected} workers are alive"}
    return {
        "status": "healthy" if all(check == "ok" for check in checks.values()) else "unhealthy", "version": __version__,
        "uptime_seconds": 0,
        "deployment_queue": {"pending": sum(count["queued"] for count in counts.values()),
                             "active": sum(count["active"] for count in counts.values()), "workers": workers},
        "database": {"connected": database == "ok", "size_bytes": size}, "logs": {"size_bytes": app.engine.logs_bytes}, "checks": checks}


def handle_ready(app: App, request: Request) -> Response:
    """GET /ready"""
    message = "ready" if app.is_ready else "draining" if app.engine.is_draining else "starting"
    # Since when, and no more: strangers ask too.
    stale = {part: render_time(since_ms) for part, since_ms in app.stale.items()}
    document = {"ready": app.is_ready, "message": message} | ({"stale": stale} if stale else {})
    return answer(200 if app.is_ready else 503, document,
                  *(() if app.is_ready else (("Retry-After", "5"),)))


ROUTES: tuple[Route, ...] = (
    Route("POST", "/deploy", "signature", handle_deploy, "Accept a deployment; ?wait=N or Prefer: wait=N answers when it ended."),
    Route("POST", "/deployments/{id}/cancel", "signature", handle_cancel, "End a deployment that waits or runs, as Cancelled."),
    Route("POST", "/deployments/{id}/retry", "signature", handle_retry, "Deploy again what an ended deployment deployed, with its overrides."),
    Route("POST", "/services/{name}/rollback", "signature", handle_rollback, "Deploy the last good image again, or another one, with the overrides that it had."),
    Route("POST", "/services/{name}/lock", "signature", handle_lock, "Refuse deploys of the service from now on: owner, reason, for."),
    Route("POST", "/services/{name}/unlock", "signature", handle_unlock, "Take deploys of the service again."),
    Route("GET", "/status/{id}", "read", handle_status, "One deployment: its state, history, commands and timings."),
    Route("GET", "/logs/{id}", "read", handle_logs, "Its log; ?tail=N for the last lines, ?follow=1 until it ends, or server-sent events."),
    Route("GET", "/deployments", "read", handle_deployments, "Deployments, newest first; service, status, unfinished, limit (1-200), cursor."),
    Route("GET", "/events", "read", handle_events, "Every move of every deployment as it happens, as server-sent events; service, after."),
    Route("GET", "/metrics", "read", handle_metrics, "Metrics for Prometheus, as text or as OpenMetrics.", is_limited=False),
    Route("GET", "/requests/{request_id}", "read", handle_request, "Why a signed request of the last 7 days did or did not do what it asked for: the gates it came to."),
    Route("GET", "/services", "read", handle_services, "Every service: what runs, how the last deployment ended, statistics; ?keys=1 adds the keys in force and their last uses."),
    Route("GET", "/services/{name}", "read", handle_service, "One service."),
    Route("GET", "/health", "open", handle_health, "Whether database, disk and workers are well; 503 if not.", quick=_recent_health, is_limited=False),
    Route("GET", "/ready", "open", handle_ready, "Whether deploys are accepted; 503 while starting or draining.", quick=handle_ready, is_limited=False),
)
_PLAIN_ROUTES = {(route.method, route.pattern): route for route in ROUTES if "{" not in route.pattern}
_PATTERN_ROUTES = tuple(route for route in ROUTES if "{" in route.pattern)
_COUNTED_METHODS = frozenset({"HEAD", *(route.method for route in ROUTES)})


# === 19. SERVER =======================================================================================================
# Bytes to Request and back, on ThreadingHTTPServer. Owns the sockets.
#
# 1. The stock request parser is not used: it ignores Transfer-Encoding, takes the first of two lengths and has no
#    deadline (RFC 9112 calls each of these request smuggling or worse). This reader refuses whatever is ambiguous.
# 2. Head, body, number of headers, connections and time are bounded before memory is spent.
# 3. One thread reads all connections and answers what needs no waiting; whatever may wait gets a thread of its own
#    (ThreadingMixIn) for that one request. So idle, slow and refused clients cost no thread and cannot crowd others out.
# 4. A connection has one owner at a time: the reading thread, or the thread of its request.
# 5. One answer is one send; after an error in reading, the connection is closed without resetting the answer away.

MAX_REQUEST_LINE_BYTES = 8 << 10
MAX_HEAD_BYTES = 16 << 10
MAX_HEADERS = 100
_MAX_CHUNK_LINE_BYTES = 1024
# What a chunk counts for beside its header, in bytes; and how much of that is let pass.
_CHUNK_COST, _MAX_CHUNK_EXCESS = 16, 16 << 10
# How long a kept-alive connection may be idle: clients reconnect at little cost.
_IDLE_TIMEOUT_S = 30.0
_LINGER_S = 1.0
_LINGER_BYTES = 1 << 20
# Connections that are being told 503; beyond it, or after that long, they are closed without a word.
_MAX_TURNED_AWAY = 64
_TURN_AWAY_S = 5.0
# The share of one address: a quarter of all, but enough for a small limit not to become none.
_SHARE, _LEAST_SHARE = 4, 8
# Bodies that are being read, altogether. Below the size of an ordinary deploy a body is taken whatever others hold.
_BODIES_BYTES = 64 << 20
_SMALL_BODY_BYTES = 64 << 10
# Between looks at the deadlines.
_TURN_S = 0.25
_ACCEPTS_A_TURN = 64
# Out of descriptors or memory: nothing is accepted for this long, the kernel's backlog waits.
_ACCEPT_PAUSE_S = 0.5
# The log is told of it no more often than this.
_SHORTAGE_TOLD_S = 60.0
# What a follower is sent at once: so much is kept for one that is slow. And how long it hears nothing while nothing happens.
_FEED_BYTES = 16 << 10
_FEED_HEARTBEAT_S = 15.0
_LARGE_ANSWER_BYTES = 256 << 10
_OUT_OF_RESOURCES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]"
_FIRST_BYTES = re.compile(rf"{_TOKEN}|\r".encode())
_REQUEST_LINE = re.compile(rf"({_TOKEN}{{1,32}}) ([!-~]+) HTTP/(\d)\.(\d)", re.ASCII)
_HEADER_NAME = re.compile(rf"{_TOKEN}+", re.ASCII)
# RFC 9112, 3.2: a host and a port, or nothing. No comma: that is how two of them would be joined.
_HOST = re.compile(r"(?:[A-Za-z0-9._~!$&'()*+;=%-]*|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?", re.ASCII)
_HEADER_VALUE = re.compile(r"[^\x00-\x08\x0a-\x1f\x7f]*")
_BAD_LINE_END = re.compile(rb"(?<!\r)\n|\r(?!\n)|\x00")
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,8})(?:[ \t]*;[\t -~\x80-\xff]*)?")
# Headers that are lists, which several lines may make up (RFC 9110, 5.3). Any other header may come once.
_LIST_HEADERS = frozenset({"accept", "accept-encoding", "accept-language", "cache-control", "connection", "cookie", "forwarded", "prefer",
                           "via", "x-forwarded-for", "x-forwarded-proto"})


class _Head(NamedTuple):
    """A request before its body. `wants_close`: the client takes no further answer on this connection."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    is_http_1_1: bool
    wants_close: bool
    request_id: str | None


class _Hangup(Exception):
    """The client closed, or sent nothing in time between requests: nothing to answer."""


# How a conversation ends that no one is to be told of.
_LEAVINGS = (_Hangup, OSError)


# Clients ask the same again and again: what a health probe or a flood repeats is parsed once. At most a megabyte of heads.
@functools.lru_cache(maxsize=64)
def parse_head(head: bytes) -> _Head:
    """Return the parsed request line and headers (`head` ends before the blank line); raise for what is not exact."""
    first, *lines = head.decode("latin-1").split("\r\n")
    method, path, query, is_http_1_1 = parse_request_line(first)
    if len(lines) > MAX_HEADERS:
        raise HookshotError("headers_too_large", f"there are more than {MAX_HEADERS} headers")
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        name, value = _parse_name(name), value.strip(" \t")
        # isprintable: the quick way to see that an ordinary value has no control characters.
        if not colon or not name or not (value.isprintable() or _HEADER_VALUE.fullmatch(value)):
            raise HookshotError("bad_request", "a header line is malformed, or a line does not end in CR LF")
        if name in headers:
            if name not in _LIST_HEADERS:
                raise HookshotError("bad_request", f"the header {clip(name, 40)} appears more than once")
            value = f"{headers[name]},{value}"
        headers[name] = value
    if (is_http_1_1 and "host" not in headers) or not _HOST.fullmatch(headers.get("host", "")):
        raise HookshotError("bad_request", "the Host header is missing or malformed")
    given_id, options = headers.get("x-request-id", ""), headers.get("connection", "").lower().split(",")
    wants_close = not is_http_1_1 or "close" in [option.strip() for option in options]
    return _Head(method, path, query, headers, is_http_1_1, wants_close, given_id if REQUEST_ID.fullmatch(given_id) else None)


@functools.lru_cache(maxsize=128)
def _parse_name(name: str) -> str:
    """Return a header's name in lower case, or "" for what is none."""
    return name.lower() if _HEADER_NAME.fullmatch(name) else ""


def parse_request_line(line: str) -> tuple[str, str, Mapping[str, str], bool]:
    """Return method, path, query and whether it is HTTP/1.1; raise for anything but origin-form of HTTP/1.0 and 1.1."""
    match = _REQUEST_LINE.fullmatch(line)
    if not match:
        raise HookshotError("bad_request", "this is not an HTTP/1.1 request")
    if match[3] != "1" or match[4] not in "01":
        raise HookshotError("http_version", "only HTTP/1.0 and HTTP/1.1 are spoken here")
    path, _, query = match[2].partition("?")
    if not path.startswith("/") or path.startswith("//") or "#" in query or re.search(r"%(2f|5c|00)|[\\#]", path, re.IGNORECASE):
        raise HookshotError("bad_request", "the request target is not a plain path")
    path = _decode_path(path) if "%" in path else path
    if any(segment in (".", "..") for segment in path.split("/")):
        raise HookshotError("bad_request", "the request target has dot segments")
    return match[1], path, _parse_query(query), match[4] == "1"


def _decode_path(path: str) -> str:
    try:
        decoded = urllib.parse.unquote(path, errors="strict")
    except UnicodeDecodeError:
        decoded = ""
    if not decoded.isprintable() or not decoded or re.search("%(?![0-9A-Fa-f]{2})", path):
        raise HookshotError("bad_request", "the request target is badly encoded")
    return decoded


def _parse_query(text: str) -> dict[str, str]:
    if not text:
        return {}
    try:
        pairs = urllib.parse.parse_qsl(text, keep_blank_values=True, max_num_fields=20, errors="strict")
    except ValueError:
        raise HookshotError("bad_request", "the query is malformed or has too many parameters") from None
    query = dict(pairs)
    if len(query) != len(pairs):
        raise HookshotError("bad_request", "a query parameter appears more than once")
    return query


def body_length(head: _Head, limit: int) -> int | None:
    """Return the length of the body, or None if it comes in chunks; raise for what could be read in two ways."""
    coding, length = head.headers.get("transfer-encoding"), head.headers.get("content-length")
    if coding is not None:
        if length is not None or not head.is_http_1_1:
            raise HookshotError("bad_request", "a body has either Content-Length or (in HTTP/1.1) Transfer-Encoding")
        if coding.lower() != "chunked":
            raise HookshotError("not_implemented", "the only transfer coding is chunked")
        return None
    if length is None:
        if head.method in ("POST", "PUT", "PATCH"):
            raise HookshotError("length_required", "send a Content-Length")
        return 0
    if not (length.isascii() and length.isdigit() and len(length) <= 19):
        raise HookshotError("bad_request", "Content-Length is not a number")
    if int(length) > limit:
        raise HookshotError("too_large", f"the body has {int(length)} bytes; at most {limit} are taken (server.max_request_size)")
    return int(length)


_STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n" for status in http.HTTPStatus}


def render_answer(response: Response, head: _Head, request_id: str, extra: Fields, *, closes: bool, with_body: bool = True) -> bytes:
    """Return what goes over the wire before a stream's first chunk: the head, and the body unless the request was HEAD."""
    lines = "".join([f"{name}: {value}\r\n" for name, value in response.headers + extra])
    if response.stream is None:
        lines += f"Content-Length: {len(response.body)}\r\n"
    elif head.is_http_1_1:
        lines += "Transfer-Encoding: chunked\r\n"
    if closes:
        lines += "Connection: close\r\n"
    text = (f"{_STATUS_LINES[response.status]}Date: {_http_date(now_ms() // 1000)}\r\nServer: hookshot\r\nContent-Type: {response.content_type}\r\n"
            f"X-Request-ID: {request_id}\r\nCache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\n{lines}\r\n")
    return text.encode("latin-1", "replace") + (response.body if with_body and head.method != "HEAD" else b"")


@functools.lru_cache(maxsize=2)
def _http_date(at_s: int) -> str:
    moment = time.gmtime(at_s)
    # Not strftime's %a and %b: they speak the locale's language.
    day, month = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")[moment.tm_wday], \
        ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")[moment.tm_mon - 1]
    return f"{day}, {moment.tm_mday:02d} {month} {moment.tm_year} {moment.tm_hour:02d}:{moment.tm_min:02d}:{moment.tm_sec:02d} GMT"


def load_tls(files: Tls, place: Place) -> Any:
    """Return the context of [server.tls], or None without one; what is wrong with its files is a problem."""
    if not any(files):
        return None
    if not ssl:
        place.problem("needs Python's ssl module, which this Python lacks")
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    for name, path in files._asdict().items():
        try:
            if path:
                open(path, "rb").close()
        except OSError as error:
            (place / name).problem(f"{path} cannot be read: {error.strerror}")
            return None
    if problem := load_chain(context, files.cert, files.key):
        (place / problem[0]).problem(problem[1])
    else:
        if why := _why_not_trusted(context, files.cert):
            (place / "cert").warning(f"clients will not trust {files.cert}: {why}")
        if is_open_to_others(files.key):
            (place / "key").warning(f"{files.key} can be read by every user of this host; run chmod o= on it")
    if files.client_ca:
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_verify_locations(files.client_ca)
        except (OSError, ValueError):
            (place / "client_ca").problem(f"{files.client_ca} holds no certificates in PEM")
    return context


def load_chain(context: Any, cert: str, key: str) -> tuple[str, str] | None:
    """Have an SSLContext show a certificate; return which file is at fault ("cert" or "key") and why if it cannot."""
    try:
        # Without the password argument OpenSSL would ask for a passphrase on the terminal.
        context.load_cert_chain(cert, key, password=lambda: b"")
    except (OSError, ValueError) as error:  # SSLError among them
        if "-----BEGIN CERTIFICATE-----" not in _read_pem(cert):
            return "cert", f"{cert} holds no certificate in PEM"
        if "PRIVATE KEY-----" not in _read_pem(key):
            return "key", f"{key} holds no private key in PEM"
        if "ENCRYPTED" in _read_pem(key):
            return "key", f"{key} has a passphrase, so it cannot be used; take it off with `openssl pkey`"
        reason = getattr(error, "reason", None) or ""
        if "MISMATCH" in reason or reason == "NO_CERTIFICATE_ASSIGNED":  # of another kind, as RSA and EC
            return "key", f"{cert} and {key} do not belong together"
        return "cert", f"{cert} and {key} cannot be used: {words_of(reason or getattr(error, 'strerror', None) or str(error))}"
    return None


def _read_pem(path: str) -> str:
    try:
        return read_text(path)
    except (OSError, ValueError):
        return ""


def words_of(reason: str) -> str:
    """Return OpenSSL's name of an error as words: EE_KEY_TOO_SMALL is "ee key too small"."""
    return reason.replace("_", " ").lower()


def pin_certificate(file: str) -> Any:
    """Return the context of a client that trusts the first certificate in a file and no other, whatever name it has."""
    # Its issuers' certificates, which may follow, would vouch for other servers too.
    own, end, _ = read_text(file).partition("-----END CERTIFICATE-----")
    context = ssl.create_default_context(cadata=own + end)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


def _why_not_trusted(context: Any, cert: str) -> str | None:
    """Return what a client that trusts this very certificate finds wrong with it (it has expired, say): shake hands in memory."""
    pipes = ssl.MemoryBIO(), ssl.MemoryBIO()
    try:
        client, server = pin_certificate(cert).wrap_bio(*pipes), context.wrap_bio(*reversed(pipes), server_side=True)
    except (OSError, ValueError):
        return None
    for _ in range(3):
        for side in (client, server):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLCertVerificationError as error:
                return error.verify_message
            except ssl.SSLError:
                return None
    return None


# What a conversation waits for when it yields: bytes, room to send, the first byte, a TLS handshake, its next turn, the
# thread of its request, or news in its feed.
_READ, _WRITE, _PEEK, _SHAKE, _AGAIN, _AWAY, _NEWS, _CLOSED = "read", "write", "peek", "shake", "again", "away", "news", "closed"
_Conversation = Generator[str, bytes, None]
_NO_HEAD = _Head("-", "-", {}, {}, True, True, None)
# The first byte of every TLS connection: a handshake record (RFC 8446, 5.1).
_TLS_HANDSHAKE = b"\x16"
_WOULD_READ, _WOULD_WRITE = ((ssl.SSLWantReadError,), (ssl.SSLWantWriteError,)) if ssl else ((), ())


class _TlsLink:
    """TLS on a socket that does not block, with the methods of one. One thread at a time.

    Not SSLSocket: OpenSSL reads on for as long as what comes is no data (a flood of key updates, say), and would keep the reading
    thread that long. Here it gets a helping of bytes a turn.
    """

    _HELPING_BYTES = 16 << 10
    _PIECE_BYTES = 64 << 10

    def __init__(self, link: socket.socket, context: Any):
        self.plain = link
        self._received, self._made = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._received, self._made, server_side=True)
        self._unsent, self._promised = b"", 0
        # Whether there may be data for which no byte from the network is needed, so that no selector tells of it.
        self.has_more = False
        self.fileno, self.settimeout, self.setblocking = link.fileno, link.settimeout, link.setblocking

    def do_handshake(self) -> None:
        """Go on with the handshake; SSLWantReadError or SSLWantWriteError if it cannot be ended yet."""
        self._step(self._tls.do_handshake)
        self.has_more = True

    def recv(self, size: int) -> bytes:
        """Return what has come, b"" at the end; BlockingIOError, SSLWantReadError or SSLWantWriteError if nothing has."""
        self.has_more = False
        try:
            block = self._step(functools.partial(self._tls.read, size))
        except ssl.SSLEOFError:  # closed without close_notify, as many clients do
            return b""
        self.has_more = bool(block)
        return block

    def send(self, content: bytes) -> int:
        """Send some of it and return how much; BlockingIOError if nothing can be sent now, then the same must be given again."""
        self._push()
        if not self._unsent and not self._promised:
            self._promised = self._tls.write(content[: self._PIECE_BYTES])
            self._push()
        if self._unsent:
            raise BlockingIOError
        sent, self._promised = self._promised, 0
        return sent

    def sendall(self, content: bytes) -> None:
        """Send everything, on a socket that blocks."""
        for start in range(0, len(content), self._PIECE_BYTES):
            self._tls.write(content[start : start + self._PIECE_BYTES])
            sealed, self._unsent = self._unsent + self._made.read(), b""
            self.plain.sendall(sealed)

    def end(self) -> None:
        """Say that nothing follows (close_notify), as far as that can be sent now; what the client says to it is not waited for."""
        with contextlib.suppress(OSError, ValueError):
            self._tls.unwrap()
        with contextlib.suppress(OSError):
            self._push()

    def close(self) -> None:
        """Close the socket."""
        self.plain.close()

    def _step(self, act: Callable[[], Any]) -> Any:
        self._push()
        if self._unsent:
            raise ssl.SSLWantWriteError
        try:
            return act()
        except ssl.SSLWantReadError:
            if block := self.plain.recv(self._HELPING_BYTES):
                self._received.write(block)
            else:
                self._received.write_eof()
            return act()
        finally:
            # What is left goes with the next step; an error of the link shows there too.
            with contextlib.suppress(OSError):
                self._push()

    def _push(self) -> None:
        self._unsent += self._made.read()
        with contextlib.suppress(BlockingIOError):
            while self._unsent:
                self._unsent = self._unsent[self.plain.send(self._unsent) :]


class _Connection:
    """One client's connection. What is said on it is a generator, which yields what it waits for; turn() brings that.

    Owned by the reading thread; while a request is carried out, by that request's thread (carry_out).
    """

    def __init__(self, server: "HttpServer", listener: "Listener", link: Any, peer: Peer):
        self.listener, self.peer = listener, peer
        self.deadline = 0.0
        self.has_place = False
        self.is_queued = False
        # Whether a request may be on its way that has had no answer; and whether the client rests between two requests.
        self.is_owed, self.is_idle = True, False
        self.request_id: str | None = None
        self._server, self._app = server, server.app
        self._link, self._is_tls = link, False
        self._context: Any = None
        self._buffer, self._unsent = b"", b""
        self._held_bytes = 0
        self._is_in_request = self._may_skip = self._has_tried = self._closes = self._may_shake = False
        self._waits_for, self._watches = _AGAIN, 0
        self._job: tuple[Route, Request, _Head, Fields] | None = None
        self._feed: Feed | None = None
        self._began = 0.0
        self._conversation: _Conversation = self._converse()

    # --- the reading thread's side

    def begin(self, *, turned_away: bool = False) -> None:
        """Say the first words; reads at once, because most clients have sent something by now."""
        if turned_away:
            self._conversation = self._turn_away()
        self._go_on(None)
        self._has_tried = True
        self.turn()

    def turn(self) -> None:
        """Go on if what the conversation waits for is there."""
        if self._waits_for is _SHAKE and not self._may_shake:
            self._server.shake_on(self)
            return
        given: bytes | None = None
        waits_for = self._waits_for
        try:
            if waits_for is _READ:
                given = self._link.recv(CHUNK_BYTES)
            elif waits_for is _WRITE:
                self._unsent = self._unsent[self._link.send(self._unsent) :]
                if self._unsent:
                    raise BlockingIOError
            elif waits_for is _PEEK:
                given = self._link.recv(1, socket.MSG_PEEK)
            elif waits_for is _SHAKE:
                self._link.do_handshake()
            elif waits_for is _NEWS:
                # A client that follows has nothing more to say; whether it is still there is all that is asked.
                if not self._link.recv(CHUNK_BYTES):
                    self.close()
                return
            elif waits_for is not _AGAIN:
                return
        except _WOULD_READ:
            self._watch(selectors.EVENT_READ)
        except _WOULD_WRITE:
            self._watch(selectors.EVENT_WRITE)
        except BlockingIOError:
            self._watch(selectors.EVENT_WRITE if waits_for is _WRITE else selectors.EVENT_READ)
        except OSError as error:
            if waits_for is _SHAKE:
                why = words_of(getattr(error, "reason", None) or error.strerror or "the client left")
                refuse(self._app, _blank_request(self.peer), HookshotError("bad_request", f"the TLS handshake failed: {why}"))
                self._go_on(error=_Hangup())
            else:
                self.close()
        else:
            self._go_on(given)

    def shake(self) -> None:
        """Go on with the handshake, which may take milliseconds."""
        self._may_shake = True
        self.turn()
        self._may_shake = False

    def expire(self) -> None:
        """The deadline is over: a request that is on its way is told so, anything else just ends."""
        if self._is_in_request and self._waits_for is _READ:
            self._go_on(error=HookshotError("request_timeout", "the request did not arrive in time (server.request_timeout)"))
        elif self._waits_for is _NEWS:
            self._go_on(None)
        else:
            if self._feed:
                self._feed.farewell()
            self.close()

    def hear(self) -> None:
        """There may be news in the feed that it follows."""
        if self._waits_for is _NEWS:
            self._go_on(b"news")

    def come_back(self) -> None:
        """Go on after the request's thread has sent its answer."""
        self._link.setblocking(False)
        self._go_on(None)

    def refuse_job(self) -> None:
        """Tell the client that its request cannot have a thread."""
        self._go_on(error=HookshotError("overloaded", "the host has no more threads; try again"))

    def close(self) -> None:
        """End the connection whatever it waits for."""
        if self._waits_for is not _CLOSED:
            self._watch(0)
            self._waits_for = _CLOSED
            self._conversation.close()
            self._let_go()
            self._job = None
            self._end_tls()
            self._link.close()
            self._server.forget(self)

    def leave(self) -> None:
        """Close it if it is idle, after a last look whether a request has come."""
        if self.is_idle:
            self.turn()
        if self.is_idle:
            self.close()

    @property
    def is_away(self) -> bool:
        """Whether a request's thread owns the connection."""
        return self._waits_for is _AWAY

    def _go_on(self, given: bytes | None = None, *, error: Exception | None = None) -> None:
        try:
            self._waits_for = self._conversation.throw(error) if error else self._conversation.send(given)  # type: ignore[arg-type]
        except (StopIteration, *_LEAVINGS):
            self.close()
        except Exception as bug:
            self._app.publish(Broken("connection", bug, self.request_id))
            self.close()
        else:
            self._settle()

    def _settle(self) -> None:
        """See to it that turn() is called when what the conversation waits for may be there."""
        if self._waits_for is _READ:
            # A new connection has not tried to read yet (begin); TLS may hold decrypted bytes that no selector sees.
            if self._is_tls and self._link.has_more:
                self._server.turn_again(self)
            elif self._watches != selectors.EVENT_READ and self._has_tried:
                self._watch(selectors.EVENT_READ)
        elif self._waits_for is _AWAY:
            self._watch(0)
            self._server.send_away(self)
        elif self._waits_for is _NEWS:
            self._watch(selectors.EVENT_READ)
        else:
            self._server.turn_again(self)

    def _watch(self, events: int) -> None:
        if events != self._watches:
            self._server.watch(self._link, self._watches, events, self.turn)
            self._watches = events

    # --- what is said

    def _converse(self) -> _Conversation:
        """Answer requests in order until either side ends the connection."""
        context = self._app.current().tls
        if context and self.listener.is_tcp:
            yield from self._greet(context, self._app.current().config.server.request_timeout)
        while (yield from self._answer_one()):
            self._let_go()
            self.is_owed = False
        if self._buffer or self._has_unread():
            yield from self._linger()

    def _is_last(self, head: _Head) -> bool:
        """Return whether the connection ends with this request: also when its client shook hands by what is no longer in force."""
        return self._app.is_closing or self._server.is_leaving or head.wants_close or (self._context is not None and self._context is not self._app.current().tls)

    def _greet(self, context: Any, patience_s: float) -> _Conversation:
        """Shake hands for TLS, or tell a client that does not speak it."""
        self._context = context
        self.deadline = time.monotonic() + patience_s
        first = yield _PEEK
        if first != _TLS_HANDSHAKE:
            if first:
                error = HookshotError("bad_request", "this address speaks TLS; use https://")
                yield from self._refuse(_blank_request(self.peer), _NO_HEAD, error)
            raise _Hangup
        self._link, self._is_tls = _TlsLink(self._link, context), True
        try:
            yield _SHAKE
        except _Hangup:
            # A client that holds the handshake for done has sent its request: a reset would take away the alert that says why.
            yield from self._linger()
            raise

    def _turn_away(self) -> _Conversation:
        context = self._app.current().tls
        if context and self.listener.is_tcp:
            yield from self._greet(context, _TURN_AWAY_S)
        yield from self._refuse(_blank_request(self.peer), _NO_HEAD, HookshotError("overloaded", "there are too many connections; try again"))

    def _refuse(self, request: Request, head: _Head, error: HookshotError, extra: Fields = ()) -> _Conversation:
        """Answer after an error in reading: what follows cannot be understood, so the connection ends."""
        response = refuse(self._app, request, error)
        self._count(head, find_route(head.method, head.path, self._app.current().config), response)
        yield self._send(render_answer(response, head, request.request_id, extra, closes=True))
        yield from self._linger()

    def _count(self, head: _Head, route: Route | None, response: Response) -> None:
        count_answer(self._app, head.method, route, response.status, time.monotonic() - self._began if self._began else 0.0)

    def _answer_one(self) -> "Generator[str, bytes, bool]":
        """Answer one request and return whether another may follow."""
        app, server = self._app, self._app.current().config.server
        self._is_in_request, self._began = False, 0.0
        if not self._buffer:
            self.deadline = time.monotonic() + min(_IDLE_TIMEOUT_S, server.request_timeout)
            self.is_idle = not self.is_owed
            self._buffer = yield _READ
            self.is_idle = False
            if not self._buffer:
                return False
        self.is_owed = True
        self._began = time.monotonic()
        self.deadline = self._began + server.request_timeout
        self._is_in_request = self._may_skip = True
        self._skip_empty_line()
        head, request, route, response, extra = _NO_HEAD, None, None, None, ()
        try:
            if (end := self._find_head_end()) < 0:
                end = yield from self._await_head()
            head, self._buffer = parse_head(self._buffer[:end]), self._buffer[end + 4 :]
            self.request_id = head.request_id or new_request_id()
            request = Request(head.method, head.path, head.query, head.headers, b"", self.peer, self.request_id, self._is_gone)
            length = body_length(head, server.max_request_size)
            is_whole = length is not None and length <= len(self._buffer) and "expect" not in head.headers
            if length and is_whole:
                request = request._replace(body=self._buffer[:length])
                self._buffer = self._buffer[length:]
            try:
                route, extra = admit(app, request)
            except HookshotError as error:
                if not is_whole:
                    raise
                route, response = find_route(head.method, head.path, app.current().config), refuse(app, request, error)
            else:
                if not is_whole:
                    request = request._replace(body=(yield from self._read_body(head, length, server.max_request_size)))
                request, response = begin(app, route, request)
        except HookshotError as error:
            yield from self._refuse(request or _blank_request(self.peer), head, error, extra)
            return False
        except _LEAVINGS:
            raise
        except Exception as bug:
            request, response = request or _blank_request(self.peer), answer_bug(app, request or _blank_request(self.peer), bug)
            self._count(head, route, response)
            yield self._send(render_answer(response, head, request.request_id, (), closes=True))
            yield from self._linger()
            return False
        self._is_in_request = False
        if response is None:
            assert route
            self._job = route, request, head, extra
            try:
                yield _AWAY
            except HookshotError as error:  # there is no thread to be had
                self._job = None
                response = refuse(app, request, error)
            else:
                if self._feed:
                    yield from self._follow(self._feed, is_chunked=head.is_http_1_1)
                return not self._closes
        closes = self._is_last(head)
        self._count(head, route, response)
        yield self._send(render_answer(response, head, request.request_id, extra, closes=closes))
        return not closes

    def _follow(self, feed: Feed, *, is_chunked: bool) -> _Conversation:
        """Send what comes in a feed for as long as the client takes it. The connection ends with that."""
        self.is_owed = False
        try:
            self._server.followers.add(self)
            silent_s = time.monotonic()
            while (block := feed.take(_FEED_BYTES)) is not None:
                if not block:
                    # Not from now: news that the feed's filter keeps back are no sign of life.
                    self.deadline = silent_s + _FEED_HEARTBEAT_S
                    if (yield _NEWS):
                        continue
                    block = b": still here\n\n"
                yield self._send(_chunk(block) if is_chunked else block)
                silent_s = time.monotonic()
            last = feed.farewell()
            yield self._send(_chunk(last) + _LAST_CHUNK if is_chunked else last)
        finally:
            self._feed = None
            self._server.followers.discard(self)
            feed.close()

    # --- reading

    def _receive(self) -> _Conversation:
        block = yield _READ
        if not block:
            raise _Hangup
        self._buffer += block

    def _skip_empty_line(self) -> None:
        """Pass over one empty line before a request (RFC 9112, 2.2), however its bytes come."""
        if self._may_skip and self._buffer[:2] == b"\r\n":
            self._buffer, self._may_skip = self._buffer[2:], False

    def _find_head_end(self) -> int:
        """Return where a complete head of the right size ends, else -1."""
        end = self._buffer.find(b"\r\n\r\n", 0, MAX_HEAD_BYTES)
        return end if self._buffer.find(b"\n", 0, MAX_REQUEST_LINE_BYTES) >= 0 else -1

    def _await_head(self) -> "Generator[str, bytes, int]":
        """Return where the head ends once it is there; raise as soon as it can no longer be right."""
        while True:
            # First of all: a TLS hello has line feeds too.
            if self._buffer and not _FIRST_BYTES.match(self._buffer):
                raise HookshotError("bad_request", "this is not HTTP; is it TLS on a plain port?")
            if b"\n" in self._buffer[:MAX_REQUEST_LINE_BYTES]:
                break
            if len(self._buffer) >= MAX_REQUEST_LINE_BYTES:
                raise HookshotError("uri_too_long", f"the request line is longer than {MAX_REQUEST_LINE_BYTES} bytes")
            yield from self._receive()
            self._skip_empty_line()
        # Judged before more is awaited: HTTP/0.9, the HTTP/2 preface and noise are answered at once.
        parse_request_line(self._buffer[: self._buffer.index(b"\n")].removesuffix(b"\r").decode("latin-1"))
        # `seen` bytes are known to be right: a head may come byte by byte.
        seen = 0
        while (end := self._buffer.find(b"\r\n\r\n", max(0, seen - 3), MAX_HEAD_BYTES)) < 0:
            if len(self._buffer) >= MAX_HEAD_BYTES:
                raise HookshotError("headers_too_large", f"the headers are larger than {MAX_HEAD_BYTES} bytes")
            # A CR at the end may be followed by its LF in the next segment.
            whole = len(self._buffer) - self._buffer.endswith(b"\r")
            if _BAD_LINE_END.search(self._buffer, max(0, seen - 1), whole):
                raise HookshotError("bad_request", "a line does not end in CR LF, or holds a NUL")
            seen = whole
            yield from self._receive()
        return end

    def _read_body(self, head: _Head, length: int | None, limit: int) -> "Generator[str, bytes, bytes]":
        expectation = head.headers.get("expect", "").lower()
        if expectation not in ("", "100-continue"):
            raise HookshotError("expectation", "the only expectation is 100-continue")
        if expectation and head.is_http_1_1 and not self._buffer:
            deadline = self.deadline
            yield self._send(b"HTTP/1.1 100 Continue\r\n\r\n")
            self.deadline = deadline
        if length is not None:
            return (yield from self._take(length))
        return (yield from self._read_chunks(limit))

    def _take(self, length: int) -> "Generator[str, bytes, bytes]":
        body, self._buffer = bytearray(self._buffer[:length]), self._buffer[length:]
        self._hold(len(body))
        while len(body) < length:
            yield from self._receive()
            piece, self._buffer = self._buffer[: length - len(body)], self._buffer[length - len(body) :]
            body += piece
            self._hold(len(piece))
        return bytes(body)

    def _hold(self, more_bytes: int) -> None:
        """Count what is kept of a body; raise if all bodies together are too much and this one is not small."""
        self._held_bytes += more_bytes
        self._server.held_bytes += more_bytes
        if self._held_bytes > _SMALL_BODY_BYTES and self._server.held_bytes > max(_BODIES_BYTES, self._app.current().config.server.max_request_size):
            raise HookshotError("overloaded", "too many large bodies are being read; try again")

    def _let_go(self) -> None:
        self._server.held_bytes -= self._held_bytes
        self._held_bytes = 0

    def _read_line(self) -> "Generator[str, bytes, bytes]":
        while (end := self._buffer.find(b"\r\n", 0, _MAX_CHUNK_LINE_BYTES)) < 0:
            if len(self._buffer) >= _MAX_CHUNK_LINE_BYTES:
                raise HookshotError("bad_request", "a trailer is too long")
            yield from self._receive()
        line, self._buffer = self._buffer[:end], self._buffer[end + 2 :]
        return line

    def _read_chunks(self, limit: int) -> "Generator[str, bytes, bytes]":
        """Decode a chunked body (RFC 9112, 7.1) strictly; trailers are read and dropped."""
        # `at` walks through the buffer, which is cut only when more is awaited: a body may come in chunks of one byte.
        body, at, excess = bytearray(), 0, 0
        while True:
            while (end := self._buffer.find(b"\r\n", at, at + _MAX_CHUNK_LINE_BYTES)) < 0:
                if len(self._buffer) - at >= _MAX_CHUNK_LINE_BYTES:
                    raise HookshotError("bad_request", "a chunk's header is too long")
                self._buffer, at = self._buffer[at:], 0
                yield from self._receive()
            match = _CHUNK_SIZE.fullmatch(self._buffer, at, end)
            if not match:
                raise HookshotError("bad_request", "a chunk's size is malformed")
            # Half of what comes may be framing, and a little more: each chunk costs time, which others wait for (CVE-2023-39326).
            missing = int(match[1], 16)
            excess = max(0, excess + end - at + _CHUNK_COST - 2 * missing)
            if excess > _MAX_CHUNK_EXCESS:
                raise HookshotError("bad_request", "the chunks are too small")
            at = end + 2
            if len(body) + missing > limit:
                raise HookshotError("too_large", f"the body has more than {limit} bytes (server.max_request_size)")
            if not missing:
                break
            while missing:
                piece = self._buffer[at : at + missing]
                body += piece
                missing, at = missing - len(piece), at + len(piece)
                self._hold(len(piece))
                if missing:
                    self._buffer, at = b"", 0
                    yield from self._receive()
            while len(self._buffer) - at < 2:
                self._buffer, at = self._buffer[at:], 0
                yield from self._receive()
            if self._buffer[at : at + 2] != b"\r\n":
                raise HookshotError("bad_request", "a chunk is longer than its size")
            at += 2
        self._buffer = self._buffer[at:]
        for _ in range(MAX_HEADERS):
            line = yield from self._read_line()
            if not line:
                return bytes(body)
            name, colon, value = line.decode("latin-1").partition(":")
            if not colon or not _HEADER_NAME.fullmatch(name) or not _HEADER_VALUE.fullmatch(value):
                break
        raise HookshotError("bad_request", "the trailers are malformed or too many")

    # --- writing

    def _send(self, content: bytes) -> str:
        """Have turn() send this: in one piece, and the rest if the kernel does not take it all. Returns what to wait for."""
        # Reading had its deadline; the answer gets one of its own.
        self.deadline = time.monotonic() + self._app.current().config.server.request_timeout
        self._unsent = content
        return _WRITE

    def _has_unread(self) -> bool:
        try:
            return bool(self._link.recv(CHUNK_BYTES))
        except OSError:
            return False

    def _linger(self) -> _Conversation:
        """Read on for a moment: closing with unread data would reset the connection and the answer with it."""
        self._is_in_request = self.is_owed = False
        self.deadline, taken = time.monotonic() + _LINGER_S, 0
        self._end_tls()
        self._link.shutdown(socket.SHUT_WR)
        while taken < _LINGER_BYTES and (block := (yield _READ)):
            taken += len(block)

    def _end_tls(self) -> None:
        """Say that nothing follows; what still comes is read as it is, and dropped."""
        if self._is_tls:
            self._link.end()
            self._link, self._is_tls = self._link.plain, False

    # --- the request's thread

    def carry_out(self) -> None:
        """Carry the request out and send its answer, however long that takes. The request's own thread."""
        assert self._job
        # Not kept: a connection may be idle for long, and a body is large.
        (route, request, head, extra), self._job = self._job, None
        response = dispatch(self._app, route, request)
        self._count(head, route, response)
        closes = self._is_last(head)
        # Unless everything is sent: where an answer breaks off, a client must not take the next one for its rest.
        self._closes = True
        # An error of the link: the client has gone, or takes nothing; there is no one to tell.
        try:
            self._link.settimeout(self._app.current().config.server.request_timeout)
            # A large body is sent by itself: another copy of it would cost more than another packet.
            is_large = len(response.body) >= _LARGE_ANSWER_BYTES
            self._link.sendall(render_answer(response, head, request.request_id, extra, closes=closes, with_body=not is_large))
            if is_large and head.method != "HEAD":
                self._link.sendall(response.body)
            if response.stream is not None and head.method != "HEAD":
                self.is_owed = False
                self._send_stream(response.stream, is_chunked=head.is_http_1_1, is_last=response.feed is None)
                self._feed = response.feed
            self._closes = closes or self._feed is not None
        except OSError as error:
            if response.feed and isinstance(error, TimeoutError):
                response.feed.farewell()
        finally:
            if response.stream is not None:
                response.stream.close()  # type: ignore[attr-defined]
            if response.feed and not self._feed:
                response.feed.close()

    def _send_stream(self, stream: Iterator[bytes], *, is_chunked: bool, is_last: bool) -> None:
        # sendall() takes the timeout for one chunk: a stream may last as long as a deployment, but a reader that takes
        # nothing for request_timeout is gone.
        for chunk in stream:
            if chunk:
                self._link.sendall(_chunk(chunk) if is_chunked else chunk)
        if is_chunked and is_last:
            self._link.sendall(_LAST_CHUNK)

    def _is_gone(self) -> bool:
        """Return whether the client has closed its side, or the connection has failed."""
        poll = select.poll()
        poll.register(self._link, getattr(select, "POLLRDHUP", 0))
        try:
            return bool(poll.poll(0))
        except OSError:
            return True


_LAST_CHUNK = b"0\r\n\r\n"


def _chunk(content: bytes) -> bytes:
    """Return content as a chunk (RFC 9112, 7.1)."""
    return b"%x\r\n%b\r\n" % (len(content), content)


def _blank_request(peer: Peer) -> Request:
    """Return what stands for a request that could not be read."""
    return Request("-", "-", {}, {}, b"", peer, new_request_id())


class Listener(http.server.ThreadingHTTPServer):
    """One address that is listened on. The reading thread accepts; process_request gives a request a thread of its own."""

    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, listen: ListenAddress, family: int, server: "HttpServer"):
        """Bind and listen; OSError says why not."""
        self.listen, self.is_tcp, self.address_family = listen, not listen.path, family
        self._server, self._app = server, server.app
        self._inode = 0
        super().__init__(listen.path or (listen.host, listen.port), http.server.BaseHTTPRequestHandler,  # type: ignore[arg-type]
                         bind_and_activate=listen.fd < 0)
        if listen.fd >= 0:
            self._adopt()
        self.socket.setblocking(False)

    def _adopt(self) -> None:
        """Take the socket that was passed. Who passed it binds, listens and cleans up; what waits there outlives this server."""
        self.socket.close()
        self.socket = socket.socket(fileno=self.listen.fd)
        if self.is_tcp:
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # as in server_bind

    def server_bind(self) -> None:
        """Bind the socket."""
        # Not HTTPServer's: it asks DNS for this host's name, which takes seconds on a host without a network.
        if not self.is_tcp:
            self._bind_path()
            return
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Without it a kept-alive client waits 40 ms for the second of two small segments (Nagle against delayed ACK).
        # Connections have it from their listening socket.
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, bool(self.listen.host))
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.listen = self.listen._replace(port=self.server_address[1])

    def _bind_path(self) -> None:
        """Bind a unix socket, in place of one that a dead server left; never in place of a living one's."""
        path = self.listen.path
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISSOCK(os.stat(path, follow_symlinks=False).st_mode):
                raise FileExistsError(errno.EEXIST, "something that is no socket is there already")
            with socket.socket(socket.AF_UNIX) as probe:
                # Else it would wait for as long as a living server's backlog is full.
                probe.setblocking(False)
                refused = probe.connect_ex(path)
            if refused == errno.ECONNREFUSED:
                os.unlink(path)
            elif refused != errno.ENOENT:
                code = errno.EADDRINUSE if refused in (0, errno.EAGAIN) else refused
                raise OSError(code, os.strerror(code))
        self.socket.bind(path)
        # The server's umask let no one but its user connect until now.
        os.chmod(path, self._app.current().config.server.socket_mode)
        self._inode = os.stat(path).st_ino

    def server_close(self) -> None:
        """Stop listening and take the unix socket away, unless another server has put its own there."""
        # Before the socket is closed: its inode cannot be another's until then.
        if self._inode:
            with contextlib.suppress(OSError):
                if os.stat(self.listen.path).st_ino == self._inode:
                    os.unlink(self.listen.path)
        super().server_close()

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Carry one request out, in its own thread."""
        request.carry_out()

    def shutdown_request(self, request: Any) -> None:
        """Give the connection back to the reading thread."""
        self._server.take_back(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report what dispatch() could not catch, because the answer had begun: a stream that broke off, or a bug."""
        error = sys.exc_info()[1] or RuntimeError("unknown")
        self._app.publish(Trouble("answer_broken", error.sentence, request_id=request.request_id) if isinstance(error, HookshotError) else Broken("answer", error, request.request_id))


def why_not_bound(address: ListenAddress) -> int:
    """Return 0 if this process could listen on an address now, else the error's number. Nobody can connect meanwhile: nothing listens."""
    if address.path:
        with contextlib.suppress(FileNotFoundError), socket.socket(socket.AF_UNIX) as probe:
            probe.setblocking(False)
            is_socket = stat.S_ISSOCK(os.stat(address.path, follow_symlinks=False).st_mode)
            return errno.EEXIST if not is_socket else errno.EADDRINUSE if probe.connect_ex(address.path) in (0, errno.EAGAIN) else 0
        return 0
    family = socket.AF_INET6 if ":" in address.host or (not address.host and socket.has_dualstack_ipv6()) else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, bool(address.host))
            probe.bind((address.host, address.port))
    except OSError as error:
        return error.errno or errno.EADDRNOTAVAIL
    return 0


# The first descriptor after stdin, stdout and stderr (SD_LISTEN_FDS_START of sd_listen_fds(3)).
_FIRST_PASSED = 3


def take_passed(environ: Any) -> tuple[ListenAddress, ...]:
    """Return the sockets that systemd passed to this process (sd_listen_fds(3)), and take what says so out of `environ`.

    HookshotError tells of one that no client can come by. At start only: later the descriptors may be others.
    """
    pid, number, names, _ = (environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID"))
    if pid != str(os.getpid()):
        return ()
    if not re.fullmatch("[0-9]{1,4}", number, re.ASCII):
        raise HookshotError("config", f"LISTEN_FDS={clip(escape_controls(number), 20)} is not the number of the sockets that were passed")
    named = names.split(":") if names else ["unknown"] * int(number)
    if len(named) != int(number):
        raise HookshotError("config", f"LISTEN_FDS says that {number} sockets were passed, but LISTEN_FDNAMES names {len(named)}")
    return tuple(_look_at_passed(fd, escape_controls(name)) for fd, name in enumerate(named, _FIRST_PASSED))


def _look_at_passed(fd: int, name: str) -> ListenAddress:
    """Return where a socket listens that was passed, and keep it from children; HookshotError if it does not."""
    what = f"descriptor {fd} ({name}), which systemd passed,"
    try:
        link = socket.socket(fileno=fd)
    except OSError:
        raise HookshotError("config", f"{what} is no socket; pass sockets alone, with a socket unit") from None
    try:
        if link.family not in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX) or link.type != socket.SOCK_STREAM:
            raise HookshotError("config", f"{what} is no stream socket of TCP or unix; write ListenStream= with a port, an address or a path in the socket unit")
        if not link.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise HookshotError("config", f"{what} does not listen; write Accept=no in the socket unit")
        os.set_inheritable(fd, False)
        address = link.getsockname()
    finally:
        link.detach()
    if link.family == socket.AF_UNIX:
        # An abstract one, whose name begins with NUL, comes as bytes.
        path = address.decode("utf-8", "replace").replace("\0", "@", 1) if isinstance(address, bytes) else address
        return ListenAddress("", 0, path or "@", name, fd)
    return ListenAddress(address[0], address[1], name=name, fd=fd)


def place_passed(listen: tuple[ListenAddress, ...], passed: Sequence[ListenAddress], place: Place) -> tuple[ListenAddress, ...]:
    """Return where to listen: "systemd:NAME" is what was passed by that name; without such an entry, what was passed takes the place of all."""
    awaited = {address.name for address in listen if address.name}
    if not awaited:
        return tuple(passed) or listen
    for name in sorted(awaited - {address.name for address in passed}):
        place.problem(f"systemd passed no socket named {name}; start hookshot by its socket unit, with FileDescriptorName={name} there")
    for name in sorted({address.name for address in passed} - awaited):
        place.problem(f'systemd passed a socket named {name} that is not in the list; add "systemd:{name}", or take it out of the socket unit')
    return tuple(found for address in listen for found in ([one for one in passed if one.name == address.name] if address.name else [address]))


class HttpServer:
    """All listeners and connections. serve() in a thread of its own; stop_accepting() and close() from another one."""

    def __init__(self, app: App):
        self.app = app
        self.held_bytes = 0
        self.listeners: list[Listener] = []
        self._selector = selectors.DefaultSelector()
        self._connections: set[_Connection] = set()
        self._places: collections.Counter[int | str | None] = collections.Counter()
        self._turned_away = 0
        self._again: collections.deque[_Connection] = collections.deque()
        self._shaking: collections.deque[_Connection] = collections.deque()
        self._returned: collections.deque[_Connection] = collections.deque()
        # Connections that send a feed; touched by the reading thread alone.
        self.followers: set[_Connection] = set()
        self._has_news = False
        self._is_closing = False
        # No new connections are taken any more, and those that are open end with their next answer.
        self.is_leaving, self._has_left = False, False
        # When the reading thread has last looked at the deadlines: it does so four times a second.
        self.turned_s = time.monotonic()
        self._accepts_again_at: float | None = None
        self._told_shortage_s = -_SHORTAGE_TOLD_S
        self._wake_read, self._wake_write = socket.socketpair()
        for end in (self._wake_read, self._wake_write):
            end.setblocking(False)
        self._selector.register(self._wake_read, selectors.EVENT_READ, self._take_wake_up)
        app.connections, app.feed.on_news = lambda: len(self._connections), self.tell_followers

    def listen(self, address: ListenAddress) -> None:
        """Listen on one more address; OSError says why not. Before serve()."""
        if address.path:
            families = [int(socket.AF_UNIX)]
        elif not address.host:
            # Both kinds on one socket where there are both, so that IPv4 clients come as mapped addresses.
            families = [int(socket.AF_INET6), int(socket.AF_INET)] if socket.has_dualstack_ipv6() else [int(socket.AF_INET)]
        else:
            families = [int(socket.AF_INET6 if ":" in address.host else socket.AF_INET)]
        try:
            self.listeners.append(Listener(address, families[0], self))
        except OSError as error:
            # A kernel that knows IPv6 but may not use it (disable_ipv6).
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT) or len(families) == 1:
                raise
            self.listeners.append(Listener(address, families[1], self))

    def serve(self) -> None:
        """Accept, read and answer until close()."""
        self._start_accepting()
        sweep_at = 0.0
        while not self._is_closing:
            try:
                for key, _ in self._selector.select(0 if self._again or self._shaking else _TURN_S):
                    key.data()
                while self._returned:
                    self._returned.popleft().come_back()
                if self.is_leaving:
                    self._leave()
                if self._has_news:
                    self._has_news = False
                    for connection in tuple(self.followers):
                        connection.hear()
                # Answers go out together here, after everything that has come is read: a client is woken once, not for each.
                for _ in range(len(self._again)):
                    connection = self._again.popleft()
                    connection.is_queued = False
                    connection.turn()
                # One at a time: a crowd that shakes hands must not keep those waiting who have done so.
                if self._shaking:
                    connection = self._shaking.popleft()
                    connection.is_queued = False
                    connection.shake()
                if (now := time.monotonic()) >= sweep_at:
                    sweep_at = now + _TURN_S
                    self._sweep(now)
            except Exception as error:
                self.app.publish(Broken("server", error))
                time.sleep(_TURN_S)  # a bug that comes again at once must not fill the log
        self._end()

    def stop_accepting(self, patience_s: float) -> None:
        """Leave new connections to who else holds the sockets, and answer those that came before, for so long at most. Not serve()'s thread."""
        self.is_leaving = True
        self._wake_up()
        deadline = time.monotonic() + patience_s
        while not (self._has_left and not any(connection.is_owed for connection in tuple(self._connections))) and time.monotonic() < deadline:
            time.sleep(0.01)

    def _leave(self) -> None:
        if self._accepts_again_at is None:
            for listener in self.listeners:
                self._selector.unregister(listener)
        self._accepts_again_at, self._has_left = float("inf"), True
        # Whoever rests there comes by a new connection the next time, and that one waits in the kernel. Also who rests only
        # now, after an answer that had begun before.
        for connection in tuple(self._connections):
            connection.leave()

    def close(self, patience_s: float) -> None:
        """Stop serving; requests in threads have that long to end. Any thread but serve()'s."""
        deadline = time.monotonic() + patience_s
        while any(connection.is_away for connection in tuple(self._connections)) and time.monotonic() < deadline:
            time.sleep(0.01)
        self._is_closing = True
        self._wake_up()

    def _end(self) -> None:
        for listener in self.listeners:
            listener.server_close()
        # The last news, as far as those who follow take them at once.
        for connection in tuple(self.followers):
            connection.hear()
            connection.turn()
        for connection in tuple(self._connections):
            if not connection.is_away:
                connection.close()
        self._selector.close()

    # --- accepting

    def _start_accepting(self) -> None:
        self._accepts_again_at = None
        for listener in self.listeners:
            self._selector.register(listener, selectors.EVENT_READ, functools.partial(self._accept, listener))

    def _pause_accepting(self, error: OSError) -> None:
        """Wait with accepting until there may be descriptors or memory again; without a pause this would be a busy loop."""
        now = time.monotonic()
        self._accepts_again_at = now + _ACCEPT_PAUSE_S
        for listener in self.listeners:
            self._selector.unregister(listener)
        if now < self._told_shortage_s + _SHORTAGE_TOLD_S:
            return
        self._told_shortage_s = now
        self.app.publish(Trouble("connections_exhausted", f"no connection can be accepted: {error.strerror}; {len(self._connections)} are open; "
                                 "raise LimitNOFILE (ulimit -n) or lower server.max_connections"))

    def _accept(self, listener: Listener) -> None:
        for _ in range(_ACCEPTS_A_TURN if self._accepts_again_at is None else 0):
            try:
                link, address = listener.get_request()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _OUT_OF_RESOURCES:
                    self._pause_accepting(error)
                    return
                continue  # that client has gone again (ECONNABORTED)
            link.setblocking(False)
            self._take(_Connection(self, listener, link, parse_address(address[0]) if listener.is_tcp else UNIX_PEER))

    def _take(self, connection: _Connection) -> None:
        """Give a connection its place, or an answer and its leave if there are too many, altogether or of its address."""
        config, bucket = self.app.current().config, bucket_of(connection.peer)
        limit = config.server.max_connections
        is_many = bucket != UNIX_PEER and self._places[bucket] >= max(_LEAST_SHARE, limit // _SHARE) \
            and not is_in(connection.peer, config.security.trusted_proxies)
        self._connections.add(connection)
        if len(self._connections) - self._turned_away <= limit and not is_many:
            self._places[bucket] += 1
            connection.has_place = True
            connection.begin()
            return
        self._turned_away += 1
        if self._turned_away > _MAX_TURNED_AWAY:
            refuse(self.app, _blank_request(connection.peer), HookshotError("overloaded", "there are too many connections"))
            connection.close()
        else:
            connection.begin(turned_away=True)

    # --- what connections call

    def watch(self, link: Any, before: int, events: int, turn: Callable[[], None]) -> None:
        """Call `turn` when one of `events` is there (0: never); `before` is what was watched for."""
        if not before:
            self._selector.register(link, events, turn)
        elif events:
            self._selector.modify(link, events, turn)
        else:
            self._selector.unregister(link)

    def turn_again(self, connection: _Connection) -> None:
        """Have a connection's turn come again soon, without waiting for anything; once, however often this is asked for."""
        if not connection.is_queued:
            connection.is_queued = True
            self._again.append(connection)

    def shake_on(self, connection: _Connection) -> None:
        """Have a connection go on with its handshake when it is its turn, once."""
        if not connection.is_queued:
            connection.is_queued = True
            self._shaking.append(connection)

    def send_away(self, connection: _Connection) -> None:
        """Start the thread of a connection's request."""
        try:
            connection.listener.process_request(connection, None)  # type: ignore[arg-type]
        except RuntimeError:  # no more threads: the limit of the host, not ours
            connection.refuse_job()

    def take_back(self, connection: _Connection) -> None:
        """Let a connection go on after its request's thread. Any thread."""
        self._returned.append(connection)
        self._wake_up()

    def tell_followers(self) -> None:
        """Have those who follow a feed look into it. Any thread."""
        self._has_news = True
        self._wake_up()

    def forget(self, connection: _Connection) -> None:
        """Free a closed connection's place."""
        self._connections.discard(connection)
        if not connection.has_place:
            self._turned_away -= 1
            return
        bucket = bucket_of(connection.peer)
        self._places[bucket] -= 1
        if not self._places[bucket]:
            del self._places[bucket]

    def _wake_up(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wake_write.send(b"w")

    def _take_wake_up(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wake_read.recv(CHUNK_BYTES)

    def _sweep(self, now: float) -> None:
        """End what is beyond its deadline."""
        self.turned_s = now
        for connection in [connection for connection in self._connections if connection.deadline < now and not connection.is_away]:
            connection.expire()
        if self._accepts_again_at is not None and now >= self._accepts_again_at:
            self._start_accepting()


# === 20. BACKUP =======================================================================================================
# Export and import of all that one server has: its database, both files, its secrets, the logs of its deployments.
#
# 1. An archive is a claim. Names come from a table, places from the command line; sizes, sums and the database are checked.
# 2. Nothing is extracted: members are read one after the other, in the one order there is, into files that we name.
# 3. Before the first file of the host moves, all of it lies beside its place, whole and checked; the moves are renames,
#    and a journal undoes them.
# 4. The manifest comes last: what it says was measured while it was written, so each file is read once and whatever
#    ends an export early leaves something that is no archive.

MANIFEST_FORMAT = 1
_MANIFEST, _DATABASE = "manifest.json", "state.db"
_ARCHIVE_FOLDER = re.compile(r"hookshot-state-\d{8}-\d{6}", re.ASCII)
_LOG_MEMBER = re.compile(r"logs/([1-9]\d{0,17})\.log", re.ASCII)
# What an archive may hold, in this order, and how large each may be. A ratio would not do: a log of one line repeated
# shrinks a thousandfold. What is unpacked must also fit beside DISK_RESERVE_BYTES, so a bomb cannot fill the disk.
_LARGEST = {
    "config.toml": 4 << 20, "services.toml": 4 << 20,  # as read_text() reads them
    "secrets": 1 << 20,  # as SECRETS reads them
    _DATABASE: 64 << 30,  # the longest retention of 50 services fills a part of this
    "logs": 8 << 30,  # the greatest max_output, written anew by each recovery
    _MANIFEST: 32 << 20}  # 300,000 logs; read into memory, where the worst JSON takes twenty times its size
_RANKS = {name: rank for rank, name in enumerate(_LARGEST)}
_SECTOR = b"\0" * 512
# What tar pads archives to.
_RECORD_BYTES = 10240
_PIECE_BYTES = 1 << 20
# Three times as quick as the default, for a tenth more bytes: a server may be at work beside it.
_GZIP_LEVEL = 3
# A folder of a dead process is removed by the next one, but not in the instant between its creation and its lock.
_LEFTOVER_S = 60
_JOURNAL = "import.journal"
RESTORED = "restored from a backup"


class FileSum(NamedTuple):
    """What the manifest says of a file."""

    sha256: str
    size: int


def _rank_of(name: str) -> tuple[int, int] | None:
    """Return where a member stands in the order of an archive; None for a name that no archive has."""
    if match := _LOG_MEMBER.fullmatch(name):
        return _RANKS["logs"], int(match[1])
    return (_RANKS[name], 0) if name in _RANKS and name != "logs" else None


def _limit_of(name: str) -> int:
    return _LARGEST[name if name in _LARGEST else "logs"]


def _pieces(file: Any, size: int) -> Iterator[bytes]:
    """Yield exactly `size` bytes of a file, fewer only at its end; what is appended meanwhile is left out."""
    while size and (piece := file.read(min(size, _PIECE_BYTES))):
        size -= len(piece)
        yield piece


@contextlib.contextmanager
def _make_workshop(data_dir: str, kind: str) -> Iterator[str]:
    """Give a private folder in the data directory, locked while this process lives; remove those of dead ones."""
    for entry in os.scandir(data_dir):
        if re.fullmatch(rf"\.{kind}-[0-9a-f]{{16}}", entry.name, re.ASCII) and now_ms() / 1000 - entry.stat(follow_symlinks=False).st_mtime > _LEFTOVER_S:
            with contextlib.suppress(HookshotError, OSError):
                FolderLock(entry.path).release()
                shutil.rmtree(entry.path, ignore_errors=True)
    folder = os.path.join(data_dir, f".{kind}-{new_request_id()}")
    os.mkdir(folder, 0o700)
    try:
        lock = FolderLock(folder)
        try:
            yield folder
        finally:
            lock.release()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sync_folder(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- export


class BackupSource(NamedTuple):
    """What goes into an archive: contents that were read, and where the rest is. No secrets: they are left out."""

    config: bytes
    services: bytes
    secrets: bytes | None
    data_dir: str
    has_logs: bool


class BackupCounts(NamedTuple):
    """What an archive got: deployments in the database, logs; whether it is compressed (Python may lack zlib), and the sum of the tar in it."""

    deployments: int
    logs: int
    is_compressed: bool
    sha256: str


def gather(config_path: str, services_path: str, *, has_secrets: bool, has_logs: bool) -> BackupSource:
    """Read both files and the secrets; raise with what is wrong or missing before anything is written."""
    problems: list[Problem] = []
    contents = {}
    for name, path in (("config.toml", config_path), ("services.toml", services_path)):
        try:
            contents[name] = _read_whole(path, _LARGEST[name])
        except (OSError, ValueError) as error:
            raise HookshotError("config", f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        text = contents["config.toml"].decode("utf-8-sig")
    except UnicodeDecodeError:
        raise HookshotError("config", f"{config_path} cannot be read: is not UTF-8") from None
    config = load_config(text, config_path, problems, default_places(config_path))
    if any(not problem.is_warning for problem in problems):
        raise ConfigError(problems)
    secrets_text = None
    if has_secrets:
        try:
            secrets_text = _read_whole(config.secrets.secrets_file, _LARGEST["secrets"])
        except (OSError, ValueError) as error:
            raise HookshotError("config", f"the secrets file {config.secrets.secrets_file} cannot be read: {getattr(error, 'strerror', None) or error}; "
                                          "run this as root or as the server's user, or leave it out with --no-secrets") from None
    else:
        _refuse_secrets_within(config, config_path, services_path, contents)
    return BackupSource(contents["config.toml"], contents["services.toml"], secrets_text, config.storage.data_dir, has_logs)


def _refuse_secrets_within(config: Config, config_path: str, services_path: str, contents: Mapping[str, bytes]) -> None:
    """Raise if a file that goes into an archive without secrets holds one: a chat's URL, a password, a copy of a key."""
    masker = load_keyring(config, Services({}), SecretSurroundings({}, None), config_path, []).masker
    for path, content in ((config_path, contents["config.toml"]), (services_path, contents["services.toml"])):
        if masker.mask(content) != content:
            raise HookshotError("config", f"{path} itself holds a secret, so an archive without secrets cannot be made of it; "
                                          "move the secret into the secrets file (\"secret:NAME\"), or export without --no-secrets")


def _read_whole(path: str, limit_bytes: int) -> bytes:
    """Return a regular file of bounded size; OSError or ValueError say why not."""
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("is not a regular file")
        content = file.read(limit_bytes + 1)
    if len(content) > limit_bytes:
        raise ValueError(f"is larger than {render_size(limit_bytes)}")
    return content


class _ArchiveWriter:
    """Writes members and keeps what the manifest will say of them, in a file: there may be hundreds of thousands."""

    def __init__(self, out: Any, notes: Any, at_ms: int):
        self._out, self._notes, self._at_s = out, notes, at_ms // 1000
        self.written = hashlib.sha256()
        self._folder = time.strftime("hookshot-state-%Y%m%d-%H%M%S", time.gmtime(self._at_s))

    def add(self, name: str, size: int, content: Iterable[bytes], *, changed_s: int | None = None) -> None:
        """Write one member."""
        import tarfile  # only a backup needs it

        if size > _limit_of(name):
            raise HookshotError("cannot_write", f"{name} has {render_size(size)}, more than the {render_size(_limit_of(name))} that an archive takes"
                                + ("; leave logs out with --no-logs" if name == _MANIFEST or name.startswith("logs/") else ""))
        header = tarfile.TarInfo(f"{self._folder}/{name}")
        header.size, header.mode, header.mtime = size, 0o600, self._at_s if changed_s is None else changed_s
        self._write(header.tobuf(tarfile.GNU_FORMAT))
        digest, left = hashlib.sha256(), size
        for piece in content:
            digest.update(piece)
            left -= len(piece)
            self._write(piece)
        if left:
            raise HookshotError("storage", f"{name} became shorter while it was read; run it again")
        self._write(_SECTOR[: -size % len(_SECTOR)])
        self._notes.write(b",\n" * (self._notes.tell() > 0) + f'"{name}": {{"sha256": "{digest.hexdigest()}", "size": {size}}}'.encode())

    def finish(self, schema_version: int) -> None:
        """Write the manifest and the end."""
        facts = {"format_version": MANIFEST_FORMAT, "created_at": render_time(self._at_s * 1000), "hookshot_version": __version__,
                 "schema_version": schema_version}
        head, tail = render_json(facts).rstrip(b"}\n") + b',"files":{\n', b"\n}}\n"
        size = self._notes.tell()
        self._notes.seek(0)
        self.add(_MANIFEST, len(head) + size + len(tail), itertools.chain([head], _pieces(self._notes, size), [tail]))
        self._write(_SECTOR * 2)

    def _write(self, piece: bytes) -> None:
        self.written.update(piece)
        self._out.write(piece)


def write_archive(source: BackupSource, out: Any, at_ms: int) -> BackupCounts:
    """Write an archive of this instant to an open file; the server may be at work meanwhile. OSError is of `out`."""
    path = os.path.join(source.data_dir, _DATABASE)
    refuse_half_import(source.data_dir)
    try:
        os.stat(path)
    except FileNotFoundError:
        raise HookshotError("config", f"there is no database in {source.data_dir} yet; start the server once, or correct storage.data_dir") from None
    except OSError as error:
        raise HookshotError("config", f"{path} cannot be read: {error.strerror}; run this as root or as the server's user") from None
    with contextlib.ExitStack() as stack:
        try:
            workshop = stack.enter_context(_make_workshop(source.data_dir, "export"))
            copy = os.path.join(workshop, _DATABASE)
            size = sum(os.stat(path + suffix).st_size for suffix in ("", "-wal") if os.path.exists(path + suffix))
            _need_room(source.data_dir, size, "the copy of the database")
            notes = stack.enter_context(open(os.path.join(workshop, "notes"), "w+b"))
        except OSError as error:
            advice = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "run this as root or as the server's user"
            raise HookshotError("cannot_write", f"{source.data_dir} cannot be written: {error.strerror}; {advice}") from None
        copy_database(path, copy)
        schema_version, problem = check_database(copy)
        if problem:
            raise HookshotError("storage", f"{path} is damaged ({problem}); nothing was exported")
        packed = stack.enter_context(_compressing(out, at_ms // 1000))
        writer = _ArchiveWriter(packed, notes, at_ms)
        for name, content in (("config.toml", source.config), ("services.toml", source.services), ("secrets", source.secrets)):
            if content is not None:
                writer.add(name, len(content), [content])
        with open(copy, "rb") as file:
            writer.add(_DATABASE, size := os.fstat(file.fileno()).st_size, _pieces(file, size))
        deployments = logs = 0
        for number in deployment_numbers(copy):
            deployments += 1
            logs += source.has_logs and _add_log(writer, source.data_dir, number)
        writer.finish(schema_version)
        return BackupCounts(deployments, logs, packed is not out, writer.written.hexdigest())


def _add_log(writer: _ArchiveWriter, data_dir: str, number: int) -> bool:
    """Add a deployment's log as long as it is now; return whether there is one."""
    path = os.path.join(data_dir, "logs", f"{number}.log")
    try:
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    except FileNotFoundError:
        return False
    except OSError as error:
        raise HookshotError("storage", f"{path} cannot be read: {error.strerror}") from None
    with file:
        status = os.fstat(file.fileno())
        writer.add(f"logs/{number}.log", status.st_size, _pieces(file, status.st_size), changed_s=int(status.st_mtime))
    return True


@contextlib.contextmanager
def _compressing(out: Any, at_s: int) -> Iterator[Any]:
    try:
        import gzip  # only a backup needs it
    except ImportError:  # a Python built without zlib: only compression is off
        yield out
        return
    with gzip.GzipFile(filename="", mode="wb", compresslevel=_GZIP_LEVEL, fileobj=out, mtime=at_s) as packed:
        yield packed


def _need_room(folder: str, size_bytes: int, what: str) -> None:
    free = free_bytes(folder) - DISK_RESERVE_BYTES
    if size_bytes > free:
        raise HookshotError("cannot_write", f"{what} takes {render_size(size_bytes)}, and {folder} has room for {render_size(max(0, free))} "
                                            f"beside the {render_size(DISK_RESERVE_BYTES)} that deploys need; free some space")


def save_archive(source: BackupSource, path: str, at_ms: int) -> BackupCounts:
    """Write an archive (0600) beside `path`, read it back, and put it there: a file of that name is always whole."""
    part = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.{new_request_id()}.part")
    if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
        raise HookshotError("cannot_write", f"{path} is there and is no regular file; name another, or write to - (standard output)")
    try:
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(descriptor, "w+b") as out:
                counts = write_archive(source, out, at_ms)
                out.flush()
                os.fsync(descriptor)
                out.seek(0)
                if _sum_of(out) != counts.sha256:
                    raise HookshotError("cannot_write", f"{path} was not kept, because it reads back otherwise than it was written; check the disk")
            os.rename(part, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(part)
        _sync_folder(os.path.dirname(path))
    except OSError as error:
        raise HookshotError("cannot_write", f"{path} cannot be written: {error.strerror}; nothing was left there") from None
    return counts


def _sum_of(archive: Any) -> str | None:
    """Return the sum of the tar in an archive, None if it cannot be read. In little memory, unlike an import."""
    tar, damage = _unpacked(archive)
    digest = hashlib.sha256()
    try:
        for piece in iter(lambda: tar.read(_PIECE_BYTES), b""):
            digest.update(piece)
    except damage:
        return None
    return digest.hexdigest()


# --- reading an archive


def _unpacked(stream: Any) -> tuple[Any, tuple[type[Exception], ...]]:
    """Return the tar in an archive, compressed or not, and what reading it raises if it is damaged. ImportError without zlib."""
    if stream.peek(2)[:2] != b"\x1f\x8b":
        return stream, (EOFError,)
    import gzip  # only a backup needs it
    import zlib

    return gzip.GzipFile(fileobj=stream, mode="rb"), (EOFError, zlib.error, gzip.BadGzipFile)


class Member(NamedTuple):
    """One file of an archive; `content` can be read once."""

    name: str
    size: int
    changed_s: int
    content: Iterator[bytes]


class ArchiveReader:
    """One pass over an archive: every member in its place, checked and summed, then held against the manifest.

    Whatever is not as write_archive() writes it raises `bad_archive`.
    """

    def __init__(self, stream: Any, label: str):
        """Take a buffered binary file that stands at its beginning; `label` is its name in messages."""
        self._label = label
        try:
            self._stream, self._damage = _unpacked(stream)
        except ImportError:
            raise HookshotError("config", f"this Python lacks zlib; unpack {label} with gunzip first") from None
        self._folder = ""
        self.sums: dict[str, FileSum] = {}
        self.manifest: dict[str, Any] = {}

    def read(self, take: Callable[[Member], None]) -> None:
        """Hand over every member but the manifest; what is left of its content is read all the same."""
        last = (-1, 0)
        while (header := self._read_header()) is not None:
            name, size, changed_s = header
            rank = _rank_of(name)
            if rank is None:
                raise self._wrong(f"holds {_shown(name)}, which no backup has")
            if rank <= last:
                raise self._wrong(f"holds {name} twice or not in its place")
            if size > _limit_of(name):
                raise self._wrong(f"says that {name} has {size} bytes; the most is {_limit_of(name)}")
            last = rank
            content = self._read_member(name, size)
            if name == _MANIFEST:
                self._check_manifest(b"".join(content))
            else:
                take(Member(name, size, changed_s, content))
                collections.deque(content, 0)
        if not self.manifest:
            raise self._wrong(f"has no {_MANIFEST}")
        rest = self._read(_RECORD_BYTES + 1)
        if len(rest) > _RECORD_BYTES or rest.strip(b"\0"):
            raise self._wrong("goes on after its end")

    def _wrong(self, what: str) -> HookshotError:
        return HookshotError("bad_archive", f"{self._label} {what}; nothing was changed. Use another backup")

    def _read(self, size: int) -> bytes:
        try:
            return self._stream.read(size)
        except self._damage as error:
            raise self._wrong(f"is damaged or cut off ({_shown(str(error))})") from None
        except OSError as error:
            raise HookshotError("usage", f"{self._label} cannot be read: {error.strerror}") from None

    def _read_header(self) -> tuple[str, int, int] | None:
        """Return name, size and time of the next member, or None at the end."""
        import tarfile  # only a backup needs it

        block = self._read(len(_SECTOR))
        if len(block) < len(_SECTOR):
            raise self._wrong("is cut off" if self.sums else "is no backup of hookshot, unless it is still encrypted")
        if block == _SECTOR:
            return None
        try:
            header = tarfile.TarInfo.frombuf(block, "ascii", "strict")
        except (tarfile.HeaderError, ValueError):
            raise self._wrong("has a header that cannot be read" if self.sums else "is no backup of hookshot, unless it is still encrypted") from None
        folder, slash, name = header.name.partition("/")
        if not slash or not _ARCHIVE_FOLDER.fullmatch(folder) or folder != (self._folder or folder):
            raise self._wrong(f"holds {_shown(header.name)}, which is not in its one folder hookshot-state-YYYYMMDD-HHMMSS")
        # No links, devices, folders or sparse files, and none of the headers that change what follows them.
        if header.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or header.linkname or header.size < 0:
            raise self._wrong(f"holds {_shown(name or header.name)}, which is no plain file")
        self._folder = folder
        return name, header.size, header.mtime if isinstance(header.mtime, int) else 0

    def _read_member(self, name: str, size: int) -> Iterator[bytes]:
        digest, left = hashlib.sha256(), size
        while left:
            piece = self._read(min(left, _PIECE_BYTES))
            if not piece:
                raise self._wrong(f"is cut off in {name}")
            digest.update(piece)
            left -= len(piece)
            yield piece
        padding = -size % len(_SECTOR)
        if self._read(padding) != _SECTOR[:padding]:
            raise self._wrong(f"is damaged after {name}")
        if name != _MANIFEST:
            self.sums[name] = FileSum(digest.hexdigest(), size)

    def _check_manifest(self, text: bytes) -> None:
        try:
            manifest = parse_json(text)
        except HookshotError as error:
            raise self._wrong(f"has a {_MANIFEST} that cannot be read ({error.sentence.replace('the body ', 'it ')})") from None
        found = manifest if isinstance(manifest, dict) else {}
        if "format_version" not in found and found.get("version") == "1.0":
            raise self._wrong("is a backup of Hookshot 1.0, whose database cannot be read; its config.toml, services.toml and secrets can be unpacked with tar")
        if found.get("format_version") != MANIFEST_FORMAT:
            raise self._wrong(f"is of format {_shown(str(found.get('format_version')))}; this hookshot reads format {MANIFEST_FORMAT}")
        for name, kind in (("created_at", str), ("hookshot_version", str), ("schema_version", int), ("files", dict)):
            if not isinstance(found.get(name), kind):
                raise self._wrong(f"has a {_MANIFEST} without {name}")
        listed = found["files"]
        for name in (*self.sums, *listed):
            if name not in listed or name not in self.sums:
                raise self._wrong(f"{'holds' if name in self.sums else 'lacks'} {_shown(name)}, and its {_MANIFEST} says otherwise")
            if listed[name] != self.sums[name]._asdict():
                raise self._wrong(f"has another {name} than its {_MANIFEST} says: it is damaged or was changed")
        self.manifest = found


def _shown(text: str) -> str:
    return clip(escape_controls(text), 100)


# --- import


class Targets(NamedTuple):
    """Where an import puts what. They come from the command line and from a config.toml, never from names in an archive."""

    config: str
    services: str
    secrets: str
    data_dir: str


class Restoration(NamedTuple):
    """What an import did, or would do."""

    created_at: str
    hookshot_version: str
    schema_version: int
    targets: Targets
    has_secrets: bool
    deployments: int
    logs: int
    ended: tuple[Deployment, ...]
    warnings: tuple[str, ...]


def refuse_half_import(data_dir: str) -> None:
    """Raise if an import into this directory was cut short: some of its files may be the old ones, some the new."""
    if os.path.lexists(os.path.join(data_dir, _JOURNAL)):
        raise HookshotError("in_use", f"an import into {data_dir} was interrupted; run `hookshot import` again, which first puts back what was there")


class _Import:
    """One import: takes the members of an archive, then puts them in place. What it makes beside the places goes with `stack`."""

    def __init__(self, config_path: str, services_path: str, at_ms: int, *, is_dry: bool, is_forced: bool):
        self._paths, self._at_ms, self._is_dry, self._is_forced = (config_path, services_path), at_ms, is_dry, is_forced
        self.stack = contextlib.ExitStack()
        # What is undone only if the import fails.
        self._undo = self.stack.enter_context(contextlib.ExitStack())
        self._texts: dict[str, bytes] = {}
        self._numbers: set[int] = set()
        self._logs = 0
        self.folder = ""
        self._owner: tuple[int, int] | None = None
        self.schema_version = 0
        self.targets = Targets(config_path, services_path, "", "")
        self.warnings: list[str] = []

    def take(self, member: Member) -> None:
        """Keep one member, beside its place."""
        if member.name in ("config.toml", "services.toml", "secrets"):
            self._texts[member.name] = b"".join(member.content)
            return
        if not self.folder:
            self._begin()
        if member.name == _DATABASE:
            self._write(os.path.join(self.folder, _DATABASE), member)
            self._check_database()
        elif int(_LOG_MEMBER.fullmatch(member.name)[1]) not in self._numbers:  # type: ignore[index]
            raise _bad(f"the archive holds {member.name}, and its database knows no such deployment")
        else:
            self._write(os.path.join(self.folder, member.name), member)
            self._logs += 1

    def _write(self, path: str, member: Member) -> None:
        _need_room(self.folder, member.size, member.name)
        changed_s = min(max(member.changed_s, 0), self._at_ms // 1000)
        _write_file(path, member.content, 0o600, self._owner, changed_s=changed_s)

    # --- before

    def _begin(self) -> None:
        """Find out where to, make sure that nobody works there, and make the folder to unpack into."""
        for name in ("config.toml", "services.toml"):
            if name not in self._texts:
                raise _bad(f"the archive lacks {name}")
        self._choose_targets()
        data_dir = self.targets.data_dir
        if self._is_dry:
            import tempfile  # only a dry run needs it

            self._look_at(data_dir)
            self.folder = self.stack.enter_context(tempfile.TemporaryDirectory(prefix="hookshot-import-"))
        else:
            self._take_over(data_dir)
            self.folder = self.stack.enter_context(_make_workshop(data_dir, "import"))
        os.mkdir(os.path.join(self.folder, "logs"), 0o700)
        if self._owner:
            os.chown(os.path.join(self.folder, "logs"), *self._owner, follow_symlinks=False)

    def _choose_targets(self) -> None:
        """Take data_dir and secrets_file from the present config.toml, from the archive's if that is absent or broken."""
        config_path, services_path = self._paths
        self.warnings.clear()
        try:
            archived, problems = _parse_config(self._texts["config.toml"], "config.toml of the archive", config_path)
        except UnicodeDecodeError:
            raise _bad("the archive's config.toml is not UTF-8") from None
        try:
            # An import that died between the two renames of config.toml, its last: the old one still says where the journal is.
            is_between = os.path.lexists(f"{config_path}.new") and not os.path.lexists(config_path)
            present, broken = _parse_config(_read_whole(f"{config_path}.bak" if is_between else config_path, _LARGEST["config.toml"]), config_path, config_path)
            why = "is broken"
        except (OSError, ValueError) as error:
            present, broken, why = None, (), "is not there" if isinstance(error, FileNotFoundError) else "cannot be read"
        if present is None or broken:
            if problems:
                raise ConfigError((*broken, *problems))
            self.warnings.append(f"{config_path} {why}, so the paths are those of the archive's config.toml: "
                                 f"{archived.storage.data_dir} and {archived.secrets.secrets_file}")
            present = archived
        elif problems:
            self.warnings.append(f"the archive's config.toml has {len(problems)} problem{'s' * (len(problems) != 1)}; run `hookshot validate` before the server starts")
        self.targets = Targets(config_path, services_path, present.secrets.secrets_file, present.storage.data_dir)
        places = {os.path.normpath(path) for path in (*self.targets, os.path.join(present.storage.data_dir, _DATABASE), os.path.join(present.storage.data_dir, "logs"))}
        if len(places) != len(self.targets) + 2:
            raise HookshotError("config", f"two files would go to one place: {', '.join(self.targets)}; choose others with -c and -s")
        for key, here, there in (("storage.data_dir", present.storage.data_dir, archived.storage.data_dir),
                                 ("secrets.secrets_file", present.secrets.secrets_file, archived.secrets.secrets_file)):
            if here != there and there:
                self.warnings.append(f"the archive's config.toml has {key} = {json.dumps(there)}, the present one {json.dumps(here)}, which is where the files "
                                     f"go; change it in {config_path} before the server starts")
        if "secrets" not in self._texts:
            what = "stays as it is" if os.path.exists(self.targets.secrets) else "does not exist: create it"
            self.warnings.append(f"the archive was made without secrets; {self.targets.secrets} {what}")

    def _look_at(self, data_dir: str) -> None:
        """Say what stands in the way of an import; only what stopping the server does not settle is refused."""
        if os.path.lexists(os.path.join(data_dir, _JOURNAL)):
            self.warnings.append(f"an import into {data_dir} was interrupted; the next one first puts back what was there")
        holder = FolderLock.holder(data_dir)
        if holder is None:
            self._refuse_unfinished(data_dir)
        else:
            self.warnings.append(f"another hookshot (pid {holder}) uses {data_dir}; it must be stopped for the import itself, with its deployments ended")

    def _take_over(self, data_dir: str) -> None:
        for folder in (data_dir, *map(os.path.dirname, self.targets[:3])):
            self._make_folder(folder, 0o700 if folder == data_dir else 0o755)
        status = os.stat(data_dir)
        self._owner = (status.st_uid, status.st_gid) if os.geteuid() == 0 else None
        is_new = not os.listdir(data_dir)
        lock = FolderLock(data_dir)
        self.stack.callback(lock.release)
        if is_new:
            self._undo.callback(os.unlink, lock.path)
        if self._owner:
            os.chown(lock.path, *self._owner, follow_symlinks=False)
        if undo_import(data_dir):
            self._choose_targets()
            self.warnings.append(f"an earlier import into {data_dir} was interrupted; what was there before it was put back first")
            if self.targets.data_dir != data_dir:
                raise HookshotError("in_use", f"the config.toml that was put back names {self.targets.data_dir}; run the import again")
        self._refuse_unfinished(data_dir)

    def _make_folder(self, folder: str, mode: int) -> None:
        if not os.path.isdir(folder):
            self._make_folder(os.path.dirname(folder), 0o755)
            os.mkdir(folder, mode)
            self._undo.callback(_remove_folder, folder)

    def _refuse_unfinished(self, data_dir: str) -> None:
        path = os.path.join(data_dir, _DATABASE)
        number = count_unfinished(path) if os.path.exists(path) else 0
        if number is None:
            self.warnings.append(f"the present database {path} cannot be read, so nobody knows what is unfinished in it")
        elif number and not self._is_forced:
            raise HookshotError("in_use", f"{number} deployment{'s' * (number != 1)} in {data_dir} {'are' if number != 1 else 'is'} unfinished; start the server "
                                          "and let them end, or give them up with --force")

    # --- after

    def _check_database(self) -> None:
        path = os.path.join(self.folder, _DATABASE)
        version, problem = check_database(path)
        if version > len(MIGRATIONS):
            raise _bad(f"the archive was made by a newer hookshot (schema {version}, this one knows {len(MIGRATIONS)}); import it with that version")
        if problem:
            raise _bad(f"the archive's database is damaged ({problem})")
        self.schema_version, self._numbers = version, set(deployment_numbers(path))

    def settle(self, manifest: Mapping[str, Any]) -> Restoration:
        """Make the unpacked database one that a server may start on; return what the import is about."""
        if not self.folder or not self.schema_version:
            raise _bad(f"the archive lacks {_DATABASE}")
        if manifest["schema_version"] != self.schema_version:
            raise _bad(f"the archive's database has schema {self.schema_version}, and its {_MANIFEST} says {_shown(str(manifest['schema_version']))}")
        try:
            store = Store(self.folder)
            try:
                ended = store.settle_restored(RESTORED, self._at_ms)
            finally:
                store.close()
        except HookshotError as error:
            if error.name != "storage":
                raise
            raise _bad(f"the archive's database cannot be used ({_shown(error.details or error.sentence)})") from None
        except UnicodeDecodeError:
            # What Python makes of an error of SQLite's whose message quotes a damaged schema.
            raise _bad("the archive's database cannot be used") from None
        return Restoration(_shown(manifest["created_at"]), _shown(manifest["hookshot_version"]), self.schema_version, self.targets,
                           "secrets" in self._texts, len(self._numbers), self._logs, ended, tuple(self.warnings))

    def put_in_place(self) -> None:
        """Write the three texts beside their places, then move everything: all or, if anything fails, nothing."""
        steps, older = [], []
        database, logs = (os.path.join(self.targets.data_dir, name) for name in (_DATABASE, "logs"))
        # The write-ahead log belongs to the old database: with the new one it would be its ruin. Under these names it
        # is found again with state.db.bak.
        for suffix in ("", "-wal", "-shm"):
            self._plan_swap(steps, older, database + suffix, f"{database}.bak{suffix}", os.path.join(self.folder, _DATABASE) if not suffix else None)
        self._plan_swap(steps, older, logs, f"{logs}.bak", os.path.join(self.folder, "logs"))
        # config.toml comes last: until then it says where the journal is.
        for name, path, mode in (("secrets", self.targets.secrets, 0o600), ("services.toml", self.targets.services, 0o644),
                                 ("config.toml", self.targets.config, 0o644)):
            if name in self._texts:
                self._plan_swap(steps, older, path, f"{path}.bak", self._write_text(path, self._texts[name], mode, is_secret=name == "secrets"))
        # One call for all logs, where an fsync for each would take minutes.
        os.sync()
        _move_all(self.targets.data_dir, steps)
        self._undo.pop_all()
        for path in older:
            # The import is done; what cannot be removed now is removed by the next one.
            with contextlib.suppress(OSError):
                _remove(path)

    def _write_text(self, path: str, content: bytes, mode: int, *, is_secret: bool) -> str:
        """Write a file's new content beside it, with the owner and (unless it is secret) the mode of the old one."""
        beside, owner = f"{path}.new", self._owner if is_secret else None
        if os.path.exists(path):
            status = os.stat(path)
            mode = mode if is_secret else stat.S_IMODE(status.st_mode)
            owner = (status.st_uid, status.st_gid) if os.geteuid() == 0 else None
        _remove(beside)
        self.stack.callback(_remove, beside)
        _write_file(beside, [content], mode, owner)
        return beside

    @staticmethod
    def _plan_swap(steps: list[tuple[str, str]], older: list[str], path: str, backup: str, new: str | None) -> None:
        """Add the renames that put `new` at `path`, what is there at `backup`, and what is there aside, to be removed."""
        if os.path.lexists(backup):
            older.append(f"{backup}.older")
            _remove(older[-1])
            steps.append((backup, older[-1]))
        if os.path.lexists(path):
            steps.append((path, backup))
        if new:
            steps.append((new, path))


def _bad(what: str) -> HookshotError:
    return HookshotError("bad_archive", f"{what}; nothing was changed")


def _parse_config(content: bytes, file: str, config_path: str) -> tuple[Config, tuple[Problem, ...]]:
    """Return the config.toml that is or will be at a path, and what is wrong with it; ValueError if it is no text."""
    problems: list[Problem] = []
    config = load_config(content.decode("utf-8-sig"), file, problems, default_places(config_path))
    return config, tuple(problem for problem in problems if not problem.is_warning)


def _write_file(path: str, content: Iterable[bytes], mode: int, owner: tuple[int, int] | None, *, changed_s: int | None = None) -> None:
    """Create a file that must not exist yet. It is not yet sure to be on disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        for piece in content:
            file.write(piece)
        file.flush()
        if owner:
            os.fchown(descriptor, *owner)
        os.fchmod(descriptor, mode)
        if changed_s is not None:
            os.utime(descriptor, (changed_s, changed_s))


def _remove(path: str) -> None:
    """Remove a file or a folder with all that is in it, if it is there."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.unlink(path)


def _remove_folder(path: str) -> None:
    with contextlib.suppress(OSError):
        os.rmdir(path)


def _move_all(data_dir: str, steps: Sequence[tuple[str, str]]) -> None:
    """Rename each of `steps`, or none of them: also kill -9 and power loss leave a journal, from which undo_import() puts back."""
    journal = os.path.join(data_dir, _JOURNAL)
    with contextlib.ExitStack() as stack:
        stack.callback(undo_import, data_dir)
        write_private_file(f"{journal}.new", json.dumps(steps))
        os.rename(f"{journal}.new", journal)
        _sync_folder(data_dir)
        for before, after in steps:
            os.rename(before, after)
        for folder in {os.path.dirname(path) for step in steps for path in step}:
            _sync_folder(folder)
        os.unlink(journal)
        stack.pop_all()
    # Everything is in its new place: a disk that fails now does not make it undone.
    with contextlib.suppress(OSError):
        _sync_folder(data_dir)


def undo_import(data_dir: str) -> bool:
    """Put back what an import that did not come to its end has moved; return whether there was one. Under the FolderLock."""
    journal = os.path.join(data_dir, _JOURNAL)
    _remove(f"{journal}.new")
    try:
        descriptor = os.open(journal, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    with os.fdopen(descriptor, "rb") as file:
        # Others may write in the server's directory: only a journal of ours tells what is renamed.
        if os.fstat(descriptor).st_uid != os.geteuid():
            raise HookshotError("in_use", f"an import into {data_dir} by another user was interrupted; run the import as that user")
        steps = json.loads(file.read())
    # Each step went to a name that was free, so what has its source again, or never left it, needs nothing.
    for before, after in reversed(steps):
        if os.path.lexists(after) and not os.path.lexists(before):
            os.rename(after, before)
    for folder in {os.path.dirname(path) for step in steps for path in step}:
        if os.path.isdir(folder):
            _sync_folder(folder)
    os.unlink(journal)
    _sync_folder(data_dir)
    return True


def import_archive(stream: Any, label: str, config_path: str, services_path: str, at_ms: int, *, is_dry: bool, is_forced: bool) -> Restoration:
    """Put an archive's contents in place of what this host has, or say what that would do. All or nothing."""
    work = _Import(config_path, services_path, at_ms, is_dry=is_dry, is_forced=is_forced)
    try:
        with work.stack:
            reader = ArchiveReader(stream, label)
            reader.read(work.take)
            restoration = work.settle(reader.manifest)
            if not is_dry:
                work.put_in_place()
            return restoration
    except OSError as error:
        raise HookshotError("cannot_write", f"{error.filename or work.folder or label} cannot be written: {error.strerror}; everything is as it was") from None
    except HookshotError as error:
        # The disk that is full is the one that is unpacked to, not a server's.
        if error.name in ("disk_full", "storage"):
            raise HookshotError("cannot_write", f"{error.sentence}; everything is as it was") from None
        raise


# === 21. DAEMON =======================================================================================================
# Builds the parts, runs them, takes them down again. The only place that wires; owns what is in force and the signals.
#
# 1. Nothing is bound, locked or created before the configuration is known to be right.
# 2. A signal only puts its number into a pipe; the main loop acts.
# 3. Shutdown: no new deploys, wait for the running ones up to shutdown_timeout, then stop them for recovery.

_HOUSE_TURN_S = 1.0
# For requests that wait for a deployment's end to send the answer that it goes on after the restart.
_CLOSE_S = 0.3
_SENDER_PATIENCE_S = 3.0
# A turn of the reading thread takes milliseconds; what keeps it longer must not keep the server from ending.
_READER_PATIENCE_S = 5.0
# With sockets that systemd keeps: for requests that came just before the end. Most take milliseconds.
_LEAVE_S = 2.0
# What follows shutdown_timeout: ending processes, sending notices, closing. And how long each word of it holds good for the service manager.
END_S, _EXTENSION_S = 30, 15
_REPORT_TURN_S = 1.0
# Longer than any turn takes: that of the housekeeper may wait for a reload and a command that brings secrets (30 s each).
_READER_STUCK_S, _HOUSE_STUCK_S = 30.0, 120.0


class Settings(NamedTuple):
    """Both files, read and found right."""

    config: Config
    services: Services


def read_settings(config_path: str, services_path: str, problems: list[Problem]) -> Settings:
    """Read both files; everything wrong with them is added to `problems`."""
    config = load_config(_read_file(config_path, problems), config_path, problems, default_places(config_path))
    return Settings(config, load_services(_read_file(services_path, problems), services_path, config, problems))


def _read_file(path: str, problems: list[Problem]) -> str:
    try:
        return read_text(path)
    except OSError as error:
        hint = "; create it with `hookshot init`, or name another with -c and -s" if isinstance(error, FileNotFoundError) else ""
        problems.append(Problem(path, "", f"cannot be read: {error.strerror}{hint}"))
    except ValueError as error:
        problems.append(Problem(path, "", f"cannot be read: {'is not UTF-8' if isinstance(error, UnicodeDecodeError) else error}"))
    return ""


def has_errors(problems: Iterable[Problem]) -> bool:
    """Return whether any problem is more than a warning."""
    return any(not problem.is_warning for problem in problems)


def check_host(settings: Settings, config_path: str, services_path: str, environ: Mapping[str, str], problems: list[Problem]) -> None:
    """Add what this host lacks for the configuration, and who else could change it: files, directories, accounts, programs."""
    for path in (config_path, services_path):
        _check_writers(path, Place(path, "", problems))
    _check_data_dir(settings.config.storage.data_dir, Place(config_path, "storage.data_dir", problems))
    _check_privacy(settings.config.storage.data_dir, Place(config_path, "storage.data_dir", problems))
    _check_server(settings.config, Place(config_path, "server", problems))
    _check_log_files(settings.config.logging.directory, Place(config_path, "logging.directory", problems))
    _check_paths(settings.config.monitoring, Place(config_path, "monitoring", problems))
    for service in settings.services.by_name.values():
        place = Place(services_path, f'service "{service.name}"', problems)
        if not os.path.isdir(service.working_dir or "/"):
            (place / "working_dir").problem(f"{service.working_dir} does not exist; create it")
        try:
            account = find_account(service.user, service.group)
            if account and os.geteuid() not in (0, account.uid):
                (place / "user").problem(f"only root can run commands as {account.name}; this is user {os.geteuid()}")
        except ValueError as error:
            (place / "user").problem(str(error))
        _check_programs(service, environ.get("PATH", DEFAULT_PATH), place)


def _check_paths(monitoring: Monitoring, place: Place) -> None:
    """Note a path of [monitoring] that another request has."""
    for name, other in (("health_path", monitoring.metrics_path), ("metrics_path", monitoring.health_path)):
        path = getattr(monitoring, name)
        if path == other or any(route.pattern not in MOVABLE_PATHS and matches_pattern(route.pattern, path) for route in ROUTES):
            (place / name).problem(f"{path} is the path of another request; choose another")


def _check_log_files(folder: str, place: Place) -> None:
    """Note a directory for logs that cannot be written; one that is missing is made at start."""
    if folder:
        _check_data_dir(folder, place)


def _check_writers(path: str, place: Place) -> None:
    """Note who may change a file that says what runs here. Folders are warnings: in a container everyone may write many, and is one."""
    with contextlib.suppress(OSError):
        for message, is_open in find_writers(path):
            place.problem(message) if is_open else place.warning(message)


def _check_data_dir(folder: str, place: Place) -> None:
    existing = folder
    while not os.path.exists(existing):
        existing = os.path.dirname(existing)
    if not os.path.isdir(existing):
        place.problem(f"{existing} is not a directory")
    elif not os.access(existing, os.W_OK | os.X_OK):
        place.problem(f"{existing} cannot be written by user {os.geteuid()}; choose another directory or change its owner")


def _check_privacy(folder: str, place: Place) -> None:
    """Note a data directory that is not the server's alone; one of its own is closed to others at start."""
    with contextlib.suppress(OSError):
        status = os.stat(folder)
        if status.st_mode & stat.S_ISVTX and status.st_mode & stat.S_IWOTH:
            place.problem(f"{folder} is everyone's; choose a folder in it, which the server can keep to itself")
        elif status.st_uid not in (0, os.geteuid()) or (status.st_mode & stat.S_IWOTH and status.st_uid != os.geteuid()):
            place.warning(f"{folder} belongs to user {status.st_uid} (mode {stat.S_IMODE(status.st_mode):04o}), so others can change what is in it; "
                          f"give it to the server's user {os.geteuid()}, mode 0700")


# Beside connections: the database, logs, pipes of commands.
_OTHER_DESCRIPTORS = 100


def descriptors_needed(server: Server) -> int:
    """Return how many descriptors a server may need at once."""
    # Who follows a log has that open too.
    return 2 * server.max_connections + _OTHER_DESCRIPTORS


def _check_server(config: Config, place: Place) -> None:
    server, is_plain = config.server, not config.server.tls.cert and not config.security.trusted_proxies
    for listen in (address for address in server.listen if not address.is_awaited):
        folder = os.path.dirname(listen.path)
        if listen.path and listen.fd < 0 and not os.path.isdir(folder):
            (place / "listen").problem(f"{folder} does not exist; create it (RuntimeDirectory= in a unit)")
        elif not listen.path and is_plain and not is_loopback(parse_address(listen.host)) and listen.host != "localhost":
            (place / "listen").warning(f"{listen} may speak plain HTTP beyond this host, and others then read what is sent; "
                                       "set [server.tls], or put a TLS proxy in front and name it in security.trusted_proxies")
    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if descriptors != resource.RLIM_INFINITY and descriptors_needed(server) > descriptors:
        (place / "max_connections").warning(f"{server.max_connections} connections may need more than the {descriptors} descriptors that this "
                                            "process may open; raise LimitNOFILE (ulimit -n)")


def _check_programs(service: Service, path: str, place: Place) -> None:
    env_path = service.env.get("PATH")
    path = env_path.text if env_path and not env_path.inserts else path
    for where, commands, _ in service_commands(service):
        for index, command in enumerate(commands):
            program = command.run[0]
            at = (place / where).at(index)
            if command.working_dir and not os.path.isdir(command.working_dir):
                (at / "working_dir").problem(f"{command.working_dir} does not exist; create it")
            if program.inserts:
                continue
            if "/" in program.text:
                # An earlier command may bring it, so that it is missing now is worth a word, not a refusal.
                file = os.path.join(command.working_dir or service.working_dir or "/", program.text)
                if not os.access(file, os.X_OK):
                    at.warning(f"{file} is not an executable file yet")
            elif "PATH" not in command.env and not shutil.which(program.text, path=path):
                at.problem(f"the program {program.text} is not found on PATH ({path})")


class Signals:
    """The signals received, in order. Main thread only.

    The kernel may hand a signal to any thread, and Python's handler runs only in the main one, once something wakes
    it. So the C-level handler writes the number into a pipe (signal.set_wakeup_fd), and the main thread polls that.
    """

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)

    def catch(self, *numbers: int) -> None:
        """Receive these signals from now on, instead of what they would do."""
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in numbers:
            signal.signal(number, lambda number, frame: None)

    def get(self, timeout_s: float | None) -> int | None:
        """Return the next signal's number, or None after `timeout_s` (None: wait for ever)."""
        poll = select.poll()
        poll.register(self._read, select.POLLIN)
        return os.read(self._read, 1)[0] if poll.poll(None if timeout_s is None else timeout_s * 1000) else None


# What was written to less than this ago may be half-written. How long to wait for a file that goes on being written to, and
# how often to read again what has changed meanwhile.
_QUIET_S, _QUIET_PATIENCE_S, _QUIET_TRIES = 0.1, 3.0, 5
# Lines of one reload's changes in the log.
_MAX_CHANGES_TOLD = 50


class ReloadRecord(NamedTuple):
    """How a server last read its files, in reload.json beside its database: `hookshot reload` finds the server and the outcome by it.

    `outcome` is "reading", "taken" or "refused" of the reading with this number; 0 is the one at start.
    """

    pid: int
    # Clock ticks since boot: the pid may be another process's by now, or of another namespace.
    started_ticks: int | None
    config: str
    services: str
    number: int = 0
    outcome: str = "taken"
    at: str | None = None
    changes: Sequence[str] = ()
    pending: Sequence[str] = ()
    problems: Sequence[Problem] = ()

    def write(self, folder: str) -> None:
        """Put it into a data directory; a disk that is full leaves an older one there."""
        with contextlib.suppress(OSError):
            replace_private_file(_record_path(folder), render_json(self._asdict()).decode())

    @classmethod
    def read(cls, folder: str) -> "ReloadRecord | None":
        """Return the record in a data directory, None without one that can be read."""
        try:
            record = cls(**json.loads(read_text(_record_path(folder))))
            return record._replace(problems=[Problem(*problem) for problem in record.problems])
        except (OSError, ValueError, TypeError):
            return None


def _record_path(folder: str) -> str:
    return os.path.join(folder, "reload.json")


def _own_ticks(pid: int) -> int | None:
    process = read_process(pid)
    return process and process.started_ticks


def ask_for_reload(data_dir: str, deadline_s: float) -> ReloadRecord:
    """Have the server that uses a data directory read its files again; return its record of that. HookshotError says why not."""
    before = _find_server(data_dir)
    try:
        signal_process(before.pid, signal.SIGHUP)
    except OSError as error:
        raise HookshotError("access_denied", f"pid {before.pid} cannot be asked: {error.strerror}; run this as root or as the server's user") from None
    # A reading that begins after this look at the record finds the files as they are now; one that goes on may not.
    while (latest := ReloadRecord.read(data_dir) or before).number <= before.number or latest.outcome == "reading":
        if FolderLock.holder(data_dir) != str(before.pid):
            raise HookshotError("unreachable", f"the server (pid {before.pid}) has ended and did not read its files again")
        if time.monotonic() > deadline_s:
            raise HookshotError("in_use", f"the server (pid {before.pid}) has not told what came of it: it still reads, or the disk of {data_dir} is full; see its log")
        await_change(_record_path(data_dir), read_mark(_record_path(data_dir)), min(deadline_s, time.monotonic() + 1.0))
    return latest


def _find_server(data_dir: str) -> ReloadRecord:
    try:
        holder = FolderLock.holder(data_dir)
    except OSError as error:
        raise HookshotError("access_denied", f"{data_dir} cannot be looked into: {error.strerror}; run this as root or as the server's user") from None
    if holder is None:
        raise HookshotError("unreachable", f"no server uses {data_dir}; if one runs with another storage.data_dir, name that with --data-dir")
    record = ReloadRecord.read(data_dir)
    # What is in the directory is its owner's word, who may not choose whom root signals.
    if not record or str(record.pid) != holder or record.started_ticks != _own_ticks(record.pid) or is_of_another(_record_path(data_dir), record.pid):
        raise HookshotError("in_use", f"pid {holder} uses {data_dir} and takes no reload now: it is a server that starts, an import, or in another "
                                      "container; try again, or there")
    return record


_LISTEN_ADVICE = {
    errno.EADDRINUSE: "end the program that uses it, or choose another with --port or server.listen",
    errno.EADDRNOTAVAIL: "it is no address of this host; choose one with --bind or server.listen",
    errno.EACCES: "ports below 1024 need CAP_NET_BIND_SERVICE, and a socket a folder that this user may write to",
    errno.EEXIST: "remove what is there, or choose another path in server.listen"}


class ServiceManager:
    """Whoever started this process and wants to know how it is: systemd (sd_notify(3)). Nothing here waits or fails. Any thread."""

    _MAX_UNSENT = 8

    def __init__(self, environ: Any):
        """Take what says where to tell it out of `environ`: a command that inherited it would speak in the server's name."""
        address, period_us, pid = (environ.pop(name, "") for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"))
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self.is_there = self._address[:1] in ("/", "\0")
        is_watched = self.is_there and re.fullmatch("[1-9][0-9]{0,15}", period_us, re.ASCII) and pid in ("", str(os.getpid()))
        self.watchdog_s = int(period_us) / 1_000_000 if is_watched else None
        self._lock = threading.Lock()
        self._unsent: collections.deque[bytes] = collections.deque(maxlen=self._MAX_UNSENT)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)

    def tell(self, *lines: str) -> None:
        """Tell of a stage of the server's life; what cannot be sent now is sent first the next time."""
        with self._lock:
            self._unsent.append("\n".join(lines).encode())
            self._send_all()

    def tell_now(self, *lines: str) -> bool:
        """Tell what is of no use later, after what could not be sent before; return whether it was sent."""
        with self._lock:
            self._send_all()
            return bool(lines) and self._send("\n".join(lines).encode())

    def _send_all(self) -> None:
        while self._unsent and self._send(self._unsent[0]):
            self._unsent.popleft()

    def _send(self, content: bytes) -> bool:
        with contextlib.suppress(OSError):
            return self.is_there and self._socket.sendto(content, self._address) > 0
        return False


_DOINGS = {State.VALIDATING: "preparing", State.DEPLOYING: "deploying", State.HEALTH_CHECKING: "checking", State.ROLLING_BACK: "rolling back"}


def describe_work(running: Sequence[Deployment], waiting: int, services: int) -> str:
    """Return in a few words what a server does: "deploying web, step 2 of 5, 1 queued"."""
    queued = f", {waiting} queued" * bool(waiting)
    if not running:
        return f"{waiting} queued" if waiting else f"idle, {services} service{'s' * (services != 1)}"
    if len(running) > 1:
        return f"{len(running)} deployments run{queued}"
    [deployment] = running
    step = f", step {deployment.step} of {deployment.steps_total}" if deployment.step else ""
    return f"{_DOINGS[deployment.state]} {deployment.service}{step}{queued}"


class Daemon:
    """One server: its parts, built together. start(), then stop(); run() does both around the signals."""

    def __init__(self, config_path: str, services_path: str, *, environ: Any, override: Callable[[Config], Config] = lambda config: config,
                 signals: Signals | None = None):
        """Read everything; raise ConfigError with every problem. Nothing is created yet."""
        self._paths, self._override = (config_path, services_path), override
        self._was_empty = self._is_empty(config_path)
        self._surroundings: SecretSurroundings | None = None
        self._environ = environ
        self._manager, self.passed = ServiceManager(environ), take_passed(environ)
        self.warnings: tuple[Problem, ...] = ()
        self._current = self._load()
        self.log = Log()
        self._throttle = RefusalThrottle()
        self.signals = signals or Signals()
        self.waiters, self.metrics = Waiters(), Metrics()
        self._parts = contextlib.ExitStack()
        self._house_stop, self._report_stop = threading.Event(), threading.Event()
        self._house_turned_s, self._told, self._told_s, self._ends_by_s = 0.0, "", float("-inf"), 0.0
        # Held while files and secrets are read: a slow reading must not put back what a later one has replaced.
        self._reload_lock = threading.Lock()
        self._record = ReloadRecord(os.getpid(), _own_ticks(os.getpid()), config_path, services_path)
        # What was last wrong with the secrets when they were read again.
        self._told_problems: tuple[Problem, ...] = ()
        # How the files of [server.tls] were when they were read.
        self._tls_marks = self._mark_tls(self._current.config.server.tls)
        self._is_stopping_now = False
        self.urls: list[str] = []

    def _load(self) -> Current:
        problems: list[Problem] = []
        settings = read_settings(*self._paths, problems)
        if self._surroundings is None:
            self._surroundings = SecretSurroundings.take(self._environ, settings.config.secrets.secret_prefix or "HOOKSHOT_")
        if not has_errors(problems):
            config = self._override(settings.config)
            listen = place_passed(config.server.listen, self.passed, Place(self._paths[0], "server.listen", problems))
            settings = settings._replace(config=config._replace(server=config.server._replace(listen=listen)))
            check_host(settings, *self._paths, self._environ, problems)
            keyring = load_keyring(*settings, self._surroundings, self._paths[0], problems)
            check_channels(settings.config.notifications, keyring.values, Place(self._paths[0], "notifications", problems))
            tls = load_tls(settings.config.server.tls, Place(self._paths[0], "server.tls", problems))
        if has_errors(problems):
            raise ConfigError(problems)
        self.warnings = tuple(problems)
        return Current(settings.config, settings.services, keyring, tls)

    def publish(self, event: Event) -> None:
        """Tell everyone who listens. Listeners neither fail nor wait."""
        self.metrics.observe(event)
        if isinstance(event, Refused):
            # Nobody else listens to refusals, and there may be thousands a second.
            if self._throttle.admit(event.code, event.address, time.monotonic()):
                log_event(self.log, event)
            return
        log_event(self.log, event)
        self.waiters.tell(event)
        self.engine.note(event)
        self.app.feed.note(event)
        self.app.journal.note(event)
        self.notifier.note(event)

    def start(self) -> None:
        """Lock, open, bind, recover, begin. HookshotError says in one sentence why not."""
        config = self._current.config
        os.umask(0o077)
        try:
            make_private_folder(config.storage.data_dir)
            self._parts.callback(FolderLock(config.storage.data_dir).release)
            refuse_half_import(config.storage.data_dir)
            store = Store(config.storage.data_dir)
            self._parts.callback(store.close)
            make_private_folder(store.logs)
            if config.logging.directory:
                make_log_folder(config.logging.directory)
        except OSError as error:
            self._parts.close()
            folder = error.filename or config.storage.data_dir
            raise HookshotError("cannot_write", f"{folder} cannot be used: {error.strerror}; check its owner and mode") from None
        except HookshotError:
            self._parts.close()
            raise
        self._set_up_watching()
        self.engine = Engine(store, lambda: self._current, self.publish, self._environ)
        self.app = App(store, self.engine, lambda: self._current, self.waiters, self.publish, self.metrics, self.log)
        self.notifier = Notifier(store, lambda: (self._current.config.notifications, self._current.keyring.values), self.publish, self._environ)
        self._restore_metrics(store)
        self._server = HttpServer(self.app)
        for address in config.server.listen:
            self._listen(address)
        is_tls = self._current.tls is not None
        self.urls = [listener.listen.url(is_tls=is_tls and listener.is_tcp) for listener in self._server.listeners]
        shown = [url + " (all addresses)" * listener.listen.is_everywhere + " (from systemd)" * (listener.listen.fd >= 0)
                 for url, listener in zip(self.urls, self._server.listeners)]
        self._reader = self._begin("reader", self._server.serve)
        # What recovery ends is told, also where notifications are on for the first time.
        self.notifier.prepare()
        with contextlib.suppress(HookshotError):  # else the housekeeper's first turn does it
            self.engine.withdraw()
        self.engine.recover()
        self.engine.start()
        self._housekeeper = self._begin("housekeeper", self._keep_house)
        self._feeder = self._begin("feed", self.app.feed.run)
        self._sender = self._begin("notifier", self.notifier.run)
        self._recorder = self._begin("journal", self.app.journal.run)
        # What exists now stays for ever: the garbage collector need not look at it again and again.
        gc.freeze()
        self.app.is_ready = True
        self._tell_warnings()
        self._write_record(at=render_time(now_ms()))
        self._parts.callback(self._remove_record)
        self.log.write("debug", "memory", f"this process {read_protection()}")
        self.publish(Noted("started", f"hookshot {__version__} listens on {' and '.join(shown)}, {self._count_services()}"))
        self._house_turned_s = time.monotonic()
        self._manager.tell("READY=1")
        self._reporter = self._begin("reporter", self._keep_reporting) if self._manager.is_there else None

    def _restore_metrics(self, store: Store) -> None:
        """Have the metrics go on from what is stored."""
        self.metrics.restore(store.tallies())
        for record in store.service_records():
            counts = {status: getattr(record, status) for status in COUNT_OF_STATE.values()}
            self.metrics.restore(("deployment_total", (record.name, status), 0, number, number) for status, number in counts.items())
            self.metrics.put("hookshot_service_failing", (record.name,), int(record.health in ("Unhealthy", "Degraded")))
            self.metrics.put("hookshot_service_last_deployment_timestamp_seconds", (record.name,), (record.last_completed_ms or 0) / 1000)
        self.metrics.put("hookshot_config_last_reload_successful", (), 1)
        self.metrics.put("hookshot_config_last_reload_success_timestamp_seconds", (), now_ms() / 1000)

    def _tell_warnings(self) -> None:
        for warning in self.warnings:
            self.log.write("warning", "config_warning", str(warning))

    def _count_services(self) -> str:
        number = len(self._current.services.by_name)
        return f"{number} service{'s' * (number != 1)}"

    def _listen(self, address: ListenAddress) -> None:
        try:
            self._server.listen(address)
        except OSError as error:
            for listener in self._server.listeners:
                listener.server_close()
            self._parts.close()
            advice = _LISTEN_ADVICE.get(error.errno or 0, "choose another with --bind or server.listen")
            raise HookshotError("config", f"cannot listen on {address}: {error.strerror}; {advice}") from None

    def _begin(self, name: str, work: Callable[[], None]) -> threading.Thread:
        thread = threading.Thread(target=work, name=name, daemon=True)
        thread.start()
        return thread

    def stop(self) -> None:
        """Shut down: drain, wait, stop, close. A second signal meanwhile stops what runs at once."""
        self._ends_by_s = time.monotonic() + self._current.config.server.shutdown_timeout + END_S
        self._manager.tell("STOPPING=1")
        if self.passed:
            # Who comes from now on waits in the kernel for the next server; who came before is not refused.
            self._server.stop_accepting(_LEAVE_S)
        self.app.is_ready = False
        self.engine.drain()
        self.publish(Noted("draining", f"shutting down; running deployments get {self._current.config.server.shutdown_timeout} s"))
        deadline = time.monotonic() + self._current.config.server.shutdown_timeout
        while not self.engine.join(0.05) and time.monotonic() < deadline:
            if self.signals.get(0.0) in (signal.SIGTERM, signal.SIGINT):
                self._stop_now()
                break
        if not self.engine.join(0):
            self.engine.stop("shutdown")
            deadline = time.monotonic() + KILL_AFTER_S + 2
            while not self.engine.join(0.05) and time.monotonic() < deadline and not self._is_stopping_now:
                if self.signals.get(0.0) in (signal.SIGTERM, signal.SIGINT):
                    self._stop_now()
        self._house_stop.set()
        self._housekeeper.join(_CLOSE_S)
        self.app.feed.stop()
        self.notifier.stop()
        self._feeder.join(_CLOSE_S)
        # It sends what is due. One that waits for a receiver is left behind: the next start sends it again.
        self._sender.join(_SENDER_PATIENCE_S)
        self.app.is_closing = True
        self.waiters.release()
        self._server.close(_CLOSE_S)
        self._reader.join(_READER_PATIENCE_S)
        self._report_stop.set()
        if self._reporter:
            self._reporter.join(_CLOSE_S)
        # Last: what was refused until now is written too.
        self.app.journal.stop()
        self._recorder.join(_SENDER_PATIENCE_S)
        self._parts.close()
        self.publish(Noted("stopped", "hookshot has stopped"))

    def _stop_now(self) -> None:
        """Kill what runs. A worker that sits in a probe is not waited for: what it finds is of no use any more."""
        self._is_stopping_now = True
        self.engine.stop("now")
        self.engine.join(_CLOSE_S)

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT; SIGHUP reads files and secrets again. Main thread only."""
        self.signals.catch(signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        self.start()
        while self._await_signal() == signal.SIGHUP:
            self.reload()
        self.stop()

    def _await_signal(self) -> int | None:
        """Return the next signal. One SIGHUP stands for all that have come by now: who asks for the end does not wait for each."""
        number = self.signals.get(None)
        while number == signal.SIGHUP and (later := self.signals.get(0.0)):
            number = later
        return number

    def reload(self) -> bool:
        """Read files and secrets again and swap them whole; keep the old ones if anything is wrong with the new."""
        with self._reload_lock:
            self._manager.tell("RELOADING=1", f"MONOTONIC_USEC={int(time.monotonic() * 1_000_000)}")
            try:
                return self._reload()
            except Exception as error:
                self.publish(Broken("reload", error))
                self._mark_stale("configuration")
                self._write_record(outcome="refused", problems=(Problem(self._paths[0], "", "the server made a mistake; its log has more"),))
                return False
            finally:
                self._manager.tell("READY=1")

    def _reload(self) -> bool:
        self._write_record(number=self._record.number + 1, outcome="reading", at=render_time(now_ms()), changes=(), pending=(), problems=())
        try:
            loaded = self._read_in_peace([*self._paths, *self._secrets_files(), *filter(None, self._current.config.server.tls)], self._load_again)
        except ConfigError as error:
            for problem in error.problems:
                self.log.write("error", "reload_problem", str(problem))
            self._mark_stale("configuration")
            self.publish(Reloaded(False, "the new configuration is not taken; the old one stays in force", now_ms()))
            self._write_record(outcome="refused", problems=error.problems)
            return False
        in_force = self._keep_what_needs_a_restart(loaded)
        pending = describe_changes(*(flatten_settings(each.config, Services({})) for each in (in_force, loaded)))
        if pending:
            self.publish(Trouble("restart_needed", f"these changes need a restart and are not in force yet: {'; '.join(pending)}"))
        if in_force.config.logging.directory:
            # What cannot be made is told by the log, which goes on without the file.
            with contextlib.suppress(OSError):
                make_log_folder(in_force.config.logging.directory)
        changes = self._describe_changes(self._current, in_force)
        self._take(in_force)
        self._mark_fresh("configuration", "secrets")
        self._tell_warnings()
        for line in changes:
            self.publish(Noted("config_changed", line))
        self.publish(Reloaded(True, f"configuration, secrets and certificates are read again, {self._count_services()}; "
                                    f"{'what has changed is in force' if changes else 'nothing has changed'}", now_ms()))
        # Last: who has waited for it finds the log and the metrics as it says.
        self._write_record(outcome="taken", changes=changes, pending=pending, problems=self.warnings)
        return True

    def _keep_what_needs_a_restart(self, loaded: Current) -> Current:
        """Return what was loaded, with what only a start can change as it is."""
        before, after = self._current.config, loaded.config
        # New certificates are taken at once. Whether there is TLS at all is not: an address must not turn plain unnoticed.
        has_same_kind = (loaded.tls is not None) == (self._current.tls is not None)
        return loaded._replace(tls=loaded.tls if has_same_kind else self._current.tls, config=after._replace(
            server=before.server._replace(tls=after.server.tls) if has_same_kind else before.server,
            storage=after.storage._replace(data_dir=before.storage.data_dir),
            secrets=after.secrets._replace(secret_prefix=before.secrets.secret_prefix)))

    def _load_again(self) -> Current:
        """Load what is in the files now; ConfigError also for a file that has lost its content: a cut is likelier than that somebody meant it."""
        config_path, services_path = self._paths
        is_empty = self._is_empty(config_path)
        if is_empty and not self._was_empty:
            raise ConfigError([Problem(config_path, "", "is empty; if the defaults alone are meant, restart the server")])
        loaded = self._load()
        if self._current.services.by_name and not loaded.services.by_name:
            raise ConfigError([Problem(services_path, "service", "there is no service any more; if the last one is meant to go, restart the server")])
        self._was_empty = is_empty
        return loaded

    @staticmethod
    def _is_empty(path: str) -> bool:
        mark = read_mark(path)
        return mark is not None and not mark.size

    def _read_in_peace(self, paths: Sequence[str], read: Callable[[], Any]) -> Any:
        """Return what `read` returns or raises, once nobody writes to the files meanwhile; ConfigError if somebody goes on doing so."""
        # Opening a pipe would wait for somebody to write.
        if odd := [Problem(path, "", "is not a regular file") for path in paths if os.path.exists(path) and not os.path.isfile(path)]:
            raise ConfigError(odd)
        for _ in range(_QUIET_TRIES):
            marks = self._await_quiet(paths)
            try:
                found, error = read(), None
            except ConfigError as failed:
                found, error = None, failed
            changed = [path for path, mark in zip(paths, marks) if read_mark(path) != mark]
            if not changed and error:
                raise error
            if not changed:
                return found
        raise ConfigError([Problem(changed[0], "", "is written to whenever it is read; reload again when it is complete")])

    def _await_quiet(self, paths: Sequence[str]) -> list[FileMark | None]:
        """Return the marks of files, of which none was written to just now."""
        deadline = time.monotonic() + _QUIET_PATIENCE_S
        while True:
            marks = [*map(read_mark, paths)]
            ages = [(now_ms() / 1000 - mark.changed_ns / 1e9, path) for path, mark in zip(paths, marks) if mark]
            # A time to come is that of a clock that was put back since.
            age_s, path = min((age for age in ages if age[0] >= 0), default=(_QUIET_S, ""))
            if age_s >= _QUIET_S:
                return marks
            if time.monotonic() > deadline:
                raise ConfigError([Problem(path, "", "is being written to all the time; reload again when it is complete")])
            self._house_stop.wait(_QUIET_S - age_s)

    def _describe_changes(self, before: Current, after: Current) -> list[str]:
        """Return a line for each change, but for the last of very many."""
        marks = self._mark_tls(after.config.server.tls)
        lines = [*describe_changes(*(flatten_settings(each.config, each.services) for each in (before, after))),
                 *describe_secrets(before.keyring.values, after.keyring.values),
                 *(f"server.tls.{name}: another file" for name in marks if marks[name] != self._tls_marks[name])]
        self._tls_marks = marks
        more = len(lines) - _MAX_CHANGES_TOLD
        return lines if more <= 0 else [*lines[:_MAX_CHANGES_TOLD], f"and {more} changes more"]

    @staticmethod
    def _mark_tls(files: Tls) -> dict[str, FileMark | None]:
        return {name: read_mark(path) if path else None for name, path in files._asdict().items()}

    def _mark_stale(self, part: str) -> None:
        """Have everybody know that what is in force is older than its files."""
        self.app.stale = {part: now_ms()} | self.app.stale

    def _mark_fresh(self, *parts: str) -> None:
        self._told_problems = ()
        self.app.stale = {part: since_ms for part, since_ms in self.app.stale.items() if part not in parts}

    def _write_record(self, **changes: Any) -> None:
        self._record = self._record._replace(**changes)
        self._record.write(self._current.config.storage.data_dir)

    def _remove_record(self) -> None:
        with contextlib.suppress(OSError):
            os.unlink(_record_path(self._current.config.storage.data_dir))

    def _take(self, loaded: Current) -> None:
        self._current = loaded
        self._set_up_watching()
        with contextlib.suppress(HookshotError):  # else the housekeeper's next turn does it
            self.engine.withdraw()
        self.engine.wake(everyone=True)
        self.notifier.wake()
        # Those who may not read any more find out by looking.
        self.app.feed.on_news()

    def _set_up_watching(self) -> None:
        """Have the log and the metrics follow what is in force."""
        config, services = self._current.config, self._current.services.by_name
        logging, rotation = config.logging, config.logging.rotation
        files = LogFiles(logging.directory, rotation.max_size, rotation.max_files) if logging.directory else None
        self.log.set_up(logging.level, logging.format, self._current.keyring.masker, files)
        channels = channels_of(self._current.config.notifications, self._current.keyring.values)
        self.metrics.expect(services, [channel.name for channel in channels])

    def _reload_secrets(self) -> None:
        current = self._current
        try:
            keyring = self._read_in_peace(self._secrets_files(), self._load_secrets)
        except ConfigError as error:
            # Once, not at every interval.
            for problem in error.problems if error.problems != self._told_problems else ():
                self.log.write("error", "secrets_failed", f"{problem}; the old secrets stay in force")
            self._told_problems = error.problems
            self._mark_stale("secrets")
            return
        changes = describe_secrets(current.keyring.values, keyring.values)
        if changes:
            self._take(current._replace(keyring=keyring))
            self.publish(Noted("secrets_reloaded", f"secrets have changed and are in force: {', '.join(changes)}"))
        elif "secrets" in self.app.stale:
            self.publish(Noted("secrets_reloaded", "secrets can be read again, and have not changed"))
        self._mark_fresh("secrets")

    def _secrets_files(self) -> list[str]:
        """Return the secrets file, if secrets are taken from it."""
        config = self._current.config.secrets
        return [config.secrets_file] if "file" in sources_of(config) else []

    def _load_secrets(self) -> Keyring:
        problems: list[Problem] = []
        assert self._surroundings
        keyring = load_keyring(self._current.config, self._current.services, self._surroundings, self._paths[0], problems)
        check_channels(self._current.config.notifications, keyring.values, Place(self._paths[0], "notifications", problems))
        if has_errors(problems):
            raise ConfigError([problem for problem in problems if not problem.is_warning])
        return keyring

    def _keep_house(self) -> None:
        secrets_at = time.monotonic()
        return_memory()
        while not self._house_stop.wait(_HOUSE_TURN_S):
            self._house_turned_s = time.monotonic()
            try:
                # First: a disk that keeps the house from being kept must not keep the log quiet too.
                for code, address, number in self._throttle.take(time.monotonic()):
                    self.log.write("warning", "requests_refused", f"{number} more requests were refused in a minute", address=address, code=code)
                self.engine.keep_house()
                interval = self._current.config.secrets.reload_interval
                if interval and time.monotonic() - secrets_at >= interval:
                    secrets_at = time.monotonic()
                    with self._reload_lock:
                        self._reload_secrets()
            except (HookshotError, OSError) as error:
                self.publish(Trouble("housekeeping_failed", f"keeping house failed and will be tried again: {error}"))
            except Exception as error:
                self.publish(Broken("housekeeper", error))

    # --- what the service manager is told

    def _keep_reporting(self) -> None:
        pause_s = min(_REPORT_TURN_S, (self._manager.watchdog_s or _REPORT_TURN_S) / 3)
        while True:
            try:
                self.report(time.monotonic())
            except Exception as error:
                self.publish(Broken("reporter", error))
            if self._report_stop.wait(pause_s):
                return

    def report(self, now_s: float) -> None:
        """Tell the service manager what goes on, if that has changed; that all is well, only if it is; and how long an end may take yet."""
        lines = []
        try:
            # The database's proof. If it hangs, this thread hangs here, and the watchdog hears nothing.
            status = self._describe()
            if stuck := "" if self._ends_by_s else self._find_stuck(now_s):
                status = f"stuck: {stuck}"
        except HookshotError as error:
            status = stuck = f"the database does not answer: {error.sentence}"
        if self._manager.watchdog_s and not self._ends_by_s and not stuck:
            lines.append("WATCHDOG=1")
        if now_s < self._ends_by_s:
            lines.append(f"EXTEND_TIMEOUT_USEC={_EXTENSION_S * 1_000_000}")
        is_news = status != self._told and now_s - self._told_s >= _REPORT_TURN_S
        if is_news:
            lines.append(f"STATUS={status}")
        if stuck and is_news:
            self.publish(Trouble("stuck", f"{status}; the service manager is not told that all is well, and its watchdog will end this server"))
        if self._manager.tell_now(*lines) and is_news:
            self._told, self._told_s = status, now_s

    def _describe(self) -> str:
        counts = self.app.store.queue_counts()
        active, waiting = (sum(count[kind] for count in counts.values()) for kind in ("active", "queued"))
        words = describe_work(self.app.store.unfinished() if active else (), waiting, len(self._current.services.by_name))
        return f"shutting down; {words}" if self._ends_by_s else words

    def _find_stuck(self, now_s: float) -> str:
        """Return the names of threads that have ended or do not turn any more; empty if there are none."""
        turned = {self._reader: (self._server.turned_s, _READER_STUCK_S), self._housekeeper: (self._house_turned_s, _HOUSE_STUCK_S)}
        stuck = [thread.name for thread, (turned_s, limit_s) in turned.items() if not thread.is_alive() or now_s - turned_s > limit_s]
        return ", ".join(stuck + ["workers"] * (self.engine.alive_workers() < self._current.config.server.worker_threads))


# === 22. CLIENT =======================================================================================================
# Speaks to a Hookshot server: signs, sends, reads. Behind `deploy`, `status`, `history`, `logs`, `services`, `watch`.
#
# 1. What a server answers is data from outside: control characters are made visible before a terminal sees them.
# 2. A deploy carries an id of ours, so that sending it again after a broken connection can never run it twice.

_CONNECT_TIMEOUT_S = 10.0
_READ_TIMEOUT_S = 60.0
# What is read of a document, a line or an event: whoever answers may not be a Hookshot server.
_MAX_ANSWER_BYTES = 32 << 20
# How long a follower keeps trying to reach a server that has gone: a restart takes seconds.
_RECONNECT_S = 60.0
_POLL_WAIT_S = 20
_RECONNECT_PAUSE_S = 1.0
# "Try again in a minute" may be over sooner, and asking costs nothing.
_MAX_PAUSE_S = 10.0


class Reply(NamedTuple):
    """A server's answer: its status and its JSON document."""

    status: int
    document: Any


class Trust(NamedTuple):
    """Files (PEM) by which a client and a TLS server know each other; `is_pinned`: `ca` is the server's own certificate."""

    ca: str | None = None
    cert: str | None = None
    cert_key: str | None = None
    is_pinned: bool = False

    def context(self) -> Any:
        """Return the ssl.SSLContext; raise `config` if a file cannot be used."""
        if not ssl:
            raise HookshotError("config", "https:// needs Python's ssl module, which this Python lacks")
        try:
            file = self.ca
            context = pin_certificate(self.ca) if self.is_pinned and self.ca else ssl.create_default_context(cafile=self.ca)
            if self.cert:
                for file in (self.cert, self.cert_key or self.cert):
                    read_text(file)
                if problem := load_chain(context, self.cert, self.cert_key or self.cert):
                    raise HookshotError("config", problem[1] + ("; name the key with --cert-key" if problem[0] == "key" and not self.cert_key else ""))
        except (ssl.SSLError, ValueError):
            raise HookshotError("config", f"{file} holds no certificates in PEM") from None
        except OSError as error:
            raise HookshotError("config", f"{file} cannot be read: {error.strerror}") from None
        return context


def url_of(server: Server) -> str:
    """Return the URL of a server on this host: a TCP address if it has one at which no client certificate is asked for."""
    addresses = [address for address in server.listen if not address.is_awaited]
    if not addresses:
        raise HookshotError("usage", "server.listen names only sockets of systemd; say where the server is with --url or HOOKSHOT_URL")
    address = next((address for address in addresses if bool(address.path) == bool(server.tls.client_ca)), addresses[0])
    return address.url(is_tls=bool(server.tls.cert) and not address.path)


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: str, timeout_s: float):
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        """Connect to the socket's path."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class Client:
    """One server as its URL names it, with the key and the token there are. One thread."""

    def __init__(self, url: str, key: bytes | None, token: str | None, trust: Trust = Trust(), problems: Sequence[Problem] = ()):
        # The problems: why there is no key, if so.
        self.url, self._key, self._token, self._trust, self._problems = url, key, token, trust, problems
        self._socket_path = url.removeprefix("unix:") if url.startswith("unix:/") else ""
        self._parts = urllib.parse.urlsplit("http://localhost" if self._socket_path else url if "//" in url else f"http://{url}")
        try:
            self._port = self._parts.port
            is_right = self._parts.scheme in ("http", "https") and self._parts.hostname and not self._parts.username
        except ValueError:  # a port that is no number
            is_right = False
        if not is_right:
            raise HookshotError("usage", f"{clip(escape_controls(url), 200)} is not a server's URL; write http://host:port, https://host or unix:/path")

    def signing_key(self) -> bytes:
        """Return the key; raise `authentication` if there is none."""
        if self._key is None:
            why = f" ({self._problems[0].file}: {self._problems[0].message.partition(';')[0]})" if self._problems else ""
            raise HookshotError("authentication", f"there is no key to sign with{why}; set HOOKSHOT_HMAC_KEY, name a file with --key-file, "
                                                  "or run this on the server's host as its user")
        return self._key

    def get(self, path: str) -> Any:
        """Return the document of a read; raise the server's error as ours."""
        with self._open("GET", path, b"", {}) as response:
            return self._document(response).document

    def ready(self) -> Any:
        """Return what the server says of whether it takes deploys, also while it does not."""
        document = self.get("/ready")
        if not isinstance(document.get("message"), str):
            raise HookshotError("unreachable", f"{self.url} answers, but not as a Hookshot server does")
        return document

    def post(self, body: bytes, *, path: str = "/deploy", message_id: str | None = None, wait_s: int | None = None) -> Reply:
        """Send a signed request, a deploy if no path is given. Outcomes of a deployment are replies; refusals are raised.

        A message id of the caller's makes sending again the same message: nothing is done twice.
        """
        key = self.signing_key()
        # A fresh time for each sending. Without an id: the server tells a repeated deployment by the deploy_id in the body.
        headers = {"Content-Type": "application/json", **sign_webhook(key, body, message_id or new_message_id(), now_ms() // 1000)}
        path += "" if wait_s is None else f"?wait={wait_s}"
        with self._open("POST", path, body, headers) as response:
            return self._document(response, names_request=True)

    def follow(self, deploy_id: str, last_event_id: str, timeout_s: float) -> Iterator[tuple[str, str, str]]:
        """Yield (event, id, data) of a deployment's log until its "end" event; event "" when nothing but time goes by."""
        yield from self._events(f"/logs/{deploy_id}", last_event_id, timeout_s)

    def follow_moves(self, last_event_id: str) -> Iterator[tuple[str, str, str]]:
        """Yield (event, id, data) of every move from one on, or from now on; event "" when nothing but time goes by."""
        yield from self._events("/events", last_event_id, _READ_TIMEOUT_S)

    def _events(self, path: str, last_event_id: str, timeout_s: float) -> Iterator[tuple[str, str, str]]:
        headers = {"Accept": "text/event-stream", "Last-Event-ID": last_event_id}
        with self._open("GET", path, b"", headers, min(_READ_TIMEOUT_S, timeout_s)) as response:
            if response.status != 200:
                self._document(response)
            event, event_id, found, size = "message", "", [], 0
            for line in self._lines(response):
                name, _, value = line.partition(": ")
                if name == "data":
                    found.append(value)
                    size += len(value)
                    if size > _MAX_ANSWER_BYTES:
                        raise HookshotError("unreachable", f"{self.url} sends an event without an end; is this a Hookshot server?")
                elif name == "id":
                    event_id = value
                elif name == "event":
                    event = value
                elif line.startswith(":") or (not line and not found):
                    yield "", event_id, ""
                elif not line:
                    yield event, event_id, "\n".join(found)
                    event, found, size = "message", [], 0

    def read_log(self, deploy_id: str, tail: int | None) -> Iterator[str]:
        """Yield the lines of a log as it is now."""
        with self._open("GET", f"/logs/{deploy_id}" + ("" if tail is None else f"?tail={tail}"), b"", {}) as response:
            if response.status != 200:
                self._document(response)
            yield from self._lines(response)

    def _lines(self, response: http.client.HTTPResponse) -> Iterator[str]:
        try:
            while line := response.readline(_MAX_ANSWER_BYTES):
                if len(line) >= _MAX_ANSWER_BYTES:
                    raise HookshotError("unreachable", f"{self.url} sends a line without an end; is this a Hookshot server?")
                yield line.decode("utf-8", "replace").rstrip("\n")
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(error) from None

    @contextlib.contextmanager
    def _open(self, method: str, path: str, body: bytes, headers: Mapping[str, str],
              timeout_s: float = _READ_TIMEOUT_S) -> Iterator[http.client.HTTPResponse]:
        link = self._make_link()
        authorization = {"Authorization": f"Bearer {self._token}"} if self._token and method == "GET" else {}
        is_connected = False
        try:
            link.connect()
            is_connected = True
            link.sock.settimeout(timeout_s)
            link.request(method, self._parts.path.rstrip("/") + path, body or None,
                         {"User-Agent": f"hookshot/{__version__}", "Accept": "application/json", **authorization, **headers})
            response = link.getresponse()
        except UnicodeError:  # a host or a path that no URL can have; a token that no header can
            raise HookshotError("usage", f"{clip(escape_controls(self.url), 200)} or the token cannot be sent: they must be plain ASCII") from None
        except (OSError, http.client.HTTPException) as error:
            link.close()
            if is_connected and method == "POST" and isinstance(error, TimeoutError):
                # As behind a socket unit whose service does not start: what waits there is read by the next server.
                raise HookshotError("unreachable", f"{self.url} has not answered within {timeout_s:g} s; what it was asked may be carried out yet; "
                                    "does the server run, or is it still ending deployments?") from None
            raise self._unreachable(error) from None
        with contextlib.closing(link), contextlib.closing(response):
            yield response

    def _make_link(self) -> http.client.HTTPConnection:
        if self._socket_path:
            return _UnixConnection(self._socket_path, _CONNECT_TIMEOUT_S)
        host, port = self._parts.hostname or "", self._port
        if self._parts.scheme == "https":
            return http.client.HTTPSConnection(host, port, timeout=_CONNECT_TIMEOUT_S, context=self._trust.context())
        return http.client.HTTPConnection(host, port, timeout=_CONNECT_TIMEOUT_S)

    def _unreachable(self, error: BaseException) -> HookshotError:
        reason = getattr(error, "reason", None)
        if why := getattr(error, "verify_message", None):
            advice = VERIFY_ADVICE.get(getattr(error, "verify_code", 0)) or (
                "it shows another one than config.toml names; send it SIGHUP" if self._trust.is_pinned else "name its authority with --ca")
            return HookshotError("unreachable", f"the certificate of {self.url} is not trusted: {why.rstrip('.')}; {advice}")
        if isinstance(reason, str) and "ALERT" in reason:
            given = f"does not accept the client certificate {self._trust.cert}" if self._trust.cert else \
                "may want a client certificate; name yours with --cert and --cert-key"
            return HookshotError("access_denied", f"{self.url} refused the TLS handshake ({words_of(reason)}) and {given}")
        if isinstance(reason, str) and "EOF" not in reason:
            return HookshotError("unreachable", f"{self.url} does not speak TLS ({words_of(reason)}); if it speaks plain HTTP, use http://")
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if isinstance(error, PermissionError):
            return HookshotError("unreachable", f"{self.url} may not be used by this user: {why}; server.socket_mode and the folder say who may")
        return HookshotError("unreachable", f"{self.url} cannot be reached: {why}; is the server running, and is the URL right?")

    def _document(self, response: http.client.HTTPResponse, *, names_request: bool = False) -> Reply:
        try:
            document = json.loads(response.read(_MAX_ANSWER_BYTES) or b"null")
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(error) from None
        except ValueError:
            advice = "a proxy answers, and the server behind it does not" if response.status in (502, 503, 504) else "is this a Hookshot server?"
            raise HookshotError("unreachable", f"{self.url} answered {response.status} without JSON; {advice}") from None
        # The ending of a deployment may be a 500 too.
        if not isinstance(document, dict) or (response.status >= 400 and not {"code", "deploy_id", "ready"} & document.keys()):
            what = "without JSON" if document is None else "with JSON of its own"
            raise HookshotError("unreachable", f"{self.url} answered {response.status} {what}; is this a Hookshot server?")
        if "code" in document and "error" in document and response.status >= 400:
            name, pause = KIND_OF_CODE.get(str(document["code"]), "internal"), response.getheader("Retry-After", "")
            request = f" (request {document['request_id']})" if names_request and "request_id" in document else ""
            raise HookshotError(name, f"{self.url} refused: {escape_controls(str(document['error']) + request)}",
                                retry_after_s=int(pause) if re.fullmatch(r"\d{1,5}", pause, re.ASCII) else None)
        return Reply(response.status, document)


def _parse_move(event_id: str, data: str) -> Mapping[str, Any]:
    """Return a move as GET /events tells it; ValueError for what is none."""
    try:
        move = json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(move, dict) or not move.keys() >= {"at", "service", "image", "deploy_id", "status"}:
        raise ValueError("it is no move")
    return {**move, "id": int(event_id)}


class MoveStream:
    """Reads GET /events in a thread of its own, for as long as the program lives; a server that is gone is waited for."""

    def __init__(self, client: Client):
        self._client = client
        self.queue: queue.SimpleQueue[Mapping[str, Any] | HookshotError | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="moves", daemon=True).start()

    def get(self, timeout_s: float | None) -> Mapping[str, Any] | HookshotError | None:
        """Return the next move, why there is none, or None after `timeout_s` or when the server is reached again."""
        try:
            return self.queue.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def _read(self) -> None:
        last_id = ""
        while True:
            try:
                for event, event_id, data in self._client.follow_moves(last_id):
                    last_id = event_id or last_id
                    self.queue.put(_parse_move(event_id, data) if event == "deployment" else None)
            except HookshotError as error:
                self.queue.put(error)
            except ValueError:
                self.queue.put(HookshotError("unreachable", f"{self._client.url} sends events that cannot be read; is this a Hookshot server?"))
            time.sleep(_RECONNECT_PAUSE_S)


class ProgressLine:
    """The last line of a terminal: phase, step and time of what goes on. Nothing where stderr is no terminal."""

    def __init__(self, service: str):
        self._service, self._text = service, "waiting"
        self._started = time.monotonic()
        self._is_shown = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._lock, self._done = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._redraw, name="progress", daemon=True)

    def __enter__(self) -> "ProgressLine":
        if self._is_shown:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        if self._is_shown:
            self._thread.join()
            self._write("\r\x1b[K")

    def print(self, line: str) -> None:
        """Print a line of the log above the progress line."""
        match = re.match(r"\S+ (\w+) -- (step \d+ of \d+.*|probe \d+ of \d+.*|rolling back.*)", line)
        with self._lock:
            if match:
                self._text = f"{match[1]}: {match[2]}"
            if self._is_shown:
                self._write("\r\x1b[K")
            print(escape_controls(line), flush=True)

    def _redraw(self) -> None:
        while not self._done.is_set():
            with self._lock:
                width = shutil.get_terminal_size().columns - 1
                elapsed = render_duration(int(time.monotonic() - self._started) * 1000)
                self._write("\r\x1b[K" + clip(f"{self._service}  {escape_controls(self._text)}  {elapsed}", max(20, width)))
            self._done.wait(0.5)

    @staticmethod
    def _write(text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()


class _Contact:
    """Since when a server cannot be reached, and so whether it makes sense to try again."""

    def __init__(self) -> None:
        self._lost_at: float | None = None

    def note(self) -> None:
        """The server has answered."""
        self._lost_at = None

    def wait(self, error: HookshotError, deadline: float) -> None:
        """Sleep until another try makes sense; raise the error if none does."""
        now, pause_s = time.monotonic(), 1.0
        if error.name != "unreachable" and error.kind.exit != ERRORS["busy"].exit:
            raise error
        if error.name != "unreachable":
            # "Try again later" is an answer too: a server that drains gives it for as long as its deployments run.
            self.note()
            pause_s = min(error.retry_after_s or pause_s, _MAX_PAUSE_S)
        elif self._lost_at is None and now < deadline:
            self._lost_at = now
            print(f"{error.sentence.partition(';')[0]}; trying again for {_RECONNECT_S:.0f} s", file=sys.stderr, flush=True)
        elif self._lost_at is not None and now - self._lost_at > _RECONNECT_S:
            raise error
        time.sleep(max(0.0, min(pause_s, deadline - now)))


# Sends a signed request again, and waits so many seconds for the end of what it is about.
Ask = Callable[[int], Reply]


def follow_deployment(client: Client, deploy_id: str, ask: Ask | None, line: ProgressLine, deadline: float) -> str | None:
    """Show the log until the deployment ends; return its status, or None when the deadline came first.

    Survives a restart of the server. Where reading is not allowed, asks with the signed request itself.
    """
    last_id, contact = "", _Contact()
    while (left_s := deadline - time.monotonic()) > 0:
        try:
            for event, event_id, data in client.follow(deploy_id, last_id, left_s):
                contact.note()
                if event == "end":
                    status = str(json.loads(data).get("status"))
                    if status in TERMINAL:
                        return status
                    break
                if event:
                    last_id = event_id
                    for text in data.split("\n"):
                        line.print(text)
                if time.monotonic() >= deadline:
                    return None
            time.sleep(max(0.0, min(1.0, deadline - time.monotonic())))
        except HookshotError as error:
            if error.name == "authentication" and ask is not None:
                print("the log cannot be read from here (that needs the server's read token, in HOOKSHOT_READ_TOKEN); waiting for the outcome", file=sys.stderr)
                outcome = wait_for_outcome(ask, deadline)
                return outcome and str(outcome["status"])
            contact.wait(error, deadline)
    return None


def wait_for_outcome(ask: Ask, deadline: float) -> Mapping[str, Any] | None:
    """Return what the server says of the ended deployment of a request, or None when the deadline came first."""
    contact = _Contact()
    while (left_s := deadline - time.monotonic()) > 0:
        asked = time.monotonic()
        try:
            document = ask(max(1, min(_POLL_WAIT_S, int(left_s)))).document
            contact.note()
            if document.get("status") in TERMINAL:
                return document
            # An answer that comes too soon is answered by patience.
            time.sleep(max(0.0, min(asked + 1.0, deadline) - time.monotonic()))
        except HookshotError as error:
            contact.wait(error, deadline)
    return None


# === 23. DOCTOR =======================================================================================================
# Looks at a host as it is and says what is well, what is doubtful and what is wrong, with what to do.
#
# 1. It changes nothing and needs nothing stopped. A key of config.toml that is wrong counts as its default; a service
#    that is wrong is left out.
# 2. Each check has a deadline: a file system or a server that hangs costs one line, not the answer.
# 3. A line is true of this host as the user who asks sees it, and never holds a secret. Where root asks, the server's
#    user does: then modes and owners are judged as the server will meet them.

# Long for anything that works, short for who waits.
_CHECK_PATIENCE_S = 5.0
# A command that brings them may take 30.
_SECRETS_PATIENCE_S = 40.0
_DATABASE_PATIENCE_S = 20.0
# Over a network locks and the shared memory of the write-ahead log do not work as SQLite needs them (sqlite.org/wal.html).
_NETWORK_FILE_SYSTEMS = re.compile(r"nfs\d?|cifs|smb\w*|9p|ceph|afs|lustre|gfs2?|ocfs2|glusterfs|fuse\.(?:sshfs|glusterfs|s3fs|rclone)", re.ASCII)
_FLEETING_FILE_SYSTEMS = ("tmpfs", "ramfs")
# Ten times what makes the server refuse deploys.
_LOW_DISK_BYTES = 10 * DISK_RESERVE_BYTES
_LOW_INODES = 1000
# Renewals are mostly tried 30 days ahead: then something is wrong with them.
_EXPIRY_WARNING_DAYS = 14
# A log that is never folded into the database: somebody keeps an old state open.
_LARGE_WAL_BYTES = 256 << 20
_UNIT = "hookshot.service"


class Finding(NamedTuple):
    """One line of the answer: "ok", "warn" or "fail", which check, what it found, and what to do."""

    status: str
    check: str
    message: str
    advice: str = ""


class Host(NamedTuple):
    """What is known before the checks: both files as far as they are right, secrets, and the server that uses the data directory."""

    config: Config
    services: Services
    keyring: Keyring
    # By the check that tells them.
    problems: Mapping[str, Sequence[Problem]]
    environ: Mapping[str, str]
    # The pid of the server, and whom it runs as, or would: who owns the data directory, or else whom the unit names.
    server: int | None
    account: Account | None
    # By port, where no server runs.
    listeners: Mapping[int, str]


Remark = tuple[str, str, str]


class _Reading:
    """Reads step by step, each with its deadline: what cannot be had is a problem of the check that tells it, and a stand-in."""

    def __init__(self, path: str):
        self._path = path
        self.problems: dict[str, list[Problem]] = {}

    def take(self, check: str, work: Callable[[list[Problem]], Any], otherwise: Any, patience_s: float = _CHECK_PATIENCE_S) -> Any:
        """Return what `work` gives, which adds to the problems, or `otherwise`."""
        problems: list[Problem] = []
        found = _within(patience_s, lambda: iter([work(problems)]))
        if not isinstance(found, list):
            problems = [Problem(self._path, "", f"what it names cannot be looked at: {found}")]
        self.problems[check] = self.problems.get(check, []) + problems
        return found[0] if isinstance(found, list) else otherwise


def _read_host(config_path: str, services_path: str, environ: Any, seen_by_root: tuple[Mapping[str, str], Mapping[int, str]] | None = None) -> Host:
    """Read all that the configuration names, as the server's user if root asks; what is wrong is among the problems.

    `seen_by_root`: of the server's environment, and of who listens at its ports.
    """
    reading, defaults = _Reading(config_path), load_config("", config_path, [], default_places(config_path))
    settings = reading.take("files", functools.partial(read_settings, config_path, services_path), Settings(defaults, Services({})))
    config = _mend(settings.config, defaults)
    server, account, awaited = reading.take("host", lambda problems: look_for_server(config.storage.data_dir, environ), (None, None, frozenset[str]()))
    if seen_by_root is None:
        there = {os.fsdecode(name): os.fsdecode(value) for name, value in read_environment(server).items()} if server else {}
        ports = {address.port for address in config.server.listen if address.port} if not server else ()
        seen_by_root = there, {port: found for port in ports if (found := find_listener(port))}
        if account and become(account):
            return _read_host(config_path, services_path, environ, seen_by_root)
    there, listeners = seen_by_root
    wrong = {problem.path.partition(".")[0] for problem in reading.problems["files"] if not problem.is_warning}
    services = Services({name: service for name, service in settings.services.by_name.items() if f'service "{name}"' not in wrong})
    surroundings = SecretSurroundings.take(environ, config.secrets.secret_prefix)
    surroundings = surroundings._replace(credentials=surroundings.credentials or there.get("CREDENTIALS_DIRECTORY"))
    seen = {**environ, "PATH": there.get("PATH") or environ.get("PATH", DEFAULT_PATH)}
    reading.take("host", functools.partial(check_host, Settings(config, services), config_path, services_path, seen), None)
    reading.problems["host"] = [problem for problem in reading.problems["host"] if problem.path not in awaited]
    keyring = reading.take("secrets", functools.partial(load_keyring, config, services, surroundings, config_path), Keyring({}, Masker([])), _SECRETS_PATIENCE_S)
    reading.take("secrets", lambda problems: check_channels(config.notifications, keyring.values, Place(config_path, "notifications", problems)), None)
    reading.take("tls", lambda problems: load_tls(config.server.tls, Place(config_path, "server.tls", problems)), None)
    return Host(config, services, keyring, reading.problems, seen, server, account, listeners)


def _mend(table: Any, defaults: Any) -> Any:
    """Return a table of the configuration with defaults for what is wrong in it."""
    if hasattr(defaults, "_fields"):
        return table._replace(**{name: _mend(getattr(table, name), getattr(defaults, name)) for name in defaults._fields})
    if isinstance(table, tuple) and None in table:
        return tuple(entry for entry in table if entry is not None) or defaults
    return defaults if table is None else table


# Directives by which systemd makes a folder when it starts the unit, and the keys that name such folders.
_FOLDERS_OF_UNIT = {"StateDirectory": "storage.data_dir", "LogsDirectory": "logging.directory"}


def look_for_server(data_dir: str, environ: Mapping[str, str]) -> tuple[int | None, Account | None, frozenset[str]]:
    """Return the pid of who uses a data directory, whom the server runs as, or would, and the keys whose folders systemd is still to make."""
    pid = None
    with contextlib.suppress(OSError):
        holder = FolderLock.holder(data_dir)
        pid = int(holder) if holder and holder.isdecimal() else None
    if account := (owner_of(f"/proc/{pid}") if pid else None) or owner_of(data_dir):
        return pid, account, frozenset()
    unit = _ask_systemd(_UNIT, environ) or {}
    with contextlib.suppress(ValueError):  # told by "unit"
        account = find_account(unit.get("User") or None, None)
    return pid, account, frozenset(key for directive, key in _FOLDERS_OF_UNIT.items() if account and unit.get(directive))


def examine(config_path: str, services_path: str, environ: Any) -> Iterator[Finding]:
    """Yield what each of CHECKS finds, as it is found."""
    host = _read_host(config_path, services_path, environ)
    for name, check in CHECKS.items():
        found = _within(check.patience_s, functools.partial(check.run, host))
        if isinstance(found, str):
            why, _, advice = found.partition("; ")
            found = [("fail", f"cannot be looked at: {why}", advice)]
        yield from (Finding(status, name, message, advice) for status, message, advice in found)


def _within(patience_s: float, work: Callable[[], Iterator[Any]]) -> list[Any] | str:
    """Return what `work` yields, or why it cannot be had in time. A thread that hangs is left behind: nothing else can be done with it."""
    found: list[Any] = []
    why = [f"it takes more than {patience_s:g} s; see what hangs there"]

    def run() -> None:
        try:
            found.extend(work())
            why.clear()
        except HookshotError as error:
            why[0] = error.sentence
        except Exception as error:
            why[0] = f"{type(error).__name__}: {error}"

    thread = threading.Thread(target=run, name="doctor", daemon=True)
    thread.start()
    thread.join(patience_s)
    return found if not why else why[0]


def _tell(problems: Iterable[Problem], well: str) -> Iterator[Remark]:
    """Yield the problems of validate(), or that there are none."""
    for problem in problems or ():
        message, _, advice = str(problem).partition("; ")
        yield "warn" if problem.is_warning else "fail", message, advice
    if not problems:
        yield "ok", well, ""


# --- the checks


def _examine_python(host: Host) -> Iterator[Remark]:
    uses = {"ssl": "TLS and https notices", "ctypes": "protection of memory", "zlib": "compression"}
    missing = []
    for name in uses:
        try:
            importlib.import_module(name)
        except ImportError:
            missing.append(name)
    for name in missing:
        yield "warn", f"module {name} is missing, so there is no {uses[name]}", "install it, or another Python, if that is wanted"
    yield "ok", f"{'.'.join(map(str, sys.version_info[:3]))}{'' if missing else ' with ' + ', '.join(uses)}", ""


def _examine_sqlite(host: Host) -> Iterator[Remark]:
    version, has_threads = describe_sqlite()
    if has_threads:
        yield "ok", version, ""
    else:
        yield "fail", f"{version} was built without threads", "install another Python"


def _examine_files(host: Host) -> Iterator[Remark]:
    names = ", ".join(host.services.by_name) or "none"
    yield from _tell(host.problems["files"], f"config.toml and services.toml are right; services: {names}")


def _examine_surroundings(host: Host) -> Iterator[Remark]:
    yield from _tell(host.problems["host"], "directories, accounts and programs are there, and nobody else can change the files")


def _examine_secrets(host: Host) -> Iterator[Remark]:
    for status, message, advice in _tell(host.problems["secrets"], ""):
        if host.server and " is not found in any source" in message:
            yield "warn", message, "if the server that runs has it from its own environment or credentials, all is well: they cannot be seen from here"
        elif message:
            yield status, message, advice
    for name, value in sorted(host.keyring.values.items()):
        yield "ok", f"{name} has {len(value)} bytes, from {host.keyring.origins[name]}", ""


def _examine_user(host: Host) -> Iterator[Remark]:
    if not host.account:
        yield "ok", f"{own_user()}; whom the server runs as is not known: there is no data directory yet, or its owner has no name", ""
    elif host.account.name != own_user():
        yield "warn", f"this is {own_user()}, the server's user is {host.account.name}: modes, secrets and limits are told as {own_user()} meets them", \
            f"run this as root or as {host.account.name}"
    else:
        yield "ok", f"{own_user()}, as the server", ""


def _examine_memory(host: Host) -> Iterator[Remark]:
    if not host.server:
        # As `run` does: then the kernel says what a server of this user would have.
        lock_memory()
    found = read_protection(host.server)
    whose = f"the server (pid {host.server})" if host.server else "a server started like this"
    if found.dumps_core or found.is_dumpable:
        yield "warn", f"{whose} {found}", "install Python's ctypes"
    elif found.is_locked is False:
        # Only with a swap that is not encrypted, and few hosts give this right: no warning each time.
        yield "ok", f"{whose} {found}", "LimitMEMLOCK=infinity in the unit lets it lock its memory"
    else:
        yield "ok", f"{whose} {found}", ""


def _examine_limits(host: Host) -> Iterator[Remark]:
    need = descriptors_needed(host.config.server)
    limit = read_file_limit(host.server) if host.server else None
    if not host.server:
        yield "ok", f"the server may need {need} descriptors", ""
    elif limit is not None and limit < need:
        yield "warn", f"the server may open {limit} descriptors and may need {need}", "raise LimitNOFILE, or lower server.max_connections"
    else:
        yield "ok", f"the server may open {'any number of' if limit is None else limit} descriptors, and may need {need}", ""


def _examine_clock(host: Host) -> Iterator[Remark]:
    path = os.path.join(host.config.storage.data_dir, "state.db")
    ahead_ms = 0
    # One that cannot be read is told by "database".
    with contextlib.suppress(HookshotError):
        ahead_ms = examine_database(path, lambda: True).latest_ms - now_ms() if os.path.exists(path) else 0
    if ahead_ms > 1000:
        yield "fail", f"the clock is {render_duration(ahead_ms)} behind the newest deployment", "set it right, or signatures with a time are refused"
    is_right = is_clock_synchronised()
    if is_right is False:
        yield "warn", f"{render_time(now_ms())}, and nothing keeps it right", "run chrony or systemd-timesyncd: signatures with a time are good for " \
            f"{host.config.security.replay_window} s"
    else:
        yield "ok", f"{render_time(now_ms())}, {'kept right' if is_right else 'whether it is kept right is not known'}", ""


def _examine_disk(host: Host) -> Iterator[Remark]:
    for key, folder in (("storage.data_dir", host.config.storage.data_dir), ("logging.directory", host.config.logging.directory)):
        while folder and not os.path.exists(folder):
            folder = os.path.dirname(folder)
        if folder:
            yield from _examine_room(key, folder)


def _examine_room(key: str, folder: str) -> Iterator[Remark]:
    status, kind = os.statvfs(folder), file_system_of(folder)
    free, where = free_bytes(folder), f"{key}: {folder} ({kind or 'unknown file system'})"
    if free < DISK_RESERVE_BYTES:
        yield "fail", f"{where} has only {render_size(free)} free: deploys are refused", "free some space"
    elif free < _LOW_DISK_BYTES:
        yield "warn", f"{where} has only {render_size(free)} free", f"free some space: below {render_size(DISK_RESERVE_BYTES)} deploys are refused"
    else:
        yield "ok", f"{where} has {render_size(free)} free", ""
    # Some file systems (btrfs) have as many as there is room for, and say 0.
    if status.f_files and status.f_favail < _LOW_INODES:
        yield ("warn" if status.f_favail else "fail"), f"{where} has room for {status.f_favail} more files", "remove some"
    if key == "storage.data_dir" and kind and _NETWORK_FILE_SYSTEMS.fullmatch(kind):
        yield "warn", f"{where} is a network file system: the database can be damaged there", "use a local disk"
    if key == "storage.data_dir" and kind in _FLEETING_FILE_SYSTEMS:
        yield "warn", f"{where} is memory: deployments are lost at the next boot", "use a disk"


def _examine_database(host: Host) -> Iterator[Remark]:
    path = os.path.join(host.config.storage.data_dir, "state.db")
    if _is_closed(host):
        yield "warn", f"{path} cannot be looked at by {own_user()}", "run this as root"
        return
    if not os.path.exists(path):
        yield "ok", f"{path} does not exist yet; the first start makes it", ""
        return
    deadline = time.monotonic() + _DATABASE_PATIENCE_S / 2
    found, newest = examine_database(path, lambda: time.monotonic() > deadline), len(MIGRATIONS)
    if found.version > newest:
        yield "fail", f"{path} was written by a newer hookshot (schema {found.version}, this one knows {newest})", "run that version, or restore an older backup"
    elif found.problem:
        yield "fail", f"{path} is damaged ({found.problem})", "stop the server and restore a backup"
    else:
        state = "sound" if found.is_complete else "sound as far as it was looked at"
        update = f"; the next start updates its schema from {found.version} to {newest}" * (found.version < newest)
        yield "ok", f"{path} is {state}: {render_size(found.size_bytes)}, {render_size(found.unused_bytes)} of it unused, {render_size(found.wal_bytes)} " \
            f"in the write-ahead log{update}", ""
    if found.wal_bytes > _LARGE_WAL_BYTES:
        yield "warn", f"{path}-wal has grown to {render_size(found.wal_bytes)}", "end what keeps the database open beside the server (a backup, sqlite3)"


def _examine_listening(host: Host) -> Iterator[Remark]:
    server = host.config.server
    if host.server and all(address.is_awaited for address in server.listen):
        yield "ok", f"runs (pid {host.server}) on what systemd has passed", ""
    elif host.server and any(address.path or address.port for address in server.listen):
        yield from _examine_answer(host.server, Client(url_of(server), None, None, Trust(server.tls.cert or None, is_pinned=bool(server.tls.cert))))
    elif host.server:
        yield "ok", f"runs (pid {host.server}) on a port of the kernel's choice, as server.listen asks", ""
    for address in server.listen if not host.server else ():
        if address.is_awaited:
            yield "ok", f"{address} is for systemd to pass; no server runs", ""
            continue
        number = why_not_bound(address)
        if not number:
            yield "ok", f"{address} is free; no server runs", ""
        elif number == errno.EADDRINUSE:
            yield _tell_who_listens(host, address)
        elif number == errno.EACCES:
            yield "warn", f"{address} is not open to {own_user()}", "ports below 1024 need CAP_NET_BIND_SERVICE, which a unit can give"
        else:
            yield "fail", f"{address} cannot be listened on: {os.strerror(number)}", "choose another address in server.listen"


def _is_closed(host: Host) -> bool:
    """Return whether this user may not look into the data directory, so that what is not seen there may be there all the same."""
    folder = host.config.storage.data_dir
    return os.path.isdir(folder) and not os.access(folder, os.X_OK)


def _tell_who_listens(host: Host, address: ListenAddress) -> Remark:
    if (_ask_systemd(_UNIT.replace(".service", ".socket"), host.environ) or {}).get("ActiveState") == "active":
        return "ok", f"{address} is in use while hookshot.socket is active, which starts the server when somebody connects", ""
    if _is_closed(host):
        return "warn", f"{address} is in use; by the server or not, only its user can see", "run this as root"
    return "fail", f"{address} is used by {host.listeners.get(address.port, 'another program')}", "end it, or choose another address in server.listen"


def _examine_answer(pid: int, client: Client) -> Iterator[Remark]:
    try:
        found = client.ready()
    except HookshotError as error:
        yield "fail", f"a server runs (pid {pid}), but {error.sentence}", "was it started with --bind or --port, or before server.listen was changed?"
        return
    is_ready = found.get("ready") is True
    yield ("ok" if is_ready else "warn"), f"{client.url} answers: {found['message']} (pid {pid})", "" if is_ready else "wait, and look again"


def _examine_commands(host: Host) -> Iterator[Remark]:
    count, path = 0, host.environ["PATH"]
    for service in host.services.by_name.values():
        with contextlib.suppress(ValueError):  # an account that does not exist: told by "host"
            account = find_account(service.user, service.group) or host.account
            if not account or (account.name == own_user() and not service.user):
                continue
            for where, name in _names_of(service, path):
                count += 1
                if os.path.exists(name) and (closed := find_closed(name, account)):
                    yield "warn", f'service "{service.name}", {where}: {name} cannot be reached by {account.name}: {closed} is closed to it', \
                        "see its mode, unless an ACL opens it"
    yield "ok", f"{count} looked at for users other than {own_user()}" if count else f"all run as {own_user()}; see host", ""


def _names_of(service: Service, path: str) -> Iterator[tuple[str, str]]:
    """Yield the programs and working directories of a service that are known before a deployment, and where they stand."""
    for where, commands, _ in service_commands(service):
        for index, command in enumerate(commands):
            folder, program = command.working_dir or service.working_dir or "/", command.run[0]
            yield f"{where}[{index}]", folder
            if not program.inserts and (name := os.path.join(folder, program.text) if "/" in program.text else shutil.which(program.text, path=path)):
                yield f"{where}[{index}]", name


def _examine_certificate(host: Host) -> Iterator[Remark]:
    files = host.config.server.tls
    if not files.cert:
        yield "ok", "off", ""
        return
    yield from _tell(host.problems["tls"], f"{files.cert} and {files.key} belong together")
    with contextlib.suppress(OSError, ValueError):
        if validity := parse_validity(read_text(files.cert)):
            # Without the milliseconds, as in the certificate: so they compare as texts.
            now, soon = (f"{render_time(now_ms() + days * 86_400_000)[:19]}Z" for days in (0, _EXPIRY_WARNING_DAYS))
            if not validity[0] <= now < validity[1]:
                yield "fail", f"{files.cert} is valid from {validity[0]} until {validity[1]}, and not now", "renew it and run hookshot reload, or set the clock right"
            elif validity[1] < soon:
                yield "warn", f"{files.cert} expires at {validity[1]}", "renew it and run hookshot reload"
            else:
                yield "ok", f"{files.cert} is valid until {validity[1]}", ""


def _examine_unit(host: Host) -> Iterator[Remark]:
    name = host.server and read_unit(host.server) or _UNIT
    # A user's own manager, to which sudo and su leave no way of themselves.
    own = _ask_systemd(name, {**host.environ, "XDG_RUNTIME_DIR": f"/run/user/{os.geteuid()}"}, "--user") if os.geteuid() else None
    facts = {**own, "User": own_user()} if own and own.get("LoadState") == "loaded" else _ask_systemd(name, host.environ)
    if facts is None:
        yield "ok", "systemd does not manage this host", ""
    elif facts.get("LoadState") != "loaded":
        yield "warn", f"{name} is {facts.get('LoadState')}, so nothing starts the server at boot", "install the unit that `hookshot show unit` prints"
    else:
        remarks = list(_judge_unit(name, facts))
        yield from remarks or [("ok", f"{name} is loaded, Type={facts.get('Type')}, User={facts.get('User') or 'root'}", "")]


def _ask_systemd(name: str, environ: Mapping[str, str], *options: str) -> dict[str, str] | None:
    """Return what systemd says of a unit, or None where it does not run."""
    properties = ("LoadState", "Type", "User", "KillMode", "WatchdogUSec", "NeedDaemonReload", *_FOLDERS_OF_UNIT, "ActiveState", "SubState", "UnitFileState",
                  "DynamicUser")
    try:
        done = subprocess.run(["systemctl", "show", name, *options, f"--property={','.join(properties)}"], stdin=subprocess.DEVNULL, capture_output=True,
                              env=dict(environ), timeout=_CHECK_PATIENCE_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return dict(line.split("=", 1) for line in done.stdout.decode("utf-8", "replace").splitlines() if "=" in line) if done.returncode == 0 else None


def _judge_unit(name: str, facts: Mapping[str, str]) -> Iterator[Remark]:
    user = facts.get("User", "")
    try:
        # systemd takes a number without an account, and with DynamicUser= makes one.
        find_account(None if not user or user.isdecimal() or facts.get("DynamicUser") == "yes" else user, None)
    except ValueError as error:
        yield "fail", f"{name} cannot start: {error}", "make the user, or correct User="
    if facts.get("ActiveState") == "failed" or facts.get("SubState") == "auto-restart":
        yield "fail", f"{name} has failed" + ", and systemd tries again" * (facts.get("ActiveState") != "failed"), f"see journalctl -u {name}"
    if facts.get("UnitFileState") == "disabled":
        yield "warn", f"{name} is not enabled, so nothing starts the server at boot", f"run systemctl enable {name}"
    if not facts.get("Type", "").startswith("notify"):
        yield "warn", f"{name} has Type={facts.get('Type')}, so systemd does not know when the server is ready", "set Type=notify"
        if facts.get("WatchdogUSec") not in ("0", "infinity", None):
            yield "warn", f"{name} has WatchdogSec={facts['WatchdogUSec']} without Type=notify: systemd may end a server that is well", "set Type=notify, or leave WatchdogSec out"
    if facts.get("KillMode") not in ("mixed", None):
        yield "warn", f"{name} has KillMode={facts['KillMode']}, so a stop does not let running deployments end", "set KillMode=mixed"
    if facts.get("NeedDaemonReload") == "yes":
        yield "warn", f"{name} was changed and systemd has not read it", "run systemctl daemon-reload"


class HostCheck(NamedTuple):
    """One row of CHECKS: what looks, what it looks at, and how long it may take."""

    run: Callable[[Host], Iterator[Remark]]
    doc: str
    patience_s: float = _CHECK_PATIENCE_S


CHECKS: dict[str, HostCheck] = {
    "python": HostCheck(_examine_python, "version and optional modules"),
    "sqlite": HostCheck(_examine_sqlite, "version, and whether threads may use it"),
    "files": HostCheck(_examine_files, "both files, as `validate` does"),
    "host": HostCheck(_examine_surroundings, "directories, accounts, programs, and who else may change them"),
    "secrets": HostCheck(_examine_secrets, "which are there, from where, how long; never their values"),
    "user": HostCheck(_examine_user, "whether you are the server's user, as whom you see what the server sees"),
    "memory": HostCheck(_examine_memory, "what protects the server's memory, as the kernel says"),
    "limits": HostCheck(_examine_limits, "descriptors that the running server may open"),
    "clock": HostCheck(_examine_clock, "whether something keeps it right, and that no deployment lies in the future"),
    "disk": HostCheck(_examine_disk, "free bytes and files, and whether the file system suits a database"),
    "database": HostCheck(_examine_database, "whether it is sound, its schema, its size", _DATABASE_PATIENCE_S),
    "server": HostCheck(_examine_listening, "the addresses: free, used by another program, or answered by the server", 15.0),
    "commands": HostCheck(_examine_commands, "whether programs and folders are open to the users that commands run as"),
    "tls": HostCheck(_examine_certificate, "certificate and key, and until when"),
    "unit": HostCheck(_examine_unit, "the systemd unit: installed, enabled, not failing, and set up as the server needs it", 10.0),
}


# === 24. CLI ==========================================================================================================
# The commands of the command line: one row of COMMANDS and one function each.
#
# 1. Data goes to stdout, talk to stderr.
# 2. Every failure is one plain sentence and an exit status from ERRORS; a trace only with --log-level debug.

# Between two looks of `watch`, and how many moves it shows.
_WATCH_TURN_S, _BOARD_MOVES = 1.0, 20
# They can stand in texts only.
_JSON_ESCAPES = {code: f"\\u{code:04x}" for code in CONTROL_ESCAPES if code >= 127}
# A table's heading, a line, and how many more there are: no table is cut further.
_LEAST_ROWS = 3
# The deployment has ended, so its outcome is there to be asked for.
_OUTCOME_PATIENCE_S = 60.0


def _say(*words: object) -> None:
    print(*words, file=sys.stderr, flush=True)


def _print_json(document: object) -> None:
    print(_json_text(document, indent=2))


def _json_text(document: object, indent: int | None = None) -> str:
    """Return JSON for a program or a terminal: json.dumps leaves control characters from DEL on, and what turns lines around, as they are."""
    return json.dumps(document, indent=indent, ensure_ascii=not _takes_unicode(sys.stdout)).translate(_JSON_ESCAPES)


def _takes_unicode(stream: Any) -> bool:
    """Return whether a stream takes every character."""
    return (getattr(stream, "encoding", None) or "utf-8").lower().replace("-", "") in ("utf8", "utf16", "utf32")


def _print_table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    print("\n".join(_table_lines(headings, rows)))


def _table_lines(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    texts = [[escape_controls("-" if cell is None else str(cell)) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(headings, *texts)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in (headings, *texts)]


def _paths(args: argparse.Namespace) -> tuple[str, str]:
    """Return both files; services.toml is looked for beside config.toml unless it is named."""
    config = args.config or os.environ.get("HOOKSHOT_CONFIG") or find_config()
    services = args.services_file or os.environ.get("HOOKSHOT_SERVICES") or os.path.join(os.path.dirname(os.path.abspath(config)), "services.toml")
    return os.path.abspath(config), os.path.abspath(services)


def _print_problems(problems: Iterable[Problem]) -> None:
    for file, group in itertools.groupby(sorted(problems, key=lambda problem: problem.file), key=lambda problem: problem.file):
        found = list(group)
        kind = "problem" if has_errors(found) else "warning"
        _say(escape_controls(f"{file}: {len(found)} {kind}{'s' * (len(found) != 1)}"))
        for problem in found:
            label = "warning: " if problem.is_warning else ""
            _say(escape_controls(f"  {label}{problem.path}{': ' if problem.path else ''}{problem.message}"))


def _overrides(args: argparse.Namespace) -> Callable[[Config], Config]:
    """Return what the flags of `run` change in the file's configuration."""
    def override(config: Config) -> Config:
        listen = config.server.listen
        if args.bind is not None or args.port is not None:
            # In place of everything in the file: one address, what is not given taken from the file's first with a port.
            first = next((address for address in listen if not address.path and not address.name), ListenAddress("127.0.0.1", 8080))
            listen = (first._replace(host=first.host if args.bind is None else args.bind,
                                     port=first.port if args.port is None else args.port),)
        logging = config.logging._replace(format=args.log_format or config.logging.format, level=args.log_level or config.logging.level)
        return config._replace(server=config.server._replace(listen=listen), logging=logging)

    return override


def run_server(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C."""
    lock_memory()
    signals = Signals()
    # From here on: while the files are read it would end the server.
    signals.catch(signal.SIGHUP)
    daemon = Daemon(*_paths(args), environ=os.environ, override=_overrides(args), signals=signals)
    if daemon.passed and (args.bind is not None or args.port is not None):
        raise HookshotError("usage", "--bind and --port say where to listen, but systemd has passed sockets; leave one or the other")
    daemon.run()
    return EXIT_OK


def _become_the_server(config_path: str, services_path: str) -> frozenset[str]:
    """Become the server's user if root asks, for whom modes and owners must be right; return the keys whose folders systemd is still to make."""
    data_dir = read_settings(config_path, services_path, []).config.storage.data_dir
    server, account, awaited = look_for_server(data_dir, os.environ) if data_dir else (None, None, frozenset[str]())
    if account and become(account):
        _say(f"as {account.name}, the server's user:")
    elif account and account.name != own_user():
        _say(f"this is {own_user()}, not the server's user {account.name}, so modes and owners are not judged as the server meets them; "
             f"run this as root{'' if account.name == 'root' else f' or as {account.name}'}")
    if server and os.access(folder := f"/run/credentials/{read_unit(server)}", os.R_OK | os.X_OK):
        os.environ.setdefault("CREDENTIALS_DIRECTORY", folder)
    return awaited


def validate(args: argparse.Namespace) -> int:
    """Check both files, secrets, directories and programs; print every problem."""
    config_path, services_path = _paths(args)
    awaited = _become_the_server(config_path, services_path)
    problems: list[Problem] = []
    settings = read_settings(config_path, services_path, problems)
    surroundings = SecretSurroundings.take(os.environ, settings.config.secrets.secret_prefix or "HOOKSHOT_")
    # Only what could be read can be looked at further; the host is asked about every service that is right in itself.
    if not has_errors(problems):
        check_host(settings, config_path, services_path, os.environ, problems)
        problems = [problem for problem in problems if problem.path not in awaited]
        if surroundings.credentials and not os.path.isdir(surroundings.credentials):
            # As systemd 252 has it for ExecReload=. The server itself looks at them before it takes anything.
            Place(config_path, "secrets", problems).warning(f"are not looked at: systemd keeps {surroundings.credentials} for the server alone")
        else:
            keyring = load_keyring(*settings, surroundings, config_path, problems)
            check_channels(settings.config.notifications, keyring.values, Place(config_path, "notifications", problems))
        load_tls(settings.config.server.tls, Place(config_path, "server.tls", problems))
    if args.json:
        _print_json({"valid": not has_errors(problems), "problems": [problem._asdict() for problem in problems]})
    else:
        _print_problems(problems)
        if not has_errors(problems):
            names = ", ".join(settings.services.by_name) or "none"
            print(f"{config_path} and {services_path} are valid; services: {names}")
    return EXIT_CONFIG if has_errors(problems) else EXIT_OK


def doctor(args: argparse.Namespace) -> int:
    """Look at this host and say of each thing whether it is well, with what to do where it is not."""
    findings = []
    colours = {"ok": "32", "warn": "33", "fail": "31"} if wants_colour(1) else {}
    for finding in examine(*_paths(args), os.environ):
        findings.append(finding)
        if not args.json:
            status = f"\x1b[{colours[finding.status]}m{finding.status:4}\x1b[m" if colours else f"{finding.status:4}"
            print(status, escape_controls(f"{finding.check:9} {finding.message}{'; ' if finding.advice else ''}{finding.advice}"), flush=True)
    if args.json:
        _print_json([finding._asdict() for finding in findings])
    return EXIT_CONFIG if any(finding.status == "fail" for finding in findings) else EXIT_OK


def reload_server(args: argparse.Namespace) -> int:
    """Have the running server read its files again, and say what came of it."""
    record = ask_for_reload(_find_data_dir(args), time.monotonic() + args.timeout)
    is_taken = record.outcome == "taken"
    if args.json:
        _print_json({"reloaded": is_taken, "config": record.config, "services": record.services, "changes": record.changes, "pending": record.pending,
                     "problems": [problem._asdict() for problem in record.problems]})
    else:
        _print_problems(record.problems)
        for line in [*record.changes, *(f"{line} (needs a restart)" for line in record.pending)]:
            print(escape_controls(line))
        _say("reloaded" + "; nothing has changed" * (not record.changes) if is_taken else "nothing is reloaded: the old configuration stays in force")
    if not {record.config, record.services} <= set(_paths(args)) and not args.data_dir:
        _say(escape_controls(f"the server reads {record.config} and {record.services}"))
    return EXIT_OK if is_taken else EXIT_CONFIG


def _find_data_dir(args: argparse.Namespace) -> str:
    """Return the data directory: --data-dir, else storage.data_dir of config.toml, as long as the file can be read that far."""
    if args.data_dir:
        return os.path.abspath(args.data_dir)
    config_path, services_path = _paths(args)
    problems: list[Problem] = []
    config = read_settings(config_path, services_path, problems).config
    found = [problem for problem in problems if problem.file == config_path and not problem.is_warning and problem.path in ("", "storage", "storage.data_dir")]
    if found:
        _say("the data directory is not known; name it with --data-dir")
        raise ConfigError(found)
    return config.storage.data_dir


def source_digest() -> str:
    """Return the SHA-256 of this module's source, from a file or from inside the archive; empty if there is none."""
    archive = getattr(__loader__, "archive", None)  # type: ignore[name-defined]
    with contextlib.suppress(OSError):
        if archive:
            return hashlib.sha256(__loader__.get_data(os.path.join(archive, "hookshot.py"))).hexdigest()  # type: ignore[name-defined]
        with open(__file__, "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()
    return ""


def version(args: argparse.Namespace) -> int:
    """Print version, Python, SQLite, platform and build digest."""
    found = {"version": __version__, "python": ".".join(map(str, sys.version_info[:3])), "sqlite": sqlite3.sqlite_version,
             "platform": f"{os.uname().sysname} {os.uname().machine}", "digest": source_digest()}
    if args.json:
        _print_json(found)
    else:
        print(f"hookshot {found['version']} (Python {found['python']}, SQLite {found['sqlite']}, {found['platform']}, build {found['digest'][:12]})")
    return EXIT_OK


def keygen(args: argparse.Namespace) -> int:
    """Print a fresh key of 32 random bytes in hex."""
    print(new_key())
    return EXIT_OK


def write_sample(folder: str, services: str, values: Mapping[str, Any], key: str) -> tuple[str, str, str]:
    """Write config.toml, services.toml and a secrets file (0600) that do not exist yet; return their paths."""
    paths = tuple(os.path.join(folder, name) for name in ("config.toml", "services.toml", "secrets"))
    taken = [path for path in paths if os.path.lexists(path)]
    if taken:
        raise HookshotError("cannot_write", f"{taken[0]} exists already; nothing was changed. Choose another directory, or remove it")
    samples = (SAMPLE_HEADING + render_sample(Config, "", {"secrets.secrets_file": paths[2], **values}), services,
               f"# Secrets of hookshot: key=value lines. Keep this file private (mode 0600).\nhmac_key={key}\n")
    try:
        os.makedirs(folder, exist_ok=True)
        for path, text in zip(paths, samples):
            write_private_file(path, text, mode=0o600 if path == paths[2] else 0o644)
    except OSError as error:
        raise HookshotError("cannot_write", f"{error.filename or folder} cannot be written: {error.strerror}") from None
    return paths  # type: ignore[return-value]


def init(args: argparse.Namespace) -> int:
    """Write commented sample files and a fresh key."""
    folder = os.path.abspath(args.dir)
    data_dir, working_dir = ("/var/lib/hookshot", "/srv") if folder == os.path.dirname(DEFAULT_CONFIG) else (os.path.join(folder, "data"), folder)
    values = {"server.listen": "127.0.0.1:8080", "storage.data_dir": data_dir}
    services = SAMPLE_SERVICES.replace("@WORKING_DIR@", json.dumps(working_dir, ensure_ascii=False))
    paths = write_sample(folder, services, values, new_key())
    for path in paths:
        print(path)
    call = _own_call() + ("" if folder == os.path.dirname(DEFAULT_CONFIG) else f" -c {shlex.quote(paths[0])}")
    _say(f"Next:  {call} validate\nthen:  {call} run\nand from another terminal:\n       {call} deploy example example/app:1.0")
    return EXIT_OK


# --- client commands


def _client_settings(args: argparse.Namespace) -> tuple[Settings | None, Keyring | None, list[Problem]]:
    """Return what the server's own configuration and its secrets say, as far as they can be read from here, and why not the rest."""
    # A client may run in the unit of another program, such as a CI runner, whose folders are none of ours.
    for name in UNIT_FOLDERS:
        os.environ.pop(name, None)
    problems: list[Problem] = []
    config_path, services_path = _paths(args)
    if not (args.config or os.environ.get("HOOKSHOT_CONFIG")) and not os.access(config_path, os.R_OK):
        return None, None, [Problem(config_path, "", "cannot be read, and no other is named with -c or HOOKSHOT_CONFIG")]
    settings = read_settings(config_path, services_path, problems)
    # What is wrong elsewhere in the file is no reason not to ask the server.
    found = [problem for problem in problems if problem.file == config_path and not problem.is_warning
             and problem.path.partition(".")[0] in ("", "server", "security", "secrets")]
    if found:
        raise ConfigError(found)
    problems = []
    keyring = load_keyring(settings.config, Services({}), SecretSurroundings({}, None), config_path, problems)
    return settings, keyring, [problem for problem in problems if not problem.is_warning]


def _read_key_file(path: str) -> bytes:
    try:
        text = read_text(path, 1 << 16).strip()
    except (OSError, ValueError) as error:
        raise HookshotError("config", f"the key file {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if "\n" in text or "PRIVATE KEY" in text or re.match(r"[A-Za-z0-9_.-]+\s*=\s*[^\s=]", text):
        raise HookshotError("config", f"{path} holds more than a key; a key file holds the key alone, as `hookshot keygen` prints it")
    return _checked_key(text, f"the key in {path}")


def _checked_key(text: str, name: str) -> bytes:
    key = text.encode("utf-8", "surrogateescape")
    if problem := check_key(key):
        raise HookshotError("config", f"{name} {problem}")
    return key


def _take_variable(name: str) -> str | None:
    erase_variable(name)
    return os.environ.pop(name, None)


def _client(args: argparse.Namespace) -> Client:
    """Return the client: URL, key and certificates from flags, environment, or the server's own files, in this order."""
    if args.url == "":
        raise HookshotError("usage", "--url is empty; write http://host:port, https://host or unix:/path")
    given = {name: _take_variable(name) for name in ("HOOKSHOT_HMAC_KEY", "HOOKSHOT_READ_TOKEN")}
    url = args.url or os.environ.get("HOOKSHOT_URL")
    key_file = args.key_file or os.environ.get("HOOKSHOT_KEY_FILE")
    text = given["HOOKSHOT_HMAC_KEY"]
    key = _read_key_file(key_file) if key_file else _checked_key(text, "the key in HOOKSHOT_HMAC_KEY") if text else None
    token = given["HOOKSHOT_READ_TOKEN"]
    if token and not (token.isascii() and token.isprintable()):
        raise HookshotError("usage", "the token in HOOKSHOT_READ_TOKEN has characters that no header can have")
    trust = Trust(args.ca or os.environ.get("HOOKSHOT_CA"), args.cert or os.environ.get("HOOKSHOT_CERT"),
                  args.cert_key or os.environ.get("HOOKSHOT_CERT_KEY"))
    if trust.cert_key and not trust.cert:
        raise HookshotError("usage", f"--cert-key {trust.cert_key} needs the certificate that it belongs to: --cert")
    problems: Sequence[Problem] = ()
    if not url or not key or not token:
        try:
            settings, keyring, problems = _client_settings(args)
        except ConfigError as error:
            if not url:
                _say("the server is not known; name it with --url")
                raise
            settings, keyring, problems = None, None, error.problems
        if not url and settings and settings.config.server.tls.cert and not trust.ca:
            trust = trust._replace(ca=settings.config.server.tls.cert, is_pinned=True)
        url = url or (url_of(settings.config.server) if settings else "http://127.0.0.1:8080")
        if settings and keyring:
            key = key or next(iter(keyring.pick(settings.config.security.hmac_keys).values()), None)
            token = token or keyring.values.get("read_token", b"").decode() or None
    return Client(url, key, token, trust, problems)


def _parse_pairs(pairs: Sequence[str], flag: str) -> dict[str, str]:
    for pair in pairs:
        if "=" not in pair:
            raise HookshotError("usage", f"{flag} {pair} is not name=value")
    return dict(pair.split("=", 1) for pair in pairs)


def deploy(args: argparse.Namespace) -> int:
    """Deploy an image and follow it to its end; the exit status tells the outcome."""
    document: dict[str, Any] = {"deploy_id": args.id or new_deploy_id(now_ms()), "service": args.service, "image": args.image}
    document |= {"previous_image": args.previous_image} if args.previous_image else {}
    document |= {"metadata": _parse_pairs(args.meta, "--meta")} if args.meta else {}
    document |= {"overrides": {"env": _parse_pairs(args.env, "--env")}} if args.env else {}
    document |= {"dry_run": True} if args.dry_run else {}
    body = render_json(document)
    client = _client(args)

    def ask(wait_s: int) -> Reply:
        return client.post(body, wait_s=wait_s)

    # Not waiting for the end here, even where the server would (server.deploy_response): its id must be known first.
    latest = ask(0).document
    if args.dry_run:
        _print_json(latest) if args.json else _print_plan(latest)
        return EXIT_OK
    _say(f"{'accepted' if latest.get('position') else 'known already'}: {args.service} {args.image} as {latest['deploy_id']}")
    return _see_through(client, args, latest, ask)


def _see_through(client: Client, args: argparse.Namespace, latest: dict[str, Any], ask: Ask) -> int:
    """Follow an accepted deployment to its end, unless asked not to; the exit status tells the outcome."""
    deploy_id = str(latest["deploy_id"])
    if not args.wait:
        _print_json(latest) if args.json else print(deploy_id)
        return EXIT_OK
    latest, why = _follow_to_the_end(client, args, latest, ask)
    if args.json:
        _print_json(latest)
    if latest.get("status") not in TERMINAL:
        said = f"{why}\n{deploy_id} was accepted and goes on" if why else f"{deploy_id} still runs after {args.timeout} s"
        _say(f"{said}; look at it with: hookshot status {deploy_id}")
        return EXIT_STILL_RUNNING
    _say(_describe_outcome(latest))
    return EXIT_OF_STATE[State(latest["status"])]


def _follow_to_the_end(client: Client, args: argparse.Namespace, latest: dict[str, Any], ask: Ask) -> tuple[dict[str, Any], str | None]:
    """Return what is known of an accepted deployment at last, and why it is not more.

    Whatever keeps the client from following it, it was accepted: that must not be told as a refusal.
    """
    try:
        if latest.get("status") not in TERMINAL:
            status = _follow(client, args, latest, ask)
            latest = {**latest, "status": status} if status else latest
            latest = status and wait_for_outcome(ask, time.monotonic() + _OUTCOME_PATIENCE_S) or latest
    except HookshotError as error:
        return latest, error.sentence
    return latest, None


def _follow(client: Client, args: argparse.Namespace, latest: Mapping[str, Any], ask: Ask) -> str | None:
    """Follow on stdout, or with --json on stderr, which leaves stdout to the document."""
    with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext(), ProgressLine(str(latest["service"])) as line:
        return follow_deployment(client, str(latest["deploy_id"]), ask, line, time.monotonic() + args.timeout)


def _describe_outcome(outcome: Mapping[str, Any]) -> str:
    seconds = outcome.get("duration_seconds")
    took = f" after {render_duration(int(seconds * 1000))}" if isinstance(seconds, int | float) else ""
    error = f": {outcome['error']}" if outcome.get("error") else ""
    back = f", back on {outcome['current_image']}" if outcome.get("current_image") else ""
    return escape_controls(f"{outcome.get('service')} {outcome.get('image')}: {outcome.get('status')}{took}{back}{error}")


def _print_plan(plan: Mapping[str, Any]) -> None:
    print(escape_controls(f"{plan['service']} {plan['image']}, at most {plan['timeout_seconds']} s; nothing has run"))
    for phase, commands in plan["phases"].items():
        for command in commands:
            print(escape_controls(f"  {phase} {command['step']}: {shlex.join(command['run'])}  (in {command['working_dir']}, "
                                  f"{command['timeout_seconds']} s, {command['retries']} retries)"))
    health, rollback = plan.get("healthcheck"), plan["rollback"]
    if health:
        print(f"  healthy after {health['success_threshold']} good probes in a row, at most {health['max_attempts']}, every {health['interval_s']} s")
    print(escape_controls(f"  a failure is rolled back to {rollback['to']}" if rollback["possible"]
                          else f"  a failure is not rolled back: {rollback['reason']}"))


def status(args: argparse.Namespace) -> int:
    """Show one deployment, or how the server is."""
    if args.id is None:
        return _show_server(args)
    record = _client(args).get(f"/status/{urllib.parse.quote(args.id, safe='')}")
    if args.json:
        _print_json(record)
        return EXIT_OK
    timings, progress = record["timings"], record["progress"]
    rows = [("deployment", record["deploy_id"]), ("service", record["service"]), ("image", record["image"]),
            ("previous image", record["previous_image"]), ("status", record["status"]), ("error", record["error"]),
            ("now", progress["phase"] and f"{progress['phase']}, step {progress['steps_completed'] + 1} of {progress['steps_total']}: {progress['current_step']}"),
            ("queued", timings["queued_at"]), ("started", timings["started_at"]), ("completed", timings["completed_at"]),
            ("took", timings["duration_ms"] is not None and render_duration(timings["duration_ms"])),
            ("asked by", f"{record['triggered_by']['address']} with {record['triggered_by']['key_id']}")]
    for name, value in rows:
        if value:
            print(f"{name + ':':16}{escape_controls(str(value))}")
    if record["commands"]:
        print()
        _print_table(("PHASE", "STEP", "TRY", "COMMAND", "STATUS", "EXIT", "TOOK"), [
            (command["phase"], command["step"], command["attempt"], command["name"], command["status"],
             command["exit_code"] if command["signal"] is None else f"signal {command['signal']}", render_duration(command["duration_ms"]))
            for command in record["commands"]])
    return EXIT_OK


def _show_server(args: argparse.Namespace) -> int:
    client = _client(args)
    found = client.ready()
    if args.json:
        _print_json(found)
        return EXIT_OK
    rows = [("server", client.url), ("state", found["message"])]
    rows += [(part, f"older than its files since {since}, which could not be read; run `hookshot validate` on the host, then `hookshot reload`")
             for part, since in found.get("stale", {}).items()]
    for name, value in rows:
        print(f"{name + ':':16}{escape_controls(str(value))}")
    return EXIT_OK


def history(args: argparse.Namespace) -> int:
    """List deployments, newest first."""
    query = {"limit": str(args.limit), **({"service": args.service} if args.service else {}), **({"status": args.status} if args.status else {})}
    found = _client(args).get(f"/deployments?{urllib.parse.urlencode(query)}")
    if args.json:
        _print_json(found)
    elif not found["deployments"]:
        which = (f" of {escape_controls(args.service)}" if args.service else "") + (f" in state {args.status}" if args.status else "")
        _say(f"there are no deployments{which or ' yet'}" + "; `hookshot services` has the names" * bool(args.service))
    else:
        _print_table(("DEPLOYMENT", "SERVICE", "STATUS", "IMAGE", "QUEUED", "TOOK"), [
            (entry["deploy_id"], entry["service"], entry["status"], entry["image"], entry["queued_at"], render_duration(entry["duration_ms"]))
            for entry in found["deployments"]])
    return EXIT_OK


def logs(args: argparse.Namespace) -> int:
    """Print a deployment's log; with -f until it ends, the exit status telling the outcome."""
    client, deploy_id = _client(args), urllib.parse.quote(args.id, safe="")
    if args.follow:
        with ProgressLine(args.id) as line:
            outcome = follow_deployment(client, deploy_id, None, line, float("inf"))
        return EXIT_OF_STATE[State(outcome)] if outcome else EXIT_STILL_RUNNING
    for text in client.read_log(deploy_id, args.tail):
        print(escape_controls(text))
    return EXIT_OK


def services(args: argparse.Namespace) -> int:
    """List the services and how they are, or the keys that may sign for them."""
    found = _client(args).get("/services?keys=1" if args.keys else "/services")
    if args.json:
        _print_json(found)
    elif args.keys:
        since = found["keys_recorded_since"]
        _print_table(("SERVICE", "KEY", "LAST USED", "FROM", "REQUEST"), [
            (entry["service"] or "(none or unknown)", entry["name"], entry["last_used_at"] or f"never since {since}", entry["address"], entry["request_id"])
            for entry in found["keys"]])
    else:
        _print_table(("SERVICE", "HEALTH", "IMAGE", "LAST DEPLOYMENT", "STATUS", "WAITING", "RUNNING", "DEPLOYS", "SUCCESS"), [
            (entry["name"] + " (disabled)" * (not entry["enabled"]) + " (locked)" * entry["locked"], entry["health"], entry["current_image"],
             entry["last_deploy"] and entry["last_deploy"]["deploy_id"], entry["last_deploy"] and entry["last_deploy"]["status"],
             entry["queue"]["pending"], entry["queue"]["active"], entry["stats"]["total_deploys"],
             None if entry["stats"]["success_rate"] is None else f"{entry['stats']['success_rate']:.0%}") for entry in found["services"]])
    return EXIT_OK


def _control_command(args: argparse.Namespace, action: str, target: str, **options: Any) -> tuple[Client, Ask]:
    """Return the client, and what sends a control request: always the same message, so that nothing is done twice."""
    client, message_id = _client(args), new_message_id()
    name, known = CONTROLS[action]
    given = {option: getattr(args, option, None) for option in known} | options
    body = render_json({"action": action, name: target, **{option: value for option, value in given.items() if value is not None and value is not False}})
    path = f"/{'deployments' if name == 'deploy_id' else 'services'}/{urllib.parse.quote(target, safe='')}/{action}"
    return client, lambda wait_s: client.post(body, path=path, message_id=message_id, wait_s=wait_s)


def rollback(args: argparse.Namespace) -> int:
    """Deploy the last good image again, or another one, and follow it; the exit status tells the outcome."""
    client, ask = _control_command(args, "rollback", args.service)
    latest = ask(0).document
    _say(escape_controls(f"accepted: {latest['service']} back to {latest['image']} as {latest['deploy_id']}"))
    return _see_through(client, args, latest, ask)


def retry(args: argparse.Namespace) -> int:
    """Deploy again what a deployment deployed, and follow it; the exit status tells the outcome."""
    client, ask = _control_command(args, "retry", args.id)
    latest = ask(0).document
    _say(escape_controls(f"accepted: {latest['service']} {latest['image']} again as {latest['deploy_id']}"))
    return _see_through(client, args, latest, ask)


def cancel(args: argparse.Namespace) -> int:
    """End a deployment that waits or runs; done when it has ended as Cancelled."""
    _, ask = _control_command(args, "cancel", args.id)
    latest = ask(0).document
    if latest.get("status") not in TERMINAL:
        _say(f"{args.id} is being stopped")
        latest = wait_for_outcome(ask, time.monotonic() + _OUTCOME_PATIENCE_S) or latest
    if args.json:
        _print_json(latest)
    _say(_describe_outcome(latest))
    return EXIT_OK if latest.get("status") == State.CANCELLED else EXIT_STILL_RUNNING


def lock(args: argparse.Namespace) -> int:
    """Refuse deploys of a service from now on."""
    _, ask = _control_command(args, "lock", args.service, owner=_own_name())
    return _print_lock(args, ask(0).document)


def unlock(args: argparse.Namespace) -> int:
    """Take deploys of a service again."""
    _, ask = _control_command(args, "unlock", args.service, owner=_own_name())
    return _print_lock(args, ask(0).document)


def _print_lock(args: argparse.Namespace, document: Mapping[str, Any]) -> int:
    held = document["lock"]
    if args.json:
        _print_json(document)
    elif held:
        print(escape_controls(f"{document['service']} is locked by {held['owner']} until {held['until'] or 'it is unlocked'}"
                              f"{': ' if held['reason'] else ''}{held['reason'] or ''}"))
    else:
        print(f"{document['service']} is not locked")
    return EXIT_OK


def _own_name() -> str:
    """Return who runs this command, as user@host; with sudo, who called that."""
    return clip(escape_controls(f"{os.environ.get('SUDO_USER') or own_user()}@{os.uname().nodename}"), MAX_OWNER_CHARS)


def watch(args: argparse.Namespace) -> int:
    """Show services and running deployments as they change; where stdout is no terminal, a line for each move."""
    client = _client(args)
    client.get("/services")  # what is wrong with URL or token is said at once
    moves = MoveStream(client)
    try:
        if args.json or not sys.stdout.isatty() or os.environ.get("TERM") == "dumb":
            _print_moves(moves, is_json=args.json)
        with _taken_screen():
            _show_board(client, moves)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


@contextlib.contextmanager
def _taken_screen() -> Iterator[None]:
    """Have the terminal's other screen, without cursor and wrapped lines; what was on it before comes back, however this ends."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    print("\x1b[?1049h\x1b[?25l\x1b[?7l", end="")
    try:
        yield
    finally:
        print("\x1b[?7h\x1b[?25h\x1b[?1049l", end="", flush=True)


def _print_moves(moves: MoveStream, *, is_json: bool) -> NoReturn:
    is_lost = False
    while True:
        move = moves.get(None)
        if isinstance(move, HookshotError):
            _refuse_for_good(move)
            if not is_lost:
                _say(f"{move.sentence.partition(';')[0]}; trying again")
        is_lost = isinstance(move, HookshotError)
        if isinstance(move, Mapping):
            print(_json_text(move) if is_json else _describe_move(move), flush=True)


def _refuse_for_good(error: HookshotError) -> None:
    """Raise what no patience will mend."""
    if error.name != "unreachable" and error.kind.exit != ERRORS["busy"].exit:
        raise error


def _describe_move(move: Mapping[str, Any]) -> str:
    before = f"{move['previous_status']} -> " if move.get("previous_status") else ""
    why = move.get("error") or move.get("reason")
    return escape_controls(f"{move['at']} {move['service']} {move['image']} {move['deploy_id']} {before}{move['status']}{f': {why}' if why else ''}")


def _show_board(client: Client, moves: MoveStream) -> NoReturn:
    latest: collections.deque[Mapping[str, Any]] = collections.deque(maxlen=_BOARD_MOVES)
    problem: HookshotError | None = None
    tables: list[list[str]] = []
    while True:
        try:
            tables, problem = _board_tables(client), None
        except HookshotError as error:
            _refuse_for_good(error)
            problem = error
        width, height = shutil.get_terminal_size()
        head = f"hookshot at {client.url}   {_clock(render_time(now_ms()))} UTC   Ctrl-C ends this"
        told = [escape_controls(problem.sentence.partition(";")[0] + "; trying again")] if problem else []
        lines = [escape_controls(head), *told, "", *_fit([*tables, _move_table(latest)], height - 3 - len(told))]
        print("\x1b[H" + "".join(clip(line, width - 1) + "\x1b[K\n" for line in lines[: height - 1]) + "\x1b[J", end="", flush=True)
        move = moves.get(_WATCH_TURN_S)
        while move is not None:
            if not isinstance(move, HookshotError):
                latest.append(move)
            move = moves.get(0)


def _board_tables(client: Client) -> list[list[str]]:
    """Return the lines of the table of services, and of that of what has not ended. What is long and can be missed stands last."""
    found, unfinished = client.get("/services")["services"], client.get("/deployments?unfinished=1&limit=200")["deployments"]
    services = _table_lines(("SERVICE", "HEALTH", "IMAGE", "LAST", "ENDED", "WAITING", "RUNNING"), [
        (entry["name"], entry["health"], entry["current_image"], entry["last_deploy"] and entry["last_deploy"]["status"],
         entry["last_deploy"] and _clock(entry["last_deploy"]["completed_at"]), entry["queue"]["pending"], entry["queue"]["active"]) for entry in found])
    running = _table_lines(("SERVICE", "IMAGE", "STATUS", "STEP", "NOW", "SINCE", "DEPLOYMENT"), [
        (entry["service"], entry["image"], entry["status"],
         f"{entry['progress']['steps_completed'] + 1} of {entry['progress']['steps_total']}" if entry["progress"]["current_step"] else None,
         entry["progress"]["current_step"], _clock(entry["started_at"] or entry["queued_at"]), entry["deploy_id"]) for entry in reversed(unfinished)])
    return [services, running] if unfinished else [services]


def _move_table(moves: Sequence[Mapping[str, Any]]) -> list[str]:
    return _table_lines(("AT", "SERVICE", "IMAGE", "BEFORE", "NOW", "WHY"), [
        (_clock(move["at"]), move["service"], move["image"], move.get("previous_status"), move["status"], move.get("error") or move.get("reason"))
        for move in reversed(moves)])


def _clock(time_text: str) -> str:
    """Return the time of a moment of today (UTC), the date of any other."""
    today = render_time(now_ms())[:10]
    return str(time_text)[11:19] if str(time_text).startswith(today) else str(time_text)[:10]


def _fit(tables: Sequence[list[str]], rows: int) -> list[str]:
    """Return the tables with an empty line between, the longest cut first until all are at most `rows` lines."""
    sizes = [len(table) for table in tables]
    while sum(sizes) + len(sizes) - 1 > rows and max(sizes) > _LEAST_ROWS:
        sizes[sizes.index(max(sizes))] -= 1
    lines = []
    for table, size in zip(tables, sizes):
        shown = table if size == len(table) else [*table[: size - 1], f"... and {len(table) - size + 1} more"]
        lines += ["", *shown] if lines else shown
    return lines


def sign_body(args: argparse.Namespace) -> int:
    """Print the signature headers of a file or of standard input, for curl -H."""
    try:
        with contextlib.nullcontext(sys.stdin.buffer) if args.file == "-" else open(args.file, "rb") as file:
            body = file.read()
    except OSError as error:
        raise HookshotError("usage", f"{args.file} cannot be read: {error.strerror}") from None
    client = _client(args)
    key = client.signing_key()
    headers = sign_webhook(key, body, new_message_id(), now_ms() // 1000) if args.timestamp else {"X-Hub-Signature-256": sign(key, body)}
    print("\n".join(f"{name}: {value}" for name, value in headers.items()))
    return EXIT_OK


def notify_test(args: argparse.Namespace) -> int:
    """Send a sample through one channel, from here, and say what became of it."""
    config_path, services_path = _paths(args)
    problems: list[Problem] = []
    settings = read_settings(config_path, services_path, problems)
    surroundings = SecretSurroundings.take(os.environ, settings.config.secrets.secret_prefix or "HOOKSHOT_")
    if not has_errors(problems):
        notifications = settings.config.notifications._replace(enabled=True)
        # As if they were on: then the secrets that channels name must be there.
        keyring = load_keyring(settings.config._replace(notifications=notifications), settings.services, surroundings, config_path, problems)
        check_channels(notifications, keyring.values, Place(config_path, "notifications", problems))
    if has_errors(problems):
        raise ConfigError(problems)
    channels = {channel.name: channel for channel in channels_of(notifications, keyring.values)}
    if args.channel not in channels:
        raise HookshotError("usage", f"there is no channel {clip(escape_controls(args.channel), 64)}{nearest(args.channel, channels)}; "
                                     f"{config_path} has {', '.join(channels) or 'none'}")
    attempt = send_notice(sample_notice(), channels[args.channel], new_message_id(), os.environ)
    if args.json:
        _print_json({"channel": args.channel, "outcome": attempt.outcome, "answer": attempt.words})
    else:
        print(f"{args.channel}: {'delivered' if attempt.outcome == 'delivered' else 'not delivered'} ({attempt.words})")
    if not settings.config.notifications.enabled:
        _say("notifications.enabled is false: the server sends nothing")
    return EXIT_OK if attempt.outcome == "delivered" else ERRORS["unreachable"].exit


# --- audit


def explain(args: argparse.Namespace) -> int:
    """Show which gates a request passed, and which one refused it."""
    found = _client(args).get(f"/requests/{urllib.parse.quote(args.id, safe='')}")
    if args.json:
        _print_json(found)
        return EXIT_OK
    for entry in found["requests"]:
        about = " ".join(word for word in (entry["action"], entry["service"], entry["image"], entry["deploy_id"]) if word)
        print(escape_controls(f"{entry['at']} {about}, from {entry['address']} with {entry['key_id'] or 'no known key'}: {entry['decision']}"))
        for gate in entry["gates"]:
            print(escape_controls(f"  {gate['result']:8} {gate['gate']:12} {gate['rule']}"))
        if entry["detail"]:
            print(escape_controls(f"  {entry['detail']}"))
    return EXIT_OK


def audit(args: argparse.Namespace) -> int:
    """Print the newest rows of the audit, or check that all are as they were written."""
    path = os.path.join(_find_data_dir(args), "state.db")
    if args.verify and args.service or args.head and not args.verify:
        raise HookshotError("usage", "--head goes with verify, which checks all rows; --service goes without it")
    # Half a hash, or none of an empty variable, is no sign that rows were removed.
    if args.head is not None and not re.fullmatch("[0-9a-f]{64}", args.head):
        raise HookshotError("usage", "--head takes a whole hash as verify prints it, 64 of 0-9 a-f")
    if args.verify:
        return _verify_audit(args, path)
    rows = read_audit(path, service=args.service, limit=args.limit)
    if args.json:
        _print_json({"rows": [{"n": row.n, "at": render_time(row.at_ms), **row._asdict()} for row in rows]})
    elif not rows:
        _say("the audit has no such rows yet")
    else:
        _print_table(("ROW", "AT", "ACTION", "DECISION", "SERVICE", "KEY", "FROM", "REQUEST", "WHAT"), [
            (row.n, render_time(row.at_ms), row.action, row.decision, row.service, row.key_id, row.address, row.request_id,
             " ".join(word for word in (row.image, row.deploy_id, row.detail) if word)) for row in rows])
    return EXIT_OK


def _verify_audit(args: argparse.Namespace, path: str) -> int:
    found = verify_audit(path, args.head)
    has_head = args.head is None or found.has_head
    if args.json:
        _print_json({**found._asdict(), "has_head": found.has_head if args.head else None, "intact": found.bad is None and has_head})
    if found.bad is not None:
        raise HookshotError("audit_broken", f"row {found.bad} of the audit is not as it was written: {found.problem}. Do not rely on it, nor on "
                                            f"row {found.bad - 1} and those behind; compare {path} with a backup")
    if not has_head:
        raise HookshotError("audit_broken", f"no row of the audit has the hash {clip(escape_controls(args.head), 64)}: rows at its end were removed, or "
                                            "all was written anew, or that row is not kept any longer; compare it with a backup")
    if not args.json:
        print(f"rows {found.first} to {found.last} of the audit fit together; head: row {found.last} {found.hash}" if found.rows else "the audit has no rows yet")
    return EXIT_OK


# --- backup


def export_state(args: argparse.Namespace) -> int:
    """Write an archive of everything that this server has; it may go on meanwhile."""
    if args.file == "-" and (not sys.stdout or sys.stdout.isatty()):
        raise HookshotError("usage", "an archive is no text for a terminal; name a file, or send it on (| age -r ...)")
    source = gather(*_paths(args), has_secrets=args.secrets, has_logs=args.logs)
    try:
        if args.file == "-":
            counts = write_archive(source, sys.stdout.buffer, now_ms())
            sys.stdout.flush()
        else:
            counts = save_archive(source, os.path.abspath(args.file), now_ms())
    except OSError as error:
        _silence_stdout()
        raise HookshotError("cannot_write", f"standard output cannot be written: {error.strerror}; what went out is no backup") from None
    _say(f"exported {counts.deployments} deployment{'s' * (counts.deployments != 1)} and {counts.logs} log{'s' * (counts.logs != 1)}, {'with' if args.secrets else 'without'} secrets"
         + ("" if counts.is_compressed else "; uncompressed, because this Python lacks zlib"))
    return EXIT_OK


def import_state(args: argparse.Namespace) -> int:
    """Put an archive's contents in place of what this host has, or say what that would do."""
    if args.file == "-" and (not sys.stdin or sys.stdin.isatty()):
        raise HookshotError("usage", "an archive is not typed in; name a file, or send one to standard input")
    try:
        with contextlib.nullcontext(sys.stdin.buffer) if args.file == "-" else open(args.file, "rb") as stream:
            done = import_archive(stream, "the archive" if args.file == "-" else args.file, *_paths(args), now_ms(), is_dry=args.dry_run, is_forced=args.force)
    except OSError as error:
        raise HookshotError("usage", f"{args.file} cannot be read: {error.strerror}") from None
    if args.json:
        _print_json({"dry_run": args.dry_run, "created_at": done.created_at, "hookshot_version": done.hookshot_version, "schema_version": done.schema_version,
                     "deployments": done.deployments, "logs": done.logs, "secrets": done.has_secrets, "paths": done.targets._asdict(),
                     "ended": [{"deploy_id": ended.deploy_id, "service": ended.service, "status": ended.state} for ended in done.ended],
                     "warnings": done.warnings})
        return EXIT_OK
    would = "would be " if args.dry_run else ""
    print(f"backup of {done.created_at} by hookshot {done.hookshot_version}: {done.deployments} deployment{'s' * (done.deployments != 1)}, "
          f"{done.logs} log{'s' * (done.logs != 1)}")
    _print_table(("WHAT", "WHERE"), [("config.toml", done.targets.config), ("services.toml", done.targets.services),
                                     *([("secrets", done.targets.secrets)] if done.has_secrets else []), ("database and logs", done.targets.data_dir)])
    for ended in done.ended:
        print(f"{escape_controls(ended.deploy_id)} was unfinished in the backup; it {would or 'is '}{ended.state}")
    for warning in done.warnings:
        _say(f"warning: {escape_controls(warning)}")
    _say("nothing was changed" if args.dry_run else "imported; what was there before is kept as NAME.bak")
    return EXIT_OK


# --- demo

DEMO_STEPS = (
    ("demo/web:1.0", State.SUCCEEDED, "A release that works:"),
    ("demo/web:2.0-broken", State.ROLLED_BACK, "A release that starts, but fails its health check:"),
)


def demo(args: argparse.Namespace) -> int:
    """Show a deployment that succeeds and one that is rolled back, on a server of its own in a temporary directory."""
    import tempfile  # only the demo needs it

    with tempfile.TemporaryDirectory(prefix="hookshot-demo-") as home:
        # The environment may name a production server or its keys: the demo has nothing to do with them.
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("HOOKSHOT_", PREFIX_OF_HOOKSHOT_1))}
        sample = DEMO_SERVICES.replace("@HOME@", json.dumps(home, ensure_ascii=False))
        key = new_key()
        values = {"server.listen": "127.0.0.1:0", "storage.data_dir": os.path.join(home, "data"), "logging.level": "error",
                  "logging.format": "pretty", "security.rate_limit": 0, "server.shutdown_timeout": 5}
        paths = write_sample(home, sample, values, key)
        write_private_file(os.path.join(home, "release.sh"), DEMO_SCRIPT)
        daemon = Daemon(paths[0], paths[1], environ=environ)
        daemon.signals.catch(signal.SIGTERM, signal.SIGINT)
        daemon.start()
        try:
            client = Client(daemon.urls[0], key.encode(), None)
            print(f"A server with one service, \"web\", listens on {daemon.urls[0]}; its files are in {home}.", flush=True)
            ended_well = all([_demo_deploy(client, image, expected, words) for image, expected, words in DEMO_STEPS])
            print("\nBoth ended as they should." if ended_well else "\nSomething did not end as it should.", flush=True)
            if not args.once:
                print(f"Look at them while this runs:\n  {daemon.urls[0]}/services\n  {daemon.urls[0]}/deployments\n  {daemon.urls[0]}/metrics\n"
                      "Press Ctrl-C to stop and to remove everything.", flush=True)
                daemon.signals.get(None)
        finally:
            daemon.stop()
    return EXIT_OK if ended_well else 1


def _demo_deploy(client: Client, image: str, expected: State, words: str) -> bool:
    print(f"\n== {words}\n   hookshot deploy web {image}", flush=True)
    body = render_json({"deploy_id": new_deploy_id(now_ms()), "service": "web", "image": image})

    def ask(wait_s: int) -> Reply:
        return client.post(body, wait_s=wait_s)

    deploy_id = ask(0).document["deploy_id"]
    with ProgressLine("web") as line:
        found = follow_deployment(client, deploy_id, ask, line, time.monotonic() + 60)
    outcome = wait_for_outcome(ask, time.monotonic() + 60)
    print(f"-> {_describe_outcome(outcome or {})}", flush=True)
    return found == expected


# --- units of systemd


class _Need(NamedTuple):
    """What commands that name one of these programs want of a unit: `lifts` are directives that they cannot do with ("*": any)."""

    programs: tuple[str, ...]
    why: str
    lifts: tuple[str, ...] = ()
    adds: tuple[str, ...] = ()
    is_root: bool = False


# What runs the program that is meant: then every word after it may be that one.
_WRAPPERS = frozenset({"sh", "bash", "dash", "zsh", "ksh", "env", "nice", "ionice", "timeout", "nohup", "setsid", "flock", "xargs", "time", "stdbuf"})
_NEEDS = (
    _Need(("podman", "buildah", "crun", "runc", "nerdctl", "ctr", "unshare", "nsenter", "bwrap", "chroot", "mount", "umount"),
          "makes namespaces, mounts and cgroups of its own, and hands out capabilities", ("*",),
          ("Delegate=yes", "CapabilityBoundingSet=~CAP_BLOCK_SUSPEND CAP_LEASE CAP_LINUX_IMMUTABLE CAP_MAC_ADMIN CAP_MAC_OVERRIDE CAP_SYS_BOOT "
                           "CAP_SYS_PACCT CAP_SYS_RAWIO CAP_SYS_TIME CAP_SYS_TTY_CONFIG CAP_SYSLOG CAP_WAKE_ALARM"), is_root=True),
    _Need(("sudo", "doas", "su", "runuser", "pkexec"), "takes on the rights of another user, which every restriction would take away again", ("*",)),
    _Need(("apt", "apt-get", "dpkg", "dnf", "yum", "rpm", "zypper", "apk", "pacman", "snap", "flatpak"), "installs programs, anywhere on this host",
          ("*",), is_root=True),
    _Need(("systemctl", "systemd-run", "loginctl", "machinectl", "service"), "asks the service manager, which listens to root; see docs/systemd.md for a way without",
          is_root=True),
    _Need(("docker", "docker-compose"), "talks to the Docker daemon by a socket of group docker, which is as good as root", (), ("SupplementaryGroups=docker",)),
    _Need(("nice", "ionice", "chrt", "taskset", "prlimit"), "changes priorities and limits", ("SystemCallFilter=~@resources",)),
    _Need(("node", "npm", "npx", "yarn", "pnpm", "deno", "bun", "java", "mvn", "gradle", "dotnet", "php", "ruby", "bundle", "rake", "luajit", "pypy3", "pwsh"),
          "writes machine code while it runs", ("MemoryDenyWriteExecute=yes",)))
# As root: to be another user, to end that user's processes, and to write files that are not root's.
_ROOT_CAPABILITIES = ("CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_KILL", "CAP_SETGID", "CAP_SETUID")
# Folders that a directive hides, and what stands in for it when something of ours is there.
_HIDDEN_FOLDERS = ((("/home/", "/root/", "/run/user/"), "ProtectHome=yes", "ProtectHome=read-only"), (("/tmp/", "/var/tmp/"), "PrivateTmp=yes", None))
# What systemd makes and gives to the unit's user: below these, by its name there.
_OWN_FOLDERS = (("/var/lib/", "StateDirectory"), ("/var/log/", "LogsDirectory"), ("/run/", "RuntimeDirectory"))


def _named_programs(config: Config, services: Services) -> dict[str, str]:
    """Return the programs that commands name, each with one of those who name it."""
    found: dict[str, str] = {}
    named = [(f"service {service.name}", [word.text for word in command.run])
             for service in services.by_name.values() for _, commands, _ in service_commands(service) for command in commands]
    named += [(f"channel {channel.name}", list(channel.command)) for channel in config.notifications.channel]
    for who, words in (*named, ("secrets.command", list(config.secrets.command))):
        programs = [os.path.basename(word) for word in words[:1]]
        if programs and programs[0] in _WRAPPERS:
            programs += re.findall(r"[A-Za-z][\w.+-]*", " ".join(words[1:]), re.ASCII)
        for program in programs:
            found.setdefault(program, who)
    return found


def _user_of_unit(settings: Settings) -> str:
    """Return whom a service of the host must run as for its commands to work."""
    named = _named_programs(*settings)
    # Who writes sudo has seen to it that root is not needed.
    asks_root = "sudo" not in named and any(need.is_root and not named.keys().isdisjoint(need.programs) for need in _NEEDS)
    return "root" if asks_root or _has_users(settings.services) else "hookshot"


def _has_users(services: Services) -> bool:
    """Return whether commands run as users of their own."""
    return any(service.user or service.group for service in services.by_name.values())


def _unit_word(text: str, *, is_command: bool = False) -> str:
    """Return a text as one word of a unit file (systemd.syntax(7)); in a command, "$" stands for itself too."""
    text = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("%", "%%")
    text = text.replace("$", "$$") if is_command else text
    return f'"{text}"' if not text or re.search(r"[\s;'\"\\]", text) else text


def _folder_lines(settings: Settings, *, is_bound: bool) -> list[str]:
    """Return the directives for the folders of a system service: systemd makes those that it can; where all else is read-only, the rest is opened."""
    config, services = settings
    mine = [config.storage.data_dir, config.logging.directory, *(os.path.dirname(address.path) for address in config.server.listen if address.path)]
    of_services = [service.working_dir for service in services.by_name.values()]
    of_services += [command.working_dir for service in services.by_name.values() for _, commands, _ in service_commands(service) for command in commands]
    made, others = {}, []
    for path in filter(None, dict.fromkeys(os.path.normpath(folder) for folder in (*mine, *of_services) if folder)):
        kind, parent = next(((kind, parent) for parent, kind in _OWN_FOLDERS if path.startswith(parent) and path in mine), ("", ""))
        if kind and re.fullmatch(r"[\w./-]+", path, re.ASCII):
            made.setdefault(kind, []).append(path.removeprefix(parent))
        elif path not in ("/", "/run", "/tmp", "/var/tmp"):
            others.append(_unit_word(f"-{path}"))
    lines = [f"{kind}={' '.join(paths)}" for kind, paths in made.items()]
    lines += ["StateDirectoryMode=0700"] if "StateDirectory" in made else []
    # Kept over a restart: a socket that systemd holds may be in it.
    lines += ["RuntimeDirectoryPreserve=yes"] if "RuntimeDirectory" in made else []
    return lines + ["# Commands can write here, in their /tmp, and nowhere else.", f"ReadWritePaths={' '.join(others)}"] * (is_bound and bool(others))


def _credential_lines(settings: Settings, folder: str) -> list[str]:
    """Return LoadCredential= for every secret that must be there, if systemd is named as a source of secrets."""
    config, services = settings
    if config.secrets.source == "auto" or "systemd" not in config.secrets.source:
        return []
    names = [*config.secrets.required_secrets, *config.security.hmac_keys, *(["read_token"] if config.security.read_access == "token" else [])]
    names += [name for service in services.by_name.values() for name in service.security.hmac_keys]
    return [f"LoadCredential={name}:{_unit_word(os.path.join(folder, 'credentials', name))}" for name in dict.fromkeys(names)]


def _hardening_lines(settings: Settings, paths: Iterable[str], needs: Sequence[_Need], *, is_root: bool, is_user: bool) -> list[str]:
    """Return the restrictions that leave the configured commands working."""
    config, services = settings
    lifted = {lift for need in needs for lift in need.lifts}
    lifted |= {"ProtectProc=invisible"} if _has_users(services) else set()
    lifted |= {"SystemCallFilter=~@resources"} if any(service.nice for service in services.by_name.values()) else set()
    binds = any(0 < address.port < 1024 for address in config.server.listen if not address.path)
    granted = ["CAP_NET_BIND_SERVICE"] * binds
    lines = [f"AmbientCapabilities={' '.join(granted)}"] if binds and not (is_root or is_user) else []
    if "*" in lifted:
        return lines
    if not is_user:
        granted += [*_ROOT_CAPABILITIES, *["CAP_SYS_NICE"] * any(service.nice < 0 for service in services.by_name.values())] if is_root else []
        lines.append(f"CapabilityBoundingSet={' '.join(sorted(granted))}")
    hardening = (UNIT_SYSTEM_HARDENING * (not is_user) + UNIT_HARDENING).splitlines()
    for folders, directive, instead in () if is_user else _HIDDEN_FOLDERS:
        if any(f"{path}/".startswith(folders) for path in paths):
            hardening[hardening.index(directive)] = instead or ""
    return lines + [line for line in hardening if line and line not in lifted]


def render_unit(settings: Settings, paths: tuple[str, str], program: Sequence[str], *, is_user: bool = False) -> str:
    """Return hookshot.service for a host's manager or a user's, with the restrictions that these services' commands allow."""
    config, services = settings
    named = _named_programs(config, services)
    needs = [need for need in _NEEDS if not named.keys().isdisjoint(need.programs)]
    user = _user_of_unit(settings)
    touched = [*program, *paths, config.secrets.secrets_file, config.storage.data_dir, config.logging.directory, *config.server.tls,
               *(service.working_dir or "" for service in services.by_name.values())]
    command = " ".join(_unit_word(word, is_command=True) for word in (*program, "-c", paths[0], "-s", paths[1]))
    network = [] if is_user else ["Wants=network-online.target", "After=network-online.target"]
    lines = [f"# {name}, of {named[name]}, {need.why}." for need in needs for name in need.programs if name in named]
    lines += ["# Commands run as users of their own, which only root can bring about."] * (_has_users(services) and not is_user)
    lines += [] if is_user else [f"User={user}"]
    lines += [line for need in needs for line in need.adds if not is_user]
    lines += [] if is_user else _folder_lines(settings, is_bound=not any("*" in need.lifts for need in needs))
    lines += _credential_lines(settings, os.path.dirname(paths[0]))
    descriptors = descriptors_needed(config.server)
    lines += [f"LimitNOFILE={descriptors}:524288"] * (descriptors > 1024)
    # A user's own manager may not raise it.
    lines += [] if is_user else ["# Keys do not reach the swap.", "LimitMEMLOCK=infinity"]
    lines += _hardening_lines(settings, touched, needs, is_root=user == "root", is_user=is_user)
    return UNIT.replace("@NETWORK@\n", "".join(f"{line}\n" for line in network)).replace("@COMMAND@", command).replace("@STOP@", str(config.server.shutdown_timeout + END_S)) \
        .replace("@REST@", "\n".join(lines)).replace("@TARGET@", "default.target" if is_user else "multi-user.target")


def render_socket(settings: Settings, *, is_user: bool = False) -> str:
    """Return hookshot.socket for the addresses of server.listen; HookshotError for one that a socket unit cannot have."""
    server = settings.config.server
    lines = []
    for address in server.listen:
        host = {"": "", "localhost": "127.0.0.1"}.get(address.host, address.host)
        if address.is_awaited or not (address.path or address.port) or (host and not parse_address(host)):
            raise HookshotError("usage", f"server.listen has {address}, of which a socket unit cannot be made; write a port and an address, or a path")
        lines.append("ListenStream=" + (address.path.replace("%", "%%") or (str(address._replace(host=host)) if host else str(address.port))))
    if any(address.path for address in server.listen):
        lines += [f"SocketMode={server.socket_mode:04o}", *([] if is_user else [f"SocketUser={_user_of_unit(settings)}"]), "RemoveOnStop=yes"]
    # ":8080" is every address, IPv4 among them; "[::]:8080" is IPv6 alone.
    lines += ["BindIPv6Only=ipv6-only"] * any(":" in address.host for address in server.listen)
    return UNIT_SOCKET.replace("@LISTEN@", "\n".join(lines))


def _own_program() -> list[str]:
    """Return the interpreter and the file or archive that this command runs from."""
    return [sys.executable, os.path.abspath(getattr(__loader__, "archive", None) or __file__)]  # type: ignore[name-defined]


def _own_call() -> str:
    """Return the shell's words that call this program from here: `hookshot` where PATH leads to it."""
    interpreter, program = _own_program()

    def is_found(name: str, file: str) -> bool:
        return os.path.realpath(shutil.which(name) or "") == os.path.realpath(file)

    if is_found("hookshot", program):
        return "hookshot"
    # Another python3 may be too old.
    python = "python3" if is_found("python3", interpreter) else interpreter
    beside = os.path.relpath(program)
    return shlex.join([python, program if beside.startswith(os.pardir) else beside])


def _shown_value(name: str, value: Any) -> Any:
    """Return a configured value for a program to read; one that is or may be a secret is masked."""
    if name in (*SECRET_KEYS, *EVENTS_OF_WEBHOOK) and value:
        return value if secret_named(value) else "***"
    if isinstance(value, tuple) and not isinstance(value, ListenAddress):
        is_table = hasattr(value, "_asdict")
        return {field: _shown_value(field, entry) for field, entry in value._asdict().items()} if is_table else [_shown_value("", entry) for entry in value]
    return f"{value:04o}" if name == "socket_mode" else value if isinstance(value, str | int | bool) or value is None else str(value)


_SHOWN: dict[str, Callable[[Settings, argparse.Namespace], str]] = {
    "config": lambda settings, args: _json_text(_shown_value("", settings.config), indent=2) + "\n",
    "socket": lambda settings, args: render_socket(settings, is_user=args.user),
    "unit": lambda settings, args: render_unit(settings, _paths(args), _own_program(), is_user=args.user)}


def show(args: argparse.Namespace) -> int:
    """Print what follows from both files: the configuration in force, or a unit of systemd for this host and these services."""
    problems: list[Problem] = []
    settings = read_settings(*_paths(args), problems)
    if has_errors(problems):
        raise ConfigError(problems)
    print(_SHOWN[args.what](settings, args), end="")
    return EXIT_OK


# --- documentation

# How wide a page is where no terminal says so, and how wide its prose is at most.
_PLAIN_COLUMNS, _PROSE_COLUMNS = 80, 100
# A column is made no narrower than this; a table that is still too wide is told as a list.
_LEAST_COLUMN = 12
_HEADING, _CODE, _PLAIN = "\x1b[1m", "\x1b[36m", "\x1b[m"
# For terminals whose character set has no lines and arrows.
_DRAWN = str.maketrans("─│┌┐└┘├┤┬┴┼→←↑↓", "-|+++++++++><^v")
# Texts, so that no other command compiles them. Code comes first: what looks like a link in it is none.
_DOC_MARKS = r"`[^`]*`|\*\*|!?\[(?P<words>[^\[\]]*)\]\((?P<target>[^()\s]+)\)"
_DOC_ITEM = r" *(?:[-*]|\d+\.) +"
_DOC_BLOCK = (
    r"(?ms)(?P<code>^```.*?^```$)|(?P<comment>^<!--.*?-->$)|(?P<heading>^#+ .+?$)|(?P<table>^\|.*?$(?:\n\|[^\n]*)*)"
    rf"|(?P<prose>^[^\n]+(?:\n(?!```|<!--|#+ |\||{_DOC_ITEM})[^\n]+)*)")


class _Page(NamedTuple):
    """One page of the documentation: `text` is its Markdown, `summary` its first sentence."""

    topic: str
    title: str
    summary: str
    text: str


def _read_doc(name: str) -> str | None:
    """Return README.md or docs/NAME.md, from inside the archive or from beside this file; None if it is not there."""
    archive = getattr(__loader__, "archive", None)  # type: ignore[name-defined]
    try:
        if archive:
            return __loader__.get_data(os.path.join(archive, *name.split("/"))).decode()  # type: ignore[name-defined]
        folder = os.path.dirname(os.path.realpath(__file__))
        # An unpacked archive has byte code in a folder of its own.
        folder = os.path.dirname(folder) if os.path.basename(folder) == sys.implementation.cache_tag else folder
        with open(os.path.join(folder, name), encoding="utf-8") as file:
            return file.read()
    except OSError:
        return None


def describe_page(topic: str, text: str) -> _Page:
    """Return a page with its title and its first sentence, without links."""
    heading, _, rest = text.partition("\n")
    prose = next((block[0] for block in re.finditer(_DOC_BLOCK, rest) if block["prose"]), "")
    words = re.sub(_DOC_MARKS, lambda mark: mark["words"] or mark[0], " ".join(prose.split()))
    return _Page(topic, heading.removeprefix("# "), re.split(r"(?<=\.) (?=[A-Z`])", words)[0], text)


def read_docs() -> dict[str, _Page]:
    """Return the pages of the documentation by topic, in the order of README's list; HookshotError if they are not here."""
    readme = _read_doc("README.md")
    # What lies beside a lone hookshot.py is another project's.
    if readme is None or not readme.startswith("# Hookshot\n"):
        raise HookshotError("not_found", f"{escape_controls(_own_program()[-1])} has no documentation beside it: README.md and docs/ are in "
                                         "hookshot's repository, and in the archive that build_zipapp.py makes of it")
    texts = {topic: _read_doc(f"docs/{topic}.md") for topic in re.findall(r"^- \[[^\]]*\]\(docs/([\w-]+)\.md\)", readme, re.MULTILINE | re.ASCII)}
    return {topic: describe_page(topic, text) for topic, text in {"readme": readme, **texts}.items() if text is not None}


def docs(args: argparse.Namespace) -> int:
    """Show a page of the documentation, or which there are."""
    pages = read_docs()
    if args.topic is None:
        if args.json:
            _print_json({"topics": [{"topic": page.topic, "title": page.title, "summary": page.summary} for page in pages.values()]})
            return EXIT_OK
        _print_lines(_fit_table([["TOPIC", "WHAT IT SAYS"], *([page.topic, page.summary] for page in pages.values())], _page_columns()))
        _say("hookshot docs TOPIC shows it")
        return EXIT_OK
    topic = args.topic.lower().removeprefix("docs/").removesuffix(".md")
    if topic not in pages:
        raise HookshotError("usage", f"there is no topic {clip(escape_controls(args.topic), 64)}"
                                     f"{nearest(topic, pages) or '; hookshot docs lists those that there are'}")
    if args.json:
        _print_json(pages[topic]._asdict())
        return EXIT_OK
    lines = _render_page(pages[topic].text, _page_columns(), has_colour=wants_colour(1))
    if not _run_pager(lines):
        _print_lines(lines)
    return EXIT_OK


def _page_columns() -> int:
    return max(shutil.get_terminal_size((_PLAIN_COLUMNS, 24)).columns - 1, 20)


def _encode_lines(lines: Iterable[str], encoding: str) -> bytes:
    """Return text for a terminal of whatever character set."""
    text = "".join(f"{line}\n" for line in lines)
    try:
        return text.encode(encoding)
    except UnicodeEncodeError:
        return text.translate(_DRAWN).encode(encoding, "replace")


def _print_lines(lines: Iterable[str]) -> None:
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(_encode_lines(lines, encoding).decode(encoding), end="")


def _run_pager(lines: Sequence[str]) -> bool:
    """Show lines in $PAGER, else in less; False where stdout is no terminal, or there is no pager."""
    pager = os.environ.get("PAGER", "less -R" if shutil.which("less") else "")
    if not pager.strip() or not sys.stdout or not sys.stdout.isatty() or os.environ.get("TERM") == "dumb":
        return False
    # As git and man have it: a shell's words. A less that is not told so shows colours as text.
    process = subprocess.Popen(["sh", "-c", pager], stdin=subprocess.PIPE, env={"LESS": "R", **os.environ})
    # Ctrl-C is the pager's: it ends a search, not the reading.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    process.communicate(_encode_lines(lines, sys.stdout.encoding))
    return process.returncode not in (126, 127)  # the shell's for a program that cannot be run or is not there


def _render_page(text: str, columns: int, *, has_colour: bool) -> list[str]:
    """Return the lines of a page as a terminal shows them: prose and tables as wide as they may be, no comments, links as text."""
    lines: list[str] = []
    end = 0
    for block in re.finditer(_DOC_BLOCK, text):
        if block["comment"] is None:
            lines += [""] if "\n\n" in text[end : block.start()] else []
            lines += _DOC_KINDS[str(block.lastgroup)](block[0], columns, has_colour)
            end = block.end()
    others = dict.fromkeys(topic for mark in re.finditer(_DOC_MARKS, text) if (topic := _topic_of(mark["target"] or "")))
    return lines + (["", *_wrap(f"Other pages, in brackets above: {', '.join(others)}; hookshot docs TOPIC shows one.", columns)] if others else [])


def _topic_of(target: str) -> str | None:
    """Return the page that a link leads to, if it leads to one."""
    found = re.fullmatch(r"(?:\.\./|docs/)?([A-Za-z-]+)\.md(?:#.*)?", target)
    return found[1].lower() if found else None


def _render_code(block: str, columns: int, has_colour: bool) -> list[str]:
    """Return code as it stands, to be copied."""
    lines = block.splitlines()
    return [f"{_CODE}{line}{_PLAIN}" if line else "" for line in lines[1:-1]] if has_colour else lines


def _render_heading(block: str, columns: int, has_colour: bool) -> list[str]:
    words = re.sub(_DOC_MARKS, _render_mark, block)
    return [f"{_HEADING}{words.lstrip('# ')}{_PLAIN}" if has_colour else words]


def _render_prose(block: str, columns: int, has_colour: bool) -> list[str]:
    """Return a paragraph or an item of a list."""
    item = re.match(_DOC_ITEM, block)
    head = item[0] if item else ""
    words = re.sub(_DOC_MARKS, _render_mark, " ".join(block.removeprefix(head).split()))
    lines = _wrap(words, min(columns, _PROSE_COLUMNS) - len(head))
    return [head + lines[0], *(" " * len(head) + line for line in lines[1:])]


def _render_table(block: str, columns: int, has_colour: bool) -> list[str]:
    rows = [re.split(r"(?<!\\)\|", row.strip()[1:-1]) for row in block.splitlines() if not re.fullmatch(r"[|:\s-]+", row)]
    return _fit_table([[_render_cell(cell) for cell in row] for row in rows], columns)


def _render_cell(cell: str) -> str:
    text = re.sub(_DOC_MARKS, _render_mark, cell.strip().replace("\\|", "|"))
    return text.replace("`", "") if re.fullmatch(r"`[^`]+`(?:, `[^`]+`)*", text) else text


def _render_mark(mark: re.Match[str]) -> str:
    """Return a link, a picture or a span of code as text."""
    words, target = mark["words"], mark["target"] or ""
    if words is None:
        return mark[0].strip("*")
    if mark[0].startswith("!"):
        return f"(picture: {words})"
    if re.match("[a-z]+:", target):
        return words if target == words else f"{words} <{target}>"
    if topic := _topic_of(target):
        return words if words.lower() == topic else f"{words} [{topic}]"
    return words if target.startswith("#") or target == words else f"{words} <{target.removeprefix('../')}>"


def _wrap(text: str, columns: int) -> list[str]:
    import textwrap  # only pages are wrapped

    return textwrap.wrap(text, max(columns, 10), break_on_hyphens=False) or [""]


def _fit_table(rows: Sequence[Sequence[str]], columns: int) -> list[str]:
    """Return a table whose columns are narrowed until it fits, or a list of what it says."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    least = [min(width, max(_LEAST_COLUMN, min(max(len(word) for cell in column for word in (cell.split() or [""])), columns // 3)))
             for width, column in zip(widths, zip(*rows))]
    room = columns - 2 * (len(widths) - 1)
    if sum(least) > room:
        return [line for row in rows[1:] for line in ["", *(piece for heading, cell in zip(rows[0], row) if cell
                                                            for piece in _wrap(f"{heading}: {cell}" if heading else cell, columns))]][1:]
    while sum(widths) > room:
        widest = max((number for number, width in enumerate(widths) if width > least[number]), key=widths.__getitem__)
        widths[widest] -= 1
    lines: list[str] = []
    for row in [rows[0], ["-" * width for width in widths], *rows[1:]]:
        cells = [_wrap(cell, width) for cell, width in zip(row, widths)]
        lines += ["  ".join(piece.ljust(width) for piece, width in zip(pieces, widths)).rstrip() for pieces in itertools.zip_longest(*cells, fillvalue="")]
    return lines


_DOC_KINDS: dict[str, Callable[[str, int, bool], list[str]]] = {
    "code": _render_code, "heading": _render_heading, "table": _render_table, "prose": _render_prose}


# --- the table of commands


class CliCommand(NamedTuple):
    """One row of COMMANDS: the function, its line of help, and its arguments as argparse takes them."""

    run: Callable[[argparse.Namespace], int]
    help: str
    arguments: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] = ()


def _argument(*names: str, **options: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    return names, options


def _number(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"\d{1,10}", text, re.ASCII) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not a number from {low} to {high}")
        return int(text)

    return parse


def _id_argument(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("is empty; `hookshot history` has the ids")
    return text


def _duration_argument(text: str) -> int:
    try:
        return parse_duration(int(text) if text.isdecimal() else text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _host_argument(text: str) -> str:
    host = text[1:-1] if text[:1] + text[-1:] == "[]" else text
    try:
        if not host or (":" in host and not ipaddress.ip_address(host)):
            raise ValueError
        return parse_listen(f"[{host}]:0" if ":" in host else f"{host}:0").host
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a host; write 127.0.0.1, ::1 or a name, 0.0.0.0 or :: for every address, "
                                         "and the port with --port") from None


_JSON = _argument("--json", action="store_true", help="print JSON")
_FOLLOWS = (_argument("--wait", action=argparse.BooleanOptionalAction, default=True, help="follow it to its end (the default)"),
            _argument("--timeout", type=_duration_argument, default=7200, metavar="DURATION", help="how long to follow (default: 2h)"))
_REASON = _argument("--reason", metavar="TEXT", help="why, for those who look at it later")
_FORCE = _argument("--force", action="store_true", help="also if the lock is another's")
_TO_SERVER = (_argument("--url", metavar="URL", help="the server; else $HOOKSHOT_URL, else as config.toml says"),
              _argument("--key-file", metavar="FILE", help="file that holds the key; else $HOOKSHOT_HMAC_KEY, else the server's secrets"),
              _argument("--ca", metavar="FILE", help="authorities that the server's certificate may come from; else $HOOKSHOT_CA, else the system's"),
              _argument("--cert", metavar="FILE", help="client certificate, where the server asks for one; else $HOOKSHOT_CERT"),
              _argument("--cert-key", metavar="FILE", help="its private key, if that is not in the same file; else $HOOKSHOT_CERT_KEY"))

COMMANDS: dict[str, CliCommand] = {
    "run": CliCommand(run_server, "serve until SIGTERM or Ctrl-C (the default)", (
        _argument("--bind", type=_host_argument, metavar="HOST", help="listen on this host's address alone, instead of the file's"),
        _argument("--port", type=_number(0, 65535), help="listen on this port alone, instead of the file's"),
        _argument("--log-format", choices=("json", "pretty"), help="instead of the file's"))),
    "validate": CliCommand(validate, "check both files, secrets, directories and programs; print every problem", (_JSON,)),
    "doctor": CliCommand(doctor, "look at this host and say what is well and what is not, with what to do; 78 if anything fails", (_JSON,)),
    "reload": CliCommand(reload_server, "have the server on this host read both files, secrets and certificates again; say what changed or what is wrong", (
        _argument("--data-dir", metavar="DIR", help="of the server; else storage.data_dir of config.toml"),
        _argument("--timeout", type=_duration_argument, default=60, metavar="DURATION", help="how long to wait for the outcome (default: 60s)"), _JSON)),
    "version": CliCommand(version, "print version, Python, SQLite, platform and build digest", (_JSON,)),
    "docs": CliCommand(docs, "show a page of the documentation; without a topic, which pages there are", (
        _argument("topic", nargs="?", metavar="TOPIC", help="a page, such as configuration"), _JSON)),
    "init": CliCommand(init, "write commented sample files and a fresh key", (_argument("dir", nargs="?", default=".", metavar="DIR", help="directory to write into (default: this one)"),)),
    "keygen": CliCommand(keygen, "print a fresh key of 32 random bytes in hex"),
    "demo": CliCommand(demo, "show a deployment that succeeds and one that is rolled back; needs nothing", (_argument("--once", action="store_true", help="exit afterwards; 0 only if both ended as they should"),)),
    "deploy": CliCommand(deploy, "deploy an image and follow it to its end", (
        _argument("service", metavar="SERVICE"), _argument("image", metavar="IMAGE"), *_TO_SERVER, _JSON,
        _argument("--meta", action="append", default=[], metavar="KEY=VALUE", help="metadata (repeatable)"),
        _argument("--env", action="append", default=[], metavar="NAME=VALUE", help="environment override (repeatable)"),
        _argument("--id", help="deploy_id; the same id with the same request never runs twice"),
        _argument("--previous-image", metavar="IMAGE", help="image to roll back to instead of the last good one"),
        *_FOLLOWS, _argument("-n", "--dry-run", action="store_true", help="show what would run; nothing does"))),
    "rollback": CliCommand(rollback, "deploy the last good image of a service again and follow it to its end", (
        _argument("service", metavar="SERVICE"), *_TO_SERVER, _JSON,
        _argument("--to", metavar="IMAGE|ID", help="go back to this image, or to what this deployment deployed"), _REASON, *_FOLLOWS)),
    "retry": CliCommand(retry, "deploy again what an ended deployment deployed and follow it to its end", (
        _argument("id", type=_id_argument, metavar="ID"), *_TO_SERVER, _JSON, *_FOLLOWS)),
    "cancel": CliCommand(cancel, "end a deployment that waits or runs", (
        _argument("id", type=_id_argument, metavar="ID"), *_TO_SERVER, _JSON, _REASON)),
    "lock": CliCommand(lock, "refuse deploys of a service from now on", (
        _argument("service", metavar="SERVICE"), *_TO_SERVER, _JSON, _REASON,
        _argument("--for", type=_duration_argument, metavar="DURATION", help="how long, as 90s, 30m, 2h, 3d (default: until it is unlocked)"), _FORCE)),
    "unlock": CliCommand(unlock, "take deploys of a service again", (_argument("service", metavar="SERVICE"), *_TO_SERVER, _JSON, _FORCE)),
    "status": CliCommand(status, "show one deployment, or how the server is", (
        _argument("id", nargs="?", type=_id_argument, metavar="ID"), *_TO_SERVER, _JSON)),
    "history": CliCommand(history, "list deployments, newest first", (
        _argument("service", nargs="?", metavar="SERVICE"), *_TO_SERVER, _JSON,
        _argument("-n", "--limit", type=_number(1, 200), default=20, help="how many (1-200, default 20)"),
        _argument("--status", choices=[str(state) for state in State], help="only those in this state"))),
    "logs": CliCommand(logs, "print a deployment's log", (
        _argument("id", type=_id_argument, metavar="ID"), *_TO_SERVER, _argument("-f", "--follow", action="store_true", help="until the deployment ends"),
        _argument("--tail", type=_number(0, MAX_TAIL_LINES), metavar="N", help="only the last N lines"))),
    "services": CliCommand(services, "list the services and how they are", (
        *_TO_SERVER, _JSON, _argument("--keys", action="store_true", help="the keys that may sign for each, by name, and their last uses"))),
    "explain": CliCommand(explain, "show which gates a request passed, and which one refused it", (_argument("id", metavar="REQUEST_ID"), *_TO_SERVER, _JSON)),
    "audit": CliCommand(audit, "print the newest rows of this host's audit, or check with verify that all are as they were written", (
        _argument("verify", nargs="?", choices=("verify",), metavar="verify"), _JSON,
        _argument("-n", "--limit", type=_number(1, 100_000), default=20, help="how many rows (default 20)"),
        _argument("--service", metavar="NAME", help="only rows about this service"),
        _argument("--head", metavar="HASH", help="with verify: a hash noted earlier, which some row must have"),
        _argument("--data-dir", metavar="DIR", help="where state.db is, if config.toml cannot say it"))),
    "watch": CliCommand(watch, "show services and running deployments as they change", (*_TO_SERVER, _JSON)),
    "notify-test": CliCommand(notify_test, "send a sample notice through a channel and show what the receiver answered", (
        _argument("channel", metavar="CHANNEL"), _JSON)),
    "export": CliCommand(export_state, "write a backup of database, both files, secrets and logs; the server may go on meanwhile", (
        _argument("file", metavar="FILE", help="file to write, or - for standard output"),
        _argument("--no-secrets", dest="secrets", action="store_false", help="leave the secrets out"),
        _argument("--no-logs", dest="logs", action="store_false", help="leave the logs of deployments out"))),
    "import": CliCommand(import_state, "restore a backup, all or nothing; what was there is kept as NAME.bak", (
        _argument("file", metavar="FILE", help="file to read, or - for standard input"),
        _argument("-n", "--dry-run", action="store_true", help="check everything and say what would happen; nothing does"),
        _argument("--force", action="store_true", help="also if deployments of the present database are unfinished: they are given up"), _JSON)),
    "show": CliCommand(show, "print the configuration in force, or a systemd unit for this host and these services", (
        _argument("what", choices=tuple(_SHOWN), metavar="config|socket|unit", help="what to print"),
        _argument("--user", action="store_true", help="a unit for a user's own service manager"))),
    "sign": CliCommand(sign_body, "print the signature header of a body, for curl -H", (_argument("file", nargs="?", default="-", metavar="FILE", help="file to sign (default: -, standard input)"),
        _argument("--timestamp", action="store_true", help="the three headers of Standard Webhooks, good for security.replay_window"), *_TO_SERVER)),
}


def _add_global_options(parser: argparse.ArgumentParser, default: Any) -> None:
    parser.add_argument("-c", "--config", metavar="FILE", default=default, help=f"config.toml (default: $HOOKSHOT_CONFIG, ~/.config/hookshot/config.toml, {DEFAULT_CONFIG})")
    parser.add_argument("-s", "--services", dest="services_file", metavar="FILE", default=default,
                        help="services.toml (default: $HOOKSHOT_SERVICES, beside config.toml)")
    parser.add_argument("--log-level", choices=tuple(LEVELS), type=level_named, default=default, help="least severe line of the log")
    parser.add_argument("-v", "--verbose", dest="log_level", action="store_const", const="debug", default=default, help="same as --log-level debug")
    parser.add_argument("-q", "--quiet", dest="log_level", action="store_const", const="warning", default=default, help="same as --log-level warning")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of COMMANDS; the global options may stand before and after the command."""
    parser = argparse.ArgumentParser(prog="hookshot", description="One signed request, one deployment: run it, watch it, roll it back.",
                                     epilog="No command is the same as run. Exit statuses and files: hookshot docs cli.")
    parser.add_argument("--version", action="store_const", dest="command", const="version", help="same as the command version")
    _add_global_options(parser, None)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, command in COMMANDS.items():
        sub = commands.add_parser(name, help=command.help, description=command.help.capitalize() + ".")
        _add_global_options(sub, argparse.SUPPRESS)
        for names, options in command.arguments:
            sub.add_argument(*names, **options)
    return parser


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Return the parsed command line; SystemExit(2) after a usage message."""
    parser = make_parser()
    # As in git: `hookshot help deploy` is what some try first.
    args = parser.parse_args([*argv[1:], "--help"] if argv[:1] == ["help"] else argv)
    if args.command is None:
        args = parser.parse_args([*argv, "run"])
    if args.command == "version":
        args.json = getattr(args, "json", False)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status. Every failure is one plain sentence on stderr."""
    args = parse_arguments(sys.argv[1:] if argv is None else argv)
    if not _takes_unicode(sys.stdout):
        # What a terminal of another character set cannot show is a "?" there, not the end of the command.
        sys.stdout.reconfigure(errors="replace")
    # Before any of them reads a key.
    protect_memory()
    try:
        code = COMMANDS[args.command].run(args)
        if sys.stdout:  # None where it is closed
            sys.stdout.flush()
        return code
    except ConfigError as error:
        _print_problems(error.problems)
        return error.kind.exit
    except HookshotError as error:
        _say(f"hookshot: {error.sentence}")
        return error.kind.exit
    except KeyboardInterrupt:
        if args.command != "docs":
            _say("interrupted" + "; a deployment that was accepted goes on without you" * (args.command not in ("export", "import")))
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        _silence_stdout()  # `hookshot history | head`: the reader has enough
        return EXIT_OK
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EIO, errno.EDQUOT):
            return _report_bug(error, args)
        _silence_stdout()
        _say(f"hookshot: the output cannot be written: {error.strerror}")
        return ERRORS["cannot_write"].exit
    except Exception as error:
        return _report_bug(error, args)


def _silence_stdout() -> None:
    """Let Python's own flush at exit go nowhere: it would complain a second time."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _report_bug(error: Exception, args: argparse.Namespace) -> int:
    if args.log_level == "debug":
        raise error
    _say(f"hookshot: a bug: {type(error).__name__}: {escape_controls(str(error))}; run it again with --log-level debug and report it")
    return EXIT_BUG


# === A. ASSETS ========================================================================================================
# Texts only.

SAMPLE_HEADING = """\
# Configuration of hookshot. A line that begins with "# name = value" shows a default; remove the "# " to change it.
# Durations are seconds or "90s", "5m", "2h"; sizes are bytes or "64KB", "1MB".

"""

SAMPLE_SERVICES = """\
# Services that may be deployed. `hookshot validate` checks this file; docs/configuration.md has every key.

[[service]]
name = "example"
description = "Replace this by a service of yours"
working_dir = @WORKING_DIR@

[service.security]
# Matched against the whole image name: nothing else can be deployed.
allowed_image_pattern = 'example/app:[A-Za-z0-9._-]+'

[service.deploy]
timeout = "5m"
commands = [
  # For a container, for example:
  #   ["podman", "pull", "{{IMAGE}}"],
  #   ["systemctl", "restart", "example.service"],
  ["echo", "deploying {{IMAGE}}"],
]

[service.healthcheck]
initial_delay = 0
interval = 1
max_attempts = 5
success_threshold = 1
commands = [["true"]]
# Without any program: http = "http://127.0.0.1:8000/health"

[service.rollback]
commands = [["echo", "returning to {{PREVIOUS_IMAGE}}"]]
"""

# Directives that systemd 247 knows. Type=notify: active only when the server is ready.
UNIT = """\
# Made by `hookshot show unit` for this host and its services; make it again when they change.
[Unit]
Description=Hookshot, signed deployments
@NETWORK@
# A host that lacks something at first, such as its address, has it later.
StartLimitIntervalSec=0

[Service]
Type=notify
ExecStart=@COMMAND@ run
# Files that are wrong make a reload fail, and change nothing.
ExecReload=@COMMAND@ validate
ExecReload=/bin/sh -c 'kill -HUP $$MAINPID'
Restart=on-failure
RestartSec=5
TimeoutStartSec=300
# server.shutdown_timeout and what follows it. Commands hear of the end from hookshot, not from systemd.
TimeoutStopSec=@STOP@
KillMode=mixed
WatchdogSec=60
# No core dump, which would hold secrets.
WatchdogSignal=SIGKILL
UMask=0077
@REST@

[Install]
WantedBy=@TARGET@
"""

# What takes namespaces or root to set up, so that a user's own manager cannot have it.
UNIT_SYSTEM_HARDENING = """\
ProtectSystem=strict
ProtectHome=yes
PrivateTmp=yes
PrivateDevices=yes
PrivateMounts=yes
RemoveIPC=yes
ProtectProc=invisible
ProtectClock=yes
ProtectHostname=yes
ProtectControlGroups=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
"""

UNIT_HARDENING = """\
NoNewPrivileges=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
SystemCallArchitectures=native
SystemCallErrorNumber=EPERM
SystemCallFilter=@system-service
SystemCallFilter=~@resources
"""

UNIT_SOCKET = """\
# Made by `hookshot show socket`. systemd holds the sockets: who comes while hookshot restarts waits, and is not refused.
[Unit]
Description=Hookshot, where it listens

[Socket]
@LISTEN@
Backlog=1024
NoDelay=yes

[Install]
WantedBy=sockets.target
"""

DEMO_SERVICES = """\
[[service]]
name = "web"
working_dir = @HOME@

[service.security]
allowed_image_pattern = 'demo/web:[0-9.]+(-broken)?'

[service.deploy]
commands = [
  { name = "pull", run = ["sh", "release.sh", "pull", "{{IMAGE}}"] },
  { name = "switch", run = ["sh", "release.sh", "switch", "{{IMAGE}}"] },
]

[service.healthcheck]
initial_delay = 0
interval = 1
max_attempts = 3
success_threshold = 1
commands = [{ name = "check", run = ["sh", "release.sh", "check"] }]

[service.rollback]
commands = [{ name = "switch back", run = ["sh", "release.sh", "switch", "{{PREVIOUS_IMAGE}}"] }]
"""

DEMO_SCRIPT = """\
# Stands for podman and systemctl: "releases" an image by writing its name into a file.
case "$1" in
  pull) for layer in 1 2 3; do echo "layer $layer of $2"; sleep 0.2; done ;;
  switch) printf '%s\\n' "$2" > current; echo "now running $2" ;;
  check) read -r image < current; case "$image" in *-broken) echo "$image answers 500" >&2; exit 1 ;; esac; echo "$image answers 200" ;;
esac
"""

if __name__ == "__main__":
    sys.exit(main())
