# SPDX-License-Identifier: MPL-2.0
"""The layout of hookshot.py and of the repository: order, names, and who may touch the outside world."""

import ast
import collections
import http
import re
import subprocess
import symtable
import sys
from collections.abc import Iterator
from typing import NamedTuple

import pytest

import hookshot
from support import PROGRAM, ROOT

BANNER = re.compile(r"# === (\d+|A)\. ([A-Z]+) (=+)")
SOURCE = PROGRAM.read_text(encoding="utf-8")
TREE = ast.parse(SOURCE)


class Section(NamedTuple):
    number: str
    name: str
    head: tuple[str, ...]   # The comment lines under the banner.
    tree: ast.Module
    scope: symtable.SymbolTable
    defined: frozenset[str]
    used: frozenset[str]    # The module-level names that its code mentions, in annotations written as text too.


def walk_tables(table: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
    yield table
    for child in table.get_children():
        yield from walk_tables(child)


def names_defined(tree: ast.Module) -> frozenset[str]:
    """Return what a section's statements bind. From the tree: to symtable, variables of comprehensions are bound too."""
    found = set()
    for statement in tree.body:
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            found.add(statement.name)
        targets = getattr(statement, "targets", None) or [getattr(statement, "target", None)]
        found |= {name.id for target in targets if target for name in ast.walk(target) if isinstance(name, ast.Name)}
    return frozenset(found)


def names_used(scope: symtable.SymbolTable, tree: ast.Module) -> frozenset[str]:
    names = {symbol.get_name() for table in walk_tables(scope) for symbol in table.get_symbols()
             if table is not scope and symbol.is_global() and symbol.is_referenced()}
    # What runs at the import: from the tree, because Python 3.12 counts the variables of comprehensions there among the module's names.
    names |= {name for statement in tree.body for name in names_loaded(statement)}
    return frozenset(names.union(name.id for text in text_annotations(tree) for name in ast.walk(text) if isinstance(name, ast.Name)))


def names_loaded(node: ast.AST) -> set[str]:
    """Return the names that a piece of code takes from outside itself; functions and classes are left to their own symbol tables."""
    if isinstance(node, ast.Name):
        return {node.id} if isinstance(node.ctx, ast.Load) else set()
    inner = [node.args, *node.decorator_list] if isinstance(node, ast.FunctionDef) else ast.iter_child_nodes(node)
    found = set().union(*(names_loaded(child) for child in inner))
    bound = {name.id for part in getattr(node, "generators", ()) for name in ast.walk(part.target) if isinstance(name, ast.Name)}
    return found - bound


def text_annotations(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        annotation = getattr(node, "annotation", None) or getattr(node, "returns", None)
        for part in ast.walk(annotation) if isinstance(annotation, ast.AST) else ():
            if isinstance(part, ast.Constant) and isinstance(part.value, str):
                yield ast.parse(part.value, mode="eval")


def read_sections() -> list[Section]:
    """Return the sections in order. What precedes the first banner (docstring and imports) is "HEAD"."""
    bodies: list[tuple[str, str, list[str]]] = [("", "HEAD", [])]
    for line in SOURCE.splitlines():
        if match := BANNER.fullmatch(line):
            bodies.append((match[1], match[2], []))
        else:
            bodies[-1][2].append(line)
    sections = []
    for number, name, lines in bodies:
        text, head = "\n".join(lines), []
        while number and lines[len(head)].startswith("#"):
            head.append(lines[len(head)])
        tree, scope = ast.parse(text), symtable.symtable(text, name, "exec")
        sections.append(Section(number, name, tuple(head), tree, scope, names_defined(tree), names_used(scope, tree)))
    return sections


HEAD, *SECTIONS = read_sections()
PLACE = {section.name: index for index, section in enumerate(SECTIONS)}
OWNER = {name: section.name for section in SECTIONS for name in section.defined}
each_section = pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.name)


def functions_of(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Yield every function and class below `tree` with its dotted name."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield prefix + node.name, node
        yield from functions_of(node, f"{prefix}{node.name}." if isinstance(node, ast.FunctionDef | ast.ClassDef) else prefix)


def enclosing(wanted: type[ast.AST]) -> Iterator[tuple[str, ast.AST]]:
    """Yield every node of a kind with the dotted name of the innermost function that it stands in."""
    inner = {id(node): name for name, function in functions_of(TREE) for node in ast.walk(function)}
    yield from ((inner.get(id(node), ""), node) for node in ast.walk(TREE) if isinstance(node, wanted))


# --- order


def test_banners_end_at_one_column_and_are_in_order():
    banners = [line for line in SOURCE.splitlines() if line.startswith("# ===")]
    assert all(BANNER.fullmatch(line) for line in banners), banners
    assert {len(line) for line in banners} == {120}
    numbers = [section.number for section in SECTIONS]
    assert numbers[-1] == "A" and numbers[:-1] == sorted(set(numbers[:-1]), key=int)


def test_the_contents_in_the_docstring_are_the_banners():
    contents = (hookshot.__doc__ or "").partition("Down the page")[2]
    assert re.findall(r"(\d+|A) ([A-Z]+)(?:\s|$)", contents) == [(section.number, section.name) for section in SECTIONS]


@each_section
def test_a_section_begins_with_its_job_and_rules(section):
    assert (1 if section.name == "ASSETS" else 2) <= len(section.head) <= 15


@each_section
def test_a_section_uses_only_what_stands_above_it(section):
    below = {f"{name} of {OWNER[name]}" for name in section.used & OWNER.keys() if PLACE[section.name] < PLACE[OWNER[name]] < PLACE["ASSETS"]}
    assert not below


@each_section
def test_a_name_with_an_underscore_is_used_in_its_own_section_only(section):
    foreign = {f"{name} of {OWNER[name]}" for name in section.used & OWNER.keys()
               if name.startswith("_") and not name.startswith("__") and OWNER[name] != section.name}
    assert not foreign


def test_private_attributes_are_reached_through_self_alone():
    of_named_tuples = {"_replace", "_asdict", "_fields", "_field_defaults", "_make"}
    reached = {ast.unparse(node) for node in ast.walk(TREE) if isinstance(node, ast.Attribute) and re.match("_[^_]", node.attr)
               and node.attr not in of_named_tuples and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))}
    assert not reached


