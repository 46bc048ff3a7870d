"""One engine, many requests at once, each with its own plan, sampler, stop strings and grammar.

    with Scheduler(engine) as scheduler:
        first = scheduler.submit("Tell me about foxes.", steer=[json])
        second = scheduler.submit("And hares?")
        for chunk in first: ...
        reply = second.result()
        async for chunk in scheduler.submit("Tell me about owls."): ...

One thread decodes; any thread may submit, read and cancel. While a scheduler is open its engine belongs to
it: `paused` lends the engine for anything else. `Scheduler(partial(Engine, "model.gguf"))` opens the engine
in the thread that decodes: OpenMP gives every thread that has computed its own team, and two teams on the
same cores slow each other down.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from ..errors import LocalsteerError, QueueFullError, SchedulerClosedError
from .ask import Ask
from .loop import Loop, Request, new_look, new_request
from .reply import Chunk, Reply, Timings

if TYPE_CHECKING:
    import numpy as np

    from ..engine import Engine
    from .ask import Prompt

MAX_QUEUE = 64
HOST_SECONDS = 0.5  # for the last step of a model on several hosts, while the scheduler closes
# Prompt tokens per step while others reply: more of them finish a prompt sooner, and delay the others longer.
PREFILL_CHUNK = 128

logger = logging.getLogger("localsteer")


class Ticket:
    """A reply in progress. Iterate over its chunks, in a thread or with `async for`; once, by one reader.

    The last chunk's finish_reason is "stop", "length", "cancelled" (by `cancel`, or because the scheduler was
    closed with no time left) or "deadline". Raises the error that ended the reply, if one did.
    """

    def __init__(self, scheduler: Scheduler, request: Request, deadline: float | None) -> None:
        self._scheduler, self._request = scheduler, request
        self._events: SimpleQueue[Chunk | LocalsteerError] = SimpleQueue()
        self._listener: Callable[[Chunk | LocalsteerError], None] | None = None
        self._lock = threading.Lock()
        self.deadline = deadline
        self.finish_reason: str | None = None

    @property
    def prompt_tokens(self) -> int:
        return self._request.n_prompt

    @property
    def cached_tokens(self) -> int:
        """How many tokens of the prompt came from the cache; known with the first chunk."""
        return self._request.n_cached

    @property
    def tokens(self) -> list[int]:
        """The reply's tokens so far."""
        return list(self._request.tokens)

    @property
    def plain_tokens(self) -> int:
        """How many tokens of the reply so far are inside a form that stays plain (Ask.plain_forms)."""
        return len(self._request.in_form)

    def cancel(self) -> None:
        """End the reply now; its slot is free within one decode step. After the end this does nothing."""
        self._scheduler._cancel(self, "cancelled")

    def __iter__(self) -> Iterator[Chunk]:
        while True:
            chunk = _chunk(self._events.get())
            yield chunk
            if chunk.finish_reason:
                return

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        loop, events = asyncio.get_running_loop(), asyncio.Queue()

        def tell(event: Chunk | LocalsteerError) -> None:
            with suppress(RuntimeError):  # the reader's event loop has ended, and the reader with it
                loop.call_soon_threadsafe(events.put_nowait, event)

        self._listen(tell)
        while True:
            chunk = _chunk(await events.get())
            yield chunk
            if chunk.finish_reason:
                return

    def result(self) -> Reply:
        """Wait for the end, and return the whole reply."""
        return self._reply(list(self))

    async def aresult(self) -> Reply:
        return self._reply([chunk async for chunk in self])

    def states(self) -> np.ndarray:
        """Wait for the states of a ticket from `Scheduler.look`: (len(layers), n_embd) float32."""
        list(self)
        return self._states()

    async def astates(self) -> np.ndarray:
        async for _chunk in self:
            pass
        return self._states()

    def _states(self) -> np.ndarray:
        if self._request.states is None:
            raise SchedulerClosedError("the model is being closed: the prompt was not read.")
        return self._request.states

    def _reply(self, chunks: Sequence[Chunk]) -> Reply:
        last = chunks[-1]
        text = "".join(chunk.text for chunk in chunks)
        timings, stop = last.timings or Timings(), last.stopped_by
        return Reply(text, self.tokens, last.finish_reason or "", timings, stop)

    def _listen(self, listener: Callable[[Chunk | LocalsteerError], None]) -> None:
        """Send chunks, past and future, to a function instead of the queue."""
        with self._lock:
            while not self._events.empty():
                listener(self._events.get())
            self._listener = listener

    def _put(self, event: Chunk | LocalsteerError) -> None:
        if isinstance(event, Chunk):
            self.finish_reason = event.finish_reason
        else:
            self.finish_reason = "error"
        with self._lock:
            (self._listener or self._events.put)(event)


