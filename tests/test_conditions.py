"""The conditions ask what their names say, and the controls are as strong as what they are controls for."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import numpy as np
import pytest

from localsteer.catalog import Instruction, Query, alike, load_catalog
from localsteer.engine import Engine
from localsteer.evaluate.cells import CONDITIONS
from localsteer.evaluate.controls import applied_like, choose_others, mean_state, random_control
from localsteer.evaluate.runner import plain_replies, run_conditions, told_replies
from localsteer.extract import extract
from localsteer.perplexity import log_perplexities, perplexity
from localsteer.plan import Plan, PositionClass
from localsteer.runtime.reply import Reply
from localsteer.steering import apply_program
from localsteer.vector import ControlVector
from localsteer.verify.judge import ENDLESS, judge, share

N_LAYER, N_EMBD = 4, 32
CATALOG = load_catalog("bundled")
LOWERCASE, JSON = CATALOG.get("lowercase"), CATALOG.get("json")
QUERIES = [Query("Tell me about the fox.", "fox"), Query("Describe Rome.", "Rome"), Query("Hello.")]


def vector(seed: int = 1, **options) -> ControlVector:
    rng = np.random.default_rng(seed)
    directions = rng.standard_normal((N_LAYER, N_EMBD))
    norms = np.linalg.norm(directions, axis=1)
    given = {"layers": (2,), "name": "small", **options}
    return ControlVector(directions, 1.5 + norms, np.full(N_LAYER, 1.5), norms, norms, **given)


def reply(text: str, reason: str = "stop") -> Reply:
    return Reply(text, [1, 2, 3][: len(text)], reason)


class Recorder:
    """Says in its reply how it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, object]] = []

    def generate_batch(self, prompts: Sequence[str], *, steer=(), **_options) -> list[Reply]:
        steers = steer if len(steer) else [()] * len(prompts)
        self.asked += zip(prompts, steers, strict=True)
        return [reply("the fox runs." if each else "The fox runs.") for each in steers]

    def prompt_tokens(self, _prompt: str) -> list[int]:
        return [1]

    def score(self, pairs) -> list[float]:
        return [-2.0 for _ in pairs]


# --- conditions ---


def test_each_condition_asks_what_its_name_says() -> None:
    engine, small = Recorder(), vector()
    controls = {"random": vector(2), "other": vector(3)}
    outcomes = run_conditions(engine, LOWERCASE, small, QUERIES, controls=controls)
    assert tuple(outcomes) == CONDITIONS
    assert len(engine.asked) == len(CONDITIONS) * len(QUERIES)
    for k, name in enumerate(CONDITIONS):
        for (prompt, steer), query in zip(engine.asked[3 * k :][:3], QUERIES, strict=True):
            told = name in ("instructed", "both")
            assert prompt.startswith(query.text)
            assert (prompt != query.text) == told
            wanted = {"steered": small, "both": small, **controls}.get(name)
            assert steer == (() if wanted is None else (wanted,))
    assert outcomes["steered"].followed == 1.0
    assert outcomes["none"].followed == 0.0


def test_plain_replies_are_asked_for_once() -> None:
    engine = Recorder()
    plain = plain_replies(engine, QUERIES)
    outcomes = run_conditions(engine, LOWERCASE, vector(), QUERIES, plain=plain, scored=("none",))
    assert [prompt for prompt, _ in engine.asked].count("Hello.") == 2  # plain, steered
    assert list(outcomes) == ["none", "steered", "instructed", "both"]  # no control was given
    assert outcomes["none"].perplexity == pytest.approx(math.exp(2.0))
    assert outcomes["steered"].perplexity is None


def test_phrasings_are_taken_in_turn() -> None:
    engine = Recorder()
    run_conditions(engine, LOWERCASE, vector(), QUERIES, conditions=("instructed",), phrasings=("A.", "B."))
    assert [prompt.split()[-1] for prompt, _ in engine.asked] == ["A.", "B.", "A."]


def test_outcomes_are_json() -> None:
    outcomes = run_conditions(Recorder(), LOWERCASE, vector(), QUERIES)
    record = json.loads(json.dumps(outcomes["steered"].record()))
    assert record["n"] == 3 and record["followed"] == 1.0


# --- judging ---


def test_a_degenerate_reply_follows_nothing() -> None:
    looping = judge(LOWERCASE, QUERIES[0], reply("the fox " * 40))
    assert looping.verified is True
    assert looping.followed is False
    assert judge(LOWERCASE, QUERIES[0], reply("the fox runs.")).followed is True


