# SPDX-License-Identifier: MPL-2.0
"""TEMPLATES: what a placeholder may name, and what it becomes."""

import hashlib

import pytest

import hookshot
from hookshot import parse_template

IMAGE = "ghcr.io/o/app:v1@sha256:0123456789abcdef"
VALUES = {"IMAGE": IMAGE, "PREVIOUS_IMAGE": "", "SERVICE": "web", "TIMESTAMP": "86400"}


def expand(text, *, custom=None, **metadata):
    templates = {name: parse_template(value) for name, value in (custom or {}).items()}
    return hookshot.expand(parse_template(text), hookshot.Scope(VALUES, templates, metadata))


def check(text, *, custom=(), late=False):
    return hookshot.check_template(parse_template(text), custom, late=late)


# --- inserting

@pytest.mark.parametrize("text, result", [
    ("", ""), ("plain", "plain"), ("{{SERVICE}}", "web"), ("{{ SERVICE }}", "web"), ("a{{SERVICE}}b{{SERVICE}}c", "awebbwebc"),
    ("{SERVICE}", "{SERVICE}"), ("$SERVICE %s {} }}", "$SERVICE %s {} }}"), ("-x{{SERVICE}}", "-xweb"),
    ("{{PREVIOUS_IMAGE}}", ""), ("{{{SERVICE}}", None)])
def test_a_placeholder_is_replaced_and_all_else_stays(text, result):
    """Static text is the operator's: never filtered, whatever it looks like."""
    if result is None:
        with pytest.raises(ValueError):
            expand(text)
    else:
        assert expand(text) == result


@pytest.mark.parametrize("value", ["{{SERVICE}}", "{{IMAGE|upper}}", "}}{{SERVICE}}{{", "$(id)", "`id`", "; reboot", "'\"\\",
                                   "%(x)s", "{0}", "\\1", "\\g<0>"])
@pytest.mark.parametrize("text", ["<{{meta.k}}>", "<{{k}}>", "<{{CUSTOM}}>", "<{{k|default(x)}}>",
                                  "<{{k|replace(@,{{SERVICE)}}>"])
def test_a_value_is_inserted_once_and_never_read_again(text, value):
    """Braces, shell and pattern characters inside a value are text, also by way of a custom variable or a function."""
    assert expand(text, custom={"CUSTOM": "{{meta.k}}"}, k=value) == f"<{value}>"


@pytest.mark.parametrize("name", [*hookshot.VARIABLES])
def test_metadata_cannot_shadow_a_built_in_variable(name):
    scope = hookshot.Scope({name: "ours"}, {}, {name: "theirs", name.lower(): "theirs"})
    assert hookshot.expand(parse_template(f"{{{{{name}}}}}"), scope) == "ours"
    assert hookshot.expand(parse_template(f"{{{{meta.{name}}}}}"), scope) == "theirs"


def test_metadata_cannot_shadow_a_custom_variable():
    assert expand("{{region}} {{meta.region}}", custom={"region": "eu"}, region="mars") == "eu mars"


def test_a_custom_variable_cannot_shadow_a_built_in_one():
    assert expand("{{SERVICE}}", custom={"SERVICE": "other"}) == "web"


def test_a_bare_key_is_metadata_where_it_is_nothing_else():
    assert expand("{{branch}} {{meta.branch}} {{build.id}} {{meta.a-b}}",
                  **{"branch": "main", "build.id": "7", "a-b": "x"}) == "main main 7 x"


def test_a_key_that_itself_begins_with_meta_can_be_named():
    assert expand("{{meta.meta.x}} {{meta.x}}", **{"meta.x": "long", "x": "short"}) == "long short"


@pytest.mark.parametrize("text", ["{{branch}}", "{{meta.branch}}", "{{branch|upper}}", "{{CUSTOM}}"])
def test_metadata_that_is_needed_and_missing_is_named(text):
    with pytest.raises(ValueError, match="metadata.branch is needed by this service and missing"):
        expand(text, custom={"CUSTOM": "{{branch}}"})


@pytest.mark.parametrize("text", ["{{branch|default(main)}}", "{{meta.branch|lower|default(main)}}", "{{CUSTOM|default(main)}}",
                                  "{{CUSTOM_DEFAULT}}"])
