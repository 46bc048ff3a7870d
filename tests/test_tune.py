"""Tuning finds what works, gives nothing for a degenerate reply, and says when steering is no use."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from localsteer import bundled
from localsteer.catalog import Instruction, Query, load_catalog
from localsteer.engine import Engine
from localsteer.errors import CatalogError, MismatchError, PlanError
from localsteer.evaluate.best_first import STEP
from localsteer.evaluate.journal import Journal, Remembered
from localsteer.evaluate.judge import judge
from localsteer.evaluate.pick import Setting, Trial
from localsteer.evaluate.study import spread
from localsteer.evaluate.tune import (
    BETTER,
    IMPROBABLE,
    SAME,
    WORSE,
    Natural,
    _guard,
    grid,
    lowest_first,
    tune,
    with_instruction,
)
from localsteer.extract import extract
from localsteer.generate import GREEDY, Reply
from localsteer.plan import Plan
from localsteer.vector import ControlVector

N_LAYER, N_EMBD = 6, 8
TOLD = "Use small letters."
LOWERCASE = Instruction("lowercase", (TOLD,), verifier="change_case:english_lowercase")
NAMES = ("fox", "owl", "otter", "heron", "lynx", "wolf", "bear", "hare")
QUERIES = [Query(f"Tell me about the {name}.", name) for name in NAMES]
PLAIN = "The {} lives near the river, where many people see it."
LOOP = "the fox " * 40


def vector(**options) -> ControlVector:
    rng = np.random.default_rng(1)
    ones = np.ones(N_LAYER, np.float32)
    given = {"layers": (2,), "name": "small", **options}
    return ControlVector(rng.standard_normal((N_LAYER, N_EMBD)), ones, 0 * ones, ones, ones, **given)


class Planted:
    """A model whose replies are written down: small letters where `follows(edit, told)` says so, and whatever
    `spoils(edit, name, told)` returns in their place. edit: None for the model alone."""

    def __init__(self, follows, spoils=lambda _edit, _name, _told: None, cost=lambda _edit: 1.0) -> None:
        self.follows, self.spoils, self.cost = follows, spoils, cost
        self.n_asked = 0

    def plan(self, steer):
        return Plan.from_vectors([steer])

    def generate_batch(self, prompts, *, steer=(), **_options):
        steers = list(steer) if steer else [()] * len(prompts)
        self.n_asked += len(prompts)
        return [self._reply(*each) for each in zip(prompts, steers, strict=True)]

    def _reply(self, prompt: str, steer) -> Reply:
        plan = steer if isinstance(steer, Plan) else Plan.from_vectors(list(steer or ()))
        edit = plan.edits[0] if plan.edits else None
        name, told = prompt.split("the ")[1].split(".")[0], TOLD in prompt
        text = PLAIN.format(name)
        text = self.spoils(edit, name, told) or (text.lower() if self.follows(edit, told) else text)
        return Reply(text, [0 if edit is None else 1 + edit.layer] * 10, "stop")

    def prompt_tokens(self, prompt: str) -> list[int]:
        return [1, 2]

    def score(self, pairs) -> list[float]:
        return [-self.cost(reply[0]) for _, reply in pairs]


def told_or_at(*layers: int):
    return lambda edit, told: told or (edit is not None and edit.layer in layers)


# --- what is chosen ---


@pytest.mark.parametrize("quick", [False, True])
def test_the_planted_setting_is_found_and_written_down(quick) -> None:
    engine = Planted(lambda edit, told: told or (edit and (edit.layer, edit.positions) == (3, "last")))
    tuned = tune(engine, vector(), LOWERCASE, QUERIES, quick=quick)
    assert tuned.setting == Setting(3, "last", 1.0, "project")
    assert (tuned.vector.layers, tuned.vector.positions, tuned.vector.strength) == ((3,), "last", 1.0)
    assert tuned.scores == {"none": 0.0, "steered": 1.0, "instructed": 1.0, "both": 1.0}
    assert tuned.helps and tuned.advice == ()


def test_the_full_search_asks_every_setting_every_query() -> None:
    engine = Planted(told_or_at(2))
    tuned = tune(engine, vector(), LOWERCASE, QUERIES)
    assert all(len(trial.replies) == len(QUERIES) for trial in tuned.trials)
    assert len(tuned.trials) == 1 + 3 * N_LAYER
    assert tuned.record["replies"] == engine.n_asked == len(QUERIES) * (3 * N_LAYER + 3)


def test_the_quick_search_asks_for_less_than_half() -> None:
    full, quick = Planted(told_or_at(2)), Planted(told_or_at(2))
    tune(full, vector(), LOWERCASE, QUERIES)
    tuned = tune(quick, vector(), LOWERCASE, QUERIES, quick=True)
    assert tuned.setting.layer == 2
    assert quick.n_asked < 0.5 * full.n_asked
    assert tuned.record["replies"] == quick.n_asked
    asked = [trial for trial in tuned.trials if trial.replies]
    assert len(asked) < len(tuned.trials) == 1 + 3 * N_LAYER
    assert len(tuned.record["table"]) == len(asked)


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("when", [0, 7])
def test_one_degenerate_reply_makes_a_setting_worth_nothing(quick, when) -> None:
    def spoils(edit, name, _told):
        return LOOP if edit and edit.layer == 1 and name == NAMES[when] else None

    tuned = tune(Planted(told_or_at(1, 4), spoils), vector(), LOWERCASE, QUERIES, quick=quick)
    assert tuned.setting.layer == 4
    spoilt = [trial for trial in tuned.trials if trial.setting and trial.setting.layer == 1]
    assert all(trial.score == 0 for trial in spoilt if trial.n_degenerate)


def test_a_setting_that_has_looped_is_not_asked_again_by_the_quick_search() -> None:
    tuned = tune(
        Planted(told_or_at(0, 1, 2, 3, 4, 5), lambda edit, *_: LOOP if edit and edit.layer != 5 else None),
        vector(),
        LOWERCASE,
        QUERIES,
        quick=True,
    )
    assert {len(trial.replies) for trial in tuned.trials if trial.n_degenerate} == {STEP}
    assert tuned.setting.layer == 5


@pytest.mark.parametrize("quick", [False, True])
def test_the_model_alone_wins_ties(quick) -> None:
    tuned = tune(Planted(lambda _edit, _told: True), vector(), LOWERCASE, QUERIES, quick=quick)
    assert tuned.setting is None and not tuned.helps
    assert tuned.vector.strength == 0
    assert tuned.scores["none"] == tuned.scores["steered"] == 1.0
    assert tuned.scores["both"] is None
    assert "these queries can't tell whether steering helps lowercase" in tuned.advice[0]


@pytest.mark.parametrize("quick", [False, True])
def test_where_nothing_is_good_it_is_said_plainly(quick) -> None:
    engine = Planted(lambda _edit, told: told)
    tuned = tune(engine, vector(), LOWERCASE, QUERIES, quick=quick)
    assert tuned.setting is None and tuned.vector.strength == 0
    assert tuned.scores["none"] == tuned.scores["steered"] == 0.0
    assert tuned.advice == (
        "steering does not help lowercase on this model: no setting did better than the model alone (0%).",
    )
    everything = len(QUERIES) * (1 + 3 * N_LAYER)
    asked = sum(len(trial.replies) for trial in tuned.trials)
    assert asked == everything if not quick else asked <= 0.6 * everything


def test_then_the_lower_block_wins_and_then_the_likelier_replies() -> None:
    likely = Planted(told_or_at(2, 4), cost=lambda token: 1.0 if token == 5 else 1.5)
    assert tune(likely, vector(), LOWERCASE, QUERIES).setting.layer == 2
    trials = [Trial(Setting(2, each, 1.0), perplexity=cost) for each, cost in (("all", 3.0), ("last", 2.0))]
    assert min(trials, key=lowest_first).setting.positions == "last"


@pytest.mark.parametrize("quick", [False, True])
def test_fluent_nonsense_is_worth_nothing_either(quick) -> None:
    """Block 0 passes every check of form; the unsteered model finds its replies ten times as surprising."""
    engine = Planted(told_or_at(0, 3), cost=lambda token: 3.5 if token == 1 else 1.2)
    tuned = tune(engine, vector(), LOWERCASE, QUERIES, quick=quick)
    assert tuned.setting.layer == 3
    (worst,) = {reply.degenerate for trial in tuned.trials for reply in trial.replies} - {None}
    assert worst == IMPROBABLE


# --- what is said ---


def test_prompts_that_hold_the_instruction_may_be_spoilt() -> None:
    def spoils(edit, name, told):
        return PLAIN.format(name) if edit and told and name in NAMES[:4] else None

    tuned = tune(Planted(told_or_at(2), spoils), vector(), LOWERCASE, QUERIES)
    assert (tuned.scores["instructed"], tuned.scores["both"]) == (1.0, 0.5)
    assert tuned.record["with_instruction"] == WORSE
    assert any("do not use this file for prompts that already hold" in line for line in tuned.advice)


def test_prompts_that_hold_the_instruction_may_gain() -> None:
    tuned = tune(Planted(lambda edit, _told: edit and edit.layer == 2), vector(), LOWERCASE, QUERIES)
    assert (tuned.scores["instructed"], tuned.scores["both"]) == (0.0, 1.0)
    assert tuned.record["with_instruction"] == BETTER
    assert any("it helps prompts that hold the instruction, too" in line for line in tuned.advice)


@pytest.mark.parametrize(
    ("told", "both", "said"),
    [(1.0, 0.875, SAME), (1.0, 0.75, WORSE), (0.5, 0.75, BETTER), (0.5, 0.625, SAME), (None, 1.0, None)],
)
def test_one_reply_of_eight_may_be_chance(told, both, said) -> None:
    assert with_instruction({"instructed": told, "both": both}, 8) == said


def test_a_gain_of_one_reply_is_said_to_be_small() -> None:
    tuned = tune(
        Planted(lambda _edit, _told: False, lambda edit, name, _: PLAIN.format(name).lower()
                if edit and edit.layer == 2 and name == "fox" else None),
        vector(), LOWERCASE, QUERIES,
    )  # fmt: skip
    assert tuned.setting.layer == 2
    assert any("one reply of 8 alone, which may be chance" in line for line in tuned.advice)


def test_settings_that_only_degenerate_replies_ruled_out_are_named() -> None:
    tuned = tune(
        Planted(told_or_at(1), lambda edit, name, _told: LOOP if edit and name == "hare" else None),
        vector(),
        LOWERCASE,
        QUERIES,
    )
    assert tuned.setting is None
    assert "3 settings did, but not without degenerate replies" in tuned.advice[1]
    assert "block 1" in tuned.advice[1] and "88% good, 1 of 8 locked at its start" in tuned.advice[1]


def test_settings_that_the_quick_search_left_early_are_not_said_to_have_been_spoilt() -> None:
    """Block 1 follows once and loops once of its first two, no more often than the model alone in the end."""

    def spoils(edit, name, _told):
        if edit is None or edit.layer != 1:
            return PLAIN.format(name).lower() if edit is None and name in NAMES[5:] else None
        return LOOP if name == NAMES[1] else PLAIN.format(name).lower() if name == NAMES[0] else None

    for quick in (False, True):
        tuned = tune(Planted(lambda _edit, _told: False, spoils), vector(), LOWERCASE, QUERIES, quick=quick)
        assert tuned.setting is None
        assert not any("not without degenerate replies" in line for line in tuned.advice)


def test_a_model_that_loops_by_itself_is_said_to() -> None:
    tuned = tune(
        Planted(told_or_at(1), lambda _edit, name, _told: LOOP if name == "hare" else None),
        vector(),
        LOWERCASE,
        QUERIES,
    )
    assert any("the model alone gives a degenerate reply to 1 of 8" in line for line in tuned.advice)


def test_an_instruction_without_wording_is_tuned_without_it_in_the_prompt() -> None:
    unworded = Instruction("import", (), verifier=LOWERCASE.verifier)
    tuned = tune(Planted(told_or_at(2)), vector(), unworded, QUERIES)
    assert tuned.setting.layer == 2
    assert (tuned.scores["instructed"], tuned.scores["both"]) == (None, None)


def test_the_file_keeps_what_it_was_chosen_by(tmp_path) -> None:
    tuned = tune(Planted(told_or_at(2)), vector(), LOWERCASE, QUERIES, source={"model": {"sha256": "ab"}})
    tuned.vector.save(tmp_path / "v.gguf")
    record = ControlVector.load(tmp_path / "v.gguf").provenance["validation"]
    assert record == json.loads(json.dumps(tuned.record))
    assert record["model"] == {"sha256": "ab"} and record["n"] == 8 and record["search"] == "full"
    rows = [dict(zip(record["columns"], row, strict=True)) for row in record["table"]]
    assert len(rows) == 1 + 3 * N_LAYER
    assert (rows[0]["layer"], rows[0]["score"]) == (2, 1.0)
    assert ControlVector.load(tmp_path / "v.gguf").provenance["verifier"] == LOWERCASE.verifier


# --- the grid ---


def test_the_default_grid_is_the_papers() -> None:
    assert {setting.layer for setting in grid(vector())} == set(range(N_LAYER))
    assert {setting.strength for setting in grid(vector())} == {1.0}
    deep = ControlVector(np.ones((32, 4)), None, None, None, None, (1,), mode="add")
    found = grid(deep, modes=("add",))
    assert sorted({setting.layer for setting in found}) == list(range(6, 32, 2))
    assert len({setting.strength for setting in found}) > 3


def test_modes_and_strengths_are_searched_together() -> None:
    found = grid(vector(), (1, 3), ("all",), ("project", "add"), (0.5, 2.0))
    assert len(found) == len(set(found)) == 8
    assert [setting.layer for setting in found] == sorted(setting.layer for setting in found)
    engine = Planted(lambda edit, told: told or (edit and (edit.mode, edit.strength) == ("add", 2.0)))
    tuned = tune(
        engine, vector(), LOWERCASE, QUERIES, blocks=(1, 3), modes=("project", "add"), strengths=(1, 2)
    )
    assert tuned.setting == Setting(1, tuned.setting.positions, 2.0, "add")


@pytest.mark.parametrize("options", [{"blocks": (6,)}, {"strengths": (0.0,)}, {"modes": ("project",)}])
def test_a_grid_that_cant_be_is_one_line(options) -> None:
    imported = ControlVector(np.ones((N_LAYER, N_EMBD)), None, None, None, None, (1,), mode="add")
    with pytest.raises(PlanError):
        grid(imported, **{"modes": ("add",), **options})


def test_nothing_to_go_by_is_one_line() -> None:
    with pytest.raises(PlanError, match="no validation queries"):
        tune(Planted(told_or_at(2)), vector(), LOWERCASE, [])
    with pytest.raises(CatalogError, match="unknown instruction id"):
        tune(Planted(told_or_at(2)), vector(), Instruction("x", ("y",), verifier="a:b"), QUERIES)


def test_quick_loses_little_where_the_truth_is_known() -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "tune_quick.py"
    if not script.is_file():
        pytest.skip("not run from a checkout")
    spec = importlib.util.spec_from_file_location("tune_quick", script)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    found = benchmark.simulate(400, 8)
    assert found["quick"]["loss"] - found["full"]["loss"] < 0.005
    assert found["quick"]["same"] > 0.9
    assert found["quick"]["replies"] < 0.4 * found["full"]["replies"]
    assert found["quick"]["most_replies"] <= 0.5 * found["full"]["replies"]


# --- on llama.cpp ---


@pytest.fixture(scope="module")
def catalog():
    if not bundled.is_available():
        pytest.skip("this copy of the package holds no bundled model")
    return load_catalog(bundled.CATALOG)


@pytest.fixture(scope="module")
def engine(catalog):
    with Engine(bundled.gguf_path("instruct", "Q8_0"), n_ctx=256, n_threads=1, n_seq_max=8) as engine:
        yield Remembered(engine, Journal(None, {}))


def real_vector(engine, catalog, name: str) -> ControlVector:
    queries = catalog.queries["extraction"]
    return extract(engine._engine, catalog.get(name), queries, n_pairs=20, mode="project")


def queries_of(catalog, n: int = 4) -> list[Query]:
    return spread(catalog.queries["validation"], n)


def test_earlier_blocks_of_the_bundled_model_win_and_late_ones_do_not_help(engine, catalog) -> None:
    found = real_vector(engine, catalog, "no_comma")
    instruction, queries = catalog.get("no_comma"), queries_of(catalog)
    seen = []
    tuned = tune(
        engine, found, instruction, queries, blocks=(3, 7), positions=("prompt",), max_tokens=128,
        on_progress=lambda *each: seen.append(each),
    )  # fmt: skip
    assert tuned.setting == Setting(3, "prompt", 1.0, "project")
    assert tuned.scores["none"] == 0 and tuned.scores["steered"] >= 0.75
    assert tuned.scores["instructed"] >= 0.75 and tuned.scores["both"] >= 0.75
    assert seen[-1] == (4 * 5, 4 * 5) and seen == sorted(seen)
    late = tune(engine, found, instruction, queries, blocks=(7,), positions=("prompt",), max_tokens=128)
    assert late.setting is None and late.vector.strength == 0


def test_a_vector_of_another_model_is_refused(engine, catalog) -> None:
    with pytest.raises(MismatchError, match="embedding width"):
        tune(engine, vector(), catalog.get("lowercase"), queries_of(catalog))


def test_the_guard_sees_nonsense_that_form_lets_pass(engine, catalog) -> None:
    instruction, queries = catalog.get("lowercase"), queries_of(catalog)
    natural = Natural.ask(engine, instruction, queries, 128)
    assert natural.must_end and max(len(reply.tokens) for reply in natural.plain) < natural.limit < 128
    (told,) = engine.generate_batch(
        [f"{queries[0].text} {instruction.phrasings[0]}"], max_tokens=128, sampling=GREEDY
    )
    words = f"{queries[0].subject} carpet seven walks because river old music many".lower()
    nonsense = Reply(words, engine.model.tokenize(words, add_special=False, parse_special=False), "stop")
    trial = Trial(None, replies=[judge(instruction, queries[0], reply) for reply in (told, nonsense)])
    assert [reply.degenerate for reply in trial.replies] == [None, None]
    _guard(engine, trial, natural.most_surprising)
    assert [reply.degenerate for reply in trial.replies] == [None, IMPROBABLE]
