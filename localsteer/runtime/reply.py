"""What a prompt leads to: chunks, the reply they form, its text and its timings."""

from __future__ import annotations

import codecs
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .ask import check_stop


@dataclass(frozen=True)
class Timings:
    """Times of one reply. prompt_seconds: from the start to the logits of the prompt's last token;
    decode_seconds: from there on.

    Counted from the moment at which the prompt got its slot; replies of one batch share that time.
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
        """Tokens per second, without the first token of the reply, which comes from the prompt."""
        return max(0, self.reply_tokens - 1) / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(frozen=True)
class TokenScores:
    """Natural log-probabilities under the steered model, before temperature and other samplers.

    logprob: of the token that was drawn. top: (token, log-probability) of the likeliest, best first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()

    @classmethod
    def of(cls, logits: np.ndarray, token: int, n_top: int) -> TokenScores:
        """The scores of a token. logits: (n_vocab,)."""
        logits = logits.astype(np.float64)
        peak = logits.max()
        logprobs = logits - peak - np.log(np.exp(logits - peak).sum())
        # first pick the likeliest, then sort these: sorting the whole vocabulary takes 10 ms
        best = (
            np.argpartition(-logprobs, n_top)[:n_top]
            if 0 < n_top < len(logprobs)
            else np.arange(min(n_top, len(logprobs)))
        )
        best = best[np.lexsort((best, -logprobs[best]))].tolist()
        return cls(float(logprobs[token]), tuple((token, float(logprobs[token])) for token in best))


@dataclass(frozen=True)
class Chunk:
    """One token of a reply. `text` holds only whole characters, so it may be empty, or complete earlier
    tokens.

    token: None for the end-of-generation token, which is not part of the reply. finish_reason: set only in
    the last chunk, "stop" (the model ended, or a stop string came) or "length"; timings likewise. scores: if
    the request asked for them, at every token of the reply. stopped_by: the stop string that ended the reply.
    """

    text: str
    token: int | None
    finish_reason: str | None = None
    timings: Timings | None = None
    scores: TokenScores | None = None
    stopped_by: str | None = None


@dataclass(frozen=True)
class Reply:
    """A whole reply. text ends before the stop string, which stopped_by names; tokens has all tokens drawn
    except the end-of-generation token."""

    text: str
    tokens: list[int]
    finish_reason: str
    timings: Timings = field(default_factory=Timings)
    stopped_by: str | None = None

    @classmethod
    def of(cls, chunks: Sequence[Chunk]) -> Reply:
        """The reply that chunks form, the last of which has a finish reason."""
        last = chunks[-1]
        return cls(
            text="".join(chunk.text for chunk in chunks),
            tokens=[chunk.token for chunk in chunks if chunk.token is not None],
            finish_reason=last.finish_reason or "",
            timings=last.timings or Timings(),
            stopped_by=last.stopped_by,
        )


class TextStream:
    """Turns the bytes of tokens into text: only whole UTF-8 characters, and nothing of a stop string.

    Stop strings are searched in the bytes: in UTF-8 no character occurs inside another, so there are no false
    hits.
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
        """Take in bytes and return the text that is now certain. A stop string sets `stopped_by` and drops
        the rest."""
        self._held += piece
        cut = self._find_stop()
        if cut is not None:
            ready, self._held = self._held[:cut], b""
            return self._decoder.decode(ready, final=True)
        cut = len(self._held) - self._possible_stop()
        ready, self._held = self._held[:cut], self._held[cut:]
        return self._decoder.decode(ready)

    def finish(self) -> str:
        """The text still held back, with U+FFFD for half a character."""
        ready, self._held = self._held, b""
        return self._decoder.decode(ready, final=True)

    def _find_stop(self) -> int | None:
        stops = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if not stops:
            return None
        # if two begin at the same place, the longer one is reported
        at, stop = min(stops, key=lambda place: (place[0], -len(place[1])))
        self.stopped_by = stop.decode("utf-8")
        return at

    def _possible_stop(self) -> int:
        """The length of the longest end of the held bytes that begins a stop string."""
        longest = max(map(len, self._stops), default=1) - 1
        for n in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-n:]) for stop in self._stops):
                return n
        return 0


class Clock:
    """Measures when a reply's first and latest tokens came, relative to its start."""

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
