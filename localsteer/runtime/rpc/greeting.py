"""The first exchange with a host: any fault gives a one-line error within a time limit."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress

from ...errors import HostError
from . import protocol
from .endpoint import Endpoint
from .protocol import SIZE, Command

SECONDS = 5.0  # for finding the name, for connecting, and for the greeting
# How long a connection may be silent before the system probes the other end, and gives up
IDLE_SECONDS, PROBE_SECONDS, N_PROBES = 10, 5, 4
_START = "start `ggml-rpc-server` there, as docs/scale.md says"


def connect(endpoint: Endpoint, seconds: float = SECONDS) -> tuple[socket.socket, bytes]:
    """Returns (a connection on which the host has sent its greeting, that greeting). Raises HostError."""
    connection = _connected(endpoint, seconds)
    try:
        connection.settimeout(seconds)
        return connection, _greeted(endpoint, connection)
    except BaseException:
        connection.close()
        raise


def read(connection: socket.socket, size: int) -> bytes:
    """Receive exactly this many bytes. Raises OSError, and EOFError if the connection ends before."""
    parts = bytearray(size)
    view, done = memoryview(parts), 0
    while done < size:
        n = connection.recv_into(view[done:])
        if n == 0:
            raise EOFError("it closed the connection")
        done += n
    return bytes(parts)


def reason(error: BaseException, seconds: float) -> str:
    """What an error of a connection means, in words."""
    if isinstance(error, TimeoutError) and error.errno is None:  # localsteer's own timeout, not the system's
        return f"it has been silent for {seconds:g} s"
    if isinstance(error, ConnectionResetError | BrokenPipeError):
        return "it closed the connection"
    return str(getattr(error, "strerror", None) or error)


def _connected(endpoint: Endpoint, seconds: float) -> socket.socket:
    error: OSError | None = None
    for family, kind, number, _, address in _addresses(endpoint, seconds):
        connection = socket.socket(family, kind, number)
        try:
            connection.settimeout(seconds)
            connection.connect(address)
            _watch(connection)
            return connection
        except OSError as caught:
            connection.close()
            error = caught
    if isinstance(error, ConnectionRefusedError):
        raise HostError(f"nothing listens at the rpc host {endpoint}: {_START}.")
    why = reason(error, seconds) if error else "it has no address"
    raise HostError(
        f"the rpc host {endpoint} can't be reached ({why}): is it running, and is the port open from here?"
    )


def _addresses(endpoint: Endpoint, seconds: float) -> list:
    """The addresses of a host's name. The system's search may take minutes, and is abandoned after a time."""
    result: list = []

    def search() -> None:
        try:
            result.append(socket.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            result.append(error)

    thread = threading.Thread(target=search, daemon=True)
    thread.start()
    thread.join(seconds)
    if not result or not isinstance(result[0], list):
        why = (getattr(result[0], "strerror", None) or result[0]) if result else f"not within {seconds:g} s"
        raise HostError(f"the rpc host {endpoint}: there is no host of this name ({why}).")
    return result[0]


def _watch(connection: socket.socket) -> None:
    """Send small messages at once, and notice within half a minute when a host loses its power or its cable,
    however long it may compute."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    settings = {"TCP_KEEPIDLE": IDLE_SECONDS, "TCP_KEEPINTVL": PROBE_SECONDS, "TCP_KEEPCNT": N_PROBES}
    for name, value in settings.items():
        with suppress(AttributeError, OSError):  # not every system has all of these
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _greeted(endpoint: Endpoint, connection: socket.socket) -> bytes:
    size = protocol.ANSWERS[Command.HELLO]
    try:
        connection.sendall(protocol.GREETING)
        said = SIZE.unpack(read(connection, SIZE.size))[0]
        greeting = read(connection, size) if said == size else b""
    except TimeoutError:
        raise HostError(
            f"the rpc host {endpoint} accepts connections but does not answer: another client uses it (it "
            "serves one at a time), or it is not a ggml-rpc-server."
        ) from None
    except (OSError, EOFError):
        raise HostError(
            f"the rpc host {endpoint} closes the connection at the greeting: it is not a ggml-rpc-server, or "
            "one of another version of llama.cpp."
        ) from None
    if not greeting:
        raise HostError(
            f"the rpc host {endpoint} does not answer like a ggml-rpc-server: is this the right port?"
        )
    major, minor = greeting[0], greeting[1]
    if major != protocol.VERSION[0] or minor > protocol.VERSION[1]:
        wanted = ".".join(map(str, protocol.VERSION))
        raise HostError(
            f"the rpc host {endpoint} speaks version {major}.{minor} of the protocol and llama.cpp here "
            f"{wanted}: start the ggml-rpc-server of `localsteer rpc build` there."
        )
    return greeting
