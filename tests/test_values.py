# SPDX-License-Identifier: MPL-2.0
"""VALUES: texts and numbers in and out."""

import ipaddress
import time

import pytest

import hookshot

NOT_A_WHOLE_LINE = ["{}\n", "\n{}", "{}\0", " {}", "{} ", "{}\r", "{}\u2028"]


@pytest.mark.parametrize("text, seconds", [
    (0, 0), (90, 90), (-1, -1), ("90", 90), ("90s", 90), ("90S", 90), ("5m", 300), ("2h", 7200), ("1d", 86400), (" 5 m ", 300),
    ("0", 0)])
def test_a_duration_is_seconds_or_a_number_with_a_unit(text, seconds):
    assert hookshot.parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "s", "5x", "-5s", "1.5h", "1h30m", "٣s", "5 minutes", "9" * 10, "1e3", True, 1.5, None, [],
                                  {}, "5\0m"])
def test_anything_else_is_no_duration(text):
    with pytest.raises(ValueError, match="is not a duration; write seconds"):
        hookshot.parse_duration(text)


@pytest.mark.parametrize("text, size", [
    (0, 0), (1048576, 1 << 20), ("512", 512), ("512b", 512), ("64KB", 64 << 10), ("64k", 64 << 10), ("64KiB", 64 << 10),
    ("1MB", 1 << 20),
    ("1 mb", 1 << 20), ("  2  Mb ", 2 << 20), ("1GB", 1 << 30), ("1gib", 1 << 30), ("0MB", 0)])
def test_a_size_is_bytes_or_a_number_with_a_unit_of_1024(text, size):
    assert hookshot.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "1TB", "1.5MB", "-1MB", "1 M B", "١MB", "1" * 16, True, 1.0, None, ["1MB"]])
def test_anything_else_is_no_size(text):
    with pytest.raises(ValueError, match="is not a size; write bytes"):
        hookshot.parse_size(text)


@pytest.mark.parametrize("size, text", [(0, "0 B"), (1023, "1023 B"), (1024, "1 KB"), (1 << 20, "1 MB"), (3 << 29, "1.5 GB")])
def test_a_size_is_shown_in_the_largest_unit_it_fills(size, text):
    assert hookshot.render_size(size) == text


@pytest.mark.parametrize("ms, text", [(None, "-"), (0, "0 ms"), (999, "999 ms"), (1000, "1.0 s"), (4230, "4.2 s"),
                                      (60_000, "1 m"), (3_600_000, "1 h"),
                                      (200_000, "3 m 20 s"), (7_500_000, "2 h 5 m")])
def test_a_duration_is_shown_for_people(ms, text):
    assert hookshot.render_duration(ms) == text


@pytest.fixture
def tokyo(monkeypatch):
    """A host whose clock shows another zone's time."""
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "Asia/Tokyo")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.parametrize("ms, text", [(0, "1970-01-01T00:00:00.000Z"), (1767225599999, "2025-12-31T23:59:59.999Z"),
                                      (60_001, "1970-01-01T00:01:00.001Z")])
def test_a_time_is_rfc_3339_in_utc_with_milliseconds(ms, text, tokyo):
    assert hookshot.render_time(ms) == text


def test_a_time_that_has_not_come_is_none():
    assert hookshot.render_time(None) is None


@pytest.mark.parametrize("pattern, good, bad", [
    (hookshot.SERVICE_NAME, ["a", "A-b_9", "x" * 32], ["", "x" * 33, "a.b", "a/b", "..", "é", "a b"]),
    (hookshot.DEPLOY_ID, ["a", "7", "a.b-c_d", "x" * 128], ["", "x" * 129, ".a", "-a", "_a", "../a", "a/b", "a\\b", "é", "a:b"]),
    (hookshot.REQUEST_ID, ["a", ".", "-x_", "x" * 128], ["", "x" * 129, "a b", "a/b", "é"]),
    (hookshot.ENV_NAME, ["A", "_", "a1_B", "x" * 128], ["", "1A", "A-B", "A=B", "x" * 129, "É"]),
    (hookshot.SECRET_NAME, ["hmac_key", "a.b-c", "x" * 64], ["", "x" * 65, "a/b", "a=b"]),
    (hookshot.META_KEY, ["branch", "build.id", "a-b", "9"], ["", "x" * 65, "a b", "a=b", "٣"]),
], ids=["service", "deploy_id", "request_id", "env", "secret", "metadata"])
def test_a_name_is_its_whole_text(pattern, good, bad):
    """Nothing before it, nothing after it, not even a final newline; only ASCII letters and digits."""
    assert [text for text in good if not pattern.fullmatch(text)] == []
    assert [text for text in bad if pattern.fullmatch(text)] == []
    assert [frame for frame in NOT_A_WHOLE_LINE if pattern.fullmatch(frame.format(good[0]))] == []


