"""Three instructions at once, the seed's own case among them: about 100 words, JSON, without a given word.

How three vectors are put together is chosen on validation queries, from: each at its own settings, all at one
block (solved jointly), each at another block. Shown on test queries, beside the words themselves.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from localsteer.catalog import Instruction, Query
from localsteer.errors import CatalogError
from localsteer.evaluate.conditions import arms_of, controls_of, is_possible
from localsteer.evaluate.page import Bars, Section, Share, StudyReport, Table, Value
from localsteer.evaluate.report.figures import rough_percent
from localsteer.evaluate.studies.common import StudyJob
from localsteer.evaluate.suites.bench import Bench
from localsteer.evaluate.suites.cells import (
    Arm,
    Cell,
    Result,
    accuracy_of,
    applied,
    figures,
    grouped,
    label_of,
    rejudged,
    select,
    share_of,
)
from localsteer.vector import ControlVector
from localsteer.verify.judge import ENDLESS

NAME = "compound"
TITLE = "Three instructions at once"
INCLUDE = "include_word"
EXCLUDED = "exclude"  # stands for an instruction that excludes a word which plain replies use
LONG = ("verbose", "words_over")  # in place of about 100 words, as the catalogue has it
TRIPLES = (
    ("json", LONG[0], EXCLUDED),
    ("lowercase", "one_sentence", EXCLUDED),
    ("lowercase", "bullets", EXCLUDED),
    ("uppercase", "title", "one_sentence"),
    ("no_comma", "quotation", "lowercase"),
)
N_VALIDATION = 8
N_SPREAD = 16  # ways to put the three at different blocks that are tried
QUICK = (4, 2)  # the same two numbers
POSITIONS = ("prompt", "all")
KINDS = ("own settings", "one block", "different blocks")
MINUS = (1.0, 2.0)  # strengths with which a word's include vector is taken away
CONDITIONS = (
    "none",
    "told",
    "own settings",
    "one block",
    "different blocks",
    "best",
    "best and told",
    "random",
)


@dataclass(frozen=True)
class Candidate:
    """One way to put vectors together. kind: one of KINDS."""

    kind: str
    label: str
    vectors: tuple[ControlVector, ...]


@dataclass(frozen=True)
class Triple:
    """Three instructions. best: by kind, the candidate with the most good replies on validation queries."""

    instructions: tuple[Instruction, ...]
    best: dict[str, Candidate]
    validation: dict[str, float]
    results: list[Result]

    @property
    def name(self) -> str:
        return label_of(self.instructions)

    def of(self, condition: str) -> list[Result]:
        return select(self.results, condition)

    def share(self, condition: str) -> Share:
        return share_of(self.of(condition))

    def parts(self, condition: str) -> dict[str, float | None]:
        """How many replies follow each of the three."""
        results = self.of(condition)
        return {
            instruction.id: accuracy_of(_judged_by(results, instruction)) for instruction in self.instructions
        }


def run(job: StudyJob) -> StudyReport:
    """Raises CatalogError where `wanted` is not three instructions."""
    with job.bench() as bench:
        chosen, said = _triples(job, bench)
        every = list(
            {instruction.id: instruction for instructions in chosen for instruction in instructions}.values()
        )
        vectors, raw = bench.vectors(every), bench.raw(every)
        minus = _minus(bench, every)
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


# --- which three -------------------------------------------------------------------------------------------


def _triples(job: StudyJob, bench: Bench) -> tuple[list[tuple[Instruction, ...]], str]:
    if job.wanted is not None:
        if len(job.wanted) != 3:
            raise CatalogError(f"three instructions are put together, and {len(job.wanted)} are named")
        return [tuple(job.instructions(job.wanted))], ""
    plain = _plain(bench)
    excluded, share = _excluded(bench, plain)
    words = float(np.mean([result.verdict.n_words for result in plain]))
    long = _long(job)
    triples = []
    for names in TRIPLES[: 1 if job.quick else None]:
        ids = [excluded if name == EXCLUDED else long if name == LONG[0] else name for name in names]
        if all(isinstance(each, Instruction) or each in job.catalog.instructions for each in ids):
            triples.append(
                tuple(each if isinstance(each, Instruction) else job.catalog.get(each) for each in ids)
            )
    if not triples:
        raise CatalogError(f"{job.catalog.source} has none of the usual triples: name three --instructions")
    least = long.kwargs.get("num_words")
    said = (
        f"The seed's case is about 100 words, JSON, without a given word. This model's plain replies have "
        f"{words:.0f} words on average, so the length asked for here is at least {least} words ({long.id}). "
        f"The word to avoid ({excluded.id}: {', '.join(excluded.kwargs.get('forbidden_words', ()))}) is in "
        f"{1 - share:.0%} of the plain replies."
    )
    return triples, said


def _long(job: StudyJob) -> Instruction:
    known = job.catalog.instructions
    if LONG[1] in known:
        return job.catalog.get(LONG[1], n=80)
    if LONG[0] in known:
        return job.catalog.get(LONG[0])
    raise CatalogError(f"{job.catalog.source} has none of {', '.join(LONG)}: name three --instructions")


def _plain(bench: Bench) -> list[Result]:
    """The model alone on validation queries."""
    cells = [Cell("none", "none", q, q.text, max_tokens=bench.max_tokens) for q in bench.validation]
    return bench.run(cells, what="the model alone", score=False)


def _excluded(bench: Bench, plain: Sequence[Result]) -> tuple[Instruction, float]:
    """The instruction to exclude the word that plain replies hold most, and the share that lacks it."""
    known = [each for name, each in bench.catalog.instructions.items() if name.startswith(EXCLUDED)]
    filled = [each.fill() for each in known if set(each.open_slots) <= set(each.slots)]
    if not filled and known:
        texts = (result.reply.text for result in plain)
        words = Counter(word for text in texts for word in set(re.findall(r"[a-z]{5,}", text.lower())))
        filled = [known[0].fill(word=word) for word, _ in words.most_common(1)]
    if not filled:
        raise CatalogError(f"{bench.catalog.source} excludes no word: name three --instructions")
    shares = [(each, accuracy_of(_judged_by(plain, each))) for each in filled]
    return min(shares, key=lambda pair: pair[1])


def _minus(bench: Bench, instructions: Sequence[Instruction]) -> dict[str, ControlVector]:
    """The include vector of each excluded word, where the catalogue can ask for any word."""
    include = bench.catalog.instructions.get(INCLUDE)
    words = {instruction.id: instruction.kwargs.get("forbidden_words", ()) for instruction in instructions}
    filled = {
        name: include.fill(word=forbidden[0])
        for name, forbidden in words.items()
        if include is not None and len(forbidden) == 1 and "word" in include.open_slots
    }
    raw = bench.raw(list(filled.values())) if filled else {}
    return {name: raw[each.id] for name, each in filled.items()}


# --- how they are put together -----------------------------------------------------------------------------


def candidates(
    instructions: Sequence[Instruction],
    vectors: Mapping[str, ControlVector],
    raw: Mapping[str, ControlVector],
    minus: Mapping[str, ControlVector] | None = None,
    *,
    n_spread: int = N_SPREAD,
    seed: int = 0,
) -> list[Candidate]:
    """Ways to put the vectors together; those whose directions are nearly parallel at a block are left out.

    Blocks of the lower two thirds: above them little is left to steer. minus: for an instruction to exclude a
    word, the vector that includes it; the paper excludes by adding it with a negative strength.
    """
    own = [vectors[instruction.id] for instruction in instructions]
    alone = Candidate(KINDS[0], KINDS[0], tuple(vector for each in own for vector in applied(each)))
    blocks = range(max(3, 2 * own[0].n_layer // 3))
    bare = [raw[each.id].at(mode="project", strength=1.0) for each in instructions]
    ways = [
        Candidate(KINDS[1], f"block {il}, {where}", tuple(v.at(layer=il, positions=where) for v in bare))
        for where in POSITIONS
        for il in blocks
    ]
    orders = list(permutations(blocks, len(bare)))
    drawn = np.random.default_rng(seed).permutation(len(orders))[:n_spread]
    for order in (orders[i] for i in sorted(drawn)):
        apart = tuple(v.at(layer=il, positions=POSITIONS[0]) for v, il in zip(bare, order, strict=True))
        ways.append(Candidate(KINDS[2], f"blocks {', '.join(map(str, order))}, {POSITIONS[0]}", apart))
    more = [other for way in ways for other in _excluding(way, instructions, minus or {})]
    return [way for way in (alone, *ways, *more) if is_possible(way.vectors)]


def _excluding(
    way: Candidate, instructions: Sequence[Instruction], minus: Mapping[str, ControlVector]
) -> Iterator[Candidate]:
    """The same with a word excluded by minus its include vector."""
    for strength in MINUS if any(instruction.id in minus for instruction in instructions) else ():
        vectors = [
            minus[each.id].at(layer=old.layers, positions=old.positions, mode="add", strength=-strength)
            if each.id in minus
            else old
            for each, old in zip(instructions, way.vectors, strict=True)
        ]
        yield Candidate(way.kind, f"{way.label}, minus {strength:g} x include", tuple(vectors))


def _try(
    bench: Bench, three: Sequence[Instruction], ways: Sequence[Candidate], queries: Sequence[Query]
) -> Triple:
    """The ways on these queries, the best of each kind on test queries."""
    cells = bench.cells(three, [Arm(way.label, way.vectors) for way in ways], queries)
    results = bench.run(cells, what="ways", score=False)
    scores = {name: _good(chosen, three) for (name,), chosen in grouped(results, "condition").items()}
    best: dict[str, Candidate] = {}
    for way in sorted(ways, key=lambda way: -scores[way.label]):
        best.setdefault(way.kind, way)
    winner = max(best.values(), key=lambda way: scores[way.label])
    steers = {
        "none": (), "told": (), **{kind: way.vectors for kind, way in best.items()},
        "best": winner.vectors, "best and told": winner.vectors,
        "random": controls_of(winner.vectors, (), bench.plain_mean(), bench.seed)["random"],
    }  # fmt: skip
    arms = arms_of(steers, list(steers))
    results = bench.run(bench.cells(three, arms, bench.test), what="comparing conditions", score=False)
    validation = {kind: scores[way.label] for kind, way in best.items()}
    return Triple(tuple(three), {**best, "best": winner}, validation, results)


def _good(results: Sequence[Result], three: Sequence[Instruction]) -> float:
    """All three hold, and the subject is kept; a tenth of the mean share of parts settles ties."""
    kept = [result.verdict.strict and result.verdict.subject_kept is not False for result in results]
    return float(np.mean([bool(good) for good in kept])) + 0.1 * float(np.mean(held(results, three)))


def held(results: Sequence[Result], three: Sequence[Instruction]) -> list[float]:
    """The share of the three that each reply follows."""
    parts = [_judged_by(results, each) for each in three]
    return [
        float(np.mean([bool(part.verdict.strict) for part in parts_of_one]))
        for parts_of_one in zip(*parts, strict=True)
    ]


def _judged_by(results: Sequence[Result], instruction: Instruction) -> list[Result]:
    """By one of the three: a reply without an end follows none of them either."""
    return [
        judged
        for result in results
        for judged in rejudged([result], instruction, result.verdict.degenerate == ENDLESS)
    ]


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
        [triple.name, name, Share(quality["subject_kept"]), Share(quality["degenerate"]), quality["words"]]
        for triple in triples
        for name in ("none", "told", "best")
        for quality in [figures(triple.of(name)).quality]
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
