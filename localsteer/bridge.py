"""The only module that touches llama.cpp (through llama-cpp-python's C bindings) and native pointers.

Owners: `Model` owns a llama_model, `Context` a llama_context with its steering hook, `Sampler` a chain of
samplers. Each has close() and `with`; a context is freed before its model whatever the order of the calls.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import os
import re
import sys
import tempfile
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import llama_cpp.llama_cpp as lc
import numpy as np

from .errors import LocalsteerError, MismatchError, ModelFileError, PromptError, UnsupportedModelError

if TYPE_CHECKING:
    from .plan import Plan

# The versions whose graph node names and row order the tests of this release have checked: [first, next).
LLAMA_CPP_VERSIONS = ((0, 3, 36), (0, 3, 37))
DEFAULT_N_CTX = 4096
MAX_ROUTES = 256  # compiled (plan, class) pairs kept by a context before all are dropped and rebuilt


# --- llama.cpp as a library --------------------------------------------------------------------------------


class _Log:
    """Keeps llama.cpp quiet, and its last error lines for our own messages."""

    ERROR, CONT = 4, 5  # enum ggml_log_level: NONE, DEBUG, INFO, WARN, ERROR, CONT
    KEPT = 8

    def __init__(self) -> None:
        self.lines: deque[str] = deque(maxlen=self.KEPT)
        self._level = 0
        self._callback = lc.llama_log_callback(self._on_line)
        lc.llama_log_set(self._callback, ctypes.c_void_p(0))

    def _on_line(self, level: int, text: bytes | None, _user_data: object) -> None:
        if level != self.CONT:
            self._level = level
        if self._level == self.ERROR and text and text.strip():
            self.lines.append(text.decode("utf-8", "replace").strip())

    def clear(self) -> None:
        self.lines.clear()

    def why(self) -> str:
        """The first error line since clear(): llama.cpp reports the cause first, then who gave up on it."""
        return re.sub(r"^\w+: ", "", self.lines[0]) if self.lines else "llama.cpp gives no reason"


_log = _Log()


def _check_version() -> None:
    version = importlib.metadata.version("llama-cpp-python")
    first, after = LLAMA_CPP_VERSIONS
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
    if not first <= found < after:
        wanted = ".".join(map(str, first))
        raise LocalsteerError(
            f"llama-cpp-python {version} is installed, localsteer is tested with {wanted}: "
            f"pip install llama-cpp-python=={wanted}"
        )


def _text(raw: bytes | None) -> str:
    return (raw or b"").decode("utf-8", "replace")


def system_info() -> dict[str, str]:
    """Versions and CPU features that llama.cpp was compiled with, e.g. {"CPU.AVX2": "1"}."""
    info = {"llama-cpp-python": importlib.metadata.version("llama-cpp-python")}
    backend = ""
    for part in _text(lc.llama_print_system_info()).split("|"):
        left, _, value = part.partition("=")
        head, _, name = left.rpartition(":")
        backend = head.strip() or backend
        if name.strip():
            info[f"{backend}.{name.strip()}"] = value.strip()
    return info


def has_amx(info: str) -> bool:
    """Whether llama_print_system_info() says that AMX kernels are compiled in."""
    return re.search(r"\bAMX_INT8\s*=\s*1\b", info) is not None


def choose_extra_bufts(info: str, asked: bool | None) -> tuple[bool, str | None]:
    """(use_extra_bufts, notice). GCC 12 miscompiles llama.cpp's AMX kernels: any prefill kills it.

    Weight repacking brings those kernels in, so it stays off where they are compiled in and nobody asked.
    """
    if asked is not None or not has_amx(info):
        return (True if asked is None else asked), None
    return False, (
        "localsteer: this llama.cpp has AMX kernels, which crash if GCC 12 compiled them: weight repacking "
        "is off (up to a third slower prefill); `localsteer doctor` tells how to build for full speed."
    )


_notices: set[str] = set()


def _notice_once(text: str | None) -> None:
    if text and text not in _notices:
        _notices.add(text)
        print(text, file=sys.stderr)


def default_threads() -> int:
    """Cores this process may use; half of them above four, where most machines count each core twice."""
    n = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return n if n <= 4 else n // 2


# --- the native hook ---------------------------------------------------------------------------------------


class _Accessors(ctypes.Structure):
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
    def of_loaded_library(cls) -> _Accessors:
        # dlsym on libllama also searches the libraries it was linked with: the one ggml of this process.
        # Opening libggml by file name could map a second one, llama-cpp-python installs it under three names
        lib = lc._lib
        if sys.platform == "win32":  # GetProcAddress does not; untested
            lib = ctypes.CDLL(str(Path(lc._lib._name).parent / "ggml-base.dll"))
        found = {name: ctypes.cast(getattr(lib, name), ctypes.c_void_p) for name, _ in cls._fields_}
        return cls(**found)


_I32, _PTR = ctypes.c_int32, ctypes.c_void_p
_NATIVE_FUNCTIONS = {
    "localsteer_hook_new": (_PTR, [_PTR, _I32, _I32]),
    "localsteer_hook_free": (None, [_PTR]),
    "localsteer_route_new": (_I32, [_PTR]),
    "localsteer_routes_clear": (None, [_PTR]),
    "localsteer_route_program": (_I32, [_PTR, _I32, _I32, _I32, *[_PTR] * 5, ctypes.c_double, _PTR]),
    "localsteer_batch_begin": (_I32, [_PTR, _I32, _PTR, _PTR, _PTR, _PTR]),
    "localsteer_batch_end": (_I32, [_PTR]),
    "localsteer_error": (ctypes.c_char_p, [_PTR]),
    "localsteer_block_status": (_I32, [_PTR, _I32]),
    "localsteer_captured": (ctypes.c_int64, [_PTR, _I32, ctypes.POINTER(_PTR)]),
}


def _load_native() -> ctypes.CDLL:
    suffix = ".dll" if sys.platform == "win32" else ".so"
    package = sys.modules[__package__]
    # an editable install spreads the package over two folders
    for root in package.__path__:
        path = Path(root) / "_native" / f"liblocalsteer_native{suffix}"
        if path.exists():
            lib = ctypes.CDLL(str(path))
            for name, (result, arguments) in _NATIVE_FUNCTIONS.items():
                getattr(lib, name).restype, getattr(lib, name).argtypes = result, arguments
            return lib
    raise LocalsteerError(
        "localsteer's native library is not built here: run `pip install .` and start Python outside the "
        "checkout."
    )


def _address(array: np.ndarray | None) -> int | None:
    return None if array is None else array.ctypes.data


class _Hook:
    """Owner of one native hook: compiled plans, what each token of the batch gets, what was captured."""

    DONE = 1  # block_status in native/eval_callback.cpp

    def __init__(self, n_layer: int, n_embd: int) -> None:
        self.n_layer, self.n_embd = n_layer, n_embd
        self._lib = _load_native()
        accessors = _Accessors.of_loaded_library()
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
        return _text(self._lib.localsteer_error(self._pointer))

    def routes(self, plans: Sequence[Plan | None], classes: Sequence[int]) -> np.ndarray:
        """The compiled route of each token, -1 = left alone. (n_tokens,) int32."""
        if len(self._routes) > MAX_ROUTES:
            self._lib.localsteer_routes_clear(self._pointer)
            self._routes.clear()
        # a batch holds few different plans: go through Python's hashing once for each (plan object, class)
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

    def _add_program(self, route: int, layer: int, program: object) -> None:
        # held in locals: the native side copies, but not before the call
        units = np.ascontiguousarray(program.units, dtype=np.float32)
        targets = np.ascontiguousarray(program.targets, dtype=np.float64)
        strengths = np.ascontiguousarray(program.strengths, dtype=np.float64)
        one_sided = np.ascontiguousarray(program.one_sided, dtype=np.uint8)
        caps = np.ascontiguousarray(program.caps, dtype=np.float32)
        offset = None if program.offset is None else np.ascontiguousarray(program.offset, dtype=np.float32)
        arrays = [_address(array) for array in (units, targets, strengths, one_sided, caps)]
        if self._lib.localsteer_route_program(
            self._pointer, route, layer, len(targets), *arrays, float(program.ridge), _address(offset)
        ):
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
        return self._lib.localsteer_block_status(self._pointer, layer) == self.DONE

    def captured(self, layer: int) -> np.ndarray:
        """A copy of the rows recorded at a block: (n_rows, n_embd) float32."""
        data = ctypes.c_void_p()
        n_rows = self._lib.localsteer_captured(self._pointer, layer, ctypes.byref(data))
        if n_rows == 0:
            return np.zeros((0, self.n_embd), dtype=np.float32)
        floats = ctypes.cast(data, ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(floats, shape=(n_rows, self.n_embd)).copy()


# --- model -------------------------------------------------------------------------------------------------


class _Handle:
    """close(), `with`, and freeing at the latest when Python ends; use after close raises."""

    _free: weakref.finalize
    _pointer: object
    _what = "object"

    @property
    def pointer(self) -> object:
        if not self._free.alive:
            raise LocalsteerError(f"this {self._what} is closed.")
        return self._pointer

    def close(self) -> None:
        """Free it; a second call does nothing."""
        self._free()

    def __enter__(self):
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


class Model(_Handle):
    """A GGUF model. Raises ModelFileError for a file that is missing, truncated, or no model."""

    _what = "model"

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        n_gpu_layers: int = 0,
        use_extra_bufts: bool | None = None,
        on_progress: Callable[[float], None] | None = None,
    ) -> None:
        _check_version()
        self.path = Path(path)
        _check_gguf(self.path)
        lc.llama_backend_init()
        extra_bufts, notice = choose_extra_bufts(_text(lc.llama_print_system_info()), use_extra_bufts)
        _notice_once(notice)
        params = lc.llama_model_default_params()
        params.n_gpu_layers = n_gpu_layers
        params.use_extra_bufts = extra_bufts
        progress = lc.llama_progress_callback(lambda part, _: on_progress(part) is not False)
        if on_progress is not None:
            params.progress_callback = progress
        _log.clear()
        self._pointer = lc.llama_model_load_from_file(os.fsencode(self.path), params)
        if not self._pointer:
            raise ModelFileError(f"{self.path} can't be loaded: {_log.why()}.")
        self._free = weakref.finalize(self, lc.llama_model_free, self._pointer)
        self._dependents: weakref.WeakSet[_Handle] = weakref.WeakSet()
        self._read_shape()
        self.metadata = self._read_metadata()
        self.architecture = self.metadata.get("general.architecture", "")

    def _read_shape(self) -> None:
        vocab = self._vocab = lc.llama_model_get_vocab(self._pointer)
        self.n_layer = lc.llama_model_n_layer(self._pointer)
        self.n_embd = lc.llama_model_n_embd(self._pointer)
        self.n_ctx_train = lc.llama_model_n_ctx_train(self._pointer)
        self.n_vocab = lc.llama_vocab_n_tokens(vocab)
        self.bos: int = lc.llama_vocab_bos(vocab)  # -1: none
        self.eos: int = lc.llama_vocab_eos(vocab)
        self.add_bos = bool(lc.llama_vocab_get_add_bos(vocab))
        # -1 = no rotary embedding: a table of n_ctx_train positions, and reading past its end aborts
        self.has_position_table = lc.llama_model_rope_type(self._pointer) == lc.LLAMA_ROPE_TYPE_NONE

    def _read_metadata(self) -> dict[str, str]:
        """GGUF key-values as llama.cpp prints them; long arrays are cut short by it."""
        count = lc.llama_model_meta_count(self._pointer)
        return {
            self._sized_text(lc.llama_model_meta_key_by_index, i): self._sized_text(
                lc.llama_model_meta_val_str_by_index, i
            )
            for i in range(count)
        }

    def _sized_text(self, function: Callable, index: int, size: int = 256) -> str:
        buffer = ctypes.create_string_buffer(size)
        needed = function(self._pointer, index, buffer, size)
        if needed >= size:
            return self._sized_text(function, index, needed + 1)
        return _text(buffer.value)

    @property
    def chat_template(self) -> str | None:
        template = lc.llama_model_chat_template(self.pointer, None)
        return _text(template) if template else None

    @property
    def vocab(self) -> object:
        return self.pointer and self._vocab

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """add_special: BOS and the like as the model wants them; off for text from a chat template."""
        try:
            raw = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise PromptError(
                f"the text holds {text[error.start]!r}, which is no Unicode character."
            ) from None
        size = len(raw) + 8
        while True:
            buffer = (lc.llama_token * size)()
            n = lc.llama_tokenize(self.vocab, raw, len(raw), buffer, size, add_special, parse_special)
            if n >= 0:
                return buffer[:n]
            size = -n

    def token_to_piece(self, token: int, *, special: bool = False) -> bytes:
        """Bytes, not text: one token may hold part of a character. special: render control tokens too."""
        self._check_token(token)
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = lc.llama_token_to_piece(self.vocab, token, buffer, size, 0, special)
            if n >= 0:
                return buffer.raw[:n]
            size = -n

    def is_eog(self, token: int) -> bool:
        """Whether a token ends the reply (EOS, end of turn, ...)."""
        self._check_token(token)
        return bool(lc.llama_vocab_is_eog(self.vocab, token))

    def _check_token(self, token: int) -> None:
        if not 0 <= token < self.n_vocab:
            raise PromptError(f"token {token} is outside the vocabulary of {self.n_vocab} tokens.")

    def why_not_steerable(self, n_seq_max: int) -> str | None:
        """A reason of the whole architecture, before any block is tried."""
        if n_seq_max > 1 and lc.llama_model_is_hybrid(self.pointer):
            return "hybrid models mix the rows of several sequences: use one sequence at a time"
        if n_seq_max > 1 and lc.llama_model_is_recurrent(self.pointer):
            return "recurrent models mix the rows of several sequences: use one sequence at a time"
        if lc.llama_model_is_diffusion(self.pointer):
            return "a diffusion model has no last prompt token"
        return None

    def close(self) -> None:
        for dependent in list(self._dependents):
            dependent.close()
        super().close()


def _check_gguf(path: Path) -> None:
    """llama.cpp's own messages for these are about its internals."""
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ModelFileError(f"{path} can't be read: {error.strerror or error}.") from None
    if magic != b"GGUF":
        raise ModelFileError(f"{path} is not a GGUF file: give a model in llama.cpp's format.")


