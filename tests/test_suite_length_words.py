"""The suites length, words and composition, small, on the bundled model; and the sums that they rest on."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from engines import GREEDY, open_engine, random_vector

from localsteer import ControlVector, bundled
from localsteer.catalog import Catalog, Query, load_catalog
from localsteer.errors import CatalogError
from localsteer.evaluate import page
from localsteer.evaluate.bench import BUNDLED_LIMITS, open_bench
from localsteer.evaluate.cells import Cell
from localsteer.evaluate.outcomes import Outcome, Outcomes
from localsteer.evaluate.suites import (
    composed,
    composition,
    in_turn,
    length,
    length_setting,
    length_sweep,
    word_choice,
    word_vectors,
    words,
)
from localsteer.plan import Plan
from localsteer.runtime.reply import Reply

CATALOG = load_catalog("bundled")
N_TEST = 4


@pytest.fixture(scope="module")
def small() -> Catalog:
    """The bundled catalogue with few queries."""
    queries = {"extraction": 24, "validation": 4, "test": N_TEST}
    return replace(CATALOG, queries={split: CATALOG.queries[split][:n] for split, n in queries.items()})


@pytest.fixture(scope="module")
def bench(small, tmp_path_factory):
    if not bundled.is_available():
        pytest.skip("this copy has no bundled model")
    out = tmp_path_factory.mktemp("run")
    path = bundled.gguf_path("instruct")
    with open_bench(path, small, out, limits=BUNDLED_LIMITS, n_threads=1, n=N_TEST) as opened:
        yield opened


def rows_of(words: list[int], *, degenerate: str | None = None, kept: bool = True) -> Outcomes:
    cell = Cell("verbosity", "x", Query("Tell me."), "Tell me.")
    return Outcomes(Outcome(cell, Reply("", [], "stop"), None, None, degenerate, kept, n, 0.0) for n in words)


def report_of(name: str, module, bench, **options):
    """A suite's report, in the shape that is shown, with figures for every query."""
    report = module.run(bench, **options)
    whole = page.Results(format=1, suites={name: report})
    assert page.loaded(page.plain(whole)) == whole
    for row in report.instructions.values():
        assert all(figure.n == N_TEST for figure in row.values())
    return report


# --- length ------------------------------------------------------------------------------------------------


def test_length_sweeps_both_directions(bench, monkeypatch):
    monkeypatch.setattr(length_setting, "TRIED", (0.75,))
    monkeypatch.setattr(length_setting, "POSITIONS", ("prompt",))
    monkeypatch.setattr(length_setting, "N_TRIED", 2)
    report = report_of("length", length, bench)
    rows = report.instructions
    assert {"conciseness", "verbosity", *length.LEVELS} == set(rows)
    plain, *_, strongest = (
        rows["conciseness"][name].measure("words") for name in ("none", "strength 0.5", "strength 1")
    )
    assert strongest < 0.7 * plain < plain < 0.8 * rows["verbosity"]["strength 1"].measure("words")
    swept, levels, cosines = report.sections
    assert "mean words fall" in swept.text and "mean words rise" in swept.text
    assert "For verbosity that is" in swept.text
    for name in ("conciseness", "verbosity"):  # its controls do not change length as it does
        random, other = (rows[name][f"{kind} 1"].measure("words") for kind in ("random", "other"))
        assert abs(random - plain) < 0.5 * abs(rows[name]["strength 1"].measure("words") - plain)
        assert other != rows[name]["strength 1"].measure("words")
    # nothing judges a direction, so its replies are in no sum
    assert set(report.all) == {"none", "steered", "instructed"}
    assert report.all["steered"].n == 4 * N_TEST
    assert len(swept.tables[0].rows) == 2 * (1 + len(length_sweep.STRENGTHS))
    assert [row[0] for row in levels.tables[0].rows] == list(length.LEVELS)
    assert len(cosines.plots[0].values) == len(length.LEVELS)
    records = bench.vectors.records()
    assert records["verbosity"].mode == "add" and records["verbosity"].positions == "prompt"


def test_c_is_strength_times_the_direction_s_length(bench):
    vector = bench.vectors.extract([length.length(bench.catalog, "verbosity")])["verbosity"].at(layer=2)
    plain = rows_of([20] * 4)
    sweep = length_sweep.Sweep("verbosity", vector, {0.0: plain, 0.5: plain}, {"other": {0.5: rows_of([9])}})
    row = sweep.row(0.5)
    assert row[-2:] == [None, 9.0]  # no random direction
    assert row[2] == pytest.approx(0.5 * np.linalg.norm(vector.directions[2].astype(float)))


