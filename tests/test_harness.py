"""localsteer in lm-evaluation-harness: the figures are the engine's, by the class and through the server."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from cli_runs import write_vector

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
pytest.importorskip("lm_eval", reason="the extra localsteer[harness] is not installed")

import lm_eval
from lm_eval.api.instance import Instance

import localsteer
from localsteer.errors import LocalsteerError

TASKS = Path(__file__).parents[1] / "examples" / "harness"
PAIRS = [("The fox", " sleeps"), ("The fox", " runs away"), ("", "Owls hunt at night.")]
needs_checkout = pytest.mark.skipif(not TASKS.is_dir(), reason="not run from a checkout")


@pytest.fixture
def open_model(tiny_llama):
    from localsteer.plugins.harness import HarnessModel

    opened = []

    def open_one(**settings):
        opened.append(HarnessModel(str(tiny_llama.gguf_path), **settings))
        return opened[-1]

    yield open_one
    for model in opened:
        model.engine.close()


def requests(kind, *arguments):
    return [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]


def log_softmax(logits):
    logits = logits.astype(np.float64)
    return (
        logits
        - np.log(np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1, keepdims=True))
        - (logits.max(axis=1, keepdims=True))
    )


def by_hand(engine, context, continuation, vectors=()):
    """(log-probability, greedy) of one pair, by a forward pass."""
    whole = engine.rendered_tokens(context + continuation)
    n = len(engine.rendered_tokens(context)) if context else 0
    if not context:  # the model's first token stands in for one
        n, bos = 1, engine.model.bos
        whole = whole if whole[0] == bos else [bos, *whole]
    scores = log_softmax(engine.logits(whole, steer=vectors, n_prompt=n))[n - 1 : -1]
    tokens = whole[n:]
    greedy = scores.argmax(axis=1).tolist() == tokens
    return sum(row[token] for row, token in zip(scores, tokens, strict=True)), greedy


@pytest.mark.parametrize("steered", [False, True])
def test_likelihoods_are_those_of_a_forward_pass(open_model, tiny_llama, tmp_path, steered):
    path = write_vector(tmp_path / "fox.gguf")
    vectors = [localsteer.ControlVector.load(path).at(positions="last", strength=0.7)] if steered else []
    arguments = {"steer": f"{path}:0.7", "positions": "last"} if steered else {}
    found = open_model(**arguments).loglikelihood(requests("loglikelihood", *PAIRS), disable_tqdm=True)
    with localsteer.Engine(tiny_llama.gguf_path) as engine:
        for (score, greedy), pair in zip(found, PAIRS, strict=True):
            expected, likeliest = by_hand(engine, *pair, vectors)
            assert score == pytest.approx(expected, abs=0.02) and greedy == likeliest


def test_the_likeliest_token_is_greedy(open_model):
    model = open_model()
    (tokens,) = (model.tok_encode("The fox sleeps"),)
    best = int(model.engine.logits(tokens)[-1].argmax())
    worst = int(model.engine.logits(tokens)[-1].argmin())
    found = model._loglikelihood_tokens([(None, tokens, [best]), (None, tokens, [worst])], disable_tqdm=True)
    assert [greedy for _, greedy in found] == [True, False]
    assert found[0][0] > found[1][0]


def test_a_long_text_is_scored_whole_and_in_windows(open_model):
    model = open_model(ctx_size=32)
    text = " ".join(f"word{i}" for i in range(40))
    (total,) = model.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)), disable_tqdm=True)
    tokens = model.tok_encode(text, add_special_tokens=False)
    assert len(tokens) > model.max_length
    assert -20 * len(tokens) < total < -len(tokens)
    (short,) = model.loglikelihood_rolling(requests("loglikelihood_rolling", ("word1",)), disable_tqdm=True)
    assert short == pytest.approx(by_hand(model.engine, "", "word1")[0], abs=0.02)


def test_what_does_not_fit_is_left_out_at_the_beginning(open_model):
    model = open_model(ctx_size=32)
    long = [5, 6, 7] * 40
    (whole, cut) = model._loglikelihood_tokens(
        [(None, long, [8]), (None, long[-32:], [8])], disable_tqdm=True
    )
    assert whole == cut
    with pytest.raises(LocalsteerError, match="continuation of 40 tokens"):
        model._loglikelihood_tokens([(None, [5], [8] * 40)], disable_tqdm=True)


def test_replies_are_greedy_and_end_before_a_stop_string(open_model, tiny_llama, tmp_path):
    path = write_vector(tmp_path / "fox.gguf")
    settings = {"until": [], "max_gen_toks": 8, "do_sample": False}
    model = open_model(steer=str(path))
    (text,) = model.generate_until(requests("generate_until", ("The fox", settings)), disable_tqdm=True)
    with localsteer.Engine(tiny_llama.gguf_path) as engine:
        vector = localsteer.ControlVector.load(path)
        greedy = localsteer.Sampling(temp=0)
        reply = engine.generate("The fox", raw=True, steer=vector, max_tokens=8, sampling=greedy)
    assert text == reply.text
    end = text[len(text) // 2]
    (short,) = model.generate_until(
        requests("generate_until", ("The fox", {**settings, "until": end})), disable_tqdm=True
    )
    assert short == text[: text.index(end)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"bogus": 1}, "there is no 'bogus'"),
        ({"steer": "nope"}, "unknown instruction"),
        ({"strength": 2}, "something to steer by"),
        ({"ctx_size": 100_000}, "was trained for"),
        ({"ctx_size": "x"}, "ctx_size must be a whole number, not 'x'"),
        ({"threads": 0}, "threads must be 1 or more"),
        ({"batch_size": 0}, "batch_size must be 1 or more"),
        ({"batch_size": 1.5}, "batch_size must be a whole number"),
        ({"max_gen_toks": -5}, "max_gen_toks must be 1 or more"),
        ({"steer": 5}, "steer must be a text"),
        ({"steer": "json", "strength": "high"}, "strength must be a number"),
        ({"steer": "json", "strength": float("nan")}, "strength must be a number"),
    ],
)
def test_arguments_that_make_no_sense_are_one_line(open_model, arguments, said):
    with pytest.raises(LocalsteerError, match=said):
        open_model(**arguments)


def test_generation_settings_that_are_not_there_are_refused(open_model):
    model = open_model()
    for settings, said in (
        ({"num_beams": 4}, "num_beams"),
        ({"max_gen_toks": 9999}, "leaves no room"),
        ({"max_gen_toks": "many"}, "max_gen_toks must be a whole number"),
        ({"max_gen_toks": -1}, "max_gen_toks must be 0 or more"),
        ({"temperature": "hot"}, "temperature must be a number"),
        ({"top_k": 2.5}, "top_k must be a whole number"),
        ({"top_k": 2**40}, "top_k must be a number up to"),
        ({"top_p": 5}, "top_p must be 0 to 1"),
        ({"until": 5}, "until must be a text"),
        ({"until": [None]}, "until must be a text"),
    ):
        with pytest.raises(LocalsteerError, match=said):
            model.generate_until(requests("generate_until", ("x", settings)), disable_tqdm=True)


def test_no_requests_are_no_replies_and_an_empty_continuation_is_named(open_model):
    model = open_model()
    for ask in (model.loglikelihood, model.loglikelihood_rolling, model.generate_until):
        assert ask([], disable_tqdm=True) == []
    assert model.loglikelihood_rolling(requests("loglikelihood_rolling", ("",)), disable_tqdm=True) == [0]
    for pair, said in (
        (("", ""), "the continuation is empty"),
        (("The fox", ""), "the continuation is empty"),
        (("The fox", 5), "5 is no text"),
        ((None, " sleeps"), "None is no text"),
    ):
        with pytest.raises(LocalsteerError, match=f"request 1: {said}"):
            model.loglikelihood(requests("loglikelihood", PAIRS[0], pair), disable_tqdm=True)


def test_a_context_of_blanks_is_read_with_the_continuation(open_model):
    model = open_model()
    blank, whole = model.loglikelihood(
        requests("loglikelihood", ("\n ", "Owls hunt."), ("", "\n Owls hunt.")), disable_tqdm=True
    )
    assert blank == whole


def test_replies_with_many_stop_strings_or_none(open_model):
    model = open_model()
    asked = [
        {"max_gen_toks": 6, "until": until}
        for until in (None, [], "", [""], [f"no {i}" for i in range(2000)], "x" * 50_000)
    ]
    replies = model.generate_until(
        requests("generate_until", *(("The fox", settings) for settings in asked)), disable_tqdm=True
    )
    assert len(set(replies)) == 1 and replies[0]
    (nothing,) = model.generate_until(
        requests("generate_until", ("The fox", {"max_gen_toks": 0})), disable_tqdm=True
    )
    assert nothing == ""


@needs_checkout
def test_the_harness_runs_our_tasks(tiny_llama, tmp_path):
    from lm_eval.tasks import TaskManager

    import localsteer.plugins.harness  # noqa: F401

    found = lm_eval.simple_evaluate(
        model="localsteer",
        model_args={"model": str(tiny_llama.gguf_path), "steer": str(write_vector(tmp_path / "fox.gguf"))},
        tasks=["reading", "reading_choice", "reading_text"],
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        apply_chat_template=True,
        limit=4,
        bootstrap_iters=0,
    )
    results = found["results"]
    assert {"names_it,none", "is_json,none"} <= results["reading"].keys()
    assert 0 <= results["reading_choice"]["acc,none"] <= 1
    assert results["reading_text"]["word_perplexity,none"] > 1


@needs_checkout
def test_every_question_s_answer_is_in_its_text():
    import json

    rows = [json.loads(line) for line in (TASKS / "reading.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) == 60
    for row in rows:
        assert (
            row["answer"].lower() in row["passage"].lower() and row["choices"][row["gold"]] == row["answer"]
        )


def test_through_the_server_the_figures_are_the_same(tmp_path):
    """`local-completions`, whose tokenizer is the checkpoint's, with the steering in the model's name. The
    vector steers all positions: to the server a text that is scored is prompt from end to end."""
    pytest.importorskip("fastapi", reason="the extra localsteer[serve] is not installed")
    pytest.importorskip("tenacity", reason="the extra localsteer[harness] is not installed")
    import serving

    from localsteer import bundled
    from localsteer.plugins.harness import HarnessModel

    if not bundled.is_available():
        pytest.skip("this copy of the package holds no bundled model")
    folder = tmp_path / "vectors"
    folder.mkdir()
    path = write_vector(folder / "fox.gguf", n_layer=8, n_embd=256, strength=0.3)
    pairs = [("Tell me about foxes.", " They hunt"), ("Owls", " are birds.")]
    with serving.serving(folder) as server:
        through = lm_eval.api.registry.get_model("local-completions")(
            base_url=f"{server.url}/v1/completions",
            model="bundled+fox",
            tokenizer_backend="huggingface",
            tokenizer=str(bundled.checkpoint_folder("instruct")),
        )
        found = through.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
        asked = (pairs[0][0], {"until": ["\n"], "max_gen_toks": 8})
        replies = through.generate_until(requests("generate_until", asked), disable_tqdm=True)
    model = HarnessModel(str(serving.model_path()), steer=str(path))
    own = model.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    assert [score for score, _ in found] == pytest.approx([score for score, _ in own], abs=0.05)
    assert replies == model.generate_until(requests("generate_until", asked), disable_tqdm=True)
    model.engine.close()
