"""Several engines of one model, each in its own thread, with which a small model keeps all cores busy.

Two threads on one matrix of 256 columns mostly wait for each other; two engines with one thread each do not.
Every piece of work goes through a single engine, so results do not depend on the number of engines. Each
thread opens its own engine, since OpenMP gives every thread that has computed its own team.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, suppress
from pathlib import Path
from threading import Barrier, BrokenBarrierError, Event, Lock, local
from typing import Any, TypeVar

from localsteer.engine import Engine
from localsteer.errors import LocalsteerError
from localsteer.runtime.journal import Journal, Remembered

Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_WORKERS = 8  # each has a copy of the model


class Workers:
    """n: number of engines, at most MAX_WORKERS, each with n_threads threads. journal: keeps their replies,
    so that a run that was stopped can continue. options: of each Engine."""

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
        self._stopped = Event()
        self._engines = ExitStack()
        self._own = local()  # .engine: of the thread that asks
        n = max(1, min(n, MAX_WORKERS))
        self._pool = ThreadPoolExecutor(n, thread_name_prefix="localsteer")
        one_by_one, meeting = Lock(), Barrier(n)

        def prepare() -> None:
            try:
                with one_by_one:  # llama.cpp has one log, which tells why a load failed
                    engine = self._engines.enter_context(Engine(path, n_threads=n_threads, **options))
            except BaseException:
                meeting.abort()
                raise
            # asked after each reply: a call of many takes minutes, and Ctrl-C has to wait for it
            self._own.engine = engine if journal is None else Remembered(engine, journal, self.check)
            with suppress(BrokenBarrierError):  # another engine could not be opened
                meeting.wait()  # a thread that has its engine would take another's turn

        try:
            for opening in [self._pool.submit(prepare) for _ in range(n)]:
                opening.result()
        except BaseException:
            self.close()
            raise

    def map(
        self,
        work: Callable[[Engine, Item], Result],
        items: Sequence[Item],
        advance: Callable[[int, int], None] | None = None,
    ) -> list[Result]:
        """The results of work(engine, item), in the order of the items. Raises the first error. advance:
        called with (done, total)."""
        running = [self._pool.submit(self._run, work, item) for item in items]
        for done, job in enumerate(as_completed(running), 1):
            job.result()
            if advance:
                advance(done, len(running))
        return [job.result() for job in running]

    def check(self, *_progress: int) -> None:
        """Raise LocalsteerError once nothing waits for results; long work calls this now and then."""
        if self._stopped.is_set():
            raise LocalsteerError("the work was stopped.")

    def _run(self, work: Callable[[Engine, Item], Result], item: Item) -> Result:
        self.check()
        return work(self._own.engine, item)

    def close(self) -> None:
        """Stop what runs at its next check, drop what waits, free the engines."""
        self._stopped.set()
        self._pool.shutdown(cancel_futures=True)
        self._engines.close()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()
