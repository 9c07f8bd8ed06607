# SPDX-License-Identifier: MPL-2.0
"""Finds the Pythons of this machine."""

import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

# A shim of pyenv may stand for a version that is switched off: only what runs counts, under its own path.
PROBE = "import sys; print('%d %d %s' % (sys.version_info[0], sys.version_info[1], sys.executable))"


def _pyenv_root() -> Path | None:
    if "PYENV_ROOT" in os.environ:
        return Path(os.environ["PYENV_ROOT"])
    if shutil.which("pyenv"):
        return Path(subprocess.run(["pyenv", "root"], capture_output=True, text=True).stdout.strip())
    return None


def _candidates() -> list[str]:
    names = ["python2.7", *(f"python3.{minor}" for minor in range(6, 20))]
    on_path = filter(None, map(shutil.which, names))
    root = _pyenv_root()
    in_pyenv = sorted(map(str, root.glob("versions/*/bin/python"))) if root else []
    return [sys.executable, *on_path, *in_pyenv]


@cache
def find_pythons() -> dict[tuple[int, int], str]:
    """Return one interpreter for each (major, minor) there is; the running one stands for its own version."""
    found = {}
    for candidate in _candidates():
        try:
            done = subprocess.run([candidate, "-c", PROBE], capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            continue
        if done.returncode == 0:
            major, minor, path = done.stdout.strip().split(" ", 2)
            found.setdefault((int(major), int(minor)), path)
    return dict(sorted(found.items()))


SUPPORTED = {version: path for version, path in find_pythons().items() if version >= (3, 11)}
TOO_OLD = {version: path for version, path in find_pythons().items() if version < (3, 11)}


def name_version(version: tuple[int, int]) -> str:
    """Return "3.11" for (3, 11): the name of a parametrised case."""
    return "%d.%d" % version