def _chunk(event: Chunk | LocalsteerError) -> Chunk:
    if isinstance(event, LocalsteerError):
        raise event
    return event


class Scheduler:
    """engine: an open Engine, or a function that opens one. The function is called in the thread that
    decodes, and its engine is closed with the scheduler. max_queue: requests that may wait beyond those with
    a slot; one more raises QueueFullError. prefill_chunk, reuse: see Loop.

    Raises what the function raises."""

    def __init__(
        self,
        engine: Engine | Callable[[], Engine],
        *,
        max_queue: int = MAX_QUEUE,
        prefill_chunk: int = PREFILL_CHUNK,
        reuse: bool = True,
    ) -> None:
        self.max_queue = max_queue
        self._reuse = reuse
        self._prefill_chunk = prefill_chunk
        self._owns_engine = callable(engine)
        self._tickets: dict[int, Ticket] = {}  # by id of the request, until its end
        self._work = threading.Condition()
        self._cancelled: dict[int, tuple[Ticket, str]] = {}
        self._closing = False
        self._stepping = False
        self._guests = 0  # calls of `paused` that wait for the engine or hold it
        self._guest = threading.Lock()  # one of them holds it
        opened: Future[Engine] = Future()
        opener = engine if callable(engine) else lambda: engine
        self._thread = threading.Thread(
            target=self._run, args=(opener, opened), name="localsteer-scheduler", daemon=True
        )
        self._thread.start()
        self.engine = self._wait_for(opened)
        self.engine.before_close(self.stop)

    def _wait_for(self, opened: Future[Engine]) -> Engine:
        try:
            return opened.result()
        except BaseException:  # it can't be opened; or Ctrl-C was pressed, after which it may still arrive
            self.stop()
            if self._owns_engine and opened.exception() is None:
                opened.result().close()
            raise

    def submit(self, prompt: Prompt | Ask, *, deadline: float | None = None, **fields: Any) -> Ticket:
        """Queue a request and return its ticket. It is checked in the caller's thread. fields: of Ask.
        deadline: seconds from now.

        Raises PromptError, MismatchError, PlanError, QueueFullError, SchedulerClosedError.
        """
        return self._enqueue(new_request(self.engine, Ask.of(prompt, **fields)), deadline)

    def look(self, tokens: Sequence[int], layers: Sequence[int]) -> Ticket:
        """Request states instead of a reply: those of the plain model at a prompt's last token, after each
        layer of `layers`, 0-based. `Ticket.states` or `astates` waits for them.

        What it reads of the prompt stays in the cache for the next request. Raises the same errors as
        `submit`.
        """
        return self._enqueue(new_look(self.engine, tokens, layers), None)

    def _enqueue(self, request: Request, deadline: float | None) -> Ticket:
        ends = None if deadline is None else time.monotonic() + deadline
        ticket = Ticket(self, request, ends)
        with self._work:
            if self._closing:
                raise SchedulerClosedError("the model is being closed: no new requests.")
            # a new request also waits until the next step, so slots that are free then count as well
            n_here = len(self._loop.waiting) + len(self._loop.live)
            if n_here >= self.engine.n_seq_max + self.max_queue:
                raise QueueFullError(
                    f"all slots are taken, and {self.max_queue} requests wait for one: try again later."
                )
            self._tickets[id(request)] = ticket
            self._loop.add(request)
            self._work.notify_all()
        return ticket

    @property
    def counts(self) -> dict[str, int]:
        """How many requests are waiting and running, and how many cells of the cache are in use."""
        with self._work:
            loop = self._loop
            return {
                "waiting": len(loop.waiting),
                "running": len(loop.live),
                "slots": self.engine.n_seq_max,
                "cells_used": loop.cache.n_used,
                "cells": self.engine.n_cells,
            }

    @contextmanager
    def paused(self) -> Iterator[Engine]:
        """Lends the engine for other calls between two steps; running requests read their tokens again
        afterwards.

        Prefer a quiet moment; see `counts`.
        """
        with self._work:
            self._guests += 1
            self._work.wait_for(lambda: not self._stepping)
        try:
            with self._guest:
                try:
                    yield self.engine
                finally:  # also after an error of the borrower, which may have decoded before
                    self._loop.begin_again()
        finally:
            with self._work:
                self._guests -= 1
                self._work.notify_all()

    def close(self, grace: float = 0.0) -> None:
        """`stop`, and close the engine if it was opened here."""
        self.stop(grace)
        if self._owns_engine:
            self.engine.close()

    def stop(self, grace: float = 0.0) -> None:
        """Take no more requests, give the current ones `grace` seconds to finish, and cancel the rest.
        Returns when nothing decodes any more, including borrowers in `paused`."""
        with self._work:
            self._closing = True
            self._work.notify_all()
        self._thread.join(max(grace, 0.0))
        if self._thread.is_alive():
            for ticket in list(self._tickets.values()):
                ticket.cancel()
            self._thread.join(HOST_SECONDS)
            hosts = self._loop.engine.model.hosts if hasattr(self, "_loop") else None
            if self._thread.is_alive() and hosts:
                hosts.abandon()  # the decode waits for a host that says nothing
            self._thread.join()

    def __enter__(self) -> Scheduler:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    # -- the thread that decodes --------------------------------------------------------------------

    def _run(self, open_engine: Callable[[], Engine], opened: Future[Engine]) -> None:
        try:
            engine = open_engine()
            self._loop = Loop(engine, prefill_chunk=self._prefill_chunk, reuse=self._reuse)
        except BaseException as error:  # raised where the scheduler is created
            opened.set_exception(error)
            return
        opened.set_result(engine)
        self._serve()

    def _serve(self) -> None:
        while self._begin_step():
            try:
                self._drop_ended()
                for request, event in self._loop.step():
                    self._tell(request, event)
            except LocalsteerError as error:  # the engine was closed, or used by someone else
                self._fail(error)
            except Exception:  # a bug: the waiting requests would wait forever
                logger.exception("the scheduler of %s ended", self._loop.engine.path.name)
                self._fail(
                    SchedulerClosedError("the scheduler ended because of an internal error: see the log.")
                )
            finally:
                self._end_step()
        self._loop.close()

    def _begin_step(self) -> bool:
        """Wait until there is something to do; False if there never will be."""
        with self._work:
            while self._guests or not (self._loop.busy or self._cancelled):
                if self._closing and not (self._loop.busy or self._guests):
                    return False
                self._work.wait()
            self._stepping = True
            return True

    def _end_step(self) -> None:
        with self._work:
            self._stepping = False
            self._work.notify_all()

    def _drop_ended(self) -> None:
        """End requests that were cancelled or are past their deadline."""
        now = time.monotonic()
        with self._work:
            late = [ticket for ticket in self._tickets.values() if ticket.deadline and now >= ticket.deadline]
            ended = [*self._cancelled.values(), *((ticket, "deadline") for ticket in late)]
            self._cancelled.clear()
            for ticket, reason in ended:
                if self._tickets.pop(id(ticket._request), None):
                    self._loop.drop(ticket._request)
                    request = ticket._request
                    timings = request.clock.timings(len(request.tokens))
                    ticket._put(Chunk(request.text.finish(), None, reason, timings))

    def _tell(self, request: Request, event: Chunk | LocalsteerError) -> None:
        ended = isinstance(event, LocalsteerError) or event.finish_reason
        with self._work:
            ticket = self._tickets.pop(id(request), None) if ended else self._tickets.get(id(request))
        if ticket:
            ticket._put(event)

    def _fail(self, error: LocalsteerError) -> None:
        with self._work:
            tickets, self._tickets = list(self._tickets.values()), {}
            self._loop.close()
            self._closing = True
        for ticket in tickets:
            ticket._put(error)

    def _cancel(self, ticket: Ticket, reason: str) -> None:
        with self._work:
            if id(ticket._request) in self._tickets:
                self._cancelled[id(ticket._request)] = (ticket, reason)
                self._work.notify_all()
