"""Three instructions at once, the seed's own case among them: about 100 words, JSON, without a given word.

How three vectors are put together is chosen on validation queries, from: each at its own settings, all at one
layer (solved jointly), each at another layer. Shown on test queries, beside the words themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from localsteer.evaluate.page import Bars, Section, Share, StudyReport, Table, Value
from localsteer.evaluate.report.figures import rough_percent
from localsteer.evaluate.studies.candidates import KINDS, N_SPREAD, candidates
from localsteer.evaluate.studies.common import StudyJob
from localsteer.evaluate.studies.triples import CONDITIONS, Triple, minus_of, tried, triples_of
from localsteer.evaluate.texts import said, section

NAME, TITLE = "compound", "Three instructions at once"
N_VALIDATION = 8
QUICK = (4, 2)  # N_SPREAD and N_VALIDATION


def run(job: StudyJob) -> StudyReport:
    """Raises CatalogError where `wanted` is not three instructions."""
    n_spread, n_tried = QUICK if job.quick else (N_SPREAD, N_VALIDATION)
    with job.bench() as bench:
        chosen, about = triples_of(job, bench)
        every = list({instruction.id: instruction for three in chosen for instruction in three}.values())
        vectors, raw = bench.vectors.tuned(every), bench.vectors.raw(every)
        minus = minus_of(bench, every)
        triples = []
        for three in chosen:
            ways = candidates(three, vectors, raw, minus, n_spread=n_spread, seed=bench.seed)
            triples.append(tried(bench, three, ways, bench.validation[:n_tried]))
    advice = conclusion(triples)
    return StudyReport(
        model=bench.model,
        figures={"triples": [triple.figures() for triple in triples], "advice": advice},
        sections=[section("compound.advice", more=f"{about} {advice}"), *_sections(triples)],
    )


def conclusion(triples: Sequence[Triple]) -> str:
    """Plainly, for each triple."""
    texts = []
    for triple in triples:
        shares = {name: rough_percent(triple.share(name).share) for name in CONDITIONS}
        texts.append(said("compound.triple", name=triple.name, way=triple.best["best"].label, **shares))
    totals = {kind: np.mean([triple.share(kind).share or 0.0 for triple in triples]) for kind in KINDS}
    ranked = ", ".join(f"{kind} {totals[kind]:.0%}" for kind in sorted(KINDS, key=lambda kind: -totals[kind]))
    return " ".join([*texts, said("compound.ranked", kinds=ranked)])


def _sections(triples: Sequence[Triple]) -> Iterator[Section]:
    whole: list[list[Value]] = [[triple.name, *map(triple.share, CONDITIONS)] for triple in triples]
    names = [triple.name for triple in triples]
    series = {name: [triple.share(name) for triple in triples] for name in CONDITIONS}
    plot = Bars("All three hold", "", "share of replies", x=names, series=series)
    yield section("compound.whole", Table(["instructions", *CONDITIONS], whole), plot)
    parts: list[list[Value]] = []
    for triple in triples:
        shares = {name: triple.parts(name) for name in CONDITIONS}
        for instruction in triple.instructions:
            own = [Share(shares[name][instruction.id]) for name in CONDITIONS]
            parts.append([triple.name, instruction.id, *own])
    yield section("compound.parts", Table(["instructions", "of them", *CONDITIONS], parts))
    quality: list[list[Value]] = [
        [triple.name, name, Share(rows.subject_kept), Share(rows.degenerate), rows.words]
        for triple in triples
        for name in ("none", "told", "best")
        for rows in [triple.rows.of(name)]
    ]
    columns = ["instructions", "condition", "subject kept", "degenerate", "words"]
    yield section("compound.quality", Table(columns, quality))
    ways: list[list[Value]] = [
        [triple.name, kind, way.label, triple.validation.get(kind)]
        for triple in triples
        for kind, way in triple.best.items()
        if kind != "best"
    ]
    yield section("compound.ways", Table(["instructions", "kind", "way", "score"], ways))
