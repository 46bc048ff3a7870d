"""Three instructions at once, the seed's own case among them: about 100 words, JSON, without a given word.

How three vectors are put together is chosen on validation queries, from: each at its own settings, all at one
layer (solved jointly), each at another layer. Shown on test queries, beside the words themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from localsteer.catalog import Instruction, Query
from localsteer.evaluate.bench import Bench
from localsteer.evaluate.cells import Arm, arms_of, label_of
from localsteer.evaluate.controls import controls_of
from localsteer.evaluate.outcomes import Outcomes
from localsteer.evaluate.page import Bars, Section, Share, StudyReport, Table, Value
from localsteer.evaluate.report.figures import rough_percent
from localsteer.evaluate.studies.candidates import KINDS, N_SPREAD, Candidate, candidates
from localsteer.evaluate.studies.common import StudyJob
from localsteer.evaluate.studies.triples import judged_by, minus_of, triples_of

NAME = "compound"
TITLE = "Three instructions at once"
N_VALIDATION = 8
QUICK = (4, 2)  # N_SPREAD and N_VALIDATION
CONDITIONS = (
    "none",
    "told",
    "own settings",
    "one layer",
    "different layers",
    "best",
    "best and told",
    "random",
)


@dataclass(frozen=True)
class Triple:
    """Three instructions. best: by kind, the candidate with the most good replies on validation queries."""

    instructions: tuple[Instruction, ...]
    best: dict[str, Candidate]
    validation: dict[str, float]
    rows: Outcomes

    @property
    def name(self) -> str:
        return label_of(self.instructions)

    def share(self, condition: str) -> Share:
        return self.rows.of(condition).share

    def parts(self, condition: str) -> dict[str, float | None]:
        """How many replies follow each of the three."""
        rows = self.rows.of(condition)
        return {each.id: judged_by(rows, each).followed for each in self.instructions}


def run(job: StudyJob) -> StudyReport:
    """Raises CatalogError where `wanted` is not three instructions."""
    with job.bench() as bench:
        chosen, said = triples_of(job, bench)
        every = list(
            {instruction.id: instruction for instructions in chosen for instruction in instructions}.values()
        )
        vectors, raw = bench.vectors(every), bench.raw(every)
        minus = minus_of(bench, every)
        n_spread, n_tried = QUICK if job.quick else (N_SPREAD, N_VALIDATION)
        triples = []
        for three in chosen:
            ways = candidates(three, vectors, raw, minus, n_spread=n_spread, seed=bench.seed)
            triples.append(_try(bench, three, ways, bench.validation[:n_tried]))
        model = bench.model
    advice = conclusion(triples)
    return StudyReport(
        model=model,
        figures={
            "triples": [
                {
                    "instructions": [each.id for each in triple.instructions],
                    "followed": {name: triple.share(name) for name in CONDITIONS},
                    "parts": {name: triple.parts(name) for name in CONDITIONS},
                    "validation": triple.validation,
                    "best": {kind: way.label for kind, way in triple.best.items()},
                }
                for triple in triples
            ],
            "advice": advice,
        },
        sections=[Section("What holds at once", f"{said} {advice}"), *_sections(triples)],
    )


# --- how they are put together -----------------------------------------------------------------------------


def _try(
    bench: Bench, three: Sequence[Instruction], ways: Sequence[Candidate], queries: Sequence[Query]
) -> Triple:
    """The ways on these queries, the best of each kind on test queries."""
    tried = bench.experiment(three, [Arm(way.label, way.vectors) for way in ways], queries)
    rows = bench.run([tried], what="ways", score=False)
    scores = {label: _good(part, three) for label, part in rows.by("condition").items()}
    best: dict[str, Candidate] = {}
    for way in sorted(ways, key=lambda way: -scores[way.label]):
        best.setdefault(way.kind, way)
    winner = max(best.values(), key=lambda way: scores[way.label])
    steers = {
        "none": (), "told": (), **{kind: way.vectors for kind, way in best.items()},
        "best": winner.vectors, "best and told": winner.vectors,
        "random": controls_of(winner.vectors, (), bench.plain_mean(), bench.seed)["random"],
    }  # fmt: skip
    compared = bench.experiment(three, arms_of(steers, list(steers)), bench.test)
    rows = bench.run([compared], what="comparing conditions", score=False)
    validation = {kind: scores[way.label] for kind, way in best.items()}
    return Triple(tuple(three), {**best, "best": winner}, validation, rows)


def _good(rows: Outcomes, three: Sequence[Instruction]) -> float:
    """All three hold, and the subject is kept; a tenth of the mean share of parts settles ties."""
    good = [bool(row.strict) and row.subject_kept is not False for row in rows]
    return float(np.mean(good)) + 0.1 * float(np.mean(held(rows, three)))


def held(rows: Outcomes, three: Sequence[Instruction]) -> list[float]:
    """The share of the three that each reply follows."""
    parts = [judged_by(rows, each) for each in three]
    return [float(np.mean([bool(row.strict) for row in of_one])) for of_one in zip(*parts, strict=True)]


# --- what is said ------------------------------------------------------------------------------------------


def conclusion(triples: Sequence[Triple]) -> str:
    """Plainly, for each triple."""
    sentences = []
    for triple in triples:
        shares = {name: rough_percent(triple.share(name).share) for name in CONDITIONS}
        sentences.append(
            f"{triple.name}: all three hold in {shares['best']} of steered replies "
            f"({triple.best['best'].label}), {shares['none']} of plain ones, {shares['told']} "
            f"when told in words, {shares['random']} with random directions."
        )
    totals = {kind: np.mean([triple.share(kind).share or 0.0 for triple in triples]) for kind in KINDS}
    ranked = ", ".join(f"{kind} {totals[kind]:.0%}" for kind in sorted(KINDS, key=lambda kind: -totals[kind]))
    return " ".join(sentences) + f" On average over the triples: {ranked}."


def _sections(triples: Sequence[Triple]) -> Iterator[Section]:
    shares = [[triple.name, *map(triple.share, CONDITIONS)] for triple in triples]
    plot = Bars(
        title="All three hold",
        y_label="share of replies",
        x=[triple.name for triple in triples],
        series={name: [triple.share(name) for triple in triples] for name in CONDITIONS},
    )
    yield Section("All three hold", "", [Table(["instructions", *CONDITIONS], shares)], [plot])
    parts = {triple.name: {name: triple.parts(name) for name in CONDITIONS} for triple in triples}
    rows: list[list[Value]] = [
        [
            triple.name,
            instruction.id,
            *(Share(parts[triple.name][name][instruction.id]) for name in CONDITIONS),
        ]
        for triple in triples
        for instruction in triple.instructions
    ]
    yield Section("Each of them holds", "", [Table(["instructions", "of them", *CONDITIONS], rows)])
    rows = [
        [triple.name, name, Share(rows.subject_kept), Share(rows.degenerate), rows.words]
        for triple in triples
        for name in ("none", "told", "best")
        for rows in [triple.rows.of(name)]
    ]
    columns = ["instructions", "condition", "subject kept", "degenerate", "words"]
    yield Section("Still a reply?", "", [Table(columns, rows)])
    rows = [
        [triple.name, kind, way.label, triple.validation.get(kind)]
        for triple in triples
        for kind, way in triple.best.items()
        if kind != "best"
    ]
    yield Section(
        "How they were put together",
        "Chosen on validation queries; the score is the share of replies where all three hold and the "
        "subject is kept, plus a tenth of the mean share of checks that pass.",
        [Table(["instructions", "kind", "way", "score"], rows)],
    )
