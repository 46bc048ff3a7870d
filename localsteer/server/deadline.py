"""Gives every request a deadline, at whatever stage it is: being read, waiting for a slot, decoding, being
checked, or being written to a client that reads slowly."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from starlette.types import Message, Scope

from .errors import ApiError
from .limits import Limits
from .streaming import STREAMS, last_words

UNWINDING_SECONDS = 1.0  # for a cancelled request to release what it holds
FAREWELL_SECONDS = 1.0  # for the error to be written


class Deadline:
    """ASGI middleware: cancels a request after limits.request_seconds. The request releases what it holds in
    its `finally` clauses, which also tell its threads that nothing waits for them."""

    def __init__(self, app: Callable[..., Any], limits: Limits) -> None:
        self.app, self.limits = app, limits

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        answer = _Answer(send)
        seconds = self.limits.request_seconds
        work = asyncio.ensure_future(self.app(scope, receive, answer.send))
        try:
            await asyncio.wait({work}, timeout=seconds)
        except asyncio.CancelledError:  # the server is closing
            work.cancel()
            raise
        if work.done():
            return work.result()
        answer.closed = True
        work.cancel()
        await asyncio.wait({work}, timeout=UNWINDING_SECONDS)
        try:
            await asyncio.wait_for(answer.give_up(scope, receive, _late(seconds)), FAREWELL_SECONDS)
        except asyncio.TimeoutError:
            let_go(scope)


class _Answer:
    """Tracks what has been sent of an answer; after `closed`, the request can't send any more."""

    def __init__(self, send: Any) -> None:
        self._send = send
        self.closed = self.started = self.is_stream = self.ended = False
        self.n_sent = 0

    async def send(self, message: Message) -> None:
        if self.closed:
            return
        if message["type"] == "http.response.start":
            self.started = True
            self.is_stream = any(value.startswith(STREAMS) for _, value in message["headers"])
        else:
            self.n_sent += 1
        self.ended = message["type"] == "http.response.body" and not message.get("more_body")
        await self._send(message)

    async def give_up(self, scope: Scope, receive: Any, error: ApiError) -> None:
        if not self.started:
            await error.response(scope)(scope, receive, self._send)
        elif self.is_stream and not self.ended:
            body = last_words(error, scope, self.n_sent)
            await self._send({"type": "http.response.body", "body": body, "more_body": False})
        else:
            let_go(scope)


def let_go(scope: Scope) -> None:
    """Drop a connection together with unwritten data, since closing would wait for the client to read it."""
    abort = scope.get("state", {}).get("abort")
    if abort:
        abort()


def _late(seconds: float) -> ApiError:
    return ApiError(
        f"the request was not finished within {seconds:g} seconds: ask for less, or start the server with a "
        "longer --request-timeout.",
        status=504,
        code="request_timeout",
    )
