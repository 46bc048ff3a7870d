"""Puts the parts together: models in, an ASGI application out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from localsteer import __version__
from localsteer.runtime.scheduler import Scheduler

from . import chat, completions, embeddings, errors, jobs, pages, vectors
from .bodies import BodyLimit
from .deadline import Deadline
from .draining import Drain
from .faces import anthropic, ollama, ollama_models, responses
from .holding import Holding
from .limits import Limits
from .making import Jobs
from .metrics import CountRequests, Metrics
from .models import State
from .pool import Pool
from .security import Access, Guard
from .steering import VectorFolder

DESCRIPTION = "The APIs of OpenAI, Anthropic and Ollama on quantized GGUF models, with steering per request."


def create_app(
    models: Pool | Mapping[str, Scheduler],
    *,
    folder: Path | None = None,
    access: Access | None = None,
    limits: Limits | None = None,
) -> Callable[..., Any]:
    """An ASGI application that serves models, and stops their schedulers when it ends; see also `state_of`.

    models: a pool, or models that are already loaded and stay, each with its scheduler.

    folder: of the vectors. Raises LocalsteerError for a folder that can't be read, and for access settings
    that would let in everybody.
    """
    access, limits = access or Access(), limits or Limits()
    access.check()
    pool = models if isinstance(models, Pool) else Pool.of(models)
    folder_of_vectors = VectorFolder(folder, pool, limits)
    pool.on_load = lambda served: folder_of_vectors.judge(served.name, served.engine)
    metrics = Metrics()
    metrics.watch(pool)
    app = FastAPI(
        title="localsteer",
        version=__version__,
        description=DESCRIPTION,
        docs_url=None,  # FastAPI's own pages load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        lifespan=_lifespan,
    )
    making = Jobs(pool, folder_of_vectors, limits)
    app.state.localsteer = State(pool, folder_of_vectors, limits, metrics, making)
    errors.install(app)
    faces = (chat, responses, anthropic, ollama, ollama_models)
    for routes in (*faces, completions, embeddings, vectors, jobs, pages):
        app.include_router(routes.router)
    guarded = Guard(Deadline(BodyLimit(Holding(app), limits), limits), access)
    return Drain(CountRequests(guarded, metrics))


def state_of(application: Any) -> State:
    """The State of an application, behind its middleware."""
    while not isinstance(application, FastAPI):
        application = application.app
    return application.state.localsteer


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    yield
    await app.state.localsteer.jobs.settle()
    # readers of tickets live in this event loop: the schedulers must stop before it ends
    await app.state.localsteer.pool.settle()
