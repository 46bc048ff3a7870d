"""Replies of the told model that follow the instruction, which a good setting makes likely without
telling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from localsteer.catalog import Instruction, Query
from localsteer.runtime.likelihood import Likelihood, Row
from localsteer.runtime.reply import Reply
from localsteer.runtime.sampling import GREEDY, Sampling
from localsteer.verify.judge import judge

from .replies import Asked, replies_to, told_prompt

if TYPE_CHECKING:
    from localsteer.engine import Engine
    from localsteer.plan import Plan
    from localsteer.runtime.ask import Prompt

ENOUGH = 4  # targets; more hardly change the order of the settings
N_ROUND = 8  # replies in one round: as many as one decode takes
SAMPLED = Sampling(temp=0.7, top_k=40, top_p=0.95, min_p=0.05, seed=0)
MAX_TOKENS = 48  # tokens of a target; the effect of an instruction on a reply shows early, or throughout
# least tokens of a target, so that a setting which breaks the reply after its first tokens shows
MIN_TOKENS = 12
GAP_SHARE = 0.9  # share of a target's gap that the part kept must hold
SMALL = 0.02  # share of a target's largest gap; a smaller gap is not an effect of the instruction
WORST = 8.0  # nats that one broken token counts at most
LIMITS = (72, 128, 192)  # tokens of a reply in the check; fewer would not show a loop


@dataclass(frozen=True, eq=False)
class Target:
    """plain: ids of the prompt without the instruction. reply: ids, with the end token.

    gap: (n,) nats, the log-probability of each token of the reply when told, minus that of the plain model.
    base: (n,) nats, the log-probability under the plain model.
    """

    plain: Sequence[int]
    reply: Sequence[int]
    gap: np.ndarray
    base: np.ndarray

    @cached_property
    def weights(self) -> np.ndarray:
        """The weight of each token, (n,): its gap if the instruction makes it likelier, else 0."""
        weights = np.maximum(self.gap, 0.0)
        return np.where(weights >= SMALL * weights.max(initial=0.0), weights, 0.0)

    def row(self, plan: Plan | None) -> Row:
        return Row(self.plain, self.reply, plan)

    def recovered(self, steered: np.ndarray) -> float:
        """The share of the gap that a setting recovers: sum g (steered - plain) / sum g (told - plain). 1
        means as likely as when told, 0 as likely as plain, below 0 less likely than plain. steered: (n,)
        nats."""
        weights = self.weights
        return float((weights * (steered - self.base)).sum() / (weights * self.gap).sum())

    def damage(self, steered: np.ndarray) -> float:
        """Nats per token by which a setting makes the rest of the reply less likely than both the plain and
        the told model: near 0 for a sound setting, several for one that leads to loops or nonsense."""
        rest = self.weights == 0
        if not rest.any():
            return 0.0
        expected = self.base + np.minimum(self.gap, 0.0)
        return float(np.clip(expected - steered, 0.0, WORST)[rest].mean())


@dataclass(frozen=True)
class Told:
    """The results of asking the told model. n, n_passed: greedy replies of the first round, and how many
    followed.

    n_asked: replies in all. targets: in the order in which they came, those of the plainest prompts first.
    max_tokens: a limit at which the replies that follow still do.
    """

    targets: tuple[Target, ...]
    n: int
    n_passed: int
    n_asked: int
    max_tokens: int


@dataclass(frozen=True)
class _Passing:
    query: Query
    prompt: Prompt
    reply: Reply


class Telling:
    """Asks the told model in rounds, until there are enough targets or no rounds are left.

    The first round is greedy, the next ones sample with other wordings, and the last uses two wordings at
    once, with an earlier reply that follows as an example if there is one. queries: other than those of the
    check.
    """

    def __init__(
        self,
        engine: Engine,
        instruction: Instruction,
        queries: Sequence[Query],
        *,
        max_tokens: int,
        seed: int = 0,
        on_reply: Callable[[int, int], None] | None = None,
    ) -> None:
        self._engine, self._instruction, self._queries = engine, instruction, tuple(queries)
        self._max_tokens, self._seed, self._on_reply = max_tokens, seed, on_reply
        self._passing: list[_Passing] = []
        self._n_asked = 0

    def collect(self, likelihood: Likelihood) -> Told:
        """Collect targets. Raises PromptError for an instruction without wording."""
        first = self._ask(self._round(0), GREEDY)
        for turn in (1, 2):
            if len(self._passing) >= ENOUGH:
                break
            self._ask(self._round(turn), replace(SAMPLED, seed=self._seed + 1000 * turn))
        targets = measured(likelihood, self._engine, self._passing)
        return Told(tuple(targets), *first, self._n_asked, self._limit())

    def _round(self, turn: int) -> list[tuple[Query, Prompt]]:
        start = turn * N_ROUND
        n = len(self._queries)
        chosen = [(start + i, self._queries[(start + i) % n]) for i in range(min(N_ROUND, n))]
        return [(query, self._prompt(query, i + turn, turn)) for i, query in chosen]

    def _prompt(self, query: Query, i: int, turn: int) -> Prompt:
        phrasings = self._instruction.phrasings
        text = told_prompt(query, phrasings, i)
        if turn < 2:
            return text
        if len(phrasings) > 1:
            text += " " + phrasings[(i + 1) % len(phrasings)]
        example = next((passed for passed in self._passing if isinstance(passed.prompt, str)), None)
        if example is None:
            return text
        return [
            {"role": "user", "content": example.prompt},
            {"role": "assistant", "content": example.reply.text.strip()},
            {"role": "user", "content": text},
        ]

    def _ask(self, prompts: Sequence[tuple[Query, Prompt]], sampling: Sampling) -> tuple[int, int]:
        """Ask one round; returns the number of replies, and how many of them follow."""
        asked = [Asked(prompt, query) for query, prompt in prompts]
        replies = replies_to(
            self._engine,
            self._instruction,
            asked,
            max_tokens=self._max_tokens,
            sampling=sampling,
            on_reply=lambda done: self._on_reply and self._on_reply(self._n_asked + done, len(self._passing)),
        )
        self._n_asked += len(asked)
        passing = [
            _Passing(question.query, question.prompt, reply)
            for question, reply in zip(asked, replies, strict=True)
            if judge(self._instruction, question.query, reply).good and reply.tokens
        ]
        self._passing += passing
        return len(asked), len(passing)

    def _limit(self) -> int:
        """The lowest limit at which replies that follow still do when they are cut there."""
        for limit in LIMITS:
            if limit < self._max_tokens and all(self._follows_cut(passed, limit) for passed in self._passing):
                return limit
        return self._max_tokens

    def _follows_cut(self, one: _Passing, limit: int) -> bool:
        if len(one.reply.tokens) <= limit:
            return True
        text = self._engine.text(one.reply.tokens[:limit])
        cut = Reply(text, one.reply.tokens[:limit], "length")
        return judge(self._instruction, one.query, cut).verified is not False


def measured(likelihood: Likelihood, engine: Engine, passing: Sequence[_Passing]) -> list[Target]:
    """Targets for replies, each cut after the tokens that hold most of its gap; none for a reply without a
    gap."""
    plain = [tuple(engine.prompt_tokens(passed.query.text)) for passed in passing]
    told = [tuple(engine.prompt_tokens(passed.prompt)) for passed in passing]
    replies = [_with_end(engine, passed.reply)[:MAX_TOKENS] for passed in passing]
    low = likelihood([Row(prompt, reply) for prompt, reply in zip(plain, replies, strict=True)])
    high = likelihood([Row(prompt, reply) for prompt, reply in zip(told, replies, strict=True)])
    targets = []
    for prompt, reply, base, top in zip(plain, replies, low, high, strict=True):
        n = _n_kept(top - base)
        if n:
            targets.append(Target(prompt, reply[:n], (top - base)[:n], base[:n]))
    return targets


def _with_end(engine: Engine, reply: Reply) -> tuple[int, ...]:
    """The reply with its end token: for `one sentence`, ending is nearly all that matters. A cut reply has
    none."""
    # it did not end at a stop string
    ended = reply.finish_reason == "stop" and engine.text(reply.tokens) == reply.text
    return (*reply.tokens, engine.model.eos) if ended and engine.model.eos >= 0 else tuple(reply.tokens)


def _n_kept(gap: np.ndarray) -> int:
    gained = np.cumsum(np.maximum(gap, 0.0) ** 2)
    if not len(gained) or gained[-1] <= 0:
        return 0
    return max(MIN_TOKENS, int(np.searchsorted(gained, GAP_SHARE * gained[-1]) + 1))
