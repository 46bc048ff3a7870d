"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from localsteer.runtime.ask import Ask

from .answers import REASONS, Whole, chat_logprobs, envelope, scored
from .considered import harmless, report
from .ensured import ensured_chat
from .errors import ApiError, as_json_in_pieces, written
from .formats import constraining_field, constraint_of
from .models import Served, State
from .prompts import rendered, variables_of
from .reading import BodyRoute
from .replies import ClientGone, Job, Order, begin, check_scores, samplings, unless_gone
from .schemas import ChatRequest, Tool
from .streaming import event, stream
from .threads import off_loop
from .tools import CallHold, forced_call, offered, parse

if TYPE_CHECKING:
    from localsteer.constrain import Constraint

router = APIRouter(route_class=BodyRoute)


@router.post("/chat/completions", include_in_schema=False)
@router.post("/v1/chat/completions", tags=["OpenAI"], summary="Answer a conversation")
async def chat(body: ChatRequest, request: Request) -> Response:
    state: State = request.app.state.localsteer
    tools = offered(body, state.served(body.model)[0])
    if body.ensured:
        return await ensured_chat(state, body, tools, request)
    order = await off_loop(_order, state, body, tools)
    if not body.stream:
        check_scores(order)
    steer, left_out = await harmless(order.served, order.steer, body, tools)
    job = await begin(state, replace(order, steer=steer, left_out=left_out))
    if body.stream:
        return await stream(request, _events(body, job, tools), job.end, state.limits.write_seconds)
    try:
        return written(await unless_gone(request, _document(body, job, tools)))
    except ClientGone:
        return Response(status_code=499)
    finally:
        job.end()


def _order(state: State, body: ChatRequest, tools: list[Tool]) -> Order:
    served, steer = state.steering(body.model, body.items)
    variables, go_on = variables_of(body, served.engine.template), bool(body.continue_final_message)
    return Order(
        served=served,
        prompts=[rendered(served, body.messages, tools, go_on=go_on, variables=variables)],
        steer=steer,
        samplings=samplings(body, _grammar(body, served, tools), served.sampling),
        ask=Ask(
            max_tokens=body.most_tokens(state.limits.predict),
            stop=[*body.stops, *served.engine.template.stop],  # the prompt goes on as a raw text
            n_top=body.n_top,
        ),
    )


def _grammar(body: ChatRequest, served: Served, tools: list[Tool]) -> Constraint | None:
    field = constraining_field(body)
    if tools and field is not None:
        raise ApiError(f"{field}: excludes tools here: send `tool_choice: none`, or no {field}.", param=field)
    return constraint_of(body, served) or forced_call(body, served, tools)


def _head(body: ChatRequest, job: Job, kind: str) -> dict[str, Any]:
    order = job.order
    head = envelope(kind, "chatcmpl", body.model or order.served.name)
    return head | report(order.steer, order.left_out)


# -- at once ------------------------------------------------------------------------------------------------


async def _document(body: ChatRequest, job: Job, tools: list[Tool]) -> bytes:
    choices = [Whole() for _ in job.tickets]
    async for i, chunk in job.chunks():
        choices[i].add(chunk)

    def write() -> bytes:
        found = [_choice(i, choice, body, job, tools) for i, choice in enumerate(choices)]
        head = _head(body, job, "chat.completion")
        return as_json_in_pieces(head | {"choices": found, "usage": job.usage})

    # calls are read from a text that may be anything, and scores may be many
    return await off_loop(write) if tools or body.logprobs else write()


def _choice(i: int, choice: Whole, body: ChatRequest, job: Job, tools: list[Tool]) -> dict[str, Any]:
    text, calls = parse(choice.text, tools) if tools else (choice.text, [])
    calls = calls[: body.most_calls]
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    if calls:
        message |= {"content": text or None, "tool_calls": [call.document() for call in calls]}
    scores = chat_logprobs(job.order.served.engine, choice.scores) if body.logprobs else None
    reason = "tool_calls" if calls and choice.reason == "stop" else choice.reason
    return {"index": i, "message": message, "logprobs": scores, "finish_reason": reason}


# -- as it comes --------------------------------------------------------------------------------------------


@dataclass
class _Streamed:
    """One choice on its way to the client."""

    tools: list[Tool]
    most_calls: int | None = None
    hold: CallHold = field(default_factory=CallHold)

    def push(self, text: str) -> str:
        return self.hold.push(text) if self.tools else text

    def end(self, reason: str) -> tuple[dict[str, Any] | None, str]:
        """The last delta, if anything was held back, and the reason."""
        held = self.hold.rest()
        if not held:
            return None, reason
        text, calls = parse(held, self.tools)
        calls = calls[: self.most_calls]
        delta: dict[str, Any] = {"content": text} if text else {}
        if calls:
            delta["tool_calls"] = [{"index": k} | call.document() for k, call in enumerate(calls)]
        return delta, "tool_calls" if calls and reason == "stop" else reason


async def _events(body: ChatRequest, job: Job, tools: list[Tool]) -> AsyncIterator[bytes]:
    head, engine = _head(body, job, "chat.completion.chunk"), job.order.served.engine
    choices = [_Streamed(tools, body.most_calls) for _ in job.tickets]

    def made(i: int, delta: dict[str, Any], reason: str | None = None, logprobs: Any = None) -> bytes:
        choice = {"index": i, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return event(head | {"choices": [choice]} | ({"usage": None} if body.with_usage else {}))

    begun: set[int] = set()
    async for i, chunk in job.chunks():
        if i not in begun:
            begun.add(i)
            yield made(i, {"role": "assistant", "content": ""})
        text, scores = choices[i].push(chunk.text), scored(chunk)
        if text or scores:
            yield made(i, {"content": text}, logprobs=chat_logprobs(engine, scores) if scores else None)
        if chunk.finish_reason:
            end = choices[i].end
            ended = REASONS[chunk.finish_reason]
            delta, reason = await off_loop(end, ended) if tools else end(ended)
            if delta:
                yield made(i, delta)
            yield made(i, {}, reason)
    if body.with_usage:
        yield event(head | {"choices": [], "usage": job.usage})
