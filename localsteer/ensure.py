"""Steer only when needed: a plain reply first, and steered ones only if it fails.

    ensured = ensure(engine, "Tell me about foxes.", [json])
    ensured.reply.text, ensured.passed, ensured.notice

A plain reply that follows is kept, so steering can't cost it any quality. Each vector brings its own verifier
(`provenance`). With greedy sampling, the first steered try is the reply of `steer=[json]`, so no fewer
replies follow than with steering.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from threading import Event
from typing import TYPE_CHECKING, Any, TypedDict

from .catalog import Instruction
from .errors import LocalsteerError, PlanError
from .plan import Plan
from .runtime.ask import Ask
from .runtime.reply import Chunk, Reply, Timings
from .runtime.sampling import Sampling
from .vector import ControlVector
from .verify.quality import is_degenerate
from .verify.verdicts import check_arguments, verify
from .verify.verifiers.early import hopeless

if TYPE_CHECKING:
    from .engine import Engine
    from .runtime.ask import Prompt
    from .runtime.scheduler import Scheduler

TRIES = 3
BOUNDS = (0.5, 1.5)  # multiples of a vector's own strength, if its tuning tried no others
RARER = 4096  # characters; the longer the reply, the less often it is checked
STOPPED = "stopped"  # finish_reason of a try that could no longer pass
ENDED = ("cancelled", "deadline")  # finish reasons after which nothing is tried again


class TryRecord(TypedDict):
    strengths: list[float]
    failed: list[str]
    degenerate: str | None
    finish_reason: str
    n_tokens: int


class EnsuredRecord(TypedDict):
    """For JSON, without the reply."""

    passed: bool
    steered_strength: float
    notice: str
    n_tokens: int
    tries: list[TryRecord]


@dataclass(frozen=True)
class Try:
    """One reply. factor: the multiple of each vector's own strength, 0 for the plain reply; strengths: the
    result. failed: names of the vectors whose verifiers it fails, only those that are certain if its
    finish_reason is "stopped". degenerate: why it is degenerate (quality.py), or None."""

    reply: Reply
    factor: float
    strengths: tuple[float, ...]
    failed: tuple[str, ...]
    degenerate: str | None

    @property
    def passed(self) -> bool:
        return not self.failed and self.degenerate is None

    @property
    def stopped(self) -> bool:
        return self.reply.finish_reason == STOPPED

    def record(self) -> TryRecord:
        return {
            "strengths": list(self.strengths),
            "failed": list(self.failed),
            "degenerate": self.degenerate,
            "finish_reason": self.reply.finish_reason,
            "n_tokens": len(self.reply.tokens),
        }


@dataclass(frozen=True)
class Ensured:
    """reply: the first that passed, or the best. tries: in order, including repeated ones.

    steered_strength: the strength with which `reply` was steered, 0 if it is plain; for several vectors, the
    multiple of their own strengths. notice: one line for the user if none passed, else "".
    """

    reply: Reply
    tries: tuple[Try, ...]
    passed: bool
    steered_strength: float
    notice: str = ""

    @property
    def n_tokens(self) -> int:
        """Generated in all tries together."""
        return sum(len(attempt.reply.tokens) for attempt in self.tries)

    def record(self) -> EnsuredRecord:
        return {
            "passed": self.passed,
            "steered_strength": self.steered_strength,
            "notice": self.notice,
            "n_tokens": self.n_tokens,
            "tries": [attempt.record() for attempt in self.tries],
        }


@dataclass(frozen=True)
class Requirement:
    """One vector's verifier with its arguments, ready for use."""

    name: str
    verifier: str
    arguments: Mapping[str, Any]

    @classmethod
    def of(cls, vector: ControlVector, asked: str) -> Requirement:
        """asked: the user's words, which some verifiers compare with. Raises PlanError, CatalogError."""
        known = vector.provenance
        if not known.get("verifier"):
            raise PlanError(
                f"{vector.label} names no verifier, so nothing can judge whether a reply follows "
                "it: steer by it "
                "(-s), or tune it with --verifier first."
            )
        bare = Instruction(vector.label, (), kwargs=known.get("kwargs") or {})
        arguments = check_arguments(known["verifier"], bare.kwargs_for(asked), prompt=asked)
        return cls(vector.label, known["verifier"], arguments)

    def passes(self, text: str) -> bool:
        return verify(self.verifier, text, self.arguments)

    def is_hopeless(self, text: str) -> bool:
        return hopeless(self.verifier, text, self.arguments)


