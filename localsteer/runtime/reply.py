"""What comes of a prompt: chunks, the reply that they make, its text and its times."""

from __future__ import annotations

import codecs
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .ask import check_stop


@dataclass(frozen=True)
class Timings:
    """prompt_seconds: from the start to the logits of the prompt's last token; decode_seconds: from there on.

    Counted from the moment when the prompt got its place; replies of one batch share that time.
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
        # the likeliest first, and then in their order: to sort the whole vocabulary takes 10 ms
        best = (
            np.argpartition(-logprobs, n_top)[:n_top]
            if 0 < n_top < len(logprobs)
            else np.arange(min(n_top, len(logprobs)))
        )
        best = best[np.lexsort((best, -logprobs[best]))].tolist()
        return cls(float(logprobs[token]), tuple((token, float(logprobs[token])) for token in best))


@dataclass(frozen=True)
class Chunk:
    """One token of a reply. `text` holds whole characters only, so it may be empty, or finish earlier tokens.

    token: None for the end-of-generation token, which is not part of the reply. finish_reason: set in the
    last chunk alone, "stop" (the model ended, or a stop string came) or "length"; timings likewise.
    scores: where the request asked for them, at every token of the reply. stopped_by: the stop string that
    came.
    """

    text: str
    token: int | None
    finish_reason: str | None = None
    timings: Timings | None = None
    scores: TokenScores | None = None
    stopped_by: str | None = None


@dataclass(frozen=True)
class Reply:
    """text ends before a stop string, which stopped_by names; tokens has all that were drawn but the
    end-of-generation token."""

    text: str
    tokens: list[int]
    finish_reason: str
    timings: Timings = field(default_factory=Timings)
    stopped_by: str | None = None

    @classmethod
    def of(cls, chunks: Sequence[Chunk]) -> Reply:
        """What the chunks of one reply make, the last of which has a finish reason."""
        last = chunks[-1]
        return cls(
            text="".join(chunk.text for chunk in chunks),
            tokens=[chunk.token for chunk in chunks if chunk.token is not None],
            finish_reason=last.finish_reason or "",
            timings=last.timings or Timings(),
            stopped_by=last.stopped_by,
        )


class TextStream:
    """Bytes of tokens in, text out: whole UTF-8 characters only, nothing of a stop string.

    Stop strings are sought in the bytes: UTF-8 has no character inside another, so no false hit is possible.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._stops = [text.encode("utf-8") for text in check_stop(stop)]
        self._held = b""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.stopped_by: str | None = None

    @property
    def stopped(self) -> bool:
        return self.stopped_by is not None

    def push(self, piece: bytes) -> str:
        """The text that is certain now. After a stop string `stopped_by` is set and the rest is dropped."""
        self._held += piece
        cut = self._find_stop()
        if cut is not None:
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
        found = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if not found:
            return None
        # where two begin at one place the longer one is told, as the one that says more
        at, stop = min(found, key=lambda place: (place[0], -len(place[1])))
        self.stopped_by = stop.decode("utf-8")
        return at

    def _possible_stop(self) -> int:
        """Length of the longest end of the held bytes that begins a stop string."""
        longest = max(map(len, self._stops), default=1) - 1
        for n in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-n:]) for stop in self._stops):
                return n
        return 0


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
