"""`localsteer inspect`: every layer in a row, the same figures as the file's."""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest
from cli_runs import invoke, write_vector

from localsteer import ControlVector
from localsteer.cli import console, inspect


@pytest.fixture
def vector(tmp_path):
    provenance = {"instruction": "Answer in JSON format.", "model_name": "tiny", "n_pairs": 50}
    return write_vector(tmp_path / "json.gguf", provenance=provenance, strength=0.5)


def test_it_says_where_the_vector_comes_from_and_how_it_is_applied(vector):
    out = invoke("inspect", vector).out
    assert re.search(r"^instruction +Answer in JSON format\.", out, re.M)
    assert re.search(r"^settings +project at layer 2, positions all, strength 0\.5", out, re.M)
    assert re.search(r"^pairs +50", out, re.M)


def test_a_hash_is_never_cut_off(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    console._consoles.cache_clear()
    digest = "0123456789abcdef" * 4
    out = invoke("inspect", write_vector(tmp_path / "v.gguf", provenance={"source_hash": digest})).out
    console._consoles.cache_clear()
    assert digest in re.sub(r"\s", "", out)


def test_every_layer_has_a_row_and_the_chosen_one_a_mark(vector):
    out = invoke("inspect", vector).out
    rows = re.findall(r"^ *(> )?(\d) +(\S+) ", out, re.M)
    assert [(mark != "", layer) for mark, layer, _ in rows] == [(i == 2, str(i)) for i in range(4)]
    norms = np.linalg.norm(ControlVector.load(vector).directions, axis=1)
    assert [float(norm) for *_, norm in rows] == pytest.approx(norms, rel=5e-3)


def test_json_holds_the_figures_of_every_layer(vector):
    document = invoke("inspect", vector, "--json").json
    assert document["layers"] == [2] and document["strength"] == 0.5
    assert len(document["by_layer"]) == 4
    assert document["by_layer"][2]["chosen"] and document["by_layer"][1]["mean_with"] == 30.0
    assert document["provenance"]["n_pairs"] == 50


def test_a_vector_with_a_gate_shows_it_at_its_layer(tmp_path):
    ControlVector.from_gate(1, [3.0, 4.0], -0.5, [1.0, 0.0], mean_gate=1.0, n_layer=3).save(
        tmp_path / "g.gguf"
    )
    out = invoke("inspect", tmp_path / "g.gguf").out
    assert re.search(r"^settings +gate at layer 1, positions all, strength 1", out, re.M)
    assert re.search(r"^ *> 1 +1 .* -0\.5 \+ \|w\| 5 *$", out, re.M)


def test_a_vector_without_mean_projections_has_no_columns_for_them(tmp_path):
    directions = np.ones((3, 8), np.float32)
    ControlVector(directions, None, None, None, None, (1,), mode="add").save(tmp_path / "import.gguf")
    out = invoke("inspect", tmp_path / "import.gguf").out
    assert re.search(r"^layer +norm *$", out, re.M)


def test_the_strip_shows_both_means_and_their_spread():
    layer = {"mean_with": 10.0, "mean_without": 0.0, "std_with": 1.0, "std_without": 1.0}
    strip = inspect.strip(layer)
    assert len(strip) == inspect.STRIP_WIDTH
    assert strip.index("o") < strip.index("#")
    assert "=o=" in strip and "=#=" in strip and "·····" in strip
    assert inspect.strip({**layer, "mean_with": 0.0, "std_with": 0.0, "std_without": 0.0}).count("#") == 1


@pytest.mark.parametrize(("part", "drawn"), [(0, ""), (0.5, "███"), (1, "██████"), (2, "██████"), (0.01, "")])
def test_a_bar_is_as_long_as_its_part(part, drawn):
    assert inspect.bar(part, 6) == drawn


def test_separation_is_in_standard_deviations():
    layer = {"mean_with": 7.0, "mean_without": 1.0, "std_with": 2.0, "std_without": 2.0}
    assert inspect.separation(layer) == 3
    assert inspect.separation({**layer, "std_with": None}) is None
    assert inspect.separation({**layer, "std_with": 0.0, "std_without": 0.0}) is None


def test_the_picture_is_drawn(vector, tmp_path):
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    done = invoke("inspect", vector, "--plot", tmp_path / "json.png")
    assert done.status == 0
    assert (tmp_path / "json.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_one_line_names_the_extra(vector, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert '"localsteer[plot]"' in invoke("inspect", vector, "--plot", "x.png").complaint()


def test_a_picture_of_no_known_kind_is_refused(vector, tmp_path):
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    assert "can't be drawn" in invoke("inspect", vector, "--plot", tmp_path / "json.xyz").complaint()


@pytest.mark.parametrize("name", ["picture", "", "picture.xyz"])
def test_a_picture_needs_an_ending_that_says_its_format(vector, name, tmp_path):
    pytest.importorskip("matplotlib")
    before = sorted(tmp_path.iterdir())
    assert (
        "its ending must be one of"
        in invoke("inspect", vector, "--plot", tmp_path / name if name else "").complaint()
    )
    assert sorted(tmp_path.iterdir()) == before