def ensure(
    source: Engine | Scheduler,
    prompt: Prompt | Ask,
    vectors: ControlVector | Sequence[ControlVector],
    *,
    tries: int = TRIES,
    strengths: Sequence[float] | None = None,
    ridge: float = 0.0,
    deadline: float | None = None,
    cancel: Event | None = None,
    on_try: Callable[[int, float], None] | None = None,
    **fields: Any,
) -> Ensured:
    """A reply that passes each vector's verifier and is not degenerate, if there is one among `tries`
    replies.

    The plain reply comes first, then steered ones: at the vectors' own strengths, then stronger, up to what
    their tuning tried (`provenance["validation"]`), else by half; after a degenerate reply weaker instead. A
    reply is stopped as soon as it can no longer pass. If none passes, the result is the one that fails the
    fewest verifiers, preferably not degenerate, preferably plain; a reply that had been stopped is generated
    again.

    fields: of Ask; its steer (vectors, not a plan) is applied in every try, unverified; all tries share one
    seed. tries: at most this many replies, including the plain one. strengths: multiples of the vectors' own
    strengths to try instead of those above. deadline: seconds for everything; cancel: ends it from another
    thread; both return what there is by then. on_try: called with (number of the try, its multiple, 0 =
    plain).

    Raises PlanError for a vector without a verifier, and what Engine.stream and Scheduler.submit raise.
    """
    vectors = [vectors] if isinstance(vectors, ControlVector) else list(vectors)
    if not vectors:
        raise PlanError("there is nothing to ensure: name at least one vector.")
    if tries < 1:
        raise LocalsteerError(f"tries must be at least 1, not {tries}.")
    ask = Ask.of(prompt, **fields)
    ask = replace(ask, sampling=_with_seed(ask.sampling))
    asked = asked_of(ask.prompt)
    run = _Tries(
        source,
        ask,
        vectors,
        [Requirement.of(vector, asked) for vector in vectors],
        ridge,
        None if deadline is None else time.monotonic() + deadline,
        cancel or Event(),
        on_try or (lambda _number, _factor: None),
    )
    run.check_plans()
    for factor in _Ladder(vectors, tries, strengths, run):
        attempt = run.attempt(factor)
        if attempt.passed or attempt.reply.finish_reason in ENDED:
            break
    return run.result()


def asked_of(prompt: Prompt) -> str:
    """The user's own words: the text, or the last message of the user."""
    if isinstance(prompt, str):
        return prompt
    said = [message["content"] for message in prompt if message["role"] == "user"]
    return said[-1] if said else ""


def bounds_of(vector: ControlVector) -> tuple[float, float]:
    """The weakest and the strongest strength that its tuning found usable with these settings, its own
    included; where tuning tried one strength only, or there was none, half and half as much again."""
    own = vector.strength
    tried = [row["strength"] for row in _tuning_rows(vector) if _is_like(row, vector)]
    known = sorted({own, *(strength for strength in tried if strength * own > 0)}, key=abs)
    if len(known) > 1:
        return known[0], known[-1]
    return BOUNDS[0] * own, BOUNDS[1] * own


def _tuning_rows(vector: ControlVector) -> list[Mapping[str, Any]]:
    """The settings that were tried, as first use (a list) or `tune` (a table with columns) keeps them."""
    kept = vector.provenance.get("validation") or ()
    if isinstance(kept, Mapping):
        columns, n = kept.get("columns") or (), kept.get("n")
        kept = [dict(zip(columns, row, strict=False)) for row in kept.get("table") or ()]
        # the quick search leaves settings after a few replies: nobody saw whether others would have looped
        kept = [row for row in kept if row.get("n", n) == n]
    return [row for row in kept if isinstance(row, Mapping) and isinstance(row.get("strength"), (int, float))]


def _is_like(row: Mapping[str, Any], vector: ControlVector) -> bool:
    """The same place and mode, and some replies that followed without becoming degenerate."""
    same = row.get("layer") in vector.layers and row.get("positions") == vector.positions
    return same and row.get("mode") == vector.mode and not row.get("degenerate") and bool(row.get("score"))


class _Ladder:
    """Multiples of the vectors' own strengths: 0, 1, then up to the bounds; down after a degenerate reply."""

    def __init__(
        self, vectors: Sequence[ControlVector], tries: int, given: Sequence[float] | None, run: _Tries
    ) -> None:
        self.vectors, self.n, self.given, self.run = vectors, tries - 1, given, run

    def __iter__(self) -> Iterator[float]:
        yield 0.0
        steered = [vector for vector in self.vectors if vector.strength]
        if not steered:
            return
        if self.given is not None:
            yield from self.given[: self.n]
            return
        bounds = [[bound / vector.strength for bound in bounds_of(vector)] for vector in steered]
        low, high = max(low for low, _ in bounds), min(high for _, high in bounds)
        for k in range(self.n):
            if k == 0:
                yield 1.0
                end = low if self.run.tries[-1].degenerate else high
            else:
                yield 1.0 + (end - 1.0) * k / (self.n - 1)
                if end == high and self.run.tries[-1].degenerate:
                    return  # stronger still would be worse


