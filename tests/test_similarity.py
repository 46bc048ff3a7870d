"""Planted directions are found alike within and apart between; probes find what is there and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from cli_runs import invoke

from localsteer import bundled
from localsteer.catalog import Instruction, load_catalog
from localsteer.engine import Engine
from localsteer.errors import CatalogError
from localsteer.evaluate.probe import GAUSSIAN, LINEAR, accuracy, folds_of
from localsteer.evaluate.similarity import cosines, probe_groups, similarity
from localsteer.extract import Pair, build_pairs, open_backend
from localsteer.extract.states import States
from localsteer.extract.statistics import unit_rows

N, D = 40, 24


def noise(n=2 * N, d=D, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d))


# --- probes ---


def test_a_planted_direction_is_read_by_both_probes():
    labels = np.arange(2 * N) % 2 == 0
    states = noise() + 3.0 * labels[:, None] * np.eye(D)[0]
    groups = [i // 2 for i in range(2 * N)]
    assert accuracy(states, labels, groups, LINEAR) > 0.85
    assert accuracy(states, labels, groups, GAUSSIAN) > 0.8


def test_noise_is_at_chance_for_both():
    labels = np.arange(200) % 2 == 0
    for probe in (LINEAR, GAUSSIAN):
        found = [
            accuracy(noise(200, seed=seed), labels, [i // 2 for i in range(200)], probe) for seed in range(4)
        ]
        assert abs(np.mean(found) - 0.5) < 0.07


def test_only_the_nonlinear_probe_reads_a_ring():
    """Both classes have one mean: no direction parts them, their distance from it does."""
    rng = np.random.default_rng(5)
    labels = np.arange(160) % 2 == 0
    states = unit_rows(rng.standard_normal((160, 3))) * np.where(labels, 3.0, 0.7)[:, None]
    groups = list(range(160))
    assert accuracy(states, labels, groups, LINEAR) < 0.65
    assert accuracy(states, labels, groups, GAUSSIAN) > 0.95


def test_what_a_group_shares_does_not_leak():
    """Each group has a point of its own, and a label: known groups would be recognised, unseen ones can't."""
    rng = np.random.default_rng(2)
    points, signs = 5 * rng.standard_normal((30, 40)), rng.permutation(np.arange(30) % 2 == 0)
    groups = np.repeat(np.arange(30), 4)
    states = points[groups] + 0.1 * rng.standard_normal((120, 40))
    leaky = accuracy(states, signs[groups], list(range(120)), LINEAR)
    fair = accuracy(states, signs[groups], groups.tolist(), LINEAR)
    assert leaky > 0.95 and fair < 0.75


def test_unequal_classes_are_judged_evenly():
    rng = np.random.default_rng(4)
    labels = np.arange(120) % 8 == 0
    states = rng.standard_normal((120, 6)) + 4.0 * labels[:, None] * np.eye(6)[0]
    assert accuracy(states, labels, list(range(120)), LINEAR) > 0.9
    assert 0.35 < accuracy(rng.standard_normal((120, 6)), labels, list(range(120)), LINEAR) < 0.65


