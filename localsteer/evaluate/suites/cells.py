"""What a suite wants to know, as a list of cells: one reply each, judged and summed up alike everywhere.

    cell = Cell("json", "steered", query, query.text, (vector,), checks_of(json, query))
    results = run_cells(workers, [cell, ...])
    figures(results)["strict"]["accuracy"]

Greedy decoding throughout. A degenerate reply follows nothing, in every condition alike.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from localsteer.catalog import Instruction, Query
from localsteer.evaluate.intervals import clustered
from localsteer.runtime.reply import Reply
from localsteer.runtime.sampling import GREEDY
from localsteer.vector import ControlVector
from localsteer.verify.judge import share, why_degenerate
from localsteer.verify.quality import length_words, repetition, subject_kept
from localsteer.verify.verdicts import verify

if TYPE_CHECKING:
    from localsteer.engine import Engine
    from localsteer.evaluate.workers import Workers

CHUNK = 64  # replies of one piece of work; fixed, since neighbours in a batch change a reply a little

Advance = Callable[[int, int], None]
Request = tuple[str, tuple[ControlVector, ...]]


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


def checks_of(instruction: Instruction, query: Query) -> tuple[Rule, ...]:
    """The instruction's verifier for replies to this query; none where it has none."""
    if instruction.verifier is None:
        return ()
    return (Rule(instruction.verifier, instruction.kwargs_for(query.text)),)


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
        scores = _log_perplexities(engine, chosen) if score else [None] * len(chosen)
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


def _passes(cell: Cell, text: str, *, loose: bool) -> bool:
    return all(
        verify(check.verifier, text, check.kwargs, prompt=cell.query.text, loose=loose)
        for check in cell.checks
    )


def _request(cell: Cell) -> tuple[int, Request]:
    return cell.max_tokens, (cell.prompt, cell.steer)


def _replies(
    workers: Workers, cells: Sequence[Cell], advance: Advance | None
) -> dict[tuple[int, Request], Reply]:
    """Each different request once, in pieces that depend on nothing but the cells."""
    requests: dict[int, list[Request]] = {}
    for limit, request in dict.fromkeys(map(_request, cells)):
        requests.setdefault(limit, []).append(request)
    parts = [
        (limit, found[start : start + CHUNK])
        for limit, found in requests.items()
        for start in range(0, len(found), CHUNK)
    ]
    tick = _counter(sum(map(len, requests.values())), advance)

    def ask(engine: Engine, part: tuple[int, list[Request]]) -> list[Reply]:
        workers.check()
        limit, asked = part
        return engine.generate_batch(
            [prompt for prompt, _ in asked],
            steer=[steer for _, steer in asked],
            max_tokens=limit,
            sampling=GREEDY,
            on_progress=tick(),
        )

    found = workers.map(ask, parts)
    return {
        (limit, request): reply
        for (limit, asked), replies in zip(parts, found, strict=True)
        for request, reply in zip(asked, replies, strict=True)
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


def _log_perplexities(engine: Engine, chosen: Sequence[tuple[Cell, Reply]]) -> list[float | None]:
    rows = [i for i, (_, reply) in enumerate(chosen) if reply.tokens]
    pairs = [(engine.prompt_tokens(chosen[i][0].query.text), chosen[i][1].tokens) for i in rows]
    found: list[float | None] = [None] * len(chosen)
    for i, value in zip(rows, engine.score(pairs) if pairs else [], strict=True):
        found[i] = -value
    return found


def applied(vector: ControlVector) -> tuple[ControlVector, ...]:
    """A cell's `steer`: nothing where no setting was better than the model alone (strength 0)."""
    return (vector,) if vector.strength else ()


# --- summing up --------------------------------------------------------------------------------------------


def figures(results: Sequence[Result], plain: Sequence[Result] = ()) -> dict[str, Any]:
    """What results.json holds of one instruction and condition, or of several together (`all`).

    plain: results of the unsteered model for the same queries; the perplexity ratio is to theirs. Intervals
    are 95%, bootstrap over queries.
    """
    verdicts = [result.verdict for result in results]
    mean_log, plain_log = _mean_log(results), _mean_log(plain)
    known = mean_log is not None and plain_log is not None
    return {
        "n": len(results),
        "strict": _accuracy(results, "strict"),
        "loose": _accuracy(results, "loose"),
        "quality": {
            "perplexity": None if mean_log is None else _exp(mean_log),
            "perplexity_ratio": _exp(mean_log - plain_log) if known else None,
            "repetition": _mean([verdict.repetition for verdict in verdicts]),
            "words": _mean([verdict.n_words for verdict in verdicts]),
            "degenerate": share([verdict.degenerate is not None for verdict in verdicts]),
            "subject_kept": share([verdict.subject_kept for verdict in verdicts]),
        },
        "settings": _settings(results),
    }


def tables(results: Sequence[Result], conditions: Sequence[str]) -> dict[str, Any]:
    """`conditions`, `instructions` and `all` of a SuiteReport: figures of each instruction and condition.

    `none` is the unsteered reply that perplexities are compared with.
    """
    names = list(dict.fromkeys(result.cell.instruction for result in results))
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.cell.instruction, result.cell.condition), []).append(result)
    rows = {
        name: {
            condition: figures(groups[name, condition], groups.get((name, "none"), ()))
            for condition in conditions
            if (name, condition) in groups
        }
        for name in names
    }
    found = [name for name in conditions if any(name in row for row in rows.values())]
    return {"conditions": found, "instructions": rows, "all": _all(groups, names, found)}


