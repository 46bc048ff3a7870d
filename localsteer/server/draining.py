"""Lets a client that is still sending its body read an early refusal.

A connection that is closed while bytes of a body wait to be read is reset, and the reset takes the answer
with it: a client that sends its whole body before it reads would see a broken connection, never the 413.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from starlette.types import Message, Scope

SECONDS = 5.0  # for the rest of a body, and
BYTES = 64 << 20  # at most this much of it
LATE = 408  # of a client that does not send its body: there is nothing to wait for


class Drain:
    """ASGI middleware: after an answer that came before the end of the body, read and drop the rest."""

    def __init__(self, app: Callable[..., Any]) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or not _sends_body(scope):
            return await self.app(scope, receive, send)
        is_open, is_late = True, False

        async def receiving() -> Message:
            nonlocal is_open
            message = await receive()
            is_open = is_open and bool(message.get("more_body"))
            return message

        async def drain() -> None:
            n = 0
            while is_open and n < BYTES:
                n += len((await receiving()).get("body", b""))

        async def sending(message: Message) -> None:
            nonlocal is_late
            is_late = is_late or message.get("status") == LATE
            is_last = message["type"] == "http.response.body" and not message.get("more_body")
            if is_last and is_open and not is_late:
                await send({**message, "more_body": True})
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(drain(), SECONDS)
                message = {"type": "http.response.body", "body": b""}
            await send(message)

        await self.app(scope, receiving, sending)


def _sends_body(scope: Scope) -> bool:
    """Whether a body is on its way. A client that asks first (Expect) sends none after a refusal."""
    names = {key for key, _ in scope["headers"]}
    return bool(names & {b"content-length", b"transfer-encoding"}) and b"expect" not in names
