"""Which request uses which model, so that no model is unloaded during a request.

A request holds its models until it has ended, and every thread that works for it has ended too, since a
thread outlives a client that hangs up. `Holding` is the middleware around requests; work in threads goes
through `Held`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

from starlette.types import Scope

Result = TypeVar("Result")

_holder: ContextVar[Holder | None] = ContextVar("holder", default=None)


class Holder:
    """What one request holds; its last user releases everything."""

    def __init__(self) -> None:
        self._users = 1
        self._releases: dict[str, Callable[[], None]] = {}
        self._lock = threading.Lock()

    def holds(self, name: str) -> bool:
        return name in self._releases

    def keep(self, name: str, release: Callable[[], None]) -> None:
        """release: called once, from any thread."""
        self._releases[name] = release

    def enter(self) -> None:
        with self._lock:
            self._users += 1

    def leave(self) -> None:
        with self._lock:
            self._users -= 1
            done = not self._users
        if done:
            for release in self._releases.values():
                release()


def current() -> Holder | None:
    """The request that this code runs for, or None."""
    return _holder.get()


@contextmanager
def held() -> Iterator[None]:
    """Hold what is taken in the `with` block until the block, and every thread that works for it, has
    ended."""
    holder = Holder()
    token = _holder.set(holder)
    try:
        yield
    finally:
        _holder.reset(token)
        holder.leave()


class Held(Generic[Result]):
    """Work for a thread, which holds what its request holds until it ends. `drop`: nothing waits for it any
    more; if it has not begun, it never will."""

    def __init__(self, work: Callable[[], Result]) -> None:
        self._work, self._holder = work, current()
        self._lock, self._begun, self._dropped = threading.Lock(), False, False
        if self._holder:
            self._holder.enter()

    def __call__(self) -> Result:
        with self._lock:
            if self._dropped:
                raise RuntimeError("nobody waits for this any more")
            self._begun = True
        try:
            return self._work()
        finally:
            if self._holder:
                self._holder.leave()

    def drop(self) -> None:
        with self._lock:
            first = not (self._begun or self._dropped)
            self._dropped = True
        if first and self._holder:
            self._holder.leave()


class Holding:
    """ASGI middleware."""

    def __init__(self, app: Callable[..., Any]) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        with held():
            await self.app(scope, receive, send)