@dataclass
class _Tries:
    """What the tries of one call share. ends: on time.monotonic's clock."""

    source: Engine | Scheduler
    ask: Ask
    vectors: Sequence[ControlVector]
    checks: Sequence[Requirement]
    ridge: float
    ends: float | None
    cancel: Event
    on_try: Callable[[int, float], None]
    tries: list[Try] = field(default_factory=list)

    def check_plans(self) -> None:
        """Before a token is generated: a vector of another model, directions that are nearly parallel."""
        engine = getattr(self.source, "engine", self.source)
        for vector in (*self._base, *self.vectors):
            engine.plan(vector)
        engine.plan(self.plan(1.0))

    @property
    def _base(self) -> Sequence[ControlVector]:
        steer = self.ask.steer
        return [steer] if isinstance(steer, ControlVector) else steer or ()

    def plan(self, factor: float) -> Plan:
        return Plan.from_vectors([*self._base, *self._at(factor)], ridge=self.ridge)

    def attempt(self, factor: float, *, whole: bool = False) -> Try:
        """Generate and judge one reply; whole: also where it can't pass."""
        self.on_try(len(self.tries) + 1, factor)
        reply, hopeless_names = self._generate(factor, whole)
        failed = hopeless_names or tuple(check.name for check in self.checks if not check.passes(reply.text))
        strengths = tuple(vector.strength for vector in self._at(factor))
        attempt = Try(reply, factor, strengths, failed, is_degenerate(reply.text))
        self.tries.append(attempt)
        return attempt

    def result(self) -> Ensured:
        """The best try. A stopped one may fail more verifiers than it had by then: it is judged whole."""
        candidates = list(self.tries)
        best = min(candidates, key=_rank)
        while best.stopped and not self._is_over():
            candidates.remove(best)
            candidates.append(self.attempt(best.factor, whole=True))
            best = min(candidates, key=_rank)
        single = len(self.vectors) == 1
        strength = best.strengths[0] if single and best.strengths else best.factor
        return Ensured(best.reply, tuple(self.tries), best.passed, strength, self._notice(best))

    def _at(self, factor: float) -> list[ControlVector]:
        if factor == 0:
            return []
        return [vector.at(strength=vector.strength * factor) for vector in self.vectors]

    def _generate(self, factor: float, whole: bool) -> tuple[Reply, tuple[str, ...]]:
        """The reply, and who can't pass it any more where that ended it."""
        texts: list[str] = []
        tokens: list[int] = []
        n_chars = due = 0
        reason, timings, stop = "", Timings(), None
        with closing(self._chunks(factor)) as chunks:
            for chunk in chunks:
                texts.append(chunk.text)
                tokens += [] if chunk.token is None else [chunk.token]
                if chunk.finish_reason:
                    reason, timings = chunk.finish_reason, chunk.timings or timings
                    stop = chunk.stopped_by
                    break
                if reason := self._why_over():
                    break
                n_chars += len(chunk.text)
                if whole or not chunk.text or n_chars < due:
                    continue
                if names := self._hopeless("".join(texts)):
                    return Reply("".join(texts), tokens, STOPPED), names
                due = n_chars + n_chars // RARER
        return Reply("".join(texts), tokens, reason, timings, stop), ()

    def _chunks(self, factor: float) -> Iterator[Chunk]:
        ask = replace(self.ask, steer=self.plan(factor))
        if not hasattr(self.source, "submit"):
            with closing(self.source.stream(ask)) as chunks:
                yield from chunks
            return
        left = None if self.ends is None else max(0.0, self.ends - time.monotonic())
        ticket = self.source.submit(ask, deadline=left)
        try:
            yield from ticket
        finally:
            ticket.cancel()

    def _hopeless(self, text: str) -> tuple[str, ...]:
        return tuple(check.name for check in self.checks if check.is_hopeless(text))

    def _why_over(self) -> str:
        if self.cancel.is_set():
            return "cancelled"
        return "deadline" if self.ends is not None and time.monotonic() >= self.ends else ""

    def _is_over(self) -> bool:
        return bool(self._why_over()) or self.tries[-1].reply.finish_reason in ENDED

    def _notice(self, best: Try) -> str:
        if best.passed:
            return ""
        n = len({attempt.factor for attempt in self.tries})  # some may have been generated twice
        why = f"fails {', '.join(best.failed)}" if best.failed else f"is {best.degenerate}"
        how = f"steered at {', '.join(f'{s:g}' for s in best.strengths)}" if best.strengths else "plain"
        unsteered = [vector.label for vector in self.vectors if not vector.strength]
        more = f"; {', '.join(unsteered)} has strength 0" if unsteered else ""
        replies = "the only reply" if n == 1 else f"none of {n} replies passes; the best one"
        return f"{replies} ({how}) {why}{more}."


def _rank(made: Try) -> tuple[int, bool, float]:
    """The better, the lower. A stopped try counts as failing what is certain, so it may still fall behind."""
    return len(made.failed), made.degenerate is not None, made.factor


def _with_seed(sampling: Sampling) -> Sampling:
    """A reply that was stopped must be the same when it is generated again."""
    if sampling.seed is not None or sampling.is_argmax:
        return sampling
    return replace(sampling, seed=random.randrange(2**32 - 1))
