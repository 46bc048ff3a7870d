"""Streams, as server-sent events or lines of JSON, to clients that may hang up or stop reading."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, NamedTuple

from starlette.requests import Request
from starlette.responses import Response

from ..jsonable import JsonObject
from .errors import ApiError, api_error, as_json
from .replies import ClientGone, unless_gone, until_gone
from .shapes import api_of, refusal


class Stream(NamedTuple):
    """What kind of stream it is, and what its last write says."""

    media_type: str
    goodbye: bytes = b""


CHUNKS = Stream("text/event-stream", b"data: [DONE]\n\n")
EVENTS = Stream("text/event-stream")
LINES = Stream("application/x-ndjson")
STREAMS = (b"text/event-stream", b"application/x-ndjson")


def event(document: JsonObject) -> bytes:
    return b"data: " + as_json(document) + b"\n\n"


def named_event(document: Mapping[str, Any]) -> bytes:
    """With the document's type as the event's name."""
    return f"event: {document['type']}\n".encode("ascii") + event(dict(document))


def line(document: JsonObject) -> bytes:
    return as_json(document) + b"\n"


def last_words(error: ApiError, scope: Mapping[str, Any], n_sent: int) -> bytes:
    """How a stream ends whose status is out already. n_sent: events before it."""
    api = api_of(scope)
    if api == "responses":
        told = {"code": error.code, "message": str(error), "param": error.param}
        return named_event({"type": "error", "sequence_number": n_sent} | told)
    document = refusal(error, scope)
    if api == "anthropic":
        return named_event(document)
    return line(document) if api == "ollama" else event(document)


class EventStream(Response):
    """A response that ends early, and closes what it streams, if the client leaves or does not read for
    write_seconds."""

    def __init__(
        self,
        events: AsyncIterator[bytes],
        first: bytes,
        close: Callable[[], None],
        write_seconds: float,
        kind: Stream = CHUNKS,
    ) -> None:
        self.media_type, self._goodbye = kind
        # nginx would otherwise hold the events back
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._first, self._close, self._write_seconds = events, first, close, write_seconds
        self._writing_since: float | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        sending = asyncio.create_task(self._send_all(scope, send))
        leaving = asyncio.create_task(until_gone(Request(scope, receive)))
        stalling = asyncio.create_task(self._until_stalled())
        tasks = (sending, leaving, stalling)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        except OSError:
            pass  # the client went
        finally:
            self._close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _until_stalled(self) -> None:
        """Return when one write has waited for write_seconds; a timer of its own would cost every write."""
        while True:
            since = self._writing_since
            left = self._write_seconds - (0.0 if since is None else time.monotonic() - since)
            if left <= 0:
                return
            await asyncio.sleep(left)

    async def _send_all(self, scope: Any, send: Any) -> None:
        n_sent = 0

        async def write(body: bytes, more: bool = True) -> None:
            nonlocal n_sent
            message = {"type": "http.response.body", "body": body, "more_body": more}
            self._writing_since = time.monotonic()
            await send(message)
            self._writing_since = None
            n_sent += 1

        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await write(self._first)
        try:
            async for body in self._events:
                await write(body)
            await write(self._goodbye, more=False)
        except OSError:
            raise
        except Exception as error:  # the status is out already: the client still gets to know
            await write(last_words(api_error(error), scope, n_sent), more=False)


async def stream(
    request: Request,
    events: AsyncIterator[bytes],
    close: Callable[[], None],
    write_seconds: float,
    kind: Stream = CHUNKS,
) -> Response:
    """The response, after waiting for the first event: a failure before it is an error with its own
    status."""
    try:
        first = await unless_gone(request, anext(events))
    except ClientGone:
        close()
        return Response(status_code=499)
    except BaseException:
        close()
        raise
    return EventStream(events, first, close, write_seconds, kind)
