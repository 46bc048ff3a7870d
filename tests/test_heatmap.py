"""A heat map says in colours what its figures say, and its figures remain where there are no colours."""

from __future__ import annotations

import io
import math
import re
import sys

import pytest
from rich.console import Console

from localsteer.errors import LocalsteerError
from localsteer.heatmap import COLOURS, colour, png_heatmap, terminal_heatmap

ROWS, COLUMNS = [0, 1, 2], ["all", "prompt"]
VALUES = [[0.0, 0.25], [1.0, None], [0.5, math.nan]]


def shown(colours: bool = False, **options) -> str:
    made = terminal_heatmap("json", ROWS, COLUMNS, VALUES, **{"form": "{:.0%}", **options})
    screen = Console(
        file=io.StringIO(), force_terminal=colours, color_system="truecolor" if colours else None
    )
    screen.print(made)
    return screen.file.getvalue()


def test_without_colours_the_figures_stand_in_their_cells() -> None:
    title, head, *rows = [line.split() for line in shown().splitlines()]
    assert title == ["json"]
    assert head == ["all", "prompt"]
    assert rows == [["0", "0%", "25%"], ["1", "100%", "·"], ["2", "50%", "·"]]


def test_marked_cells_stand_in_brackets() -> None:
    assert shown(mark=(1, 0)).count("[") == 1
    assert "[100%]" in shown(mark=(1, 0))
    assert "[0%]" in shown(mark=[(0, 0), (2, 0)]) and "[50%]" in shown(mark=[(0, 0), (2, 0)])


def test_what_does_not_fit_stands_below_and_no_figure_is_cut() -> None:
    values = [[il / 32 + 0.001 for il in range(32)], [1 - il / 32 for il in range(32)]]
    stream = io.StringIO()
    console = Console(file=stream, width=80)
    console.print(terminal_heatmap("layers", ["json", "lowercase"], range(32), values))
    text = stream.getvalue()
    assert max(map(len, text.splitlines())) <= 80 and text.count("layers") == 1
    assert sorted(f"{value:.2f}" for row in values for value in row) == sorted(re.findall(r"\d\.\d\d", text))
    assert [int(each) for each in re.findall(r"(?<![.\d])\d+(?![.\d])", text)] == list(range(32))


def test_colours_run_from_the_lowest_to_the_highest() -> None:
    text = shown(colours=True)
    for value in (0.0, 0.25, 0.5, 1.0):
        assert "48;2;" + ";".join(map(str, colour(value))) in text
    assert (colour(0.0), colour(1.0)) == (COLOURS[0], COLOURS[-1])
    fixed = shown(colours=True, low=0, high=2)
    assert "48;2;" + ";".join(map(str, colour(0.5))) in fixed
    assert "48;2;" + ";".join(map(str, COLOURS[-1])) not in fixed


def test_equal_values_are_no_error() -> None:
    made = terminal_heatmap("", [0], ["all", "last"], [[0.0, 0.0]])
    screen = Console(file=io.StringIO())
    screen.print(made)
    assert screen.file.getvalue().split() == ["all", "last", "0", "0.00", "0.00"]


def test_the_picture_is_drawn(tmp_path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    path = tmp_path / "map.png"
    png_heatmap(path, "json", ROWS, COLUMNS, VALUES, (1, 0), low=0, high=1, x_label="positions")
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(LocalsteerError, match="can't be drawn"):
        png_heatmap(tmp_path / "map.xyz", "json", ROWS, COLUMNS, VALUES)
    with pytest.raises(LocalsteerError, match="can't be written"):
        png_heatmap(tmp_path / "no" / "map.png", "json", ROWS, COLUMNS, VALUES)


def test_without_matplotlib_one_line_names_the_extra(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(LocalsteerError, match=r"localsteer\[plot\]"):
        png_heatmap(tmp_path / "map.png", "json", ROWS, COLUMNS, VALUES)
