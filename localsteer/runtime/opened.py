"""A model in memory with a context: opened, used by one call at a time, closed. engine.py builds on it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import LocalsteerError
from . import limits
from .attach import Notices
from .bridge import Context, Model, check_threads
from .rpc import RPC_SECONDS, Hosts

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class Capacity:
    """What a context can hold and how it computes; see Engine for the meaning of each field.

    Raises LocalsteerError for a count below 1, and for n_cells without a unified cache.
    """

    n_ctx: int | None = None
    n_threads: int | None = None
    n_seq_max: int = limits.DEFAULT_N_SEQ_MAX
    n_batch: int = 512
    n_cells: int | None = None
    kv_unified: bool = True
    exact: bool = False

    def __post_init__(self) -> None:
        limits.check_counts(self.kv_unified, self.n_cells, n_seq_max=self.n_seq_max, n_batch=self.n_batch)
        check_threads(self.n_threads)


class Opened:
    """An open model. Its context belongs to the call that took it last. If the model lost a host, that is
    dealt with before the next call begins.

    n_ctx: tokens that one sequence may hold. n_cells: tokens that all sequences may hold together. Raises
    ModelFileError, UnsupportedModelError, HostError.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        capacity: Capacity,
        *,
        rpc: str | Sequence[str] = (),
        rpc_seconds: float = RPC_SECONDS,
        n_gpu_layers: int | None = None,
        on_progress: Callable[[float], None] | None = None,
    ) -> None:
        self.path, self.exact = Path(path), capacity.exact
        self._closed = False
        self.notice = Notices()
        self._run = 0
        self._leaving: list[Callable[[], None]] = []
        hosts = Hosts(rpc, rpc_seconds) if rpc else None
        try:
            self.model = Model(path, hosts=hosts, n_gpu_layers=n_gpu_layers, on_progress=on_progress)
        except BaseException:
            if hosts:
                hosts.close()  # frees the hosts for others
            raise
        try:
            self.n_ctx = limits.context_length(self.model, self.path.name, capacity.n_ctx)
            self.n_seq_max = limits.sequences_at_once(
                self.model, self.path.name, capacity.n_seq_max, self.notice
            )
            self.context = self._new_context(capacity)
        except BaseException:
            self.model.close()
            raise
        self.n_cells = self.context.n_ctx

    def _new_context(self, capacity: Capacity) -> Context:
        exact, kv_unified = capacity.exact, capacity.kv_unified
        pool = limits.pool_cells(self.model, self.n_ctx, self.n_seq_max, exact=exact, kv_unified=kv_unified)
        return Context(
            self.model,
            n_ctx=max(self.n_ctx, capacity.n_cells or pool),
            n_seq_max=self.n_seq_max,
            n_batch=max(capacity.n_batch, self.n_seq_max),
            n_threads=capacity.n_threads,
            exact=exact,
            kv_unified=kv_unified,
        )

    def close(self) -> None:
        """Free the context, then the model. A second call does nothing."""
        if not self._closed:
            for leave in self._leaving:
                leave()
            self._closed = True
            self.context.close()
            self.model.close()

    def before_close(self, leave: Callable[[], None]) -> None:
        """Call a function before the context is freed, for instance to stop a thread that decodes."""
        self._leaving.append(leave)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def begin(self) -> int:
        """Take the context for a new run, forgetting what it held. Returns the run's number.

        Raises HostError while a host of the model is lost.
        """
        self.attend()
        return self.take()

    def take(self) -> int:
        """The same, whatever the state of the hosts."""
        self.check_open()
        self._run += 1
        self.context.clear()
        return self._run

    def attend(self) -> None:
        """Load the model again if it lost a host; the cache is then empty. Raises HostError while that host
        is lost."""
        self.check_open()
        if self.model.hosts and self.model.hosts.lost:
            self.model.reload([self.context])

    def check_run(self, run: int) -> None:
        """Raise LocalsteerError if another call has taken the context since `begin`."""
        self.check_open()
        if run != self._run:
            raise LocalsteerError(
                "this stream was ended by another call on its engine: finish or close a stream first."
            )

    def check_open(self) -> None:
        """Raise LocalsteerError after `close`."""
        if self._closed:
            raise LocalsteerError(f"the engine of {self.path.name} is closed.")
