# SPDX-License-Identifier: MPL-2.0
"""SECRETS: where keys come from, what is refused, and that no message ever holds one."""

import os
import pathlib
import pwd
import socket

import pytest

import hookshot
from support import KEY

# Stands in every bad input; it must be in no message.
CANARY = "c4n4ryc4n4ry0f1e2d3c4b5a69788796a5b4c3d2"
OTHER = "ffeeddccbbaa99887766554433221100ffeeddccbbaa99887766554433221100"


def load(tmp_path, config="", *, env=None, credentials=None, services="", head=""):
    """Return the secrets that are found, and the problems as texts; warnings start with "warning: "."""
    problems: list[hookshot.Problem] = []
    path = tmp_path / "secrets"
    text = f'{head}\n[secrets]\nsecrets_file = "{path}"\n{config}'
    loaded = hookshot.load_config(text, "config.toml", problems)
    parsed = hookshot.load_services(services, "services.toml", loaded, problems) if services else hookshot.Services({})
    assert problems == []
    surroundings = hookshot.SecretSurroundings.take({} if env is None else env, loaded.secrets.secret_prefix)
    surroundings = surroundings._replace(credentials=str(credentials) if credentials else surroundings.credentials)
    keyring = hookshot.load_keyring(loaded, parsed, surroundings, "config.toml", problems)
    texts = ["warning: " * problem.is_warning + f"{problem.file}: {problem.path}: {problem.message}" for problem in problems]
    assert not any(CANARY in text or CANARY[:8] in text for text in texts), texts
    return dict(keyring.values), texts


def write(tmp_path, content: str | bytes, mode=0o600):
    path = tmp_path / "secrets"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    path.chmod(mode)
    return path


def only(texts: list[str], *words: str) -> None:
    """Assert that there is one error, and what it says."""
    errors = [text for text in texts if not text.startswith("warning: ")]
    assert len(errors) == 1 and all(word in errors[0] for word in words), texts


SERVER_FILE = f"hmac_key={KEY}\n"


@pytest.fixture
def credentials(tmp_path):
    folder = tmp_path / "credentials"
    folder.mkdir()
    (folder / "hmac_key").write_text(KEY)
    return folder


# --- the sources

def test_a_secret_comes_from_the_file(tmp_path):
    write(tmp_path, SERVER_FILE)
    assert load(tmp_path, 'source = "file"') == ({"hmac_key": KEY.encode()}, [])


def test_a_secret_comes_from_the_environment(tmp_path):
    assert load(tmp_path, 'source = "env"', env={"HOOKSHOT_HMAC_KEY": KEY}) == ({"hmac_key": KEY.encode()}, [])


def test_a_secret_comes_from_a_systemd_credential(tmp_path, credentials):
    assert load(tmp_path, 'source = "systemd"', credentials=credentials) == ({"hmac_key": KEY.encode()}, [])


def test_a_secret_comes_from_a_command(tmp_path):
    config = f'source = "command"\ncommand = ["printf", "# made\\nhmac_key=%s\\nother=x y\\n", "{KEY}"]'
    assert load(tmp_path, config) == ({"hmac_key": KEY.encode(), "other": b"x y"}, [])


def test_auto_finds_the_file(tmp_path):
    """The original's "auto" skipped it."""
    write(tmp_path, SERVER_FILE)
    assert load(tmp_path)[0] == {"hmac_key": KEY.encode()}


def test_auto_takes_every_source_and_misses_none_of_those_that_are_not_there(tmp_path, credentials):
    write(tmp_path, "b=2\n")
    (credentials / "a").write_text("1")
    config = 'command = ["echo", "d=4"]'
    values, problems = load(tmp_path, config, env={"HOOKSHOT_C": "3"}, credentials=credentials)
    assert values == {"hmac_key": KEY.encode(), "a": b"1", "b": b"2", "c": b"3", "d": b"4"} and problems == []


def test_auto_without_any_secret_names_what_is_missing(tmp_path):
    only(load(tmp_path)[1], f"secret hmac_key is not found in any source ({tmp_path}/secrets does not exist);")


@pytest.mark.parametrize("order, winner", [
    ('', "systemd"), ('sources_priority = ["file", "systemd", "env"]', "file"), ('sources_priority = ["env", "file"]', "env"),
    ('source = ["env", "systemd"]', "env"), ('sources_priority = ["command", "file"]', "command")])
def test_the_first_source_that_has_a_secret_wins(tmp_path, credentials, order, winner):
    values = {name: f"{number}{KEY}" for number, name in enumerate(("systemd", "file", "env", "command"))}
    write(tmp_path, f"hmac_key={values['file']}\nonly_file=1\n")
    (credentials / "hmac_key").write_text(values["systemd"])
    config = f'{order}\ncommand = ["echo", "hmac_key={values["command"]}"]'
    found, problems = load(tmp_path, config, env={"HOOKSHOT_HMAC_KEY": values["env"]}, credentials=credentials)
    assert found["hmac_key"] == values[winner].encode() and problems == []


