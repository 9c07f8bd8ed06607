# SPDX-License-Identifier: MPL-2.0
"""The archive: built the same everywhere, run by every Python, checked against the source.

Most tests build from a copy of build_zipapp.py beside a stub, so that they prove the builder and nothing else.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import build_zipapp
from pythons import SUPPORTED, TOO_OLD, name_version

STUB = '''\
"""A stand-in: says which file it is, and returns its first argument."""
import sys

NAMES = {"one", "two", "three"}     # The order of a set is random, byte code must not show it.


def main():
    """Gone from byte code."""
    print(__file__)
    return int(sys.argv[1]) if len(sys.argv) > 1 else 0
'''

TAG = sys.implementation.cache_tag
BYTE_CODE = f"{TAG}/hookshot.pyc"

every_python = pytest.mark.parametrize("version", SUPPORTED, ids=name_version)
every_old_python = pytest.mark.parametrize("version", TOO_OLD, ids=name_version)


def make_workshop(folder: Path) -> Path:
    folder.mkdir(parents=True)
    shutil.copy(build_zipapp.__file__, folder)
    (folder / "hookshot.py").write_text(STUB)
    return folder


def call(*command, **options) -> subprocess.CompletedProcess:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120, **options)


def build(workshop: Path, *args, python: str = sys.executable, epoch: str | None = None, **options):
    env = {name: value for name, value in os.environ.items() if name != "SOURCE_DATE_EPOCH"}
    if epoch is not None:
        env["SOURCE_DATE_EPOCH"] = epoch
    return call(python, workshop / "build_zipapp.py", *args, **{"env": env, **options})


def built(workshop: Path, *args, **options) -> Path:
    done = build(workshop, *args, **options)
    assert done.returncode == 0, done.stderr
    return workshop / "dist" / "hookshot.pyz"


def byte_code_of(*pythons: str) -> list[str]:
    return [word for python in pythons for word in ("--python", python)]


def read_entries(archive: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(archive) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


def write_entries(archive: Path, entries: dict[str, bytes]) -> None:
    archive.write_bytes(build_zipapp.render_archive(entries, (1980, 1, 1, 0, 0, 0)))


@pytest.fixture
def workshop(tmp_path):
    return make_workshop(tmp_path / "workshop")


# --- The same bytes ---

@every_python
def test_every_python_builds_the_same_bytes(version, workshop, tmp_path):
    """Folder, spaces in its name, umask, time zone, age and mode of the source, version of Python: none shows."""
    first = built(workshop).read_bytes()
    other = make_workshop(tmp_path / "an other folder")
    (other / "hookshot.py").chmod(0o600)
    os.utime(other / "hookshot.py", (1, 1))
    env = {"PATH": os.environ["PATH"], "TZ": "Asia/Tokyo", "LC_ALL": "C"}
    assert built(other, python=SUPPORTED[version], umask=0o077, cwd="/", env=env).read_bytes() == first


@every_python
def test_byte_code_is_the_same_each_time(version, workshop, tmp_path):
    """Neither the folder nor the random order of sets shows in byte code."""
    options = byte_code_of(SUPPORTED[version])
    other = make_workshop(tmp_path / "an other folder")
    assert built(workshop, *options).read_bytes() == built(other, *options, cwd="/", umask=0o077).read_bytes()


def test_the_order_of_the_pythons_does_not_matter(workshop):
    """Entries are sorted."""
    pythons = list(SUPPORTED.values())
    first = built(workshop, *byte_code_of(*pythons)).read_bytes()
    assert built(workshop, *byte_code_of(*reversed(pythons))).read_bytes() == first


@pytest.mark.parametrize("epoch, date", [
    (None, (1980, 1, 1, 0, 0, 0)),
    ("0", (1980, 1, 1, 0, 0, 0)),
    ("-1", (1980, 1, 1, 0, 0, 0)),
    ("1700000000", (2023, 11, 14, 22, 13, 20)),
    ("99999999999999999999", (2107, 12, 31, 23, 59, 58)),
])
def test_source_date_epoch_is_the_date_of_every_entry(epoch, date, workshop):
    """The date follows SOURCE_DATE_EPOCH within the years that a zip can name; nothing else changes with it."""
    archive = built(workshop, epoch=epoch)
    with zipfile.ZipFile(archive) as opened:
        assert {info.date_time for info in opened.infolist()} == {date}
    assert read_entries(archive) == {"__main__.py": build_zipapp.MAIN, "hookshot.py": STUB.encode()}
    assert built(workshop, epoch=epoch).read_bytes() == archive.read_bytes()


def test_a_source_date_epoch_that_is_no_number_is_refused(workshop):
    """Nothing is built on a guess."""
    done = build(workshop, epoch="today")
    assert done.returncode == 2
    assert done.stderr == "build_zipapp: SOURCE_DATE_EPOCH is 'today'; it must be a whole number of seconds\n"
    assert not (workshop / "dist").exists()


# --- The file ---

def test_the_archive_can_be_executed(workshop):
    """It starts with a shebang, has mode 0755 whatever the umask, and runs by its own name."""
    archive = built(workshop, umask=0o077)
    assert archive.read_bytes().startswith(b"#!/usr/bin/env python3\nPK")
    assert archive.stat().st_mode & 0o7777 == 0o755
    assert call(archive, "7").returncode == 7


def test_the_entries_are_plain_files(workshop):
    """Fixed modes, fixed system, deflated."""
    with zipfile.ZipFile(built(workshop, *byte_code_of(sys.executable))) as opened:
        infos = opened.infolist()
    assert [info.filename for info in infos] == ["__main__.py", BYTE_CODE, "hookshot.py"]
    for info in infos:
        assert (info.create_system, info.external_attr >> 16, info.compress_type) == (3, 0o100644, 8)


def test_the_build_prints_path_size_and_digest(workshop):
    """One line, with what stat and sha256sum would say."""
    done = build(workshop, "--output", "here.pyz", cwd=workshop)
    data = (workshop / "here.pyz").read_bytes()
    assert done.stdout == f"here.pyz: {len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()}\n"


def test_a_build_replaces_the_archive_in_one_step(workshop):
    """Whoever has the old archive open keeps the whole old archive, and no temporary file stays."""
    archive = built(workshop)
    with archive.open("rb") as old:
        before = old.read()
        (workshop / "hookshot.py").write_text(STUB + "# changed\n")
        built(workshop)
        old.seek(0)
        assert old.read() == before != archive.read_bytes()
    assert os.listdir(archive.parent) == ["hookshot.pyz"]


def test_a_build_that_cannot_be_written_leaves_nothing_behind(workshop):
    """One sentence, exit status 1, and no temporary file."""
    (workshop / "dist" / "hookshot.pyz").mkdir(parents=True)
    done = build(workshop)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert done.stderr.startswith("build_zipapp: cannot write ")
    assert os.listdir(workshop / "dist") == ["hookshot.pyz"]


def test_a_build_without_source_is_refused(workshop):
    """hookshot.py lies beside the builder."""
    (workshop / "hookshot.py").unlink()
    done = build(workshop)
    assert done.returncode == 2
    assert done.stderr.startswith("build_zipapp: cannot read hookshot.py beside build_zipapp.py: ")


# --- Running it ---

@every_python
@pytest.mark.parametrize("status", [0, 1, 78])
def test_the_exit_status_is_that_of_main(status, version, workshop):
    """zipapp's own __main__ would throw it away."""
    assert call(SUPPORTED[version], built(workshop), status).returncode == status


