"""The one runner: cells in, rows out. Suites, studies and `demo` run on it through a `Bench`; `transfer` and
benchmarks through `run_conditions`, on an engine that is open already.

    rows = Runner(workers).run(cells)

Greedy decoding throughout. Neighbours in a batch change a reply of a quantized model a little, so that what
is decoded together depends on nothing but the cells. There are two ways:

    64 cells at a time, in their order    `eval` and `study`, whose cells are many
    the cells of an instruction together  `demo`, `transfer`: WHOLE, the model's own replies by themselves
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from localsteer.catalog import Instruction, Query
from localsteer.evaluate.cells import CONDITIONS, Arm, Cell, Experiment, arms_of
from localsteer.evaluate.outcomes import Outcome, Outcomes, judged
from localsteer.perplexity import log_scores
from localsteer.runtime.reply import Reply
from localsteer.runtime.sampling import GREEDY
from localsteer.vector import ControlVector

if TYPE_CHECKING:
    from localsteer.engine import Engine
    from localsteer.runtime.attach import Steer
    from localsteer.workers import Workers

CHUNK = 64  # replies of one piece of work
MAX_TOKENS = 192

Advance = Callable[[int, int], None]
Stage = Callable[[str], AbstractContextManager[Advance]]
Key = Callable[[Cell], Hashable]
Item = TypeVar("Item")
Result = TypeVar("Result")


def by_instruction(cell: Cell) -> Hashable:
    """For `Runner.batch`: the cells of an instruction together, the model's own replies by themselves."""
    return cell.instruction if cell.steer or cell.prompt != cell.query.text else None


@dataclass(frozen=True)
class Runner:
    """must_end: a reply that was cut at max_tokens is degenerate. batch: cells with the same key are decoded
    together; None: CHUNK of them at a time, in their order."""

    workers: Workers | OpenEngine
    must_end: bool = False
    batch: Key | None = None

    def run(
        self,
        cells: Sequence[Cell],
        *,
        score: bool | Collection[str] = True,
        known: Mapping[Hashable, Reply] | None = None,
        advance: Advance | None = None,
    ) -> Outcomes:
        """Outcomes in the order of the cells; equal requests are decoded once.

        score: whether perplexities are wanted, or of which conditions. known: replies by `Cell.request`.
        advance: called with (replies done, of how many).
        """
        replies = self._replies(cells, known or {}, advance)

        def judge(engine: Engine, piece: Sequence[Cell]) -> list[Outcome]:
            scored = [
                cell for cell in piece if (score if isinstance(score, bool) else cell.condition in score)
            ]
            texts = [(cell.query.text, replies[cell.request].tokens) for cell in scored]
            logs = dict(zip(map(id, scored), log_scores(engine, texts), strict=True))
            return [
                judged(
                    cell,
                    replies[cell.request],
                    must_end=self.must_end,
                    log_perplexity=logs.get(id(cell)),
                )
                for cell in piece
            ]

        pieces = self._pieces(cells, lambda cell: (cell.instruction, cell.condition))
        found = self.workers.map(judge, pieces)
        rows = {id(row.cell): row for piece in found for row in piece}
        return Outcomes(rows[id(cell)] for cell in cells)

    def _replies(
        self, cells: Sequence[Cell], known: Mapping[Hashable, Reply], advance: Advance | None
    ) -> dict[Hashable, Reply]:
        """Each different request once."""
        new: dict[Hashable, Cell] = {}
        for cell in cells:
            if cell.request not in known:
                new.setdefault(cell.request, cell)
        by_limit: dict[int, list[Cell]] = {}
        for cell in new.values():
            by_limit.setdefault(cell.max_tokens, []).append(cell)
        pieces = [piece for same in by_limit.values() for piece in self._pieces(same)]
        tick = _counter(len(new), advance)

        def ask(engine: Engine, piece: Sequence[Cell]) -> list[Reply]:
            self.workers.check()
            return answered(engine, piece, tick())

        replies = dict(known)
        for piece, own in zip(pieces, self.workers.map(ask, pieces), strict=True):
            replies.update(zip((cell.request for cell in piece), own, strict=True))
        return replies

    def _pieces(self, cells: Sequence[Cell], further: Key | None = None) -> list[Sequence[Cell]]:
        """What one engine does in one call. further: what else parts cells that have a key."""
        if self.batch is None:
            return [cells[start : start + CHUNK] for start in range(0, len(cells), CHUNK)]
        pieces: dict[Hashable, list[Cell]] = {}
        for cell in cells:
            pieces.setdefault((self.batch(cell), further and further(cell)), []).append(cell)
        return list(pieces.values())


