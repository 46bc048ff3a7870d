"""The served models, and what a model's name in a request means."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from localsteer.jsonable import JsonObject

from .errors import ApiError
from .limits import Limits
from .metrics import Metrics
from .pool import Pool, no_model
from .served import Served

if TYPE_CHECKING:
    from localsteer.vector import ControlVector

    from .making import Jobs
    from .schemas import SteeringItem
    from .steering import VectorFolder


@dataclass(frozen=True, eq=False)
class State:
    """The state that all routes share."""

    pool: Pool
    vectors: VectorFolder
    limits: Limits
    metrics: Metrics
    jobs: Jobs
    started: int = field(default_factory=lambda: int(time.time()))
    # one trace at a time, since it takes over the engine
    tracing: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def models(self) -> dict[str, Served]:
        """The loaded models, by name."""
        return self.pool.served

    @property
    def default_name(self) -> str:
        """The name of the model that answers requests which name none."""
        return self.pool.split(None)[0]

    def served(self, text: str | None) -> tuple[Served, list[str]]:
        """The model and the vectors that a name means; `pool.ready` must have loaded it. Raises ApiError,
        with status 404 if there is no such model or vector."""
        name, rest = self.pool.split(text)
        served = self.models.get(name)
        if served is None:
            raise ApiError(
                f"model: {name} is not loaded: try again.", status=503, param="model", code="unloaded"
            )
        names = list(dict.fromkeys(rest.split("+"))) if rest or (text or "").endswith("+") else []
        known = self.vectors.of_model(name)
        unknown = next((vector for vector in names if vector not in known), None)
        if unknown is not None:
            raise no_model(text or "", f"{name} has no vector {unknown!r:.80}", known)
        return served, names

    def steering(
        self, text: str | None, items: Sequence[SteeringItem]
    ) -> tuple[Served, dict[str, ControlVector]]:
        """The model and the vectors of a request, by name, as they are at this moment."""
        served, names = self.served(text)
        return served, self.vectors.chosen(served.name, names, items)

    def listed(self) -> list[JsonObject]:
        """Entries of /v1/models: every model, by itself and with each vector that is known to fit it."""
        names = []
        for name in self.pool.names:
            names += [(name, name, None)]
            names += [(f"{name}+{vector}", name, vector) for vector in self.vectors.of_model(name)]
        return [self._entry(*entry) for entry in names]

    def _entry(self, name: str, model: str, vector: str | None) -> JsonObject:
        served = self.models.get(model)
        return {
            "id": name,
            "object": "model",
            "created": self.started,
            "owned_by": "localsteer",
            "parent": None if vector is None else model,
            "steering": [] if vector is None else [vector],
            "max_model_len": None if served is None else served.engine.n_ctx,
            "status": {"value": self.pool.status(model)},
        }
