"""Three instructions that are put together: which, in what ways, and which way does best."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np

from localsteer.catalog import Instruction, Query
from localsteer.errors import CatalogError
from localsteer.evaluate.bench import Bench
from localsteer.evaluate.cells import Arm, label_of
from localsteer.evaluate.outcomes import Outcomes
from localsteer.evaluate.page import Share
from localsteer.evaluate.studies.candidates import Candidate
from localsteer.evaluate.studies.common import StudyJob
from localsteer.evaluate.texts import said
from localsteer.vector import ControlVector
from localsteer.verify.judge import ENDLESS

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
CONDITIONS = (
    "none", "told", "own settings", "one layer", "different layers", "best", "best and told", "random",
)  # fmt: skip


class TripleFigures(TypedDict):
    """followed, parts: by condition, how many replies follow all three, and each of them. validation, best:
    by kind, the score of the best way, and the way."""

    instructions: list[str]
    followed: dict[str, Share]
    parts: dict[str, dict[str, float | None]]
    validation: dict[str, float]
    best: dict[str, str]


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
        return {instruction.id: judged_by(rows, instruction).followed for instruction in self.instructions}

    def figures(self) -> TripleFigures:
        return {
            "instructions": [instruction.id for instruction in self.instructions],
            "followed": {name: self.share(name) for name in CONDITIONS},
            "parts": {name: self.parts(name) for name in CONDITIONS},
            "validation": self.validation,
            "best": {kind: way.label for kind, way in self.best.items()},
        }


# --- the best way to put them together ---------------------------------------------------------------------


def tried(
    bench: Bench, three: Sequence[Instruction], ways: Sequence[Candidate], queries: Sequence[Query]
) -> Triple:
    """The ways on these queries, the best of each kind on test queries."""
    arms = [Arm(way.label, way.vectors) for way in ways]
    rows = bench.run([bench.experiment(three, arms, queries)], what="ways", score=False)
    scores = {label: _good(part, three) for label, part in rows.by("condition").items()}
    best: dict[str, Candidate] = {}
    for way in sorted(ways, key=lambda way: -scores[way.label]):
        best.setdefault(way.kind, way)
    winner = max(best.values(), key=lambda way: scores[way.label])
    steers = {
        "none": (), "told": (), **{kind: way.vectors for kind, way in best.items()},
        "best": winner.vectors, "best and told": winner.vectors,
        "random": bench.controls.like(winner.vectors)["random"],
    }  # fmt: skip
    compared = bench.compare(three, steers, queries=bench.test)
    rows = bench.run([compared], what="comparing conditions", score=False)
    validation = {kind: scores[way.label] for kind, way in best.items()}
    return Triple(tuple(three), {**best, "best": winner}, validation, rows)


def _good(rows: Outcomes, three: Sequence[Instruction]) -> float:
    """All three hold, and the subject is kept; a tenth of the mean share of parts settles ties."""
    good = [bool(row.strict) and row.subject_kept is not False for row in rows]
    return float(np.mean(good)) + 0.1 * float(np.mean(held(rows, three)))


def held(rows: Outcomes, three: Sequence[Instruction]) -> list[float]:
    """The share of the three that each reply follows."""
    parts = [judged_by(rows, instruction) for instruction in three]
    return [float(np.mean([bool(row.strict) for row in of_one])) for of_one in zip(*parts, strict=True)]


def judged_by(rows: Outcomes, instruction: Instruction) -> Outcomes:
    """By one of the three: a reply without an end follows none of them either."""
    return Outcomes(
        judged
        for row in rows
        for judged in Outcomes([row]).judged_by(instruction, must_end=row.degenerate == ENDLESS)
    )


# --- which three -------------------------------------------------------------------------------------------


def triples_of(job: StudyJob, bench: Bench) -> tuple[list[tuple[Instruction, ...]], str]:
    """Those named, or the usual ones that the catalogue has, and what is to be said of them."""
    if job.wanted is not None:
        if len(job.wanted) != 3:
            raise CatalogError(f"three instructions are put together, and {len(job.wanted)} are named")
        return [tuple(job.instructions(job.wanted))], ""
    plain = bench.plain(bench.validation, what="the plain model")
    excluded, share = _excluded(bench, plain)
    long = _long(job)
    known = job.catalog.instructions
    stands_for = {EXCLUDED: excluded, LONG[0]: long}
    triples = [
        tuple(stands_for.get(name) or job.catalog.get(name) for name in names)
        for names in TRIPLES[: 1 if job.quick else None]
        if all(name in stands_for or name in known for name in names)
    ]
    if not triples:
        raise CatalogError(f"{job.catalog.source} has none of the usual triples: name three --instructions")
    about = said(
        "compound.about",
        words=plain.words,
        least=long.kwargs.get("num_words"),
        long=long.id,
        excluded=excluded.id,
        forbidden=", ".join(excluded.kwargs.get("forbidden_words", ())),
        share=1 - share,
    )
    return triples, about


def _long(job: StudyJob) -> Instruction:
    known = job.catalog.instructions
    if LONG[1] in known:
        return job.catalog.get(LONG[1], n=80)
    if LONG[0] in known:
        return job.catalog.get(LONG[0])
    raise CatalogError(f"{job.catalog.source} has none of {', '.join(LONG)}: name three --instructions")


def _excluded(bench: Bench, plain: Outcomes) -> tuple[Instruction, float]:
    """The instruction to exclude the word that plain replies hold most, and the share that lacks it."""
    known = [each for name, each in bench.catalog.instructions.items() if name.startswith(EXCLUDED)]
    filled = [each.fill() for each in known if set(each.open_slots) <= set(each.slots)]
    if not filled and known:
        texts = (row.reply.text for row in plain)
        words = Counter(word for text in texts for word in set(re.findall(r"[a-z]{5,}", text.lower())))
        filled = [known[0].fill(word=word) for word, _ in words.most_common(1)]
    if not filled:
        raise CatalogError(f"{bench.catalog.source} excludes no word: name three --instructions")
    shares = [(each, judged_by(plain, each).followed) for each in filled]
    return min(shares, key=lambda pair: pair[1])


def minus_of(bench: Bench, instructions: Sequence[Instruction]) -> dict[str, ControlVector]:
    """The include vector of each excluded word, where the catalogue can ask for any word."""
    include = bench.catalog.instructions.get(INCLUDE)
    words = {instruction.id: instruction.kwargs.get("forbidden_words", ()) for instruction in instructions}
    filled = {
        name: include.fill(word=forbidden[0])
        for name, forbidden in words.items()
        if include is not None and len(forbidden) == 1 and "word" in include.open_slots
    }
    raw = bench.vectors.raw(list(filled.values())) if filled else {}
    return {name: raw[each.id] for name, each in filled.items()}
