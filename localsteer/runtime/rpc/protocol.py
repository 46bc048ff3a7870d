"""llama.cpp's RPC protocol, as far as a relay must know it: ggml/src/ggml-rpc/ggml-rpc.cpp.

A request is one byte (the command), 8 bytes (the size of what follows), and that. An answer is 8 bytes (the
size) and that; most commands have none. All numbers are little-endian.
"""

from __future__ import annotations

import struct
from enum import IntEnum

# RPC_PROTO_MAJOR_VERSION and _MINOR_ of the llama.cpp that bridge/library.py accepts, which a test compares
VERSION = (7, 0)
CAPABILITIES = 24  # bytes of a greeting that offer transports other than TCP; zeros: none


class Command(IntEnum):
    """enum rpc_cmd."""

    ALLOC_BUFFER = 0
    GET_ALIGNMENT = 1
    GET_MAX_SIZE = 2
    BUFFER_GET_BASE = 3
    FREE_BUFFER = 4
    BUFFER_CLEAR = 5
    SET_TENSOR = 6
    SET_TENSOR_HASH = 7
    GET_TENSOR = 8
    COPY_TENSOR = 9
    GRAPH_COMPUTE = 10
    GET_DEVICE_MEMORY = 11
    INIT_TENSOR = 12
    GET_ALLOC_SIZE = 13
    HELLO = 14
    DEVICE_COUNT = 15
    GRAPH_RECOMPUTE = 16
    MEMSET_TENSOR = 17


# Bytes of the answer, for commands that have one. GET_TENSOR: as many as the request says.
ANSWERS = {
    Command.ALLOC_BUFFER: 16,
    Command.GET_ALIGNMENT: 8,
    Command.GET_MAX_SIZE: 8,
    Command.BUFFER_GET_BASE: 8,
    Command.SET_TENSOR_HASH: 1,
    Command.COPY_TENSOR: 1,
    Command.GET_DEVICE_MEMORY: 16,
    Command.GET_ALLOC_SIZE: 8,
    Command.HELLO: 4 + CAPABILITIES,
    Command.DEVICE_COUNT: 4,
}
HEAD = struct.Struct("<BQ")
SIZE = struct.Struct("<Q")
GREETING = HEAD.pack(Command.HELLO, CAPABILITIES) + bytes(CAPABILITIES)
# An address at which there is nothing: ggml only computes with a host's addresses, and never reads them.
_NOWHERE = 1 << 40
_ALIGNMENT = 128


def request(command: Command, body: bytes = b"") -> bytes:
    return HEAD.pack(command, len(body)) + body


def answer_size(command: int, body: bytes) -> int | None:
    """The size of the answer to a request in bytes, without its size field; None for a command without
    answer."""
    if command == Command.GET_TENSOR:
        return SIZE.unpack(body[-SIZE.size :])[0]
    return ANSWERS.get(command)


def invented_answer(command: int, body: bytes, size: int) -> bytes:
    """An answer in the place of a lost host, `size` bytes with which llama.cpp can continue, to no purpose. A
    tensor is all zeros, which the sender makes: this is for all other commands."""
    invented = {
        Command.ALLOC_BUFFER: SIZE.pack(_NOWHERE) + body[-SIZE.size :],  # as large as requested
        Command.GET_ALIGNMENT: SIZE.pack(_ALIGNMENT),
        Command.GET_MAX_SIZE: SIZE.pack(2**63 - 1),
        Command.BUFFER_GET_BASE: SIZE.pack(_NOWHERE),
        Command.SET_TENSOR_HASH: b"\1",  # the host already has the tensor: nothing more is sent
        Command.COPY_TENSOR: b"\1",
        Command.GET_DEVICE_MEMORY: SIZE.pack(1 << 30) * 2,
        Command.DEVICE_COUNT: (1).to_bytes(4, "little"),
    }
    return invented.get(command, bytes(size))  # the size of an allocation, 0: ggml uses its own figure
