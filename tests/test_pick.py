"""Picking finds the setting that works, wastes no query, and leaves the model alone where nothing works."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localsteer.catalog import Instruction, Query
from localsteer.engine import Engine
from localsteer.errors import PlanError
from localsteer.evaluate.pick import (
    POSITIONS,
    ROUNDS,
    Round,
    Setting,
    default_blocks,
    halve,
    middle_blocks,
    pick,
    settings_of,
)
from localsteer.generate import Reply
from localsteer.plan import Plan
from localsteer.vector import ControlVector

N_LAYER, N_EMBD = 6, 8
LOWERCASE = Instruction("lowercase", ("Use small letters.",), verifier="change_case:english_lowercase")
QUERIES = [Query(f"Tell me about the {name}.", name) for name in ("fox", "owl", "otter", "heron", "lynx") * 5]
PLAIN = "The {} lives near the river, where many people see it."


def vector(**options) -> ControlVector:
    rng = np.random.default_rng(1)
    ones = np.ones(N_LAYER, np.float32)
    given = {"layers": (2,), "name": "small", **options}
    return ControlVector(rng.standard_normal((N_LAYER, N_EMBD)), ones, 0 * ones, ones, ones, **given)


class PlantedEngine:
    """Answers in small letters where `works(setting)` says so, and tells how likely replies are.

    cost: (layer) -> log-perplexity of replies steered there.
    """

    def __init__(self, works=lambda _edit: False, reply=str.lower, cost=lambda _layer: 1.0) -> None:
        self.works, self.reply, self.cost = works, reply, cost
        self.asked: list[tuple[str, bytes]] = []

    def generate_batch(self, prompts: Sequence[str], *, steer: Sequence[Plan | None], **_options):
        assert len(prompts) == len(steer)
        replies = []
        for prompt, plan in zip(prompts, steer, strict=True):
            edit = plan.edits[0] if plan else None
            self.asked.append((prompt, plan.key if plan else b""))
            text = PLAIN.format(prompt.split()[-1].strip("."))
            text = self.reply(text) if edit is not None and self.works(edit) else text
            replies.append(Reply(text, [edit.layer if edit else 0, 1], "stop"))
        return replies

    def prompt_tokens(self, prompt: str) -> list[int]:
        return [1, 2]

    def score(self, pairs) -> list[float]:
        return [-self.cost(reply[0]) for _, reply in pairs]


# --- what is chosen ---


def test_the_planted_setting_is_chosen() -> None:
    engine = PlantedEngine(lambda edit: (edit.layer, edit.positions) == (3, "all"))
    picked = pick(engine, vector(), LOWERCASE, QUERIES)
    assert picked.setting == Setting(3, "all", 1.0, "project")
    assert (picked.vector.layers, picked.vector.positions, picked.vector.strength) == ((3,), "all", 1.0)
    assert picked.table[0]["score"] == 1.0
    assert not picked.notice
    json.dumps(picked.table)


def test_among_equals_the_likeliest_replies_win_then_the_lowest_block() -> None:
    likeliest = PlantedEngine(lambda _: True, cost=lambda layer: 1.0 if layer in (2, 4) else 3.0)
    few = {"blocks": (2, 4, 5), "positions": ("prompt",)}
    assert pick(likeliest, vector(), LOWERCASE, QUERIES, **few).setting.layer == 2
    few = {"blocks": (1, 3), "positions": ("prompt",)}
    assert pick(PlantedEngine(lambda _: True), vector(), LOWERCASE, QUERIES, **few).setting.layer == 1


def test_ties_of_the_first_rounds_leave_a_spread_of_settings() -> None:
    """The likeliest replies would be those of settings that hardly steer."""
    engine = PlantedEngine(lambda _: True, cost=lambda layer: layer)
    picked = pick(engine, vector(), LOWERCASE, QUERIES, rounds=(Round(99, 2), Round(4, 8)))
    longest = [row for row in picked.table if row["n"] == 8 and row["mode"]]
    assert len(longest) == 4
    assert len({row["layer"] for row in longest}) == 4
    assert len({row["positions"] for row in longest}) > 1


def test_the_model_alone_wins_where_nothing_helps() -> None:
    picked = pick(PlantedEngine(), vector(), LOWERCASE, QUERIES)
    assert picked.setting is None
    assert picked.vector.strength == 0
    assert picked.table[0]["layer"] is None
    assert "lowercase" in picked.notice


def test_the_model_alone_wins_against_settings_that_only_equal_it() -> None:
    passed_anyway = Instruction("no_question", ("Ask nothing.",), verifier="keywords:forbidden_words",
                           kwargs={"forbidden_words": ["question"]})  # fmt: skip
    assert pick(PlantedEngine(lambda _: True), vector(), passed_anyway, QUERIES).setting is None


@pytest.mark.parametrize(
    "spoilt",
    [lambda text: "the fox " * 40, lambda text: "", lambda text: "the bear is here, it sleeps by the river."],
    ids=["a loop", "nothing", "another subject"],
)
def test_a_reply_that_passes_the_verifier_alone_does_not_count(spoilt) -> None:
    engine = PlantedEngine(lambda edit: True, reply=spoilt)
    assert pick(engine, vector(), LOWERCASE, QUERIES).setting is None


def test_a_reply_without_end_does_not_count_where_it_must_end() -> None:
    class Endless(PlantedEngine):
        def generate_batch(self, *args, **options):
            return [
                Reply(each.text, each.tokens, "length") for each in super().generate_batch(*args, **options)
            ]

    engine = Endless(lambda _: True)
    assert pick(engine, vector(), LOWERCASE, QUERIES, must_end=True).setting is None
    assert pick(engine, vector(), LOWERCASE, QUERIES).setting is not None


def test_queries_need_no_subject() -> None:
    queries = [Query(query.text) for query in QUERIES]
    picked = pick(PlantedEngine(lambda edit: edit.layer == 1), vector(), LOWERCASE, queries)
    assert picked.setting.layer == 1
    assert picked.table[0]["subject_kept"] is None


def test_without_a_verifier_the_papers_default_is_taken_and_said() -> None:
    engine = PlantedEngine()
    picked = pick(engine, vector(), Instruction("rhyme", ("Answer in rhyme.",)), QUERIES)
    assert picked.setting == Setting(N_LAYER // 2, "all", 1.0, "project")
    assert not engine.asked
    assert "default" in picked.notice


def test_choices_are_restricted_as_asked() -> None:
    engine = PlantedEngine(lambda _: True)
    choice = {"blocks": range(2, 4), "positions": ("last",), "strengths": (0.5, 2.0)}
    picked = pick(engine, vector(), LOWERCASE, QUERIES, **choice)
    tried = {(row["layer"], row["positions"], row["strength"]) for row in picked.table if row["mode"]}
    assert tried == {(layer, "last", strength) for layer in (2, 3) for strength in (0.5, 2.0)}


def test_blocks_without_a_direction_are_left_out() -> None:
    directions = np.zeros((N_LAYER, N_EMBD))
    directions[4] = 1
    assert {each.layer for each in settings_of(_only(directions, 4))} == {4}
    with pytest.raises(PlanError, match="no direction"):
        settings_of(_only(directions, 4), blocks=range(4))


def _only(directions: np.ndarray, layer: int) -> ControlVector:
    ones = np.ones(N_LAYER)
    return ControlVector(directions, ones, 0 * ones, ones, ones, layers=(layer,))


def test_queries_are_needed() -> None:
    with pytest.raises(PlanError, match="validation queries"):
        pick(PlantedEngine(), vector(), LOWERCASE, [])


def test_no_reply_is_asked_for_twice() -> None:
    engine = PlantedEngine(lambda edit: edit.layer > 2)
    pick(engine, vector(), LOWERCASE, [Query(f"Tell me about fox {i}.") for i in range(30)])
    assert len(engine.asked) == len(set(engine.asked))


def test_grids() -> None:
    assert default_blocks(8) == range(8)
    assert default_blocks(28) == range(5, 28, 2)
    assert list(middle_blocks(8)) == [2, 3, 4, 5]
    assert list(middle_blocks(28)) == list(range(7, 21))


# --- successive halving on a table ---


def run_on(table: np.ndarray, rounds: Sequence[Round] = ROUNDS) -> tuple[list[int], np.ndarray]:
    """table: (candidates, queries) of outcomes. Returns the order and how often each cell was tried."""
    tried = np.zeros(table.shape, int)

    def run(cells) -> None:
        for cell in cells:
            tried[cell] += 1

    def rank(live, _keep) -> list[int]:
        return sorted(live, key=lambda i: (-table[i][tried[i] > 0].mean(), i))

    return halve(*table.shape, rounds, run, rank), tried


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=40, unique=True))
@settings(max_examples=60, deadline=None)
def test_halving_loses_nothing_where_queries_agree(scores: list[int]) -> None:
    table = np.repeat(np.array(scores, float)[:, None], 24, axis=1)
    order, _ = run_on(table)
    assert order[0] == int(np.argmax(scores))
    assert sorted(order) == list(range(len(scores)))


def test_halving_finds_a_good_candidate_among_noisy_ones() -> None:
    rng = np.random.default_rng(2)
    regrets = []
    for _ in range(200):
        chances = rng.random(17) ** 2
        table = (rng.random((17, 24)) < chances[:, None]).astype(float)
        order, tried = run_on(table)
        regrets.append(chances.max() - chances[order[0]])
        assert tried.max() == 1
        assert tried.sum() <= 0.5 * table.size
    assert np.mean(regrets) < 0.08


def test_the_model_alone_is_tried_on_every_query_of_the_winner() -> None:
    order, tried = run_on(np.random.default_rng(0).random((17, 48)))
    assert tried[0].sum() == tried[order[0]].sum() == ROUNDS[-1].n_queries


def test_few_queries_are_no_error() -> None:
    order, tried = run_on(np.random.default_rng(0).random((5, 2)))
    assert sorted(order) == list(range(5))
    assert (tried == 1).all()


# --- on llama.cpp ---


def test_picking_on_a_random_model_leaves_it_alone(tiny_llama) -> None:
    rng = random.Random(0)
    direction = np.array(
        [[rng.gauss(0, 1) for _ in range(tiny_llama.n_embd)] for _ in range(tiny_llama.n_layer)]
    )
    ones = np.ones(tiny_llama.n_layer)
    steering = ControlVector(direction, 4 * ones, 0 * ones, ones, ones, layers=(1,))
    json_only = Instruction("json", ("Answer in JSON.",), verifier="detectable_format:json_format")
    with Engine(tiny_llama.gguf_path, n_ctx=128, n_threads=1) as engine:
        picked = pick(engine, steering, json_only, QUERIES[:3], max_tokens=8)
    assert picked.setting is None
    assert len(picked.table) == 1 + len(POSITIONS) * tiny_llama.n_layer
