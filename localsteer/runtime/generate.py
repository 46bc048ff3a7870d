"""From a prompt to text, in three rungs: `token_steps` -> `stream` -> `generate`. Many at once: batch.py.

All of them work on an Engine and are its methods too: engine.generate(...) is generate(engine, ...).
"""

from __future__ import annotations

import codecs
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

import numpy as np

from ..constrain import Constraint, Matcher
from ..errors import LocalsteerError, PromptError
from ..plan import Plan, PositionClass, position_classes
from .bridge import Sampler

if TYPE_CHECKING:
    from ..engine import Engine, Prompt, Steer


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn, by llama.cpp's names and defaults; `temp` 0 is greedy.

    seed: None draws one. repeat_last_n: tokens of the reply that penalties look back on, -1 = all of them.
    grammar: what the reply must be, a Constraint or GBNF text. Raises LocalsteerError for a value out of
    range.
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

    def __post_init__(self) -> None:
        for name in ("temp", "repeat_penalty", "presence_penalty", "frequency_penalty"):
            if not math.isfinite(getattr(self, name)):
                raise LocalsteerError(f"{name} must be a finite number, not {getattr(self, name)}.")
        for name in ("top_p", "min_p"):
            if not 0 <= getattr(self, name) <= 1:
                raise LocalsteerError(f"{name} must be 0 to 1, not {getattr(self, name)}.")
        if self.repeat_penalty <= 0:
            raise LocalsteerError(f"repeat_penalty must be above 0, not {self.repeat_penalty}.")

    @property
    def is_argmax(self) -> bool:
        """Whether the token is simply the one with the largest logit."""
        penalties = (self.repeat_penalty, self.presence_penalty, self.frequency_penalty)
        return self.temp <= 0 and self.grammar is None and penalties == (1.0, 0.0, 0.0)


GREEDY = Sampling(temp=0.0)


@dataclass(frozen=True)
class Timings:
    """prompt_seconds: from the start to the logits of the prompt's last token; decode_seconds: from there on.

    A batch counts from the moment when the prompt joined it, and shares that time with its neighbours.
    """

    prompt_tokens: int = 0
    reply_tokens: int = 0
    prompt_seconds: float = 0.0
    decode_seconds: float = 0.0
    first_token_seconds: float = 0.0

    @property
    def prompt_per_second(self) -> float:
        return self.prompt_tokens / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def decode_per_second(self) -> float:
        """The first token of a reply comes from the prompt, so it is not counted."""
        return max(0, self.reply_tokens - 1) / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(frozen=True)
class TokenScores:
    """Natural log-probabilities under the model as it is steered, before temperature and other samplers.

    logprob: of the token that was drawn. top: (token, log-probability) of the likeliest, the best first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()

    @classmethod
    def of(cls, logits: np.ndarray, token: int, n_top: int) -> TokenScores:
        """logits: (n_vocab,)."""
        logits = logits.astype(np.float64)
        peak = logits.max()
        logprobs = logits - peak - np.log(np.exp(logits - peak).sum())
        best = np.argsort(-logprobs, kind="stable")[:n_top]
        return cls(float(logprobs[token]), tuple((int(each), float(logprobs[each])) for each in best))


@dataclass(frozen=True)
class Chunk:
    """One token of a reply. `text` holds whole characters only, so it may be empty, or finish earlier tokens.

    token: None for the end-of-generation token, which is no part of the reply. finish_reason: set in the
    last chunk alone, "stop" (the model ended, or a stop string came) or "length"; timings likewise.
    scores: where the request asked for them, at every token of the reply.
    """

    text: str
    token: int | None
    finish_reason: str | None = None
    timings: Timings | None = None
    scores: TokenScores | None = None


@dataclass(frozen=True)
class Reply:
    """text ends before a stop string; tokens has all that were drawn but the end-of-generation token."""

    text: str
    tokens: list[int]
    finish_reason: str
    timings: Timings = field(default_factory=Timings)


class TextStream:
    """Bytes of tokens in, text out: whole UTF-8 characters only, nothing of a stop string.

    Stop strings are sought in the bytes: UTF-8 has no character inside another, so no false hit is possible.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._stops = [text.encode("utf-8") for text in check_stop(stop)]
        self._held = b""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.stopped = False

    def push(self, piece: bytes) -> str:
        """The text that is certain now. After a stop string `stopped` is set and the rest is dropped."""
        self._held += piece
        cut = self._find_stop()
        if cut is not None:
            self.stopped = True
            ready, self._held = self._held[:cut], b""
            return self._decoder.decode(ready, final=True)
        cut = len(self._held) - self._possible_stop()
        ready, self._held = self._held[:cut], self._held[cut:]
        return self._decoder.decode(ready)

    def finish(self) -> str:
        """The text still held back; half a character becomes U+FFFD."""
        ready, self._held = self._held, b""
        return self._decoder.decode(ready, final=True)

    def _find_stop(self) -> int | None:
        found = [at for at in map(self._held.find, self._stops) if at >= 0]
        return min(found) if found else None

    def _possible_stop(self) -> int:
        """Length of the longest end of the held bytes that begins a stop string."""
        longest = max(map(len, self._stops), default=1) - 1
        for n in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-n:]) for stop in self._stops):
                return n
        return 0


