# SPDX-License-Identifier: MPL-2.0
"""Write the tables of hookshot.py into README.md, docs/ and examples/: python3 tests/render_docs.py

A block stands between "<!-- rendered: NAME -->" and "<!-- end -->"; the rest of a page is left as it is.
"python3 tests/render_docs.py demo" runs the demo and makes docs/demo.svg, the picture of it.
"""

import json
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from xml.sax.saxutils import escape

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import hookshot  # noqa: E402

BLOCK = re.compile(r"(<!-- rendered: ([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
# Rows of ERRORS that are said on the command line and never leave over HTTP.
LOCAL_ERRORS = ("bad_archive", "usage", "unreachable", "cannot_write", "in_use", "audit_broken", "config")


def pages() -> list[pathlib.Path]:
    """Return every page of the documentation."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def render_table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def code(text: object) -> str:
    return f"`{text}`"


# --- configuration


def render_default(default: object) -> str:
    if default is hookshot.REQUIRED:
        return "required"
    return "unset" if default is None else code(json.dumps(default, ensure_ascii=False))


def render_keys(table: type) -> str:
    rows = [(code(name), field.check.kind, render_default(field.default), field.doc)
            for name, field in table._field_defaults.items() if not hookshot.is_table(field)]
    return render_table(("Key", "Value", "Default", "Meaning"), rows) if rows else ""


def walk_tables(table: type) -> Iterator[type]:
    yield table
    for field in table._field_defaults.values():
        if hookshot.is_table(field):
            yield from walk_tables(field)


def render_tables(*tables: type) -> str:
    """Return a heading and a table of keys for each table that has keys; its docstring is its name in the file."""
    parts = [f"### `{table.__doc__}`\n\n{keys}" for table in tables if (keys := render_keys(table))]
    return "\n" + "\n".join(parts) + "\n"


def render_config() -> str:
    return render_tables(*walk_tables(hookshot.Config))


def render_services() -> str:
    return render_tables(hookshot.Defaults, *walk_tables(hookshot.Service))


def render_command_keys() -> str:
    return render_keys(hookshot.CommandSpec)


def render_probe_keys() -> str:
    return render_keys(hookshot.HttpProbe)


def render_channel_keys() -> str:
    return render_keys(hookshot.Channel)


def render_channel_types() -> str:
    def names(keys: Sequence[str]) -> str:
        return ", ".join(map(code, keys)) or "-"

    return render_table(("Type", "Receiver", "Needs", "May have"), [(code(name), kind.doc, names(kind.required), names(kind.optional))
                                                                    for name, kind in hookshot.CHANNEL_TYPES.items()])


def render_metrics() -> str:
    return render_table(("Metric", "Type", "Labels", "Meaning"), [
        (code(name), metric.kind, ", ".join(map(code, metric.labels)) or "-", metric.doc) for name, metric in hookshot.METRICS.items()])


def render_log_events() -> str:
    return render_table(("`event`", "When"), [(code(name), doc) for name, doc in hookshot.LOG_EVENTS.items()])


def render_variables() -> str:
    return render_table(("Name", "Value"), [(code("{{%s}}" % name), doc) for name, doc in hookshot.VARIABLES.items()])


def render_functions() -> str:
    arguments = {"replace": "(a,b)", "default": "(x)", "match": "(regex)", "date": "(layout)"}
    return render_table(("Function", "Gives"), [(code(name + arguments.get(name, "(...)" if function.arguments else "")), function.doc)
                                                for name, function in hookshot.FUNCTIONS.items()])


# --- the API


def render_routes() -> str:
    who = {"open": "anyone", "read": "who may read", "signature": "who signs"}
    return render_table(("Request", "Who", "What"), [(code(f"{route.method} {route.pattern}"), who[route.gate], route.doc)
                                                     for route in hookshot.ROUTES])


def render_gates() -> str:
    """Return the rule of each gate, and the order in which each kind of request comes to those behind the ones that all have in common."""
    orders = hookshot.GATES_OF
    common = next(number for number, names in enumerate(zip(*orders.values())) if len(set(names)) > 1)
    rules = render_table(("Gate", "Rule"), [(code(name), rule) for name, rule in hookshot.GATES.items()])
    return rules + "\n" + render_table(("Request", f"Gates, in their order, after the first {common}"),
                                       [("dry run" if action == "plan" else action, ", ".join(order[common:])) for action, order in orders.items()])


def render_errors() -> str:
    rows = [(kind.http, code(kind.code), f"{kind.title}.", "-" if kind.retry_after_s is None else f"{kind.retry_after_s} s", kind.exit)
            for name, kind in hookshot.ERRORS.items() if name not in LOCAL_ERRORS]
    return render_table(("HTTP", "Code", "Meaning", "Retry-After", "Exit status"), rows)


def render_limits() -> str:
    size = hookshot.render_size
    rows = [
        ("request line", size(hookshot.MAX_REQUEST_LINE_BYTES)),
        ("request line and headers", f"{size(hookshot.MAX_HEAD_BYTES)}, {hookshot.MAX_HEADERS} headers"),
        ("body", "`server.max_request_size`"),
        ("depth of the JSON document", f"{hookshot.MAX_JSON_DEPTH} levels"),
        ("digits of a number", hookshot.MAX_NUMBER_CHARS),
        ("text that reaches a command", f"{hookshot.MAX_VALUE_CHARS} characters"),
        ("metadata", f"{hookshot.MAX_METADATA_KEYS} keys"),
        ("wait for the end", f"{hookshot.MAX_WAIT_S} s"),
        ("free disk space below which deploys are refused", size(hookshot.DISK_RESERVE_BYTES))]
    return render_table(("What", "At most"), rows[:-1]) + "\n" + f"A deploy is refused while less than {rows[-1][1]} are free for the data directory.\n"


# --- states


def render_states() -> str:
    state = hookshot.State
    lines = ["```mermaid", "stateDiagram-v2", f"    [*] --> {state.QUEUED}"]
    for before, row in hookshot.TRANSITIONS.items():
        lines += [f"    {before} --> {after}: {outcome}" for outcome, after in row.items()]
    lines += [f"    {end} --> [*]" for end in state if end in hookshot.TERMINAL]
    return "\n".join([*lines, "```"]) + "\n"


# --- the command line


def render_options(arguments: Sequence[tuple[tuple[str, ...], dict]]) -> Iterator[tuple[str, str]]:
    for names, options in arguments:
        if names[0].startswith("-"):
            negated = [f"--no-{name[2:]}" for name in names if name.startswith("--")] if options.get("action") is BOOLEAN else []
            takes_value = options.get("action") in (None, "append")
            value = options.get("metavar") or "|".join(options.get("choices", ())) or names[-1].strip("-").upper()
            yield code(", ".join([*names, *negated]) + (f" {value}" if takes_value else "")), options["help"]


BOOLEAN = hookshot.argparse.BooleanOptionalAction


def render_synopsis(name: str, arguments: Sequence[tuple[tuple[str, ...], dict]]) -> str:
    positional = [(options.get("metavar") or names[0].upper(), options.get("nargs")) for names, options in arguments if names[0][0] != "-"]
    return " ".join(["hookshot", name, *(f"[{metavar}]" if nargs == "?" else metavar for metavar, nargs in positional)])


def render_commands() -> str:
    parts = []
    for name, command in hookshot.COMMANDS.items():
        options = list(render_options(command.arguments))
        table = "\n" + render_table(("Option", "Meaning"), options) if options else ""
        parts.append(f"### `{render_synopsis(name, command.arguments)}`\n\n{command.help[0].upper()}{command.help[1:]}.\n{table}")
    return "\n" + "\n".join(parts) + "\n"


def render_exits() -> str:
    meanings: dict[int, list[str]] = {hookshot.EXIT_OK: ["fine"]}
    for state, status in hookshot.EXIT_OF_STATE.items():
        meanings.setdefault(status, []).append(f"the deployment ended as {state}")
    meanings[hookshot.EXIT_STILL_RUNNING] = ["the deployment still ran when the wait ended, or was accepted and could not be followed to its end"]
    meanings[hookshot.EXIT_INTERRUPTED] = ["interrupted with Ctrl-C"]
    for name, kind in hookshot.ERRORS.items():
        words = kind.title[0].lower() + kind.title[1:] if name in LOCAL_ERRORS else code(kind.code)
        meanings.setdefault(kind.exit, []).append(words)
    return render_table(("Exit status", "When"), [(status, ", ".join(words)) for status, words in sorted(meanings.items())])


def render_checks() -> str:
    return render_table(("Check", "Looks at"), [(code(name), check.doc) for name, check in hookshot.CHECKS.items()])


# --- the design


def render_sections() -> str:
    """Return the sections and their jobs, each the first sentence under its banner."""
    source = (ROOT / "hookshot.py").read_text(encoding="utf-8")
    found = re.findall(r"^# === (\w+)\. (\w+) =+\n((?:#.*\n)+)", source, re.MULTILINE)
    rows = []
    for number, name, head in found:
        text = " ".join(line.removeprefix("#").strip() for line in head.partition("\n#\n")[0].splitlines())
        rows.append((number, name, text))
    return render_table(("#", "Section", "Its job"), rows)


# --- the pages

# From the first steps to what is looked up.
ORDER = ("quickstart", "deployment", "configuration", "recipes", "ci", "examples", "migrating", "operations", "monitoring", "systemd", "security", "backup",
         "audit", "troubleshooting", "scaling", "cli", "api", "design", "changelog")

def render_pages() -> str:
    """Return the list of pages with their first sentences: those of ORDER as they stand there, any other after them."""
    order = {name: number for number, name in enumerate(ORDER)}
    found = sorted(pages()[1:], key=lambda page: (order.get(page.stem, len(order)), page.stem))
    described = [(page, hookshot.describe_page(page.stem, page.read_text(encoding="utf-8"))) for page in found]
    return "".join(f"- [{told.title}](docs/{page.name}): {told.summary}\n" for page, told in described)


# --- the picture of the demo

PICTURE = ROOT / "docs" / "demo.svg"
# What is another at each run, and the times, which say little in a picture.
VARYING = ((r"^\S+T\S+Z ", ""), (r"(?<=127\.0\.0\.1:)\d+", "…"), (r"/\S*/hookshot-demo-\w+", "/tmp/hookshot-demo-…"), (r"[\d.]+ m?s\b(?=$|[,:])", "…"))
# The first rule that is found in a line gives its colour.
COLOURS = ((r"^\$|^==", "#ffffff"), (r"^   hookshot", "#79c0ff"), (r"RolledBack|rolling back|^rollback", "#e3b341"),
           (r" err |exited with status", "#ff7b72"), (r"Succeeded|succeeded|good$|answers 200|as they should", "#7ee787"), ("", "#c9d1d9"))
COLUMN_PX, LINE_PX, MARGIN_PX = 7.5, 17, 14


def run_demo() -> list[str]:
    """Return what the demo prints, without what is another at each run; of the release that works, only how it ended."""
    done = subprocess.run([sys.executable, ROOT / "hookshot.py", "demo", "--once"], capture_output=True, text=True, check=True, timeout=120)
    lines = done.stdout.splitlines()
    for pattern, instead in VARYING:
        lines = [re.sub(pattern, instead, line) for line in lines]
    begins, ends = (next(number for number, line in enumerate(lines) if re.match(start, line)) for start in ("   hookshot", "-> "))
    return ["$ hookshot demo --once", *lines[: begins + 1], "…", *lines[ends:]]


def render_picture(lines: Sequence[str]) -> str:
    """Return lines of a terminal as a picture. Their widths are fixed, whatever font the reader has."""
    width, height = round(2 * MARGIN_PX + COLUMN_PX * max(map(len, lines))), 2 * MARGIN_PX + LINE_PX * len(lines)
    shapes = [f'<rect width="{width}" height="{height}" rx="8" fill="#0d1117"/>']
    for number, line in enumerate(lines):
        if line.strip():
            colour = next(colour for pattern, colour in COLOURS if re.search(pattern, line))
            x, text = MARGIN_PX + COLUMN_PX * (len(line) - len(line.lstrip())), line.strip()
            shapes.append(f'<text x="{x:g}" y="{MARGIN_PX + LINE_PX * number + 13}" fill="{colour}" textLength="{COLUMN_PX * len(text):g}">{escape(text)}</text>')
    return (f'<!-- SPDX-License-Identifier: MPL-2.0 -->\n<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
            f'font-family="ui-monospace, DejaVu Sans Mono, Menlo, Consolas, monospace" font-size="12.5">\n' + "\n".join(shapes) + "\n</svg>\n")


BLOCKS: dict[str, Callable[[], str]] = {
    "config": render_config, "services": render_services, "command-keys": render_command_keys, "probe-keys": render_probe_keys,
    "channel-keys": render_channel_keys, "channel-types": render_channel_types, "metrics": render_metrics, "log-events": render_log_events,
    "variables": render_variables, "functions": render_functions, "routes": render_routes, "gates": render_gates, "errors": render_errors,
    "limits": render_limits, "states": render_states, "commands": render_commands, "checks": render_checks, "exits": render_exits,
    "sections": render_sections, "pages": render_pages}


def render_page(text: str) -> str:
    """Return a page with every block as the tables say; KeyError for a block of an unknown name."""
    return BLOCK.sub(lambda match: match[1] + BLOCKS[match[2]]() + match[3], text)


# --- examples

LICENCE = "# SPDX-License-Identifier: MPL-2.0\n"
EXAMPLES = ROOT / "examples"
SYSTEM_PROGRAM = ("/usr/bin/python3", "/usr/local/bin/hookshot")

CHANNELS_HEAD = """
# One receiver of notices; the table may stand many times. docs/monitoring.md says which type needs and may have which keys.
# [[notifications.channel]]
"""
# A value for each key of a channel that says nothing at its default.
CHANNEL_VALUES = {
    "name": "team-chat", "type": "slack", "url": "secret:chat_url", "signing_key": "secret:notice_key", "token": "secret:bot_token", "chat_id": "@deployments",
    "server": "mail.example.net:587", "username": "hookshot", "password": "secret:mail_password", "sender": "hookshot@example.net",
    "recipients": ["oncall@example.net"], "command": ["/usr/local/bin/page"]}

SERVICES_HEAD = """\
# Every key of services.toml, in a service that works: a web site whose releases are folders, and the link `current` says
# which one is live. A line that begins with "# name = value" shows a default, or for a key that is unset by default
# what it may look like; remove the "# " to change it. What may stand in placeholders is in docs/configuration.md.
#
# A command is a list of program and arguments, or a table with these keys:
#
@COMMAND@
#
# The health check's http is a URL, or a table with these keys:
#
@PROBE@

"""
SERVICE_VALUES = {
    "name": "site", "description": "The web site of example.net", "working_dir": "/srv/site",
    "security.allowed_image_pattern": "site:[0-9]+[.][0-9]+",
    "deploy.commands": [["test", "-d", "releases/{{IMAGE|tag}}"], {"name": "switch", "run": ["ln", "-sfn", "releases/{{IMAGE|tag}}", "current"], "timeout": "10s"}],
    "healthcheck.initial_delay": 0, "healthcheck.interval": 1, "healthcheck.commands": [["test", "-s", "current/index.html"]],
    "rollback.commands": [["ln", "-sfn", "releases/{{PREVIOUS_IMAGE|tag}}", "current"]]}
# What keys that are unset by default may look like.
SERVICE_HINTS = {
    "command_timeout": "5m", "on_busy": "replace", "user": "www-data", "group": "www-data", "deploy.timeout": "10m", "healthcheck.timeout": "5s",
    "healthcheck.http": {"url": "http://127.0.0.1:8000/health", "contains": "ok"}, "healthcheck.tcp": "127.0.0.1:8000",
    "healthcheck.unix": "/run/site/site.sock", "rollback.enabled": False, "rollback.timeout": "2m"}


def render_toml(value: object) -> str:
    """Return a value as TOML; a list of commands takes a line for each."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{name} = {render_toml(entry)}" for name, entry in value.items()) + " }" if value else "{}"
    if isinstance(value, list) and value and not isinstance(value[0], str):
        return "[\n" + "".join(f"  {render_toml(entry)},\n" for entry in value) + "]"
    if isinstance(value, list):
        return "[" + ", ".join(map(render_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def render_kind(field: hookshot.Key, shown: object) -> str:
    """Return what a key takes, and its default if that is not what is shown."""
    if field.default is hookshot.REQUIRED:
        return f"{field.check.kind}; required"
    if field.default is None:
        return f"{field.check.kind}; unset by default"
    return field.check.kind if field.default == shown else f"{field.check.kind}; default {render_toml(field.default)}"


def render_row_keys(table: type) -> str:
    """Return a line of comment for each key of a command or a probe."""
    return "\n".join(f"#   {name}: {field.doc} ({render_kind(field, field.default)})" for name, field in table._field_defaults.items())


def render_example(table: type, heading: str, prefix: str = "", *, values: Mapping[str, object], hints: Mapping[str, object]) -> str:
    """Return a table with every key: `values` set, the others as a comment, at their default or as `hints` say."""
    lines = [heading]
    for name, field in table._field_defaults.items():
        if not hookshot.is_table(field):
            path = f"{prefix}{name}"
            shown = values.get(path, hints.get(path) if field.default is None else field.default)
            lines += [f"# {field.doc} ({render_kind(field, shown)})", f"{'' if path in values else '# '}{name} = {render_toml(shown)}"]
    tables = [render_example(field, f"[service.{name}]", f"{name}.", values=values, hints=hints)
              for name, field in table._field_defaults.items() if hookshot.is_table(field)]
    return "\n".join([*lines, "", *tables])


def example_config() -> str:
    """Return config.toml as `init /etc/hookshot` writes it, and the keys of a channel."""
    values = {"server.listen": "127.0.0.1:8080", "storage.data_dir": "/var/lib/hookshot", "secrets.secrets_file": "/etc/hookshot/secrets"}
    channel = [line for name, field in hookshot.Channel._field_defaults.items()
               for shown in [CHANNEL_VALUES.get(name, field.default)]
               for line in (f"# {field.doc} ({render_kind(field, shown)})", f"# {name} = {render_toml(shown)}")]
    return LICENCE + hookshot.SAMPLE_HEADING + hookshot.render_sample(hookshot.Config, "", values) + CHANNELS_HEAD + "\n".join(channel) + "\n"


def example_services() -> str:
    head = SERVICES_HEAD.replace("@COMMAND@", render_row_keys(hookshot.CommandSpec)).replace("@PROBE@", render_row_keys(hookshot.HttpProbe))
    parts = (render_example(hookshot.Defaults, "[defaults]", values={}, hints=SERVICE_HINTS),
             render_example(hookshot.Service, "[[service]]", values=SERVICE_VALUES, hints={**SERVICE_HINTS, "working_dir": "/srv/site"}))
    return (LICENCE + head + "\n".join(parts)).rstrip("\n") + "\n"


def sample_settings(config_path: str, data_dir: str, working_dir: str) -> hookshot.Settings:
    """Return what the files that `init` writes say."""
    config = hookshot.load_config(f'[storage]\ndata_dir = "{data_dir}"\n', config_path, [])
    return hookshot.Settings(config, hookshot.load_services(hookshot.SAMPLE_SERVICES.replace("@WORKING_DIR@", f'"{working_dir}"'), "", config, []))


def example_units() -> dict[pathlib.Path, str]:
    """Return the units in examples/systemd/: what `show` prints for the files that `init` writes to /etc/hookshot."""
    settings, paths = sample_settings("", "/var/lib/hookshot", "/srv"), ("/etc/hookshot/config.toml", "/etc/hookshot/services.toml")
    return {EXAMPLES / "systemd" / "hookshot.service": LICENCE + hookshot.render_unit(settings, paths, SYSTEM_PROGRAM),
            EXAMPLES / "systemd" / "hookshot.socket": LICENCE + hookshot.render_socket(settings)}


def example_files() -> dict[pathlib.Path, str]:
    """Return every example that follows from hookshot.py."""
    home = "/home/deploy/.config/hookshot"
    own = hookshot.render_unit(sample_settings(f"{home}/config.toml", f"{home}/data", home), (f"{home}/config.toml", f"{home}/services.toml"), SYSTEM_PROGRAM, is_user=True)
    return {**example_units(), EXAMPLES / "config.toml": example_config(), EXAMPLES / "services.toml": example_services(),
            EXAMPLES / "systemd-user" / "hookshot.service": LICENCE + own}


def main() -> None:
    pictures = {PICTURE: render_picture(run_demo())} if sys.argv[1:] == ["demo"] else {}
    for file, after in ({page: render_page(page.read_text(encoding="utf-8")) for page in pages()} | example_files() | pictures).items():
        if not file.exists() or file.read_text(encoding="utf-8") != after:
            file.parent.mkdir(exist_ok=True)
            file.write_text(after, encoding="utf-8")
            print(f"rendered {file.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
