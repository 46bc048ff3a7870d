"""`ensure` in a request: a plain reply, and steered ones only if it does not follow (localsteer/ensure.py).

The tries run in a separate thread, so only a few may run at once; a stream brings only the accepted reply.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from localsteer.errors import LocalsteerError
from localsteer.jsonable import JsonObject

from .answers import REASONS
from .considered import harmless, report
from .errors import ApiError, api_error
from .formats import constraint_of
from .holding import Held
from .models import Served, State
from .parts import Part, Usage
from .prompts import rendered, template_message
from .replies import samplings
from .schemas import ChatRequest, Tool
from .threads import off_loop

if TYPE_CHECKING:
    from localsteer.ensure import Ensured
    from localsteer.vector import ControlVector

MAX_AT_ONCE = 32
_threads = ThreadPoolExecutor(MAX_AT_ONCE, "localsteer-ensure")
_free = threading.BoundedSemaphore(MAX_AT_ONCE)


async def ensured_answer(state: State, body: ChatRequest, tools: list[Tool]) -> EnsuredAnswer:
    """The answer to a turn that asks for `ensure`, in progress."""
    _check(body, tools)
    body.model = body.model or state.default_name
    cancel = threading.Event()
    served, wanted, base = await off_loop(_chosen, state, body)
    steer, left_out = await harmless(served, base, body, tools)
    work = _begin(await off_loop(_tries, state, body, served, wanted, steer, cancel))
    return EnsuredAnswer(body, served, work, report(steer, left_out), cancel)


@dataclass(eq=False)
class EnsuredAnswer:
    """The accepted reply, in one piece. left_out: what the answer says about vectors that are not applied."""

    body: ChatRequest
    served: Served
    work: asyncio.Future[Ensured]
    left_out: Mapping[str, Any]
    cancel: threading.Event
    n: int = 1

    def end(self) -> None:
        self.cancel.set()

    @property
    def found(self) -> Ensured | None:
        return self.work.result() if self.work.done() else None

    @property
    def told(self) -> JsonObject:
        return {**self.left_out, **({"ensure": self.found.record()} if self.found else {})}

    @property
    def usage(self) -> Usage:
        """The usage, including the replies that were tried and not accepted."""
        assert self.found is not None
        return Usage(self.found.reply.timings.prompt_tokens, self.found.n_tokens)

    async def parts(self) -> AsyncIterator[Part]:
        reply = (await self.work).reply
        stop = reply.stopped_by if reply.stopped_by in self.body.stops else None
        reason = REASONS.get(reply.finish_reason, "stop")
        yield Part(0, reply.text, reason=reason, stop=stop, timings=reply.timings)


def _check(body: ChatRequest, tools: list[Tool]) -> None:
    excluded = {
        "n": (body.n or 1) > 1,
        "logprobs": body.logprobs,
        "tools": tools,
        "continue_final_message": body.continue_final_message,
        "chat_template_kwargs": body.chat_template_kwargs,
        "enable_thinking": body.enable_thinking,
        "reasoning_effort": body.reasoning_effort,
    }
    for name, is_asked in excluded.items():
        if is_asked:
            raise ApiError(
                f"{name}: excludes ensure, which returns one checked text: leave one of them out.", param=name
            )


def _chosen(state: State, body: ChatRequest) -> tuple[Served, list[ControlVector], dict[str, ControlVector]]:
    """The model, the vectors to ensure, and those that are applied in every try."""
    served, vectors = state.steering(body.model, body.items)
    wanted = [
        vectors.pop(name, None) or state.vectors.vector(name, served.name, "ensure") for name in body.ensured
    ]
    return served, wanted, vectors


def _tries(
    state: State,
    body: ChatRequest,
    served: Served,
    wanted: list[ControlVector],
    steer: Mapping[str, ControlVector],
    cancel: threading.Event,
) -> Callable[[], Ensured]:
    """The work for a thread, after every check that can be made beforehand."""
    from localsteer.ensure import ensure

    grammar = constraint_of(body, served)
    settings: JsonObject = {
        "steer": tuple(steer.values()),
        "sampling": samplings(body, served, grammar)[0],
        "plain_forms": grammar is not None and not body.steer_forms,
        "max_tokens": body.most_tokens(state.limits.predict),
        "stop": body.stops,
        "cancel": cancel,
    }
    rendered(served, body.messages)  # refuses what the template does not take
    messages = [template_message(message) for message in body.messages]

    def run() -> Ensured:
        try:
            found = ensure(served.scheduler, messages, wanted, **settings)
        except LocalsteerError as error:
            raise api_error(error, "ensure") from None
        state.metrics.tokens.labels(served.name, "reply").inc(found.n_tokens)
        if found.reply.finish_reason == "cancelled" and not cancel.is_set():
            raise ApiError("the server is closing: the reply was cut.", status=503, code="closing")
        return found

    return run


def _begin(run: Callable[[], Ensured]) -> asyncio.Future[Ensured]:
    if not _free.acquire(blocking=False):
        raise ApiError(
            f"{MAX_AT_ONCE} requests with ensure are already running: try again later.",
            status=429,
            code="queue_full",
        )
    holding_models = Held(run)
    work = _threads.submit(holding_models)
    # also for one that is cancelled before it begins
    work.add_done_callback(lambda _work: (_free.release(), holding_models.drop()))
    return asyncio.wrap_future(work)
