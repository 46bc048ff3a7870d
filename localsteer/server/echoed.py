"""Special prompts of /v1/completions: scored token by token, or with a gap to fill in."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from localsteer.errors import LocalsteerError
from localsteer.runtime.forward import passes, wide_size
from localsteer.runtime.limits import check_room, check_tokens
from localsteer.runtime.reply import TokenScores

from .errors import ApiError, api_error
from .models import Served
from .replies import ClientGone, Order, check_n_scores

if TYPE_CHECKING:
    from localsteer.engine import Engine

Scored = tuple[int, TokenScores | None]


def prompt_scores(order: Order, gone: threading.Event) -> list[list[Scored]]:
    """Each prompt's tokens with their log-probabilities given the tokens before; the first token has none.

    This takes over the engine: replies of this model pause meanwhile. Raises ApiError, ClientGone.
    """
    found = []
    with order.served.scheduler.paused() as engine:
        for prompt in order.prompts:
            if gone.is_set():
                raise ClientGone
            try:
                found.append(_scores_of(engine, prompt, order, gone))
            except LocalsteerError as error:
                raise api_error(error, "prompt") from None
            check_n_scores(sum(map(len, found)) * (1 + (order.ask.n_top or 0)))
    return found


def _scores_of(
    engine: Engine, prompt: str | Sequence[int], order: Order, gone: threading.Event
) -> list[Scored]:
    tokens = engine.prompt_tokens(prompt, raw=True) if isinstance(prompt, str) else list(prompt)
    check_room(engine, len(tokens))
    plan = engine.plan(tuple(order.steer.values()))
    scores: list[TokenScores | None] = [None]
    checked = check_tokens(engine, tokens)
    for piece, rows, _taken, outputs in passes(
        engine, [checked], [0], plan=plan, n_prompt=len(tokens), size=wide_size(engine)
    ):
        if gone.is_set():
            raise ClientGone
        following = tokens[piece.start + 1 : piece.stop + 1]
        scores += [
            TokenScores.of(row, token, order.ask.n_top or 0)
            for row, token in zip(rows.logits[outputs], following, strict=False)
        ]
    found = list(zip(tokens, scores, strict=True))
    # the model's own first token is not part of a text
    return found[1:] if isinstance(prompt, str) and tokens[0] == engine.model.bos else found


def with_gap(served: Served, prompt: str | Sequence[int], suffix: str) -> list[int]:
    """The tokens of a text with a gap between prompt and suffix, in the order in which code models learn to
    fill it in: the text before, the text after, and then the gap. Raises ApiError for a model without such
    tokens.
    """
    model = served.engine.model
    signs = model.fill_in_tokens
    if signs is None:
        raise ApiError(
            f"suffix: {served.name} can't fill in gaps, since its vocabulary has no tokens for that: "
            "leave it out.",
            param="suffix", code="suffix_unsupported",
        )  # fmt: skip
    before, after, gap = signs
    try:
        parts = [
            model.tokenize(part, add_special=False, parse_special=False) if isinstance(part, str) else part
            for part in (prompt, suffix)
        ]
    except LocalsteerError as error:
        raise api_error(error, "prompt") from None
    begin = [model.bos] if model.add_bos else []
    return [*begin, before, *parts[0], after, *parts[1], gap]
