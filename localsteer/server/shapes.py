"""How a refusal looks in the API that was asked: OpenAI's, OpenAI's Responses, Anthropic's, Ollama's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from ..jsonable import JsonObject

if TYPE_CHECKING:
    from .errors import ApiError

Api = Literal["openai", "responses", "anthropic", "ollama"]

_OPENAI_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "timeout_error",
}
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def api_of(scope: Mapping[str, Any] | None) -> Api:
    """By the path; /v1/models and the like are Anthropic's where the client says that it speaks that API."""
    if scope is None:
        return "openai"
    path = scope.get("path", "")
    if path.startswith("/v1/messages"):
        return "anthropic"
    if path.startswith("/api/"):
        return "ollama"
    if path.endswith("/responses"):
        return "responses"
    shared = not path.endswith(("/completions", "/embeddings"))
    return "anthropic" if shared and speaks_anthropic(scope.get("headers", ())) else "openai"


def speaks_anthropic(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    return any(name == b"anthropic-version" for name, _ in headers)


def refusal(error: ApiError, scope: Mapping[str, Any] | None = None) -> JsonObject:
    """The body of an answer that has the error's status."""
    api = api_of(scope)
    if api == "ollama":
        return {"error": str(error)}
    if api == "anthropic":
        kind = _ANTHROPIC_TYPES.get(error.status, "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": str(error)}, "request_id": None}
    kind = _OPENAI_TYPES.get(error.status, "invalid_request_error")
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}
