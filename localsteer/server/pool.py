"""The models of a server: loaded when somebody asks for one, unloaded where another needs the room.

One model is loaded at a time, in the order in which they were asked for. Who asks for a model that is being
loaded waits for it, and an error while loading is the error of those who wait. What makes room is the model
that was not used for longest: an idle one at once; where all are busy, one of them takes no new requests
until those that it has are done, so that a busy model can't keep another out for ever. What came for it
meanwhile waits in the same order.

Everything here runs in the event loop, and loading and unloading in a thread. Requests hold their models by
holding.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localsteer.errors import LocalsteerError

from . import holding
from .bodies import trim_memory
from .errors import ApiError, api_error, shown
from .served import Served

if TYPE_CHECKING:
    from localsteer.runtime.scheduler import Scheduler

    from .metrics import Metrics

LATEST = ":latest"  # what Ollama's clients write after a name without a tag
MAX_SHOWN = 12  # models that a refusal names
MAX_ALIASES = 10_000  # further names of models, as clients wrote them
RESOLVED_AT_ONCE = 4  # names that are looked for, or downloaded


@dataclass(frozen=True)
class Loadable:
    """A model that may be loaded. open: a scheduler on it, with an engine of its own; ends early, by an
    error, when the event is set. n_bytes: of memory, about. sampling: its own values where a request says
    nothing. path: of its file, where it can be looked at before it is loaded."""

    name: str
    open: Callable[[threading.Event], Scheduler]
    n_bytes: int = 0
    path: Path | None = None
    sampling: Mapping[str, float | int] = field(default_factory=dict)


@dataclass(eq=False)
class _Place:
    """users: requests that hold it. leaving: it takes no new ones until it has been unloaded."""

    model: Loadable
    served: Served | None = None
    users: int = 0
    last_used: float = 0.0
    leaving: bool = False
    is_loading: bool = False
    waiters: list[asyncio.Future[None]] = field(default_factory=list)

    @property
    def wanted(self) -> bool:
        self.waiters = [waiter for waiter in self.waiters if not waiter.done()]
        return bool(self.waiters)


class Pool:
    """max_models, max_bytes: of the models that are loaded at one time. resolve: what a name that is not
    among `models` means, None where it means nothing; raises LocalsteerError.

    `served` has the models that are loaded, by name; it changes in the event loop alone.
    """

    def __init__(
        self,
        models: Iterable[Loadable],
        *,
        max_models: int | None = None,
        max_bytes: int | None = None,
        resolve: Callable[[str], Loadable | None] | None = None,
    ) -> None:
        self._places = {model.name: _Place(model) for model in models}
        self.max_models, self.max_bytes = max_models, max_bytes
        self._resolve, self._aliases = resolve, {}
        self.served: dict[str, Served] = {}
        self.on_load: Callable[[Served], None] = lambda _served: None
        self.metrics: Metrics | None = None
        self.closing = threading.Event()
        self._queue: list[_Place] = []
        self._guests: list[Loadable] = []  # opened once more, outside of the pool
        self._worker: asyncio.Task[None] | None = None
        self._changed: asyncio.Event | None = None
        self._threads = ThreadPoolExecutor(1, "localsteer-loading")
        self._resolving = ThreadPoolExecutor(RESOLVED_AT_ONCE, "localsteer-names")

    @classmethod
    def of(cls, schedulers: Mapping[str, Scheduler]) -> Pool:
        """Of models that are loaded already, all of which stay."""
        pool = cls([Loadable(name, partial(_already, scheduler)) for name, scheduler in schedulers.items()])
        for name in schedulers:
            pool.load_now(name)
        return pool

    # -- before the server runs -----------------------------------------------------------------------------

    def load_now(self, name: str) -> bool:
        """Load one before there are requests, if there is room. Raises what opening it raises."""
        place = self._places[name]
        self._check_size(place.model)
        if not self._has_room(place):
            return False
        self._install(place, self._opened(place.model))
        return True

    def _check_size(self, model: Loadable) -> None:
        if self.max_bytes is not None and model.n_bytes > self.max_bytes:
            raise LocalsteerError(
                f"{model.name} needs about {model.n_bytes / 1e9:.2f} GB, and --max-memory allows "
                f"{self.max_bytes / 1e9:.2f} GB for all models: allow more, or choose a smaller one."
            )

    # -- names ----------------------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        return list(self._places)

    def status(self, name: str) -> str:
        """`loaded`, `loading` or `unloaded`, in the words of llama.cpp's router."""
        place = self._places[name]
        return "loaded" if place.served else "loading" if place.is_loading or place.wanted else "unloaded"

    def path(self, name: str) -> Path | None:
        """Of a model's file; None for one that is not known before it is loaded."""
        place = self._places[name]
        return place.served.engine.path if place.served else place.model.path

    def split(self, text: str | None) -> tuple[str, str | None]:
        """(a model's name, what stands behind its plus; None for no plus). Raises ApiError, status 404."""
        if text is None:
            return next(iter(self._places)), None
        # a model's own name may hold a plus: the longest that fits is meant
        for name in sorted([*self._places, *self._aliases], key=len, reverse=True):
            known = self._aliases.get(name, name)
            if text == name:
                return known, None
            if text.startswith(f"{name}+"):
                return known, text[len(name) + 1 :]
        if text.endswith(LATEST):
            return self.split(text.removesuffix(LATEST))
        raise no_model(text, "it is not served here", self.names)

    async def _known(self, text: str | None) -> str:
        """The same, looking for a name that is not known yet."""
        try:
            return self.split(text)[0]
        except ApiError:
            if self._resolve is None or text is None:
                raise
        error = None
        for name in dict.fromkeys((text, text.partition("+")[0])):  # few names hold a plus themselves
            try:
                loop = asyncio.get_running_loop()
                model = await loop.run_in_executor(self._resolving, self._resolve, name)
            except LocalsteerError as refusal:
                model, error = None, error or refusal
            if model is not None:
                self._places.setdefault(model.name, _Place(model))
                if name != model.name and len(self._aliases) < MAX_ALIASES:
                    self._aliases[name] = model.name
                return model.name
        if error is not None:
            message = f"model: {without_folders(str(error))}"
            raise ApiError(message, status=404, param="model", code="model_not_found")
        return self.split(text)[0]

    # -- requests -------------------------------------------------------------------------------------------

    def take(self, text: str | None) -> bool:
        """Hold the model of a name for this request if it is loaded, and say whether it is."""
        try:
            name, _ = self.split(text)
        except ApiError:
            return False
        place, holder = self._places[name], holding.current()
        if holder is not None and holder.holds(name):
            return True
        if place.served is None or place.leaving:
            return False
        place.users += 1
        self._keep(place, holder)
        return True

    async def ready(self, text: str | None) -> None:
        """Wait until the model of a name is loaded, and hold it for this request. Raises ApiError."""
        name = await self._known(text)
        if self.take(name):
            return
        if self.closing.is_set():
            raise _closing()
        await self._wait_for(self._places[name])
        self._keep(self._places[name], holding.current())

    def take_loaded(self) -> None:
        """Hold all that are loaded, for what goes through all of them."""
        for name in list(self.served):
            self.take(name)

    def _keep(self, place: _Place, holder: holding.Holder | None) -> None:
        place.last_used = time.monotonic()
        if holder is None:  # not for a request
            self._release(place)
        else:
            loop = asyncio.get_running_loop()
            holder.keep(place.model.name, partial(self._release_from_anywhere, loop, place))

    async def _wait_for(self, place: _Place) -> None:
        """Returns with one more user of it."""
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[None] = loop.create_future()
        place.waiters.append(waiter)
        if place not in self._queue:
            self._queue.append(place)
        self._wake()
        if self._worker is None or self._worker.done():
            self._worker = loop.create_task(self._work())
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self._release(place)  # it came at the same moment
            self._wake()  # perhaps nobody waits for this any more
            raise

    def _release_from_anywhere(self, loop: asyncio.AbstractEventLoop, place: _Place) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and the pool with it
            loop.call_soon_threadsafe(self._release, place)

    def _release(self, place: _Place) -> None:
        place.users -= 1
        place.last_used = time.monotonic()
        self._wake()

    def _wake(self) -> None:
        if self._changed is not None:
            self._changed.set()

    # -- loading and unloading ------------------------------------------------------------------------------

    async def _work(self) -> None:
        """Serve the queue until it is empty."""
        self._changed = asyncio.Event()
        while self._queue:
            place = self._queue[0]
            try:
                if place.wanted and await self._make_room(place):
                    await self._load(place)
            except Exception as error:  # of one model: the others go on
                self._fail(place, error)
            finally:
                self._queue.remove(place)

    async def _make_room(self, place: _Place) -> bool:
        """Whether there is room, and somebody still waits. Raises LocalsteerError where it can never be."""
        self._check_size(place.model)
        while place.wanted and not self.closing.is_set():
            if self._has_room(place):
                return True
            victim = self._victim(place)
            if victim is None:
                return True
            victim.leaving = True
            try:
                await self._until(lambda victim=victim: not victim.users or not place.wanted)
                if victim.users or not place.wanted:
                    continue
                await self._unload(victim)
            finally:
                victim.leaving = False
        if self.closing.is_set():
            raise _closing()
        return False

    async def _until(self, holds: Callable[[], bool]) -> None:
        assert self._changed is not None
        while not holds() and not self.closing.is_set():
            self._changed.clear()
            await self._changed.wait()

    def _has_room(self, place: _Place) -> bool:
        loaded = [other for other in self._places.values() if other.served and other is not place]
        if self.max_models is not None and len(loaded) >= self.max_models:
            return False
        models = [*(other.model for other in loaded), *self._guests, place.model]
        return self.max_bytes is None or sum(model.n_bytes for model in models) <= self.max_bytes

    @contextlib.contextmanager
    def room_for_another(self, name: str) -> Iterator[None]:
        """Count a model once more while this is open: somebody opens it outside of the pool. Raises ApiError
        where --max-memory leaves no room beside those that are loaded."""
        model = self._places[name].model
        loaded = [place.model for place in self._places.values() if place.served]
        n_bytes = sum(other.n_bytes for other in (*loaded, *self._guests, model))
        if self.max_bytes is not None and n_bytes > self.max_bytes:
            raise ApiError(
                f"a vector is made beside the models that are loaded, and {name} once more needs about "
                f"{model.n_bytes / 1e9:.2f} GB: --max-memory leaves no room for it.",
                status=409,
                code="no_memory",
            )
        self._guests.append(model)
        try:
            yield
        finally:
            self._guests.remove(model)
            self._wake()

    def _victim(self, place: _Place) -> _Place | None:
        loaded = [other for other in self._places.values() if other.served and other is not place]
        return min(loaded, key=lambda other: (other.users > 0, other.last_used), default=None)

    async def _unload(self, place: _Place) -> None:
        served, place.served = place.served, None
        assert served is not None
        del self.served[place.model.name]
        await asyncio.get_running_loop().run_in_executor(self._threads, _closed, served)
        self._count("unloaded", place)

    async def _load(self, place: _Place) -> None:
        if place.served is None:
            place.is_loading = True
            try:
                loop = asyncio.get_running_loop()
                served = await loop.run_in_executor(self._threads, self._opened, place.model)
            finally:
                place.is_loading = False
            self._install(place, served)
        for waiter in place.waiters:
            if not waiter.done():
                place.users += 1
                waiter.set_result(None)
        place.waiters = []

    def _opened(self, model: Loadable) -> Served:
        scheduler = model.open(self.closing)
        try:
            served = Served(model.name, scheduler.engine, scheduler, dict(model.sampling))
            self.on_load(served)
        except BaseException:
            scheduler.close()
            raise
        return served

    def _install(self, place: _Place, served: Served) -> None:
        place.served, place.last_used = served, time.monotonic()
        self.served[place.model.name] = served
        self._count("loaded", place)

    def _fail(self, place: _Place, error: Exception) -> None:
        self._count("failed", place)
        told = _closing() if self.closing.is_set() else load_error(place.model.name, error)
        for waiter in place.waiters:
            if not waiter.done():
                waiter.set_exception(told)
        place.waiters = []

    def _count(self, outcome: str, place: _Place) -> None:
        if self.metrics is not None:
            self.metrics.loads.labels(place.model.name, outcome).inc()

    # -- the end --------------------------------------------------------------------------------------------

    def stop(self, grace: float) -> None:
        """In the event loop: no new models; those that are loaded have a grace for the requests they have."""
        self.closing.set()
        self._wake()
        for served in list(self.served.values()):
            threading.Thread(target=served.scheduler.stop, args=(grace,), daemon=True).start()

    async def settle(self) -> None:
        """At the end of the event loop: what is being loaded is given up, and nobody decodes any more."""
        self.closing.set()
        self._wake()
        if self._worker is not None:
            with contextlib.suppress(asyncio.CancelledError):
                await self._worker
        for served in list(self.served.values()):
            await asyncio.to_thread(served.scheduler.stop)

    def close(self) -> None:
        """After the server: free every model."""
        self.closing.set()
        self._threads.shutdown(wait=True)
        self._resolving.shutdown(wait=False, cancel_futures=True)
        for served in self.served.values():
            served.close()
        self.served.clear()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_exc: Any) -> None:
        self.close()