# --- context -----------------------------------------------------------------------------------------------


class _Batch:
    """A llama_batch over numpy arrays that Python owns."""

    def __init__(self, size: int) -> None:
        self.tokens = np.zeros(size, dtype=np.int32)
        self.positions = np.zeros(size, dtype=np.int32)
        self.seq_ids = np.zeros(size, dtype=np.int32)
        self.outputs = np.zeros(size, dtype=np.int8)
        self._n_seq_ids = np.ones(size, dtype=np.int32)
        self._seq_pointers = self.seq_ids.ctypes.data + 4 * np.arange(size, dtype=np.uintp)

    def filled(self, tokens, positions, seq_ids, outputs) -> lc.llama_batch:
        n = len(tokens)
        self.tokens[:n], self.positions[:n] = tokens, positions
        self.seq_ids[:n], self.outputs[:n] = seq_ids, outputs
        batch = lc.llama_batch(n_tokens=n)
        batch.token = _pointer_to(self.tokens, lc.llama_token)
        batch.pos = _pointer_to(self.positions, lc.llama_pos)
        batch.n_seq_id = _pointer_to(self._n_seq_ids, ctypes.c_int32)
        batch.seq_id = _pointer_to(self._seq_pointers, ctypes.POINTER(lc.llama_seq_id))
        batch.logits = _pointer_to(self.outputs, ctypes.c_int8)
        return batch


