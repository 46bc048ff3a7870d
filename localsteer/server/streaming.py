"""Server-sent events, to clients that may hang up or stop reading."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from .errors import ApiError, api_error, as_json
from .replies import ClientGone, unless_gone, until_gone

DONE = b"data: [DONE]\n\n"


def event(document: dict[str, Any]) -> bytes:
    return b"data: " + as_json(document) + b"\n\n"


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
        self._writing_since: float | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        sending = asyncio.create_task(self._send_all(send))
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

    async def _send_all(self, send: Any) -> None:
        async def write(body: bytes, more: bool = True) -> None:
            message = {"type": "http.response.body", "body": body, "more_body": more}
            self._writing_since = time.monotonic()
            await send(message)
            self._writing_since = None

        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await write(self._first)
        try:
            async for body in self._events:
                await write(body)
            await write(DONE, more=False)
        except ApiError as error:
            await write(event(error.document), more=False)
        except OSError:
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