def test_a_source_that_is_not_named_is_not_read(tmp_path, credentials):
    write(tmp_path, "from_file=1\n")
    values, _ = load(tmp_path, 'source = "systemd"', env={"HOOKSHOT_FROM_ENV": "1"}, credentials=credentials)
    assert values == {"hmac_key": KEY.encode()}


def test_all_secrets_are_loaded_not_only_the_required_ones(tmp_path):
    write(tmp_path, SERVER_FILE + f"github={OTHER}\n")
    assert load(tmp_path)[0] == {"hmac_key": KEY.encode(), "github": OTHER.encode()}


# --- the environment

@pytest.mark.parametrize("prefix, name", [
    ("HOOKSHOT_", "HOOKSHOT_HMAC_KEY"), ("HOOKSHOT", "HOOKSHOT_HMAC_KEY"), ("MY_APP_", "MY_APP_HMAC_KEY"), ("MY_APP", "MY_APP_HMAC_KEY"),
    ("HOOKSHOT_", "DEPLOY_RECEIVER_HMAC_KEY"), ("MY_APP", "DEPLOY_RECEIVER_HMAC_KEY")])
def test_the_prefix_may_end_in_an_underscore_and_the_old_one_is_understood(tmp_path, prefix, name):
    """The original doubled the underscore."""
    env = {name: KEY, "PATH": "/bin"}
    assert load(tmp_path, f'secret_prefix = "{prefix}"', env=env)[0] == {"hmac_key": KEY.encode()}
    assert env == {"PATH": "/bin"}


@pytest.mark.parametrize("turned", [False, True])
def test_our_own_prefix_wins_over_the_old_one(tmp_path, turned):
    pairs = [("HOOKSHOT_HMAC_KEY", KEY), ("DEPLOY_RECEIVER_HMAC_KEY", OTHER)]
    env = dict(pairs[::-1] if turned else pairs)
    assert load(tmp_path, env=env)[0] == {"hmac_key": KEY.encode()}
    assert env == {}


def test_secrets_are_taken_out_of_the_environment(monkeypatch):
    monkeypatch.setenv("HOOKSHOT_HMAC_KEY", KEY)
    monkeypatch.setenv("HOOKSHOT_CONFIG", "/etc/x")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", "/run/x")
    surroundings = hookshot.SecretSurroundings.take(os.environ, "HOOKSHOT_")
    assert surroundings.environment["hmac_key"] == KEY and surroundings.credentials == "/run/x"
    assert "HOOKSHOT_HMAC_KEY" not in os.environ and os.getenv("HOOKSHOT_HMAC_KEY") is None
    assert os.environ["HOOKSHOT_CONFIG"] == "/etc/x" and "config" not in surroundings.environment


def test_a_secret_in_the_environment_may_be_any_bytes(tmp_path):
    env = {"HOOKSHOT_HMAC_KEY": os.fsdecode(b"\xff\xfe" + KEY.encode())}
    assert load(tmp_path, env=env)[0] == {"hmac_key": b"\xff\xfe" + KEY.encode()}


# --- the file

@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660, 0o610, 0o601, 0o777])
def test_a_file_that_others_can_read_is_refused(tmp_path, mode):
    path = write(tmp_path, f"hmac_key={CANARY}\n", mode)
    values, problems = load(tmp_path)
    assert values == {} and any(str(path) in text and f"{mode:04o}" in text and "chmod 600" in text for text in problems)


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o700])
def test_a_file_of_ours_alone_is_read(tmp_path, mode):
    write(tmp_path, SERVER_FILE, mode)
    assert load(tmp_path) == ({"hmac_key": KEY.encode()}, [])