def test_metadata_that_is_missing_can_have_a_default(text):
    assert expand(text, custom={"CUSTOM": "{{branch}}", "CUSTOM_DEFAULT": "{{branch|default(main)}}"}) == "main"


def test_custom_variables_may_use_each_other_in_any_order():
    assert expand("{{A}}", custom={"A": "<{{B}}>", "C": "{{SERVICE}}", "B": "{{C}}-{{C}}"}) == "<web-web>"


@pytest.mark.parametrize("image, text", [("app:-v", "{{IMAGE|tag}}"), ("host.io/x/--privileged", "{{IMAGE|basename}}"),
                                         ("app@-x", "{{IMAGE|digest}}"),
                                         ("x-rf", "{{IMAGE|match(-.*)}}"), ("x-rf", "{{IMAGE|replace(x,)}}"),
                                         ("app:-v", "{{VERSION}}"), ("a:-v", "{{IMAGE|short}}")])
def test_a_function_does_not_make_an_option_of_a_request_value(image, text):
    """A value may not begin with "-" (OliveTin, git ext::); neither may the part of it that becomes the argument."""
    scope = hookshot.Scope({"IMAGE": image}, {"VERSION": parse_template("{{IMAGE|tag}}")}, {})
    with pytest.raises(ValueError, match="-"):
        hookshot.expand(parse_template(text), scope)


def test_an_option_of_the_operator_stays_an_option():
    assert expand("--tag={{IMAGE|tag}} {{FLAG}}", custom={"FLAG": "-it"}) == "--tag=v1 -it"
    assert expand("{{FLAG}}", custom={"FLAG": "-it"}) == "-it"
    assert expand("{{flag|default(-q)}}") == "-q"


# --- functions

@pytest.mark.parametrize("text, result", [
    ("{{IMAGE|tag}}", "v1"), ("{{IMAGE|digest}}", "sha256:0123456789abcdef"), ("{{IMAGE|repository}}", "o/app"),
    ("{{IMAGE|registry}}", "ghcr.io"),
    ("{{IMAGE|basename}}", "app"), ("{{IMAGE|digest|short}}", "0123456789ab"), ("{{sha|short}}", "fedcba987654"),
    ("{{SERVICE|upper}}", "WEB"),
    ("{{SERVICE | upper | lower }}", "web"), ("{{SERVICE|replace(e,oo)}}", "woob"), ("{{SERVICE|replace(w,)}}", "eb"),
    ("{{SERVICE|replace(e,a,b)}}", "wa,bb"),
    ("{{SERVICE|replace( ,_)}}", "web"), ("{{PREVIOUS_IMAGE|default(none)}}", "none"), ("{{SERVICE|default(none)}}", "web"),
    ("{{none|default()}}", ""),
    ("{{IMAGE|match(v[0-9]+)}}", "v1"), ("{{IMAGE|match(:v([0-9]+)@)}}", "1"), ("{{IMAGE|match(nothing)}}", ""),
    ("{{IMAGE|match((x)?ghcr)}}", ""),
    ("{{IMAGE|match(zzz|o/app)}}", "o/app"), ("{{SERVICE|sha256}}", hashlib.sha256(b"web").hexdigest()),
    ("{{TIMESTAMP|date(%Y-%m-%d)}}", "1970-01-02"),
    ("{{SERVICE|date(%Y)}}", ""), ("{{big|date(%Y)}}", "")])
def test_functions_work_from_left_to_right(text, result):
    assert expand(text, sha="fedcba9876543210", big="9" * 30) == result


@pytest.mark.parametrize("name", hookshot.FUNCTIONS)
def test_no_function_fails_on_any_value(name):
    """A deploy never fails, let alone with a traceback, because of what a value looks like."""
    function = hookshot.FUNCTIONS[name]
    call = name + ("({})".format(",".join(["%Y"] * function.arguments)) if function.arguments else "")
    for value in ("", ":", "@", "/", "::@@//", "-1", "٣", "²", "9" * 512, "ß", "{{", "a" * 512, "%", "\\"):
        assert isinstance(expand(f"x{{{{k|{call}}}}}", k=value), str)


