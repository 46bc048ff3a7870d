"""What an experiment wants to know, as a list of cells: one reply each, judged and summed up alike.

    arms = [Arm("none"), Arm("steered", (vector,)), Arm("instructed", told=True)]
    results = run_cells(workers, cells_of([json], arms, queries, max_tokens=64))
    figures(select(results, "steered")).strict.accuracy

Greedy decoding throughout. A degenerate reply follows nothing, in every condition alike.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from msgspec import structs

from localsteer.catalog import Instruction, Query
from localsteer.evaluate.intervals import clustered
from localsteer.evaluate.page import (
    Accuracy,
    ByCondition,
    Facts,
    Figures,
    NamedSetting,
    Number,
    Share,
    SuiteReport,
)
from localsteer.perplexity import log_scores
from localsteer.runtime.reply import Reply
from localsteer.runtime.sampling import GREEDY
from localsteer.vector import ControlVector
from localsteer.verify.judge import share, why_degenerate
from localsteer.verify.quality import length_words, repetition, subject_kept
from localsteer.verify.verdicts import verify

if TYPE_CHECKING:
    from localsteer.engine import Engine
    from localsteer.workers import Workers

CHUNK = 64  # replies of one piece of work; fixed, since neighbours in a batch change a reply a little

Advance = Callable[[int, int], None]
Request = tuple[int, str, tuple[ControlVector, ...]]


@dataclass(frozen=True)
class Rule:
    """One verifier with its arguments, ids and names as IFEval writes them."""

    verifier: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """One reply that is wanted.

    instruction: label of its row, an id or `json + one_sentence`. condition: its column. query: the base
    query, without any instruction; a perplexity is that of the reply after it. prompt: what is sent. steer:
    vectors with their settings applied. checks: the reply follows when all of them pass; none: nothing can
    be said. wording: the instruction in words, for a judge.
    """

    instruction: str
    condition: str
    query: Query
    prompt: str
    steer: tuple[ControlVector, ...] = ()
    checks: tuple[Rule, ...] = ()
    max_tokens: int = 512
    wording: str = ""


@dataclass(frozen=True)
class Verdict:
    """strict, loose: IFEval's rules, false for a degenerate reply, None without a check. degenerate: why, or
    None. log_perplexity: natural, of the reply under the unsteered model after the base query; None for an
    empty reply, or where it was not asked for."""

    strict: bool | None
    loose: bool | None
    degenerate: str | None
    subject_kept: bool | None
    n_words: int
    repetition: float
    log_perplexity: float | None = None


@dataclass(frozen=True)
class Result:
    cell: Cell
    reply: Reply
    verdict: Verdict


@dataclass(frozen=True)
class Arm:
    """One condition of an experiment. told: the instruction stands in the prompt, its phrasings in turn."""

    condition: str
    steer: tuple[ControlVector, ...] = ()
    told: bool = False


def cells_of(
    asked: Sequence[Instruction],
    arms: Iterable[Arm],
    queries: Sequence[Query],
    *,
    max_tokens: int,
    phrasings: Sequence[str] | None = None,
    wordings: Sequence[str] | None = None,
) -> list[Cell]:
    """A cell for each arm and query, arm by arm. Of several instructions all have to be followed.

    phrasings: in place of the instruction's own, for one. wordings: what a judge is asked by, in turn, in
    place of the phrasings.
    """
    turns = [phrasings] if phrasings else [instruction.phrasings for instruction in asked]
    told = [" ".join(texts[i % len(texts)] for texts in turns) for i in range(len(queries))]
    wordings = wordings or told
    return [
        Cell(
            instruction=label_of(asked),
            condition=arm.condition,
            query=query,
            prompt=f"{query.text} {told[i]}" if arm.told else query.text,
            steer=arm.steer,
            checks=tuple(check for instruction in asked for check in checks_of(instruction, query)),
            max_tokens=max_tokens,
            wording=wordings[i % len(wordings)],
        )
        for arm in arms
        for i, query in enumerate(queries)
    ]


def label_of(instructions: Sequence[Instruction]) -> str:
    """`json + one_sentence`."""
    return " + ".join(instruction.id for instruction in instructions)


def checks_of(instruction: Instruction, query: Query) -> tuple[Rule, ...]:
    """The instruction's verifier for replies to this query; none where it has none."""
    if instruction.verifier is None:
        return ()
    return (Rule(instruction.verifier, instruction.kwargs_for(query.text)),)


def answered(engine: Engine, cells: Sequence[Cell], on_progress: Advance | None = None) -> list[Reply]:
    """Greedy replies to cells of one length, decoded together."""
    return engine.generate_batch(
        [cell.prompt for cell in cells],
        steer=[cell.steer for cell in cells],
        max_tokens=cells[0].max_tokens if cells else 1,
        sampling=GREEDY,
        on_progress=on_progress,
    )


# --- running -----------------------------------------------------------------------------------------------


