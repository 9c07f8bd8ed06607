# SPDX-License-Identifier: MPL-2.0
"""DOCTOR: each check with real causes of "warn" and "fail", and that looking changes nothing and never hangs."""

import contextlib
import json
import os
import pathlib
import pty
import resource
import signal
import socket
import sqlite3
import subprocess
import sys

import pytest

import hookshot
from support import KEY, PATIENCE_S, PROGRAM, Host, free_port, make_certificates, need, program, running, service, wait_until

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make other users' files")
needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="this system has no /proc")
WRONG = ("warn", "fail")


def read(host: Host, environ: dict[str, str] | None = None) -> hookshot.Host:
    # Whose it is, is the server's user: were there none, or another's, these tests of root's would become that user.
    host.data.mkdir(exist_ok=True)
    return hookshot._read_host(str(host.config), str(host.services), dict(os.environ if environ is None else environ))


def look(host: Host, check: str, environ: dict[str, str] | None = None) -> list[tuple[str, str]]:
    """Return (status, message and advice) of one check; one that cannot look fails."""
    row, known = hookshot.CHECKS[check], read(host, environ)
    found = hookshot._within(row.patience_s, lambda: row.run(known))
    return [(status, f"{message}; {advice}") for status, message, advice in found] if isinstance(found, list) else [("fail", found)]


def only(found: list[tuple[str, str]], status: str, *words: str) -> None:
    """Assert that one line is not "ok", which status it has, and what it says."""
    wrong = [line for line in found if line[0] in WRONG]
    assert len(wrong) == 1 and wrong[0][0] == status and all(word in wrong[0][1] for word in words), found


@pytest.fixture
def host(tmp_path):
    return Host(tmp_path, service())


@pytest.fixture(scope="module")
def used(tmp_path_factory):
    """A host whose server has carried out a deployment and ended."""
    with running(tmp_path_factory.mktemp("used"), service()) as host:
        host.wait(host.deploy())
        host.stop()
        yield host


@pytest.fixture
def database(host, used):
    """A database of its own to do harm to."""
    host.data.mkdir()
    (host.data / "state.db").write_bytes((used.data / "state.db").read_bytes())
    return host.data / "state.db"


# --- the command


def test_a_host_that_is_well_has_no_line_that_fails_and_nothing_is_changed(used):
    def everything():
        return {path: path.stat().st_mtime_ns for path in [used.folder, *used.folder.rglob("*")]}

    before = everything()
    done = used.cli("doctor")
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and done.stderr == "" and everything() == before
    assert {line.split()[1] for line in lines} == hookshot.CHECKS.keys()
    assert {line[:5] for line in lines} <= {"ok   ", "warn "} and "\x1b" not in done.stdout
    assert KEY not in done.stdout and "hmac_key has 64 bytes, from file" in done.stdout


def test_what_fails_is_in_the_exit_status_and_in_the_list_for_programs(host):
    host.write(service(), "[server]\nworker_threads = 99\n")
    done = host.cli("doctor", "--json")
    findings = json.loads(done.stdout)
    assert done.returncode == 78
    assert [finding for finding in findings if finding["status"] == "fail"] == [
        {"status": "fail", "check": "files", "message": f"{host.config}: server.worker_threads: 99 is out of range", "advice": "allowed: 1 to 64"}]


@pytest.mark.parametrize("no_colour", ["", "1"])
def test_a_terminal_gets_colours_unless_its_user_wants_none(host, no_colour):
    ours, theirs = pty.openpty()
    process = subprocess.Popen([*program(), "-c", str(host.config), "doctor"], stdout=theirs, stderr=subprocess.DEVNULL,
                               env={**os.environ, "TERM": "xterm", "NO_COLOR": no_colour})
    os.close(theirs)
    said = b""
    with contextlib.suppress(OSError):  # EIO: the other side is closed
        while piece := os.read(ours, 1 << 16):
            said += piece
    os.close(ours)
    assert process.wait(PATIENCE_S) == 0
    assert (b"\x1b[32mok  \x1b[m python" in said) == (not no_colour) and b"python" in said


