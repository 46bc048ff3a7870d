"""Steering only when needed: what complies stays as it is, what fails is tried again, and it is told."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
from bundled_vectors import GREEDY, bundled_vectors, judged_by, open_bundled
from cli_runs import invoke
from engines import random_vector

from localsteer import Sampling, bundled
from localsteer.ensure import bounds_of, ensure
from localsteer.errors import CatalogError, LocalsteerError, MismatchError, PlanError
from localsteer.runtime.scheduler import Scheduler
from localsteer.verify.verdicts import verify

pytestmark = pytest.mark.skipif(not bundled.is_available(), reason="this copy has no bundled model")

ASKED = "Tell me about foxes."
SHORT = {"sampling": GREEDY, "max_tokens": 112}
NEVER = ("keywords:existence", {"keywords": ["xylophone"]})


@pytest.fixture(scope="module")
def engine():
    with open_bundled() as engine:
        yield engine


@pytest.fixture(scope="module")
def vectors(engine):
    return bundled_vectors(engine, ("json", "lowercase", "title"))


@pytest.fixture(scope="module")
def hopeful(vectors):
    """A vector whose verifier no reply ever passes, and none is stopped early for."""
    return judged_by(vectors["json"], NEVER[0], **NEVER[1])


def factors(ensured):
    return [each.factor for each in ensured.tries]


# --- the first reply that passes ---------------------------------------------------------------------------


def test_a_reply_that_follows_by_itself_is_the_unsteered_one(engine, vectors):
    asked = "Tell me about foxes. Answer in JSON format."
    plain = engine.generate(asked, **SHORT)
    ensured = ensure(engine, asked, vectors["json"], **SHORT)
    assert verify("detectable_format:json_format", plain.text)
    assert (ensured.reply.text, ensured.reply.tokens) == (plain.text, plain.tokens)
    assert (ensured.passed, ensured.steered_strength, len(ensured.tries)) == (True, 0.0, 1)
    assert ensured.n_tokens == len(plain.tokens)


@pytest.mark.parametrize("name", ["json", "lowercase", "title"])
def test_a_reply_that_fails_is_replaced_by_the_steered_one(engine, vectors, name):
    vector = vectors[name]
    ensured = ensure(engine, ASKED, [vector], **SHORT)
    assert ensured.passed and ensured.notice == ""
    assert factors(ensured) == [0.0, 1.0]
    assert ensured.reply.text == engine.generate(ASKED, steer=[vector], **SHORT).text
    assert ensured.steered_strength == vector.strength


def test_a_reply_is_stopped_once_it_cannot_pass(engine, vectors):
    plain = ensure(engine, ASKED, vectors["json"], **SHORT).tries[0]
    assert plain.reply.finish_reason == "stopped"
    assert len(plain.reply.tokens) < len(engine.generate(ASKED, **SHORT).tokens) / 4
    title = ensure(engine, ASKED, vectors["title"], **SHORT).tries[0]
    assert title.reply.finish_reason == "stop"


def test_of_several_vectors_all_must_pass(engine, vectors):
    both = [vectors["json"], vectors["lowercase"].at(layer=1)]
    ensured = ensure(engine, ASKED, both, **SHORT)
    assert set(ensured.tries[0].failed) <= {"json", "lowercase"}
    if ensured.passed:
        assert verify("detectable_format:json_format", ensured.reply.text)
        assert ensured.reply.text == ensured.reply.text.lower()
    assert ensured.tries[1].strengths == (1.0, 1.0)


def test_other_vectors_steer_every_try(engine, vectors):
    ensured = ensure(engine, ASKED, vectors["json"], steer=[vectors["lowercase"].at(layer=1)], **SHORT)
    lower = engine.generate(ASKED, steer=[vectors["lowercase"].at(layer=1)], **SHORT)
    assert lower.text.startswith(ensured.tries[0].reply.text)
    assert ensured.tries[0].reply.text


# --- when none passes --------------------------------------------------------------------------------------


def test_strength_is_raised_up_to_the_bound_and_the_best_reply_comes_with_a_notice(engine, hopeful):
    ensured = ensure(engine, ASKED, hopeful, tries=4, **SHORT)
    assert factors(ensured) == [0.0, 1.0, 1.25, 1.5]
    assert (ensured.passed, ensured.steered_strength) == (False, 0.0)
    assert ensured.reply.text == engine.generate(ASKED, **SHORT).text
    assert ensured.notice == "none of 4 replies passes; the best one (plain) fails json."


def test_a_degenerate_reply_is_followed_by_weaker_ones(engine, hopeful):
    wild = hopeful.at(positions="all", strength=12.0)
    ensured = ensure(engine, ASKED, wild, tries=4, **SHORT)
    assert ensured.tries[1].degenerate
    assert factors(ensured) == [0.0, 1.0, 0.75, 0.5]


def test_a_stopped_reply_is_whole_when_it_is_the_best_one(engine, vectors):
    never = judged_by(vectors["json"], "punctuation:no_comma")
    ensured = ensure(engine, ASKED, never, strengths=[1.0], **SHORT)
    assert {each.reply.finish_reason for each in ensured.tries[:2]} == {"stopped"}
    assert ensured.reply.finish_reason == "stop"
    assert ensured.reply.text == engine.generate(ASKED, **SHORT).text
    assert "none of 2 replies passes" in ensured.notice


def test_the_reply_that_fails_fewest_is_the_best(engine, vectors, hopeful):
    ensured = ensure(engine, ASKED, [vectors["title"], replace(hopeful, name="never").at(layer=1)], **SHORT)
    assert not ensured.passed
    fewest = min(len(each.failed) for each in ensured.tries)
    assert [len(each.failed) for each in ensured.tries if each.reply == ensured.reply] == [fewest]


def test_a_vector_of_strength_zero_is_told(engine, hopeful):
    ensured = ensure(engine, ASKED, hopeful.at(strength=0.0), **SHORT)
    assert factors(ensured) == [0.0]
    assert ensured.notice == "the only reply (plain) fails json; json has strength 0."


def test_a_drawn_reply_is_the_same_when_it_is_generated_again(engine, vectors):
    never = judged_by(vectors["json"], "punctuation:no_comma")
    ensured = ensure(engine, ASKED, never, tries=1, sampling=Sampling(temp=1.0), max_tokens=60)
    if not ensured.passed:
        stopped, whole = ensured.tries
        assert whole.reply.tokens[: len(stopped.reply.tokens)] == stopped.reply.tokens


# --- bounds ------------------------------------------------------------------------------------------------


def rows(*strengths, **changed):
    row = {"layer": 2, "positions": "prompt", "mode": "project", "score": 1.0, "degenerate": 0.0}
    return [{**row, "strength": strength, **changed} for strength in strengths]


def kept(vector, validation):
    return replace(vector, provenance={**vector.provenance, "validation": validation})


def test_bounds_are_what_tuning_tried(vectors):
    vector = vectors["json"]
    assert bounds_of(vector) == (0.5, 1.5)
    assert bounds_of(kept(vector, rows(1.0))) == (0.5, 1.5)
    assert bounds_of(kept(vector, rows(0.7, 1.0, 1.2))) == (0.7, 1.2)
    worse = [*rows(0.8), *rows(2.0, degenerate=0.1), *rows(3.0, layer=4), *rows(4.0, score=0.0)]
    assert bounds_of(kept(vector, worse)) == (0.8, 1.0)
    table = {"columns": list(rows(1)[0]), "table": [list(row.values()) for row in rows(0.9, 1.4)]}
    assert bounds_of(kept(vector, table)) == (0.9, 1.4)
    seen = [row | {"n": n} for row, n in zip(rows(0.9, 1.4, 2.0), (8, 8, 2), strict=True)]
    quick = {"n": 8, "columns": list(seen[0]), "table": [list(row.values()) for row in seen]}
    assert bounds_of(kept(vector, quick)) == (0.9, 1.4)
    assert bounds_of(kept(vector, {"table": "broken"})) == (0.5, 1.5)


def test_tuned_bounds_are_used(engine, hopeful):
    tuned = kept(hopeful, rows(0.9, 1.0, 1.2))
    assert factors(ensure(engine, ASKED, tuned, tries=3, **SHORT)) == [0.0, 1.0, 1.2]
    assert factors(ensure(engine, ASKED, tuned, strengths=[0.5], **SHORT)) == [0.0, 0.5]


# --- many at once, and ends --------------------------------------------------------------------------------


def test_a_scheduler_gives_the_same_and_loses_no_slot(engine, vectors):
    alone = ensure(engine, ASKED, vectors["json"], **SHORT)
    with Scheduler(engine) as scheduler:
        found: list = []
        work = [
            threading.Thread(target=lambda: found.append(ensure(scheduler, ASKED, vectors["json"], **SHORT)))
            for _ in range(3)
        ]
        for each in work:
            each.start()
        for each in work:
            each.join()
        counts = scheduler.counts
    assert [each.reply.text for each in found] == [alone.reply.text] * 3
    assert (counts["running"], counts["waiting"]) == (0, 0)


@pytest.mark.parametrize("through", ["engine", "scheduler"])
def test_another_thread_can_end_it(engine, vectors, through):
    ended = threading.Event()
    ended.set()
    if through == "engine":
        ensured = ensure(engine, ASKED, vectors["title"], cancel=ended, **SHORT)
    else:
        with Scheduler(engine) as scheduler:
            ensured = ensure(scheduler, ASKED, vectors["title"], cancel=ended, **SHORT)
    assert (ensured.passed, ensured.reply.finish_reason) == (False, "cancelled")
    assert len(ensured.tries) == 1


def test_a_deadline_ends_it(engine, vectors):
    ensured = ensure(engine, ASKED, vectors["title"], deadline=0.0, **SHORT)
    assert (ensured.passed, ensured.reply.finish_reason, len(ensured.tries)) == (False, "deadline", 1)


# --- bad input ---------------------------------------------------------------------------------------------


def test_what_cannot_be_ensured_is_refused_before_the_first_token(engine, vectors):
    vector = vectors["json"]
    with pytest.raises(PlanError, match="names no verifier"):
        ensure(engine, ASKED, replace(vector, provenance={}))
    with pytest.raises(CatalogError, match="unknown instruction id"):
        ensure(engine, ASKED, judged_by(vector, "no:such"))
    with pytest.raises(PlanError, match="nothing to ensure"):
        ensure(engine, ASKED, [])
    with pytest.raises(LocalsteerError, match="tries must be at least 1, not 0"):
        ensure(engine, ASKED, vector, tries=0)
    with pytest.raises(PlanError, match="nearly parallel"):
        ensure(engine, ASKED, [vector, vector])


def test_a_vector_of_another_model_is_refused(engine, vectors, tiny_llama):
    from engines import open_engine

    with open_engine(tiny_llama.gguf_path) as other:
        foreign = judged_by(random_vector(other), *NEVER[:1], **NEVER[1])
    with pytest.raises(MismatchError):
        ensure(engine, ASKED, foreign)


# --- the command line --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(vectors, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vectors")
    for name, vector in vectors.items():
        vector.save(folder / f"{name}.gguf")
    judged_by(vectors["json"], NEVER[0], **NEVER[1]).save(folder / "never.gguf")
    replace(vectors["json"], provenance={}).save(folder / "bare.gguf")
    return folder


def run(*args):
    return invoke("run", "-t", "1", "--temp", "0", "-n", "112", *args, ASKED)


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_run_shows_the_accepted_reply_alone(files, stream):
    steered, plain = run("-s", files / "json.gguf").out, run().out
    done = run("--ensure", files / "json.gguf", stream)
    assert (done.status, done.out) == (0, steered)
    assert done.err == "localsteer: the plain reply fails json: this one is steered at strength 1.\n"
    done = run("--ensure", files / "never.gguf", stream)
    assert (done.status, done.out) == (0, plain)
    assert done.err == "localsteer: none of 3 replies passes; the best one (plain) fails json.\n"


def test_run_prints_one_document(files):
    made = run("--ensure", f"{files / 'json.gguf'}:0.9", "--json").json
    assert made["ensure"]["passed"] and made["ensure"]["steered_strength"] == 0.9
    assert [each["strengths"] for each in made["ensure"]["tries"]] == [[], [0.9]]
    assert made["reply"].startswith("{")
    assert made["ensure"]["n_tokens"] == sum(each["n_tokens"] for each in made["ensure"]["tries"])


def test_run_takes_a_reply_at_its_end(files):
    assert run("--no-stream").out == run().out


def test_run_refuses_what_cannot_be(files):
    assert "leave out --compare" in run("--ensure", files / "json.gguf", "--compare").complaint()
    assert "names no verifier" in run("--ensure", files / "bare.gguf").complaint()
    assert "unknown instruction 'jsn'" in run("--ensure", "jsn").complaint()
    assert "0 is not in the range" in run("--ensure", "json", "--tries", "0").complaint()


def test_the_document_says_what_the_accepted_reply_was_steered_by(files):
    plain = run("--ensure", files / "never.gguf", "--json").json
    assert (plain["ensure"]["steered_strength"], plain["steering"]) == (0, [])
    steered = run("-s", f"{files / 'title.gguf'}:0", "--ensure", f"{files / 'json.gguf'}:0.9", "--json").json
    assert [(each["name"], each["strength"]) for each in steered["steering"]] == [("title", 0), ("json", 0.9)]


def test_words_without_a_verifier_are_refused_before_a_vector_is_made(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCALSTEER_CACHE", str(tmp_path))
    assert "'Answer in rhyme.' has no verifier" in run("--ensure", "Answer in rhyme.").complaint()
    assert "'moderate' has no verifier" in run("--ensure", "moderate").complaint()
    assert not list(tmp_path.iterdir())