def check_stop(stop: Sequence[str]) -> list[str]:
    """Stop strings as a list. Raises LocalsteerError for an empty one: it would stop every reply at once."""
    stops = [stop] if isinstance(stop, str) else list(stop)
    if any(not text for text in stops):
        raise LocalsteerError("a stop string must not be empty.")
    return stops


def stops_of(engine: Engine, stop: Sequence[str] = (), raw: bool = False) -> list[str]:
    """Stop strings of one reply: the caller's, and those that the prompt's form needs (ChatTemplate.stop).

    raw: the prompt went in as it is, so it has no form. Raises LocalsteerError for an empty one.
    """
    asked = check_stop(stop)
    return asked if raw else list(dict.fromkeys([*asked, *engine.template.stop]))


# --- one reply ---------------------------------------------------------------------------------------------


def token_steps(
    engine: Engine, prompt: Sequence[int], *, plan: Plan | None = None, sampling: Sampling = GREEDY
) -> Iterator[int]:
    """Token after token, end-of-generation tokens included, until the caller stops asking.

    At most n_ctx - len(prompt) of them. The last one drawn is not decoded until the next is asked for.
    Raises PromptError for a prompt that leaves no room for a reply.
    """
    check_room(engine, len(prompt))
    sampler = new_sampler(engine, sampling)
    try:
        run = engine.begin()
        _prefill(engine, np.asarray(prompt, np.int32), plan)
        for position in range(len(prompt), engine.n_ctx):
            token = sampler.sample(engine.context) if sampler else _argmax(engine)
            yield token
            engine.check_run(run)
            if position + 1 < engine.n_ctx:
                engine.context.decode(
                    [token], [position], [0], [True], plans=[plan], classes=[PositionClass.GENERATION]
                )
    finally:
        if sampler:
            sampler.close()


def stream(
    engine: Engine,
    prompt: Prompt,
    *,
    steer: Steer = (),
    max_tokens: int | None = 512,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    raw: bool = False,
) -> Iterator[Chunk]:
    """A reply as it comes. Prompt, plan and settings are checked here and now; a grammar at the first chunk.

    prompt: a question, messages, or with `raw` a text that goes in as it is. max_tokens: None = until the
    context is full. Exactly one chunk, the last, has a finish_reason. Raises PromptError, MismatchError.
    """
    started = time.perf_counter()
    plan = engine.plan(steer)
    tokens = engine.prompt_tokens(prompt, raw)
    check_room(engine, len(tokens))
    budget = reply_budget(engine, len(tokens), max_tokens)
    text = TextStream(stops_of(engine, stop, raw))
    steps = token_steps(engine, tokens, plan=plan, sampling=sampling or Sampling())
    return _chunks(engine, steps, text, budget, Clock(started, len(tokens)))


def generate(
    engine: Engine,
    prompt: Prompt,
    *,
    steer: Steer = (),
    max_tokens: int | None = 512,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    raw: bool = False,
) -> Reply:
    """The whole reply; arguments and errors as `stream` has them."""
    chunks = list(
        stream(engine, prompt, steer=steer, max_tokens=max_tokens, sampling=sampling, stop=stop, raw=raw)
    )
    return Reply(
        text="".join(chunk.text for chunk in chunks),
        tokens=[chunk.token for chunk in chunks if chunk.token is not None],
        finish_reason=chunks[-1].finish_reason or "length",
        timings=chunks[-1].timings or Timings(),
    )


