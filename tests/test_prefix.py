"""Sequences of one decode share what they begin with, where token and edits are the same, and no more."""

from __future__ import annotations

import numpy as np
import pytest
from engines import open_engine, random_vector
from hypothesis import given, settings
from hypothesis import strategies as st

from localsteer.errors import LocalsteerError
from localsteer.plan import Plan, position_classes
from localsteer.runtime.prefix import TokenSequence, trees

ROOMY = {"n_sequences": 100, "n_tokens": 1000, "n_outputs": 1000}
N_VOCAB = 512


def sequence(tokens, n_prompt: int | None = None, plan: Plan | None = None) -> TokenSequence:
    """All tokens but the last are prompt by default; the last one's output is wanted."""
    n_prompt = len(tokens) if n_prompt is None else n_prompt
    classes = position_classes(np.arange(len(tokens)), n_prompt).tolist()
    return TokenSequence(tokens, classes, [len(tokens) - 1], plan)


def plan_of(n_layer: int = 4, n_embd: int = 64, positions: str = "all", **settings) -> Plan:
    class Shape:
        model = type("Model", (), {"n_layer": n_layer, "n_embd": n_embd})

    return Plan.from_vectors([random_vector(Shape, positions=positions, **settings)])


def nodes_of(*sequences: TokenSequence) -> int:
    return sum(len(tree.nodes) for tree in trees(sequences, **ROOMY))


# --- what is shared ---


def test_a_common_beginning_is_there_once():
    (tree,) = trees([sequence([1, 2, 3, 4]), sequence([1, 2, 3, 5]), sequence([1, 9])], **ROOMY)
    assert len(tree.nodes) == 4 + 1 + 1
    assert [node.token for node in tree.nodes if len(node.owners) == 3] == [1]
    assert sorted(node.token for node in tree.nodes if len(node.owners) == 2) == [2, 3]


def test_equal_tokens_after_a_difference_are_not_shared():
    assert nodes_of(sequence([1, 2, 3]), sequence([1, 9, 3])) == 5


def test_plans_share_up_to_the_first_token_that_they_treat_differently():
    prompt, reply = [5, 6, 7, 8], [1, 2]
    plain = sequence([*prompt, *reply], 4)
    expected = {"generation": 4, "last": 3, "prompt": 0, "all": 0}
    for positions, n_common in expected.items():
        steered = sequence([*prompt, *reply], 4, plan_of(positions=positions))
        assert nodes_of(plain, steered) == 12 - n_common, positions


def test_equal_plans_share_all_and_another_strength_none():
    weak, weak_too, strong = (plan_of(strength=strength) for strength in (1.0, 1.0, 2.0))
    assert nodes_of(sequence([1, 2, 3], plan=weak), sequence([1, 2, 3], plan=weak_too)) == 3
    assert nodes_of(sequence([1, 2, 3], plan=weak), sequence([1, 2, 3], plan=strong)) == 6


TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=6)


@settings(deadline=None)
@given(st.lists(TOKENS, min_size=1, max_size=12), st.integers(1, 4), st.integers(6, 12), st.integers(1, 4))
def test_every_path_spells_its_sequence_and_no_decode_goes_beyond_its_limits(
    token_lists, n_sequences, n_tokens, n_outputs
):
    sequences = [sequence(tokens) for tokens in token_lists]
    limits = {"n_sequences": n_sequences, "n_tokens": n_tokens, "n_outputs": n_outputs}
    seen = []
    for tree in trees(sequences, **limits):
        assert len(tree.paths) <= n_sequences
        assert len(tree.nodes) <= n_tokens
        assert len(tree.outputs) <= n_outputs
        for owner, (index, path) in enumerate(tree.paths):
            assert [tree.nodes[node].token for node in path] == token_lists[index]
            assert [tree.nodes[node].position for node in path] == list(range(len(path)))
            assert all(owner in tree.nodes[node].owners for node in path)
            seen.append(index)
    assert sorted(seen) == list(range(len(sequences)))


# --- in llama.cpp ---


def test_what_is_shared_changes_no_number(tiny_llama):
    draw = np.random.default_rng(3)
    prompt = draw.integers(4, N_VOCAB, 20).tolist()
    replies = [draw.integers(4, N_VOCAB, 5).tolist() for _ in range(3)]
    with open_engine(tiny_llama.gguf_path) as engine:
        plan = engine.plan(random_vector(engine, positions="generation"))
        sequences = [sequence([*prompt, *reply], 20, steer) for reply in replies for steer in (None, plan)]
        expected = [engine.logits(one.tokens, steer=one.plan or (), n_prompt=20)[-1] for one in sequences]
        for tree in trees(sequences, n_sequences=4, n_tokens=64, n_outputs=64):
            engine.begin()
            tree.decode(engine.context)
            logits = engine.context.all_logits()
            for index, rows in tree.rows_of(sequences):
                np.testing.assert_allclose(logits[rows[0]], expected[index], atol=1e-4)


def test_states_are_captured_at_the_outputs(tiny_llama):
    tokens = [[5, 6, 7, 8], [5, 6, 9]]
    with open_engine(tiny_llama.gguf_path) as engine:
        expected = [engine.hidden_states(one, [1, 3])[-1] for one in tokens]
        (tree,) = trees([sequence(one) for one in tokens], n_sequences=4, n_tokens=64, n_outputs=64)
        engine.begin()
        states = tree.decode(engine.context, capture=[1, 3]).states
        for index, (row,) in tree.rows_of([sequence(one) for one in tokens]):
            for k, layer in enumerate((1, 3)):
                np.testing.assert_allclose(states[layer][row], expected[index][k], atol=1e-4)


def test_a_token_of_two_sequences_is_refused_with_separate_caches(tiny_llama):
    with open_engine(tiny_llama.gguf_path, kv_unified=False) as engine:
        with pytest.raises(LocalsteerError, match="separate caches"):
            engine.context.decode([5], [0], [0], [True], also=[[1]])
        engine.context.decode([5], [0], [0], [True], also=[[]])


@pytest.mark.parametrize("also", [[[4]], [[-1]], [[1], [1]]])
def test_sequences_that_do_not_exist_are_refused(tiny_llama, also):
    with open_engine(tiny_llama.gguf_path) as engine, pytest.raises(LocalsteerError):
        engine.context.decode([5], [0], [0], [True], also=also)
