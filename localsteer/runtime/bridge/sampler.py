"""Drawing the next token with llama.cpp's samplers."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import llama_cpp.llama_cpp as lc
import numpy as np

from ...constrain import END, Matcher
from ...errors import LocalsteerError
from ..sampling import Sampling
from .context import Context
from .library import Handle, log
from .model import Model

# descriptor 2 belongs to the whole process: two threads that replace it at once would restore the wrong one
_stderr_lock = threading.Lock()


class _Kept:
    text = ""


@contextlib.contextmanager
def _stderr_kept() -> Iterator[_Kept]:
    """Capture descriptor 2: llama.cpp's grammar parser prints its errors there and not to its log."""
    kept = _Kept()
    sys.stderr.flush()
    with _stderr_lock, tempfile.TemporaryFile() as file:
        before = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield kept
        finally:
            os.dup2(before, 2)
            os.close(before)
            file.seek(0)
            kept.text = file.read().decode("utf-8", "replace")


class Sampler(Handle):
    """Biases, penalties, top-k, top-p, min-p, temperature, then one draw, in llama.cpp's order; temp <= 0 is
    greedy.

    matcher: tokens that it forbids are never drawn, and it is told what is drawn. settings: fields of
    Sampling, whose grammar is the matcher's. Raises LocalsteerError if logit_bias names an id that is not a
    token.
    """

    _what = "sampler"

    def __init__(self, model: Model, *, matcher: Matcher | None = None, **settings: Any) -> None:
        sampling = Sampling(**settings)
        self._candidates = _Candidates(model.n_vocab)
        self._matcher = matcher
        stages = [_bias_stage(model, sampling.logit_bias)] if sampling.logit_bias else []
        penalties = (sampling.repeat_penalty, sampling.frequency_penalty, sampling.presence_penalty)
        if sampling.repeat_last_n != 0 and penalties != (1.0, 0.0, 0.0):
            stages.append(lc.llama_sampler_init_penalties(model.n_vocab, sampling.repeat_last_n, *penalties))
        self._is_argmax = sampling.temp <= 0 and not stages
        if sampling.temp <= 0:
            stages.append(lc.llama_sampler_init_greedy())
        else:
            seed = lc.LLAMA_DEFAULT_SEED if sampling.seed is None else sampling.seed % 2**32
            stages += [
                lc.llama_sampler_init_top_k(sampling.top_k),
                lc.llama_sampler_init_top_p(sampling.top_p, 1),
                lc.llama_sampler_init_min_p(sampling.min_p, 1),
                lc.llama_sampler_init_temp(sampling.temp),
                lc.llama_sampler_init_dist(seed),
            ]
        self._pointer = lc.llama_sampler_chain_init(lc.llama_sampler_chain_default_params())
        for stage in stages:
            lc.llama_sampler_chain_add(self._pointer, stage)
        self._depend_on(model, lc.llama_sampler_free, self._pointer)

    def sample(self, context: Context, i: int = -1) -> int:
        """Draw from output row i of the last decode, and remember the token for penalties and matcher.

        Returns END if the reply is complete and the model has no token to say so.
        """
        logits = context.logits(i)
        likeliest = int(logits.argmax())
        if not np.isfinite(logits[likeliest]):
            raise LocalsteerError("the model gave no finite logits: lower the strength of the steering.")
        if self._matcher and self._matcher.must_end:
            return END
        token = self._greedy(logits, likeliest) if self._is_argmax else self._drawn(logits)
        if token is None:
            why = (
                "the grammar allows no token here" if self._matcher else "penalties and biases leave no token"
            )
            raise LocalsteerError(f"{why}.")
        if self._matcher:
            self._matcher.accept(token)
        return token

    def _greedy(self, logits: np.ndarray, likeliest: int) -> int | None:
        """The likeliest token that the matcher allows. The likeliest of all usually is, and checking one
        token is faster than computing the mask."""
        if self._matcher is None or self._matcher.allows(likeliest):
            return likeliest
        allowed = self._matcher.allowed(len(logits))
        if not len(allowed):
            return None
        token = int(allowed[logits[allowed].argmax()])
        return token if np.isfinite(logits[token]) else None

    def _drawn(self, logits: np.ndarray) -> int | None:
        allowed = self._matcher.allowed(len(logits)) if self._matcher else None
        token = self._candidates.choose(self.pointer, logits, allowed)
        if token is not None:
            lc.llama_sampler_accept(self.pointer, token)
        return token


def _bias_stage(model: Model, logit_bias: Sequence[tuple[int, float]]) -> object:
    for token, _ in logit_bias:
        if not 0 <= token < model.n_vocab:
            raise LocalsteerError(
                f"logit_bias: {token} is not a token of this model (0 to {model.n_vocab - 1})."
            )
    pairs = (lc.llama_logit_bias * len(logit_bias))(*logit_bias)  # copied by llama.cpp
    return lc.llama_sampler_init_logit_bias(model.n_vocab, len(logit_bias), pairs)


def check_llama_grammar(model: Model, text: str) -> None:
    """Raise LocalsteerError with the reason if llama.cpp's sampler can't read a GBNF text."""
    if not text.strip():  # an empty text would give a stage that allows everything
        raise LocalsteerError("the grammar can't be parsed: it is empty.")
    log.clear()
    with _stderr_kept() as kept:
        stage = lc.llama_sampler_init_grammar(model.vocab, text.encode("utf-8"), b"root")
    if not stage:
        why = re.search(r"error parsing grammar: (.*)", kept.text)
        raise LocalsteerError(f"the grammar can't be parsed: {why[1] if why else log.why()}.")
    lc.llama_sampler_free(stage)


class _Candidates:
    """The llama_token_data_array of one vocabulary, reused for every draw."""

    def __init__(self, n_vocab: int) -> None:
        self._data = np.zeros(n_vocab, dtype=[("id", np.int32), ("logit", np.float32), ("p", np.float32)])
        self._ids = np.arange(n_vocab, dtype=np.int32)

    def choose(self, sampler: object, logits: np.ndarray, allowed: np.ndarray | None = None) -> int | None:
        """Draw one of the candidates; None if every token is ruled out. allowed: token ids; others are no
        candidates."""
        ids = self._ids if allowed is None else allowed
        data = self._data[: len(ids)]
        data["id"], data["logit"], data["p"] = ids, logits if allowed is None else logits[allowed], 0.0
        array = lc.llama_token_data_array(
            data=ctypes.cast(self._data.ctypes.data, lc.llama_token_data_p),
            size=len(ids),
            selected=-1,
            sorted=False,
        )
        if len(ids):  # llama.cpp's samplers require at least one
            lc.llama_sampler_apply(sampler, ctypes.byref(array))
        chosen = array.data[array.selected] if 0 <= array.selected < array.size else None
        return None if chosen is None or not np.isfinite(chosen.logit) else int(chosen.id)
