"""/v1/steering: the vectors that requests may name, and what they do to each token."""

from __future__ import annotations

import threading
from typing import Annotated

import numpy as np
from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from localsteer.errors import LocalsteerError

from .errors import ApiError, Json, api_error
from .models import State
from .prompts import rendered, template_message
from .reading import BodyRoute
from .replies import ClientGone, unless_gone
from .schemas import TraceRequest, as_items
from .steering import document, plain
from .threads import aside, off_loop

router = APIRouter(tags=["Steering"], route_class=BodyRoute)
VectorName = Annotated[str, Query(description="Its name: the file in DIR without .gguf.", max_length=128)]


def _state(request: Request) -> State:
    return request.app.state.localsteer


def _list(state: State) -> Json:
    entries = [document(entry, state.pool.names) for entry in state.vectors.all()]
    return Json({"object": "list", "data": entries})


@router.get("/v1/steering", summary="List vectors, their settings and validation figures")
async def list_vectors(request: Request) -> Response:
    return _list(_state(request))


@router.get("/v1/steering/{name}", summary="One vector")
async def one_vector(name: str, request: Request) -> Response:
    state = _state(request)
    return Json(document(state.vectors.named(name), state.pool.names))


@router.post(
    "/v1/steering",
    summary="Add a vector: the file is the body",
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
        }
    },
)
async def add_vector(name: VectorName, request: Request, replace: bool = False) -> Response:
    """A control-vector GGUF that fits a served model; `replace` lets it replace one of the same name."""
    state = _state(request)
    state.pool.take_loaded()
    data = await request.body()
    entry = await aside(state.vectors.add, name, data, replace=replace)
    return Json(document(entry, state.pool.names), 201)


@router.post("/v1/steering/reload", summary="Read the folder again")
async def reload_vectors(request: Request) -> Response:
    state = _state(request)
    state.pool.take_loaded()
    await aside(state.vectors.reload)
    return _list(state)


@router.delete("/v1/steering/{name}", summary="Remove a vector and its file")
async def remove_vector(name: str, request: Request) -> Response:
    state = _state(request)
    await aside(state.vectors.remove, name)
    return Json({"object": "steering.vector.deleted", "name": name, "deleted": True})


@router.post("/v1/steering/trace", summary="What steering does to each token of a prompt and its reply")
async def trace(body: TraceRequest, request: Request) -> Response:
    """This takes over the engine: replies of this model pause meanwhile."""
    state = _state(request)
    served, vectors = state.steering(body.model, as_items(body.steering))
    if not vectors:
        raise ApiError("steering: a trace needs at least one vector.", param="steering")
    await off_loop(rendered, served, body.messages)  # to refuse what the template does not take
    messages = [template_message(message) for message in body.messages]
    gone = threading.Event()

    def check() -> None:
        if gone.is_set():
            raise ClientGone

    def run() -> Response:
        from localsteer.trace import trace as trace_reply

        with served.scheduler.paused() as engine:
            check()
            try:
                made = trace_reply(
                    engine,
                    messages,
                    list(vectors.values()),
                    reply=body.reply or None,
                    max_tokens=body.max_tokens,
                    on_token=check,
                )
            except LocalsteerError as error:
                raise api_error(error) from None
        shares = [_numbers(line.share(line.after)) for line in made.lines]
        plains = [_numbers(line.share(line.plain)) for line in made.lines]
        found = made.to_dict()
        for line, share, before in zip(found["lines"], shares, plains, strict=True):
            line |= {"share": share, "plain_share": before}
        return Json(plain(found) | {"model": body.model or served.name})

    try:
        async with state.tracing:
            return await unless_gone(request, aside(run))
    except ClientGone:
        return Response(status_code=499)
    finally:
        gone.set()


def _numbers(values: np.ndarray) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]
