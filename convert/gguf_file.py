"""A GGUF reader that trusts no count: every length is checked against the bytes in the file.

`gguf.GGUFReader` trusts the counts in a file: an array that claims 2**60 items keeps it busy until memory
runs out. A control vector may come from anywhere, so it is read here; tests compare the two readers.
"""

from __future__ import annotations

import mmap
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

from localsteer.errors import LocalsteerError, VectorFileError

from . import keys

MAGIC = b"GGUF"
_SCALARS = {
    GGUFValueType.UINT8: "u1", GGUFValueType.INT8: "i1", GGUFValueType.BOOL: "?",
    GGUFValueType.UINT16: "<u2", GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4", GGUFValueType.INT32: "<i4", GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.UINT64: "<u8", GGUFValueType.INT64: "<i8", GGUFValueType.FLOAT64: "<f8",
}  # fmt: skip

_ROWS = {GGMLQuantizationType.F32: "<f4", GGMLQuantizationType.F16: "<f2", GGMLQuantizationType.BF16: "<u2"}


@dataclass(frozen=True)
class KeyValue:
    """value: a Python scalar, a str, a list of str, or a numpy array (item says of what)."""

    type: GGUFValueType
    value: Any
    item: GGUFValueType | None = None


@dataclass(frozen=True)
class TensorInfo:
    name: str
    shape: tuple[int, ...]  # ggml order: the fastest dimension first
    type: int
    offset: int  # from the start of the file


