# SPDX-License-Identifier: MPL-2.0
"""Read the pages of README.md and docs/: their fenced blocks, what proves each, and the command lines in them.

A comment in the line before a block says how it is proved:

    <!-- run: NAME -->      a test runs it, with the other blocks of that name; files that it needs may stand in blocks of that name too
    <!-- outside: WHY -->   it needs what no test has (another host, a paid service, root on a real machine): it is checked as text

Blocks of configuration and data (toml, json, yaml, ini) need no mark: they are loaded or parsed wherever they stand.
"""

import contextlib
import os
import pathlib
import re
import shlex
import subprocess
import sys
from typing import NamedTuple

import render_docs
from support import PATIENCE_S

PAGES = render_docs.pages()
PROGRAMS = (["hookshot"], ["python3", "hookshot.py"], ["python3", "hookshot.pyz"])

FENCE = re.compile(r"(?:<!-- (?:run: (?P<run>[a-z0-9-]+)|outside: (?P<outside>[^\n]+)) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$",
                   re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    page: pathlib.Path
    line: int
    run: str | None
    outside: str | None
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def read_blocks(*languages: str) -> list[Block]:
    """Return the blocks of all pages in their order, of these languages if any are named."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        found += [Block(page, text.count("\n", 0, match.start("text")), match["run"], match["outside"], match["language"], match["text"])
                  for match in FENCE.finditer(text)]
    return [block for block in found if not languages or block.language in languages]


def text_of(name: str, language: str) -> str:
    """Return the one block of a name and a language; ValueError if there is not exactly one."""
    [block] = [block for block in read_blocks(language) if block.run == name]
    return block.text


def script_of(name: str) -> str:
    """Return the shell blocks of a name, one after the other, as they are pasted."""
    return "".join(block.text for block in read_blocks("sh") if block.run == name)


def prose_of(page: pathlib.Path) -> str:
    """Return a page without its fenced blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def hookshot_commands(shell: str) -> list[list[str]]:
    """Return the arguments of every call of hookshot in a piece of shell: also after "until", in pipes and in $(...)."""
    shell = re.sub(r"\d?>+\s*[^\s;|&]+", "", shell.replace("\\\n", " "))
    lexer = shlex.shlex(shell.replace("$(", " ( ").replace("\n", " ; "), posix=True, punctuation_chars=True)
    lexer.whitespace_split, lexer.commenters = True, ""
    found, words = [], []
    for token in [*lexer, ";"]:
        if not set(token) <= set("();<>|&"):
            words.append(token)
            continue
        for program in PROGRAMS:
            start = next((index for index in range(len(words)) if words[index : index + len(program)] == program), None)
            if start is not None and all(re.fullmatch(r"\w+=.*|until|while|if|sudo|!", word) for word in words[:start]):
                found.append(words[start + len(program) :])
        words = []
    return found


def run_script(script: str, folder: pathlib.Path) -> "subprocess.CompletedProcess[str]":
    """Run pasted blocks as a shell of an ordinary environment would; `python3` is the Python of this test."""
    bin_folder = folder / "bin"
    bin_folder.mkdir(exist_ok=True)
    (bin_folder / "python3").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (bin_folder / "python3").chmod(0o755)
    env = {name: value for name, value in os.environ.items() if not name.startswith("HOOKSHOT_")}
    process = subprocess.Popen(["bash", "-e"], cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env={**env, "PATH": f"{bin_folder}:{env['PATH']}"}, start_new_session=True)
    try:
        # A server that is left behind would keep the output open.
        output, _ = process.communicate("trap 'kill -9 $(jobs -p) 2> /dev/null || :' EXIT\n" + script, timeout=4 * PATIENCE_S)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
    return subprocess.CompletedProcess([], process.returncode, output)
