"""Turns a body's bytes into a checked request, in steps that block neither the event loop nor other threads.

Python's JSON reader and pydantic let no other thread run while they are busy, and a few megabytes of `[],[],`
keep them busy for seconds. The number of items of each kind is therefore limited before either sees it, large
bodies are read one at a time in a thread, and messages are checked one by one.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Collection, Coroutine
from typing import Any, TypeVar, get_type_hints

import numpy as np
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response

from ..jsonable import JsonObject
from . import limits
from .errors import ApiError, shown
from .fields import accepted
from .replies import ClientGone, unless_gone
from .schemas import Body
from .shapes import api_of
from .threads import reading_slowly

Read = TypeVar("Read", bound=Body)

QUICK = 8 << 10  # bytes that are read at once
MAX_DIGITS = 400  # of a whole number
_DIGITS = bytes(ord("0") if chr(i) in "0123456789" else ord(" ") for i in range(256))


class BodyRoute(APIRoute):
    """A route for a function (body, request), which does here what FastAPI would do in the event loop. The
    model named in the body is loaded when the function is called, and stays loaded until the request has
    ended."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        model = get_type_hints(self.endpoint).get("body")
        if model is None:
            return super().get_route_handler()
        endpoint = self.endpoint

        async def handle(request: Request) -> Response:
            body = await body_of(request, model)
            try:
                await ready(request, getattr(body, "model", None))
            except ClientGone:
                return Response(status_code=499)
            return await endpoint(body=body, request=request)

        return handle


async def ready(request: Request, model: str | None) -> None:
    """Raises ApiError, ClientGone."""
    pool = request.app.state.localsteer.pool
    if not pool.take(model):
        await unless_gone(request, pool.ready(model))


async def body_of(request: Request, model: type[Read]) -> Read:
    """Raises ApiError, RequestValidationError."""
    if not _is_json(request):
        raise ApiError(
            "the body must be a JSON object, sent with `Content-Type: application/json`.", param="body"
        )
    coding = request.headers.get("content-encoding", "").strip()
    if coding.lower() not in ("", "identity"):
        raise ApiError(
            f"Content-Encoding: {shown(coding)} is not supported: send the body uncompressed.",
            status=415,
            param="Content-Encoding",
        )
    ignored = request.app.state.localsteer.limits.ignored_fields
    data = await request.body()
    if len(data) <= QUICK:
        return checked(data, model, ignored)
    return await reading_slowly(checked, data, model, ignored)


def _is_json(request: Request) -> bool:
    """Whether to read the body as JSON. Ollama's manual uses `curl -d`, which labels JSON as a form: that is
    accepted unless a browser sent it."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json")):
        return True
    is_form = kind in ("", "application/x-www-form-urlencoded")
    from_a_page = any(name in request.headers for name in ("origin", "referer", "sec-fetch-site"))
    return api_of(request.scope) == "ollama" and is_form and not from_a_page


def checked(data: bytes, model: type[Read], ignored: Collection[str] = ()) -> Read:
    """ignored: fields to ignore."""
    check_structure(data)
    document = _loaded(data)
    if isinstance(document, dict):
        document = _accepted(document, model, ignored)
    try:
        document = _with_lists(document, model)
        return model.model_validate(document)
    except ValidationError as error:
        raise _refusal(error, document) from None


def _accepted(document: JsonObject, model: type[Body], ignored: Collection[str]) -> JsonObject:
    known = {field.alias or name for name, field in model.model_fields.items()}
    document = accepted(document, known, ignored, model.RULES)
    for name, kind in model.NESTED.items():
        if isinstance(document.get(name), dict):
            try:
                document[name] = _accepted(document[name], kind, ignored)
            except ApiError as error:
                raise error.named({r"(?P<all>.*)": rf"{name}.\g<all>"}) from None
    return document


def _loaded(data: bytes) -> Any:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ApiError(f"the body is not UTF-8 (byte {error.start}).", param="body") from None
    was_enabled = gc.isenabled()
    gc.disable()  # it would scan everything read so far again and again: five times slower
    try:
        # reading a number takes time quadratic in its length; checking each number would slow down all
        has_long = b"0" * MAX_DIGITS in data.translate(_DIGITS)
        return json.loads(text, parse_int=_whole if has_long else None)
    except json.JSONDecodeError as error:
        raise ApiError(
            f"the body is not JSON: {error.msg[0].lower() + error.msg[1:]}.", param="body"
        ) from None
    except (ValueError, RecursionError):
        raise ApiError("the body can't be read: a number is too long.", param="body") from None
    finally:
        if was_enabled:
            gc.enable()


def _whole(digits: str) -> int:
    if len(digits) >= MAX_DIGITS:
        raise ValueError
    return int(digits)


def _with_lists(document: Any, model: type[Body]) -> Any:
    """Check the items one by one; after a fault, pydantic gets the rest unchecked and reports it."""
    for name, kind in model.ONE_BY_ONE.items():
        values = document.get(name) if isinstance(document, dict) else None
        if not isinstance(values, list) or len(values) > limits.MAX_MESSAGES:
            continue
        found = []
        for i, value in enumerate(values):
            try:
                found.append(kind.model_validate(value))
            except ValidationError as error:
                raise _refusal(error, document, (name, i)) from None
        document = document | {name: found}
    return document


def _refusal(error: ValidationError, body: Any, where: tuple[str | int, ...] = ()) -> RequestValidationError:
    errors = error.errors(include_url=False)
    return RequestValidationError(
        [{**error, "loc": ("body", *where, *error["loc"])} for error in errors], body=body
    )


# -- the structure of a JSON text ---------------------------------------------------------------------------


def check_structure(data: bytes) -> None:
    """Raise ApiError for more lists and objects, members, values or levels than any request needs."""
    bounds = {
        "lists and objects": limits.MAX_CONTAINERS,
        "members": limits.MAX_MEMBERS,
        "values": limits.MAX_VALUES,
    }
    signs = {"lists and objects": b"[{", "members": b":", "values": b","}
    # counting inside strings as well costs next to nothing, and at most overestimates
    counts = {name: sum(data.count(bytes([sign])) for sign in signs[name]) for name in signs}
    if counts["lists and objects"] <= limits.MAX_DEPTH and all(
        counts[name] <= bounds[name] for name in bounds
    ):
        return
    outside = outside_strings(data)
    for name, most in bounds.items():
        n = sum(int(np.count_nonzero(outside == sign)) for sign in signs[name])
        if n > most:
            raise ApiError(
                f"body: must hold at most {most} {name}, not {n}.", param="body", code="body_too_complex"
            )
    ends = np.isin(outside, list(b"]}")).astype(np.int32)
    depth = int(np.cumsum(np.isin(outside, list(b"[{")) - ends).max(initial=0))
    if depth > limits.MAX_DEPTH:
        raise ApiError(
            f"body: must have at most {limits.MAX_DEPTH} levels, not {depth}.",
            param="body",
            code="body_too_complex",
        )


def outside_strings(data: bytes) -> np.ndarray:
    """The bytes of a JSON text that are outside strings, uint8, in steps that each take milliseconds."""
    raw = np.frombuffer(data, np.uint8)
    quotes = raw == ord('"')
    slashes = raw == ord("\\")
    if slashes.any():
        places = np.arange(len(raw), dtype=np.int32)
        others = np.maximum.accumulate(np.where(slashes, np.int32(-1), places))  # the last that is none
        is_odd = ((places - others) & 1).astype(bool)  # of the slashes that end here
        quotes[1:] &= ~is_odd[:-1]
    return raw[~np.logical_xor.accumulate(quotes)]
