"""A trace shows what really happened: its states are those of the model, its figures those of the oracle."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from engines import GREEDY, open_engine, random_vector

from localsteer import ControlVector, Engine, bundled
from localsteer.catalog import load_catalog
from localsteer.errors import LocalsteerError, MismatchError, PlanError, PromptError
from localsteer.extract import extract
from localsteer.plan import Plan, PositionClass
from localsteer.steering import dynamic_weights, steer
from localsteer.trace import Trace, looks, reply_tokens, trace, trace_tokens
from localsteer.trace.diagnosis import diagnose, repeated

PROMPT = "Tell me about foxes."
# the edit is computed in float64 and stored as float32, in rows whose length is a few hundred
CLOSE = {"rtol": 1e-5, "atol": 2e-3}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Iterator[Path]:
    if not bundled.is_available():
        pytest.skip("this copy of the package holds no bundled model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCALSTEER_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield bundled.gguf_path("instruct", "Q8_0")


@pytest.fixture(scope="module")
def engine(model) -> Iterator[Engine]:
    with open_engine(model, n_seq_max=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def vectors(model) -> dict[str, ControlVector]:
    catalog = load_catalog(bundled.CATALOG)
    made = {}
    for name in ("json", "lowercase", "one_sentence"):
        instruction = catalog.get(name)
        queries = catalog.queries_for(instruction, "extraction")
        made[name] = extract(model, instruction, queries, n_pairs=20, n_threads=1).at(mode="project")
    return made


@pytest.fixture(scope="module")
def locked(engine, vectors) -> Trace:
    return trace(engine, PROMPT, vectors["json"].at(layer=2, positions="all"), max_tokens=32)


@pytest.fixture(scope="module")
def late(engine, vectors) -> Trace:
    late = vectors["one_sentence"].at(layer=6, positions="prompt", mode="add")
    return trace(engine, PROMPT, late, max_tokens=32, layers="all")


def kinds(made: Trace) -> list[str]:
    return [finding.kind for finding in diagnose(made)]


# --- figures -----------------------------------------------------------------------------------------------


def test_a_steered_projection_is_at_its_target(locked):
    (line,) = locked.lines
    np.testing.assert_allclose(line.after, line.mean("with"), **CLOSE)
    np.testing.assert_allclose(line.target, line.mean("with"), rtol=1e-12)
    np.testing.assert_allclose(line.weight, line.after - line.before, **CLOSE)
    assert (line.weight > 50).all()


def test_tokens_are_those_of_the_prompt_and_the_greedy_reply(engine, vectors, locked):
    reply = engine.generate(PROMPT, steer=vectors["json"].at(layer=2), max_tokens=32, sampling=GREEDY)
    prompt = engine.prompt_tokens(PROMPT)
    assert list(locked.tokens) == [*prompt, *reply.tokens]
    assert (locked.n_prompt, locked.reply, locked.finish_reason) == (len(prompt), reply.text, "length")
    assert "".join(locked.pieces) == engine.render([{"role": "user", "content": PROMPT}]) + reply.text


@pytest.mark.parametrize("steered", [(1, 3), (3, 7), (0, 1)])
def test_states_and_weights_are_those_of_model_and_oracle(engine, vectors, steered):
    """Two vectors, two layers each: the state before an edit holds the edits below it, and only those."""
    pair = [vectors["json"].at(layer=steered, strength=0.7), vectors["lowercase"].at(layer=steered)]
    tokens = [*engine.prompt_tokens(PROMPT), *reply_tokens(engine, PROMPT, "the fox is a big city.")]
    n_prompt = len(engine.prompt_tokens(PROMPT))
    plan = Plan.from_vectors(pair)
    made = trace_tokens(engine, tokens, n_prompt, pair)
    for layer in steered:
        below = Plan([edit for edit in plan.edits if edit.layer < layer], n_embd=plan.n_embd)
        before = engine.hidden_states(tokens, [layer], steer=below, n_prompt=n_prompt)[:, 0]
        after = engine.hidden_states(tokens, [layer], steer=plan, n_prompt=n_prompt)[:, 0]
        np.testing.assert_allclose(steer(before, plan, layer, made.classes), after, rtol=1e-4, atol=1e-3)
        lines = [line for line in made.lines if line.layer == layer]
        units = np.stack([line.vector.unit(layer) for line in lines]).astype(np.float64)
        np.testing.assert_allclose([line.before for line in lines], units @ before.T, **CLOSE)
        np.testing.assert_allclose([line.after for line in lines], units @ after.T, **CLOSE)
        program = plan.program(layer, PositionClass.PROMPT)
        expected = dynamic_weights(before, program)
        for line in lines:
            (k,) = [k for k, z in enumerate(program.writers) if np.array_equal(z, line.vector.unit(layer))]
            np.testing.assert_allclose(line.weight, expected[:, k], **CLOSE)
    plain = engine.hidden_states(tokens, [steered[1]])[:, 0]
    np.testing.assert_allclose(made.lines[1].plain, plain @ made.lines[1].vector.unit(steered[1]), **CLOSE)


def test_two_vectors_at_one_layer_both_reach_their_targets(engine, vectors):
    pair = [vectors[name].at(layer=2, positions="prompt") for name in ("json", "lowercase")]
    made = trace(engine, PROMPT, pair, max_tokens=4)
    assert len(made.lines) == 2
    for line in made.lines:
        here = made.covers(line)
        np.testing.assert_allclose(line.after[here], line.mean("with"), **CLOSE)
        # the directions are not orthogonal: what one adds, the other must allow for
        assert np.abs(line.weight - (line.after - line.before))[here].max() > 1


def test_positions_that_are_not_steered_have_no_weight(engine, vectors):
    made = trace(engine, PROMPT, vectors["json"].at(layer=2, positions="prompt"), max_tokens=12)
    (line,) = made.lines
    reply = slice(made.n_prompt, len(made.tokens))
    assert (line.weight[reply] == 0).all() and np.isnan(line.target[reply]).all()
    np.testing.assert_array_equal(line.after[reply], line.before[reply])
    assert made.covers(line).tolist() == [True] * made.n_prompt + [False] * 12
    generation = trace(engine, PROMPT, vectors["json"].at(layer=2, positions="generation"), max_tokens=4)
    assert not generation.covers(generation.lines[0])[: made.n_prompt].any()
    assert generation.effect[made.n_prompt] == 0  # the first token is drawn from the prompt alone


def test_strength_zero_changes_nothing(engine, vectors):
    made = trace(engine, PROMPT, vectors["json"].at(layer=2, strength=0), max_tokens=8)
    (line,) = made.lines
    np.testing.assert_array_equal(line.before, line.plain)
    np.testing.assert_array_equal(line.after, line.plain)
    assert (line.weight == 0).all() and (made.effect[made.n_prompt :] == 0).all()
    assert not made.differs.any() and kinds(made) == ["idle"]
    assert made.reply == engine.generate(PROMPT, max_tokens=8, sampling=GREEDY).text


@pytest.mark.parametrize("strength", [0.5, -1.0])
def test_the_target_holds_the_strength(engine, vectors, strength):
    (line,) = trace(engine, PROMPT, vectors["json"].at(layer=1, strength=strength), max_tokens=4).lines
    np.testing.assert_allclose(
        line.target, line.before + strength * (line.mean("with") - line.before), **CLOSE
    )
    np.testing.assert_allclose(line.after, line.target, **CLOSE)


def test_add_has_a_weight_and_no_target(engine, vectors):
    vector = vectors["json"].at(layer=1, mode="add", strength=0.5)
    (line,) = trace(engine, PROMPT, vector, max_tokens=4).lines
    np.testing.assert_allclose(line.weight, 0.5 * np.linalg.norm(vector.directions[1]), rtol=1e-6)
    np.testing.assert_allclose(line.after - line.before, line.weight, **CLOSE)
    assert np.isnan(line.target).all()


def test_the_weight_of_a_gate_is_computed_for_each_token(engine):
    vector = random_vector(engine, layers=(1,), mode="add")
    reader = np.random.default_rng(5).normal(size=vector.n_embd) / 8
    gated = replace(
        vector, mode="gate", readers=np.tile(reader, (vector.n_layer, 1)), biases=np.ones(vector.n_layer)
    )
    made = trace(engine, PROMPT, [gated, vector.at(strength=0.5)], max_tokens=4)
    gate, added = made.lines
    read = slice(0, int(np.isfinite(gate.before).sum()))
    x = engine.hidden_states(made.tokens, [1])[read, 0].astype(np.float64)
    length = np.linalg.norm(vector.directions[1])
    wanted = (x @ reader / np.sqrt((x**2).mean(axis=1)) + 1) * length
    np.testing.assert_allclose(gate.weight[read], wanted, **CLOSE)
    np.testing.assert_allclose(added.weight[read], 0.5 * length, rtol=1e-6)
    np.testing.assert_allclose((gate.after - gate.before)[read], wanted + 0.5 * length, **CLOSE)
    assert np.isnan(gate.target).all()


def test_ablate_cap_and_one_sided_show(engine, vectors):
    (line,) = trace(engine, PROMPT, vectors["json"].at(layer=1, mode="ablate"), max_tokens=4).lines
    np.testing.assert_allclose(line.after, 0, atol=2e-3)
    (line,) = trace(engine, PROMPT, vectors["json"].at(layer=1, cap=7.0), max_tokens=4).lines
    np.testing.assert_allclose(line.weight, 7.0)
    (line,) = trace(
        engine, PROMPT, vectors["json"].at(layer=1, strength=-1.0, one_sided=True), max_tokens=4
    ).lines
    assert (line.weight == 0).all()  # the other way: a one-sided edit only ever raises


def test_the_effect_is_the_divergence_of_the_two_models(engine, vectors):
    vector = vectors["one_sentence"].at(layer=2, positions="last")
    made = trace(engine, PROMPT, vector, max_tokens=8)
    steered = engine.logits(made.tokens, steer=vector, n_prompt=made.n_prompt).astype(np.float64)
    plain = engine.logits(made.tokens).astype(np.float64)
    p, q = (np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for x in (steered, plain))
    divergence = (p * np.log(p / q)).sum(axis=1)
    reply = slice(made.n_prompt, None)
    np.testing.assert_allclose(made.effect[reply], divergence[made.n_prompt - 1 : -1], rtol=1e-3, atol=1e-5)
    assert np.isnan(made.effect[: made.n_prompt]).all()
    likeliest = plain.argmax(axis=1)[made.n_prompt - 1 : -1]
    assert made.plain_tokens[reply].tolist() == likeliest.tolist()
    assert made.steered_tokens[reply].tolist() == list(made.tokens[reply])  # greedy, and exact


def test_pieces_of_a_long_text_give_the_same(tiny_llama):
    with open_engine(tiny_llama.gguf_path) as whole, open_engine(tiny_llama.gguf_path, n_batch=8) as pieces:
        vector = random_vector(whole, layers=(1, 3))
        tokens = list(range(3, 33))
        one, many = (trace_tokens(engine, tokens, 11, vector, layers="all") for engine in (whole, pieces))
    for a, b in zip(one.lines, many.lines, strict=True):
        for name in ("plain", "before", "after", "target", "weight"):
            np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(one.effect, many.effect, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(one.effect_here, many.effect_here, rtol=1e-3, atol=1e-6)


def test_the_token_that_ends_the_reply_is_drawn_but_never_read(engine, vectors):
    made = trace(engine, PROMPT, vectors["one_sentence"].at(layer=2, positions="prompt"), max_tokens=64)
    assert made.finish_reason == "stop" and engine.ends(made.tokens[-1])
    (line,) = made.lines
    assert math.isnan(line.after[-1]) and not made.covers(line)[-1]
    assert made.effect[-1] > 1  # the plain model would have gone on: this is what the vector does
    assert not made.reply.endswith(made.pieces[-1])


def test_a_given_reply_is_traced_as_if_it_had_been_drawn(engine, vectors):
    vector = vectors["lowercase"].at(layer=2, positions="prompt")
    drawn = trace(engine, PROMPT, vector, max_tokens=10)
    given = trace(engine, PROMPT, vector, reply=drawn.reply)
    assert given.tokens == drawn.tokens and given.finish_reason == "given"
    np.testing.assert_array_equal(given.lines[0].after, drawn.lines[0].after)
    plain = engine.generate(PROMPT, max_tokens=10, sampling=GREEDY).text
    other = trace(engine, PROMPT, vector, reply=plain)
    assert other.reply == plain and other.effect[other.n_prompt] > 1 and other.differs[other.n_prompt]


def test_watched_layers_show_where_the_vector_would_act(late):
    assert [line.layer for line in late.lines] == list(range(8))
    assert [line.is_steered for line in late.lines] == [layer == 6 for layer in range(8)]
    reply = slice(late.n_prompt, None)
    np.testing.assert_allclose(late.effect_here[6], late.effect, rtol=1e-6, atol=1e-9)
    largest = late.effect_here[:, reply].max(axis=1)
    assert (largest[:4] > 5).all() and (largest[6:] < 0.5).all()
    for line in late.lines[:6]:
        np.testing.assert_array_equal(line.after, line.plain)
    assert (late.lines[7].after - late.lines[7].plain)[: late.n_prompt].min() > 50


# --- what it means -----------------------------------------------------------------------------------------


def test_a_reply_locked_at_its_start_is_called_so(locked):
    assert locked.reply.startswith('{"name": "{"name": "')
    finding = diagnose(locked)[0]
    assert finding.kind == "locked"
    assert "json at layer 2" in finding.text and "--positions prompt" in finding.text


def test_a_given_reply_that_loops_is_not_blamed_on_steering(engine, vectors, locked):
    made = trace(engine, PROMPT, vectors["json"].at(layer=2), reply=locked.reply)
    assert kinds(made) == ["acts"]


def test_the_same_vector_at_prompt_positions_is_not(engine, vectors):
    made = trace(engine, PROMPT, vectors["json"].at(layer=2, positions="prompt"), max_tokens=64)
    json.loads(made.reply)
    assert kinds(made) == ["acts"]


def test_a_late_layer_does_nothing_and_a_better_one_is_named(engine, vectors, late):
    (finding,) = diagnose(late)
    assert finding.kind == "no-effect"
    assert any(f"try --layer {layer}." in finding.text for layer in range(4)), finding.text
    vector = vectors["one_sentence"].at(layer=6, positions="prompt")
    (finding,) = diagnose(trace(engine, PROMPT, vector, max_tokens=32))
    assert finding.kind == "no-effect" and finding.text.endswith("Try another layer, an earlier one first.")


def test_a_weak_vector_and_one_at_its_target_are_told_apart(engine, vectors):
    weak = vectors["json"].at(layer=2, strength=0.001)
    assert kinds(trace(engine, PROMPT, weak, max_tokens=8)) == ["no-effect", "weak"]
    twice = vectors["json"].at(layer=(2, 3), positions="last")
    # a vector whose means say that the model is where it should be
    low = ControlVector(
        twice.directions, twice.mean_without, twice.mean_with, None, None, (2,), name="low", positions="last"
    )
    made = trace(engine, PROMPT, low, reply="")
    assert kinds(made) == ["at-target", "no-reply"]


def test_layers_that_hardly_tell_the_instruction_are_called_so(engine, vectors):
    vector = vectors["json"]
    wide = np.full(vector.n_layer, 1e4, np.float32)
    blurred = ControlVector(
        vector.directions, vector.mean_with, vector.mean_without, wide, wide, (2,), positions="prompt"
    )
    assert "overlap" in kinds(trace(engine, PROMPT, blurred, max_tokens=4))


def test_repetition_is_seen_inside_a_word():
    assert repeated((1, 2, 3)) == 0
    assert repeated(tuple(range(30))) == 0
    assert repeated((1, 2) * 15) > 0.9


# --- a document, colours, and bad input --------------------------------------------------------------------


def test_the_document_is_json_with_null_for_what_is_not_there(late):
    document = json.loads(json.dumps(late.to_dict(), allow_nan=False))
    n = len(late.tokens)
    assert [len(line[key]) for line in document["lines"] for key in ("before", "weight", "effect_here")] == [
        n
    ] * 24
    assert document["effect"][0] is None and document["lines"][0]["target"] == [None] * n
    assert document["tokens"][0] == {"id": late.tokens[0], "text": late.pieces[0], "class": "prompt"}
    assert [token["class"] for token in document["tokens"]].count("last") == 1
    assert document["tokens"][-1]["class"] == "generation" and "plain_text" in document["tokens"][-1]
    assert document["diagnosis"][0]["kind"] == "no-effect"


def test_shares_run_from_without_to_with(locked):
    (line,) = locked.lines
    np.testing.assert_allclose(line.share(np.array(line.scale)), [0, 1])
    assert looks.rgb(0) == looks.rgb(-3) != looks.rgb(1) == looks.rgb(9)
    assert looks.ink(0) == "#ffffff" and looks.ink(1) == "#000000"


def test_a_vector_without_means_is_scaled_by_what_was_seen(engine, vectors):
    imported = ControlVector(vectors["json"].directions, None, None, None, None, (2,), mode="add")
    (line,) = trace(engine, PROMPT, imported, max_tokens=4).lines
    low, high = line.scale
    assert low == min(line.plain) and high == max(line.after)


@pytest.mark.parametrize(
    ("text", "shown"), [(" fox\n", "·fox⏎"), ("", "·"), ("\x1b[31m", "�[31m"), ("a" * 20, "a" * 13 + "…")]
)
def test_tokens_are_shown_on_one_line_and_can_not_drive_a_terminal(text, shown):
    assert looks.visible(text) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(110.4, "110"), (99.96, "100"), (-38.26, "-38.3"), (0.041, "0.04"), (-0.001, "0.00"), (math.nan, "·")],
)
def test_numbers_are_short(value, shown):
    assert looks.number(value) == shown


def test_bad_input_is_refused(engine, vectors, tiny_llama):
    vector = vectors["json"].at(layer=2)
    with pytest.raises(PlanError, match="at least one"):
        trace(engine, PROMPT, [])
    with pytest.raises(PlanError, match="layer 8 is out of range"):
        trace(engine, PROMPT, vector, layers=[8])
    with pytest.raises(PromptError, match="n_prompt must be 1 to the 3 tokens"):
        trace_tokens(engine, [1, 2, 3], 4, vector)
    with pytest.raises(PromptError, match="tokens, and the context"):
        trace(engine, "foxes " * engine.n_ctx, vector)
    with pytest.raises(PromptError, match="max_tokens"):
        trace(engine, PROMPT, vector, max_tokens=-1)
    with open_engine(tiny_llama.gguf_path) as other, pytest.raises(MismatchError):
        trace(other, PROMPT, vector)


def test_a_model_that_breaks_down_is_an_error_not_a_picture(engine, vectors):
    with pytest.raises(LocalsteerError, match="no finite logits"):
        trace(engine, PROMPT, vectors["json"].at(layer=2, strength=1e38), reply="a fox")


def test_steered_layers_are_always_shown(engine, vectors):
    made = trace(engine, PROMPT, vectors["json"].at(layer=2), reply="a fox", layers=[0])
    assert [line.layer for line in made.lines] == [0, 2]


def test_pictures_that_can_not_be_written_are_refused(late, tmp_path):
    from localsteer.trace.html import write_page
    from localsteer.trace.plot import draw_trace

    with pytest.raises(LocalsteerError, match="can't be written"):
        write_page(late, tmp_path / "none" / "a.html")
    with pytest.raises(LocalsteerError, match="can't be drawn"):
        draw_trace(late, tmp_path / "a.docx")


@pytest.mark.parametrize("name", ["a.html", "a.png", "a.svg"])
def test_a_disk_that_fills_up_leaves_the_picture_before_and_nothing_else(late, tmp_path, name):
    from localsteer.trace.html import write_page
    from localsteer.trace.plot import draw_trace

    resource = pytest.importorskip("resource", reason="no limit of file sizes here")
    if name != "a.html":
        pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    write = write_page if name == "a.html" else draw_trace
    path, limits = tmp_path / name, resource.getrlimit(resource.RLIMIT_FSIZE)
    path.write_text("the one before")
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(LocalsteerError, match=rf"can't write .*{name} \(.*make room"):
            write(late, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [each.name for each in tmp_path.iterdir()] == [name] and path.read_text() == "the one before"
    write(late, path)
    assert path.stat().st_size > 1000