def test_a_name_is_defined_in_one_section():
    owners = collections.Counter(name for section in SECTIONS for name in section.defined)
    assert {name for name, number in owners.items() if number > 1} == set()


def test_a_class_defines_a_method_once():
    """The second would take the place of the first, silently."""
    twice = {f"{node.name}.{name}" for node in ast.walk(TREE) if isinstance(node, ast.ClassDef) for name, number in
             collections.Counter(part.name for part in node.body if isinstance(part, ast.FunctionDef)).items() if number > 1}
    assert not twice


def test_assets_are_texts_and_the_main_guard():
    *texts, guard = SECTIONS[-1].tree.body
    assert ast.unparse(guard).startswith("if __name__ == '__main__':")
    assert {ast.unparse(node)[:60] for node in texts if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
                                                             and isinstance(node.value.value, str))} == set()


# --- the outside world

# Sections that know no file, socket, process, thread, clock or randomness: what they need is an argument.
PURE_SECTIONS = {"ERRORS", "VALUES", "TEMPLATES", "CONFIG", "WIRE", "LIFECYCLE", "PLAN", "EVENTS"}

# What computes and touches nothing; free for every section.
PURE = {
    "base64", "bisect", "collections", "contextlib", "difflib", "email.message", "email.utils", "enum", "functools", "hashlib", "hmac.HMAC", "hmac.digest", "hmac.new", "ipaddress", "itertools",
    "json", "os.strerror", "os.path.basename", "os.path.dirname", "os.path.join", "queue.Empty", "re", "shlex", "signal.Signals", "stat",
    "sys.version_info", "textwrap", "time.gmtime", "time.strftime", "tomllib", "traceback", "typing", "urllib.parse", "zlib"}

