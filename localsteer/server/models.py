"""The models that are served, and what a model's name in a request means."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .errors import ApiError, shown
from .limits import Limits
from .metrics import Metrics

if TYPE_CHECKING:
    from localsteer.engine import Engine
    from localsteer.runtime.bridge import Embedder
    from localsteer.runtime.scheduler import Scheduler
    from localsteer.vector import ControlVector

    from .schemas import SteeringItem
    from .steering import VectorFolder

MAX_EMBEDDED = 8192  # tokens of one text for an embedding


@dataclass(frozen=True, eq=False)
class Served:
    """One model. The scheduler's thread has the engine; what else decodes asks `scheduler.paused`."""

    name: str
    engine: Engine
    scheduler: Scheduler
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _embedders: list[Embedder] = field(default_factory=list)

    def __post_init__(self) -> None:
        # up to two seconds for 150,000 tokens, in which nothing else would run: so at the start
        _ = self.engine.token_bytes

    def embedder(self) -> Embedder:
        """Made at the first use: it takes a context of its own. Raises ApiError for a model without."""
        from localsteer.runtime.bridge import Embedder, pooling_of

        if self.engine.model.hosts:  # in a thread of its own it would meet a model that is loaded anew
            raise ApiError(
                f"model: {self.name} lies on several hosts (--rpc) and gives no embeddings there: serve it "
                "from one machine.",
                param="model", code="embeddings_unsupported",
            )  # fmt: skip
        if pooling_of(self.engine.model) is None:
            raise ApiError(
                f"model: {self.name} gives no embeddings, its file names no pooling type: serve a model that "
                "was made for them.",
                param="model", code="embeddings_unsupported",
            )  # fmt: skip
        with self._lock:
            if not self._embedders:
                n_ctx = min(self.engine.n_ctx, MAX_EMBEDDED)
                n_threads = self.engine.context.n_threads
                self._embedders.append(Embedder(self.engine.model, n_ctx=n_ctx, n_threads=n_threads))
        return self._embedders[0]


@dataclass(frozen=True, eq=False)
class State:
    """What every route works on."""

    models: dict[str, Served]
    vectors: VectorFolder
    limits: Limits
    metrics: Metrics
    started: int = field(default_factory=lambda: int(time.time()))
    # one trace at a time: it takes the engine from everybody
    tracing: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def default(self) -> Served:
        return next(iter(self.models.values()))

    def served(self, text: str | None) -> tuple[Served, list[str]]:
        """The model and the vectors that a name means. Raises ApiError, status 404."""
        if text is None:
            return self.default, []
        # a model's own name may hold a plus: the longest that fits is meant
        for name in sorted(self.models, key=len, reverse=True):
            if text == name:
                return self.models[name], []
            if text.startswith(f"{name}+"):
                names = list(dict.fromkeys(text[len(name) + 1 :].split("+")))
                known = self.vectors.of_model(name)
                unknown = next((each for each in names if each not in known), None)
                if unknown is None:
                    return self.models[name], names
                raise _no_model(text, f"{name} has no vector {shown(unknown)}", known)
        raise _no_model(text, "it is not served here", list(self.models))

    def steering(
        self, text: str | None, items: Sequence[SteeringItem]
    ) -> tuple[Served, dict[str, ControlVector]]:
        """The model and the vectors of a request, by name, as they are now."""
        served, names = self.served(text)
        return served, self.vectors.chosen(served.name, names, items)

    def listed(self) -> list[dict[str, Any]]:
        """Entries of /v1/models: each model, and each with each vector that fits it."""
        names = []
        for name in self.models:
            names += [(name, name, None)]
            names += [(f"{name}+{each}", name, each) for each in self.vectors.of_model(name)]
        return [self._entry(*each) for each in names]

    def _entry(self, name: str, model: str, vector: str | None) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self.started,
            "owned_by": "localsteer",
            "parent": None if vector is None else model,
            "steering": [] if vector is None else [vector],
            "max_model_len": self.models[model].engine.n_ctx,
        }


def _no_model(text: str, why: str, known: Sequence[str]) -> ApiError:
    return ApiError(
        f"model: there is no {shown(text)}, {why}: choose one of {', '.join(known) or 'none'}.",
        status=404,
        param="model",
        code="model_not_found",
    )
