"""Targets are replies of the told model that follow; replies end early only where their verdict is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from localsteer import bundled
from localsteer.catalog import Instruction, load_catalog
from localsteer.errors import PromptError
from localsteer.plan import Plan
from localsteer.runtime.likelihood import Likelihood, Row
from localsteer.runtime.sampling import GREEDY, Sampling
from localsteer.tune.replies import GIVEN_UP, Asked, replies_to, told_prompt
from localsteer.tune.setting import Setting
from localsteer.tune.targets import ENOUGH, MAX_TOKENS, N_ROUND, WORST, Target, Telling
from localsteer.verify.judge import judge
from localsteer.verify.verdicts import verify

CATALOG = load_catalog(bundled.CATALOG)
QUERIES = CATALOG.queries["validation"][:8]
LONGEST = 128
# The told model mentions a river in some of its replies, not in most.
RIVER = Instruction(
    "river", ("Answer briefly.",), verifier="keywords:existence", kwargs={"keywords": ["river"]}
)
NEVER = Instruction("never", ("Be brief.",), verifier="keywords:existence", kwargs={"keywords": ["zeppelin"]})


def collect(engine, instruction: Instruction, **options):
    telling = Telling(engine, instruction, QUERIES, max_tokens=LONGEST, **options)
    return telling.collect(Likelihood(engine))


@pytest.fixture(scope="module")
def title(exact_bundled):
    return collect(exact_bundled, CATALOG.get("title"))


# --- targets ---


def test_greedy_targets_begin_replies_that_pass_the_verifier(exact_bundled, title):
    instruction = CATALOG.get("title")
    assert (title.n, title.n_passed, title.n_asked) == (8, 8, 8)
    assert len(title.targets) == 8
    for i, (target, query) in enumerate(zip(title.targets, QUERIES, strict=True)):
        prompt = told_prompt(query, instruction.phrasings, i)
        reply = exact_bundled.generate(prompt, max_tokens=LONGEST, sampling=GREEDY)
        assert verify(instruction.verifier, reply.text, dict(instruction.kwargs))
        assert list(target.plain) == exact_bundled.prompt_tokens(query.text)
        assert reply.text.startswith(exact_bundled.text(target.reply))
        assert len(target.reply) <= MAX_TOKENS


def test_telling_recovers_the_whole_gap_and_the_plain_model_none_of_it(exact_bundled, title):
    instruction = CATALOG.get("title")
    told = [
        exact_bundled.prompt_tokens(told_prompt(query, instruction.phrasings, i))
        for i, query in enumerate(QUERIES)
    ]
    likelihood = Likelihood(exact_bundled)
    high = likelihood([Row(prompt, one.reply) for prompt, one in zip(told, title.targets, strict=True)])
    low = likelihood([target.row(None) for target in title.targets])
    for target, top, base in zip(title.targets, high, low, strict=True):
        assert target.recovered(top) == pytest.approx(1, abs=1e-3)
        assert target.recovered(base) == pytest.approx(0, abs=1e-3)
        assert target.damage(top) == pytest.approx(0, abs=1e-3)
        assert target.damage(base) == pytest.approx(0, abs=1e-3)


def target_of(gap, base) -> Target:
    return Target((1,), tuple(range(len(gap))), np.array(gap, float), np.array(base, float))


def test_the_gap_counts_where_the_instruction_makes_a_token_likelier():
    target = target_of([4.0, 0.01, -3.0, 2.0], [-5.0, -1.0, -1.0, -3.0])
    np.testing.assert_array_equal(target.weights, [4, 0, 0, 2])
    assert target.recovered(target.base + np.array([4, 0, 0, 0])) == pytest.approx(16 / 20)
    assert target.recovered(target.base - np.array([4, 0, 0, 2])) == pytest.approx(-1)
    assert target.recovered(target.base - np.array([0, 9, 9, 0])) == 0


def test_damage_is_what_the_other_tokens_lose_beyond_both():
    target = target_of([4.0, 0.0, -3.0, 2.0], [-5.0, -1.0, -1.0, -3.0])
    assert target.damage(target.base + np.array([-9, -1, -3, -9])) == pytest.approx(
        0.5
    )  # told it loses 3 there, too
    assert target.damage(target.base + np.array([0, 7, 7, 0])) == 0
    assert target.damage(target.base - np.array([0, 99, 0, 0])) == pytest.approx(WORST / 2)
    assert target_of([1.0], [-2.0]).damage(np.array([-50.0])) == 0


def test_further_rounds_are_sampled_when_few_greedy_replies_follow(exact_bundled):
    told = collect(exact_bundled, RIVER)
    assert told.n_passed < ENOUGH
    assert told.n_asked in (2 * N_ROUND, 3 * N_ROUND)
    again = collect(exact_bundled, RIVER)
    assert [one.reply for one in again.targets] == [one.reply for one in told.targets]


def test_rounds_end_without_targets_where_no_reply_follows(exact_bundled):
    seen = []
    told = collect(exact_bundled, NEVER, on_reply=lambda *progress: seen.append(progress))
    assert told.targets == ()
    assert (told.n, told.n_passed, told.n_asked) == (N_ROUND, 0, 3 * N_ROUND)
    assert seen[-1] == (3 * N_ROUND, 0)


def test_the_limit_of_the_check_is_one_at_which_targets_still_follow(exact_bundled, title):
    assert title.max_tokens == 72
    postscript = collect(exact_bundled, CATALOG.get("postscript"))
    assert postscript.n_passed
    assert postscript.max_tokens in (72, LONGEST)


def test_an_instruction_without_wording_cant_be_told(exact_bundled):
    with pytest.raises(PromptError, match="without a wording"):
        collect(exact_bundled, Instruction("mute", (), verifier="punctuation:no_comma"))


# --- replies that end early ---


@pytest.mark.parametrize("name", ["lowercase", "no_comma", "title", "json"])
def test_verdicts_are_those_of_whole_replies(exact_bundled, name):
    instruction = CATALOG.get(name)
    asked = [Asked(query.text, query) for query in QUERIES[:3]]
    asked += [
        Asked(told_prompt(query, instruction.phrasings, i), query) for i, query in enumerate(QUERIES[:3])
    ]
    early = replies_to(exact_bundled, instruction, asked, max_tokens=LONGEST)
    whole = exact_bundled.generate_batch([one.prompt for one in asked], max_tokens=LONGEST, sampling=GREEDY)
    for one, reply, full in zip(asked, early, whole, strict=True):
        assert full.text.startswith(reply.text)
        assert reply.finish_reason in (full.finish_reason, GIVEN_UP)
        assert reply.finish_reason == GIVEN_UP or reply.text == full.text
        verdicts = [judge(instruction, one.query, each).followed for each in (reply, full)]
        assert verdicts[0] == verdicts[1]


def test_hopeless_replies_are_given_up_and_others_are_not(exact_bundled):
    instruction = CATALOG.get("lowercase")
    asked = [Asked(query.text, query) for query in QUERIES[:2]]
    asked.append(Asked(told_prompt(QUERIES[0], instruction.phrasings, 0), QUERIES[0]))
    seen = []
    replies = replies_to(exact_bundled, instruction, asked, max_tokens=LONGEST, on_reply=seen.append)
    assert [reply.finish_reason for reply in replies] == [GIVEN_UP, GIVEN_UP, "stop"]
    assert max(len(reply.tokens) for reply in replies[:2]) <= 8 < len(replies[2].tokens)
    assert seen == [1, 2, 3]


def test_each_reply_has_its_own_plan(exact_bundled, extracted):
    instruction = CATALOG.get("title")
    plan = Plan.from_vectors([Setting(7, "prompt", 2.0).of(extracted["title"])])
    asked = [Asked(QUERIES[0].text, QUERIES[0], steer) for steer in (None, plan)]
    plain, steered = replies_to(exact_bundled, instruction, asked, max_tokens=LONGEST)
    assert not judge(instruction, QUERIES[0], plain).followed
    assert judge(instruction, QUERIES[0], steered).followed


def test_a_reply_that_loops_is_given_up_without_a_verifier_too(exact_bundled, extracted):
    free = replace(CATALOG.get("title"), verifier=None, kwargs={})
    plan = Plan.from_vectors([Setting(4, "all", 12.0, "add").of(extracted["no_comma"])])
    asked = [Asked(query.text, query, plan) for query in QUERIES[:4]]
    replies = replies_to(exact_bundled, free, asked, max_tokens=LONGEST)
    given_up = [reply for reply in replies if reply.finish_reason == GIVEN_UP]
    assert given_up
    for reply in given_up:
        assert judge(free, QUERIES[0], reply).degenerate is not None
        assert len(reply.tokens) < LONGEST


def test_sampled_replies_are_repeatable_and_differ_from_each_other(exact_bundled):
    free = replace(CATALOG.get("title"), verifier=None, kwargs={})
    asked = [Asked(QUERIES[0].text, QUERIES[0])] * 4
    hot = Sampling(temp=1.0, seed=3)
    first, second = (
        [reply.text for reply in replies_to(exact_bundled, free, asked, max_tokens=24, sampling=hot)]
        for _ in range(2)
    )
    assert first == second
    assert len(set(first)) > 1
