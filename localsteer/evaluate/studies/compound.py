"""Three instructions at once, the seed's own case among them: about 100 words, JSON, without a given word.

How three vectors are put together is chosen on validation queries, from: each at its own settings, all at one
block (solved jointly), each at another block. Shown on test queries, beside the words themselves.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

import numpy as np

from localsteer.catalog import Instruction, Query
from localsteer.errors import CatalogError, PlanError
from localsteer.evaluate.conditions import random_control
from localsteer.evaluate.studies.common import (
    StudyJob,
    accuracy_of,
    grouped,
    lines,
    percent,
    section,
    share_of,
    table,
)
from localsteer.evaluate.suites.bench import Bench
from localsteer.evaluate.suites.cells import (
    Cell,
    Result,
    Rule,
    Verdict,
    applied,
    checks_of,
    figures,
    judge_cell,
)
from localsteer.plan import Plan
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
POSITIONS = ("prompt", "all")
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
    """One way to put vectors together. kind: own settings, one block, different blocks."""

    kind: str
    label: str
    vectors: tuple[ControlVector, ...]


@dataclass(frozen=True)
class Found:
    """One triple. best: by kind, the candidate with the most good replies on validation queries."""

    instructions: tuple[Instruction, ...]
    best: dict[str, Candidate]
    validation: dict[str, float]
    results: list[Result]

    @property
    def name(self) -> str:
        return " + ".join(each.id for each in self.instructions)

    def of(self, condition: str) -> list[Result]:
        return grouped(self.results, "condition").get((condition,), [])


def run(job: StudyJob) -> dict[str, Any]:
    """Raises CatalogError where `wanted` is not three instructions."""
    with job.bench() as bench:
        triples, said = _triples(job, bench)
        every = list({each.id: each for triple in triples for each in triple}.values())
        vectors, raw = bench.vectors(every), bench.raw(every)
        minus = _minus(bench, every)
        found = [_try(bench, triple, vectors, raw, minus, job.quick) for triple in triples]
        model = bench.model
    return {
        "model": model,
        "figures": {
            "triples": [
                {
                    "instructions": [each.id for each in one.instructions],
                    "followed": {name: share_of(one.of(name)) for name in CONDITIONS},
                    "parts": {name: parts(one, name) for name in CONDITIONS},
                    "validation": one.validation,
                    "best": {kind: each.label for kind, each in one.best.items()},
                }
                for one in found
            ],
            "advice": conclusion(found),
        },
        "sections": _sections(found, said),
    }


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
            triples.append(tuple(_filled(job, each) for each in ids))
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


def _filled(job: StudyJob, each: Instruction | str) -> Instruction:
    return each if isinstance(each, Instruction) else job.catalog.get(each)


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
    shares = {each.id: _lacks(each, plain) for each in filled}
    return min(((each, shares[each.id]) for each in filled), key=lambda pair: pair[1])


def _minus(bench: Bench, instructions: Sequence[Instruction]) -> dict[str, ControlVector]:
    """The include vector of each excluded word, where the catalogue can ask for any word."""
    include = bench.catalog.instructions.get(INCLUDE)
    words = {each.id: each.kwargs.get("forbidden_words", ()) for each in instructions}
    filled = {
        name: include.fill(word=found[0])
        for name, found in words.items()
        if include is not None and len(found) == 1 and "word" in include.open_slots
    }
    raw = bench.raw(list(filled.values())) if filled else {}
    return {name: raw[each.id] for name, each in filled.items()}


def _lacks(instruction: Instruction, plain: Sequence[Result]) -> float:
    verdicts = [_judged_by(result, checks_of(instruction, result.cell.query)).strict for result in plain]
    return float(np.mean([bool(each) for each in verdicts]))


# --- how they are put together -----------------------------------------------------------------------------


def candidates(
    instructions: Sequence[Instruction],
    vectors: dict[str, ControlVector],
    raw: dict[str, ControlVector],
    minus: dict[str, ControlVector] | None = None,
    *,
    n_spread: int = N_SPREAD,
    seed: int = 0,
) -> list[Candidate]:
    """Ways to put the vectors together; those whose directions are nearly parallel at a block are left out.

    Blocks of the lower two thirds: above them little is left to steer. minus: for an instruction to exclude a
    word, the vector that includes it; the paper excludes by adding it with a negative strength.
    """
    own = [vectors[each.id] for each in instructions]
    found = [Candidate("own settings", "own settings", tuple(v for each in own for v in applied(each)))]
    blocks = range(max(3, 2 * own[0].n_layer // 3))
    bare = [raw[each.id].at(mode="project", strength=1.0) for each in instructions]
    for where in POSITIONS:
        for il in blocks:
            same = tuple(each.at(layer=il, positions=where) for each in bare)
            found.append(Candidate("one block", f"block {il}, {where}", same))
    orders = list(permutations(blocks, len(bare)))
    chosen = np.random.default_rng(seed).permutation(len(orders))[:n_spread]
    for order in (orders[i] for i in sorted(chosen)):
        apart = tuple(each.at(layer=il, positions=POSITIONS[0]) for each, il in zip(bare, order, strict=True))
        label = f"blocks {', '.join(map(str, order))}, {POSITIONS[0]}"
        found.append(Candidate("different blocks", label, apart))
    found += [way for each in found[1:] for way in _excluding(each, instructions, minus or {})]
    return [each for each in found if _can_be(each)]


def _excluding(
    way: Candidate, instructions: Sequence[Instruction], minus: dict[str, ControlVector]
) -> Iterator[Candidate]:
    """The same with a word excluded by minus its include vector."""
    for strength in MINUS if any(each.id in minus for each in instructions) else ():
        vectors = [
            minus[each.id].at(layer=old.layers, positions=old.positions, mode="add", strength=-strength)
            if each.id in minus
            else old
            for each, old in zip(instructions, way.vectors, strict=True)
        ]
        yield Candidate(way.kind, f"{way.label}, minus {strength:g} x include", tuple(vectors))


def _can_be(candidate: Candidate) -> bool:
    try:
        Plan.from_vectors(candidate.vectors)
    except PlanError:
        return False
    return True


def _try(
    bench: Bench,
    triple: Sequence[Instruction],
    vectors: dict[str, ControlVector],
    raw: dict[str, ControlVector],
    minus: dict[str, ControlVector],
    quick: bool,
) -> Found:
    ways = candidates(triple, vectors, raw, minus, n_spread=4 if quick else N_SPREAD, seed=bench.seed)
    queries = bench.validation[: 2 if quick else N_VALIDATION]
    cells = [cell for way in ways for cell in _cells(bench, triple, way.label, queries, way.vectors)]
    scores = {
        name: _good(found)
        for (name,), found in grouped(bench.run(cells, what="ways", score=False), "condition").items()
    }
    best: dict[str, Candidate] = {}
    for way in sorted(ways, key=lambda way: -scores[way.label]):
        best.setdefault(way.kind, way)
    winner = max(best.values(), key=lambda way: scores[way.label])
    control = tuple(
        random_control(each, bench.plain_mean(), bench.seed + k) for k, each in enumerate(winner.vectors)
    )
    steers = {
        "none": (), "told": (), **{kind: way.vectors for kind, way in best.items()},
        "best": winner.vectors, "best and told": winner.vectors, "random": control,
    }  # fmt: skip
    cells = []
    for name, steer in steers.items():
        cells += _cells(bench, triple, name, bench.test, steer, told="told" in name)
    results = bench.run(cells, what="comparing conditions", score=False)
    validation = {kind: scores[way.label] for kind, way in best.items()}
    return Found(tuple(triple), {**best, "best": winner}, validation, results)


def _cells(
    bench: Bench,
    triple: Sequence[Instruction],
    condition: str,
    queries: Sequence[Query],
    vectors: Sequence[ControlVector],
    *,
    told: bool = False,
) -> list[Cell]:
    name = " + ".join(each.id for each in triple)
    cells = []
    for i, query in enumerate(queries):
        words = " ".join(each.phrasings[i % len(each.phrasings)] for each in triple)
        checks = tuple(check for each in triple for check in checks_of(each, query))
        prompt = f"{query.text} {words}" if told else query.text
        cells.append(Cell(name, condition, query, prompt, tuple(vectors), checks, bench.max_tokens))
    return cells


def _good(results: Sequence[Result]) -> float:
    """All three hold, and the subject is kept; a tenth of the mean share of parts settles ties."""
    kept = [result.verdict.strict and result.verdict.subject_kept is not False for result in results]
    held = [_held(result) for result in results]
    return float(np.mean([bool(each) for each in kept])) + 0.1 * float(np.mean(held))


def _held(result: Result) -> float:
    """The share of a reply's checks that pass."""
    verdicts = [_judged_by(result, (each,)).strict for each in result.cell.checks]
    return float(np.mean([bool(each) for each in verdicts]))


