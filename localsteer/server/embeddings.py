"""POST /v1/embeddings, for models whose file says how states are pooled into one vector."""

from __future__ import annotations

import asyncio
import base64
import threading
from collections.abc import Callable, Sequence
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


Write = Callable[[list[np.ndarray], int, Served], Response]


@router.post("/embeddings", include_in_schema=False)
@router.post("/v1/embeddings", tags=["OpenAI"], summary="Embed texts, if the model can")
async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
    def write(values: list[np.ndarray], n_tokens: int, served: Served) -> Response:
        found = [
            {"object": "embedding", "index": i, "embedding": _written(value, body)}
            for i, value in enumerate(values)
        ]
        usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
        made = {"object": "list", "data": found, "model": body.model or served.name, "usage": usage}
        return written(as_json_in_pieces(made))

    try:
        return await embedded(request, body.model, body.inputs, body.dimensions, write)
    except ClientGone:
        return Response(status_code=499)


async def embedded(
    request: Request,
    model: str | None,
    inputs: Sequence[str | list[int]],
    dimensions: int | None,
    write: Write,
) -> Response:
    """The answer that `write` makes from the vectors and the number of tokens, computed in a thread. Raises
    ApiError, ClientGone."""
    state: State = request.app.state.localsteer
    served, names = state.served(model)
    if names:
        raise ApiError("model: embeddings are not steered: name only the model.", param="model")
    gone = threading.Event()

    def work() -> Response:
        return write(*_values(served, inputs, dimensions, gone), served)

    holding_model = Held(work)
    # not Starlette's pool, in which a task can't be abandoned before its thread has ended
    running = asyncio.get_running_loop().run_in_executor(None, holding_model)
    try:
        return await unless_gone(request, running)
    finally:
        gone.set()
        holding_model.drop()


def _values(
    served: Served, inputs: Sequence[str | list[int]], dimensions: int | None, gone: threading.Event
) -> tuple[list[np.ndarray], int]:
    """The embeddings. gone: set when nothing waits for them any more, since a thread can't be stopped from
    outside."""
    embedder = served.embedder()
    engine, found = served.engine, []
    n_tokens = 0
    for i, text_or_tokens in enumerate(inputs):
        if gone.is_set():
            raise ClientGone
        try:
            # as in llama.cpp's server: special tokens are added, and parsed in the text
            tokens = (
                engine.model.tokenize(text_or_tokens, add_special=True, parse_special=True)
                if isinstance(text_or_tokens, str)
                else text_or_tokens
            )
            values = embedder.embed(tokens)
        except PromptError as error:
            raise ApiError(f"input.{i}: {error}", param="input") from None
        if dimensions not in (None, len(values)):
            raise ApiError(
                f"dimensions: {served.name} has {len(values)}, not {dimensions}: leave it out.",
                param="dimensions",
            )
        n_tokens += len(tokens)
        found.append(values)
    return found, n_tokens


def _written(values: np.ndarray, body: EmbeddingRequest) -> Any:
    if body.encoding_format == "base64":
        return base64.b64encode(values.astype("<f4").tobytes()).decode("ascii")
    return values.tolist()
