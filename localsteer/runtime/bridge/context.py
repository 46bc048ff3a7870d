"""A llama_context that can be steered and read: one batch in, logits and captured rows out."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import llama_cpp.llama_cpp as lc
import numpy as np

from ...errors import LocalsteerError, MismatchError, PromptError, UnsupportedModelError
from .hook import Hook
from .library import Handle, default_threads, log, total_memory
from .model import Model

if TYPE_CHECKING:
    from ...plan import Plan

DEFAULT_N_CTX = 4096


class Batch:
    """A llama_batch over numpy arrays that Python owns."""

    def __init__(self, size: int) -> None:
        self.tokens = np.zeros(size, dtype=np.int32)
        self.positions = np.zeros(size, dtype=np.int32)
        self.seq_ids = np.zeros(size, dtype=np.int32)
        self.outputs = np.zeros(size, dtype=np.int8)
        self._n_seq_ids = np.ones(size, dtype=np.int32)
        self._seq_pointers = self.seq_ids.ctypes.data + 4 * np.arange(size, dtype=np.uintp)

    def filled(self, tokens, positions, seq_ids, outputs, also=None) -> lc.llama_batch:
        n = len(tokens)
        self.tokens[:n], self.positions[:n] = tokens, positions
        self.seq_ids[:n], self.outputs[:n] = seq_ids, outputs
        counts, pointers = self._n_seq_ids, self._seq_pointers
        if also is not None:
            counts, pointers = self._shared(seq_ids, also)
        batch = lc.llama_batch(n_tokens=n)
        batch.token = _pointer_to(self.tokens, lc.llama_token)
        batch.pos = _pointer_to(self.positions, lc.llama_pos)
        batch.n_seq_id = _pointer_to(counts, ctypes.c_int32)
        batch.seq_id = _pointer_to(pointers, ctypes.POINTER(lc.llama_seq_id))
        batch.logits = _pointer_to(self.outputs, ctypes.c_int8)
        return batch

    def _shared(self, seq_ids, also) -> tuple[np.ndarray, np.ndarray]:
        """How many sequences each token has, and pointers to their numbers, kept alive until the next
        batch."""
        counts = np.array([1 + len(others) for others in also], dtype=np.int32)
        numbers = [[first, *others] for first, others in zip(seq_ids, also, strict=True)]
        flat = np.concatenate([np.array(row, dtype=np.int32) for row in numbers])
        starts = np.concatenate(([0], np.cumsum(counts[:-1]))).astype(np.uintp)
        self._shares = (counts, flat, flat.ctypes.data + 4 * starts)
        return counts, self._shares[2]


def _pointer_to(array: np.ndarray, ctype: type) -> object:
    return ctypes.cast(array.ctypes.data, ctypes.POINTER(ctype))


class Rows:
    """The results of one decode. states: {layer: (n_tokens, n_embd) float32}, taken after steering.

    In the last layer only tokens with outputs have rows.
    """

    def __init__(self, context: Context, n_outputs: int, states: dict[int, np.ndarray]) -> None:
        self.states = states
        self.n_outputs = n_outputs
        self._context = context
        self._n_decodes = context.n_decodes
        self._logits: np.ndarray | None = None

    @property
    def logits(self) -> np.ndarray:
        """The logits, (n_outputs, n_vocab) float32, copied at first use, which must come before the next
        decode."""
        if self._logits is None:
            if self._n_decodes != self._context.n_decodes:
                raise LocalsteerError(
                    "the logits of an earlier decode are gone: read them before the next one."
                )
            self._logits = self._context.all_logits().copy()
        return self._logits


class Context(Handle):
    """A llama_context whose graph can be steered and read, token by token.

    A decode never exceeds one micro-batch, so the k-th row of every layer is the k-th token of the batch (in
    the last layer, the k-th output). The hook relies on this, and checks it. n_ctx: cells of all sequences
    together. kv_unified: they share one cache, and prefixes in it. Otherwise each has its own of n_ctx /
    n_seq_max cells: attention then runs only over that, and a common prefix is copied. llama.cpp sorts the
    rows of such a decode by sequence, so it may hold only tokens of one sequence, or one token each of
    consecutive sequences, which are sorted already. exact: F32 cache and no flash attention, for comparisons;
    slower. Raises UnsupportedModelError for models that do not generate text.
    """

    _what = "context"
    kv_unified = True
    n_decodes = n_tokens = 0  # calls of llama_decode, and the tokens they computed

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
        kv_unified: bool = True,
    ) -> None:
        self.model = model
        self.kv_unified = kv_unified
        self.n_ctx = _context_size(model, n_ctx)
        if model.hosts is None:  # whose cache would be theirs
            _check_memory(model, self.n_ctx, exact)
        self.n_batch = max(1, min(n_batch, self.n_ctx))
        self.n_seq_max = n_seq_max
        self.n_threads = n_threads or default_threads()
        if lc.llama_model_has_encoder(model.pointer) or not lc.llama_model_has_decoder(model.pointer):
            raise UnsupportedModelError(
                f"{model.path.name} ({model.architecture}) is not a decoder-only model."
            )
        self._exact, self._with_hook = exact, steering
        self.take_up(self.opened(model.pointer))
        self._prepare()

    def opened(self, model: object) -> tuple[object, Hook | None]:
        """A new llama_context with these settings on a llama_model, and its hook, for `take_up` or
        `discard`."""
        hook = Hook(self.model.n_layer, self.model.n_embd) if self._with_hook else None
        log.clear()
        pointer = lc.llama_init_from_model(model, self._params(self._exact, hook))
        if not pointer:
            if hook:
                hook.close()
            why, name, hosts = log.why(), self.model.path.name, self.model.hosts
            if hosts:
                hosts.check()
                why = hosts.named(why)
            raise LocalsteerError(f"no context of {self.n_ctx} tokens for {name}: {why}. Try a smaller one.")
        return pointer, hook

    def discard(self, opened: tuple[object, Hook | None]) -> None:
        _free_context(*opened)

    def take_up(self, opened: tuple[object, Hook | None]) -> None:
        """Own this context from now on, instead of the one that is closed."""
        pointer, self._hook = opened
        self._hold(pointer, _free_context)

    def _take(self, pointer: object, free: Callable[[object, Hook | None], object]) -> None:
        self._hold(pointer, free)
        self._prepare()

    def _hold(self, pointer: object, free: Callable[[object, Hook | None], object]) -> None:
        self._pointer = pointer
        self._depend_on(self.model, free, pointer, self._hook)
        self._outputs = np.zeros(0, dtype=np.int64)  # batch index of each output row
        self._memory = lc.llama_get_memory(pointer)

    def _prepare(self) -> None:
        self.n_ctx_seq = self.n_ctx if self.kv_unified else lc.llama_n_ctx_seq(self._pointer)
        self._batch = Batch(self.n_batch)
        self._steerable, self._why_not = frozenset(), "steering is off"
        if self._hook:
            self._steerable, self._why_not = self._try_layers()

    def _params(self, exact: bool, hook: Hook | None) -> lc.llama_context_params:
        params = lc.llama_context_default_params()
        params.n_ctx = self.n_ctx
        params.n_batch = params.n_ubatch = self.n_batch
        params.n_seq_max = self.n_seq_max
        params.n_threads = params.n_threads_batch = self.n_threads
        params.kv_unified = self.kv_unified
        # the small sliding-window cache forgets what a shared prefix needs, and resorts to permuted rows
        params.swa_full = True
        params.no_perf = True
        if exact:
            params.type_k = params.type_v = lc.GGML_TYPE_F32
            params.flash_attn_type = lc.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if hook:
            params.cb_eval = hook.callback
            params.cb_eval_user_data = hook.pointer
        return params

    # -- steering --

    def _try_layers(self) -> tuple[frozenset[int], str]:
        """Decode three tokens with all layers wanted, and see at which layers the hook finds its rows."""
        why = self.model.why_not_steerable(self.n_seq_max)
        if why:
            return frozenset(), why
        n = min(3, self.n_batch)
        outputs = np.arange(n) == n - 1
        try:
            self._hook.begin(outputs.astype(np.uint8), None, range(self.model.n_layer), None)
            self._llama_decode(np.full(n, max(self.model.bos, 0)), np.arange(n), np.zeros(n), outputs)
        finally:
            self._hook.end()
            self.clear()
        layers = frozenset(il for il in range(self.model.n_layer) if self._hook.fired(il))
        return layers, self._hook.error()

    def probe(self, layers: Sequence[int] | None = None) -> set[int]:
        """The layers at which the hook is known to find its rows. If one of `layers` is not among them,
        raises UnsupportedModelError with the reason, or MismatchError for a layer that the model lacks.
        """
        self._check_layers(layers or ())
        return set(self._steerable)

    def _check_layers(self, layers: Sequence[int]) -> None:
        for layer in layers:
            if layer in self._steerable:
                continue
            if not 0 <= layer < self.model.n_layer:
                raise MismatchError(
                    f"layer {layer} does not exist: {self.model.path.name} has {self.model.n_layer} layers, "
                    f"0 to {self.model.n_layer - 1}."
                )
            raise UnsupportedModelError(
                f"{self.model.path.name} ({self.model.architecture}) can't be steered at layer {layer}: "
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
        self._check_layers(plan.layers)

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
        also: Sequence[Sequence[int]] | None = None,
    ) -> Rows:
        """Decode one batch. After an error the cache holds rows that can't be trusted: clear it.

        All arguments except `capture` have one entry per token. plans: what steers each token, None =
        nothing. classes: its PositionClass, needed with plans. capture: layers to record, for the tokens of
        capture_tokens (all by default); in the last layer, those of them with outputs. also: further
        sequences to which each token belongs, so that a common prefix is computed once; only in a unified
        cache, and into empty sequences. Raises PromptError (context full, token out of range), MismatchError,
        UnsupportedModelError.
        """
        tokens, positions, seq_ids = (np.asarray(a, dtype=np.int64) for a in (tokens, positions, seq_ids))
        outputs = np.asarray(outputs, dtype=bool)
        self._check_batch(tokens, positions, seq_ids, outputs)
        self._check_also(also, len(tokens))
        if plans is not None and all(plan is None or plan.is_empty for plan in plans):
            plans = None
        capture = sorted(set(capture or ()))
        if plans is None and not capture:
            self._llama_decode(tokens, positions, seq_ids, outputs, also)
            return Rows(self, int(outputs.sum()), {})
        mask = (
            np.ones(len(outputs), dtype=bool) if capture_tokens is None else np.asarray(capture_tokens, bool)
        )
        self._check_layers(capture)
        routes = None if plans is None else self._routes(plans, classes, len(outputs))
        try:
            # inside the try, so that Ctrl-C leaves no hook that would still act in the next decode
            self._hook.begin(outputs.astype(np.uint8), routes, capture, mask.astype(np.uint8))
            self._llama_decode(tokens, positions, seq_ids, outputs, also)
        finally:
            trusted = self._hook.end()
        if not trusted:
            raise UnsupportedModelError(f"{self.model.path.name}: steering failed: {self._hook.error()}.")
        states = {layer: self._captured(layer, outputs, mask) for layer in capture}
        return Rows(self, int(outputs.sum()), states)

    def _routes(self, plans, classes, n_tokens: int) -> np.ndarray:
        for plan in {id(plan): plan for plan in plans if plan is not None}.values():
            self._check_plan(plan)
        if classes is None or len(classes) != n_tokens or len(plans) != n_tokens:
            raise LocalsteerError("plans and classes need one entry per token.")
        return self._hook.routes(plans, classes)

    def _captured(self, layer: int, outputs: np.ndarray, mask: np.ndarray) -> np.ndarray:
        rows = self._hook.captured(layer)
        # makes an architecture that keeps all rows to the end answer like the others
        if layer == self.model.n_layer - 1 and len(rows) == mask.sum():
            rows = rows[outputs[mask]]
        return rows

    def _check_batch(self, tokens, positions, seq_ids, outputs) -> None:
        n = len(tokens)
        if not 1 <= n <= self.n_batch:
            raise PromptError(f"a batch of {n} tokens is not possible: between 1 and {self.n_batch} are.")
        if not len(positions) == len(seq_ids) == len(outputs) == n:
            raise LocalsteerError("tokens, positions, seq_ids and outputs need one entry per token.")
        self.model._check_token(int(tokens.min()))
        self.model._check_token(int(tokens.max()))
        self._check_seq(int(seq_ids.min()))
        self._check_seq(int(seq_ids.max()))
        if not 0 <= positions.min() <= positions.max() < self.n_ctx_seq:
            raise PromptError(
                f"positions {positions.min()} to {positions.max()} do not fit into a context of "
                f"{self.n_ctx_seq} tokens: shorten the prompt or ask for a larger context."
            )
        steps = np.diff(seq_ids)
        if not self.kv_unified and steps.any() and (steps != 1).any():
            raise LocalsteerError(
                "with separate caches a decode takes one sequence, or one token each of consecutive ones."
            )

    def _check_also(self, also: Sequence[Sequence[int]] | None, n: int) -> None:
        if also is None:
            return
        if len(also) != n:
            raise LocalsteerError("tokens and the sequences that share them need one entry per token.")
        if not self.kv_unified and any(also):
            raise LocalsteerError("with separate caches no two sequences can share a token.")
        for seq in {seq for others in also for seq in others}:
            self._check_seq(seq)

    def _check_seq(self, seq: int) -> None:
        # llama.cpp ends the process for an unknown sequence
        if not 0 <= seq < self.n_seq_max:
            raise LocalsteerError(f"sequence {seq} does not exist: this context has {self.n_seq_max}.")

    def _llama_decode(self, tokens, positions, seq_ids, outputs, also=None) -> None:
        log.clear()
        batch = self._batch.filled(tokens, positions, seq_ids, outputs, also)
        self.n_decodes += 1
        self.n_tokens += len(tokens)
        self._outputs = np.zeros(0, dtype=np.int64)
        status = lc.llama_decode(self.pointer, batch)
        if self.model.hosts:  # results without one of the hosts are worthless
            lc.llama_synchronize(self.pointer)
            self.model.hosts.check()
        if status == 1:
            raise PromptError(
                f"the context of {self.n_ctx} tokens is full: shorten the prompt or enlarge it."
            )
        if status != 0:
            raise LocalsteerError(f"llama.cpp could not decode a batch (status {status}): {log.why()}.")
        self._outputs = np.flatnonzero(outputs)

    def all_logits(self) -> np.ndarray:
        """The logits, (n_outputs, n_vocab) float32: a view that the next decode overwrites."""
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
        """Forget positions [p0, p1) of a sequence. Returns False if the model's cache can't forget a part."""
        self._check_seq(seq)
        return bool(lc.llama_memory_seq_rm(self._live_memory(), seq, p0, p1))

    def seq_cp(self, src: int, dst: int, p1: int = -1) -> None:
        """Make dst, which is empty, begin with positions [0, p1) of src. In a unified cache nothing is
        copied; between separate ones llama.cpp can't copy a part: it copies everything, at the next
        decode."""
        self._check_seq(src)
        self._check_seq(dst)
        if self.kv_unified:
            lc.llama_memory_seq_cp(self._live_memory(), src, dst, 0, p1)
        else:
            lc.llama_memory_seq_cp(self._live_memory(), src, dst, -1, -1)
            self.seq_rm(dst, p1 if p1 >= 0 else self.n_ctx_seq)

    def _live_memory(self) -> object:
        return self.pointer and self._memory


def _context_size(model: Model, n_ctx: int | None) -> int:
    n_ctx = min(model.n_ctx_train, DEFAULT_N_CTX) if n_ctx is None else n_ctx
    if n_ctx < 1:
        raise PromptError(f"a context of {n_ctx} tokens is not possible: ask for at least 1.")
    return min(n_ctx, model.n_ctx_train) if model.has_position_table else n_ctx


def _check_memory(model: Model, n_ctx: int, exact: bool) -> None:
    """Raise LocalsteerError for a cache larger than this machine's memory: the system would allow it, and end
    the process while it is filled."""
    gigabytes = n_ctx * model.cache_bytes(4 if exact else 2) / 2**30
    present = total_memory() / 2**30
    if gigabytes > present:
        raise LocalsteerError(
            f"a context of {n_ctx} tokens for {model.path.name} takes {gigabytes:.0f} GiB and this machine "
            f"has {present:.0f}: ask for a smaller one."
        )


def _free_context(pointer: object, hook: Hook | None) -> None:
    lc.llama_free(pointer)
    if hook:
        hook.close()  # after the context, which may call the hook until it is freed
