"""POST /v1/messages, Anthropic's API: content blocks in and out."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Mapping
from typing import ClassVar

from fastapi import APIRouter, Request
from starlette.responses import Response

from ...jsonable import JsonObject
from ..errors import ApiError, Json, as_json
from ..parts import Answer, WholeReply
from ..prompts import loaded
from ..reading import BodyRoute
from ..streaming import EVENTS, named_event
from ..tools import Call
from ..turns import answered, count_tokens, translated
from .anthropic_body import CountRequest, MessagesRequest

router = APIRouter(route_class=BodyRoute, tags=["Anthropic"])
NAMES = {
    "stop": "stop_sequences",
    r"response_format\.json_schema": "output_config.format",
    "reasoning_effort": "output_config.effort",
    r"tools\.(\d+)\.function\.parameters": r"tools.\1.input_schema",
    r"tools\.(\d+)\.function": r"tools.\1",
}


@router.post("/v1/messages", summary="Answer a conversation")
async def messages(body: MessagesRequest, request: Request) -> Response:
    return await answered(request, await translated(body.chat_request, NAMES), AnthropicFace(body))


@router.post("/v1/messages/count_tokens", summary="Count the tokens of a conversation")
async def count(body: CountRequest, request: Request) -> Response:
    try:
        n = await count_tokens(request.app.state.localsteer, await translated(body.chat_request, NAMES))
    except ApiError as error:
        raise error.named(NAMES) from None
    return Json({"input_tokens": n})


class AnthropicFace:
    stream = EVENTS
    names: ClassVar[Mapping[str, str]] = NAMES

    def __init__(self, body: MessagesRequest) -> None:
        self.body = body
        self.id = f"msg_{secrets.token_hex(12)}"

    def document(self, answer: Answer, replies: list[WholeReply]) -> JsonObject:
        (reply,) = replies
        blocks = [{"type": "text", "text": reply.text}] if reply.text else []
        blocks += [_tool_use(call) | {"input": _input(call)} for call in reply.calls]
        return self._message(answer, blocks) | _stop(reply.reason, reply.stop) | answer.told

    async def events(self, answer: Answer) -> AsyncIterator[bytes]:
        n_blocks, text_is_open, begun = 0, False, False
        async for part in answer.parts():
            if not begun:
                begun = True
                message = self._message(answer, []) | dict(answer.left_out)
                message["usage"]["output_tokens"] = 0
                yield named_event({"type": "message_start", "message": message})
                yield named_event({"type": "ping"})
            if part.text:
                if not text_is_open:
                    text_is_open = True
                    yield _start(n_blocks, {"type": "text", "text": ""})
                yield _delta(n_blocks, {"type": "text_delta", "text": part.text})
            if not part.reason:
                continue
            if text_is_open:
                yield _end(n_blocks)
                n_blocks += 1
            for call in part.calls:
                for event in _call_events(n_blocks, call):
                    yield event
                n_blocks += 1
            last = {"type": "message_delta", "delta": _stop(part.reason, part.stop), "usage": _usage(answer)}
            yield named_event(last | answer.told)
        yield named_event({"type": "message_stop"})

    def _message(self, answer: Answer, content: list[JsonObject]) -> JsonObject:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.body.model or answer.served.name,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(answer),
        }


def _stop(reason: str, stop: str | None) -> JsonObject:
    if reason == "stop":
        return {"stop_reason": "end_turn" if stop is None else "stop_sequence", "stop_sequence": stop}
    return {"stop_reason": {"length": "max_tokens", "tool_calls": "tool_use"}[reason], "stop_sequence": None}


def _usage(answer: Answer) -> JsonObject:
    """The usage in Anthropic's shape, in which cached tokens are not part of the input."""
    usage = answer.usage
    return {
        "input_tokens": usage.prompt - usage.cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached,
        "output_tokens": usage.reply,
    }


def _tool_use(call: Call) -> JsonObject:
    return {"type": "tool_use", "id": f"toolu_{secrets.token_hex(12)}", "name": call.name, "input": {}}


def _input(call: Call) -> JsonObject:
    """The arguments of a call, which need not be an object if the model wrote them without a constraint."""
    arguments = loaded(call.arguments)
    return arguments if isinstance(arguments, dict) else {"input": arguments}


def _start(index: int, block: JsonObject) -> bytes:
    return named_event({"type": "content_block_start", "index": index, "content_block": block})


def _delta(index: int, delta: JsonObject) -> bytes:
    return named_event({"type": "content_block_delta", "index": index, "delta": delta})


def _end(index: int) -> bytes:
    return named_event({"type": "content_block_stop", "index": index})


def _call_events(index: int, call: Call) -> list[bytes]:
    written = as_json(_input(call)).decode("utf-8")
    return [
        _start(index, _tool_use(call)),
        _delta(index, {"type": "input_json_delta", "partial_json": written}),
        _end(index),
    ]
