# SPDX-License-Identifier: MPL-2.0
"""WORLD: ids, private files, the folder's lock, accounts, and the process table."""

import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
import threading

import pytest

import hookshot
from support import need, wait_until


def mode_of(path) -> int:
    return stat.S_IMODE(os.stat(path).st_mode)


@pytest.fixture
def start():
    """Give a function that starts a process in a session of its own, which does not outlive the test."""
    started = []

    def begin(*argv: str, **options) -> subprocess.Popen:
        started.append(subprocess.Popen(argv, start_new_session=True, stdout=subprocess.PIPE, **options))
        return started[-1]

    yield begin
    for process in started:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()
        process.stdout.close()


# --- ids and files

def test_a_new_deploy_id_is_a_legal_one_and_sorts_by_time():
    ids = [hookshot.new_deploy_id(at_ms) for at_ms in (0, 999_000, 1_000_000_000_000, 1_800_000_000_000)]
    assert ids == sorted(ids)
    assert all(hookshot.DEPLOY_ID.fullmatch(deploy_id) for deploy_id in ids)


@pytest.mark.parametrize("make", [lambda: hookshot.new_deploy_id(0), hookshot.new_request_id])
def test_no_two_new_ids_are_the_same(make):
    assert len({make() for _ in range(1000)}) == 1000


def test_a_new_private_folder_is_closed_to_others_whatever_the_umask(tmp_path):
    before = os.umask(0)
    try:
        hookshot.make_private_folder(str(tmp_path / "data"))
    finally:
        os.umask(before)
    assert mode_of(tmp_path / "data") == 0o700


def test_an_existing_folder_of_ours_is_closed_to_others(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    folder.chmod(0o755)
    (folder / "kept").write_text("x")
    hookshot.make_private_folder(str(folder))
    assert mode_of(folder) == 0o700
    assert (folder / "kept").read_text() == "x"


def test_a_private_file_is_closed_to_others_whatever_the_umask(tmp_path):
    before = os.umask(0)
    try:
        hookshot.write_private_file(str(tmp_path / "secrets"), "hmac_key=ä\n")
    finally:
        os.umask(before)
    assert mode_of(tmp_path / "secrets") == 0o600
    assert (tmp_path / "secrets").read_bytes() == "hmac_key=ä\n".encode()


@pytest.mark.parametrize("is_link", [False, True], ids=["file", "symlink"])
def test_a_private_file_never_replaces_what_is_there(tmp_path, is_link):
    there = tmp_path / "there"
    there.write_text("old")
    path = tmp_path / "secrets"
    path.symlink_to(there) if is_link else there.rename(path)
    with pytest.raises(FileExistsError):
        hookshot.write_private_file(str(path), "new")
    assert path.read_text() == "old"


def test_a_text_file_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "f").write_bytes(b"\xef\xbb\xbfa = 1\n")
    assert hookshot.read_text(str(tmp_path / "f")) == "a = 1\n"


@pytest.mark.parametrize("content", [b"x" * 101, b"\xff"], ids=["too large", "not UTF-8"])
def test_an_unusable_text_file_is_a_value_error(tmp_path, content):
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(ValueError):
        hookshot.read_text(str(tmp_path / "f"), limit_bytes=100)


def test_a_text_file_of_exactly_the_limit_is_read(tmp_path):
    (tmp_path / "f").write_bytes(b"x" * 100)
    assert hookshot.read_text(str(tmp_path / "f"), limit_bytes=100) == "x" * 100


# --- the folder's lock

def test_a_locked_folder_is_refused_and_the_holder_named(tmp_path):
    lock = hookshot.FolderLock(str(tmp_path))
    with pytest.raises(hookshot.HookshotError) as caught:
        hookshot.FolderLock(str(tmp_path))
    assert caught.value.name == "in_use"
    assert f"pid {os.getpid()}" in caught.value.sentence and str(tmp_path) in caught.value.sentence
    lock.release()
    hookshot.FolderLock(str(tmp_path)).release()


def test_who_only_looks_keeps_nobody_from_the_lock(tmp_path):
    hookshot.FolderLock(str(tmp_path)).release()
    is_over = threading.Event()

    def look() -> None:
        while not is_over.is_set():
            hookshot.FolderLock.holder(str(tmp_path))

    looker = threading.Thread(target=look)
    looker.start()
    try:
        for _ in range(500):
            hookshot.FolderLock(str(tmp_path)).release()
    finally:
        is_over.set()
        looker.join()


def test_the_lock_file_is_private_and_stays(tmp_path):
    hookshot.FolderLock(str(tmp_path)).release()
    assert mode_of(tmp_path / "hookshot.lock") == 0o600


def test_a_child_does_not_inherit_the_lock(tmp_path, start):
    lock = hookshot.FolderLock(str(tmp_path))
    start("sleep", "1000", close_fds=False)
    lock.release()
    hookshot.FolderLock(str(tmp_path)).release()


def test_a_lock_file_that_is_a_symlink_is_not_followed(tmp_path):
    (tmp_path / "target").write_text("kept")
    (tmp_path / "hookshot.lock").symlink_to(tmp_path / "target")
    with pytest.raises(OSError):
        hookshot.FolderLock(str(tmp_path))
    assert (tmp_path / "target").read_text() == "kept"


def test_kill_9_frees_the_lock(tmp_path, start):
    code = f"import sys; sys.path[:0] = {sys.path!r}; import hookshot, signal; lock = hookshot.FolderLock({str(tmp_path)!r}); " \
           "print('locked', flush=True); signal.pause()"
    holder = start(sys.executable, "-c", code)
    assert holder.stdout.readline() == b"locked\n"
    with pytest.raises(hookshot.HookshotError, match=f"pid {holder.pid}"):
        hookshot.FolderLock(str(tmp_path))
    holder.kill()
    holder.wait()
    hookshot.FolderLock(str(tmp_path)).release()


