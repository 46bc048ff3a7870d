"""Likelihoods are those of one forward pass each, however many rows share a decode."""

from __future__ import annotations

import numpy as np
import pytest
from engines import GREEDY, open_engine, random_vector

from localsteer import bundled
from localsteer.errors import PromptError
from localsteer.runtime.forward import log_probabilities
from localsteer.runtime.likelihood import Likelihood, Row
from localsteer.tune import POSITIONS

EXACT = 1e-4  # F32 weights and cache; sums differ in their order alone
GELU_TABLE = 5e-4  # ggml looks GELU up by its argument in 16 bits: a sum that differs may fall into the next
N_VOCAB = 512


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


def one_by_one(engine, row: Row) -> np.ndarray:
    """The same from a forward pass of the row alone."""
    tokens = [*row.prompt, *row.reply]
    logits = engine.logits(tokens, steer=row.plan or (), n_prompt=len(row.prompt))
    values = log_softmax(logits[len(row.prompt) - 1 : -1])[np.arange(len(row.reply)), row.reply]
    return values if row.wanted is None else values[row.wanted]


def assert_equal_one_by_one(engine, rows, tolerance: float = EXACT) -> Likelihood:
    likelihood = Likelihood(engine)
    for row, values in zip(rows, likelihood(rows), strict=True):
        assert values.dtype == np.float64
        np.testing.assert_allclose(values, one_by_one(engine, row), atol=tolerance)
    return likelihood


@pytest.fixture(scope="module")
def engine():
    if not bundled.is_available():
        pytest.skip("this copy of the package holds no bundled model")
    path = bundled.gguf_path("instruct", "F32")
    with open_engine(path, n_ctx=192, n_seq_max=8) as engine:
        yield engine


@pytest.fixture(scope="module")
def asked(engine):
    """A prompt, and replies to it."""
    prompt = engine.prompt_tokens("Tell me about the fox.")
    texts = ("The fox is a small animal.", "The fox is red, and it sleeps.", '{"name": "fox"}')
    return prompt, [engine.model.tokenize(text, add_special=False, parse_special=False) for text in texts]


# --- the numbers ---


@pytest.mark.parametrize("positions", [None, *POSITIONS, "generation"])
def test_they_equal_the_log_softmax_of_each_row_alone(engine, asked, positions):
    prompt, replies = asked
    plan = positions and engine.plan(random_vector(engine, positions=positions))
    assert_equal_one_by_one(engine, [Row(prompt, reply, plan) for reply in replies])


def test_plans_of_all_kinds_go_together(engine, asked):
    prompt, replies = asked
    plans = [None] + [
        engine.plan(random_vector(engine, positions=positions, strength=strength, mode=mode))
        for positions in POSITIONS
        for strength, mode in ((1.0, "project"), (-0.5, "add"))
    ]
    rows = [Row(prompt, reply, plan) for plan in plans for reply in replies]
    assert_equal_one_by_one(engine, rows)
    steered, plain = (Likelihood(engine)([Row(prompt, replies[0], plan)])[0] for plan in (plans[-1], None))
    assert abs(steered - plain).max() > 0.1


def test_every_architecture_agrees(tiny_model):
    draw = np.random.default_rng(5)
    prompt = draw.integers(4, N_VOCAB, 12).tolist()
    replies = [draw.integers(4, N_VOCAB, n).tolist() for n in (1, 4, 9)]
    with open_engine(tiny_model.gguf_path, n_ctx=128) as engine:
        plan = engine.plan(random_vector(engine, positions="last"))
        rows = [Row(prompt, reply, steer) for reply in replies for steer in (None, plan)]
        assert_equal_one_by_one(engine, rows, GELU_TABLE if tiny_model.arch == "gemma2" else EXACT)


@pytest.mark.parametrize("options", [{"kv_unified": False}, {"n_seq_max": 1}, {"n_batch": 40}], ids=str)
def test_contexts_of_other_shapes_agree(tiny_llama, options):
    draw = np.random.default_rng(6)
    prompt = draw.integers(4, N_VOCAB, 20).tolist()
    rows = [Row(prompt, draw.integers(4, N_VOCAB, 8).tolist()) for _ in range(4)]
    with open_engine(tiny_llama.gguf_path, n_ctx=64, **options) as engine:
        assert_equal_one_by_one(engine, rows)


def test_wanted_tokens_alone_are_told(engine, asked):
    prompt, replies = asked
    wanted = np.zeros(len(replies[0]), bool)
    wanted[[0, 3]] = True
    row = Row(prompt, replies[0], wanted=wanted)
    likelihood = assert_equal_one_by_one(engine, [row])
    assert likelihood.n_tokens == len(prompt) + 3  # nothing after the last wanted one is read


def test_they_are_those_of_engine_score(engine, asked):
    prompt, replies = asked
    means = [values.mean() for values in Likelihood(engine)([Row(prompt, reply) for reply in replies])]
    np.testing.assert_allclose(means, engine.score([(prompt, reply) for reply in replies]), atol=EXACT)


def test_log_probabilities_of_large_logits_are_finite():
    logits = np.array([[1e4, -1e4, 0.0], [0.0, 0.0, 0.0]], np.float32)
    np.testing.assert_allclose(log_probabilities(logits, np.array([1, 2])), [-2e4, -np.log(3)], rtol=1e-6)
    assert log_probabilities(logits[:0], np.array([], int)).shape == (0,)


# --- what is computed ---


def test_the_prompt_is_computed_once_for_all_replies(engine, asked):
    prompt, replies = asked
    likelihood = Likelihood(engine)
    likelihood([Row(prompt, reply) for reply in replies])
    firsts = {tuple(reply[:n]) for reply in replies for n in range(1, len(reply))}
    assert likelihood.n_tokens == len(prompt) + len(firsts)  # the last token of a reply is never read


def test_plans_that_begin_at_the_last_token_share_what_is_before(engine, asked):
    prompt, (reply, *_) = asked
    rows = [
        Row(prompt, reply, engine.plan(random_vector(engine, positions="last", strength=strength)))
        for strength in (1.0, 2.0, 3.0)
    ]
    likelihood = Likelihood(engine)
    likelihood(rows)
    assert likelihood.n_tokens == len(prompt) - 1 + 3 * len(reply)


def test_progress_counts_rows(engine, asked):
    prompt, replies = asked
    seen = []
    rows = [Row(prompt, reply, plan) for reply in replies for plan in (None,)] * 5
    Likelihood(engine)(rows, on_progress=lambda *progress: seen.append(progress))
    assert seen[-1] == (15, 15)
    assert seen == sorted(seen) and len(seen) > 1  # 8 sequences go together


def test_the_engine_answers_as_before_afterwards(engine, asked):
    prompt, replies = asked
    before = engine.generate("Tell me about the fox.", max_tokens=12, sampling=GREEDY).text
    Likelihood(engine)([Row(prompt, reply) for reply in replies])
    assert engine.generate("Tell me about the fox.", max_tokens=12, sampling=GREEDY).text == before


# --- slips ---


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (Row([], [1]), "needs a prompt"),
        (Row([1], []), "needs a prompt"),
        (Row([1], [2, 3], wanted=np.zeros(2, bool)), "one wanted token"),
        (Row([1] * 100, [2] * 200), "do not fit into"),
    ],
)
def test_a_row_that_cant_be_is_one_line(engine, row, says):
    with pytest.raises(PromptError, match=says):
        Likelihood(engine)([Row([1, 2], [3]), row])


def test_no_rows_are_no_error(engine):
    assert Likelihood(engine)([]) == []