def _pointer_to(array: np.ndarray, ctype: type) -> object:
    return ctypes.cast(array.ctypes.data, ctypes.POINTER(ctype))


class Rows:
    """What one decode gave. states: {block: (n_tokens, n_embd) float32}, taken after steering.

    In the last block only tokens with outputs have rows.
    """

    def __init__(self, context: Context, n_outputs: int, states: dict[int, np.ndarray]) -> None:
        self.states = states
        self.n_outputs = n_outputs
        self._context = context
        self._n_decodes = context.n_decodes
        self._logits: np.ndarray | None = None

    @property
    def logits(self) -> np.ndarray:
        """(n_outputs, n_vocab) float32, copied at the first use, which must come before the next decode."""
        if self._logits is None:
            if self._n_decodes != self._context.n_decodes:
                raise LocalsteerError(
                    "the logits of an earlier decode are gone: read them before the next one."
                )
            self._logits = self._context.all_logits().copy()
        return self._logits


class Context(_Handle):
    """A llama_context whose graph can be steered and read, token by token.

    The cache is unified and a decode never exceeds one micro-batch: then the k-th row of every block is the
    k-th token of the batch (in the last block: the k-th output), which the hook relies on and checks.
    exact: F32 cache and no flash attention, for comparisons; slower.
    n_ctx: cells shared by all sequences. Raises UnsupportedModelError for models that do not generate text.
    """

    _what = "context"

    def __init__(
        self,
        model: Model,
        *,
        n_ctx: int | None = None,
        n_seq_max: int = 1,
        n_batch: int = 512,
        n_threads: int | None = None,
        exact: bool = False,
        steering: bool = True,
    ) -> None:
        self.model = model
        self.n_ctx = _context_size(model, n_ctx)
        self.n_batch = min(n_batch, self.n_ctx)
        self.n_seq_max = n_seq_max
        self.n_decodes = 0
        self._outputs = np.zeros(0, dtype=np.int64)  # batch index of each output row
        if lc.llama_model_has_encoder(model.pointer) or not lc.llama_model_has_decoder(model.pointer):
            raise UnsupportedModelError(
                f"{model.path.name} ({model.architecture}) is not a decoder-only model."
            )
        self._hook = _Hook(model.n_layer, model.n_embd) if steering else None
        params = self._params(n_threads or default_threads(), exact)
        _log.clear()
        self._pointer = lc.llama_init_from_model(model.pointer, params)
        if not self._pointer:
            if self._hook:
                self._hook.close()
            raise LocalsteerError(
                f"no context of {self.n_ctx} tokens for {model.path.name}: {_log.why()}. Try a smaller one."
            )
        self._free = weakref.finalize(self, _free_context, self._pointer, self._hook)
        model._dependents.add(self)
        self._memory = lc.llama_get_memory(self._pointer)
        self._batch = _Batch(self.n_batch)
        self._steerable, self._why_not = self._try_blocks() if steering else (frozenset(), "steering is off")

    def _params(self, n_threads: int, exact: bool) -> lc.llama_context_params:
        params = lc.llama_context_default_params()
        params.n_ctx = self.n_ctx
        params.n_batch = params.n_ubatch = self.n_batch
        params.n_seq_max = self.n_seq_max
        params.n_threads = params.n_threads_batch = n_threads
        params.kv_unified = True
        # the small sliding-window cache forgets what a shared prefix needs, and falls back to permuted rows
        params.swa_full = True
        params.no_perf = True
        if exact:
            params.type_k = params.type_v = lc.GGML_TYPE_F32
            params.flash_attn_type = lc.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if self._hook:
            params.cb_eval = self._hook.callback
            params.cb_eval_user_data = self._hook.pointer
        return params

    # -- steering --

    def _try_blocks(self) -> tuple[frozenset[int], str]:
        """Decode three tokens with all blocks wanted, and see at which of them the hook finds its rows."""
        why = self.model.why_not_steerable(self.n_seq_max)
        if why:
            return frozenset(), why
        n = min(3, self.n_batch)
        outputs = np.arange(n) == n - 1
        self._hook.begin(outputs.astype(np.uint8), None, range(self.model.n_layer), None)
        try:
            self._llama_decode(np.full(n, max(self.model.bos, 0)), np.arange(n), np.zeros(n), outputs)
        finally:
            self._hook.end()
            self.clear()
        blocks = frozenset(il for il in range(self.model.n_layer) if self._hook.fired(il))
        return blocks, self._hook.error()

    def probe(self, layers: Sequence[int] | None = None) -> set[int]:
        """The blocks where the hook is proven to find its rows; raises if one of `layers` is not among them.

        Raises UnsupportedModelError with the reason, MismatchError for a block that the model lacks.
        """
        self._check_blocks(layers or ())
        return set(self._steerable)

    def _check_blocks(self, layers: Sequence[int]) -> None:
        for layer in layers:
            if layer in self._steerable:
                continue
            if not 0 <= layer < self.model.n_layer:
                raise MismatchError(
                    f"block {layer} does not exist: {self.model.path.name} has {self.model.n_layer} blocks, "
                    f"0 to {self.model.n_layer - 1}."
                )
            raise UnsupportedModelError(
                f"{self.model.path.name} ({self.model.architecture}) can't be steered at block {layer}: "
                f"{self._why_not}."
            )

    def _check_plan(self, plan: Plan) -> None:
        if plan.is_empty:
            return
        if plan.n_embd != self.model.n_embd:
            raise MismatchError(
                f"the vector is {plan.n_embd} wide but {self.model.path.name} is {self.model.n_embd} wide: "
                "extract the vector from this model."
            )
        self._check_blocks(plan.layers)

    # -- decoding --

    def decode(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        seq_ids: Sequence[int],
        outputs: Sequence[bool],
        plans: Sequence[Plan | None] | None = None,
        classes: Sequence[int] | None = None,
        capture: Sequence[int] | None = None,
        capture_tokens: Sequence[bool] | None = None,
    ) -> Rows:
        """Run one batch; after an error in here the cache holds rows that can't be trusted: clear them.

        All arguments but `capture` have one entry per token. plans: what steers each token, None = nothing.
        classes: its PositionClass, needed with plans. capture: blocks to record, for the tokens of
        capture_tokens (all by default); in the last block, those of them with outputs.
        Raises PromptError (context full, token out of range), MismatchError, UnsupportedModelError.
        """
        tokens, positions, seq_ids = (np.asarray(a, dtype=np.int64) for a in (tokens, positions, seq_ids))
        outputs = np.asarray(outputs, dtype=bool)
        self._check_batch(tokens, positions, seq_ids, outputs)
        plans = plans if plans is not None and any(plan is not None for plan in plans) else None
        capture = sorted(set(capture or ()))
        if plans is None and not capture:
            self._llama_decode(tokens, positions, seq_ids, outputs)
            return Rows(self, int(outputs.sum()), {})
        mask = (
            np.ones(len(outputs), dtype=bool) if capture_tokens is None else np.asarray(capture_tokens, bool)
        )
        self._begin(plans, classes, outputs, capture, mask)
        trusted = False
        try:
            self._llama_decode(tokens, positions, seq_ids, outputs)
        finally:
            trusted = self._hook.end()
        if not trusted:
            raise UnsupportedModelError(f"{self.model.path.name}: steering failed: {self._hook.error()}.")
        states = {layer: self._captured(layer, outputs, mask) for layer in capture}
        return Rows(self, int(outputs.sum()), states)

    def _begin(self, plans, classes, outputs: np.ndarray, capture: Sequence[int], mask: np.ndarray) -> None:
        self._check_blocks(capture)
        routes = None
        if plans is not None:
            for plan in {id(plan): plan for plan in plans if plan is not None}.values():
                self._check_plan(plan)
            if classes is None or len(classes) != len(outputs) or len(plans) != len(outputs):
                raise LocalsteerError("plans and classes need one entry per token.")
            routes = self._hook.routes(plans, classes) if self._hook else None
        if self._hook:
            self._hook.begin(outputs.astype(np.uint8), routes, capture, mask.astype(np.uint8))

    def _captured(self, layer: int, outputs: np.ndarray, mask: np.ndarray) -> np.ndarray:
        rows = self._hook.captured(layer)
        # an architecture that keeps all rows to the end answers like the others
        if layer == self.model.n_layer - 1 and len(rows) == mask.sum():
            rows = rows[outputs[mask]]
        return rows

    def _check_batch(self, tokens, positions, seq_ids, outputs) -> None:
        n = len(tokens)
        if not 1 <= n <= self.n_batch:
            raise PromptError(f"a batch of {n} tokens: between 1 and {self.n_batch} are possible.")
        if not len(positions) == len(seq_ids) == len(outputs) == n:
            raise LocalsteerError("tokens, positions, seq_ids and outputs need one entry per token.")
        self.model._check_token(int(tokens.min()))
        self.model._check_token(int(tokens.max()))
        self._check_seq(int(seq_ids.min()))
        self._check_seq(int(seq_ids.max()))
        if not 0 <= positions.min() <= positions.max() < self.n_ctx:
            raise PromptError(
                f"positions {positions.min()} to {positions.max()} do not fit into a context of {self.n_ctx} "
                "tokens: shorten the prompt or ask for a larger context."
            )

    def _check_seq(self, seq: int) -> None:
        # llama.cpp ends the process for a sequence that it does not have
        if not 0 <= seq < self.n_seq_max:
            raise LocalsteerError(f"sequence {seq} does not exist: this context has {self.n_seq_max}.")

    def _llama_decode(self, tokens, positions, seq_ids, outputs) -> None:
        _log.clear()
        batch = self._batch.filled(tokens, positions, seq_ids, outputs)
        self.n_decodes += 1
        self._outputs = np.zeros(0, dtype=np.int64)
        status = lc.llama_decode(self.pointer, batch)
        if status == 1:
            raise PromptError(
                f"the context of {self.n_ctx} tokens is full: shorten the prompt or enlarge it."
            )
        if status != 0:
            raise LocalsteerError(f"llama.cpp could not decode a batch (status {status}): {_log.why()}.")
        self._outputs = np.flatnonzero(outputs)

    def all_logits(self) -> np.ndarray:
        """(n_outputs, n_vocab) float32: a view that the next decode overwrites."""
        shape = (len(self._outputs), self.model.n_vocab)
        if shape[0] == 0:
            return np.zeros(shape, dtype=np.float32)
        return np.ctypeslib.as_array(lc.llama_get_logits(self.pointer), shape=shape)

    def logits(self, i: int) -> np.ndarray:
        """Output row i (negative: from the end) of the last decode; a view that the next one overwrites."""
        return self.all_logits()[i]

    # -- the cache; sequences are 0 to n_seq_max - 1, p1 = -1 means to the end --

    def clear(self) -> None:
        lc.llama_memory_clear(self._live_memory(), True)

    def seq_rm(self, seq: int, p0: int = 0, p1: int = -1) -> bool:
        """Forget positions [p0, p1) of a sequence; False where a model's cache can't forget a part."""
        self._check_seq(seq)
        return bool(lc.llama_memory_seq_rm(self._live_memory(), seq, p0, p1))

    def seq_cp(self, src: int, dst: int, p0: int = 0, p1: int = -1) -> None:
        """Share positions [p0, p1) of src with dst, without copying them."""
        self._check_seq(src)
        self._check_seq(dst)
        lc.llama_memory_seq_cp(self._live_memory(), src, dst, p0, p1)

    def _live_memory(self) -> object:
        return self.pointer and self._memory