@pytest.mark.parametrize(
    ("mean", "n_monotone", "said"),
    [
        ([20, 21, 30, 40, 50], 4, "rise monotonically with the weight from strength 0.25 (21.0) to 1 (50.0)"),
        ([20, 19, 30, 40, 50], 4, "from strength 0.25 (19.0) to 1 (50.0); 20.0 unsteered"),
        ([20, 21, 30, 40, 39], 3, "from strength 0.25 (21.0) to 0.75 (40.0); 20.0 unsteered, 39.0 at"),
        ([20, 21, 21, 40, 50], 1, "do NOT rise monotonically"),
        ([20, 21, 30, 29, 50], 2, "do NOT rise monotonically"),
    ],
)
def test_monotone_is_from_each_strength_to_the_next(mean, n_monotone, said):
    steered = dict(zip((0.0, *length_sweep.STRENGTHS), (rows_of([n]) for n in mean), strict=True))
    vector = ControlVector(np.ones((1, 2)), None, None, None, None, layers=(0,), mode="add")
    sweep = length_sweep.Sweep("verbosity", vector, steered, {})
    assert sweep.n_monotone == n_monotone
    assert said in sweep.verdict
    assert "do NOT fall monotonically" in length_sweep.Sweep("conciseness", vector, steered, {}).verdict


def test_degenerate_replies_count_against_a_setting():
    plain, longer = rows_of([9] * 4), rows_of([19] * 4)
    assert length_setting.change(longer, plain, 1) == pytest.approx(math.log(2))
    assert length_setting.change(longer, plain, -1) == pytest.approx(-math.log(2))
    assert length_setting.change(rows_of([19] * 4, kept=False), plain, 1) == 0
    assert length_setting.change([*longer[:3], *rows_of([99], degenerate="looping")], plain, 1) == -math.inf


# --- words -------------------------------------------------------------------------------------------------


def test_words_are_included_and_excluded_beside_their_controls(bench, monkeypatch):
    monkeypatch.setattr(word_vectors, "STRENGTHS", (1.0, 2.0))
    monkeypatch.setattr(word_vectors, "POSITIONS", ("all",))
    monkeypatch.setattr(words, "SWEEP", (1.0, 2.0))
    used = word_choice.words_used(bench)[0][0]
    chosen = {"include": ["horse", "music"], "context": ["moon"], "exclude": [used]}
    report = report_of("words", words, bench, **chosen)
    rows = report.instructions
    included = {f"include_word:{word}" for word in chosen["include"]}
    asked = {f"exclude_word:{word}:asked" for word in chosen["include"]}
    assert set(rows) == {*included, "exclude_word:moon:context", f"exclude_word:{used}", *asked}
    in_context = rows["exclude_word:moon:context"]
    # no other word
    assert set(in_context) == {"none", "steered", "random", "own", "own random", "instructed", "both"}
    assert in_context["none"].strict.accuracy == 0
    assert in_context["steered"].strict.accuracy >= 0.75
    excluded = rows[f"exclude_word:{used}"]
    assert excluded["none"].strict.accuracy <= 0.5
    assert excluded["steered"].strict.accuracy >= excluded["none"].strict.accuracy
    assert rows["include_word:horse"]["none"].strict.accuracy == 0
    assert rows["include_word:horse"]["instructed"].strict.accuracy >= 0.5
    for name in asked:  # the prompt makes the model say it, and minus the vector of including it wins
        assert set(rows[name]) == {"none", "steered", "random", "other"}
        assert rows[name]["none"].strict.accuracy <= 0.25
        assert rows[name]["random"].strict.accuracy <= 0.25
        assert rows[name]["steered"].strict.accuracy >= 0.75
    titles = [section.title for section in report.sections]
    assert [title.split()[0] for title in titles] == ["Inclusion", *["Exclusion"] * 3, "How"]
    assert bench.vectors.records()[f"exclude_word:{used}"].mode == "add"


def test_prompts_that_ask_for_the_word_are_its_queries(bench):
    recipe = word_vectors.asked_for(bench, "moon")
    assert (
        recipe.target.verifier == word_choice.FORBIDDEN
        and recipe.instruction.verifier == word_choice.EXISTENCE
    )
    for split, plain in (("validation", bench.validation), ("test", bench.test)):
        asking = recipe.target.queries[split]
        assert [each.subject for each in asking] == [each.subject for each in plain]
        for query, short in zip(asking, plain, strict=True):
            assert query.text.startswith(f"{short.text} ") and "moon" in query.text[len(short.text) :]


def test_queries_that_bring_a_word_are_the_catalogues_own_and_never_name_it(bench):
    assert {"moon", "horse"} <= set(word_choice.contexts(bench))
    own, recipe = word_choice.contexts(bench)["moon"], word_vectors.in_context(bench, "moon")
    assert not recipe.instruction.queries  # the vector is that of anybody's queries
    for split in ("validation", "test"):
        kept = recipe.target.queries[split]
        assert len(kept) >= word_vectors.MIN_HELD and set(kept) <= set(own.queries[split])
        assert not any("moon" in query.text for query in kept)


