# SPDX-License-Identifier: MPL-2.0
"""WIRE: signatures, strict JSON, deploy requests, and how a failure is told."""

import base64
import hashlib
import hmac
import json

import pytest

import hookshot

KEY, OTHER = b"0123456789abcdef0123456789abcdef", b"another-key-another-key-another!"
GOOD = {"service": "web", "image": "app:1"}


SECURITY = hookshot.load_config("", "config.toml", []).security


def verify(body, signature, keys):
    """Return what X-Hub-Signature-256 proves; None is no header."""
    return hookshot.verify(body, {} if signature is None else {"x-hub-signature-256": signature}, hookshot.prepare_keys(keys), SECURITY, 0)


def parse(document, idempotency_key=None):
    """Return the deploy request in a signed body (bytes as they are)."""
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    return hookshot.parse_deploy(verify(body, hookshot.sign(KEY, body), {"main": KEY}), idempotency_key)


def refusal(document, idempotency_key=None):
    """Return the sentence with which a body is refused; anything but a 400 is a bug."""
    with pytest.raises(hookshot.HookshotError) as caught:
        parse(document, idempotency_key)
    assert (caught.value.kind.code, caught.value.kind.http) == ("VALIDATION_ERROR", 400)
    return caught.value.sentence


# --- signatures

def test_a_signature_is_the_hmac_of_the_raw_body():
    """As GitHub makes it: any client with an HMAC function can sign."""
    assert hookshot.sign(KEY, b'{"a": 1}\n') == "sha256=" + hmac.new(KEY, b'{"a": 1}\n', hashlib.sha256).hexdigest()


@pytest.mark.parametrize("change", [str, str.upper, lambda text: "sha256=" + text[7:].upper(), lambda text: f" {text} ",
                                    lambda text: text[:20].upper() + text[20:]])
def test_hex_in_either_case_is_the_same_signature(change):
    assert verify(b"body", change(hookshot.sign(KEY, b"body")), {"main": KEY}) == ("main", b"body", None)


@pytest.mark.parametrize("body", [b"", b" { } \n", b"\xff\0", "ü\\u00fc".encode(), b"x" * 100_000])
def test_the_body_is_never_normalised(body):
    assert verify(body, hookshot.sign(KEY, body), {"main": KEY}).body == body
    with pytest.raises(hookshot.HookshotError):
        verify(body + b"\n", hookshot.sign(KEY, body), {"main": KEY})


HEX = hookshot.sign(KEY, b"body")[7:]


@pytest.mark.parametrize("signature", [
    None, "", " ", "sha256=", HEX, f"sha1={hmac.new(KEY, b'body', 'sha1').hexdigest()}", f"sha1={HEX}", f"sha512={HEX}",
    f"sha256:{HEX}", f"sha256={HEX[:-1]}", f"sha256={HEX}0",
    f"sha256={HEX},sha256={HEX}", f"sha256= {HEX}", f"sha256={HEX[:-1]}é", "sha256=" + "٣" * 64, "\x00", "sha256=\ud800",
    f"sha256={'0' * 64}", f"sha256={HEX}\n{HEX}",
    hookshot.sign(OTHER, b"body"), hookshot.sign(KEY, b"Body"), hookshot.sign(b"", b"body")])
def test_any_other_signature_is_refused(signature):
    """Non-ASCII too: compare_digest raises TypeError on such a text, which would be a 500 that a stranger can cause."""
    with pytest.raises(hookshot.HookshotError) as caught:
        verify(b"body", signature, {"main": KEY})
    assert caught.value.kind.http == 401


@pytest.mark.parametrize("keys, signer, key_id", [
    ({"new": KEY, "old": OTHER}, KEY, "new"), ({"new": KEY, "old": OTHER}, OTHER, "old"), ({"old": OTHER}, KEY, None),
    ({}, KEY, None), ({}, b"", None)])
def test_any_of_the_keys_may_sign_and_is_named(keys, signer, key_id):
    """Rotation: both verify while both are there; a key that is gone signs nothing, no key lets nobody in."""
    if key_id:
        assert verify(b"body", hookshot.sign(signer, b"body"), keys).key_id == key_id
    else:
        with pytest.raises(hookshot.HookshotError):
            verify(b"body", hookshot.sign(signer, b"body"), keys)


@pytest.mark.parametrize("key", [b"", b" ", b"short", b"x" * 15])
def test_an_empty_or_short_key_signs_nothing(key):
    """HMAC with an empty key is what anyone can compute (CVE-2026-41432; the original accepted it)."""
    with pytest.raises(hookshot.HookshotError) as caught:
        verify(b"body", hookshot.sign(key, b"body"), {"main": key})
    assert caught.value.kind.http == 401


