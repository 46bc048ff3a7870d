"""The hosts of one model, and the relays that all models of a process share, since a host serves one
client."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from ...errors import HostError
from .endpoint import Endpoint, parse_endpoints
from .relay import SECONDS, Relay

_relays: dict[Endpoint, Relay] = {}  # the newest relay of each endpoint
_lock = threading.Lock()


class Hosts:
    """Hosts, which are greeted on creation. hosts: texts for parse_endpoints. seconds: how long a host may be
    silent when it owes an answer. Raises HostError, which names the host."""

    def __init__(self, hosts: str | Iterable[str] | tuple[Endpoint, ...], seconds: float = SECONDS) -> None:
        parsed = isinstance(hosts, tuple) and all(isinstance(host, Endpoint) for host in hosts)
        self.endpoints: tuple[Endpoint, ...] = hosts if parsed else parse_endpoints(hosts)
        if not 0 < seconds <= 86_400:
            raise HostError(f"an rpc host may be silent for 0 to 86400 s, not {seconds:g}.")
        self.seconds = seconds
        self.relays: list[Relay] = []
        try:
            for endpoint in self.endpoints:
                self.relays.append(_borrowed(endpoint, seconds))
        except BaseException:
            self.close()
            raise

    @property
    def addresses(self) -> list[str]:
        """The addresses of the relays, where llama.cpp reaches the hosts."""
        return [relay.address for relay in self.relays]

    @property
    def lost(self) -> HostError | None:
        """The error of the first host that is lost, or None."""
        return next((error for relay in self.relays if (error := relay.look())), None)

    def check(self) -> None:
        """Raise HostError if a host was lost: everything computed since is worthless."""
        for relay in self.relays:
            if relay.lost:
                raise HostError(str(relay.lost))

    def abandon(self) -> None:
        """Release whoever waits for the hosts; to the model they are lost."""
        for relay in list(self.relays):
            relay.abandon()

    def named(self, text: str) -> str:
        """A message of llama.cpp, with the hosts' addresses instead of their relays'."""
        for relay in self.relays:
            text = text.replace(relay.address, str(relay.endpoint))
        return text

    def renewed(self) -> Hosts:
        """The same hosts, after greeting those that were lost again. Raises HostError."""
        return Hosts(self.endpoints, self.seconds)

    def close(self) -> None:
        """Leave the hosts, after the model on them was freed. A second call does nothing."""
        relays, self.relays = self.relays, []
        for relay in relays:
            _give_back(relay)

    def __str__(self) -> str:
        return ", ".join(map(str, self.endpoints))


def abandon_all() -> None:
    """Abandon the hosts of all models, from any thread, so that a program that waits for a host can end."""
    for relay in list(_relays.values()):
        relay.abandon()


def _borrowed(endpoint: Endpoint, seconds: float) -> Relay:
    with _lock:
        relay = _relays.get(endpoint)
        if relay is None or relay.look():
            relay = _relays[endpoint] = Relay(endpoint, seconds)
        relay.n_users += 1
        return relay


def _give_back(relay: Relay) -> None:
    with _lock:
        relay.n_users -= 1
        if relay.n_users:
            return
        if _relays.get(relay.endpoint) is relay:
            del _relays[relay.endpoint]
    relay.close()
