#!/usr/bin/env python3
# SPDX-License-Identifier: MPL-2.0
"""Build dist/hookshot.pyz, the one file to copy to a host.

    python3 build_zipapp.py                                           source only
    python3 build_zipapp.py --python python3.11 --python python3.12   with byte code: starts faster there
    python3 build_zipapp.py --check                                   is the archive that of this source?

The same source gives the same bytes: the folder, the umask, the clock and the version of Python that builds do
not matter. Entries are dated 1980-01-01, or SOURCE_DATE_EPOCH (seconds, UTC). Only two things outside the source
can still show: another zlib library may deflate differently, and byte code is that of the very interpreter given.
--check is not misled by the first, because it compares contents. It trusts the source hash inside byte code;
give it the same --python options, and it compiles again and compares every byte.

What the archive holds:

    #!/usr/bin/env python3
    __main__.py                 refuses an old Python in one sentence, else runs hookshot.main()
    hookshot.py                 the source, for every Python without byte code of its own
    cpython-311/hookshot.pyc    byte code, one for each --python
    README.md, docs/*.md        the documentation that lies beside, for `hookshot docs`

The entries are compressed, so a Python without zlib cannot import them; hookshot.py itself runs there.

Exit status: 0 done; 1 the archive differs or cannot be written; 2 usage, an interpreter or the source is at fault.
"""

import _imp
import argparse
import hashlib
import io
import os
import re
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent
SOURCE = ROOT / "hookshot.py"
ARCHIVE = ROOT / "dist" / "hookshot.pyz"

SHEBANG = b"#!/usr/bin/env python3\n"
UNIX = 3                        # "created on": otherwise zipfile names the system that it runs on.
ZIP_VERSION = 20                # What deflate needs; otherwise it is up to zipfile.
ENTRY_MODE = 0o100644 << 16     # A plain file; unzip would give it this mode.
ARCHIVE_MODE = 0o755

# The years that a zip can name: 1980-01-01 00:00:00 to 2107-12-31 23:59:58.
EARLIEST, LATEST = 315_532_800, 4_354_819_198

# PEP 552: hash-based and not checked. A date would change with every checkout, and in an archive
# there is nobody to check it.
UNCHECKED_HASH = 1
BYTE_CODE_NAME = re.compile(r"[a-z]+-\d+/hookshot\.pyc", re.ASCII)

# Any Python 3, and 2.7, must parse this far down; hookshot.py is imported only after the check.
MAIN = b'''\
# SPDX-License-Identifier: MPL-2.0
import sys

if sys.version_info < (3, 11):
    sys.stderr.write("hookshot: needs Python 3.11 or newer; this is Python %d.%d.%d. "
                     "Run it with a newer python3.\\n" % sys.version_info[:3])
    sys.exit(78)

import importlib.util
import os

# zipimport ignores __pycache__, and where byte code is of another Python it gives up instead of reading the source.
cached = os.path.join(os.path.dirname(__file__), str(sys.implementation.cache_tag))
try:
    magic = __loader__.get_data(os.path.join(cached, "hookshot.pyc"))[:4]
except OSError:
    magic = None
if magic == importlib.util.MAGIC_NUMBER:
    sys.path.insert(0, cached)

try:
    import hookshot
except KeyboardInterrupt:   # without byte code this takes a while
    sys.exit(130)

sys.exit(hookshot.main())
'''

# Runs in the interpreter that the byte code is for. The current folder goes off its path first, lest a file there
# passes for a module. The name "hookshot.py" keeps the builder's folder out of the byte code, and of tracebacks.
COMPILE = r'''
import sys
del sys.path[0]
if sys.version_info < (3, 11):
    sys.exit("it is Python %d.%d.%d" % sys.version_info[:3])
import importlib.util, marshal
source = sys.stdin.buffer.read()
code = compile(source, "hookshot.py", "exec", dont_inherit=True, optimize=int(sys.argv[1]))
header = importlib.util.MAGIC_NUMBER + int(sys.argv[2]).to_bytes(4, "little") + importlib.util.source_hash(source)
sys.stdout.buffer.write(sys.implementation.cache_tag.encode() + b"\n" + header + marshal.dumps(code))
'''
COMPILE_TIMEOUT_S = 60


class BuildError(Exception):
    """Says in one sentence what the caller has to mend."""


# --- Building ---

