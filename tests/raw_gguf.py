"""A second, independent writer of GGUF bytes that can be told to lie: golden files and hostile files."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import numpy as np

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_PACK = {
    U8: "B",
    I8: "b",
    U16: "H",
    I16: "h",
    U32: "I",
    I32: "i",
    F32: "f",
    BOOL: "?",
    U64: "Q",
    I64: "q",
    F64: "d",
}
TENSOR_F32, TENSOR_F16, TENSOR_Q8_0, TENSOR_BF16 = 0, 1, 8, 30


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def value(type_: int, content) -> bytes:
    """A key-value without its key: type, then content."""
    return struct.pack("<I", type_) + (
        text(content) if type_ == STRING else struct.pack("<" + _PACK[type_], content)
    )


def array(item: int, contents, count: int | None = None) -> bytes:
    """`count` is what the array claims to hold."""
    head = struct.pack("<IIQ", ARRAY, item, len(contents) if count is None else count)
    if item == STRING:
        return head + b"".join(map(text, contents))
    return head + b"".join(struct.pack("<" + _PACK[item], c) for c in contents)


@dataclass
class Tensor:
    name: str
    data: bytes
    dims: tuple[int, ...]
    type: int = TENSOR_F32
    offset: int | None = None  # None: after the tensor before it

    @classmethod
    def row(cls, name: str, numbers, **lies) -> Tensor:
        data = np.asarray(numbers, dtype="<f4").tobytes()
        return cls(name, data, **{"dims": (len(numbers),)} | lies)


@dataclass
class RawGguf:
    """key_values: key -> `value(...)` or `array(...)`; n_* are claims that replace the truth."""

    key_values: dict[str, bytes] = field(default_factory=dict)
    tensors: list[Tensor] = field(default_factory=list)
    version: int = 3
    n_tensors: int | None = None
    n_key_values: int | None = None
    alignment: int = 32
    extra_key_values: bytes = b""  # after the others, with their own keys
    magic: bytes = b"GGUF"

    def to_bytes(self) -> bytes:
        n_tensors = len(self.tensors) if self.n_tensors is None else self.n_tensors
        n_keys = len(self.key_values) if self.n_key_values is None else self.n_key_values
        out = self.magic + struct.pack("<IQQ", self.version, n_tensors, n_keys)
        out += b"".join(text(key) + content for key, content in self.key_values.items())
        out += self.extra_key_values
        offset, data = 0, b""
        for tensor in self.tensors:
            at = offset if tensor.offset is None else tensor.offset
            out += text(tensor.name) + struct.pack("<I", len(tensor.dims))
            out += struct.pack(f"<{len(tensor.dims)}Q", *tensor.dims) + struct.pack("<IQ", tensor.type, at)
            data += self._pad(tensor.data)
            offset += len(self._pad(tensor.data))
        return self._pad(out) + data

    def _pad(self, piece: bytes) -> bytes:
        return piece + bytes(-len(piece) % self.alignment)
