# SPDX-License-Identifier: MPL-2.0
"""docs/quickstart.md by paste: on the host, on another machine, in CI, and where there is no network."""

import json
import os
import pathlib
import re
import shutil
import subprocess

import pytest

from pages import read_blocks, run_script, script_of, text_of
from support import ROOT, free_port, need

PAGE = "quickstart.md"
# What stands for the other machine: a home of its own, and nothing of the host's environment.
CALLER = """(
mkdir -p "$OTHER" && cd "$OTHER"
unset HOOKSHOT_CONFIG
@
)
"""
# What stands for scp: the host's home is a folder here.
SCP = '#!/bin/sh\nset -eu\ncp "$HOME/${1#deploy.example.com:}" "$2"\n'


def read_yaml(text: str) -> dict:
    """Return a YAML document as Debian's python3-yaml reads it."""
    done = subprocess.run(["/usr/bin/python3", "-c", "import json, sys, yaml; print(json.dumps(yaml.load(sys.stdin, yaml.BaseLoader)))"],
                          input=text, capture_output=True, text=True)
    if "No module named" in done.stderr and os.environ.get("CI") != "true":
        pytest.skip("missing: python3-yaml")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def clone_to(folder: pathlib.Path) -> None:
    """Copy what a clone has that the page uses."""
    folder.mkdir(parents=True)
    for name in ("hookshot.py", "build_zipapp.py"):
        shutil.copy(ROOT / name, folder)


def ci_jobs() -> str:
    """Return what both forges run, in a checkout and with the environment that they make of the page's blocks."""
    github, gitlab = (read_yaml(text_of(name, "yaml")) for name in ("first-github", "first-gitlab"))
    step = github["jobs"]["deploy"]["steps"][1]
    job = gitlab["deploy"]
    assert step["env"]["HOOKSHOT_HMAC_KEY"] == "${{ secrets.HOOKSHOT_HMAC_KEY }}" and "${{" not in step["run"]
    given = {"HOOKSHOT_HMAC_KEY": "$(cat ci_key)", "HOOKSHOT_READ_TOKEN": "$(cat read_token)"}
    runs = [({**step["env"], **given, "GITHUB_REF_NAME": "1.0", "GITHUB_SHA": "0a1b2c"}, step["run"]),
            ({**job["variables"], **given, "CI_COMMIT_TAG": "3.0", "CI_COMMIT_SHA": "3d4e5f"}, job["script"][0])]
    checkout = 'mkdir ci && cp "$CLONE/dist/hookshot.pyz" tls.crt ci/\n'
    return checkout + "".join("".join(f'{name}="{value}" ' for name, value in env.items()) + "bash -ec " + f"'{command}'\n" for env, command in runs)


def stand_in(script: str) -> str:
    """Put free ports for those of the page, and this host for the one that has a name; what scp is told stays."""
    for port, written in (("8000", "{}"), ("8443", ":{}"), ("8080", ":{}")):
        script = re.sub(written.format(port), written.format(free_port()), script)
    script = script.replace('listen = ":', 'listen = "127.0.0.1:')
    script = re.sub("(?<!scp )deploy[.]example[.]com", "localhost", script)
    init = "hookshot init .\n"
    assert init in script
    return script.replace(init, f"{init}sed -i 's/127.0.0.1:8080/127.0.0.1:{free_port()}/' config.toml\n")


def test_the_quickstart_works_by_paste_from_nothing_to_ci(tmp_path):
    for program in ("bash", "curl", "openssl"):
        need(program)
    clone, home = tmp_path / "clone", tmp_path / "home"
    clone_to(clone)
    home.mkdir()
    script = f"export HOME='{home}' OTHER='{tmp_path}/other' CLONE='{clone}'\n"
    for block in read_blocks("sh"):
        if block.page.name == PAGE and block.run == "first-host":
            if "kill" in block.text and "run" not in block.text:
                script += CALLER.replace("@", "export OTHER\n" + ci_jobs())
            script += block.text
        elif block.page.name == PAGE and block.run == "first-caller":
            script += CALLER.replace("@", block.text)
    script = stand_in(script)
    (clone / "bin").mkdir()
    (clone / "bin/scp").write_text(SCP)
    (clone / "bin/scp").chmod(0o755)

    done = run_script(script, clone)

    assert done.returncode == 0, done.stdout
    assert "Both ended as they should." in done.stdout and done.stdout.count("are valid; services: site") == 2
    assert re.findall(r"^site (\S+): (\w+)", done.stdout, re.MULTILINE) == [
        ("site:1.0", "Succeeded"), ("site:2.0", "RolledBack"), ("site:3.0", "Succeeded"), ("site:1.0", "Succeeded"), ("site:3.0", "Succeeded")]
    assert re.findall(r"^hello.*", done.stdout, re.MULTILINE) == ["hello from 1.0"] * 2
    assert re.findall(r"^exit status .*", done.stdout, re.MULTILINE) == ["exit status 11", "exit status 65"]
    assert os.readlink(home / "hookshot-site/current") == "releases/3.0"
    assert '"stopped"' in (home / "hookshot-site/server.log").read_text()


def test_an_archive_is_carried_to_a_host_without_a_network_and_proved_there(tmp_path):
    need("bash")
    clone, host = tmp_path / "clone", tmp_path / "host"
    clone_to(clone)
    host.mkdir()
    built = run_script(script_of("first-air"), clone)
    assert built.returncode == 0, built.stdout
    for name in ("hookshot.pyz", "hookshot.pyz.sha256"):
        shutil.copy(clone / "dist" / name, host)
    checked = run_script(script_of("first-air-host"), host)
    assert checked.returncode == 0 and "hookshot.pyz: OK" in checked.stdout, checked.stdout
    [build] = re.findall(r"build ([0-9a-f]{12})\)", checked.stdout)
    assert f"{build}\n" in built.stdout
    (host / "hookshot.pyz").write_bytes((host / "hookshot.pyz").read_bytes() + b"\n")
    (host / "bin/python3").unlink()
    (host / "bin").rmdir()
    assert run_script(script_of("first-air-host"), host).returncode != 0
