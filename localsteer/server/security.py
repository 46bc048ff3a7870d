"""Who may ask: the Host and Origin of a request, and its key.

A page of another site can make a browser talk to this server. Its requests carry that site's Origin, which is
refused. With DNS rebinding the site's own name leads here: then the Host is that name, which is refused too.
An address as Host can't be rebound. Keys are compared in constant time.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from starlette.types import Message, Scope

from localsteer.errors import LocalsteerError

from .errors import ApiError, shown

PUBLIC = ("/", "/health", "/docs")  # and /page/*: what can be read without the key
MIN_KEY = 8


@dataclass(frozen=True)
class Access:
    """hosts: names beside loopback's that a Host header may hold. origins: sites that may call (CORS)."""

    bind: str = "127.0.0.1"
    api_key: str | None = None
    hosts: Collection[str] = ()
    origins: Collection[str] = ()

    def check(self) -> None:
        """Raise LocalsteerError for settings that would let in everybody, and for names that no request could
        match."""
        if self.api_key is not None and len(self.api_key) < MIN_KEY:
            raise LocalsteerError(f"--api-key must have at least {MIN_KEY} characters.")
        if not is_loopback(self.bind) and not self.api_key:
            raise LocalsteerError(
                f"--host {self.bind} can be reached from other machines: add --api-key KEY "
                "(or set LOCALSTEER_API_KEY), or leave --host out."
            )
        for name in self.hosts:
            if host_name(name) != name.lower() or "*" in name:
                raise LocalsteerError(f"--allow-host {name}: must be one name, without scheme, port or `*`.")
        for origin in self.origins:
            parts = urlsplit(origin)
            if origin != f"{parts.scheme}://{parts.netloc}" or not (parts.scheme and parts.netloc):
                raise LocalsteerError(
                    f"--cors {origin}: must be one site as its pages name it, like https://chat.example:3000."
                )

    def allows_host(self, header: str) -> bool:
        name = host_name(header)
        if name is None:
            return False
        if is_loopback(name) or name in {host.lower() for host in self.hosts} or name == self.bind.lower():
            return True
        return not is_loopback(self.bind) and _address(name) is not None

    def allows_origin(self, origin: str, host: str) -> bool:
        return origin in self.origins or origin in (f"http://{host}", f"https://{host}")

    def allows_key(self, header: str) -> bool:
        if self.api_key is None:
            return True
        kind, _, key = header.partition(" ")
        given = key.strip() if kind.lower() == "bearer" else ""
        return hmac.compare_digest(given.encode("utf-8", "replace"), self.api_key.encode("utf-8", "replace"))


def is_loopback(host: str) -> bool:
    address = _address(host)
    return host.lower() == "localhost" or (address is not None and address.is_loopback)


def host_name(header: str) -> str | None:
    """The name or address in a Host header, in lower case; None if it has none."""
    try:
        parts = urlsplit(f"//{header}")
        parts.port  # noqa: B018 - raises for what is not a port
    except ValueError:
        return None
    if parts.path or parts.query or parts.fragment or parts.username is not None or not parts.hostname:
        return None
    return parts.hostname.lower()


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


class Guard:
    """ASGI middleware that checks Host, then Origin, then the key. Only named origins get CORS headers."""

    def __init__(self, app: Callable[..., Any], access: Access) -> None:
        self.app, self.access = app, access

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        origin = headers.get("origin")
        if origin in self.access.origins:
            send = _with_headers(send, _cors(origin))
        try:
            self._check_site(headers)
            if origin in self.access.origins and scope["method"] == "OPTIONS":
                await send({"type": "http.response.start", "status": 204, "headers": []})
                return await send({"type": "http.response.body", "body": b""})
            self._check_key(scope["path"], headers)
        except ApiError as error:
            return await error.response(scope)(scope, receive, send)
        await self.app(scope, receive, send)

    def _check_site(self, headers: dict[str, str]) -> None:
        host = headers.get("host", "")
        if not self.access.allows_host(host):
            raise ApiError(
                f"Host: {shown(host)} is not a name of this server: use its address, or start it with "
                "--allow-host NAME.",
                status=403, param="Host", code="host_refused",
            )  # fmt: skip
        origin = headers.get("origin")
        if origin is not None and not self.access.allows_origin(origin, host):
            raise ApiError(
                f"Origin: {shown(origin)} may not call this server: start it with --cors ORIGIN to allow it.",
                status=403, param="Origin", code="origin_refused",
            )  # fmt: skip

    def _check_key(self, path: str, headers: dict[str, str]) -> None:
        if path in PUBLIC or path.startswith("/page/"):
            return
        # Anthropic's clients have a header of their own
        given = (headers.get("authorization", ""), f"Bearer {headers.get('x-api-key', '')}")
        if not any(self.access.allows_key(header) for header in given):
            raise ApiError(
                "Authorization: this server needs its key: send `Authorization: Bearer KEY`, or `x-api-key: "
                "KEY`.",
                status=401, param="Authorization", code="invalid_api_key",
            )  # fmt: skip


def _cors(origin: str) -> list[tuple[bytes, bytes]]:
    return [
        (b"access-control-allow-origin", origin.encode("latin-1")),
        (b"access-control-allow-methods", b"GET, POST, DELETE"),
        (b"access-control-allow-headers", b"authorization, content-type, *"),
        (b"access-control-max-age", b"600"),
        (b"vary", b"Origin"),
    ]


def _with_headers(send: Any, more: list[tuple[bytes, bytes]]) -> Any:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = message | {"headers": [*message.get("headers", ()), *more]}
        await send(message)

    return sending