def _context_size(model: Model, n_ctx: int | None) -> int:
    n_ctx = min(model.n_ctx_train, DEFAULT_N_CTX) if n_ctx is None else n_ctx
    if n_ctx < 1:
        raise PromptError(f"a context of {n_ctx} tokens is not possible: ask for at least 1.")
    return min(n_ctx, model.n_ctx_train) if model.has_position_table else n_ctx


def _free_context(pointer: object, hook: _Hook | None) -> None:
    lc.llama_free(pointer)
    if hook:
        hook.close()  # after the context, which may call it until the end


# --- sampling ----------------------------------------------------------------------------------------------


class _Kept:
    text = ""


@contextlib.contextmanager
def _stderr_kept() -> Iterator[_Kept]:
    """llama.cpp's grammar parser prints its errors past its own log: catch descriptor 2 meanwhile."""
    kept = _Kept()
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file:
        before = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield kept
        finally:
            os.dup2(before, 2)
            os.close(before)
            file.seek(0)
            kept.text = file.read().decode("utf-8", "replace")


class Sampler(_Handle):
    """Penalties, top-k, top-p, min-p, temperature, then one draw, in llama.cpp's order; temp <= 0 is greedy.

    grammar: GBNF text; tokens that it forbids are never drawn. seed: None draws one.
    """

    _what = "sampler"

    def __init__(
        self,
        model: Model,
        *,
        temp: float = 0.8,
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.05,
        repeat_penalty: float = 1.0,
        repeat_last_n: int = 64,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        seed: int | None = None,
        grammar: str | None = None,
    ) -> None:
        self._candidates = _Candidates(model.n_vocab)
        penalties = (repeat_last_n, repeat_penalty, frequency_penalty, presence_penalty)
        stages = [self._grammar(model, grammar)] if grammar is not None else []
        self._has_grammar = bool(stages)
        if repeat_last_n != 0 and penalties[1:] != (1.0, 0.0, 0.0):
            stages.append(lc.llama_sampler_init_penalties(model.n_vocab, *penalties))
        if temp <= 0:
            stages.append(lc.llama_sampler_init_greedy())
        else:
            seed = lc.LLAMA_DEFAULT_SEED if seed is None else seed % 2**32
            stages += [
                lc.llama_sampler_init_top_k(top_k),
                lc.llama_sampler_init_top_p(top_p, 1),
                lc.llama_sampler_init_min_p(min_p, 1),
                lc.llama_sampler_init_temp(temp),
                lc.llama_sampler_init_dist(seed),
            ]
        self._pointer = lc.llama_sampler_chain_init(lc.llama_sampler_chain_default_params())
        for stage in stages:
            lc.llama_sampler_chain_add(self._pointer, stage)
        self._free = weakref.finalize(self, lc.llama_sampler_free, self._pointer)
        model._dependents.add(self)

    @staticmethod
    def _grammar(model: Model, text: str) -> object:
        _log.clear()
        with _stderr_kept() as kept:
            stage = lc.llama_sampler_init_grammar(model.vocab, text.encode("utf-8"), b"root")
        # an empty text would give a stage that allows everything
        if not stage or not text.strip():
            why = re.search(r"error parsing grammar: (.*)", kept.text)
            raise LocalsteerError(f"the grammar can't be parsed: {why[1] if why else _log.why()}.")
        return stage

    def sample(self, context: Context, i: int = -1) -> int:
        """Draw from output row i of the last decode, and remember the token for penalties and grammar."""
        logits = context.logits(i)
        if not np.isfinite(logits.max()):
            raise LocalsteerError("the model gave no finite logits: lower the strength of the steering.")
        token = self._candidates.choose(self.pointer, logits)
        lc.llama_sampler_accept(self.pointer, token)
        return token


