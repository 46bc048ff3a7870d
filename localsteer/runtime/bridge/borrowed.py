"""The model and the context of a llama_cpp.Llama: used and steered here, freed by their owner."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import llama_cpp.llama_cpp as lc
import numpy as np
from llama_cpp import _logger

from .context import Context
from .hook import Hook
from .library import Log, choose_extra_bufts, log, text_of
from .model import Model

if TYPE_CHECKING:
    from llama_cpp._internals import LlamaBatch


@contextlib.contextmanager
def our_log() -> Iterator[Log]:
    """Capture llama.cpp's errors for localsteer's message; otherwise they go to llama-cpp-python's log."""
    log.clear()
    try:
        yield log
    finally:
        lc.llama_log_set(_logger.llama_log_callback, ctypes.c_void_p(0))


def set_extra_bufts(params: lc.llama_model_params, asked: bool | None) -> None:
    """Weight repacking as Model chooses it, since the AMX crash must not happen in a Llama either."""
    params.use_extra_bufts = choose_extra_bufts(text_of(lc.llama_print_system_info()), asked)


def install(hook: Hook, params: lc.llama_context_params) -> None:
    """Make a context created with these parameters call the hook, which must be closed after the context."""
    params.cb_eval = hook.callback
    params.cb_eval_user_data = hook.pointer


class BatchArrays(NamedTuple):
    """One entry per token."""

    tokens: np.ndarray
    positions: np.ndarray
    seq_ids: np.ndarray
    outputs: np.ndarray


def batch_arrays(batch: LlamaBatch) -> BatchArrays:
    """A copy of a llama-cpp-python batch, whose tokens belong to one sequence each."""
    raw = batch.batch
    n = raw.n_tokens
    return BatchArrays(
        tokens=np.ctypeslib.as_array(raw.token, (n,)).copy(),
        positions=np.ctypeslib.as_array(raw.pos, (n,)).copy(),
        seq_ids=np.array([raw.seq_id[i][0] for i in range(n)]),
        outputs=np.ctypeslib.as_array(raw.logits, (n,)) != 0,
    )


class BorrowedModel(Model):
    """A model owned by a Llama. close() ends its use here and frees nothing."""

    def __init__(self, path: Path, pointer: object) -> None:
        self.path = path
        self._take(pointer, _leave_alone)

    def check_text(self, text: str) -> None:
        """Raise PromptError for a character at which llama.cpp's tokenizer would end the process."""
        self._check_characters(text)


class BorrowedContext(Context):
    """A context owned by a Llama. close() ends its use here and frees nothing. hook: installed in the
    context's parameters.

    Trying the layers empties the cache, so borrow a context before anything is decoded in it.
    """

    def __init__(self, model: BorrowedModel, pointer: object, hook: Hook, *, swa_full: bool) -> None:
        self.model = model
        self.n_ctx = lc.llama_n_ctx(pointer)
        self.n_batch = lc.llama_n_batch(pointer)
        self.n_seq_max = lc.llama_n_seq_max(pointer)
        self._hook = hook
        self._swa_full = swa_full
        self._take(pointer, _leave_alone)

    def _try_layers(self) -> tuple[frozenset[int], str]:
        why = self._why_never()
        if why:
            return frozenset(), why
        layers = super()._try_layers()
        lc.llama_perf_context_reset(self.pointer)
        return layers

    def _why_never(self) -> str | None:
        model = self.model.pointer
        if lc.llama_model_has_encoder(model) or not lc.llama_model_has_decoder(model):
            return "it is not a decoder-only model"
        if not self._memory:
            return "it only makes embeddings: there is no last prompt token"
        if not self._swa_full and lc.llama_model_n_swa(model) > 0:
            return "its small sliding-window cache forgets what prefixes need: open it with swa_full=True"
        return None

    def _llama_decode(self, tokens, positions, seq_ids, outputs, also=None) -> None:
        with our_log():
            super()._llama_decode(tokens, positions, seq_ids, outputs, also)


def _leave_alone(*_: object) -> None:
    pass