# Who may touch the outside world. A name covers what lies under it, unless a longer one is here too.
CONFINED = {
    "argparse": "CLI",
    "ctypes": "WORLD",
    "errno": "LOG NOTIFY SERVER BACKUP DAEMON DOCTOR CLI",
    "fcntl": "WORLD",
    "gc": "DAEMON",
    "gzip": "BACKUP",
    "grp": "WORLD",
    "hmac.compare_digest": "WIRE API",
    "http.HTTPStatus": "SERVER",
    "http.client": "RUN NOTIFY CLIENT",
    "http.server": "SERVER",
    "importlib": "DOCTOR",
    "open": "WORLD SECRETS API SERVER BACKUP CLI",
    # Reading what the file system says, and the descriptors of its own.
    "os": "WORLD LOG STORE SECRETS RUN API SERVER BACKUP DAEMON DOCTOR CLI",
    "os.chmod": "WORLD SERVER",
    "os.environ": "WORLD LOG SECRETS CLIENT CLI",
    "os.getpgrp": "ENGINE",
    "os.kill": "WORLD",
    "os.killpg": "WORLD",
    "os.makedirs": "WORLD CLI",
    "os.open": "WORLD LOG SECRETS RUN BACKUP CLI",
    "os.setpriority": "RUN",
    "os.umask": "DAEMON",
    "os.unlink": "LOG STORE SERVER BACKUP DAEMON",
    "print": "CLIENT CLI",
    "pwd": "WORLD",
    "queue": "STORE CLIENT",
    "secrets": "WORLD",
    "resource": "WORLD DAEMON",
    "select": "LOG RUN SERVER DAEMON",
    "selectors": "SERVER",
    "shutil": "BACKUP DAEMON CLIENT DOCTOR CLI",
    "signal": "WORLD RUN DAEMON CLI",
    "signal.signal": "DAEMON CLI",
    "signal.set_wakeup_fd": "DAEMON",
    "smtplib": "NOTIFY",
    "socket": "RUN NOTIFY SERVER DAEMON CLIENT",
    "sqlite3": "STORE",
    "sqlite3.sqlite_version": "STORE API CLI",
    "ssl": "NOTIFY SERVER CLIENT",
    "subprocess": "SECRETS RUN NOTIFY DOCTOR CLI",
    "sys": "SERVER CLIENT CLI ASSETS",
    "tarfile": "BACKUP",
    "tempfile": "BACKUP CLI",
    "threading": "METRICS LOG STORE NOTIFY ENGINE API DAEMON CLIENT",
    "threading.Thread": "RUN ENGINE DAEMON CLIENT DOCTOR",
    "time.CLOCK_BOOTTIME": "WORLD",
    "time.clock_gettime": "WORLD",
    "time.clock_gettime_ns": "WORLD",
    "time.monotonic": "WORLD RUN NOTIFY ENGINE API SERVER DAEMON CLIENT DOCTOR CLI",
    "time.sleep": "WORLD SERVER CLIENT",
    "time.time_ns": "WORLD"}

NEVER = {"eval", "exec", "compile", "__import__", "globals", "breakpoint", "input", "os.system", "os.popen", "os.fork"}