def answered(engine: Engine, cells: Sequence[Cell], on_progress: Advance | None = None) -> list[Reply]:
    """Greedy replies to cells of one length, decoded together."""
    return engine.generate_batch(
        [cell.prompt for cell in cells],
        steer=[cell.steer for cell in cells],
        max_tokens=cells[0].max_tokens if cells else 1,
        sampling=GREEDY,
        on_progress=on_progress,
    )


def silent(_what: str) -> AbstractContextManager[Advance]:
    """A stage that shows nothing."""
    return nullcontext(lambda _done, _total: None)


def _counter(total: int, advance: Advance | None) -> Callable[[], Advance | None]:
    """Gives each piece of work a callback for its own (done, of how many); `advance` hears of all of them."""
    if advance is None:
        return lambda: None
    lock, done = threading.Lock(), [0]

    def start() -> Advance:
        before = 0

        def tick(now: int, _of: int) -> None:
            nonlocal before
            with lock:
                done[0] += now - before
                before = now
                advance(done[0], total)

        return tick

    return start


# --- on an engine that is open already ---------------------------------------------------------------------


@dataclass(frozen=True)
class OpenEngine:
    """It does the work of `Workers`."""

    engine: Engine

    def map(
        self, work: Callable[[Engine, Item], Result], items: Sequence[Item], advance: Advance | None = None
    ) -> list[Result]:
        return [work(self.engine, item) for item in items]

    def check(self) -> None:
        """Nobody ends its work from outside."""


def run_conditions(
    engine: Engine,
    instruction: Instruction,
    vector: ControlVector,
    queries: Sequence[Query],
    *,
    controls: Mapping[str, Steer] | None = None,
    conditions: Sequence[str] = CONDITIONS,
    plain: Sequence[Reply] | None = None,
    phrasings: Sequence[str] | None = None,
    scored: Collection[str] = CONDITIONS,
    max_tokens: int = MAX_TOKENS,
    must_end: bool = False,
) -> dict[str, Outcomes]:
    """Outcomes by condition, in the order of `conditions`, all decoded in one batch.

    vector: with its settings applied. controls: what steers `random` and `other`; a condition without one is
    left out. plain: replies of the plain model to the same queries, where they are known already. phrasings:
    wordings of the instruction for `instructed` and `both`, in turn (its own by default). scored: conditions
    whose perplexity is wanted. must_end: as in `Runner`.
    """
    steers: dict[str, Steer] = {"none": (), "steered": vector, "instructed": (), "both": vector}
    steers |= controls or {}
    as_tuples = {
        name: (steer,) if isinstance(steer, ControlVector) else steer for name, steer in steers.items()
    }
    arms = arms_of(as_tuples, conditions)
    cells = Experiment([instruction], arms, queries, phrasings).cells(max_tokens)
    own = Experiment([instruction], [Arm("none")], queries).cells(max_tokens)
    known = {} if plain is None else dict(zip((cell.request for cell in own), plain, strict=True))
    rows = Runner(OpenEngine(engine), must_end, batch=lambda _: None).run(cells, score=scored, known=known)
    return rows.by("condition")


def plain_replies(engine: Engine, queries: Sequence[Query], *, max_tokens: int = MAX_TOKENS) -> list[Reply]:
    """The plain model, greedy: condition `none` of every instruction."""
    texts = [query.text for query in queries]
    return engine.generate_batch(texts, max_tokens=max_tokens, sampling=GREEDY)


def told_replies(
    engine: Engine, instruction: Instruction, queries: Sequence[Query], *, max_tokens: int = MAX_TOKENS
) -> list[Reply]:
    """The plain model, with the instruction in the prompt."""
    arms = [Arm("told", told=True)]
    return answered(engine, Experiment([instruction], arms, queries).cells(max_tokens))