def _all(
    groups: Mapping[tuple[str, str], list[Result]], names: Sequence[str], conditions: Sequence[str]
) -> dict[str, Any]:
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
        together[condition] = figures(members, plain) | {"settings": None}
    return together


def difference(
    ours: Sequence[Result], theirs: Sequence[Result], rule: str = "strict"
) -> dict[str, float | None]:
    """Accuracy of `ours` minus that of `theirs`, with its interval over queries, as a table's cell.

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
        return {"share": None, "low": None, "high": None}
    halves = [counts[query] / 2 for query in sums]
    low, high = clustered(list(sums.values()), halves)
    return {"share": sum(sums.values()) / sum(halves), "low": low, "high": high}


def share_cell(figure: Mapping[str, Any], rule: str = "strict") -> dict[str, float | None]:
    """The accuracy of `figures` as a table's cell."""
    found = figure[rule]
    return {"share": found["accuracy"], "low": found["low"], "high": found["high"]}


def _accuracy(results: Sequence[Result], rule: str) -> dict[str, float | None]:
    """The share of replies that follow, with its interval over queries."""
    by_query: dict[str, list[bool]] = {}
    for result in results:
        verdict = getattr(result.verdict, rule)
        if verdict is not None:
            by_query.setdefault(result.cell.query.text, []).append(verdict)
    if not by_query:
        return {"accuracy": None, "low": None, "high": None}
    sums, counts = [sum(each) for each in by_query.values()], [len(each) for each in by_query.values()]
    low, high = clustered(sums, counts)
    return {"accuracy": sum(sums) / sum(counts), "low": low, "high": high}


def _mean_log(results: Iterable[Result]) -> float | None:
    return _mean([each.verdict.log_perplexity for each in results if each.verdict.log_perplexity is not None])


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))


def _settings(results: Sequence[Result]) -> Any:
    """How the vectors of these cells are applied: one table, a list of several, or None without any."""
    vectors = list(dict.fromkeys(vector for result in results for vector in result.cell.steer))
    found = [settings_of(vector) for vector in vectors]
    return found[0] if len(found) == 1 else found or None


def settings_of(vector: ControlVector) -> dict[str, Any]:
    return {
        "name": vector.name,
        "layer": list(vector.layers),
        "positions": vector.positions,
        "mode": vector.mode,
        "strength": vector.strength,
    }
