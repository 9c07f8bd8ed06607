# SPDX-License-Identifier: MPL-2.0
"""What README.md and docs/ say is true: rendered tables, links, configuration, command lines, and blocks that run."""

import contextlib
import io
import re
import shlex
import shutil

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


def test_every_table_is_rendered_somewhere():
    rendered = {name for page in PAGES for _, name, _ in render_docs.BLOCK.findall(page.read_text(encoding="utf-8"))}
    assert rendered == render_docs.BLOCKS.keys()


# --- links


def anchor_of(heading: str) -> str:
    """Return the anchor that a heading gets: lower case, punctuation dropped, spaces made hyphens."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@each_page
def test_links_lead_to_something_that_is_there(page):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        headings = re.findall(r"^#+ (.*)$", FENCE.sub("", target.read_text(encoding="utf-8")), re.MULTILINE) if target.suffix == ".md" else []
        if not target.exists() or (anchor and anchor not in map(anchor_of, headings)):
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


# --- command lines

def shells() -> list[tuple[str, str]]:
    """Return (place, shell text): blocks without their comments and here-documents, and calls that stand in prose."""
    pieces = []
    for block in read_blocks("sh"):
        text = re.sub(r"<<'?(\w+)'?\n.*?^\1$", "", block.text, flags=re.DOTALL | re.MULTILINE)
        pieces.append((str(block), re.sub(r"(^|\s)#.*$", "", text, flags=re.MULTILINE)))
    return pieces + [(f"{page.name}: {call}", call) for page in PAGES for call in re.findall(r"`((?:python3 )?hookshot(?:\.pyz?)? [^`]+)`", prose_of(page))]


CALLS = [pytest.param(arguments, id=f"{place.partition(':')[0]}: {shlex.join(arguments)}")
         for place, text in shells() for arguments in hookshot_commands(text)]


@pytest.mark.parametrize("arguments", CALLS)
def test_a_command_line_in_the_docs_is_understood(arguments):
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            hookshot.parse_arguments([argument.strip("[]") for argument in arguments])
        except SystemExit:
            pytest.fail(said.getvalue())


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
    tests = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").glob("test_*.py"))
    assert {block.run for block in read_blocks() if block.run and f'"{block.run}"' not in tests} == set()


# --- prose


@each_page
def test_a_page_names_only_files_of_the_repository_that_are_there(page):
    named = set(re.findall(r"`((?:docs|tests|examples|\.ci)/[\w./-]*)`", prose_of(page)))
    assert {name for name in named if not (ROOT / name).exists()} == set()
