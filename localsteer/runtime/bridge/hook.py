"""The native hook (native/eval_callback.cpp) from Python: takes compiled plans, returns captured rows."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import llama_cpp.llama_cpp as lc
import numpy as np

from ...errors import LocalsteerError
from .library import text_of

if TYPE_CHECKING:
    from ...plan import Plan, Program

# compiled (plan, class) pairs that a context keeps before it drops them all and starts again
MAX_ROUTES = 256


class Accessors(ctypes.Structure):
    """Addresses of ggml's exported accessors; must match localsteer_ggml in native/eval_callback.cpp."""

    _fields_ = tuple(
        (name, ctypes.c_void_p)
        for name in (
            "ggml_get_name",
            "ggml_nelements",
            "ggml_nrows",
            "ggml_nbytes",
            "ggml_is_contiguous",
            "ggml_backend_tensor_get",
            "ggml_backend_tensor_set",
        )
    )

    @classmethod
    def of_loaded_library(cls) -> Accessors:
        # dlsym on libllama also searches the libraries it was linked with: the one ggml of this process.
        # Opening libggml by file name could map a second copy: llama-cpp-python installs it under three names
        lib = lc._lib
        if sys.platform == "win32":  # GetProcAddress does not search them; untested
            lib = ctypes.CDLL(str(Path(lc._lib._name).parent / "ggml-base.dll"))
        addresses = {name: ctypes.cast(getattr(lib, name), ctypes.c_void_p) for name, _ in cls._fields_}
        return cls(**addresses)


# fields of a Program, in the order of localsteer_route_program
_ARRAYS = (
    ("readers", np.float32), ("biases", np.float64), ("writers", np.float32), ("normalised", np.uint8),
    ("one_sided", np.uint8), ("caps", np.float32),
)  # fmt: skip
_I32, _PTR = ctypes.c_int32, ctypes.c_void_p
_NATIVE_FUNCTIONS = {
    "localsteer_hook_new": (_PTR, [_PTR, _I32, _I32]),
    "localsteer_hook_free": (None, [_PTR]),
    "localsteer_route_new": (_I32, [_PTR]),
    "localsteer_routes_clear": (None, [_PTR]),
    "localsteer_route_program": (_I32, [_PTR, _I32, _I32, _I32, *[_PTR] * 6, _I32, ctypes.c_double]),
    "localsteer_batch_begin": (_I32, [_PTR, _I32, _PTR, _PTR, _PTR, _PTR]),
    "localsteer_batch_end": (_I32, [_PTR]),
    "localsteer_error": (ctypes.c_char_p, [_PTR]),
    "localsteer_layer_status": (_I32, [_PTR, _I32]),
    "localsteer_captured": (ctypes.c_int64, [_PTR, _I32, ctypes.POINTER(_PTR)]),
}


def load_native() -> ctypes.CDLL:
    """The native library; LOCALSTEER_NATIVE names another build, such as that of native/sanitize.sh."""
    suffix = ".dll" if sys.platform == "win32" else ".so"
    package = sys.modules[__package__.partition(".")[0]]
    # an editable install spreads the package over two folders
    paths = [Path(root) / "_native" / f"liblocalsteer_native{suffix}" for root in package.__path__]
    path = os.environ.get("LOCALSTEER_NATIVE") or next((path for path in paths if path.exists()), None)
    if path is None:
        raise LocalsteerError(
            "localsteer's native library is not built here: run `pip install .` and start Python outside the "
            "checkout."
        )
    try:
        lib = ctypes.CDLL(str(path))
    except OSError as error:
        raise LocalsteerError(f"localsteer's native library {path} can't be loaded: {error}.") from None
    for name, (result, arguments) in _NATIVE_FUNCTIONS.items():
        getattr(lib, name).restype, getattr(lib, name).argtypes = result, arguments
    return lib


def _address(array: np.ndarray | None) -> int | None:
    return None if array is None else array.ctypes.data