# --- accounts

def test_no_user_and_no_group_is_the_servers_own_identity():
    assert hookshot.find_account(None, None) is None


def test_an_account_has_the_users_ids_home_and_groups():
    me = pwd.getpwuid(os.geteuid())
    account = hookshot.find_account(me.pw_name, None)
    assert (account.name, account.uid, account.gid, account.home) == (me.pw_name, me.pw_uid, me.pw_gid, me.pw_dir)
    assert set(account.groups) == set(os.getgrouplist(me.pw_name, me.pw_gid))


def test_a_group_alone_keeps_the_user():
    import grp
    group = next(entry for entry in grp.getgrall() if entry.gr_gid != os.getegid())
    account = hookshot.find_account(None, group.gr_name)
    assert (account.uid, account.gid) == (os.geteuid(), group.gr_gid)


@pytest.mark.parametrize("user, group", [("no-such-user", None), (None, "no-such-group")])
def test_an_unknown_account_is_named(user, group):
    with pytest.raises(ValueError, match=user or group):
        hookshot.find_account(user, group)


# --- processes

def test_a_process_is_known_by_its_birth(start):
    process = start("sleep", "1000")
    birth = hookshot.birth_now()
    seen = hookshot.read_process(process.pid)
    assert seen.is_alive and seen.pgid == process.pid and hookshot.was_born(seen, birth)


@pytest.mark.parametrize("change", [
    lambda boot, ticks: f"{boot}-{ticks - 1000}", lambda boot, ticks: f"{boot}-{ticks + 1000}", lambda boot, ticks: f"ffffffff-{ticks}",
    lambda boot, ticks: "", lambda boot, ticks: None], ids=["older", "younger", "another boot", "empty", "unknown"])
def test_a_process_of_another_birth_is_another_process(start, change):
    seen = hookshot.read_process(start("sleep", "1000").pid)
    boot, _, ticks = hookshot.birth_now().rpartition("-")
    assert hookshot.was_born(seen, f"{boot}-{ticks}")
    assert not hookshot.was_born(seen, change(boot, int(ticks)))


def test_a_process_whose_name_looks_like_a_stat_line_is_read_rightly(tmp_path, start):
    program = tmp_path / "x) Z 1 1 1"
    shutil.copy(need("sleep"), program)
    process = start(str(program), "1000")
    wait_until(lambda: b"x) Z" in open(f"/proc/{process.pid}/stat", "rb").read())
    seen = hookshot.read_process(process.pid)
    assert seen.is_alive and seen.pgid == process.pid


def test_there_is_nothing_to_read_of_a_process_that_was_reaped(start):
    process = start("true")
    process.wait()
    assert hookshot.read_process(process.pid) is None


def test_a_zombie_is_not_alive_and_neither_is_its_group(start):
    process = start("true")
    wait_until(lambda: not hookshot.read_process(process.pid).is_alive)
    assert not hookshot.is_group_alive(process.pid)
    assert process.pid not in [other.pid for other in hookshot.list_processes()]
    os.killpg(process.pid, 0)  # The zombie still holds the group's number.


def test_a_group_outlives_its_leader(start):
    leader = start("sh", "-c", "sleep 1000 & echo started")
    leader.stdout.readline()
    leader.wait()
    assert hookshot.is_group_alive(leader.pid)
    hookshot.end_groups([leader.pid])
    wait_until(lambda: not hookshot.is_group_alive(leader.pid))


def test_the_environment_of_a_process_is_what_it_was_started_with(start):
    process = start("sleep", "1000", env={"PATH": os.environ["PATH"], "HOOKSHOT_DEPLOY_ID": "a=b", "EMPTY": ""})
    wait_until(lambda: b"sleep" in open(f"/proc/{process.pid}/cmdline", "rb").read())
    assert hookshot.read_environment(process.pid) == {
        b"PATH": os.environ["PATH"].encode(), b"HOOKSHOT_DEPLOY_ID": b"a=b", b"EMPTY": b""}


def test_the_environment_of_no_process_is_empty(start):
    process = start("true")
    process.wait()
    assert hookshot.read_environment(process.pid) == {}


def test_ending_groups_lets_them_clean_up(tmp_path, start):
    process = start("sh", "-c", f"trap 'echo bye > {tmp_path}/bye; exit' TERM; echo ready; while :; do sleep 0.05; done")
    process.stdout.readline()
    hookshot.end_groups([process.pid], kill_after_s=1000)
    assert (tmp_path / "bye").read_text() == "bye\n"
    assert not hookshot.is_group_alive(process.pid)


def test_ending_groups_kills_every_member_that_does_not_go(start):
    script = "trap '' TERM; sh -c 'echo up; while :; do sleep 1000; done' & wait; while :; do sleep 1000; done"
    groups = [start("sh", "-c", script) for _ in range(2)]
    for process in groups:
        process.stdout.readline()
    hookshot.end_groups([process.pid for process in groups], kill_after_s=0.1)
    wait_until(lambda: not any(hookshot.is_group_alive(process.pid) for process in groups))


def test_ending_a_group_that_is_gone_is_nothing(start):
    process = start("true")
    process.wait()
    bystander = start("sleep", "1000")
    hookshot.end_groups([process.pid], kill_after_s=1000)
    hookshot.end_groups([])
    assert bystander.poll() is None
