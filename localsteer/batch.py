"""Many replies at once: one decode a step for all, each sequence with its own plan and sampler."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from .engine import position_classes
from .errors import LocalsteerError, PromptError
from .generate import Clock, Reply, Sampling, check_room, check_stop, largest, new_sampler, reply_budget
from .plan import Plan, PositionClass
from .vector import ControlVector

if TYPE_CHECKING:
    from .bridge import Sampler
    from .engine import Engine, Prompt, Steer

_GENERATION = int(PositionClass.GENERATION)  # a plain number: an enum costs time at every token


def generate_batch(
    engine: Engine,
    prompts: Sequence[Prompt],
    *,
    steer: Steer | Sequence[Steer] = (),
    max_tokens: int | None = 512,
    sampling: Sampling | Sequence[Sampling] | None = None,
    stop: Sequence[str] = (),
    raw: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Reply]:
    """Replies in the order of the prompts; up to n_seq_max sequences go through each decode together.

    In the default context a sequence's numbers depend a little on its neighbours (other kernels for one row
    and for many), so that a greedy reply can differ from the one alone; with Engine(exact=True) it doesn't.

    steer: one list of vectors (or one Plan) for all prompts, or one such thing for each prompt. sampling: one
    for all, where prompt i gets seed + i, or one each. on_progress: called with (replies done, prompts).
    Raises PromptError, naming the prompt by its index, before anything is decoded.
    """
    plans = _plans_of(engine, steer, len(prompts))
    samplings = _samplings_of(sampling, len(prompts))
    stops = [text.encode("utf-8") for text in check_stop(stop)]
    waiting = deque(
        _sequence(engine, i, prompt, raw, max_tokens, plan, drawn)
        for i, (prompt, plan, drawn) in enumerate(zip(prompts, plans, samplings, strict=True))
    )
    replies: list[Reply | None] = [None] * len(prompts)
    batch = _Batch(engine, waiting, stops)
    try:
        for n, (index, reply) in enumerate(batch.run(), 1):
            replies[index] = reply
            if on_progress:
                on_progress(n, len(prompts))
    finally:
        batch.close()
    return replies


@dataclass(eq=False)
class _Sequence:
    """One prompt on its way to a reply. pending: tokens that are not decoded yet, prompt or last drawn."""

    index: int
    pending: list[int]
    n_prompt: int
    budget: int
    plan: Plan | None
    sampling: Sampling
    clock: Clock
    slot: int = -1  # llama.cpp's sequence id while it is live
    n_past: int = 0
    tokens: list[int] = field(default_factory=list)
    tail: bytes = b""  # the text's last bytes, where a stop string may be
    sampler: Sampler | None = None

    @property
    def n_cells(self) -> int:
        return self.n_prompt + self.budget


class _Batch:
    """Slots of the context that sequences pass through: one joins as soon as another ends."""

    def __init__(self, engine: Engine, waiting: deque[_Sequence], stops: Sequence[bytes]) -> None:
        self.engine = engine
        self.waiting = waiting
        self.stops = stops
        self.tail_bytes = max(map(len, stops), default=0)
        self.live: list[_Sequence] = []
        self.free_slots = list(range(engine.n_seq_max))[::-1]
        self.free_cells = engine.n_cells

    def run(self) -> Iterator[tuple[int, Reply]]:
        """(index, reply) of each sequence as it ends."""
        run = self.engine.begin()
        while self.waiting or self.live:
            self.engine.check_run(run)
            yield from self._join()
            if self.live:
                yield from self._step()

    def close(self) -> None:
        for sequence in self.live:
            if sequence.sampler:
                sequence.sampler.close()

    def _join(self) -> Iterator[tuple[int, Reply]]:
        """Let in what fits. Cells are reserved for whole replies: a live sequence never runs out of them."""
        while self.waiting and self.free_slots and self.waiting[0].n_cells <= self.free_cells:
            sequence = self.waiting.popleft()
            if sequence.budget == 0:
                yield sequence.index, self._reply(sequence, "length")
                continue
            sequence.slot = self.free_slots.pop()
            self.free_cells -= sequence.n_cells
            sequence.clock.started = time.perf_counter()
            sequence.sampler = new_sampler(self.engine, sequence.sampling)
            self.live.append(sequence)

    def _step(self) -> Iterator[tuple[int, Reply]]:
        """One decode: the last token of every reply, and of prompts as much as there is room for."""
        tokens, positions, slots, outputs, classes = [], [], [], [], []
        plans: list[Plan | None] = []
        drawing = []
        # replies first, so that a long prompt can't starve them; llama.cpp wants a sequence's tokens together
        self.live.sort(key=lambda sequence: len(sequence.pending) > 1)
        room = self.engine.context.n_batch
        for sequence in self.live:
            n = min(len(sequence.pending), room)
            if n == 0:
                break
            room -= n
            start, sequence.n_past = sequence.n_past, sequence.n_past + n
            tokens += sequence.pending[:n]
            sequence.pending = sequence.pending[n:]
            positions += range(start, start + n)
            slots += [sequence.slot] * n
            outputs += [False] * (n - 1) + [not sequence.pending]
            plans += [sequence.plan] * n
            classes += _classes(start, n, sequence.n_prompt)
            if not sequence.pending:
                drawing.append(sequence)
        rows = self.engine.context.decode(tokens, positions, slots, outputs, plans=plans, classes=classes)
        if drawing:
            yield from self._draw(drawing, rows.logits)

    def _draw(self, drawing: Sequence[_Sequence], logits: np.ndarray) -> Iterator[tuple[int, Reply]]:
        """Row i of `logits` is the next token of drawing[i]."""
        ended = []
        for i, (sequence, token) in enumerate(zip(drawing, largest(logits).tolist(), strict=True)):
            if sequence.sampler:
                token = sequence.sampler.sample(self.engine.context, i)
            sequence.clock.tick()
            reason = self._accept(sequence, token)
            if reason:
                self._leave(sequence)
                ended.append((sequence.index, self._reply(sequence, reason)))
        yield from ended

    def _accept(self, sequence: _Sequence, token: int) -> str | None:
        """Take a token in. Returns the finish reason when it was the last."""
        if self.engine.ends(token):
            return "stop"
        sequence.tokens.append(token)
        if self.stops:
            piece = self.engine.piece(token)
            seen = sequence.tail + piece
            if any(stop in seen for stop in self.stops):
                return "stop"
            sequence.tail = seen[-self.tail_bytes :]
        if len(sequence.tokens) == sequence.budget:
            return "length"
        sequence.pending = [token]
        return None

    def _leave(self, sequence: _Sequence) -> None:
        self.live.remove(sequence)
        self.free_slots.append(sequence.slot)
        self.free_cells += sequence.n_cells
        self.engine.context.seq_rm(sequence.slot)
        if sequence.sampler:
            sequence.sampler.close()

    def _reply(self, sequence: _Sequence, reason: str) -> Reply:
        text = b"".join(map(self.engine.piece, sequence.tokens))
        cuts = [at for at in map(text.find, self.stops) if at >= 0]
        return Reply(
            text=text[: min(cuts, default=None)].decode("utf-8", "replace"),
            tokens=sequence.tokens,
            finish_reason=reason,
            timings=sequence.clock.timings(len(sequence.tokens)),
        )


def _classes(start: int, n: int, n_prompt: int) -> list[int]:
    if start >= n_prompt:
        return [_GENERATION] * n
    return position_classes(np.arange(start, start + n), n_prompt).tolist()


def _sequence(
    engine: Engine,
    index: int,
    prompt: Prompt,
    raw: bool,
    max_tokens: int | None,
    plan: Plan | None,
    sampling: Sampling,
) -> _Sequence:
    try:
        tokens = engine.prompt_tokens(prompt, raw)
        check_room(engine, len(tokens))
    except PromptError as error:
        raise PromptError(f"prompt {index}: {error}") from error
    budget = reply_budget(engine, len(tokens), max_tokens)
    clock = Clock(time.perf_counter(), len(tokens))
    return _Sequence(index, tokens, len(tokens), budget, plan, sampling, clock)


def _plans_of(engine: Engine, steer: Steer | Sequence[Steer], n: int) -> list[Plan | None]:
    one_for_all = (
        steer is None
        or isinstance(steer, (Plan, ControlVector))
        or all(isinstance(each, ControlVector) for each in steer)
    )
    if one_for_all:
        return [engine.plan(steer)] * n
    if len(steer) != n:
        raise PromptError(f"steer has {len(steer)} entries for {n} prompts: give one each, or one for all.")
    # the same vectors for many prompts make one plan object, which the hook then compiles once
    plans: dict[tuple[int, ...], Plan | None] = {}
    keys = [_identity(each) for each in steer]
    for key, each in zip(keys, steer, strict=True):
        if key not in plans:
            plans[key] = engine.plan(each)
    return [plans[key] for key in keys]


def _identity(steer: Steer) -> tuple[int, ...]:
    if steer is None or isinstance(steer, (Plan, ControlVector)):
        return (id(steer),)
    return tuple(map(id, steer))


def _samplings_of(sampling: Sampling | Sequence[Sampling] | None, n: int) -> list[Sampling]:
    if sampling is None or isinstance(sampling, Sampling):
        one = sampling or Sampling()
        if one.seed is None or one.is_argmax:
            return [one] * n
        return [replace(one, seed=one.seed + i) for i in range(n)]
    if len(sampling) != n:
        raise LocalsteerError(f"sampling has {len(sampling)} entries for {n} prompts: give one each, or one.")
    return list(sampling)
