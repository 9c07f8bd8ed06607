# SPDX-License-Identifier: MPL-2.0
"""What README.md and docs/ say is true and all: rendered tables, links, configuration, command lines, and blocks that run."""

import configparser
import contextlib
import io
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

import hookshot
import render_docs
from pages import FENCE, PAGES, hookshot_commands, prose_of, read_blocks, run_script, script_of
from support import KEY, PROGRAM, ROOT, free_port, need, running, service

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


# --- rendered blocks


@each_page
def test_rendered_blocks_are_as_the_tables_say(page):
    text = page.read_text(encoding="utf-8")
    assert text == render_docs.render_page(text), "run python3 tests/render_docs.py"


@each_page
def test_every_marker_belongs_to_a_block(page):
    text = page.read_text(encoding="utf-8")
    blocks = len(render_docs.BLOCK.findall(text))
    assert text.count("<!-- rendered:") == text.count("<!-- end -->") == blocks


def test_every_table_is_rendered_once():
    rendered = [name for page in PAGES for _, name, _ in render_docs.BLOCK.findall(page.read_text(encoding="utf-8"))]
    assert sorted(rendered) == sorted(render_docs.BLOCKS)


# --- pages


@each_page
def test_a_page_begins_with_its_title_and_a_sentence_that_says_what_it_is_about(page):
    text = page.read_text(encoding="utf-8")
    assert re.match(r"# [^\n]+\n\n", text)
    told = hookshot.describe_page(page.stem, text)
    assert re.fullmatch(r"[A-Z`].{10,240}\.", told.summary), told.summary
    assert len(re.findall(r"^# ", FENCE.sub("", text), re.MULTILINE)) == 1


