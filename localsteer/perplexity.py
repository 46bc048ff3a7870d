"""How surprising replies are to the unsteered model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from localsteer.engine import Engine
    from localsteer.verify.judge import Judged


def log_perplexities(engine: Engine, replies: Sequence[Judged]) -> list[float | None]:
    """The negative mean log-probability of each reply under the unsteered model, after its plain query; None
    for an empty one.

    exp of their mean is the perplexity of several replies, each counted alike.
    """
    return log_scores(engine, [(reply.query, reply.tokens) for reply in replies])


def log_scores(engine: Engine, replies: Sequence[tuple[str, Sequence[int]]]) -> list[float | None]:
    """The same for pairs (query, tokens of its reply)."""
    rows = [i for i, (_, tokens) in enumerate(replies) if tokens]
    pairs = [(engine.prompt_tokens(replies[i][0]), replies[i][1]) for i in rows]
    scores: list[float | None] = [None] * len(replies)
    for i, score in zip(rows, engine.score(pairs) if pairs else [], strict=True):
        scores[i] = -score
    return scores


def perplexity(log_perplexities: Sequence[float | None]) -> float | None:
    known = [value for value in log_perplexities if value is not None]
    return math.exp(sum(known) / len(known)) if known else None
