"""POST /api/chat and /api/generate, Ollama's API: lines of JSON unless `stream` is false."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from datetime import datetime, timezone
from functools import partial
from typing import Any, ClassVar

from fastapi import APIRouter, Request
from starlette.responses import Response

from ...jsonable import JsonObject
from ..answers import chat_logprobs
from ..completions import text_order
from ..errors import ApiError, Json
from ..models import State
from ..parts import Answer, Part, WholeReply
from ..prompts import loaded
from ..reading import BodyRoute
from ..replies import begin
from ..streaming import LINES, line
from ..threads import off_loop
from ..tools import Call
from ..turns import DecodedAnswer, answered, given, translated
from .ollama_body import OllamaBody, OllamaChatRequest, OllamaGenerateRequest
from .ollama_models import plain_name

router = APIRouter(route_class=BodyRoute, tags=["Ollama"])
NAMES = {
    "max_tokens": "options.num_predict",
    "stop": "options.stop",
    r"response_format\.json_schema\.schema": "format",
    "response_format": "format",
    "enable_thinking": "think",
    "reasoning_effort": "think",
}


@router.post("/api/chat", summary="Answer a conversation")
async def chat(body: OllamaChatRequest, request: Request) -> Response:
    state: State = request.app.state.localsteer
    face = ChatLines(_named(state, body))
    if body.is_empty:
        return _loaded(state, face)
    return await answered(request, await translated(body.chat_request, NAMES), face)


@router.post("/api/generate", summary="Answer a prompt, or continue a text")
async def generate(body: OllamaGenerateRequest, request: Request) -> Response:
    state: State = request.app.state.localsteer
    face = GenerateLines(_named(state, body))
    if body.is_empty:
        return _loaded(state, face)
    if not body.is_text:
        return await answered(request, await translated(body.chat_request, NAMES), face)
    most = -1 if state.limits.predict is None else state.limits.predict
    asked = await translated(partial(body.text_request, most), NAMES)
    try:
        job = await begin(state, await off_loop(text_order, state, asked))
        return await given(request, DecodedAnswer(asked, job), face)
    except ApiError as error:
        raise error.named(NAMES) from None


def _named(state: State, body: OllamaBody) -> OllamaBody:
    body.model = plain_name(state, body.model)
    return body


def _loaded(state: State, face: OllamaFace) -> Response:
    """The answer to a request without a prompt, with which clients load a model."""
    served, _ = state.steering(face.body.model, face.body.items)
    return Json(face.head(served.name) | face.said("") | {"done": True, "done_reason": "load"})


class OllamaFace:
    stream = LINES
    names: ClassVar[Mapping[str, str]] = NAMES

    def __init__(self, body: OllamaBody) -> None:
        self.body, self.started = body, time.perf_counter()

    def said(self, text: str, calls: Any = ()) -> JsonObject:
        """The part of a line that holds the reply."""
        raise NotImplementedError

    def head(self, model: str) -> JsonObject:
        now = datetime.now(timezone.utc).isoformat().replace("+00:00", "Z")
        return {"model": self.body.model or model, "created_at": now}

    def document(self, answer: Answer, replies: list[WholeReply]) -> JsonObject:
        (reply,) = replies
        said = self.said(reply.text, reply.calls) | self._scores(answer, reply.scores)
        return self.head(answer.served.name) | said | self._end(answer, reply)

    async def events(self, answer: Answer) -> AsyncIterator[bytes]:
        async for part in answer.parts():
            head = self.head(answer.served.name) | answer.left_out
            if part.text or part.scores or part.calls or not part.reason:
                said = self.said(part.text, part.calls) | self._scores(answer, part.scores)
                yield line(head | said | {"done": False})
            if part.reason:
                yield line(head | self.said("") | self._end(answer, part))

    def _scores(self, answer: Answer, scores: Any) -> JsonObject:
        if not self.body.wants_scores or not scores:
            return {}
        return {"logprobs": chat_logprobs(answer.served.engine, scores)["content"]}

    def _end(self, answer: Answer, last: Part | WholeReply) -> JsonObject:
        """The fields of the last line. Times are in nanoseconds; load_duration is the wait for a slot."""
        total = time.perf_counter() - self.started
        prompt = last.timings.prompt_seconds if last.timings else 0.0
        decode = last.timings.decode_seconds if last.timings else 0.0
        usage = answer.usage
        return {
            "done": True,
            "done_reason": "length" if last.reason == "length" else "stop",
            "total_duration": _nanoseconds(total),
            "load_duration": _nanoseconds(max(0.0, total - prompt - decode)),
            "prompt_eval_count": usage.prompt,
            "prompt_eval_duration": _nanoseconds(prompt),
            "eval_count": usage.reply,
            "eval_duration": _nanoseconds(decode),
        } | answer.told


class ChatLines(OllamaFace):
    def said(self, text: str, calls: Any = ()) -> JsonObject:
        message: JsonObject = {"role": "assistant", "content": text}
        if calls:
            message["tool_calls"] = [_call(i, call) for i, call in enumerate(calls)]
        return {"message": message}


class GenerateLines(OllamaFace):
    def said(self, text: str, calls: Any = ()) -> JsonObject:
        return {"response": text}


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)


def _call(index: int, call: Call) -> JsonObject:
    """The arguments of a call, which need not be an object if the model wrote them without a constraint."""
    arguments = loaded(call.arguments)
    if not isinstance(arguments, dict):
        arguments = {"input": arguments}
    function = {"index": index, "name": call.name, "arguments": arguments}
    return {"id": call.document()["id"], "function": function}