def test_every_page_is_in_the_list_of_the_readme():
    linked = re.findall(r"^- \[[^\]]+\]\(docs/([^)]+)\): ", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(linked) == sorted(page.name for page in PAGES if page.parent.name == "docs")


# --- completeness: what the tables of hookshot.py have, looked for where a reader would


def page(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def section(text: str, heading: str) -> str:
    """Return what stands below a heading, up to the next one that is not deeper."""
    depth = heading.partition(" ")[0]
    return text.partition(f"\n{heading}\n")[2].partition(f"\n{depth} ")[0]


def first_cells(text: str) -> set[str]:
    return {name for row in re.findall(r"^\| (.*?) \|", text, re.MULTILINE) for name in re.findall(r"`([^`]+)`", row)}


def test_every_key_of_the_configuration_is_documented_under_its_table():
    missing = []
    for table in (*render_docs.walk_tables(hookshot.Config), hookshot.Defaults, *render_docs.walk_tables(hookshot.Service)):
        names = {name for name, field in table._field_defaults.items() if not hookshot.is_table(field)}
        missing += [f"{table.__doc__}.{name}" for name in names - first_cells(section(page("configuration"), f"### `{table.__doc__}`"))]
    assert missing == []
    assert {*hookshot.CommandSpec._fields, *hookshot.HttpProbe._fields} <= first_cells(page("configuration"))
    assert {*hookshot.Channel._fields, *hookshot.CHANNEL_TYPES} <= first_cells(page("monitoring"))


def test_every_variable_and_function_of_templates_is_documented():
    cells = first_cells(section(page("configuration"), "## Templates"))
    assert {"{{%s}}" % name for name in hookshot.VARIABLES} <= cells
    assert hookshot.FUNCTIONS.keys() <= {cell.partition("(")[0] for cell in cells}


def test_every_request_and_every_error_is_documented():
    assert {f"{route.method} {route.pattern}" for route in hookshot.ROUTES} <= first_cells(page("api"))
    codes = {kind.code for name, kind in hookshot.ERRORS.items() if name not in render_docs.LOCAL_ERRORS}
    assert codes <= set(re.findall(r"^\| \d{3} \| `([A-Z_]+)` \|", section(page("api"), "## Errors"), re.MULTILINE))
    assert hookshot.GATES.keys() <= first_cells(page("audit"))


def test_every_metric_and_every_line_of_the_log_is_documented():
    assert hookshot.METRICS.keys() <= first_cells(section(page("monitoring"), "## Metrics"))
    assert hookshot.LOG_EVENTS.keys() <= first_cells(section(page("monitoring"), "## Log"))


@pytest.mark.parametrize("name", hookshot.COMMANDS)
def test_every_command_is_documented_with_its_options(name):
    [text] = [part for part in section(page("cli"), "## Commands").split("\n### `hookshot ")[1:] if re.match(rf"{name}[ `]", part)]
    options = {option for names, _ in hookshot.COMMANDS[name].arguments for option in names if option.startswith("-")}
    assert options <= set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", text))


def test_every_exit_status_is_documented():
    documented = {int(status) for status in re.findall(r"^\| (\d+) \|", section(page("cli"), "## Exit statuses"), re.MULTILINE)}
    assert {kind.exit for kind in hookshot.ERRORS.values()} | {*hookshot.EXIT_OF_STATE.values()} <= documented
    assert {value for name, value in vars(hookshot).items() if name.startswith("EXIT_") and isinstance(value, int)} <= documented


def test_every_environment_variable_that_is_read_is_documented():
    source = PROGRAM.read_text(encoding="utf-8")
    read = set(re.findall(r"environ(?:\.get|\.pop)?[(\[]\"([A-Z_]+)\"", source)) | hookshot.UNIT_FOLDERS.keys()
    ours = set(re.findall(r"\bHOOKSHOT_[A-Z_]*[A-Z]\b", source))
    # What commands and channels find in their environment stands where they are described.
    given = {"HOOKSHOT_DEPLOY_ID", "HOOKSHOT_COMMAND", "HOOKSHOT_MESSAGE"}
    assert {"PAGER", "NO_COLOR", "STATE_DIRECTORY"} <= read and {"HOOKSHOT_CONFIG", "HOOKSHOT_HMAC_KEY"} <= ours
    assert (read | ours) - given - first_cells(section(page("cli"), "## Environment variables")) == set()
    assert {name for name in given if not any(f"`{name}`" in page.read_text(encoding="utf-8") for page in PAGES)} == set()


def test_every_check_of_the_doctor_is_documented():
    assert hookshot.CHECKS.keys() <= first_cells("".join(page.read_text(encoding="utf-8") for page in PAGES))


@each_page
def test_every_block_stands_at_the_margin_where_it_is_seen(page):
    assert re.findall(r"^[ \t>]+```.*$", page.read_text(encoding="utf-8"), re.MULTILINE) == []


# --- links


def anchor_of(heading: str) -> str:
    """Return the anchor that a heading gets: lower case, punctuation dropped, spaces made hyphens."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors_of(page: pathlib.Path) -> set[str]:
    return set(map(anchor_of, re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)))


@each_page
def test_links_lead_to_something_that_is_there(page):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors_of(target)):
            broken.append(link)
    assert broken == []


# --- configuration

# What a service needs besides the tables that a page shows.
REST_OF_SERVICE = {
    "[service.security]": "[service.security]\nallowed_image_pattern = 'app:[0-9.]+'\n",
    "[service.deploy]": '[service.deploy]\ncommands = [["true"]]\n'}


def load(text: str) -> list[hookshot.Problem]:
    """Load a block as the file that its tables belong to; tables of a service may stand alone."""
    problems: list[hookshot.Problem] = []
    if "[service." in text or "[[service]]" in text or "[defaults]" in text:
        if "[[service]]" not in text and "[service." in text:
            text = '[[service]]\nname = "web"\n' + text + "".join(rest for head, rest in REST_OF_SERVICE.items() if head not in text)
        hookshot.load_services(text, "services.toml", hookshot.load_config("", "config.toml", problems), problems)
    else:
        hookshot.load_config(text, "config.toml", problems)
    return problems


@pytest.mark.parametrize("block", read_blocks("toml"), ids=str)
def test_a_configuration_in_the_docs_loads_without_a_problem(block):
    assert load(block.text) == []


def test_a_wrong_configuration_would_be_noticed():
    assert load('[server]\nlisten_on = "127.0.0.1:1"\n') and load('[service.healthcheck]\nhttp = "nowhere"\n')


# --- blocks of other languages

# Checked wherever they stand. A block of any other language, and every one of the shell, says how it is proved.
CHECKED = ("toml", "json", "yaml", "ini", "python", "js")
# Output, and a diagram that is rendered from a table.
SHOWN = ("", "console", "mermaid")
UNIT_SECTIONS = {"Unit", "Service", "Socket", "Timer", "Path", "Install"}


def test_every_block_is_run_or_says_why_not():
    silent = [str(block) for block in read_blocks() if block.language not in (*CHECKED, *SHOWN) and not (block.run or block.outside)]
    assert silent == []


def test_few_blocks_of_the_shell_need_the_outside_world():
    """Most of them run in tests; this is the share that does not."""
    blocks = read_blocks("sh")
    assert 4 * sum(block.outside is not None for block in blocks) <= len(blocks)


@pytest.mark.parametrize("block", read_blocks("json"), ids=str)
def test_json_in_the_docs_is_json(block):
    try:
        json.loads(block.text)
    except ValueError:
        assert [json.loads(line) for line in block.text.splitlines()]


@pytest.mark.parametrize("block", read_blocks("yaml", "yml"), ids=str)
def test_yaml_in_the_docs_is_yaml(block):
    done = subprocess.run([python_with_yaml(), "-c", "import sys, yaml; print(len(list(yaml.compose_all(sys.stdin))))"], input=block.text, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


def python_with_yaml() -> str:
    """Return a Python that has PyYAML: that of the system, where a package has installed it."""
    for python in ("/usr/bin/python3", sys.executable):
        if os.path.exists(python) and subprocess.run([python, "-c", "import yaml"], capture_output=True).returncode == 0:
            return python
    return need("a Python with PyYAML")


@pytest.mark.parametrize("block", read_blocks("ini"), ids=str)
def test_ini_in_the_docs_is_of_a_unit_that_systemd_understands(block, tmp_path):
    """A fragment is put into a unit that has all else; programs need not be installed."""
    parser = configparser.RawConfigParser(strict=False, delimiters=("=",), comment_prefixes=("#", ";"), allow_no_value=False)
    parser.optionxform = str
    parser.read_string(block.text)
    if not set(parser.sections()) <= UNIT_SECTIONS:
        return
    text = re.sub(r"^(Exec\w+=).+$", r"\1/bin/true", block.text, flags=re.MULTILINE)
    kind = next((section.lower() for section in ("Socket", "Timer", "Path") if parser.has_section(section)), "service")
    (tmp_path / "hookshot.service").write_text("[Service]\nType=oneshot\nExecStart=/bin/true\n" + (text if kind == "service" and "Type=" not in text else ""))
    (tmp_path / f"hookshot.{kind}").write_text(text) if kind != "service" or "Type=" in text else None
    done = subprocess.run([need("systemd-analyze"), "verify", "--man=no", tmp_path / f"hookshot.{kind}"], capture_output=True, text=True,
                          env={**os.environ, "SYSTEMD_UNIT_PATH": f"{tmp_path}:", "SYSTEMD_LOG_LEVEL": "warning"})
    assert str(tmp_path) not in done.stderr and "hookshot." not in done.stderr, done.stderr


@pytest.mark.parametrize("block", read_blocks("python"), ids=str)
def test_python_in_the_docs_compiles(block):
    compile(block.text, str(block), "exec")


@pytest.mark.parametrize("block", read_blocks("js"), ids=str)
def test_javascript_in_the_docs_can_be_parsed(block, tmp_path):
    file = tmp_path / ("block.mjs" if re.search(r"^(import|export|await) ", block.text, re.MULTILINE) else "block.cjs")
    file.write_text(block.text)
    done = subprocess.run([need("node"), "--check", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- command lines

# As a page shows it, one block after the other is one script.
SCRIPTS = {name: script_of(name) for name in sorted({block.run for block in read_blocks("sh") if block.run})} | {
    str(block): block.text for block in read_blocks("sh") if not block.run}
each_script = pytest.mark.parametrize("script", [pytest.param(text, id=name) for name, text in SCRIPTS.items()])


@each_script
def test_a_shell_block_can_be_parsed(script):
    done = subprocess.run([need("bash"), "-n"], input=script, text=True, capture_output=True)
    assert (done.returncode, done.stderr) == (0, "")


# Of what is pasted: "cd ... || exit" (SC2164) would close the reader's terminal, and "a && b || :" (SC2015) means just that.
NOT_OF_PAGES = "SC2015,SC2164"


@each_script
def test_shellcheck_finds_nothing_in_a_shell_block(script):
    done = subprocess.run([need("shellcheck"), "--shell=bash", f"--exclude={NOT_OF_PAGES}", "--color=never", "-"], input=script, text=True, capture_output=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout


def shells() -> list[tuple[str, str]]:
    """Return (place, shell text): blocks without their comments and here-documents, and calls that stand in prose."""
    pieces = []
    for block in read_blocks("sh"):
        text = re.sub(r"<<'?(\w+)'?\n.*?^\1$", "", block.text, flags=re.DOTALL | re.MULTILINE)
        pieces.append((str(block), re.sub(r"(^|\s)#.*$", "", text, flags=re.MULTILINE)))
    return pieces + [(f"{page.name}: {call}", call) for page in PAGES for call in re.findall(r"`((?:python3 )?hookshot(?:\.pyz?)? [^`]+)`", prose_of(page))]


CALLS = [pytest.param(arguments, id=f"{place.partition(':')[0]}: {shlex.join(arguments)}")
         for place, text in shells() for arguments in hookshot_commands(text)
         # In prose a command may stand for itself: `hookshot deploy`.
         if not (place.endswith(text) and len(arguments) == 1 and arguments[0] in hookshot.COMMANDS)]


@pytest.mark.parametrize("arguments", CALLS)
def test_a_command_line_in_the_docs_is_understood(arguments):
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            hookshot.parse_arguments([argument.strip("[]") for argument in arguments])
        except SystemExit as ended:  # 0 is that of --help
            assert not ended.code, said.getvalue()


def test_command_lines_are_found_wherever_they_stand():
    shell = "until python3 hookshot.py services; do :; done\nA=1 hookshot run 2> log &\nx=$(hookshot keygen | cat)\necho hookshot nothing\n"
    assert hookshot_commands(shell) == [["services"], ["run"], ["keygen"]]


# --- blocks that run


def paste(folder, name):
    """Run the README's blocks of a name in a folder with a copy of the program, as somebody whose port 8080 is free."""
    need("bash")
    folder.mkdir()
    shutil.copy(PROGRAM, folder)
    init = "python3 hookshot.py init\n"
    return run_script(script_of(name).replace(init, f"{init}sed 's/127.0.0.1:8080/127.0.0.1:{free_port()}/' config.toml > new && mv new config.toml\n"), folder)


def test_the_first_service_of_the_readme_works_by_paste(tmp_path):
    done = paste(tmp_path / "an empty folder", "first-service")
    assert done.returncode == 0, done.stdout
    assert "deploying example/app:1.0" in done.stdout and "Succeeded" in done.stdout
    assert '"stopped"' in (tmp_path / "an empty folder" / "server.log").read_text()


def test_the_demo_of_the_readme_works_by_paste(tmp_path):
    done = paste(tmp_path / "anywhere", "demo")
    assert done.returncode == 0 and "Both ended as they should." in done.stdout, done.stdout
    assert not list((tmp_path / "anywhere").glob("*data*"))


def test_the_picture_in_the_readme_is_what_the_demo_prints():
    assert render_docs.PICTURE.read_text(encoding="utf-8") == render_docs.render_picture(render_docs.run_demo()), "run python3 tests/render_docs.py demo"


@pytest.mark.parametrize("block", ["curl", "timestamp"])
def test_a_deploy_by_curl_works(tmp_path, block):
    for program in ("bash", "curl", "openssl"):
        need(program)
    services = '[[service]]\nname = "site"\nworking_dir = "@"\n[service.security]\nallowed_image_pattern = \'site:[0-9.]+\'\n' \
        '[service.deploy]\ncommands = [["touch", "{{IMAGE|tag}}"]]\n'
    with running(tmp_path / "host", services) as host:
        shutil.copy(PROGRAM, host.folder)
        script = f"export HOOKSHOT_CONFIG='{host.config}'\n{script_of(block)}"
        assert "127.0.0.1:8080" in script
        done = run_script(script.replace("127.0.0.1:8080", f"127.0.0.1:{host.port}"), host.folder)
        assert done.returncode == 0, done.stdout
        assert '"status":"Succeeded"' in done.stdout, done.stdout
    assert (tmp_path / "host/1.0").exists()


def test_a_lock_by_curl_works(tmp_path):
    for program in ("bash", "curl"):
        need(program)
    with running(tmp_path / "host", service(name="site")) as host:
        shutil.copy(PROGRAM, host.folder)
        script = f"export HOOKSHOT_CONFIG='{host.config}'\n{script_of('control')}"
        done = run_script(script.replace("127.0.0.1:8080", f"127.0.0.1:{host.port}"), host.folder)
        assert done.returncode == 0 and '"locked":true' in done.stdout, done.stdout
        assert host.get("/services/site").json["lock"]["reason"] == "stocktaking"


def test_a_client_finds_server_and_key_as_the_docs_say(tmp_path):
    need("bash")
    services = '[[service]]\nname = "site"\nworking_dir = "@"\n[service.security]\nallowed_image_pattern = \'site:[0-9.]+\'\n' \
        '[service.deploy]\ncommands = [["echo", "{{commit}}"]]\n'
    with running(tmp_path / "host", services) as host:
        folder = tmp_path / "elsewhere"
        folder.mkdir()
        shutil.copy(PROGRAM, folder)
        (folder / "key").write_text(KEY)
        done = run_script(script_of("client").replace("127.0.0.1:8080", f"127.0.0.1:{host.port}"), folder)
        assert done.returncode == 0, done.stdout
        assert "9f3c21ab" in done.stdout and "Succeeded" in done.stdout and '"ready": true' in done.stdout


def test_the_pages_can_be_searched_as_the_docs_say(tmp_path):
    need("bash")
    for file in ("hookshot.py", "README.md"):
        shutil.copy(ROOT / file, tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    done = run_script(script_of("docs"), tmp_path)
    assert done.returncode == 0 and "max_concurrent_total" in done.stdout, done.stdout


def test_every_block_that_says_it_runs_is_named_by_a_test():
    tests = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").glob("*.py"))
    assert {block.run for block in read_blocks() if block.run and f'"{block.run}"' not in tests} == set()


# --- prose


@each_page
def test_a_page_names_only_files_of_the_repository_that_are_there(page):
    named = set(re.findall(r"`((?:docs|tests|examples|\.ci)/[\w./-]*)`", prose_of(page)))
    assert {name for name in named if not (ROOT / name).exists()} == set()