def test_only_queries_whose_reply_holds_the_word_are_asked(bench, monkeypatch):
    used = word_choice.words_used(bench)
    word = next(word for word, share in used if 0 < share < 1)
    monkeypatch.setattr(word_vectors, "MIN_HELD", 1)
    held = word_vectors.in_replies(bench, word).target.queries["validation"]
    assert set(held) < set(bench.validation)
    assert len(held) == dict(used)[word] * len(bench.validation)
    monkeypatch.setattr(word_vectors, "MIN_HELD", 5)
    nobody = word_vectors.in_replies(bench, "quartz").target.queries
    assert nobody["validation"] == bench.validation and nobody["test"] == bench.all_test


def test_a_word_asked_for_by_id_is_excluded_where_the_catalogue_brings_it(bench, monkeypatch):
    monkeypatch.setattr(bench, "wanted", ["exclude_moon", "exclude_noble"])
    assert list(word_choice.contexts(bench)) == ["moon"]
    assert word_choice.words_to_exclude(bench) == ["noble"]


def test_words_to_exclude_are_those_that_replies_use(bench):
    used = word_choice.words_used(bench)
    shares = [share for _, share in used]
    assert shares == sorted(shares, reverse=True) and shares[0] >= 0.5
    named = {word for word, _ in used}
    assert not named & word_choice.COMMON
    assert not named & set(" ".join(query.text for query in bench.validation).lower().split())


def test_the_catalogue_names_the_words_to_include(bench):
    listed = [each for each in CATALOG.instructions.values() if each.verifier == word_choice.EXISTENCE]
    expected = [each.kwargs["keywords"][0] for each in listed if not each.open_slots]
    assert word_choice.words_to_include(bench) == expected


def test_words_that_plain_replies_use_anyway_are_not_asked_for(bench, monkeypatch):
    (used, _), *_ = word_choice.words_used(bench)
    monkeypatch.setattr(word_choice, "INCLUDED", (used, "mirror"))
    monkeypatch.setattr(word_choice, "_named", lambda *_: [])
    assert word_choice.words_to_include(bench) == ["mirror"]


# --- composition -------------------------------------------------------------------------------------------


def test_two_instructions_hold_at_once(bench, monkeypatch):
    monkeypatch.setattr(composed, "PAIRS", (("json", "one_sentence"),))
    monkeypatch.setattr(composed, "CASE", "none of them")
    monkeypatch.setattr(composed, "POSITIONS", ("prompt",))
    monkeypatch.setattr(composed, "N_TRIED", 2)
    monkeypatch.setattr(in_turn, "N_REPLIES", 2)
    pytest.importorskip("torch", reason="one edit after the other is answered by PyTorch")
    report = report_of("composition", composition, bench)
    both = {
        name: figure.strict.accuracy for name, figure in report.instructions["json + one_sentence"].items()
    }
    assert both["none"] == both["first alone"] == both["second alone"] == both["random"] == both["other"] == 0
    assert both["same layer"] >= 0.6 and both["different layers"] >= 0.6
    together, one_after_the_other = report.sections
    rows = {row[1]: row[3:] for row in together.tables[0].rows}
    ((label, others),) = together.tables[1].rows
    assert label == "json + one_sentence" and len(set(others.split(" and ")) - set(label.split(" + "))) == 2
    assert [each.share for each in rows["first alone"]] == [1.0, 0.0, 0.0]
    (miss,), replies = (table.rows for table in one_after_the_other.tables)
    assert miss[3] < 1e-5  # the joint solve reaches both targets
    assert replies[0][1].share >= 0.5


def test_a_case_goes_with_a_word_that_its_own_queries_bring(bench, monkeypatch):
    monkeypatch.setattr(composed, "PAIRS", ())
    (pair,) = composed.pairs_of(bench)
    assert pair.label == "lowercase + exclude_word:moon:context"
    brought = word_choice.contexts(bench)["moon"].queries
    assert set(pair.queries(bench, "validation")) <= set(brought["validation"])
    assert set(pair.queries(bench, "test")) <= set(brought["test"])


def test_in_turn_the_second_moves_the_first_by_the_cosine():
    rng = np.random.default_rng(0)
    u = rng.standard_normal(16)
    v = 0.6 * u / np.linalg.norm(u) + 0.8 * _orthogonal(rng.standard_normal(16), u)
    made = [
        ControlVector(each[None, :], [5.0], [5.0 - np.linalg.norm(each)], None, None, layers=(0,), name=name)
        for each, name in ((u, "u"), (v, "v"))
    ]
    rows = rng.standard_normal((7, 16)).astype(np.float32)
    joint, turns = (in_turn.edited(rows, 0, steps) for steps in ([made], [[made[0]], [made[1]]]))
    assert max(in_turn.missed(joint, each, 0) for each in made) < 1e-5
    assert in_turn.missed(turns, made[1], 0) < 1e-5
    first = in_turn.edited(rows, 0, [[made[0]]]).astype(float)
    change = 5.0 - first @ made[1].unit(0).astype(float)
    expected = np.abs(0.6 * change).mean() / np.linalg.norm(u)
    assert in_turn.missed(turns, made[0], 0) == pytest.approx(expected, rel=1e-4)