def test_a_refused_signature_tells_nothing_of_what_was_wrong():
    def told(signature, keys):
        with pytest.raises(hookshot.HookshotError) as caught:
            verify(b"body", signature, keys)
        return caught.value.sentence, caught.value.details

    assert told(None, {"main": KEY}) == told("sha256=00", {"main": KEY}) == told(hookshot.sign(OTHER, b"body"),
            {"main": KEY}) == told(hookshot.sign(b"", b"body"), {"main": b""})


# --- Standard Webhooks

# Of the specification's own examples (standardwebhooks.com): made by another program.
VECTOR_SECRET, VECTOR_BODY = b"whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", b'{"test": 2432232314}'
VECTOR = {"webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek", "webhook-timestamp": "1614265330",
          "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="}
AT_S = 1_700_000_000
WHSEC = b"whsec_" + base64.b64encode(OTHER)


def webhook_signature(body, message_id="msg_1", at_s=AT_S, key=KEY):
    """Return what the specification asks for: base64 of the HMAC of id, time and body, with full stops between."""
    signed = str(message_id).encode("latin-1") + b"." + str(at_s).encode("latin-1") + b"." + body
    return base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()


def webhook(body=b"body", message_id="msg_1", at_s=AT_S, key=KEY, **changes):
    """Return the three headers of a message; None in `changes` leaves one out."""
    signature = "v1," + webhook_signature(body, message_id, at_s, key)
    headers = {"webhook-id": message_id, "webhook-timestamp": str(at_s), "webhook-signature": signature}
    headers |= {f"webhook-{name}": value for name, value in changes.items()}
    return {name: value for name, value in headers.items() if value is not None}


def take(headers, body=b"body", *, keys=None, now_ms=AT_S * 1000, **security):
    return hookshot.verify(body, headers, hookshot.prepare_keys(keys or {"main": KEY}), SECURITY._replace(**security), now_ms)


def turned_away(headers, body=b"body", **how):
    """Return the sentence with which a message is refused, a 401."""
    with pytest.raises(hookshot.HookshotError) as caught:
        take(headers, body, **how)
    assert (caught.value.kind.http, caught.value.details) == (401, None)
    return caught.value.sentence


