"""llama.cpp as a library: its log, its version, what it was compiled for, and owners for its handles."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import re
import weakref
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import llama_cpp.llama_cpp as lc

from ...errors import LocalsteerError

if TYPE_CHECKING:
    from .model import Model

# Notices for the user; without a handler Python prints warnings to stderr as they are.

# The versions whose graph node names and row order are checked by this release's tests: [first, next).
LLAMA_CPP_VERSIONS = ((0, 3, 36), (0, 3, 37))
MAX_THREADS = 512  # GGML_MAX_N_THREADS


class Log:
    """Keeps llama.cpp quiet, and saves its last error lines for localsteer's messages."""

    ERROR, CONT = 4, 5  # enum ggml_log_level: NONE, DEBUG, INFO, WARN, ERROR, CONT
    KEPT = 8
    SHOWN = 300  # characters

    def __init__(self) -> None:
        self.lines: deque[str] = deque(maxlen=self.KEPT)
        self._level = 0
        self._callback = lc.llama_log_callback(self._on_line)
        self.clear()

    def _on_line(self, level: int, text: bytes | None, _user_data: object) -> None:
        if level != self.CONT:
            self._level = level
        if self._level == self.ERROR and text and text.strip():
            self.lines.append(text.decode("utf-8", "replace").strip())

    def clear(self) -> None:
        """Forget earlier errors, before a call whose errors matter. llama.cpp has one log, so take it over
        again."""
        self.lines.clear()
        lc.llama_log_set(self._callback, ctypes.c_void_p(0))

    def why(self) -> str:
        """The first error line since clear(): llama.cpp reports the cause first, then its consequences. It
        quotes the file's own texts, of any length."""
        if not self.lines:
            return "llama.cpp gives no reason"
        line = re.sub(r"^\w+: ", "", self.lines[0])
        return line if len(line) <= self.SHOWN else f"{line[: self.SHOWN]}..."


log = Log()


def check_version() -> None:
    version = importlib.metadata.version("llama-cpp-python")
    first, after = LLAMA_CPP_VERSIONS
    installed = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
    if not first <= installed < after:
        wanted = ".".join(map(str, first))
        raise LocalsteerError(
            f"llama-cpp-python {version} is installed, localsteer is tested with {wanted}: "
            f"pip install llama-cpp-python=={wanted}"
        )


def text_of(raw: bytes | None) -> str:
    return (raw or b"").decode("utf-8", "replace")


def system_info() -> dict[str, str]:
    """The versions and CPU features that llama.cpp was compiled with, e.g. {"CPU.AVX2": "1"}."""
    info = {"llama-cpp-python": importlib.metadata.version("llama-cpp-python")}
    backend = ""
    for part in text_of(lc.llama_print_system_info()).split("|"):
        left, _, value = part.partition("=")
        head, _, name = left.rpartition(":")
        backend = head.strip() or backend
        if name.strip():
            info[f"{backend}.{name.strip()}"] = value.strip()
    return info


def has_amx(info: str) -> bool:
    """Whether llama_print_system_info() says that AMX kernels are compiled in."""
    return re.search(r"\bAMX_INT8\s*=\s*1\b", info) is not None


def choose_extra_bufts(info: str, asked: bool | None) -> bool:
    """Whether to repack weights. GCC 12 miscompiles llama.cpp's AMX kernels: any prefill crashes.

    Weight repacking uses these kernels, so it stays off if they are compiled in, unless it was asked for. It
    makes prefill up to a third slower, which `localsteer doctor` says, with the remedy.
    """
    return not has_amx(info) if asked is None else asked


def check_threads(n_threads: int | None) -> None:
    """Raise LocalsteerError for more threads than ggml supports, with which it would end the process."""
    if n_threads is not None and not 0 <= n_threads <= MAX_THREADS:
        raise LocalsteerError(f"the number of threads must be 1 to {MAX_THREADS}, not {n_threads}.")


def default_threads() -> int:
    """The number of cores this process may use; above four, half of it, since most machines count a core
    twice."""
    n = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return n if n <= 4 else n // 2


def total_memory() -> float:
    """Bytes of main memory; inf if the system does not say."""
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, OSError, ValueError):
        return float("inf")


class Handle:
    """Owns a native handle: close() and `with` free it, at the latest when Python ends. Use after close
    raises."""

    _free: weakref.finalize
    _pointer: object
    _what = "object"

    @property
    def pointer(self) -> object:
        if not self._free.alive:
            raise LocalsteerError(f"this {self._what} is closed.")
        return self._pointer

    def _depend_on(self, model: Model, free: Callable[..., object], *arguments: object) -> None:
        """Take a handle to be freed by free(*arguments), before the model, in whatever order they are
        closed."""
        # the finalizer keeps the model alive: the garbage collector takes the objects of a cycle in any order
        self._free = weakref.finalize(self, _free_before, model, free, *arguments)
        model._dependents.add(self)

    def close(self) -> None:
        """Free the handle; a second call does nothing."""
        self._free()

    def __enter__(self):
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


def _free_before(_model: Model, free: Callable[..., object], *arguments: object) -> None:
    free(*arguments)