@pytest.mark.parametrize("text", ["", "v1.2", "ghcr.io/o/n:1@sha256:ab", "a - b", "x" * 512, "ünïcode",
                                  "$(reboot); `id` | && {{IMAGE}} \\'\"", "日本"])
def test_a_request_value_may_be_any_printable_text(text):
    assert hookshot.check_request_value(text) is None


@pytest.mark.parametrize("text", [
    "a\n", "\n", "a\tb", "a\rb", "\x1b[2J", "a\0", "\x7f", "\x85", "\x9b31m", "a\u2028b", "a\u202eb", "a\u2066b", "a\u200bb",
    "\ufeffa", "\ud800", "a\u00a0b"])
def test_a_request_value_has_no_unprintable_character(text):
    assert "unprintable" in hookshot.check_request_value(text)


def test_a_request_value_is_no_option_and_no_novel():
    assert "option" in hookshot.check_request_value("--privileged")
    assert "option" in hookshot.check_request_value("-")
    assert hookshot.check_request_value("-Xmx1g", may_start_with_dash=True) is None
    assert "512" in hookshot.check_request_value("x" * 513)


@pytest.mark.parametrize("text", ["a\nb", "a\x1b[31mb", "a\x9bb", "a\x7fb", "a\u202eb", "a\u2067b", "a\u2028b", "a\rb", "a\0b",
                                  "\x85"])
def test_escaped_text_stays_on_its_line_and_reads_as_it_is(text):
    escaped = hookshot.escape_controls(text)
    assert escaped.isprintable() and "\\" in escaped


def test_text_without_controls_is_not_changed_by_escaping():
    assert hookshot.escape_controls("naïve 日本 {}") == "naïve 日本 {}"


@pytest.mark.parametrize("value", ["\x9b31m", "\x7f", "\u202egnp.exe", "\u2028", ["\x9b"], {"\x9b": 1}])
def test_a_configuration_value_is_shown_without_control_characters(value):
    """A message about a file goes to a terminal."""
    assert hookshot.render_value(value).isprintable()


@pytest.mark.parametrize("value, text", [(True, "true"), (7, "7"), ("a", '"a"'), ([1, "b"], '[1, "b"]'),
                                         ("x" * 200, '"' + "x" * 78 + "…")])
def test_a_configuration_value_is_shown_as_its_file_writes_it(value, text):
    assert hookshot.render_value(value) == text


@pytest.mark.parametrize("limit, text", [(3, "abc"), (4, "abc"), (2, "a…")])
def test_clipped_text_never_exceeds_its_limit(limit, text):
    assert hookshot.clip("abc", limit) == text


def test_a_misspelt_name_is_answered_with_the_nearest_known_one():
    assert hookshot.nearest("timout", ["timeout", "retries"]) == "; did you mean timeout?"
    assert hookshot.nearest("zzz", ["timeout", "retries"]) == ""


@pytest.mark.parametrize("text, network", [("192.0.2.7", "192.0.2.7/32"), ("10.0.0.0/8", "10.0.0.0/8"), ("::1", "::1/128"),
                                           ("2001:db8::/32", "2001:db8::/32"), ("0.0.0.0/0", "0.0.0.0/0")])
def test_a_network_is_a_bare_address_or_cidr(text, network):
    assert str(hookshot.parse_network(text)) == network


@pytest.mark.parametrize("text, right", [("10.1.2.3/8", "10.0.0.0/8"), ("2001:db8::1/32", "2001:db8::/32")])
def test_host_bits_in_a_network_are_refused_with_the_right_one(text, right):
    with pytest.raises(ValueError, match=f"the network is {right}"):
        hookshot.parse_network(text)


@pytest.mark.parametrize("text", ["", "10.0.0.0/33", "10.0.0", "example.com", "10.0.0.1:80", "*", 167772160, None, True,
                                  "10.0.0.0/8\n", "٣.0.0.1"])
