"""Work that would hold the event loop up, in threads: it may be given up before it ends."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import anyio
import anyio.lowlevel
import anyio.to_thread

Result = TypeVar("Result")

# Python runs one thread at a time, and the event loop waits for its turn behind each that is busy
AT_ONCE = 8
_limiters: dict[Any, anyio.CapacityLimiter] = {}


async def off_loop(work: Callable[..., Result], *args: Any, **settings: Any) -> Result:
    """The result of `work`, from a thread. Whoever waits may be cancelled: the thread then ends by itself."""
    call = partial(work, *args, **settings)
    return await anyio.to_thread.run_sync(call, abandon_on_cancel=True, limiter=_limiter())


async def aside(work: Callable[..., Result], *args: Any, **settings: Any) -> Result:
    """The same for what may take long without being busy: it holds no place that others wait for."""
    return await anyio.to_thread.run_sync(partial(work, *args, **settings), abandon_on_cancel=True)


def _limiter() -> anyio.CapacityLimiter:
    """One for each event loop, since it must not be shared between two."""
    loop = anyio.lowlevel.current_token()
    if loop not in _limiters:
        _limiters.clear()
        _limiters[loop] = anyio.CapacityLimiter(AT_ONCE)
    return _limiters[loop]
