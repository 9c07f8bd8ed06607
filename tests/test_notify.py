# SPDX-License-Identifier: MPL-2.0
"""Notices: what each kind of receiver is sent, to whom and when; that nothing is lost, told twice for nothing, or given away."""

import base64
import contextlib
import email.parser
import email.policy
import email.utils
import hashlib
import hmac
import itertools
import json
import os
import pathlib
import random
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time

import pytest

import hookshot
from hookshot import Notice, State, Store
from receivers import MailServer, Receiver
from support import PATIENCE_S, Host, make_certificates, running, service, wait_until
from test_store import claim, deploy, end, fill, opened, small_disk, submit

AT_MS = 1_790_000_000_123
MESSAGE_ID = "msg_0123456789abcdef01234567"
NOTICE = Notice("failed", "web", "app:2", "app:1", None, "d-1", "Failed", AT_MS, 'command "pull" failed: exit status 3', "deploy", 4200, "host-1", "req-1")
SIGNING_KEY = b"a key for notices, 32 bytes long"
WHSEC = "whsec_" + base64.b64encode(SIGNING_KEY).decode()
# For every backoff and pause to be over.
LATER_S = 100_000.0
# Texts that mean something to one sink or another.
HOSTILE = ("@everyone @here @channel @all @user <!channel> <!here> <@U1> <#C1> <@&7> <https://evil.example|click> [click](https://evil.example) "
           "*b* _i_ ~s~ `c` ```block``` ||spoiler|| # head > quote - list :smile: & &lt; <b>html</b> {service} %s ")
CONTROLS = "a\r\nBcc: evil@example.org\r\n\r\n.\r\nQUIT\nb\0c\x1b[31md\x07\x85e\u2028f\u202eg\u2066h"
HALF = "half \ud800 of it"


# --- arranging

def configured(text: str) -> hookshot.Notifications:
    """Return [notifications] as its file would be read."""
    problems: list[hookshot.Problem] = []
    config = hookshot.load_config(text, "config.toml", problems)
    assert problems == []
    return config.notifications


def toml(**keys) -> str:
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in keys.items())


def table(kind: str, name: str = "ours", **keys) -> str:
    """Return a [[notifications.channel]] table."""
    return "[[notifications.channel]]\n" + toml(name=name, type=kind, **keys)


def channel(kind: str, name: str = "ours", **keys) -> hookshot.Channel:
    return configured(table(kind, name, **keys)).channel[0]


def enabled(*tables: str, **keys) -> str:
    return "[notifications]\n" + toml(enabled=True, **keys) + "".join(tables)


def send(sent: hookshot.Channel, notice: Notice = NOTICE) -> hookshot.Attempt:
    return hookshot.send_notice(notice, sent, MESSAGE_ID, os.environ)


def received(kind: str, path: str = "/hook", notice: Notice = NOTICE, **keys):
    """Send one notice to a web receiver; return what came."""
    with Receiver() as receiver:
        assert send(channel(kind, url=receiver.url + path, **keys), notice).outcome == "delivered"
        (request,) = receiver.requests
    return request


def document(kind: str, notice: Notice = NOTICE, **keys):
    return json.loads(received(kind, notice=notice, **keys).body)


class Sender:
    """A notifier in this process, on a real store. Its turns are taken by hand; what it tells is in `told`."""

    def __init__(self, store: Store, text: str, secrets: dict[str, bytes] | None = None):
        self.store, self.told = store, []
        self.configure(text, secrets)
        self.notifier = hookshot.Notifier(store, lambda: self._read, self.told.append, os.environ)
        self.notifier.turn(time.monotonic())

    def configure(self, text: str, secrets: dict[str, bytes] | None = None) -> None:
        self._read = (configured(text), secrets or {})

    def turn(self, later_s: float = 0.0) -> float:
        # Whoever commits a move says so; a turn that nobody asked for does not look for moves.
        self.notifier.wake()
        return self.notifier.turn(time.monotonic() + later_s)

    def empty(self, later_s: float = LATER_S) -> None:
        """Take turns until nothing waits."""
        for _ in range(1000):
            self.turn(later_s)
            if not self.store.outbox_counts():
                return
        raise AssertionError(self.told[-3:])

    def outcomes(self, name: str = "ours") -> list[str]:
        return [event.outcome for event in self.told if isinstance(event, hookshot.Notified) and event.channel == name]

    def troubles(self) -> list[str]:
        return [event.message for event in self.told if isinstance(event, hookshot.Trouble)]

    def bugs(self) -> list[hookshot.Broken]:
        return [event for event in self.told if isinstance(event, hookshot.Broken)]


@pytest.fixture
def store(tmp_path):
    (tmp_path / "data").mkdir()
    with opened(tmp_path / "data") as store:
        os.mkdir(store.logs)
        yield store


def put(store: Store, name: str, seq: int, text: str | None = None, *, created_ms: int | None = None, message_id: str = MESSAGE_ID) -> None:
    """Put a notice into the outbox by hand."""
    text = json.dumps(NOTICE._replace(deploy_id=f"d-{seq}")) if text is None else text
    store.enqueue([hookshot.Outgoing(0, name, seq, message_id, text, hookshot.now_ms() if created_ms is None else created_ms, None)], {})


def events_in(requests) -> list[tuple[str, str]]:
    """Return (event, deployment) of the JSON that came, in order."""
    documents = [json.loads(request.body) for request in requests]
    return [(one["type"].removeprefix("deployment."), one["data"]["deploy_id"]) for one in documents]


def log_lines(host: Host, event: str) -> list[dict]:
    return [line for line in map(json.loads, host.output.read_text().splitlines()) if line["event"] == event]


# --- what is sent

def test_our_own_json_has_the_shape_of_standard_webhooks_and_a_right_signature():
    before = time.time()
    request = received("webhook", signing_key=WHSEC, token="t0ken")
    assert (request.method, request.path) == ("POST", "/hook")
    assert json.loads(request.body) == {
        "type": "deployment.failed", "timestamp": "2026-09-21T14:13:20.123Z", "data": {
            "service": "web", "image": "app:2", "previous_image": "app:1", "current_image": None, "deploy_id": "d-1", "status": "Failed",
            "error": 'command "pull" failed: exit status 3', "failure_stage": "deploy", "duration_ms": 4200, "host": "host-1", "request_id": "req-1"}}
    headers = request.headers
    assert headers["content-type"] == "application/json" and headers["authorization"] == "Bearer t0ken"
    assert headers["user-agent"] == f"hookshot/{hookshot.__version__}"
    assert headers["webhook-id"] == MESSAGE_ID and before - 1 <= int(headers["webhook-timestamp"]) <= time.time()
    content = b".".join([MESSAGE_ID.encode(), headers["webhook-timestamp"].encode(), request.body])
    wanted = base64.b64encode(hmac.new(SIGNING_KEY, content, hashlib.sha256).digest()).decode()
    assert headers["webhook-signature"] == f"v1,{wanted}"


def test_a_key_that_is_plain_text_signs_as_its_bytes():
    request = received("webhook", signing_key=SIGNING_KEY.decode())
    content = b".".join([MESSAGE_ID.encode(), request.headers["webhook-timestamp"].encode(), request.body])
    assert request.headers["webhook-signature"] == "v1," + base64.b64encode(hmac.new(SIGNING_KEY, content, hashlib.sha256).digest()).decode()


def test_without_a_key_there_is_an_id_but_no_signature():
    headers = received("webhook").headers
    assert headers["webhook-id"] == MESSAGE_ID and "webhook-signature" not in headers and "authorization" not in headers


FACTS = [("Error", 'command "pull" failed: exit status 3'), ("Stage", "deploy"), ("Image", "app:2"), ("Previous image", "app:1"), ("Took", "4.2 s"),
         ("Deployment", "d-1"), ("Host", "host-1")]
WORDS = "\n".join(f"{name}: {value}" for name, value in FACTS)


def test_slack_is_sent_plain_text_in_a_coloured_attachment():
    assert document("slack") == {
        "text": "web: app:2 failed", "mrkdwn": False, "link_names": False, "attachments": [{
            "color": "#c62828", "fallback": "web: app:2 failed", "blocks": [{
                "type": "section", "fields": [{"type": "plain_text", "text": f"{name}\n{value}", "emoji": False} for name, value in FACTS]}]}]}


def test_discord_is_sent_an_embed_that_may_mention_nobody():
    escaped = {"Error": 'command "pull" failed\\: exit status 3', "Image": "app\\:2", "Previous image": "app\\:1", "Deployment": "d\\-1", "Host": "host\\-1"}
    assert document("discord") == {"allowed_mentions": {"parse": []}, "embeds": [{
        "title": "web\\: app\\:2 failed", "color": 0xC62828, "timestamp": "2026-09-21T14:13:20.123Z",
        "fields": [{"name": name, "value": escaped.get(name, value), "inline": name not in ("Error", "Deployment")} for name, value in FACTS]}]}


def test_teams_is_sent_an_adaptive_card_of_text_runs():
    """RichTextBlock and TextRun are of schema 1.2; a workflow takes "message" with attachments of this contentType."""
    bold = {"type": "TextRun", "weight": "Bolder"}
    assert document("teams") == {"type": "message", "attachments": [{
        "contentType": "application/vnd.microsoft.card.adaptive", "contentUrl": None, "content": {
            "$schema": "http://adaptivecards.io/schemas/adaptive-card.json", "type": "AdaptiveCard", "version": "1.4", "body": [
                {"type": "RichTextBlock", "inlines": [{**bold, "text": "web: app:2 failed", "size": "Medium"}]},
                *({"type": "RichTextBlock", "inlines": [{**bold, "text": f"{name}: "}, {"type": "TextRun", "text": value}]} for name, value in FACTS)]}}]}


@pytest.mark.parametrize("chat_id", ["-1001234", "@deploys"])
def test_telegram_is_sent_text_without_a_parse_mode(chat_id):
    request = received("telegram", "", token="123:abc", chat_id=chat_id)
    assert request.path == "/bot123:abc/sendMessage"
    assert json.loads(request.body) == {"chat_id": chat_id, "text": f"web: app:2 failed\n\n{WORDS}", "link_preview_options": {"is_disabled": True}}


