"""POST /v1/responses, OpenAI's newer API: items in, items out, a stream of events with their numbers.

Nothing is kept: `store` is ignored, what it would lead to (`previous_response_id`, GET) is refused.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping
from itertools import count
from typing import Any, ClassVar

from fastapi import APIRouter, Request
from starlette.responses import Response

from ...jsonable import JsonObject
from ..answers import chat_logprobs
from ..errors import ApiError, Json
from ..parts import Answer, Part, WholeReply
from ..reading import BodyRoute
from ..streaming import EVENTS, named_event
from ..tools import Call
from ..turns import answered, count_tokens, translated
from .responses_body import KEPT_NOWHERE, ResponsesRequest

router = APIRouter(route_class=BodyRoute)
NAMES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    r"response_format\.json_schema": "text.format",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
    r"tools\.(\d+)\.function": r"tools.\1",
    "logprobs": "include",
}


@router.post("/responses", include_in_schema=False)
@router.post("/v1/responses", tags=["OpenAI"], summary="Answer a conversation: the Responses API")
async def responses(body: ResponsesRequest, request: Request) -> Response:
    return await answered(request, await translated(body.chat_request, NAMES), ResponsesFace(body))


@router.post("/responses/input_tokens", include_in_schema=False)
@router.post("/v1/responses/input_tokens", tags=["OpenAI"], summary="Count the tokens of a conversation")
async def input_tokens(body: ResponsesRequest, request: Request) -> Response:
    try:
        n = await count_tokens(request.app.state.localsteer, await translated(body.chat_request, NAMES))
    except ApiError as error:
        raise error.named(NAMES) from None
    return Json({"object": "response.input_tokens", "input_tokens": n})


@router.get("/v1/responses/{name:path}", include_in_schema=False)
@router.delete("/v1/responses/{name:path}", include_in_schema=False)
async def stored(name: str) -> Response:
    raise ApiError(
        f"response_id: there is no response {name!r:.80}: {KEPT_NOWHERE}.",
        status=404, param="response_id", code="response_not_found",
    )  # fmt: skip


class ResponsesFace:
    stream = EVENTS
    names: ClassVar[Mapping[str, str]] = NAMES

    def __init__(self, body: ResponsesRequest) -> None:
        self.body = body
        self.id, self.created = f"resp_{secrets.token_hex(24)}", int(time.time())

    def document(self, answer: Answer, replies: list[WholeReply]) -> JsonObject:
        (reply,) = replies
        status, output = _status(reply.reason), []
        if reply.text or not reply.calls:
            scores = self._scores(answer, reply.scores)
            output.append(_message(_new_id("msg"), status, reply.text, scores))
        output += [_call(_new_id("fc"), call) for call in reply.calls]
        return self._response(answer, status, output) | answer.told

    async def events(self, answer: Answer) -> AsyncIterator[bytes]:
        numbers = count()

        def made(kind: str, **fields: Any) -> bytes:
            return named_event({"type": f"response.{kind}", "sequence_number": next(numbers), **fields})

        output: list[JsonObject] = []
        said = _Said(made)
        begun = False
        async for part in answer.parts():
            if not begun:
                begun = True
                head = self._response(answer, "in_progress", []) | dict(answer.left_out)
                yield made("created", response=head)
                yield made("in_progress", response=head)
            for event in said.add(part, self._scores(answer, part.scores)):
                yield event
            if not part.reason:
                continue
            status = _status(part.reason)
            for event in said.end(status, has_calls=bool(part.calls)):
                yield event
            output += said.items
            for call in part.calls:
                item = _call(_new_id("fc"), call)
                for event in _call_events(made, item, len(output)):
                    yield event
                output.append(item)
            kind = "completed" if status == "completed" else "incomplete"
            yield made(kind, response=self._response(answer, status, output) | answer.told)

    def _scores(self, answer: Answer, scores: Any) -> list[JsonObject]:
        return chat_logprobs(answer.served.engine, scores)["content"] if self.body.wants_scores else []

    def _response(self, answer: Answer, status: str, output: list[JsonObject]) -> JsonObject:
        body, ended = self.body, status != "in_progress"
        choice = body.tool_choice or "auto"
        wanted = body.format.model_dump(exclude_none=True, by_alias=True)
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": body.model or answer.served.name,
            "output": output,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": body.reasoning and body.reasoning.effort, "summary": None},
            "store": False,
            "temperature": body.temperature,
            "text": {"format": wanted},
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
            "tools": [tool.model_dump() for tool in body.tools or ()],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": _usage(answer) if ended else None,
            "metadata": body.metadata or {},
        }


class _Said:
    """The text of a streamed response: a message that begins with its first words. items: it, at its end."""

    def __init__(self, made: Callable[..., bytes]) -> None:
        self.made, self.id = made, _new_id("msg")
        self.text, self.scores, self.is_open = "", [], False
        self.items: list[JsonObject] = []
        self.place = {"item_id": self.id, "output_index": 0, "content_index": 0}

    def add(self, part: Part, scores: list[JsonObject]) -> list[bytes]:
        self.scores += scores
        if not part.text:
            return []
        self.text += part.text
        events = [] if self.is_open else self._open()
        delta = self.made("output_text.delta", **self.place, delta=part.text, logprobs=scores)
        return [*events, delta]

    def _open(self) -> list[bytes]:
        self.is_open = True
        item = _message(self.id, "in_progress", "", []) | {"content": []}
        return [
            self.made("output_item.added", output_index=0, item=item),
            self.made("content_part.added", **self.place, part=_text("", [])),
        ]

    def end(self, status: str, *, has_calls: bool) -> list[bytes]:
        """A response without calls has a message, be it empty."""
        events = [] if self.is_open or has_calls else self._open()
        if not self.is_open:
            return []
        item = _message(self.id, status, self.text, self.scores)
        self.items = [item]
        return [
            *events,
            self.made("output_text.done", **self.place, text=self.text, logprobs=self.scores),
            self.made("content_part.done", **self.place, part=_text(self.text, self.scores)),
            self.made("output_item.done", output_index=0, item=item),
        ]


def _call_events(made: Callable[..., bytes], item: JsonObject, index: int) -> list[bytes]:
    place = {"item_id": item["id"], "output_index": index}
    begun = item | {"arguments": "", "status": "in_progress"}
    return [
        made("output_item.added", output_index=index, item=begun),
        made("function_call_arguments.delta", **place, delta=item["arguments"]),
        made("function_call_arguments.done", **place, name=item["name"], arguments=item["arguments"]),
        made("output_item.done", output_index=index, item=item),
    ]


def _new_id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(24)}"


def _status(reason: str) -> str:
    return "incomplete" if reason == "length" else "completed"


def _text(text: str, scores: list[JsonObject]) -> JsonObject:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": scores}


def _message(name: str, status: str, text: str, scores: list[JsonObject]) -> JsonObject:
    content = [_text(text, scores)]
    return {"type": "message", "id": name, "status": status, "role": "assistant", "content": content}


def _call(name: str, call: Call) -> JsonObject:
    return {
        "type": "function_call",
        "id": name,
        "call_id": call.document()["id"],
        "name": call.name,
        "arguments": call.arguments,
        "status": "completed",
    }


def _usage(answer: Answer) -> JsonObject:
    usage = answer.usage
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
        "output_tokens": usage.reply,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt + usage.reply,
    }