def imports() -> Iterator[tuple[str, str]]:
    """Yield (name in the module, what it stands for) of every import."""
    for node in ast.walk(TREE):
        if isinstance(node, ast.Import):
            yield from ((alias.asname or alias.name.partition(".")[0], alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names)


MODULES = {name for name, _ in imports()}


def outside_names(section: Section) -> set[str]:
    """Return the dotted names of modules (time.time_ns, os.path.join) and the free builtins that a section mentions."""
    inner = {id(node.value) for node in ast.walk(section.tree) if isinstance(node, ast.Attribute)}
    chains = {ast.unparse(node) for node in ast.walk(section.tree) if isinstance(node, ast.Attribute) and id(node) not in inner}
    alone = {node.id for node in ast.walk(section.tree) if isinstance(node, ast.Name) and id(node) not in inner
             and isinstance(node.ctx, ast.Load) and node.id in (*CONFINED, *NEVER)}
    return alone | {chain for chain in chains if re.fullmatch(r"[\w.]+", chain) and chain.partition(".")[0] in MODULES}


def row_of(name: str, rows: set[str]) -> str | None:
    """Return the longest row that covers a dotted name."""
    return max((row for row in rows if name == row or name.startswith(row + ".")), key=len, default=None)


@each_section
def test_only_the_sections_in_the_table_touch_the_outside_world(section):
    wrong = set()
    for name in outside_names(section):
        row = row_of(name, PURE | CONFINED.keys() | NEVER)
        if row not in PURE and (row is None or row in NEVER or section.name not in CONFINED[row].split()):
            wrong.add(name)
    assert not wrong


def test_the_table_allows_nothing_that_is_not_used():
    used = {(row_of(name, PURE | CONFINED.keys()), section.name) for section in SECTIONS for name in outside_names(section)}
    assert {(row, name) for row, names in CONFINED.items() for name in names.split()} - used == set()


def test_pure_sections_are_in_no_row_of_the_table():
    allowed = {name for row, names in CONFINED.items() for name in names.split() if row != "hmac.compare_digest"}
    assert PURE_SECTIONS & allowed == set()
    assert PURE_SECTIONS <= PLACE.keys()


def test_no_local_name_hides_a_module():
    hidden = {f"{table.get_name()}: {symbol.get_name()}" for section in SECTIONS for table in walk_tables(section.scope)
              for symbol in table.get_symbols() if table.get_type() == "function" and symbol.is_local() and not symbol.is_imported()
              and symbol.get_name() in MODULES}
    assert not hidden


def test_sql_is_written_in_store_alone():
    statement = re.compile(r"\s*(SELECT|INSERT|UPDATE|DELETE|PRAGMA|BEGIN|CREATE|ALTER|DROP|COMMIT|ROLLBACK|SAVEPOINT|RELEASE)\b")
    found = {section.name for section in SECTIONS for node in ast.walk(section.tree)
             if (isinstance(node, ast.Constant) and isinstance(node.value, str) and statement.match(node.value))
             or (isinstance(node, ast.Attribute) and node.attr in ("execute", "executemany", "executescript"))}
    assert found == {"STORE"}


def test_nothing_from_outside_is_formatted_into_sql():
    ours = {"_ACTIVE_SQL", "_AUDIT_COLUMNS", "_COLUMNS", "_MOVE_COLUMNS", "_STATES_SQL", "_TERMINAL_SQL", "clause", "column", "name", "number", "script", "synchronous", "_WAL_KEPT_BYTES"}
    store = next(section.tree for section in SECTIONS if section.name == "STORE")
    inserted = {ast.unparse(value.value) for call in ast.walk(store) if isinstance(call, ast.Call)
                and isinstance(call.func, ast.Attribute) and call.func.attr.startswith("execute")
                for text in ast.walk(call.args[0]) if isinstance(text, ast.JoinedStr)
                for value in text.values if isinstance(value, ast.FormattedValue)}
    assert inserted <= ours


# --- types that carry proof


@pytest.mark.parametrize(("kind", "maker"), [("VerifiedBody", "verify"), ("DeployRequest", "parse_deploy"), ("ControlRequest", "parse_control")])
def test_a_proof_is_made_in_one_place(kind, maker):
    assert {place for place, call in enclosing(ast.Call) if isinstance(call.func, ast.Name) and call.func.id == kind} == {maker}
    assert f"{kind}._make" not in SOURCE


def test_a_state_is_named_at_its_beginning_and_otherwise_comes_from_advance():
    """But for one compare-and-set, which names the state that it expects to find."""
    named = {(place, ast.unparse(keyword.value)) for place, call in enclosing(ast.Call) for keyword in call.keywords
             if keyword.arg == "state" and ast.unparse(keyword.value).startswith("State.")}
    assert named <= {("new_deployment", "State.QUEUED"), ("Store.note_progress.work", "State.VALIDATING")}
    assert ("new_deployment", "State.QUEUED") in named


def test_secrets_are_compared_in_constant_time():
    secret = re.compile(r"signature|token|secret|hmac|passw", re.IGNORECASE)
    compared = {ast.unparse(node) for node in ast.walk(TREE) if isinstance(node, ast.Compare)
                and any(isinstance(operator, ast.Eq | ast.NotEq) for operator in node.ops)
                and any(isinstance(side, ast.Name | ast.Attribute) and secret.search(ast.unparse(side).rpartition(".")[2])
                        for side in (node.left, *node.comparators))}
    assert not compared
    assert {place for place, node in enclosing(ast.Attribute) if node.attr == "compare_digest"} == {"_signers_hub", "_signers_webhook", "_check_read_access"}


# --- style

# Where work goes on after a bug that no one foresaw; each of them tells it.
BOUNDARIES = {"Store._carry_out_one", "_Job.carry_out", "Engine._work", "begin", "dispatch", "_Connection._answer_one", "_Connection._go_on",
              "EventFeed.run", "HttpServer.serve", "Journal.run", "Notifier.run", "Notifier._attempt", "Daemon.reload", "Daemon._keep_house", "Daemon._keep_reporting", "_within.run", "main"}
# Where something must be undone whatever happens; each of them raises again.
CLEAN_UPS = {"Store._migrate", "Store._carry_out", "_spawn_nicely.start", "run_command"}


def test_exceptions_are_caught_by_name_but_for_a_handful_of_boundaries():
    caught = collections.defaultdict(set)
    for place, handler in enclosing(ast.ExceptHandler):
        caught[ast.unparse(handler.type) if handler.type else "bare"].add(place)
    assert caught["bare"] == set()
    assert caught["Exception"] == BOUNDARIES
    assert caught["BaseException"] == CLEAN_UPS


def public_definitions(tree: ast.AST = TREE, prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Yield public functions, classes and methods; properties say in their name what they are."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            if not any(ast.unparse(mark) == "property" for mark in node.decorator_list):
                yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(node, f"{node.name}.")


def test_every_public_definition_has_a_docstring():
    assert [name for name, node in public_definitions() if not ast.get_docstring(node)] == []


def test_every_function_is_annotated():
    bare = []
    for name, node in functions_of(TREE):
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
            missing = [argument.arg for argument in arguments if argument and not argument.annotation and argument.arg not in ("self", "cls")]
            bare += [f"{name}: {', '.join(missing)}"] if missing else []
            bare += [f"{name}: return"] if not node.returns and not name.endswith("__init__") else []
    assert bare == []


def test_every_thread_has_a_name():
    threads = [call for call in ast.walk(TREE) if isinstance(call, ast.Call) and ast.unparse(call.func) == "threading.Thread"]
    assert threads and all(any(keyword.arg == "name" for keyword in call.keywords) for call in threads)


def test_imports_are_of_the_standard_library_and_used():
    assert {name.partition(".")[0] for _, name in imports()} <= sys.stdlib_module_names
    # By module, so that each use of the outside world shows where it comes from; and no "annotations" of the future.
    assert {node.module for node in ast.walk(TREE) if isinstance(node, ast.ImportFrom)} <= {"collections.abc", "enum", "typing"}
    mentioned = {node.id for node in ast.walk(TREE) if isinstance(node, ast.Name)}
    assert {name for name, _ in imports()} - mentioned == set()


def test_every_definition_is_used():
    """Neither dead code nor a dead constant; what only the archive, the docs or a test use is named here."""
    entry_points = {"main", "LOG_EVENTS"}
    mentioned = collections.Counter(node.id for node in ast.walk(TREE) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load))
    mentioned += collections.Counter(name.id for tree in text_annotations(TREE) for name in ast.walk(tree) if isinstance(name, ast.Name))
    assert {name for name in OWNER if not mentioned[name]} - entry_points == set()


# --- the tables


def keys_of(table: type) -> Iterator[tuple[str, hookshot.Key]]:
    for name, field in table._field_defaults.items():
        if hookshot.is_table(field):
            yield from keys_of(field)
        else:
            yield f"{table.__name__}.{name}", field


KEYS = [pair for table in (hookshot.Config, hookshot.Channel, hookshot.Service, hookshot.Defaults, hookshot.CommandSpec, hookshot.HttpProbe)
        for pair in keys_of(table)]


@pytest.mark.parametrize("key", [pytest.param(key, id=name) for name, key in KEYS])
def test_a_key_is_documented_and_its_default_passes_its_own_check(key):
    problems: list[hookshot.Problem] = []
    assert key.doc and key.check.kind
    if key.default is not hookshot.REQUIRED and key.default is not None:
        key.check.parse(key.default, hookshot.Place("file", "key", problems))
    assert problems == []


def test_codes_are_unique_and_statuses_are_real():
    kinds = hookshot.ERRORS.values()
    assert len({kind.code for kind in kinds}) == len(kinds)
    assert {kind.http for kind in kinds} <= {int(status) for status in http.HTTPStatus}
    assert {kind.exit for kind in kinds} <= {2, 65, 69, 70, 73, 75, 77, 78}
    # Callers may try again after these, so they are told when; "in_use" is said on the command line.
    assert all(kind.retry_after_s for name, kind in hookshot.ERRORS.items() if kind.http in (429, 503) and name != "in_use")


def test_every_kind_of_error_is_raised_somewhere_and_no_other():
    texts = collections.Counter(node.value for node in ast.walk(TREE) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    assert [name for name in hookshot.ERRORS if texts[name] < 2] == []
    raised = {call.args[0].value for call in ast.walk(TREE) if isinstance(call, ast.Call) and ast.unparse(call.func) == "HookshotError"
              and isinstance(call.args[0], ast.Constant)}
    assert raised <= hookshot.ERRORS.keys()


def test_every_state_can_be_reached_and_has_an_end():
    moves = {state: set(row.values()) for state, row in hookshot.TRANSITIONS.items()}

    def reach(state: hookshot.State, seen: frozenset[hookshot.State] = frozenset()) -> frozenset[hookshot.State]:
        seen |= {state}
        return seen.union(*(reach(after, seen) for after in moves.get(state, set()) - seen))

    assert reach(hookshot.State.QUEUED) == set(hookshot.State)
    assert all(reach(state) & hookshot.TERMINAL for state in hookshot.State)
    assert {outcome for row in hookshot.TRANSITIONS.values() for outcome in row} == set(hookshot.Outcome)
    assert hookshot.EXIT_OF_STATE.keys() == hookshot.TERMINAL


def test_routes_are_unique_known_to_a_gate_and_documented():
    rows = [(route.method, route.pattern) for route in hookshot.ROUTES]
    assert len(set(rows)) == len(rows)
    assert {route.gate for route in hookshot.ROUTES} <= {"open", "read", "signature"}
    assert all(route.gate == "signature" for route in hookshot.ROUTES if route.method not in ("GET", "HEAD"))
    assert all(route.doc.endswith(".") and route.handler.__doc__ == f"{route.method} {route.pattern}" for route in hookshot.ROUTES)


def test_every_option_of_the_command_line_has_its_line_of_help():
    silent = [(command, names) for command, row in hookshot.COMMANDS.items() for names, options in row.arguments
              if names[0].startswith("-") and not options.get("help")]
    assert silent == []
    assert all(row.help for row in hookshot.COMMANDS.values())


def test_every_line_of_the_log_has_a_name_of_the_table_and_every_name_a_line():
    """A name is the first argument of Noted and Trouble, the second of Log.write; notices say it as notice_<outcome>."""
    named = set()
    for _, call in enclosing(ast.Call):
        function, arguments = ast.unparse(call.func), [node.value for node in call.args if isinstance(node, ast.Constant)]
        if function in ("Noted", "Trouble"):
            named.add(arguments[0])
        elif function.endswith(("log.write", "style.render")) and len(arguments) >= 2:
            named.add(arguments[1])
    named |= {f"notice_{outcome}" for outcome in hookshot.NOTICE_OUTCOMES} | {"deploy_accepted", "deploy_repeated", "deploy_moved", "command_ended", "control",
                                                                                "reloaded", "reload_failed"}
    assert named == hookshot.LOG_EVENTS.keys()


def test_labels_of_metrics_are_named_alike_and_every_metric_is_given_somewhere():
    texts = collections.Counter(node.value for node in ast.walk(TREE) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    assert [name for name in hookshot.METRICS if texts[name] < 2] == []
    assert all(metric.doc.endswith(".") and metric.kind in ("counter", "gauge", "histogram") for metric in hookshot.METRICS.values())
    assert all((metric.kind == "histogram") == bool(metric.bounds) and sorted(metric.bounds) == list(metric.bounds) for metric in hookshot.METRICS.values())
    assert {name for name, metric in hookshot.METRICS.items() if (metric.kind == "counter") != name.endswith("_total")} == set()


def test_what_is_told_is_what_can_happen():
    assert set(hookshot.NOTICE_EVENTS) == {"started", *hookshot.COUNT_OF_STATE.values(), "locked"}
    assert {*hookshot.NOTICE_EVENTS, "test"} == hookshot._HEADLINES.keys() == hookshot._COLOURS.keys() == hookshot._PRIORITIES_OF_EVENTS.keys()
    used = {name for kind in hookshot.CHANNEL_TYPES.values() for name in (*kind.required, *kind.optional)}
    assert {*used, *hookshot._COMMON_CHANNEL_KEYS} == set(hookshot.Channel._fields)


# --- the repository


@pytest.fixture(scope="module")
def files() -> list[str]:
    """What is committed or staged; what a user keeps in his clone besides is his."""
    try:
        done = subprocess.run(["git", "-c", "safe.directory=*", "ls-files", "-z"], cwd=ROOT, capture_output=True)
    except FileNotFoundError:
        pytest.skip("git is not installed")
    if done.returncode or not (ROOT / ".git").exists():
        pytest.skip("this is no git checkout")
    return [name for name in done.stdout.decode().split("\0") if name and (ROOT / name).exists()]


def test_the_top_level_holds_what_it_should_and_nothing_else(files):
    top = {name.partition("/")[0] for name in files}
    required = {"hookshot.py", "tests", "build_zipapp.py", "docs", "README.md", "LICENSE"}
    assert required <= top
    assert {name for name in top if not name.startswith(".")} - required <= {"examples"}


def test_every_source_file_names_its_licence(files):
    sources = [name for name in files if name.endswith((".py", ".sh")) or name == ".ci/run"]
    heads = {name: (ROOT / name).read_text(encoding="utf-8").splitlines()[:2] for name in sources}
    assert [name for name, lines in heads.items() if "# SPDX-License-Identifier: MPL-2.0" not in lines] == []
