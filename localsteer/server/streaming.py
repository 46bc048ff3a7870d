"""Server-sent events, to clients that may hang up or stop reading."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from .errors import ApiError, Json, api_error
from .replies import ClientGone, unless_gone, until_gone

DONE = b"data: [DONE]\n\n"


def event(document: dict[str, Any]) -> bytes:
    return b"data: " + Json(None).render(document) + b"\n\n"


class EventStream(Response):
    """Ends early, and closes what it streams, when the client goes or does not read for write_seconds."""

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncIterator[bytes], first: bytes, close: Callable[[], None], write_seconds: float
    ) -> None:
        # nginx would otherwise hold the events back
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._first, self._close, self._write_seconds = events, first, close, write_seconds

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        sending = asyncio.create_task(self._send_all(send))
        leaving = asyncio.create_task(until_gone(Request(scope, receive)))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        except (OSError, asyncio.TimeoutError):
            pass  # the client went, or reads nothing
        finally:
            self._close()
            sending.cancel()
            leaving.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)

    async def _send_all(self, send: Any) -> None:
        async def write(body: bytes, more: bool = True) -> None:
            message = {"type": "http.response.body", "body": body, "more_body": more}
            await asyncio.wait_for(send(message), self._write_seconds)

        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await write(self._first)
        try:
            async for body in self._events:
                await write(body)
            await write(DONE, more=False)
        except ApiError as error:
            await write(event(error.document), more=False)
        except (OSError, asyncio.TimeoutError):
            raise
        except Exception as error:  # the status is out already: the client still gets to know
            await write(event(api_error(error).document), more=False)


async def stream(
    request: Request, events: AsyncIterator[bytes], close: Callable[[], None], write_seconds: float
) -> Response:
    """Waits for the first event: what goes wrong before it is an error with a status of its own."""
    try:
        first = await unless_gone(request, anext(events))
    except ClientGone:
        close()
        return Response(status_code=499)
    except BaseException:
        close()
        raise
    return EventStream(events, first, close, write_seconds)
