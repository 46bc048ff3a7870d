"""Checks settings by the replies they lead to, beside those of the plain and the told model. This decides.

A reply is good if its verifier passes, it is not degenerate, and it names the query's subject; without a
verifier, only the last two count. Guards: empty, looping, locked or endless replies, and improbable ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypedDict

from localsteer.catalog import Instruction, Query
from localsteer.perplexity import log_perplexities
from localsteer.plan import Plan
from localsteer.vector import ControlVector
from localsteer.verify.judge import Judged, judge, share

from .replies import Asked, replies_to, told_prompt
from .setting import Setting

if TYPE_CHECKING:
    from localsteer.engine import Engine
    from localsteer.runtime.reply import Reply

Generate = Callable[[Sequence[Asked], Callable[[int], None]], "list[Reply]"]

IMPROBABLE = "improbable"  # reasons beside those of quality.py and judge.py
# Times the perplexity of the most surprising reply that the model gives without steering, told or not. On the
# bundled model sound replies stay below 1.7, and broken ones that pass every other check are at 1.3 to 13
# (benchmarks/improbable.py).
IMPROBABLE_RATIO = 3.0


class TrialRow(TypedDict):
    """layer to mode: None for the plain model. score to subject_kept: shares of the replies."""

    layer: int | list[int] | None
    positions: str | None
    strength: float | None
    mode: str | None
    n: int
    score: float
    followed: float | None
    degenerate: float | None
    subject_kept: float | None
    recovered_gap: float | None


@dataclass
class Trial:
    """A setting, or none (the plain model), and its replies. gap: its recovered gap, None if it was not
    measured.

    allowed: how many degenerate replies do not count against it, since the plain model gives as many.
    """

    setting: Setting | None
    replies: list[Judged] = field(default_factory=list)
    gap: float | None = None
    allowed: int = 0

    @property
    def n(self) -> int:
        return len(self.replies)

    @property
    def n_good(self) -> int:
        return sum(reply.good for reply in self.replies)

    @property
    def n_degenerate(self) -> int:
        return sum(reply.degenerate is not None for reply in self.replies)

    @property
    def is_sound(self) -> bool:
        return self.n_degenerate <= self.allowed

    @property
    def score(self) -> float:
        """The share of good replies; 0 if too many are degenerate."""
        return self.n_good / self.n if self.replies and self.is_sound else 0.0

    def row(self) -> TrialRow:
        setting = self.setting
        layer = getattr(setting, "layer", None)
        return {
            "layer": list(layer) if isinstance(layer, tuple) else layer,
            "positions": getattr(setting, "positions", None),
            "strength": getattr(setting, "strength", None),
            "mode": getattr(setting, "mode", None),
            "n": self.n,
            "score": self.score,
            "followed": share([reply.followed for reply in self.replies]),
            "degenerate": share([reply.degenerate is not None for reply in self.replies]),
            "subject_kept": share([reply.subject_kept for reply in self.replies]),
            "recovered_gap": self.gap,
        }


class Check:
    """Replies of one model to the same queries: plain, told in words, and under settings of one vector.

    queries: other than those of the targets. max_tokens: of a reply. on_reply: called after each reply with
    the number of replies so far. generate: (questions, callback for the number of replies) -> replies; by
    default each reply ends as soon as its verdict is known. surprising: the negative log-probability per
    token of replies as they should be, if the vector was learned from some: forms that the model does not use
    by itself are improbable.
    """

    def __init__(
        self,
        engine: Engine,
        vector: ControlVector,
        instruction: Instruction,
        queries: Sequence[Query],
        *,
        max_tokens: int,
        generate: Generate | None = None,
        on_reply: Callable[[int], None] | None = None,
        surprising: float | None = None,
    ) -> None:
        self._surprising = surprising
        self._engine, self._vector, self._instruction = engine, vector, instruction
        self.queries = tuple(queries)
        self.max_tokens = max_tokens
        self._generate_with = generate or self._until_known
        self._on_reply = on_reply
        self.n_replies = self.n_tokens = 0
        self.trials: dict[Setting, Trial] = {}
        self.plain, self.told, self.both = Trial(None), Trial(None), Trial(None)
        self._must_end = False
        self._most_surprising: float | None = None

    def ask_model(self, plain: Sequence[Reply] | None = None) -> None:
        """Ask the unsteered model, plain and told. plain: its plain replies to the queries, if they are
        known."""
        told = self._told()
        asked = [*([] if plain else [Asked(query.text, query) for query in self.queries]), *told]
        replies = [*(plain or ()), *self._generate(asked)]
        # if no unsteered reply needs the limit, it leaves ample room: a reply that reaches it is endless
        self._must_end = all(reply.finish_reason != "length" for reply in replies)
        queries = [*self.queries, *(question.query for question in told)]
        judged = [self._judge(query, reply) for query, reply in zip(queries, replies, strict=True)]
        n = len(self.queries)
        self.plain.replies, self.told.replies = judged[:n], judged[n:]
        self.plain.allowed = self.told.allowed = n
        values = [self._surprising, *log_perplexities(self._engine, judged)]
        logs = [value for value in values if value is not None]
        self._most_surprising = max(logs, default=None)

    def ask(self, settings: Sequence[Setting], n: int | None = None) -> list[Trial]:
        """Trials of settings, each on the first `n` queries (by default all); nothing is asked twice."""
        for setting in settings:
            self.trials.setdefault(setting, Trial(setting, allowed=self._allowed))
        trials = [self.trials[setting] for setting in settings]
        plans = {setting: Plan.from_vectors([setting.of(self._vector)]) for setting in settings}
        missing = [(trial, query) for trial in trials for query in self.queries[trial.n : n]]
        replies = self._generate([Asked(query.text, query, plans[trial.setting]) for trial, query in missing])
        judged = [self._judge(query, reply) for (_, query), reply in zip(missing, replies, strict=True)]
        for (trial, _), reply in zip(missing, self._guarded(judged), strict=True):
            trial.replies.append(reply)
        return trials

    def ask_both(self, setting: Setting) -> None:
        """Ask the model told and steered at once."""
        plan = Plan.from_vectors([setting.of(self._vector)])
        told = [replace(question, plan=plan) for question in self._told()]
        replies = self._generate(told)
        self.both.replies = self._guarded(
            [self._judge(question.query, reply) for question, reply in zip(told, replies, strict=True)]
        )
        self.both.allowed = len(self.queries)

    @property
    def _allowed(self) -> int:
        """How many degenerate replies are allowed: as many as the model gives without steering, told or not,
        plus one in eight. Small models loop now and then, and each such reply counts as a failure anyway."""
        own = max(self.plain.n_degenerate, self.told.n_degenerate)
        return own + -(-len(self.queries) // 8)

    def _told(self) -> list[Asked]:
        phrasings = self._instruction.phrasings
        return [
            Asked(told_prompt(query, phrasings, i), query)
            for i, query in enumerate(self.queries)
            if phrasings
        ]

    def _generate(self, asked: Sequence[Asked]) -> list[Reply]:
        before = self.n_replies
        replies = self._generate_with(asked, lambda done: self._on_reply and self._on_reply(before + done))
        self.n_replies += len(replies)
        self.n_tokens += sum(len(reply.tokens) for reply in replies)
        return replies

    def _until_known(self, asked: Sequence[Asked], on_reply: Callable[[int], None]) -> list[Reply]:
        return replies_to(
            self._engine, self._instruction, asked, max_tokens=self.max_tokens, on_reply=on_reply
        )

    def _judge(self, query: Query, reply: Reply) -> Judged:
        return judge(self._instruction, query, reply, must_end=self._must_end)

    def _guarded(self, replies: Sequence[Judged]) -> list[Judged]:
        """Mark replies that are improbable for the unsteered model, since fluent nonsense passes every check
        of form.

        The other extreme, a perplexity near 1, is a loop, which its repetition shows better.
        """
        if self._most_surprising is None:
            return list(replies)
        limit = self._most_surprising + math.log(IMPROBABLE_RATIO)
        good = [i for i, reply in enumerate(replies) if reply.good]  # the others have failed already
        logs = dict(zip(good, log_perplexities(self._engine, [replies[i] for i in good]), strict=True))
        return [
            replace(reply, degenerate=IMPROBABLE) if (logs.get(i) or 0.0) > limit else reply
            for i, reply in enumerate(replies)
        ]