def test_folds_keep_groups_together_and_are_even():
    folds = folds_of([i // 3 for i in range(30)], 5)
    assert all(len(set(folds[3 * i : 3 * i + 3])) == 1 for i in range(10))
    assert sorted(np.bincount(folds)) == [6] * 5


def test_a_probe_without_both_labels_is_refused():
    with pytest.raises(ValueError, match="both labels"):
        accuracy(noise(10), [True] * 10, list(range(10)))
    with pytest.raises(ValueError, match="two groups"):
        accuracy(noise(10), [True, False] * 5, ["one"] * 10)
    with pytest.raises(ValueError, match="unknown probe"):
        accuracy(noise(10), [True, False] * 5, list(range(10)), "deep")


# --- cosines ---


def test_cosines_are_those_of_all_pairs_counted_one_by_one():
    rng = np.random.default_rng(0)
    units = [unit_rows(rng.standard_normal((n, 2, 7)) + shift) for n, shift in ((5, 0.3), (4, -0.5))]
    matrix = cosines(units)
    for il in range(2):
        a, b = units[0][:, il], units[1][:, il]
        own = [a[i] @ a[j] for i in range(5) for j in range(5) if i != j]
        assert matrix[il, 0, 0] == pytest.approx(np.mean(own))
        assert matrix[il, 0, 1] == matrix[il, 1, 0] == pytest.approx((a @ b.T).mean())


def test_groups_are_wordings_where_both_then_are_unseen():
    twelve = Instruction("x", tuple(f"Wording {k}." for k in range(6)))
    queries = [f"What is {k}?" for k in range(12)]
    assert set(probe_groups(build_pairs(twelve, queries, 12))) == set(twelve.phrasings)
    assert probe_groups([Pair("a b", "a"), Pair("c b", "c")]) == ["a", "c"]
    repeated = build_pairs(twelve, queries[:4], 12)
    assert set(probe_groups(repeated)) == set(queries[:4])


@pytest.fixture(scope="module")
def found():
    """Of the bundled model."""
    if not bundled.is_available():
        pytest.skip("this copy of the package holds no bundled model")
    catalog = load_catalog(bundled.CATALOG)
    instructions = [catalog.get(each) for each in ("json", "lowercase", "one_sentence")]
    pairs = [build_pairs(each, catalog.queries["extraction"], 12) for each in instructions]
    path = bundled.gguf_path("instruct", "Q8_0")
    with Engine(path, n_ctx=256, n_threads=1) as engine, open_backend(engine) as backend:
        states = States(backend)
        return similarity(states, instructions, pairs)


def test_the_bundled_model_s_instructions_are_directions(found):
    layer = found.clearest
    assert found.within[:, layer].min() > 0.5
    assert found.within[:, layer].mean() > found.between[:, layer].mean() + 0.3
    assert found.linear[:, layer].min() > 0.9
    assert found.matrix.shape == (8, 3, 3)
    assert [row["layer"] for row in found.rows()] == list(range(8))


# --- the command ---


@pytest.fixture
def model(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    return str(tiny_llama.gguf_path)


def test_the_command_prints_both_heat_maps_and_draws_them(model, tmp_path):
    args = ("-m", model, "--catalog", "bundled", "--pairs", 6, "-t", 1)
    done = invoke("similarity", *args, "json", "title", "--plot", "s.png", "--block", 1)
    assert done.status == 0, done.err
    assert "within" in done.out and "layer 1:" in done.out and "linear probe" in done.out
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


def test_its_json_is_one_document(model):
    done = invoke(
        "similarity", "-m", model, "--pairs", 4, "-t", 1, "json", "Answer in rhyme, please.", "--json"
    )
    assert [each["id"] for each in done.json["instructions"]] == ["json", "answer_in_rhyme_please"]
    assert len(done.json["layers"]) == 4 and len(done.json["matrix"]["cosines"]) == 2


def test_one_instruction_alone_has_nothing_between(model):
    done = invoke("similarity", "-m", model, "--pairs", 4, "-t", 1, "json", "--json")
    assert done.json["layers"][0]["between"] is None


def test_bad_input_is_one_line(model):
    def refused(*args):
        return invoke("similarity", "-m", model, "-t", 1, *args).complaint()

    assert "unknown instruction 'jsonn'" in refused("jsonn")
    assert "at least 4" in refused("json", "--pairs", 2)
    assert "empty.txt holds no query" in refused("json", "--queries", "empty.txt")
    assert "layers 0 to 3" in refused("json", "--block", 9, "--pairs", 4)
    with pytest.raises(CatalogError, match="no instruction"):
        similarity(None, [], [])


def test_one_query_alone_is_refused(model, tmp_path):
    (tmp_path / "one.txt").write_text("What is a fox?\n")
    args = ("similarity", "-m", model, "-t", 1, "json", "--pairs", 4)
    assert "two base queries or more" in invoke(*args, "--queries", "one.txt").complaint()


def test_a_picture_that_cant_be_drawn_is_refused_before_the_work(model, monkeypatch):
    from localsteer.engine import Engine

    monkeypatch.setattr(Engine, "last_hidden_states", lambda *_: pytest.fail("a state was computed"))
    args = ("similarity", "-m", model, "-t", 1, "json", "--pairs", 4)
    assert "no folder none" in invoke(*args, "--plot", "none/s.png").complaint()
