"""Embeddings: one vector for a text, from a model whose file says how its states are pooled."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import llama_cpp.llama_cpp as lc
import numpy as np

from ...errors import LocalsteerError, PromptError, UnsupportedModelError
from .context import Batch
from .library import Handle, default_threads, log
from .model import Model

_POOLED = {1: "mean", 2: "cls", 3: "last"}  # llama_pooling_type; 0 is none, 4 ranks pairs of texts


def pooling_of(model: Model) -> str | None:
    """The pooling type, `mean`, `cls` or `last`; None for a model that was not made for embeddings."""
    try:
        return _POOLED.get(int(model.metadata.get(f"{model.architecture}.pooling_type", "0")))
    except ValueError:
        return None


class Embedder(Handle):
    """A separate context on a model, for pooled states after the final norm. Calls wait for each other.

    Raises UnsupportedModelError for a model without a pooling type in its file.
    """

    _what = "embedder"

    def __init__(self, model: Model, *, n_ctx: int = 2048, n_threads: int | None = None) -> None:
        if pooling_of(model) is None:
            raise UnsupportedModelError(
                f"{model.path.name} can't make embeddings: its file names no pooling type."
            )
        self.model = model
        self.n_ctx = min(n_ctx, model.n_ctx_train)
        params = lc.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = self.n_ctx
        params.n_seq_max = 1
        params.n_threads = params.n_threads_batch = n_threads or default_threads()
        params.embeddings = True
        params.no_perf = True
        log.clear()
        self._pointer = lc.llama_init_from_model(model.pointer, params)
        if not self._pointer:
            raise LocalsteerError(f"no context for embeddings of {model.path.name}: {log.why()}.")
        self._depend_on(model, lc.llama_free, self._pointer)
        self._batch = Batch(self.n_ctx)
        self._lock = threading.Lock()

    def embed(self, tokens: Sequence[int]) -> np.ndarray:
        """The embedding, (n_embd_out,) float32 of length 1. Raises PromptError for no tokens, or too many."""
        n = len(tokens)
        if not 1 <= n <= self.n_ctx:
            raise PromptError(f"a text for an embedding must have 1 to {self.n_ctx} tokens, not {n}.")
        self.model._check_token(min(tokens))
        self.model._check_token(max(tokens))
        with self._lock:
            lc.llama_memory_clear(lc.llama_get_memory(self.pointer), True)
            every = np.ones(n, np.int8)
            batch = self._batch.filled(tokens, np.arange(n), np.zeros(n, np.int32), every)
            if lc.llama_decode(self.pointer, batch) != 0:
                raise LocalsteerError(f"llama.cpp could not embed a text: {log.why()}.")
            pooled = lc.llama_get_embeddings_seq(self.pointer, 0)
            if not pooled:
                raise LocalsteerError(f"{self.model.path.name} gave no embedding.")
            values = np.ctypeslib.as_array(pooled, shape=(lc.llama_model_n_embd(self.model.pointer),)).copy()
        length = np.linalg.norm(values.astype(np.float64))
        if not np.isfinite(length) or length == 0:
            raise LocalsteerError(f"{self.model.path.name} gave an embedding that is not finite.")
        return (values / length).astype(np.float32)