def test_a_file_that_belongs_to_someone_else_is_refused(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("missing: root")
    path = write(tmp_path, f"hmac_key={CANARY}\n")
    for uid, name in ((65534, pwd.getpwuid(65534).pw_name), (4321, "4321")):
        os.chown(path, uid, 65534)
        values, problems = load(tmp_path)
        assert values == {} and any(f"belongs to user {name}, and this runs as root; have it run as {name}, or run chown root:" in text for text in problems)


def test_a_file_that_is_not_there_is_a_problem_only_when_it_is_named(tmp_path, credentials):
    assert load(tmp_path, credentials=credentials)[1] == []
    only(load(tmp_path, 'source = ["systemd", "file"]', credentials=credentials)[1], "does not exist", str(tmp_path / "secrets"))


def bind_socket(path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


@pytest.mark.parametrize("make", [
    lambda path: path.mkdir(mode=0o700), lambda path: os.mkfifo(path, 0o600), lambda path: path.symlink_to("/dev/null"), bind_socket],
    ids=["folder", "fifo", "device", "socket"])
def test_what_is_no_regular_file_is_refused(tmp_path, monkeypatch, make):
    monkeypatch.chdir(tmp_path)  # The path of a socket must be short.
    make(pathlib.Path("secrets"))
    values, problems = load(tmp_path)
    assert values == {} and any(str(tmp_path / "secrets") in text for text in problems)


def test_a_file_that_we_may_not_read_is_told(tmp_path):
    if os.access(write(tmp_path, SERVER_FILE, 0), os.R_OK):
        pytest.skip("root may read everything")
    values, problems = load(tmp_path)
    assert values == {} and any("cannot be read" in text for text in problems)


def test_a_file_that_is_not_utf8_is_refused(tmp_path):
    write(tmp_path, f"a={CANARY}".encode() + b"\xff\n")
    values, problems = load(tmp_path)
    assert values == {} and any("UTF-8" in text for text in problems)


def test_comments_blank_lines_and_space_around_names_and_values_are_no_matter(tmp_path):
    write(tmp_path, f"\ufeff# comment = x\n\n  \n hmac_key = {KEY} \r\n  # more\na.b-c_1=x=y#z\n")
    assert load(tmp_path) == ({"hmac_key": KEY.encode(), "a.b-c_1": b"x=y#z"}, [])


BAD_LINES = {
    "no equals": CANARY, "no name": f"={CANARY}", "space in the name": f"my key={CANARY}", "export": f"export KEY={CANARY}",
    "double quotes": f'a="{CANARY}"', "single quotes": f"a='{CANARY}'", "name that is no name": f"{CANARY}!={CANARY}",
    "duplicate": f"hmac_key={CANARY}", "letters of another script": f"ключ={CANARY}"}


@pytest.mark.parametrize("name", BAD_LINES)
@pytest.mark.parametrize("source", ["file", "command"])
def test_a_bad_line_is_told_by_its_number_and_never_by_its_content(tmp_path, name, source):
    write(tmp_path, f"# one\nhmac_key={KEY}\n\n{BAD_LINES[name]}\nlast=1\n")
    config = f'source = "command"\ncommand = ["cat", "{tmp_path / "secrets"}"]' if source == "command" else ""
    values, problems = load(tmp_path, config)
    only(problems, "line 4" if source == "file" else "4")
    assert values["hmac_key"] == KEY.encode() and values["last"] == b"1" and len(values) == 2


def test_every_bad_line_is_told_at_once(tmp_path):
    write(tmp_path, f"{CANARY}\nhmac_key={KEY}\n{CANARY}\n")
    assert [number for number in "123" for text in load(tmp_path)[1] if f"line {number}" in text] == ["1", "3"]


# --- systemd

@pytest.mark.parametrize("content, value", [
    (KEY, KEY), (KEY + "\n", KEY), (KEY + "\n\n", KEY + "\n"), ("\n" + KEY, "\n" + KEY), (" " + KEY + " ", " " + KEY + " ")])
def test_one_newline_at_the_end_of_a_credential_is_not_part_of_it(tmp_path, credentials, content, value):
    (credentials / "hmac_key").write_text(content)
    assert load(tmp_path, credentials=credentials)[0] == {"hmac_key": value.encode()}


def test_a_credential_may_be_any_bytes(tmp_path, credentials):
    content = bytes(range(256))
    (credentials / "blob").write_bytes(content)
    assert load(tmp_path, credentials=credentials)[0]["blob"] == content


def test_what_is_no_credential_is_passed_over(tmp_path, credentials):
    (credentials / "folder").mkdir()
    (credentials / "not a name").write_text("x")
    assert load(tmp_path, credentials=credentials) == ({"hmac_key": KEY.encode()}, [])


@pytest.mark.parametrize("folder", [None, "nowhere"])
def test_missing_credentials_are_told_when_they_are_named(tmp_path, folder):
    values, problems = load(tmp_path, 'source = "systemd"', credentials=folder and tmp_path / folder)
    assert values == {} and any("CREDENTIALS_DIRECTORY" in text or "nowhere" in text for text in problems)


# --- the command

@pytest.mark.parametrize("command, said", [
    (f'["sh", "-c", "echo {CANARY}; echo {CANARY} >&2; exit 3"]', "status 3"), ('["no-such-program-of-ours"]', "cannot be started"),
    (f'["sh", "-c", "echo hmac_key={CANARY}; kill -9 $$"]', "status -9"), (r'["printf", "a=\\377"]', "UTF-8")])
def test_a_command_that_fails_is_told_without_its_output(tmp_path, command, said):
    values, problems = load(tmp_path, f'source = "command"\ncommand = {command}')
    assert values == {} and any(said in text and "secrets.command" in text for text in problems), problems


def test_a_command_that_does_not_end_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(hookshot, "_SECRETS_COMMAND_TIMEOUT_S", 0.2)
    values, problems = load(tmp_path, f'source = "command"\ncommand = ["sh", "-c", "echo hmac_key={CANARY}; exec sleep 1000"]')
    assert values == {} and any("did not end" in text for text in problems)


def test_a_command_sees_no_secret_and_no_terminal(tmp_path, monkeypatch):
    monkeypatch.setenv("LEAK", CANARY)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", CANARY)
    config = f'source = "command"\ncommand = ["sh", "-c", "env > {tmp_path}/env; cat; echo hmac_key={KEY}"]'
    assert load(tmp_path, config) == ({"hmac_key": KEY.encode()}, [])
    seen = (tmp_path / "env").read_text()
    assert CANARY not in seen and "PATH=" in seen


# --- what is missing or weak

WEAK = {
    "empty": "", "blank": "                                        ", "one byte short": KEY[:15], "one letter": "a" * 64,
    "few letters": "abcde" * 10, "change me": "please-change-me-please-0123456789", "your secret": "your-secret-key-here-0123456789",
    "example": "this-is-an-example-key-0123456789ab",
    "placeholder": "PLACEHOLDER-0123456789abcdef012345", "replace me": "REPLACE_THIS_0123456789abcdef0123456"}


@pytest.mark.parametrize("name", WEAK)
@pytest.mark.parametrize("source", ["file", "env", "systemd"])
def test_a_weak_key_is_refused(tmp_path, name, source, credentials):
    value = WEAK[name]
    (credentials / "hmac_key").write_text(value)
    if source == "file":
        write(tmp_path, f"hmac_key={value}\n")
    values, problems = load(tmp_path, f'source = "{source}"', env={"HOOKSHOT_HMAC_KEY": value}, credentials=credentials)
    only(problems, "secret hmac_key", "keygen")
    assert not value.strip() or value not in problems[0]


@pytest.mark.parametrize("length, warned", [(16, True), (31, True), (32, False)])
def test_a_key_under_32_bytes_is_warned_about(tmp_path, length, warned):
    write(tmp_path, f"hmac_key={KEY[:length]}\n")
    values, problems = load(tmp_path)
    assert values == {"hmac_key": KEY[:length].encode()}
    assert [text.startswith("warning: ") and str(length) in text for text in problems] == [True] * warned


def test_what_is_no_key_may_be_short(tmp_path):
    write(tmp_path, SERVER_FILE + "pin=1234\n")
    assert load(tmp_path) == ({"hmac_key": KEY.encode(), "pin": b"1234"}, [])


SERVICE = """
[[service]]
name = "web"
[service.security]
allowed_image_pattern = 'app:[0-9]+'
hmac_keys = ["web_key"]
[service.deploy]
commands = [["true"]]
[service.rollback]
enabled = false
"""


@pytest.mark.parametrize("options, missing, wanted_by", [
    ({"config": 'required_secrets = ["hmac_key", "api_token"]'}, "api_token", "required_secrets"),
    ({"head": '[security]\nhmac_keys = ["hmac_key", "next_key"]'}, "next_key", "security.hmac_keys"),
    ({"head": '[security]\nread_access = "token"'}, "read_token", "read_access"),
    ({"services": SERVICE}, "web_key", "service web")])
def test_a_required_secret_that_is_missing_is_named_with_who_wants_it(tmp_path, options, missing, wanted_by):
    write(tmp_path, SERVER_FILE)
    only(load(tmp_path, **options)[1], missing, wanted_by)
    write(tmp_path, SERVER_FILE + f"{missing}={OTHER}\n")
    assert load(tmp_path, **options)[1] == []
    # Only what signs or lets in must be a good key; a password that a command needs may be any.
    write(tmp_path, SERVER_FILE + f"{missing}=\n")
    only(load(tmp_path, **options)[1], f"secret {missing}", "empty" if missing == "api_token" else "shorter")


# --- the keyring

def test_a_keyring_picks_what_is_there_and_masks_everything(tmp_path):
    write(tmp_path, SERVER_FILE + f"github={OTHER}\n")
    problems = []
    config = hookshot.load_config(f'[secrets]\nsecrets_file = "{tmp_path}/secrets"', "config.toml", problems)
    keyring = hookshot.load_keyring(config, hookshot.Services({}), hookshot.SecretSurroundings({}, None), "config.toml", problems)
    assert keyring.pick(["github", "gone"]) == {"github": OTHER.encode()}
    assert keyring.masker.mask_text(f"{KEY} {OTHER}") == "*** ***"