def new_matcher(engine: Engine, sampling: Sampling) -> Matcher | None:
    """Raises ConstraintError for a grammar that can't be read or enforced."""
    return None if sampling.grammar is None else engine.matcher(Constraint.of(sampling.grammar))


def new_sampler(engine: Engine, sampling: Sampling, matcher: Matcher | None = None) -> Sampler | None:
    """A sampler of its own for one reply; None where the largest logit is all that counts.

    matcher: of the reply, where its grammar has been compiled already.
    """
    if sampling.is_argmax:
        return None
    settings = {
        each.name: getattr(sampling, each.name) for each in fields(sampling) if each.name != "grammar"
    }
    if sampling.repeat_last_n < 0:
        settings["repeat_last_n"] = engine.n_ctx  # llama.cpp's sampler itself takes -1 for off
    return Sampler(engine.model, **settings, matcher=matcher or new_matcher(engine, sampling))


def check_room(engine: Engine, n_prompt: int) -> None:
    """Raise PromptError unless at least one token of a reply fits behind the prompt."""
    if n_prompt >= engine.n_ctx:
        raise PromptError(
            f"the prompt has {n_prompt} tokens and the context {engine.n_ctx}, reply included: "
            "shorten the prompt, or raise n_ctx (-c) if the model allows more."
        )


def reply_budget(engine: Engine, n_prompt: int, max_tokens: int | None) -> int:
    """How many tokens a reply may have. A full context ends it as max_tokens does."""
    if max_tokens is not None and max_tokens < 0:
        raise PromptError(f"max_tokens must not be negative, not {max_tokens}.")
    room = engine.n_ctx - n_prompt
    return room if max_tokens is None else min(room, max_tokens)


def _prefill(engine: Engine, tokens: np.ndarray, plan: Plan | None) -> None:
    """Decode a prompt in chunks of n_batch; output row 0 of the last one is its last token's."""
    size = engine.context.n_batch
    for start in range(0, len(tokens), size):
        positions = np.arange(start, min(start + size, len(tokens)))
        engine.context.decode(
            tokens[positions],
            positions,
            np.zeros_like(positions),
            positions == len(tokens) - 1,
            plans=[plan] * len(positions),
            classes=position_classes(positions, len(tokens)),
        )


def _chunks(
    engine: Engine, steps: Iterator[int], text: TextStream, budget: int, clock: Clock
) -> Iterator[Chunk]:
    try:
        for n in range(1, budget + 1):
            token = next(steps)
            clock.tick()
            if engine.ends(token):
                yield Chunk(text.finish(), None, "stop", clock.timings(n - 1))
                return
            new = text.push(engine.piece(token))
            if text.stopped:
                yield Chunk(new, token, "stop", clock.timings(n))
                return
            if n == budget:
                yield Chunk(new + text.finish(), token, "length", clock.timings(n))
                return
            yield Chunk(new, token)
        yield Chunk("", None, "length", clock.timings(0))
    finally:
        steps.close()


class Clock:
    """When a reply's first and latest tokens came, against its start."""

    def __init__(self, started: float, n_prompt: int) -> None:
        self.started = started
        self.n_prompt = n_prompt
        self.first = self.latest = 0.0

    def tick(self) -> None:
        self.latest = time.perf_counter() - self.started
        self.first = self.first or self.latest

    def timings(self, n_reply: int) -> Timings:
        return Timings(
            prompt_tokens=self.n_prompt,
            reply_tokens=n_reply,
            prompt_seconds=self.first,
            decode_seconds=self.latest - self.first,
            first_token_seconds=self.first,
        )


def _argmax(engine: Engine) -> int:
    return int(largest(engine.context.all_logits())[0])


def largest(logits: np.ndarray) -> np.ndarray:
    """The token with the largest logit of each row: (n, n_vocab) -> (n,). Raises LocalsteerError for NaN."""
    tokens = logits.argmax(axis=1)
    if not np.isfinite(logits[np.arange(len(tokens)), tokens]).all():
        raise LocalsteerError("the model gave no finite logits: lower the strength of the steering.")
    return tokens