def test_ntfy_is_sent_json_at_its_root_with_the_topic_inside():
    request = received("ntfy", "/sub/topic", token="tk_1")
    assert request.path == "/sub/" and request.headers["authorization"] == "Bearer tk_1"
    assert json.loads(request.body) == {"topic": "topic", "title": "web: app:2 failed", "message": WORDS, "priority": 4}


def test_gotify_is_sent_plain_text_and_the_token_in_a_header():
    request = received("gotify", "/gotify", token="Atoken")
    assert request.path == "/gotify/message" and request.headers["x-gotify-key"] == "Atoken"
    assert json.loads(request.body) == {"title": "web: app:2 failed", "message": WORDS, "priority": 8,
                                        "extras": {"client::display": {"contentType": "text/plain"}}}


@pytest.mark.parametrize(("event", "headline"), [
    ("started", "web: deploying app:2"), ("succeeded", "web: app:2 is live"), ("failed", "web: app:2 failed"),
    ("rolled_back", "web: app:2 failed, back on app:1"), ("rollback_failed", "web: app:2 failed, and so did the rollback"),
    ("cancelled", "web: app:2 was cancelled"), ("test", "hookshot on host-1: this is a test")])
def test_every_event_has_its_headline_colour_and_priority(event, headline):
    notice = NOTICE._replace(event=event)
    assert hookshot.headline(notice) == headline
    assert re.fullmatch("#[0-9a-f]{6}", document("slack", notice)["attachments"][0]["color"])
    assert 1 <= json.loads(received("ntfy", "/t", notice).body)["priority"] <= 5


@pytest.mark.parametrize(("kind", "keys", "wanted"), [
    ("slack", {"url": "https://example.net/x"}, "slack"), ("discord", {"url": "https://hooks.slack.com/x"}, "discord"),
    *(("webhook", {"url": "https://hooks.slack.com/services/T/B/x", "format": name}, name) for name in ("json", "slack", "discord", "teams")),
    *(("webhook", {"url": url}, wanted) for url, wanted in (
        ("https://hooks.slack.com/services/T0/B0/x", "slack"), ("https://hooks.slack-gov.com/services/T0/B0/x", "slack"),
        ("https://discord.com/api/webhooks/1/x", "discord"), ("https://discordapp.com/api/webhooks/1/x", "discord"),
        ("https://ptb.discord.com/api/v10/webhooks/1/x", "discord"), ("https://discord.com/api/webhooks/1/x/slack", "slack"),
        ("https://contoso.webhook.office.com/webhookb2/x", "teams"), ("https://prod-1.westeurope.logic.azure.com:443/workflows/x", "teams"),
        ("https://x.y.environment.api.powerplatform.com:443/powerautomate/x", "teams"), ("https://example.net/hooks.slack.com/x", "json"),
        ("http://hooks.slack.com/services/x", "json"), ("https://hooks.slack.com.evil.example/x", "json"),
        ("https://evil-discord.com/api/webhooks/1/x", "json"), ("https://webhook.office.com.example/x", "json"),
        ("https://example.net/?x=.logic.azure.com/", "json")))])
def test_the_format_is_the_one_named_else_the_one_that_the_url_tells(kind, keys, wanted):
    assert hookshot.format_of(channel(kind, **keys)) == wanted


# --- hostile texts

HOSTILES = {"markup": HOSTILE, "controls": CONTROLS, "half": HALF, "long": "x" * 100_000, "wide": "😀" * 5000, "ats": "@" * 5000, "nul": "\0" * 5000,
            "quotes": "\"\\" * 5000, "surrogate end": "y" * 999 + "\udfff"}
each_hostile = pytest.mark.parametrize("text", [pytest.param(text, id=name) for name, text in HOSTILES.items()])


def hostile_notice(text: str) -> Notice:
    """Every text of a notice that a caller or a command can choose; images have 512 characters at most (WIRE)."""
    return NOTICE._replace(event="rolled_back", image=text[:512], previous_image=text[-512:], error=hookshot.clip(text, 1000), failure_stage=text[:512])


def texts_in(value):
    """Yield every text of a JSON document."""
    if isinstance(value, str):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from texts_in(part)


def is_harmless(text: str) -> bool:
    """Return whether a text has no control character but line ends, no bidirectional override and no half of a character."""
    return not re.search("[\0-\t\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]", text)


@each_hostile
def test_slack_reads_no_mention_and_no_markup_whatever_is_told(text):
    sent = document("slack", hostile_notice(text))
    (attachment,), (block,) = sent["attachments"], sent["attachments"][0]["blocks"]
    assert len(block["fields"]) <= 10 and all(field["type"] == "plain_text" and 1 <= len(field["text"]) <= 2000 for field in block["fields"])
    for shown in (sent["text"], attachment["fallback"]):
        assert not re.search("[<>]|&(?!amp;|lt;|gt;)|@(?!\u200b)", shown) and "\n" not in shown and len(shown) <= 4000
    assert sent["mrkdwn"] is False and sent["link_names"] is False and all(map(is_harmless, texts_in(sent)))


@each_hostile
def test_discord_reads_no_mention_and_no_markup_and_its_limits_are_kept(text):
    sent = document("discord", hostile_notice(text))
    (embed,) = sent["embeds"]
    assert sent["allowed_mentions"] == {"parse": []} and "content" not in sent
    shown = [embed["title"], *(field["value"] for field in embed["fields"])]
    assert len(embed["title"].encode("utf-16-le")) <= 2 * 256 and len(embed["fields"]) <= 25
    assert all(1 <= len(field["value"].encode("utf-16-le")) <= 2 * 1024 and len(field["name"]) <= 256 for field in embed["fields"])
    assert sum(len(one) for one in (*shown, *(field["name"] for field in embed["fields"]))) <= 6000
    for one in shown:
        assert is_harmless(one) and not re.search(r"[*_~`|>#()\[\]<@:+-]", re.sub(r"\\.", "", one)), one


@each_hostile
def test_teams_reads_text_runs_and_the_card_stays_small(text):
    request = received("teams", notice=hostile_notice(text))
    blocks = json.loads(request.body)["attachments"][0]["content"]["body"]
    assert {block["type"] for block in blocks} == {"RichTextBlock"} and {run["type"] for block in blocks for run in block["inlines"]} == {"TextRun"}
    assert all(map(is_harmless, texts_in(blocks))) and len(request.body) <= 28 * 1024


@each_hostile
def test_telegram_gets_at_most_4096_characters_without_mentions(text):
    sent = json.loads(received("telegram", "", hostile_notice(text), token="1:a", chat_id="1").body)
    assert set(sent) == {"chat_id", "text", "link_preview_options"} and is_harmless(sent["text"])
    assert len(sent["text"].encode("utf-16-le")) <= 2 * 4096 and not re.search("@(?!\u200b|…)", sent["text"])


@each_hostile
def test_ntfy_gets_a_message_that_is_no_attachment(text):
    request = received("ntfy", "/t", hostile_notice(text))
    sent = json.loads(request.body)
    assert set(sent) == {"topic", "title", "message", "priority"} and sent["topic"] == "t" and "\n" not in sent["title"]
    assert len(sent["message"].encode()) <= 4096 and len(request.body) <= 8192 and is_harmless(sent["title"]) and is_harmless(sent["message"])


@each_hostile
def test_gotify_shows_what_it_gets_as_plain_text(text):
    sent = json.loads(received("gotify", "", hostile_notice(text), token="a").body)
    assert sent["extras"] == {"client::display": {"contentType": "text/plain"}} and "\n" not in sent["title"]
    assert is_harmless(sent["title"]) and is_harmless(sent["message"])


@each_hostile
def test_json_carries_texts_as_they_are(text):
    notice = hostile_notice(text)
    sent = document("webhook", notice, signing_key=WHSEC)["data"]
    assert sent["error"] == notice.error.encode("utf-8", "replace").decode() and sent["service"] == "web"


@each_hostile
def test_a_mail_has_no_header_and_no_line_that_a_text_brought_along(text):
    with MailServer() as server:
        sent = mail_channel(server, recipients=["ops@example.org", "dev@example.org"])
        assert send(sent, hostile_notice(text)).outcome == "delivered"
        (mail,) = server.mails
        assert len([line for line in server.commands if line.upper().startswith(b"MAIL")]) == 1
    parsed = parse(mail.content)
    assert mail.recipients == ("ops@example.org", "dev@example.org")
    assert set(parsed.keys()) == {"Subject", "From", "To", "Date", "Message-ID", "Auto-Submitted", "Content-Type", "Content-Transfer-Encoding", "MIME-Version"}
    assert len(parsed["Subject"]) <= 200 and is_harmless(parsed["Subject"]) and is_harmless(parsed.get_content().replace("\r\n", "\n"))
    assert mail.content.isascii() and max(map(len, mail.content.splitlines())) <= 998


def test_what_a_failing_command_says_is_told_in_every_sink_and_is_harmless(tmp_path):
    """The whole way: a command whose name and output are hostile, in a real deployment."""
    with contextlib.ExitStack() as ends:
        receivers = {kind: ends.enter_context(Receiver()) for kind in ("webhook", "slack", "discord", "teams", "telegram", "ntfy", "gotify")}
        server = ends.enter_context(MailServer())
        extra = {"telegram": {"token": "1:a", "chat_id": "1"}, "gotify": {"token": "a"}}
        tables = [table(kind, kind, url=f"{receiver.url}{'/t' * (kind != 'telegram')}", **extra.get(kind, {})) for kind, receiver in receivers.items()]
        tables.append(table("email", "mail", server=server.address, security="none", sender="a@example.org", recipients=["b@example.org"]))
        program = tmp_path / "@everyone <!channel> `x`"
        program.write_text("#!/bin/sh\nprintf '@here <@U1> *b*\\r\\nBcc: x@example.org\\n\\033[31m' >&2; exit 3")
        program.chmod(0o755)
        command = json.dumps([str(program)]).replace("@", "\\u0040")     # "@" alone is the host's folder
        host = ends.enter_context(running(tmp_path, service(command), enabled(*tables)))
        record = host.wait(host.deploy("app:2"))
        assert record["status"] == "Failed"
        got = {kind: json.loads(receiver.wait_for(1)[0].body) for kind, receiver in receivers.items()}
        (mail,) = server.wait_for(1)
    error = record["error"]
    assert "@everyone <!channel>" in error
    assert got["webhook"]["data"]["error"] == error and got["webhook"]["data"]["host"] == socket.gethostname()
    assert all(map(is_harmless, texts_in([got[kind] for kind in ("slack", "discord", "teams", "telegram", "ntfy", "gotify")])))
    assert "@everyone" not in got["telegram"]["text"] and "<!channel>" not in got["slack"]["text"]
    assert r"\@everyone \<!channel\> \`x\`" in got["discord"]["embeds"][0]["fields"][0]["value"]
    assert set(parse(mail.content).keys()).isdisjoint({"Bcc"})


