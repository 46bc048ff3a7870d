"""Turns questions into replies: `stream` and `generate` for one, `generate_batch` for many.

All of them run the one loop (loop.py) to its end, and exist as methods of Engine: engine.generate(...) is
generate(engine, Ask(...)). scheduler.py keeps the loop running.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import PromptError
from ..plan import Plan
from .ask import Ask
from .loop import Loop, Request, new_request
from .reply import Chunk, Reply, Timings

if TYPE_CHECKING:
    from ..engine import Engine

# (index of the prompt, text so far, tokens so far) -> the reason to end the reply here, "" to continue
Watch = Callable[[int, str, int], str]


def stream(engine: Engine, ask: Ask) -> Iterator[Chunk]:
    """Chunks of a reply as they are generated. Prompt, plan, settings and grammar are checked before this
    returns.

    Exactly one chunk, the last, has a finish_reason. Raises PromptError, MismatchError.
    """
    return chunks_of(engine, new_request(engine, ask))


def generate(engine: Engine, ask: Ask) -> Reply:
    """The whole reply. Raises the same errors as `stream`."""
    return Reply.of(list(stream(engine, ask)))


def generate_batch(
    engine: Engine, asks: Sequence[Ask], *, on_progress: Callable[[int, int], None] | None = None
) -> list[Reply]:
    """Replies in the order of the questions; up to n_seq_max sequences share each decode.

    In the default context a sequence's numbers depend slightly on its neighbours (different kernels for one
    row and for many), so a greedy reply can differ from one decoded by itself; with Engine(exact=True) it
    can't.

    on_progress: called with (replies done, prompts). Raises PromptError, naming the prompt by its index,
    before anything is decoded.
    """
    replies: list[Reply | None] = [None] * len(asks)
    for n_done, (index, reply) in enumerate(stream_batch(engine, asks), 1):
        replies[index] = reply
        if on_progress:
            on_progress(n_done, len(asks))
    return replies


def stream_batch(
    engine: Engine, asks: Sequence[Ask], *, watch: Watch | None = None
) -> Iterator[tuple[int, Reply]]:
    """Yields (index of the prompt, reply) of a batch, each as soon as it ends. watch: may end a reply
    early."""
    return stream_requests(engine, new_requests(engine, asks), watch)


def stream_requests(
    engine: Engine, requests: Sequence[Request], watch: Watch | None = None
) -> Iterator[tuple[int, Reply]]:
    index_of = {id(request): index for index, request in enumerate(requests)}
    texts = [""] * len(requests)
    loop = Loop(engine, requests)
    with closing(loop.run()) as events:
        for request, chunk in events:
            index = index_of[id(request)]
            texts[index] += chunk.text
            reason = chunk.finish_reason
            if not reason and watch and (reason := watch(index, texts[index], len(request.tokens))):
                loop.drop(request)
            if reason:
                timings, stop = chunk.timings or Timings(), chunk.stopped_by
                yield index, Reply(texts[index], list(request.tokens), reason, timings, stop)


def chunks_of(engine: Engine, request: Request) -> Iterator[Chunk]:
    """Yields the chunks of one request, with nothing else in the engine."""
    with closing(Loop(engine, [request]).run()) as events:
        for _request, chunk in events:
            yield chunk


def new_requests(engine: Engine, asks: Sequence[Ask]) -> list[Request]:
    """Requests for these questions. The same vectors for many prompts share one plan, which the hook compiles
    once.

    Raises PromptError, naming the prompt by its index.
    """
    plans: dict[object, Plan | None] = {}
    requests = []
    for index, ask in enumerate(asks):
        vectors = tuple(map(id, ask.steer)) if isinstance(ask.steer, tuple) else id(ask.steer)
        if vectors not in plans:
            plans[vectors] = engine.plan(ask.steer)
        try:
            requests.append(new_request(engine, replace(ask, steer=plans[vectors])))
        except PromptError as error:
            raise PromptError(f"prompt {index}: {error}") from error
    return requests
