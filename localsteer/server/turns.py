"""One turn of a conversation, whichever API asked for it: takes a ChatRequest, returns parts.

Each API is a face: it turns what its clients send into a ChatRequest, and writes the parts as its clients
read them, at once (`document`) or as they come (`events`).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response

from localsteer.jsonable import JsonObject
from localsteer.runtime.ask import Ask

from .answers import REASONS, scored
from .considered import harmless, report
from .ensured import ensured_answer
from .errors import ApiError, as_json_in_pieces, written
from .formats import constraining_field, constraint_of
from .models import Served, State
from .parts import Answer, Face, Part, Usage, WholeReply
from .prompts import rendered, variables_of
from .replies import ClientGone, Job, Order, begin, check_scores, samplings, unless_gone
from .schemas import ChatRequest, SamplingFields, Tool
from .streaming import stream
from .threads import off_loop
from .tools import CallHold, forced_call, offered, parse

if TYPE_CHECKING:
    from localsteer.constrain import Constraint
    from localsteer.runtime.reply import Chunk

Asked = TypeVar("Asked", bound=SamplingFields)


class DecodedAnswer:
    """The replies of a job, with the tool calls in them parsed."""

    def __init__(self, body: SamplingFields, job: Job, tools: Sequence[Tool] = ()) -> None:
        self.body, self.job, self.tools = body, job, tools
        self.served, self.n = job.order.served, len(job.tickets)
        self.end = job.end

    @property
    def usage(self) -> Usage:
        found = self.job.usage
        cached = found["prompt_tokens_details"]["cached_tokens"]
        return Usage(found["prompt_tokens"], found["completion_tokens"], cached)

    @property
    def left_out(self) -> Mapping[str, Any]:
        return report(self.job.order.steer, self.job.order.left_out)

    @property
    def told(self) -> JsonObject:
        order = self.job.order
        return report(order.steer, order.left_out, self.job.plain_tokens)

    async def parts(self) -> AsyncIterator[Part]:
        holds = [CallHold() if self.tools else None for _ in range(self.n)]
        async for i, chunk in self.job.chunks():
            hold = holds[i]
            text = hold.push(chunk.text) if hold else chunk.text
            part = Part(i, text, scored(chunk))
            if chunk.finish_reason:
                # the text may be anything, so not in the event loop
                end = self._last
                part = await off_loop(end, part, chunk, hold) if hold else end(part, chunk, None)
            yield part

    def _last(self, part: Part, chunk: Chunk, hold: CallHold | None) -> Part:
        reason = REASONS.get(chunk.finish_reason or "", "stop")
        text, calls = parse(hold.rest(), self.tools) if hold else ("", [])
        calls = calls[: getattr(self.body, "most_calls", None)]
        return replace(
            part,
            text=part.text + text,
            calls=calls,
            reason="tool_calls" if calls and reason == "stop" else reason,
            stop=chunk.stopped_by if chunk.stopped_by in self.body.stops else None,
            timings=chunk.timings,
        )


async def begun(state: State, body: ChatRequest) -> Answer:
    """The answer to a turn, in progress. Raises ApiError."""
    tools = offered(body, state.served(body.model)[0])
    if body.ensured:
        return await ensured_answer(state, body, tools)
    order = await off_loop(_order, state, body, tools)
    if not body.stream:
        check_scores(order)
    steer, left_out = await harmless(order.served, order.steer, body, tools)
    return DecodedAnswer(body, await begin(state, replace(order, steer=steer, left_out=left_out)), tools)


async def translated(make: Callable[[], Asked], names: Mapping[str, str]) -> Asked:
    """The ChatRequest that a face makes from a body, in a thread. A valid body may still add up to more than
    a turn may hold, such as hundreds of calls in one message. Raises ApiError."""
    try:
        return await off_loop(make)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        # a message by itself does not show which one it was
        param = str(first["loc"][0]) if error.title == ChatRequest.__name__ and first["loc"] else "messages"
        message = first["msg"].removeprefix("Value error, ").rstrip(".")
        raise ApiError(f"{param}: {message[:1].lower()}{message[1:]}.", param=param).named(names) from None
    except ApiError as error:
        raise error.named(names) from None


async def count_tokens(state: State, body: ChatRequest) -> int:
    """The number of tokens in the prompt as the model would read it. Raises ApiError."""

    def count() -> int:
        served, _ = state.served(body.model)
        tools, variables = offered(body, served), variables_of(body, served.engine.template)
        go_on = bool(body.continue_final_message)
        text = rendered(served, body.messages, tools, go_on=go_on, variables=variables)
        return len(served.engine.rendered_tokens(text))

    return await off_loop(count)


async def answered(request: Request, body: ChatRequest, face: Face) -> Response:
    """The response of a route to a turn."""
    state: State = request.app.state.localsteer
    try:
        return await given(request, await begun(state, body), face)
    except ApiError as error:
        raise error.named(face.names) from None


async def given(request: Request, answer: Answer, face: Face) -> Response:
    """An answer, streamed or whole, as the face writes it."""
    if answer.body.stream:
        state: State = request.app.state.localsteer
        seconds = state.limits.write_seconds
        return await stream(request, face.events(answer), answer.end, seconds, face.stream)
    try:
        return written(await unless_gone(request, _whole(answer, face)))
    except ClientGone:
        return Response(status_code=499)
    finally:
        answer.end()


async def _whole(answer: Answer, face: Face) -> bytes:
    replies = [WholeReply() for _ in range(answer.n)]
    async for part in answer.parts():
        replies[part.choice].add(part)

    def write() -> bytes:
        return as_json_in_pieces(face.document(answer, replies))

    # scores may be many
    return await off_loop(write) if any(reply.scores for reply in replies) else write()


def _order(state: State, body: ChatRequest, tools: list[Tool]) -> Order:
    served, steer = state.steering(body.model, body.items)
    variables, go_on = variables_of(body, served.engine.template), bool(body.continue_final_message)
    grammar = _grammar(body, served, tools)
    return Order(
        served=served,
        prompts=[rendered(served, body.messages, tools, go_on=go_on, variables=variables)],
        steer=steer,
        samplings=samplings(body, served, grammar),
        ask=Ask(
            max_tokens=body.most_tokens(state.limits.predict),
            stop=[*body.stops, *served.engine.template.stop],  # the prompt is passed on as raw text
            n_top=body.n_top,
            plain_forms=bool(tools or grammar) and not body.steer_forms,
        ),
    )


def _grammar(body: ChatRequest, served: Served, tools: list[Tool]) -> Constraint | None:
    name = constraining_field(body)
    if tools and name is not None:
        raise ApiError(f"{name}: excludes tools here: send `tool_choice: none`, or no {name}.", param=name)
    return constraint_of(body, served) or forced_call(body, served, tools)
