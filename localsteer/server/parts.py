"""What faces and pipeline share: the parts of an answer, the interface that makes them and the one that
writes them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from localsteer.jsonable import JsonObject

from .models import Served
from .schemas import SamplingFields
from .streaming import Stream
from .tools import Call

if TYPE_CHECKING:
    from localsteer.runtime.reply import Timings, TokenScores


@dataclass(frozen=True)
class Usage:
    """Numbers of tokens. cached: tokens of the prompt that came from the cache."""

    prompt: int
    reply: int
    cached: int = 0


@dataclass(frozen=True)
class Part:
    """The next part of one choice. calls come at its end; reason only in its last part: "stop", "length" or
    "tool_calls". stop: the stop string of the request that ended it."""

    choice: int
    text: str = ""
    scores: Sequence[tuple[int, TokenScores]] = ()
    calls: Sequence[Call] = ()
    reason: str | None = None
    stop: str | None = None
    timings: Timings | None = None


@dataclass
class WholeReply:
    """One choice, collected from its parts."""

    text: str = ""
    scores: list[tuple[int, TokenScores]] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    reason: str = "stop"
    stop: str | None = None
    timings: Timings | None = None

    def add(self, part: Part) -> None:
        self.text += part.text
        self.scores += part.scores
        self.calls += part.calls
        if part.reason:
            self.reason, self.stop, self.timings = part.reason, part.stop, part.timings
            self.text = self.text.strip() if self.calls else self.text


class Answer(Protocol):
    """An answer in progress. body: the request. n: choices."""

    body: SamplingFields
    served: Served
    n: int

    @property
    def usage(self) -> Usage: ...
    @property
    def left_out(self) -> Mapping[str, Any]:
        """Fields about the steering that are known from the beginning."""
        ...

    @property
    def told(self) -> JsonObject:
        """The same at the end, when more is known."""
        ...

    def parts(self) -> AsyncIterator[Part]:
        """Yields parts to the end of the last choice. Raises ApiError."""
        ...

    def end(self) -> None:
        """Release everything; a second call does nothing."""
        ...


class Face(Protocol):
    """How one API writes an answer. names: its names for the fields of a ChatRequest, for refusals."""

    stream: Stream
    names: Mapping[str, str]

    def document(self, answer: Answer, replies: list[WholeReply]) -> JsonObject: ...
    def events(self, answer: Answer) -> AsyncIterator[bytes]: ...
