# SPDX-License-Identifier: MPL-2.0
"""The stand-ins of receivers.py behave as they say: http.client and smtplib against them."""

import contextlib
import email.message
import http.client
import itertools
import smtplib
import socket
import ssl
import time

import pytest

from receivers import MailServer, Receiver
from support import make_certificates

SOON_S = 5.0
MAIL = b"Subject: hello\r\n\r\n.a line that begins with a dot\r\n..and with two\r\n.\r\nthe end\r\n"


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    return make_certificates(tmp_path_factory.mktemp("certificates"))


def connect(receiver, certificates=None, timeout_s=SOON_S):
    """Return a connection of http.client, closed by leaving its context."""
    link = http.client.HTTPSConnection("127.0.0.1", receiver.port, timeout=timeout_s, context=ssl.create_default_context(cafile=certificates.ca)) \
        if certificates else http.client.HTTPConnection("127.0.0.1", receiver.port, timeout=timeout_s)
    return contextlib.closing(link)


def post(link, body=b"{}", path="/hook", **headers):
    """Return status, headers and body of one POST."""
    link.request("POST", path, body, headers)
    response = link.getresponse()
    return response.status, dict(response.getheaders()), response.read()


def mail_client(server, **options):
    return smtplib.SMTP("127.0.0.1", server.port, local_hostname="client", timeout=SOON_S, **options)


# --- Receiver

def test_a_receiver_keeps_each_request_and_answers_204():
    began_s = time.monotonic()
    with Receiver() as receiver, connect(receiver) as link:
        assert [post(link, b"one", "/a?b=c", **{"X-Some": "Thing"})[0], post(link, b"two")[0]] == [204, 204]
        first, second = receiver.wait_for(2)
    assert (first.number, first.method, first.path, first.body, first.headers["x-some"]) == (0, "POST", "/a?b=c", b"one", "Thing")
    assert (second.number, second.body, second.status) == (1, b"two", 204)
    assert began_s < first.at_s <= first.answered_s <= second.at_s <= time.monotonic()
    assert receiver.accepted == 1, "both came over one connection"


def test_a_receiver_answers_by_its_script_and_then_204():
    script = [500, (302, {"Location": "/other"}), (429, {"Retry-After": "7"}, b"later"), 200]
    with Receiver(script) as receiver, connect(receiver) as link:
        answers = [post(link) for _ in range(5)]
        assert [received.answer for received in receiver.requests] == [*script, 204]
    assert [status for status, _, _ in answers] == [500, 302, 429, 200, 204]
    assert answers[1][1]["Location"] == "/other" and (answers[2][1]["Retry-After"], answers[2][2]) == ("7", b"later")
    assert "Content-Length" not in answers[4][1], "a 204 has none (RFC 9110, 8.6)"


def test_a_function_may_choose_the_answer_and_the_script_may_change():
    with Receiver(lambda received: 200 if received.body == b"good" else 400) as receiver, connect(receiver) as link:
        assert [post(link, body)[0] for body in (b"good", b"bad")] == [200, 400]
        receiver.script(itertools.repeat(503))
        assert [post(link, b"good")[0] for _ in range(3)] == [503] * 3


@pytest.mark.parametrize("answer, error", [("reset", ConnectionResetError), ("close", http.client.RemoteDisconnected), ("hang", TimeoutError)])
@pytest.mark.parametrize("has_tls", [False, True])
def test_a_receiver_can_end_or_hang_after_the_request_has_come(answer, error, has_tls, certificates):
    files = (certificates.server, certificates.server_key) if has_tls else None
    with Receiver([answer], tls=files) as receiver:
        with connect(receiver, certificates if has_tls else None, 0.3) as link, pytest.raises((error, ssl.SSLEOFError) if has_tls else error) as caught:
            post(link)
        # RemoteDisconnected is a ConnectionResetError, but no RST.
        assert isinstance(caught.value, http.client.RemoteDisconnected) == (error is http.client.RemoteDisconnected) or has_tls
        (received,) = receiver.requests
        assert (received.body, received.status) == (b"{}", None)


