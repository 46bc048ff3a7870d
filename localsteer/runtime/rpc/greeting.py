"""The first exchange with a host: whatever can be wrong with it is one line, within a time."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress

from ...errors import HostError
from . import protocol
from .endpoint import Endpoint
from .protocol import SIZE, Command

SECONDS = 5.0  # to find a name, to connect, and to be greeted: each
# Of a connection that says nothing, until the system asks whether the other end is still there, and gives up
IDLE_SECONDS, PROBE_SECONDS, N_PROBES = 10, 5, 4
_START = "start `ggml-rpc-server` there, as docs/scale.md says"


def connect(endpoint: Endpoint, seconds: float = SECONDS) -> tuple[socket.socket, bytes]:
    """(a connection on which the host has said its greeting, that greeting). Raises HostError."""
    connection = _connected(endpoint, seconds)
    try:
        connection.settimeout(seconds)
        return connection, _greeted(endpoint, connection)
    except BaseException:
        connection.close()
        raise


def read(connection: socket.socket, size: int) -> bytes:
    """Exactly so many bytes. Raises OSError, and EOFError where the connection ends before."""
    parts = bytearray(size)
    view, done = memoryview(parts), 0
    while done < size:
        n = connection.recv_into(view[done:])
        if n == 0:
            raise EOFError("it closed the connection")
        done += n
    return bytes(parts)


def reason(error: BaseException, seconds: float) -> str:
    """What an error of a connection says, for people."""
    if isinstance(error, TimeoutError) and error.errno is None:  # ours, and not the system's
        return f"it says nothing for {seconds:g} s"
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
    raise HostError(f"the rpc host {endpoint} can't be reached ({why}): is it on, and the port open to here?")


def _addresses(endpoint: Endpoint, seconds: float) -> list:
    """Of the host's name. The system's own search may take minutes: it is left behind after a time."""
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
    """Small messages at once; and a host that loses its power or its cable is noticed within half a minute,
    however long it may compute."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    settings = {"TCP_KEEPIDLE": IDLE_SECONDS, "TCP_KEEPINTVL": PROBE_SECONDS, "TCP_KEEPCNT": N_PROBES}
    for name, value in settings.items():
        with suppress(AttributeError, OSError):  # not every system has all of them
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _greeted(endpoint: Endpoint, connection: socket.socket) -> bytes:
    size = protocol.ANSWERS[Command.HELLO]
    try:
        connection.sendall(protocol.GREETING)
        said = SIZE.unpack(read(connection, SIZE.size))[0]
        greeting = read(connection, size) if said == size else b""
    except TimeoutError:
        raise HostError(
            f"the rpc host {endpoint} takes connections and does not answer: another client has it (it "
            "serves one at a time), or it is not a ggml-rpc-server."
        ) from None
    except (OSError, EOFError):
        raise HostError(
            f"the rpc host {endpoint} closes the connection at the greeting: it is not a ggml-rpc-server, or "
            "one of another version of llama.cpp."
        ) from None
    if not greeting:
        raise HostError(f"the rpc host {endpoint} does not answer as a ggml-rpc-server does: is it the port?")
    major, minor = greeting[0], greeting[1]
    if major != protocol.VERSION[0] or minor > protocol.VERSION[1]:
        wanted = ".".join(map(str, protocol.VERSION))
        raise HostError(
            f"the rpc host {endpoint} speaks version {major}.{minor} of the protocol and llama.cpp here "
            f"{wanted}: start the ggml-rpc-server of `localsteer rpc build` there."
        )
    return greeting