def test_anything_else_is_no_network(text):
    with pytest.raises(ValueError):
        hookshot.parse_network(text)


@pytest.mark.parametrize("text, address", [
    ("192.0.2.7", "192.0.2.7"), ("192.0.2.7:4711", "192.0.2.7"), (" 192.0.2.7 ", "192.0.2.7"),
    ("::1", "::1"), ("[::1]", "::1"), ("[2001:db8::17]:4711", "2001:db8::17"), ("fe80::1%eth0", "fe80::1"),
    ("::ffff:10.0.0.1", "10.0.0.1"), ("[::ffff:10.0.0.1]:80", "10.0.0.1")])
def test_an_address_loses_port_brackets_zone_and_mapping(text, address):
    assert hookshot.parse_address(text) == ipaddress.ip_address(address)


@pytest.mark.parametrize("text", ["", "unknown", "_hidden", "10.0.0", "10.0.0.1.5", "[]", "010.0.0.1", "127.1", "0x7f000001",
                                  "2130706433", "localhost", '"192.0.2.7"', '192.0.2.7"'])
def test_an_unreadable_address_is_none_and_lies_in_no_network(text):
    """None of the other spellings that a C library would take for an address."""
    assert hookshot.parse_address(text) is None
    assert not hookshot.is_in(hookshot.parse_address(text), [hookshot.parse_network("0.0.0.0/0"), hookshot.parse_network("::/0")])


@pytest.mark.parametrize("address, inside", [("10.9.9.9", True), ("::ffff:10.9.9.9", True), ("11.0.0.0", False), ("::1", True),
                                             ("::2", False)])
def test_an_address_lies_in_networks_of_its_own_version(address, inside):
    networks = [hookshot.parse_network("10.0.0.0/8"), hookshot.parse_network("::1")]
    assert hookshot.is_in(hookshot.parse_address(address), networks) is inside


@pytest.mark.parametrize("text, host, port, url", [
    ("127.0.0.1:8080", "127.0.0.1", 8080, "http://127.0.0.1:8080"), (":8080", "", 8080, "http://127.0.0.1:8080"),
    ("0.0.0.0:80", "0.0.0.0", 80, "http://127.0.0.1:80"), ("[::1]:8080", "::1", 8080, "http://[::1]:8080"),
    ("[::]:8080", "::", 8080, "http://[::1]:8080"), ("localhost:0", "localhost", 0, "http://localhost:0"),
    ("systemd:80", "systemd", 80, "http://systemd:80")])
def test_a_listen_address_is_host_and_port_and_knows_its_url(text, host, port, url):
    address = hookshot.parse_listen(text)
    assert (address[:3], address.url(is_tls=False)) == ((host, port, ""), url)


@pytest.mark.parametrize("text", ["", "8080", "127.0.0.1", "127.0.0.1:", "127.0.0.1:65536", "127.0.0.1:-1", "::1:8080", "[::1]",
                                  "[::1:8080", "http://a:80",
                                  "a b:80", "a:80\n", "a:８０", "a:٨٠", 8080, None, True, "a:80/x"])
def test_anything_else_is_no_listen_address(text):
    with pytest.raises(ValueError, match="is not host:port"):
        hookshot.parse_listen(text)


@pytest.mark.parametrize("text, parts", [
    ("nginx", ("", "nginx", "", "")), ("nginx:1.27", ("", "nginx", "1.27", "")), ("library/nginx", ("", "library/nginx", "", "")),
    ("ghcr.io/o/n:v1", ("ghcr.io", "o/n", "v1", "")), ("ghcr.io/o/n@sha256:ab", ("ghcr.io", "o/n", "", "sha256:ab")),
    ("ghcr.io/o/n:v1@sha256:ab", ("ghcr.io", "o/n", "v1", "sha256:ab")), ("localhost/n:1", ("localhost", "n", "1", "")),
    ("localhost:5000/n", ("localhost:5000", "n", "", "")), ("host:5000/a/b/n:2", ("host:5000", "a/b/n", "2", "")),
    ("", ("", "", "", "")), ("/", ("", "/", "", "")), ("abc123", ("", "abc123", "", "")), (":", ("", "", "", "")),
    ("@", ("", "", "", ""))])
def test_an_image_falls_into_registry_repository_tag_and_digest(text, parts):
    """Any text has a reading: a commit or a file name is an image too."""
    assert hookshot.parse_image(text) == parts
