"""How many pairs does a direction need, and in how many wordings?

Each size is drawn several times at random from the extraction queries and phrasings; settings stay those
picked once with the usual 50 pairs, so that nothing but the vector differs. Replies are to test queries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from localsteer.catalog import Instruction
from localsteer.evaluate.outcomes import Outcomes, mean
from localsteer.evaluate.page import Lines, Share, StudyReport, Table, Value
from localsteer.evaluate.report.figures import rough_percent
from localsteer.evaluate.studies.common import StudyJob, working
from localsteer.evaluate.studies.draws import Draw, Drawn, Size, draw_vectors, sizes_of
from localsteer.evaluate.texts import said, section

if TYPE_CHECKING:
    from localsteer.engine import Engine

NAME, TITLE = "pairs", "How many pairs, and how diverse"
# numbers of pairs; of wordings, beside all of them; draws of each size
USUAL, QUICK = ((2, 5, 10, 20, 50, 100), (1, 3), 5), ((2, 20), (1,), 2)
N_PAIRS = 50  # where wordings are varied
ENOUGH = 0.02  # so close to the best is as good
INSTRUCTIONS = ("json", "lowercase", "bullets", "title", "no_comma", "one_sentence")


def run(job: StudyJob) -> StudyReport:
    draws = draws_of(*(QUICK if job.quick else USUAL))
    every = [draw for members in draws for draw in members]
    with job.bench() as bench:
        instructions = job.instructions(INSTRUCTIONS)
        vectors = bench.vectors.tuned(instructions)
        instructions, left_out = working(instructions, vectors)

        def work(engine: Engine, instruction: Instruction) -> Drawn:
            return draw_vectors(engine, bench, instruction, vectors[instruction.id], every)

        with bench.stage("extracting vectors of every size") as advance:
            drawn = bench.workers.map(work, instructions, advance)
        asked = []
        for instruction, own in zip(instructions, drawn, strict=True):
            steers = {"none": (), **bench.controls.like([vectors[instruction.id]]), "instructed": ()}
            steers |= {draw.label: (vector,) for draw, vector in own.items()}
            asked.append(bench.compare(instruction, steers))
        rows = bench.run(asked, score=False)
    sizes = sizes_of(rows, draws, drawn)
    by_instruction = {
        name: {members[0].size: _mean_share(own, members) for members in draws}
        for name, own in rows.by("instruction").items()
    }
    advice = where_it_stops(sizes)
    ids = ", ".join(instruction.id for instruction in instructions)
    beside = [[name, rows.of(name).share] for name in ("none", "random", "instructed")]
    control = Table(["beside it", "follow"], beside)
    return StudyReport(
        model=bench.model,
        figures={"sizes": sizes, "advice": advice, "instructions": by_instruction},
        sections=[
            section("pairs.advice", more=advice),
            section(
                "pairs.follow", _table(sizes), control, _plot(sizes, by_instruction),
                ids=ids, n=len(draws[0]), more=left_out,
            ),
        ],
    )  # fmt: skip


def draws_of(counts: Sequence[int], wordings: Sequence[int], n_draws: int) -> list[list[Draw]]:
    """By size: of any wordings, then N_PAIRS of few."""
    kinds = [(n, 0) for n in counts] + [(N_PAIRS, few) for few in wordings]
    return [[Draw(*kind, number) for number in range(n_draws)] for kind in kinds]


def _mean_share(rows: Outcomes, members: Sequence[Draw]) -> float | None:
    return mean([rows.of(draw.label).followed for draw in members])


def where_it_stops(sizes: Sequence[Size]) -> str:
    """The fewest pairs, and the fewest wordings, that come within ENOUGH of the best."""
    whole = [size for size in sizes if not size.wordings]
    best = max(size.followed.share for size in whole)
    enough = next(size for size in whole if size.followed.share >= best - ENOUGH)
    share, most = rough_percent(enough.followed.share), whole[-1].n_pairs
    texts = [said("pairs.enough", n=enough.n_pairs, share=share, best=rough_percent(best), most=most)]
    reached = next((size for size in whole if size.n_pairs == N_PAIRS), whole[-1]).followed.share
    for size in (size for size in sizes if size.wordings):
        texts.append(
            said(
                "pairs.wordings",
                what=f"{size.wordings} wording{'s' if size.wordings > 1 else ''}",
                n=size.n_pairs,
                verdict="as good as" if size.followed.share >= reached - ENOUGH else "worse than",
                share=rough_percent(size.followed.share),
                reached=rough_percent(reached),
            )
        )
    return " ".join(texts)


def _table(sizes: Sequence[Size]) -> Table:
    rows: list[list[Value]] = [
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
    x = [str(size.n_pairs) for size in whole]
    return Lines("Replies that follow, by pairs", "pairs", "share of replies", x=x, series=series)
