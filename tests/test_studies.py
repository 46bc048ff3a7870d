"""The studies: their parts by hand, and each once, small, on the bundled model."""

from __future__ import annotations

import json

import numpy as np
import pytest
from cli_runs import invoke
from study_runs import CATALOG, check, job

from localsteer import ControlVector
from localsteer.catalog import Instruction
from localsteer.errors import CatalogError
from localsteer.evaluate.cells import Cell, checks_of
from localsteer.evaluate.outcomes import Outcomes, judged
from localsteer.evaluate.page import Share
from localsteer.evaluate.probe import GAUSSIAN, LINEAR, MEANS
from localsteer.evaluate.studies import NAMES, candidates, draws, linear, pairs, quantization, triples
from localsteer.evaluate.studies.common import correlate, other_vector, run_study, working
from localsteer.runtime.reply import Reply

QUERIES = CATALOG.queries["extraction"]
N_LAYER, N_EMBD = 6, 32


def vector(seed=0, **settings) -> ControlVector:
    rng = np.random.default_rng(seed)
    ones = np.ones(N_LAYER)
    given = {"layers": (2,), "name": f"v{seed}", **settings}
    return ControlVector(rng.standard_normal((N_LAYER, N_EMBD)), ones, 0 * ones, ones, ones, **given)


# --- parts ---


def test_draws_are_random_but_the_same_each_time():
    instruction = CATALOG.get("json")
    first, second = (draws.draw_pairs(instruction, QUERIES, draws.Draw(20, 3, k)) for k in (0, 1))
    assert first == draws.draw_pairs(instruction, QUERIES, draws.Draw(20, 3, 0)) != second
    assert len({pair.plain for pair in first}) == 20
    assert len({pair.instructed.removeprefix(pair.plain) for pair in first}) == 3


def test_more_pairs_than_queries_repeat_a_query_in_other_words():
    instruction = Instruction("x", ("One.", "Two.", "Three."))
    made = draws.draw_pairs(instruction, QUERIES[:4], draws.Draw(10, 0, 0))
    assert len(made) == len({pair.instructed for pair in made}) == 10
    assert len(draws.draw_pairs(instruction, QUERIES[:4], draws.Draw(100, 1, 0))) == 4


def test_the_vector_of_a_draw_is_the_difference_of_its_means():
    rng = np.random.default_rng(1)
    instructed, plain = rng.standard_normal((2, 5, N_LAYER, N_EMBD)).astype(np.float32)
    made = draws.vector_of(vector(layers=(3,), strength=0.5), instructed, plain)
    np.testing.assert_allclose(made.directions, (instructed - plain).mean(axis=0), atol=1e-6)
    assert made.mean_with[1] == pytest.approx((instructed[:, 1] @ made.unit(1)).mean(), abs=1e-5)
    assert (made.layers, made.strength) == ((3,), 0.5)


def test_where_it_stops_paying():
    def row(n, wordings, share):
        return draws.Size(n_pairs=n, wordings=wordings, followed=Share(share))

    rows = [
        row(2, 0, 0.5),
        row(10, 0, 0.89),
        row(50, 0, 0.9),
        row(100, 0, 0.88),
        row(50, 1, 0.6),
        row(50, 3, 0.9),
    ]
    text = pairs.where_it_stops(rows)
    assert text.startswith("10 pairs are enough: 89%")
    assert "With 1 wording, 50 pairs are worse than" in text
    assert "With 3 wordings, 50 pairs are as good as" in text


def test_what_is_said_of_probes_and_steering():
    steered = np.array([[1.0, 0.0], [1.0, 0.0]])
    flat = {("present", probe): np.ones((2, 2)) for probe in (MEANS, LINEAR, GAUSSIAN)}
    text = linear.where_they_part(flat, steered)
    assert "ceiling" in text and "in 4 of 4 cases, and in 2 of those steering does not work" in text
    apart = {**flat, ("present", LINEAR): np.array([[1.0, 0.6], [1.0, 0.6]])}
    text = linear.where_they_part(apart, steered)
    assert "in 2 of 4 cases" in text and "in 0%, elsewhere in 100%" in text
    assert "linear accuracy at +1.00, with the lead at -1.00" in text


def test_correlation_of_what_does_not_vary_is_no_number():
    assert np.isnan(correlate(np.ones((2, 2)), np.eye(2)))
    assert correlate(np.eye(2), 1 - np.eye(2)) == pytest.approx(-1)


def test_ways_to_put_three_vectors_together():
    three = [CATALOG.get(name) for name in ("json", "lowercase", "no_comma")]
    raw = {each.id: vector(k) for k, each in enumerate(three)}
    own = {**raw, "json": raw["json"].at(strength=0.0)}
    ways = candidates.candidates(three, own, raw, n_spread=5)
    assert len(ways[0].vectors) == 2  # nothing is applied where no setting helped
    assert {way.kind for way in ways} == {"own settings", "one layer", "different layers"}
    assert all(len({v.layers for v in way.vectors}) == 3 for way in ways if way.kind == "different layers")
    more = candidates.candidates(three, own, raw, {"no_comma": vector(9)}, n_spread=5)
    assert len(more) == 1 + 3 * (len(ways) - 1)
    assert {way.vectors[2].strength for way in more if "include" in way.label} == {-1.0, -2.0}


