# SPDX-License-Identifier: MPL-2.0
"""The procedures of backup.md, security.md and audit.md: each block is pasted on a host that systemd runs, after what it is for has happened.

tests/drills.py says what is done there, once for all tests of this file; they look at what was seen.
"""

import base64
import json
import pathlib
import re
import shutil
import subprocess
import sys
from typing import Any

import pytest

from pages import read_blocks
from support import PATIENCE_S, ROOT, need, program

PAGES = ("backup.md", "security.md", "audit.md")
MAPPED = "web:1.0 Succeeded"


def later_program(folder: pathlib.Path) -> bytes:
    """Return an archive of a version that is to come: with a schema of its own."""
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", "dist", "tests", "examples", "__pycache__"))
    source = (folder / "hookshot.py").read_text(encoding="utf-8")
    for pattern, new in ((r'^__version__ = "[^"]*"$', '__version__ = "9.0.0"'),
                         (r"^MIGRATIONS: (.*?)^\)$", r'MIGRATIONS: \1    "CREATE TABLE later (n INTEGER PRIMARY KEY) STRICT;",\n)')):
        source, count = re.subn(pattern, new, source, flags=re.DOTALL | re.MULTILINE)
        assert count == 1, pattern
    (folder / "hookshot.py").write_text(source, encoding="utf-8")
    subprocess.run([sys.executable, folder / "build_zipapp.py", "--python", sys.executable], check=True, stdout=subprocess.DEVNULL)
    return (folder / "dist/hookshot.pyz").read_bytes()


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what was seen in the machine, by drill."""
    need("systemd-nspawn")
    for name in ("age", "gpg", "rsync", "restic", "openssl", "curl", "sqlite3"):
        need(name)
    # Hookshot runs with Debian's Python there, whatever runs this test: of several suites at once, one will do.
    there = subprocess.run(["/usr/bin/python3", "-c", "import sys; print(*sys.version_info[:2])"], capture_output=True, text=True).stdout.split()
    if there != [str(number) for number in sys.version_info[:2]]:
        pytest.skip(f"the machine has Python {'.'.join(there)}: the suite of that version runs this")
    folder = tmp_path_factory.mktemp("drills")
    scripts: dict[str, str] = {}
    for block in read_blocks():
        if block.page.name in PAGES and block.run:
            scripts[block.run] = scripts.get(block.run, "") + block.text
    programs = {"dist/hookshot.pyz": pathlib.Path(program()[1]).read_bytes(), "later/hookshot.pyz": later_program(folder / "later")}
    script = folder / "script.py"
    script.write_text(f"SCRIPTS = {scripts!r}\nPROGRAMS = { {name: base64.b64encode(content).decode() for name, content in programs.items()}!r}\n"
                      + (ROOT / "tests/drills.py").read_text(encoding="utf-8"), encoding="utf-8")
    # By SIGTERM, at which the machine is taken away again.
    done = subprocess.run(["timeout", str(20 * PATIENCE_S), str(ROOT / "tests/machine.sh"), program()[1], str(script)],
                          stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip(f"no machine can be had here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    (folder / "times").write_text(done.stderr)
    return json.loads(done.stdout)
