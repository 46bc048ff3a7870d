"""One loaded model."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .errors import ApiError

if TYPE_CHECKING:
    from localsteer.engine import Engine
    from localsteer.runtime.bridge import Embedder
    from localsteer.runtime.scheduler import Scheduler

MAX_EMBEDDED = 8192  # tokens of one text for an embedding


@dataclass(frozen=True, eq=False)
class Served:
    """One model. The scheduler's thread has the engine; what else decodes asks `scheduler.paused`. sampling:
    its own values where a request says nothing."""

    name: str
    engine: Engine
    scheduler: Scheduler
    sampling: Mapping[str, float | int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _embedders: list[Embedder] = field(default_factory=list)

    def __post_init__(self) -> None:
        # up to two seconds for 150,000 tokens, in which nothing else would run: so at the start
        _ = self.engine.token_bytes

    def close(self) -> None:
        """Free it; nobody may use it any more. Its embedder goes with the model."""
        self.scheduler.close()

    def embedder(self) -> Embedder:
        """Made at the first use: it takes a context of its own. Raises ApiError for a model without."""
        from localsteer.runtime.bridge import Embedder, pooling_of

        if self.engine.model.hosts:  # in a thread of its own it would meet a model that is loaded anew
            raise ApiError(
                f"model: {self.name} runs on several hosts (--rpc), where it can't make embeddings: serve it "
                "from one machine.",
                param="model", code="embeddings_unsupported",
            )  # fmt: skip
        if pooling_of(self.engine.model) is None:
            raise ApiError(
                f"model: {self.name} can't make embeddings, since its file names no pooling type: "
                "serve a model that "
                "was made for that.",
                param="model", code="embeddings_unsupported",
            )  # fmt: skip
        with self._lock:
            if not self._embedders:
                n_ctx = min(self.engine.n_ctx, MAX_EMBEDDED)
                n_threads = self.engine.context.n_threads
                self._embedders.append(Embedder(self.engine.model, n_ctx=n_ctx, n_threads=n_threads))
        return self._embedders[0]
