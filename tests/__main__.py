# SPDX-License-Identifier: MPL-2.0
"""Run the whole suite: python3 tests [pytest arguments].

pytest is taken from the running Python. Where it is missing, it is installed into a virtual environment of that
Python under .venv/, which later runs use again. The exit status is pytest's; 2 if the suite cannot be started.
"""

# Any Python, even 2.7, must parse this page: it is the one that says which Python is needed.
import os
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def give_up(sentence):
    sys.stderr.write("tests: " + sentence + "\n")
    sys.exit(2)


def has_pytest(python):
    """Tell whether this interpreter, which may be absent or broken, can import pytest."""
    # Not the current folder, where "pytest" may be anything: hence -P.
    try:
        return subprocess.call([python, "-P", "-c", "import pytest"], stderr=subprocess.DEVNULL) == 0
    except OSError:
        return False


def attempt(command, hint):
    """Run a step of the preparation; where it fails, say its last line and the hint."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    if done.returncode:
        said = done.stdout.decode(errors="replace").strip().splitlines() or ["no output"]
        give_up("%s (%s)" % (hint, said[-1].strip()))


def make_venv(folder):
    """Make the folder a virtual environment of the running Python that has pytest; return its interpreter."""
    python = os.path.join(folder, "bin", "python")
    if not has_pytest(python):
        attempt([sys.executable, "-m", "venv", "--clear", folder],
                "cannot make a virtual environment in %s; on Debian it takes python3-venv" % folder)
        attempt([python, "-m", "pip", "install", "--quiet", "--retries", "1", "pytest"],
                "cannot install pytest: is there a way to a package index? Else install it for %s" % sys.executable)
    return python


def main():
    if sys.version_info < (3, 11):
        give_up("the suite needs Python 3.11 or newer; this is Python %d.%d.%d." % sys.version_info[:3])
    python = sys.executable
    if not has_pytest(python):
        # By full version: an environment of 3.12.1 must not stand in for 3.12.9.
        python = make_venv(os.path.join(ROOT, ".venv", "py%d.%d.%d" % sys.version_info[:3]))
    os.chdir(ROOT)
    # testpaths, not an argument "tests": so an argument that names one file runs just that file.
    os.execv(python, [python, "-m", "pytest", "--rootdir", ROOT, "-o", "testpaths=tests"] + sys.argv[1:])


if __name__ == "__main__":
    main()