def run_cells(
    workers: Workers,
    cells: Sequence[Cell],
    *,
    must_end: bool = False,
    score: bool = True,
    advance: Advance | None = None,
) -> list[Result]:
    """Results in the order of the cells; equal requests are decoded once.

    must_end: a reply that was cut at max_tokens is degenerate. score: perplexities are wanted. advance:
    called with (replies done, of how many).
    """
    replies = _replies(workers, cells, advance)
    parts = [range(start, min(start + CHUNK, len(cells))) for start in range(0, len(cells), CHUNK)]

    def judged(engine: Engine, part: range) -> list[Result]:
        chosen = [(cells[i], replies[_request(cells[i])]) for i in part]
        texts = [(cell.query.text, reply.tokens) for cell, reply in chosen]
        scores = log_scores(engine, texts) if score else [None] * len(chosen)
        return [
            Result(cell, reply, judge_cell(cell, reply, must_end=must_end, log_perplexity=value))
            for (cell, reply), value in zip(chosen, scores, strict=True)
        ]

    return [result for part in workers.map(judged, parts) for result in part]


def judge_cell(
    cell: Cell, reply: Reply, *, must_end: bool = False, log_perplexity: float | None = None
) -> Verdict:
    """Raises CatalogError for a check whose verifier does not exist or lacks an argument."""
    degenerate = why_degenerate(reply, must_end=must_end)
    strict = loose = None
    if cell.checks:
        strict = degenerate is None and _passes(cell, reply.text, loose=False)
        # what passes strictly passes loosely: the reply itself is one of the eight variants
        loose = strict or (degenerate is None and _passes(cell, reply.text, loose=True))
    subject = cell.query.subject
    return Verdict(
        strict=strict,
        loose=loose,
        degenerate=degenerate,
        subject_kept=None if subject is None else subject_kept(reply.text, subject),
        n_words=length_words(reply.text),
        repetition=repetition(reply.text),
        log_perplexity=log_perplexity,
    )


def rejudged(results: Sequence[Result], instruction: Instruction, must_end: bool) -> list[Result]:
    """By one of the instructions that were asked for together."""
    cells = [replace(result.cell, checks=checks_of(instruction, result.cell.query)) for result in results]
    return [
        Result(cell, result.reply, judge_cell(cell, result.reply, must_end=must_end))
        for cell, result in zip(cells, results, strict=True)
    ]


def _passes(cell: Cell, text: str, *, loose: bool) -> bool:
    return all(
        verify(check.verifier, text, check.kwargs, prompt=cell.query.text, loose=loose)
        for check in cell.checks
    )


def _request(cell: Cell) -> Request:
    return cell.max_tokens, cell.prompt, cell.steer


def _replies(workers: Workers, cells: Sequence[Cell], advance: Advance | None) -> dict[Request, Reply]:
    """Each different request once, in pieces that depend on nothing but the cells."""
    first: dict[Request, Cell] = {}
    by_limit: dict[int, list[Cell]] = {}
    for cell in cells:
        if first.setdefault(_request(cell), cell) is cell:
            by_limit.setdefault(cell.max_tokens, []).append(cell)
    parts = [
        same[start : start + CHUNK] for same in by_limit.values() for start in range(0, len(same), CHUNK)
    ]
    tick = _counter(len(first), advance)

    def ask(engine: Engine, part: list[Cell]) -> list[Reply]:
        workers.check()
        return answered(engine, part, tick())

    replies = workers.map(ask, parts)
    return {
        _request(cell): reply
        for part, own in zip(parts, replies, strict=True)
        for cell, reply in zip(part, own, strict=True)
    }


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


def applied(vector: ControlVector) -> tuple[ControlVector, ...]:
    """A cell's `steer`: nothing where no setting was better than the model alone (strength 0)."""
    return (vector,) if vector.strength else ()


# --- summing up --------------------------------------------------------------------------------------------


def select(
    results: Sequence[Result], condition: str | None = None, instruction: str | None = None
) -> list[Result]:
    """Those of a condition and of an instruction; None: of all."""
    return [
        result
        for result in results
        if condition in (None, result.cell.condition) and instruction in (None, result.cell.instruction)
    ]


def grouped(results: Sequence[Result], *keys: str) -> dict[tuple[str, ...], list[Result]]:
    """Results by fields of their cells, in order of appearance."""
    groups: dict[tuple[str, ...], list[Result]] = {}
    for result in results:
        groups.setdefault(tuple(getattr(result.cell, key) for key in keys), []).append(result)
    return groups


