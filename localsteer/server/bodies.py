"""Reads the bodies of requests, with limits on size and time for each, and on bytes for all together."""

from __future__ import annotations

import asyncio
import ctypes
import sys
from collections.abc import Callable
from typing import Any

from starlette.types import Message, Scope

from .errors import ApiError
from .limits import Limits
from .threads import aside

UPLOADS = "/v1/steering"
SMALL = 64 << 10  # bytes of a body that do not count, so that large bodies can't keep ordinary requests out
WORTH_TRIMMING = 2 << 20  # after this many bytes have been held at once, memory is returned to the system
TRIM_AFTER = 1.0  # seconds after the end of a large body


class _Gone(Exception):
    """The client hung up before its request was complete."""


class _Held:
    """Counts the bytes of bodies that all requests hold, beyond SMALL for each."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.n = self.peak = 0
        self._trimming: asyncio.TimerHandle | None = None

    def take(self, n: int) -> None:
        """Raise ApiError if there is no room."""
        if n > 0 and self.n + n > self.most:
            raise ApiError(
                f"body: other requests hold {self.n} of the {self.most} bytes available for bodies: try "
                "again later.",
                status=429, param="body", code="bodies_full",
            )  # fmt: skip
        self.n += n
        self.peak = max(self.peak, self.n)

    def give_back(self, n: int) -> None:
        self.n -= n
        # a trim that waits is not put off by the next large body: a stream of them would put it off for ever
        if self._trimming is None and self.peak >= WORTH_TRIMMING:
            loop = asyncio.get_running_loop()
            self._trimming = loop.call_later(TRIM_AFTER, self._trim, loop)

    def _trim(self, loop: asyncio.AbstractEventLoop) -> None:
        self._trimming, self.peak = None, self.n
        loop.create_task(aside(trim_memory))


def trim_memory() -> None:
    """Return memory to the system: glibc keeps what a burst of requests took, other allocators return it."""
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)


class BodyLimit:
    """ASGI middleware: a request continues when its body has arrived."""

    def __init__(self, app: Callable[..., Any], limits: Limits) -> None:
        self.app, self.limits = app, limits
        self.held = _Held(limits.max_held)

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        reading = _Arrival(self.held)
        try:
            await self._pass_on(reading, scope, receive, send)
        finally:
            self.held.give_back(reading.taken)

    async def _pass_on(self, reading: _Arrival, scope: Scope, receive: Any, send: Any) -> None:
        most = self.limits.max_upload if scope["path"] == UPLOADS else self.limits.max_body
        try:
            body = await asyncio.wait_for(reading.whole(scope, receive, most), self.limits.body_seconds)
        except asyncio.TimeoutError:
            error = ApiError(
                f"the body did not arrive within {self.limits.body_seconds:g} seconds.", status=408
            )
            return await error.response(scope)(scope, receive, send)
        except ApiError as error:
            return await error.response(scope)(scope, receive, send)
        except _Gone:
            return
        messages = [{"type": "http.request", "body": body, "more_body": False}]
        del body

        async def again() -> Message:
            return messages.pop() if messages else await receive()

        await self.app(scope, again, send)


class _Arrival:
    """taken: bytes of this body that count."""

    def __init__(self, held: _Held) -> None:
        self.held, self.taken = held, 0

    async def whole(self, scope: Scope, receive: Any, most: int) -> bytes:
        for key, value in scope["headers"]:
            if key == b"content-length" and value.isdigit() and int(value[:20]) > most:
                raise _too_large(value[:20].decode(), most)
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _Gone
            body += message.get("body", b"")
            if len(body) > most:
                raise _too_large(f"{len(body)} and more", most)
            self._count(len(body) - SMALL)
            if not message.get("more_body"):
                return bytes(body)

    def _count(self, n: int) -> None:
        more = max(0, n) - self.taken
        self.held.take(more)
        self.taken += more


def _too_large(size: str, most: int) -> ApiError:
    return ApiError(
        f"body: must be at most {most} bytes, not {size}.", status=413, param="body", code="body_too_large"
    )