@every_python
@pytest.mark.parametrize("options", [[], ["-I"], ["-S"], ["-OO"]], ids=["plain", "isolated", "no-site", "optimized"])
def test_byte_code_is_used_by_its_python(options, version, workshop):
    """Not the source: that would be compiled at every start."""
    archive = built(workshop, *byte_code_of(*SUPPORTED.values()))
    done = call(SUPPORTED[version], *options, archive, "7")
    assert (done.returncode, done.stdout) == (7, f"{archive}/cpython-3{version[1]}/hookshot.pyc\n")


def test_byte_code_is_used_where_hashes_are_always_checked(workshop):
    """The hash in byte code is the true one."""
    archive = built(workshop, *byte_code_of(sys.executable))
    assert call(sys.executable, "--check-hash-based-pycs", "always", archive).stdout == f"{archive}/{BYTE_CODE}\n"


def test_an_unpacked_archive_runs(workshop, tmp_path):
    """For whoever wants to look inside, or lacks zlib."""
    with zipfile.ZipFile(built(workshop, *byte_code_of(sys.executable))) as opened:
        opened.extractall(tmp_path / "unpacked")
    done = call(sys.executable, tmp_path / "unpacked", "7")
    assert (done.returncode, done.stdout) == (7, f"{tmp_path}/unpacked/{BYTE_CODE}\n")