def test_a_reply_that_had_to_end_and_did_not_is_degenerate() -> None:
    cut = reply("the fox runs", "length")
    assert judge(LOWERCASE, QUERIES[0], cut).degenerate is None
    assert judge(LOWERCASE, QUERIES[0], cut, must_end=True).degenerate == ENDLESS


def test_the_subject_is_looked_for_where_there_is_one() -> None:
    assert judge(LOWERCASE, QUERIES[0], reply("THE FOX RUNS.")).subject_kept is True
    assert judge(LOWERCASE, QUERIES[1], reply("the fox runs.")).subject_kept is False
    assert judge(LOWERCASE, QUERIES[2], reply("the fox runs.")).subject_kept is None


def test_without_a_verifier_nothing_is_said_about_following() -> None:
    judged = judge(Instruction("rhyme", ("Rhyme.",)), QUERIES[0], reply("The fox runs."))
    assert judged.verified is judged.followed is None
    assert judged.good


def test_shares_count_what_could_be_judged() -> None:
    assert share([True, None, False]) == 0.5
    assert share([None]) is None


def test_perplexity_skips_empty_replies() -> None:
    judged = [judge(LOWERCASE, QUERIES[0], reply(text)) for text in ("the fox runs.", "")]
    logs = log_perplexities(Recorder(), judged)
    assert logs == [2.0, None]
    assert perplexity(logs) == pytest.approx(math.exp(2.0))
    assert perplexity([None]) is None


# --- controls ---


@pytest.mark.parametrize("layers", [(2,), (1, 3)])
def test_a_random_control_is_as_long_and_as_far_as_the_vector(layers) -> None:
    plain_mean = np.random.default_rng(5).standard_normal((N_LAYER, N_EMBD))
    real = vector(layers=layers, positions="prompt", strength=0.7)
    control = random_control(real, plain_mean, seed=3)
    assert (control.layers, control.positions, control.strength) == (layers, "prompt", 0.7)
    for layer in layers:
        lengths = [np.linalg.norm(each.directions[layer]) for each in (real, control)]
        assert lengths[0] == pytest.approx(lengths[1], rel=1e-5)
        moved = [each.mean_with[layer] - each.mean_without[layer] for each in (real, control)]
        assert abs(moved[0]) == pytest.approx(moved[1], rel=1e-5)
        assert control.mean_without[layer] == pytest.approx(plain_mean[layer] @ control.unit(layer), abs=1e-5)


def test_both_move_a_mean_prompt_equally_far() -> None:
    """The state whose projections are the means: what `project` does to it has the same length for both."""
    real = vector()
    layer = real.layers[0]
    state = np.random.default_rng(6).standard_normal(N_EMBD)
    state += (real.mean_without[layer] - state @ real.unit(layer)) * real.unit(layer)
    plain_mean = np.tile(state, (N_LAYER, 1))
    moved = []
    for each in (real, random_control(real, plain_mean, seed=4)):
        program = Plan.from_vectors([each]).program(layer, PositionClass.LAST)
        x = state.astype(np.float32)[None]
        moved.append(float(np.linalg.norm(apply_program(x, program) - x)))
    assert moved[0] == pytest.approx(moved[1], rel=1e-4)


def test_random_controls_differ_by_their_seed_alone() -> None:
    plain_mean = np.zeros((N_LAYER, N_EMBD))
    first, again, second = (random_control(vector(), plain_mean, seed) for seed in (1, 1, 2))
    assert np.array_equal(first.directions, again.directions)
    assert abs(first.unit(2) @ second.unit(2)) < 0.7


def test_a_control_for_add_needs_no_mean() -> None:
    real = ControlVector(vector().directions, None, None, None, None, layers=(1,), mode="add")
    control = random_control(real, np.zeros((N_LAYER, N_EMBD)), seed=0)
    assert control.mode == "add"
    assert np.linalg.norm(control.directions[1]) == pytest.approx(
        np.linalg.norm(real.directions[1]), rel=1e-5
    )


def test_another_vector_stands_behind_a_learned_gate_as_long_as_the_first() -> None:
    """A gate belongs to its vector; what stands in its place is another direction, not another weight."""
    rng = np.random.default_rng(5)
    reader, writer = rng.standard_normal((2, N_EMBD))
    gate = ControlVector.from_gate(3, reader, 0.5, writer, mean_gate=0.25, n_layer=N_LAYER, strength=1.25)
    applied = applied_like(vector(2), gate)
    assert (applied.mode, applied.layers, applied.strength) == ("gate", (3,), 1.25)
    assert np.array_equal(applied.readers, gate.readers) and np.array_equal(applied.biases, gate.biases)
    np.testing.assert_allclose(applied.unit(3), vector(2).unit(3), atol=1e-6)
    assert np.linalg.norm(applied.directions[3]) == pytest.approx(
        np.linalg.norm(gate.directions[3]), rel=1e-5
    )
    own = ControlVector.from_gate(3, writer, 0.1, reader, mean_gate=0.5, n_layer=N_LAYER)
    assert np.array_equal(applied_like(own, gate).readers, own.readers)  # one that has a gate there keeps it