def test_without_any_file_the_rest_is_looked_at(tmp_path):
    done = subprocess.run([sys.executable, str(PROGRAM), "-c", str(tmp_path / "none.toml"), "doctor", "--json"], capture_output=True)
    found = {finding["check"]: finding for finding in json.loads(done.stdout)}
    assert done.returncode == 78 and found["files"]["status"] == "fail" and "hookshot init" in found["files"]["advice"]
    assert found["sqlite"]["status"] == found["python"]["status"] == "ok" and found.keys() == hookshot.CHECKS.keys()


def test_what_hangs_costs_its_line_alone(tmp_path):
    """A named pipe that nobody writes to: opening it for reading waits for ever, as a network's file system may."""
    os.mkfifo(tmp_path / "pipe")
    problem = hookshot._within(0.2, lambda: iter([open(tmp_path / "pipe")]))
    reading = hookshot._Reading("config.toml")
    assert reading.take("files", lambda problems: open(tmp_path / "pipe"), "instead", 0.2) == "instead"
    with open(tmp_path / "pipe", "wb"):
        pass
    assert problem == "it takes more than 0.2 s; see what hangs there"
    assert "cannot be looked at: it takes more than 0.2 s" in reading.problems["files"][0].message


def test_a_check_that_breaks_is_a_line_too():
    assert hookshot._within(5, lambda: iter([1 // 0])) == "ZeroDivisionError: integer division or modulo by zero"


# --- Python, files, secrets


def test_a_missing_module_is_told_with_what_it_takes_away(host, monkeypatch):
    monkeypatch.setitem(sys.modules, "zlib", None)
    only(look(host, "python"), "warn", "zlib is missing", "compression")


def test_one_wrong_service_does_not_keep_the_others_from_being_looked_at(host):
    host.write(service(head="enabeld = true", name="bad") + service('["no-such-program-x"]'))
    only(look(host, "files"), "fail", 'service "bad".enabeld', "did you mean")
    only(look(host, "host"), "fail", "no-such-program-x is not found")


def test_a_file_that_everyone_may_change_fails(host):
    host.services.chmod(0o666)
    only(look(host, "host"), "fail", "can be changed by every user", "chmod o-w")


@pytest.mark.parametrize("secret, status, words", [
    ("hmac_key=q7x", "fail", "shorter than 16 bytes"), ("hmac_key=0123456789abcdef01", "warn", "only 18 bytes"), ("other=x", "fail", "hmac_key is not found")])
def test_a_weak_or_missing_secret_is_told_and_never_shown(host, secret, status, words):
    host.secrets.write_text(secret + "\n")
    found = look(host, "secrets")
    only(found, status, words)
    assert secret == "other=x" or not any(secret.partition("=")[2] in line for _, line in found)


# --- the host


def test_a_certificate_is_told_before_it_expires_and_when_it_has(tmp_path):
    certificates, faketime, openssl = make_certificates(tmp_path), need("faketime"), need("openssl")
    old, old_key = tmp_path / "old.pem", tmp_path / "old.key"
    subprocess.run([faketime, "-f", "-30d", openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
                    "-subj", "/CN=old", "-keyout", old_key, "-out", old], check=True, capture_output=True)
    host = Host(tmp_path / "host", service())

    def see(cert, key):
        host.write(service(), f'[server.tls]\ncert = "{cert}"\nkey = "{key}"\n')
        return look(host, "tls")

    only(see(certificates.server, certificates.server_key), "warn", "expires at", "renew it")
    assert [status for status, line in see(old, old_key) if "and not now" in line] == ["fail"]
    assert [status for status, line in see(certificates.server, certificates.renewed_key) if "do not belong together" in line] == ["fail"]


@pytest.mark.parametrize("year", ["2049", "2050"])
def test_the_end_of_a_certificate_is_read_in_both_forms(tmp_path, year):
    """Years from 2050 on are written with four digits (RFC 5280, 4.1.2.5)."""
    faketime, openssl = need("faketime"), need("openssl")
    subprocess.run([faketime, "2048-12-31 12:00:00", openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=x",
                    "-days", "364" if year == "2049" else "366", "-keyout", tmp_path / "key", "-out", tmp_path / "cert"],
                   check=True, capture_output=True, env={**os.environ, "TZ": "UTC"})
    begins, ends = hookshot.parse_validity((tmp_path / "cert").read_text())
    assert ends[:4] == year and begins < ends
    told = subprocess.run([openssl, "x509", "-in", tmp_path / "cert", "-noout", "-enddate", "-dateopt", "iso_8601"], capture_output=True, text=True)
    if told.returncode == 0:
        assert told.stdout.strip() == f"notAfter={ends[:10]} {ends[11:]}"


def test_a_file_without_a_certificate_has_no_end():
    assert hookshot.parse_validity("") is None and hookshot.parse_validity("-----BEGIN CERTIFICATE-----\n!\n-----END") is None


@needs_root
def test_a_small_disk_fails_and_one_in_memory_is_warned_of(host):
    host.data.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m,nr_inodes=20", "none", host.data], capture_output=True).returncode:
        pytest.skip("this machine does not let root mount a tmpfs")
    try:
        found = look(host, "disk")
    finally:
        subprocess.run(["umount", "-l", host.data], check=True)
    assert [(status, any(words in line for words in ("2.0 MB free", "2 MB free")), "more files" in line, "is memory" in line)
            for status, line in found] == [("fail", True, False, False), ("warn", False, True, False), ("warn", False, False, True)], found


@pytest.mark.parametrize("kind, is_one", [("nfs4", True), ("cifs", True), ("fuse.sshfs", True), ("ext4", False), ("fuseblk", False), ("xfs", False)])
def test_file_systems_of_a_network_are_known(kind, is_one):
    assert bool(hookshot._NETWORK_FILE_SYSTEMS.fullmatch(kind)) == is_one


def test_a_damaged_database_fails_without_being_touched(host, database):
    content = bytearray(database.read_bytes())
    content[3 * 4096 : 5 * 4096] = b"\xff" * 2 * 4096
    database.write_bytes(content)
    only(look(host, "database"), "fail", "damaged", "restore a backup")
    assert database.read_bytes() == content and not list(host.data.glob("state.db-*"))


def test_what_is_no_database_fails_with_what_to_do(host):
    host.data.mkdir()
    (host.data / "state.db").write_text("this is no database, but it is long enough to have a head" * 20)
    only(look(host, "database"), "fail", "state.db is not a database; stop the server and restore a backup")


def test_a_database_of_a_newer_version_fails(host, database):
    with contextlib.closing(sqlite3.connect(database)) as db:
        db.execute("PRAGMA user_version=99")
    only(look(host, "database"), "fail", "written by a newer hookshot (schema 99")


def test_a_clock_behind_the_newest_deployment_fails(host, database):
    with contextlib.closing(sqlite3.connect(database)) as db:
        db.execute("UPDATE deployments SET queued_ms=?", (hookshot.now_ms() + 7_200_000,))
        db.commit()
    told = [line for status, line in look(host, "clock") if status == "fail"]
    assert len(told) == 1 and told[0].startswith("the clock is ") and " h" in told[0] and "behind the newest deployment" in told[0]


def test_a_database_that_takes_too_long_is_looked_at_in_part(database):
    with contextlib.closing(sqlite3.connect(database)) as db:
        db.execute("CREATE TABLE filler (x)")
        db.execute("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 50000) INSERT INTO filler SELECT i FROM n")
        db.commit()
    assert hookshot.examine_database(str(database), lambda: False).is_complete
    found = hookshot.examine_database(str(database), lambda: True)
    assert not found.is_complete and found.problem is None and found.latest_ms > 0


# --- the server and its addresses


@needs_proc
def test_a_port_that_another_program_has_fails_and_the_program_is_named(host):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        host.write(service(), f'[server]\nlisten = ["127.0.0.1:{taken.getsockname()[1]}", "127.0.0.1:{free_port()}"]\n')
        only(look(host, "server"), "fail", f"is used by {pathlib.Path('/proc/self/comm').read_text().strip()} (pid {os.getpid()})")


def test_what_is_no_socket_and_what_is_no_address_of_this_host_fail(host):
    host.write(service(), f'[server]\nlisten = ["unix:{host.config}", "192.0.2.1:{free_port()}", "unix:{host.folder}/free.sock"]\n')
    assert [status for status, _ in look(host, "server")] == ["fail", "fail", "ok"]


def test_a_server_is_asked_and_one_that_drains_is_warned_of(tmp_path):
    with running(tmp_path, service('["sh", "-c", "while [ ! -e go ]; do sleep 0.05; done"]'), f'[server]\nlisten = "127.0.0.1:{free_port()}"\n') as host:
        assert [(status, "answers: ready" in line) for status, line in look(host, "server")] == [("ok", True)]
        deploy_id = host.deploy()
        host.wait(deploy_id, "Deploying")
        host.process.send_signal(signal.SIGTERM)
        wait_until(lambda: host.get("/ready").status == 503)
        only(look(host, "server"), "warn", "answers: draining")
        host.secrets.write_text("other=value\n")
        # The running server may have it from elsewhere.
        only(look(host, "secrets"), "warn", "hmac_key is not found", "cannot be seen from here")
        (tmp_path / "go").touch()
        assert host.process.wait(PATIENCE_S) == 0


@needs_proc
def test_what_holds_the_data_directory_unprotected_and_silent_is_told(host):
    """Stands for a server that was started without ctypes, with few descriptors, and on another port."""
    host.data.mkdir()
    host.write(service(), f'[server]\nlisten = "127.0.0.1:{free_port()}"\n')
    hold = f"import sys; sys.path.insert(0, {str(PROGRAM.parent)!r}); import hookshot; lock = hookshot.FolderLock({str(host.data)!r}); print(1, flush=True)\n"
    if os.geteuid() == 0:
        # An ordinary user's: what root's programs let others see cannot be told from outside.
        hold += "import ctypes, os; os.setuid(4321); ctypes.CDLL(None).prctl(4, 1, 0, 0, 0); print(1, flush=True)\n"
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]

    def limit():
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
        resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))

    with subprocess.Popen([sys.executable, "-c", hold + "sys.stdin.read()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=limit) as process:
        for _ in range(hold.count("print(1")):
            assert process.stdout.readline()
        try:
            only(look(host, "limits"), "warn", "may open 100 descriptors and may need 612", "LimitNOFILE")
            only(look(host, "server"), "fail", f"a server runs (pid {process.pid})", "--port")
            only(look(host, "memory"), "warn", "can be read by other programs of its user", "ctypes")
        finally:
            process.stdin.close()


@needs_root
def test_programs_and_folders_that_are_closed_to_their_user_are_warned_of(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o700)
    (tmp_path / "closed/tool").write_text("#!/bin/sh\n")
    (tmp_path / "closed/tool").chmod(0o755)
    host = Host(tmp_path / "host", service(f'["{tmp_path}/closed/tool"]', head='user = "nobody"').replace('working_dir = "@"', 'working_dir = "/"'))
    only(look(host, "commands"), "warn", f"{tmp_path}/closed/tool cannot be reached by nobody", "is closed to it")


def python_of_others() -> str:
    """Return a Python that users other than root can run, with this checkout."""
    python = "/usr/bin/python3"
    if not os.path.exists(python) or hookshot.find_closed(str(PROGRAM.parent), hookshot.find_account("nobody", None)) \
            or subprocess.run([python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]).returncode:
        pytest.skip("this machine has no Python from 3.11 on, or no checkout, that other users can read")
    return python


def open_to_others(folder: pathlib.Path) -> None:
    """Let other users into a test's folder; pytest keeps those above it to its user."""
    for step in (folder, *folder.parents):
        if step.stat().st_uid == os.geteuid() and not step.stat().st_mode & 0o1:
            step.chmod(0o755)


@needs_root
def test_root_looks_as_the_servers_user_does(tmp_path):
    """Who has the data directory is the server's user: its secrets are rightly its own, and what is closed to it is told."""
    python = python_of_others()
    account = hookshot.find_account("nobody", None)
    host = Host(tmp_path / "host", service())
    host.data.mkdir()
    for path in (host.folder, *host.folder.iterdir()):
        os.chown(path, account.uid, account.gid)
    open_to_others(tmp_path)
    # The Python of root alone may be closed to the user that doctor becomes.
    for words in ((python, str(PROGRAM)), program()):
        done = subprocess.run([*words, "-c", str(host.config), "doctor", "--json"], capture_output=True, text=True)
        found = {finding["check"]: finding for finding in json.loads(done.stdout)}
        assert done.returncode == 0, done.stdout
        assert found["user"]["message"] == "nobody, as the server" and found["secrets"]["status"] == found["host"]["status"] == "ok"
        done = subprocess.run([*words, "-c", str(host.config), "validate"], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "as nobody, the server's user:\n")
    os.chown(host.config, 0, 0)
    host.config.chmod(0o600)
    done = subprocess.run([python, str(PROGRAM), "-c", str(host.config), "doctor"], capture_output=True, text=True)
    assert done.returncode == 78 and "config.toml: cannot be read: Permission denied" in done.stdout


# --- systemd


def fake_systemctl(folder: pathlib.Path, facts: str, unit: str = "hookshot.service") -> None:
    (folder / "systemctl").write_text(f"#!/bin/sh\n[ $1 = show ] && [ $2 = {unit} ] && printf '%s\\n' '{facts}'\n")
    (folder / "systemctl").chmod(0o755)


@pytest.mark.parametrize("facts, words", [
    ("Type=notify\nLoadState=loaded\nKillMode=mixed\nWatchdogUSec=30s\nNeedDaemonReload=no\nUser=nobody", []),
    ("Type=simple\nLoadState=loaded\nKillMode=control-group\nWatchdogUSec=30s\nNeedDaemonReload=yes\nUser=",
     ["Type=notify", "WatchdogSec=30s without", "KillMode=mixed", "daemon-reload"]),
    ("LoadState=not-found", ["show unit"])])
def test_a_unit_that_does_not_suit_the_server_is_warned_of(host, facts, words):
    """What systemctl prints of a unit, printed by another program: the machine of the tests has no service manager."""
    fake_systemctl(host.folder, facts)
    found = look(host, "unit", {"PATH": f"{host.folder}:{os.environ['PATH']}"})
    assert [status for status, _ in found] == (["warn"] * len(words) or ["ok"]), found
    assert all(word in line for word, (_, line) in zip(words, found, strict=bool(words)))


@pytest.mark.parametrize("facts, status, words", [
    ("User=no-such-user-x", "fail", "cannot start: user no-such-user-x does not exist"),
    ("ActiveState=failed\nSubState=failed", "fail", "has failed; see journalctl"),
    ("ActiveState=activating\nSubState=auto-restart", "fail", "has failed, and systemd tries again; see journalctl"),
    ("UnitFileState=disabled", "warn", "systemctl enable hookshot.service")])
def test_a_unit_that_brings_no_server_is_told(host, facts, status, words):
    fake_systemctl(host.folder, f"LoadState=loaded\nType=notify\n{facts}")
    only(look(host, "unit", {"PATH": f"{host.folder}:{os.environ['PATH']}"}), status, words)


@needs_root
def test_another_user_is_told_what_he_cannot_see_and_nothing_that_is_not_so(tmp_path):
    python = python_of_others()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        host = Host(tmp_path / "host", service(), f'[server]\nlisten = "127.0.0.1:{taken.getsockname()[1]}"\n')
        host.data.mkdir(mode=0o700)
        open_to_others(host.folder)
        done = subprocess.run([python, str(PROGRAM), "-c", str(host.config), "doctor", "--json"], capture_output=True, text=True, user=4321, group=4321,
                              extra_groups=[], env={"PATH": os.environ["PATH"]})
        audit, valid = (subprocess.run([python, str(PROGRAM), "-c", str(host.config), command], capture_output=True, text=True, user=4321, group=4321, extra_groups=[])
                        for command in ("audit", "validate"))
    assert audit.returncode == 77 and "state.db cannot be looked at: Permission denied; run this as root" in audit.stderr
    assert "this is 4321, not the server's user root" in valid.stderr and "run this as root\n" in valid.stderr
    found = {finding["check"]: (finding["status"], finding["message"]) for finding in json.loads(done.stdout)}
    assert found["user"] == ("warn", "this is 4321, the server's user is root: modes, secrets and limits are told as 4321 meets them")
    assert found["database"] == ("warn", f"{host.data}/state.db cannot be looked at by 4321") and found["server"][0] == "warn" and "is in use" in found["server"][1]


@needs_root
def test_before_the_first_start_the_unit_says_whose_the_server_will_be(tmp_path):
    """And systemd makes the data directory and that of the log, which that user could not."""
    python = python_of_others()
    fake_systemctl(tmp_path, "LoadState=loaded\nType=notify\nKillMode=mixed\nUser=nobody\nStateDirectory=hookshot\nLogsDirectory=hookshot")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = f'[server]\nlisten = "127.0.0.1:{taken.getsockname()[1]}"\n[logging]\ndirectory = "{tmp_path}/host/log"\n'
        host = Host(tmp_path / "host", service(), config)
        for path in (host.folder, *host.folder.iterdir()):
            os.chown(path, 65534, -1)
        host.folder.chmod(0o555)
        open_to_others(tmp_path)
        port = taken.getsockname()[1]
        looks, checks = (subprocess.run([python, str(PROGRAM), "-c", str(host.config), name], capture_output=True, text=True,
                                        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"}) for name in ("doctor", "validate"))
    name = pathlib.Path("/proc/self/comm").read_text().strip()
    assert "ok   user      nobody, as the server" in looks.stdout and [line for line in looks.stdout.splitlines() if line.startswith("fail")] == [
        f"fail server    127.0.0.1:{port} is used by {name} (pid {os.getpid()}); end it, or choose another address in server.listen"]
    assert checks.returncode == 0 and "are valid" in checks.stdout, checks.stderr


def test_a_port_that_systemd_holds_for_the_server_is_well(host):
    fake_systemctl(host.folder, "LoadState=loaded\nActiveState=active", unit="hookshot.socket")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        host.write(service(), f'[server]\nlisten = "127.0.0.1:{taken.getsockname()[1]}"\n')
        [(status, line)] = look(host, "server", {"PATH": f"{host.folder}:{os.environ['PATH']}"})
    assert status == "ok" and "hookshot.socket is active" in line


def test_a_host_without_systemd_is_well(host):
    (host.folder / "systemctl").write_text("#!/bin/sh\necho 'System has not been booted with systemd' >&2\nexit 1\n")
    (host.folder / "systemctl").chmod(0o755)
    assert look(host, "unit", {"PATH": f"{host.folder}:{os.environ['PATH']}"}) == [("ok", "systemd does not manage this host; ")]