@pytest.mark.parametrize("change", [
    pytest.param(lambda code: {}, id="no-byte-code"),
    pytest.param(lambda code: {"cpython-399/hookshot.pyc": code}, id="another-version"),
    pytest.param(lambda code: {BYTE_CODE: b"\0\0\r\n" + code[4:]}, id="another-magic-number"),
    pytest.param(lambda code: {BYTE_CODE: b""}, id="empty"),
])
def test_without_fitting_byte_code_the_source_runs(change, workshop):
    """Every supported Python can run every archive."""
    archive = built(workshop, *byte_code_of(sys.executable))
    entries = read_entries(archive)
    write_entries(archive, {**change(entries.pop(BYTE_CODE)), **entries})
    done = call(sys.executable, archive, "7")
    assert (done.returncode, done.stdout) == (7, f"{archive}/hookshot.py\n")


@every_old_python
def test_an_old_python_gets_one_sentence(version, workshop):
    """Exit status 78, nothing on stdout, no traceback."""
    done = call(TOO_OLD[version], built(workshop, *byte_code_of(sys.executable)))
    assert (done.returncode, done.stdout) == (78, "")
    assert done.stderr.startswith(f"hookshot: needs Python 3.11 or newer; this is Python {name_version(version)}.")
    assert done.stderr.endswith(" Run it with a newer python3.\n")


def test_the_sentence_for_old_pythons_can_be_told_without_one():
    """The same on machines that have no old Python."""
    pretend = "import sys; sys.version_info = (3, 8, 18, 'final', 0); "
    done = call(sys.executable, "-c", f"{pretend}exec({build_zipapp.MAIN})")
    assert (done.returncode, done.stderr) == (
        78, "hookshot: needs Python 3.11 or newer; this is Python 3.8.18. Run it with a newer python3.\n")


def test_ctrl_c_while_the_source_is_compiled_leaves_no_trace(workshop):
    (workshop / "hookshot.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n" + STUB)
    done = call(sys.executable, built(workshop))
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


# --- Byte code ---

def test_byte_code_keeps_docstrings_only_where_they_are_read(workshop):
    """A source that names __doc__ keeps them."""
    assert b"Gone from byte code." not in read_entries(built(workshop, *byte_code_of(sys.executable)))[BYTE_CODE]
    (workshop / "hookshot.py").write_text(STUB + "main.__doc__\n")
    assert b"Gone from byte code." in read_entries(built(workshop, *byte_code_of(sys.executable)))[BYTE_CODE]


def test_byte_code_does_not_name_the_folder_of_the_builder(workshop):
    """Its file name is hookshot.py."""
    code = read_entries(built(workshop, *byte_code_of(sys.executable)))[BYTE_CODE]
    assert b"hookshot.py" in code
    assert os.fsencode(workshop.name) not in code