def test_another_vector_is_applied_where_and_as_the_first() -> None:
    applied = applied_like(vector(2), vector(1, layers=(3,), positions="last", strength=0.4))
    assert (applied.layers, applied.positions, applied.strength, applied.mode) == (
        (3,),
        "last",
        0.4,
        "project",
    )


# --- which other instruction ---


def told(**texts: str) -> dict[str, list[Reply]]:
    return {name: [reply(text)] for name, text in texts.items()}


SAID = told(
    json='{"name": "fox"}',
    lowercase="the fox is red. it runs. it hides.",
    uppercase="THE FOX IS RED. IT RUNS. IT HIDES.",
    postscript="The fox is red. It runs. It hides.\nP.S. Ask me more about fox.",
    concise="The fox is red, and it runs.",
    spanish="El fox es un animal muy fuerte, alegre y grande. Mucha gente habla de el fox.",
    german="Der Fuchs ist ein Tier und sehr stark. Viele Leute sprechen von Fuchs. Man findet es am See.",
)


def other_of(identifier: str, *others: str, seed: int = 0) -> str | None:
    candidates = [CATALOG.get(each) for each in others]
    found = choose_others([CATALOG.get(identifier)], candidates, SAID, QUERIES[:1], seed=seed)
    return found[0].id if found else None


def test_an_instruction_whose_replies_follow_this_one_is_no_control() -> None:
    # a postscript makes four sentences of three, and capitals hold capital words
    assert other_of("four_sentences", "postscript", "lowercase") == "lowercase"
    assert other_of("capital_words", "uppercase", "json") == "json"
    assert {other_of("no_comma", "uppercase", "concise", seed=seed) for seed in range(20)} == {"concise"}


def test_look_alikes_are_no_control() -> None:
    lengths = (
        "one_sentence",
        "two_sentences",
        "concise",
        "extremely_concise",
        "verbose",
        "extremely_verbose",
    )
    assert all(alike(CATALOG.get(a), CATALOG.get(b)) for a in lengths for b in lengths)
    assert alike(CATALOG.get("spanish"), CATALOG.get("german"))
    assert not alike(JSON, LOWERCASE)
    assert other_of("spanish", "german") is None


def test_the_choice_is_fixed_by_its_seed() -> None:
    others = ("json", "uppercase", "postscript", "concise", "spanish")
    assert other_of("lowercase", *others, seed=1) == other_of("lowercase", *reversed(others), seed=1)
    assert len({other_of("lowercase", *others, seed=seed) for seed in range(20)}) > 1


def test_a_told_model_has_the_phrasings_after_the_queries_in_turn() -> None:
    engine = Recorder()
    assert len(told_replies(engine, LOWERCASE, QUERIES)) == 3
    texts = [f"{query.text} {LOWERCASE.phrasings[i]}" for i, query in enumerate(QUERIES)]
    assert [asked[0] for asked in engine.asked] == texts


# --- on llama.cpp ---


def test_all_conditions_on_a_random_model(tiny_llama) -> None:
    with Engine(tiny_llama.gguf_path, n_ctx=256, n_threads=1, exact=True) as engine:
        queries = QUERIES[:2]
        vectors = [
            extract(engine, each, queries, n_pairs=2, mode="project").at(layer=1, positions="prompt")
            for each in (LOWERCASE, JSON)
        ]
        plain_mean = mean_state(engine, queries)
        assert plain_mean.shape == (tiny_llama.n_layer, tiny_llama.n_embd)
        controls = {"random": random_control(vectors[0], plain_mean, 1), "other": vectors[1]}
        outcomes = run_conditions(engine, LOWERCASE, vectors[0], queries, controls=controls, max_tokens=6)
        assert list(outcomes) == list(CONDITIONS)
        alone = run_conditions(engine, LOWERCASE, vectors[0], queries, conditions=("steered",), max_tokens=6)
        assert [row.reply.text for row in alone["steered"]] == [row.reply.text for row in outcomes["steered"]]
        for outcome in outcomes.values():
            assert outcome.n == 2
            assert outcome.perplexity > 1
