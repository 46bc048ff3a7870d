"""What Ollama's clients ask about models: /api/tags, /api/show, /api/ps, /api/version, and embeddings."""

from __future__ import annotations

import hashlib
import time
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from localsteer import __version__
from localsteer.errors import LocalsteerError
from localsteer.jsonable import JsonObject
from localsteer.model_list import Shape, read_shape

from ..embeddings import embedded
from ..errors import Json
from ..models import State
from ..pool import LATEST
from ..reading import BodyRoute
from ..replies import ClientGone
from ..served import Served
from ..threads import off_loop
from .ollama_body import OllamaEmbedRequest, OllamaPromptRequest, OllamaShowRequest

if TYPE_CHECKING:
    import numpy as np

router = APIRouter(route_class=BodyRoute, tags=["Ollama"])
VERSION = "0.13.0"  # of Ollama, whose API is spoken here: clients ask for one that is new enough
NEVER = "2999-01-01T00:00:00Z"  # when a model is let go
LONG_ARRAY = "tokenizer.ggml."  # begins keys with a value for each token


def plain_name(state: State, name: str | None) -> str | None:
    """The name without the `:latest` that clients write after one without a tag."""
    return name.removesuffix(LATEST) if name and name not in state.pool.names else name


@router.head("/api/version", include_in_schema=False)
@router.get("/api/version", summary="The version of Ollama whose API this is")
async def version() -> Response:
    return Json({"version": VERSION, "localsteer": __version__})


@router.head("/api/tags", include_in_schema=False)
@router.get("/api/tags", summary="Every model, by itself and with each vector")
async def tags(request: Request) -> Response:
    state: State = request.app.state.localsteer
    return Json({"models": await off_loop(_entries, state)})


@router.get("/api/ps", summary="Models that are loaded")
async def loaded_models(request: Request) -> Response:
    state: State = request.app.state.localsteer
    loaded = {name: served.engine.n_ctx for name, served in state.models.items()}
    entries = [entry for entry in await off_loop(_entries, state) if entry["name"] in loaded]
    for entry in entries:
        entry |= {"expires_at": NEVER, "size_vram": 0, "context_length": loaded[entry["name"]]}
    return Json({"models": entries})


@router.post("/api/show", summary="One model")
async def show(body: OllamaShowRequest, request: Request) -> Response:
    state: State = request.app.state.localsteer
    served, vectors = state.served(plain_name(state, body.model))
    return Json(await off_loop(_shown, served, vectors, bool(body.verbose)))


@router.post("/api/embed", summary="Embed texts, if the model can")
async def embed(body: OllamaEmbedRequest, request: Request) -> Response:
    inputs = [body.input] if isinstance(body.input, str) else body.input
    return await _embedded(request, body.model, inputs, body.dimensions or None)


@router.post("/api/embeddings", summary="Embed one text")
async def embeddings(body: OllamaPromptRequest, request: Request) -> Response:
    return await _embedded(request, body.model, [body.prompt], None, is_single=True)


async def _embedded(
    request: Request, model: str | None, inputs: list[str], dimensions: int | None, *, is_single: bool = False
) -> Response:
    state: State = request.app.state.localsteer
    name, started = plain_name(state, model), time.perf_counter()

    def write(values: list[np.ndarray], n_tokens: int, served: Served) -> Json:
        if is_single:
            return Json({"embedding": values[0].tolist()})
        took = int((time.perf_counter() - started) * 1e9)
        head = {"model": name or served.name, "embeddings": [value.tolist() for value in values]}
        return Json(head | {"total_duration": took, "load_duration": 0, "prompt_eval_count": n_tokens})

    try:
        return await embedded(request, name, inputs, dimensions, write)
    except ClientGone:
        return Response(status_code=499)


# -- what is told of a model --------------------------------------------------------------------------------


def _entries(state: State) -> list[JsonObject]:
    """Of each model, also before it is loaded, and each with each vector."""
    entries = []
    for listed in state.listed():
        name, model = listed["id"], listed["parent"] or listed["id"]
        path = state.pool.path(model)
        entry = {"name": name, "model": name}
        # not of the whole file, which takes long: it changes with the file, and that is what clients look for
        content, served = name, state.models.get(model)
        if path is not None and path.is_file():
            stat = path.stat()
            content = f"{path.name} {stat.st_size} {stat.st_mtime_ns} {name}"
            entry |= {"modified_at": _written(path), "size": stat.st_size, "details": _details(path, served)}
        digest = hashlib.sha256(content.encode("utf-8", "replace")).hexdigest()
        entries.append(
            {"modified_at": _time(state.started), "size": 0, "details": {}} | entry | {"digest": digest}
        )
    return entries


def _written(path: Path) -> str:
    return _time(path.stat().st_mtime)


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat()


def _details(path: Path, served: Served | None) -> JsonObject:
    """served: None where it is not loaded, and nobody has counted its parameters."""
    shape = _shape(path)
    architecture = shape.architecture if shape else "unknown"
    return {
        "parent_model": "",
        "format": "gguf",
        "family": architecture,
        "families": [architecture],
        "parameter_size": _size(served.engine.model.n_params) if served else "",
        "quantization_level": (shape and shape.quantization) or "unknown",
    }


@lru_cache(maxsize=64)
def _shape(path: Path) -> Shape | None:
    try:
        return read_shape(path)
    except LocalsteerError:
        return None


def _size(n: int) -> str:
    return f"{n / 1e9:.1f}B" if n >= 1e9 else f"{n / 1e6:.2f}M"


def _shown(served: Served, vectors: list[str], verbose: bool) -> JsonObject:
    engine = served.engine
    known = {key: _value(text) for key, text in engine.model.metadata.items()}
    info = {key: value for key, value in known.items() if verbose or not key.startswith(LONG_ARRAY)}
    steered = f"\n# steered by {', '.join(vectors)}" if vectors else ""
    return {
        "modelfile": f"# {served.name}, by localsteer {__version__}{steered}\nFROM {engine.path.name}\n",
        "parameters": "",
        "template": engine.template.template or "",
        "modified_at": _written(engine.path),
        "details": _details(engine.path, served),
        "model_info": info | {"general.parameter_count": engine.model.n_params},
        "capabilities": _capabilities(served),
        "steering": vectors,
    }


def _capabilities(served: Served) -> list[str]:
    from localsteer.runtime.bridge import pooling_of

    model = served.engine.model
    there = {
        "completion": True,
        "tools": served.engine.template.takes_tools,
        "insert": model.fill_in_tokens is not None,
        "embedding": pooling_of(model) is not None,
    }
    return [name for name, has in there.items() if has]


def _value(text: str) -> Any:
    """llama.cpp gives every value as a text."""
    for kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            continue
        return value if value == value and abs(value) != float("inf") else text
    return {"true": True, "false": False}.get(text, text)