# --- mail

def parse(content: bytes):
    return email.parser.BytesParser(policy=email.policy.default).parsebytes(content)


def mail_channel(mail_server: MailServer, **keys) -> hookshot.Channel:
    return channel("email", **{"server": mail_server.address, "sender": "hookshot@example.org", "recipients": ["ops@example.org"], "security": "none"} | keys)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def trusted(certificates, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates.ca))
    return certificates


def test_a_mail_says_what_happened():
    with MailServer() as server:
        assert send(mail_channel(server)) == hookshot.Attempt("delivered", "accepted")
        (mail,) = server.mails
    parsed = parse(mail.content)
    assert (mail.sender, mail.recipients, mail.was_tls, mail.user) == ("hookshot@example.org", ("ops@example.org",), False, None)
    assert (parsed["Subject"], parsed["From"], parsed["To"]) == ("web: app:2 failed", "hookshot@example.org", "ops@example.org")
    assert parsed["Auto-Submitted"] == "auto-generated" and parsed["Message-ID"] == f"<{MESSAGE_ID}@host-1>"
    assert email.utils.parsedate_to_datetime(parsed["Date"]).timestamp() == AT_MS // 1000
    assert parsed.get_content().replace("\r\n", "\n") == f"web: app:2 failed\n\n{WORDS}\n"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
@pytest.mark.parametrize("security", ["starttls", "tls"])
def test_a_mail_goes_over_tls_with_a_login(trusted, security, host):
    with MailServer(tls=(trusted.server, trusted.server_key), implicit=security == "tls", users={"bot": "passw0rd"}) as server:
        sent = mail_channel(server, server=f"{host}:{server.port}", security=security, username="bot", password="passw0rd")
        assert send(sent).outcome == "delivered"
        (mail,) = server.mails
        assert mail.was_tls and mail.user == "bot"
        if security == "starttls":
            assert server.commands.index(b"STARTTLS\r\n") < min(number for number, line in enumerate(server.commands) if line.upper().startswith(b"AUTH"))


def test_a_login_that_is_refused_is_called_so(trusted):
    with MailServer(tls=(trusted.server, trusted.server_key), users={"bot": "passw0rd"}) as server:
        attempt = send(mail_channel(server, security="starttls", username="bot", password="another"))
        assert attempt == hookshot.Attempt("refused", "the login was refused with SMTP 535") and server.mails == ()


def test_a_port_that_speaks_something_else_is_called_so():
    with MailServer() as mail:
        plain = hookshot.send_post(hookshot.Post(f"http://{mail.address}/", {}, b"{}"), 5, allow_private=True)
        tls = hookshot.send_post(hookshot.Post(f"https://{mail.address}/", {}, b"{}"), 5, allow_private=True)
    assert (plain.outcome, plain.words) == ("retried", "it does not speak HTTP on this port")
    assert (tls.outcome, tls.words) == ("retried", "it does not speak TLS on this port")


@pytest.mark.parametrize("security", ["starttls", "tls"])
def test_a_mail_server_that_is_not_trusted_gets_nothing(certificates, monkeypatch, security):
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates.other_ca))
    with MailServer(tls=(certificates.server, certificates.server_key), implicit=security == "tls", users={"bot": "passw0rd"}) as server:
        attempt = send(mail_channel(server, security=security, username="bot", password="passw0rd"))
        assert attempt.outcome == "retried" and "certificate is not trusted" in attempt.words
        assert server.mails == () and not any(line.upper().startswith(b"AUTH") for line in server.commands)


def test_a_mail_server_without_starttls_gets_neither_the_password_nor_the_mail():
    with MailServer(users={"bot": "passw0rd"}) as server:
        attempt = send(mail_channel(server, security="starttls", username="bot", password="passw0rd"))
        assert attempt.outcome == "refused" and "does not offer" in attempt.words
        assert server.mails == () and not any(line.upper().startswith((b"AUTH", b"MAIL")) for line in server.commands)


@pytest.mark.parametrize(("refusals", "outcome", "words", "mails"), [
    ({"CONNECT": "554 no"}, "refused", "the connection was refused with SMTP 554", 0),
    ({"CONNECT": "421 busy"}, "retried", "the connection was refused with SMTP 421", 0),
    ({"CONNECT": "close"}, "retried", "", 0), ({"CONNECT": "reset"}, "retried", "", 0), ({"EHLO": "close"}, "retried", "", 0),
    ({"MAIL": "550 a secret"}, "refused", "the mail was refused with SMTP 550", 0), ({"MAIL": "451 later"}, "retried", "the mail was refused with SMTP 451", 0),
    ({"DATA": "451 later"}, "retried", "SMTP 451", 0), ({"BODY": "552 too large"}, "refused", "SMTP 552", 0), ({"BODY": "452 later"}, "retried", "SMTP 452", 0),
    ({"BODY": "close"}, "retried", "", 0), ({"RCPT a@example.org": "550 unknown"}, "delivered", "accepted, but for 1 recipients", 1),
    ({"RCPT": "550 unknown"}, "refused", "every recipient was refused with SMTP 550", 0),
    ({"RCPT": "450 greylisted"}, "retried", "every recipient was refused with SMTP 450", 0),
    ({"RCPT": ["550 unknown", "450 later"]}, "retried", "SMTP 450", 0), ({"QUIT": "close"}, "delivered", "accepted", 1),
    ({"QUIT": "reset"}, "delivered", "accepted", 1), ({"QUIT": "500 what"}, "delivered", "accepted", 1)], ids=str)
def test_what_a_mail_server_answers_decides(refusals, outcome, words, mails):
    with MailServer(refuse=refusals) as server:
        attempt = send(mail_channel(server, recipients=["a@example.org", "b@example.org"]))
        assert attempt.outcome == outcome and words in attempt.words and "secret" not in attempt.words
        assert len(server.mails) == mails


def test_a_wrong_password_is_final_and_a_login_nobody_asks_for_too():
    with MailServer(users={"bot": "passw0rd"}) as server:
        attempt = send(mail_channel(server, username="bot", password="wr0ng"))
        assert attempt.outcome == "refused" and "535" in attempt.words and "wr0ng" not in attempt.words
    with MailServer() as server:
        assert send(mail_channel(server, username="bot", password="wr0ng")).outcome == "refused"
        assert server.mails == ()


@pytest.mark.parametrize("stage", ["CONNECT", "MAIL", "BODY"])
def test_a_mail_server_that_hangs_is_a_failed_attempt(stage):
    with MailServer(refuse={stage: "hang"}) as server:
        assert send(mail_channel(server, timeout=1)) == hookshot.Attempt("retried", "no answer within 1 s", was_reached=False)


def test_a_mail_server_that_drips_is_given_up_at_the_deadline():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        over = threading.Event()

        def drip() -> None:
            link, _ = listener.accept()
            with link, contextlib.suppress(OSError):
                for byte in itertools.cycle(b"220-still here\r\n"):
                    if over.wait(0.05):
                        return
                    link.sendall(bytes([byte]))

        dripper = threading.Thread(target=drip)
        dripper.start()
        sent = channel("email", server=f"127.0.0.1:{listener.getsockname()[1]}", sender="a@example.org", recipients=["b@example.org"], security="none", timeout=1)
        try:
            assert send(sent).words == "no answer within 1 s"
        finally:
            over.set()
            dripper.join()


def test_a_mail_server_that_hangs_at_the_farewell_has_the_mail_and_gets_it_once(store):
    with MailServer(refuse={"QUIT": "hang"}) as server:
        sender = Sender(store, enabled(table("email", server=server.address, sender="a@example.org", recipients=["b@example.org"], security="none", timeout=1)))
        deploy(store, deploy_id="d-1")
        sender.empty()
        assert sender.outcomes() == ["delivered"] and len(server.mails) == 1 and sender.bugs() == []


def test_greylisting_only_delays_a_mail(store):
    with MailServer(refuse={"RCPT": ["451 greylisted"] * 2}) as server:
        sender = Sender(store, enabled(table("email", server=server.address, sender="a@example.org", recipients=["b@example.org"], security="none")))
        deploy(store, deploy_id="d-1")
        sender.empty()
        assert sender.outcomes() == ["retried", "retried", "delivered"] and len(server.mails) == 1


# --- commands

def exec_channel(script: str, **keys) -> hookshot.Channel:
    return channel("exec", command=["sh", "-c", script], **keys)


def test_a_command_gets_the_notice_on_its_input_and_in_its_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("HOOKSHOT_HMAC_KEY", "canary-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-aws")
    monkeypatch.setenv("NOTIFY_SOCKET", "/canary")
    hostile = NOTICE._replace(error=HOSTILE + CONTROLS + HALF)
    assert send(exec_channel(f"cat > {tmp_path}/in; env -0 > {tmp_path}/env; pwd > {tmp_path}/cwd"), hostile) == hookshot.Attempt("delivered", "exit status 0")
    told = json.loads((tmp_path / "in").read_text())
    assert told == {**hookshot.told_of(hostile), "error": hostile.error.replace("\ud800", "?")}
    env = dict(entry.partition("=")[::2] for entry in (tmp_path / "env").read_text().split("\0") if entry)
    assert env["HOOKSHOT_EVENT"] == "failed" and env["HOOKSHOT_MESSAGE"] == "web: app:2 failed" and env["HOOKSHOT_DEPLOY_ID"] == "d-1"
    assert "HOOKSHOT_ERROR" not in env and "HOOKSHOT_CURRENT_IMAGE" not in env      # one has a NUL byte, the other is nothing
    assert "canary" not in str(env) and (tmp_path / "cwd").read_text() == "/\n"
    ours = {f"HOOKSHOT_{name.upper()}" for name in (*Notice._fields, "message")}
    assert {name for name in env if not hookshot.SAFE_ENV.fullmatch(name)} - {"_", "PWD", "SHLVL", "OLDPWD"} <= ours


