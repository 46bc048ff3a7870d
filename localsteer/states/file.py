"""The file of `states`: a safetensors file whose large tensor is written row by row.

safetensors begins with a header that states every shape, so all prompts are tokenised first; the file then
has its full length from the start, and rows go where they belong. It is called `NAME.part` until it is
complete. Beside it, `NAME.journal` records which chunks of prompts are done, with a checksum of their rows,
so that a run can be resumed.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from localsteer.errors import LocalsteerError
from localsteer.runtime.journal import Journal

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FORMAT = "localsteer.states"
FORMAT_VERSION = "1"
ALIGNMENT = 64  # of `states`, which stands first, so that a memory map of it is aligned
MAX_HEADER = 1 << 24  # bytes that are read to see whose file it is
READ_BYTES = 1 << 24  # bytes read at a time for a checksum
DTYPES = {"float16": "F16", "float32": "F32"}
_NAMES = {"float16": "F16", "float32": "F32", "int32": "I32", "int64": "I64"}


@dataclass(frozen=True, eq=False)
class Layout:
    """What the file will hold. shape: (n_rows, n_layers, n_embd) of `states`. small: every other tensor."""

    shape: tuple[int, int, int]
    dtype: str
    small: Mapping[str, np.ndarray]
    metadata: Mapping[str, str]

    @property
    def row_bytes(self) -> int:
        return self.shape[1] * self.shape[2] * np.dtype(self.dtype).itemsize

    @property
    def states_bytes(self) -> int:
        return self.shape[0] * self.row_bytes

    @property
    def n_bytes(self) -> int:
        """Of the whole file."""
        return len(self.header()) + self.states_bytes + sum(array.nbytes for array in self.small.values())

    def header(self) -> bytes:
        """Length, JSON, and blanks up to the alignment."""
        entries: dict[str, dict[str, str] | _Tensor] = {"__metadata__": dict(self.metadata)}
        entries["states"] = _entry(self.dtype, self.shape, 0, self.states_bytes)
        at = self.states_bytes
        for name, array in self.small.items():
            entries[name] = _entry(array.dtype.name, array.shape, at, array.nbytes)
            at += array.nbytes
        text = json.dumps(entries, ensure_ascii=True).encode("ascii")
        text += b" " * (-(len(text) + 8) % ALIGNMENT)
        return len(text).to_bytes(8, "little") + text


class _Tensor(TypedDict):
    """Of a safetensors header."""

    dtype: str
    shape: list[int]
    data_offsets: list[int]


def _entry(dtype: str, shape: tuple[int, ...], at: int, n_bytes: int) -> _Tensor:
    return {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + n_bytes]}


class PartialFile:
    """`path`.part while its rows are computed; `finish` renames it.

    identity: what the rows belong to. A part with the same identity is continued; one of another run is
    refused. Raises LocalsteerError for that, for a part that another process is writing, and if there is no
    room.
    """

    def __init__(self, path: Path, layout: Layout, identity: Mapping[str, Any]) -> None:
        self.path, self._layout = path, layout
        self._part, journal = beside(path)
        self._header = layout.header()
        self._file = self._journal = None
        self._is_mine = fresh = not self._part.exists()  # what is not ours is never deleted
        was_begun = journal.is_file()
        try:
            self._file = self._part.open("w+b" if fresh else "r+b", buffering=0)
            self._lock()
            if fresh:
                journal.unlink(missing_ok=True)  # its rows are gone
            self._journal = Journal(journal, identity)
            self._take(fresh, was_begun)
        except OSError as error:
            self.close()
            raise LocalsteerError(
                f"{error.filename or path} can't be written ({error.strerror or error})."
            ) from error
        except LocalsteerError:
            self.close()
            raise

    def _take(self, fresh: bool, was_begun: bool) -> None:
        """Begin, or continue an existing part. A run that was killed at its beginning leaves a shorter
        file."""
        if not fresh and self._is_whole():
            self._is_mine = True
        elif fresh or (was_begun and os.fstat(self._file.fileno()).st_size < self._layout.n_bytes):
            self._is_mine = True
            self._check_room()
            self._begin()
        else:
            raise LocalsteerError(
                f"{self._part} already exists and does not belong to this run: delete it, or choose another "
                "name."
            )

    def has(self, key: str, first: int, last: int) -> bool:
        """Whether rows first to last (exclusive) are unchanged since they were written."""
        record = self._journal.get(key)
        return record is not None and record.get("rows_crc32") == self._checksum(first, last)

    def write(self, row: int, rows: np.ndarray) -> None:
        """Write rows from `row` on. Raises LocalsteerError for a number beyond the type, and for a full
        disk."""
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(rows, dtype=self._layout.dtype)
        if not np.isfinite(stored).all():
            largest = float(np.abs(rows).max())
            raise LocalsteerError(f"a state of {largest:.0f} is beyond float16: use --dtype float32.")
        self._write_at(len(self._header) + row * self._layout.row_bytes, stored.data.cast("B"))

    def done(self, key: str, first: int, last: int) -> None:
        """Record that rows first to last (exclusive) are written."""
        self._journal.put(key, {"kind": "states", "rows_crc32": self._checksum(first, last)})

    def finish(self) -> None:
        """Rename the complete file, in one step."""
        try:
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._part, self.path)
        except OSError as error:
            raise LocalsteerError(f"{self.path} can't be written ({error.strerror or error}).") from error
        self._journal.close()
        self._journal.path.unlink(missing_ok=True)
        self._file = None

    def close(self) -> None:
        """Close the files. What is done stays for the next run; if nothing is, the files are removed."""
        if self._file is None:
            return
        self._file.close()
        self._file = None
        if self._journal is not None:
            self._journal.close()
        if self._is_mine and not (self._journal and len(self._journal)):
            self._part.unlink(missing_ok=True)

    def __enter__(self) -> PartialFile:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            self._file = None
            raise LocalsteerError(f"another run is writing {self.path}: choose another name.") from None
        except OSError:
            pass  # a file system without locks

    def _is_whole(self) -> bool:
        size = os.fstat(self._file.fileno()).st_size
        return size == self._layout.n_bytes and self._file.read(len(self._header)) == self._header

    def _check_room(self) -> None:
        free = shutil.disk_usage(self.path.parent).free
        if self._layout.n_bytes > free:
            needed = f"{self._layout.n_bytes / 1e9:.1f} GB and {free / 1e9:.1f} GB are free"
            raise LocalsteerError(
                f"{self.path} will take {needed}: choose fewer layers or tokens, float16, or another disk."
            )

    def _begin(self) -> None:
        """Write everything already known, and set the full length last: a file cut short is refused later."""
        self._write_at(0, self._header)
        at = len(self._header) + self._layout.states_bytes
        for array in self._layout.small.values():
            self._write_at(at, np.ascontiguousarray(array).tobytes())
            at += array.nbytes
        self._file.truncate(self._layout.n_bytes)

    def _write_at(self, at: int, content: bytes | memoryview) -> None:
        left = memoryview(content)
        try:
            self._file.seek(at)
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise LocalsteerError(
                f"{self._part} can't be written ({error.strerror or error}): what is done is kept; make room "
                "and run the same command again."
            ) from error

    def _checksum(self, first: int, last: int) -> int:
        start = len(self._header) + first * self._layout.row_bytes
        left = (last - first) * self._layout.row_bytes
        self._file.seek(start)
        checksum = 0
        while left and (piece := self._file.read(min(left, READ_BYTES))):
            checksum = zlib.crc32(piece, checksum)
            left -= len(piece)
        return checksum


def beside(path: Path) -> tuple[Path, Path]:
    """Where the part and its journal are."""
    return path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.journal")


def check_target(path: Path) -> None:
    """Raise LocalsteerError for a path that is something other than an earlier file of states."""
    if not path.parent.is_dir():
        raise LocalsteerError(f"{path} can't be written: there is no folder {path.parent}.")
    if path.exists() and not is_states(path):
        raise LocalsteerError(f"{path} already exists and holds no states: choose another name.")


def is_states(path: Path) -> bool:
    """Whether `states` wrote this file."""
    with suppress(OSError, ValueError, RecursionError, AttributeError):
        if not path.is_file():
            return False
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length <= MAX_HEADER else {}
        return header.get("__metadata__", {}).get("format") == FORMAT
    return False