class GgufFile:
    """Key-values and tensor infos of an open file; `f32` reads one tensor. Made by `open_gguf`."""

    def __init__(self, path: str, data: Any) -> None:
        self.path = path
        self._data = data
        self._at = 0
        self._taken = 0  # bytes of tensors handed out
        self.keys: dict[str, KeyValue] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self._read_header()

    def error(self, message: str) -> LocalsteerError:
        return VectorFileError(f"{self.path} {message}")

    def _text(self, raw: bytes) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self.error("is damaged: it holds a string that is not UTF-8.") from None

    def _texts(self, raws: list[bytes]) -> list[Any]:
        """The items of an array of strings."""
        return [*map(self._text, raws)]

    def get(self, key: str, *types: GGUFValueType, item: GGUFValueType | None = None) -> Any:
        """The value of a key, None where it is absent. Raises when it has another type."""
        entry = self.keys.get(key)
        if entry is None:
            return None
        if entry.type not in types or (entry.type == GGUFValueType.ARRAY and entry.item != item):
            raise self.error(f"is damaged: {key} has the wrong type.")
        return entry.value

    def f32(self, name: str) -> np.ndarray:
        """The data of a 1-D tensor of F32, F16 or BF16 as float32, copied."""
        info = self.tensors[name]
        if info.type not in _ROWS or len(info.shape) != 1:
            raise self.error(f"is not a control vector: tensor {name} is not one row of F32, F16 or BF16.")
        dtype = np.dtype(_ROWS[info.type])
        end = info.offset + dtype.itemsize * info.shape[0]
        if end > len(self._data):
            raise self.error(f"is truncated: tensor {name} ends at byte {end} of {len(self._data)}.")
        self._taken += end - info.offset
        if self._taken > len(self._data):  # else a small file could claim the same bytes a thousand times
            raise self.error("is damaged: its tensors overlap.")
        numbers = np.frombuffer(self._data[info.offset : end], dtype=dtype)
        if info.type == GGMLQuantizationType.BF16:  # the upper half of a float32
            return (numbers.astype(np.uint32) << 16).view(np.float32)
        return numbers.astype(np.float32)

    def _take(self, n_bytes: int) -> bytes:
        end = self._at + n_bytes
        if end > len(self._data):
            raise self.error(f"is truncated: it ends at byte {len(self._data)}, inside its header.")
        piece = self._data[self._at : end]
        self._at = end
        return piece

    def _unpack(self, fmt: str) -> int:
        return struct.unpack("<" + fmt, self._take(struct.calcsize(fmt)))[0]

    def _count(self, what: str, limit: int, fmt: str = "Q") -> int:
        count = self._unpack(fmt)
        if count > limit:
            raise self.error(f"is damaged: it claims {count} {what} (limit {limit}).")
        return count

    def _string(self, limit: int | None = None) -> str:
        n_bytes = self._unpack("Q") if limit is None else self._count("bytes in a name", limit)
        return self._text(self._take(n_bytes))

    def _strings(self, count: int) -> list[bytes]:
        """Some hundred thousand of them in a vocabulary: the loop does no more than it must."""
        raws, data, at, size = [], self._data, self._at, len(self._data)
        read_length = struct.Struct("<Q").unpack_from
        for _ in range(count):
            if at + 8 > size:
                break
            start = at + 8
            at = start + read_length(data, at)[0]
            raws.append(data[start:at])
        if at > size or len(raws) < count:
            raise self.error(f"is truncated: it ends at byte {size}, inside its header.")
        self._at = at
        return raws

    def _value_type(self) -> GGUFValueType:
        code = self._unpack("I")
        try:
            return GGUFValueType(code)
        except ValueError:
            raise self.error(f"is damaged: it holds a key-value of unknown type {code}.") from None

    def _read_header(self) -> None:
        magic = bytes(self._data[:4])
        if magic != MAGIC:
            raise self.error(f"is not a GGUF file (it starts with {magic!r}).")
        self._take(4)
        version = self._unpack("I")
        if version not in (2, 3):
            big = " (a big-endian file?)" if version & 0xFFFF == 0 else ""
            raise self.error(f"has GGUF version {version}{big}; this reads versions 2 and 3.")
        n_tensors = self._count("tensors", keys.MAX_TENSORS)
        for _ in range(self._count("key-values", keys.MAX_KEY_VALUES)):
            self._read_key_value()
        infos = [self._read_tensor_info() for _ in range(n_tensors)]
        self._place(infos)

    def _read_key_value(self) -> None:
        key = self._string(keys.MAX_NAME)
        if key in self.keys:
            raise self.error(f"is damaged: key {key!r} occurs twice.")
        self.keys[key] = self._read_value(self._value_type())

    def _read_value(self, type_: GGUFValueType) -> KeyValue:
        if type_ == GGUFValueType.STRING:
            return KeyValue(type_, self._string())
        if type_ == GGUFValueType.ARRAY:
            return self._read_array()
        return KeyValue(type_, self._numbers(type_, 1)[0].item())

    def _read_array(self) -> KeyValue:
        item = self._value_type()
        count = self._count("items in an array", keys.MAX_ARRAY)
        if item == GGUFValueType.ARRAY:
            raise self.error("is damaged: it holds an array of arrays.")
        if item == GGUFValueType.STRING:
            return KeyValue(GGUFValueType.ARRAY, self._texts(self._strings(count)), item)
        return KeyValue(GGUFValueType.ARRAY, self._numbers(item, count), item)

    def _numbers(self, type_: GGUFValueType, count: int) -> np.ndarray:
        dtype = np.dtype(_SCALARS[type_])
        if type_ == GGUFValueType.BOOL:  # any byte but 0 is true; numpy wants 0 or 1
            return np.frombuffer(self._take(count), dtype=np.uint8) != 0
        return np.frombuffer(self._take(count * dtype.itemsize), dtype=dtype)

    def _read_tensor_info(self) -> TensorInfo:
        name = self._string(keys.MAX_NAME)
        n_dims = self._count("dimensions", 4, "I")
        shape = tuple(self._unpack("Q") for _ in range(n_dims))
        return TensorInfo(name, shape, self._unpack("I"), self._unpack("Q"))

    def _place(self, infos: list[TensorInfo]) -> None:
        """Turn offsets into the data section into offsets into the file."""
        alignment = self.get("general.alignment", GGUFValueType.UINT32)
        alignment = 32 if alignment is None else alignment
        if alignment == 0 or alignment & (alignment - 1):
            raise self.error(f"is damaged: its alignment {alignment} is not a power of two.")
        start = -(-self._at // alignment) * alignment
        for info in infos:
            if info.name in self.tensors:
                raise self.error(f"is damaged: tensor {info.name!r} occurs twice.")
            self.tensors[info.name] = TensorInfo(info.name, info.shape, info.type, start + info.offset)


@contextmanager
def open_gguf(path: str | os.PathLike[str]) -> Iterator[GgufFile]:
    """Map a file and read its header. Raises VectorFileError for whatever is wrong with it."""
    with open_bytes(path) as data:
        yield GgufFile(os.fspath(path), data)


def _can_name_a_file(path: str) -> bool:
    """Not with a NUL in it, nor with half of a character."""
    try:
        return b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        return False


@contextmanager
def open_bytes(path: str | os.PathLike[str]) -> Iterator[Any]:
    """The bytes of a file, mapped: a foreign file of many gigabytes is not read."""
    shown = os.fspath(path) or "''"
    if not _can_name_a_file(shown):
        raise VectorFileError(f"{shown!r:.120} can't be the name of a file.")
    try:
        if stat.S_ISFIFO(mode := os.stat(path).st_mode) or stat.S_ISCHR(mode):
            raise VectorFileError(f"{shown} is a pipe or a device: save the vector to a file first.")
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise VectorFileError(f"{shown} is empty.")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                yield data
    except FileNotFoundError:
        raise VectorFileError(f"{shown} does not exist.") from None
    except IsADirectoryError:
        raise VectorFileError(f"{shown} is a folder, not a file.") from None
    except OSError as error:
        raise VectorFileError(f"{shown} can't be read: {error.strerror or error}.") from None
