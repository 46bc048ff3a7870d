"""Refusals: what went wrong, with the status and the field at fault; shapes.py writes them."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from localsteer.errors import (
    ContextError,
    HostError,
    LocalsteerError,
    QueueFullError,
    SchedulerClosedError,
)
from localsteer.jsonable import JsonObject

from .shapes import refusal

logger = logging.getLogger("localsteer.server")

_HEADERS = {
    429: {"Retry-After": "1"},
    503: {"Retry-After": "1"},
    # with other codes, OpenAI's clients would retry by themselves, and be late again
    504: {"X-Should-Retry": "false"},
}
SMALL_LIST = 64
SHOWN = 80  # characters of a value that an error quotes


def as_json(document: Any) -> bytes:
    """The document as JSON bytes. A lone surrogate, which UTF-8 can't encode, is written as its JSON
    escape."""
    text = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace")


def as_json_in_pieces(document: Any, depth: int = 6) -> bytes:
    """The same for what may be large, such as log-probabilities of thousands of tokens: Python's JSON writer
    lets no other thread run until it is done, so it is fed in pieces."""
    if depth and isinstance(document, dict):
        members = (
            as_json(str(key)) + b":" + as_json_in_pieces(value, depth - 1) for key, value in document.items()
        )
        return b"{" + b",".join(members) + b"}"
    if depth and isinstance(document, list) and len(document) > SMALL_LIST:
        return b"[" + b",".join(as_json_in_pieces(part, 0) for part in document) + b"]"
    if depth and isinstance(document, list):
        return b"[" + b",".join(as_json_in_pieces(part, depth - 1) for part in document) + b"]"
    return as_json(document)


def written(document: bytes) -> Response:
    return Response(document, media_type="application/json")


class Json(JSONResponse):
    def render(self, content: Any) -> bytes:
        return as_json(content)


class ApiError(Exception):
    """A refusal. param: the field of the request at fault."""

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def response(self, scope: Mapping[str, Any] | None = None) -> Json:
        """The refusal in the shape of the requested API. scope: the request's, or None if none has been
        read."""
        return Json(refusal(self, scope), self.status, _HEADERS.get(self.status))

    def named(self, names: Mapping[str, str]) -> ApiError:
        """The same, with fields named as in another API. names: by the expression that begins a path."""
        for ours, theirs in names.items():
            param, n = re.subn(rf"^{ours}(?=\.|$)", theirs, self.param or "", count=1)
            if n:
                text = str(self)
                text = param + text[len(self.param) :] if text.startswith(self.param) else text
                return ApiError(text, status=self.status, param=param, code=self.code)
        return self


def api_error(error: BaseException, param: str | None = None) -> ApiError:
    """The refusal for an error of localsteer; any other error is a bug, reported without its details."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        return ApiError(str(error), status=429, code="queue_full")
    if isinstance(error, SchedulerClosedError):
        return ApiError(str(error), status=503, code="closing")
    if isinstance(error, HostError):
        return ApiError(str(error), status=503, code="host_lost")
    if isinstance(error, ContextError):  # clients shorten the conversation when they see this code
        param = param or "messages"
        return ApiError(f"{param}: {error}", param=param, code="context_length_exceeded")
    if isinstance(error, LocalsteerError):
        return ApiError(str(error), param=param)
    logger.error("a request failed", exc_info=error)
    return ApiError(
        "the server failed to handle this request: its log says why.", status=500, code="internal"
    )


def shown(value: Any) -> str:
    """A value for a message, cut short."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def install(app: FastAPI) -> None:
    """Make every way in which a request can fail end in the same shape."""

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Json:
        return _validation_error(error).response(request.scope)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Json:
        made = ApiError(f"{error.detail}.".replace("..", "."), status=error.status_code)
        if error.status_code in (404, 405):
            made = ApiError(
                f"{request.method} {shown(request.url.path)} is not served: /docs lists what is.",
                status=error.status_code,
                code="unknown_url",
            )
        response = made.response(request.scope)
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Json:
        return error.response(request.scope)

    @app.exception_handler(LocalsteerError)
    async def ours(request: Request, error: LocalsteerError) -> Json:
        return api_error(error).response(request.scope)

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Json:
        return api_error(error).response(request.scope)


def _validation_error(error: RequestValidationError) -> ApiError:
    """One of pydantic's errors as a message, with the field as the client wrote it, and the value."""
    first = _most_telling(error)
    if first["type"] == "json_invalid":
        return ApiError(f"the body is not JSON: {first.get('ctx', {}).get('error', 'it ends early')}.")
    where = _path(first["loc"], error.body, missing=first["type"] == "missing")
    # an error of the whole model: the message names the fields
    if not where and first["type"] == "value_error":
        message = first["msg"].removeprefix("Value error, ")
        return ApiError(f"{message}.", param=message.split()[0].rstrip(":"))
    if not where or where == "body":
        return ApiError(
            "the body must be a JSON object, sent with `Content-Type: application/json`.", param="body"
        )
    if first["type"] == "extra_forbidden":
        return ApiError(f"{where}: this server does not read it: leave it out.", param=where)
    if first["type"] == "missing":
        return ApiError(f"{where} is missing: it is required.", param=where)
    message, value = first["msg"], shown(first.get("input"))
    if first["type"] == "value_error":
        return ApiError(f"{where}: {message.removeprefix('Value error, ')} (it is {value}).", param=where)
    message = re.sub(r"^(Input|List|String|Value|Dictionary|Set) should ", "must ", message)
    message = re.sub(r", not \d+$", "", message)
    return ApiError(f"{where}: {message[0].lower() + message[1:]}, not {value}.", param=where)


def _most_telling(error: RequestValidationError) -> JsonObject:
    """The error to report: for a field with several possible types pydantic reports one for each, so take the
    one that got furthest into the value, and not a mere mismatch of types."""
    found = list(error.errors())
    same = [error for error in found if error["loc"][:2] == found[0]["loc"][:2]]

    def rank(each: JsonObject) -> tuple[bool, int]:
        return not each["type"].endswith("_type"), len(_path(each["loc"], error.body, missing=True))

    return max(same, key=rank)


def _path(loc: tuple[Any, ...], body: Any, *, missing: bool) -> str:
    """A path like `messages.0.content`: pydantic's, without the names of the types that it tried."""
    source, *steps = loc
    if source != "body":
        return ".".join(map(str, steps))
    names, at = [], body
    for i, step in enumerate(steps):
        known = (isinstance(at, dict) and step in at) or (
            isinstance(at, list) and isinstance(step, int) and 0 <= step < len(at)
        )
        if known:
            names.append(str(step))
            at = at[step]
        elif missing and i == len(steps) - 1:
            names.append(str(step))
    return ".".join(names)
