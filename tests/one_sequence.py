"""One sequence decoded by itself, a token at a time: the oracle of the generation loop, which does many."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice

import numpy as np

import localsteer
from localsteer.plan import Plan, PositionClass, position_classes
from localsteer.runtime.bridge import Sampler
from localsteer.runtime.sampling import Sampling

GREEDY = Sampling(temp=0.0)


def token_steps(
    engine: localsteer.Engine,
    prompt: Sequence[int],
    *,
    plan: Plan | None = None,
    sampling: Sampling = GREEDY,
) -> Iterator[int]:
    """Token after token, end-of-generation tokens included, until the context is full."""
    settings = {name: value for name, value in asdict(sampling).items() if name != "grammar"}
    sampler = None if sampling.is_argmax else Sampler(engine.model, **settings)
    engine.begin()
    size = engine.context.n_batch
    for start in range(0, len(prompt), size):
        positions = np.arange(start, min(start + size, len(prompt)))
        engine.context.decode(
            np.asarray(prompt, np.int32)[positions],
            positions,
            np.zeros_like(positions),
            positions == len(prompt) - 1,
            plans=[plan] * len(positions),
            classes=position_classes(positions, len(prompt)),
        )
    for position in range(len(prompt), engine.n_ctx):
        token = sampler.sample(engine.context) if sampler else int(engine.context.all_logits()[0].argmax())
        yield token
        if position + 1 < engine.n_ctx:
            engine.context.decode(
                [token], [position], [0], [True], plans=[plan], classes=[PositionClass.GENERATION]
            )


def reply_tokens(engine: localsteer.Engine, prompt: Sequence[int], n: int, **settings) -> list[int]:
    """At most n tokens, those before an end-of-generation token."""
    tokens = list(islice(token_steps(engine, prompt, **settings), n))
    ends = [i for i, token in enumerate(tokens) if engine.ends(token)]
    return tokens[: ends[0]] if ends else tokens
