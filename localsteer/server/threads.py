"""Runs work that would block the event loop in threads, where it can be abandoned before it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import anyio
import anyio.to_thread

from .holding import Held

Result = TypeVar("Result")

# Python runs one thread at a time, and the event loop waits for its turn behind each that is busy
AT_ONCE = 4
READING_AT_ONCE = 1  # what holds the interpreter for tens of milliseconds at a time
_limiters: WeakKeyDictionary[Any, dict[int, anyio.CapacityLimiter]] = WeakKeyDictionary()


async def off_loop(work: Callable[..., Result], *args: Any, **settings: Any) -> Result:
    """The result of `work`, from a thread. Whoever waits may be cancelled: the thread then ends by itself."""
    return await _in_thread(Held(partial(work, *args, **settings)), _limiter(AT_ONCE))


async def reading_slowly(work: Callable[..., Result], *args: Any) -> Result:
    """The same for large bodies, one after the other."""
    return await _in_thread(Held(partial(work, *args)), _limiter(READING_AT_ONCE))


async def aside(work: Callable[..., Result], *args: Any, **settings: Any) -> Result:
    """The same for what may take long without being busy: it holds no place that others wait for."""
    return await _in_thread(Held(partial(work, *args, **settings)), None)


async def _in_thread(work: Held[Result], limiter: anyio.CapacityLimiter | None) -> Result:
    try:
        return await anyio.to_thread.run_sync(work, abandon_on_cancel=True, limiter=limiter)
    finally:
        work.drop()  # a thread that has begun holds its models until it ends


def _limiter(at_once: int) -> anyio.CapacityLimiter:
    """One for each event loop, since it must not be shared between two."""
    loop = asyncio.get_running_loop()
    limiters = _limiters.setdefault(loop, {})
    if at_once not in limiters:
        limiters[at_once] = anyio.CapacityLimiter(at_once)
    return limiters[at_once]
