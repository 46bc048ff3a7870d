"""`ensure` in a request: a plain reply, steered only where it does not follow (localsteer/ensure.py).

The tries run in a thread of their own, so few may run at once; a stream brings the accepted reply alone.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response

from localsteer.errors import LocalsteerError

from .answers import REASONS, envelope
from .considered import harmless, report
from .errors import ApiError, Json, api_error
from .formats import constraint_of
from .holding import Held
from .models import Served, State
from .prompts import rendered, template_message
from .replies import ClientGone, samplings, unless_gone
from .schemas import ChatRequest, Tool
from .streaming import event, stream
from .threads import off_loop

if TYPE_CHECKING:
    from localsteer.ensure import Ensured
    from localsteer.vector import ControlVector

MAX_AT_ONCE = 32
_threads = ThreadPoolExecutor(MAX_AT_ONCE, "localsteer-ensure")
_free = threading.BoundedSemaphore(MAX_AT_ONCE)


async def ensured_chat(state: State, body: ChatRequest, tools: list[Tool], request: Request) -> Response:
    """The answer of POST /v1/chat/completions where the request asks for `ensure`."""
    _check(body, tools)
    body.model = body.model or state.default_name
    cancel = threading.Event()
    served, wanted, base = await off_loop(_chosen, state, body)
    steer, left_out = await harmless(served, base, body, tools)
    told = report(steer, left_out)
    work = _begin(await off_loop(_tries, state, body, served, wanted, steer, cancel))
    if body.stream:
        events = _events(body, work, told)
        return await stream(request, events, cancel.set, state.limits.write_seconds)
    try:
        return Json(_document(body, await unless_gone(request, work)) | told)
    except ClientGone:
        return Response(status_code=499)
    finally:
        cancel.set()


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
    for name, given in excluded.items():
        if given:
            raise ApiError(
                f"{name}: excludes ensure, which gives one checked text: leave one out.", param=name
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
    """What a thread has to do, with everything checked that can be checked before."""
    from localsteer.ensure import ensure

    settings: dict[str, Any] = {
        "steer": tuple(steer.values()),
        "sampling": samplings(body, constraint_of(body, served), served.sampling)[0],
        "max_tokens": body.most_tokens(state.limits.predict),
        "stop": body.stops,
        "cancel": cancel,
    }
    rendered(served, body.messages)  # to refuse what the template does not take
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
            f"{MAX_AT_ONCE} requests with ensure run already: try again later.", status=429, code="queue_full"
        )
    holding_models = Held(run)
    work = _threads.submit(holding_models)
    # also of one that is cancelled before it begins
    work.add_done_callback(lambda _work: (_free.release(), holding_models.drop()))
    return asyncio.wrap_future(work)


def _usage(found: Ensured) -> dict[str, Any]:
    """Replies that were tried and not taken cost tokens too."""
    prompt = found.reply.timings.prompt_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": found.n_tokens,
        "total_tokens": prompt + found.n_tokens,
    }


def _document(body: ChatRequest, found: Ensured) -> dict[str, Any]:
    message = {"role": "assistant", "content": found.reply.text, "refusal": None}
    reason = REASONS.get(found.reply.finish_reason, "stop")
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
    return envelope("chat.completion", "chatcmpl", body.model or "") | {
        "choices": [choice],
        "usage": _usage(found),
        "ensure": found.record(),
    }


async def _events(
    body: ChatRequest, work: asyncio.Future[Ensured], told: Mapping[str, Any]
) -> AsyncIterator[bytes]:
    found = await work
    head = envelope("chat.completion.chunk", "chatcmpl", body.model or "") | told
    reason = REASONS.get(found.reply.finish_reason, "stop")
    for delta, why in (({"role": "assistant", "content": found.reply.text}, None), ({}, reason)):
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": why}
        more = {"ensure": found.record()} if why else {}
        yield event(head | {"choices": [choice]} | ({"usage": None} if body.with_usage else {}) | more)
    if body.with_usage:
        yield event(head | {"choices": [], "usage": _usage(found)})
