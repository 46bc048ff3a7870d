"""llama.cpp with nothing of ours in between: tokens and logits for comparison, at its most exact settings."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any
from unittest import mock

import llama_cpp as lc
import numpy as np

from localsteer.runtime.bridge.borrowed import set_extra_bufts

LOG: list[str] = []


@lc.llama_log_callback
def _keep_log(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
    LOG.append(text.decode(errors="replace"))


def stock_llama(path: str | Path, **options: Any) -> lc.Llama:
    """llama-cpp-python's own class. It has no option for weight repacking, which crashes in AMX kernels that
    GCC 12 compiled: there it is off, as it is with localsteer."""

    def params() -> lc.llama_model_params:
        made = defaults()
        set_extra_bufts(made, None)
        return made

    defaults = lc.llama_model_default_params
    with mock.patch.object(lc.llama_cpp, "llama_model_default_params", params):
        return lc.Llama(str(path), **options)


class Reference:
    """One model and one context: F32 KV cache, no flash attention, one thread."""

    def __init__(self, path: Path, n_ctx: int = 512) -> None:
        LOG.clear()
        lc.llama_log_set(_keep_log, ctypes.c_void_p(0))
        lc.llama_backend_init()
        model_params = lc.llama_model_default_params()
        model_params.use_extra_bufts = False
        self.model = lc.llama_model_load_from_file(str(path).encode(), model_params)
        if not self.model:
            raise OSError(f"llama.cpp does not load {path}: {''.join(LOG[-5:])}")
        params = lc.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = n_ctx
        params.type_k = params.type_v = lc.GGML_TYPE_F32
        params.flash_attn_type = lc.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.n_threads = params.n_threads_batch = 1
        self.context = lc.llama_init_from_model(self.model, params)
        self.vocab = lc.llama_model_get_vocab(self.model)
        self.n_vocab = lc.llama_vocab_n_tokens(self.vocab)

    def __enter__(self) -> Reference:
        return self

    def __exit__(self, *error: object) -> None:
        lc.llama_free(self.context)
        lc.llama_model_free(self.model)

    def tokenize(self, text: str, *, add_special: bool = False) -> list[int]:
        raw = text.encode()
        ids = (ctypes.c_int32 * (len(raw) + 8))()
        n = lc.llama_tokenize(self.vocab, raw, len(raw), ids, len(ids), add_special, True)
        return list(ids[:n])

    def logits(self, ids: list[int]) -> np.ndarray:
        """(n_tokens, n_vocab) float32, from an empty cache."""
        lc.llama_memory_clear(lc.llama_get_memory(self.context), True)
        batch = lc.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.logits[i] = token, i, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        status = lc.llama_decode(self.context, batch)
        lc.llama_batch_free(batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        rows = lc.llama_get_logits(self.context)
        return np.ctypeslib.as_array(rows, shape=(len(ids), self.n_vocab)).copy()

    def metadata(self, key: str) -> str | None:
        value = ctypes.create_string_buffer(65536)
        n = lc.llama_model_meta_val_str(self.model, key.encode(), value, len(value))
        return None if n < 0 else value.value.decode()
