"""Many replies at once, from first to last; loop.py decodes them together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..errors import LocalsteerError, PromptError
from ..plan import Plan
from ..vector import ControlVector
from .generate import Reply, Sampling, Timings, stops_of
from .loop import Loop, Request, new_request

if TYPE_CHECKING:
    from ..engine import Engine, Prompt, Steer


def generate_batch(
    engine: Engine,
    prompts: Sequence[Prompt],
    *,
    steer: Steer | Sequence[Steer] = (),
    max_tokens: int | None = 512,
    sampling: Sampling | Sequence[Sampling] | None = None,
    stop: Sequence[str] = (),
    raw: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Reply]:
    """Replies in the order of the prompts; up to n_seq_max sequences go through each decode together.

    In the default context a sequence's numbers depend a little on its neighbours (other kernels for one row
    and for many), so that a greedy reply can differ from the one alone; with Engine(exact=True) it doesn't.

    steer: one list of vectors (or one Plan) for all prompts, or one such thing for each prompt. sampling: one
    for all, where prompt i gets seed + i, or one each. on_progress: called with (replies done, prompts).
    Raises PromptError, naming the prompt by its index, before anything is decoded.
    """
    replies: list[Reply | None] = [None] * len(prompts)
    ended = stream_batch(
        engine, prompts, steer=steer, max_tokens=max_tokens, sampling=sampling, stop=stop, raw=raw
    )
    for n, (index, reply) in enumerate(ended, 1):
        replies[index] = reply
        if on_progress:
            on_progress(n, len(prompts))
    return replies


def stream_batch(
    engine: Engine,
    prompts: Sequence[Prompt],
    *,
    steer: Steer | Sequence[Steer] = (),
    max_tokens: int | None = 512,
    sampling: Sampling | Sequence[Sampling] | None = None,
    stop: Sequence[str] = (),
    raw: bool = False,
) -> Iterator[tuple[int, Reply]]:
    """`generate_batch` as (index of the prompt, reply), each as soon as it ends."""
    if isinstance(prompts, str):
        raise PromptError("one text is no list of prompts: put it into a list, or call `generate`.")
    plans = plans_of(engine, steer, len(prompts))
    samplings = _samplings_of(sampling, len(prompts))
    stop = stops_of(engine, stop, raw)
    requests = [
        _request(engine, i, prompt, raw, plan, max_tokens=max_tokens, sampling=drawn, stop=stop)
        for i, (prompt, plan, drawn) in enumerate(zip(prompts, plans, samplings, strict=True))
    ]
    index_of = {id(request): i for i, request in enumerate(requests)}
    texts = [""] * len(requests)
    loop = Loop(engine)
    for request in requests:
        loop.add(request)
    try:
        while loop.busy:
            for request, event in loop.step():
                if isinstance(event, LocalsteerError):
                    raise event
                index = index_of[id(request)]
                texts[index] += event.text
                if event.finish_reason:
                    timings = event.timings or Timings()
                    yield index, Reply(texts[index], request.tokens, event.finish_reason, timings)
    finally:
        loop.close()


def _request(
    engine: Engine, index: int, prompt: Prompt, raw: bool, plan: Plan | None, **settings: Any
) -> Request:
    try:
        return new_request(engine, engine.prompt_tokens(prompt, raw), plan, **settings)
    except PromptError as error:
        raise PromptError(f"prompt {index}: {error}") from error


def plans_of(engine: Engine, steer: Steer | Sequence[Steer], n: int) -> list[Plan | None]:
    """The plan of each of n prompts; None where nothing is changed."""
    steer = _listed(steer)
    if not isinstance(steer, list) or all(isinstance(each, ControlVector) for each in steer):
        return [engine.plan(steer)] * n
    if len(steer) != n:
        raise PromptError(f"steer has {len(steer)} entries for {n} prompts: give one each, or one for all.")
    # the same vectors for many prompts make one plan object, which the hook then compiles once
    plans: dict[tuple[int, ...], Plan | None] = {}
    steer = [_listed(each) for each in steer]
    keys = [_identity(each) for each in steer]
    for key, each in zip(keys, steer, strict=True):
        if key not in plans:
            plans[key] = engine.plan(each)
    return [plans[key] for key in keys]


def _listed(steer: Steer) -> Steer:
    """Several things as a list: they are looked at twice, and a generator would be empty by then."""
    return steer if steer is None or isinstance(steer, (Plan, ControlVector)) else list(steer)


def _identity(steer: Steer) -> tuple[int, ...]:
    return tuple(map(id, steer)) if isinstance(steer, list) else (id(steer),)


def _samplings_of(sampling: Sampling | Sequence[Sampling] | None, n: int) -> list[Sampling]:
    if sampling is None or isinstance(sampling, Sampling):
        one = sampling or Sampling()
        if one.seed is None or one.is_argmax:
            return [one] * n
        return [replace(one, seed=one.seed + i) for i in range(n)]
    if len(sampling) != n:
        raise LocalsteerError(f"sampling has {len(sampling)} entries for {n} prompts: give one each, or one.")
    return list(sampling)
