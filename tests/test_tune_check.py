"""The check decides by what the model says: nothing is asked twice, and what is broken does not win."""

from __future__ import annotations

from dataclasses import replace

import pytest

from localsteer import bundled
from localsteer.catalog import load_catalog
from localsteer.runtime.reply import Reply
from localsteer.runtime.sampling import GREEDY
from localsteer.tune import Check, Setting, Trial
from localsteer.tune.check import IMPROBABLE
from localsteer.verify.judge import ENDLESS

CATALOG = load_catalog(bundled.CATALOG)
QUERIES = CATALOG.queries["validation"][:4]
GOOD, LATE = Setting(7, "prompt", 2.0), Setting(0, "last", 0.5)
LONGEST = 112


@pytest.fixture
def check(exact_bundled, extracted):
    return Check(exact_bundled, extracted["title"], CATALOG.get("title"), QUERIES, max_tokens=LONGEST)


def saying(engine, texts, ends=lambda _one: "stop", *, vector, **options) -> Check:
    """A check whose replies are written down: texts(what is asked), and its finish_reason."""

    def generate(asked, on_reply):
        replies = []
        for one in asked:
            text = texts(one)
            tokens = engine.model.tokenize(text, add_special=False, parse_special=False)
            replies.append(Reply(text, list(tokens), ends(one)))
            on_reply(len(replies))
        return replies

    instruction = CATALOG.get("no_comma")
    return Check(engine, vector, instruction, QUERIES, max_tokens=LONGEST, generate=generate, **options)


# --- on the model ---


def test_a_good_setting_makes_the_model_follow_untold(check):
    check.ask_model()
    (good,) = check.ask([GOOD])
    check.ask_both(GOOD)
    assert (check.plain.score, check.told.score, good.score, check.both.score) == (0, 1, 1, 1)
    assert good.n == len(QUERIES) and good.n_degenerate == 0
    assert good.row() | {"n": 4, "score": 1.0, "followed": 1.0} == good.row()
    assert check.plain.row()["layer"] is None


def test_nothing_is_asked_twice(check):
    check.ask_model()
    assert check.n_replies == 8
    check.ask([GOOD, LATE], 2)
    assert check.n_replies == 8 + 2 * 2
    check.ask([GOOD, GOOD], 2)
    assert check.n_replies == 8 + 2 * 2
    (good,) = check.ask([GOOD])
    assert check.n_replies == 8 + 2 * 2 + 2
    assert [reply.query for reply in good.replies] == [query.text for query in QUERIES]
    assert check.trials[LATE].n == 2
    assert check.n_tokens > 0


def test_replies_that_are_known_are_not_asked_again(exact_bundled, extracted, check):
    plain = exact_bundled.generate_batch(
        [query.text for query in QUERIES], max_tokens=LONGEST, sampling=GREEDY
    )
    check.ask_model(plain)
    assert check.n_replies == len(QUERIES)
    assert [reply.text for reply in check.plain.replies] == [reply.text for reply in plain]


def test_progress_counts_all_replies(exact_bundled, extracted):
    seen = []
    check = Check(
        exact_bundled,
        extracted["title"],
        CATALOG.get("title"),
        QUERIES,
        max_tokens=LONGEST,
        on_reply=seen.append,
    )
    check.ask_model()
    check.ask([GOOD], 2)
    assert seen == list(range(1, 11))


# --- guards ---


def plain_or(text: str):
    """Sound replies with a comma by the plain model; `text` when it is steered."""

    def texts(one):
        subject = one.query.subject
        return text.format(subject) if one.plan else f"The {subject}, a small animal, lives near the river."

    return texts


@pytest.mark.parametrize(
    ("text", "is_good"),
    [
        ("The {0} is a small animal that lives near the river.", True),
        ("The {0} is a small animal, and it lives near the river.", False),
        ("the {0} " * 40, False),
        ("", False),
        ("The cloud is high and it lives near the river.", False),
    ],
    ids=["sound", "it does not follow", "a loop", "nothing", "another subject"],
)
def test_a_reply_that_passes_the_verifier_alone_does_not_count(exact_bundled, extracted, text, is_good):
    check = saying(exact_bundled, plain_or(text), vector=extracted["no_comma"])
    check.ask_model()
    (trial,) = check.ask([GOOD])
    assert trial.n_good == (len(QUERIES) if is_good else 0)
    assert trial.score == (1.0 if is_good else 0.0)


def test_fluent_nonsense_does_not_count_either(exact_bundled, extracted):
    nonsense = "the {0} carpet seven walks because river old music many"
    check = saying(exact_bundled, plain_or(nonsense), vector=extracted["no_comma"])
    check.ask_model()
    (trial,) = check.ask([GOOD])
    assert {reply.degenerate for reply in trial.replies} == {IMPROBABLE}
    assert trial.score == 0
    # unless the vector was learned from replies that are as improbable
    check = saying(exact_bundled, plain_or(nonsense), vector=extracted["no_comma"], surprising=20.0)
    check.ask_model()
    (trial,) = check.ask([GOOD])
    assert trial.score == 1


@pytest.mark.parametrize(("n_own", "n_steered", "score"), [(0, 1, 0.75), (0, 2, 0.0), (1, 2, 0.5)])
def test_a_setting_may_break_few_more_replies_than_the_model_by_itself(
    exact_bundled, extracted, n_own, n_steered, score
):
    """One in eight more, at least one."""

    def texts(one):
        n_loops = n_steered if one.plan else n_own
        loops = QUERIES.index(one.query) < n_loops
        sound = "The {0} is a small animal that lives near the river."
        return ("the {0} " * 40 if loops else sound).format(one.query.subject)

    check = saying(exact_bundled, texts, vector=extracted["no_comma"])
    check.ask_model()
    (trial,) = check.ask([GOOD])
    assert (trial.n_degenerate, trial.n_good) == (n_steered, 4 - n_steered)
    assert trial.score == score


@pytest.mark.parametrize(("its_own", "reason"), [("stop", ENDLESS), ("length", None)])
def test_a_reply_without_end_is_degenerate_where_the_model_s_own_end(
    exact_bundled, extracted, its_own, reason
):
    check = saying(
        exact_bundled,
        plain_or("The {0} is a small animal that lives near the river."),
        lambda one: "length" if one.plan else its_own,
        vector=extracted["no_comma"],
    )
    check.ask_model()
    (trial,) = check.ask([GOOD])
    assert {reply.degenerate for reply in trial.replies} == {reason}


def test_without_a_verifier_replies_have_only_to_be_sound(exact_bundled, extracted):
    free = replace(CATALOG.get("title"), verifier=None, kwargs={})
    check = Check(exact_bundled, extracted["title"], free, QUERIES, max_tokens=LONGEST)
    check.ask_model()
    assert check.plain.score == 1
    assert check.plain.row()["followed"] is None


def test_an_instruction_without_wording_is_not_told(exact_bundled, extracted):
    mute = replace(CATALOG.get("title"), phrasings=())
    check = Check(exact_bundled, extracted["title"], mute, QUERIES, max_tokens=LONGEST)
    check.ask_model()
    check.ask_both(GOOD)
    assert check.n_replies == len(QUERIES)
    assert (check.told.n, check.both.n) == (0, 0)


def test_a_trial_without_replies_is_worth_nothing():
    assert Trial(GOOD).score == 0
    assert Trial(GOOD).row()["followed"] is None
