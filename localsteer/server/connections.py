"""How many connections may be open, and how long one may stay without a request.

Adds what uvicorn's protocol lacks: there, a client may take any time over the head of a request, or over
reading the last answer, and at the limit everybody is turned away. Here both have a time limit, and an idle
connection makes room for a new one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any, ClassVar

from uvicorn.protocols.http.h11_impl import H11Protocol

from .errors import ApiError
from .limits import Limits

# Bytes. A body in chunks of one byte costs the event loop 50 microseconds for each of them.
RECEIVED_AT_ONCE = 64 << 10
RECEIVED_OF_CHUNKS = 2 << 10
MAX_OVERHEAD = 32 << 10  # bytes of one request beside its body: its head, and the framing of chunks


class Room:
    """The open connections, by address, the oldest first."""

    def __init__(self, limits: Limits, most: int) -> None:
        self.limits, self.most = limits, most
        self._of: dict[str, dict[Connection, None]] = {}
        self._all: dict[Connection, None] = {}

    def enter(self, connection: Connection) -> bool:
        """Whether there is room, for which another connection may have to close."""
        own = self._of.get(connection.address, {})
        of_one = max(1, self.most // 2)  # no single address may take everything
        if len(own) >= of_one and not self._evict(own):
            return False
        if len(self._all) >= self.most and not self._evict(self._all):
            return False
        self._of.setdefault(connection.address, {})[connection] = None
        self._all[connection] = None
        return True

    def leave(self, connection: Connection) -> None:
        if self._all.pop(connection, connection) is None:
            own = self._of[connection.address]
            del own[connection]
            if not own:
                del self._of[connection.address]

    def _evict(self, among: Iterable[Connection]) -> bool:
        """The connection to close: one that never sent a request goes first, since the next request of
        another may be on its way, and would be lost."""
        silent = (connection for connection in among if connection.is_idle)
        idle = min(silent, key=lambda connection: (connection.has_answered, connection.since), default=None)
        if idle is None:
            return False
        self.leave(idle)
        idle.transport.abort()
        return True


class Connection(H11Protocol):
    """since: when it was opened, or got its last answer, on the event loop's clock."""

    room: ClassVar[Room]

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.address, self.since, self.has_answered = "", 0.0, False
        self._overhead = 0
        self._waiting: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None

    @property
    def is_idle(self) -> bool:
        """Whether it has no complete request under way."""
        return self.cycle is None or self.cycle.response_complete or self.cycle.more_body

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.address = self.client[0] if self.client else ""
        self.app_state = {**self.app_state, "abort": transport.abort}
        transport.max_size = RECEIVED_OF_CHUNKS  # until it is known
        if self.room.enter(self):
            self._await_request()
        else:
            self._refuse(_FULL)

    def connection_lost(self, exc: Exception | None) -> None:
        self.room.leave(self)
        self._stop(self._waiting)
        self._stop(self._writing)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        before = self._n_body
        super().data_received(data)
        self._overhead += len(data) - max(0, self._n_body - before)
        if self._overhead > MAX_OVERHEAD:
            self.transport.abort()
        elif self.cycle is not None and self.cycle.more_body:
            is_chunked = any(key == b"transfer-encoding" for key, _ in self.headers)
            self.transport.max_size = RECEIVED_OF_CHUNKS if is_chunked else RECEIVED_AT_ONCE

    @property
    def _n_body(self) -> int:
        return 0 if self.cycle is None else len(self.cycle.body)

    def on_response_complete(self) -> None:
        self.has_answered = True
        self._overhead, self.transport.max_size = 0, RECEIVED_OF_CHUNKS
        self._await_request()
        super().on_response_complete()

    # -- the head of a request ------------------------------------------------------------------------------

    def _await_request(self) -> None:
        self.since = self.loop.time()
        self._stop(self._waiting)
        self._waiting = self.loop.call_later(self.room.limits.head_seconds, self._too_late)

    def _too_late(self) -> None:
        if not (self.cycle is None or self.cycle.response_complete):
            return  # a request is under way, and has its own deadline
        is_written = self.transport.get_write_buffer_size() == 0
        if is_written and not self.transport.is_closing():
            self._refuse(_LATE)
        elif is_written or self.loop.time() - self.since > self.room.limits.write_seconds:
            self.transport.abort()
        else:
            self._waiting = self.loop.call_later(self.room.limits.head_seconds, self._too_late)

    def _refuse(self, error: ApiError) -> None:
        """Answer by hand if no request has been read."""
        body = error.response().body
        head = f"HTTP/1.1 {error.status} {_REASONS[error.status]}\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        self.transport.write(head.encode("ascii") + bytes(body))
        self.transport.close()

    # -- a client that does not read ------------------------------------------------------------------------

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch(None)

    def resume_writing(self) -> None:
        self._stop(self._writing)
        super().resume_writing()

    def _watch(self, before: int | None) -> None:
        """before: bytes that had not been written write_seconds ago."""
        left = self.transport.get_write_buffer_size()
        if before is not None and left >= before:
            return self.transport.abort()
        self._writing = self.loop.call_later(self.room.limits.write_seconds, self._watch, left)

    @staticmethod
    def _stop(timer: asyncio.TimerHandle | None) -> None:
        if timer is not None:
            timer.cancel()


_REASONS = {408: "Request Timeout", 503: "Service Unavailable"}
_LATE = ApiError("no request came in time: the connection is closed.", status=408, code="request_late")
_FULL = ApiError("the server has reached its limit of connections: try again later.", status=503, code="full")


def connection_class(limits: Limits) -> type[Connection]:
    """A protocol class for one server, since uvicorn creates protocols without further arguments."""
    return type("BoundedConnection", (Connection,), {"room": Room(limits, _most(limits.max_connections))})


def _most(wanted: int) -> int:
    """As many as the process may open files, minus some for other purposes."""
    try:
        import resource
    except ImportError:  # Windows
        return wanted
    soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return wanted if soft == resource.RLIM_INFINITY else max(1, min(wanted, soft - 64))
