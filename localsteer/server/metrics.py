"""Figures for Prometheus, in a separate registry for this server."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from starlette.types import Message, Scope

if TYPE_CHECKING:
    from .pool import Pool

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
# of Scheduler.counts
GAUGES = {
    "waiting": "Requests that wait for a slot.",
    "running": "Requests that hold a slot.",
    "slots": "Slots: sequences that can be decoded together.",
    "cells_used": "Tokens in the KV cache.",
    "cells": "Tokens that the KV cache can hold.",
}


class Metrics:
    """Requests are counted by the middleware, tokens at the end of each reply; gauges are read on demand."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "localsteer_requests", "HTTP requests.", ["path", "method", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "localsteer_request_seconds", "Time from a request to the end of its answer.",
            ["path"], buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self.first_token = Histogram(
            "localsteer_first_token_seconds", "Time from joining a batch to the first token.",
            ["model"], buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self.tokens = Counter(
            "localsteer_tokens", "Tokens: of prompts, of them found in the cache, of replies.",
            ["model", "kind"], registry=self.registry,
        )  # fmt: skip
        self.choices = Counter(
            "localsteer_choices", "Replies that ended, by reason.", ["model", "reason"],
            registry=self.registry,
        )  # fmt: skip

        self.loads = Counter(
            "localsteer_model_loads", "Models that were loaded or unloaded, or failed to load.",
            ["model", "outcome"], registry=self.registry,
        )  # fmt: skip

    def watch(self, pool: Pool) -> None:
        pool.metrics = self
        for name in pool.served:
            self.loads.labels(name, "loaded").inc()
        self.registry.register(_Gauges(pool))

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _Gauges:
    """Queries the schedulers when the figures are requested."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def collect(self) -> Iterable[GaugeMetricFamily]:
        served = dict(self._pool.served)
        loaded = GaugeMetricFamily("localsteer_model_loaded", "1 while a model is loaded.", labels=["model"])
        for name in self._pool.names:
            loaded.add_metric([name], name in served)
        yield loaded
        counts = {name: model.scheduler.counts for name, model in served.items()}
        for key, text in GAUGES.items():
            family = GaugeMetricFamily(f"localsteer_{key}", text, labels=["model"])
            for name, values in counts.items():
                family.add_metric([name], values[key])
            yield family


class CountRequests:
    """ASGI middleware that counts requests, under the paths of the routes, so that their number is
    limited."""

    def __init__(self, app: Callable[..., Any], metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started, status = time.perf_counter(), 499  # nothing was sent: the client had left

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, watched)
        finally:
            path = getattr(scope.get("route"), "path", "other")
            method = scope["method"] if scope["method"] in ("GET", "POST", "DELETE", "OPTIONS") else "other"
            self.metrics.requests.labels(path, method, str(status)).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - started)
