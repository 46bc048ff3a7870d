"""How many pairs does a direction need, and in how many wordings?

Each size is drawn several times at random from the extraction queries and phrasings; settings stay those
picked once with the usual 50 pairs, so that nothing but the vector differs. Replies are to test queries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from msgspec import Struct

from localsteer.catalog import Instruction, Query
from localsteer.evaluate.bench import Bench
from localsteer.evaluate.cells import Experiment, arms_of
from localsteer.evaluate.controls import controls_of
from localsteer.evaluate.outcomes import Outcomes, mean
from localsteer.evaluate.page import Lines, Section, Share, StudyReport, Table
from localsteer.evaluate.report.figures import rough_percent
from localsteer.evaluate.studies.common import StudyJob, working
from localsteer.extract import Pair, open_backend
from localsteer.extract.states import States
from localsteer.extract.statistics import unit_rows
from localsteer.vector import ControlVector

if TYPE_CHECKING:
    from localsteer.engine import Engine

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


class Size(Struct, frozen=True, kw_only=True):
    """What all draws of one size did. cosine: of their directions with those of the largest size."""

    n_pairs: int
    wordings: int
    followed: Share
    worst_draw: float | None = None
    best_draw: float | None = None
    cosine: float | None = None


Drawn = Sequence[Mapping[Draw, ControlVector]]  # by instruction


def run(job: StudyJob) -> StudyReport:
    counts, wordings, n_draws = COUNTS, WORDINGS, N_DRAWS
    if job.quick:
        counts, wordings, n_draws = QUICK_COUNTS, QUICK_WORDINGS, QUICK_DRAWS
    kinds = [(n, 0) for n in counts] + [(N_PAIRS, k) for k in wordings if k]
    draws = {kind: [Draw(*kind, number) for number in range(n_draws)] for kind in kinds}
    with job.bench() as bench:
        instructions = job.instructions(INSTRUCTIONS)
        vectors = bench.vectors(instructions)
        instructions, left_out = working(instructions, vectors)
        every = [draw for members in draws.values() for draw in members]

        def work(engine: Engine, each: Instruction) -> dict[Draw, ControlVector]:
            return draw_vectors(engine, bench, each, vectors[each.id], every)

        with bench.stage("extracting vectors of every size") as advance:
            drawn = bench.workers.map(work, instructions, advance)
        asked = [
            _conditions(bench, each, vectors[each.id], by_draw)
            for each, by_draw in zip(instructions, drawn, strict=True)
        ]
        rows = bench.run(asked, score=False)
        model = bench.model
    parts = rows.by("condition")
    sizes = [_size(parts, members, drawn, draws) for members in draws.values()]
    by_instruction = _by_instruction(rows, draws)
    advice = where_it_stops(sizes)
    control = [[name, parts[name].share] for name in ("none", "random", "instructed")]
    said = (
        f"{', '.join(instruction.id for instruction in instructions)}; {n_draws} random draws of each size, "
        "intervals over queries. Cosine: with the mean direction of the largest draws, at the steered layer. "
        f"{left_out}"
    )
    tables = [_table(sizes), Table(["beside it", "follow"], control)]
    return StudyReport(
        model=model,
        figures={"sizes": sizes, "advice": advice, "instructions": by_instruction},
        sections=[
            Section("Where it stops paying", advice),
            Section("Replies that follow", said, tables, [_plot(sizes, by_instruction)]),
        ],
    )


def _conditions(
    bench: Bench, each: Instruction, vector: ControlVector, by_draw: Mapping[Draw, ControlVector]
) -> Experiment:
    steers = {
        "none": (),
        **controls_of([vector], [], bench.plain_mean(), bench.seed),
        "instructed": (),
        **{draw.label: (drawn,) for draw, drawn in by_draw.items()},
    }
    return bench.experiment(each, arms_of(steers, list(steers)))


def draw_vectors(
    engine: Engine, bench: Bench, instruction: Instruction, vector: ControlVector, draws: Sequence[Draw]
) -> dict[Draw, ControlVector]:
    """The vector of each draw, applied as `vector` is; states are computed once for each prompt."""
    queries = bench.catalog.queries_for(instruction, "extraction")
    pairs_of = {draw: draw_pairs(instruction, queries, draw, bench.seed) for draw in draws}
    with open_backend(engine) as backend:
        states = States(backend)
        states.of(
            [text for pairs in pairs_of.values() for pair in pairs for text in (pair.plain, pair.instructed)]
        )
        return {draw: vector_of(vector, *states.of_pairs(pairs)) for draw, pairs in pairs_of.items()}


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
    instructed, plain = (np.einsum("le,le->l", states, units) for states in means)
    statistics = {"mean_with": instructed, "mean_without": plain, "std_with": None, "std_without": None}
    return replace(like, directions=directions, **statistics)


def where_it_stops(sizes: Sequence[Size]) -> str:
    """The fewest pairs, and the fewest wordings, that come within ENOUGH of the best."""
    whole = [size for size in sizes if not size.wordings]
    best = max(size.followed.share for size in whole)
    enough = next(size for size in whole if size.followed.share >= best - ENOUGH)
    text = (
        f"{enough.n_pairs} pairs are enough: {rough_percent(enough.followed.share)} follow, at most "
        f"{rough_percent(best)} with any number up to {whole[-1].n_pairs}."
    )
    reached = next((size for size in whole if size.n_pairs == N_PAIRS), whole[-1]).followed.share
    for size in (size for size in sizes if size.wordings):
        share = size.followed.share
        what = f"{size.wordings} wording{'s' if size.wordings > 1 else ''}"
        verdict = "as good as" if share >= reached - ENOUGH else "worse than"
        text += f" With {what}, {size.n_pairs} pairs are {verdict} with all: "
        text += f"{rough_percent(share)} against {rough_percent(reached)}."
    return text


def _size(
    parts: Mapping[str, Outcomes],
    members: Sequence[Draw],
    drawn: Drawn,
    draws: Mapping[tuple[int, int], Sequence[Draw]],
) -> Size:
    followed = [parts[draw.label].followed for draw in members]
    largest = draws[max(kind for kind in draws if not kind[1])]
    return Size(
        n_pairs=members[0].n_pairs,
        wordings=members[0].wordings,
        followed=Outcomes(row for draw in members for row in parts[draw.label]).share,
        worst_draw=min(followed),
        best_draw=max(followed),
        cosine=mean([_cosine(drawn, draw, largest) for draw in members]),
    )


def _cosine(drawn: Drawn, draw: Draw, largest: Sequence[Draw]) -> float:
    """With the mean direction of the other draws of the largest size, at the steered layer; mean over
    instructions."""
    cosines = []
    for vectors in drawn:
        (layer, *_) = vectors[draw].layers
        reference = np.mean([vectors[each].unit(layer) for each in largest if each != draw], axis=0)
        cosines.append(float(vectors[draw].unit(layer) @ reference / np.linalg.norm(reference)))
    return float(np.mean(cosines))


def _by_instruction(
    rows: Outcomes, draws: Mapping[tuple[int, int], Sequence[Draw]]
) -> dict[str, dict[str, float | None]]:
    """The mean share of the draws of each size."""
    return {
        name: {
            f"{n} pairs, {k or 'all'} wordings": mean([parts[d.label].followed for d in members])
            for (n, k), members in draws.items()
        }
        for name, own in rows.by("instruction").items()
        for parts in [own.by("condition")]
    }


def _table(sizes: Sequence[Size]) -> Table:
    rows = [
        [size.n_pairs, size.wordings or "all", size.followed, Share(size.worst_draw), Share(size.best_draw),
         round(size.cosine, 4)]
        for size in sizes
    ]  # fmt: skip
    return Table(["pairs", "wordings", "follow", "worst draw", "best draw", "cosine with the largest"], rows)


def _plot(sizes: Sequence[Size], by_instruction: Mapping[str, Mapping[str, float | None]]) -> Lines:
    whole = [size for size in sizes if not size.wordings]
    series = {"all": [size.followed for size in whole]}
    for name, shares in by_instruction.items():
        series[name] = [Share(shares[f"{size.n_pairs} pairs, all wordings"]) for size in whole]
    return Lines(
        title="Replies that follow, by pairs",
        x_label="pairs",
        y_label="share of replies",
        x=[str(size.n_pairs) for size in whole],
        series=series,
    )
