"""The sizes of an engine, chosen when it is opened, and the checks of its arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..errors import ContextError, LocalsteerError, PlanError, PromptError

if TYPE_CHECKING:
    from ..engine import Engine
    from .attach import Notices
    from .bridge import Model

DEFAULT_N_CTX = 4096  # tokens of one sequence, even if the model allows more: its cache costs memory
DEFAULT_N_SEQ_MAX = 8
POOL_BYTES = 512 << 20  # bytes of KV cache that several sequences may take together beyond one whole sequence


def check_counts(kv_unified: bool, n_cells: int | None, **counts: int) -> None:
    """Raise LocalsteerError for a count below 1."""
    for name, value in {**counts, "n_cells": n_cells}.items():
        if value is not None and value < 1:
            raise LocalsteerError(f"{name} must be at least 1, not {value}.")
    if n_cells is not None and not kv_unified:
        raise LocalsteerError("n_cells is for a unified cache: without one, each sequence has n_ctx.")


def context_length(model: Model, name: str, asked: int | None) -> int:
    """Tokens of one sequence. Raises LocalsteerError for more than the model was trained for."""
    trained = model.n_ctx_train
    if asked is None:
        return min(trained, DEFAULT_N_CTX)
    if asked < 1:
        raise LocalsteerError(f"n_ctx must be at least 1, not {asked}.")
    if asked > trained:
        # beyond it, llama.cpp aborts if positions are learnt (gpt2), and other models answer nonsense
        raise LocalsteerError(
            f"n_ctx {asked} is longer than the {trained} tokens that {name} was trained for: "
            f"choose at most {trained}."
        )
    return asked


def sequences_at_once(model: Model, name: str, asked: int, notice: Notices) -> int:
    why = model.why_not_steerable(asked)
    if asked > 1 and why and not model.why_not_steerable(1):
        notice(f"{name} is decoded one sequence at a time: {why}.")
        return 1
    return asked


def pool_cells(model: Model, n_ctx: int, n_seq_max: int, *, exact: bool, kv_unified: bool) -> int:
    """Tokens that all sequences may hold together; the keys and values of one take at most `cell_bytes`."""
    if not kv_unified:
        return n_ctx * n_seq_max
    cell_bytes = 2 * (4 if exact else 2) * model.n_layer * model.n_embd
    return min(n_ctx * n_seq_max, POOL_BYTES // cell_bytes)


def check_tokens(engine: Engine, token_ids: Sequence[int], n_prompt: int | None = None) -> np.ndarray:
    """The token ids as (n,) int32. Raises PromptError for none, too many or unknown ones, and for an n_prompt
    out of range."""
    tokens = np.asarray(token_ids, np.int32)
    if tokens.ndim != 1 or not len(tokens):
        raise PromptError("the prompt is empty: it needs at least one token.")
    if len(tokens) > engine.n_ctx:
        more = ", or raise n_ctx (-c)" if engine.n_ctx < engine.model.n_ctx_train else ""
        raise ContextError(
            f"{len(tokens)} tokens are more than the context of {engine.n_ctx} tokens: shorten the "
            f"prompt{more}."
        )
    if tokens.min() < 0 or tokens.max() >= engine.model.n_vocab:
        raise PromptError(f"token ids must be 0 to {engine.model.n_vocab - 1}.")
    if n_prompt is not None and not 0 <= n_prompt <= len(tokens):
        raise PromptError(f"n_prompt must be 0 to the {len(tokens)} tokens given, not {n_prompt}.")
    return tokens


def check_positions(positions: Sequence[int], n_tokens: int) -> list[int]:
    """The positions. Raises PromptError unless they are ascending, within `n_tokens` tokens, and at least
    one."""
    chosen = [int(position) for position in positions]
    if not chosen or chosen != sorted(set(chosen)) or not 0 <= chosen[0] <= chosen[-1] < n_tokens:
        raise PromptError(
            f"positions must be ascending and within the {n_tokens} tokens, not {chosen!r:.60}."
        )
    return chosen


def check_layers(engine: Engine, layers: Sequence[int]) -> list[int]:
    """The layers. Raises PlanError for one that the model doesn't have."""
    n_layer = engine.model.n_layer
    for layer in layers:
        if not 0 <= layer < n_layer:
            raise PlanError(
                f"layer {layer} is out of range: {engine.path.name} has layers 0 to {n_layer - 1}."
            )
    return [int(layer) for layer in layers]


def check_room(engine: Engine, n_prompt: int) -> None:
    """Raise ContextError unless at least one token of a reply fits after the prompt."""
    if n_prompt >= engine.n_ctx:
        raise ContextError(
            f"the prompt has {n_prompt} tokens, and the context of {engine.n_ctx} must also hold the reply: "
            "shorten the prompt, or raise n_ctx (-c) if the model allows more."
        )