def _judged_by(result: Result, checks: Sequence[Rule]) -> Verdict:
    """By some of its checks: a reply without an end follows none of them either."""
    cell = replace(result.cell, checks=tuple(checks))
    return judge_cell(cell, result.reply, must_end=result.verdict.degenerate == ENDLESS)


# --- what is said ------------------------------------------------------------------------------------------


def parts(found: Found, condition: str) -> dict[str, float | None]:
    """How many replies follow each of the three."""
    shares = {}
    for each in found.instructions:
        results = [
            replace(result, verdict=_judged_by(result, checks_of(each, result.cell.query)))
            for result in found.of(condition)
        ]
        shares[each.id] = accuracy_of(results) if results else None
    return shares


def conclusion(found: Sequence[Found]) -> str:
    """Plainly, for each triple."""
    sentences = []
    for one in found:
        shares = {name: share_of(one.of(name))["share"] for name in CONDITIONS}
        sentences.append(
            f"{one.name}: all three hold in {percent(shares['best'])} of steered replies "
            f"({one.best['best'].label}), {percent(shares['none'])} of plain ones, {percent(shares['told'])} "
            f"when told in words, {percent(shares['random'])} with random directions."
        )
    kinds = ("own settings", "one block", "different blocks")
    totals = {kind: np.mean([share_of(one.of(kind))["share"] or 0.0 for one in found]) for kind in kinds}
    ranked = ", ".join(f"{kind} {totals[kind]:.0%}" for kind in sorted(kinds, key=lambda kind: -totals[kind]))
    return " ".join(sentences) + f" On average over the triples: {ranked}."