def compile_with(python: str, source: bytes) -> tuple[str, bytes]:
    """Return (entry name, byte code) as the interpreter `python` compiles the source."""
    optimize = 1 if b"__doc__" in source else 2     # Docstrings cost a tenth of the size; keep them if they are read.
    # Environment, locale, user and site packages stay out: a name that they have interned is marshalled differently.
    # Column numbers are a third of the size, and serve only the carets under a line of source, which byte code lacks.
    command = [python, "-E", "-s", "-S", "-X", "utf8", "-X", "no_debug_ranges", "-c", COMPILE,
               str(optimize), str(UNCHECKED_HASH)]
    try:
        done = subprocess.run(command, input=source, capture_output=True, timeout=COMPILE_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{python}: cannot be run: {error}") from error
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit status {done.returncode}"]
        raise BuildError(f"{python}: cannot compile hookshot.py (Python 3.11 or newer is needed): {said[-1]}")
    tag, _, byte_code = done.stdout.partition(b"\n")
    return f"{tag.decode()}/hookshot.pyc", byte_code


def read_pages() -> dict[str, bytes]:
    """Return the documentation beside this file, as much of it as there is, by entry name."""
    files = [*ROOT.glob("README.md"), *ROOT.glob("docs/*.md")]
    return {file.relative_to(ROOT).as_posix(): file.read_bytes() for file in files}


def collect_entries(source: bytes, pages: dict[str, bytes], pythons: list[str]) -> dict[str, bytes]:
    """Return everything that belongs into the archive, by entry name."""
    entries = {"__main__.py": MAIN, "hookshot.py": source, **pages}
    for python in pythons:
        name, byte_code = compile_with(python, source)
        if name in entries:
            raise BuildError(f"{python}: {name} is there already; give one interpreter of each version")
        entries[name] = byte_code
    return entries


def parse_epoch(text: str) -> tuple[int, ...]:
    """Return SOURCE_DATE_EPOCH as a zip date (UTC), moved into the years that a zip can name."""
    try:
        seconds = int(text)
    except ValueError:
        raise BuildError(f"SOURCE_DATE_EPOCH is {text!r}; it must be a whole number of seconds") from None
    return time.gmtime(min(max(seconds, EARLIEST), LATEST))[:6]


def render_archive(entries: dict[str, bytes], date: tuple[int, ...]) -> bytes:
    """Return the bytes of the archive; they depend on the arguments and on the zlib library, on nothing else."""
    buffer = io.BytesIO()
    buffer.write(SHEBANG)
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in sorted(entries):
            info = zipfile.ZipInfo(name, date)
            info.create_system = UNIX
            info.create_version = info.extract_version = ZIP_VERSION
            info.external_attr = ENTRY_MODE
            archive.writestr(info, entries[name], compress_type=zipfile.ZIP_DEFLATED, compresslevel=9)
    return buffer.getvalue()


def write_archive(path: Path, data: bytes) -> None:
    """Put the archive in place in one step: whoever runs it meets the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, ARCHIVE_MODE)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


# --- Checking ---

def check_byte_code(byte_code: bytes, source: bytes) -> str | None:
    """Say what is wrong with byte code of whichever Python, or return None."""
    magic, flags, digest = byte_code[:4], byte_code[4:8], byte_code[8:16]
    if flags != UNCHECKED_HASH.to_bytes(4, "little"):
        return "is not marked as hash-based and unchecked"
    # The hash is keyed with the magic number; importlib.util.source_hash knows only that of the running Python.
    if digest != _imp.source_hash(int.from_bytes(magic, "little"), source):
        return "is not the byte code of this hookshot.py"
    return None


def check_entries(found: dict[str, bytes], wanted: dict[str, bytes]) -> list[str]:
    """Return one sentence for each entry that is missing, different or unknown."""
    problems = [f"{name} is missing" for name in sorted(wanted.keys() - found.keys())]
    for name, data in sorted(found.items()):
        if name in wanted:
            problem = None if data == wanted[name] else "differs"
        elif BYTE_CODE_NAME.fullmatch(name):
            problem = check_byte_code(data, wanted["hookshot.py"])
        else:
            problem = "does not belong there"
        if problem:
            problems.append(f"{name} {problem}")
    return problems


def check_archive(path: Path, wanted: dict[str, bytes]) -> list[str]:
    """Return one sentence for each way in which the archive is not what would be built now."""
    try:
        data = path.read_bytes()
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            infos = archive.infolist()
            found = {info.filename: archive.read(info) for info in infos}
    except FileNotFoundError:
        return ["there is no such file; build it first"]
    # What zipfile raises for damage: its own error, zlib's, unknown compression, encryption.
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
        return [f"cannot be read: {error}"]
    problems = check_entries(found, wanted)
    problems += [f"{name} is there {count} times"
                 for name, count in Counter(info.filename for info in infos).items() if count > 1]
    if not data.startswith(SHEBANG + b"PK\3\4"):
        problems.append(f"the first line is not {SHEBANG.decode().strip()}")
    if not path.stat().st_mode & 0o100:
        problems.append("the run bit is not set")
    return problems


# --- Command line ---

def main(argv: list[str] | None = None) -> int:
    """Build or check; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ARCHIVE, metavar="FILE", help="default: dist/hookshot.pyz")
    parser.add_argument("--python", action="append", default=[], metavar="EXE",
                        help="add byte code of this interpreter; may be repeated")
    parser.add_argument("--check", action="store_true", help="build nothing; compare the archive with the source")
    args = parser.parse_args(argv)
    try:
        return run(args.output, args.python, check=args.check)
    except BuildError as error:
        print(f"build_zipapp: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"build_zipapp: cannot write {args.output}: {error}", file=sys.stderr)
        return 1


def run(output: Path, pythons: list[str], *, check: bool) -> int:
    """Carry out what the options ask for; return the exit status."""
    try:
        source, pages = SOURCE.read_bytes(), read_pages()
    except OSError as error:
        raise BuildError(f"cannot read {Path(str(error.filename)).name} beside build_zipapp.py: {error}") from error
    date = parse_epoch(os.environ.get("SOURCE_DATE_EPOCH", str(EARLIEST)))
    entries = collect_entries(source, pages, pythons)
    if check:
        problems = check_archive(output, entries)
        for problem in problems:
            print(f"{output}: {problem}", file=sys.stderr)
        if not problems:
            print(f"{output}: matches hookshot.py" + " and its documentation" * bool(pages))
        return 1 if problems else 0
    data = render_archive(entries, date)
    write_archive(output, data)
    print(f"{output}: {len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
