"""How the next token is drawn."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..constrain import Constraint
from ..errors import LocalsteerError

MAX_FLOAT = 3.4e38  # of llama.cpp's 32 bits
MAX_INT = 2**31 - 1


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn, with llama.cpp's names and defaults; `temp` 0 is greedy.

    seed: None draws one. repeat_last_n: how many last tokens of the reply penalties look at, -1 = all.
    grammar: what the reply must match, a Constraint or GBNF text. logit_bias: (token id, what is added to its
    logit), -inf for a token that must not be drawn. Raises LocalsteerError for a value out of range.
    """

    temp: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    grammar: Constraint | str | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        for name in ("temp", "repeat_penalty", "presence_penalty", "frequency_penalty"):
            if not abs(getattr(self, name)) <= MAX_FLOAT:
                raise LocalsteerError(f"{name} must be a finite number, not {getattr(self, name)}.")
        for name in ("top_k", "repeat_last_n"):  # llama.cpp would take their lowest 32 bits
            if not -MAX_INT <= getattr(self, name) <= MAX_INT:
                raise LocalsteerError(f"{name} must be a number up to {MAX_INT}, not {getattr(self, name)}.")
        for name in ("top_p", "min_p"):
            if not 0 <= getattr(self, name) <= 1:
                raise LocalsteerError(f"{name} must be 0 to 1, not {getattr(self, name)}.")
        if self.repeat_penalty <= 0:
            raise LocalsteerError(f"repeat_penalty must be above 0, not {self.repeat_penalty}.")
        for token, bias in self.logit_bias:
            if math.isnan(bias) or bias == math.inf:
                raise LocalsteerError(f"logit_bias of token {token} must be a number or -inf, not {bias}.")

    @property
    def is_argmax(self) -> bool:
        """Whether the largest logit decides."""
        penalties = (self.repeat_penalty, self.presence_penalty, self.frequency_penalty)
        has_own_way = self.grammar is not None or self.logit_bias or penalties != (1.0, 0.0, 0.0)
        return self.temp <= 0 and not has_own_way


GREEDY = Sampling(temp=0.0)
