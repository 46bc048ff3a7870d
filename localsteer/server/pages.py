"""The page at /, the description of the API, and monitoring: /health, /metrics."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from localsteer import __version__
from localsteer.jsonable import JsonObject

from .errors import ApiError, Json
from .models import State
from .shapes import speaks_anthropic

router = APIRouter()
TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
# loads nothing from other sites, runs nothing inline, and can't be framed by another site
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
FILES = ("index.html", "page.css", "make.js", "page.js", "docs.html", "docs.js")


def _file(name: str) -> Response:
    if name not in FILES:
        raise ApiError(f"there is no page {name!r:.80}.", status=404)
    data = files("localsteer.server").joinpath("page", name).read_bytes()
    return Response(data, media_type=TYPES[name.rpartition(".")[2]], headers=HEADERS)


@router.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)  # HEAD: Ollama's program
async def index() -> Response:
    return _file("index.html")


@router.get("/docs", include_in_schema=False)
async def docs() -> Response:
    return _file("docs.html")


@router.get("/page/{name}", include_in_schema=False)
async def page(name: str) -> Response:
    return _file(name)


@router.get("/health", tags=["Server"], summary="Whether the server is ready, and what its models are doing")
async def health(request: Request) -> Response:
    state: State = request.app.state.localsteer
    counts = {name: served.scheduler.counts for name, served in list(state.models.items())}
    return Json({"status": "ok", "version": __version__, "models": counts})


@router.get("/metrics", tags=["Server"], summary="Figures for Prometheus")
async def metrics(request: Request) -> Response:
    state: State = request.app.state.localsteer
    return Response(state.metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})


@router.get("/models", include_in_schema=False)
@router.get("/v1/models", tags=["OpenAI"], summary="Every model, by itself and with each vector that fits it")
async def models(request: Request) -> Response:
    state: State = request.app.state.localsteer
    entries = state.listed()
    if speaks_anthropic(request.scope["headers"]):
        found = [_model_info(entry) for entry in entries]
        ends = {"first_id": found[0]["id"], "last_id": found[-1]["id"]}
        return Json({"data": found, "has_more": False} | ends)
    return Json({"object": "list", "data": entries})


def _model_info(entry: Mapping[str, Any]) -> JsonObject:
    """The list of models in Anthropic's shape."""
    created = datetime.fromtimestamp(entry["created"], timezone.utc).isoformat()
    names = {"id": entry["id"], "display_name": entry["id"]}
    return {"type": "model", "created_at": created, "max_input_tokens": entry["max_model_len"]} | names


@router.get("/models/{name:path}", include_in_schema=False)
@router.get("/v1/models/{name:path}", tags=["OpenAI"], summary="One model")
async def model(name: str, request: Request) -> Response:
    state: State = request.app.state.localsteer
    served, vectors = state.served(name)
    entry = state._entry(name, served.name, None)
    if speaks_anthropic(request.scope["headers"]):
        return Json(_model_info(entry))
    return Json(entry | {"steering": vectors})
