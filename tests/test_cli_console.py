"""The parts that print: what reaches a terminal, and what a progress bar leaves behind."""

from __future__ import annotations

import io
import json
import logging
import time

import pytest
from cli_runs import invoke

from localsteer.cli import console


def test_control_characters_of_a_reply_do_not_drive_the_terminal(monkeypatch):
    text = "tab\tline\n\x1b[2J\x9b1mred\x07"
    monkeypatch.setattr(console.sys.stdout, "isatty", lambda: True, raising=False)
    assert console.shown(text) == "tab\tline\n\ufffd[2J\ufffd1mred\ufffd"
    monkeypatch.setattr(console.sys.stdout, "isatty", lambda: False, raising=False)
    assert console.shown(text) == text


def test_json_has_no_nan(capsys):
    console.print_json({"a": [1.5, float("nan"), (float("inf"), "é")]})
    assert json.loads(capsys.readouterr().out) == {"a": [1.5, None, [None, "é"]]}


def test_notices_of_the_library_are_lines_on_stderr(capsys):
    logger = logging.Logger("test")
    logger.addHandler(console.NoticeHandler())
    logger.warning("once [bold]only[/bold] " + "word " * 60)
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("localsteer: once [bold]only[/bold] word") and said.err.count("\n") == 1


@pytest.mark.parametrize("columns", ["30", "50", "80"])
def test_a_number_is_never_cut_off(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    console._consoles.cache_clear()
    names = ("layer", "cosine", "mean before", "mean now", "length before")
    made = console.table(*names, "", numbers=names)
    numbers = ["0", "0.9975", "1002.263", "-99.983", "1354.137"]
    made.add_row(*numbers, "steered")
    console.answer().print(made)
    console._consoles.cache_clear()
    assert set(numbers) <= set(capsys.readouterr().out.split())


@pytest.mark.parametrize("columns", ["40", "80"])
def test_names_are_folded_no_more_than_numbers_and_sentences_are(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    console._consoles.cache_clear()
    made = console.table("instruction", "strength", "positions", "reply", numbers=("strength",))
    made.add_row("extremely_concise", "0.75", "generation", "The fox is a small animal. " * 4)
    console.answer().print(made)
    console._consoles.cache_clear()
    lines = capsys.readouterr().out.splitlines()
    words = ["instruction", "strength", "positions", "extremely_concise", "0.75", "generation"]
    assert set(words) <= set(" ".join(lines).split()) and len(lines) > 2


@pytest.fixture
def terminal(monkeypatch):
    from rich.console import Console

    screen = Console(file=io.StringIO(), force_terminal=True, width=100)
    monkeypatch.setattr(console, "talk", lambda: screen)
    return screen.file


def test_short_work_shows_no_bar(terminal):
    with console.progress("loading") as advance:
        advance(1, 2)
    time.sleep(1.5 * console.QUIET_SECONDS)
    assert terminal.getvalue() == ""


def test_long_work_shows_a_bar_that_goes_away_whatever_ends_it(terminal, monkeypatch):
    monkeypatch.setattr(console, "QUIET_SECONDS", 0.01)
    with pytest.raises(KeyboardInterrupt), console.progress("loading") as advance:
        advance(1, 2)
        time.sleep(0.5)
        raise KeyboardInterrupt
    seen = terminal.getvalue()
    assert "loading" in seen and "1/2" in seen
    assert seen.rfind("\x1b[?25h") > seen.rfind("\x1b[?25l")


def test_the_time_left_follows_the_latest_minute():
    pace = console.Pace()
    assert pace.left(0) is None
    pace.add(0.0, 0, 1000)
    assert pace.left(0.5) is None
    pace.add(1.0, 500, 1000)  # what a journal held
    for second in range(2, 102):
        pace.add(float(second), 500 + second, 1000)
    assert pace.left(101.0) == pytest.approx(399)
    assert pace.left(111.0) == pytest.approx(389)  # it counts down between two advances
    assert pace.left(9999.0) == 0


def test_pieces_that_last_longer_than_the_window_give_an_estimate_too():
    pace = console.Pace()
    for k in range(3):
        pace.add(k * 10 * console.PACE_SECONDS, k, 4)
    assert pace.left(20 * console.PACE_SECONDS) == pytest.approx(20 * console.PACE_SECONDS)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.2, "1 s"),
        (89.5, "90 s"),
        (91, "2 min"),
        (5339, "89 min"),
        (5400, "1 h 30 min"),
        (7500, "2 h 05 min"),
    ],
)
def test_durations_are_as_exact_as_an_estimate_deserves(seconds, said):
    assert console.duration(seconds) == said


def test_a_bar_shows_the_time_left(terminal, monkeypatch):
    monkeypatch.setattr(console, "QUIET_SECONDS", 0.01)
    with console.progress("tuning") as advance:
        for done in range(4):
            advance(done, 1000)
            time.sleep(0.1)
    assert " left" in terminal.getvalue()


def test_a_load_goes_on_until_ctrl_c(monkeypatch):
    with console.loading("loading") as report:
        assert report(0.5) is True
        monkeypatch.setattr(console.interrupt, "pressed", lambda: True)
        assert report(0.6) is False


def test_a_bar_is_no_part_of_a_pipe(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCALSTEER_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    done = invoke("extract", "--gguf", tiny_llama.gguf_path, "-i", "json", "--pairs", "4")
    assert done.err.count("\n") == 1