def test_a_file_in_the_current_folder_cannot_pass_for_a_module(workshop, tmp_path):
    """The compiling Python imports nothing from where the builder was called."""
    for name in ("marshal", "importlib", "site", "encodings"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('taken in')")
    built(workshop, *byte_code_of(sys.executable), cwd=tmp_path)


@every_old_python
def test_byte_code_of_an_old_python_is_refused(version, workshop):
    """One sentence, exit status 2, nothing built."""
    done = build(workshop, *byte_code_of(TOO_OLD[version]))
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "Python 3.11 or newer is needed" in done.stderr
    assert not (workshop / "dist").exists()


@pytest.mark.parametrize("pythons, sentence", [
    (["no-such-python"], "no-such-python: cannot be run: "),
    (["false"], "false: cannot compile hookshot.py (Python 3.11 or newer is needed): exit status 1"),
    ([sys.executable] * 2, f"{sys.executable}: {BYTE_CODE} is there already; give one interpreter of each version"),
], ids=["absent", "no-python", "twice"])
def test_an_interpreter_that_will_not_do_is_refused(pythons, sentence, workshop):
    """One sentence that names it, exit status 2, nothing built."""
    done = build(workshop, *byte_code_of(*pythons))
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert done.stderr.startswith(f"build_zipapp: {sentence}")
    assert not (workshop / "dist").exists()


def test_a_source_that_does_not_compile_is_refused(workshop):
    """The compiler's own words are passed on."""
    (workshop / "hookshot.py").write_text("def main(:\n")
    done = build(workshop, *byte_code_of(sys.executable))
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "SyntaxError" in done.stderr


# --- --check ---

@every_python
def test_check_accepts_what_was_built(version, workshop):
    """Whichever Python checks, with byte code of every version, whatever SOURCE_DATE_EPOCH is."""
    archive = built(workshop, *byte_code_of(*SUPPORTED.values()), epoch="1700000000")
    done = build(workshop, "--check", python=SUPPORTED[version])
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{archive}: matches hookshot.py\n", "")


def test_check_writes_nothing(workshop):
    """It may be run where nothing may be written."""
    archive = built(workshop)
    before = archive.stat()
    build(workshop, "--check")
    after = archive.stat()
    assert (after.st_ino, after.st_mtime_ns, after.st_ctime_ns) == (before.st_ino, before.st_mtime_ns, before.st_ctime_ns)
    assert os.listdir(archive.parent) == ["hookshot.pyz"]


def change_entry(name: str, change):
    def tamper(archive: Path) -> None:
        entries = read_entries(archive)
        write_entries(archive, {**entries, name: change(entries.get(name, b""))})
    return tamper


def drop_entry(name: str):
    def tamper(archive: Path) -> None:
        entries = read_entries(archive)
        del entries[name]
        write_entries(archive, entries)
    return tamper


def repeat_entry(archive: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(archive, "a") as opened:
        opened.writestr("hookshot.py", STUB)


def change_bytes(change):
    return lambda archive: archive.write_bytes(change(archive.read_bytes()))


@pytest.mark.parametrize("tamper, sentence", [
    pytest.param(change_entry("hookshot.py", lambda text: text + b"#"), "hookshot.py differs", id="source"),
    pytest.param(change_entry("__main__.py", lambda text: text + b"#"), "__main__.py differs", id="main"),
    pytest.param(change_entry("evil.py", lambda text: b""), "evil.py does not belong there", id="more"),
    pytest.param(change_entry("a/../cpython-311/hookshot.pyc", lambda text: b""),
                 "a/../cpython-311/hookshot.pyc does not belong there", id="odd-name"),
    pytest.param(drop_entry("hookshot.py"), "hookshot.py is missing", id="less"),
    pytest.param(repeat_entry, "hookshot.py is there 2 times", id="twice"),
    pytest.param(change_entry(BYTE_CODE, lambda code: code[:8] + bytes(8) + code[16:]),
                 f"{BYTE_CODE} is not the byte code of this hookshot.py", id="hash"),
    pytest.param(change_entry(BYTE_CODE, lambda code: code[:4] + bytes(4) + code[8:]),
                 f"{BYTE_CODE} is not marked as hash-based and unchecked", id="flags"),
    pytest.param(change_entry(BYTE_CODE, lambda code: b""),
                 f"{BYTE_CODE} is not marked as hash-based and unchecked", id="empty"),
    pytest.param(change_bytes(lambda data: data.replace(b"python3\n", b"python2\n", 1)),
                 "the first line is not #!/usr/bin/env python3", id="shebang"),
    pytest.param(change_bytes(lambda data: data.removeprefix(build_zipapp.SHEBANG)),
                 "the first line is not #!/usr/bin/env python3", id="no-shebang"),
    pytest.param(lambda archive: archive.chmod(0o644), "the run bit is not set", id="mode"),
    pytest.param(change_bytes(lambda data: data[:-30]), "cannot be read: File is not a zip file", id="cut-off"),
    pytest.param(change_bytes(lambda data: data[:200] + b"\xff\xff" + data[202:]), "cannot be read: ", id="damaged"),
    pytest.param(change_bytes(lambda data: b""), "cannot be read: File is not a zip file", id="emptied"),
    pytest.param(Path.unlink, "there is no such file; build it first", id="gone"),
])
def test_check_says_what_differs(tamper, sentence, workshop):
    """One sentence for the one difference, exit status 1."""
    archive = built(workshop, *byte_code_of(sys.executable))
    tamper(archive)
    done = build(workshop, "--check")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)
    assert done.stderr.startswith(f"{archive}: {sentence}")


def test_check_says_everything_that_differs(workshop):
    """A changed source outdates the source in the archive and every byte code."""
    archive = built(workshop, *byte_code_of(*SUPPORTED.values()))
    archive.chmod(0o644)
    (workshop / "hookshot.py").write_text(STUB + "# changed\n")
    done = build(workshop, "--check")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        *(f"{archive}: cpython-3{minor}/hookshot.pyc is not the byte code of this hookshot.py"
          for _, minor in SUPPORTED),
        f"{archive}: hookshot.py differs",
        f"{archive}: the run bit is not set",
    ]