def test_digits_of_other_scripts_are_no_digits_to_match():
    assert expand("{{k|match(\\d+)}}", k="v٣") == ""


# --- parsing

@pytest.mark.parametrize("text", ["{{", "{{IMAGE", "{{IMAGE}", "{{}}", "{{ }}", "{{a b}}", "{{1A}}", "{{-A}}", "{{a{{IMAGE}}b}}",
                                  "{{IMAGE}}{{", "{{meta.}}", "{{IMÄGE}}",
                                  "{{IMAGE\n}}x{{", "{{|upper}}", "{{a/b}}", "{{IMAGE;id}}"])
def test_what_is_no_placeholder_is_an_error_not_text(text):
    with pytest.raises(ValueError):
        parse_template(text)


@pytest.mark.parametrize("text, message", [
    ("{{IMAGE|uper}}", "unknown function 'uper'; did you mean upper?"), ("{{IMAGE|}}", "unknown function ''"),
    ("{{IMAGE||tag}}", "unknown function ''"),
    ("{{IMAGE|TAG}}", "unknown function"), ("{{IMAGE|__class__}}", "unknown function"),
    ("{{IMAGE|tag(x)}}", "tag takes 0 arguments"),
    ("{{IMAGE|default}}", "default takes 1 argument: default"), ("{{IMAGE|replace(a)}}", "replace takes 2 arguments"),
    ("{{IMAGE|replace}}", "replace takes 2 arguments"),
    ("{{IMAGE|match(()}}", ""), ("{{IMAGE|match([)}}", "bad regular expression"),
    ("{{IMAGE|match(*)}}", "bad regular expression"),
    ("{{IMAGE|match(x{9999999999})}}", "bad regular expression")])
def test_a_bad_function_is_told_when_the_template_is_read(text, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(") if message else None):
        parse_template(text)


def test_bars_and_braces_inside_parentheses_belong_to_the_argument():
    insert, = parse_template("{{IMAGE|match(a|b{2}|c)|upper}}").inserts
    assert insert == ("IMAGE", (("match", ("a|b{2}|c",)), ("upper", ())))


# --- names

@pytest.mark.parametrize("text", [*(f"{{{{{name}}}}}" for name in hookshot.VARIABLES if name not in ("STATUS", "ERROR_MESSAGE")),
                                  "x", "{{MINE}}", "{{meta.X}}", "{{branch}}"])
def test_known_names_are_no_problem(text):
    assert check(text, custom=["MINE"]) is None


@pytest.mark.parametrize("text, nearest", [("{{IMGAE}}", "IMAGE"), ("x{{SERVICE}}{{DEPLOYID}}", "DEPLOY_ID"),
                                           ("{{MINEE|upper}}", "MINE")])
def test_an_unknown_variable_is_a_problem_that_names_the_nearest(text, nearest):
    assert check(text, custom=["MINE"]).endswith(f"; did you mean {nearest}?")


@pytest.mark.parametrize("name", ["STATUS", "ERROR_MESSAGE"])
def test_how_it_ended_is_known_only_in_late_hooks(name):
    assert "only in post_deploy and on_failure hooks" in check(f"{{{{{name}}}}}")
    assert check(f"{{{{{name}}}}}", late=True) is None


@pytest.mark.parametrize("custom, cycle", [
    ({"A": "{{A}}"}, "A -> A"), ({"A": "{{B}}", "B": "{{A|upper}}"}, "A -> B -> A"),
    ({"X": "{{A}}", "A": "{{B}}", "B": "{{C}}", "C": "{{A}}"}, "A -> B -> C -> A"),
    ({"A": "{{B}}{{B}}", "B": "{{IMAGE}}"}, None), ({"A": "{{meta.A}}"}, None), ({}, None)])
def test_variables_in_a_circle_are_found_and_told_in_order(custom, cycle):
    assert hookshot.find_cycle({name: parse_template(text) for name, text in custom.items()}) == cycle


def test_the_text_of_a_template_is_kept_as_written():
    """Messages and docs quote it."""
    assert parse_template("a {{ IMAGE | tag }} b").text == "a {{ IMAGE | tag }} b"