def test_a_slow_answer_comes_late_and_a_dripping_head_byte_by_byte():
    with Receiver([("slow", 0.2, 200), ("drip", 0.01, 200)]) as receiver, connect(receiver) as link:
        for least_s in (0.2, 0.3):
            began_s = time.monotonic()
            assert post(link)[0] == 200
            assert time.monotonic() - began_s >= least_s
        with socket.create_connection(("127.0.0.1", receiver.port), SOON_S) as raw:
            receiver.script([("drip", 0.05, 200)])
            raw.sendall(b"POST / HTTP/1.1\r\nHost: a\r\n\r\n")
            assert [len(raw.recv(100)) for _ in range(3)] == [1, 1, 1]


def test_a_dead_receiver_refuses_and_lives_again_on_its_port():
    receiver = Receiver()
    with connect(receiver) as link, pytest.raises(ConnectionRefusedError):
        post(link)
    with receiver:
        for number in range(1, 4):
            with connect(receiver) as link:
                assert post(link)[0] == 204
                receiver.stop()
                with pytest.raises((OSError, http.client.HTTPException)):
                    post(link)
            receiver.start()
            assert len(receiver.requests) == number, "what was recorded stays"


@pytest.mark.parametrize("answer", ["hang", ("slow", 1000, 200), ("drip", 1000, 200)])
def test_a_receiver_that_hangs_can_be_stopped(answer):
    began_s = time.monotonic()
    with Receiver([answer]) as receiver, connect(receiver) as link:
        link.request("POST", "/", b"")
        receiver.wait_for(1)
        receiver.stop()
    assert time.monotonic() - began_s < SOON_S and receiver.requests[0].status is None


def test_a_receiver_speaks_tls(certificates):
    with Receiver([200], tls=(certificates.server, certificates.server_key)) as receiver:
        assert receiver.url == f"https://127.0.0.1:{receiver.port}"
        with connect(receiver, certificates) as link:
            assert [post(link)[0], post(link)[0]] == [200, 204]
        with connect(receiver) as plain, pytest.raises((OSError, http.client.HTTPException)):
            post(plain)
        assert len(receiver.requests) == 2