def test_a_reply_without_an_end_follows_none_of_the_three():
    three = [CATALOG.get(name) for name in ("lowercase", "no_comma", "one_sentence")]
    query = CATALOG.queries["test"][0]
    checks = tuple(check for each in three for check in checks_of(each, query))
    cell = Cell("three", "best", query, query.text, (), checks)
    reply = Reply("the fox runs over the bridge and the", [1], "length")
    endless, whole = Outcomes([judged(cell, reply, must_end=True)]), Outcomes([judged(cell, reply)])
    assert triples.held(endless, three) == [0.0] < triples.held(whole, three)
    assert set(triples.Triple(tuple(three), {}, {}, endless).parts("best").values()) == {0.0}


def test_parallel_directions_are_no_way():
    three = [CATALOG.get(name) for name in ("json", "lowercase", "no_comma")]
    raw = {"json": vector(0), "lowercase": vector(0), "no_comma": vector(2)}
    ways = candidates.candidates(three, raw, raw, n_spread=3)
    assert {way.kind for way in ways} == {"different layers"}


def test_a_control_is_never_of_the_same_kind():
    three = [CATALOG.get(name) for name in ("spanish", "german", "json")]
    vectors = {each.id: vector(k, layers=(k + 1,)) for k, each in enumerate(three)}
    assert other_vector(three[0], three, vectors).name == "v2"
    assert other_vector(three[0], three, vectors).layers == (1,)
    assert other_vector(three[0], three[:2], vectors) is None


def test_an_instruction_that_nothing_helps_is_left_out():
    two = [CATALOG.get(name) for name in ("json", "lowercase")]
    vectors = {"json": vector(0), "lowercase": vector(1, strength=0.0)}
    kept, said = working(two, vectors)
    assert [each.id for each in kept] == ["json"] and "lowercase" in said
    with pytest.raises(CatalogError, match="helps none of lowercase"):
        working(two[1:], vectors)


def test_angles_are_in_degrees():
    np.testing.assert_allclose(quantization.angle(np.array([1.0, 0.0, -1.0])), [0, 90, 180])


# --- each of them, small ---


def test_pairs_and_its_resumption(tmp_path):
    small = job(tmp_path, wanted=("json",))
    figures = check(run_study("pairs", small), tmp_path, "pairs")
    assert [row["n_pairs"] for row in figures["sizes"]] == [2, 20, 50]
    assert figures["sizes"][1]["followed"]["share"] >= 0.6
    kept = (tmp_path / "replies.jsonl").read_text()
    again = run_study("pairs", small)
    assert again.figures == figures
    assert (tmp_path / "replies.jsonl").read_text() == kept


def test_linear(tmp_path):
    figures = check(run_study("linear", job(tmp_path, wanted=("json", "title"))), tmp_path, "linear")
    assert np.array(figures["probes"]["which linear"]).shape == (2, 8)
    assert np.array(figures["steered"]).max() > 0.5


# --- the command ---


def test_the_command_line_knows_the_studies():
    from localsteer.cli.study import NAMES as named

    assert named == NAMES


def test_files_are_named_after_their_quantization():
    from localsteer.cli.study import _files

    named = _files("quantization", ("m.F16.gguf", "m-q4_k_m.gguf", "other.gguf", "n.F16.gguf"), False, False)
    assert [label for label, _ in named] == ["0-F16", "Q4_K_M", "other", "3-F16"]


def test_bad_input_is_one_line(tmp_path, monkeypatch, tiny_llama):
    monkeypatch.chdir(tmp_path)

    def refused(*args):
        return invoke("study", *args).complaint()

    assert "unknown" in refused("pairs", "-i", "rhyme", "-t", 1).lower()
    assert "at least two files" in refused("quantization", "--gguf", "a.gguf")
    assert "no model a.gguf" in refused("quantization", "--gguf", "a.gguf", "--gguf", "b.gguf")
    assert "belongs to" in refused("pairs", "--gguf", "a.gguf", "--gguf", "b.gguf")
    assert "belongs to" in refused("pairs", "--checkpoint", "folder")
    assert "--gguf" in refused("quantization", "-m", tiny_llama.gguf_path)
    assert "--checkpoint" in refused("layers", "-m", tiny_llama.gguf_path)
    assert "no folder" in refused("layers", "-m", tiny_llama.gguf_path, "--checkpoint", tmp_path / "none")
    assert "is empty" in refused("pairs", "-i", " , ")
    assert "number of test queries" in refused("pairs", "-n", 5000, "-t", 1)
    assert refused("rhymes")
    assert list(tmp_path.iterdir()) == []  # nothing is left of a study that was refused


def test_the_results_of_something_else_are_not_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    for content, name in (({"suites": {}}, "an evaluation"), ({"study": "linear"}, "study linear")):
        (run / "results.json").write_text(json.dumps(content))
        said = invoke("study", "pairs", "--quick", "-o", "run", "-t", 1).complaint()
        assert f"holds the results of {name}" in said
    assert f"holds the results of {name}" in invoke("eval", "-o", "run", "-t", 1).complaint()
    assert json.loads((run / "results.json").read_text()) == content
    assert [path.name for path in run.iterdir()] == ["results.json"]
