"""Imports llama_cpp in a way that makes its threads yield to other programs.

All threads of a decode meet at a barrier after each operation of the graph, some hundred times per token.
GNU's OpenMP (libgomp), with which llama.cpp is built on Linux, lets early threads spin there for
milliseconds. Beside other busy programs the thread they wait for is often not running at all: they spin on
the core that it needs, and decoding nearly comes to a halt. With a limit they sleep after microseconds.

libgomp reads its settings once, when it is loaded, so this is imported before anything that imports
llama_cpp. A libgomp that another library has already loaded stays as it is (PyTorch brings its own under the
same name, and whichever is loaded first serves both). The user's settings are respected. On macOS and Windows
nothing is set, and nothing has been tested: Apple's compiler has no OpenMP, Microsoft's documents no such
setting.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ...errors import LocalsteerError
from ..broken import why_not_loaded

NOT_INSTALLED = (
    "llama-cpp-python is not installed: pip install llama-cpp-python==0.3.36 (docs/install.md: without a "
    "compiler)."
)
SPIN_COUNT = 1000  # measured: benchmarks/contention.py
SETTINGS = {
    "GOMP_SPINCOUNT": str(SPIN_COUNT),
    # with more threads than cores (a second thread that has decoded once is enough), libgomp spins at most #
    # 100 times, too short to meet at a barrier; under this policy it is 1000
    "OMP_WAIT_POLICY": "active",
}


def is_loaded() -> bool:
    """Whether some library in this process has loaded libgomp."""
    try:
        ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD)
    except (AttributeError, OSError):  # not on Windows; not loaded
        return False
    return True


@contextmanager
def bounded_spinning() -> Iterator[str]:
    """Makes a libgomp that is loaded in this block spin for a limited time. Yields in words what decides
    about it.

    The environment is restored afterwards, since child processes should not inherit the settings.
    """
    if sys.platform != "linux":
        yield "left to the system"
        return
    theirs = [name for name in SETTINGS if name in os.environ]
    if theirs or is_loaded():
        yield f"as {theirs[0]} says" if theirs else "unbounded: libgomp was loaded before localsteer"
        return
    os.environ.update(SETTINGS)
    try:
        yield "bounded"
    finally:
        for name in SETTINGS:
            os.environ.pop(name, None)


with bounded_spinning() as spinning:
    try:
        import llama_cpp.llama_cpp  # noqa: F401
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "llama_cpp":
            raise
        raise LocalsteerError(NOT_INSTALLED) from None
    except (OSError, RuntimeError) as error:
        raise LocalsteerError(why_not_loaded(error)) from None
