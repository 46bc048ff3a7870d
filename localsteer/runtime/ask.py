"""A question to a model: one prompt, and how to answer it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import LocalsteerError, PromptError
from ..plan import Plan
from ..templates import Message
from ..vector import ControlVector
from .attach import Steer
from .sampling import Sampling

Prompt = str | Sequence[Message]

MAX_TOKENS = 512


@dataclass(frozen=True, eq=False)
class Ask:
    """A prompt and how to answer it, made once at the edge and passed on whole.

    prompt: a question, messages, or with `raw` a text that is sent as it is. tokens: the prompt's ids,
    instead of a prompt. steer: one vector, several, or a plan. max_tokens: of the reply; None = until the
    context is full. sampling: None = llama.cpp's defaults. stop: texts before which the reply ends. n_top:
    None, or for how many of the likeliest tokens each chunk has log-probabilities, beside that of the token
    drawn. keep_cache: use what is cached of these tokens whatever it was computed under, so that nothing is
    read again under a changed plan; only for a deliberate mix of plans in one conversation. plain_forms:
    steer nothing that is generated inside a tool call, or anywhere under a grammar; the prompt is steered.
    Raises LocalsteerError for an empty stop string, PromptError for a negative max_tokens.
    """

    prompt: Prompt = ""
    steer: Steer = ()
    max_tokens: int | None = MAX_TOKENS
    sampling: Sampling | None = None
    stop: Sequence[str] = ()
    raw: bool = False
    tokens: Sequence[int] | None = None
    n_top: int | None = None
    keep_cache: bool = False
    plain_forms: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 0:
            raise PromptError(f"max_tokens must not be negative, not {self.max_tokens}.")
        # it is read more than once, and a generator would then be empty
        object.__setattr__(self, "steer", listed(self.steer))
        object.__setattr__(self, "sampling", self.sampling or Sampling())
        object.__setattr__(self, "stop", check_stop(self.stop))

    @classmethod
    def of(cls, prompt: Prompt | Ask, **fields: Any) -> Ask:
        """An Ask for a prompt with these fields, or an Ask with some of its fields changed."""
        return replace(prompt, **fields) if isinstance(prompt, Ask) else cls(prompt, **fields)


def asks_for(
    prompts: Sequence[Prompt],
    *,
    steer: Steer | Sequence[Steer] = (),
    sampling: Sampling | Sequence[Sampling] | None = None,
    **fields: Any,
) -> list[Ask]:
    """One Ask for each prompt, with the same fields.

    steer: one list of vectors (or one plan) for all prompts, or one of these for each prompt. sampling: one
    for all, with seed + i for prompt i, or one for each. Raises PromptError, LocalsteerError.
    """
    if isinstance(prompts, str):
        raise PromptError("one text is not a list of prompts: put it into a list, or call `generate`.")
    steers = _steer_of_each(steer, len(prompts))
    samplings = _sampling_of_each(sampling, len(prompts))
    return [
        Ask(prompt, steer=steer, sampling=drawn, **fields)
        for prompt, steer, drawn in zip(prompts, steers, samplings, strict=True)
    ]


def listed(steer: Steer) -> Steer:
    """Several vectors as a tuple; anything else unchanged."""
    return steer if steer is None or isinstance(steer, (Plan, ControlVector)) else tuple(steer)


def check_stop(stop: Sequence[str]) -> tuple[str, ...]:
    """One or several stop strings as a tuple. Raises LocalsteerError for an empty one, which would stop every
    reply, and for one with half a character, which no reply contains."""
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(stops):
        raise LocalsteerError("a stop string must not be empty.")
    for text in stops:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise LocalsteerError(f"the stop string {text!a:.80} contains half a character.") from None
    return stops


def _steer_of_each(steer: Steer | Sequence[Steer], n: int) -> Sequence[Steer]:
    steer = listed(steer)
    if not isinstance(steer, tuple) or all(isinstance(vector, ControlVector) for vector in steer):
        return [steer] * n
    if len(steer) != n:
        raise PromptError(
            f"steer has {len(steer)} entries for {n} prompts: pass one for each, or one for all."
        )
    return steer


def _sampling_of_each(sampling: Sampling | Sequence[Sampling] | None, n: int) -> Sequence[Sampling]:
    if sampling is None or isinstance(sampling, Sampling):
        one = sampling or Sampling()
        if one.seed is None or one.is_argmax:
            return [one] * n
        return [replace(one, seed=one.seed + i) for i in range(n)]
    if len(sampling) != n:
        raise LocalsteerError(
            f"sampling has {len(sampling)} entries for {n} prompts: pass one for each, or one for all."
        )
    return sampling
