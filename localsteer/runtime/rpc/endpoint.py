"""Reads HOST:PORT, as users write it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ...errors import HostError

MAX_HOSTS = 15  # ggml's scheduler takes 16 devices, including this machine's processor
MAX_NAME = 253  # characters of a host's name, by the rules of DNS
_FORM = "write HOST:PORT, as in 192.168.1.7:50052, several with commas between them"


@dataclass(frozen=True)
class Endpoint:
    """A host's name or address, without the brackets of IPv6, and its port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_endpoints(hosts: str | Iterable[str]) -> tuple[Endpoint, ...]:
    """The endpoints in `a:1,b:2`, or in several such texts. Raises HostError for a mistake, for none, and for
    one named twice."""
    texts = [hosts] if isinstance(hosts, str) else list(hosts)
    parts = [part for text in texts for part in str(text).split(",")]
    endpoints = tuple(_parsed(part.strip()) for part in parts)
    if not endpoints:
        raise HostError(f"--rpc names no host: {_FORM}.")
    for i, endpoint in enumerate(endpoints):
        if endpoint in endpoints[:i]:
            raise HostError(f"--rpc names {endpoint} twice: a host serves one client at a time.")
    if len(endpoints) > MAX_HOSTS:
        raise HostError(f"--rpc names {len(endpoints)} hosts: at most {MAX_HOSTS} are possible.")
    return endpoints


def _parsed(text: str) -> Endpoint:
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise HostError(f"--rpc {text!r:.80}: write an IPv6 address in brackets, as in [::1]:50052.")
    if not colon or not host or not host.isprintable() or " " in host or len(host) > MAX_NAME:
        raise HostError(f"--rpc {text!r:.80} names no host and port: {_FORM}.")
    if not (port.isascii() and port.isdigit() and 1 <= int(port[:6]) <= 65535 and len(port) < 6):
        raise HostError(f"--rpc {text!r:.80}: {port!r:.20} is not a port, which is a number from 1 to 65535.")
    return Endpoint(host, int(port))