@pytest.mark.parametrize("value", [HOSTILE, "a\r\nb", HALF])
def test_a_text_in_the_environment_of_a_command_is_only_a_text(tmp_path, value):
    assert send(exec_channel(f'printf %s "$HOOKSHOT_ERROR" > {tmp_path}/error'), NOTICE._replace(error=value)).outcome == "delivered"
    assert (tmp_path / "error").read_bytes().decode() == value.replace("\ud800", "?")


@pytest.mark.parametrize(("script", "outcome", "words"), [
    ("exit 0", "delivered", "exit status 0"), ("exit 1", "retried", "exit status 1"), ("kill -9 $$", "retried", "exit status -9"),
    ("exec 0<&-; exit 0", "delivered", "exit status 0")])
def test_the_exit_status_of_a_command_decides(script, outcome, words):
    assert send(exec_channel(script)) == hookshot.Attempt(outcome, words)


def test_a_program_that_is_not_there_is_tried_again():
    attempt = send(channel("exec", command=["/nonexistent/program"]))
    assert attempt.outcome == "retried" and "cannot be started" in attempt.words


def test_a_command_that_does_not_end_is_killed_with_its_whole_group(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    # Whoever of the group lives holds the other end.
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    attempt = send(exec_channel(f"exec 9> {fifo}; (sleep 600) & echo up >&9; sleep 600", timeout=1))
    assert attempt == hookshot.Attempt("retried", "did not end within 1 s", was_reached=False)
    with open(reader, "rb") as file:
        assert file.read() == b"up\n"       # and then the end: nobody is left to write


# --- who is told of what

def told_events(store, text: str, *plays: tuple[str, State]) -> list[tuple[str, str]]:
    """Play deployments, (service, end); return what the receiver was told, (service, event)."""
    with Receiver() as receiver:
        sender = Sender(store, enabled(text.replace("URL", receiver.url)))
        for name, state in plays:
            deploy(store, name, state)
            sender.empty()
        return [(json.loads(request.body)["data"]["service"], json.loads(request.body)["type"].removeprefix("deployment.")) for request in receiver.requests]


ENDS = (State.SUCCEEDED, State.FAILED, State.ROLLED_BACK, State.ROLLBACK_FAILED, State.CANCELLED)


@pytest.mark.parametrize("events", [["started"], ["failed"], ["cancelled", "succeeded"], ["rolled_back", "rollback_failed"], [*hookshot.NOTICE_EVENTS]])
def test_a_channel_is_told_of_its_events_alone(store, events):
    told = told_events(store, table("webhook", url="URL", events=events), *(("web", state) for state in ENDS))
    every = [event for state in ENDS for event in ("started", hookshot.COUNT_OF_STATE[state])]
    assert [event for _, event in told] == [event for event in every if event in events]


def test_what_moves_while_a_turn_ends_is_told_at_once(tmp_path):
    """The turn has looked already, and has found that nothing is to be done for a minute."""
    moved = []

    class Late(Store):
        def next_notices(self, channel, limit):
            found = super().next_notices(channel, limit)
            if not moved:
                moved.append(deploy(self, "web", State.SUCCEEDED).deploy_id)
                sender.notifier.wake()
            return found

    with Receiver() as receiver, contextlib.closing(Late(str(tmp_path))) as store:
        sender = Sender.__new__(Sender)
        sender.store, sender.told = store, []
        sender.configure(enabled(table("webhook", url=receiver.url)))
        sender.notifier = hookshot.Notifier(store, lambda: sender._read, sender.told.append, os.environ)
        thread = threading.Thread(target=sender.notifier.run)
        thread.start()
        try:
            assert events_in(receiver.wait_for(1)) == [("succeeded", *moved)]
        finally:
            sender.notifier.stop()
            thread.join()


def test_a_channel_is_told_of_every_end_unless_it_says_otherwise(store):
    told = told_events(store, table("webhook", url="URL"), *(("web", state) for state in ENDS))
    assert [event for _, event in told] == ["succeeded", "failed", "rolled_back", "rollback_failed", "cancelled"]


def test_a_channel_is_told_of_its_services_alone(store):
    told = told_events(store, table("webhook", url="URL", services=["api", "db"]), *((name, State.FAILED) for name in ("web", "api", "db", "api-2")))
    assert told == [("api", "failed"), ("db", "failed")]


def test_only_changes_tells_red_once_worse_once_and_green_once(store):
    told = told_events(
        store, table("webhook", url="URL", only_changes=True, events=[*hookshot.NOTICE_EVENTS]),
        ("web", State.SUCCEEDED), ("web", State.FAILED), ("web", State.ROLLED_BACK), ("api", State.SUCCEEDED), ("web", State.CANCELLED),
        ("web", State.ROLLBACK_FAILED), ("web", State.FAILED), ("web", State.ROLLBACK_FAILED), ("api", State.FAILED), ("web", State.SUCCEEDED),
        ("web", State.SUCCEEDED), ("web", State.FAILED))
    assert told == [("web", "failed"), ("web", "rollback_failed"), ("api", "failed"), ("web", "succeeded"), ("web", "failed")]


def test_only_changes_goes_on_after_a_restart(tmp_path):
    text = table("webhook", url="URL", only_changes=True)
    for play, wanted in ((State.FAILED, [("web", "failed")]), (State.FAILED, []), (State.SUCCEEDED, [("web", "succeeded")]), (State.SUCCEEDED, [])):
        with opened(tmp_path) as store:
            assert told_events(store, text, ("web", play)) == wanted


def test_only_changes_is_no_matter_to_the_other_channels(store):
    with Receiver() as changes, Receiver() as everything:
        sender = Sender(store, enabled(table("webhook", "a", url=changes.url, only_changes=True), table("webhook", "b", url=everything.url)))
        for _ in range(3):
            deploy(store, state=State.FAILED)
        sender.empty()
        assert (len(changes.requests), len(everything.requests)) == (1, 3)


# --- [notifications.webhook]

WEBHOOK_ENDS = {"on_success": {State.SUCCEEDED}, "on_failure": {State.FAILED, State.ROLLBACK_FAILED}, "on_rollback": {State.ROLLED_BACK}}


def test_each_url_of_the_webhook_table_is_told_of_its_own(store):
    with contextlib.ExitStack() as ends:
        receivers = {name: ends.enter_context(Receiver()) for name in WEBHOOK_ENDS}
        sender = Sender(store, enabled("[notifications.webhook]\n" + toml(**{name: receiver.url for name, receiver in receivers.items()}, signing_key=WHSEC)))
        for state in ENDS:
            deploy(store, state=state)
        sender.empty()
        for name, states in WEBHOOK_ENDS.items():
            requests = receivers[name].requests
            assert {json.loads(request.body)["data"]["status"] for request in requests} == states and len(requests) == len(states)
            assert all("webhook-signature" in request.headers for request in requests)
            assert sender.outcomes(f"webhook.{name}") == ["delivered"] * len(states)


@pytest.mark.parametrize(("use_secrets", "secrets", "wanted"), [(True, True, "secret"), (True, False, "file"), (False, True, "file")])
def test_use_secrets_takes_urls_from_secrets_where_they_are(store, use_secrets, secrets, wanted):
    with Receiver() as secret, Receiver() as file:
        text = enabled("[notifications.webhook]\n" + toml(on_failure=file.url, use_secrets=use_secrets, format="slack"))
        sender = Sender(store, text, {"webhook_on_failure": f"{secret.url}\n".encode()} if secrets else {})
        deploy(store, state=State.FAILED)
        sender.empty()
        assert {name: len(receiver.requests) for name, receiver in (("secret", secret), ("file", file))} == {"secret": 0, "file": 0} | {wanted: 1}
        assert "attachments" in json.loads((secret.requests + file.requests)[0].body)


@pytest.mark.parametrize("how", ["restart", "SIGHUP"])
def test_what_is_switched_off_keeps_nothing_and_tells_no_history_when_it_is_switched_on(tmp_path, how):
    with Receiver() as receiver:
        text = enabled(table("webhook", url=receiver.url, events=[*hookshot.NOTICE_EVENTS]))

        def set_to(new: str) -> None:
            host.write(service(), new)
            if how == "restart":
                assert host.stop() == 0
                host.start()
            else:
                before = len(log_lines(host, "reloaded"))
                host.process.send_signal(signal.SIGHUP)
                wait_until(lambda: len(log_lines(host, "reloaded")) > before)

        def outbox() -> dict[str, str]:
            with contextlib.closing(sqlite3.connect(host.data / "state.db")) as db:
                # What is delivered is removed after the answer.
                wait_until(lambda: db.execute("SELECT count(*) FROM outbox").fetchone() == (0,))
                return dict(db.execute("SELECT name, value FROM marks"))

        with running(tmp_path, service(), text.replace("enabled = true", "enabled = false")) as host:
            host.wait(host.deploy(deploy_id="before"))
            assert receiver.requests == () and outbox()["notified"] == ""
            set_to(text)
            wait_until(lambda: outbox()["notified"])
            host.wait(host.deploy(deploy_id="on"))
            assert events_in(receiver.wait_for(2)) == [("started", "on"), ("succeeded", "on")]
            set_to(text.replace("enabled = true", "enabled = false"))
            wait_until(lambda: outbox()["notified"] == "")
            host.wait(host.deploy(deploy_id="between"))
            set_to(text)
            wait_until(lambda: outbox()["notified"])
            host.wait(host.deploy(deploy_id="again"))
            assert events_in(receiver.wait_for(4))[2:] == [("started", "again"), ("succeeded", "again")]


def test_what_a_restart_finds_interrupted_is_told_although_notices_were_off_until_now(tmp_path):
    with Receiver() as receiver:
        services = service('["sh", "-c", "echo up > up; exec sleep 600"]', head='recovery = "fail"') + service(name="api")
        with running(tmp_path, services) as host:
            host.wait(host.deploy(deploy_id="before", service="api"))
            host.deploy(deploy_id="d-1")
            wait_until(lambda: (tmp_path / "up").exists())
            host.kill()
            host.write(services, enabled(table("webhook", url=receiver.url, events=[*hookshot.NOTICE_EVENTS])))
            host.start()
            assert events_in(receiver.wait_for(1)) == [("failed", "d-1")]
            assert host.record("d-1")["error"] == json.loads(receiver.requests[0].body)["data"]["error"]


# --- problems of the configuration

CANARY_URL = "https://hooks.example.net/canary-path-1234"


def problems_of(tmp_path, text: str, secrets: str = "") -> list[str]:
    """Return what `validate` finds, with what it says must not be said."""
    host = Host(tmp_path, service(), text, secrets=secrets)
    done = host.cli("validate")
    printed = done.stdout + done.stderr
    assert "canary" not in printed and "Traceback" not in printed
    assert "config.toml" in printed
    return printed.splitlines()


REQUIRED = [(kind, name) for kind, row in hookshot.CHANNEL_TYPES.items() for name in row.required]
GOOD = {"url": "https://example.net/x", "token": "t0ken", "chat_id": "1", "server": "mail.example.org:25", "sender": "a@example.org",
        "recipients": ["b@example.org"], "command": ["true"], "format": "json", "signing_key": WHSEC, "security": "tls", "username": "u",
        "password": "p", "allow_private": True}


def load_problems(text: str) -> list[str]:
    problems: list[hookshot.Problem] = []
    hookshot.load_config(text, "config.toml", problems)
    return [str(problem) for problem in problems]


@pytest.mark.parametrize("kind", hookshot.CHANNEL_TYPES)
def test_a_type_with_every_key_it_may_have_is_right(kind):
    row = hookshot.CHANNEL_TYPES[kind]
    assert load_problems(table(kind, **{name: GOOD[name] for name in (*row.required, *row.optional)})) == []


@pytest.mark.parametrize(("kind", "name"), REQUIRED)
def test_a_key_that_its_type_needs_is_missed(kind, name):
    keys = {other: GOOD[other] for other in hookshot.CHANNEL_TYPES[kind].required if other != name}
    (problem,) = load_problems(table(kind, **keys))
    assert "config.toml" in problem and f"notifications.channel[0].{name}" in problem and f"is required by type {kind}" in problem


@pytest.mark.parametrize("kind", hookshot.CHANNEL_TYPES)
def test_a_key_without_effect_is_a_problem(kind):
    row = hookshot.CHANNEL_TYPES[kind]
    others = sorted(GOOD.keys() - {*row.required, *row.optional})
    found = load_problems(table(kind, **{name: GOOD[name] for name in (*row.required, *others)}))
    assert len(found) == len(others)
    assert all(any(f"channel[0].{name}" in problem and f"no effect in a channel of type {kind}" in problem for problem in found) for name in others)


@pytest.mark.parametrize(("text", "path", "words"), [
    (table("webhook", url="x") + table("webhook", url="x"), "notifications.channel", "two channels are named ours"),
    (table("pager", url="x"), "notifications.channel[0].type", "pager"), (table("webhook", url="x", format="xml"), "channel[0].format", "xml"),
    (table("webhook", url="x", events=["exploded"]), "channel[0].events", "exploded"), (table("webhook", url="x", events=[]), "channel[0].events", ""),
    (table("webhook", "a b", url="x"), "channel[0].name", ""), (table("webhook", url="x", urls="y"), "channel[0].urls", "did you mean url"),
    (table("webhook", url="x", timeout=0), "channel[0].timeout", ""), (table("webhook", url="x", timeout="2m"), "channel[0].timeout", ""),
    (table("email", server="mail", sender="a@b", recipients=["c@d"]), "channel[0].server", ""),
    (table("email", server="mail:25", sender="a@b\r\nX: y", recipients=["c@d"]), "channel[0].sender", ""),
    (table("email", server="mail:25", sender="a@b", recipients=["c <c@d>"]), "channel[0].recipients", ""),
    *((table("email", server="mail:25", sender="a@b", recipients=[f"c{character}@d"]), "channel[0].recipients", "mail address") for character in " \t\r\n\"(),:;<>@[\\]\u00e9"),
    (table("telegram", token="x", chat_id="a b"), "channel[0].chat_id", ""), ("[notifications]\nchannel = [1]\n", "channel[0]", "is not a table"),
    ("[notifications]\nretry_for = 5\n", "notifications.retry_for", ""), ("[notifications.webhook]\non_failed = 'x'\n", "webhook.on_failed", "on_failure")])
def test_what_is_wrong_with_a_channel_is_told_with_its_place(text, path, words):
    found = load_problems(text)
    assert any("config.toml" in problem and path in problem and words in problem for problem in found), found


@pytest.mark.parametrize(("text", "words"), [
    ("[notifications.channel]\nname = 'ours'\ntype = 'slack'\nurl = 'https://h/canary'\n", "a table is not a list; write [[notifications.channel]]"),
    ("[notifications]\nchannel = ['https://h/canary']\n", "is not a table; write [[notifications.channel]]"),
    ("[[notifications.webhook]]\non_failure = 'https://h/canary'\n", "a list of tables is not a table"),
    (table("webhook", url=["https://h/canary"]), "is not a text; write it in quotes"), (table("webhook", url="x", signing_key=["canary"]), "is not a text")])
def test_what_is_wrong_with_a_channel_is_told_without_what_may_be_secret(text, words):
    found = load_problems(text)
    assert any(words in problem for problem in found) and "canary" not in repr(found), found


@pytest.mark.parametrize(("text", "secrets", "words"), [
    (table("webhook", url="secret:hook"), "", "secret hook is not found in any source; it is required by notifications.channel ours, url"),
    (table("webhook", url="secret:hook"), "hook=canary-no-url\n", 'channel "ours": its URL is not a plain http:// or https:// URL'),
    (table("webhook", url="secret:hook"), "hook=\n", "secret hook is empty"),
    (table("ntfy", url="https://h/"), "", "its URL names no topic"), (table("ntfy", url="https://h"), "", "its URL names no topic"),
    (table("webhook", url="https://h:99999/canary"), "", "its URL is not"), (table("webhook", url="http://[1::2::3]/canary"), "", "its URL is not"),
    (table("webhook", url="https://user:canary@h/"), "", "its URL is not"), (table("webhook", url="ftp://h/canary"), "", "its URL is not"),
    (table("webhook", url="https://h/ canary"), "", "its URL is not"), (table("webhook", url="file:///canary"), "", "its URL is not"),
    (table("ntfy", url="https://canary.example.net"), "", "its URL names no topic"), (table("ntfy", url="https://canary.example.net//"), "", "its URL names no topic"),
    (table("email", server="mail:99999", sender="a@b", recipients=["c@d"]), "", "its server has no port from 1 to 65535"),
    (table("email", server="mail:25", sender="a@b", recipients=["c@d"], password="canary"), "", "its password has no effect without a username"),
    (table("email", server="mail:25", sender="a@b", recipients=["c@d"], username="u", password="canary", security="none"), "", "its password can be read on the way"),
    (table("webhook", url=CANARY_URL, token="canary\u00e9"), "", "its token has characters that no header can have"),
    (table("webhook", url=CANARY_URL, token="canary\r\nX: y"), "", "its token has characters that no header can have"),
    (table("webhook", url=CANARY_URL, signing_key="whsec_canary!"), "", "its signing_key begins with whsec_, but what follows is not base64"),
    (table("webhook", url=CANARY_URL, signing_key="canary"), "", "its signing_key is shorter"),
    (table("webhook", url=CANARY_URL), "", "its notices are not signed"),
    (table("webhook", url="http://hooks.example.net/canary", signing_key=WHSEC), "", "its URL is plain HTTP"),
    (table("webhook", url=CANARY_URL, signing_key=WHSEC, services=["nobody"]), "", "names nobody, but there is no such service"),
    ("[notifications.webhook]\nuse_secrets = true\n", "webhook_on_failure=canary\n", 'channel "webhook.on_failure": its URL is not'),
    ("", "", "notifications.enabled: is true, but there is no channel")])
def test_validate_tells_what_is_wrong_with_channels_and_never_their_secrets(tmp_path, text, secrets, words):
    found = problems_of(tmp_path, enabled(text), secrets)
    assert any(words in line for line in found), found


def test_a_signing_key_that_no_source_has_is_missing_not_forgotten(tmp_path):
    found = problems_of(tmp_path, enabled(table("webhook", url=CANARY_URL, signing_key="secret:sign")), "")
    assert any("secret sign is not found" in line for line in found) and not any("not signed" in line for line in found), found


def test_channels_that_are_switched_off_are_a_warning(tmp_path):
    assert any("is false, so nothing is sent" in line for line in problems_of(tmp_path, table("webhook", url=CANARY_URL)))


@pytest.mark.parametrize("url", ["http://127.0.0.1/x", "http://localhost:80/x", "http://2130706433/x", "http://[::1]:9/x", "http://10.0.0.1/"])
def test_plain_http_to_an_address_that_is_written_is_no_matter(tmp_path, url):
    problems: list[hookshot.Problem] = []
    hookshot.check_channels(configured(enabled(table("webhook", url=url, signing_key=WHSEC))), {}, hookshot.Place("c", "n", problems))
    assert problems == []


# --- what an answer means

@pytest.mark.parametrize(("status", "outcome"), [
    *((status, "delivered") for status in (200, 201, 202, 204, 299)), *((status, "refused") for status in (301, 302, 303, 307, 308, 400, 401, 403, 404, 410, 413, 422)),
    *((status, "retried") for status in (408, 425, 429, 500, 502, 503, 504, 599))])
def test_the_status_of_an_answer_decides(status, outcome):
    with Receiver() as elsewhere, Receiver([(status, {"Location": elsewhere.url}, b"" if status == 204 else b"canary")]) as receiver:
        attempt = send(channel("webhook", url=receiver.url))
        assert (attempt.outcome, len(receiver.requests), attempt.was_reached) == (outcome, 1, True)
        assert f"HTTP {status}" in attempt.words and "canary" not in attempt.words
        assert elsewhere.accepted == 0


@pytest.mark.parametrize("answer", ["reset", "close", "hang", ("drip", 0.05, 200), ("slow", 5.0, 200)], ids=str)
def test_an_attempt_without_an_answer_is_tried_again_within_its_time(answer):
    with Receiver([answer]) as receiver:
        attempt = send(channel("webhook", url=receiver.url, timeout=1))
        assert attempt.outcome == "retried" and not attempt.was_reached and "127.0.0.1" not in attempt.words


def test_an_answer_that_never_ends_is_not_read():
    with Receiver([(200, {"Content-Length": "1000000000000"}, b"canary")]) as receiver:
        assert send(channel("webhook", url=receiver.url)) == hookshot.Attempt("delivered", "HTTP 200")


@pytest.mark.parametrize("answer", [b"canary canary\r\n\r\n", b"HTTP/1.1 canary\r\n\r\n", b"HTTP/1.1 200 OK\r\n" + b"X: canary\r\n" * 200 + b"\r\n", b"\0" * 100_000,
                                    b"HTTP/1.1 200 " + b"canary" * 20_000, b"SSH-2.0-canary\r\n"], ids=range(6))
def test_what_is_no_answer_is_told_in_words_of_ours(answer):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        def say() -> None:
            link, _ = listener.accept()
            with link, contextlib.suppress(OSError):
                link.recv(1 << 16)
                link.sendall(answer)

        speaker = threading.Thread(target=say)
        speaker.start()
        attempt = send(channel("webhook", url=f"http://127.0.0.1:{listener.getsockname()[1]}/canary"))
        speaker.join()
    assert attempt.outcome == "retried" and "canary" not in attempt.words


def test_a_receiver_is_spoken_to_over_tls_only_if_it_is_trusted(trusted, monkeypatch):
    with Receiver(tls=(trusted.server, trusted.server_key)) as receiver:
        assert send(channel("webhook", url=receiver.url)).outcome == "delivered"
        monkeypatch.setenv("SSL_CERT_FILE", str(trusted.other_ca))
        attempt = send(channel("webhook", url=receiver.url))
        assert attempt.outcome == "retried" and "certificate is not trusted" in attempt.words and len(receiver.requests) == 1


@pytest.mark.parametrize(("header", "seconds"), [
    (None, None), ("0", 0), ("7", 7), (" 7 ", 7), ("3600", 3600), ("999999999", 3600), ("99999999999999999999", None), ("-5", None), ("1.5", None),
    ("soon", None), ("", None), ("٣", None), ("7, 8", None), (email.utils.formatdate(AT_MS // 1000 + 30, usegmt=True), 29.877),
    (email.utils.formatdate(AT_MS // 1000 - 30, usegmt=True), 0), ("Fri, 31 Dec 9999 23:59:59 GMT", 3600), ("Fri, 31 Dec 99999 23:59:59 GMT", None)])
def test_retry_after_is_read_in_seconds_and_as_a_date_and_capped(header, seconds):
    found = hookshot.parse_retry_after(header, AT_MS)
    assert found == (None if seconds is None else pytest.approx(seconds))


@pytest.mark.parametrize("header", ["30", lambda: email.utils.formatdate(time.time() + 60, usegmt=True)], ids=["seconds", "date"])
def test_a_receiver_that_asks_for_time_gets_it(store, header):
    with Receiver([(429, {"Retry-After": header if isinstance(header, str) else header()})]) as receiver:
        sender = Sender(store, enabled(table("webhook", url=receiver.url)))
        put(store, "ours", 1), put(store, "ours", 2)
        assert sender.turn() >= 20 and sender.turn(20) > 0
        assert len(receiver.requests) == 1      # The other deployment's notice waits too: the receiver asked for it.
        sender.turn(61), sender.turn(61)
        assert len(receiver.requests) == 3 and sender.outcomes() == ["retried", "delivered", "delivered"]


def test_a_notice_is_given_up_when_it_is_older_than_retry_for(store):
    with Receiver(itertools.repeat(500)) as receiver:
        sender = Sender(store, enabled(table("webhook", url=receiver.url), retry_for="1h"))
        put(store, "ours", 1, created_ms=hookshot.now_ms() - 3_500_000)
        put(store, "ours", 2, created_ms=hookshot.now_ms() - 3_700_000)
        sender.turn(), sender.turn()
        assert sender.outcomes() == ["retried", "expired"] and store.outbox_counts() == {"ours": 1}
        assert len(receiver.requests) == 2 and "older than notifications.retry_for" in sender.told[-1].message


def test_retries_come_later_and_later(store):
    with Receiver(itertools.repeat(500)) as receiver:
        sender = Sender(store, enabled(table("webhook", url=receiver.url)))
        put(store, "ours", 1)
        for tries, (least_s, most_s) in enumerate([(0, 0), (0.4, 1.1), (0.9, 2.1), (1.9, 4.1), *[(0, LATER_S)] * 8, (440, 910), (440, 910)]):
            sender.turn(least_s) if least_s else None
            assert len(receiver.requests) == tries
            sender.turn(most_s)
            assert len(receiver.requests) == tries + 1
        assert len({request.headers["webhook-id"] for request in receiver.requests}) == 1


# --- private addresses

def names(monkeypatch, **hosts: list[str]) -> list[tuple]:
    """Have names lead to these addresses; return the list of what was connected to. Nothing leaves this machine."""
    asked, real = [], socket.getaddrinfo

    def getaddrinfo(host, port, *args, **keys):
        if host.replace(".", "_") not in hosts:
            return real(host, port, *args, **keys)
        return [(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port) + (0, 0) * (":" in address))
                for address in hosts[host.replace(".", "_")]]

    class Socket(socket.socket):
        def connect(self, address):
            asked.append(address[0])
            if not address[0].startswith("127."):
                raise ConnectionRefusedError
            return super().connect(address)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(socket, "socket", Socket)
    return asked


def test_nothing_is_remembered_of_notices_that_are_dropped(store, monkeypatch):
    monkeypatch.setattr(hookshot, "_MAX_OUTBOX", 10)
    monkeypatch.setattr(hookshot, "send_notice", lambda *words: hookshot.Attempt("retried", "HTTP 500"))
    text = enabled(table("webhook", url="http://127.0.0.1:9/"))
    sender = Sender(store, text)
    notice = json.dumps(hookshot.sample_notice()._replace(event="failed"))

    def remembered() -> int:
        return sum(map(len, sender.notifier._due.values()))

    for first in (0, 100):
        store.enqueue([hookshot.Outgoing(0, "ours", first + number, f"msg_{first + number}", notice, hookshot.now_ms(), None) for number in range(20)], {})
        for _ in range(25):
            sender.turn()
        assert remembered() == 20
        sender.notifier._pending["ours"] = 20
        sender.notifier._mark({}, [hookshot.Outgoing(0, "ours", first + 50, f"msg_{first + 50}", notice, hookshot.now_ms(), None)])
        assert store.outbox_counts() == {"ours": 10} and remembered() == 9
        sender.configure(enabled())
        sender.turn()
        assert remembered() == 0
        sender.configure(text)
        sender.turn()


def test_a_reply_of_a_mail_server_that_never_ends_is_not_kept():
    """It would have all the memory there is within seconds."""
    said = 0
    with socket.create_server(("127.0.0.1", 0)) as listener:
        def say() -> None:
            nonlocal said
            link, _ = listener.accept()
            with link, contextlib.suppress(OSError):
                link.sendall(b"220 hello\r\n")
                link.recv(1 << 16)
                while said < 64 << 20:
                    said += link.send(b"250-canary\r\n" * 1000)

        speaker = threading.Thread(target=say)
        speaker.start()
        attempt = send(channel("email", server=f"127.0.0.1:{listener.getsockname()[1]}", sender="a@example.org", recipients=["b@example.org"], security="none"))
        speaker.join()
    assert attempt.outcome == "retried" and "canary" not in attempt.words and said < 64 << 20


PRIVATE = ["127.0.0.1", "10.0.0.1", "192.168.1.1", "172.16.0.1", "169.254.169.254", "0.0.0.0", "100.64.0.1", "224.0.0.1", "255.255.255.255", "::1", "fe80::1",
           "fc00::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::", "2002:a00:1::", "::", "ff02::1",
           "192.0.0.8", "64:ff9b:1::a00:1", "fec0::1", "::10.0.0.1", "::ffff:0:10.0.0.1"]


@pytest.mark.parametrize("address", PRIVATE)
def test_a_name_that_leads_to_a_private_address_is_not_followed(monkeypatch, address):
    asked = names(monkeypatch, hook_example=[address])
    attempt = send(channel("webhook", url="http://hook.example:9/x", timeout=1))
    assert attempt.outcome == "retried" and "private address" in attempt.words and "hook.example" not in attempt.words
    attempt = send(channel("email", server="hook.example:25", sender="a@b", recipients=["c@d"], security="none", timeout=1))
    assert attempt.outcome == "retried" and "private address" in attempt.words and asked == []


def test_a_name_may_lead_to_a_private_address_if_the_operator_says_so(monkeypatch):
    names(monkeypatch, hook_example=["127.0.0.1"])
    with Receiver() as receiver:
        assert send(channel("webhook", url=f"http://hook.example:{receiver.port}/x", allow_private=True)).outcome == "delivered"
        assert receiver.requests[0].headers["host"] == f"hook.example:{receiver.port}"


def test_of_public_and_private_addresses_only_the_public_ones_are_tried(monkeypatch):
    asked = names(monkeypatch, hook_example=["127.0.0.1", "192.0.0.8", "8.8.8.8", "::1", "10.0.0.1", "2001:4860:4860::8888"])
    assert send(channel("webhook", url="http://hook.example:9/x", timeout=1)).outcome == "retried"
    assert asked == ["8.8.8.8", "2001:4860:4860::8888"]


def test_the_addresses_of_a_name_share_the_time(monkeypatch):
    """The first accepts no more connections and stays silent; the second is the receiver."""
    names(monkeypatch, hook_example=["127.0.0.2", "127.0.0.1"])
    with Receiver() as receiver, socket.socket() as silent, contextlib.ExitStack() as ends:
        silent.bind(("127.0.0.2", receiver.port))
        silent.listen(0)
        for _ in range(3):
            link = ends.enter_context(socket.socket())
            link.setblocking(False)
            link.connect_ex(("127.0.0.2", receiver.port))
        assert send(channel("webhook", url=f"http://hook.example:{receiver.port}/", timeout=2, allow_private=True)).outcome == "delivered"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "2130706433", "0x7f000001", "0x7f.1", "127.1", "0177.0.0.1", "[::ffff:127.0.0.1]"])
def test_an_address_that_the_operator_wrote_may_be_private_however_it_is_spelled(host):
    with Receiver() as receiver:
        assert send(channel("webhook", url=f"http://{host}:{receiver.port}/a//b?c=d&e")).outcome == "delivered"
        assert receiver.requests[0].path == "/a//b?c=d&e"


def test_a_receiver_may_have_an_ipv6_address():
    with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6) as listener:
        taken = []

        def answer() -> None:
            link, _ = listener.accept()
            with link:
                taken.append(link.recv(1 << 16))
                link.sendall(b"HTTP/1.1 200 OK\r\n\r\n")

        speaker = threading.Thread(target=answer)
        speaker.start()
        port = listener.getsockname()[1]
        assert send(channel("webhook", url=f"http://[::1]:{port}/x")).outcome == "delivered"
        speaker.join()
        assert f"\r\nHost: [::1]:{port}\r\n".encode() in taken[0]


# --- order, and who waits for whom

def test_notices_of_a_deployment_come_in_order_and_others_do_not_wait(store):
    """The receiver fails for one deployment only."""
    def answer(request):
        return 500 if json.loads(request.body)["data"]["deploy_id"] == "d-1" and not is_well.is_set() else 204

    is_well = threading.Event()
    with Receiver(answer) as receiver:
        sender = Sender(store, enabled(table("webhook", url=receiver.url, events=[*hookshot.NOTICE_EVENTS])))
        for number in (1, 2, 3):
            deploy(store, deploy_id=f"d-{number}")
        for later_s in (*[0.0] * 8, LATER_S, LATER_S):
            sender.turn(later_s)
        delivered = [one for one, request in zip(events_in(receiver.requests), receiver.requests) if request.answer == 204]
        for deploy_id in ("d-2", "d-3"):
            assert [one for one in delivered if one[1] == deploy_id] == [("started", deploy_id), ("succeeded", deploy_id)]
        assert len(delivered) == 4
        assert ("succeeded", "d-1") not in events_in(receiver.requests)
        is_well.set()
        sender.empty()
        assert events_in(receiver.requests)[-2:] == [("started", "d-1"), ("succeeded", "d-1")]


def test_a_dead_channel_costs_the_others_nothing(store):
    with Receiver() as receiver:
        dead = Receiver()       # bound, and does not listen
        sender = Sender(store, enabled(table("webhook", "a-dead", url=dead.url), table("webhook", "b-well", url=receiver.url)))
        for number in range(50):
            deploy(store, deploy_id=f"d-{number}")
        for _ in range(60):
            sender.turn()
        assert events_in(receiver.requests) == [("succeeded", f"d-{number}") for number in range(50)]
        # Each failure to reach it puts the whole channel off, not only the notice.
        assert len(sender.outcomes("a-dead")) <= 10 and store.outbox_counts() == {"a-dead": 50}
        dead.start()
        sender.empty()
        assert len(dead.requests) == 50
        dead.stop()


def test_the_outbox_is_bounded_and_says_what_gave_way(store, monkeypatch):
    monkeypatch.setattr(hookshot, "_MAX_OUTBOX", 5)
    with Receiver(itertools.repeat(503)) as receiver:
        sender = Sender(store, enabled(table("webhook", url=receiver.url)))
        for number in range(9):
            deploy(store, deploy_id=f"d-{number}")
        sender.turn()
        assert store.outbox_counts() == {"ours": 5} and \
            sender.troubles() == ["the 4 oldest notices for channel ours are dropped: it has taken none for too long"]
        receiver.script([])
        sender.empty()
        assert sorted(deploy_id for _, deploy_id in events_in(receiver.requests)[-5:]) == [f"d-{number}" for number in range(4, 9)]


def test_what_waits_for_a_channel_that_is_gone_is_dropped_and_said_so(store):
    with Receiver(itertools.repeat(503)) as receiver, Receiver() as other:
        both = enabled(table("webhook", url=receiver.url), table("webhook", "other", url=other.url))
        sender = Sender(store, both)
        deploy(store, deploy_id="d-1"), deploy(store, deploy_id="d-2")
        sender.turn()
        sender.configure(enabled(table("webhook", "other", url=other.url)))
        sender.empty()
        assert sender.troubles() == ["2 notices for channel ours are dropped: it is not configured any more"]
        assert len(other.requests) == 2


def test_a_receiver_that_is_corrected_is_tried_at_once(store):
    dead = Receiver()
    with Receiver() as receiver:
        sender = Sender(store, enabled(table("webhook", url=dead.url)))
        deploy(store, deploy_id="d-1"), deploy(store, deploy_id="d-2"), deploy(store, deploy_id="d-3"), deploy(store, deploy_id="d-4")
        for _ in range(4):
            sender.turn()
        assert sender.turn() > 0
        sender.configure(enabled(table("webhook", url=receiver.url)))
        sender.turn()
        assert events_in(receiver.requests) == [("succeeded", "d-4")]   # those that failed before wait for their own turn
        sender.empty()


@pytest.mark.parametrize("text", ["", "{", "null", "[]", "[1]", "{}", '"x"', json.dumps([*NOTICE, "more"]), json.dumps(NOTICE[:5]), "[" * 100_000,
                                  json.dumps(NOTICE._replace(event="unheard of")), json.dumps(NOTICE._replace(service=None))], ids=range(12))
def test_a_row_that_is_no_notice_is_dropped_and_stops_nobody(store, text):
    with Receiver() as receiver:
        sender = Sender(store, enabled(table("webhook", url=receiver.url), table("webhook", "other", url=receiver.url)))
        put(store, "ours", 1, text), put(store, "ours", 1), put(store, "other", 2)
        sender.empty()
        assert sender.outcomes() == ["refused", "delivered"] and sender.outcomes("other") == ["delivered"] and sender.bugs() == []
        assert "no notice" in next(event.message for event in sender.told if isinstance(event, hookshot.Notified))


def test_a_bug_in_sending_one_notice_stops_nobody(store):
    """A duration that is no number is a bug that parse_notice does not see."""
    with Receiver() as receiver:
        sender = Sender(store, enabled(table("slack", url=receiver.url), table("slack", "other", url=receiver.url), retry_for="1h"))
        put(store, "ours", 1, json.dumps(NOTICE._replace(duration_ms="long"))), put(store, "ours", 2), put(store, "other", 3)
        put(store, "other", 4, json.dumps(NOTICE._replace(duration_ms="long")), created_ms=0)
        for _ in range(4):
            sender.turn()
        assert len(receiver.requests) == 2 and set(sender.outcomes("other")) == {"delivered", "expired"} and "delivered" in sender.outcomes()
        assert store.outbox_counts() == {"ours": 1} and sender.bugs()


# --- nothing is lost

def test_ids_are_the_same_for_the_same_move_and_no_others(store):
    deploy(store, deploy_id="d-1"), deploy(store, deploy_id="d-2")
    moves = store.moves_after(0, 100)
    ids = [hookshot.message_id_of(database, move, name) for database in ("a", "b") for move in moves for name in ("x", "y")]
    assert len(set(ids)) == len(ids) == 4 * len(moves)
    assert ids[0] == hookshot.message_id_of("a", store.moves_after(0, 1)[0], "x") and re.fullmatch("msg_[0-9a-f]{24}", ids[0])


def test_each_notice_arrives_across_kills_with_the_same_id(tmp_path):
    """The receiver fails now and then; the server is killed at random moments."""
    chance = random.Random(7)
    receiver = Receiver(lambda _: chance.choice([204, 204, 500, "reset", "close"]))
    text = enabled(table("webhook", url=receiver.url, signing_key=WHSEC, timeout=1, events=["succeeded", "failed", "cancelled"]))
    text += "[limits]\nmax_queue_per_service = 1000\n"
    with receiver, running(tmp_path, service(head='recovery = "fail"'), text) as host:
        wanted = []
        for turn in range(3):
            for number in range(6):
                wanted.append(host.deploy(deploy_id=f"d-{turn}-{number}"))
            # The next fact of the receiver's is the moment.
            count = len(receiver.requests) + chance.randrange(4)
            wait_until(lambda: len(receiver.requests) >= count)
            host.kill()
            host.start()
        for deploy_id in wanted:
            host.wait(deploy_id)
        receiver.script([])
        delivered = lambda: {deploy_id for (_, deploy_id), request in zip(events_in(receiver.requests), receiver.requests) if request.status == 204}
        wait_until(lambda: delivered() == set(wanted))
        ids = {}
        for (_, deploy_id), request in zip(events_in(receiver.requests), receiver.requests):
            ids.setdefault(deploy_id, set()).add(request.headers["webhook-id"])
        assert all(len(found) == 1 for found in ids.values()) and len(set.union(*ids.values())) == len(wanted)


def test_an_end_that_a_kill_follows_at_once_is_told_after_the_restart(tmp_path):
    """From the database as it is when a deployment has ended, and the outbox does not know yet."""
    with Receiver() as receiver:
        text = enabled(table("webhook", url=receiver.url, events=["started", "failed"]))
        with opened(tmp_path) as store:
            os.makedirs(store.logs, exist_ok=True)
            Sender(store, text)
            deploy(store, deploy_id="d-1", state=State.FAILED)
            assert store.outbox_counts() == {}
        with opened(tmp_path) as store:
            sender = Sender(store, text)
            sender.empty()
            assert events_in(receiver.requests) == [("started", "d-1"), ("failed", "d-1")]
        with opened(tmp_path) as store:
            Sender(store, text).turn()
            assert len(receiver.requests) == 2


def test_what_is_due_is_sent_before_the_server_stops(tmp_path):
    with Receiver([("slow", 0.3, 204)]) as receiver:
        with running(tmp_path, service(), enabled(table("webhook", url=receiver.url))) as host:
            ids = [host.deploy() for _ in range(10)]
            host.wait(ids[-1])
            assert host.stop() == 0
        assert [deploy_id for _, deploy_id in events_in(receiver.requests)] == ids


def test_a_receiver_that_hangs_does_not_hold_up_the_shutdown_and_is_told_after_it(tmp_path):
    with Receiver(["hang"]) as receiver:
        with running(tmp_path, service(), enabled(table("webhook", url=receiver.url, timeout=60))) as host:
            deploy_id = host.deploy()
            receiver.wait_for(1)
            assert host.stop() == 0
            assert log_lines(host, "bug") == []
            host.start()
            first, second = receiver.wait_for(2)
            assert first.headers["webhook-id"] == second.headers["webhook-id"] and events_in([second]) == [("succeeded", deploy_id)]


def test_a_full_disk_neither_loses_a_notice_nor_sends_it_for_ever(tmp_path):
    with small_disk(tmp_path / "disk", "1m") as disk, opened(disk) as store, Receiver() as receiver:
        os.mkdir(store.logs)
        sender = Sender(store, enabled(table("webhook", url=receiver.url)))
        put(store, "ours", 1)
        filler = None

        def answer(_):
            nonlocal filler
            # Full from the first delivery on, before it can be noted.
            filler = filler or fill(disk)
            return 204

        receiver.script(answer)
        refused = 0
        for number in range(20):
            try:
                sender.turn(LATER_S)
            except hookshot.HookshotError as error:
                assert error.kind.code == "DISK_FULL"
                refused += 1
        assert refused and len(receiver.requests) == 1
        filler.unlink()
        sender.empty()
        assert len(receiver.requests) == 1 and sender.outcomes() == ["delivered"]


def test_moves_wait_for_a_database_that_another_keeps_locked(tmp_path, monkeypatch):
    monkeypatch.setattr(hookshot, "_BUSY_TIMEOUT_S", 0.1)
    with opened(tmp_path) as store, Receiver() as receiver:
        sender = Sender(store, enabled(table("webhook", url=receiver.url)))
        deploy(store, deploy_id="d-1")
        with contextlib.closing(sqlite3.connect(tmp_path / "state.db", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(hookshot.HookshotError, match="keeps the database locked"):
                sender.turn()
            assert receiver.requests == ()
            other.execute("ROLLBACK")
        sender.empty()
        assert events_in(receiver.requests) == [("succeeded", "d-1")]


# --- nothing is given away

def everything_under(folder: pathlib.Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_no_secret_of_a_channel_is_ever_told(tmp_path):
    """Of config.toml and of secrets: URLs, tokens, passwords, keys; with receivers that work, refuse and are gone."""
    with Receiver() as good, Receiver(itertools.repeat((400, {}, b"body-canary"))) as bad, MailServer(users={"bot": "password-canary-file"}) as mail:
        dead = Receiver()
        tables = [
            table("webhook", "good", url="secret:hook", token="secret:tok", signing_key="secret:signing", events=[*hookshot.NOTICE_EVENTS]),
            table("webhook", "bad", url=f"{bad.url}/canary-file-bad", token="token-canary-file", signing_key="signing-canary-file-0123456789"),
            table("telegram", "gone", url=f"{dead.url}/canary-file-dead", token="1:canary-file-telegram", chat_id="1"),
            table("gotify", "name", url="https://nowhere.invalid/canary-file-name", token="canary-file-gotify"),
            table("email", "mail", server=mail.address, security="none", username="bot", password="password-canary-file", sender="a@b", recipients=["c@d"]),
            table("email", "mail-bad", server=mail.address, security="none", username="bot", password="secret:mail", sender="a@b", recipients=["c@d"]),
            table("exec", "run", command=["sh", "-c", f"env > {tmp_path}/child; cat /proc/$$/cmdline >> {tmp_path}/child; cat >> {tmp_path}/child"]),
            "[notifications.webhook]\n" + toml(on_failure=f"{bad.url}/canary-file-webhook", use_secrets=True)]
        secrets = (f"hook={good.url}/canary-secret\ntok=canary-secret-token\nsigning=canary-secret-signing-0123456789\nmail=canary-secret-mail\n"
                   f"webhook_on_success={bad.url}/canary-secret-success\n")
        services = service('["sh", "-c", "env; cat /proc/self/environ /proc/$PPID/cmdline; false"]', '["true"]') + service(name="api")
        with running(tmp_path, services, enabled(*tables) + '[logging]\nlevel = "debug"\n', secrets=secrets) as host:
            host.wait(host.deploy("app:2")), host.wait(host.deploy("app:2", "api"))
            for name in ("good", "bad", "gone", "name", "mail", "mail-bad", "run", "webhook.on_failure", "webhook.on_success"):
                wait_until(lambda: any(line.get("channel") == name for line in map(json.loads, host.output.read_text().splitlines())))
            answers = [host.get(path).body for path in ("/metrics", "/health", "/services", "/history", "/status")]
            cli = [host.cli(*args) for args in (["validate"], ["show", "config"], ["doctor"], *(["notify-test", name] for name in ("good", "bad", "gone", "mail", "mail-bad")))]
            printed = "".join(done.stdout + done.stderr for done in cli)
            assert host.stop() == 0
        assert good.requests and bad.requests and mail.mails
        assert good.requests[0].path == "/canary-secret" and good.requests[0].headers["authorization"] == "Bearer canary-secret-token"
        for what in (host.output.read_bytes(), everything_under(host.data), (tmp_path / "child").read_bytes(), printed.encode(), *answers):
            assert b"canary" not in what, what[max(0, what.index(b"canary") - 300):][:600]


# --- notify-test

@pytest.fixture(scope="module")
def mail_and_web():
    with Receiver() as receiver, MailServer() as server:
        yield receiver, server


@pytest.mark.parametrize("kind", hookshot.CHANNEL_TYPES)
def test_notify_test_sends_a_sample_through_every_type(tmp_path, mail_and_web, kind):
    receiver, server = mail_and_web
    values = {**GOOD, "url": f"{receiver.url}/t", "server": server.address, "command": ["sh", "-c", f'echo "$HOOKSHOT_MESSAGE" > {tmp_path}/told']}
    keys = {name: values[name] for name in hookshot.CHANNEL_TYPES[kind].required} | {"email": {"security": "none"}, "telegram": {"url": receiver.url}}.get(kind, {})
    host = Host(tmp_path, service(), enabled(table(kind, **keys)))
    before = (len(receiver.requests), len(server.mails))
    done = host.cli("notify-test", "ours")
    assert done.returncode == 0 and done.stdout.startswith("ours: delivered (") and done.stderr == ""
    after = (len(receiver.requests), len(server.mails))
    assert after == {"exec": before, "email": (before[0], before[1] + 1)}.get(kind, (before[0] + 1, before[1]))
    if kind == "exec":
        assert "this is a test" in (tmp_path / "told").read_text()
    assert not host.data.exists()


@pytest.mark.parametrize(("answer", "words"), [((404, {}, b"canary"), "HTTP 404"), ((500, {}, b"canary"), "HTTP 500"),
                                               ((302, {"Location": "http://canary/"}), "redirects are not followed"), ("close", "closed without an answer")])
def test_notify_test_shows_the_status_and_never_the_body(tmp_path, answer, words):
    with Receiver(itertools.repeat(answer)) as receiver:
        host = Host(tmp_path, service(), enabled(table("webhook", url=f"{receiver.url}/canary")))
        done = host.cli("notify-test", "ours")
        assert done.returncode == 69 and "ours: not delivered (" in done.stdout and words in done.stdout and "canary" not in done.stdout + done.stderr
        done = host.cli("notify-test", "ours", "--json")
        said = json.loads(done.stdout)
        assert done.returncode == 69 and said["channel"] == "ours" and words in said["answer"] and said["outcome"] in ("refused", "retried")
        assert len(receiver.requests) == 2


def test_notify_test_says_when_notices_are_switched_off(tmp_path):
    with Receiver() as receiver:
        host = Host(tmp_path, service(), table("webhook", url=receiver.url) + f"[notifications.webhook]\non_failure = '{receiver.url}'\n")
        done = host.cli("notify-test", "ours")
        assert done.returncode == 0 and "notifications.enabled is false" in done.stderr
        assert json.loads(host.cli("notify-test", "webhook.on_failure", "--json").stdout) == {
            "channel": "webhook.on_failure", "outcome": "delivered", "answer": "HTTP 204"}
        assert [json.loads(request.body)["type"] for request in receiver.requests] == ["deployment.test"] * 2


def test_notify_test_knows_no_other_channels(tmp_path):
    host = Host(tmp_path, service(), enabled(table("webhook", url=CANARY_URL, signing_key=WHSEC)))
    done = host.cli("notify-test", "our")
    assert done.returncode == 2 and "there is no channel our; did you mean ours?" in done.stderr and "canary" not in done.stderr
    done = host.cli("notify-test", "x\r\n\x1b[31m")
    assert done.returncode == 2 and "\x1b" not in done.stderr


@pytest.mark.parametrize("is_enabled", [True, False])
@pytest.mark.parametrize(("keys", "secrets", "words"), [
    ({"url": "secret:hook"}, "", "secret hook is not found"), ({"url": "secret:hook"}, "hook=canary\n", "its URL is not"),
    ({"url": CANARY_URL, "token": "secret:tok"}, "", "secret tok is not found"), ({"kind": "canary"}, "", "type")])
def test_notify_test_tells_what_is_wrong_with_the_files(tmp_path, keys, secrets, words, is_enabled):
    keys = {"kind": "webhook", "url": CANARY_URL} | keys
    text = enabled(table(**keys)).replace("enabled = true", f"enabled = {json.dumps(is_enabled)}")
    done = Host(tmp_path, service(), text, secrets=secrets).cli("notify-test", "ours")
    assert done.returncode == 78 and words in done.stderr and "canary" not in done.stderr.replace('"canary"', "")
