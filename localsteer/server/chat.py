"""POST /v1/chat/completions, OpenAI's older API: requests of all other APIs are turned into its requests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any, ClassVar

from fastapi import APIRouter, Request
from starlette.responses import Response

from ..jsonable import JsonObject
from .answers import chat_logprobs, envelope
from .parts import Answer, WholeReply
from .reading import BodyRoute
from .schemas import ChatRequest
from .streaming import CHUNKS, event
from .turns import answered

router = APIRouter(route_class=BodyRoute)


@router.post("/chat/completions", include_in_schema=False)
@router.post("/v1/chat/completions", tags=["OpenAI"], summary="Answer a conversation")
async def chat(body: ChatRequest, request: Request) -> Response:
    return await answered(request, body, ChatFace())


class ChatFace:
    stream = CHUNKS
    names: ClassVar[Mapping[str, str]] = {}

    def document(self, answer: Answer, replies: list[WholeReply]) -> JsonObject:
        choices = [self._choice(answer, i, reply) for i, reply in enumerate(replies)]
        return _head(answer, "chat.completion") | {"choices": choices, "usage": _usage(answer)} | answer.told

    def _choice(self, answer: Answer, i: int, reply: WholeReply) -> JsonObject:
        message: JsonObject = {"role": "assistant", "content": reply.text, "refusal": None}
        if reply.calls:
            calls = [call.document() for call in reply.calls]
            message |= {"content": reply.text or None, "tool_calls": calls}
        scores = chat_logprobs(answer.served.engine, reply.scores) if answer.body.logprobs else None
        return {"index": i, "message": message, "logprobs": scores, "finish_reason": reply.reason}

    async def events(self, answer: Answer) -> AsyncIterator[bytes]:
        body, engine = answer.body, answer.served.engine
        head = _head(answer, "chat.completion.chunk") | ({"usage": None} if body.with_usage else {})

        def made(i: int, delta: JsonObject, reason: str | None = None, logprobs: Any = None) -> bytes:
            choice = {"index": i, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
            told = answer.told if reason else answer.left_out
            return event(head | {"choices": [choice]} | told)

        begun: set[int] = set()
        async for part in answer.parts():
            i = part.choice
            if i not in begun:
                begun.add(i)
                yield made(i, {"role": "assistant", "content": ""})
            if part.text or part.scores or part.calls:
                delta: JsonObject = {"content": part.text} if part.text or part.scores else {}
                if part.calls:
                    calls = [{"index": k} | call.document() for k, call in enumerate(part.calls)]
                    delta["tool_calls"] = calls
                yield made(i, delta, logprobs=chat_logprobs(engine, part.scores) if part.scores else None)
            if part.reason:
                yield made(i, {}, part.reason)
        if body.with_usage:
            yield event(head | {"choices": [], "usage": _usage(answer)})


def _head(answer: Answer, kind: str) -> JsonObject:
    return envelope(kind, "chatcmpl", answer.body.model or answer.served.name)


def _usage(answer: Answer) -> JsonObject:
    usage = answer.usage
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.reply,
        "total_tokens": usage.prompt + usage.reply,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
    }
