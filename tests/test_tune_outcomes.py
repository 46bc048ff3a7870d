"""How searches end: with nothing where nothing helps, with the best so far, and with a record of it."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from localsteer import bundled
from localsteer.catalog import Instruction, Query, load_catalog
from localsteer.errors import CatalogError, MismatchError, PlanError
from localsteer.tune import Setting, Trial, tune, tune_exhaustively
from localsteer.tune.exhaustive import grid
from localsteer.tune.record import BETTER, SAME, WORSE, Choice, with_instruction
from localsteer.tune.targets import Told
from localsteer.vector import ControlVector

CATALOG = load_catalog(bundled.CATALOG)
VALIDATION = CATALOG.queries["validation"]
SMALL = {"n": 2, "max_tokens": 96, "layers": (3, 7), "positions": ("prompt",)}


def imported(n_layer: int = 8, n_embd: int = 256) -> ControlVector:
    """Without mean projections, so that it can be added alone."""
    return ControlVector(np.ones((n_layer, n_embd)), None, None, None, None, (1,), mode="add")


@pytest.fixture
def small(exact_bundled, extracted):
    """A quick search for one of the extracted vectors."""

    def run(name: str, instruction: Instruction | None = None, **options):
        return tune(
            exact_bundled,
            extracted[name],
            instruction or CATALOG.get(name),
            VALIDATION,
            **{**SMALL, **options},
        )

    return run


# --- what is chosen ---


def test_only_what_was_asked_for_is_tried(small):
    tuned = small("title", layers=(2, 7), positions=("last", "prompt"), strengths=(1.5, -1.0))
    tried = {setting for setting, _ in tuned.ranking}
    assert {(setting.layer, setting.positions, setting.strength) for setting in tried} == {
        (layer, positions, strength)
        for layer in (2, 7)
        for positions in ("last", "prompt")
        for strength in (1.5, -1.0)
    }
    assert {trial.setting for trial in tuned.trials} <= tried
    assert tuned.setting.strength == 1.5


def test_modes_are_tried_side_by_side(small):
    tuned = small("title", modes=("project", "add"))
    assert {setting.mode for setting, _ in tuned.ranking} == {"project", "add"}
    assert {trial.setting.mode for trial in tuned.trials} == {"project", "add"}


def test_nothing_is_applied_where_nothing_beats_the_model_alone(small):
    """The vector of a title makes nobody write in small letters."""
    tuned = small("title", CATALOG.get("lowercase"))
    assert not tuned.helps and tuned.setting is None
    assert tuned.vector.strength == 0
    assert tuned.scores["steered"] == tuned.scores["none"] == 0
    assert tuned.scores["both"] is None and tuned.record["recovered_gap"] is None
    assert "no setting made the model follow lowercase more often" in tuned.advice[0]


def test_the_model_alone_wins_ties(small):
    easy = Instruction("calm", ("Begin with a title in brackets.",), verifier="keywords:forbidden_words",
                       kwargs={"forbidden_words": ["zeppelin"]})  # fmt: skip
    tuned = small("title", easy)
    assert tuned.setting is None and tuned.vector.strength == 0
    assert tuned.scores["none"] == 1
    assert any("these queries can't tell whether steering helps calm" in line for line in tuned.advice)


def test_an_instruction_without_a_verifier_gets_settings_and_says_so(small):
    free = replace(CATALOG.get("title"), verifier=None, kwargs={})
    tuned = small("title", free)
    assert tuned.helps and tuned.setting.layer in (3, 7)
    assert tuned.record["judged_by"] == "likelihood"
    assert tuned.record["recovered_gap"] > 0.5
    assert any("title has no verifier" in line for line in tuned.advice)
    assert small("title").record["judged_by"] == "verifier"


# --- stopped ---


def stopping_at(word: str):
    def report(what: str, _done: int, _total: int) -> None:
        if what.startswith(word):
            raise KeyboardInterrupt

    return report


def test_ctrl_c_before_anything_was_scored_goes_on_up(exact_bundled, small):
    with pytest.raises(KeyboardInterrupt):
        small("title", report=stopping_at("asking"))
    assert exact_bundled.generate("Tell me about the fox.", max_tokens=4).text


def test_ctrl_c_keeps_the_likeliest_setting(small):
    tuned = small("title", report=stopping_at("scoring"))
    assert tuned.stopped and tuned.record["stopped"]
    assert tuned.setting == tuned.ranking[0][0]
    assert tuned.vector.strength == tuned.setting.strength
    assert tuned.scores["steered"] is None
    assert tuned.advice[0].startswith("the search was stopped")
    assert any("no reply has been checked" in line for line in tuned.advice)
    assert not any("more often" in line for line in tuned.advice)


def test_ctrl_c_among_the_first_replies_of_the_check_keeps_it_too(small):
    n_reports = 0

    def report(what: str, _done: int, _total: int) -> None:
        nonlocal n_reports
        n_reports += what.startswith("checking")
        if n_reports == 5:  # the model's own four have come
            raise KeyboardInterrupt

    tuned = small("title", report=report)
    assert tuned.stopped and tuned.setting is not None
    assert tuned.scores["instructed"] == 1 and tuned.scores["steered"] is None


# --- what is kept and said ---


def test_the_file_keeps_what_it_was_chosen_by(small, tmp_path):
    tuned = small("title", source={"model": {"sha256": "ab"}})
    tuned.vector.save(tmp_path / "v.gguf")
    vector = ControlVector.load(tmp_path / "v.gguf")
    record = vector.provenance["validation"]
    assert record == json.loads(json.dumps(tuned.record))
    assert set(record["scores"]) == {"none", "steered", "instructed", "both"}
    assert record["model"] == {"sha256": "ab"} and record["n"] == 2 and record["search"] == "likelihood"
    assert record["recovered_gap"] > 0.5 and record["seconds"] > 0
    assert record["targets"] == {"n": 8, "asked": 8, "first": 8, "first_followed": 8}
    first = record["table"][0]
    assert (first["layer"], first["positions"], first["strength"]) == (
        tuned.setting.layer, tuned.setting.positions, tuned.setting.strength,
    )  # fmt: skip
    assert first["score"] == record["scores"]["steered"] and first["recovered_gap"] is not None
    assert vector.layers == (tuned.setting.layer,) and vector.strength == tuned.setting.strength
    assert vector.provenance["verifier"] == CATALOG.get("title").verifier


@pytest.mark.parametrize(
    ("told", "both", "said"),
    [(1.0, 0.875, SAME), (1.0, 0.75, WORSE), (0.5, 0.75, BETTER), (0.5, 0.625, SAME), (None, 1.0, None)],
)
def test_one_reply_of_eight_may_be_chance(told, both, said):
    assert with_instruction({"instructed": told, "both": both}, 8) == said


def told_to_the_user(**scores):
    """The advice where a setting was checked on eight queries, with these scores."""

    class Scored(Choice):
        @property
        def scores(self):
            return scores

    best, nothing = Trial(Setting(3, "all", 1.0), replies=[None] * 8), Trial(None, replies=[None] * 8)
    told = Told((object(),), 8, 8, 8, 72)
    return Scored(CATALOG.get("title"), best, [best], nothing, nothing, nothing, told).advice()


@pytest.mark.parametrize(
    ("scores", "says"),
    [
        ((0.0, 0.125, 0.125, 0.125), "only one reply of 8, which may be chance"),
        ((0.0, 0.5, 1.0, 1.0), "follows it more often (100%) than when steered (50%)"),
        ((0.0, 1.0, 1.0, 0.5), "don't steer prompts that already hold the instruction"),
        ((0.0, 1.0, 0.5, 1.0), "it also helps prompts that hold the instruction"),
    ],
)  # fmt: skip
def test_what_the_user_should_know_is_said(scores, says):
    names = dict(zip(("none", "steered", "instructed", "both"), scores, strict=True))
    assert any(says in line for line in told_to_the_user(**names))


def test_all_being_well_nothing_is_said():
    assert told_to_the_user(none=0.0, steered=1.0, instructed=1.0, both=1.0) == []


# --- slips ---


def test_a_vector_of_another_model_is_refused(exact_bundled):
    with pytest.raises(MismatchError, match="embedding width"):
        tune(exact_bundled, imported(n_embd=8), CATALOG.get("title"), VALIDATION)


# --- every setting by generation ---


def test_the_exhaustive_search_asks_every_setting_every_query(exact_bundled, extracted):
    seen = []
    tuned = tune_exhaustively(
        exact_bundled, extracted["no_comma"], CATALOG.get("no_comma"), VALIDATION[:3],
        layers=(3, 7), positions=("prompt",), strengths=(1.0,), max_tokens=112,
        report=lambda *progress: seen.append(progress[1:]),
    )  # fmt: skip
    assert tuned.setting == Setting(3, "prompt", 1.0)
    assert [trial.n for trial in tuned.trials] == [3, 3]
    assert tuned.record["search"] == "exhaustive" and tuned.record["replies"] == 3 * (2 + 3)
    assert tuned.scores["none"] == 0 and tuned.scores["steered"] >= 0.6
    assert seen == sorted(seen) and seen[-1] == (15, 15)


def test_it_needs_no_wording_but_a_verifier(exact_bundled, extracted):
    few = {"layers": (3,), "positions": ("prompt",), "strengths": (1.0,), "max_tokens": 112}
    mute = replace(CATALOG.get("no_comma"), phrasings=())
    tuned = tune_exhaustively(exact_bundled, extracted["no_comma"], mute, VALIDATION[:2], **few)
    assert tuned.helps and (tuned.scores["instructed"], tuned.scores["both"]) == (None, None)
    free = replace(CATALOG.get("no_comma"), verifier=None, kwargs={})
    with pytest.raises(CatalogError, match="has no verifier"):
        tune_exhaustively(exact_bundled, extracted["no_comma"], free, VALIDATION[:2], **few)
    with pytest.raises(PlanError, match="no validation queries"):
        tune_exhaustively(exact_bundled, extracted["no_comma"], mute, [], **few)


def test_modes_and_strengths_are_in_the_grid_together(extracted):
    settings = grid(extracted["title"], (1, 3), ("all",), ("project", "add"), (0.5, -2.0))
    assert len(settings) == len(set(settings)) == 8
    assert [setting.layer for setting in settings] == sorted(setting.layer for setting in settings)


@pytest.mark.parametrize("options", [{"layers": (8,)}, {"strengths": (0.0,)}, {"modes": ("project",)}])
def test_a_grid_that_cant_be_is_one_line(options):
    with pytest.raises(PlanError):
        grid(imported(), **{"modes": ("add",), **options})


def test_subjects_are_not_needed(small, exact_bundled, extracted):
    bare = [Query(query.text) for query in VALIDATION]
    tuned = tune(exact_bundled, extracted["title"], CATALOG.get("title"), bare, **SMALL)
    assert tuned.helps and tuned.trials[0].row()["subject_kept"] is None