class _Candidates:
    """The llama_token_data_array of one vocabulary, reused for every draw."""

    def __init__(self, n_vocab: int) -> None:
        self._data = np.zeros(n_vocab, dtype=[("id", np.int32), ("logit", np.float32), ("p", np.float32)])
        self._ids = np.arange(n_vocab, dtype=np.int32)

    def choose(self, sampler: object, logits: np.ndarray) -> int:
        self._data["id"], self._data["logit"], self._data["p"] = self._ids, logits, 0.0
        array = lc.llama_token_data_array(
            data=ctypes.cast(self._data.ctypes.data, lc.llama_token_data_p),
            size=len(self._data),
            selected=-1,
            sorted=False,
        )
        lc.llama_sampler_apply(sampler, ctypes.byref(array))
        chosen = array.data[array.selected] if 0 <= array.selected < array.size else None
        # accepting a token that the grammar forbids would end the process
        if chosen is None or not np.isfinite(chosen.logit):
            raise LocalsteerError("the grammar allows no token here.")
        return int(chosen.id)


# --- quantizing --------------------------------------------------------------------------------------------


def quantization_types() -> dict[str, int]:
    """{"Q4_K_M": 15, ...}: the names that quantize() takes."""
    names = {}
    for attribute in dir(lc):
        match = re.fullmatch(r"LLAMA_FTYPE_(?:MOSTLY|ALL)_(\w+)", attribute)
        if match:
            names[match[1]] = getattr(lc, attribute)
    return names


def quantize(
    src: str | os.PathLike[str], dst: str | os.PathLike[str], ftype: str, n_threads: int = 0
) -> None:
    """Write dst in one step, so that an interrupted run leaves no half model. ftype: "Q8_0", "Q4_K_M", ...

    Tensors whose width a type can't hold fall back to a neighbouring type, as llama.cpp decides.
    """
    src, dst = Path(src), Path(dst)
    types = quantization_types()
    if ftype.upper() not in types:
        raise ModelFileError(f"unknown quantization {ftype!r}: one of {', '.join(sorted(types))}.")
    _check_version()
    _check_gguf(src)
    params = lc.llama_model_quantize_default_params()
    params.ftype = types[ftype.upper()]
    params.nthread = n_threads or default_threads()
    handle, temporary = tempfile.mkstemp(prefix=f".{dst.name}.", suffix=".part", dir=dst.parent)
    os.close(handle)
    try:
        _log.clear()
        if lc.llama_model_quantize(os.fsencode(src), os.fsencode(temporary), ctypes.byref(params)) != 0:
            raise ModelFileError(f"{src} can't be quantized to {ftype}: {_log.why()}.")
        os.replace(temporary, dst)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