def test_check_with_the_interpreter_proves_every_byte_of_byte_code(workshop):
    """The hash in byte code is only what it says of itself; compiling again is the proof."""
    options = byte_code_of(sys.executable)
    archive = built(workshop, *options)
    assert build(workshop, "--check", *options).returncode == 0
    change_entry(BYTE_CODE, lambda code: code[:-1] + bytes([code[-1] ^ 1]))(archive)
    assert build(workshop, "--check").returncode == 0
    done = build(workshop, "--check", *options)
    assert (done.returncode, done.stderr) == (1, f"{archive}: {BYTE_CODE} differs\n")


# --- The documentation ---


@pytest.fixture
def documented(workshop):
    """A workshop with two pages, and with files beside them that are none."""
    (workshop / "README.md").write_text("# Hookshot\n")
    (workshop / "docs").mkdir()
    for name in ("api.md", "demo.svg", "api.md.orig"):
        (workshop / "docs" / name).write_text(f"{name} \u2192\n", encoding="utf-8")
    return workshop


def test_the_pages_beside_the_source_are_in_the_archive(documented):
    """README.md and docs/*.md, byte for byte; nothing else of docs/."""
    assert read_entries(built(documented)) == {
        "README.md": b"# Hookshot\n", "__main__.py": build_zipapp.MAIN, "docs/api.md": "api.md \u2192\n".encode(), "hookshot.py": STUB.encode()}
    assert build(documented, "--check").stdout.endswith("hookshot.pyz: matches hookshot.py and its documentation\n")


def test_an_archive_with_pages_is_the_same_bytes_elsewhere(documented, tmp_path):
    """Folder, umask and the age and mode of pages do not show."""
    first = built(documented).read_bytes()
    other = tmp_path / "elsewhere"
    shutil.copytree(documented, other, ignore=shutil.ignore_patterns("dist"))
    (other / "docs" / "api.md").chmod(0o600)
    os.utime(other / "README.md", (1, 1))
    assert built(other, umask=0o077, cwd="/").read_bytes() == first


@pytest.mark.parametrize("change, sentence", [
    (lambda folder: (folder / "docs" / "api.md").write_text("changed\n"), "docs/api.md differs"),
    (lambda folder: (folder / "docs" / "new.md").write_text("new\n"), "docs/new.md is missing"),
    (lambda folder: (folder / "README.md").unlink(), "README.md does not belong there"),
], ids=["changed", "new", "gone"])
def test_check_covers_the_pages(change, sentence, documented):
    """An archive with old pages is an old archive."""
    archive = built(documented)
    change(documented)
    done = build(documented, "--check")
    assert (done.returncode, done.stderr) == (1, f"{archive}: {sentence}\n")


# --- The real hookshot.py ---

def test_the_real_archive_is_small(tmp_path):
    """So that it can be copied over any line: the program, and the documentation besides."""
    done = call(sys.executable, build_zipapp.__file__, "--output", tmp_path / "hookshot.pyz")
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(tmp_path / "hookshot.pyz") as opened:
        pages = sum(info.compress_size for info in opened.infolist() if info.filename.endswith(".md"))
    assert (tmp_path / "hookshot.pyz").stat().st_size - pages < 256 * 1024
    assert 0 < pages < 160 * 1024