def test_a_request_that_ends_early_is_counted_and_not_recorded():
    with Receiver() as receiver:
        for part in (b"", b"POST", b"POST / HTTP/1.1\r\nHost: a\r\n", b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n1234"):
            with socket.create_connection(("127.0.0.1", receiver.port), SOON_S) as link:
                link.sendall(part)
                link.shutdown(socket.SHUT_WR)
                assert link.recv(100) == b""
        assert (receiver.broken, receiver.requests) == (3, ())


@pytest.mark.parametrize("request_", [b"POST / HTTP/1.1\n\n", b"POST / HTTP/1.1\r\nHost : a\r\n\r\n", b"POST / HTTP/1.1\r\n\r\n",
                                      b"POST / HTTP/1.1\r\nHost: a\r\nX: a\rb\r\n\r\n", b"POST /\xff HTTP/1.1\r\nHost: a\r\n\r\n"])
def test_what_is_no_request_is_a_fault_that_fails_the_test(request_):
    with pytest.raises(AssertionError, match="not a request"), Receiver() as receiver, \
            socket.create_connection(("127.0.0.1", receiver.port), SOON_S) as link:
        link.sendall(request_)
        assert link.recv(100).startswith(b"HTTP/1.1 400 ")


def test_a_chunked_body_is_put_together():
    with Receiver() as receiver, connect(receiver) as link:
        link.request("POST", "/", iter([b"ab", b"cde"]), encode_chunked=True, headers={"Transfer-Encoding": "chunked"})
        assert link.getresponse().status == 204
        assert receiver.requests[0].body == b"abcde"


# --- MailServer

def test_a_mail_server_keeps_the_mail_as_it_was_sent():
    with MailServer() as server, mail_client(server) as client:
        client.sendmail("from@example.org", ["a@example.org", "b@example.org"], MAIL)
        (mail,) = server.wait_for(1)
    assert (mail.sender, mail.recipients, mail.content) == ("from@example.org", ("a@example.org", "b@example.org"), MAIL)
    assert (mail.was_tls, mail.user) == (False, None)
    assert [line.split()[0].partition(b":")[0] for line in server.commands] == [b"ehlo", b"mail", b"rcpt", b"rcpt", b"data", b"QUIT"]


def test_a_mail_server_offers_what_it_has(certificates):
    files = (certificates.server, certificates.server_key)
    for options, offered in [({}, {"size", "8bitmime", "smtputf8"}), ({"extensions": ()}, {"size"}), ({"users": {"u": "p"}, "extensions": ()}, {"size", "auth"}),
                             ({"users": {"u": "p"}, "tls": files}, {"size", "8bitmime", "smtputf8", "starttls"})]:
        with MailServer(**options) as server, mail_client(server) as client:
            client.ehlo()
            assert client.esmtp_features.keys() == offered


@pytest.mark.parametrize("implicit", [False, True])
@pytest.mark.parametrize("mechanism", ["auth_plain", "auth_login"])
def test_mail_under_tls_with_a_password(certificates, implicit, mechanism):
    context = ssl.create_default_context(cafile=certificates.ca)
    with MailServer(tls=(certificates.server, certificates.server_key), implicit=implicit, users={"user": "pass word"}) as server:
        with smtplib.SMTP_SSL("127.0.0.1", server.port, "client", timeout=SOON_S, context=context) if implicit else mail_client(server) as client:
            if not implicit:
                assert client.docmd("AUTH", "PLAIN AA==")[0] in (503, 538)
                client.starttls(context=context)
            client.ehlo()
            with pytest.raises(smtplib.SMTPSenderRefused):
                client.sendmail("a@example.org", ["b@example.org"], MAIL)
            client.user, client.password = "user", "wrong"
            with pytest.raises(smtplib.SMTPAuthenticationError):
                client.auth(mechanism.removeprefix("auth_").upper(), getattr(client, mechanism))
            client.password = "pass word"
            assert client.auth(mechanism.removeprefix("auth_").upper(), getattr(client, mechanism))[0] == 235
            client.sendmail("a@example.org", ["b@example.org"], MAIL)
        (mail,) = server.mails
        assert (mail.was_tls, mail.user, mail.content) == (True, "user", MAIL)


@pytest.mark.parametrize("stage, code, error", [
    ("CONNECT", 554, smtplib.SMTPConnectError), ("MAIL", 451, smtplib.SMTPSenderRefused), ("RCPT", 550, smtplib.SMTPRecipientsRefused),
    ("DATA", 451, smtplib.SMTPDataError), ("BODY", 552, smtplib.SMTPDataError), ("RCPT b@example.org", 550, smtplib.SMTPRecipientsRefused)])
def test_a_mail_server_refuses_what_it_is_told_to(stage, code, error):
    with MailServer(refuse={stage: f"{code} no"}) as server:
        with pytest.raises(error) as caught, mail_client(server) as client:
            client.sendmail("a@example.org", ["b@example.org"], MAIL)
        assert str(code) in str(caught.value) and not server.mails


def test_one_recipient_of_two_may_be_refused():
    with MailServer(refuse={"RCPT b@example.org": "550 no such user"}) as server, mail_client(server) as client:
        assert client.sendmail("a@example.org", ["b@example.org", "c@example.org"], MAIL) == {"b@example.org": (550, b"no such user")}
        assert server.mails[0].recipients == ("c@example.org",)


def test_greylisting_refuses_so_many_times():
    with MailServer(refuse={"RCPT": ["451 greylisted"] * 2}) as server, mail_client(server) as client:
        for _ in range(2):
            with pytest.raises(smtplib.SMTPRecipientsRefused):
                client.sendmail("a@example.org", ["b@example.org"], MAIL)
        assert client.sendmail("a@example.org", ["b@example.org"], MAIL) == {}
        assert len(server.mails) == 1


@pytest.mark.parametrize("stage", ["CONNECT", "EHLO", "MAIL", "RCPT", "DATA", "BODY"])
@pytest.mark.parametrize("way, error", [("hang", TimeoutError), ("close", smtplib.SMTPServerDisconnected), ("reset", (ConnectionResetError, smtplib.SMTPServerDisconnected)),
                                        ("421 going down", smtplib.SMTPException)])
def test_a_mail_server_hangs_or_ends_at_a_stage(stage, way, error):
    # smtplib says of a time-out what it says of an end, but for the first line.
    with MailServer(refuse={stage: way}) as server:
        with pytest.raises((error, smtplib.SMTPServerDisconnected) if isinstance(error, type) else error):
            client = smtplib.SMTP("127.0.0.1", server.port, "client", timeout=0.2)
            with contextlib.closing(client):
                client.sendmail("a@example.org", ["b@example.org"], MAIL)
        assert not server.mails
        began_s = time.monotonic()
    assert time.monotonic() - began_s < SOON_S


def test_a_dead_mail_server_refuses_connections_and_lives_again():
    server = MailServer()
    with pytest.raises(ConnectionRefusedError):
        mail_client(server)
    with server:
        server.stop()
        with pytest.raises(ConnectionRefusedError):
            mail_client(server)
        server.start()
        with mail_client(server) as client:
            client.sendmail("a@example.org", ["b@example.org"], MAIL)
        server.wait_for(1)
        server.wait_for_command(b"QUIT")


def test_addresses_and_content_beyond_ascii_take_their_extensions():
    message = email.message.EmailMessage()
    message["From"], message["To"], message["Subject"] = "ä@example.org", "b@example.org", "Größe"
    message.set_content("Grüße\n", cte="8bit")
    with MailServer() as server, mail_client(server) as client:
        client.send_message(message)
        assert server.mails[0].sender == "ä@example.org" and "Grüße\r\n".encode() in server.mails[0].content
        assert client.docmd("MAIL", "FROM:<a@example.org>")[0] == 250
        assert client.docmd("RCPT", "TO:<b@example.org>")[0] == 250
        assert client.data("Grüße\r\n".encode())[0] == 554


@pytest.mark.parametrize("lines, codes", [
    ([b"MAIL FROM:<a@b>"], [503]), ([b"EHLO c", b"RCPT TO:<a@b>"], [250, 503]), ([b"EHLO c", b"DATA"], [250, 503]), ([b"NONSENSE"], [500]),
    ([b"NOOP " + b"x" * 1000], [500]), ([b"NOOP a\rb"], [500]), ([b"EHLO c", b"MAIL FROM:a@b"], [250, 501]), ([b"STARTTLS"], [502]),
    ([b"EHLO c", "MAIL FROM:<ä@b>".encode()], [250, 553]), ([b"EHLO c", b"MAIL FROM:<a@b> SIZE=99999999"], [250, 552]),
    ([b"EHLO c", b"MAIL FROM:<a@b> SIZE=x"], [250, 555]), ([b"EHLO c", b"MAIL FROM:<a@b>", b"RSET", b"NOOP", b"RCPT TO:<a@b>", b"QUIT"], [250, 250, 250, 250, 503, 221]),
    ([b"EHLO c", b"MAIL FROM:<a@b>", b"RCPT TO:<a@b>", b"DATA", b"bare\nline\r\n."], [250, 250, 250, 354, 554]),
    ([b"EHLO c", b"MAIL FROM:<a@b>", b"RCPT TO:<a@b>", b"DATA", b"x" * 999 + b"\r\n."], [250, 250, 250, 354, 554])])
def test_a_mail_server_is_strict(lines, codes):
    with MailServer() as server, socket.create_connection(("127.0.0.1", server.port), SOON_S) as link:
        answers = link.makefile("rb")
        assert answers.readline().startswith(b"220 ")
        for line, code in zip(lines, codes, strict=True):
            link.sendall(line + b"\r\n")
            while (answer := answers.readline())[3:4] == b"-":
                pass
            assert answer[:3] == str(code).encode(), (line, answer)
        assert not server.mails
        answers.close()


def test_what_is_sent_in_the_clear_after_starttls_is_a_fault(certificates):
    with pytest.raises(AssertionError, match="in the clear"), MailServer(tls=(certificates.server, certificates.server_key)) as server, \
            socket.create_connection(("127.0.0.1", server.port), SOON_S) as link:
        link.sendall(b"EHLO c\r\nSTARTTLS\r\nEHLO c\r\n")
        with contextlib.suppress(TimeoutError):
            link.settimeout(0.5)
            while link.recv(100):
                pass
