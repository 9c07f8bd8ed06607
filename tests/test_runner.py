# SPDX-License-Identifier: MPL-2.0
"""`python3 tests`: finds or makes a pytest, from any folder, and passes its exit status on."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pythons import TOO_OLD, name_version

HERE = Path(__file__).resolve().parent

# One test for each way to end, and proof of where it runs.
SAMPLE = '''\
import os, sys
import pytest

def test_passes():
    assert os.path.samefile(os.getcwd(), os.path.dirname(os.path.dirname(__file__)))

def test_fails():
    assert False

def test_shows_the_interpreter():
    print("prefix", sys.prefix)

def test_lacks_a_part():
    pytest.skip("missing: frobnicator (apt install frobnicator)")

@pytest.mark.skipif(True, reason="missing: frobnicator")
def test_lacks_a_part_by_mark():
    pass

def test_is_not_for_this_system():
    pytest.skip("only on macOS")

@pytest.mark.xfail(reason="missing: a fix")
def test_is_expected_to_fail():
    assert False
'''


@pytest.fixture
def checkout(tmp_path):
    """A repository, with a space in its path, that holds the runner and the sample."""
    tests = tmp_path / "a check out" / "tests"
    tests.mkdir(parents=True)
    for name in ("__main__.py", "conftest.py"):
        shutil.copy(HERE / name, tests)
    (tests / "test_sample.py").write_text(SAMPLE)
    return tests.parent


def run_tests(checkout: Path, *args: str, python=sys.executable, cwd="/", **env: str) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if name != "CI" and not name.startswith("PYTEST_")}
    return subprocess.run([python, checkout / "tests", *args], capture_output=True, text=True, timeout=300,
                          cwd=cwd, env={**kept, **env})


def make_bare_venv(folder: Path) -> Path:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    return folder / "bin" / "python"


@pytest.mark.parametrize("name, status", [("passes", 0), ("fails", 1), ("no_such_name", 5)])
def test_the_exit_status_is_that_of_pytest(name, status, checkout):
    """0 all passed, 1 some failed, 5 none found; from a folder that is not the repository."""
    assert run_tests(checkout, "-k", name).returncode == status


def test_an_argument_can_name_one_file(checkout):
    """Only that file runs, named from the root of the repository."""
    (checkout / "tests" / "test_other.py").write_text("def test_other(): pass\n")
    assert "1 passed" in run_tests(checkout, "tests/test_other.py").stdout
    assert "1 passed" in run_tests(checkout, "tests/test_other.py", cwd=checkout / "tests").stdout


def test_an_environment_made_before_is_used_again(checkout):
    """Where the running Python has no pytest, that of .venv is taken, and nothing is installed."""
    bare = make_bare_venv(checkout.parent / "bare")
    kept = checkout / ".venv" / f"py{platform.python_version()}" / "bin" / "python"
    kept.parent.mkdir(parents=True)
    kept.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    kept.chmod(0o755)
    done = run_tests(checkout, "-s", "-k", "interpreter", python=bare)
    assert f"prefix {sys.prefix}\n" in done.stdout
    assert done.returncode == 0


def test_without_pytest_and_without_an_index_it_says_so(checkout):
    """One sentence and exit status 2; the half-made environment does not pass for a whole one next time."""
    bare = make_bare_venv(checkout.parent / "bare")
    for _ in range(2):
        done = run_tests(checkout, python=bare, PIP_NO_INDEX="1", PIP_FIND_LINKS="", PIP_CONFIG_FILE=os.devnull)
        assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
        assert done.stderr.startswith("tests: cannot ")


@pytest.mark.parametrize("version", TOO_OLD, ids=name_version)
def test_an_old_python_gets_one_sentence(version, checkout):
    """It can parse the runner, at least."""
    done = run_tests(checkout, python=TOO_OLD[version])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(
        f"tests: the suite needs Python 3.11 or newer; this is Python {name_version(version)}.")


def test_a_missing_part_is_a_skip_at_home(checkout):
    """Whoever lacks a program can still run the rest."""
    done = run_tests(checkout, "-k", "not fails")
    assert (done.returncode, "2 passed, 3 skipped" in done.stdout) == (0, True)


def test_a_missing_part_is_a_failure_in_ci(checkout):
    """CI=true promises that every part is there; a skip for another reason stays a skip."""
    done = run_tests(checkout, "-rfEs", "-k", "not fails", CI="true")
    assert done.returncode == 1
    assert "FAILED tests/test_sample.py::test_lacks_a_part -" in done.stdout
    assert "ERROR tests/test_sample.py::test_lacks_a_part_by_mark -" in done.stdout
    assert "2 passed, 1 skipped" in done.stdout
    assert "missing: frobnicator (apt install frobnicator) (CI=true: this may not be skipped)" in done.stdout


def test_a_module_that_misses_a_part_is_a_failure_in_ci(checkout):
    """The same for a skip of the whole file."""
    (checkout / "tests" / "test_whole.py").write_text(
        "import pytest\npytest.skip('missing: frobnicator', allow_module_level=True)\n")
    assert run_tests(checkout, "tests/test_whole.py").returncode == 5
    assert run_tests(checkout, "tests/test_whole.py", CI="true").returncode == 2
