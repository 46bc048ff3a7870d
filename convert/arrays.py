"""Named arrays in .npz and .safetensors files, no byte read beyond what the file holds, and no pickle."""

from __future__ import annotations

import json
import math
import operator
import os
import zipfile
import zlib
from collections.abc import Collection, Mapping, Sequence
from typing import IO, Any, Literal

import numpy as np

from localsteer.errors import VectorFileError
from localsteer.jsonable import JsonObject

from .gguf_file import open_bytes

MAX_HEADER = 100_000_000  # bytes of safetensors header, as the safetensors library itself allows
MAX_ARRAY_BYTES = 1 << 33  # of one array: 8 GiB hold the states of 4,000 pairs, 64 layers, 8192 wide
MAX_RATIO = 100  # unpacked to packed, from 64 MiB on: activations compress to no less than half, bombs do
# by the names of numpy's types
_SAFETENSORS_NAMES = {"float64": "F64", "float32": "F32", "int64": "I64", "uint8": "U8"}
_SAFETENSORS = {
    "U8": "|u1",
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
}
_NUMPY_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def read_arrays(path: str | os.PathLike[str], wanted: Collection[str]) -> dict[str, np.ndarray]:
    """The arrays of these names that the file has, as float64 or integers. Raises VectorFileError."""
    with open_bytes(path) as data:
        try:
            return _read_npz(path, wanted) if data[:2] == b"PK" else _read_safetensors(data, wanted)
        except _Damaged as error:
            raise VectorFileError(f"{os.fspath(path)} {error}") from None


def save_npz(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray]) -> None:
    """The same arrays give the same bytes, which numpy.savez, with its dates, does not promise."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.ascontiguousarray(array), allow_pickle=False)


def save_safetensors(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray]) -> None:
    """A header of JSON, padded to 8 bytes, and the arrays without a gap."""
    entries, at = {}, 0
    for name, array in arrays.items():
        kind, end = _SAFETENSORS_NAMES[array.dtype.name], at + array.nbytes
        entries[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [at, end]}
        at = end
    header = json.dumps(entries).encode("ascii")
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for array in arrays.values():
            file.write(np.ascontiguousarray(array).data)


class _Damaged(Exception):
    """What is wrong, to be put after the path."""


def _read_npz(path: str | os.PathLike[str], wanted: Collection[str]) -> dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            arrays = {}
            for name in set(wanted) & set(members):
                with archive.open(members[name]) as member:
                    arrays[name] = _read_npy(member, name, members[name])
            return arrays
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError):
        raise _Damaged("is not a readable .npz file: save it again with numpy.savez.") from None


def _read_npy(member: IO[bytes], name: str, info: zipfile.ZipInfo) -> np.ndarray:
    """numpy allocates what a header claims before it reads, so the claim is checked first."""
    try:
        version = np.lib.format.read_magic(member)
        shape, fortran, dtype = _NUMPY_HEADERS[version](member)
    except Exception:  # the header is Python source: numpy passes on whatever Python's tokenizer raises
        raise _Damaged(f"is damaged: array {name!r} has no readable header.") from None
    if dtype.kind not in "fiu":
        raise _Damaged(f"holds {name!r} as {dtype}: numbers are needed.")
    n_bytes = math.prod(shape) * dtype.itemsize
    limit = min(info.file_size, MAX_ARRAY_BYTES, max(1 << 26, MAX_RATIO * info.compress_size))
    if not 0 <= n_bytes <= limit:
        raise _Damaged(f"is damaged: array {name!r} claims {n_bytes} bytes.")
    data = member.read(n_bytes)
    if len(data) != n_bytes:
        raise _Damaged(f"is truncated: array {name!r} has {len(data)} of {n_bytes} bytes.")
    return _widen(_shaped(np.frombuffer(data, dtype), shape, name, order="F" if fortran else "C"))


def _read_safetensors(data: Any, wanted: Collection[str]) -> dict[str, np.ndarray]:
    """gguf's SafetensorsLocal reads a header of any length that the file claims, so this does it again."""
    header, start = _safetensors_header(data)
    return {name: _safetensor(data, start, name, header[name]) for name in set(wanted) & set(header)}


def _safetensors_header(data: Any) -> tuple[JsonObject, int]:
    start = 8 + int.from_bytes(data[:8], "little")
    if data[8:9] != b"{" or len(data) < 9:
        raise _Damaged("is neither GGUF, .npz nor .safetensors: export the vector to one of them.")
    if start > min(len(data), MAX_HEADER):
        raise _Damaged(f"is truncated or damaged: its header claims {start - 8} of {len(data)} bytes.")
    try:
        header = json.loads(data[8:start])
    except (ValueError, RecursionError):
        raise _Damaged("is damaged: its safetensors header is not JSON.") from None
    if not isinstance(header, dict):
        raise _Damaged("is damaged: its safetensors header is not an object.")
    return header, start


def _safetensor(data: Any, start: int, name: str, info: Any) -> np.ndarray:
    try:
        kind, shape = info["dtype"], [operator.index(n) for n in info["shape"]]
        begin, end = map(operator.index, info["data_offsets"])
        dtype = np.dtype(_SAFETENSORS[kind])
        fits = 0 <= begin <= end <= len(data) - start and min(shape, default=0) >= 0
    except (KeyError, TypeError, ValueError, OverflowError):
        raise _Damaged(f"is damaged, or holds {name!r} in a type that can't be read.") from None
    if not fits or math.prod(shape) * dtype.itemsize != end - begin:
        raise _Damaged(f"is truncated or damaged: the bytes of {name!r} do not fit its shape.")
    array = _shaped(np.frombuffer(data[start + begin : start + end], dtype), shape, name)
    if kind == "BF16":  # the upper half of a float32
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return _widen(array)


def _shaped(array: np.ndarray, shape: Sequence[int], name: str, order: Literal["C", "F"] = "C") -> np.ndarray:
    """numpy has its own bounds on axes, and a size of 0 lets any other pass a check of bytes."""
    try:
        return array.reshape(shape, order=order)
    except (ValueError, OverflowError):
        raise _Damaged(f"is damaged: array {name!r} has a shape that can't be.") from None


def _widen(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float64) if array.dtype.kind == "f" else array
