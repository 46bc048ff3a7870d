"""Runs an application in uvicorn, with signals, a grace period, and an address that is known once it
listens."""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from localsteer.errors import LocalsteerError
from localsteer.runtime.bridge import end_after

from .app import state_of
from .connections import connection_class

CLOSING_SECONDS = 2.0  # for the last events of cancelled replies to be read
LAST_RESORT_SECONDS = 3.0  # after that the process is ended from outside Python


class _Server(uvicorn.Server):
    """A uvicorn server that leaves signals alone, since uvicorn would send them to the process again at the
    end."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Running:
    """One server. `serve` runs until `stop`, or a signal if it handles them."""

    def __init__(self, application: Any, host: str, port: int, grace: float = 10.0) -> None:
        self.state = state_of(application)
        self.grace = grace
        self.socket = _bound(host, port)
        self.address = self.socket.getsockname()[:2]
        self.signal: int | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._server = _Server(
            uvicorn.Config(
                application,
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                ws="none",
                lifespan="on",
                http=connection_class(self.state.limits),
                timeout_graceful_shutdown=math.ceil(grace + CLOSING_SECONDS),
            )
        )

    @property
    def url(self) -> str:
        host, port = self.address
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def serve(self, *, on_ready: Callable[[], None] | None = None, signals: bool = True) -> int | None:
        """Serve; returns the signal that ended it, or None for `stop`."""
        asyncio.run(self._serve(on_ready, signals))
        return self.signal

    def stop(self) -> None:
        """Take no new requests, and give those under way the grace period to finish. From any thread."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._end, None)

    async def _serve(self, on_ready: Callable[[], None] | None, signals: bool) -> None:
        self._loop = asyncio.get_running_loop()
        if signals:
            self._take_signals(self._loop)
        ready = asyncio.create_task(self._tell(on_ready))
        try:
            await self._server.serve(sockets=[self.socket])
        finally:
            ready.cancel()
            self.socket.close()

    def _take_signals(self, loop: asyncio.AbstractEventLoop) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                loop.add_signal_handler(number, self._end, number)
            except NotImplementedError:  # the event loops of Windows take no handlers
                signal.signal(number, lambda got, _frame: loop.call_soon_threadsafe(self._end, got))
            end_after(number, self.grace + CLOSING_SECONDS + LAST_RESORT_SECONDS, LAST_RESORT_SECONDS)

    async def _tell(self, on_ready: Callable[[], None] | None) -> None:
        while not self._server.started:
            await asyncio.sleep(0.01)
        if on_ready:
            on_ready()

    def _end(self, number: int | None) -> None:
        """Stop: the first time gently, the second time at once."""
        again = self._server.should_exit
        self.signal = self.signal or number
        self._server.should_exit = True
        grace = 0.0 if again else self.grace
        self.state.jobs.stop(grace)
        self.state.pool.stop(grace)


def _bound(host: str, port: int) -> socket.socket:
    """A listening socket, opened early so that a taken port is an error before anything is loaded."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, proto)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except (OSError, OverflowError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise LocalsteerError(
            f"can't listen on {host} port {port} ({why}): choose others with --host and --port."
        ) from None
    return made
