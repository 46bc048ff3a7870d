"""Several engines of one model, each in a thread of its own: how a small model keeps all cores busy.

Two threads on one matrix of 256 columns mostly wait for each other; two engines of one thread do not. Every
piece of work goes through one engine alone, so results do not depend on how many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from typing import Any, TypeVar

from localsteer.engine import Engine
from localsteer.errors import LocalsteerError
from localsteer.evaluate.journal import Journal, Remembered

Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_WORKERS = 8  # each has a copy of the model


class Workers:
    """n: engines, at most MAX_WORKERS of them, each with n_threads threads. journal: where their replies are
    kept, so that a run that was stopped goes on. options: of each Engine."""

    def __init__(
        self,
        path: str | Path,
        n: int,
        *,
        journal: Journal | None = None,
        n_threads: int = 1,
        **options: Any,
    ) -> None:
        self.path = Path(path)
        self._free: SimpleQueue[Engine | Remembered] = SimpleQueue()
        self._stopped = Event()
        n = max(1, min(n, MAX_WORKERS))
        with ExitStack() as stack:
            for _ in range(n):
                engine = stack.enter_context(Engine(path, n_threads=n_threads, **options))
                # asked after each reply: a call of many takes minutes, and Ctrl-C has to wait for it
                engine = engine if journal is None else Remembered(engine, journal, self.check)
                self._free.put(engine)
            self._pool = ThreadPoolExecutor(n, thread_name_prefix="localsteer")
            self._engines = stack.pop_all()

    def map(
        self,
        work: Callable[[Engine, Item], Result],
        items: Sequence[Item],
        advance: Callable[[int, int], None] | None = None,
    ) -> list[Result]:
        """work(engine, item) of each item, in order. Raises the first error. advance: (done, of how many)."""
        running = [self._pool.submit(self._run, work, item) for item in items]
        for done, each in enumerate(as_completed(running), 1):
            each.result()
            if advance:
                advance(done, len(running))
        return [each.result() for each in running]

    def check(self, *_progress: int) -> None:
        """Raise LocalsteerError once nobody waits for results: long work calls it now and then."""
        if self._stopped.is_set():
            raise LocalsteerError("the work was stopped.")

    def _run(self, work: Callable[[Engine, Item], Result], item: Item) -> Result:
        self.check()
        engine = self._free.get()
        try:
            return work(engine, item)
        finally:
            self._free.put(engine)

    def close(self) -> None:
        """Stop what runs at its next check, drop what waits, free the engines."""
        self._stopped.set()
        self._pool.shutdown(cancel_futures=True)
        self._engines.close()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()
