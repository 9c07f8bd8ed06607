# SPDX-License-Identifier: MPL-2.0
"""The procedures of backup.md, security.md and audit.md: each block is pasted on a host that systemd runs, after what it is for has happened.

tests/drills.py says what is done there, once for all tests of this file; they look at what was seen.
"""

import base64
import pathlib
import re
import shutil
import subprocess
import sys
from typing import Any

import pytest

from pages import read_blocks
from support import ROOT, has_python_of_machine, need, program, run_in_machine

PAGES = ("backup.md", "security.md", "audit.md")


def later_program(folder: pathlib.Path) -> bytes:
    """Return an archive of a version that is to come: with a schema of its own."""
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", "dist", "tests", "examples", "__pycache__"))
    source = (folder / "hookshot.py").read_text(encoding="utf-8")
    for pattern, new in ((r'^__version__ = "[^"]*"$', '__version__ = "9.0.0"'),
                         (r"^MIGRATIONS: (.*?)^\)$", r'MIGRATIONS: \1    "CREATE TABLE later (n INTEGER PRIMARY KEY) STRICT;",\n)')):
        source, count = re.subn(pattern, new, source, flags=re.DOTALL | re.MULTILINE)
        assert count == 1, pattern
    (folder / "hookshot.py").write_text(source, encoding="utf-8")
    subprocess.run([sys.executable, folder / "build_zipapp.py", "--python", sys.executable], check=True, stdout=subprocess.DEVNULL)
    return (folder / "dist/hookshot.pyz").read_bytes()


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what was seen in the machine, by drill."""
    for name in ("age", "gpg", "rsync", "restic", "openssl", "curl", "sqlite3"):
        need(name)
    if not has_python_of_machine():
        pytest.skip("the tests with Debian's Python run this")
    folder = tmp_path_factory.mktemp("drills")
    scripts: dict[str, str] = {}
    for block in read_blocks():
        if block.page.name in PAGES and block.run:
            scripts[block.run] = scripts.get(block.run, "") + block.text
    programs = {"dist/hookshot.pyz": pathlib.Path(program()[1]).read_bytes(), "later/hookshot.pyz": later_program(folder / "later")}
    script = folder / "script.py"
    script.write_text(f"SCRIPTS = {scripts!r}\nPROGRAMS = { {name: base64.b64encode(content).decode() for name, content in programs.items()}!r}\n"
                      + (ROOT / "tests/drills.py").read_text(encoding="utf-8"), encoding="utf-8")
    return run_in_machine(script, program=program()[1])


@pytest.fixture
def drill(seen: dict[str, Any], request: pytest.FixtureRequest) -> dict[str, Any]:
    """Return what was seen in a drill, in which the blocks that go with it were pasted."""
    name, *blocks = request.param
    found = dict(seen[name])
    assert "broken" not in found, found["broken"]
    assert found.pop("pasted") == sorted(blocks)
    return found


def of(name: str, *blocks: str) -> pytest.MarkDecorator:
    """Give a test the drill of a name, and say which blocks of the pages it proves."""
    return pytest.mark.parametrize("drill", [(name, *blocks)], indirect=True, ids=[name])


# --- backup


@of("daily", "backup-daily", "backup-age-of")
def test_a_daily_backup_keeps_seven_and_the_newest_has_a_name(drill):
    assert drill["listing"] == "/etc/cron.daily/hookshot-backup" and drill["mode"] == "root 0600"
    assert drill["new"] and drill["linked"] and drill["again"]
    assert drill["young"] and drill["old"] == 1


@of("export_and_import", "backup-make", "backup-import")
def test_an_export_and_an_import_by_paste(drill):
    assert "exported 1 deployment" in drill["made"] and "nothing was changed" in drill["said"] and "imported;" in drill["said"]
    # What came after the backup is gone, and what was there is kept.
    assert drill["images"] == ["web:1.0 Succeeded"]
    assert drill["kept"] == ["config.toml.bak", "logs.bak", "secrets.bak", "services.toml.bak", "state.db.bak"]


@of("encryption", "backup-age-key", "backup-age", "backup-age-read", "backup-gpg-key", "backup-gpg", "backup-gpg-read")
def test_an_encrypted_backup_is_read_back_with_the_private_key(drill):
    assert "1 deployment, 1 log" in drill["age"] and "1 deployment, 1 log" in drill["gpg"]
    assert drill["files"][0].startswith("age-encryption.org") and not drill["files"][1].startswith("\x1f\x8b")


@of("off_site", "backup-rsync", "backup-restic-init", "backup-restic", "backup-restic-read")
def test_a_backup_goes_to_another_host_and_comes_back(drill):
    assert drill["rsync"] == ["hookshot-1.tar.gz.age", "restic"]
    assert "no errors were found" in drill["restic"] and "1 deployment, 1 log" in drill["read"]


@of("fresh_host", "drill-fresh")
def test_a_fresh_host_has_everything_of_the_old_one(drill):
    assert drill["active"] == "active" and drill["record"] == "Succeeded" and drill["current"] == "2.0"
    assert drill["images"] == ["web:1.0 Succeeded", "web:2.0 Succeeded", "web:2.0 Succeeded"]
    assert drill["owners"] == ["hookshot 0600", "hookshot 0700", "hookshot 0600", "root 0644"]
    assert re.search(r"^ok +unit ", drill["said"], re.MULTILINE) and not re.search("^fail", drill["said"], re.MULTILINE)


@of("broken_configuration", "break-config", "drill-config")
def test_a_broken_configuration_is_told_and_mended_from_the_backup(drill):
    assert drill["broke"].count("sevrer: unknown key; did you mean server?") == 2 and "exit status 78" in drill["broke"]
    assert drill["down"] == 69 and "exit status 78" in drill["said"] and drill["said"].endswith("are valid; services: web\n")
    assert drill["active"] == "active" and drill["images"] == ["web:1.0 Succeeded"] and drill["files"] == ["root 0644", True, False]


@of("damaged_database", "break-database", "backup-daily", "drill-database", "drill-database-anew")
def test_a_damaged_database_is_told_and_restored_or_begun_anew(drill):
    damage = "state.db is not a database; stop the server and restore a backup"
    assert damage in drill["broke"] and damage in drill["doctor"] and drill["exported"] == [75, f"hookshot: {damage}\n"]
    # The daily export fails, and leaves the backup that there is.
    assert drill["daily"] == [1, True, 1]
    assert drill["active"] == "active" and drill["images"] == ["web:1.0 Succeeded"] and drill["kept"] and "fit together" in drill["said"]
    assert drill["anew active"] == "active" and drill["anew images"] == []


@of("lost_with_a_queue", "drill-queue", "drill-queue-again")
def test_what_was_queued_on_a_lost_host_ends_and_runs_if_somebody_says_so(drill):
    assert drill["states"] == ["Failed", "Cancelled", "Cancelled", "404"]
    assert all(f"{deploy_id} was unfinished in the backup" in drill["listed"] for deploy_id in drill["ids"])
    assert "web:3.0: Succeeded" in drill["again"]
    assert drill["images"][-2:] == ["web:3.0 Succeeded", "web:5.0 Succeeded"]


@of("killed_with_a_queue")
def test_a_host_that_comes_back_carries_out_what_was_queued(drill):
    assert drill["images"] == ["web:1.0 Succeeded", "web:2.0 RolledBack", "web:3.0 Succeeded"]


@of("lost_secrets", "break-secrets", "drill-secrets")
def test_lost_secrets_stop_a_start_and_come_from_the_backup(drill):
    assert "nothing is reloaded" in drill["broke"] and "older than its files since" in drill["broke"]
    assert "status=78/CONFIG" in drill["broke"]
    assert drill["owner"] == "hookshot 0600" and drill["images"] == ["web:1.0 Succeeded", "web:2.0 Succeeded"]


@of("full_disk", "break-disk", "drill-disk", "drill-disk-end")
def test_a_full_disk_refuses_and_needs_no_restart(drill):
    assert drill["refused"][0] == 507 and drill["health"][0] == 503 and re.search("^fail disk", drill["doctor"], re.MULTILINE)
    assert '"status":"healthy"' in drill["said"] and drill["there"] == ["web:2.0 Succeeded"]
    assert drill["images"] == ["web:1.0 Succeeded"]


@of("version_before", "drill-upgrade", "drill-downgrade", "drill-downgrade-import")
def test_the_version_before_starts_on_the_backup_from_before(drill):
    assert drill["version"] == "9.0.0" and drill["back"][0] == 1
    shown = re.search(r"^/var/lib/hookshot/state\.db was written by .*$", (ROOT / "docs/backup.md").read_text(encoding="utf-8"), re.MULTILINE)
    # The numbers are those of the day that the page was written.
    assert shown and re.sub(r"\d", "N", shown[0]) in re.sub(r"\d", "N", drill["log"])
    assert drill["active"] == "active" and drill["images"] == ["web:1.0 Succeeded"] and drill["now"] != "9.0.0"


@of("version_before_of_the_same_schema", "drill-upgrade", "drill-downgrade")
def test_the_version_before_goes_on_where_the_schema_is_the_same(drill):
    assert drill == {"active": "active", "images": ["web:1.0 Succeeded", "web:2.0 Succeeded"]}


@of("rehearsal", "drill-rehearsal")
def test_a_rehearsal_stops_nothing_runs_nothing_and_leaves_nothing(drill):
    assert drill["same"] and not drill["left"] and drill["images"] == ["web:1.0 Succeeded", "web:2.0 Succeeded", "web:3.0 Succeeded"]
    assert "it would be Failed" in drill["said"] and drill["said"].count("of the audit fit together") == 2
    assert re.search(r"web +Cancelled +web:3\.0", drill["said"])
    assert not [name for name in drill["files"] if name.endswith(".bak")]


# --- security


@of("key_rotation", "rotate-key-add", "rotate-key-look", "rotate-key-remove")
def test_a_key_is_changed_without_refusing_a_caller(drill):
    assert drill["statuses"] == [200, 200, 401, 200]
    assert re.search(r"web +hmac_key +20.*127\.0\.0\.1", drill["keys"]) and re.search(r"web +hmac_key_2 +20", drill["keys"])
    assert "secret hmac_key_2: added" in drill["first"] and "secret hmac_key: removed" in drill["last"]
    assert drill["secrets"] == "hookshot 0600" and drill["active"] == "active"


@of("leaked_key", "leaked-key", "leaked-key-look", "leaked-key-undo")
def test_a_leaked_key_is_taken_out_and_what_it_did_is_found_and_undone(drill):
    assert drill["refused"] == 401 and drill["states"] == ["Deploying", "Cancelled"]
    assert "fit together" in drill["looked"] and "thief-2" in drill["looked"] and "thief-3" in drill["looked"]
    assert drill["images"] == ["web:1.0 Succeeded", "web:2.0 Cancelled", "web:3.0 Cancelled", "web:1.0 Succeeded"] and drill["current"] == "1.0"


@of("token_rotation", "rotate-token")
def test_an_old_token_reads_nothing_more(drill):
    assert drill["before"] == 200 and drill["after"] == [401, 200] and drill["differ"] and drill["secrets"] == "hookshot 0600"


@of("certificates", "tls-toml", "tls-ends", "tls-renew")
def test_a_new_certificate_takes_a_reload(drill):
    assert drill["before"].startswith("notAfter=") and drill["after"].startswith("notAfter=") and drill["before"] != drill["after"]
    assert any("expires at" in line for line in drill["doctor"])


@of("doctor", "doctor", "hardening")
def test_what_doctor_and_systemd_say_is_as_shown(drill):
    text = (ROOT / "docs/security.md").read_text(encoding="utf-8")
    shown = re.findall(r"^(?:ok  |warn) [a-z]+ .*$", text, re.MULTILINE)

    def timeless(line: str) -> str:
        return re.sub(r"\d{4}-\S+Z", "TIME", line)

    assert len(shown) == 3
    # A machine's clock may be kept right by the host's.
    said = {timeless(line) for line in drill["said"].splitlines()}
    assert {timeless(line) for line in shown if not line.startswith("warn clock") or re.search("^warn clock", drill["said"], re.MULTILINE)} <= said
    assert re.search(r"Overall exposure level for hookshot\.service: \d\.\d", drill["exposure"])


# Of each threat in the table of security.md, tests that what hookshot does against it is done.
PROOFS = {
    "somebody without a key sends a deploy": ["test_any_other_signature_is_refused", "test_a_strangers_body_is_not_looked_at", "test_a_weak_key_is_refused"],
    "a request is recorded and sent again": ["test_one_request_sent_many_times_at_once_runs_once", "test_a_message_that_comes_again_is_the_same_deployment",
                                             "test_replay_window_is_as_configured", "test_control_needs_the_right_key_and_a_fresh_timestamp"],
    "a signed request is sent to another path": ["test_what_was_signed_for_one_action_is_refused_at_every_other",
                                                 "test_what_was_signed_for_one_target_is_refused_at_another"],
    "a caller has commands of his own carried out": ["test_a_placeholder_in_program_text_is_refused_with_the_variable_to_write",
                                                     "test_a_request_value_is_no_option_and_no_novel", "test_a_value_is_inserted_once_and_never_read_again"],
    "a caller deploys an image of his own": ["test_the_pattern_must_match_the_whole_image", "test_metadata_named_image_does_not_replace_the_image"],
    "a caller changes how programs run": ["test_an_override_must_be_on_the_list", "test_a_variable_that_changes_how_commands_run_can_never_be_overridden"],
    "one key leaks": ["test_a_services_key_signs_for_its_service_only", "test_the_last_use_of_each_key_is_known_by_service",
                      "test_a_leaked_key_is_taken_out_and_what_it_did_is_found_and_undone"],
    "the output of a command or a caller's text holds a secret": ["test_a_secret_is_masked_in_log_and_record_wherever_it_is_cut", "test_no_secret_is_found_anywhere"],
    "a command reads the keys": ["test_a_command_starts_with_a_clean_environment", "test_inherit_env_never_lets_secrets_or_the_service_managers_sockets_through",
                                 "test_a_command_inherits_no_descriptors_and_reads_nothing"],
    "strangers read records and logs": ["test_every_route_lets_in_whom_its_gate_says", "test_a_peer_that_is_not_loopback_is_not_local_whatever_it_says"],
    "a web page that is open on the host asks for data": ["test_local_reading_takes_only_a_host_that_is_this_host",
                                                          "test_local_reading_takes_no_page_of_another_site_and_no_proxy"],
    "a client claims another address": ["test_a_peer_that_is_not_trusted_names_only_itself", "test_a_forwarded_address_is_the_first_from_the_right_that_is_no_proxy"],
    "slow, large or many requests": ["test_clients_that_drip_are_gone_after_request_timeout_wherever_they_are", "test_large_bodies_at_once_stay_within_their_budget",
                                     "test_500_connections_of_one_address_do_not_keep_another_from_deploying", "test_the_gates_stand_in_their_order"],
    "a request that proxy and server read differently": ["test_an_ambiguous_request_is_refused_once_and_the_connection_closed"],
    "records or logs of others are rewritten": ["test_what_was_done_to_the_rows_is_found", "test_a_lost_end_and_a_chain_made_anew_need_a_head_noted_before"],
    "a backup is forged or stolen": ["test_a_name_that_no_backup_has_is_refused", "test_a_member_that_is_no_plain_file_is_refused",
                                     "test_a_manifest_that_lies_about_a_file_is_refused", "test_a_file_is_private_from_its_first_byte"],
    "hookshot itself is taken over": ["test_a_printed_unit_is_right_and_as_closed_as_its_commands_allow"],
    "power fails, the disk fills, the process is killed": ["test_kill_9_at_any_instant_loses_repeats_and_overlaps_nothing",
                                                           "test_a_full_disk_refuses_new_deploys_with_507_and_loses_nothing"]}


def test_each_threat_has_tests_that_are_there():
    text = (ROOT / "docs/security.md").read_text(encoding="utf-8")
    table = text.partition("## Threats\n")[2].partition("\n## ")[0]
    assert re.findall(r"^\| ([^|]+?) \|", table, re.MULTILINE)[2:] == list(PROOFS)
    tests = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").glob("test_*.py"))
    assert [name for names in PROOFS.values() for name in names if f"\ndef {name}(" not in tests] == []


# --- audit


@of("audit", "audit-look", "audit-head", "audit-by-hand", "audit-logged")
def test_the_audit_is_looked_at_checked_and_explained_as_shown(drill):
    assert "SERVICE_LOCKED" in drill["said"] and "fit together" in drill["said"] and re.search(r"web +hmac_key +20", drill["said"])
    assert "fit together" in drill["head"]
    assert drill["logged"][0] >= 2 and drill["logged"][1] == 0
    assert drill["other"] == 65 and drill["by hand"] == 0
    # An edited row is found by both.
    assert drill["edited"] == [65, 1]
    [shown] = [block.text for block in read_blocks("console") if block.page.name == "audit.md"]
    gates = [line for line in shown.splitlines() if line.startswith(("  passed", "  refused"))]
    assert len(gates) == 3 and set(gates) <= set(drill["explained"].splitlines())


# --- the pages


def test_every_shell_block_of_these_pages_is_run():
    assert {str(block) for block in read_blocks("sh") if block.page.name in PAGES and not block.run} == set()


def test_shown_messages_are_those_of_the_program():
    source = (ROOT / "hookshot.py").read_text(encoding="utf-8")
    shown = [line for block in read_blocks() if block.page.name == "backup.md" and not block.language for line in block.text.splitlines()]
    assert [line for line in shown if f'"{line}"' not in source and " was written by a newer hookshot" not in line] == []