def _already(scheduler: Scheduler, _stop: threading.Event) -> Scheduler:
    return scheduler


def _closed(served: Served) -> None:
    served.close()
    trim_memory()  # a model that comes and goes would leave a megabyte behind each time


def load_error(name: str, error: Exception) -> ApiError:
    """A model that can't be loaded is the error of the request that asked for it; trying again would load it
    again, so that it is none that clients repeat by themselves."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, LocalsteerError):
        message = f"model: {name} can't be loaded: {without_folders(str(error))}"
        return ApiError(message, param="model", code="model_load_failed")
    return api_error(error)


def without_folders(text: str) -> str:
    """Where things lie on the server is nobody's business; `hf:ORG/REPO` is no path."""
    return re.sub(r"(?<![\w.:*-])(?:/[^/\s]+)+/(?=[^/\s])", "", text)


def no_model(text: str, why: str, known: Sequence[str]) -> ApiError:
    more = f" and {len(known) - MAX_SHOWN} more" if len(known) > MAX_SHOWN else ""
    hint = f": choose one of {', '.join(known[:MAX_SHOWN])}{more}" if known else ""
    return ApiError(
        f"model: there is no {shown(text)}, {why}{hint}.",
        status=404,
        param="model",
        code="model_not_found",
    )


def _closing() -> ApiError:
    return ApiError("the server is closing: no new requests.", status=503, code="closing")
