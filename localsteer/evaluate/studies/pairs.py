"""How many pairs does a direction need, and in how many wordings?

Each size is drawn several times at random from the extraction queries and phrasings; settings stay those
picked once with the usual 50 pairs, so that nothing but the vector differs. Replies are to test queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from localsteer.catalog import Instruction, Query
from localsteer.evaluate.conditions import random_control
from localsteer.evaluate.similarity import unit_rows
from localsteer.evaluate.states import States
from localsteer.evaluate.studies.common import (
    StudyJob,
    accuracy_of,
    cells_for,
    grouped,
    lines,
    mean,
    percent,
    section,
    share_of,
    table,
    working,
)
from localsteer.evaluate.suites.bench import Bench
from localsteer.evaluate.suites.cells import Result
from localsteer.extract import Pair, open_backend
from localsteer.vector import ControlVector

NAME = "pairs"
TITLE = "How many pairs, and how diverse"
COUNTS = (2, 5, 10, 20, 50, 100)
WORDINGS = (1, 3, 0)  # 0: all of them
QUICK_COUNTS, QUICK_WORDINGS = (2, 20), (1, 0)
N_PAIRS = 50  # where wordings are varied
N_DRAWS, QUICK_DRAWS = 5, 2
ENOUGH = 0.02  # so close to the best is as good
INSTRUCTIONS = ("json", "lowercase", "bullets", "title", "no_comma", "one_sentence")


@dataclass(frozen=True)
class Draw:
    """What was drawn. wordings: how many phrasings, 0 for all."""

    n_pairs: int
    wordings: int
    number: int

    @property
    def label(self) -> str:
        return f"{self.n_pairs} pairs, {self.wordings or 'all'} wordings, draw {self.number}"


def run(job: StudyJob) -> dict[str, Any]:
    counts, wordings, n_draws = COUNTS, WORDINGS, N_DRAWS
    if job.quick:
        counts, wordings, n_draws = QUICK_COUNTS, QUICK_WORDINGS, QUICK_DRAWS
    kinds = [(n, 0) for n in counts] + [(N_PAIRS, k) for k in wordings if k]
    draws = [Draw(n, k, number) for n, k in kinds for number in range(n_draws)]
    with job.bench() as bench:
        instructions = job.instructions(INSTRUCTIONS)
        vectors = bench.vectors(instructions)
        instructions, left_out = working(instructions, vectors)
        with bench.stage("extracting vectors of every size") as advance:
            drawn = bench.workers.map(
                lambda engine, each: draw_vectors(engine, bench, each, vectors[each.id], draws),
                instructions,
                advance,
            )
        cells = []
        for each, found in zip(instructions, drawn, strict=True):
            control = random_control(vectors[each.id], bench.plain_mean(), bench.seed)
            cells += cells_for(bench, each, "none") + cells_for(bench, each, "random", [control])
            cells += cells_for(bench, each, "instructed", told=True)
            for draw, vector in found.items():
                cells += cells_for(bench, each, draw.label, [vector])
        results = bench.run(cells, score=False)
        model = bench.model
    cosines = {draw: _cosines(drawn, draw, draws) for draw in draws}
    groups = grouped(results, "condition")
    rows = [_row(groups, draws, cosines, n, k) for n, k in kinds]
    advice = where_it_stops(rows)
    return {
        "model": model,
        "figures": {"sizes": rows, "advice": advice, "instructions": _by_instruction(results, kinds, draws)},
        "sections": _sections(rows, groups, instructions, results, kinds, draws, advice, left_out),
    }


def draw_vectors(
    engine: Any, bench: Bench, instruction: Instruction, vector: ControlVector, draws: Sequence[Draw]
) -> dict[Draw, ControlVector]:
    """The vector of each draw, applied as `vector` is; states are computed once for each prompt."""
    queries = bench.catalog.queries_for(instruction, "extraction")
    made = {draw: draw_pairs(instruction, queries, draw, bench.seed) for draw in draws}
    with open_backend(engine) as backend:
        states = States(backend)
        states.of(
            [text for pairs in made.values() for pair in pairs for text in (pair.plain, pair.instructed)]
        )
        return {draw: vector_of(vector, *states.of_pairs(pairs)) for draw, pairs in made.items()}


def draw_pairs(instruction: Instruction, queries: Sequence[Query], draw: Draw, seed: int = 0) -> list[Pair]:
    """Queries without repetition (as far as there are enough) and wordings in turn, both in random order.

    Fewer queries than pairs: a query comes again with another wording."""
    rng = np.random.default_rng([seed, draw.n_pairs, draw.wordings, draw.number])
    wordings = [instruction.phrasings[i] for i in rng.permutation(len(instruction.phrasings))]
    wordings = wordings[: draw.wordings or None]
    order = rng.permutation(len(queries))
    pairs = []
    for i in range(min(draw.n_pairs, len(queries) * len(wordings))):
        query = queries[order[i % len(queries)]].text
        pairs.append(Pair(f"{query} {wordings[(i + i // len(queries)) % len(wordings)]}", query))
    return pairs


def vector_of(like: ControlVector, instructed: np.ndarray, plain: np.ndarray) -> ControlVector:
    """Directions and mean projections of these states, (n, n_layer, n_embd) each, applied as `like` is."""
    means = instructed.mean(axis=0, dtype=np.float64), plain.mean(axis=0, dtype=np.float64)
    directions = means[0] - means[1]
    units = unit_rows(directions)
    found = [np.einsum("le,le->l", each, units) for each in means]
    statistics = {"mean_with": found[0], "mean_without": found[1], "std_with": None, "std_without": None}
    return replace(like, directions=directions, **statistics)


def where_it_stops(rows: Sequence[dict[str, Any]]) -> str:
    """The fewest pairs, and the fewest wordings, that come within ENOUGH of the best."""
    sizes = [row for row in rows if not row["wordings"]]
    best = max(row["followed"]["share"] for row in sizes)
    enough = next(row for row in sizes if row["followed"]["share"] >= best - ENOUGH)
    text = (
        f"{enough['n_pairs']} pairs are enough: {percent(enough['followed']['share'])} follow, at most "
        f"{percent(best)} with any number up to {sizes[-1]['n_pairs']}."
    )
    all_of_them = next((row for row in sizes if row["n_pairs"] == N_PAIRS), sizes[-1])
    reached = all_of_them["followed"]["share"]
    for row in rows:
        if row["wordings"]:
            share = row["followed"]["share"]
            what = f"{row['wordings']} wording{'s' if row['wordings'] > 1 else ''}"
            verdict = "as good as" if share >= reached - ENOUGH else "worse than"
            text += f" With {what}, {row['n_pairs']} pairs are {verdict} with all: {percent(share)} against "
            text += f"{percent(reached)}."
    return text


def _row(
    groups: dict[tuple[str, ...], list[Result]],
    draws: Sequence[Draw],
    cosines: dict[Draw, float],
    n: int,
    k: int,
) -> dict[str, Any]:
    chosen = [draw for draw in draws if (draw.n_pairs, draw.wordings) == (n, k)]
    shares = [accuracy_of(groups[draw.label,]) for draw in chosen]
    everything = [result for draw in chosen for result in groups[draw.label,]]
    return {
        "n_pairs": n,
        "wordings": k,
        "followed": share_of(everything),
        "worst_draw": min(shares),
        "best_draw": max(shares),
        "cosine": mean([cosines[draw] for draw in chosen]),
    }


def _cosines(drawn: Sequence[dict[Draw, ControlVector]], draw: Draw, draws: Sequence[Draw]) -> float:
    """With the mean direction of the other draws of the largest size, at the steered block; mean over
    instructions."""
    most = max(each.n_pairs for each in draws if not each.wordings)
    largest = [each for each in draws if each.n_pairs == most and not each.wordings and each != draw]
    found = []
    for vectors in drawn:
        (layer, *_) = vectors[draw].layers
        reference = np.mean([vectors[each].unit(layer) for each in largest], axis=0)
        found.append(float(vectors[draw].unit(layer) @ reference / np.linalg.norm(reference)))
    return float(np.mean(found))


def _by_instruction(
    results: Sequence[Result], kinds: Sequence[tuple[int, int]], draws: Sequence[Draw]
) -> dict[str, dict[str, float | None]]:
    groups = grouped(results, "instruction", "condition")
    names = list(dict.fromkeys(name for name, _ in groups))
    return {
        name: {
            f"{n} pairs, {k or 'all'} wordings": mean(
                [accuracy_of(groups[name, d.label]) for d in draws if (d.n_pairs, d.wordings) == (n, k)]
            )
            for n, k in kinds
        }
        for name in names
    }


def _sections(
    rows: Sequence[dict[str, Any]],
    groups: dict[tuple[str, ...], list[Result]],
    instructions: Sequence[Instruction],
    results: Sequence[Result],
    kinds: Sequence[tuple[int, int]],
    draws: Sequence[Draw],
    advice: str,
    left_out: str,
) -> list[dict[str, Any]]:
    columns = ("pairs", "wordings", "follow", "worst draw", "best draw", "cosine with the largest")
    lined = [
        [row["n_pairs"], row["wordings"] or "all", row["followed"], {"share": row["worst_draw"]},
         {"share": row["best_draw"]}, round(row["cosine"], 4)]
        for row in rows
    ]  # fmt: skip
    sizes = [row for row in rows if not row["wordings"]]
    control = [[name, share_of(groups[name,])] for name in ("none", "random", "instructed")]
    by_instruction = _by_instruction(results, kinds, draws)
    counts = [n for n, k in kinds if not k]
    series = {
        name: [{"share": found[f"{n} pairs, all wordings"]} for n in counts]
        for name, found in by_instruction.items()
    }
    series = {"all": [row["followed"] for row in sizes], **series}
    n_draws = len(draws) // len(kinds)
    named = ", ".join(each.id for each in instructions)
    return [
        section("Where it stops paying", advice),
        section(
            "Replies that follow",
            f"{named}; {n_draws} random draws of each size, intervals over queries. Cosine: with the mean "
            f"direction of the largest draws, at the steered block. {left_out}",
            [table(columns, lined), table(("beside it", "follow"), control)],
            [
                lines(
                    "Replies that follow, by pairs",
                    "pairs",
                    "share of replies",
                    list(map(str, counts)),
                    series,
                )
            ],
        ),
    ]