def figures(results: Sequence[Result], plain: Sequence[Result] = ()) -> Figures:
    """What results.json holds of one instruction and condition, or of several together (`all`).

    plain: results of the unsteered model for the same queries; the perplexity ratio is to theirs. Intervals
    are 95%, bootstrap over queries.
    """
    verdicts = [result.verdict for result in results]
    mean_log, plain_log = _mean_log(results), _mean_log(plain)
    known = mean_log is not None and plain_log is not None
    return Figures(
        n=len(results),
        strict=_accuracy(results, "strict"),
        loose=_accuracy(results, "loose"),
        quality={
            "perplexity": None if mean_log is None else _exp(mean_log),
            "perplexity_ratio": _exp(mean_log - plain_log) if known else None,
            "repetition": mean([verdict.repetition for verdict in verdicts]),
            "words": mean([verdict.n_words for verdict in verdicts]),
            "degenerate": share([verdict.degenerate is not None for verdict in verdicts]),
            "subject_kept": share([verdict.subject_kept for verdict in verdicts]),
        },
        settings=_settings(results),
    )


def share_of(results: Sequence[Result]) -> Share:
    """How many follow, with the interval."""
    return _accuracy(results, "strict").share


def accuracy_of(results: Sequence[Result]) -> float | None:
    """Without it."""
    return share([result.verdict.strict for result in results])


def report(
    title: str, results: Sequence[Result], conditions: Sequence[str], hashes: Mapping[str, str]
) -> SuiteReport:
    """Figures of each instruction and condition, without sections. hashes: of vectors' files by their names.

    `none` is the unsteered reply that perplexities are compared with.
    """
    groups = grouped(results, "instruction", "condition")
    names = list(dict.fromkeys(name for name, _ in groups))
    rows = {
        name: {
            condition: _hashed(figures(groups[name, condition], groups.get((name, "none"), ())), hashes)
            for condition in conditions
            if (name, condition) in groups
        }
        for name in names
    }
    present = [name for name in conditions if any(name in row for row in rows.values())]
    together = _all(groups, names, present)
    return SuiteReport(title=title, conditions=present, instructions=rows, all=together)


def _all(
    groups: Mapping[tuple[str, ...], list[Result]], names: Sequence[str], conditions: Sequence[str]
) -> ByCondition:
    """Figures over all instructions that have the condition and a verdict: what no verifier judges (to be
    concise, to be verbose) may pull figures either way. `settings` differ, so there are none."""
    together = {}
    for condition in conditions:
        having = [
            name for name in names if any(result.cell.checks for result in groups.get((name, condition), ()))
        ]
        if not having:
            continue
        members = [result for name in having for result in groups[name, condition]]
        plain = [result for name in having for result in groups.get((name, "none"), ())]
        together[condition] = structs.replace(figures(members, plain), settings=None)
    return together


def _hashed(figure: Figures, hashes: Mapping[str, str]) -> Figures:
    settings = figure.settings
    if settings is None:
        return figure
    if isinstance(settings, list):
        return structs.replace(figure, vector_sha256=[hashes.get(setting.name) for setting in settings])
    return structs.replace(figure, vector_sha256=hashes.get(settings.name))


def difference(ours: Sequence[Result], theirs: Sequence[Result], rule: str = "strict") -> Share:
    """Accuracy of `ours` minus that of `theirs`, with its interval over queries.

    Both hold the same queries for the same instructions, in whatever order: queries are drawn for both alike.
    """
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    for sign, results in ((1, ours), (-1, theirs)):
        for result in results:
            verdict, query = getattr(result.verdict, rule), result.cell.query.text
            if verdict is not None:
                sums[query] = sums.get(query, 0.0) + sign * verdict
                counts[query] = counts.get(query, 0) + 1
    if not sums:
        return Share(None)
    halves = [counts[query] / 2 for query in sums]
    return Share(sum(sums.values()) / sum(halves), *clustered(list(sums.values()), halves))


def _accuracy(results: Sequence[Result], rule: str) -> Accuracy:
    """The share of replies that follow, with its interval over queries."""
    by_query: dict[str, list[bool]] = {}
    for result in results:
        verdict = getattr(result.verdict, rule)
        if verdict is not None:
            by_query.setdefault(result.cell.query.text, []).append(verdict)
    if not by_query:
        return Accuracy()
    sums, counts = list(map(sum, by_query.values())), list(map(len, by_query.values()))
    return Accuracy(sum(sums) / sum(counts), *clustered(sums, counts))


def _mean_log(results: Sequence[Result]) -> float | None:
    return mean([result.verdict.log_perplexity for result in results])


def mean(values: Sequence[Number]) -> float | None:
    """Of what is known."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def mean_words(results: Sequence[Result]) -> float | None:
    return mean([result.verdict.n_words for result in results])


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))


def _settings(results: Sequence[Result]) -> NamedSetting | list[NamedSetting] | None:
    """How the vectors of these cells are applied: one, a list of several, or None without any."""
    vectors = list(dict.fromkeys(vector for result in results for vector in result.cell.steer))
    settings = [NamedSetting(name=vector.name, **setting_of(vector)) for vector in vectors]
    return settings[0] if len(settings) == 1 else settings or None


def setting_of(vector: ControlVector) -> Facts:
    """The fields of `Applied`."""
    keys = ("positions", "mode", "strength")
    return {"layer": list(vector.layers), **{key: getattr(vector, key) for key in keys}}