def test_the_example_of_the_specification_verifies():
    proof = take(VECTOR, VECTOR_BODY, keys={"main": VECTOR_SECRET}, now_ms=1614265330_000)
    assert proof == ("main", VECTOR_BODY, ("msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265630_000))
    assert hookshot.sign_webhook(VECTOR_SECRET, VECTOR_BODY, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330) == VECTOR


@pytest.mark.parametrize("secret, key", [(KEY, KEY), (WHSEC, OTHER), (VECTOR_SECRET[6:], VECTOR_SECRET[6:]),
                                         (b"whsec-0123456789abcdef", b"whsec-0123456789abcdef"), (b"x" * 16, b"x" * 16)])
def test_a_plain_secret_is_its_bytes_and_after_whsec_its_base64(secret, key):
    assert hookshot.webhook_key(secret) == key
    assert hookshot.sign_webhook(secret, b"body", "msg_1", AT_S) == webhook(key=key)
    assert take(webhook(key=key), keys={"main": secret}).key_id == "main"
    if key != secret:
        turned_away(webhook(key=secret), keys={"main": secret})


GOOD_SIGNATURE, WRONG_SIGNATURE = webhook_signature(b"body"), webhook_signature(b"other")


@pytest.mark.parametrize("listed", [
    f"v1,{GOOD_SIGNATURE}", f"v1,{WRONG_SIGNATURE} v1,{GOOD_SIGNATURE}", f"v1,{GOOD_SIGNATURE} v1,{WRONG_SIGNATURE}",
    f"v1a,{WRONG_SIGNATURE} v1,{GOOD_SIGNATURE}", f"v2,x v1,{GOOD_SIGNATURE}", f"nonsense v1,{GOOD_SIGNATURE}", f"  v1,{GOOD_SIGNATURE}  ",
    f"v1,{GOOD_SIGNATURE}\tv2,x", f"v1, v1,{GOOD_SIGNATURE}", f"v1,{GOOD_SIGNATURE} v1,\xe9",
    " ".join(["v2,x"] * 50 + [f"v1,{GOOD_SIGNATURE}"]),
    " ".join([f"v1,{WRONG_SIGNATURE}"] * 7 + [f"v1,{GOOD_SIGNATURE}"])])
def test_one_right_signature_among_several_is_enough(listed):
    assert take(webhook(signature=listed)).message.id == "msg_1"


@pytest.mark.parametrize("listed", [
    "", " ", "v1", "v1,", GOOD_SIGNATURE, f"v1 {GOOD_SIGNATURE}", f"v1a,{GOOD_SIGNATURE}", f"v2,{GOOD_SIGNATURE}", f"V1,{GOOD_SIGNATURE}",
    f"v1,{WRONG_SIGNATURE}", f"v1,{GOOD_SIGNATURE[:-1]}", f"v1,{GOOD_SIGNATURE},", f"v1,{GOOD_SIGNATURE},v1,{GOOD_SIGNATURE}",
    f"v1,{GOOD_SIGNATURE.lower()}", f"v1,{GOOD_SIGNATURE}=", f"v1,{GOOD_SIGNATURE.rstrip('=')}", f"v1={GOOD_SIGNATURE}",
    f"v11,{GOOD_SIGNATURE}",
    "v1," + hmac.new(KEY, f"msg_1.{AT_S}.body".encode(), hashlib.sha256).hexdigest(), "v1,\xe9", "v1,\ud800", "v1,\x00",
    "v1," + base64.b64encode(hmac.new(KEY, b"body", hashlib.sha256).digest()).decode(),
    "v1," + base64.b64encode(hmac.new(b"", f"msg_1.{AT_S}.body".encode(), hashlib.sha256).digest()).decode(),
    " ".join([f"v1,{WRONG_SIGNATURE}"] * 100 + [f"v1,{GOOD_SIGNATURE}"])])
def test_any_other_list_of_signatures_is_refused_with_the_one_sentence(listed):
    assert turned_away(webhook(signature=listed)) == "the signature is missing or wrong"


@pytest.mark.parametrize("message_id", ["a", "msg_1", "8e03978e-40d5-43dd-bc93-6894a57f9324", "a/b:c=d", "!-~".replace("-", ""), "x" * 255])
def test_a_message_id_is_visible_ascii(message_id):
    assert take(webhook(message_id=message_id)).message == (message_id, (AT_S + 300) * 1000)


@pytest.mark.parametrize("message_id", [None, "", ".", "a.b", ".a", "a.", "a b", " a", "a\t", "a\n", "\xe9", "\x7f", "\x00", "x" * 256])
def test_any_other_message_id_is_refused(message_id):
    """With a full stop in it two messages could sign alike: id "a.1", time 2 is id "a", time "1.2"."""
    assert turned_away(webhook(message_id=message_id or "", id=message_id)) == "the signature is missing or wrong"


@pytest.mark.parametrize("at_s", ["", "soon", "-1", "+1700000000", " 1700000000", "1700000000 ", "1700000000.0", "1.7e9", "0x6553f100",
                                  "1_700_000_000", "\u0661\u0667", "1700000000\n", "1" * 13, "\xb2", "\x00"])
def test_a_timestamp_is_digits(at_s):
    """int() would take most of these; whatever they are signed with, they are refused before it is asked."""
    at_bytes = at_s.encode("latin-1", "replace").decode("latin-1")
    assert turned_away(webhook(at_s=at_bytes, timestamp=at_s)) == "the signature is missing or wrong"


def test_a_message_without_a_timestamp_or_a_signature_is_refused():
    assert turned_away(webhook(timestamp=None)) == turned_away({}) == "the signature is missing or wrong"
    assert turned_away(webhook(signature=None)) == "the signature is missing or wrong"


def test_parts_cannot_be_moved_between_id_time_and_body():
    """What is signed is one text; the same text cut elsewhere is another message."""
    signature = "v1," + webhook_signature(b"5.body", "msg", 17)
    take({"webhook-id": "msg", "webhook-timestamp": "17", "webhook-signature": signature}, b"5.body", now_ms=17_000)
    for message_id, at_s in (("msg.17", "5"), ("msg", "17.5"), ("msg.17.5", ""), ("", "msg.17.5")):
        moved = {"webhook-id": message_id, "webhook-timestamp": at_s, "webhook-signature": signature}
        assert turned_away(moved, b"body", now_ms=17_000) == "the signature is missing or wrong"


@pytest.mark.parametrize("change", [{"id": "msg_2"}, {"timestamp": str(AT_S + 1)}, {"timestamp": f"0{AT_S}"}])
def test_id_and_time_are_signed_too(change):
    assert turned_away(webhook(**change)) == "the signature is missing or wrong"
    assert turned_away(webhook(), b"body ") == "the signature is missing or wrong"


@pytest.mark.parametrize("window_s", [1, 300, 86400])
def test_the_replay_window_ends_to_the_millisecond_both_ways(window_s):
    edge_ms = window_s * 1000
    for offset_ms in (-edge_ms, -1, 0, 1, edge_ms):
        proof = take(webhook(), now_ms=AT_S * 1000 + offset_ms, replay_window=window_s)
        assert proof.message.expires_ms == AT_S * 1000 + edge_ms
    for offset_ms, word in ((-edge_ms - 1, "ahead of"), (edge_ms + 1, "behind"), (10**14, "behind")):
        said = turned_away(webhook(), now_ms=AT_S * 1000 + offset_ms, replay_window=window_s)
        assert word in said and f"security.replay_window ({window_s} s)" in said and "clock" in said


@pytest.mark.parametrize("at_s", ["0", "999999999999", "1"])
def test_a_timestamp_of_any_size_is_only_too_far_away(at_s):
    assert "clock" in turned_away(webhook(at_s=at_s))


def test_of_the_clock_only_holders_of_a_key_are_told():
    assert turned_away(webhook(key=OTHER, at_s=1)) == turned_away(webhook(key=OTHER)) == "the signature is missing or wrong"
    assert "clock" not in turned_away({"x-hub-signature-256": hookshot.sign(OTHER, b"body")}, require_timestamp=True)


def test_a_message_is_judged_by_its_own_signature_alone():
    """No fallback: who can strip or spoil the timestamp of a message must not get it judged without one."""
    hub = {"x-hub-signature-256": hookshot.sign(KEY, b"body")}
    assert take(hub).message is None
    for headers in (webhook(key=OTHER), webhook(signature=""), webhook(signature="v2,x"), webhook(timestamp=None), webhook(at_s=1)):
        turned_away({**hub, **headers})
    assert take({**webhook(), "x-hub-signature-256": "sha256=0"}).message.id == "msg_1"
    # Without the signature it is no message; what else it carries is no credential.
    assert take({**hub, "webhook-id": "msg_1", "webhook-timestamp": "1"}).message is None
    turned_away({"webhook-id": "msg_1", "webhook-timestamp": str(AT_S)})


def test_a_signature_without_a_timestamp_can_be_refused():
    said = turned_away({"x-hub-signature-256": hookshot.sign(KEY, b"body")}, require_timestamp=True)
    assert "webhook-timestamp" in said and "security.require_timestamp" in said
    assert take(webhook(), require_timestamp=True).message.id == "msg_1"


@pytest.mark.parametrize("body", [b"", b" { } \n", b"\xff\0", b".", b"x" * 100_000])
def test_the_body_of_a_message_is_its_raw_bytes(body):
    assert take(webhook(body), body).body == body
    turned_away(webhook(body), body + b"\n")


@pytest.mark.parametrize("signer, key_id", [(KEY, "new"), (OTHER, "old"), (b"n" * 32, None)])
def test_any_of_the_keys_may_sign_a_message_and_is_named(signer, key_id):
    keys = {"new": KEY, "old": WHSEC}
    if key_id:
        assert take(webhook(key=signer), keys=keys).key_id == key_id
    else:
        turned_away(webhook(key=signer), keys=keys)


@pytest.mark.parametrize("key", [b"", b" ", b"short", b"x" * 15])
def test_an_empty_or_short_key_signs_no_message(key):
    assert turned_away(webhook(key=key), keys={"main": key}) == "the signature is missing or wrong"


@pytest.mark.parametrize("secret, word", [
    (KEY, None), (WHSEC, None), (b"whsec_" + base64.b64encode(b"x" * 16), None), (b"whsec_" + base64.b64encode(b"x" * 15), "shorter"),
    (b"whsec_", "shorter"), (b"whsec_not base64 at all!!!", "base64"), (b"whsec_AAAAAAAAAAAAAAAAAAAAAAAAA", "base64"),
    (b"whsec_\xff" + b"A" * 24, "base64")])
def test_a_secret_that_claims_to_be_whsec_is_one(secret, word):
    problem = hookshot.check_webhook_key(secret)
    assert (problem is None) if word is None else (word in problem and "AAAA" not in problem)


@pytest.mark.parametrize("headers, claims", [
    ({}, False), ({"x-hub-signature-256": ""}, True), ({"webhook-signature": ""}, True),
    ({"webhook-id": "a", "webhook-timestamp": "1"}, False),
    ({"authorization": "Bearer x"}, False), ({"x-hub-signature": "sha1=0"}, False)])
def test_what_claims_to_be_signed(headers, claims):
    assert hookshot.has_signature(headers) == claims


def test_a_message_goes_with_the_deploy_request():
    body = json.dumps(GOOD).encode()
    request = hookshot.parse_deploy(take(webhook(body), body), None)
    assert request.message == ("msg_1", (AT_S + 300) * 1000) and request.key_id == "main"


# --- strict JSON

DEEP = 100_000
BAD_JSON = {
    "empty": (b"", "body"), "blank": (b" \n", "body"), "text": (b"service=web", "body"), "two": (b"{}{}", "body"),
    "trailing": (b'{"service":"web",}', "body"),
    "comment": (b"{} // x", "body"), "single quotes": (b"{'service':'web'}", "body"),
    "not UTF-8": (b'{"service":"\xff"}', "body is not UTF-8"),
    "UTF-16": ('{"service":"web"}'.encode("utf-16"), "body is not UTF-8"),
    "BOM": (b'\xef\xbb\xbf{"service":"web","image":"app:1"}', "body"),
    "encoded surrogate": (b'{"service":"\xed\xa0\x80"}', "body is not UTF-8"),
    "overlong NUL": (b'{"service":"\xc0\x80"}', "body is not UTF-8"), "raw newline": (b'{"image":"a\nb"}', "body"),
    "list": (b"[]", "not a JSON object"), "null": (b"null", "not a JSON object"), "string": (b'"web"', "not a JSON object"),
    "number": (b"1", "not a JSON object"),
    "true": (b"true", "not a JSON object"), "NaN alone": (b"NaN", "body"), "huge alone": (b"9" * 5000, "body"),
    "twice": (b'{"service":"web","image":"app:1","image":"evil"}', "image: appears twice"),
    "twice, escaped": (b'{"service":"web","image":"app:1","im\\u0061ge":"evil"}', "image: appears twice"),
    "twice, deeper": (b'{"service":"web","image":"app:1","metadata":{"k":1,"k":2}}', "k: appears twice"),
    "NaN": (b'{"service":"web","image":"app:1","metadata":{"k":NaN}}', "metadata.k: NaN"),
    "Infinity": (b'{"service":"web","image":"app:1","metadata":{"k":Infinity}}', "metadata.k: Infinity"),
    "-Infinity": (b'{"service":"web","image":"app:1","metadata":{"k":-Infinity}}', "metadata.k: -Infinity"),
    "NaN as a flag": (b'{"service":"web","image":"app:1","dry_run":NaN}', "dry_run: NaN"),
    "overflow": (b'{"service":"web","image":"app:1","metadata":{"k":1e999}}', "metadata.k: 1e999"),
    "negative overflow": (b'{"service":"web","image":"app:1","metadata":{"k":-1e999}}', "metadata.k: -1e999"),
    "5000 digits": (b'{"service":"web","image":"app:1","metadata":{"k":' + b"9" * 5000 + b"}}", "metadata.k: 999"),
    "5000 digits in a list": (b'{"service":"web","image":"app:1","metadata":{"k":[[' + b"9" * 5000 + b"]]}}",
                              "metadata.k.0.0: 999"),
    "long fraction": (b'{"service":"web","image":"app:1","metadata":{"k":0.' + b"1" * 5000 + b"}}", "metadata.k: 0.111"),
    "lone surrogate": (b'{"service":"web","image":"app:1","metadata":{"k":"\\ud800"}}', "metadata.k: has a lone surrogate"),
    "lone low surrogate": (b'{"service":"web","image":"app\\udfff:1"}', "image: has a lone surrogate"),
    "surrogate in a key": (b'{"service":"web","image":"app:1","metadata":{"\\ud800":1}}',
                           "metadata, a key: has a lone surrogate"),
    "NUL": (b'{"service":"web","image":"app:1\\u0000"}', "image: has a NUL"),
    "NUL in env": (b'{"service":"web","image":"app:1","overrides":{"env":{"A":"\\u0000"}}}', "overrides.env.A: has a NUL"),
    "NUL in a key": (b'{"service":"web","image":"app:1","metadata":{"\\u0000":1}}', "metadata, a key: has a NUL"),
    "NUL in an unknown field": (b'{"service":"web","image":"app:1","zzz":["\\u0000"]}', "zzz.0: has a NUL"),
    "lists, deep": (b"[" * DEEP + b"]" * DEEP, "deeper than 16"), "lists, deep and open": (b"[" * DEEP, "body"),
    "objects, deep": (b'{"a":' * DEEP + b"1" + b"}" * DEEP, "deeper than 16"),
    "metadata, deep": (b'{"service":"web","image":"app:1","metadata":{"k":' + b"[" * 15 + b"]" * 15 + b"}}", "metadata.k"),
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_json_that_two_parsers_could_read_differently_is_refused_by_field(name):
    body, words = BAD_JSON[name]
    assert words in refusal(body)


@pytest.mark.parametrize("opener, closer", [("[", "]"), ('{"a":', "}")])
def test_nesting_ends_at_16_levels(opener, closer):
    assert hookshot.parse_json((opener * 15 + "[]" + closer * 15).encode())
    with pytest.raises(hookshot.HookshotError, match="nested deeper than 16 levels"):
        hookshot.parse_json((opener * 16 + "[]" + closer * 16).encode())


@pytest.mark.parametrize("text, value", [("0", 0), ("-1", -1), ("9223372036854775807", 2**63 - 1), ("1.5", 1.5), ("1e3", 1000.0),
                                         ('"\\ud83d\\ude80"', "🚀"), ('"ü"', "ü"), ("[]", []),
                                         ('{"a":{"b":1},"c":{"b":1}}', {"a": {"b": 1}, "c": {"b": 1}})])
def test_plain_json_is_what_it_says(text, value):
    assert hookshot.parse_json(text.encode()) == value


def test_a_refusal_never_repeats_a_long_or_hostile_key():
    sentence = refusal({**GOOD, "x\n\x1b[31m" + "y" * 5000: 1})
    assert sentence.isprintable() and len(sentence) < 300


def test_a_body_full_of_wrong_fields_is_refused_at_little_cost():
    """A megabyte of unknown names must not become another megabyte of answer."""
    body = json.dumps({**GOOD, **{f"zserv{index}": 0 for index in range(50_000)}}).encode()
    with pytest.raises(hookshot.HookshotError) as caught:
        parse(body)
    assert len(hookshot.render_problem(caught.value, "r", 0)) < 50_000


# --- deploy requests

def test_a_small_request_leaves_the_rest_open():
    body = json.dumps(GOOD).encode()
    assert parse(body) == hookshot.DeployRequest(
        deploy_id=None, service="web", image="app:1", previous_image=None, metadata={}, env={}, dry_run=False,
        digest=hashlib.sha256(body).hexdigest(),
        idempotency_key=None, key_id="main")


def test_a_full_request_is_read_whole():
    request = parse({"deploy_id": "d-1", "service": "web", "image": "app:2", "previous_image": "app:1",
                     "metadata": {"branch": "main"},
                     "overrides": {"env": {"LOG_LEVEL": "debug"}}, "dry_run": True}, '"key"')
    assert request[:7] == ("d-1", "web", "app:2", "app:1", {"branch": "main"}, {"LOG_LEVEL": "debug"}, True)
    assert (request.idempotency_key, request.key_id) == ("key", "main")


def test_null_is_the_same_as_leaving_a_field_out():
    absent, null = parse(GOOD), parse({**GOOD, "deploy_id": None, "previous_image": None, "metadata": None, "overrides": None,
                                       "dry_run": None})
    assert absent._replace(digest="") == null._replace(digest="")
    assert parse({**GOOD, "overrides": {"env": None}}).env == {}


def test_other_bytes_of_the_same_document_have_another_digest():
    """What is compared for a repeated deploy_id is what was signed."""
    assert parse(json.dumps(GOOD).encode()).digest != parse(json.dumps(GOOD, indent=1).encode()).digest


def test_metadata_is_kept_as_text():
    request = parse({**GOOD, "metadata": {"text": "a b", "int": 7, "float": 1.5, "true": True, "false": False, "null": None,
                                          "empty": ""}})
    assert request.metadata == {"text": "a b", "int": "7", "float": "1.5", "true": "true", "false": "false", "empty": ""}


WRONG_TYPES = [(field, value) for field, values in {
    "deploy_id": [1, True, [], {}, 1.5], "service": [1, True, [], {}], "image": [1, False, ["app:1"], {}],
    "previous_image": [1, False, [], {}],
    "metadata": ["x", 1, [], [["a", "b"]], True], "overrides": ["x", 1, [], True], "dry_run": ["true", 1, 0, "", [], {}]}.items()
               for value in values]


@pytest.mark.parametrize("field, value", WRONG_TYPES)
def test_a_wrong_type_is_refused_by_field(field, value):
    assert refusal({**GOOD, field: value}).startswith(f"{field}: is not ")


@pytest.mark.parametrize("document, words", [
    ({}, "service: is required; image: is required"), ({"service": "web"}, "image: is required"),
    ({**GOOD, "image": None}, "image: is required"),
    ({**GOOD, "overrides": {"env": "x"}}, "overrides.env: is not an object"),
    ({**GOOD, "overrides": {"env": {"A": []}}}, "overrides.env.A: is not a text"),
    ({**GOOD, "metadata": {"a": {}}}, "metadata.a: is not a text"),
    ({**GOOD, "metadata": {"a": [1]}}, "metadata.a: is not a text"),
    ({**GOOD, "imge": "x"}, "imge: unknown field; did you mean image?"), ({**GOOD, "zzz": 1}, "zzz: unknown field"),
    ({**GOOD, "Image": "x"}, "Image: unknown field"),
    ({**GOOD, "overrides": {"image": "x"}}, "overrides.image: unknown field"),
    ({**GOOD, "overrides": {"evn": {}}}, "overrides.evn: unknown field; did you mean env?"),
    ({**GOOD, "metadata": {"a b": 1}}, "metadata.a b: is not a valid name"),
    ({**GOOD, "metadata": {"": 1}}, "metadata.: is not a valid name"),
    ({**GOOD, "metadata": {"k\n": 1}}, "is not a valid name"), ({**GOOD, "metadata": {"x" * 65: 1}}, "is not a valid name"),
    ({**GOOD, "overrides": {"env": {"A-B": "x"}}}, "overrides.env.A-B: is not a valid name"),
    ({**GOOD, "overrides": {"env": {"A=B": "x"}}}, "is not a valid name"),
    ({**GOOD, "overrides": {"env": {"A\n": "x"}}}, "is not a valid name"),
    ({**GOOD, "metadata": {f"k{index}": 1 for index in range(51)}}, "metadata: has more than 50 keys"),
    ({**GOOD, "image": ""}, "image: is empty"), ({**GOOD, "image": "  "}, "image: is empty"),
    ({**GOOD, "previous_image": ""}, "previous_image: is empty")])
def test_a_bad_field_is_refused_by_its_path(document, words):
    assert words in refusal(document)


def test_fifty_metadata_keys_are_allowed():
    assert len(parse({**GOOD, "metadata": {f"k{index}": index for index in range(50)}}).metadata) == 50


def test_all_problems_are_told_at_once():
    sentence = refusal({"deploy_id": "../x", "service": "a/b", "image": "-v", "previous_image": "a\tb", "metadata": {"k": []},
                        "overrides": {"env": {"1": "x"}, "extra": 1}, "dry_run": "no", "more": 1})
    assert {part.partition(":")[0] for part in sentence.split("; ")} == {
        "deploy_id", "service", "image", "previous_image", "metadata.k", "overrides.env.1", "overrides.extra", "dry_run", "more"}


@pytest.mark.parametrize("deploy_id", ["a", "7", "2024.01-x_y", "x" * 128])
def test_a_deploy_id_may_be_the_callers(deploy_id):
    assert parse({**GOOD, "deploy_id": deploy_id}).deploy_id == deploy_id


@pytest.mark.parametrize("deploy_id", ["", ".", "..", "-a", "_a", "a/b", "../../etc/passwd", "a\\b", "a b", "a\n", "é", "x" * 129,
                                       "a:b", "a%2fb", "a;b"])
def test_a_deploy_id_is_no_path(deploy_id):
    """It names a file of the log and a part of URLs (OliveTin CVE-2026-31817)."""
    assert refusal({**GOOD, "deploy_id": deploy_id}).startswith("deploy_id: is not 1 to 128 of")


@pytest.mark.parametrize("service", ["", "a b", "a/b", "web\n", "x" * 33, "web.", "é"])
def test_a_service_name_is_checked_before_it_is_looked_up(service):
    assert refusal({**GOOD, "service": service}).startswith("service: is not a service name")


UNFIT = ["-v", "--privileged", "a\nb", "a\n", "\ta", "a\x1b[0m", "a\x7f", "a\x9b", "a\u202eb", "a\u2028", "a\u200b", "\ufeffa",
         "x" * 513]


@pytest.mark.parametrize("value", UNFIT)
@pytest.mark.parametrize("field", ["image", "previous_image", "metadata.k"])
def test_a_value_that_may_become_an_argument_is_plain_text(field, value):
    name, _, key = field.partition(".")
    assert refusal({**GOOD, name: {key: value} if key else value}).startswith(f"{field}: ")


@pytest.mark.parametrize("value", [value for value in UNFIT if not value.startswith("-")])
def test_a_value_of_the_environment_is_plain_text(value):
    assert refusal({**GOOD, "overrides": {"env": {"A": value}}}).startswith("overrides.env.A: ")


def test_a_value_of_the_environment_may_begin_with_a_dash():
    """It is no argument: "-Xmx1g" and -1 are good values."""
    assert parse({**GOOD, "overrides": {"env": {"JAVA": "-Xmx1g", "N": -1, "T": True}}}).env == {"JAVA": "-Xmx1g", "N": "-1",
            "T": "true"}


def test_a_negative_number_is_no_option_either():
    assert "metadata.k: starts with '-'" in refusal({**GOOD, "metadata": {"k": -1}})


@pytest.mark.parametrize("value", ["$(reboot)", "; rm -rf / #", "`id`", "a b", "{{IMAGE}}", "app:ünï", "x" * 512])
def test_shell_characters_are_ordinary_characters(value):
    """No shell reads them; what an image may be is the service's pattern to say."""
    request = parse({**GOOD, "image": value, "metadata": {"k": value}})
    assert (request.image, request.metadata["k"]) == (value, value)


# --- Idempotency-Key and the wish to wait

@pytest.mark.parametrize("header, key", [(None, None), ("abc", "abc"), ('"abc"', "abc"),
                                         ("8e03978e-40d5-43dd-bc93-6894a57f9324", "8e03978e-40d5-43dd-bc93-6894a57f9324"),
                                         ("a/b:c=d", "a/b:c=d"), ("x" * 255, "x" * 255), ('"' + "x" * 255 + '"', "x" * 255)])
def test_an_idempotency_key_is_the_same_quoted_or_bare(header, key):
    assert parse(GOOD, header).idempotency_key == key


@pytest.mark.parametrize("header", ["", '""', '"', '"a', 'a"', 'a"b', '"a"b"', "a b", "a\tb", "é", "a\\b", "x" * 256, '"a\n"',
                                    "a\n"])
def test_any_other_idempotency_key_is_refused_by_name(header):
    assert refusal(GOOD, header).startswith("Idempotency-Key: is not")


@pytest.mark.parametrize("prefer, seconds", [
    (None, None), ("", None), ("wait=10", 10), ("Wait = 10", 10), ("respond-async, wait=10", 10), ("wait=10, respond-async", 10),
    ('wait="10"', 10), ("wait=0", 0),
    ("wait=5, wait=10", 5), ("respond-async", None), ("wait", None), ("wait=", None), ("wait=soon", None), ("wait=-1", None),
    ("wait=1.5", None), ("wait=٣", None),
    ("wait=9999999", None), ("waiting=10", None), ("return=minimal; wait=10", None), ("wait=10; foo=bar", 10),
    ('wait=10;foo="x"', 10), (",,wait=3", 3)])
def test_prefer_wait_is_read_as_rfc_7240_says(prefer, seconds):
    """A preference that is not understood is no preference."""
    assert hookshot.parse_wait({}, prefer) == seconds


@pytest.mark.parametrize("text, seconds", [("0", 0), ("30", 30), ("999999", 999999)])
def test_wait_in_the_query_wins_over_the_header(text, seconds):
    assert hookshot.parse_wait({"wait": text}, "wait=5") == seconds


@pytest.mark.parametrize("text", ["", "soon", "-1", "1.5", "1e3", "٣", "9999999", "5\n", " 5"])
def test_a_bad_wait_in_the_query_is_refused(text):
    """Unlike a preference, a parameter is a demand."""
    with pytest.raises(hookshot.HookshotError, match="^wait: ") as caught:
        hookshot.parse_wait({"wait": text}, None)
    assert caught.value.kind.http == 400


# --- answers

def test_a_problem_has_the_members_of_rfc_9457_and_of_the_original():
    error = hookshot.HookshotError("conflict", "the id is taken", details="by another body")
    assert json.loads(hookshot.render_problem(error, "req-1", 1767225599999)) == {
        "type": "about:blank", "title": "The id is taken by another request", "status": 409, "detail": "the id is taken",
        "error": "the id is taken",
        "code": "DEPLOY_ID_CONFLICT", "details": "by another body", "timestamp": "2025-12-31T23:59:59.999Z",
        "request_id": "req-1"}


def test_details_are_null_when_there_are_none():
    assert json.loads(hookshot.render_problem(hookshot.HookshotError("not_found", "x"), "r", 0))["details"] is None


def test_an_answer_is_one_line_of_utf_8_whatever_the_text():
    """A file name or an output can hold what UTF-8 cannot."""
    line = hookshot.render_json({"a": "ü\n\u2028", "b": "x\udcffy"})
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    assert json.loads(line) == {"a": "ü\n\u2028", "b": "x?y"}
