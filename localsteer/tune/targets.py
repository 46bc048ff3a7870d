"""Replies of the told model that follow the instruction: what a good setting makes likely without being told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from localsteer.likelihood import Likelihood, Row

MAX_TOKENS = 48  # of a target; what an instruction does to a reply shows early, or all along
GAP_SHARE = 0.9  # of a target's gap that its kept beginning holds
SMALL = 0.02  # of the largest gap of a target: what is smaller is not worth a row of logits


@dataclass(frozen=True, eq=False)
class Target:
    """plain, told: the prompt's ids without and with the instruction. reply: ids, with the token that ends it.

    gap: (n,) nats, log-probability of each token of the reply when told, less that of the plain model.
    base: (n,) nats, that of the plain model.
    """

    plain: tuple[int, ...]
    reply: tuple[int, ...]
    gap: np.ndarray
    base: np.ndarray

    @cached_property
    def weights(self) -> np.ndarray:
        """(n,) what each token counts: its gap, where the instruction makes it likelier."""
        weights = np.maximum(self.gap, 0.0)
        return np.where(weights >= SMALL * weights.max(initial=0.0), weights, 0.0)

    def row(self, plan) -> Row:
        return Row(self.plain, self.reply, plan, self.weights > 0)

    def recovered(self, steered: np.ndarray) -> float:
        """The share of the gap that a setting recovers: sum g (steered - plain) / sum g (told - plain), over
        the tokens of `row`. 1 is as likely as when told, 0 as the plain model; below 0 is less than that."""
        wanted = self.weights > 0
        weights, gap = self.weights[wanted], self.gap[wanted]
        return float((weights * (steered - self.base[wanted])).sum() / (weights * gap).sum())


def measured(
    likelihood: Likelihood,
    plain: Sequence[Sequence[int]],
    told: Sequence[Sequence[int]],
    replies: Sequence[Sequence[int]],
) -> list[Target]:
    """Targets of replies, each cut behind the tokens that hold most of its gap; none of one without a gap."""
    replies = [tuple(reply[:MAX_TOKENS]) for reply in replies]
    base = likelihood([Row(tuple(p), r) for p, r in zip(plain, replies, strict=True)])
    top = likelihood([Row(tuple(p), r) for p, r in zip(told, replies, strict=True)])
    targets = []
    for prompt, reply, low, high in zip(plain, replies, base, top, strict=True):
        gap = high - low
        n = _kept(gap)
        if n:
            targets.append(Target(tuple(prompt), reply[:n], gap[:n], low[:n]))
    return targets


def _kept(gap: np.ndarray) -> int:
    weights = np.maximum(gap, 0.0) ** 2
    if weights.sum() <= 0:
        return 0
    return int(np.searchsorted(np.cumsum(weights), GAP_SHARE * weights.sum()) + 1)