def _sections(found: Sequence[Found], said: str) -> list[dict[str, Any]]:
    shares = [[one.name, *(share_of(one.of(name)) for name in CONDITIONS)] for one in found]
    rows = []
    for one in found:
        for each in one.instructions:
            held = [{"share": parts(one, name)[each.id]} for name in CONDITIONS]
            rows.append([one.name, each.id, *held])
    quality = [
        [one.name, name, *(_quality(one.of(name), key) for key in ("subject_kept", "degenerate", "words"))]
        for one in found
        for name in ("none", "told", "best")
    ]
    ways = [[one.name, kind, way.label, one.validation.get(kind)]
            for one in found for kind, way in one.best.items() if kind != "best"]  # fmt: skip
    series = {name: [share_of(one.of(name)) for one in found] for name in CONDITIONS}
    plot = lines("All three hold", "", "share of replies", [one.name for one in found], series) | {
        "kind": "bars"
    }
    return [
        section("What holds at once", f"{said} {conclusion(found)}"),
        section("All three hold", "", [table(("instructions", *CONDITIONS), shares)], [plot]),
        section("Each of them holds", "", [table(("instructions", "of them", *CONDITIONS), rows)]),
        section(
            "Still a reply?",
            "",
            [table(("instructions", "condition", "subject kept", "degenerate", "words"), quality)],
        ),
        section(
            "How they were put together",
            "Chosen on validation queries; the score is the share of replies where all three hold and the "
            "subject is kept, plus a tenth of the mean share of checks that pass.",
            [table(("instructions", "kind", "way", "score"), ways)],
        ),
    ]


def _quality(results: Sequence[Result], key: str) -> Any:
    value = figures(results)["quality"][key]
    return value if key == "words" else {"share": value}
