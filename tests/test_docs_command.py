# SPDX-License-Identifier: MPL-2.0
"""`hookshot docs`: the pages of docs/ on a terminal, from a checkout, from the archive, and where there are none."""

import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import zipfile

import pytest

import hookshot
from support import PATIENCE_S, PROGRAM, ROOT, need

ENV = {name: value for name, value in os.environ.items() if name not in ("PAGER", "LESS", "NO_COLOR", "COLUMNS", "LC_ALL")} | {"TERM": "xterm"}


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """The archive under the name that it has on a host, with byte code of this Python."""
    file = tmp_path_factory.mktemp("archive") / "hookshot"
    subprocess.run([sys.executable, ROOT / "build_zipapp.py", "--output", file, "--python", sys.executable], check=True, stdout=subprocess.DEVNULL)
    return file


def call(*arguments: object, program=PROGRAM, **env: str) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run([sys.executable, program, "docs", *map(str, arguments)], env={**ENV, **env}, capture_output=True, timeout=PATIENCE_S, cwd="/")


def on_terminal(*arguments: str, keys: bytes = b"", until: bytes = b"", **env: str) -> tuple[int, bytes]:
    """Run it on a terminal of its own, press `keys` once it has shown `until`; return the exit status and what it has shown."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(sys.executable, [sys.executable, str(PROGRAM), "docs", *arguments], {**ENV, "COLUMNS": "80", "LINES": "24", **env})
    shown = b""
    while select.select([terminal], [], [], PATIENCE_S)[0]:
        try:
            part = os.read(terminal, 1 << 16)
        except OSError:  # the end, as Linux tells it
            break
        if not part:
            break
        shown += part
        if keys and until in shown:
            os.write(terminal, keys)
            keys = b""
    else:
        os.kill(pid, signal.SIGKILL)
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), shown.replace(b"\r\n", b"\n")


def render(text: str, columns: int = 80, *, has_colour: bool = False) -> str:
    return "\n".join(hookshot._render_page(text, columns, has_colour=has_colour))


# --- where the pages are


def test_topics_are_the_pages_in_the_order_of_the_readme():
    topics = json.loads(call("--json").stdout)["topics"]
    assert {topic["topic"] for topic in topics} == {"readme"} | {page.stem for page in (ROOT / "docs").glob("*.md")}
    assert topics[0]["topic"] == "readme"
    assert all(topic["title"] and topic["summary"].endswith(".") for topic in topics)


def test_without_a_topic_each_page_is_told_with_its_first_sentence():
    done = call(COLUMNS="200")
    lines = done.stdout.decode().splitlines()
    [line] = [line for line in lines if line.startswith("configuration ")]
    assert "Two TOML files and the secrets." in line
    assert done.returncode == 0 and b"hookshot docs TOPIC" in done.stderr


@pytest.mark.parametrize("topic", ["configuration", "Configuration", "configuration.md", "docs/configuration.md"])
def test_a_topic_may_be_written_as_the_page_is_named(topic):
    assert call(topic).stdout.startswith(b"# Configuration\n")


def test_json_gives_the_page_as_it_is_written():
    found = json.loads(call("audit", "--json").stdout)
    assert found["text"] == (ROOT / "docs/audit.md").read_text(encoding="utf-8")
    assert (found["topic"], found["title"]) == ("audit", "Audit")


def test_the_archive_has_the_pages_inside(archive):
    """What the list shows is read from every one of them."""
    assert call(program=archive).stdout == call().stdout
    assert json.loads(call("audit", "--json", program=archive).stdout)["text"] == (ROOT / "docs/audit.md").read_text(encoding="utf-8")


def test_an_unpacked_archive_has_them_too(archive, tmp_path):
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(tmp_path)
    assert call("audit", program=tmp_path).stdout == call("audit").stdout


def test_a_link_to_the_file_finds_the_pages_beside_it(tmp_path):
    (tmp_path / "hookshot").symlink_to(PROGRAM)
    assert call("audit", program=tmp_path / "hookshot").stdout == call("audit").stdout


@pytest.mark.parametrize("readme", [None, "# Another project\n\n- [Its page](docs/page.md): not ours\n"], ids=["nothing", "another-project"])
def test_a_lone_file_says_where_the_pages_are(tmp_path, readme):
    shutil.copy(PROGRAM, tmp_path)
    if readme:
        (tmp_path / "README.md").write_text(readme)
    for arguments in ([], ["audit"], ["--json"]):
        done = call(*arguments, program=tmp_path / "hookshot.py")
        assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (65, b"", 1)
        assert b"has no documentation beside it" in done.stderr and b"build_zipapp.py" in done.stderr


@pytest.mark.parametrize(("topic", "words"), [("confguration", b"there is no topic confguration; did you mean configuration?"),
                                              ("zzzz", b"there is no topic zzzz; hookshot docs lists those that there are"),
                                              ("../README", b"there is no topic ../README"), ("a\x1b[2Jb", rb"there is no topic a\x1b[2Jb")])
def test_an_unknown_topic_is_a_wrong_command_line(topic, words):
    done = call(topic)
    assert (done.returncode, done.stdout) == (2, b"")
    assert words in done.stderr


# --- what a page looks like


def test_comments_are_not_shown_and_links_are_text():
    text = ("# Title\n\n<!-- rendered: x -->\nSee [keys](operations.md#change-a-key), [below](#title), [the draft](https://example.net/d),\n"
            "[rules](../examples/a.yml), [Audit](audit.md), `[a](b.md)`, and **nothing else**.\n<!-- end -->\n")
    assert render(text, 200) == ("# Title\n\nSee keys [operations], below, the draft <https://example.net/d>, rules <examples/a.yml>, Audit,\n`[a](b.md)`, "
                                 "and nothing else.\n\nOther pages, in brackets above: operations, audit; hookshot docs TOPIC shows one.")


def test_a_table_is_in_columns_and_its_cells_are_wrapped():
    text = "| Key | Meaning |\n| --- | --- |\n| `a\\|b` | one two three four five six |\n| `c` | seven |\n"
    assert render(text) == "Key  Meaning\n---  ---------------------------\na|b  one two three four five six\nc    seven"
    assert render(text, 22) == "Key  Meaning\n---  -----------------\na|b  one two three\n     four five six\nc    seven"


def test_a_table_that_fits_no_terminal_is_told_as_a_list():
    row = " | ".join(["wordswordswords"] * 4)
    assert render(f"| A | B | C | D |\n|---|---|---|---|\n| {row} |\n", 30) == "\n".join(f"{name}: wordswordswords" for name in "ABCD")


def test_code_is_shown_as_it_stands():
    code = "```sh\ncat <<END\n  [a](b.md)   <!-- kept -->\n| # no heading\nEND\n```"
    assert render(f"before\n\n{code}\n\nafter\n", 20).startswith(f"before\n\n{code}\n\nafter")


def test_lists_and_paragraphs_are_wrapped_within_their_indentation():
    assert render("- one two\n  three four\n- five\n\n1. six seven\n   eight\n", 14) == "- one two\n  three four\n- five\n\n1. six seven\n   eight"


def test_headings_are_bold_and_code_has_a_colour_where_colour_is_allowed():
    assert render("## A `b`\n\n```sh\nls\n```\n", has_colour=True) == "\x1b[1mA `b`\x1b[m\n\n\x1b[36mls\x1b[m"


@pytest.mark.parametrize("columns", [20, 40, 79, 120, 300])
def test_every_page_can_be_shown_at_every_width(columns):
    for page in hookshot.read_docs().values():
        code = {line for block in re.finditer(hookshot._DOC_BLOCK, page.text) if block["code"] or block["heading"] for line in block[0].splitlines()}
        wide = [line for line in render(page.text, columns).splitlines() if len(line) > columns and line not in code and not line.startswith("#")]
        assert wide == [] or columns < 79, page.topic
        assert "<!--" not in render(page.text, columns).replace("<!-- kept", "")


# --- terminals


@pytest.mark.parametrize("env", [{"LC_ALL": "C"}, {"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1"}, {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
                         ids=["C", "ascii", "latin-1", "no-utf-8"])
def test_a_terminal_of_another_character_set_gets_what_it_can_show(env):
    done = call("readme", **env)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"caller -- POST /deploy" in done.stdout or "caller ── POST /deploy".encode() in done.stdout
    assert json.loads(call("readme", "--json", **env).stdout)["text"] == (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437", "utf-8"])
def test_every_page_can_be_written_in_every_character_set(encoding):
    for page in hookshot.read_docs().values():
        hookshot._encode_lines(hookshot._render_page(page.text, 80, has_colour=False), encoding)


def test_text_for_a_pipe_has_no_escapes():
    assert b"\x1b" not in call("readme").stdout


def test_a_reader_that_has_enough_is_no_error():
    process = subprocess.Popen([sys.executable, PROGRAM, "docs", "configuration"], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert (process.wait(PATIENCE_S), process.stderr.read()) == (0, b"")
    process.stderr.close()


def test_on_a_terminal_a_page_goes_through_the_pager():
    status, shown = on_terminal("audit", PAGER="sed 's/^/> /'")
    assert status == 0
    assert b"> \x1b[1mAudit\x1b[m\n" in shown


def test_colour_is_left_out_where_it_is_not_wanted():
    assert b"\x1b" not in on_terminal("audit", PAGER="cat", NO_COLOR="1")[1]
    assert on_terminal("audit", TERM="dumb", PAGER="exit 3")[1].startswith(b"# Audit\n")


@pytest.mark.parametrize("pager", ["", "no-such-pager-anywhere", "cat"])
def test_without_a_pager_a_page_is_printed(pager):
    status, shown = on_terminal("audit", PAGER=pager)
    assert status == 0
    assert shown.count(b"\x1b[1mAudit\x1b[m\n") == 1


def test_the_list_of_topics_needs_no_pager():
    status, shown = on_terminal(PAGER="exit 3")
    assert status == 0 and b"\nconfiguration " in shown


def test_less_is_the_pager_of_who_has_named_none():
    need("less")
    status, shown = on_terminal("configuration", keys=b"q", until=b"Two TOML files")
    assert status == 0
    assert b"\x1b[1mConfiguration" in shown
    assert b"## services.toml" not in shown  # one screen of it


def test_ctrl_c_in_a_pager_is_quiet():
    # One process, which then waits for the terminal: a shell between two of them may let a Ctrl-C fall.
    status, shown = on_terminal("configuration", keys=b"\x03", until=b"Two TOML files", PAGER="exec cat - /dev/tty")
    assert status == 0
    assert b"Traceback" not in shown and b"interrupted" not in shown


def test_the_pages_are_read_only_when_asked_for(tmp_path):
    """Neither a page nor what only pages need costs another command's start anything."""
    need("strace")
    trace = tmp_path / "trace"
    subprocess.run(["strace", "-f", "-e", "trace=open,openat", "-o", trace, sys.executable, PROGRAM, "keygen"], check=True, stdout=subprocess.DEVNULL, env=ENV)
    assert ".md" not in trace.read_text()
    imported = subprocess.run([sys.executable, "-X", "importtime", PROGRAM, "keygen"], capture_output=True, text=True, env=ENV).stderr
    assert "argparse" in imported and "textwrap" not in imported
