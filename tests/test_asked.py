"""Do no harm: which prompts ask for what a vector steers to, and what is left out of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from bundled_vectors import GREEDY, bundled_vectors, open_bundled

from localsteer import ControlVector, bundled
from localsteer.asked import (
    asks,
    considerate,
    does_harm,
    mentions,
    stands_in,
    told_and_both,
    typical_words,
    why_left_out,
)
from localsteer.catalog import load_catalog
from localsteer.errors import MismatchError, SchedulerClosedError
from localsteer.extract.recipes import minus
from localsteer.runtime.scheduler import Scheduler

pytestmark = pytest.mark.skipif(not bundled.is_available(), reason="this copy has no bundled model")

NAMES = ("json", "lowercase", "title")
PLAIN = "Tell me about foxes."
MENTIONED = "Tell me about the fox and the json."
HARM = {"n": 8, "scores": {"none": 0.0, "steered": 0.9, "instructed": 0.875, "both": 0.5}}


@pytest.fixture(scope="module")
def engine():
    with open_bundled() as engine:
        yield engine


@pytest.fixture(scope="module")
def vectors(engine):
    return bundled_vectors(engine, NAMES)


def with_record(vector: ControlVector, record=HARM) -> ControlVector:
    return replace(vector, provenance={**vector.provenance, "validation": record})


def wordings(name):
    """Some that no vector was extracted with."""
    instruction = load_catalog(bundled.CATALOG).get(name)
    return instruction.held_out_phrasings


# --- whether a prompt asks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_state_tells_a_prompt_that_asks_in_words_never_seen_from_one_that_does_not(engine, vectors, name):
    vector = vectors[name]
    asked = [f"{PLAIN} {words}" for words in wordings(name)]
    asked = [prompt for prompt in asked if not stands_in(vector, prompt)]
    assert len(asked) >= 4
    assert all(asks(engine, vector, prompt) for prompt in asked)
    catalog = load_catalog(bundled.CATALOG)
    plain = [query.text for query in catalog.queries_for(catalog.get(name), "validation")[:10]]
    assert not any(asks(engine, vector, prompt) for prompt in plain)


def test_a_word_of_the_phrasings_without_the_state_is_not_enough(engine, vectors):
    """The question is about what the instruction is of, and does not ask for it."""
    for name, word in (("json", "json"), ("lowercase", "letter"), ("title", "bracket")):
        prompt = f"Tell me about the fox and the {word}."
        assert mentions(vectors[name], prompt) and asks(engine, vectors[name], prompt) is False


def test_the_state_without_a_word_of_the_phrasings_is_not_enough(engine, vectors):
    """At the last token any instruction looks a little like any other."""
    others = [f"{PLAIN} {words}" for name in ("title", "lowercase") for words in wordings(name)]
    assert not any(asks(engine, vectors["json"], prompt) for prompt in others)


def test_typical_words_are_those_that_tell_an_instruction_from_others():
    get = load_catalog().get
    assert typical_words(get("json").phrasings) == {"json"}
    assert typical_words(get("no_comma").phrasings) == {"comma"}
    assert "sentence" in typical_words(get("one_sentence").phrasings)
    assert "less" in typical_words(get("words_under").fill().phrasings)  # no plural
    assert {"double", "bracket", "title"} <= typical_words(get("title").phrasings)
    assert typical_words(("Answer in rhyme.",)) == {"rhyme"}
    assert typical_words(("Your answer must be the reply.",)) == frozenset()


def test_without_a_typical_word_no_prompt_asks_but_one_with_a_phrasing_in_it(engine, vectors):
    """The state alone tells instructions of a small model hardly apart."""
    phrase = "Your answer must be the reply."
    origin = {**vectors["json"].provenance, "phrasings": [phrase]}
    vague = replace(vectors["json"], provenance=origin)
    assert typical_words(vague.phrasings) == frozenset()
    assert asks(engine, vague, f"{PLAIN} {vectors['json'].phrasings[0]}") is False
    assert asks(engine, vague, f"{PLAIN} {phrase}") is True


def test_a_phrasing_of_the_vectors_in_the_prompt_is_certain_whatever_its_case_and_spacing(vectors):
    vector = vectors["json"]
    phrase = vector.phrasings[0]
    assert stands_in(vector, f"{PLAIN} {phrase.upper()}")
    assert stands_in(vector, f"{PLAIN}\n{phrase.replace(' ', '  ')}")
    assert stands_in(vector, [{"role": "system", "content": phrase}, {"role": "user", "content": PLAIN}])
    assert not stands_in(vector, PLAIN)


def test_words_of_an_earlier_turn_are_no_words_of_this_one(vectors):
    vector = vectors["json"]
    talk = [
        {"role": "user", "content": f"{PLAIN} {vector.phrasings[0]}"},
        {"role": "assistant", "content": vector.phrasings[1]},
        {"role": "user", "content": "And hares?"},
    ]
    assert not stands_in(vector, talk)
    assert stands_in(vector, talk[:1])


@pytest.mark.parametrize("missing", ["mean_without", "std_with", "std_without"])
def test_a_vector_without_statistics_can_tell_by_words_alone(engine, vectors, missing):
    vector = replace(vectors["json"], **{missing: None})
    assert asks(engine, vector, PLAIN) is None
    assert asks(engine, vector, f"{PLAIN} {vector.phrasings[0]}") is True


def test_minus_a_vector_has_no_statistics_of_prompts_that_ask_to_avoid_the_word(engine, vectors):
    turned = minus(vectors["json"], load_catalog(bundled.CATALOG).get("lowercase"))
    assert asks(engine, turned, PLAIN) is None


def test_statistics_without_any_spread_tell_nothing(engine, vectors):
    flat = np.zeros(vectors["json"].n_layer)
    assert asks(engine, replace(vectors["json"], std_with=flat, std_without=flat), PLAIN) is None


# --- what the file says -------------------------------------------------------------------------------------


def scored(told, both, **more):
    return {"n": 8, "scores": {"instructed": told, "both": both}, **more}


@pytest.mark.parametrize(
    ("record", "harmful"),
    [
        (scored(0.875, 0.5), True),
        (scored(1, 0), True),
        (scored(0.5, 0.5), False),
        (scored(0.5, 0.875), False),
        (scored(None, 0.5), False),
        (scored(0.5, None), False),
        (scored("1", 0.5), False),
        (scored(True, 0.5), False),
        (scored(float("nan"), 0.0), False),
        (scored(7.0, 0.5), False),
        ({"n": 8, "scores": [0.5, 0.1]}, False),
        ({"n": 8}, False),
        ([{"layer": 2, "score": 1.0}], False),
        ("worse", False),
        (None, False),
    ],
)
def test_a_file_does_harm_only_where_it_says_so_in_numbers(vectors, record, harmful):
    vector = with_record(vectors["json"], record)
    assert does_harm(vector) is harmful
    assert (told_and_both(vector) is not None) or not harmful


def test_a_vector_of_strength_0_does_no_harm(vectors):
    assert not does_harm(with_record(vectors["json"]).at(strength=0))


# --- what is done -------------------------------------------------------------------------------------------


def test_what_does_harm_is_left_out_where_the_prompt_asks_and_applied_where_it_does_not(engine, vectors):
    json, title = with_record(vectors["json"]), vectors["title"]
    asked = f"{PLAIN} {wordings('json')[0]}"
    assert considerate(engine, [json, title], asked) == ([title], [json])
    assert considerate(engine, [json, title], PLAIN) == ([json, title], [])


def test_each_vector_is_decided_on_its_own(engine, vectors):
    json, title = with_record(vectors["json"]), with_record(vectors["title"])
    prompt = f"{PLAIN} {vectors['title'].phrasings[0]}"
    assert considerate(engine, [json, title], prompt) == ([json], [title])


def test_a_prompt_without_any_of_its_words_costs_nothing(engine, vectors):
    n_before = engine.context.n_decodes
    assert considerate(engine, with_record(vectors["json"]), PLAIN)[1] == []
    assert engine.context.n_decodes == n_before


def test_a_file_that_says_nothing_of_it_is_applied_always_and_nothing_is_computed(engine, vectors):
    vector = vectors["json"]
    n_before = engine.context.n_decodes
    assert considerate(engine, vector, f"{PLAIN} {vector.phrasings[0]}") == ([vector], [])
    assert considerate(engine, with_record(vector, scored(0.5, 0.5)), vector.phrasings[0])[1] == []
    assert engine.context.n_decodes == n_before


def test_what_the_user_insists_on_and_raw_prompts_are_steered_whatever_the_file_says(engine, vectors):
    vector = with_record(vectors["json"])
    asked = f"{PLAIN} {vector.phrasings[0]}"
    assert considerate(engine, vector, asked)[0] == []
    assert considerate(engine, vector, asked, always=[vector])[0] == [vector]
    assert considerate(engine, vector, asked, raw=True)[0] == [vector]


def test_the_engine_itself_applies_what_it_is_given(engine, vectors):
    asked = f"{PLAIN} {wordings('lowercase')[0]}"
    how = {"sampling": GREEDY, "max_tokens": 12}
    literal = engine.generate(asked, steer=[with_record(vectors["title"])], **how)
    assert literal.text == engine.generate(asked, steer=[vectors["title"]], **how).text


def test_the_notice_says_why_in_numbers(vectors):
    assert why_left_out(with_record(vectors["json"])) == (
        "json is left out: the prompt already asks for it, and its file says that steering then does harm "
        "(told 88%, told and steered 50%)"
    )


def test_a_vector_of_another_model_is_refused_not_read(engine, vectors):
    whole = with_record(vectors["json"])
    narrow = replace(whole, directions=whole.directions[:, :64])
    with pytest.raises(MismatchError, match="64"):
        considerate(engine, narrow, MENTIONED)


# --- through the scheduler ----------------------------------------------------------------------------------


def test_a_scheduler_reads_the_same_states_as_the_engine_beside_steered_replies(engine, vectors):
    prompts = [engine.prompt_tokens(text) for text in (PLAIN, "Where does the hare live?")]
    layers = [0, 3, engine.model.n_layer - 1]
    expected = engine.last_hidden_states(prompts)[:, layers]
    alone = engine.generate(PLAIN, steer=vectors["json"], sampling=GREEDY, max_tokens=20).text
    with Scheduler(engine) as scheduler:
        steered = scheduler.submit(PLAIN, steer=vectors["json"], sampling=GREEDY, max_tokens=20)
        looks = [scheduler.look(tokens, layers) for tokens in prompts]
        other = scheduler.look(prompts[0], [1])
        states = [look.states() for look in looks]
        assert other.states().shape == (1, engine.model.n_embd)
        assert steered.result().text == alone
    np.testing.assert_allclose(states, expected, rtol=1e-3, atol=1e-3)


def test_separate_caches_give_the_same_states(engine, vectors):
    prompts = [engine.prompt_tokens(text) for text in (PLAIN, MENTIONED)]
    expected = engine.last_hidden_states(prompts)[:, [2]]
    with open_bundled(kv_unified=False) as separate, Scheduler(separate) as scheduler:
        reply = scheduler.submit(PLAIN, steer=vectors["json"], sampling=GREEDY, max_tokens=20)
        looks = [scheduler.look(tokens, [2]) for tokens in prompts]
        np.testing.assert_allclose([look.states() for look in looks], expected, rtol=1e-3, atol=1e-3)
        assert reply.result().text.startswith("{")


def test_what_was_read_for_the_decision_stays_in_the_cache_for_the_reply(engine, vectors):
    vector = with_record(vectors["json"]).at(positions="generation")
    prompt = MENTIONED
    n = len(engine.prompt_tokens(prompt))
    with Scheduler(engine) as scheduler:
        applied, _ = considerate(scheduler, vector, prompt)
        ticket = scheduler.submit(prompt, steer=applied, sampling=GREEDY, max_tokens=5)
        ticket.result()
    assert applied == [vector] and ticket.cached_tokens == n - 1


def test_a_look_at_a_closing_scheduler_is_refused(engine):
    scheduler = Scheduler(engine)
    scheduler.close()
    with pytest.raises(SchedulerClosedError):
        scheduler.look(engine.prompt_tokens(PLAIN), [0])
