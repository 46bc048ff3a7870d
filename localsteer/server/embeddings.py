"""POST /v1/embeddings, where the model's file says how its states become one vector."""

from __future__ import annotations

import asyncio
import base64
import threading
from functools import partial
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import Response

from localsteer.errors import PromptError

from .errors import ApiError, as_json_in_pieces, written
from .holding import Held
from .models import Served, State
from .reading import BodyRoute
from .replies import ClientGone, unless_gone
from .schemas import EmbeddingRequest

router = APIRouter(route_class=BodyRoute)


@router.post("/embeddings", include_in_schema=False)
@router.post("/v1/embeddings", tags=["OpenAI"], summary="Texts as vectors, where the model gives them")
async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
    state: State = request.app.state.localsteer
    served, names = state.served(body.model)
    if names:
        raise ApiError("model: embeddings are not steered: name the model alone.", param="model")
    gone = threading.Event()
    # not Starlette's pool: a task in it can't be given up before its thread has ended
    document = Held(partial(_document, served, body, gone))
    work = asyncio.get_running_loop().run_in_executor(None, document)
    try:
        return written(await unless_gone(request, work))
    except ClientGone:
        return Response(status_code=499)
    finally:
        gone.set()
        document.drop()


def _document(served: Served, body: EmbeddingRequest, gone: threading.Event) -> bytes:
    """gone: set when nobody waits for it any more; a thread can't be stopped from outside."""
    embedder = served.embedder()
    engine, found = served.engine, []
    n_tokens = 0
    for i, given in enumerate(body.inputs):
        if gone.is_set():
            raise ClientGone
        try:
            # as in llama.cpp's own server: special tokens added, and read where the text holds them
            tokens = (
                engine.model.tokenize(given, add_special=True, parse_special=True)
                if isinstance(given, str)
                else given
            )
            values = embedder.embed(tokens)
        except PromptError as error:
            raise ApiError(f"input.{i}: {error}", param="input") from None
        if body.dimensions not in (None, len(values)):
            raise ApiError(
                f"dimensions: {served.name} gives {len(values)}, not {body.dimensions}: leave it out.",
                param="dimensions",
            )
        n_tokens += len(tokens)
        found.append({"object": "embedding", "index": i, "embedding": _written(values, body)})
    usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
    made = {"object": "list", "data": found, "model": body.model or served.name, "usage": usage}
    return as_json_in_pieces(made)


def _written(values: np.ndarray, body: EmbeddingRequest) -> Any:
    if body.encoding_format == "base64":
        return base64.b64encode(values.astype("<f4").tobytes()).decode("ascii")
    return values.tolist()
