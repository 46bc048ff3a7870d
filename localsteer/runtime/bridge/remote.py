"""ggml devices for a model on several hosts (runtime/rpc/ has the rest)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as lc

from ...errors import LocalsteerError
from ..rpc.library import built_library

_GPU = 1  # enum ggml_backend_dev_type
_PTR, _TEXT, _SIZE = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t


def devices_of(addresses: Sequence[str]) -> Any:
    """A NULL-terminated array of ggml_backend_dev_t for llama_model_params, to be kept until the model is
    loaded: every device of every server, then the GPUs of this machine.

    addresses: HOST:PORT of servers known to answer; ggml ends the process for others. Raises LocalsteerError
    if the RPC backend has not been built.
    """
    lc.llama_backend_init()
    add_server = _add_server()
    devices: list[int] = []
    for address in addresses:
        registry = add_server(address.encode("ascii"))
        if not registry:
            raise LocalsteerError(f"the rpc host behind {address} has no device to compute with.")
        count = _function("ggml_backend_reg_dev_count", _SIZE, _PTR)(registry)
        device = _function("ggml_backend_reg_dev_get", _PTR, _PTR, _SIZE)
        devices += [device(registry, i) for i in range(count)]
    devices += _own_gpus()
    return (_PTR * (len(devices) + 1))(*devices, None)


def _own_gpus() -> list[int]:
    count = _function("ggml_backend_dev_count", _SIZE)()
    device = _function("ggml_backend_dev_get", _PTR, _SIZE)
    kind = _function("ggml_backend_dev_type", ctypes.c_int, _PTR)
    return [device(i) for i in range(count) if kind(device(i)) == _GPU]


@lru_cache(maxsize=1)
def _add_server() -> Any:
    """ggml_backend_rpc_add_server, from a ggml that was built with RPC, or from the library built beside
    it."""
    prototype = ctypes.CFUNCTYPE(_PTR, _TEXT)
    name = b"ggml_backend_rpc_add_server"
    registry = _function("ggml_backend_reg_by_name", _PTR, _TEXT)(b"RPC")
    if registry:
        return prototype(_function("ggml_backend_reg_get_proc_address", _PTR, _PTR, _TEXT)(registry, name))
    return prototype((name.decode(), _opened(built_library())))


def _opened(path: Path) -> ctypes.CDLL:
    # it names libggml-base as linked, and the loader uses the one that is already in this process
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise LocalsteerError(f"{path} can't be loaded ({error}): `localsteer rpc build --again`.") from None


def _function(name: str, result: Any, *arguments: Any) -> Any:
    """A function of ggml: dlsym on libllama also searches the libraries it was linked with (see hook.py)."""
    return ctypes.CFUNCTYPE(result, *arguments)((name, lc._lib))
