"""Text from files reaches a terminal without anything that could drive it."""

from __future__ import annotations

import io
import json
import re
import sys
import time

import pytest
from cli_runs import invoke, program, write_vector

from localsteer.cli import console

# clear the screen, set the title, colours by C1 codes, a bell, a line rewritten, text reordered
EVIL = "fox\x1b[2J\x1b]0;owned\x07\x9b31mred\r\x08\x7f\x85\u202exof\u2066x"
DRIVES = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
OWN_STYLES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # rich's colours and cursor moves


@pytest.fixture
def evil_vector(tmp_path):
    provenance = {
        "instruction": EVIL,
        "phrasings": [EVIL],
        "verifier": EVIL,
        "kwargs": {EVIL: EVIL},
        "validation": {"scores": {EVIL: 0.5}, "why": EVIL},
    }
    return write_vector(tmp_path / "evil.gguf", name=EVIL, provenance=provenance)


def test_inspect_shows_names_and_provenance_harmlessly(evil_vector):
    shown = invoke("inspect", evil_vector)
    assert shown.status == 0
    assert "fox" in shown.out and not DRIVES.search(shown.out)


def test_json_means_the_same_and_drives_no_terminal(evil_vector):
    shown = invoke("inspect", evil_vector, "--json")
    assert not DRIVES.search(shown.out)
    assert json.loads(shown.out)["provenance"]["instruction"] == EVIL


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", f"no-such-{EVIL[1:]}.gguf"),
        ("run", "-m", f"no-such-{EVIL}.gguf", "Hi"),
        ("verify", "-i", EVIL),
        (EVIL,),
        ("run", f"--{EVIL}"),
    ],
)
def test_a_complaint_quotes_harmlessly(arguments):
    complaint = invoke(*arguments).complaint()
    assert not DRIVES.search(complaint)


def test_a_notice_is_harmless(capsys):
    console.note(EVIL)
    said = capsys.readouterr().err
    assert "fox" in said and not DRIVES.search(said)


def test_tables_and_bars_keep_their_own_styles_alone(monkeypatch):
    harmless = type(console.talk())
    screen = harmless(file=io.StringIO(), force_terminal=True, width=100, markup=False)
    made = console.table(EVIL, "[bold", title=EVIL)
    made.add_row(EVIL, "[/red]")
    screen.print(made)
    monkeypatch.setattr(console, "talk", lambda: screen)
    monkeypatch.setattr(console, "QUIET_SECONDS", 0.0)
    with console.progress(f"[/red] {EVIL}") as advance:
        advance(1, 2, f"[/red] {EVIL}")
        time.sleep(0.3)
    seen = OWN_STYLES.sub("", screen.file.getvalue().replace("\r", ""))
    assert seen.count("fox") >= 4 and not DRIVES.search(seen)


def test_a_reply_is_harmless_in_a_terminal_and_as_it_is_in_a_pipe(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert console.shown(EVIL) == DRIVES.sub("\ufffd", EVIL)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    assert console.shown(EVIL) == EVIL


def test_the_program_itself_complains_harmlessly():
    assert not DRIVES.search(program("inspect", EVIL[1:].replace("\x00", "")).complaint())