class Hook:
    """Owns one native hook: compiled plans, the route of each token of the batch, what was captured."""

    DONE = 1  # layer_status in native/eval_callback.cpp

    def __init__(self, n_layer: int, n_embd: int) -> None:
        self.n_layer, self.n_embd = n_layer, n_embd
        self._lib = load_native()
        accessors = Accessors.of_loaded_library()
        self._pointer = self._lib.localsteer_hook_new(ctypes.addressof(accessors), n_layer, n_embd)
        if not self._pointer:
            raise MemoryError("no memory for the steering hook")
        self._routes: dict[tuple[bytes, int], int] = {}

    @property
    def callback(self) -> object:
        address = ctypes.cast(self._lib.localsteer_eval_callback, ctypes.c_void_p).value
        return lc.ggml_backend_sched_eval_callback(address)

    @property
    def pointer(self) -> int:
        return self._pointer

    def close(self) -> None:
        self._lib.localsteer_hook_free(self._pointer)
        self._pointer = None

    def error(self) -> str:
        return text_of(self._lib.localsteer_error(self._pointer))

    def routes(self, plans: Sequence[Plan | None], classes: Sequence[int]) -> np.ndarray:
        """The compiled route of each token, (n_tokens,) int32; -1 means not steered."""
        if len(self._routes) > MAX_ROUTES:
            self._lib.localsteer_routes_clear(self._pointer)
            self._routes.clear()
        # a batch has few different plans, so plans are hashed only once for each (plan object, class)
        known: dict[tuple[int, int], int] = {}
        result = np.full(len(plans), -1, dtype=np.int32)
        for i, (plan, cls) in enumerate(zip(plans, classes, strict=True)):
            if plan is None:
                continue
            where = (id(plan), int(cls))
            if where not in known:
                known[where] = self._route(plan, int(cls))
            result[i] = known[where]
        return result

    def _route(self, plan: Plan, cls: int) -> int:
        key = (plan.key, cls)
        if key not in self._routes:
            self._routes[key] = self._compile(plan, cls)
        return self._routes[key]

    def _compile(self, plan: Plan, cls: int) -> int:
        programs = {layer: plan.program(layer, cls) for layer in plan.layers}
        programs = {layer: program for layer, program in programs.items() if program is not None}
        if not programs:
            return -1
        route = self._lib.localsteer_route_new(self._pointer)
        for layer, program in programs.items():
            self._add_program(route, layer, program)
        return route

    def _add_program(self, route: int, layer: int, program: Program) -> None:
        # kept in a local until the native side has copied it
        held = [np.ascontiguousarray(getattr(program, name), dtype) for name, dtype in _ARRAYS]
        arrays = [_address(array) for array in held]
        n_rows, n_solved, ridge = len(program.biases), program.n_solved, float(program.ridge)
        if self._lib.localsteer_route_program(self._pointer, route, layer, n_rows, *arrays, n_solved, ridge):
            raise LocalsteerError(f"the plan can't be compiled: {self.error()}.")

    def begin(
        self,
        outputs: np.ndarray,
        routes: np.ndarray | None,
        layers: Sequence[int],
        capture_tokens: np.ndarray | None,
    ) -> None:
        capture = np.zeros(self.n_layer, dtype=np.uint8)
        capture[list(layers)] = 1
        arrays = [_address(array) for array in (routes, outputs, capture, capture_tokens)]
        if self._lib.localsteer_batch_begin(self._pointer, len(outputs), *arrays):
            raise LocalsteerError(f"the steering hook is not ready: {self.error()}.")

    def end(self) -> bool:
        return self._lib.localsteer_batch_end(self._pointer) == 0

    def fired(self, layer: int) -> bool:
        return self._lib.localsteer_layer_status(self._pointer, layer) == self.DONE

    def captured(self, layer: int) -> np.ndarray:
        """A copy of the rows recorded at a layer: (n_rows, n_embd) float32."""
        data = ctypes.c_void_p()
        n_rows = self._lib.localsteer_captured(self._pointer, layer, ctypes.byref(data))
        if n_rows == 0:
            return np.zeros((0, self.n_embd), dtype=np.float32)
        floats = ctypes.cast(data, ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(floats, shape=(n_rows, self.n_embd)).copy()
