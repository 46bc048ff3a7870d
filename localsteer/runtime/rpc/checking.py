"""What a host reports about itself."""

from __future__ import annotations

import socket
import struct
from typing import TypedDict

from ...errors import HostError
from . import protocol
from .endpoint import Endpoint
from .greeting import connect, read, reason
from .protocol import SIZE, Command

MAX_DEVICES = 64  # devices of one server; anything that claims more is not a server


class Device(TypedDict):
    """Memory in bytes."""

    free: int
    total: int


class CheckedHost(TypedDict):
    """error: None, or why it can't be used."""

    host: str
    version: str | None
    devices: list[Device]
    error: str | None


def checked(endpoint: Endpoint) -> CheckedHost:
    row: CheckedHost = {"host": str(endpoint), "version": None, "devices": [], "error": None}
    try:
        connection, greeting = connect(endpoint)
    except HostError as error:
        return {**row, "error": str(error)}
    row["version"] = ".".join(map(str, greeting[:3]))
    with connection:
        try:
            count = struct.unpack("<I", _asked(connection, Command.DEVICE_COUNT, b""))[0]
            for i in range(min(count, MAX_DEVICES)):
                answer = _asked(connection, Command.GET_DEVICE_MEMORY, struct.pack("<I", i))
                free, total = struct.unpack("<QQ", answer)
                row["devices"].append({"free": free, "total": total})
        except (OSError, EOFError, ValueError) as error:
            row["error"] = (
                f"{endpoint} breaks off in the middle: {reason(error, connection.gettimeout() or 0)}."
            )
    return row


def _asked(connection: socket.socket, command: Command, body: bytes) -> bytes:
    connection.sendall(protocol.request(command, body))
    size = SIZE.unpack(read(connection, SIZE.size))[0]
    if size != protocol.ANSWERS[command]:
        raise ValueError("its answer has the wrong size")
    return read(connection, size)
