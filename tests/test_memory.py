# SPDX-License-Identifier: MPL-2.0
"""Memory protection: what the kernel says is in force, what it costs nobody, and that a host without it is served all the same."""

import json
import os
import pathlib
import resource
import signal
import subprocess
import sys

import pytest

import hookshot
from support import PROGRAM, need, running, service

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="this system has no /proc")

# Says for each command whether it may dump core, and takes its time.
LIMITS = service('["sh", "-c", "ulimit -c; ulimit -l"]')
# Runs hookshot with a module that cannot be imported.
WITHOUT_CTYPES = ("-c", f"import sys; sys.modules['ctypes'] = None; sys.path.insert(0, {str(PROGRAM.parent)!r}); import hookshot; sys.exit(hookshot.main())")


def limit(kind, soft, hard):
    return lambda: resource.setrlimit(kind, (soft, hard))


def run_python(code: str, **options) -> list[str]:
    """Return the lines that a Python prints which has imported hookshot."""
    done = subprocess.run([sys.executable, "-c", f"import os, sys; sys.path.insert(0, {str(PROGRAM.parent)!r}); import hookshot\n{code}"],
                          capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


# --- one process


def test_another_program_of_the_same_user_cannot_look_into_it():
    """The child that looks is an ordinary user's: root may look into everything."""
    code = """
import ctypes
# Loads what an ordinary user may not be able to.
hookshot.read_protection()
if os.geteuid() == 0:
    os.setresuid(65534, 65534, 65534)
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)
def look():
    if not os.fork():
        try:
            open(f"/proc/{os.getppid()}/environ").close()
            print("read", hookshot.read_protection(os.getppid()), flush=True)
        except PermissionError:
            print("refused", hookshot.read_protection(os.getppid()), flush=True)
        os._exit(0)
    os.wait()
look()
hookshot.protect_memory()
look()
"""
    before, after = run_python(code, preexec_fn=limit(resource.RLIMIT_CORE, *[resource.getrlimit(resource.RLIMIT_CORE)[1]] * 2))
    assert before.startswith("read ") and "can be read by other programs of its user" in before
    assert after.startswith("refused dumps no core, cannot be read by other programs of its user")


def test_it_leaves_no_core_where_others_do(tmp_path):
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    crash = "import os, sys; sys.path.insert(0, %r); import hookshot\nif %s: hookshot.protect_memory()\nos.abort()"

    def dumps(is_protected: bool) -> bool:
        process = subprocess.Popen([sys.executable, "-c", crash % (str(PROGRAM.parent), is_protected)], cwd=tmp_path, stderr=subprocess.DEVNULL,
                                   preexec_fn=limit(resource.RLIMIT_CORE, hard, hard))
        status = os.waitpid(process.pid, 0)[1]
        process.returncode = -signal.SIGABRT
        return os.WCOREDUMP(status)

    if not dumps(False):
        pytest.skip("nothing dumps core here")
    assert not dumps(True)


@pytest.mark.parametrize("is_there", [True, False])
def test_limits_are_what_they_were_so_that_commands_have_them(is_there):
    """But where the kernel cannot be asked to forgo the core dump: then it is the limit, which a command may raise again."""
    blocked = "" if is_there else "sys.modules['ctypes'] = None\n"
    code = f"""{blocked}import resource
resource.setrlimit(resource.RLIMIT_CORE, (4096, resource.getrlimit(resource.RLIMIT_CORE)[1]))
kinds = (resource.RLIMIT_CORE, resource.RLIMIT_MEMLOCK)
before = [resource.getrlimit(kind) for kind in kinds]
hookshot.protect_memory(), hookshot.lock_memory()
print(before == [resource.getrlimit(kind) for kind in kinds], resource.getrlimit(resource.RLIMIT_CORE)[0], hookshot.read_protection())
"""
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    if hard != resource.RLIM_INFINITY and hard < 4096:
        pytest.skip("core dumps are forbidden here")
    same, soft, *words = run_python(code)[0].split(" ", 2)
    assert (same, soft) == (("True", "4096") if is_there else ("False", "0"))
    assert words[0].startswith("dumps no core, cannot be read" if is_there else "dumps no core, perhaps can be read")


def test_memory_is_locked_only_where_no_thread_can_ever_be_refused_its_stack():
    """A limit of 1 GB is enough to lock what is there at start: 200 threads more would not fit."""
    setpriv = need("setpriv")
    code = """
import threading
hookshot.lock_memory()
stop = threading.Event()
threads = [threading.Thread(target=stop.wait) for _ in range(200)]
[thread.start() for thread in threads]
stop.set()
print(hookshot.read_protection().is_locked)
"""
    hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    soft = 1 << 30 if hard == resource.RLIM_INFINITY else min(1 << 30, hard)
    unable = [setpriv, "--bounding-set", "-ipc_lock", "--inh-caps", "-ipc_lock"] if os.geteuid() == 0 else []
    done = subprocess.run([*unable, sys.executable, "-c", f"import sys; sys.path.insert(0, {str(PROGRAM.parent)!r}); import hookshot\n{code}"],
                          capture_output=True, text=True, preexec_fn=limit(resource.RLIMIT_MEMLOCK, soft, hard))
    assert done.stdout == "False\n", done.stderr


@pytest.mark.parametrize("name", ["HOOKSHOT_HMAC_KEY", "DEPLOY_RECEIVER_OTHER"])
def test_a_secret_is_gone_from_the_environment_that_the_kernel_shows(name):
    code = f"""
print("c4n4ry" in open("/proc/self/environ").read(), "KEEP=this" in open("/proc/self/environ").read())
print(list(hookshot.SecretSurroundings.take(os.environ, "HOOKSHOT_").environment.values()))
print("c4n4ry" in open("/proc/self/environ").read(), "KEEP=this" in open("/proc/self/environ").read())
"""
    assert run_python(code, env={**os.environ, name: "c4n4ry-value", "KEEP": "this"}) == ["True True", "['c4n4ry-value']", "False True"]


# --- a server


@pytest.mark.parametrize("program", [(), (sys.executable, *WITHOUT_CTYPES)], ids=["ctypes", "no ctypes"])
def test_a_server_says_what_is_in_force_and_serves(tmp_path, program):
    with running(tmp_path, LIMITS, '[logging]\nlevel = "debug"\n') as host:
        host.stop()
        host.start(argv=program)
        record = host.wait(host.deploy())
        said = [json.loads(line)["message"] for line in host.output.read_text().splitlines() if '"memory"' in line][-1]
        seen = hookshot.read_protection(host.process.pid)
        soft, memlock = record["commands"][0]["stdout"].split()
        host.stop()
    assert record["status"] == "Succeeded" and said.startswith("this process dumps no core")
    assert ("cannot be read by other programs" in said) == (program == ())
    assert said.endswith("is never swapped out" if seen.is_locked else "may be swapped out")
    ours = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_CORE, resource.RLIMIT_MEMLOCK)]
    ours = ["unlimited" if value == resource.RLIM_INFINITY else str(value // size) for value, size in zip(ours, (512, 1024))]
    assert [soft, memlock] == (ours if program == () else ["0", ours[1]])
    assert pathlib.Path(tmp_path, "data/state.db").exists()
