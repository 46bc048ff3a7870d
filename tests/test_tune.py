"""Settings are found by likelihood, decided by replies, and a search that finds nothing says why."""

from __future__ import annotations

import numpy as np
import pytest
from bundled_vectors import open_bundled

from localsteer import ControlVector, bundled
from localsteer.catalog import Instruction, load_catalog
from localsteer.errors import CatalogError, PlanError, PromptError
from localsteer.extract import extract
from localsteer.runtime.likelihood import Likelihood
from localsteer.runtime.sampling import GREEDY
from localsteer.tune import Setting, tune, tune_exhaustively
from localsteer.tune.check import Check
from localsteer.tune.replies import GIVEN_UP, Asked, replies_to
from localsteer.tune.score import Score
from localsteer.tune.search import STRENGTHS, Search, candidates
from localsteer.tune.targets import ENOUGH, Telling
from localsteer.tune.tuning import split
from localsteer.verify.judge import judge

pytestmark = pytest.mark.skipif(not bundled.is_available(), reason="this copy has no bundled model")

CATALOG = load_catalog(bundled.CATALOG)
VALIDATION = CATALOG.queries["validation"]
MAX_TOKENS = 112


@pytest.fixture(scope="module")
def engine():
    with open_bundled(n_seq_max=16, n_ctx=256, n_threads=None) as opened:
        yield opened


@pytest.fixture(scope="module")
def vectors(engine) -> dict[str, ControlVector]:
    queries = CATALOG.queries["extraction"]
    return {
        name: extract(engine, CATALOG.get(name), queries, n_pairs=20, mode="project")
        for name in ("lowercase", "one_sentence")
    }


def told(engine, name: str, n: int = 8):
    return Telling(engine, CATALOG.get(name), VALIDATION[:n], max_tokens=MAX_TOKENS).collect(
        Likelihood(engine)
    )


@pytest.fixture(scope="module")
def lowercase_told(engine):
    return told(engine, "lowercase")


# --- targets ---


def test_targets_are_replies_that_follow(engine, lowercase_told) -> None:
    assert lowercase_told.n == 8 and lowercase_told.n_passed >= ENOUGH
    assert (
        len(lowercase_told.targets)
        == lowercase_told.n_passed
        == lowercase_told.n_asked - (8 - lowercase_told.n_passed)
    )
    for target in lowercase_told.targets:
        text = engine.text(target.reply)
        assert text == text.lower()


def test_telling_recovers_all_of_the_gap_and_the_plain_model_none(lowercase_told) -> None:
    for target in lowercase_told.targets:
        assert target.recovered(target.base + target.gap) == pytest.approx(1.0)
        assert target.recovered(target.base) == 0.0
        assert target.damage(target.base) == 0.0 or (target.gap < 0).any()
        assert target.damage(target.base + np.minimum(target.gap, 0.0)) == 0.0


def test_what_breaks_a_reply_is_damage(lowercase_told) -> None:
    target = max(lowercase_told.targets, key=lambda target: (target.weights == 0).sum())
    assert (target.weights == 0).any()
    assert target.damage(target.base - 5.0) > 3.0


def test_a_model_that_does_not_follow_when_told_is_asked_in_other_ways_and_then_given_up(engine) -> None:
    impossible = Instruction(
        "impossible",
        ("Be nice.", "Please be nice."),
        verifier="keywords:existence",
        kwargs={"keywords": ["qzxqzx"]},
    )
    vector = extract(
        engine, CATALOG.get("lowercase"), CATALOG.queries["extraction"], n_pairs=4, mode="project"
    )
    tuned = tune(engine, vector, impossible, VALIDATION, n=4, max_tokens=32)
    assert tuned.setting is None and tuned.vector.strength == 0 and not tuned.helps
    assert tuned.record["targets"] == {"n": 0, "asked": 24, "first": 8, "first_followed": 0}
    (line,) = tuned.advice
    assert "in none of 24 replies when told to" in line and "nothing is applied" in line