def _orthogonal(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    rest = a - (a @ b) / (b @ b) * b
    return rest / np.linalg.norm(rest)


def test_nearly_parallel_vectors_are_not_put_at_one_layer():
    rng = np.random.default_rng(1)
    directions = rng.standard_normal((4, 8))
    a = ControlVector(directions, np.ones(4), np.zeros(4), None, None, layers=(1,), name="a")
    found = composed.arrangements(a, replace(a, name="b", layers=(2,)))
    assert found and all(x.layers != y.layers for x, y in found)
    other = ControlVector(
        rng.standard_normal((4, 8)), np.ones(4), np.zeros(4), None, None, layers=(2,), name="c"
    )
    assert any(x.layers == y.layers for x, y in composed.arrangements(a, other))


def test_pytorch_s_greedy_reply_is_llama_cpp_s(tiny_llama):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    from localsteer.extract.torch_steering import greedy_tokens

    model = AutoModelForCausalLM.from_pretrained(tiny_llama.hf_dir, dtype=torch.float32).eval()
    with open_engine(tiny_llama.gguf_path) as engine:
        first, second = (random_vector(engine, seed, positions="prompt") for seed in (1, 2))
        # at a cosine well above 0, so that the order matters
        vectors = [first, replace(second, directions=first.directions + second.directions)]
        prompt = "Tell me about foxes."
        ids = engine.prompt_tokens(prompt)
        given = {"max_tokens": 12, "ends": engine.ends}
        ours = engine.generate(prompt, steer=vectors, max_tokens=12, sampling=GREEDY).tokens
        joint = greedy_tokens(model, ids, [Plan.from_vectors(vectors)], **given)
        alone = [Plan.from_vectors([each]) for each in vectors]
        in_turn, reverse = (
            greedy_tokens(model, ids, alone, **given),
            greedy_tokens(model, ids, alone[::-1], **given),
        )
    assert joint == ours
    assert in_turn != reverse


# --- bad input ---------------------------------------------------------------------------------------------


def test_a_catalogue_without_levels_or_words_is_named(bench, monkeypatch, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("[[instruction]]\nid = 'rhyme'\nphrasings = ['Answer in rhyme.']\n")
    with pytest.raises(CatalogError, match=r"'extremely_concise': .*mine\.toml has rhyme"):
        length.length(load_catalog(path), "conciseness")
    monkeypatch.setattr(bench, "catalog", load_catalog(path))
    assert "unknown instruction 'extremely_concise'" in length.missing(bench)
    assert "unknown instruction 'exclude_word'" in words.missing(bench)
    assert "nothing to combine" in composition.missing(bench)
    monkeypatch.undo()
    with pytest.raises(CatalogError, match="is not a word"):
        words.run(bench, include=["two words"], exclude=[])


@pytest.mark.parametrize(
    ("module", "asked", "says"),
    [
        (composition, ["quotation"], r"nothing to combine: suite composition knows json + one"),
        (composition, ["json", "one_sentence"], ""),
        (composition, ["lowercase"], "nothing to combine"),
        (composition, ["lowercase", "exclude_moon"], ""),
        (length, ["json", "title"], "none of json, title is a length: suite length knows extremely_concise"),
        (length, ["json", "concise"], ""),
        (length, ["verbosity"], ""),
        (words, ["json"], "none of json is a word"),
        (words, ["include_music"], ""),
        (words, ["exclude_noble"], ""),
    ],
)
def test_a_suite_that_has_nothing_to_do_says_why(bench, monkeypatch, module, asked, says):
    assert module.missing(bench) == ""
    monkeypatch.setattr(bench, "wanted", asked)
    found = module.missing(bench)
    assert (says in found) if says else found == ""


def test_only_what_is_asked_for(bench, monkeypatch):
    monkeypatch.setattr(bench, "wanted", ["concise", "exclude_moon", "lowercase", "include_music"])
    assert length.lengths(bench) == (["conciseness"], ["concise"])
    assert (word_choice.words_to_include(bench), list(word_choice.contexts(bench))) == (["music"], ["moon"])
    assert word_choice.words_to_exclude(bench) == []
    assert composition.named_pairs(bench) == [] and composition.case_words(bench) == ["moon"]