def test_the_check_has_other_questions_than_the_targets() -> None:
    for n_queries, n in ((40, 8), (40, 30), (5, 8), (2, 1)):
        asked, checked = split(VALIDATION[:n_queries], n)
        assert not set(asked) & set(checked)
        assert len(asked) + len(checked) == n_queries and len(checked) == min(n, n_queries // 2)
    assert split(VALIDATION[:1], 8) == (VALIDATION[:1], VALIDATION[:1])


# --- replies ---


def test_a_reply_that_has_failed_is_given_up_and_the_verdict_is_the_same(engine) -> None:
    instruction = CATALOG.get("lowercase")
    queries = VALIDATION[:6]
    short = replies_to(
        engine, instruction, [Asked(query.text, query) for query in queries], max_tokens=MAX_TOKENS
    )
    whole = engine.generate_batch([query.text for query in queries], max_tokens=MAX_TOKENS, sampling=GREEDY)
    assert all(reply.finish_reason == GIVEN_UP for reply in short)
    assert sum(len(reply.tokens) for reply in short) < sum(len(reply.tokens) for reply in whole) / 2
    for query, early, late in zip(queries, short, whole, strict=True):
        assert late.tokens[: len(early.tokens)] == early.tokens
        assert judge(instruction, query, early).followed == judge(instruction, query, late).followed


# --- score and search ---


def scored(engine, vector, targets, **options) -> Search:
    return Search(Score(Likelihood(engine), vector, targets), range(engine.model.n_layer), **options)


def test_a_strong_setting_recovers_more_than_a_weak_one(engine, vectors, lowercase_told) -> None:
    score = Score(Likelihood(engine), vectors["lowercase"], lowercase_told.targets)
    weak, strong = (Setting(3, "prompt", strength) for strength in (0.1, 1.0))
    score.extend([weak, strong], 4)
    assert score.gap(strong) > 0.5 > score.gap(weak)
    before = score._likelihood.n_tokens
    score.extend([weak, strong], 4)
    assert score._likelihood.n_tokens == before  # nothing is computed twice


def test_the_search_keeps_to_what_was_asked_for(engine, vectors, lowercase_told) -> None:
    search = Search(
        Score(Likelihood(engine), vectors["lowercase"], lowercase_told.targets),
        [1, 5],
        positions=("last",),
        strengths=(-1.0, 0.5),
        modes=("project", "add"),
    )
    ranking = search.run()
    assert {setting.layer for setting in ranking} == {1, 5}
    assert {setting.positions for setting in ranking} == {"last"}
    assert {setting.strength for setting in ranking} == {-1.0, 0.5}
    assert {setting.mode for setting in ranking} == {"project", "add"}


def test_the_line_search_stays_on_its_line_and_finds_the_region(engine, vectors, lowercase_told) -> None:
    search = scored(engine, vectors["lowercase"], lowercase_told.targets)
    ranking = search.run()
    assert {setting.strength for setting in ranking} <= set(STRENGTHS)
    assert search.score.gap(ranking[0]) > 0.6
    # a fraction of all settings, and among the best of them
    assert len(ranking) < engine.model.n_layer * 3 * len(STRENGTHS) / 2


def test_kinds_take_turns_and_neighbours_are_left_out() -> None:
    ranking = [
        Setting(5, "all", 1.0), Setting(6, "all", 1.0), Setting(9, "all", 1.0), Setting(5, "prompt", 2.0),
        Setting(2, "last", 1.0),
    ]  # fmt: skip
    assert candidates(ranking, 4) == [ranking[0], ranking[3], ranking[4], ranking[2]]


# --- the check, and the whole ---


def test_nothing_is_asked_twice(engine, vectors) -> None:
    check = Check(
        engine, vectors["lowercase"], CATALOG.get("lowercase"), VALIDATION[:4], max_tokens=MAX_TOKENS
    )
    check.ask_model()
    assert check.n_replies == 8 and check.plain.score == 0 and check.told.score >= 0.75
    setting = Setting(3, "prompt", 1.0)
    (trial,) = check.ask([setting], 2)
    assert (trial.n, check.n_replies) == (2, 10)
    check.ask([setting])
    check.ask([setting])
    assert (trial.n, check.n_replies) == (4, 12)
    assert trial.score >= 0.75


@pytest.mark.parametrize("name", ["lowercase", "one_sentence"])
def test_a_setting_that_works_is_found_and_kept(engine, vectors, name, tmp_path) -> None:
    tuned = tune(engine, vectors[name], CATALOG.get(name), VALIDATION, max_tokens=MAX_TOKENS)
    assert tuned.helps and tuned.scores["none"] <= 0.25
    assert tuned.scores["steered"] >= 0.75 and tuned.scores["both"] is not None
    tuned.vector.save(tmp_path / "v.gguf")
    record = ControlVector.load(tmp_path / "v.gguf").provenance["validation"]
    assert set(record["scores"]) == {"none", "steered", "instructed", "both"}
    assert record["n"] == 8 and record["recovered_gap"] > 0.4 and record["seconds"] > 0
    assert record["judged_by"] == "verifier" and len(record["table"]) == len(tuned.trials)
    assert tuned.trials[0].setting == tuned.setting


def test_the_search_is_not_far_from_the_exhaustive_one(engine, vectors) -> None:
    """Fewer tokens, and as good on the same questions but for one reply."""
    instruction, vector = CATALOG.get("lowercase"), vectors["lowercase"]
    before = engine.context.n_tokens
    quick = tune(engine, vector, instruction, VALIDATION, n=4, max_tokens=MAX_TOKENS)
    spent = engine.context.n_tokens - before
    _, checked = split(VALIDATION, 4)
    full = tune_exhaustively(engine, vector, instruction, checked, max_tokens=MAX_TOKENS)
    assert engine.context.n_tokens - before - spent > 1.5 * spent
    assert quick.scores["steered"] >= full.scores["steered"] - 0.25
    assert len(full.trials) == engine.model.n_layer * 3 * 3


def test_an_instruction_without_a_verifier_is_judged_by_likelihood(engine, vectors) -> None:
    own = Instruction.from_text("Use small letters only.")
    tuned = tune(engine, vectors["lowercase"], own, VALIDATION, n=4, layers=[2, 3], max_tokens=64)
    assert tuned.record["judged_by"] == "likelihood"
    assert any("has no verifier" in line for line in tuned.advice)
    assert tuned.vector.provenance["verifier"] == "change_case:english_lowercase"  # the file's own is kept


def test_ctrl_c_keeps_the_best_so_far(engine, vectors) -> None:
    def stop(what: str, _done: int, _total: int) -> None:
        if what.startswith("checking"):
            raise KeyboardInterrupt

    tuned = tune(
        engine, vectors["lowercase"], CATALOG.get("lowercase"), VALIDATION, n=4, max_tokens=64, report=stop
    )
    assert tuned.stopped and tuned.setting is not None
    assert tuned.vector.layers == (tuned.setting.layer,)
    assert "the search was stopped" in tuned.advice[0]


def test_ctrl_c_before_anything_was_scored_ends_the_program(engine, vectors) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(engine, vectors["lowercase"], CATALOG.get("lowercase"), VALIDATION, n=4, report=stop)


def test_what_can_t_be_tuned_is_refused(engine, vectors) -> None:
    vector, lowercase = vectors["lowercase"], CATALOG.get("lowercase")
    with pytest.raises(PlanError, match="no validation queries"):
        tune(engine, vector, lowercase, [])
    with pytest.raises(PlanError, match="strength 0 steers nothing"):
        tune(engine, vector, lowercase, VALIDATION, strengths=[0.0])
    with pytest.raises(PlanError, match="out of range"):
        tune(engine, vector, lowercase, VALIDATION, layers=[99])
    with pytest.raises(PromptError, match="without a wording"):
        tune(engine, vector, Instruction("none", (), verifier="punctuation:no_comma"), VALIDATION)
    with pytest.raises(CatalogError, match="has no verifier"):
        tune_exhaustively(engine, vector, Instruction.from_text("Rhyme."), VALIDATION)
